"""What was measured, from the JSON that `peers.py`, `memory.py` and asv write: the latest of each row."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .peers import LIMIT, OURS, Ratio, ratio, spread_of

GAUGES = {
    "attention.Limits.track_share_of_peak": "Prefill, 8 heads of 1024 x 64: share of the processor's peak",
    "decode.Limits.track_share_of_read_rate": "Decode, one query over 256 MB: share of the read rate",
}
"""The rows of asv that tell how near to the machine's limits a commit came."""


class BrokenFile(ValueError):
    """A file that is not what it should be; the message names it."""


@dataclass(frozen=True)
class Run:
    """One file of `peers.py` or `memory.py`."""

    date: str
    commit: str
    quick: bool
    machine: dict[str, str]
    missing: dict[str, str]

    @property
    def place(self) -> tuple[str, str]:
        """What may be compared: the processor, and how many threads it was given."""
        return self.machine["CPU"], self.machine["threads"]


@dataclass(frozen=True)
class Row:
    """One row of `peers.py`."""

    run: Run
    name: str
    suite: str
    group: str
    case: dict[str, Any]
    work: float
    rounds: list[dict[str, float]]
    ratios: dict[str, Ratio]
    troubles: dict[str, str]

    @property
    def labels(self) -> list[str]:
        """Who was timed, nbattn among them."""
        return [label for label in self.rounds[0] if label != LIMIT] if self.rounds else []

    @property
    def peers(self) -> list[str]:
        return [label for label in self.labels if not label.startswith(OURS)]

    def share(self, label: str) -> Ratio | None:
        """Of the machine's limit, as it was in the same rounds."""
        return spread_of([r[LIMIT] / r[label] for r in self.rounds if label in r])

    def seconds(self, label: str) -> float:
        return statistics.median(r[label] for r in self.rounds if label in r)

    def rate(self, label: str) -> Ratio | None:
        """Billions of operations or bytes per second."""
        return spread_of([self.work / r[label] / 1e9 for r in self.rounds if label in r])


class Memory(NamedTuple):
    """Bytes that a call of so many positions took in some processes."""

    run: Run
    library: str
    length: int
    taken: list[int]


@dataclass
class Measured:
    """Everything of one processor and number of threads, the latest of each row."""

    rows: list[Row] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        return unique([x.run for x in self.rows] + [x.run for x in self.memory])


class Gauge(NamedTuple):
    """One number that asv tracked: of which commit, when, where, with what parameters."""

    name: str
    commit: str
    date: int  # of the commit, milliseconds since 1970
    machine: str
    threads: str
    params: str
    value: float


def unique(items: Iterable[Any]) -> list[Any]:
    """Each once, where it came first; they need not be hashable."""
    found: list[Any] = []
    for item in items:
        if item not in found:
            found.append(item)
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        msg = f"{path} cannot be read as JSON: {error}"
        raise BrokenFile(msg) from error


def _lacks(path: Path, maker: str, error: Exception) -> BrokenFile:
    return BrokenFile(f"{path} is not what {maker} writes: {type(error).__name__} at {error}")


def read_peers(folder: Path) -> dict[tuple[str, str], Measured]:
    """By processor and threads, the newest first: the newest of each row, of one day the longer run's."""
    places: dict[tuple[str, str], tuple[dict[Any, Row], dict[Any, Memory]]] = {}
    files = [(path, *_peers_file(path)) for path in sorted(folder.glob("*.json"))]
    files.sort(key=lambda item: (item[1].date, not item[1].quick))
    for _, run, rows, memory in files:
        kept, held = places.setdefault(run.place, ({}, {}))
        kept |= {(row.suite, row.name): row for row in rows}
        held |= {(x.library, x.length): x for x in memory}
    found = {place: Measured(list(x.values()), list(y.values())) for place, (x, y) in places.items()}
    return dict(sorted(found.items(), key=lambda item: max(r.date for r in item[1].runs), reverse=True))


def _peers_file(path: Path) -> tuple[Run, list[Row], list[Memory]]:
    figures = _json(path)
    try:
        machine, missing = (_texts(figures[key]) for key in ("machine", "missing"))
        commit = _text(figures["commit"] or "unknown")
        run = Run(_text(figures["date"]), commit, bool(figures.get("quick")), machine, missing)
        _ = run.place
        rows = [_row(run, x) for x in figures.get("rows", [])]
        memory = [
            Memory(run, _text(x["library"]), int(x["length"]), [int(taken) for taken in x["bytes"]])
            for x in figures.get("memory", [])
        ]
        if not rows and not memory:
            key = "rows"
            raise KeyError(key)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _lacks(path, "peers.py or memory.py", error) from error
    return run, rows, memory


def _row(run: Run, x: dict[str, Any]) -> Row:
    rounds = [{_text(label): float(seconds) for label, seconds in taken.items()} for taken in x["rounds"]]
    labels = [label for label in rounds[0] if label not in (OURS, LIMIT)] if rounds else []
    ratios = {label: found for label in labels if (found := ratio(rounds, label))}
    return Row(run, *(_text(x[key]) for key in ("name", "suite", "group")), dict(x["case"]), float(x["work"]),
               rounds, ratios, _texts(x["troubles"]))  # fmt: skip


def _text(x: Any) -> str:
    if not isinstance(x, str):
        msg = f"{x!r}, which is no text"
        raise TypeError(msg)
    return x


def _texts(x: dict[str, str]) -> dict[str, str]:
    return {_text(key): _text(value) for key, value in x.items()}


def read_asv(folder: Path) -> list[Gauge]:
    """What asv tracked of `GAUGES`, oldest commit first."""
    found = []
    for path in sorted(folder.glob("*/*.json")):
        if path.name == "machine.json":
            continue
        figures = _json(path)
        try:
            columns = figures["result_columns"]
            threads = figures["env_vars"].get("NUMBA_NUM_THREADS", "all")
            for name in figures["results"].keys() & GAUGES.keys():
                row = dict(zip(columns, figures["results"][name], strict=False))
                keys = [", ".join(map(_plain, key)) for key in itertools.product(*row["params"])]
                for key, value in zip(keys, row["result"] or [], strict=False):
                    if value is not None and math.isfinite(value):
                        where = figures["params"]
                        # Who does not answer asv's questions has a name alone.
                        words = ", ".join(where[x] for x in ("cpu", "os") if where.get(x)) or where["machine"]
                        found.append(Gauge(name, figures["commit_hash"], int(figures["date"]), words, threads,
                                           key, float(value)))  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _lacks(path, "asv", error) from error
    return sorted(found, key=lambda x: (x.date, x.commit, x.threads, x.name))


def _plain(param: str) -> str:
    """asv keeps the repr."""
    return param.strip("'\"")


def mean(ratios: Iterable[Ratio]) -> float:
    """The geometric one."""
    return math.exp(statistics.fmean(math.log(x.median) for x in ratios))
