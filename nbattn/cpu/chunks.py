"""Attention of few queries over long keys and values that lie in pages: one chunk of keys at a time.

A task is one chunk of `CHUNK` keys for one block of query rows: those of all the query heads that share a
key head, so each key and value is read from memory once. Within a chunk `KEYS` keys at a time are scored,
softened and added up; the chunk leaves its sums, and who finishes a block's last chunk merges them, in their
order. Chunks count from a sequence's first key, whatever the batch or the number of threads.

float32 and float64 are read where they lie; other numbers are widened once into scratch that stays in the
first-level cache, for all rows that use them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import types

from ..problem import STORAGE_DTYPES
from . import dots, runtime, simd
from .masks import get_byte

CHUNK = 512
"""Keys of a task. Fewer leave many sums to merge, more leave cores idle."""
KEYS = 64
"""Keys that are softened together: 16 KB of float32 with 64 columns."""
ROWS = 32
"""Query rows of a block."""

PARAMETERS = np.dtype(
    runtime.WORK
    + [(name, np.int64) for name in (
        "workspace", "workspace_bytes", "workers", "partials", "partial_bytes",
        # addresses, and strides in bytes along batch, head and row
        "query", "query_b", "query_h", "query_s", "out", "out_b", "out_h", "out_s",
        "lse", "lse_b", "lse_h", "lse_s",
        # along page, row of a page, and head
        "key", "key_p", "key_s", "key_h", "value", "value_p", "value_s", "value_h",
        "key_scales", "key_scales_p", "key_scales_s", "key_scales_h",
        "value_scales", "value_scales_p", "value_scales_s", "value_scales_h",
        # along batch, head, query and key
        "mask", "mask_b", "mask_h", "mask_q", "mask_k",
        "bias", "bias_b", "bias_h", "bias_q", "bias_k", "bias_kind",
        "alibi_slopes", "sinks", "offset", "key_starts", "key_lengths", "page_table", "table_width",
        "page_size", "ring", "queries", "head_dim", "value_dim", "group", "heads", "blocks", "block_rows",
        "chunks", "left", "right", "plain",
    )]
    + [(name, np.float64) for name in ("scale", "softcap", "log2_scale")]
)  # fmt: skip
"""Behind it lies one counter of finished chunks for each sequence, key head and block of rows."""

parameters_at = simd.record(PARAMETERS)
NEXT_TASK = PARAMETERS.fields["next_task"][1]  # type: ignore[index]
TASKS_DONE = PARAMETERS.fields["tasks_done"][1]  # type: ignore[index]
WORKERS = PARAMETERS.fields["workers"][1]  # type: ignore[index]
COUNTERS = PARAMETERS.itemsize

TABLES, ROW_TABLES, VECTORS = 6, 5, 3


class Scratch(NamedTuple):
    """Addresses of what one thread works in."""

    keys: int  # one table each of KEYS addresses: of keys,
    values: int  # of values,
    wide_keys: int  # of where both are widened to,
    wide_values: int
    key_scales: int  # of scales; for int8 then the scales themselves
    value_scales: int
    first: int  # one table each with an entry per row: the first key that is seen,
    last: int  # one past the last,
    masks: int  # addresses of its mask,
    biases: int  # of its bias,
    outs: int  # of its output
    factor: int  # one vector a group each: what older sums are multiplied by,
    slope: int  # of ALiBi,
    back: int  # the query's position less the lane's place in a run
    q: int  # the queries, a group after the other
    s: int  # scores, then weights: KEYS * rows of a vector, a group after the other
    k: int  # widened keys (or values that are not finite)
    v: int  # widened values


def scratch_bytes(dtype: Any, head_dim: int, value_dim: int) -> int:
    """What `Scratch` takes; head dimensions are padded to whole vectors."""
    size = np.dtype(dtype).itemsize
    vectors = VECTORS * ROWS * simd.REGISTER_BYTES
    rows = ROWS * (head_dim + KEYS) * size + KEYS * (max(head_dim, value_dim) + value_dim) * size
    return TABLES * KEYS * 8 + ROW_TABLES * ROWS * 8 + vectors + rows


def partial_bytes(dtype: Any, rows: int, value_dim: int) -> int:
    """The sums of a chunk: a vector of maxima and one of totals a group, and o (rows, value_dim)."""
    return 2 * rows * simd.REGISTER_BYTES + rows * value_dim * np.dtype(dtype).itemsize


def build(storage: str, jit: Any, inline: Any) -> Callable[[Any], Any]:
    """The kernel for keys and values of one storage dtype, as a function of its parameters' address."""
    dtype: Any = np.float64 if storage == "float64" else np.float32
    number = types.float64 if storage == "float64" else types.float32
    size = np.dtype(dtype).itemsize
    int8, int4 = storage == "int8", storage == "int4"
    outer = "float32" if int8 or int4 else storage  # of queries and outputs
    outer_bytes = 2 if outer in ("float16", "bfloat16") else size
    as_stored = storage in ("float32", "float64")
    lanes = simd.lanes(dtype)
    register = simd.REGISTER_BYTES
    infinity = dtype(np.inf)
    lowest = simd.exp2_floor(dtype)
    wide_rows = dots.rows_per_vector(lanes)
    pair_rows = 2 if wide_rows > 2 else 0

    load, store, get, put = simd.loads("float64" if size == 8 else "float32")
    load_outer, store_outer, get_outer, put_outer = simd.loads(outer)
    get_int, put_int = simd.scalars(types.int64)
    get_float32 = simd.scalars(types.float32)[0]
    add, sub, mul, fma, greater, splat = simd.add, simd.sub, simd.mul, simd.fma, simd.greater, simd.splat
    exp2_product = simd.exp2_product

    score1, score1_keys = dots.scores_tile(number, 1, 1)
    score2, score2_keys = dots.scores_tile(number, 2, 1)
    score4, score4_keys = dots.scores_tile(number, wide_rows, 1)
    score8, score8_keys = dots.scores_tile(number, wide_rows, 2)
    most = dots.UNDER_WAY
    columns1, columns2, columns4, columns8 = (min(4, most // n) for n in (1, 2, 4, 8))
    weigh1, weigh1_one = dots.values_tile(number, 1, 1, columns1), dots.values_tile(number, 1, 1, 1)
    weigh2, weigh2_one = dots.values_tile(number, 2, 1, columns2), dots.values_tile(number, 2, 1, 1)
    weigh4 = dots.values_tile(number, wide_rows, 1, columns4)
    weigh4_one = dots.values_tile(number, wide_rows, 1, 1)
    weigh8 = dots.values_tile(number, wide_rows, 2, columns8)
    weigh8_one = dots.values_tile(number, wide_rows, 2, 1)
    copy1, copy2, copy4 = (dots.copy_run(number, outer, lanes // n) for n in (1, 2, wide_rows))
    top1, top2, top4 = (dots.across(number, n, simd.greater_value) for n in (1, 2, wide_rows))
    sum1, sum2, sum4 = (dots.across(number, n, lambda b, x, y: b.fadd(x, y)) for n in (1, 2, wide_rows))
    repeat1, repeat2, repeat4 = (dots.repeat(number, n) for n in (1, 2, wide_rows))

    @jit
    def padded(n):
        return (n + lanes - 1) // lanes * lanes

    @jit
    def scratch_at(p, w):
        table = KEYS * 8
        rows = w + TABLES * table
        vectors = rows + ROW_TABLES * ROWS * 8
        vector = ROWS * register
        q = vectors + VECTORS * vector
        s = q + ROWS * padded(p.head_dim) * size
        k = s + ROWS * KEYS * size
        v = k + KEYS * padded(max(p.head_dim, p.value_dim)) * size
        w_keys, w_values = w + 2 * table, w + 3 * table
        for j in range(KEYS):
            put_int(w_keys + 8 * j, k + j * padded(p.head_dim) * size)
            put_int(w_values + 8 * j, v + j * padded(p.value_dim) * size)
        return Scratch(w, w + table, w_keys, w_values, w + 4 * table, w + 5 * table,
                       rows, rows + 8 * ROWS, rows + 16 * ROWS, rows + 24 * ROWS, rows + 32 * ROWS,
                       vectors, vectors + vector, vectors + 2 * vector, q, s, k, v)  # fmt: skip

    @jit
    def rows_together(p):
        """Query rows that share a vector."""
        if p.block_rows == 1:
            return 1
        return pair_rows if p.block_rows == pair_rows else wide_rows

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
                    put(w.back + g * register + (lane + c) * size, dtype(i + offset - c))
            a = p.query + b * p.query_b + h * p.query_h + i * p.query_s
            t = w.q + g * together * depth * size + lane * size
            whole = p.head_dim // run * run
            for c in range(0, whole, run):
                if together == 1:
                    copy1(a + c * outer_bytes, t + c * together * size)
                elif together == pair_rows:
                    copy2(a + c * outer_bytes, t + c * together * size)
                else:
                    copy4(a + c * outer_bytes, t + c * together * size)
            for c in range(whole, depth):
                x = get_outer(a + c * outer_bytes) if c < p.head_dim else dtype(0)
                put(t + (c // run * lanes + c % run) * size, x)
        return all_first, all_last

    @jit
    def find(p, b, k0, keys, table, a, page_step, row_step):
        """The addresses of the rows of `keys` positions from k0 on; padded with the last."""
        j = 0
        slot = k0 % p.ring if p.ring != 0 else k0
        page, row = slot // p.page_size, slot % p.page_size
        last = a
        while j < keys:
            count = min(keys - j, p.page_size - row)
            if p.ring != 0:
                count = min(count, p.ring - page * p.page_size - row)
            first = a + get_int(p.page_table + 8 * (b * p.table_width + page)) * page_step + row * row_step
            for c in range(count):
                put_int(table + 8 * (j + c), first + c * row_step)
            last = first + (count - 1) * row_step
            j += count
            page, row = page + 1, 0
            if p.ring != 0 and page * p.page_size >= p.ring:
                page = 0
        while j % lanes != 0:
            put_int(table + 8 * j, last)
            j += 1

    @jit
    def widen(table, scales, keys, columns, target):
        """Rows of stored numbers -> padded rows of `dtype`."""
        width = padded(columns)
        for j in range(keys):
            a, t = get_int(table + 8 * j), target + j * width * size
            if int4:
                factors = get_int(scales + 8 * j)
                for c in range(0, columns, 32):
                    dots.widen_int4(a + c // 2, get_float32(factors + c // 8), t + c * 4)
                continue
            whole = columns // lanes * lanes
            for c in range(0, whole, lanes):
                if int8:
                    dots.widen_int8(a + c, t + c * 4)
                else:
                    store(t + c * size, load_outer(a + c * outer_bytes))
            for c in range(whole, width):
                x = dtype(0)
                if c < columns:
                    x = dtype(get_byte(a + c)) if int8 else get_outer(a + c * outer_bytes)
                put(t + c * size, x)

    @jit
    def collect(table, keys):
        """Replace the addresses of scales by the scales: the writing stays behind the reading."""
        for j in range(keys):
            put(table + j * size, dtype(get_float32(get_int(table + 8 * j))))

    @jit
    def scale_by(factors, s, keys, groups, together):
        """Multiply each key's column of scores or weights by its factor."""
        run = lanes // together
        for g in range(groups):
            for j in range(0, keys, run):
                t = s + g * together * KEYS * size + j * together * size
                if together == 1:
                    y = repeat1(factors + j * size)
                elif together == pair_rows:
                    y = repeat2(factors + j * size)
                else:
                    y = repeat4(factors + j * size)
                store(t, mul(load(t), y))

    @jit
    def score(p, w, table, keys, groups, together):
        """The raw products of a tile's keys; `keys` is whole vectors."""
        depth = padded(p.head_dim)
        steps = depth * together // lanes
        q_group, s_group = together * depth * size, together * KEYS * size
        if together == 1:
            for j in range(0, keys, score1_keys):
                score1(table + 8 * j, w.q, 0, w.s + j * size, 0, steps)
            return
        if together == pair_rows:
            for j in range(0, keys, score2_keys):
                score2(table + 8 * j, w.q, 0, w.s + 2 * j * size, 0, steps)
            return
        for g in range(0, groups - 1, 2):
            q, s = w.q + g * q_group, w.s + g * s_group
            for j in range(0, keys, score8_keys):
                score8(table + 8 * j, q, q_group, s + j * wide_rows * size, s_group, steps)
        if groups % 2 == 1:
            q, s = w.q + (groups - 1) * q_group, w.s + (groups - 1) * s_group
            for j in range(0, keys, score4_keys):
                score4(table + 8 * j, q, 0, s + j * wide_rows * size, 0, steps)

    @jit
    def read_bias(p, a):
        if p.bias_kind == 0:
            return dtype(read0(a))
        if p.bias_kind == 1:
            return dtype(read1(a))
        return dtype(read2(a)) if p.bias_kind == 2 else dtype(read3(a))

    read0, read1, read2, read3 = (simd.loads(kind)[2] for kind in STORAGE_DTYPES)

    @jit
    def masked(a):
        """Whether the mask's element at an address says no."""
        return get_byte(a) == 0

    @jit
    def visible(p, w, r, j):
        if j < get_int(w.first + 8 * r) or j >= get_int(w.last + 8 * r):
            return False
        if p.mask != 0 and masked(get_int(w.masks + 8 * r) + j * p.mask_k):
            return False
        return p.bias == 0 or read_bias(p, get_int(w.biases + 8 * r) + j * p.bias_k) != -infinity

    @jit
    def place(s, r, j, together):
        """Where row r's score of a tile's key j lies."""
        run = lanes // together
        lane = j // run * lanes + r % together * run + j % run
        return s + (r // together * together * KEYS + lane) * size

    @jit
    def adjust(p, w, k0, keys, groups, together, all_first, all_last):
        """Scale, softcap, bias, ALiBi, masks; hide keys that a row does not see, and what pads the tile."""
        padding = padded(keys)
        rows = groups * together
        if not p.plain:
            inner = p.scale / p.softcap if p.softcap != 0 else p.scale
            factor, cap = splat(dtype(inner)), splat(dtype(p.softcap))
            run = lanes // together
            for g in range(groups):
                slope, back = load(w.slope + g * register), load(w.back + g * register)
                for j in range(0, padding, run):
                    t = w.s + (g * together * KEYS + j * together) * size
                    x = mul(load(t), factor)
                    if p.softcap != 0:
                        x = mul(cap, simd.tanh(x))
                    if p.bias == 0 and p.alibi_slopes != 0:
                        x = fma(slope, sub(splat(dtype(k0 + j)), back), x)
                    store(t, x)
            if p.bias != 0:
                for r in range(rows):
                    a = get_int(w.biases + 8 * r) + k0 * p.bias_k
                    slope, position = dtype(0), dtype(0)
                    if p.alibi_slopes != 0:
                        lane = r // together * register + r % together * run * size
                        slope, position = get(w.slope + lane), get(w.back + lane)
                    for j in range(keys):
                        x = read_bias(p, a + j * p.bias_k)
                        t = place(w.s, r, j, together)
                        # A bias of -inf masks, also a NaN.
                        y = get(t) + x + slope * (dtype(k0 + j) - position)
                        put(t, -infinity if x == -infinity else y)
        if p.mask != 0:
            for r in range(rows):
                a = get_int(w.masks + 8 * r) + k0 * p.mask_k
                for j in range(keys):
                    if masked(a + j * p.mask_k):
                        put(place(w.s, r, j, together), -infinity)
        if k0 < all_first or k0 + keys > all_last or padding > keys:
            for r in range(rows):
                first, last = get_int(w.first + 8 * r) - k0, get_int(w.last + 8 * r) - k0
                for j in range(min(first, padding)):
                    put(place(w.s, r, j, together), -infinity)
                for j in range(max(min(last, keys), 0), padding):
                    put(place(w.s, r, j, together), -infinity)

    @jit
    def soften(p, w, state, keys, groups, together):
        """Scores -> unnormalised weights; moves the maximum and total, leaves the factor for older sums.

        The total is one number a lane, to be added up at the end.
        """
        scale = splat(dtype(p.log2_scale))
        floor = splat(dtype(lowest / p.log2_scale))
        for g in range(groups):
            s = w.s + g * together * KEYS * size
            end = s + keys * together * size
            maximum, total = state + 2 * g * register, state + (2 * g + 1) * register
            before = load(maximum)
            top = before
            for t in range(s, end, register):
                top = greater(load(t), top)
            if together == 1:
                top = top1(top)
            elif together == pair_rows:
                top = top2(top)
            else:
                top = top4(top)
            zero_point = simd.finite_or_zero(top)
            factor = exp2_product(sub(before, zero_point), scale, floor)
            fresh = splat(dtype(0))
            for t in range(s, end, register):
                x = exp2_product(sub(load(t), zero_point), scale, floor)
                store(t, x)
                fresh = add(fresh, x)
            store(maximum, top)
            store(total, fma(load(total), factor, fresh))
            store(w.factor + g * register, factor)

    @jit
    def weigh(p, w, state, table, keys, groups, together):
        """o = o * factor + weights @ values"""
        blocks = keys * together // lanes
        o_row = padded(p.value_dim) * size
        o = state + 2 * groups * register
        s_group = together * KEYS * size
        g = 0
        while g < groups:
            pair = together == wide_rows and g + 1 < groups
            a, t, f = w.s + g * s_group, o + g * together * o_row, w.factor + g * register
            c = 0
            while c < o_row:
                left = (o_row - c) // register
                count = 1
                if together == 1:
                    if left >= columns1:
                        weigh1(table, c, a, 0, t, o_row, f, blocks)
                        count = columns1
                    else:
                        weigh1_one(table, c, a, 0, t, o_row, f, blocks)
                elif together == pair_rows:
                    if left >= columns2:
                        weigh2(table, c, a, 0, t, o_row, f, blocks)
                        count = columns2
                    else:
                        weigh2_one(table, c, a, 0, t, o_row, f, blocks)
                elif pair:
                    if left >= columns8:
                        weigh8(table, c, a, s_group, t, o_row, f, blocks)
                        count = columns8
                    else:
                        weigh8_one(table, c, a, s_group, t, o_row, f, blocks)
                elif left >= columns4:
                    weigh4(table, c, a, 0, t, o_row, f, blocks)
                    count = columns4
                else:
                    weigh4_one(table, c, a, 0, t, o_row, f, blocks)
                c += count * register
            g += 2 if pair else 1

    @jit
    def set_aside(p, w, keys):
        """Copy a tile's values without what is not finite; the stored ones are widened to where keys were."""
        width = padded(p.value_dim) * size
        if not as_stored or p.value_dim % lanes != 0:
            widen(w.values, w.value_scales, keys, p.value_dim, w.k)
            for j in range(keys):
                put_int(w.values + 8 * j, w.k + j * width)
        for j in range(keys):
            a, t = get_int(w.values + 8 * j), w.v + j * width
            if int8 and not finite(get(w.value_scales + j * size)):
                for c in range(0, width, size):
                    put(a + c, get(a + c) * get(w.value_scales + j * size))
                put(w.value_scales + j * size, dtype(1))
            for c in range(0, width, size):
                y = get(a + c)
                put(t + c, y if finite(y) else dtype(0))

    @jit
    def finite(x):
        return x - x == 0

    @jit
    def add_visible(p, w, state, k0, keys, groups, together):
        """Add what was set aside to the rows that see it."""
        width = padded(p.value_dim) * size
        o = state + 2 * groups * register
        for j in range(keys):
            a = get_int(w.values + 8 * j)
            for c in range(0, p.value_dim * size, size):
                y = get(a + c)
                if finite(y):
                    continue
                for r in range(groups * together):
                    if visible(p, w, r, k0 + j):
                        t = o + r * width + c
                        put(t, get(t) + get(place(w.s, r, j, together)) * y)

    @jit
    def all_finite(p, state, groups, together):
        """Whether every sum is: 0 times them adds up to 0."""
        o = state + 2 * groups * register
        zero = splat(dtype(0))
        seen = zero
        for t in range(o, o + groups * together * padded(p.value_dim) * size, register):
            seen = simd.fma(load(t), zero, seen)
        return dots.lowest_lane(simd.across_sum(seen)) == 0

    @jit
    def attend_chunk(p, w, state, b, head, first, last, groups, together, all_first, all_last, careful):
        """The sums over the keys from `first` to `last`."""
        for g in range(groups):
            store(state + 2 * g * register, splat(-infinity))
            store(state + (2 * g + 1) * register, splat(dtype(0)))
        o = state + 2 * groups * register
        for t in range(o, o + groups * together * padded(p.value_dim) * size, register):
            store(t, splat(dtype(0)))
        key, value = p.key + head * p.key_h, p.value + head * p.value_h
        key_scales = p.key_scales + head * p.key_scales_h
        value_scales = p.value_scales + head * p.value_scales_h
        k0 = first
        while k0 < last:
            keys = min(KEYS, last - k0)
            padding = padded(keys)
            find(p, b, k0, keys, w.keys, key, p.key_p, p.key_s)
            find(p, b, k0, keys, w.values, value, p.value_p, p.value_s)
            if int8 or int4:
                find(p, b, k0, keys, w.key_scales, key_scales, p.key_scales_p, p.key_scales_s)
                find(p, b, k0, keys, w.value_scales, value_scales, p.value_scales_p, p.value_scales_s)
                if int8:
                    collect(w.key_scales, padding)
                    collect(w.value_scales, padding)
            keys_at, values_at = w.keys, w.values
            if not as_stored or p.head_dim % lanes != 0:
                widen(w.keys, w.key_scales, padding, p.head_dim, w.k)
                keys_at = w.wide_keys
            score(p, w, keys_at, padding, groups, together)
            if int8:
                scale_by(w.key_scales, w.s, padding, groups, together)
            adjust(p, w, k0, keys, groups, together, all_first, all_last)
            soften(p, w, state, padding, groups, together)
            if careful:
                set_aside(p, w, padding)
                values_at = w.wide_values
            elif not as_stored or p.value_dim % lanes != 0:
                widen(w.values, w.value_scales, padding, p.value_dim, w.v)
                values_at = w.wide_values
            if int8:
                scale_by(w.value_scales, w.s, padding, groups, together)
            weigh(p, w, state, values_at, padding, groups, together)
            if careful:
                add_visible(p, w, state, k0, keys, groups, together)
            k0 += keys

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
            for c in range(0, whole, lanes):
                x = mul(load(t + c * size), splat(factor))
                store_outer(out + c * outer_bytes, simd.div(x, splat(divisor)))
            for c in range(whole, p.value_dim):
                put_outer(out + c * outer_bytes, get(t + c * size) * factor / divisor)
            if p.lse != 0:
                x = np.float64(top) * p.scale if p.plain else np.float64(top)
                x = -infinity if total == 0 else dtype(x + math.log(np.float64(total)))
                put(p.lse + b * p.lse_b + h * p.lse_h + i * p.lse_s, x)

    def attend(address):
        p = parameters_at(address)
        w = scratch_at(p, p.workspace + simd.fetch_add(address + WORKERS) * p.workspace_bytes)
        finished_last, ready = 0, -1
        all_first = all_last = 0
        while True:
            task = simd.fetch_add(address + NEXT_TASK)
            if task >= p.tasks:
                return finished_last
            unit, number = task // p.chunks, task % p.chunks
            row0 = unit % p.blocks * p.block_rows
            head, b = unit // p.blocks % p.heads, unit // (p.blocks * p.heads)
            rows = min(p.block_rows, p.group * p.queries - row0)
            together = rows_together(p)
            groups = (rows + together - 1) // together
            first, last = reach(p, b, row0, rows)
            start = get_int(p.key_starts + 8 * b)
            skipped = (first - start) // CHUNK
            chunks = max(1, (last - start + CHUNK - 1) // CHUNK - skipped)
            if number < chunks:
                if ready != unit:
                    all_first, all_last = set_up(p, w, b, head, row0, rows, together)
                    ready = unit
                state = p.partials + task * p.partial_bytes
                begin = start + (skipped + number) * CHUNK
                begin, end = max(begin, first), min(begin + CHUNK, last)
                careful = False
                while True:
                    attend_chunk(
                        p, w, state, b, head, begin, end, groups, together, all_first, all_last, careful
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
