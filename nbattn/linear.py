"""Linear attention: docstring, checks, dispatch. The recurrence is in `reference/linear.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import check
from .problem import LinearProblem

FEATURE_MAPS = ("identity", "elu", "relu")


def linear_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    feature_map: str | Callable[[NDArray[Any]], ArrayLike] | None = None,
    is_causal: bool = True,
    decay: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    scale: float | None = None,
    normalize: bool = False,
    state: ArrayLike | None = None,
    return_state: bool = False,
    out: NDArray[Any] | tuple[NDArray[Any], NDArray[Any]] | None = None,
    backend: str | None = None,
) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]:
    r"""Attention without softmax: a state of fixed size takes one key and value after the other.

    Each key head keeps a state S of shape (D, Dv), in which token t is stored before query t reads it::

        S_t = exp(decay_t) * S_{t-1} + outer(k_t, v_t)                           linear, or gated with a decay
        S_t = exp(decay_t) * S_{t-1} + outer(k_t, beta_t * (v_t - recalled_t))   delta, or gated delta
        o_t = scale * q_t @ S_t                          where recalled_t = k_t @ (exp(decay_t) * S_{t-1})

    Time is linear in the number of tokens and memory does not depend on it. A sequence may be cut anywhere
    and continued from the returned state. A NaN in token t reaches no output before t. The result is the
    same, bit for bit, whatever the number of threads and the rest of the batch.

    Parameters
    ----------
    query : array_like, shape (B, Hq, Sq, D)
        float32, float64, float16 or bfloat16 (from `ml_dtypes`); the last two are computed in float32.
        Leading dimensions may be missing: 2-D and 3-D inputs work, and the results drop the same ones.
    key, value : array_like, shapes (B, Hkv, Sk, D) and (B, Hkv, Sk, Dv)
        Same dtype as the query. Hq must be a multiple of Hkv: consecutive query heads share a state. For
        delta rules keys should have length 1, or the state may grow without bounds.
    feature_map : {None, "identity", "elu", "relu"} or callable
        What becomes of queries and keys first: "elu" is ``elu(x) + 1``, positive everywhere. A callable takes
        an array (..., D) and returns one (..., F) for any F, for example `nbattn.softmax`.
    is_causal : bool
        True: query t sees the tokens up to t; Sq and Sk must be equal. False: every query reads the state
        after the last token.
    decay : array_like, optional
        The gate's logarithm, a number at most 0 for each key head and token (-inf forgets everything).
        Broadcastable to (B, Hkv, Sk) from the right; with as many dimensions as the key, to its shape
        (B, Hkv, Sk, D): one for each feature. For RetNet's fixed rates pass ``np.log(rates)[:, None]``.
    beta : array_like, optional
        How much of what is stored under a key a token replaces, from 0 to 1. Broadcastable to (B, Hkv, Sk).
        Chooses the delta rules.
    scale : float, optional
        ``1 / sqrt(D)`` unless given, of the features where a callable changes their number. With `normalize`
        it cancels.
    normalize : bool
        Divide each output by ``q_t @ z_t``, where z is the sum of the keys (decayed like S), as in the first
        linear attention; 0 where that is 0. Not with `beta`.
    state : array_like, shape (B, Hkv, D, Dv), optional
        The state before the first token; zeros if not given. With `normalize` it has Dv + 1 columns, of which
        the last is z.
    return_state : bool
        Also return the state after the last token.
    out : ndarray or (ndarray, ndarray), optional
        Where to write the output, or output and state: right shapes and dtypes, writable, no memory shared
        with an input; but the second may be the very array passed as `state`.
    backend : {None, "cpu", "reference", "cuda"}
        None chooses by where the inputs live.

    Returns
    -------
    ndarray or (ndarray, ndarray)
        The output ``(B, Hq, Sq, Dv)`` in the query's dtype; with `return_state` also the state, in float32
        (float64 for float64).

    Raises
    ------
    TypeError
        For a wrong kind: integer inputs, mixed dtypes, a feature map that is neither a name nor callable.
    ValueError
        For a wrong value: shapes, head counts or lengths that do not fit, a wrong `out`, an unknown name.

    Notes
    -----
    Computed as written above, token by token, with a block of the state in the first-level cache; threads
    share out batch, key heads and blocks of the values' columns, so that one sequence with one head and few
    columns keeps few threads busy. Chunks of tokens computed at once, as GPUs like them, would take 1.5 to 2
    times as many multiply-adds at head_dim 64, and a ratio of decays within one could overflow.

    Which rule for which job:

    =====================  ==========================================  =======================================
    model                  arguments                                   paper
    =====================  ==========================================  =======================================
    linear transformer     ``feature_map="elu", normalize=True``       https://arxiv.org/abs/2006.16236
    efficient attention    ``feature_map=softmax, is_causal=False``    https://arxiv.org/abs/1812.01243
    RetNet                 ``decay`` of shape (Hkv, 1)                 https://arxiv.org/abs/2307.08621
    Mamba-2                ``decay`` of shape (B, Hkv, S)              https://arxiv.org/abs/2405.21060
    GLA, RWKV-6            ``decay`` of shape (B, Hkv, S, D)           https://arxiv.org/abs/2312.06635
    DeltaNet               ``beta``                                    https://arxiv.org/abs/2406.06484
    Gated DeltaNet         ``beta``, ``decay`` of shape (B, Hkv, S)    https://arxiv.org/abs/2412.06464
    =====================  ==========================================  =======================================

    References
    ----------
    The rules are those of ONNX's LinearAttention, https://onnx.ai/onnx/operators/onnx__LinearAttention.html.
    First: Katharopoulos et al., "Transformers are RNNs", 2020, https://arxiv.org/abs/2006.16236.

    Examples
    --------
    With orthogonal keys the state is a dictionary, here of three words:

    >>> import numpy as np
    >>> from nbattn import linear_attention
    >>> key, value = np.eye(3, dtype=np.float32), np.float32([[10], [20], [30]])
    >>> linear_attention(key, key, value, scale=1).ravel()
    array([10., 20., 30.], dtype=float32)

    The delta rule replaces what a key has stored; adding goes on top of it:

    >>> again, new = key[1:2], np.float32([[7]])
    >>> _, state = linear_attention(key, key, value, scale=1, return_state=True)
    >>> linear_attention(again, again, new, scale=1, state=state).item()
    27.0
    >>> linear_attention(again, again, new, scale=1, state=state, beta=[1.0]).item()
    7.0

    Token by token, with the state updated where it lies:

    >>> state = np.zeros((3, 1), np.float32)
    >>> word = np.empty((1, 1), np.float32)
    >>> for k, v in zip(key, value):
    ...     _ = linear_attention(k[None], k[None], v[None], state=state, return_state=True, out=(word, state))
    >>> state.ravel()
    array([10., 20., 30.], dtype=float32)
    """
    module = check.backend_module("linear", backend)
    q, k, v = check.check_inputs(query, key, value)
    dtype = q.dtype
    compute = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    missing = check.missing_dimensions(q, k, v)
    feature, q, k = _features(feature_map, q, k)
    q, k, v = (_as_compute(x[(None,) * missing], compute) for x in (q, k, v))
    check.check_heads(q, k, v)
    causal, norm = check.check_flag(is_causal, "is_causal"), check.check_flag(normalize, "normalize")
    if causal and q.shape[2] != k.shape[2]:
        msg = (
            f"query has {q.shape[2]} positions and key {k.shape[2]}; both must match where is_causal is True"
        )
        raise ValueError(msg)
    if norm and beta is not None:
        msg = "normalize does not go with beta: what the delta rules replace has no sum to divide by"
        raise ValueError(msg)
    state_shape = (*k.shape[:2], k.shape[3], v.shape[3] + norm)
    problem = LinearProblem(
        query=q,
        key=k,
        value=v,
        scale=check.check_scale(scale, q.shape[3], compute),
        feature=feature,
        is_causal=causal,
        normalize=norm,
        decay=_decay(decay, k, missing),
        beta=None if beta is None else _spread(beta, "beta", k.shape[:3], missing, compute),
        state=_state(state, state_shape, missing, compute),
    )
    keeps = check.check_flag(return_state, "return_state")
    given = (query, key, value, decay, beta)
    result, end = _results(out, problem, dtype, missing, keeps, given, state)
    lead = (None,) * missing
    target = _target(result[lead], compute)
    end_target = None if end is None else _target(end[lead], compute)
    module.forward(problem, target, end_target)
    if not np.may_share_memory(target, result):
        result[lead] = target
    if end is None:
        return result
    if not np.may_share_memory(end_target, end):
        end[lead] = end_target
    return result, end


def _features(feature_map: Any, q: NDArray[Any], k: NDArray[Any]) -> tuple[str, NDArray[Any], NDArray[Any]]:
    """The feature map that is left for the kernels, and queries and keys that have met a caller's own."""
    if feature_map is None:
        return "identity", q, k
    if isinstance(feature_map, str):
        if feature_map not in FEATURE_MAPS:
            msg = f"feature_map is {feature_map!r}; expected None, a callable or one of {FEATURE_MAPS}"
            raise ValueError(msg)
        return feature_map, q, k
    if not callable(feature_map):
        msg = f"feature_map must be a name or callable, got {type(feature_map).__name__}"
        raise TypeError(msg)
    mapped = []
    for x, name in ((q, "query"), (k, "key")):
        y = check.floating(feature_map(x), f"feature_map({name})")
        if y.shape[:-1] != x.shape[:-1] or y.ndim != x.ndim:
            msg = f"feature_map made shape {y.shape} of the {name}'s {x.shape}; only the last may change"
            raise ValueError(msg)
        mapped.append(y)
    return "identity", mapped[0], mapped[1]


def _as_compute(x: NDArray[Any], compute: np.dtype[Any]) -> NDArray[Any]:
    return check.kernel_view(x if x.dtype == compute else x.astype(compute))


def _spread(
    x: ArrayLike, name: str, shape: tuple[int, ...], missing: int, compute: np.dtype[Any]
) -> NDArray[Any]:
    """A floating array broadcast to `shape`, of which the caller left out so many leading dimensions."""
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        x = np.asarray(x, compute)
    array = check.addressable(check.floating(x, name).astype(compute, copy=False))
    try:
        return np.broadcast_to(array, shape[missing:])[(None,) * missing]
    except ValueError:
        axes = ("batch", "key heads", "positions", "features")[missing : len(shape)]
        want = f"({', '.join(axes)}) = {shape[missing:]}"
        msg = f"{name} has shape {array.shape}; it must broadcast to {want}"
        raise ValueError(msg) from None


def _decay(decay: ArrayLike | None, k: NDArray[Any], missing: int) -> NDArray[Any] | None:
    """The decay for each feature, with stride 0 where all share one."""
    if decay is None:
        return None
    if np.ndim(decay) == k.ndim - missing:
        array = _spread(decay, "decay", k.shape, missing, k.dtype)
        return array if array.strides[-1] in (0, array.itemsize) else np.ascontiguousarray(array)
    array = _spread(decay, "decay", k.shape[:3], missing, k.dtype)
    return np.broadcast_to(array[..., None], k.shape)


def _state(
    state: ArrayLike | None, shape: tuple[int, ...], missing: int, compute: np.dtype[Any]
) -> NDArray[Any] | None:
    if state is None:
        return None
    array = check.floating(state, "state")
    if array.shape != shape[missing:]:
        msg = f"state has shape {array.shape}; expected {shape[missing:]}"
        raise ValueError(msg)
    return _as_compute(array[(None,) * missing], compute)


def _results(
    out: Any,
    p: LinearProblem,
    dtype: np.dtype[Any],
    missing: int,
    keeps: bool,
    inputs: tuple[Any, ...],
    state: Any,
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Where output and state go: the caller's arrays, or new ones."""
    arrays = [x for x in inputs if isinstance(x, np.ndarray)]
    arrays += [x for x in (p.query, p.key, p.value, p.decay, p.beta, p.state) if x is not None]
    shape = (*p.query.shape[:3], p.value.shape[3])[missing:]
    state_shape = (*p.key.shape[:2], p.key.shape[3], p.value.shape[3] + p.normalize)[missing:]
    if not keeps:
        if isinstance(out, tuple):
            msg = "out is a tuple; pass one array, or also return_state=True"
            raise TypeError(msg)
        return check.check_out(out, shape, dtype, tuple(arrays)), None
    if out is None:
        return np.empty(shape, dtype), np.empty(state_shape, p.key.dtype)
    if not isinstance(out, tuple) or len(out) != 2:
        msg = "out must be a tuple of two arrays, output and state, where return_state is True"
        raise TypeError(msg)
    result = check.check_out(out[0], shape, dtype, (*arrays, *out[1:]))
    if out[1] is state:  # in place: each of its numbers is read before it is written
        arrays = [x for x in arrays if x is not p.state]
    return result, check.check_out(out[1], state_shape, p.key.dtype, tuple(arrays))


def _target(array: NDArray[Any], compute: np.dtype[Any]) -> NDArray[Any]:
    """The array itself where kernels can write it, else a new one."""
    if array.dtype == compute and check.kernel_view(array) is array:
        return array
    return np.empty(array.shape, compute)
