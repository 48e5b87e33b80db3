"""Softmax, log-softmax and log-sum-exp on the CPU: how the work is cut, the kernel's parameters, its run.

How rows are cut depends on their length and strides, never on their number. The kernel is in `exponentials`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..problem import STORAGE_DTYPES, storage_name
from . import emitters, exponentials, records, runtime, simd, team
from .exponentials import LOG_SOFTMAX, LOGSUMEXP, ONCE, PARAMETERS, REDUCE, SOFTMAX, STATES, WRITE

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
LATE, LATE_TASK = 1 << 16, 1 << 17
"""Elements of the longest row that is written past the caches while the next one is worked on, which hides
that it takes as long as reading; and of a task, whose last row is written by itself."""
_WORDS = records.words_of(PARAMETERS)
X, OUT, WORKSPACE = (_WORDS[name] for name in ("x", "out", "workspace"))


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
    return runtime.compiled(name, partial(exponentials.build, name.partition("-")[2]))


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
    values = _cut(x, out, fresh, result != LOGSUMEXP and where is None)
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


def _cut(x: NDArray[Any], out: NDArray[Any], fresh: bool, plain: bool) -> dict[str, int]:
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
    late = along and plain and streams and n <= LATE and out.strides[1] == stored
    per_task = max(1, (LATE_TASK if late else TASK) // (rows * min(inner, columns)))
    tasks = -(-units // per_task)
    # Two threads that meet in one new page both clear it, and one of them in vain.
    apart = min(runtime.threads(), tasks) if fresh and is_large else 1
    state = vectors * emitters.REGISTER_BYTES
    scratch = (STATES + 1 + rows // chunk) * state
    cells = (-(-rows // lanes) if along else rows) * state
    workspace = -(-(scratch + cells + emitters.REGISTER_BYTES) // 64) * 64
    return {
        "tasks": -(-tasks // apart) * apart,
        "apart": apart,
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
        "late_bytes": workspace if late else 0,
        "workspace_bytes": 2 * workspace if late else workspace,
    }


def _merge(zeros: NDArray[Any], totals: NDArray[Any]) -> None:
    """Give the segments (axis 2) of each row their common zero point and total."""
    with np.errstate(all="ignore"):
        zero = zeros.max(axis=2, keepdims=True)
        shares = totals.astype(np.float64) * np.exp(np.subtract(zeros, zero, dtype=np.float64))
        zeros[...], totals[...] = zero, shares.sum(axis=2, keepdims=True)
