"""Keys and values of 4 bits, multiplied as they lie where a processor multiplies bytes.

Scores: lanes are 16 keys. Of 32 numbers at a time each key's 16 bytes are turned, so that a vector holds four
bytes of each key; their lower and upper halves meet a row's queries, rounded to 8 bits, in one instruction
each, and the eight sums become one float32, times what one of them is worth, times the keys' scales. Values:
lanes are columns. Two keys' numbers stand side by side as 16 bits each and meet two weights, whole numbers of
16 bits that hold the scale of 32 columns, too. A key of 128 numbers takes 19 vector instructions and 9 for
each row, its value 8 and 4 for each row.

What a byte of a query is worth is the largest of 32 / 127: it is off by a sixteenth of what such keys are. A
whole weight is worth the largest of its 64 keys, with their scales, / 32767.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..problem import INT4_GROUP
from . import dots, emitters, kinds, simd
from .dots import KEYS
from .emitters import I8, I16, I32, I64, const, fma_value, load_value, pointer, splat_value, store_value
from .kinds import LARGEST_WEIGHT, LEAST

LANES = 16
LARGEST_QUERY = 127
QUERY_BYTES = 64
"""Of 32 queries: those that the lower halves of 16 bytes meet, those that the upper halves meet, what 8 more
in each number adds to their sums, and what one of these is worth."""
WEIGHT_BYTES = KEYS * 2 + 64
"""Of a row's weights for 32 columns; behind them, what 8 more in each number adds, and what one is worth."""

_whole = ir.VectorType(I32, LANES)
_number = ir.VectorType(ir.FloatType(), LANES)


def scratch_bytes(rows: int, head_dim: int, value_dim: int) -> int:
    """Scales of a tile's keys or values, and weights of `rows`, each 32 columns after the other."""
    most = max(head_dim, value_dim)
    return most // INT4_GROUP * KEYS * 4 + value_dim // INT4_GROUP * rows * WEIGHT_BYTES


def _at(b: Any, address: Any, shift: int, t: Any) -> Any:
    return load_value(b, pointer(b, b.add(address, const(I64, shift)), t))


def _splat_at(b: Any, address: Any, shift: int, t: Any) -> Any:
    return splat_value(b, t, _at(b, address, shift, t.element))


def _join(b: Any, parts: list[Any]) -> Any:
    """Vectors one after the other in one."""
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [kinds.shuffle(b, x, y, list(range(2 * x.type.count))) for x, y in pairs]
    return parts[0]


def _turn(b: Any, rows: list[Any]) -> list[Any]:
    """16 vectors of four -> four vectors of 16: most turn four at a time, within 128 bits."""
    x = [_join(b, rows[i::4]) for i in range(4)]
    low, high = (
        [n + c for n in range(0, LANES, 4) for c in (i, i + LANES, i + 1, i + 1 + LANES)] for i in (0, 2)
    )
    half = [kinds.shuffle(b, x[0], x[1], low), kinds.shuffle(b, x[2], x[3], low),
            kinds.shuffle(b, x[0], x[1], high), kinds.shuffle(b, x[2], x[3], high)]  # fmt: skip
    first, second = (
        [n + c for n in range(0, LANES, 4) for c in (i, i + 1, i + LANES, i + 1 + LANES)] for i in (0, 2)
    )
    return [kinds.shuffle(b, half[i], half[i + 1], order) for i in (0, 2) for order in (first, second)]


def _halves(b: Any, x: Any, mask: int) -> list[Any]:
    """The numbers in the lower and in the upper halves of bytes."""
    return [b.and_(x, const(_whole, mask)), b.and_(b.lshr(x, const(_whole, 4)), const(_whole, mask))]


def _scores_tile(rows: int) -> Any:
    """``tile(table, scales, wanted, wanted_bytes, q, q_row, s, s_row, steps)``: scores of 16 keys.

    `scales` are the keys' of the first 32 numbers, those of the next `KEYS` behind them. Asks for `wanted`,
    as many other rows of so many bytes.
    """

    @intrinsic
    def tile(
        typingctx: Any, table: Any, scales: Any, wanted: Any, wanted_bytes: Any, q: Any, q_row: Any, s: Any,
        s_row: Any, steps: Any
    ) -> Any:  # fmt: skip
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            table, scales, wanted, wanted_bytes, q, q_row, s, s_row, steps = args
            last = b.add(wanted, const(I64, 8 * (LANES - 1)))
            four = ir.VectorType(I32, 4)

            def step(sums: list[Any], k: Any) -> list[Any]:
                other = dots._Wanted(sums[0], sums[1], wanted_bytes, last, 4)
                keys = []
                shift = b.mul(k, const(I64, 16))
                for i in range(LANES):
                    at = b.add(_at(b, table, 8 * i, I64), shift)
                    keys.append(load_value(b, pointer(b, at, four)))
                    other.ask_by_turns(b, 16 * LANES, i, LANES)
                scale = load_value(b, pointer(b, b.add(scales, b.mul(k, const(I64, 4 * KEYS))), _number))
                at = b.add(q, b.mul(k, const(I64, QUERY_BYTES)))
                queries = [b.add(at, b.mul(q_row, const(I64, r))) for r in range(rows)]
                totals = [_splat_at(b, x, 32, _whole) for x in queries]
                for i, numbers in enumerate(_turn(b, keys)):
                    for half, x in enumerate(_halves(b, numbers, 0x0F0F0F0F)):
                        for r in range(rows):
                            y = _splat_at(b, queries[r], 16 * half + 4 * i, _whole)
                            totals[r] = kinds._dot(b, "vpdpbusd", totals[r], x, y)
                grown = []
                for r in range(rows):
                    y = b.fmul(b.sitofp(totals[r], _number), _splat_at(b, queries[r], 36, _number))
                    grown.append(fma_value(b, y, scale, sums[2 + r]))
                return [other.row, other.shift, *grown]

            first = [wanted, const(I64, 0), *[const(_number, 0.0)] * rows]
            for r, x in enumerate(emitters.loop_values(b, steps, first, step)[2:]):
                store_value(b, x, pointer(b, b.add(s, b.mul(s_row, const(I64, r))), _number))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), codegen

    return tile


def _values_tile(rows: int, spans: int) -> Any:
    """``tile(table, wanted, wanted_bytes, last, begin, column, p, p_span, o, o_row, factor, fours)``: add up
    values, of `fours` times four keys and `spans` times 32 columns from byte `column` of a value on.

    ``o = o * factor + p @ values``. `wanted` are other rows, the last one's entry at `last`: as many are
    asked for meanwhile, from byte `begin` of all of them on.
    """
    width = 16 * spans

    @intrinsic
    def tile(
        typingctx: Any, table: Any, wanted: Any, wanted_bytes: Any, last: Any, begin: Any, column: Any,
        p: Any, p_span: Any, o: Any, o_row: Any, factor: Any, fours: Any
    ) -> Any:  # fmt: skip
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            table, wanted, wanted_bytes, last, begin, column, p, p_span, o, o_row, factor, fours = args
            row = b.add(wanted, b.mul(b.udiv(begin, wanted_bytes), const(I64, 8)))
            row = b.select(b.icmp_unsigned("<", row, last), row, last)
            span = [b.add(p, b.mul(p_span, const(I64, u))) for u in range(spans)]
            bytes_ = ir.VectorType(I8, width)

            def step(sums: list[Any], k: Any) -> list[Any]:
                other = dots._Wanted(sums[0], sums[1], wanted_bytes, last, 4)
                grown = sums[2:]
                here, shift = b.add(table, b.mul(k, const(I64, 32))), b.mul(k, const(I64, 8))
                for pair in range(2):
                    values = []
                    for i in (2 * pair, 2 * pair + 1):
                        at = b.add(_at(b, here, 8 * i, I64), column)
                        values.append(load_value(b, pointer(b, at, bytes_)))
                        other.ask_by_turns(b, 4 * width, i, 4)
                    for u in range(spans):
                        # Both bytes of a word are the same.
                        order = [n // 2 % 2 * width + 16 * u + n // 4 for n in range(4 * LANES)]
                        words = b.bitcast(kinds.shuffle(b, values[0], values[1], order), _whole)
                        halves = _halves(b, words, 0x000F000F)
                        at = b.add(span[u], shift)
                        for r in range(rows):
                            weight = _splat_at(b, at, r * WEIGHT_BYTES + 4 * pair, _whole)
                            for half, x in enumerate(halves):
                                n = (r * spans + u) * 2 + half
                                grown[n] = kinds._dot(b, "vpdpwssd", grown[n], x, weight)
                return [other.row, other.shift, *grown]

            first = [
                _splat_at(b, x, r * WEIGHT_BYTES + KEYS * 2, _whole)
                for r in range(rows) for x in span for _ in range(2)
            ]  # fmt: skip
            start = [row, b.urem(begin, wanted_bytes), *first]
            totals = emitters.loop_values(b, fours, start, step)[2:]
            for r in range(rows):
                f = _splat_at(b, factor, 2 * r * emitters.REGISTER_BYTES, _number)
                target = b.add(o, b.mul(o_row, const(I64, r)))
                for u in range(spans):
                    worth = _splat_at(b, span[u], r * WEIGHT_BYTES + KEYS * 2 + 4, _number)
                    for half in range(2):
                        total = b.fmul(b.sitofp(totals[(r * spans + u) * 2 + half], _number), worth)
                        shift = (2 * u + half) * emitters.REGISTER_BYTES
                        place = pointer(b, b.add(target, const(I64, shift)), _number)
                        store_value(b, fma_value(b, load_value(b, place), f, total), place)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 12), codegen

    return tile


def _gather(count: int) -> Any:
    """``gather(table, next_, shift, target)``: of the 16 addresses in a table so many float32 each, `shift`
    bytes behind, a vector of each, `KEYS` apart. Asks for what lies at the 16 `next_` addresses.
    """

    @intrinsic
    def gather(typingctx: Any, table: Any, next_: Any, shift: Any, target: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            table, next_, shift, target = args
            t = ir.VectorType(ir.FloatType(), count)
            rows = [
                load_value(
                    b, pointer(b, b.add(_at(b, table, 8 * i, I64), shift), t if count > 1 else t.element)
                )
                for i in range(LANES)
            ]
            for i in range(0, LANES, 4):
                emitters.prefetch_value(b, b.add(_at(b, next_, 8 * i, I64), shift))
            if count == 1:
                columns = [ir.Constant(_number, ir.Undefined)]
                for i, x in enumerate(rows):
                    columns = [b.insert_element(columns[0], x, const(I32, i))]
            else:
                columns = _turn(b, rows)
            for c, x in enumerate(columns):
                store_value(b, x, pointer(b, b.add(target, const(I64, c * KEYS * 4)), _number))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    return gather


@intrinsic
def _round_row(typingctx: Any, weights: Any, scales: Any, factor: Any, target: Any, vectors: Any) -> Any:
    """Weights times scales times a factor -> whole numbers, and what 8 more in each value adds up to."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        weights, scales, factor, target, vectors = args
        factor = splat_value(b, _number, factor)
        # Added to this, a number is rounded and stands in the lowest bits.
        magic = const(_number, 1.5 * 2.0**23)

        def step(sums: list[Any], k: Any) -> list[Any]:
            x, y = (_at(b, b.add(a, b.mul(k, const(I64, 64))), 0, _number) for a in (weights, scales))
            words = b.bitcast(fma_value(b, b.fmul(x, y), factor, magic), _whole)
            halves = b.trunc(words, ir.VectorType(I16, LANES))
            store_value(b, halves, pointer(b, b.add(target, b.mul(k, const(I64, 32))), halves.type))
            return [b.add(sums[0], words)]

        (total,) = emitters.loop_values(b, vectors, [const(_whole, 0)], step)
        name = f"llvm.vector.reduce.add.v{LANES}i32"
        add_up = cgutils.get_or_insert_function(b.module, ir.FunctionType(I32, [_whole]), name)
        # The bits of that number, as often as it was added.
        extra = b.mul(b.trunc(vectors, I32), const(I32, LANES * 0x4B400000 % 2**32))
        total = b.mul(b.sub(b.call(add_up, [total]), extra), const(I32, -8))
        store_value(b, total, pointer(b, b.add(target, const(I64, KEYS * 2)), I32))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.int64, types.int64), codegen


class Nibbles(NamedTuple):
    """The compiled functions of this file; `p` is the call's parameters, `w` a thread's `chunks.Scratch`."""

    round_queries: Any
    """``round_queries(columns, x, target)``, a row of float32."""
    score: Any
    """As `sweeps.scorer` makes it."""
    spread_weights: Any
    """``spread_weights(p, w, table, keys, rows)``: weights -> whole numbers that hold the values' scales."""
    weigh: Any
    """As `sweeps.weigher` makes it, of those whole numbers."""


def build(jit: Any) -> Nibbles:
    """The functions."""
    dtype = np.float32
    load, store, _, put = simd.loads("float32")
    put_int32 = simd.scalars(types.int32)[1]
    put_byte = kinds.put_whole(8)
    add, mul, fma, greater, splat = simd.add, simd.mul, simd.fma, simd.greater, simd.splat
    score1, score2, score4, score8 = (_scores_tile(n) for n in (1, 2, 4, 8))
    weigh8, weigh4, weigh2, weigh1 = (_values_tile(*n) for n in ((8, 1), (4, 2), (2, 4), (1, 4)))
    weigh4_few, weigh2_few, weigh1_few = (_values_tile(n, 1) for n in (4, 2, 1))
    gather1, gather4 = _gather(1), _gather(4)

    @jit
    def round_queries(columns, x, target):
        zero = splat(dtype(0))
        for c in range(0, columns, 32):
            y, z = load(x + c * 4), load(x + c * 4 + 64)
            top = dots.lowest_lane(simd.across_max(greater(simd.absolute(y), simd.absolute(z))))
            broken = dots.lowest_lane(simd.across_sum(fma(z, zero, mul(y, zero))))
            inverse = splat(dtype(LARGEST_QUERY) / top if top > dtype(LEAST) else dtype(0))
            y, z = simd.round_near(mul(y, inverse)), simd.round_near(mul(z, inverse))
            t = target + c * 2
            put_byte(t, y)
            put_byte(t + 16, z)
            put_int32(t + 32, np.int32(-8) * np.int32(dots.lowest_lane(simd.across_sum(add(y, z)))))
            put(t + 36, top / dtype(LARGEST_QUERY) + broken)

    @jit
    def gather(table, target, keys, count):
        """Scales of a tile's rows, whose addresses the table holds; asks for the next tile's."""
        for j in range(0, keys, 16):
            t, here, c = target + j * 4, table + 8 * j, 0
            while c + 4 <= count:
                gather4(here, here + 8 * KEYS, c * 4, t + c * KEYS * 4)
                c += 4
            while c < count:
                gather1(here, here + 8 * KEYS, c * 4, t + c * KEYS * 4)
                c += 1

    @jit
    def score(p, w, table, scales, ahead, ahead_bytes, keys, groups, together):
        steps = p.head_dim // 32
        gather(scales, w.scales, keys, steps)
        q_row, s_row, r = p.head_dim * 2, KEYS * 4, 0
        while r < groups:
            q, s, left = w.q + r * q_row, w.s + r * s_row, groups - r
            for j in range(0, keys, 16):
                k, f, v, t = table + 8 * j, w.scales + 4 * j, ahead + 8 * j, s + 4 * j
                if left >= 8:
                    score8(k, f, v, ahead_bytes, q, q_row, t, s_row, steps)
                elif left >= 4:
                    score4(k, f, v, ahead_bytes, q, q_row, t, s_row, steps)
                elif left >= 2:
                    score2(k, f, v, ahead_bytes, q, q_row, t, s_row, steps)
                else:
                    score1(k, f, v, ahead_bytes, q, q_row, t, s_row, steps)
            r += 8 if left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1

    @jit
    def spread_weights(p, w, table, keys, rows):
        columns, zero = p.value_dim // 32, splat(dtype(0))
        gather(table, w.scales, keys, columns)
        # A whole number is worth the same in all rows: none has less than its largest weight, 1.
        for j in range(0, keys * 4, 64):
            most = zero
            for s in range(w.s + j, w.s + j + rows * KEYS * 4, KEYS * 4):
                most = greater(load(s), most)
            store(w.narrow + j, most)
        t = w.spread
        for c in range(columns):
            scales = w.scales + c * KEYS * 4
            largest, broken = splat(dtype(LEAST)), zero
            for j in range(0, keys * 4, 64):
                x = load(scales + j)
                largest = greater(simd.absolute(mul(load(w.narrow + j), x)), largest)
                broken = fma(x, zero, broken)
            top = dots.lowest_lane(simd.across_max(largest))
            worth = top / dtype(LARGEST_WEIGHT) + dots.lowest_lane(simd.across_sum(broken))
            for r in range(rows):
                _round_row(w.s + r * KEYS * 4, scales, dtype(LARGEST_WEIGHT) / top, t, keys // 16)
                put(t + KEYS * 2 + 4, worth)
                t += WEIGHT_BYTES

    @jit
    def weigh(p, w, state, weights, table, scales, wanted, last, keys, groups, together):
        """o = o * factor + weights @ values; asks for the next tile's keys meanwhile."""
        o_row, spans, fours, width = p.value_dim * 4, p.value_dim // 32, keys // 4, p.key_bytes
        p_span, r = groups * WEIGHT_BYTES, 0
        while r < groups:
            left, u = groups - r, 0
            o, f = state + 2 * groups * 64 + r * o_row, w.factor + 2 * r * 64
            while u < spans:
                a, t, c = w.spread + u * p_span + r * WEIGHT_BYTES, o + u * 128, u * 16
                begin, n = c * keys if r == 0 else keys * width, 1
                if left >= 8:
                    weigh8(table, wanted, width, last, begin, c, a, p_span, t, o_row, f, fours)
                elif left >= 4 and spans - u >= 2:
                    weigh4(table, wanted, width, last, begin, c, a, p_span, t, o_row, f, fours)
                    n = 2
                elif left >= 4:
                    weigh4_few(table, wanted, width, last, begin, c, a, p_span, t, o_row, f, fours)
                elif left >= 2 and spans - u >= 4:
                    weigh2(table, wanted, width, last, begin, c, a, p_span, t, o_row, f, fours)
                    n = 4
                elif left >= 2:
                    weigh2_few(table, wanted, width, last, begin, c, a, p_span, t, o_row, f, fours)
                elif spans - u >= 4:
                    weigh1(table, wanted, width, last, begin, c, a, p_span, t, o_row, f, fours)
                    n = 4
                else:
                    weigh1_few(table, wanted, width, last, begin, c, a, p_span, t, o_row, f, fours)
                u += n
            r += 8 if left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1

    return Nibbles(round_queries, score, spread_weights, weigh)
