"""Users' functions in the plain kernel of attention, which is compiled anew with them.

Their source is translated as for the CPU, whose compiler sees them first: what it refuses is refused here in
the same words, before anything is launched. Their arguments are the kernel's last parameters, arrays as Numba
has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..problem import Mod, Problem

KEPT = 256
"""Kernels of users' functions that are remembered."""


class Mods(NamedTuple):
    """The functions of a problem, as its kernel is told of them."""

    score: Mod | None
    mask: Mod | None
    name: str  # tells the kernel from others
    keeps: bool  # whether that name means the same in another process
    kinds: tuple[tuple[str, str], ...]  # of the arguments' parameters
    label: str


NONE = Mods(None, None, "", True, (), "")


def of(p: Problem) -> Mods:
    """A problem's functions, which the CPU's compiler has accepted."""
    if p.score_mod is None and p.mask_mod is None:
        return NONE
    from ..cpu import functions
    from ..cpu import mods as cpu

    names, kinds, keeps = [], [], True
    given = [mod for mod in (p.score_mod, p.mask_mod) if mod is not None]
    for mod in given:
        cpu.ready(mod, p.compute)
        number = np.dtype(_number(mod, p.compute)).name
        own = [(f"{mod.name}_{i}", _kind(x, number)) for i, x in enumerate(mod.arguments)]
        digest, identities = functions.digest(mod.function, tuple(kind for _, kind in own))
        names.append(f"-{mod.name}-{digest[:32]}")
        keeps &= not identities
        kinds += own
    label = " or ".join(mod.label for mod in given)
    return Mods(p.score_mod, p.mask_mod, "".join(names), keeps, tuple(kinds), label)


def values(mods: Mods, send: Callable[[NDArray[Any]], int]) -> dict[str, Any]:
    """The arguments' parameters by name; `send` puts an array on the GPU and says where."""
    found: dict[str, Any] = {}
    for mod in (mods.score, mods.mask):
        for i, x in enumerate(mod.arguments if mod is not None else ()):
            if isinstance(x, np.ndarray):
                x = (0, 0, x.size, x.itemsize, send(x), *x.shape, *x.strides)
            found[f"{mod.name}_{i}"] = x  # type: ignore[union-attr]
    return found


def _number(mod: Mod, compute: Any) -> Any:
    """Of a mask_mod numbers are as Python has them, as there is no score."""
    return compute if mod.name == "score_mod" else np.float64


def _kind(x: Any, number: str) -> str:
    if isinstance(x, np.ndarray):
        return f"{x.dtype.name}[{x.ndim}]"
    return number if isinstance(x, float) else "int64"


def build(mod: Mod | None, compute: Any) -> Any:
    """The function as kernels call it: ``function(*indices, *arguments)``; None for None."""
    if mod is None:
        return None
    from ..cpu import functions

    dtype = _number(mod, compute)
    return functions.translate(mod.function, _jit, _stand_ins(dtype), dtype)


def _jit(function: Any) -> Any:
    """A function that kernels call; not inlined by Numba, which would not pass it `*arguments`."""
    from numba import cuda

    from .numbers import SIMULATED

    return function if SIMULATED else cuda.jit(device=True)(function)


@cache
def _stand_ins(dtype: Any) -> dict[Any, Any]:
    """What takes the place of functions of `math` and NumPy: for numbers, computing in `dtype`."""
    made: dict[Any, Any] = {}

    def put(function: Any, *names: str) -> None:
        compiled = _jit(function)
        made.update((getattr(m, n), compiled) for n in names for m in (math, np) if hasattr(m, n))

    def one(name: str, function: Any) -> None:
        put(lambda x: dtype(function(dtype(x))), name)

    for name in ("exp", "expm1", "log", "log2", "log10", "log1p", "tanh", "sin", "cos", "tan"):
        one(name, getattr(math, name))
    put(lambda x: dtype(math.pow(dtype(2), dtype(x))), "exp2")
    put(lambda x, y: dtype(math.pow(dtype(x), dtype(y))), "pow", "float_power", "power")
    put(lambda condition, x, y: x if condition else y, "where")
    put(lambda x, y: x if x < y or x != x else y, "minimum")
    put(lambda x, y: x if x > y or x != x else y, "maximum")

    def clip(x, low, high):
        x = low if x < low else x
        return high if x > high else x

    put(clip, "clip")
    return made
