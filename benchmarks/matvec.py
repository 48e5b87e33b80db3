"""asv: products of a few rows with a matrix. Seconds, and the share of the rate at which memory is read."""

from __future__ import annotations

import time
from contextlib import suppress

import numpy as np

with suppress(ImportError):  # commits before these names have no results
    from nbattn.cpu import runtime
    from nbattn.layers import Linear

    from . import roofline

SIZE = 2048
BYTES = 256 << 20
"""Of matrices in turn: more than a cache keeps from one call to the next."""


def layers(dtype: str) -> list[Linear]:
    rng = np.random.default_rng(0)
    first = Linear(rng.standard_normal((SIZE, SIZE), np.float32)).astype(dtype)
    copies = BYTES // first.weight.nbytes
    return [Linear(first.weight.copy(), scales=first.scales) for _ in range(copies)]


class Rows:
    params = (["float32", "bfloat16", "int8"], [1, 8])
    param_names = ("dtype", "rows")

    def setup(self, dtype: str, rows: int) -> None:
        self.layers = layers(dtype)
        self.x = np.random.default_rng(1).standard_normal((rows, SIZE), np.float32)
        self.sweep()

    def sweep(self) -> None:
        for layer in self.layers:
            layer(self.x)

    def time_sweep(self, dtype: str, rows: int) -> None:
        self.sweep()

    def track_share_of_read(self, dtype: str, rows: int) -> float:
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            self.sweep()
            seconds.append(time.perf_counter() - start)
        rate = len(self.layers) * self.layers[0].weight.nbytes / min(seconds)
        return rate / roofline.read_rate(runtime.threads(), megabytes=256, repeats=3)

    track_share_of_read.unit = "1"  # type: ignore[attr-defined]
