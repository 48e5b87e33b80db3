"""What the readers of weight files share: where a tensor lies in its file, and which numbers it holds."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_DIMENSIONS = 16


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """One tensor of a file: its shape, what its numbers are, and the bytes that hold them.

    `kind` is a NumPy dtype's name, "bfloat16", or one of GGUF's: "q4_0", "q4_1", "q8_0".
    """

    shape: tuple[int, ...]
    kind: str
    data: NDArray[np.uint8]


def mapped(path: Path) -> NDArray[np.uint8]:
    """The bytes of a file, read once they are looked at; OSError, naming the file, where there is none."""
    try:
        with path.open("rb") as file:
            # An empty file cannot be mapped.
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if file.seek(0, 2) else b""
    except OSError as error:
        msg = f"cannot read the weight file {path}: {error.strerror}"
        raise type(error)(msg) from error
    return np.frombuffer(whole, np.uint8)


def check_shape(shape: Any, name: str) -> tuple[int, ...]:
    """A list of dimensions as a tuple."""
    sizes = tuple(shape) if isinstance(shape, (list, tuple)) else (None,)
    if len(sizes) > MOST_DIMENSIONS or any(type(n) is not int or not 0 <= n < 1 << 63 for n in sizes):
        msg = f"{name} has the shape {str(shape)[:80]}"
        raise ValueError(msg)
    return sizes


def check_bytes(shape: tuple[int, ...], bits: int, size: int, name: str) -> None:
    """Whether a tensor of so many bits a number takes so many bytes."""
    if math.prod(shape) * bits != 8 * size:
        msg = f"{name} has shape {shape} with {bits} bits a number, but {size} bytes"
        raise ValueError(msg)


def check_tiling(spans: Iterable[tuple[int, int, str]], size: int, alignment: int = 1) -> None:
    """Whether tensors (begin, end, name) fill so many bytes without gap or overlap.

    Each but the last may end up to an alignment before the next begins.
    """
    place = 0
    for begin, end, name in sorted(spans):
        if begin != -(-place // alignment) * alignment:
            kind = "overlaps another tensor" if begin < place else "leaves a gap before it"
            msg = f"{name} begins at byte {begin}, where the one before ends at {place}: it {kind}"
            raise ValueError(msg)
        place = end
    if not place <= size < place + alignment:
        kind = "is cut off" if place > size else "has more behind them"
        msg = f"the tensors take {place} bytes but the file holds {size}: it {kind}"
        raise ValueError(msg)


def parse_object(text: str | bytes, kind: type = dict) -> Any:
    """A JSON object, or list, in which no name comes twice; ValueError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) < len(pairs):
            msg = "a name comes twice"
            raise ValueError(msg)
        return data

    try:
        data = json.loads(text, object_pairs_hook=unique)
    except RecursionError as error:
        msg = "it is nested too deeply"
        raise ValueError(msg) from error
    if not isinstance(data, kind):
        msg = f"it is a JSON {type(data).__name__}; expected {'an object' if kind is dict else 'a list'}"
        raise ValueError(msg)
    return data
