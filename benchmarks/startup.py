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

from .suite import Suite

PACKAGE = Path(nbattn.__file__).parent
DTYPES = ["float32", "float64", "float16", "bfloat16"]
REPEATS = 3

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
SPECIALISATIONS = """
many, few = (np.random.default_rng(0).standard_normal((1, 4, n, 64)).astype(np.float32) for n in (100, 1))
square, heads = np.zeros((100, 100), np.float32), np.ones(4, np.float32)
options = [
    {}, {"mask": square == 0}, {"bias": square}, {"is_causal": True}, {"window_size": (9, 0)}, {"scale": 2.0},
    {"softcap": 9.0}, {"alibi_slopes": heads}, {"sinks": heads}, {"return_lse": True},
    {"return_weights": True}, {"key_lengths": [50]}, {"query_offset": 3, "is_causal": True},
]
turned, read_only = many.swapaxes(1, 2).copy().swapaxes(1, 2), many.copy()
read_only.flags.writeable = False
for query in (many, turned, read_only, many[0], many[..., :33]):
    for extra in options:
        nbattn.scaled_dot_product_attention(query, query, query, **extra)
nbattn.scaled_dot_product_attention(few, many, many)
from nbattn.cpu import runtime
print(sum(name != "runtime-handover" for name in runtime._kernels))
"""
MEMORY = """
import resource
x = np.random.default_rng(0).standard_normal((3, 16384, 64)).astype(np.float32)
out = np.ones((16384, 64), np.float32)  # touched: pages of zeros would be counted when the call writes them
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


class Import(Suite):
    def track_seconds_beyond_numpy(self) -> float:
        return statistics.median(measure(IMPORT) for _ in range(REPEATS))

    track_seconds_beyond_numpy.unit = "s"  # type: ignore[attr-defined]


class FirstCall(Suite):
    """Of a process, with numpy and nbattn imported; Numba is imported on the way, and the kernel read."""

    params = DTYPES
    param_names = ("dtype",)

    def track_seconds(self, dtype: str) -> float:
        code = INPUTS.format(dtype=dtype) + FIRST_CALL
        return statistics.median([measure(code) for _ in range(REPEATS + 1)][1:])

    track_seconds.unit = "s"  # type: ignore[attr-defined]


class Compile(Suite):
    """The first call of all with a dtype, which compiles its kernel."""

    params = ("float32", "bfloat16")
    param_names = ("dtype",)

    def track_seconds(self, dtype: str) -> float:
        with tempfile.TemporaryDirectory() as empty:
            return measure(INPUTS.format(dtype=dtype) + FIRST_CALL, NBATTN_CACHE_DIR=empty)

    track_seconds.unit = "s"  # type: ignore[attr-defined]


class Specialisations(Suite):
    def track_attention_kernels(self) -> float:
        """Kernels of one dtype, whatever the options, strides and sizes: for many queries and for few."""
        return measure(INPUTS.format(dtype="float32") + SPECIALISATIONS)

    track_attention_kernels.unit = "kernels"  # type: ignore[attr-defined]


class Memory(Suite):
    def track_bytes_of_16k_by_16k(self) -> float:
        """One head of head_dim 64; its scores alone would be 1 GiB."""
        return measure(INPUTS.format(dtype="float32") + MEMORY)

    track_bytes_of_16k_by_16k.unit = "bytes"  # type: ignore[attr-defined]


class Package(Suite):
    def track_wheel_bytes(self) -> float:
        """The package's files, packed as in a wheel."""
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(PACKAGE.rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    archive.write(path, path.relative_to(PACKAGE.parent))
        return float(len(content.getvalue()))

    track_wheel_bytes.unit = "bytes"  # type: ignore[attr-defined]


def main() -> None:
    print(f"import beyond numpy        {Import().track_seconds_beyond_numpy():.3f} s")
    for dtype in DTYPES:
        cold, warm = Compile().track_seconds(dtype), FirstCall().track_seconds(dtype)
        print(f"first call, {dtype:9}      {warm:.3f} s warm, {cold:.1f} s cold")
    print(f"attention kernels          {Specialisations().track_attention_kernels():.0f} for one dtype")
    print(f"memory of 16k x 16k        {Memory().track_bytes_of_16k_by_16k() / 1e6:.1f} MB")
    print(f"package                    {Package().track_wheel_bytes() / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
