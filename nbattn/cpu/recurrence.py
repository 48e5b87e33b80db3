"""The kernel of linear attention: the recurrence itself, with a block of the state in the first-level cache.

The lanes are columns of values, which never meet: threads share out (batch, key head, block of columns). For
each token, or two at once, one sweep over the rows of the state loads each into `WIDE` vectors, decays it,
adds ``key * value`` and multiplies it into the output's sums, which stay in registers: two multiply-adds for
each number of the state, three with a delta rule, which recalls for the next token in the same sweep. Chunks
of 64 tokens, which tensor cores like better, take 1.5 to 2 times as many at head_dim 64. The rest follows: no
ratio of decays overflows, no later token is touched before its time, a cut of the sequence changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import emitters, runtime, simd
from .emitters import I8, I32, I64, const, fma_value, load_value, pointer, splat_value, store_value
from .tiles import WIDE

PITCH = WIDE * emitters.REGISTER_BYTES
"""Bytes from one row of a block of columns to the next: of the state, of values and of outputs."""
CHUNK = 16
"""Tokens between two looks at what a chunk needs; with a delta rule each begins with recalling."""
COPIED = 2
"""Tokens of a chunk that has to be copied first, so that the processor's own prefetching sees steady reads: a
token of 64 x 64 took 178 ns, 235 in chunks of 16, and where nothing is copied 146."""
SEGMENT = 128
"""Queries of a task that only reads the state."""
FEATURES = ("identity", "elu", "relu")
ELU, RELU = 1, 2
UPDATE, READ = 1, 2
"""What a run does with the state; both at once where the output is causal."""

PARAMETERS = np.dtype(
    runtime.WORK
    + [(name, np.int64) for name in (
        "workspace", "workspace_bytes", "workers",
        # addresses, and strides in bytes
        "query", "query_b", "query_h", "query_s", "key", "key_b", "key_h", "key_s",
        "value", "value_b", "value_h", "value_s", "out", "out_b", "out_h", "out_s",
        "decay", "decay_b", "decay_h", "decay_s", "decay_f", "beta", "beta_b", "beta_h", "beta_s",
        "state", "state_b", "state_h", "state_f", "end", "end_b", "end_h", "end_f",
        "steps", "tokens", "features", "row", "columns", "width", "panels", "segments", "heads", "group",
        "chunk", "feature", "normalize",
    )]
    + [("scale", np.float64)]
)  # fmt: skip
parameters_at = simd.record(PARAMETERS)
NEXT_TASK, TASKS_DONE, WORKERS = (
    PARAMETERS.fields[name][1]  # type: ignore[index]
    for name in ("next_task", "tasks_done", "workers")
)

FLUSH = 0x8040
"""The bits of x86's MXCSR that make denormal operands and results 0."""


@intrinsic
def _float_mode(typingctx: Any, mode: Any) -> Any:
    """Set MXCSR to `mode`, or where it is -1 let it flush denormals to 0 too; what it was before.

    A state that decays and is never added to again ends among the denormals, and stays there: its product
    with 0.9 rounds to itself. Each takes Intel's cores some 150 cycles, in all 40 times a token's time.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if not emitters.X86:
            return const(I64, 0)
        place = cgutils.alloca_once(b, I32)
        access = ir.FunctionType(ir.VoidType(), [I8.as_pointer()])
        read, write = (
            cgutils.get_or_insert_function(b.module, access, f"llvm.x86.sse.{name}mxcsr")
            for name in ("st", "ld")
        )
        pointer_to_it = b.bitcast(place, I8.as_pointer())
        b.call(read, [pointer_to_it])
        before = b.load(place)
        flushing = b.or_(before, const(I32, FLUSH))
        mode = b.trunc(args[0], I32)
        b.store(b.select(b.icmp_signed("<", args[0], const(I64, 0)), flushing, mode), place)
        b.call(write, [pointer_to_it])
        return b.zext(before, I64)

    return types.int64(types.int64), codegen


def _sweep(
    number: Any, vectors: int, *, tokens: int, updates: bool, reads: bool, decays: bool, recalls: bool
) -> Any:
    """One sweep over the rows of the state for so many tokens::

        state = decay * state + key * value            `updates`, `decays`
        out = query @ state                            `reads`
        value = beta * (value - recalled)              `recalls`, before;
        recalled = following @ state                   and after, for the next token

    `state`, `value`, `out` and `recalled` have `vectors` vectors of columns; rows of the state are `PITCH`
    bytes apart. What ends in `_row` are the bytes from one token to the next; `out` is multiplied by `scale`.
    """
    size = number.bitwidth // 8

    @intrinsic
    def sweep(
        typingctx: Any, state: Any, rows: Any, key: Any, key_row: Any, decay: Any, decay_row: Any, value: Any,
        value_row: Any, query: Any, query_row: Any, out: Any, out_row: Any, scale: Any, following: Any,
        recalled: Any, beta: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            state, rows, key, key_row, decay, decay_row, value, value_row, *args = args
            query, query_row, out, out_row, scale, following, recalled, beta = args
            scalar = context.get_value_type(number)
            t = ir.VectorType(scalar, emitters.REGISTER_BYTES // size)

            def each(base: Any, row: Any) -> list[Any]:
                """The addresses of all tokens."""
                return [b.add(base, b.mul(row, const(I64, i))) for i in range(tokens)]

            def at(base: Any, j: int) -> Any:
                return pointer(b, b.add(base, const(I64, j * emitters.REGISTER_BYTES)), t)

            added = []
            if updates:
                added = [[load_value(b, at(v, j)) for j in range(vectors)] for v in each(value, value_row)]
            if recalls:
                rate = splat_value(b, t, load_value(b, pointer(b, beta, scalar)))
                for j in range(vectors):
                    lacking = b.fsub(added[0][j], load_value(b, at(recalled, j)))
                    added[0][j] = b.fmul(rate, lacking)
            keys, gates, queries = (
                [pointer(b, x, scalar) for x in each(*place)]
                for place in ((key, key_row), (decay, decay_row), (query, query_row))
            )
            next_ = pointer(b, following, scalar)
            count = (tokens * vectors if reads else 0) + (vectors if recalls else 0)
            before, head = b.block, b.append_basic_block("rows")
            after = b.append_basic_block("done")
            b.branch(head)
            b.position_at_end(head)
            r = b.phi(I64)
            r.add_incoming(const(I64, 0), before)
            sums = [b.phi(t) for _ in range(count)]
            grown: list[Any] = list(sums)
            place = b.add(state, b.mul(r, const(I64, PITCH)))
            s = [load_value(b, at(place, j)) for j in range(vectors)]

            def one(base: Any) -> Any:
                return splat_value(b, t, load_value(b, b.gep(base, [r])))

            for i in range(tokens):
                if decays:
                    x = one(gates[i])
                    s = [b.fmul(x, y) for y in s]
                if updates:
                    x = one(keys[i])
                    s = [fma_value(b, x, added[i][j], s[j]) for j in range(vectors)]
                if reads:
                    x = one(queries[i])
                    for j in range(vectors):
                        n = i * vectors + j
                        grown[n] = fma_value(b, x, s[j], grown[n])
            if recalls:
                x = one(next_)
                for j in range(vectors):
                    grown[count - vectors + j] = fma_value(b, x, s[j], grown[count - vectors + j])
            if updates:
                for j in range(vectors):
                    store_value(b, s[j], at(place, j))
            below = b.add(r, const(I64, 1))
            r.add_incoming(below, head)
            for total, last in zip(sums, grown, strict=True):
                total.add_incoming(const(t, 0.0), before)
                total.add_incoming(last, head)
            b.cbranch(b.icmp_signed("<", below, rows), head, after)
            b.position_at_end(after)
            if reads:
                factor = splat_value(b, t, scale)
                places = [at(o, j) for o in each(out, out_row) for j in range(vectors)]
                for total, where in zip(grown, places, strict=False):
                    store_value(b, b.fmul(total, factor), where)
            if recalls:
                for j in range(vectors):
                    store_value(b, grown[count - vectors + j], at(recalled, j))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 12, number, *[types.int64] * 3), codegen

    return sweep


def build(storage: str, jit: Any, inline: Any) -> Callable[[Any], Any]:
    """The kernel for arrays of one dtype, as a function of its parameters' address."""
    dtype: Any = np.float64 if storage == "float64" else np.float32
    number = types.float64 if storage == "float64" else types.float32
    size = np.dtype(dtype).itemsize
    lanes = simd.lanes(dtype)
    register = emitters.REGISTER_BYTES
    load, store, get, put = simd.loads(storage)
    mul, add, div, exp, fma, splat = simd.mul, simd.add, simd.div, simd.exp, simd.fma, simd.splat
    greater, smaller = simd.greater, simd.smaller

    def tokens_through(vectors: int) -> Any:
        """A function that takes a chunk of tokens through a block of so many vectors of the state."""
        make = partial(_sweep, number, vectors)

        def pair(**steps: Any) -> Any:
            return [make(decays=decays, updates=True, **steps) for decays in (False, True)]

        add2, add2_gated = pair(tokens=2, reads=False, recalls=False)
        add1, add1_gated = pair(tokens=1, reads=False, recalls=False)
        both2, both2_gated = pair(tokens=2, reads=True, recalls=False)
        both1, both1_gated = pair(tokens=1, reads=True, recalls=False)
        replace, replace_gated = pair(tokens=1, reads=False, recalls=True)
        replace_read, replace_read_gated = pair(tokens=1, reads=True, recalls=True)
        read4, read1 = (
            make(tokens=tokens, updates=False, reads=True, decays=False, recalls=False) for tokens in (4, 1)
        )

        @jit
        def read(s, rows, q, q_row, o, o_row, count, scale):
            i = 0
            while i + 4 <= count:
                read4(s, rows, 0, 0, 0, 0, 0, 0, q + i * q_row, q_row, o + i * o_row, o_row, scale, 0, 0, 0)
                i += 4
            while i < count:
                read1(s, rows, 0, 0, 0, 0, 0, 0, q + i * q_row, 0, o + i * o_row, 0, scale, 0, 0, 0)
                i += 1

        @jit
        def through(p, s, q, qt, qg, k, kt, a, next_, nt, v, vt, o, ot, og, r, beta, count, scale):
            gated, at, rows = p.decay != 0, p.row, p.features
            group = p.group if p.steps & READ else 0
            if p.steps == READ:
                for g in range(group):
                    read(s, rows, q + g * qg, qt, o + g * og, ot, count, scale)
                return
            if p.beta:
                read1(s, rows, 0, 0, 0, 0, 0, 0, next_, 0, r, 0, dtype(1), 0, 0, 0)
            t = 0
            while t < count:
                two = group <= 1 and t + 2 <= count
                if p.beta:
                    two = False
                    # The last token of a chunk has none behind it: the next chunk begins with recalling.
                    n = next_ + min(t + 1, count - 1) * nt
                    if group == 1 and gated:
                        replace_read_gated(s, rows, k, kt, a, at, v, vt, q, qt, o, ot, scale, n, r, beta)
                    elif group == 1:
                        replace_read(s, rows, k, kt, a, at, v, vt, q, qt, o, ot, scale, n, r, beta)
                    elif gated:
                        replace_gated(s, rows, k, kt, a, at, v, vt, q, qt, o, ot, scale, n, r, beta)
                    else:
                        replace(s, rows, k, kt, a, at, v, vt, q, qt, o, ot, scale, n, r, beta)
                elif group == 1:
                    if two and gated:
                        both2_gated(s, rows, k, kt, a, at, v, vt, q, qt, o, ot, scale, 0, 0, 0)
                    elif two:
                        both2(s, rows, k, kt, a, at, v, vt, q, qt, o, ot, scale, 0, 0, 0)
                    elif gated:
                        both1_gated(s, rows, k, kt, a, at, v, vt, q, qt, o, ot, scale, 0, 0, 0)
                    else:
                        both1(s, rows, k, kt, a, at, v, vt, q, qt, o, ot, scale, 0, 0, 0)
                else:
                    if two and gated:
                        add2_gated(s, rows, k, kt, a, at, v, vt, 0, 0, 0, 0, scale, 0, 0, 0)
                    elif two:
                        add2(s, rows, k, kt, a, at, v, vt, 0, 0, 0, 0, scale, 0, 0, 0)
                    elif gated:
                        add1_gated(s, rows, k, kt, a, at, v, vt, 0, 0, 0, 0, scale, 0, 0, 0)
                    else:
                        add1(s, rows, k, kt, a, at, v, vt, 0, 0, 0, 0, scale, 0, 0, 0)
                if group > 1:
                    read(s, rows, q, qg, o, og, group, scale)
                done = 2 if two else 1
                t += done
                k, a, v, q, o = k + done * kt, a + done * at, v + done * vt, q + done * qt, o + done * ot
                beta += size

        return through

    wide, single = tokens_through(WIDE), tokens_through(1)
    half = tokens_through(2) if WIDE > 2 else wide

    @jit
    def take(source, source_row, rows, width, target, target_row):
        """source -> target, with vectors of zeros behind the last number of each row."""
        whole = width // lanes * lanes
        for r in range(rows):
            x, y = source + r * source_row, target + r * target_row
            for i in range(0, whole, lanes):
                store(y + i * size, load(x + i * size))
            if whole < width:
                store(y + whole * size, splat(dtype(0)))
                for i in range(whole, width):
                    put(y + i * size, get(x + i * size))

    @jit
    def features(x, row, rows, width, feature):
        """feature(x), in place, and zeros behind the last number of each row."""
        zero = splat(dtype(0))
        for r in range(rows):
            for i in range(0, width * size, register):
                at = x + r * row + i
                y = load(at)
                positive = greater(zero, y)  # and NaN
                store(at, add(positive, exp(smaller(zero, y))) if feature == ELU else positive)
            for i in range(width, -(-width // lanes) * lanes):
                put(x + r * row + i * size, dtype(0))

    @jit
    def gates(p, source, count, k, k_row, a, product):
        """exp(decay) -> a, and that times the key -> product."""
        for t in range(count):
            x, shift, key = source + t * p.decay_s, t * p.row, k + t * k_row
            for i in range(0, p.features, lanes):
                at = shift + i * size
                if p.decay_f == 0:
                    y = splat(exp(get(x)))
                elif i + lanes <= p.features:
                    y = exp(load(x + i * size))
                else:
                    store(a + at, splat(dtype(0)))
                    for j in range(i, p.features):
                        put(a + shift + j * size, exp(get(x + j * size)))
                    y = load(a + at)
                store(a + at, y)
                store(product + at, mul(y, load(key + i * size)))

    @jit
    def denominators(p, count, q, k, a, z, totals):
        """The sum of keys so far -> z, and query @ z in every lane -> totals, for each token."""
        group = p.group if p.steps & READ else 0
        for t in range(count):
            for i in range(0, p.row, register):
                x = load(z + i)
                if p.steps & UPDATE:
                    if p.decay:
                        x = mul(x, load(a + t * p.row + i))
                    x = add(x, load(k + t * p.row + i))
                store(z + i, x)
            for g in range(t * group, (t + 1) * group):
                total = splat(dtype(0))
                for i in range(0, p.row, register):
                    total = fma(load(q + g * p.row + i), load(z + i), total)
                store(totals + g * register, simd.across_sum(total))

    @jit
    def deliver(p, o, totals, row, count, columns, out, out_row):
        """Every `row`-th output (and over its denominator) -> out."""
        zero = splat(dtype(0))
        for t in range(count):
            x, y, d = o + t * row * PITCH, out + t * out_row, totals + t * row * register
            for i in range(0, columns * size, 64):
                simd.prefetch(y + count * out_row + i)
            whole = columns // lanes * lanes
            for i in range(0, columns, lanes):
                z = load(x + i * size)
                if p.normalize:
                    z = zero if get(d) == 0 else div(z, load(d))
                if i < whole:
                    store(y + i * size, z)
                else:
                    store(x + i * size, z)
                    for j in range(whole, columns):
                        put(y + j * size, get(x + j * size))

    @jit
    def unit(p, w, n):
        """A block of columns of one key head; or only some of its queries, where the state stands still."""
        segment, panel = n % p.segments, n // p.segments % p.panels
        h, b = n // p.segments // p.panels % p.heads, n // p.segments // p.panels // p.heads
        first = panel * p.width
        columns = min(p.width, p.columns - first)
        row, group, chunk = p.row, p.group, p.chunk
        s = w  # (features, PITCH)
        own_q = s + p.features * PITCH  # (chunk, group, row)
        own_k = own_q + chunk * group * row  # (chunk, row)
        a = own_k + chunk * row  # (chunk, row)
        product = a + chunk * row  # (chunk, row)
        own_v = product + chunk * row  # (chunk, PITCH)
        own_o = own_v + chunk * PITCH  # (chunk, group, PITCH)
        r = own_o + chunk * group * PITCH  # (PITCH)
        z = r + PITCH  # (row)
        totals = z + row  # (chunk, group, register)
        rates = totals + chunk * group * register  # (chunk)

        state = p.state + b * p.state_b + h * p.state_h
        if p.state:
            take(state + first * size, p.state_f, p.features, columns, s, PITCH)
        else:
            for i in range(0, p.features * PITCH, register):
                store(s + i, splat(dtype(0)))
        if p.normalize:
            for i in range(0, row, register):
                store(z + i, splat(dtype(0)))
            for f in range(p.features if p.state else 0):
                put(z + f * size, get(state + f * p.state_f + p.columns * size))

        # What can be read or written where it lies is.
        features_lie = p.feature == 0 and p.features % lanes == 0 and not p.normalize
        columns_lie = columns % lanes == 0
        scale = dtype(1) if p.normalize else dtype(p.scale)
        qt, qg, kt, vt, ot, og = group * row, row, row, PITCH, group * PITCH, PITCH
        if features_lie:
            qt, qg, kt = p.query_s, p.query_h, p.key_s
        if columns_lie:
            vt = p.value_s
            if not p.normalize:
                ot, og = p.out_s, p.out_h
        t = segment * SEGMENT
        stop = min(t + SEGMENT, p.tokens) if p.segments > 1 else p.tokens
        while t < stop:
            count = min(chunk, stop - t)
            q, k, v, o = own_q, own_k, own_v, own_o
            query = p.query + b * p.query_b + h * group * p.query_h + t * p.query_s
            key = p.key + b * p.key_b + h * p.key_h + t * p.key_s
            value = p.value + b * p.value_b + h * p.value_h + t * p.value_s + first * size
            out = p.out + b * p.out_b + h * group * p.out_h + t * p.out_s + first * size
            if features_lie:
                q, k = query, key
            else:
                if p.steps & READ:
                    for g in range(group):
                        take(query + g * p.query_h, p.query_s, count, p.features, q + g * row, group * row)
                    if p.feature:
                        features(q, row, count * group, p.features, p.feature)
                if p.steps & UPDATE:
                    take(key, p.key_s, count, p.features, k, row)
                    if p.feature:
                        features(k, row, count, p.features, p.feature)
            if columns_lie:
                v = value
                o = o if p.normalize else out
            elif p.steps & UPDATE:
                take(value, p.value_s, count, columns, v, PITCH)
            if p.steps & UPDATE:
                if p.decay:
                    x = p.decay + b * p.decay_b + h * p.decay_h + t * p.decay_s
                    gates(p, x, count, k, kt, a, product)
                if p.beta:
                    x = p.beta + b * p.beta_b + h * p.beta_h + t * p.beta_s
                    for i in range(count):
                        put(rates + i * size, get(x + i * p.beta_s))
            if p.normalize:
                denominators(p, count, q, k, a, z, totals)
            n, nt = (product, row) if p.decay else (k, kt)
            vectors, c = (columns + lanes - 1) // lanes, 0
            while c < vectors:
                i = c * register
                if vectors - c >= WIDE:
                    wide(p, s + i, q, qt, qg, k, kt, a, n, nt, v + i, vt, o + i, ot, og, r + i, rates, count,
                         scale)  # fmt: skip
                    c += WIDE
                elif vectors - c >= 2:
                    half(p, s + i, q, qt, qg, k, kt, a, n, nt, v + i, vt, o + i, ot, og, r + i, rates, count,
                         scale)  # fmt: skip
                    c += 2
                else:
                    single(p, s + i, q, qt, qg, k, kt, a, n, nt, v + i, vt, o + i, ot, og, r + i, rates,
                           count, scale)  # fmt: skip
                    c += 1
            if p.steps & READ and (p.normalize or not columns_lie):
                for g in range(group):
                    deliver(p, o + g * PITCH, totals + g * register, group, count, columns,
                            out + g * p.out_h, p.out_s)  # fmt: skip
            t += count

        if p.end:
            x = p.end + b * p.end_b + h * p.end_h
            for f in range(p.features):
                for i in range(columns):
                    put(x + f * p.end_f + (first + i) * size, get(s + f * PITCH + i * size))
                if p.normalize and panel == 0:
                    put(x + f * p.end_f + p.columns * size, get(z + f * size))

    def work(address):
        p = parameters_at(address)
        w = p.workspace + simd.fetch_add(address + WORKERS) * p.workspace_bytes
        finished_last = 0
        before = _float_mode(-1)
        task = simd.fetch_add(address + NEXT_TASK)
        while task < p.tasks:
            unit(p, w, task)
            if simd.fetch_add(address + TASKS_DONE) + 1 == p.tasks:
                finished_last = 1
            task = simd.fetch_add(address + NEXT_TASK)
        _float_mode(before)
        return finished_last

    return work
