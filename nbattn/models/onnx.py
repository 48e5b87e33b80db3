"""The initialisers of an ONNX model, out of the protocol buffer that it is, without a package for either.

Messages are read as far as they lead to the weights: model, graph, initialiser. The numbers of the fields are
those of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .tensors import Tensor, check_bytes, check_shape

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""How a field is written."""
GRAPH, INITIALIZER, SPARSE = 7, 5, 15
DIMS, KIND, NAME, RAW, LOCATION = 1, 2, 8, 9, 14
TYPED = {4: "float32", 5: "int32", 7: "int64", 10: "float64", 11: "uint64"}
"""Fields of numbers that are not raw."""
STRINGS = 6
KINDS = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool",
    10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16",
}  # fmt: skip
FIELD = {kind: field for field, kind in TYPED.items()} | {"uint32": 11}
"""Where numbers are that are not raw; in that of int32 unless named here."""


def read(content: NDArray[np.uint8]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, which has no metadata; ValueError, saying why, where it is none."""
    memory = content.data
    graphs = [value for number, value in _fields(memory, 0, len(memory)) if number == GRAPH]
    if len(graphs) != 1 or not isinstance(graphs[0], tuple):
        msg = f"it holds {len(graphs)} graphs; expected one"
        raise ValueError(msg)
    tensors: dict[str, Tensor] = {}
    for number, value in _fields(memory, *graphs[0]):
        if number == SPARSE:
            msg = "it has sparse initialisers"
            raise ValueError(msg)
        if number == INITIALIZER:
            name, tensor = _tensor(memory, *_span(value))
            if name in tensors or not name:
                msg = (
                    f"it has the initialiser {name} twice" if name else "it has an initialiser without a name"
                )
                raise ValueError(msg)
            tensors[name] = tensor
    return tensors, {}


def _tensor(content: memoryview, begin: int, end: int) -> tuple[str, Tensor]:
    """One TensorProto."""
    once: dict[int, Any] = {}
    dims: list[int] = []
    numbers: dict[int, list[Any]] = {}
    for number, value in _fields(content, begin, end):
        if number == DIMS:
            dims += _varints(content, value)
        elif number in TYPED or number == STRINGS:
            numbers.setdefault(number, []).append(value)
        elif number in (KIND, NAME, RAW, LOCATION):
            if number in once:
                msg = f"an initialiser has the field {number} twice"
                raise ValueError(msg)
            once[number] = value
    name = _bytes(content, once.get(NAME, (0, 0))).tobytes().decode()
    if once.get(LOCATION, 0) != 0:
        msg = f"{name} keeps its numbers in another file"
        raise ValueError(msg)
    kind = KINDS.get(once[KIND]) if isinstance(once.get(KIND), int) else None
    if kind is None or len(numbers) + (RAW in once) > 1 or STRINGS in numbers:
        msg = f"{name} is of the kind {once.get(KIND)}; expected numbers, in one field"
        raise ValueError(msg)
    shape = check_shape(dims, name)
    data = _bytes(content, once[RAW]) if RAW in once else _typed(content, numbers, kind, name)
    check_bytes(shape, 16 if kind == "bfloat16" else 8 * np.dtype(kind).itemsize, len(data), name)
    return name, Tensor(shape, kind, data)


def _typed(content: memoryview, numbers: dict[int, list[Any]], kind: str, name: str) -> NDArray[np.uint8]:
    """The bytes of numbers that are not raw."""
    if not numbers:
        return _bytes(content, (0, 0))
    ((field, values),) = numbers.items()
    wide = TYPED[field]
    if field != FIELD.get(kind, FIELD["int32"]):
        msg = f"{name} is {kind}, but its numbers are in a field of {wide}"
        raise ValueError(msg)
    if wide.startswith("float"):
        size = np.dtype(wide).itemsize
        pieces = [_bytes(content, v) for v in values]
        if any(len(piece) % size for piece in pieces):
            msg = f"{name} has part of a number"
            raise ValueError(msg)
        return np.concatenate(pieces)
    whole = [n for v in values for n in _varints(content, v)]
    stored = np.dtype("uint16" if kind in ("bfloat16", "float16") else "uint8" if kind == "bool" else kind)
    limits = np.iinfo(stored)
    if not all(limits.min <= n <= limits.max for n in whole):
        msg = f"{name} has numbers that no {kind} is"
        raise ValueError(msg)
    return np.array(whole, stored.newbyteorder("<")).view(np.uint8)


def _fields(content: memoryview, begin: int, end: int) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a message: an int, or where the bytes lie."""
    place = begin
    while place < end:
        tag, place = _varint(content, place, end)
        number, wire = tag >> 3, tag & 7
        value: Any
        if number == 0 or number >= 1 << 29:
            msg = f"it has a field {number} at byte {place}"
            raise ValueError(msg)
        if wire == VARINT:
            value, place = _varint(content, place, end)
            yield number, _signed(value)
            continue
        if wire == BYTES:
            size, place = _varint(content, place, end)
        elif wire in (FIXED32, FIXED64):
            size = 4 if wire == FIXED32 else 8
        else:
            msg = f"it has a field of the wire type {wire} at byte {place}"
            raise ValueError(msg)
        if size > end - place:
            msg = f"it has a field of {size} bytes at byte {place}, more than there are"
            raise ValueError(msg)
        yield number, (place, place + size)
        place += size


def _varint(content: memoryview, place: int, end: int) -> tuple[int, int]:
    value = 0
    for i in range(10):
        if place + i >= end:
            break
        byte = content[place + i]
        value |= (byte & 127) << (7 * i)
        if byte < 128:
            return value & ((1 << 64) - 1), place + i + 1
    msg = f"it has a broken number at byte {place}"
    raise ValueError(msg)


def _varints(content: memoryview, value: Any) -> list[int]:
    """The numbers of a repeated field: one, or packed ones."""
    if isinstance(value, int):
        return [value]
    place, end = value
    numbers = []
    while place < end:
        number, place = _varint(content, place, end)
        numbers.append(_signed(number))
    return numbers


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _bytes(content: memoryview, value: Any) -> NDArray[np.uint8]:
    begin, end = _span(value)
    return np.frombuffer(content[begin:end], np.uint8)


def _span(value: Any) -> tuple[int, int]:
    if not isinstance(value, tuple):
        msg = "it has a number where bytes should be"
        raise ValueError(msg)
    return value
