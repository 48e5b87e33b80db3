"""The checks of what caches alone are given: sizes, dtypes, rotary options, how many rows are new."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import check, device
from .problem import CACHE_DTYPES


def check_counts(lengths: ArrayLike | None, batch: int, most: int) -> NDArray[np.int64]:
    """How many of the new rows belong to each sequence, (B,)."""
    if lengths is None:
        return np.full(batch, most, np.int64)
    counts = check.check_int_vector(lengths, "lengths", batch)
    refuse((counts < 0) | (counts > most), counts, "lengths", "expected 0 to {}", np.full(batch, most))
    return counts


def check_no_lengths(lengths: ArrayLike | None) -> None:
    """Of a call that a CUDA graph records."""
    if lengths is not None:
        msg = "a graph cannot hold lengths; leave them out"
        raise ValueError(msg)


def refuse(
    wrong: NDArray[np.bool_], values: NDArray[np.int64], name: str, text: str, limits: NDArray[np.int64]
) -> None:
    if wrong.any():
        b = int(np.flatnonzero(wrong)[0])
        msg = f"{name}[{b}] is {values[b]}; {text.format(limits[b])}"
        raise ValueError(msg)


def check_size(x: Any, name: str, least: int = 1) -> int:
    size = check.check_int(x, name)
    if size < least:
        msg = f"{name} is {size}; expected at least {least}"
        raise ValueError(msg)
    return size


def check_dtype(dtype: DTypeLike, is_on_gpu: bool) -> tuple[str, Any]:
    """What a cache of this dtype is called, and the dtype of its arrays."""
    name = str(dtype)
    if name.startswith("torch."):
        dtype = name = name.removeprefix("torch.")
    if dtype is not None and name not in CACHE_DTYPES:
        try:
            dtype = np.dtype(dtype)
            name = dtype.name
        except TypeError:
            pass  # the name is what came
    if name not in CACHE_DTYPES:
        msg = f"dtype is {name}; expected {', '.join(CACHE_DTYPES)}"
        raise ValueError(msg)
    if name == "bfloat16" and isinstance(dtype, str):
        try:
            return name, np.dtype(importlib.import_module("ml_dtypes").bfloat16)
        except ImportError as error:
            if is_on_gpu:  # where no NumPy array need have it
                return name, device.Bfloat16()
            msg = "dtype 'bfloat16' needs the package ml_dtypes; install it"
            raise ValueError(msg) from error
    if name == "int4":
        return name, np.dtype(np.uint8)
    return name, np.dtype(dtype).newbyteorder("=")


def check_rotary(
    head_dim: int, base: Any, interleaved: Any, rotary_dim: Any
) -> tuple[NDArray[np.float64] | None, bool]:
    """Radians per position of each pair, or None; and whether the pairs lie interleaved."""
    interleaved = check.check_flag(interleaved, "rotary_interleaved")
    if base is None:
        if rotary_dim is not None or interleaved:
            msg = "rotary_dim and rotary_interleaved need a rotary_base"
            raise ValueError(msg)
        return None, False
    number = check.check_number(base, "rotary_base")
    width = head_dim if rotary_dim is None else check.check_int(rotary_dim, "rotary_dim")
    if number <= 0:
        msg = f"rotary_base must be positive, got {number}"
        raise ValueError(msg)
    if width % 2 or not 2 <= width <= head_dim:
        msg = f"rotary_dim is {width}; expected an even number from 2 to head_dim {head_dim}"
        raise ValueError(msg)
    return number ** (-np.arange(0, width, 2) / width), interleaved
