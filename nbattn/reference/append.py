"""Writing into key/value caches as formulas: turn by position, quantise, put each token where it belongs."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..problem import INT4_GROUP, AppendProblem
from .decode import places_of


def append(problem: AppendProblem) -> None:
    """Write the new keys and values into the pages."""
    p = problem
    with np.errstate(all="ignore"):
        for b, (start, count) in enumerate(zip(p.starts.tolist(), p.counts.tolist(), strict=True)):
            first = max(0, count - p.ring) if p.ring else 0
            positions = start + np.arange(first, count)
            key, value = p.key[b, :, first:count], p.value[b, :, first:count]
            if p.frequencies is not None:
                key = turned(key.astype(p.compute), positions, p.frequencies, p.interleaved)
            places = places_of(p, b, positions)
            _write(key, p.key_pages, p.key_scales, places, p.storage)
            _write(value, p.value_pages, p.value_scales, places, p.storage)


class Plan:
    """Appends to one cache again and again."""

    def __init__(self, problem: AppendProblem) -> None:
        self.problem = problem

    def append(
        self,
        key: NDArray[Any],
        value: NDArray[Any],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
    ) -> None:
        """Write keys and values (B, Hkv, S, D) to the positions from `starts` on."""
        append(dataclasses.replace(self.problem, key=key, value=value, starts=starts, counts=counts))

    def again(self, *arrays: NDArray[Any]) -> None:
        """There is no shorter way."""


def rotate(
    query: NDArray[Any],
    out: NDArray[Any],
    offset: NDArray[np.int64],
    frequencies: NDArray[np.float64],
    interleaved: bool,
) -> None:
    """Write `query` (B, Hq, Sq, D) to `out`, turned as keys are: query i of sequence b by offset[b] + i."""
    compute = np.float64 if query.dtype == np.float64 else np.float32
    for b, start in enumerate(offset.tolist()):
        positions = start + np.arange(query.shape[2])
        out[b] = turned(query[b].astype(compute), positions, frequencies, interleaved)


def rotate_again(*arrays: NDArray[Any], frequencies: NDArray[np.float64], interleaved: bool) -> None:
    """There is no shorter way."""


def turned(
    x: NDArray[Any], positions: NDArray[np.int64], frequencies: NDArray[np.float64], interleaved: bool
) -> NDArray[Any]:
    """`x` (H, n, D) with the pairs of its first numbers turned by ``position * frequency``."""
    angle = np.multiply.outer(positions, frequencies)  # (n, R)
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    half = len(frequencies)
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        if interleaved
        else (slice(0, half), slice(half, 2 * half))
    )
    y = x.copy()
    y[..., first] = x[..., first] * cos - x[..., second] * sin
    y[..., second] = x[..., second] * cos + x[..., first] * sin
    return y


def _write(
    x: NDArray[Any],
    pages: NDArray[Any],
    scales: NDArray[np.float32] | None,
    places: tuple[NDArray[np.int64], NDArray[np.int64]],
    storage: str,
) -> None:
    """Write `x` (H, n, D) to its places, in the cache's dtype."""
    rows = x.swapaxes(0, 1)  # (n, H, D)
    if scales is None:
        pages[places] = rows.astype(pages.dtype)
    else:
        quantise = {"int8": quantise_int8, "int4": quantise_int4}[storage]
        pages[places], scales[places] = quantise(rows.astype(np.float32))


def quantise_int8(x: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """`x` (..., D) as numbers (..., D) and scales (...): x is about number * scale."""
    scales = np.abs(x).max(axis=-1) / np.float32(127)
    return _divided(x, scales[..., None], -127, 127), scales


def quantise_int4(x: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """`x` (..., D) as bytes (..., D / 2) of two numbers each and scales (..., D / 32)."""
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // INT4_GROUP, INT4_GROUP)
    largest = np.abs(groups).argmax(axis=-1)[..., None]  # a NaN counts as the largest
    scales = np.take_along_axis(groups, largest, axis=-1) / np.float32(-8)
    nibbles = (_divided(groups, scales, -8, 7) + 8).astype(np.uint8)
    low, high = nibbles[..., : INT4_GROUP // 2], nibbles[..., INT4_GROUP // 2 :]
    packed = (low | high << 4).astype(np.uint8)
    return packed.reshape(*x.shape[:-1], x.shape[-1] // 2), scales[..., 0]


def _divided(
    x: NDArray[np.float32], scales: NDArray[np.float32], lowest: int, highest: int
) -> NDArray[np.int8]:
    usable = np.isfinite(scales) & (scales != 0)
    numbers = np.where(usable, x / np.where(usable, scales, 1), 0)
    return np.clip(np.rint(numbers), lowest, highest).astype(np.int8)
