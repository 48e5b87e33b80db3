"""Masks as blocks of 64 queries and 64 keys: how their table and words come about and combine.

A table ``(B, H, query blocks, key blocks)`` says of each block `NOTHING`, `EVERYTHING`, or n >= 2 for the
words ``words[n - 2]``: bit r of word j is set where query r of the block sees key j. Bits beyond the lengths
are 0, and keep no block from being everything. Blocks come in strips: the 64 queries of a strip are the bits
of one word a key, so that 64 elements of a mask cost as much as one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 64
NOTHING, EVERYTHING, PARTIAL = range(3)

Table = NDArray[np.int32]
Words = NDArray[np.uint64]
Strip = Callable[[int, int, int], tuple[int, Words]]
"""``strip(b, h, i)``: a key block, and the words for query block i of the keys from its first one on, up to
the end of a block or the last key."""


def blocks(length: int) -> int:
    """How many blocks hold so many positions."""
    return -(-length // BLOCK)


def low_bits(counts: Any) -> Words:
    """Words whose lowest bits are set, 0 to 64 of them."""
    counts = np.asarray(counts, np.uint64)
    return np.where(counts > 0, ~np.uint64(0) >> (np.uint64(63) & (np.uint64(64) - counts)), np.uint64(0))


def sizes(length: int) -> NDArray[np.int64]:
    """The number of positions in each block."""
    return np.minimum(BLOCK, length - BLOCK * np.arange(blocks(length)))


def valid(rows: Any, keys: Any) -> Words:
    """The words (n, 64) of blocks that are everything, of so many queries and keys."""
    rows, keys = np.asarray(rows), np.asarray(keys)
    return np.where(np.arange(BLOCK) < keys[..., None], low_bits(rows)[..., None], np.uint64(0))


def codes(words: Words, whole: Words) -> Table:
    """For words (n, 64) what a table says: NOTHING, EVERYTHING where they are as `whole`, or their number."""
    numbers = np.arange(PARTIAL, PARTIAL + len(words), dtype=np.int32)
    numbers[(words == whole).all(axis=1)] = EVERYTHING
    numbers[~words.any(axis=1)] = NOTHING
    return numbers


def pack(seen: NDArray[np.bool_]) -> Words:
    """The words (n,) of at most 64 queries by n keys."""
    rows, keys = seen.shape
    bits = np.zeros((BLOCK // 8, 8, keys), np.uint8)
    bits.reshape(BLOCK, keys)[:rows] = seen
    octets = bits[:, 0]
    for i in range(1, 8):  # packbits along the first axis takes ten times as long
        octets |= bits[:, i] << np.uint8(i)
    return np.ascontiguousarray(octets.T).view(np.uint64)[:, 0]


def compact(table: Table, words: Words) -> tuple[Table, Words]:
    """Only the words that the table names, equal ones once."""
    used = np.zeros(PARTIAL + len(words), bool)
    used[table.ravel()] = True
    kept = np.flatnonzero(used[PARTIAL:])
    if len(kept) < len(words):
        words = words[kept]
    odd = 2 * np.random.default_rng(0).integers(0, 1 << 62, BLOCK, np.uint64) + np.uint64(1)
    _, first, which = np.unique(words @ odd, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[which] != np.arange(len(words)))
    equal = (words[again] == words[first[which[again]]]).all(axis=1)
    if equal.all():
        words = words[first]
    else:  # two that differ share a hash
        which = np.arange(len(words))
    number = np.empty(len(used), np.int32)
    number[:PARTIAL] = NOTHING, EVERYTHING
    number[PARTIAL + kept] = PARTIAL + which
    table = number[table]
    table.setflags(write=False)
    words.setflags(write=False)
    return table, words


def assemble(shape: tuple[int, int, int, int], strip: Strip) -> tuple[Table, Words]:
    """The mask (B, H, Sq, Sk) of such strips; what a strip leaves out is nothing."""
    batch, heads, queries, keys = shape
    table = np.zeros((batch, heads, blocks(queries), blocks(keys)), np.int32)
    parts, count = [np.empty((0, BLOCK), np.uint64)], PARTIAL
    for b, h, i in np.ndindex(*table.shape[:3]):
        first, line = strip(b, h, i)
        full = low_bits(min(BLOCK, queries - BLOCK * i))
        whole, rest = divmod(len(line), BLOCK)
        grid = line[: whole * BLOCK].reshape(whole, BLOCK)
        every, some = np.bitwise_and.reduce(grid, axis=1) == full, np.bitwise_or.reduce(grid, axis=1) != 0
        if rest:
            last = np.zeros((1, BLOCK), np.uint64)
            last[0, :rest] = line[whole * BLOCK :]
            grid = np.concatenate((grid, last))
            every, some = np.append(every, (last[0, :rest] == full).all()), np.append(some, last.any())
        partial = np.flatnonzero(some & ~every)
        row = table[b, h, i, first : first + len(grid)]
        row[every] = EVERYTHING
        row[partial] = np.arange(count, count + len(partial))
        parts.append(grid[partial])
        count += len(partial)
    return compact(table, np.concatenate(parts))


def of_states(states: NDArray[np.uint8], words: Words) -> tuple[Table, Words]:
    """The mask of blocks that show nothing (0), some (1) or everything (2), with words of the second kind."""
    table = np.array([NOTHING, PARTIAL, EVERYTHING], np.int32)[states]
    table[states == 1] += np.arange(len(words), dtype=np.int32)
    return compact(table, words)


def by_distance(queries: int, keys: int, seen: NDArray[np.bool_]) -> tuple[Table, Words]:
    """The mask of ``seen[j - i + Sq - 1]``, (Sq + Sk - 1,): blocks on a diagonal are the same."""
    rows, columns = blocks(queries), blocks(keys)
    # line[BLOCK * (rows + d) + c] is the word of key c in the blocks J - I = d, the first BLOCK a margin.
    line = np.zeros(BLOCK * (rows + columns), np.uint64)
    start = BLOCK * rows - (queries - 1)
    line[start : start + len(seen)] = seen
    for distance in (1, 2, 4, 8, 16, 32):  # bit r is what lies r positions before
        line[distance:] |= line[:-distance] << np.uint64(distance)
    diagonals = line.reshape(-1, BLOCK)[1:]
    which = rows - 1 - np.arange(rows)[:, None] + np.arange(columns)
    # The last blocks of each axis are cut, and numbered apart.
    below, beside = diagonals[which[-1:, :].ravel()], diagonals[which[:-1, -1]]
    row_sizes, key_sizes = sizes(queries), sizes(keys)
    whole_below, whole_beside = valid(row_sizes[-1:], key_sizes), valid(row_sizes[:-1], key_sizes[-1:])
    words = np.concatenate((diagonals, below & whole_below, beside & whole_beside))
    whole = np.concatenate((np.broadcast_to(valid(BLOCK, BLOCK), diagonals.shape), whole_below, whole_beside))
    which[-1:, :] = len(diagonals) + np.arange(columns)
    which[:-1, -1] = len(diagonals) + columns + np.arange(rows - 1)
    return compact(codes(words, whole)[which][None, None], words)


def outer(queries: NDArray[np.bool_], keys: NDArray[np.bool_]) -> tuple[Table, Words]:
    """The mask ``queries[:, None] & keys``."""
    row_words, key_words = _bits(queries), _bits(keys)
    row_kinds, r = np.unique(row_words, return_inverse=True)
    key_kinds, k = np.unique(key_words, return_inverse=True)
    bits = (key_kinds[:, None] >> np.arange(BLOCK, dtype=np.uint64) & np.uint64(1)).astype(bool)
    words = np.where(bits, row_kinds[:, None, None], np.uint64(0)).reshape(-1, BLOCK)
    none = (row_words == 0)[:, None] | (key_words == 0)
    whole = (row_words == low_bits(sizes(len(queries))))[:, None] & (key_words == low_bits(sizes(len(keys))))
    table = np.where(whole, EVERYTHING, PARTIAL + r[:, None] * len(key_kinds) + k)
    return compact(np.where(none, NOTHING, table).astype(np.int32)[None, None], words)


def _bits(flags: NDArray[np.bool_]) -> Words:
    """A word for each block of flags."""
    padded = np.zeros(BLOCK * blocks(len(flags)), bool)
    padded[: len(flags)] = flags
    return np.packbits(padded, bitorder="little").view(np.uint64)


def combine(
    a: tuple[Table, Words], b: tuple[Table, Words], lengths: tuple[int, int], either: bool
) -> tuple[Table, Words]:
    """The mask that sees what both of two see, or `either`."""
    (s, u), (t, v) = a, b
    s, t = np.broadcast_arrays(s, t)
    decisive, neutral = (EVERYTHING, NOTHING) if either else (NOTHING, EVERYTHING)
    moved = np.where(t < PARTIAL, t, t + len(u))
    table = np.where(s == neutral, moved, s)
    table[(s == decisive) | (t == decisive)] = decisive
    both = np.nonzero((s >= PARTIAL) & (t >= PARTIAL))
    pairs, which = _distinct(s[both], t[both], both, lengths)
    x, y = u[pairs[0] - PARTIAL], v[pairs[1] - PARTIAL]
    words = x | y if either else x & y
    numbers = codes(words, valid(pairs[2], pairs[3]))
    numbers[numbers >= PARTIAL] += len(u) + len(v)
    table[both] = numbers[which]
    return compact(table.astype(np.int32), np.concatenate((u, v, words)))


def invert(a: tuple[Table, Words], lengths: tuple[int, int]) -> tuple[Table, Words]:
    """The mask that sees what the other does not."""
    s, u = a
    table = np.where(s == NOTHING, EVERYTHING, NOTHING).astype(np.int32)
    some = np.nonzero(s >= PARTIAL)
    (number, _, rows, keys), which = _distinct(s[some], s[some], some, lengths)
    whole = valid(rows, keys)
    words = ~u[number - PARTIAL] & whole
    table[some] = codes(words, whole)[which]
    return compact(table, words)


def _distinct(
    s: Table, t: Table, places: tuple[NDArray[np.int64], ...], lengths: tuple[int, int]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The distinct blocks among those at `places` that hold words s and t: (4, n) of s, t, rows and keys."""
    i, j = places[2:]
    rows, keys = sizes(lengths[0])[i], sizes(lengths[1])[j]
    # Four kinds of sizes: those at the end of an axis may be smaller.
    last = 2 * (rows < BLOCK) + (keys < BLOCK)
    code = (s.astype(np.int64) * (t.max(initial=0) + 1) + t) * 4 + last
    _, first, which = np.unique(code, return_index=True, return_inverse=True)
    return np.stack((s, t, rows, keys))[:, first], which


def equal(a: tuple[Table, Words], b: tuple[Table, Words]) -> bool:
    """Whether two masks of one shape see the same."""
    (s, u), (t, v) = a, b
    if s.shape != t.shape or not np.array_equal(np.minimum(s, PARTIAL), np.minimum(t, PARTIAL)):
        return False
    some = s >= PARTIAL
    pairs = np.unique(np.stack((s[some], t[some])), axis=1) - PARTIAL
    return bool((u[pairs[0]] == v[pairs[1]]).all())


def dense(table: Table, words: Words, lengths: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask element by element, (B, H, Sq, Sk)."""
    queries, keys = lengths
    seen = np.empty((*table.shape[:2], queries, keys), bool)
    ends = np.array([[0], [~np.uint64(0)]], np.uint64).repeat(BLOCK, axis=1)
    for b, h, i in np.ndindex(*table.shape[:3]):
        row = table[b, h, i]
        line = np.empty((len(row), BLOCK), np.uint64)
        some = row >= PARTIAL
        line[~some], line[some] = ends[row[~some]], words[row[some] - PARTIAL]
        octets = np.ascontiguousarray(line.view(np.uint8).reshape(-1, 8).T)
        strip = np.empty((8, 8, octets.shape[1]), bool)
        for bit in range(8):
            strip[:, bit] = octets >> np.uint8(bit) & np.uint8(1)
        rows = seen[b, h, BLOCK * i : BLOCK * (i + 1)]
        rows[:] = strip.reshape(BLOCK, -1)[: len(rows), :keys]
    return seen
