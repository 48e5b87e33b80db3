"""Boolean masks as bits: a word of 64 queries for each key of a run.

Mask rows lie query by query, and lanes are queries. Runs of 64 keys of a query are compared into words of 64
bits, a square of 64 such words is transposed by shifts (120 vector operations for 4096 elements), and then a
key's word says which lanes see it. A run that no query of a block sees is skipped before it is multiplied.

A `BlockMask` has such words already. Its blocks are a kernel's 64 queries, or two times 32 of float64, by
half a run of keys: the row of its table is searched for the next block that is seen, and words are copied.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..reference.masks import BLOCK
from . import emitters, simd
from .emitters import I8, I64, const, load_value, pointer, store_value
from .panels import KEYS
from .tiles import ROW_BYTES

NOTHING, SOME, EVERYTHING = range(3)
"""What a block's queries see of a run of keys."""
WORDS = -(-KEYS // 64) * 64
"""Words of 8 bytes that a block keeps: one for each key of a run."""

TRIMMED = 32
"""What a run is cut to multiples of: `queries` wants its start to be one of 16 or 32."""

get_int, put_int = simd.scalars(types.int64)
get_byte, _ = simd.scalars(types.int8)
get_state, _ = simd.scalars(types.int32)


def _bits(count: int) -> Any:
    """``read(address)``: bit i of the result is set where byte i at the address is not 0."""

    @intrinsic
    def read(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            t = ir.VectorType(I8, count)
            present = b.icmp_unsigned("!=", load_value(b, pointer(b, args[0], t)), const(t, 0))
            return (
                b.zext(b.bitcast(present, ir.IntType(count)), I64) if count < 64 else b.bitcast(present, I64)
            )

        return types.int64(types.int64), codegen

    return read


bits16, bits64 = _bits(16), _bits(64)


def _signed(word: int) -> int:
    return word - (word >> 63 << 64)


@intrinsic
def turn_bits(typingctx: Any, address: Any) -> Any:
    """Transpose 64 words of 64 bits in place: bit c of word r moves to bit r of word c."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        t = ir.VectorType(I64, 8)
        places = [pointer(b, b.add(args[0], const(I64, 64 * v)), t) for v in range(8)]
        words = [load_value(b, place) for place in places]
        for distance in (32, 16, 8, 4, 2, 1):
            low = sum(1 << i for i in range(64) if not i & distance)
            apart = distance // 8
            if apart:  # words that trade halves lie in different vectors
                shift, keep = const(t, distance), const(t, _signed(low))
                for v in range(8):
                    if not v & apart:
                        x, y = words[v], words[v + apart]
                        words[v] = b.or_(b.and_(x, keep), b.and_(b.shl(y, shift), b.not_(keep)))
                        words[v + apart] = b.or_(b.and_(b.lshr(x, shift), keep), b.and_(y, b.not_(keep)))
                continue
            lanes = range(8)
            order = ir.Constant(ir.VectorType(emitters.I32, 8), [lane ^ distance for lane in lanes])
            turns = ir.Constant(t, [64 - distance if lane & distance else distance for lane in lanes])
            own = ir.Constant(t, [_signed(low << distance if lane & distance else low) for lane in lanes])
            for v, x in enumerate(words):
                y = b.shuffle_vector(x, x, order)
                other = emitters.call(b, "fshl", y, y, turns)
                words[v] = b.or_(b.and_(x, own), b.and_(other, b.not_(own)))
        for word, place in zip(words, places, strict=True):
            store_value(b, word, place)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def shown(typingctx: Any, x: Any, word: Any, first: Any) -> Any:
    """x in the lanes whose bit, from bit `first` on, is set in the word at an address, else -inf."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, word, first = args
        count = x.type.count
        place = b.add(word, b.lshr(first, const(I64, 3)))
        if count >= 8:
            bits = load_value(b, pointer(b, place, ir.IntType(count)))
            seen = b.bitcast(bits, ir.VectorType(ir.IntType(1), count))
        else:
            bits = b.lshr(b.zext(load_value(b, pointer(b, place, I8)), I64), b.and_(first, const(I64, 7)))
            lanes = ir.VectorType(I64, count)
            each = ir.Constant(lanes, [1 << lane for lane in range(count)])
            seen = b.icmp_unsigned("!=", b.and_(emitters.splat_value(b, lanes, bits), each), const(lanes, 0))
        return b.select(seen, x, const(x.type, float("-inf")))

    return x(x, types.int64, types.int64), codegen


def trim_words(w, key0, keys):
    """(first key, keys) of a run without what no query sees of it at its ends, and the words likewise."""
    first, last = 0, keys
    while first < keys - 1 and get_int(w.seen + 8 * first) == 0:
        first += 1
    while last > first + 1 and get_int(w.seen + 8 * (last - 1)) == 0:
        last -= 1
    first = first // TRIMMED * TRIMMED
    last = min((last + TRIMMED - 1) // TRIMMED * TRIMMED, keys)
    for j in range(0 if first == 0 else last - first):
        put_int(w.seen + 8 * j, get_int(w.seen + 8 * (first + j)))
    return key0 + first, last - first


def build(jit: Any, dtype: Any) -> tuple[Any, Any, Any]:
    """The compiled functions ``look(p, w, key0, keys, rows)``, what the mask shows of a run of keys,
    ``hide(w, keys, vectors)``, which then makes scores -inf, and ``masked(p, w, r, j)``, for a single one.

    `p` is the call's parameters, `w` the block's scratch (`layout.Scratch`).
    """
    lanes, register = simd.lanes(dtype), emitters.REGISTER_BYTES
    load, store, _, _ = simd.loads(np.dtype(dtype).name)

    @jit
    def few_bits(a, count, before):
        """Bits of fewer than 64 bytes; so many `before` them may be read too."""
        word, j = 0, 0
        while j < count:
            if j + 16 <= count:
                word |= bits16(a + j) << j
                j += 16
            elif before + count >= 16:
                word |= bits16(a + count - 16) >> (16 - count + j) << j
                j = count
            else:
                word |= int(get_byte(a + j) != 0) << j
                j += 1
        return word

    @jit
    def look(p, w, key0, keys, rows):
        """NOTHING, SOME or EVERYTHING; for SOME, the words at w.seen say what."""
        some, every = 0, -1
        if p.mask_same_rows:
            a = get_int(w.masks) + key0 * p.mask_k
            for j in range(keys):
                word = 0 if get_byte(a + j * p.mask_k) == 0 else -1
                put_int(w.seen + 8 * j, word)
                some, every = some | word, every & word
        for first in range(0, 0 if p.mask_same_rows else keys, 64):
            count = min(64, keys - first)
            rest = -1 << count if count < 64 else 0
            for r in range(rows):
                a = get_int(w.masks + 8 * r) + (key0 + first) * p.mask_k
                if p.mask_k == 0:
                    word = 0 if get_byte(a) == 0 else -1
                elif count == 64:
                    word = bits64(a)
                    simd.prefetch(a + KEYS)
                else:
                    word = few_bits(a, count, key0 + first)
                put_int(w.seen + 8 * (first + r), word)
                some, every = some | word, every & (word | rest)
            for r in range(rows, 64):
                put_int(w.seen + 8 * (first + r), 0)
        if some == 0:
            return NOTHING
        if every == -1:
            return EVERYTHING
        for first in range(0, 0 if p.mask_same_rows else keys, 64):
            turn_bits(w.seen + 8 * first)
        return SOME

    @jit
    def hide(w, keys, vectors):
        for j in range(keys):
            for v in range(vectors):
                a = w.s + j * ROW_BYTES + v * register
                store(a, shown(load(a), w.seen + 8 * j, v * lanes))

    @jit
    def masked(p, w, r, j):
        return get_byte(get_int(w.masks + 8 * r) + j * p.mask_k) == 0

    return look, hide, masked


def with_blocks(jit: Any, look_array: Any, masked_in_array: Any) -> tuple[Any, Any]:
    """``look(p, w, key0, end, rows)``, what the mask, of whichever kind, shows from a key on, and of how many
    before `end`; and ``masked(p, w, r, j)``. Both made of those for arrays.
    """

    @jit
    def look_up(p, w, key0, keys, end):
        """NOTHING up to the next block that is seen; or SOME or EVERYTHING of a block, or of two that are
        both seen where a run of `keys` holds them.
        """
        row, bit = get_int(w.masks), get_int(w.masks + 8)
        block, last = key0 // BLOCK, (end - 1) // BLOCK
        state = get_state(row + 4 * block)
        if state == NOTHING:
            while state == NOTHING and block < last:
                block += 1
                state = get_state(row + 4 * block)
            return NOTHING, end - key0 if state == NOTHING else block * BLOCK - key0
        first = min(BLOCK - key0 % BLOCK, keys)
        following = get_state(row + 4 * (block + 1)) if first < keys else 0
        if following == NOTHING:
            keys = first
        if state == 1 and (following == 1 or keys == first):
            return EVERYTHING, keys
        for j in range(keys):
            if j == first:
                state = following
            word = -1
            if state != 1:
                word = get_int(p.words + 8 * ((state - 2) * BLOCK + (key0 + j) % BLOCK)) >> bit
            put_int(w.seen + 8 * j, word)
        return SOME, keys

    @jit
    def look(p, w, key0, end, rows):
        """(NOTHING, SOME or EVERYTHING, of how many keys); for SOME, the words at w.seen say what."""
        keys = min(KEYS - key0 % KEYS, end - key0)
        if p.table != 0:
            return look_up(p, w, key0, keys, end)
        return look_array(p, w, key0, keys, rows) if p.mask != 0 else EVERYTHING, keys

    @jit
    def masked(p, w, r, j):
        if p.table == 0:
            return masked_in_array(p, w, r, j)
        state = get_state(get_int(w.masks) + 4 * (j // BLOCK))
        if state < 2:
            return state == 0
        word = get_int(p.words + 8 * ((state - 2) * BLOCK + j % BLOCK))
        return word >> (get_int(w.masks + 8) + r) & 1 == 0

    return look, masked
