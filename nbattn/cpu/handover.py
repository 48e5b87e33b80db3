"""How a call reaches helpers that are still awake, and gets back from them: without Python, in a microsecond.

Through Python a helper would wait for the interpreter's lock, which the caller holds until it is in its
kernel, and the caller for a lock that the last helper releases. Both sleep meanwhile, and waking takes 50 us.
Here each helper watches a slot of three words: its state, a kernel's entry and its parameters. The caller
writes them, and takes back what no helper has begun.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import emitters, simd
from .emitters import I64, pointer
from .runtime import TASKS, TASKS_DONE, compiled

LINGER, OFFER, SETTLE, SHARE = range(4)
"""What `handover` is asked for: the first word of its record. A helper's record holds its slot's address."""
BOARD, SLOTS, WANTED, ENTRY, PARAMETERS, DONE, FIRST, COUNT, TICKETS = range(1, 10)
"""Words of a caller's record: where the slots lie, how many, how many helpers are wanted; the kernel's entry
and parameters, where the number of done tasks lies; for SHARE the first byte of so many words of the
parameters that say where an address lies and are to become it, and where there are any, the parameters are
told so too; then for each slot the round it was offered in, or 0."""
RUNNING, TAKEN_BACK, FINISHED, ALONE = range(4)
"""What SETTLE answers: helpers of the board are in the call; they are not, but others are; it is done. SHARE
may also answer that it is done, but nobody else was awake."""

SLOT_BYTES = 64
ASLEEP, IDLE, CLAIMED, OFFERED, TAKEN = range(5)
"""The lowest three bits of a slot's state; the others count its calls, so that none passes for another."""
ROUND = 8

PATIENCE = 20_000
"""How often a helper looks for another call before it sleeps, some 0.3 ms. A tenth of that is less than the
last task and the Python between two calls: then 16x128x64 takes 580 us on two threads, and so 300."""
SETTLING = 20_000
"""How often a caller looks for the end before it lets Python see to signals."""

get, put = simd.scalars(types.int64)


@intrinsic
def look(typingctx: Any, address: Any) -> Any:
    """The word at an address, before anything that is read after it."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.load_atomic(pointer(b, args[0], I64), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def publish(typingctx: Any, address: Any, word: Any) -> Any:
    """Write a word, after everything that was written before it."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        b.store_atomic(args[1], pointer(b, args[0], I64), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def swap(typingctx: Any, address: Any, before: Any, after: Any) -> Any:
    """Whether the word at an address was `before`; then it is `after`."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        result = b.cmpxchg(pointer(b, args[0], I64), args[1], args[2], "seq_cst", "seq_cst")
        return b.extract_value(result, 1)

    return types.boolean(*[types.int64] * 3), codegen


@intrinsic
def pause(typingctx: Any) -> Any:
    """Let the other thread of this core work for a moment."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        emitters.pause_value(b)
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def enter(typingctx: Any, entry: Any, parameters: Any) -> Any:
    """Run a kernel from its entry, as Numba's compiled functions call each other."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        error = ir.IntType(8).as_pointer()
        kernel = ir.FunctionType(ir.IntType(32), [I64.as_pointer(), error.as_pointer(), I64])
        places = [cgutils.alloca_once(b, t) for t in (I64, error)]
        b.call(b.inttoptr(args[0], kernel.as_pointer()), [*places, args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def build(jit: Any, inline: Any) -> Callable[[Any], Any]:
    """The kernel of a record's address."""

    @jit
    def linger(slot):
        publish(slot, get(slot) + IDLE)
        turn = 0
        while True:
            word = look(slot)
            if word % ROUND == OFFERED:
                if swap(slot, word, word - OFFERED + TAKEN):
                    enter(get(slot + 8), get(slot + 16))
                    publish(slot, word - OFFERED + IDLE)
                    turn = 0
            elif turn < PATIENCE:
                pause()
                turn += 1
            elif word % ROUND == IDLE and swap(slot, word, word - IDLE + ASLEEP):
                return 0

    @jit
    def offer(record):
        """How many helpers were awake."""
        offered = 0
        for i in range(get(record + 8 * SLOTS)):
            slot = get(record + 8 * BOARD) + SLOT_BYTES * i
            word = look(slot)
            mine = word - IDLE + ROUND
            if word % ROUND == IDLE and swap(slot, word, mine + CLAIMED):
                put(slot + 8, get(record + 8 * ENTRY))
                put(slot + 16, get(record + 8 * PARAMETERS))
                put(record + 8 * (TICKETS + i), mine)
                publish(slot, mine + OFFERED)
                offered += 1
                if offered == get(record + 8 * WANTED):
                    break
        return offered

    @jit
    def settle(record):
        turn = 0
        for i in range(get(record + 8 * SLOTS)):
            mine = get(record + 8 * (TICKETS + i))
            slot = get(record + 8 * BOARD) + SLOT_BYTES * i
            while mine != 0:
                word = look(slot)
                if word == mine + TAKEN:
                    if turn == SETTLING:
                        return RUNNING
                    pause()
                    turn += 1
                elif word != mine + OFFERED or swap(slot, word, mine + IDLE):
                    mine = 0
            put(record + 8 * (TICKETS + i), 0)
        tasks = get(get(record + 8 * PARAMETERS) + 8 * TASKS)
        while look(get(record + 8 * DONE)) < tasks:
            if turn == SETTLING:
                return TAKEN_BACK
            pause()
            turn += 1
        return FINISHED

    @jit
    def share(record):
        """Offer a call, run it, and settle it; or tell that nobody else was awake."""
        count = get(record + 8 * COUNT)
        if count > 0:
            parameters = get(get(record + 8 * PARAMETERS))
            put(record + 8 * PARAMETERS, parameters)
            put(record + 8 * DONE, parameters + 8 * TASKS_DONE)
            for i in range(count):
                word = parameters + get(record + 8 * FIRST) + 8 * i
                put(word, get(get(word)))
        offered = offer(record)
        enter(get(record + 8 * ENTRY), get(record + 8 * PARAMETERS))
        return settle(record) if offered > 0 else ALONE

    def hand_over(record):
        what = get(record)
        if what == LINGER:
            return linger(get(record + 8))
        if what == SHARE:
            return share(record)
        return offer(record) if what == OFFER else settle(record)

    return hand_over


NAME = "runtime-handover"
kernel = partial(compiled, NAME, build)
