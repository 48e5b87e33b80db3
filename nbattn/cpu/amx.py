"""Products of bfloat16 pairs on the tile registers of AMX (Intel, from Sapphire Rapids on).

A tile register holds 16 rows of 64 bytes. One instruction multiplies 16 rows of A, of 16 words each, with 16
rows of B, of 16 columns of words, and adds to 16 x 16 float32 numbers; a word is a pair of bfloat16. It takes
16 cycles, 16 times the rate of float32 multiply-adds. Four sums, a tile of A and three of B fill the eight
registers. B and C are scratch with rows of `ROW_BYTES`; rows and depths are multiples of 16, padded with 0.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .emitters import I8, I64, const, pointer
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


def _tile(columns: int, add: bool, planes: int) -> Any:
    """``c = a @ b``, or ``c +=`` that, for one tile of a and `columns` of b.

    So a, which lies in larger caches, is read once. Its rows lie `a_row` bytes apart. With two planes numbers
    are sums of two bfloat16; a product of the smaller ones is left out where older sums hide it.
    """
    sums, lefts = [I8(j) for j in range(columns)], [I8(4 + i) for i in range(planes)]
    spare = [I8(i) for i in range(4 + planes, 8)]

    @intrinsic
    def tile(
        typingctx: Any, a: Any, a_row: Any, a_plane: Any, b: Any, b_plane: Any, c: Any, depth: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            a, a_row, a_plane, b, b_plane, c, depth = args
            step = const(I64, ROW_BYTES)

            def at(base: Any, shift: Any) -> Any:
                return pointer(builder, builder.add(base, shift), I8)

            places = [at(c, const(I64, j * ROW)) for j in range(columns)]
            for total, place in zip(sums, places, strict=True):
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
            column = builder.add(a, builder.mul(k, const(I64, ROW // ROWS)))
            for i, left in enumerate(lefts):
                emit(builder, "tileloadd64", left, at(column, builder.mul(a_plane, const(I64, i))), a_row)
            row = builder.add(b, builder.mul(k, step))
            for j, total in enumerate(sums):
                for i in range(planes):
                    right = spare[(j * planes + i) % len(spare)]
                    shift = builder.add(builder.mul(b_plane, const(I64, i)), const(I64, j * ROW))
                    emit(builder, "tileloadd64", right, at(row, shift), step)
                    for left in lefts[:1] if add and i else lefts:
                        emit(builder, "tdpbf16ps", total, left, right)
            following = builder.add(k, const(I64, ROWS))
            k.add_incoming(following, head)
            builder.cbranch(builder.icmp_signed("<", following, depth), head, after)
            builder.position_at_end(after)
            for total, place in zip(sums, places, strict=True):
                emit(builder, "tilestored64", total, place, step)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return tile


def product(jit: Any, add: bool, planes: int) -> Any:
    """The compiled function ``multiply(a, a_row, a_plane, rows, b, b_plane, c, vectors, depth)``.

    ``c[rows, :] = a[rows, depth] @ b[depth, :]``, or ``c +=`` that, over up to four vectors of columns. Rows
    of a lie `a_row` bytes apart, planes `a_plane` and `b_plane`; `rows` and `depth`, in words, are multiples
    of 16 and at least that.
    """
    tile1, tile2, tile3, tile4 = (_tile(columns, add, planes) for columns in (1, 2, 3, 4))

    @jit
    def multiply(a, a_row, a_plane, rows, b, b_plane, c, vectors, depth):
        for r in range(0, rows, ROWS):
            left, sums = a + r * a_row, c + r * ROW_BYTES
            if vectors == 4:
                tile4(left, a_row, a_plane, b, b_plane, sums, depth)
            elif vectors == 3:
                tile3(left, a_row, a_plane, b, b_plane, sums, depth)
            elif vectors == 2:
                tile2(left, a_row, a_plane, b, b_plane, sums, depth)
            else:
                tile1(left, a_row, a_plane, b, b_plane, sums, depth)

    return multiply
