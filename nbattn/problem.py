"""The checks every door shares; they end in the frozen `Problem` that the kernels take and trust."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from .block_mask import BlockMask

UNBOUNDED = 1 << 40
"""A window side that no sequence reaches; small enough that adding positions cannot overflow."""

STORAGE_DTYPES = ("float32", "float64", "float16", "bfloat16")


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
    number, to be multiplied with the group's scale. Queries of a quantised cache are float32.
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


def backend_module(stem: str, backend: str | None) -> ModuleType:
    """The module that does the work of a door: the one of the same stem in the backend's folder."""
    if backend in (None, "cpu", "reference"):
        return import_module(f".{backend or 'cpu'}.{stem}", __package__)
    if backend == "cuda":
        msg = 'backend="cuda" needs an NVIDIA GPU, nbattn[cuda] and CUDA kernels, which this version lacks'
    else:
        msg = f"backend is {backend!r}; expected None, 'cpu', 'reference' or 'cuda'"
    raise ValueError(msg)


@cache
def storage_name(dtype: np.dtype[Any]) -> str | None:
    """The supported dtype's name, or None. bfloat16 is recognised by name: `ml_dtypes` is never imported."""
    return dtype.name if dtype.name in STORAGE_DTYPES else None


def as_array(x: ArrayLike, name: str) -> NDArray[Any]:
    """Any array the caller has, as a NumPy view where its protocol allows one."""
    if type(x) is np.ndarray:
        return x
    if hasattr(x, "__cuda_array_interface__"):
        msg = (
            f"{name} lives on a GPU, and this build has no CUDA kernels; copy it to the host first "
            f"(with the extra nbattn[cuda] and a backend for it, it could stay there)"
        )
        raise ValueError(msg)
    try:
        if hasattr(x, "__dlpack__") and not hasattr(x, "__array__"):
            return np.from_dlpack(x)  # type: ignore[arg-type]
        return np.asarray(x)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        msg = f"{name} cannot be read as an array: {error}"
        raise TypeError(msg) from error


def floating(x: ArrayLike, name: str) -> NDArray[Any]:
    """`x` as an array of one of the four supported dtypes."""
    array = as_array(x, name)
    if storage_name(array.dtype) is None:
        msg = (
            f"{name} has dtype {array.dtype}; expected float32, float64, float16 or bfloat16 "
            f"(convert it, for example {name}.astype('float32'))"
        )
        raise TypeError(msg)
    return array


def addressable(array: NDArray[Any]) -> NDArray[Any]:
    """`array` itself if its elements are aligned, native and whole elements apart, else a copy."""
    if array.flags.aligned and array.dtype.isnative and not any(s % array.itemsize for s in array.strides):
        return array
    return array.astype(array.dtype.newbyteorder("="), order="C")


def kernel_view(array: NDArray[Any]) -> NDArray[Any]:
    """`array` itself if kernels can read it where it lies, else a contiguous copy.

    Kernels count strides in elements and read the last axis as a run of memory.
    """
    last = array.shape[-1] <= 1 or array.strides[-1] == array.itemsize
    return addressable(array if last else np.ascontiguousarray(array))


def check_inputs(
    query: ArrayLike, key: ArrayLike, value: ArrayLike
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """The three inputs as arrays of one supported dtype."""
    q, k, v = floating(query, "query"), floating(key, "key"), floating(value, "value")
    if not q.dtype == k.dtype == v.dtype:
        msg = f"query, key and value have dtypes {q.dtype}, {k.dtype} and {v.dtype}; all three must share one"
        raise TypeError(msg)
    return q, k, v


def check_heads(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any]) -> None:
    """Head dimensions, key counts and head counts of (B, H, S, D) arrays fit each other."""
    if q.shape[-1] != k.shape[-1]:
        msg = f"query has head_dim {q.shape[-1]} but key has {k.shape[-1]}; both must match"
        raise ValueError(msg)
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        msg = f"head_dim must be at least 1, got {q.shape[-1]} for query and {v.shape[-1]} for value"
        raise ValueError(msg)
    if k.shape[2] != v.shape[2]:
        msg = f"key has {k.shape[2]} positions but value has {v.shape[2]}; both must match"
        raise ValueError(msg)
    if k.shape[1] != v.shape[1]:
        msg = f"key has {k.shape[1]} heads but value has {v.shape[1]}; both must match"
        raise ValueError(msg)
    if q.shape[0] != k.shape[0] or q.shape[0] != v.shape[0]:
        sizes = f"{q.shape[0]}, {k.shape[0]} and {v.shape[0]}"
        msg = f"query, key and value have batch sizes {sizes}; all must match"
        raise ValueError(msg)
    if q.shape[1] != k.shape[1] and (k.shape[1] == 0 or q.shape[1] % k.shape[1]):
        msg = (
            f"query has {q.shape[1]} heads and key has {k.shape[1]}; "
            f"the number of query heads must be a multiple of the number of key heads"
        )
        raise ValueError(msg)


def check_number(x: Any, name: str) -> float:
    """A finite real number."""
    if isinstance(x, (str, bytes, bool, complex, np.bool_, np.complexfloating)) or np.ndim(x):
        msg = f"{name} must be a number, got {type(x).__name__}"
        raise TypeError(msg)
    try:
        number = float(x)
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError):
        msg = f"{name} must be a number, got {type(x).__name__}"
        raise TypeError(msg) from None
    if not math.isfinite(number):
        msg = f"{name} must be finite, got {number}"
        raise ValueError(msg)
    return number


def check_scale(scale: float | None, head_dim: int, compute: Any) -> float:
    """The given scale, or 1/sqrt(head_dim)."""
    return 1.0 / math.sqrt(head_dim) if scale is None else _check_fits(scale, "scale", compute)


def _check_fits(x: Any, name: str, compute: Any) -> float:
    """A number that is finite in the compute dtype too."""
    number = check_number(x, name)
    if abs(number) > float(np.finfo(compute).max):
        msg = f"{name} is {number}, too large for {np.dtype(compute).name} arithmetic"
        raise ValueError(msg)
    return number


def check_softcap(softcap: float | None, compute: Any) -> float:
    """The given positive softcap, or 0 for none."""
    if softcap is None:
        return 0.0
    cap = _check_fits(softcap, "softcap", compute)
    if cap < 0:
        msg = f"softcap must be positive (0 or None for none), got {cap}"
        raise ValueError(msg)
    return cap


def check_compute_dtype(compute_dtype: str | None, storage: str) -> bool:
    """Whether the products take bfloat16 operands."""
    if compute_dtype is None:
        return False
    if compute_dtype != "bfloat16" or storage != "float32":
        got = f"{compute_dtype!r} with {storage} inputs"
        msg = f"compute_dtype is {got}; expected None or 'bfloat16' with float32"
        raise ValueError(msg)
    return True


def check_int(x: Any, name: str) -> int:
    """A whole number; bool is not one."""
    if isinstance(x, (bool, np.bool_)):
        msg = f"{name} must be an integer, got bool"
        raise TypeError(msg)
    try:
        return operator.index(x)
    except TypeError:
        msg = f"{name} must be an integer, got {type(x).__name__}"
        raise TypeError(msg) from None


def check_flag(x: Any, name: str) -> bool:
    """True or False, and nothing that merely looks like it."""
    if not isinstance(x, (bool, np.bool_)):
        msg = f"{name} must be True or False, got {type(x).__name__}"
        raise TypeError(msg)
    return bool(x)


def check_int_vector(x: ArrayLike, name: str, length: int) -> NDArray[np.int64]:
    """A 1-D integer array of the given length, as int64."""
    array = as_array(x, name)
    if array.dtype.kind not in "iu":
        msg = f"{name} must hold integers, got dtype {array.dtype}"
        raise TypeError(msg)
    if array.shape != (length,):
        msg = f"{name} has shape {array.shape}; expected ({length},)"
        raise ValueError(msg)
    # A copy: the caller may change the array while kernels rely on what was checked.
    return np.array(array, dtype=np.int64)


def check_window(window_size: Any, is_causal: bool) -> tuple[int, int]:
    """(left, right) with UNBOUNDED for an open side; causal closes the right side at 0."""
    left = right = UNBOUNDED
    if window_size is not None:
        sides = tuple(window_size) if isinstance(window_size, (tuple, list, np.ndarray)) else ()
        if len(sides) != 2:
            msg = f"window_size must be a pair (left, right), got {window_size!r}"
            raise (ValueError if sides else TypeError)(msg)
        left, right = (_window_side(side) for side in sides)
    return left, min(right, 0) if is_causal else right


def _window_side(side: Any) -> int:
    if side is None:
        return UNBOUNDED
    width = check_int(side, "window_size")
    if width < -1:
        msg = f"window_size must hold non-negative integers (None or -1 for unbounded), got {width}"
        raise ValueError(msg)
    return UNBOUNDED if width == -1 else min(width, UNBOUNDED)


def check_key_lengths(key_lengths: ArrayLike | None, limits: NDArray[np.int64]) -> NDArray[np.int64]:
    """Lengths of each sequence's keys, within `limits` (B,)."""
    if key_lengths is None:
        return limits
    lengths = check_int_vector(key_lengths, "key_lengths", len(limits))
    if (lengths < 0).any() or (lengths > limits).any():
        b = int(np.flatnonzero((lengths < 0) | (lengths > limits))[0])
        msg = f"key_lengths[{b}] is {lengths[b]}; expected 0 to {limits[b]}, the number of keys"
        raise ValueError(msg)
    return lengths


def check_offset(
    query_offset: Any, query_lengths: NDArray[np.int64], key_lengths: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The position of each sequence's first query among its keys, (B,)."""
    batch = len(query_lengths)
    if isinstance(query_offset, str):
        if query_offset != "end":
            msg = f"query_offset must be an integer, an integer array or 'end', got {query_offset!r}"
            raise ValueError(msg)
        return key_lengths - query_lengths
    if np.ndim(query_offset) == 0:
        offset = check_int(np.asarray(query_offset)[()], "query_offset")
        if abs(offset) >= UNBOUNDED:
            msg = f"query_offset must be smaller than 2**40 in size, got {offset}"
            raise ValueError(msg)
        return np.full(batch, offset, np.int64)
    offsets = check_int_vector(query_offset, "query_offset", batch)
    if ((offsets <= -UNBOUNDED) | (offsets >= UNBOUNDED)).any():
        msg = "query_offset must be smaller than 2**40 in size"
        raise ValueError(msg)
    return offsets


def check_per_head(x: ArrayLike | None, name: str, heads: int, compute: Any) -> NDArray[Any] | None:
    """One floating number per query head, in the compute dtype."""
    if x is None:
        return None
    array = floating(x, name)
    if array.shape != (heads,):
        msg = f"{name} has shape {array.shape}; expected ({heads},), one for each query head"
        raise ValueError(msg)
    return np.ascontiguousarray(array, dtype=compute)


def check_mask(mask: Any, shape: tuple[int, int, int, int]) -> NDArray[Any] | None:
    """A mask broadcast to (B, Hq, Sq, Sk): bytes, along the keys a run of memory or one for all."""
    if mask is None:
        return None
    array = as_array(mask, "mask")
    if array.dtype.kind not in "biu":
        kind = "pass a floating mask as bias" if storage_name(array.dtype) else "use bool or integers"
        msg = f"mask has dtype {array.dtype}; expected bool or integer where nonzero means attend ({kind})"
        raise TypeError(msg)
    array = _broadcast(array, "mask", shape)
    if array.itemsize == 1 and array.strides[-1] in (0, 1):
        return array
    return np.broadcast_to(np.not_equal(_once(array), 0, order="C"), shape)


def check_bias(bias: Any, shape: tuple[int, int, int, int]) -> NDArray[Any] | None:
    """A floating bias, broadcast to (B, Hq, Sq, Sk)."""
    if bias is None:
        return None
    array = as_array(bias, "bias")
    if storage_name(array.dtype) is None:
        kind = "pass a boolean or integer mask as mask" if array.dtype.kind in "biu" else "convert it"
        msg = f"bias has dtype {array.dtype}; expected float32, float64, float16 or bfloat16 ({kind})"
        raise TypeError(msg)
    array = _broadcast(array, "bias", shape)
    if array.strides[-1] in (0, array.itemsize):
        return array
    return np.broadcast_to(np.ascontiguousarray(_once(array)), shape)


def _once(array: NDArray[Any]) -> NDArray[Any]:
    """`array` with length 1 where its axes are broadcast."""
    return array[tuple(slice(1 if stride == 0 else None) for stride in array.strides)]


def _broadcast(array: NDArray[Any], name: str, shape: tuple[int, int, int, int]) -> NDArray[Any]:
    fits = array.ndim <= 4 and all(
        have in (1, want) for have, want in zip(array.shape[::-1], shape[::-1], strict=False)
    )
    if not fits:
        msg = f"{name} has shape {array.shape}; it must broadcast to (batch, heads, queries, keys) = {shape}"
        raise ValueError(msg)
    return np.broadcast_to(addressable(array), shape)


def check_out(
    out: Any, shape: tuple[int, ...], dtype: np.dtype[Any], inputs: tuple[NDArray[Any] | None, ...]
) -> NDArray[Any]:
    """A writable array of the result's shape and dtype that overlaps no input; a new one if None is given."""
    if out is None:
        return np.empty(shape, dtype)
    if not isinstance(out, np.ndarray):
        msg = f"out must be a numpy array, got {type(out).__name__}"
        raise TypeError(msg)
    if out.shape != shape:
        msg = f"out has shape {out.shape}; expected {shape}"
        raise ValueError(msg)
    if out.dtype != dtype:
        msg = f"out has dtype {out.dtype}; expected {dtype}"
        raise ValueError(msg)
    if not out.flags.writeable:
        msg = "out is read-only; pass a writable array"
        raise ValueError(msg)
    if out.size and any(
        stride == 0 and size > 1 for stride, size in zip(out.strides, out.shape, strict=True)
    ):
        msg = "out has a broadcast axis (stride 0): several results would share one place; pass a plain array"
        raise ValueError(msg)
    if any(x is not None and _overlap(out, x) for x in inputs):
        msg = "out shares memory with an input; pass a separate array"
        raise ValueError(msg)
    return out


def _overlap(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Whether two arrays share an element; undecided within the work limit counts as yes."""
    try:
        return np.shares_memory(a, b, max_work=100_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True
