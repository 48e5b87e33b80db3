"""Additive attention on the CPU: fill the kernel's parameters, choose the threads, run it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..additive import AdditiveProblem
from . import runtime, team
from .hidden import ATTEND, GROUP, PARAMETERS, PROJECT, STATE_ROWS, TABLES, build
from .masks import WORDS
from .records import packed, place, words_of
from .tiles import ROW_BYTES

SERIAL_WORK = 1 << 17
"""Hidden units of pairs below which a call is not worth a second thread: 10 us."""
SERIAL_PRODUCTS = 1 << 20
"""The same for the multiply-adds of a projection."""
FEW_ROWS = 16
"""Rows of a sequence up to which those of a batch are projected together."""
_WORDS = words_of(PARAMETERS)


def forward(
    problem: AdditiveProblem, out: NDArray[Any], lse: NDArray[Any] | None, weights: NDArray[Any] | None
) -> None:
    """Write attention to `out` (B, Hq, Sq, Dv), `lse` (B, Hq, Sq) and `weights` (B, Hq, Sq, Sk)."""
    if out.size == 0:
        return
    problem = _few_projected(problem)
    p = problem.attention
    values, keep_alive = _parameters(problem, out, lse, weights)
    is_small = out[..., 0].size * p.max_keys * values["units"] < SERIAL_WORK
    helpers = 0 if is_small else runtime.threads() - 1
    tiles = p.batch * values["kv_heads"] * values["tiles"]
    blocks = p.batch * values["heads"] * values["blocks"]
    is_shared = values["blocks"] * values["group"] > 1
    hidden_bytes = tiles * values["hidden_bytes"] if is_shared else 0
    memory, values["workspace"] = runtime.scratch(hidden_bytes + (helpers + 1) * values["workspace_bytes"])
    if is_shared:
        values["hidden"], values["workspace"] = values["workspace"], values["workspace"] + hidden_bytes
    for run, tasks in ((PROJECT, tiles), (ATTEND, blocks)):
        if run == ATTEND or is_shared:
            # A record of its own for each run: a helper may come late and still read the first.
            record = packed(values | {"run": run, "tasks": tasks}, _WORDS)
            keep = (problem, out, lse, weights, keep_alive, memory)
            team.run(kernel(f"additive-{p.storage}"), record, min(helpers, tasks - 1), keep)
    runtime.keep(memory)


def _few_projected(problem: AdditiveProblem) -> AdditiveProblem:
    """With few queries a sequence, project those of the whole batch: together they fill the lanes."""
    p, matrix = problem.attention, problem.w_query
    if matrix is None or p.max_queries > FEW_ROWS:
        return problem
    return replace(problem, attention=replace(p, query=project(p.query, matrix)), w_query=None)


def project(x: NDArray[Any], matrix: NDArray[Any]) -> NDArray[Any]:
    """``x @ matrix.T`` for x (B, H, S, D) and a matrix (A, D) or (H, A, D), the last axes contiguous.

    These are the products of `forward`, whose bits depend on no thread and no batch; BLAS's may.
    """
    batch, heads, count, columns = x.shape
    matrix = np.broadcast_to(matrix, (heads, *matrix.shape[-2:]))
    units, rows = matrix.shape[1], ROW_BYTES // x.itemsize
    if heads > 1 and matrix.strides[0] == 0 and count <= FEW_ROWS:
        return project(x.reshape(1, 1, -1, columns), matrix[0]).reshape(batch, heads, count, units)
    if batch > 1 and count <= FEW_ROWS:
        joined = np.ascontiguousarray(x.swapaxes(0, 1)).reshape(1, heads, batch * count, columns)
        return project(joined, matrix).reshape(heads, batch, count, units).swapaxes(0, 1)
    values = _sizes(units, columns, 0, x.itemsize)
    tiles = -(-count // rows)
    hidden = np.empty((batch, heads, tiles, 2, values["unit_rows"], rows), x.dtype)
    lengths = np.full(batch, count, np.int64)
    place(values, _WORDS, "key", x, "bhs")
    place(values, _WORDS, "w_key", matrix, "hs")
    place(values, _WORDS, "key_lengths", lengths)
    place(values, _WORDS, "hidden", hidden)
    tasks = batch * heads * tiles
    values |= {"run": PROJECT, "tasks": tasks, "key_dim": columns, "kv_heads": heads, "tiles": tiles}
    helpers = 0 if x.size * units < SERIAL_PRODUCTS else min(runtime.threads(), tasks) - 1
    memory, values["workspace"] = runtime.scratch((helpers + 1) * values["workspace_bytes"])
    keep_alive = (x, matrix, lengths, hidden, memory)
    team.run(kernel(f"additive-{x.dtype.name}"), packed(values, _WORDS), helpers, keep_alive)
    runtime.keep(memory)
    turned = np.ascontiguousarray(hidden[:, :, :, 0, :units].swapaxes(3, 4))
    return turned.reshape(batch, heads, tiles * rows, units)[:, :, :count]


def kernel_names(dtypes: Sequence[str]) -> list[str]:
    """The kernels that calls with these dtypes need."""
    wide = {"float64" if dtype == "float64" else "float32" for dtype in dtypes if not dtype.startswith("int")}
    return [f"additive-{storage}" for storage in sorted(wide)]


def kernel(name: str) -> Any:
    """The compiled kernel of this name."""
    return runtime.compiled(name, partial(build, name.partition("-")[2]))


def _parameters(
    problem: AdditiveProblem, out: NDArray[Any], lse: NDArray[Any] | None, weights: NDArray[Any] | None
) -> tuple[dict[str, int], Any]:
    """The kernel's parameters by name, but run, tasks, workspace and hidden; and what must stay alive."""
    p = problem.attention
    heads, units = problem.v.shape
    (_, kv_heads, _, key_dim), query_dim, value_dim = p.key.shape, p.query.shape[3], p.value.shape[3]
    projected = [x.shape[2] for x in (problem.w_query, problem.w_key) if x is not None]
    values = _sizes(units, max(projected, default=0), value_dim, p.value.itemsize)
    with np.errstate(all="ignore"):
        # Weights of at most 1 keep what is joined small; those of 2**-100 are as good as 0.
        own = problem.v[:1] if problem.v.strides[0] == 0 else problem.v
        largest = np.abs(own).max()
        power = int(np.clip(np.frexp(largest)[1], -100, 100)) if np.isfinite(largest) else 0
        v = np.zeros((len(own), values["unit_rows"]), p.compute)
        v[:, :units] = -np.ldexp(own, -power)
        v = np.broadcast_to(v, (heads, values["unit_rows"]))
        constants = np.full(heads, own.sum(axis=1, dtype=np.float64))
    arrays = {
        "query": p.query, "key": p.key, "value": p.value, "out": out, "lse": lse, "weights": weights,
    }  # fmt: skip
    for name, x in arrays.items():
        place(values, _WORDS, name, x, "bhs")
    for name, x in (("w_query", problem.w_query), ("w_key", problem.w_key), ("v", v), ("bias", problem.bias)):
        place(values, _WORDS, name, x, "hs")
    place(values, _WORDS, "mask", p.mask, "bhqk")
    for name, x in (("constants", constants), ("offset", p.offset), ("key_lengths", p.key_lengths)):
        place(values, _WORDS, name, x)
    rows = ROW_BYTES // p.value.itemsize
    values |= {
        "mask_same_rows": values.get("mask_q") == 0,
        "queries": p.max_queries,
        "query_dim": query_dim,
        "key_dim": key_dim,
        "value_dim": value_dim,
        "heads": heads,
        "kv_heads": kv_heads,
        "group": heads // kv_heads,
        "blocks": -(-p.max_queries // rows),
        "tiles": -(-p.max_keys // rows),
        "left": p.left,
        "right": p.right,
        "scale": runtime.bits(2.0 * 2.0**power),
        "log2_scale": runtime.bits(2.0 * 2.0**power / math.log(2)),
    }
    return values, (v, constants)


def _sizes(units: int, x_rows: int, value_dim: int, itemsize: int) -> dict[str, int]:
    """The parameters that say how large things are."""
    rows, unit_rows = ROW_BYTES // itemsize, -(-units // GROUP) * GROUP
    hidden_bytes = 2 * unit_rows * ROW_BYTES
    workspace = ROW_BYTES * (x_rows + value_dim + 2 * rows + STATE_ROWS) + 2 * hidden_bytes
    workspace += 8 * (rows * TABLES + WORDS) + rows * value_dim * itemsize
    return {
        "units": units,
        "unit_rows": unit_rows,
        "x_rows": x_rows,
        "hidden_bytes": hidden_bytes,
        "workspace_bytes": -(-workspace // 64) * 64,
    }
