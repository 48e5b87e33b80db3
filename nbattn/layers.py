"""The layers that models are built from: plain classes, made from weights, called on arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


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


class Rotary:
    """Interleaved rotary positions: ``(x[2i], x[2i + 1])`` turns by ``position * base**(-2i / head_dim)``.

    Parameters
    ----------
    head_dim : int
        Even.
    max_positions : int
    base : float

    References
    ----------
    Su et al., "RoFormer", 2021, https://arxiv.org/abs/2104.09864.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.layers import Rotary
    >>> Rotary(2, max_positions=3, base=1e4)(np.array([[1, 0], [1, 0]], np.float32), start=1).round(2)
    array([[ 0.54,  0.84],
           [-0.42,  0.91]], dtype=float32)
    """

    def __init__(self, head_dim: int, max_positions: int, base: float) -> None:
        frequency = base ** (-np.arange(0, head_dim, 2) / head_dim)
        angle = np.outer(np.arange(max_positions), frequency)
        self.turn = np.exp(1j * angle).astype(np.complex64)  # (max_positions, head_dim / 2)

    def __call__(self, x: NDArray[np.float32], start: int = 0) -> NDArray[np.float32]:
        """``(..., S, head_dim)`` float32 at positions from `start` on; ValueError past `max_positions`."""
        end = start + x.shape[-2]
        if end > len(self.turn):
            msg = f"positions {start} to {end - 1} do not fit in max_positions {len(self.turn)}"
            raise ValueError(msg)
        # A pair turns as one complex number.
        return (x.view(np.complex64) * self.turn[start:end]).view(np.float32)


class KVCache:
    """Keys and values of the positions so far, in memory that is taken once.

    Parameters
    ----------
    batch, kv_heads, capacity, head_dim : int
    dtype : dtype, optional
        float32 unless given.

    Attributes
    ----------
    length : int
        How many positions it holds.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.layers import KVCache
    >>> cache = KVCache(batch=1, kv_heads=2, capacity=8, head_dim=4)
    >>> new = np.ones((1, 2, 3, 4), np.float32)
    >>> key, value = cache.append(new, new)
    >>> key.shape, cache.length
    ((1, 2, 3, 4), 3)
    """

    def __init__(
        self, batch: int, kv_heads: int, capacity: int, head_dim: int, dtype: DTypeLike = np.float32
    ) -> None:
        self._keys = np.empty((batch, kv_heads, capacity, head_dim), dtype)
        self._values = np.empty_like(self._keys)
        self.length = 0

    def append(self, key: NDArray[Any], value: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Write new positions ``(B, Hkv, S, D)``; return views of all keys and all values so far.

        ValueError, before anything is written, where they do not fit.
        """
        end, capacity = self.length + key.shape[2], self._keys.shape[2]
        if end > capacity:
            msg = f"the cache holds {self.length} of {capacity} positions; {key.shape[2]} more do not fit"
            raise ValueError(msg)
        self._keys[:, :, self.length : end] = key
        self._values[:, :, self.length : end] = value
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def reset(self) -> None:
        """Forget every position."""
        self.length = 0
