"""The second way of `mma_kernel` with a step's values, where one is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .mma_tiles import Tile


def build(isa: Any, storage: str, tile: Tile) -> tuple[Callable[..., Any], ...]:
    """The functions `mend` and `not_finite` of a kernel."""
    jit, unroll, reread_thread = isa.jit, isa.unroll, isa.reread_thread
    int32, float32, barrier, same = isa.int32, isa.float32, isa.barrier, isa.same
    load_shared, store_shared, or_shared = isa.load_shared, isa.store_shared, isa.or_shared
    select, select_int, fma, exchange_word = isa.select, isa.select_int, isa.fma, isa.exchange_word
    half, wide = storage == "float16", storage == "float32"
    low, high, number_of = isa.low_bf16, isa.high_bf16, isa.number_of
    if half:
        low, high = isa.low_f16, isa.high_f16
    exponent = 0x7C00 if half else 0x7F800000 if wide else 0x7F80  # all of its bits
    rows, scores_of, sums_of, words = tile.thread_rows, tile.scores, tile.sums, tile.words
    n_seen, n_sums, value_tiles = rows * words, tile.warp_tiles * sums_of, tile.value_width // 8
    value_at, flags_at, value_pitch = tile.value_at, tile.flags_at, tile.value_pitch
    panels, copy_rows = value_pitch // 128, tile.threads // 8
    parts = tile.keys // copy_rows * panels
    infinity = float("inf")

    @jit
    def not_finite_bits(word):
        """All bits of each number of a word that is not finite."""
        if wide:
            return select_int((word & exponent) == exponent, -1, 0)
        lower = select_int((word & exponent) == exponent, 0xFFFF, 0)
        return int32(lower | select_int((word >> 16 & exponent) == exponent, -0x10000, 0))

    @jit
    def part(i):
        """The thread's i-th 16 bytes of a tile of values: row, place."""
        r, c = int32(reread_thread() >> 3), int32(reread_thread() & 7)
        row = int32(r + i // panels * copy_rows)
        return row, int32(row * value_pitch + i % panels * 128 + ((c ^ (r & 7)) << 4))

    @jit
    def pair_of(address, row, j, lane):
        """The thread's two numbers of the j-th eight columns of a row."""
        if wide:
            chunk = (j % 4 * 2 + (lane >> 1 & 1)) ^ (row & 7)
            place = int32(address + j // 4 * 128 + (chunk << 4))
            return number_of(load_shared(place)), number_of(load_shared(int32(place + 4)))
        word = load_shared(int32(address + j // 8 * 128 + ((j % 8 ^ (row & 7)) << 4)))
        return low(word), high(word)

    @jit
    def mend(s, o, seen, memory):
        """Add values that are not finite to the sums of queries that see them; the product gets zeros."""
        values, flags, lane = int32(memory + value_at), int32(memory + flags_at), int32(reread_thread() & 31)
        for i in range(n_seen):
            unroll()
            at = (i // words // 2) * scores_of + (i // words % 2) * 2 + i % words * 16
            bits = int32(0)
            for j in range(4):
                unroll()
                for e in range(2):
                    unroll()
                    bits |= select_int(s[at + 4 * j + e] != float32(-infinity), 1 << (8 * j + e), 0)
            bits = int32(bits << (2 * (lane & 3)))
            bits |= exchange_word(bits, 1)
            seen[i] = int32(bits | exchange_word(bits, 2))
        store_shared(int32(flags + 4 * reread_thread()), 0, reread_thread() < words)
        barrier()
        for i in range(parts):
            row, place = part(i)
            bad = int32(0)
            for k in range(4):
                bad |= not_finite_bits(load_shared(int32(values + place + 4 * k)))
            or_shared(int32(flags + 4 * (row >> 5)), select_int(bad != 0, int32(1 << (row & 31)), 0))
        barrier()
        for w in range(words):
            unroll()
            flag = same(load_shared(int32(flags + 4 * w)))
            for bit in range(32):
                if (flag >> bit) & 1:
                    row = 32 * w + bit
                    address = int32(values + row * value_pitch + (8 * (lane & 1) if wide else 4 * (lane & 3)))
                    for j in range(value_tiles):
                        unroll()
                        first, second = pair_of(address, row, j, lane)
                        for e in range(2):
                            unroll()
                            x = second if e else first
                            x = select(x - x == float32(0), float32(0), x)
                            for r in range(rows):
                                unroll()
                                at = (r // 2) * sums_of + (r % 2) * 2 + 4 * j + e
                                sees = (seen[r * words + w] >> bit) & 1
                                o[at] = float32(o[at] + select(sees != 0, x, float32(0)))
        barrier()
        for i in range(parts):
            row, place = part(i)
            for k in range(4):
                word = load_shared(int32(values + place + 4 * k))
                full = not_finite_bits(word)
                store_shared(int32(values + place + 4 * k), int32(word & ~full), full != 0)
        barrier()

    @jit
    def not_finite(o):
        x = float32(0)
        for i in range(n_sums):
            unroll()
            x = fma(o[i], float32(0), x)
        return x != float32(0)

    return mend, not_finite
