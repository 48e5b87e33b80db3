"""From the scores of a tile of keys to its weights, as the tiles of `dots` take them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from . import dots, emitters, kinds, simd
from .kinds import LARGEST_WEIGHT, LEAST


def build(jit: Any, storage: str, row_keys: int) -> tuple[Any, Any, Any]:
    """The compiled functions ``scale_by``, ``soften`` and ``round_weights``.

    `p` is the call's parameters, `w` a thread's `chunks.Scratch`. A row has room for `row_keys` scores.
    """
    dtype: Any = np.float64 if storage == "float64" else np.float32
    number = types.float64 if storage == "float64" else types.float32
    size = np.dtype(dtype).itemsize
    lanes = simd.lanes(dtype)
    register = emitters.REGISTER_BYTES
    wide_rows = dots.rows_per_vector(lanes)
    pair_rows = 2 if wide_rows > 2 else 0
    pairs = kinds.read_as(storage) == "pairs"
    lowest = emitters.exp2_floor(dtype)

    load, store, get, put = simd.loads("float64" if size == 8 else "float32")
    get_int32, put_int32 = simd.scalars(types.int32)
    put_pairs, put_half = simd.loads("bfloat16")[1], kinds.put_whole(16)
    add, sub, mul, fma, greater, splat = simd.add, simd.sub, simd.mul, simd.fma, simd.greater, simd.splat
    exp2_product = simd.exp2_product
    top1, top2, top4 = (dots.across(number, n, emitters.greater_value) for n in (1, 2, wide_rows))
    repeat1, repeat2, repeat4 = (dots.repeat(number, n) for n in (1, 2, wide_rows))

    @jit
    def top_of_rows(x, together):
        if together == 1:
            return top1(x)
        return top2(x) if together == pair_rows else top4(x)

    @jit
    def scale_by(factors, s, keys, groups, together):
        """Multiply each key's column of scores or weights by its factor."""
        run = lanes // together
        for g in range(groups):
            for j in range(0, keys, run):
                t = s + (g * row_keys + j) * together * size
                if together == 1:
                    y = repeat1(factors + j * size)
                elif together == pair_rows:
                    y = repeat2(factors + j * size)
                else:
                    y = repeat4(factors + j * size)
                store(t, mul(load(t), y))

    @jit
    def soften(p, w, state, keys, groups, together):
        """Scores -> unnormalised weights; moves the maximum and total, leaves the factor for older sums.

        The total is one number a lane, to be added up at the end.
        """
        scale = splat(dtype(p.log2_scale))
        floor = splat(dtype(lowest / p.log2_scale))
        # All maxima first: each waits for itself more than it computes, and the next one needs not wait.
        for g in range(groups):
            s = w.s + g * together * row_keys * size
            maximum = state + 2 * g * register
            before = load(maximum)
            top = before
            for t in range(s, s + keys * together * size, register):
                top = greater(load(t), top)
            top = top_of_rows(top, together)
            factor = exp2_product(sub(before, simd.finite_or_zero(top)), scale, floor)
            store(maximum, top)
            store(w.factor + 2 * g * register, factor)
        for g in range(groups):
            s = w.s + g * together * row_keys * size
            maximum, total = state + 2 * g * register, state + (2 * g + 1) * register
            zero_point = simd.finite_or_zero(load(maximum))
            fresh = splat(dtype(0))
            for t in range(s, s + keys * together * size, register):
                x = exp2_product(sub(load(t), zero_point), scale, floor)
                store(t, x)
                if pairs:
                    put_pairs(w.narrow + (t - w.s) // 2, x)
                fresh = add(fresh, x)
            store(total, fma(load(total), load(w.factor + 2 * g * register), fresh))

    @jit
    def round_weights(w, scales, keys, groups, together):
        """Weights times their values' scales -> whole numbers, and what one of them is worth."""
        zero = splat(dtype(0))
        largest, broken = zero, zero
        for j in range(0, keys, lanes):
            x = load(scales + j * size)
            largest = greater(simd.absolute(x), largest)
            broken = fma(x, zero, broken)
        # A power of two is taken out of the scales first: weights times scales may be too small for a number,
        # and whatever scale a hidden key has must not round others differently.
        spare = w.factor + register
        put(spare, max(dots.lowest_lane(simd.across_max(largest)), dtype(LEAST)))
        put_int32(spare, get_int32(spare) & 0x7F800000)
        unit = get(spare)
        inverse = splat(dtype(1) / unit)
        unit = unit / dtype(LARGEST_WEIGHT) + dots.lowest_lane(simd.across_sum(broken))
        for j in range(0, keys, lanes):
            store(scales + j * size, mul(load(scales + j * size), inverse))
        scale_by(scales, w.s, keys, groups, together)
        for g in range(groups):
            s, t = w.s + g * together * row_keys * size, w.narrow + g * together * row_keys * 2
            end = s + keys * together * size
            top = splat(dtype(LEAST))
            for a in range(s, end, register):
                top = greater(simd.absolute(load(a)), top)
            top = top_of_rows(top, together)
            store(w.factor + (2 * g + 1) * register, mul(top, splat(unit)))
            factor = simd.div(splat(dtype(LARGEST_WEIGHT)), top)
            for a in range(s, end, register):
                put_half(t + (a - s) // 2, mul(load(a), factor))

    return scale_by, soften, round_weights
