"""The checks of what caches alone are given: sizes, dtypes, rotary options, new rows, what a ring holds."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import check, device
from .decode import Pages
from .problem import CACHE_DTYPES, storage_name


def check_rows(
    x: ArrayLike, name: str, batch: int, pages: Pages, which: int, is_on_gpu: bool
) -> NDArray[Any]:
    """New keys (`which` is 0) or values (1) that fit the memory."""
    array = check.floating(x, name)
    quantised = pages.key_scales is not None
    if quantised and array.dtype == np.float64:
        msg = f"{name} has dtype float64; a cache of {pages.storage} takes float32, float16 or bfloat16"
        raise TypeError(msg)
    if not quantised and storage_name(array.dtype) != pages.storage:
        msg = f"{name} has dtype {array.dtype} but the cache {pages.storage}; both must match"
        raise TypeError(msg)
    heads, width = pages.key.shape[2], pages.head_dims[which]
    if array.ndim != 4 or (*array.shape[:2], array.shape[3]) != (batch, heads, width):
        msg = f"{name} has shape {array.shape}; expected ({batch}, {heads}, new positions, {width})"
        raise ValueError(msg)
    as_it_is = is_on_gpu or not quantised
    return check.kernel_view(array if as_it_is else array.astype(np.float32, copy=False))


def check_held(starts: NDArray[np.int64], offset: NDArray[np.int64], left: int) -> None:
    """Whether rings, which hold positions from `starts` on, still have all that queries at `offset` see."""
    first = np.maximum(offset - left, 0)
    lost = starts > first
    if lost.any():
        b = int(np.flatnonzero(lost)[0])
        msg = (
            f"a query of sequence {b} sees from position {first[b]} on, but the ring holds them from "
            f"{starts[b]} on; attend after every capacity - window + 1 new tokens or fewer"
        )
        raise ValueError(msg)


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
