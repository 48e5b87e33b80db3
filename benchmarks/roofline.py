"""The two limits of this machine, measured by kernels of this library's own making.

Prefill is bounded by the rate of fused multiply-adds (float32, float64, bfloat16 pairs where the processor
has `vdpbf16ps`, and tiles of them where it has AMX), decode by the rate at which memory is read. Run alone it
prints them:

    python benchmarks/roofline.py --threads 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

if not __package__:  # run as a file: Python has looked beside it, not above it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from nbattn.cpu import amx, emitters, runtime

SUMS = 24
"""Independent sums: more than latency times throughput of any FMA unit, and they fit 32 registers."""


def _fma_loop(kind: str) -> Callable[[int], None]:
    """A compiled loop of `SUMS` register-only vector multiply-adds per step."""
    sums = SUMS if emitters.REGISTERS == 32 else 12
    scalar = ir.DoubleType() if kind == "float64" else ir.FloatType()
    t = ir.VectorType(scalar, emitters.REGISTER_BYTES // (8 if kind == "float64" else 4))

    @intrinsic
    def loop(typingctx: Any, steps: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            x = emitters.splat_value(b, t, b.uitofp(args[0], scalar))
            before, head, after = b.block, b.append_basic_block("head"), b.append_basic_block("after")
            b.branch(head)
            b.position_at_end(head)
            k = b.phi(emitters.I64)
            running = [b.phi(t) for _ in range(sums)]
            if kind == "bfloat16":
                pairs = b.bitcast(x, ir.VectorType(emitters.I32, t.count))
                grown = [emitters.dot_pairs_value(b, y, pairs, pairs) for y in running]
            else:
                grown = [emitters.fma_value(b, y, x, x) for y in running]
            following = b.add(k, ir.Constant(emitters.I64, 1))
            for phi, first, later in zip([k, *running], [0, *range(sums)], [following, *grown], strict=True):
                phi.add_incoming(emitters.const(phi.type, first), before)
                phi.add_incoming(later, head)
            b.cbranch(b.icmp_signed("<", following, args[0]), head, after)
            b.position_at_end(after)
            total = grown[0]
            for y in grown[1:]:
                total = b.fadd(total, y)
            return b.extract_element(total, ir.Constant(emitters.I32, 0))

        return (types.float64 if kind == "float64" else types.float32)(types.int64), codegen

    return numba.njit(nogil=True)(lambda steps: loop(steps))


def _tile_loop() -> Callable[[int], None]:
    """A compiled loop of four products of tile registers per step."""

    @intrinsic
    def products(typingctx: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            for i in range(4):
                amx.emit(b, "tdpbf16ps", emitters.I8(i), emitters.I8(4 + i % 2), emitters.I8(6 + i // 2))
            return context.get_dummy_value()

        return types.void(), codegen

    @numba.njit(nogil=True)
    def loop(steps: Any) -> None:
        amx.configure()
        for _ in range(steps):
            products()
        amx.release()

    return loop


@numba.njit(nogil=True, fastmath=True)
def _sum(x: Any) -> Any:
    total = np.float32(0)
    for i in range(x.size):
        total += x[i]
    return total


def _best(work: Callable[[int], Any], threads: int, repeats: int) -> float:
    """Seconds of the fastest of some runs of `work(thread)` on all threads at once."""
    with ThreadPoolExecutor(threads) as pool:
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            list(pool.map(work, range(threads)))
            seconds.append(time.perf_counter() - start)
    return min(seconds)


@cache
def _compiled(kind: str) -> Callable[[int], None]:
    loop = _tile_loop() if kind == "tiles" else _fma_loop(kind)
    loop(10)
    return loop


def fma_peak(kind: str, threads: int, repeats: int = 7) -> float | None:
    """Operations per second (a multiply-add counts two) for float32, float64, bfloat16 (in vectors) or its
    tiles; None if the processor lacks it.
    """
    lacking = {"bfloat16": "avx512bf16" not in runtime.cpu_features(), "tiles": not emitters.AMX}
    if lacking.get(kind):
        return None
    loop, steps = _compiled(kind), 1_000_000
    if kind == "tiles":
        steps //= 4  # of 64 cycles
        return threads * steps * 4 * 16 * 16 * 64 / _best(lambda _: loop(steps), threads, repeats)
    lanes = emitters.REGISTER_BYTES // (8 if kind == "float64" else 4)
    sums = SUMS if emitters.REGISTERS == 32 else 12
    operations = threads * steps * sums * lanes * (4 if kind == "bfloat16" else 2)
    return operations / _best(lambda _: loop(steps), threads, repeats)


@cache
def _numbers(megabytes: int) -> Any:
    return np.ones(megabytes << 18, np.float32)


def product_peak(precision: str, threads: int, repeats: int = 7) -> float:
    """Operations per second of the fastest way to multiply numbers of this dtype."""
    kinds = {"float64": ("float64",), "bfloat16": ("tiles", "bfloat16", "float32")}.get(
        precision, ("float32",)
    )
    return max(filter(None, (fma_peak(kind, threads, repeats) for kind in kinds)))


def read_rate(threads: int, megabytes: int = 512, repeats: int = 7) -> float:
    """Bytes per second of a parallel sum over an array far larger than the last cache."""
    x = _numbers(megabytes)
    parts = np.array_split(x, threads)
    _sum(parts[0][:16])
    return x.nbytes / _best(lambda i: _sum(parts[i]), threads, repeats)


def measure(threads: int) -> dict[str, float | None]:
    """All limits: operations per second by dtype, bytes per second read."""
    limits: dict[str, float | None] = {
        kind: fma_peak(kind, threads) for kind in ("float32", "float64", "bfloat16", "tiles")
    }
    return limits | {"read": read_rate(threads)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=runtime.threads())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    runs = [measure(options.threads) for _ in range(3)]
    limits = {k: statistics.median(r[k] for r in runs) if runs[0][k] else None for k in runs[0]}
    if options.json:
        print(json.dumps(limits))
        return
    print(f"{runtime.cpu_name()}, {emitters.DESCRIPTION}, {options.threads} threads")
    for name, rate in limits.items():
        unit = "GB/s read" if name == "read" else "GFLOP/s"
        print(
            f"{name:>9}  "
            + (f"{rate / 1e9:8.1f} {unit}" if rate else "the processor has no such instruction")
        )


if __name__ == "__main__":
    main()
