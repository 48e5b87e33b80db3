"""What happens to the scores of few queries between the product and the softmax, number by number.

Scores lie as `dots` leaves them: a vector holds some query rows with a run of keys each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from ..problem import STORAGE_DTYPES
from . import emitters, simd
from .masks import get_byte


def build(jit: Any, storage: str, filled: Any, row_keys: int) -> tuple[Any, Any, Any]:
    """The compiled functions ``adjust``, which turns raw products into scores, ``visible(p, w, r, j)``,
    whether row r sees key j, and ``place(s, r, j, together)``, where its score lies.

    `p` is the call's parameters, `w` a thread's `chunks.Scratch`. A row has room for `row_keys` scores.
    """
    dtype: Any = np.float64 if storage == "float64" else np.float32
    size = np.dtype(dtype).itemsize
    lanes = simd.lanes(dtype)
    register = emitters.REGISTER_BYTES
    infinity = dtype(np.inf)
    load, store, get, put = simd.loads("float64" if size == 8 else "float32")
    get_int, _ = simd.scalars(types.int64)
    mul, fma, sub, splat = simd.mul, simd.fma, simd.sub, simd.splat

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
        return s + (r // together * together * row_keys + lane) * size

    @jit
    def adjust(p, w, start, k0, keys, groups, together, all_first, all_last):
        """Scale, softcap, bias, ALiBi, masks; hide keys that a row does not see, and what pads the tile."""
        padding = filled(keys)
        rows = groups * together
        if not p.plain:
            inner = p.scale / p.softcap if p.softcap != 0 else p.scale
            factor, cap = splat(dtype(inner)), splat(dtype(p.softcap))
            run = lanes // together
            for g in range(groups):
                slope, back = load(w.slope + g * register), load(w.back + g * register)
                for j in range(0, padding, run):
                    t = w.s + (g * together * row_keys + j * together) * size
                    x = mul(load(t), factor)
                    if p.softcap != 0:
                        x = mul(cap, simd.tanh(x))
                    if p.bias == 0 and p.alibi_slopes != 0:
                        x = fma(slope, sub(splat(dtype(k0 + j - start)), back), x)
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
                        y = get(t) + x + slope * (dtype(k0 + j - start) - position)
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

    return adjust, visible, place
