"""From scores to weights: some rows of s^T at once, step by step in turn, so that none waits for another.

One after the other, each would wait four cycles for most of its twenty steps, and the processor, which looks
some hundred instructions ahead, could not fill them.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from . import emitters, panels, simd, thirds
from .emitters import I64, const, load_value, pointer, store_value
from .panels import KEYS
from .tiles import ROW_BYTES

TOGETHER = 4
"""Rows of s^T that are softened at once."""
THIRDS = 0, 1, 16, 17
"""Which rows those are for `thirds`."""
LOW = KEYS * ROW_BYTES
"""Where the second plane of weights of a split lies behind the first."""


def weigh(number: Any, kind: str) -> Any:
    """``weigh(source, target, zero_point, scale, floor, magic, total)``: weights of `TOGETHER` rows of s^T.

    They are ``2**(scale * (s - zero_point))`` as of `emitters.exp2_products`, and go to the target: a `kind`
    of "numbers" in rows, and so "rounded" to bfloat16, of "pairs" as words of two rows, of "split" and
    "thirds" as planes and parts of such words. Returns `total` and their sum.
    """
    polynomial = emitters.EXP2_SHORT if kind in ("pairs", "split") else None

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        source, target, zero_point, scale, floor, magic, total = args
        t = zero_point.type

        def at(base: Any, shift: int, of: Any = t) -> Any:
            return pointer(b, b.add(base, const(I64, shift)), of)

        xs = [
            load_value(b, at(source, i * ROW_BYTES))
            for i in (THIRDS if kind == "thirds" else range(TOGETHER))
        ]
        xs = emitters.exp2_products(b, [b.fsub(x, zero_point) for x in xs], scale, floor, magic, polynomial)
        sums = xs
        while len(sums) > 1:
            sums = [b.fadd(x, y) for x, y in zip(sums[::2], sums[1::2], strict=True)]
        if kind == "thirds":
            thirds.store_words(b, xs[:2], xs[2:], target)
        elif kind == "split":
            uppers = [emitters.upper_value(b, x) for x in xs]
            lowers = [b.fsub(x, upper) for x, upper in zip(xs, uppers, strict=True)]
            for plane, numbers in enumerate((uppers, lowers)):
                _store_words(b, numbers, at, target, plane * LOW)
        elif kind == "pairs":
            _store_words(b, xs, at, target, 0)
        else:
            for i, x in enumerate(xs):
                x = emitters.rounded_value(b, x) if kind == "rounded" else x
                store_value(b, x, at(target, i * ROW_BYTES))
        return b.fadd(total, sums[0])

    @intrinsic
    def run(
        typingctx: Any, source: Any, target: Any, zero_point: Any, scale: Any, floor: Any, magic: Any,
        total: Any,
    ) -> Any:  # fmt: skip
        v = simd.vector(number)
        return v(types.int64, types.int64, *[v] * 5), codegen

    return run


def _store_words(b: Any, xs: list[Any], at: Any, target: Any, shift: int) -> None:
    for i in range(0, len(xs), 2):
        words = panels.weight_words(b, xs[i], xs[i + 1])
        store_value(b, words, at(target, shift + i // 2 * ROW_BYTES, words.type))
