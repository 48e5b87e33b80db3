"""Attention of few queries over many keys on a GPU: which kernel, how it is cut, its parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..device import DeviceArray
from ..problem import CacheProblem, Problem
from . import arrays, compiler, launch
from .append import gather, is_in_order, table_there, turn
from .decode_tiles import KINDS, PARAMETERS, REACH, ROWS, STEP, Tile
from .mma import CAPABILITY, _aligned, has_runs
from .sending import Sender
from .workspace import workspace

TILES = (Tile(64, 6), Tile(128, 6), Tile(256, 3))
BYTE_TILES = (Tile(64, 8, 1), Tile(128, 8, 1), Tile(256, 4, 1, 2))
NIBBLE_TILES = (Tile(64, 4, 0.5, 2), Tile(128, 4, 0.5, 2), Tile(256, 7, 0.5, 2))
FLOAT_TILES = (Tile(64, 6, 4), Tile(128, 2, 4, 3))
"""A problem takes the first that is wide enough. At most 99 KB of shared memory."""
STORAGES = ("float16", "bfloat16", "int8", "int4", "float32")
CHUNKS = 32
"""Into how many chunks the keys that a cache has room for are cut."""
SHORTEST = 2 * STEP
PAGED_CHUNK = 512
"""Keys of a chunk where sequences are given by a table, whose width may be that of others."""
FEW_QUERIES, FEW_ROWS = 16, 64
"""More queries, or rows of a key head, go to the kernels of prompts, which read keys for more at once."""
SPARE, UNEVEN = 64 << 20, 4
"""Bytes of a launch's sums that do not matter, and how much more than they need uneven sequences may get."""
POINTERS = ("counters", "partials", "states")


def is_few(p: Problem) -> bool:
    """Whether a call without a cache is one of few queries over many keys."""
    rows = p.query.shape[1] // max(p.key.shape[1], 1) * p.max_queries
    few = 0 < p.max_queries <= FEW_QUERIES and rows <= FEW_ROWS
    return few and p.max_keys >= 16 * p.max_queries and p.query_starts is None and p.blocks is None


def as_cache(p: Problem) -> CacheProblem:
    """The same call with each sequence's keys and values as one page."""
    return CacheProblem(
        query=p.query,
        key_pages=p.key.transpose(0, 2, 1, 3),
        value_pages=p.value.transpose(0, 2, 1, 3),
        key_scales=None,
        value_scales=None,
        storage=p.storage,
        page_table=np.arange(p.batch)[:, None],
        ring=0,
        key_starts=np.zeros(p.batch, np.int64),
        key_lengths=p.key_lengths,
        max_keys=p.max_keys,
        scale=p.scale,
        softcap=p.softcap,
        left=p.left,
        right=p.right,
        offset=p.offset,
        mask=p.mask,
        bias=p.bias,
        alibi_slopes=p.alibi_slopes,
        sinks=p.sinks,
    )


def covers(problem: CacheProblem, out: Any) -> bool:
    """Whether the kernel computes this problem, which lies on a GPU."""
    p: Any = problem
    return (
        p.storage in STORAGES
        and tile_of(p) is not None
        and p.mask is None
        and p.bias is None
        and p.query.size > 0
        and p.key_pages.shape[2] > 0
        and (type(p.key_lengths) is DeviceArray or p.key_lengths.max(initial=0) + p.query.shape[2] < REACH)
        and p.page_table.size < REACH
        and has_runs(out)
        and all(has_runs(x) and _aligned(x) for x in (p.key_pages, p.value_pages))
        and has_runs(p.query)
        and (p.storage in ("int8", "int4", "float32") or _aligned(p.query))
        and launch.device(p.query.device).capability >= CAPABILITY
    )


def tile_of(p: CacheProblem) -> Tile | None:
    """The tile for a problem, None where none is wide enough."""
    widest = max(p.query.shape[3], _value_dim(p))
    return next((t for t in _tiles(p.storage) if t.width >= widest), None)


def _value_dim(p: CacheProblem) -> int:
    return p.value_pages.shape[3] * (2 if p.storage == "int4" else 1)


def _tiles(storage: str) -> tuple[Tile, ...]:
    return {"int8": BYTE_TILES, "int4": NIBBLE_TILES, "float32": FLOAT_TILES}.get(storage, TILES)


@cache
def kernel(storage: str, tile: Tile) -> compiler.Kernel:
    """The kernel as `launch` takes it."""
    return compiler.Kernel(
        name=f"decode-mma-{storage}-{tile.width}-{tile.slots}",
        build=partial(_build, storage, tile),
        parameters=PARAMETERS,
        threads=tile.threads,
        shared=tile.shared_bytes,
    )


def kernels() -> list[compiler.Kernel]:
    """Every kernel that calls may start."""
    return [kernel(storage, tile) for storage in STORAGES for tile in _tiles(storage)]


def _build(storage: str, tile: Tile) -> Any:
    from . import ptx
    from .decode_kernel import build

    return build(ptx, storage, tile)


# --- calls of caches ----------------------------------------------------------------------------------------


def forward(problem: CacheProblem, out: Any, lse: Any) -> None:
    """Write attention to `out` (B, Hq, Sq, Dv), and where wanted `lse` (B, Hq, Sq), contiguous.

    Each array of NumPy goes to the GPU for the call. Queries of a quantised cache, and `out` with them, may
    have 16 bits.
    """
    p: Any = problem
    if out.size == 0:
        return
    on_gpu = p.key_pages if type(p.key_pages) is DeviceArray else None
    if type(p.query) is DeviceArray:
        _attend(p, out, lse, p.query.stream)
        return
    with arrays.Copies(None if on_gpu is None else on_gpu.device) as copies:
        names = ("query", "mask", "bias", "alibi_slopes", "sinks", "key_pages", "value_pages", "key_scales",
                 "value_scales")  # fmt: skip
        there = replace(p, **{name: copies.send(getattr(p, name)) for name in names})
        _attend(there, copies.receive(out), copies.receive(lse), copies.stream)


def _attend(p: Any, out: Any, lse: Any, stream: int) -> None:
    with Sender(launch.device(p.query.device), stream) as send:
        p = replace(p, **{name: _sent(send, getattr(p, name)) for name in ("alibi_slopes", "sinks")})
        if is_few_of_cache(p) and covers(p, out):
            for part in parts(p, out, lse):
                prepared(*part, send)(send.place, send.stream, p.query)
        elif type(p.key_lengths) is DeviceArray:
            msg = (
                "a graph can hold attention of few queries without mask or bias, on a GPU with tensor cores, "
                "of a cache of any dtype but float64; this is another call"
            )
            raise ValueError(msg)
        elif p.key_scales is not None and p.query.dtype != np.float32:
            query, wide = (send.empty(x.shape, np.dtype(np.float32)) for x in (p.query, out))
            turn(p.query, query, stream)
            _any(send, replace(p, query=query), wide, lse)
            turn(wide, out, stream)
        else:
            _any(send, p, out, lse)


def parts(p: Any, out: Any, lse: Any) -> list[tuple[Any, Any, Any]]:
    """What each launch takes: all, or neighbours of like lengths where few are long.

    A launch has blocks and a place for their sums for as many chunks of each sequence as the longest has.
    """
    if type(p.key_lengths) is DeviceArray or is_in_order(p.page_table):
        return [(p, out, lse)]
    chunks, (row_blocks, block_rows) = [_chunks(p, n) for n in p.key_lengths.tolist()], _rows(p)
    each = p.key_pages.shape[2] * row_blocks * block_rows * 4 * cast(Tile, tile_of(p)).width
    if len(chunks) * max(chunks) * each <= SPARE:
        return [(p, out, lse)]
    firsts, total, most = [0], 0, 0
    for b, n in enumerate(chunks):
        count = b + 1 - firsts[-1]
        if count * max(most, n) > UNEVEN * (total + n):
            firsts, total, most = [*firsts, b], 0, 0
        total, most = total + n, max(most, n)
    found = []
    for first, last in zip(firsts, [*firsts[1:], len(chunks)], strict=True):
        some = slice(first, last)
        names = ("page_table", "key_starts", "key_lengths", "offset")
        arrays = {name: getattr(p, name)[some] for name in names}
        own = [None if x is None else _part(x, first, last - first) for x in (p.query, out, lse)]
        longest = int(arrays["key_lengths"].max(initial=0))
        found.append((replace(p, query=own[0], max_keys=longest, **arrays), own[1], own[2]))
    return found


def _sent(send: Sender, x: Any) -> Any:
    if not isinstance(x, np.ndarray):
        return x
    return DeviceArray(send(x), x.shape, x.strides, x.dtype, send.place.ordinal, send.stream)


def _any(send: Sender, p: Any, out: Any, lse: Any) -> None:
    """As attention without a cache: of pages as they lie, or of gathered rows."""
    from . import attention

    batch, queries = len(p.page_table), p.query.shape[2]
    in_order = is_in_order(p.page_table) and p.key_scales is None and not p.ring and not p.key_starts.any()
    if in_order:
        firsts, lasts = np.zeros(batch, np.int64), p.key_lengths
        key, value = (
            replace(x, shape=(batch, *x.shape[1:])).transpose(0, 2, 1, 3)
            for x in (p.key_pages, p.value_pages)
        )
    else:
        lasts = np.minimum(p.key_lengths, p.offset + queries + p.right)
        firsts = np.minimum(np.maximum(p.key_starts, p.offset - p.left), np.maximum(lasts, 0))
        lasts = np.maximum(firsts, lasts)
        if (p.mask is not None or p.bias is not None) and (firsts != firsts[0]).any():
            for b in range(batch):
                _any(send, _alone(p, b), _part(out, b), None if lse is None else _part(lse, b))
            return
        bounds = firsts, lasts
        key = gather(send, p, p.key_pages, p.key_scales, bounds)
        value = gather(send, p, p.value_pages, p.value_scales, bounds)
    first = int(firsts[0])
    mask, bias = (
        x if x is None else replace(x, address=x.address + first * x.strides[3]) for x in (p.mask, p.bias)
    )
    dense = Problem(
        query=p.query,
        key=key,
        value=value,
        storage="float32" if p.key_scales is not None else p.storage,
        batch=batch,
        max_queries=queries,
        max_keys=key.shape[2],
        scale=p.scale,
        softcap=p.softcap,
        left=p.left,
        right=p.right,
        offset=p.offset - firsts,
        key_lengths=lasts - firsts,
        mask=mask,
        bias=bias,
        alibi_slopes=p.alibi_slopes,
        sinks=p.sinks,
    )
    attention.run(dense, out, lse, None, send.stream)


def _alone(p: Any, b: int) -> Any:
    """Sequence b's part of a problem, in pages that are all of it."""
    names = ("query", "mask", "bias")
    parts = {name: None if (x := getattr(p, name)) is None else _part(x, b) for name in names}
    vectors = {name: getattr(p, name)[b : b + 1] for name in ("key_starts", "key_lengths", "offset")}
    if not is_in_order(p.page_table):
        return replace(p, **parts, **vectors, page_table=p.page_table[b : b + 1])
    pages = {
        name: None if (x := getattr(p, name)) is None else _part(x, b)
        for name in ("key_pages", "value_pages", "key_scales", "value_scales")
    }
    return replace(p, **parts, **vectors, **pages, page_table=np.zeros((1, 1), np.int64))


def _part(x: DeviceArray, b: int, count: int = 1) -> DeviceArray:
    return replace(x, address=x.address + b * x.strides[0], shape=(count, *x.shape[1:]))


def is_few_of_cache(p: Any) -> bool:
    queries = p.query.shape[2]
    rows = p.query.shape[1] // max(p.key_pages.shape[2], 1) * queries
    return 0 < queries <= FEW_QUERIES and rows <= FEW_ROWS


def later(problem: Any, given: Any, out: Any, places: Any, rotary: tuple[Any, bool]) -> Any:
    """What makes later calls like this one; None where it cannot."""
    from . import decode_steps

    return decode_steps.later(problem, given, out, places, rotary)


# --- parameters ---------------------------------------------------------------------------------------------


def chunk_of(p: CacheProblem) -> int:
    """How many keys a block takes: by what a sequence has room for, so that no other sequence changes it."""
    if not is_in_order(p.page_table):
        return PAGED_CHUNK
    room = p.ring or p.key_pages.shape[1]
    return max(SHORTEST, 1 << (-(-room // CHUNKS) - 1).bit_length())


def vectors(p: CacheProblem) -> dict[str, NDArray[Any]]:
    """What the kernel reads of a problem's NumPy arrays; a length or offset of all is a parameter."""
    found: dict[str, NDArray[Any]] = {}
    if type(p.key_lengths) is not DeviceArray:
        found = {"offsets": p.offset, "key_lengths": p.key_lengths}
        found = {name: x for name, x in found.items() if (x != x[:1]).any()}
    if p.key_starts.any():
        found["key_starts"] = p.key_starts
    if type(p.page_table) is np.ndarray and not is_in_order(p.page_table):
        found["page_table"] = p.page_table.astype(np.int32)
    return found


@dataclass(frozen=True)
class Start:
    """A kernel, what it is told, and the memory that its blocks share."""

    kernel: compiler.Kernel
    values: dict[str, Any]
    blocks: int
    units: int
    sums: int  # bytes
    states: int

    def __call__(self, place: launch.Device, stream: int, like: Any) -> None:
        """Start the kernel, for an array of the caller's."""
        place.function(self.kernel)  # others need not wait while it is compiled
        with workspace(place, self.units, self.sums + self.states, stream, like) as (counters, sums):
            more = self.shared(counters, sums)
            launch.run(self.kernel, self.values | more, self.blocks, place, stream)

    def shared(self, counters: int, sums: int) -> dict[str, int]:
        return {"counters": counters, "partials": sums, "states": sums + self.sums}


class Again:
    """A launch to be made again, of which only some pointers change, and the workspace with the stream."""

    def __init__(self, start: Start, place: launch.Device, pointers: tuple[str, ...]) -> None:
        self.start, self.place = start, place
        self.call = launch.Call(start.kernel, start.values, start.blocks, place, (*pointers, *POINTERS))

    def __call__(self, stream: int, *addresses: int) -> None:
        s = self.start
        with workspace(self.place, s.units, s.sums + s.states, stream) as (counters, sums):
            self.call(stream, *addresses, counters, sums, sums + s.sums)


def prepared(problem: CacheProblem, out: Any, lse: Any, send: Any) -> Start:
    """What writes attention to `out` (B, Hq, Sq, Dv) and maybe `lse` (B, Hq, Sq).

    `send` puts an array on the GPU and says where.
    """
    tile = cast(Tile, tile_of(problem))
    addresses = {name: send(x) for name, x in vectors(problem).items() if name != "page_table"}
    if not is_in_order(problem.page_table):
        addresses["page_table"] = table_there(problem.page_table, send)
    return start(kernel(problem.storage, tile), problem, out, lse, tile, addresses)


def start(
    kernel: compiler.Kernel, problem: CacheProblem, out: Any, lse: Any, tile: Tile, addresses: dict[str, int]
) -> Start:
    """The launch; `addresses` are those on the GPU of the arrays that `vectors` gives."""
    p: Any = problem
    values: dict[str, Any] = dict(addresses)
    for name, x, axes in (
        ("query", p.query, "bhs"), ("key", p.key_pages, "psh"), ("value", p.value_pages, "psh"),
        ("key_scales", p.key_scales, "psh"), ("value_scales", p.value_scales, "psh"),
        ("out", out, "bhs"), ("lse", lse, "bhs"), ("alibi_slopes", p.alibi_slopes, ""),
        ("sinks", p.sinks, ""),
    ):  # fmt: skip
        if x is not None:
            values[name] = x.address
            values |= {f"{name}_{axis}": step for axis, step in zip(axes, x.strides, strict=False)}
    batch, heads, queries, head_dim = p.query.shape
    kv_heads, (row_blocks, block_rows) = p.key_pages.shape[2], _rows(p)
    chunk, chunks = chunk_of(p), _chunks(p, p.max_keys)
    values |= {
        "query_kind": KINDS.index(p.query.dtype.name),
        **_ends(p),
        "table_width": p.page_table.shape[1],
        "page_size": p.key_pages.shape[1],
        "ring": p.ring,
        "group": heads // kv_heads,
        "kv_heads": kv_heads,
        "row_blocks": row_blocks,
        "block_rows": block_rows,
        "queries": queries,
        "chunk": chunk,
        "chunks": chunks,
        "head_dim": head_dim,
        "value_dim": _value_dim(p),
        "left": p.left,
        "right": p.right,
        "scale": np.float32(p.scale),
        "softcap": p.softcap,
        "inverse_softcap": 1 / p.softcap if p.softcap else 0.0,
    }
    units = batch * kv_heads * row_blocks
    states = units * chunks * block_rows * 8
    return Start(kernel, values, units * chunks, units, states // 2 * tile.width, states)


def _rows(p: Any) -> tuple[int, int]:
    """How many blocks the rows of a key head are, and of how many rows each."""
    rows = p.query.shape[1] // p.key_pages.shape[2] * p.query.shape[2]
    return -(-rows // ROWS), min(rows, ROWS)


def _chunks(p: Any, keys: int) -> int:
    """Of a sequence of so many keys, how many chunks queries may see."""
    chunk, queries = chunk_of(p), p.query.shape[2]
    found = -(-keys // chunk) + bool(p.ring or p.key_starts.any())
    return max(1, min(found, (p.left + p.right + queries - 1) // chunk + 2))


def _ends(p: Any) -> dict[str, int]:
    """Where sequences end and queries stand, if all do at the same place or the GPU's memory knows."""
    if type(p.key_lengths) is DeviceArray:
        return {"key_lengths": p.key_lengths.address, "from_end": 1}
    return {"key_length": int(p.key_lengths[0]), "offset": int(p.offset[0])}
