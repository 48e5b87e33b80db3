"""Softmax, log-softmax and log-sum-exp on explicit vectors, over any axis and any strides.

Scores go once from memory to scratch, scaled, in the compute dtype, chunk by chunk. While a chunk is in the
first-level cache, its maxima and sums of exponentials are taken; a last sweep over the scratch writes whole
vectors of results. The lanes are neighbouring columns, so nothing is horizontal. Short rows are turned into
columns in registers; long ones that are a run of memory have the lanes along them, joined once a chunk. A row
longer than the scratch is cut into segments: a first sweep over memory finds their maxima and sums, a second
one writes. How rows are cut depends on their length and strides, never on their number.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from ..problem import STORAGE_DTYPES, storage_name
from . import emitters, records, runtime, simd, team

SHORT = 256
"""Elements of a row from which on the lanes lie along it; 100 took 85 ns so and take 42 as columns."""
CHUNK = 4096
"""Elements of a chunk of a long row."""
CHUNK_ROWS = 32
"""Rows of a chunk of columns. Fewer pay more for joining chunks, more leave the first-level cache."""
SEGMENT = 1 << 18
"""Elements of a long row's segment."""
PANEL = 1 << 19
"""Elements of a panel of columns: 2 MB, which the third-level cache holds. The second one would hold rows of
128 bytes, and memory gives those at half the rate of rows of 512."""
PANEL_LINES = 8
"""Cache lines of a row of a panel, unless its columns are too long; then 2."""
TASK = 1 << 15
"""Elements worth taking from the counter."""
SERIAL = 1 << 17
"""Elements below which a call is not worth a second thread: 40 us."""
STREAM = 1 << 25
"""Bytes of an output that no cache would keep. It is written past them, which saves a sixth of the time, but
for long rows of a fresh one, whose pages the system has just cleared in the cache: there it costs a third."""
SOFTMAX, LOG_SOFTMAX, LOGSUMEXP = range(3)
ONCE, REDUCE, WRITE = range(3)
"""Sweeps over memory: the only one, the first and the second of two."""

PARAMETERS = np.dtype(
    runtime.WORK
    + [(name, np.int64) for name in (
        "workspace", "workspace_bytes", "workers",
        # addresses, and strides in bytes along outer, reduced and inner axis
        "x", "x_o", "x_n", "x_i", "where", "where_o", "where_n", "where_i", "out", "out_o", "out_n", "out_i",
        "stats", "scratch", "state_bytes", "ahead", "n", "inner", "units", "units_per_task",
        "along", "panels", "columns", "shift", "segments", "segment", "chunk", "streams", "result", "sweep",
    )]
    + [("scale", np.float64)]
)  # fmt: skip

# Rows of the workspace, as wide as a panel, or one vector along a row: the running zero point (the maximum,
# made finite) and total; a, b, c of result = (score - a) * b - c; the chunks' zero points. Scores follow.
ZERO, TOTAL, A, B, C, STATES = range(6)

parameters_at = simd.record(PARAMETERS)
get_byte, _ = simd.scalars(types.int8)
_WORDS = records.words_of(PARAMETERS)
X, OUT, WORKSPACE = (_WORDS[name] for name in ("x", "out", "workspace"))
NEXT_TASK, TASKS_DONE, WORKERS = (8 * _WORDS[name] for name in ("next_task", "tasks_done", "workers"))


def softmax(
    x: NDArray[Any], where: NDArray[np.bool_] | None, scale: float, out: NDArray[Any], *, fresh: bool
) -> None:
    """Write exp(scale * x) / sum(exp(scale * x)) to `out` (outer, n, inner), 0 where `where` is False."""
    _run(SOFTMAX, x, where, scale, out, fresh)


def log_softmax(
    x: NDArray[Any], where: NDArray[np.bool_] | None, scale: float, out: NDArray[Any], *, fresh: bool
) -> None:
    """Write scale * x - log(sum(exp(scale * x))) to `out` (outer, n, inner), -inf where `where` is False."""
    _run(LOG_SOFTMAX, x, where, scale, out, fresh)


def logsumexp(x: NDArray[Any], where: NDArray[np.bool_] | None, scale: float, out: NDArray[Any]) -> None:
    """Write log(sum(exp(scale * x))) to `out` (outer, inner), -inf where nothing is left."""
    if x.shape[1]:
        _run(LOGSUMEXP, x, where, scale, out[:, None])
    else:
        out[...] = -np.inf


def repeat(
    name: str, x: NDArray[Any], scale: float, out: NDArray[Any]
) -> Callable[[NDArray[Any], NDArray[Any]], None] | None:
    """A function of other `x` and `out` that lie as these do, for short calls; None where none is short."""
    result = ("softmax", "log_softmax", "logsumexp").index(name)
    laid, _, target = _lanes_last(x, None, out[:, None] if result == LOGSUMEXP else out)
    if out.size == 0 or x.size >= SERIAL or not np.may_share_memory(x, laid):
        return None
    values = _parameters(result, laid, None, scale, target)
    if values["segments"] > 1:
        return None
    call, words = kernel(f"softmax-{storage_name(x.dtype)}"), records.packed(values, _WORDS)
    workspace_bytes = values["workspace_bytes"]

    def run(x: NDArray[Any], out: NDArray[Any]) -> None:
        own = words.copy()
        own[X], own[OUT] = runtime.address(x), runtime.address(out)
        memory, own[WORKSPACE] = runtime.scratch(workspace_bytes)
        team.run(call, own, 0, (x, out, memory))
        runtime.keep(memory)

    return run


def kernel_names(dtypes: Sequence[str]) -> list[str]:
    """The kernels that calls with these dtypes need."""
    return [f"softmax-{dtype}" for dtype in dtypes if dtype in STORAGE_DTYPES]


def kernel(name: str) -> Any:
    """The compiled kernel of this name."""
    return runtime.compiled(name, partial(_build, name.partition("-")[2]))


def _run(
    result: int,
    x: NDArray[Any],
    where: NDArray[np.bool_] | None,
    scale: float,
    out: NDArray[Any],
    fresh: bool = False,
) -> None:
    """Write the `result` of x to `out`: both (outer, n, inner), n being 1 in `out` for logsumexp.

    `fresh` says that `out` is new memory.
    """
    if out.size == 0:
        return
    x, where, out = _lanes_last(x, where, out)
    values = _parameters(result, x, where, scale, out, fresh)
    storage = storage_name(x.dtype)
    helpers = 0 if x.size < SERIAL else min(runtime.threads(), values["tasks"]) - 1
    memory, values["workspace"] = runtime.scratch((helpers + 1) * values["workspace_bytes"])

    def sweep(number: int, *keep_alive: Any) -> None:
        # A record of its own for each sweep: a helper may come late and still read the first.
        words = records.packed(values | {"sweep": number}, _WORDS)
        keep_alive += (x, where, out, memory)
        team.run(kernel(f"softmax-{storage}"), words, helpers, keep_alive)

    if values["segments"] == 1:
        sweep(ONCE)
    else:
        shape = x.shape[0], values["panels"], values["segments"], 2, values["state_bytes"]
        stats = np.empty(shape, np.uint8).view(_compute(x))
        values["stats"] = runtime.address(stats)
        sweep(REDUCE, stats)
        _merge(stats[..., 0, :], stats[..., 1, :])
        sweep(WRITE, stats)
    runtime.keep(memory)


def _parameters(
    result: int,
    x: NDArray[Any],
    where: NDArray[np.bool_] | None,
    scale: float,
    out: NDArray[Any],
    fresh: bool = False,
) -> dict[str, int]:
    """The kernel's parameters by name, but workspace, sweep and stats."""
    values = _cut(x, out, fresh)
    values |= {"result": result, "scale": struct.unpack("q", struct.pack("d", scale))[0]}
    for name, array in (("x", x), ("where", where), ("out", out)):
        if array is not None:
            values[name] = runtime.address(array)
            values[f"{name}_o"], values[f"{name}_n"], values[f"{name}_i"] = array.strides
    return values


def _lanes_last(
    x: NDArray[Any], where: NDArray[np.bool_] | None, out: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[np.bool_] | None, NDArray[Any]]:
    """The arrays with the better axis for lanes as the inner one; x copied where no axis is good."""
    lanes = _lanes(x)

    def quality(axis: int) -> int:
        if x.shape[axis] < lanes:
            return x.shape[axis] - lanes
        return (x.strides[axis] == x.itemsize) + (out.strides[axis] == out.itemsize)

    runs = any(size > 1 and stride == x.itemsize for size, stride in zip(x.shape, x.strides, strict=True))
    if x.shape[1] >= SHORT and (1 < x.shape[2] < lanes or not runs):
        x = np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)
    if not _lies_along(x) and quality(0) > quality(2):
        return x.swapaxes(0, 2), None if where is None else where.swapaxes(0, 2), out.swapaxes(0, 2)
    return x, where, out


def _compute(x: NDArray[Any]) -> type[np.floating[Any]]:
    return np.float64 if x.dtype == np.float64 else np.float32


def _lanes(x: NDArray[Any]) -> int:
    return simd.lanes(_compute(x))


def _lies_along(x: NDArray[Any]) -> bool:
    """Whether the lanes lie along the reduced axis."""
    return x.shape[1] >= SHORT and x.strides[1] == x.itemsize


def _cut(x: NDArray[Any], out: NDArray[Any], fresh: bool) -> dict[str, int]:
    """How the work is cut: panels of columns, segments of rows, chunks of both; units of work into tasks."""
    lanes, stored = _lanes(x), x.itemsize
    outer, n, inner = x.shape
    line = 64 // stored
    is_large = out.nbytes >= STREAM
    along = _lies_along(x)
    if along:
        columns, shift, chunk, segment = 1, 0, CHUNK, SEGMENT
        streams = is_large and n * stored >= 4096 and not fresh
        ahead = x.strides[2] if inner > 1 else x.strides[0]
    else:
        # All columns of a panel begin at a cache line of the output where its rows allow.
        whole_lines = out.strides[1] % 64 == 0 and (outer == 1 or out.strides[0] % 64 == 0)
        streams = is_large and inner >= 2 * line and whole_lines
        shift = runtime.address(out) % 64 // stored if streams else 0
        columns = min(max(PANEL // n // line, 2), PANEL_LINES) * line
        chunk, segment = CHUNK_ROWS, max(PANEL // (2 * line), 1)
        ahead = columns * x.strides[2]
    panels = -(-(inner + shift) // columns)
    vectors = -(-min(inner, columns) // lanes)
    segments = max(1, n // segment)
    rows = n if segments == 1 else min(n, 2 * segment)  # the last segment takes what would be less than one
    units = outer * panels * segments
    per_task = max(1, TASK // (rows * min(inner, columns)))
    state = vectors * emitters.REGISTER_BYTES
    scratch = (STATES + 1 + rows // chunk) * state
    cells = (-(-rows // lanes) if along else rows) * state
    return {
        "tasks": -(-units // per_task),
        "units": units,
        "units_per_task": per_task,
        "n": n,
        "inner": inner,
        "along": along,
        "panels": panels,
        "columns": columns,
        "shift": shift,
        "segments": segments,
        "segment": segment,
        "chunk": chunk,
        "streams": streams,
        "ahead": ahead,
        "state_bytes": state,
        "scratch": scratch,
        "workspace_bytes": -(-(scratch + cells + emitters.REGISTER_BYTES) // 64) * 64,
    }


def _merge(zeros: NDArray[Any], totals: NDArray[Any]) -> None:
    """Give the segments (axis 2) of each row their common zero point and total."""
    with np.errstate(all="ignore"):
        zero = zeros.max(axis=2, keepdims=True)
        shares = totals.astype(np.float64) * np.exp(np.subtract(zeros, zero, dtype=np.float64))
        zeros[...], totals[...] = zero, shares.sum(axis=2, keepdims=True)


# --- the kernel ---------------------------------------------------------------------------------------------


def _build(storage: str, jit: Any, inline: Any) -> Callable[[Any], Any]:
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

    @jit
    def deliver(p, abc, s, s_row, rows, count, out, out_row, out_step, in_place):
        """(s - a) * b - c -> out (rows, count), or back to s."""
        abc_step = 0 if p.along else size
        b_at, c_at = p.state_bytes, 2 * p.state_bytes
        for r in range(rows):
            t, o = s + r * s_row, out + r * out_row
            # From `first` to `last` go whole vectors. Past the caches go only whole cache lines: one that is
            # also written in part costs a trip to memory (0.7 times as fast).
            first, last = 0, count
            if in_place:
                pass
            elif out_step != stored or count < lanes:
                first = count
            elif p.streams:
                first = min(-(o // stored) % line, count)
                last -= (count - first) % line
            for j in range(first + count - last):
                i = j if j < first else last - first + j
                at = abc + i * abc_step
                y = (get(t + i * size) - get(at)) * get(at + b_at) - get(at + c_at)
                put_stored(o + i * out_step, y)
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
    def unit(p, w, u):
        """One segment of a row, or of the columns of a panel."""
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
            soften(p, w, s, tall, vectors, zeros, following)
            k, s, zeros = k + length, s + tall * s_row, zeros + p.state_bytes
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
            for u in range(task * p.units_per_task, min(p.units, (task + 1) * p.units_per_task)):
                unit(p, w, u)
            # An atomic addition also waits for what goes past the caches.
            if simd.fetch_add(address + TASKS_DONE) + 1 == p.tasks:
                finished_last = 1

    return work
