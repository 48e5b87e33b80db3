"""asv: whole models. Seconds to load and to run them; those whose weights are not installed are left out."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import numpy as np

from .suite import Suite

with suppress(ImportError):  # commits before these names have no results
    from nbattn import models
    from nbattn.models import sampling
    from nbattn.models.weights import Weights

# Each by itself: old commits have some of them.
with suppress(ImportError):
    from nbattn.models import e2k
with suppress(ImportError):
    from nbattn.models import minilm
with suppress(ImportError):
    from nbattn.models import sasrec
with suppress(ImportError):
    from nbattn.models import pictures, vit
with suppress(ImportError):
    from nbattn.models import audio, whisper

TEXT = "Alice was beginning to get very tired of sitting by her sister on the bank"
SENTENCES = [TEXT, "A cat sleeps.", "A kitten naps on the red mat of the house.", "Taxes rise."] * 4
TOKENS = 16


class _Writer(Suite):
    """A decoder: a prompt at once, and what it writes after it."""

    name: str

    def setup(self) -> None:
        if self.name not in models.MODELS:
            raise NotImplementedError
        self.decoder, self.tokenizer = models.load(self.name)
        self.prompt = self.tokenizer.encode(TEXT)
        self.time_generate()

    def time_load(self) -> None:
        models.load(self.name)

    def time_encode(self) -> None:
        self.tokenizer.encode(TEXT)

    def time_decode(self) -> None:
        self.tokenizer.decode(self.prompt)

    def time_prompt(self) -> None:
        self.decoder([self.prompt])

    def time_generate(self) -> None:
        for _ in self.decoder.generate(self.prompt, TOKENS):
            pass


class GlassLLM(_Writer):
    name = "glassllm"


class SmolLM2(_Writer):
    name = "smollm2"


def folder_of(suite: Suite) -> Path:
    """A temporary folder that lasts as long as the suite."""
    folder = tempfile.mkdtemp()
    weakref.finalize(suite, shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


class Sampling(Suite):
    def setup(self) -> None:
        self.rng = np.random.default_rng(0)
        self.logits = self.rng.standard_normal(50_000, np.float32)
        self.time_next_token()

    def time_next_token(self) -> None:
        sampling.next_token(self.logits, 0.8, 0.9, self.rng)


class Letters(Suite):
    """e2k: a word in Katakana."""

    def setup(self) -> None:
        self.model = e2k.load()
        self.time_word()

    def time_load(self) -> None:
        e2k.load()

    def time_word(self) -> None:
        self.model("television")


class Sentences(Suite):
    """MiniLM: vectors of sentences."""

    def setup(self) -> None:
        self.model = minilm.load()
        self.time_sentences()

    def time_load(self) -> None:
        minilm.load()

    def time_sentences(self) -> None:
        self.model(SENTENCES)


class Pictures(Suite):
    """ViT-S/14: a photograph, and what is done to it before."""

    def setup(self) -> None:
        self.model = vit.load()
        self.picture = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
        self.time_look()

    def time_load(self) -> None:
        vit.load()

    def time_look(self) -> None:
        self.model(self.picture)

    def time_framed(self) -> None:
        pictures.framed(self.picture, 224)


class Sound(Suite):
    """Whisper's picture of 30 s of sound."""

    def setup(self) -> None:
        self.sound = np.random.default_rng(0).standard_normal(30 * 16_000, np.float32)
        self.time_log_mel()

    def time_log_mel(self) -> None:
        audio.log_mel(self.sound)


class Speech(Suite):
    """Whisper base: 30 s of sound, and a token of what is said in it."""

    def setup(self) -> None:
        self.model = whisper.load()
        self.sound = np.random.default_rng(0).standard_normal(30 * 16_000, np.float32) / np.float32(10)
        self.memory = self.model.memory(self.model.encode(self.sound))
        self.cache = self.model.new_cache()
        self.time_token()

    def time_load(self) -> None:
        whisper.load()

    def time_encode(self) -> None:
        self.model.encode(self.sound)

    def time_token(self) -> None:
        for layer in self.cache:
            layer.reset()
        self.model.decode([self.model.start], self.memory, self.cache)


class Recommender(Suite):
    """SASRec as it is trained, with random numbers for weights: what it costs is the same."""

    FILMS, D, HIDDEN, LENGTH, LAYERS = 1682, 64, 256, 50, 2

    def setup(self) -> None:
        rng, d, hidden = np.random.default_rng(0), self.D, self.HIDDEN
        shapes = {"films.weight": (self.FILMS, d), "places.weight": (self.LENGTH, d)}
        shapes |= {"encoder.norm.weight": (d,), "encoder.norm.bias": (d,)}
        for i in range(self.LAYERS):
            shapes |= {
                f"encoder.layers.{i}.{name}": shape
                for name, shape in {
                    "self_attn.in_proj_weight": (3 * d, d), "self_attn.in_proj_bias": (3 * d,),
                    "self_attn.out_proj.weight": (d, d), "self_attn.out_proj.bias": (d,),
                    "linear1.weight": (hidden, d), "linear1.bias": (hidden,),
                    "linear2.weight": (d, hidden), "linear2.bias": (d,),
                    "norm1.weight": (d,), "norm1.bias": (d,), "norm2.weight": (d,), "norm2.bias": (d,),
                }.items()
            }  # fmt: skip
        metrics = {name: dict.fromkeys(sasrec.MEASURES, 0.0) for name in ("SASRec", "popularity")}
        config = json.dumps({"layers": self.LAYERS, "heads": 2, "metrics": metrics})
        weights = {name: rng.standard_normal(shape, np.float32) / 8 for name, shape in shapes.items()}
        self.folder = folder_of(self)
        np.savez(self.folder / sasrec.FILE, config=np.array(config), **weights)
        titles = [str(i) for i in range(self.FILMS)]
        self.films = sasrec.Films(titles, titles, [])
        self.model = sasrec.load(self.films, self.folder)
        self.histories = [rng.choice(self.FILMS, 60, replace=False) for _ in range(64)]
        self.time_scores()

    def time_load(self) -> None:
        sasrec.load(self.films, self.folder)

    def time_scores(self) -> None:
        self.model(self.histories)

    def time_recommend(self) -> None:
        self.model.recommend(self.histories[0])


class Files(Suite):
    """A matrix of 4 MB out of a file."""

    params = ("npz", "safetensors")
    param_names = ("kind",)

    def setup(self, kind: str) -> None:
        if kind == "safetensors":
            import_module("nbattn.models.safetensors")
        self.path = folder_of(self) / f"weights.{kind}"
        x = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
        if kind == "npz":
            np.savez(self.path, x=x)
        else:
            entry = {"x": {"dtype": "F32", "shape": x.shape, "data_offsets": [0, x.nbytes]}}
            head = json.dumps(entry).encode()
            head += b" " * (-len(head) % 8)
            self.path.write_bytes(len(head).to_bytes(8, "little") + head + x.tobytes())
        self.time_tensor(kind)

    def time_tensor(self, kind: str) -> None:
        Weights(self.path).tensor("x", (1024, 1024))
