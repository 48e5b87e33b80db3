"""Memory of caches on a GPU, and what comes there from the host: page tables, lengths, sinks."""

from __future__ import annotations

import threading
import weakref
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..device import DeviceArray, _contiguous
from . import launch
from .workspace import PER_THREAD, STREAMS


class Sender(ExitStack):
    """Small NumPy arrays on a GPU for what is launched meanwhile."""

    def __init__(self, place: launch.Device, stream: int) -> None:
        super().__init__()
        self.place, self.stream = place, stream
        self.enter_context(place.current())

    def __call__(self, array: NDArray[Any]) -> int:
        if launch.is_capturing(self.stream):
            msg = (
                "a graph cannot hold what lies on the host: pass sinks and alibi_slopes on the GPU, give all "
                "sequences the same number of new positions, and have keys and values in a cache"
            )
            raise ValueError(msg)
        array = np.ascontiguousarray(array)
        address = self.room(array.nbytes)
        if array.nbytes:
            launch.ask("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, self.stream)
        return address

    def room(self, size: int) -> int:
        """Memory of that many bytes."""
        return self.enter_context(launch.room(self.place, size, self.stream))

    def empty(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        """An array, whose elements may be anything."""
        size = int(np.prod(shape)) * dtype.itemsize
        strides = _contiguous(shape, dtype.itemsize)
        return DeviceArray(self.room(size), shape, strides, dtype, self.place.ordinal, self.stream)


class Owned:
    """Memory of a GPU for as long as this lives."""

    def __init__(self, place: launch.Device, size: int) -> None:
        self.ordinal = place.ordinal
        self.address = launch.allocate(place, max(size, 1))

    def __del__(self) -> None:
        if hasattr(self, "address"):
            launch.free(self.address, self.ordinal)

    def __reduce__(self) -> Any:
        msg = "what lies on a GPU cannot be copied or pickled; make another cache and append to it"
        raise TypeError(msg)


def empty(shape: tuple[int, ...], dtype: Any, place: launch.Device | None = None) -> DeviceArray:
    """An array of its own, on the current GPU unless another is named."""
    place = place or launch.device(launch.current_device())
    owner = Owned(place, int(np.prod(shape)) * dtype.itemsize)
    strides = _contiguous(shape, dtype.itemsize)
    return DeviceArray(owner.address, shape, strides, dtype, place.ordinal, 0, owner)


def is_captured(array: Any) -> bool:
    """Whether work on the array becomes part of a graph now."""
    return type(array) is DeviceArray and launch.is_capturing(array.stream)


def wait(array: DeviceArray) -> None:
    """Have all that was launched on the array's GPU be done."""
    with launch.device(array.device).current():
        launch.ask("cuCtxSynchronize")


def placed(array: NDArray[Any]) -> DeviceArray:
    """A copy of the array on the current GPU."""
    there = empty(array.shape, array.dtype)
    with launch.device(there.device).current(), launch.aside_from_captures():
        write(array, there, 0)
        launch.ask("cuStreamSynchronize", 0)  # streams that do not wait for the default one read it
    return there


def write(array: NDArray[Any], there: DeviceArray, stream: int) -> None:
    """Copy a small array to one on a GPU, in the stream's order."""
    with launch.device(there.device).current():
        if array.nbytes:
            launch.ask("cuMemcpyHtoDAsync_v2", there.address, array.ctypes.data, array.nbytes, stream)


def copy_page(pages: tuple[Any, ...], source: int, target: int, stream: int) -> None:
    """Copy a page of every array to another one."""
    with launch.device(pages[0].device).current():
        for x in pages:
            if x is not None:
                at, size = x.address, x.strides[0]
                launch.ask("cuMemcpyDtoDAsync_v2", at + target * size, at + source * size, size, stream)


# --- what changes from call to call -------------------------------------------------------------------------


def _whose(stream: int) -> int:
    """A number for each stream; the default streams of threads share one handle."""
    return -threading.get_ident() if stream == PER_THREAD else stream


class Kept:
    """A small array that changes, with a copy on the GPU for each stream, as its last launch has it."""

    def __init__(self) -> None:
        self.copies: dict[int, tuple[bytes, DeviceArray]] = {}

    def __call__(self, array: NDArray[Any], place: launch.Device, stream: int) -> int:
        """Where the array's numbers of now are."""
        key, numbers = _whose(stream), array.tobytes()
        have, there = self.copies.get(key, (b"", None))
        if there is None:
            if len(self.copies) >= STREAMS:
                self.copies.clear()
            there = empty(array.shape, array.dtype, place)
        if have != numbers:
            write(array, there, stream)
            self.copies[key] = numbers, there
        return there.address


class _Table:
    """A page table's copies on GPUs, by GPU and stream, each as of a change."""

    def __init__(self, table: NDArray[np.int64], number: int) -> None:
        self.table = weakref.ref(table, lambda _: _tables.pop(number, None))
        self.changes = 0
        self.copies: dict[tuple[int, int], tuple[NDArray[np.int64], DeviceArray, int]] = {}


_tables: dict[int, _Table] = {}
"""By the `id` of tables that caches keep."""


def keep(table: NDArray[np.int64], changes: int) -> None:
    """Have a table that will be used again stay on the GPU, to be sent when it has changed.

    It has not where `changes` is the same.
    """
    known = _tables.get(id(table))
    if known is None or known.table() is not table:
        known = _tables[id(table)] = _Table(table, id(table))
    known.changes = changes


def table_there(table: NDArray[np.int64] | DeviceArray, send: Sender) -> int:
    """Where on the GPU the table is, as int32."""
    if isinstance(table, DeviceArray):
        return table.address
    known = _tables.get(id(table))
    if known is None or known.table() is not table:
        return send(table.astype(np.int32))
    return table_at(table, send.place, send.stream)


def table_at(table: NDArray[np.int64], place: launch.Device, stream: int) -> int:
    """The same for a table that is kept."""
    known = _tables[id(table)]
    changes, key = known.changes, (place.ordinal, _whose(stream))
    have, there, as_of = known.copies.get(key, (None, None, -1))
    if there is not None and as_of == changes:
        return there.address
    if have is None or there is None:
        if len(known.copies) >= STREAMS:
            known.copies.clear()
        there = empty(table.shape, np.dtype(np.int32), place)
    if have is None or not np.array_equal(have, table):
        write(table.astype(np.int32), there, stream)
        have = table.copy()
    known.copies[key] = have, there, changes
    return there.address
