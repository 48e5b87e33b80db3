"""Scaled dot-product attention on a GPU: choose the kernel, fill its parameters, start it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..device import DeviceArray
from ..problem import Problem, storage_name
from . import arrays, compiler, decode, hopper, launch, mma, mods
from .compiler import WORDS

TILE = (16, 16, 4, 4, 8, 32, 32)
"""`plain.Tile` of float32 arithmetic: 64 queries, 64 keys, 128 columns of values, 38 KB of shared memory."""
TILE64 = (16, 16, 2, 2, 4, 32, 32)
FEW_ROWS = 1
"""Rows of a thread where 16 queries are all there are."""
AXES = {"query": 4, "key": 4, "value": 4, "out": 4, "lse": 3, "weights": 4, "mask": 4, "bias": 4, "table": 3}
"""Arrays of which the kernel is told strides, along so many axes."""
POINTERS = ("query", "key", "value", "out")
"""What changes in a call that repeats another."""
FLAGS = ("lse", "weights", "mask", "bias", "table", "slopes", "sinks", "offsets", "lengths")
"""Arrays that a call may lack."""


def forward(problem: Problem, out: Any, lse: Any, weights: Any) -> None:
    """Write attention to `out` (B, Hq, Sq, Dv), and where wanted `lse` (B, Hq, Sq) and `weights`, contiguous.

    Arrays of NumPy go to the current GPU and back.
    """
    p = problem
    if isinstance(p.query, DeviceArray):
        run(p, out, lse, weights, p.query.stream)
        return
    with arrays.Copies() as copies:
        there = replace(
            p,
            query=copies.send(p.query),
            key=copies.send(p.key),
            value=copies.send(p.value),
            mask=copies.send(p.mask),
            bias=copies.send(p.bias),
            alibi_slopes=copies.send(p.alibi_slopes),
            sinks=copies.send(p.sinks),
        )
        run(there, copies.receive(out), copies.receive(lse), copies.receive(weights), copies.stream)


def run(
    p: Problem, out: DeviceArray, lse: DeviceArray | None, weights: DeviceArray | None, stream: int
) -> None:
    """Start the kernel for arrays on a GPU; small ones that are on the host go there before it."""
    place = launch.device(cast(DeviceArray, p.query).device)
    with place.current(), ExitStack() as stack:

        def send(array: NDArray[Any]) -> int:
            if launch.is_capturing(stream):
                msg = (
                    "a graph cannot hold what lies on the host: give all sequences one length and offset, "
                    "and pass sinks and alibi_slopes on the GPU"
                )
                raise ValueError(msg)
            array = np.ascontiguousarray(array)
            address = stack.enter_context(launch.room(place, array.nbytes, stream))
            launch.ask("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, stream)
            return address

        def there(x: Any) -> Any:
            if not isinstance(x, np.ndarray):
                return x
            return DeviceArray(send(x), x.shape, (x.itemsize,), x.dtype, place.ordinal, stream)

        p = replace(p, alibi_slopes=there(p.alibi_slopes), sinks=there(p.sinks))
        if weights is not None and weights.size:  # the kernel writes only what a row can see
            launch.ask("cuMemsetD8Async", weights.address, 0, weights.size * weights.itemsize, stream)
        few = _few(p, out, lse, weights, send)
        if few is not None:
            few(place, stream, p.query)
        else:
            launch.run(*_prepared(p, out, lse, weights, send), place, stream)


class Repeat:
    """A call to be made again with other arrays of the same layout: only their addresses change."""

    def __init__(self, p: Problem, out: DeviceArray) -> None:
        def send(array: NDArray[Any]) -> int:
            raise AssertionError(array)  # calls with vectors are not repeated

        place = launch.device(out.device)
        few = _few(p, out, None, None, send)
        if few is not None:
            self.call: Any = decode.Again(few, place, POINTERS)
            return
        prepared = _prepared(p, out, None, None, send)
        has_maps = prepared[0].has_maps
        self.call = hopper.Call(p, prepared, place) if has_maps else launch.Call(*prepared, place, POINTERS)

    def forward(self, query: int, key: int, value: int, out: int, stream: int) -> None:
        self.call(stream, query, key, value, out)


def _few(
    p: Problem,
    out: DeviceArray,
    lse: DeviceArray | None,
    weights: DeviceArray | None,
    send: Callable[[NDArray[Any]], int],
) -> decode.Start | None:
    """The launch for few queries over many keys; None where another kernel takes the problem."""
    has_mods = p.score_mod is not None or p.mask_mod is not None
    if weights is not None or p.bfloat16_products or has_mods or not decode.is_few(p):
        return None
    cached = decode.as_cache(p)
    return decode.prepared(cached, out, lse, send) if decode.covers(cached, out) else None


def _prepared(
    p: Problem,
    out: DeviceArray,
    lse: DeviceArray | None,
    weights: DeviceArray | None,
    send: Callable[[NDArray[Any]], int],
) -> tuple[compiler.Kernel, dict[str, Any], int]:
    """The kernel, its parameters and its blocks; `send` puts an array on the GPU and says where."""
    if weights is None and mma.has_runs(out):
        for tensor_cores in (hopper, mma):
            if tensor_cores.covers(p):
                return tensor_cores.prepared(p, out, lse, send)
    functions = mods.of(p)
    values = parameters(p, out, lse, weights) | mods.values(functions, send)
    values |= {name: send(array) for name, array in _on_host(p, values).items()}
    return _kernel_of(p, functions), values, _blocks(p, values)


def _on_host(p: Problem, values: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """What the kernel reads that is not on the GPU yet; tell it so, or the number where all are the same."""
    found: dict[str, NDArray[Any]] = {}
    for name, names, vector in (("offset", "offsets", p.offset), ("key_length", "lengths", p.key_lengths)):
        if (vector == vector[:1]).all():
            values[name] = int(vector[0]) if len(vector) else 0
        else:
            found[names], values[f"has_{names}"] = vector, 1
    if p.query_starts is not None and p.key_starts is not None:
        found |= {"query_starts": p.query_starts, "key_starts": p.key_starts}
        values["packed"] = 1
    if p.blocks is not None and p.blocks.table.size:
        table, words = p.blocks.table, p.blocks.words
        strides = np.broadcast_to(table, (p.batch, p.query.shape[1], *table.shape[2:])).strides
        values |= {"has_table": 1, "table_strides": tuple(s // table.itemsize for s in strides[:3])}
        found |= {"table": table, "words": words}
    return found


def _blocks(p: Problem, values: dict[str, Any]) -> int:
    """How many blocks there are; tell the kernel how they are cut."""
    tile = _tile(p)
    values["tiles"] = -(-p.max_queries // (tile[0] * tile[2]))
    values["chunks"] = -(-p.value.shape[3] // (tile[1] * tile[4]))
    return values["tiles"] * values["chunks"] * p.query.shape[1] * p.batch


def _kernel_of(p: Problem, functions: mods.Mods) -> compiler.Kernel:
    cut = (p.storage, p.storage if p.bias is None else str(storage_name(p.bias.dtype)), _tile(p))
    own = kernel(*cut)
    if not functions.name:
        return own
    name = own.name + functions.name
    if name not in _modded:
        if len(_modded) >= mods.KEPT:
            _modded.clear()
        _modded[name] = replace(
            own, name=name, build=partial(_build, *cut, functions), keeps=functions.keeps,
            label=functions.label, parameters=own.parameters + functions.kinds,
        )  # fmt: skip
    return _modded[name]


_modded: dict[str, compiler.Kernel] = {}
"""Kernels with functions of the user's."""


def _tile(p: Problem) -> tuple[int, ...]:
    tile = TILE64 if p.storage == "float64" else TILE
    return tile if p.max_queries > tile[0] * FEW_ROWS else (*tile[:2], FEW_ROWS, *tile[3:])


def parameters(
    p: Problem, out: DeviceArray, lse: DeviceArray | None, weights: DeviceArray | None
) -> dict[str, Any]:
    """What the kernel is told of arrays and options."""
    heads = p.query.shape[1]
    values: dict[str, Any] = {
        "queries": p.max_queries,
        "heads": heads,
        "group": heads // p.key.shape[1] if heads else 1,
        "head_dim": p.query.shape[3],
        "value_dim": p.value.shape[3],
        "left": p.left,
        "right": p.right,
        "narrow": p.bfloat16_products,
        "scale": p.scale,
        "softcap": p.softcap,
        "mask_bytes": 0 if p.mask is None else p.mask.itemsize,
    }
    there: dict[str, Any] = {
        "query": p.query, "key": p.key, "value": p.value, "out": out, "lse": lse, "weights": weights,
        "mask": p.mask, "bias": p.bias, "slopes": p.alibi_slopes, "sinks": p.sinks,
    }  # fmt: skip
    for name, array in there.items():
        if array is None:
            continue
        values[name] = array.address
        if name in AXES:
            unit = 1 if name == "mask" else array.itemsize
            values[f"{name}_strides"] = tuple(stride // unit for stride in array.strides)
        if name in FLAGS:
            values[f"has_{name}"] = 1
    return values


@cache
def kernel(storage: str, bias: str, tile: tuple[int, ...]) -> compiler.Kernel:
    number = "float64" if storage == "float64" else "float32"
    element = WORDS[storage]
    pointers = {
        "query": element, "key": element, "value": element, "out": element, "lse": number, "weights": number,
        "mask": "uint8", "bias": WORDS[bias], "table": "int32", "words": "uint64", "slopes": number,
        "sinks": number, "offsets": "int64", "lengths": "int64", "query_starts": "int64",
        "key_starts": "int64",
    }  # fmt: skip
    numbers = ("packed", "narrow", "mask_bytes", "queries", "heads", "group", "head_dim", "value_dim",
               "tiles", "chunks", "key_length", "offset", "left", "right")  # fmt: skip
    return compiler.Kernel(
        f"attention-{storage}-{bias}-{tile[2]}",
        partial(_build, storage, bias, tile),
        (
            *((name, f"*{kind}") for name, kind in pointers.items()),
            *((f"has_{name}", "int64") for name in FLAGS),
            *((name, "int64") for name in numbers),
            *((f"{name}_strides", f"int64x{n}") for name, n in AXES.items()),
            ("scale", "float64"),
            ("softcap", "float64"),
        ),
        tile[0] * tile[1],
    )


def kernels() -> list[compiler.Kernel]:
    """Every kernel that calls may start, but for a bias of another dtype."""
    tiles = {storage: TILE64 if storage == "float64" else TILE for storage in WORDS}
    return [
        kernel(storage, storage, (*tile[:2], rows, *tile[3:]))
        for storage, tile in tiles.items()
        for rows in (tile[2], FEW_ROWS)
    ]


def _build(storage: str, bias: str, tile: tuple[int, ...], functions: mods.Mods = mods.NONE) -> Any:
    from .plain import Tile, build

    compute = np.float64 if storage == "float64" else np.float32
    first = len(kernel(storage, bias, tile).parameters)
    middle = first + sum(name.startswith("score_mod") for name, _ in functions.kinds)
    score, mask = mods.build(functions.score, compute), mods.build(functions.mask, compute)
    return build(storage, bias, Tile(*tile), score, mask, first, middle)
