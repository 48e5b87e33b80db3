"""How tiles of decode read keys and values of a storage dtype, and multiply them.

A `kind` names it. Most are storage dtypes whose numbers are widened in registers. Where the processor
multiplies narrow numbers as they lie there are three more: "nibbles", int4 numbers, which have tiles of their
own; "pairs" of bfloat16; and "bytes", int8 numbers in fours (keys) and twos (values) that whole numbers of
16 bits are multiplied with. Queries, or weights and the
scales of values, are rounded to such numbers: what one of them is worth is the row's largest / 32512, so that
they are off by less than a two hundredth of what the keys and values themselves are off.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import emitters
from .emitters import I8, I16, I32, I64, const, fma_value, load_value, pointer, splat_value, store_value

LARGEST_QUERY, LARGEST_WEIGHT = 127 * 256, 32767
"""Whole numbers that queries and weights are rounded to. The upper half of a query must fit a byte."""
LEAST = 2.0**-112
"""A largest query or weight below it is taken for this one: its inverse must be finite."""


def shuffle(b: Any, x: Any, y: Any, order: list[int]) -> Any:
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(order)), order))


def read_as(storage: str) -> str:
    """The kind that numbers of a storage dtype are read as in place."""
    narrow = {
        "bfloat16": "pairs" if emitters.PAIRS else "",
        "int8": "bytes" if emitters.BYTES else "",
        "int4": "nibbles" if emitters.NIBBLES else "",
    }
    return narrow.get(storage) or storage


def unit(kind: str) -> int:
    """Vectors' worth of a key's numbers that are read together."""
    return {"bfloat16": 2, "pairs": 2, "bytes": 4, "int4": 32 // (emitters.REGISTER_BYTES // 4)}.get(kind, 1)


def value_unit(kind: str) -> int:
    """Vectors' worth of a value's numbers that are read together."""
    return 2 if kind == "bytes" else unit(kind)


def query_vectors(kind: str) -> int:
    """Vectors that a unit of queries takes: of bytes the upper halves, then the lower ones."""
    return {"pairs": 1, "bytes": 2}.get(kind, unit(kind))


def query_bytes(kind: str, size: int) -> int:
    """Bytes of a query's number, of `size` before."""
    return size * query_vectors(kind) // unit(kind)


def behind_bytes(kind: str) -> int:
    """Bytes behind a group's queries: what biased numbers add to its sums, and what one of those is worth."""
    return 2 * emitters.REGISTER_BYTES if is_whole(kind) else 0


def sums(kind: str) -> int:
    """Sums that a key's products add up in."""
    return 2 if kind == "bytes" else 1


def is_whole(kind: str) -> bool:
    """Whether products are whole numbers."""
    return kind == "bytes"


def weight_bytes(kind: str, size: int) -> int:
    """Bytes of a weight as it is multiplied, of `size` before."""
    return 2 if kind in ("pairs", "bytes") else size


def in_fours(kind: str) -> bool:
    """Whether values of two keys are interleaved, which leaves sums of columns 0 to 3, 8 to 11, and so on."""
    return kind in ("pairs", "bytes")


def bits(kind: str) -> int:
    """Bits of a number."""
    narrow = {"int8": 8, "bytes": 8, "int4": 4, "nibbles": 4}
    return {"float64": 64, "float32": 32, **narrow}.get(kind, 16)


def read(b: Any, address: Any, kind: str, t: Any, scales: Any, repeats: int = 1) -> list[Any]:
    """A unit of a key's numbers as float32 or float64, of pairs and bytes as words of 32 bits.

    Of bfloat16 the even numbers come first, then the odd ones: one instruction a vector instead of two. With
    `repeats` there are so many times fewer numbers (float32, float64, bfloat16, pairs and bytes), all of them
    repeated. `scales` is the address of the unit's scale (int4).
    """
    lanes = t.count

    def load(element: Any, count: int = lanes // repeats, shift: int = 0) -> Any:
        at = b.add(address, const(I64, shift))
        if count == 1 < lanes:
            return splat_value(b, ir.VectorType(element, lanes), load_value(b, pointer(b, at, element)))
        x = load_value(b, pointer(b, at, ir.VectorType(element, count)))
        return x if repeats == 1 else shuffle(b, x, x, [c % count for c in range(lanes)])

    it = ir.VectorType(I32, lanes)
    if kind in ("float32", "float64"):
        return [load(t.element)]
    if kind == "pairs":
        return [load(I32)]
    if kind == "bytes":  # 128 more: one factor of the instruction has no sign
        return [b.xor(load(I32), const(it, -0x7F7F7F80))]
    if kind == "bfloat16":
        words = load(I32)
        return [b.bitcast(x, t) for x in (b.shl(words, const(it, 16)), b.and_(words, const(it, -0x10000)))]
    if kind == "float16":
        return [emitters.widen_value(b, load(emitters.stored(kind)), kind)]
    if kind == "int8":
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


def read_values(b: Any, address: Any, kind: str, t: Any, scales: Any) -> list[Any]:
    """A unit of a value's numbers, as `read` does; of bytes as words of two numbers of 16 bits."""
    if kind != "bytes":
        return read(b, address, kind, t, scales)
    x = load_value(b, pointer(b, address, ir.VectorType(I8, 2 * t.count)))
    x = b.sext(x, ir.VectorType(I16, 2 * t.count))
    return [b.bitcast(x, ir.VectorType(I32, t.count))]


def multiply(b: Any, kind: str, read: list[Any], queries: list[Any], totals: list[Any]) -> list[Any]:
    """A key's sums, and what a unit adds to them."""
    if kind == "bytes":
        return [dot(b, "vpdpbusd", total, read[0], y) for y, total in zip(queries, totals, strict=True)]
    (total,) = totals
    for x, y in zip(read, queries, strict=True):
        total = emitters.dot_pairs_value(b, total, x, y) if kind == "pairs" else fma_value(b, x, y, total)
    return [total]


def add_weighted(b: Any, kind: str, x: Any, weight: Any, total: Any) -> Any:
    """total + x * weight, or both products of two interleaved keys."""
    if kind == "bytes":
        return dot(b, "vpdpwssd", total, x, weight)
    return multiply(b, kind, [x], [weight], [total])[0]


def dot(b: Any, name: str, total: Any, x: Any, y: Any) -> Any:
    """An instruction of AVX512-VNNI, which adds products of 8 or 16 bits up in each lane's 32."""
    t = total.type
    fn = cgutils.get_or_insert_function(b.module, ir.FunctionType(t, [t] * 3), f"llvm.x86.avx512.{name}.512")
    return b.call(fn, [total, x, y])


def whole_sum(b: Any, kind: str, totals: list[Any]) -> Any:
    """One sum of a key's."""
    if kind != "bytes":
        return totals[0]
    high, low = totals
    return b.add(b.shl(high, const(high.type, 8)), low)


def as_number(b: Any, total: Any, behind: Any, t: Any) -> Any:
    """A vector of whole sums as what they stand for; two vectors lie `behind` the queries."""
    at = pointer(b, behind, total.type)
    factor = load_value(b, pointer(b, b.add(behind, const(I64, emitters.REGISTER_BYTES)), t))
    return b.fmul(b.sitofp(b.sub(total, load_value(b, at)), t), factor)


def interleave(b: Any, x: Any, y: Any) -> list[Any]:
    """Two keys' words of two columns -> words of both keys: of each four columns, then of the next four."""
    t = ir.VectorType(I16, 2 * x.type.count)
    x, y = b.bitcast(x, t), b.bitcast(y, t)
    halves = []
    for half in (0, 4):
        order = [
            key * t.count + c + half + i for c in range(0, t.count, 8) for i in range(4) for key in (0, 1)
        ]
        halves.append(b.bitcast(shuffle(b, x, y, order), ir.VectorType(I32, t.count // 2)))
    return halves


# --- memory -------------------------------------------------------------------------------------------------


def copy_runs(number: Any, run: int, storage: str) -> Any:
    """``copy(source, target)``: the runs of a row's next unit, a vector apart, ordered as `read` does."""

    @intrinsic
    def copy(typingctx: Any, source: Any, target: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            scalar = context.get_value_type(number)
            count = 2 if storage == "bfloat16" else 1
            x = load_value(b, pointer(b, args[0], ir.VectorType(scalar, run * count)))
            for i in range(count):
                y = x if count == 1 else shuffle(b, x, x, list(range(i, 2 * run, 2)))
                at = b.add(args[1], const(I64, i * emitters.REGISTER_BYTES))
                store_value(b, y, pointer(b, at, y.type))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return copy


def widen_unit(storage: str) -> Any:
    """``widen(source, scale, target)``: a unit of stored numbers in their order."""

    @intrinsic
    def widen(typingctx: Any, source: Any, scale: Any, target: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            element = ir.DoubleType() if storage == "float64" else ir.FloatType()
            t = ir.VectorType(element, emitters.REGISTER_BYTES // (8 if storage == "float64" else 4))
            vectors = read(b, args[0], storage, t, args[1])
            if storage == "bfloat16":
                n = t.count
                orders = [[i // 2 + n * (i % 2) for i in range(h, h + n)] for h in (0, n)]
                vectors = [shuffle(b, vectors[0], vectors[1], order) for order in orders]
            for i, x in enumerate(vectors):
                store_value(b, x, pointer(b, b.add(args[2], const(I64, i * emitters.REGISTER_BYTES)), t))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), codegen

    return widen


@intrinsic
def narrow_parities(typingctx: Any, target: Any, even: Any, odd: Any) -> Any:
    """Store two vectors as bfloat16, the numbers of one between those of the other."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        t = ir.VectorType(I32, args[1].type.count)
        low = b.lshr(emitters.round_bits(b, args[1], 16), const(t, 16))
        words = b.or_(low, b.and_(emitters.round_bits(b, args[2], 16), const(t, -0x10000)))
        store_value(b, words, pointer(b, args[0], t))
        return context.get_dummy_value()

    return types.void(types.int64, even, odd), codegen


def narrow_fours(storage: str) -> Any:
    """``narrow(target, low, high)``: store four numbers of one vector, then four of the other, and so on, as
    `interleave` left them.
    """

    @intrinsic
    def narrow(typingctx: Any, target: Any, low: Any, high: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            n = args[1].type.count
            x, y = (emitters.narrow_value(b, v, storage) for v in args[1:])
            order = [half * n + c + i for c in range(0, n, 4) for half in (0, 1) for i in range(4)]
            numbers = shuffle(b, x, y, order)
            store_value(b, numbers, pointer(b, args[0], numbers.type))
            return context.get_dummy_value()

        return types.void(types.int64, low, high), codegen

    return narrow


def put_whole(width: int) -> Any:
    """``put(address, x)``: store a vector's numbers, which are small, as integers of so many bits."""

    @intrinsic
    def put(typingctx: Any, address: Any, x: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            x = args[1]
            # Added to this, a number is rounded and stands in its lowest bits.
            words = b.bitcast(b.fadd(x, const(x.type, 1.5 * 2.0**23)), ir.VectorType(I32, x.type.count))
            words = b.trunc(words, ir.VectorType(ir.IntType(width), x.type.count))
            store_value(b, words, pointer(b, args[0], words.type))
            return context.get_dummy_value()

        return types.void(types.int64, x), codegen

    return put
