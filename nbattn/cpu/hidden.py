"""Additive attention on explicit vectors: the lanes are queries, as in `blocks`.

With ``x = 1 + exp(2 a) exp(2 b)`` a hidden unit's tanh(a + b) is ``1 - 2 / x``, so a score is the sum of v
less twice that of v / x. The exponentials belong to queries and keys alone; a pair of them costs one
multiply-add for x. `GROUP` of the fractions v / x are joined by ``p / x + q / y = (p y + q x) / (x y)``
before one division: some four operations for each hidden unit of a pair, where a tanh takes 20. Products
of `GROUP` large x overflow to inf, which the sum shows as NaN; such scores are done again, slowly.

A call runs twice: first the keys are projected, in tiles [unit, key], then blocks of queries take them. Where
each tile serves one block alone, the block projects it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import emitters, masks, outputs, panels, runtime, simd
from .emitters import I64, const, fma_value, load_value, pointer, splat_value, store_value
from .masks import EVERYTHING, NOTHING, SOME, WORDS
from .tiles import ROW_BYTES, product

GROUP = 8 if emitters.REGISTERS == 32 else 4
"""Fractions that share a division: its 16 cycles pass while others are joined. Their exponentials and weights
stay in registers."""
PROJECT, ATTEND = range(2)
"""What a run of the kernel is for."""
SUMS, CAREFUL_SUMS, WEIGHTS = range(3)
"""What a pass over the keys is for."""

PARAMETERS = np.dtype(
    runtime.WORK
    + [(name, np.int64) for name in (
        "workspace", "workspace_bytes", "workers", "run",
        # addresses, and strides in elements along batch, head and row
        "query", "query_b", "query_h", "query_s", "key", "key_b", "key_h", "key_s",
        "value", "value_b", "value_h", "value_s", "out", "out_b", "out_h", "out_s",
        "lse", "lse_b", "lse_h", "lse_s", "weights", "weights_b", "weights_h", "weights_s",
        "w_query", "w_query_h", "w_query_s", "w_key", "w_key_h", "w_key_s", "v", "v_h", "bias", "bias_h",
        # addresses, and strides in bytes along batch, head, query and key
        "mask", "mask_b", "mask_h", "mask_q", "mask_k", "mask_same_rows",
        "constants", "offset", "key_lengths", "hidden", "hidden_bytes",
        "queries", "query_dim", "key_dim", "value_dim", "units", "unit_rows", "x_rows",
        "heads", "kv_heads", "group", "blocks", "tiles", "left", "right",
    )]
    + [(name, np.float64) for name in ("scale", "log2_scale")]
)  # fmt: skip
NEXT_TASK, TASKS_DONE, WORKERS = (
    PARAMETERS.fields[name][1]  # type: ignore[index]
    for name in ("next_task", "tasks_done", "workers")
)

parameters_at = simd.record(PARAMETERS)

STATE_ROWS = 5
"""Rows of per-query numbers in a block's scratch."""
TABLES = 4
"""Tables of per-query addresses."""


class Scratch(NamedTuple):
    """Addresses of what one block works in. Rows have `ROW_BYTES`; tables 8 bytes a query."""

    x: int  # what is projected, transposed: x_rows rows
    q: int  # the queries' hidden units, unit_rows rows, then as many of their exponentials
    tile: int  # likewise of a tile of keys that no other block needs
    o: int  # o^T, value_dim rows
    s: int  # s^T, then its weights: a row for each key of a tile
    turned: int  # s of few queries: a row for each
    maximum: int  # one row each of a number a query: the softmax's running maximum,
    total: int  # its running total,
    rescale: int  # what older sums are multiplied by,
    first: int  # the first key that is seen,
    last: int  # one past the last
    rows: int  # one table each of addresses: what is projected,
    outs: int  # the query's output,
    masks: int  # its mask,
    weights: int  # its weights
    seen: int  # a word of bits for each key of a tile: which queries the mask lets see it
    finite: int  # one tile's values without NaN and inf


def _joiner(number: Any) -> Any:
    """``join(a, e, v, s, count)``: add the fractions of one group of hidden units to `count` rows of sums.

    Row i of one vector of exponentials lies at ``a + i * ROW_BYTES``, the numbers it meets at ``e + i *
    ROW_BYTES``, one for each row of sums at s; ``v`` holds the group's weights.
    """
    size = number.bitwidth // 8

    @intrinsic
    def join(typingctx: Any, a: Any, e: Any, v: Any, s: Any, count: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            a, e, v, s, count = args
            scalar = context.get_value_type(number)
            t = ir.VectorType(scalar, emitters.REGISTER_BYTES // size)
            one = const(t, 1.0)

            def number_at(address: Any, shift: int) -> Any:
                return splat_value(b, t, load_value(b, pointer(b, b.add(address, const(I64, shift)), scalar)))

            own = [load_value(b, pointer(b, b.add(a, const(I64, i * ROW_BYTES)), t)) for i in range(GROUP)]
            weights = [number_at(v, i * size) for i in range(GROUP)]
            with cgutils.for_range(b, count) as loop:
                met = b.add(e, b.mul(loop.index, const(I64, size)))
                xs = [fma_value(b, own[i], number_at(met, i * ROW_BYTES), one) for i in range(GROUP)]
                fractions = list(zip(weights, xs, strict=True))
                while len(fractions) > 1:
                    fractions = [
                        (fma_value(b, p, y, b.fmul(q, x)), b.fmul(x, y))
                        for (p, x), (q, y) in zip(fractions[::2], fractions[1::2], strict=True)
                    ]
                ((top, below),) = fractions
                # A product that overflows would make its fraction 0: make it NaN.
                top = fma_value(b, below, const(t, 0.0), top)
                place = pointer(b, b.add(s, b.mul(loop.index, const(I64, ROW_BYTES))), t)
                store_value(b, b.fadd(load_value(b, place), b.fdiv(top, below)), place)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return join


@intrinsic
def _exponential(typingctx: Any, x: Any) -> Any:
    """e**(2 x); NaN where it would have lost digits, or be 0 where another makes up for it."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        t = args[0].type
        twice = b.fadd(args[0], args[0])
        least = -124 if t.element == ir.FloatType() else -1020
        is_normal = b.fcmp_ordered(">=", twice, const(t, least * math.log(2)))
        return b.select(is_normal, emitters.exp_value(b, twice), const(t, float("nan")))

    return x(x), codegen


@intrinsic
def _finite_or(typingctx: Any, x: Any, y: Any) -> Any:
    """x where it is finite, else y."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, y = args
        return b.select(b.fcmp_ordered("==", b.fsub(x, x), const(x.type, 0.0)), x, y)

    return x(x, y), codegen


def build(storage: str, jit: Any, inline: Any) -> Callable[[Any], Any]:
    """The kernel for float32 or float64, as a function of its parameters' address."""
    dtype: Any = np.float64 if storage == "float64" else np.float32
    number = types.float64 if storage == "float64" else types.float32
    size = np.dtype(dtype).itemsize
    lanes = simd.lanes(dtype)
    register = emitters.REGISTER_BYTES
    block_rows = ROW_BYTES // size
    infinity = dtype(np.inf)
    load, store, get, put = simd.loads(storage)
    get_int, put_int = simd.scalars(types.int64)
    get_index, put_index = simd.scalars(types.int64 if size == 8 else types.int32)
    index = np.int64 if size == 8 else np.int32
    multiply = product(jit, number, rescale=False, pairs=False)
    accumulate = product(jit, number, rescale=True, pairs=False)
    join = _joiner(number)
    look, hide, masked = masks.build(jit, dtype)
    read_square = panels.rows_in(lanes, storage)
    add, sub, fma, div, splat = simd.add, simd.sub, simd.fma, simd.div, simd.splat
    greater, exp2_product = simd.greater, simd.exp2_product
    lowest = emitters.exp2_floor(dtype)
    all_finite, write_rows, write_weights = outputs.build(jit, storage, exp2_product)

    @jit
    def scratch_at(p, x):
        q = x + p.x_rows * ROW_BYTES
        tile = q + p.hidden_bytes
        o = tile + p.hidden_bytes
        s = o + p.value_dim * ROW_BYTES
        turned = s + block_rows * ROW_BYTES
        row = turned + block_rows * ROW_BYTES
        table, step = row + STATE_ROWS * ROW_BYTES, block_rows * 8
        seen = table + TABLES * step
        return Scratch(x, q, tile, o, s, turned, row, row + ROW_BYTES, row + 2 * ROW_BYTES,
                       row + 3 * ROW_BYTES, row + 4 * ROW_BYTES, table, table + step, table + 2 * step,
                       table + 3 * step, seen, seen + WORDS * 8)  # fmt: skip

    @jit
    def transpose(table, columns, rows, target):
        """rows x columns, whose rows lie where the table says -> target, one row for each column."""
        whole = columns // lanes * lanes
        for r in range(0, rows, lanes):
            for c in range(0, whole, lanes):
                read_square(table + 8 * r, c * size, target + c * ROW_BYTES + r * size)
        for r in range(rows if whole < columns else 0):
            a = get_int(table + 8 * r)
            for c in range(whole, columns):
                put(target + c * ROW_BYTES + r * size, get(a + c * size))

    @jit
    def project(p, w, x, x_s, columns, matrix, matrix_s, bias, rows, target):
        """The hidden units of `rows` rows, and their exponentials; lanes beyond the last row repeat it."""
        vectors = (rows + lanes - 1) // lanes
        for r in range(vectors * lanes):
            put_int(w.rows + 8 * r, x + min(r, rows - 1) * x_s * size)
        transpose(w.rows, columns, vectors * lanes, w.x if matrix != 0 else target)
        if matrix != 0:
            multiply(matrix, 2 * matrix_s, matrix_s, 1, p.units, w.x, target, vectors, columns, 0)
        for d in range(p.unit_rows):
            for v in range(vectors):
                t = target + d * ROW_BYTES + v * register
                e = splat(dtype(0))
                if d < p.units:
                    a = load(t)
                    if bias != 0:
                        a = add(a, splat(get(bias + d * size)))
                        store(t, a)
                    e = _exponential(a)
                store(t + p.unit_rows * ROW_BYTES, e)

    @jit
    def key_tile(p, w, b, shared, key0, target):
        rows = min(block_rows, get_int(p.key_lengths + 8 * b) - key0)
        if rows > 0:
            key = p.key + (b * p.key_b + shared * p.key_h + key0 * p.key_s) * size
            matrix = p.w_key + shared * p.w_key_h * size if p.w_key != 0 else 0
            project(p, w, key, p.key_s, p.key_dim, matrix, p.w_key_s, 0, rows, target)

    @jit
    def set_up(p, w, b, h, row0, rows):
        """Fill the per-row state; (first, last) key that any row sees, (first, last) that all rows see.

        Lanes beyond the last row repeat it.
        """
        offset, length = get_int(p.offset + 8 * b), get_int(p.key_lengths + 8 * b)
        any_first, any_last, all_first, all_last = length, 0, 0, length
        for r in range((rows + lanes - 1) // lanes * lanes):
            i = row0 + min(r, rows - 1)
            first = min(max(i + offset - p.left, 0), length)
            last = min(max(i + offset + p.right + 1, 0), length)
            if first < last:
                any_first, any_last = min(any_first, first), max(any_last, last)
                all_first, all_last = max(all_first, first), min(all_last, last)
            else:
                first, last, all_last = 0, 0, 0
            put_index(w.first + r * size, index(first))
            put_index(w.last + r * size, index(last))
            put(w.maximum + r * size, -infinity)
            put(w.total + r * size, dtype(0))
            put_int(w.outs + 8 * r, p.out + (b * p.out_b + h * p.out_h + i * p.out_s) * size)
            put_int(w.masks + 8 * r, p.mask + b * p.mask_b + h * p.mask_h + i * p.mask_q)
            weights = p.weights + (b * p.weights_b + h * p.weights_h + i * p.weights_s) * size
            put_int(w.weights + 8 * r, weights)
        return any_first // block_rows * block_rows, any_last, all_first, all_last

    @jit
    def join_all(p, v, a, e, count, vectors, s):
        """The sums of v / x for each vector at a and each number at e -> s."""
        for j in range(count):
            for c in range(vectors):
                store(s + j * ROW_BYTES + c * register, splat(dtype(0)))
        for d in range(0, p.unit_rows, GROUP):
            row = (p.unit_rows + d) * ROW_BYTES
            for c in range(vectors):
                join(a + row + c * register, e + row, v + d * size, s + c * register, count)

    @jit
    def mend(p, v, a, e, count, vectors, s):
        """Do again, by the hidden units themselves, what is not finite."""
        zero, one = splat(dtype(0)), splat(dtype(1))
        seen = one
        for j in range(count):
            for c in range(vectors):
                seen = fma(load(s + j * ROW_BYTES + c * register), zero, seen)
        if simd.all_ones(seen):
            return
        for j in range(count):
            for c in range(vectors):
                t = s + j * ROW_BYTES + c * register
                if simd.all_ones(fma(load(t), zero, one)):
                    continue
                total = zero
                for d in range(p.units):
                    x = add(load(a + d * ROW_BYTES + c * register), splat(get(e + d * ROW_BYTES + j * size)))
                    total = add(total, div(splat(get(v + d * size)), add(one, simd.exp(add(x, x)))))
                store(t, _finite_or(load(t), total))

    @jit
    def score(p, w, v, hidden, keys, rows, vectors):
        """s^T of one tile of keys, whose hidden units lie at `hidden`."""
        key_vectors = (keys + lanes - 1) // lanes
        if keys * vectors <= rows * key_vectors:
            join_all(p, v, w.q, hidden, keys, vectors, w.s)
            mend(p, v, w.q, hidden, keys, vectors, w.s)
            return
        # Few queries would leave lanes idle that keys can fill. The sums have the same bits.
        join_all(p, v, hidden, w.q, rows, key_vectors, w.turned)
        mend(p, v, hidden, w.q, rows, key_vectors, w.turned)
        for j in range(keys):
            t, x = w.s + j * ROW_BYTES, w.turned + j * size
            for c in range(vectors):
                store(t + c * register, splat(get(x)))
            for r in range(1, rows):
                put(t + r * size, get(x + r * ROW_BYTES))

    @jit
    def cover(p, w, key0, keys, vectors, all_first, all_last, seen):
        """Make the scores of what a row does not see -inf."""
        if seen == SOME:
            hide(w, keys, vectors)
        if key0 < all_first or key0 + keys > all_last:
            for c in range(vectors):
                first, last = w.first + c * register, w.last + c * register
                for j in range(keys):
                    t = w.s + j * ROW_BYTES + c * register
                    store(t, simd.outside(load(t), key0 + j, first, last))

    @jit
    def soften(p, w, keys, vectors):
        """s^T -> unnormalised weights; moves the maximum and total, leaves the factor for older sums."""
        scale, floor = splat(dtype(p.log2_scale)), splat(dtype(lowest / p.log2_scale))
        for c in range(vectors):
            s = w.s + c * register
            before = load(w.maximum + c * register)
            top = before
            for j in range(keys):
                top = greater(load(s + j * ROW_BYTES), top)
            zero_point = simd.finite_or_zero(top)
            rescale = exp2_product(sub(before, zero_point), scale, floor)
            # A sum of its own for this tile: added one by one to a large total, small weights would be lost.
            total = splat(dtype(0))
            for j in range(keys):
                x = exp2_product(sub(load(s + j * ROW_BYTES), zero_point), scale, floor)
                total = add(total, x)
                store(s + j * ROW_BYTES, x)
            store(w.total + c * register, fma(load(w.total + c * register), rescale, total))
            store(w.maximum + c * register, top)
            store(w.rescale + c * register, rescale)

    @jit
    def add_values(p, w, value, stride, keys, vectors):
        """o^T = o^T * rescale + v^T p^T"""
        accumulate(value, 2, 1, stride, p.value_dim, w.s, w.o, vectors, keys, w.rescale)

    @jit
    def add_visible_values(p, w, value, key0, keys, rows, vectors):
        """`add_values`, where what is not finite reaches only the rows that see it."""
        for j in range(keys):
            for d in range(p.value_dim):
                y = get(value + (j * p.value_s + d) * size)
                put(w.finite + (j * p.value_dim + d) * size, y if y - y == 0 else dtype(0))
        add_values(p, w, w.finite, p.value_dim, keys, vectors)
        for j in range(keys):
            for d in range(p.value_dim):
                y = get(value + (j * p.value_s + d) * size)
                if y - y == 0:
                    continue
                for r in range(rows):
                    here = key0 + j
                    seen = get_index(w.first + r * size) <= here and here < get_index(w.last + r * size)
                    if seen and (p.mask == 0 or not masked(p, w, r, here)):
                        t = w.o + d * ROW_BYTES + r * size
                        put(t, get(t) + get(w.s + j * ROW_BYTES + r * size) * y)

    @jit
    def finish(p, w, b, h, row0, rows):
        """o^T / total -> out, and lse."""
        write_rows(p, w, rows)
        for r in range(rows if p.lse != 0 else 0):
            total = get(w.total + r * size)
            top = np.float64(get(w.maximum + r * size)) * p.scale + get_double(p.constants + 8 * h)
            a = p.lse + (b * p.lse_b + h * p.lse_h + (row0 + r) * p.lse_s) * size
            put(a, -infinity if total == 0 else dtype(top + math.log(np.float64(total))))

    get_double, _ = simd.scalars(types.float64)

    @inline
    def block(p, w, b, h, row0):
        rows = min(block_rows, p.queries - row0)
        vectors = (rows + lanes - 1) // lanes
        shared = h // p.group
        v = p.v + h * p.v_h * size
        hidden = p.hidden + (b * p.kv_heads + shared) * p.tiles * p.hidden_bytes
        value = p.value + (b * p.value_b + shared * p.value_h) * size
        query = p.query + (b * p.query_b + h * p.query_h + row0 * p.query_s) * size
        matrix = p.w_query + h * p.w_query_h * size if p.w_query != 0 else 0
        bias = p.bias + h * p.bias_h * size if p.bias != 0 else 0
        project(p, w, query, p.query_s, p.query_dim, matrix, p.w_query_s, bias, rows, w.q)
        stage = SUMS
        while True:
            if stage != WEIGHTS:
                any_first, any_last, all_first, all_last = set_up(p, w, b, h, row0, rows)
                for d in range(p.value_dim):
                    for c in range(vectors):
                        store(w.o + d * ROW_BYTES + c * register, splat(dtype(0)))
            for key0 in range(any_first, any_last, block_rows):
                keys = min(block_rows, any_last - key0)
                seen = look(p, w, key0, keys, vectors * lanes) if p.mask != 0 else EVERYTHING
                if seen == NOTHING:
                    continue
                tile = w.tile
                if p.hidden == 0:
                    key_tile(p, w, b, shared, key0, tile)
                else:
                    tile = hidden + key0 // block_rows * p.hidden_bytes
                score(p, w, v, tile, keys, rows, vectors)
                cover(p, w, key0, keys, vectors, all_first, all_last, seen)
                if stage == WEIGHTS:
                    write_weights(p, w, key0, keys, rows, vectors)
                    continue
                soften(p, w, keys, vectors)
                values = value + key0 * p.value_s * size
                if stage == SUMS:
                    add_values(p, w, values, p.value_s, keys, vectors)
                else:
                    add_visible_values(p, w, values, key0, keys, rows, vectors)
            # A non-finite value meets a weight of 0 where it is masked, and 0 * inf is NaN. It shows in the
            # sums: only then the block is done again, with every masked value left out.
            if stage == SUMS and not all_finite(p, w, vectors):
                stage = CAREFUL_SUMS
                continue
            if stage != WEIGHTS:
                finish(p, w, b, h, row0, rows)
                if p.weights != 0:
                    stage = WEIGHTS
                    continue
            return

    def work(address):
        p = parameters_at(address)
        w = scratch_at(p, p.workspace + simd.fetch_add(address + WORKERS) * p.workspace_bytes)
        finished_last = 0
        while True:
            t = simd.fetch_add(address + NEXT_TASK)
            if t >= p.tasks:
                return finished_last
            if p.run == PROJECT:
                head, tile = t // p.tiles, t % p.tiles
                target = p.hidden + t * p.hidden_bytes
                key_tile(p, w, head // p.kv_heads, head % p.kv_heads, tile * block_rows, target)
            else:
                # Last blocks first: causal ones see most keys.
                head, number = t // p.blocks, p.blocks - 1 - t % p.blocks
                block(p, w, head // p.heads, head % p.heads, number * block_rows)
            if simd.fetch_add(address + TASKS_DONE) + 1 == p.tasks:
                finished_last = 1

    return work
