"""A row's weights for values of 4 bits, with the values' scales, as bytes that a processor multiplies.

A whole weight is worth the largest of the row's weights in a tile, times the largest scale of its value,
/ 127. Each is rounded up or down by turns: rounded to the nearest, weights under a 254th of the largest would
all be lost, and a tile of them may add up to half of it. A weight of 0 stays 0.

One instruction multiplies a weight by its scale and rounds it: added to 3 * 2**14, a float32 is a multiple of
1/256, and has the whole number, rounded down, in its second byte.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import emitters, kinds
from .dots import KEYS
from .emitters import I8, I64, const, fma_value, load_at, pointer, splat_value, store_value
from .kinds import LEAST
from .turned import LANES, NUMBER, WHOLE

TILE = 2 * KEYS
"""Keys that are softened and weighed together: what is done once for a row and a tile counts half as much."""
LARGEST_BYTE = 127
WEIGHT_BYTES = 4 * TILE + 64
"""Of a row's weights for four times 32 columns; behind them, what 8 more in each number adds, and what one is
worth."""
UNIT_BYTES = 8
"""Of what a row's weights are multiplied with, and what a whole one is worth."""
DITHER = [(int(f"{j:06b}"[::-1], 2) + 0.5) / 64 for j in range(64)]
"""What is added to 64 weights before they are rounded down, so that errors cancel: of 64 equal ones that are
0.3 of a whole number, 19 become 1."""
POINT = 3.0 * 2**14

_bytes = ir.VectorType(I8, 4 * LANES)


def _across_lanes(b: Any, vectors: list[Any], emit: Any) -> Any:
    """What joins the lanes of each of four vectors, or of one, in the lanes of every 128 bits."""
    low, high = (
        [n + c for n in range(0, LANES, 4) for c in (i, i + LANES, i + 1, i + 1 + LANES)] for i in (0, 2)
    )

    def halved(x: Any, y: Any) -> Any:
        return emit(b, kinds.shuffle(b, x, y, low), kinds.shuffle(b, x, y, high))

    distances = (8, 4) if len(vectors) == 4 else (8, 4, 2, 1)
    x = vectors[0]
    if len(vectors) == 4:
        x = halved(halved(vectors[0], vectors[2]), halved(vectors[1], vectors[3]))
    for distance in distances:
        x = emit(b, x, kinds.shuffle(b, x, x, [c ^ distance for c in range(LANES)]))
    return x


def _units(rows: int) -> Any:
    """``units(weights, row_bytes, scales, broken, target, blocks)``: of one row or four, what weights are
    multiplied with to be at most 127 with these scales, and what one is worth then, `UNIT_BYTES` a row.

    There are 16 times `blocks` weights. `broken`, 0 or NaN, is added to what one is worth.
    """

    @intrinsic
    def units(
        typingctx: Any, weights: Any, row_bytes: Any, scales: Any, broken: Any, target: Any, blocks: Any
    ) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            weights, row_bytes, scales, broken, target, blocks = args
            four = ir.VectorType(ir.FloatType(), 4)
            addresses = [b.add(weights, b.mul(row_bytes, const(I64, r))) for r in range(rows)]

            def block(tops: list[Any], k: Any) -> list[Any]:
                shift = b.mul(k, const(I64, 64))
                scale = load_at(b, b.add(scales, shift), 0, NUMBER)
                products = (b.fmul(load_at(b, b.add(a, shift), 0, NUMBER), scale) for a in addresses)
                return [emitters.greater_value(b, x, top) for x, top in zip(products, tops, strict=True)]

            tops = emitters.loop_values(b, blocks, [const(NUMBER, LEAST)] * rows, block)
            top = _across_lanes(b, tops, emitters.greater_value)
            top = kinds.shuffle(b, top, top, [0, 1, 2, 3])
            inverse = b.fdiv(const(four, float(LARGEST_BYTE)), top)
            worth = b.fmul(top, const(four, 1 / LARGEST_BYTE))
            worth = b.fadd(worth, splat_value(b, four, broken))
            both = kinds.shuffle(b, inverse, worth, [c + 4 * i for c in range(rows) for i in (0, 1)])
            store_value(b, both, pointer(b, target, both.type))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.float32, *[types.int64] * 2), codegen

    return units


units1, units4 = _units(1), _units(4)


@intrinsic
def round_row(typingctx: Any, weights: Any, scales: Any, unit: Any, target: Any, blocks: Any) -> Any:
    """A row's weights for 64 times `blocks` values, times the scales of four times 32 columns -> bytes.

    `unit` is the row's of `units1` or `units4`. At `target` come `TILE` bytes for each 32 columns, behind all
    of them what 8 more in each value adds to the sums of each 32 columns, and what one of their whole weights
    is worth.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        weights, scales, unit, target, blocks = args
        factor, worth = (splat_value(b, NUMBER, load_at(b, unit, 4 * i, ir.FloatType())) for i in (0, 1))
        dither = [
            ir.Constant(NUMBER, [POINT + x for x in DITHER[v : v + LANES]]) for v in range(0, 64, LANES)
        ]
        # The second bytes of two vectors' numbers.
        order = ir.Constant(_bytes, [4 * i + 1 for i in range(2 * LANES)] * 2)
        # Which LLVM must not know: of a constant order it makes seven instructions for two.
        none = b.trunc(b.lshr(target, const(I64, 63)), I8)
        order = b.add(order, splat_value(b, _bytes, none))
        eights = const(WHOLE, 0x08080808)

        def block(sums: list[Any], k: Any) -> list[Any]:
            here = b.mul(k, const(I64, 4 * 64))
            at = b.add(weights, here)
            w = [b.fmul(load_at(b, at, 4 * v, NUMBER), factor) for v in range(0, 64, LANES)]
            result = []
            for i, total in enumerate(sums):
                at = b.add(scales, here)
                words = [
                    fma_value(b, x, load_at(b, at, TILE * 4 * i + 4 * LANES * v, NUMBER), dither[v])
                    for v, x in enumerate(w)
                ]
                halves = [_look_up(b, x, y, order) for x, y in (words[:2], words[2:])]
                low, high = (kinds.shuffle(b, x, x, list(range(2 * LANES))) for x in halves)
                numbers = kinds.shuffle(b, low, high, list(range(4 * LANES)))
                place = b.add(target, b.mul(k, const(I64, 64)))
                store_value(b, numbers, pointer(b, b.add(place, const(I64, TILE * i)), numbers.type))
                result.append(kinds.dot(b, "vpdpbusd", total, eights, b.bitcast(numbers, WHOLE)))
            return result

        sums = emitters.loop_values(b, blocks, [const(WHOLE, 0)] * 4, block)
        total = _across_lanes(b, sums, lambda b, x, y: b.add(x, y))
        total = kinds.shuffle(b, total, total, [0, 1, 2, 3])
        store_value(b, b.neg(total), pointer(b, b.add(target, const(I64, 4 * TILE)), total.type))
        worth = kinds.shuffle(b, worth, worth, [0, 1, 2, 3])
        store_value(b, worth, pointer(b, b.add(target, const(I64, 4 * TILE + 16)), worth.type))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


def _look_up(b: Any, x: Any, y: Any, order: Any) -> Any:
    """Those bytes of two vectors that the order says."""
    x, y = b.bitcast(x, _bytes), b.bitcast(y, _bytes)
    t = ir.FunctionType(_bytes, [_bytes] * 3)
    fn = cgutils.get_or_insert_function(b.module, t, "llvm.x86.avx512.vpermi2var.qi.512")
    return b.call(fn, [x, order, y])
