"""How a block of queries ends: its sums o^T become rows of the output, its scores weights that are returned.

The lanes are queries, and memory's rows are too, so squares are transposed in registers. Whatever made the
scores, a block's scratch has the fields that these use.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from . import emitters, panels, simd
from .tiles import ROW_BYTES


def build(jit: Any, storage: str, exp2_product: Any) -> tuple[Any, Any, Any]:
    """The compiled functions ``all_finite(p, w, vectors)``, whether every sum of a block is;
    ``write_rows(p, w, rows)``, o^T / total -> out, which leaves the divisors at w.rescale; and
    ``write_weights(p, w, key0, keys, rows, vectors)``, s^T -> weights, after that.

    `exp2_product` is the exponential that the weights of the sums came from.
    """
    compute = "float64" if storage == "float64" else "float32"
    dtype: Any = np.dtype(compute).type
    size = np.dtype(compute).itemsize
    stored = 2 if storage in ("float16", "bfloat16") else size
    lanes = simd.lanes(dtype)
    register = emitters.REGISTER_BYTES
    load, store, get, put = simd.loads(compute)
    put_stored = simd.loads(storage)[3]
    get_int = simd.scalars(types.int64)[0]
    divide_square = panels.rows_out(lanes, storage)[0]
    write_square = panels.rows_out(lanes, compute)[1]
    lowest = emitters.exp2_floor(dtype)
    sub, mul, splat = simd.sub, simd.mul, simd.splat

    @jit
    def all_finite(p, w, vectors):
        # 0 times what is finite adds up to 0.
        zero, one = splat(dtype(0)), splat(dtype(1))
        for v in range(vectors):
            seen = other = one  # two chains: one waits four cycles for each step
            for d in range(0, p.value_dim - 1, 2):
                t = w.o + d * ROW_BYTES + v * register
                seen, other = simd.fma(load(t), zero, seen), simd.fma(load(t + ROW_BYTES), zero, other)
            if p.value_dim % 2 == 1:
                seen = simd.fma(load(w.o + (p.value_dim - 1) * ROW_BYTES + v * register), zero, seen)
            if not simd.all_ones(mul(seen, other)):
                return False
        return True

    @jit
    def write_rows(p, w, rows):
        divisor = w.rescale
        for r in range(0, rows, lanes):
            total = load(w.total + r * size)
            store(divisor + r * size, simd.if_equal(total, splat(dtype(0)), splat(dtype(1)), total))
        whole = p.value_dim // lanes * lanes
        for r in range(0, rows, lanes):
            for c in range(0, whole, lanes):
                source = w.o + c * ROW_BYTES + r * size
                divide_square(source, divisor + r * size, w.outs + 8 * r, c * stored, rows - r)
        for r in range(rows):
            for c in range(whole, p.value_dim):
                x = get(w.o + c * ROW_BYTES + r * size) / get(divisor + r * size)
                put_stored(get_int(w.outs + 8 * r) + c * stored, x)

    @jit
    def write_weights(p, w, key0, keys, rows, vectors):
        scale, floor = splat(dtype(p.log2_scale)), splat(dtype(lowest / p.log2_scale))
        for v in range(vectors):
            top = simd.finite_or_zero(load(w.maximum + v * register))
            share = simd.div(splat(dtype(1)), load(w.rescale + v * register))
            for j in range(keys):
                a = w.s + j * ROW_BYTES + v * register
                store(a, mul(exp2_product(sub(load(a), top), scale, floor), share))
        for r in range(0, rows, lanes):
            for c in range(0, keys if keys >= lanes else 0, lanes):
                j = min(c, keys - lanes)  # the last square overlaps
                write_square(w.s + j * ROW_BYTES + r * size, w.weights + 8 * r, (key0 + j) * size, rows - r)
        for j in range(keys if keys < lanes else 0):
            for r in range(rows):
                put(get_int(w.weights + 8 * r) + (key0 + j) * size, get(w.s + j * ROW_BYTES + r * size))

    return all_finite, write_rows, write_weights
