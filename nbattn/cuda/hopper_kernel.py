"""Attention on a Hopper GPU: one warp brings tiles, warpgroups of four warps multiply them.

A group has 64 queries' scores S, sums O, running maximum and total in registers, as fragments of ``wgmma``:
thread ``4 g + q`` of a warp has of each 16 x 8 matrix the elements (g, 2 q), (g, 2 q + 1), (g + 8, 2 q),
(g + 8, 2 q + 1). Queries, keys and values are read from shared memory, and weights from the registers that
they were computed in.

Tiles of keys and values come by TMA, each to the next of some places that are free. A panel of 64 columns has
rows of 128 bytes, in which the 16-byte chunk c of row r lies at ``c ^ r % 8``: the 128-byte swizzle. What
follows a group's two products is one step of the loop late: while a step's keys are multiplied, so are the
values of the one before, and its softmax runs while that product does. Groups take turns at starting
products, so that one's softmax meets another's.

A value that is not finite would reach queries that do not see it, as 0 * NaN is NaN. It shows in the sums:
only then the block is done again, one product at a time, with such values added by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import hopper_mend, hopper_scores, mma_rows
from .hopper_tiles import REACH, Place, Tile

DONE, TURN = 1, 3
"""Barriers: of all that work, and the first group's turn (`hopper_mend` has number 2)."""
SWIZZLED = 1 << 62
"""In a descriptor: rows of 128 bytes in the 128-byte swizzle."""


def build(isa: Any, hopper: Any, storage: str, tile: Tile, full: bool) -> Callable[[Any], None]:
    """The kernel for float16 or bfloat16, without the options that change scores or with them (`full`).

    `isa` has the functions of `ptx`, `hopper` those of `ptx_hopper`.
    """
    cuda, jit, unroll, thread, block = isa.cuda, isa.jit, isa.unroll, isa.thread, isa.block
    int32, int64, float32, same, quotient = isa.int32, isa.int64, isa.float32, isa.same, isa.quotient
    barrier, warp_barrier, shared_memory = isa.barrier, isa.warp_barrier, isa.shared_memory
    store_shared, copy_out = isa.store_shared, isa.copy_out
    select_int, smaller, store_half = isa.select_int, isa.smaller, isa.store_half
    half = storage == "float16"
    pack, kind = (isa.pack_f16, "f16") if half else (isa.pack_bf16, "bf16")
    start_barrier, fence_barriers, wait_phase = hopper.start_barrier, hopper.fence_barriers, hopper.wait_phase
    arrive, expect, meet, announce, meet_any = (
        hopper.arrive, hopper.expect, hopper.meet, hopper.announce, hopper.meet_any,
    )  # fmt: skip
    load_tile, prefetch_map, after = hopper.load_tile, hopper.prefetch_map, hopper.after
    query_map, key_map, value_map = hopper.query_map, hopper.key_map, hopper.value_map
    fence_registers, commit_products = hopper.fence_registers, hopper.commit_products
    change, hide, soften, rescale = hopper_scores.build(isa, tile)
    sequence, end_row = mma_rows.finding(isa), mma_rows.ending(isa, has_sinks=True)
    look, mend, not_finite = hopper_mend.build(isa, hopper, storage, tile)

    block_rows, block_keys, groups, stages, turns = (
        tile.rows, tile.keys, tile.groups, tile.stages, tile.turns,
    )  # fmt: skip
    n_scores, n_weights, n_seen = tile.keys // 2, tile.keys // 4, 2 * tile.words
    n_sums = tile.value_width // 2
    key_steps, value_steps, value_tiles = tile.width // 16, tile.keys // 16, tile.value_width // 8
    panels, value_panels, panel, query_panel = tile.panels, tile.value_panels, tile.panel, tile.query_panel
    key_bytes, value_bytes, query_bytes = panels * panel, value_panels * panel, panels * query_panel
    key_at, value_at, barriers_at, flags_at = tile.key_at, tile.value_at, tile.barriers_at, tile.flags_at
    arrivals, working = 4 * groups, 128 * groups + 32
    infinity, swizzled = float("inf"), SWIZZLED
    done, turn = DONE, TURN
    fewer, more = tile.registers
    fewer_registers, more_registers = hopper.fewer_registers(fewer), hopper.more_registers(more)
    multiply = hopper.product(kind, tile.keys)
    multiply_registers = hopper.product_of_registers(kind, tile.value_width)
    settled_scores, settled_sums = hopper.settled(n_scores), hopper.settled(n_sums)
    wait_scores, wait_scores_only = hopper.wait_products(n_scores, 0), hopper.wait_products(n_scores, 1)
    wait_sums = hopper.wait_products(n_sums, 0)

    @jit
    def locate(p):
        """The block's sequence, head and rows, and where their arrays begin."""
        number, per_unit, heads = int32(block()), int32(p.blocks), int32(p.heads)
        # In each section last blocks come first: causal ones see most keys.
        part = quotient(number, int32(per_unit * p.section))
        first_unit = int32(part * p.section)
        rest = int32(number - first_unit * per_unit)
        size = smaller(int32(p.section), int32(p.units - first_unit))
        turned = quotient(rest, size)
        unit = int32(first_unit + rest - turned * size)
        b = quotient(unit, heads)
        h = int32(unit - b * heads)
        row0 = int32((per_unit - 1 - turned) * block_rows)
        offset, length, slot, count, start, key_start = sequence(p, b)
        return Place(
            same(int32(slot)), h, quotient(h, int32(p.group)), row0, same(int32(count)), same(int32(length)),
            same(int32(min(max(offset - p.left, -REACH), REACH))),
            same(int32(min(max(offset + p.right + 1, -REACH), REACH))),
            same(int32(start)), same(int32(key_start)),
            p.out + slot * p.out_b + h * p.out_h + start * p.out_s,
            p.lse + slot * p.lse_b + h * p.lse_h + start * p.lse_s,
        )  # fmt: skip

    @jit
    def full_at(memory, which, slot):
        """The mbarrier of a tile of keys (0) or values (1) that comes."""
        return int32(memory + barriers_at + 8 + 16 * stages * which + 8 * slot)

    @jit
    def free_at(memory, which, slot):
        """The mbarrier of its room."""
        return int32(full_at(memory, which, slot) + 8 * stages)

    @jit
    def bring(x, memory, address, which, count, slot, parity, row, leader):
        """Start to copy a tile of keys or values once there is room."""
        full = full_at(memory, which, slot)
        wait_phase(free_at(memory, which, slot), parity)
        expect(full, count * panel, leader)
        target = int32(memory + key_at + which * (value_at - key_at) + slot * count * panel)
        for i in range(count):
            unroll()
            load_tile(int32(target + i * panel), address, full, 64 * i, row, x.shared_head, x.slot, leader)

    @jit
    def produce(x, memory, maps, first_step, last_step):
        """Bring all tiles, in the order of the steps; again where a group says so."""
        leader = (thread() & 31) == 0
        query, key, value = maps
        if last_step >= first_step:  # else there need be no maps
            prefetch_map(key, leader)
            prefetch_map(value, leader)
            queries = int32(memory + barriers_at)
            expect(queries, query_bytes, leader)
            for i in range(panels):
                unroll()
                row = int32(x.query_row + x.row0)
                load_tile(int32(memory + i * query_panel), query, queries, 64 * i, row, x.h, x.slot, leader)
        slot, parity, again = int32(0), int32(1), int32(1)
        while again >= 0:
            step = last_step
            while step >= first_step:
                row = int32(x.key_row + step * block_keys)
                bring(x, memory, key, 0, panels, slot, parity, row, leader)
                bring(x, memory, value, 1, value_panels, slot, parity, row, leader)
                slot = int32(slot + 1)
                if slot == stages:
                    slot, parity = int32(0), int32(parity ^ 1)
                step = int32(step - 1)
            again = int32(again - 1)
            if again >= 0 and not meet_any(done, working, False):
                again = int32(-1)

    @jit
    def score(s, queries, keys):
        """Start s = queries @ keys.T"""
        settled_scores(s)
        fence_registers()
        for k in range(key_steps):
            unroll()
            # In units of 16 bytes: 32 bytes on in a row, or a panel.
            left = int64(queries + ((k // 4) * (query_panel // 16) + k % 4 * 2))
            multiply(s, left, int64(keys + ((k // 4) * (panel // 16) + k % 4 * 2)), k > 0)
        commit_products()

    @jit
    def add_values(o, weights, values):
        """Start o += weights @ values"""
        settled_sums(o)
        fence_registers()
        for k in range(value_steps):
            unroll()
            multiply_registers(o, weights, 4 * k, int64(values + k * 128))  # 16 rows on
        commit_products()

    @jit
    def shape(p, x, s, key0, all_first, all_last):
        """Products -> scores that are seen."""
        if full:
            change(p, s)
        if key0 < all_first or key0 + block_keys > all_last:
            hide(x, s, key0)

    @jit
    def pack_weights(s, weights):
        for i in range(n_weights):
            unroll()
            weights[i] = pack(s[2 * i], s[2 * i + 1])

    @jit
    def finish(p, x, o, top, total, memory):
        """Sums / total -> out, and lse. The queries' place in shared memory is free."""
        lane, first = int32(thread() & 31), int32((thread() >> 5) * 16 - 64)
        g, q = int32(lane >> 2), int32(lane & 3)
        for r in range(2):
            unroll()
            i = int32(x.row0 + first + g + 8 * r)
            factor = end_row(p, x, top[r], total[r], i, q)
            target = x.out + int64(i) * p.out_s + 4 * q
            place = int32(memory + (first + g + 8 * r) * 128 + 4 * q)
            for j in range(value_tiles):
                unroll()
                at = 2 * r + 4 * j
                word = pack(float32(o[at] * factor), float32(o[at + 1] * factor))
                if p.aligned != 0:
                    store_shared(int32(place + j // 8 * query_panel + ((j % 8 ^ g) << 4)), word, True)
                else:
                    column = int32(8 * j + 2 * q)
                    store_half(target + 16 * j, word, (i < x.queries) & (column < p.value_dim))
                    inside = (i < x.queries) & (column + 1 < p.value_dim)
                    store_half(target + 16 * j + 2, int32(word >> 16), inside)
        if p.aligned == 0:
            return
        warp_barrier()
        for n in range(4 * value_panels):
            unroll()
            r, c = int32(n % 4 * 4 + (lane >> 3)), int32(lane & 7)
            i, column = int32(x.row0 + first + r), int32(64 * (n // 4) + 8 * c)
            c = smaller(c, value_tiles - 1 - n // 4 * 8)  # what no thread has written is not to be read
            copy_out(
                x.out + int64(i) * p.out_s + 2 * int64(column),
                int32(memory + n // 4 * query_panel + (first + r) * 128 + ((c ^ (r & 7)) << 4)),
                (i < x.queries) & (column < p.value_dim),
            )

    @jit
    def consume(p, x, memory, group, first_step, last_step):
        """Take a group's queries through all keys."""
        s = cuda.local.array(n_scores, float32)
        o = cuda.local.array(n_sums, float32)
        weights = cuda.local.array(n_weights, int32)
        top = cuda.local.array(2, float32)
        total = cuda.local.array(2, float32)
        factor = cuda.local.array(2, float32)
        seen = cuda.local.array(n_seen, int32)
        last_row = int32(min(x.row0 + block_rows, x.queries) - 1)
        all_first, all_last = int32(last_row + x.low), int32(min(x.row0 + x.high, x.length))
        leader = (thread() & 31) == 0
        # Descriptors: where a matrix begins, from one panel to the next (of values alone, else 1), from 8
        # rows to the next 8, in units of 16 bytes; and the swizzle.
        eights = int64(swizzled | (1024 // 16) << 32)
        queries = int64(eights | 1 << 16 | int64((memory + group * 64 * 128) >> 4))
        keys = int64(eights | 1 << 16 | int64((memory + key_at) >> 4))
        values = int64(eights | (panel // 16) << 16 | int64((memory + value_at) >> 4))
        for i in range(n_sums):
            unroll()
            o[i] = float32(0)
        for r in range(2):
            unroll()
            top[r], total[r] = float32(-infinity), float32(0)
        slot, parity, before, parity_before = int32(0), int32(0), int32(0), int32(0)
        if turns and group == groups - 1:
            announce(turn, 256)
        step = last_step
        if step >= first_step:
            wait_phase(int32(memory + barriers_at), 0)
            wait_phase(full_at(memory, 0, 0), 0)
            score(s, queries, keys)
            wait_scores(s)
            arrive(free_at(memory, 0, 0), leader)
            shape(p, x, s, int32(step * block_keys), all_first, all_last)
            soften(s, top, total, factor, p.log2_scale)
            pack_weights(s, weights)
            slot = int32(1)
            if slot == stages:
                slot, parity = int32(0), int32(1)
            step = int32(step - 1)
        while step >= first_step:
            wait_phase(full_at(memory, 0, slot), parity)
            if turns:
                meet(int32(turn + group), 256)
            score(s, queries, int64(keys + slot * (key_bytes // 16)))
            wait_phase(full_at(memory, 1, before), parity_before)
            add_values(o, weights, int64(values + before * (value_bytes // 16)))
            if turns:
                announce(int32(turn + select_int(group == groups - 1, 0, int32(group + 1))), 256)
            wait_scores_only(s)
            arrive(free_at(memory, 0, slot), leader)
            shape(p, x, s, int32(step * block_keys), all_first, all_last)
            soften(s, top, total, factor, p.log2_scale)
            after(float32(total[0] + total[1]))
            wait_sums(o)
            arrive(free_at(memory, 1, before), leader)
            rescale(o, factor)
            pack_weights(s, weights)
            before, parity_before = slot, parity
            slot = int32(slot + 1)
            if slot == stages:
                slot, parity = int32(0), int32(parity ^ 1)
            step = int32(step - 1)
        if last_step >= first_step:
            wait_phase(full_at(memory, 1, before), parity_before)
            add_values(o, weights, int64(values + before * (value_bytes // 16)))
            wait_sums(o)
            arrive(free_at(memory, 1, before), leader)
        if meet_any(done, working, not_finite(o)):
            for i in range(n_sums):
                unroll()
                o[i] = float32(0)
            for r in range(2):
                unroll()
                top[r], total[r] = float32(-infinity), float32(0)
            step = last_step
            while step >= first_step:
                wait_phase(full_at(memory, 0, slot), parity)
                score(s, queries, int64(keys + slot * (key_bytes // 16)))
                wait_scores(s)
                arrive(free_at(memory, 0, slot), leader)
                shape(p, x, s, int32(step * block_keys), all_first, all_last)
                look(s, seen)
                soften(s, top, total, factor, p.log2_scale)
                rescale(o, factor)
                wait_phase(full_at(memory, 1, slot), parity)
                mend(o, seen, int32(memory + value_at + slot * value_bytes), int32(memory + flags_at))
                pack_weights(s, weights)
                add_values(o, weights, int64(values + slot * (value_bytes // 16)))
                wait_sums(o)
                arrive(free_at(memory, 1, slot), leader)
                slot = int32(slot + 1)
                if slot == stages:
                    slot, parity = int32(0), int32(parity ^ 1)
                step = int32(step - 1)
        finish(p, x, o, top, total, memory)

    def kernel(p):
        x = locate(p)
        if x.row0 >= x.queries:
            return
        last_row = int32(min(x.row0 + block_rows, x.queries) - 1)
        any_first, any_last = int32(max(x.row0 + x.low, 0)), int32(min(last_row + x.high, x.length))
        first_step = int32(any_first // block_keys)
        last_step = int32((any_last - 1) // block_keys) if any_first < any_last else int32(first_step - 1)
        memory = shared_memory()
        maps = (query_map(), key_map(), value_map())  # here, where the kernel's arguments are
        warpgroup = same(int32(thread() >> 7))
        if warpgroup == 0:
            first = thread() == 0
            start_barrier(int32(memory + barriers_at), 1, first)
            for i in range(stages):
                unroll()
                for which in range(2):
                    unroll()
                    start_barrier(full_at(memory, which, i), 1, first)
                    start_barrier(free_at(memory, which, i), arrivals, first)
            fence_barriers()
        barrier()
        if warpgroup == 0:
            fewer_registers()
            if same(int32(thread() >> 5)) == 0:
                produce(x, memory, maps, first_step, last_step)
        else:
            more_registers()
            consume(p, x, memory, int32(warpgroup - 1), first_step, last_step)

    return kernel
