"""Attention inference for Python without a framework: NumPy arrays in, NumPy arrays out, Numba inside.

Which one for which job, each with its source; `help` of a name has shapes, options and examples.

Every key by its weight, softmax(q . k) (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762):

- `scaled_dot_product_attention`: batches of heads, with masks, windows, biases, grouped queries. Start here.
- `varlen_attention`: sequences of different lengths, packed without padding as in flash-attention
  (Dao et al. 2022, https://arxiv.org/abs/2205.14135).
- `KVCache`: generation token by token; a ring for windows, rotary positions, 8 and 4 bits.
- `PagedKVCache`, `paged_attention`: many sequences in pages of one pool
  (Kwon et al. 2023, https://arxiv.org/abs/2309.06180).
- `cascade_attention`: a prefix that a batch shares, read once
  (Juravsky et al. 2024, https://arxiv.org/abs/2402.05099).
- `merge_states`: exact attention from parts over disjoint keys, as of several machines.

Some of the keys:

- `BlockMask` and the builders in `masks`, a mask that skips what nobody sees: windows, documents, prefixes,
  Longformer (Beltagy et al. 2020, https://arxiv.org/abs/2004.05150), BigBird (Zaheer et al. 2020,
  https://arxiv.org/abs/2007.14062), neighbourhoods (Hassani et al. 2023, https://arxiv.org/abs/2204.07143).
- `hard_attention`: one key, the best or one drawn by its weight, and which one
  (Xu et al. 2015, https://arxiv.org/abs/1502.03044).

Scores of your own:

- `scaled_dot_product_attention` takes a `score_mod` and a `mask_mod`, Python functions of score and positions
  that become part of the kernel (Dong et al. 2024, https://arxiv.org/abs/2412.05496).
- `scores` holds usual ones: ALiBi, relative positions, T5's buckets, a softcap.

Other scores, of recurrent encoders and decoders:

- `additive_attention`: v . tanh(W q + U k + b) (Bahdanau et al. 2015, https://arxiv.org/abs/1409.0473).
- `luong_attention`: q . k without scale, q . W k, v . tanh(W [q; k]) or W q; over all keys, or a window
  around the query's or a predicted position (Luong et al. 2015, https://arxiv.org/abs/1508.04025).

No softmax, for sequences too long for all pairs:

- `linear_attention`: a state of fixed size for each head, with decay and delta rules
  (Katharopoulos et al. 2020, https://arxiv.org/abs/2006.16236).

`softmax`, `log_softmax` and `logsumexp` are scipy's, with a mask and over any axis. `nbattn.layers` holds
layers, `nbattn.models` whole models.
"""

from . import masks, scores
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
    "scores",
    "softmax",
    "varlen_attention",
]

__version__ = "0.1.0"
