"""Softmax and its relatives as their formulas.

All take `x` (outer, n, inner) and reduce over n, write `out`, and leave out what `where` (the same shape, or
None) says is not there. float16 and bfloat16 compute in float32. `fresh` says that `out` is new memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def softmax(
    x: NDArray[Any], where: NDArray[np.bool_] | None, scale: float, out: NDArray[Any], *, fresh: bool
) -> None:
    """Write exp(scale * x) / sum(exp(scale * x)) to `out` (outer, n, inner), 0 where `where` is False."""
    with np.errstate(all="ignore"):
        scores, kept = _scores(x, where, scale)
        largest = scores.max(axis=1, keepdims=True, initial=-np.inf)
        exponentials = np.where(kept, np.exp(scores - largest), 0)
        out[...] = np.where(kept, exponentials / exponentials.sum(axis=1, keepdims=True), 0)


def log_softmax(
    x: NDArray[Any], where: NDArray[np.bool_] | None, scale: float, out: NDArray[Any], *, fresh: bool
) -> None:
    """Write scale * x - log(sum(exp(scale * x))) to `out` (outer, n, inner), -inf where `where` is False."""
    with np.errstate(all="ignore"):
        scores, kept = _scores(x, where, scale)
        shifted = scores - _finite_largest(scores)[:, None]
        total = np.where(kept, np.exp(shifted), 0).sum(axis=1, keepdims=True)
        out[...] = np.where(kept, shifted - np.log(total), -np.inf)


def logsumexp(x: NDArray[Any], where: NDArray[np.bool_] | None, scale: float, out: NDArray[Any]) -> None:
    """Write log(sum(exp(scale * x))) to `out` (outer, inner), -inf where nothing is left."""
    with np.errstate(all="ignore"):
        scores, kept = _scores(x, where, scale)
        largest = _finite_largest(scores)
        total = np.where(kept, np.exp(scores - largest[:, None]), 0).sum(axis=1)
        out[...] = largest + np.log(total)


def _scores(
    x: NDArray[Any], where: NDArray[np.bool_] | None, scale: float
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """``scale * x`` in the compute dtype with -inf for what is left out, and which entries are kept."""
    compute = np.float64 if x.dtype == np.float64 else np.float32
    kept = np.ones(x.shape, bool) if where is None else where
    return np.where(kept, np.multiply(x, scale, dtype=compute), compute(-np.inf)), kept


def _finite_largest(scores: NDArray[Any]) -> NDArray[Any]:
    """The maximum over n, or 0 where it is infinite or NaN, so that inf - inf makes no NaN of its own."""
    largest = scores.max(axis=1, initial=-np.inf)
    return np.where(np.isfinite(largest), largest, 0).astype(scores.dtype)
