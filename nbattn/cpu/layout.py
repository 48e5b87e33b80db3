"""Where kernels whose lanes are queries keep things: their parameters, a block's scratch, and the form of the
numbers that they multiply.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import emitters, runtime, simd
from .panels import KEYS

STATE_ROWS = 9
"""Rows of per-query numbers in a block's scratch."""
TABLES = 5
"""Tables of per-query addresses."""

PARAMETERS = np.dtype(
    runtime.WORK
    + [(name, np.int64) for name in (
        "workspace", "workspace_bytes", "workers",
        # addresses, the first four side by side, and strides in elements along batch, head and row
        "query", "key", "value", "out",
        "query_b", "query_h", "query_s", "key_b", "key_h", "key_s",
        "value_b", "value_h", "value_s", "out_b", "out_h", "out_s",
        "lse", "lse_b", "lse_h", "lse_s", "weights", "weights_b", "weights_h", "weights_s",
        # of hard attention: addresses of arrays (B, Hq, Sq), and the size of a row of values
        "index", "uniforms", "value_bytes",
        # addresses, and strides in bytes along batch, head, query and key
        "mask", "mask_b", "mask_h", "mask_q", "mask_k", "mask_same_rows",
        "table", "table_b", "table_h", "table_q", "words",  # of a block mask
        "bias", "bias_b", "bias_h", "bias_q", "bias_k", "bias_kind", "bias_same_rows",
        "alibi_slopes", "sinks", "offset", "key_lengths", "query_starts", "key_starts", "first_task",
        # of the kernels of users' functions, and their arguments
        "score_mod", "score_arguments", "mask_mod", "mask_arguments",
        # what the mask_mod shows of tiles, bytes, and strides along batch, head and block
        "states", "states_b", "states_h", "states_q",
        "batch", "queries", "head_dim", "value_dim", "query_rows", "value_rows",
        "group", "packed_heads", "units", "blocks",
        "left", "right", "plain", "slots", "slot_bytes", "key_panel_bytes", "key_tiles",
    )]
    + [(name, np.float64) for name in ("scale", "softcap", "log2_scale")]
)  # fmt: skip


def score_rows(operands: str) -> int:
    """Rows that a block's scores take in scratch, and the second plane of its weights in a split."""
    return KEYS * 3 // 2 if operands == "split" else KEYS


class Operand(NamedTuple):
    """Values as the tiles multiply them, with strides in words of `pairs`, or numbers."""

    address: int
    two: int  # from one two of columns to the next
    column: int  # between the two
    key: int  # to the next key, or pair of keys


class Scratch(NamedTuple):
    """Addresses of what one block works in. Rows have `ROW_BYTES`; tables 8 bytes a query."""

    q: int  # q^T, query_rows rows
    o: int  # o^T, value_rows rows
    s: int  # s^T, then its weights: KEYS rows
    maximum: int  # one row each of a number a query: the softmax's running maximum,
    total: int  # its running total,
    rescale: int  # what older sums are multiplied by,
    first: int  # the first key that is seen,
    last: int  # one past the last,
    slope: int  # of ALiBi,
    position: int  # of the query among the keys
    selected: int  # the key that hard attention selects, an integer
    ends: int  # or where what each vector sees of a run ends, 16 words,
    begins: int  # and where it begins
    tops: int  # the maxima of a run's raw products
    queries: int  # one table each of addresses: where the query lies,
    outs: int  # its output,
    masks: int  # its mask, or of a block mask the row of the table, and the bit of the first query,
    biases: int  # its bias,
    weights: int  # its weights
    seen: int  # a word of bits for each key of a run: which queries the masks let see it
    call: int  # what users' functions are called with: `mods.CALL`
    tags: int  # which panel each slot holds
    panels: int
    finite: int  # one run's values without NaN and inf


class Block(NamedTuple):
    """A task's queries and the keys that they share."""

    start: int  # the sequence's first row
    queries: int  # how many each of its heads has
    row0: int  # the first row of the block, in the unit's packed heads
    rows: int
    vectors: int  # of lanes that hold them
    head: int  # the head of keys, counted over the batch
    key: int  # the addresses of its first key and value
    value: int
    length: int  # how many keys there are


parameters_at = simd.record(PARAMETERS)

NEXT_TASK = PARAMETERS.fields["next_task"][1]  # type: ignore[index]
TASKS_DONE = PARAMETERS.fields["tasks_done"][1]  # type: ignore[index]
WORKERS = PARAMETERS.fields["workers"][1]  # type: ignore[index]


def multiplies(storage: str, bfloat16_products: bool) -> str:
    """What is multiplied: "float32", "float64", "pairs" of bfloat16, or such pairs on the tiles of "amx".

    A float16 has 11 bits, those of two bfloat16: "split" multiplies them exactly on the tiles.
    """
    if emitters.AMX and storage == "float16":
        return "split"
    if (emitters.AMX or emitters.PAIRS) and (storage == "bfloat16" or bfloat16_products):
        return "amx" if emitters.AMX else "pairs"
    return "float64" if storage == "float64" else "float32"


class Form(NamedTuple):
    """What a kernel's numbers are in memory and in its products."""

    storage: str
    operands: str  # as of `multiplies`
    dtype: Any  # of scores and sums
    size: int  # its bytes
    stored: int  # the bytes of a number in memory
    lanes: int
    split: bool
    tiled: bool  # multiplied by AMX
    pairs: bool  # of bfloat16, as words
    rounds: bool  # operands are rounded to bfloat16 and multiplied as float32
    converts: bool  # operands are not what memory holds


def form(storage: str, bfloat16_products: bool) -> Form:
    """The numbers of the kernel for arrays of one storage dtype."""
    operands = multiplies(storage, bfloat16_products)
    split = operands == "split"
    tiled = split or operands == "amx"
    pairs = tiled or operands == "pairs"
    rounds = bfloat16_products and not pairs
    dtype = np.float64 if storage == "float64" else np.float32
    size = np.dtype(dtype).itemsize
    stored = 2 if storage in ("float16", "bfloat16") else size
    converts = operands != storage or rounds
    return Form(
        storage, operands, dtype, size, stored, simd.lanes(dtype), split, tiled, pairs, rounds, converts
    )
