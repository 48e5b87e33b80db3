"""Linear attention as its recurrence: one token after the other, in the compute dtype.

Shapes: B batch, H key heads, G query heads for each of them, F features, V value columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..problem import LinearProblem

FEATURES = {
    "identity": lambda x: x,
    "elu": lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))),
    "relu": lambda x: np.maximum(x, 0),
}


def forward(problem: LinearProblem, out: NDArray[Any], state_out: NDArray[Any] | None) -> None:
    """Write linear attention to `out` (B, Hq, Sq, V), the last state to `state_out` (B, H, F, V or V + 1)."""
    p = problem
    # Overflow to inf and NaN from inf - inf are results here, not accidents.
    with np.errstate(all="ignore"):
        feature = FEATURES[p.feature]
        query, key, value = feature(p.query) * p.query.dtype.type(p.scale), feature(p.key), p.value
        if p.normalize:  # the sum of keys is the state of one more column of values
            value = np.concatenate((value, np.ones_like(value[..., :1])), axis=-1)
        batch, heads, queries, features = query.shape
        key_heads, keys = key.shape[1:3]
        query = query.reshape(batch, key_heads, heads // max(key_heads, 1), queries, features)
        output = np.empty((*query.shape[:-1], value.shape[-1]), value.dtype)
        state = np.zeros((batch, key_heads, features, value.shape[-1]), value.dtype)
        if p.state is not None:
            state[...] = p.state
        for t in range(keys):
            k, v = key[:, :, t], value[:, :, t]
            if p.decay is not None:
                state = state * np.exp(p.decay[:, :, t])[..., None]
            if p.beta is not None:
                recalled = (k[:, :, None] @ state)[:, :, 0]
                v = p.beta[:, :, t, None] * (v - recalled)
            state = state + k[..., None] * v[:, :, None]
            if p.is_causal:
                output[:, :, :, t] = query[:, :, :, t] @ state
        if not p.is_causal:
            output[...] = query @ state[:, :, None]
        if p.normalize:
            total = output[..., -1:]
            output = np.where(total == 0, 0, output[..., :-1] / total)
        out[...] = output.reshape(out.shape)
        if state_out is not None:
            state_out[...] = state
