"""The two products of `decode_kernel` where keys and values are bytes with a scale for each row.

Bytes become bfloat16 exactly. Queries, and weights times the values' scales, are sums of two bfloat16: 16
bits of each number. Scores are multiplied with the keys' scales. A product is a sum over a head's numbers in
any order, so a thread takes four bytes that lie together as the elements 2 q, 2 q + 1, 2 q + 8 and 2 q + 9 of
its operand, and queries likewise; those of more than 128 numbers lie in shared memory. Of values it gets the
bytes of two columns for each of two keys: columns with even numbers are one product, those with odd ones the
next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .decode_products import scoring, sharing, taking
from .decode_tiles import Tile


def build(isa: Any, tile: Tile) -> tuple[Any, ...]:
    """What `decode_kernel` needs for int8, in the order of the last line."""
    jit, unroll, thread, flip = isa.jit, isa.unroll, isa.thread, isa.flip
    int32, float32 = isa.int32, isa.float32
    load_matrices, load_matrices_turned = isa.load_matrices, isa.load_matrices_turned
    load_shared_float, select, multiply, pack = (
        isa.load_shared_float, isa.select, isa.multiply_bf16, isa.pack_bf16,
    )  # fmt: skip
    low, high = isa.low_bf16, isa.high_bf16
    bytes_01, bytes_23, bytes_02, bytes_13 = isa.bytes_01, isa.bytes_23, isa.bytes_02, isa.bytes_13
    width, pitch, scales_at = tile.width, tile.pitch, tile.scales_at
    steps, in_shared = width // 16, tile.query_parts > 0
    n_queries = 4 if in_shared else 4 * steps
    begin_score, fetch = scoring(isa, tile), sharing(isa, tile)[1]
    take_queries = taking(isa, tile, halves(isa, 2, 1))

    @jit
    def begin_queries(p, x, target):
        """Queries are read when they are taken."""

    @jit
    def score(s, kept, a, b, keys):
        """s = queries @ keys.T"""
        first = begin_score(s, keys)
        for j in range(steps // 2):
            unroll()
            load_matrices(b, 0, int32(flip(first, (j % 4) * 32) + (j // 4) * 128))
            for k in range(2):
                unroll()
                at = 4 * (2 * j + k)
                if in_shared:
                    fetch(kept, 2 * j + k)
                    at = 0
                for e in range(2):
                    unroll()
                    a[0], a[1] = bytes_01(b[2 * e + k]), bytes_23(b[2 * e + k])
                    multiply(s, 4 * e, kept, at, a, 0)
                    multiply(s, 4 * e, kept, n_queries + at, a, 0)
        lane = int32(thread() & 31)
        for i in range(8):
            unroll()
            key = int32(2 * (lane & 3) + i % 2 + 8 * (i // 4))
            s[i] = float32(s[i] * load_shared_float(int32(keys + scales_at + 4 * key)))

    @jit
    def add_values(o, s, seen, a, b, values):
        """o += weights @ values; of what a row does not see the values' scales may be NaN."""
        lane = int32(thread() & 31)
        first = int32(values + (lane & 15) * pitch + (((lane >> 4) ^ (lane & 7)) << 4))
        for i in range(8):
            unroll()
            key = int32(2 * (lane & 3) + i % 2 + 8 * (i // 4))
            scale = load_shared_float(int32(values + scales_at + 4 * key))
            s[i] = select(((seen >> i) & 1) != 0, float32(s[i] * scale), float32(0))
        for e in range(4):
            unroll()
            word = pack(s[2 * e], s[2 * e + 1])
            a[e] = word
            a[4 + e] = pack(float32(s[2 * e] - low(word)), float32(s[2 * e + 1] - high(word)))
        for j in range(steps // 2):
            unroll()
            load_matrices_turned(b, 0, int32(flip(first, (j % 4) * 32) + (j // 4) * 128))
            for k in range(2):
                unroll()
                at = 8 * (2 * j + k)
                b[4], b[5] = bytes_02(b[2 * k]), bytes_02(b[2 * k + 1])
                multiply(o, at, a, 0, b, 4)
                multiply(o, at, a, 4, b, 4)
                b[4], b[5] = bytes_13(b[2 * k]), bytes_13(b[2 * k + 1])
                multiply(o, at + 4, a, 0, b, 4)
                multiply(o, at + 4, a, 4, b, 4)

    @jit
    def column(k):
        """Of the numbers of a row that a thread has, in which column number k lies, after its first."""
        return (k // 4) * 16 + k // 2 % 2 + k % 2 * 2

    return begin_queries, take_queries, 2 * n_queries, score, add_values, None, None, column, 4


def halves(isa: Any, between: int, across: int) -> Callable[..., None]:
    """The function `words` of `decode_products.taking` for a quantised cache.

    Of four numbers that lie together in a row, a thread's word e has the one at ``e * between`` and another
    so far `across`: what bfloat16 holds of them, then what is left.
    """
    jit, thread, int32, int64, float32 = isa.jit, isa.thread, isa.int32, isa.int64, isa.float32
    load_float, load_half, pack = isa.load_float, isa.load_half, isa.pack_bf16
    low, high, low_f16 = isa.low_bf16, isa.high_bf16, isa.low_f16

    @jit
    def number(p, row, c, wanted):
        """Number c of the query row at an address."""
        inside = wanted & (c < p.head_dim)
        if p.query_kind == 0:
            y = load_float(row + 4 * int64(c), inside)
        else:
            word = load_half(row + 2 * int64(c), inside)
            y = low_f16(word) if p.query_kind == 1 else low(word)
        return y

    @jit
    def words(p, start, wanted, step, e, target, at, apart):
        c = int32(16 * step + 4 * (thread() & 3) + between * e)
        y, z = number(p, start, c, wanted), number(p, start, int32(c + across), wanted)
        word = pack(y, z)
        target[at] = word
        target[at + apart] = pack(float32(y - low(word)), float32(z - high(word)))

    return words
