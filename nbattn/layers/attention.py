"""Attention layers: projections around this library's attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import check
from ..additive import additive_attention
from ..attention import AttentionOutput, scaled_dot_product_attention
from ..cache import KVCache
from ..luong import luong_attention
from .linear import Linear


class MultiHeadAttention:
    """Multi-head attention: self or cross, with grouped queries, with a cache.

    Parameters
    ----------
    query, key, value : Linear
        From the model's width to ``heads * D``, ``kv_heads * D`` and ``kv_heads * Dv``.
    output : Linear
        From ``heads * Dv`` to the model's width.
    heads : int
    kv_heads : int, optional
        As many as `heads` unless given.
    scale : float, optional
        ``1 / sqrt(D)`` unless given.
    extra : (ndarray, ndarray), optional
        Keys ``(kv_heads, n, D)`` and values ``(kv_heads, n, Dv)`` that every query sees besides its own.
    backend : {None, "cpu", "reference"}
        Of the attention; each Linear has its own.

    Raises
    ------
    ValueError
        For sizes that do not fit.

    References
    ----------
    Vaswani et al., "Attention Is All You Need", 2017, https://arxiv.org/abs/1706.03762.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.layers import Linear, MultiHeadAttention
    >>> rng = np.random.default_rng(0)
    >>> wide, narrow = (Linear(rng.standard_normal((n, 32), np.float32)) for n in (32, 8))
    >>> layer = MultiHeadAttention(wide, narrow, narrow, wide, heads=4, kv_heads=1)
    >>> x = rng.standard_normal((2, 5, 32), np.float32)
    >>> layer(x, is_causal=True).shape
    (2, 5, 32)

    Over another sequence, whose keys and values are computed once:

    >>> memory = layer.project(rng.standard_normal((2, 9, 32), np.float32))
    >>> result = layer(x, memory=memory, return_weights=True)
    >>> result.output.shape, result.weights.shape
    ((2, 5, 32), (2, 4, 5, 9))
    """

    def __init__(
        self,
        query: Linear,
        key: Linear,
        value: Linear,
        output: Linear,
        heads: int,
        kv_heads: int | None = None,
        *,
        scale: float | None = None,
        extra: tuple[ArrayLike, ArrayLike] | None = None,
        backend: str | None = None,
    ) -> None:
        self.query, self.key, self.value, self.output = query, key, value, output
        self.heads = check.check_int(heads, "heads")
        self.kv_heads = self.heads if kv_heads is None else check.check_int(kv_heads, "kv_heads")
        self.scale, self.backend = scale, backend
        for name, layer, count in (
            ("query", query, self.heads), ("key", key, self.kv_heads), ("value", value, self.kv_heads),
        ):  # fmt: skip
            if count < 1 or layer.d_out % count:
                msg = f"{name} gives {layer.d_out} numbers; expected a multiple of its {count} heads"
                raise ValueError(msg)
        self.head_dim, self.value_dim = query.d_out // self.heads, value.d_out // self.kv_heads
        if self.heads % self.kv_heads or key.d_out != self.kv_heads * self.head_dim:
            msg = (
                f"query gives {self.heads} heads of {self.head_dim} numbers and key {self.kv_heads} heads in "
                f"{key.d_out}; the heads must divide, and be of one size"
            )
            raise ValueError(msg)
        if output.d_in != self.heads * self.value_dim:
            msg = f"output takes {output.d_in} numbers; expected {self.heads} heads of {self.value_dim}"
            raise ValueError(msg)
        self.extra = None if extra is None else self._check_extra(*extra)

    @classmethod
    def from_torch(
        cls,
        state: Mapping[str, Any],
        heads: int,
        *,
        prefix: str = "",
        add_zero_attn: bool = False,
        backend: str | None = None,
    ) -> MultiHeadAttention:
        """The layer of a ``torch.nn.MultiheadAttention``'s state dict, as arrays.

        It holds ``in_proj_weight``, or ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight``;
        ``in_proj_bias`` and ``out_proj.bias``, ``bias_k`` and ``bias_v`` where there are any; and
        ``out_proj.weight``. Here a mask is true where a query may attend, the batch comes first, and weights
        are not averaged over the heads.

        Parameters
        ----------
        state : mapping of str to array_like
            Names that do not begin with the prefix are left alone.
        heads : int
        prefix : str
            What comes before the names, as "decoder.attn.".
        add_zero_attn : bool
            As PyTorch's: one more key and value of zeros. The state dict does not say.
        backend : {None, "cpu", "reference"}

        Raises
        ------
        ValueError
            For names that are missing or unknown, and shapes that do not fit.

        Examples
        --------
        >>> import numpy as np
        >>> from nbattn.layers import MultiHeadAttention
        >>> rng = np.random.default_rng(0)
        >>> shapes = {"in_proj_weight": (12, 4), "out_proj.weight": (4, 4)}
        >>> state = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        >>> MultiHeadAttention.from_torch(state, heads=2)(rng.standard_normal((3, 4), np.float32)).shape
        (3, 4)
        """
        own = {
            name[len(prefix) :]: check.floating(state[name], name)
            for name in state
            if name.startswith(prefix)
        }
        joint = "in_proj_weight" in own
        parts = ["in_proj_weight"] if joint else [f"{letter}_proj_weight" for letter in "qkv"]
        for name in (*parts, "out_proj.weight"):
            if name not in own:
                msg = f"state lacks {prefix}{name}"
                raise ValueError(msg)
        weights = _thirds(own.pop("in_proj_weight")) if joint else [own.pop(name) for name in parts]
        biases = _thirds(own.pop("in_proj_bias")) if "in_proj_bias" in own else [None] * 3
        query, key, value = (Linear(w, b, backend=backend) for w, b in zip(weights, biases, strict=True))
        output = Linear(own.pop("out_proj.weight"), own.pop("out_proj.bias", None), backend=backend)
        rows = [own.pop(name).reshape(1, -1) for name in ("bias_k", "bias_v") if name in own]
        if own or len(rows) == 1:
            names = ", ".join(prefix + name for name in own) or f"one of {prefix}bias_k and {prefix}bias_v"
            msg = f"state holds {names}, which fits no torch.nn.MultiheadAttention"
            raise ValueError(msg)
        extra = None
        if rows or add_zero_attn:
            zeros = np.zeros((int(add_zero_attn), key.d_out))
            both = [np.concatenate((row, zeros)) for row in rows] or [zeros, zeros]
            k, v = (x.reshape(len(x), heads, -1).swapaxes(0, 1) for x in both)
            extra = k, v
        return cls(query, key, value, output, heads, extra=extra, backend=backend)

    def project(
        self, context: ArrayLike, value: ArrayLike | None = None
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """The keys ``(..., kv_heads, S, D)`` and values of ``(..., S, d)``, for `memory`.

        `value` is what the values are made of, where that is another array, as PyTorch's layer takes it.
        """
        keys = check.floating(context, "context")
        values = keys if value is None else check.floating(value, "value")
        if values.shape[:-1] != keys.shape[:-1]:
            msg = f"context has shape {keys.shape} and value {values.shape}; all but the last size must match"
            raise ValueError(msg)
        return _split(self.key(keys), self.kv_heads), _split(self.value(values), self.kv_heads)

    def __call__(
        self,
        x: ArrayLike,
        context: ArrayLike | None = None,
        *,
        memory: tuple[NDArray[Any], NDArray[Any]] | None = None,
        cache: KVCache | None = None,
        mask: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        is_causal: bool = False,
        key_lengths: ArrayLike | None = None,
        return_weights: bool = False,
        plus: NDArray[Any] | None = None,
    ) -> NDArray[Any] | AttentionOutput:
        """Attention of x over itself, another sequence, or a cache.

        Parameters
        ----------
        x : array_like, shape (B, S, d)
            The batch may be missing.
        context : array_like, shape (B, Sk, d_context), optional
            What x attends to; x itself unless given.
        memory : (ndarray, ndarray), optional
            What `project` made of the context.
        cache : KVCache, optional
            Takes the keys and values of x, and x attends to all that it holds, each position to those up to
            its own.
        mask, bias, is_causal, key_lengths
            As in `scaled_dot_product_attention`; with a cache as in `KVCache.attend`.
        return_weights : bool
            Also return the weights, of a head each. Not with a cache.
        plus : ndarray, shape (B, S, d), optional
            Added to the output, as a residual connection does.

        Returns
        -------
        ndarray or AttentionOutput
            ``(B, S, d)``; with `return_weights` the named tuple with the weights ``(B, heads, S, Sk)``.

        Raises
        ------
        TypeError, ValueError
            As the attention that it calls; ValueError also for options that exclude each other.
        """
        x = check.floating(x, "x")
        if sum(given is not None for given in (context, memory, cache)) > 1:
            msg = "context, memory and cache exclude each other; give one of them, or none"
            raise ValueError(msg)
        query = _split(self.query(x), self.heads)
        if cache is not None:
            if return_weights or self.extra is not None or key_lengths is not None:
                msg = "a cache goes with no return_weights, no key_lengths and no extra keys"
                raise ValueError(msg)
            keys, values = self.project(x)
            if cache.dtype in ("float16", "bfloat16"):  # it takes its own dtype alone
                query, keys, values = (a.astype(cache.dtype) for a in (query, keys, values))
            cache.append(keys, values)
            mixed = cast(NDArray[Any], cache.attend(query, mask, bias=bias, scale=self.scale))
            return self.output(_join(mixed), plus=plus)
        keys, values = memory if memory is not None else self.project(x if context is None else context)
        n = 0
        if self.extra is not None:
            n = self.extra[0].shape[-2]
            keys, values = (_with_extra(e, a) for e, a in zip(self.extra, (keys, values), strict=True))
            mask, bias = _widen(mask, n, True), _widen(bias, n, 0)
            key_lengths = None if key_lengths is None else np.asarray(key_lengths) + n
        result = scaled_dot_product_attention(
            query, keys, values, mask, bias=bias, is_causal=is_causal, query_offset=n,
            key_lengths=key_lengths, scale=self.scale, return_weights=return_weights, backend=self.backend,
        )  # fmt: skip
        if not isinstance(result, AttentionOutput):
            return self.output(_join(result), plus=plus)
        assert result.weights is not None
        weights = np.roll(result.weights, -n, axis=-1) if n else result.weights
        return AttentionOutput(self.output(_join(result.output), plus=plus), weights, None)

    def _check_extra(self, key: ArrayLike, value: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
        keys, values = check.floating(key, "extra"), check.floating(value, "extra")
        n = keys.shape[1] if keys.ndim == 3 else 0
        expected = (self.kv_heads, n, self.head_dim), (self.kv_heads, n, self.value_dim)
        if (keys.shape, values.shape) != expected:
            msg = (
                f"extra has shapes {keys.shape} and {values.shape}; expected {expected[0]} and {expected[1]}"
            )
            raise ValueError(msg)
        return keys, values


class BahdanauAttention:
    """Additive attention: ``v . tanh(w_query @ q + w_key @ k + bias)``, softmax over the keys, sum of values.

    Parameters
    ----------
    w_query, w_key : ndarray, shapes (A, Dq) and (A, Dk)
    v : ndarray, shape (A,)
    bias : ndarray, shape (A,), optional
    backend : {None, "cpu", "reference"}

    See Also
    --------
    nbattn.additive_attention : What computes it, with the reference.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.layers import BahdanauAttention
    >>> rng = np.random.default_rng(0)
    >>> w_query, w_key, v = (rng.standard_normal(shape, np.float32) for shape in ((16, 32), (16, 48), 16))
    >>> layer = BahdanauAttention(w_query, w_key, v, backend="reference")

    A decoder's state over what an encoder read, whose keys are projected once:

    >>> memory = layer.project(rng.standard_normal((4, 9, 48), np.float32))
    >>> result = layer(rng.standard_normal((4, 1, 32), np.float32), memory=memory, return_weights=True)
    >>> result.output.shape, result.weights.shape
    ((4, 1, 48), (4, 1, 9))
    """

    def __init__(
        self,
        w_query: ArrayLike,
        w_key: ArrayLike,
        v: ArrayLike,
        bias: ArrayLike | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        self.w_query, self.v, self.bias, self.backend = w_query, v, bias, backend
        self.key = Linear(w_key, backend=backend)

    def project(self, context: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
        """The projected keys ``(B, Sk, A)`` and the values of ``(B, Sk, Dk)``, for `memory`."""
        values = check.floating(context, "context")
        return self.key(values), values

    def __call__(
        self,
        x: ArrayLike,
        context: ArrayLike | None = None,
        *,
        memory: tuple[NDArray[Any], NDArray[Any]] | None = None,
        mask: ArrayLike | None = None,
        key_lengths: ArrayLike | None = None,
        return_weights: bool = False,
    ) -> NDArray[Any] | AttentionOutput:
        """Queries ``(B, Sq, Dq)`` over a context ``(B, Sk, Dk)``, to ``(B, Sq, Dk)``; no batch is fine too.

        `memory` is what `project` made of the context. `mask` broadcasts to ``(B, Sq, Sk)``. With
        `return_weights` the named tuple with the weights ``(B, Sq, Sk)``.
        """
        keys, values = _memory(self, context, memory)
        return _one_head(
            additive_attention, x, keys, values, mask, w_query=self.w_query, w_key=None, v=self.v,
            bias=self.bias, key_lengths=key_lengths, return_weights=return_weights, backend=self.backend,
        )  # fmt: skip


class LuongAttention:
    """Luong's attention: one of four scores, over all keys or a window.

    Parameters
    ----------
    score, weight, v, local, w_position, v_position
        As in `nbattn.luong_attention`.
    w_output : ndarray, shape (d, Dv + Dq), optional
        Makes the result the attentional state ``tanh(w_output @ [context; query])``, the paper's equation 5.
    backend : {None, "cpu", "reference"}

    See Also
    --------
    nbattn.luong_attention : What computes it, with the reference.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.layers import LuongAttention
    >>> rng = np.random.default_rng(0)
    >>> weight, w_output = (rng.standard_normal(shape, np.float32) for shape in ((32, 48), (24, 80)))
    >>> layer = LuongAttention("general", weight, w_output=w_output)
    >>> layer(rng.standard_normal((4, 1, 32), np.float32), rng.standard_normal((4, 9, 48), np.float32)).shape
    (4, 1, 24)
    """

    def __init__(
        self,
        score: str = "dot",
        weight: ArrayLike | None = None,
        v: ArrayLike | None = None,
        *,
        local: int | None = None,
        w_position: ArrayLike | None = None,
        v_position: ArrayLike | None = None,
        w_output: ArrayLike | None = None,
        backend: str | None = None,
    ) -> None:
        self.options = {
            "score": score, "weight": weight, "v": v, "local": local, "w_position": w_position,
            "v_position": v_position, "backend": backend,
        }  # fmt: skip
        self.output = None if w_output is None else Linear(w_output, backend=backend)

    def __call__(
        self,
        x: ArrayLike,
        context: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        query_offset: ArrayLike | str = 0,
        key_lengths: ArrayLike | None = None,
        return_weights: bool = False,
    ) -> NDArray[Any] | AttentionOutput:
        """Queries ``(B, Sq, Dq)`` over a context ``(B, Sk, Dk)``; the batch may be missing.

        `mask` broadcasts to ``(B, Sq, Sk)``; `query_offset` is where query 0 stands, for a window. With
        `return_weights` the named tuple with the weights ``(B, Sq, Sk)``.
        """
        query, keys = check.floating(x, "x"), check.floating(context, "context")
        result = _one_head(
            luong_attention, query, keys, keys, mask, query_offset=query_offset, key_lengths=key_lengths,
            return_weights=return_weights, **self.options,
        )  # fmt: skip
        if self.output is None:
            return result
        mixed = result.output if isinstance(result, AttentionOutput) else result
        state = np.tanh(self.output(np.concatenate([mixed, query], axis=-1)))
        return result._replace(output=state) if isinstance(result, AttentionOutput) else state


def _memory(
    layer: Any, context: ArrayLike | None, memory: tuple[NDArray[Any], NDArray[Any]] | None
) -> tuple[NDArray[Any], NDArray[Any]]:
    if (context is None) == (memory is None):
        msg = "give either context or memory, what project made of it"
        raise ValueError(msg)
    return layer.project(context) if memory is None else memory


def _one_head(
    attend: Any,
    x: ArrayLike,
    keys: NDArray[Any],
    values: NDArray[Any],
    mask: ArrayLike | None,
    **options: Any,
) -> NDArray[Any] | AttentionOutput:
    """Attention of (B, S, D) arrays, whose heads are one and missing."""
    query, masks = check.floating(x, "x"), None if mask is None else np.asarray(mask)
    if query.ndim == 3:
        query, keys, values = query[:, None], keys[:, None], values[:, None]
        masks = masks[:, None] if masks is not None and masks.ndim == 3 else masks
        result = attend(query, keys, values, mask=masks, **options)
        if not isinstance(result, AttentionOutput):
            return result[:, 0]
        assert result.weights is not None
        return AttentionOutput(result.output[:, 0], result.weights[:, 0], None)
    return attend(query, keys, values, mask=masks, **options)


def _split(x: NDArray[Any], heads: int) -> NDArray[Any]:
    """``(..., S, heads * D)`` as a view ``(..., heads, S, D)``."""
    return x.reshape(*x.shape[:-1], heads, -1).swapaxes(-3, -2)


def _join(x: NDArray[Any]) -> NDArray[Any]:
    """``(..., heads, S, D)`` to ``(..., S, heads * D)``."""
    *batch, heads, rows, head_dim = x.shape
    return x.swapaxes(-3, -2).reshape(*batch, rows, heads * head_dim)


def _thirds(x: NDArray[Any]) -> list[NDArray[Any]]:
    if x.ndim == 0 or len(x) % 3:
        msg = f"in_proj has shape {x.shape}; expected three parts of one size along the first axis"
        raise ValueError(msg)
    return np.split(x, 3)


def _with_extra(extra: NDArray[Any], x: NDArray[Any]) -> NDArray[Any]:
    """`x` (..., kv_heads, S, D) with more rows before, where causal queries see them too."""
    rows = np.broadcast_to(extra, (*x.shape[:-2], *extra.shape[1:])).astype(x.dtype)
    return np.concatenate([rows, x], axis=-2)


def _widen(x: ArrayLike | None, n: int, fill: Any) -> ArrayLike | None:
    """A mask or bias (..., Sk) that lets n keys more through at the front."""
    array = None if x is None else np.asarray(x)
    if array is None or array.ndim == 0 or array.shape[-1] == 1:
        return array
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(n, 0)], constant_values=fill)
