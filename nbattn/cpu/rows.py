"""A block's query rows: what each of them sees, and their numbers as the tiles of `dots` take them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from . import dots, emitters, kinds, octets, simd
from .kinds import LARGEST_QUERY, LEAST
from .nibbles import QUERY_BYTES


def build(
    jit: Any, storage: str, padded: Any, widen_query: Any, round_queries: Any = None
) -> tuple[Any, Any, Any, Any]:
    """The compiled functions ``rows_together(p)``, ``in_place(p, together)``, ``by_keys(p)`` and ``set_up``.

    `p` is the call's parameters, `w` a thread's `chunks.Scratch`; `round_queries` is of `nibbles`.
    """
    dtype: Any = np.float64 if storage == "float64" else np.float32
    number = types.float64 if storage == "float64" else types.float32
    size = np.dtype(dtype).itemsize
    lanes = simd.lanes(dtype)
    register = emitters.REGISTER_BYTES
    wide_rows = dots.rows_per_vector(lanes)
    pair_rows = 2 if wide_rows > 2 else 0
    kind = kinds.read_as(storage)
    parities, pairs, whole, nibbles = (kind == x for x in ("bfloat16", "pairs", "bytes", "nibbles"))
    unit, behind = kinds.unit(kind) * lanes, kinds.behind_bytes(kind)
    query_bytes = kinds.query_bytes(kind, size)
    few_only = kind in ("float16", "int8", "int4")  # read in place for one row a vector alone

    load, _, get, put = simd.loads("float64" if size == 8 else "float32")
    get_int, put_int = simd.scalars(types.int64)
    put_int32 = simd.scalars(types.int32)[1]
    put_byte = kinds.put_whole(8)
    add, mul, fma, greater, splat = simd.add, simd.mul, simd.fma, simd.greater, simd.splat
    put_query = octets.put_queries(jit)
    copy1, copy2, copy4 = (kinds.copy_runs(number, lanes // n, "float32") for n in (1, 2, wide_rows))
    parity1, parity2, parity4 = (kinds.copy_runs(number, lanes // n, storage) for n in (1, 2, wide_rows))

    @jit
    def by_keys(p):
        """Whether lanes are keys, as `octets` has them."""
        return whole and p.block_rows > 2 and p.head_dim % unit == 0

    @jit
    def rows_together(p):
        """Query rows that share a vector."""
        if nibbles or p.block_rows == 1 or by_keys(p):
            return 1
        return pair_rows if p.block_rows == pair_rows else wide_rows

    @jit
    def in_place(p, together):
        """Whether keys are read where they lie."""
        return nibbles or (p.head_dim % unit == 0 and (together == 1 or not few_only))

    @jit
    def copy_row(source, target, width, lane, together, every):
        """A row's runs into its lanes of every so manyth vector."""
        t = target + lane * size
        for c in range(0, width, register // together):
            if together == 1:
                copy1(source + c, t + c * every)
            elif together == pair_rows:
                copy2(source + c, t + c * together * every)
            else:
                copy4(source + c, t + c * together * every)

    @jit
    def halve(columns, x):
        """Round a row of queries to whole numbers; behind it, leave the bytes of their upper halves, then of
        the lower ones.

        Returns what 128 added to each of a key's numbers adds to its sum, and what one of that is worth.
        """
        zero = splat(dtype(0))
        largest, broken = zero, zero
        for c in range(0, columns * size, register):
            y = load(x + c)
            largest = greater(simd.absolute(y), largest)
            broken = fma(y, zero, broken)
        top = dots.lowest_lane(simd.across_max(largest))
        limit = min(dtype(LARGEST_QUERY), dtype(2.0**31) / dtype(128 * columns))
        inverse = splat(limit / top if top > dtype(LEAST) else dtype(0))
        upper, lower, total = x + columns * size, x + columns * (size + 1), np.int64(0)
        for c in range(0, columns, lanes):
            y = simd.round_near(mul(load(x + c * size), inverse))
            high = simd.round_down(mul(add(y, splat(dtype(128))), splat(dtype(1 / 256))))
            low = fma(high, splat(dtype(-256)), y)
            put_byte(upper + c, high)
            put_byte(lower + c, low)
            total += 256 * np.int64(dots.lowest_lane(simd.across_sum(high)))
            total += np.int64(dots.lowest_lane(simd.across_sum(low)))
        return 128 * total, top / limit + dots.lowest_lane(simd.across_sum(broken))

    @jit
    def set_up(p, w, b, head, row0, rows, together):
        """Per row: where its parts lie, what it sees; its numbers as vectors.

        Lanes without a row repeat the last. Returns the first and one past the last key that all rows see.
        """
        run = lanes // together
        depth = padded(p.head_dim)
        starts, length = get_int(p.key_starts + 8 * b), get_int(p.key_lengths + 8 * b)
        offset = get_int(p.offset + 8 * b)
        all_first, all_last = starts, length
        for r in range((rows + together - 1) // together * together):
            row = row0 + min(r, rows - 1)
            h, i = head * p.group + row // p.queries, row % p.queries
            first, last = max(i + offset - p.left, starts), min(i + offset + p.right + 1, length)
            all_first, all_last = max(all_first, first), min(all_last, last)
            put_int(w.first + 8 * r, first)
            put_int(w.last + 8 * r, last)
            put_int(w.masks + 8 * r, p.mask + b * p.mask_b + h * p.mask_h + i * p.mask_q)
            put_int(w.biases + 8 * r, p.bias + b * p.bias_b + h * p.bias_h + i * p.bias_q)
            put_int(w.outs + 8 * r, p.out + b * p.out_b + h * p.out_h + i * p.out_s)
            g, lane = r // together, r % together * run
            if p.alibi_slopes != 0:
                slope = get(p.alibi_slopes + h * size)
                for c in range(run):
                    put(w.slope + g * register + (lane + c) * size, slope)
                    put(w.back + g * register + (lane + c) * size, dtype(i + offset - starts - c))
            a = p.query + b * p.query_b + h * p.query_h + i * p.query_s
            if not in_place(p, together):
                widen_query(a, p.head_dim, w.wide)
                copy_row(w.wide, w.q + g * together * depth * size, depth * size, lane, together, 1)
                continue
            t = w.q + g * (together * depth * query_bytes + behind)
            if pairs:
                copy_row(a, t, p.head_dim * 2, lane, together, 1)
                continue
            widen_query(a, p.head_dim, w.wide)
            if nibbles:
                round_queries(p.head_dim, w.wide, w.q + r * QUERY_BYTES, rows * QUERY_BYTES)
            elif whole:
                bias, worth = halve(p.head_dim, w.wide)
                upper = w.wide + p.head_dim * size
                if by_keys(p):
                    put_query(p, w, upper, r, rows, np.int32(bias), worth)
                    continue
                copy_row(upper, t, p.head_dim, lane, together, 2)
                copy_row(upper + p.head_dim, t + register, p.head_dim, lane, together, 2)
                t += together * depth * query_bytes + lane * size
                for c in range(run):
                    put_int32(t + c * size, np.int32(bias))
                    put(t + register + c * size, worth)
            elif parities:
                for c in range(0, depth * size, 2 * run * size):
                    if together == 1:
                        parity1(w.wide + c, t + c)
                    elif together == pair_rows:
                        parity2(w.wide + c, t + lane * size + c * together)
                    else:
                        parity4(w.wide + c, t + lane * size + c * together)
            else:
                copy_row(w.wide, t, depth * size, lane, together, 1)
        return all_first, all_last

    return rows_together, in_place, by_keys, set_up
