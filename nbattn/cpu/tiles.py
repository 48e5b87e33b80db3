"""Register tiles: the small matrix products that all arithmetic of attention goes through.

One tile multiplies `rows` rows of A by `vectors` vectors of columns of B and keeps all of its sums in
registers: 6 x 4 of the 32 registers of AVX-512 and NEON, 6 x 2 of the 16 of AVX2 and SSE. In each step of the
reduction it loads `vectors` vectors of B and broadcasts one number for each row of A, which is read as it
lies in memory.
B and C are scratch with rows of `ROW_BYTES`; columns are queries.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from . import emitters
from .emitters import I32, I64, const, fma_value, load_value, pointer, splat_value, store_value

ROW_BYTES = 256
WIDE = 4 if emitters.REGISTERS == 32 else 2
"""Vectors of a full tile."""
NARROW_ROWS = 12
"""Rows of a tile that is one vector wide: enough sums under way to hide the latency of an FMA."""


def _tile(number: Any, rows: int, vectors: int, rescale: bool, pairs: bool, tops: bool) -> Any:
    """``c[:rows, :] = a[:rows, :depth] @ b``; with `rescale`, ``c * factor +`` that.

    a[r, k] lies at ``a + (r // 2 * a_two + r % 2 * a_row + k * a_col) * itemsize``; `factor` is the address
    of one number per column, with `tops` of the columns' maxima, which are moved while registers hold the
    sums. With `pairs` each element of a and b is a word of two bfloat16, multiplied and added as two steps.
    """
    size = number.bitwidth // 8

    @intrinsic
    def tile(
        typingctx: Any, a: Any, a_two: Any, a_row: Any, a_col: Any, b: Any, c: Any, depth: Any, factor: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            a, a_two, a_row, a_col, b, c, depth, factor = args
            scalar = context.get_value_type(number)
            t = ir.VectorType(scalar, emitters.REGISTER_BYTES // size)
            operand = I32 if pairs else scalar
            operands = ir.VectorType(operand, t.count)
            step = emitters.dot_pairs_value if pairs else _multiply_add
            first_of_a = pointer(builder, a, operand)
            a_rows = []
            for r in range(rows):
                below = builder.mul(a_two, const(I64, r // 2))
                a_rows.append(builder.gep(first_of_a, [builder.add(below, a_row) if r % 2 else below]))

            def at(base: Any, r: int, j: int, t: Any = t) -> Any:
                shift = const(I64, r * ROW_BYTES + j * emitters.REGISTER_BYTES)
                return pointer(builder, builder.add(base, shift), t)

            places = [at(c, r, j) for r in range(rows) for j in range(vectors)]
            sums = [const(t, 0.0)] * len(places)
            before, head = builder.block, builder.append_basic_block("reduce")
            after = builder.append_basic_block("reduced")
            builder.cbranch(builder.icmp_signed(">", depth, const(I64, 0)), head, after)
            builder.position_at_end(head)
            k = builder.phi(I64)
            k.add_incoming(const(I64, 0), before)
            running = [builder.phi(t) for _ in sums]
            row = builder.add(b, builder.mul(k, const(I64, ROW_BYTES)))
            columns = [load_value(builder, at(row, 0, j, operands)) for j in range(vectors)]
            offset = builder.mul(k, a_col)
            if rows == 6 and not rescale:
                # The next rows, where they follow these without a gap: Intel's own prefetching loses track of
                # six rows at once, which took 7 to 14 % of the products from the second-level cache and on.
                following_rows = builder.add(a, builder.mul(a_two, const(I64, 3 * size)))
                emitters.prefetch_value(
                    builder, builder.add(following_rows, builder.mul(k, const(I64, 6 * size)))
                )
            grown = []
            for r in range(rows):
                x = splat_value(builder, operands, load_value(builder, builder.gep(a_rows[r], [offset])))
                grown += [step(builder, running[r * vectors + j], x, columns[j]) for j in range(vectors)]
            following = builder.add(k, const(I64, 1))
            k.add_incoming(following, head)
            for phi, first, next_ in zip(running, sums, grown, strict=True):
                phi.add_incoming(first, before)
                phi.add_incoming(next_, head)
            builder.cbranch(builder.icmp_signed("<", following, depth), head, after)
            builder.position_at_end(after)
            totals = [builder.phi(t) for _ in sums]
            for total, first, last in zip(totals, sums, grown, strict=True):
                total.add_incoming(first, before)
                total.add_incoming(last, head)
            if rescale:
                # Last, so that small products add up before they meet the large sums of earlier keys.
                factors = [load_value(builder, at(factor, 0, j)) for j in range(vectors)]
                for i, place in enumerate(places):
                    totals[i] = fma_value(
                        builder, load_value(builder, place), factors[i % vectors], totals[i]
                    )
            for total, place in zip(totals, places, strict=True):
                store_value(builder, total, place)
            for j in range(vectors if tops else 0):
                place = at(factor, 0, j)
                top = load_value(builder, place)
                for total in totals[j::vectors]:
                    top = emitters.greater_value(builder, total, top)
                store_value(builder, top, place)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return tile


def _multiply_add(b: Any, total: Any, x: Any, y: Any) -> Any:
    return fma_value(b, x, y, total)


def product(jit: Any, number: Any, rescale: bool, pairs: bool, tops: bool = False) -> Any:
    """The compiled function ``product(a, a_two, a_row, a_col, rows, b, c, vectors, depth, factor)``.

    ``c[rows, :] = a[rows, depth] @ b[depth, :]`` over `vectors` vectors of columns, plus ``c * factor`` with
    `rescale`. Rows of a lie two by two, `a_two` elements from one two to the next; a, the addresses b, c and
    factor, `pairs` and `tops` as in `_tile`.
    """
    wide6, wide4, wide1 = (_tile(number, rows, WIDE, rescale, pairs, tops) for rows in (6, 4, 1))
    narrow12, narrow4, narrow1 = (
        _tile(number, rows, 1, rescale, pairs, tops) for rows in (NARROW_ROWS, 4, 1)
    )
    size = number.bitwidth // 8

    @jit
    def multiply(a, a_two, a_row, a_col, rows, b, c, vectors, depth, factor):
        column = 0
        while column < vectors:
            shift = column * emitters.REGISTER_BYTES
            r = 0
            if vectors - column >= WIDE:
                while rows - r >= 6 and rows - r != 8:  # 8 is two fours
                    left = a + r // 2 * a_two * size
                    wide6(left, a_two, a_row, a_col, b + shift, c + r * ROW_BYTES + shift, depth,
                          factor + shift)  # fmt: skip
                    r += 6
                while rows - r >= 4:
                    left = a + r // 2 * a_two * size
                    wide4(left, a_two, a_row, a_col, b + shift, c + r * ROW_BYTES + shift, depth,
                          factor + shift)  # fmt: skip
                    r += 4
                while rows > r:
                    left = a + (r // 2 * a_two + r % 2 * a_row) * size
                    wide1(left, a_two, a_row, a_col, b + shift, c + r * ROW_BYTES + shift, depth,
                          factor + shift)  # fmt: skip
                    r += 1
                column += WIDE
            else:
                while rows - r >= NARROW_ROWS:
                    left = a + r // 2 * a_two * size
                    narrow12(left, a_two, a_row, a_col, b + shift, c + r * ROW_BYTES + shift, depth,
                          factor + shift)  # fmt: skip
                    r += NARROW_ROWS
                while rows - r >= 4:
                    left = a + r // 2 * a_two * size
                    narrow4(left, a_two, a_row, a_col, b + shift, c + r * ROW_BYTES + shift, depth,
                          factor + shift)  # fmt: skip
                    r += 4
                while rows > r:
                    left = a + (r // 2 * a_two + r % 2 * a_row) * size
                    narrow1(left, a_two, a_row, a_col, b + shift, c + r * ROW_BYTES + shift, depth,
                          factor + shift)  # fmt: skip
                    r += 1
                column += 1

    return multiply
