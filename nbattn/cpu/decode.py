"""Attention over cached keys and values on the CPU: the kernel's parameters, and how many threads run it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..problem import STORAGE_DTYPES, CacheProblem, storage_name
from . import chunks, runtime, simd
from .chunks import CHUNK, PARAMETERS, ROWS

_WORDS = {name: PARAMETERS.fields[name][1] // 8 for name in PARAMETERS.names}  # type: ignore[index, union-attr]
QUERY, OUT, LSE = (_WORDS[name] for name in ("query", "out", "lse"))
TASKS, CHUNKS, PARTIALS = (_WORDS[name] for name in ("tasks", "chunks", "partials"))
WORKSPACE, WORKSPACE_BYTES = (_WORDS[name] for name in ("workspace", "workspace_bytes"))
SERIAL_WORK = 1 << 19
"""Multiply-adds below which a call is not worth a second thread."""


def forward(problem: CacheProblem, out: NDArray[Any], lse: NDArray[Any] | None) -> None:
    """Write attention to `out` (B, Hq, Sq, Dv) and `lse` (B, Hq, Sq)."""
    Plan(problem, out, lse).forward(problem.query, out, lse)


class Plan:
    """A call to be made again and again while a cache grows.

    The problem's arrays but its query are read where they lie each time, so that a cache may change lengths,
    starts, offsets and its page table in place. Queries, outputs and lse keep their layout: `out` and `lse`
    are examples of it, contiguous where there is none.
    """

    def __init__(
        self, problem: CacheProblem, out: NDArray[Any] | None = None, lse: NDArray[Any] | None = None
    ) -> None:
        p = problem
        batch, heads, queries, head_dim = p.query.shape
        value_dim = p.value_pages.shape[3] * (2 if p.storage == "int4" else 1)
        if out is None:
            out = np.empty((batch, heads, queries, value_dim), p.query.dtype)
        if lse is None:
            lse = np.empty((batch, heads, queries), p.compute)
        self.problem = p
        self.kernel = kernel(f"decode-{p.storage}")
        kv_heads = p.key_pages.shape[2]
        rows = heads // kv_heads * queries if kv_heads else 0
        blocks = -(-rows // ROWS)
        block_rows = -(-rows // blocks) if blocks else 1
        if block_rows > 2:
            block_rows = -(-block_rows // 4) * 4
        self.units = batch * kv_heads * blocks
        lanes = simd.lanes(p.compute)
        padded, padded_value = (-(-n // lanes) * lanes for n in (head_dim, value_dim))
        self.workspace_bytes = -(-chunks.scratch_bytes(p.compute, padded, padded_value) // 64) * 64
        self.partial_bytes = -(-chunks.partial_bytes(p.compute, block_rows + 3, padded_value) // 64) * 64
        # A row with an ordinary scale takes the raw products, and the scale goes into the softmax's exponent.
        plain = (
            1e-30 < p.scale < 1e30
            and not p.softcap
            and all(x is None for x in (p.bias, p.alibi_slopes, p.sinks))
        )
        values: dict[str, int] = {
            "workspace_bytes": self.workspace_bytes,
            "partial_bytes": self.partial_bytes,
            "bias_kind": 0 if p.bias is None else STORAGE_DTYPES.index(cast(str, storage_name(p.bias.dtype))),
            "table_width": p.page_table.shape[1],
            "page_size": p.key_pages.shape[1],
            "ring": p.ring,
            "queries": queries,
            "head_dim": head_dim,
            "value_dim": value_dim,
            "value_bytes": p.value_pages.shape[3] * p.value_pages.itemsize,
            "group": heads // kv_heads if kv_heads else 1,
            "heads": kv_heads,
            "blocks": blocks,
            "block_rows": block_rows,
            "left": p.left,
            "right": p.right,
            "plain": plain,
            "scale": runtime.bits(p.scale),
            "softcap": runtime.bits(p.softcap),
            "log2_scale": runtime.bits((p.scale if plain else 1.0) / math.log(2)),
        }
        for name, array, axes in (
            ("query", p.query, "bhs"), ("out", out, "bhs"), ("lse", lse, "bhs"),
            ("key", p.key_pages, "psh"), ("value", p.value_pages, "psh"),
            ("key_scales", p.key_scales, "psh"), ("value_scales", p.value_scales, "psh"),
            ("mask", p.mask, "bhqk"), ("bias", p.bias, "bhqk"), ("alibi_slopes", p.alibi_slopes, ""),
            ("sinks", p.sinks, ""), ("offset", p.offset, ""), ("key_starts", p.key_starts, ""),
            ("key_lengths", p.key_lengths, ""), ("page_table", p.page_table, ""),
        ):  # fmt: skip
            if array is not None:
                values[name] = runtime.address(array)
                values |= {f"{name}_{axis}": step for axis, step in zip(axes, array.strides, strict=False)}
        # Counters of finished chunks lie behind the record.
        words = [0] * (PARAMETERS.itemsize // 8 + self.units)
        for name, number in values.items():
            words[_WORDS[name]] = number
        self.words = np.array(words, np.int64)
        self.span = min(p.left + p.right + queries, 1 << 40)
        self.work_per_key = batch * heads * queries * (head_dim + value_dim)

    def forward(
        self,
        query: NDArray[Any],
        out: NDArray[Any],
        lse: NDArray[Any] | None = None,
        max_keys: int | None = None,
    ) -> None:
        """Attend `query`; no sequence has more than `max_keys` keys (the problem's where None is given)."""
        keys = self.problem.max_keys if max_keys is None else max_keys
        chunks = max(1, min(-(-keys // CHUNK), (self.span - 1) // CHUNK + 2))
        tasks = self.units * chunks
        if tasks == 0:
            return
        words = self.words.copy()
        words[QUERY], words[OUT] = runtime.address(query), runtime.address(out)
        words[LSE] = 0 if lse is None else runtime.address(lse)
        words[TASKS], words[CHUNKS] = tasks, chunks
        helpers = 0
        if self.work_per_key * min(keys, self.span) >= SERIAL_WORK:
            helpers = min(runtime.threads(), tasks) - 1
        partials = tasks * self.partial_bytes
        memory, start = runtime.scratch(partials + (helpers + 1) * self.workspace_bytes)
        words[PARTIALS], words[WORKSPACE] = start, start + partials
        runtime.run(self.kernel, words, helpers, (query, out, lse, self, memory))
        runtime.keep(memory)


def kernel_names(dtypes: Sequence[str]) -> list[str]:
    """The kernels that calls with these dtypes need."""
    return [f"decode-{dtype}" for dtype in dtypes]


def kernel(name: str) -> Any:
    """The compiled kernel of this name: "decode-" and the storage dtype."""
    return runtime.compiled(name, partial(chunks.build, name.partition("-")[2]))
