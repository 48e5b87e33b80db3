"""What kernels take and trust: calls that the doors have checked and resolved, frozen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .block_mask import BlockMask

UNBOUNDED = 1 << 40
"""A window side that no sequence reaches; small enough that adding positions cannot overflow."""

STORAGE_DTYPES = ("float32", "float64", "float16", "bfloat16")


@cache
def storage_name(dtype: np.dtype[Any]) -> str | None:
    """The supported dtype's name, or None. bfloat16 is recognised by name: `ml_dtypes` is never imported."""
    return dtype.name if dtype.name in STORAGE_DTYPES else None


@dataclass(frozen=True, slots=True, eq=False)
class Mod:
    """A function of the user's that scores go through, checked.

    It is called as ``function(score, batch, head, q_index, kv_index, *arguments)``, a mask_mod without the
    score. The indices are those of the query and the key within the sequence.
    """

    function: Callable[..., Any]  # plain Python
    name: str  # "score_mod" or "mask_mod"
    arguments: tuple[Any, ...]  # C-contiguous arrays, ints, floats and bools
    label: str  # for messages: name, function, file and line


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """One attention call, checked and resolved: what a backend's `forward` needs, and nothing it must check.

    Rows are queries. Query i of sequence b sees the keys j with
    ``i + offset[b] - left <= j <= i + offset[b] + right`` and ``j < key_lengths[b]``, where the mask says so.
    In a packed (varlen) problem B is the number of sequences, the arrays have a batch axis of length 1, and
    sequence b holds the rows ``query_starts[b]:query_starts[b + 1]`` and keys likewise; `max_queries` and
    `max_keys` are then the longest sequence's.
    """

    query: NDArray[Any]  # (B, Hq, Sq, D), last axis contiguous
    key: NDArray[Any]  # (B, Hkv, Sk, D)
    value: NDArray[Any]  # (B, Hkv, Sk, Dv)
    storage: str  # one of STORAGE_DTYPES
    batch: int
    max_queries: int
    max_keys: int
    scale: float
    softcap: float  # 0 where there is none
    left: int
    right: int
    offset: NDArray[np.int64]  # (B,)
    key_lengths: NDArray[np.int64]  # (B,)
    mask: NDArray[Any] | None = None  # (B, Hq, Sq, Sk) as of `check_mask`, broadcast axes have stride 0
    blocks: BlockMask | None = None  # in place of a mask, (B or 1, Hq or 1, Sq, Sk)
    bias: NDArray[Any] | None = None  # (B, Hq, Sq, Sk) floating, likewise
    alibi_slopes: NDArray[Any] | None = None  # (Hq,) in the compute dtype
    sinks: NDArray[Any] | None = None  # (Hq,) in the compute dtype
    score_mod: Mod | None = None
    mask_mod: Mod | None = None
    bfloat16_products: bool = False  # float32 problems only: operands of both products rounded to bfloat16
    query_starts: NDArray[np.int64] | None = None  # (B + 1,), packed problems only
    key_starts: NDArray[np.int64] | None = None  # (B + 1,)

    @property
    def compute(self) -> type[np.floating[Any]]:
        """The dtype of accumulation, softmax, weights and lse."""
        return np.float64 if self.storage == "float64" else np.float32


CACHE_DTYPES = (*STORAGE_DTYPES, "int8", "int4")
INT4_GROUP = 32
"""Numbers of a 4-bit cache that share a scale."""


@dataclass(frozen=True, slots=True, eq=False)
class CacheProblem:
    """One attention call over cached keys and values, checked and resolved.

    Position p of sequence b lies in slot ``p % ring`` (``p`` where `ring` is 0); slot s in row
    ``s % page_size`` of page ``page_table[b, s // page_size]``. Query i of sequence b sees the positions j
    with ``key_starts[b] <= j < key_lengths[b]`` and
    ``i + offset[b] - left <= j <= i + offset[b] + right``, where the mask says so. Rows of pages that no
    sequence sees may hold anything.

    int8 numbers times their token's and head's scale are the keys; int4 keeps `INT4_GROUP` numbers in 16
    bytes, of which byte i holds number i in its low and number i + 16 in its high four bits, 8 more than the
    number, to be multiplied with the group's scale. Queries of a quantised cache are float32, on a GPU of any
    dtype but float64. With int8,
    kernels may round the numbers of a query to multiples of its largest / 32512, and weights times the scales
    of 64 values to multiples of their largest / 32767; on a GPU, with int4 too, both to 16 bits each.
    """

    query: NDArray[Any]  # (B, Hq, Sq, D), last axis contiguous
    key_pages: NDArray[Any]  # (pages, page_size, Hkv, D), last axis contiguous; int4: uint8, D // 2 bytes
    value_pages: NDArray[Any]  # (pages, page_size, Hkv, Dv)
    key_scales: (
        NDArray[np.float32] | None
    )  # (pages, page_size, Hkv) int8, (pages, page_size, Hkv, D / 32) int4
    value_scales: NDArray[np.float32] | None
    storage: str  # one of CACHE_DTYPES
    page_table: NDArray[np.int64]  # (B, pages of a sequence), C-contiguous
    ring: int
    key_starts: NDArray[np.int64]  # (B,)
    key_lengths: NDArray[np.int64]  # (B,)
    max_keys: int  # at least the longest of key_lengths - key_starts
    scale: float
    softcap: float  # 0 where there is none
    left: int
    right: int
    offset: NDArray[np.int64]  # (B,): the position of query 0
    mask: NDArray[Any] | None = None  # (B, Hq, Sq, positions) likewise, broadcast axes have stride 0
    bias: NDArray[Any] | None = None  # (B, Hq, Sq, positions) floating, likewise
    alibi_slopes: NDArray[Any] | None = None  # (Hq,) in the compute dtype
    sinks: NDArray[Any] | None = None  # (Hq,) in the compute dtype

    @property
    def compute(self) -> type[np.floating[Any]]:
        """The dtype of accumulation, softmax and lse."""
        return np.float64 if self.storage == "float64" else np.float32


@dataclass(frozen=True, slots=True, eq=False)
class AppendProblem:
    """New keys and values to be written into a cache, checked and resolved.

    Row i of sequence b, for ``i < counts[b]``, stands at position ``starts[b] + i`` and goes where
    `CacheProblem` says that this position lies; where `ring` is set, rows ``i < counts[b] - ring`` have no
    place left and are not written. Nothing else in the pages changes.

    Where there are `frequencies`, the first 2 * R numbers of each key turn before, in the compute dtype: pair
    n by the angle ``position * frequencies[n]``, a float64 product whose sine and cosine are rounded to the
    compute dtype. Pair n is ``(n, n + R)``, or ``(2 * n, 2 * n + 1)`` where `interleaved` is set.

    int8: the scale is the largest magnitude of the token's head / 127 and the numbers are
    ``rint(x / scale)``, within -127 and 127. int4: the scale of a group is its number of largest magnitude
    (the first of several) / -8, and the numbers are ``rint(x / scale)``, within -8 and 7. All that is float32
    with true division, ties to even; where the scale is 0 or not finite, the numbers are 0. Scales that are
    not finite are stored, so that a NaN or inf makes its token NaN.
    """

    key: NDArray[Any]  # (B, Hkv, S, D), last axis contiguous; float32 where the cache is quantised
    value: NDArray[Any]  # (B, Hkv, S, Dv), likewise
    key_pages: NDArray[Any]  # as in CacheProblem, like all that follow
    value_pages: NDArray[Any]
    key_scales: NDArray[np.float32] | None
    value_scales: NDArray[np.float32] | None
    storage: str
    page_table: NDArray[np.int64]
    ring: int
    starts: NDArray[np.int64]  # (B,): the position of each sequence's first row
    counts: NDArray[np.int64]  # (B,): how many of the S rows are the sequence's, 0 to S
    frequencies: NDArray[np.float64] | None = None  # (R,), radians per position
    interleaved: bool = False

    @property
    def compute(self) -> type[np.floating[Any]]:
        """The dtype that keys turn in."""
        return np.float64 if self.storage == "float64" else np.float32


@dataclass(frozen=True, slots=True, eq=False)
class LinearProblem:
    """One call of linear attention, checked and resolved.

    The state S (F, Dv) of a key head takes the tokens in their order::

        S = exp(decay[t])[:, None] * S
        S = S + outer(key[t], value[t])                           without beta
        S = S + outer(key[t], beta[t] * (value[t] - key[t] @ S))  with beta

    and the output of query t is ``scale * query[t] @ S``, with S as of token t where `is_causal` is set (then
    Sq equals Sk), else as of the last one. Queries and keys go through `feature` before. With `normalize`
    the state has one column more, whose values are 1, and outputs are divided by theirs, or 0 where it is 0.
    """

    query: NDArray[Any]  # (B, Hq, Sq, F), float32 or float64 like all others, last axis contiguous
    key: NDArray[Any]  # (B, Hkv, Sk, F), likewise
    value: NDArray[Any]  # (B, Hkv, Sk, Dv), likewise
    scale: float
    feature: str  # "identity", "elu" or "relu"
    is_causal: bool
    normalize: bool
    decay: NDArray[Any] | None = None  # (B, Hkv, Sk, F), the logarithm; broadcast axes have stride 0
    beta: NDArray[Any] | None = None  # (B, Hkv, Sk), likewise
    state: NDArray[Any] | None = None  # (B, Hkv, F, Dv or Dv + 1), last axis contiguous
