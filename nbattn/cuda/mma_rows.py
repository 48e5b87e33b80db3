"""What the kernels of prompts on tensor cores do alike: find a block's sequence, soften a row, end a row.

`mma_kernel` and `hopper_kernel` hold scores in the same fragments: four threads share the columns of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

LOG2_E, LN2 = 1 / math.log(2), math.log(2)
LARGE = float(1 << 12)
"""Exponents from which on the rounding of ``scale * maximum`` may move a weight of 1 in float16."""


def finding(isa: Any) -> Callable[..., Any]:
    """The function `sequence` of a kernel."""
    jit, int64, load_int64 = isa.jit, isa.int64, isa.load_int64

    @jit
    def sequence(p, b):
        """Sequence b: offset, key length, place in the batch, queries, rows of its first query and key."""
        offset, length = p.offset, p.key_length
        if p.offsets != 0:
            offset = load_int64(p.offsets + 8 * b)
        if p.key_lengths != 0:
            length = load_int64(p.key_lengths + 8 * b)
        slot, count, start, key_start = int64(b), int64(p.queries), int64(0), int64(0)
        if p.query_starts != 0:
            start, key_start = load_int64(p.query_starts + 8 * b), load_int64(p.key_starts + 8 * b)
            slot, count = int64(0), load_int64(p.query_starts + 8 * b + 8) - start
        return offset, length, slot, count, start, key_start

    return sequence


def softening(isa: Any, place: Callable[..., Any], columns: int) -> Callable[..., Any]:
    """The function `soften_row` of a kernel whose `place(r, k)` says where column k of row r lies."""
    jit, unroll, float32, select, any_lane = isa.jit, isa.unroll, isa.float32, isa.select, isa.any_lane
    exp2, fma, maximum, exchange, infinity = isa.exp2, isa.fma, isa.maximum, isa.exchange, float("inf")

    @jit
    def soften_row(s, r, top, total, log2_scale):
        """Scores -> weights, 2 to what they are below the largest so far; the factor of earlier sums."""
        largest = s[place(r, 0)]
        for k in range(1, columns):
            unroll()
            largest = maximum(largest, s[place(r, k)])
        largest = maximum(largest, exchange(largest, 1))
        largest = maximum(largest, exchange(largest, 2))
        largest = maximum(top[r], float32(largest * log2_scale))
        zero_point = select(largest == float32(-infinity), float32(0), largest)
        # Sums that are still 0 stay, and so does what `mend` has added to them.
        empty = top[r] == float32(-infinity)
        factor = select(empty, float32(1), exp2(float32(top[r] - zero_point)))
        top[r] = largest
        # As one rounding, s * scale - zero_point of the largest score is not 0 but what zero_point lost.
        slope, large = log2_scale, maximum(zero_point, -zero_point) > float32(LARGE)
        if any_lane(large):
            slope = select(large, float32(1), log2_scale)
            for k in range(columns):
                unroll()
                x = s[place(r, k)]
                s[place(r, k)] = select(large, float32(x * log2_scale), x)
        amount = float32(0)
        for k in range(columns):
            unroll()
            weight = exp2(fma(s[place(r, k)], slope, -zero_point))
            s[place(r, k)] = weight
            amount = float32(amount + weight)
        total[r] = fma(total[r], factor, amount)
        return factor

    return soften_row


def ending(isa: Any, has_sinks: bool) -> Callable[..., Any]:
    """The function `end_row` of a kernel, with sinks or without."""
    jit, int64, float32, select = isa.jit, isa.int64, isa.float32, isa.select
    exp2, log2, reciprocal, fma = isa.exp2, isa.log2, isa.reciprocal, isa.fma
    maximum, exchange, infinity = isa.maximum, isa.exchange, float("inf")
    load_float, store_float = isa.load_float, isa.store_float

    @jit
    def end_row(p, x, top, total, i, q):
        """What a row's sums are to be multiplied with; thread q = 0 of its four writes its lse."""
        amount = float32(total + exchange(total, 1))
        amount = float32(amount + exchange(amount, 2))
        largest, share = top, float32(1)
        if has_sinks and p.sinks != 0:
            # Only now: below a large sink float16 would not hold the weights.
            sink = float32(load_float(p.sinks + 4 * x.h, True) * float32(LOG2_E))
            largest = maximum(largest, sink)
            zero_point = select(largest == float32(-infinity), float32(0), largest)
            share = exp2(float32(top - zero_point))
            amount = fma(amount, share, exp2(float32(sink - zero_point)))
        if p.lse != 0:
            natural = float32((largest + log2(amount)) * float32(LN2))
            natural = select(amount == float32(0), float32(-infinity), natural)
            store_float(x.lse + int64(i) * p.lse_s, natural, (i < x.queries) & (q == 0))
        return select(amount == float32(0), float32(0), float32(share * reciprocal(amount)))

    return end_row
