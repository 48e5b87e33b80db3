"""nbattn beside what a user would pick instead, in one process and one run: `python benchmarks/peers.py`.

Every library computes the same rows (`cases.py`, `decode_cases.py`, `variants_cases.py`, `models_cases.py`)
on the same inputs with the same number of threads. Each result is held to float64 before anything is timed; a
wrong one is named and not timed. Then the calls take turns, round after round, the machine's own limit
(multiply-adds in registers, reading memory, or a copy) among them.
Reported are ratios of times within a round: their median and half their interquartile range.

Thread pools spin when a call has ended, PyTorch's for about 6 ms, so each turn ends with a pause. A turn is
as many calls as take 3 ms, and where they are several, one before them wakes the threads.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if not __package__:  # run as a file: Python has looked beside it, not above it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import arguments
from benchmarks.machine import commit, describe, processors, today

if TYPE_CHECKING:
    from benchmarks.cases import Attention, Call, Softmax
    from benchmarks.decode_cases import Append, Decode
    from benchmarks.models_cases import Model
    from benchmarks.variants_cases import Variant

    Case = Attention | Decode | Append | Softmax | Variant | Model

OURS, LIMIT = "nbattn", "limit"
SUITES = ("prefill", "decode", "softmax", "variants", "models")
TURN = 0.003
MOST_ROUNDS = 25
SLOW = 4
"""Who takes more than so many times nbattn's time sits out the later rounds."""
QUICK_SECONDS, ROW_SECONDS = 45, 10
"""What all rows of a quick run, and one row of another, may take."""


class Rounds(NamedTuple):
    """How many there are at least, and how many slow peers take part in."""

    fewest: int
    slow: int


class Ratio(NamedTuple):
    """Another's time over nbattn's, so above 1 where nbattn is faster, and half the interquartile range."""

    median: float
    spread: float  # NaN after a single round


def ratio(rounds: Iterable[dict[str, float]], label: str) -> Ratio | None:
    """The ratio over the rounds that `label` took part in; None where it took part in none."""
    return spread_of([seconds[label] / seconds[OURS] for seconds in rounds if label in seconds])


def spread_of(ratios: Sequence[float]) -> Ratio | None:
    """The median of some and its spread; None of none."""
    if not ratios:
        return None
    if len(ratios) == 1:
        return Ratio(ratios[0], math.nan)
    low, middle, high = statistics.quantiles(ratios, method="inclusive")
    return Ratio(middle, (high - low) / 2)


@dataclass
class Row:
    """What was measured of a case: seconds of each call by round, largest errors, and what went wrong."""

    case: Case
    rounds: list[dict[str, float]] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    troubles: dict[str, str] = field(default_factory=dict)

    @property
    def peers(self) -> list[str]:
        return [label for label in self.labels if label != LIMIT and not label.startswith(OURS)]

    @property
    def beside(self) -> list[str]:
        """This library's other calls that the row is compared with."""
        return [label for label in self.labels if label != OURS and label.startswith(OURS)]

    @property
    def labels(self) -> list[str]:
        return list(self.rounds[0]) if self.rounds else []

    def ratio(self, label: str) -> Ratio | None:
        return ratio(self.rounds, label)

    def best(self) -> Ratio | None:
        """Against the fastest peer."""
        return min(filter(None, map(self.ratio, self.peers)), default=None)

    def seconds(self, label: str) -> float:
        return statistics.median(r[label] for r in self.rounds if label in r)

    def rate(self) -> float:
        """Billions of operations or bytes per second."""
        return self.case.work / self.seconds(OURS) / 1e9


def turn(call: Call, calls: int) -> float:
    """Seconds of one call, over so many in a row."""
    if calls > 1:
        call.run()
    start = time.perf_counter()
    for _ in range(calls):
        call.run()
    seconds = (time.perf_counter() - start) / calls
    time.sleep(call.settle)
    return seconds


def measure(case: Case, libraries: Sequence[Any], threads: int, seconds: float, plan: Rounds) -> Row:
    """Prepare, judge and time one row, for about so many seconds in all."""
    from benchmarks.cases import TOLERANCE, largest_error

    end = time.perf_counter() + seconds
    row, inputs = Row(case), case.inputs()
    calls: dict[str, Any] = {OURS: case.ours(inputs)}
    if hasattr(case, "beside"):
        calls |= case.beside(inputs)
    for library in libraries:
        try:
            if prepare := getattr(library, case.operation, None):
                calls |= prepare(case, inputs)
        except Exception as failure:  # theirs: said in the table, and the others go on
            row.troubles[library.name] = _sentence(failure)
    exact = case.exact(inputs)
    for label, call in calls.items():
        try:
            result = call.read(call.run())
        except Exception as failure:
            if label.startswith(OURS):
                raise
            row.troubles[label] = _sentence(failure)
            continue
        row.errors[label], relative = largest_error(result, exact)
        if not relative <= getattr(case, "tolerance", TOLERANCE[case.precision]):
            row.troubles[label] = f"is wrong by {row.errors[label]:.1e}, so not timed"
    if OURS in row.troubles:
        return row
    calls = {label: call for label, call in calls.items() if label not in row.troubles}
    time.sleep(max(call.settle for call in calls.values()))
    repeats = dict.fromkeys(calls, 1)
    while len(row.rounds) < plan.fewest or (len(row.rounds) < MOST_ROUNDS and time.perf_counter() < end):
        taken = {LIMIT: case.at_limit(inputs, threads)}
        for label, call in _rotated(list(calls.items()), len(row.rounds)):
            taken[label] = turn(call, repeats[label])
            repeats[label] = max(1, round(TURN / taken[label]))
        row.rounds.append(taken)
        if len(row.rounds) == plan.slow:
            calls = {label: call for label, call in calls.items() if not is_slow(row.rounds, label)}
    return row


def is_slow(rounds: Sequence[dict[str, float]], label: str) -> bool:
    """Whether its fastest turn is far from nbattn's slowest."""
    return min(r[label] for r in rounds) > SLOW * max(r[OURS] for r in rounds)


def _rotated(items: list[Any], by: int) -> list[Any]:
    by %= len(items)
    return items[by:] + items[:by]


def _sentence(failure: Exception) -> str:
    text = str(failure).strip().splitlines() or [type(failure).__name__]
    return f"failed: {text[0][:160]}"


def available(libraries: Iterable[Any], threads: int) -> tuple[list[Any], dict[str, str]]:
    """The libraries that are installed, made ready, and why the others are left out."""
    ready, missing = [], {}
    for library in libraries:
        try:
            ready.append(library(threads))
        except ImportError as error:
            missing[library.name] = f"{error.name or error} is not installed" if error.name else str(error)
    return ready, missing


# --- what is printed ----------------------------------------------------------------------------------------


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, first column to the left, the rest to the right."""
    cells = [list(header), *map(list, lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    cells.insert(1, rule)
    return "\n".join(
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |"
        for line in cells
    )


def columns(rows: Iterable[Row]) -> list[str]:
    """Every peer that some row has a time or a wrong result of, in the order of `rivals.COLUMNS`."""
    from benchmarks.rivals import COLUMNS

    seen = {label for row in rows for label in (*row.peers, *row.errors)}
    return [label for label in COLUMNS if label in seen]


def speeds(rows: Sequence[Row]) -> str:
    """Ratios, time, rate and share of the limit, for rows of one suite and unit."""
    peers, case = columns(rows), rows[0].case
    lines = []
    for row in rows:
        known = {label: row.ratio(label) for label in (*peers, LIMIT)} if row.rounds else {}
        cells = [_cell(known.get(label), row.troubles.get(label)) for label in peers]
        best, limit = row.best(), known.get(LIMIT)
        lines.append([
            row.case.name, f"{best.median:.2f}" if best else "-", *cells,
            f"{1e3 * row.seconds(OURS):.3g}" if row.rounds else "wrong",
            f"{row.rate():.1f}" if row.rounds else "wrong", f"{limit.median:.2f}" if limit else "-",
        ])  # fmt: skip
    return table([rows[0].case.suite, "best peer", *peers, "ms", case.unit, f"of {case.limit}"], lines)


def _cell(value: Ratio | None, trouble: str | None) -> str:
    if trouble:
        return "wrong" if "wrong" in trouble else "failed"
    if not value:
        return "-"
    return f"{value.median:.2f}" + ("" if math.isnan(value.spread) else f" ±{value.spread:.2f}")


def errors(rows: Sequence[Row]) -> str:
    labels = [OURS, *columns(rows)]
    lines = [
        [row.case.name, *(f"{row.errors[x]:.1e}" if x in row.errors else "-" for x in labels)] for row in rows
    ]
    return table(["largest error", *labels], lines)


def means(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Geometric means of the ratios by dtype (and softmax), to the best peer and to each."""
    result: dict[str, dict[str, float]] = {}
    for group in dict.fromkeys(row.case.group for row in rows):
        members = [row for row in rows if row.case.group == group and row.peers]
        found = {"best peer": [row.best() for row in members]}
        found |= {label: [row.ratio(label) for row in members] for label in columns(members)}
        logs = {label: [math.log(x.median) for x in values if x] for label, values in found.items()}
        result[group] = {label: math.exp(statistics.fmean(x)) for label, x in logs.items() if x}
    return result


def report(rows: Sequence[Row], missing: dict[str, str], machine: dict[str, str]) -> str:
    """Everything that goes to stdout."""
    parts = [
        "; ".join(f"{key} {value}" for key, value in machine.items()),
        "Each peer's time over nbattn's, so above 1 nbattn is faster: median over rounds ± half the\n"
        "interquartile range. -: the peer lacks it. Errors are against float64.",
    ]
    for suite, unit in dict.fromkeys((row.case.suite, row.case.unit) for row in rows):
        some = [row for row in rows if (row.case.suite, row.case.unit) == (suite, unit)]
        parts += [speeds(some), errors(some)]
    notes = [
        f"{row.case.name}: {_cell(row.ratio(label), None)} times as fast as {label}."
        for row in rows
        for label in row.beside
    ]
    notes += [f"{name} is left out: {reason}." for name, reason in missing.items()]
    troubles: dict[str, list[str]] = {}
    for row in rows:
        for label, text in row.troubles.items():
            troubles.setdefault(f"{label} {text}.", []).append(row.case.name)
    notes += [f"{', '.join(names)}: {text}" for text, names in troubles.items()]
    if "JAX" in columns(rows):
        notes.append("JAX documents no setting for its threads; PJRT_NPROC was set, but it may use more.")
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    average = means(rows)
    labels = ["best peer", *(x for x in columns(rows) if any(x in some for some in average.values()))]
    lines = [
        [group, *(f"{some[x]:.2f}" if x in some else "-" for x in labels)] for group, some in average.items()
    ]
    parts.append(table(["geometric mean", *labels], lines))
    return "\n\n".join(parts)


def as_json(
    rows: Sequence[Row], missing: dict[str, str], machine: dict[str, str], threads: int, quick: bool
) -> str:
    """Everything that was measured: seconds of each round, and what the tables say; a line for each row."""
    figures = [
        {
            "name": row.case.name,
            "suite": row.case.suite,
            "group": row.case.group,
            "case": {"operation": row.case.operation} | asdict(row.case),
            "limit": row.case.limit,
            "unit": row.case.unit,
            "work": row.case.work,
            "rounds": [{label: _short(x) for label, x in seconds.items()} for seconds in row.rounds],
            "seconds": {label: _short(row.seconds(label)) for label in row.labels},
            "ratios": {label: _pair(row.ratio(label)) for label in row.labels if label != OURS},
            "rate": _short(row.rate() * 1e9) if row.rounds else None,
            "errors": {label: _short(x) for label, x in row.errors.items()},
            "troubles": row.troubles,
        }
        for row in rows
    ]
    head = {
        "date": today(),
        "commit": commit(),
        "quick": quick,
        "machine": machine,
        "threads": threads,
        "missing": missing,
        "geometric_means": means(rows),
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    lines.append('"rows": [\n' + ",\n".join(json.dumps(row) for row in figures) + "\n]")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _short(x: float) -> float | None:
    """Five digits; None in place of NaN, which JSON lacks."""
    return float(f"{x:.5g}") if math.isfinite(x) else None


def _pair(ratio: Ratio | None) -> list[float | None] | None:
    return [_short(x) for x in ratio] if ratio else None


# --- the command --------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Complains in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def set_threads(threads: int) -> None:
    """Tell every library that looks at its environment; most do when they are imported, NumPy too."""
    asked = ("OMP", "OPENBLAS", "MKL", "NUMBA")
    os.environ.update({f"{name}_NUM_THREADS": str(threads) for name in asked})
    os.environ.update({"PJRT_NPROC": str(threads), "JAX_PLATFORMS": "cpu"})


def _parser() -> _Parser:
    parser = _Parser(prog="peers.py", description="Compare nbattn's speed and error with other libraries'.")
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds, under 60 s")
    parser.add_argument(
        "--threads", type=arguments.threads, default=processors(), metavar="N", help="default: all"
    )
    dtypes = ("float32", "bfloat16", "float16", "float64", "int8", "int4")
    parser.add_argument("--dtype", choices=dtypes, help="only rows of this dtype")
    told = "default: all, with --quick prefill and softmax; the others take a minute of their own each"
    parser.add_argument("--suite", choices=(*SUITES, "all"), help=told)
    pattern = "only rows whose name holds this, with * for anything, as in 'f32 8x1024*causal'"
    parser.add_argument("--rows", default="", metavar="PATTERN", help=pattern)
    parser.add_argument(
        "--json", type=arguments.output_file, metavar="FILE", help="also write every figure there"
    )
    parser.add_argument(
        "--flex", action="store_true", help="PyTorch's flex_attention in prefill too: slow to compile"
    )
    return parser


def chosen(options: argparse.Namespace) -> list[Case]:
    """The rows that the options ask for."""
    from benchmarks import cases, decode_cases, models_cases, variants_cases

    suites = {None: ("prefill", "softmax") if options.quick else SUITES, "all": SUITES}
    return [
        case
        for case in (*cases.rows(), *decode_cases.rows(), *variants_cases.rows(), *models_cases.rows())
        if (case.quick or not options.quick)
        and options.dtype in (None, case.precision)
        and case.suite in suites.get(options.suite, (options.suite,))
        and fnmatch.fnmatchcase(case.name, f"*{options.rows}*")
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 1 where a result of nbattn is wrong."""
    begin = time.perf_counter()
    parser = _parser()
    options = parser.parse_args(argv)
    set_threads(options.threads)
    from benchmarks import rivals

    picked = chosen(options)
    if not picked:
        parser.error("no row is left by --quick, --dtype, --suite and --rows together")
    flex = options.flex or any(case.operation == "modified" for case in picked)
    libraries, missing = available(
        (x for x in rivals.LIBRARIES if flex or x is not rivals.FlexAttention), options.threads
    )
    rows: list[Row] = []
    for i, case in enumerate(picked):
        left = QUICK_SECONDS - (time.perf_counter() - begin)
        seconds, plan = (
            (left / (len(picked) - i), Rounds(3, 1)) if options.quick else (ROW_SECONDS, Rounds(7, 3))
        )
        try:
            row = measure(case, libraries, options.threads, seconds, plan)
        except ModuleNotFoundError as error:  # its weights
            missing[case.name] = str(error)
            continue
        rows.append(row)
        best = row.best()
        outcome = f"{best.median:.2f} x the best peer" if best else "no peer"
        print(f"[{i + 1}/{len(picked)}] {case.name}: {outcome}", file=sys.stderr, flush=True)
    if not rows:
        parser.error("; ".join(f"{name} is left out: {reason}" for name, reason in missing.items()))
    machine = describe(options.threads) | {library.name: library.version for library in libraries}
    print(report(rows, missing, machine))
    if options.json:
        options.json.write_text(as_json(rows, missing, machine, options.threads, options.quick))
    return int(any(OURS in row.troubles for row in rows))


if __name__ == "__main__":
    sys.exit(main())
