"""A call that is made again with other arrays: one native call, which looks at them, fills the kernel's
parameters in and runs it.

Of 13 us that four heads of 32 positions and 32 numbers took, 5 were Python's: it now allocates the result
and says which objects are meant.
"""

from __future__ import annotations

import struct
import time
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import arrays, handover, runtime, team
from .handover import AGAIN, ALONE, ENTRY, FINISHED, OTHER, RUNNING, SETTLE, SOURCES, TARGETS, TICKETS
from .runtime import TASKS_DONE, address, entry
from .sleeping import SLEEPS

INPUTS = 3
_CALL = struct.Struct(f"{SOURCES + INPUTS + 1}q")


class Places(NamedTuple):
    """Words of a kernel's parameters that become addresses."""

    query: int
    key: int
    value: int
    out: int
    scratch: int  # where it begins
    more: int  # and so many bytes further on
    shift: int


class Helpers(NamedTuple):
    """Who helps with a call."""

    most: int
    wakes: bool  # whether it wakes those that sleep, or shares with those that are awake
    after: int  # how many short calls follow each other closely before they wake any


WAKING = 16
"""What waking a helper takes the caller, 40 us, in calls that are just long enough to be shared: half of what
they take is what they lose without one."""


def helpers(tasks: int, work: int, short: int, serial: int) -> Helpers | None:
    """Below so much work a call is too `short` for any helper, and up to `serial` for those that sleep.

    None where `team` has more of them than can be reached here.
    """
    wakes = work >= serial
    if tasks == 0 or (wakes and not (SLEEPS and min(runtime.threads(), tasks) <= team.BOARD_SLOTS)):
        return None
    return Helpers(tasks - 1 if work >= short else 0, wakes, -(-WAKING * short // max(work, 1)))


class Again:
    """Calls of one kernel with three inputs of one layout, and an output."""

    KNOWN = handover.KNOWN

    def __init__(
        self, kernel: Any, words: NDArray[np.int64], places: Places, helpers: Helpers,
        thread_bytes: int, inputs: tuple[NDArray[Any], ...], out: NDArray[Any], keep_alive: Any,
    ) -> None:  # fmt: skip
        """`words` are the parameters but for `places`, `out` is an example; a thread has so much scratch."""
        self.words, self.places, self.thread_bytes = words, places, thread_bytes
        self.helpers, self.wakes, self.after = helpers
        self.entry, self.out = entry(kernel), (out.shape, out.dtype)
        self.layout = np.array([word for x in inputs for word in arrays.layout(x)], np.int64)
        self.alignment = inputs[0].dtype.alignment
        self.keep_alive = kernel, [x.dtype for x in inputs], keep_alive
        self.hand_over = handover.kernel()
        self.desks: list[tuple[Any, int]] = []
        """Records that no call uses, with their addresses."""

    def _desk(self) -> tuple[Any, int]:
        """A record, and behind it the kernel's parameters."""
        first = TICKETS + team.BOARD_SLOTS
        record = np.zeros(first + len(self.words), np.int64)
        parameters = address(record[first:])
        *addresses, scratch, more, shift = self.places
        record[ENTRY:TARGETS] = (
            self.entry, parameters, parameters + 8 * TASKS_DONE, address(self.layout), self.alignment - 1,
            address(self.words), len(self.words), 8 * scratch, 8 * more, shift, self.wakes,
        )  # fmt: skip
        record[TARGETS:TICKETS] = [8 * place for place in addresses]
        return record, address(record)

    def run(self, query: Any, key: Any, value: Any, what: int = AGAIN, out: Any = None) -> Any:
        """The output, a new one unless given; None where an input is not an array of the layout.

        With ``what=KNOWN`` the caller knows that they are.
        """
        if out is None:
            out = np.empty(*self.out)
        helpers = self.helpers
        if helpers > 0:
            helpers = min(runtime.threads() - 1, helpers)
        memory, workspace = runtime.scratch(self.places.shift + (helpers + 1) * self.thread_bytes)
        try:
            desk = self.desks.pop()
        except IndexError:
            desk = self._desk()
        record, at = desk
        mates = team.current()
        if self.wakes and helpers > mates.size:
            mates.grow(helpers)
        _CALL.pack_into(
            record, 0, what, mates.board_at, mates.slots, helpers, workspace, id(query), id(key), id(value),
            id(out),
        )  # fmt: skip
        try:
            state = self.hand_over(at)
            if state == ALONE and helpers > 0 and not self.wakes:
                mates.rouse(helpers, self.after)
            elif state < FINISHED:
                self._settle(record, at)
        except BaseException:
            record[0] = SETTLE
            team.abandon(record[TICKETS + team.BOARD_SLOTS :], lambda: self.hand_over(at) == RUNNING)
            raise
        self.desks.append(desk)
        runtime.keep(memory)
        return out if state != OTHER else None

    def _settle(self, record: NDArray[np.int64], at: int) -> None:
        """Wait for helpers."""
        record[0] = SETTLE
        while self.hand_over(at) == RUNNING:
            time.sleep(50e-6)  # a helper may wait for this very core
