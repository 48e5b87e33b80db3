"""SASRec: the film that a user may rate next, by causal attention over the films rated so far.

`nbattn.models.train.sasrec` trains it on MovieLens 100k, which is read inside the installed package recbole.
Each user's last film is held out and the one before it chose the best epoch; neither was trained on.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..attention import AttentionOutput
from ..layers import Embedding, FeedForward, Linear, MultiHeadAttention
from .parts import layer_norm, linear
from .weights import Weights, package_folder

DATASET, FILE = "ml-100k", "sasrec-ml-100k.npz"
ITEM = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
TRAIN = "python -m nbattn.models.train.sasrec"
BEST = 10
"""How many films are recommended, and within how many the held-out one is a hit."""
SHOWN, PLOTTED = 10, 30
"""How many of a user's last films are listed, and drawn."""

MEASURES = "hit rate at 10", "NDCG at 10"
EPS = 1e-5
"""PyTorch's, in a LayerNorm."""
BATCH = 128
"""So many histories are scored at once."""
Histories = Sequence[NDArray[np.int64]]
"""Numbers of films, counted from 0, in the order of rating."""


@dataclass(frozen=True, eq=False)
class Films:
    """Titles, genres, and the films of each user in the order of rating.

    Attributes
    ----------
    titles, genres : list of str
    histories : list of ndarray of int64
        Of user 1, user 2 and so on.
    """

    titles: list[str]
    genres: list[str]
    histories: list[NDArray[np.int64]]

    def history(self, user: str) -> NDArray[np.int64]:
        """All films of a user, whose number is text; ValueError for an unknown one."""
        known = user.isascii() and user.isdigit() and len(user) < 20
        if not (known and 1 <= int(user) <= len(self.histories)):
            msg = f"the user is {user[:80]!r}; expected a number from 1 to {len(self.histories)}"
            raise ValueError(msg)
        return self.histories[int(user) - 1]


def read_films(folder: str | PathLike[str] | None = None) -> Films:
    """MovieLens 100k, as RecBole lays it out, from a folder or from the installed package.

    Raises
    ------
    ModuleNotFoundError
        Where the package is not installed.
    OSError, ValueError
        For a file that is missing or damaged; the message names it.

    References
    ----------
    Harper and Konstan, "The MovieLens Datasets", 2015, https://doi.org/10.1145/2827872.
    """
    base = package_folder("recbole") / "dataset_example" / DATASET if folder is None else Path(folder)
    path = base / f"{DATASET}.item"
    try:
        rows = [line.split("\t") for line in _lines(path, ITEM)]
        names = {int(number): (f"{title} ({year})", genres) for number, title, year, genres in rows}
        path = base / f"{DATASET}.inter"
        users, films, times = np.loadtxt(_lines(path, INTER), np.int64, usecols=(0, 1, 3)).T
        # Films of one second stay as the file has them, which is in no order: their numbers would tell more
        # than a recommender can know.
        order = np.lexsort((times, users))
        counts = np.bincount(users)[1:]
        if [*names] != [*range(1, len(names) + 1)] or films.min() < 1 or films.max() > len(names):
            msg = "its numbers of films have gaps"
            raise ValueError(msg)
        if users.min() < 1 or counts.min() < 3:
            msg = "a user has less than three films"
            raise ValueError(msg)
    except ValueError as error:
        msg = f"{path} is not as expected ({str(error).splitlines()[0]}); install its package again"
        raise ValueError(msg) from error
    histories = np.split(films[order] - 1, np.cumsum(counts)[:-1])
    titles, genres = (list(column) for column in zip(*names.values(), strict=True))
    return Films(titles, genres, histories)


def _lines(path: Path, head: str) -> list[str]:
    first, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
    if first != head or not lines:
        msg = f"it begins with {first[:80]!a}"
        raise ValueError(msg)
    return lines


@dataclass(frozen=True, eq=False)
class Recommendation:
    """Which films a user may rate next, and which of those rated the model looked at.

    Attributes
    ----------
    rated : ndarray of int64, shape (S,)
        The films that the model saw, oldest first.
    weights : ndarray of float32, shape (layers, heads, S)
        The attention that each of them got from the last one.
    best : ndarray of int64, shape (10,)
        Films not rated so far, the fittest first; fewer where no more are left.
    scores : ndarray of float32, shape (10,)
    """

    rated: NDArray[np.int64]
    weights: NDArray[np.float32]
    best: NDArray[np.int64]
    scores: NDArray[np.float32]


class SASRec:
    """The recommender: embeddings, blocks that are normalised before, and scores by the embeddings again.

    Parameters
    ----------
    weights : Weights
        The opened file, named as PyTorch's ``TransformerEncoder`` names them.
    films : int
    backend : {None, "cpu", "reference"}
        Of the attention and of the products.

    Attributes
    ----------
    metrics : dict
        What `held_out` gives for this model and for `popularity`, as the training left it.

    Raises
    ------
    ValueError
        For a file that does not fit; the message names it.

    References
    ----------
    Kang and McAuley, "Self-Attentive Sequential Recommendation", 2018, https://arxiv.org/abs/1808.09781.
    """

    def __init__(self, weights: Weights, films: int, backend: str | None = None) -> None:
        self.config = weights.json("config")
        self.metrics = {
            name: {measure: float(values[measure]) for measure in MEASURES}
            for name, values in self.config["metrics"].items()
        }
        layers = self.config["layers"]
        if type(layers) is not int or layers < 1:
            msg = f"{weights.path} has {layers!a} layers; expected at least one"
            raise ValueError(msg)
        self.length, d = weights.shape("places.weight", 2)
        table = weights.tensor("films.weight", (films, d))
        self.films, self.head = Embedding(table), Linear(table, backend=backend)
        self.places = weights.tensor("places.weight", (self.length, d))

        self.blocks = []
        for i in range(layers):
            name = f"encoder.layers.{i}"
            parts = {"in_proj_weight": (3 * d, d), "in_proj_bias": (3 * d,), "out_proj.weight": (d, d),
                     "out_proj.bias": (d,)}  # fmt: skip
            state = {part: weights.tensor(f"{name}.self_attn.{part}", size) for part, size in parts.items()}
            (hidden,) = weights.shape(f"{name}.linear1.bias", 1)
            up = linear(weights, f"{name}.linear1", hidden, d, backend)
            down = linear(weights, f"{name}.linear2", d, hidden, backend)
            attention = MultiHeadAttention.from_torch(state, self.config["heads"], backend=backend)
            feed_forward = FeedForward(up, down, "relu")
            norm1, norm2 = (layer_norm(weights, f"{name}.norm{n}", d, EPS, backend) for n in (1, 2))
            self.blocks.append((norm1, attention, norm2, feed_forward))
        self.norm = layer_norm(weights, "encoder.norm", d, EPS, backend)

    def __call__(self, histories: Histories) -> NDArray[np.float32]:
        """How fit each film is to follow each history: ``(histories, films)``."""
        return self._scores(histories, None)

    def recommend(self, history: NDArray[np.int64]) -> Recommendation:
        """The films that fit best after a history, as `Films.history` gives it."""
        seen: list[NDArray[np.float32]] = []
        scores = self._scores([history], seen)[0]
        scores[history] = -np.inf
        best = np.argsort(-scores, kind="stable")[:BEST]
        best = best[np.isfinite(scores[best])]
        return Recommendation(history[-self.length :], np.array(seen), best, scores[best])

    def _scores(self, histories: Histories, seen: list[NDArray[np.float32]] | None) -> NDArray[np.float32]:
        ids, places, last = padded(histories, self.length)
        x: Any = self.films(ids) * np.float32(math.sqrt(self.places.shape[1])) + self.places[places]
        for norm1, attention, norm2, feed_forward in self.blocks:
            # What fills a row up comes after its last film, which therefore does not see it.
            x = attention(norm1(x), is_causal=True, return_weights=seen is not None, plus=x)
            if seen is not None:
                x, weights, _ = cast(AttentionOutput, x)
                seen.append(cast(NDArray[np.float32], weights)[0, :, -1])
            x = feed_forward(norm2(x), plus=x)
        return self.head(self.norm(x[np.arange(len(x)), last]))


def padded(histories: Histories, length: int) -> tuple[NDArray[np.int64], ...]:
    """The ends of histories as the model reads them: films and places ``(B, S)``, and who is last ``(B,)``.

    Places count back from the last film, which has the highest; rows are filled up behind it.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.models.sasrec import padded
    >>> films, places, last = padded([np.array([7, 8]), np.array([3, 4, 5, 6])], length=3)
    >>> films.tolist(), places.tolist(), last.tolist()
    ([[7, 8, 0], [4, 5, 6]], [[1, 2, 2], [0, 1, 2]], [1, 2])
    """
    ends = [history[-length:] for history in histories]
    last = np.array([len(end) - 1 for end in ends])
    films = np.zeros((len(ends), last.max() + 1), np.int64)
    for row, end in zip(films, ends, strict=True):
        row[: len(end)] = end
    places = np.minimum(length - 1 - last[:, None] + np.arange(films.shape[1]), length - 1)
    return films, places, last


def ranks(scores: NDArray[Any], histories: Histories, held_out: ArrayLike) -> NDArray[np.int64]:
    """How many films that are not in a user's history score higher than the one held out.

    Of films that score the same, those of lower numbers come first.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.models.sasrec import ranks
    >>> ranks(np.array([[9.0, 8.0, 7.0, 7.0]]), [np.array([0])], [3])
    array([2])
    """
    target = np.asarray(held_out)[:, None]
    own = np.take_along_axis(scores, target, axis=1)
    before = (scores > own) | ((scores == own) & (np.arange(scores.shape[1]) < target))
    for row, history in zip(before, histories, strict=True):
        row[history] = False
    return before.sum(axis=1)


def measures(places: NDArray[np.int64]) -> dict[str, float]:
    """Hit rate at 10 and NDCG at 10 of one film held out for each user, from what `ranks` gives.

    References
    ----------
    Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques", 2002,
    https://doi.org/10.1145/582415.582418.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.models.sasrec import measures
    >>> measures(np.array([0, 2, 10, 99]))
    {'hit rate at 10': 0.5, 'NDCG at 10': 0.375}
    """
    hits = places < BEST
    return dict(zip(MEASURES, map(float, (hits.mean(), (hits / np.log2(places + 2)).mean())), strict=True))


def held_out(score: Callable[[Histories], NDArray[Any]], films: Films, last: int = 1) -> dict[str, float]:
    """The measures of a recommender on each user's film in this place from the end."""
    histories = [history[:-last] for history in films.histories]
    targets = [history[-last] for history in films.histories]
    batches = [slice(i, i + BATCH) for i in range(0, len(histories), BATCH)]
    return measures(np.concatenate([ranks(score(histories[b]), histories[b], targets[b]) for b in batches]))


def popularity(films: Films) -> Callable[[Histories], NDArray[np.int64]]:
    """The recommender to beat: what most users have rated, the two held-out films of each left out."""
    rated = np.concatenate([history[:-2] for history in films.histories])
    counts = np.bincount(rated, minlength=len(films.titles))
    return lambda histories: np.tile(counts, (len(histories), 1))


def weight_file(folder: str | PathLike[str] | None = None) -> Path:
    """Where the trained weights are: in this folder, or in the user's cache; OSError if there is none."""
    if folder is None:
        from ..cpu.runtime import cache_folder

        kernels = cache_folder()
        if kernels is None:
            msg = "no cache folder is writable; name one by --weights"
            raise OSError(msg)
        # Beside the kernels' folder, whose name changes with every release.
        folder = kernels.parent
    return Path(folder) / FILE


def load(films: Films, folder: str | PathLike[str] | None = None, backend: str | None = None) -> SASRec:
    """The trained model, from a folder or from the user's cache.

    Raises
    ------
    FileNotFoundError
        Where it has not been trained yet; the message holds the command that does.
    OSError, ValueError
        For a file that cannot be read, is damaged or does not fit; the message names it.

    Examples
    --------
    >>> from nbattn.models import sasrec
    >>> films = sasrec.Films([], [], [])
    >>> sasrec.load(films, "no/such/folder")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    FileNotFoundError: ... is not trained yet; python -m nbattn.models.train.sasrec --weights no/such/folder
    """
    path = weight_file(folder)
    command = TRAIN if folder is None else f"{TRAIN} --weights {shlex.quote(str(folder))}"
    if not path.exists():
        msg = f"{path} is missing, as the recommender is not trained yet; {command}"
        raise FileNotFoundError(msg)
    try:
        return SASRec(Weights(path), len(films.titles), backend)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        msg = f"{path} is damaged or of another version; train it again: {command}"
        raise ValueError(msg) from error


def table(films: Films, answer: Recommendation) -> str:
    """A recommendation as text; attention in percent, as a mean over layers and heads.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.models.sasrec import Films, Recommendation, table
    >>> films = Films(["Alien (1979)", "Big (1988)", "Cube (1997)"], ["Horror", "Comedy", "Sci-Fi"], [])
    >>> weights = np.array([[[0.25, 0.75]]])
    >>> print(table(films, Recommendation(np.array([1, 0]), weights, np.array([2]), np.array([3.5]))))
    rated last, and the attention it got
     25 %  Big (1988)    Comedy
     75 %  Alien (1979)  Horror
    <BLANKLINE>
    recommended
        1  Cube (1997)   Sci-Fi
    """
    shares = 100 * answer.weights.mean(axis=(0, 1))
    rated = [(f"{n:3.0f} %", i) for n, i in zip(shares, answer.rated, strict=True)][-SHOWN:]
    best = [(f"{n:5}", i) for n, i in enumerate(answer.best, 1)]
    width = max(len(films.titles[i]) for _, i in rated + best)
    lines = [f"{label}  {films.titles[i]:{width}}  {films.genres[i]}" for label, i in rated + best]
    before = len(shares) - len(rated)
    if before:
        lines.insert(len(rated), f"{shares[:before].sum():3.0f} %  {before} films before these")
    lines.insert(len(lines) - len(best), "\nrecommended")
    return "\n".join(["rated last, and the attention it got", *lines])


def measured(metrics: dict[str, dict[str, float]]) -> str:
    """What `held_out` gave for some recommenders, as text.

    Examples
    --------
    >>> from nbattn.models.sasrec import measured
    >>> print(measured({"popularity": {"hit rate at 10": 0.25, "NDCG at 10": 0.125}}))
    last films held out  hit rate at 10  NDCG at 10
    popularity                    0.250       0.125
    """
    lines = [f"last films held out  {'  '.join(MEASURES)}"]
    for name, values in metrics.items():
        lines.append(f"{name:19}" + "".join(f"  {values[m]:{len(m)}.3f}" for m in MEASURES))
    return "\n".join(lines)


def last_heads(films: Films, answer: Recommendation) -> tuple[NDArray[np.float32], list[str], list[str]]:
    """The attention that each of the last 30 films got from each head, and the labels of both."""
    layers, heads, _ = answer.weights.shape
    last = answer.weights[..., -PLOTTED:].reshape(layers * heads, -1).T
    columns = [f"{layer}.{head}" for layer in range(1, layers + 1) for head in range(1, heads + 1)]
    return last, [films.titles[i] for i in answer.rated[-PLOTTED:]], columns


def fields(films: Films, answer: Recommendation) -> dict[str, Any]:
    """A recommendation for JSON, with the attention ``[layer][head]`` that each film got."""

    def film(i: int) -> dict[str, Any]:
        return {"title": films.titles[i], "genres": films.genres[i]}

    heads = np.moveaxis(answer.weights, -1, 0).astype(float).round(6).tolist()
    rated = [{**film(i), "attention": w} for i, w in zip(answer.rated, heads, strict=True)]
    best = [
        {**film(i), "score": round(float(score), 6)}
        for i, score in zip(answer.best, answer.scores, strict=True)
    ]
    return {"rated": rated, "recommended": best}
