"""Hard attention on explicit vectors: one key for each query, by the scores of `queries` alone.

The lanes are queries, as in `blocks`: a row's largest score goes down its lane, and a tile of scores is
searched for where that lies only if it has grown in one of the lanes. No value is multiplied: the selected
rows are copied when a block is done.

A sample takes two passes over the keys, as its scores are not kept: the first leaves the maximum and the
total of the weights, in the second they add up until they pass the row's share of the total.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from ..problem import STORAGE_DTYPES, Problem
from . import attention, emitters, layout, queries, runtime, simd
from .masks import NOTHING
from .panels import KEYS
from .tiles import ROW_BYTES

LARGEST, CHOICE, SECOND_CHOICE = range(3)
"""What a pass over the keys is for."""


def forward(
    problem: Problem,
    out: NDArray[Any],
    index: NDArray[np.int64],
    uniforms: NDArray[np.float64] | None,
) -> None:
    """Write the selected keys to `index` (B, Hq, Sq) and their values to `out` (B, Hq, Sq, Dv).

    With `uniforms` (B, Hq, Sq) keys are sampled by them, else they are those of the largest scores.
    """
    attention.run_tiled(kernel(f"hard-{problem.storage}"), problem, out, index=index, uniforms=uniforms)


def kernel_names(dtypes: Sequence[str]) -> list[str]:
    """The kernels that calls with these dtypes need."""
    return [f"hard-{dtype}" for dtype in dtypes if dtype in STORAGE_DTYPES]


def kernel(name: str) -> Any:
    """The compiled kernel of this name: "hard-" and the storage dtype."""
    return runtime.compiled(name, partial(build, name.partition("-")[2]))


def build(storage: str, jit: Any, inline: Any) -> Callable[[Any], Any]:
    """The kernel for arrays of one storage dtype, as a function of its parameters' address."""
    form = layout.form(storage, False)
    dtype: Any = form.dtype
    size, stored, lanes, split = form.size, form.stored, form.lanes, form.split
    register = emitters.REGISTER_BYTES
    infinity = dtype(np.inf)
    below_one = dtype(1 - 4 * np.finfo(dtype).eps)

    parts = queries.build(form, jit, inline)
    find, set_up, transpose_queries, panel = parts.find, parts.set_up, parts.transpose_queries, parts.panel
    score, mend_scores, look, adjust = parts.score, parts.mend_scores, parts.look, parts.adjust
    load, store, get, put = simd.loads("float64" if size == 8 else "float32")
    get_int, put_int = simd.scalars(types.int64)
    get_double = simd.scalars(types.float64)[0]
    get_index, put_index = simd.scalars(types.int64 if size == 8 else types.int32)
    get_bits, put_bits = simd.scalars({2: types.int16, 4: types.int32, 8: types.int64}[stored])
    integer = np.int64 if size == 8 else np.int32
    sub, add, greater, splat = simd.sub, simd.add, simd.greater, simd.splat
    exp2_product = simd.exp2_product
    lowest = emitters.exp2_floor(dtype)

    @jit
    def rise(w, key0, keys, vectors):
        """Move the rows' largest scores and their keys; whether no score of the tile is NaN."""
        ordered = True
        for v in range(vectors):
            c = w.s + v * register
            before = load(w.maximum + v * register)
            top = other = splat(-infinity)
            ones = splat(dtype(1))
            for j in range(0, keys - 1, 2):
                x, y = load(c + j * ROW_BYTES), load(c + (j + 1) * ROW_BYTES)
                top, other, ones = greater(x, top), greater(y, other), simd.nan_if_unordered(x, y, ones)
            if keys % 2 == 1:
                x = load(c + (keys - 1) * ROW_BYTES)
                top, ones = greater(x, top), simd.nan_if_unordered(x, x, ones)
            top = greater(top, other)
            ordered &= simd.all_ones(ones)
            store(w.rescale + v * register, before)
            if simd.any_above(top, before):
                # From the last key to the first, which stays where several are the largest.
                here, first = splat(dtype(keys - 1)), splat(dtype(0))
                for j in range(keys - 1, -1, -1):
                    first = simd.if_equal(load(c + j * ROW_BYTES), top, here, first)
                    here = sub(here, splat(dtype(1)))
                simd.put_where_above(w.selected + v * register, top, before, first, key0)
                store(w.maximum + v * register, greater(top, before))
        return ordered

    @jit
    def rise_to_nan(w, key0, keys, rows):
        """After `rise`, a row's first NaN becomes its largest score, which nothing is above."""
        for r in range(rows):
            for j in range(keys if get(w.maximum + r * size) == get(w.maximum + r * size) else 0):
                x = get(w.s + j * ROW_BYTES + r * size)
                if x != x:
                    put(w.maximum + r * size, x)
                    put_index(w.selected + r * size, integer(key0 + j))
                    break

    @jit
    def add_weights(p, w, keys, vectors):
        """Move the totals of the weights after `rise`, which has left the maxima before."""
        scale, floor = splat(dtype(p.log2_scale)), splat(dtype(lowest / p.log2_scale))
        for v in range(vectors):
            c = w.s + v * register
            top = simd.finite_or_zero(load(w.maximum + v * register))
            rescale = exp2_product(sub(load(w.rescale + v * register), top), scale, floor)
            even = odd = splat(dtype(0))
            for j in range(0, keys - 1, 2):
                even = add(even, exp2_product(sub(load(c + j * ROW_BYTES), top), scale, floor))
                odd = add(odd, exp2_product(sub(load(c + (j + 1) * ROW_BYTES), top), scale, floor))
            if keys % 2 == 1:
                even = add(even, exp2_product(sub(load(c + (keys - 1) * ROW_BYTES), top), scale, floor))
            total = w.total + v * register
            store(total, simd.fma(load(total), rescale, add(even, odd)))

    @jit
    def aim(p, w, b, unit, row0, rows, queries):
        """What the weights must pass: the totals become shares of them, the sums start at 0.

        Where the largest score is no finite number, weights mean nothing and its key stays.
        """
        for r in range(rows):
            place = (b * p.units + unit) * p.packed_heads * queries + row0 + r
            top = get(w.maximum + r * size)
            if top - top == 0:
                put(w.total + r * size, dtype(get_double(p.uniforms + 8 * place) * get(w.total + r * size)))
                put_index(w.selected + r * size, integer(-1))
            else:
                put(w.total + r * size, infinity)
            put(w.rescale + r * size, dtype(0))
        for r in range(rows, (rows + lanes - 1) // lanes * lanes):
            put(w.total + r * size, infinity)

    @jit
    def aim_again(w, rows):
        """Where rounding has kept the sum from passing, aim a little below it; whether that was so."""
        again = False
        for r in range(rows):
            passed = get(w.total + r * size) == infinity
            if not passed:
                put(w.total + r * size, get(w.rescale + r * size) * below_one)
                again = True
            put(w.rescale + r * size, dtype(0))
        return again

    @jit
    def choose(p, w, key0, keys, vectors):
        """Add up the weights of a tile; where they pass the aim, it moves to inf."""
        scale, floor = splat(dtype(p.log2_scale)), splat(dtype(lowest / p.log2_scale))
        one, zero = splat(dtype(1)), splat(dtype(0))
        for v in range(vectors):
            c = w.s + v * register
            top, before = load(w.maximum + v * register), load(w.rescale + v * register)
            top = simd.finite_or_zero(top)
            aim = load(w.total + v * register)
            # At least 0, so that no key of weight 0 is passed at.
            left = greater(sub(aim, before), zero)
            total = count = zero
            for j in range(keys):
                total = add(total, exp2_product(sub(load(c + j * ROW_BYTES), top), scale, floor))
                count = add(count, simd.if_at_most(total, left, one, zero))
            simd.put_where_above(w.selected + v * register, total, left, count, key0)
            store(w.total + v * register, simd.if_at_most(total, left, aim, splat(infinity)))
            store(w.rescale + v * register, add(before, total))

    @jit
    def finish(p, w, b, unit, row0, rows, queries, value):
        """Write the index, and the values that it selects."""
        for r in range(rows):
            place = (b * p.units + unit) * p.packed_heads * queries + row0 + r
            j = get_index(w.selected + r * size)
            put_int(p.index + 8 * place, j)
            a, out = value + j * p.value_s * stored, get_int(w.outs + 8 * r)
            for c in range(0, p.value_bytes, stored):
                put_bits(out + c, get_bits(a + c) if j >= 0 else 0)

    @inline
    def block(p, w, b, unit, number):
        start, queries, row0, rows, vectors, head, key, value, length = find(p, b, unit, number)
        stage, careful = LARGEST, False
        while True:
            if stage == LARGEST:
                any_first, any_last, all_first, all_last = set_up(p, w, b, unit, row0, rows, queries, start)
                transpose_queries(p, w, vectors)
                for r in range(vectors * lanes):
                    put_index(w.selected + r * size, integer(-1))
            ordered = True
            key0 = any_first
            while key0 < any_last:
                seen, keys = look(p, w, key0, any_last, vectors * lanes)
                if seen == NOTHING:
                    key0 += keys
                    continue
                converted = panel(p, w, head, key0 // KEYS, key, value, length) if p.slots > 0 else 0
                score(p, w, key, converted, key0, keys, vectors)
                if split and careful:
                    mend_scores(p, w, key, key0, keys, rows)
                adjust(p, w, key0, keys, rows, vectors, all_first, all_last, seen, careful)
                if stage != LARGEST:
                    choose(p, w, key0, keys, vectors)
                else:
                    ordered = rise(w, key0, keys, vectors)
                    if not ordered:
                        if not careful:
                            break
                        rise_to_nan(w, key0, keys, rows)
                    if p.uniforms != 0:
                        add_weights(p, w, keys, vectors)
                key0 += keys
            if stage == LARGEST and not careful and not ordered:
                # A NaN may be what a bias of -inf or a split of inf has left: seen or not, with care.
                careful = True
                continue
            if stage == LARGEST and p.uniforms != 0:
                aim(p, w, b, unit, row0, rows, queries)
                stage = CHOICE
                continue
            if stage == CHOICE and aim_again(w, rows):
                stage = SECOND_CHOICE
                continue
            finish(p, w, b, unit, row0, rows, queries, value)
            return

    return parts.kernel(block)
