"""The two products of `decode_kernel` where keys and values are 4 bits, and 32 numbers share a scale.

As of bytes (`decode_bytes`), but a byte has number i of 32 in its low bits and number i + 16 in its high
ones. A thread's word is four bytes that lie together: of it bytes 0 and 2, and 1 and 3, are taken at once.
Scores of each group of 32 numbers are summed by themselves and multiplied with the keys' scales. Weights are
multiplied with each group's scales of values before they are split in two.
"""

from __future__ import annotations

from typing import Any

from .decode_bytes import halves
from .decode_products import scoring, sharing, taking
from .decode_tiles import GROUP, Tile


def build(isa: Any, tile: Tile) -> tuple[Any, ...]:
    """What `decode_kernel` needs for int4, in the order of the last line."""
    cuda, jit, unroll, thread, flip = isa.cuda, isa.jit, isa.unroll, isa.thread, isa.flip
    int32, float32, fma, select = isa.int32, isa.float32, isa.fma, isa.select
    load_matrices, load_matrices_turned = isa.load_matrices, isa.load_matrices_turned
    load_shared_float, multiply, pack = isa.load_shared_float, isa.multiply_bf16, isa.pack_bf16
    low, high, nibbles = isa.low_bf16, isa.high_bf16, isa.nibbles
    groups, pitch, scales_at = tile.width // GROUP, tile.pitch, tile.scales_at
    begin_score, fetch = scoring(isa, tile), sharing(isa, tile)[1]
    take_queries = taking(isa, tile, halves(isa, 1, 2))

    @jit
    def begin_queries(p, x, target):
        """Queries are read when they are taken."""

    @jit
    def scale_of(rows, group, n):
        """Of a group the scale of one of the four keys that the thread has scores of."""
        key = int32(2 * (thread() & 3) + n % 2 + 8 * (n // 2))
        return load_shared_float(int32(rows + scales_at + 64 * group + 4 * key))

    @jit
    def score(s, kept, a, b, keys):
        """s = queries @ keys.T"""
        sums = cuda.local.array(8, float32)
        first = begin_score(s, keys)
        for j in range(groups // 2):
            unroll()
            load_matrices(b, 0, int32(flip(first, (j % 4) * 32) + (j // 4) * 128))
            for k in range(2):
                unroll()
                for i in range(8):
                    unroll()
                    sums[i] = float32(0)
                for n in range(2):  # numbers up to 15, and from 16 on
                    unroll()
                    fetch(kept, 2 * (2 * j + k) + n)
                    for e in range(2):
                        unroll()
                        a[0], a[1] = nibbles(b[2 * e + k], 4 * n), nibbles(b[2 * e + k], 4 * n + 8)
                        multiply(sums, 4 * e, kept, 0, a, 0)
                        multiply(sums, 4 * e, kept, 4, a, 0)
                for n in range(4):
                    unroll()
                    scale = scale_of(keys, 2 * j + k, n)
                    for r in range(2):
                        unroll()
                        i = n // 2 * 4 + 2 * r + n % 2
                        s[i] = fma(sums[i], scale, s[i])

    @jit
    def add_values(o, s, seen, a, b, values):
        """o += weights @ values; of what a row does not see the values' scales may be NaN."""
        lane = int32(thread() & 31)
        first = int32(values + (lane & 15) * pitch + (((lane >> 4) ^ (lane & 7)) << 4))
        for j in range(groups // 2):
            unroll()
            load_matrices_turned(b, 0, int32(flip(first, (j % 4) * 32) + (j // 4) * 128))
            for k in range(2):
                unroll()
                for half in range(2):
                    unroll()
                    even = scale_of(values, 2 * j + k, 2 * half)
                    odd = scale_of(values, 2 * j + k, 2 * half + 1)
                    for r in range(2):
                        unroll()
                        e = 2 * half + r
                        y, z = float32(s[2 * e] * even), float32(s[2 * e + 1] * odd)
                        y = select(((seen >> (2 * e)) & 1) != 0, y, float32(0))
                        z = select(((seen >> (2 * e + 1)) & 1) != 0, z, float32(0))
                        word = pack(y, z)
                        a[e] = word
                        a[4 + e] = pack(float32(y - low(word)), float32(z - high(word)))
                for n in range(4):  # low bits of even columns, of odd ones, high bits likewise
                    unroll()
                    shift = 8 * (n % 2) + 4 * (n // 2)
                    b[4], b[5] = nibbles(b[2 * k], shift), nibbles(b[2 * k + 1], shift)
                    at = 16 * (2 * j + k) + 4 * n
                    multiply(o, at, a, 0, b, 4)
                    multiply(o, at, a, 4, b, 4)

    @jit
    def column(k):
        """Of the numbers of a row that a thread has, in which column number k lies, after its first."""
        return k // 8 * 32 + k // 4 % 2 * 16 + k // 2 % 2 + k % 2 * 2

    return begin_queries, take_queries, 8, score, add_values, None, None, column, 4
