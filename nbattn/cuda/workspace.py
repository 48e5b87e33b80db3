"""Memory that a kernel's blocks leave sums in for one another, and counters that are 0 between launches."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from . import launch

_lock = threading.Lock()
_kept: dict[tuple[int, int], list[tuple[int, int]]] = {}
"""By GPU and stream: addresses and bytes of counters and of sums. A stream's launches take turns."""


@contextmanager
def workspace(place: launch.Device, counters: int, size: int, stream: int) -> Iterator[tuple[int, int]]:
    """The addresses of so many int32 counters and of so many bytes, for one launch on the stream.

    They are kept for the stream's next launch; a graph that is captured gets its own, as it may run on any.
    """
    counted = 4 * counters
    if launch.is_capturing(stream):
        with launch.room(place, counted, stream) as zeros, launch.room(place, size, stream) as sums:
            launch.ask("cuMemsetD8Async", zeros, 0, counted, stream)
            yield zeros, sums
        return
    with _lock, place.current():
        kept = _kept.setdefault((place.ordinal, stream), [(0, 0), (0, 0)])
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
        yield kept[0][0], kept[1][0]
