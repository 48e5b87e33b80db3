"""One sweep over the keys or the values of a tile: which register tile takes which rows and columns."""

from __future__ import annotations

from typing import Any

from . import dots, emitters, kinds


def scorer(
    jit: Any, number: Any, kind: str, stored_bits: int, padded: Any, in_place: bool, row_keys: int
) -> Any:
    """The function that makes the raw products with keys of this kind, which lie where they are stored or in
    scratch.

    float16, int8 and int4 are read in place for one row a vector alone: for more they are widened first.
    """
    size = number.bitwidth // 8
    lanes = emitters.REGISTER_BYTES // size
    wide_rows = dots.rows_per_vector(lanes)
    pair_rows = 2 if wide_rows > 2 else 0
    vectors = kinds.unit(kind)
    few = kind in ("float16", "int8", "int4")
    # One row leaves time for little but reading: nearly in their order, the processor foresees it.
    score1, keys1 = dots.scores_tile(number, 1, 1, kind, stored_bits, most=2 if in_place else 8)
    query_bytes, behind = kinds.query_bytes(kind, size), kinds.behind_bytes(kind)
    kind = number.name if few else kind
    score2, keys2 = dots.scores_tile(number, 2, 1, kind, stored_bits)
    score4, keys4 = dots.scores_tile(number, wide_rows, 1, kind, stored_bits)
    score8, keys8 = dots.scores_tile(number, wide_rows, 2, kind, stored_bits)

    @jit
    def score(p, w, table, scales, wanted, keys, groups, together):
        """The raw products of a tile's keys, whole vectors of them; asks meanwhile for as many `wanted`."""
        depth, width = padded(p.head_dim), p.key_bytes
        steps = depth * together // (lanes * vectors)
        q_group, s_group = together * depth * query_bytes + behind, together * row_keys * size
        if together == 1:
            for j in range(0, keys, keys1):
                v, t = wanted + 8 * j, w.s + j * size
                score1(table + 8 * j, scales + 8 * j, v, width, w.q, 0, t, 0, steps)
            return
        if few:
            return
        if together == pair_rows:
            for j in range(0, keys, keys2):
                v, t = wanted + 8 * j, w.s + 2 * j * size
                score2(table + 8 * j, 0, v, width, w.q, 0, t, 0, steps)
            return
        for g in range(0, groups - 1, 2):
            q, s = w.q + g * q_group, w.s + g * s_group
            for j in range(0, keys, keys8):
                v, t = wanted + 8 * j, s + j * wide_rows * size
                score8(table + 8 * j, 0, v, width, q, q_group, t, s_group, steps)
        if groups % 2 == 1:
            q, s = w.q + (groups - 1) * q_group, w.s + (groups - 1) * s_group
            for j in range(0, keys, keys4):
                v, t = wanted + 8 * j, s + j * wide_rows * size
                score4(table + 8 * j, 0, v, width, q, 0, t, 0, steps)

    return score


def weigher(
    jit: Any, number: Any, kind: str, stored_bits: int, padded: Any, in_place: bool, row_keys: int
) -> Any:
    """The function that adds up values of this kind, which lie where they are stored or in scratch, widened
    from numbers of `stored_bits`. A row has room for `row_keys` weights.
    """
    size = number.bitwidth // 8
    register = emitters.REGISTER_BYTES
    lanes = register // size
    wide_rows = dots.rows_per_vector(lanes)
    pair_rows = 2 if wide_rows > 2 else 0
    vectors, most = kinds.value_unit(kind), dots.UNDER_WAY
    weight_bytes = kinds.weight_bytes(kind, size)

    def pair_of(rows: int, groups: int) -> tuple[Any, Any, int]:
        columns = max(min(4, most // (rows * groups)) // vectors, 1) * vectors
        tiles = (dots.values_tile(number, rows, groups, n, kind, stored_bits) for n in (columns, vectors))
        return *tiles, columns * register

    # One row of queries takes whole rows of 8 vectors, in the order in which the processor foresees them.
    # More rows need the registers for fewer columns.
    is_wide, wide_bytes = in_place and most == 16, 8 * register
    weigh1_wide = dots.values_tile(number, 1, 1, 8, kind, stored_bits)
    weigh1, weigh1_few, bytes1 = pair_of(1, 1)
    weigh2, weigh2_few, bytes2 = pair_of(2, 1)
    weigh4, weigh4_few, bytes4 = pair_of(wide_rows, 1)
    weigh8, weigh8_few, bytes8 = pair_of(wide_rows, 2)
    few = vectors * register

    @jit
    def weigh(p, w, state, weights, table, scales, wanted, keys, groups, together):
        """o = o * factor + weights @ values; asks meanwhile for as many rows `wanted`."""
        blocks = keys * together // lanes
        o_row, width = padded(p.value_dim) * size, p.value_bytes
        o, last = state + 2 * groups * register, wanted + 8 * (keys - 1)
        s_group = together * row_keys * weight_bytes
        g = 0
        while g < groups:
            pair = together == wide_rows and g + 1 < groups
            a, t, f = weights + g * s_group, o + g * together * o_row, w.factor + 2 * g * register
            sums = t, o_row, f, blocks
            c = 0
            while c < o_row:
                left, count = o_row - c, few
                begin = (c * keys * stored_bits) // (8 * size) if g == 0 else keys * width
                rows = table, scales, wanted, width, last, begin
                if together == 1:
                    if is_wide and left >= wide_bytes:
                        weigh1_wide(*rows, c, a, 0, *sums)
                        count = wide_bytes
                    elif left >= bytes1:
                        weigh1(*rows, c, a, 0, *sums)
                        count = bytes1
                    else:
                        weigh1_few(*rows, c, a, 0, *sums)
                elif together == pair_rows:
                    if left >= bytes2:
                        weigh2(*rows, c, a, 0, *sums)
                        count = bytes2
                    else:
                        weigh2_few(*rows, c, a, 0, *sums)
                elif pair:
                    if left >= bytes8:
                        weigh8(*rows, c, a, s_group, *sums)
                        count = bytes8
                    else:
                        weigh8_few(*rows, c, a, s_group, *sums)
                elif left >= bytes4:
                    weigh4(*rows, c, a, 0, *sums)
                    count = bytes4
                else:
                    weigh4_few(*rows, c, a, 0, *sums)
                c += count
            g += 2 if pair else 1

    return weigh
