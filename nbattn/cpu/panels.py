"""Between memory as it lies and scratch: transposing reads and writes, widened and paired copies.

Rows of a block need not lie at equal distances, so a table holds the address of each. A transposing read takes
one vector from each of `lanes` rows and turns the square in registers; a row of the result holds one column.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from . import simd
from .simd import I8, I32, I64, const, load_value, pointer, store_value
from .tiles import ROW_BYTES


def _from_rows(lanes: int, element: Any, emit: Callable[[Any, Any, Any], None]) -> Any:
    """``read(table, offset, target)``: `emit(builder, column, address)` for each column of the square at `offset`.

    The r-th row's vector lies at ``table[r] + offset``, and column c's address is ``target + c * ROW_BYTES``.
    """
    t = ir.VectorType(element, lanes)

    @intrinsic
    def read(typingctx: Any, table: Any, offset: Any, target: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            table, offset, target = args
            rows = []
            for r in range(lanes):
                start = load_value(b, pointer(b, b.add(table, const(I64, 8 * r)), I64))
                rows.append(load_value(b, pointer(b, b.add(start, offset), t)))
            for c, column in enumerate(simd.transpose_values(b, rows)):
                emit(b, column, b.add(target, const(I64, c * ROW_BYTES)))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), codegen

    return read


def rows_in(lanes: int, storage: str) -> Any:
    """``read(table, offset, target)``: transpose a square of stored numbers, widened, to `target`."""

    def emit(b: Any, column: Any, address: Any) -> None:
        x = simd.widen_value(b, column, storage)
        store_value(b, x, pointer(b, address, x.type))

    return _from_rows(lanes, simd.stored(storage), emit)


def words_in(lanes: int) -> Any:
    """``read(table, offset, target)``: transpose a square of 32-bit words as they are."""
    return _from_rows(lanes, I32, lambda b, column, address: store_value(b, column, pointer(b, address, column.type)))


def bias_in(lanes: int, storage: str, compute: Any) -> Any:
    """``read(table, offset, target)``: add a square of biases to the scores at `target`; -inf masks even a NaN."""

    def emit(b: Any, column: Any, address: Any) -> None:
        x = simd.widen_value(b, column, storage)
        if x.type.element != compute:
            t = ir.VectorType(compute, lanes)
            x = b.fpext(x, t) if str(compute) == "double" else b.fptrunc(x, t)
        place = pointer(b, address, x.type)
        low = const(x.type, float("-inf"))
        total = b.fadd(load_value(b, place), x)
        store_value(b, b.select(b.fcmp_ordered("==", x, low), low, total), place)

    return _from_rows(lanes, simd.stored(storage), emit)


def mask_in(lanes: int, compute: Any) -> Any:
    """``read(table, offset, target)``: scores at `target` become -inf where a square of bytes is 0."""

    def emit(b: Any, column: Any, address: Any) -> None:
        t = ir.VectorType(compute, lanes)
        place = pointer(b, address, t)
        seen = b.icmp_unsigned("!=", column, const(column.type, 0))
        store_value(b, b.select(seen, load_value(b, place), const(t, float("-inf"))), place)

    return _from_rows(lanes, I8, emit)


def rows_out(lanes: int, storage: str) -> Any:
    """``write(source, factor, table, offset, count)``: transpose `source` times `factor` into the first rows.

    Row c of the source holds column c; `factor` is the address of one number per row of the result.
    """
    number = ir.DoubleType() if storage == "float64" else ir.FloatType()
    t = ir.VectorType(number, lanes)

    @intrinsic
    def write(typingctx: Any, source: Any, factor: Any, table: Any, offset: Any, count: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            source, factor, table, offset, count = args
            scale = load_value(b, pointer(b, factor, t))
            columns = [
                b.fmul(load_value(b, pointer(b, b.add(source, const(I64, c * ROW_BYTES)), t)), scale)
                for c in range(lanes)
            ]
            done = b.append_basic_block("done")
            for r, row in enumerate(simd.transpose_values(b, columns)):
                start = load_value(b, pointer(b, b.add(table, const(I64, 8 * r)), I64))
                x = simd.narrow_value(b, row, storage)
                store_value(b, x, pointer(b, b.add(start, offset), x.type))
                following = b.append_basic_block("row")
                b.cbranch(b.icmp_signed(">", count, const(I64, r + 1)), following, done)
                b.position_at_end(following)
            b.branch(done)
            b.position_at_end(done)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return write


def _pair_words(b: Any, low: Any, high: Any) -> Any:
    """float32 low and high -> 32-bit words of two bfloat16, rounded to nearest even."""
    t = I32 if not isinstance(low.type, ir.VectorType) else ir.VectorType(I32, low.type.count)
    first = b.lshr(simd.round_bits(b, low, 16), const(t, 16))
    return b.or_(first, b.and_(simd.round_bits(b, high, 16), const(t, -0x10000)))


def pairs(vector: bool) -> Any:
    """``pack(address, low, high)``: store float32 low and high as words of two bfloat16; vectors or numbers."""
    numba_type = simd.vector(types.float32) if vector else types.float32

    @intrinsic
    def pack(typingctx: Any, address: Any, low: Any, high: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            words = _pair_words(b, args[1], args[2])
            store_value(b, words, pointer(b, args[0], words.type))
            return context.get_dummy_value()

        return types.void(types.int64, numba_type, numba_type), codegen

    return pack


@intrinsic
def pack_weights(typingctx: Any, address: Any, low: Any, high: Any) -> Any:
    """As `pairs`, for numbers in [0, 1]: half a unit is added before the cut, which rounds to nearest."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        t = ir.VectorType(I32, args[1].type.count)
        halves = ir.VectorType(ir.IntType(16), 2 * t.count)
        low, high = (b.bitcast(b.add(b.bitcast(x, t), const(t, 0x8000)), halves) for x in args[1:])
        take = [c + 1 if c % 2 == 0 else 2 * t.count + c for c in range(2 * t.count)]
        words = b.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, 2 * t.count), take))
        store_value(b, words, pointer(b, args[0], words.type))
        return context.get_dummy_value()

    return types.void(types.int64, low, high), codegen


@intrinsic
def interleave(typingctx: Any, address: Any, low: Any, high: Any) -> Any:
    """Store the 16-bit numbers at `low` and `high`, two registers' worth of words: word c is (low[c], high[c])."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        n = simd.REGISTER_BYTES // 2
        t = ir.VectorType(ir.IntType(16), n)
        x, y = (load_value(b, pointer(b, a, t)) for a in args[1:])
        for half in range(2):
            take = [half * n // 2 + c // 2 + n * (c % 2) for c in range(n)]
            words = b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, n), take))
            store_value(b, words, pointer(b, b.add(args[0], const(I64, half * simd.REGISTER_BYTES)), t))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen
