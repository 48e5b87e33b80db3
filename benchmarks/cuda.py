"""asv: attention, decode and softmax of tensors on a GPU, until it is done; without one rows are left out.

`gpu.py` compares the same kernels with PyTorch's; this is for their history.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from .suite import Suite

with suppress(ImportError):  # commits before these names have no results
    import nbattn
    from nbattn.cuda import launch

    from .attention import case_of

SIZES = 32, 32768, 64
"""Query heads, keys and head_dim of decode."""
DTYPES = ["bfloat16", "float16", "float32", "float64"]


def normal(dtype: str, *shape: int) -> Any:
    """A tensor on the current GPU."""
    import torch

    return torch.randn(shape, dtype=getattr(torch, dtype), device="cuda")


class _OnGpu(Suite):
    run: Callable[[], Any]

    def setup(self, *params: Any) -> None:
        import torch

        try:
            launch.require()
        except OSError as error:
            raise NotImplementedError(str(error)) from error
        if not torch.cuda.is_available():
            msg = "PyTorch finds no GPU"
            raise NotImplementedError(msg)
        self.synchronize = torch.cuda.synchronize
        self.prepare(*params)
        self.until_done()

    def prepare(self, *params: Any) -> None:
        raise NotImplementedError

    def until_done(self) -> None:
        self.run()
        self.synchronize()


class Prefill(_OnGpu):
    params = (DTYPES, ["16x1024x64", "16x4096x128 causal"])
    param_names = ("dtype", "shape")

    def prepare(self, dtype: str, shape: str) -> None:
        case = case_of(shape, dtype)
        x = normal(dtype, 3, 1, case.heads, case.length, case.head_dim)
        self.run = partial(nbattn.scaled_dot_product_attention, *x, is_causal=case.causal)

    def time_attention(self, dtype: str, shape: str) -> None:
        self.until_done()


class Decode(_OnGpu):
    """A token over a cache, outside of a graph."""

    params = (["bfloat16", "int8", "int4", "float32"], [0, 16], [1, 4, 8])
    param_names = ("dtype", "page_size", "group")

    def prepare(self, dtype: str, page_size: int, group: int) -> None:
        heads, keys, dim = SIZES
        given, kv_heads = "bfloat16" if dtype in ("int8", "int4") else dtype, heads // group
        new, query = normal(given, 1, kv_heads, keys, dim), normal(given, 1, heads, 1, dim)
        if page_size:
            pages = nbattn.PagedKVCache(
                -(-keys // page_size), page_size, kv_heads, dim, dtype, backend="cuda"
            )
            sequence = pages.add()
            pages.append(sequence, new, new)
            self.run = partial(pages.attend, sequence, query)
        else:
            cache = nbattn.KVCache(1, kv_heads, keys, dim, dtype, backend="cuda")
            cache.append(new, new)
            self.run = partial(cache.attend, query)

    def time_attend(self, dtype: str, page_size: int, group: int) -> None:
        self.until_done()


class Graph(_OnGpu):
    """A step of a decoder in a graph, always at the end of the same cache."""

    params = (["bfloat16", "int8"], [0, 16])
    param_names = ("dtype", "page_size")

    def prepare(self, dtype: str, page_size: int) -> None:
        import torch

        heads, keys, dim = SIZES
        sequences: tuple[int, ...] = ()
        if page_size:
            pages = -(-keys // page_size)
            self.cache: Any = nbattn.PagedKVCache(pages, page_size, heads // 4, dim, dtype, backend="cuda")
            sequences = (self.cache.add(),)
            self.cache.reserve(*sequences, keys)
        else:
            self.cache = nbattn.KVCache(1, heads // 4, keys, dim, dtype, backend="cuda")
        prompt, token = (normal("bfloat16", 1, heads // 4, n, dim) for n in (keys, 1))
        self.cache.append(*sequences, prompt, prompt)
        query = normal("bfloat16", 1, heads, 1, dim)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.cache.append(*sequences, token, token)
            self.cache.attend(*sequences, query)
        self.run = graph.replay
        self.advance = partial(self.cache.advance, *sequences, 0)

    def time_step(self, dtype: str, page_size: int) -> None:
        self.advance()
        self.until_done()


class Softmax(_OnGpu):
    params = (DTYPES, [-1, 0])
    param_names = ("dtype", "axis")

    def prepare(self, dtype: str, axis: int) -> None:
        self.run = partial(nbattn.softmax, normal(dtype, 4096, 4096), axis)

    def time_softmax(self, dtype: str, axis: int) -> None:
        self.until_done()


class SmallCall(_OnGpu):
    """Where the launch takes longer than the work."""

    params = ("attention", "softmax")
    param_names = ("function",)

    def prepare(self, function: str) -> None:
        x = normal("float32", 3, 1, 1, 16, 64)
        self.run = (
            partial(nbattn.softmax, x[0])
            if function == "softmax"
            else partial(nbattn.scaled_dot_product_attention, *x)
        )

    def time_call(self, function: str) -> None:
        self.until_done()
