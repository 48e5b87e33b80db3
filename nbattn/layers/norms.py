"""Normalisation over the last axis."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class LayerNorm:
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last axis.

    Parameters
    ----------
    weight : ndarray, shape (d,)
    bias : ndarray, shape (d,), optional
    eps : float
        Added to the variance, which divides by d.

    References
    ----------
    Ba et al., 2016, https://arxiv.org/abs/1607.06450.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.layers import LayerNorm
    >>> LayerNorm(np.ones(2), np.full(2, 0.5), eps=0.0)(np.array([1.0, 7.0]))
    array([-0.5,  1.5])
    """

    def __init__(self, weight: NDArray[Any], bias: NDArray[Any] | None = None, eps: float = 1e-5) -> None:
        self.weight, self.bias, self.eps = weight, bias, eps

    def __call__(self, x: NDArray[Any]) -> NDArray[Any]:
        """``(..., d)`` to ``(..., d)``."""
        y = x - np.mean(x, axis=-1, keepdims=True)
        variance = np.einsum("...d,...d->...", y, y)[..., None] / x.shape[-1]
        y /= np.sqrt(variance + self.eps)
        y = y * self.weight
        return y if self.bias is None else y + self.bias


class RMSNorm:
    """``x / sqrt(mean(x**2) + eps) * weight`` over the last axis.

    Parameters
    ----------
    weight : ndarray, shape (d,)
    eps : float

    References
    ----------
    Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.layers import RMSNorm
    >>> RMSNorm(np.ones(2), eps=0.0)(np.array([1.0, 7.0]))
    array([0.2, 1.4])
    """

    def __init__(self, weight: NDArray[Any], eps: float) -> None:
        self.weight, self.eps = weight, eps

    def __call__(self, x: NDArray[Any]) -> NDArray[Any]:
        """``(..., d)`` to ``(..., d)``."""
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + self.eps) * self.weight
