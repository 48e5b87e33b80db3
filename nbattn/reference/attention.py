"""Attention as its formula, one sequence at a time, every score of it in memory.

float16 and bfloat16 compute in float32. Shapes: H query heads, n queries, m keys.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..problem import Problem
from . import masks
from .scores import modified, seen_by


def forward(
    problem: Problem, out: NDArray[Any], lse: NDArray[Any] | None, weights: NDArray[Any] | None
) -> None:
    """Write attention to `out` (B, Hq, Sq, Dv), and where wanted `lse` (B, Hq, Sq) and zero-filled `weights`.

    A packed problem has a batch axis of length 1 in `out` and `lse`, and its sequences along their Sq axis.
    """
    # Overflow to inf and NaN from inf - inf are results here, not accidents.
    with np.errstate(all="ignore"):
        for b in range(problem.batch):
            row, queries, keys = _place(problem, b)
            query, key, value = _operands(problem, row, queries, keys)
            n, m = query.shape[1], key.shape[1]
            seen = visible(problem, b, n, m)
            scores = _scores(problem, b, query, key)
            if problem.score_mod is not None:
                seen &= scores != -np.inf
            output, row_weights, row_lse = weigh(problem, scores, seen, value)
            out[row, :, queries] = output
            if lse is not None:
                lse[row, :, queries] = row_lse
            if weights is not None:
                weights[b, :, :n, :m] = row_weights


def masked_scores(problem: Problem, b: int) -> NDArray[Any]:
    """The scores of sequence b (H, n, m), -inf where a query does not see the key."""
    query, key, _ = _operands(problem, *_place(problem, b))
    seen = visible(problem, b, query.shape[1], key.shape[1])
    return np.where(seen, _scores(problem, b, query, key), -np.inf)


def merge_states(outputs: NDArray[Any], lses: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Merge along axis 0: the mean of the partial `outputs` (N, ..., Dv) weighted by exp(`lses`) (N, ...)."""
    compute = np.float64 if np.float64 in (outputs.dtype, lses.dtype) else np.float32
    with np.errstate(all="ignore"):
        states = lses.astype(compute)
        largest = _finite_shift(states.max(axis=0, initial=-np.inf))
        shares = np.exp(states - largest)
        total = shares.sum(axis=0)
        # An empty state counts for nothing, whatever its output holds.
        parts = np.where(states[..., None] == -np.inf, 0, shares[..., None] * outputs.astype(compute))
        output = parts.sum(axis=0) / np.where(total == 0, 1, total)[..., None]
        return output.astype(outputs.dtype), largest + np.log(total)


def _place(problem: Problem, b: int) -> tuple[int, slice, slice]:
    """Where sequence b lies: its index on the batch axis, its query rows, its key rows."""
    if problem.query_starts is None or problem.key_starts is None:
        return b, slice(None), slice(None)
    return 0, slice(*problem.query_starts[b : b + 2]), slice(*problem.key_starts[b : b + 2])


def _operands(
    problem: Problem, row: int, queries: slice, keys: slice
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """One sequence's query (H, n, D), key (H, m, D) and value (H, m, Dv), key heads repeated for groups."""
    heads, kv_heads = problem.query.shape[1], problem.key.shape[1]
    kv_head = np.arange(heads) * kv_heads // max(heads, 1)
    operands = (
        problem.query[row, :, queries],
        problem.key[row, kv_head, keys],
        problem.value[row, kv_head, keys],
    )
    query, key, value = (x.astype(problem.compute) for x in operands)
    if problem.bfloat16_products:
        return round_to_bfloat16(query), round_to_bfloat16(key), round_to_bfloat16(value)
    return query, key, value


def _distance(problem: Problem, b: int, n: int, m: int) -> NDArray[np.int64]:
    """Key position minus query position, (n, m)."""
    return np.arange(m) - (np.arange(n)[:, None] + problem.offset[b])


def visible(problem: Problem, b: int, n: int, m: int) -> NDArray[np.bool_]:
    """Which key each query may attend to, (H, n, m)."""
    distance = _distance(problem, b, n, m)
    seen = (distance >= -problem.left) & (distance <= problem.right) & (np.arange(m) < problem.key_lengths[b])
    seen = np.repeat(seen[None], problem.query.shape[1], axis=0)
    if problem.mask is not None:
        seen &= problem.mask[b, :, :n, :m] != 0
    if problem.blocks is not None:
        table, (_, _, queries, keys) = problem.blocks.table, problem.blocks.shape
        row = table[min(b, len(table) - 1), None]
        seen &= masks.dense(row, problem.blocks.words, (queries, keys))[0, :, :n, :m]
    if problem.bias is not None:
        seen &= problem.bias[b, :, :n, :m].astype(problem.compute) != -np.inf
    if problem.mask_mod is not None:
        seen &= seen_by(problem.mask_mod, b, seen.shape)
    return seen


def _scores(problem: Problem, b: int, query: NDArray[Any], key: NDArray[Any]) -> NDArray[Any]:
    """The scores before the masks, (H, n, m)."""
    n, m = query.shape[1], key.shape[1]
    scores = problem.compute(problem.scale) * (query @ key.swapaxes(1, 2))
    if problem.softcap:
        softcap = problem.compute(problem.softcap)
        scores = softcap * np.tanh(scores / softcap)
    if problem.bias is not None:
        scores = scores + problem.bias[b, :, :n, :m].astype(problem.compute)
    if problem.alibi_slopes is not None:
        distance = _distance(problem, b, n, m).astype(problem.compute)
        scores = scores + problem.alibi_slopes[:, None, None] * distance
    if problem.score_mod is not None:
        scores = modified(problem.score_mod, b, scores)
    return scores


def weigh(
    problem: Problem, scores: NDArray[Any], seen: NDArray[np.bool_], value: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Softmax over the keys that are seen, and the sink, applied to `value`: output, weights and lse."""
    scores = np.where(seen, scores, -np.inf)
    largest = scores.max(axis=2, initial=-np.inf)  # (H, n)
    if problem.sinks is not None:
        largest = np.maximum(largest, problem.sinks[:, None])
    largest = _finite_shift(largest)
    exponentials = np.where(seen, np.exp(scores - largest[:, :, None]), 0)
    total = exponentials.sum(axis=2)
    if problem.sinks is not None:
        total = total + np.exp(problem.sinks[:, None] - largest)
    # A row that sees nothing is 0 / 1.
    divisor = np.where(total == 0, 1, total)[:, :, None]
    factors = round_to_bfloat16(exponentials) if problem.bfloat16_products else exponentials
    weights = np.where(seen, exponentials / divisor, 0)
    return weighted_sum(factors, value, seen) / divisor, weights, largest + np.log(total)


def weighted_sum(factors: NDArray[Any], value: NDArray[Any], seen: NDArray[np.bool_]) -> NDArray[Any]:
    """``factors @ value``, where a NaN or inf reaches only the rows that see its key (0 * NaN is NaN)."""
    finite = np.isfinite(value)
    total = factors @ np.where(finite, value, 0)
    for head, j in np.argwhere(~finite.all(axis=2)):
        rows = seen[head, :, j]
        total[head, rows] += factors[head, rows, j, None] * np.where(finite[head, j], 0, value[head, j])
    return total


def _finite_shift(largest: NDArray[Any]) -> NDArray[Any]:
    """`largest` with 0 for -inf: an empty row subtracts 0, where -inf - (-inf) would be NaN."""
    return np.where(largest == -np.inf, 0, largest).astype(largest.dtype)


def round_to_bfloat16(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each float32 rounded to the nearest bfloat16, ties to even, still held as float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)
    return np.where(np.isnan(x), x, rounded)
