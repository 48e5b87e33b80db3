"""Writing new tokens into caches on a GPU, and what else moves tokens: the kernels' parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..device import DeviceArray, has_stream
from ..problem import AppendProblem, storage_name
from . import arrays, compiler, launch
from .compiler import WORDS
from .sending import (
    Kept,
    Sender,
    copy_page,
    empty,
    is_captured,
    keep,
    placed,
    table_at,
    table_there,
    wait,
    write,
)

__all__ = [
    "copy_page",
    "empty",
    "is_captured",
    "keep",
    "placed",
    "wait",
    "write",
]  # what doors ask this module for

THREADS = 64
CALLS = 16
"""Layouts of new tokens that a cache remembers."""
PAGE_WORDS = {**WORDS, "int8": "int8", "int4": "uint8"}
_PLACES = (("table", "*int32"), ("starts", "*int64"), ("counts", "*int64"), ("frequencies", "*float64"))
_NUMBERS = ("has_table", "has_starts", "has_counts", "table_width", "page_size", "ring", "heads", "rows",
            "pairs", "interleaved", "start", "count")  # fmt: skip


# --- appending ----------------------------------------------------------------------------------------------


def append(problem: AppendProblem) -> None:
    """Write the new keys and values into the pages."""
    p = problem
    Plan(p).append(p.key, p.value, p.starts, p.counts)


class Plan:
    """Appends to one cache again and again."""

    def __init__(self, problem: AppendProblem) -> None:
        none: Any = None
        self.problem = replace(problem, key=none, value=none)  # the first call's, not to be kept alive
        self.calls: dict[Any, launch.Call] = {}  # by layout
        self.starts = Kept()

    def append(self, key: Any, value: Any, starts: Any, counts: NDArray[np.int64]) -> None:
        """Write keys and values (B, Hkv, S, D) to the positions from `starts` on.

        Where `starts` is on the GPU, it says where they end.
        """
        p: Any = self.problem
        batch, heads, rows, _ = key.shape
        blocks = 2 * batch * heads * rows
        if blocks == 0:
            return
        place = launch.device(p.key_pages.device)
        kernel = append_kernel(str(storage_name(key.dtype)), p.storage)
        if type(key) is type(value) is DeviceArray and self._is_short(starts, counts):
            stream, differ = key.stream, (starts != starts[0]).any()
            layout = key.shape, key.strides, key.dtype.name, value.strides, int(counts[0]), differ
            call = self.calls.get(layout)
            if call is None:
                if len(self.calls) >= CALLS:
                    self.calls.clear()
                values = self._values(None, key, value, starts[:1], counts)
                values |= {"has_starts": int(differ)}
                pointers = ("key", "value", "start", "starts", "table")
                call = self.calls[layout] = launch.Call(kernel, values, blocks, place, pointers)
            at, start = (self.starts(starts, place, stream), 0) if differ else (0, int(starts[0]))
            has_table = not is_in_order(p.page_table)
            table = table_at(p.page_table, place, stream) if has_table else 0
            call(stream, key.address, value.address, start, at, table)
        else:
            stream = key.stream if type(key) is DeviceArray else 0
            with Sender(place, stream) as send:
                k, v = (x if type(x) is DeviceArray else _sent(send, x) for x in (key, value))
                values = self._values(send, k, v, starts, counts)
                launch.run(kernel, values, blocks, place, stream)
        if any(type(x) is DeviceArray and not has_stream(x) for x in (key, value)):
            with place.current():
                launch.ask("cuStreamSynchronize", stream)  # as JAX, which may use the memory again at once

    def _is_short(self, starts: Any, counts: NDArray[np.int64]) -> bool:
        """Whether the launch needs nothing of the host but numbers, and starts and a table that are kept."""
        p = self.problem
        placed = p.frequencies is None or isinstance(p.frequencies, DeviceArray)
        return placed and isinstance(starts, np.ndarray) and bool((counts == counts[0]).all())

    def _values(
        self, send: Any, key: DeviceArray, value: DeviceArray, starts: Any, counts: NDArray[np.int64]
    ) -> dict[str, Any]:
        p: Any = self.problem
        _, heads, rows, head_dim = key.shape
        pages = {name: getattr(p, name) for name in
                 ("key_pages", "value_pages", "key_scales", "value_scales")}  # fmt: skip
        return {
            "heads": heads, "rows": rows, "head_dim": head_dim, "value_dim": value.shape[3],
            "start": -rows if type(starts) is DeviceArray else 0,
            **_vector(send, "start", starts), **_vector(send, "count", counts),
            **_places(send, p), **_turns(send, p.frequencies, p.interleaved),
            **_arrays(key=key, value=value, **pages),
        }  # fmt: skip


def rotate(
    query: Any,
    out: Any,
    offset: Any,
    frequencies: Any,
    interleaved: bool,
) -> None:
    """Write `query` (B, Hq, Sq, D) to `out`, turned as keys are: query i of sequence b by offset[b] + i.

    Where `offset` is on the GPU, it says where queries end.
    """
    if type(query) is DeviceArray:
        turn(query, out, query.stream, offset=offset, frequencies=frequencies, interleaved=interleaved)
        return
    ordinal = frequencies.device if type(frequencies) is DeviceArray else None
    with arrays.Copies(ordinal) as copies:
        there = copies.send(query), copies.receive(out)
        turn(*there, copies.stream, offset=offset, frequencies=frequencies, interleaved=interleaved)


def clear(out: DeviceArray, lse: DeviceArray | None, counts: NDArray[np.int64]) -> None:
    """Set the rows (B, Hq, Sq) from `counts` on to 0, and -inf in `lse`."""
    turn(out, out, out.stream, lse=lse, counts=counts)


def turn(
    x: DeviceArray,
    out: DeviceArray,
    stream: int,
    *,
    lse: DeviceArray | None = None,
    counts: NDArray[np.int64] | None = None,
    offset: Any = None,
    frequencies: Any = None,
    interleaved: bool = False,
) -> None:
    """Write `x` (B, H, S, D) to `out`, in its dtype, turned by frequencies; with counts only clear rows."""
    batch, heads, rows, dim = x.shape
    place = launch.device(x.device)
    with Sender(place, stream) as send:
        values = {"heads": heads, "rows": rows, "dim": dim, **_turns(send, frequencies, interleaved)}
        if offset is not None:
            values |= _vector(send, "start", offset)
            if type(offset) is DeviceArray:
                values["start"] = -rows
        if counts is not None:
            values |= {"counts": send(counts), "has_counts": 1}
        if lse is not None:
            values["has_lse"] = 1
        values |= _arrays(x=x, out=out, lse=lse)
        kernel = turn_kernel(str(storage_name(x.dtype)), str(storage_name(out.dtype)))
        launch.run(kernel, values, batch * heads * rows, place, stream)


def turn_call(
    x: DeviceArray, out: DeviceArray, place: launch.Device, frequencies: DeviceArray, interleaved: bool,
    differ: bool,
) -> launch.Call:  # fmt: skip
    """`turn` of arrays that lie so, to be told x, out, the position of row 0, and the address of more."""
    batch, heads, rows, dim = x.shape
    values = {"heads": heads, "rows": rows, "dim": dim, "has_starts": int(differ)}
    values |= {"frequencies": frequencies.address, "pairs": frequencies.size, "interleaved": int(interleaved)}
    kernel = turn_kernel(str(storage_name(x.dtype)), str(storage_name(out.dtype)))
    values |= _arrays(x=x, out=out)
    return launch.Call(kernel, values, batch * heads * rows, place, ("x", "out", "start", "starts"))


def gather(
    send: Sender,
    p: Any,
    pages: DeviceArray,
    scales: DeviceArray | None,
    bounds: tuple[NDArray[np.int64], NDArray[np.int64]],
) -> DeviceArray:
    """The rows (B, Hkv, n, D) of each sequence's positions within bounds, quantised ones as float32."""
    firsts, lasts = bounds
    batch, heads = len(firsts), pages.shape[2]
    dim = pages.shape[3] * (2 if p.storage == "int4" else 1)
    dtype = pages.dtype if scales is None else np.dtype(np.float32)
    rows = int((lasts - firsts).max(initial=0))
    out = send.empty((batch, heads, rows, dim), dtype)
    values = {
        "heads": heads, "rows": rows, "dim": dim, "firsts": send(firsts), "lasts": send(lasts),
        **_places(send, p), **_arrays(pages=pages, scales=scales), "out": out.address,
    }  # fmt: skip
    launch.run(gather_kernel(p.storage), values, batch * rows, send.place, send.stream)
    return out


def _sent(send: Sender, x: NDArray[Any]) -> DeviceArray:
    once = np.ascontiguousarray(x)
    return DeviceArray(send(once), once.shape, once.strides, once.dtype, send.place.ordinal, send.stream)


def _vector(send: Sender, name: str, vector: Any) -> dict[str, int]:
    """A number of each sequence, or of all."""
    if type(vector) is DeviceArray:
        return {f"{name}s": vector.address, f"has_{name}s": 1}
    if (vector == vector[:1]).all():
        return {name: int(vector[0])}
    return {f"{name}s": send(vector), f"has_{name}s": 1}


def _places(send: Sender | None, p: Any) -> dict[str, int]:
    """Where positions lie."""
    values = {"ring": p.ring, "page_size": p.key_pages.shape[1], "table_width": p.page_table.shape[1]}
    if not is_in_order(p.page_table):
        values["has_table"] = 1
        if send is not None:  # else the address comes with each launch
            values["table"] = table_there(p.page_table, send)
    return values


def is_in_order(table: Any) -> bool:
    """Whether page b is all that sequence b has, as a table on the host says."""
    if type(table) is DeviceArray or table.shape[1] != 1:
        return False
    return bool((table[:, 0] == np.arange(len(table))).all())


def _turns(send: Sender, frequencies: Any, interleaved: bool) -> dict[str, int]:
    if frequencies is None or not frequencies.size:
        return {}
    address = frequencies.address if type(frequencies) is DeviceArray else send(frequencies)
    return {"frequencies": address, "pairs": frequencies.size, "interleaved": int(interleaved)}


def _arrays(**given: DeviceArray | None) -> dict[str, Any]:
    """Addresses, and strides in elements."""
    values: dict[str, Any] = {}
    for name, x in given.items():
        if x is not None:
            strides = tuple(stride // x.itemsize for stride in x.strides)
            values |= {name: x.address, f"{name}_strides": (*strides, *(0,) * (4 - len(strides)))}
    return values


# --- kernels ------------------------------------------------------------------------------------------------


def _number(storage: str) -> str:
    return "float64" if storage == "float64" else "float32"


def _kernel(
    name: str, build: Callable[..., Any], pointers: dict[str, str], numbers: tuple[str, ...]
) -> compiler.Kernel:
    strided = ("key", "value", "key_pages", "value_pages", "key_scales", "value_scales", "x", "out", "lse",
               "pages", "scales")  # fmt: skip
    return compiler.Kernel(
        name,
        build,
        (
            *((pointer, f"*{kind}") for pointer, kind in pointers.items()),
            *_PLACES,
            *((number, "int64") for number in (*_NUMBERS, *numbers)),
            *((f"{pointer}_strides", "int64x4") for pointer in pointers if pointer in strided),
        ),
        THREADS,
    )


@cache
def append_kernel(given: str, storage: str) -> compiler.Kernel:
    """The kernel that writes rows of a dtype into a cache."""
    new, stored = WORDS[given], PAGE_WORDS[storage]
    pointers = {"key": new, "value": new, "key_pages": stored, "value_pages": stored,
                "key_scales": "float32", "value_scales": "float32"}  # fmt: skip
    build = partial(_build, "build_append", given, storage, THREADS)
    return _kernel(f"append-{given}-{storage}", build, pointers, ("head_dim", "value_dim"))


@cache
def gather_kernel(storage: str) -> compiler.Kernel:
    """The kernel that collects a cache's rows."""
    out = WORDS.get(storage, "float32")
    pointers = {"pages": PAGE_WORDS[storage], "scales": "float32", "firsts": "int64", "lasts": "int64"}
    build = partial(_build, "build_gather", storage, THREADS)
    return _kernel(f"gather-{storage}", build, pointers | {"out": out}, ("dim",))


@cache
def turn_kernel(given: str, storage: str) -> compiler.Kernel:
    """The kernel that turns rows, or writes them in another dtype."""
    pointers = {"x": WORDS[given], "out": WORDS[storage], "lse": _number(storage)}
    build = partial(_build, "build_turn", given, storage, THREADS)
    return _kernel(f"turn-{given}-{storage}", build, pointers, ("dim", "has_lse"))


def kernels() -> list[compiler.Kernel]:
    """Every kernel that calls may start."""
    quantised = [
        (given, storage) for given in ("float32", "float16", "bfloat16") for storage in ("int8", "int4")
    ]
    casts = [("float16", "float32"), ("bfloat16", "float32"), ("float32", "float16"), ("float32", "bfloat16")]
    return [
        *(append_kernel(*pair) for pair in (*((s, s) for s in WORDS), *quantised)),
        *map(gather_kernel, PAGE_WORDS),
        *(turn_kernel(*pair) for pair in (*((s, s) for s in WORDS), *casts)),
    ]


def _build(name: str, *arguments: Any) -> Any:
    from . import token_kernels

    return getattr(token_kernels, name)(*arguments)
