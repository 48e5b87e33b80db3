"""Users' functions as kernels of their own, which attention's kernel calls through their addresses.

One call does a tile of scores, 128 keys x 64 queries of float32, so that calling costs nothing, attention's
kernel is never compiled anew, and a function of a few lines compiles in a fifth of a second. The inner loop
runs over the queries, which lie side by side in a tile: all that changes along it is an index that grows by
one, and LLVM makes vectors of it. For that the loop must store to nothing that it might read from: the tile
is a pointer that is said to be the only one to its memory.
"""

from __future__ import annotations

import dis
from functools import lru_cache, partial
from types import CodeType
from typing import Any

import numpy as np
from llvmlite import ir
from numba import from_dtype, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from ..problem import Mod
from ..scores import GIVES
from . import elementary, functions, records, runtime, simd, team
from .emitters import I8, I32, I64, const, load_value, pointer
from .masks import EVERYTHING, NOTHING, SOME, WORDS, get_byte
from .tiles import ROW_BYTES

CALL = np.dtype(
    [(name, np.int64) for name in (
        "arguments",  # the address of the function's arguments: a word that tells of a failure, then each one
        "target",  # of the tile, or of a word of 64 queries for each key
        "batch", "head", "query0", "rows", "key0", "keys",
        "before",  # what other masks show of the tile: SOME where the words say
        "states",  # the address of what is known of the block's tiles, a byte each, or 0
    )]
    + [("scale", np.float64)]  # what a score is multiplied with first
)  # fmt: skip
"""What a kernel of this file is called with: the address of such a record."""
CALL_BYTES = -(-CALL.itemsize // 64) * 64
ARGUMENTS, TARGET, BATCH, HEAD, QUERY0, ROWS, KEY0, KEYS, BEFORE, STATES, SCALE = range(0, CALL.itemsize, 8)

call_at = simd.record(CALL)
SMALL, COUNT = (1 << 62) - 1, 255
"""Bits of an index, of which LLVM then knows that it is not negative, so that `table[q_index]` reads a run of
memory: comparing `ids[q_index] == ids[kv_index]` took 2.6 us a tile without, and 1.2 with; and of a count."""
get_int, put_int = simd.scalars(types.int64)
put_float = simd.scalars(types.float64)[1]


# --- from other kernels -------------------------------------------------------------------------------------


@intrinsic
def enter(typingctx: Any, entry: Any, call: Any) -> Any:
    """Run a kernel of this file from its entry; where the function raises, leave word and return 0."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        error = I8.as_pointer()
        kernel = ir.FunctionType(I32, [I64.as_pointer(), error.as_pointer(), I64])
        result, place = (cgutils.alloca_once(b, t) for t in (I64, error))
        b.store(const(I64, 0), result)
        status = b.call(b.inttoptr(args[0], kernel.as_pointer()), [result, place, args[1]])
        with b.if_then(b.icmp_signed("!=", status, const(I32, 0)), likely=False):
            arguments = load_value(b, pointer(b, args[1], I64))
            b.store(const(I64, 1), pointer(b, arguments, I64))
            b.store(const(I64, 0), result)
        return b.load(result)

    return types.int64(types.int64, types.int64), codegen


def callers(jit: Any) -> tuple[Any, Any]:
    """The compiled functions ``modify(call, entry, arguments, tile, key0, keys, scale)`` and ``look(call,
    entry, arguments, words, key0, keys, before)``, which answers NOTHING, SOME or EVERYTHING, for SOME with
    words that say what.

    `call` is the address of a `CALL` that names batch, head, queries and rows already.
    """

    @jit
    def modify(call, entry, arguments, tile, key0, keys, scale):
        put_int(call + ARGUMENTS, arguments)
        put_int(call + TARGET, tile)
        put_int(call + KEY0, key0)
        put_int(call + KEYS, keys)
        put_float(call + SCALE, np.float64(scale))
        enter(entry, call)

    @jit
    def look(call, entry, arguments, words, key0, keys, before):
        put_int(call + ARGUMENTS, arguments)
        put_int(call + TARGET, words)
        put_int(call + KEY0, key0)
        put_int(call + KEYS, keys)
        put_int(call + BEFORE, before)
        return enter(entry, call)

    return modify, look


# --- a function and its arguments ---------------------------------------------------------------------------


def ready(mod: Mod, dtype: Any) -> tuple[int, NDArray[np.int64]]:
    """The entry of a function's kernel, compiled at need, and its arguments; `dtype` is the scores'."""
    if mod.name == "mask_mod":
        dtype = np.float64  # no score: numbers as Python has them
    kernel = runtime.compiled(*named(mod, dtype))
    words = [0]
    for x in mod.arguments:
        if isinstance(x, np.ndarray):
            words += [runtime.address(x), *x.shape]
        else:
            words.append(runtime.bits(x) if isinstance(x, float) else int(x))
    return runtime.entry(kernel), np.array(words, np.int64)


def check_done(mod: Mod, words: NDArray[np.int64]) -> None:
    """After a call: nothing was raised."""
    if words[0]:
        msg = f'{mod.label} raised an exception; backend="reference" shows which'
        raise ValueError(msg)


def depends_on(mod: Mod) -> tuple[bool, bool]:
    """Whether a mask_mod reads the batch, and the head."""
    code = mod.function.__code__
    if code.co_argcount < 2:
        return True, True
    return tuple(name in _read(code) for name in code.co_varnames[:2])  # type: ignore[return-value]


@lru_cache(256)
def _read(code: CodeType) -> frozenset[str]:
    """The names of variables that a function reads; some instructions read two."""
    names = [i.argval if isinstance(i.argval, tuple) else (i.argval,) for i in dis.get_instructions(code)]
    return frozenset(name for each in names for name in each if isinstance(name, str)).union(code.co_cellvars)


def named(mod: Mod, dtype: Any) -> tuple[str, Any, bool]:
    argument_types = tuple(_type_of(x, dtype) for x in mod.arguments)
    key, kept = functions.digest(mod.function, argument_types)
    build = partial(_build, mod, dtype, argument_types)
    if kept:
        _kept.append(kept)
    return f"mods-{mod.name}-{np.dtype(dtype).name}-{key[:32]}", build, not kept


_kept: list[Any] = []
"""Objects that the name of a kernel in memory tells from others by where they lie."""


def _type_of(x: Any, dtype: Any) -> Any:
    if isinstance(x, np.ndarray):
        return types.Array(from_dtype(x.dtype), x.ndim, "C", readonly=True)
    if isinstance(x, bool):
        return types.boolean
    return from_dtype(np.dtype(dtype)) if isinstance(x, float) else types.int64


def _arguments(argument_types: tuple[Any, ...]) -> Any:
    """``read(address)``: the arguments as a tuple."""
    result = types.Tuple(argument_types)

    @intrinsic
    def read(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            words = pointer(b, args[0], I64)
            position = 1

            def word() -> Any:
                nonlocal position
                position += 1
                return b.load(b.gep(words, [const(I64, position - 1)]))

            values = []
            for t in argument_types:
                if isinstance(t, types.Array):
                    data, shape = word(), [word() for _ in range(t.ndim)]
                    values.append(_array(context, b, t, data, shape))
                elif isinstance(t, types.Float):
                    values.append(context.cast(b, b.bitcast(word(), ir.DoubleType()), types.float64, t))
                else:
                    values.append(context.cast(b, word(), types.int64, t))
            return context.make_tuple(b, result, values)

        return result(types.int64), codegen

    return read


def _array(context: Any, b: Any, t: Any, data: Any, shape: list[Any]) -> Any:
    from numba.np.arrayobj import make_array, populate_array  # only compiling needs it: 0.1 s

    element = context.get_data_type(t.dtype)
    size = const(I64, context.get_abi_sizeof(element))
    strides: list[Any] = []
    stride = size
    for n in reversed(shape):
        strides.insert(0, stride)
        stride = b.mul(stride, n)
    array = make_array(t)(context, b)
    data = b.inttoptr(data, element.as_pointer())
    populate_array(array, data=data, shape=shape, strides=strides, itemsize=size, meminfo=None)
    return array._getvalue()


# --- the kernels --------------------------------------------------------------------------------------------


def _build(mod: Mod, dtype: Any, argument_types: tuple[Any, ...], jit: Any, inline: Any) -> Any:
    """The kernel of one function: of a `CALL`'s address, whose answer only a mask_mod gives."""
    # Pasted into the loop by LLVM, and without reference counts: these would keep it from making vectors.
    paste = partial(jit, forceinline=True, _nrt=False)
    translation = functions.translate(
        mod.function, partial(paste, fastmath=runtime.FAST_MATH), elementary.functions(paste, dtype), dtype
    )
    number = from_dtype(np.dtype(dtype))
    takes = (*[number] * (mod.name == "score_mod"), *[types.int64] * 4, *argument_types)
    returns = functions.compiled(translation, takes, mod.function, mod.label)
    kinds = (types.Boolean, types.Integer, *[types.Float] * (mod.name == "score_mod"))
    if not isinstance(returns, kinds):
        named = {types.Array: "an array", types.BaseTuple: "a tuple", types.NoneType: "None"}
        what = next((text for kind, text in named.items() if isinstance(returns, kind)), str(returns))
        msg = f"{mod.label} returns {what}; expected {GIVES[mod.name]}"
        raise TypeError(msg)
    build = _build_score if mod.name == "score_mod" else _build_mask
    return build(translation, _arguments(argument_types), number, dtype, paste)


@intrinsic
def _only_pointer(typingctx: Any) -> Any:
    """Say that the function's first argument is the only pointer to its memory."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        b.function.args[2].add_attribute("noalias")  # behind where results and errors go
        return context.get_dummy_value()

    return types.void(), codegen


def _pointer_to(number: Any) -> Any:
    @intrinsic
    def cast(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            return b.inttoptr(args[0], context.get_data_type(number).as_pointer())

        return types.CPointer(number)(types.int64), codegen

    return cast


def _build_score(function: Any, read: Any, number: Any, dtype: Any, paste: Any) -> Any:
    row = ROW_BYTES // np.dtype(dtype).itemsize
    tile_at = _pointer_to(number)

    @paste
    def modify(tile, arguments, batch, head, query0, rows, key0, keys, scale):
        _only_pointer()
        for j in range(keys):
            for r in range(rows):
                x = tile[row * j + r] * scale
                tile[row * j + r] = dtype(function(x, batch, head, query0 + r, key0 + j, *arguments))

    def kernel(address):
        c = call_at(address)
        arguments = read(c.arguments)
        query0, rows, key0, keys = c.query0 & SMALL, c.rows & COUNT, c.key0 & SMALL, c.keys & COUNT
        batch, head = c.batch & SMALL, c.head & SMALL
        modify(tile_at(c.target), arguments, batch, head, query0, rows, key0, keys, dtype(c.scale))
        return 0

    return kernel


@intrinsic
def _line(typingctx: Any) -> Any:
    """64 bytes of the function's own, all 0."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        t = ir.ArrayType(I8, 64)
        place = cgutils.alloca_once(b, t)
        b.store(ir.Constant(t, None), place)
        return b.bitcast(place, I8.as_pointer())

    return types.CPointer(types.int8)(), codegen


@intrinsic
def _bits(typingctx: Any, line: Any) -> Any:
    """Bit i is set where byte i is not 0."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        t = ir.VectorType(I8, 64)
        x = b.load(b.bitcast(args[0], t.as_pointer()), align=1)
        return b.bitcast(b.icmp_unsigned("!=", x, const(t, 0)), I64)

    return types.int64(line), codegen


def _build_mask(function: Any, read: Any, number: Any, dtype: Any, paste: Any) -> Any:
    def kernel(address):
        c = call_at(address)
        arguments = read(c.arguments)
        words, before, batch, head = c.target, c.before, c.batch & SMALL, c.head & SMALL
        query0, rows, key0, keys = c.query0 & SMALL, c.rows & COUNT, c.key0 & SMALL, c.keys & COUNT
        here = -1 if rows == 64 else (1 << rows) - 1
        some, every = 0, -1
        line = _line()
        for j in range(keys):
            for r in range(rows):
                line[r] = bool(function(batch, head, query0 + r, key0 + j, *arguments))
            word = _bits(line)
            if before == SOME:
                word &= get_int(words + 8 * j)
            put_int(words + 8 * j, word)
            some, every = some | word, every & (word | ~here)
        if some == 0:
            return NOTHING
        return EVERYTHING if every == -1 else SOME

    return kernel


# --- whole masks --------------------------------------------------------------------------------------------

SURVEY = np.dtype(
    runtime.WORK
    + [(name, np.int64) for name in (
        "workers", "workspace", "entry", "arguments", "heads", "queries", "keys",
        "rows", "columns",  # of a block
        "states", "words", "first",  # addresses: a byte a block, 64 words a block, each row's first of these
    )]
)  # fmt: skip
"""The parameters of the kernel that asks a mask_mod for everything; a task is a row of blocks."""
_survey = records.words_of(SURVEY)
SURVEY_NEXT, SURVEY_DONE, SURVEY_WORKERS = (8 * _survey[n] for n in ("next_task", "tasks_done", "workers"))
SURVEY_BYTES = CALL_BYTES + 8 * WORDS


def _build_survey(jit: Any, inline: Any) -> Any:
    survey_at = simd.record(SURVEY)
    put_byte = simd.scalars(types.int8)[1]
    _, look = callers(jit)

    @jit
    def row(p, t, call):
        words = call + CALL_BYTES
        per_head = (p.queries + p.rows - 1) // p.rows
        query0, columns = t % per_head * p.rows, (p.keys + p.columns - 1) // p.columns
        put_int(call + BATCH, t // per_head // p.heads)
        put_int(call + HEAD, t // per_head % p.heads)
        put_int(call + QUERY0, query0)
        put_int(call + ROWS, min(p.rows, p.queries - query0))
        target = p.words + 512 * get_int(p.first + 8 * t) if p.words != 0 else 0
        for c in range(columns):
            place, keys = p.states + t * columns + c, min(p.columns, p.keys - c * p.columns)
            if target == 0:
                put_byte(place, look(call, p.entry, p.arguments, words, c * p.columns, keys, EVERYTHING))
            elif get_byte(place) == SOME:
                look(call, p.entry, p.arguments, target, c * p.columns, keys, EVERYTHING)
                target += 512

    def survey(address):
        p = survey_at(address)
        call = p.workspace + simd.fetch_add(address + SURVEY_WORKERS) * SURVEY_BYTES
        finished_last = 0
        while True:
            t = simd.fetch_add(address + SURVEY_NEXT)
            if t >= p.tasks:
                return finished_last
            row(p, t, call)
            if simd.fetch_add(address + SURVEY_DONE) + 1 == p.tasks:
                finished_last = 1

    return survey


def states(mod: Mod, shape: tuple[int, int, int, int], rows: int, columns: int) -> NDArray[np.uint8]:
    """What a mask_mod shows of each block of so many queries and keys, (B, H, blocks, blocks)."""
    batch, heads, queries, keys = shape
    result = np.empty((batch, heads, -(-queries // rows), -(-keys // columns)), np.uint8)
    _run_survey(mod, shape, rows, columns, result)
    return result


def block_words(mod: Mod, shape: tuple[int, int, int, int]) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
    """What a mask_mod shows of each block of 64 queries and keys of a shape (B, H, Sq, Sk).

    Its `states`, and for each block of which it shows SOME, in their order, 64 words (blocks, 64): bit r of
    word j says whether the block's query r sees its key j. What lies beyond the last query or key is 0.
    """
    seen = states(mod, shape, 64, 64)
    some = (seen == SOME).sum(axis=-1).reshape(-1)
    first = np.concatenate(([0], np.cumsum(some)))
    words = np.zeros((int(first[-1]), 64), np.uint64)
    if words.size:
        _run_survey(mod, shape, 64, 64, seen, words, first)
    return seen, words


def _run_survey(
    mod: Mod, shape: tuple[int, int, int, int], rows: int, columns: int, states: NDArray[np.uint8],
    words: NDArray[np.uint64] | None = None, first: NDArray[np.int64] | None = None,
) -> None:  # fmt: skip
    if states.size == 0:
        return
    batch, heads, queries, keys = shape
    entry, arguments = ready(mod, np.float64)
    tasks = batch * heads * states.shape[2]
    work = batch * heads * queries * keys
    helpers = 0 if work < SERIAL_WORK else min(runtime.threads(), tasks) - 1
    memory, workspace = runtime.scratch((helpers + 1) * SURVEY_BYTES)
    values = {
        "tasks": tasks, "workspace": workspace, "entry": entry, "arguments": runtime.address(arguments),
        "heads": heads, "queries": queries, "keys": keys, "rows": rows, "columns": columns,
        "states": runtime.address(states), "words": 0 if words is None else runtime.address(words),
        "first": 0 if first is None else runtime.address(first),
    }  # fmt: skip
    kernel = runtime.compiled("mods-survey", _build_survey)
    team.run(kernel, records.packed(values, _survey), helpers, (memory, states, words, first, arguments, mod))
    runtime.keep(memory)
    check_done(mod, arguments)


SERIAL_WORK = 1 << 18
"""Scores of which one thread makes bits before a second one is awake."""
