"""The two products of `mma_kernel` for float32: three instructions for 16 x 8 x 8.

Tensor cores multiply numbers of 11 bits, tf32: float32 whose last 13 bits they do not read. So each operand x
is two of these, its upper bits, and the rest ``x - big``. Of their four products that of both rests is below
float32's own rounding and left out. Ootomo and Yokota, 2022, https://arxiv.org/abs/2203.03341.

As there, tensor cores cut sums off where float32 would round them, and over thousands of keys all in one
direction. So only short sums are made there, from 0, the small products' by themselves; ordinary additions,
which round, make long ones of them.

A query times a key takes the same addresses as for float16, in bytes. Weights are left operands as they lie:
a thread's columns 2 q and 2 q + 1 of the scores are what it should have as columns q and q + 4, so the rows
2 q and 2 q + 1 of the values are taken as rows q and q + 4. ``ldmatrix`` turns numbers of 16 bits only, so
values are read number by number, and with the same swizzle from 32 banks.

An infinite query or key has no rest and makes NaN of its scores; infinite values are left to `mma_mend`.
"""

from __future__ import annotations

from typing import Any

from .mma_products import Products
from .mma_tiles import Tile

NEAREST = 1 + 2.0**-12
"""Times this, a number of 13 bits, of which 11 are read, is rounded and not always cut."""
CHAIN = 4
"""Instructions that add to one sum: 32 columns."""


def build(isa: Any, tile: Tile) -> Products:
    """The products of a kernel."""
    jit, unroll, int32, float32, flip = isa.jit, isa.unroll, isa.int32, isa.float32, isa.flip
    load_matrices, load_shared, multiply = isa.load_matrices, isa.load_shared, isa.multiply_tf32
    cut, word_of, number_of = isa.cut, isa.word_of, isa.number_of
    warp_tiles, scores_of, sums_of = tile.warp_tiles, tile.scores, tile.sums
    key_tiles, value_tiles, chains = tile.keys // 8, tile.value_width // 8, tile.width // (8 * CHAIN)
    n_scores = warp_tiles * scores_of
    n_left, n_right, n_parts = n_scores, 4, n_scores  # of each half
    pitch, value_pitch = tile.pitch, tile.value_pitch

    @jit
    def value_place(lane):
        """Where in a tile of values a lane reads its first."""
        g, q = int32(lane >> 2), int32(lane & 3)
        return int32(2 * q * value_pitch + (((g >> 2) ^ (2 * q)) << 4) + ((g & 3) << 2))

    @jit
    def split(fragment, index, rest, x):
        """x as two words of a fragment."""
        big = cut(x)
        fragment[index] = word_of(big)
        fragment[index + rest] = word_of(float32(float32(x - big) * float32(NEAREST)))

    @jit
    def load_queries(fragment, index, address, step):
        """The warp's queries, columns 8 * step and on, as left operands."""
        for t in range(warp_tiles):
            unroll()
            x = int32(flip(address, (step % 4) * 32) + (step // 4) * 128 + t * 16 * pitch)
            load_matrices(fragment, index + 4 * t, x)
        for i in range(4 * warp_tiles):
            unroll()
            split(fragment, index + i, n_left, number_of(fragment[index + i]))

    @jit
    def multiply_all(parts, index, a, left, b, right):
        """The three products: to the sums at the index, and those with rests behind them."""
        multiply(parts, n_parts + index, a, n_left + left, b, right)
        multiply(parts, n_parts + index, a, left, b, n_right + right)
        multiply(parts, index, a, left, b, right)

    @jit
    def score(s, a, b, kept, parts, query_address, key_address):
        """s = queries @ keys.T"""
        for i in range(n_scores):
            unroll()
            s[i], parts[n_parts + i] = float32(0), float32(0)
        for chain in range(chains):
            unroll()
            for i in range(n_scores):
                unroll()
                parts[i] = float32(0)
            for k in range(CHAIN):
                unroll()
                load_queries(a, 0, query_address, chain * CHAIN + k)
                address = int32(flip(key_address, k * 32) + chain * 128)
                for j in range(key_tiles // 2):
                    unroll()
                    load_matrices(b, 0, int32(address + j * 16 * pitch))
                    for i in range(4):
                        unroll()
                        split(b, i, n_right, number_of(b[i]))
                    for t in range(warp_tiles):
                        unroll()
                        for e in range(2):
                            unroll()
                            multiply_all(parts, t * scores_of + (2 * j + e) * 4, a, 4 * t, b, 2 * e)
            for i in range(n_scores):
                unroll()
                s[i] = float32(s[i] + parts[i])
        for i in range(n_scores):
            unroll()
            s[i] = float32(s[i] + parts[n_parts + i])

    @jit
    def add_values(o, s, a, b, parts, value_address):
        """o += weights @ values"""
        for i in range(n_scores):
            unroll()
            split(a, i - i % 4 + i % 2 * 2 + i % 4 // 2, n_left, s[i])
        for j in range(value_tiles):
            unroll()
            for i in range(4 * warp_tiles):
                unroll()
                parts[i], parts[n_parts + i] = float32(0), float32(0)
            for k in range(key_tiles):
                unroll()
                for e in range(2):
                    unroll()
                    address = flip(value_address, (2 * j % 8 + e) * 16) + j // 4 * 128
                    word = load_shared(int32(address + (8 * k + e) * value_pitch))
                    split(b, e, n_right, number_of(word))
                for t in range(warp_tiles):
                    unroll()
                    multiply_all(parts, 4 * t, a, t * scores_of + 4 * k, b, 0)
            for i in range(4 * warp_tiles):
                unroll()
                at = i // 4 * sums_of + 4 * j + i % 4
                o[at] = float32(o[at] + float32(parts[i] + parts[n_parts + i]))

    return Products(value_place, load_queries, score, add_values, 2 * n_left, 2 * n_right, 2 * n_parts)
