"""The key/value cache of many sequences, in pages that they share. Its memory is in `store.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import check
from .attention import AttentionOutput
from .check_cache import check_size
from .store import Places, Store

GROUPS = 256
"""Sequences that were appended or attended together, whose tables and plans a cache keeps."""

_INT = frozenset((int,))


class PagedKVCache:
    """Keys and values of many sequences in pages from one pool.

    A sequence is a handle, a whole number that `add` or `fork` gives and no other sequence ever gets. It
    takes a page when it grows into one. A fork shares the pages of what it continues, and copies the last one
    once either of them adds to it.

    Any number of threads may call `attend` at once. Nobody may call a method that changes the cache
    meanwhile.

    Parameters
    ----------
    pages, page_size : int
        The pool: `pages` pages of `page_size` positions each.
    kv_heads, head_dim : int
    dtype, value_dim, rotary_base, rotary_interleaved, rotary_dim, backend
        As in `KVCache`.

    Attributes
    ----------
    lengths : dict of int to int
        How many positions each sequence has.
    free_pages : int
    pages, page_size : int
    dtype : str
    nbytes : int
        The bytes that its keys and values take, with their scales.

    Raises
    ------
    TypeError, ValueError
        For sizes that make no cache, arrays that do not fit, and sequences that are not there, because they
        never were or are freed already. ValueError where an append needs more pages than are free. A call
        that raises leaves any cache as it was.

    References
    ----------
    Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023,
    https://arxiv.org/abs/2309.06180.

    Examples
    --------
    Two continuations of one prompt:

    >>> import numpy as np
    >>> from nbattn import PagedKVCache
    >>> cache = PagedKVCache(pages=10, page_size=4, kv_heads=2, head_dim=16)
    >>> prompt = np.ones((1, 2, 6, 16), np.float32)
    >>> first = cache.add()
    >>> cache.append([first], prompt, prompt)
    >>> second = cache.fork(first)
    >>> cache.free_pages
    8
    >>> token = np.ones((2, 2, 1, 16), np.float32)
    >>> cache.append([first, second], token, token)
    >>> cache.lengths, cache.free_pages
    ({0: 7, 1: 7}, 7)
    >>> cache.attend([first, second], np.ones((2, 8, 1, 16), np.float32)).shape
    (2, 8, 1, 16)
    """

    def __init__(
        self,
        pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: DTypeLike = "float32",
        *,
        value_dim: int | None = None,
        rotary_base: float | None = None,
        rotary_interleaved: bool = False,
        rotary_dim: int | None = None,
        backend: str | None = None,
    ) -> None:
        pages, self._page_size = check_size(pages, "pages"), check_size(page_size, "page_size")
        sizes = (pages, self._page_size, kv_heads, head_dim, value_dim)
        self._store = Store(sizes, dtype, (rotary_base, rotary_interleaved, rotary_dim), None, backend)
        self._uses = np.zeros(pages, np.int64)  # how many sequences hold each page
        self._free = list(range(pages))[::-1]
        self._holds = 0  # the sum of the uses
        self._next = 0
        self._changes = 0  # of any page table
        self._groups: dict[tuple[int, ...], _Group] = {}
        self._rows: dict[int, int] = {}  # of each handle in what follows
        self._free_rows: list[int] = []
        self._table = np.zeros((0, 0), np.int64)
        self._lengths = np.zeros(0, np.int64)
        self._held = np.zeros(0, np.int64)  # pages

    @property
    def lengths(self) -> dict[int, int]:
        """How many positions each sequence has."""
        return {handle: int(self._lengths[row]) for handle, row in self._rows.items()}

    @property
    def pages(self) -> int:
        """How many pages there are."""
        return len(self._uses)

    @property
    def page_size(self) -> int:
        """How many positions a page holds."""
        return self._page_size

    @property
    def dtype(self) -> str:
        """What the cache stores."""
        return self._store.pages.storage

    @property
    def nbytes(self) -> int:
        """The bytes that its keys and values take, with their scales."""
        return self._store.nbytes

    def __repr__(self) -> str:
        sizes = (
            f"{len(self._rows)} sequences, {self.free_pages} of {self.pages} pages of {self.page_size} free"
        )
        return f"PagedKVCache({sizes}, {self.dtype})"

    @property
    def free_pages(self) -> int:
        """How many pages no sequence holds."""
        return len(self._free)

    def add(self) -> int:
        """A new, empty sequence."""
        row = self._free_rows.pop() if self._free_rows else len(self._rows)
        self._widen(row + 1, 0)
        handle, self._next = self._next, self._next + 1
        self._rows[handle] = row
        self._lengths[row] = self._held[row] = 0
        return handle

    def fork(self, sequence: int) -> int:
        """A new sequence that has the positions of this one, in the same memory."""
        source = self._row(sequence)
        handle = self.add()
        row = self._rows[handle]
        held = -(-self._lengths[source] // self._page_size)
        self._uses[self._table[source, :held]] += 1
        self._holds += int(held)
        self._table[row, :held] = self._table[source, :held]
        self._lengths[row], self._held[row] = self._lengths[source], held
        self._changes += 1
        return handle

    def free(self, sequence: int) -> None:
        """End a sequence; pages that no other one holds are free again."""
        self._drop(self._row(sequence), 0)
        handle = check.check_int(sequence, "sequence")
        self._free_rows.append(self._rows.pop(handle))
        for handles in [x for x in self._groups if handle in x]:
            del self._groups[handles]

    def reset(self) -> None:
        """End all sequences."""
        for sequence in list(self._rows):
            self.free(sequence)

    def truncate(self, sequence: int, length: int) -> None:
        """Forget a sequence's positions from `length` on; pages that no sequence needs are free again."""
        row, new = self._row(sequence), check.check_int(length, "length")
        if not 0 <= new <= self._lengths[row]:
            msg = f"length is {new}; expected 0 to {self._lengths[row]}, what sequence {sequence} has"
            raise ValueError(msg)
        self._drop(row, -(-new // self._page_size))
        self._lengths[row] = new

    def append(
        self,
        sequences: int | Sequence[int],
        key: ArrayLike,
        value: ArrayLike,
        lengths: ArrayLike | None = None,
    ) -> None:
        """Add new positions to the end of sequences.

        Parameters
        ----------
        sequences : int or sequence of int
            n handles, all different.
        key, value : array_like, shapes (n, Hkv, S, D) and (n, Hkv, S, Dv)
        lengths : int array_like (n,), optional
            How many of the S each sequence gets, the first ones; all unless given.
        """
        handles = self._handles(sequences)
        if len(set(handles)) < len(handles):
            msg = f"sequences are {list(handles)}; an append can name each one only once"
            raise ValueError(msg)
        k, v, counts = self._store.check_new(key, value, lengths, len(handles))
        rows = self._places(handles).rows
        before = self._pages_now(rows) if self._store.is_on_gpu else None
        self._store.order(k, writes=True)
        try:
            self._take_pages(rows, counts, k)
            self._store.write(self._places(handles), k, v, counts)
        except Exception:
            if before is not None:  # a launch that fails writes nothing
                self._pages_again(rows, *before)
            raise
        self._lengths[rows] += counts

    def attend(
        self,
        sequences: int | Sequence[int],
        query: ArrayLike,
        mask: ArrayLike | None = None,
        *,
        bias: ArrayLike | None = None,
        is_causal: bool = True,
        window_size: tuple[int | None, int | None] | None = None,
        lengths: ArrayLike | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        alibi_slopes: ArrayLike | None = None,
        sinks: ArrayLike | None = None,
        return_lse: bool = False,
        out: NDArray[Any] | None = None,
        backend: str | None = None,
    ) -> NDArray[Any] | AttentionOutput:
        """Attention of the last positions' queries over the keys and values of sequences.

        Parameters
        ----------
        sequences : int or sequence of int
            n handles; a sequence may come up more than once.
        query : array_like, shape (n, Hq, Sq, D)
        mask, bias, is_causal, window_size, lengths, scale, softcap, alibi_slopes, sinks
            As in `KVCache.attend`, with n for B.
        return_lse, out, backend
            Likewise.

        Returns
        -------
        ndarray or AttentionOutput
            As `KVCache.attend`.
        """
        options = (mask, bias, is_causal, window_size, scale, softcap, alibi_slopes, sinks)
        places = self._places(self._handles(sequences))
        return self._store.attend(places, query, options, lengths, return_lse, out, backend)

    def _parts(self, sequences: int | Sequence[int]) -> tuple[Store, Places]:
        """What `cascade_attention` attends."""
        return self._store, self._places(self._handles(sequences))

    # --- pages ----------------------------------------------------------------------------------------------

    def _row(self, sequence: Any) -> int:
        handle = check.check_int(sequence, "sequence")
        try:
            return self._rows[handle]
        except KeyError:
            msg = f"sequence {handle} is not in the cache: it never was, or is freed already"
            raise ValueError(msg) from None

    def _handles(self, sequences: int | Sequence[int]) -> tuple[int, ...]:
        """The handles of a call."""
        if isinstance(sequences, Sequence) or (isinstance(sequences, np.ndarray) and sequences.ndim):
            handles: tuple[Any, ...] = tuple(sequences)
        else:
            handles = (sequences,)
        if set(map(type, handles)) <= _INT:
            return handles
        return tuple(check.check_int(handle, "sequence") for handle in handles)

    def _places(self, handles: tuple[int, ...]) -> _Group:
        """Where these sequences lie now."""
        group = self._groups.get(handles)
        if group is None or group.table.shape[1] != self._table.shape[1]:
            if len(self._groups) >= GROUPS:
                oldest, *_ = self._groups  # at once, for threads may attend meanwhile
                self._groups.pop(oldest, None)
            rows = np.array([self._row(handle) for handle in handles], np.int64)
            group = self._groups[handles] = _Group(self._table[rows], rows)
            group.changes = self._changes
        elif group.changes != self._changes:
            np.take(self._table, group.rows, axis=0, out=group.table, mode="clip")  # "raise" takes a buffer
            group.changes = self._changes
        group.lengths[:] = self._lengths[group.rows]
        group.measure()
        return group

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

    def _take_pages(self, rows: NDArray[np.int64], counts: NDArray[np.int64], key: Any) -> None:
        """Give sequences pages of their own for that many more positions, or raise before any changes."""
        size, lengths = self._page_size, self._lengths[rows]
        wanted = np.maximum(-(-(lengths + counts) // size) - self._held[rows], 0)
        is_shared = self._holds > len(self._uses) - len(self._free)
        copies = self._shared(rows, lengths, counts) if is_shared else []
        needed = int(wanted.sum()) + len(copies)
        if needed == 0:
            return
        if needed > len(self._free):
            msg = (
                f"{counts.sum()} more positions need {needed} pages and {len(self._free)} are free "
                f"(free or truncate sequences, or make the cache with more pages)"
            )
            raise ValueError(msg)
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

    def _pages_now(self, rows: NDArray[np.int64]) -> tuple[Any, ...]:
        """What `_take_pages` changes."""
        return self._uses.copy(), self._free[:], self._holds, self._table[rows], self._held[rows]

    def _pages_again(
        self, rows: NDArray[np.int64], uses: Any, free: Any, holds: int, table: Any, held: Any
    ) -> None:
        """Have it as before."""
        self._uses, self._free, self._holds, self._held[rows] = uses, free, holds, held
        self._table[rows, : table.shape[1]] = table
        self._changes += 1

    def _shared(
        self, rows: NDArray[np.int64], lengths: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> list[tuple[int, int, int]]:
        """Begun pages that are written and that others hold too: row, place in the table, page."""
        begun = (counts > 0) & (lengths % self._page_size > 0)
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
        """Free pages that now one sequence holds."""
        pages = self._free[-count:]
        del self._free[-count:]
        self._uses[pages] = 1
        self._holds += count
        return pages

    def _drop(self, row: int, keep: int) -> None:
        """Let go of a sequence's pages but the first ones."""
        pages = self._table[row, keep : self._held[row]]
        self._uses[pages] -= 1
        self._holds -= len(pages)
        self._free += pages[self._uses[pages] == 0].tolist()
        self._held[row] = min(keep, self._held[row])
        self._changes += 1


class _Group(Places):
    """Sequences that are appended or attended together."""

    def __init__(self, table: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        super().__init__(table)
        self.rows = rows  # of the cache's own tables
        self.changes = 0  # when this table was copied
