"""How the decode kernel divides its work, and what it is told."""

from __future__ import annotations

from typing import NamedTuple

ROWS = 16
"""Query rows of a block: as many as one matrix instruction multiplies."""
KEYS = 16
"""Keys of a warp's tile."""
WARPS = 4
WEIGHTS = 4 * ROWS * KEYS // 2
"""Bytes of half of a warp's weights."""
STEP = KEYS * WARPS
"""Keys that a block's warps have at a time."""
GROUP = 32
"""Numbers of 4 bits that share a scale."""


class Tile(NamedTuple):
    """What the shared memory of a block holds: for each warp some slots, of 16 keys or 16 values each."""

    width: int  # the head_dim that is multiplied, of key and value
    slots: int  # of a warp: one is read while the others fill
    unit: float = 2  # bytes of a stored number, 0.5 of those of 4 bits
    query_parts: int = 0  # of the queries in shared memory; 0 where each warp has them in registers

    @property
    def threads(self) -> int:
        return 32 * WARPS

    @property
    def pitch(self) -> int:
        """Bytes from a row in shared memory to the next."""
        return -int(-self.width * self.unit // 128) * 128

    @property
    def scales(self) -> int:
        """How many scales a row has."""
        return {0.5: self.width // GROUP, 1: 1}.get(self.unit, 0)

    @property
    def scales_at(self) -> int:
        """Where in a slot the rows' scales are, of each group those of all 16."""
        return KEYS * self.pitch

    @property
    def slot(self) -> int:
        """Bytes of a slot."""
        return self.scales_at + -(-4 * KEYS * self.scales // 128) * 128

    @property
    def warp_bytes(self) -> int:
        """Bytes of a warp's slots; in the end its sums lie there."""
        return self.slots * self.slot

    @property
    def sum_pitch(self) -> int:
        """Bytes from a row of sums to the next, which begins in other banks."""
        return 4 * (self.width + 8)

    @property
    def weights_at(self) -> int:
        """Some of each warp's weights, where values are not finite."""
        return WARPS * self.warp_bytes

    @property
    def states_at(self) -> int:
        """Each warp's maximum and total of each row."""
        return self.weights_at + WARPS * WEIGHTS

    @property
    def queries_at(self) -> int:
        """The rows as left operands: of each part, for each 16 numbers, what `load_matrices` takes."""
        return self.states_at + 8 * WARPS * ROWS

    @property
    def shared_bytes(self) -> int:
        return self.queries_at + self.query_parts * self.width // 16 * 512


KINDS = ("float32", "float16", "bfloat16")
_ARRAYS = ("query", "query_b", "query_h", "query_s", "key", "key_p", "key_h", "key_s", "value", "value_p",
           "value_h", "value_s", "key_scales", "key_scales_p", "key_scales_h", "key_scales_s", "value_scales",
           "value_scales_p", "value_scales_h", "value_scales_s", "out", "out_b", "out_h", "out_s", "lse",
           "lse_b", "lse_h", "lse_s")  # fmt: skip
PARAMETERS = (
    # Addresses, 0 where there is none, and strides in bytes; those of keys and values along pages, heads and
    # the rows of a page. lse is float32.
    *((name, "int64") for name in _ARRAYS),
    ("query_kind", "int32"),  # of a quantised cache's queries and output, among KINDS
    ("page_table", "int64"),  # address of int32 (B, table_width); where it is 0, sequence b has page b alone
    ("alibi_slopes", "int64"),  # address of a float32 for each head, as sinks
    ("sinks", "int64"),
    ("key_starts", "int64"),  # address of an int64 for each sequence; where it is 0, sequences start at 0
    ("key_lengths", "int64"),  # likewise; where it is 0,
    ("key_length", "int64"),  # this is every sequence's
    ("offsets", "int64"),
    ("offset", "int64"),
    ("from_end", "int32"),  # whether queries stand at the sequences' ends, whatever the offset
    ("partials", "int64"),  # addresses of float32 (units, chunks, block_rows, width), and of the maximum and
    ("states", "int64"),  # total of each row, (units, chunks, block_rows, 2)
    ("counters", "int64"),  # address of an int32 for each unit, 0 before and after every launch
    ("table_width", "int32"),
    ("page_size", "int32"),
    ("ring", "int32"),
    ("group", "int32"),
    ("kv_heads", "int32"),
    ("row_blocks", "int32"),  # of a key head
    ("block_rows", "int32"),  # at most ROWS
    ("queries", "int32"),
    ("chunk", "int32"),  # keys of a block, a multiple of STEP
    ("chunks", "int32"),  # blocks of a unit: a sequence's key head and block of rows
    ("head_dim", "int32"),
    ("value_dim", "int32"),
    ("left", "int64"),
    ("right", "int64"),
    ("scale", "float32"),
    ("softcap", "float32"),
    ("inverse_softcap", "float32"),
)
"""The names and types of what the kernel takes."""
REACH = 1 << 30
"""More than any position. Sums of two stay below 2**31."""


class Place(NamedTuple):
    """Where a block of threads works."""

    b: int
    kv_head: int
    h: int  # the first query head
    row0: int  # of the rows of a key head
    rows: int  # at most ROWS
    unit: int
    part: int  # which of the unit's chunks, of those that have anything to see
    parts: int  # how many there are
    key0: int  # the chunk's first position
    begin: int  # what its rows may see, begin <= j < end
    end: int
    all_first: int  # what each of them sees
    all_last: int
    low: int  # query i sees the keys from i + low
    high: int  # up to, but without, i + high
    start: int  # the sequence's first and last key, likewise
    length: int
