"""What becomes of a step's scores between the two products of `hopper_kernel`: softcap, masks, softmax.

A thread has of each 8 columns of its warp's 16 rows two numbers of its first row, then two of the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import mma_rows
from .hopper_tiles import Tile

TANH = (-1 / 3, 2 / 15, -17 / 315)
"""tanh x = x + x * (these * x**2, x**4, x**6), to 5e-7 of it up to a quarter."""


def build(isa: Any, tile: Tile) -> tuple[Callable[..., None], ...]:
    """The functions `change`, `hide`, `soften` and `rescale` of a kernel."""
    jit, unroll, reread_thread = isa.jit, isa.unroll, isa.reread_thread
    int32, float32 = isa.int32, isa.float32
    select, smaller = isa.select, isa.smaller
    exp2, fma, maximum, reciprocal = isa.exp2, isa.fma, isa.maximum, isa.reciprocal
    columns, sums = tile.keys // 4, tile.value_width // 4  # a thread's of a row
    n_scores, infinity = tile.keys // 2, float("inf")
    first, second, third = TANH

    @jit
    def place(r, k):
        """Where the thread's column k of its row r lies among its scores."""
        return r * 2 + (k // 2) * 4 + k % 2

    @jit
    def offset(k):
        """What is between the thread's first column and its column k."""
        return int32((k // 2) * 8 + k % 2)

    @jit
    def tanh(x):
        """Without a branch, between products that run."""
        square = float32(x * x)
        near = fma(square, float32(third), float32(second))
        near = fma(fma(near, square, float32(first)), float32(square * x), x)
        # e**(2 |x|), which may be inf.
        size = maximum(x, -x)
        grown = exp2(float32(size * float32(2.8853900817779268)))
        far = fma(reciprocal(float32(grown + float32(1))), float32(-2), float32(1))
        far = select(x < float32(0), -far, far)
        far = select(x == x, far, x)
        return select(size < float32(0.25), near, far)

    @jit
    def change(p, s):
        """Products -> scores as the options want them."""
        for i in range(n_scores):
            unroll()
            s[i] = float32(s[i] * p.scale)
        if p.softcap != 0:
            for i in range(n_scores):
                unroll()
                s[i] = float32(p.softcap * tanh(float32(s[i] * p.inverse_softcap)))

    @jit
    def hide(x, s, key0):
        """-inf for keys before and beyond what a row sees."""
        # Read again, what follows from it need not stay in registers from one step to the next.
        thread = reread_thread()
        row = int32(x.row0 - 64 + (thread >> 5) * 16 + ((thread & 31) >> 2))
        column = int32(key0 + 2 * (thread & 3))
        for r in range(2):
            unroll()
            i = int32(row + 8 * r)
            begin, end = int32(i + x.low - column), int32(smaller(int32(i + x.high), x.length) - column)
            for k in range(columns):
                unroll()
                at, j = place(r, k), offset(k)
                s[at] = select((begin <= j) & (j < end), s[at], float32(-infinity))

    soften_row = mma_rows.softening(isa, place, columns)

    @jit
    def soften(s, top, total, factor, log2_scale):
        """Scores -> weights, 2 to what they are below the largest so far; `factor` is for earlier sums."""
        for r in range(2):
            unroll()
            factor[r] = soften_row(s, r, top, total, log2_scale)

    @jit
    def rescale(o, factor):
        for r in range(2):
            unroll()
            for k in range(sums):
                unroll()
                o[place(r, k)] = float32(o[place(r, k)] * factor[r])

    return change, hide, soften, rescale
