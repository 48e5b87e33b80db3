"""Rows times a matrix as a formula; the matrix may be stored in 16 or 8 bits. Used for many rows too."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 19
"""Numbers that are widened at a time: 2 MB."""


class Plan:
    """Products with one matrix, as in `cpu.matvec`."""

    def __init__(
        self,
        weight: NDArray[Any],
        storage: str,
        bias: NDArray[Any],
        scales: NDArray[np.float32] | None = None,
    ) -> None:
        self.weight, self.storage, self.bias, self.scales = weight, storage, bias, scales

    def __call__(self, x: NDArray[Any], y: NDArray[Any]) -> None:
        """Write ``x @ weight.T + bias`` to y (rows, d_out)."""
        if self.storage in ("float32", "float64"):
            np.matmul(x, self.weight.T, out=y)
        else:
            step = max(BLOCK // max(self.weight.shape[1], 1), 1)
            for o in range(0, len(self.weight), step):
                part = slice(o, o + step)
                scales = None if self.scales is None else self.scales[part]
                np.matmul(x, widened(self.weight[part], self.storage, scales).T, out=y[:, part])
        y += self.bias


def widened(weight: NDArray[Any], storage: str, scales: NDArray[np.float32] | None = None) -> NDArray[Any]:
    """Stored numbers (n, d) as float32 or float64; `scales` (n, groups) multiply runs of int8."""
    if storage == "int8":
        assert scales is not None
        groups = weight.reshape(*scales.shape, -1)
        return (groups * scales[..., None]).reshape(weight.shape)
    if storage == "bfloat16":
        return (weight.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return weight.astype(np.float32 if storage == "float16" else weight.dtype, copy=False)


def narrowed(
    weight: NDArray[Any], storage: str, groups: int = 1
) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
    """Numbers (n, d) rounded to nearest even, with their scales (n, groups) for int8.

    bfloat16 are given as their bits. A scale is the largest magnitude of its run / 127.
    """
    if storage == "int8":
        runs = weight.astype(np.float32).reshape(len(weight), groups, -1)
        scales = np.abs(runs).max(axis=-1, initial=0) / np.float32(127)
        numbers = np.rint(runs / np.where(scales == 0, 1, scales)[..., None])
        return np.clip(numbers, -127, 127).astype(np.int8).reshape(weight.shape), scales
    if storage == "bfloat16":
        bits = np.ascontiguousarray(weight, np.float32).view(np.uint32)
        rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
        return np.where(np.isnan(weight), np.uint32(0x7FC0), rounded).astype(np.uint16), None
    return weight.astype(storage), None
