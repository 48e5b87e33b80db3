"""What a cache knows a call by that it has seen before."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import device

_PLAIN = frozenset((bool, int, float, type(None)))


def call_layout(query: Any, options: tuple[Any, ...], return_lse: Any, is_on_gpu: bool) -> Any:
    """Everything but the query's numbers that decides how a call goes, as a key; None where it cannot be."""
    mask, bias, is_causal, window, scale, softcap, slopes, sinks = options
    if mask is not None or bias is not None or (type(query) is np.ndarray) == is_on_gpu:
        return None
    if is_on_gpu:
        layout = device.layout(query)
        if layout is None:
            return None
    else:
        layout = (query.shape, query.strides, query.dtype, query.flags.aligned)
    if is_causal is True and return_lse is False and window is scale is softcap is slopes is sinks is None:
        return layout
    sides: Any = () if window is None else window
    if type(sides) not in (tuple, list):
        return None
    numbers: tuple[Any, ...] = (window is None, is_causal, scale, softcap, return_lse, *sides)
    types = tuple(map(type, numbers))  # True is no 1
    if not _PLAIN.issuperset(types):
        numbers = tuple(
            x.item() if isinstance(x, np.generic) and x.dtype.kind in "biuf" else x for x in numbers
        )
        types = tuple(map(type, numbers))
        if not _PLAIN.issuperset(types):
            return None
    heads: tuple[Any, ...] = ()
    for x in (slopes, sinks):
        if x is not None:
            if type(x) is not np.ndarray or x.nbytes > 4096:
                return None
            heads += (x.dtype, x.shape, x.tobytes())
        else:
            heads += (None,)
    return layout, numbers, types, heads
