"""Every CUDA kernel compiles to machine code, with all that it keeps in registers, as the table says."""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_table
import pytest

pytestmark = pytest.mark.cuda_compile

PACKAGES = ("numba-cuda", "nvidia-nvvm", "nvidia-nvjitlink")


def installed(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@pytest.fixture(scope="module")
def table():
    return json.loads(cuda_table.TABLE.read_text())


@pytest.fixture(scope="module")
def compiled():
    """The rows of all kernels, compiled now, by architecture.

    In processes of their own, as other tests of this one may have Numba's CUDA simulator.
    """
    missing = [package for package in PACKAGES if installed(package) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install nbattn[cuda]")

    def run(part):
        command = [sys.executable, "-W", "ignore", cuda_table.__file__, part]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout)

    with ThreadPoolExecutor() as pool:
        first, second = pool.map(run, ("1/2", "2/2"))
    rows = first | second
    return {
        architecture: {name: found[architecture] for name, found in rows.items() if architecture in found}
        for architecture in cuda_table.ARCHITECTURES
    }


architectures = pytest.mark.parametrize("architecture", cuda_table.ARCHITECTURES)


@architectures
def test_everything_stays_in_registers(architecture, compiled):
    assert compiled[architecture]
    rows = compiled[architecture]
    assert not {name: row for name, row in rows.items() if row["local"] or "warnings" in row}
    for name, row in rows.items():
        if "-hopper-" in name:  # else some warps would wait for registers for ever
            assert row["registers"] == 65536 // row["threads"] // 8 * 8, name
    if architecture == "sm_90a":  # before, where the blocks end
        calls = {name: row["calls"] for name, row in rows.items() if "calls" in row}
        # Plain arithmetic divides, once for each row or block; the compiler has functions for that.
        assert not {name for name in calls if "-mma-" in name or "-hopper-" in name}
        assert all("_div_" in call or "_rem_" in call for names in calls.values() for call in names)


@architectures
def test_table(architecture, compiled, table):
    """With other compilers the numbers may differ by themselves; which kernels there are may not."""
    listed = {n: rows[architecture] for n, rows in table["kernels"].items() if architecture in rows}
    assert compiled[architecture].keys() == listed.keys()
    versions = {package: installed(package) for package in PACKAGES}
    if versions != table["compilers"]:
        pytest.skip(f"the table was made with {table['compilers']}, here are {versions}")
    assert compiled[architecture] == listed


def test_units_compile(compiled):
    """Those of `benchmarks/gpu.py`, as what proves the kernels' ground must stand itself."""
    program = (
        "from benchmarks import gpu_units; from nbattn.cuda import compiler\n"
        "for check in gpu_units.checks(1):\n"
        "    print(compiler.binary(gpu_units.kernel_of(check), (9, 0)).report)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "0 bytes spill stores" in done.stdout
    assert "Used 128 registers" in done.stdout  # of the one that passes them on
    assert not re.search(r"C7\d\d\d|[1-9]\d* bytes stack", done.stdout)


FUNCTIONS = """
import json, math, sys
import cuda_table
import numpy as np
from nbattn.cuda import attention, mods
from nbattn.resolve import Options, resolve_batch

shift, steps = 0.25, np.arange(4.0)

def helper(x):
    return x * shift + steps[1]

def score(s, batch, head, q_index, kv_index, table, x, n, flags):
    y = math.exp(-abs(s)) + np.tanh(s) + np.where(q_index > kv_index, s, 0.5 * s) + np.maximum(s, x)
    if flags[kv_index % 3] and n:
        return y + table[batch, -1] + math.sqrt(abs(s) + 1)
    return np.exp2(s) + 2.0 ** -head + float(kv_index) + helper(s)

def mask(batch, head, q_index, kv_index, ids):
    return ids[q_index] == ids[kv_index] or q_index >= kv_index

flags, ids, table = np.array([True, False, True]), np.arange(70) % 3, np.ones((3, 4))
cases = {
    "float32": {"score_mod": score, "mod_args": (table, 1.5, 2, flags)},
    "float64": {"score_mod": lambda s, b, h, i, j: score(s, b, h, i, j, table, 1.5, 2, flags)},
    "float16": {"mask_mod": mask, "mod_args": (ids,)},
}
nothing = Options(None, None, False, None, 0, None, None, None, None, None, None)
rows = {}
for dtype, options in cases.items():
    x = np.zeros((1, 2, 70, 8), dtype)
    p = resolve_batch(x, x, x, nothing._replace(**options)).problem
    kernel = attention._kernel_of(p, mods.of(p))
    np.__dict__.pop("row_stack", None)  # as NumPy 2.5; Numba's own target asks for it by NumPy's version
    rows[kernel.name] = cuda_table.row(kernel, "sm_90a")
print(json.dumps(rows))
"""


def test_functions_of_scores():
    """Users' functions become part of the plain kernel, with a NumPy that lacks what numba-cuda asks for."""
    missing = [package for package in PACKAGES if installed(package) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install nbattn[cuda]")
    folder = Path(cuda_table.__file__).parent
    path = os.pathsep.join([str(folder), str(folder.parent)])
    command = [sys.executable, "-W", "ignore", "-c", FUNCTIONS]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(done.stdout)
    found = [re.findall("score_mod|mask_mod", name) for name in rows]
    assert found == [["score_mod"], ["score_mod"], ["mask_mod"]]
    assert not any(row["local"] for row in rows.values())


class TestWithoutCompilers:
    def test_table_has_no_local_memory(self, table):
        for name, rows in table["kernels"].items():
            assert set(rows) == ({"sm_90a"} if "-hopper-" in name else set(cuda_table.ARCHITECTURES))
            for row in rows.values():
                if "-hopper-" in name:
                    assert row["registers"] == 65536 // row["threads"] // 8 * 8, name
                assert row["local"] == 0
                assert row["blocks"] >= 1
                assert row["registers"] <= 255
                assert "warnings" not in row

    def test_resident_blocks(self):
        """As NVIDIA's occupancy calculator counts."""
        a100, h100 = cuda_table.ARCHITECTURES.values()
        assert cuda_table.resident_blocks(a100, 128, 255, 65536) == 2
        assert cuda_table.resident_blocks(h100, 128, 168, 65536) == 3
        assert cuda_table.resident_blocks(a100, 128, 168, 65536) == 2
        assert cuda_table.resident_blocks(h100, 1024, 32, 0) == 2
        assert cuda_table.resident_blocks(h100, 32, 16, 0) == 32
        assert cuda_table.resident_blocks(h100, 256, 128, 232 << 10) == 0
