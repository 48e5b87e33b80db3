"""asv: prefill attention. Seconds, memory, error and the share of the processor's rate."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np

from .suite import Suite

with suppress(ImportError):  # commits before these names have no results
    import ml_dtypes

    import nbattn
    from nbattn.cpu import runtime

    from . import cases

DTYPES = ["float32", "float64", "float16", "bfloat16"]
SHAPES = ["8x256x64", "8x1024x64", "8x1024x128 causal"]


def case_of(shape: str, dtype: str = "float32", **options: Any) -> cases.Attention:
    """The row for a shape as the parameters write it."""
    sizes, _, causal = shape.partition(" ")
    heads, length, head_dim = map(int, sizes.split("x"))
    return cases.Attention(heads, length, head_dim, dtype, bool(causal), **options)


class Prefill(Suite):
    params = (["cpu"], DTYPES, SHAPES)
    param_names = ("backend", "dtype", "shape")

    def setup(self, backend: str, dtype: str, shape: str) -> None:
        case = case_of(shape, dtype)
        self.run = case.ours(case.inputs(), backend=backend).run
        self.run()

    def time_attention(self, backend: str, dtype: str, shape: str) -> None:
        self.run()


class Reference(Prefill):
    """The NumPy twin, which nobody waits for."""

    params = (["reference"], ["float32", "float64"], SHAPES[:1])


class _Dtypes(Suite):
    params = ("float32", "float64", "float16", "bfloat16", "bfloat16 products")
    param_names = ("dtype",)

    def setup(self, dtype: str) -> None:
        products = "bfloat16" if dtype == "bfloat16 products" else None
        self.case = case_of("8x1024x64", "float32" if products else dtype, products=products)
        self.inputs = self.case.inputs()
        self.run = self.case.ours(self.inputs).run
        self.result = self.run()


class Errors(_Dtypes):
    """How near to the exact result."""

    def track_error(self, dtype: str) -> float:
        """In units of the last place of the largest result."""
        _, relative = cases.largest_error(self.result, self.case.exact(self.inputs))
        return relative / float(ml_dtypes.finfo(self.case.precision).eps)

    track_error.unit = "ulp"  # type: ignore[attr-defined]


class Limits(_Dtypes):
    """How near to the processor's rate of multiply-adds."""

    def setup(self, dtype: str) -> None:
        cases.check_limits()
        super().setup(dtype)

    def track_share_of_peak(self, dtype: str) -> float:
        return cases.share_of_limit(self.case, self.inputs, self.run, runtime.threads())

    track_share_of_peak.unit = "1"  # type: ignore[attr-defined]


class Features(Suite):
    """What masks, biases and the rest add to the plain call."""

    params = ("", "mask", "bias", "window", "softcap", "alibi", "sinks")
    param_names = ("feature",)

    def setup(self, feature: str) -> None:
        slopes = np.linspace(0.1, 1, 8, dtype=np.float32)
        extra = {"alibi": {"alibi_slopes": slopes}, "sinks": {"sinks": slopes}}
        case = case_of("8x512x64", feature="" if feature in extra else feature)
        self.run = case.ours(case.inputs(), **extra.get(feature, {})).run
        self.run()

    def time_attention(self, feature: str) -> None:
        self.run()


class Returned(Suite):
    """What is asked for beside the output."""

    def setup(self) -> None:
        self.inputs = case_of("8x512x64").inputs()[:3]
        self.time_lse()

    def time_lse(self) -> None:
        nbattn.scaled_dot_product_attention(*self.inputs, return_lse=True)

    def time_weights(self) -> None:
        nbattn.scaled_dot_product_attention(*self.inputs, return_weights=True)


class SmallCall(Suite):
    """Where the door takes longer than the work."""

    params = ("4x1x32", "4x32x32", "16x128x64")
    param_names = ("shape",)

    def setup(self, shape: str) -> None:
        case = case_of(shape)
        self.run = case.ours(case.inputs()).run
        self.run()

    def time_attention(self, shape: str) -> None:
        self.run()


class Varlen(Suite):
    def setup(self) -> None:
        case = case_of("8x1000x64")
        self.packed = [x[0].transpose(1, 0, 2) for x in case.inputs()[:3]]
        self.starts = [0, 10, 200, 600, 601, 1000]
        self.time_five_sequences()

    def time_five_sequences(self) -> None:
        nbattn.varlen_attention(*self.packed, self.starts, self.starts, is_causal=True)


class Merge(Suite):
    """Of what four processes found over keys of their own."""

    def setup(self) -> None:
        rng = np.random.default_rng(0)
        self.outputs = rng.standard_normal((4, 1, 8, 1024, 64), np.float32)
        self.lses = rng.standard_normal((4, 1, 8, 1024), np.float32)
        self.time_merge_states()

    def time_merge_states(self) -> None:
        nbattn.merge_states(self.outputs, self.lses)


class Memory(Suite):
    """Of the process: a call's own is the difference to the baseline."""

    params = ("float32", "bfloat16")
    param_names = ("dtype",)

    def setup(self, dtype: str) -> None:
        # A tiny call first: what compiling takes is in the baseline too.
        self.case = case_of("8x1024x64", dtype)
        self.inputs = self.case.inputs()
        tiny = case_of("1x1x64", dtype)
        tiny.ours(tiny.inputs()).run()

    def peakmem_baseline(self, dtype: str) -> None:
        pass

    def peakmem_attention(self, dtype: str) -> None:
        self.case.ours(self.inputs).run()
