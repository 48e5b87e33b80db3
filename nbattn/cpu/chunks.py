"""Attention of few queries over long keys and values that lie in pages: one chunk of keys at a time.

A task is one chunk of 512 to 2048 keys for one block of query rows: those of all the query heads that share a
key head, so each key and value is read from memory once. Within a chunk 64 to 256 keys at a time are scored,
softened and added up; the chunk leaves its sums, and who finishes a block's last chunk merges them, in their
order. Chunks count from a sequence's first key, whatever the batch or the number of threads.

Numbers are read where they lie and widened in registers. Only keys whose bits cannot be repeated cheaply for
several rows of a vector (float16; int8 and int4 where bytes are not multiplied), and rows that are no whole
vectors, go through scratch. int4 has its own tiles in `nibbles`, int8 for several rows in `octets`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import types

from . import (
    aside,
    dots,
    emitters,
    kinds,
    lookup,
    nibbles,
    octets,
    rows,
    runtime,
    seen,
    simd,
    sweeps,
    weights,
)
from .dots import AHEAD_OF_ONE, KEYS, LONG

CHUNK, LONGEST = 512, 2048
"""Keys of a task. Fewer leave many sums to merge, more leave cores idle. What is quantised, and read sooner
than the processor has foreseen where each task begins, gets up to `LONGEST` where a row has `MANY` such."""
MANY = 16
SOON, PAGE = LONG - KEYS, 16
"""Rows ahead of a tile at which one of each page is asked for, and the rows of a small page."""
ROWS = 32
"""Query rows of a block."""

PLACES = ("page_table", "key_starts", "key_lengths", "offset", "key_scales", "value_scales")
CALL = ("query", "out", "lse", "key", "value", "chunks", "eager", "partials", "workspace", *PLACES)
"""Parameters that change from call to call, addresses most of them."""
PARAMETERS = np.dtype(
    runtime.WORK
    + [(name, np.int64) for name in (
        *CALL, "workspace_bytes", "workers", "partial_bytes",
        # strides in bytes along batch, head and row
        "query_b", "query_h", "query_s", "out_b", "out_h", "out_s", "lse_b", "lse_h", "lse_s",
        # along page, row of a page, and head
        "key_p", "key_s", "key_h", "value_p", "value_s", "value_h",
        "key_scales_p", "key_scales_s", "key_scales_h", "value_scales_p", "value_scales_s", "value_scales_h",
        # along batch, head, query and key
        "mask", "mask_b", "mask_h", "mask_q", "mask_k",
        "bias", "bias_b", "bias_h", "bias_q", "bias_k", "bias_kind",
        "alibi_slopes", "sinks", "table_width",
        "page_size", "ring", "queries", "head_dim", "value_dim", "group", "heads", "blocks", "block_rows",
        "key_bytes", "value_bytes", "left", "right", "plain",
    )]
    + [(name, np.float64) for name in ("scale", "softcap", "log2_scale")]
)  # fmt: skip
"""Behind it lies one counter of finished chunks for each sequence, key head and block of rows."""

parameters_at = simd.record(PARAMETERS)
NEXT_TASK = PARAMETERS.fields["next_task"][1]  # type: ignore[index]
TASKS_DONE = PARAMETERS.fields["tasks_done"][1]  # type: ignore[index]
WORKERS = PARAMETERS.fields["workers"][1]  # type: ignore[index]
COUNTERS = PARAMETERS.itemsize

TABLES, ROW_TABLES, VECTORS = 4, 5, 4


class Scratch(NamedTuple):
    """Addresses of what one thread works in."""

    keys: int  # one table each with an entry for each of a chunk's keys and the next one's first: addresses
    values: int  # of keys, of values,
    key_scales: int  # of scales; for int8 a tile's scales themselves come in the place of their addresses
    value_scales: int
    wide_keys: int  # where a tile's keys are widened to,
    wide_values: int  # and its values
    first: int  # one table each with an entry per row: the first key that is seen,
    last: int  # one past the last,
    masks: int  # addresses of its mask,
    biases: int  # of its bias,
    outs: int  # of its output
    factor: int  # two vectors a group: what older sums are multiplied by, what whole weights are multiples of
    slope: int  # one vector a group each: of ALiBi,
    back: int  # the query's position from the sequence's start on, less the lane's place in a run
    q: int  # the queries, a group after the other
    s: int  # scores, then weights: of a tile's keys * rows of a vector, a group after the other
    narrow: int  # weights of 16 bits, likewise
    wide: int  # widened keys, then values: together they would not fit the first-level cache
    aside: int  # values that are not finite
    most: int  # as `nibbles` has them: the largest scale of each of a tile's values of 4 bits,
    scales: int  # scales of a tile's keys, then values,
    units: int  # units of whole weights,
    spread: int  # and these
    end: int


def scratch_bytes(storage: str, dtype: Any, head_dim: int, value_dim: int) -> int:
    """What `Scratch` takes; head dimensions are padded to whole vectors."""
    return scratch_layout(storage, np.dtype(dtype).itemsize)(0, head_dim, value_dim).end


def scratch_layout(storage: str, size: int) -> Callable[[Any, Any, Any], Scratch]:
    """``layout(w, head_dim, value_dim)``: a `Scratch` from an address on; numbers have so many bytes."""
    table, tile, vector = table_bytes(storage), tile_keys(storage), ROWS * emitters.REGISTER_BYTES
    is_int4 = storage == "int4"

    def layout(w: Any, head_dim: Any, value_dim: Any) -> Scratch:
        rows = w + TABLES * table
        vectors = rows + ROW_TABLES * ROWS * 8
        wide_keys = vectors + VECTORS * vector
        wide_values = wide_keys + 8 * LONG
        q = wide_values + 8 * LONG
        s = q + ROWS * head_dim * size
        narrow = s + ROWS * tile * size
        wide = narrow + ROWS * tile * 2
        aside = wide + LONG * max(head_dim, value_dim) * size
        most = aside + LONG * value_dim * size
        # As `nibbles` has them: columns of values are filled up to four times 32.
        fours = (value_dim + 127) // 128
        scales = most + tile * 4
        units = scales + max(head_dim // 32, fours * 4) * tile * 4
        spread = units + ROWS * nibbles.UNIT_BYTES
        end = spread + fours * ROWS * nibbles.WEIGHT_BYTES if is_int4 else most
        return Scratch(w, w + table, w + 2 * table, w + 3 * table, wide_keys, wide_values,
                       rows, rows + 8 * ROWS, rows + 16 * ROWS, rows + 24 * ROWS, rows + 32 * ROWS,
                       vectors, vectors + 2 * vector, vectors + 3 * vector,
                       q, s, narrow, wide, aside, most, scales, units, spread, end)  # fmt: skip

    return layout


def tile_keys(storage: str) -> int:
    """Keys that several rows soften together."""
    return nibbles.TILE if kinds.read_as(storage) in ("nibbles", "bytes") else KEYS


def longest_chunk(storage: str) -> int:
    """The most keys of a task."""
    return LONGEST if storage in ("int8", "int4") else CHUNK


def table_bytes(storage: str) -> int:
    """Of a table of a task's rows and the next one's first; `lookup.put_steps` may write a few more."""
    return (longest_chunk(storage) + LONG + 8) * 8


def chunk_of(keys: Any, longest: Any) -> Any:
    """Keys of a task of rows that see so many, which the batch and the number of threads do not change."""
    size = CHUNK
    while size < longest and keys >= 2 * MANY * size:
        size *= 2
    return size


def partial_bytes(dtype: Any, rows: int, value_dim: int) -> int:
    """The sums of a chunk: a vector of maxima and one of totals a group, and o (rows, value_dim)."""
    return 2 * rows * emitters.REGISTER_BYTES + rows * value_dim * np.dtype(dtype).itemsize


def build(storage: str, jit: Any, inline: Any) -> Callable[[Any], Any]:
    """The kernel for keys and values of one storage dtype, as a function of its parameters' address."""
    dtype: Any = np.float64 if storage == "float64" else np.float32
    number = types.float64 if storage == "float64" else types.float32
    size = np.dtype(dtype).itemsize
    int8, int4 = storage == "int8", storage == "int4"
    outer = "float32" if int8 or int4 else storage  # of queries and outputs
    outer_bytes = 2 if outer in ("float16", "bfloat16") else size
    as_stored = storage in ("float32", "float64")
    kind, row_keys, longest = kinds.read_as(storage), tile_keys(storage), longest_chunk(storage)
    size_of, scratch_at = jit(chunk_of), jit(scratch_layout(storage, size))
    parities, pairs = kind == "bfloat16", kind == "pairs"
    whole, in_fours = kinds.is_whole(kind), kinds.in_fours(kind)
    lanes = simd.lanes(dtype)
    value_unit = kinds.value_unit(kind) * lanes
    register = emitters.REGISTER_BYTES
    infinity = dtype(np.inf)
    lowest = emitters.exp2_floor(dtype)
    wide_rows = dots.rows_per_vector(lanes)
    pair_rows = 2 if wide_rows > 2 else 0

    load, store, get, put = simd.loads("float64" if size == 8 else "float32")
    _, store_outer, _, put_outer = simd.loads(outer)
    get_int, put_steps = simd.scalars(types.int64)[0], lookup.put_steps
    stored_bits = {"int8": 8, "int4": 4}.get(storage, 8 * outer_bytes)  # of a number
    add, sub, mul, fma, greater, splat = simd.add, simd.sub, simd.mul, simd.fma, simd.greater, simd.splat
    exp2_product = simd.exp2_product
    narrow = kinds.narrow_fours(outer) if in_fours else kinds.narrow_parities
    sum1, sum2, sum4 = (dots.across(number, n, lambda b, x, y: b.fadd(x, y)) for n in (1, 2, wide_rows))
    padded, filled, find, fetch_scales, widen, widen_query = lookup.build(jit, storage)
    adjust, visible, place = seen.build(jit, storage, filled, row_keys)
    as_nibbles = kind == "nibbles"
    of_nibbles = nibbles.build(jit) if as_nibbles else nibbles.Nibbles(None, None, None, None)
    spread_weights = of_nibbles.spread_weights
    rows_together, in_place, by_keys, set_up = rows.build(
        jit, storage, padded, widen_query, of_nibbles.round_queries
    )
    scale_by, soften, round_weights = weights.build(jit, storage, row_keys)
    all_finite, set_aside, add_visible, by_parity = aside.build(jit, storage, padded, widen, visible, place)
    if as_nibbles:
        score_stored, weigh_stored = of_nibbles.score, of_nibbles.weigh
    else:
        score_stored = score_wide = sweeps.scorer(jit, number, kind, stored_bits, padded, True, row_keys)
        weigh_stored = weigh_wide = sweeps.weigher(jit, number, kind, stored_bits, padded, True, row_keys)
    score_by_keys, weigh_by_keys = score_stored, weigh_stored
    if whole:
        score_by_keys, weigh_by_keys = octets.scorer(jit, row_keys), octets.weigher(jit, row_keys)
    if not as_stored:
        score_wide = sweeps.scorer(jit, number, "float32", stored_bits, padded, False, row_keys)
        weigh_wide = sweeps.weigher(jit, number, "float32", stored_bits, padded, False, row_keys)

    @jit
    def reach(p, b, row0, rows):
        """(first key, one past the last) that any of a block's rows sees."""
        low, high = row0 % p.queries, (row0 + rows - 1) % p.queries
        if row0 // p.queries != (row0 + rows - 1) // p.queries:
            low, high = 0, p.queries - 1
        offset = get_int(p.offset + 8 * b)
        first = max(low + offset - p.left, get_int(p.key_starts + 8 * b))
        last = min(high + offset + p.right + 1, get_int(p.key_lengths + 8 * b))
        return first, max(first, last)

    @jit
    def tile_of(p, together, rows):
        """How many keys are softened together."""
        is_alone = rows == 1 and together == 1 and not as_nibbles
        if is_alone and in_place(p, 1) and p.value_dim % value_unit == 0:
            return LONG
        return row_keys if as_nibbles or by_keys(p) else KEYS

    @jit
    def attend_chunk(p, w, state, b, first, last, tile, groups, together, all_first, all_last, careful):
        """The sums over the keys from `first` to `last`, which the tables begin with; asks for the first of
        those that follow in them, too.
        """
        for g in range(groups):
            store(state + 2 * g * register, splat(-infinity))
            store(state + (2 * g + 1) * register, splat(dtype(0)))
        o = state + 2 * groups * register
        for t in range(o, o + groups * together * padded(p.value_dim) * size, register):
            store(t, splat(dtype(0)))
        ahead = 8 * (AHEAD_OF_ONE if tile == LONG else tile)
        wide_keys, fours = not in_place(p, together), in_fours and p.value_dim % value_unit == 0
        wide_values = p.value_dim % value_unit != 0 or (careful and not fours)
        for k0 in range(first, last, tile):
            t, keys = k0 - first, min(tile, last - k0)
            padding = filled(keys)
            keys_at, values_at = w.keys + 8 * t, w.values + 8 * t
            key_scales, value_scales = w.key_scales + 8 * t, w.value_scales + 8 * t
            if int8:
                fetch_scales(key_scales, padding, tile)
                fetch_scales(value_scales, padding, tile)
            # Before rows are asked for in the midst of arithmetic, a line of each page's: float32 in pages of
            # 16 is 1.02 to 1.15 times as fast for it, and what is contiguous no slower. Behind a short chunk
            # the tables may hold anything so far ahead: asking for that does no harm.
            for j in range(8 * SOON, 8 * (SOON + tile), 8 * PAGE):
                simd.prefetch_aside(get_int(keys_at + j))
                simd.prefetch_aside(get_int(values_at + j))
            if wide_keys:
                widen(keys_at, key_scales, padding, p.head_dim, w.wide)
                score_wide(p, w, w.wide_keys, 0, keys_at + ahead, padding, groups, together)
            elif by_keys(p):
                score_by_keys(p, w, keys_at, key_scales, keys_at + ahead, padding, groups, together)
            else:
                score_stored(p, w, keys_at, key_scales, keys_at + ahead, padding, groups, together)
            if int8 and not by_keys(p):
                scale_by(key_scales, w.s, padding, groups, together)
            adjust(p, w, get_int(p.key_starts + 8 * b), k0, keys, groups, together, all_first, all_last)
            soften(p, w, state, padding, groups, together)
            if careful:
                set_aside(p, w, values_at, value_scales, padding)
            elif wide_values:
                widen(values_at, value_scales, padding, p.value_dim, w.wide)
            if whole and fours:
                round_weights(w, value_scales, padding, groups, together)
            elif as_nibbles and not wide_values:
                spread_weights(p, w, value_scales, padding, groups)
            elif int8:
                scale_by(value_scales, w.s, padding, groups, together)
            if wide_values:
                weigh_wide(p, w, state, w.s, w.wide_values, 0, values_at + ahead, padding, groups, together)
            elif by_keys(p):
                weigh_by_keys(
                    p, w, state, w.narrow, values_at, 0, values_at + ahead, padding, groups, together
                )
            else:
                weights, table = w.narrow if fours else w.s, values_at
                if careful and pairs:
                    table = w.wide_values
                weigh_stored(
                    p, w, state, weights, table, value_scales, values_at + ahead, padding, groups, together
                )
            if careful:
                add_visible(p, w, state, values_at, k0, keys, groups, together)
            if careful and parities and p.value_dim % value_unit == 0 and k0 + tile >= last:
                by_parity(p, state, groups, together)

    @jit
    def merge(p, w, unit, chunks, groups, together):
        """Add the sums of a block's chunks up in the first one's place."""
        o_row = padded(p.value_dim) * size
        scale = splat(dtype(p.log2_scale))
        floor = splat(dtype(lowest / p.log2_scale))
        run = lanes // together
        whole = p.partials + unit * p.chunks * p.partial_bytes
        for g in range(groups):
            shift = 2 * g * register
            top = load(whole + shift)
            for i in range(1, chunks):
                top = greater(load(whole + i * p.partial_bytes + shift), top)
            zero_point = simd.finite_or_zero(top)
            for i in range(chunks):
                part = whole + i * p.partial_bytes
                factor = exp2_product(sub(load(part + shift), zero_point), scale, floor)
                store(w.factor, factor)
                total = mul(load(part + shift + register), factor)
                if i > 0:
                    total = add(load(whole + shift + register), total)
                store(whole + shift + register, total)
                for r in range(together):
                    f = splat(get(w.factor + r * run * size))
                    row = 2 * groups * register + (g * together + r) * o_row
                    for c in range(row, row + o_row, register):
                        if i > 0:
                            store(whole + c, fma(load(part + c), f, load(whole + c)))
                        else:
                            store(whole + c, mul(load(whole + c), f))
            store(whole + shift, top)

    @jit
    def finish(p, state, b, head, row0, rows, groups, together, outs):
        """o / total -> out, and lse."""
        o_row = padded(p.value_dim) * size
        scale = dtype(p.log2_scale)
        floor = dtype(lowest / p.log2_scale)
        run = lanes // together
        whole = p.value_dim // lanes * lanes
        for g in range(groups):
            a = state + (2 * g + 1) * register
            total = load(a)
            if together == 1:
                total = sum1(total)
            elif together == pair_rows:
                total = sum2(total)
            else:
                total = sum4(total)
            store(a, total)
        for r in range(rows):
            h, i = head * p.group + (row0 + r) // p.queries, (row0 + r) % p.queries
            a = state + 2 * (r // together) * register + r % together * run * size
            top, total, factor = get(a), get(a + register), dtype(1)
            if p.sinks != 0:
                sink = get(p.sinks + h * size)
                before, top = top, greater(sink, top)
                zero_point = simd.finite_or_zero(top)
                factor = exp2_product(before - zero_point, scale, floor)
                total = total * factor + exp2_product(sink - zero_point, scale, floor)
            divisor = dtype(1) if total == 0 else total
            t, out = state + 2 * groups * register + r * o_row, get_int(outs + 8 * r)
            first = 0
            if (parities or in_fours) and p.value_dim % value_unit == 0:
                first = p.value_dim
                for c in range(0, first, 2 * lanes):
                    x, y = load(t + c * size), load(t + (c + lanes) * size)
                    x = simd.div(mul(x, splat(factor)), splat(divisor))
                    y = simd.div(mul(y, splat(factor)), splat(divisor))
                    narrow(out + c * outer_bytes, x, y)
            for c in range(first, whole, lanes):
                x = mul(load(t + c * size), splat(factor))
                store_outer(out + c * outer_bytes, simd.div(x, splat(divisor)))
            for c in range(whole, p.value_dim):
                put_outer(out + c * outer_bytes, get(t + c * size) * factor / divisor)
            if p.lse != 0:
                x = np.float64(top) * p.scale if p.plain else np.float64(top)
                x = -infinity if total == 0 else dtype(x + math.log(np.float64(total)))
                put(p.lse + b * p.lse_b + h * p.lse_h + i * p.lse_s, x)

    @jit
    def locate(p, task):
        """(sequence, key head, first row, rows, chunks, first key, one past the last) of a task.

        It has no keys where its number is not below that of chunks.
        """
        unit, number = task // p.chunks, task % p.chunks
        row0 = unit % p.blocks * p.block_rows
        head, b = unit // p.blocks % p.heads, unit // (p.blocks * p.heads)
        rows = min(p.block_rows, p.group * p.queries - row0)
        first, last = reach(p, b, row0, rows)
        start = get_int(p.key_starts + 8 * b)
        chunk = size_of(last - first, longest)
        skipped = (first - start) // chunk
        chunks = max(1, (last - start + chunk - 1) // chunk - skipped)
        begin = start + (skipped + number) * chunk
        return b, head, row0, rows, chunks, max(begin, first), min(begin + chunk, last)

    @jit
    def foresee(p, w, task, place):
        """Fill the tables from an entry on with the first rows of the task that follows, or with the last
        one before.
        """
        count = 0
        if 0 <= task < p.tasks:
            next_b, next_head, _, _, next_chunks, next_begin, next_end = locate(p, task)
            if task % p.chunks < next_chunks:
                count = min(LONG, next_end - next_begin)
                find(p, w, place, next_b, next_head, next_begin, count)
        left, place = LONG - filled(count), place + filled(count)
        if left > 0 and place > 0:
            put_steps(w.keys + 8 * place, get_int(w.keys + 8 * place - 8), 0, left)
            put_steps(w.values + 8 * place, get_int(w.values + 8 * place - 8), 0, left)

    def attend(address):
        p = parameters_at(address)
        mine = p.workspace + simd.fetch_add(address + WORKERS) * p.workspace_bytes
        w = scratch_at(mine, padded(p.head_dim), padded(p.value_dim))
        finished_last, ready, following = 0, -1, -1
        all_first = all_last = 0
        while True:
            task = following if following >= 0 else simd.fetch_add(address + NEXT_TASK)
            if task >= p.tasks:
                return finished_last
            # The next task's first keys are on their way when it begins.
            following = simd.fetch_add(address + NEXT_TASK) if task < p.eager else -1
            b, head, row0, rows, chunks, begin, end = locate(p, task)
            unit, number = task // p.chunks, task % p.chunks
            together = rows_together(p)
            groups = (rows + together - 1) // together
            tile = tile_of(p, together, rows)
            if number < chunks:
                # A helper that comes late finds no task, and must not touch memory that others use by then.
                if ready < 0:
                    put_steps(w.wide_keys, w.wide, padded(p.head_dim) * size, KEYS)
                    put_steps(w.wide_values, w.wide, padded(p.value_dim) * size, LONG)
                if ready != unit:
                    all_first, all_last = set_up(p, w, b, head, row0, rows, together)
                    ready = unit
                state = p.partials + task * p.partial_bytes
                careful = False
                while True:
                    # Each time: tiles put scales, and addresses of copies, in the place of what it found.
                    find(p, w, 0, b, head, begin, end - begin)
                    if not careful:
                        foresee(p, w, following, filled(end - begin))
                    attend_chunk(
                        p,
                        w,
                        state,
                        b,
                        begin,
                        end,
                        tile,
                        groups,
                        together,
                        all_first,
                        all_last,
                        careful,
                    )
                    # A value that is not finite meets a weight of 0 where it is masked, and 0 * inf is NaN.
                    # It shows in the sums: only then the chunk is done again, with masked values left out.
                    if careful or all_finite(p, state, groups, together):
                        break
                    careful = True
                if chunks == 1 or simd.fetch_add(address + COUNTERS + 8 * unit) + 1 == chunks:
                    if chunks > 1:
                        merge(p, w, unit, chunks, groups, together)
                    state = p.partials + unit * p.chunks * p.partial_bytes
                    finish(p, state, b, head, row0, rows, groups, together, w.outs)
            if simd.fetch_add(address + TASKS_DONE) + 1 == p.tasks:
                finished_last = 1

    return attend
