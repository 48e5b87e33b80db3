"""Attention over a prefix that a batch shares and over what follows it: two calls and a merge."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import check
from .attention import AttentionOutput, merge_states, scaled_dot_product_attention
from .cache import KVCache
from .decode import Options
from .paged import PagedKVCache
from .problem import UNBOUNDED


def cascade_attention(
    query: ArrayLike,
    prefix_key: ArrayLike,
    prefix_value: ArrayLike,
    key: ArrayLike | KVCache | PagedKVCache,
    value: Any = None,
    mask: ArrayLike | None = None,
    *,
    bias: ArrayLike | None = None,
    is_causal: bool = True,
    window_size: tuple[int | None, int | None] | None = None,
    query_offset: ArrayLike | str = "end",
    key_lengths: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    return_lse: bool = False,
    out: NDArray[Any] | None = None,
    backend: str | None = None,
) -> NDArray[Any] | AttentionOutput:
    """Attention over a prefix that the whole batch shares, followed by each sequence's own keys.

    The result is that of one attention over the prefix and, after it, the sequence's keys. The prefix is read
    once, for the queries of all sequences together, and the two parts are merged by `merge_states`. (Where a
    window or ALiBi slopes make the prefix differ by position, it is read once for every position that the
    sequences' queries start at.)

    Parameters
    ----------
    query : array_like, shape (B, Hq, Sq, D)
        float32, float64, float16 or bfloat16.
    prefix_key, prefix_value : array_like, shapes (Hkv, P, D) and (Hkv, P, Dv)
        Same dtype as the query.
    key, value : array_like, shapes (B, Hkv, Sk, D) and (B, Hkv, Sk, Dv)
        What follows the prefix. Or `key` is a `KVCache`, without `value`; or `key` is a `PagedKVCache` and
        `value` the sequences. A cache that turns keys counts positions from 0 after the prefix, and its
        queries turn by P more for the prefix, whose keys are turned already, by 0 to P - 1.
    mask, bias : array_like, optional
        For the keys after the prefix, broadcastable to (B, Hq, Sq, Sk), or (B, Hq, Sq, longest length) for a
        cache.
    is_causal : bool
        True unless given.
    query_offset : int, int array (B,) or "end"
        The position of query 0, counted from the first key after the prefix; "end" is ``Sk - Sq``, or
        ``key_lengths[b] - Sq``. With a cache always "end".
    key_lengths : int array_like (B,), optional
        How many keys after the prefix there are. A cache knows by itself.
    window_size, scale, softcap, alibi_slopes, sinks
        As in `scaled_dot_product_attention`; the prefix stands at the P positions before the other keys.
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
        As `scaled_dot_product_attention` and `KVCache.attend`.

    References
    ----------
    Juravsky et al., "Hydragen: High-Throughput LLM Inference with Shared Prefixes", 2024,
    https://arxiv.org/abs/2402.05099.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn import cascade_attention
    >>> query = np.zeros((2, 1, 1, 1), np.float32)
    >>> prefix = np.array([[[1.0], [2.0]]], np.float32)
    >>> own = np.array([[[[6.0]]], [[[9.0]]]], np.float32)
    >>> cascade_attention(query, prefix, prefix, own, own).ravel()
    array([3., 4.], dtype=float32)
    """
    q, k, v = check.check_inputs(query, prefix_key, prefix_value)
    _check_prefix(q, k, v)
    pages = key._store.pages if isinstance(key, (KVCache, PagedKVCache)) else ()
    arrays: tuple[Any, ...] = (query, prefix_key, prefix_value, key, value, mask, bias, q, k, v, *pages)
    own = tuple(x for x in arrays if isinstance(x, np.ndarray))
    result = check.check_out(out, (*q.shape[:3], v.shape[2]), q.dtype, own)
    after: Any
    is_wanted = check.check_flag(return_lse, "return_lse")
    options = Options(mask, bias, is_causal, window_size, scale, softcap, alibi_slopes, sinks)
    if isinstance(key, (KVCache, PagedKVCache)):
        if key_lengths is not None or not isinstance(query_offset, str):
            msg = "query_offset and key_lengths are for arrays; a cache's queries stand at its end"
            raise ValueError(msg)
        store, places = key._parts(value)
        kv_heads = store.pages.key.shape[2]
        backend = backend or store.backend
        after = store.attend(places, q, options, None, True, None, backend)
        offset = check.check_offset(query_offset, np.full(len(q), q.shape[2]), places.lengths)
        before = store.turned(q, offset + k.shape[1], backend)
        options = options._replace(window_size=store.within_window(window_size))
    else:
        after = scaled_dot_product_attention(
            q, key, value, query_offset=query_offset, key_lengths=key_lengths, return_lse=True,
            backend=backend, **options._asdict(),
        )  # fmt: skip
        kv_heads, keys = check.as_array(key, "key").shape[1:3]
        limits = np.full(len(q), keys, np.int64)
        lengths = check.check_key_lengths(key_lengths, limits)
        offset = check.check_offset(query_offset, np.full(len(q), q.shape[2]), lengths)
        before = q
    if kv_heads != len(k):
        msg = f"prefix_key has {len(k)} heads but key has {kv_heads}; both must match"
        raise ValueError(msg)
    if after.output.shape[3] != v.shape[2]:
        msg = f"prefix_value has head_dim {v.shape[2]} but value has {after.output.shape[3]}; both must match"
        raise ValueError(msg)
    output, sums = _attend_prefix(before, k, v, offset, options, backend)
    result[...], lse = merge_states(np.stack((output, after.output)), np.stack((sums, after.lse)))
    return AttentionOutput(result, None, lse) if is_wanted else result


def _check_prefix(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any]) -> None:
    if q.ndim != 4:
        msg = f"query has shape {q.shape}; expected (batch, heads, positions, head_dim)"
        raise ValueError(msg)
    if k.ndim != 3 or k.shape[2] != q.shape[3] or 0 in (k.shape[0], k.shape[2]) or q.shape[1] % k.shape[0]:
        fits = f"(heads, P, {q.shape[3]}) with heads that divide {q.shape[1]}"
        msg = f"prefix_key has shape {k.shape}; expected {fits}"
        raise ValueError(msg)
    if v.ndim != 3 or v.shape[:2] != k.shape[:2] or v.shape[2] == 0:
        msg = f"prefix_value has shape {v.shape}; expected ({k.shape[0]}, {k.shape[1]}, head_dim)"
        raise ValueError(msg)


def _attend_prefix(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    offset: NDArray[np.int64],
    options: Options,
    backend: str | None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Output and log-sum-exp of the prefix alone; `offset` counts from its end."""
    (batch, heads, queries, head_dim), (kv_heads, prefix, _) = q.shape, k.shape
    group = heads // kv_heads
    left, right = check.check_window(options.window_size, bool(options.is_causal))
    slopes = options.alibi_slopes
    sees_all = slopes is None and left == UNBOUNDED and bool((offset + right >= -1).all())
    output = np.empty((batch, heads, queries, v.shape[2]), q.dtype)
    lse = np.empty((batch, heads, queries), np.float64 if q.dtype == np.float64 else np.float32)
    for place in (0,) if sees_all else np.unique(offset).tolist():
        who = np.flatnonzero(sees_all | (offset == place))
        # To the kernel these sequences' heads are more heads that share the prefix's.
        joined = (kv_heads, len(who), group)
        rows = q[who].reshape(len(who), kv_heads, group, queries, head_dim).swapaxes(0, 1)
        part: Any = scaled_dot_product_attention(
            rows.reshape(1, heads * len(who), queries, head_dim),
            k[None],
            v[None],
            window_size=None if sees_all else (left, right),
            query_offset=prefix + place,
            scale=options.scale,
            softcap=options.softcap,
            alibi_slopes=None if slopes is None else _repeated(slopes, joined),
            return_lse=True,
            backend=backend,
        )
        for whole, some in ((output, part.output), (lse, part.lse)):
            each = some.reshape(*joined, *some.shape[2:]).swapaxes(0, 1)
            whole[who] = each.reshape(len(who), heads, *some.shape[2:])
    return output, lse


def _repeated(slopes: ArrayLike, joined: tuple[int, int, int]) -> NDArray[Any]:
    """Slopes (Hq,) for the heads (Hkv, sequences, group)."""
    kv_heads, _, group = joined
    each = check.floating(slopes, "alibi_slopes").reshape(kv_heads, 1, group)
    return np.broadcast_to(each, joined).reshape(-1)
