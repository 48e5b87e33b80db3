"""Keys and values of 4 bits, multiplied as they lie where a processor multiplies bytes.

Scores: lanes are 16 keys. Of 32 numbers at a time each key's 16 bytes are turned in registers, so that a
vector holds four bytes of each key; their lower and upper halves meet a row's queries, rounded to 8 bits, in
one instruction each, and the eight sums become one float32, times the keys' scales. Turning takes 24
instructions beside the 64 products of eight rows, on other ports, and is done again for the next eight.
Values: lanes are columns. Four keys' bytes stand side by side and meet four weights, whole numbers of 8 bits
that hold the scale of 32 columns, too: once as they are and once without their upper halves, whose sum is a
16th of the difference. A value of 128 numbers takes 6 vector instructions and 16 for eight rows, its weights
8 for eight rows.

What a byte of a query is worth is its largest number / 127. A whole weight is worth the row's largest of 128
keys, with their scales, / 127. It is rounded up or down by turns: so the sum of many small ones is right.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from . import dots, emitters, kinds, rounded, simd, turned
from .emitters import I8, I32, I64, const, fma_value, load_at, load_value, pointer, splat_value, store_value
from .kinds import LEAST
from .rounded import TILE, UNIT_BYTES, WEIGHT_BYTES
from .turned import LANES, NUMBER, WHOLE, splat_at

LARGEST_QUERY = 127
QUERY_BYTES = 64
"""Of 32 queries: those that the lower halves of 16 bytes meet, those that the upper halves meet, what 8 more
in each number adds to their sums, and what one of the row's is worth. All rows' first 32 come first, then
their next: so they lie at constant distances."""


def _halves(b: Any, x: Any, mask: int) -> list[Any]:
    """The numbers in the lower and in the upper halves of bytes."""
    return [b.and_(x, const(WHOLE, mask)), b.and_(b.lshr(x, const(WHOLE, 4)), const(WHOLE, mask))]


def _scores_tile(rows: int, asks: bool) -> Any:
    """``tile(table, scales, wanted, wanted_bytes, q, q_step, s, s_row, steps)``: scores of 16 keys, whose
    addresses the table holds, of `steps` times 32 numbers; those of queries are `q_step` bytes apart.

    `scales` are the keys' of the first 32 numbers, those of the next `TILE` behind them. If it `asks`, then
    for `wanted`, as many other rows of so many bytes.
    """

    @intrinsic
    def tile(
        typingctx: Any, table: Any, scales: Any, wanted: Any, wanted_bytes: Any, q: Any, q_step: Any, s: Any,
        s_row: Any, steps: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            table, scales, wanted, wanted_bytes, q, q_step, s, s_row, steps = args
            last = b.add(wanted, const(I64, 8 * (LANES - 1)))

            def step(sums: list[Any], k: Any) -> list[Any]:
                other = dots.Wanted(sums[0], sums[1], wanted_bytes, last, 4, asks_again=False)
                sums = sums[2:]
                at = b.add(q, b.mul(k, q_step))
                totals = [splat_at(b, at, QUERY_BYTES * r + 32, WHOLE) for r in range(rows)]
                shift = b.mul(k, const(I64, 16))
                for i, four in enumerate(turned.turned_keys(b, table, shift)):
                    for half, x in enumerate(_halves(b, four, 0x0F0F0F0F)):
                        if asks:
                            other.ask_by_turns(b, 16 * LANES, 2 * i + half, 8)
                        for r in range(rows):
                            y = splat_at(b, at, QUERY_BYTES * r + 16 * half + 4 * i, WHOLE)
                            totals[r] = kinds.dot(b, "vpdpbusd", totals[r], x, y)
                scale = load_at(b, b.add(scales, b.mul(k, const(I64, 4 * TILE))), 0, NUMBER)
                grown = [
                    fma_value(b, b.sitofp(total, NUMBER), scale, x)
                    for total, x in zip(totals, sums, strict=True)
                ]
                return [other.row, other.shift, *grown]

            first = [wanted, const(I64, 0), *[const(NUMBER, 0.0)] * rows]
            sums = emitters.loop_values(b, steps, first, step)[2:]
            for r, x in enumerate(sums):
                worth = splat_at(b, q, QUERY_BYTES * r + 36, NUMBER)
                at = b.add(s, b.mul(s_row, const(I64, r)))
                store_value(b, b.fmul(x, worth), pointer(b, at, NUMBER))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), codegen

    return tile


def _values_tile(rows: int, spans: int) -> Any:
    """``tile(table, wanted, wanted_bytes, last, begin, column, p, p_row, ends, o, o_row, factor, fours)``:
    add up values, of `fours` times four keys and `spans` times 32 columns from byte `column` of a value on.

    ``o = o * factor + p @ values``, where `p` and `ends` are the first row's weights as `rounded.round_row`
    leaves them, and what is behind them. `wanted` are other rows, the last one's entry at `last`: as many are
    asked for meanwhile, from byte `begin` of all of them on.
    """

    @intrinsic
    def tile(
        typingctx: Any, table: Any, wanted: Any, wanted_bytes: Any, last: Any, begin: Any, column: Any,
        p: Any, p_row: Any, ends: Any, o: Any, o_row: Any, factor: Any, fours: Any
    ) -> Any:  # fmt: skip
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            table, wanted, wanted_bytes, last, begin, column, p, p_row, ends, o, o_row, factor, fours = args
            row = b.add(wanted, b.mul(b.udiv(begin, wanted_bytes), const(I64, 8)))
            row = b.select(b.icmp_unsigned("<", row, last), row, last)
            weights = [b.add(p, b.mul(p_row, const(I64, r))) for r in range(rows)]
            behind = [b.add(ends, b.mul(p_row, const(I64, r))) for r in range(rows)]
            part, bytes_ = ir.VectorType(I32, 4), ir.VectorType(I8, 4 * LANES)
            order = [16 * key + c for c in range(16) for key in range(4)]

            def step(sums: list[Any], k: Any) -> list[Any]:
                other = dots.Wanted(sums[0], sums[1], wanted_bytes, last, 4, asks_again=False)
                grown = sums[2:]
                here = b.add(table, b.mul(k, const(I64, 32)))
                shift = b.mul(k, const(I64, 4))
                keys = []
                for i in range(4):
                    keys.append(b.add(load_at(b, here, 8 * i, I64), column))
                    other.ask_by_turns(b, 64 * spans, i, 4)
                for u in range(spans):
                    four = turned.join(b, [load_at(b, a, 16 * u, part) for a in keys])
                    four = b.bitcast(four, bytes_)
                    both = b.bitcast(kinds.shuffle(b, four, four, order), WHOLE)
                    low = b.and_(both, const(WHOLE, 0x0F0F0F0F))
                    for r in range(rows):
                        weight = splat_at(b, b.add(weights[r], shift), TILE * u, WHOLE)
                        for i, x in enumerate((low, both)):
                            n = (r * spans + u) * 2 + i
                            grown[n] = kinds.dot(b, "vpdpbusd", grown[n], x, weight)
                return [other.row, other.shift, *grown]

            first = []
            for r in range(rows):
                for u in range(spans):
                    extra = load_at(b, behind[r], 4 * u, I32)
                    # Both halves of a byte are 16 times the upper one and once the lower one.
                    first += [splat_value(b, WHOLE, b.mul(extra, const(I32, n))) for n in (1, 17)]
            start = [row, b.urem(begin, wanted_bytes), *first]
            totals = emitters.loop_values(b, fours, start, step)[2:]
            for r in range(rows):
                f = splat_at(b, factor, 2 * r * emitters.REGISTER_BYTES, NUMBER)
                target = b.add(o, b.mul(o_row, const(I64, r)))
                for u in range(spans):
                    worth = splat_at(b, behind[r], 16 + 4 * u, NUMBER)
                    low, both = totals[(r * spans + u) * 2 :][:2]
                    for half, total in enumerate((low, b.ashr(b.sub(both, low), const(WHOLE, 4)))):
                        x = b.fmul(b.sitofp(total, NUMBER), worth)
                        shift = (2 * u + half) * emitters.REGISTER_BYTES
                        place = pointer(b, b.add(target, const(I64, shift)), NUMBER)
                        store_value(b, fma_value(b, load_value(b, place), f, x), place)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 13), codegen

    return tile


def _gather(count: int) -> Any:
    """``gather(table, shift, target)``: of the 16 addresses in a table so many float32 each, `shift` bytes
    behind, a vector of each, `TILE` apart.
    """

    @intrinsic
    def gather(typingctx: Any, table: Any, shift: Any, target: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            table, shift, target = args
            t = ir.VectorType(ir.FloatType(), count)
            rows = [
                load_value(
                    b, pointer(b, b.add(load_at(b, table, 8 * i, I64), shift), t if count > 1 else t.element)
                )
                for i in range(LANES)
            ]
            if count == 1:
                columns = [ir.Constant(NUMBER, ir.Undefined)]
                for i, x in enumerate(rows):
                    columns = [b.insert_element(columns[0], x, const(I32, i))]
            else:
                columns = turned.turn(b, rows)
            for c, x in enumerate(columns):
                store_value(b, x, pointer(b, b.add(target, const(I64, c * TILE * 4)), NUMBER))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), codegen

    return gather


class Nibbles(NamedTuple):
    """The compiled functions of this file; `p` is the call's parameters, `w` a thread's `chunks.Scratch`."""

    round_queries: Any
    """``round_queries(columns, x, target, step)``, a row of float32: each 32 numbers so many bytes apart."""
    score: Any
    """As `sweeps.scorer` makes it."""
    spread_weights: Any
    """``spread_weights(p, w, table, keys, rows)``: weights -> bytes that hold the values' scales."""
    weigh: Any
    """As `sweeps.weigher` makes it, of those whole numbers."""


def build(jit: Any) -> Nibbles:
    """The functions."""
    dtype = np.float32
    load, store, _, put = simd.loads("float32")
    get_int, put_int32 = simd.scalars(types.int64)[0], simd.scalars(types.int32)[1]
    put_byte = kinds.put_whole(8)
    add, mul, fma, greater, splat = simd.add, simd.mul, simd.fma, simd.greater, simd.splat
    score_rows = turned.scorer(jit, _scores_tile, QUERY_BYTES)
    weigh8, weigh4, weigh2, weigh1 = (_values_tile(*n) for n in ((8, 1), (4, 2), (2, 4), (1, 4)))
    weigh4_few, weigh2_few, weigh1_few = (_values_tile(n, 1) for n in (4, 2, 1))
    gather1, gather4 = _gather(1), _gather(4)

    @jit
    def round_queries(columns, x, target, step):
        zero = splat(dtype(0))
        largest, broken = zero, zero
        for c in range(0, columns, 16):
            y = load(x + c * 4)
            largest = greater(simd.absolute(y), largest)
            broken = fma(y, zero, broken)
        top = dots.lowest_lane(simd.across_max(largest))
        worth = top / dtype(LARGEST_QUERY) + dots.lowest_lane(simd.across_sum(broken))
        inverse = splat(dtype(LARGEST_QUERY) / top if top > dtype(LEAST) else dtype(0))
        for c in range(0, columns, 32):
            y, z = load(x + c * 4), load(x + c * 4 + 64)
            y, z = simd.round_near(mul(y, inverse)), simd.round_near(mul(z, inverse))
            t = target + c // 32 * step
            put_byte(t, y)
            put_byte(t + 16, z)
            put_int32(t + 32, np.int32(-8) * np.int32(dots.lowest_lane(simd.across_sum(add(y, z)))))
            put(t + 36, worth)

    @jit
    def gather(table, target, keys, count):
        """Scales of a tile's rows, whose addresses the table holds."""
        for j in range(0, keys, 16):
            t, here, c = target + j * 4, table + 8 * j, 0
            while c + 4 <= count:
                gather4(here, c * 4, t + c * TILE * 4)
                c += 4
            while c < count:
                gather1(here, c * 4, t + c * TILE * 4)
                c += 1

    @jit
    def ask(table, count):
        """Ask for scales, so many of each of 16 keys or values. In the midst of products: all of a tile's at
        once are more than the processor asks for at a time, and keep it from reading meanwhile.
        """
        for i in range(0, 8 * 16, 8 * max(16 // count, 1)):
            simd.prefetch_aside(get_int(table + i))

    @jit
    def score(p, w, table, scales, wanted, keys, groups, together):
        steps, width = p.head_dim // 32, p.key_bytes
        gather(scales, w.scales, keys, steps)
        for j in range(0, keys, LANES):
            k, f, v, t = table + 8 * j, w.scales + 4 * j, wanted + 8 * j, w.s + 4 * j
            following = scales + 8 * (TILE + j)
            ask(following, steps)
            ask(following + w.value_scales - w.key_scales, p.value_dim // 32)
            score_rows(k, f, v, width, w.q, t, TILE * 4, steps, groups)

    @jit
    def spread_weights(p, w, table, keys, rows):
        spans, zero = p.value_dim // 32, splat(dtype(0))
        gather(table, w.scales, keys, spans)
        fours, filled = (spans + 3) // 4, (keys + 63) // 64 * 64
        for t in range(w.scales + spans * TILE * 4, w.scales + fours * 4 * TILE * 4, TILE * 4):
            for j in range(0, filled * 4, 64):
                store(t + j, zero)
        for t in range(w.scales, w.scales + spans * TILE * 4, TILE * 4):
            for j in range(keys * 4, filled * 4, 64):
                store(t + j, zero)
        for t in range(w.s, w.s + rows * TILE * 4, TILE * 4):
            for j in range(keys * 4, filled * 4, 64):
                store(t + j, zero)
        broken = zero
        for j in range(0, filled * 4, 64):
            most, nothing = zero, zero
            for t in range(w.scales + j, w.scales + j + spans * TILE * 4, TILE * 4):
                x = load(t)
                most = greater(simd.absolute(x), most)
                nothing = fma(x, zero, nothing)
            store(w.most + j, most)
            broken = add(broken, nothing)
        lost = dots.lowest_lane(simd.across_sum(broken))
        r = 0
        while r < rows:
            s, t = w.s + r * TILE * 4, w.units + r * UNIT_BYTES
            if rows - r >= 4:
                rounded.units4(s, TILE * 4, w.most, lost, t, keys // 16)
                r += 4
            else:
                rounded.units1(s, TILE * 4, w.most, lost, t, keys // 16)
                r += 1
        t = w.spread
        for c in range(fours):
            for r in range(rows):
                rounded.round_row(
                    w.s + r * TILE * 4, w.scales + c * 4 * TILE * 4, w.units + r * UNIT_BYTES, t, filled // 64
                )
                t += WEIGHT_BYTES

    @jit
    def weigh(p, w, state, weights, table, scales, wanted, keys, groups, together):
        """o = o * factor + weights @ values; asks meanwhile for as many rows `wanted`."""
        o_row, spans, fours, width = p.value_dim * 4, p.value_dim // 32, keys // 4, p.value_bytes
        row, r, last = WEIGHT_BYTES, 0, wanted + 8 * (keys - 1)
        while r < groups:
            left, u = groups - r, 0
            o, f = state + 2 * groups * 64 + r * o_row, w.factor + 2 * r * 64
            while u < spans:
                behind = w.spread + (u // 4 * groups + r) * row + u % 4 * 4 + TILE * 4
                a, t, c = behind + u % 4 * (TILE - 4) - TILE * 4, o + u * 128, u * 16
                begin, n = c * keys if r == 0 else keys * width, 1
                if left >= 8:
                    weigh8(table, wanted, width, last, begin, c, a, row, behind, t, o_row, f, fours)
                elif left >= 4 and spans - u >= 2:
                    weigh4(table, wanted, width, last, begin, c, a, row, behind, t, o_row, f, fours)
                    n = 2
                elif left >= 4:
                    weigh4_few(table, wanted, width, last, begin, c, a, row, behind, t, o_row, f, fours)
                elif left >= 2 and spans - u >= 4:
                    weigh2(table, wanted, width, last, begin, c, a, row, behind, t, o_row, f, fours)
                    n = 4
                elif left >= 2:
                    weigh2_few(table, wanted, width, last, begin, c, a, row, behind, t, o_row, f, fours)
                elif spans - u >= 4:
                    weigh1(table, wanted, width, last, begin, c, a, row, behind, t, o_row, f, fours)
                    n = 4
                else:
                    weigh1_few(table, wanted, width, last, begin, c, a, row, behind, t, o_row, f, fours)
                u += n
            r += 8 if left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1

    return Nibbles(round_queries, score, spread_weights, weigh)
