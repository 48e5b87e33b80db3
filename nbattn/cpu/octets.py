"""Scores of keys of 8 bits for three rows and more: lanes are 16 keys, as in `nibbles`.

Of 16 numbers at a time each key's bytes are turned in registers, so that a vector holds four bytes of each
key; they meet the upper halves of a row's queries, rounded to 16 bits, and their lower halves in one
instruction each. Turning takes 24 instructions beside the 64 products of eight rows, on other ports, and
nothing is left to be added up across lanes.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from . import dots, emitters, kinds, simd, turned
from .emitters import I64, const, load_at, pointer, store_value
from .turned import LANES, NUMBER, WHOLE, splat_at

STEP = 16
"""Numbers of a key that are turned together."""
QUERY_BYTES = 2 * STEP
"""Of so many queries: their upper halves, then the lower ones. All rows' first come first, then their next;
behind all, in as many bytes, what 128 less in each of a key's numbers adds to a row's sums, and what one of
these is worth."""


def _scores_tile(rows: int, asks: bool) -> Any:
    """``tile(table, scales, wanted, wanted_bytes, q, q_step, s, s_row, steps)``: scores of 16 keys, whose
    addresses the table holds, of `steps` times 16 numbers, times the keys' scales; those of queries are
    `q_step` bytes apart.

    If it `asks`, then for `wanted`, as many other rows of so many bytes.
    """

    @intrinsic
    def tile(
        typingctx: Any, table: Any, scales: Any, wanted: Any, wanted_bytes: Any, q: Any, q_step: Any, s: Any,
        s_row: Any, steps: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            table, scales, wanted, wanted_bytes, q, q_step, s, s_row, steps = args
            last = b.add(wanted, const(I64, 8 * (LANES - 1)))

            def step(state: list[Any], k: Any) -> list[Any]:
                other = dots.Wanted(state[0], state[1], wanted_bytes, last, 8)
                totals = state[2:]
                at, shift = b.add(q, b.mul(k, q_step)), b.mul(k, const(I64, STEP))
                for i, four in enumerate(turned.turned_keys(b, table, shift)):
                    if asks:
                        other.ask_by_turns(b, STEP * LANES, i, 4)
                    # 128 more: one factor of the instruction has no sign.
                    x = b.xor(four, const(WHOLE, -0x7F7F7F80))
                    for n, total in enumerate(totals):
                        place = QUERY_BYTES * (n // 2) + STEP * (n % 2) + 4 * i
                        y = splat_at(b, at, place, WHOLE)
                        totals[n] = kinds.dot(b, "vpdpbusd", total, x, y)
                return [other.row, other.shift, *totals]

            behind = b.add(q, b.mul(steps, q_step))
            first = [wanted, const(I64, 0)]
            for r in range(rows):
                first += [const(WHOLE, 0), splat_at(b, behind, QUERY_BYTES * r, WHOLE)]
            totals = emitters.loop_values(b, steps, first, step)[2:]
            scale = load_at(b, scales, 0, NUMBER)
            for r in range(rows):
                high, low = totals[2 * r : 2 * r + 2]
                x = b.sitofp(b.add(b.shl(high, const(WHOLE, 8)), low), NUMBER)
                worth = splat_at(b, behind, QUERY_BYTES * r + 4, NUMBER)
                at = b.add(s, b.mul(s_row, const(I64, r)))
                store_value(b, b.fmul(b.fmul(x, worth), scale), pointer(b, at, NUMBER))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), codegen

    return tile


def put_queries(jit: Any) -> Any:
    """The compiled function ``put(p, w, source, r, rows, bias, worth)``: `source` are the bytes of row r, the
    upper halves first, of so many rows.
    """
    copy16 = kinds.copy_runs(types.float32, 4, "float32")
    put_int32, put_float32 = simd.scalars(types.int32)[1], simd.scalars(types.float32)[1]

    @jit
    def put(p, w, source, r, rows, bias, worth):
        t = w.q + r * QUERY_BYTES
        for c in range(0, p.head_dim, STEP):
            copy16(source + c, t)
            copy16(source + p.head_dim + c, t + STEP)
            t += rows * QUERY_BYTES
        put_int32(t, -bias)
        put_float32(t + 4, worth)

    return put


def scorer(jit: Any, row_keys: int) -> Any:
    """The function that makes a tile's scores, as `sweeps.scorer` does; a row has room for so many."""
    score_rows = turned.scorer(jit, _scores_tile, QUERY_BYTES)

    @jit
    def score(p, w, table, scales, wanted, keys, groups, together):
        steps, width, s_row = p.head_dim // STEP, p.key_bytes, row_keys * 4
        for j in range(0, keys, LANES):
            k, f, v, t = table + 8 * j, scales + 4 * j, wanted + 8 * j, w.s + 4 * j
            score_rows(k, f, v, width, w.q, t, s_row, steps, groups)

    return score


def weigher(jit: Any, row_keys: int) -> Any:
    """The function that adds up values, as `sweeps.weigher` makes it, for up to eight rows at a time."""

    def tile_of(rows: int, columns: int) -> Any:
        return dots.values_tile(types.float32, 1, rows, columns, "bytes", 8)

    weigh8, weigh4, weigh2, weigh1 = tile_of(8, 2), tile_of(4, 4), tile_of(2, 4), tile_of(1, 4)
    weigh4_few, weigh2_few, weigh1_few = tile_of(4, 2), tile_of(2, 2), tile_of(1, 2)
    register, weight_row = emitters.REGISTER_BYTES, row_keys * 2

    @jit
    def weigh(p, w, state, weights, table, scales, wanted, keys, groups, together):
        """o = o * factor + weights @ values; asks meanwhile for as many rows `wanted`."""
        o_row, width, blocks = p.value_dim * 4, p.value_bytes, keys // LANES
        last, r = wanted + 8 * (keys - 1), 0
        while r < groups:
            left = groups - r
            a, f = weights + r * weight_row, w.factor + 2 * r * register
            t, c = state + 2 * groups * register + r * o_row, 0
            while c < o_row:
                begin, count = c // 4 * keys if r == 0 else keys * width, 2 * register
                rows, sums = (table, scales, wanted, width, last, begin), (t, o_row, f, blocks)
                if left >= 8:
                    weigh8(*rows, c, a, weight_row, *sums)
                elif o_row - c < 4 * register:
                    if left >= 4:
                        weigh4_few(*rows, c, a, weight_row, *sums)
                    elif left >= 2:
                        weigh2_few(*rows, c, a, weight_row, *sums)
                    else:
                        weigh1_few(*rows, c, a, weight_row, *sums)
                else:
                    count = 4 * register
                    if left >= 4:
                        weigh4(*rows, c, a, weight_row, *sums)
                    elif left >= 2:
                        weigh2(*rows, c, a, weight_row, *sums)
                    else:
                        weigh1(*rows, c, a, weight_row, *sums)
                c += count
            r += 8 if left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1

    return weigh
