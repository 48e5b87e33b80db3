"""The parts of `gpu.py` that time: beside PyTorch's back ends, and how long a call takes until it returns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.gpu_cases import FLOOR, judged
from benchmarks.peers import ratio


def operations(batch: int, heads: int, queries: int, keys: int, dims: int, causal: bool) -> float:
    """Floating-point operations of both products; with a causal mask half of them."""
    return 2.0 * batch * heads * queries * keys * dims * (0.5 if causal else 1)


def timing(seconds: float, seed: int) -> dict[str, Any]:
    """bfloat16 prompts beside PyTorch's back ends, and float32 beside its own."""
    rows = []
    end = time.perf_counter() + seconds
    for dtype, head_dim, length, causal in (
        *(("bfloat16", d, s, c) for s in (2048, 4096, 8192, 16384) for d in (64, 128) for c in (True, False)),
        ("float16", 128, 8192, True), ("float32", 64, 4096, True),
    ):  # fmt: skip
        name = f"{dtype} 16x{length} D {head_dim}{' causal' if causal else ''}"
        if time.perf_counter() > end:
            rows.append({"name": name, "passed": True, "skipped": "no time left"})
            continue
        rows.append(judged(name, partial(_timed, dtype, head_dim, length, causal)))
    return {"rows": rows}


def _timed(dtype: str, head_dim: int, length: int, causal: bool) -> dict[str, Any]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    import nbattn

    batch, heads = max(1, 16384 // length), 16
    x = torch.randn(3, batch, heads, length, head_dim, device="cuda", dtype=getattr(torch, dtype))
    calls: dict[str, Callable[[], Any]] = {
        "nbattn": lambda: nbattn.scaled_dot_product_attention(*x, is_causal=causal)
    }
    for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"):
        backend = getattr(SDPBackend, name)
        calls[name.split("_")[0].lower()] = partial(_sdpa, sdpa_kernel, backend, x, causal)
    if dtype != "float32":
        calls["mma.sync"] = _mma_sync(x, causal)
    exact = None
    troubles = {}
    for label in list(calls):
        try:
            got = calls[label]().float()
            exact = got if exact is None else exact
            apart = float((got - exact).norm() / exact.norm())
            if apart > 4 * FLOOR[dtype]:
                troubles[label] = f"differs by {apart:.2e}"
        except RuntimeError as failure:
            troubles[label] = str(failure).splitlines()[0][:200]
        if label in troubles and label != "nbattn":
            del calls[label]
    rounds = _rounds(calls)
    work = operations(batch, heads, length, length, 2 * head_dim, causal)
    own = statistics.median(r["nbattn"] for r in rounds)
    return {
        "passed": "nbattn" not in troubles,
        "seconds": {label: statistics.median(r[label] for r in rounds) for label in calls},
        "ratios": {label: ratio(rounds, label) for label in calls if label != "nbattn"},
        "tflops": work / own / 1e12,
        "troubles": troubles,
    }


def _mma_sync(x: Any, causal: bool) -> Callable[[], Any]:
    """The kernel of older GPUs, where another is chosen too: the same call."""
    import torch

    from nbattn import device
    from nbattn.cuda import attention, launch, mma
    from nbattn.resolve import Options, resolve_batch

    query, key, value = (device.describe(tensor, "tensor") for tensor in x)
    options = Options(None, None, causal, None, 0, None, None, None, None, None, None)
    out = torch.empty_like(x[0])
    to = device.describe(out, "out")
    prepared = mma.prepared(resolve_batch(query, key, value, options).problem, to, None, lambda _: 0)
    call = launch.Call(*prepared, launch.device(query.device), attention.POINTERS)
    addresses = query.address, key.address, value.address, to.address

    def run() -> Any:
        call(query.stream, *addresses)
        return out

    return run


def _sdpa(sdpa_kernel: Any, backend: Any, x: Any, causal: bool) -> Any:
    import torch

    with sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(*x, is_causal=causal)


def _rounds(
    calls: dict[str, Callable[[], Any]], least: int = 7, seconds: float = 2.0
) -> list[dict[str, float]]:
    """Seconds of each call by events, the calls taking turns, after a warm-up."""
    import torch

    for call in calls.values():
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    rounds: list[dict[str, float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < least or (time.perf_counter() < end and len(rounds) < 50):
        taken = {}
        for label, call in calls.items():
            begin, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            done.record()
            done.synchronize()
            taken[label] = begin.elapsed_time(done) / 1e3
        rounds.append(taken)
    return rounds


def overhead(seconds: float, seed: int) -> dict[str, Any]:
    """Microseconds of the processor for a later call that the GPU has done in less, beside PyTorch's."""
    import torch

    import nbattn

    x = torch.randn(3, 1, 1, 16, 64, device="cuda")
    calls = {
        "scaled_dot_product_attention": lambda: nbattn.scaled_dot_product_attention(*x, is_causal=True),
        "softmax": lambda: nbattn.softmax(x[0]),
        "torch": lambda: torch.nn.functional.scaled_dot_product_attention(*x, is_causal=True),
    }
    begin = time.perf_counter()
    calls["scaled_dot_product_attention"]()
    torch.cuda.synchronize()
    rows = [{"name": "first call", "passed": True, "seconds": time.perf_counter() - begin}]
    for name, call in calls.items():
        for _ in range(20):
            call()
        taken = []
        for _ in range(30):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(50):
                call()
            taken.append((time.perf_counter() - begin) / 50)
        rows.append({"name": name, "passed": True, "microseconds": 1e6 * statistics.median(taken)})
    return {"rows": rows}
