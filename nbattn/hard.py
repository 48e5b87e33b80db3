"""Hard attention: docstring, checks, dispatch. The formula is in `reference/hard.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import check
from .block_mask import BlockMask
from .resolve import Options, arrays_of, resolve_batch, run

MODES = ("argmax", "sample")


class HardAttentionOutput(NamedTuple):
    """What hard attention selects.

    Attributes
    ----------
    output : ndarray
        The selected values, shaped as the query with the value's head_dim.
    index : ndarray of int64
        The selected keys ``(B, Hq, Sq)``; -1 where a row sees none.
    """

    output: NDArray[Any]
    index: NDArray[np.int64]  # type: ignore[assignment]  # hides the method of tuples


def hard_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    mask: ArrayLike | BlockMask | None = None,
    *,
    mode: str = "argmax",
    rng: Any = None,
    bias: ArrayLike | None = None,
    is_causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    query_offset: ArrayLike | str = 0,
    key_lengths: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    mod_args: Sequence[Any] = (),
    out: NDArray[Any] | None = None,
    backend: str | None = None,
) -> HardAttentionOutput:
    """Hard attention: every query takes the value of one key, the best one or one drawn by the weights.

    Soft attention, which `scaled_dot_product_attention` computes, mixes all values; hard attention selects.
    Both score the keys alike, here ``s``, with the weights ``p = softmax(s)``:

    ==================  ============================  ==================================================
    soft                every key, by its weight      ``(p[:, None] * value).sum(0)``
    hard, ``"argmax"``  the key that scores highest   ``value[s.argmax()]``
    hard, ``"sample"``  a key drawn by the weights    ``value[rng.choice(len(p), p=p)]``
    ==================  ============================  ==================================================

    Soft attention's output is the mean of many sampled ones. With sharper scores (a larger `scale`) all three
    come to the best key's value. Training likes the soft form, through which gradients flow; the hard ones
    say which key was looked at, and take half of the products.

    The scores go through the steps of `scaled_dot_product_attention`: ``scale * (q . k)``, softcap, bias,
    ALiBi, `score_mod`, the masks. A row that sees no key, or only keys that score -inf, gives index -1 and
    output 0. What is selected does not depend on the number of threads or the rest of the batch. Memory grows
    with the queries and keys, never with their product.

    Parameters
    ----------
    query : array_like, shape (B, Hq, Sq, D)
        float32, float64, float16 or bfloat16 (from `ml_dtypes`). Leading dimensions may be missing.
    key, value : array_like, shapes (B, Hkv, Sk, D) and (B, Hkv, Sk, Dv)
        Same dtype as the query. Hq must be a multiple of Hkv.
    mask : array_like of bool or int, or BlockMask, optional
        Broadcastable to (B, Hq, Sq, Sk) from the right; nonzero means attend. A `BlockMask` has shape
        (B or 1, Hq or 1, Sq, Sk), and what it leaves empty takes no time.
    mode : {"argmax", "sample"}
        "argmax" takes the key of the largest score, the first of several. "sample" draws a key with the
        probability of its softmax weight; a key of weight 0 is never drawn. In both modes a NaN counts as
        larger than every number, as in `numpy.argmax`, and a largest score of NaN or inf is selected, not
        drawn.
    rng : None, int or numpy.random.Generator
        Where "sample" takes its numbers from: one of ``[0, 1)`` for each row, in the order of
        ``rng.random((B, Hq, Sq))``. A generator moves on; an int seeds a new one; None takes fresh entropy.
        Not used by "argmax".
    bias, is_causal, window_size, query_offset, key_lengths, scale, softcap, alibi_slopes
        As in `scaled_dot_product_attention`.
    score_mod, mask_mod, mod_args
        The user's own functions, as there.
    out : ndarray, optional
        Where to write the output: right shape and dtype, writable, no memory shared with an input.
    backend : {None, "cpu", "reference", "cuda"}
        None chooses by where the inputs live. All select by the same numbers of `rng`; where two scores, or
        the number and a bound between two keys, are equal but for rounding, they may differ.

    Returns
    -------
    HardAttentionOutput
        The named tuple ``(output, index)``: the selected values ``(B, Hq, Sq, Dv)`` in the query's dtype, bit
        for bit, and the int64 keys ``(B, Hq, Sq)`` that they belong to.

    Raises
    ------
    TypeError, ValueError
        As `scaled_dot_product_attention`; also for an unknown mode or an `rng` that cannot be one.

    References
    ----------
    Section 4 of Xu et al., "Show, Attend and Tell", 2015, https://arxiv.org/abs/1502.03044, where hard
    attention samples. Luong et al., 2015, https://arxiv.org/abs/1508.04025, set local attention between the
    two. Drawing by the first sum that passes a uniform number is inverse transform sampling.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn import hard_attention, scaled_dot_product_attention
    >>> key = np.eye(3)
    >>> value = np.array([[10.0], [20.0], [30.0]])
    >>> query = np.log([[1.0, 2.0, 1.0]])
    >>> output, index = hard_attention(query, key, value, scale=1.0)
    >>> output, index
    (array([[20.]]), array([1]))

    The weights are 1/4, 1/2 and 1/4. Sampled outputs are soft attention's on average:

    >>> queries = np.repeat(query, 4000, axis=0)
    >>> output, index = hard_attention(queries, key, value, scale=1.0, mode="sample", rng=0)
    >>> (np.bincount(index) / 4000).round(2)
    array([0.25, 0.5 , 0.25])
    >>> output.mean().round(1), scaled_dot_product_attention(query, key, value, scale=1.0).round(1)
    (np.float64(20.0), array([[20.]]))
    """
    module = check.backend_module("hard", backend)
    if not isinstance(mode, str) or mode not in MODES:
        msg = f"mode is {mode!r}; expected 'argmax' or 'sample'"
        raise (ValueError if isinstance(mode, str) else TypeError)(msg)
    generator = check.check_rng(rng) if mode == "sample" else None
    options = Options(mask, bias, is_causal, window_size, query_offset, key_lengths, scale, softcap,
                      alibi_slopes, None, None, score_mod, mask_mod, mod_args)  # fmt: skip
    problem, dtype, missing = resolve_batch(query, key, value, options)
    shape = (*problem.query.shape[:3], problem.value.shape[3])
    given = (query, key, value, mask, bias)
    result = check.check_out(out, shape[missing:], dtype, arrays_of(given, problem))
    index = np.empty(shape[:3], np.int64)
    uniforms = None if generator is None else generator.random(shape[:3])
    run(module, problem, result[(None,) * missing], index, uniforms)
    return HardAttentionOutput(result, index[(0,) * missing])
