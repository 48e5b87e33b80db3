"""How kernels are loaded and started, and memory is had: whatever asks the driver.

That goes through the driver's own C interface, which is stable; Numba's dispatcher takes about 1 us for each
number that a kernel is given.

Nothing here waits for the GPU: launches and the copies they need go in order on the caller's stream.
"""

from __future__ import annotations

import ctypes
import struct
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

from . import compiler

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
    "cuCtxSynchronize": (),
    "cuModuleLoadData": (_P, _P),
    "cuModuleGetFunction": (_P, _P, ctypes.c_char_p),
    "cuFuncSetAttribute": (_P, _I, _I),
    "cuFuncGetAttribute": (_P, _I, _P),
    "cuLaunchKernel": (_P, *[_U] * 7, _P, _P, _P),
    "cuMemAlloc_v2": (_P, _Z),
    "cuMemFree_v2": (_P,),
    "cuMemAllocAsync": (_P, _Z, _P),
    "cuMemFreeAsync": (_P, _P),
    "cuMemsetD8Async": (_P, ctypes.c_ubyte, _Z, _P),
    "cuMemcpyHtoDAsync_v2": (_P, _P, _Z, _P),
    "cuMemcpyDtoHAsync_v2": (_P, _P, _Z, _P),
    "cuMemcpyDtoDAsync_v2": (_P, _P, _Z, _P),
    "cuStreamSynchronize": (_P,),
    "cuStreamIsCapturing": (_P, _P),
    "cuThreadExchangeStreamCaptureMode": (_P,),
    "cuPointerGetAttribute": (_P, _I, _P),
    "cuTensorMapEncodeTiled": (_P, _I, _U, *[_P] * 5, *[_I] * 4),
}
"""What is asked of the driver, and the C types of the arguments."""
MAJOR, MINOR, SHARED_OPT_IN = 75, 76, 97  # CU_DEVICE_ATTRIBUTE_*
REGISTERS = 4  # CU_FUNC_ATTRIBUTE_NUM_REGS
DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
POINTER_DEVICE = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
BUFFER, BUFFER_SIZE = 1, 2  # CU_LAUNCH_PARAM_*
RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
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
        with suppress(AttributeError):  # drivers before CUDA 12 lack the last
            getattr(found, function).argtypes = types
    if status := found.cuInit(0):
        name = error_name(found, status)
        reason = "the driver finds none" if status == NO_DEVICE else f"the driver fails with {name}"
        msg = f'backend="cuda" needs an NVIDIA GPU: {reason} (see nvidia-smi); else pass backend="cpu"'
        raise OSError(msg)
    return found


def require() -> None:
    """Complain where there is no numba-cuda, driver or GPU."""
    compiler.require_packages()
    library()


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

    def function(self, kernel: compiler.Kernel) -> int:
        """The loaded kernel's handle."""
        try:
            return self._functions[kernel.name]
        except KeyError:
            pass
        with _lock, self.current(), aside_from_captures():
            if kernel.name not in self._functions:
                self._functions[kernel.name] = self._load(kernel)
            return self._functions[kernel.name]

    def _load(self, kernel: compiler.Kernel) -> int:
        made = compiler.cubin(kernel, self.capability)
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
        if kernel.registers:
            found = _number("cuFuncGetAttribute", REGISTERS, function)
            if found != kernel.registers:  # where it runs, some of its warps would wait for ever
                needed = f"{kernel.name} is made for {kernel.registers} registers"
                msg = f"{needed} of a thread, and this compiler gives {found}; another version of it may not"
                raise RuntimeError(msg)
        if kernel.shared > 0:  # more than 48 KB have to be asked for
            ask("cuFuncSetAttribute", function, DYNAMIC_SHARED, kernel.shared)
        return function

    @property
    def model(self) -> str:
        return f"{self.name}, compute capability {self.capability[0]}.{self.capability[1]}"

    def __str__(self) -> str:
        return f"GPU {self.ordinal} ({self.model})"


# --- launching ----------------------------------------------------------------------------------------------


def launch(kernel: compiler.Kernel, function: int, parameters: bytearray, blocks: int, stream: int) -> None:
    """Start a loaded kernel on so many blocks, with the parameters' bytes as they are now."""
    size = len(parameters)
    address = ctypes.addressof((ctypes.c_char * size).from_buffer(parameters))
    if kernel.has_maps:
        # Where their alignment puts them is the driver's to know: it takes each parameter by itself.
        each: Any = (ctypes.c_void_p * len(kernel.offsets))(*[address + x for x in kernel.offsets.values()])
        together: Any = None
    else:
        length = ctypes.c_size_t(size)
        each = None
        together = (ctypes.c_void_p * 5)(BUFFER, address, BUFFER_SIZE, ctypes.addressof(length), 0)
    ask("cuLaunchKernel", function, blocks, 1, 1, kernel.threads, 1, 1, kernel.shared, stream, each, together)


def run(
    kernel: compiler.Kernel, values: Mapping[str, float], blocks: int, place: Device, stream: int
) -> None:
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


class _Filled:
    """A launch's parameters and what the driver is told of them, which takes longer to make than to use."""

    def __init__(self, parameters: bytearray) -> None:
        self.parameters, size = parameters, len(parameters)
        address = ctypes.addressof((ctypes.c_char * size).from_buffer(parameters))
        self._size, self.context = ctypes.c_size_t(size), ctypes.c_void_p()
        self.all = (ctypes.c_void_p * 5)(BUFFER, address, BUFFER_SIZE, ctypes.addressof(self._size), 0)
        self.to_context = ctypes.byref(self.context)


class Call:
    """A launch to be made again: packed once, and only some pointers change."""

    def __init__(
        self,
        kernel: compiler.Kernel,
        values: Mapping[str, Any],
        blocks: int,
        place: Device,
        pointers: tuple[str, ...],
    ) -> None:
        self.kernel, self.place, self.blocks = kernel, place, blocks
        self.parameters = kernel.packed(values)
        self.function = place.function(kernel)
        self.offsets = [kernel.offsets[name] for name in pointers]
        self._free: list[_Filled] = []

    def __call__(self, stream: int, *addresses: int) -> None:
        if self.blocks == 0:
            return
        try:
            filled = self._free.pop()  # no other thread's: each takes one, and gives it back
        except IndexError:
            filled = _Filled(self.parameters[:])
        for offset, address in zip(self.offsets, addresses, strict=True):
            _put_pointer(filled.parameters, offset, address)
        found, kernel, context = library(), self.kernel, filled.context
        if found.cuCtxGetCurrent(filled.to_context) or context.value != self.place.context:
            self.start(filled.parameters, stream)
        elif status := found.cuLaunchKernel(
            self.function, self.blocks, 1, 1, kernel.threads, 1, 1, kernel.shared, stream, None, filled.all
        ):
            name = "cuLaunchKernel"
            raise DriverError(name, status)
        self._free.append(filled)

    def start(self, parameters: bytearray, stream: int) -> None:
        if _handle("cuCtxGetCurrent") == self.place.context:
            launch(self.kernel, self.function, parameters, self.blocks, stream)
            return
        with self.place.current():
            launch(self.kernel, self.function, parameters, self.blocks, stream)


@contextmanager
def aside_from_captures() -> Iterator[None]:
    """Have this thread do what is no part of a graph that is captured meanwhile, and would end it."""
    mode = ctypes.c_int(RELAXED)
    ask("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    try:
        yield
    finally:
        ask("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))


def allocate(place: Device, size: int) -> int:
    """Device memory until it is freed."""
    with place.current(), aside_from_captures():
        return _handle("cuMemAlloc_v2", size)


def is_capturing(stream: int) -> bool:
    """Whether what is launched on the stream becomes part of a graph."""
    status = ctypes.c_int()
    with suppress(DriverError):  # of the default stream where another is captured: then launches fail too
        ask("cuStreamIsCapturing", stream, ctypes.byref(status))
    return status.value != 0


def free(address: int, ordinal: int) -> None:
    """Free memory, once the GPU is done with it; at the process's end there may be no driver any more."""
    with suppress(DriverError, OSError), device(ordinal).current(), aside_from_captures():
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
