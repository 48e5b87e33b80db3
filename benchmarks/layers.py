"""asv: layers. Seconds, and for products of a few rows the share of the rate at which memory is read."""

from __future__ import annotations

import time
from contextlib import suppress

import numpy as np

from .suite import Suite

with suppress(ImportError):  # commits before these names have no results
    from nbattn import layers
    from nbattn.cpu import runtime

    from . import cases

SIZE = 2048
BYTES = 256 << 20
"""Of matrices in turn: more than a cache keeps from one call to the next."""
D, HEADS, TOKENS, SHORT = 512, 8, 256, 32


class _Products(Suite):
    def setup(self, dtype: str, rows: int = 1) -> None:
        rng = np.random.default_rng(0)
        first = layers.Linear(rng.standard_normal((SIZE, SIZE), np.float32)).astype(dtype)
        self.layers = [
            layers.Linear(first.weight.copy(), scales=first.scales)
            for _ in range(BYTES // first.weight.nbytes)
        ]
        self.x = rng.standard_normal((rows, SIZE), np.float32)
        self.sweep()

    def sweep(self) -> None:
        for layer in self.layers:
            layer(self.x)


class Products(_Products):
    """A few rows with a matrix."""

    params = (["float32", "bfloat16", "int8"], [1, 8])
    param_names = ("dtype", "rows")

    def time_sweep(self, dtype: str, rows: int) -> None:
        self.sweep()


class Limits(_Products):
    """How near to the memory's rate."""

    params = ("float32", "bfloat16", "int8")
    param_names = ("dtype",)

    def setup(self, dtype: str) -> None:
        cases.check_limits()
        super().setup(dtype)

    def track_share_of_read_rate(self, dtype: str) -> float:
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            self.sweep()
            seconds.append(time.perf_counter() - start)
        from . import roofline

        rate = len(self.layers) * self.layers[0].weight.nbytes / min(seconds)
        return rate / roofline.read_rate(runtime.threads(), megabytes=256, repeats=3)

    track_share_of_read_rate.unit = "1"  # type: ignore[attr-defined]


class Converted(Suite):
    params = ("bfloat16", "int8")
    param_names = ("dtype",)

    def setup(self, dtype: str) -> None:
        self.layer = layers.Linear(np.random.default_rng(0).standard_normal((SIZE, SIZE), np.float32))
        self.time_astype(dtype)

    def time_astype(self, dtype: str) -> None:
        self.layer.astype(dtype)


class Activations(Suite):
    params = ("float32", "float64")
    param_names = ("dtype",)

    def setup(self, dtype: str) -> None:
        self.x = np.random.default_rng(0).standard_normal((TOKENS, 4 * D)).astype(dtype)
        for name in ("gelu", "gelu_tanh", "silu", "relu"):
            getattr(layers, name)(self.x)

    def time_gelu(self, dtype: str) -> None:
        layers.gelu(self.x)

    def time_gelu_tanh(self, dtype: str) -> None:
        layers.gelu_tanh(self.x)

    def time_silu(self, dtype: str) -> None:
        layers.silu(self.x)

    def time_relu(self, dtype: str) -> None:
        layers.relu(self.x)


def linear(d_out: int, d_in: int) -> layers.Linear:
    weight = np.random.default_rng(d_out).standard_normal((d_out, d_in), np.float32)
    return layers.Linear(weight / np.float32(d_in**0.5), np.zeros(d_out, np.float32))


class Blocks(Suite):
    """What stands between the attentions of a transformer, for a prompt and for one token."""

    params = (TOKENS, 1)
    param_names = ("tokens",)

    def setup(self, tokens: int) -> None:
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal((1, tokens, D), np.float32)
        self.ids = rng.integers(0, 8192, (1, tokens))
        self.heads = rng.standard_normal((1, HEADS, tokens, D // HEADS), np.float32)
        ones = np.ones(D, np.float32)
        self.layer_norm, self.rms_norm = layers.LayerNorm(ones, ones), layers.RMSNorm(ones, 1e-6)
        self.embedding = layers.Embedding(rng.standard_normal((8192, D), np.float32))
        self.rotary = layers.Rotary(D // HEADS)
        up, down = linear(4 * D, D), linear(D, 4 * D)
        self.feed_forward, self.swiglu = layers.FeedForward(up, down), layers.SwiGLU(up, up, down)
        for layer in (self.layer_norm, self.rms_norm, self.feed_forward, self.swiglu):
            layer(self.x)

    def time_embedding(self, tokens: int) -> None:
        self.embedding(self.ids)

    def time_layer_norm(self, tokens: int) -> None:
        self.layer_norm(self.x)

    def time_rms_norm(self, tokens: int) -> None:
        self.rms_norm(self.x)

    def time_rotary(self, tokens: int) -> None:
        self.rotary(self.heads)

    def time_feed_forward(self, tokens: int) -> None:
        self.feed_forward(self.x)

    def time_swiglu(self, tokens: int) -> None:
        self.swiglu(self.x)


class MultiHead(Suite):
    """Self-attention with its projections, and cross-attention to what was projected before."""

    def setup(self) -> None:
        rng = np.random.default_rng(0)
        shapes = {"in_proj_weight": (3 * D, D), "out_proj.weight": (D, D)}
        self.state = {
            name: rng.standard_normal(shape, np.float32) / np.float32(D**0.5)
            for name, shape in shapes.items()
        }
        self.layer = layers.MultiHeadAttention.from_torch(self.state, HEADS)
        self.x, self.context = rng.standard_normal((2, 1, TOKENS, D), np.float32)
        self.token, self.memory = self.x[:, :1].copy(), self.layer.project(self.context)
        self.time_self_attention()
        self.time_token_to_memory()

    def time_from_torch(self) -> None:
        layers.MultiHeadAttention.from_torch(self.state, HEADS)

    def time_project(self) -> None:
        self.layer.project(self.context)

    def time_self_attention(self) -> None:
        self.layer(self.x, is_causal=True)

    def time_token_to_memory(self) -> None:
        self.layer(self.token, memory=self.memory)


class Recurrent(Suite):
    """What goes step by step: a GRU along a sentence, and attention of Bahdanau's and Luong's kind to it."""

    def setup(self) -> None:
        rng = np.random.default_rng(0)
        d, self.x = 256, rng.standard_normal((8, SHORT, 256), np.float32)
        weights = rng.standard_normal((5, 3 * d, d), np.float32) / np.float32(d**0.5)
        self.onnx = {"w": weights[0], "r": weights[1], "linear_before_reset": True}
        self.cell = layers.GRUCell.from_onnx(**self.onnx)
        self.gru = layers.GRU(self.cell)
        self.token, self.state = self.x[:, :1].copy(), self.x[:, 1].copy()
        self.projected = self.cell.input(self.state)
        self.bahdanau = layers.BahdanauAttention(weights[2, :d], weights[3, :d], weights[4, 0])
        self.luong = layers.LuongAttention("general", weights[2, :d])
        self.memory = self.bahdanau.project(self.x)
        self.time_bahdanau()
        self.time_luong()

    def time_gru(self) -> None:
        self.gru(self.x)

    def time_gru_cell(self) -> None:
        self.cell(self.state, self.state)

    def time_gru_step(self) -> None:
        self.cell.step(self.projected, self.state)

    def time_gru_from_onnx(self) -> None:
        layers.GRUCell.from_onnx(**self.onnx)

    def time_bahdanau(self) -> None:
        self.bahdanau(self.token, memory=self.memory)

    def time_bahdanau_project(self) -> None:
        self.bahdanau.project(self.x)

    def time_luong(self) -> None:
        self.luong(self.token, self.x)
