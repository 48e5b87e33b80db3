"""Scaled dot-product attention on the CPU: fill the kernel's parameters, choose the threads, run it."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..problem import STORAGE_DTYPES, Problem, storage_name
from . import arrays, blocks, decode, layout, mods, records, repeats, runtime, team
from .layout import PARAMETERS, STATE_ROWS, TABLES
from .masks import WORDS
from .panels import KEYS
from .tiles import ROW_BYTES

PANEL_BYTES = 8 << 20
"""Converted keys and values that all threads of a call keep."""
PANEL_BLOCKS = 2
"""Blocks of a head for each thread from which on values are turned that need no conversion."""
_WORDS = records.words_of(PARAMETERS)
QUERY = _WORDS["query"]
TASKS, WORKSPACE, WORKSPACE_BYTES = (_WORDS[name] for name in ("tasks", "workspace", "workspace_bytes"))
STATES = 1 << 24
"""Tiles of which it is worth 16 MiB to know what a mask_mod shows."""
SERIAL_WORK = 1 << 19
"""Multiply-adds below which a call is not worth waking a second thread."""
SHORT_WORK = 1 << 17
"""Those below which it is not worth sharing with one that is awake."""


def forward(
    problem: Problem, out: NDArray[Any], lse: NDArray[Any] | None, weights: NDArray[Any] | None
) -> None:
    """Write attention to `out` (B, Hq, Sq, Dv), `lse` (B, Hq, Sq) and `weights` (B, Hq, Sq, Sk)."""
    if weights is not None:
        _forward(problem, out, lse, weights)
    elif problem.query_starts is not None:
        _forward_packed(problem, out, lse)
    elif (
        problem.blocks is None
        and not _has_mods(problem)
        and decode.is_few(problem, problem.max_queries, problem.max_keys)
    ):
        decode.forward(decode.as_cache(problem), out, lse)
    else:
        _forward(problem, out, lse, None)


def _forward_packed(p: Problem, out: NDArray[Any], lse: NDArray[Any] | None) -> None:
    """Each sequence by its own length alone, so that no other one changes its bits."""
    starts, key_starts = cast(Any, p.query_starts), cast(Any, p.key_starts)
    counts = np.diff(starts)
    few = decode.is_few(p, counts, np.diff(key_starts))
    if any(x is not None for x in (p.mask, p.blocks, p.bias)) or _has_mods(p) or not few.any():
        _forward(p, out, lse, None)
        return
    decode.attend_packed(p, few & (counts > 0), out, lse)
    # What lies between them keeps to the tiles, one run of sequences after the other.
    edges = np.flatnonzero(np.diff(np.concatenate(([True], few, [True]))))
    for i, j in edges.reshape(-1, 2):
        rows, keys = slice(starts[i], starts[j]), slice(key_starts[i], key_starts[j])
        run = replace(
            p, query=p.query[:, :, rows], key=p.key[:, :, keys], value=p.value[:, :, keys], batch=int(j - i),
            max_queries=int(counts[i:j].max()), max_keys=int(np.diff(key_starts[i : j + 1]).max()),
            offset=p.offset[i:j], key_lengths=p.key_lengths[i:j],
            query_starts=starts[i : j + 1] - starts[i], key_starts=key_starts[i : j + 1] - key_starts[i],
        )  # fmt: skip
        _forward(run, out[:, :, rows], None if lse is None else lse[:, :, rows], None)


def _forward(
    problem: Problem, out: NDArray[Any], lse: NDArray[Any] | None, weights: NDArray[Any] | None
) -> None:
    run_tiled(_kernel_of(problem), problem, out, lse, weights)


def run_tiled(
    kernel: Any,
    problem: Problem,
    out: NDArray[Any],
    lse: NDArray[Any] | None = None,
    weights: NDArray[Any] | None = None,
    index: NDArray[np.int64] | None = None,
    uniforms: NDArray[np.float64] | None = None,
) -> None:
    """Run one of the kernels whose lanes are queries; those of `hard` take an `index`, and make no sums."""
    results = out, lse, weights, index, uniforms
    words, keep_alive = _parameters(problem, *results)
    _run(kernel, words, _work(problem) < SERIAL_WORK, (problem, results, keep_alive))
    for mod, arguments in zip((problem.score_mod, problem.mask_mod), keep_alive, strict=False):
        if mod is not None:
            mods.check_done(mod, arguments)


class Repeat:
    """A call to be made again with other arrays of the same layout: only their addresses change."""

    def __init__(self, problem: Problem, out: NDArray[Any]) -> None:
        self.plan = None
        if decode.is_few(problem, problem.max_queries, problem.max_keys):
            self.plan = decode.Plan(decode.as_cache(problem), out)
            return
        self.kernel = _kernel_of(problem)
        self.words, _ = _parameters(problem, out)
        self.keep_alive = problem.offset, problem.key_lengths
        self.work = _work(problem)
        self.small = self.work < SERIAL_WORK

    def again(self, inputs: tuple[Any, ...], result: NDArray[Any]) -> repeats.Again | None:
        """What makes it in one native call, of inputs and a result as the caller sees them; or None."""
        if not arrays.KNOWN:
            return None
        if self.plan is not None:
            return self.plan.again(inputs, result)
        helpers = repeats.helpers(int(self.words[TASKS]), self.work, SHORT_WORK, SERIAL_WORK)
        if helpers is None:
            return None
        places = repeats.Places(QUERY, QUERY + 1, QUERY + 2, QUERY + 3, WORKSPACE, WORKSPACE, 0)
        return repeats.Again(self.kernel, self.words, places, helpers, int(self.words[WORKSPACE_BYTES]),
                             inputs, result, self.keep_alive)  # fmt: skip

    def forward(self, query: NDArray[Any], key: NDArray[Any], value: NDArray[Any], out: NDArray[Any]) -> None:
        if self.plan is not None:
            self.plan.forward(query, out, pages=(key, value))
            return
        words: Any = self.words.copy()
        given = query, key, value, out
        _ARRAYS.pack_into(words, 8 * QUERY, *map(runtime.address, given))
        _run(self.kernel, words, self.small, (given, self))


_ARRAYS = struct.Struct("4q")


def _run(kernel: Any, words: NDArray[np.int64], small: bool, keep_alive: Any) -> None:
    tasks = int(words[TASKS])
    if tasks == 0:
        return
    helpers = 0 if small else min(runtime.threads(), tasks) - 1
    memory, words[WORKSPACE] = runtime.scratch((helpers + 1) * int(words[WORKSPACE_BYTES]))
    team.run(kernel, words, helpers, (keep_alive, memory))
    runtime.keep(memory)


def _has_mods(p: Problem) -> bool:
    """Whether there are functions of the user's, which only the tiles call."""
    return p.score_mod is not None or p.mask_mod is not None


def _states(p: Problem, rows: int) -> NDArray[np.uint8] | None:
    """What the mask_mod shows of each tile, where several heads or sequences share that."""
    takes_batch, takes_head = mods.depends_on(cast(Any, p.mask_mod))
    heads = p.query.shape[1]
    shape = (p.batch if takes_batch else 1, heads if takes_head else 1, p.max_queries, p.max_keys)
    times = p.batch * heads // max(1, shape[0] * shape[1])
    tiles = shape[0] * shape[1] * -(-p.max_queries // rows) * -(-p.max_keys // KEYS)
    if p.query_starts is not None or times < 2 or not 2 < tiles < STATES:
        return None
    states = mods.states(cast(Any, p.mask_mod), shape, rows, KEYS)
    return np.broadcast_to(states, (p.batch, heads, *states.shape[2:]))


def _kernel_of(p: Problem) -> Any:
    return kernel(f"attention-{p.storage}" + ("-bfloat16" if p.bfloat16_products else ""))


def _work(p: Problem) -> int:
    """Multiply-adds of a call."""
    _, heads, _, head_dim = p.query.shape
    return p.batch * heads * p.max_queries * p.max_keys * (head_dim + p.value.shape[3])


def kernel_names(dtypes: Sequence[str]) -> list[str]:
    """The kernels that calls with these dtypes need."""
    names = [f"attention-{dtype}" for dtype in dtypes if dtype in STORAGE_DTYPES]
    return [*names, "attention-float32-bfloat16"] if "float32" in dtypes else names


def kernel(name: str) -> Any:
    """The compiled kernel of this name: "attention-" and the storage dtype, "-bfloat16" for its products."""
    _, storage, *products = name.split("-")
    return runtime.compiled(name, partial(blocks.build, storage, bool(products)))


def _parameters(
    p: Problem,
    out: NDArray[Any],
    lse: NDArray[Any] | None = None,
    weights: NDArray[Any] | None = None,
    index: NDArray[np.int64] | None = None,
    uniforms: NDArray[np.float64] | None = None,
) -> tuple[NDArray[np.int64], Any]:
    """The kernel's record as words of 8 bytes, and what else must stay alive while it runs."""
    values: dict[str, int] = {}

    def array(name: str, x: NDArray[Any] | None, axes: str = "", unit: int = 0) -> None:
        if x is None:
            return
        values[name] = runtime.address(x)
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
    if p.blocks is not None:
        table = p.blocks.table
        array("table", np.broadcast_to(table, (p.batch, p.query.shape[1], *table.shape[2:])), "bhq", unit=1)
        array("words", p.blocks.words)
    array("alibi_slopes", p.alibi_slopes)
    array("sinks", p.sinks)
    array("index", index)
    array("uniforms", uniforms)
    array("offset", p.offset)
    array("key_lengths", p.key_lengths)
    itemsize = np.dtype(p.compute).itemsize
    rows = ROW_BYTES // itemsize
    heads, head_dim = p.query.shape[1], p.query.shape[3]
    value_dim = p.value.shape[3] if index is None else 0
    group = heads // p.key.shape[1] if heads else 1
    # A block that straddles long heads would see the keys of both, rows of several blocks of a mask, and more
    # than one head is told to functions of the user's.
    simple = p.blocks is None and not _has_mods(p)
    packed_heads = group if p.max_queries <= rows // 2 and simple else 1
    units = heads // packed_heads
    first_task = None
    if p.query_starts is None:
        per_unit = -(-packed_heads * p.max_queries // rows)
        tasks = p.batch * units * per_unit
    else:
        array("query_starts", p.query_starts)
        array("key_starts", p.key_starts)
        each = units * -(-packed_heads * np.diff(p.query_starts) // rows)
        first_task = np.concatenate(([0], np.cumsum(each)))
        array("first_task", first_task)
        per_unit, tasks = 0, int(first_task[-1])
    multiplies = layout.multiplies(p.storage, p.bfloat16_products)
    # Panels hold KEYS rows of numbers, or of half as many words; keys that are stored as pairs need none.
    as_words = multiplies in ("pairs", "amx", "split")
    planes = 2 if multiplies == "split" else 1
    query_rows, value_rows = -(-head_dim // 2) if as_words else head_dim, value_dim
    if multiplies in ("amx", "split"):
        query_rows, value_rows = (-(-x // 16) * 16 for x in (query_rows, value_rows))
    as_stored = multiplies == p.storage and not p.bfloat16_products
    keys_lie_as_words = (
        multiplies == "pairs" and p.storage == "bfloat16" and head_dim % 2 == 0 and values["key_s"] % 2 == 0
    )
    key_panel = 0 if as_stored or keys_lie_as_words else KEYS * query_rows
    per_word = 8 // itemsize
    value_panel = KEYS // 2 * value_rows if as_words else KEYS * per_word * -(-value_dim // per_word)
    if as_stored and packed_heads * p.max_queries < PANEL_BLOCKS * rows * runtime.threads():
        value_panel = 0
    key_panel, value_panel = planes * key_panel, planes * value_panel
    slot_bytes = -(-(key_panel + value_panel) * itemsize // 64) * 64
    kept = PANEL_BYTES // runtime.threads()
    slots = min(-(-p.max_keys // KEYS), max(1, kept // slot_bytes)) if slot_bytes else 0
    score_rows = layout.score_rows(multiplies)
    scratch = ROW_BYTES * (planes * query_rows + value_rows + score_rows + STATE_ROWS)
    scratch += 8 * (rows * TABLES + WORDS) + mods.CALL_BYTES + 64 * -(-slots // 8)
    # With an ordinary scale the softmax takes the raw products, and the scale goes into its exponent.
    changes = (p.bias, p.alibi_slopes, p.sinks, p.score_mod)
    plain = 1e-30 < p.scale < 1e30 and not p.softcap and all(x is None for x in changes)
    arguments: list[Any] = [None, None]
    for i, (name, mod) in enumerate((("score", p.score_mod), ("mask", p.mask_mod))):
        if mod is not None:
            values[f"{name}_mod"], arguments[i] = mods.ready(mod, p.compute)
            array(f"{name}_arguments", arguments[i])
    states = None if p.mask_mod is None else _states(p, rows)
    if states is not None:
        array("states", states, "bhq")
    values |= {
        "tasks": tasks,
        "workspace_bytes": -(-(scratch + slots * slot_bytes + KEYS * (value_rows + 1) * itemsize) // 64) * 64,
        "slots": slots,
        "slot_bytes": slot_bytes,
        "key_panel_bytes": key_panel * itemsize,
        "key_tiles": -(-p.max_keys // KEYS),
        "batch": p.batch,
        "queries": p.max_queries,
        "head_dim": head_dim,
        "value_dim": value_dim,
        "value_bytes": p.value.shape[3] * p.value.itemsize,
        "query_rows": query_rows,
        "value_rows": value_rows,
        "group": group,
        "packed_heads": packed_heads,
        "units": units,
        "blocks": per_unit,
        "left": p.left,
        "right": p.right,
        "bias_kind": 0 if p.bias is None else STORAGE_DTYPES.index(cast(str, storage_name(p.bias.dtype))),
        "plain": plain,
        "scale": runtime.bits(p.scale),
        "softcap": runtime.bits(p.softcap),
        "log2_scale": runtime.bits((p.scale if plain else 1.0) / math.log(2)),
    }
    for name in ("mask", "bias"):
        same_heads = packed_heads == 1 or values.get(f"{name}_h") == 0
        values[f"{name}_same_rows"] = same_heads and values.get(f"{name}_q") == 0
    return records.packed(values, _WORDS), (*arguments, first_task, states)
