"""Many rows times a matrix: y = activation(x @ weight.T + bias) + plus, near the rate of multiply-adds.

The lanes are columns of y, rows of the weight. A task turns a panel of them so that the lanes lie side by
side, widened to float32, into scratch in the second-level cache, `DEPTH` numbers of each at a time, and
multiplies its rows of x by it: the weight stays what and where it is. A tile keeps 6 x 4 of the 32 registers
of AVX-512 (6 x 2 of 16) in sums; numbers of x are broadcast as they lie. Bias and activation are added while
the results are in the first-level cache. How the products are added depends on d_in alone.
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

from . import emitters, rowwise, runtime, simd, team
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
WIDE = 4 if emitters.REGISTERS == 32 else 2
"""Vectors of a tile."""
COLUMNS = WIDE * LANES
ROW_BYTES = 4 * COLUMNS
"""Of a panel."""
HEIGHT = 6
"""Rows of a tile."""
DEPTH = 512
"""Numbers of d_in whose products are added in registers: 128 KB of a panel with AVX-512."""
TASK_ROWS = 512
"""The most rows of x in a task."""
FEWEST_ROWS = 96
"""The fewest, where cutting them would give more threads something to do."""
ACTIVATIONS = rowwise.OPERATIONS[:4]
NONE = len(ACTIVATIONS)

PARAMETERS = np.dtype(
    runtime.WORK
    + [(name, np.int64) for name in (
        "workspace", "workspace_bytes", "workers",
        # addresses, and strides in bytes along rows
        "x", "x_row", "y", "y_row", "plus", "plus_row", "weight", "weight_row", "last", "last_row",
        "scales", "scales_row", "last_scales", "bias",
        "rows", "task_rows", "panels", "d_in", "d_out", "group", "activation",
    )]
)  # fmt: skip
WORDS = words_of(PARAMETERS)
NEXT_TASK, TASKS_DONE, WORKERS = (8 * WORDS[name] for name in ("next_task", "tasks_done", "workers"))

parameters_at = simd.record(PARAMETERS)


def fits(d_out: int, d_in: int) -> bool:
    """Whether a matrix is large enough to fill the tiles."""
    return d_out >= COLUMNS // 2 and d_in >= LANES


class Plan:
    """Products with one matrix, as in `matvec.Plan`."""

    def __init__(
        self,
        weight: NDArray[Any],
        storage: str,
        bias: NDArray[np.float32],
        scales: NDArray[np.float32] | None = None,
    ) -> None:
        d_out, d_in = weight.shape
        self.panels, more = -(-d_out // COLUMNS), -d_out % COLUMNS
        # The last panel, filled up with zeros.
        first = d_out - d_out % COLUMNS
        last = np.pad(weight[first:], ((0, more), (0, 0))) if more else weight
        last_scales = None if scales is None else np.pad(scales[first:], ((0, more), (0, 0)))
        bias = np.pad(bias, (0, more))
        groups = 1 if scales is None else scales.shape[1]
        self.values = {
            "weight": runtime.address(weight), "weight_row": weight.strides[0],
            "last": runtime.address(last), "last_row": last.strides[0], "bias": runtime.address(bias),
            "panels": self.panels, "d_in": d_in, "d_out": d_out, "group": d_in // groups,
            "workspace_bytes": (LANES + DEPTH + TASK_ROWS) * ROW_BYTES,
        }  # fmt: skip
        if scales is not None and last_scales is not None:
            self.values |= {"scales": runtime.address(scales), "scales_row": scales.strides[0],
                            "last_scales": runtime.address(last_scales)}  # fmt: skip
        self.name = f"products-{storage}"
        self.keep_alive = weight, last, bias, scales, last_scales

    def __call__(
        self,
        x: NDArray[np.float32],
        y: NDArray[np.float32],
        activation: str | None = None,
        plus: NDArray[np.float32] | None = None,
    ) -> None:
        """Write ``activation(x @ weight.T + bias) + plus`` to y (rows, d_out), all in rows without gaps."""
        rows, threads = len(x), runtime.threads()
        blocks = -(-rows // TASK_ROWS)
        while blocks * self.panels < 3 * threads and rows >= 2 * blocks * FEWEST_ROWS:
            blocks *= 2
        task_rows = -(-rows // blocks // HEIGHT) * HEIGHT
        task_rows = min(task_rows, TASK_ROWS)
        tasks = self.panels * -(-rows // task_rows)
        helpers = min(threads, tasks) - 1
        memory, workspace = runtime.scratch((helpers + 1) * self.values["workspace_bytes"])
        values = self.values | {
            "tasks": tasks, "workspace": workspace, "x": runtime.address(x), "x_row": x.strides[0],
            "y": runtime.address(y), "y_row": y.strides[0], "rows": rows, "task_rows": task_rows,
            "activation": NONE if activation is None else ACTIVATIONS.index(activation),
        }  # fmt: skip
        if plus is not None:
            values |= {"plus": runtime.address(plus), "plus_row": plus.strides[0]}
        team.run(kernel(self.name), packed(values, WORDS), helpers, (self, x, y, plus, memory))
        runtime.keep(memory)


def kernel_names(dtypes: Sequence[str]) -> list[str]:
    """The kernels that calls with these dtypes need."""
    return [f"products-{dtype}" for dtype in dtypes if dtype in STORAGES]


def kernel(name: str) -> Any:
    """The compiled kernel of this name."""
    return runtime.compiled(name, partial(_build, name.partition("-")[2]))


# --- the kernel ---------------------------------------------------------------------------------------------


def _tile(rows: int) -> Any:
    """``tile(a, a_row, b, c, c_row, depth, more)``: c (rows, COLUMNS) = a @ b, plus itself with `more`.

    b is a panel, rows of a and c are so many bytes apart.
    """

    @intrinsic
    def tile(typingctx: Any, a: Any, a_row: Any, b: Any, c: Any, c_row: Any, depth: Any, more: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            a, a_row, panel, c, c_row, depth, more = args
            t = ir.VectorType(ir.FloatType(), LANES)
            a_rows = [
                pointer(builder, builder.add(a, builder.mul(a_row, const(I64, r))), ir.FloatType())
                for r in range(rows)
            ]
            c_rows = [builder.add(c, builder.mul(c_row, const(I64, r))) for r in range(rows)]
            places = [
                pointer(builder, builder.add(row, const(I64, j * emitters.REGISTER_BYTES)), t)
                for row in c_rows
                for j in range(WIDE)
            ]
            zeros = [const(t, 0.0)] * len(places)

            def step(sums: list[Any], k: Any) -> list[Any]:
                row = builder.add(panel, builder.mul(k, const(I64, ROW_BYTES)))
                columns = [
                    load_value(builder, pointer(builder, builder.add(row, const(I64, j * 4 * LANES)), t))
                    for j in range(WIDE)
                ]
                grown = []
                for r in range(rows):
                    x = splat_value(builder, t, load_value(builder, builder.gep(a_rows[r], [k])))
                    grown += [fma_value(builder, x, columns[j], sums[r * WIDE + j]) for j in range(WIDE)]
                return grown

            sums = loop_values(builder, depth, zeros, step)
            before = builder.block
            with builder.if_then(builder.icmp_signed("!=", more, const(I64, 0))):
                grown = [
                    builder.fadd(load_value(builder, place), s) for place, s in zip(places, sums, strict=True)
                ]
                inside = builder.block
            totals = [
                phi_value(builder, [(s, before), (g, inside)]) for s, g in zip(sums, grown, strict=True)
            ]
            for place, total in zip(places, totals, strict=True):
                store_value(builder, total, place)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return tile


def _turn(storage: str) -> Any:
    """``turn(source, source_row, target, scales, scales_row)``: a square of the weight into a panel."""
    t, it = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(I32, LANES)
    raw = ir.VectorType(I8 if storage == "int8" else emitters.stored(storage), LANES)

    @intrinsic
    def turn(typingctx: Any, source: Any, source_row: Any, target: Any, scales: Any, scales_row: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            source, source_row, target, scales, scales_row = args

            def widened(r: int) -> Any:
                w = load_value(b, pointer(b, b.add(source, b.mul(source_row, const(I64, r))), raw))
                if storage != "int8":
                    return emitters.widen_value(b, w, storage)
                scale = pointer(b, b.add(scales, b.mul(scales_row, const(I64, r))), ir.FloatType())
                return b.fmul(b.sitofp(b.sext(w, it), t), splat_value(b, t, load_value(b, scale)))

            for k, x in enumerate(emitters.transpose_values(b, [widened(r) for r in range(LANES)])):
                store_value(b, x, pointer(b, b.add(target, const(I64, k * ROW_BYTES)), t))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return turn


def _build(storage: str, jit: Any, inline: Any) -> Callable[[Any], Any]:
    """The kernel for matrices of one storage dtype."""
    load, store, get, put = simd.loads("float32")
    add = simd.add
    size = {"float32": 4, "int8": 1}.get(storage, 2)
    scaled = storage == "int8"
    tall, four, one = (_tile(rows) for rows in (HEIGHT, 4, 1))
    turn = _turn(storage)
    register = emitters.REGISTER_BYTES

    @jit
    def turn_panel(source, source_row, scales, scales_row, group, d_in, first, end, panel):
        for v in range(WIDE):
            below = source + v * LANES * source_row
            factors = scales + v * LANES * scales_row
            for k in range(first, end, LANES):
                at = min(k, d_in - LANES)  # the last square overlaps
                target = panel + (at - first) * ROW_BYTES + v * register
                turn(below + at * size, source_row, target, factors + at // group * 4 if scaled else 0,
                     scales_row)  # fmt: skip

    def finisher(emit):
        activated = simd._elementwise(emit, 1)

        def finish(y, y_row, rows, bias, plus, plus_row):
            for r in range(rows):
                for v in range(WIDE):
                    at = y + r * y_row + v * register
                    z = activated(add(load(at), load(bias + v * register)))
                    if plus != 0:
                        z = add(z, load(plus + r * plus_row + v * register))
                    store(at, z)

        finish.__qualname__ += emit.__name__
        return jit(finish)

    gelu, gelu_tanh, relu, silu, none = (
        finisher(emit) for emit in (rowwise._gelu, rowwise._gelu_tanh, rowwise._relu, rowwise._silu, _same)
    )

    @jit
    def finish(activation, y, y_row, rows, bias, plus, plus_row):
        if activation == 0:
            gelu(y, y_row, rows, bias, plus, plus_row)
        elif activation == 1:
            gelu_tanh(y, y_row, rows, bias, plus, plus_row)
        elif activation == 2:
            relu(y, y_row, rows, bias, plus, plus_row)
        elif activation == 3:
            silu(y, y_row, rows, bias, plus, plus_row)
        else:
            none(y, y_row, rows, bias, plus, plus_row)

    @jit
    def task(p, number, w):
        panel, block = number % p.panels, number // p.panels
        row0 = block * p.task_rows
        rows = min(p.rows - row0, p.task_rows)
        column = panel * COLUMNS
        shift = column * 4
        source, source_row = p.weight + column * p.weight_row, p.weight_row
        scales = p.scales + column * p.scales_row
        width = min(COLUMNS, p.d_out - column)
        x, y, y_row = p.x + row0 * p.x_row, p.y + row0 * p.y_row + shift, p.y_row
        plus = p.plus + row0 * p.plus_row + shift if p.plus != 0 else 0
        packed = w + LANES * ROW_BYTES
        out, out_plus = y, plus
        if width < COLUMNS:
            source, source_row, scales = p.last, p.last_row, p.last_scales
            y, y_row, plus = packed + DEPTH * ROW_BYTES, ROW_BYTES, 0
        first = 0
        while first < p.d_in:
            depth = min(DEPTH, p.d_in - first)
            end = first + depth
            turn_panel(source, source_row, scales, p.scales_row, p.group, p.d_in, first, end, packed)
            r = 0
            while r < rows:
                a, c = x + r * p.x_row + first * 4, y + r * y_row
                if rows - r >= HEIGHT:
                    tall(a, p.x_row, packed, c, y_row, depth, first)
                    taken = HEIGHT
                elif rows - r >= 4:
                    four(a, p.x_row, packed, c, y_row, depth, first)
                    taken = 4
                else:
                    one(a, p.x_row, packed, c, y_row, depth, first)
                    taken = 1
                if end == p.d_in:
                    finish(p.activation, c, y_row, taken, p.bias + shift,
                           plus + r * p.plus_row if plus != 0 else 0, p.plus_row)  # fmt: skip
                r += taken
            first = end
        if width < COLUMNS:
            for r in range(rows):
                for c in range(width):
                    z = get(y + r * ROW_BYTES + c * 4)
                    if out_plus != 0:
                        z += get(out_plus + r * p.plus_row + c * 4)
                    put(out + r * p.y_row + c * 4, z)

    def work(address):
        p = parameters_at(address)
        w = p.workspace + simd.fetch_add(address + WORKERS) * p.workspace_bytes
        finished_last = 0
        while True:
            number = simd.fetch_add(address + NEXT_TASK)
            if number >= p.tasks:
                return finished_last
            task(p, number, w)
            if simd.fetch_add(address + TASKS_DONE) + 1 == p.tasks:
                finished_last = 1

    return work


def _same(b: Any, x: Any) -> Any:
    return x
