"""What comes before the softmax, for kernels whose lanes are queries: a block of queries, where it lies, what
it may see, and its products with a run of keys.

`blocks` says what such a block is, and is the kernel that makes weighted sums of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import types

from ..reference.masks import BLOCK
from . import amx, emitters, panels, scores, simd
from .layout import (
    NEXT_TASK,
    STATE_ROWS,
    TABLES,
    TASKS_DONE,
    WORKERS,
    Block,
    Form,
    Scratch,
    parameters_at,
    score_rows,
)
from .masks import WORDS
from .mods import CALL_BYTES
from .panels import KEYS
from .tiles import ROW_BYTES, product


class Queries(NamedTuple):
    """Compiled functions of a call's parameters p, a block's scratch w, and more."""

    find: Any
    """``find(p, b, unit, number)``: the `Block`."""
    set_up: Any
    """``set_up(p, w, b, unit, row0, rows, queries, start)``: per-row state, and the keys that rows see."""
    transpose_queries: Any
    """``transpose_queries(p, w, vectors)``: q^T."""
    multiply: Any
    """The product that `score` is made of, as of `tiles` with `tops`; or of `amx`."""
    score: Any
    """``score(p, w, key, converted, key0, keys, vectors)``: the raw products with a run of keys, and but for
    AMX their maxima."""
    score_seen: Any
    """The same of the keys that each vector's rows see, after `count_seen`."""
    count_seen: Any
    """``count_seen(w, key0, keys, vectors)``: puts for each vector at `begins` and `ends` which keys of a run
    its rows need, from the first to the last that any of them sees; whether some need less than all."""
    mend_scores: Any
    """``mend_scores(p, w, key, key0, keys, rows)``: what a split of inf made NaN is multiplied anew."""
    look: Any
    adjust: Any
    visible: Any
    """As of `scores.build`."""
    panel: Any
    """As of `panels.build`."""
    kernel: Callable[[Any], Callable[[Any], Any]]
    """The kernel that runs ``block(p, w, b, unit, number)`` for each task, to be compiled."""


def build(form: Form, jit: Any, inline: Any) -> Queries:
    """The functions for arrays of one storage dtype."""
    storage, operands, size, stored, lanes = form.storage, form.operands, form.size, form.stored, form.lanes
    split, tiled, pairs, rounds, converts = form.split, form.tiled, form.pairs, form.rounds, form.converts
    dtype: Any = form.dtype
    planes = panels.parts(operands)
    len_planes, rows_of_scores = len(planes), score_rows(operands)
    whole_run = 32 if tiled else 16  # keys that are multiplied together
    number = types.float64 if size == 8 else types.float32
    register = emitters.REGISTER_BYTES
    block_rows = ROW_BYTES // size
    infinity = dtype(np.inf)

    load, store, get, put = simd.loads("float64" if size == 8 else "float32")
    get_stored = simd.loads(storage)[2]
    get_int, put_int = simd.scalars(types.int64)
    get_index, put_index = simd.scalars(types.int64 if size == 8 else types.int32)
    index = np.int64 if size == 8 else np.int32
    fresh: Any = amx.product(jit, False, len_planes) if tiled else None
    if not tiled:
        fresh = product(jit, number, rescale=False, pairs=pairs, tops=True)
    as_operand = simd.round_bfloat16 if rounds else simd.same
    panel = panels.build(jit, storage, operands, converts, as_operand)
    look, adjust, visible, place = scores.build(jit, inline, dtype, storage)
    read_square = panels.rows_in(lanes, storage)
    read_words: Any = panels.words_in(lanes, storage, planes[0][0]) if pairs else None
    read_rest: Any = panels.words_in(lanes, storage, planes[-1][0]) if pairs else None
    first, second = planes[0][1], planes[-1][1]
    pack = panels.pair_words
    splat = simd.splat

    @jit
    def scratch_at(p, q):
        o = q + len_planes * p.query_rows * ROW_BYTES
        s = o + p.value_rows * ROW_BYTES
        row = s + rows_of_scores * ROW_BYTES
        table, step = row + STATE_ROWS * ROW_BYTES, block_rows * 8
        seen = table + TABLES * step
        call = seen + WORDS * 8
        tags = call + CALL_BYTES
        converted = tags + 64 * ((p.slots + 7) // 8)
        half = row + 7 * ROW_BYTES + ROW_BYTES // 2
        return Scratch(q, o, s, row, row + ROW_BYTES, row + 2 * ROW_BYTES, row + 3 * ROW_BYTES,
                       row + 4 * ROW_BYTES, row + 5 * ROW_BYTES, row + 6 * ROW_BYTES, row + 7 * ROW_BYTES,
                       row + 7 * ROW_BYTES, half, row + 8 * ROW_BYTES,
                       table, table + step, table + 2 * step, table + 3 * step, table + 4 * step,
                       seen, call, tags, converted, converted + p.slots * p.slot_bytes)  # fmt: skip

    @jit
    def task(p, t):
        """(sequence, unit of heads, block) of task t; last blocks first: causal ones see most keys."""
        if p.first_task == 0:
            b, t = t // (p.units * p.blocks), t % (p.units * p.blocks)
            blocks = p.blocks
        else:
            b, end = 0, p.batch
            while end - b > 1:
                middle = (b + end) // 2
                if get_int(p.first_task + 8 * middle) <= t:
                    b = middle
                else:
                    end = middle
            first = get_int(p.first_task + 8 * b)
            blocks = (get_int(p.first_task + 8 * (b + 1)) - first) // p.units
            t -= first
        return b, t // blocks, blocks - 1 - t % blocks

    @jit
    def rows_of(p, b):
        """(first query row, number of queries, first key row) of sequence b."""
        if p.query_starts == 0:
            return 0, p.queries, 0
        start = get_int(p.query_starts + 8 * b)
        return start, get_int(p.query_starts + 8 * (b + 1)) - start, get_int(p.key_starts + 8 * b)

    @jit
    def find(p, b, unit, number):
        start, queries, key_start = rows_of(p, b)
        row0 = number * block_rows
        rows = min(block_rows, p.packed_heads * queries - row0)
        pb = 0 if p.query_starts != 0 else b
        shared = unit * p.packed_heads // p.group
        key = p.key + (pb * p.key_b + shared * p.key_h + key_start * p.key_s) * stored
        value = p.value + (pb * p.value_b + shared * p.value_h + key_start * p.value_s) * stored
        head = b * p.units * p.packed_heads // p.group + shared
        return Block(start, queries, row0, rows, (rows + lanes - 1) // lanes, head, key, value,
                     get_int(p.key_lengths + 8 * b))  # fmt: skip

    @jit
    def place_more(p, w, b, unit, row0, padded, rows, queries, offset):
        """What `set_up` fills in for calls with sinks, ALiBi, a mask, weights or a bias."""
        h, i = unit * p.packed_heads + row0 // queries, row0 % queries
        for r in range(padded):
            if p.sinks != 0:
                put(w.maximum + r * size, get(p.sinks + h * size))
                put(w.total + r * size, dtype(1))
            if p.alibi_slopes != 0:
                put(w.slope + r * size, get(p.alibi_slopes + h * size))
                put(w.position + r * size, dtype(i + offset))
            put_int(w.masks + 8 * r, p.mask + b * p.mask_b + h * p.mask_h + i * p.mask_q)
            put_int(
                w.weights + 8 * r, p.weights + (b * p.weights_b + h * p.weights_h + i * p.weights_s) * size
            )
            put_int(w.biases + 8 * r, p.bias + b * p.bias_b + h * p.bias_h + i * p.bias_q)
            if r < rows - 1:
                i += 1
                if i == queries:
                    h, i = h + 1, 0

    @jit
    def set_up(p, w, b, unit, row0, rows, queries, start):
        """Fill the per-row state; (first, last) key that any row sees, (first, last) that all rows see.

        Lanes beyond the last row repeat it.
        """
        pb = 0 if p.query_starts != 0 else b
        offset, length = get_int(p.offset + 8 * b), get_int(p.key_lengths + 8 * b)
        any_first, any_last, all_first, all_last = length, 0, 0, length
        h, i = unit * p.packed_heads + row0 // queries, row0 % queries
        padded = (rows + lanes - 1) // lanes * lanes
        # What the loops read of p they would read again for each row, as they also write memory.
        left, right, query_bytes = p.left, p.right, p.head_dim * stored
        query_step, out_step, query, out = p.query_s * stored, p.out_s * stored, 0, 0
        for r in range(padded):
            if r == 0 or i == 0:
                query = p.query + (pb * p.query_b + h * p.query_h + (start + i) * p.query_s) * stored
                out = p.out + (pb * p.out_b + h * p.out_h + (start + i) * p.out_s) * stored
            put_int(w.queries + 8 * r, query)
            put_int(w.outs + 8 * r, out)
            # Rows are read in turns of a line each, which no processor foresees.
            for c in range(0, query_bytes, 64):
                simd.prefetch(query + c)
            if r < rows - 1:
                i, query, out = i + 1, query + query_step, out + out_step
                if i == queries:
                    h, i = h + 1, 0
        if queries - 1 + offset <= left and offset + right >= length - 1:  # all rows see all keys
            any_first, any_last = 0, length
            for r in range(padded):
                put_index(w.first + r * size, index(0))
                put_index(w.last + r * size, index(length))
        else:
            i = row0 % queries
            for r in range(padded):
                first = min(max(i + offset - left, 0), length)
                last = min(max(i + offset + right + 1, 0), length)
                if first < last:
                    any_first, any_last = min(any_first, first), max(any_last, last)
                    all_first, all_last = max(all_first, first), min(all_last, last)
                else:
                    first, last, all_last = 0, 0, 0
                put_index(w.first + r * size, index(first))
                put_index(w.last + r * size, index(last))
                if r < rows - 1:
                    i = i + 1 if i < queries - 1 else 0
        for r in range(0, padded, lanes):
            store(w.maximum + r * size, splat(-infinity))
            store(w.total + r * size, splat(dtype(0)))
        if p.sinks != 0 or p.alibi_slopes != 0 or p.mask != 0 or p.weights != 0 or p.bias != 0:
            place_more(p, w, b, unit, row0, padded, rows, queries, offset)
        if p.table != 0:
            row = b * p.table_b + unit * p.table_h + row0 // BLOCK * p.table_q
            put_int(w.masks, p.table + row)
            put_int(w.masks + 8, row0 % BLOCK)
        place(p, w, b, unit, row0, rows)
        # A start at a multiple of it keeps pairs of keys together, and tiles of them.
        return any_first // whole_run * whole_run, any_last, all_first, all_last

    @jit
    def transpose_queries(p, w, vectors):
        """q^T: numbers, or words of two numbers that lie side by side."""
        queries = w.queries
        if pairs:
            whole = p.head_dim // (2 * lanes) * lanes
            for v in range(vectors):
                for c in range(0, whole, lanes):
                    t = w.q + c * ROW_BYTES + v * register
                    read_words(queries + v * lanes * 8, 2 * c * stored, t)
                    if split:
                        read_rest(queries + v * lanes * 8, 2 * c * stored, t + p.query_rows * ROW_BYTES)
            for r in range(vectors * lanes):
                a = get_int(queries + 8 * r)
                for c in range(whole, (p.head_dim + 1) // 2):
                    low = get_stored(a + 2 * c * stored)
                    high = get_stored(a + (2 * c + 1) * stored) if 2 * c + 1 < p.head_dim else dtype(0)
                    t = w.q + c * ROW_BYTES + r * size
                    pack(t, first(low), first(high))
                    if split:
                        pack(t + p.query_rows * ROW_BYTES, second(low), second(high))
            for c in range((p.head_dim + 1) // 2, p.query_rows):
                for v in range(vectors):
                    t = w.q + c * ROW_BYTES + v * register
                    store(t, splat(dtype(0)))
                    if split:
                        store(t + p.query_rows * ROW_BYTES, splat(dtype(0)))
            return
        whole = p.head_dim // lanes * lanes
        for v in range(vectors):
            for c in range(0, whole, lanes):
                read_square(queries + v * lanes * 8, c * stored, w.q + c * ROW_BYTES + v * register)
        for r in range(vectors * lanes if whole < p.head_dim else 0):
            a = get_int(queries + 8 * r)
            for c in range(whole, p.head_dim):
                put(w.q + c * ROW_BYTES + r * size, get_stored(a + c * stored))
        if rounds:
            for c in range(p.head_dim):
                for v in range(vectors):
                    a = w.q + c * ROW_BYTES + v * register
                    store(a, as_operand(load(a)))

    @jit
    def keys_at(p, key, converted, key0):
        """Where keys lie for the tiles, and how many numbers or words from one to the next."""
        if converts and p.key_panel_bytes > 0:
            return converted + key0 % KEYS * p.query_rows * size, p.query_rows
        return key + key0 * p.key_s * stored, p.key_s // 2 if pairs else p.key_s

    @jit
    def score(p, w, key, converted, key0, keys, vectors):
        """The raw products of one run of keys."""
        if tiled:
            row = p.query_rows * size
            a = converted + key0 % KEYS * row
            rows = (keys + 15) // 16 * 16
            fresh(a, row, KEYS * row, rows, w.q, p.query_rows * ROW_BYTES, w.s, vectors, p.query_rows)
            return
        a, stride = keys_at(p, key, converted, key0)
        for v in range(vectors):
            store(w.tops + v * register, splat(-infinity))
        fresh(a, 2 * stride, stride, 1, keys, w.q, w.s, vectors, p.query_rows, w.tops)

    @jit
    def count_seen(w, key0, keys, vectors):
        """What of a run each vector's rows need, from a multiple of 16 on; whether that is less for any."""
        some = False
        for v in range(vectors if not tiled else 0):
            begin, end = keys, 0
            for r in range(v * lanes, (v + 1) * lanes):
                begin = min(begin, get_index(w.first + r * size) - key0)
                end = max(end, get_index(w.last + r * size) - key0)
            end = min((end + 1) // 2 * 2, keys)
            begin = min(max(begin, 0) // whole_run * whole_run, end)
            put_int(w.begins + 8 * v, begin)
            put_int(w.ends + 8 * v, end)
            some |= begin > 0 or end < keys
        return some

    @jit
    def score_seen(p, w, key, converted, key0, keys, vectors):
        if tiled:
            return
        a, stride = keys_at(p, key, converted, key0)
        most, least = 0, keys
        for v in range(vectors):
            store(w.tops + v * register, splat(-infinity))
            most, least = max(most, get_int(w.begins + 8 * v)), min(least, get_int(w.ends + 8 * v))
        if most < least:
            t, count = w.s + most * ROW_BYTES, least - most
            fresh(a + most * stride * size, 2 * stride, stride, 1, count, w.q, t, vectors, p.query_rows,
                  w.tops)  # fmt: skip
        else:
            most = least = keys
        for v in range(vectors):
            column = v * register
            for part in range(2):
                begin, end = get_int(w.begins + 8 * v), get_int(w.ends + 8 * v)
                if part == 0:
                    end = min(end, most)
                else:
                    begin = max(begin, least)
                if begin < end:
                    t = w.s + begin * ROW_BYTES + column
                    fresh(a + begin * stride * size, 2 * stride, stride, 1, end - begin, w.q + column, t, 1,
                          p.query_rows, w.tops + column)  # fmt: skip

    @jit
    def mend_scores(p, w, key, key0, keys, rows):
        """Multiply anew where the parts of an infinite number have met a 0 or each other."""
        for j in range(keys):
            k = key + (key0 + j) * p.key_s * stored
            for r in range(rows):
                t = w.s + j * ROW_BYTES + r * size
                if get(t) != get(t):
                    q, total = get_int(w.queries + 8 * r), dtype(0)
                    for d in range(p.head_dim):
                        total += get_stored(q + d * stored) * get_stored(k + d * stored)
                    put(t, total)

    def kernel(block):
        def run(address):
            p = parameters_at(address)
            w = scratch_at(p, p.workspace + simd.fetch_add(address + WORKERS) * p.workspace_bytes)
            finished_last = 0
            started = False
            while True:
                t = simd.fetch_add(address + NEXT_TASK)
                if t >= p.tasks:
                    if tiled and started:
                        amx.release()
                    return finished_last
                if not started:
                    if tiled:
                        amx.configure()
                    for slot in range(p.slots):
                        put_int(w.tags + 8 * slot, 0)
                    started = True
                b, unit, number = task(p, t)
                block(p, w, b, unit, number)
                if simd.fetch_add(address + TASKS_DONE) + 1 == p.tasks:
                    finished_last = 1

        return run

    return Queries(
        find, set_up, transpose_queries, fresh, score, score_seen, count_seen, mend_scores, look, adjust,
        visible, panel, kernel,
    )  # fmt: skip
