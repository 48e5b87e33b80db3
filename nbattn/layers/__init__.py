"""The layers that models are built from: plain classes, made from weights, called on arrays."""

from .attention import BahdanauAttention, LuongAttention, MultiHeadAttention
from .feed_forward import FeedForward, SwiGLU, gelu, gelu_tanh, relu, silu
from .linear import Embedding, Linear
from .norms import LayerNorm, RMSNorm
from .recurrent import GRU, GRUCell
from .rotary import Rotary

__all__ = [
    "GRU",
    "BahdanauAttention",
    "Embedding",
    "FeedForward",
    "GRUCell",
    "LayerNorm",
    "Linear",
    "LuongAttention",
    "MultiHeadAttention",
    "RMSNorm",
    "Rotary",
    "SwiGLU",
    "gelu",
    "gelu_tanh",
    "relu",
    "silu",
]
