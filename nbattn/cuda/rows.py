"""The kernel of softmax, log-softmax and log-sum-exp.

A block takes some neighbouring rows, so that columns are read as they lie in memory; the threads of a row
take turns along it. They read it three times, for the maximum, the sum and the result, of which the last two
mostly come from a cache, and keep a number each. A row is `runs` runs of `length` elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numba import cuda

from .numbers import compute_of, device, is_set, reader, writer

LOG_SOFTMAX, LOGSUMEXP = 1, 2


def build(storage: str, threads: int) -> Callable[..., None]:
    """The kernel for x of this dtype, in blocks of so many threads, a power of two."""
    number = compute_of(storage)
    read, write = reader(storage), writer(storage)
    infinity = number(np.inf)

    @device
    def kept(p, where, j):
        """Whether the element is there."""
        return p.where_bytes == 0 or is_set(p.where, where + j * p.where_step, p.where_bytes)

    def reduce(p):
        room = cuda.shared.array(threads, number)
        tid = cuda.threadIdx.x
        column, part = tid % p.columns, tid // p.columns
        parts = threads // p.columns
        row = np.int64(cuda.blockIdx.x) * p.columns + column
        alive = row < p.rows
        runs = np.int64(p.runs) if alive else np.int64(0)  # a dead column's loops are empty
        x0, where0 = spread(row, p.row_sizes, p.x_rows), spread(row, p.row_sizes, p.where_rows)
        out0 = spread(row, p.row_sizes, p.out_rows)
        scale = number(p.scale)

        largest = -infinity
        for i in range(runs):
            x, where = x0 + spread(i, p.run_sizes, p.x_runs), where0 + spread(i, p.run_sizes, p.where_runs)
            for j in range(part, p.length, parts):
                if kept(p, where, j):
                    score = read(p.x, x + j * p.x_step) * scale
                    if score > largest:
                        largest = score
        room[tid] = largest
        cuda.syncthreads()
        half = parts // 2
        while half > 0:
            if part < half and room[tid + half * p.columns] > room[tid]:
                room[tid] = room[tid + half * p.columns]
            cuda.syncthreads()
            half //= 2
        largest = room[column]
        finite = largest - largest == 0
        zero = largest if finite else number(0)
        cuda.syncthreads()

        total = number(0)
        for i in range(runs):
            x, where = x0 + spread(i, p.run_sizes, p.x_runs), where0 + spread(i, p.run_sizes, p.where_runs)
            for j in range(part, p.length, parts):
                if kept(p, where, j):
                    score = read(p.x, x + j * p.x_step) * scale - zero
                    # Above 0 it is where the maximum is infinite, and so is the sum.
                    total += infinity if score > 0 else number(math.exp(score))
        room[tid] = total
        cuda.syncthreads()
        half = parts // 2
        while half > 0:
            if part < half:
                room[tid] += room[tid + half * p.columns]
            cuda.syncthreads()
            half //= 2
        total = room[column]
        logarithm = number(math.log(total)) if total != 0 else -infinity

        if p.result == LOGSUMEXP:
            if alive and part == 0:
                write(p.out, out0, zero + logarithm)
            return
        for i in range(runs):
            x, where = x0 + spread(i, p.run_sizes, p.x_runs), where0 + spread(i, p.run_sizes, p.where_runs)
            out = out0 + spread(i, p.run_sizes, p.out_runs)
            for j in range(part, p.length, parts):
                if kept(p, where, j):
                    score = read(p.x, x + j * p.x_step) * scale - zero
                    if p.result == LOG_SOFTMAX:
                        write(p.out, out + j * p.out_step, score - logarithm)
                    elif finite:
                        write(p.out, out + j * p.out_step, number(math.exp(score)) / total)
                    else:
                        write(p.out, out + j * p.out_step, number(np.nan))
                else:
                    write(p.out, out + j * p.out_step, -infinity if p.result == LOG_SOFTMAX else number(0))

    return reduce


@device
def spread(index, sizes, strides):
    """Where the element lies that comes at this place in the order of such axes."""
    place = np.int64(0)
    for axis in range(len(sizes) - 1, -1, -1):
        place += index % sizes[axis] * strides[axis]
        index = index // sizes[axis]
    return place
