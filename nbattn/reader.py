"""Attention over a cache that repeats an earlier call: only what may have changed is looked at."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import check
from .attention import AttentionOutput
from .check_cache import check_counts, check_held
from .problem import CacheProblem

if TYPE_CHECKING:
    from .store import Places


STEP = 64
"""Keys after which a growing cache's native calls are made anew, with the work that there is by then."""


class Reader:
    """Calls of one layout over the sequences of some `Places`.

    These keep their readers, and come with each call: if readers kept them, a cache's memory would wait for
    the garbage collector.
    """

    def __init__(
        self,
        module: ModuleType,
        problem: CacheProblem,
        result: NDArray[Any],
        return_lse: bool,
        rotary: tuple[Callable[..., None], Any] | None,
    ) -> None:
        """`rotary` turns queries: a function of them, an output and the offset; a native call, or None."""
        p = problem
        self.plan = module.Plan(p)
        self.forward, self.offset = self.plan.forward, p.offset
        self.memory = p.key_pages, p.value_pages, p.key_scales, p.value_scales
        self.shape, self.dtype = result.shape, result.dtype
        self.stored, self.compute = p.query.dtype, p.compute
        self.queries, self.left = p.query.shape[2], p.left
        self.every = np.array([self.queries])
        # A ring holds all that its window's queries see unless they are many, or it went back.
        self.is_long = p.ring > 0 and self.queries + p.left > p.ring
        self.return_lse, self.rotary = return_lse, rotary
        self.converts = self.dtype != self.stored
        self.is_plain = not (self.converts or self.is_long or (rotary is not None and rotary[1] is None))
        self.native: tuple[int, int, Any] = (0, -1, None)
        """What makes the call in one native call (`cpu.repeats`) of more keys than so many, up to so many."""

    def again(self, places: Places, query: Any) -> NDArray[Any] | None:
        """The latest call again, of another query; None where it lies otherwise, or much has changed."""
        (below, most, native), ring = self.native, places.ring
        keys = ring if 0 < ring < places.longest else places.longest
        if native is None or not below < keys <= most or places.went_back:
            return None
        offset = np.subtract(places.lengths, self.every, self.offset)
        if self.rotary is None:
            return native.run(query, *self.memory[:2])
        turned = self.rotary[1].run(query, offset, offset)
        return None if turned is None else native.run(turned, *self.memory[:2], native.KNOWN)

    def attend(
        self, places: Places, query: NDArray[Any], out: Any, given: tuple[Any, ...], lengths: ArrayLike | None
    ) -> NDArray[Any] | AttentionOutput:
        """As the cache's `attend`; `given` are its options, whose arrays `out` must not overlap."""
        counts, offset = self.every, self.offset
        if lengths is not None:
            # Of this call alone: another thread's may have other lengths.
            counts, offset = check_counts(lengths, len(places.lengths), self.queries), np.empty_like(offset)
        if out is not None:
            arrays = (query, *given[-2:], *self.memory)
            check.check_out(out, self.shape, self.dtype, tuple(x for x in arrays if x is not None))
        # Threads that attend at once write the same numbers here.
        np.subtract(places.lengths, counts, offset)
        if self.is_long or places.went_back:
            check_held(places.starts, offset, self.left)
        stored, shape, sums = self.stored, self.shape, None
        if self.converts:
            query = query.astype(stored)
        if self.rotary is not None:
            turn, natively = self.rotary
            if natively is not None:
                query = natively.run(query, offset, offset, natively.KNOWN)
            else:
                turned = np.empty(query.shape, stored)
                turn(query, turned, offset)
                query = turned
        keys = min(places.longest, places.ring or places.longest)
        native = None
        if lengths is None and not self.return_lse:
            native = self._native(query, keys)
        if native is not None:
            output = native.run(query, *self.memory[:2], native.KNOWN)
        else:
            output = np.empty(shape, stored)
            sums = np.empty(shape[:3], self.compute) if self.return_lse else None
            self.forward(query, output, sums, keys, offset=None if lengths is None else offset)
        if lengths is not None:
            end_at(counts, output, sums)
        if out is not None:
            out[...] = output
            output = out
        elif self.converts:
            output = output.astype(self.dtype)
        elif native is not None and self.is_plain:
            _, _, is_causal, window, scale, softcap, slopes, sinks = given
            if slopes is sinks is None and type(window) is not list:  # which may change in place
                places.latest = is_causal, window, scale, softcap, self.again
        return output if sums is None else AttentionOutput(output, None, sums)

    def _native(self, query: NDArray[Any], keys: int) -> Any:
        """What makes the call of so many keys natively; None where nothing does."""
        below, most, native = self.native
        if not below < keys <= most:
            most = -(-keys // STEP) * STEP
            example = np.empty(self.shape, self.stored)
            native = self.plan.again((query, *self.memory[:2]), example, most)
            self.native = most - STEP, most, native
        return native


def end_at(counts: NDArray[np.int64], output: NDArray[Any], lse: NDArray[Any] | None) -> None:
    """Rows (B, Hq, Sq, ...) beyond so many of each sequence attend to nothing."""
    queries = output.shape[2]
    for b, count in enumerate(counts.tolist()):
        if count < queries:
            output[b, :, count:] = 0
            if lse is not None:
                lse[b, :, count:] = -np.inf
