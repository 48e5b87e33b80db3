"""Keys that are turned in registers, so that lanes are keys: what scores of 8 and of 4 bits share."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from . import kinds
from .emitters import I32, I64, load_at, splat_value

LANES = 16
WHOLE = ir.VectorType(I32, LANES)
NUMBER = ir.VectorType(ir.FloatType(), LANES)


def splat_at(b: Any, address: Any, shift: int, t: Any) -> Any:
    """The number that is so many bytes behind an address, in all lanes."""
    return splat_value(b, t, load_at(b, address, shift, t.element))


def join(b: Any, parts: list[Any]) -> Any:
    """Vectors one after the other in one."""
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [kinds.shuffle(b, x, y, list(range(2 * x.type.count))) for x, y in pairs]
    return parts[0]


def turn(b: Any, rows: list[Any]) -> list[Any]:
    """16 vectors of four -> four vectors of 16: most turn four at a time, within 128 bits."""
    x = [join(b, rows[i::4]) for i in range(4)]
    low, high = (
        [n + c for n in range(0, LANES, 4) for c in (i, i + LANES, i + 1, i + 1 + LANES)] for i in (0, 2)
    )
    half = [kinds.shuffle(b, x[0], x[1], low), kinds.shuffle(b, x[2], x[3], low),
            kinds.shuffle(b, x[0], x[1], high), kinds.shuffle(b, x[2], x[3], high)]  # fmt: skip
    first, second = (
        [n + c for n in range(0, LANES, 4) for c in (i, i + 1, i + LANES, i + 1 + LANES)] for i in (0, 2)
    )
    return [kinds.shuffle(b, half[i], half[i + 1], order) for i in (0, 2) for order in (first, second)]


def turned_keys(b: Any, table: Any, shift: Any) -> list[Any]:
    """Four vectors, each of four bytes of 16 keys, whose addresses a table holds, from so many bytes on."""
    four = ir.VectorType(I32, 4)
    return turn(b, [load_at(b, b.add(load_at(b, table, 8 * i, I64), shift), 0, four) for i in range(LANES)])


def scorer(jit: Any, tile: Any, query_bytes: int) -> Any:
    """The compiled function ``score(table, scales, wanted, wanted_bytes, q, s, s_row, steps, rows)``: scores
    of 16 keys for so many rows of queries, of which each has so many bytes a step.

    It is made of what `tile` returns for up to eight ``rows``; the first of them ask.
    """
    score1, score2, score4, score8 = (tile(n, asks=True) for n in (1, 2, 4, 8))
    score4_more, score8_more = (tile(n, asks=False) for n in (4, 8))

    @jit
    def score(table, scales, wanted, wanted_bytes, q, s, s_row, steps, rows):
        q_step, r = query_bytes * rows, 0
        while r < rows:
            left = rows - r
            keys = table, scales, wanted, wanted_bytes
            others = q + r * query_bytes, q_step, s + r * s_row, s_row, steps
            if left >= 8 and r > 0:
                score8_more(*keys, *others)
            elif left >= 8:
                score8(*keys, *others)
            elif left >= 4 and r > 0:
                score4_more(*keys, *others)
            elif left >= 4:
                score4(*keys, *others)
            elif left >= 2:
                score2(*keys, *others)
            else:
                score1(*keys, *others)
            r += 8 if left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1

    return score
