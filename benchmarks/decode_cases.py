"""The decode rows of `peers.py`: few queries against many keys, read from arrays or from a cache."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import nbattn

from .cases import SHORT, Call, numpy_dtype

EXACT_HEADS = 4
"""How many heads of a sequence are computed in float64."""
PART = 1 << 20
"""Random numbers that a thread draws from one generator."""


class Inputs(NamedTuple):
    query: NDArray[Any]  # (B, Hq, Sq, D)
    key: NDArray[Any]  # (B, Hkv, Sk, D)
    value: NDArray[Any]


@dataclass(frozen=True)
class Decode:
    """One row: the last `queries` positions of each sequence attend to all that came before them."""

    heads: int
    kv_heads: int
    keys: int
    dtype: str = "float32"
    queries: int = 1
    batch: int = 1
    head_dim: int = 128
    quick: bool = False

    suite = operation = "decode"
    unit, limit = "GB/s", "read rate"

    @property
    def name(self) -> str:
        shape = f"{self.heads}/{self.kv_heads}x{self.keys}x{self.head_dim}"
        few = f"{self.queries} queries" * (self.queries > 1)
        return " ".join(filter(None, [SHORT[self.dtype], f"{self.batch}x" * (self.batch > 1) + shape, few]))

    @property
    def precision(self) -> str:
        return self.dtype

    @property
    def group(self) -> str:
        """What it is averaged with."""
        return f"decode {SHORT[self.dtype]}"

    @property
    def work(self) -> float:
        """Bytes: each key and value is read once, whatever the number of queries that share it."""
        count = 2 * self.batch * self.kv_heads * self.keys * self.head_dim
        return float(count * numpy_dtype(self.dtype).itemsize)

    def inputs(self) -> Inputs:
        shape = (self.batch, self.heads, self.queries, self.head_dim)
        query = np.random.default_rng(1).standard_normal(shape, np.float32).astype(numpy_dtype(self.dtype))
        return Inputs(
            query, *_keys_and_values(self.batch, self.kv_heads, self.keys, self.head_dim, self.dtype)
        )

    def exact(self, inputs: Inputs) -> tuple[Any, NDArray[Any]]:
        """Some heads of every sequence, the first and the last one among them, and what they should be."""
        heads = np.unique(np.linspace(0, self.heads - 1, EXACT_HEADS).astype(int))
        result = np.empty((self.batch, len(heads), self.queries, self.head_dim))
        hidden = ~np.tri(self.queries, self.keys, self.keys - self.queries, bool)
        for b, (i, h) in itertools.product(range(self.batch), enumerate(heads)):
            shared = h * self.kv_heads // self.heads
            query, key, value = (
                x.astype(np.float64)
                for x in (inputs.query[b, h], inputs.key[b, shared], inputs.value[b, shared])
            )
            scores = query @ key.T / np.sqrt(self.head_dim)
            scores[hidden] = -np.inf
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            result[b, i] = weights @ value / weights.sum(axis=-1, keepdims=True)
        return np.s_[:, heads], result

    def ours(self, inputs: Inputs, **extra: Any) -> Call:
        """The call of this library, with more options if given."""
        options = {"is_causal": True, "query_offset": "end"} if self.queries > 1 else {}
        return Call(partial(nbattn.scaled_dot_product_attention, *inputs, **options, **extra), np.asarray)

    def at_limit(self, inputs: Inputs, threads: int) -> float:
        """Seconds that reading its keys and values takes at the memory's rate, measured now."""
        from . import roofline

        return self.work / roofline.read_rate(threads, repeats=2)


@lru_cache(maxsize=1)  # rows that differ in their heads alone share them
def _keys_and_values(batch: int, kv_heads: int, keys: int, head_dim: int, dtype: str) -> NDArray[Any]:
    """(2, B, Hkv, Sk, D), normal."""
    numbers = np.empty((2, batch, kv_heads, keys, head_dim), numpy_dtype(dtype))
    flat = numbers.reshape(-1)

    def draw(start: int) -> None:
        part = flat[start : start + PART]
        part[...] = np.random.default_rng(start).standard_normal(len(part), np.float32)

    with ThreadPoolExecutor() as pool:
        list(pool.map(draw, range(0, flat.size, PART)))
    return numbers


def rows() -> list[Decode]:
    """Every row, in the order of the table."""
    # 256 MB of keys and values.
    grid = [Decode(8 * group, 8, 32768, quick=True) for group in (1, 4, 8)]
    grid += [Decode(8 * group, 8, 65536, "bfloat16", quick=True) for group in (1, 4, 8)]
    grid += [Decode(32, 8, 65536, "float16"), Decode(32, 8, 16384, "float64")]
    grid += [Decode(32, 8, 65536, dtype, head_dim=64) for dtype in ("float32", "bfloat16")]
    grid += [Decode(32, 8, 4096, dtype, batch=8) for dtype in ("float32", "bfloat16")]
    grid += [Decode(32, 8, 128, quick=True), Decode(32, 8, 1024), Decode(32, 8, 4096)]
    for dtype in ("float32", "bfloat16"):
        grid += [
            Decode(32, 8, 4096, dtype, n, quick=n in (4, 16, 32) and dtype == "float32")
            for n in (2, 4, 8, 16, 32, 64)
        ]
    return grid
