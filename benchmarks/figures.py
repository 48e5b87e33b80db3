"""The pictures of the report: panels as wide as a phone, which matplotlib draws as SVG with text as text.

The same numbers give the same bytes, and no two ids on the page are the same.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from .peers import Ratio

WIDTH, HEIGHT = 5.2, 3.8
"""Inches, of 72 units each: on a phone letters have the size that is set here."""
INK, FAINT, RULE = "#222222", "#6b6b6b", "#dddddd"


class Style(NamedTuple):
    """How one library is drawn and named."""

    colour: str
    marker: str
    words: str


STYLES = {
    "nbattn": Style("#0a3d91", "o", "nbattn"),
    "PyTorch": Style("#d1495b", "s", "PyTorch"),
    "PyTorch f32": Style("#d1495b", "d", "PyTorch in float32"),
    "PyTorch flex": Style("#d1495b", "P", "PyTorch, compiled flex_attention"),
    "ONNX Runtime": Style("#8a5a00", "8", "ONNX Runtime"),
    "ORT Attention": Style("#8a5a00", "^", "ONNX Runtime, Attention"),
    "ORT MHA": Style("#8a5a00", "v", "ONNX Runtime, MultiHeadAttention"),
    "ORT GQA": Style("#8a5a00", "<", "ONNX Runtime, GroupQueryAttention"),
    "ORT Softmax": Style("#8a5a00", ">", "ONNX Runtime, Softmax"),
    "OpenVINO": Style("#7b2d8b", "D", "OpenVINO"),
    "JAX": Style("#00798c", "X", "JAX"),
    "NumPy": Style("#55702f", "p", "NumPy"),
    "SciPy": Style("#55702f", "h", "SciPy"),
}
"""Colours that the colour-blind tell apart, and markers for those who see none."""
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nbattn",
    "font.size": 10.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def others(names: Sequence[str]) -> list[Style]:
    """For what is no library: a colour and a marker for each name."""
    looks = {style.colour: style.marker for style in reversed(STYLES.values())}
    known = itertools.cycle([*reversed(looks.items()), ("#777777", "v"), ("#e08e0b", "P")])
    return [Style(*next(known), name) for name in names]


class Missing(ModuleNotFoundError):
    """matplotlib is not installed."""


class Series(NamedTuple):
    """What one library has at each place: medians and spreads."""

    style: Style
    places: Sequence[int]
    found: Sequence[Ratio]


def canvas(height: float = HEIGHT) -> tuple[Any, Any]:
    """An empty figure and its axes."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        msg = 'pictures need matplotlib, which is not installed; pip install "nbattn[plot]"'
        raise Missing(msg, name="matplotlib") from error
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, axes


def curves(series: Sequence[Series], across: str, up: str, ticks: Sequence[int], *, log: bool = False) -> Any:
    """Lines over lengths, which double from tick to tick; a bar on each point is its spread."""
    figure, axes = canvas()
    for style, x, y in series:
        whiskers = [0 if math.isnan(v.spread) else v.spread for v in y]
        ours = style is STYLES["nbattn"]
        axes.errorbar(
            x, [v.median for v in y], None if log else whiskers, color=style.colour, marker=style.marker,
            markersize=5, linewidth=2.2 if ours else 1.2, elinewidth=0.8, zorder=3 if ours else 2,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    axes.set_xticks(ticks, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in ticks])
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    if log:
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_ylim(bottom=0)
    return figure


def strips(series: Sequence[tuple[Style, Sequence[float], float]]) -> Any:
    """For each peer a line of dots, one for each row, and its geometric mean; the scale is logarithmic."""
    figure, axes = canvas(1.0 + 0.34 * len(series))
    axes.axvline(1, color=INK, linewidth=1)
    for place, (style, ratios, mean) in enumerate(series):
        axes.plot(ratios, [place] * len(ratios), "|", color=style.colour, markersize=9, alpha=0.6)
        axes.plot([mean], [place], style.marker, color=style.colour, markersize=7, markeredgecolor="white")
    axes.set_xscale("log", base=2)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.45), max(high, 4.4))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_yticks(range(len(series)), [style.words for style, *_ in series])
    axes.set_ylim(len(series) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("the peer's time over nbattn's")
    return figure


def rates(names: Sequence[str], limits: Sequence[float], series: Sequence[Series], across: str) -> Any:
    """For each row a line of markers, one for each library, and a black stroke for the machine's limit."""
    figure, axes = canvas(1.0 + 0.36 * len(names))
    for style, places, x in series:
        whiskers = [0 if math.isnan(v.spread) else v.spread for v in x]
        ours = style is STYLES["nbattn"]
        axes.errorbar(
            [v.median for v in x], places, xerr=whiskers, color=style.colour, marker=style.marker,
            markersize=7 if ours else 5, linestyle="", elinewidth=0.8, zorder=3 if ours else 2,
        )  # fmt: skip
    axes.plot(limits, range(len(names)), "|", color=INK, markersize=17, markeredgewidth=1.6)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(across)
    return figure


def history(commits: Sequence[str], series: Sequence[tuple[Style, Sequence[tuple[int, float]]]]) -> Any:
    """Shares by commit, oldest at the left."""
    figure, axes = canvas()
    for style, points in series:
        axes.plot(
            *zip(*points, strict=True), color=style.colour, marker=style.marker, markersize=5, linewidth=1.4
        )
    axes.set_xticks(range(len(commits)), commits, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("commit")
    axes.set_ylabel("share")
    return figure


def svg(figure: Any, name: str, description: str) -> str:
    """The picture for a page, ids beginning with `name`."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"(font: [^;\"]*?px) [^;\"]+", r"\1 system-ui, sans-serif", text)
    width, height = (72 * inches for inches in figure.get_size_inches())
    head = f'<svg class="panel" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{description}">'
    return re.sub(r"\n\s*", "\n", re.sub(r"<svg[^>]*>", head, text, count=1)).strip()


def mark(style: Style) -> str:
    """A line and a marker, for the legend."""
    from matplotlib.markers import MarkerStyle

    marker = MarkerStyle(style.marker)
    path = marker.get_path().transformed(marker.get_transform())
    points = " ".join(f"{12 + 9 * x:.1f},{7 - 9 * y:.1f}" for x, y in path.to_polygons()[0].tolist())
    return (
        '<svg class="mark" viewBox="0 0 24 14" aria-hidden="true">'
        f'<path d="M0 7H24" stroke="{style.colour}" stroke-width="1.5"/>'
        f'<polygon points="{points}" fill="{style.colour}"/></svg>'
    )
