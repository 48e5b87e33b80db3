"""The two products of `mma_kernel` for float16 and bfloat16: one instruction for 16 x 8 x 16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .mma_tiles import Tile


class Products(NamedTuple):
    """Functions of a kernel, and how many registers of a thread they are given."""

    value_place: Callable[..., Any]
    load_queries: Callable[..., None]
    score: Callable[..., None]
    add_values: Callable[..., None]
    left: int  # words of left operands
    right: int
    parts: int  # numbers of sums that are not done


def build(isa: Any, storage: str, tile: Tile) -> Products:
    """The products of a kernel."""
    jit, unroll, int32, float32, flip = isa.jit, isa.unroll, isa.int32, isa.float32, isa.flip
    load_matrices, load_matrices_turned = isa.load_matrices, isa.load_matrices_turned
    half = storage == "float16"
    multiply = isa.multiply_f16 if half else isa.multiply_bf16
    pack = isa.pack_f16 if half else isa.pack_bf16
    keep, warp_tiles, scores_of, sums_of = tile.keep, tile.warp_tiles, tile.scores, tile.sums
    key_tiles, value_tiles = tile.keys // 8, tile.value_width // 8
    steps, value_steps = tile.width // 16, tile.keys // 16
    n_scores, n_queries = warp_tiles * scores_of, 4 * warp_tiles
    pitch, value_pitch = tile.pitch, tile.value_pitch

    @jit
    def value_place(lane):
        """Where in a tile of values a lane's address is."""
        return int32((lane & 15) * value_pitch + (((lane >> 4) ^ (lane & 7)) << 4))

    @jit
    def load_queries(fragment, index, address, step):
        """The warp's queries, columns 16 * step and on, as left operands."""
        for t in range(warp_tiles):
            unroll()
            x = int32(flip(address, (step % 4) * 32) + (step // 4) * 128 + t * 16 * pitch)
            load_matrices(fragment, index + 4 * t, x)

    @jit
    def score(s, a, b, kept, parts, query_address, key_address):
        """s = queries @ keys.T"""
        for i in range(n_scores):
            unroll()
            s[i] = float32(0)
        for step in range(steps):
            unroll()
            if not keep:
                load_queries(a, 0, query_address, step)
            address = int32(flip(key_address, (step % 4) * 32) + (step // 4) * 128)
            for j in range(key_tiles // 2):
                unroll()
                load_matrices(b, 0, int32(address + j * 16 * pitch))
                for t in range(warp_tiles):
                    unroll()
                    for e in range(2):
                        unroll()
                        c = t * scores_of + (2 * j + e) * 4
                        if keep:
                            multiply(s, c, kept, step * n_queries + 4 * t, b, 2 * e)
                        else:
                            multiply(s, c, a, 4 * t, b, 2 * e)

    @jit
    def add_values(o, s, a, b, parts, value_address):
        """o += weights @ values"""
        for step in range(value_steps):
            unroll()
            for t in range(warp_tiles):
                unroll()
                for e in range(4):
                    unroll()
                    c = t * scores_of + 8 * step + 2 * e
                    a[4 * t + e] = pack(s[c], s[c + 1])
            for j in range(value_tiles // 2):
                unroll()
                address = flip(value_address, (j % 4) * 32) + (j // 4) * 128 + step * 16 * value_pitch
                load_matrices_turned(b, 0, int32(address))
                for t in range(warp_tiles):
                    unroll()
                    for e in range(2):
                        unroll()
                        multiply(o, t * sums_of + (2 * j + e) * 4, a, 4 * t, b, 2 * e)

    return Products(value_place, load_queries, score, add_values, n_queries, 4, 1)
