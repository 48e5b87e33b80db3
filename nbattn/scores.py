"""Functions between the product and the softmax: the usual score mods, and the checks of the user's own.

Give what these make to attention as its ``score_mod``:

====================  ==========================================================================
`alibi`               penalises distance, a slope a head (Press et al., 2021)
`relative_position`   a learned number for each distance and head (Shaw et al., 2018; Swin, 2021)
`t5_bias`             a learned number for each bucket of distances and head (Raffel et al., 2020)
`softcap`             bounds the scores (Gemma 2, 2024)
====================  ==========================================================================

They are plain functions of ``(score, batch, head, q_index, kv_index)``, to be read as examples too.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from types import BuiltinFunctionType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import check
from .problem import Mod

ScoreMod = Callable[..., Any]


def alibi(slopes: ArrayLike, query_offset: int = 0) -> ScoreMod:
    """Attention with linear biases: ``score + slopes[head] * (key position - query position)``.

    Parameters
    ----------
    slopes : array_like (Hq,)
        Positive slopes penalise earlier keys by distance.
    query_offset : int
        The position of query 0 among the keys.

    References
    ----------
    Press et al., 2021, https://arxiv.org/abs/2108.12409. The door's `alibi_slopes` is the same.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn import scaled_dot_product_attention, scores
    >>> x = np.zeros((1, 3, 1), np.float32)
    >>> weights = scaled_dot_product_attention(
    ...     x, x, x, score_mod=scores.alibi([np.log(2)]), is_causal=True, return_weights=True
    ... ).weights
    >>> weights[0].round(2)
    array([[1.  , 0.  , 0.  ],
           [0.33, 0.67, 0.  ],
           [0.14, 0.29, 0.57]], dtype=float32)
    """
    each, offset = _table(slopes, "slopes", 1), check.check_int(query_offset, "query_offset")

    def score_mod(score, batch, head, q_index, kv_index, slopes=each, offset=offset):
        return score + slopes[head] * (kv_index - q_index - offset)

    return score_mod


def relative_position(table: ArrayLike, query_offset: int = 0) -> ScoreMod:
    """A number for each distance and head: ``score + table[head, R + distance]``.

    Parameters
    ----------
    table : array_like (Hq, 2 * R + 1)
        For the distances ``key position - query position`` from -R to R; the ends go for all beyond.
    query_offset : int
        The position of query 0 among the keys.

    References
    ----------
    Shaw et al., 2018, https://arxiv.org/abs/1803.02155, with clipped distances; as a bias: Liu et al., "Swin
    Transformer", 2021, https://arxiv.org/abs/2103.14030.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn import scaled_dot_product_attention, scores
    >>> x = np.zeros((1, 3, 1), np.float32)
    >>> nearest = scores.relative_position(np.log([[1.0, 2.0, 1.0]]))
    >>> scaled_dot_product_attention(x, x, x, score_mod=nearest, return_weights=True).weights[0]
    array([[0.5 , 0.25, 0.25],
           [0.25, 0.5 , 0.25],
           [0.25, 0.25, 0.5 ]], dtype=float32)
    """
    numbers, offset = _table(table, "table", 2), check.check_int(query_offset, "query_offset")
    reach = numbers.shape[1] // 2
    if numbers.shape[1] % 2 == 0:
        msg = f"table has {numbers.shape[1]} columns; expected 2 * R + 1, for the distances from -R to R"
        raise ValueError(msg)

    def score_mod(score, batch, head, q_index, kv_index, table=numbers, reach=reach, offset=offset):
        distance = min(max(kv_index - q_index - offset, -reach), reach)
        return score + table[head, distance + reach]

    return score_mod


def t5_bias(
    table: ArrayLike, *, bidirectional: bool = True, max_distance: int = 128, query_offset: int = 0
) -> ScoreMod:
    """T5's relative attention bias: a number for each bucket of distances and head.

    Half of a direction's buckets hold one distance each, the others grow by a factor up to `max_distance`.
    T5 does not scale its products: pass ``scale=1``.

    Parameters
    ----------
    table : array_like (buckets, Hq)
        As the weights of T5's ``relative_attention_bias``.
    bidirectional : bool
        True for encoders: half of the buckets are for later keys. False for decoders: later keys share
        bucket 0.
    max_distance : int
        From there on all distances share the last bucket.
    query_offset : int
        The position of query 0 among the keys.

    References
    ----------
    Raffel et al., 2020, https://arxiv.org/abs/1910.10683.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn import scaled_dot_product_attention, scores
    >>> x = np.ones((2, 5, 4), np.float32)
    >>> table = np.arange(64.0).reshape(32, 2)
    >>> scaled_dot_product_attention(x, x, x, score_mod=scores.t5_bias(table), scale=1).shape
    (2, 5, 4)
    """
    numbers = _table(table, "table", 2)
    reach = check.check_int(max_distance, "max_distance")
    both = check.check_flag(bidirectional, "bidirectional")
    buckets = len(numbers) // 2 if both else len(numbers)
    single = buckets // 2
    if single < 1 or reach <= single:
        msg = f"table has {len(numbers)} buckets and max_distance is {reach}; expected at least "
        msg += f"{4 if both else 2} buckets, and a distance above {max(single, 1)}"
        raise ValueError(msg)
    near = np.array([min(_bucket(n, single, buckets, reach), buckets - 1) for n in range(reach + 1)])
    later = near + buckets if both else np.zeros_like(near)
    later[0] = near[0]
    by_distance = np.concatenate((near[:0:-1], later))
    return relative_position(np.ascontiguousarray(numbers[by_distance].T), query_offset)


def _bucket(n: int, single: int, buckets: int, reach: int) -> int:
    """single + floor(log(n / single) / log(reach / single) * (buckets - single)), exactly."""
    if n < single:
        return n
    more, last = 0, buckets - single
    while more < last and n**last * single ** (more + 1) >= reach ** (more + 1) * single**last:
        more += 1
    return single + more


def softcap(cap: float) -> ScoreMod:
    """Scores bounded to ``cap * tanh(score / cap)``.

    References
    ----------
    Gemma Team, 2024, https://arxiv.org/abs/2408.00118. The door's `softcap` is the same.

    Examples
    --------
    >>> from nbattn import scores
    >>> round(scores.softcap(30)(1000.0, 0, 0, 0, 0), 3)
    30.0
    """
    number = check.check_number(cap, "cap")
    if number <= 0:
        msg = f"cap must be positive, got {number}"
        raise ValueError(msg)

    def score_mod(score, batch, head, q_index, kv_index, cap=number):
        return cap * math.tanh(score / cap)

    return score_mod


def _table(x: ArrayLike, name: str, ndim: int) -> NDArray[Any]:
    array = check.floating(x, name)
    if array.ndim != ndim or array.size == 0:
        msg = f"{name} has shape {array.shape}; expected {('(heads,)', 'two dimensions')[ndim - 1]}"
        raise ValueError(msg)
    return array


# --- checks -------------------------------------------------------------------------------------------------

INDICES = ("batch", "head", "q_index", "kv_index")
TAKES = {"score_mod": ("score", *INDICES), "mask_mod": INDICES}
"""What each is called with, before `mod_args`."""
GIVES = {"score_mod": "a number, the new score", "mask_mod": "a bool, whether the query sees the key"}


def check_mods(score_mod: Any, mask_mod: Any, mod_args: Any) -> tuple[Mod | None, Mod | None]:
    """Both functions with their arguments."""
    if not isinstance(mod_args, (tuple, list)):
        msg = f"mod_args must be a tuple, got {type(mod_args).__name__}"
        raise TypeError(msg)
    arguments = tuple(_argument(x, f"mod_args[{i}]") for i, x in enumerate(mod_args))
    mods = [
        None if function is None else check_mod(function, name, arguments)
        for name, function in (("score_mod", score_mod), ("mask_mod", mask_mod))
    ]
    if arguments and not any(mod and mod.arguments and mod.arguments[0] is arguments[0] for mod in mods):
        takers = " and ".join(mod.label for mod in mods if mod) or "there is no score_mod or mask_mod, which"
        msg = f"mod_args has {len(arguments)} entries, but {takers} takes none of them"
        raise TypeError(msg)
    return mods[0], mods[1]


def check_mod(function: Any, name: str, arguments: tuple[Any, ...] = ()) -> Mod:
    """A function, `name` "score_mod" or "mask_mod", that takes all of these arguments or none of them.

    What has a default is an argument too: the default, passed anew with each call.
    """
    plain = getattr(function, "py_func", function)  # of an @njit function
    if not inspect.isfunction(plain):
        msg = f"{name} must be a Python function (def, lambda or @njit), got {type(function).__name__}"
        raise TypeError(msg + _instead(function))
    code, defaults = plain.__code__, plain.__defaults__ or ()
    label = f"{name} {plain.__name__!r} ({code.co_filename}:{code.co_firstlineno})"
    takes = TAKES[name]
    more = code.co_argcount - len(takes) - len(defaults)
    takes_rest = bool(code.co_flags & inspect.CO_VARARGS)
    strange = code.co_kwonlyargcount or code.co_flags & inspect.CO_VARKEYWORDS or (takes_rest and defaults)
    takes_them = more in (0, len(arguments)) or (takes_rest and more <= len(arguments))
    if strange or not takes_them:
        count = code.co_argcount - len(defaults)
        number = "keyword arguments" if strange else f"{count} argument{'s' * (count != 1)}"
        rest = f", and the {len(arguments)} of mod_args" * bool(arguments)
        msg = f"{label} takes {number}; expected {len(takes)}: ({', '.join(takes)}){rest}"
        raise TypeError(msg)
    given = arguments if more or takes_rest else ()
    own = tuple(_argument(x, f"a default of {label}") for x in defaults)
    return Mod(plain, name, given + own, label)


def _instead(x: Any) -> str:
    """What to pass in place of something that is no function but can be called."""
    if isinstance(x, partial):
        return "; pass the function that it holds, and what it binds, in order, as mod_args"
    if isinstance(x, (BuiltinFunctionType, np.ufunc)):
        return "; call it in a function of your own"
    if callable(x) and not isinstance(x, type):
        return "; pass a function, and what it reads of the object as mod_args"
    return ""


def _argument(x: Any, name: str) -> Any:
    """A C-contiguous array of numbers, or an int, a float or a bool."""
    array = check.as_array(x, name)
    if array.dtype.name in ("float16", "bfloat16"):
        array = array.astype(np.float32)  # Numba computes with neither
    elif array.dtype.kind in "iu" and array.dtype.itemsize < 8:
        array = array.astype(np.int64)  # in which Numba computes; NumPy's small and unsigned ones wrap around
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        msg = f"{name} has dtype {array.dtype}; expected an array of numbers or bools, or one of these"
        raise TypeError(msg)
    if array.ndim:
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("=")).view()
        array.setflags(write=False)  # it may be the caller's own
        return array
    if array.dtype.kind == "u" and array > np.iinfo(np.int64).max:
        msg = f"{name} is {array}; expected less than 2**63"
        raise ValueError(msg)
    return array.item()


def is_number(x: Any, name: str) -> bool:
    """Whether a function of this name may return x."""
    kinds = "biuf" if name == "score_mod" else "biu"
    return np.ndim(x) == 0 and np.asarray(x).dtype.kind in kinds
