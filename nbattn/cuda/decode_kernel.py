"""Attention of few queries over many keys on tensor cores: a block of threads takes a chunk of the keys.

The rows of a block are those of all query heads that share a key head, at most 16, so that each key and value
is read once. Chunks begin at multiples of a fixed length, whatever the sequence's own: results do not depend
on the batch. A block's four warps take turns with tiles of 16 keys and need not wait for one another: each
has slots of shared memory of its own, where copies of keys and values are under way, one slot ahead of the
other, until it takes the oldest. Products are ``mma.sync`` of 16 rows by 8 keys (or value columns) by 16;
fragments and swizzle are those of `mma_kernel`.

Sums and maxima of the warps are joined in shared memory. A unit of one chunk is done then. Else its blocks
leave partial sums in a workspace, and the last one to come merges them; it finds that it is by a counter,
which it sets back to 0, so that the same launch can be made again, from a graph too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import decode_bytes, decode_floats, decode_merge, decode_nibbles, decode_products
from .decode_tiles import KEYS, REACH, ROWS, STEP, WEIGHTS, Place, Tile
from .mma_rows import LOG2_E


def build(isa: Any, storage: str, tile: Tile) -> Callable[[Any], None]:
    """The kernel for keys and values of a dtype."""
    cuda, jit, unroll, thread = isa.cuda, isa.jit, isa.unroll, isa.thread
    block, reread_block = isa.block, isa.reread_block
    int32, int64, float32, same, quotient = isa.int32, isa.int64, isa.float32, isa.same, isa.quotient
    warp_barrier, shared_memory, any_lane = isa.warp_barrier, isa.shared_memory, isa.any_lane
    copy_async, commit_copies, copy_word_async = isa.copy_async, isa.commit_copies, isa.copy_word_async
    wait_queries, wait_slot = isa.wait_older(tile.slots - 1), isa.wait_older(tile.slots - 2)
    select, select_int, smaller, larger = isa.select, isa.select_int, isa.smaller, isa.larger
    exp2, fma, maximum, exchange, tanh = isa.exp2, isa.fma, isa.maximum, isa.exchange, isa.tanh
    load_int64, load_float, load_word = isa.load_int64, isa.load_float, isa.load_word
    has_scales, is_halved = tile.scales > 0, storage == "int4"
    if storage == "int8":
        products = decode_bytes.build(isa, tile)
    elif storage == "int4":
        products = decode_nibbles.build(isa, tile)
    elif storage == "float32":
        products = decode_floats.build(isa, tile)
    else:
        products = decode_products.build(isa, storage, tile)
    n_left, n_right = (12, 10) if storage == "float32" else (8, 6)
    begin_queries, take_queries, n_kept, score, add_values, add_exactly, not_finite = products[:-2]
    finish = decode_merge.build(isa, storage, tile, *products[-2:])

    n_sums, scales_at = tile.width // 2, tile.scales_at
    pitch, slot, warp_bytes, weights_at = tile.pitch, tile.slot, tile.warp_bytes, tile.weights_at
    panels, slots, n_scales = pitch // 128, tile.slots, tile.scales
    row_unit = 1 if is_halved else int(tile.unit)
    # Copies alternate: keys and values of the first tile, of the second and so on. When a tile's keys are
    # taken, `slots - 1` copies later ones begin, and one more when its values are.
    key_turn, value_turn = slots - 1, slots
    infinity = float("inf")

    @jit
    def offset_of(p, b):
        """The position of a sequence's first query."""
        offset = p.offset
        if p.offsets != 0:
            offset = load_int64(p.offsets + 8 * b)
        if p.from_end != 0:
            offset = load_int64(p.key_lengths + 8 * b) - p.queries
        return offset

    @jit
    def locate(p, number):
        """A block's unit and chunk, and what of it the rows may see."""
        row_blocks, kv_heads = int32(p.row_blocks), int32(p.kv_heads)
        unit = quotient(number, int32(p.chunks))
        part = int32(number - unit * p.chunks)
        pair = quotient(unit, row_blocks)
        row0 = int32((unit - pair * row_blocks) * ROWS)
        b = quotient(pair, kv_heads)
        h = int32(pair - b * kv_heads)
        start, length, offset = int64(0), p.key_length, offset_of(p, b)
        if p.key_starts != 0:
            start = load_int64(p.key_starts + 8 * b)
        if p.key_lengths != 0:
            length = load_int64(p.key_lengths + 8 * b)
        start, length = same(int32(start)), same(int32(length))
        low = same(int32(min(max(offset - p.left, -REACH), REACH)))
        high = same(int32(min(max(offset + p.right + 1, -REACH), REACH)))
        last = int32(p.queries - 1)
        begin = larger(start, low)
        end = smaller(length, int32(high + last))
        chunk = int32(p.chunk)
        first = quotient(larger(begin, 0), chunk)
        parts = larger(int32(quotient(int32(larger(end, 1) - 1), chunk) - first + 1), 1)
        key0 = int32((first + part) * chunk)
        return Place(
            b, h, int32(h * p.group), row0, smaller(int32(p.group * p.queries - row0), ROWS), unit, part,
            parts, key0, larger(begin, key0), smaller(end, int32(key0 + chunk)),
            larger(start, int32(low + last)), smaller(length, high), low, high, start, length,
        )  # fmt: skip

    @jit
    def locate_row(p, x, position, wanted):
        """The page that a position lies in, and the row in it."""
        page, place = int64(x.b), position
        if p.ring != 0:
            place = int32(place - quotient(place, int32(p.ring)) * p.ring)
        if p.page_table != 0:
            index = quotient(place, int32(p.page_size))
            entry = p.page_table + 4 * (int64(x.b) * p.table_width + int64(index))
            page = int64(load_word(entry, wanted))
            place = int32(place - index * p.page_size)
        return page, place

    @jit
    def copy(p, x, target, address, strides, position, row_bytes):
        """Start to copy 16 rows from a position on; what no row of the block sees is zeros, and not read.

        Strides are those of heads, pages and rows.
        """
        lane = int32(thread() & 31)
        r, c = int32(lane >> 3), int32(lane & 7)
        first = address + int64(x.kv_head) * strides[0] + int64(c * 16)
        for i in range(KEYS // 4):
            unroll()
            row = int32(r + 4 * i)
            place = int32(position + row)
            inside = (place >= x.begin) & (place < x.end)
            page, place = locate_row(p, x, larger(place, 0), inside)
            source = first + page * strides[1] + int64(place) * strides[2]
            for panel in range(panels):
                unroll()
                size = smaller(larger(int32(row_bytes - panel * 128 - c * 16), 0), 16)
                copy_async(
                    int32(target + row * pitch + panel * 128 + ((c ^ (row & 7)) << 4)),
                    source + panel * 128,
                    select_int(inside, size, 0),
                )

    @jit
    def copy_scales(p, x, target, address, strides, position, count):
        """Likewise the scales of 16 rows, `count` of each."""
        lane = int32(thread() & 31)
        row, place = int32(lane & 15), int32(position + (lane & 15))
        inside = (place >= x.begin) & (place < x.end)
        page, place = locate_row(p, x, larger(place, 0), inside)
        first = address + int64(x.kv_head) * strides[0] + page * strides[1] + int64(place) * strides[2]
        for i in range((n_scales + 1) // 2):
            unroll()
            group = int32((lane >> 4) + 2 * i)
            copy_word_async(
                int32(target + scales_at + 64 * group + 4 * row),
                first + int64(4 * group),
                select_int(inside & (group < count), 4, 0),
                group < n_scales,
            )

    @jit
    def copy_rows(p, x, target, address, strides, scales, scale_strides, position, numbers):
        """Start to copy 16 rows of so many numbers, with their scales."""
        row_bytes, count = int32(row_unit * numbers), int32(1)
        if is_halved:
            row_bytes, count = int32(numbers >> 1), int32(numbers >> 5)
        copy(p, x, target, address, strides, position, row_bytes)
        if has_scales:
            copy_scales(p, x, target, scales, scale_strides, position, count)

    @jit
    def begin_copy(p, x, target, number, position, last):
        """Start copy `number` of the warp, 2 t of the keys and 2 t + 1 of the values of tile t."""
        row = int32(position + (number // 2) * STEP)
        if row < last:
            row = int32(row + own())
            if number % 2 == 0:
                strides = p.key_h, p.key_p, p.key_s
                scale_strides = p.key_scales_h, p.key_scales_p, p.key_scales_s
                copy_rows(p, x, target, p.key, strides, p.key_scales, scale_strides, row, p.head_dim)
            else:
                strides = p.value_h, p.value_p, p.value_s
                scale_strides = p.value_scales_h, p.value_scales_p, p.value_scales_s
                copy_rows(p, x, target, p.value, strides, p.value_scales, scale_strides, row, p.value_dim)
        commit_copies()

    @jit
    def own():
        """Of the block's keys of a step the warp's first."""
        return int32((thread() >> 5) * KEYS)

    @jit
    def change(p, x, s, i, key, row, offset):
        """A product -> a score in powers of two."""
        y = float32(s[i] * p.scale)
        if p.softcap != 0:
            y = float32(p.softcap * tanh(float32(y * p.inverse_softcap)))
        if p.alibi_slopes != 0:
            head = quotient(row, int32(p.queries))
            slope = load_float(p.alibi_slopes + 4 * int64(x.h + head), row < p.group * p.queries)
            distance = float32(int64(key) - int64(row - head * p.queries) - offset)
            y = fma(slope, distance, y)
        s[i] = float32(y * float32(LOG2_E))

    @jit
    def soften(s, o, top, total):
        """Scores -> weights, 2 to what they are below the largest so far; what was summed before follows."""
        for r in range(2):
            unroll()
            largest = maximum(maximum(s[2 * r], s[2 * r + 1]), maximum(s[4 + 2 * r], s[5 + 2 * r]))
            largest = maximum(largest, exchange(largest, 1))
            largest = maximum(top[r], maximum(largest, exchange(largest, 2)))
            zero = select(largest == float32(-infinity), float32(0), largest)
            grows = largest != top[r]
            rescale = select(top[r] == float32(-infinity), float32(1), exp2(float32(top[r] - zero)))
            top[r] = largest
            amount = float32(0)
            for k in range(4):
                unroll()
                at = k // 2 * 4 + 2 * r + k % 2
                s[at] = exp2(float32(s[at] - zero))
                amount = float32(amount + s[at])
            total[r] = fma(total[r], rescale, amount)
            if any_lane(grows):
                for k in range(n_sums // 2):
                    unroll()
                    at = k // 2 * 4 + 2 * r + k % 2
                    o[at] = float32(o[at] * rescale)

    def kernel(p):
        s = cuda.local.array(8, float32)
        o = cuda.local.array(n_sums, float32)
        top = cuda.local.array(2, float32)
        total = cuda.local.array(2, float32)
        a = cuda.local.array(n_left, int32)
        b = cuda.local.array(n_right, int32)
        kept = cuda.local.array(n_kept, int32)
        x = locate(p, int32(block()))
        if x.part >= x.parts:
            return
        lane, warp = int32(thread() & 31), int32(thread() >> 5)
        slots_at = int32(shared_memory() + warp * warp_bytes)
        slots_end = int32(slots_at + warp_bytes)
        weights = int32(shared_memory() + weights_at + warp * WEIGHTS)
        # Whole steps before the first key that is seen are left out.
        position = int32(x.key0 + quotient(larger(int32(x.begin - x.key0), 0), STEP) * STEP)
        begin_queries(p, x, int32(slots_end - slot))
        commit_copies()
        for number in range(slots - 1):
            unroll()
            begin_copy(p, x, int32(slots_at + number * slot), number, position, x.end)
        for i in range(n_sums):
            unroll()
            o[i] = float32(0)
        for r in range(2):
            unroll()
            top[r], total[r] = float32(-infinity), float32(0)
        wait_queries()
        warp_barrier()
        take_queries(p, x, kept, int32(slots_end - slot))
        # The thread's rows, and the keys that their queries see.
        row = int32(x.row0 + (lane >> 2))
        query = int32(row - quotient(row, int32(p.queries)) * p.queries)
        other = int32(row + 8 - quotient(int32(row + 8), int32(p.queries)) * p.queries)
        first, last = larger(int32(query + x.low), x.start), smaller(int32(query + x.high), x.length)
        other_first = larger(int32(other + x.low), x.start)
        other_last = smaller(int32(other + x.high), x.length)
        filled, free = slots_at, int32(slots_end - slot)
        while position < x.end:
            # --- keys
            wait_slot()
            warp_barrier()
            begin_copy(p, x, free, key_turn, position, x.end)
            score(s, kept, a, b, filled)
            key, offset = int32(position + own() + 2 * (lane & 3)), int64(0)
            if p.alibi_slopes != 0:
                offset = offset_of(p, x.b)
            for i in range(8):
                unroll()
                change(p, x, s, i, int32(key + i // 4 * 8 + i % 2), int32(row + 8 * (i // 2 % 2)), offset)
            seen = int32(255)
            whole = (position >= x.all_first) & (position + STEP <= x.all_last)
            if not whole:
                seen = int32(0)
                for i in range(8):
                    unroll()
                    j = int32(key + i // 4 * 8 + i % 2)
                    if i // 2 % 2 == 0:
                        shown = (j >= first) & (j < last)
                    else:
                        shown = (j >= other_first) & (j < other_last)
                    s[i] = select(shown, s[i], float32(-infinity))
                    seen |= select_int(shown, 1 << i, 0)
            soften(s, o, top, total)
            free, filled = filled, int32(filled + slot)
            filled = select_int(filled == slots_end, slots_at, filled)
            # --- values
            wait_slot()
            warp_barrier()
            begin_copy(p, x, free, value_turn, position, x.end)
            if has_scales:
                add_values(o, s, seen, a, b, filled)
            # What no row sees is 0; where some do and some do not, 0 * NaN would be NaN.
            elif (not whole) and p.queries > 1 and any_lane(not_finite(filled)):
                add_exactly(o, s, seen, filled, weights)
            else:
                add_values(o, s, seen, a, b, filled)
            free, filled = filled, int32(filled + slot)
            filled = select_int(filled == slots_end, slots_at, filled)
            position = int32(position + STEP)
        finish(p, locate(p, int32(reread_block())), o, top, total)  # no register keeps it meanwhile

    return kernel
