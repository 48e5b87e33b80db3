"""glassllm: a decoder with grouped queries, rotary positions, RMSNorm, SwiGLU and a tied head.

English and Portuguese weights ship inside the package of that name (MIT licence), which is not imported. The
names of tensors are the weight file's.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..cache import KVCache
from ..layers import Linear, RMSNorm, SwiGLU
from .sampling import next_token
from .weights import Weights, package_folder, read_json


@dataclass(frozen=True)
class Config:
    """The sizes of one model, as its weight file states them."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    max_len: int
    rope_base: float
    eps: float

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @classmethod
    def read(cls, weights: Weights) -> Config:
        """The config inside a weight file; ValueError, naming the file, where the sizes make no model."""
        entries = weights.json("__config__")
        try:
            config = cls(**{field.name: _positive(entries, field.name, field.type) for field in fields(cls)})
            config._check()
        except ValueError as error:
            msg = f"{weights.path}: __config__: {error}"
            raise ValueError(msg) from None
        return config

    def _check(self) -> None:
        if self.d_model % self.n_heads or self.n_heads % self.n_kv_heads or self.head_dim % 2:
            msg = (
                f"d_model {self.d_model}, n_heads {self.n_heads} and n_kv_heads {self.n_kv_heads} "
                f"do not fit; each must be a multiple of the next, and the head_dim even"
            )
            raise ValueError(msg)


def _positive(entries: dict[str, Any], name: str, kind: Any) -> Any:
    value = entries.get(name)
    kinds = (int,) if kind == "int" else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < float("inf"):
        msg = f"{name} is {value!r}; expected a positive {kind}"
        raise ValueError(msg)
    return value


class Attention:
    """Causal attention of one layer, with fewer key heads than query heads. The cache turns both."""

    def __init__(self, weights: Weights, prefix: str, config: Config, backend: str | None) -> None:
        d, kv_width = config.d_model, config.n_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        # The file has inputs along the first axis.
        self.query, self.key, self.value, self.output = (
            Linear(weights.tensor(prefix + name, (d, width)).T, backend=backend)
            for name, width in (("W_Q", d), ("W_K", kv_width), ("W_V", kv_width), ("W_O", d))
        )

    def __call__(self, x: NDArray[np.float32], cache: KVCache) -> NDArray[np.float32]:
        """``(B, S, d)`` at the positions after those in the cache, to ``(B, S, d)``."""
        cache.append(self._heads(self.key(x)), self._heads(self.value(x)))
        mixed = cast(NDArray[np.float32], cache.attend(self._heads(self.query(x))))
        return self.output(mixed.transpose(0, 2, 1, 3).reshape(x.shape))

    def _heads(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """``(B, S, H * D)`` as a view ``(B, H, S, D)``."""
        return x.reshape(*x.shape[:2], -1, self.head_dim).transpose(0, 2, 1, 3)


class Block:
    """One layer: attention and SwiGLU, each normalised before and added to its input."""

    def __init__(self, weights: Weights, prefix: str, config: Config, backend: str | None) -> None:
        d, hidden = config.d_model, int(8 * config.d_model / 3)
        self.norm1 = RMSNorm(weights.tensor(prefix + "norm1.gamma", (d,)), config.eps, backend=backend)
        self.attention = Attention(weights, prefix + "attn.", config, backend)
        self.norm2 = RMSNorm(weights.tensor(prefix + "norm2.gamma", (d,)), config.eps, backend=backend)
        self.feed_forward = SwiGLU(
            gate=Linear(weights.tensor(prefix + "ffn.W1", (d, hidden)).T, backend=backend),
            up=Linear(weights.tensor(prefix + "ffn.W3", (d, hidden)).T, backend=backend),
            down=Linear(weights.tensor(prefix + "ffn.W2", (hidden, d)).T, backend=backend),
        )

    def __call__(self, x: NDArray[np.float32], cache: KVCache) -> NDArray[np.float32]:
        x = x + self.attention(self.norm1(x), cache)
        return x + self.feed_forward(self.norm2(x))


class GlassLM:
    """The decoder: token ids in, logits out.

    Parameters
    ----------
    weights : Weights
        The opened ``en.npz`` or ``pt.npz``.
    backend : {None, "cpu", "reference", "cuda"}
        The attention backend.
    cache_dtype : {"float32", "int8", "int4"}
        What `new_cache` stores keys and values in.

    Examples
    --------
    >>> from nbattn.models import load
    >>> model, tokenizer = load("glassllm-en", backend="reference")  # doctest: +SKIP
    >>> model([tokenizer.encode("Alice was")]).shape  # doctest: +SKIP
    (1, 3, 1024)
    """

    def __init__(self, weights: Weights, backend: str | None = None, cache_dtype: str = "float32") -> None:
        self.config = config = Config.read(weights)
        self.backend, self.cache_dtype = backend, cache_dtype
        self.embedding = weights.tensor("E", (config.vocab_size, config.d_model))
        self.blocks = [Block(weights, f"blocks.{i}.", config, backend) for i in range(config.n_layers)]
        self.norm = RMSNorm(weights.tensor("norm_f.gamma", (config.d_model,)), config.eps, backend=backend)
        self.head = Linear(self.embedding, backend=backend)

    def new_cache(self, batch: int = 1) -> list[KVCache]:
        """One empty cache for each layer, with room for `max_len` positions."""
        config = self.config
        return [
            KVCache(
                batch, config.n_kv_heads, config.max_len, config.head_dim, self.cache_dtype,
                rotary_base=config.rope_base, rotary_interleaved=True, backend=self.backend,
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
        ids = self._check_tokens(tokens)
        layers = self.new_cache(len(ids)) if cache is None else cache
        x = self.embedding[ids]
        for block, layer in zip(self.blocks, layers, strict=True):
            x = block(x, layer)
        return self.head(self.norm(x))

    def generate(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[int]:
        """Yield `max_tokens` tokens that continue the prompt.

        The model sees the last `max_len` tokens. Once they fill the context, each step moves the window by
        one token, and with it every position: the cache is computed again, as glassllm itself does.

        Parameters
        ----------
        prompt : sequence of int
            At least one token.
        max_tokens : int
        temperature, top_p
            As in `nbattn.models.sampling.next_token`; greedy unless given.
        seed : int, optional
            The same seed draws the same tokens.
        """
        if not len(prompt):
            msg = "the prompt is empty; give at least one token"
            raise ValueError(msg)
        rng = np.random.default_rng(seed)
        max_len = self.config.max_len
        cache = self.new_cache()
        window = pending = list(prompt)[-max_len:]
        for _ in range(max_tokens):
            if cache[0].lengths[0] + len(pending) > max_len:
                pending = window
                for layer in cache:
                    layer.reset()
            token = next_token(self([pending], cache)[0, -1], temperature, top_p, rng)
            window, pending = [*window, token][-max_len:], [token]
            yield token

    def _check_tokens(self, tokens: ArrayLike) -> NDArray[Any]:
        ids = np.asarray(tokens)
        if ids.dtype.kind not in "iu" or ids.ndim != 2:
            msg = f"tokens has shape {ids.shape} and dtype {ids.dtype}; expected integers (batch, positions)"
            raise ValueError(msg)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.config.vocab_size:
            msg = f"tokens holds {ids.min()} to {ids.max()}; expected 0 to {self.config.vocab_size - 1}"
            raise ValueError(msg)
        return ids


class Tokenizer:
    """Byte-pair encoding over characters: every token is whole characters, so each can be printed by itself.

    Parameters
    ----------
    alphabet : sequence of str
        The characters.
    merges : sequence of (str, str)
        The pairs that join to one token, the first ones first.

    Examples
    --------
    >>> from nbattn.models.glassllm import Tokenizer
    >>> tokenizer = Tokenizer(["a", "b", "▁"], [("a", "b"), ("▁", "ab")])
    >>> tokenizer.encode("ab ab?")
    [7, 8, 1]
    >>> tokenizer.decode([7, 8, 1])
    'ab ab⁇'
    """

    SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>")
    UNKNOWN = 1
    SPACE = "▁"
    CHUNK = re.compile(r"\n|▁*[^▁\n]+|▁+")  # no token crosses the border of a chunk

    def __init__(self, alphabet: Sequence[str], merges: Sequence[tuple[str, str]]) -> None:
        self.vocab = [*self.SPECIALS, *alphabet, *(left + right for left, right in merges)]
        self._ids = {token: i for i, token in enumerate(self.vocab)}
        self._rank = {(left, right): rank for rank, (left, right) in enumerate(merges)}
        self._text = ["", "⁇", "", "", *(token.replace(self.SPACE, " ") for token in self.vocab[4:])]

    @classmethod
    def read(cls, path: Path) -> Tokenizer:
        """The tokenizer in a ``.tokenizer.json``; an error that names the file if it holds none."""
        data = read_json(path)
        alphabet, merges = data.get("alphabet", ()), data.get("merges", ())
        if not _is_strings(alphabet) or not isinstance(merges, list) or not all(map(_is_pair, merges)):
            msg = f"{path} is no glassllm tokenizer; it needs an alphabet of strings and merges of two each"
            raise ValueError(msg)
        return cls(alphabet, merges)

    def encode(self, text: str) -> list[int]:
        """The ids of a text; a character outside the alphabet becomes `UNKNOWN`."""
        marked = unicodedata.normalize("NFC", text).replace(" ", self.SPACE)
        return [
            self._ids.get(token, self.UNKNOWN)
            for chunk in self.CHUNK.findall(marked)
            for token in self._merge(list(chunk))
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids."""
        return "".join(self._text[i] for i in ids)

    def _merge(self, tokens: list[str]) -> list[str]:
        """Join, everywhere at once, the pair that was learnt first, until no pair is known."""
        while ranked := [pair for pair in pairwise(tokens) if pair in self._rank]:
            best = min(ranked, key=self._rank.__getitem__)
            joined: list[str] = []
            i = 0
            while i < len(tokens):
                width = 2 if tuple(tokens[i : i + 2]) == best else 1
                joined.append("".join(tokens[i : i + width]))
                i += width
            tokens = joined
        return tokens


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_pair(value: Any) -> bool:
    return _is_strings(value) and len(value) == 2


def load(
    language: str,
    folder: str | PathLike[str] | None = None,
    backend: str | None = None,
    cache_dtype: str = "float32",
) -> tuple[GlassLM, Tokenizer]:
    """The model and tokenizer of a language, "en" or "pt", from a folder or from the installed package."""
    base = package_folder("glassllm") / "weights" if folder is None else Path(folder)
    weights, tokenizer_path = Weights(base / f"{language}.npz"), base / f"{language}.tokenizer.json"
    model, tokenizer = GlassLM(weights, backend, cache_dtype), Tokenizer.read(tokenizer_path)
    if len(tokenizer.vocab) != model.config.vocab_size:
        size = model.config.vocab_size
        msg = f"{tokenizer_path} has {len(tokenizer.vocab)} tokens but {weights.path} has {size}"
        raise ValueError(msg)
    return model, tokenizer
