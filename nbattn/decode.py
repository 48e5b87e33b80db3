"""Attention over cached keys and values: docstring, checks, dispatch. The caches are in `cache.py`."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import check, device
from .attention import AttentionOutput
from .device import DeviceArray
from .problem import INT4_GROUP, CacheProblem, storage_name


def paged_attention(
    query: ArrayLike,
    key_pages: ArrayLike,
    value_pages: ArrayLike,
    page_table: ArrayLike,
    key_lengths: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    key_scales: ArrayLike | None = None,
    value_scales: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    is_causal: bool = True,
    window_size: tuple[int | None, int | None] | None = None,
    query_offset: ArrayLike | str = "end",
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    return_lse: bool = False,
    out: NDArray[Any] | None = None,
    backend: str | None = None,
) -> NDArray[Any] | AttentionOutput:
    """Attention over keys and values that lie in pages, which a table names for each sequence.

    Position p of sequence b is row ``p % page_size`` of page ``page_table[b, p // page_size]``. The pages are
    read where they lie; rows from ``key_lengths[b]`` on, and pages that the table does not name, may hold
    anything. `PagedKVCache` keeps pages and table by itself.

    Parameters
    ----------
    query : array_like, shape (B, Hq, Sq, D)
        float32, float64, float16 or bfloat16.
        On a GPU so are all other arrays but the table and the lengths, which are checked on the host.
    key_pages, value_pages : array_like, shapes (pages, page_size, Hkv, D) and (pages, page_size, Hkv, Dv)
        Same dtype as the query, strided as you like but for the last axis. Or quantised: int8, or uint8 that
        holds two 4-bit numbers in each byte, D // 2 and Dv // 2 of them; the query is then no float64.
    page_table : int array_like, shape (B, P)
        Entries that no position below the length needs may hold anything.
    key_lengths : int array_like (B,)
        How many positions each sequence has, 0 to ``P * page_size``.
    mask, bias : array_like, optional
        As in `scaled_dot_product_attention`, broadcastable to (B, Hq, Sq, longest length).
    key_scales, value_scales : array_like of float32, optional
        For quantised pages: the factor of each token and head (pages, page_size, Hkv) for int8, of each 32
        numbers (pages, page_size, Hkv, D // 32) for 4 bits. Of such 32 numbers byte i holds number i in its
        low and number i + 16 in its high bits, 8 more than the number.
    is_causal : bool
        True unless given: with few queries at the end of many keys it is what decoders mean.
    query_offset : int, int array (B,) or "end"
        The position of query 0; "end" is ``key_lengths[b] - Sq``.
    window_size, scale, softcap, alibi_slopes, sinks
        As in `scaled_dot_product_attention`.
    return_lse : bool
        Also return the log-sum-exp ``(B, Hq, Sq)``.
    out : ndarray, optional
        Where to write the output: right shape and dtype, writable, no memory shared with an input.
    backend : {None, "cpu", "reference", "cuda"}
        None chooses by where the inputs live.

    Returns
    -------
    ndarray or AttentionOutput
        The output ``(B, Hq, Sq, Dv)`` in the query's dtype, with `return_lse` in the named tuple
        ``(output, None, lse)``.

    Raises
    ------
    TypeError, ValueError
        As `scaled_dot_product_attention`; ValueError also for a table that names a page outside where a
        position needs it, for lengths longer than the table, and while a CUDA graph is captured, which cannot
        hold a table of the host.

    Notes
    -----
    On a GPU the table and the lengths are checked on the host and sent with every call, on the arrays'
    stream. Which calls read pages as they lie, and how exactly, the notes of `KVCache` say; others gather
    them first. `PagedKVCache` can be part of a graph.

    References
    ----------
    Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023,
    https://arxiv.org/abs/2309.06180.

    Examples
    --------
    Two sequences of 3 and 1 tokens share the page 2 of two rows:

    >>> import numpy as np
    >>> from nbattn import paged_attention
    >>> pages = np.arange(8, dtype=np.float32).reshape(4, 2, 1, 1)
    >>> query = np.zeros((2, 1, 1, 1), np.float32)
    >>> paged_attention(query, pages, pages, [[2, 0], [2, -1]], [3, 1]).ravel()
    array([3., 4.], dtype=float32)
    """
    layout = None
    if mask is bias is alibi_slopes is sinks is out is backend is None and return_lse is False:
        numbers = (is_causal, query_offset, scale, softcap)
        arrays = (query, key_pages, value_pages, page_table, key_lengths, key_scales, value_scales)
        layout = _layout(arrays, numbers, window_size)
        again = _repeats.get(layout)
        if again is not None and (output := again(*arrays)) is not None:
            return output
    large = {"query": query, "key_pages": key_pages, "value_pages": value_pages, "key_scales": key_scales,
             "value_scales": value_scales, "mask": mask, "bias": bias, "out": out}  # fmt: skip
    found = device.placed(large, {"alibi_slopes": alibi_slopes, "sinks": sinks})
    if found:
        query, key_pages, value_pages, key_scales, value_scales, mask, bias, out, alibi_slopes, sinks = (
            found.values()
        )
        backend = check.gpu_backend(backend, found["query"])
    module = check.backend_module("decode", backend)
    pages = _check_pages(key_pages, value_pages, key_scales, value_scales)
    table, lengths = _check_table(page_table, key_lengths, pages)
    q = check_query(query, pages, len(lengths))
    queries = np.full(len(lengths), q.shape[2], np.int64)
    options = Options(mask, bias, is_causal, window_size, scale, softcap, alibi_slopes, sinks)
    problem = cache_problem(
        q,
        pages,
        page_table=table,
        ring=0,
        starts=np.zeros(len(lengths), np.int64),
        lengths=lengths,
        longest=int(lengths.max(initial=0)),
        offset=check.check_offset(query_offset, queries, lengths),
        options=options,
    )
    given = (query, key_pages, value_pages, key_scales, value_scales, *options)
    result, lse = run(module, problem, q.dtype, check.check_flag(return_lse, "return_lse"), out, given)
    result, lse = map(device.given_back, (result, lse))
    if layout is not None and query_offset == "end":
        _remember(layout, module, problem, given[:5])
    return result if lse is None else AttentionOutput(result, None, lse)


class Pages(NamedTuple):
    """Where cached keys and values lie, and as what: see `CacheProblem`."""

    key: NDArray[Any]  # (pages, page_size, Hkv, D), as it is stored
    value: NDArray[Any]
    key_scales: NDArray[np.float32] | None
    value_scales: NDArray[np.float32] | None
    storage: str

    @property
    def head_dims(self) -> tuple[int, int]:
        """D and Dv."""
        numbers = 2 if self.storage == "int4" else 1  # in each stored element
        return self.key.shape[3] * numbers, self.value.shape[3] * numbers


class Options(NamedTuple):
    """The keyword arguments of attention over a cache, as the caller gave them."""

    mask: ArrayLike | None = None
    bias: ArrayLike | None = None
    is_causal: bool = True
    window_size: Any = None
    scale: float | None = None
    softcap: float | None = None
    alibi_slopes: ArrayLike | None = None
    sinks: ArrayLike | None = None


def check_query(query: ArrayLike, pages: Pages, batch: int) -> NDArray[Any]:
    """Queries (B, Hq, Sq, D) that fit the pages."""
    q = check.floating(query, "query")
    if pages.key_scales is not None and q.dtype == np.float64:
        msg = f"query has dtype float64; keys in {pages.storage} take float32, float16 or bfloat16"
        raise TypeError(msg)
    if pages.key_scales is None and storage_name(q.dtype) != pages.storage:
        msg = f"query has dtype {q.dtype} but the keys have {pages.storage}; both must match"
        raise TypeError(msg)
    if q.ndim != 4:
        msg = f"query has shape {q.shape}; expected (batch, heads, positions, head_dim)"
        raise ValueError(msg)
    if q.shape[0] != batch:
        msg = f"query has batch size {q.shape[0]}; expected {batch}, the number of sequences"
        raise ValueError(msg)
    kv_heads, head_dim = pages.key.shape[2], pages.head_dims[0]
    if q.shape[3] != head_dim:
        msg = f"query has head_dim {q.shape[3]} but the keys have {head_dim}; both must match"
        raise ValueError(msg)
    if q.shape[1] != kv_heads and (kv_heads == 0 or q.shape[1] % kv_heads):
        msg = (
            f"query has {q.shape[1]} heads and the keys have {kv_heads}; "
            f"the number of query heads must be a multiple of the number of key heads"
        )
        raise ValueError(msg)
    return q


def wide(query: NDArray[Any], pages: Pages) -> NDArray[Any]:
    """Queries as kernels take them: of a quantised cache in float32, but where they lie on a GPU."""
    if pages.key_scales is None or type(query) is DeviceArray:
        return query
    return query.astype(np.float32, copy=False)


def cache_problem(
    query: NDArray[Any],
    pages: Pages,
    *,
    page_table: NDArray[np.int64],
    ring: int,
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    longest: int,
    offset: NDArray[np.int64],
    options: Options,
) -> CacheProblem:
    """Resolve the options of a call whose queries and places are checked."""
    heads, queries, head_dim = query.shape[1:]
    shape = (len(lengths), heads, queries, longest)
    compute = np.float64 if pages.storage == "float64" else np.float32
    left, right = check.check_window(options.window_size, check.check_flag(options.is_causal, "is_causal"))
    return CacheProblem(
        query=check.kernel_view(wide(query, pages)),
        key_pages=pages.key,
        value_pages=pages.value,
        key_scales=pages.key_scales,
        value_scales=pages.value_scales,
        storage=pages.storage,
        page_table=page_table,
        ring=ring,
        key_starts=starts,
        key_lengths=lengths,
        max_keys=min(longest, ring) if ring else longest,
        scale=check.check_scale(options.scale, head_dim, compute),
        softcap=check.check_softcap(options.softcap, compute),
        left=left,
        right=right,
        offset=offset,
        mask=check.check_mask(options.mask, shape),
        bias=check.check_bias(options.bias, shape),
        alibi_slopes=check.check_per_head(options.alibi_slopes, "alibi_slopes", heads, compute),
        sinks=check.check_per_head(options.sinks, "sinks", heads, compute),
    )


def run(
    module: ModuleType,
    problem: CacheProblem,
    dtype: np.dtype[Any],
    return_lse: bool,
    out: NDArray[Any] | None,
    given: tuple[Any, ...],
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Let the backend write the output, in the caller's dtype, and the log-sum-exp where it is wanted.

    `given` is what the caller passed: `out` must not overlap it, though a copy be what is read.
    """
    p = problem
    shape = (*p.query.shape[:3], p.value_pages.shape[3] * (2 if p.storage == "int4" else 1))
    scales = (p.key_scales, p.value_scales)
    own = (x for x in given if isinstance(x, np.ndarray))
    inputs = (*own, p.query, p.key_pages, p.value_pages, *scales, p.mask, p.bias, p.alibi_slopes, p.sinks)
    result = check.check_out(out, shape, dtype, inputs, p.query)
    lse = check.new_array(p.query, shape[:3], p.compute) if return_lse else None
    direct = result.dtype == p.query.dtype and check.kernel_view(result) is result
    target = result if direct else np.empty(shape, p.query.dtype)
    module.forward(p, target, lse)
    if not direct:
        result[...] = target
    return result, lse


def _check_pages(key_pages: ArrayLike, value_pages: ArrayLike, key_scales: Any, value_scales: Any) -> Pages:
    arrays, storages = [], []
    for x, name in ((key_pages, "key_pages"), (value_pages, "value_pages")):
        array = check.as_array(x, name)
        storage = {"int8": "int8", "uint8": "int4"}.get(array.dtype.name) or storage_name(array.dtype)
        if storage is None:
            msg = (
                f"{name} has dtype {array.dtype}; expected float32, float64, float16, bfloat16, int8 or uint8"
            )
            raise TypeError(msg)
        if array.ndim != 4 or 0 in array.shape[1:]:
            msg = f"{name} has shape {array.shape}; expected (pages, page_size, heads, head_dim)"
            raise ValueError(msg)
        arrays.append(check.kernel_view(array))
        storages.append(storage)
    key, value = arrays
    if storages[0] != storages[1]:
        msg = f"key_pages and value_pages have dtypes {key.dtype} and {value.dtype}; both must match"
        raise TypeError(msg)
    if key.shape[:3] != value.shape[:3]:
        msg = f"key_pages has shape {key.shape} and value_pages {value.shape}; all but head_dim must match"
        raise ValueError(msg)
    scales = [
        _check_scales(x, name, array, storages[0])
        for x, name, array in ((key_scales, "key_scales", key), (value_scales, "value_scales", value))
    ]
    return Pages(key, value, scales[0], scales[1], storages[0])


def _check_scales(scales: Any, name: str, pages: NDArray[Any], storage: str) -> NDArray[np.float32] | None:
    if storage not in ("int8", "int4"):
        if scales is not None:
            msg = f"{name} is given, but the pages are {storage}; only int8 and 4-bit pages have scales"
            raise ValueError(msg)
        return None
    if scales is None:
        msg = f"{name} is missing; {pages.dtype} pages need them"
        raise ValueError(msg)
    array = check.as_array(scales, name)
    if array.dtype != np.float32:
        msg = f"{name} has dtype {array.dtype}; expected float32"
        raise TypeError(msg)
    shape = pages.shape[:3]
    if storage == "int4":
        if pages.shape[3] * 2 % INT4_GROUP:
            msg = f"4-bit pages need a head_dim that is a multiple of {INT4_GROUP}, got {pages.shape[3] * 2}"
            raise ValueError(msg)
        shape = (*shape, pages.shape[3] * 2 // INT4_GROUP)
    if array.shape != shape:
        msg = f"{name} has shape {array.shape}; expected {shape}"
        raise ValueError(msg)
    return check.kernel_view(array) if storage == "int4" else check.addressable(array)


def _check_table(
    page_table: ArrayLike, key_lengths: ArrayLike, pages: Pages
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The table and the lengths; what the table says beyond a length becomes page 0, and is not read."""
    table = check.as_array(page_table, "page_table")
    if table.dtype.kind not in "iu":
        msg = f"page_table must hold integers, got dtype {table.dtype}"
        raise TypeError(msg)
    if table.ndim != 2:
        msg = f"page_table has shape {table.shape}; expected (batch, pages of a sequence)"
        raise ValueError(msg)
    page_size, batch = pages.key.shape[1], len(table)
    limits = np.full(batch, table.shape[1] * page_size, np.int64)
    lengths = check.check_key_lengths(key_lengths, limits)
    needed = np.arange(table.shape[1]) < -(-lengths[:, None] // page_size)
    # Compared before any conversion: 2**64 - 1 must not turn into -1, nor -1 into a page.
    outside = needed & ((table < 0) | (table >= pages.key.shape[0]))
    if outside.any():
        b, i = (int(x[0]) for x in np.nonzero(outside))
        msg = (
            f"page_table[{b}, {i}] is {table[b, i]}; expected 0 to {pages.key.shape[0] - 1}, one of the pages"
        )
        raise ValueError(msg)
    return np.where(needed, table, 0).astype(np.int64), lengths


# --- calls that repeat an earlier one -----------------------------------------------------------------------

_repeats: dict[Any, Any] = {}
"""By layout: calls of `paged_attention` of which only the table and the lengths have to be checked."""
REPEATS = 64
_PLAIN = frozenset((bool, int, float, str, type(None)))


def _layout(arrays: tuple[Any, ...], numbers: tuple[Any, ...], window_size: Any) -> Any:
    """Everything but the arrays' numbers that decides how a call goes, as a key; None where it cannot be."""
    if type(window_size) is tuple:
        numbers += ("window", *window_size)
    elif window_size is not None:
        return None
    types = tuple(map(type, numbers))  # True is no 1
    if not _PLAIN.issuperset(types):
        return None
    layout: tuple[Any, ...] = (numbers, types)
    for x in arrays:
        if type(x) is np.ndarray:
            layout += (x.shape, x.strides, x.dtype, x.flags.aligned)
        elif x is None:
            layout += (None,)
        else:
            return None
    return layout


def _remember(layout: Any, module: ModuleType, problem: CacheProblem, given: tuple[Any, ...]) -> None:
    """Make calls of this layout short from the third on."""
    p = problem
    if len(_repeats) >= REPEATS:
        _repeats.clear()
    if layout not in _repeats:
        _repeats[layout] = None
        return
    read = (p.query, p.key_pages, p.value_pages, p.key_scales, p.value_scales)
    if any(x is not y for x, y in zip(read, given, strict=True)) or 0 in (
        *p.query.shape,
        *p.page_table.shape,
    ):
        return  # each such call copies something, or has nothing to attend
    plan = module.Plan(p)
    if plan.many is not None:
        return
    queries, count, starts = p.query.shape[2], len(p.key_pages), p.key_starts
    limit = p.page_table.shape[1] * p.key_pages.shape[1]
    values = 2 if p.storage == "int4" else 1
    shape, dtype = (*p.query.shape[:3], p.value_pages.shape[3] * values), p.query.dtype

    def again(
        query: Any,
        key: Any,
        value: Any,
        page_table: Any,
        key_lengths: Any,
        key_scales: Any,
        value_scales: Any,
    ) -> NDArray[Any] | None:
        """The output; None where an entry of the table, needed or not, or a length is out of bounds."""
        table, lengths = page_table.astype(np.int64), key_lengths.astype(np.int64)
        longest = int(lengths.max())
        if longest > limit or lengths.min() < 0 or table.min() < 0 or table.max() >= count:
            return None
        output = np.empty(shape, dtype)
        places = (table, starts, lengths, lengths - queries, key_scales, value_scales)
        plan.forward(query, output, None, longest, (key, value), places)
        return output

    _repeats[layout] = again
