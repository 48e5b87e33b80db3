"""Masks that know which blocks of 64 queries and 64 keys are empty or whole, and builders of the usual ones.

Give a `BlockMask` to attention as its ``mask``: blocks in which nobody sees anything are skipped, whole ones
take no mask arithmetic. The builders' masks combine with ``&``, ``|`` and ``~``:

===================  ===========================================================================
`causal`             decoders (Vaswani et al., 2017)
`sliding_window`     local attention (Beltagy et al., 2020; Mistral, 2023)
`dilated_window`     local attention with gaps (Beltagy et al., 2020)
`prefix_lm`          a prompt that sees itself both ways (Raffel et al., 2020)
`document`           several documents packed into one sequence (Krell et al., 2021)
`longformer`         local attention and some tokens that see and are seen (Beltagy et al., 2020)
`big_bird`           random, local and global blocks (Zaheer et al., 2020)
`neighborhood`       the nearest tokens of a line, an image or a volume (Hassani et al., 2023)
===================  ===========================================================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import check
from .block_mask import BlockMask, assemble, check_length
from .problem import UNBOUNDED
from .reference import masks as blocks
from .reference.masks import BLOCK, PARTIAL, Words


def causal(query_length: int, key_length: int | None = None, offset: int = 0) -> BlockMask:
    """Query i sees key j where ``j <= i + offset``.

    Parameters
    ----------
    query_length, key_length : int
        As many keys as queries unless given.
    offset : int
        The position of query 0 among the keys: ``key_length - query_length`` aligns at the bottom right.

    References
    ----------
    Vaswani et al., "Attention Is All You Need", 2017, https://arxiv.org/abs/1706.03762.

    Examples
    --------
    >>> from nbattn import masks
    >>> masks.causal(256)
    BlockMask 1 x 1 x 256 x 256, 37.5 % of its 64 x 64 blocks are skipped:
    ▒···
    ■▒··
    ■■▒·
    ■■■▒
    """
    return sliding_window(query_length, key_length, left=None, right=0, offset=offset)


def sliding_window(
    query_length: int,
    key_length: int | None = None,
    *,
    left: int | None,
    right: int | None,
    offset: int = 0,
) -> BlockMask:
    """Query i sees key j where ``i + offset - left <= j <= i + offset + right``, as the door's `window_size`.

    Parameters
    ----------
    query_length, key_length : int
        As many keys as queries unless given.
    left, right : int or None
        How far a query sees; None or -1 for all the way.
    offset : int
        The position of query 0 among the keys.

    References
    ----------
    Beltagy et al., "Longformer", 2020, https://arxiv.org/abs/2004.05150; Jiang et al., "Mistral 7B", 2023,
    https://arxiv.org/abs/2310.06825.

    Examples
    --------
    >>> from nbattn import masks
    >>> masks.sliding_window(384, left=64, right=0)
    BlockMask 1 x 1 x 384 x 384, 69.4 % of its 64 x 64 blocks are skipped:
    ▒·····
    ▒▒····
    ·▒▒···
    ··▒▒··
    ···▒▒·
    ····▒▒
    """
    return dilated_window(query_length, key_length, left=left, right=right, dilation=1, offset=offset)


def dilated_window(
    query_length: int,
    key_length: int | None = None,
    *,
    left: int | None,
    right: int | None,
    dilation: int,
    offset: int = 0,
) -> BlockMask:
    """Query i sees the keys ``i + offset + n * dilation`` for ``-left <= n <= right``.

    Parameters
    ----------
    query_length, key_length : int
        As many keys as queries unless given.
    left, right : int or None
        How many keys a query sees on either side of its own; None or -1 for all the way.
    dilation : int
        The distance from one key that is seen to the next.
    offset : int
        The position of query 0 among the keys.

    References
    ----------
    Section 3.1 of Beltagy et al., "Longformer", 2020, https://arxiv.org/abs/2004.05150.

    Examples
    --------
    >>> from nbattn import masks
    >>> masks.dilated_window(9, left=1, right=1, dilation=3).to_dense()[0, 0, 4].astype(int)
    array([0, 1, 0, 0, 1, 0, 0, 1, 0])
    """
    queries = check_length(query_length, "query_length")
    keys = queries if key_length is None else check_length(key_length, "key_length")
    left, right = (_side(x, name) for x, name in ((left, "left"), (right, "right")))
    step, shift = check_length(dilation, "dilation", least=1), check.check_int(offset, "offset")
    shift = max(-UNBOUNDED, min(shift, UNBOUNDED))
    if not queries or not keys:
        return _nothing(queries, keys)
    distance = np.arange(1 - queries, keys) - shift
    seen = (distance >= -left * step) & (distance <= right * step)
    if step > 1:
        seen &= distance % step == 0
    return BlockMask(*blocks.by_distance(queries, keys, seen), queries, keys)


def prefix_lm(length: int, prefix_lengths: ArrayLike) -> BlockMask:
    """Causal, but the prefix is seen by all.

    Parameters
    ----------
    length : int
        Of queries and keys.
    prefix_lengths : int or int array_like (B,)
        How many of each sequence's first keys every query sees.

    References
    ----------
    Figure 3 of Raffel et al., "Exploring the Limits of Transfer Learning", 2020,
    https://arxiv.org/abs/1910.10683.

    Examples
    --------
    >>> from nbattn import masks
    >>> masks.prefix_lm(256, 128)
    BlockMask 1 x 1 x 256 x 256, 31.2 % of its 64 x 64 blocks are skipped:
    ■■··
    ■■··
    ■■▒·
    ■■■▒
    """
    n = check_length(length, "length")
    prefixes = _integers(prefix_lengths, "prefix_lengths")
    if prefixes.ndim > 1 or (prefixes < 0).any() or (prefixes > n).any():
        msg = f"prefix_lengths must be one number or (batch,) of them, each 0 to {n}, got {prefixes}"
        raise ValueError(msg)
    base, j = causal(n), np.arange(n)
    rows = np.ones(n, bool)
    tables, words, count = [np.empty((0, *base.table.shape[1:]), np.int32)], [base.words[:0]], 0
    for prefix in prefixes.ravel():
        mask = base | _outer(rows, j < prefix)
        tables.append(np.where(mask.table < PARTIAL, mask.table, mask.table + np.int32(count)))
        words.append(mask.words)
        count += len(mask.words)
    return BlockMask(*blocks.compact(np.concatenate(tables), np.concatenate(words)), n, n)


def document(query_ids: ArrayLike, key_ids: ArrayLike | None = None) -> BlockMask:
    """Queries see the keys of their own document, in sequences that several documents share.

    Parameters
    ----------
    query_ids : int array_like (Sq,) or (B, Sq)
        Which document each query belongs to: ``np.repeat(np.arange(n), lengths)`` where n of them lie one
        after the other, but they may lie in pieces and in any order. A block in which only some see each
        other takes 512 bytes: ids in no order at all, where every block is one, are better a `mask_mod`
        ``ids[q_index] == ids[kv_index]``, which takes none.
    key_ids : int array_like (Sk,) or (B, Sk), optional
        Likewise of the keys; those of the queries unless given.

    References
    ----------
    Krell et al., "Efficient Sequence Packing without Cross-contamination", 2021,
    https://arxiv.org/abs/2107.02027.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn import masks
    >>> ids = np.repeat([0, 1, 2], [128, 64, 100])
    >>> masks.causal(292) & masks.document(ids)
    BlockMask 1 x 1 x 292 x 292, 72.0 % of its 64 x 64 blocks are skipped:
    ▒····
    ■▒···
    ··▒··
    ···▒·
    ···■▒
    """
    q = np.atleast_2d(_integers(query_ids, "query_ids"))
    k = q if key_ids is None else np.atleast_2d(_integers(key_ids, "key_ids"))
    if q.ndim != 2 or k.ndim != 2 or (1 != len(q) != len(k) != 1):
        got = f"{np.shape(query_ids)}" + (f" and {np.shape(key_ids)}" if key_ids is not None else "")
        msg = f"ids have shapes {got}; expected (length,) or (batch, length)"
        raise ValueError(msg)
    batch, queries, keys = max(len(q), len(k)), q.shape[1], k.shape[1]
    if not (batch and queries and keys):
        return _nothing(queries, keys, batch)
    names, numbers = np.unique(np.concatenate((q.ravel(), k.ravel())), return_inverse=True)
    q, k = numbers[: q.size].reshape(q.shape), numbers[q.size :].reshape(k.shape)
    spans = []
    for row in k:  # where each document's keys begin and end
        first, last = np.full(len(names), keys), np.zeros(len(names), np.int64)
        np.minimum.at(first, row, np.arange(keys))
        np.maximum.at(last, row, np.arange(1, keys + 1))
        spans.append((first, last))
    seen_by = np.zeros(len(names), np.uint64)

    def strip(b: int, h: int, i: int) -> tuple[int, Words]:
        ids = q[b % len(q), BLOCK * i : BLOCK * (i + 1)]
        first, last = spans[b % len(k)]
        begin = int(first[ids].min()) // BLOCK
        end = max(int(last[ids].max()), BLOCK * begin)
        np.bitwise_or.at(seen_by, ids, np.uint64(1) << np.arange(len(ids), dtype=np.uint64))
        line = seen_by[k[b % len(k), BLOCK * begin : _whole(end, keys)]]
        seen_by[ids] = 0
        return begin, line

    return assemble((batch, 1, queries, keys), strip)


def longformer(
    length: int, *, left: int | None, right: int | None, global_tokens: ArrayLike, dilation: int = 1
) -> BlockMask:
    """A sliding window, and some tokens that see all and are seen by all.

    Parameters
    ----------
    length : int
        Of queries and keys.
    left, right, dilation
        The window, as in `dilated_window`. The paper's window of w has w / 2 on either side.
    global_tokens : int array_like (G,)
        The positions of those tokens.

    References
    ----------
    Beltagy et al., "Longformer", 2020, https://arxiv.org/abs/2004.05150.

    Examples
    --------
    >>> from nbattn import masks
    >>> masks.longformer(512, left=32, right=32, global_tokens=[0, 1])
    BlockMask 1 x 1 x 512 x 512, 46.9 % of its 64 x 64 blocks are skipped:
    ▒▒▒▒▒▒▒▒
    ▒▒▒·····
    ▒▒▒▒····
    ▒·▒▒▒···
    ▒··▒▒▒··
    ▒···▒▒▒·
    ▒····▒▒▒
    ▒·····▒▒
    """
    n = check_length(length, "length")
    tokens = _integers(global_tokens, "global_tokens")
    if tokens.ndim != 1 or (tokens < 0).any() or (tokens >= n).any():
        msg = f"global_tokens must be positions (G,), each 0 to {n - 1}, got {tokens}"
        raise ValueError(msg)
    chosen, all_ = np.zeros(n, bool), np.ones(n, bool)
    chosen[tokens] = True
    local = dilated_window(n, left=left, right=right, dilation=dilation)
    return local | _outer(chosen, all_) | _outer(all_, chosen)


def big_bird(
    length: int,
    *,
    block_size: int = 64,
    window: int = 3,
    global_blocks: int = 2,
    random_blocks: int = 3,
    heads: int = 1,
    rng: Any = None,
) -> BlockMask:
    """Blocks of tokens that see their neighbours, some that see and are seen by all, and some at random.

    Parameters
    ----------
    length : int
        Of queries and keys.
    block_size : int
        Tokens of a block. Multiples of 64 leave no block partial.
    window : int
        How many blocks around its own a block sees, its own included; odd.
    global_blocks : int
        How many of the first blocks see all and are seen by all.
    random_blocks : int
        How many others each block sees, or what others there are.
    heads : int
        Heads that draw their random blocks apart.
    rng : numpy.random.Generator or int, optional
        Where randomness comes from: a generator or a seed.

    References
    ----------
    Zaheer et al., "Big Bird", 2020, https://arxiv.org/abs/2007.14062.

    Examples
    --------
    >>> from nbattn import masks
    >>> masks.big_bird(640, global_blocks=1, random_blocks=1, rng=0)
    BlockMask 1 x 1 x 640 x 640, 47.0 % of its 64 x 64 blocks are skipped:
    ■■■■■■■■■■
    ■■■■······
    ■■■■·■····
    ■·■■■■····
    ■··■■■··■·
    ■···■■■··■
    ■·■··■■■··
    ■····■■■■·
    ■···■··■■■
    ■·■·····■■
    """
    n, size = check_length(length, "length"), check_length(block_size, "block_size", least=1)
    width, reach = check_length(window, "window", least=1), window // 2
    first, few = check_length(global_blocks, "global_blocks"), check_length(random_blocks, "random_blocks")
    if width % 2 == 0:
        msg = f"window is {window}; expected an odd number of blocks, half of the others on either side"
        raise ValueError(msg)
    generator = check.check_rng(rng)
    count = -(-n // size)
    i, j = np.arange(count)[:, None], np.arange(count)
    always = (abs(i - j) <= reach) | (i < first) | (j < first)
    chosen = np.zeros((check_length(heads, "heads"), count, count), bool)
    for head in chosen:
        # Those of lowest rank; what is seen anyway comes last.
        rank = np.where(always, 1.0, generator.random((count, count)))
        if 0 < few < count:
            rank = np.argpartition(rank, few - 1, axis=1)[:, :few]
            np.put_along_axis(head, rank, True, axis=1)
        head |= always | (few >= count)

    def strip(b: int, h: int, i: int) -> tuple[int, Words]:
        of_token = np.arange(BLOCK * i, min(BLOCK * (i + 1), n)) // size
        line = np.zeros(count, np.uint64)
        for block in np.unique(of_token):
            bits = np.bitwise_or.reduce(np.uint64(1) << np.flatnonzero(of_token == block).astype(np.uint64))
            line[chosen[h, block]] |= bits
        return 0, line.repeat(size)[:n]

    return assemble((1, len(chosen), n, n), strip)


def neighborhood(
    shape: int | Sequence[int], kernel_size: int | Sequence[int], dilation: int | Sequence[int] = 1
) -> BlockMask:
    """Tokens on a line, an image or a volume see the nearest ones, as many everywhere.

    On every axis a token sees `kernel_size` places around its own, its own included; near a border the window
    moves inwards, so that no token sees fewer. Tokens are counted with the last axis fastest. With a
    dilation, the same holds among the tokens that lie a multiple of it apart.

    Parameters
    ----------
    shape : int or sequence of int
        Tokens along each axis: ``(height, width)`` for an image.
    kernel_size : int or sequence of int
        How many tokens are seen along each axis; one number for all.
    dilation : int or sequence of int
        The distance from one token that is seen to the next. ``kernel_size * dilation`` must fit the axis.

    References
    ----------
    Hassani et al., "Neighborhood Attention Transformer", 2023, https://arxiv.org/abs/2204.07143; Hassani and
    Shi, "Dilated Neighborhood Attention Transformer", 2022, https://arxiv.org/abs/2209.15001.

    Examples
    --------
    >>> from nbattn import masks
    >>> masks.neighborhood(7, 3).to_dense()[0, 0].astype(int)
    array([[1, 1, 1, 0, 0, 0, 0],
           [1, 1, 1, 0, 0, 0, 0],
           [0, 1, 1, 1, 0, 0, 0],
           [0, 0, 1, 1, 1, 0, 0],
           [0, 0, 0, 1, 1, 1, 0],
           [0, 0, 0, 0, 1, 1, 1],
           [0, 0, 0, 0, 1, 1, 1]])
    >>> masks.neighborhood((16, 32), 5)
    BlockMask 1 x 1 x 512 x 512, 62.5 % of its 64 x 64 blocks are skipped:
    ▒▒▒·····
    ▒▒▒·····
    ·▒▒▒····
    ··▒▒▒···
    ···▒▒▒··
    ····▒▒▒·
    ·····▒▒▒
    ·····▒▒▒
    """
    n, kernel, step = _axes(shape, kernel_size, dilation)
    starts = []
    for length, size, apart in zip(n, kernel, step, strict=True):
        # Tokens that see each other lie `apart`: each such group is a line of its own.
        group, place = np.arange(length) % apart, np.arange(length) // apart
        most = -(-(length - group) // apart) - size
        starts.append(np.clip(place - size // 2, 0, most) * apart + group)
    total, inner = math.prod(n), math.prod(n[1:])

    def strip(b: int, h: int, i: int) -> tuple[int, Words]:
        tokens = np.unravel_index(np.arange(BLOCK * i, min(BLOCK * (i + 1), total)), n)
        line, begin = np.full(1, ~np.uint64(0)), 0
        for start, place, size, apart in reversed(list(zip(starts, tokens, kernel, step, strict=True))):
            first = start[place][:, None]
            # Of the axis that is left, the first one, only what is seen.
            begin, end = int(first.min()), int(first.max()) + (size - 1) * apart + 1
            if start is not starts[0]:
                begin, end = 0, len(start)
            position = np.arange(begin, end) - first
            seen = (position >= 0) & (position < size * apart)
            if apart > 1:
                seen &= position % apart == 0
            line = (blocks.pack(seen)[:, None] & line).ravel()
        key = begin * inner
        block, before = divmod(key, BLOCK)
        padded = np.zeros(_whole(key + len(line), total) - BLOCK * block, np.uint64)
        padded[before : before + len(line)] = line
        return block, padded

    return assemble((1, 1, total, total), strip)


def _axes(shape: Any, kernel_size: Any, dilation: Any) -> tuple[tuple[int, ...], ...]:
    """Length, kernel size and dilation of each axis."""
    n = tuple(check_length(x, "shape", least=1) for x in np.atleast_1d(np.asarray(shape, object)).tolist())
    result = [n]
    for given, name in ((kernel_size, "kernel_size"), (dilation, "dilation")):
        each = tuple(
            check_length(x, name, least=1) for x in np.atleast_1d(np.asarray(given, object)).tolist()
        )
        if len(each) not in (1, len(n)):
            msg = f"{name} has {len(each)} numbers; expected 1 or {len(n)}, one for each axis of shape {n}"
            raise ValueError(msg)
        result.append(each * (len(n) // len(each)))
    for length, size, apart in zip(*result, strict=True):
        if size * apart > length:
            msg = f"kernel_size * dilation is {size} * {apart} along an axis of {length} tokens; it must fit"
            raise ValueError(msg)
    return tuple(result)


def _outer(queries: NDArray[np.bool_], keys: NDArray[np.bool_]) -> BlockMask:
    """The mask ``queries[:, None] & keys``."""
    return BlockMask(*blocks.outer(queries, keys), len(queries), len(keys))


def _nothing(queries: int, keys: int, batch: int = 1) -> BlockMask:
    table = np.zeros((batch, 1, blocks.blocks(queries), blocks.blocks(keys)), np.int32)
    return BlockMask(table, np.empty((0, BLOCK), np.uint64), queries, keys)


def _whole(end: int, keys: int) -> int:
    """The end of the block that holds the last key before `end`."""
    return min(BLOCK * blocks.blocks(end), keys)


def _side(x: Any, name: str) -> int:
    if x is None or check.check_int(x, name) == -1:
        return UNBOUNDED
    return min(check_length(x, name), UNBOUNDED)


def _integers(x: ArrayLike, name: str) -> NDArray[Any]:
    array = check.as_array(x, name)
    if array.dtype.kind not in "iu" and array.size:
        msg = f"{name} must hold integers, got dtype {array.dtype}"
        raise TypeError(msg)
    return array.astype(np.int64)
