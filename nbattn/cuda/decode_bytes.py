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

from .decode_products import query_row, sharing
from .decode_tiles import WARPS, Tile


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
    take_queries, fetch = taking(isa, tile, 2, 1), sharing(isa, tile)[1]

    @jit
    def begin_queries(p, x, target):
        """Queries are read when they are taken."""

    @jit
    def score(s, kept, a, b, keys):
        """s = queries @ keys.T"""
        lane = int32(thread() & 31)
        row = int32((lane & 7) + ((lane >> 4) << 3))
        first = int32(keys + row * pitch + ((((lane >> 3) & 1) ^ (lane & 7)) << 4))
        for i in range(8):
            unroll()
            s[i] = float32(0)
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


def taking(isa: Any, tile: Tile, between: int, apart: int) -> Callable[..., None]:
    """The function `take_queries` of a kernel for a quantised cache.

    Of four numbers that lie together in a row, a thread's word e has the one at ``e * between`` and another
    so far `apart`.
    """
    jit, unroll, thread, barrier = isa.jit, isa.unroll, isa.thread, isa.barrier
    int32, int64, float32 = isa.int32, isa.int64, isa.float32
    load_float, load_half, pack = isa.load_float, isa.load_half, isa.pack_bf16
    low, high, low_f16 = isa.low_bf16, isa.high_bf16, isa.low_f16
    address, put = query_row(isa), sharing(isa, tile)[0]
    in_shared, steps = tile.query_parts > 0, tile.width // 16
    takers = WARPS if in_shared else 1
    n_queries = 4 * steps

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
    def take_queries(p, x, kept, source):
        """The rows as left operands: what bfloat16 holds of them, then what is left."""
        lane = int32(thread() & 31)
        g, q = int32(lane >> 2), int32(lane & 3)
        for r in range(2):
            unroll()
            row = int32(x.row0 + g + 8 * r)
            wanted = g + 8 * r < x.rows
            start = address(p, x, row)
            for i in range(steps // takers):
                unroll()
                step = int32(i)
                if in_shared:
                    step = int32(takers * i + (thread() >> 5))
                for e in range(2):
                    unroll()
                    c = int32(16 * step + 4 * q + between * e)
                    y, z = number(p, start, c, wanted), number(p, start, int32(c + apart), wanted)
                    word = pack(y, z)
                    rest = pack(float32(y - low(word)), float32(z - high(word)))
                    if in_shared:
                        put(step, 0, 2 * e + r, word)
                        put(step, 1, 2 * e + r, rest)
                    else:
                        kept[4 * i + 2 * e + r] = word
                        kept[n_queries + 4 * i + 2 * e + r] = rest
        if in_shared:
            barrier()

    return take_queries
