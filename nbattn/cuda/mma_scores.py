"""What becomes of a step's scores between the two products of `mma_kernel`: options, masks, softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import mma_rows
from .mma_tiles import Tile


def build(isa: Any, storage: str, tile: Tile) -> tuple[Callable[..., None], ...]:
    """The functions `change`, `hide` and `soften` of a kernel."""
    jit, unroll, reread_thread = isa.jit, isa.unroll, isa.reread_thread
    int32, int64, float32 = isa.int32, isa.int64, isa.float32
    select, smaller, flip, fma, tanh = isa.select, isa.smaller, isa.flip, isa.fma, isa.tanh
    load_float, load_half, load_byte = isa.load_float, isa.load_half, isa.load_byte
    low = isa.low_f16 if storage == "float16" else isa.low_bf16  # float32's bias is float32
    rows, scores_of, sums_of, warp_rows = tile.thread_rows, tile.scores, tile.sums, 16 * tile.warp_tiles
    columns, value_columns = tile.keys // 4, tile.value_width // 4  # a thread's of a row
    wide, tile_scores, infinity = storage == "float32", tile.warp_tiles * scores_of, float("inf")

    @jit
    def again(x):
        """x, and what follows from it is not kept from one step to the next where registers are few."""
        return flip(x, 0) if wide else x

    @jit
    def first_row(x):
        """The thread's first query."""
        # Read again, what follows from it need not stay in registers from one step to the next.
        thread = reread_thread()
        return int32(x.row0 + (thread >> 5) * warp_rows + ((thread & 31) >> 2))

    @jit
    def first_column():
        """Of the step's keys the thread's first."""
        return int32(2 * (reread_thread() & 3))

    @jit
    def place(r, k):
        """Where the thread's column k of its row r lies in the fragment of scores."""
        return (r // 2) * scores_of + (r % 2) * 2 + (k // 2) * 4 + k % 2

    @jit
    def offset(k):
        """What is between the thread's first column and its column k."""
        return int32((k // 2) * 8 + k % 2)

    @jit
    def change(p, x, s, key0):
        """Products -> scores as the options want them."""
        row, column = first_row(x), int32(key0 + first_column())
        for i in range(tile_scores):
            unroll()
            s[i] = float32(s[i] * p.scale)
        if p.softcap != 0:
            for i in range(tile_scores):
                unroll()
                s[i] = float32(p.softcap * tanh(float32(s[i] * p.inverse_softcap)))
        if p.bias != 0:
            for r in range(rows):
                unroll()
                i = int32(row + 8 * r)
                start = p.bias + again(x.b) * p.bias_b + again(x.h) * p.bias_h + int64(i) * p.bias_q
                for k in range(columns):
                    unroll()
                    at = place(r, k)
                    j = int32(column + offset(k))
                    wanted = (i < x.queries) & (j < x.length)
                    if p.bias_is_float32 != 0:
                        y = load_float(start + int64(j) * p.bias_k, wanted)
                    else:
                        y = low(load_half(start + int64(j) * p.bias_k, wanted))
                    # Nor does a NaN of the product's get past -inf.
                    s[at] = select(y == float32(-infinity), y, float32(s[at] + y))
        if p.alibi_slopes != 0:
            slope = load_float(p.alibi_slopes + 4 * again(x.h), True)
            for r in range(rows):
                unroll()
                distance = float32(int64(column) - int64(row + 8 * r) - x.offset)
                for k in range(columns):
                    unroll()
                    at = place(r, k)
                    s[at] = fma(slope, float32(distance + float32(offset(k))), s[at])
        if p.mask != 0:
            for r in range(rows):
                unroll()
                i = int32(row + 8 * r)
                start = p.mask + again(x.b) * p.mask_b + again(x.h) * p.mask_h + int64(i) * p.mask_q
                for k in range(columns):
                    unroll()
                    at = place(r, k)
                    j = int32(column + offset(k))
                    shown = load_byte(start + int64(j) * p.mask_k, (i < x.queries) & (j < x.length))
                    s[at] = select(shown != 0, s[at], float32(-infinity))

    @jit
    def hide(x, s, key0):
        """-inf for keys before and beyond what a row sees."""
        row, column = first_row(x), int32(key0 + first_column())
        for r in range(rows):
            unroll()
            i = int32(row + 8 * r)
            first, last = int32(i + x.low - column), int32(smaller(int32(i + x.high), x.length) - column)
            for k in range(columns):
                unroll()
                at, j = place(r, k), offset(k)
                s[at] = select((first <= j) & (j < last), s[at], float32(-infinity))

    soften_row = mma_rows.softening(isa, place, columns)

    @jit
    def soften(s, o, top, total, log2_scale):
        """Scores -> weights, 2 to what they are below the largest so far; what was summed before follows."""
        for r in range(rows):
            unroll()
            factor = soften_row(s, r, top, total, log2_scale)
            for k in range(value_columns):
                unroll()
                at = (r // 2) * sums_of + (r % 2) * 2 + (k // 2) * 4 + k % 2
                o[at] = float32(o[at] * factor)

    return change, hide, soften
