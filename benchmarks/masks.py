"""asv: block masks. Seconds that the builders and the conversions take."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np

from .suite import Suite

with suppress(ImportError):  # commits before these names have no results
    from nbattn import BlockMask, masks

LENGTH = 4096


class Builders(Suite):
    def setup(self) -> None:
        self.documents = np.arange(LENGTH) // 300
        masks.causal(64)

    def time_causal(self) -> None:
        masks.causal(LENGTH)

    def time_sliding_window(self) -> None:
        masks.sliding_window(LENGTH, left=255, right=0)

    def time_dilated_window(self) -> None:
        masks.dilated_window(LENGTH, left=64, right=64, dilation=2)

    def time_prefix_lm(self) -> None:
        masks.prefix_lm(LENGTH, 1000)

    def time_document(self) -> None:
        masks.document(self.documents)

    def time_longformer(self) -> None:
        masks.longformer(LENGTH, left=128, right=128, global_tokens=[0, 1])

    def time_big_bird(self) -> None:
        masks.big_bird(LENGTH, global_blocks=1, random_blocks=3, rng=0)

    def time_neighborhood(self) -> None:
        masks.neighborhood((64, 64), 7)


def padded(batch: Any, head: Any, q_index: Any, kv_index: Any, ends: Any) -> Any:
    return kv_index < ends[batch]


class Conversions(Suite):
    """From arrays, sparse matrices and functions, back to an array, and two masks together."""

    def setup(self) -> None:
        from scipy.sparse import csr_array

        self.window = masks.sliding_window(LENGTH, left=255, right=0)
        self.documents = masks.document(np.arange(LENGTH) // 300)
        self.dense = self.window.to_dense()[0, 0]
        self.sparse = csr_array(self.dense)
        self.ends = np.array([LENGTH // 2])
        self.time_from_mask_mod()

    def time_from_dense(self) -> None:
        BlockMask.from_dense(self.dense)

    def time_from_sparse(self) -> None:
        BlockMask.from_sparse(self.sparse)

    def time_from_mask_mod(self) -> None:
        BlockMask.from_mask_mod(padded, LENGTH, LENGTH, mod_args=(self.ends,))

    def time_to_dense(self) -> None:
        self.window.to_dense()

    def time_and(self) -> None:
        _ = self.window & self.documents
