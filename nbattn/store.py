"""The memory of a key/value cache: how it is made, written, read, and which calls it remembers.

A `Store` is the memory, in pages; `Places` say where the sequences of a call lie in it. A contiguous cache is
a store of one page for each sequence.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import check, device
from .attention import AttentionOutput
from .call_layout import call_layout
from .check_cache import (
    check_counts,
    check_dtype,
    check_held,
    check_no_lengths,
    check_rotary,
    check_rows,
    check_size,
)
from .decode import Options, Pages, cache_problem, check_query, run, wide
from .device import DeviceArray
from .problem import INT4_GROUP, UNBOUNDED, AppendProblem, CacheProblem
from .reader import Reader, end_at

LINE = 64
"""Bytes of a cache line."""
PLANS = 16
"""Layouts of calls that a cache remembers, and groups of sequences."""
PLAN_NUMBERS = 1 << 16
"""Numbers of a query that takes so long that the checks do not matter."""


@cache
def _gpu() -> Any:
    return check.backend_module("append", "cuda")


class Places:
    """Where the sequences of a call lie, in arrays that change in place: plans keep their addresses."""

    def __init__(self, table: NDArray[np.int64], ring: int = 0) -> None:
        self.table = table  # (B, pages of a sequence)
        self.ring = ring
        self.starts = np.zeros(len(table), np.int64)  # (B,): the first position that a ring still holds
        self.lengths = np.zeros(len(table), np.int64)  # (B,)
        self.longest = self.shortest = 0
        self.changes = 0  # of the table
        self.went_back = False  # a ring, which then may hold less than its size
        self.there: Any = None  # the lengths on a GPU, as of the last `advance`, for graphs
        self.is_told = False  # whether launches find lengths there, which the cache still has
        self.reach = 0  # positions before a ring's end that recorded queries see
        self.recorded: Any = None  # `Places` of a graph's calls, where they are others
        self.writer: Any = None  # the plan of an append, which serves all layouts
        self.counts: Any = None  # of the latest append
        self.rewrite: tuple[int, Callable[..., Any], Any] | None = None
        """Appends as the latest one: how many rows, what makes them where the arrays lie so, the counts."""
        self.readers: dict[Any, Callable[..., Any] | None] = {}  # by layout
        self.latest: tuple[Any, ...] | None = None
        """Options of the latest call that one native call makes again, and what makes it (`Reader.again`)."""

    _PLANS = ("writer", "counts", "rewrite", "latest")

    def __getstate__(self) -> dict[str, Any]:
        """All but the plans, which know the addresses of these arrays, for copies and pickles."""
        return self.__dict__ | dict.fromkeys(self._PLANS) | {"readers": {}}

    def make_room(self, counts: NDArray[np.int64], each: int | None = None) -> None:
        """Give up the positions that a ring is about to overwrite: they are gone even if the write fails."""
        if self.ring:
            if each is not None and self.shortest + each >= self.ring and not self.went_back:
                np.add(self.lengths, each - self.ring, out=self.starts)  # a third of the time
            else:
                np.maximum(self.starts, self.lengths + counts - self.ring, out=self.starts)

    def grow(self, counts: NDArray[np.int64], each: int | None) -> None:
        """Have sequences be longer, all by as much where `each` says so."""
        if each is None or len(self.lengths) == 0:
            self.lengths += counts
            self.measure()
        else:
            self.longest += each  # first: Ctrl-C in between may leave it too large, but not too small
            self.lengths += counts
            self.shortest += each

    def measure(self) -> None:
        """Know the longest and the shortest of the lengths."""
        lengths = self.lengths.tolist()
        self.longest, self.shortest = max(lengths, default=0), min(lengths, default=0)


class Store:
    """The memory of a cache, and how it is written and read."""

    def __init__(
        self,
        sizes: tuple[int, int, Any, Any, Any],
        dtype: DTypeLike,
        rotary: tuple[Any, Any, Any],
        window: int | None,
        backend: str | None,
    ) -> None:
        pages, page_size, kv_heads, head_dim, value_dim = sizes
        heads, key_dim = check_size(kv_heads, "kv_heads"), check_size(head_dim, "head_dim")
        value_dim = key_dim if value_dim is None else check_size(value_dim, "value_dim")
        self.backend, self.window = backend, window
        check.backend_module("decode", backend)
        empty = self.gpu.empty if self.is_on_gpu else _empty
        frequencies, self.interleaved = check_rotary(key_dim, *rotary)
        self.frequencies: Any = frequencies
        if frequencies is not None and self.is_on_gpu:
            self.frequencies = self.gpu.placed(frequencies)
        storage, stored = check_dtype(dtype, self.is_on_gpu)
        # A head's rows lie together. On the CPU its pages do, too: in the order in which a sequence gets
        # them, the processor foresees the next one, and decode is 1.15 to 1.25 times as fast.
        shape = (pages, heads, page_size) if self.is_on_gpu else (heads, pages, page_size)
        by_row = (0, 2, 1) if self.is_on_gpu else (1, 2, 0)

        def lay(dtype: Any, *rest: int) -> Any:
            """(pages, page_size, heads, ...)"""
            return empty((*shape, *rest), dtype).transpose(*by_row, *range(3, 3 + len(rest)))

        arrays: list[Any] = []
        for width, name in ((key_dim, "head_dim"), (value_dim, "value_dim")):
            if storage == "int4" and width % INT4_GROUP:
                msg = f"{name} is {width}; an int4 cache needs a multiple of {INT4_GROUP}"
                raise ValueError(msg)
            arrays.append(lay(stored, width // 2 if storage == "int4" else width))
            scales = {"int8": (), "int4": (width // INT4_GROUP,)}.get(storage)
            arrays.append(None if scales is None else lay(np.dtype(np.float32), *scales))
        key, key_scales, value, value_scales = arrays
        self.pages = Pages(key, value, key_scales, value_scales, storage)
        self.streams: set[int] = set()  # that have used it since it was written last, on a GPU
        self.of_cupy = False  # whether the graph that was captured last is CuPy's
        self.kept: list[Any] = []  # turned queries of graphs, where no library has memory for graphs
        self.checked: dict[Any, NDArray[np.int64]] = {}  # by layout: counts of appends that need no checks

    @property
    def is_on_gpu(self) -> bool:
        """Whether its memory is a GPU's."""
        return self.backend == "cuda"

    @property
    def gpu(self) -> Any:
        """What writes and moves its memory there."""
        return _gpu()

    @property
    def nbytes(self) -> int:
        """The bytes of all keys, values and scales."""
        return sum(x.nbytes for x in self.pages[:4] if x is not None)

    # --- writing --------------------------------------------------------------------------------------------

    def check_new(
        self, key: ArrayLike, value: ArrayLike, lengths: ArrayLike | None, batch: int
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.int64]]:
        """New keys and values that fit the cache, and how many of them each sequence gets."""
        layout = None
        if self.is_on_gpu:
            key, value = self._placed({"key": key, "value": value}, {})
        elif lengths is None and type(key) is type(value) is np.ndarray:
            layout = (batch, key.shape, key.strides, key.dtype, key.flags.aligned,
                      value.shape, value.strides, value.dtype, value.flags.aligned)  # fmt: skip
            if (known := self.checked.get(layout)) is not None:
                return key, value, known
        k = check_rows(key, "key", batch, self.pages, 0, self.is_on_gpu)
        v = check_rows(value, "value", batch, self.pages, 1, self.is_on_gpu)
        if k.shape[2] != v.shape[2]:
            msg = f"key has {k.shape[2]} positions but value has {v.shape[2]}; both must match"
            raise ValueError(msg)
        counts = check_counts(lengths, batch, k.shape[2])
        if layout is not None and k is key and v is value:
            if len(self.checked) >= PLANS:
                self.checked.clear()
            self.checked[layout] = counts
        return k, v, counts

    def _placed(self, large: dict[str, Any], small: dict[str, Any]) -> tuple[Any, ...]:
        """A call's arrays as they lie: all on the host, or all but small ones on this cache's GPU."""
        found = device.placed(large, small)
        ordinal: Any = self.pages.key
        for name, x in found.items():
            if type(x) is DeviceArray and x.device != ordinal.device:
                msg = (
                    f"{name} lives on GPU {x.device} and the cache on GPU {ordinal.device}; copy one of them"
                )
                raise ValueError(msg)
        return tuple((found or large | small).values())

    def write(
        self, places: Places, key: NDArray[Any], value: NDArray[Any], counts: NDArray[np.int64]
    ) -> None:
        """Write what `check_new` returned behind each sequence's end."""
        self.order(key, writes=True)
        if places.writer is None:
            pages, module = self.pages, check.backend_module("append", self.backend)
            problem = AppendProblem(
                key=key,
                value=value,
                key_pages=pages.key,
                value_pages=pages.value,
                key_scales=pages.key_scales,
                value_scales=pages.value_scales,
                storage=pages.storage,
                page_table=places.table,
                ring=places.ring,
                starts=places.lengths,
                counts=counts,
                frequencies=self.frequencies,
                interleaved=self.interleaved,
            )
            places.writer = module.Plan(problem)
        is_recorded = self.in_a_graph(places, key) is not None
        places.writer.append(key, value, places.there if is_recorded else places.lengths, counts)
        if self.is_on_gpu:
            return
        # Layouts that were seen before have their own counts.
        if counts is places.counts and (places.rewrite is None or places.rewrite[2] is not counts):
            again = places.writer.again(key, value, places.lengths, counts)
            places.rewrite = None if again is None else (key.shape[2], again.run, counts)
        places.counts = counts

    def in_a_graph(self, places: Places, array: Any) -> Places | None:
        """Where calls lie of a graph that is captured on the array's stream; None where none is."""
        if not self.is_on_gpu:
            return None
        if type(places.table) is not DeviceArray:
            self.gpu.keep(places.table, places.changes)
        if type(array) is not DeviceArray and self.gpu.is_captured(self._here()):
            msg = "a graph is captured on the current stream and cannot hold arrays on the host"
            raise ValueError(msg)
        if not self.gpu.is_captured(array):
            return None
        self.of_cupy = device.is_of(array, "cupy")
        found = places if places.there is not None else places.recorded
        if found is None:
            count = len(places.lengths)
            msg = f"a graph is captured; before, call the cache's reserve for as many sequences, {count}"
            raise ValueError(msg)
        return found

    def on_current_stream(self) -> DeviceArray:
        """An array on the GPU, in the order of its current stream, for what no graph records."""
        here = self._here()
        if self.gpu.is_captured(here):
            msg = "a graph is captured on the current stream; change the cache's sequences before or after"
            raise ValueError(msg)
        return here

    def _here(self) -> DeviceArray:
        key: Any = self.pages.key
        return replace(key, stream=device.current_stream(key.device, self.of_cupy))

    def order(self, array: Any, *, writes: bool) -> None:
        """Wait, on a GPU, for what other streams have written, and to write also for what they have read.

        Nothing waits where all calls are on one stream, and in a graph, whose order is the caller's.
        """
        if not self.is_on_gpu:
            return
        stream = getattr(array, "stream", 0)
        if self.streams == {stream} or self.gpu.is_captured(array):
            return
        if self.streams and (writes or stream not in self.streams):
            self.gpu.wait(self.pages.key)
        self.streams = {stream} if writes else self.streams | {stream}

    def copy(self, page: int, own: int, filled: int, key: Any) -> None:
        """Copy the first rows of a page to another one, on a GPU in the order of work on new keys."""
        if self.is_on_gpu:
            stream = key.stream if type(key) is DeviceArray else 0
            self.gpu.copy_page(self.pages[:4], page, own, stream)
            return
        for array in self.pages[:4]:
            if array is not None:
                array[own, :filled] = array[page, :filled]

    # --- reading --------------------------------------------------------------------------------------------

    def attend(
        self,
        places: Places,
        query: ArrayLike,
        given: tuple[Any, ...],
        lengths: ArrayLike | None,
        return_lse: bool,
        out: NDArray[Any] | None,
        backend: str | None,
    ) -> NDArray[Any] | AttentionOutput:
        """Attention of the last positions' queries, as `KVCache.attend` says."""
        latest = places.latest
        if latest is not None and backend is out is lengths is None and return_lse is False:
            mask, bias, is_causal, window, scale, softcap, slopes, sinks = given
            causal, sides, factor, cap, again = latest
            if (
                is_causal is causal and window is sides and scale is factor and softcap is cap
                and mask is bias is slopes is sinks is None
            ):  # fmt: skip
                result = again(places, query)
                if result is not None:
                    return result
        layout: Any = None
        if backend is None or backend == (self.backend or "cpu"):
            if not self.is_on_gpu or (out is None and lengths is None):
                layout = call_layout(query, given, return_lse, self.is_on_gpu)
            if lengths is not None and layout is not None:
                layout = layout, "lengths"
            if (known := places.readers.get(layout)) is not None:
                result = known(places, query, out, given, lengths)
                if result is not None:
                    return result
        if self.is_on_gpu:
            query, out, given = self._on_gpu(query, out, given, backend)
        options = Options(*given)
        module = check.backend_module("decode", backend or self.backend)
        q = check_query(query, self.pages, len(places.lengths))
        counts = check_counts(lengths, len(places.lengths), q.shape[2])
        offset = places.lengths - counts
        in_graph = self.in_a_graph(places, q)
        self.order(q, writes=False)
        if in_graph is not None:
            check_no_lengths(lengths)
            if options.mask is not None or options.bias is not None:
                msg = "a graph cannot hold attention with a mask or bias, whose sizes change with lengths"
                raise ValueError(msg)
            places = in_graph
        problem = cache_problem(
            # Wide before they turn.
            self.turned(wide(q, self.pages), in_graph.there if in_graph else offset, backend),
            self.pages,
            page_table=places.table,
            ring=places.ring,
            starts=places.starts,
            lengths=places.lengths,
            longest=places.longest,
            offset=offset,
            options=options._replace(window_size=self.within_window(options.window_size)),
        )
        if in_graph is not None:
            room = self.pages.key.shape[1] * places.table.shape[1]
            if places.ring and problem.left + q.shape[2] > room:
                seen = problem.left + q.shape[2]
                msg = f"{q.shape[2]} queries see {seen} positions, and the ring holds {room}"
                raise ValueError(msg)
            if places.ring:
                if places.is_told:  # at once, too
                    check_held(places.starts, offset, problem.left)
                places.reach = max(places.reach, problem.left + q.shape[2])
            starts = np.zeros_like(places.starts)
            problem = replace(problem, key_lengths=places.there, key_starts=starts, max_keys=room)
            if self.frequencies is not None and not device.is_of(problem.query, "torch"):
                self.kept.append(problem.query)
        elif places.ring:
            check_held(places.starts, offset, problem.left)
        is_wanted = check.check_flag(return_lse, "return_lse")
        result, lse = run(module, problem, q.dtype, is_wanted, out, (query, *given))
        if type(result) is DeviceArray:
            if (counts < q.shape[2]).any():
                self.gpu.clear(result, lse, counts)
            if layout is not None and in_graph is None and lse is None:
                self._remember_on_gpu(places, layout, module, problem, q, result)
            result, lse = map(device.given_back, (result, lse))
            return result if lse is None else AttentionOutput(result, None, lse)
        if lengths is not None:
            end_at(counts, result, lse)
        is_small = q.size <= PLAN_NUMBERS and check.kernel_view(q) is q
        if layout is not None and is_small and not self._is_first(places, layout):
            rotary = None
            if self.frequencies is not None:
                kept = {"frequencies": self.frequencies, "interleaved": self.interleaved}
                turns = check.backend_module("append", self.backend)
                again = turns.rotate_again(wide(q, self.pages), offset, **kept)
                rotary = partial(turns.rotate, **kept), again
            reader = Reader(module, problem, result, return_lse, rotary)
            places.readers[layout] = reader.attend
        return result if lse is None else AttentionOutput(result, None, lse)

    def _remember_on_gpu(
        self,
        places: Places,
        layout: Any,
        module: ModuleType,
        problem: CacheProblem,
        given: DeviceArray,
        result: DeviceArray,
    ) -> None:
        """Make calls of this layout short from the third on, but where the stream is another."""
        if self._is_first(places, layout):
            return
        rotary = self.frequencies, self.interleaved
        later = module.later(problem, given, result, places, rotary)
        if later is None:
            return
        keep = self.gpu.keep
        queries, left = given.shape[2], problem.left
        is_long = places.ring and queries + left > places.ring
        # Theirs is what remembers it: they and their memory go without the garbage collector.
        the_store, the_places = weakref.ref(self), weakref.ref(places)

        def run(query: int, output: int, stream: int) -> bool:
            store, places = the_store(), the_places()
            if store is None or places is None or store.streams != {stream}:
                return False
            if is_long or places.went_back:
                check_held(places.starts, places.lengths - queries, left)
            if later.has_table:
                keep(places.table, places.changes)
            return later.forward(places, query, output, stream)

        repeated = device.repeated(run, result, result.shape)

        def again(places: Any, query: Any, out: Any, given: Any, lengths: Any) -> Any:
            """The output; None where this call is another."""
            return repeated(query)

        places.readers[layout] = again

    def _on_gpu(
        self, query: Any, out: Any, given: tuple[Any, ...], backend: str | None
    ) -> tuple[Any, Any, tuple[Any, ...]]:
        """A call's arrays as they lie, of a cache on a GPU."""
        if backend not in (None, "cuda"):
            msg = f'the cache lives on a GPU, where backend={backend!r} cannot read it; pass "cuda" or None'
            raise ValueError(msg)
        mask, bias, *numbers, slopes, sinks = given
        large = {"query": query, "mask": mask, "bias": bias, "out": out}
        query, mask, bias, out, slopes, sinks = self._placed(large, {"alibi_slopes": slopes, "sinks": sinks})
        return query, out, (mask, bias, *numbers, slopes, sinks)

    def _is_first(self, places: Places, layout: Any) -> bool:
        """Whether no call of this layout was seen; then it is from now on."""
        if layout in places.readers:
            return False
        if len(places.readers) >= PLANS:
            places.readers.clear()
        places.readers[layout] = None
        return True

    def turned(self, query: NDArray[Any], offset: Any, backend: str | None) -> NDArray[Any]:
        """Queries of a rotary cache, turned by their positions."""
        if self.frequencies is None:
            return query
        module = check.backend_module("append", backend or self.backend)
        source = check.kernel_view(query)
        result = check.new_array(source, source.shape, source.dtype)
        module.rotate(source, result, offset, self.frequencies, self.interleaved)
        return result

    def within_window(self, window_size: Any) -> Any:
        """The `window_size` of a call, narrowed by the ring's window."""
        if self.window is None:
            return window_size
        left, right = check.check_window(window_size, is_causal=False)
        return min(left, self.window - 1), -1 if right == UNBOUNDED else right


def _empty(shape: tuple[int, ...], dtype: np.dtype[Any] | type) -> NDArray[Any]:
    """An array that begins at a cache line: NumPy's large ones begin 16 bytes behind, and cut each vector."""
    count = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(count + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    return memory[start : start + count].view(dtype).reshape(shape)
