"""The end of `decode_kernel`: a block's warps are joined, and by the last block of a unit all its chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .decode_tiles import ROWS, WARPS, Tile
from .mma_rows import LN2, LOG2_E

AHEAD = 4
"""Chunks whose sums a thread reads at a time."""


def build(
    isa: Any, storage: str, tile: Tile, column: Callable[..., Any], columns: int
) -> Callable[..., None]:
    """The function `finish` of a kernel.

    `column` is its products', and `columns` what is between neighbouring threads' first ones.
    """
    cuda, jit, unroll, thread = isa.cuda, isa.jit, isa.unroll, isa.thread
    int32, int64, float32, quotient = isa.int32, isa.int64, isa.float32, isa.quotient
    barrier, barrier_any, wait_copies = isa.barrier, isa.barrier_any, isa.wait_copies
    shared_memory, load_shared_float = isa.shared_memory, isa.load_shared_float
    store_shared_float, select = isa.store_shared_float, isa.select
    exp2, log2, reciprocal, fma = isa.exp2, isa.log2, isa.reciprocal, isa.fma
    maximum, exchange = isa.maximum, isa.exchange
    load_float, store_float, store_half, store_word = (
        isa.load_float, isa.store_float, isa.store_half, isa.store_word,
    )  # fmt: skip
    load_int64 = isa.load_int64
    fence, add_global = isa.fence, isa.add_global
    pack_f16, pack_bf16, has_scales = isa.pack_f16, isa.pack_bf16, tile.scales > 0
    of_floats = storage == "float32"
    pack = pack_f16 if storage == "float16" else pack_bf16
    width, sum_pitch, warp_bytes, states_at = tile.width, tile.sum_pitch, tile.warp_bytes, tile.states_at
    parts = width // 32  # columns of a lane
    n_read = AHEAD * parts
    infinity, nan = float("inf"), float("nan")

    @jit
    def safe(x):
        """What is taken off maxima: 0 where there is none yet, as -inf - (-inf) would be NaN."""
        return select(x == float32(-infinity), float32(0), x)

    @jit
    def weigh(p, x, r, top, total):
        """What a row's sums are multiplied with in the end; its log-sum-exp is written."""
        number = int32(x.row0 + r)
        head = quotient(number, int32(p.queries))
        wanted = r < x.rows
        largest = top
        if p.sinks != 0:
            sink = float32(load_float(p.sinks + 4 * int64(x.h + head), wanted) * float32(LOG2_E))
            largest = maximum(top, sink)
            total = fma(total, exp2(float32(top - safe(largest))), exp2(float32(sink - safe(largest))))
        empty = total == float32(0)
        factor = select(empty, float32(0), float32(exp2(float32(top - safe(largest))) * reciprocal(total)))
        lse = select(empty, float32(-infinity), float32((safe(largest) + log2(total)) * float32(LN2)))
        if p.from_end != 0:  # a graph's launch: one that nobody has said the length for is not to be mistaken
            told = load_int64(p.key_lengths + 8 * x.b) >= 0
            factor, lse = select(told, factor, float32(nan)), select(told, lse, float32(nan))
        if p.lse != 0:
            at = p.lse + x.b * p.lse_b + int64(x.h + head) * p.lse_h
            store_float(at + int64(number - head * p.queries) * p.lse_s, lse, wanted & ((thread() & 31) == 0))
        return factor

    @jit
    def put(p, x, r, k, y):
        """Write a row's number of the lane's column k to the output."""
        number, c = int32(x.row0 + r), int32((thread() & 31) + 32 * k)
        head = quotient(number, int32(p.queries))
        at = p.out + x.b * p.out_b + int64(x.h + head) * p.out_h + int64(number - head * p.queries) * p.out_s
        wanted = (r < x.rows) & (c < p.value_dim)
        if has_scales:
            if p.query_kind == 0:
                store_float(at + 4 * int64(c), y, wanted)
            elif p.query_kind == 1:
                store_half(at + 2 * int64(c), pack_f16(y, y), wanted)
            else:
                store_half(at + 2 * int64(c), pack_bf16(y, y), wanted)
        elif of_floats:
            store_float(at + 4 * int64(c), y, wanted)
        else:
            store_half(at + 2 * int64(c), pack(y, y), wanted)

    @jit
    def join(x, o, top, total):
        """Each warp's sums -> shared memory, all as of the largest maximum of the row."""
        lane, warp = int32(thread() & 31), int32(thread() >> 5)
        g, q = int32(lane >> 2), int32(lane & 3)
        states = int32(shared_memory() + states_at)
        sums = int32(shared_memory() + warp * warp_bytes)
        for r in range(2):
            unroll()
            amount = float32(total[r] + exchange(total[r], 1))
            amount = float32(amount + exchange(amount, 2))
            at = int32(states + 8 * (warp * ROWS + g + 8 * r))
            store_shared_float(at, top[r], q == 0)
            store_shared_float(int32(at + 4), amount, q == 0)
        barrier()
        for r in range(2):
            unroll()
            row = int32(g + 8 * r)
            best = float32(-infinity)
            for w in range(WARPS):
                unroll()
                best = maximum(best, load_shared_float(int32(states + 8 * (w * ROWS + row))))
            factor = exp2(float32(top[r] - safe(best)))
            for k in range(width // 4):
                unroll()
                y = float32(o[k // 2 * 4 + 2 * r + k % 2] * factor)
                store_shared_float(int32(sums + row * sum_pitch + 4 * (columns * q + column(k))), y, True)
        barrier()

    @jit
    def merge(p, x, read, factors, sums):
        """The sums of all of a unit's chunks -> the output."""
        lane, warp = int32(thread() & 31), int32(thread() >> 5)
        unit = int64(x.unit) * p.chunks
        for i in range(ROWS // WARPS):
            r = int32(warp + WARPS * i)
            wanted = r < x.rows
            states = p.states + 8 * (unit * p.block_rows + int64(r))
            top = float32(-infinity)
            for c0 in range(0, x.parts, 32):
                c = int32(c0 + lane)
                inside = wanted & (c < x.parts)
                y = load_float(states + 8 * p.block_rows * int64(c), inside)
                top = maximum(top, select(inside, y, float32(-infinity)))
            for n in range(5):
                unroll()
                top = maximum(top, exchange(top, 1 << n))
            total = float32(0)
            for k in range(parts):
                unroll()
                sums[k] = float32(0)
            for c0 in range(0, x.parts, AHEAD):
                for n in range(AHEAD):
                    unroll()
                    inside = wanted & (c0 + n < x.parts)
                    c = unit + int64(c0 + n)
                    largest = load_float(states + 8 * p.block_rows * int64(c0 + n), inside)
                    amount = load_float(states + 8 * p.block_rows * int64(c0 + n) + 4, inside)
                    factors[n] = select(inside, exp2(float32(largest - safe(top))), float32(0))
                    total = fma(factors[n], amount, total)
                    for k in range(parts):
                        unroll()
                        at = p.partials + 4 * ((c * p.block_rows + int64(r)) * width + int64(lane + 32 * k))
                        read[n * parts + k] = load_float(at, inside)
                for n in range(AHEAD):
                    unroll()
                    for k in range(parts):
                        unroll()
                        sums[k] = fma(factors[n], read[n * parts + k], sums[k])
            factor = weigh(p, x, r, top, total)
            for k in range(parts):
                unroll()
                put(p, x, r, k, float32(sums[k] * factor))

    @jit
    def finish(p, x, o, top, total):
        """What the block has summed -> the output, by way of the workspace where there are more chunks."""
        read = cuda.local.array(n_read, float32)
        factors = cuda.local.array(AHEAD, float32)
        sums = cuda.local.array(parts, float32)
        wait_copies()
        join(x, o, top, total)
        lane, warp = int32(thread() & 31), int32(thread() >> 5)
        shared = int32(shared_memory())
        at = int64(x.unit) * p.chunks + int64(x.part)
        for i in range(ROWS // WARPS):
            r = int32(warp + WARPS * i)
            wanted = r < x.rows
            best, amount = float32(-infinity), float32(0)
            for w in range(WARPS):
                unroll()
                state = int32(shared + states_at + 8 * (w * ROWS + r))
                best = maximum(best, load_shared_float(state))
            for w in range(WARPS):
                unroll()
                state = int32(shared + states_at + 8 * (w * ROWS + r))
                factor = exp2(float32(load_shared_float(state) - safe(best)))
                amount = fma(factor, load_shared_float(int32(state + 4)), amount)
            factor = float32(1)
            if x.parts == 1:
                factor = weigh(p, x, r, best, amount)
            else:
                states = p.states + 8 * (at * p.block_rows + int64(r))
                store_float(states, best, wanted & (lane == 0))
                store_float(states + 4, amount, wanted & (lane == 0))
            for k in range(parts):
                unroll()
                c = int32(lane + 32 * k)
                y = float32(0)
                for w in range(WARPS):
                    unroll()
                    y = float32(y + load_shared_float(int32(shared + w * warp_bytes + r * sum_pitch + 4 * c)))
                if x.parts == 1:
                    put(p, x, r, k, float32(y * factor))
                else:
                    store_float(
                        p.partials + 4 * ((at * p.block_rows + int64(r)) * width + int64(c)), y, wanted
                    )
        if x.parts == 1:
            return
        fence()
        barrier()
        fence()  # the thread that counts has seen the others' sums, and so has who counts after it
        counter = p.counters + 4 * int64(x.unit)
        first = thread() == 0
        before = add_global(counter, 1, first)
        if not barrier_any(first & (before == x.parts - 1)):
            return
        fence()
        store_word(counter, 0, first)
        merge(p, x, read, factors, sums)

    return finish
