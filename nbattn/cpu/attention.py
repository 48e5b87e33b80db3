"""Tiled attention on explicit vectors: the lanes are queries.

A task is one block of up to `ROW_BYTES / itemsize` queries that share their keys. Scores are kept transposed,
S^T[key, query], so the softmax runs down the lanes without a horizontal step, and both products are the same
register tile: S^T = K Q^T and O^T = V^T P^T, where K and V are read one number at a time. Beside a block's Q^T
and O^T only one S^T of `KEYS` keys exists. K and V are read as they lie where memory holds what the tile
multiplies; else `KEYS` rows at a time are converted into panels, which serve all blocks of a head.

Short queries of one group of heads (grouped-query attention) are packed into one block, so that each key is
read once for all of them.
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
from . import panels, runtime, scores, simd
from .tiles import ROW_BYTES, product

KEYS = 128
"""Keys of one S^T: 32 KB of scores. Fewer pay more for the sums' way in and out of registers, more leave the cache."""
PANEL_BYTES = 4 << 20
"""Converted keys and values that one thread keeps."""
SERIAL_WORK = 1 << 19
"""Multiply-adds below which a call is not worth a second thread."""
LOG2E = math.log2(math.e)
STATE_ROWS = 7
"""Rows of per-query numbers in a block's scratch."""
TABLES = 4
"""Tables of per-query addresses."""

PARAMETERS = np.dtype(
    runtime.WORK
    + [(name, np.int64) for name in (
        "workspace", "workspace_bytes", "workers",
        # addresses, and strides in elements along batch, head and row
        "query", "query_b", "query_h", "query_s", "key", "key_b", "key_h", "key_s",
        "value", "value_b", "value_h", "value_s", "out", "out_b", "out_h", "out_s",
        "lse", "lse_b", "lse_h", "lse_s", "weights", "weights_b", "weights_h", "weights_s",
        # addresses, and strides in bytes along batch, head, query and key
        "mask", "mask_b", "mask_h", "mask_q", "mask_k", "mask_bytes", "mask_same_rows",
        "bias", "bias_b", "bias_h", "bias_q", "bias_k", "bias_kind", "bias_same_rows",
        "alibi_slopes", "sinks", "offset", "key_lengths", "query_starts", "key_starts", "first_task",
        "batch", "queries", "head_dim", "value_dim", "group", "packed_heads", "units", "blocks",
        "left", "right", "plain", "slots", "slot_bytes", "key_panel_bytes", "key_tiles",
    )]
    + [("scale", np.float64), ("softcap", np.float64)]
)  # fmt: skip

parameters_at = simd.record(PARAMETERS)

NEXT_TASK = PARAMETERS.fields["next_task"][1]  # type: ignore[index]
TASKS_DONE = PARAMETERS.fields["tasks_done"][1]  # type: ignore[index]
WORKERS = PARAMETERS.fields["workers"][1]  # type: ignore[index]


def forward(
    problem: Problem, out: NDArray[Any], lse: NDArray[Any] | None, weights: NDArray[Any] | None
) -> None:
    """Write the attention of `problem` to `out` (B, Hq, Sq, Dv), `lse` (B, Hq, Sq), `weights` (B, Hq, Sq, Sk)."""
    parameters, keep_alive = _parameters(problem, out, lse, weights)
    tasks = int(parameters["tasks"][0])
    if tasks == 0:
        return
    p = problem
    work = p.batch * p.query.shape[1] * p.max_queries * p.max_keys * (p.query.shape[3] + p.value.shape[3])
    helpers = 0 if work < SERIAL_WORK else min(runtime.threads(), tasks) - 1
    workspace = np.empty((helpers + 1) * int(parameters["workspace_bytes"][0]) + 64, np.uint8)
    parameters["workspace"] = -(-workspace.ctypes.data // 64) * 64
    name = f"attention-{p.storage}" + ("-bfloat16" if p.bfloat16_products else "")
    runtime.run(kernel(name), parameters, helpers, (workspace, keep_alive))


def kernel_names(dtypes: Sequence[str]) -> list[str]:
    """The kernels that calls with these dtypes need."""
    return [f"attention-{dtype}" for dtype in dtypes]


def kernel(name: str) -> Any:
    """The compiled kernel of this name: "attention-" and the storage dtype, "-bfloat16" for its products."""
    _, storage, *products = name.split("-")
    return runtime.compiled(name, partial(_build, storage, bool(products)))


def _multiplies(storage: str, bfloat16_products: bool) -> str:
    """What the register tiles multiply: "float32", "float64", or "pairs" of bfloat16."""
    if simd.PAIRS and (storage == "bfloat16" or bfloat16_products):
        return "pairs"
    return "float64" if storage == "float64" else "float32"


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
    multiplies = _multiplies(p.storage, p.bfloat16_products)
    # A panel holds KEYS rows of numbers, or half as many of words; keys that are stored as pairs need none.
    per_panel = KEYS // 2 if multiplies == "pairs" else KEYS
    as_stored = multiplies == p.storage and not p.bfloat16_products
    words = multiplies == "pairs" and p.storage == "bfloat16" and head_dim % 2 == 0 and values["key_s"] % 2 == 0
    key_panel = 0 if as_stored or words else KEYS * (-(-head_dim // 2) if multiplies == "pairs" else head_dim)
    value_panel = 0 if as_stored else per_panel * value_dim
    slot_bytes = -(-(key_panel + value_panel) * itemsize // 64) * 64
    slots = min(-(-p.max_keys // KEYS), max(1, PANEL_BYTES // slot_bytes)) if slot_bytes else 0
    scratch = ROW_BYTES * (head_dim + value_dim + KEYS + STATE_ROWS) + rows * 8 * TABLES + 64 * -(-slots // 8)
    values |= {
        "tasks": tasks,
        "workspace_bytes": scratch + slots * slot_bytes,
        "slots": slots,
        "slot_bytes": slot_bytes,
        "key_panel_bytes": key_panel * itemsize,
        "key_tiles": -(-p.max_keys // KEYS),
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
        "scale": p.scale,
        "softcap": p.softcap,
    }
    for name in ("mask", "bias"):
        same_heads = packed_heads == 1 or values.get(f"{name}_h") == 0
        values[f"{name}_same_rows"] = same_heads and values.get(f"{name}_q") == 0
    record = np.zeros(1, PARAMETERS)
    for name, value in values.items():
        record[name] = value
    return record, (p, out, lse, weights, first_task)


# --- the kernel ---------------------------------------------------------------------------------------------


def _build(storage: str, bfloat16_products: bool, jit: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The kernel for arrays of one storage dtype, as a function of its parameters' address."""
    multiplies = _multiplies(storage, bfloat16_products)
    pairs = multiplies == "pairs"
    rounds = bfloat16_products and not pairs  # operands rounded to bfloat16, multiplied as float32
    converts = multiplies != storage or rounds
    dtype: Any = np.float64 if storage == "float64" else np.float32
    number = types.float64 if storage == "float64" else types.float32
    size = np.dtype(dtype).itemsize
    stored = 2 if storage in ("float16", "bfloat16") else size
    lanes = simd.lanes(dtype)
    register = simd.REGISTER_BYTES
    block_rows = ROW_BYTES // size
    infinity = dtype(np.inf)

    load, store, get, put = simd.loads("float64" if size == 8 else "float32")
    load_stored, _, get_stored, put_stored = simd.loads(storage)
    get_int, put_int = simd.scalars(types.int64)
    get_int32, _ = simd.scalars(types.int32)
    put_index = simd.scalars(types.int64 if size == 8 else types.int32)[1]
    index = np.int64 if size == 8 else np.int32
    fresh = product(jit, number, rescale=False, pairs=pairs)
    accumulate = product(jit, number, rescale=True, pairs=pairs)
    adjust, visible = scores.build(jit, dtype)
    read_square, read_words = panels.rows_in(lanes, storage), panels.words_in(lanes)
    write_square = panels.rows_out(lanes, storage)
    pack, pack_vectors = panels.pairs(vector=False), panels.pairs(vector=True)
    bfloat16_at = simd.loads("bfloat16")[2]
    mul, sub, add, exp2, greater, splat = simd.mul, simd.sub, simd.add, simd.exp2, simd.greater, simd.splat
    as_operand = simd.round_bfloat16 if rounds else simd.same

    # A block's scratch: q^T (head_dim rows), o^T (value_dim), s^T (KEYS), one row of each of these, four tables of
    # addresses, the panels' tags, the panels.
    MAXIMUM, TOTAL, RESCALE, FIRST, LAST, SLOPE, POSITION = range(STATE_ROWS)
    QUERY, OUT, MASK, BIAS = range(TABLES)

    @jit
    def row(p, w, which):  # type: ignore[no-untyped-def]
        return w + (p.head_dim + p.value_dim + KEYS + which) * ROW_BYTES

    @jit
    def table(p, w, which):  # type: ignore[no-untyped-def]
        return row(p, w, STATE_ROWS) + which * block_rows * 8

    @jit
    def state_of(p, w):  # type: ignore[no-untyped-def]
        return scores.State(row(p, w, FIRST), row(p, w, LAST), row(p, w, SLOPE), row(p, w, POSITION),
                            table(p, w, MASK), table(p, w, BIAS))  # fmt: skip

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
        """Fill the per-row state; (first, last) key that any row sees, (first, last) that all rows see.

        Lanes beyond the last row repeat it.
        """
        pb = 0 if p.query_starts != 0 else b
        offset, length = get_int(p.offset + 8 * b), get_int(p.key_lengths + 8 * b)
        any_first, any_last, all_first, all_last = length, 0, 0, length
        h, i = unit * p.packed_heads + row0 // queries, row0 % queries
        for r in range((rows + lanes - 1) // lanes * lanes):
            first = min(max(i + offset - p.left, 0), length)
            last = min(max(i + offset + p.right + 1, 0), length)
            if first < last:
                any_first, any_last = min(any_first, first), max(any_last, last)
                all_first, all_last = max(all_first, first), min(all_last, last)
            else:
                first, last, all_last = 0, 0, 0
            put_index(row(p, w, FIRST) + r * size, index(first))
            put_index(row(p, w, LAST) + r * size, index(last))
            put(row(p, w, MAXIMUM) + r * size, get(p.sinks + h * size) if p.sinks != 0 else -infinity)
            put(row(p, w, TOTAL) + r * size, dtype(1) if p.sinks != 0 else dtype(0))
            put(row(p, w, SLOPE) + r * size, get(p.alibi_slopes + h * size) if p.alibi_slopes != 0 else dtype(0))
            put(row(p, w, POSITION) + r * size, dtype(i + offset))
            query = p.query + (pb * p.query_b + h * p.query_h + (start + i) * p.query_s) * stored
            put_int(table(p, w, QUERY) + 8 * r, query)
            put_int(table(p, w, OUT) + 8 * r, p.out + (pb * p.out_b + h * p.out_h + (start + i) * p.out_s) * stored)
            put_int(table(p, w, MASK) + 8 * r, p.mask + b * p.mask_b + h * p.mask_h + i * p.mask_q)
            put_int(table(p, w, BIAS) + 8 * r, p.bias + b * p.bias_b + h * p.bias_h + i * p.bias_q)
            if r < rows - 1:
                i += 1
                if i == queries:
                    h, i = h + 1, 0
        # A start at a multiple of 16 keeps pairs of keys together.
        return any_first // 16 * 16, any_last, all_first, all_last

    @jit
    def transpose_queries(p, w, vectors):  # type: ignore[no-untyped-def]
        """q^T: numbers, or words of two numbers that lie side by side."""
        queries = table(p, w, QUERY)
        if pairs:
            as_words = p.head_dim // 2 if storage == "bfloat16" else 0
            whole = as_words // lanes * lanes
            for v in range(vectors):
                for c in range(0, whole, lanes):
                    read_words(queries + v * lanes * 8, c * 4, w + c * ROW_BYTES + v * register)
            for r in range(vectors * lanes):
                a = get_int(queries + 8 * r)
                for c in range(whole, (p.head_dim + 1) // 2):
                    high = get_stored(a + (2 * c + 1) * stored) if 2 * c + 1 < p.head_dim else dtype(0)
                    pack(w + c * ROW_BYTES + r * size, get_stored(a + 2 * c * stored), high)
            return
        whole = p.head_dim // lanes * lanes
        for v in range(vectors):
            for c in range(0, whole, lanes):
                read_square(queries + v * lanes * 8, c * stored, w + c * ROW_BYTES + v * register)
        for r in range(vectors * lanes if whole < p.head_dim else 0):
            a = get_int(queries + 8 * r)
            for c in range(whole, p.head_dim):
                put(w + c * ROW_BYTES + r * size, get_stored(a + c * stored))
        if rounds:
            for c in range(p.head_dim):
                for v in range(vectors):
                    a = w + c * ROW_BYTES + v * register
                    store(a, as_operand(load(a)))

    @jit
    def convert(source, stride, rows, columns, target):  # type: ignore[no-untyped-def]
        """rows x columns of stored numbers -> contiguous numbers that the tiles multiply."""
        for r in range(rows):
            a, t = source + r * stride * stored, target + r * columns * size
            whole = columns // lanes * lanes
            for c in range(0, whole, lanes):
                store(t + c * size, as_operand(load_stored(a + c * stored)))
            for c in range(whole, columns):
                put(t + c * size, as_operand(get_stored(a + c * stored)))

    @jit
    def pair_columns(source, stride, rows, columns, target):  # type: ignore[no-untyped-def]
        """rows x columns -> words of two columns that lie side by side."""
        for r in range(rows):
            a, t = source + r * stride * stored, target + r * ((columns + 1) // 2) * size
            for c in range(0, columns, 2):
                high = get_stored(a + (c + 1) * stored) if c + 1 < columns else dtype(0)
                pack(t + c // 2 * size, get_stored(a + c * stored), high)

    @jit
    def pair_rows(source, stride, rows, columns, target):  # type: ignore[no-untyped-def]
        """rows x columns -> words of two rows; a row that is missing in the last word is 0."""
        for r in range(0, rows, 2):
            a, t = source + r * stride * stored, target + r // 2 * columns * size
            second = a + stride * stored
            c = 0
            while r + 1 < rows and c + 2 * lanes <= columns:
                if storage == "bfloat16":
                    panels.interleave(t + c * size, a + c * stored, second + c * stored)
                else:
                    for half in range(c, c + 2 * lanes, lanes):
                        pack_vectors(t + half * size, load_stored(a + half * stored),
                                     load_stored(second + half * stored))  # fmt: skip
                c += 2 * lanes
            while c < columns:
                high = get_stored(second + c * stored) if r + 1 < rows else dtype(0)
                pack(t + c * size, get_stored(a + c * stored), high)
                c += 1

    @jit
    def panel(p, w, head, tile, key, value, length):  # type: ignore[no-untyped-def]
        """The address of a tile's converted keys; its values follow `key_panel_bytes` later."""
        tags = table(p, w, TABLES)
        slot = tile % p.slots
        a = tags + 64 * ((p.slots + 7) // 8) + slot * p.slot_bytes
        tag = head * (p.key_tiles + 1) + tile + 1
        if get_int(tags + 8 * slot) != tag:
            put_int(tags + 8 * slot, tag)
            rows = min(KEYS, length - tile * KEYS)
            key += tile * KEYS * p.key_s * stored
            value += tile * KEYS * p.value_s * stored
            if pairs:
                if p.key_panel_bytes > 0:
                    pair_columns(key, p.key_s, rows, p.head_dim, a)
                pair_rows(value, p.value_s, rows, p.value_dim, a + p.key_panel_bytes)
            else:
                convert(key, p.key_s, rows, p.head_dim, a)
                convert(value, p.value_s, rows, p.value_dim, a + p.key_panel_bytes)
        return a

    @jit
    def score(p, w, key, converted, key0, keys, vectors):  # type: ignore[no-untyped-def]
        """The raw products of one run of keys."""
        s = w + (p.head_dim + p.value_dim) * ROW_BYTES
        depth = (p.head_dim + 1) // 2 if pairs else p.head_dim
        if converts and p.key_panel_bytes > 0:
            a, stride = converted + key0 % KEYS * depth * size, depth
        else:
            a, stride = key + key0 * p.key_s * stored, p.key_s // 2 if pairs else p.key_s
        fresh(a, stride, 1, keys, w, s, vectors, depth, 0)
        return s

    @jit
    def soften(p, w, s, keys, vectors, factor):  # type: ignore[no-untyped-def]
        """s^T -> unnormalised weights; moves the running maximum and total, leaves the factor for older sums."""
        to_log2 = splat(factor)
        for v in range(vectors):
            c = s + v * register
            before = load(row(p, w, MAXIMUM) + v * register)
            top = before
            for j in range(keys):
                top = greater(load(c + j * ROW_BYTES), top)
            zero_point = simd.finite_or_zero(top)
            rescale = exp2(mul(sub(before, zero_point), to_log2))
            total = mul(load(row(p, w, TOTAL) + v * register), rescale)
            if pairs:
                for j in range(0, keys - 1, 2):
                    x = exp2(mul(sub(load(c + j * ROW_BYTES), zero_point), to_log2))
                    y = exp2(mul(sub(load(c + (j + 1) * ROW_BYTES), zero_point), to_log2))
                    total = add(total, add(x, y))
                    panels.pack_weights(c + j // 2 * ROW_BYTES, x, y)
                if keys % 2 == 1:
                    x = exp2(mul(sub(load(c + (keys - 1) * ROW_BYTES), zero_point), to_log2))
                    total = add(total, x)
                    panels.pack_weights(c + keys // 2 * ROW_BYTES, x, splat(dtype(0)))
            else:
                for j in range(keys):
                    x = exp2(mul(sub(load(c + j * ROW_BYTES), zero_point), to_log2))
                    total = add(total, x)
                    store(c + j * ROW_BYTES, as_operand(x))
            store(row(p, w, MAXIMUM) + v * register, top)
            store(row(p, w, TOTAL) + v * register, total)
            store(row(p, w, RESCALE) + v * register, rescale)

    @jit
    def add_values(p, w, s, value, converted, key0, keys, vectors):  # type: ignore[no-untyped-def]
        """o^T = o^T * rescale + v^T p^T"""
        o = w + p.head_dim * ROW_BYTES
        step = 2 if pairs else 1
        if converts:
            a, stride = converted + p.key_panel_bytes + key0 % KEYS // step * p.value_dim * size, p.value_dim
        else:
            a, stride = value + key0 * p.value_s * stored, p.value_s
        accumulate(a, 1, stride, p.value_dim, s, o, vectors, (keys + step - 1) // step, row(p, w, RESCALE))

    @jit
    def add_visible_values(p, w, s, value, key0, keys, rows):  # type: ignore[no-untyped-def]
        """`add_values` that leaves out what a row does not see, whatever lies there."""
        o = w + p.head_dim * ROW_BYTES
        state = state_of(p, w)
        for r in range(rows):
            rescale = get(row(p, w, RESCALE) + r * size)
            for d in range(p.value_dim):
                t = o + d * ROW_BYTES + r * size
                put(t, get(t) * rescale)
            for j in range(keys):
                if not visible(p, state, r, key0 + j):
                    continue
                if pairs:
                    x = bfloat16_at(s + j // 2 * ROW_BYTES + r * size + j % 2 * 2)
                else:
                    x = get(s + j * ROW_BYTES + r * size)
                a = value + (key0 + j) * p.value_s * stored
                for d in range(p.value_dim):
                    y = get_stored(a + d * stored)
                    t = o + d * ROW_BYTES + r * size
                    put(t, get(t) + x * (simd.round_bfloat16(y) if bfloat16_products else y))

    @jit
    def write_weights(p, w, s, b, unit, row0, rows, queries, key0, keys, factor):  # type: ignore[no-untyped-def]
        for r in range(rows):
            h, i = unit * p.packed_heads + (row0 + r) // queries, (row0 + r) % queries
            a = p.weights + (b * p.weights_b + h * p.weights_h + i * p.weights_s + key0) * size
            total = get(row(p, w, TOTAL) + r * size)
            top = simd.finite_or_zero(get(row(p, w, MAXIMUM) + r * size))
            for j in range(keys):
                x = exp2((get(s + j * ROW_BYTES + r * size) - top) * factor)
                put(a + j * size, x / total if total != 0 else dtype(0))

    @jit
    def all_finite(p, w, rows, vectors):  # type: ignore[no-untyped-def]
        """Whether every sum of the block is: 0 times them adds up to 0."""
        o = w + p.head_dim * ROW_BYTES
        zero = splat(dtype(0))
        for v in range(vectors):
            seen = zero
            for d in range(p.value_dim):
                seen = simd.fma(load(o + d * ROW_BYTES + v * register), zero, seen)
            store(row(p, w, RESCALE) + v * register, seen)
        for r in range(rows):
            if get(row(p, w, RESCALE) + r * size) != 0:
                return False
        return True

    @jit
    def finish(p, w, b, unit, row0, rows, queries, start):  # type: ignore[no-untyped-def]
        """o^T / total -> out, and lse."""
        pb = 0 if p.query_starts != 0 else b
        o, outs, inverse = w + p.head_dim * ROW_BYTES, table(p, w, OUT), row(p, w, RESCALE)
        for r in range((rows + lanes - 1) // lanes * lanes):
            total = get(row(p, w, TOTAL) + r * size)
            put(inverse + r * size, dtype(0) if total == 0 else dtype(1) / total)
        whole = p.value_dim // lanes * lanes
        for r in range(0, rows, lanes):
            for c in range(0, whole, lanes):
                write_square(o + c * ROW_BYTES + r * size, inverse + r * size, outs + 8 * r, c * stored, rows - r)
        for r in range(rows):
            for c in range(whole, p.value_dim):
                x = get(o + c * ROW_BYTES + r * size) * get(inverse + r * size)
                put_stored(get_int(outs + 8 * r) + c * stored, x)
            if p.lse != 0:
                h, i = unit * p.packed_heads + (row0 + r) // queries, (row0 + r) % queries
                a = p.lse + (pb * p.lse_b + h * p.lse_h + (start + i) * p.lse_s) * size
                total = get(row(p, w, TOTAL) + r * size)
                top = np.float64(get(row(p, w, MAXIMUM) + r * size))
                if p.plain:
                    top *= p.scale
                put(a, -infinity if total == 0 else dtype(top + math.log(np.float64(total))))

    @jit
    def block(p, w, b, unit, number):  # type: ignore[no-untyped-def]
        start, queries, key_start = rows_of(p, b)
        row0 = number * block_rows
        rows = min(block_rows, p.packed_heads * queries - row0)
        vectors = (rows + lanes - 1) // lanes
        pb = 0 if p.query_starts != 0 else b
        shared = unit * p.packed_heads // p.group
        head = b * p.units * p.packed_heads // p.group + shared
        key = p.key + (pb * p.key_b + shared * p.key_h + key_start * p.key_s) * stored
        value = p.value + (pb * p.value_b + shared * p.value_h + key_start * p.value_s) * stored
        length = get_int(p.key_lengths + 8 * b)
        factor = dtype(p.scale * LOG2E) if p.plain else dtype(LOG2E)
        state = state_of(p, w)
        careful = False
        while True:
            any_first, any_last, all_first, all_last = set_up(p, w, b, unit, row0, rows, queries, start)
            transpose_queries(p, w, vectors)
            zero = splat(dtype(0))
            for d in range(p.value_dim):
                for v in range(vectors):
                    store(w + (p.head_dim + d) * ROW_BYTES + v * register, zero)
            key0 = any_first
            while key0 < any_last:
                keys = min(KEYS - key0 % KEYS, any_last - key0)
                converted = panel(p, w, head, key0 // KEYS, key, value, length) if converts else 0
                s = score(p, w, key, converted, key0, keys, vectors)
                adjust(p, state, s, key0, keys, rows, vectors, all_first, all_last)
                soften(p, w, s, keys, vectors, factor)
                if careful:
                    add_visible_values(p, w, s, value, key0, keys, rows)
                else:
                    add_values(p, w, s, value, converted, key0, keys, vectors)
                key0 += keys
            # A non-finite value meets a weight of 0 where it is masked, and 0 * inf is NaN. It shows in the sums:
            # only then the block is done again, with every masked value left out.
            if careful or all_finite(p, w, rows, vectors):
                break
            careful = True
        finish(p, w, b, unit, row0, rows, queries, start)
        key0 = any_first if p.weights != 0 else any_last
        while key0 < any_last:
            keys = min(KEYS - key0 % KEYS, any_last - key0)
            converted = panel(p, w, head, key0 // KEYS, key, value, length) if converts else 0
            s = score(p, w, key, converted, key0, keys, vectors)
            adjust(p, state, s, key0, keys, rows, vectors, all_first, all_last)
            write_weights(p, w, s, b, unit, row0, rows, queries, key0, keys, factor)
            key0 += keys

    def attend(address):  # type: ignore[no-untyped-def]
        p = parameters_at(address)
        w = p.workspace + simd.fetch_add(address + WORKERS) * p.workspace_bytes
        finished_last = 0
        started = False
        while True:
            t = simd.fetch_add(address + NEXT_TASK)
            if t >= p.tasks:
                return finished_last
            if not started:
                for slot in range(p.slots):
                    put_int(table(p, w, TABLES) + 8 * slot, 0)
                started = True
            b, unit, number = task(p, t)
            block(p, w, b, unit, number)
            if simd.fetch_add(address + TASKS_DONE) + 1 == p.tasks:
                finished_last = 1

    return attend
