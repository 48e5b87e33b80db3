"""Attention on tensor cores: a block of threads takes a block of queries through all keys that they see.

Products are ``mma.sync`` of 16 queries by 8 keys (or value columns), as `mma_products` and, for float32,
`mma_split` make them. A warp holds its 16 or 32 queries'
scores S, sums O, running maximum and total in registers, as fragments: thread ``4 g + q`` has of each 16 x 8
matrix the elements (g, 2 q), (g, 2 q + 1), (g + 8, 2 q), (g + 8, 2 q + 1). Four threads share a row. Scores
become the left operand of the second product without leaving the registers.

Tiles of keys and values alternate: values are copied to shared memory while keys are multiplied, the next
keys while values are. Rows of a tile have a pitch of 128 bytes or a multiple, and in each 128 bytes the
16-byte chunk c of row r lies at ``c ^ r % 8``, so that the eight rows that ``ldmatrix`` reads at once lie in
different banks. The softmax runs in powers of two, with the scale in its exponent.

A value that is not finite would reach queries that do not see it, as 0 * NaN is NaN. It shows in the sums:
only then the block is done again, with such values left out of the product and added by hand to the queries
that see them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import mma_mend, mma_products, mma_rows, mma_scores, mma_split
from .mma_tiles import REACH, Place, Tile


def build(isa: Any, storage: str, tile: Tile, full: bool) -> Callable[[Any], None]:
    """The kernel for a dtype, without the options that change scores or with them (`full`)."""
    cuda, jit, unroll, thread = isa.cuda, isa.jit, isa.unroll, isa.thread
    block, reread_block = isa.block, isa.reread_block
    int32, int64, float32, same, quotient = isa.int32, isa.int64, isa.float32, isa.same, isa.quotient
    barrier, barrier_any, warp_barrier = isa.barrier, isa.barrier_any, isa.warp_barrier
    shared_memory, store_shared, copy_out = isa.shared_memory, isa.store_shared, isa.copy_out
    copy_async, commit_copies, wait_copies = isa.copy_async, isa.commit_copies, isa.wait_copies
    select_int, smaller, larger = isa.select_int, isa.smaller, isa.larger
    store_float, store_half = isa.store_float, isa.store_half
    wide, pack = storage == "float32", isa.pack_f16 if storage == "float16" else isa.pack_bf16
    products = mma_split.build(isa, tile) if wide else mma_products.build(isa, storage, tile)
    value_place, load_queries, score, add_values, n_left, n_right, n_parts = products
    change, hide, soften = mma_scores.build(isa, storage, tile)
    sequence, end_row = mma_rows.finding(isa), mma_rows.ending(isa, has_sinks=full)
    mend, not_finite = mma_mend.build(isa, storage, tile)

    threads, block_rows, block_keys, keep = tile.threads, tile.rows, tile.keys, tile.keep
    warp_tiles, rows, words = tile.warp_tiles, tile.thread_rows, tile.words
    unit, value_tiles, steps = tile.unit, tile.value_width // 8, tile.pitch // 32
    scores_of, sums_of = tile.scores, tile.sums
    # Registers of a thread; `cuda.local.array` wants plain names.
    n_scores, n_sums, n_queries = warp_tiles * scores_of, warp_tiles * sums_of, 4 * warp_tiles
    n_kept, n_seen = n_queries * steps if keep else 1, rows * words
    pitch, value_pitch = tile.pitch, tile.value_pitch
    panels, value_panels = pitch // 128, value_pitch // 128
    key_at, value_at = tile.key_at, tile.value_at
    copy_rows = threads // 8
    infinity = float("inf")

    @jit
    def copy(target, address, stride, row0, limit, row_bytes, row_pitch, count, row_panels):
        """Start to copy rows of a tile. What lies beyond the limit or the row's end is zeros."""
        r, c = int32(thread() >> 3), int32(thread() & 7)
        place = int32(target + r * row_pitch + ((c ^ (r & 7)) << 4))
        source = address + int64(row0 + r) * stride + int64(c * 16)
        for i in range(count // copy_rows):
            unroll()
            inside = int32(row0 + r + i * copy_rows) < limit
            for panel in range(row_panels):
                unroll()
                size = smaller(larger(int32(row_bytes - panel * 128 - c * 16), 0), 16)
                copy_async(
                    int32(place + i * copy_rows * row_pitch + panel * 128),
                    source + i * copy_rows * stride + panel * 128,
                    select_int(inside, size, 0),
                )

    @jit
    def locate(p, number):
        """The block's sequence, head and rows, and where their arrays begin."""
        per_head, heads = int32(p.blocks), int32(p.heads)
        unit = quotient(number, per_head)
        b = quotient(unit, heads)
        h = int32(unit - b * heads)
        shared_head = quotient(h, int32(p.group))
        # Last blocks first: causal ones see most keys.
        row0 = int32((per_head - 1 - (number - unit * per_head)) * block_rows)
        offset, length, slot, count, start, key_start = sequence(p, b)
        return Place(
            b, h, row0, same(int32(count)), same(int32(length)), offset,
            same(int32(min(max(offset - p.left, -REACH), REACH))),
            same(int32(min(max(offset + p.right + 1, -REACH), REACH))),
            p.query + slot * p.query_b + h * p.query_h + start * p.query_s,
            p.key + slot * p.key_b + shared_head * p.key_h + key_start * p.key_s,
            p.value + slot * p.value_b + shared_head * p.value_h + key_start * p.value_s,
            p.out + slot * p.out_b + h * p.out_h + start * p.out_s,
            p.lse + slot * p.lse_b + h * p.lse_h + start * p.lse_s,
        )  # fmt: skip

    @jit
    def finish(p, x, o, top, total, memory):
        """Sums / total -> out, and lse. The queries' place in shared memory is free."""
        lane, warp = int32(thread() & 31), int32(thread() >> 5)
        first = int32(warp * 16 * warp_tiles)
        g, q = int32(lane >> 2), int32(lane & 3)
        for r in range(rows):
            unroll()
            i, at = int32(x.row0 + first + g + 8 * r), (r // 2) * sums_of + (r % 2) * 2
            factor = end_row(p, x, top[r], total[r], i, q)
            target = x.out + int64(i) * p.out_s + 2 * unit * q
            place = int32(memory + (first + g + 8 * r) * value_pitch + 4 * q)
            for j in range(value_tiles):
                unroll()
                y, z = float32(o[at + 4 * j] * factor), float32(o[at + 4 * j + 1] * factor)
                if wide:  # four threads write the 32 bytes that memory takes at a time
                    column = int32(8 * j + 2 * q)
                    store_float(target + 32 * j, y, (i < x.queries) & (column < p.value_dim))
                    store_float(target + 32 * j + 4, z, (i < x.queries) & (column + 1 < p.value_dim))
                    continue
                word = pack(y, z)
                if p.aligned != 0:
                    store_shared(int32(place + j // 8 * 128 + ((j % 8 ^ g) << 4)), word, True)
                else:
                    column = int32(8 * j + 2 * q)
                    store_half(target + 16 * j, word, (i < x.queries) & (column < p.value_dim))
                    inside = (i < x.queries) & (column + 1 < p.value_dim)
                    store_half(target + 16 * j + 2, int32(word >> 16), inside)
        if wide or p.aligned == 0:
            return
        warp_barrier()
        chunks = value_pitch // 16
        for n in range(warp_tiles * chunks // 2):
            unroll()
            number = int32(lane + 32 * n)
            r, c = int32(number // chunks), int32(number % chunks)
            i = int32(x.row0 + first + r)
            copy_out(
                x.out + int64(i) * p.out_s + int64(c * 16),
                int32(memory + (first + r) * value_pitch + (c // 8) * 128 + ((c % 8 ^ (r & 7)) << 4)),
                (i < x.queries) & (8 * c < p.value_dim),
            )

    def kernel(p):
        s = cuda.local.array(n_scores, float32)
        o = cuda.local.array(n_sums, float32)
        top = cuda.local.array(rows, float32)
        total = cuda.local.array(rows, float32)
        a = cuda.local.array(n_left, int32)
        b = cuda.local.array(n_right, int32)
        parts = cuda.local.array(n_parts, float32)
        kept = cuda.local.array(n_kept, int32)
        seen = cuda.local.array(n_seen, int32)
        x = locate(p, int32(block()))
        if x.row0 >= x.queries:
            return
        last_row = int32(min(x.row0 + block_rows, x.queries) - 1)
        any_first, any_last = int32(max(x.row0 + x.low, 0)), int32(min(last_row + x.high, x.length))
        all_first, all_last = int32(last_row + x.low), int32(min(x.row0 + x.high, x.length))
        first_step = int32(any_first // block_keys)
        last_step = int32((any_last - 1) // block_keys) if any_first < any_last else int32(first_step - 1)

        memory = shared_memory()
        lane, warp = int32(thread() & 31), int32(thread() >> 5)
        swizzle = int32(lane & 7)
        # Of the matrices that a lane's address is for: rows 8 to 15 or columns 8 to 15 of the 16 x 16.
        query_address = int32(
            memory + (warp * 16 * warp_tiles + (lane & 15)) * pitch + (((lane >> 4) ^ swizzle) << 4)
        )
        key_row = int32((lane & 7) + ((lane >> 4) << 3))
        key_address = int32(memory + key_at + key_row * pitch + ((((lane >> 3) & 1) ^ swizzle) << 4))
        value_address = int32(memory + value_at + value_place(lane))
        row_bytes, value_bytes = int32(unit * p.head_dim), int32(unit * p.value_dim)
        copy(memory, x.query, p.query_s, x.row0, x.queries, row_bytes, pitch, block_rows, panels)
        careful = int32(0)
        while True:
            for i in range(n_sums):
                unroll()
                o[i] = float32(0)
            for r in range(rows):
                unroll()
                top[r], total[r] = float32(-infinity), float32(0)
            step = last_step
            if step >= first_step:
                key0 = int32(step * block_keys)
                copy(memory + key_at, x.key, p.key_s, key0, x.length, row_bytes, pitch, block_keys, panels)
            commit_copies()
            if keep:
                wait_copies()
                barrier()
                for k in range(steps):
                    unroll()
                    load_queries(kept, k * n_queries, query_address, k)
            while step >= first_step:
                key0 = int32(step * block_keys)
                wait_copies()
                barrier()
                copy(
                    memory + value_at, x.value, p.value_s, key0, x.length, value_bytes, value_pitch,
                    block_keys, value_panels,
                )  # fmt: skip
                commit_copies()
                score(s, a, b, kept, parts, query_address, key_address)
                wait_copies()
                barrier()
                if step > first_step:
                    copy(
                        memory + key_at, x.key, p.key_s, int32(key0 - block_keys), x.length, row_bytes, pitch,
                        block_keys, panels,
                    )  # fmt: skip
                commit_copies()
                if full:
                    change(p, x, s, key0)
                if key0 < all_first or key0 + block_keys > all_last:
                    hide(x, s, key0)
                if careful != 0:
                    mend(s, o, seen, memory)
                soften(s, o, top, total, p.log2_scale)
                add_values(o, s, a, b, parts, value_address)
                step = int32(step - 1)
            wait_copies()  # of the queries, where there was no step
            bad = same(select_int(barrier_any(not_finite(o)), 1, 0))
            if careful != 0 or bad == 0:
                break
            careful = int32(1)
        if wide:
            x = locate(p, int32(reread_block()))
        finish(p, x, o, top, total, memory)

    return kernel
