"""Pictures, by matplotlib, which is imported when one is made. They need no display."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

FONTS = ("Noto Sans CJK JP", "IPAexGothic", "IPAGothic", "TakaoGothic", "VL Gothic", "WenQuanYi Zen Hei",
         "Hiragino Sans", "Yu Gothic", "MS Gothic", "Arial Unicode MS")  # fmt: skip
"""Where characters that matplotlib's own font lacks may be."""


def attention_map(
    weights: ArrayLike, rows: Sequence[str], columns: Sequence[str], *, title: str = "", most: float = 1.0
) -> Any:
    """Attention weights as a heat map with a label for each query and key.

    Parameters
    ----------
    weights : array_like, shape (queries, keys)
        From 0, white, to `most`, dark.
    rows, columns : sequence of str
        The queries' and the keys' labels. Where no font has a character, its name stands for it.
    title : str
    most : float

    Returns
    -------
    matplotlib.figure.Figure
        It has ``savefig``; no window opens.

    Raises
    ------
    ModuleNotFoundError
        Without matplotlib; the message holds the command that installs it.
    ValueError
        For shapes and labels that do not fit.

    Examples
    --------
    >>> from nbattn.plot import attention_map
    >>> figure = attention_map([[0.0, 1.0]], ["ア"], ["^", "a"])  # doctest: +SKIP
    >>> figure.savefig("align.png")  # doctest: +SKIP
    """
    array = np.asarray(weights, dtype=float)
    if array.shape != (len(rows), len(columns)):
        msg = f"weights has shape {array.shape}; expected ({len(rows)}, {len(columns)}), one for each label"
        raise ValueError(msg)
    widest = max(map(len, rows), default=0)
    figure = _figure((1.5 + 0.35 * len(columns) + 0.09 * widest, 1.2 + 0.35 * len(rows)))
    axes = figure.add_subplot()
    image = axes.imshow(array, vmin=0, vmax=most, cmap="Blues", aspect="equal", interpolation="nearest")
    families = ["DejaVu Sans", *_installed()]
    texts = [[_printable(label) for label in labels] for labels in (rows, columns)]
    axes.set_yticks(range(len(rows)), texts[0], family=families)
    axes.set_xticks(range(len(columns)), texts[1], family=families)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    if title:
        axes.set_title(_printable(title), family=families)
    figure.colorbar(image, ax=axes, label="attention")
    return figure


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        msg = 'pictures need matplotlib, which is not installed; pip install "nbattn[plot]"'
        raise ModuleNotFoundError(msg, name="matplotlib") from error
    return Figure(figsize=size, layout="constrained")


@cache
def _installed() -> tuple[str, ...]:
    """Those of `FONTS` that there are."""
    from matplotlib.font_manager import fontManager

    have = set(fontManager.get_font_names())
    return tuple(name for name in FONTS if name in have)


@cache
def _has(character: str) -> bool:
    from matplotlib.font_manager import findfont, get_font

    return any(
        get_font(findfont(name)).get_char_index(ord(character)) for name in ("DejaVu Sans", *_installed())
    )


def _printable(label: str) -> str:
    """The label, with names for characters that no font has: "スィ" as "SUi"."""
    return "".join(c if c.isspace() or _has(c) else _name(c) for c in label)


def _name(character: str) -> str:
    name = unicodedata.name(character, "?")
    last = name.rpartition(" ")[2]
    return {"MARK": "-"}.get(last, last.lower() if " SMALL " in name else last)
