"""A token's row of float32 on its way into a quantised cache: bytes, or halves of them, and their scales."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..problem import INT4_GROUP
from . import emitters, simd

AS_IT_IS, INT8, INT4 = range(3)
"""What is done to a number on its way into the cache."""


@intrinsic
def copy(typingctx: Any, target: Any, source: Any, count: Any) -> Any:
    """Copy so many bytes."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        target, source, count = args
        places = (emitters.pointer(b, x, emitters.I8) for x in (target, source))
        cgutils.raw_memcpy(b, *places, count, 1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic
def first_lane(typingctx: Any, x: Any) -> Any:
    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.extract_element(args[0], emitters.I32(0))

    return x.dtype(x), codegen


@intrinsic
def put_bytes(typingctx: Any, address: Any, x: Any) -> Any:
    """Store whole numbers from -128 to 255, a byte each."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        address, x = args
        numbers = b.fptosi(x, emitters._like(x.type, emitters.I32))
        numbers = b.trunc(numbers, emitters._like(x.type, emitters.I8))
        emitters.store_value(b, numbers, emitters.pointer(b, address, numbers.type))
        return context.get_dummy_value()

    return types.void(types.int64, x), codegen


def _larger(b: ir.IRBuilder, x: Any, y: Any) -> Any:
    it = emitters.int_type(x.type)
    return b.select(b.icmp_unsigned(">", b.bitcast(x, it), b.bitcast(y, it)), x, y)


size = simd._elementwise(lambda b, x: emitters.call(b, "fabs", x), 1)
larger = simd._elementwise(_larger, 2)
"""The larger of two sizes, a NaN if there is one: it has the largest bits."""
across_larger = simd._across(_larger)
nearest = simd._elementwise(emitters._whole, 1)


def build(jit: Any, inline: Any) -> Any:
    """``place(p, source, target, scales, count)`` for rows of float32, of the kinds that a cache may be."""
    lanes = simd.lanes(np.float32)
    load, _, get, put = simd.loads("float32")
    div, fma, add, greater, smaller, splat = (
        simd.div, simd.fma, simd.add, simd.greater, simd.smaller, simd.splat,
    )  # fmt: skip

    @jit
    def largest_size(source, count):
        """The largest magnitude among so many float32, NaN where one is."""
        i, most = 0, np.float32(0)
        if count >= lanes:
            found = splat(np.float32(0))
            while i < count:
                found = larger(size(load(source + min(i, count - lanes) * 4)), found)
                i += lanes
            most = first_lane(across_larger(found))
        while i < count:
            most = larger(size(get(source + i * 4)), most)
            i += 1
        return most

    @inline
    def divided(source, scale, lowest, highest):
        """A vector of float32 as numbers times the scale."""
        x = nearest(div(load(source), splat(scale)))
        return greater(smaller(x, splat(highest)), splat(lowest))

    @jit
    def quantise_int8(source, target, scales, count):
        scale = largest_size(source, count) / np.float32(127)
        put(scales, scale)
        usable = 0 < scale < np.inf
        zero = splat(np.float32(0))
        i = 0
        while i < count and count >= lanes:
            c = min(i, count - lanes)
            put_bytes(
                target + c,
                divided(source + c * 4, scale, np.float32(-127), np.float32(127)) if usable else zero,
            )
            i += lanes
        while i < count:
            x = np.float32(0)
            if usable:
                x = max(min(nearest(get(source + i * 4) / scale), np.float32(127)), np.float32(-127))
            put_bytes(target + i, x)
            i += 1

    @jit
    def quantise_int4(source, target, scales, count):
        half = INT4_GROUP // 2
        for g in range(count // INT4_GROUP):
            s, t = source + g * INT4_GROUP * 4, target + g * half
            most = largest_size(s, INT4_GROUP)
            if most == most:
                a = s
                while size(get(a)) != most:
                    a += 4
                most = get(a)
            scale = most / np.float32(-8)
            put(scales + g * 4, scale)
            usable = scale != 0 and -np.inf < scale < np.inf
            for c in range(0, half, lanes):
                x = y = splat(np.float32(0))
                if usable:
                    x = divided(s + c * 4, scale, np.float32(-8), np.float32(7))
                    y = divided(s + (c + half) * 4, scale, np.float32(-8), np.float32(7))
                eight = splat(np.float32(8))
                put_bytes(t + c, fma(add(y, eight), splat(np.float32(16)), add(x, eight)))

    @jit
    def place(p, source, target, scales, count):
        if p.kind == INT8:
            quantise_int8(source, target, scales, count)
        elif p.kind == INT4:
            quantise_int4(source, target, scales, count)
        else:
            copy(target, source, count * 4)

    return place
