"""CTranslate2's ``model.bin``: a name, the arrays one behind the other, and other names for some of them.

The format is what ``ctranslate2/specs/model_spec.py`` writes (https://github.com/OpenNMT/CTranslate2). Every
number is little-endian, and each text ends in a zero byte that its length counts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .tensors import MOST_DIMENSIONS, Tensor, check_bytes

VERSION = 6
KINDS = ("float32", "int8", "int16", "int32", "float16", "bfloat16")


class Cursor:
    """A place in a file that only goes forward; ValueError where a step would leave it."""

    def __init__(self, content: NDArray[np.uint8]) -> None:
        self.content, self.place = content, 0

    def take(self, size: int, what: str) -> NDArray[np.uint8]:
        left = len(self.content) - self.place
        if size > left:
            msg = f"{what} would take {size} bytes of the last {left}: it is cut off"
            raise ValueError(msg)
        self.place += size
        return self.content[self.place - size : self.place]

    def number(self, size: int, what: str) -> int:
        return int.from_bytes(self.take(size, what).tobytes(), "little")

    def text(self, what: str) -> str:
        data = self.take(self.number(2, f"the length of {what}"), what).tobytes()
        if len(data) < 2 or data.find(0) != len(data) - 1:
            msg = f"{what} is {data[:80]!r}; expected a text that ends in a zero byte"
            raise ValueError(msg)
        return data[:-1].decode()


def read(content: NDArray[np.uint8]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and its spec, revision, aliases and single integers as metadata; ValueError."""
    cursor = Cursor(content)
    version = cursor.number(4, "the version")
    if version != VERSION:
        msg = f"its version is {version}; expected {VERSION}"
        raise ValueError(msg)
    metadata: dict[str, Any] = {"spec": cursor.text("the spec"), "revision": cursor.number(4, "the revision")}
    tensors: dict[str, Tensor] = {}
    for _ in range(cursor.number(4, "the number of arrays")):
        name = cursor.text("a name")
        if name in tensors or name in metadata:
            msg = f"{name} comes twice"
            raise ValueError(msg)
        tensor = _tensor(cursor, name)
        if tensor.shape == () and tensor.kind.startswith("int"):
            metadata[name] = int.from_bytes(tensor.data.tobytes(), "little", signed=True)
        else:
            tensors[name] = tensor
    aliases = metadata["aliases"] = {}
    for _ in range(cursor.number(4, "the number of aliases")):
        alias, name = cursor.text("an alias"), cursor.text("what an alias is for")
        if alias in aliases or alias in tensors or alias in metadata or name not in tensors:
            msg = f"the alias {alias} of {name} is taken, or there is no such array"
            raise ValueError(msg)
        aliases[alias] = name
    if cursor.place != len(content):
        msg = f"it ends at byte {cursor.place} but has {len(content)}"
        raise ValueError(msg)
    return tensors, metadata


def _tensor(cursor: Cursor, name: str) -> Tensor:
    rank = cursor.number(1, f"the rank of {name}")
    if rank > MOST_DIMENSIONS:
        msg = f"{name} has {rank} dimensions"
        raise ValueError(msg)
    shape = tuple(cursor.number(4, f"the shape of {name}") for _ in range(rank))
    code = cursor.number(1, f"the dtype of {name}")
    if code >= len(KINDS):
        msg = f"{name} has the dtype {code}; expected 0 to {len(KINDS) - 1}"
        raise ValueError(msg)
    kind = KINDS[code]
    size = cursor.number(4, f"the size of {name}")
    check_bytes(shape, 16 if kind == "bfloat16" else 8 * np.dtype(kind).itemsize, size, name)
    return Tensor(shape, kind, cursor.take(size, name))
