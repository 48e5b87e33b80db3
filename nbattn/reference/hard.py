"""Hard attention as its formula, one sequence at a time, every score of it in memory.

float16 and bfloat16 compute in float32. Shapes: H query heads, n queries, m keys.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..problem import Problem
from .attention import masked_scores


def forward(
    problem: Problem,
    out: NDArray[Any],
    index: NDArray[np.int64],
    uniforms: NDArray[np.float64] | None,
) -> None:
    """Write the selected keys to `index` (B, Hq, Sq) and their values to `out` (B, Hq, Sq, Dv).

    With `uniforms` (B, Hq, Sq) keys are sampled by them, else they are those of the largest scores.
    """
    heads, kv_heads, keys = problem.query.shape[1], *problem.key.shape[1:3]
    head = np.arange(heads)[:, None] * kv_heads // max(heads, 1)
    with np.errstate(all="ignore"):
        for b in range(problem.batch if keys else 0):
            scores = masked_scores(problem, b)
            index[b] = _largest(scores) if uniforms is None else _sample(scores, uniforms[b])
            out[b] = problem.value[b][head, index[b]]
    if not keys:
        index[...] = -1
    out[index < 0] = 0


def _largest(scores: NDArray[Any]) -> NDArray[np.int64]:
    """The first of the largest scores (H, n, m), or of the NaN; -1 where all are -inf."""
    return np.where((scores == -np.inf).all(axis=2), -1, scores.argmax(axis=2))


def _sample(scores: NDArray[Any], uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
    """The first key up to which the weights sum to more than `uniforms` (H, n) of their total.

    Where the largest score is no finite number, its key.
    """
    index = _largest(scores)
    largest = scores.max(axis=2)
    weights = np.exp(scores - largest[:, :, None])
    sums = weights.cumsum(axis=2)
    passed = sums > uniforms[:, :, None] * sums[:, :, -1:]
    # Rounding may keep the sum from passing.
    last = weights.shape[2] - 1 - (weights[:, :, ::-1] > 0).argmax(axis=2)
    sampled = np.where(passed.any(axis=2), passed.argmax(axis=2), last)
    return np.where(np.isfinite(largest), sampled, index)
