"""Where, when and of what a figure was measured: what stands beside it, without names of hosts and people."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(threads: int) -> dict[str, str]:
    """The processor, the threads, and the versions of what this library stands on."""
    import nbattn
    from nbattn.cpu import emitters, runtime

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    kernels = f"{runtime.cpu_name()}, {emitters.DESCRIPTION}"
    return {
        "CPU": f"{names[0] if names else platform.processor()} ({kernels})",
        "threads": str(threads),
        "Python": platform.python_version(),
        "nbattn": nbattn.__version__,
        "Numba": importlib.metadata.version("numba"),
        "NumPy": importlib.metadata.version("numpy"),
        "SciPy": importlib.metadata.version("scipy"),
    }


def commit() -> str | None:
    """The last commit that changed the library, with a + where files are changed since; None outside git."""
    try:
        last = _git("log", "-1", "--format=%h", "--abbrev=10")
        changed = _git("status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{last}+" if changed else last or None


def _git(*command: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *command, "--", "nbattn"], capture_output=True, text=True, check=True
    ).stdout.strip()


def today() -> str:
    """As in 2026-01-31, of Greenwich."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()
