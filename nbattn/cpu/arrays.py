"""NumPy's arrays as native code sees them: where an object keeps its type, data, shape, strides and dtype.

Python takes a microsecond and a half to ask three arrays for these and to look them up, native code a few
cycles. The places are those of NumPy's C interface, which extensions are compiled against; they are tried out
on an array, and where something else lies there nobody looks.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from . import runtime, simd

TYPE, DATA, NDIM, SHAPE, STRIDES, DTYPE = (runtime.DATA + n for n in (-8, 0, 8, 16, 24, 40))
"""Where they lie in an object; all are words of 8 bytes but the number of dimensions, which has 4."""


def _are_known() -> bool:
    if not runtime.IS_DIRECT or ctypes.sizeof(ctypes.c_void_p) != 8:
        return False
    x = np.empty((2, 6, 5), np.int16)[:, ::2]
    word = ctypes.c_ssize_t.from_address
    head = word(id(x) + TYPE).value, ctypes.c_int.from_address(id(x) + NDIM).value, word(id(x) + DTYPE).value
    if head != (id(np.ndarray), 3, id(x.dtype)):
        return False
    shape, strides = ((ctypes.c_ssize_t * 3).from_address(word(id(x) + n).value) for n in (SHAPE, STRIDES))
    return (tuple(shape), tuple(strides)) == (x.shape, x.strides)


KNOWN = _are_known()
"""Whether arrays are kept so."""


def layout(array: NDArray[Any]) -> list[int]:
    """The words that `laid_so` compares; the dtype must stay alive."""
    return [id(np.ndarray), id(array.dtype), array.ndim, *array.shape, *array.strides]


def build(jit: Any) -> Any:
    """The compiled function ``laid_so(x, words)``: whether an object's address is one of such an array."""
    get, get_int = simd.scalars(types.int64)[0], simd.scalars(types.int32)[0]

    @jit
    def laid_so(x, words):
        if get(x + TYPE) != get(words):
            return False
        ndim = get(words + 16)
        if get(x + DTYPE) != get(words + 8) or get_int(x + NDIM) != ndim:
            return False
        shape, strides = get(x + SHAPE), get(x + STRIDES)
        for i in range(0, 8 * ndim, 8):
            if get(shape + i) != get(words + 24 + i) or get(strides + i) != get(words + 24 + 8 * ndim + i):
                return False
        return True

    return laid_so
