"""How a helper sleeps in native code until its slot changes, and is woken: Linux's futex.

A helper that sleeps in Python needs the interpreter's lock when it wakes, which the caller of short calls
gives back and takes again every few microseconds. Each time the system is asked to wake the helper, which
comes 50 us too late, and a call of 13 us took 50.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import simd
from .emitters import I64

_CALLS = {"x86_64": (202, 203, 204, 309), "aarch64": (98, 122, 123, 168)}
"""The numbers of futex, sched_setaffinity, sched_getaffinity and getcpu."""
SLEEPS = sys.platform == "linux" and platform.machine() in _CALLS and ctypes.sizeof(ctypes.c_void_p) == 8
"""Whether helpers sleep here."""
FUTEX, SET_AFFINITY, GET_AFFINITY, GET_CPU = _CALLS[platform.machine()] if SLEEPS else (0,) * 4
WAIT, WAKE = 128, 129  # among threads of one process

STATE, SLOT_ENTRY, SLOT_PARAMETERS, THREAD, SENT, CPU = range(6)
"""Words of a slot's first line: its state; the kernel's entry and parameters; the helper's number in the
system; of how many bytes the set of processors is that it may use once it is awake, or 0; and who woke it."""
CPUS, OTHERS, SET_BYTES = 64, 192, 128
"""Where that set lies in a slot, and the same without the processor of who woke it: 1024 bits each."""
SLOT_BYTES = OTHERS + SET_BYTES


@intrinsic
def _system(typingctx: Any, number: Any, first: Any, second: Any, third: Any, fourth: Any) -> Any:
    """What libc's `syscall` returns; -1 where the system says no."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if not SLEEPS:  # nobody asks, and Windows has no such symbol: LLVM would end the process
            return ir.Constant(I64, -1)
        syscall = ir.FunctionType(I64, [I64], var_arg=True)
        return b.call(cgutils.get_or_insert_function(b.module, syscall, "syscall"), args)

    return types.int64(*[types.int64] * 5), codegen


def build(jit: Any, look: Any) -> tuple[Any, Any, Any, Any]:
    """The compiled functions ``sleep(slot, word)``, as long as that is the slot's state; ``wake(slot)``,
    after that has changed; ``send_away(slot)``, before that, of whom this thread is about to wake; and
    ``come_back(slot)``, of who is awake again.
    """
    get, put = simd.scalars(types.int64)
    get_int = simd.scalars(types.int32)[0]

    @jit
    def sleep(slot, word):
        while look(slot) == word:
            _system(FUTEX, slot, WAIT, word & 0xFFFFFFFF, 0)

    @jit
    def come_back(slot):
        """Use all processors again."""
        size = get(slot + 8 * SENT)
        if size > 0:
            put(slot + 8 * SENT, 0)
            _system(SET_AFFINITY, 0, size, slot + CPUS, 0)

    @jit
    def wake(slot):
        _system(FUTEX, slot, WAKE, 1, 0)

    @jit
    def send_away(slot):
        """Let a helper wake on another core than this thread's.

        Linux likes to wake a thread beside the one that wakes it, and on two cores may leave both there for
        milliseconds: half of the calls after a pause ran at one core's rate.
        """
        size = _system(GET_AFFINITY, 0, SET_BYTES, slot + CPUS, 0)
        if size <= 0 or _system(GET_CPU, slot + 8 * CPU, 0, 0, 0) != 0:
            return
        cpu, others = get_int(slot + 8 * CPU), 0
        for i in range(0, size, 8):
            word = get(slot + CPUS + i)
            if i == cpu // 64 * 8:
                word &= ~(1 << (cpu % 64))
            put(slot + OTHERS + i, word)
            others |= word
        if others != 0 and _system(SET_AFFINITY, get(slot + 8 * THREAD), size, slot + OTHERS, 0) == 0:
            put(slot + 8 * SENT, size)

    return sleep, wake, send_away, come_back
