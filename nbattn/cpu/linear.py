"""Linear attention on the CPU: fill the kernel's parameters, choose the threads, run it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..problem import LinearProblem
from . import emitters, records, recurrence, runtime, simd, team
from .recurrence import CHUNK, COPIED, FEATURES, PARAMETERS, PITCH, READ, SEGMENT, UPDATE
from .tiles import WIDE

SERIAL_WORK = 1 << 17
"""Multiply-adds below which a call is not worth a second thread."""
_WORDS = records.words_of(PARAMETERS)


def forward(problem: LinearProblem, out: NDArray[Any], state_out: NDArray[Any] | None) -> None:
    """Write linear attention to `out` (B, Hq, Sq, Dv), the state to `state_out` (B, Hkv, F, Dv or Dv + 1)."""
    p = problem
    if p.is_causal:
        _run(p, out, p.state, state_out, UPDATE | READ)
        return
    end = state_out
    if end is None:
        end = np.empty((*p.key.shape[:2], p.key.shape[3], p.value.shape[3] + p.normalize), p.key.dtype)
    _run(p, None, p.state, end, UPDATE)
    _run(p, out, end, None, READ)


def kernel_names(dtypes: Sequence[str]) -> list[str]:
    """The kernels that calls with these dtypes need."""
    return sorted({f"linear-{'float64' if d == 'float64' else 'float32'}" for d in dtypes})


def kernel(name: str) -> Any:
    """The compiled kernel of this name."""
    return runtime.compiled(name, partial(recurrence.build, name.partition("-")[2]))


def _run(
    p: LinearProblem,
    out: NDArray[Any] | None,
    state: NDArray[Any] | None,
    end: NDArray[Any] | None,
    steps: int,
) -> None:
    values = _parameters(p, out, state, end, steps)
    if values["tasks"] == 0:
        return
    work = p.query.size * values["columns"]
    helpers = 0 if work < SERIAL_WORK else min(runtime.threads(), values["tasks"]) - 1
    memory, values["workspace"] = runtime.scratch((helpers + 1) * values["workspace_bytes"])
    words = records.packed(values, _WORDS)
    team.run(kernel(f"linear-{p.key.dtype.name}"), words, helpers, (p, out, state, end, memory))
    runtime.keep(memory)


def _parameters(
    p: LinearProblem,
    out: NDArray[Any] | None,
    state: NDArray[Any] | None,
    end: NDArray[Any] | None,
    steps: int,
) -> dict[str, int]:
    """The kernel's parameters by name, but for the workspace."""
    batch, heads, queries, features = p.query.shape
    key_heads, keys, columns = p.value.shape[1:]
    group = heads // key_heads if key_heads else 1
    tokens = keys if steps & UPDATE else queries
    segments = 1 if steps & UPDATE else -(-queries // SEGMENT)
    if steps == READ | UPDATE and not queries and end is None:
        segments = 0
    size = p.key.itemsize
    lanes = simd.lanes(p.key.dtype)
    vectors = -(-columns // lanes)
    # A column's bits do not depend on the columns beside it, so that a few heads may share out theirs.
    width = min(WIDE, vectors)
    while width > 1 and batch * key_heads * segments * -(-vectors // width) < runtime.threads():
        width //= 2
    panels = -(-vectors // width)
    row = -(-features * size // emitters.REGISTER_BYTES) * emitters.REGISTER_BYTES
    lie = p.feature == "identity" and features % lanes == 0 and not p.normalize
    chunk = max(1, 2 * (CHUNK if lie or p.beta is not None else COPIED) // (1 + group))
    # As `unit` lays it out: state, queries, keys, decays, their product, values, outputs, recalled, sum of
    # keys, denominators, beta.
    scratch = PITCH * (features + chunk + chunk * group + 1) + row * (chunk * group + 3 * chunk + 1)
    scratch += 64 * -(-chunk // 8) + emitters.REGISTER_BYTES * chunk * group
    values = {
        "tasks": batch * key_heads * panels * segments,
        "workspace_bytes": -(-scratch // 64) * 64,
        "steps": steps,
        "tokens": tokens,
        "features": features,
        "row": row,
        "columns": columns,
        "width": width * lanes,
        "panels": panels,
        "segments": segments,
        "heads": key_heads,
        "group": group,
        "chunk": chunk,
        "feature": FEATURES.index(p.feature),
        "normalize": p.normalize,
        "scale": runtime.bits(p.scale),
    }
    arrays = [
        ("query", p.query, "bhs"), ("key", p.key, "bhs"), ("value", p.value, "bhs"), ("out", out, "bhs"),
        ("decay", p.decay, "bhsf"), ("beta", p.beta, "bhs"), ("state", state, "bhf"), ("end", end, "bhf"),
    ]  # fmt: skip
    for name, x, axes in arrays:
        if x is not None:
            values[name] = runtime.address(x)
            values |= {f"{name}_{axis}": stride for axis, stride in zip(axes, x.strides, strict=False)}
    return values
