"""asv: decode over arrays, caches and pages. Seconds, memory, error and the share of the memory's rate."""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from .suite import Suite

with suppress(ImportError):  # commits before these names have no results
    import ml_dtypes

    import nbattn
    from nbattn.cpu import runtime

    from . import cases
    from .decode_cases import ARRAYS, CACHE, Append, Decode

DTYPES = ["float32", "float64", "float16", "bfloat16"]
QUANTISED = ["int8", "int4"]
LONG, SHORT = 4096, 128


class Keys(Suite):
    """Few queries over arrays."""

    params = (["cpu"], DTYPES, ["8/8", "64/8"])
    param_names = ("backend", "dtype", "heads")

    def setup(self, backend: str, dtype: str, heads: str) -> None:
        case = Decode(*map(int, heads.split("/")), LONG, dtype)
        self.run = case.ours(case.inputs(), backend=backend).run
        self.run()

    def time_decode(self, backend: str, dtype: str, heads: str) -> None:
        self.run()


class Errors(Suite):
    """How far few queries are from exact."""

    params = DTYPES
    param_names = ("dtype",)

    def setup(self, dtype: str) -> None:
        self.case = Decode(32, 8, LONG, dtype)
        self.inputs = self.case.inputs()
        self.result = self.case.ours(self.inputs).run()

    def track_error(self, dtype: str) -> float:
        """In units of the last place of the largest result."""
        _, relative = cases.largest_error(self.result, self.case.exact(self.inputs))
        return relative / float(ml_dtypes.finfo(dtype).eps)

    track_error.unit = "ulp"  # type: ignore[attr-defined]


class Reference(Keys):
    """The NumPy twin, which nobody waits for."""

    params = (["reference"], ["float32"], ["32/8"])


class Cached(Suite):
    params = (["float32", "bfloat16", *QUANTISED], [LONG, SHORT])
    param_names = ("dtype", "keys")

    def setup(self, dtype: str, keys: int) -> None:
        self.case = Decode(32, 8, keys, dtype, kept=CACHE)
        self.inputs = self.case.inputs()
        self.run = self.case.ours(self.inputs).run
        self.result = self.run()

    def time_attend(self, dtype: str, keys: int) -> None:
        self.run()

    def track_error(self, dtype: str, keys: int) -> float:
        """In units of the last place of the largest result, of a quantised cache in steps of its numbers."""
        _, relative = cases.largest_error(self.result, self.case.exact(self.inputs))
        steps = {"int8": 1 / 127, "int4": 1 / 8}
        return relative / (steps.get(dtype) or float(ml_dtypes.finfo(dtype).eps))

    track_error.unit = "ulp"  # type: ignore[attr-defined]


class Limits(Suite):
    """How near to the memory's rate, over 256 MB of keys and values."""

    params = ("float32", "bfloat16", *QUANTISED)
    param_names = ("dtype",)

    def setup(self, dtype: str) -> None:
        cases.check_limits()
        kept = CACHE if dtype in QUANTISED else ARRAYS
        self.case = Decode(32, 8, 32768 if dtype == "float32" else 65536, dtype, kept=kept)
        self.inputs = self.case.inputs()
        self.run = self.case.ours(self.inputs).run
        self.run()

    def track_share_of_read_rate(self, dtype: str) -> float:
        return cases.share_of_limit(self.case, self.inputs, self.run, runtime.threads())

    track_share_of_read_rate.unit = "1"  # type: ignore[attr-defined]


class Queries(Suite):
    """Where decode goes over into prefill."""

    params = (["float32", "bfloat16"], [1, 4, 16, 64])
    param_names = ("dtype", "queries")

    def setup(self, dtype: str, queries: int) -> None:
        case = Decode(32, 8, 1024, dtype, queries)
        self.run = case.ours(case.inputs()).run
        self.run()

    def time_decode(self, dtype: str, queries: int) -> None:
        self.run()


class Paged(Suite):
    """Pages of 16 in no order, beside the same numbers in a row."""

    params = (["float32", "bfloat16"], ["pages of 16", "arrays"])
    param_names = ("dtype", "kept")

    def setup(self, dtype: str, kept: str) -> None:
        case = Decode(32, 8, LONG, dtype, kept="" if kept == "arrays" else kept)
        self.run = case.ours(case.inputs()).run
        self.run()

    def time_decode(self, dtype: str, kept: str) -> None:
        self.run()


class Growth(Suite):
    """What a cache takes for new tokens."""

    params = (["float32", "bfloat16", *QUANTISED], [1, 512])
    param_names = ("dtype", "tokens")

    def setup(self, dtype: str, tokens: int) -> None:
        case = Append(8, dtype, tokens)
        self.run = case.ours(case.inputs()).run
        self.run()

    def time_append(self, dtype: str, tokens: int) -> None:
        self.run()


class Rewound(Suite):
    """A step that is taken back, as when a guess was wrong, and a cache for the next text."""

    def setup(self) -> None:
        prompt = np.random.default_rng(0).standard_normal((1, 8, 1000, 128), np.float32)
        self.token = prompt[:, :, :1].copy()
        self.cache = nbattn.KVCache(1, 8, LONG, 128)
        self.cache.append(prompt, prompt)
        self.time_append_truncate()

    def time_append_truncate(self) -> None:
        self.cache.append(self.token, self.token)
        self.cache.truncate(self.cache.lengths - 1)

    def time_append_reset(self) -> None:
        self.cache.append(self.token, self.token)
        self.cache.reset()


class Cascade(Suite):
    """A prefix that the batch shares, read once."""

    params = ("float32", "bfloat16")
    param_names = ("dtype",)

    def setup(self, dtype: str) -> None:
        rng, kind = np.random.default_rng(0), cases.numpy_dtype(dtype)
        self.query = rng.standard_normal((8, 32, 1, 64), np.float32).astype(kind)
        self.prefix = rng.standard_normal((2, 8, 2048, 64), np.float32).astype(kind)
        self.own = rng.standard_normal((2, 8, 8, 128, 64), np.float32).astype(kind)
        self.time_cascade(dtype)

    def time_cascade(self, dtype: str) -> None:
        nbattn.cascade_attention(self.query, *self.prefix, *self.own)


class Sequences(Suite):
    """A pool of pages: forks that share a prompt."""

    def setup(self) -> None:
        rng = np.random.default_rng(0)
        prompt = rng.standard_normal((1, 8, 500, 64), np.float32)
        self.token = rng.standard_normal((8, 8, 1, 64), np.float32)
        self.cache = nbattn.PagedKVCache(pages=100, page_size=16, kv_heads=8, head_dim=64)
        self.first = self.cache.add()
        self.cache.append(self.first, prompt, prompt)
        self.time_fork_append_attend_free()

    def time_fork_append_attend_free(self) -> None:
        forks = [self.cache.fork(self.first) for _ in range(8)]
        self.cache.append(forks, self.token, self.token)
        self.cache.attend(forks, self.token)
        for fork in forks:
            self.cache.free(fork)

    def time_append_truncate(self) -> None:
        token = self.token[:1]
        self.cache.append(self.first, token, token)
        self.cache.truncate(self.first, 500)

    def time_reserve_truncate(self) -> None:
        self.cache.reserve(self.first, 200)
        self.cache.truncate(self.first, 500)

    def time_add_reset(self) -> None:
        cache = nbattn.PagedKVCache(pages=100, page_size=16, kv_heads=8, head_dim=64)
        cache.append(cache.add(), self.token[:1], self.token[:1])
        cache.reset()


class Memory(Suite):
    """Of the process: a call's own is the difference to the baseline."""

    params = ("float32", *QUANTISED)
    param_names = ("dtype",)

    def setup(self, dtype: str) -> None:
        # A tiny cache first: what compiling takes is in the baseline too.
        tiny = Decode(1, 1, 1, dtype, head_dim=32, kept=CACHE)
        tiny.ours(tiny.inputs()).run()
        self.cache = nbattn.KVCache(1, 8, 32768, 128, dtype)
        self.query = np.zeros((1, 32, 1, 128), np.float32)
        new = np.zeros((1, 8, 4096, 128), np.float32)
        for _ in range(8):
            self.cache.append(new, new)

    def peakmem_baseline(self, dtype: str) -> None:
        pass

    def peakmem_attend(self, dtype: str) -> None:
        self.cache.attend(self.query)
