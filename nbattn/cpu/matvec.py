"""A few rows times a matrix that is read once: y = x @ weight.T + bias, at the rate at which memory gives it.

The lanes lie along d_in. A tile takes `ROWS` rows of the matrix and one to three rows of x: each pair has
its sum in a register, and a tree turns the sums into neighbouring results. Weights of 16 and 8 bits are
widened in registers and multiplied as float32. How the products are added depends on d_in alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from . import dots, emitters, kinds, runtime, simd, team
from .emitters import (
    I8,
    I32,
    I64,
    const,
    fma_value,
    load_value,
    loop_values,
    phi_value,
    pointer,
    splat_value,
    store_value,
)
from .records import packed, words_of

STORAGES = ("float32", "float16", "bfloat16", "int8")
LANES = simd.lanes(np.float32)
ROWS = 8 if emitters.REGISTERS == 32 else 4
"""Rows of the matrix in a tile: eight sums keep two units busy that take four cycles. To read one row after
the other, as a prefetcher might like, is no faster."""
TASK = 1 << 18
"""Bytes of the matrix worth taking from the counter; with an eighth of it bfloat16 took a third longer."""
SERIAL = 1 << 18
"""Bytes of the matrix below which a call is not worth a second thread: 10 us."""

PARAMETERS = np.dtype(
    runtime.WORK
    + [(name, np.int64) for name in (
        # addresses, and strides in bytes along rows
        "x", "x_row", "y", "y_row", "rows", "weight", "weight_row", "scales", "scales_row", "bias",
        "d_out", "block", "groups", "steps", "skip",
    )]
)  # fmt: skip
_WORDS = words_of(PARAMETERS)
CALL = slice(_WORDS["x"], _WORDS["rows"] + 1)
NEXT_TASK, TASKS_DONE = (8 * _WORDS[name] for name in ("next_task", "tasks_done"))

parameters_at = simd.record(PARAMETERS)


def fits(d_out: int, d_in: int) -> bool:
    """Whether a matrix is large enough for a tile."""
    return d_out >= ROWS and d_in >= LANES


class Plan:
    """Products with one matrix: only x and y change from call to call.

    Parameters
    ----------
    weight : ndarray, shape (d_out, d_in)
        It `fits`; its rows are runs of memory.
    storage : str
        Of `STORAGES`; what the weight holds.
    bias : ndarray of float32, shape (d_out,)
    scales : ndarray of float32, shape (d_out, groups), optional
        For int8: what each run of ``d_in / groups`` numbers is multiplied by; where there are several, runs
        of a multiple of 32.
    """

    def __init__(
        self,
        weight: NDArray[Any],
        storage: str,
        bias: NDArray[np.float32],
        scales: NDArray[np.float32] | None = None,
    ) -> None:
        d_out, d_in = weight.shape
        groups = 1 if scales is None else scales.shape[1]
        block = -(-d_out // -(-weight.nbytes // TASK) // ROWS) * ROWS
        values = {
            "tasks": -(-d_out // block),
            "weight": runtime.address(weight),
            "weight_row": weight.strides[0],
            "bias": runtime.address(bias),
            "d_out": d_out,
            "block": block,
            "groups": groups,
            "steps": d_in // groups // LANES,
            "skip": -d_in % LANES,
        }
        if scales is not None:
            values |= {"scales": runtime.address(scales), "scales_row": scales.strides[0]}
        self.words = packed(values, _WORDS)
        self.tasks = 1 if weight.nbytes < SERIAL else values["tasks"]
        self.name = f"matvec-{storage}"
        self.keep_alive = weight, bias, scales

    def __call__(self, x: NDArray[np.float32], y: NDArray[np.float32]) -> None:
        """Write ``x @ weight.T + bias`` to y (rows, d_out); rows of both are runs of memory."""
        words = self.words.copy()
        words[CALL] = runtime.address(x), x.strides[0], runtime.address(y), y.strides[0], len(x)
        helpers = 0 if self.tasks == 1 else min(runtime.threads(), self.tasks) - 1
        team.run(kernel(self.name), words, helpers, (self, x, y))


def kernel_names(dtypes: Sequence[str]) -> list[str]:
    """The kernels that calls with these dtypes need."""
    return [f"matvec-{dtype}" for dtype in dtypes if dtype in STORAGES]


def kernel(name: str) -> Any:
    """The compiled kernel of this name."""
    return runtime.compiled(name, partial(_build, name.partition("-")[2]))


# --- the kernel ---------------------------------------------------------------------------------------------


def _build(storage: str, jit: Any, inline: Any) -> Callable[[Any], Any]:
    """The kernel for matrices of one storage dtype."""
    one, two, three = (_tile(storage, columns) for columns in (1, 2, 3))

    @jit
    def block(p, first, end):
        """The results of some rows of the matrix, for all rows of x."""
        while first < end:
            o = min(first, p.d_out - ROWS)  # the last tile overlaps
            weight, scales, bias = p.weight + o * p.weight_row, p.scales + o * p.scales_row, p.bias + 4 * o
            matrix = weight, p.weight_row, scales, p.scales_row, bias, p.groups, p.steps, p.skip
            x, y, left = p.x, p.y + 4 * o, p.rows
            while left > 0:
                if left == 3 or left > 4:
                    three(*matrix, x, p.x_row, y, p.y_row)
                    taken = 3
                elif left > 1:
                    two(*matrix, x, p.x_row, y, p.y_row)
                    taken = 2
                else:
                    one(*matrix, x, p.x_row, y, p.y_row)
                    taken = 1
                x, y, left = x + taken * p.x_row, y + taken * p.y_row, left - taken
            first += ROWS

    def work(address):
        p = parameters_at(address)
        finished_last = 0
        while True:
            task = simd.fetch_add(address + NEXT_TASK)
            if task >= p.tasks:
                return finished_last
            block(p, task * p.block, min(p.d_out, (task + 1) * p.block))
            if simd.fetch_add(address + TASKS_DONE) + 1 == p.tasks:
                finished_last = 1

    return work


def _tile(storage: str, columns: int) -> Any:
    """``tile(weight, weight_row, scales, scales_row, bias, groups, steps, skip, x, x_row, y, y_row)``.

    It takes so many `columns`, rows of x. Each of the `groups` has so many `steps`, whole vectors. Where
    `skip` is not 0, one more vector ends where the row does; its first `skip` numbers have been counted.
    """
    stored = {"float32": 4, "int8": 1}.get(storage, 2)
    t, it = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(I32, LANES)
    raw = ir.VectorType(I8 if storage == "int8" else emitters.stored(storage), LANES)
    zeros = [const(t, 0.0)] * (ROWS * columns)

    @intrinsic
    def tile(
        typingctx: Any, weight: Any, weight_row: Any, scales: Any, scales_row: Any, bias: Any, groups: Any,
        steps: Any, skip: Any, x: Any, x_row: Any, y: Any, y_row: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            weight, weight_row, scales, scales_row, bias, groups, steps, skip, x, x_row, y, y_row = args

            def rows(first: Any, row: Any, count: int) -> list[Any]:
                return [b.add(first, b.mul(row, const(I64, i))) for i in range(count)]

            weights, factors, xs = (
                rows(first, row, count)
                for first, row, count in (
                    (weight, weight_row, ROWS),
                    (scales, scales_row, ROWS),
                    (x, x_row, columns),
                )
            )
            following = b.add(weight, b.mul(weight_row, const(I64, ROWS)))

            def grown(sums: list[Any], at: Any, counts: Any = None) -> list[Any]:
                """The sums, more by the products of a vector each from number `at` on, where they count."""
                shift = b.mul(at, const(I64, stored))
                vectors = [load_value(b, pointer(b, b.add(a, b.mul(at, const(I64, 4))), t)) for a in xs]
                result = []
                for i, address in enumerate(weights):
                    w = load_value(b, pointer(b, b.add(address, shift), raw))
                    w = (
                        b.sitofp(b.sext(w, it), t)
                        if storage == "int8"
                        else emitters.widen_value(b, w, storage)
                    )
                    if counts is not None:
                        w = b.select(counts, w, const(t, 0.0))
                    own = sums[i * columns : (i + 1) * columns]
                    result += [fma_value(b, w, v, s) for v, s in zip(vectors, own, strict=True)]
                return result

            def dot(group: Any) -> list[Any]:
                """The sums of one group."""
                start = b.mul(group, b.mul(steps, const(I64, LANES)))

                def step(sums: list[Any], k: Any) -> list[Any]:
                    at = b.add(start, b.mul(k, const(I64, LANES)))
                    # The next tile, as a run of memory, into the second-level cache: rows are too short for
                    # the processor to see where they go on. With rows of 1 KB that is 1.5 times as fast, and
                    # the first-level cache would hold too little.
                    line = b.add(following, b.mul(at, const(I64, ROWS * stored)))
                    for c in range(0, ROWS * LANES * stored, 64):
                        emitters.prefetch_value(b, b.add(line, const(I64, c)), locality=2)
                    return grown(sums, at)

                sums, before = loop_values(b, steps, zeros, step), b.block
                with b.if_then(b.icmp_signed("!=", skip, const(I64, 0))):
                    lane = ir.Constant(it, list(range(LANES)))
                    counts = b.icmp_signed(">=", lane, splat_value(b, it, b.trunc(skip, I32)))
                    last = b.sub(b.mul(steps, const(I64, LANES)), skip)
                    more, end = grown(sums, last, counts), b.block
                return [phi_value(b, [(s, before), (m, end)]) for s, m in zip(sums, more, strict=True)]

            def scaled(totals: list[Any], group: Any) -> list[Any]:
                result = []
                for i, s in enumerate(dot(group)):
                    at = b.add(factors[i // columns], b.mul(group, const(I64, 4)))
                    factor = splat_value(b, t, load_value(b, pointer(b, at, ir.FloatType())))
                    result.append(fma_value(b, factor, s, totals[i]))
                return result

            sums = loop_values(b, groups, zeros, scaled) if storage == "int8" else dot(const(I64, 0))
            for r in range(columns):
                _deliver(b, sums[r::columns], bias, b.add(y, b.mul(y_row, const(I64, r))))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 12), codegen

    return tile


def _deliver(b: Any, sums: list[Any], bias: Any, y: Any) -> None:
    """Add up the lanes of each sum; store the results, with the bias."""
    width = min(ROWS, LANES)
    for first in range(0, ROWS, width):
        x = dots.add_up(b, sums[first : first + width], width)
        distance = LANES // 2
        while distance >= width:
            x = b.fadd(x, kinds.shuffle(b, x, x, [c ^ distance for c in range(LANES)]))
            distance //= 2
        x = kinds.shuffle(b, x, x, list(range(width)))
        shift = const(I64, 4 * first)
        x = b.fadd(x, load_value(b, pointer(b, b.add(bias, shift), x.type)))
        store_value(b, x, pointer(b, b.add(y, shift), x.type))
