"""Softmax, log-softmax and log-sum-exp on a GPU: fill the kernel's parameters, start it."""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

from numpy.typing import NDArray

from ..device import DeviceArray
from ..problem import storage_name
from . import arrays, compiler, launch

THREADS = 256
ROW_DIMENSIONS, RUN_DIMENSIONS = 4, 3
"""Axes that the kernel counts through: of rows, and of what it sums over beside the last."""
ARRAYS = ("x", "where", "out")
NAMES = ("softmax", "log_softmax", "logsumexp")
SOFTMAX, LOG_SOFTMAX, LOGSUMEXP = range(3)


def softmax(x: Any, where: Any, scale: float, out: Any, *, fresh: bool) -> None:
    """Write exp(scale * x) / sum(exp(scale * x)) to `out` (outer, n, inner), 0 where `where` is False."""
    _run(SOFTMAX, x, where, scale, out)


def log_softmax(x: Any, where: Any, scale: float, out: Any, *, fresh: bool) -> None:
    """Write scale * x - log(sum(exp(scale * x))) to `out` (outer, n, inner), -inf where `where` is False."""
    _run(LOG_SOFTMAX, x, where, scale, out)


def logsumexp(x: Any, where: Any, scale: float, out: Any) -> None:
    """Write log(sum(exp(scale * x))) to `out` (outer, inner), -inf where nothing is left."""
    _run(LOGSUMEXP, x, where, scale, out)


@cache
def kernel(storage: str, threads: int) -> compiler.Kernel:
    return compiler.Kernel(
        f"softmax-{storage}",
        partial(_build, storage, threads),
        (
            ("x", f"*{compiler.WORDS[storage]}"),
            ("where", "*uint8"),
            ("out", f"*{compiler.WORDS[storage]}"),
            ("scale", "float64"),
            *((name, "int64") for name in ("result", "where_bytes", "rows", "columns", "runs", "length")),
            ("row_sizes", f"int64x{ROW_DIMENSIONS}"),
            ("run_sizes", f"int64x{RUN_DIMENSIONS}"),
            *((f"{name}_rows", f"int64x{ROW_DIMENSIONS}") for name in ARRAYS),
            *((f"{name}_runs", f"int64x{RUN_DIMENSIONS}") for name in ARRAYS),
            *((f"{name}_step", "int64") for name in ARRAYS),
        ),
        threads,
    )


def kernels() -> list[compiler.Kernel]:
    """Every kernel that calls may start."""
    return [kernel(storage, THREADS) for storage in compiler.WORDS]


def _build(storage: str, threads: int) -> Any:
    from .rows import build

    return build(storage, threads)


def _run(result: int, x: NDArray[Any], where: Any, scale: float, out: NDArray[Any]) -> None:
    """NumPy's arrays, reduced over the middle axis; they go to the current GPU and back."""
    if out.size == 0:
        return
    with arrays.Copies() as copies:
        there = copies.send(x), copies.send(where), scale, copies.receive(out)
        _start(result, *there, {1}, copies.stream)


def along(
    name: str, x: DeviceArray, where: DeviceArray | None, scale: float, out: DeviceArray, axes: set[int]
) -> None:
    """The function of this name over some axes of an array on a GPU; `where` has its shape."""
    _start(NAMES.index(name), x, where, scale, out, axes, x.stream)


class Repeat:
    """A call to be made again with other arrays of the same layout: only their addresses change."""

    def __init__(
        self, name: str, x: DeviceArray, where: Any, scale: float, out: DeviceArray, axes: set[int]
    ) -> None:
        values = _parameters(NAMES.index(name), x, where, scale, out, axes)
        place = launch.device(x.device)
        self.call = launch.Call(_kernel_of(x), values, _blocks(values), place, ("x", "out"))

    def forward(self, x: int, out: int, stream: int) -> None:
        self.call(stream, x, out)


def _start(
    result: int, x: DeviceArray, where: Any, scale: float, out: DeviceArray, axes: set[int], stream: int
) -> None:
    values = _parameters(result, x, where, scale, out, axes)
    launch.run(_kernel_of(x), values, _blocks(values), launch.device(x.device), stream)


def _kernel_of(x: DeviceArray) -> compiler.Kernel:
    return kernel(str(storage_name(x.dtype)), THREADS)


def _blocks(values: dict[str, Any]) -> int:
    return -(-values["rows"] // values["columns"])


def _parameters(
    result: int, x: DeviceArray, where: DeviceArray | None, scale: float, out: DeviceArray, axes: set[int]
) -> dict[str, Any]:
    """What the kernel is told."""
    kept = [i for i in range(x.ndim) if i not in axes]
    # The result of log-sum-exp may lack the axes.
    own = [
        0 if result == LOGSUMEXP and i in axes else out.strides[i if out.ndim == x.ndim else kept.index(i)]
        for i in range(x.ndim)
    ]
    strides = [x.strides, where.strides if where else (0,) * x.ndim, own]
    dimensions = list(zip(x.shape, *strides, strict=True))
    rows = _merged([dimensions[i] for i in kept], ROW_DIMENSIONS)
    runs = _merged([dimensions[i] for i in sorted(axes)], RUN_DIMENSIONS + 1)
    values: dict[str, Any] = {
        "x": x.address,
        "out": out.address,
        "where": where.address if where else 0,
        "where_bytes": where.itemsize if where else 0,
        "result": result,
        "scale": scale,
        "rows": math.prod(size for size, *_ in rows),
        "runs": math.prod(size for size, *_ in runs[:-1]),
        "length": runs[-1][0],
        "row_sizes": tuple(max(size, 1) for size, *_ in rows),
        "run_sizes": tuple(max(size, 1) for size, *_ in runs[:-1]),
    }
    for i, (name, unit) in enumerate((("x", x.itemsize), ("where", 1), ("out", out.itemsize)), 1):
        values[f"{name}_rows"] = tuple(row[i] // unit for row in rows)
        values[f"{name}_runs"] = tuple(run[i] // unit for run in runs[:-1])
        values[f"{name}_step"] = runs[-1][i] // unit
    values["columns"] = _columns(values["runs"] * values["length"], rows[-1][1] == x.itemsize)
    return values


def _merged(dimensions: list[tuple[int, ...]], most: int) -> list[tuple[int, ...]]:
    """Sizes and strides in all arrays, axes that lie behind one another as one; filled up to `most`."""
    merged: list[tuple[int, ...]] = []
    for size, *strides in dimensions:
        if size == 1:
            continue
        if merged and all(last == size * own for last, own in zip(merged[-1][1:], strides, strict=True)):
            merged[-1] = (merged[-1][0] * size, *strides)
        else:
            merged.append((size, *strides))
    if len(merged) > most:
        msg = f"x has {len(merged)} dimensions that lie apart, of at most {most}; pass a contiguous copy"
        raise ValueError(msg)
    return [(1, 0, 0, 0)] * (most - len(merged)) + merged


def _columns(n: int, neighbours: bool) -> int:
    """Rows of a block: by their length and whether they lie beside one another, never by their number."""
    columns = 1
    while columns < THREADS and columns * n < 4 * THREADS:
        columns *= 2
    return max(columns, min(32, THREADS)) if neighbours else columns
