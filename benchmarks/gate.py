"""Has a row of the asv suites become slower? Two versions side by side, turn by turn, on a noisy machine.

    python -m benchmarks.gate main

compares the working tree with a commit: 1 if a row is slower by more than the threshold, 0 if none is, 2 if
there is nothing to compare.

Why not `asv continuous --interleave-rounds`: it alternates the commits once for each round of all benchmarks,
minutes apart, in which a shared machine does not stay the same, and compares the samples of both as if they
were independent ones, row for row, without a second look at what it finds among a hundred rows. Here turns of
some milliseconds alternate between two living processes, in random order within each pair, on the same core.

A pair of processes gives one number for each row, the median ratio of its pairs of turns: how memory lies in
a process makes it some per cent faster or slower for as long as it lives, so more turns are no more evidence.
All rows are screened by a few pairs of processes; a row whose median is beyond the threshold is then judged
by fresh pairs alone. It is slower if the lower confidence bound of their median is beyond the threshold too:
that of the sign test, which holds for any distribution, with Holm's correction for the rows that are judged.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import random
import re
import select
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .arguments import output_file
from .machine import ROOT

SCREENINGS, JUDGEMENTS = 3, 15
"""Pairs of processes that see all rows, and that see the suspicious ones."""
ALPHA = 0.01
"""How likely a run that finds nothing but chance may call some row slower."""
TURN, BATCH, MOST_BATCHES = 4e-3, 2.5e-4, 9
"""Seconds of a turn and of the batches of calls in it, of which the median counts."""
BUDGET, FEWEST_PAIRS, MOST_PAIRS = 0.3, 5, 21
"""Seconds that a row may take of each version in a pair of processes, and the turns that this buys."""
SIDES = ("before", "now")
PATIENCE = 300
"""Seconds after which a process that does not answer is given up."""


class Trouble(Exception):
    """What the user is told in one line; nothing was compared."""


# --- the two versions ---------------------------------------------------------------------------------------


def git(*arguments: str) -> bytes:
    result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True)
    if result.returncode:
        raise Trouble((result.stderr.decode().strip().splitlines() or ["git failed"])[-1])
    return result.stdout


def lay_out(folder: Path, commit: str | None) -> None:
    """The package of a commit, or of the working tree, and beside it the benchmarks of the working tree."""
    if commit is None:
        shutil.copytree(ROOT / "nbattn", folder / "nbattn", ignore=shutil.ignore_patterns("__pycache__"))
    else:
        try:
            full = git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}").decode().strip()
        except Trouble:
            msg = f"{commit} is no commit of this repository"
            raise Trouble(msg) from None
        try:
            archive = git("archive", full, "nbattn")
        except Trouble as error:
            msg = f"{commit} has no package ({error})"
            raise Trouble(msg) from None
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
    shutil.copytree(
        ROOT / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("__pycache__", "results")
    )


class Worker:
    """A process of `gate_worker` in a version's folder."""

    def __init__(self, folder: Path, cores: set[int], threads: int) -> None:
        names = ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        environment = os.environ | {name: str(threads) for name in names} | {"PYTHONPATH": str(folder)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gate_worker"],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self.process.pid, cores)

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        line = self.process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        if not ready:
            self.process.kill()
        code = self.process.wait()
        return {"dead": f"no answer in {PATIENCE} s" if not ready else f"its process ended with code {code}"}

    def order(self, text: str) -> None:
        assert self.process.stdin is not None
        with suppress(OSError):  # it has ended, as the answer tells
            print(text, file=self.process.stdin, flush=True)

    def ask(self, text: str) -> dict[str, Any]:
        self.order(text)
        return self.answer()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


@contextmanager
def pair_of_workers(
    folders: Sequence[Path], names: Sequence[str], cores: set[int], threads: int
) -> Iterator[Any]:
    workers = [Worker(folder, cores, threads) for folder in folders]
    try:
        for worker, name in zip(workers, names, strict=True):
            first = worker.answer()
            if "ready" not in first:
                msg = f"{name} cannot be imported: {_first_line(first)}"
                raise Trouble(msg)
        yield workers
    finally:
        for worker in workers:
            worker.end()


def _first_line(answer: dict[str, Any]) -> str:
    text = str(next(iter(answer.values()))).strip().splitlines()
    return text[0] if text else "no reason given"


# --- measuring ----------------------------------------------------------------------------------------------


@dataclass
class Row:
    name: str
    base: list[float] = field(default_factory=list)  # seconds, of each pair of processes
    head: list[float] = field(default_factory=list)
    screened: list[float] = field(default_factory=list)  # logarithms of head / base
    judged: list[float] = field(default_factory=list)
    trouble: str = ""
    broken: bool = False  # in the working tree alone
    bound: float = -math.inf
    slower: bool = False

    @property
    def ratio(self) -> float:
        values = self.judged or self.screened
        return math.exp(statistics.median(values)) if values else math.nan


def measure(row: Row, workers: Sequence[Worker], shuffle: random.Random) -> float | None:
    """The median logarithm of head / base in a pair of processes; None, and why, where there is none."""
    for worker in workers:
        worker.order(f"row {row.name}")
    answers = [worker.answer() for worker in workers]
    for side, answer in enumerate(answers):
        if "seconds" not in answer:
            row.trouble = f"{SIDES[side]}: {_first_line(answer)}"
            row.broken = side == 1 and "lacking" not in answer
            return None
    call = max(min(answer["seconds"] for answer in answers), 1e-7)
    number = max(1, round(BATCH / call))
    batches = min(MOST_BATCHES, max(1, round(TURN / (number * call))))
    batches -= 1 - batches % 2
    pairs = min(MOST_PAIRS, max(FEWEST_PAIRS, int(BUDGET / (call * number * batches))))
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(pairs):
        for side in shuffle.sample((0, 1), 2):
            answer = workers[side].ask(f"turn {number} {batches}")
            if "seconds" not in answer:
                row.trouble, row.broken = f"{SIDES[side]}: {_first_line(answer)}", side == 1
                return None
            seconds[side].append(answer["seconds"])
    row.base.append(statistics.median(seconds[0]))
    row.head.append(statistics.median(seconds[1]))
    return statistics.median(math.log(b / a) for a, b in zip(*seconds, strict=True))


# --- judging ------------------------------------------------------------------------------------------------


def tail(count: int, of: int) -> float:
    """How likely a fair coin shows heads at least so often."""
    return sum(math.comb(of, k) for k in range(count, of + 1)) / 2**of


def lower_bound(values: Sequence[float], alpha: float) -> float:
    """What the median is above, but for this probability, whatever the distribution is."""
    ordered, rank = sorted(values), 0
    while rank < len(ordered) and tail(len(ordered) - rank, len(ordered)) <= alpha:
        rank += 1
    return ordered[rank - 1] if rank else -math.inf


def judge(rows: Iterable[Row], threshold: float) -> None:
    """Holm: the row that looks worst is held to the strictest bound, the next to one less strict."""
    limit = math.log1p(threshold)
    # A row that was given up has no chance left.
    ranked = sorted(rows, key=lambda row: (-sum(x > limit for x in row.judged), -row.ratio))
    still = True
    for i, row in enumerate(ranked):
        row.bound = lower_bound(row.judged, ALPHA / (len(ranked) - i)) if row.judged else -math.inf
        still = still and len(row.judged) == JUDGEMENTS and row.bound > limit
        row.slower = still


def has_a_chance(row: Row, threshold: float) -> bool:
    below = sum(x <= math.log1p(threshold) for x in row.judged)
    return tail(JUDGEMENTS - below, JUDGEMENTS) <= ALPHA and not row.trouble


# --- the command --------------------------------------------------------------------------------------------


def pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        msg = f"{text!r} is no pattern: {error}"
        raise argparse.ArgumentTypeError(msg) from None


class Progress:
    def __init__(self) -> None:
        self.live = sys.stderr.isatty()

    def show(self, text: str, last: bool = False) -> None:
        if self.live:
            print(f"\r\033[K{text[:100]}", end="\n" if last else "", file=sys.stderr, flush=True)
        elif last:
            print(text, file=sys.stderr, flush=True)


def compare(options: argparse.Namespace, folder: Path) -> list[Row]:
    names = (options.base, options.head or "the working tree")
    folders = [folder / "base", folder / "head"]
    for place, commit in zip(folders, (options.base, options.head), strict=True):
        place.mkdir()
        lay_out(place, commit)
    progress, shuffle = Progress(), random.Random()
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

    def cores(i: int) -> set[int]:
        # Both processes on one core: a neighbour there slows both.
        return {allowed[i % len(allowed)]} if options.threads == 1 and allowed else set(allowed)

    with pair_of_workers(folders, names, cores(0), options.threads) as workers:
        answer = workers[1].ask("rows")
    if "rows" not in answer:
        msg = f"the benchmarks cannot be imported: {_first_line(answer)}"
        raise Trouble(msg)
    chosen = [
        Row(name)
        for name, first in answer["rows"]
        if options.rows.search(name) and (first or not options.quick)
    ]
    if not chosen:
        msg = "no row is left by --rows and --quick"
        raise Trouble(msg)

    def launch(i: int, rows: list[Row], title: str, into: str) -> None:
        left = list(rows)
        while left:
            with pair_of_workers(folders, names, cores(i), options.threads) as workers:
                while left:
                    row = left.pop(0)
                    progress.show(f"{title}: {len(rows) - len(left)} of {len(rows)}: {row.name}")
                    value = measure(row, workers, shuffle)
                    if value is not None:
                        getattr(row, into).append(value)
                    if any(worker.process.poll() is not None for worker in workers):
                        break  # the others get a new pair
        progress.show(f"{title}: {len(rows)} rows", last=True)

    for i in range(options.screenings):
        rows = [row for row in chosen if not row.trouble]
        launch(i, rows, f"screening {i + 1} of {options.screenings}", "screened")
    suspicious = [row for row in chosen if not row.trouble and row.ratio > 1 + options.threshold]
    for i in range(JUDGEMENTS if suspicious else 0):
        rows = [row for row in suspicious if has_a_chance(row, options.threshold)]
        if not rows:
            break
        launch(i, rows, f"judging {i + 1} of {JUDGEMENTS}", "judged")
    judge(suspicious, options.threshold)
    return chosen


def report(rows: Sequence[Row], options: argparse.Namespace) -> int:
    for row in rows:
        if row.trouble:
            print(f"{'fails now' if row.broken else 'left out':9}  {row.name}  {row.trouble}")
    compared = [row for row in rows if row.screened and not row.trouble]
    if not compared and not any(row.broken for row in rows):
        msg = "no row runs in both versions"
        raise Trouble(msg)
    for row in compared:
        if row.judged:
            verdict = "slower" if row.slower else "unproven"
            bound = f", at least {math.exp(row.bound):.2f}" if row.slower else ""
            times = f"{statistics.median(row.base) * 1e3:.4g} -> {statistics.median(row.head) * 1e3:.4g} ms"
            print(f"{verdict:9}  {row.name}  {times}, {row.ratio:.2f} times as long{bound}")
    slower, broken = sum(row.slower for row in compared), sum(row.broken for row in rows)
    ratios = [row.ratio for row in compared]
    middle = f"; median ratio {statistics.median(ratios):.3f}" if ratios else ""
    print(f"{len(compared)} rows compared, {slower} slower, {broken} fail now{middle}")
    if options.json:
        figures = [
            {
                "name": row.name, "base_seconds": row.base, "head_seconds": row.head, "slower": row.slower,
                "screened": [math.exp(x) for x in row.screened], "judged": [math.exp(x) for x in row.judged],
                "trouble": row.trouble,
            }
            for row in rows
        ]  # fmt: skip
        options.json.write_text(json.dumps({"threshold": options.threshold, "rows": figures}, indent=1))
    return 1 if slower or broken else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", metavar="BASE", help="the commit that is compared with")
    parser.add_argument("head", metavar="HEAD", nargs="?", help="a commit; the working tree unless given")
    parser.add_argument("--rows", type=pattern, default="", metavar="PATTERN", help="of their names")
    parser.add_argument("--threshold", type=float, default=0.05, help="default: %(default)s, which is 5 %%")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s, which is steadiest")
    parser.add_argument("--quick", action="store_true", help="each benchmark's first parameters alone")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all figures there")
    options = parser.parse_args(arguments)
    options.screenings = SCREENINGS
    try:
        if not 0 < options.threshold <= 1 or options.threads < 1:
            msg = "--threshold must be above 0 and at most 1 (0.05 is 5 %), --threads at least 1"
            raise Trouble(msg)
        with tempfile.TemporaryDirectory() as folder:
            return report(compare(options, Path(folder)), options)
    except (Trouble, OSError) as error:
        print(f"gate: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gate: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
