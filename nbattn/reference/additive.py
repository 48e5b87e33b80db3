"""Additive attention as its formula, the hidden units of one head at a time in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..additive import AdditiveProblem
from ..problem import Problem
from .attention import visible, weigh


def forward(
    problem: AdditiveProblem, out: NDArray[Any], lse: NDArray[Any] | None, weights: NDArray[Any] | None
) -> None:
    """Write attention to `out` (B, Hq, Sq, Dv), and where wanted `lse` (B, Hq, Sq) and `weights`."""
    p = problem.attention
    with np.errstate(all="ignore"):
        for b in range(p.batch):
            query, key = p.query[b], p.key[b]
            if problem.w_query is not None:
                query = query @ problem.w_query.swapaxes(1, 2)  # (Hq, Sq, A)
            if problem.w_key is not None:
                key = key @ problem.w_key.swapaxes(1, 2)  # (Hkv, Sk, A)
            if problem.bias is not None:
                query = query + problem.bias[:, None]
            scores = hidden_scores(query, for_each_head(p, key), problem.v)
            results = attend(p, b, scores, visible(p, b, p.max_queries, p.max_keys))
            for result, target in zip(results, (out, weights, lse), strict=True):
                if target is not None:
                    target[b] = result


def attend(
    p: Problem, b: int, scores: NDArray[Any], seen: NDArray[np.bool_]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Output, weights and lse of sequence b from its scores (Hq, Sq, Sk)."""
    return weigh(p, scores, seen, for_each_head(p, p.value[b]))


def for_each_head(p: Problem, x: NDArray[Any]) -> NDArray[Any]:
    """Keys or values (Hkv, Sk, D) as (Hq, Sk, D)."""
    heads = p.query.shape[1]
    return x[np.arange(heads) * len(x) // max(heads, 1)]


def hidden_scores(query: NDArray[Any], key: NDArray[Any], v: NDArray[Any]) -> NDArray[Any]:
    """``v . tanh(q + k)`` of projected queries (Hq, Sq, A) and keys (Hq, Sk, A), with v (Hq, A)."""
    scores = np.empty((*query.shape[:2], key.shape[1]), query.dtype)
    for h in range(len(query)):
        scores[h] = (np.tanh(query[h, :, None] + key[h]) * v[h]).sum(axis=2)
    return scores
