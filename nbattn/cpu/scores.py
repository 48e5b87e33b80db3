"""What happens to scores s^T between the product and the softmax: scale, softcap, bias, ALiBi, a function of
the user's, masks.

Each step is one pass over a tile in the first-level cache, and a call pays only for the steps it asks for.
The scale goes into the first one. A bias lies query by query in memory; squares of it are transposed in
registers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from ..problem import STORAGE_DTYPES
from . import emitters, masks, mods, panels, simd
from .tiles import ROW_BYTES

get_int, put_int = simd.scalars(types.int64)


def build(jit: Any, inline: Any, dtype: Any, storage: str) -> tuple[Any, Any, Any, Any]:
    """The compiled functions ``look(p, w, key0, end, rows)``, what all masks show of how many keys, as of
    `masks.with_blocks`; ``adjust(p, w, key0, keys, rows, vectors, all_first, all_last, seen, careful)``, that
    turns raw products into scores where the masks showed `seen`; ``visible(p, w, r, j)``, whether row r sees
    key j at all, after an `adjust` that was `careful`: else, too, a bias of -inf leaves a score of NaN or inf
    NaN; and ``place(p, w, b, unit, row0, rows)``, before the first run of a block.

    `p` is the call's parameters, `w` the block's scratch (`layout.Scratch`).
    """
    size = np.dtype(dtype).itemsize
    lanes = simd.lanes(dtype)
    register = emitters.REGISTER_BYTES
    infinity = dtype(np.inf)
    compute = ir.DoubleType() if size == 8 else ir.FloatType()
    load, store, get, put = simd.loads("float64" if size == 8 else "float32")
    get_index, _ = simd.scalars(types.int64 if size == 8 else types.int32)
    fma, mul, sub, splat = simd.fma, simd.mul, simd.sub, simd.splat
    look_array, hide, masked_in_array = masks.build(jit, dtype)
    look_at_mask, masked = masks.with_blocks(jit, look_array, masked_in_array)
    modify, ask = mods.callers(jit)

    @jit
    def place(p, w, b, unit, row0, rows):
        put_int(w.call + mods.BATCH, b)
        put_int(w.call + mods.HEAD, unit)  # blocks that call users' functions hold one head each
        put_int(w.call + mods.QUERY0, row0)
        put_int(w.call + mods.ROWS, rows)
        states = p.states + b * p.states_b + unit * p.states_h + row0 // (ROW_BYTES // size) * p.states_q
        put_int(w.call + mods.STATES, states if p.states != 0 else 0)

    @jit
    def look(p, w, key0, end, rows):
        seen, keys = look_at_mask(p, w, key0, end, rows)
        if p.mask_mod != 0 and seen != masks.NOTHING:
            states = get_int(w.call + mods.STATES)
            known = masks.get_byte(states + key0 // panels.KEYS) if states != 0 else masks.SOME
            if known == masks.NOTHING:
                seen = masks.NOTHING
            elif known == masks.SOME:
                seen = ask(w.call, p.mask_mod, p.mask_arguments, w.seen, key0, keys, seen)
        return seen, keys

    @jit
    def multiply(s, scale, keys, vectors):
        for j in range(keys):
            for v in range(vectors):
                a = s + j * ROW_BYTES + v * register
                store(a, mul(load(a), splat(scale)))

    @jit
    def cap(p, s, keys, vectors):
        inner, outer = splat(dtype(p.scale / p.softcap)), splat(dtype(p.softcap))
        for j in range(keys):
            for v in range(vectors):
                a = s + j * ROW_BYTES + v * register
                store(a, mul(outer, simd.tanh(mul(load(a), inner))))

    @jit
    def add_alibi(w, s, scale, key0, keys, vectors):
        for v in range(vectors):
            slope, position = load(w.slope + v * register), load(w.position + v * register)
            for j in range(keys):
                a = s + j * ROW_BYTES + v * register
                term = mul(slope, sub(splat(dtype(key0 + j)), position))
                store(a, fma(load(a), splat(scale), term))

    def bias_adder(kind: str) -> tuple[Any, Any]:
        read = simd.loads(kind)[2]
        bytes_ = 2 if kind in ("float16", "bfloat16") else np.dtype(kind).itemsize

        @jit
        def add_numbers(p, table, s, scale, key0, from_key, added, keys, rows):
            """Add the biases of keys from `added` on. One of -inf masks, also a NaN, from `from_key` on."""
            for j in range(from_key, keys):
                along = (key0 + j) * p.bias_k
                for r in range(rows):
                    t = s + j * ROW_BYTES + r * size
                    x = dtype(read(get_int(table + 8 * r) + along))
                    if x == -infinity:
                        put(t, x)
                    elif j >= added:
                        put(t, get(t) * scale + x)

        @jit
        def add_numbers_only(p, table, s, scale, key0, keys, rows, vectors, careful):
            add_numbers(p, table, s, scale, key0, 0, 0, keys, rows)

        # Biases of a third dtype are rare, and squares would add to every cold compile.
        if kind not in (storage, np.dtype(dtype).name):
            return read, add_numbers_only
        add_square = panels.bias_in(lanes, kind, compute)

        @jit
        def add_bias(p, table, s, scale, key0, keys, rows, vectors, careful):
            if p.bias_same_rows:
                a = get_int(table) + key0 * p.bias_k
                for j in range(keys):
                    x = dtype(read(a + j * p.bias_k))
                    for v in range(vectors):
                        t = s + j * ROW_BYTES + v * register
                        y = splat(-infinity) if x == -infinity else fma(load(t), splat(scale), splat(x))
                        store(t, y)
                return
            squares = keys // lanes if p.bias_k == bytes_ else 0
            for v in range(vectors):
                for c in range(squares):
                    j = c * lanes
                    t = s + j * ROW_BYTES + v * register
                    add_square(table + v * lanes * 8, (key0 + j) * bytes_, t, scale)
            added = squares * lanes
            add_numbers(p, table, s, scale, key0, 0 if careful else added, added, keys, rows)

        return read, add_bias

    (read0, add0), (read1, add1), (read2, add2), (read3, add3) = (bias_adder(kind) for kind in STORAGE_DTYPES)

    @inline
    def adjust(p, w, key0, keys, rows, vectors, all_first, all_last, seen, careful):
        s = w.s
        if not p.plain:
            scale = dtype(p.scale)
            if p.softcap != 0:
                cap(p, s, keys, vectors)
                scale = dtype(1)
            if p.bias != 0:
                if p.bias_kind == 0:
                    add0(p, w.biases, s, scale, key0, keys, rows, vectors, careful)
                elif p.bias_kind == 1:
                    add1(p, w.biases, s, scale, key0, keys, rows, vectors, careful)
                elif p.bias_kind == 2:
                    add2(p, w.biases, s, scale, key0, keys, rows, vectors, careful)
                else:
                    add3(p, w.biases, s, scale, key0, keys, rows, vectors, careful)
                scale = dtype(1)
            if p.alibi_slopes != 0:
                add_alibi(w, s, scale, key0, keys, vectors)
                scale = dtype(1)
            if p.score_mod != 0:
                modify(w.call, p.score_mod, p.score_arguments, s, key0, keys, scale)
            elif scale != 1:
                multiply(s, scale, keys, vectors)
        if careful and (p.score_mod != 0 or p.mask_mod != 0):
            note(p, w, key0, keys, rows, seen)
        if seen == masks.SOME:
            hide(w, keys, vectors)
        if key0 < all_first or key0 + keys > all_last:
            from_key = max(all_last - key0, 0) if key0 >= all_first else 0
            for v in range(vectors):
                first, last = w.first + v * register, w.last + v * register
                for j in range(from_key, keys):
                    t = s + j * ROW_BYTES + v * register
                    store(t, simd.outside(load(t), key0 + j, first, last))

    @jit
    def note(p, w, key0, keys, rows, seen):
        """Take into the words what a score_mod hides with -inf."""
        put_int(w.call + mods.KEY0, key0)
        for j in range(keys):
            word = get_int(w.seen + 8 * j) if seen == masks.SOME else -1
            for r in range(rows if p.score_mod != 0 else 0):
                if get(w.s + j * ROW_BYTES + r * size) == -infinity:
                    word &= ~(1 << r)
            put_int(w.seen + 8 * j, word)

    @jit
    def visible(p, w, r, j):
        if p.score_mod != 0 or p.mask_mod != 0:
            word = get_int(w.seen + 8 * (j - get_int(w.call + mods.KEY0)))
            if word >> r & 1 == 0:
                return False
        if j < get_index(w.first + r * size) or j >= get_index(w.last + r * size):
            return False
        if (p.mask != 0 or p.table != 0) and masked(p, w, r, j):
            return False
        if p.bias == 0:
            return True
        a = get_int(w.biases + 8 * r) + j * p.bias_k
        if p.bias_kind == 0:
            return dtype(read0(a)) != -infinity
        if p.bias_kind == 1:
            return dtype(read1(a)) != -infinity
        return dtype(read2(a) if p.bias_kind == 2 else read3(a)) != -infinity

    return look, adjust, visible, place
