"""Products with weights, and rows of them: `Linear` and `Embedding`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import check
from ..reference import matvec

WEIGHTS = ("float32", "float64", "float16", "bfloat16", "int8")
FEW = {"float32": 16, "float16": 48, "bfloat16": 48, "int8": 24}
"""The most rows of x whose products are taken along the rows of the weight, as it lies; for more it pays to
turn it first."""
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


class Linear:
    """``x @ weight.T + bias`` over the last axis.

    A few rows of float32 go through a kernel that reads the weight once, nearly at the rate at which memory
    gives it, so that weights of 16 and 8 bits save time in a decoder. More than 16 (of weights of 16 bits 48,
    of 8 bits 24) go through another, which multiplies nearly as fast as the processor can. Either gives the
    same bits whatever the number of threads and whatever other rows there are. float64, and matrices smaller
    than a tile, go through NumPy's BLAS.

    Parameters
    ----------
    weight : ndarray, shape (d_out, d_in)
        float32, float64, float16, bfloat16 (of `ml_dtypes`, or its bits as uint16), or int8 with `scales`. It
        is kept as it is where its last axis is contiguous, also if it is mapped from a file; else copied.
    bias : ndarray, shape (d_out,), optional
    scales : ndarray, shape (d_out,) or (d_out, groups), optional
        What int8 numbers are multiplied by: one for each row, or for each run of ``d_in / groups`` numbers,
        which must be a multiple of 32.
    backend : {None, "cpu", "reference"}
        "reference" never takes the kernels.

    Attributes
    ----------
    dtype : str
        What the weight is stored as.
    d_out, d_in : int

    Raises
    ------
    TypeError, ValueError
        For dtypes and shapes that make no such product.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.layers import Linear
    >>> Linear(np.array([[1.0], [2.0]]), np.array([0.5, 0.5]))(np.array([[3.0]]))
    array([[3.5, 6.5]])
    >>> layer = Linear(np.ones((64, 128), np.float32)).astype("bfloat16")
    >>> layer(np.ones(128, np.float32)).shape, layer
    ((64,), Linear(128 to 64, bfloat16))
    """

    def __init__(
        self,
        weight: ArrayLike,
        bias: ArrayLike | None = None,
        *,
        scales: ArrayLike | None = None,
        backend: str | None = None,
    ) -> None:
        self.weight, self.dtype, self.scales = _check_weight(weight, scales)
        self.d_out, self.d_in = self.weight.shape
        wide = np.float64 if self.dtype == "float64" else np.float32
        self.bias: NDArray[Any] | None = None
        if bias is not None:
            self.bias = check.floating(bias, "bias").astype(wide)
            if self.bias.shape != (self.d_out,):
                msg = (
                    f"bias has shape {self.bias.shape}; expected ({self.d_out},), as weight has so many rows"
                )
                raise ValueError(msg)
        check.backend_module("matvec", "reference" if backend is None else backend)
        self.backend = backend
        added = np.zeros(self.d_out, wide) if self.bias is None else self.bias
        self._plan = matvec.Plan(self.weight, self.dtype, added, self.scales)
        self._few: Any = None
        self._many: Any = None

    def __call__(
        self, x: ArrayLike, *, activation: str | None = None, plus: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """``activation(x @ weight.T + bias) + plus``.

        Parameters
        ----------
        x : array_like, shape (..., d_in)
        activation : {"gelu", "gelu_tanh", "relu", "silu"}, optional
        plus : ndarray, shape (..., d_out), optional
            As a residual connection adds.

        Returns
        -------
        ndarray, shape (..., d_out)
            float64 where x, the weight or plus is, else float32.

        Raises
        ------
        TypeError, ValueError
            For dtypes and shapes that do not fit.
        """
        x = check.floating(x, "x")
        if x.ndim == 0 or x.shape[-1] != self.d_in:
            msg = f"x has shape {x.shape}; expected (..., {self.d_in}), as weight is {self.weight.shape}"
            raise ValueError(msg)
        wide = np.float64 if np.float64 in (x.dtype, self.weight.dtype) else np.float32
        rows = np.ascontiguousarray(x, wide).reshape(math.prod(x.shape[:-1]), self.d_in)
        shape = *x.shape[:-1], self.d_out
        if activation is not None and activation not in ACTIVATIONS:
            msg = f"activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}"
            raise ValueError(msg)
        if plus is not None:
            plus = check.floating(plus, "plus")
            if plus.shape != shape:
                msg = f"plus has shape {plus.shape}; expected {shape}, as the product"
                raise ValueError(msg)
        y = np.empty((len(rows), self.d_out), wide)
        product = self._product(rows)
        fuses = product is self._many is not self._plan
        if fuses and (plus is None or plus.dtype == np.float32):
            product(
                rows, y, activation, None if plus is None else np.ascontiguousarray(plus).reshape(y.shape)
            )
            return y.reshape(shape)
        product(rows, y)
        if activation is not None:
            y = check.backend_module("rowwise", self.backend).activation(activation, y)
        y = y.reshape(shape)
        return y if plus is None else y + plus

    def _product(self, rows: NDArray[Any]) -> Any:
        """What multiplies these rows."""
        if not len(rows) or rows.dtype != np.float32 or self.dtype not in FEW or self.backend == "reference":
            return self._plan
        if len(rows) <= FEW[self.dtype]:
            if self._few is None:
                self._few = self._kernel("matvec")
            return self._few
        if self._many is None:
            self._many = self._kernel("products")
        return self._many

    def _kernel(self, stem: str) -> Any:
        module = check.backend_module(stem, self.backend)
        if not module.fits(self.d_out, self.d_in):
            return self._plan
        return module.Plan(self.weight, self.dtype, self._plan.bias, self.scales)

    def astype(self, dtype: str, *, group: int | None = None) -> Linear:
        """The same layer with its weight rounded to float32, float16, bfloat16 or int8.

        int8 has a scale for each row, or for each run of `group` numbers of it: the largest magnitude / 127.
        """
        if dtype not in FEW:
            msg = f"dtype is {dtype!r}; expected one of {', '.join(FEW)}"
            raise ValueError(msg)
        wide = matvec.widened(self.weight, self.dtype, self.scales)
        group = self.d_in if group is None else group
        _check_group(self.d_in, group)
        weight, scales = matvec.narrowed(wide, dtype, self.d_in // max(group, 1))
        return Linear(weight, self.bias, scales=scales, backend=self.backend)

    def __repr__(self) -> str:
        return f"Linear({self.d_in} to {self.d_out}, {self.dtype})"


class Embedding:
    """Rows of a table, by their numbers; `Linear` of the same weight is the tied head of a language model.

    Parameters
    ----------
    weight : ndarray, shape (count, d)
    scales : ndarray, shape (count,) or (count, groups), optional
        Both as in `Linear`.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.layers import Embedding
    >>> Embedding(np.array([[1.0, 2.0], [3.0, 4.0]]))([1, 1, 0])
    array([[3., 4.],
           [3., 4.],
           [1., 2.]])
    """

    def __init__(self, weight: ArrayLike, *, scales: ArrayLike | None = None) -> None:
        self.weight, self.dtype, self.scales = _check_weight(weight, scales)

    def __call__(self, ids: ArrayLike) -> NDArray[Any]:
        """Integers ``(...)`` to ``(..., d)``, float64 where the weight is, else float32."""
        ids = np.asarray(ids)
        count, d = self.weight.shape
        if ids.dtype.kind not in "iu" and ids.size:
            msg = f"ids has dtype {ids.dtype}; expected integers"
            raise TypeError(msg)
        if ids.size and not 0 <= ids.min() <= ids.max() < count:
            msg = f"ids holds {ids.min()} to {ids.max()}; expected 0 to {count - 1}"
            raise ValueError(msg)
        flat = ids.reshape(-1).astype(np.int64)
        scales = None if self.scales is None else self.scales[flat]
        return matvec.widened(self.weight[flat], self.dtype, scales).reshape(*ids.shape, d)


def _check_weight(
    weight: ArrayLike, scales: ArrayLike | None
) -> tuple[NDArray[Any], str, NDArray[np.float32] | None]:
    array = check.as_array(weight, "weight")
    name = "bfloat16" if array.dtype == np.uint16 else array.dtype.name
    if name not in WEIGHTS or not array.dtype.isnative:
        msg = f"weight has dtype {array.dtype}; expected one of {', '.join(WEIGHTS)}"
        raise TypeError(msg)
    if array.ndim != 2:
        msg = f"weight has shape {array.shape}; expected 2 dimensions (d_out, d_in)"
        raise ValueError(msg)
    if array.strides[1] != array.itemsize or not array.flags.aligned:
        array = np.ascontiguousarray(array)
    if (scales is None) != (name != "int8"):
        msg = f"weight is {name} and scales {'missing' if scales is None else 'given'}; int8 alone has scales"
        raise ValueError(msg)
    if scales is None:
        return array, name, None
    factors = np.ascontiguousarray(check.floating(scales, "scales"), np.float32)
    if factors.ndim == 1:
        factors = factors[:, None]
    rows, d_in = array.shape
    if factors.ndim != 2 or len(factors) != rows or factors.shape[1] == 0 or d_in % factors.shape[1]:
        msg = f"scales has shape {factors.shape}; expected ({rows},) or ({rows}, groups), which divide {d_in}"
        raise ValueError(msg)
    _check_group(d_in, d_in // factors.shape[1])
    return array, name, factors


def _check_group(d_in: int, group: int) -> None:
    if group != d_in and (group < 1 or group % 32 or d_in % group):
        msg = (
            f"a group has {group} numbers; expected a multiple of 32 that divides d_in, {d_in}, or all of it"
        )
        raise ValueError(msg)
