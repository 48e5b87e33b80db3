"""Arrays on a GPU: where they lie, as NumPy would describe it, and the libraries that they belong to.

Nothing here reads an element or imports a library: who has an array of one has loaded it. PyTorch and CuPy
say which stream is current, and work joins it; they and Numba make the results. Of other libraries an array
is taken by `__cuda_array_interface__` or DLPack, and results go back by DLPack once they are there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

GPU_MEMORY = (2, 13)
"""DLPack's numbers of CUDA's memory, plain and managed."""


class Bfloat16:
    """Stands for the dtype that NumPy lacks, where no `ml_dtypes` is loaded."""

    name = "bfloat16"
    itemsize = 2
    kind = "V"
    isnative = True

    def __eq__(self, other: object) -> bool:
        return getattr(other, "name", None) == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return self.name


class OtherDtype(Bfloat16):
    """A dtype that kernels do not know either, as those of 8 bits."""

    def __init__(self, name: str, itemsize: int) -> None:
        self.name, self.itemsize = name, itemsize


@dataclass(frozen=True, slots=True, eq=False)
class DeviceArray:
    """Where an array lies on a GPU. It has what doors ask of NumPy's arrays, and no elements."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes
    dtype: Any
    device: int  # the GPU's ordinal
    stream: int = 0  # where work on it goes
    owner: Any = None  # the caller's array, or what keeps the memory
    writeable: bool = True

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def size(self) -> int:
        size = 1
        for n in self.shape:
            size *= n
        return size

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize

    @property
    def extent(self) -> tuple[int, int]:
        """The first byte and the one after the last."""
        if self.size == 0:
            return self.address, self.address
        reach = [stride * (n - 1) for stride, n in zip(self.strides, self.shape, strict=True)]
        first = self.address + sum(step for step in reach if step < 0)
        return first, self.address + sum(step for step in reach if step > 0) + self.itemsize

    def transpose(self, *axes: int) -> DeviceArray:
        shape, strides = (tuple(x[i] for i in axes) for x in (self.shape, self.strides))
        return replace(self, shape=shape, strides=strides)

    def with_leading(self, count: int) -> DeviceArray:
        """With so many more axes of length 1 before the others."""
        return replace(self, shape=(1,) * count + self.shape, strides=(0,) * count + self.strides)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it broadcasts to a shape."""
        pairs = zip(self.shape[::-1], shape[::-1], strict=False)
        return self.ndim <= len(shape) and all(have in (1, want) for have, want in pairs)

    def broadcast(self, shape: tuple[int, ...]) -> DeviceArray:
        """As NumPy's `broadcast_to`, for a shape that fits."""
        more = len(shape) - self.ndim
        strides = (0,) * more + tuple(
            0 if n == 1 else stride for n, stride in zip(self.shape, self.strides, strict=True)
        )
        return replace(self, shape=shape, strides=strides)


def on_gpu(x: Any) -> bool:
    """Whether an array lies on a GPU."""
    if type(x) in _NEVER:
        return False
    if type(x) is DeviceArray:
        return True
    if (torch := _loaded("torch", x)) is not None and isinstance(x, torch.Tensor):
        return bool(x.is_cuda)
    if (cupy := _loaded("cupy", x)) is not None:
        return isinstance(x, cupy.ndarray)
    try:
        if hasattr(x, "__cuda_array_interface__"):
            return True
        return hasattr(x, "__dlpack_device__") and x.__dlpack_device__()[0] in GPU_MEMORY
    except Exception:  # another library's, about an array that it cannot share
        return False


_NEVER = frozenset((np.ndarray, list, tuple, int, float, bool, str, type(None)))


def describe(x: Any, name: str) -> DeviceArray:
    """Where the array lies that the caller has on a GPU."""
    if type(x) is DeviceArray:
        return x
    if (torch := _loaded("torch", x)) is not None:
        return _describe_torch(torch, x, name)
    if (cupy := _loaded("cupy", x)) is not None:
        stream = cupy.cuda.get_current_stream().ptr
        return DeviceArray(x.data.ptr, x.shape, x.strides, x.dtype, x.device.id, stream, x)
    from .cuda import exchange

    return exchange.describe(x, name)


def _describe_torch(torch: Any, x: Any, name: str) -> DeviceArray:
    if x.requires_grad and torch.is_grad_enabled():
        msg = f"{name} requires grad, and no gradients are computed here; pass {name}.detach()"
        raise ValueError(msg)
    if x.layout is not torch.strided:
        msg = f"{name} is a tensor of layout {x.layout}; pass a dense one, as {name}.to_dense()"
        raise TypeError(msg)
    size, ordinal = x.element_size(), x.device.index
    strides = tuple(stride * size for stride in x.stride())
    dtype = dtype_of(str(x.dtype).partition(".")[2], size)
    return DeviceArray(
        x.data_ptr(), tuple(x.shape), strides, dtype, ordinal, _torch_stream(torch, ordinal), x
    )


def _torch_stream(torch: Any, ordinal: int) -> int:
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # the same without an object for it
    return raw(ordinal) if raw else torch.cuda.current_stream(ordinal).cuda_stream


def current_stream(ordinal: int, of_cupy: bool = False) -> int:
    """The stream that is current on a GPU: PyTorch's where it is loaded, or CuPy's, else the default one.

    CuPy's comes first where asked for.
    """
    torch: Any = sys.modules.get("torch")
    # Builds for the CPU have `torch.cuda` too, where asking it for a stream fails.
    if not of_cupy and hasattr(torch, "cuda") and hasattr(torch._C, "_cuda_getCurrentRawStream"):
        return _torch_stream(torch, ordinal)
    if (cupy := sys.modules.get("cupy")) is not None:
        with cupy.cuda.Device(ordinal):
            return cupy.cuda.get_current_stream().ptr
    return 0


def dtype_of(name: str, itemsize: int) -> Any:
    """The dtype of this name."""
    if name == "bfloat16":
        return Bfloat16()
    try:
        return np.dtype(name)
    except TypeError:
        return OtherDtype(name, itemsize)


def new(like: DeviceArray, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
    """A new array of the library and on the GPU of another, whose elements may be anything."""
    owner, name = like.owner, dtype.name
    if (torch := _loaded("torch", owner)) is not None:
        made = torch.empty(shape, dtype=getattr(torch, name), device=owner.device)
        return DeviceArray(
            made.data_ptr(), shape, _contiguous(shape, dtype.itemsize), dtype, like.device, like.stream, made
        )
    if (cupy := _loaded("cupy", owner)) is not None:
        with cupy.cuda.Device(like.device):
            made = cupy.empty(shape, owner.dtype if owner.dtype.name == name else name)
        return DeviceArray(made.data.ptr, shape, made.strides, dtype, like.device, like.stream, made)
    from .cuda import exchange

    return exchange.new(like, shape, dtype)


def _contiguous(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The strides of an array in C order."""
    strides = [itemsize]
    for n in shape[:0:-1]:
        strides.append(strides[-1] * max(n, 1))
    return tuple(strides[::-1][: len(shape)]) if shape else ()


def has_stream(array: DeviceArray) -> bool:
    """Whether the array's library has a current stream, in the order of which it uses memory again."""
    return any(is_of(array, library) for library in ("torch", "cupy", "numba", "numba_cuda"))


def is_of(array: Any, library: str) -> bool:
    """Whether an array on a GPU is of the library of this name."""
    return type(array) is DeviceArray and _loaded(library, array.owner) is not None


def given_back(array: Any) -> Any:
    """The caller's own kind of array; of one that is on the host, that itself."""
    if type(array) is not DeviceArray:
        return array
    owner = array.owner
    return owner.handed_over() if hasattr(owner, "handed_over") else owner


def layout(x: Any) -> Any:
    """All that decides how work on an array goes, but its address; None where asking takes time."""
    if (torch := _loaded("torch", x)) is not None and isinstance(x, torch.Tensor) and x.is_cuda:
        if x.requires_grad or x.layout is not torch.strided:
            return None
        return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16
    if _loaded("cupy", x) is not None and hasattr(x, "data"):
        return x.shape, x.strides, x.dtype, x.device.id, x.data.ptr % 16
    return None


def repeated(run: Callable[..., Any], like: DeviceArray, shape: tuple[int, ...]) -> Any:
    """A function of arrays whose `layout` is known that gives the result of `run(*addresses, stream)`.

    The result lies as `like`, of the arrays' library and in that shape. Where `run` says False, it is None.
    """
    owner, ordinal = like.owner, like.device
    if (torch := _loaded("torch", owner)) is not None:
        dtype, place = owner.dtype, owner.device

        def repeat(*arrays: Any) -> Any:
            out = torch.empty(shape, dtype=dtype, device=place)
            done = run(*[x.data_ptr() for x in arrays], out.data_ptr(), _torch_stream(torch, ordinal))
            return None if done is False else out

        return repeat
    cupy: Any = _loaded("cupy", owner)
    dtype = owner.dtype

    def repeat_cupy(*arrays: Any) -> Any:
        with cupy.cuda.Device(ordinal):
            out = cupy.empty(shape, dtype)
            done = run(*[x.data.ptr for x in arrays], out.data.ptr, cupy.cuda.get_current_stream().ptr)
        return None if done is False else out

    return repeat_cupy


def _loaded(library: str, x: Any) -> Any:
    """The library's module where `x` is one of its objects."""
    kind: Any = type(x)
    return sys.modules.get(library) if _root(kind) == library else None


@cache
def _root(kind: Any) -> str:
    """The package that a type comes from."""
    return str(kind.__module__).partition(".")[0]


def placed(large: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a call, described; nothing where none is on a GPU.

    All must be on one GPU; what is small may be on the host.
    """
    found = {name: describe(x, name) for name, x in (large | small).items() if on_gpu(x)}
    if not found:
        return found
    first, array = next(iter(found.items()))
    for name, other in found.items():
        if other.device != array.device:
            msg = f"{first} lives on GPU {array.device} and {name} on GPU {other.device}; all must be on one"
            raise ValueError(msg)
    for name, other in large.items():
        if name not in found and other is not None:
            where = f"{first} lives on GPU {array.device} and {name} on the host"
            msg = f"{where}; copy one of them to where the other is"
            raise ValueError(msg)
    return large | small | found
