"""Between memory as it lies and scratch: transposing reads and writes, widened and paired copies.

Rows of a block need not lie at equal distances, so a table holds the address of each. A transposing read
takes one vector from each of `lanes` rows and turns the square in registers; a row of the result holds one
column.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from . import emitters, simd
from .emitters import I32, I64, const, load_value, pointer, store_value
from .tiles import ROW_BYTES

KEYS = 128
"""Keys of one S^T, 32 KB. Fewer move the sums through registers too often, more leave the cache."""
BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
"""Of a number in memory."""


def _from_rows(
    lanes: int,
    element: Any,
    emit: Callable[..., None],
    join: Callable[[Any, Any, Any], Any] | None = None,
    scaled: bool = False,
    ahead: int = 0,
) -> Any:
    """``read(table, offset, target)``: `emit(builder, column, address)` for each column of a square.

    Row r's vector lies at ``table[r] + offset``, and column c's address is ``target + c * ROW_BYTES``. With
    `join`, row r is what `join(builder, vector, following)` makes of it and the vector that follows. Where
    `scaled`, `read` takes one number more, and `emit` gets it in all lanes. What lies so many bytes `ahead`
    in each row is asked for meanwhile: for the second-level cache, as rows that lie a power of two apart push
    each other out of the first.
    """
    t = ir.VectorType(element, lanes)

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        table, offset, target, *factors = args
        factors = [emitters.splat_value(b, ir.VectorType(x.type, lanes), x) for x in factors]
        rows = []
        for r in range(lanes):
            a = b.add(load_value(b, pointer(b, b.add(table, const(I64, 8 * r)), I64)), offset)
            place = pointer(b, a, t)
            x = load_value(b, place)
            rows.append(join(b, x, load_value(b, b.gep(place, [const(I64, 1)]))) if join else x)
            if ahead:
                emitters.prefetch_value(b, b.add(a, const(I64, ahead)), locality=2)
        for c, column in enumerate(emitters.transpose_values(b, rows)):
            emit(b, column, b.add(target, const(I64, c * ROW_BYTES)), *factors)
        return context.get_dummy_value()

    @intrinsic
    def read(typingctx: Any, table: Any, offset: Any, target: Any) -> Any:
        return types.void(*[types.int64] * 3), codegen

    @intrinsic
    def read_scaled(typingctx: Any, table: Any, offset: Any, target: Any, factor: Any) -> Any:
        return types.void(*[types.int64] * 3, factor), codegen

    return read if not scaled else read_scaled


def rows_in(lanes: int, storage: str) -> Any:
    """``read(table, offset, target)``: transpose a square of stored numbers, widened, to `target`."""

    def emit(b: Any, column: Any, address: Any) -> None:
        x = emitters.widen_value(b, column, storage)
        store_value(b, x, pointer(b, address, x.type))

    return _from_rows(lanes, emitters.stored(storage), emit)


def words_in(lanes: int, storage: str, part: Any) -> Any:
    """``read(table, offset, target)``: transpose a square of words of two bfloat16.

    Other numbers are widened, `part` is taken of them, and that rounded.
    """

    def emit(b: Any, column: Any, address: Any) -> None:
        store_value(b, column, pointer(b, address, column.type))

    def round_pairs(b: Any, low: Any, high: Any) -> Any:
        low, high = (part(b, emitters.widen_value(b, x, storage)) for x in (low, high))
        return b.bitcast(emitters.narrow_halves_value(b, low, high), ir.VectorType(I32, lanes))

    if storage == "bfloat16":
        return _from_rows(lanes, I32, emit)
    return _from_rows(lanes, emitters.stored(storage), emit, round_pairs)


def bias_in(lanes: int, storage: str, compute: Any) -> Any:
    """``read(table, offset, target, scale)``: scale the scores at `target` and add a square of biases."""

    def emit(b: Any, column: Any, address: Any, scale: Any) -> None:
        x = emitters.widen_value(b, column, storage)
        if x.type.element != compute:
            x = b.fpext(x, scale.type) if str(compute) == "double" else b.fptrunc(x, scale.type)
        place = pointer(b, address, x.type)
        store_value(b, emitters.fma_value(b, load_value(b, place), scale, x), place)

    return _from_rows(lanes, emitters.stored(storage), emit, scaled=True, ahead=KEYS * BYTES[storage])


def rows_out(lanes: int, storage: str) -> tuple[Any, Any]:
    """``divide(source, divisor, table, offset, count)``: transpose `source` over `divisor` into rows, and
    ``write(source, table, offset, count)``, the same without a divisor.

    Row c of the source holds column c; `divisor` is the address of one number per row of the result.
    """
    number = ir.DoubleType() if storage == "float64" else ir.FloatType()
    t = ir.VectorType(number, lanes)

    def emit(b: Any, source: Any, total: Any, table: Any, offset: Any, count: Any) -> None:
        columns = [
            load_value(b, pointer(b, b.add(source, const(I64, c * ROW_BYTES)), t)) for c in range(lanes)
        ]
        if total is not None:
            inverse = b.fdiv(const(t, 1.0), total)
            columns = [emitters.quotient_value(b, x, total, inverse) for x in columns]
        done = b.append_basic_block("done")
        for r, row in enumerate(emitters.transpose_values(b, columns)):
            start = load_value(b, pointer(b, b.add(table, const(I64, 8 * r)), I64))
            x = emitters.narrow_value(b, row, storage)
            store_value(b, x, pointer(b, b.add(start, offset), x.type))
            following = b.append_basic_block("row")
            b.cbranch(b.icmp_signed(">", count, const(I64, r + 1)), following, done)
            b.position_at_end(following)
        b.branch(done)
        b.position_at_end(done)

    @intrinsic
    def divide(typingctx: Any, source: Any, divisor: Any, table: Any, offset: Any, count: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            source, divisor, *rest = args
            emit(b, source, load_value(b, pointer(b, divisor, t)), *rest)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    @intrinsic
    def write(typingctx: Any, source: Any, table: Any, offset: Any, count: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            source, *rest = args
            emit(b, source, None, *rest)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    return divide, write


@intrinsic
def pair_words(typingctx: Any, address: Any, low: Any, high: Any) -> Any:
    """Store two float32 numbers as a word of two bfloat16, rounded to nearest even."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        first = b.lshr(emitters.round_bits(b, args[1], 16), const(I32, 16))
        word = b.or_(first, b.and_(emitters.round_bits(b, args[2], 16), const(I32, -0x10000)))
        store_value(b, word, pointer(b, args[0], I32))
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.float32), codegen


@intrinsic
def pack_weights(typingctx: Any, address: Any, low: Any, high: Any) -> Any:
    """As `pair_words`, for numbers in [0, 1]: adding half a unit before the cut rounds to nearest."""

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
    """Store two registers of words: word c holds the 16-bit numbers (low[c], high[c])."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        n = emitters.REGISTER_BYTES // 2
        t = ir.VectorType(ir.IntType(16), n)
        x, y = (load_value(b, pointer(b, a, t)) for a in args[1:])
        for half in range(2):
            take = [half * n // 2 + c // 2 + n * (c % 2) for c in range(n)]
            words = b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, n), take))
            store_value(b, words, pointer(b, b.add(args[0], const(I64, half * emitters.REGISTER_BYTES)), t))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


def square_of_words() -> Any:
    """``turn(source, stride, target)``: transpose a square of words of 8 bytes, one register each row.

    Rows of the source lie `stride` bytes apart, those of the target `KEYS` words.
    """
    n = emitters.REGISTER_BYTES // 8
    t = ir.VectorType(I64, n)

    @intrinsic
    def turn(typingctx: Any, source: Any, stride: Any, target: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            source, stride, target = args
            rows = [
                load_value(b, pointer(b, b.add(source, b.mul(stride, const(I64, r))), t)) for r in range(n)
            ]
            for c, x in enumerate(emitters.transpose_values(b, rows)):
                store_value(b, x, pointer(b, b.add(target, const(I64, c * KEYS * 8)), t))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), codegen

    return turn


@intrinsic
def pack_columns(typingctx: Any, address: Any, low: Any, high: Any) -> Any:
    """Store two float32 vectors of columns that follow each other as words of two bfloat16."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x = emitters.narrow_halves_value(b, *args[1:])
        store_value(b, x, pointer(b, args[0], x.type))
        return context.get_dummy_value()

    return types.void(types.int64, low, high), codegen


@intrinsic
def pack_rows(typingctx: Any, address: Any, low: Any, high: Any) -> Any:
    """Store the float32 vectors of two rows as words of two bfloat16."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        both = emitters.narrow_halves_value(b, *args[1:])
        n = both.type.count // 2
        order = ir.Constant(ir.VectorType(I32, 2 * n), [c // 2 + n * (c % 2) for c in range(2 * n)])
        words = b.shuffle_vector(both, ir.Constant(both.type, ir.Undefined), order)
        store_value(b, words, pointer(b, args[0], words.type))
        return context.get_dummy_value()

    return types.void(types.int64, low, high), codegen


def square_of_pairs(storage: str, part: Any) -> Any:
    """``turn(source, stride, target)``: 32 rows x 16 columns -> v^T, 16 rows of words of two of the rows.

    Numbers that are no bfloat16 are widened, `part` is taken of them, and that rounded.

    Rows of the source lie `stride` bytes apart, those of the target `KEYS` / 2 words.
    """
    n = emitters.REGISTER_BYTES // 4

    @intrinsic
    def turn(typingctx: Any, source: Any, stride: Any, target: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            source, stride, target = args
            t = ir.VectorType(emitters.stored(storage), n)
            order = ir.Constant(ir.VectorType(I32, 2 * n), [c // 2 + n * (c % 2) for c in range(2 * n)])
            words = []
            for r in range(0, 2 * n, 2):
                x, y = (
                    load_value(b, pointer(b, b.add(source, b.mul(stride, const(I64, r + i))), t))
                    for i in (0, 1)
                )
                if storage == "bfloat16":
                    pairs = b.shuffle_vector(x, y, order)
                else:
                    x, y = (part(b, emitters.widen_value(b, z, storage)) for z in (x, y))
                    both = emitters.narrow_halves_value(b, x, y)
                    pairs = b.shuffle_vector(both, ir.Constant(both.type, ir.Undefined), order)
                words.append(b.bitcast(pairs, ir.VectorType(I32, n)))
            for c, x in enumerate(emitters.transpose_values(b, words)):
                store_value(b, x, pointer(b, b.add(target, const(I64, c * KEYS * 2)), x.type))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), codegen

    return turn


def parts(operands: str) -> list[tuple[Any, Any]]:
    """What bfloat16 are made of, as emitter and as function: numbers as they are, or cut into two."""
    if operands == "split":
        return [(emitters.upper_value, simd.upper), (emitters.rest_value, simd.rest)]
    return [(lambda b, x: x, simd.same)]


def build(jit: Any, storage: str, operands: str, converts: bool, as_operand: Any) -> Any:
    """The compiled function ``panel(p, w, head, tile, key, value, length)``.

    It returns the address of a tile's converted keys, whose values follow `key_panel_bytes` later; a tile
    that its slot still holds from another block of the same head is not converted again. `as_operand` is what
    each number goes through. Keys lie row by row; values as v^T in words of 8 bytes, which hold two columns
    of float32 or one of float64. For "pairs" and "amx" the panels hold words of two bfloat16: of two columns
    of the keys and two rows of the values, for "amx" those as v^T, with 0 in what fills its tiles up; for
    "split" a plane of what the number's upper bits are, then one of the rest.
    """
    tiled = operands in ("amx", "split")
    pairs = tiled or operands == "pairs"
    planes = parts(operands)
    size = 8 if storage == "float64" else 4
    stored = 2 if storage in ("float16", "bfloat16") else size
    lanes = emitters.REGISTER_BYTES // size
    load_stored, _, get_stored, _ = simd.loads(storage)
    load, store, get, put = simd.loads("float64" if size == 8 else "float32")
    turn_square, square, per_word = square_of_words(), emitters.REGISTER_BYTES // 8, 8 // size
    turn_pairs: Any = square_of_pairs(storage, planes[0][0]) if tiled else None
    turn_rest: Any = square_of_pairs(storage, planes[-1][0]) if tiled else None
    split, first, second = operands == "split", planes[0][1], planes[-1][1]
    get_int, put_int = simd.scalars(types.int64)
    pack = pair_words

    @jit
    def convert(source, stride, rows, columns, target):
        """rows x columns of stored numbers -> contiguous numbers that the tiles multiply."""
        for r in range(rows):
            a, t = source + r * stride * stored, target + r * columns * size
            whole = columns // lanes * lanes
            for c in range(0, whole, lanes):
                store(t + c * size, as_operand(load_stored(a + c * stored)))
            for c in range(whole, columns):
                put(t + c * size, as_operand(get_stored(a + c * stored)))

    @jit
    def turn_rows(source, stride, rows, columns, target):
        """rows x columns -> v^T in words of 8 bytes."""
        words = columns // per_word
        whole_rows, whole_words = rows // square * square, words // square * square
        for c in range(0, whole_words, square):
            for r in range(0, whole_rows, square):
                turn_square(source + r * stride * size + c * 8, stride * size, target + (c * KEYS + r) * 8)
        for c in range(columns):
            for r in range(whole_rows if c < whole_words * per_word else 0, rows):
                x = get(source + (r * stride + c) * size)
                put(target + (c // per_word * KEYS + r) * 8 + c % per_word * size, x)

    @jit
    def clear(target, words):
        for i in range(0, words, lanes):
            store(target + i * size, simd.splat(np.float32(0)))

    @jit
    def pair_columns(source, stride, rows, columns, target):
        """rows x columns -> words of two columns that lie side by side."""
        for r in range(rows):
            a, t = source + r * stride * stored, target + r * ((columns + 1) // 2) * size
            whole = columns // (2 * lanes) * (2 * lanes)
            for c in range(0, whole, 2 * lanes):
                pack_columns(t + c // 2 * size, load_stored(a + c * stored),
                             load_stored(a + (c + lanes) * stored))  # fmt: skip
            for c in range(whole, columns, 2):
                high = get_stored(a + (c + 1) * stored) if c + 1 < columns else np.float32(0)
                pack(t + c // 2 * size, get_stored(a + c * stored), high)

    @jit
    def pack_parts(target, plane, low, high):
        pack(target, first(low), first(high))
        if split:
            pack(target + plane, second(low), second(high))

    @jit
    def tile_columns(source, stride, rows, columns, words, target):
        """`pair_columns` into rows of so many words, up to 16 more rows and words 0."""
        plane = KEYS * words * size
        clear(target, (rows + 15) // 16 * 16 * words)
        if split:
            clear(target + plane, (rows + 15) // 16 * 16 * words)
        whole = columns // (2 * lanes) * (2 * lanes)
        for r in range(rows):
            a, t = source + r * stride * stored, target + r * words * size
            for c in range(0, whole, 2 * lanes):
                if storage == "bfloat16":
                    store(t + c // 2 * size, load(a + c * stored))
                else:
                    x, y = load_stored(a + c * stored), load_stored(a + (c + lanes) * stored)
                    pack_columns(t + c // 2 * size, first(x), first(y))
                    if split:
                        pack_columns(t + c // 2 * size + plane, second(x), second(y))
            for c in range(whole, columns, 2):
                high = get_stored(a + (c + 1) * stored) if c + 1 < columns else np.float32(0)
                pack_parts(t + c // 2 * size, plane, get_stored(a + c * stored), high)

    @jit
    def tile_rows(source, stride, rows, columns, target):
        """rows x columns -> v^T: for each column words of two rows that follow each other."""
        whole_rows, whole_columns = rows // 32 * 32, columns // 16 * 16
        words = (columns + 15) // 16 * 16 * (KEYS // 2)
        plane = words * size
        if rows < KEYS or whole_columns < columns:
            clear(target, 2 * words if split else words)
        for c in range(0, whole_columns, 16):
            for r in range(0, whole_rows, 32):
                a, t = source + (r * stride + c) * stored, target + (c * (KEYS // 2) + r // 2) * size
                turn_pairs(a, stride * stored, t)
                if split:
                    turn_rest(a, stride * stored, t + plane)
        for c in range(columns):
            for r in range(whole_rows if c < whole_columns else 0, rows, 2):
                a = source + (r * stride + c) * stored
                high = get_stored(a + stride * stored) if r + 1 < rows else np.float32(0)
                pack_parts(target + (c * (KEYS // 2) + r // 2) * size, plane, get_stored(a), high)

    @jit
    def pair_rows(source, stride, rows, columns, target):
        """rows x columns -> words of two rows; a row that is missing in the last word is 0."""
        for r in range(0, rows, 2):
            a, t = source + r * stride * stored, target + r // 2 * columns * size
            second = a + stride * stored
            c = 0
            while r + 1 < rows and c + 2 * lanes <= columns:
                if storage == "bfloat16":
                    interleave(t + c * size, a + c * stored, second + c * stored)
                else:
                    for half in range(c, c + 2 * lanes, lanes):
                        pack_rows(t + half * size, load_stored(a + half * stored),
                                  load_stored(second + half * stored))  # fmt: skip
                c += 2 * lanes
            while c < columns:
                high = get_stored(second + c * stored) if r + 1 < rows else np.float32(0)
                pack(t + c * size, get_stored(a + c * stored), high)
                c += 1

    @jit
    def panel(p, w, head, tile, key, value, length):
        """The address of a tile's converted keys; its values follow `key_panel_bytes` later."""
        slot = tile % p.slots
        a = w.panels + slot * p.slot_bytes
        tag = head * (p.key_tiles + 1) + tile + 1
        if get_int(w.tags + 8 * slot) != tag:
            put_int(w.tags + 8 * slot, tag)
            rows = min(KEYS, length - tile * KEYS)
            key += tile * KEYS * p.key_s * stored
            value += tile * KEYS * p.value_s * stored
            if tiled:
                tile_columns(key, p.key_s, rows, p.head_dim, p.query_rows, a)
                tile_rows(value, p.value_s, rows, p.value_dim, a + p.key_panel_bytes)
            elif pairs:
                if p.key_panel_bytes > 0:
                    pair_columns(key, p.key_s, rows, p.head_dim, a)
                pair_rows(value, p.value_s, rows, p.value_dim, a + p.key_panel_bytes)
            elif converts:
                convert(key, p.key_s, rows, p.head_dim, a)
                # Where the careful sums of a block lie, which come later.
                convert(value, p.value_s, rows, p.value_dim, w.finite)
                turn_rows(w.finite, p.value_dim, rows, p.value_dim, a + p.key_panel_bytes)
            else:
                turn_rows(value, p.value_s, rows, p.value_dim, a)
        return a

    return panel
