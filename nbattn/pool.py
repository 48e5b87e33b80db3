"""Which pages the sequences of a `PagedKVCache` hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .store import Store


class Pool:
    """Pages, and a table of those of each sequence, which has a row of it."""

    _store: Store

    def __init__(self, pages: int, page_size: int) -> None:
        self._page_size = page_size
        self._uses = np.zeros(pages, np.int64)  # how many sequences hold each page
        self._free = list(range(pages))[::-1]
        self._holds = 0  # the sum of the uses
        self._changes = self._growth = 0  # of any row of the table, of any length
        self._table = np.zeros((0, 0), np.int64)
        self._lengths = np.zeros(0, np.int64)
        self._held = np.zeros(0, np.int64)  # pages

    def _widen(self, rows: int, width: int) -> None:
        """Have room for that many sequences and pages of each, twice as much as before where it grows."""
        old = self._table.shape
        if rows <= old[0] and width <= old[1]:
            return
        shape = tuple(
            n if n <= have else max(n, 2 * have) for n, have in zip((rows, width), old, strict=True)
        )
        new = max(shape[0], old[0]), max(shape[1], old[1])
        self._table, table = np.zeros(new, np.int64), self._table
        self._table[: old[0], : old[1]] = table
        self._lengths, self._held = (
            np.concatenate((x, np.zeros(new[0] - old[0], np.int64))) for x in (self._lengths, self._held)
        )

    def _needs_pages(self, rows: NDArray[np.int64], counts: NDArray[np.int64]) -> bool:
        """Whether so many more positions may need other pages than sequences hold now."""
        room = self._held[rows] * self._page_size
        return bool((self._lengths[rows] + counts > room).any()) or self._has_shared

    @property
    def _has_shared(self) -> bool:
        """Whether sequences share pages."""
        return self._holds > len(self._uses) - len(self._free)

    def _lacking(
        self, rows: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], list[tuple[int, int, int]]]:
        """How many pages sequences lack for that many more positions, and which they have to copy."""
        size, lengths = self._page_size, self._lengths[rows]
        wanted = np.maximum(-(-(lengths + counts) // size) - self._held[rows], 0)
        copies = self._shared(rows[counts > 0], lengths[counts > 0]) if self._has_shared else []
        needed = int(wanted.sum()) + len(copies)
        if needed > len(self._free):
            msg = (
                f"{counts.sum()} more positions need {needed} pages and {len(self._free)} are free "
                f"(free or truncate sequences, or make the cache with more pages)"
            )
            raise ValueError(msg)
        return wanted, copies

    def _take_pages(
        self,
        rows: NDArray[np.int64],
        wanted: NDArray[np.int64],
        copies: list[tuple[int, int, int]],
        key: Any,
    ) -> None:
        """Give sequences the pages that `_lacking` found."""
        if not copies and not wanted.any():
            return
        size = self._page_size
        self._changes += 1
        self._widen(0, int((self._held[rows] + wanted).max(initial=0)))
        for row, index, page in copies:
            self._table[row, index] = own = self._take(1)[0]
            filled = self._lengths[row] % size
            self._store.copy(page, own, int(filled), key)
            self._uses[page] -= 1
            self._holds -= 1
        for i in np.flatnonzero(wanted):
            row, held, more = rows[i], self._held[rows[i]], int(wanted[i])
            self._table[row, held : held + more] = self._take(more)
            self._held[row] += more

    @contextmanager
    def _all_or_nothing(self, rows: NDArray[np.int64]) -> Iterator[None]:
        """Have sequences' pages be as before where work on a GPU fails: a launch then writes nothing."""
        if not self._store.is_on_gpu:
            yield
            return
        uses, free, holds = self._uses.copy(), self._free[:], self._holds
        table, held = self._table[rows], self._held[rows]
        try:
            yield
        except Exception:
            self._uses, self._free, self._holds, self._held[rows] = uses, free, holds, held
            self._table[rows, : table.shape[1]] = table
            self._changes += 1
            raise

    def _shared(self, rows: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[tuple[int, int, int]]:
        """Begun pages that others hold too, and who is to have a copy: row, place in the table, page."""
        begun = lengths % self._page_size > 0
        rows, index = rows[begun], lengths[begun] // self._page_size
        pages = self._table[rows, index]
        if (self._uses[pages] < 2).all():
            return []
        copies = []
        left = {int(page): int(self._uses[page]) for page in pages}
        for row, i, page in zip(rows.tolist(), index.tolist(), pages.tolist(), strict=True):
            if left[page] > 1:  # the last one that holds a page may write into it
                left[page] -= 1
                copies.append((row, i, page))
        return copies

    def _take(self, count: int) -> list[int]:
        """Free pages that now one sequence holds, in the order of memory as long as they lie so."""
        pages = self._free[: -count - 1 : -1]
        del self._free[-count:]
        self._uses[pages] = 1
        self._holds += count
        return pages

    def _drop(self, row: int, keep: int) -> None:
        """Let go of a sequence's pages but the first ones."""
        pages = self._table[row, keep : self._held[row]]
        self._uses[pages] -= 1
        self._holds -= len(pages)
        self._free += pages[self._uses[pages] == 0][::-1].tolist()
        self._held[row] = min(keep, self._held[row])
        self._changes += 1
