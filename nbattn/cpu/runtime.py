"""How kernels are compiled, kept on disk and given memory: every Numba option is set here.

A kernel is a function of one address, `int64 -> int64`: the address of its parameters, a record that begins
with `WORK`. One call of it takes tasks off the record's counter until none is left, so any number of threads
may run the same call and finish it together (`team`).
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
import pickle
import platform
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
import numpy as np
from numba import types
from numba.core import config
from numba.core.compiler import CompileResult
from numba.core.compiler_lock import global_compiler_lock
from numba.core.runtime import rtsys
from numba.core.serialize import dumps
from numba.np.ufunc import parallel
from numpy.typing import NDArray

from .. import folders

WORK = [("tasks", np.int64), ("next_task", np.int64, 8), ("tasks_done", np.int64, 8)]
"""The head of every kernel's parameters. Padded, so that the two counters share no cache line."""
TASKS, NEXT_TASK, TASKS_DONE = 0, 1, 9  # in words of 8 bytes

SIGNATURE = types.int64(types.int64)


OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}
FAST_MATH = {"nsz", "arcp", "contract", "afn"}
"""For users' functions alone. What else there is makes NaN of -inf, or sums in an order of its own."""


def jit_for(kernel: str) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """The decorators of the functions that go into this kernel: one to be called, one to be pasted in.

    A called function is compiled by itself and again with each caller, so large ones with one caller are
    better pasted (a fifth of the compile time of an attention kernel).

    Kernels from the disk are linked into one process by symbol names, which Numba keeps apart only within the
    process that compiled them: the kernel's name makes them unique, or one kernel calls another's parts.
    """

    def jit(function: Any, inline: str = "never", **more: Any) -> Any:
        function.__qualname__ += f".{kernel}"
        # Wrappers for callers from Python and C are a quarter of the compile time.
        options = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "inline": inline, **OPTIONS, **more}
        return numba.njit(**options)(function)

    return jit, partial(jit, inline="always")


# --- the processor ------------------------------------------------------------------------------------------

AVX512_NAMES = ("x86-64-v4", "skylake-avx512", "cascadelake", "cooperlake", "icelake", "sapphirerapids",
                "graniterapids", "emeraldrapids", "znver4", "znver5")  # fmt: skip
BASELINE_NAMES = (
    "x86-64",
    "x86-64-v2",
    "generic",
    "core2",
    "nehalem",
    "westmere",
    "sandybridge",
    "ivybridge",
)


@cache
def cpu_name() -> str:
    """The processor that kernels are compiled for: the host, or `NUMBA_CPU_NAME`."""
    return config.CPU_NAME or llvm.get_host_cpu_name()


@cache
def cpu_features() -> frozenset[str]:
    """The extensions that kernels may use: avx512f, avx512bf16, avx512vnni, avx512vbmi, amx-bf16, avx2, fma,
    f16c, neon; and sse4a, which tells AMD's processors from Intel's.

    `NUMBA_CPU_FEATURES` decides where it is set; else a processor named by `NUMBA_CPU_NAME` is taken at the
    level that its name stands for; else the host is asked.
    """
    known = {
        "avx512f", "avx512bf16", "avx512vnni", "avx512vbmi", "amx-bf16",
        "avx2", "fma", "f16c", "neon", "sse4a",
    }  # fmt: skip
    if config.CPU_FEATURES is not None:
        return frozenset(f[1:] for f in config.CPU_FEATURES.split(",") if f[:1] == "+") & known
    if config.CPU_NAME is not None and platform.machine().lower() in ("x86_64", "amd64"):
        if config.CPU_NAME.startswith(AVX512_NAMES):
            return frozenset({"avx512f", "avx2", "fma", "f16c"})
        return frozenset() if config.CPU_NAME in BASELINE_NAMES else frozenset({"avx2", "fma", "f16c"})
    features = frozenset(name for name, on in llvm.get_host_cpu_features().items() if on) & known
    return features if "amx-bf16" not in features or _may_use_tiles() else features - {"amx-bf16"}


def _may_use_tiles() -> bool:
    """Ask Linux to let this process use AMX's tile registers, which it otherwise answers with SIGILL."""
    if sys.platform != "linux":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


# --- the kernel cache ---------------------------------------------------------------------------------------


@cache
def cache_folder() -> Path | None:
    """Where compiled kernels are kept; None where nothing can be written.

    The folder's name is a digest of everything that a kernel depends on, so an edit, an upgrade or another
    processor never meets a stale kernel. `NBATTN_CACHE_DIR` moves its parent.
    """
    digest = hashlib.sha256()
    here = Path(__file__).parent
    # .pyc too, where a package is shipped without its sources
    for source in sorted((*here.parent.glob("problem.py*"), *here.glob("*.py*"))):
        digest.update(source.read_bytes())
    digest.update(repr((sys.version, numba.__version__, llvmlite.__version__, platform.machine())).encode())
    host = config.CPU_FEATURES or llvm.get_host_cpu_features().flatten()
    digest.update(repr((cpu_name(), host, sorted(cpu_features()))).encode())
    return folders.user_cache(digest.hexdigest()[:20])


class DiskCache:
    """What Numba's dispatcher asks of a cache, with one file per kernel, replaced atomically and checksummed.

    Numba's own cache notices edits only in the file of the cached function and can mix up two processes that
    fill it at once; here a reader finds a whole file of the right digest or compiles.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.hit = False

    @property
    def cache_path(self) -> str:
        return str(cache_folder())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        blob = folders.kept(cache_folder(), self.name)
        if not blob:
            return None
        self.hit = True
        # A full `target_context.refresh()` would import half of Numba and scipy.linalg (0.3 s); a kernel that
        # is already machine code needs Numba's allocator symbols alone.
        rtsys.initialize(target_context)
        return CompileResult._rebuild(target_context, *pickle.loads(blob))

    def save_overload(self, sig: Any, result: Any) -> None:
        folder = cache_folder()
        if folder is not None:
            folders.keep(folder, self.name, dumps(result._reduce()))


_compile_lock = threading.RLock()
_kernels: dict[str, Any] = {}


def compiled(
    name: str, build: Callable[..., Callable[[Any], Any]], on_disk: bool = True, nogil: bool = True
) -> Any:
    """The kernel of this name, from memory, from disk, or compiled.

    ``build(jit, inline)`` returns the kernel as a plain function; these decorate the functions it calls. It
    runs without the interpreter's lock unless `nogil` is False.
    """
    try:
        return _kernels[name]
    except KeyError:
        pass
    if config.DISABLE_JIT:
        msg = 'NUMBA_DISABLE_JIT leaves no CPU kernels; unset it, or pass backend="reference"'
        raise RuntimeError(msg)
    with global_compiler_lock, _compile_lock:
        if name not in _kernels:
            function = build(*jit_for(name))
            function.__qualname__ += f".{name}"
            kernel = numba.njit(no_cfunc_wrapper=True, **OPTIONS | {"nogil": nogil})(function)
            if on_disk:
                kernel._cache = DiskCache(name)
            kernel.compile(SIGNATURE)
            kernel.disable_compile()
            _kernels[name] = kernel
        return _kernels[name]


@cache
def entry(kernel: Any) -> int:
    """Where the kernel's machine code begins."""
    result = kernel.overloads[SIGNATURE.args]
    return result.library.get_pointer_to_function(result.fndesc.llvm_func_name)


def _before_fork() -> None:
    # A child would find the lock of a compile in another thread held for ever, so the compile ends first.
    global_compiler_lock.acquire()
    _compile_lock.acquire()


def _after_fork() -> None:
    _compile_lock.release()
    global_compiler_lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


def bits(x: float) -> int:
    """A float64 as the word that holds it in a kernel's parameters."""
    return struct.unpack("q", struct.pack("d", x))[0]


# --- memory -------------------------------------------------------------------------------------------------

_word_at = ctypes.c_ssize_t.from_address
_probe = np.empty(1)
DATA = object.__basicsize__
"""Where NumPy's C interface puts an array's data pointer: right behind the object's head."""
IS_DIRECT = sys.implementation.name == "cpython" and _word_at(id(_probe) + DATA).value == _probe.ctypes.data
"""Whether it lies there; reading it takes a tenth of the time of `array.ctypes.data`."""


def address(array: NDArray[Any]) -> int:
    """Where the array's first element lies."""
    return _word_at(id(array) + DATA).value if IS_DIRECT else array.ctypes.data


_NONE = np.empty(0, np.uint8), 0


Memory = tuple[NDArray[np.uint8], int]
"""Scratch memory, and its first multiple of 64."""


class _Kept(threading.local):
    memory: Memory = _NONE


_kept = _Kept()
KEPT_BYTES = 16 << 20
"""The most scratch that a thread keeps for its next call: fresh pages cost more than a small call."""


def scratch(size: int) -> tuple[Memory, int]:
    """Scratch memory of at least `size` bytes, and its first multiple of 64; `keep` it for the next call."""
    # A call that a signal handler makes in the middle of this thread's call must not find it.
    memory, _kept.memory = _kept.memory, _NONE
    if memory[0].size < size + 64:
        array = np.empty(size + 64, np.uint8)
        memory = array, (address(array) + 63) & -64
    return memory, memory[1]


def keep(memory: Memory) -> None:
    """Leave scratch memory that nobody uses any more to this thread's next call."""
    if memory[0].size <= KEPT_BYTES:
        _kept.memory = memory


def threads() -> int:
    """How many threads a call may use: what `numba.set_num_threads` or `NUMBA_NUM_THREADS` says."""
    # `numba.get_num_threads` would start Numba's threading layer, which forked children may not survive, and
    # takes a lock that a forked child may find held for ever.
    return parallel._get_num_threads() if parallel._is_initialized else config.NUMBA_NUM_THREADS


# --- what the command line shows ----------------------------------------------------------------------------


def kernel_names(dtypes: Sequence[str]) -> list[str]:
    """The kernels that calls with these dtypes need."""
    from . import handover

    return [handover.NAME, *(name for stem in _stems() for name in stem.kernel_names(dtypes))]


def compile_kernel(name: str) -> str:
    """Make one kernel ready; say whether it was "compiled" or found "cached"."""
    from . import handover

    if name == handover.NAME:
        return "cached" if handover.kernel()._cache.hit else "compiled"
    stem = next(stem for stem in _stems() if name.startswith(stem.__name__.rpartition(".")[2] + "-"))
    return "cached" if stem.kernel(name)._cache.hit else "compiled"


def _stems() -> list[Any]:
    stems = "additive append attention decode hard linear luong matvec products rowwise softmax"
    return [importlib.import_module(f"nbattn.cpu.{stem}") for stem in stems.split()]


def describe() -> dict[str, str]:
    """Label and text of what `nbattn info` says of the CPU."""
    from . import emitters

    return {
        "CPU": cpu_name(),
        "CPU features": " ".join(sorted(cpu_features())) or "baseline",
        "Kernels": f"{emitters.DESCRIPTION}",
        "Threads": str(threads()),
        "Kernel cache": str(cache_folder() or "none (no writable folder: every process compiles)"),
    }
