"""Additive attention: docstring, checks, dispatch. The formula is in `reference/additive.py`."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import check
from .attention import AttentionOutput
from .problem import Problem
from .resolve import Call, zero_weights


@dataclass(frozen=True, slots=True, eq=False)
class AdditiveProblem:
    """One call of additive attention, checked and resolved.

    Head h's score of query q and key k is ``v[h] . tanh(w_query[h] q + bias[h] + w_key[h // group] k)``;
    without its matrix a query or key is projected already. All arrays are in the compute dtype; an axis of
    heads may have stride 0.
    """

    attention: Problem  # everything else, float32 or float64; the head_dims of query and key may differ
    w_query: NDArray[Any] | None  # (Hq, A, Dq), last axis contiguous
    w_key: NDArray[Any] | None  # (Hkv, A, Dk), last axis contiguous
    v: NDArray[Any]  # (Hq, A)
    bias: NDArray[Any] | None  # (Hq, A)


def additive_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    w_query: ArrayLike | None,
    w_key: ArrayLike | None,
    v: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    is_causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    query_offset: ArrayLike | str = 0,
    key_lengths: ArrayLike | None = None,
    return_weights: bool = False,
    return_lse: bool = False,
    out: NDArray[Any] | None = None,
    backend: str | None = None,
) -> NDArray[Any] | AttentionOutput:
    """Attention whose scores are a small network's: ``v . tanh(w_query @ q + w_key @ k + bias)`` (Bahdanau).

    The (Sq, Sk, A) array of hidden units never exists: memory is that of the projected keys. Masks, rows that
    see no key, NaN and inf mean what they mean in `scaled_dot_product_attention`, and the result is the same,
    bit for bit, whatever the number of threads and the rest of the batch.

    Parameters
    ----------
    query : array_like, shape (B, Hq, Sq, Dq)
        float32, float64, float16 or bfloat16 (from `ml_dtypes`); the last two are computed in float32.
        Leading dimensions may be missing: 2-D and 3-D inputs work, and the results drop the same ones.
    key, value : array_like, shapes (B, Hkv, Sk, Dk) and (B, Hkv, Sk, Dv)
        Same dtype as the query. Hq must be a multiple of Hkv; consecutive query heads share a key head.
    w_query : array_like, shape (A, Dq) or (Hq, A, Dq), or None
        Projects the queries, for all heads alike or for each. None where they are projected already; Dq is
        then A.
    w_key : array_like, shape (A, Dk) or (Hkv, A, Dk), or None
        Projects the keys, likewise. Keys that many calls share are best projected once.
    v : array_like, shape (A,) or (Hq, A)
        What each hidden unit adds to the score.
    bias : array_like, shape (A,) or (Hq, A), optional
        Added before the tanh.
    mask : array_like of bool or int, optional
        Broadcastable to (B, Hq, Sq, Sk) from the right; nonzero means attend.
    is_causal, window_size, query_offset, key_lengths
        As in `scaled_dot_product_attention`.
    return_weights, return_lse : bool
        Also return the weights ``(B, Hq, Sq, Sk)`` or the log-sum-exp ``(B, Hq, Sq)``.
    out : ndarray, optional
        Where to write the output: right shape and dtype, writable, no memory shared with an input.
    backend : {None, "cpu", "reference", "cuda"}
        None chooses by where the inputs live.

    Returns
    -------
    ndarray or AttentionOutput
        The output ``(B, Hq, Sq, Dv)`` in the query's dtype; with `return_weights` or `return_lse` the named
        tuple ``(output, weights, lse)``.

    Raises
    ------
    TypeError
        For a wrong kind: integer inputs, mixed dtypes, a floating mask.
    ValueError
        For a wrong value: shapes that do not fit, a wrong `out`, an unknown backend.

    See Also
    --------
    scaled_dot_product_attention : takes functions of scores and masks, `score_mod` and `mask_mod`, which this
        door does not; a function's mask is given as ``BlockMask.from_mask_mod(...)``.
    luong_attention : Luong's scores, of which "concat" is this one with both matrices in one.

    References
    ----------
    Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate", 2015,
    https://arxiv.org/abs/1409.0473, appendix A.1.2.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn import additive_attention
    >>> rng = np.random.default_rng(0)
    >>> state, annotations = rng.standard_normal((4, 1, 32)), rng.standard_normal((4, 9, 48))
    >>> w_query, w_key = rng.standard_normal((16, 32)), rng.standard_normal((16, 48))
    >>> context, weights, _ = additive_attention(
    ...     state, annotations, annotations, w_query=w_query, w_key=w_key, v=rng.standard_normal(16),
    ...     return_weights=True,
    ... )
    >>> context.shape, weights.shape
    ((4, 1, 48), (4, 1, 9))
    >>> bool(np.allclose(weights.sum(axis=-1), 1))
    True
    """
    module = check.backend_module("additive", backend)
    call = prepare(query, key, value, Options(mask, is_causal, window_size, query_offset, key_lengths))
    p = call.problem
    heads, compute = p.query.shape[1], p.compute
    units = check.floating(v, "v").shape[-1:]
    if units in ((), (0,)):
        msg = f"v has shape {np.shape(v)}; expected (A,) or ({heads}, A), with at least one hidden unit"
        raise ValueError(msg)
    problem = AdditiveProblem(
        attention=p,
        w_query=_projection(w_query, "w_query", "query", p.query, units[0]),
        w_key=_projection(w_key, "w_key", "key", p.key, units[0]),
        v=per_head(v, "v", heads, units, compute),
        bias=None if bias is None else per_head(bias, "bias", heads, units, compute),
    )
    given = (query, key, value, mask, w_query, w_key, v, bias)
    own = (problem.w_query, problem.w_key, problem.v, problem.bias)
    return answer(module, problem, call, (given, own), out, return_weights, return_lse)


class Options(NamedTuple):
    """The keyword arguments that say which keys a query sees, as the caller gave them."""

    mask: ArrayLike | None
    is_causal: bool
    window_size: Any
    query_offset: Any
    key_lengths: ArrayLike | None


def prepare(query: ArrayLike, key: ArrayLike, value: ArrayLike, options: Options) -> Call:
    """Check and resolve all that the doors share whose queries and keys may differ in head_dim."""
    q, k, v = check.check_inputs(query, key, value)
    missing = check.missing_dimensions(q, k, v)
    if missing:
        q, k, v = (x.reshape((1,) * missing + x.shape) for x in (q, k, v))
    if 0 in (q.shape[3], k.shape[3]):
        msg = f"head_dim must be at least 1, got {q.shape[3]} for query and {k.shape[3]} for key"
        raise ValueError(msg)
    check.check_heads(q[..., :1], k[..., :1], v)
    dtype = q.dtype
    compute = np.float64 if dtype == np.float64 else np.float32
    q, k, v = (check.kernel_view(x.astype(compute, copy=False)) for x in (q, k, v))
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    left, right = check.check_window(options.window_size, check.check_flag(options.is_causal, "is_causal"))
    lengths = check.check_key_lengths(options.key_lengths, np.full(batch, keys, np.int64))
    problem = Problem(
        query=q,
        key=k,
        value=v,
        storage=np.dtype(compute).name,
        batch=batch,
        max_queries=queries,
        max_keys=keys,
        scale=1.0,
        softcap=0.0,
        left=left,
        right=right,
        offset=check.check_offset(options.query_offset, np.full(batch, queries, np.int64), lengths),
        key_lengths=lengths,
        mask=check.check_mask(options.mask, (batch, heads, queries, keys)),
    )
    return Call(problem, dtype, missing)


def answer(
    module: ModuleType,
    problem: Any,
    call: Call,
    arrays: tuple[tuple[Any, ...], tuple[Any, ...]],
    out: NDArray[Any] | None,
    return_weights: bool,
    return_lse: bool,
) -> NDArray[Any] | AttentionOutput:
    """Let the backend solve `problem`; `arrays` are what the caller gave and what became of it."""
    p, dtype, missing = call
    given, own = arrays
    inputs = (*(x for x in given if isinstance(x, np.ndarray)), *own, p.query, p.key, p.value, p.mask)
    shape = (*p.query.shape[:3], p.value.shape[3])
    result = check.check_out(out, shape[missing:], dtype, inputs)
    lse = np.empty(shape[:3], p.compute) if check.check_flag(return_lse, "return_lse") else None
    weights = zero_weights(p) if check.check_flag(return_weights, "return_weights") else None
    whole = result[(None,) * missing]
    is_target = dtype == p.compute and check.kernel_view(whole) is whole
    target = whole if is_target else np.empty(shape, p.compute)
    module.forward(problem, target, lse, weights)
    if target is not whole:
        whole[...] = target
    if lse is None and weights is None:
        return result
    drop = (0,) * missing
    return AttentionOutput(
        result, None if weights is None else weights[drop], None if lse is None else lse[drop]
    )


def per_head(
    x: ArrayLike, name: str, heads: int, shape: tuple[int, ...], compute: type[np.floating[Any]]
) -> NDArray[Any]:
    """Weights of this shape, or of this shape for each head, as (heads, *shape) in the compute dtype."""
    array = check.floating(x, name)
    if array.shape not in (shape, (heads, *shape)):
        msg = f"{name} has shape {array.shape}; expected {shape} or {(heads, *shape)}"
        raise ValueError(msg)
    return np.broadcast_to(check.kernel_view(array.astype(compute, copy=False)), (heads, *shape))


def _projection(w: ArrayLike | None, name: str, of: str, x: NDArray[Any], units: int) -> NDArray[Any] | None:
    """The matrix that projects x (B, H, S, D) to the hidden units, (H, A, D); None where x is projected."""
    _, heads, _, head_dim = x.shape
    if w is not None:
        return per_head(w, name, heads, (units, head_dim), x.dtype.type)
    if head_dim != units:
        msg = f"{of} has head_dim {head_dim} but v has {units} hidden units; without {name} both must match"
        raise ValueError(msg)
    return None
