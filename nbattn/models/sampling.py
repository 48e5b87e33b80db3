"""How the next token is chosen from a model's logits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def next_token(logits: NDArray[Any], temperature: float, top_p: float, rng: np.random.Generator) -> int:
    """Choose a token: the likeliest at temperature 0, else drawn from the nucleus.

    Parameters
    ----------
    logits : ndarray, shape (vocab,)
    temperature : float
        The logits are divided by it; 0 is greedy.
    top_p : float
        The draw is among the fewest tokens whose probabilities reach this sum.
    rng : numpy.random.Generator
        Not used at temperature 0.

    Returns
    -------
    int

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.models.sampling import next_token
    >>> next_token(np.array([0.0, 3.0, 1.0]), 0.0, 1.0, np.random.default_rng())
    1
    """
    if temperature == 0:
        return int(np.argmax(logits))
    shifted = logits.astype(np.float64) - np.max(logits)
    # A tiny temperature sends all but the likeliest to -inf, which is what it asks for.
    with np.errstate(over="ignore"):
        weights = np.exp(shifted / temperature)
    probabilities = nucleus(weights / weights.sum(), top_p)
    return int(rng.choice(len(probabilities), p=probabilities))


def nucleus(probabilities: NDArray[np.float64], top_p: float) -> NDArray[np.float64]:
    """Keep the fewest most probable tokens whose sum reaches `top_p`, and renormalise.

    Parameters
    ----------
    probabilities : ndarray of float64, shape (vocab,)
        They sum to 1.
    top_p : float
        In (0, 1]; 1 keeps every token.

    Returns
    -------
    ndarray of float64, shape (vocab,)

    References
    ----------
    Holtzman et al., "The Curious Case of Neural Text Degeneration", 2019, https://arxiv.org/abs/1904.09751.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.models.sampling import nucleus
    >>> nucleus(np.array([0.125, 0.5, 0.25, 0.125]), 0.75).round(3)
    array([0.   , 0.667, 0.333, 0.   ])
    """
    if top_p == 1:
        return probabilities
    order = np.argsort(-probabilities, kind="stable")
    kept = order[: np.searchsorted(np.cumsum(probabilities[order]), top_p) + 1]
    result = np.zeros_like(probabilities)
    result[kept] = probabilities[kept] / probabilities[kept].sum()
    return result
