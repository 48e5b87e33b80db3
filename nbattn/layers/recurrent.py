"""Gated recurrent units, which read and write the sequences that the first attention aligned."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import check
from .linear import Linear


class GRUCell:
    """One step of a gated recurrent unit: an input and a state to the next state.

    ``r = sigmoid(W_r x + U_r h)``, ``z = sigmoid(W_z x + U_z h)``, ``h' = (1 - z) * n + z * h``, where n is
    ``tanh(W_n x + r * (U_n h))`` or ``tanh(W_n x + U_n (r * h))``; each product has its bias.

    Parameters
    ----------
    weight_ih : ndarray, shape (3 * d, d_in)
        W_r, W_z and W_n, in PyTorch's order.
    weight_hh : ndarray, shape (3 * d, d)
        U_r, U_z and U_n.
    bias_ih, bias_hh : ndarray, shape (3 * d,), optional
    reset_after : bool
        True, the default: r multiplies the product, as in PyTorch, cuDNN, Keras and ONNX's
        ``linear_before_reset=1``. False: r multiplies the state, as in the paper and by ONNX's default.
    backend : {None, "cpu", "reference"}
        Of the products.

    Raises
    ------
    ValueError
        For shapes that do not fit.

    References
    ----------
    Cho et al., 2014, https://arxiv.org/abs/1406.1078.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.layers import GRUCell
    >>> cell = GRUCell(np.ones((3, 1)), np.ones((3, 1)))
    >>> cell(np.array([0.0]), np.array([1.0])).round(4)
    array([0.8988])
    """

    def __init__(
        self,
        weight_ih: ArrayLike,
        weight_hh: ArrayLike,
        bias_ih: ArrayLike | None = None,
        bias_hh: ArrayLike | None = None,
        *,
        reset_after: bool = True,
        backend: str | None = None,
    ) -> None:
        self.input = Linear(weight_ih, bias_ih, backend=backend)
        hidden = Linear(weight_hh, bias_hh, backend=backend)
        self.d = d = hidden.d_in
        for name, layer in (("weight_ih", self.input), ("weight_hh", hidden)):
            if layer.d_out != 3 * d:
                msg = f"{name} has {layer.d_out} rows; expected 3 * {d}, as weight_hh has {d} columns"
                raise ValueError(msg)
        self.reset_after = check.check_flag(reset_after, "reset_after")
        self._parts = [hidden]
        if not reset_after:
            bias: Any = [None, None] if hidden.bias is None else [hidden.bias[: 2 * d], hidden.bias[2 * d :]]
            self._parts = [
                Linear(w, b, backend=backend)
                for w, b in zip((hidden.weight[: 2 * d], hidden.weight[2 * d :]), bias, strict=True)
            ]

    @classmethod
    def from_onnx(
        cls,
        w: ArrayLike,
        r: ArrayLike,
        b: ArrayLike | None = None,
        *,
        linear_before_reset: bool = False,
        backend: str | None = None,
    ) -> GRUCell:
        """The cell of one direction of ONNX's GRU.

        Parameters
        ----------
        w, r : array_like, shapes (3 * d, d_in) and (3 * d, d)
            In ONNX's order: z, r, h.
        b : array_like, shape (6 * d,), optional
        linear_before_reset : bool
            The operator's attribute.
        backend : {None, "cpu", "reference"}

        References
        ----------
        https://onnx.ai/onnx/operators/onnx__GRU.html

        Examples
        --------
        >>> import numpy as np
        >>> from nbattn.layers import GRUCell
        >>> GRUCell.from_onnx(np.ones((3, 1)), np.ones((3, 1)))(np.array([0.0]), np.array([1.0])).round(4)
        array([0.8988])
        """
        weight_ih, weight_hh = (_reordered(check.floating(x, name)) for x, name in ((w, "w"), (r, "r")))
        biases: list[Any] = [None, None]
        if b is not None:
            both = check.floating(b, "b")
            if both.shape != (6 * weight_hh.shape[-1],):
                msg = f"b has shape {both.shape}; expected ({6 * weight_hh.shape[-1]},)"
                raise ValueError(msg)
            biases = [_reordered(half) for half in np.split(both, 2)]
        return cls(weight_ih, weight_hh, *biases, reset_after=linear_before_reset, backend=backend)

    def __call__(self, x: ArrayLike, h: ArrayLike | None = None) -> NDArray[Any]:
        """``(..., d_in)`` and a state ``(..., d)``, zeros unless given, to the next state ``(..., d)``."""
        return self.step(self.input(x), h)

    def step(self, projected: NDArray[Any], h: ArrayLike | None = None) -> NDArray[Any]:
        """The same from ``W x`` with its biases ``(..., 3 * d)``, which may be had for many steps at once."""
        d = self.d
        state: Any = np.zeros((*projected.shape[:-1], d), projected.dtype) if h is None else h
        hidden = self._parts[0](state)
        gates = _sigmoid(projected[..., : 2 * d] + hidden[..., : 2 * d])
        r, z = gates[..., :d], gates[..., d:]
        inner = r * hidden[..., 2 * d :] if self.reset_after else self._parts[1](r * state)
        n = np.tanh(projected[..., 2 * d :] + inner)
        return n + z * (state - n)


class GRU:
    """A gated recurrent unit along a sequence.

    Parameters
    ----------
    cell : GRUCell
    reverse : bool
        Whether it goes from the sequence's end to its beginning; outputs stand where their inputs do.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.layers import GRU, GRUCell
    >>> outputs, last = GRU(GRUCell(np.ones((3, 1)), np.ones((3, 1))))(np.ones((2, 1)))
    >>> outputs.round(3).tolist(), last.round(3).tolist()
    ([[0.205], [0.347]], [0.347])
    """

    def __init__(self, cell: GRUCell, *, reverse: bool = False) -> None:
        self.cell, self.reverse = cell, check.check_flag(reverse, "reverse")

    def __call__(self, x: ArrayLike, h: ArrayLike | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
        """``(..., T, d_in)`` and a first state ``(..., d)`` to the states ``(..., T, d)`` and the last."""
        projected = self.cell.input(x)
        *batch, steps, _ = projected.shape
        outputs = np.empty((*batch, steps, self.cell.d), projected.dtype)
        state: Any = np.zeros((*batch, self.cell.d), projected.dtype) if h is None else h
        for t in range(steps)[:: -1 if self.reverse else 1]:
            state = outputs[..., t, :] = self.cell.step(projected[..., t, :], state)
        return outputs, np.asarray(state)


def _sigmoid(x: NDArray[Any]) -> NDArray[Any]:
    return 0.5 + 0.5 * np.tanh(0.5 * x)


def _reordered(x: NDArray[Any]) -> NDArray[Any]:
    """ONNX's gates z, r, h as r, z, n."""
    if x.ndim == 0 or len(x) % 3:
        msg = f"a GRU's weights have three gates along the first axis, got shape {x.shape}"
        raise ValueError(msg)
    z, r, n = np.split(x, 3)
    return np.concatenate([r, z, n])
