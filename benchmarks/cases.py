"""What is measured: the rows of `peers.py`, their random inputs, exact results, and the machine's limits.

The asv suites take their inputs and errors from here too.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import nbattn

SHORT = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16"}
TOLERANCE = {
    "float32": 1e-5,
    "float64": 1e-13,
    "float16": 5e-3,
    "bfloat16": 5e-2,
    "int8": 5e-2,
    "int4": 0.5,
}
"""A result whose largest error, beside the largest exact value, is beyond this is wrong."""

WINDOW = 256
"""Keys that a row with a window sees: itself and those before it."""
SOFTCAP = 20.0
EXACT_ROWS, LONG_DOUBLE_ROWS = 256, 32
"""How many rows of a head are computed in float64, and in long double, which has no BLAS, to judge that."""


class Call(NamedTuple):
    """A prepared call: what is timed, how to see its result as a NumPy array laid out as the inputs, and how
    many seconds its threads go on spinning."""

    run: Callable[[], Any]
    read: Callable[[Any], NDArray[Any]]
    settle: float = 0.01


class Inputs(NamedTuple):
    """Of attention; mask, (S, S), true where a query attends, holds the window of rows that have one."""

    query: NDArray[Any]  # (1, H, S, D)
    key: NDArray[Any]
    value: NDArray[Any]
    mask: NDArray[np.bool_] | None
    bias: NDArray[Any] | None  # (S, S)


def numpy_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


@dataclass(frozen=True)
class Attention:
    """One row: self-attention of a batch of one."""

    heads: int
    length: int
    head_dim: int
    dtype: str = "float32"
    causal: bool = False
    products: str | None = None  # the compute_dtype
    feature: str = ""  # mask, bias, window (causal too) or softcap
    quick: bool = False

    suite, operation = "prefill", "attention"
    unit, limit = "GFLOP/s", "peak"

    @property
    def name(self) -> str:
        kind = SHORT[self.dtype] + (f">{SHORT[self.products]}" if self.products else "")
        shape = f"{self.heads}x{self.length}x{self.head_dim}"
        return " ".join(filter(None, [kind, shape, "causal" * self.causal, self.feature]))

    @property
    def precision(self) -> str:
        """The dtype that decides speed and error."""
        return self.products or self.dtype

    @property
    def group(self) -> str:
        """What it is averaged with."""
        return self.precision

    @property
    def work(self) -> float:
        """Operations; a causal mask halves them, as everyone counts."""
        pairs = self.length**2 / (2 if self.causal else 1)
        if self.feature == "window":
            pairs = np.minimum(np.arange(1, self.length + 1), WINDOW).sum()
        return 4 * self.heads * self.head_dim * float(pairs)

    def inputs(self) -> Inputs:
        rng = np.random.default_rng(0)
        shape, square = (1, self.heads, self.length, self.head_dim), (self.length, self.length)
        dtype = numpy_dtype(self.dtype)
        q, k, v = (rng.standard_normal(shape, np.float32).astype(dtype) for _ in range(3))
        mask = bias = None
        if self.feature == "mask":
            mask = rng.random(square) < 0.5
        elif self.feature == "window":
            mask = np.tri(self.length, dtype=bool) & ~np.tri(self.length, k=-WINDOW, dtype=bool)
        elif self.feature == "bias":
            bias = rng.standard_normal(square, np.float32).astype(dtype)
        return Inputs(q, k, v, mask, bias)

    def exact(self, inputs: Inputs) -> tuple[Any, NDArray[Any]]:
        """Some rows of every head, the last one among them, and what they should be."""
        wide, count = (
            (np.longdouble, LONG_DOUBLE_ROWS) if self.dtype == "float64" else (np.float64, EXACT_ROWS)
        )
        rows = np.linspace(0, self.length - 1, min(count, self.length)).astype(int)
        result = np.empty((1, self.heads, len(rows), self.head_dim), wide)
        seen = inputs.mask[rows] if inputs.mask is not None else None
        if self.causal:
            seen = np.arange(self.length) <= rows[:, None]
        for h in range(self.heads):
            q, k, v = (x[0, h].astype(wide) for x in inputs[:3])
            scores = (q[rows] / np.sqrt(wide(self.head_dim))) @ k.T
            if self.feature == "softcap":
                scores = SOFTCAP * np.tanh(scores / SOFTCAP)
            if inputs.bias is not None:
                scores += inputs.bias[rows]
            if seen is not None:
                scores[~seen] = -np.inf
            scores -= scores.max(axis=-1, keepdims=True)
            weights = np.exp(scores, out=scores)
            result[0, h] = weights @ v / weights.sum(axis=-1, keepdims=True)
        return np.s_[:, :, rows], result

    def ours(self, inputs: Inputs, **extra: Any) -> Call:
        """The call of this library, with more options if given."""
        options: dict[str, Any] = {"mask": inputs.mask} if self.feature == "mask" else {}
        if self.causal or self.feature == "window":
            options["is_causal"] = True
        if self.feature == "window":
            options["window_size"] = (WINDOW - 1, 0)
        if self.feature == "softcap":
            options["softcap"] = SOFTCAP
        if inputs.bias is not None:
            options["bias"] = inputs.bias
        if self.products:
            options["compute_dtype"] = self.products
        return Call(partial(nbattn.scaled_dot_product_attention, *inputs[:3], **options, **extra), np.asarray)

    def at_limit(self, inputs: Inputs, threads: int) -> float:
        """Seconds that the multiply-adds would take at the processor's rate, measured now."""
        from . import roofline

        return self.work / roofline.product_peak(self.precision, threads, repeats=3)


@dataclass(frozen=True)
class Softmax:
    """One row: softmax of a square float32 matrix."""

    length: int
    axis: int = -1
    out: bool = False
    quick: bool = True

    suite = operation = "softmax"
    dtype = precision = "float32"
    unit, limit, group = "GB/s", "copy", "softmax"

    @property
    def name(self) -> str:
        where = "last axis" if self.axis == -1 else "first axis"
        return f"softmax {self.length}x{self.length} {where}" + (" out=" if self.out else "")

    @property
    def work(self) -> float:
        """Bytes: each number is read and written once."""
        return 2 * 4 * float(self.length) ** 2

    def inputs(self) -> NDArray[Any]:
        return np.random.default_rng(0).standard_normal((self.length, self.length), np.float32)

    def exact(self, x: NDArray[Any]) -> tuple[Any, NDArray[Any]]:
        wide = x.astype(np.float64)
        np.exp(wide, out=wide)  # normal numbers, far from overflow
        return ..., wide / wide.sum(axis=self.axis, keepdims=True)

    def ours(self, x: NDArray[Any]) -> Call:
        options = {"out": np.zeros_like(x)} if self.out else {}
        return Call(partial(nbattn.softmax, x, self.axis, **options), np.asarray)

    def at_limit(self, x: NDArray[Any], threads: int) -> float:
        """Seconds of a parallel copy into memory that is in use already."""
        target = np.zeros_like(x)
        pairs = list(zip(np.array_split(target, threads), np.array_split(x, threads), strict=True))
        with ThreadPoolExecutor(threads) as pool:
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                list(pool.map(lambda pair: np.copyto(*pair), pairs))
                seconds.append(time.perf_counter() - start)
        return min(seconds)


Case = Attention | Softmax


def largest_error(result: NDArray[Any], exact: tuple[Any, NDArray[Any]]) -> tuple[float, float]:
    """The largest error, and the same beside the largest exact value; NaN where the result is not finite."""
    rows, truth = exact
    largest = float(np.abs(result[rows] - truth).max())
    return largest, largest / float(np.abs(truth).max())


def check_limits() -> None:
    """ImportError where the machine's limits cannot be measured, by parts that old commits lack."""
    from . import roofline

    _ = roofline


def share_of_limit(case: Any, inputs: Any, run: Callable[[], Any], threads: int) -> float:
    """The median share of the machine's limit that a call reaches."""
    shares = []
    for _ in range(7):
        best = case.at_limit(inputs, threads)
        start = time.perf_counter()
        run()
        shares.append(best / (time.perf_counter() - start))
    return statistics.median(shares)


def rows() -> list[Case]:
    """Every row, in the order of the table."""
    both = (False, True)
    grid: list[Case] = [
        Attention(8, n, d, causal=c, quick=n == 1024)
        for n, d, c in itertools.product((1024, 2048, 4096), (64, 128), both)
    ]
    grid += [
        Attention(h, n, 64, causal=c, quick=(h, n) in ((16, 128), (16, 256), (8, 512)))
        for n, h, c in itertools.product((128, 256, 512), (8, 16), both)
    ]
    for dtype, products in (("bfloat16", None), ("float32", "bfloat16")):
        grid += [
            Attention(8, n, d, dtype, causal=c, products=products, quick=n == 1024 and (d == 64 or not c))
            for n, d, c in itertools.product((1024, 2048), (64, 128), both)
        ]
    for dtype in ("float16", "float64"):
        grid += [
            Attention(8, n, d, dtype, causal=c, quick=n == 1024)
            for (n, d), c in itertools.product(((1024, 64), (2048, 128)), both)
        ]
    grid += [
        Attention(8, n, 64, feature=feature, quick=n == 1024)
        for n, feature in itertools.product((1024, 2048), ("mask", "bias", "window", "softcap"))
    ]
    grid += [Attention(4, 32, 32, quick=True)]
    return [*grid, Softmax(4096), Softmax(4096, out=True), Softmax(4096, axis=0)]
