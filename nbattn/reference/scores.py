"""The user's functions as they are written, over grids of indices, or number by number where that fails."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..problem import Mod
from ..scores import GIVES, is_number


def modified(mod: Mod, b: int, scores: NDArray[Any]) -> NDArray[Any]:
    """The scores (H, n, m) of sequence b, in their dtype, after a score_mod."""
    return _evaluate(mod, scores.shape, scores.dtype, b, scores)


def seen_by(mod: Mod, b: int, shape: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Which key each query of sequence b may attend to by a mask_mod, (H, n, m)."""
    return _evaluate(mod, shape, np.dtype(np.bool_), b)


def _evaluate(
    mod: Mod, shape: tuple[int, ...], dtype: np.dtype[Any], b: int, *scores: NDArray[Any]
) -> NDArray[Any]:
    if 0 in shape:
        return np.empty(shape, dtype)
    head, q_index, kv_index = np.ogrid[tuple(slice(n) for n in shape)]
    first = _at(mod, (0, 0, 0), b, scores)
    if not is_number(first, mod.name):
        what = "an array" if isinstance(first, np.ndarray) else type(first).__name__
        msg = f"{mod.label} returns {what}; expected {GIVES[mod.name]}"
        raise TypeError(msg)
    arguments = _arguments(mod)
    try:
        grids = (np.int64(b), head.copy(), q_index.copy(), kv_index.copy())
        result = mod.function(*(x.copy() for x in scores), *grids, *arguments)
        return np.broadcast_to(result, shape).astype(dtype)
    except Exception:
        # An if, or a function of math: no grid can take both ways.
        result = np.empty(shape, dtype)
        for place in np.ndindex(*shape):
            result[place] = _at(mod, place, b, scores)
        return result


def _arguments(mod: Mod) -> tuple[Any, ...]:
    """Those of the function; a Python bool is NumPy's, of which ~ is the contrary."""
    return tuple(np.bool_(x) if isinstance(x, bool) else x for x in mod.arguments)


def _at(mod: Mod, place: tuple[int, ...], b: int, scores: tuple[NDArray[Any], ...]) -> Any:
    """The function at one (head, query, key)."""
    indices, arguments = (np.int64(i) for i in (b, *place)), _arguments(mod)
    try:
        return mod.function(*(x[place] for x in scores), *indices, *arguments)
    except Exception as error:
        msg = f"{mod.label} fails with {type(error).__name__}: {error}"
        raise ValueError(msg) from error
