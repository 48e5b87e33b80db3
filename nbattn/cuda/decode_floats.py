"""The two products of `decode_kernel` for float32: a number is the sum of three bfloat16, 8 bits of it each.

Of the nine products of the parts the six largest are summed. A product of queries and keys is a sum over a
head's numbers in any order, so a thread takes the numbers q, q + 4, q + 8 and q + 12 of each 16, which
``ldmatrix`` gives it, as the elements 2 q, 2 q + 1, 2 q + 8 and 2 q + 9 of its operand. Values it reads one
by one, as no instruction turns words of 32 bits. Queries of more than 64 numbers lie in shared memory.
"""

from __future__ import annotations

from typing import Any

from .decode_products import HALF, column, leaving, sharing, taking
from .decode_tiles import KEYS, Tile


def build(isa: Any, tile: Tile) -> tuple[Any, ...]:
    """What `decode_kernel` needs for float32, in the order of the last line."""
    jit, unroll, thread, flip = isa.jit, isa.unroll, isa.thread, isa.flip
    int32, int64, float32 = isa.int32, isa.int64, isa.float32
    load_matrices, load_shared, load_float = isa.load_matrices, isa.load_shared, isa.load_float
    load_shared_float = isa.load_shared_float
    select, select_int, fma, multiply = isa.select, isa.select_int, isa.fma, isa.multiply_bf16
    top_halves, below_half, word_of = isa.top_halves, isa.below_half, isa.word_of
    number_of, warp_barrier = isa.number_of, isa.warp_barrier
    width, pitch = tile.width, tile.pitch
    steps, value_tiles, words = width // 16, width // 8, pitch // 4
    leave, fetch, in_shared = leaving(isa), sharing(isa, tile)[1], tile.query_parts > 0
    n_queries = 4 if in_shared else 4 * steps

    @jit
    def split(x, y, target, at, apart):
        """The three parts of two numbers' words, as words of their own so far apart."""
        for part in range(3):
            unroll()
            target[at + part * apart] = top_halves(x, y)
            if part < 2:
                x, y = below_half(x), below_half(y)

    @jit
    def products(c, ci, left, at, apart, right):
        """c += left @ right, the products of the smallest parts first."""
        multiply(c, ci, left, at + 2 * apart, right, 4)
        multiply(c, ci, left, at, right, 8)
        multiply(c, ci, left, at + apart, right, 6)
        multiply(c, ci, left, at + apart, right, 4)
        multiply(c, ci, left, at, right, 6)
        multiply(c, ci, left, at, right, 4)

    @jit
    def begin_queries(p, x, target):
        """Queries are read when they are taken."""

    @jit
    def take_words(p, start, wanted, step, e, target, at, apart):
        c = int32(16 * step + 8 * e + (thread() & 3))
        y = load_float(start + 4 * int64(c), wanted & (c < p.head_dim))
        z = load_float(start + 4 * int64(c + 4), wanted & (c + 4 < p.head_dim))
        split(word_of(y), word_of(z), target, at, apart)

    @jit
    def score(s, kept, a, b, keys):
        """s = queries @ keys.T"""
        lane = int32(thread() & 31)
        first = int32(keys + (lane & 7) * pitch + (((lane >> 3) ^ (lane & 7)) << 4))
        for i in range(8):
            unroll()
            s[i] = float32(0)
        for step in range(steps):
            unroll()
            at = 4 * step
            if in_shared:
                fetch(kept, step)
                at = 0
            for n in range(2):
                unroll()
                load_matrices(b, 0, int32(flip(first, (step % 2) * 64) + (step // 2) * 128 + n * 8 * pitch))
                for e in range(2):
                    unroll()
                    split(b[2 * e], b[2 * e + 1], b, 4 + e, 2)
                products(s, 4 * n, kept, at, n_queries, b)

    @jit
    def add_values(o, s, seen, a, b, values):
        """o += weights @ values"""
        lane = int32(thread() & 31)
        g, q = int32(lane >> 2), int32(lane & 3)
        even = int32(values + 2 * q * pitch + (((g >> 2) ^ (2 * q)) << 4) + (g & 3) * 4)
        odd = int32(values + (2 * q + 1) * pitch + (((g >> 2) ^ (2 * q + 1)) << 4) + (g & 3) * 4)
        for e in range(4):
            unroll()
            split(word_of(s[2 * e]), word_of(s[2 * e + 1]), a, e, 4)
        for j in range(value_tiles):
            unroll()
            for e in range(2):
                unroll()
                at = (2 * j // 8) * 128 + e * 8 * pitch
                y = load_shared(int32(flip(even, (2 * j % 8) * 16) + at))
                z = load_shared(int32(flip(odd, (2 * j % 8) * 16) + at))
                split(y, z, b, 4 + e, 2)
            products(o, 4 * j, a, 0, 4, b)

    @jit
    def not_finite(values):
        """Whether a number of the tile is none, in what the thread looks at."""
        lane, bad = int32(thread() & 31), int32(0)
        for i in range(KEYS * words // 32):
            word = load_shared(int32(values + 4 * (lane + 32 * i)))
            bad |= select_int((word & 0x7F800000) == 0x7F800000, 1, 0)
        return bad != 0

    @jit
    def add_exactly(o, s, seen, values, weights):
        """`add_values` where some are not finite: key by key, and only to the rows that see it."""
        lane = int32(thread() & 31)
        g, q = int32(lane >> 2), int32(lane & 3)
        for h in range(2):
            unroll()
            leave(s, seen, weights, h)
            for key in range(HALF):
                first = int32(values + (HALF * h + key) * pitch + (((q >> 1) ^ key) << 4) + (q & 1) * 8)
                for r in range(2):
                    unroll()
                    weight = load_shared_float(int32(weights + 4 * ((g + 8 * r) * HALF + key)))
                    hidden = weight < float32(0)
                    for j in range(value_tiles):
                        unroll()
                        address = int32(flip(first, (2 * j % 8) * 16) + (2 * j // 8) * 128)
                        for e in range(2):
                            unroll()
                            x = number_of(load_shared(int32(address + 4 * e)))
                            at = 4 * j + 2 * r + e
                            o[at] = select(hidden, o[at], fma(weight, x, o[at]))
            warp_barrier()

    take_queries, n_kept = taking(isa, tile, take_words), 3 * n_queries
    return (
        begin_queries, take_queries, n_kept, score, add_values, add_exactly, not_finite, jit(column), 2,
    )  # fmt: skip
