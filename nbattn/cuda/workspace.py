"""Memory that a kernel's blocks leave sums in for one another, and counters that are 0 between launches."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .. import device
from . import launch

GRAPH_COUNTERS = 1 << 20
"""Counters of a GPU that calls in graphs take for good, 4 MB; later ones set theirs to 0 each time."""
PER_THREAD = 2
"""CU_STREAM_PER_THREAD"""
STREAMS = 64
"""How many streams of a GPU have memory: then it is given up, as who destroyed a stream does not say so."""
_lock = threading.Lock()
_kept: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
"""By GPU and stream: addresses and bytes of counters and of sums. A stream's launches take turns."""
_for_graphs: dict[int, list[int]] = {}
"""By GPU: the address of the next counter for graphs, and how many are left."""


@contextmanager
def workspace(
    place: launch.Device, counters: int, size: int, stream: int, like: Any = None
) -> Iterator[tuple[int, int]]:
    """The addresses of so many int32 counters and of so many bytes, for one launch on the stream.

    They are kept for the stream's next launch; a graph that is captured gets its own, as it may run on any.
    PyTorch's memory for graphs is best where the arrays, as `like`, are its own: a graph need not ask for it.
    """
    counted = 4 * counters
    if not launch.is_capturing(stream):
        with _lock, place.current():
            yield _kept_for(place, counted, size, stream)
        return
    sums: Any = None
    if device.is_of(like, "torch"):
        sums = device.new(like, (size,), np.dtype(np.uint8))
    with launch.room(place, 0 if sums else size, stream) as room:
        at = sums.address if sums else room
        if own := _taken(place, counters):
            yield own, at
            return
        with launch.room(place, counted, stream) as zeros:
            launch.ask("cuMemsetD8Async", zeros, 0, counted, stream)
            yield zeros, at


def _kept_for(place: launch.Device, counted: int, size: int, stream: int) -> tuple[int, int]:
    if place.ordinal not in _for_graphs:
        many = launch._handle("cuMemAllocAsync", 4 * GRAPH_COUNTERS, stream)
        launch.ask("cuMemsetD8Async", many, 0, 4 * GRAPH_COUNTERS, stream)
        launch.ask("cuStreamSynchronize", stream)  # once: graphs run on any stream
        _for_graphs[place.ordinal] = [many, GRAPH_COUNTERS]
    # The default streams of threads share one handle.
    key = place.ordinal, stream, threading.get_ident() if stream == PER_THREAD else 0
    if key not in _kept and sum(ordinal == place.ordinal for ordinal, *_ in _kept) >= STREAMS:
        _give_up(place.ordinal)
    kept = _kept.setdefault(key, [(0, 0), (0, 0)])
    for i, wanted in enumerate((counted, size)):
        address, have = kept[i]
        if have >= wanted:
            continue
        if address:  # after what the stream still does with it
            kept[i] = 0, 0
            launch.ask("cuMemFreeAsync", address, stream)
        new = launch._handle("cuMemAllocAsync", wanted, stream)
        if i == 0:
            launch.ask("cuMemsetD8Async", new, 0, wanted, stream)
        kept[i] = new, wanted
    return kept[0][0], kept[1][0]


def _give_up(ordinal: int) -> None:
    """Free what all streams of a GPU have, once it is done with all: some may be no more."""
    launch.ask("cuCtxSynchronize")
    for key in [key for key in _kept if key[0] == ordinal]:
        for address, _ in _kept.pop(key):
            if address:
                launch.ask("cuMemFree_v2", address)


def _taken(place: launch.Device, counters: int) -> int:
    """The address of counters that nobody else ever gets; 0 where there are none."""
    with _lock:
        found = _for_graphs.get(place.ordinal, [0, 0])
        if found[1] < counters:
            return 0
        address = found[0]
        _for_graphs[place.ordinal] = [address + 4 * counters, found[1] - counters]
        return address
