"""Rotary positions for queries and keys that go into no cache; a `KVCache` turns by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import check
from ..reference.append import turned


class Rotary:
    """Turns pairs of numbers by their position: pair n by ``position * base ** (-2 * n / dim)`` radians.

    Parameters
    ----------
    dim : int
        How many of a head's first numbers turn; even.
    base : float
    interleaved : bool
        Whether the pairs are ``(2 * n, 2 * n + 1)``, as in GPT-J and the RoFormer paper; else
        ``(n, n + dim / 2)``, as in GPT-NeoX and Llama.

    Raises
    ------
    ValueError
        For an odd `dim` or a base that is not positive.

    References
    ----------
    Su et al., 2021, https://arxiv.org/abs/2104.09864.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.layers import Rotary
    >>> Rotary(2)(np.array([[1.0, 0.0], [1.0, 0.0]])).round(3)
    array([[1.   , 0.   ],
           [0.54 , 0.841]])
    """

    def __init__(self, dim: int, base: float = 10000.0, *, interleaved: bool = False) -> None:
        dim, base = check.check_int(dim, "dim"), check.check_number(base, "base")
        if dim < 2 or dim % 2 or base <= 0:
            msg = f"dim is {dim} and base {base}; expected an even number from 2 on and a positive one"
            raise ValueError(msg)
        self.dim, self.interleaved = dim, check.check_flag(interleaved, "interleaved")
        self.frequencies = base ** (-np.arange(0, dim, 2) / dim)

    def __call__(self, x: ArrayLike, positions: ArrayLike = 0) -> NDArray[Any]:
        """Turn ``(..., S, D)``, in float32 or float64.

        `positions` is that of the first row, or integers that broadcast to ``(..., S)``.
        """
        x = check.floating(x, "x")
        if x.ndim < 2 or x.shape[-1] < self.dim:
            msg = f"x has shape {x.shape}; expected (..., positions, numbers), at least {self.dim} numbers"
            raise ValueError(msg)
        places = np.asarray(positions)
        if places.dtype.kind not in "iu":
            msg = f"positions has dtype {places.dtype}; expected integers"
            raise TypeError(msg)
        if places.ndim == 0:
            places = places + np.arange(x.shape[-2])
        else:
            try:
                np.broadcast_to(places, x.shape[:-1])
            except ValueError:
                msg = f"positions has shape {places.shape}; it must broadcast to {x.shape[:-1]}"
                raise ValueError(msg) from None
        wide = np.float64 if x.dtype == np.float64 else np.float32
        return turned(x.astype(wide, copy=False), places, self.frequencies, self.interleaved)
