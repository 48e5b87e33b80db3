"""What a process pays before its first result: import, first call, cold compile, package size, memory.

python -m benchmarks.startup
"""

from __future__ import annotations

import io
import os
import statistics
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import nbattn

PACKAGE = Path(nbattn.__file__).parent
DTYPES = ["float32", "float64", "float16", "bfloat16"]
REPEATS = 5

INPUTS = """
import sys, time
import numpy as np
if "{dtype}" == "bfloat16":
    import ml_dtypes
x = np.ones((1, 2, 8, 16)).astype("{dtype}")
import nbattn
"""
FIRST_CALL = """
start = time.perf_counter()
nbattn.scaled_dot_product_attention(x, x, x)
print(time.perf_counter() - start)
"""
IMPORT = """
import time
import numpy
start = time.perf_counter()
import nbattn
print(time.perf_counter() - start)
"""
MEMORY = """
import resource
x = np.random.default_rng(0).standard_normal((3, 16384, 64)).astype(np.float32)
out = np.zeros((16384, 64), np.float32)
nbattn.scaled_dot_product_attention(*x[:, :512])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nbattn.scaled_dot_product_attention(*x, out=out)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def measure(code: str, **environment: str) -> float:
    """The number that this code prints in a process of its own."""
    search = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": search} | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(result.stdout)


class Import:
    def track_seconds_beyond_numpy(self) -> float:
        return statistics.median(measure(IMPORT) for _ in range(REPEATS))

    track_seconds_beyond_numpy.unit = "s"  # type: ignore[attr-defined]


class FirstCall:
    """Of a process, with numpy and nbattn imported; Numba is imported on the way."""

    params = DTYPES
    param_names = ("dtype",)
    timeout = 300

    def track_warm_seconds(self, dtype: str) -> float:
        code = INPUTS.format(dtype=dtype) + FIRST_CALL
        return statistics.median([measure(code) for _ in range(REPEATS + 1)][1:])

    def track_cold_seconds(self, dtype: str) -> float:
        with tempfile.TemporaryDirectory() as empty:
            return measure(INPUTS.format(dtype=dtype) + FIRST_CALL, NBATTN_CACHE_DIR=empty)

    track_warm_seconds.unit = track_cold_seconds.unit = "s"  # type: ignore[attr-defined]


class Memory:
    def track_bytes_of_16k_by_16k(self) -> float:
        """One head of head_dim 64; its scores alone would be 1 GiB."""
        return measure(INPUTS.format(dtype="float32") + MEMORY)

    track_bytes_of_16k_by_16k.unit = "bytes"  # type: ignore[attr-defined]


class Package:
    def track_bytes(self) -> int:
        """The package's files, packed as in a wheel."""
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(PACKAGE.rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    archive.write(path, path.relative_to(PACKAGE.parent))
        return len(content.getvalue())

    track_bytes.unit = "bytes"  # type: ignore[attr-defined]


def main() -> None:
    print(f"import beyond numpy        {Import().track_seconds_beyond_numpy():.3f} s")
    for dtype in DTYPES:
        first = FirstCall()
        cold = first.track_cold_seconds(dtype)
        print(f"first call, {dtype:9}      {first.track_warm_seconds(dtype):.3f} s warm, {cold:.1f} s cold")
    print(f"memory of 16k x 16k        {Memory().track_bytes_of_16k_by_16k() / 1e6:.1f} MB")
    print(f"package                    {Package().track_bytes() / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
