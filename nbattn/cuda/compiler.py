"""How CUDA kernels are described, compiled and kept on disk. Nothing here needs a GPU or its driver.

A kernel is a plain Python function of one named tuple: pointers, integers and numbers, which the driver takes
as one run of bytes. numba-cuda makes LTO-IR of it and nvJitLink machine code; that is kept on disk, so that
later processes load it without importing Numba.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import platform
import re
import struct
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..folders import keep, kept, user_cache

INSTALL = 'pip install "nbattn[cuda]"'
FORMATS = {"int64": "q", "uint64": "Q", "int32": "i", "float64": "d", "float32": "f"}
"""Parameters' types for `struct`. "*float32" is a pointer, "int64x4" a tuple of four, "map" a tensor map.
"float32[2]" is a contiguous array of Numba's with two axes, to be read: two words that are 0, its number of
elements, their size, its address, its shape and its strides.

A tensor map is 128 bytes that stay in the parameters' memory: kernels know its address alone.
"""
MAP_WORDS = 16
SPECIFIC = {(9, 0): "a"}
"""GPUs that have instructions of their own, and what their names end in: as sm_90a, 9.0 has wgmma."""

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
    keeps: bool = True  # whether the name tells it from others in any process
    label: str = ""  # of the functions of the user's that it calls
    registers: int = 0  # that a thread must have at the launch, where warps pass them on to others

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
    def has_maps(self) -> bool:
        """Whether there are tensor maps among the parameters."""
        return any(kind == "map" for _, kind in self.parameters)

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
    if kind == "map":
        return MAP_WORDS
    if kind[-1] == "]":
        return 5 + 2 * int(kind[:-1].partition("[")[2])
    _, times, count = kind.partition("x")
    return int(count) if times else None


def _format(kind: str) -> str:
    if kind[0] == "*":
        return "P"
    if kind == "map":
        return f"{MAP_WORDS}Q"
    if kind[-1] == "]":
        return f"{_count(kind)}q"
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


def architecture(capability: tuple[int, int]) -> str:
    """What the compiler makes code for."""
    return f"sm_{capability[0]}{capability[1]}{SPECIFIC.get(capability, '')}"


def binary(kernel: Kernel, capability: tuple[int, int]) -> Binary:
    """Compile a kernel for GPUs of this compute capability. Needs no GPU and no driver."""
    compiler, types, linker = _toolchain()
    record = types.NamedTuple([_type(types, kind) for _, kind in kernel.parameters], kernel.record)
    arch = architecture(capability)
    target = (*capability, SPECIFIC[capability]) if capability in SPECIFIC else capability
    with _row_stack(), _pretended(capability):  # the first compilation imports more of numba-cuda
        try:
            code, _ = compiler.compile(
                kernel.build(), types.void(record), cc=target, device=False, abi="numba", output="ltoir",
                launch_bounds=(kernel.threads, 1),
            )  # fmt: skip
        except _toolchain_errors() as error:
            if type(error).__name__ == "CCSupportError":
                msg = f"{_line(error)}; numba-cuda[cu12] in place of numba-cuda[cu13] takes older GPUs"
                raise RuntimeError(msg) from error
            msg = f"numba-cuda cannot compile for {arch}: {_line(error)}; reinstall it with {INSTALL}"
            raise ImportError(msg) from error
        except Exception as error:
            if not kernel.label:
                raise
            msg = f'{kernel.label} cannot be compiled for a GPU: {_line(error)}; backend="cpu" takes it'
            raise ValueError(msg) from None
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
    if kind == "map":
        return types.CPointer(types.UniTuple(types.uint64, MAP_WORDS))
    if kind[-1] == "]":
        name, _, ndim = kind[:-1].partition("[")
        element = types.boolean if name == "bool" else getattr(types, name)
        return types.Array(element, int(ndim), "C", readonly=True)
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
                f"numba-cuda {version_of('numba-cuda')} cannot be imported beside NumPy {np.__version__} and "
                f"Numba {version_of('numba')}: {_line(error)}; {INSTALL} brings versions that go together"
            )
            raise ImportError(msg) from error
    try:
        linker = importlib.import_module("cuda.bindings.nvjitlink")
        linker.version()
    except Exception as error:  # ImportError, or the bindings' own for a library that cannot be loaded
        msg = f"nvJitLink cannot be loaded ({_line(error)}); {INSTALL} brings it"
        raise ImportError(msg) from error
    return compiler, types, linker


def require_packages() -> None:
    """Complain where numba-cuda is missing. Numba's own CUDA target lacks what these kernels need."""
    if not has_packages():
        msg = f'backend="cuda" needs numba-cuda, which is not installed: {INSTALL}'
        raise ImportError(msg)


def has_packages() -> bool:
    return bool(version_of("numba-cuda"))


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
    """numba-cuda up to 0.30 names `np.row_stack` as its modules are loaded, which NumPy 2.5 no longer has."""
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
def version_of(package: str) -> str:
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
    others = (here.parent.glob(pattern) for pattern in ("problem.py*", "cpu/functions.py*"))
    for source in sorted((*(file for found in others for file in found), *here.glob("*.py*"))):
        digest.update(source.read_bytes())
    toolkit = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH", "NUMBA_CUDA_NVVM")]
    digest.update(repr((sys.version, platform.machine(), [*map(version_of, COMPILERS)], toolkit)).encode())
    return user_cache(f"cuda-{digest.hexdigest()[:20]}")


def cubin(kernel: Kernel, capability: tuple[int, int]) -> Binary:
    """The compiled kernel, from disk or from the compiler."""
    folder = cache_folder() if kernel.keeps else None
    file = f"{kernel.name}-{architecture(capability)}"
    if code := kept(folder, file):
        return Binary(code, "")
    made = binary(kernel, capability)
    keep(folder, file, made.code)
    return made
