"""Attention over cached keys and values: gather what the page table names, then attention's formula."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..problem import INT4_GROUP, AppendProblem, CacheProblem, Problem
from . import attention


def forward(problem: CacheProblem, out: NDArray[Any], lse: NDArray[Any] | None) -> None:
    """Write attention to `out` (B, Hq, Sq, Dv), and where wanted `lse` (B, Hq, Sq)."""
    p = problem
    for b in range(len(p.key_lengths)):
        first, end = int(p.key_starts[b]), int(p.key_lengths[b])
        positions = np.arange(first, end)
        keys = _gathered(p, b, positions, p.key_pages, p.key_scales)
        # Counted from `first`, the keys are those of a call without a cache.
        dense = Problem(
            query=p.query[b : b + 1],
            key=keys,
            value=_gathered(p, b, positions, p.value_pages, p.value_scales),
            storage=p.storage if p.key_scales is None else "float32",
            batch=1,
            max_queries=p.query.shape[2],
            max_keys=len(positions),
            scale=p.scale,
            softcap=p.softcap,
            left=p.left,
            right=p.right,
            offset=p.offset[b : b + 1] - first,
            key_lengths=np.array([len(positions)]),
            mask=None if p.mask is None else p.mask[b : b + 1, ..., first:end],
            bias=None if p.bias is None else p.bias[b : b + 1, ..., first:end],
            alibi_slopes=p.alibi_slopes,
            sinks=p.sinks,
        )
        attention.forward(dense, out[b : b + 1], None if lse is None else lse[b : b + 1], None)


class Plan:
    """A call to be made again while a cache grows, whose arrays but the query change in place."""

    def __init__(self, problem: CacheProblem) -> None:
        self.problem = problem

    def forward(
        self,
        query: NDArray[Any],
        out: NDArray[Any],
        lse: NDArray[Any] | None,
        max_keys: int,
        offset: NDArray[np.int64] | None = None,
    ) -> None:
        """Attend `query`; no sequence has more than `max_keys` keys. `offset` is another one."""
        offset = self.problem.offset if offset is None else offset
        problem = dataclasses.replace(self.problem, query=query, max_keys=max_keys, offset=offset)
        forward(problem, out, lse)

    def again(self, inputs: tuple[Any, ...], out: NDArray[Any], max_keys: int) -> None:
        """There is no shorter way."""


def _gathered(
    problem: CacheProblem,
    b: int,
    positions: NDArray[np.int64],
    pages: NDArray[Any],
    scales: NDArray[np.float32] | None,
) -> NDArray[Any]:
    """The rows (1, Hkv, n, D) of these positions of sequence b."""
    places = places_of(problem, b, positions)
    rows = pages[places]  # (n, Hkv, D)
    if scales is not None:
        with np.errstate(all="ignore"):
            rows = dequantised(rows, scales[places], problem.storage)
    return rows.swapaxes(0, 1)[None]


def places_of(
    problem: CacheProblem | AppendProblem, b: int, positions: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The page of each position of sequence b, and the row in it."""
    slot = positions % problem.ring if problem.ring else positions
    page_size = problem.key_pages.shape[1]
    return problem.page_table[b, slot // page_size], slot % page_size


def dequantised(numbers: NDArray[Any], scales: NDArray[np.float32], storage: str) -> NDArray[np.float32]:
    """The float32 numbers (..., D) that quantised rows stand for."""
    if storage == "int8":
        return numbers.astype(np.float32) * scales[..., None]
    groups = numbers.reshape(*scales.shape, INT4_GROUP // 2)
    nibbles = np.concatenate((groups & 15, groups >> 4), axis=-1)
    rows = (nibbles.astype(np.float32) - 8) * scales[..., None]
    return rows.reshape(*numbers.shape[:-1], 2 * numbers.shape[-1])
