"""The parts of `gpu.py` that prove: against float64, with each library's arrays, under compute-sanitizer.

Each takes the seconds that it has and a seed, and runs in a process of its own. The libraries are imported
where they are used, as one that is missing is a row that fails.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu_cases import FLOOR, OPTIONS, Case, cases, judged, relative_error
from benchmarks.gpu_decode import small_caches

COMMAND = Path(__file__).with_name("gpu.py")


def correctness(seconds: float, seed: int) -> dict[str, Any]:
    """Output and log-sum-exp of every case, written over NaN, against float64."""
    rows = []
    end = time.perf_counter() + seconds
    for case in cases(seed):
        if time.perf_counter() > end:
            break
        rows.append(judged(case.name, partial(_compare, case, seed)))
    rows += [judged(f"softmax {dtype}", partial(_softmax, dtype, seed)) for dtype in FLOOR]
    return {"rows": rows, "left_out": len(cases(seed)) + len(FLOOR) - len(rows)}


def _drawn(case: Case, seed: int) -> tuple[Any, Any, dict[str, Any]]:
    """Query, key and value as tensors, the same numbers in float64 on the host, and the options."""
    import numpy as np
    import torch

    rng = np.random.default_rng((seed, zlib.crc32(case.name.encode())))
    shapes = (
        (case.batch, case.heads, case.queries, case.head_dim),
        (case.batch, case.kv_heads, case.keys, case.head_dim),
        (case.batch, case.kv_heads, case.keys, case.value_dim),
    )
    tensors = [torch.from_numpy(rng.standard_normal(s)).to(getattr(torch, case.dtype)).cuda() for s in shapes]
    options: dict[str, Any] = {}
    for name in case.options:
        options |= OPTIONS[name](rng, case)
    if case.poisoned:
        for b, length in enumerate(options["key_lengths"]):
            tensors[1][b, :, length:], tensors[2][b, :, length:] = math.nan, math.nan
        tensors[2][0, :, case.keys // 2, 3] = math.nan
    return tensors, [x.double().cpu().numpy() for x in tensors], options


def _compare(case: Case, seed: int) -> dict[str, Any]:
    import torch

    import nbattn

    tensors, wide, options = _drawn(case, seed)
    exact = nbattn.scaled_dot_product_attention(*wide, backend="reference", return_lse=True, **options)
    there = dict(options)
    for name in ("mask", "bias"):
        if name in there:
            there[name] = torch.from_numpy(there[name]).cuda()
    out = torch.full(exact.output.shape, math.nan, dtype=tensors[0].dtype, device="cuda")
    got = nbattn.scaled_dot_product_attention(*tensors, out=out, return_lse=True, **there)
    again = nbattn.scaled_dot_product_attention(*tensors, **there)
    torch.cuda.synchronize()
    error = relative_error(out.double().cpu(), exact.output)
    lse_error = relative_error(got.lse.double().cpu(), exact.lse)
    narrow = [x.to(torch.float64).to(tensors[0].dtype).float().cpu().numpy() for x in tensors]
    if case.dtype == "float64":
        narrow = wide
    plain = nbattn.scaled_dot_product_attention(*narrow, backend="reference", **options)
    rounded = torch.from_numpy(plain).to(tensors[0].dtype).double().numpy()
    allowed = max(FLOOR[case.dtype], 2 * relative_error(rounded, exact.output))
    same = bool(torch.equal(out, again))
    return {
        "error": error,
        "lse_error": lse_error,
        "allowed": allowed,
        "same_bits_again": same,
        "passed": error <= allowed and lse_error <= max(1e-5, FLOOR["float32"]) and same,
    }


def _softmax(dtype: str, seed: int) -> dict[str, Any]:
    import torch

    import nbattn

    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for shape, axis in (((37, 1000), -1), ((1000, 37), 0), ((5, 70, 33), 1), ((3, 100_003), -1)):
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(getattr(torch, dtype)).cuda()
        out = torch.full_like(x, math.nan)
        nbattn.softmax(x, axis, out=out)
        exact = torch.softmax(x.double(), axis).cpu()
        worst = max(worst, relative_error(out.double().cpu(), exact))
    return {"error": worst, "allowed": FLOOR[dtype], "passed": worst <= FLOOR[dtype]}


def libraries(seconds: float, seed: int) -> dict[str, Any]:
    """Arrays of each library in and out, on another stream and, where there is one, another GPU."""
    return {"rows": [judged(name, check) for name, check in LIBRARIES.items()]}


def _with_numpy(to: Callable[[Any], Any], back: Callable[[Any], Any]) -> dict[str, Any]:
    import numpy as np

    import nbattn

    q, k, v = np.random.default_rng().standard_normal((3, 1, 2, 70, 64), np.float32)
    exact = nbattn.scaled_dot_product_attention(
        *(x.astype(float) for x in (q, k, v)), is_causal=True, backend="reference"
    )
    there = [to(x) for x in (q, k, v)]
    errors = []
    for _ in range(4):  # later calls take a shorter way
        got = nbattn.scaled_dot_product_attention(*there, is_causal=True)
        if not isinstance(got, type(there[0])):
            return {"passed": False, "failure": f"the result is a {type(got).__name__}"}
        errors.append(relative_error(back(got), exact))
    return {"error": max(errors), "passed": max(errors) <= FLOOR["float32"]}


def _numpy() -> dict[str, Any]:
    import numpy as np

    import nbattn

    q, k, v = np.random.default_rng().standard_normal((3, 1, 2, 70, 64), np.float32)
    got = nbattn.scaled_dot_product_attention(q, k, v, backend="cuda")
    wide = (x.astype(float) for x in (q, k, v))
    error = relative_error(got, nbattn.scaled_dot_product_attention(*wide, backend="reference"))
    return {"error": error, "passed": error <= FLOOR["float32"]}


def _torch() -> dict[str, Any]:
    import torch

    with torch.cuda.stream(torch.cuda.Stream()):
        return _with_numpy(lambda x: torch.from_numpy(x).cuda(), lambda x: x.cpu().numpy())


def _torch_graph() -> dict[str, Any]:
    """A captured call, replayed on other numbers."""
    import torch

    import nbattn

    x = torch.randn(3, 1, 2, 70, 64, device="cuda")
    for _ in range(3):
        nbattn.scaled_dot_product_attention(*x, is_causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = nbattn.scaled_dot_product_attention(*x, is_causal=True)
    x.copy_(torch.randn_like(x))
    graph.replay()
    exact = nbattn.scaled_dot_product_attention(
        *x.double().cpu().numpy(), is_causal=True, backend="reference"
    )
    error = relative_error(got.cpu(), exact)
    return {"error": error, "passed": error <= FLOOR["float32"]}


def _second_gpu() -> dict[str, Any]:
    import torch

    if torch.cuda.device_count() < 2:
        return {"passed": True, "skipped": "there is one GPU"}
    return _with_numpy(lambda x: torch.from_numpy(x).to("cuda:1"), lambda x: x.cpu().numpy())


def _cupy() -> dict[str, Any]:
    import cupy

    with cupy.cuda.Stream(non_blocking=True):
        return _with_numpy(cupy.asarray, cupy.asnumpy)


def _numba() -> dict[str, Any]:
    from numba import cuda

    return _with_numpy(cuda.to_device, lambda x: x.copy_to_host())


def _jax() -> dict[str, Any]:
    import jax
    import numpy as np

    return _with_numpy(lambda x: jax.device_put(x, jax.devices("gpu")[0]), np.asarray)


LIBRARIES: dict[str, Callable[[], dict[str, Any]]] = {
    "numpy": _numpy, "torch": _torch, "torch, captured": _torch_graph, "torch, second GPU": _second_gpu,
    "cupy": _cupy, "numba": _numba, "jax": _jax,
}  # fmt: skip


def sanitizer(seconds: float, seed: int) -> dict[str, Any]:
    """compute-sanitizer over small calls of every kernel."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return {"rows": [], "skipped": "compute-sanitizer is not on the PATH"}
    rows = []
    for check in ("memcheck", "racecheck"):
        command = [
            tool,
            "--tool",
            check,
            sys.executable,
            str(COMMAND),
            "--inside",
            "small",
            "--seed",
            str(seed),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds / 2, check=False)
            text = done.stdout + done.stderr
            summary = [line for line in text.splitlines() if "SUMMARY" in line]
            clean = done.returncode == 0 and bool(summary) and all(" 0 " in line for line in summary)
            rows.append({"name": check, "passed": clean, "said": text[-2000:] if not clean else summary})
        except subprocess.TimeoutExpired:
            rows.append({"name": check, "passed": False, "failure": f"took more than {seconds / 2:.0f} s"})
    return {"rows": rows}


def small(seconds: float, seed: int) -> dict[str, Any]:
    """What the sanitizer watches."""
    rows = []
    for dtype in FLOOR:
        for options in ((), ("causal", "lengths"), ("mask", "bias", "sinks")):
            case = Case(f"{dtype} {options}", dtype, 2, 1, 70, 90, 40, 40, 1, options)
            rows.append(judged(case.name, partial(_compare, case, seed)))
        if dtype in ("float16", "bfloat16"):  # where blocks have several steps, and do them again
            case = Case(f"{dtype} prompt", dtype, 2, 1, 150, 300, 128, 128, 1, ("end", "lengths"), True)
            rows.append(judged(case.name, partial(_compare, case, seed)))
        rows.append(judged(f"softmax {dtype}", partial(_softmax, dtype, seed)))
    return {"rows": rows + small_caches(seed)}
