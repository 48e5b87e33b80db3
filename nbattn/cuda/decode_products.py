"""The two products of the decode kernel: of queries and a tile of keys, of weights and a tile of values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .decode_tiles import KEYS, Tile

HALF = KEYS // 2


def halves(isa: Any, storage: str, tile: Tile) -> tuple[Callable[..., Any], ...]:
    """`score`, `add_values`, `add_exactly`, `not_finite` and `column` for float16 or bfloat16."""
    jit, unroll, thread, flip = isa.jit, isa.unroll, isa.thread, isa.flip
    int32, float32 = isa.int32, isa.float32
    load_matrices, load_matrices_turned = isa.load_matrices, isa.load_matrices_turned
    load_shared, load_shared_float = isa.load_shared, isa.load_shared_float
    store_shared_float, warp_barrier = isa.store_shared_float, isa.warp_barrier
    select, select_int, fma = isa.select, isa.select_int, isa.fma
    half = storage == "float16"
    multiply = isa.multiply_f16 if half else isa.multiply_bf16
    pack = isa.pack_f16 if half else isa.pack_bf16
    low, high = (isa.low_f16, isa.high_f16) if half else (isa.low_bf16, isa.high_bf16)
    exponent = 0x7C00 if half else 0x7F80  # all of its bits
    steps, value_tiles, pitch = tile.width // 16, tile.width // 8, tile.pitch
    words = pitch // 4

    @jit
    def score(s, kept, b, keys):
        """s = queries @ keys.T"""
        lane = int32(thread() & 31)
        row = int32((lane & 7) + ((lane >> 4) << 3))
        first = int32(keys + row * pitch + ((((lane >> 3) & 1) ^ (lane & 7)) << 4))
        for i in range(8):
            unroll()
            s[i] = float32(0)
        for step in range(steps):
            unroll()
            load_matrices(b, 0, int32(flip(first, (step % 4) * 32) + (step // 4) * 128))
            for e in range(2):
                unroll()
                multiply(s, 4 * e, kept, 4 * step, b, 2 * e)

    @jit
    def add_values(o, s, a, b, values):
        """o += weights @ values"""
        lane = int32(thread() & 31)
        first = int32(values + (lane & 15) * pitch + (((lane >> 4) ^ (lane & 7)) << 4))
        for e in range(4):
            unroll()
            a[e] = pack(s[2 * e], s[2 * e + 1])
        for j in range(value_tiles // 2):
            unroll()
            load_matrices_turned(b, 0, int32(flip(first, (j % 4) * 32) + (j // 4) * 128))
            for e in range(2):
                unroll()
                multiply(o, (2 * j + e) * 4, a, 0, b, 2 * e)

    @jit
    def not_finite(values):
        """Whether a number of the tile is none, in what the thread looks at."""
        lane, bad = int32(thread() & 31), int32(0)
        for i in range(KEYS * words // 32):
            word = load_shared(int32(values + 4 * (lane + 32 * i)))
            bad |= select_int((word & exponent) == exponent, 1, 0)
            bad |= select_int((word >> 16 & exponent) == exponent, 1, 0)
        return bad != 0

    @jit
    def add_exactly(o, s, seen, values, weights):
        """`add_values` where some are not finite: key by key, and only to the rows that see it.

        `seen` has a bit for each of the thread's weights; `weights` is the warp's memory for them.
        """
        lane = int32(thread() & 31)
        g, q = int32(lane >> 2), int32(lane & 3)
        for h in range(2):
            unroll()
            for i in range(4):
                unroll()
                row, key = int32(g + 8 * (i // 2)), int32(2 * q + i % 2)
                x = select(((seen >> (4 * h + i)) & 1) != 0, s[4 * h + i], float32(-1))
                store_shared_float(int32(weights + 4 * (row * HALF + key)), x, True)
            warp_barrier()
            for key in range(HALF):
                address = int32(values + (HALF * h + key) * pitch + 4 * q)
                for r in range(2):
                    unroll()
                    weight = load_shared_float(int32(weights + 4 * ((g + 8 * r) * HALF + key)))
                    hidden = weight < float32(0)
                    for j in range(value_tiles):
                        unroll()
                        word = load_shared(int32(address + j // 8 * 128 + ((j % 8 ^ key) << 4)))
                        for e in range(2):
                            unroll()
                            x = high(word) if e else low(word)
                            at = 4 * j + 2 * r + e
                            o[at] = select(hidden, o[at], fma(weight, x, o[at]))
            warp_barrier()

    @jit
    def column(k):
        """Of the numbers of a row that a thread has, in which column number k lies, after its first."""
        return (k // 2) * 8 + k % 2

    return score, add_values, add_exactly, not_finite, column
