"""Softmax, log-softmax and log-sum-exp: docstring, checks, dispatch. Formulas in `reference/softmax.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import check, device
from .device import DeviceArray


def softmax(
    x: ArrayLike,
    axis: int | tuple[int, ...] | None = -1,
    *,
    where: ArrayLike | None = None,
    scale: float = 1.0,
    out: NDArray[Any] | None = None,
    backend: str | None = None,
) -> NDArray[Any]:
    r"""Softmax along an axis: ``exp(scale * x) / sum(exp(scale * x))``, without overflow.

    NaN and inf mean what they mean in `scipy.special.softmax`.

    Parameters
    ----------
    x : array_like
        Any shape; float32, float64, float16 or bfloat16. Integers and bools are read as float64. float16 and
        bfloat16 are computed in float32.
    axis : int, tuple of int or None
        What to sum over; None for everything.
    where : array_like of bool or int, optional
        Broadcastable to x. Entries where it is 0 do not exist: they add nothing, whatever x holds there, and
        their result is 0.
    scale : float
        Multiplies x first (an inverse temperature).
    out : ndarray, optional
        Where to write the result: right shape and dtype, writable, no memory shared with x.
    backend : {None, "cpu", "reference", "cuda"}
        None chooses by where x lives: an array on an NVIDIA GPU is read where it lies, and the result is an
        array of the same library. "cuda" with an array of the host copies it to the current GPU and back.

    Returns
    -------
    ndarray
        Shaped as x, in its dtype (float64 for integers). A row without entries is 0.

    Raises
    ------
    TypeError
        For a wrong kind: complex x, a floating `where`, an axis that is no integer.
    ValueError
        For a wrong value: an axis that x lacks, shapes that do not fit, a wrong `out`, an unknown backend.

    See Also
    --------
    scipy.special.softmax : The same without `where`, `scale` and `out`.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn import softmax
    >>> softmax(np.log([1.0, 2.0, 5.0]))
    array([0.125, 0.25 , 0.625])
    >>> softmax([[0, 0, 9], [0, 0, 0]], where=[True, True, False])
    array([[0.5, 0.5, 0. ],
           [0.5, 0.5, 0. ]])
    """
    return _elementwise("softmax", x, axis, where, scale, out, backend)


def log_softmax(
    x: ArrayLike,
    axis: int | tuple[int, ...] | None = -1,
    *,
    where: ArrayLike | None = None,
    scale: float = 1.0,
    out: NDArray[Any] | None = None,
    backend: str | None = None,
) -> NDArray[Any]:
    r"""Logarithm of softmax along an axis: ``scale * x - log(sum(exp(scale * x)))``, without overflow.

    Exact where ``log(softmax(x))`` would lose digits or give -inf. NaN and inf mean what they mean in
    `scipy.special.log_softmax`.

    Parameters
    ----------
    x, axis, where, scale, out, backend
        As in `softmax`; where `where` is 0, the result is -inf.

    Returns
    -------
    ndarray
        Shaped as x, in its dtype (float64 for integers).

    Raises
    ------
    TypeError, ValueError
        As `softmax`.

    See Also
    --------
    scipy.special.log_softmax : The same without `where`, `scale` and `out`.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn import log_softmax
    >>> log_softmax([1000.0, 1.0])
    array([   0., -999.])
    """
    return _elementwise("log_softmax", x, axis, where, scale, out, backend)


def logsumexp(
    x: ArrayLike,
    axis: int | tuple[int, ...] | None = -1,
    *,
    where: ArrayLike | None = None,
    scale: float = 1.0,
    keepdims: bool = False,
    out: NDArray[Any] | None = None,
    backend: str | None = None,
) -> Any:
    r"""Logarithm of the sum of exponentials along an axis: ``log(sum(exp(scale * x)))``, without overflow.

    NaN and inf mean what they mean in `scipy.special.logsumexp`.

    Parameters
    ----------
    x, axis, where, scale, out, backend
        As in `softmax`; out has the shape without the summed axes.
    keepdims : bool
        Keep the summed axes with length 1.

    Returns
    -------
    ndarray or scalar
        x's shape without the summed axes, in its dtype (float64 for integers). -inf where there are no
        entries.

    Raises
    ------
    TypeError, ValueError
        As `softmax`.

    See Also
    --------
    scipy.special.logsumexp : With factors `b` in place of `where`.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn import logsumexp
    >>> logsumexp([1000.0, 1000.0]).round(6)
    np.float64(1000.693147)
    >>> logsumexp(np.zeros((2, 3)), axis=0, where=[[True, True, False], [True, False, False]])
    array([0.69314718, 0.        ,       -inf])
    """
    layout = None
    if where is out is backend is None:
        layout = _layout("logsumexp", x, axis, scale, keepdims)
        repeat = _repeats.get(layout)
        if repeat is not None:
            return repeat(x)[()]
    backend, x, where, out = _placed(backend, x, where, out)
    call = _call(x, axis, where, scale, backend)
    keep = check.check_flag(keepdims, "keepdims")
    shape = tuple(
        1 if i in call.axes else n for i, n in enumerate(call.x.shape) if keep or i not in call.axes
    )
    dtype = call.x.dtype
    result = check.check_out(out, shape, dtype, (call.x, call.where), call.x)
    if type(call.x) is DeviceArray:
        return _on_gpu("logsumexp", call, result, layout)
    outer, _, inner = call.rows
    target = check.addressable(result.reshape(outer, inner))
    call.module.logsumexp(call.in_rows(call.x), call.in_rows(call.where), call.scale, target)
    if not np.may_share_memory(target, result):
        result[...] = target.reshape(shape)
    if layout is not None:
        _remember(layout, call, x, target, lambda _: np.empty(shape, dtype))
    return result[()] if out is None else result


class _Call(NamedTuple):
    """The arguments that all three share, checked. Kernels see (outer, n, inner) arrays and reduce over n."""

    module: ModuleType
    x: NDArray[Any]
    where: NDArray[np.bool_] | None  # x's shape
    scale: float
    axes: set[int]  # n is these together
    order: tuple[int, ...]  # the axes of x in an order that has `axes` next to each other
    rows: tuple[int, int, int]  # outer, n, inner

    def in_rows(self, array: NDArray[Any] | None) -> Any:
        """An array of x's shape as (outer, n, inner): a view where its strides allow."""
        return None if array is None else array.transpose(self.order).reshape(self.rows)


def _call(x: ArrayLike, axis: Any, where: Any, scale: float, backend: str | None) -> _Call:
    module = check.backend_module("softmax", backend)
    array = check.as_array(x, "x")
    if array.dtype.kind in "biu" and type(array) is not DeviceArray:
        array = array.astype(np.float64)
    array = check.addressable(check.floating(array, "x"))
    axes = _axes(axis, array.ndim)
    before = [i for i in range(array.ndim) if i < min(axes, default=array.ndim)]
    after = [i for i in range(array.ndim) if i > max(axes, default=array.ndim)]
    if len(before) + len(axes) + len(after) < array.ndim:
        before, after = [i for i in range(array.ndim) if i not in axes], []
    sizes = [math.prod(array.shape[i] for i in part) for part in (before, axes, after)]
    return _Call(
        module,
        array,
        _present(where, array.shape),
        check.check_number(scale, "scale"),
        axes,
        (*before, *sorted(axes), *after),
        (sizes[0], sizes[1], sizes[2]),
    )


def _placed(backend: str | None, x: Any, where: Any, out: Any) -> tuple[str | None, Any, Any, Any]:
    """The backend for arrays as they lie, and these; described, where they lie on a GPU."""
    found = device.placed({"x": x, "where": where, "out": out}, {})
    if not found:
        return backend, x, where, out
    return check.gpu_backend(backend, found["x"]), found["x"], found["where"], found["out"]


def _axes(axis: Any, ndim: int) -> set[int]:
    """The axes to sum over, counted from 0."""
    if axis is None:
        return set(range(ndim))
    numbers = [check.check_int(a, "axis") for a in (axis if isinstance(axis, tuple) else (axis,))]
    for number in numbers:
        if not -ndim <= number < ndim:
            msg = f"axis is {number}, but x has {ndim} dimensions"
            raise ValueError(msg)
    axes = {number % ndim for number in numbers}
    if len(axes) < len(numbers):
        msg = f"axis names a dimension twice: {axis}"
        raise ValueError(msg)
    return axes


def _present(where: Any, shape: tuple[int, ...]) -> NDArray[np.bool_] | None:
    """`where` as bools in x's shape."""
    if where is None:
        return None
    array = check.as_array(where, "where")
    if array.dtype.kind not in "biu":
        msg = f"where has dtype {array.dtype}; expected bool or integer where nonzero means present"
        raise TypeError(msg)
    if type(array) is DeviceArray and array.fits(shape):
        return array.broadcast(shape)  # type: ignore[return-value]
    try:
        return np.broadcast_to(array if array.dtype == np.bool_ else array != 0, shape)
    except (TypeError, ValueError):
        msg = f"where has shape {array.shape}, which does not broadcast to x's {shape}"
        raise ValueError(msg) from None


def _elementwise(
    name: str,
    x: ArrayLike,
    axis: Any,
    where: Any,
    scale: float,
    out: NDArray[Any] | None,
    backend: str | None,
) -> NDArray[Any]:
    """Run the function `name`, whose result is shaped as x."""
    layout = None
    if where is out is backend is None:
        layout = _layout(name, x, axis, scale)
        repeat = _repeats.get(layout)
        if repeat is not None:
            return repeat(x)
    backend, x, where, out = _placed(backend, x, where, out)
    call = _call(x, axis, where, scale, backend)
    if type(call.x) is DeviceArray:
        result = check.check_out(out, call.x.shape, call.x.dtype, (call.x, call.where), call.x)
        return _on_gpu(name, call, result, layout)
    if out is None:
        result = np.empty_like(call.x)  # in the order of x's axes in memory: read and written alike
    else:
        result = check.check_out(out, call.x.shape, call.x.dtype, (call.x, call.where))
    target = check.addressable(call.in_rows(result))
    run = getattr(call.module, name)
    run(call.in_rows(call.x), call.in_rows(call.where), call.scale, target, fresh=out is None)
    if not np.may_share_memory(target, result):
        ordered = result.transpose(call.order)
        ordered[...] = target.reshape(ordered.shape)
    elif layout is not None:
        _remember(layout, call, x, target, np.empty_like)
    return result


# --- calls that repeat an earlier one -----------------------------------------------------------------------

_repeats: dict[Any, Any] = {}
"""By layout: calls whose checks have been done. A small call is then little more than its kernel."""
REPEATS = 256
_PLAIN = frozenset((bool, int, float, type(None)))


def _layout(name: str, x: Any, *options: Any) -> Any:
    """Everything that decides how a call goes, as a key; None where it cannot be one."""
    types = tuple(map(type, options))  # True is no 1
    if not _PLAIN.issuperset(types):
        return None
    if type(x) is not np.ndarray:
        place = device.layout(x)
        return None if place is None else (name, place, options, types)
    return name, x.shape, x.strides, x.dtype, x.flags.aligned, options, types


def _on_gpu(name: str, call: _Call, result: Any, layout: Any) -> Any:
    """Run the function of this name on a GPU, and make calls of this layout short from the third on."""
    arguments = name, call.x, call.where, call.scale, result, call.axes
    call.module.along(*arguments)
    if layout in _repeats:
        _repeats[layout] = device.repeated(call.module.Repeat(*arguments).forward, result, result.shape)
    elif layout is not None:
        if len(_repeats) >= REPEATS:
            _repeats.clear()
        _repeats[layout] = None
    return device.given_back(result)


def _remember(layout: Any, call: _Call, x: Any, target: NDArray[Any], new: Callable[[Any], Any]) -> None:
    """Make calls of this layout short from the third on."""
    if len(_repeats) >= REPEATS:
        _repeats.clear()
    if layout not in _repeats:
        _repeats[layout] = None
        return
    rows = call.in_rows(call.x)
    if not np.may_share_memory(rows, x):
        return  # each such call copies x
    run = call.module.repeat(layout[0], rows, call.scale, target)
    if run is None:
        return

    def repeat(x: NDArray[Any]) -> NDArray[Any]:
        out = new(x)
        run(x, out)
        return out

    _repeats[layout] = repeat
