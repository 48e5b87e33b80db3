"""Attention on tensor cores: which problems, which tiles, which parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..problem import Problem
from . import compiler, launch
from .mma_tiles import PARAMETERS, REACH, Tile

TILES = (
    Tile(64, 64, 128, 64, 4, keep=False),
    Tile(96, 96, 128, 64, 4, keep=False),
    Tile(128, 128, 128, 64, 4, keep=False),
    Tile(192, 128, 128, 64, 8, keep=False),
    Tile(192, 192, 128, 64, 8, keep=False),
    Tile(256, 256, 64, 64, 4, keep=False),
)
"""By what they cost: a problem takes the first that is wide enough. At most 99 KB of shared memory."""
FULL_TILES = tuple(tile._replace(keys=32) if tile.width in (96, 128) else tile for tile in TILES)
"""The same where options change scores, which takes registers."""
WIDE_TILES = (
    Tile(64, 64, 128, 32, 4, keep=False, unit=4),
    Tile(96, 96, 64, 32, 4, keep=False, unit=4),
    Tile(128, 128, 64, 32, 4, keep=False, unit=4),
)
"""Of float32. Beyond 128 columns the sums and what three products need are more than the registers hold."""
FULL_WIDE_TILES = (WIDE_TILES[0]._replace(rows=64), *WIDE_TILES[1:])
STORAGES = ("float16", "bfloat16", "float32")
CAPABILITY = (8, 0)


def covers(problem: Problem) -> bool:
    """Whether the kernel computes this problem, which lies on a GPU. Its output's rows must be runs too."""
    p: Any = problem
    return (
        p.storage in STORAGES
        and tile_of(p) is not None
        and not p.bfloat16_products
        and p.blocks is None
        and p.score_mod is None
        and p.mask_mod is None
        and (p.mask is None or p.mask.dtype.itemsize == 1)
        and (p.bias is None or p.bias.dtype in (np.float32, p.query.dtype))
        and max(p.max_queries, p.max_keys) < REACH
        and all(has_runs(x) and _aligned(x) for x in (p.query, p.key, p.value))
        and launch.device(p.query.device).capability >= CAPABILITY
    )


def prepared(
    problem: Problem, out: Any, lse: Any, send: Callable[[NDArray[Any]], int]
) -> tuple[compiler.Kernel, dict[str, Any], int]:
    """What writes attention to `out` (B, Hq, Sq, Dv) and maybe `lse` (B, Hq, Sq): kernel, parameters, blocks.

    `send` puts an array on the GPU and says where.
    """
    p: Any = problem
    tile = cast(Tile, tile_of(p))
    addresses = {name: send(x) for name, x in vectors(p).items()}
    return kernel(p.storage, tile, is_full(p)), *values(p, out, lse, tile, addresses)


def has_runs(x: Any) -> bool:
    """Whether the last axis is a run of memory."""
    return x.shape[-1] <= 1 or x.strides[-1] == x.dtype.itemsize


def _aligned(x: Any) -> bool:
    """Whether rows start at multiples of 16 bytes."""
    *outer, _ = zip(x.shape, x.strides, strict=True)
    return x.address % 16 == 0 and all(stride % 16 == 0 for n, stride in outer if n > 1)


def tile_of(p: Problem) -> Tile | None:
    """The tile for a problem, None where none is wide enough."""
    head_dim, value_dim = p.query.shape[3], p.value.shape[3]
    tiles = tiles_of(p.storage, is_full(p))
    return next((t for t in tiles if t.width >= head_dim and t.value_width >= value_dim), None)


def tiles_of(storage: str, full: bool) -> tuple[Tile, ...]:
    if storage == "float32":
        return FULL_WIDE_TILES if full else WIDE_TILES
    return FULL_TILES if full else TILES


def is_full(p: Problem) -> bool:
    """Whether scores are more than products with an ordinary scale, which the softmax's exponent takes in."""
    options = (p.mask, p.bias, p.alibi_slopes, p.sinks)
    return not 1e-30 < p.scale < 1e30 or p.softcap != 0 or any(x is not None for x in options)


@cache
def kernel(storage: str, tile: Tile, full: bool) -> compiler.Kernel:
    """The kernel as `launch` takes it."""
    t = tile
    name = f"attention-mma-{storage}-{t.width}-{t.value_width}-{t.rows}-{t.keys}-{t.warps}"
    return compiler.Kernel(
        name=name + ("-kept" if t.keep else "") + ("-full" if full else ""),
        build=partial(_build, storage, tile, full),
        parameters=PARAMETERS,
        threads=t.threads,
        shared=t.shared_bytes,
    )


def kernels() -> list[compiler.Kernel]:
    """Every kernel that calls may start."""
    return [kernel(s, t, full) for s in STORAGES for full in (False, True) for t in tiles_of(s, full)]


def _build(storage: str, tile: Tile, full: bool) -> Any:
    from . import ptx
    from .mma_kernel import build

    return build(ptx, storage, tile, full)


def vectors(p: Problem) -> dict[str, NDArray[Any]]:
    """What the kernel reads of a problem's NumPy arrays; an offset or length of all is a parameter."""
    found = {"offsets": p.offset, "key_lengths": p.key_lengths}
    found = {name: x for name, x in found.items() if (x != x[:1]).any()}
    if p.query_starts is not None and p.key_starts is not None:
        found |= {"query_starts": p.query_starts, "key_starts": p.key_starts}
    return found


def values(p: Any, out: Any, lse: Any, tile: Tile, vectors: Mapping[str, int]) -> tuple[dict[str, Any], int]:
    """The kernel's parameters by name, and its blocks.

    `vectors` has the addresses on the GPU of the arrays that the function of that name gives.
    """
    found: dict[str, Any] = dict(vectors)
    for name, x, axes in (
        ("query", p.query, "bhs"), ("key", p.key, "bhs"), ("value", p.value, "bhs"), ("out", out, "bhs"),
        ("lse", lse, "bhs"), ("mask", p.mask, "bhqk"), ("bias", p.bias, "bhqk"),
        ("alibi_slopes", p.alibi_slopes, ""), ("sinks", p.sinks, ""),
    ):  # fmt: skip
        if x is not None:
            found[name] = x.address
            found |= {f"{name}_{axis}": stride for axis, stride in zip(axes, x.strides, strict=False)}
    heads, value_dim = p.query.shape[1], p.value.shape[3]
    blocks = -(-p.max_queries // tile.rows)
    scale = np.float32(p.scale)
    full = is_full(p)
    found |= {
        "bias_is_float32": int(p.bias is not None and p.bias.dtype == np.float32),
        "offset": int(p.offset[0]) if p.batch else 0,
        "key_length": int(p.key_lengths[0]) if p.batch else 0,
        "heads": heads,
        "group": heads // max(1, p.key.shape[1]),
        "blocks": blocks,
        "queries": p.max_queries,
        "head_dim": p.query.shape[3],
        "value_dim": value_dim,
        "aligned": int(value_dim % (16 // tile.unit) == 0 and _aligned(out)),
        "left": p.left,
        "right": p.right,
        "scale": scale,
        "log2_scale": (1.0 if full else scale) / math.log(2),
        "softcap": p.softcap,
        "inverse_softcap": 1 / p.softcap if p.softcap else 0.0,
    }
    return found, blocks * heads * p.batch
