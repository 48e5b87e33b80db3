"""Additive attention as its formula, the hidden units of one head at a time in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..additive import AdditiveProblem
from ..problem import Problem
from .attention import _attend, _visible


def forward(
    problem: AdditiveProblem, out: NDArray[Any], lse: NDArray[Any] | None, weights: NDArray[Any] | None
) -> None:
    """Write attention to `out` (B, Hq, Sq, Dv), and where wanted `lse` (B, Hq, Sq) and `weights`."""
    with np.errstate(all="ignore"):
        for b in range(problem.attention.batch):
            results = attend(problem.attention, b, _scores(problem, b))
            for result, target in zip(results, (out, weights, lse), strict=True):
                if target is not None:
                    target[b] = result


def attend(p: Problem, b: int, scores: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Output, weights and lse of sequence b from its scores (Hq, Sq, Sk)."""
    heads, kv_heads = p.query.shape[1], p.key.shape[1]
    value = p.value[b, np.arange(heads) * kv_heads // max(heads, 1)]
    return _attend(p, scores, _visible(p, b, p.max_queries, p.max_keys), value)


def _scores(problem: AdditiveProblem, b: int) -> NDArray[Any]:
    query, key = problem.attention.query[b], problem.attention.key[b]
    if problem.w_query is not None:
        query = query @ problem.w_query.swapaxes(1, 2)  # (Hq, Sq, A)
    if problem.w_key is not None:
        key = key @ problem.w_key.swapaxes(1, 2)  # (Hkv, Sk, A)
    if problem.bias is not None:
        query = query + problem.bias[:, None]
    scores = np.empty((len(query), query.shape[1], key.shape[1]), query.dtype)
    for h in range(len(query)):
        hidden = query[h, :, None] + key[h * len(key) // len(query)]  # (Sq, Sk, A)
        scores[h] = (np.tanh(hidden) * problem.v[h]).sum(axis=2)
    return scores
