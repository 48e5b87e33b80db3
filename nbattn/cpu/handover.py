"""How a call reaches helpers and gets back from them: without Python, those that are awake in a microsecond.

Through Python a helper would wait for the interpreter's lock, which the caller holds until it is in its
kernel, and the caller for a lock that the last helper releases. Both sleep meanwhile, and waking takes 50 us.
Here each helper watches a slot: its state, a kernel's entry and its parameters. The caller writes them, and
takes back what no helper has begun. On Linux helpers sleep here too (`sleeping`), so that waking one takes
the caller nothing but the system's time; elsewhere they sleep in Python, and are woken through its queue.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import arrays, emitters, simd, sleeping
from .emitters import I64, pointer
from .runtime import TASKS, compiled
from .sleeping import SLEEPS, SLOT_BYTES, SLOT_ENTRY, SLOT_PARAMETERS

LINGER, OFFER, SETTLE, SHARE, AGAIN, KNOWN, ROUSE = range(7)
"""What `handover` is asked for: the first word of its record. A helper's record holds its slot's address, and
that of a word that is not 0 where calls wait in Python."""
BOARD, SLOTS, WANTED, WORKSPACE, SOURCES = range(1, 6)
"""Words of a caller's record: where the slots lie, how many, how many helpers are wanted. For AGAIN and KNOWN
(`repeats`) also where scratch lies, and four objects: three inputs and an output."""
ENTRY, PARAMETERS, DONE, LAYOUT, ALIGNMENT, TEMPLATE, SIZE = range(9, 16)
WORKSPACE_AT, MORE_AT, MORE, WAKES, TARGETS = range(16, 21)
"""More of them: the kernel's entry and parameters, where the number of done tasks lies. For AGAIN and KNOWN
also the words that the inputs' layouts are held to, the bits that are 0 in their addresses, parameters to be
copied and how many words; which bytes of them become the addresses of scratch, of so many bytes behind it,
and of the four arrays; and whether helpers that sleep are woken."""
TICKETS = TARGETS + 4
"""Then for each slot the round it was offered in, or 0."""
RUNNING, TAKEN_BACK, FINISHED, ALONE, OTHER = range(5)
"""What SETTLE answers: helpers of the board are in the call; they are not, but others are; it is done. The
calls that share may also answer that it is done, but nobody else was awake, and AGAIN that an input is laid
out in another way, so that nothing was done."""

AWAY, IDLE, CLAIMED, OFFERED, TAKEN, ASLEEP = range(6)
"""The lowest three bits of a slot's state; the others count its calls, so that none passes for another. Who
is away is in Python."""
ROUND = 8

PATIENCE = 20_000
"""How often a helper looks for another call before it sleeps, some 0.3 ms. A tenth of that is less than the
last task and the Python between two calls: then 16x128x64 takes 580 us on two threads, and so 300."""
SENT_AWAY = 3
"""The most sleeping helpers that are sent away, at 2 us each: among more cores the system finds an idle one.
"""
SETTLING = 20_000
"""How often a caller looks for the end before it lets Python see to signals."""

get, put = simd.scalars(types.int64)


@intrinsic
def look(typingctx: Any, address: Any) -> Any:
    """The word at an address, before anything that is read after it."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.load_atomic(pointer(b, args[0], I64), "seq_cst", 8)

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
def release_lock(typingctx: Any) -> Any:
    """Let other threads use the interpreter; what `take_lock` wants to be told."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        release = ir.FunctionType(emitters.I8.as_pointer(), [])
        state = b.call(cgutils.get_or_insert_function(b.module, release, "PyEval_SaveThread"), [])
        return b.ptrtoint(state, I64)

    return types.int64(), codegen


@intrinsic
def take_lock(typingctx: Any, state: Any) -> Any:
    """Wait until this thread has the interpreter again."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        state = b.inttoptr(args[0], emitters.I8.as_pointer())
        take = ir.FunctionType(ir.VoidType(), [state.type])
        b.call(cgutils.get_or_insert_function(b.module, take, "PyEval_RestoreThread"), [state])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


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
    laid_so = arrays.build(jit)
    sleep, wake, send_away, come_back = sleeping.build(jit, look)

    @jit
    def linger(slot, queued):
        publish(slot, get(slot) + IDLE)
        turn = 0
        while True:
            word = look(slot)
            idle = word % ROUND == IDLE
            if word % ROUND == OFFERED:
                if swap(slot, word, word - OFFERED + TAKEN):
                    enter(get(slot + 8 * SLOT_ENTRY), get(slot + 8 * SLOT_PARAMETERS))
                    publish(slot, word - OFFERED + IDLE)
                    turn = 0
            elif idle and (look(queued) != 0 or (turn >= PATIENCE and not SLEEPS)):
                if swap(slot, word, word - IDLE + AWAY):
                    return 0
            elif turn < PATIENCE or not idle:
                pause()
                turn += 1
            elif swap(slot, word, word - IDLE + ASLEEP):
                # Whoever put something into the queue may have seen this one awake until now.
                if look(queued) == 0:
                    sleep(slot, word - IDLE + ASLEEP)
                    # One that had not fallen asleep yet sees itself claimed before it is sent away.
                    while look(slot) % ROUND == CLAIMED:
                        pause()
                    come_back(slot)
                elif swap(slot, word - IDLE + ASLEEP, word - IDLE + AWAY):
                    return 0
                turn = 0

    @jit
    def offer_to(record, state, wanted):
        """Offer the call to so many helpers that are idle, or asleep; return to how many."""
        offered = 0
        apart = state == ASLEEP and few_asleep(record)
        for i in range(get(record + 8 * SLOTS) if wanted > 0 else 0):
            slot = get(record + 8 * BOARD) + SLOT_BYTES * i
            word = look(slot)
            mine = word - state + ROUND
            if word % ROUND == state and swap(slot, word, mine + CLAIMED):
                put(slot + 8 * SLOT_ENTRY, get(record + 8 * ENTRY))
                put(slot + 8 * SLOT_PARAMETERS, get(record + 8 * PARAMETERS))
                put(record + 8 * (TICKETS + i), mine)
                if apart:
                    send_away(slot)
                publish(slot, mine + OFFERED)
                if state == ASLEEP:
                    wake(slot)
                offered += 1
                if offered == wanted:
                    break
        return offered

    @jit
    def offer(record, wakes):
        """To how many helpers."""
        wanted = get(record + 8 * WANTED)
        offered = offer_to(record, IDLE, wanted)
        return offered + offer_to(record, ASLEEP, wanted - offered) if wakes else offered

    @jit
    def few_asleep(record):
        asleep = 0
        for i in range(get(record + 8 * SLOTS)):
            asleep += look(get(record + 8 * BOARD) + SLOT_BYTES * i) % ROUND == ASLEEP
        return asleep <= SENT_AWAY

    @jit
    def rouse(record):
        """Wake so many helpers for calls to come."""
        apart, roused = few_asleep(record), 0
        for i in range(get(record + 8 * SLOTS)):
            slot = get(record + 8 * BOARD) + SLOT_BYTES * i
            word = look(slot)
            mine = word - ASLEEP + ROUND
            if word % ROUND == ASLEEP and swap(slot, word, mine + CLAIMED):
                if apart:
                    send_away(slot)
                publish(slot, mine + IDLE)
                wake(slot)
                roused += 1
                if roused == get(record + 8 * WANTED):
                    break
        return roused

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
        offered = offer(record, SLEEPS and get(record + 8 * WAKES) != 0)
        enter(get(record + 8 * ENTRY), get(record + 8 * PARAMETERS))
        return settle(record) if offered > 0 else ALONE

    @jit
    def ready(record):
        """Whether the inputs are laid out as those of the call before."""
        words, odd = get(record + 8 * LAYOUT), get(record + 8 * ALIGNMENT)
        for i in range(3):
            x = get(record + 8 * (SOURCES + i))
            if not laid_so(x, words) or get(x + arrays.DATA) & odd != 0:
                return False
            words += 8 * (3 + 2 * get(words + 16))
        return True

    @jit
    def fill(record):
        """The kernel's parameters."""
        template, parameters = get(record + 8 * TEMPLATE), get(record + 8 * PARAMETERS)
        for i in range(0, 8 * get(record + 8 * SIZE), 8):
            put(parameters + i, get(template + i))
        workspace = get(record + 8 * WORKSPACE)
        put(parameters + get(record + 8 * MORE_AT), workspace + get(record + 8 * MORE))
        put(parameters + get(record + 8 * WORKSPACE_AT), workspace)
        for i in range(4):
            x = get(record + 8 * (SOURCES + i))
            put(parameters + get(record + 8 * (TARGETS + i)), get(x + arrays.DATA))

    def hand_over(record):
        what = get(record)
        if what == OFFER:
            return offer(record, SLEEPS)
        if what == ROUSE:
            return rouse(record)
        # While this thread has the interpreter, nobody changes an array's shape in place.
        if what == AGAIN and not ready(record):
            return OTHER
        if what in (AGAIN, KNOWN):
            fill(record)
        state = release_lock()
        if what == LINGER:
            result = linger(get(record + 8), get(record + 16))
        elif what == SETTLE:
            result = settle(record)
        else:
            result = share(record)
        take_lock(state)
        return result

    return hand_over


NAME = "runtime-handover"
kernel = partial(compiled, NAME, build, nogil=False)  # it lets the lock go itself
