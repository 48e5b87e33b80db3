"""Peak memory of one call by length, each in a process of its own: `python -m benchmarks.memory`.

Self-attention of one head of 64 numbers in float32, by the calls of `peers.py`. Counted is what the process
holds at most during the call, less what it held before and less the result. Before it come the inputs and a
call of a short length, so that no import, thread or compiled kernel counts. Only Linux tells the peak of a
part of a process's life.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import arguments
from .machine import ROOT, commit, describe, processors, today
from .peers import OURS, available, set_threads, table

LENGTHS = (1024, 2048, 4096, 8192, 16384)
HEAD_DIM = 64
WARM = 128
"""The length of the call before."""
REPEATS = 3
LIBRARIES = {OURS: "", "PyTorch": "PyTorch", "ORT Attention": "OnnxRuntime", "NumPy": "NumPy"}
"""The class in `rivals.py` of each call."""
STATUS, PEAK_IS_NOW = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def held(what: str) -> int:
    """Bytes: VmRSS now, VmHWM at most."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{what}:"))
    return 1024 * int(line.split()[1])


def give_back() -> None:
    """Memory that is free, but still the process's, would hide what the call takes of it."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of glibc
        trim(0)


def growth(label: str, length: int, threads: int) -> dict[str, Any]:
    """Bytes that one call takes beyond its inputs and its result, and the library's name and version."""
    from . import rivals
    from .cases import Attention

    ready, missing = available([getattr(rivals, LIBRARIES[label])] if LIBRARIES[label] else [], threads)
    if missing:
        raise ImportError(*missing.values())
    for size in (WARM, length):
        case = Attention(1, size, HEAD_DIM)
        inputs = case.inputs()
        call = ready[0].attention(case, inputs)[label] if ready else case.ours(inputs)
        give_back()
        PEAK_IS_NOW.write_text("5")
        before = held("VmRSS")
        result = call.run()
        more = held("VmHWM") - before
        del result
    # ONNX Runtime has had the memory of its result since it was prepared.
    result_bytes = 0 if label == "ORT Attention" else inputs.query.nbytes
    return {"bytes": max(0, more - result_bytes), "versions": {x.name: x.version for x in ready}}


def apart(label: str, length: int, threads: int) -> dict[str, Any]:
    """What `growth` finds in a process of its own, or why it finds nothing."""
    command = [sys.executable, "-m", "benchmarks.memory", "--threads", str(threads)]
    done = subprocess.run(
        [*command, "--one", label, str(length)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return json.loads(done.stdout)
    last = (done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"])[-1]
    return {"trouble": last.partition("Error: ")[2] or last}


def measure(threads: int, lengths: Sequence[int], repeats: int) -> dict[str, Any]:
    """What is written to the file."""
    rows, versions, missing = [], {}, {}
    for label in LIBRARIES:
        for length in lengths:
            found = [apart(label, length, threads) for _ in range(repeats)]
            if troubles := [x["trouble"] for x in found if "trouble" in x]:
                missing[label] = troubles[0]
                break
            rows.append({"library": label, "length": length, "bytes": [x["bytes"] for x in found]})
            versions |= found[0]["versions"]
            print(f"{label}, {length} positions: done", file=sys.stderr, flush=True)
    head = {"date": today(), "commit": commit(), "machine": describe(threads) | versions, "threads": threads}
    return head | {"missing": missing, "memory": rows}


def report(figures: dict[str, Any]) -> str:
    """The table that goes to stdout."""
    rows = {(row["library"], row["length"]): statistics.median(row["bytes"]) for row in figures["memory"]}
    labels, lengths = (list(dict.fromkeys(key[i] for key in rows)) for i in (0, 1))
    cells = [
        [str(n), *(f"{rows[x, n] / 1e6:.1f}" if (x, n) in rows else "-" for x in labels)] for n in lengths
    ]
    notes = [f"- {label} is left out: {reason}." for label, reason in figures["missing"].items()]
    return "\n".join([table(["MB beyond inputs and result", *labels], cells), *notes])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="memory.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--threads", type=arguments.threads, default=processors(), metavar="N", help="default: all"
    )
    parser.add_argument("--repeats", type=int, default=REPEATS, metavar="N", help="processes for each figure")
    parser.add_argument(
        "--json", type=arguments.output_file, metavar="FILE", help="also write the figures there"
    )
    parser.add_argument("--one", nargs=2, metavar=("LIBRARY", "LENGTH"), help="only this, in this process")
    options = parser.parse_args(argv)
    if not PEAK_IS_NOW.exists():
        parser.exit(2, "memory.py: error: only Linux tells the peak of a part of a process's life\n")
    set_threads(options.threads)
    if options.one:
        print(json.dumps(growth(options.one[0], int(options.one[1]), options.threads)))
        return 0
    figures = measure(options.threads, LENGTHS, options.repeats)
    print(report(figures))
    if options.json:
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in figures.items())
        options.json.write_text("{\n" + lines.replace("}, {", "},\n{") + "\n}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
