"""Decoders of Llama's kind: rotary positions, grouped queries, RMSNorm, SwiGLU and a tied head.

What one of them calls its tensors, and how its file holds them, is in its own file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..cache import KVCache
from ..layers import Embedding, Linear, MultiHeadAttention, RMSNorm, SwiGLU
from .sampling import next_token


@dataclass(frozen=True)
class Config:
    """The sizes of one model."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    hidden: int
    max_len: int
    rope_base: float
    eps: float

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @classmethod
    def read(cls, entries: Mapping[str, Any], where: str, names: Mapping[str, str] | None = None) -> Config:
        """The sizes among some entries; ValueError, which begins with `where`, if they make no model.

        `names` are those of the entries by the fields'; the fields' own unless given.
        """
        try:
            config = cls(
                **{
                    field.name: _positive(entries, names[field.name] if names else field.name, field.type)
                    for field in fields(cls)
                }
            )
            config._check()
        except ValueError as error:
            msg = f"{where}: {error}"
            raise ValueError(msg) from None
        return config

    def _check(self) -> None:
        if self.d_model % self.n_heads or self.n_heads % self.n_kv_heads or self.head_dim % 2:
            msg = (
                f"d_model {self.d_model}, n_heads {self.n_heads} and n_kv_heads {self.n_kv_heads} "
                f"do not fit; each must be a multiple of the next, and the head_dim even"
            )
            raise ValueError(msg)


def _positive(entries: Mapping[str, Any], name: str, kind: Any) -> Any:
    value = entries.get(name)
    kinds = (int,) if kind == "int" else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < float("inf"):
        msg = f"{name} is {repr(value)[:80]}; expected a positive {kind}"
        raise ValueError(msg)
    return value


def stored(weight: NDArray[np.float32], dtype: str, backend: str | None, group: int | None = None) -> Linear:
    """A product with a weight kept as float32, float16, bfloat16 or int8, as `Linear.astype` rounds it."""
    layer = Linear(weight, backend=backend)
    return layer if dtype == layer.dtype else layer.astype(dtype, group=group)


class Block:
    """One layer: attention and SwiGLU, each normalised before and added to its input."""

    def __init__(
        self, norm1: RMSNorm, attention: MultiHeadAttention, norm2: RMSNorm, feed_forward: SwiGLU
    ) -> None:
        self.norm1, self.attention, self.norm2, self.feed_forward = norm1, attention, norm2, feed_forward

    def __call__(self, x: NDArray[np.float32], cache: KVCache) -> NDArray[np.float32]:
        """``(B, S, d)`` at the positions after those in the cache, to ``(B, S, d)``."""
        x = cast(NDArray[np.float32], self.attention(self.norm1(x), cache=cache, plus=x))
        return self.feed_forward(self.norm2(x), plus=x)


class Decoder:
    """The decoder: token ids in, logits out.

    Parameters
    ----------
    config : Config
    blocks : sequence of Block
    norm : RMSNorm
        What the head reads is normalised by.
    head : Linear
        Also the table of the tokens' embeddings.
    end : int, optional
        The token that ends a text.
    slides : bool
        Whether a context that is full gives up its first token for every new one. Else a text ends there, and
        longer prompts are refused.
    backend : {None, "cpu", "reference", "cuda"}
        The attention backend.
    cache_dtype : {"float32", "bfloat16", "int8", "int4"}
        What `new_cache` stores keys and values in.

    Examples
    --------
    >>> from nbattn.models import load
    >>> model, tokenizer = load("glassllm-en", backend="reference")  # doctest: +SKIP
    >>> model([tokenizer.encode("Alice was")]).shape  # doctest: +SKIP
    (1, 3, 1024)
    """

    def __init__(
        self,
        config: Config,
        blocks: Sequence[Block],
        norm: RMSNorm,
        head: Linear,
        *,
        end: int | None = None,
        slides: bool = False,
        backend: str | None = None,
        cache_dtype: str = "float32",
    ) -> None:
        self.config, self.blocks, self.norm, self.head = config, blocks, norm, head
        self.embedding = Embedding(head.weight, scales=head.scales)
        self.end, self.slides = end, slides
        self.backend, self.cache_dtype = backend, cache_dtype

    def new_cache(self, batch: int = 1, capacity: int | None = None) -> list[KVCache]:
        """One empty cache for each layer, with room for so many positions, `max_len` unless given."""
        config = self.config
        return [
            KVCache(
                batch, config.n_kv_heads, config.max_len if capacity is None else capacity, config.head_dim,
                self.cache_dtype, rotary_base=config.rope_base, rotary_interleaved=True, backend=self.backend,
            )
            for _ in self.blocks
        ]  # fmt: skip

    def __call__(self, tokens: ArrayLike, cache: list[KVCache] | None = None) -> NDArray[np.float32]:
        """Logits of the token that follows each position.

        Parameters
        ----------
        tokens : int array_like, shape (B, S)
            They stand at the positions after those in the cache.
        cache : list of KVCache, optional
            From `new_cache`; it receives the new keys and values.

        Returns
        -------
        ndarray of float32, shape (B, S, vocab)
        """
        return self.head(self._states(tokens, cache))

    def generate(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[int]:
        """At most `max_tokens` tokens that continue the prompt, as they come, up to the one that ends a text.

        Where the context slides, the model sees the last `max_len` tokens. Once they fill it, each step moves
        the window by one token, and with it every position: the cache is computed again, as glassllm itself
        does.

        Parameters
        ----------
        prompt : sequence of int
            At least one token.
        max_tokens : int
        temperature, top_p
            As in `nbattn.models.sampling.next_token`; greedy unless given.
        seed : int, optional
            The same seed draws the same tokens.

        Raises
        ------
        ValueError
            For a prompt without tokens, or with more than the context has room for.
        """
        max_len = self.config.max_len
        if not len(prompt):
            msg = "the prompt is empty; give at least one token"
            raise ValueError(msg)
        if len(prompt) > max_len and not self.slides:
            msg = f"the prompt has {len(prompt)} tokens; this model reads at most {max_len}"
            raise ValueError(msg)
        return self._continued(prompt, max_tokens, temperature, top_p, np.random.default_rng(seed))

    def _continued(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        temperature: float,
        top_p: float,
        rng: np.random.Generator,
    ) -> Iterator[int]:
        max_len = self.config.max_len
        cache = self.new_cache(capacity=min(len(prompt) + max_tokens, max_len))
        window = pending = list(prompt)[-max_len:]
        for _ in range(max_tokens):
            if cache[0].lengths[0] + len(pending) > max_len:
                if not self.slides:
                    return
                pending = window
                for layer in cache:
                    layer.reset()
            logits = self.head(self._states([pending], cache)[0, -1])
            token = next_token(logits, temperature, top_p, rng)
            if token == self.end:
                return
            window, pending = [*window, token][-max_len:], [token]
            yield token

    def _states(self, tokens: ArrayLike, cache: list[KVCache] | None) -> NDArray[np.float32]:
        """What the head reads: ``(B, S, d)``."""
        ids = self._check_tokens(tokens)
        if cache is None:
            cache = self.new_cache(len(ids), min(max(ids.shape[1], 1), self.config.max_len))
        x = self.embedding(ids)
        for block, layer in zip(self.blocks, cache, strict=True):
            x = block(x, layer)
        return self.norm(x)

    def _check_tokens(self, tokens: ArrayLike) -> NDArray[Any]:
        ids = np.asarray(tokens)
        if ids.dtype.kind not in "iu" or ids.ndim != 2:
            msg = f"tokens has shape {ids.shape} and dtype {ids.dtype}; expected integers (batch, positions)"
            raise ValueError(msg)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.config.vocab_size:
            msg = f"tokens holds {ids.min()} to {ids.max()}; expected 0 to {self.config.vocab_size - 1}"
            raise ValueError(msg)
        return ids
