"""The command that proves the CUDA kernels on a GPU: what can be told of it without one."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simulated_gpu

from benchmarks import gpu, gpu_cases, gpu_decode, gpu_timing

pytestmark = pytest.mark.cuda_sim
SCRIPT = Path(gpu.__file__)


def run(*arguments, **options):
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_help():
    done = run("--help")
    assert done.returncode == 0
    assert all(part in done.stdout for part in gpu.PARTS)


def test_without_a_gpu(capsys, monkeypatch):
    def missing():
        message = "needs an NVIDIA GPU"
        raise OSError(message)

    monkeypatch.setattr("nbattn.cuda.launch.require", missing)
    assert gpu.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "gpu.py: needs an NVIDIA GPU\n"


def test_unknown_part(capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--part", "speed"])
    assert "invalid choice: 'speed'" in capsys.readouterr().err


class TestStatistics:
    def test_operations(self):
        assert gpu_timing.operations(1, 1, 10, 10, 2 * 8, causal=False) == 2 * (10 * 10 * 8) * 2
        assert gpu_timing.operations(2, 3, 10, 10, 16, causal=True) == 3 * gpu_timing.operations(
            1, 1, 10, 10, 16, causal=False
        )

    def test_relative_error(self):
        x = np.array([3.0, 4.0, -np.inf])
        assert gpu_cases.relative_error(x, x) == 0
        assert gpu_cases.relative_error(np.add(x, (0, 0.5, 0)), x) == pytest.approx(0.1)
        assert gpu_cases.relative_error([np.nan, 4, -np.inf], x) == math.inf
        assert gpu_cases.relative_error([3.0, 4.0, 0.0], x) == math.inf
        assert gpu_cases.relative_error([0.0], [0.0]) == 0


class TestCacheCases:
    def test_every_storage_and_kind(self):
        found = gpu_decode.cases()
        assert len({case.name for case in found}) == len(found)
        for storage in gpu_decode.ALLOWED:
            own = [case for case in found if case.storage == storage]
            assert {option for case in own for option in case.options} == set(gpu_decode.OPTIONS)
            assert (
                {bool(case.page_size) for case in own} == {bool(case.window) for case in own} == {True, False}
            )
        assert {case.heads % case.kv_heads for case in found} == {0}


class TestCases:
    def test_every_option_and_dtype(self):
        found = gpu_cases.cases(1)
        assert len({case.name for case in found}) == len(found)
        for dtype in gpu_cases.FLOOR:
            own = [case for case in found if case.dtype == dtype]
            assert {option for case in own for option in case.options} == set(gpu_cases.OPTIONS)
        assert {case.heads % case.kv_heads for case in found} == {0}

    def test_sizes_differ_from_run_to_run(self):
        assert gpu_cases.cases(1) == gpu_cases.cases(1)
        assert gpu_cases.cases(1) != gpu_cases.cases(2)


@pytest.fixture
def device(monkeypatch):
    """A machine that has a GPU."""
    with simulated_gpu.installed():
        monkeypatch.setattr(gpu, "commit", lambda: "abc")
        yield


PARTS = {
    "units": {"rows": [], "skipped": "GPU 0 has no wgmma"},
    "correctness": {
        "rows": [{"name": "plain", "passed": True, "error": 1e-7, "allowed": 2e-6}],
        "left_out": 3,
    },
    "libraries": {"failure": "Traceback\nCUDA_ERROR_700"},
    "sanitizer": {"rows": [], "skipped": "compute-sanitizer is not on the PATH"},
    "timing": {
        "rows": [
            {"name": "bf16", "passed": True, "tflops": 400.0, "ratios": {"flash": [1.1, 0.1]}, "seconds": {}},
            {"name": "f32", "passed": False, "failure": "RuntimeError: no memory"},
        ]
    },
    "caches": {"rows": []},
    "decode": {
        "rows": [
            {"name": "copy", "passed": True, "bytes_per_second": 3e12},
            {
                "name": "int8",
                "passed": True,
                "bytes_per_second": 2.4e12,
                "share": 0.8,
                "ratios": {"sdpa": [3, 0]},
            },
            {"name": "int4", "passed": True, "skipped": "no time left"},
        ]
    },
    "overhead": {"rows": [{"name": "softmax", "passed": True, "microseconds": 12.34}]},
}


class TestCommand:
    @pytest.fixture
    def asked(self, device, monkeypatch):
        asked = []

        def run_part(name, seconds, seed):
            asked.append((name, seconds, seed))
            return PARTS[name] | {"took": 1.0}

        monkeypatch.setattr(gpu, "run_part", run_part)
        return asked

    def test_goes_on_when_a_part_fails(self, asked, capsys, tmp_path):
        file = tmp_path / "new" / "gpu.json"
        assert gpu.main(["--json", str(file), "--seed", "7"]) == 1
        assert [name for name, _, _ in asked] == list(gpu.PARTS)
        assert {seed for _, _, seed in asked} == {7}
        written = json.loads(file.read_text())
        assert written["parts"].keys() == gpu.PARTS.keys()
        assert written["machine"]["device"] == "SIMULATOR"
        assert written["machine"]["capability"] == [7, 5]
        assert written["machine"]["cuda"] == "13.0"
        assert written["machine"]["commit"] == "abc"
        assert written["seed"] == 7
        lines = capsys.readouterr().out.splitlines()
        assert lines[:-1] == [
            "units: 0 of 0 passed in 1 s; GPU 0 has no wgmma",
            "correctness: 1 of 1 passed in 1 s; no time was left for 3 more",
            "caches: 0 of 0 passed in 1 s",
            "libraries: 0 of 0 passed in 1 s; CUDA_ERROR_700",
            "sanitizer: 0 of 0 passed in 1 s; compute-sanitizer is not on the PATH",
            "timing: 1 of 2 passed in 1 s",
            "  bf16: 400 TFLOP/s; times over nbattn's: flash 1.10",
            "  f32: RuntimeError: no memory",
            "decode: 2 of 2 passed in 1 s",
            "  int8: 2.40 TB/s, 0.80 of a copy's; times over nbattn's: sdpa 3.00",
            "  int4: skipped, no time left",
            "overhead: 1 of 1 passed in 1 s",
            "  softmax: 12.3 us",
        ]

    def test_parts_that_are_asked_for(self, asked, tmp_path):
        file = str(tmp_path / "gpu.json")
        assert gpu.main(["--json", file, "--part", "overhead", "--part", "correctness"]) == 0
        assert [name for name, _, _ in asked] == ["overhead", "correctness"]

    def test_no_time_left(self, asked, tmp_path, monkeypatch):
        monkeypatch.setattr(gpu, "TOTAL", 40)
        file = tmp_path / "gpu.json"
        assert gpu.main(["--json", str(file)]) == 1
        assert not asked
        parts = json.loads(file.read_text())["parts"]
        assert {part["failure"] for part in parts.values()} == {"no time was left"}

    def test_file_that_cannot_be_written(self, asked, tmp_path, capsys):
        assert gpu.main(["--json", str(tmp_path)]) == 2
        assert not asked
        assert capsys.readouterr().err.startswith("gpu.py: [Errno 21] Is a directory: ")

    def test_a_part_is_written_when_it_has_ended(self, asked, tmp_path, monkeypatch):
        file = tmp_path / "gpu.json"
        done = []

        def cut_off(name, seconds, seed):
            if done:
                raise KeyboardInterrupt
            done.append(name)
            return PARTS[name] | {"took": 1.0}

        monkeypatch.setattr(gpu, "run_part", cut_off)
        with pytest.raises(KeyboardInterrupt):
            gpu.main(["--json", str(file)])
        assert list(json.loads(file.read_text())["parts"]) == done

    def test_all_parts_fit(self):
        assert sum(gpu.PARTS.values()) <= gpu.TOTAL + 60


class TestPartOfItsOwn:
    """A part's process, which fails here in the way it does anywhere: its output is kept."""

    def test_failure_is_kept(self):
        part = gpu.run_part("no_such_part", 10, 1)
        assert "KeyError: 'no_such_part'" in part["failure"]
        assert part["took"] > 0
        assert not gpu.passed(part)

    def test_rows_come_back(self):
        part = gpu.run_part("small", 10, 1)  # no GPU, or no PyTorch: each row says so
        assert len(part["rows"]) == 22
        assert not gpu.passed(part) or all(row["passed"] for row in part["rows"])
