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

from . import amx, emitters, layout, outputs, panels, queries, simd
from .layout import Operand
from .masks import NOTHING, SOME, trim_words
from .panels import KEYS
from .tiles import ROW_BYTES, product

SUMS, CAREFUL_SUMS, WEIGHTS = range(3)
"""What a pass over the keys is for."""


def build(storage: str, bfloat16_products: bool, jit: Any, inline: Any) -> Callable[[Any], Any]:
    """The kernel for arrays of one storage dtype, as a function of its parameters' address."""
    form = layout.form(storage, bfloat16_products)
    size, stored, lanes = form.size, form.stored, form.lanes
    split, tiled, pairs, rounds = form.split, form.tiled, form.pairs, form.rounds
    dtype: Any = form.dtype
    per_operand, len_planes = 2 if pairs else 1, len(panels.parts(form.operands))
    number = types.float64 if size == 8 else types.float32
    register = emitters.REGISTER_BYTES
    infinity = dtype(np.inf)

    parts = queries.build(form, jit, inline)
    find, set_up, transpose_queries, panel = parts.find, parts.set_up, parts.transpose_queries, parts.panel
    multiply, score, score_seen, count_seen, mend_scores = (
        parts.multiply, parts.score, parts.score_seen, parts.count_seen, parts.mend_scores,
    )  # fmt: skip
    trim = jit(trim_words)
    look, adjust, visible = parts.look, parts.adjust, parts.visible
    load, store, get, put = simd.loads("float64" if size == 8 else "float32")
    get_stored = simd.loads(storage)[2]
    if tiled:
        accumulate = amx.product(jit, True, len_planes)
    else:
        accumulate = product(jit, number, rescale=True, pairs=pairs)
    as_operand = simd.round_bfloat16 if rounds else simd.same
    low_weights = KEYS * ROW_BYTES  # where the second plane of weights lies behind the first
    get_int = simd.scalars(types.int64)[0]
    get_operand, put_operand = simd.loads("bfloat16")[2:] if pairs else (get, put)
    sub, add, mul, greater, splat = simd.sub, simd.add, simd.mul, simd.greater, simd.splat
    exp2_product = simd.exp2_product_short if pairs else simd.exp2_product
    lowest = emitters.exp2_floor(dtype)
    all_finite, write_rows, write_weights = outputs.build(jit, storage, exp2_product)

    @jit
    def put_weights(t, x, y):
        """Two weights of each query as a word."""
        if split:
            upper_x, upper_y = simd.upper(x), simd.upper(y)
            panels.pack_weights(t, upper_x, upper_y)
            panels.pack_weights(t + low_weights, sub(x, upper_x), sub(y, upper_y))
        elif tiled:
            panels.pack_weights(t, x, y)
        else:
            panels.pack_rows(t, x, y)

    @jit
    def ask_for(p, w, first, last):
        """Ask for the rows that the block writes; row by row, a line each, no processor foresees them."""
        for r in range(first, last):
            out = get_int(w.outs + 8 * r)
            for c in range(0, p.value_dim * stored, 64):
                simd.prefetch(out + c)

    @jit
    def soften(p, w, all_keys, vectors, ragged, topped):
        """s^T -> unnormalised weights; moves the maximum and total, leaves the factor for older sums.

        Where scores are `topped`, the products have left their maxima.
        """
        scale = splat(dtype(p.log2_scale))
        floor, margin = splat(dtype(lowest / p.log2_scale)), splat(dtype(8 / p.log2_scale))
        for v in range(vectors):
            c = w.s + v * register
            begin, keys = (get_int(w.begins + 8 * v), get_int(w.ends + 8 * v)) if ragged else (0, all_keys)
            before = load(w.maximum + v * register)
            # Two chains: one waits four cycles for each step.
            top = other = before
            if topped:
                top = greater(load(w.tops + v * register), top)
            else:
                for j in range(begin, keys - 1, 2):
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
            for j in range(begin, keys - 1, 2):
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
    def clear(p, w, vectors):
        """o^T = 0"""
        for d in range(p.value_dim):
            for v in range(vectors):
                store(w.o + d * ROW_BYTES + v * register, splat(dtype(0)))

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
    def add_values(p, w, x, keys, vectors, ragged, begun):
        """o^T = o^T * rescale + v^T p^T; the product alone where o^T is not `begun`."""
        if ragged and not tiled:
            for v in range(vectors):
                begin, end = get_int(w.begins + 8 * v), get_int(w.ends + 8 * v)
                depth = (end - begin + per_operand - 1) // per_operand
                c, begin = v * register, begin // per_operand
                t, a = w.s + begin * ROW_BYTES + c, x.address + begin * x.key * size
                if begun:
                    accumulate(a, x.two, x.column, x.key, p.value_dim, t, w.o + c, 1, depth, w.rescale + c)
                else:
                    multiply(a, x.two, x.column, x.key, p.value_dim, t, w.o + c, 1, depth, w.tops + c)
            return
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
        if begun:
            accumulate(x.address, x.two, x.column, x.key, p.value_dim, w.s, w.o, vectors, depth, w.rescale)
        else:
            multiply(x.address, x.two, x.column, x.key, p.value_dim, w.s, w.o, vectors, depth, w.tops)

    @jit
    def number_at(x, j, d):
        """Where the number of key j and column d lies."""
        words = d // 2 * x.two + d % 2 * x.column + j // per_operand * x.key
        return x.address + words * size + j % per_operand * 2

    @jit
    def add_visible_values(p, w, value, operand, key0, keys, rows, vectors, ragged, begun):
        """`add_values`, where what is not finite reaches only the rows that see it."""
        finite = Operand(w.finite, KEYS, KEYS // 2, 1) if tiled else Operand(w.finite, 2, 1, p.value_dim)
        multiplied = (keys + 31) // 32 * 32 if tiled else keys + keys % per_operand
        for plane in range(len_planes):
            shift = plane * p.value_rows * (KEYS // 2) * size
            for j in range(multiplied):
                for d in range(p.value_dim):
                    y = get_operand(number_at(operand, j, d) + shift) if j < keys else dtype(0)
                    put_operand(number_at(finite, j, d) + shift, y if y - y == 0 else dtype(0))
        add_values(p, w, finite, keys, vectors, ragged, begun)
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
    def finish(p, w, b, unit, row0, rows, queries, start):
        """o^T / total -> out, and lse."""
        pb = 0 if p.query_starts != 0 else b
        write_rows(p, w, rows)
        for r in range(rows if p.lse != 0 else 0):
            h, i = unit * p.packed_heads + (row0 + r) // queries, (row0 + r) % queries
            a = p.lse + (pb * p.lse_b + h * p.lse_h + (start + i) * p.lse_s) * size
            total = get(w.total + r * size)
            top = np.float64(get(w.maximum + r * size))
            if p.plain:
                top *= p.scale
            put(a, -infinity if total == 0 else dtype(top + math.log(np.float64(total))))

    @inline
    def block(p, w, b, unit, number):
        start, queries, row0, rows, vectors, head, key, value, length = find(p, b, unit, number)
        stage, careful, begun = SUMS, False, False
        while True:
            if stage != WEIGHTS:
                any_first, any_last, all_first, all_last = set_up(p, w, b, unit, row0, rows, queries, start)
                transpose_queries(p, w, vectors)
                begun = False
                if tiled:
                    clear(p, w, vectors)
            key0, asked = any_first, 0
            ahead = rows * KEYS // max(any_last - any_first, KEYS) + 1
            while key0 < any_last:
                seen, keys = look(p, w, key0, any_last, vectors * lanes)
                if seen == NOTHING:
                    key0 += keys
                    continue
                if seen == SOME:
                    key0, keys = trim(w, key0, keys)
                if key0 < all_first < key0 + keys and not tiled:
                    # What some rows do not see yet is a run of its own: those after it need no masks.
                    keys = min(keys, (all_first + 15) // 16 * 16 - key0)
                converted = panel(p, w, head, key0 // KEYS, key, value, length) if p.slots > 0 else 0
                if asked < rows:
                    ask_for(p, w, asked, min(asked + ahead, rows))
                    asked += ahead
                # Rows of a vector see less of the run than others on a causal mask's diagonal, and where
                # windows begin.
                ragged = False
                if (key0 < all_first or key0 + keys > all_last) and stage != WEIGHTS:
                    ragged = count_seen(w, key0, keys, vectors)
                if ragged:
                    score_seen(p, w, key, converted, key0, keys, vectors)
                else:
                    score(p, w, key, converted, key0, keys, vectors)
                if split and careful:
                    mend_scores(p, w, key, key0, keys, rows)
                adjust(p, w, key0, keys, rows, vectors, all_first, all_last, seen, careful)
                if stage == WEIGHTS:
                    write_weights(p, w, key0, keys, rows, vectors)
                else:
                    sees_all = seen != SOME and key0 >= all_first and key0 + keys <= all_last
                    soften(p, w, keys, vectors, ragged, sees_all and p.plain and not tiled)
                    operand = operand_of(p, value, converted, key0)
                    if stage == SUMS:
                        add_values(p, w, operand, keys, vectors, ragged, begun)
                    else:
                        add_visible_values(p, w, value, operand, key0, keys, rows, vectors, ragged, begun)
                    begun = True
                key0 += keys
            if not begun and not tiled:
                clear(p, w, vectors)
            # A non-finite value meets a weight of 0 where it is masked, and 0 * inf is NaN. It shows in the
            # sums: only then the block is done again, with every masked value left out.
            if stage == SUMS and not all_finite(p, w, vectors):
                stage, careful = CAREFUL_SUMS, True
                continue
            if stage != WEIGHTS:
                finish(p, w, b, unit, row0, rows, queries, start)
                if p.weights != 0:
                    stage = WEIGHTS
                    continue
            return

    return parts.kernel(block)
