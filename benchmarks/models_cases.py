"""The trained models in `peers.py`: MiniLM, Whisper's encoder, the vision transformer, SmolLM2's decoding.

Inputs are what the networks read: token ids, a log-mel spectrogram, pixels; neither tokenizers nor files are
timed. A row whose weights are not installed is left out. Results are held to the same weights in float64.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbattn.models import minilm, smollm2, vit, whisper

from .cases import SHORT, TOLERANCE, Call
from .decode_cases import READ_MEGABYTES

load_minilm, load_vit, load_whisper, load_smollm2 = map(
    cache, (minilm.load, vit.load, whisper.load, smollm2.load)
)
SENTENCES = 32
SHORTEST, LONGEST = 6, 48
"""Tokens of the sentences of a mixed batch."""
ORDINARY = 1000
"""The first token of MiniLM that is a word or a part of one."""
PROMPT, DECODED = 64, 16
"""Tokens that a decoder has read, and then those of a call, one after the other."""


@dataclass(frozen=True)
class Model:
    """What all rows share."""

    quick: bool = True

    suite, group = "models", "models"
    dtype = precision = "float32"
    unit, limit = "GFLOP/s", "peak"
    tolerance = 1e-4
    """Errors grow from layer to layer."""

    def at_limit(self, inputs: Any, threads: int) -> float:
        """Seconds that the products would take at the processor's rate, measured now."""
        from . import roofline

        return self.work / roofline.product_peak(self.precision, threads, repeats=3)  # type: ignore[attr-defined, no-any-return]


def layers_work(lengths: list[int], layers: int, d: int) -> float:
    """Operations of an encoder whose hidden layers are four times as wide as d."""
    tokens, pairs = sum(lengths), sum(n * n for n in lengths)
    return layers * (24.0 * tokens * d * d + 4.0 * pairs * d)


@dataclass(frozen=True)
class Embed(Model):
    """One row: a batch of sentences to vectors, all of one length in tokens, or mixed where it is 0."""

    length: int = 0

    operation = "embed"

    @property
    def name(self) -> str:
        return f"MiniLM {SENTENCES} x {self.length or f'{SHORTEST} to {LONGEST}'} tokens"

    @property
    def lengths(self) -> list[int]:
        rng = np.random.default_rng(0)
        mixed = rng.integers(SHORTEST, LONGEST, SENTENCES, endpoint=True)
        return [self.length] * SENTENCES if self.length else mixed.tolist()

    @property
    def work(self) -> float:
        return layers_work(self.lengths, 6, 384)

    def inputs(self) -> list[list[int]]:
        """Sentences in tokens."""
        rng, model = np.random.default_rng(1), load_minilm()
        count = len(model.words.weight)
        return [rng.integers(ORDINARY, count, n).tolist() for n in self.lengths]

    def exact(self, inputs: list[list[int]]) -> tuple[Any, NDArray[Any]]:
        model = minilm.load(backend="reference")
        model.positions = model.positions.astype(np.float64)
        return ..., model.encode(inputs)

    def ours(self, inputs: list[list[int]]) -> Call:
        model = load_minilm()
        return Call(lambda: model.encode(inputs), np.asarray)


@dataclass(frozen=True)
class Listen(Model):
    """One row: Whisper's encoder of 30 s of sound."""

    name, operation = "Whisper encoder", "listen"

    @property
    def work(self) -> float:
        return layers_work([1500], 6, 512) + 6.0 * 512 * (3000 * 80 + 1500 * 512)

    def inputs(self) -> NDArray[np.float32]:
        return np.random.default_rng(0).standard_normal((80, 3000), np.float32)

    def exact(self, mel: NDArray[np.float32]) -> tuple[Any, NDArray[Any]]:
        return ..., whisper.load(backend="reference").encoded(mel.astype(np.float64))

    def ours(self, mel: NDArray[np.float32]) -> Call:
        model = load_whisper()
        return Call(lambda: model.encoded(mel), np.asarray)


@dataclass(frozen=True)
class Look(Model):
    """One row: the vision transformer's backbone and its saliency head."""

    name, operation = "ViT-S/14 saliency", "look"

    @property
    def work(self) -> float:
        """The head's convolutions are of 4 x 4 pixels, each to four times as many."""
        patches, widths = vit.ACROSS**2, vit.CHANNELS
        head = sum(32.0 * patches * 4**i * a * b for i, (a, b) in enumerate(itertools.pairwise(widths)))
        return layers_work([patches + 1], vit.LAYERS, vit.WIDTH) + 2.0 * patches * 588 * vit.WIDTH + head

    def inputs(self) -> NDArray[np.float32]:
        return np.random.default_rng(0).standard_normal((vit.SIDE, vit.SIDE, 3), np.float32)

    def exact(self, square: NDArray[np.float32]) -> tuple[Any, NDArray[Any]]:
        model = vit.load(backend="reference")
        return ..., model.saliency(model.features(square.astype(np.float64))[0])

    def ours(self, square: NDArray[np.float32]) -> Call:
        model = load_vit()
        return Call(lambda: model.saliency(model.features(square)[0]), np.asarray)


@dataclass(frozen=True)
class Write(Model):
    """One row: tokens of SmolLM2 one after the other, with weights of one dtype; the last one's logits."""

    dtype: str = "float32"  # type: ignore[misc]

    operation, unit, limit = "write", "GB/s", "read rate"

    @property
    def tolerance(self) -> float:  # type: ignore[override]
        return TOLERANCE[self.dtype] if self.dtype == "bfloat16" else Model.tolerance

    @property
    def name(self) -> str:
        return f"SmolLM2 {DECODED} tokens, {SHORT[self.dtype]}"

    @property
    def precision(self) -> str:  # type: ignore[override]
        return self.dtype

    @property
    def work(self) -> float:
        """Bytes: each weight is read once for each token."""
        layer = 576 * (2 * 576 + 2 * 192 + 3 * 1536)
        return DECODED * (30 * layer + 49152 * 576) * (2.0 if self.dtype == "bfloat16" else 4.0)

    def inputs(self) -> list[int]:
        return np.random.default_rng(0).integers(1000, 49000, PROMPT + DECODED).tolist()

    def exact(self, ids: list[int]) -> tuple[Any, NDArray[Any]]:
        model, _ = smollm2.load(backend="reference", cache_dtype="float64")
        table: Any = model.embedding
        model.embedding = lambda ids: table(ids).astype(np.float64)  # type: ignore[assignment, method-assign]
        return ..., model([ids])[0, -1]

    def ours(self, ids: list[int]) -> Call:
        model, _ = load_smollm2(weights_dtype=self.dtype)
        kept = model.new_cache(capacity=len(ids))
        model([ids[:PROMPT]], kept)

        def write() -> NDArray[np.float32]:
            for layer in kept:
                layer.truncate([PROMPT])
            for token in ids[PROMPT:]:
                logits = model([[token]], kept)
            return logits[0, -1]

        return Call(write, np.asarray)

    def at_limit(self, inputs: Any, threads: int) -> float:
        """Seconds that reading the weights takes at the memory's rate, measured now."""
        from . import roofline

        return self.work / roofline.read_rate(threads, READ_MEGABYTES, repeats=2)


def rows() -> list[Any]:
    """Every row, in the order of the table."""
    return [
        Embed(),
        *(Embed(length=n, quick=n == 24) for n in (12, 24, 128)),
        Listen(),
        Look(),
        *(Write(dtype=dtype) for dtype in ("float32", "bfloat16")),
    ]
