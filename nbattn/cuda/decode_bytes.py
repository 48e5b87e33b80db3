"""The two products of `decode_kernel` where keys and values are bytes with a scale for each row.

Bytes become bfloat16 exactly. Queries, and weights times the values' scales, are sums of two bfloat16: 16
bits of each number. Scores are multiplied with the keys' scales. A product is a sum over a head's numbers in
any order, so a thread takes four bytes that lie together as the elements 2 q, 2 q + 1, 2 q + 8 and 2 q + 9 of
its operand, and queries likewise. Of values it gets the bytes of two columns for each of two keys: columns
with even numbers are one product, those with odd ones the next.
"""

from __future__ import annotations

from typing import Any

from .decode_products import query_row
from .decode_tiles import Tile


def build(isa: Any, tile: Tile) -> tuple[Any, ...]:
    """What `decode_kernel` needs for int8, in the order of the last line."""
    jit, unroll, thread, flip = isa.jit, isa.unroll, isa.thread, isa.flip
    int32, int64, float32 = isa.int32, isa.int64, isa.float32
    load_matrices, load_matrices_turned = isa.load_matrices, isa.load_matrices_turned
    load_shared_float, load_float, load_half = isa.load_shared_float, isa.load_float, isa.load_half
    select, multiply, pack = isa.select, isa.multiply_bf16, isa.pack_bf16
    low, high, low_f16 = isa.low_bf16, isa.high_bf16, isa.low_f16
    bytes_01, bytes_23, bytes_02, bytes_13 = isa.bytes_01, isa.bytes_23, isa.bytes_02, isa.bytes_13
    width, pitch, scales_at = tile.width, tile.pitch, tile.scales_at
    steps = width // 16
    n_queries = 4 * steps
    address = query_row(isa)

    @jit
    def begin_queries(p, x, target):
        """Queries are read when they are taken."""

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
            for step in range(steps):
                unroll()
                for e in range(2):
                    unroll()
                    c = int32(16 * step + 4 * q + 2 * e)
                    y, z = number(p, start, c, wanted), number(p, start, int32(c + 1), wanted)
                    word = pack(y, z)
                    at = 4 * step + 2 * e + r
                    kept[at] = word
                    kept[n_queries + at] = pack(float32(y - low(word)), float32(z - high(word)))

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
                for e in range(2):
                    unroll()
                    a[0], a[1] = bytes_01(b[2 * e + k]), bytes_23(b[2 * e + k])
                    multiply(s, 4 * e, kept, 4 * (2 * j + k), a, 0)
                    multiply(s, 4 * e, kept, n_queries + 4 * (2 * j + k), a, 0)
        for i in range(8):
            unroll()
            key = int32(2 * (lane & 3) + i % 2 + 8 * (i // 4))
            s[i] = float32(s[i] * load_shared_float(int32(keys + scales_at + 4 * key)))

    @jit
    def weigh(s, seen, values):
        """Multiply weights with the values' scales; of what a row does not see they may be NaN."""
        lane = int32(thread() & 31)
        for i in range(8):
            unroll()
            key = int32(2 * (lane & 3) + i % 2 + 8 * (i // 4))
            scale = load_shared_float(int32(values + scales_at + 4 * key))
            s[i] = select(((seen >> i) & 1) != 0, float32(s[i] * scale), float32(0))

    @jit
    def add_values(o, s, a, b, values):
        """o += weights @ values"""
        lane = int32(thread() & 31)
        first = int32(values + (lane & 15) * pitch + (((lane >> 4) ^ (lane & 7)) << 4))
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

    return begin_queries, take_queries, 2 * n_queries, score, weigh, add_values, None, None, column, 4
