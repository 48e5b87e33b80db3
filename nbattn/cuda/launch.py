"""How CUDA kernels are compiled, kept on disk, loaded and launched: whatever asks the compiler or the driver.

A kernel is a plain Python function of one named tuple: pointers, integers and numbers, which the driver takes
as one run of bytes. numba-cuda makes LTO-IR of it and nvJitLink machine code, neither of which needs a GPU;
the machine code is kept on disk, so that later processes load it without importing Numba. Modules are loaded
and launched through the driver's own C interface, which is stable; Numba's dispatcher takes about 1 us for
each number that a kernel is given.

Nothing here waits for the GPU: launches and the copies they need go in order on the caller's stream.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.metadata
import os
import platform
import re
import struct
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..folders import keep, kept, user_cache

INSTALL = 'pip install "nbattn[cuda]"'
FORMATS = {"int64": "q", "uint64": "Q", "int32": "i", "float64": "d", "float32": "f"}
"""Parameters' types for `struct`. "*float32" is a pointer, "int64x4" a tuple of four."""


WORDS = {"float32": "float32", "float64": "float64", "float16": "float16", "bfloat16": "uint16"}
"""What pointers to the dtypes point to."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel before it is compiled."""

    name: str  # of this function and all constants that it was built with
    build: Callable[[], Callable[..., None]]  # makes the Python function; imports Numba
    parameters: tuple[tuple[str, str], ...]  # names and types
    threads: int  # of a block, along x
    shared: int = 0  # bytes of dynamic shared memory
    resident: int = 1  # blocks that a multiprocessor should have registers for
    positional: bool = False  # whether the function takes the parameters one by one, not as a tuple
    feature_specific: bool = False  # whether it needs what one generation of GPUs has alone, as sm_90a

    @cached_property
    def layout(self) -> struct.Struct:
        """The run of bytes that the driver takes, padded as in C."""
        return struct.Struct("@" + "".join(_format(kind) for _, kind in self.parameters))

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Where each parameter's bytes begin."""
        formats = [_format(kind) for _, kind in self.parameters]
        starts = [struct.calcsize("@" + "".join(formats[:i]) + "0" + f[-1]) for i, f in enumerate(formats)]
        return dict(zip((name for name, _ in self.parameters), starts, strict=True))

    @cached_property
    def record(self) -> Any:
        """The named tuple's class."""
        return namedtuple("Parameters", [name for name, _ in self.parameters])

    def packed(self, values: Mapping[str, Any]) -> bytearray:
        """The parameters by name as bytes; what is not named is 0."""
        if unknown := values.keys() - self.offsets.keys():
            raise KeyError(unknown)
        numbers: list[float] = []
        for name, kind in self.parameters:
            count = _count(kind)
            given = values.get(name, 0)
            numbers += (given,) if count is None else given or (0,) * count
        return bytearray(self.layout.pack(*numbers))


def _count(kind: str) -> int | None:
    """The length of a tuple's type; None for others."""
    _, times, count = kind.partition("x")
    return int(count) if times else None


def _format(kind: str) -> str:
    if kind[0] == "*":
        return "P"
    return (f"{_count(kind)}" if "x" in kind else "") + FORMATS[kind.partition("x")[0]]


# --- compiling ----------------------------------------------------------------------------------------------


class Binary(NamedTuple):
    """A compiled kernel."""

    code: bytes  # a cubin
    report: str  # what the assembler says: registers, spills, shared memory, warnings

    @property
    def entry(self) -> bytes:
        """The kernel's symbol: every entry has a bank of constants of its own."""
        (name,) = set(re.findall(rb"\.nv\.constant0\.([\w$]+)\0", self.code))
        return name


def binary(kernel: Kernel, capability: tuple[int, int]) -> Binary:
    """Compile a kernel for GPUs of this compute capability. Needs no GPU and no driver."""
    compiler, types, linker = _toolchain()
    sorts = [_type(types, kind) for _, kind in kernel.parameters]
    arguments = sorts if kernel.positional else [types.NamedTuple(sorts, kernel.record)]
    target = (*capability, "a") if kernel.feature_specific else capability
    arch = "sm_" + "".join(map(str, target))
    with _pretended(capability):
        try:
            code, _ = compiler.compile(
                kernel.build(), types.void(*arguments), cc=target, device=False, abi="numba", output="ltoir",
                launch_bounds=(kernel.threads, kernel.resident),
            )  # fmt: skip
        except _toolchain_errors() as error:
            if type(error).__name__ == "CCSupportError":
                msg = f"{_line(error)}; numba-cuda[cu12] in place of numba-cuda[cu13] takes older GPUs"
                raise RuntimeError(msg) from error
            msg = f"numba-cuda cannot compile for {arch}: {_line(error)}; reinstall it with {INSTALL}"
            raise ImportError(msg) from error
    return _linked(linker, code, arch, kernel.name)


def _linked(linker: Any, code: bytes, arch: str, name: str) -> Binary:
    """Machine code of LTO-IR. Without -lto the assembler would get relocatable code, which it keeps slow."""
    try:
        handle = linker.create(3, [f"-arch={arch}", "-lto", "-verbose"])
    except linker.nvJitLinkError as error:
        version = ".".join(map(str, linker.version()))
        msg = f"nvJitLink {version} knows no {arch} ({_line(error)}); a newer one may: {INSTALL} --upgrade"
        raise RuntimeError(msg) from error
    try:
        try:
            linker.add_data(handle, linker.InputType.LTOIR, code, len(code), name)
            linker.complete(handle)
        except linker.nvJitLinkError as error:
            log = _read(handle, linker.get_error_log_size, linker.get_error_log).decode(errors="replace")
            version = ".".join(map(str, linker.version()))
            msg = f"nvJitLink {version} cannot make {arch} code of {name}: {' '.join(log.split()) or error}"
            raise RuntimeError(msg) from error
        report = _read(handle, linker.get_info_log_size, linker.get_info_log).decode(errors="replace")
        return Binary(_read(handle, linker.get_linked_cubin_size, linker.get_linked_cubin), report)
    finally:
        linker.destroy(handle)


def _read(handle: int, size: Callable[[int], int], get: Callable[[int, bytearray], None]) -> bytes:
    room = bytearray(size(handle))
    if room:
        get(handle, room)
    return bytes(room)


def _type(types: Any, kind: str) -> Any:
    """Numba's type of a parameter."""
    if kind[0] == "*":
        return types.CPointer(getattr(types, kind[1:]))
    count = _count(kind)
    single = getattr(types, kind.partition("x")[0])
    return single if count is None else types.UniTuple(single, count)


def _toolchain() -> tuple[Any, Any, Any]:
    """numba-cuda, its types, and nvJitLink; what is missing is named with its remedy."""
    require_packages()
    with _row_stack():
        try:
            compiler, types = map(importlib.import_module, ("numba.cuda", "numba.cuda.types"))
        except (AttributeError, ImportError) as error:
            msg = (
                f"numba-cuda {_version('numba-cuda')} cannot be imported beside NumPy {np.__version__} and "
                f"Numba {_version('numba')}: {_line(error)}; {INSTALL} brings versions that go together"
            )
            raise ImportError(msg) from error
    try:
        linker = importlib.import_module("cuda.bindings.nvjitlink")
        linker.version()
    except Exception as error:  # ImportError, or the bindings' own for a library that cannot be loaded
        msg = f"nvJitLink cannot be loaded ({_line(error)}); {INSTALL} brings it"
        raise ImportError(msg) from error
    return compiler, types, linker


def require() -> None:
    """Complain where there is no numba-cuda, driver or GPU."""
    require_packages()
    library()


def require_packages() -> None:
    """Complain where numba-cuda is missing. Numba's own CUDA target lacks what these kernels need."""
    if not has_packages():
        msg = f'backend="cuda" needs numba-cuda, which is not installed: {INSTALL}'
        raise ImportError(msg)


def has_packages() -> bool:
    return bool(_version("numba-cuda"))


def _toolchain_errors() -> tuple[type[Exception], ...]:
    """What numba-cuda raises where NVVM or NVRTC cannot be loaded."""
    errors = importlib.import_module("numba.cuda.cudadrv.error")
    names = ("NvvmSupportError", "NvrtcSupportError", "CudaSupportError", "NvrtcError", "CCSupportError")
    found = [getattr(errors, name) for name in names if hasattr(errors, name)]
    return (*found, OSError)


@contextmanager
def _pretended(capability: tuple[int, int]) -> Iterator[None]:
    """numba-cuda asks the current GPU what to compile device functions for; here the kernel's is meant."""
    dispatcher: Any = importlib.import_module("numba.cuda.dispatcher")
    before = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: _Target(capability)
    try:
        yield
    finally:
        dispatcher.get_current_device = before


class _Target(NamedTuple):
    compute_capability: tuple[int, int]


@contextmanager
def _row_stack() -> Iterator[None]:
    """numba-cuda up to 0.30 names `np.row_stack` when it is imported, which NumPy 2.5 no longer has."""
    name = "row_stack"
    missing = not hasattr(np, name)
    if missing:
        setattr(np, name, np.vstack)
    try:
        yield
    finally:
        if missing:
            delattr(np, name)


@cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --- kernels on disk ----------------------------------------------------------------------------------------

COMPILERS = ("numba-cuda", "numba", "llvmlite", "nvidia-nvvm", "nvidia-nvjitlink", "nvidia-cuda-nvcc-cu12",
             "nvidia-nvjitlink-cu12")  # fmt: skip


@cache
def cache_folder() -> Path | None:
    """Where compiled kernels are kept, by a digest of all that they depend on; None where none can be."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for source in sorted((*here.parent.glob("problem.py*"), *here.glob("*.py*"))):
        digest.update(source.read_bytes())
    toolkit = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH", "NUMBA_CUDA_NVVM")]
    digest.update(repr((sys.version, platform.machine(), [*map(_version, COMPILERS)], toolkit)).encode())
    return user_cache(f"cuda-{digest.hexdigest()[:20]}")


def _cubin(kernel: Kernel, capability: tuple[int, int]) -> Binary:
    """The compiled kernel, from disk or from the compiler."""
    folder, file = cache_folder(), f"{kernel.name}-sm_{capability[0]}{capability[1]}"
    if code := kept(folder, file):
        return Binary(code, "")
    made = binary(kernel, capability)
    keep(folder, file, made.code)
    return made


# --- the driver ---------------------------------------------------------------------------------------------

_P, _I, _U, _Z = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, ctypes.c_size_t
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuInit": (_U,),
    "cuDriverGetVersion": (_P,),
    "cuGetErrorName": (_I, _P),
    "cuDeviceGetCount": (_P,),
    "cuDeviceGet": (_P, _I),
    "cuDeviceGetName": (_P, _I, _I),
    "cuDeviceGetAttribute": (_P, _I, _I),
    "cuDevicePrimaryCtxRetain": (_P, _I),
    "cuCtxGetCurrent": (_P,),
    "cuCtxGetDevice": (_P,),
    "cuCtxPushCurrent_v2": (_P,),
    "cuCtxPopCurrent_v2": (_P,),
    "cuModuleLoadData": (_P, _P),
    "cuModuleGetFunction": (_P, _P, ctypes.c_char_p),
    "cuFuncSetAttribute": (_P, _I, _I),
    "cuLaunchKernel": (_P, *[_U] * 7, _P, _P, _P),
    "cuMemAlloc_v2": (_P, _Z),
    "cuMemFree_v2": (_P,),
    "cuMemAllocAsync": (_P, _Z, _P),
    "cuMemFreeAsync": (_P, _P),
    "cuMemsetD8Async": (_P, ctypes.c_ubyte, _Z, _P),
    "cuMemcpyHtoDAsync_v2": (_P, _P, _Z, _P),
    "cuMemcpyDtoHAsync_v2": (_P, _P, _Z, _P),
    "cuStreamSynchronize": (_P,),
    "cuPointerGetAttribute": (_P, _I, _P),
}
"""What is asked of the driver, and the C types of the arguments."""
MAJOR, MINOR, SHARED_OPT_IN = 75, 76, 97  # CU_DEVICE_ATTRIBUTE_*
DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
POINTER_DEVICE = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
BUFFER, BUFFER_SIZE = 1, 2  # CU_LAUNCH_PARAM_*
NO_DEVICE, NO_BINARY, INVALID_PTX, UNSUPPORTED_PTX, INVALID_IMAGE = 100, 209, 218, 222, 200


@cache
def library() -> Any:
    """The driver's library, initialised."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        found = ctypes.CDLL(name)
    except OSError as error:
        msg = f'backend="cuda" needs an NVIDIA GPU and its driver ({error}); else pass backend="cpu"'
        raise OSError(msg) from error
    for function, types in FUNCTIONS.items():
        getattr(found, function).argtypes = types
    if status := found.cuInit(0):
        name = error_name(found, status)
        reason = "the driver finds none" if status == NO_DEVICE else f"the driver fails with {name}"
        msg = f'backend="cuda" needs an NVIDIA GPU: {reason} (see nvidia-smi); else pass backend="cpu"'
        raise OSError(msg)
    return found


def error_name(found: Any, status: int) -> str:
    name = ctypes.c_char_p()
    found.cuGetErrorName(status, ctypes.byref(name))
    return name.value.decode() if name.value else f"error {status}"


class DriverError(RuntimeError):
    """A call of the driver that failed."""

    def __init__(self, function: str, status: int) -> None:
        self.status = status
        super().__init__(f"CUDA's {function} fails with {error_name(library(), status)}")


def ask(function: str, *arguments: Any) -> None:
    """Call the driver, and raise where it says no."""
    if status := getattr(library(), function)(*arguments):
        raise DriverError(function, status)


def _number(function: str, *arguments: Any) -> int:
    """What the driver writes to its first argument."""
    value = ctypes.c_int()
    ask(function, ctypes.byref(value), *arguments)
    return value.value


def _handle(function: str, *arguments: Any) -> int:
    value = ctypes.c_void_p()
    ask(function, ctypes.byref(value), *arguments)
    return value.value or 0


def current_device() -> int:
    """The ordinal of the GPU that this thread's context is of, else 0."""
    context = _handle("cuCtxGetCurrent")
    return _number("cuCtxGetDevice") if context else 0


def device_of(address: int) -> int:
    """The ordinal of the GPU that memory belongs to."""
    value = ctypes.c_int()
    ask("cuPointerGetAttribute", ctypes.byref(value), POINTER_DEVICE, address)
    return value.value


_lock = threading.RLock()
_devices: dict[int, Device] = {}


def device(ordinal: int) -> Device:
    """The GPU of this number."""
    try:
        return _devices[ordinal]
    except KeyError:
        with _lock:
            return _devices.setdefault(ordinal, Device(ordinal))


class Device:
    """A GPU: its context, what it can do, and the kernels that are loaded."""

    def __init__(self, ordinal: int) -> None:
        count = _number("cuDeviceGetCount")
        if not 0 <= ordinal < count:
            msg = f"there is no GPU {ordinal}; the driver finds {count}"
            raise ValueError(msg)
        handle = _number("cuDeviceGet", ordinal)
        name = ctypes.create_string_buffer(256)
        ask("cuDeviceGetName", name, 256, handle)
        self.ordinal, self.name = ordinal, name.value.decode()
        self.capability = (
            _number("cuDeviceGetAttribute", MAJOR, handle),
            _number("cuDeviceGetAttribute", MINOR, handle),
        )
        self.shared_memory = _number("cuDeviceGetAttribute", SHARED_OPT_IN, handle)
        self.context = _handle("cuDevicePrimaryCtxRetain", handle)
        self._functions: dict[str, int] = {}

    @contextmanager
    def current(self) -> Iterator[None]:
        """This GPU's context for a while. PyTorch and CuPy use the same one: mostly it is there already."""
        if _handle("cuCtxGetCurrent") == self.context:
            yield
            return
        ask("cuCtxPushCurrent_v2", self.context)
        try:
            yield
        finally:
            _handle("cuCtxPopCurrent_v2")

    def function(self, kernel: Kernel) -> int:
        """The loaded kernel's handle."""
        try:
            return self._functions[kernel.name]
        except KeyError:
            pass
        with _lock, self.current():
            if kernel.name not in self._functions:
                self._functions[kernel.name] = self._load(kernel)
            return self._functions[kernel.name]

    def _load(self, kernel: Kernel) -> int:
        made = _cubin(kernel, self.capability)
        if kernel.shared > self.shared_memory:
            asked = f"{kernel.name} needs {kernel.shared} bytes of shared memory"
            msg = f"{asked}; {self} gives {self.shared_memory}"
            raise RuntimeError(msg)
        try:
            module = _handle("cuModuleLoadData", made.code)
        except DriverError as error:
            if error.status in (NO_BINARY, INVALID_PTX, UNSUPPORTED_PTX, INVALID_IMAGE):
                version = _number("cuDriverGetVersion")
                msg = (
                    f"the driver (CUDA {version // 1000}.{version % 1000 // 10}) does not take the code that "
                    f"the installed compiler made for {self}; update the driver, or install numba-cuda[cu12] "
                    f"or numba-cuda[cu13], whichever it supports"
                )
                raise RuntimeError(msg) from error
            raise
        function = _handle("cuModuleGetFunction", module, made.entry)
        if kernel.shared > 0:  # more than 48 KB have to be asked for
            ask("cuFuncSetAttribute", function, DYNAMIC_SHARED, kernel.shared)
        return function

    def __str__(self) -> str:
        return (
            f"GPU {self.ordinal} ({self.name}, compute capability {self.capability[0]}.{self.capability[1]})"
        )


# --- launching ----------------------------------------------------------------------------------------------


def launch(kernel: Kernel, function: int, parameters: bytearray, blocks: int, stream: int) -> None:
    """Start a loaded kernel on so many blocks, with the parameters' bytes as they are now."""
    size = len(parameters)
    address = ctypes.addressof((ctypes.c_char * size).from_buffer(parameters))
    length = ctypes.c_size_t(size)
    extra = (ctypes.c_void_p * 5)(BUFFER, address, BUFFER_SIZE, ctypes.addressof(length), 0)
    ask("cuLaunchKernel", function, blocks, 1, 1, kernel.threads, 1, 1, kernel.shared, stream, None, extra)


def run(kernel: Kernel, values: Mapping[str, float], blocks: int, place: Device, stream: int) -> None:
    """Compile and load a kernel where that is still to be done, and start it; nothing for no block."""
    if blocks == 0:
        return
    if blocks >= 1 << 31:
        msg = f"{kernel.name} would need {blocks} blocks; a GPU takes fewer than 2**31: split the batch"
        raise ValueError(msg)
    function = place.function(kernel)
    with place.current():
        launch(kernel, function, kernel.packed(values), blocks, stream)


_put_pointer = struct.Struct("@P").pack_into


class Call:
    """A launch to be made again: packed once, and only some pointers change."""

    def __init__(
        self,
        kernel: Kernel,
        values: Mapping[str, Any],
        blocks: int,
        place: Device,
        pointers: tuple[str, ...],
    ) -> None:
        self.kernel, self.place, self.blocks = kernel, place, blocks
        self.parameters = kernel.packed(values)
        self.function = place.function(kernel)
        self.offsets = [kernel.offsets[name] for name in pointers]

    def __call__(self, stream: int, *addresses: int) -> None:
        if self.blocks == 0:
            return
        parameters = self.parameters[:]  # its own, as other threads may call too
        for offset, address in zip(self.offsets, addresses, strict=True):
            _put_pointer(parameters, offset, address)
        if _handle("cuCtxGetCurrent") == self.place.context:
            launch(self.kernel, self.function, parameters, self.blocks, stream)
            return
        with self.place.current():
            launch(self.kernel, self.function, parameters, self.blocks, stream)


def allocate(place: Device, size: int) -> int:
    """Device memory until it is freed."""
    with place.current():
        return _handle("cuMemAlloc_v2", size)


def free(address: int, ordinal: int) -> None:
    """Free memory, once the GPU is done with it; at the process's end there may be no driver any more."""
    with suppress(DriverError, OSError), device(ordinal).current():
        ask("cuMemFree_v2", address)


@contextmanager
def room(place: Device, size: int, stream: int) -> Iterator[int]:
    """Device memory for work on a stream, given back in the stream's order: after what is launched."""
    with place.current():
        address = _handle("cuMemAllocAsync", max(size, 1), stream)
        try:
            yield address
        finally:
            with suppress(DriverError):  # an error of the kernel comes again here, and has been raised
                ask("cuMemFreeAsync", address, stream)
