"""Luong's attention as its formulas, one sequence at a time, every score of it in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..luong import LuongProblem
from .additive import attend, for_each_head, hidden_scores
from .attention import visible, weighted_sum


def forward(
    problem: LuongProblem, out: NDArray[Any], lse: NDArray[Any] | None, weights: NDArray[Any] | None
) -> None:
    """Write attention to `out` (B, Hq, Sq, Dv), and where wanted `lse` (B, Hq, Sq) and `weights`."""
    p = problem.attention
    with np.errstate(all="ignore"):
        for b in range(p.batch):
            seen = visible(p, b, p.max_queries, p.max_keys)
            scores = _scores(problem, b)
            if problem.position is None:
                results = attend(p, b, scores, seen)
            else:
                width, w, v = problem.position
                center = positions(p.query[b] @ w.T, v, p.key_lengths[b])
                distance = np.arange(p.max_keys).astype(p.compute) - center[..., None]  # (Hq, Sq, Sk)
                # A position that is NaN is near to all keys, so that the NaN shows.
                seen &= ~(np.abs(distance) > width)
                _, shares, sums = attend(p, b, scores, seen)
                shares = np.where(seen, shares * np.exp(-2 * (distance / width) ** 2), 0)
                results = weighted_sum(shares, for_each_head(p, p.value[b]), seen), shares, sums
            for result, target in zip(results, (out, weights, lse), strict=True):
                if target is not None:
                    target[b] = result


def positions(hidden: NDArray[Any], v: NDArray[Any], length: Any) -> NDArray[Any]:
    """The predicted positions of queries whose hidden units before the tanh are (..., P)."""
    x = (np.tanh(hidden) * v).sum(axis=-1)
    return np.asarray(length, hidden.dtype) / (1 + np.exp(-x))


def _scores(problem: LuongProblem, b: int) -> NDArray[Any]:
    """The scores before the masks, (Hq, Sq, Sk)."""
    p, weight = problem.attention, problem.weight
    query, key = p.query[b], for_each_head(p, p.key[b])
    if weight is None:
        return query @ key.swapaxes(1, 2)
    if problem.v is None:
        return (
            query @ weight[: p.max_keys].T
            if problem.score == "location"
            else query @ weight @ key.swapaxes(1, 2)
        )
    columns = query.shape[2]
    v = np.broadcast_to(problem.v, (len(query), len(problem.v)))
    return hidden_scores(query @ weight[:, :columns].T, key @ weight[:, columns:].T, v)
