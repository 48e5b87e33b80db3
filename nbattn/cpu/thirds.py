"""Products of float32 on the tile registers of AMX: each number as the sum of three bfloat16.

The first is the number rounded to 8 bits, the second what is left, so rounded, the third the rest, so that
their sum is exact. Six of the nine products are taken; the others are below 2**-25 of the whole. That is 96
cycles for 16 x 16 sums over 32 numbers, where the register tile takes 256.

Operands lie as contiguous tiles of `amx`, of 1 KB, the three parts one after the other:
keys[row // 16][column // 32], values^T[column // 16][key // 32], and what has a query in each lane, q^T and
weights, [row // 32][query // 16]. A word holds the columns, or keys, i and i + 16 of such 32.

AMX takes numbers below 2**-126 as 0. So a run of keys or values that holds some that are too large or too
small for exact parts is multiplied in float32, and so are rows of queries that do: what a row gets depends on
what its own head holds, and on nothing else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import emitters, simd
from .amx import ROW, ROWS, emit
from .emitters import I8, I16, I32, I64, const, load_value, pointer, store_value
from .panels import KEYS
from .tiles import ROW_BYTES

TILE = ROW * ROWS
"""Bytes of a tile."""
PARTS = 3
STEP = PARTS * TILE
"""Bytes of the parts of a tile."""
ACROSS = 4 * STEP
"""Bytes of 32 rows of q^T or of weights."""
KEY_STEPS = KEYS // 32
WEIGHT_BYTES = KEY_STEPS * ACROSS

LARGEST = 2.0**55
"""Of queries and keys. Their parts lose less than 2**-126 each: with a scale up to `LARGEST_SCALE` no score
moves by 2**-30."""
LARGEST_SCALE = 2.0**30
VALUES = 2.0**-50, 2.0**60
"""Between what magnitudes values lie that are not 0."""
SHIFT = 48
"""Weights are multiplied by 2**48 and values divided by it: so neither have parts below 2**-126."""
ROWS_THAT_PAY = 256
"""Rows of queries that share keys from which on converting those pays."""
ODD_KEYS, ODD_VALUES = 1, 2
"""Flags of a tile of keys: it has keys, or values, that are multiplied in float32."""
BY_PARTS, ODD_QUERIES = 1, 2
"""Flags of a block of queries."""
RUN = 64
"""Keys that are multiplied together: what belongs to 128 would not fit the first-level cache."""

PATH = (0, 2), (0, 1), (1, 1), (1, 0), (2, 0), (0, 0)
"""Products of parts, small ones first; from one to the next only one operand is loaded anew."""


def parts_values(b: Any, xs: list[Any]) -> list[list[Any]]:
    """For each of three parts, those of all numbers. Halves are rounded away from 0."""
    it = emitters.int_type(xs[0].type)
    parts = []
    for _ in range(PARTS - 1):
        bits = [b.add(b.bitcast(x, it), const(it, 0x8000)) for x in xs]
        rounded = [b.bitcast(b.and_(x, const(it, -0x10000)), xs[0].type) for x in bits]
        parts.append(rounded)
        xs = [b.fsub(x, y) for x, y in zip(xs, rounded, strict=True)]
    return [*parts, xs]


def odd_value(b: Any, x: Any, seen: Any, low: float, high: float) -> Any:
    """1 in the lanes where `seen` is, or where x is neither 0 nor between the limits in size."""
    it = emitters.int_type(x.type)
    low_bits, high_bits = (int(np.float32(limit).view(np.int32)) for limit in (low, high))
    size = b.and_(b.bitcast(x, it), const(it, 0x7FFFFFFF))
    far = b.icmp_unsigned(">", b.sub(size, const(it, low_bits)), const(it, high_bits - low_bits))
    odd = b.and_(far, b.icmp_unsigned("!=", size, const(it, 0)))
    return b.select(odd, const(x.type, 1.0), seen)


_t = ir.VectorType(ir.FloatType(), 16)
_vector = simd.vector(types.float32)


def _some(b: Any, count: Any) -> Any:
    """A mask of the first `count` of 16 lanes."""
    none, all_ = const(I64, 0), const(I64, 16)
    count = b.select(b.icmp_signed(">", count, none), count, none)
    count = b.select(b.icmp_signed("<", count, all_), count, all_)
    return b.trunc(b.sub(b.shl(const(I64, 1), count), const(I64, 1)), I16)


def _load_some(b: Any, address: Any, mask: Any) -> Any:
    """A vector with 0 where the mask is not set; nothing is read there."""
    lanes = ir.VectorType(ir.IntType(1), 16)
    place = pointer(b, address, _t)
    fn = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(_t, [place.type, I32, lanes, _t]), "llvm.masked.load.v16f32.p0"
    )
    return b.call(fn, [place, const(I32, 4), b.bitcast(mask, lanes), const(_t, 0.0)])


def store_words(b: Any, lows: list[Any], highs: list[Any], address: Any) -> None:
    """Rows of words of each part: of the first of `lows` and the first of `highs`, and so on."""
    t = emitters.int_type(lows[0].type)
    count = len(lows)
    for i, part in enumerate(parts_values(b, [*lows, *highs])):
        # Two instructions a word where vpermt2w, which could cut the halves out itself, takes three.
        numbers = [b.bitcast(x, t) for x in part]
        shifted = [b.lshr(x, const(t, 16)) for x in numbers[:count]]
        for r, (x, y) in enumerate(zip(shifted, numbers[count:], strict=True)):
            # The last part of a number that has bits below 2**-133 is no bfloat16.
            y = b.and_(y, const(t, -0x10000)) if i == PARTS - 1 else y
            store_value(b, b.or_(x, y), pointer(b, b.add(address, const(I64, i * TILE + r * ROW)), t))


def _keys_in(whole: bool) -> Any:
    """``part(source, count, target, seen)``: up to 32 numbers of a key -> a row of a tile of each part.

    Where they are `whole`, all 32. Returns `seen` with what `odd_value` adds.
    """

    @intrinsic
    def part(typingctx: Any, source: Any, count: Any, target: Any, seen: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            source, count, target, seen = args
            halves = []
            for i in range(2):
                place = b.add(source, const(I64, 64 * i))
                if whole:
                    x = load_value(b, pointer(b, place, _t))
                else:
                    x = _load_some(b, place, _some(b, b.sub(count, const(I64, 16 * i))))
                seen = odd_value(b, x, seen, 0.0, LARGEST)
                halves.append([x])
            store_words(b, halves[0], halves[1], target)
            return seen

        return _vector(*[types.int64] * 3, _vector), codegen

    return part


def _values_in(whole: bool) -> Any:
    """``part(source, stride, rows, columns, target, seen)``: values -> a tile of v^T of each part.

    Up to 32 rows x 16 columns, or that much where they are `whole`. Returns `seen` as `_keys_in` does.
    """

    @intrinsic
    def part(
        typingctx: Any, source: Any, stride: Any, rows: Any, columns: Any, target: Any, seen: Any
    ) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            source, stride, rows, columns, target, seen = args
            mask = _some(b, columns)
            halves = []
            for i in range(2):
                square = []
                for r in range(16 * i, 16 * i + 16):
                    place = b.add(source, b.mul(stride, const(I64, r)))
                    if whole:
                        x = load_value(b, pointer(b, place, _t))
                        emitters.prefetch_value(b, b.add(place, b.mul(stride, const(I64, KEYS))))
                    else:
                        here = b.select(b.icmp_signed("<", const(I64, r), rows), mask, const(I16, 0))
                        x = _load_some(b, place, here)
                    seen = odd_value(b, x, seen, *VALUES)
                    square.append(b.fmul(x, const(_t, 2.0**-SHIFT)))
                halves.append(emitters.transpose_values(b, square))
            for c in range(0, 16, 2):
                low, high = (half[c : c + 2] for half in halves)
                store_words(b, low, high, b.add(target, const(I64, c * ROW)))
            return seen

        return _vector(*[types.int64] * 5, _vector), codegen

    return part


@intrinsic
def put_parts(typingctx: Any, target: Any, x: Any, y: Any) -> Any:
    """Two numbers of each query -> a row of words of a tile of each part."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        store_words(b, [args[1]], [args[2]], args[0])
        return context.get_dummy_value()

    return types.void(types.int64, x, y), codegen


@intrinsic
def place(typingctx: Any, v: Any, j: Any) -> Any:
    """Where vector v of rows j and j + 16 lies in parts of q^T or of weights, for j % 32 < 16."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        v, j = args
        across = b.mul(b.lshr(j, const(I64, 5)), const(I64, ACROSS))
        row = b.mul(b.and_(j, const(I64, 15)), const(I64, ROW))
        return b.add(b.add(across, b.mul(v, const(I64, STEP))), row)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def odd_in(typingctx: Any, x: Any, seen: Any) -> Any:
    """`odd_value` for queries."""
    return x(x, x), lambda context, b, signature, args: odd_value(b, args[0], args[1], 0.0, LARGEST)


@intrinsic
def any_odd(typingctx: Any, seen: Any) -> Any:
    """Whether any lane is not 0."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        found = b.fcmp_unordered("!=", args[0], const(args[0].type, 0.0))
        return b.icmp_unsigned("!=", b.bitcast(found, I16), const(I16, 0))

    return types.boolean(seen), codegen


def _tile(rows: int, columns: int, add: bool) -> Any:
    """``c = a @ b``, or ``c +=`` that, for `rows` tiles of a, `a_row` bytes apart, by `columns` of b."""
    sums = [[I8(i * columns + j) for j in range(columns)] for i in range(rows)]
    lefts = [I8(rows * columns + i) for i in range(rows)]
    rights = [I8(rows * columns + rows + j) for j in range(columns)]

    @intrinsic
    def tile(typingctx: Any, a: Any, a_row: Any, b: Any, c: Any, steps: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            a, a_row, b, c, steps = args
            step, row = const(I64, ROW_BYTES), const(I64, ROW)

            def at(base: Any, shift: Any) -> Any:
                return pointer(builder, builder.add(base, shift), I8)

            places = [
                (sums[i][j], at(c, const(I64, i * ROWS * ROW_BYTES + j * ROW)))
                for i in range(rows)
                for j in range(columns)
            ]
            for total, place in places:
                if add:
                    emit(builder, "tileloadd64", total, place, step)
                else:
                    emit(builder, "tilezero", total)
            before, head = builder.block, builder.append_basic_block("reduce")
            after = builder.append_basic_block("reduced")
            builder.branch(head)
            builder.position_at_end(head)
            k = builder.phi(I64)
            k.add_incoming(const(I64, 0), before)
            left_step = builder.add(a, builder.mul(k, const(I64, STEP)))
            right_step = builder.add(b, builder.mul(k, const(I64, ACROSS)))
            held: tuple[int | None, int | None] = None, None
            for left, right in PATH:
                for i in range(rows if held[0] != left else 0):
                    shift = builder.add(builder.mul(a_row, const(I64, i)), const(I64, left * TILE))
                    emit(builder, "tileloadd64", lefts[i], at(left_step, shift), row)
                for j in range(columns if held[1] != right else 0):
                    shift = const(I64, j * STEP + right * TILE)
                    emit(builder, "tileloadd64", rights[j], at(right_step, shift), row)
                held = left, right
                for i in range(rows):
                    for j in range(columns):
                        emit(builder, "tdpbf16ps", sums[i][j], lefts[i], rights[j])
            following = builder.add(k, const(I64, 1))
            k.add_incoming(following, head)
            builder.cbranch(builder.icmp_signed("<", following, steps), head, after)
            builder.position_at_end(after)
            for total, place in places:
                emit(builder, "tilestored64", total, place, step)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return tile


def product(jit: Any, add: bool) -> Any:
    """The compiled function ``multiply(a, a_row, rows, b, c, vectors, steps)``.

    ``c[rows, :] = a[rows, :] @ b``, or ``c +=`` that, over `vectors` vectors of columns and `steps` times 32
    numbers; `rows` counts tiles, `a_row` bytes apart.
    """
    square, upright, flat, single = (_tile(*shape, add) for shape in ((2, 2), (2, 1), (1, 2), (1, 1)))

    @jit
    def multiply(a, a_row, rows, b, c, vectors, steps):
        for r in range(0, rows, 2):
            left, sums = a + r * a_row, c + r * ROWS * ROW_BYTES
            for v in range(0, vectors, 2):
                right, totals = b + v * STEP, sums + v * ROW
                if v + 1 < vectors:
                    if r + 1 < rows:
                        square(left, a_row, right, totals, steps)
                    else:
                        flat(left, a_row, right, totals, steps)
                elif r + 1 < rows:
                    upright(left, a_row, right, totals, steps)
                else:
                    single(left, a_row, right, totals, steps)

    return multiply


def build(jit: Any) -> tuple[Any, Any, Any]:
    """The compiled functions

    ``panel(p, w, head, tile, key, value, length)``: the address of a tile's parts of keys, whose values
    follow `key_panel_bytes` later, and 0 for a block that is not multiplied by parts;
    ``odd(p, w, key0)``: what of a run is multiplied in float32;
    ``part_queries(p, w, vectors)``: parts of q^T, and which queries are odd.
    """
    load, store, _, _ = simd.loads("float32")
    get_int, put_int = simd.scalars(types.int64)
    register, size = emitters.REGISTER_BYTES, 4
    (whole_keys, some_keys), (whole_values, some_values) = (
        (make(True), make(False)) for make in (_keys_in, _values_in)
    )

    @jit
    def slot_of(p, tile):
        # Where not all tiles have a slot, as many as can keep theirs from block to block.
        return tile % p.slots if p.slots_turn else min(tile, p.slots - 1)

    @jit
    def panel(p, w, head, tile, key, value, length):
        if get_int(w.choice) == 0:
            return 0
        slot = slot_of(p, tile)
        a, tag = w.panels + slot * p.slot_bytes, w.tags + 8 * slot
        mine = (head * (p.key_tiles + 1) + tile + 1) * 4
        if get_int(tag) & -4 == mine:
            return a
        rows = min(KEYS, length - tile * KEYS)
        steps = (p.head_dim + 31) // 32
        key += tile * KEYS * p.key_s * size
        value += tile * KEYS * p.value_s * size
        zero = simd.splat(np.float32(0))
        seen = zero
        for r in range((rows + 15) // 16 * 16):
            for c in range(0, p.head_dim, 32):
                source = key + (r * p.key_s + c) * size
                # The next tile of keys, and of values, while this one is converted.
                simd.prefetch(source + KEYS * p.key_s * size)
                simd.prefetch(source + KEYS * p.key_s * size + 64)
                t = a + (r // 16 * steps + c // 32) * STEP + r % 16 * ROW
                count = p.head_dim - c if r < rows else 0
                seen = (
                    whole_keys(source, count, t, seen) if count >= 32 else some_keys(source, count, t, seen)
                )
        if any_odd(seen):
            mine += ODD_KEYS
        a += p.key_panel_bytes
        seen = zero
        for r in range(0, rows, 32):
            for c in range(0, p.value_dim, 16):
                source = value + (r * p.value_s + c) * size
                t = a + (c // 16 * KEY_STEPS + r // 32) * STEP
                if rows - r >= 32 and p.value_dim - c >= 16:
                    seen = whole_values(source, p.value_s * size, 32, 16, t, seen)
                else:
                    seen = some_values(source, p.value_s * size, rows - r, p.value_dim - c, t, seen)
        if any_odd(seen):
            mine += ODD_VALUES
        put_int(tag, mine)
        return a - p.key_panel_bytes

    @jit
    def odd(p, w, key0):
        if get_int(w.choice) == 0:
            return ODD_KEYS + ODD_VALUES
        return get_int(w.tags + 8 * slot_of(p, key0 // KEYS)) & 3

    @jit
    def part_queries(p, w, vectors):
        zero = simd.splat(np.float32(0))
        for v in range(vectors):
            seen = zero
            for c in range(0, p.head_dim, 32):
                for d in range(c, c + 16):
                    t = w.q + d * ROW_BYTES + v * register
                    x = load(t) if d < p.head_dim else zero
                    y = load(t + 16 * ROW_BYTES) if d + 16 < p.head_dim else zero
                    put_parts(w.query_parts + place(v, d), x, y)
                    seen = odd_in(y, odd_in(x, seen))
            store(w.odd + v * register, seen)
            if any_odd(seen):
                put_int(w.choice, BY_PARTS + ODD_QUERIES)

    return panel, odd, part_queries
