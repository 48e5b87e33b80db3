"""A row's weights for 64 values of 4 bits, with the values' scales, as bytes that a processor multiplies.

A whole weight is worth the largest of the row's 64 weights times scales of 32 columns, / 127. Each is rounded
up or down by turns: rounded to the nearest, weights under a 254th of the largest would all be lost, and 63 of
them may add up to a quarter of it. A weight of 0 stays 0.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import emitters, kinds
from .dots import KEYS
from .emitters import I16, I32, I64, const, fma_value, load_at, pointer, store_value
from .kinds import LEAST

LANES = 16
LARGEST_BYTE = 127
WEIGHT_BYTES = 4 * KEYS + 64
"""Of a row's weights for four times 32 columns; behind them, what 8 more in each number adds, and what one is
worth."""
DITHER = [(int(f"{j:06b}"[::-1], 2) + 0.5) / KEYS - 0.5 for j in range(KEYS)]
"""What is added to a tile's weights before they are rounded, so that errors cancel: of 64 equal ones that are
0.3 of a whole number, 19 become 1."""

_whole = ir.VectorType(I32, LANES)
_number = ir.VectorType(ir.FloatType(), LANES)


def _across_lanes(b: Any, vectors: list[Any], emit: Any) -> Any:
    """What joins the lanes of each of four vectors, in the lanes of every 128 bits."""
    low, high = (
        [n + c for n in range(0, LANES, 4) for c in (i, i + LANES, i + 1, i + 1 + LANES)] for i in (0, 2)
    )

    def halved(x: Any, y: Any) -> Any:
        return emit(b, kinds.shuffle(b, x, y, low), kinds.shuffle(b, x, y, high))

    x = halved(halved(vectors[0], vectors[2]), halved(vectors[1], vectors[3]))
    for distance in (8, 4):
        x = emit(b, x, kinds.shuffle(b, x, x, [c ^ distance for c in range(LANES)]))
    return x


@intrinsic
def round_row(typingctx: Any, weights: Any, scales: Any, broken: Any, target: Any) -> Any:
    """A row's weights for a tile's values, times the scales of four times 32 columns -> bytes.

    At `target` come 64 bytes for each 32 columns: in each 16 bytes lie 4 keys of the first 16, of the next 16
    and so on. Behind all of them is what 8 more in each value adds to the sums of each 32 columns, then what
    one of their whole weights is worth, to which the number at `broken` is added.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        weights, scales, broken, target = args
        four = ir.VectorType(ir.FloatType(), 4)
        w = [load_at(b, weights, 64 * v, _number) for v in range(KEYS // LANES)]
        products = [
            [b.fmul(x, load_at(b, scales, KEYS * 4 * i + 64 * v, _number)) for v, x in enumerate(w)]
            for i in range(4)
        ]

        def size(x: Any) -> Any:
            return b.bitcast(b.and_(b.bitcast(x, _whole), const(_whole, 0x7FFFFFFF)), _number)

        tops = []
        for row in products:
            x, y, z, u = (size(x) for x in row)
            tops.append(
                emitters.greater_value(b, emitters.greater_value(b, x, y), emitters.greater_value(b, z, u))
            )
        top = _across_lanes(b, tops, emitters.greater_value)
        top = emitters.greater_value(b, kinds.shuffle(b, top, top, [0, 1, 2, 3]), const(four, LEAST))
        inverse = b.fdiv(const(four, float(LARGEST_BYTE)), top)
        worth = b.fadd(b.fmul(top, const(four, 1 / LARGEST_BYTE)), load_at(b, broken, 0, four))
        store_value(b, worth, pointer(b, b.add(target, const(I64, 4 * KEYS + 16)), four))
        sums = []
        for i, row in enumerate(products):
            factor = kinds.shuffle(b, inverse, inverse, [i] * LANES)
            words = [
                _nearest(
                    b, fma_value(b, x, factor, ir.Constant(_number, DITHER[LANES * v : LANES * (v + 1)]))
                )
                for v, x in enumerate(row)
            ]
            halves = [_pack(b, "packssdw", x, y) for x, y in (words[:2], words[2:])]
            numbers = _pack(b, "packsswb", *halves)
            store_value(b, numbers, pointer(b, b.add(target, const(I64, KEYS * i)), numbers.type))
            eights = const(_whole, 0x08080808)
            sums.append(kinds._dot(b, "vpdpbusd", const(_whole, 0), eights, b.bitcast(numbers, _whole)))
        total = _across_lanes(b, sums, lambda b, x, y: b.add(x, y))
        total = kinds.shuffle(b, total, total, [0, 1, 2, 3])
        store_value(b, b.neg(total), pointer(b, b.add(target, const(I64, 4 * KEYS)), total.type))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


def _nearest(b: Any, x: Any) -> Any:
    """Numbers -> the nearest whole ones."""
    t = ir.FunctionType(_whole, [_number, _whole, I16, I32])
    fn = cgutils.get_or_insert_function(b.module, t, "llvm.x86.avx512.mask.cvtps2dq.512")
    return b.call(fn, [x, const(_whole, 0), const(I16, -1), const(I32, 4)])


def _pack(b: Any, name: str, x: Any, y: Any) -> Any:
    """Two vectors of whole numbers as one of half their bits, in each 128 bits first those of x."""
    narrow = ir.IntType(x.type.element.width // 2)
    t = ir.FunctionType(ir.VectorType(narrow, 2 * x.type.count), [x.type] * 2)
    return b.call(cgutils.get_or_insert_function(b.module, t, f"llvm.x86.avx512.{name}.512"), [x, y])
