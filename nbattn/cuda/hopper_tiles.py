"""How the kernel of Hopper GPUs divides its work, and what it is told."""

from __future__ import annotations

from typing import NamedTuple

from .mma_tiles import REACH

__all__ = ["PARAMETERS", "REACH", "Place", "Tile"]


class Tile(NamedTuple):
    """A block of threads, and what its tiles of shared memory hold.

    A warpgroup is four warps. One of them brings tiles of keys and values, and each of the others takes 64
    queries through them. A tile is cut into panels of 64 columns, whose rows are 128 bytes.
    """

    width: int  # the head_dim that is multiplied, a multiple of 16
    value_width: int  # likewise of the value
    keys: int  # of a step, a multiple of 32
    groups: int  # warpgroups that multiply
    stages: int  # tiles of keys, and of values, that there is room for
    turns: bool  # whether the groups take turns at starting products

    @property
    def rows(self) -> int:
        """Queries of a block."""
        return 64 * self.groups

    @property
    def threads(self) -> int:
        return 128 * (self.groups + 1)

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that brings tiles, and of one that multiplies; together what a multiprocessor has."""
        return {1: (56, 240), 2: (40, 232), 3: (32, 160)}[self.groups]

    @property
    def launch_registers(self) -> int:
        """What a thread must have before: with fewer, those that take more would wait for ever."""
        return 65536 // self.threads // 8 * 8

    @property
    def panels(self) -> int:
        return -(-self.width // 64)

    @property
    def value_panels(self) -> int:
        return -(-self.value_width // 64)

    @property
    def query_panel(self) -> int:
        """Bytes of a panel of queries."""
        return self.rows * 128

    @property
    def panel(self) -> int:
        """Bytes of a panel of keys or values."""
        return self.keys * 128

    @property
    def words(self) -> int:
        """Words that have a bit for each key of a step."""
        return self.keys // 32

    # Where in shared memory lies what; queries, and in the end the output, come first.

    @property
    def key_at(self) -> int:
        return max(self.panels, self.value_panels) * self.query_panel

    @property
    def value_at(self) -> int:
        return self.key_at + self.stages * self.panels * self.panel

    @property
    def barriers_at(self) -> int:
        """mbarriers of 8 bytes: the queries have come, keys have, their room is free, values', their room."""
        return self.value_at + self.stages * self.value_panels * self.panel

    @property
    def flags_at(self) -> int:
        """A bit for each key whose value is not finite."""
        return self.barriers_at + 8 * (1 + 4 * self.stages)

    @property
    def shared_bytes(self) -> int:
        return self.flags_at + 4 * self.words


PARAMETERS = (
    # A tensor map each for (head_dim, rows, heads, sequences); they stay where the driver puts them, first.
    ("query_map", "map"),
    ("key_map", "map"),
    ("value_map", "map"),
    # Addresses, 0 where there is none, and strides in bytes. lse is float32.
    *((name, "int64") for name in ("out", "out_b", "out_h", "out_s", "lse", "lse_b", "lse_h", "lse_s")),
    ("sinks", "int64"),  # address of a float32 for each head
    ("offsets", "int64"),  # address of an int64 for each sequence; where it is 0,
    ("offset", "int64"),  # this is every sequence's
    ("key_lengths", "int64"),
    ("key_length", "int64"),
    ("query_starts", "int64"),  # addresses of int64; packed problems only
    ("key_starts", "int64"),
    ("left", "int64"),
    ("right", "int64"),
    ("heads", "int32"),
    ("group", "int32"),
    ("units", "int32"),  # heads of all sequences
    ("section", "int32"),  # units whose blocks are mixed, the longest first
    ("blocks", "int32"),  # of queries, for each unit
    ("queries", "int32"),
    ("value_dim", "int32"),
    ("aligned", "int32"),  # whether the output's rows are whole runs of 16 bytes
    ("scale", "float32"),
    ("log2_scale", "float32"),  # what the softmax multiplies scores with
    ("softcap", "float32"),
    ("inverse_softcap", "float32"),
)
"""The names and types of what the kernel takes."""


class Place(NamedTuple):
    """Where a block of threads works."""

    slot: int  # the sequence in the tensor maps
    h: int
    shared_head: int
    row0: int  # its first query
    queries: int  # of the sequence
    length: int  # keys of the sequence
    low: int  # query i sees the keys from i + low
    high: int  # up to, but without, i + high
    query_row: int  # the sequence's first rows in the tensor maps
    key_row: int
    out: int  # addresses of the sequence's and head's first rows
    lse: int
