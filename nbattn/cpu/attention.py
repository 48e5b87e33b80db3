"""Tiled attention on explicit vectors: the lanes are queries.

A task is one block of up to `ROW_BYTES / itemsize` queries that share their keys. Scores are kept transposed,
S^T[key, query], so the softmax runs down the lanes without a horizontal step, and both products are the same
register tile: S^T = K Q^T and O^T = V^T P^T, where K and V are read one number at a time as they lie. Beside a
block's Q^T and O^T only one S^T of `KEYS` keys exists. Where memory does not hold the compute dtype, `KEYS`
rows of K and V are widened at a time.

Short queries of one group of heads (grouped-query attention) are packed into one block, so that each key is read
once for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from ..problem import STORAGE_DTYPES, Problem
from . import runtime, simd
from .tiles import ROW_BYTES, product

KEYS = 96
"""Keys of one S^T: 24 KB of scores, which stay in the first-level cache."""
SERIAL_WORK = 1 << 19
"""Multiply-adds below which a call is not worth a second thread."""
LOG2E = math.log2(math.e)

PARAMETERS = np.dtype(
    runtime.WORK
    + [(name, np.int64) for name in (
        "workspace", "workspace_bytes", "workers",
        # addresses, and strides in elements along batch, head and row
        "query", "query_b", "query_h", "query_s", "key", "key_b", "key_h", "key_s",
        "value", "value_b", "value_h", "value_s", "out", "out_b", "out_h", "out_s",
        "lse", "lse_b", "lse_h", "lse_s", "weights", "weights_b", "weights_h", "weights_s",
        # addresses, and strides in bytes along batch, head, query and key
        "mask", "mask_b", "mask_h", "mask_q", "mask_k", "mask_bytes",
        "bias", "bias_b", "bias_h", "bias_q", "bias_k", "bias_kind",
        "alibi_slopes", "sinks", "offset", "key_lengths", "query_starts", "key_starts", "first_task",
        "batch", "queries", "head_dim", "value_dim", "group", "packed_heads", "units", "blocks",
        "left", "right", "plain", "bfloat16_products",
    )]
    + [("scale", np.float64), ("softcap", np.float64)]
)  # fmt: skip

parameters_at = simd.record(PARAMETERS)
get_int, put_int = simd.scalars(types.int64)
get_byte, _ = simd.scalars(types.int8)
get_int16, _ = simd.scalars(types.int16)
get_int32, put_int32 = simd.scalars(types.int32)

NEXT_TASK = PARAMETERS.fields["next_task"][1]  # type: ignore[index]
TASKS_DONE = PARAMETERS.fields["tasks_done"][1]  # type: ignore[index]
WORKERS = PARAMETERS.fields["workers"][1]  # type: ignore[index]


def forward(
    problem: Problem, out: NDArray[Any], lse: NDArray[Any] | None, weights: NDArray[Any] | None
) -> None:
    """Write the attention of `problem` to `out` (B, Hq, Sq, Dv), `lse` (B, Hq, Sq) and `weights` (B, Hq, Sq, Sk)."""
    parameters, keep_alive = _parameters(problem, out, lse, weights)
    tasks = int(parameters["tasks"][0])
    if tasks == 0:
        return
    p = problem
    work = p.batch * p.query.shape[1] * p.max_queries * p.max_keys * (p.query.shape[3] + p.value.shape[3])
    helpers = 0 if work < SERIAL_WORK else min(runtime.threads(), tasks) - 1
    workspace = np.empty((helpers + 1) * int(parameters["workspace_bytes"][0]) + 64, np.uint8)
    parameters["workspace"] = -(-workspace.ctypes.data // 64) * 64
    runtime.run(kernel(f"attention-{problem.storage}"), parameters, helpers, (workspace, keep_alive))


def kernel_names(dtypes: Sequence[str]) -> list[str]:
    """The kernels that calls with these dtypes need."""
    return [f"attention-{dtype}" for dtype in dtypes]


def kernel(name: str) -> Any:
    """The compiled kernel of this name."""
    return runtime.compiled(name, partial(_build, name.partition("-")[2]))


def _parameters(
    p: Problem, out: NDArray[Any], lse: NDArray[Any] | None, weights: NDArray[Any] | None
) -> tuple[NDArray[Any], Any]:
    """The kernel's record, and what must stay alive while it runs."""
    values: dict[str, Any] = {}

    def array(name: str, x: NDArray[Any] | None, axes: str = "", unit: int = 0) -> None:
        if x is None:
            return
        values[name] = x.ctypes.data
        for axis, stride in zip(axes, x.strides, strict=False):
            values[f"{name}_{axis}"] = stride // (unit or x.itemsize)

    array("query", p.query, "bhs")
    array("key", p.key, "bhs")
    array("value", p.value, "bhs")
    array("out", out, "bhs")
    array("lse", lse, "bhs")
    array("weights", weights, "bhs")
    array("mask", p.mask, "bhqk", unit=1)
    array("bias", p.bias, "bhqk", unit=1)
    array("alibi_slopes", p.alibi_slopes)
    array("sinks", p.sinks)
    array("offset", p.offset)
    array("key_lengths", p.key_lengths)
    itemsize = np.dtype(p.compute).itemsize
    rows = ROW_BYTES // itemsize
    heads, head_dim, value_dim = p.query.shape[1], p.query.shape[3], p.value.shape[3]
    group = heads // p.key.shape[1] if heads else 1
    # A block that straddles long heads would see the keys of both.
    packed_heads = group if p.max_queries <= rows // 2 else 1
    units = heads // packed_heads
    first_task = None
    if p.query_starts is None:
        blocks = -(-packed_heads * p.max_queries // rows)
        tasks = p.batch * units * blocks
    else:
        array("query_starts", p.query_starts)
        array("key_starts", p.key_starts)
        each = units * -(-packed_heads * np.diff(p.query_starts) // rows)
        first_task = np.concatenate(([0], np.cumsum(each)))
        array("first_task", first_task)
        blocks, tasks = 0, int(first_task[-1])
    widened = p.storage in ("float16", "bfloat16") or p.bfloat16_products
    scratch = ROW_BYTES * (head_dim + value_dim + KEYS + 7) + rows * 16
    values |= {
        "tasks": tasks,
        "workspace_bytes": -(-(scratch + widened * KEYS * (head_dim + value_dim) * itemsize) // 64) * 64,
        "batch": p.batch,
        "queries": p.max_queries,
        "head_dim": head_dim,
        "value_dim": value_dim,
        "group": group,
        "packed_heads": packed_heads,
        "units": units,
        "blocks": blocks,
        "left": p.left,
        "right": p.right,
        "mask_bytes": 0 if p.mask is None else p.mask.itemsize,
        "bias_kind": 0 if p.bias is None else STORAGE_DTYPES.index(p.bias.dtype.name),
        # With a positive scale the softmax takes the raw products and the scale goes into its exponent.
        "plain": p.scale > 0 and not p.softcap and p.bias is None and p.alibi_slopes is None and p.sinks is None,
        "bfloat16_products": p.bfloat16_products,
        "scale": p.scale,
        "softcap": p.softcap,
    }
    record = np.zeros(1, PARAMETERS)
    for name, value in values.items():
        record[name] = value
    return record, (p, out, lse, weights, first_task)


# --- the kernel ----------------------------------------------------------------------------------------------------


def _build(storage: str, jit: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The kernel for arrays of one storage dtype, as a function of its parameters' address."""
    dtype: Any = np.float64 if storage == "float64" else np.float32
    number = types.float64 if storage == "float64" else types.float32
    size = np.dtype(dtype).itemsize
    stored = 2 if storage in ("float16", "bfloat16") else size
    widens = stored != size
    lanes = simd.lanes(dtype)
    register = simd.REGISTER_BYTES
    rows_per_block = ROW_BYTES // size
    infinity = dtype(np.inf)

    load, store, get, put = simd.loads("float64" if dtype is np.float64 else "float32")
    load_stored, _, get_stored, put_stored = simd.loads(storage)
    get_index, put_index = simd.scalars(types.int64) if size == 8 else simd.scalars(types.int32)
    index = np.int64 if size == 8 else np.int32
    fresh, accumulate = product(jit, number, rescale=False), product(jit, number, rescale=True)
    bias_getters = [simd.loads(kind)[2] for kind in STORAGE_DTYPES]
    fma, mul, sub, add, exp2, greater, splat = (
        simd.fma, simd.mul, simd.sub, simd.add, simd.exp2, simd.greater, simd.splat,
    )  # fmt: skip

    # One block's scratch: q^T (head_dim rows), o^T (value_dim rows), s^T (KEYS rows), then one row each of
    Q_T = 0
    MAXIMUM, TOTAL, RESCALE, FIRST, LAST, SLOPE, POSITION = range(7)

    @jit
    def row(p, w, which):  # type: ignore[no-untyped-def]
        return w + (p.head_dim + p.value_dim + KEYS + which) * ROW_BYTES

    @jit
    def mask_row(p, w, r):  # type: ignore[no-untyped-def]
        return row(p, w, 7) + 8 * r

    @jit
    def bias_row(p, w, r):  # type: ignore[no-untyped-def]
        return row(p, w, 7) + 8 * (rows_per_block + r)

    @jit
    def panel(p, w):  # type: ignore[no-untyped-def]
        return row(p, w, 7) + 16 * rows_per_block

    @jit
    def widen(source, stride, rows, columns, target, rounded):  # type: ignore[no-untyped-def]
        """rows x columns of stored numbers -> contiguous numbers of the compute dtype."""
        for r in range(rows):
            a, t = source + r * stride * stored, target + r * columns * size
            c = 0
            while c + lanes <= columns:
                x = load_stored(a + c * stored)
                store(t + c * size, simd.round_bfloat16(x) if rounded else x)
                c += lanes
            while c < columns:
                y = get_stored(a + c * stored)
                put(t + c * size, simd.round_bfloat16(y) if rounded else y)
                c += 1

    @jit
    def task(p, t):  # type: ignore[no-untyped-def]
        """(sequence, unit of heads, block) of task t; the last blocks come first: causal ones see most keys."""
        if p.first_task == 0:
            b, t = t // (p.units * p.blocks), t % (p.units * p.blocks)
            blocks = p.blocks
        else:
            b = 0
            while get_int(p.first_task + 8 * (b + 1)) <= t:
                b += 1
            first = get_int(p.first_task + 8 * b)
            blocks = (get_int(p.first_task + 8 * (b + 1)) - first) // p.units
            t -= first
        return b, t // blocks, blocks - 1 - t % blocks

    @jit
    def rows_of(p, b):  # type: ignore[no-untyped-def]
        """(first query row, number of queries, first key row) of sequence b."""
        if p.query_starts == 0:
            return 0, p.queries, 0
        start = get_int(p.query_starts + 8 * b)
        return start, get_int(p.query_starts + 8 * (b + 1)) - start, get_int(p.key_starts + 8 * b)

    @jit
    def set_up(p, w, b, unit, row0, rows, queries, start):  # type: ignore[no-untyped-def]
        """Fill q^T and the per-row state; (first, last) key that any row sees, (first, last) that all rows see."""
        pb = 0 if p.query_starts != 0 else b
        offset, length = get_int(p.offset + 8 * b), get_int(p.key_lengths + 8 * b)
        any_first, any_last, all_first, all_last = length, 0, 0, length
        padded = (rows + lanes - 1) // lanes * lanes
        for r in range(padded):
            if r >= rows:
                for d in range(p.head_dim):
                    put(w + d * ROW_BYTES + r * size, dtype(0))
                put_index(row(p, w, FIRST) + r * size, index(0))
                put_index(row(p, w, LAST) + r * size, index(0))
                put(row(p, w, MAXIMUM) + r * size, -infinity)
                put(row(p, w, TOTAL) + r * size, dtype(0))
                put(row(p, w, SLOPE) + r * size, dtype(0))
                put(row(p, w, POSITION) + r * size, dtype(0))
                continue
            h = unit * p.packed_heads + (row0 + r) // queries
            i = (row0 + r) % queries
            a = p.query + (pb * p.query_b + h * p.query_h + (start + i) * p.query_s) * stored
            for d in range(p.head_dim):
                x = get_stored(a + d * stored)
                put(w + d * ROW_BYTES + r * size, simd.round_bfloat16(x) if p.bfloat16_products else x)
            first = min(max(i + offset - p.left, 0), length)
            last = min(max(i + offset + p.right + 1, 0), length)
            if first < last:
                any_first, any_last = min(any_first, first), max(any_last, last)
                all_first, all_last = max(all_first, first), min(all_last, last)
            else:
                first, last, all_last = 0, 0, 0
            put_index(row(p, w, FIRST) + r * size, index(first))
            put_index(row(p, w, LAST) + r * size, index(last))
            put(row(p, w, MAXIMUM) + r * size, -infinity)
            put(row(p, w, TOTAL) + r * size, dtype(0))
            if p.sinks != 0:
                put(row(p, w, MAXIMUM) + r * size, get(p.sinks + h * size))
                put(row(p, w, TOTAL) + r * size, dtype(1))
            put(row(p, w, SLOPE) + r * size, get(p.alibi_slopes + h * size) if p.alibi_slopes != 0 else dtype(0))
            put(row(p, w, POSITION) + r * size, dtype(i + offset))
            put_int(mask_row(p, w, r), p.mask + b * p.mask_b + h * p.mask_h + i * p.mask_q)
            put_int(bias_row(p, w, r), p.bias + b * p.bias_b + h * p.bias_h + i * p.bias_q)
        return any_first, any_last, all_first, all_last

    @jit
    def scale_and_cap(p, s, keys, vectors):  # type: ignore[no-untyped-def]
        if p.softcap == 0:
            scale = splat(dtype(p.scale))
            for j in range(keys):
                for v in range(vectors):
                    a = s + j * ROW_BYTES + v * register
                    store(a, mul(load(a), scale))
            return
        inner, cap = splat(dtype(p.scale / p.softcap)), splat(dtype(p.softcap))
        for j in range(keys):
            for v in range(vectors):
                a = s + j * ROW_BYTES + v * register
                store(a, mul(cap, simd.tanh(mul(load(a), inner))))

    @jit
    def add_alibi(p, w, s, key0, keys, vectors):  # type: ignore[no-untyped-def]
        for v in range(vectors):
            slope, position = load(row(p, w, SLOPE) + v * register), load(row(p, w, POSITION) + v * register)
            for j in range(keys):
                a = s + j * ROW_BYTES + v * register
                store(a, fma(slope, sub(splat(dtype(key0 + j)), position), load(a)))

    def bias_adder(read: Any) -> Any:
        @jit
        def add_bias(p, w, s, key0, keys, rows):  # type: ignore[no-untyped-def]
            for r in range(rows):
                a = get_int(bias_row(p, w, r)) + key0 * p.bias_k
                for j in range(keys):
                    x = dtype(read(a + j * p.bias_k))
                    t = s + j * ROW_BYTES + r * size
                    # A bias of -inf masks, also a NaN.
                    put(t, -infinity if x == -infinity else get(t) + x)

        return add_bias

    add_float32, add_float64, add_float16, add_bfloat16 = (bias_adder(read) for read in bias_getters)
    bias32, bias64, bias16, biasb16 = bias_getters

    @jit
    def masked(p, a):  # type: ignore[no-untyped-def]
        """Whether the mask's element at an address says no."""
        if p.mask_bytes == 1:
            return get_byte(a) == 0
        if p.mask_bytes == 2:
            return get_int16(a) == 0
        return get_int32(a) == 0 if p.mask_bytes == 4 else get_int(a) == 0

    @jit
    def apply_mask(p, w, s, key0, keys, rows):  # type: ignore[no-untyped-def]
        for r in range(rows):
            a = get_int(mask_row(p, w, r)) + key0 * p.mask_k
            for j in range(keys):
                if masked(p, a + j * p.mask_k):
                    put(s + j * ROW_BYTES + r * size, -infinity)

    @jit
    def scores(p, w, key, key0, keys, rows, vectors, all_first, all_last):  # type: ignore[no-untyped-def]
        """s^T of one run of keys, with everything that changes a score."""
        s = w + (p.head_dim + p.value_dim) * ROW_BYTES
        a, stride = key + key0 * p.key_s * stored, p.key_s
        if widens or p.bfloat16_products:
            widen(a, stride, keys, p.head_dim, panel(p, w), p.bfloat16_products)
            a, stride = panel(p, w), p.head_dim
        fresh(a, stride, 1, keys, w, s, vectors, p.head_dim, 0)
        if not p.plain:
            scale_and_cap(p, s, keys, vectors)
            if p.bias != 0:
                if p.bias_kind == 0:
                    add_float32(p, w, s, key0, keys, rows)
                elif p.bias_kind == 1:
                    add_float64(p, w, s, key0, keys, rows)
                elif p.bias_kind == 2:
                    add_float16(p, w, s, key0, keys, rows)
                else:
                    add_bfloat16(p, w, s, key0, keys, rows)
            if p.alibi_slopes != 0:
                add_alibi(p, w, s, key0, keys, vectors)
        if p.mask != 0:
            apply_mask(p, w, s, key0, keys, rows)
        if key0 < all_first or key0 + keys > all_last:
            for v in range(vectors):
                first, last = row(p, w, FIRST) + v * register, row(p, w, LAST) + v * register
                for j in range(keys):
                    t = s + j * ROW_BYTES + v * register
                    store(t, simd.outside(load(t), key0 + j, first, last))

    @jit
    def soften(p, w, keys, vectors, factor):  # type: ignore[no-untyped-def]
        """s^T -> unnormalised weights; moves the running maximum and total, leaves the factor for older sums."""
        s = w + (p.head_dim + p.value_dim) * ROW_BYTES
        to_log2 = splat(factor)
        for v in range(vectors):
            c = v * register
            before = load(row(p, w, MAXIMUM) + c)
            top = before
            for j in range(keys):
                top = greater(load(s + j * ROW_BYTES + c), top)
            zero_point = simd.finite_or_zero(top)
            rescale = exp2(mul(sub(before, zero_point), to_log2))
            total = mul(load(row(p, w, TOTAL) + c), rescale)
            for j in range(keys):
                x = exp2(mul(sub(load(s + j * ROW_BYTES + c), zero_point), to_log2))
                total = add(total, x)
                store(s + j * ROW_BYTES + c, simd.round_bfloat16(x) if p.bfloat16_products else x)
            store(row(p, w, MAXIMUM) + c, top)
            store(row(p, w, TOTAL) + c, total)
            store(row(p, w, RESCALE) + c, rescale)

    @jit
    def visible(p, w, r, j):  # type: ignore[no-untyped-def]
        """Whether row r of the block sees key j."""
        if j < get_index(row(p, w, FIRST) + r * size) or j >= get_index(row(p, w, LAST) + r * size):
            return False
        if p.mask != 0 and masked(p, get_int(mask_row(p, w, r)) + j * p.mask_k):
            return False
        if p.bias == 0:
            return True
        a = get_int(bias_row(p, w, r)) + j * p.bias_k
        if p.bias_kind == 0:
            return bias32(a) != -np.inf
        if p.bias_kind == 1:
            return bias64(a) != -np.inf
        return (bias16(a) if p.bias_kind == 2 else biasb16(a)) != -np.inf

    @jit
    def add_values(p, w, value, key0, keys, rows, vectors, careful):  # type: ignore[no-untyped-def]
        """o^T = o^T * rescale + v^T p^T"""
        o = w + p.head_dim * ROW_BYTES
        s = o + p.value_dim * ROW_BYTES
        a, stride = value + key0 * p.value_s * stored, p.value_s
        if widens or p.bfloat16_products:
            target = panel(p, w) + KEYS * p.head_dim * size
            widen(a, stride, keys, p.value_dim, target, p.bfloat16_products)
            a, stride = target, p.value_dim
        if not careful:
            accumulate(a, 1, stride, p.value_dim, s, o, vectors, keys, row(p, w, RESCALE))
            return
        for r in range(rows):
            rescale = get(row(p, w, RESCALE) + r * size)
            for d in range(p.value_dim):
                t = o + d * ROW_BYTES + r * size
                put(t, get(t) * rescale)
            for j in range(keys):
                if visible(p, w, r, key0 + j):
                    x = get(s + j * ROW_BYTES + r * size)
                    for d in range(p.value_dim):
                        t = o + d * ROW_BYTES + r * size
                        put(t, get(t) + x * get(a + (j * stride + d) * size))

    @jit
    def write_weights(p, w, b, unit, row0, rows, queries, key0, keys, factor):  # type: ignore[no-untyped-def]
        s = w + (p.head_dim + p.value_dim) * ROW_BYTES
        for r in range(rows):
            h, i = unit * p.packed_heads + (row0 + r) // queries, (row0 + r) % queries
            a = p.weights + (b * p.weights_b + h * p.weights_h + i * p.weights_s + key0) * size
            total = get(row(p, w, TOTAL) + r * size)
            top = simd.finite_or_zero(get(row(p, w, MAXIMUM) + r * size))
            for j in range(keys):
                x = exp2((get(s + j * ROW_BYTES + r * size) - top) * factor)
                put(a + j * size, x / total if total != 0 else dtype(0))

    @jit
    def finish(p, w, b, unit, row0, rows, queries, start):  # type: ignore[no-untyped-def]
        """o^T / total -> out, and lse."""
        pb = 0 if p.query_starts != 0 else b
        o = w + p.head_dim * ROW_BYTES
        for r in range(rows):
            h, i = unit * p.packed_heads + (row0 + r) // queries, (row0 + r) % queries
            total = get(row(p, w, TOTAL) + r * size)
            a = p.out + (pb * p.out_b + h * p.out_h + (start + i) * p.out_s) * stored
            inverse = dtype(0) if total == 0 else dtype(1) / total
            for d in range(p.value_dim):
                put_stored(a + d * stored, get(o + d * ROW_BYTES + r * size) * inverse)
            if p.lse != 0:
                a = p.lse + (pb * p.lse_b + h * p.lse_h + (start + i) * p.lse_s) * size
                top = np.float64(get(row(p, w, MAXIMUM) + r * size))
                if p.plain:
                    top *= p.scale
                put(a, -infinity if total == 0 else dtype(top + math.log(np.float64(total))))

    @jit
    def all_finite(p, w, rows):  # type: ignore[no-untyped-def]
        o = w + p.head_dim * ROW_BYTES
        for d in range(p.value_dim):
            for r in range(rows):
                x = get(o + d * ROW_BYTES + r * size)
                if x - x != 0:
                    return False
        return True

    @jit
    def block(p, w, b, unit, number):  # type: ignore[no-untyped-def]
        start, queries, key_start = rows_of(p, b)
        row0 = number * rows_per_block
        rows = min(rows_per_block, p.packed_heads * queries - row0)
        vectors = (rows + lanes - 1) // lanes
        pb = 0 if p.query_starts != 0 else b
        shared = unit * p.packed_heads // p.group
        key = p.key + (pb * p.key_b + shared * p.key_h + key_start * p.key_s) * stored
        value = p.value + (pb * p.value_b + shared * p.value_h + key_start * p.value_s) * stored
        factor = dtype(p.scale * LOG2E) if p.plain else dtype(LOG2E)
        careful = False
        while True:
            any_first, any_last, all_first, all_last = set_up(p, w, b, unit, row0, rows, queries, start)
            zero = splat(dtype(0))
            for d in range(p.value_dim):
                for v in range(vectors):
                    store(w + (p.head_dim + d) * ROW_BYTES + v * register, zero)
            for key0 in range(any_first, any_last, KEYS):
                keys = min(KEYS, any_last - key0)
                scores(p, w, key, key0, keys, rows, vectors, all_first, all_last)
                soften(p, w, keys, vectors, factor)
                add_values(p, w, value, key0, keys, rows, vectors, careful)
            # A non-finite value meets a weight of 0 where it is masked, and 0 * inf is NaN. It shows in the sums:
            # only then the block is done again, with every masked value left out.
            if careful or all_finite(p, w, rows):
                break
            careful = True
        finish(p, w, b, unit, row0, rows, queries, start)
        if p.weights != 0:
            for key0 in range(any_first, any_last, KEYS):
                keys = min(KEYS, any_last - key0)
                scores(p, w, key, key0, keys, rows, vectors, all_first, all_last)
                write_weights(p, w, b, unit, row0, rows, queries, key0, keys, factor)

    def attend(address):  # type: ignore[no-untyped-def]
        p = parameters_at(address)
        w = p.workspace + simd.fetch_add(address + WORKERS) * p.workspace_bytes
        finished_last = 0
        while True:
            t = simd.fetch_add(address + NEXT_TASK)
            if t >= p.tasks:
                return finished_last
            b, unit, number = task(p, t)
            block(p, w, b, unit, number)
            if simd.fetch_add(address + TASKS_DONE) + 1 == p.tasks:
                finished_last = 1

    return attend
