"""The layers that models are built from: plain classes, made from weights, called on arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class Linear:
    """``x @ weight + bias`` over the last axis.

    Parameters
    ----------
    weight : ndarray, shape (d_in, d_out)
    bias : ndarray, shape (d_out,), optional

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.layers import Linear
    >>> Linear(np.array([[1.0, 2.0]]), np.array([0.5, 0.5]))(np.array([[3.0]]))
    array([[3.5, 6.5]])
    """

    def __init__(self, weight: NDArray[Any], bias: NDArray[Any] | None = None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: NDArray[Any]) -> NDArray[Any]:
        """``(..., d_in)`` to ``(..., d_out)``."""
        y = x @ self.weight
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


class SwiGLU:
    """Gated feed-forward: ``(silu(x @ gate) * (x @ up)) @ down`` with ``silu(x) = x * sigmoid(x)``.

    Parameters
    ----------
    gate, up : ndarray, shape (d, hidden)
    down : ndarray, shape (hidden, d)

    References
    ----------
    Shazeer, "GLU Variants Improve Transformer", 2020, https://arxiv.org/abs/2002.05202.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.layers import SwiGLU
    >>> one = np.ones((1, 1))
    >>> SwiGLU(one, one, one)(np.array([2.0])).round(3)
    array([3.523])
    """

    def __init__(self, gate: NDArray[Any], up: NDArray[Any], down: NDArray[Any]) -> None:
        self.gate, self.up, self.down = gate, up, down

    def __call__(self, x: NDArray[Any]) -> NDArray[Any]:
        """``(..., d)`` to ``(..., d)``."""
        half = 0.5 * (x @ self.gate)
        # x * sigmoid(x) by way of tanh, which does not overflow.
        return (half * (1 + np.tanh(half)) * (x @ self.up)) @ self.down
