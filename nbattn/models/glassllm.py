"""glassllm: a small decoder that continues texts, and its tokenizer of characters.

English and Portuguese weights ship inside the package of that name (MIT licence), which is not imported. The
names of tensors are the weight file's.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

from ..layers import Linear, MultiHeadAttention, RMSNorm, SwiGLU
from .decoder import Block, Config, Decoder, stored
from .weights import Weights, package_folder, read_json


def decoder(
    weights: Weights,
    backend: str | None = None,
    cache_dtype: str = "float32",
    weights_dtype: str = "float32",
) -> Decoder:
    """The decoder of an opened ``en.npz`` or ``pt.npz``; ValueError where it fits no such model."""
    entries = weights.json("__config__")
    d = entries.get("d_model")
    entries["hidden"] = 8 * d // 3 if isinstance(d, int) else None
    config = Config.read(entries, f"{weights.path}: __config__")
    table = weights.tensor("E", (config.vocab_size, config.d_model))
    return Decoder(
        config,
        [_block(weights, f"blocks.{i}.", config, backend, weights_dtype) for i in range(config.n_layers)],
        RMSNorm(weights.tensor("norm_f.gamma", (config.d_model,)), config.eps, backend=backend),
        stored(table, weights_dtype, backend),
        slides=True,
        backend=backend,
        cache_dtype=cache_dtype,
    )


def _block(weights: Weights, prefix: str, config: Config, backend: str | None, dtype: str) -> Block:
    d, hidden, kv_width = config.d_model, config.hidden, config.n_kv_heads * config.head_dim

    def linear(name: str, d_in: int, d_out: int) -> Linear:
        # The file has inputs along the first axis.
        return stored(weights.tensor(prefix + name, (d_in, d_out)).T, dtype, backend)

    def norm(name: str) -> RMSNorm:
        return RMSNorm(weights.tensor(f"{prefix}{name}.gamma", (d,)), config.eps, backend=backend)

    attention = MultiHeadAttention(
        linear("attn.W_Q", d, d), linear("attn.W_K", d, kv_width), linear("attn.W_V", d, kv_width),
        linear("attn.W_O", d, d), config.n_heads, config.n_kv_heads, backend=backend,
    )  # fmt: skip
    feed_forward = SwiGLU(
        gate=linear("ffn.W1", d, hidden), up=linear("ffn.W3", d, hidden), down=linear("ffn.W2", hidden, d)
    )
    return Block(norm("norm1"), attention, norm("norm2"), feed_forward)


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

    chats = False
    """A prompt is a text to continue, not a message to answer."""
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

    def prompt(self, text: str) -> list[int]:
        """The ids of a text to continue."""
        return self.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids as they come."""
        return (self._text[i] for i in ids)

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
    weights_dtype: str = "float32",
) -> tuple[Decoder, Tokenizer]:
    """The model and tokenizer of a language, "en" or "pt", from a folder or from the installed package."""
    base = package_folder("glassllm") / "weights" if folder is None else Path(folder)
    weights, tokenizer_path = Weights(base / f"{language}.npz"), base / f"{language}.tokenizer.json"
    model, tokenizer = decoder(weights, backend, cache_dtype, weights_dtype), Tokenizer.read(tokenizer_path)
    if len(tokenizer.vocab) != model.config.vocab_size:
        size = model.config.vocab_size
        msg = f"{tokenizer_path} has {len(tokenizer.vocab)} tokens but {weights.path} has {size}"
        raise ValueError(msg)
    return model, tokenizer
