"""Tiled attention on explicit vectors: the lanes are queries.

A task is one block of up to `ROW_BYTES / itemsize` queries that share their keys. Scores are kept
transposed, S^T[key, query], so the softmax runs down the lanes without a horizontal step, and both products
are the same register tile: S^T = K Q^T and O^T = V^T P^T, where K and V are read one number at a time (AMX
takes tiles of them). Beside a block's Q^T and O^T only one S^T of `KEYS` keys exists. K and V are read as
they lie where memory holds what the tile multiplies; else, and V where several blocks share it, `KEYS` rows
at a time are converted into panels, which serve all blocks of a head.

Short queries of one group of heads (grouped-query attention) are packed into one block, so that each key is
read once for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from . import amx, emitters, panels, scores, simd
from .layout import (
    NEXT_TASK,
    STATE_ROWS,
    TABLES,
    TASKS_DONE,
    WORKERS,
    Operand,
    Scratch,
    multiplies,
    parameters_at,
    score_rows,
)
from .masks import EVERYTHING, NOTHING, WORDS
from .panels import KEYS
from .tiles import ROW_BYTES, product

SUMS, CAREFUL_SUMS, WEIGHTS = range(3)
"""What a pass over the keys is for."""


def build(storage: str, bfloat16_products: bool, jit: Any, inline: Any) -> Callable[[Any], Any]:
    """The kernel for arrays of one storage dtype, as a function of its parameters' address."""
    operands = multiplies(storage, bfloat16_products)
    split = operands == "split"
    tiled = split or operands == "amx"
    planes = panels.parts(operands)
    pairs = tiled or operands == "pairs"
    per_operand = 2 if pairs else 1
    len_planes, rows_of_scores = len(planes), score_rows(operands)
    whole_run = 32 if tiled else 16  # keys that are multiplied together
    rounds = bfloat16_products and not pairs  # operands rounded to bfloat16, multiplied as float32
    converts = operands != storage or rounds
    dtype: Any = np.float64 if storage == "float64" else np.float32
    number = types.float64 if storage == "float64" else types.float32
    size = np.dtype(dtype).itemsize
    stored = 2 if storage in ("float16", "bfloat16") else size
    lanes = simd.lanes(dtype)
    register = emitters.REGISTER_BYTES
    block_rows = ROW_BYTES // size
    infinity = dtype(np.inf)

    load, store, get, put = simd.loads("float64" if size == 8 else "float32")
    _, _, get_stored, put_stored = simd.loads(storage)
    get_int, put_int = simd.scalars(types.int64)
    put_index = simd.scalars(types.int64 if size == 8 else types.int32)[1]
    index = np.int64 if size == 8 else np.int32
    if tiled:
        fresh, accumulate = (amx.product(jit, add, len(planes)) for add in (False, True))
    else:
        fresh = product(jit, number, rescale=False, pairs=pairs)
        accumulate = product(jit, number, rescale=True, pairs=pairs)
    as_operand = simd.round_bfloat16 if rounds else simd.same
    panel = panels.build(jit, storage, operands, converts, as_operand)
    look, adjust, visible = scores.build(jit, inline, dtype, storage)
    read_square = panels.rows_in(lanes, storage)
    read_words: Any = panels.words_in(lanes, storage, planes[0][0]) if pairs else None
    read_rest: Any = panels.words_in(lanes, storage, planes[-1][0]) if pairs else None
    first, second = planes[0][1], planes[-1][1]
    low_weights = KEYS * ROW_BYTES  # where the second plane of weights lies behind the first
    write_square = panels.rows_out(lanes, storage)[0]
    write_weight_square = panels.rows_out(lanes, "float64" if size == 8 else "float32")[1]
    pack = panels.pair_words(vector=False)
    get_operand, put_operand = simd.loads("bfloat16")[2:] if pairs else (get, put)
    sub, add, mul, greater, splat = simd.sub, simd.add, simd.mul, simd.greater, simd.splat
    exp2_product = simd.exp2_product_short if pairs else simd.exp2_product
    lowest = emitters.exp2_floor(dtype)

    @jit
    def scratch_at(p, q):
        o = q + len_planes * p.query_rows * ROW_BYTES
        s = o + p.value_rows * ROW_BYTES
        row = s + rows_of_scores * ROW_BYTES
        table, step = row + STATE_ROWS * ROW_BYTES, block_rows * 8
        seen = table + TABLES * step
        tags = seen + WORDS * 8
        converted = tags + 64 * ((p.slots + 7) // 8)
        return Scratch(q, o, s, row, row + ROW_BYTES, row + 2 * ROW_BYTES, row + 3 * ROW_BYTES,
                       row + 4 * ROW_BYTES, row + 5 * ROW_BYTES, row + 6 * ROW_BYTES,
                       table, table + step, table + 2 * step, table + 3 * step, table + 4 * step,
                       seen, tags, converted, converted + p.slots * p.slot_bytes)  # fmt: skip

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
    def set_up(p, w, b, unit, row0, rows, queries, start):
        """Fill the per-row state; (first, last) key that any row sees, (first, last) that all rows see.

        Lanes beyond the last row repeat it.
        """
        pb = 0 if p.query_starts != 0 else b
        offset, length = get_int(p.offset + 8 * b), get_int(p.key_lengths + 8 * b)
        any_first, any_last, all_first, all_last = length, 0, 0, length
        h, i = unit * p.packed_heads + row0 // queries, row0 % queries
        for r in range((rows + lanes - 1) // lanes * lanes):
            first = min(max(i + offset - p.left, 0), length)
            last = min(max(i + offset + p.right + 1, 0), length)
            if first < last:
                any_first, any_last = min(any_first, first), max(any_last, last)
                all_first, all_last = max(all_first, first), min(all_last, last)
            else:
                first, last, all_last = 0, 0, 0
            put_index(w.first + r * size, index(first))
            put_index(w.last + r * size, index(last))
            put(w.maximum + r * size, get(p.sinks + h * size) if p.sinks != 0 else -infinity)
            put(w.total + r * size, dtype(1) if p.sinks != 0 else dtype(0))
            put(w.slope + r * size, get(p.alibi_slopes + h * size) if p.alibi_slopes != 0 else dtype(0))
            put(w.position + r * size, dtype(i + offset))
            query = p.query + (pb * p.query_b + h * p.query_h + (start + i) * p.query_s) * stored
            out = p.out + (pb * p.out_b + h * p.out_h + (start + i) * p.out_s) * stored
            put_int(w.queries + 8 * r, query)
            put_int(w.outs + 8 * r, out)
            # Rows are read and written in turns of a line each, which no processor foresees.
            for c in range(0, p.head_dim * stored, 64):
                simd.prefetch(query + c)
            for c in range(0, p.value_dim * stored, 64):
                simd.prefetch(out + c)
            put_int(w.masks + 8 * r, p.mask + b * p.mask_b + h * p.mask_h + i * p.mask_q)
            put_int(
                w.weights + 8 * r, p.weights + (b * p.weights_b + h * p.weights_h + i * p.weights_s) * size
            )
            put_int(w.biases + 8 * r, p.bias + b * p.bias_b + h * p.bias_h + i * p.bias_q)
            if r < rows - 1:
                i += 1
                if i == queries:
                    h, i = h + 1, 0
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
    def score(p, w, key, converted, key0, keys, vectors):
        """The raw products of one run of keys."""
        if tiled:
            row = p.query_rows * size
            a = converted + key0 % KEYS * row
            rows = (keys + 15) // 16 * 16
            fresh(a, row, KEYS * row, rows, w.q, p.query_rows * ROW_BYTES, w.s, vectors, p.query_rows)
            return
        depth = p.query_rows
        if converts and p.key_panel_bytes > 0:
            a, stride = converted + key0 % KEYS * depth * size, depth
        else:
            a, stride = key + key0 * p.key_s * stored, p.key_s // 2 if pairs else p.key_s
        fresh(a, 2 * stride, stride, 1, keys, w.q, w.s, vectors, depth, 0)

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

    @jit
    def put_weights(t, x, y):
        """Two weights of each query as a word."""
        if split:
            upper_x, upper_y = simd.upper(x), simd.upper(y)
            panels.pack_weights(t, upper_x, upper_y)
            panels.pack_weights(t + low_weights, sub(x, upper_x), sub(y, upper_y))
        else:
            panels.pack_weights(t, x, y)

    @jit
    def soften(p, w, keys, vectors):
        """s^T -> unnormalised weights; moves the maximum and total, leaves the factor for older sums."""
        scale = splat(dtype(p.log2_scale))
        floor, margin = splat(dtype(lowest / p.log2_scale)), splat(dtype(8 / p.log2_scale))
        for v in range(vectors):
            c = w.s + v * register
            before = load(w.maximum + v * register)
            # Two chains: one waits four cycles for each step.
            top = other = before
            for j in range(0, keys - 1, 2):
                top = greater(load(c + j * ROW_BYTES), top)
                other = greater(load(c + (j + 1) * ROW_BYTES), other)
            if keys % 2 == 1:
                top = greater(load(c + (keys - 1) * ROW_BYTES), top)
            # Older sums stay as they are until the maximum has grown by much: weights up to 2**8 do no harm.
            top = simd.if_above(greater(top, other), before, margin)
            zero_point = simd.finite_or_zero(top)
            rescale = exp2_product(sub(before, zero_point), scale, floor)
            # Sums of their own for this run: added one by one to a large total, small weights would be lost.
            even = odd = splat(dtype(0))
            for j in range(0, keys - 1, 2):
                x = exp2_product(sub(load(c + j * ROW_BYTES), zero_point), scale, floor)
                y = exp2_product(sub(load(c + (j + 1) * ROW_BYTES), zero_point), scale, floor)
                even, odd = add(even, x), add(odd, y)
                if pairs:
                    put_weights(c + j // 2 * ROW_BYTES, x, y)
                else:
                    store(c + j * ROW_BYTES, as_operand(x))
                    store(c + (j + 1) * ROW_BYTES, as_operand(y))
            if keys % 2 == 1:
                x = exp2_product(sub(load(c + (keys - 1) * ROW_BYTES), zero_point), scale, floor)
                even = add(even, x)
                if pairs:
                    put_weights(c + keys // 2 * ROW_BYTES, x, splat(dtype(0)))
                else:
                    store(c + (keys - 1) * ROW_BYTES, as_operand(x))
            if tiled:
                for j in range((keys + 1) // 2, (keys + 31) // 32 * 16):
                    store(c + j * ROW_BYTES, splat(dtype(0)))
                    if split:
                        store(c + j * ROW_BYTES + low_weights, splat(dtype(0)))
            total = simd.fma(load(w.total + v * register), rescale, add(even, odd))
            store(w.maximum + v * register, top)
            store(w.total + v * register, total)
            store(w.rescale + v * register, rescale)

    @jit
    def operand_of(p, value, converted, key0):
        """The values from key0 on."""
        a, first = converted + p.key_panel_bytes, key0 % KEYS
        if tiled:
            return Operand(a + first // 2 * size, KEYS, KEYS // 2, 1)
        if pairs:
            return Operand(a + first // 2 * p.value_dim * size, 2, 1, p.value_dim)
        if p.slots == 0:
            return Operand(value + key0 * p.value_s * stored, 2, 1, p.value_s)
        if size == 8:
            return Operand(a + first * 8, 2 * KEYS, KEYS, 1)
        return Operand(a + first * 8, 2 * KEYS, 1, 2)

    @jit
    def add_values(p, w, x, keys, vectors):
        """o^T = o^T * rescale + v^T p^T"""
        if tiled:
            for v in range(vectors):
                rescale = load(w.rescale + v * register)
                if not simd.all_ones(rescale):
                    for d in range(p.value_dim):
                        t = w.o + d * ROW_BYTES + v * register
                        store(t, mul(load(t), rescale))
            depth = (keys + 31) // 32 * 16
            plane = p.value_rows * x.column * size
            accumulate(x.address, x.column * size, plane, p.value_rows, w.s, low_weights, w.o, vectors, depth)
            return
        depth = (keys + per_operand - 1) // per_operand
        accumulate(x.address, x.two, x.column, x.key, p.value_dim, w.s, w.o, vectors, depth, w.rescale)

    @jit
    def number_at(x, j, d):
        """Where the number of key j and column d lies."""
        words = d // 2 * x.two + d % 2 * x.column + j // per_operand * x.key
        return x.address + words * size + j % per_operand * 2

    @jit
    def add_visible_values(p, w, value, operand, key0, keys, rows, vectors):
        """`add_values`, where what is not finite reaches only the rows that see it."""
        finite = Operand(w.finite, KEYS, KEYS // 2, 1) if tiled else Operand(w.finite, 2, 1, p.value_dim)
        multiplied = (keys + 31) // 32 * 32 if tiled else keys + keys % per_operand
        for plane in range(len_planes):
            shift = plane * p.value_rows * (KEYS // 2) * size
            for j in range(multiplied):
                for d in range(p.value_dim):
                    y = get_operand(number_at(operand, j, d) + shift) if j < keys else dtype(0)
                    put_operand(number_at(finite, j, d) + shift, y if y - y == 0 else dtype(0))
        add_values(p, w, finite, keys, vectors)
        for j in range(keys):
            for d in range(p.value_dim):
                y = get_stored(value + ((key0 + j) * p.value_s + d) * stored)
                if bfloat16_products:
                    y = simd.round_bfloat16(y)
                if y - y == 0:
                    continue
                for r in range(rows):
                    if visible(p, w, r, key0 + j):
                        a = w.s + j // per_operand * ROW_BYTES + r * size + j % per_operand * 2
                        x = get_operand(a)
                        if split:
                            x += get_operand(a + low_weights)
                        t = w.o + d * ROW_BYTES + r * size
                        put(t, get(t) + x * y)

    @jit
    def write_weights(p, w, key0, keys, rows, vectors):
        """s^T -> weights as they are returned; `finish` has left what to divide by."""
        scale, floor = splat(dtype(p.log2_scale)), splat(dtype(lowest / p.log2_scale))
        for v in range(vectors):
            top = simd.finite_or_zero(load(w.maximum + v * register))
            share = simd.div(splat(dtype(1)), load(w.rescale + v * register))
            for j in range(keys):
                a = w.s + j * ROW_BYTES + v * register
                store(a, simd.mul(exp2_product(sub(load(a), top), scale, floor), share))
        for r in range(0, rows, lanes):
            table = w.weights + 8 * r
            for c in range(0, keys if keys >= lanes else 0, lanes):
                first = min(c, keys - lanes)  # the last square overlaps
                source = w.s + first * ROW_BYTES + r * size
                write_weight_square(source, table, (key0 + first) * size, rows - r)
            for c in range(keys if keys < lanes else 0):
                for i in range(min(lanes, rows - r)):
                    x = get(w.s + c * ROW_BYTES + (r + i) * size)
                    put(get_int(table + 8 * i) + (key0 + c) * size, x)

    @jit
    def all_finite(p, w, rows, vectors):
        """Whether every sum of the block is: 0 times them adds up to 0."""
        zero = splat(dtype(0))
        for v in range(vectors):
            seen = zero
            for d in range(p.value_dim):
                seen = simd.fma(load(w.o + d * ROW_BYTES + v * register), zero, seen)
            store(w.rescale + v * register, seen)
        for r in range(rows):  # noqa: SIM110 - Numba compiles no all()
            if get(w.rescale + r * size) != 0:
                return False
        return True

    @jit
    def finish(p, w, b, unit, row0, rows, queries, start):
        """o^T / total -> out, and lse."""
        pb = 0 if p.query_starts != 0 else b
        divisor = w.rescale
        for r in range((rows + lanes - 1) // lanes * lanes):
            total = get(w.total + r * size)
            put(divisor + r * size, dtype(1) if total == 0 else total)
        whole = p.value_dim // lanes * lanes
        for r in range(0, rows, lanes):
            for c in range(0, whole, lanes):
                source = w.o + c * ROW_BYTES + r * size
                write_square(source, divisor + r * size, w.outs + 8 * r, c * stored, rows - r)
        for r in range(rows):
            for c in range(whole, p.value_dim):
                x = get(w.o + c * ROW_BYTES + r * size) / get(divisor + r * size)
                put_stored(get_int(w.outs + 8 * r) + c * stored, x)
            if p.lse != 0:
                h, i = unit * p.packed_heads + (row0 + r) // queries, (row0 + r) % queries
                a = p.lse + (pb * p.lse_b + h * p.lse_h + (start + i) * p.lse_s) * size
                total = get(w.total + r * size)
                top = np.float64(get(w.maximum + r * size))
                if p.plain:
                    top *= p.scale
                put(a, -infinity if total == 0 else dtype(top + math.log(np.float64(total))))

    @inline
    def block(p, w, b, unit, number):
        start, queries, key_start = rows_of(p, b)
        row0 = number * block_rows
        rows = min(block_rows, p.packed_heads * queries - row0)
        vectors = (rows + lanes - 1) // lanes
        pb = 0 if p.query_starts != 0 else b
        shared = unit * p.packed_heads // p.group
        head = b * p.units * p.packed_heads // p.group + shared
        key = p.key + (pb * p.key_b + shared * p.key_h + key_start * p.key_s) * stored
        value = p.value + (pb * p.value_b + shared * p.value_h + key_start * p.value_s) * stored
        length = get_int(p.key_lengths + 8 * b)
        stage, careful = SUMS, False
        while True:
            if stage != WEIGHTS:
                any_first, any_last, all_first, all_last = set_up(p, w, b, unit, row0, rows, queries, start)
                transpose_queries(p, w, vectors)
                zero = splat(dtype(0))
                for d in range(p.value_dim):
                    for v in range(vectors):
                        store(w.o + d * ROW_BYTES + v * register, zero)
            key0 = any_first
            while key0 < any_last:
                keys = min(KEYS - key0 % KEYS, any_last - key0)
                seen = look(p, w, key0, keys, vectors * lanes) if p.mask != 0 else EVERYTHING
                if seen == NOTHING:
                    key0 += keys
                    continue
                converted = panel(p, w, head, key0 // KEYS, key, value, length) if p.slots > 0 else 0
                score(p, w, key, converted, key0, keys, vectors)
                if split and careful:
                    mend_scores(p, w, key, key0, keys, rows)
                adjust(p, w, key0, keys, rows, vectors, all_first, all_last, seen, careful)
                if stage == WEIGHTS:
                    write_weights(p, w, key0, keys, rows, vectors)
                else:
                    soften(p, w, keys, vectors)
                    operand = operand_of(p, value, converted, key0)
                    if stage == SUMS:
                        add_values(p, w, operand, keys, vectors)
                    else:
                        add_visible_values(p, w, value, operand, key0, keys, rows, vectors)
                key0 += keys
            # A non-finite value meets a weight of 0 where it is masked, and 0 * inf is NaN. It shows in the
            # sums: only then the block is done again, with every masked value left out.
            if stage == SUMS and not all_finite(p, w, rows, vectors):
                stage, careful = CAREFUL_SUMS, True
                continue
            if stage != WEIGHTS:
                finish(p, w, b, unit, row0, rows, queries, start)
                if p.weights != 0:
                    stage = WEIGHTS
                    continue
            return

    def attend(address):
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

    return attend
