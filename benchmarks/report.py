"""One page of what was measured: `python -m benchmarks.report`.

It reads what `peers.py` and `memory.py` wrote to `benchmarks/results/peers`, and asv to
`benchmarks/results/asv`, and writes `benchmarks/results/report.html`: figures, a table beside each, and in
words where, when and of which versions. What has no results is left out, in a sentence. The same results
give the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from . import figures, parts
from .measured import BrokenFile, Gauge, Measured, read_asv, read_peers, unique
from .parts import Part, Table

RESULTS = Path(__file__).parent / "results"

STYLE = """
body {
  font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
  margin: 0 auto; padding: 1rem; max-width: 76rem;
}
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.3rem; margin: 2rem 0 0; padding-top: 1rem; border-top: 2px solid #0a3d91; }
h3 { font-size: 1.15rem; margin: 2rem 0 0.3rem; }
p { max-width: 48rem; margin: 0.4rem 0; }
.small { color: #555; font-size: 0.9rem; margin-top: 2rem; }
.panels {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr));
  gap: 1rem 1.5rem; align-items: start; margin: 0.8rem 0;
}
figure { margin: 0; max-width: 30rem; }
figcaption { font-weight: 600; font-size: 0.95rem; }
.panel { display: block; width: 100%; height: auto; }
.legend {
  list-style: none; display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem;
  margin: 0.6rem 0; padding: 0; font-size: 0.9rem;
}
.mark { width: 24px; height: 14px; margin-right: 0.4rem; vertical-align: -1px; }
.scroll { overflow-x: auto; margin: 0.6rem 0; }
table {
  border-collapse: separate; border-spacing: 0; font-size: 0.85rem; font-variant-numeric: tabular-nums;
}
caption { text-align: left; font-weight: 600; padding: 0.3rem 0; }
th, td {
  padding: 0.2rem 0.6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: bottom;
}
td { white-space: nowrap; }
th:first-child { text-align: left; }
thead th { border-bottom: 2px solid #888; min-width: 4rem; max-width: 12rem; }
tbody th { font-weight: 400; }
th:first-child { position: sticky; left: 0; background: #fff; min-width: 8rem; max-width: 16rem; }
summary { cursor: pointer; color: #0a3d91; margin: 0.4rem 0; }
"""
INTRO = """Attention on NumPy arrays, beside what a user would pick instead, and beside what the machine
could do at most. The machines are shared with others and noisy: a ratio within one run, in which all took
turns, holds better than any time."""
AGAIN = "<code>python -m benchmarks.report</code> makes this page of <code>benchmarks/results</code>."


def table(content: Table) -> str:
    head = "".join(f'<th scope="col">{escape(x)}</th>' for x in content.header)
    lines = [
        f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(x)}</td>" for x in rest) + "</tr>"
        for first, *rest in content.lines
    ]
    return "\n".join([
        f'<div class="scroll" tabindex="0"><table><caption>{escape(content.caption)}</caption>',
        f"<thead><tr>{head}</tr></thead>", "<tbody>", *lines, "</tbody></table></div>",
    ])  # fmt: skip


def section(part: Part, prefix: str) -> str:
    """One part; ids in its pictures begin with `prefix`."""
    lines = [f"<section><h3>{escape(part.title)}</h3>", f"<p>{escape(part.words)}</p>"]
    if part.styles:
        marks = (f"<li>{figures.mark(style)}{escape(style.words)}</li>" for style in part.styles)
        lines.append(f'<ul class="legend">{"".join(marks)}</ul>')
    if part.panels:
        lines.append('<div class="panels">')
        for i, (title, figure, told) in enumerate(part.panels):
            picture = figures.svg(figure, f"{prefix}-{i}", escape(told))
            lines.append(f"<figure><figcaption>{escape(title)}</figcaption>\n{picture}</figure>")
        lines += ["</div>", "<details><summary>The numbers as a table</summary>"]
    lines += map(table, part.tables)
    return "\n".join([*lines, "</details>" if part.panels else "", "</section>"])


def machine(measured: Measured) -> str:
    """Where, when and of what, in words."""
    runs = sorted(measured.runs, key=lambda run: run.date)
    versions = {k: v for run in runs for k, v in run.machine.items() if k not in ("CPU", "threads")}
    dates = " to ".join(unique((runs[0].date, runs[-1].date)))
    of = [(x.run.commit, x.suite) for x in measured.rows] + [
        (x.run.commit, "memory") for x in measured.memory
    ]
    commits = ", ".join(
        f"{commit} ({', '.join(unique(suite for known, suite in of if known == commit))})"
        for commit in unique(run.commit for run in runs)
    )
    left = unique(f"{name} ({why})" for run in runs for name, why in run.missing.items())
    where, threads = runs[0].place
    lines = [
        f"<h2>{escape(where)}, {escape(threads)} threads</h2>",
        f"<p>Measured {dates}, the library as of commit {escape(commits)}, with "
        f"{escape(', '.join(f'{k} {v}' for k, v in versions.items()))}.</p>",
        f"<p>Not there: {escape('; '.join(left))}.</p>" if left else "",
    ]
    return "\n".join(filter(None, lines))


def page(places: Iterable[Measured], gauges: Sequence[Gauge]) -> str:
    """All of it."""
    makers = (parts.in_short, parts.share_of_peak, parts.ratios, parts.decode, parts.memory)
    body = []
    for i, measured in enumerate(places):
        body.append(machine(measured))
        body += [section(make(measured), f"m{i}-{make.__name__}") for make in makers]
    body += ["<h2>History</h2>", section(parts.history(gauges), "asv")]
    return "\n".join([
        "<!doctype html>", '<html lang="en">', '<head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "<title>nbattn, measured</title>", f"<style>{STYLE}</style></head>", "<body>",
        "<h1>nbattn, measured</h1>", f"<p>{INTRO}</p>", *body, f'<p class="small">{AGAIN}</p>',
        "</body>", "</html>", "",
    ])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; 2 after one sentence where that cannot be."""
    parser = argparse.ArgumentParser(prog="report.py", description="Write one page of what was measured.")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in that folder")
    options = parser.parse_args(argv)
    out = options.out or options.results / "report.html"
    try:
        places, gauges = read_peers(options.results / "peers"), read_asv(options.results / "asv")
        if not places and not gauges:
            msg = f"{options.results} holds no results; python benchmarks/peers.py --json FILE makes some"
            raise FileNotFoundError(msg)
        text = page(places.values(), gauges)
        out.write_text(text, encoding="utf-8")
    except (BrokenFile, figures.Missing, OSError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {len(text.encode()) / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
