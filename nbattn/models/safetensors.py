"""Safetensors: the length of a JSON header, the header, and the tensors one behind the other.

The format is described at https://huggingface.co/docs/safetensors. As its own reader does, this one refuses
files in which tensors overlap, leave gaps or are cut off.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .tensors import Tensor, check_bytes, check_shape, check_tiling, parse_object

KINDS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
MOST_HEADER = 100_000_000


def read(content: NDArray[np.uint8]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file; ValueError, saying why, where it is none."""
    if len(content) < 8:
        msg = f"it has {len(content)} bytes"
        raise ValueError(msg)
    length = int.from_bytes(content[:8].tobytes(), "little")
    if length > min(MOST_HEADER, len(content) - 8):
        msg = f"its header would take {length} bytes of {len(content)}"
        raise ValueError(msg)
    header = parse_object(content[8 : 8 + length].tobytes().decode())
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        msg = "its metadata is no object of strings"
        raise ValueError(msg)
    body = content[8 + length :]
    tensors, spans = {}, []
    for name, entry in header.items():
        tensors[name], span = _tensor(name, entry, body)
        spans.append(span)
    check_tiling(spans, len(body))
    return tensors, metadata


def _tensor(name: str, entry: Any, body: NDArray[np.uint8]) -> tuple[Tensor, tuple[int, int, str]]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        msg = f"{name} has no dtype, shape and data_offsets"
        raise ValueError(msg)
    kind = KINDS.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if kind is None:
        msg = f"{name} has the dtype {str(entry['dtype'])[:80]}; expected one of {', '.join(KINDS)}"
        raise ValueError(msg)
    shape = check_shape(entry["shape"], name)
    span = check_shape(entry["data_offsets"], f"data_offsets of {name}")
    if len(span) != 2 or span[1] < span[0]:
        msg = f"{name} has the data_offsets {span}; expected a begin and an end"
        raise ValueError(msg)
    begin, end = span
    bits = 16 if kind == "bfloat16" else 8 * np.dtype(kind).itemsize
    check_bytes(shape, bits, end - begin, name)
    return Tensor(shape, kind, body[begin:end]), (begin, end, name)
