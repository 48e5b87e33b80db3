"""Luong's attention: docstring, checks, dispatch. The formulas are in `reference/luong.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from numpy.typing import ArrayLike, NDArray

from . import check
from .additive import Options, answer, prepare
from .attention import AttentionOutput
from .problem import UNBOUNDED, Problem

SCORES = ("dot", "general", "concat", "location")


class Prediction(NamedTuple):
    """Around ``p = key_length * sigmoid(v . tanh(w @ q))`` a row sees the keys with ``abs(s - p) <= width``.

    Its weights are multiplied by ``exp(-2 * (s - p)**2 / width**2)`` after the softmax.
    """

    width: int  # at least 1
    w: NDArray[Any]  # (P, Dq)
    v: NDArray[Any]  # (P,)


@dataclass(frozen=True, slots=True, eq=False)
class LuongProblem:
    """One call of Luong's attention, checked and resolved; all arrays are in the compute dtype."""

    attention: Problem  # everything else, with the window of local-m; head_dims of query and key may differ
    score: str  # one of SCORES
    weight: NDArray[Any] | None  # (Dq, Dk) general, (A, Dq + Dk) concat, (at least Sk, Dq) location
    v: NDArray[Any] | None  # (A,), concat
    position: Prediction | None  # of local-p


def luong_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    score: str = "dot",
    weight: ArrayLike | None = None,
    v: ArrayLike | None = None,
    local: int | None = None,
    w_position: ArrayLike | None = None,
    v_position: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    is_causal: bool = False,
    query_offset: ArrayLike | str = 0,
    key_lengths: ArrayLike | None = None,
    return_weights: bool = False,
    return_lse: bool = False,
    out: NDArray[Any] | None = None,
    backend: str | None = None,
) -> NDArray[Any] | AttentionOutput:
    r"""Attention of Luong et al.: four scores; over all keys, or over a window around one position.

    Scores are not scaled. Masks, rows that see no key, NaN and inf mean what they mean in
    `scaled_dot_product_attention`, and the result is the same, bit for bit, whatever the number of threads
    and the rest of the batch.

    Parameters
    ----------
    query : array_like, shape (B, Hq, Sq, Dq)
        float32, float64, float16 or bfloat16 (from `ml_dtypes`); the last two are computed in float32.
        Leading dimensions may be missing: 2-D and 3-D inputs work, and the results drop the same ones.
    key, value : array_like, shapes (B, Hkv, Sk, Dk) and (B, Hkv, Sk, Dv)
        Same dtype as the query. Hq must be a multiple of Hkv; consecutive query heads share a key head.
    score : {"dot", "general", "concat", "location"}
        "dot" is ``q . k``, "general" ``q . (weight @ k)``, "concat" ``v . tanh(weight @ [q; k])``, and
        "location" the key's row of ``weight @ q``, which does not look at the key.
    weight : array_like, optional
        ``(Dq, Dk)`` for "general", ``(A, Dq + Dk)`` for "concat", ``(at least Sk, Dq)`` for "location".
    v : array_like, shape (A,), optional
        For "concat".
    local : int, optional
        See only the keys at most so far from the query's position, which is ``i + query_offset`` (local-m),
        or from a predicted one (local-p).
    w_position, v_position : array_like, shapes (P, Dq) and (P,), optional
        Predict the position: ``length * sigmoid(v_position . tanh(w_position @ q))``, a real number between
        0 and the number of the sequence's keys. After the softmax, weights are multiplied by a Gaussian
        around it with standard deviation ``local / 2``, and as in the paper not normalised again.
    mask : array_like of bool or int, optional
        Broadcastable to (B, Hq, Sq, Sk) from the right; nonzero means attend.
    is_causal, query_offset, key_lengths
        As in `scaled_dot_product_attention`.
    return_weights, return_lse : bool
        Also return the weights ``(B, Hq, Sq, Sk)``, with the Gaussian, or the log-sum-exp ``(B, Hq, Sq)``
        of the scores, without.
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
        For a wrong value: an unknown score, weights that are missing or that the score does not use, shapes
        that do not fit, a wrong `out`, an unknown backend.

    See Also
    --------
    scaled_dot_product_attention : takes functions of scores and masks, `score_mod` and `mask_mod`, which this
        door does not; a function's mask is given as ``BlockMask.from_mask_mod(...)``.
    additive_attention : "concat" with a matrix for each of query and key.

    References
    ----------
    Luong, Pham and Manning, "Effective Approaches to Attention-based Neural Machine Translation", 2015,
    https://arxiv.org/abs/1508.04025, sections 3.1 and 3.2. Positions count from 0 here.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn import luong_attention
    >>> rng = np.random.default_rng(0)
    >>> states, source = rng.standard_normal((4, 3, 32)), rng.standard_normal((4, 20, 48))
    >>> weight = rng.standard_normal((32, 48))
    >>> luong_attention(states, source, source, score="general", weight=weight).shape
    (4, 3, 48)

    Each query sees 5 keys around the position that it predicts:

    >>> w_position, v_position = rng.standard_normal((16, 32)), rng.standard_normal(16)
    >>> context, weights, _ = luong_attention(
    ...     states, source, source, score="general", weight=weight, local=2, w_position=w_position,
    ...     v_position=v_position, return_weights=True,
    ... )
    >>> bool((np.count_nonzero(weights, axis=-1) <= 5).all())
    True
    """
    module = check.backend_module("luong", backend)
    width, is_predicted = _check_local(local, w_position, v_position)
    window = None if width is None or is_predicted else (width, width)
    call = prepare(query, key, value, Options(mask, is_causal, window, query_offset, key_lengths))
    p = call.problem
    matrix, vector = _check_score(score, weight, v, p)
    position = None
    if is_predicted and width is not None:
        w = _array(w_position, "w_position", ("P", p.query.shape[3]), p.compute)
        position = Prediction(width, w, _array(v_position, "v_position", (len(w),), p.compute))
    problem = LuongProblem(p, score, matrix, vector, position)
    given = (query, key, value, mask, weight, v, w_position, v_position)
    own = (matrix, vector, *(position or ())[1:])
    return answer(module, problem, call, (given, own), out, return_weights, return_lse)


def _check_local(local: Any, w_position: Any, v_position: Any) -> tuple[int | None, bool]:
    """How far a query sees, and whether it does so from a predicted position."""
    is_predicted = w_position is not None
    if is_predicted != (v_position is not None):
        msg = "w_position and v_position predict a position together; pass both or neither"
        raise ValueError(msg)
    if local is None:
        if is_predicted:
            msg = "w_position predicts the middle of a window; pass local, how far it reaches"
            raise ValueError(msg)
        return None, False
    width = check.check_int(local, "local")
    if width < is_predicted:
        what = ", with a Gaussian of that width," if is_predicted else ""
        msg = f"local{what} must be at least {int(is_predicted)}, got {width}"
        raise ValueError(msg)
    return min(width, UNBOUNDED), is_predicted


def _check_score(
    score: str, weight: ArrayLike | None, v: ArrayLike | None, p: Problem
) -> tuple[NDArray[Any] | None, NDArray[Any] | None]:
    """The weights of the score in the compute dtype, those that it has."""
    if not isinstance(score, str) or score not in SCORES:
        msg = f"score is {score!r}; expected 'dot', 'general', 'concat' or 'location'"
        raise ValueError(msg)
    for name, x, users in (("weight", weight, SCORES[1:]), ("v", v, ("concat",))):
        if (x is None) == (score in users):
            msg = f"score={score!r} {'needs' if x is None else 'takes no'} {name}"
            raise ValueError(msg)
    query_dim, key_dim = p.query.shape[3], p.key.shape[3]
    if weight is None:
        if query_dim != key_dim:
            msg = f"query has head_dim {query_dim} but key has {key_dim}; score='dot' needs both to match"
            raise ValueError(msg)
        return None, None
    shapes = {
        "general": (query_dim, key_dim),
        "concat": ("A", query_dim + key_dim),
        "location": ("S", query_dim),
    }
    matrix = _array(weight, "weight", shapes[score], p.compute)
    if score == "location" and len(matrix) < p.max_keys:
        msg = f"weight has {len(matrix)} rows but there are {p.max_keys} keys; each position needs its row"
        raise ValueError(msg)
    return matrix, None if v is None else _array(v, "v", (len(matrix),), p.compute)


def _array(x: Any, name: str, shape: tuple[int | str, ...], compute: Any) -> NDArray[Any]:
    """A floating array in the compute dtype; a name in its shape stands for any length but 0."""
    array = check.floating(x, name)
    fits = array.ndim == len(shape) and all(
        have > 0 if isinstance(want, str) else have == want
        for have, want in zip(array.shape, shape, strict=False)
    )
    if not fits:
        expected = ", ".join(map(str, shape)) + "," * (len(shape) == 1)
        msg = f"{name} has shape {array.shape}; expected ({expected})"
        raise ValueError(msg)
    return check.kernel_view(array.astype(compute, copy=False))
