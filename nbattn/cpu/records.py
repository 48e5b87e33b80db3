"""A kernel's parameters by name, and as the record of words of 8 bytes that it reads."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import runtime

Words = dict[str, int]
"""Where each parameter lies, in words."""


def words_of(parameters: np.dtype[Any]) -> Words:
    fields: Any = parameters.fields
    return {name: fields[name][1] // 8 for name in fields}


def place(values: dict[str, int], words: Words, name: str, x: NDArray[Any] | None, axes: str = "") -> None:
    """Add an array's address, and in elements the strides along its axes that the record has."""
    if x is not None:
        values[name] = runtime.address(x)
        for axis, stride in zip(axes, x.strides, strict=False):
            if f"{name}_{axis}" in words:
                values[f"{name}_{axis}"] = stride // x.itemsize


def packed(values: dict[str, int], words: Words) -> NDArray[np.int64]:
    record = [0] * (max(words.values()) + 1)
    for name, value in values.items():
        record[words[name]] = value
    return np.array(record, np.int64)
