"""The variants in `peers.py`: users' functions, block masks, additive, Luong, hard and linear attention.

Work is what a row cannot do without: that of the pairs which are seen, in linear attention of the state.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import nbattn
from nbattn import masks

from .cases import EXACT_ROWS, SOFTCAP, WINDOW, Call

FEATURES = ("plain", "alibi", "softcap", "relative", "causal", "document", "window")
DOCUMENT = 300
"""Tokens of each of the documents that share a sequence."""
BLOCK = 64
DENSE_BLOCKS = 0.1
"""Which part of the blocks of a sparse row is seen."""
CHUNK = 64
"""Tokens of a chunk of linear attention, where it goes by chunks."""


@dataclass(frozen=True)
class Variant:
    """What all rows share: float32, a batch of one, heads that are as wide as their values."""

    heads: int
    length: int
    head_dim: int = 64
    quick: bool = True

    suite = "variants"
    dtype = precision = "float32"
    unit, limit = "GFLOP/s", "peak"

    @property
    def shape(self) -> str:
        return f"{self.heads}x{self.length}x{self.head_dim}"

    @property
    def group(self) -> str:
        """What it is averaged with."""
        return self.operation  # type: ignore[attr-defined, no-any-return]

    def normal(self, count: int = 3) -> list[NDArray[Any]]:
        rng = np.random.default_rng(0)
        shape = (1, self.heads, self.length, self.head_dim)
        return [rng.standard_normal(shape, np.float32) for _ in range(count)]

    @property
    def rows(self) -> NDArray[np.int64]:
        """The queries that are computed in float64, the last one among them."""
        return np.linspace(0, self.length - 1, min(EXACT_ROWS, self.length)).astype(int)

    def beside(self, inputs: Any) -> dict[str, Call]:
        return {}

    def at_limit(self, inputs: Any, threads: int) -> float:
        """Seconds that the work would take at the processor's rate, measured now."""
        from . import roofline

        return self.work / roofline.product_peak(self.precision, threads, repeats=3)  # type: ignore[attr-defined, no-any-return]


def softmax(scores: NDArray[Any]) -> NDArray[Any]:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


# --- a user's function, and block masks ---------------------------------------------------------------------


class ModInputs(NamedTuple):
    query: NDArray[Any]  # (1, H, S, D)
    key: NDArray[Any]
    value: NDArray[Any]
    extra: NDArray[Any]  # slopes (H,), or a bias for each distance (2 * S - 1,), or documents (S,)


def plain(score: Any, batch: Any, head: Any, q_index: Any, kv_index: Any) -> Any:
    return score


def alibi(score: Any, batch: Any, head: Any, q_index: Any, kv_index: Any, slopes: Any) -> Any:
    return score + slopes[head] * (kv_index - q_index)


def capped(score: Any, batch: Any, head: Any, q_index: Any, kv_index: Any) -> Any:
    return SOFTCAP * np.tanh(score / SOFTCAP)


def relative(score: Any, batch: Any, head: Any, q_index: Any, kv_index: Any, table: Any) -> Any:
    return score + table[kv_index - q_index + len(table) // 2]


@dataclass(frozen=True)
class Modified(Variant):
    """A score_mod, or for what hides keys a BlockMask, beside the argument of this library that means it."""

    feature: str = "plain"

    operation = "modified"
    group = "score_mod"

    @property
    def name(self) -> str:
        return f"{self.shape} {self.feature}"

    @property
    def work(self) -> float:
        each = np.arange(1, self.length + 1)
        pairs = {
            "causal": each.sum(),
            "window": np.minimum(each, WINDOW).sum(),
            "document": (np.bincount((each - 1) // DOCUMENT) ** 2).sum(),
        }.get(self.feature, self.length**2)
        return 4 * self.heads * self.head_dim * float(pairs)

    def inputs(self) -> ModInputs:
        rng = np.random.default_rng(1)
        extra = {
            "alibi": lambda: 2.0 ** -np.arange(5, self.heads + 5, dtype=np.float32),
            "relative": lambda: rng.standard_normal(2 * self.length - 1, np.float32),
            "document": lambda: np.arange(self.length) // DOCUMENT,
        }.get(self.feature, lambda: np.zeros(0, np.float32))()
        return ModInputs(*self.normal(), extra)

    def exact(self, inputs: ModInputs) -> tuple[Any, NDArray[Any]]:
        i, j = self.rows[:, None], np.arange(self.length)
        q, k, v = (x[0].astype(np.float64) for x in inputs[:3])
        scores = q[:, self.rows] @ k.swapaxes(1, 2) / np.sqrt(self.head_dim)
        extra = inputs.extra
        if self.feature == "softcap":
            scores = SOFTCAP * np.tanh(scores / SOFTCAP)
        elif self.feature == "alibi":
            scores += extra[:, None, None].astype(np.float64) * (j - i)
        elif self.feature == "relative":
            scores += extra[j - i + self.length - 1]
        if self.feature in ("causal", "window"):
            scores[:, j > i] = -np.inf
        if self.feature == "window":
            scores[:, i - j >= WINDOW] = -np.inf
        if self.feature == "document":
            scores[:, extra[i] != extra[j]] = -np.inf
        return np.s_[:, :, self.rows], (softmax(scores) @ v)[None]

    def ours(self, inputs: ModInputs, **options: Any) -> Call:
        n, extra = self.length, inputs.extra
        options |= {
            "plain": lambda: {"score_mod": plain},
            "alibi": lambda: {"score_mod": alibi, "mod_args": (extra,)},
            "softcap": lambda: {"score_mod": capped},
            "relative": lambda: {"score_mod": relative, "mod_args": (extra,)},
            "causal": lambda: {"mask": masks.causal(n)},
            "window": lambda: {"mask": masks.sliding_window(n, left=WINDOW - 1, right=0)},
            "document": lambda: {"mask": masks.document(extra)},
        }[self.feature]()
        return Call(partial(nbattn.scaled_dot_product_attention, *inputs[:3], **options), np.asarray)

    def beside(self, inputs: ModInputs) -> dict[str, Call]:
        extra, n = inputs.extra, self.length
        distance = np.arange(n) - np.arange(n)[:, None]
        options: dict[str, Any] = {
            "plain": dict,
            "alibi": lambda: {"alibi_slopes": extra},
            "softcap": lambda: {"softcap": SOFTCAP},
            "relative": lambda: {"bias": extra[distance + n - 1]},
            "causal": lambda: {"is_causal": True},
            "window": lambda: {"is_causal": True, "window_size": (WINDOW - 1, 0)},
            "document": lambda: {"mask": extra[:, None] == extra},
        }[self.feature]()
        label = f"nbattn {[*options, 'without it'][max(len(options) - 1, 0)]}"
        return {label: Call(partial(nbattn.scaled_dot_product_attention, *inputs[:3], **options), np.asarray)}


@dataclass(frozen=True)
class Sparse(Variant):
    """A BlockMask of random blocks, or of a window, beside attention to everything."""

    window: bool = False

    operation = group = "sparse"

    @property
    def name(self) -> str:
        return f"{self.shape} " + (f"window {WINDOW}" if self.window else f"blocks {DENSE_BLOCKS:.0%}")

    @cached_property
    def blocks(self) -> NDArray[np.bool_]:
        """Which blocks of random ones are seen; each query sees its own."""
        n = self.length // BLOCK
        seen = np.random.default_rng(2).random((n, n))
        np.fill_diagonal(seen, 0)
        return np.argsort(np.argsort(seen, axis=1), axis=1) < max(1, round(DENSE_BLOCKS * n))

    @property
    def mask(self) -> nbattn.BlockMask:
        if self.window:
            return masks.sliding_window(self.length, left=WINDOW - 1, right=0)
        from scipy.sparse import bsr_array

        starts = np.concatenate(([0], self.blocks.sum(axis=1).cumsum()))
        ones = np.ones((starts[-1], BLOCK, BLOCK), bool)
        matrix = bsr_array((ones, self.blocks.nonzero()[1], starts), shape=(self.length, self.length))
        return nbattn.BlockMask.from_sparse(matrix)

    def seen(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        i, j = rows[:, None], np.arange(self.length)
        return (j <= i) & (i - j < WINDOW) if self.window else self.blocks[i // BLOCK, j // BLOCK]

    @property
    def work(self) -> float:
        if self.window:
            pairs = np.minimum(np.arange(1, self.length + 1), WINDOW).sum()
        else:
            pairs = self.blocks.sum() * BLOCK**2
        return 4 * self.heads * self.head_dim * float(pairs)

    def inputs(self) -> ModInputs:
        return ModInputs(*self.normal(), np.zeros(0))

    def exact(self, inputs: ModInputs) -> tuple[Any, NDArray[Any]]:
        q, k, v = (x[0].astype(np.float64) for x in inputs[:3])
        scores = q[:, self.rows] @ k.swapaxes(1, 2) / np.sqrt(self.head_dim)
        scores[:, ~self.seen(self.rows)] = -np.inf
        return np.s_[:, :, self.rows], (softmax(scores) @ v)[None]

    def ours(self, inputs: ModInputs, **options: Any) -> Call:
        run = partial(nbattn.scaled_dot_product_attention, *inputs[:3], self.mask, **options)
        return Call(run, np.asarray)

    def beside(self, inputs: ModInputs) -> dict[str, Call]:
        """Attention to everything, whose result is of course another one: the row's own is shown for it."""
        own = self.ours(inputs).run
        run = partial(nbattn.scaled_dot_product_attention, *inputs[:3])
        return {"nbattn on everything": Call(run, lambda _: np.asarray(own()))}


# --- other scores, and one key for each query ---------------------------------------------------------------


class ScoreInputs(NamedTuple):
    query: NDArray[Any]  # (1, H, S, D)
    key: NDArray[Any]
    value: NDArray[Any]
    weights: NDArray[Any]  # (2, D, D)
    v: NDArray[Any]  # (D,)


@dataclass(frozen=True)
class Scored(Variant):
    """Additive attention, or Luong's with other scores than the dot product."""

    score: str = "additive"

    operation = "scored"

    @property
    def group(self) -> str:
        return self.score

    @property
    def name(self) -> str:
        return f"{self.score} {self.shape}"

    @property
    def work(self) -> float:
        """Of a hidden unit: an addition, a tanh and a multiply-add."""
        each = 2 if self.score == "general" else 4
        return (each + 2) * self.heads * self.head_dim * float(self.length) ** 2

    def inputs(self) -> ScoreInputs:
        rng, d = np.random.default_rng(1), self.head_dim
        weights = (rng.standard_normal((2, d, d)) / np.sqrt(d)).astype(np.float32)
        return ScoreInputs(*self.normal(), weights, rng.standard_normal(d, np.float32))

    def exact(self, inputs: ScoreInputs) -> tuple[Any, NDArray[Any]]:
        q, k, value, (w_query, w_key), v = (x.astype(np.float64) for x in inputs)
        q = q[:, :, self.rows]
        result = np.empty(q.shape)
        for h in range(self.heads):
            if self.score == "general":
                scores = q[0, h] @ (k[0, h] @ w_key.T).T
            else:
                projected, hidden = q[0, h] @ w_query.T, k[0, h] @ w_key.T
                scores = np.array([np.tanh(row + hidden) @ v for row in projected])
            result[0, h] = softmax(scores) @ value[0, h]
        return np.s_[:, :, self.rows], result

    def ours(self, inputs: ScoreInputs, **options: Any) -> Call:
        w_query, w_key = inputs.weights
        if self.score == "additive":
            door: Any = nbattn.additive_attention
            options |= {"w_query": w_query, "w_key": w_key, "v": inputs.v}
        elif self.score == "general":
            door, options = nbattn.luong_attention, options | {"score": "general", "weight": w_key}
        else:
            both = np.concatenate((w_query, w_key), axis=1)
            door, options = (
                nbattn.luong_attention,
                options | {"score": "concat", "weight": both, "v": inputs.v},
            )
        return Call(partial(door, *inputs[:3], **options), np.asarray)


@dataclass(frozen=True)
class Hard(Variant):
    """The value of the key that scores highest."""

    operation = group = "hard"

    @property
    def name(self) -> str:
        return f"hard {self.shape}"

    @property
    def work(self) -> float:
        return 2 * self.heads * self.head_dim * float(self.length) ** 2

    def inputs(self) -> ModInputs:
        return ModInputs(*self.normal(), np.zeros(0))

    def exact(self, inputs: ModInputs) -> tuple[Any, NDArray[Any]]:
        q, k, v = (x[0].astype(np.float64) for x in inputs[:3])
        best = (q[:, self.rows] @ k.swapaxes(1, 2)).argmax(axis=-1)
        return np.s_[:, :, self.rows], np.take_along_axis(v, best[..., None], axis=1)[None]

    def ours(self, inputs: ModInputs, **options: Any) -> Call:
        return Call(partial(nbattn.hard_attention, *inputs[:3], **options), lambda result: result.output)


# --- linear attention ---------------------------------------------------------------------------------------


class LinearInputs(NamedTuple):
    query: NDArray[Any]  # (1, H, S, D)
    key: NDArray[Any]  # of length 1
    value: NDArray[Any]
    decay: NDArray[Any] | None  # (1, H, S), the logarithm
    beta: NDArray[Any] | None  # (1, H, S)


@dataclass(frozen=True)
class Linear(Variant):
    """Causal linear attention, with a decay and a rate for each head and token where the rule has them."""

    rule: str = "linear"

    operation = "linear"

    @property
    def name(self) -> str:
        return f"{self.rule} {self.shape}"

    @property
    def work(self) -> float:
        """Two multiply-adds for each number of the state, three where it is asked what it recalls."""
        return (6 if "delta" in self.rule else 4) * self.heads * self.length * float(self.head_dim) ** 2

    def inputs(self) -> LinearInputs:
        rng, (q, k, v) = np.random.default_rng(1), self.normal()
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
        decay, beta = rng.random((2, *k.shape[:3]), np.float32)
        gated, delta = "gated" in self.rule, "delta" in self.rule
        return LinearInputs(q, k, v, -decay / 8 if gated else None, beta if delta else None)

    def exact(self, inputs: LinearInputs) -> tuple[Any, NDArray[Any]]:
        """Chunk by chunk: ratios of decays, and a solve for what a delta rule adds."""
        q, k, v, decay, beta = (None if x is None else x[0].astype(np.float64) for x in inputs)
        q = q / np.sqrt(self.head_dim)
        state = np.zeros((self.heads, self.head_dim, self.head_dim))
        result = np.empty(q.shape)
        for start in range(0, self.length, CHUNK):
            part = np.s_[:, start : start + CHUNK]
            qs, ks, added = q[part], k[part], v[part]
            n = qs.shape[1]
            total = np.zeros((self.heads, n)) if decay is None else decay[part].cumsum(axis=1)
            ratio = np.exp(np.minimum(total[:, :, None] - total[:, None], 0)) * np.tri(n)
            since = np.exp(total)[..., None]
            if beta is not None:
                rate = beta[part][..., None]
                overlap = rate * (ks @ ks.swapaxes(1, 2)) * ratio * np.tri(n, k=-1)
                added = np.linalg.solve(np.eye(n) + overlap, rate * (added - since * ks @ state))
            result[part] = (qs @ ks.swapaxes(1, 2)) * ratio @ added + since * qs @ state
            state = since[:, -1:] * state + (ks * ratio[:, -1, :, None]).swapaxes(1, 2) @ added
        return ..., result[None]

    def ours(self, inputs: LinearInputs, **options: Any) -> Call:
        q, k, v, decay, beta = inputs
        run = partial(nbattn.linear_attention, q, k, v, decay=decay, beta=beta, **options)
        return Call(run, np.asarray)


def rows() -> list[Any]:
    """Every row, in the order of the table."""
    return [
        *(Modified(8, 2048, feature=feature) for feature in FEATURES),
        Sparse(8, 4096),
        Sparse(1, 16384, window=True),
        *(Scored(8, 512, score=score) for score in ("additive", "general", "concat")),
        Hard(8, 2048),
        *(
            Linear(8, 16384, rule=rule, quick=rule != "gated delta")
            for rule in ("linear", "gated", "delta", "gated delta")
        ),
    ]
