"""The key/value cache of many sequences, in pages that they share. Its memory is in `store.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import check
from .attention import AttentionOutput
from .check_cache import check_no_lengths, check_size, refuse
from .pool import Pool
from .recorded import Recorded
from .store import Places, Store

GROUPS = 256
"""Sequences that were appended or attended together, whose tables and plans a cache keeps."""

_INT = frozenset((int,))


class PagedKVCache(Pool):
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
        As in `KVCache`, whose notes on GPUs hold for pages too. Tables and lengths stay on the host, and go
        to the GPU when they have changed; a CUDA graph needs `reserve` and `advance`.

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
        pages, page_size = check_size(pages, "pages"), check_size(page_size, "page_size")
        sizes = (pages, page_size, kv_heads, head_dim, value_dim)
        self._store = Store(sizes, dtype, (rotary_base, rotary_interleaved, rotary_dim), None, backend)
        super().__init__(pages, page_size)
        self._next = 0
        self._groups: dict[tuple[int, ...], _Group] = {}
        self._rows: dict[int, int] = {}  # of each handle in what follows
        self._free_rows: list[int] = []
        self._recorded: dict[int, Recorded] = {}  # by the number of sequences
        self._older: list[Recorded] = []  # of graphs that may still be there

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
        self._take_back((check.check_int(sequence, "sequence"),))
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
        row, handle = self._row(sequence), check.check_int(sequence, "sequence")
        self._take_back((handle,))
        self._drop(row, 0)
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
        self._take_back((check.check_int(sequence, "sequence"),))
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
        handles = self._different(sequences, "an append")
        places = self._places(handles)
        if lengths is None and places.rewrite is not None and places.is_alone:
            rows, run, counts = places.rewrite
            if rows <= places.spare and run(key, value, places.lengths, out=counts) is not None:
                self._grow(places, counts, rows)
                return
        k, v, counts = self._store.check_new(key, value, lengths, len(handles))
        if (recorded := self._store.in_a_graph(places, k)) is not None:
            check_no_lengths(lengths)
            self._record(self._recorded[len(handles)], k.shape[2])
            self._store.write(recorded, k, v, counts)
            return
        needs = self._needs_pages(places.rows, counts)
        lacking = self._lacking(places.rows, counts) if needs else None
        self._take_back(handles)
        self._store.order(k, writes=True)
        if lacking is not None:
            with self._all_or_nothing(places.rows):
                self._take_pages(places.rows, *lacking, k)
                places = self._places(handles)
                self._store.write(places, k, v, counts)
        else:
            self._store.write(places, k, v, counts)
        self._grow(places, counts, k.shape[2] if lengths is None else None)

    def reserve(self, sequences: int | Sequence[int], count: int) -> None:
        """Have sequences hold the pages that they need for further positions.

        Appends of so many then take no pages, and do not fail for want of them, where no fork comes between,
        as it would share the page that is begun. What is not used goes back with `free` and `truncate`. On a
        GPU it is also what a CUDA graph needs: see `advance`.

        Parameters
        ----------
        sequences : int or sequence of int
            n handles, all different.
        count : int
            How many positions more than now each sequence shall have room for.

        Raises
        ------
        TypeError, ValueError
            ValueError where fewer pages are free than that takes. The cache is then as it was.

        Examples
        --------
        >>> from nbattn import PagedKVCache
        >>> cache = PagedKVCache(pages=10, page_size=4, kv_heads=2, head_dim=16)
        >>> cache.reserve([cache.add(), cache.add()], 10)
        >>> cache.free_pages
        4
        """
        handles, size = self._different(sequences, "a reserve"), self._check_count(count)
        rows, here = self._places(handles).rows, None
        lacking = self._lacking(rows, np.full(len(handles), size))
        if self._store.is_on_gpu:
            self._take_back(handles)
            here = self._store.on_current_stream()
            self._store.order(here, writes=True)
        with self._all_or_nothing(rows):
            self._take_pages(rows, *lacking, here)
            width, old = int(self._held[rows].max(initial=0)), self._recorded.get(len(handles))
            if here is None or width == 0 or (old is not None and old.width >= width):
                return
            new = Recorded(len(handles), width, self._store.gpu, here.stream)
            if old is not None:
                old.take_back(here.stream)
                self._older.append(old)
        self._recorded[len(handles)] = new

    def advance(self, sequences: int | Sequence[int], count: int = 1) -> None:
        """Have sequences be longer, before a CUDA graph fills the new positions and attends.

        As `KVCache.advance`, but a graph is of n sequences, whichever they are: those that the last `advance`
        of n sequences named, in its order. `reserve` comes first: a graph reaches as many pages of a sequence
        as the one with most of them had among n sequences that it was called for, and launches write into
        pages that sequences hold alone. Once the cache has changed such a sequence in another way, launches
        write nothing and their outputs are NaN until the next `advance`; so it is, for good, with graphs that
        were captured before a `reserve` that reached further, as those are to be captured again.

        Parameters
        ----------
        sequences : int or sequence of int
            n handles, all different.
        count : int
            How many positions each sequence gets: S of the recorded `append`.

        Raises
        ------
        TypeError, ValueError
            ValueError for a cache on the host, and where a sequence has no pages of its own for the
            positions, or the graph does not reach them; the cache is then as it was.

        Examples
        --------
        A decoder's steps, with tensors of PyTorch, after one that was not captured and had kernels loaded::

            cache.reserve(sequences, 100)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                cache.append(sequences, key, value)      # (n, Hkv, 1, D), filled anew before each launch
                output = cache.attend(sequences, query)
            for _ in range(100):
                cache.advance(sequences)
                graph.replay()
        """
        if not self._store.is_on_gpu:
            msg = 'advance is for graphs of a cache with backend="cuda"; append to others'
            raise ValueError(msg)
        handles, size = self._different(sequences, "an advance"), self._check_count(count)
        rows, recorded = self._places(handles).rows, self._recorded.get(len(handles))
        if recorded is None:
            msg = f"call reserve for {len(handles)} sequences before a graph is captured and launched"
            raise ValueError(msg)
        new = self._lengths[rows] + size
        self._check_reserved(rows, new, max(size, recorded.most), recorded.width)
        here = self._store.on_current_stream()
        self._store.order(here, writes=True)
        self._take_back(handles, but=recorded)
        recorded.tell(handles, self._changes, self._table[rows], new, here.stream)
        self._lengths[rows] = new
        self._growth += 1

    def _check_count(self, count: Any) -> int:
        """How many positions more; so few that no sum of them overflows."""
        size, room = check_size(count, "count", least=0), self.pages * self._page_size
        if size > room:
            msg = f"count is {size}, and all pages together hold {room} positions"
            raise ValueError(msg)
        return size

    def _record(self, recorded: Recorded, count: int) -> None:
        """Know how many positions launches write: whom they are for now, too, needs pages of its own."""
        rows = np.array([self._rows[handle] for handle in recorded.sequences], np.int64)
        self._check_reserved(rows, self._lengths[rows], count, recorded.width)
        recorded.most = max(recorded.most, count)

    def _check_reserved(
        self, rows: NDArray[np.int64], new: NDArray[np.int64], written: int, width: int
    ) -> None:
        """Whether launches find pages for sequences of these lengths, and nobody else's where they write."""
        room = self._held[rows] * self._page_size
        refuse(new > room, new, "lengths", "but there is room for {}; reserve more", room)
        reach = np.full(len(rows), width * self._page_size)
        refuse(new > reach, new, "lengths", "but graphs reach {}; reserve, and capture them again", reach)
        for row, length in zip(rows.tolist(), new.tolist(), strict=True):
            first, last = max(length - written, 0) // self._page_size, -(-length // self._page_size)
            if written and (self._uses[self._table[row, first:last]] > 1).any():
                msg = "a fork shares a page that the launch would write; reserve once more"
                raise ValueError(msg)

    def _take_back(self, handles: tuple[int, ...], but: Recorded | None = None) -> None:
        """Have no launch of a graph be for these sequences, which change."""
        for recorded in self._recorded.values():
            if recorded is not but and not recorded.sequences.isdisjoint(handles):
                here = self._store.on_current_stream()
                self._store.order(here, writes=True)  # launches may still read it
                recorded.take_back(here.stream)

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

    def _parts(self, sequences: int | Sequence[int] | None) -> tuple[Store, Places]:
        """What `cascade_attention` attends."""
        if sequences is None:
            msg = "value is missing; it must be the sequences where key is a PagedKVCache"
            raise ValueError(msg)
        return self._store, self._places(self._handles(sequences))

    # --- pages ----------------------------------------------------------------------------------------------

    def _row(self, sequence: Any) -> int:
        handle = check.check_int(sequence, "sequence")
        try:
            return self._rows[handle]
        except KeyError:
            msg = f"sequence {handle} is not in the cache: it never was, or is freed already"
            raise ValueError(msg) from None

    def _different(self, sequences: int | Sequence[int], call: str) -> tuple[int, ...]:
        """The handles of a call that changes their sequences."""
        handles = self._handles(sequences)
        if len(set(handles)) < len(handles):
            msg = f"sequences are {list(handles)}; {call} can name each one only once"
            raise ValueError(msg)
        return handles

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
        self._bring_up_to_date(group)
        group.recorded = self._recorded.get(len(handles))
        return group

    def _bring_up_to_date(self, group: _Group) -> None:
        """Have a group say where its sequences lie now; several threads may have it do so at once."""
        if group.changes != self._changes:
            self._table.take(group.rows, axis=0, out=group.table, mode="clip")  # "raise" takes a buffer
            group.room = self._held[group.rows] * self._page_size
            group.growth, group.changes = -1, self._changes
        if group.growth != self._growth:
            self._lengths.take(group.rows, out=group.lengths, mode="clip")
            group.measure()
            group.is_alone = not self._has_shared or not self._shared(group.rows, group.lengths)
            group.growth = self._growth

    def _grow(self, group: _Group, counts: NDArray[np.int64], each: int | None) -> None:
        """Count the positions that were appended to a group that is up to date."""
        self._growth += 1  # first, so that Ctrl-C in between leaves no group that knows other lengths
        group.grow(counts, each)
        self._lengths[group.rows] = group.lengths
        group.growth = self._growth


class _Group(Places):
    """Sequences that are appended or attended together."""

    def __init__(self, table: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        super().__init__(table)
        self.rows = rows  # of the cache's own tables
        self.changes = self.growth = -1  # as of which the table and the lengths are
        self.room = rows  # positions that each one's pages hold
        self.spare = 0  # the fewest of them that are empty
        self.is_alone = False  # where no other sequence holds a page that is begun

    def grow(self, counts: NDArray[np.int64], each: int | None) -> None:
        super().grow(counts, each)
        if each is not None:
            self.spare -= each

    def measure(self) -> None:
        super().measure()
        self.spare = int((self.room - self.lengths).min()) if len(self.rows) else 0
