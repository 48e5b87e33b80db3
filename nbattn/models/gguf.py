"""GGUF, llama.cpp's format: metadata of any kind, a table of tensors, and the tensors, some of 4 or 8 bits.

The format is described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. As llama.cpp does, this
reader wants every tensor right behind the one before.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .tensors import MOST_DIMENSIONS, Tensor, check_shape, check_tiling

BLOCK = 32
"""Numbers of a quantised block."""
KINDS = {
    0: "float32", 1: "float16", 2: "q4_0", 3: "q4_1", 8: "q8_0", 24: "int8", 25: "int16", 26: "int32",
    27: "int64", 28: "float64", 30: "bfloat16",
}  # fmt: skip
BLOCK_BYTES = {"q4_0": 18, "q4_1": 20, "q8_0": 34}
"""A float16 factor, for q4_1 also a float16 offset, and 32 numbers."""
NUMBERS = "BbHhIif?sAQqd"
"""Formats of metadata by their number; A is an array."""
STRING, ARRAY = NUMBERS.index("s"), NUMBERS.index("A")


class _Cursor:
    """Reads a file's head from front to back; whatever it lacks is a ValueError."""

    def __init__(self, content: NDArray[np.uint8]) -> None:
        self.content, self.place = content.data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.content) - self.place:
            msg = f"it ends within its head: {size} bytes from byte {self.place} on are not there"
            raise ValueError(msg)
        self.place += size
        return bytes(self.content[self.place - size : self.place])

    def number(self, letter: str) -> Any:
        raw = self.take(struct.calcsize("<" + letter))
        if letter == "?" and raw not in (b"\0", b"\1"):
            msg = f"it has {raw!r} for a boolean at byte {self.place - 1}"
            raise ValueError(msg)
        return struct.unpack("<" + letter, raw)[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self) -> Any:
        kind = self.number("I")
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array()
        return self.number(self.letter(kind))

    def letter(self, kind: int) -> str:
        if kind >= len(NUMBERS) or kind == ARRAY:
            msg = f"it has metadata of the kind {kind} at byte {self.place - 4}"
            raise ValueError(msg)
        return NUMBERS[kind]

    def array(self) -> list[Any]:
        letter, count = self.letter(self.number("I")), self.number("Q")
        size = 8 if letter == "s" else struct.calcsize("<" + letter)
        if count > (len(self.content) - self.place) // size:
            msg = f"it has an array of {count} at byte {self.place}, more than the file holds"
            raise ValueError(msg)
        if letter in "s?":
            return [self.string() if letter == "s" else self.number("?") for _ in range(count)]
        return np.frombuffer(self.take(count * size), np.dtype(letter).newbyteorder("<")).tolist()


def read(content: NDArray[np.uint8]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata of a file; ValueError, saying why, where it is none."""
    cursor = _Cursor(content)
    if cursor.take(4) != b"GGUF":
        msg = "it does not begin with GGUF"
        raise ValueError(msg)
    version = cursor.number("I")
    if version not in (2, 3):
        msg = f"it has version {version}; expected 2 or 3, little-endian"
        raise ValueError(msg)
    tensors, entries = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        name = cursor.string()
        if name in metadata:
            msg = f"its metadata has {name} twice"
            raise ValueError(msg)
        metadata[name] = cursor.value()
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        msg = f"its alignment is {str(alignment)[:80]}; expected a power of two"
        raise ValueError(msg)
    table: dict[str, tuple[tuple[int, ...], str, int]] = {}
    for _ in range(tensors):
        name, entry = _entry(cursor)
        if name in table:
            msg = f"it has the tensor {name} twice"
            raise ValueError(msg)
        table[name] = entry
    start = -(-cursor.place // alignment) * alignment
    body = content[start:]
    spans = [(begin, begin + _size(name, shape, kind), name) for name, (shape, kind, begin) in table.items()]
    check_tiling(spans, len(body), alignment)
    ends = [cursor.place - start, *sorted(end for _, end, _ in spans)]
    if any(content[start + end : start - (-end // alignment) * alignment].any() for end in ends):
        msg = "what fills it up to its alignment is not zero"
        raise ValueError(msg)
    return {
        name: Tensor(shape, kind, body[begin:end])
        for (name, (shape, kind, _)), (begin, end, _) in zip(table.items(), spans, strict=True)
    }, metadata


def _entry(cursor: _Cursor) -> tuple[str, tuple[tuple[int, ...], str, int]]:
    """Name, and shape, kind and place, of the next tensor in the table."""
    name, dimensions = cursor.string(), cursor.number("I")
    if dimensions > MOST_DIMENSIONS:
        msg = f"{name} has {dimensions} dimensions"
        raise ValueError(msg)
    # The one along which memory runs comes first.
    shape = check_shape([cursor.number("Q") for _ in range(dimensions)][::-1], name)
    number = cursor.number("I")
    if number not in KINDS:
        msg = f"{name} is of the kind {number}; expected one of {', '.join(KINDS.values())}"
        raise ValueError(msg)
    return name, (shape, KINDS[number], cursor.number("Q"))


def _size(name: str, shape: tuple[int, ...], kind: str) -> int:
    count = math.prod(shape)
    if kind not in BLOCK_BYTES:
        return count * (2 if kind == "bfloat16" else np.dtype(kind).itemsize)
    if not shape or shape[-1] % BLOCK:
        msg = f"{name} has shape {shape}, but {kind} has blocks of {BLOCK} along the last axis"
        raise ValueError(msg)
    return count // BLOCK * BLOCK_BYTES[kind]


def unpacked(tensor: Tensor) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.float32] | None]:
    """A quantised tensor as ``numbers * scale + offset``; the latter two are for each 32 numbers.

    Only q4_1 has offsets.
    """
    head = 4 if tensor.kind == "q4_1" else 2
    blocks = tensor.data.reshape(-1, BLOCK_BYTES[tensor.kind])
    per_block = (*tensor.shape[:-1], tensor.shape[-1] // BLOCK)
    factors = np.ascontiguousarray(blocks[:, :head]).view("<f2").astype(np.float32)
    scales, *offsets = (factors[:, i].reshape(per_block) for i in range(head // 2))
    if tensor.kind == "q8_0":
        numbers = np.ascontiguousarray(blocks[:, head:]).view(np.int8)
    else:
        nibbles = np.concatenate([blocks[:, head:] & 15, blocks[:, head:] >> 4], axis=1).view(np.int8)
        numbers = nibbles if offsets else nibbles - np.int8(8)
    return numbers.reshape(tensor.shape), np.ascontiguousarray(scales), offsets[0] if offsets else None


def dequantised(tensor: Tensor) -> NDArray[np.float32]:
    """A quantised tensor's numbers."""
    numbers, scales, offsets = unpacked(tensor)
    blocks = numbers.reshape(*scales.shape, BLOCK).astype(np.float32)
    blocks *= scales[..., None]
    if offsets is not None:
        blocks += offsets[..., None]
    return blocks.reshape(tensor.shape)
