"""The second way of `hopper_kernel` with a step's values, where one is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .hopper_tiles import Tile

MENDING = 2
"""The barrier of the warpgroups that multiply."""


def build(isa: Any, hopper: Any, storage: str, tile: Tile) -> tuple[Callable[..., Any], ...]:
    """The functions `look`, `mend` and `not_finite` of a kernel."""
    jit, unroll, reread_thread = isa.jit, isa.unroll, isa.reread_thread
    int32, float32, same = isa.int32, isa.float32, isa.same
    load_shared, store_shared, or_shared = isa.load_shared, isa.store_shared, isa.or_shared
    select, select_int = isa.select, isa.select_int
    fma, exchange_word, meet, fence_shared = isa.fma, isa.exchange_word, hopper.meet, hopper.fence_shared
    half = storage == "float16"
    low, high = (isa.low_f16, isa.high_f16) if half else (isa.low_bf16, isa.high_bf16)
    exponent = 0x7C00 if half else 0x7F80  # all of its bits
    words, panel, threads = tile.words, tile.panel, 128 * tile.groups
    n_seen, n_sums, value_tiles = 2 * words, tile.value_width // 2, tile.value_width // 8
    chunks = tile.keys * tile.value_panels * 8
    parts, mending = -(-chunks // threads), MENDING
    infinity = float("inf")

    @jit
    def full_halves(word):
        """All bits of each half that is no finite number."""
        lower = select_int((word & exponent) == exponent, 0xFFFF, 0)
        return int32(lower | select_int((word >> 16 & exponent) == exponent, -0x10000, 0))

    @jit
    def chunk(number, i):
        """The thread's i-th 16 bytes of a tile of values; its first again where there is none left."""
        at = int32(number + i * threads)
        return int32(16 * select_int(at < chunks, at, number))

    @jit
    def look(s, seen):
        """Which of the step's keys the thread's rows see, as bits."""
        for i in range(n_seen):
            unroll()
            at = (i // words) * 2 + i % words * 16
            bits = int32(0)
            for j in range(4):
                unroll()
                for e in range(2):
                    unroll()
                    bits |= select_int(s[at + 4 * j + e] != float32(-infinity), 1 << (8 * j + e), 0)
            bits = int32(bits << (2 * (reread_thread() & 3)))
            bits |= exchange_word(bits, 1)
            seen[i] = int32(bits | exchange_word(bits, 2))

    @jit
    def mend(o, seen, values, flags):
        """Add values that are not finite to the sums of queries that see them; the product gets zeros."""
        number = int32(reread_thread() - 128)
        store_shared(int32(flags + 4 * number), 0, number < words)
        meet(mending, threads)
        for i in range(parts):
            place = int32(values + chunk(number, i))
            row = int32((place - values >> 7) % tile_keys)
            bad = int32(0)
            for k in range(4):
                bad |= full_halves(load_shared(int32(place + 4 * k)))
            or_shared(int32(flags + 4 * (row >> 5)), select_int(bad != 0, int32(1 << (row & 31)), 0))
        meet(mending, threads)
        q = int32(reread_thread() & 3)
        for w in range(words):
            unroll()
            flag = same(load_shared(int32(flags + 4 * w)))
            for bit in range(32):
                if (flag >> bit) & 1:
                    row = 32 * w + bit
                    address = int32(values + row * 128 + 4 * q)
                    for j in range(value_tiles):
                        unroll()
                        word = load_shared(int32(address + j // 8 * panel + ((j % 8 ^ (row & 7)) << 4)))
                        for e in range(2):
                            unroll()
                            x = high(word) if e else low(word)
                            x = select(x - x == float32(0), float32(0), x)
                            for r in range(2):
                                unroll()
                                at = 2 * r + 4 * j + e
                                sees = (seen[r * words + w] >> bit) & 1
                                o[at] = float32(o[at] + select(sees != 0, x, float32(0)))
        meet(mending, threads)
        for i in range(parts):
            place = int32(values + chunk(number, i))
            for k in range(4):
                word = load_shared(int32(place + 4 * k))
                full = full_halves(word)
                store_shared(int32(place + 4 * k), int32(word & ~full), full != 0)
        fence_shared()
        meet(mending, threads)

    @jit
    def not_finite(o):
        x = float32(0)
        for i in range(n_sums):
            unroll()
            x = fma(o[i], float32(0), x)
        return x != float32(0)

    tile_keys = tile.keys
    return look, mend, not_finite
