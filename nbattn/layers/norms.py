"""Normalisation over the last axis."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from .. import check


class LayerNorm:
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last axis.

    Parameters
    ----------
    weight : ndarray, shape (d,)
    bias : ndarray, shape (d,), optional
    eps : float
        Added to the variance, which divides by d.
    backend : {None, "cpu", "reference"}
        "reference" never takes the kernel, which float32 in rows of a vector or more goes through.

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

    def __init__(
        self,
        weight: NDArray[Any],
        bias: NDArray[Any] | None = None,
        eps: float = 1e-5,
        *,
        backend: str | None = None,
    ) -> None:
        self.weight, self.bias, self.eps, self.backend = weight, bias, eps, backend

    def __call__(self, x: NDArray[Any]) -> NDArray[Any]:
        """``(..., d)`` to ``(..., d)``."""
        return check.backend_module("rowwise", self.backend).layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm:
    """``x / sqrt(mean(x**2) + eps) * weight`` over the last axis.

    Parameters
    ----------
    weight : ndarray, shape (d,)
    eps : float
    backend : {None, "cpu", "reference"}
        As in `LayerNorm`.

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

    def __init__(self, weight: NDArray[Any], eps: float, *, backend: str | None = None) -> None:
        self.weight, self.eps, self.backend = weight, eps, backend

    def __call__(self, x: NDArray[Any]) -> NDArray[Any]:
        """``(..., d)`` to ``(..., d)``."""
        return check.backend_module("rowwise", self.backend).rms_norm(x, self.weight, self.eps)
