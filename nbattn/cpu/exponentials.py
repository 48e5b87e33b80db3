"""The kernel of softmax, log-softmax and log-sum-exp on explicit vectors, over any axis and any strides.

Scores go once from memory to scratch, scaled, in the compute dtype, chunk by chunk. While a chunk is in the
first-level cache, its maxima and sums of exponentials are taken; a last sweep over the scratch writes whole
vectors of results. The lanes are neighbouring columns, so nothing is horizontal. Short rows are turned into
columns in registers; long ones that are a run of memory have the lanes along them, joined once a chunk. A row
longer than the scratch is cut into segments: a first sweep over memory finds their maxima and sums, a second
one writes. Rows that no cache would keep are written while the next one's exponentials are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from . import emitters, records, runtime, simd

SOFTMAX, LOG_SOFTMAX, LOGSUMEXP = range(3)
ONCE, REDUCE, WRITE = range(3)
"""Sweeps over memory: the only one, the first and the second of two."""

PARAMETERS = np.dtype(
    runtime.WORK
    + [(name, np.int64) for name in (
        "workspace", "workspace_bytes", "workers",
        # addresses, and strides in bytes along outer, reduced and inner axis
        "x", "x_o", "x_n", "x_i", "where", "where_o", "where_n", "where_i", "out", "out_o", "out_n", "out_i",
        "stats", "scratch", "state_bytes", "late_bytes", "ahead", "n", "inner", "units", "units_per_task",
        "apart", "along", "panels", "columns", "shift", "segments", "segment", "chunk", "streams", "result",
        "sweep",
    )]
    + [("scale", np.float64)]
)  # fmt: skip

# Rows of the workspace, as wide as a panel, or one vector along a row: the running zero point (the maximum,
# made finite) and total; a, b, c of result = (score - a) * b - c; the chunks' zero points. Scores follow.
ZERO, TOTAL, A, B, C, STATES = range(6)

parameters_at = simd.record(PARAMETERS)
get_byte, _ = simd.scalars(types.int8)
_WORDS = records.words_of(PARAMETERS)
NEXT_TASK, TASKS_DONE, WORKERS = (8 * _WORDS[name] for name in ("next_task", "tasks_done", "workers"))


def build(storage: str, jit: Any, inline: Any) -> Callable[[Any], Any]:
    """The kernel for arrays of one storage dtype, as a function of its parameters' address."""
    dtype: Any = np.float64 if storage == "float64" else np.float32
    size = np.dtype(dtype).itemsize
    stored = 2 if storage in ("float16", "bfloat16") else size
    lanes = simd.lanes(dtype)
    line = 64 // stored
    register = emitters.REGISTER_BYTES
    infinity = dtype(np.inf)
    largest = np.finfo(dtype).max

    load, store, get, put = simd.loads("float64" if dtype is np.float64 else "float32")
    load_stored, store_stored, get_stored, put_stored = simd.loads(storage)
    stream = simd.streaming(storage)
    turn_in, turn_out = simd.turns(storage)
    fma, mul, sub, add, div, exp, log, greater, splat = (
        simd.fma, simd.mul, simd.sub, simd.add, simd.div, simd.exp, simd.log, simd.greater, simd.splat,
    )  # fmt: skip

    @inline
    def pack(p, x, x_row, x_step, rows, count, s, s_row):
        """scale * x (rows, count) -> s; the last vector of each row is filled up with -inf."""
        scale, nothing = splat(dtype(p.scale)), splat(-infinity)
        by_squares = x_row == stored and x_step != stored and min(rows, count) >= lanes
        by_vectors = x_step == stored and count >= lanes
        for r in range(rows):
            a, t = x + r * x_row, s + r * s_row
            if count % lanes:
                store(t + count // lanes * register, nothing)
            i = count if by_squares else 0
            while i < count and by_vectors:
                c = min(i, count - lanes)  # the last one overlaps: nothing past the end is read
                store(t + c * size, mul(load_stored(a + c * stored), scale))
                i += lanes
            while i < count:
                put(t + i * size, get_stored(a + i * x_step) * dtype(p.scale))
                i += 1
        for r in range(0, rows if by_squares else 0, lanes):
            for c in range(0, count, lanes):
                j, i = min(r, rows - lanes), min(c, count - lanes)
                square = x + j * stored + i * x_step
                turn_in(square, x_step, s + j * s_row + i * size, s_row, dtype(p.scale))

    @jit
    def drop(where, where_row, where_step, rows, count, s, s_row, fill):
        """fill -> s (rows, count) where `where` is 0."""
        other = splat(fill)
        for r in range(rows):
            a, t = where + r * where_row, s + r * s_row
            i = count if where_step == 0 and get_byte(a) != 0 else 0
            while i + lanes <= count and 0 <= where_step <= 1:
                kept = simd.where(a + i, load(t + i * size), other) if where_step == 1 else other
                store(t + i * size, kept)
                i += lanes
            while i < count:
                if get_byte(a + i * where_step) == 0:
                    put(t + i * size, fill)
                i += 1

    @inline
    def soften(p, w, s, rows, vectors, zeros, ahead):
        """Take a chunk of scores (rows of so many vectors) into the running zero points and totals.

        Softmax keeps the exponentials in place of the scores. Most time is spent here, so the next chunk's
        memory is asked for meanwhile (1.5 times as fast as waiting for it), row by row: in the order of the
        columns, rows a power of two apart fight for one set of the first-level cache (0.7 times as fast).
        """
        s_row = vectors * register
        ahead_vectors = rows if p.along else vectors
        for v in range(vectors):
            c = v * register
            zero_at, total_at = w + ZERO * p.state_bytes + c, w + TOTAL * p.state_bytes + c
            # NaN is passed over: it comes back in the sum.
            before = load(zero_at)
            x = y = before
            r = 0
            while r + 2 <= rows:
                t = s + c + r * s_row
                x, y = greater(load(t), x), greater(load(t + s_row), y)
                r += 2
            if r < rows:
                x = greater(load(s + c + r * s_row), x)
            x = greater(x, y)
            if p.along:
                x = simd.across_max(x)
            # Finite, so that inf - inf appears only where it belongs.
            zero = simd.smaller(x, splat(largest))

            kept, kept_row = (s + c, s_row) if p.result == SOFTMAX else (zeros + c, 0)
            a = ahead + v * rows // vectors * p.x_n
            total = splat(dtype(0))
            first = 0
            while first < rows:
                end = min(first + ahead_vectors, rows)
                for r in range(first, end):
                    x = exp(sub(load(s + c + r * s_row), zero))
                    store(kept + r * kept_row, x)
                    simd.prefetch(a + (r - first) * lanes * stored)
                    total = add(total, x)
                first = end
                a += p.x_n
            if p.along:
                total = simd.across_sum(total)
            store(total_at, fma(load(total_at), exp(sub(before, zero)), total))
            store(zero_at, zero)
            store(zeros + c, zero)

    @inline
    def soften_late(p, w, s, rows, zeros, ahead, abc, done, out, whole):
        """`soften` along a row; meanwhile so many vectors of the row before: (done - a) * b - c -> out."""
        x = y = before = load(w + ZERO * p.state_bytes)
        r = 0
        while r + 2 <= rows:
            t = s + r * register
            x, y = greater(load(t), x), greater(load(t + register), y)
            r += 2
        if r < rows:
            x = greater(load(s + r * register), x)
        zero = simd.smaller(simd.across_max(greater(x, y)), splat(largest))
        kept, kept_row = (s, register) if p.result == SOFTMAX else (zeros, 0)
        a, b, shift = load(abc), load(abc + p.state_bytes), load(abc + 2 * p.state_bytes)
        total = splat(dtype(0))
        for r in range(whole):
            x = exp(sub(load(s + r * register), zero))
            store(kept + r * kept_row, x)
            simd.prefetch(ahead + r * lanes * stored)
            total = add(total, x)
            stream(out + r * lanes * stored, sub(mul(sub(load(done + r * register), a), b), shift))
        for r in range(whole, rows):
            x = exp(sub(load(s + r * register), zero))
            store(kept + r * kept_row, x)
            simd.prefetch(ahead + r * lanes * stored)
            total = add(total, x)
        total = simd.across_sum(total)
        store(w + TOTAL * p.state_bytes, fma(load(w + TOTAL * p.state_bytes), exp(sub(before, zero)), total))
        store(w + ZERO * p.state_bytes, zero)
        store(zeros, zero)

    @inline
    def settle(p, abc, vectors, zero_at, total_at, zeros):
        """a, b, c for a chunk: kept * exp(its zero - zero) / total, or score - zero - log(total)."""
        for v in range(vectors):
            c = v * register
            zero, total = load(zero_at + c), load(total_at + c)
            a, b, shift = zero, splat(dtype(1)), log(total)
            if p.result == SOFTMAX:
                a = shift = splat(dtype(0))
                # total - total: where it is inf, so was a score, and the whole row is NaN.
                b = mul(add(div(b, total), sub(total, total)), exp(sub(load(zeros + c), zero)))
            store(abc + c, a)
            store(abc + p.state_bytes + c, b)
            store(abc + 2 * p.state_bytes + c, shift)

    @inline
    def whole_lines(o, count):
        """(first, last) element of what goes past the caches: one line that is also written in part costs a
        trip to memory (0.7 times as fast)."""
        first = min(-(o // stored) % line, count)
        return first, count - (count - first) % line

    @jit
    def deliver_edges(p, abc, t, count, first, last, o, out_step):
        """(t - a) * b - c -> o (count) before `first` and from `last` on."""
        abc_step, b_at, c_at = 0 if p.along else size, p.state_bytes, 2 * p.state_bytes
        for j in range(first + count - last):
            i = j if j < first else last - first + j
            at = abc + i * abc_step
            y = (get(t + i * size) - get(at)) * get(at + b_at) - get(at + c_at)
            put_stored(o + i * out_step, y)

    @jit
    def deliver(p, abc, s, s_row, rows, count, out, out_row, out_step, in_place):
        """(s - a) * b - c -> out (rows, count), or back to s."""
        abc_step = 0 if p.along else size
        b_at, c_at = p.state_bytes, 2 * p.state_bytes
        for r in range(rows):
            t, o = s + r * s_row, out + r * out_row
            first, last = 0, count  # between them go whole vectors
            if in_place:
                pass
            elif out_step != stored or count < lanes:
                first = count
            elif p.streams:
                first, last = whole_lines(o, count)
            deliver_edges(p, abc, t, count, first, last, o, out_step)
            i = first
            while i < last:
                c = min(i, last - lanes)
                at = abc + c * abc_step
                x = sub(mul(sub(load(t + c * size), load(at)), load(at + b_at)), load(at + c_at))
                if in_place:
                    store(t + c * size, x)
                elif p.streams:
                    stream(o + c * stored, x)
                else:
                    store_stored(o + c * stored, x)
                i += lanes

    @jit
    def unit(p, w, u, late, waits):
        """One segment of a row, or of the columns of a panel.

        `late` is 0, or the workspace of the row before, which is written meanwhile; `waits` says that this
        row will be written so.
        """
        segment, panel, o = u % p.segments, u // p.segments % p.panels, u // p.segments // p.panels
        start = segment * p.segment
        end = p.n if segment == p.segments - 1 else start + p.segment
        column = max(panel * p.columns - p.shift, 0)
        width = min((panel + 1) * p.columns - p.shift, p.inner) - column
        x = p.x + o * p.x_o + column * p.x_i
        where = p.where + o * p.where_o + column * p.where_i
        out = p.out + o * p.out_o + column * p.out_i
        x_row, x_step = (0, p.x_n) if p.along else (p.x_n, p.x_i)
        where_row, where_step = (0, p.where_n) if p.along else (p.where_n, p.where_i)
        out_row, out_step = (0, p.out_n) if p.along else (p.out_n, p.out_i)
        vectors = 1 if p.along else (width + lanes - 1) // lanes
        s_row = vectors * register
        zero_at, total_at, abc = w + ZERO * p.state_bytes, w + TOTAL * p.state_bytes, w + A * p.state_bytes
        for v in range(vectors):
            store(zero_at + v * register, splat(-largest))
            store(total_at + v * register, splat(dtype(0)))

        # The second sweep of logsumexp has only one number to write.
        answers = p.result == LOGSUMEXP and p.sweep == WRITE
        if answers and segment > 0:
            return
        k, s, zeros = end if answers else start, w + p.scratch, w + STATES * p.state_bytes
        while k < end:
            # The last chunk takes what would be less than one.
            length = p.chunk if end - k >= 2 * p.chunk else end - k
            rows, count, tall = length, width, length
            if p.along:
                rows, count, tall = 1, length, (length + lanes - 1) // lanes
            if p.along and p.streams:  # lines that are written in part
                simd.prefetch(out + k * stored)
                simd.prefetch(out + (k + length) * stored - 1)
            pack(p, x + k * p.x_n, x_row, x_step, rows, count, s, s_row)
            if p.where:
                drop(where + k * p.where_n, where_row, where_step, rows, count, s, s_row, -infinity)
            following = x + (k + length) * p.x_n if k + length < end else x + start * p.x_n + p.ahead
            if late != 0:
                o = p.out + (u - 1) // p.panels * p.out_o + (u - 1) % p.panels * p.out_i + k * stored
                shift = late - w
                first, last = whole_lines(o, count)
                settle(p, abc + shift, 1, zero_at + shift, total_at + shift, zeros + shift)
                deliver_edges(p, abc + shift, s + shift, count, first, last, o, stored)
                soften_late(p, w, s, tall, zeros, following, abc + shift, s + shift + first * size,
                            o + first * stored, (last - first) // lanes)  # fmt: skip
            else:
                soften(p, w, s, tall, vectors, zeros, following)
            k, s, zeros = k + length, s + tall * s_row, zeros + p.state_bytes
        if waits:
            return
        if p.sweep != ONCE:
            zero_at = p.stats + u * 2 * p.state_bytes
            total_at = zero_at + p.state_bytes
        if p.sweep == REDUCE:
            for v in range(2 * p.state_bytes // register):
                store(zero_at + v * register, load(w + v * register))
            return

        if p.result == LOGSUMEXP:
            for v in range(vectors):
                c = v * register
                store(abc + c, add(load(zero_at + c), log(load(total_at + c))))
            for i in range(1 if p.along else width):
                put_stored(out + i * p.out_i, get(abc + i * size))
            return

        fill = dtype(0) if p.result == SOFTMAX else -infinity
        k, s, zeros = start, w + p.scratch, w + STATES * p.state_bytes
        while k < end:
            length = p.chunk if end - k >= 2 * p.chunk else end - k
            rows, count, tall = length, width, length
            if p.along:
                rows, count, tall = 1, length, (length + lanes - 1) // lanes
            by_squares = out_row == stored and out_step != stored and min(rows, count) >= lanes
            settle(p, abc, vectors, zero_at, total_at, zeros)
            if p.where or by_squares:
                deliver(p, abc, s, s_row, tall, vectors * lanes, s, s_row, size, True)
                for v in range(vectors):
                    store(abc + v * register, splat(dtype(0)))
                    store(abc + p.state_bytes + v * register, splat(dtype(1)))
                    store(abc + 2 * p.state_bytes + v * register, splat(dtype(0)))
            if p.where:
                drop(where + k * p.where_n, where_row, where_step, rows, count, s, s_row, fill)
            if by_squares:
                for r in range(0, rows, lanes):
                    for c in range(0, count, lanes):
                        j, i = min(r, rows - lanes), min(c, count - lanes)
                        square = out + (k + j) * stored + i * out_step
                        turn_out(s + j * s_row + i * size, s_row, square, out_step)
            else:
                deliver(p, abc, s, s_row, rows, count, out + k * p.out_n, out_row, out_step, False)
            k, s, zeros = k + length, s + tall * s_row, zeros + p.state_bytes

    def work(address):
        p = parameters_at(address)
        w = p.workspace + simd.fetch_add(address + WORKERS) * p.workspace_bytes
        finished_last = 0
        while True:
            task = simd.fetch_add(address + NEXT_TASK)
            if task >= p.tasks:
                return finished_last
            task = task % p.apart * (p.tasks // p.apart) + task // p.apart
            begin, end = task * p.units_per_task, min(p.units, (task + 1) * p.units_per_task)
            for u in range(begin, end):
                here = w + u % 2 * p.late_bytes
                late = w + (u + 1) % 2 * p.late_bytes if p.late_bytes != 0 and u > begin else 0
                unit(p, here, u, late, p.late_bytes != 0 and u + 1 < end)
            # An atomic addition also waits for what goes past the caches.
            if simd.fetch_add(address + TASKS_DONE) + 1 == p.tasks:
                finished_last = 1

    return work
