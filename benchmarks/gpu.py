"""The CUDA kernels on a GPU, proved and timed by one command: `python benchmarks/gpu.py`.

It needs this repository and Python with numba-cuda and PyTorch; CuPy, JAX and compute-sanitizer where they
are. Every part runs in a process of its own, as a kernel that fails takes its process's GPU with it; the
others go on. Inputs are drawn anew in every run, and every result is written over NaN.

- units: tensor maps, descriptors and fragments of Hopper's own instructions, each alone
- correctness: every option and dtype against float64, beside the plain formula's error in the same dtype
- caches: every kind of cache, and a graph of its calls, likewise
- libraries: arrays of each library in and out, on streams other than the default
- sanitizer: memcheck and racecheck of small calls
- timing: beside each of PyTorch's SDPA back ends, the calls interleaved, by events
- decode: a token over long caches, as a share of what copying reaches
- overhead: how long a later call takes until it returns, and the first one
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: Python has looked beside it, not above it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.gpu_decode import caches, decode
from benchmarks.gpu_proofs import correctness, libraries, sanitizer, small
from benchmarks.gpu_timing import overhead, timing
from benchmarks.gpu_units import units
from benchmarks.machine import ROOT, commit

PARTS = {"units": 30, "correctness": 110, "caches": 40, "libraries": 45, "sanitizer": 105, "timing": 120,
         "decode": 45, "overhead": 45}  # fmt: skip
"""Every part and the seconds that it may take."""
FUNCTIONS = {
    part.__name__: part
    for part in (units, correctness, caches, libraries, sanitizer, timing, decode, overhead, small)
}
"""What runs in a process of its own: the parts, and what the sanitizer watches."""
TOTAL = 480
"""Seconds of a whole run; parts that have no time left are said to have been skipped."""
RESULTS = ROOT / "benchmarks" / "results" / "gpu"


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
    tried = [row for row in rows if "skipped" not in row]
    good = sum(row["passed"] for row in tried)
    lines = [f"{name}: {good} of {len(tried)} passed in {part['took']:.0f} s"]
    if reason := part.get("failure") or part.get("skipped"):
        lines[0] += f"; {reason.splitlines()[-1]}"
    if late := part.get("left_out"):
        lines[0] += f"; no time was left for {late} more"
    for row in rows:
        if not row["passed"]:
            why = (
                row.get("failure") or f"error {row.get('error', math.nan):.2e} of {row.get('allowed', 0):.2e}"
            )
            lines.append(f"  {row['name']}: {why}")
        elif "skipped" in row:
            lines.append(f"  {row['name']}: skipped, {row['skipped']}")
        elif "tflops" in row:
            ratios = ", ".join(f"{label} {median:.2f}" for label, (median, _) in row["ratios"].items())
            lines.append(
                f"  {row['name']}: {row['tflops']:.0f} TFLOP/s; times over nbattn's: {ratios or 'none'}"
            )
        elif "share" in row:
            ratios = ", ".join(f"{label} {median:.2f}" for label, (median, _) in row["ratios"].items())
            rate = f"{row['bytes_per_second'] / 1e12:.2f} TB/s, {row['share']:.2f} of a copy's"
            lines.append(f"  {row['name']}: {rate}; times over nbattn's: {ratios or 'none'}")
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
        result = FUNCTIONS[options.inside](options.seconds, seed)
        if options.json:
            options.json.write_text(json.dumps(result))
        return 0 if passed(result) else 1
    from nbattn.cuda import launch

    stamp = time.strftime("%Y-%m-%d-%H%M%S", time.gmtime())
    try:
        launch.require()
        described = machine()
        file = options.json or RESULTS / f"{described['device'].replace(' ', '-')}-{stamp}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
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
        found = {"machine": described, "seed": seed, "time": stamp, "parts": parts}
        file.write_text(json.dumps(found, indent=1) + "\n")  # after each: the machine may go before the end
    print(f"written to {file}")
    return 0 if all(map(passed, parts.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
