"""The calls that `gpu.py` proves: every option and dtype, ragged sizes, and how a result is judged."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

FLOOR = {"float64": 1e-14, "float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
"""Relative errors that pass in any case."""


class Case(NamedTuple):
    """A call of attention: sizes, and options by what makes them."""

    name: str
    dtype: str
    heads: int = 4
    kv_heads: int = 2
    queries: int = 200
    keys: int = 230
    head_dim: int = 64
    value_dim: int = 64
    batch: int = 2
    options: tuple[str, ...] = ()
    poisoned: bool = False  # whether keys beyond a sequence's length, and one value, are NaN


def cases(seed: int) -> list[Case]:
    """Every option for every dtype, alone and together, and ragged sizes that differ from run to run."""
    draw = random.Random(seed)
    found = []
    for dtype in FLOOR:
        for option in ("", *OPTIONS):
            found.append(Case(f"{dtype} {option or 'plain'}", dtype, options=(option,) if option else ()))
        for head_dim in (1, 17, 80, 128, 160, 256, 300):
            found.append(Case(f"{dtype} head_dim {head_dim}", dtype, head_dim=head_dim, value_dim=head_dim))
        for head_dim in (64, 128, 256) if dtype in ("float16", "bfloat16") else ():
            # Several blocks of queries and steps of keys for whatever kernel takes prompts.
            sizes = (4, 2, 700, 900, head_dim, head_dim)
            found.append(Case(f"{dtype} prompt {head_dim}", dtype, *sizes, options=("end",)))
            options = ("end", "lengths", "softcap", "sinks")
            name = f"{dtype} prompt {head_dim} {' '.join(options)}, poisoned"
            found.append(Case(name, dtype, *sizes, options=options, poisoned=True))
        for _ in range(6):
            sizes = [draw.choice((1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 257)) for _ in range(2)]
            dims = [draw.choice((8, 33, 64, 96, 128)) for _ in range(2)]
            options = tuple(draw.sample(sorted(OPTIONS), draw.randint(1, 4)))
            name = f"{dtype} {sizes[0]}x{sizes[1]} {dims[0]}/{dims[1]} {' '.join(options)}"
            heads = draw.choice((1, 2, 4))
            found.append(Case(name, dtype, 4, heads, *sizes, *dims, options=options))
    return found


def _mask(rng: Any, c: Case) -> dict[str, Any]:
    return {"mask": rng.random((c.batch, 1, c.queries, c.keys)) < 0.6}


def _bias(rng: Any, c: Case) -> dict[str, Any]:
    return {"bias": rng.standard_normal((c.heads, c.queries, c.keys)).astype("float32")}


def _lengths(rng: Any, c: Case) -> dict[str, Any]:
    return {"key_lengths": rng.integers(0, c.keys + 1, c.batch)}


OPTIONS: dict[str, Callable[[Any, Case], dict[str, Any]]] = {
    "causal": lambda rng, c: {"is_causal": True},
    "end": lambda rng, c: {"is_causal": True, "query_offset": "end"},
    "window": lambda rng, c: {"window_size": (40, 3)},
    "lengths": _lengths,
    "softcap": lambda rng, c: {"softcap": 5.0},
    "alibi": lambda rng, c: {"alibi_slopes": rng.random(c.heads)},
    "sinks": lambda rng, c: {"sinks": rng.standard_normal(c.heads)},
    "mask": _mask,
    "bias": _bias,
}


def relative_error(got: Any, exact: Any) -> float:
    """The norm of the difference over that of the truth; NaN or inf where that has none never passes."""
    import numpy as np

    got, exact = np.asarray(got, np.float64), np.asarray(exact, np.float64)
    if not np.array_equal(np.isfinite(got), np.isfinite(exact)):
        return math.inf
    finite = np.isfinite(exact)
    scale = np.linalg.norm(exact[finite])
    return float(np.linalg.norm(got[finite] - exact[finite]) / (scale if scale else 1.0))


def judged(name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return {"name": name, **run()}
    except Exception as failure:
        return {"name": name, "passed": False, "failure": f"{type(failure).__name__}: {failure}"[:300]}
