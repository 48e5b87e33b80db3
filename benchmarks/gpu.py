"""The CUDA kernels on a GPU, proved and timed by one command: `python benchmarks/gpu.py`.

It needs this repository and Python with numba-cuda and PyTorch; CuPy, JAX and compute-sanitizer where they
are. Every part runs in a process of its own, as a kernel that fails takes its process's GPU with it; the
others go on. Inputs are drawn anew in every run, and every result is written over NaN.

- correctness: every option and dtype against float64, beside the plain formula's error in the same dtype
- libraries: arrays of each library in and out, on streams other than the default
- sanitizer: memcheck and racecheck of small calls
- timing: beside each of PyTorch's SDPA back ends, the calls interleaved, by events
- overhead: how long a later call takes until it returns, and the first one
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: Python has looked beside it, not above it
    sys.path[0] = str(ROOT)

PARTS = {"correctness": 150, "libraries": 60, "sanitizer": 120, "timing": 150, "overhead": 60}
"""Every part and the seconds that it may take."""
TOTAL = 480
"""Seconds of a whole run; parts that have no time left are said to have been skipped."""
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
FLOOR = {"float64": 1e-14, "float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
"""Relative errors that pass in any case."""


class Case(NamedTuple):
    """A call of attention: sizes, and options by what makes them."""

    name: str
    dtype: str
    heads: int = 4
    kv_heads: int = 2
    queries: int = 200
    keys: int = 230
    head_dim: int = 64
    value_dim: int = 64
    batch: int = 2
    options: tuple[str, ...] = ()


def cases(seed: int) -> list[Case]:
    """Every option for every dtype, alone and together, and ragged sizes that differ from run to run."""
    draw = random.Random(seed)
    found = []
    for dtype in FLOOR:
        for option in ("", *OPTIONS):
            found.append(Case(f"{dtype} {option or 'plain'}", dtype, options=(option,) if option else ()))
        for head_dim in (1, 17, 80, 128, 160, 256, 300):
            found.append(Case(f"{dtype} head_dim {head_dim}", dtype, head_dim=head_dim, value_dim=head_dim))
        for _ in range(6):
            sizes = [draw.choice((1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 257)) for _ in range(2)]
            dims = [draw.choice((8, 33, 64, 96, 128)) for _ in range(2)]
            options = tuple(draw.sample(sorted(OPTIONS), draw.randint(1, 4)))
            name = f"{dtype} {sizes[0]}x{sizes[1]} {dims[0]}/{dims[1]} {' '.join(options)}"
            heads = draw.choice((1, 2, 4))
            found.append(Case(name, dtype, 4, heads, *sizes, *dims, options=options))
    return found


def _mask(rng: Any, c: Case) -> dict[str, Any]:
    return {"mask": rng.random((c.batch, 1, c.queries, c.keys)) < 0.6}


def _bias(rng: Any, c: Case) -> dict[str, Any]:
    return {"bias": rng.standard_normal((c.heads, c.queries, c.keys)).astype("float32")}


def _lengths(rng: Any, c: Case) -> dict[str, Any]:
    return {"key_lengths": rng.integers(0, c.keys + 1, c.batch)}


OPTIONS: dict[str, Callable[[Any, Case], dict[str, Any]]] = {
    "causal": lambda rng, c: {"is_causal": True},
    "end": lambda rng, c: {"is_causal": True, "query_offset": "end"},
    "window": lambda rng, c: {"window_size": (40, 3)},
    "lengths": _lengths,
    "softcap": lambda rng, c: {"softcap": 5.0},
    "alibi": lambda rng, c: {"alibi_slopes": rng.random(c.heads)},
    "sinks": lambda rng, c: {"sinks": rng.standard_normal(c.heads)},
    "mask": _mask,
    "bias": _bias,
}


# --- statistics ---------------------------------------------------------------------------------------------


class Ratio(NamedTuple):
    """Another's time over nbattn's, so above 1 where nbattn is faster, and half the interquartile range."""

    median: float
    spread: float


def ratio(rounds: Sequence[dict[str, float]], label: str) -> Ratio:
    values = [seconds[label] / seconds["nbattn"] for seconds in rounds]
    if len(values) == 1:
        return Ratio(values[0], math.nan)
    low, middle, high = statistics.quantiles(values, method="inclusive")
    return Ratio(middle, (high - low) / 2)


def operations(batch: int, heads: int, queries: int, keys: int, dims: int, causal: bool) -> float:
    """Floating-point operations of both products; with a causal mask half of them."""
    return 2.0 * batch * heads * queries * keys * dims * (0.5 if causal else 1)


def relative_error(got: Any, exact: Any) -> float:
    """The norm of the difference over that of the truth; NaN or inf where that has none never passes."""
    import numpy as np

    got, exact = np.asarray(got, np.float64), np.asarray(exact, np.float64)
    if not np.array_equal(np.isfinite(got), np.isfinite(exact)):
        return math.inf
    finite = np.isfinite(exact)
    scale = np.linalg.norm(exact[finite])
    return float(np.linalg.norm(got[finite] - exact[finite]) / (scale if scale else 1.0))


# --- the parts, each in a process of its own ----------------------------------------------------------------


def correctness(seconds: float, seed: int) -> dict[str, Any]:
    """Output and log-sum-exp of every case, written over NaN, against float64."""
    rows = []
    end = time.perf_counter() + seconds
    for case in cases(seed):
        if time.perf_counter() > end:
            break
        rows.append(_judged(case.name, partial(_compare, case, seed)))
    rows += [_judged(f"softmax {dtype}", partial(_softmax, dtype, seed)) for dtype in FLOOR]
    return {"rows": rows, "left_out": len(cases(seed)) + len(FLOOR) - len(rows)}


def _judged(name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return {"name": name, **run()}
    except Exception as failure:
        return {"name": name, "passed": False, "failure": f"{type(failure).__name__}: {failure}"[:300]}


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
    return {"rows": [_judged(name, check) for name, check in LIBRARIES.items()]}


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
        command = [tool, "--tool", check, sys.executable, __file__, "--inside", "small", "--seed", str(seed)]
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
            rows.append(_judged(case.name, partial(_compare, case, seed)))
        rows.append(_judged(f"softmax {dtype}", partial(_softmax, dtype, seed)))
    return {"rows": rows}


def timing(seconds: float, seed: int) -> dict[str, Any]:
    """bfloat16 prompts beside PyTorch's back ends, and float32 beside its own."""
    rows = []
    end = time.perf_counter() + seconds
    for dtype, head_dim, length, causal in (
        *(("bfloat16", d, s, c) for s in (4096, 8192, 16384) for d in (64, 128) for c in (True, False)),
        ("float16", 128, 8192, True), ("float32", 64, 4096, True),
    ):  # fmt: skip
        name = f"{dtype} 16x{length} D {head_dim}{' causal' if causal else ''}"
        if time.perf_counter() > end:
            rows.append({"name": name, "passed": True, "skipped": "no time left"})
            continue
        rows.append(_judged(name, partial(_timed, dtype, head_dim, length, causal)))
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


# --- the command --------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """The GPU, the driver, versions and the commit."""
    from nbattn.cuda import launch

    place = launch.device(0)
    version = launch._number("cuDriverGetVersion")
    found = {
        "device": place.name, "capability": list(place.capability), "driver": _driver(),
        "cuda": f"{version // 1000}.{version % 1000 // 10}", "python": platform.python_version(),
    }  # fmt: skip
    for package in ("nbattn", "numba", "numba-cuda", "numpy", "torch", "cupy-cuda13x", "cupy-cuda12x", "jax"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"commit": commit()}


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def commit() -> str:
    """The commit that is checked out, with a + where files differ from it."""
    try:
        command = [
            "git",
            "-C",
            str(ROOT),
            "describe",
            "--always",
            "--dirty=+",
            "--exclude",
            "*",
            "--abbrev=12",
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def run_part(name: str, seconds: float, seed: int) -> dict[str, Any]:
    """One part in a process of its own; what becomes of it, and how long it took."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "part.json"
        command = [sys.executable, __file__, "--inside", name, "--json", str(file), "--seed", str(seed)]
        command += ["--seconds", str(seconds)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 30, check=False)
            if file.exists():
                result = json.loads(file.read_text())
            else:
                result = {
                    "failure": (done.stderr or done.stdout).strip()[-2000:] or f"exit {done.returncode}"
                }
        except subprocess.TimeoutExpired:
            result = {"failure": f"took more than {seconds + 30:.0f} s"}
    return result | {"took": time.perf_counter() - begin}


def passed(part: dict[str, Any]) -> bool:
    return "failure" not in part and all(row["passed"] for row in part.get("rows", []))


def summary(name: str, part: dict[str, Any]) -> str:
    """A part in one line, and what failed of it in one line each."""
    rows = part.get("rows", [])
    good = sum(row["passed"] for row in rows)
    lines = [f"{name}: {good} of {len(rows)} passed in {part['took']:.0f} s"]
    if reason := part.get("failure") or part.get("skipped"):
        lines[0] += f"; {reason.splitlines()[-1]}"
    for row in rows:
        if not row["passed"]:
            why = (
                row.get("failure") or f"error {row.get('error', math.nan):.2e} of {row.get('allowed', 0):.2e}"
            )
            lines.append(f"  {row['name']}: {why}")
        elif "tflops" in row:
            ratios = ", ".join(f"{label} {median:.2f}" for label, (median, _) in row["ratios"].items())
            lines.append(
                f"  {row['name']}: {row['tflops']:.0f} TFLOP/s; times over nbattn's: {ratios or 'none'}"
            )
        elif "microseconds" in row:
            lines.append(f"  {row['name']}: {row['microseconds']:.1f} us")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu.py",
        description="Prove and time the CUDA kernels on this machine's GPU, in at most 8 minutes.",
    )
    told = "only this part; may be given more than once"
    parser.add_argument(
        "--part", action="append", choices=PARTS, metavar="PART", help=f"{told}: {', '.join(PARTS)}"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: in benchmarks/results/gpu")
    parser.add_argument("--seed", type=int, default=None, help="of the inputs; default: another in every run")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0 where everything passed, 1 where something failed, 2 without a GPU."""
    options = _parser().parse_args(argv)
    seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(4), "big")
    if options.inside:
        result = globals()[options.inside](options.seconds, seed)
        if options.json:
            options.json.write_text(json.dumps(result))
        return 0 if passed(result) else 1
    from nbattn.cuda import launch

    try:
        launch.require()
        described = machine()
    except (ImportError, OSError, RuntimeError) as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 2
    begin = time.perf_counter()
    parts: dict[str, Any] = {}
    for name in options.part or PARTS:
        left = TOTAL - (time.perf_counter() - begin)
        seconds = min(PARTS[name], left - 35)
        parts[name] = (
            run_part(name, seconds, seed) if seconds > 10 else {"failure": "no time was left", "took": 0.0}
        )
        print(summary(name, parts[name]), flush=True)
    stamp = time.strftime("%Y-%m-%d-%H%M%S", time.gmtime())
    file = options.json or RESULTS / f"{described['device'].replace(' ', '-')}-{stamp}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        json.dumps({"machine": described, "seed": seed, "time": stamp, "parts": parts}, indent=1) + "\n"
    )
    print(f"written to {file}")
    return 0 if all(map(passed, parts.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
