"""Luong's attention on the CPU: what the other kernels do, and one for windows around predicted positions.

Each row of such a window has keys of its own, few of them, so the lanes are numbers of a head: a key's score
is a sum over vectors, and a key that the row does not see is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from ..additive import AdditiveProblem
from ..luong import LuongProblem
from ..problem import Problem
from ..reference.luong import positions
from . import additive, attention, emitters, runtime, simd, team
from .additive import project
from .records import packed, place, words_of

ROWS = 16
"""Rows of a task."""
SERIAL_WORK = 1 << 18
"""Multiply-adds below which a call is not worth a second thread."""

PARAMETERS = np.dtype(
    runtime.WORK
    + [(name, np.int64) for name in (
        "workspace", "workspace_bytes", "workers",
        # addresses, and strides in elements along batch, head and row
        "query", "query_b", "query_h", "query_s", "key", "key_b", "key_h", "key_s",
        "value", "value_b", "value_h", "value_s", "out", "out_b", "out_h", "out_s",
        "lse", "lse_b", "lse_h", "lse_s", "weights", "weights_b", "weights_h", "weights_s",
        "centers", "centers_b", "centers_h", "centers_s", "v",
        # address, and strides in bytes along batch, head, query and key
        "mask", "mask_b", "mask_h", "mask_q", "mask_k",
        "offset", "key_lengths", "queries", "head_dim", "value_dim", "heads", "group", "blocks", "width",
        "left", "right", "columns",
    )]
)  # fmt: skip
_WORDS = words_of(PARAMETERS)
NEXT_TASK, TASKS_DONE, WORKERS = (8 * _WORDS[name] for name in ("next_task", "tasks_done", "workers"))

parameters_at = simd.record(PARAMETERS)


def forward(
    problem: LuongProblem, out: NDArray[Any], lse: NDArray[Any] | None, weights: NDArray[Any] | None
) -> None:
    """Write attention to `out` (B, Hq, Sq, Dv), `lse` (B, Hq, Sq) and `weights` (B, Hq, Sq, Sk)."""
    p, weight = problem.attention, problem.weight
    if out.size == 0:
        return
    columns = p.query.shape[3]
    if problem.score == "concat" and weight is not None and problem.v is not None:
        w_query, w_key = weight[:, :columns], weight[:, columns:]
        if problem.position is None:
            heads, kv_heads = p.query.shape[1], p.key.shape[1]
            v = np.broadcast_to(problem.v, (heads, len(problem.v)))
            for_queries = np.broadcast_to(w_query, (heads, *w_query.shape))
            for_keys = np.broadcast_to(w_key, (kv_heads, *w_key.shape))
            additive.forward(AdditiveProblem(p, for_queries, for_keys, v, None), out, lse, weights)
            return
        inner = replace(p, query=project(p.query, w_query), key=project(p.key, w_key))
    elif problem.score == "general" and weight is not None:
        inner = replace(p, query=project(p.query, np.ascontiguousarray(weight.T)))
    elif problem.score == "location" and weight is not None:
        inner = replace(p, key=np.broadcast_to(weight[: p.max_keys], (*p.key.shape[:3], columns)))
    else:
        inner = p
    if problem.position is None:
        attention.forward(inner, out, lse, weights)
        return
    width, w, v = problem.position
    with np.errstate(all="ignore"):
        centers = positions(project(p.query, w), v, p.key_lengths[:, None, None])
    _forward_near(inner, centers, width, problem.v, out, lse, weights)


def kernel_names(dtypes: Sequence[str]) -> list[str]:
    """The kernels that calls with these dtypes need."""
    return [name.replace("additive", "luong") for name in additive.kernel_names(dtypes)]


def kernel(name: str) -> Any:
    """The compiled kernel of this name."""
    return runtime.compiled(name, partial(_build, name.partition("-")[2]))


def _forward_near(
    p: Problem,
    centers: NDArray[Any],
    width: int,
    v: NDArray[Any] | None,
    out: NDArray[Any],
    lse: NDArray[Any] | None,
    weights: NDArray[Any] | None,
) -> None:
    """Attend around `centers` (B, Hq, Sq); scores are ``q . k``, or ``v . tanh(q + k)`` with v."""
    heads, head_dim = p.query.shape[1], p.query.shape[3]
    value_dim, itemsize = p.value.shape[3], p.value.itemsize
    blocks = -(-p.max_queries // ROWS)
    columns = -(-p.max_keys * itemsize // 64) * 64 + 64  # and one vector more
    values = {
        "tasks": p.batch * heads * blocks,
        "columns": columns,
        "workspace_bytes": 2 * columns + -(-p.max_keys // 8) * 64,
        "queries": p.max_queries,
        "head_dim": head_dim,
        "value_dim": value_dim,
        "heads": heads,
        "group": heads // p.key.shape[1],
        "blocks": blocks,
        "width": width,
        "left": p.left,
        "right": p.right,
    }
    arrays = {
        "query": p.query, "key": p.key, "value": p.value, "out": out, "lse": lse, "weights": weights,
        "centers": centers,
    }  # fmt: skip
    for name, x in arrays.items():
        place(values, _WORDS, name, x, "bhs")
    place(values, _WORDS, "mask", p.mask, "bhqk")
    for name, x in (("v", v), ("offset", p.offset), ("key_lengths", p.key_lengths)):
        place(values, _WORDS, name, x)
    work = out[..., 0].size * min(p.max_keys, 2 * width + 1) * (head_dim + value_dim)
    helpers = 0 if work < SERIAL_WORK else min(runtime.threads(), values["tasks"]) - 1
    memory, values["workspace"] = runtime.scratch((helpers + 1) * values["workspace_bytes"])
    words = packed(values, _WORDS)
    team.run(kernel(f"luong-{p.storage}"), words, helpers, (p, centers, v, out, lse, weights, memory))
    runtime.keep(memory)


# --- the kernel ---------------------------------------------------------------------------------------------


def _build(storage: str, jit: Any, inline: Any) -> Callable[[Any], Any]:
    """The kernel for float32 or float64, as a function of its parameters' address."""
    dtype: Any = np.float64 if storage == "float64" else np.float32
    size = np.dtype(dtype).itemsize
    lanes = simd.lanes(dtype)
    register = emitters.REGISTER_BYTES
    load, store, get, put = simd.loads(storage)
    get_int, put_int = simd.scalars(types.int64)
    get_byte, _ = simd.scalars(types.int8)
    add, sub, mul, div, fma, splat = simd.add, simd.sub, simd.mul, simd.div, simd.fma, simd.splat

    @jit
    def put_score(p, q, k, s):
        """q . k, or v . tanh(q + k) -> s, and anything in the rest of a vector there."""
        whole = p.head_dim // lanes * lanes
        total, rest = splat(dtype(0)), dtype(0)
        if p.v == 0:
            for d in range(0, whole, lanes):
                total = fma(load(q + d * size), load(k + d * size), total)
            for d in range(whole, p.head_dim):
                rest += get(q + d * size) * get(k + d * size)
        else:
            for d in range(0, whole, lanes):
                hidden = simd.tanh(add(load(q + d * size), load(k + d * size)))
                total = fma(load(p.v + d * size), hidden, total)
            for d in range(whole, p.head_dim):
                rest += get(p.v + d * size) * simd.tanh(get(q + d * size) + get(k + d * size))
        store(s, simd.across_sum(total))
        put(s, get(s) + rest)

    @jit
    def find(p, w, b, h, i, center):
        """Score the keys that the row sees; how many there are. Tables hold their scores, what the Gaussian
        is an exponential of, and their positions."""
        position, length = i + get_int(p.offset + 8 * b), get_int(p.key_lengths + 8 * b)
        first, last = max(position - p.left, 0), min(position + p.right + 1, length)
        width = dtype(p.width)
        if center == center:  # a position that is NaN is near to all keys, so that the NaN shows
            middle = int(center)
            first, last = max(first, middle - p.width - 1), min(last, middle + p.width + 2)
        q = p.query + (b * p.query_b + h * p.query_h + i * p.query_s) * size
        k = p.key + (b * p.key_b + h // p.group * p.key_h) * size
        mask = p.mask + b * p.mask_b + h * p.mask_h + i * p.mask_q
        count = 0
        for j in range(first, last):
            distance = dtype(j) - center
            if distance > width or distance < -width or (p.mask != 0 and get_byte(mask + j * p.mask_k) == 0):
                continue
            put_score(p, q, k + j * p.key_s * size, w + count * size)
            distance /= width
            put(w + p.columns + count * size, -2 * distance * distance)
            put_int(w + 2 * p.columns + 8 * count, j)
            count += 1
        store(w + count * size, splat(-dtype(np.inf)))
        return count

    @jit
    def add_values(p, value, out, table, shares, count):
        """shares @ values -> out"""
        c = 0
        while c < p.value_dim:
            a, t = value + c * size, out + c * size
            if p.value_dim - c >= 4 * lanes:
                x0 = x1 = x2 = x3 = splat(dtype(0))
                for j in range(count):
                    x, y = splat(get(shares + j * size)), a + get_int(table + 8 * j) * p.value_s * size
                    x0, x1 = fma(x, load(y), x0), fma(x, load(y + register), x1)
                    x2, x3 = fma(x, load(y + 2 * register), x2), fma(x, load(y + 3 * register), x3)
                store(t, x0)
                store(t + register, x1)
                store(t + 2 * register, x2)
                store(t + 3 * register, x3)
                c += 4 * lanes
            elif p.value_dim - c >= lanes:
                x0 = splat(dtype(0))
                for j in range(count):
                    y = a + get_int(table + 8 * j) * p.value_s * size
                    x0 = fma(splat(get(shares + j * size)), load(y), x0)
                store(t, x0)
                c += lanes
            else:
                total = dtype(0)
                for j in range(count):
                    total += get(shares + j * size) * get(a + get_int(table + 8 * j) * p.value_s * size)
                put(t, total)
                c += 1

    @jit
    def row(p, w, b, h, i):
        center = get(p.centers + (b * p.centers_b + h * p.centers_h + i * p.centers_s) * size)
        count = find(p, w, b, h, i, center)
        top = splat(-dtype(np.inf))
        for j in range(0, count, lanes):
            top = simd.greater(load(w + j * size), top)
        top = simd.across_max(top)
        zero_point = simd.finite_or_zero(top)
        total = splat(dtype(0))
        for j in range(0, count, lanes):
            x = simd.exp(sub(load(w + j * size), zero_point))
            total = add(total, x)
            store(w + j * size, x)
        total = simd.across_sum(total)
        table = w + 2 * p.columns
        for j in range(0, count, lanes):
            share = div(load(w + j * size), total)
            store(w + j * size, mul(share, simd.exp(load(w + p.columns + j * size))))
        if p.weights != 0:
            weights = p.weights + (b * p.weights_b + h * p.weights_h + i * p.weights_s) * size
            for j in range(count):
                put(weights + get_int(table + 8 * j) * size, get(w + j * size))
        value = p.value + (b * p.value_b + h // p.group * p.value_h) * size
        add_values(p, value, p.out + (b * p.out_b + h * p.out_h + i * p.out_s) * size, table, w, count)
        if p.lse != 0:
            store(w, add(zero_point, simd.log(total)))
            put(p.lse + (b * p.lse_b + h * p.lse_h + i * p.lse_s) * size, get(w))

    def work(address):
        p = parameters_at(address)
        w = p.workspace + simd.fetch_add(address + WORKERS) * p.workspace_bytes
        finished_last = 0
        while True:
            t = simd.fetch_add(address + NEXT_TASK)
            if t >= p.tasks:
                return finished_last
            head, start = t // p.blocks, t % p.blocks * ROWS
            for i in range(start, min(start + ROWS, p.queries)):
                row(p, w, head // p.heads, head % p.heads, i)
            if simd.fetch_add(address + TASKS_DONE) + 1 == p.tasks:
                finished_last = 1

    return work
