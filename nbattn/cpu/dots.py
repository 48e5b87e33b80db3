"""Register tiles of decode: a few query rows against keys and values that are read as they lie in memory.

A vector of queries holds `rows` query rows with `run` numbers of each, `rows * run` lanes. A key's run is
read once, repeated for every row, and multiplied into one sum per key; the `run` partial sums of each row and
key are then added by a tree that turns `run` vectors, one per key, into one of scores. More rows per vector
make the tree shorter (45 instructions for 16 scores of one row, 9 for 16 scores of four rows).

Scores and weights lie in blocks of one vector: block, then row, then key, `run` keys a block. Keys and values
are found through tables that hold the address of each key's row, so pages, rings and packed sequences all
look alike.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from . import emitters, kinds, simd
from .emitters import I32, I64, const, fma_value, load_value, pointer, splat_value, store_value

UNDER_WAY = 16 if emitters.REGISTERS == 32 else 8
"""Sums that a tile keeps in registers."""
KEYS = 64
"""Keys that are softened together: 16 KB of float32 with 64 columns."""
LONG = 256
"""Keys that one row of queries softens together: it does little but read, and a longer run of keys, then of
values, comes 3 to 8 % nearer to memory's rate.
"""
LINE = 64
"""Bytes that memory is read in."""
AHEAD_OF_ONE, AGAIN = 16, 64
"""Rows before which one row of queries asks for keys and values; more rows ask a tile before. `AGAIN` is how
many rows before that they are asked for a first time.

A processor drops requests when too many are under way, and arithmetic asks faster than memory answers. Asked
for twice, float32 for four rows reaches 0.80 of memory's rate, once 0.64.
"""
SCORED_AT_ONCE = 8
"""Keys whose addresses fit the general registers."""


def rows_per_vector(lanes: int) -> int:
    """The most query rows that share a vector."""
    return min(4, lanes)


def add_up(b: Any, sums: list[Any], run: int) -> Any:
    """One vector per key of `run` partial sums a row -> one vector of `run` keys a row."""
    lanes, element = sums[0].type.count, emitters.suffix(sums[0].type.element)
    add = b.add if element == "i32" else b.fadd
    bits = run.bit_length() - 1
    # Within 128 bits first, where a shuffle takes one cycle.
    near = min(bits, 1 if element == "f64" else 2)
    for low, width in ((0, near), (near, bits - near)):
        top, mask = 1 << (width - 1) if width else 0, ((1 << width) - 1) << low
        for _ in range(width):
            orders: list[list[int]] = [[], []]
            for lane in range(lanes):
                field = (lane & mask) >> low
                source = lanes if field & top else 0
                for half in range(2):
                    orders[half].append(source + (lane & ~mask) + ((field % top * 2 + half) << low))
            sums = [
                add(*(kinds.shuffle(b, x, y, order) for order in orders))
                for x, y in zip(sums[::2], sums[1::2], strict=True)
            ]
    return sums[0]


class Wanted:
    """Asking for rows of a table in the midst of arithmetic, one line after the other.

    In this order and spread evenly, requests reach memory's rate while each line meets 8 cycles of
    arithmetic; asked for in columns of 128 bytes they reach 0.78 of it. The first cache is too small to
    hold them until they are read: with it, 3 to 10 % slower. `row` is the
    entry of the row whose byte `shift` is next; `bits` are those of a number. If it `asks_again`,
    then also for the row `AGAIN` entries later.
    """

    def __init__(
        self, row: Any, shift: Any, row_bytes: Any, last: Any, bits: int, asks_again: bool = True
    ) -> None:
        self.row, self.shift = row, shift
        self.later = (0, AGAIN) if asks_again else (0,)
        self.row_bytes, self.last = row_bytes, last
        self.portion = max(LINE, 8 * bits)  # 64 numbers: rows are seldom shorter

    def loop(self, b: Any, before: Any) -> Any:
        """Keep both in registers of a loop; the result takes the block that leads back to its head."""
        phis = [b.phi(I64), b.phi(I64)]
        for phi, x in zip(phis, (self.row, self.shift), strict=True):
            phi.add_incoming(x, before)
        self.row, self.shift = phis

        def close(block: Any) -> None:
            for phi, x in zip(phis, (self.row, self.shift), strict=True):
                phi.add_incoming(x, block)

        return close

    def ask(self, b: Any, size: int) -> None:
        """Ask for the next `size` bytes."""
        for portion in range(0, size, self.portion):
            step = min(self.portion, size - portion)
            for rows in self.later:
                entry = pointer(b, b.add(self.row, const(I64, 8 * rows)), I64)
                at = b.add(load_value(b, entry), self.shift)
                for c in range(0, step, LINE):
                    emitters.prefetch_value(b, b.add(at, const(I64, c)), locality=2)
            after = b.add(self.shift, const(I64, step))
            at_end = b.icmp_signed(">=", after, self.row_bytes)
            is_last = b.icmp_unsigned(">=", self.row, self.last)
            following = b.select(is_last, self.row, b.add(self.row, const(I64, 8)))
            self.shift = b.select(at_end, const(I64, 0), after)
            self.row = b.select(at_end, following, self.row)

    def ask_by_turns(self, b: Any, size: int, turn: int, turns: int) -> None:
        """Ask in `turns` turns for `size` bytes."""
        portions = max(size // self.portion, 1)
        for i in range(portions):
            if i * turns // portions == turn:
                self.ask(b, size // portions)


def scores_tile(
    number: Any, rows: int, groups: int, kind: str, bits: int, most: int = SCORED_AT_ONCE
) -> tuple[Any, int]:
    """(tile, the keys it takes): the products of `groups` vectors of query rows with some keys.

    ``tile(table, scales, wanted, wanted_bytes, q, q_group, s, s_group, steps)``: the tables hold the
    addresses of keys and their scales, `steps` units of each; s gets one vector a group for each `run` keys;
    groups are so many bytes apart. `wanted` are as many other rows of numbers of so many bits, which are
    asked for meanwhile. No more than `most` keys are read at once.
    """
    size = number.bitwidth // 8
    lanes = emitters.REGISTER_BYTES // size
    run = lanes // rows
    at_once = min(most, UNDER_WAY // (groups * kinds.sums(kind)))
    keys = max(run, at_once)
    together = kinds.query_vectors(kind)
    step_bytes = kinds.unit(kind) * lanes * kinds.bits(kind) // 8 // rows
    asked = at_once * kinds.unit(kind) * lanes // rows * bits // 8  # bytes a step
    register = emitters.REGISTER_BYTES

    @intrinsic
    def tile(
        typingctx: Any, table: Any, scales: Any, wanted: Any, wanted_bytes: Any, q: Any, q_group: Any, s: Any,
        s_group: Any, steps: Any
    ) -> Any:  # fmt: skip
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            table, scales, wanted, wanted_bytes, q, q_group, s, s_group, steps = args
            last = b.add(wanted, const(I64, 8 * (keys - 1)))
            other = Wanted(wanted, const(I64, 0), wanted_bytes, last, bits)
            t = ir.VectorType(context.get_value_type(number), lanes)
            total = emitters.int_type(t) if kinds.is_whole(kind) else t
            zero = const(total, 0 if kinds.is_whole(kind) else 0.0)

            def entries(table: Any, first: int) -> list[Any]:
                return [load_value(b, pointer(b, b.add(table, const(I64, 8 * (first + k))), I64))
                        for k in range(at_once)]  # fmt: skip

            sums: list[list[Any]] = [[] for _ in range(groups)]
            queries = [b.add(q, b.mul(q_group, const(I64, g))) for g in range(groups)]
            for first in range(0, keys, at_once):
                addresses = entries(table, first)
                factors = entries(scales, first) if kind == "int4" else []
                before, head = b.block, b.append_basic_block("dot")
                after = b.append_basic_block("dotted")
                b.branch(head)
                b.position_at_end(head)
                step = b.phi(I64)
                step.add_incoming(const(I64, 0), before)
                close = other.loop(b, before)
                running = [
                    [[b.phi(total) for _ in range(kinds.sums(kind))] for _ in range(at_once)]
                    for _ in range(groups)
                ]
                shift = b.mul(step, const(I64, together * register))
                vectors = [
                    [load_value(b, pointer(b, b.add(b.add(a, shift), const(I64, u * register)), total))
                     for u in range(together)]
                    for a in queries
                ]  # fmt: skip
                grown = [list(phis) for phis in running]
                for k in range(at_once):
                    other.ask_by_turns(b, asked, k, at_once)
                    at = b.add(addresses[k], b.mul(step, const(I64, step_bytes)))
                    factor = b.add(factors[k], b.mul(step, const(I64, 4))) if factors else None
                    x = kinds.read(b, at, kind, t, factor, rows)
                    for g in range(groups):
                        grown[g][k] = kinds.multiply(b, kind, x, vectors[g], grown[g][k])
                following = b.add(step, const(I64, 1))
                step.add_incoming(following, head)
                close(head)
                for g in range(groups):
                    for phis, later in zip(running[g], grown[g], strict=True):
                        for phi, next_ in zip(phis, later, strict=True):
                            phi.add_incoming(zero, before)
                            phi.add_incoming(next_, head)
                b.cbranch(b.icmp_signed("<", following, steps), head, after)
                b.position_at_end(after)
                for g in range(groups):
                    sums[g] += [kinds.whole_sum(b, kind, x) for x in grown[g]]
            for g in range(groups):
                target = b.add(s, b.mul(s_group, const(I64, g)))
                for block in range(keys // run):
                    x = add_up(b, sums[g][block * run : (block + 1) * run], run)
                    if kinds.is_whole(kind):
                        behind = b.add(queries[g], b.mul(steps, const(I64, together * register)))
                        x = kinds.as_number(b, x, behind, t)
                    shift = const(I64, block * register)
                    store_value(b, x, pointer(b, b.add(target, shift), t))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), codegen

    return tile, keys


def values_tile(number: Any, rows: int, groups: int, columns: int, kind: str, bits: int) -> Any:
    """``tile(table, scales, wanted, wanted_bytes, last, begin, column, p, p_group, o, o_row,
    factor, blocks)``: add up values.

    ``o = o * factor + p @ values``. The tables hold the addresses of the values' rows and their scales, `run`
    for each of the `blocks` of weights; the tile takes `columns` vectors of each, from the one that is
    `column` bytes behind in o. `factor` is a vector a group that repeats each row's, and behind it one of
    what whole weights are multiples of. `wanted` are other rows, the last one's entry at `last`, of numbers
    of so many bits: as many as are added up are asked for meanwhile, from byte `begin` of all of them on.
    """
    size = number.bitwidth // 8
    lanes = emitters.REGISTER_BYTES // size
    run = lanes // rows
    each = rows * groups * columns
    # The sums of one row would wait for each other.
    sets = 2 if each < 8 and run > 2 else 1
    unit = kinds.value_unit(kind)
    unit_bytes = unit * lanes * kinds.bits(kind) // 8
    # Where two keys' weights share a word, their values are interleaved to match.
    keys_at_once, weight_bytes = 2 if kinds.in_fours(kind) else 1, kinds.weight_bytes(kind, size)
    whole = kinds.is_whole(kind)
    asked = run * columns * lanes * bits // 8  # bytes a block

    @intrinsic
    def tile(
        typingctx: Any, table: Any, scales: Any, wanted: Any, wanted_bytes: Any, last: Any, begin: Any,
        column: Any, p: Any, p_group: Any, o: Any, o_row: Any, factor: Any, blocks: Any
    ) -> Any:  # fmt: skip
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            table, scales, wanted, wanted_bytes, last, begin, column, p, *args = args
            p_group, o, o_row, factor, blocks = args
            row = b.add(wanted, b.mul(b.udiv(begin, wanted_bytes), const(I64, 8)))
            row = b.select(b.icmp_unsigned("<", row, last), row, last)
            other = Wanted(row, b.urem(begin, wanted_bytes), wanted_bytes, last, bits)
            scalar = context.get_value_type(number)
            t = ir.VectorType(scalar, lanes)
            sum_type = emitters.int_type(t) if whole else t
            zero = const(sum_type, 0 if whole else 0.0)

            def splat_at(address: Any, shift: int, element: Any = scalar) -> Any:
                at = pointer(b, b.add(address, const(I64, shift)), element)
                return splat_value(b, ir.VectorType(element, lanes), load_value(b, at))

            stored_column = b.sdiv(
                b.mul(column, const(I64, unit_bytes)), const(I64, unit * emitters.REGISTER_BYTES)
            )
            weights = [b.add(p, b.mul(p_group, const(I64, g))) for g in range(groups)]
            before, head, after = b.block, b.append_basic_block("weigh"), b.append_basic_block("weighed")
            b.branch(head)
            b.position_at_end(head)
            block = b.phi(I64)
            block.add_incoming(const(I64, 0), before)
            close = other.loop(b, before)
            running = [b.phi(sum_type) for _ in range(sets * each)]
            grown = list(running)
            here, factors = (b.add(x, b.mul(block, const(I64, 8 * run))) for x in (table, scales))
            at = b.mul(block, const(I64, lanes * weight_bytes))
            for k in range(0, run, keys_at_once):
                keys_vectors = []
                for j in range(k, k + keys_at_once):
                    value = load_value(b, pointer(b, b.add(here, const(I64, 8 * j)), I64))
                    value = b.add(value, stored_column)
                    scale = None
                    if kind == "int4":
                        scale = load_value(b, pointer(b, b.add(factors, const(I64, 8 * j)), I64))
                        scale = b.add(scale, b.sdiv(column, const(I64, 32)))
                    other.ask_by_turns(b, asked, j, run)
                    vectors = []
                    for u in range(columns // unit):
                        at_unit = b.add(value, const(I64, u * unit_bytes))
                        unit_scale = b.add(scale, const(I64, 4 * u)) if scale else None
                        vectors += kinds.read_values(b, at_unit, kind, t, unit_scale)
                    keys_vectors.append(vectors)
                vectors = keys_vectors[0]
                if keys_at_once == 2:
                    vectors = [x for y in zip(*keys_vectors, strict=True) for x in kinds.interleave(b, *y)]
                i = k // keys_at_once % sets * each
                for g in range(groups):
                    for r in range(rows):
                        shift = (r * run + k) * weight_bytes
                        x = splat_at(b.add(weights[g], at), shift, scalar if keys_at_once == 1 else I32)
                        for c in range(columns):
                            grown[i] = kinds.add_weighted(b, kind, vectors[c], x, grown[i])
                            i += 1
            following = b.add(block, const(I64, 1))
            block.add_incoming(following, head)
            close(head)
            for phi, next_ in zip(running, grown, strict=True):
                phi.add_incoming(zero, before)
                phi.add_incoming(next_, head)
            b.cbranch(b.icmp_signed("<", following, blocks), head, after)
            b.position_at_end(after)
            i = 0
            for g in range(groups):
                for r in range(rows):
                    at_row = 2 * g * emitters.REGISTER_BYTES + r * run * size
                    f = splat_at(factor, at_row)
                    worth = splat_at(factor, at_row + emitters.REGISTER_BYTES) if whole else None
                    row = b.add(b.add(o, column), b.mul(o_row, const(I64, g * rows + r)))
                    for c in range(columns):
                        parts = grown[i::each] if sets == 2 else [grown[i]]
                        total = parts[0] if sets == 1 else (b.add if whole else b.fadd)(*parts)
                        if whole:
                            total = b.fmul(b.sitofp(total, t), worth)
                        place = pointer(b, b.add(row, const(I64, c * emitters.REGISTER_BYTES)), t)
                        # Last, so that small products add up before they meet the large sums of earlier keys.
                        store_value(b, fma_value(b, load_value(b, place), f, total), place)
                        i += 1
            return context.get_dummy_value()

        return types.void(*[types.int64] * 13), codegen

    return tile


def repeat(number: Any, rows: int) -> Any:
    """``repeat(address)``: `run` numbers for each of a vector's rows."""
    size = number.bitwidth // 8
    lanes = emitters.REGISTER_BYTES // size
    run = lanes // rows

    @intrinsic
    def read(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            t = ir.VectorType(context.get_value_type(number), run)
            x = load_value(b, pointer(b, args[0], t))
            return x if rows == 1 else kinds.shuffle(b, x, x, [c % run for c in range(lanes)])

        return simd.vector(number)(types.int64), codegen

    return read


def across(number: Any, rows: int, emit: Any) -> Any:
    """An intrinsic that joins each row's lanes by halves and leaves the result in all of them."""
    lanes = emitters.REGISTER_BYTES * 8 // number.bitwidth

    @intrinsic
    def join(typingctx: Any, x: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            x, distance = args[0], lanes // rows // 2
            while distance:
                x = emit(b, x, kinds.shuffle(b, x, x, [c ^ distance for c in range(lanes)]))
                distance //= 2
            return x

        return x(x), codegen

    return join


@intrinsic
def lowest_lane(typingctx: Any, x: Any) -> Any:
    """The number in a vector's first lane."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.extract_element(args[0], const(I32, 0))

    return x.dtype(x), codegen
