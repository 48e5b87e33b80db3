"""The helper threads, and how a kernel's call shares its tasks with them.

The threads are this module's own: Numba's threading layers abort or hang when several threads enter them at
once (workqueue) or after a fork (GNU OpenMP).
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import threading
import time
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .handover import (
    ALONE,
    BOARD,
    FINISHED,
    LINGER,
    OFFER,
    RUNNING,
    SETTLE,
    SHARE,
    TAKEN_BACK,
    TICKETS,
    WANTED,
)
from .handover import kernel as _hand_over
from .runtime import NEXT_TASK, TASKS, TASKS_DONE, address, entry, whereabouts


class _Team:
    """Helper threads that live as long as the process, and the queue they take calls from."""

    def __init__(self) -> None:
        self.calls: SimpleQueue[_Call | _Rouse] = SimpleQueue()
        self.size = 0
        self.last_alone = 0.0
        self.asleep: set[int] = set()
        """The system's ids of helpers that wait for a call."""
        self.sent_away: dict[int, set[int]] = {}
        """Where helpers that `send_away` moved may run once they are awake."""
        self.lock = threading.RLock()  # a signal handler may call while this thread holds it
        self.board = np.zeros((BOARD_SLOTS, 8), np.int64)
        self.board_at = address(self.board)
        """A cache line for each of the first helpers, where calls reach it while it is awake (`handover`)."""

    def grow(self, size: int) -> int:
        """Have `size` helpers where that many can be had; return how many there are."""
        _hand_over()
        with self.lock:
            while self.size < size:
                self.size += 1
                mine = self, self.size - 1
                try:
                    threading.Thread(target=_help, args=mine, name="nbattn", daemon=True).start()
                except RuntimeError:  # the system's limit, or the interpreter is at its end
                    self.size -= 1
                    break
        return self.size

    def rouse(self, helpers: int) -> None:
        """Wake helpers for calls to come, if the last one that met none was just before."""
        now = time.perf_counter()
        closely, self.last_alone = now - self.last_alone < CLOSELY, now
        if closely and self.calls.empty():
            helpers = min(self.grow(helpers), helpers)
            self.send_away()
            for _ in range(helpers):
                self.calls.put(_Rouse())

    def send_away(self) -> None:
        """Let sleeping helpers wake on other cores than this thread's.

        Linux likes to wake a thread beside the one that wakes it, and on two cores may leave both there for
        milliseconds: half of the calls after a pause ran at one core's rate.
        """
        if _current_cpu is None or not 0 < len(self.asleep) <= SENT_AWAY:
            return
        with suppress(OSError, RuntimeError):  # not allowed here; or one woke while they were counted
            cpus = os.sched_getaffinity(0)
            others = cpus - {_current_cpu()}
            for helper in tuple(self.asleep) if others else ():
                self.sent_away[helper] = cpus
                os.sched_setaffinity(helper, others)


class _Rouse:
    """In place of a call: a helper that takes it is awake for the next one."""

    def help(self) -> None:
        pass


BOARD_SLOTS = 64
CLOSELY = 200e-6
"""Seconds between short calls that helpers are woken for: they look for the next one a little longer."""
SENT_AWAY = 3
"""The most helpers that are sent away, at 2 us each; among more cores the system finds an idle one."""
_current_cpu = getattr(ctypes.CDLL(None), "sched_getcpu", None) if sys.platform == "linux" else None


class _Call:
    """One kernel call under way; holds its parameters for helpers that come late."""

    __slots__ = ("abandoned", "address", "entered", "finished", "keep_alive", "kernel", "left", "parameters",
                 "record", "team")  # fmt: skip

    def __init__(self, team: _Team, kernel: Any, parameters: Any, keep_alive: Any) -> None:
        self.team = team
        self.kernel = kernel
        self.address = address(parameters)
        self.parameters = parameters
        self.keep_alive = keep_alive
        self.finished = threading.Lock()
        self.finished.acquire()
        self.abandoned = False
        # One entry per helper: appending is atomic, counting is not.
        self.entered: list[None] = []
        self.left: list[None] = []
        slots = min(team.size, BOARD_SLOTS)
        self.record = np.zeros(TICKETS + slots, np.int64)
        self.record[BOARD:TICKETS] = (
            address(team.board), slots, 0, entry(kernel), self.address, self.address + 8 * TASKS_DONE, 0, 0,
        )  # fmt: skip

    def offer(self, helpers: int) -> int:
        """Offer the call to so many helpers that are awake; return how many there were."""
        self.record[0], self.record[WANTED] = OFFER, helpers
        return _hand_over()(address(self.record))

    def settle(self) -> int:
        """Take the call back from those that have not begun, and wait a while for the others."""
        self.record[0] = SETTLE
        return _hand_over()(address(self.record))

    def help(self) -> None:
        self.entered.append(None)
        if not self.abandoned and self.kernel(self.address):
            self.finished.release()
        self.left.append(None)

    def abandon(self) -> None:
        """Leave the tasks that nobody has taken, and wait for the rest."""
        self.abandoned = True
        words = self.parameters.view(np.int64)
        words[NEXT_TASK] = words[TASKS]
        while self.settle() == RUNNING or len(self.left) < len(self.entered):
            with suppress(KeyboardInterrupt):  # one is on its way already
                time.sleep(0.001)


def _help(team: _Team, number: int) -> None:
    me, hand_over = threading.get_native_id(), _hand_over()
    record = np.array([LINGER, address(team.board[number:])])
    while True:
        if number < BOARD_SLOTS and team.calls.empty():
            hand_over(address(record))
        team.asleep.add(me)
        call = team.calls.get()
        team.asleep.discard(me)
        if cpus := team.sent_away.pop(me, None):
            with suppress(OSError):
                os.sched_setaffinity(0, cpus)
        call.help()
        del call  # its arrays must not live until the next call


_team = _Team()


def _after_fork_in_child() -> None:
    # The child has none of the parent's threads.
    global _team
    _team = _Team()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def run(kernel: Any, parameters: Any, helpers: int, keep_alive: Any) -> None:
    """Run a kernel on this thread and up to `helpers` more; return when every task is done.

    `keep_alive` holds what the parameters give addresses of. `kernel` returns nonzero in the one thread that
    finished the last task.
    """
    if helpers > _team.size:
        helpers = _team.grow(helpers)
    if helpers <= 0:
        kernel(address(parameters))
        return
    call = _Call(_team, kernel, parameters, keep_alive)
    try:
        awake = call.offer(helpers)
        if awake < helpers:
            _team.send_away()
            for _ in range(helpers - awake):
                _team.calls.put(call)
        kernel(call.address)
        while (state := call.settle()) == RUNNING:
            time.sleep(50e-6)  # a helper may wait for this very core
        if state == TAKEN_BACK:
            call.finished.acquire()
        # Helpers that come late look at the parameters alone.
        call.keep_alive = None
    except BaseException:
        # Ctrl-C: once this call is left, no helper may go on writing to the caller's arrays.
        call.abandon()
        raise


class _Kept(threading.local):
    record: Any = None  # of `run_among_awake`, with its address


_kept = _Kept()


def run_among_awake(
    kernel: Any,
    parameters: NDArray[np.int64],
    helpers: int,
    keep_alive: Any,
    first: int = 0,
    count: int = 0,
    wakes: bool = True,
) -> None:
    """Like `run` for a kernel of a few microseconds: nobody is woken for it, and it is one call in all.

    Where such calls follow each other closely and it `wakes`, helpers are woken for those to come. From
    `first` on, `count` parameters are an array's `whereabouts` and become its address.
    """
    kept, _kept.record = _kept.record, None
    if kept is None:
        new = np.zeros(TICKETS + BOARD_SLOTS, np.int64)
        kept = new, address(new)
    record, at = kept
    team = _team
    slots = min(team.size, BOARD_SLOTS) if helpers > 0 else 0
    where = whereabouts(parameters) if count > 0 else address(parameters)
    _HEAD.pack_into(
        record, 0, SHARE, team.board_at, slots, helpers, entry(kernel), where, where + 8 * TASKS_DONE,
        8 * first, count,
    )  # fmt: skip
    state = _hand_over()(at)
    if state == ALONE:
        if wakes and helpers > 0:
            team.rouse(helpers)
    elif state != FINISHED:
        record[0] = SETTLE
        try:
            while _hand_over()(at) == RUNNING:
                time.sleep(50e-6)
        except BaseException:
            parameters[NEXT_TASK] = parameters[TASKS]
            while _hand_over()(at) == RUNNING:
                with suppress(KeyboardInterrupt):  # one is on its way already
                    time.sleep(0.001)
            raise
    _kept.record = kept


_HEAD = struct.Struct(f"{TICKETS}q")
