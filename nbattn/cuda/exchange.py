"""Arrays of any library, in and out: `__cuda_array_interface__` and DLPack.

What comes by DLPack is taken on the default stream, for which its library has it ready. Libraries that take
results by DLPack alone, as JAX, have no current stream either, so those results are waited for.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np

from ..device import Bfloat16, DeviceArray, OtherDtype, _contiguous
from . import launch

LEGACY_STREAM = 1
"""What both protocols call the default stream."""


def describe(x: Any, name: str) -> DeviceArray:
    """Where an array lies of a library that has no rules of its own here."""
    try:
        interface = getattr(x, "__cuda_array_interface__", None)
    except Exception:  # as JAX for bfloat16, of which it has no name
        interface = None
    # Without a stream there, nobody says when the numbers are ready; DLPack sees to that.
    if interface is not None and ("stream" in interface or not hasattr(x, "__dlpack__")):
        return _from_interface(x, interface)
    if hasattr(x, "__dlpack__"):
        return _from_dlpack(x, name)
    msg = f"{name} lives on a GPU, but shows no memory there; pass an array with __dlpack__"
    raise TypeError(msg)


def _from_interface(x: Any, interface: dict[str, Any]) -> DeviceArray:
    address, read_only = interface["data"]
    dtype = np.dtype(interface["typestr"])
    if dtype.kind == "V" and getattr(getattr(x, "dtype", None), "name", "") == "bfloat16":
        dtype = x.dtype
    shape = tuple(interface["shape"])
    strides = interface.get("strides") or _contiguous(shape, dtype.itemsize)
    device = launch.device_of(address) if address else launch.current_device()
    stream = interface.get("stream") or 0
    return DeviceArray(address or 0, shape, tuple(strides), dtype, device, stream, x, not read_only)


# --- DLPack -------------------------------------------------------------------------------------------------


_Numbers = ctypes.POINTER(ctypes.c_int64)


class Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16), ("shape", _Numbers), ("strides", _Numbers),
        ("offset", ctypes.c_uint64),
    )  # fmt: skip


class Managed(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}
CODES = {kind: code for code, kind in KINDS.items()}
CUDA_DEVICE = 2
_python = ctypes.pythonapi
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", _python)
)
_is_named = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _python))
_raw_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", _python)
)
_Destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, _Destructor)(
    ("PyCapsule_New", _python)
)


def _from_dlpack(x: Any, name: str) -> DeviceArray:
    capsule = x.__dlpack__(stream=LEGACY_STREAM)
    tensor = Managed.from_address(_pointer_of(capsule, b"dltensor")).tensor
    kind = KINDS.get(tensor.code, "other") + ("" if tensor.code == CODES["bool"] else str(tensor.bits))
    size = -(-tensor.bits * tensor.lanes // 8)
    if kind == "bfloat16":
        dtype: Any = Bfloat16()
    else:
        try:
            dtype = np.dtype(kind)
        except TypeError:
            dtype = OtherDtype(kind, size)
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = _contiguous(shape, size)
    if tensor.strides:
        strides = tuple(stride * size for stride in tensor.strides[: tensor.ndim])
    address = (tensor.data or 0) + tensor.offset
    # The capsule keeps the memory; nobody has taken it over, so its own destructor gives it back.
    return DeviceArray(address, shape, strides, dtype, tensor.device, 0, _Held(x, capsule))


class _Held:
    """An array of another library and the capsule that it gave."""

    def __init__(self, array: Any, capsule: Any) -> None:
        self.array, self.capsule = array, capsule


class Memory:
    """Memory of a GPU that goes over to another library by DLPack, and is freed when that lets it go."""

    def __init__(self, array: DeviceArray, library: Any) -> None:
        self.array, self.library = array, library

    def handed_over(self) -> Any:
        """The library's array, once what was launched on it is done."""
        with launch.device(self.array.device).current():
            launch.ask("cuStreamSynchronize", self.array.stream)
        return self.library(self)

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA_DEVICE, self.array.device

    def __dlpack__(self, **options: Any) -> Any:
        return capsule_of(self.array, CUDA_DEVICE, self)

    def __del__(self) -> None:
        launch.free(self.array.address, self.array.device)


_lent: dict[int, Any] = {}
"""What other libraries hold, by the address of its description."""


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _let_go(address: int) -> None:
    _lent.pop(address, None)


@_Destructor
def _unused(capsule: int) -> None:
    """A capsule ends; if nobody has taken its tensor over, that ends too."""
    if _is_named(capsule, b"dltensor"):
        _let_go(_raw_pointer_of(capsule, b"dltensor"))


def capsule_of(array: Any, device_type: int, owner: Any) -> Any:
    """A DLPack capsule of an array, which keeps `owner` alive."""
    name = array.dtype.name
    kind = name.rstrip("0123456789")
    managed = Managed()
    n = array.ndim
    shape = (ctypes.c_int64 * n)(*array.shape)
    strides = (ctypes.c_int64 * n)(*(stride // array.itemsize for stride in array.strides))
    managed.tensor = Tensor(
        array.address, device_type, array.device, n, CODES[kind], 8 * array.itemsize, 1,
        ctypes.cast(shape, _Numbers), ctypes.cast(strides, _Numbers), 0,
    )  # fmt: skip
    managed.deleter = ctypes.cast(_let_go, ctypes.c_void_p)
    address = ctypes.addressof(managed)
    _lent[address] = managed, shape, strides, owner
    return _capsule(address, b"dltensor", _unused)


# --- results ------------------------------------------------------------------------------------------------


def new(like: DeviceArray, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
    """A new array of the library that another comes from."""
    owner = like.owner.array if isinstance(like.owner, _Held) else like.owner
    root = type(owner).__module__.partition(".")[0]
    if root in ("numba", "numba_cuda") and "numba.cuda" in sys.modules:
        cuda: Any = sys.modules["numba.cuda"]
        with cuda.gpus[like.device]:
            made = cuda.device_array(shape, np.dtype(dtype.name))
        return _from_interface(made, made.__cuda_array_interface__ | {"stream": like.stream})
    library = owner.library if isinstance(owner, Memory) else _reader(owner)
    if library is None:
        msg = f"there is no way to make an array of {type(owner).__name__}; pass out"
        raise ValueError(msg)
    strides = _contiguous(shape, dtype.itemsize)
    size = max(1, int(np.prod(shape))) * dtype.itemsize
    address = launch.allocate(launch.device(like.device), size)
    made = DeviceArray(address, shape, strides, dtype, like.device, like.stream)
    return DeviceArray(address, shape, strides, dtype, like.device, like.stream, Memory(made, library))


def _reader(owner: Any) -> Any:
    """The `from_dlpack` of the array's library."""
    if hasattr(owner, "__array_namespace__"):
        return getattr(owner.__array_namespace__(), "from_dlpack", None)
    module: Any = sys.modules.get(type(owner).__module__.partition(".")[0])
    places: tuple[Any, ...] = (module, getattr(module, "dlpack", None), getattr(module, "numpy", None))
    return next((place.from_dlpack for place in places if hasattr(place, "from_dlpack")), None)
