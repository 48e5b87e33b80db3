"""Activations and normalisation as formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def activation(name: str, x: NDArray[Any], times: NDArray[Any] | None = None) -> NDArray[Any]:
    """One of `ACTIVATIONS` of x, times another array of its shape where one is given."""
    y = ACTIVATIONS[name](x)
    return y if times is None else y * times


def layer_norm(x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any] | None, eps: float) -> NDArray[Any]:
    y = x - np.mean(x, axis=-1, keepdims=True)
    variance = np.einsum("...d,...d->...", y, y)[..., None] / x.shape[-1]
    y /= np.sqrt(variance + eps)
    y = y * weight
    return y if bias is None else y + bias


def rms_norm(x: NDArray[Any], weight: NDArray[Any], eps: float) -> NDArray[Any]:
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + eps) * weight


def _gelu(x: NDArray[Any]) -> NDArray[Any]:
    from scipy.special import erf

    return (0.5 * x) * (1 + erf(x * math.sqrt(0.5)))


def _gelu_tanh(x: NDArray[Any]) -> NDArray[Any]:
    return (0.5 * x) * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))


def _silu(x: NDArray[Any]) -> NDArray[Any]:
    half = 0.5 * x
    # By way of tanh, which does not overflow.
    return half * (1 + np.tanh(half))


def _relu(x: NDArray[Any]) -> NDArray[Any]:
    return np.maximum(x, 0)


ACTIVATIONS = {"gelu": _gelu, "gelu_tanh": _gelu_tanh, "relu": _relu, "silu": _silu}
