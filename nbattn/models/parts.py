"""Layers of a weight file under PyTorch's names: the name of the layer, and ``weight`` and ``bias``."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from ..layers import LayerNorm, Linear
from .weights import Weights


def pair(weights: Weights, name: str, d_out: int, d_in: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The weight ``(d_out, d_in)`` and the bias of a product."""
    return weights.tensor(f"{name}.weight", (d_out, d_in)), weights.tensor(f"{name}.bias", (d_out,))


def linear(weights: Weights, name: str, d_out: int, d_in: int, backend: str | None) -> Linear:
    """A product."""
    return Linear(*pair(weights, name, d_out, d_in), backend=backend)


def layer_norm(weights: Weights, name: str, d: int, eps: float, backend: str | None) -> LayerNorm:
    """A normalisation of d numbers."""
    weight, bias = (weights.tensor(f"{name}.{part}", (d,)) for part in ("weight", "bias"))
    return LayerNorm(weight, bias, eps, backend=backend)
