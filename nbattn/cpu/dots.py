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

from . import simd
from .simd import I8, I32, I64, const, fma_value, load_value, pointer, splat_value, store_value

UNDER_WAY = 16 if simd.REGISTERS == 32 else 8
"""Sums that a tile keeps in registers."""
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
    near = min(bits, 2 if simd.suffix(sums[0].type.element) == "f32" else 1)
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


def scores_tile(number: Any, rows: int, groups: int) -> tuple[Any, int]:
    """(tile, the keys it takes): the products of `groups` vectors of query rows with some keys.

    ``tile(table, q, q_group, s, s_group, steps)``: `table` holds the keys' addresses, q has `steps` vectors a
    group, s gets one vector a group for each `run` keys; groups are so many bytes apart.
    """
    size = number.bitwidth // 8
    lanes = simd.REGISTER_BYTES // size
    run = lanes // rows
    at_once = min(SCORED_AT_ONCE, UNDER_WAY // groups)
    keys = max(run, at_once)

    @intrinsic
    def tile(typingctx: Any, table: Any, q: Any, q_group: Any, s: Any, s_group: Any, steps: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            table, q, q_group, s, s_group, steps = args
            scalar = context.get_value_type(number)
            t = ir.VectorType(scalar, lanes)

            def key_at(address: Any) -> Any:
                if run == 1:
                    return splat_value(b, t, load_value(b, pointer(b, address, scalar)))
                x = load_value(b, pointer(b, address, ir.VectorType(scalar, run)))
                return x if rows == 1 else _shuffle(b, x, x, [c % run for c in range(lanes)])

            sums: list[list[Any]] = [[] for _ in range(groups)]
            for first in range(0, keys, at_once):
                addresses = [load_value(b, pointer(b, b.add(table, const(I64, 8 * (first + k))), I64))
                             for k in range(at_once)]  # fmt: skip
                queries = [b.add(q, b.mul(q_group, const(I64, g))) for g in range(groups)]
                before, head = b.block, b.append_basic_block("dot")
                after = b.append_basic_block("dotted")
                b.branch(head)
                b.position_at_end(head)
                step = b.phi(I64)
                step.add_incoming(const(I64, 0), before)
                running = [[b.phi(t) for _ in range(at_once)] for _ in range(groups)]
                shift = b.mul(step, const(I64, simd.REGISTER_BYTES))
                vectors = [load_value(b, pointer(b, b.add(a, shift), t)) for a in queries]
                grown: list[list[Any]] = [[] for _ in range(groups)]
                for k in range(at_once):
                    x = key_at(b.add(addresses[k], b.mul(step, const(I64, run * size))))
                    for g in range(groups):
                        grown[g].append(fma_value(b, x, vectors[g], running[g][k]))
                following = b.add(step, const(I64, 1))
                step.add_incoming(following, head)
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
                    shift = const(I64, block * simd.REGISTER_BYTES)
                    store_value(b, x, pointer(b, b.add(target, shift), t))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return tile, keys


def values_tile(number: Any, rows: int, groups: int, columns: int) -> Any:
    """``tile(table, shift, p, p_group, o, o_row, factor, blocks)``: ``o = o * factor + p @ values``.

    `table` holds the addresses of the values' rows, `run` for each of the `blocks` of weights; the tile takes
    `columns` vectors of each, `shift` bytes behind. `factor` is a vector a group that repeats each row's.
    """
    size = number.bitwidth // 8
    lanes = simd.REGISTER_BYTES // size
    run = lanes // rows
    # Too few sums would wait for each other.
    sets = 2 if rows * groups * columns <= 4 and run > 1 else 1
    each = rows * groups * columns

    @intrinsic
    def tile(
        typingctx: Any, table: Any, shift: Any, p: Any, p_group: Any, o: Any, o_row: Any, factor: Any,
        blocks: Any
    ) -> Any:  # fmt: skip
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            table, column, p, p_group, o, o_row, factor, blocks = args
            scalar = context.get_value_type(number)
            t = ir.VectorType(scalar, lanes)

            def splat_at(address: Any, shift: int) -> Any:
                at = pointer(b, b.add(address, const(I64, shift)), scalar)
                return splat_value(b, t, load_value(b, at))

            weights = [b.add(p, b.mul(p_group, const(I64, g))) for g in range(groups)]
            before, head, after = b.block, b.append_basic_block("weigh"), b.append_basic_block("weighed")
            b.branch(head)
            b.position_at_end(head)
            block = b.phi(I64)
            block.add_incoming(const(I64, 0), before)
            running = [b.phi(t) for _ in range(sets * each)]
            grown = list(running)
            here = b.add(table, b.mul(block, const(I64, 8 * run)))
            at = b.mul(block, const(I64, simd.REGISTER_BYTES))
            for k in range(run):
                value = load_value(b, pointer(b, b.add(here, const(I64, 8 * k)), I64))
                value = b.add(value, column)
                vectors = [
                    load_value(b, pointer(b, b.add(value, const(I64, c * simd.REGISTER_BYTES)), t))
                    for c in range(columns)
                ]
                i = k % sets * each
                for g in range(groups):
                    for r in range(rows):
                        x = splat_at(b.add(weights[g], at), (r * run + k) * size)
                        for c in range(columns):
                            grown[i] = fma_value(b, x, vectors[c], grown[i])
                            i += 1
            following = b.add(block, const(I64, 1))
            block.add_incoming(following, head)
            for phi, next_ in zip(running, grown, strict=True):
                phi.add_incoming(const(t, 0.0), before)
                phi.add_incoming(next_, head)
            b.cbranch(b.icmp_signed("<", following, blocks), head, after)
            b.position_at_end(after)
            i = 0
            for g in range(groups):
                for r in range(rows):
                    f = splat_at(factor, g * simd.REGISTER_BYTES + r * run * size)
                    row = b.add(b.add(o, column), b.mul(o_row, const(I64, g * rows + r)))
                    for c in range(columns):
                        total = grown[i] if sets == 1 else b.fadd(grown[i], grown[each + i])
                        place = pointer(b, b.add(row, const(I64, c * simd.REGISTER_BYTES)), t)
                        # Last, so that small products add up before they meet the large sums of earlier keys.
                        store_value(b, fma_value(b, load_value(b, place), f, total), place)
                        i += 1
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return tile


def repeat(number: Any, rows: int) -> Any:
    """``repeat(address)``: `run` numbers for each of a vector's rows."""
    size = number.bitwidth // 8
    lanes = simd.REGISTER_BYTES // size
    run = lanes // rows

    @intrinsic
    def read(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            t = ir.VectorType(context.get_value_type(number), run)
            x = load_value(b, pointer(b, args[0], t))
            return x if rows == 1 else _shuffle(b, x, x, [c % run for c in range(lanes)])

        return simd.vector(number)(types.int64), codegen

    return read


def copy_run(number: Any, storage: str, run: int) -> Any:
    """``copy(source, target)``: widen `run` stored numbers."""

    @intrinsic
    def copy(typingctx: Any, source: Any, target: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            x = load_value(b, pointer(b, args[0], ir.VectorType(simd.stored(storage), run)))
            x = simd.widen_value(b, x, storage)
            store_value(b, x, pointer(b, args[1], x.type))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return copy


def across(number: Any, rows: int, emit: Any) -> Any:
    """An intrinsic that joins each row's lanes by halves and leaves the result in all of them."""
    lanes = simd.REGISTER_BYTES * 8 // number.bitwidth

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


# --- stored numbers that no other kernel reads --------------------------------------------------------------


@intrinsic
def widen_int8(typingctx: Any, source: Any, target: Any) -> Any:
    """One vector of int8 -> float32."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        t = ir.VectorType(ir.FloatType(), simd.REGISTER_BYTES // 4)
        x = load_value(b, pointer(b, args[0], ir.VectorType(I8, t.count)))
        store_value(b, b.sitofp(b.sext(x, ir.VectorType(I32, t.count)), t), pointer(b, args[1], t))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def widen_int4(typingctx: Any, source: Any, scale: Any, target: Any) -> Any:
    """16 bytes -> the 32 numbers in them, times `scale`, as float32."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        source, scale, target = args
        lanes = simd.REGISTER_BYTES // 4
        t, it = ir.VectorType(ir.FloatType(), lanes), ir.VectorType(I32, lanes)
        factor = splat_value(b, t, scale)
        if lanes == 16:
            # The 16 numbers times the scale are a table that one instruction looks up 16 times.
            table = b.fmul(ir.Constant(t, [float(i - 8) for i in range(16)]), factor)
            look_up = simd.cgutils.get_or_insert_function(
                b.module, ir.FunctionType(t, [t, it]), "llvm.x86.avx512.permvar.sf.512"
            )
        for first in range(0, 16, lanes):
            raw = load_value(b, pointer(b, b.add(source, const(I64, first)), ir.VectorType(I8, lanes)))
            raw = b.zext(raw, it)
            for half in range(2):
                x = b.lshr(raw, const(it, 4)) if half else raw
                if lanes == 16:
                    y = b.call(look_up, [table, x])
                else:
                    x = b.and_(x, const(it, 15)) if not half else x
                    y = b.fmul(b.sitofp(b.sub(x, const(it, 8)), t), factor)
                shift = const(I64, (first + 16 * half) * 4)
                store_value(b, y, pointer(b, b.add(target, shift), t))
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64), codegen
