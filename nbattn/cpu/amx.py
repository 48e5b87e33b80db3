"""Products of bfloat16 pairs on the tile registers of AMX (Intel, from Sapphire Rapids on).

A tile register holds 16 rows of 64 bytes. One instruction multiplies 16 rows of A, of 16 words each, with 16
rows of B, of 16 columns of words, and adds to 16 x 16 float32 numbers; a word is a pair of bfloat16. It takes
16 cycles, 16 times the rate of float32 multiply-adds. Four sums, two tiles of A and two of B fill the eight
registers. B and C are scratch with rows of `ROW_BYTES`; rows and depths are multiples of 16, padded with 0.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .simd import I8, I64, const, pointer
from .tiles import ROW_BYTES

ROWS = 16
"""Rows of a tile, and words of a row."""
ROW = 64
"""Bytes of a tile's row."""


def emit(b: Any, name: str, *args: Any) -> None:
    """Call the intrinsic of this name; numbers of tiles are constants."""
    t = ir.FunctionType(ir.VoidType(), [a.type for a in args])
    b.call(cgutils.get_or_insert_function(b.module, t, f"llvm.x86.{name}"), args)


@intrinsic
def configure(typingctx: Any) -> Any:
    """Give this thread eight tiles of full size; `release` them before the kernel returns."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        palette, bytes_of_a_row, rows = 0, range(16, 32, 2), range(48, 56)
        content = [0] * 64
        content[palette] = 1
        for i in bytes_of_a_row:
            content[i] = ROW
        for i in rows:
            content[i] = ROWS
        t = ir.ArrayType(I8, 64)
        place = cgutils.alloca_once_value(b, ir.Constant(t, content))
        emit(b, "ldtilecfg", b.bitcast(place, I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def release(typingctx: Any) -> Any:
    """Empty the tiles, so that the system need not save them any more."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        emit(b, "tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


def _tile(rows: int, columns: int, add: bool) -> Any:
    """``c = a @ b``, or ``c +=`` that, for `rows` x `columns` tiles; a's rows lie `a_row` bytes apart."""
    sums = [[I8(r * columns + j) for j in range(columns)] for r in range(rows)]
    lefts, rights = [I8(4 + r) for r in range(rows)], [I8(6 + j) for j in range(columns)]

    @intrinsic
    def tile(typingctx: Any, a: Any, a_row: Any, b: Any, c: Any, depth: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            a, a_row, b, c, depth = args
            step = const(I64, ROW_BYTES)

            def at(base: Any, shift: Any) -> Any:
                return pointer(builder, builder.add(base, shift), I8)

            def each(do: Any) -> None:
                for r in range(rows):
                    for j in range(columns):
                        do(sums[r][j], at(c, const(I64, r * ROWS * ROW_BYTES + j * ROW)))

            if add:
                each(lambda total, place: emit(builder, "tileloadd64", total, place, step))
            else:
                each(lambda total, place: emit(builder, "tilezero", total))
            before, head = builder.block, builder.append_basic_block("reduce")
            after = builder.append_basic_block("reduced")
            builder.branch(head)
            builder.position_at_end(head)
            k = builder.phi(I64)
            k.add_incoming(const(I64, 0), before)
            along_a = builder.mul(k, const(I64, ROW // ROWS))
            along_b = builder.mul(k, step)
            for r in range(rows):
                below = builder.mul(a_row, const(I64, r * ROWS))
                emit(builder, "tileloadd64", lefts[r], at(a, builder.add(along_a, below)), a_row)
            for j in range(columns):
                place = at(b, builder.add(along_b, const(I64, j * ROW)))
                emit(builder, "tileloadd64", rights[j], place, step)
            for r in range(rows):
                for j in range(columns):
                    emit(builder, "tdpbf16ps", sums[r][j], lefts[r], rights[j])
            following = builder.add(k, const(I64, ROWS))
            k.add_incoming(following, head)
            builder.cbranch(builder.icmp_signed("<", following, depth), head, after)
            builder.position_at_end(after)
            each(lambda total, place: emit(builder, "tilestored64", total, place, step))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return tile


def product(jit: Any, add: bool) -> Any:
    """The compiled function ``multiply(a, a_row, rows, b, c, vectors, depth)``.

    ``c[rows, :] = a[rows, depth] @ b[depth, :]``, or ``c +=`` that, over `vectors` vectors of columns. Rows
    of a lie `a_row` bytes apart; `rows` and `depth`, in words, are multiples of 16 and at least that.
    """
    tile22, tile21, tile12, tile11 = (_tile(r, j, add) for r in (2, 1) for j in (2, 1))

    @jit
    def multiply(a, a_row, rows, b, c, vectors, depth):
        for column in range(0, vectors, 2):
            shift = column * ROW
            r = 0
            while r < rows:
                left, sums = a + r * a_row, c + r * ROW_BYTES + shift
                if rows - r > ROWS:
                    if vectors - column > 1:
                        tile22(left, a_row, b + shift, sums, depth)
                    else:
                        tile21(left, a_row, b + shift, sums, depth)
                elif vectors - column > 1:
                    tile12(left, a_row, b + shift, sums, depth)
                else:
                    tile11(left, a_row, b + shift, sums, depth)
                r += 2 * ROWS

    return multiply
