"""Can the gate be trusted? Commits that do and do not slow attention down, and what the gate says of them.

    python -m benchmarks.gate_trial --tries 10

In a clone, one commit changes nothing, and one wraps `scaled_dot_product_attention` so that it goes on for
15 % of the time that the call took. Each try is a run of the gate's command; this one ends with 1 if any of
them says what is not so. Options after `--` are the gate's.

Tried with `--quick` on two shared cores of an AMD EPYC: with the slowdown, which it put at 1.15 to 1.17, the
gate was right in 5 of 5 tries alone on the machine and in 8 of 8 beside builds and tests (load 2.5 to 3.3);
without it in 5 of 5 alone (8 rows) and in 6 of 6 beside others (37 rows, once 99).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .machine import ROOT

PLANTED = """
import time as _time

_unslowed = scaled_dot_product_attention


def scaled_dot_product_attention(*args, **kwargs):
    start = _time.perf_counter()
    result = _unslowed(*args, **kwargs)
    end = _time.perf_counter()
    while _time.perf_counter() < end + {slowdown} * (end - start):
        pass
    return result
"""


def git(folder: Path, *arguments: str) -> None:
    names = ("-c", "user.name=gate", "-c", "user.email=gate@localhost")
    subprocess.run(["git", "-C", str(folder), *names, *arguments], check=True, stdout=subprocess.DEVNULL)


def clone(folder: Path, slowdown: float) -> Path:
    """A clone whose last commit slows attention down, or is empty."""
    place = folder / ("slower" if slowdown else "same")
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(place)], check=True)
    if slowdown:
        with open(place / "nbattn" / "__init__.py", "a", encoding="utf-8") as file:
            file.write(PLANTED.format(slowdown=slowdown))
    git(place, "commit", "--quiet", "--all", "--allow-empty", "--message", "A change")
    return place


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gate_trial", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tries", type=int, default=10, help="of each kind; default: %(default)s")
    parser.add_argument("--slowdown", type=float, default=0.15, help="default: %(default)s")
    parser.add_argument("--kind", choices=("slower", "same"), help="both unless given")
    parser.add_argument("gate", nargs="*", metavar="-- OPTION", help="for the gate, as --quick")
    options = parser.parse_args(arguments)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for kind, expected in (("same", 0), ("slower", 1)):
            if options.kind not in (None, kind):
                continue
            place = clone(Path(folder), options.slowdown if expected else 0.0)
            right = 0
            for i in range(options.tries):
                start = time.perf_counter()
                command = [sys.executable, "-m", "benchmarks.gate", "HEAD~1", *options.gate]
                run = subprocess.run(command, cwd=place, text=True, stdout=subprocess.PIPE, check=False)
                right += run.returncode == expected
                last = (run.stdout.splitlines() or ["nothing"])[-1]
                seconds = time.perf_counter() - start
                print(f"{kind} {i + 1}: exit code {run.returncode} in {seconds:.0f} s: {last}", flush=True)
                if run.returncode != expected:
                    print(run.stdout, flush=True)
            print(f"{kind}: right in {right} of {options.tries}", flush=True)
            wrong += options.tries - right
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
