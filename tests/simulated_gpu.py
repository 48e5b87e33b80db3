"""A stand-in for NVIDIA's driver: kernels run in Numba's CUDA simulator, on the host's memory.

It takes the place of the driver's library alone, so what packs parameters, copies arrays and keeps to streams
is tried too. Memory comes filled with NaN, and a kernel that reads or writes outside of an allocation fails.
"""

import bisect
import contextlib
import ctypes
import importlib
import os
import struct
import sys
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

from nbattn.cuda import compiler, launch, workspace

# Blocks so small that small arrays span several, with all kinds of edges.
CUT = {
    "append": {"THREADS": 4},
    "softmax": {"THREADS": 4},
    "attention": {"TILE": (2, 2, 4, 4, 4, 8, 4), "TILE64": (2, 2, 2, 4, 2, 5, 8)},
}


def switch_on():
    """Have `numba.cuda` be the simulator in this process, but not in its children.

    Numba decides when it is imported, so this comes first. NUMBA_ENABLE_CUDASIM=0 forbids it.
    """
    if "NUMBA_ENABLE_CUDASIM" in os.environ:
        return
    os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
    try:
        importlib.import_module("numba.cuda")
    finally:
        del os.environ["NUMBA_ENABLE_CUDASIM"]


def simulator():
    """Numba's CUDA simulator, or a skip where this process has the real thing."""
    cuda = importlib.import_module("numba.cuda")
    if "simulator" not in cuda.jit.__module__:
        pytest.skip("numba.cuda is in this process without its simulator")
    return cuda


class OutsideError(IndexError):
    """A kernel touched element `args[0]` of an allocation of `args[1]`."""


class Aborted(Exception):
    """Another thread of the block has failed."""


class Pointer:
    """What a kernel has of an address: elements around it, within one allocation."""

    __slots__ = ("numbers", "origin")

    def __init__(self, numbers, origin):
        self.numbers, self.origin = numbers, origin

    def __getitem__(self, index):
        index += self.origin
        if not 0 <= index < len(self.numbers):
            raise OutsideError(index, len(self.numbers))
        return self.numbers[index]

    def __setitem__(self, index, number):
        index += self.origin
        if not 0 <= index < len(self.numbers):
            raise OutsideError(index, len(self.numbers))
        self.numbers[index] = number


@dataclass
class Launch:
    """A launch that was asked for."""

    name: str
    blocks: int
    stream: int
    device: int


@dataclass
class Library:
    """The functions of the driver that are used, for GPUs of such compute capabilities.

    The simulator knows no tensor cores, so by default these GPUs have none that kernels use.
    """

    capabilities: tuple = ((7, 5),)
    launches: list = field(default_factory=list)
    calls: list = field(default_factory=list)
    memory: dict = field(default_factory=dict)
    owners: dict = field(default_factory=dict)
    contexts: list = field(default_factory=list)
    kernels: dict = field(default_factory=dict)
    functions: dict = field(default_factory=dict)
    fail: dict = field(default_factory=dict)
    captured: set = field(default_factory=set)
    mode: int = 0  # of captures, for the thread

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if name.startswith("cu"):
            self.calls.append(name)
            if name in self.fail:
                return lambda *arguments: self.fail[name]
        return found

    # --- devices

    def cuGetErrorName(self, status, name):
        name._obj.value = b"CUDA_ERROR_%d" % status
        return 0

    def cuDriverGetVersion(self, version):
        version._obj.value = 13000
        return 0

    def cuDeviceGetCount(self, count):
        count._obj.value = len(self.capabilities)
        return 0

    def cuDeviceGet(self, device, ordinal):
        device._obj.value = ordinal
        return 0

    def cuDeviceGetName(self, name, size, device):
        name.value = b"SIMULATOR"
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        capability = self.capabilities[device]
        known = {launch.MAJOR: capability[0], launch.MINOR: capability[1], launch.SHARED_OPT_IN: 232448}
        value._obj.value = known[attribute]
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device):
        context._obj.value = 1000 + device
        return 0

    def cuCtxGetCurrent(self, context):
        context._obj.value = self.contexts[-1] if self.contexts else None
        return 0

    def cuCtxGetDevice(self, device):
        device._obj.value = self.contexts[-1] - 1000
        return 0

    def cuCtxPushCurrent_v2(self, context):
        self.contexts.append(context)
        return 0

    def cuCtxPopCurrent_v2(self, context):
        context._obj.value = self.contexts.pop()
        return 0

    def cuCtxSynchronize(self):
        return 0

    # --- memory

    def allocate(self, size, device):
        buffer = np.full(size + 16, 0xFF, np.uint8)
        address = buffer.ctypes.data + -buffer.ctypes.data % 16
        start = address - buffer.ctypes.data
        self.memory[address] = buffer[start : start + size]
        self.owners[address] = device
        return address

    def cuMemAlloc_v2(self, address, size):
        assert self.mode == launch.RELAXED, "ends a capture of another stream"
        address._obj.value = self.allocate(size, self.contexts[-1] - 1000)
        return 0

    def cuMemAllocAsync(self, address, size, stream):
        address._obj.value = self.allocate(size, self.contexts[-1] - 1000)
        return 0

    def cuMemFree_v2(self, address):
        if address not in self.memory:  # of another test's GPU
            return 1
        self.memory.pop(address).fill(0xFF)
        return 0

    def cuMemFreeAsync(self, address, stream):
        return self.cuMemFree_v2(address)

    def cuMemsetD8Async(self, address, byte, size, stream):
        self.bytes(address, size).fill(byte)
        return 0

    def cuMemcpyHtoDAsync_v2(self, there, here, size, stream):
        ctypes.memmove(self.bytes(there, size).ctypes.data, here, size)
        return 0

    def cuMemcpyDtoHAsync_v2(self, here, there, size, stream):
        ctypes.memmove(here, self.bytes(there, size).ctypes.data, size)
        return 0

    def cuMemcpyDtoDAsync_v2(self, there, here, size, stream):
        self.bytes(there, size)[:] = self.bytes(here, size)
        return 0

    def cuStreamSynchronize(self, stream):
        return 0

    def cuStreamIsCapturing(self, stream, status):
        status._obj.value = int(stream in self.captured)
        return 0

    def cuThreadExchangeStreamCaptureMode(self, mode):
        mode._obj.value, self.mode = self.mode, mode._obj.value
        return 0

    def cuPointerGetAttribute(self, value, attribute, address):
        assert attribute == launch.POINTER_DEVICE
        value._obj.value = self.owners[self.place(address)[0]]
        return 0

    def place(self, address):
        """The allocation that an address lies in, and how far."""
        starts = sorted(self.memory)
        number = bisect.bisect_right(starts, address) - 1
        if number < 0 or address > starts[number] + len(self.memory[starts[number]]):
            raise OutsideError(address, 0)
        return starts[number], address - starts[number]

    def bytes(self, address, size):
        start, offset = self.place(address)
        found = self.memory[start][offset : offset + size]
        assert len(found) == size, "a copy leaves its allocation"
        return found

    def pointer(self, address, dtype):
        if address == 0:
            return None
        start, offset = self.place(address)
        size = np.dtype(dtype).itemsize
        assert offset % size == 0, "a pointer that is not aligned"
        memory = self.memory[start]
        return Pointer(memory[: len(memory) // size * size].view(dtype), offset // size)

    def array(self, words, dtype, ndim):
        """An array as numba-cuda passes it, in words."""
        ndim, dtype = int(ndim), np.dtype(dtype)
        _, _, size, itemsize, address, *rest = words
        shape, strides = rest[:ndim], rest[ndim:]
        assert (size, itemsize) == (np.prod(shape), dtype.itemsize)
        found = self.bytes(address, size * itemsize).view(dtype).reshape(shape)
        assert size == 0 or found.strides == tuple(strides)
        found.flags.writeable = False
        return found

    # --- kernels

    def binary(self, kernel, capability):
        """Takes the place of the compiler."""
        code = f".nv.constant0.{kernel.name.replace('-', '_')}\0".encode()
        self.kernels[code] = kernel
        return compiler.Binary(code, "")

    def cuModuleLoadData(self, module, code):
        assert self.mode == launch.RELAXED, "may end a capture of another stream"
        self.functions[len(self.functions) + 1] = self.kernels[code]
        module._obj.value = len(self.functions)
        return 0

    def cuModuleGetFunction(self, function, module, name):
        assert name.decode() == self.functions[module].name.replace("-", "_")
        function._obj.value = module
        return 0

    def cuFuncSetAttribute(self, function, attribute, value):
        return 0

    def cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
        assert (gy, gz, by, bz) == (1, 1, 1, 1)
        assert parameters is None
        kernel = self.functions[function]
        assert (extra[0], extra[2], extra[4] or 0) == (launch.BUFFER, launch.BUFFER_SIZE, 0)
        size = ctypes.c_size_t.from_address(extra[3]).value
        record = self.unpacked(kernel, ctypes.string_at(extra[1], size))
        device = self.contexts[-1] - 1000
        self.launches.append(Launch(kernel.name, gx, stream, device))
        run = simulator().jit(kernel.build())[gx, bx, stream, shared]
        with taking_turns():
            run(kernel.record(*record))
        return 0

    def unpacked(self, kernel, data):
        """A launch's parameters, taken apart by the C compiler's rules."""
        values, offset = [], 0
        for _, kind in kernel.parameters:
            if kind[-1] == "]":
                words = struct.unpack_from(compiler._format(kind), data, offset)
                offset += 8 * len(words)
                values.append(self.array(words, *kind[:-1].split("[")))
                continue
            code, count = ("P", 1) if kind[0] == "*" else (compiler.FORMATS[kind.partition("x")[0]], 1)
            if kind[0] != "*" and "x" in kind:
                count = int(kind.partition("x")[2])
            size = struct.calcsize(code)
            offset = -(-offset // size) * size
            numbers = struct.unpack_from(f"{count}{code}", data, offset)
            offset += count * size
            if kind[0] == "*":
                values.append(self.pointer(numbers[0], kind[1:]))
            else:
                values.append(numbers if "x" in kind else numbers[0])
        assert offset == len(data)
        return values


@contextlib.contextmanager
def taking_turns():
    """Numba's simulator with the threads of a block one after the other, from barrier to barrier.

    Its own threads all run at once and wait for one another 100 times as long. Every second time the last
    thread goes first: who relies on a neighbour's work without a barrier before it finds NaN or old numbers.
    """
    simulated = simulator().simulator
    kernel, api = simulated.kernel, simulated.kernelapi

    class Shared(api.FakeCUDAShared):
        def array(self, shape, dtype):
            caller = sys._getframe(1)
            place = caller.f_code, caller.f_lineno
            if place not in self._allocations:
                self._allocations[place] = poisoned(shape, dtype)
            return self._allocations[place]

    class Local(api.FakeCUDALocal):
        def array(self, shape, dtype):
            return poisoned(shape, dtype)

    class Thread(kernel.BlockThread):
        """One thread of every block of a launch, block after block."""

        def __init__(self, *arguments):
            super().__init__(None, *arguments)
            self.go, self.pause = threading.Lock(), threading.Lock()
            self.go.acquire()
            self.pause.acquire()

        def run(self):
            with np.errstate(all="ignore"):  # numbers overflow silently on a GPU
                while True:
                    self.go.acquire()
                    if self.work is None:
                        return
                    try:
                        self.work()
                    except Exception as error:
                        self.exception = error
                    finally:
                        self.waits = False
                        self.pause.release()

        def syncthreads(self):
            self.pause.release()
            self.go.acquire()
            if self.abort:
                raise Aborted

        def turn(self):
            """Run to the next barrier, or to the block's end."""
            self.go.release()
            self.pause.acquire()

        def end(self):
            self.work = None
            self.go.release()
            self.join()

    threads = []

    class Manager(kernel.BlockManager):
        def run(self, grid_point, *arguments):
            if not threads:
                threads.extend(
                    Thread(self, grid_point, point, False) for point in np.ndindex(*self._block_dim)
                )
                for thread in threads:
                    thread.start()
            for thread in threads:
                thread.blockIdx = kernel.Dim3(*grid_point)
                thread.work, thread.waits, thread._manager = lambda: self._f(*arguments), True, self
            alive, failed = threads, None
            while alive:
                for thread in alive:
                    thread.turn()
                    failed = failed or thread.exception
                alive = [thread for thread in alive[::-1] if thread.waits]
                for thread in alive:
                    thread.abort = failed is not None
            if failed:
                raise failed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "BlockManager", Manager)
        patch.setattr(api, "FakeCUDAShared", Shared)
        patch.setattr(api, "FakeCUDALocal", Local)
        # The simulator gives its stand-in for `cuda` to the kernel's own module alone.
        patch.setattr("nbattn.cuda.numbers.cuda", SimpleNamespace(local=Local()))
        try:
            yield
        finally:
            for thread in threads:
                thread.end()


def poisoned(shape, dtype):
    """Memory as a kernel finds it: full of NaN."""
    array = np.empty(shape, dtype)
    array.view(np.uint8).fill(0xFF)
    return array


def view(x):
    """An array as NumPy's: itself, or what lies in the simulated memory."""
    if x is None or isinstance(x, np.ndarray):
        return x
    library = launch.library()
    start, offset = library.place(x.address)
    memory = library.memory[start][offset:]
    flat = memory[: len(memory) // x.itemsize * x.itemsize].view(x.dtype)
    return np.lib.stride_tricks.as_strided(flat, x.shape, x.strides)


@contextlib.contextmanager
def installed(**options):
    """The stand-in in place of the driver."""
    simulator()
    library = Library(**options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "library", lambda: library)
        patch.setattr(compiler, "binary", library.binary)
        patch.setattr(compiler, "cache_folder", lambda: None)
        patch.setattr(launch, "_devices", {})
        patch.setattr(workspace, "_kept", {})
        patch.setattr(workspace, "_for_graphs", {})
        patch.setattr(compiler, "require_packages", lambda: None)
        for door in ("attention", "softmax"):  # what later calls of a layout do, they do on this GPU
            patch.setattr(importlib.import_module(f"nbattn.{door}"), "_repeats", {})
        for stem, constants in CUT.items():
            module = importlib.import_module(f"nbattn.cuda.{stem}")
            for name, value in constants.items():
                patch.setattr(module, name, value)
        yield library
