"""The kernels that move tokens: into a cache, out of it, and through a turn or another dtype.

A block has one token's numbers of a head, or of all heads; its threads take them in turns. Numbers turn and
are quantised as `AppendProblem` says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda

from .numbers import compute_of, device, reader, writer

GROUP = 32
"""Numbers of a 4-bit cache that share a scale."""
NEAREST = 12582912.0
"""1.5 * 2**23: float32 numbers beside it are whole, so that a sum with it rounds, ties to even."""


QUARTER = (1.5707963109016418, 1.5893254712295857e-08, 6.123233995736766e-17)
"""A quarter turn in three parts, the first two of 26 bits: their whole multiples up to 2**27 are exact."""
SHIFT = 6755399441055744.0
"""1.5 * 2**52, likewise for float64."""


@device
def cosine_and_sine(angle):
    """To the last bit or two; libdevice's own would take local memory for angles that no position reaches.

    The polynomials are fdlibm's for half of a quarter turn either way.
    """
    turns = (angle * (2 / math.pi) + SHIFT) - SHIFT
    x = ((angle - turns * QUARTER[0]) - turns * QUARTER[1]) - turns * QUARTER[2]
    z = x * x
    s = 2.75573137070700676789e-06 + z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10)
    s = 8.33333333332248946124e-03 + z * (-1.98412698298579493134e-04 + z * s)
    s = x + x * z * (-1.66666666666666324348e-01 + z * s)
    c = 2.48015872894767294178e-05 + z * (
        -2.75573143513906633035e-07 + z * (2.08757232129817482790e-09 + z * -1.13596475577881948265e-11)
    )
    c = 1 - z / 2 + z * z * (4.16666666666666019037e-02 + z * (-1.38888888888741095749e-03 + z * c))
    quadrant = np.int64(turns) % 4
    if quadrant % 2 != 0:
        c, s = s, c
    if quadrant == 1 or quadrant == 2:
        c = -c
    if quadrant >= 2:
        s = -s
    return c, s


def _turner(number: Any, read: Callable[..., Any]) -> Callable[..., Any]:
    @device
    def turned(p, x, start, step, d, pairs, position):
        """Number d of a row, turned with the other one of its pair by the row's position."""
        y = number(read(x, start + d * step))
        if d < 2 * pairs:
            n, other, sign = d // 2, d + 1, number(-1)
            if p.interleaved != 0:
                if d % 2 != 0:
                    other, sign = d - 1, number(1)
            elif d < pairs:
                n, other = d, d + pairs
            else:
                n, other, sign = d - pairs, d - pairs, number(1)
            angle = np.float64(position) * p.frequencies[n]
            z = number(read(x, start + other * step))
            cosine, sine = cosine_and_sine(angle)
            y = y * number(cosine) + sign * z * number(sine)
        return y

    return turned


@device
def place_of(p, b, position):
    """The page of a sequence's position, and the row in it."""
    slot = position
    if p.ring != 0:
        slot = position % p.ring
    page, row = np.int64(b), slot
    if p.has_table != 0:
        page = np.int64(p.table[b * p.table_width + slot // p.page_size])
        row = slot % p.page_size
    return page, row


def build_append(given: str, storage: str, threads: int) -> Callable[..., None]:
    """The kernel that writes rows of a dtype into a cache's pages."""
    number, read = compute_of(given), reader(given)
    turned = _turner(number, read)
    write = writer(storage if storage not in ("int8", "int4") else given)
    to_int8, to_int4 = storage == "int8", storage == "int4"

    @device
    def divided(x, scale, lowest, highest):
        """A number as a multiple of the scale."""
        if scale == 0 or scale - scale != 0:
            return np.float32(0)
        y = np.float32(x) / scale
        y = (y + np.float32(NEAREST)) - np.float32(NEAREST)
        return min(max(y, np.float32(lowest)), np.float32(highest))

    def append(p):
        room = cuda.shared.array(threads, np.float32)
        tid = cuda.threadIdx.x
        rest = np.int64(cuda.blockIdx.x)
        of_value = rest % 2
        rest = rest // 2
        h = rest % p.heads
        rest = rest // p.heads
        i, b = rest % p.rows, rest // p.rows
        count, start = p.count, p.start
        if p.has_counts != 0:
            count = p.counts[b]
        if p.has_starts != 0:
            start += p.starts[b]
        position = start + i
        if i >= count or (p.ring != 0 and i < count - p.ring) or position < 0:
            return
        page, row = place_of(p, b, position)
        x, pages, scales, dim, pairs = p.key, p.key_pages, p.key_scales, p.head_dim, p.pairs
        xs, ts, ss = p.key_strides, p.key_pages_strides, p.key_scales_strides
        if of_value != 0:
            x, pages, scales, dim, pairs = p.value, p.value_pages, p.value_scales, p.value_dim, np.int64(0)
            xs, ts, ss = p.value_strides, p.value_pages_strides, p.value_scales_strides
        source = b * xs[0] + h * xs[1] + i * xs[2]
        target = page * ts[0] + row * ts[1] + h * ts[2]
        scale_at = page * ss[0] + row * ss[1] + h * ss[2]
        if to_int8:
            most = np.float32(0)
            for d in range(tid, dim, threads):
                y = abs(np.float32(turned(p, x, source, xs[3], d, pairs, position)))
                if y > most or y != y:
                    most = y
                    if y != y:
                        break
            room[tid] = most
            cuda.syncthreads()
            for other in range(threads):
                if room[other] > most or room[other] != room[other]:
                    most = room[other]
                    if most != most:
                        break
            scale = most / np.float32(127)
            if tid == 0:
                scales[scale_at] = scale
            for d in range(tid, dim, threads):
                y = np.float32(turned(p, x, source, xs[3], d, pairs, position))
                pages[target + d] = np.int8(divided(y, scale, -127, 127))
        elif to_int4:
            for group in range(tid, dim // GROUP, threads):
                largest, size = np.float32(0), np.float32(-1)
                for k in range(GROUP):
                    y = np.float32(turned(p, x, source, xs[3], group * GROUP + k, pairs, position))
                    if abs(y) > size or (y != y and size == size):
                        largest, size = y, abs(y)
                scale = largest / np.float32(-8)
                scales[scale_at + group] = scale
                for k in range(GROUP // 2):
                    d = group * GROUP + k
                    low = divided(turned(p, x, source, xs[3], d, pairs, position), scale, -8, 7)
                    high = divided(turned(p, x, source, xs[3], d + GROUP // 2, pairs, position), scale, -8, 7)
                    pages[target + group * (GROUP // 2) + k] = np.uint8(
                        np.int32(low) + 8 + (np.int32(high) + 8) * 16
                    )
        else:
            for d in range(tid, dim, threads):
                if d < 2 * pairs:
                    write(pages, target + d, turned(p, x, source, xs[3], d, pairs, position))
                else:
                    pages[target + d] = x[source + d * xs[3]]  # as it is, a NaN's bits too

    return append


def build_gather(storage: str, threads: int) -> Callable[..., None]:
    """The kernel that collects a cache's rows in order; quantised ones as float32."""
    from_int8, from_int4 = storage == "int8", storage == "int4"

    def gather(p):
        tid = cuda.threadIdx.x
        rest = np.int64(cuda.blockIdx.x)
        j, b = rest % p.rows, rest // p.rows
        position = p.firsts[b] + j
        if position >= p.lasts[b]:
            return
        page, row = place_of(p, b, position)
        for n in range(tid, p.heads * p.dim, threads):
            h, d = n // p.dim, n % p.dim
            at = page * p.pages_strides[0] + row * p.pages_strides[1] + h * p.pages_strides[2]
            out = ((b * p.heads + h) * p.rows + j) * p.dim + d
            if from_int8 or from_int4:
                scale_at = page * p.scales_strides[0] + row * p.scales_strides[1] + h * p.scales_strides[2]
                if from_int8:
                    p.out[out] = np.float32(p.pages[at + d]) * p.scales[scale_at]
                else:
                    group, k = d // GROUP, d % GROUP
                    byte = np.int32(p.pages[at + group * (GROUP // 2) + k % (GROUP // 2)])
                    if k >= GROUP // 2:
                        byte = byte >> 4
                    p.out[out] = np.float32((byte & 15) - 8) * p.scales[scale_at + group]
            else:
                p.out[out] = p.pages[at + d * p.pages_strides[3]]

    return gather


def build_turn(given: str, storage: str, threads: int) -> Callable[..., None]:
    """The kernel that writes rows in another dtype or turned; rows from a count on become 0."""
    read, write = reader(given), writer(storage)
    number = compute_of(given)
    turned = _turner(number, read)

    def turn(p):
        tid = cuda.threadIdx.x
        rest = np.int64(cuda.blockIdx.x)
        i = rest % p.rows
        rest = rest // p.rows
        h, b = rest % p.heads, rest // p.heads
        position = p.start + i
        if p.has_starts != 0:
            position += p.starts[b]
        xs, ts = p.x_strides, p.out_strides
        source = b * xs[0] + h * xs[1] + i * xs[2]
        target = b * ts[0] + h * ts[1] + i * ts[2]
        if p.has_counts != 0:
            if i >= p.counts[b]:
                for d in range(tid, p.dim, threads):
                    write(p.out, target + d * ts[3], number(0))
                if p.has_lse != 0 and tid == 0:
                    p.lse[b * p.lse_strides[0] + h * p.lse_strides[1] + i * p.lse_strides[2]] = -np.inf
            return
        for d in range(tid, p.dim, threads):
            write(p.out, target + d * ts[3], turned(p, p.x, source, xs[3], d, p.pairs, position))

    return turn
