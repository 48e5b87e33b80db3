"""Where the rows of cached keys and values lie, and copies of those that cannot be read in place."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from . import dots, emitters, kinds, simd
from .emitters import I16, I64, load_at, pointer, splat_value, store_value
from .masks import get_byte


@intrinsic
def put_steps(typingctx: Any, table: Any, first: Any, step: Any, count: Any) -> Any:
    """Fill a table with so many addresses, a step apart, and up to seven more; eight at a time.

    Compiled from a loop over integers, it scatters its lanes: 2 ns for each key instead of 0.1.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        table, first, step, count = args
        t = ir.VectorType(I64, 8)
        ranks = ir.Constant(t, list(range(8)))
        addresses = b.add(splat_value(b, t, first), b.mul(splat_value(b, t, step), ranks))
        ahead = splat_value(b, t, b.shl(step, I64(3)))

        def put(state: list[Any], i: Any) -> list[Any]:
            store_value(b, state[0], pointer(b, b.add(table, b.shl(i, I64(6))), t))
            return [b.add(state[0], ahead)]

        emitters.loop_values(b, b.lshr(b.add(count, I64(7)), I64(3)), [addresses], put)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def in_order(typingctx: Any, table: Any) -> Any:
    """Whether the 16 addresses in a table are those of float32 one after the other."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        t = ir.VectorType(I64, 16)
        first = splat_value(b, t, load_at(b, args[0], 0, I64))
        same = b.icmp_signed(
            "==", b.add(first, ir.Constant(t, list(range(0, 64, 4)))), load_at(b, args[0], 0, t)
        )
        return b.icmp_signed("==", b.bitcast(same, I16), I16(-1))

    return types.boolean(types.int64), codegen


class Lookup(NamedTuple):
    """The compiled functions of this file."""

    padded: Any
    filled: Any
    find: Any
    fetch_scales: Any
    widen: Any
    widen_query: Any


def build(jit: Any, storage: str) -> Lookup:
    """The functions for one storage dtype; `p` is the call's parameters, `w` a thread's `chunks.Scratch`."""
    dtype: Any = np.float64 if storage == "float64" else np.float32
    size = np.dtype(dtype).itemsize
    lanes = simd.lanes(dtype)
    int8, int4 = storage == "int8", storage == "int4"
    outer = "float32" if int8 or int4 else storage  # of queries
    outer_bytes = 2 if outer in ("float16", "bfloat16") else size
    stored_bits = {"int8": 8, "int4": 4}.get(storage, 8 * outer_bytes)  # of a number
    unit = kinds.unit(storage) * lanes
    portion = max(lanes, dots.SCORED_AT_ONCE)  # keys that every tile takes a whole number of times
    _, store, _, put = simd.loads("float64" if size == 8 else "float32")
    load_outer, _, get_outer, _ = simd.loads(outer)
    get_int, put_int = simd.scalars(types.int64)
    get_float32 = simd.scalars(types.float32)[0]
    widen_unit = kinds.widen_unit(storage)
    copy16 = kinds.copy_runs(types.float32, 16, "float32")

    @jit
    def padded(n):
        return (n + lanes - 1) // lanes * lanes

    @jit
    def filled(keys):
        return (keys + portion - 1) // portion * portion

    @jit
    def find(p, w, place, b, head, k0, keys):
        """Fill the tables from an entry on for `keys` positions from k0 on, padded with the last one."""
        t = 8 * place
        walk(p, w.keys + t, p.key + head * p.key_h, p.key_p, p.key_s, b, k0, keys)
        walk(p, w.values + t, p.value + head * p.value_h, p.value_p, p.value_s, b, k0, keys)
        if int8 or int4:
            a, c = p.key_scales + head * p.key_scales_h, p.value_scales + head * p.value_scales_h
            walk(p, w.key_scales + t, a, p.key_scales_p, p.key_scales_s, b, k0, keys)
            walk(p, w.value_scales + t, c, p.value_scales_p, p.value_scales_s, b, k0, keys)

    @jit
    def fetch_scales(scales, keys, tile):
        """A tile's scales in place of their addresses; asks for the next tile's."""
        for j in range(0, keys, portion):
            simd.prefetch_aside(get_int(scales + 8 * (tile + j)))
        for j in range(0, keys, 16):
            if j + 16 <= keys and in_order(scales + 8 * j):
                copy16(get_int(scales + 8 * j), scales + 4 * j)
                continue
            for i in range(j, min(j + 16, keys)):
                put(scales + 4 * i, get_float32(get_int(scales + 8 * i)))

    @jit
    def walk(p, table, base, page_bytes, row_bytes, b, k0, keys):
        """Addresses of rows from position k0 on, padded with the last one."""
        slot = k0 % p.ring if p.ring != 0 else k0
        page, row = slot // p.page_size, slot % p.page_size
        j = 0
        while j < keys:
            count = min(keys - j, p.page_size - row)
            if p.ring != 0:
                count = min(count, p.ring - page * p.page_size - row)
            a = base + get_int(p.page_table + 8 * (b * p.table_width + page)) * page_bytes + row * row_bytes
            put_steps(table + 8 * j, a, row_bytes, count)
            j += count
            page, row = page + 1, 0
            if p.ring != 0 and page * p.page_size >= p.ring:
                page = 0
        while j % portion != 0:
            put_int(table + 8 * j, get_int(table + 8 * j - 8))
            j += 1

    @jit
    def widen(table, scales, keys, columns, target):
        """Rows of stored numbers -> padded rows of `dtype`."""
        width, whole = padded(columns), columns // unit * unit
        for j in range(keys):
            a, t = get_int(table + 8 * j), target + j * width * size
            factors = get_int(scales + 8 * j) if int4 else 0
            for c in range(0, whole, unit):
                widen_unit(a + c * stored_bits // 8, factors + c // 8, t + c * size)
            for c in range(whole, width):
                x = dtype(0)
                if c < columns and not int4:
                    x = dtype(get_byte(a + c)) if int8 else get_outer(a + c * outer_bytes)
                put(t + c * size, x)

    @jit
    def widen_query(a, columns, t):
        whole = columns // lanes * lanes
        for c in range(0, whole, lanes):
            store(t + c * size, load_outer(a + c * outer_bytes))
        for c in range(whole, padded(columns)):
            put(t + c * size, get_outer(a + c * outer_bytes) if c < columns else dtype(0))

    return Lookup(padded, filled, find, fetch_scales, widen, widen_query)
