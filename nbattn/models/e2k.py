"""e2k: an English word to Katakana, by a recurrent encoder and decoder with attention at every output step.

Weights ship inside the package of that name (Unlicense), which is not imported. Two GRUs read the letters
from both ends; one more makes the queries of 4-head attention over what they read, and a last one the output.
Which letters each output looks at is the alignment of the two words.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from ..attention import AttentionOutput
from ..layers import GRU, Embedding, GRUCell, MultiHeadAttention
from .parts import linear
from .weights import Weights, package_folder

HEADS = 4
MOST_LETTERS = 64
MOST_KANA = 16
"""Where e2k itself stops."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """A word, what became of it, and where the model looked for each step.

    Attributes
    ----------
    letters : list of str
        What the encoder reads: the word in lower case between "^" and "$", its begin and its end.
    kana : list of str
        The output's steps; the last one is "$" unless the output was cut off.
    weights : ndarray of float32, shape (heads, steps, letters)
        The attention of each step over the letters.
    """

    letters: list[str]
    kana: list[str]
    weights: NDArray[np.float32]

    @property
    def katakana(self) -> str:
        """The output as text."""
        return "".join(kana for kana in self.kana if kana != "$")


class E2K:
    """The encoder and decoder.

    Parameters
    ----------
    weights : Weights
        The opened ``model-c2k.safetensors`` or ``model-c2k-turbo.safetensors``.
    backend : {None, "cpu", "reference"}
        Of the attention and of the products.

    Raises
    ------
    ValueError
        For a file that does not fit; the message names it.

    Examples
    --------
    >>> from nbattn.models import e2k
    >>> model = e2k.load(backend="reference")  # doctest: +SKIP
    >>> model("sphinx").katakana  # doctest: +SKIP
    'スフィンクス'
    """

    def __init__(self, weights: Weights, backend: str | None = None) -> None:
        self.path = weights.path
        self._symbols, self.outputs = (self._table(weights, name) for name in ("in_table", "out_table"))
        self._sos, self._eos = (self._number(weights, name) for name in ("sos_idx", "eos_idx"))
        self.letters = {letter: i for i, letter in enumerate(self._symbols) if i > max(self._sos, self._eos)}
        _, d = weights.shape("e_emb.weight", 2)

        def gru(name: str, d_in: int, suffix: str = "") -> GRU:
            shapes = {
                "weight_ih": (3 * d, d_in),
                "weight_hh": (3 * d, d),
                "bias_ih": (3 * d,),
                "bias_hh": (3 * d,),
            }
            parts = [weights.tensor(f"{name}.{part}_l0{suffix}", shape) for part, shape in shapes.items()]
            return GRU(GRUCell(*parts, backend=backend), reverse=bool(suffix))

        self.source = Embedding(weights.tensor("e_emb.weight", (len(self._symbols), d)))
        self.target = Embedding(weights.tensor("k_emb.weight", (len(self.outputs), d)))
        self.encoders = gru("encoder", d), gru("encoder", d, "_reverse")
        self.join = linear(weights, "encoder_fc.0", d, 2 * d, backend)
        self.asking, self.answering = gru("pre_decoder", d), gru("post_decoder", 2 * d)
        shapes = {
            "in_proj_weight": (3 * d, d), "in_proj_bias": (3 * d,),
            "out_proj.weight": (d, d), "out_proj.bias": (d,),
        }  # fmt: skip
        state = {name: weights.tensor(f"attn.{name}", shape) for name, shape in shapes.items()}
        self.attention = MultiHeadAttention.from_torch(state, HEADS, backend=backend)
        self.head = linear(weights, "fc", len(self.outputs), d, backend)

    def __call__(self, word: str) -> Alignment:
        """The likeliest Katakana of a word, letter by letter.

        Parameters
        ----------
        word : str
            1 to 64 English letters, apostrophes and spaces.

        Raises
        ------
        ValueError
            For any other word.
        """
        letters = list(self._check(word))
        ids = [self._sos, *(self.letters[letter] for letter in letters), self._eos]
        read = self.source(ids)
        states = np.concatenate([encoder(read)[0] for encoder in self.encoders], axis=-1)
        memory = self.attention.project(np.tanh(self.join(states)))
        asking = answering = None
        steps, seen = [self._sos], []
        while len(steps) <= MOST_KANA and (len(steps) == 1 or steps[-1] != self._eos):
            asking = self.asking.cell(self.target(steps[-1:]), asking)
            result = cast(AttentionOutput, self.attention(asking, memory=memory, return_weights=True))
            seen.append(cast(NDArray[np.float32], result.weights))
            both = np.concatenate([asking, result.output], axis=-1)
            answering = self.answering.cell(both, answering)
            steps.append(int(np.argmax(self.head(answering)[0])))
        kana = ["$" if step == self._eos else self.outputs[step] for step in steps[1:]]
        return Alignment(["^", *letters, "$"], kana, np.concatenate(seen, axis=1))

    def _check(self, word: str) -> str:
        text = word.lower()
        if not text.strip():
            msg = "the word is empty; give at least one letter"
            raise ValueError(msg)
        for letter in text:
            if letter not in self.letters:
                msg = f"the word has {letter!r}; expected English letters, apostrophes and spaces"
                raise ValueError(msg)
        if len(text) > MOST_LETTERS:
            msg = f"the word has {len(text)} letters; expected at most {MOST_LETTERS}"
            raise ValueError(msg)
        return text

    def _table(self, weights: Weights, name: str) -> list[str]:
        table = weights.metadata.get(name, "").split("\0")
        if len(table) < 4 or len(set(table)) < len(table):
            msg = f"{weights.path} is no e2k model: its {name} is {table!r}"
            raise ValueError(msg)
        return table

    def _number(self, weights: Weights, name: str) -> int:
        text = weights.metadata.get(name, "")
        if not (text.isascii() and text.isdigit()) or int(text) >= min(len(self._symbols), len(self.outputs)):
            msg = f"{weights.path} is no e2k model: its {name} is {text!r}"
            raise ValueError(msg)
        return int(text)


def load(folder: str | PathLike[str] | None = None, backend: str | None = None) -> E2K:
    """The model from a folder or from the installed package.

    Raises
    ------
    ModuleNotFoundError
        Where the package that ships the weights is not installed.
    OSError, ValueError
        For a weight file that is missing, damaged or does not fit; the message names the file.

    Examples
    --------
    >>> from nbattn.models import e2k
    >>> e2k.load("no/such/folder")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    FileNotFoundError: cannot read the weight file no/such/folder/model-c2k.safetensors: No such file or ...
    """
    base = package_folder("e2k") / "models" if folder is None else Path(folder)
    return E2K(Weights(base / "model-c2k.safetensors"), backend)


def table(alignment: Alignment) -> str:
    """The alignment as text: a row for each step, the share of its attention that each letter got in percent.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.models.e2k import Alignment, table
    >>> print(table(Alignment(["^", "a", "$"], ["ア", "$"], np.array([[[0, 1, 0], [0.25, 0.25, 0.5]]]))))
         ^   a   $
    ア   · 100   ·
    $   25  25  50
    """
    shares = np.rint(100 * alignment.weights.mean(axis=0)).astype(int)
    lines = ["  " + "".join(f"{letter:>4}" for letter in alignment.letters)]
    for kana, row in zip(alignment.kana, shares, strict=True):
        # A kana is as wide as two letters.
        label = kana if kana != "$" else "$ "
        lines.append(label + "".join(f"{share or '·':>4}" for share in row))
    return "\n".join(lines)
