"""Attention inference for Python without a framework: NumPy arrays in, NumPy arrays out, Numba inside."""

from . import masks
from .additive import additive_attention
from .attention import AttentionOutput, merge_states, scaled_dot_product_attention, varlen_attention
from .block_mask import BlockMask
from .cache import KVCache
from .cascade import cascade_attention
from .decode import paged_attention
from .hard import HardAttentionOutput, hard_attention
from .linear import linear_attention
from .luong import luong_attention
from .paged import PagedKVCache
from .softmax import log_softmax, logsumexp, softmax

__all__ = [
    "AttentionOutput",
    "BlockMask",
    "HardAttentionOutput",
    "KVCache",
    "PagedKVCache",
    "additive_attention",
    "cascade_attention",
    "hard_attention",
    "linear_attention",
    "log_softmax",
    "logsumexp",
    "luong_attention",
    "masks",
    "merge_states",
    "paged_attention",
    "scaled_dot_product_attention",
    "softmax",
    "varlen_attention",
]

__version__ = "0.1.0"
