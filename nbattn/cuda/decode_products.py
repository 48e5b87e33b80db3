"""The two products of `decode_kernel`: of queries and a tile of keys, of weights and a tile of values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .decode_tiles import KEYS, ROWS, WARPS, Tile

HALF = KEYS // 2


def query_row(isa: Any) -> Callable[..., Any]:
    """The function `address` of a kernel."""
    jit, int32, int64, quotient = isa.jit, isa.int32, isa.int64, isa.quotient

    @jit
    def address(p, x, row):
        """Where a row of the heads that share a key head begins: query `row % queries` of one of them."""
        head = quotient(row, int32(p.queries))
        query = int64(row - head * p.queries)
        return p.query + x.b * p.query_b + int64(x.h + head) * p.query_h + query * p.query_s

    return address


def sharing(isa: Any, tile: Tile) -> tuple[Callable[..., None], Callable[..., None]]:
    """The functions `put` and `fetch` of a kernel whose rows lie in shared memory as left operands."""
    jit, unroll, thread, int32 = isa.jit, isa.unroll, isa.thread, isa.int32
    shared_memory, store_shared, load_matrices = isa.shared_memory, isa.store_shared, isa.load_matrices
    steps, parts, queries_at = tile.width // 16, tile.query_parts, tile.queries_at

    @jit
    def put(step, part, word, x):
        """The thread's word of a part of 16 numbers' operand -> where `fetch` looks for it."""
        operand = int32(shared_memory() + queries_at + (part * steps + step) * 512)
        store_shared(int32(operand + word * 128 + 4 * (thread() & 31)), x, True)

    @jit
    def fetch(kept, step):
        """All parts of the operand of 16 numbers."""
        first = int32(shared_memory() + queries_at + step * 512 + 16 * (thread() & 31))
        for part in range(parts):
            unroll()
            load_matrices(kept, 4 * part, int32(first + part * steps * 512))

    return put, fetch


def taking(isa: Any, tile: Tile, words: Any) -> Callable[..., None]:
    """The function `take_queries` of a kernel that reads its queries number by number.

    ``words(p, start, wanted, step, e, target, at, apart)`` puts the first part of word e of what the thread
    has of 16 numbers of the row at `start` into ``target[at]``, and further parts so far `apart`.
    """
    jit, unroll, thread, int32, barrier = isa.jit, isa.unroll, isa.thread, isa.int32, isa.barrier
    address, put = query_row(isa), sharing(isa, tile)[0]
    steps, parts = tile.width // 16, tile.query_parts
    takers = WARPS if parts else 1

    @jit
    def take_queries(p, x, kept, source):
        """The rows as left operands, part by part."""
        g = int32((thread() & 31) >> 2)
        for r in range(2):
            unroll()
            row = int32(x.row0 + g + 8 * r)
            wanted = g + 8 * r < x.rows
            start = address(p, x, row)
            for i in range(steps // takers):
                unroll()
                step = int32(i)
                if parts:
                    step = int32(takers * i + (thread() >> 5))
                for e in range(2):
                    unroll()
                    if parts:
                        words(p, start, wanted, step, e, kept, 0, 1)
                        for part in range(parts):
                            unroll()
                            put(step, part, 2 * e + r, kept[part])
                    else:
                        words(p, start, wanted, step, e, kept, 4 * i + 2 * e + r, 4 * steps)
        if parts:
            barrier()

    return take_queries


def scoring(isa: Any, tile: Tile) -> Callable[..., Any]:
    """The function `begin_score` of a kernel that reads keys by ``ldmatrix``, 32 bytes of each at a time."""
    jit, unroll, thread, int32, float32 = isa.jit, isa.unroll, isa.thread, isa.int32, isa.float32
    pitch = tile.pitch

    @jit
    def begin_score(s, keys):
        """Scores of 0, and where the thread's row of a tile of keys begins."""
        for i in range(8):
            unroll()
            s[i] = float32(0)
        lane = int32(thread() & 31)
        row = int32((lane & 7) + ((lane >> 4) << 3))
        return int32(keys + row * pitch + ((((lane >> 3) & 1) ^ (lane & 7)) << 4))

    return begin_score


def leaving(isa: Any) -> Callable[..., None]:
    """The function `leave` of a kernel."""
    jit, unroll, thread, int32, float32 = isa.jit, isa.unroll, isa.thread, isa.int32, isa.float32
    select, store_shared_float, warp_barrier = isa.select, isa.store_shared_float, isa.warp_barrier

    @jit
    def leave(s, seen, weights, h):
        """Half h of the warp's weights -> its memory for them, rows of HALF; -1 where a row does not see."""
        lane = int32(thread() & 31)
        g, q = int32(lane >> 2), int32(lane & 3)
        for i in range(4):
            unroll()
            row, key = int32(g + 8 * (i // 2)), int32(2 * q + i % 2)
            x = select(((seen >> (4 * h + i)) & 1) != 0, s[4 * h + i], float32(-1))
            store_shared_float(int32(weights + 4 * (row * HALF + key)), x, True)
        warp_barrier()

    return leave


def column(k: int) -> int:
    """Of the numbers of a row that a thread has, in which column number k lies, after its first."""
    return (k // 2) * 8 + k % 2


def build(isa: Any, storage: str, tile: Tile) -> tuple[Any, ...]:
    """What `decode_kernel` needs for float16 or bfloat16, in the order of the last line."""
    jit, unroll, thread, flip = isa.jit, isa.unroll, isa.thread, isa.flip
    int32, int64, float32 = isa.int32, isa.int64, isa.float32
    load_matrices, load_matrices_turned = isa.load_matrices, isa.load_matrices_turned
    load_shared, load_shared_float = isa.load_shared, isa.load_shared_float
    warp_barrier, select, select_int, fma = isa.warp_barrier, isa.select, isa.select_int, isa.fma
    smaller, larger, copy_async = isa.smaller, isa.larger, isa.copy_async
    half = storage == "float16"
    multiply = isa.multiply_f16 if half else isa.multiply_bf16
    pack = isa.pack_f16 if half else isa.pack_bf16
    low, high = (isa.low_f16, isa.high_f16) if half else (isa.low_bf16, isa.high_bf16)
    exponent = 0x7C00 if half else 0x7F80  # all of its bits
    steps, value_tiles, pitch = tile.width // 16, tile.width // 8, tile.pitch
    address, leave, begin_score = query_row(isa), leaving(isa), scoring(isa, tile)
    words, panels = pitch // 4, pitch // 128

    @jit
    def begin_queries(p, x, target):
        """Start to copy the block's rows; what lies beyond the last one or its end is zeros."""
        lane = int32(thread() & 31)
        r, c, row_bytes = int32(lane >> 3), int32(lane & 7), int32(2 * p.head_dim)
        for i in range(ROWS // 4):
            unroll()
            row = int32(r + 4 * i)
            source = address(p, x, int32(x.row0 + row)) + int64(c * 16)
            for panel in range(panels):
                unroll()
                size = smaller(larger(int32(row_bytes - panel * 128 - c * 16), 0), 16)
                copy_async(
                    int32(target + row * pitch + panel * 128 + ((c ^ (row & 7)) << 4)),
                    source + panel * 128,
                    select_int(row < x.rows, size, 0),
                )

    @jit
    def take_queries(p, x, kept, source):
        """The rows as left operands."""
        lane = int32(thread() & 31)
        first = int32(source + (lane & 15) * pitch + (((lane >> 4) ^ (lane & 7)) << 4))
        for step in range(steps):
            unroll()
            load_matrices(kept, 4 * step, int32(flip(first, (step % 4) * 32) + (step // 4) * 128))

    @jit
    def score(s, kept, a, b, keys):
        """s = queries @ keys.T"""
        first = begin_score(s, keys)
        for step in range(steps):
            unroll()
            load_matrices(b, 0, int32(flip(first, (step % 4) * 32) + (step // 4) * 128))
            for e in range(2):
                unroll()
                multiply(s, 4 * e, kept, 4 * step, b, 2 * e)

    @jit
    def add_values(o, s, seen, a, b, values):
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
            leave(s, seen, weights, h)
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

    return (
        begin_queries, take_queries, 4 * steps, score, add_values, add_exactly, not_finite,
        isa.jit(column), 2,
    )  # fmt: skip
