"""Attention over cached keys and values on the CPU: the kernel's parameters, and how many threads run it."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..problem import STORAGE_DTYPES, CacheProblem, Problem, storage_name
from ..reference.attention import merge_states
from . import arrays, chunks, layout, records, repeats, runtime, simd, team
from .chunks import CALL, CHUNK, MANY, PARAMETERS, PLACES, ROWS

_WORDS = records.words_of(PARAMETERS)
_CALL = struct.Struct(f"{len(CALL)}q")
_CALL_BYTES = 8 * _WORDS[CALL[0]]
_OFFSET = PLACES.index("offset")
MOST_ROWS = 256
"""Of a key head in one call of the kernel: each chunk's sums of each row are kept until all are there."""
SERIAL_WORK, SHORT_WORK = 1 << 22, 1 << 19
"""Numbers read and multiplied, 60 us of them, below which a call is not worth waking a second thread; and
8 us, below which it is not worth one that is awake.

Reading a key counts as much as four query rows on it."""


def forward(problem: CacheProblem, out: NDArray[Any], lse: NDArray[Any] | None) -> None:
    """Write attention to `out` (B, Hq, Sq, Dv) and `lse` (B, Hq, Sq)."""
    Plan(problem, out, lse).forward(problem.query, out, lse)


class Plan:
    """A call to be made again and again while a cache grows.

    The problem's arrays but its query are read where they lie each time, so that a cache may change lengths,
    starts, offsets and its page table in place. Queries, outputs and lse keep their layout: `out` and `lse`
    are examples of it, contiguous where there is none. Pages and their scales are the caller's to keep alive.
    """

    many: CacheProblem | None = None
    """The problem, where tiles take it."""
    parts: Sequence[tuple[int, int, Plan]] = ()
    """First query, one past the last, and the plan for these, where they are more than `MOST_ROWS`."""

    def __init__(
        self, problem: CacheProblem, out: NDArray[Any] | None = None, lse: NDArray[Any] | None = None
    ) -> None:
        p = problem
        batch, heads, queries, head_dim = p.query.shape
        if _is_many(p):
            self.many = p
            return
        value_dim = p.value_pages.shape[3] * (2 if p.storage == "int4" else 1)
        if out is None:
            out = np.empty((batch, heads, queries, value_dim), p.query.dtype)
        if lse is None:
            lse = np.empty((batch, heads, queries), p.compute)
        self.offset = p.offset
        kv_heads = p.key_pages.shape[2]
        each = max(MOST_ROWS // max(heads // max(kv_heads, 1), 1), 1)
        if queries > each:
            self.parts = [
                (
                    i,
                    i + each,
                    Plan(_some_queries(p, i, i + each), out[:, :, i : i + each], lse[:, :, i : i + each]),
                )
                for i in range(0, queries, each)
            ]
            return
        self.max_keys, self.longest = p.max_keys, chunks.longest_chunk(p.storage)
        self.keep_alive = (
            p.page_table, p.key_starts, p.key_lengths, p.offset, p.mask, p.bias, p.alibi_slopes, p.sinks
        )  # fmt: skip
        self.kernel = kernel(f"decode-{p.storage}")
        rows = heads // kv_heads * queries if kv_heads else 0
        blocks = -(-rows // ROWS)
        block_rows = -(-rows // blocks) if blocks else 1
        if block_rows > 2:
            block_rows = -(-block_rows // 4) * 4
        self.units = batch * kv_heads * blocks
        lanes = simd.lanes(p.compute)
        padded, padded_value = (-(-n // lanes) * lanes for n in (head_dim, value_dim))
        scratch = chunks.scratch_bytes(p.storage, p.compute, padded, padded_value)
        self.workspace_bytes = -(-scratch // 64) * 64
        self.partial_bytes = -(-chunks.partial_bytes(p.compute, block_rows + 3, padded_value) // 64) * 64
        # A row with an ordinary scale takes the raw products, and the scale goes into the softmax's exponent.
        plain = (
            1e-30 < p.scale < 1e30
            and not p.softcap
            and all(x is None for x in (p.bias, p.alibi_slopes, p.sinks))
        )
        values: dict[str, int] = {
            "workspace_bytes": self.workspace_bytes,
            "partial_bytes": self.partial_bytes,
            "bias_kind": 0 if p.bias is None else STORAGE_DTYPES.index(cast(str, storage_name(p.bias.dtype))),
            "table_width": p.page_table.shape[1],
            "page_size": max(p.key_pages.shape[1], 1),
            "ring": p.ring,
            "queries": queries,
            "head_dim": head_dim,
            "value_dim": value_dim,
            "key_bytes": max(p.key_pages.shape[3] * p.key_pages.itemsize, 1),
            "value_bytes": p.value_pages.shape[3] * p.value_pages.itemsize,
            "group": heads // kv_heads if kv_heads else 1,
            "heads": kv_heads,
            "blocks": blocks,
            "block_rows": block_rows,
            "left": p.left,
            "right": p.right,
            "plain": plain,
            "scale": runtime.bits(p.scale),
            "softcap": runtime.bits(p.softcap),
            "log2_scale": runtime.bits((p.scale if plain else 1.0) / math.log(2)),
        }
        for name, array, axes in (
            ("query", p.query, "bhs"), ("out", out, "bhs"), ("lse", lse, "bhs"),
            ("key", p.key_pages, "psh"), ("value", p.value_pages, "psh"),
            ("key_scales", p.key_scales, "psh"), ("value_scales", p.value_scales, "psh"),
            ("mask", p.mask, "bhqk"), ("bias", p.bias, "bhqk"), ("alibi_slopes", p.alibi_slopes, ""),
            ("sinks", p.sinks, ""), ("offset", p.offset, ""), ("key_starts", p.key_starts, ""),
            ("key_lengths", p.key_lengths, ""), ("page_table", p.page_table, ""),
        ):  # fmt: skip
            if array is not None:
                values[name] = runtime.address(array)
                values |= {f"{name}_{axis}": step for axis, step in zip(axes, array.strides, strict=False)}
        # Counters of finished chunks lie behind the record.
        words = [0] * (PARAMETERS.itemsize // 8 + self.units)
        for name, number in values.items():
            words[_WORDS[name]] = number
        self.words = np.array(words, np.int64)
        self.key, self.value = runtime.address(p.key_pages), runtime.address(p.value_pages)
        self.places = tuple(values.get(name, 0) for name in PLACES)
        self.span = min(p.left + p.right + queries, 1 << 40)
        self.work_per_key = batch * kv_heads * (rows + 4 * blocks) * (head_dim + value_dim)

    def forward(
        self,
        query: NDArray[Any],
        out: NDArray[Any],
        lse: NDArray[Any] | None = None,
        max_keys: int | None = None,
        pages: tuple[NDArray[Any], NDArray[Any]] | None = None,
        places: tuple[NDArray[Any] | None, ...] | None = None,
        offset: NDArray[np.int64] | None = None,
    ) -> None:
        """Attend `query`; no sequence has more than `max_keys` keys (the problem's where None is given).

        `pages` are other keys and values of the problem's layout, `places` its other arrays in the order of
        `PLACES`, and `offset` is another one of them alone.
        """
        if self.many is not None:
            keys = self.many.max_keys if max_keys is None else max_keys
            offset = self.many.offset if offset is None else offset
            attend_many(replace(self.many, query=query, max_keys=keys, offset=offset), out, lse)
            return
        if self.parts:
            if places is not None:
                offset = places[_OFFSET]
            all_offsets = self.offset if offset is None else offset
            for first, last, part in self.parts:
                some, offset = np.s_[:, :, first:last], all_offsets + first
                if places is not None:
                    places = (*places[:_OFFSET], offset, *places[_OFFSET + 1 :])
                sums = None if lse is None else lse[some]
                part.forward(query[some], out[some], sums, max_keys, pages, places, offset)
            return
        keys = self.max_keys if max_keys is None else max_keys
        count = self._chunks(keys)
        tasks = self.units * count
        if tasks == 0:
            return
        helpers, work = 0, self.work_per_key * min(keys, self.span)
        if work >= SHORT_WORK:
            helpers = min(runtime.threads(), tasks) - 1
        partials = tasks * self.partial_bytes
        memory, start = runtime.scratch(partials + (helpers + 1) * self.workspace_bytes)
        address = runtime.address
        where = self.places
        if places is not None:
            where = tuple(0 if x is None else address(x) for x in places)
        elif offset is not None:
            where = (*where[:_OFFSET], address(offset), *where[_OFFSET + 1 :])
        words: Any = self.words.copy()
        words[0] = tasks
        _CALL.pack_into(
            words, _CALL_BYTES,
            address(query), address(out), 0 if lse is None else address(lse),
            self.key if pages is None else address(pages[0]),
            self.value if pages is None else address(pages[1]),
            # Towards the end nobody takes a second task that others could begin at once.
            count, tasks - 8 * (helpers + 1), start, start + partials,
            *where,
        )  # fmt: skip
        run = team.run_among_awake if helpers > 0 and work < SERIAL_WORK else team.run
        run(self.kernel, words, helpers, (query, out, lse, pages, places, offset, self, memory))
        runtime.keep(memory)

    def _chunks(self, keys: int) -> int:
        """How many a row has at most."""
        seen, most, size = min(keys, self.span), 1, CHUNK
        longest = chunks.chunk_of(seen, self.longest)
        while size <= longest:
            # Rows that see fewer have shorter ones, of which they may have more.
            few = seen if size == longest else min(seen, 2 * MANY * size - 1)
            # They may begin amid a task, however far a window reaches: queries may be far behind the keys.
            most = max(most, min(-(-keys // size), (few - 1) // size + 2))
            size *= 2
        return most

    def again(
        self, inputs: tuple[Any, ...], out: NDArray[Any], max_keys: int | None = None
    ) -> repeats.Again | None:
        """What makes the call in one native call, for so many keys at most; see `attention.Repeat`."""
        if self.many is not None or self.parts or not arrays.KNOWN:
            return None
        keys = self.max_keys if max_keys is None else max_keys
        chunks = self._chunks(keys)
        tasks, work = self.units * chunks, self.work_per_key * min(keys, self.span)
        helpers = repeats.helpers(tasks, work, SHORT_WORK, SERIAL_WORK)
        if helpers is None:
            return None
        words: Any = self.words.copy()
        words[0] = tasks
        eager = tasks - 8 * min(helpers.most + 1, runtime.threads())
        _CALL.pack_into(words, _CALL_BYTES, 0, 0, 0, 0, 0, chunks, eager, 0, 0, *self.places)
        at = _WORDS
        places = repeats.Places(at["query"], at["key"], at["value"], at["out"], at["partials"],
                                at["workspace"], tasks * self.partial_bytes)  # fmt: skip
        return repeats.Again(self.kernel, words, places, helpers, self.workspace_bytes, inputs, out, self)


# --- many queries over cached keys --------------------------------------------------------------------------

RUN = 4096
"""Positions that are gathered from pages at once."""


def _is_many(p: CacheProblem) -> bool:
    """Whether tiles are faster, as for a prompt's next part.

    They take floating-point numbers alone: what is quantised is multiplied as it lies, 1.2 to 2.5 times as
    fast for whole prompts, 1.6 to 20 times for parts of them, unless a bias for each head is read beside it.
    They take them from arrays, and gathering those from pages takes as long as reading them for many rows.
    """
    rows = p.query.shape[1] // max(p.key_pages.shape[2], 1) * p.query.shape[2]
    if p.storage not in STORAGE_DTYPES:
        return p.storage == "int8" and p.bias is not None and rows > 192
    if _is_in_order(p):
        # For the keys that a cache will have, in time.
        return not are_few(p, rows, max(p.max_keys, 4096))
    limit = 256 if p.bias is None and p.mask is None else 48 if p.mask is None else 96
    return rows > limit * (2 if p.storage == "float32" else 1)


def _is_in_order(p: CacheProblem) -> bool:
    """Whether each page holds a whole sequence, from its first row on."""
    batch = len(p.page_table)
    in_order = p.page_table.shape[1] == 1 and (p.page_table[:, 0] == np.arange(batch)).all()
    return bool(in_order and not p.ring and not p.key_starts.any())


def _some_queries(p: CacheProblem, first: int, last: int) -> CacheProblem:
    mask, bias = (x if x is None else x[:, :, first:last] for x in (p.mask, p.bias))
    return replace(p, query=p.query[:, :, first:last], offset=p.offset + first, mask=mask, bias=bias)


def attend_many(p: CacheProblem, out: NDArray[Any], lse: NDArray[Any] | None) -> None:
    """Attention on tiles: of pages as they lie where each holds a whole sequence, else of gathered runs."""
    from .attention import forward as attend

    batch = len(p.page_table)
    if p.storage in STORAGE_DTYPES and _is_in_order(p):
        whole = (x[:batch].transpose(0, 2, 1, 3)[:, :, : p.max_keys] for x in (p.key_pages, p.value_pages))
        attend(_tiled(p, slice(0, batch), 0, *whole, first=True), out, lse, None)
        return
    queries = p.query.shape[2]
    for b in range(batch):
        one = slice(b, b + 1)
        first = max(int(p.key_starts[b]), int(p.offset[b]) - p.left)
        last = max(first, min(int(p.key_lengths[b]), int(p.offset[b]) + queries + p.right))
        parts, sums = [], []
        for start in range(first, max(last, first + 1), RUN):
            key, value = _gather(p, b, start, min(start + RUN, last))
            part = np.empty((1, *out.shape[1:]), p.compute if last - first > RUN else out.dtype)
            part_lse = np.empty((1, *out.shape[1:3]), p.compute)
            problem = _tiled(p, one, start, key, value, first=start == first)
            wide = part.dtype != problem.query.dtype
            target = np.empty(part.shape, problem.query.dtype) if wide else part
            attend(problem, target, part_lse, None)
            part[...] = target
            parts.append(part)
            sums.append(part_lse)
        output, total = parts[0], sums[0]
        if len(parts) > 1:
            output, total = merge_states(np.array(parts), np.array(sums))
        out[one] = output
        if lse is not None:
            lse[one] = total


def _tiled(
    p: CacheProblem, chosen: slice, start: int, key: NDArray[Any], value: NDArray[Any], *, first: bool
) -> Problem:
    """The problem of some sequences over keys from a position on; sinks count once, in the first."""
    keys = key.shape[2]
    mask, bias = (x if x is None else x[chosen, :, :, start : start + keys] for x in (p.mask, p.bias))
    return Problem(
        query=p.query[chosen],
        key=key,
        value=value,
        storage="float32" if p.key_scales is not None else p.storage,
        batch=len(key),
        max_queries=p.query.shape[2],
        max_keys=keys,
        scale=p.scale,
        softcap=p.softcap,
        left=p.left,
        right=p.right,
        offset=p.offset[chosen] - start,
        key_lengths=np.clip(p.key_lengths[chosen] - start, 0, keys),
        mask=mask,
        bias=bias,
        alibi_slopes=p.alibi_slopes,
        sinks=p.sinks if first else None,
    )


def _gather(p: CacheProblem, b: int, start: int, stop: int) -> list[NDArray[Any]]:
    """The keys and values of positions, (1, Hkv, n, D), those of int8 as float32."""
    slots = np.arange(start, stop)
    if p.ring:
        slots %= p.ring
    page_size = p.key_pages.shape[1]
    at = p.page_table[b, slots // page_size], slots % page_size
    result = []
    for pages, scales in ((p.key_pages, p.key_scales), (p.value_pages, p.value_scales)):
        x = pages.swapaxes(1, 2)[at[0], :, at[1]]  # (n, Hkv, D)
        if scales is not None:
            factors = scales.swapaxes(1, 2)[at[0], :, at[1]]
            x = x * factors[..., None]
        result.append(x.swapaxes(0, 1)[None])
    return result


# --- attention of few queries that keeps no cache -----------------------------------------------------------


def is_few(p: Problem, queries: Any, keys: Any) -> Any:
    """Whether so many queries a sequence and key head (numbers or arrays) are better read off than tiled."""
    rows = p.query.shape[1] // max(p.key.shape[1], 1) * queries
    # Under a causal mask most of a short square is not worth reading.
    return are_few(p, rows, keys) & (queries <= np.maximum(16, keys // 8)) & (not p.bfloat16_products)


def are_few(p: Problem | CacheProblem, rows: Any, keys: Any) -> Any:
    """Whether so many query rows a key head are better read off from keys in arrays than tiled.

    Measured against the tiles on Zen 4 with 1, 4 and 8 heads a group, which makes no difference, and 256 to
    16384 keys. Tiles have 16, 32, 48, 64 or 128 rows, and take as long for fewer. From 4096 keys on reading
    off is 1.0 to 2 times as fast for up to 48 rows and for 65 to 96. With fewer keys bfloat16 is 1.0 to 1.7
    times as fast, float32 and float16 1.0 to 1.3 where tiles leave a quarter of a vector empty, 0.8 to 1.0
    where they fill it. Against AMX up to 8 rows of bfloat16 and 32 of float16, a quarter of that under 2048
    keys. Masks and biases are read number by number here.
    """
    kind, storage = layout.multiplies(p.storage, False), p.storage
    if p.bias is not None or p.mask is not None:
        return rows <= {"pairs": 16, "amx": 8}.get(kind, 32) // (2 if p.bias is None else 8)
    if kind in ("amx", "split"):
        limits = {"amx": 8}.get(kind, 32)
        return rows <= np.where(keys < 2048, limits // 4, limits)
    if simd.lanes(np.float32) < 16 or storage == "float64":
        return rows <= 32
    if storage == "float32":
        few = np.where(keys < 2048, (rows <= 40) & (-rows % 16 >= 4), rows <= 48)
    elif kind == "pairs":
        few = rows <= np.where(keys < 512, 32, 48)
    else:
        few = rows <= np.where(keys < 2048, 24, 48)
    return few | (keys >= 4096) & (rows > 64) & (rows <= 96)


def as_cache(p: Problem) -> CacheProblem:
    """The same call with each sequence's keys and values as one page."""
    return _cache_problem(
        p, p.query, np.arange(p.batch)[:, None], np.zeros(p.batch, np.int64), p.key_lengths, p.offset
    )


def attend_packed(p: Problem, few: NDArray[np.bool_], out: NDArray[Any], lse: NDArray[Any] | None) -> None:
    """Attend those of a packed problem's sequences that have few queries."""
    starts, key_starts = cast(Any, p.query_starts), cast(Any, p.key_starts)
    counts = np.diff(starts)
    for count in np.unique(counts[few]):
        chosen = np.flatnonzero(few & (counts == count))
        rows = starts[chosen, None] + np.arange(count)  # (sequences, count)
        query = np.ascontiguousarray(p.query[0][:, rows].swapaxes(0, 1))
        first = key_starts[chosen]
        problem = _cache_problem(
            p, query, np.zeros((len(chosen), 1), np.int64), first,
            first + p.key_lengths[chosen], first + p.offset[chosen],
        )  # fmt: skip
        part = np.empty((*query.shape[:3], out.shape[3]), out.dtype)
        part_lse = None if lse is None else np.empty(query.shape[:3], lse.dtype)
        forward(problem, part, part_lse)
        out[0][:, rows] = part.swapaxes(0, 1)
        if lse is not None:
            lse[0][:, rows] = cast(Any, part_lse).swapaxes(0, 1)


def _cache_problem(
    p: Problem,
    query: NDArray[Any],
    page_table: NDArray[np.int64],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    offset: NDArray[np.int64],
) -> CacheProblem:
    return CacheProblem(
        query=query,
        key_pages=p.key.transpose(0, 2, 1, 3),
        value_pages=p.value.transpose(0, 2, 1, 3),
        key_scales=None,
        value_scales=None,
        storage=p.storage,
        page_table=page_table,
        ring=0,
        key_starts=starts,
        key_lengths=lengths,
        max_keys=int((lengths - starts).max(initial=0)),
        scale=p.scale,
        softcap=p.softcap,
        left=p.left,
        right=p.right,
        offset=offset,
        mask=p.mask,
        bias=p.bias,
        alibi_slopes=p.alibi_slopes,
        sinks=p.sinks,
    )


def kernel_names(dtypes: Sequence[str]) -> list[str]:
    """The kernels that calls with these dtypes need."""
    return [f"decode-{dtype}" for dtype in dtypes]


def kernel(name: str) -> Any:
    """The compiled kernel of this name: "decode-" and the storage dtype."""
    return runtime.compiled(name, partial(chunks.build, name.partition("-")[2]))
