"""The decode rows of `peers.py`: few queries against many keys, read from arrays or from a cache."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
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
APPENDED = 4096
"""Tokens that a cache is given at once."""
RING = 4096
"""Tokens that a cache holds which goes on for ever."""


READ_MEGABYTES = 512
"""What is read to measure the memory's rate; far larger than a last cache's share of a core."""
PAGE = 16
QUANTISED = ("int8", "int4")
ARRAYS, CACHE, PAGES, PAGED = "", "cache", f"pages of {PAGE}", f"cache in pages of {PAGE}"
"""Pages alone lie in no order, those of a cache as it gives them to sequences that grow after each other."""


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
    dtype: str = "float32"  # what keys and values are stored in
    queries: int = 1
    batch: int = 1
    head_dim: int = 128
    kept: str = ARRAYS
    quick: bool = False

    suite = operation = "decode"
    unit, limit = "GB/s", "read rate"

    @property
    def name(self) -> str:
        times = f"{self.batch}x" * (self.batch > 1)
        shape = f"{times}{self.heads}/{self.kv_heads}x{self.keys}x{self.head_dim}"
        few = f"{self.queries} queries" * (self.queries > 1)
        return " ".join(filter(None, [SHORT.get(self.dtype, self.dtype), shape, few, self.kept]))

    @property
    def precision(self) -> str:
        return self.dtype

    @property
    def group(self) -> str:
        """What it is averaged with."""
        return f"decode {SHORT.get(self.dtype, self.dtype)}"

    @property
    def given(self) -> str:
        """The dtype of what is stored, before it is quantised."""
        return "bfloat16" if self.dtype in QUANTISED else self.dtype

    @property
    def work(self) -> float:
        """Bytes: each key and value is read once, whatever the number of queries that share it."""
        rows = 2 * self.batch * self.kv_heads * self.keys
        quantised = {"int8": self.head_dim + 4, "int4": self.head_dim // 2 + self.head_dim // 32 * 4}
        return float(rows * (quantised.get(self.dtype) or self.head_dim * numpy_dtype(self.dtype).itemsize))

    def inputs(self) -> Inputs:
        shape = (self.batch, self.heads, self.queries, self.head_dim)
        query = np.random.default_rng(1).standard_normal(shape, np.float32).astype(numpy_dtype(self.given))
        return Inputs(
            query, *_keys_and_values(self.batch, self.kv_heads, self.keys, self.head_dim, self.given)
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
        if self.kept == CACHE:
            return Call(partial(self.cache(inputs).attend, inputs.query, **extra), np.asarray)
        if self.kept == PAGED:
            pool = nbattn.PagedKVCache(
                self.batch * self.keys // PAGE, PAGE, self.kv_heads, self.head_dim, self.dtype
            )
            sequences = [pool.add() for _ in range(self.batch)]
            for i, start in itertools.product(sequences, range(0, self.keys, APPENDED)):
                pool.append(i, *(x[i : i + 1, :, start : start + APPENDED] for x in inputs[1:]))
            return Call(partial(pool.attend, sequences, inputs.query, **extra), np.asarray)
        if self.kept == PAGES:
            return Call(
                partial(nbattn.paged_attention, inputs.query, *self.pages(inputs), **extra), np.asarray
            )
        options = {"is_causal": True, "query_offset": "end"} if self.queries > 1 else {}
        return Call(partial(nbattn.scaled_dot_product_attention, *inputs, **options, **extra), np.asarray)

    def beside(self, inputs: Inputs) -> dict[str, Call]:
        """The call on a plain cache of what is given, which quantised ones and pages are compared with."""
        if self.kept not in (PAGES, PAGED) and self.dtype not in QUANTISED:
            return {}
        return {f"nbattn {SHORT[self.given]}": replace(self, dtype=self.given, kept=CACHE).ours(inputs)}

    def cache(self, inputs: Inputs) -> nbattn.KVCache:
        cache = nbattn.KVCache(self.batch, self.kv_heads, self.keys, self.head_dim, self.dtype)
        for start in range(0, self.keys, APPENDED):
            cache.append(*(x[:, :, start : start + APPENDED] for x in inputs[1:]))
        return cache

    def pages(self, inputs: Inputs) -> tuple[NDArray[Any], ...]:
        """Key pages, value pages, the table, which names them in no order, and lengths."""
        each = self.keys // PAGE
        order = np.random.default_rng(2).permutation(self.batch * each)
        shape = (self.batch, self.kv_heads, each, PAGE, self.head_dim)
        pages = []
        for x in inputs[1:]:
            laid = np.empty((len(order), self.kv_heads, PAGE, self.head_dim), x.dtype)
            laid[order] = x.reshape(shape).swapaxes(1, 2).reshape(laid.shape)
            pages.append(laid.swapaxes(1, 2))
        return *pages, order.reshape(self.batch, each), np.full(self.batch, self.keys)

    def at_limit(self, inputs: Inputs, threads: int) -> float:
        """Seconds that reading its keys and values takes at the memory's rate, measured now."""
        from . import roofline

        return self.work / roofline.read_rate(threads, READ_MEGABYTES, repeats=2)


@dataclass(frozen=True)
class Append:
    """One row: new tokens into a cache that goes round in its memory."""

    kv_heads: int
    dtype: str = "float32"
    tokens: int = 1
    batch: int = 1
    head_dim: int = 128
    quick: bool = False

    suite, operation = "decode", "append"
    unit, limit = "GB/s", "read rate"

    @property
    def name(self) -> str:
        new = "1 token" if self.tokens == 1 else f"{self.tokens} tokens"
        return f"{SHORT.get(self.dtype, self.dtype)} {self.kv_heads}x{self.head_dim} append {new}"

    @property
    def precision(self) -> str:
        return self.dtype

    group = "append"

    @property
    def given(self) -> str:
        return "float32" if self.dtype in QUANTISED else self.dtype

    @property
    def work(self) -> float:
        """Bytes of the new keys and values."""
        return (
            2.0 * self.batch * self.kv_heads * self.tokens * self.head_dim * numpy_dtype(self.given).itemsize
        )

    def inputs(self) -> Inputs:
        shape = (self.batch, self.kv_heads, self.tokens, self.head_dim)
        numbers = np.random.default_rng(0).standard_normal((3, *shape), np.float32)
        return Inputs(*numbers.astype(numpy_dtype(self.given)))

    def exact(self, inputs: Inputs) -> tuple[Any, NDArray[Any]]:
        """The values, which a query that sees its own position alone gets back."""
        return ..., inputs.value.astype(np.float64)

    def ours(self, inputs: Inputs, **extra: Any) -> Call:
        cache = nbattn.KVCache(
            self.batch, self.kv_heads, RING, self.head_dim, self.dtype, window=RING - self.tokens, **extra
        )
        alone = partial(cache.attend, inputs.query, window_size=(0, 0))
        return Call(partial(cache.append, *inputs[1:]), lambda _: np.asarray(alone()))

    def beside(self, inputs: Inputs) -> dict[str, Call]:
        return {}

    def at_limit(self, inputs: Inputs, threads: int) -> float:
        """Seconds that reading so many bytes takes at the memory's rate, measured now."""
        from . import roofline

        return self.work / roofline.read_rate(threads, READ_MEGABYTES, repeats=2)


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


def rows() -> list[Decode | Append]:
    """Every row, in the order of the table."""
    # 256 MB of keys and values, and what quantising leaves of them.
    grid: list[Decode | Append] = [Decode(8 * group, 8, 32768, quick=True) for group in (1, 4, 8)]
    grid += [Decode(32, 8, 32768, kept=kept, quick=kept != CACHE) for kept in (CACHE, PAGES, PAGED)]
    grid += [Decode(8 * group, 8, 65536, "bfloat16", quick=True) for group in (1, 4, 8)]
    grid += [Decode(32, 8, 65536, "bfloat16", kept=kept) for kept in (PAGES, PAGED)]
    grid += [
        Decode(8 * group, 8, 65536, dtype, kept=CACHE, quick=group == 4)
        for dtype, group in itertools.product(QUANTISED, (1, 4, 8))
    ]
    grid += [Decode(32, 8, 65536, "float16"), Decode(32, 8, 16384, "float64")]
    grid += [Decode(32, 8, 65536, dtype, head_dim=64) for dtype in ("float32", "bfloat16")]
    grid += [Decode(32, 8, 4096, dtype, batch=8) for dtype in ("float32", "bfloat16")]
    grid += [Decode(32, 8, 128, quick=True), Decode(32, 8, 128, kept=CACHE, quick=True)]
    grid += [Decode(32, 8, n, dtype) for dtype in ("float32", "bfloat16") for n in (1024, 4096)]
    for dtype in ("float32", "bfloat16"):
        grid += [
            Decode(32, 8, 4096, dtype, n, quick=n in (4, 16, 32) and dtype == "float32")
            for n in (2, 4, 8, 16, 32, 64)
        ]
    grid += [Append(8, quick=True), Append(8, "bfloat16"), Append(8, "int8", quick=True), Append(8, "int4")]
    return [*grid, Append(8, tokens=512), Append(8, "int8", tokens=512)]
