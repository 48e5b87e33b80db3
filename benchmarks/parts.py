"""The parts of the report: each in words, in panels, and in tables of the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from . import figures
from .cases import SHORT
from .figures import STYLES, Series, Style
from .measured import GAUGES, Gauge, Measured, Row, mean, unique
from .peers import LIMIT, OURS, Ratio, spread_of

BIG = 5e7
"""Bytes of keys and values that no cache holds."""
GROUPS: dict[str, Callable[[Row], bool]] = {
    "Prefill, float32": lambda row: row.suite == "prefill" and row.group == "float32",
    "Prefill, bfloat16, float16 and float64": lambda row: row.suite == "prefill" and row.group != "float32",
    "Decode": lambda row: row.suite == "decode",
    "Softmax": lambda row: row.suite == "softmax",
    "Other kinds of attention": lambda row: row.suite == "variants",
    "Trained models": lambda row: row.suite == "models",
}


class Panel(NamedTuple):
    """A picture, and what it says to those who do not see it."""

    title: str
    figure: Any
    told: str


class Table(NamedTuple):
    caption: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]


class Part(NamedTuple):
    title: str
    words: str
    styles: Sequence[Style] = ()
    panels: Sequence[Panel] = ()
    tables: Sequence[Table] = ()


def absent(title: str, how: str) -> Part:
    return Part(title, f"Left out, as there are no results of it: {how}")


def in_order(labels: Iterable[str]) -> list[str]:
    present = set(labels)
    return [label for label in STYLES if label in present]


def words_of(labels: Iterable[str]) -> list[str]:
    return [STYLES[label].words for label in labels]


def cell(value: Ratio | None, trouble: str | None = None, digits: int = 2) -> str:
    """As 1.23 ±0.04; a single round has no spread."""
    if trouble:
        return "wrong" if "wrong" in trouble else "failed"
    if value is None:
        return ""
    spread = "" if math.isnan(value.spread) else f" ±{value.spread:.{digits}f}"
    return f"{value.median:.{digits}f}{spread}"


def points(label: str, found: Iterable[tuple[int, Ratio | None]]) -> Series:
    """Of those places that have a value."""
    known = [(place, value) for place, value in found if value is not None]
    return Series(STYLES[label], [place for place, _ in known], [value for _, value in known])


def in_short(measured: Measured) -> Part:
    title = "In short"
    groups = {name: [row for row in measured.rows if row.peers and of(row)] for name, of in GROUPS.items()}
    groups = {name: rows for name, rows in groups.items() if rows}
    if not groups:
        return absent(title, "python benchmarks/peers.py --quick --json FILE measures them.")
    best = [[min(row.ratios[p] for p in row.peers) for row in rows] for rows in groups.values()]
    lines = [
        ["the fastest peer of each row", *(f"{mean(some):.1f}" for some in best)],
        *(
            [
                STYLES[p].words,
                *(_average([r.ratios[p] for r in rows if p in r.ratios]) for rows in groups.values()),
            ]
            for p in in_order(label for rows in groups.values() for row in rows for label in row.peers)
        ),
        ["rows", *(str(len(some)) for some in best)],
        ["rows in which a peer is ahead", *(str(sum(x.median < 1 for x in some)) for some in best)],
    ]
    words = (
        "How many times as fast as its peers nbattn is: geometric means over the rows that stand below. "
        "Empty: the peer lacks the operation."
    )
    return Part(title, words, tables=[Table("Geometric means of time over nbattn's", ["", *groups], lines)])


def _average(some: list[Ratio]) -> str:
    return f"{mean(some):.1f}" if some else ""


def share_of_peak(measured: Measured) -> Part:
    title = "Fraction of the processor's peak, by size"
    rows = [r for r in measured.rows if r.suite == "prefill" and not r.case["feature"] and r.rounds]
    if not rows:
        return absent(title, "python benchmarks/peers.py --suite prefill --json FILE measures it.")
    rows.sort(key=_by_size)
    panels, drawn = [], set()
    for causal, name in ((False, "float32, all pairs"), (True, "float32, causal")):
        some = [
            r
            for r in rows
            if r.group == "float32" and r.case["head_dim"] == 64 and r.case["causal"] == causal
        ]
        if not some:
            continue
        some.sort(key=lambda r: -r.case["heads"])  # of two rows of a length the one of fewer heads stays
        by_length = dict(sorted({r.case["length"]: r for r in some}.items()))
        labels = in_order(label for r in by_length.values() for label in r.labels)
        series = [points(x, ((n, r.share(x)) for n, r in by_length.items())) for x in labels]
        told = ", ".join(f"{share.median:.2f} at {n}" for n, share in zip(*series[0][1:], strict=True))
        figure = figures.curves(series, "positions", "share of the peak", list(by_length))
        panels.append(Panel(name, figure, f"{name}: nbattn's share of the peak is {told} positions."))
        drawn |= set(labels)
    labels = in_order(label for r in rows for label in r.labels)
    lines = [[r.name, cell(r.rate(OURS), digits=1), *(cell(r.share(x)) for x in labels)] for r in rows]
    words = (
        "The multiply-adds of attention in a second, beside the most that the processor did in registers in "
        "the same rounds: no library can reach more than 1. What lies above it says that the machine was "
        "slower while its peak was measured. Heads of 64 numbers, 8 of them (16 where the table has no row "
        "of 8); a causal mask halves the work. Bars: half the interquartile range over the rounds."
    )
    header = ["dtype, heads x positions x head_dim", "nbattn, GFLOP/s", *words_of(labels)]
    table = Table("Share of the processor's peak", header, lines)
    return Part(title, words, [STYLES[x] for x in in_order(drawn)], panels, [table])


def _by_size(row: Row) -> tuple[Any, ...]:
    case = row.case
    kind = list(SHORT).index(case["dtype"]), case["products"] or ""
    return *kind, case["head_dim"], case["length"], case["heads"], case["causal"]


def ratios(measured: Measured) -> Part:
    title, panels, tables = "Ratio to each peer", [], []
    for name, chosen in GROUPS.items():
        rows = [row for row in measured.rows if chosen(row)]
        peers = in_order(label for row in rows for label in (*row.peers, *row.troubles))
        found = {p: [row.ratios[p] for row in rows if p in row.ratios] for p in peers}
        lanes = [(STYLES[p], [x.median for x in some], mean(some)) for p, some in found.items() if some]
        if not lanes:
            continue
        told = ", ".join(f"{style.words} {average:.2f}" for style, _, average in lanes)
        panels.append(Panel(name, figures.strips(lanes), f"{name}, geometric means: {told}."))
        lines = [
            [
                row.name,
                f"{1e3 * row.seconds(OURS):.3g}" if row.rounds else "wrong",
                *(cell(row.ratios.get(p), row.troubles.get(p)) for p in peers),
            ]
            for row in rows
        ]
        tables.append(Table(f"{name}: time over nbattn's", ["row", "nbattn, ms", *words_of(peers)], lines))
    if not panels:
        return absent(title, "python benchmarks/peers.py --json FILE measures it beside the installed peers.")
    words = (
        "A peer's time over nbattn's: right of 1 nbattn is faster, left of it the peer. A stroke is one "
        "row, the marker the geometric mean of all. They computed the same on the same inputs, were held to "
        "float64 before, and took turns. The tables have the median over the rounds ± half the "
        "interquartile range; without a ± the peer was so much slower that it sat out all rounds but the "
        "first. Empty: the peer lacks it."
    )
    return Part(title, words, (), panels, tables)


def decode(measured: Measured) -> Part:
    title = "Decode bandwidth"
    rows = [r for r in measured.rows if r.suite == "decode" and r.rounds]
    rows = [r for r in rows if r.case["operation"] == "decode"]
    if not rows:
        return absent(title, "python benchmarks/peers.py --suite decode --json FILE measures it.")
    panels, labels = [], in_order(label for r in rows for label in r.labels)
    for name, big in (
        ("One query over more than any cache holds", True),
        ("Fewer keys, or several queries", False),
    ):
        if some := [r for r in rows if (r.work >= BIG) == big]:
            names = [_asked(r) for r in some]
            series = [points(x, ((i, r.rate(x)) for i, r in enumerate(some))) for x in labels]
            limits = [r.rate(LIMIT).median for r in some]
            told = ", ".join(f"{a} {r.rate(OURS).median:.1f}" for a, r in zip(names, some, strict=True))
            figure = figures.rates(names, limits, [s for s in series if s.places], "GB/s")
            panels.append(Panel(name, figure, f"{name}, GB/s of nbattn: {told}."))
    lines = [
        [
            row.name,
            cell(row.rate(LIMIT), digits=1),
            *(cell(row.rate(x), digits=1) for x in labels),
            cell(row.share(OURS)),
        ]
        for row in rows
    ]
    words = (
        "The bytes of keys and values, each read once, over the time of a step. The black stroke is how "
        "fast this machine read 512 MB in the same rounds, all threads together. Bars: half the "
        "interquartile range."
    )
    header = [
        "stored, query heads / heads x keys x head_dim",
        "read rate",
        *words_of(labels),
        "nbattn's share",
    ]
    return Part(title, words, [STYLES[x] for x in labels], panels, [Table("Decode, GB/s", header, lines)])


def _asked(row: Row) -> str:
    """What is stored, and what is asked of it."""
    case = row.case
    keys = "" if row.work >= BIG else f"{case['keys']} keys"
    few = f"{case['queries']} queries" if case["queries"] > 1 else ""
    return ", ".join(filter(None, [case["dtype"], f"{case['heads']} heads", keys, few, case["kept"]]))


def memory(measured: Measured) -> Part:
    title = "Memory by length"
    if not measured.memory:
        return absent(title, "python -m benchmarks.memory --json FILE measures it, on Linux.")
    labels, lengths = (
        in_order(x.library for x in measured.memory),
        sorted({x.length for x in measured.memory}),
    )
    found = {(x.library, x.length): spread_of([b / 1e6 for b in x.taken]) for x in measured.memory}
    series = [points(x, ((n, found.get((x, n))) for n in lengths)) for x in labels]
    told = ", ".join(f"{s.style.words} {s.found[-1].median:.1f} MB at {s.places[-1]}" for s in series)
    name = "float32, one head of 64 numbers"
    figure = figures.curves(series, "positions", "MB", lengths, log=True)
    words = (
        "What a call takes at its peak beyond its inputs and its result, each in a process of its own; both "
        "scales are logarithmic. Who keeps all scores needs four times as much for twice the length. The "
        f"table has the median of {len(measured.memory[0].taken)} processes ± half the interquartile range."
    )
    lines = [[str(n), *(cell(found.get((x, n)), digits=1) for x in labels)] for n in lengths]
    table = Table("MB beyond inputs and result", ["positions", *words_of(labels)], lines)
    return Part(
        title, words, [s.style for s in series], [Panel(name, figure, f"{name}: {told} positions.")], [table]
    )


def history(gauges: Sequence[Gauge]) -> Part:
    title = "Over the commits"
    if not gauges:
        return absent(title, "asv run makes them, and asv publish draws all that it measures.")
    panels, tables = [], []
    params = unique(x.params for x in gauges)
    styles = dict(zip(params, figures.others(params), strict=True))
    for name, some in _places(gauges):
        commits, drawn = unique(x.commit for x in some), unique(x.params for x in some)
        found = {(x.params, x.commit): x.value for x in some}
        lanes = [
            (styles[p], [(i, found[p, c]) for i, c in enumerate(commits) if (p, c) in found]) for p in drawn
        ]
        told = ", ".join(f"{style.words} {known[-1][1]:.2f}" for style, known in lanes)
        shown = [c[:8] for c in commits]
        panels.append(Panel(name, figures.history(shown, lanes), f"{name}, at the last commit: {told}."))
        lines = [[c[:8], *(f"{found[p, c]:.2f}" if (p, c) in found else "" for p in drawn)] for c in commits]
        tables.append(Table(name, ["commit", *drawn], lines))
    words = (
        "What asv measured of each commit that it ran, oldest first. The machine is shared: where all lines "
        "go up or down together, it may be the machine."
    )
    return Part(title, words, list(styles.values()), panels, tables)


def _places(gauges: Sequence[Gauge]) -> Iterator[tuple[str, list[Gauge]]]:
    """What stays comparable: one number, of one machine and number of threads."""
    for machine, threads in unique((x.machine, x.threads) for x in gauges):
        for name, words in GAUGES.items():
            some = [x for x in gauges if (x.machine, x.threads, x.name) == (machine, threads, name)]
            if some:
                yield f"{words}; {threads} threads, {machine}", some
