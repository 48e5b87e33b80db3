"""How tensor-core kernels divide their work, and what they are told."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """A block of threads, and what its fragments and tiles of shared memory hold.

    A warp has one or two warp tiles of 16 queries, a thread parts of two rows of each. Its part of a fragment
    lies warp tile by warp tile, 8 columns by 8 columns: two numbers of its first row, two of the other.
    """

    width: int  # the head_dim that is multiplied, a multiple of 16
    value_width: int  # likewise of the value
    rows: int  # queries of a block
    keys: int  # keys of a step, a multiple of 32
    warps: int
    keep: bool  # whether queries stay in registers
    unit: int = 2  # bytes of a number

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def warp_tiles(self) -> int:
        return self.rows // (16 * self.warps)

    @property
    def thread_rows(self) -> int:
        return 2 * self.warp_tiles

    @property
    def scores(self) -> int:
        """A thread's numbers of the scores of a warp tile."""
        return self.keys // 2

    @property
    def sums(self) -> int:
        """A thread's numbers of the output of a warp tile."""
        return self.value_width // 2

    @property
    def words(self) -> int:
        """Words that have a bit for each key of a step."""
        return self.keys // 32

    @property
    def pitch(self) -> int:
        """Bytes from a row of queries or keys in shared memory to the next."""
        return -(-self.width * self.unit // 128) * 128

    @property
    def value_pitch(self) -> int:
        return -(-self.value_width * self.unit // 128) * 128

    # Where in shared memory lies what; queries, and in the end the output, come first.

    @property
    def key_at(self) -> int:
        return self.rows * max(self.pitch, self.value_pitch)

    @property
    def value_at(self) -> int:
        return self.key_at + self.keys * self.pitch

    @property
    def flags_at(self) -> int:
        """A bit for each key whose value is not finite."""
        return self.value_at + self.keys * self.value_pitch

    @property
    def shared_bytes(self) -> int:
        return self.flags_at + 4 * self.words


_ARRAYS = ("query", "query_b", "query_h", "query_s", "key", "key_b", "key_h", "key_s", "value", "value_b",
           "value_h", "value_s", "out", "out_b", "out_h", "out_s", "lse", "lse_b", "lse_h", "lse_s", "mask",
           "mask_b", "mask_h", "mask_q", "mask_k", "bias", "bias_b", "bias_h", "bias_q",
           "bias_k")  # fmt: skip
PARAMETERS = (
    # Addresses, 0 where there is none, and strides in bytes. lse is float32, a mask has bytes.
    *((name, "int64") for name in _ARRAYS),
    ("bias_is_float32", "int32"),  # else of the query's dtype
    ("alibi_slopes", "int64"),  # address of a float32 for each head, as sinks
    ("sinks", "int64"),
    ("offsets", "int64"),  # address of an int64 for each sequence; where it is 0,
    ("offset", "int64"),  # this is every sequence's
    ("key_lengths", "int64"),
    ("key_length", "int64"),
    ("query_starts", "int64"),  # addresses of int64; packed problems only
    ("key_starts", "int64"),
    ("heads", "int32"),
    ("group", "int32"),
    ("blocks", "int32"),  # of queries, for each head
    ("queries", "int32"),
    ("head_dim", "int32"),
    ("value_dim", "int32"),
    ("aligned", "int32"),  # whether the output's rows are whole runs of 16 bytes
    ("left", "int64"),
    ("right", "int64"),
    ("scale", "float32"),
    ("log2_scale", "float32"),  # what the softmax multiplies scores with
    ("softcap", "float32"),
    ("inverse_softcap", "float32"),
)
"""The names and types of what the kernel takes."""
REACH = 1 << 30
"""More than any position. Sums of two stay below 2**31."""


class Place(NamedTuple):
    """Where a block of threads works."""

    b: int
    h: int
    row0: int  # its first query
    queries: int  # of the sequence
    length: int  # keys of the sequence
    offset: int
    low: int  # query i sees the keys from i + low
    high: int  # up to, but without, i + high
    query: int  # addresses of the sequence's and head's first rows
    key: int
    value: int
    out: int
    lse: int
