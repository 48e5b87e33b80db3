"""Writing new tokens into key/value caches: turned by position, quantised, each to its page.

A token's row is read once and written once. Its sines and cosines are taken in float64, a vector of them at a
time, and serve all heads. Rows that are kept as they come are copied; the others pass through vectors in the
compute dtype, by the same roundings as in the reference: true division, no fused products.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from ..problem import AppendProblem, storage_name
from . import arrays, elementary, emitters, quantise, records, repeats, runtime, simd, team
from .quantise import AS_IT_IS, INT4, INT8, copy

BLOCK = 64
"""Tokens of a sequence worth taking from the counter."""
SERIAL = 1 << 19
"""Numbers below which a call is not worth a second thread: 230 us."""
ALONE = repeats.Helpers(most=0, wakes=False, after=0)

# What changes from call to call comes first, then what else a rotation needs.
_CALL = ("key", "key_b", "key_h", "key_s", "value", "value_b", "value_h", "value_s",
         "starts", "positions", "counts", "rows", "blocks", "workspace")  # fmt: skip
_TURN = ("frequencies", "pairs", "interleaved", "table_bytes", "row_bytes", "workspace_bytes",
         "heads", "head_dim", "key_pages", "key_pages_p", "key_pages_h", "key_pages_r")  # fmt: skip
_PAGES = ("key_pages", "value_pages", "key_scales", "value_scales")
PARAMETERS = np.dtype(
    runtime.WORK
    + [(name, np.int64) for name in (
        *_CALL, *_TURN, "workers",
        # addresses, and strides in bytes along pages, rows of a page and heads
        "value_pages", "value_pages_p", "value_pages_r", "value_pages_h",
        "key_scales", "key_scales_p", "key_scales_r", "key_scales_h",
        "value_scales", "value_scales_p", "value_scales_r", "value_scales_h",
        "page_table", "page_table_b", "page_size", "ring", "value_dim", "kind",
    )]
)  # fmt: skip
_WORDS = records.words_of(PARAMETERS)
TASKS = _WORDS["tasks"]
NEXT_TASK, TASKS_DONE, WORKERS = (8 * _WORDS[name] for name in ("next_task", "tasks_done", "workers"))
_put_call, _put_rotation = (struct.Struct(f"{len(x)}q").pack_into for x in (_CALL, _CALL + _TURN))

parameters_at = simd.record(PARAMETERS)
get_int, _ = simd.scalars(types.int64)


def append(problem: AppendProblem) -> None:
    """Write the new keys and values into the pages."""
    Plan(problem).append(problem.key, problem.value, problem.starts, problem.counts)


def rotate(
    query: NDArray[Any],
    out: NDArray[Any],
    offset: NDArray[np.int64],
    frequencies: NDArray[np.float64],
    interleaved: bool,
) -> None:
    """Write `query` (B, Hq, Sq, D) to `out`, turned as keys are: query i of sequence b by offset[b] + i."""
    words, workspace_bytes, frequencies = _rotation(query, out, offset, frequencies, interleaved)
    tasks = int(words[TASKS])
    if tasks == 0:
        return
    helpers = _helpers(tasks, query.size)
    memory, words[_WORDS["workspace"]] = runtime.scratch((helpers + 1) * workspace_bytes)
    keep_alive = (query, out, offset, frequencies, memory)
    team.run(kernel(f"append-{storage_name(query.dtype)}"), words, helpers, keep_alive)
    runtime.keep(memory)


def rotate_again(
    query: NDArray[Any], offset: NDArray[np.int64], frequencies: NDArray[np.float64], interleaved: bool
) -> repeats.Again | None:
    """What turns other queries of this layout in one native call, ``run(query, offset, offset)``; or None."""
    out = np.empty(query.shape, query.dtype)
    words, workspace_bytes, frequencies = _rotation(query, out, offset, frequencies, interleaved)
    tasks = int(words[TASKS])
    if tasks == 0 or query.size >= SERIAL or not arrays.KNOWN:
        return None
    at = _WORDS
    places = repeats.Places(at["key"], at["positions"], at["positions"], at["key_pages"], at["workspace"],
                            at["workspace"], 0)  # fmt: skip
    turn = kernel(f"append-{storage_name(query.dtype)}")
    return repeats.Again(turn, words, places, ALONE, workspace_bytes, (query, offset, offset), out,
                         frequencies)  # fmt: skip


def _rotation(
    query: NDArray[Any],
    out: NDArray[Any],
    offset: NDArray[np.int64],
    frequencies: NDArray[np.float64],
    interleaved: bool,
) -> tuple[NDArray[np.int64], int, NDArray[np.float64]]:
    """The kernel's parameters but for its workspace, that one's bytes for each thread, and frequencies."""
    batch, heads, rows, head_dim = query.shape
    blocks, pairs = -(-rows // BLOCK), len(frequencies)
    double = query.dtype == np.float64
    frequencies, table_bytes, row_bytes, workspace_bytes = _tables(frequencies, head_dim, double)
    words = np.zeros(PARAMETERS.itemsize // 8, np.int64)
    words[TASKS] = batch * blocks
    # Each sequence's rows are a page.
    _put_rotation(
        words.data, 8 * _WORDS["key"],
        runtime.address(query), *query.strides[:3], 0, 0, 0, 0,
        0, runtime.address(offset), 0, rows, blocks, 0,
        runtime.address(frequencies), pairs, interleaved, table_bytes, row_bytes, workspace_bytes,
        heads, head_dim, runtime.address(out), *out.strides[:3],
    )  # fmt: skip
    return words, workspace_bytes, frequencies


class Plan:
    """Appends to one cache again and again: only the new tokens' addresses and places change."""

    def __init__(self, problem: AppendProblem) -> None:
        p = problem
        self.kernel = kernel(f"append-{_given(p.storage)}")
        self.words = np.zeros(PARAMETERS.itemsize // 8, np.int64)
        values: dict[str, int] = {}
        for name in _PAGES:
            if (x := getattr(p, name)) is not None:
                values[name] = runtime.address(x)
                values[f"{name}_p"], values[f"{name}_r"], values[f"{name}_h"] = x.strides[:3]
        heads, head_dim, value_dim = p.key.shape[1], p.key.shape[3], p.value.shape[3]
        frequencies, self.workspace_bytes = None, 0
        if p.frequencies is not None:
            double = p.compute is np.float64
            frequencies, table_bytes, row_bytes, self.workspace_bytes = _tables(
                p.frequencies, head_dim, double
            )
            values |= {
                "frequencies": runtime.address(frequencies),
                "pairs": len(p.frequencies),
                "table_bytes": table_bytes,
                "row_bytes": row_bytes,
                "workspace_bytes": self.workspace_bytes,
            }
        values |= {
            "page_table": runtime.address(p.page_table),
            "page_table_b": p.page_table.strides[0],
            "page_size": p.key_pages.shape[1],
            "ring": p.ring,
            "heads": heads,
            "head_dim": head_dim,
            "value_dim": value_dim,
            "kind": {"int8": INT8, "int4": INT4}.get(p.storage, AS_IT_IS),
            "interleaved": p.interleaved,
        }
        for name, number in values.items():
            self.words[_WORDS[name]] = number
        self.numbers = heads * (head_dim + value_dim)
        # Not the first call's tokens.
        self.keep_alive = [getattr(p, name) for name in (*_PAGES, "page_table")], frequencies

    def append(
        self, key: NDArray[Any], value: NDArray[Any], starts: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> None:
        """Write keys and values (B, Hkv, S, D) to the positions from `starts` on."""
        batch, _, rows, _ = key.shape
        blocks = -(-rows // BLOCK)
        tasks = batch * blocks
        if tasks == 0:
            return
        helpers = _helpers(tasks, batch * rows * self.numbers)
        memory, workspace = None, 0
        if self.workspace_bytes:
            memory, workspace = runtime.scratch((helpers + 1) * self.workspace_bytes)
        words = self.words.copy()
        words[TASKS] = tasks
        start = runtime.address(starts)
        _put_call(
            words.data, 8 * _WORDS["key"],
            runtime.address(key), *key.strides[:3], runtime.address(value), *value.strides[:3],
            start, start, runtime.address(counts), rows, blocks, workspace,
        )  # fmt: skip
        team.run(self.kernel, words, helpers, (key, value, starts, counts, self, memory))
        if memory is not None:
            runtime.keep(memory)

    def again(
        self, key: NDArray[Any], value: NDArray[Any], starts: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> repeats.Again | None:
        """What makes the call in one native call, ``run(key, value, starts, out=counts)``; or None."""
        batch, _, rows, _ = key.shape
        blocks = -(-rows // BLOCK)
        tasks = batch * blocks
        if tasks == 0 or batch * rows * self.numbers >= SERIAL or not arrays.KNOWN:
            return None
        words = self.words.copy()
        words[TASKS] = tasks
        start, steps = runtime.address(starts), (*key.strides[:3], 0, *value.strides[:3])
        _put_call(words.data, 8 * _WORDS["key"], 0, *steps, start, start, 0, rows, blocks, 0)
        at = _WORDS
        places = repeats.Places(at["key"], at["value"], at["starts"], at["counts"], at["workspace"],
                                at["workspace"], 0)  # fmt: skip
        return repeats.Again(self.kernel, words, places, ALONE, self.workspace_bytes, (key, value, starts),
                             counts, (self, counts))  # fmt: skip


def _helpers(tasks: int, numbers: int) -> int:
    return 0 if tasks == 1 or numbers < SERIAL else min(runtime.threads(), tasks) - 1


def _tables(
    frequencies: NDArray[np.float64], head_dim: int, double: bool
) -> tuple[NDArray[np.float64], int, int, int]:
    """Frequencies in whole vectors; bytes of a table of cosines, of a row of keys, of a block's workspace."""
    lanes = simd.lanes(np.float64)
    missing = -len(frequencies) % lanes
    if missing or not frequencies.flags.c_contiguous:
        frequencies = np.concatenate((frequencies, np.zeros(missing)))
    table_bytes, row_bytes = (
        -(-n * (8 if double else 4) // 64) * 64 for n in (2 * len(frequencies), head_dim)
    )
    return frequencies, table_bytes, row_bytes, row_bytes + BLOCK * 2 * table_bytes


def kernel_names(dtypes: Sequence[str]) -> list[str]:
    """The kernels that calls with these dtypes need."""
    return list(dict.fromkeys(f"append-{_given(dtype)}" for dtype in dtypes))


def _given(storage: str) -> str:
    """The dtype of what goes into a cache of this one."""
    return "float32" if storage in ("int8", "int4") else storage


def kernel(name: str) -> Any:
    """The compiled kernel of this name."""
    return runtime.compiled(name, partial(_build, name.partition("-")[2]))


# --- vectors ------------------------------------------------------------------------------------------------


def _turns(double: bool) -> Any:
    """``turns(position, frequencies, cosines, sines, interleaved)``: one vector of pairs' turns, stored.

    Interleaved, a cosine stands twice, and a sine once more before it with the other sign: what both numbers
    of a pair are multiplied with lies where they do.
    """
    lanes = simd.lanes(np.float64)
    wide = ir.VectorType(ir.DoubleType(), lanes)

    def interleave(b: ir.IRBuilder, x: Any, y: Any) -> Any:
        order = [i // 2 + lanes * (i % 2) for i in range(2 * lanes)]
        return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(emitters.I32, 2 * lanes), order))

    def put(b: ir.IRBuilder, x: Any, address: Any) -> None:
        if not double:
            x = b.fptrunc(x, ir.VectorType(ir.FloatType(), x.type.count))
        emitters.store_value(b, x, emitters.pointer(b, address, x.type))

    @intrinsic
    def turns(
        typingctx: Any, position: Any, frequencies: Any, cosines: Any, sines: Any, interleaved: Any
    ) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            position, frequencies, cosines, sines, interleaved = args
            frequency = emitters.load_value(b, emitters.pointer(b, frequencies, wide))
            where = emitters.splat_value(b, wide, b.sitofp(position, ir.DoubleType()))
            sine, cosine = elementary.sine_and_cosine_value(b, b.fmul(where, frequency))
            with b.if_else(b.icmp_signed("!=", interleaved, emitters.I64(0))) as (paired, apart):
                with paired:
                    put(b, interleave(b, cosine, cosine), cosines)
                    put(b, interleave(b, b.fneg(sine), sine), sines)
                with apart:
                    put(b, cosine, cosines)
                    put(b, sine, sines)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return turns


@intrinsic
def neighbours(typingctx: Any, x: Any) -> Any:
    """The vector with the numbers of each pair exchanged."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        order = [i ^ 1 for i in range(args[0].type.count)]
        return b.shuffle_vector(args[0], args[0], ir.Constant(ir.VectorType(emitters.I32, len(order)), order))

    return x(x), codegen


# --- the kernel ---------------------------------------------------------------------------------------------


def _build(storage: str, jit: Any, inline: Any) -> Callable[[Any], Any]:
    """The kernel for tokens of one dtype."""
    dtype: Any = np.float64 if storage == "float64" else np.float32
    number = np.dtype(dtype).itemsize
    stored = 2 if storage in ("float16", "bfloat16") else number
    lanes = simd.lanes(dtype)
    pairs = simd.lanes(np.float64)
    register = emitters.REGISTER_BYTES
    load, _, get, _ = simd.loads("float64" if dtype is np.float64 else "float32")
    load_stored, store_stored, get_stored, put_stored = simd.loads(storage)
    turns = _turns(dtype is np.float64)
    mul, sub, add = simd.mul, simd.sub, simd.add

    @jit
    def turn(p, cosines, sines, source, target):
        """A key's row (D,) -> the same, its pairs turned."""
        n = p.pairs
        if p.interleaved:
            i, n = 0, 2 * n
            while i < n and n >= lanes:
                c = min(i, n - lanes)  # the last one overlaps
                x = load_stored(source + c * stored)
                y = mul(neighbours(x), load(sines + c * number))
                store_stored(target + c * stored, add(mul(x, load(cosines + c * number)), y))
                i += lanes
            while i < n:
                x, y = get_stored(source + i * stored), get_stored(source + (i ^ 1) * stored)
                put_stored(target + i * stored, x * get(cosines + i * number) + y * get(sines + i * number))
                i += 1
        else:
            i, second_source, second_target = 0, source + n * stored, target + n * stored
            while i < n and n >= lanes:
                c = min(i, n - lanes)
                x, y = load_stored(source + c * stored), load_stored(second_source + c * stored)
                cosine, sine = load(cosines + c * number), load(sines + c * number)
                store_stored(target + c * stored, sub(mul(x, cosine), mul(y, sine)))
                store_stored(second_target + c * stored, add(mul(y, cosine), mul(x, sine)))
                i += lanes
            while i < n:
                x, y = get_stored(source + i * stored), get_stored(second_source + i * stored)
                cosine, sine = get(cosines + i * number), get(sines + i * number)
                put_stored(target + i * stored, x * cosine - y * sine)
                put_stored(second_target + i * stored, y * cosine + x * sine)
                i += 1
        done = 2 * p.pairs * stored
        copy(target + done, source + done, p.head_dim * stored - done)

    @jit
    def place(p, source, target, scales, count):
        """A row -> its place in the cache."""
        copy(target, source, count * stored)

    if storage == "float32":
        place = quantise.build(jit, inline)

    @jit
    def place_rows(p, source, target, scales, steps, rows, count):
        """Rows -> their places in one page."""
        if p.kind == AS_IT_IS and steps[0] == count * stored == steps[1]:
            copy(target, source, rows * count * stored)
        else:
            for r in range(rows):
                place(p, source + r * steps[0], target + r * steps[1], scales + r * steps[2], count)

    @jit
    def write(p, w, b, first, end):
        """Some rows of sequence b, all heads; a head's rows one after another, as they often lie."""
        turned, table = w, w + p.row_bytes
        if p.pairs:
            step = pairs * number * (2 if p.interleaved else 1)
            for i in range(first, end):
                position = get_int(p.positions + 8 * b) + i
                cosines = table + (i - first) * 2 * p.table_bytes
                for n in range((p.pairs + pairs - 1) // pairs):
                    at, c = p.frequencies + n * register, cosines + n * step
                    turns(position, at, c, c + p.table_bytes, p.interleaved)
        for h in range(p.heads):
            key, value = p.key + b * p.key_b + h * p.key_h, p.value + b * p.value_b + h * p.value_h
            key_to, value_to = p.key_pages + h * p.key_pages_h, p.value_pages + h * p.value_pages_h
            key_scale, value_scale = p.key_scales + h * p.key_scales_h, p.value_scales + h * p.value_scales_h
            i = first
            while i < end:
                page, row, run = b, i, end - i  # rows that one page takes
                if p.starts:
                    slot = get_int(p.starts + 8 * b) + i
                    if p.ring:
                        slot %= p.ring
                        run = min(run, p.ring - slot)
                    row = slot % p.page_size
                    run = min(run, p.page_size - row)
                    page = get_int(p.page_table + b * p.page_table_b + slot // p.page_size * 8)
                source, target = key + i * p.key_s, key_to + page * p.key_pages_p + row * p.key_pages_r
                scales = key_scale + page * p.key_scales_p + row * p.key_scales_r
                if p.pairs:
                    for r in range(run):
                        cosines = table + (i + r - first) * 2 * p.table_bytes
                        to = target + r * p.key_pages_r if p.kind == AS_IT_IS else turned
                        turn(p, cosines, cosines + p.table_bytes, source + r * p.key_s, to)
                        if p.kind != AS_IT_IS:
                            place(p, to, target + r * p.key_pages_r, scales + r * p.key_scales_r, p.head_dim)
                else:
                    steps = p.key_s, p.key_pages_r, p.key_scales_r
                    place_rows(p, source, target, scales, steps, run, p.head_dim)
                if p.value_dim:
                    source, target = value + i * p.value_s, value_to + page * p.value_pages_p
                    scales = value_scale + page * p.value_scales_p + row * p.value_scales_r
                    steps = p.value_s, p.value_pages_r, p.value_scales_r
                    place_rows(p, source, target + row * p.value_pages_r, scales, steps, run, p.value_dim)
                i += run

    def work(address):
        p = parameters_at(address)
        w = p.workspace + simd.fetch_add(address + WORKERS) * p.workspace_bytes
        finished_last = 0
        while True:
            task = simd.fetch_add(address + NEXT_TASK)
            if task >= p.tasks:
                return finished_last
            b, block = task // p.blocks, task % p.blocks
            count = get_int(p.counts + 8 * b) if p.counts else p.rows
            first = max(count - p.ring, 0) if p.ring else 0
            write(p, w, b, max(first, block * BLOCK), min(count, (block + 1) * BLOCK))
            if simd.fetch_add(address + TASKS_DONE) + 1 == p.tasks:
                finished_last = 1

    return work
