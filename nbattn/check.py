"""The checks every door shares: one clear sentence for a wrong argument, before anything is written."""

from __future__ import annotations

import math
import operator
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import device
from .device import DeviceArray
from .problem import UNBOUNDED, storage_name

ON_GPU = ("attention", "softmax", "decode", "append")
ON_GPU_DOORS = (
    "scaled_dot_product_attention, varlen_attention, paged_attention, softmax, log_softmax, logsumexp, and "
    'KVCache and PagedKVCache that are made with backend="cuda"'
)


def backend_module(stem: str, backend: str | None) -> ModuleType:
    """The module that does the work of a door: the one of the same stem in the backend's folder."""
    if backend in (None, "cpu", "reference"):
        return import_module(f".{backend or 'cpu'}.{stem}", __package__)
    if backend != "cuda":
        msg = f"backend is {backend!r}; expected None, 'cpu', 'reference' or 'cuda'"
        raise ValueError(msg)
    if stem not in ON_GPU:
        msg = f'backend="cuda" has {ON_GPU_DOORS}; this runs on the CPU alone: pass backend="cpu" or None'
        raise ValueError(msg)
    import_module(".cuda.launch", __package__).require()
    return import_module(f".cuda.{stem}", __package__)


def gpu_backend(backend: str | None, array: DeviceArray) -> str | None:
    """The backend for arrays on a GPU."""
    if backend in ("cpu", "reference"):
        msg = (
            f"the arrays live on GPU {array.device}, where backend={backend!r} cannot read them; pass copies "
            f'on the host, or backend="cuda"'
        )
        raise ValueError(msg)
    return "cuda" if backend is None else backend


def as_array(x: ArrayLike, name: str) -> Any:
    """Any array the caller has, as a NumPy view where its protocol allows one; a described one as it is."""
    if type(x) is np.ndarray or type(x) is DeviceArray:
        return x
    if device.on_gpu(x):
        msg = f"{name} lives on a GPU; pass a copy of it on the host (on a GPU there are {ON_GPU_DOORS})"
        raise ValueError(msg)
    try:
        if hasattr(x, "__dlpack__") and not hasattr(x, "__array__"):
            return np.from_dlpack(x)  # type: ignore[arg-type]
        return np.asarray(x)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        msg = f"{name} cannot be read as an array: {error}"
        raise TypeError(msg) from error


def floating(x: ArrayLike, name: str) -> NDArray[Any]:
    """`x` as an array of one of the four supported dtypes."""
    array = as_array(x, name)
    if storage_name(array.dtype) is None:
        msg = (
            f"{name} has dtype {array.dtype}; expected float32, float64, float16 or bfloat16 "
            f"(convert it, for example {name}.astype('float32'))"
        )
        raise TypeError(msg)
    return array


def with_leading(array: NDArray[Any], count: int) -> NDArray[Any]:
    """`array` with so many axes of length 1 before its own."""
    if type(array) is DeviceArray:
        return array.with_leading(count)
    return array.reshape((1,) * count + array.shape)


def addressable(array: NDArray[Any]) -> NDArray[Any]:
    """`array` itself if its elements are aligned, native and whole elements apart, else a copy."""
    if type(array) is DeviceArray:
        return _on_gpu_as_it_is(array)
    if array.flags.aligned and array.dtype.isnative and not any(s % array.itemsize for s in array.strides):
        return array
    return array.astype(array.dtype.newbyteorder("="), order="C")


def kernel_view(array: NDArray[Any]) -> NDArray[Any]:
    """`array` itself if kernels can read it where it lies, else a contiguous copy.

    Kernels count strides in elements; those of the CPU read the last axis as a run of memory.
    """
    if type(array) is DeviceArray:
        return _on_gpu_as_it_is(array)
    last = array.shape[-1] <= 1 or array.strides[-1] == array.itemsize
    return addressable(array if last else np.ascontiguousarray(array))


def _on_gpu_as_it_is(array: DeviceArray) -> Any:
    """`array` itself: nothing is copied on a GPU."""
    if array.address % array.itemsize or any(stride % array.itemsize for stride in array.strides):
        msg = f"an array of {array.dtype} on a GPU is not aligned; pass a contiguous copy of it"
        raise ValueError(msg)
    return array


def check_inputs(
    query: ArrayLike, key: ArrayLike, value: ArrayLike
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """The three inputs as arrays of one supported dtype."""
    q, k, v = floating(query, "query"), floating(key, "key"), floating(value, "value")
    if not q.dtype == k.dtype == v.dtype:
        msg = f"query, key and value have dtypes {q.dtype}, {k.dtype} and {v.dtype}; all three must share one"
        raise TypeError(msg)
    return q, k, v


def missing_dimensions(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any]) -> int:
    """How many leading dimensions of (B, H, S, D) all three inputs leave out."""
    if not q.ndim == k.ndim == v.ndim or not 2 <= q.ndim <= 4:
        msg = (
            f"query, key and value have {q.ndim}, {k.ndim} and {v.ndim} dimensions; "
            f"expected the same number, 2 to 4: (batch, heads, positions, head_dim)"
        )
        raise ValueError(msg)
    return 4 - q.ndim


def check_heads(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any]) -> None:
    """Head dimensions, key counts and head counts of (B, H, S, D) arrays fit each other."""
    if q.shape[-1] != k.shape[-1]:
        msg = f"query has head_dim {q.shape[-1]} but key has {k.shape[-1]}; both must match"
        raise ValueError(msg)
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        msg = f"head_dim must be at least 1, got {q.shape[-1]} for query and {v.shape[-1]} for value"
        raise ValueError(msg)
    if k.shape[2] != v.shape[2]:
        msg = f"key has {k.shape[2]} positions but value has {v.shape[2]}; both must match"
        raise ValueError(msg)
    if k.shape[1] != v.shape[1]:
        msg = f"key has {k.shape[1]} heads but value has {v.shape[1]}; both must match"
        raise ValueError(msg)
    if q.shape[0] != k.shape[0] or q.shape[0] != v.shape[0]:
        sizes = f"{q.shape[0]}, {k.shape[0]} and {v.shape[0]}"
        msg = f"query, key and value have batch sizes {sizes}; all must match"
        raise ValueError(msg)
    if q.shape[1] != k.shape[1] and (k.shape[1] == 0 or q.shape[1] % k.shape[1]):
        msg = (
            f"query has {q.shape[1]} heads and key has {k.shape[1]}; "
            f"the number of query heads must be a multiple of the number of key heads"
        )
        raise ValueError(msg)


def check_number(x: Any, name: str) -> float:
    """A finite real number."""
    if isinstance(x, (str, bytes, bool, complex, np.bool_, np.complexfloating)) or np.ndim(x):
        msg = f"{name} must be a number, got {type(x).__name__}"
        raise TypeError(msg)
    try:
        number = float(x)
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError):
        msg = f"{name} must be a number, got {type(x).__name__}"
        raise TypeError(msg) from None
    if not math.isfinite(number):
        msg = f"{name} must be finite, got {number}"
        raise ValueError(msg)
    return number


def check_scale(scale: float | None, head_dim: int, compute: Any) -> float:
    """The given scale, or 1/sqrt(head_dim)."""
    return 1.0 / math.sqrt(head_dim) if scale is None else _check_fits(scale, "scale", compute)


def _check_fits(x: Any, name: str, compute: Any) -> float:
    """A number that is finite in the compute dtype too."""
    number = check_number(x, name)
    if abs(number) > float(np.finfo(compute).max):
        msg = f"{name} is {number}, too large for {np.dtype(compute).name} arithmetic"
        raise ValueError(msg)
    return number


def check_softcap(softcap: float | None, compute: Any) -> float:
    """The given positive softcap, or 0 for none."""
    if softcap is None:
        return 0.0
    cap = _check_fits(softcap, "softcap", compute)
    if cap < 0:
        msg = f"softcap must be positive (0 or None for none), got {cap}"
        raise ValueError(msg)
    return cap


def check_compute_dtype(compute_dtype: str | None, storage: str) -> bool:
    """Whether the products take bfloat16 operands."""
    if compute_dtype is None:
        return False
    if compute_dtype != "bfloat16" or storage != "float32":
        got = f"{compute_dtype!r} with {storage} inputs"
        msg = f"compute_dtype is {got}; expected None or 'bfloat16' with float32"
        raise ValueError(msg)
    return True


def check_int(x: Any, name: str) -> int:
    """A whole number; bool is not one."""
    if isinstance(x, (bool, np.bool_)):
        msg = f"{name} must be an integer, got bool"
        raise TypeError(msg)
    try:
        return operator.index(x)
    except TypeError:
        msg = f"{name} must be an integer, got {type(x).__name__}"
        raise TypeError(msg) from None


def check_flag(x: Any, name: str) -> bool:
    """True or False, and nothing that merely looks like it."""
    if not isinstance(x, (bool, np.bool_)):
        msg = f"{name} must be True or False, got {type(x).__name__}"
        raise TypeError(msg)
    return bool(x)


def check_rng(rng: Any) -> np.random.Generator:
    try:
        return np.random.default_rng(rng)
    except (TypeError, ValueError) as error:
        msg = f"rng is {rng!r}; expected None, a seed (a non-negative int) or a numpy.random.Generator"
        raise type(error)(msg) from error


def on_host(x: ArrayLike, name: str) -> NDArray[Any]:
    """An array whose elements are looked at here."""
    if device.on_gpu(x):
        reason = "its numbers are checked, and reading them there would wait for the GPU"
        msg = f"{name} lives on a GPU; pass a NumPy array or a list, as {reason}"
        raise ValueError(msg)
    return as_array(x, name)


def check_int_vector(x: ArrayLike, name: str, length: int) -> NDArray[np.int64]:
    """A 1-D integer array of the given length, as int64."""
    array = on_host(x, name)
    if array.dtype.kind not in "iu":
        msg = f"{name} must hold integers, got dtype {array.dtype}"
        raise TypeError(msg)
    if array.shape != (length,):
        msg = f"{name} has shape {array.shape}; expected ({length},)"
        raise ValueError(msg)
    if array.dtype == np.uint64:  # of which the largest must not turn into negative ones
        array = np.minimum(array, np.iinfo(np.int64).max)
    # A copy: the caller may change the array while kernels rely on what was checked.
    return np.array(array, dtype=np.int64)


def check_window(window_size: Any, is_causal: bool) -> tuple[int, int]:
    """(left, right) with UNBOUNDED for an open side; causal closes the right side at 0."""
    left = right = UNBOUNDED
    if window_size is not None:
        sides = tuple(window_size) if isinstance(window_size, (tuple, list, np.ndarray)) else ()
        if len(sides) != 2:
            msg = f"window_size must be a pair (left, right), got {window_size!r}"
            raise (ValueError if sides else TypeError)(msg)
        left, right = (_window_side(side) for side in sides)
    return left, min(right, 0) if is_causal else right


def _window_side(side: Any) -> int:
    if side is None:
        return UNBOUNDED
    width = check_int(side, "window_size")
    if width < -1:
        msg = f"window_size must hold non-negative integers (None or -1 for unbounded), got {width}"
        raise ValueError(msg)
    return UNBOUNDED if width == -1 else min(width, UNBOUNDED)


def check_key_lengths(key_lengths: ArrayLike | None, limits: NDArray[np.int64]) -> NDArray[np.int64]:
    """Lengths of each sequence's keys, within `limits` (B,)."""
    if key_lengths is None:
        return limits
    lengths = check_int_vector(key_lengths, "key_lengths", len(limits))
    if (lengths < 0).any() or (lengths > limits).any():
        b = int(np.flatnonzero((lengths < 0) | (lengths > limits))[0])
        msg = f"key_lengths[{b}] is {lengths[b]}; expected 0 to {limits[b]}, the number of keys"
        raise ValueError(msg)
    return lengths


def check_offset(
    query_offset: Any, query_lengths: NDArray[np.int64], key_lengths: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The position of each sequence's first query among its keys, (B,)."""
    batch = len(query_lengths)
    if isinstance(query_offset, str):
        if query_offset != "end":
            msg = f"query_offset must be an integer, an integer array or 'end', got {query_offset!r}"
            raise ValueError(msg)
        return key_lengths - query_lengths
    if device.on_gpu(query_offset):
        query_offset = on_host(query_offset, "query_offset")  # which says that it cannot
    if np.ndim(query_offset) == 0:
        offset = check_int(np.asarray(query_offset)[()], "query_offset")
        if abs(offset) >= UNBOUNDED:
            msg = f"query_offset must be smaller than 2**40 in size, got {offset}"
            raise ValueError(msg)
        return np.full(batch, offset, np.int64)
    offsets = check_int_vector(query_offset, "query_offset", batch)
    if ((offsets <= -UNBOUNDED) | (offsets >= UNBOUNDED)).any():
        msg = "query_offset must be smaller than 2**40 in size"
        raise ValueError(msg)
    return offsets


def check_per_head(x: ArrayLike | None, name: str, heads: int, compute: Any) -> NDArray[Any] | None:
    """One floating number per query head, in the compute dtype."""
    if x is None:
        return None
    array = floating(x, name)
    if array.shape != (heads,):
        msg = f"{name} has shape {array.shape}; expected ({heads},), one for each query head"
        raise ValueError(msg)
    if type(array) is DeviceArray:
        if array.dtype != np.dtype(compute) or array.strides != (array.itemsize,):
            expected = f"a contiguous array of {np.dtype(compute).name}"
            msg = f"{name} on a GPU has dtype {array.dtype} and strides {array.strides}; expected {expected}"
            raise TypeError(msg)
        return array
    return np.ascontiguousarray(array, dtype=compute)


def check_mask(mask: Any, shape: tuple[int, int, int, int]) -> NDArray[Any] | None:
    """A mask broadcast to (B, Hq, Sq, Sk): bytes, along the keys a run of memory or one for all."""
    if mask is None:
        return None
    array = _broadcast(mask_array(mask), "mask", shape)
    if type(array) is DeviceArray:
        return array
    if array.itemsize == 1 and array.strides[-1] in (0, 1):
        return array
    return np.broadcast_to(np.not_equal(_once(array), 0, order="C"), shape)


def mask_array(mask: Any) -> NDArray[Any]:
    """A mask as an array of bools or integers."""
    array = as_array(mask, "mask")
    if array.dtype.kind in "biu":
        return array
    if callable(mask):
        msg = "mask is a function; pass it as mask_mod, or BlockMask.from_mask_mod of it as mask"
    elif hasattr(mask, "tocsr"):  # of scipy.sparse
        msg = f"mask is a {type(mask).__name__}; pass BlockMask.from_sparse of it"
    else:
        kind = "pass a floating mask as bias" if storage_name(array.dtype) else "use bool or integers"
        msg = f"mask has dtype {array.dtype}; expected bool or integer where nonzero means attend ({kind})"
    raise TypeError(msg)


def check_bias(bias: Any, shape: tuple[int, int, int, int]) -> NDArray[Any] | None:
    """A floating bias, broadcast to (B, Hq, Sq, Sk)."""
    if bias is None:
        return None
    array = as_array(bias, "bias")
    if storage_name(array.dtype) is None:
        kind = "pass a boolean or integer mask as mask" if array.dtype.kind in "biu" else "convert it"
        msg = f"bias has dtype {array.dtype}; expected float32, float64, float16 or bfloat16 ({kind})"
        raise TypeError(msg)
    array = _broadcast(array, "bias", shape)
    if type(array) is DeviceArray:
        return array
    if array.strides[-1] in (0, array.itemsize):
        return array
    return np.broadcast_to(np.ascontiguousarray(_once(array)), shape)


def _once(array: NDArray[Any]) -> NDArray[Any]:
    """`array` with length 1 where its axes are broadcast."""
    return array[tuple(slice(1 if stride == 0 else None) for stride in array.strides)]


def _broadcast(array: NDArray[Any], name: str, shape: tuple[int, int, int, int]) -> NDArray[Any]:
    fits = array.ndim <= 4 and all(
        have in (1, want) for have, want in zip(array.shape[::-1], shape[::-1], strict=False)
    )
    if not fits:
        msg = f"{name} has shape {array.shape}; it must broadcast to (batch, heads, queries, keys) = {shape}"
        raise ValueError(msg)
    return broadcast(addressable(array), shape)


def broadcast(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    if type(array) is DeviceArray:
        return array.broadcast(shape)
    return np.broadcast_to(array, shape)


def new_array(like: NDArray[Any] | None, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Where results go: memory of the host, or where `like` is on a GPU, of that GPU and its library."""
    if type(like) is DeviceArray:
        return device.new(like, shape, np.dtype(dtype) if isinstance(dtype, type) else dtype)
    return np.empty(shape, dtype)


def check_out(
    out: Any,
    shape: tuple[int, ...],
    dtype: Any,
    inputs: tuple[NDArray[Any] | None, ...],
    like: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """A writable array of the result's shape and dtype that overlaps no input; a new one if None is given.

    It lies where `like` does.
    """
    if out is None:
        return new_array(like, shape, dtype)
    if type(like) is DeviceArray:
        out = as_array(out, "out")
    elif not isinstance(out, np.ndarray):
        msg = f"out must be a numpy array, got {type(out).__name__}"
        raise TypeError(msg)
    if out.shape != shape:
        msg = f"out has shape {out.shape}; expected {shape}"
        raise ValueError(msg)
    if out.dtype != dtype:
        msg = f"out has dtype {out.dtype}; expected {dtype}"
        raise ValueError(msg)
    if not (out if type(out) is DeviceArray else out.flags).writeable:
        msg = "out is read-only; pass a writable array"
        raise ValueError(msg)
    if out.size and any(
        stride == 0 and size > 1 for stride, size in zip(out.strides, out.shape, strict=True)
    ):
        msg = "out has a broadcast axis (stride 0): several results would share one place; pass a plain array"
        raise ValueError(msg)
    if any(x is not None and _overlap(out, x) for x in inputs):
        msg = "out shares memory with an input; pass a separate array"
        raise ValueError(msg)
    return out


def _overlap(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Whether two arrays share an element; undecided within the work limit counts as yes."""
    if type(a) is DeviceArray or type(b) is DeviceArray:
        return _extents_overlap(a, b)
    try:
        return np.shares_memory(a, b, max_work=100_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _extents_overlap(a: Any, b: Any) -> bool:
    """Whether two arrays on a GPU reach into one another; what is on the host is elsewhere."""
    if type(a) is not type(b):
        return False
    (a_first, a_end), (b_first, b_end) = a.extent, b.extent
    return a_first < b_end and b_first < a_end
