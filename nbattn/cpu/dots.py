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
from numba.core import cgutils
from numba.extending import intrinsic

from . import emitters, simd
from .emitters import I8, I32, I64, const, fma_value, load_value, pointer, splat_value, store_value

UNDER_WAY = 16 if emitters.REGISTERS == 32 else 8
"""Sums that a tile keeps in registers."""
KEYS = 64
"""Keys that are softened together: 16 KB of float32 with 64 columns."""
LINE = 64
"""Bytes that memory is read in."""
SCORED_AT_ONCE = 8
"""Keys whose addresses fit the general registers."""


def rows_per_vector(lanes: int) -> int:
    """The most query rows that share a vector."""
    return min(4, lanes)


def _shuffle(b: Any, x: Any, y: Any, order: list[int]) -> Any:
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(order)), order))


def _add_up(b: Any, sums: list[Any], run: int) -> Any:
    """One vector per key of `run` partial sums a row -> one vector of `run` keys a row."""
    lanes = sums[0].type.count
    bits = run.bit_length() - 1
    # Within 128 bits first, where a shuffle takes one cycle.
    near = min(bits, 2 if emitters.suffix(sums[0].type.element) == "f32" else 1)
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
                b.fadd(*(_shuffle(b, x, y, order) for order in orders))
                for x, y in zip(sums[::2], sums[1::2], strict=True)
            ]
    return sums[0]


def unit(storage: str) -> int:
    """Vectors of numbers that are read together from memory."""
    return {"bfloat16": 2, "int4": 32 // (emitters.REGISTER_BYTES // 4)}.get(storage, 1)


def _unit_bytes(storage: str, lanes: int) -> int:
    bits = {"float64": 64, "float32": 32, "int8": 8, "int4": 4}.get(storage, 16)
    return unit(storage) * lanes * bits // 8


def _read(b: Any, address: Any, storage: str, t: Any, scales: Any, repeats: int = 1) -> list[Any]:
    """A unit of stored numbers as float32 or float64.

    Of bfloat16 the even numbers come first, then the odd ones: one instruction a vector instead of two. With
    `repeats` there are so many times fewer numbers (bfloat16, float32 and float64), all of them repeated.
    `scales` is the address of the unit's scale (int4).
    """
    lanes = t.count

    def load(element: Any, count: int = lanes // repeats, shift: int = 0) -> Any:
        at = b.add(address, const(I64, shift))
        if count == 1 < lanes:
            return splat_value(b, ir.VectorType(element, lanes), load_value(b, pointer(b, at, element)))
        x = load_value(b, pointer(b, at, ir.VectorType(element, count)))
        return x if repeats == 1 else _shuffle(b, x, x, [c % count for c in range(lanes)])

    it = ir.VectorType(I32, lanes)
    if storage in ("float32", "float64"):
        return [load(t.element)]
    if storage == "bfloat16":
        words = load(I32)
        return [b.bitcast(x, t) for x in (b.shl(words, const(it, 16)), b.and_(words, const(it, -0x10000)))]
    if storage == "float16":
        return [emitters.widen_value(b, load(emitters.stored(storage)), storage)]
    if storage == "int8":
        return [b.sitofp(b.sext(load(I8), it), t)]
    factor = splat_value(b, t, load_value(b, pointer(b, scales, ir.FloatType())))
    if lanes == 16:
        # The 16 numbers times the scale are a table that one instruction looks up 16 times.
        table = b.fmul(ir.Constant(t, [float(i - 8) for i in range(16)]), factor)
        look_up = cgutils.get_or_insert_function(
            b.module, ir.FunctionType(t, [t, it]), "llvm.x86.avx512.permvar.sf.512"
        )
        raw = b.zext(load(I8), it)
        return [b.call(look_up, [table, x]) for x in (raw, b.lshr(raw, const(it, 4)))]
    low: list[Any] = []
    high: list[Any] = []
    for first in range(0, 16, lanes):
        raw = b.zext(load(I8, shift=first), it)
        for half, x in ((low, b.and_(raw, const(it, 15))), (high, b.lshr(raw, const(it, 4)))):
            half.append(b.fmul(b.sitofp(b.sub(x, const(it, 8)), t), factor))
    return low + high


class _Wanted:
    """Asking for rows of a table in the midst of arithmetic, one line after the other.

    In this order and spread evenly, requests reach memory's rate while each line meets 8 cycles of
    arithmetic; asked for in columns of 128 bytes they reach 0.78 of it. The first cache is too small to
    hold them until they are read: with it, 3 to 10 % slower. `row` is the
    entry of the row whose byte `shift` is next; `bits` are those of a number.
    """

    def __init__(self, row: Any, shift: Any, row_bytes: Any, last: Any, bits: int) -> None:
        self.row, self.shift = row, shift
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
            at = b.add(load_value(b, pointer(b, self.row, I64)), self.shift)
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


def scores_tile(number: Any, rows: int, groups: int, storage: str, bits: int) -> tuple[Any, int]:
    """(tile, the keys it takes): the products of `groups` vectors of query rows with some keys.

    ``tile(table, scales, wanted, wanted_bytes, q, q_group, s, s_group, steps)``: the tables hold the
    addresses of keys and their scales, `steps` units of each; s gets one vector a group for each `run` keys;
    groups are so many bytes apart. `wanted` are as many other rows of numbers of so many bits, which are
    asked for meanwhile.
    """
    size = number.bitwidth // 8
    lanes = emitters.REGISTER_BYTES // size
    run = lanes // rows
    at_once = min(SCORED_AT_ONCE, UNDER_WAY // groups)
    keys = max(run, at_once)
    together = unit(storage)
    step_bytes = _unit_bytes(storage, lanes) // rows
    asked = at_once * together * lanes // rows * bits // 8  # bytes a step

    @intrinsic
    def tile(
        typingctx: Any, table: Any, scales: Any, wanted: Any, wanted_bytes: Any, q: Any, q_group: Any, s: Any,
        s_group: Any, steps: Any
    ) -> Any:  # fmt: skip
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            table, scales, wanted, wanted_bytes, q, q_group, s, s_group, steps = args
            last = b.add(wanted, const(I64, 8 * (keys - 1)))
            other = _Wanted(wanted, const(I64, 0), wanted_bytes, last, bits)
            t = ir.VectorType(context.get_value_type(number), lanes)

            def entries(table: Any, first: int) -> list[Any]:
                return [load_value(b, pointer(b, b.add(table, const(I64, 8 * (first + k))), I64))
                        for k in range(at_once)]  # fmt: skip

            sums: list[list[Any]] = [[] for _ in range(groups)]
            for first in range(0, keys, at_once):
                addresses = entries(table, first)
                factors = entries(scales, first) if storage == "int4" else []
                queries = [b.add(q, b.mul(q_group, const(I64, g))) for g in range(groups)]
                before, head = b.block, b.append_basic_block("dot")
                after = b.append_basic_block("dotted")
                b.branch(head)
                b.position_at_end(head)
                step = b.phi(I64)
                step.add_incoming(const(I64, 0), before)
                close = other.loop(b, before)
                running = [[b.phi(t) for _ in range(at_once)] for _ in range(groups)]
                register = emitters.REGISTER_BYTES
                shift = b.mul(step, const(I64, together * register))
                vectors = [
                    [load_value(b, pointer(b, b.add(b.add(a, shift), const(I64, u * register)), t))
                     for u in range(together)]
                    for a in queries
                ]  # fmt: skip
                grown = [list(phis) for phis in running]
                for k in range(at_once):
                    other.ask_by_turns(b, asked, k, at_once)
                    at = b.add(addresses[k], b.mul(step, const(I64, step_bytes)))
                    factor = b.add(factors[k], b.mul(step, const(I64, 4))) if factors else None
                    for u, x in enumerate(_read(b, at, storage, t, factor, rows)):
                        for g in range(groups):
                            grown[g][k] = fma_value(b, x, vectors[g][u], grown[g][k])
                following = b.add(step, const(I64, 1))
                step.add_incoming(following, head)
                close(head)
                for g in range(groups):
                    for phi, next_ in zip(running[g], grown[g], strict=True):
                        phi.add_incoming(const(t, 0.0), before)
                        phi.add_incoming(next_, head)
                b.cbranch(b.icmp_signed("<", following, steps), head, after)
                b.position_at_end(after)
                for g in range(groups):
                    sums[g] += grown[g]
            for g in range(groups):
                target = b.add(s, b.mul(s_group, const(I64, g)))
                for block in range(keys // run):
                    x = _add_up(b, sums[g][block * run : (block + 1) * run], run)
                    shift = const(I64, block * emitters.REGISTER_BYTES)
                    store_value(b, x, pointer(b, b.add(target, shift), t))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), codegen

    return tile, keys


def values_tile(number: Any, rows: int, groups: int, columns: int, storage: str, bits: int) -> Any:
    """``tile(table, scales, wanted, wanted_bytes, last, begin, column, p, p_group, o, o_row, factor,
    blocks)``: add up values.

    ``o = o * factor + p @ values``. The tables hold the addresses of the values' rows and their scales, `run`
    for each of the `blocks` of weights; the tile takes `columns` vectors of each, from the one that is
    `column` bytes behind in o. `factor` is a vector a group that repeats each row's. `wanted` are other rows,
    the last one's entry at `last`, of numbers of so many bits: as many as are added up are asked for
    meanwhile, from byte `begin` of all of them on.
    """
    size = number.bitwidth // 8
    lanes = emitters.REGISTER_BYTES // size
    run = lanes // rows
    # The sums of one row would wait for each other.
    sets = 2 if rows * groups == 1 and run > 1 else 1
    each = rows * groups * columns
    unit_bytes = _unit_bytes(storage, lanes)
    asked = run * columns * lanes * bits // 8  # bytes a block

    @intrinsic
    def tile(
        typingctx: Any, table: Any, scales: Any, wanted: Any, wanted_bytes: Any, last: Any, begin: Any,
        column: Any, p: Any, p_group: Any, o: Any, o_row: Any, factor: Any, blocks: Any
    ) -> Any:  # fmt: skip
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            table, scales, wanted, wanted_bytes, last, begin, column, p, p_group, o, o_row, factor, blocks = (
                args
            )
            row = b.add(wanted, b.mul(b.udiv(begin, wanted_bytes), const(I64, 8)))
            row = b.select(b.icmp_unsigned("<", row, last), row, last)
            other = _Wanted(row, b.urem(begin, wanted_bytes), wanted_bytes, last, bits)
            scalar = context.get_value_type(number)
            t = ir.VectorType(scalar, lanes)

            def splat_at(address: Any, shift: int) -> Any:
                at = pointer(b, b.add(address, const(I64, shift)), scalar)
                return splat_value(b, t, load_value(b, at))

            stored_column = b.sdiv(
                b.mul(column, const(I64, unit_bytes)), const(I64, unit(storage) * emitters.REGISTER_BYTES)
            )
            weights = [b.add(p, b.mul(p_group, const(I64, g))) for g in range(groups)]
            before, head, after = b.block, b.append_basic_block("weigh"), b.append_basic_block("weighed")
            b.branch(head)
            b.position_at_end(head)
            block = b.phi(I64)
            block.add_incoming(const(I64, 0), before)
            close = other.loop(b, before)
            running = [b.phi(t) for _ in range(sets * each)]
            grown = list(running)
            here, factors = (b.add(x, b.mul(block, const(I64, 8 * run))) for x in (table, scales))
            at = b.mul(block, const(I64, emitters.REGISTER_BYTES))
            for k in range(run):
                value = load_value(b, pointer(b, b.add(here, const(I64, 8 * k)), I64))
                value = b.add(value, stored_column)
                scale = None
                if storage == "int4":
                    scale = load_value(b, pointer(b, b.add(factors, const(I64, 8 * k)), I64))
                    scale = b.add(scale, b.sdiv(column, const(I64, 32)))
                other.ask_by_turns(b, asked, k, run)
                vectors = []
                for u in range(columns // unit(storage)):
                    at_unit = b.add(value, const(I64, u * unit_bytes))
                    unit_scale = b.add(scale, const(I64, 4 * u)) if scale else None
                    vectors += _read(b, at_unit, storage, t, unit_scale)
                i = k % sets * each
                for g in range(groups):
                    for r in range(rows):
                        x = splat_at(b.add(weights[g], at), (r * run + k) * size)
                        for c in range(columns):
                            grown[i] = fma_value(b, x, vectors[c], grown[i])
                            i += 1
            following = b.add(block, const(I64, 1))
            block.add_incoming(following, head)
            close(head)
            for phi, next_ in zip(running, grown, strict=True):
                phi.add_incoming(const(t, 0.0), before)
                phi.add_incoming(next_, head)
            b.cbranch(b.icmp_signed("<", following, blocks), head, after)
            b.position_at_end(after)
            i = 0
            for g in range(groups):
                for r in range(rows):
                    f = splat_at(factor, g * emitters.REGISTER_BYTES + r * run * size)
                    row = b.add(b.add(o, column), b.mul(o_row, const(I64, g * rows + r)))
                    for c in range(columns):
                        total = grown[i] if sets == 1 else b.fadd(grown[i], grown[each + i])
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
            return x if rows == 1 else _shuffle(b, x, x, [c % run for c in range(lanes)])

        return simd.vector(number)(types.int64), codegen

    return read


def copy_runs(number: Any, run: int, storage: str) -> Any:
    """``copy(source, target)``: the runs of a row's next unit, a vector apart, ordered as `_read` does."""

    @intrinsic
    def copy(typingctx: Any, source: Any, target: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            scalar = context.get_value_type(number)
            count = 2 if storage == "bfloat16" else 1
            x = load_value(b, pointer(b, args[0], ir.VectorType(scalar, run * count)))
            for i in range(count):
                y = x if count == 1 else _shuffle(b, x, x, list(range(i, 2 * run, 2)))
                at = b.add(args[1], const(I64, i * emitters.REGISTER_BYTES))
                store_value(b, y, pointer(b, at, y.type))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return copy


def across(number: Any, rows: int, emit: Any) -> Any:
    """An intrinsic that joins each row's lanes by halves and leaves the result in all of them."""
    lanes = emitters.REGISTER_BYTES * 8 // number.bitwidth

    @intrinsic
    def join(typingctx: Any, x: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            x, distance = args[0], lanes // rows // 2
            while distance:
                x = emit(b, x, _shuffle(b, x, x, [c ^ distance for c in range(lanes)]))
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


# --- memory -------------------------------------------------------------------------------------------------


def widen_unit(storage: str) -> Any:
    """``widen(source, scale, target)``: a unit of stored numbers in their order."""

    @intrinsic
    def widen(typingctx: Any, source: Any, scale: Any, target: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            element = ir.DoubleType() if storage == "float64" else ir.FloatType()
            t = ir.VectorType(element, emitters.REGISTER_BYTES // (8 if storage == "float64" else 4))
            vectors = _read(b, args[0], storage, t, args[1])
            if storage == "bfloat16":
                n = t.count
                orders = [[i // 2 + n * (i % 2) for i in range(h, h + n)] for h in (0, n)]
                vectors = [_shuffle(b, vectors[0], vectors[1], order) for order in orders]
            for i, x in enumerate(vectors):
                store_value(b, x, pointer(b, b.add(args[2], const(I64, i * emitters.REGISTER_BYTES)), t))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), codegen

    return widen


@intrinsic
def narrow_pairs(typingctx: Any, target: Any, even: Any, odd: Any) -> Any:
    """Store two vectors as bfloat16, the numbers of one between those of the other."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        t = ir.VectorType(I32, args[1].type.count)
        low = b.lshr(emitters.round_bits(b, args[1], 16), const(t, 16))
        words = b.or_(low, b.and_(emitters.round_bits(b, args[2], 16), const(t, -0x10000)))
        store_value(b, words, pointer(b, args[0], t))
        return context.get_dummy_value()

    return types.void(types.int64, even, odd), codegen
