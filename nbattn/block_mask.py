"""Which query sees which key, as blocks that are empty, whole, or bits. Builders are in `masks.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import check
from .reference import masks as blocks
from .reference.masks import BLOCK, EVERYTHING, NOTHING, PARTIAL, Strip, Table, Words
from .reference.scores import seen_by
from .scores import check_mods


class BlockMask:
    """Which query sees which key, as blocks of 64 queries and 64 keys.

    Made by `from_dense`, `from_sparse`, `from_mask_mod` or a builder of `nbattn.masks`, and given to
    attention as its ``mask``; doors that know no blocks, as those of caches, take the dense mask that it
    stands for. Masks never change; ``&``, ``|`` and ``~`` make new ones block by block, where batch and heads
    broadcast.

    Parameters
    ----------
    table : int32 ndarray (B or 1, H or 1, query blocks, key blocks)
        What is seen of each block: 0 nothing, 1 everything, n >= 2 what ``words[n - 2]`` says.
    words : uint64 ndarray (partial blocks, 64)
        Bit r of word j is set where query r of the block sees its key j; 0 beyond the lengths.
    query_length, key_length : int
        Sq and Sk.

    Attributes
    ----------
    shape : (int, int, int, int)
        (B or 1, H or 1, Sq, Sk).
    table, words : ndarray
        As above, read-only.
    sparsity : float
        The share of blocks that attention skips.
    nbytes : int
        The bytes of both arrays.

    Raises
    ------
    TypeError, ValueError
        For arrays of other dtypes or shapes, and tables that name words which are not there.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn import BlockMask, masks, scaled_dot_product_attention
    >>> mask = masks.causal(500) & masks.sliding_window(500, left=100, right=100)
    >>> mask
    BlockMask 1 x 1 x 500 x 500, 67.2 % of its 64 x 64 blocks are skipped:
    ▒·······
    ▒▒······
    ▒▒▒·····
    ·▒▒▒····
    ··▒▒▒···
    ···▒▒▒··
    ····▒▒▒·
    ·····▒▒▒
    >>> x = np.random.default_rng(0).standard_normal((2, 8, 500, 32), np.float32)
    >>> scaled_dot_product_attention(x, x, x, mask).shape
    (2, 8, 500, 32)
    """

    __slots__ = ("shape", "table", "words")
    __array_ufunc__ = None  # an array on the left of an operator is refused, not taken apart

    def __init__(self, table: Table, words: Words, query_length: int, key_length: int) -> None:
        queries, keys = check_length(query_length, "query_length"), check_length(key_length, "key_length")
        for array, name, dtype in ((table, "table", np.int32), (words, "words", np.uint64)):
            if not isinstance(array, np.ndarray) or array.dtype != dtype:
                got = f"{type(array).__name__} of {getattr(array, 'dtype', 'no dtype')}"
                msg = f"{name} is a {got}; expected an ndarray of {np.dtype(dtype).name}"
                raise TypeError(msg)
        if table.ndim != 4 or table.shape[2:] != (blocks.blocks(queries), blocks.blocks(keys)):
            expected = f"(B, H, {blocks.blocks(queries)}, {blocks.blocks(keys)}) for {queries} x {keys}"
            msg = f"table has shape {table.shape}; expected {expected}"
            raise ValueError(msg)
        if words.ndim != 2 or words.shape[1] != BLOCK:
            msg = f"words has shape {words.shape}; expected (partial blocks, {BLOCK})"
            raise ValueError(msg)
        if table.min(initial=0) < 0 or table.max(initial=0) >= PARTIAL + len(words):
            span = f"{table.min()} to {table.max()}"
            last = PARTIAL + len(words) - 1
            msg = f"table holds {span}; expected 0 to {last}, as there are {len(words)} partial blocks"
            raise ValueError(msg)
        self.shape = (*table.shape[:2], queries, keys)
        # Kernels trust the table, so what somebody could change is copied.
        self.table: Table = _constant(table)
        self.words: Words = _constant(words)

    @classmethod
    def from_dense(cls, mask: ArrayLike) -> BlockMask:
        """The mask that a dense one is.

        Parameters
        ----------
        mask : array_like of bool or int, shape (Sq, Sk), (H, Sq, Sk) or (B, H, Sq, Sk)
            Nonzero means attend. Batch and heads of length 1 serve all of a call.

        Examples
        --------
        >>> import numpy as np
        >>> from nbattn import BlockMask
        >>> BlockMask.from_dense(np.arange(200)[:, None] >= 128 + np.zeros(100, int))
        BlockMask 1 x 1 x 200 x 100, 50.0 % of its 64 x 64 blocks are skipped:
        ··
        ··
        ■■
        ■■
        """
        array = check.mask_array(mask)
        if not 2 <= array.ndim <= 4:
            msg = (
                f"mask has shape {array.shape}; expected (queries, keys), with heads and batch before or not"
            )
            raise ValueError(msg)
        array = array.reshape((1,) * (4 - array.ndim) + array.shape)

        def strip(b: int, h: int, i: int) -> tuple[int, Words]:
            return 0, blocks.pack(array[b, h, BLOCK * i : BLOCK * (i + 1)] != 0)

        return assemble(array.shape, strip)

    @classmethod
    def from_sparse(cls, matrix: Any) -> BlockMask:
        """The mask of a sparse matrix: an entry that is not 0 means attend.

        Parameters
        ----------
        matrix : scipy.sparse matrix or array, shape (Sq, Sk)
            In any format; a block matrix (BSR) with blocks of any size. It is never made dense.

        Examples
        --------
        >>> import numpy as np
        >>> from scipy.sparse import bsr_array
        >>> from nbattn import BlockMask
        >>> ones = np.ones((3, 64, 64), bool)
        >>> BlockMask.from_sparse(bsr_array((ones, [0, 2, 1], [0, 1, 2, 3]), shape=(192, 192)))
        BlockMask 1 x 1 x 192 x 192, 66.7 % of its 64 x 64 blocks are skipped:
        ■··
        ··■
        ·■·
        """
        from scipy.sparse import issparse

        if not issparse(matrix) or matrix.ndim != 2:
            msg = f"matrix must be a scipy.sparse matrix of 2 dimensions, got {type(matrix).__name__}"
            raise TypeError(msg)
        rows = matrix.tocsr()
        if not rows.has_canonical_format:
            rows = rows.copy()  # it may be the caller's own
            rows.sum_duplicates()
        queries, keys = rows.shape

        def strip(b: int, h: int, i: int) -> tuple[int, Words]:
            bounds = rows.indptr[BLOCK * i : BLOCK * (i + 1) + 1]
            entries = slice(bounds[0], bounds[-1])
            bits = np.uint64(1) << np.arange(len(bounds) - 1, dtype=np.uint64).repeat(np.diff(bounds))
            line = np.zeros(keys, np.uint64)
            np.bitwise_or.at(
                line, rows.indices[entries], np.where(rows.data[entries] != 0, bits, np.uint64(0))
            )
            return 0, line

        return assemble((1, 1, queries, keys), strip)

    @classmethod
    def from_mask_mod(
        cls,
        mask_mod: Callable[..., Any],
        query_length: int,
        key_length: int,
        *,
        batch: int = 1,
        heads: int = 1,
        mod_args: Sequence[Any] = (),
        backend: str | None = None,
    ) -> BlockMask:
        """The mask of a function of the positions, as attention's `mask_mod`.

        Parameters
        ----------
        mask_mod : callable
            ``mask_mod(batch, head, q_index, kv_index, *mod_args)``, true where the query sees the key.
        query_length, key_length : int
        batch, heads : int
            1 where the function does not depend on it.
        mod_args : tuple
            Arrays or numbers that the function reads.
        backend : {None, "cpu", "reference"}
            Who evaluates it: the CPU, which compiles it, or NumPy.

        Examples
        --------
        >>> import numpy as np
        >>> from nbattn import BlockMask
        >>> ends = np.array([100, 200])
        >>> def padded(batch, head, q_index, kv_index, ends):
        ...     return kv_index < ends[batch]
        >>> BlockMask.from_mask_mod(padded, 200, 200, batch=2, mod_args=(ends,)).sparsity
        0.25
        """
        queries, keys = check_length(query_length, "query_length"), check_length(key_length, "key_length")
        shape = check_length(batch, "batch"), check_length(heads, "heads"), queries, keys
        _, mod = check_mods(None, mask_mod, mod_args)
        if mod is None:
            msg = "mask_mod must be a function, got None"
            raise TypeError(msg)
        if backend == "reference":
            seen = np.empty(shape, bool)
            for b in range(shape[0]):
                seen[b] = seen_by(mod, b, shape[1:])
            return cls.from_dense(seen)
        states, words = check.backend_module("mods", backend).block_words(mod, shape)
        return cls(*blocks.of_states(states, words), queries, keys)

    def to_dense(self) -> NDArray[np.bool_]:
        """The mask element by element, (B or 1, H or 1, Sq, Sk)."""
        return blocks.dense(self.table, self.words, self.shape[2:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """The dense mask: doors that know no blocks take that."""
        return self.to_dense().astype(bool if dtype is None else dtype, copy=False)

    def fit(self, shape: tuple[int, int, int, int]) -> BlockMask:
        """The mask itself, where it serves a call with (B, Hq, Sq, Sk) scores; else a ValueError."""
        if self.shape[2:] != shape[2:] or any(
            m not in (1, n) for m, n in zip(self.shape, shape, strict=True)
        ):
            msg = (
                f"mask has shape {self.shape}; it must be (batch or 1, heads or 1, queries, keys) of {shape}"
            )
            raise ValueError(msg)
        return self

    @property
    def sparsity(self) -> float:
        return float((self.table == NOTHING).mean()) if self.table.size else 0.0

    @property
    def nbytes(self) -> int:
        return self.table.nbytes + self.words.nbytes

    def __and__(self, other: Any) -> BlockMask:
        return self._combine(other, either=False)

    def __or__(self, other: Any) -> BlockMask:
        return self._combine(other, either=True)

    def __invert__(self) -> BlockMask:
        return BlockMask(*blocks.invert((self.table, self.words), self.shape[2:]), *self.shape[2:])

    def _combine(self, other: Any, either: bool) -> BlockMask:
        if not isinstance(other, BlockMask):
            return NotImplemented
        if self.shape[2:] != other.shape[2:]:
            msg = f"masks of {self.shape[2:]} and {other.shape[2:]} do not combine: the lengths must match"
            raise ValueError(msg)
        if any(1 != m != n != 1 for m, n in zip(self.shape[:2], other.shape[:2], strict=True)):
            msg = f"masks of batch and heads {self.shape[:2]} and {other.shape[:2]} do not broadcast"
            raise ValueError(msg)
        parts = (self.table, self.words), (other.table, other.words)
        return BlockMask(*blocks.combine(*parts, self.shape[2:], either), *self.shape[2:])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockMask):
            return NotImplemented
        return self.shape == other.shape and blocks.equal(
            (self.table, self.words), (other.table, other.words)
        )

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        return BlockMask, (self.table, self.words, *self.shape[2:])

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.shape))
        text = f"BlockMask {size}, {self.sparsity:.1%} of its {BLOCK} x {BLOCK} blocks are skipped"
        text = text.replace("%", " %")
        if not self.table.size:
            return text
        drawn = "" if self.table.shape[:2] == (1, 1) else " (drawn: batch 0, head 0)"
        return "\n".join((f"{text}{drawn}:", *_draw(self.table[0, 0])))


def _constant(x: NDArray[Any]) -> NDArray[Any]:
    """`x` if it is contiguous and cannot be written, else a copy of that kind."""
    if x.flags.c_contiguous and not x.flags.writeable:
        return x
    x = np.array(x, order="C")
    x.setflags(write=False)
    return x


def _draw(table: Table, height: int = 20, width: int = 40) -> list[str]:
    """A character for each block, or for several where they are many."""
    step = max(1, -(-table.shape[0] // height), -(-table.shape[1] // width))
    rows, columns = (np.arange(0, n, step) for n in table.shape)
    nothing, everything = (
        np.logical_and.reduceat(np.logical_and.reduceat(table == what, rows, axis=0), columns, axis=1)
        for what in (NOTHING, EVERYTHING)
    )
    return ["".join(line) for line in np.where(nothing, "·", np.where(everything, "■", "▒"))]


def assemble(shape: tuple[int, int, int, int], strip: Strip) -> BlockMask:
    """The mask (B, H, Sq, Sk) of such strips."""
    return BlockMask(*blocks.assemble(shape, strip), *shape[2:])


def check_length(x: Any, name: str, least: int = 0) -> int:
    """A whole number, at least `least`."""
    length = check.check_int(x, name)
    if length < least:
        msg = f"{name} must be at least {least}, got {length}"
        raise ValueError(msg)
    return length
