"""Attention of float16 and bfloat16 on Hopper GPUs: which problems, which tiles, which parameters."""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..problem import Problem
from . import compiler, launch, mma
from .hopper_tiles import PARAMETERS, REACH, Tile

TILES = (
    Tile(64, 64, 128, groups=3, stages=2, turns=True),
    Tile(96, 96, 128, groups=2, stages=2, turns=True),
    Tile(128, 128, 128, groups=2, stages=2, turns=True),
    Tile(192, 128, 128, groups=2, stages=2, turns=False),
    Tile(192, 192, 96, groups=2, stages=2, turns=False),
    Tile(256, 256, 64, groups=2, stages=2, turns=False),
)
"""By what they cost: a problem takes the first that is wide enough."""
FULL_TILES = (
    *TILES[:2], TILES[2]._replace(keys=96), TILES[3]._replace(keys=64), *TILES[4:],
)  # fmt: skip
"""The same where options change scores, which takes registers."""
STORAGES = ("float16", "bfloat16")
CAPABILITY = (9, 0)
SECTION_BYTES = 32 << 20
"""Keys and values of so many bytes are read by blocks of one time: most of the L2 cache."""
BOX = 64
"""Columns that a copy brings at a time: 128 bytes."""
FLOAT16, BFLOAT16, SWIZZLE_128, PROMOTE_256 = 6, 9, 3, 3  # CU_TENSOR_MAP_*
LATEST = 64
"""Addresses for which a map is kept: calls in a loop come back to the same ones."""
Ints = tuple[int, ...]
Encode = Callable[[int, Ints, Ints, Ints, str], Any]


def covers(problem: Problem) -> bool:
    """Whether the kernel computes this problem, which lies on a GPU. Its output's rows must be runs too."""
    p: Any = problem
    return (
        p.storage in STORAGES
        and tile_of(p) is not None
        and all(x is None for x in (p.blocks, p.score_mod, p.mask_mod, p.mask, p.bias, p.alibi_slopes))
        and max(p.max_queries, p.max_keys) < REACH
        and max(x.shape[2] for x in (p.query, p.key, p.value)) < REACH  # packed ones have all rows there
        and all(mma.has_runs(x) and _has_map(x) for x in (p.query, p.key, p.value))
        and launch.device(p.query.device).capability == CAPABILITY
    )


def prepared(
    problem: Problem, out: Any, lse: Any, send: Callable[[NDArray[Any]], int]
) -> tuple[compiler.Kernel, dict[str, Any], int]:
    """What writes attention to `out` (B, Hq, Sq, Dv) and maybe `lse` (B, Hq, Sq): kernel, parameters, blocks.

    `send` puts an array on the GPU and says where.
    """
    p: Any = problem
    tile = cast(Tile, tile_of(p))
    addresses = {name: send(x) for name, x in mma.vectors(p).items()}
    return kernel(p.storage, tile, is_full(p)), *values(p, out, lse, tile, addresses, encode)


def _is_aligned(x: Any) -> bool:
    """Whether rows start at multiples of 16 bytes."""
    *outer, _ = zip(x.shape, x.strides, strict=True)
    return x.address % 16 == 0 and all(s % 16 == 0 for n, s in outer if n > 1)


def _has_map(x: Any) -> bool:
    """Whether a tensor map can say where rows lie: steps are ahead, and none is 0 as of broadcast axes."""
    *outer, _ = zip(x.shape, x.strides, strict=True)
    return _is_aligned(x) and all(0 < s < 1 << 40 for n, s in outer if n > 1)


def tile_of(p: Problem) -> Tile | None:
    """The tile for a problem, None where none is wide enough."""
    tiles, head_dim, value_dim = FULL_TILES if is_full(p) else TILES, p.query.shape[3], p.value.shape[3]
    return next((t for t in tiles if t.width >= head_dim and t.value_width >= value_dim), None)


def is_full(p: Problem) -> bool:
    """Whether scores are more than products with an ordinary scale, which the softmax's exponent takes in."""
    return not 1e-30 < p.scale < 1e30 or p.softcap != 0


@cache
def kernel(storage: str, tile: Tile, full: bool) -> compiler.Kernel:
    """The kernel as `launch` takes it."""
    t = tile
    name = f"attention-hopper-{storage}-{t.width}-{t.value_width}-{t.rows}-{t.keys}" + (
        "-full" if full else ""
    )
    return compiler.Kernel(
        name=name,
        build=partial(_build, storage, tile, full),
        parameters=PARAMETERS,
        threads=t.threads,
        shared=t.shared_bytes,
        registers=t.launch_registers,
    )


def kernels() -> list[compiler.Kernel]:
    """Every kernel that calls may start."""
    lists = ((False, TILES), (True, FULL_TILES))
    return [kernel(s, tile, full) for s in STORAGES for full, tiles in lists for tile in tiles]


def _build(storage: str, tile: Tile, full: bool) -> Any:
    from . import ptx, ptx_hopper
    from .hopper_kernel import build

    return build(ptx, ptx_hopper, storage, tile, full)


def values(
    p: Any, out: Any, lse: Any, tile: Tile, vectors: Mapping[str, int], encode: Encode
) -> tuple[dict[str, Any], int]:
    """The kernel's parameters by name, and its blocks.

    `vectors` has the addresses on the GPU of the arrays that `mma.vectors` gives; `encode` makes tensor maps.
    """
    found: dict[str, Any] = dict(vectors)
    for name, x in (("out", out), ("lse", lse), ("sinks", p.sinks)):
        if x is not None:
            found[name] = x.address
            if name != "sinks":
                found |= {f"{name}_{axis}": stride for axis, stride in zip("bhs", x.strides, strict=False)}
    for name, x, rows in arrays_of(p, tile):
        if 0 not in x.shape:  # of nothing there is no map, and it is not asked for
            found[f"{name}_map"] = encode(x.address, *map_of(x, rows), p.storage)
    heads, value_dim = p.query.shape[1], p.value.shape[3]
    units, blocks, group = heads * p.batch, -(-p.max_queries // tile.rows), heads // max(1, p.key.shape[1])
    row_bytes = 2 * (p.query.shape[3] + value_dim) * max(1, p.max_keys)
    section = max(1, SECTION_BYTES // row_bytes) * max(1, group)
    scale = np.float32(p.scale)
    found |= {
        "offset": int(p.offset[0]) if p.batch else 0,
        "key_length": int(p.key_lengths[0]) if p.batch else 0,
        "left": p.left,
        "right": p.right,
        "heads": heads,
        "group": group,
        "units": units,
        "section": min(section, max(1, units)),
        "blocks": blocks,
        "queries": p.max_queries,
        "value_dim": value_dim,
        "aligned": int(value_dim % 8 == 0 and _is_aligned(out)),
        "scale": scale,
        "log2_scale": (1.0 if is_full(p) else scale) / math.log(2),
        "softcap": p.softcap,
        "inverse_softcap": 1 / p.softcap if p.softcap else 0.0,
    }
    return found, blocks * units


def arrays_of(p: Problem, tile: Tile) -> tuple[tuple[str, Any, int], ...]:
    """The arrays that have tensor maps, and how many rows of each are copied at a time."""
    return ("query", p.query, tile.rows), ("key", p.key, tile.keys), ("value", p.value, tile.keys)


def map_of(x: Any, rows: int) -> tuple[Ints, Ints, Ints]:
    """Sizes, strides and box of the map of (B, H, S, D), the last axis first; so many rows at a time."""
    sequences, heads, length, head_dim = x.shape
    sizes, strides = (length, heads, sequences), x.strides[2::-1]
    # An axis of one may have any stride; a map's must be one that it takes.
    strides = tuple(s if n > 1 else -(-head_dim // 8) * 16 for n, s in zip(sizes, strides, strict=True))
    return (head_dim, *sizes), strides, (BOX, rows, 1, 1)


class Map:
    """What a tensor map says but for the address, swizzled by 128 bytes and with zeros beyond the ends."""

    def __init__(self, storage: str, sizes: Ints, strides: Ints, box: Ints) -> None:
        rank = len(sizes)
        self.kind, self.rank = FLOAT16 if storage == "float16" else BFLOAT16, rank
        self.made: dict[int, bytes] = {}
        self.lists = (
            (ctypes.c_uint64 * rank)(*sizes),
            (ctypes.c_uint64 * (rank - 1))(*strides),
            (ctypes.c_uint32 * rank)(*box),
            (ctypes.c_uint32 * rank)(*[1] * rank),
        )

    def at(self, address: int) -> bytes:
        """The 128 bytes that ``cuTensorMapEncodeTiled`` makes for an array there."""
        found = self.made.get(address)
        if found is None:
            if len(self.made) >= LATEST:
                self.made = {}
            found = self.made[address] = self._made(address)
        return found

    def _made(self, address: int) -> bytes:
        room = ctypes.create_string_buffer(8 * compiler.MAP_WORDS + 64)
        start = ctypes.addressof(room)
        start += -start % 64
        launch.ask(
            "cuTensorMapEncodeTiled", start, self.kind, self.rank, address, *self.lists, 0, SWIZZLE_128,
            PROMOTE_256, 0,
        )  # fmt: skip
        return ctypes.string_at(start, 8 * compiler.MAP_WORDS)


def encode(address: int, sizes: Ints, strides: Ints, box: Ints, storage: str) -> Ints:
    """The words of a tensor map."""
    return struct.unpack(f"{compiler.MAP_WORDS}Q", Map(storage, sizes, strides, box).at(address))


class Call(launch.Call):
    """A launch to be made again with other arrays of the same layout: tensor maps have their addresses."""

    def __init__(self, p: Problem, prepared: tuple[compiler.Kernel, dict[str, Any], int], place: Any) -> None:
        super().__init__(*prepared, place, ("out",))
        kernel, *_ = prepared
        tile = cast(Tile, tile_of(p))
        self.maps = [
            (kernel.offsets[f"{name}_map"], Map(p.storage, *map_of(x, rows)) if 0 not in x.shape else None)
            for name, x, rows in arrays_of(p, tile)
        ]

    def __call__(self, stream: int, *addresses: int) -> None:
        """Addresses of query, key, value and output."""
        if self.blocks == 0:
            return
        parameters = self.parameters[:]  # its own, as other threads may call too
        *inputs, out = addresses
        launch._put_pointer(parameters, self.offsets[0], out)
        for (offset, tensor_map), address in zip(self.maps, inputs, strict=True):
            if tensor_map is not None:
                parameters[offset : offset + 8 * compiler.MAP_WORDS] = tensor_map.at(address)
        self.start(parameters, stream)
