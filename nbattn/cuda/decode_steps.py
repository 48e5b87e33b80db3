"""A cache's attention step by step: what later calls need that lie as the first one did.

All that a launch is told is packed once. Of lengths and page tables that differ between sequences the GPU has
a copy, of which a stream's launch is told the address; it is sent when it has changed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..device import DeviceArray
from . import append, launch
from .append import is_in_order
from .decode import POINTERS, SPARE, Start, chunk_of, covers, is_few_of_cache, kernel, start, tile_of
from .decode_tiles import Tile
from .sending import Kept, empty, table_at, write
from .workspace import workspace

STEP_POINTERS = ("query", "out", "key_length", "offset", "key_lengths", "page_table", *POINTERS)
"""What changes from step to step; 0 where there is none."""


class Step:
    """A launch to be made again, after its queries turn where they do, and the workspace with the stream."""

    def __init__(self, made: Start, place: launch.Device, turn: launch.Call | None, turned: int) -> None:
        self.start, self.place, self.turn = made, place, turn
        self.turned_at = -(-(made.sums + made.states) // 256) * 256
        self.size = self.turned_at + turned
        self.call = launch.Call(made.kernel, made.values, made.blocks, place, STEP_POINTERS)

    def __call__(self, stream: int, query: int, out: int, length: int, offset: int, lengths: int, table: int,
                 first: int) -> None:  # fmt: skip
        s = self.start
        with workspace(self.place, s.units, self.size, stream) as (counters, sums):
            if self.turn is not None:
                turned = sums + self.turned_at
                self.turn(stream, query, turned, first, lengths)
                query = turned
            self.call(stream, query, out, length, offset, lengths, table, counters, sums, sums + s.sums)


class Later:
    """The steps of a call: only addresses and lengths change."""

    def __init__(
        self, problem: Any, given: DeviceArray, out: DeviceArray, places: Any, rotary: tuple[Any, bool]
    ) -> None:
        # The first call's arrays are not to be kept alive.
        self.problem = replace(problem, query=replace(problem.query, owner=None))
        self.given, self.out = (replace(x, owner=None) for x in (given, out))
        self.rotary = rotary
        self.chunk, self.queries = chunk_of(problem), problem.query.shape[2]
        self.place = launch.device(problem.query.device)
        self.lengths, self.has_table = Kept(), not is_in_order(places.table)
        self.launches: dict[tuple[int, bool], Step] = {}  # by how many chunks, and whether lengths differ

    def forward(self, places: Any, query: int, out: int, stream: int) -> bool:
        """Start the kernel for these addresses; not in a graph, which would keep the lengths."""
        length, queries = places.longest, self.queries
        differ = places.shortest != length
        if length < queries or launch.is_capturing(stream):
            return False
        chunks = -(-min(length, places.ring or length) // self.chunk)
        step = self.launches.get((chunks, differ))
        if step is None:
            step = self.launches[chunks, differ] = self._made(min(length, places.ring or length), differ)
        if differ and self.has_table and step.size > SPARE:
            return False  # lengths may be so uneven that launches are several
        lengths = self.lengths(places.lengths, self.place, stream) if differ else 0
        table = table_at(places.table, self.place, stream) if self.has_table else 0
        offset = length - queries
        step(stream, query, out, length, offset, lengths, table, -queries if differ else offset)
        return True

    def _made(self, keys: int, differ: bool) -> Step:
        p = self.problem
        ends = p.key_lengths
        if differ:  # the address comes with each launch
            ends = DeviceArray(0, p.key_lengths.shape, (8,), np.dtype(np.int64), self.place.ordinal)
        p = replace(p, key_lengths=ends, max_keys=keys)
        tile = cast(Tile, tile_of(p))
        made = start(kernel(p.storage, tile), p, self.out, None, tile, {})
        turn, frequencies = None, self.rotary[0]
        if frequencies is not None:
            turn = append.turn_call(self.given, p.query, self.place, frequencies, self.rotary[1], differ)
        return Step(made, self.place, turn, 0 if turn is None else p.query.nbytes)


def later(problem: Any, given: DeviceArray, out: Any, places: Any, rotary: tuple[Any, bool]) -> Later | None:
    """What makes a call of a cache again at other lengths; None where another kernel does.

    `given` are the queries as they came, before they turned.
    """
    p = problem
    if not (is_few_of_cache(p) and covers(p, out)):
        return None
    on_gpu = {
        name: _there(x, p.query) for name in ("alibi_slopes", "sinks") if (x := getattr(p, name)) is not None
    }
    # A ring's first positions are none that a query sees, as the store has checked.
    return Later(replace(p, key_starts=np.zeros_like(p.key_starts), **on_gpu), given, out, places, rotary)


def _there(x: NDArray[Any] | DeviceArray, query: DeviceArray) -> DeviceArray:
    if isinstance(x, DeviceArray):
        return x
    there = empty(x.shape, x.dtype, launch.device(query.device))
    write(np.ascontiguousarray(x), there, query.stream)
    return there
