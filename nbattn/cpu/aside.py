"""Values that are not finite: left out of a tile's sums, and added to those rows alone that see them.

A weight of 0 times such a value is NaN, so that masked ones would show. They are looked for in the sums of a
chunk, and only where there is one the chunk is done again with these functions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types

from . import dots, emitters, kinds, simd
from .masks import get_byte


class Aside(NamedTuple):
    """The compiled functions of this file; `p` is the call's parameters, `w` a thread's `chunks.Scratch`."""

    all_finite: Any
    """``all_finite(p, state, groups, together)``: whether every sum is."""
    set_aside: Any
    """``set_aside(p, w, table, scales, keys)``, of a tile's values."""
    add_visible: Any
    """``add_visible(p, w, state, table, k0, keys, groups, together)``: what was set aside, to its rows."""
    by_parity: Any
    """``by_parity(p, state, groups, together)``: order columns as reading even and odd ones would have."""


def build(jit: Any, storage: str, padded: Any, widen: Any, visible: Any, place: Any) -> Aside:
    """The functions for one storage dtype."""
    dtype: Any = np.float64 if storage == "float64" else np.float32
    number = types.float64 if storage == "float64" else types.float32
    size = np.dtype(dtype).itemsize
    int8 = storage == "int8"
    lanes = simd.lanes(dtype)
    register = emitters.REGISTER_BYTES
    kind = kinds.read_as(storage)
    pairs, whole, in_fours = kind == "pairs", kinds.is_whole(kind), kinds.in_fours(kind)
    as_stored = storage in ("float32", "float64")
    value_unit = kinds.value_unit(kind) * lanes
    load, _, get, put = simd.loads("float64" if size == 8 else "float32")
    put_pair = simd.loads("bfloat16")[3]
    get_int, put_int = simd.scalars(types.int64)
    splat = simd.splat
    parity1 = kinds.copy_runs(number, lanes, storage)

    @jit
    def finite(x):
        return x - x == 0

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
    def hide_scales(w, scales, keys):
        """Set the scales of a tile's values aside, and 1 in place of those that are not finite."""
        for j in range(keys):
            x = get(scales + j * size)
            put(w.aside + j * size, x)
            if not finite(x):
                put(scales + j * size, dtype(1))

    @jit
    def set_aside(p, w, table, scales, keys):
        """Copy a tile's values without what is not finite to where keys were, as its weights take them; the
        stored ones are widened aside.
        """
        if whole and p.value_dim % value_unit == 0:
            hide_scales(w, scales, keys)
            return
        width = padded(p.value_dim) * size
        if not as_stored or p.value_dim % lanes != 0:
            widen(table, scales, keys, p.value_dim, w.aside)
            for j in range(keys):
                put_int(table + 8 * j, w.aside + j * width)
        for j in range(keys):
            a, t = get_int(table + 8 * j), w.wide + j * width
            if int8 and not finite(get(scales + j * size)):
                for c in range(0, width, size):
                    put(a + c, get(a + c) * get(scales + j * size))
                put(scales + j * size, dtype(1))
            as_pairs = pairs and p.value_dim % value_unit == 0
            for c in range(0, width, size):
                y = get(a + c)
                y = y if finite(y) else dtype(0)
                if as_pairs:
                    put_pair(t + c // 2, y)
                else:
                    put(t + c, y)

    @jit
    def four_at(c):
        """Where the sum of column c lies if columns lie in fours."""
        return c // value_unit * value_unit + c % 8 // 4 * lanes + c % value_unit // 8 * 4 + c % 4

    @jit
    def add_visible(p, w, state, table, k0, keys, groups, together):
        """Add what was set aside to the rows that see it."""
        width = padded(p.value_dim) * size
        o = state + 2 * groups * register
        fours = in_fours and p.value_dim % value_unit == 0
        for j in range(keys):
            a = get_int(table + 8 * j)
            if whole and fours and finite(get(w.aside + j * size)):
                continue
            for c in range(p.value_dim):
                y = get(w.aside + j * size) * dtype(get_byte(a + c)) if whole and fours else get(a + c * size)
                if finite(y):
                    continue
                for r in range(groups * together):
                    if visible(p, w, r, k0 + j):
                        t = o + r * width + (four_at(c) if fours else c) * size
                        put(t, get(t) + get(place(w.s, r, j, together)) * y)

    @jit
    def by_parity(p, state, groups, together):
        """Order columns as reading even and odd ones would have."""
        o = state + 2 * groups * register
        for t in range(o, o + groups * together * p.value_dim * size, 2 * register):
            parity1(t, t)

    return Aside(all_finite, set_aside, add_visible, by_parity)
