"""Feed-forward layers and their activations."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from .. import check
from .linear import ACTIVATIONS, Linear


def gelu(x: NDArray[Any], *, backend: str | None = None) -> NDArray[Any]:
    """``x * Phi(x)``, with the normal distribution's exact Phi, by erf.

    References
    ----------
    Hendrycks and Gimpel, 2016, https://arxiv.org/abs/1606.08415.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.layers import gelu
    >>> gelu(np.array([-1.0, 0.0, 2.0])).round(4)
    array([-0.1587,  0.    ,  1.9545])
    """
    return _activated("gelu", x, backend)


def gelu_tanh(x: NDArray[Any], *, backend: str | None = None) -> NDArray[Any]:
    """GELU with the tanh that approximates Phi: ``x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))``.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.layers import gelu_tanh
    >>> gelu_tanh(np.array([-1.0, 0.0, 2.0])).round(4)
    array([-0.1588,  0.    ,  1.9546])
    """
    return _activated("gelu_tanh", x, backend)


def silu(x: NDArray[Any], *, backend: str | None = None) -> NDArray[Any]:
    """``x * sigmoid(x)``.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.layers import silu
    >>> silu(np.array([-1.0, 0.0, 2.0])).round(4)
    array([-0.2689,  0.    ,  1.7616])
    """
    return _activated("silu", x, backend)


def relu(x: NDArray[Any], *, backend: str | None = None) -> NDArray[Any]:
    """``max(x, 0)``.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.layers import relu
    >>> relu(np.array([-1.0, 2.0]))
    array([0., 2.])
    """
    return _activated("relu", x, backend)


def _activated(
    name: str, x: NDArray[Any], backend: str | None, times: NDArray[Any] | None = None
) -> NDArray[Any]:
    """An activation of x, times another array."""
    return check.backend_module("rowwise", backend).activation(name, x, times)


class FeedForward:
    """``down(activation(up(x)))``.

    Parameters
    ----------
    up, down : Linear
        d to hidden, and back.
    activation : {"gelu", "gelu_tanh", "relu", "silu"}

    Raises
    ------
    ValueError
        For sizes that do not fit, or an unknown activation.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.layers import FeedForward, Linear
    >>> FeedForward(Linear(np.ones((3, 1))), Linear(np.ones((1, 3))), "relu")(np.array([2.0]))
    array([6.])
    """

    def __init__(self, up: Linear, down: Linear, activation: str = "gelu") -> None:
        if activation not in ACTIVATIONS:
            msg = f"activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}"
            raise ValueError(msg)
        _check_chain(up, down)
        self.up, self.down, self.activation = up, down, activation

    def __call__(self, x: NDArray[Any], *, plus: NDArray[Any] | None = None) -> NDArray[Any]:
        """``(..., d)`` to ``(..., d)``; `plus` is added to it."""
        return self.down(self.up(x, activation=self.activation), plus=plus)


class SwiGLU:
    """Gated feed-forward: ``down(silu(gate(x)) * up(x))``.

    Parameters
    ----------
    gate, up, down : Linear
        d to hidden, the same again, and back.
    activation : {"silu", "gelu", "gelu_tanh", "relu"}
        The other ones make it a GeGLU or ReGLU.

    Raises
    ------
    ValueError
        For sizes that do not fit, or an unknown activation.

    References
    ----------
    Shazeer, "GLU Variants Improve Transformer", 2020, https://arxiv.org/abs/2002.05202.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.layers import Linear, SwiGLU
    >>> one = Linear(np.ones((1, 1)))
    >>> SwiGLU(one, one, one)(np.array([2.0])).round(3)
    array([3.523])
    """

    def __init__(self, gate: Linear, up: Linear, down: Linear, activation: str = "silu") -> None:
        if activation not in ACTIVATIONS:
            msg = f"activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}"
            raise ValueError(msg)
        _check_chain(gate, down)
        _check_chain(up, down)
        self.gate, self.up, self.down, self.activation = gate, up, down, activation

    def __call__(self, x: NDArray[Any], *, plus: NDArray[Any] | None = None) -> NDArray[Any]:
        """``(..., d)`` to ``(..., d)``; `plus` is added to it."""
        return self.down(_activated(self.activation, self.gate(x), self.gate.backend, self.up(x)), plus=plus)


def _check_chain(first: Linear, second: Linear) -> None:
    if first.d_out != second.d_in:
        msg = f"one layer gives {first.d_out} numbers but the next takes {second.d_in}; both must match"
        raise ValueError(msg)
