"""Where the tiled attention of `blocks` keeps things: its parameters, a block's scratch, and the form of the
numbers that it multiplies.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import emitters, runtime, simd
from .panels import KEYS

STATE_ROWS = 7
"""Rows of per-query numbers in a block's scratch."""
TABLES = 5
"""Tables of per-query addresses."""

PARAMETERS = np.dtype(
    runtime.WORK
    + [(name, np.int64) for name in (
        "workspace", "workspace_bytes", "workers",
        # addresses, and strides in elements along batch, head and row
        "query", "query_b", "query_h", "query_s", "key", "key_b", "key_h", "key_s",
        "value", "value_b", "value_h", "value_s", "out", "out_b", "out_h", "out_s",
        "lse", "lse_b", "lse_h", "lse_s", "weights", "weights_b", "weights_h", "weights_s",
        # addresses, and strides in bytes along batch, head, query and key
        "mask", "mask_b", "mask_h", "mask_q", "mask_k", "mask_same_rows",
        "bias", "bias_b", "bias_h", "bias_q", "bias_k", "bias_kind", "bias_same_rows",
        "alibi_slopes", "sinks", "offset", "key_lengths", "query_starts", "key_starts", "first_task",
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
    queries: int  # one table each of addresses: where the query lies,
    outs: int  # its output,
    masks: int  # its mask,
    biases: int  # its bias,
    weights: int  # its weights
    seen: int  # a word of bits for each key of a run: which queries the mask lets see it
    tags: int  # which panel each slot holds
    panels: int
    finite: int  # one run's values without NaN and inf


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
