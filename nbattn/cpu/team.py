"""The helper threads, and how a kernel's call shares its tasks with them.

The threads are this module's own: Numba's threading layers abort or hang when several threads enter them at
once (workqueue) or after a fork (GNU OpenMP).
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .handover import (
    ALONE,
    ASLEEP,
    AWAY,
    BOARD,
    ENTRY,
    FINISHED,
    LAYOUT,
    LINGER,
    OFFER,
    ROUND,
    ROUSE,
    RUNNING,
    SETTLE,
    SHARE,
    TAKEN_BACK,
    TICKETS,
    WANTED,
    WORKSPACE,
)
from .handover import kernel as _hand_over
from .runtime import NEXT_TASK, TASKS, TASKS_DONE, address, entry
from .sleeping import SLEEPS, SLOT_BYTES, THREAD

BOARD_SLOTS = 64
CLOSELY = 200e-6
"""Seconds between short calls that helpers are woken for: they look for the next one a little longer."""


class _Team:
    """Helper threads that live as long as the process, and the queue of calls for those that have no slot,
    are in another call, or sleep in Python."""

    def __init__(self) -> None:
        self.calls: SimpleQueue[_Call | _Rouse] = SimpleQueue()
        self.size = self.slots = 0
        self.last_alone, self.alone = 0.0, 0
        self.lock = threading.RLock()  # a signal handler may call while this thread holds it
        self.board = np.zeros((BOARD_SLOTS + 1, SLOT_BYTES // 8), np.int64)
        self.board_at = address(self.board)
        """A slot for each of the first helpers, where calls reach it (`handover`), and one whose first word
        is not 0 where there are calls in the queue."""
        self.queued = self.board[BOARD_SLOTS]

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
            self.slots = min(self.size, BOARD_SLOTS)
        return self.size

    def rouse(self, helpers: int, after: int = 1) -> None:
        """Wake helpers for calls to come, if so many that met none have followed each other closely."""
        now = time.perf_counter()
        self.alone = self.alone + 1 if now - self.last_alone < CLOSELY else 0
        self.last_alone = now
        if self.alone < after:
            return
        self.alone = 0
        helpers = min(self.grow(helpers), helpers)
        if SLEEPS:
            record = np.zeros(TICKETS, np.int64)
            record[0], record[BOARD:WORKSPACE] = ROUSE, (self.board_at, self.slots, helpers)
            _hand_over()(address(record))
        elif self.calls.empty():
            self.put(_Rouse(), helpers)

    def put(self, call: _Call | _Rouse, helpers: int) -> None:
        """Leave a call in the queue for so many."""
        with self.lock:
            for _ in range(helpers):
                self.calls.put(call)
            self.queued[0] = 1

    def get(self) -> _Call | _Rouse | None:
        """The next call of the queue, or None."""
        with suppress(Empty):
            return self.calls.get_nowait()
        with self.lock:
            if self.calls.empty():
                self.queued[0] = 0
                return None
        return self.get()

    def resting(self) -> list[int]:
        """The system's numbers of helpers that are in no call and watch for none."""
        return [int(slot[THREAD]) for slot in self.board[: self.slots] if slot[0] % ROUND in (AWAY, ASLEEP)]


class _Rouse:
    """In place of a call: a helper that takes it is awake for the next one."""

    def help(self) -> None:
        pass


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
        slots = team.slots
        self.record = np.zeros(TICKETS + slots, np.int64)
        self.record[BOARD:WANTED] = team.board_at, slots
        self.record[ENTRY:LAYOUT] = entry(kernel), self.address, self.address + 8 * TASKS_DONE

    def offer(self, helpers: int) -> int:
        """Offer the call to so many helpers that have a slot and are in no other call; return how many."""
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
        self.abandoned = True
        words = self.parameters.view(np.int64)
        abandon(words, lambda: self.settle() == RUNNING or len(self.left) < len(self.entered))


def _help(team: _Team, number: int) -> None:
    hand_over = _hand_over()
    if number < BOARD_SLOTS:
        team.board[number, THREAD] = threading.get_native_id()
        record = np.array([LINGER, address(team.board[number:]), address(team.queued)])
    while True:
        if number < BOARD_SLOTS:
            hand_over(address(record))
        call = team.get()
        if call is None and (number >= BOARD_SLOTS or not SLEEPS):
            call = team.calls.get()
        while call is not None:
            call.help()
            call = team.get()  # the last one's arrays must not live until the next one


_team = _Team()


def _after_fork_in_child() -> None:
    # The child has none of the parent's threads.
    global _team
    _team = _Team()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def current() -> _Team:
    """The helpers of this process."""
    return _team


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
        offered = call.offer(helpers)
        if offered < helpers:
            _team.put(call, helpers - offered)
        kernel(call.address)
        while (state := call.settle()) == RUNNING:
            time.sleep(50e-6)  # a helper may wait for this very core
        if state == TAKEN_BACK:
            call.finished.acquire()
        # Helpers that come late look at the parameters alone.
        call.keep_alive = None
    except BaseException:
        call.abandon()
        raise


def abandon(parameters: NDArray[np.int64], is_running: Callable[[], bool]) -> None:
    """Leave the tasks that nobody has taken, and wait until helpers are done with theirs.

    After Ctrl-C: once a call is left, no helper may go on writing to the caller's arrays.
    """
    parameters[NEXT_TASK] = parameters[TASKS]
    running = True
    while running:
        with suppress(KeyboardInterrupt):  # one is on its way already
            running = is_running()
            if running:
                time.sleep(0.001)


class _Kept(threading.local):
    record: Any = None  # of `run_among_awake`, with its address


_kept = _Kept()


def run_among_awake(kernel: Any, parameters: NDArray[np.int64], helpers: int, keep_alive: Any) -> None:
    """Like `run` for a kernel of a few microseconds: nobody is woken for it, and it is one call in all.

    Where such calls follow each other closely, helpers are woken for those to come.
    """
    kept, _kept.record = _kept.record, None
    if kept is None:
        new = np.zeros(TICKETS + BOARD_SLOTS, np.int64)
        kept = new, address(new)
    record, at = kept
    team, where = _team, address(parameters)
    _HEAD.pack_into(
        record, 0, SHARE, team.board_at, team.slots, helpers, *_NO_SOURCES,
        entry(kernel), where, where + 8 * TASKS_DONE,
    )  # fmt: skip
    state = _hand_over()(at)
    if state == ALONE:
        team.rouse(helpers)
    elif state != FINISHED:
        record[0] = SETTLE
        try:
            while _hand_over()(at) == RUNNING:
                time.sleep(50e-6)
        except BaseException:
            abandon(parameters, lambda: _hand_over()(at) == RUNNING)
            raise
    _kept.record = kept


_HEAD = struct.Struct(f"{LAYOUT}q")
_NO_SOURCES = (0,) * (ENTRY - WORKSPACE)
