"""The attention kernel with every feature and dtype, in plain arithmetic: no tensor cores, no PTX.

A block has a tile of query rows, and some columns of the values. It goes over the keys tile by tile: products
of query and key, through shared memory a run of the head at a time; scores; the running maximum of each row,
and exponentials, which go to shared memory; their products with the values. A thread has a few rows, and of
those a few keys, later a few columns, so that a number read from shared memory serves several products.
Threads that share rows are a band; each keeps the rows' maxima and its own part of their sums.

An exponential of -0.0 marks a key that its row does not see: it changes no sum, and where a tile's values are
not all finite, its products are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from .numbers import compute_of, index, is_set, reader, to_bfloat16, unroll, writer

MASK_BLOCK = 64
"""Queries and keys of a `BlockMask`'s block: tiles must divide it."""


class Tile(NamedTuple):
    """How a block cuts its work."""

    bands: int
    lanes: int  # threads of a band
    rows: int  # of a thread
    keys: int  # of a thread, in each tile
    columns: int  # of a thread
    depth: int  # numbers of a head in shared memory at a time
    values: int  # keys whose values are in shared memory at a time


def build(
    storage: str, bias_storage: str, tile: Tile,
    score_mod: Any = None, mask_mod: Any = None, first: int = 0, middle: int = 0,
) -> Callable[..., None]:  # fmt: skip
    """The kernel for queries, keys and values of one dtype, and a bias of another.

    The arguments of users' functions are its parameters from `first` and from `middle` on.
    """
    has_score_mod, has_mask_mod = score_mod is not None, mask_mod is not None
    bands, lanes, rows, keys, columns, depth, values = tile
    threads = bands * lanes
    tile_rows, tile_keys, tile_columns = bands * rows, lanes * keys, lanes * columns
    pitch, share_pitch = depth + 1, tile_keys + 1  # rows of shared memory that begin in other banks
    staged = max((tile_rows + tile_keys) * pitch, values * tile_columns)
    shared, topped, scores, summed = tile_rows * share_pitch, tile_rows * lanes, rows * keys, rows * columns
    number = compute_of(storage)
    read, write, read_bias = reader(storage), writer(storage), reader(bias_storage)
    narrows = storage == "float32"
    infinity = number(np.inf)

    def attend(p):
        stage = cuda.shared.array(staged, number)  # rows of queries, then of keys; or of values
        shares = cuda.shared.array(shared, number)  # exponentials
        tops = cuda.shared.array(topped, number)  # maxima of a thread's keys; sums at the end
        score = cuda.local.array(scores, number)
        largest = cuda.local.array(rows, number)
        total = cuda.local.array(rows, number)
        sums = cuda.local.array(summed, number)

        tid = cuda.threadIdx.x
        lane, first_row = tid % lanes, tid // lanes * rows
        # The last rows of a head first: with a causal mask they have most to do.
        rest = np.int64(cuda.blockIdx.x)
        row0 = (p.tiles - 1 - rest % p.tiles) * tile_rows
        rest = rest // p.tiles
        column0 = rest % p.chunks * tile_columns
        rest = rest // p.chunks
        head, batch = rest % p.heads, rest // p.heads
        kv_head = head // p.group

        queries, keys_end = p.queries, p.key_length
        if p.has_lengths != 0:
            keys_end = p.lengths[batch]
        offset = p.offset
        if p.has_offsets != 0:
            offset = p.offsets[batch]
        place, query_start, key_start = batch, np.int64(0), np.int64(0)
        if p.packed != 0:
            place = np.int64(0)
            query_start, key_start = p.query_starts[batch], p.key_starts[batch]
            queries = p.query_starts[batch + 1] - query_start
        if row0 >= queries:
            return
        query = place * p.query_strides[0] + head * p.query_strides[1] + query_start * p.query_strides[2]
        key = place * p.key_strides[0] + kv_head * p.key_strides[1] + key_start * p.key_strides[2]
        value = place * p.value_strides[0] + kv_head * p.value_strides[1] + key_start * p.value_strides[2]
        mask = batch * p.mask_strides[0] + head * p.mask_strides[1]
        bias = batch * p.bias_strides[0] + head * p.bias_strides[1]
        table = (
            batch * p.table_strides[0] + head * p.table_strides[1] + row0 // MASK_BLOCK * p.table_strides[2]
        )
        weights = batch * p.weights_strides[0] + head * p.weights_strides[1]
        lists_weights = p.has_weights != 0 and column0 == 0
        scale, softcap = number(p.scale), number(p.softcap)
        slope = number(0)
        if p.has_slopes != 0:
            slope = p.slopes[head]

        for r in range(rows):
            unroll()
            largest[r] = -infinity
            total[r] = number(0)
            if p.has_sinks != 0:
                largest[r] = p.sinks[head]
                if lane == 0 and largest[r] != -infinity:
                    total[r] = number(math.exp(largest[r] - largest[r]))
            for c in range(columns):
                unroll()
                sums[r * columns + c] = number(0)

        # The keys that some row of the tile may see.
        begin = max(np.int64(0), row0 + offset - p.left)
        end = min(keys_end, min(row0 + tile_rows, queries) + offset + p.right)
        for key0 in range(begin // tile_keys * tile_keys, end, tile_keys):
            code = np.int64(1)
            if p.has_table != 0:
                code = np.int64(p.table[table + key0 // MASK_BLOCK])
                if code == 0:
                    continue

            # --- query . key
            for i in range(scores):
                unroll()
                score[i] = number(0)
            for d0 in range(np.int64(0), p.head_dim, depth):
                cuda.syncthreads()
                for n in range(tid, (tile_rows + tile_keys) * depth, threads):
                    row, d = n // depth, d0 + n % depth
                    x = number(0)
                    if d < p.head_dim:
                        if row < tile_rows:
                            if row0 + row < queries:
                                i = row0 + row
                                x = read(p.query, query + i * p.query_strides[2] + d * p.query_strides[3])
                        elif key0 + row - tile_rows < end:
                            j = key0 + row - tile_rows
                            x = read(p.key, key + j * p.key_strides[2] + d * p.key_strides[3])
                    if narrows and p.narrow != 0:
                        x = to_bfloat16(x)
                    stage[index(row * pitch + n % depth)] = x
                cuda.syncthreads()
                for d in range(depth):
                    for r in range(rows):
                        unroll()
                        x = stage[index(first_row * pitch + r * pitch + d)]
                        for c in range(keys):
                            unroll()
                            y = stage[index((tile_rows + lane) * pitch + c * lanes * pitch + d)]
                            score[r * keys + c] += x * y

            # --- scores, and what is seen; by way of shared memory, where loops need not be unrolled
            for r in range(rows):
                unroll()
                for c in range(keys):
                    unroll()
                    shares[index((first_row + r) * share_pitch + lane + lanes * c)] = score[r * keys + c]
            shown = 0
            for r in range(rows):
                row = row0 + first_row + r
                position = row + offset
                top = -infinity
                for c in range(keys):
                    j = key0 + lane + lanes * c
                    share = index((first_row + r) * share_pitch + lane + lanes * c)
                    x = shares[share] * scale
                    if softcap != 0:
                        x = softcap * number(math.tanh(x / softcap))
                    seen = row < queries and j < end and position - p.left <= j and j <= position + p.right
                    if seen and p.has_mask != 0:
                        here = mask + row * p.mask_strides[2] + j * p.mask_strides[3]
                        seen = is_set(p.mask, here, p.mask_bytes)
                    if seen and code > 1:
                        word = p.words[(code - 2) * MASK_BLOCK + j % MASK_BLOCK]
                        seen = (word >> np.uint64(row % MASK_BLOCK)) & np.uint64(1) != 0
                    if seen and p.has_bias != 0:
                        here = bias + row * p.bias_strides[2] + j * p.bias_strides[3]
                        term = number(read_bias(p.bias, here))
                        x += term
                        seen = term != -infinity
                    if p.has_slopes != 0:
                        x += slope * number(j - position)
                    # By itself, a constant's branch is gone before Numba asks what it calls.
                    if has_mask_mod:  # noqa: SIM102
                        if seen:
                            seen = bool(mask_mod(batch, head, row, j, *p[middle:]))
                    if has_score_mod:  # noqa: SIM102
                        if seen:
                            x = number(score_mod(x, batch, head, row, j, *p[first:middle]))
                            seen = x != -infinity
                    if seen:
                        shown |= 1 << (r * keys + c)
                    else:
                        x = -infinity
                    if lists_weights and row < queries and j < end:
                        here = weights + row * p.weights_strides[2] + j * p.weights_strides[3]
                        p.weights[here] = x
                    shares[share] = x
                    if x > top:
                        top = x
                tops[index((first_row + r) * lanes + lane)] = top
            cuda.syncthreads()

            # --- exponentials
            for r in range(rows):
                unroll()
                row = first_row + r
                top = largest[r]
                for i in range(lanes):
                    other = tops[index(row * lanes + i)]
                    if other > top:
                        top = other
                zero = number(0) if top == -infinity else top  # -inf - (-inf) would be NaN
                shrink = number(math.exp(largest[r] - zero))
                largest[r] = top
                added = number(0)
                for c in range(keys):
                    unroll()
                    share = index(row * share_pitch + lane + lanes * c)
                    x = number(-0.0)
                    if shown >> (r * keys + c) & 1 != 0:
                        x = number(math.exp(shares[share] - zero))
                        added += x
                        if narrows and p.narrow != 0:
                            x = to_bfloat16(x)
                    shares[share] = x
                total[r] = total[r] * shrink + added
                for c in range(columns):
                    unroll()
                    sums[r * columns + c] *= shrink

            # --- weights . values
            for part in range(0, tile_keys, values):
                if key0 + part >= end:
                    break
                strange = 0
                cuda.syncthreads()
                for i in range(tid, values * tile_columns, threads):
                    j, d = key0 + part + i // tile_columns, column0 + i % tile_columns
                    x = number(0)
                    if j < end and d < p.value_dim:
                        x = read(p.value, value + j * p.value_strides[2] + d * p.value_strides[3])
                        if narrows and p.narrow != 0:
                            x = to_bfloat16(x)
                        if x - x != 0:
                            strange = 1
                    stage[index(i)] = x
                if cuda.syncthreads_or(strange) == 0:
                    for j in range(values):
                        for r in range(rows):
                            unroll()
                            x = shares[index((first_row + r) * share_pitch + part + j)]
                            for c in range(columns):
                                unroll()
                                y = stage[index(j * tile_columns + lane + lanes * c)]
                                sums[r * columns + c] += x * y
                else:
                    for j in range(values):
                        for r in range(rows):
                            unroll()
                            x = shares[index((first_row + r) * share_pitch + part + j)]
                            if x != 0 or math.copysign(1.0, x) > 0:
                                for c in range(columns):
                                    unroll()
                                    y = stage[index(j * tile_columns + lane + lanes * c)]
                                    sums[r * columns + c] += x * y

        # --- results
        cuda.syncthreads()
        for r in range(rows):
            unroll()
            tops[index((first_row + r) * lanes + lane)] = total[r]
        cuda.syncthreads()
        for r in range(rows):
            unroll()
            row = row0 + first_row + r
            if row >= queries:
                continue
            all_weight = number(0)
            for i in range(lanes):
                all_weight += tops[index((first_row + r) * lanes + i)]
            divisor = number(1) if all_weight == 0 else all_weight
            out = place * p.out_strides[0] + head * p.out_strides[1] + (query_start + row) * p.out_strides[2]
            for c in range(columns):
                unroll()
                d = column0 + lane + lanes * c
                if d < p.value_dim:
                    write(p.out, out + d * p.out_strides[3], sums[r * columns + c] / divisor)
            zero = number(0) if largest[r] == -infinity else largest[r]
            if p.has_lse != 0 and column0 == 0 and lane == 0:
                here = (
                    place * p.lse_strides[0]
                    + head * p.lse_strides[1]
                    + (query_start + row) * p.lse_strides[2]
                )
                p.lse[here] = zero + (number(math.log(all_weight)) if all_weight != 0 else -infinity)
            if lists_weights:
                # Each thread meets the scores that it has written itself.
                for j in range(begin // tile_keys * tile_keys + lane, end, lanes):
                    here = weights + row * p.weights_strides[2] + j * p.weights_strides[3]
                    x = p.weights[here]
                    if p.has_table == 0 or p.table[table + j // MASK_BLOCK] != 0:
                        p.weights[here] = (
                            number(0) if x == -infinity else number(math.exp(x - zero)) / divisor
                        )

    return attend
