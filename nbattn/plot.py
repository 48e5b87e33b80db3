"""Pictures, by matplotlib, which is imported when one is made. They need no display."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import check
from .block_mask import BlockMask
from .reference.masks import BLOCK, PARTIAL

FONTS = ("Noto Sans CJK JP", "IPAexGothic", "IPAGothic", "TakaoGothic", "VL Gothic", "WenQuanYi Zen Hei",
         "Hiragino Sans", "Yu Gothic", "MS Gothic", "Arial Unicode MS")  # fmt: skip
"""Where characters that matplotlib's own font lacks may be."""
COLOURS = {
    "skipped block": (228, 228, 228),
    "hidden": (255, 255, 255),
    "seen": (66, 146, 198),
    "whole block": (8, 81, 156),
    "partial block": (158, 202, 225),
}
"""Of what `mask_map` draws."""
SKIPPED, HIDDEN, SEEN, WHOLE, SOME = range(len(COLOURS))
MOST_ELEMENTS = 2048
"""The longest mask that is drawn element by element."""
MOST_PIXELS = 2000
"""The longest side of a picture that is drawn pixel by pixel."""
CELL, LETTER = 0.35, 0.09
"""In inches, the side of a cell with a label, and the width of a letter."""
MOST_LETTERS = 3
"""Of labels beside one another."""


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
    _need()
    width, height = (max(CELL * len(labels), 0.7) for labels in (columns, rows))
    left, above = LETTER * _longest(rows), _above(columns, title)
    figure = _figure((max(1.2 + left + width, 0.12 * len(_printable(title))), 0.3 + above + height))
    axes = figure.add_subplot()
    # As large as there is room for: "equal" would leave some, and cut off labels that it has not seen.
    image = axes.imshow(array, vmin=0, vmax=most, cmap="Blues", aspect="auto", interpolation="nearest")
    _label(axes, rows, columns)
    if title:
        figure.suptitle(_printable(title), family=_families())
    _scale(figure, image, axes, height)
    return figure


def head_grid(
    weights: ArrayLike,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    *,
    title: str = "",
) -> Any:
    """The attention weights of every head as a heat map each, all on one scale.

    Parameters
    ----------
    weights : array_like, shape (heads, queries, keys)
        From 0, white, to the largest of them, dark.
    rows, columns : sequence of str, optional
        The queries' and the keys' labels, which the maps at the left and at the top get.
    title : str

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ModuleNotFoundError
        Without matplotlib.
    ValueError
        For shapes and labels that do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.plot import head_grid
    >>> head_grid(np.eye(4)[None].repeat(6, axis=0)).savefig("heads.png")  # doctest: +SKIP
    """
    array = np.asarray(weights, dtype=float)
    if array.ndim != 3 or not array.size:
        msg = f"weights has shape {array.shape}; expected (heads, queries, keys), none of them 0"
        raise ValueError(msg)
    for name, labels, count in (("rows", rows, array.shape[1]), ("columns", columns, array.shape[2])):
        if labels is not None and len(labels) != count:
            msg = f"{name} has {len(labels)} labels; expected {count}, as weights has shape {array.shape}"
            raise ValueError(msg)
    _need()
    wide = math.ceil(math.sqrt(len(array)))
    high = -(-len(array) // wide)
    # A map's sides in inches: room for labels where there are any.
    height, width = (
        min(max(1.6, 0.3 * n), 8.0) if labels else min(max(1.6, 0.03 * n), 3.0)
        for labels, n in ((rows, array.shape[1]), (columns, array.shape[2]))
    )
    left, above = LETTER * _longest(rows or ()), _above(columns or (), title)
    figure = _figure((1.2 + left + wide * (width + 0.3), 0.2 + above + high * (height + 0.5)))
    grid = figure.subplots(high, wide, squeeze=False)
    top = float(array.max()) or 1.0
    for head, axes in enumerate(grid.flat):
        if head >= len(array):
            axes.set_axis_off()
            continue
        image = axes.imshow(
            array[head], vmin=0, vmax=top, cmap="Blues", aspect="auto", interpolation="nearest"
        )
        _label(axes, (rows or ()) if head % wide == 0 else (), (columns or ()) if head < wide else ())
        axes.set_xlabel(f"head {head}")
    if title:
        figure.suptitle(_printable(title), family=_families())
    _scale(figure, image, grid, high * (height + 0.5))
    return figure


def overlay(image: ArrayLike, maps: Mapping[str, ArrayLike]) -> Any:
    """A picture, and beside it the same under each of some maps.

    Parameters
    ----------
    image : array_like of uint8, shape (height, width) or (height, width, 3)
        Under the maps its colours are left away.
    maps : mapping of str to array_like, shape (rows, columns)
        By title. Each is stretched over the picture, and goes from its least number, where the picture is as
        it was, to its largest, yellow.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ModuleNotFoundError
        Without matplotlib.
    TypeError, ValueError
        For dtypes and shapes that are no picture and no maps.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.plot import overlay
    >>> figure = overlay(np.zeros((20, 30), np.uint8), {"attention": np.eye(4)})  # doctest: +SKIP
    >>> figure.savefig("look.png")  # doctest: +SKIP
    """
    picture = np.asarray(image)
    if picture.dtype != np.uint8:
        msg = f"image has dtype {picture.dtype}; expected uint8"
        raise TypeError(msg)
    if picture.ndim not in (2, 3) or picture.shape[2:] not in ((), (3,)) or not picture.size:
        msg = f"image has shape {picture.shape}; expected (height, width) or (height, width, 3)"
        raise ValueError(msg)
    arrays = {title: np.asarray(array, dtype=float) for title, array in maps.items()}
    for title, array in arrays.items():
        if array.ndim != 2 or not array.size or not np.isfinite(array).all():
            msg = f"the map {title!r} has shape {array.shape}; expected (rows, columns) of finite numbers"
            raise ValueError(msg)
    height, width = picture.shape[:2]
    # Of a large picture every nth pixel: more are not seen, but take gigabytes and a minute.
    step = -(-max(height, width) // MOST_PIXELS)
    picture, extent = picture[::step, ::step], (-0.5, width - 0.5, height - 0.5, -0.5)
    side = 4.0 / max(height, width)
    panels = 1 + len(arrays)
    figure = _figure((panels * (max(width * side, 1.0) + 0.9), max(height * side, 1.0) + 0.7))
    first, *others = figure.subplots(1, panels, squeeze=False)[0]
    first.imshow(picture, cmap="gray", vmin=0, vmax=255, extent=extent)
    grey = picture if picture.ndim == 2 else picture @ np.array([0.299, 0.587, 0.114])
    for axes, (title, array) in zip(others, arrays.items(), strict=True):
        axes.imshow(grey, cmap="gray", vmin=0, vmax=255, extent=extent)
        least, span = array.min(), np.ptp(array) or 1.0
        share = (array - least) / span
        drawn = axes.imshow(
            array, vmin=least, vmax=least + span, cmap="inferno", alpha=0.85 * share**0.5,
            extent=extent, interpolation="nearest",
        )  # fmt: skip
        _entitle(axes, title)
        figure.colorbar(drawn, ax=axes, shrink=0.8).solids.set_alpha(1)
    for axes in (first, *others):
        axes.set_axis_off()
    return figure


def mask_map(mask: ArrayLike | BlockMask, *, batch: int = 0, head: int = 0, title: str = "") -> Any:
    """Which query sees which key; of a `BlockMask` also which blocks attention skips.

    Parameters
    ----------
    mask : BlockMask, or array_like of bool or int, shape (Sq, Sk), (H, Sq, Sk) or (B, H, Sq, Sk)
        Beyond 2048 queries or keys, its blocks of 64 x 64 are drawn in place of its elements.
    batch, head : int
        Which of several; where the mask has one for all, that.
    title : str

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ModuleNotFoundError
        Without matplotlib.
    TypeError, ValueError
        For what is no mask, and for a batch or head that there is not.

    Examples
    --------
    >>> from nbattn import masks
    >>> from nbattn.plot import mask_map
    >>> mask_map(masks.sliding_window(512, left=100, right=0)).savefig("a.png")  # doctest: +SKIP
    """
    blocks = mask if isinstance(mask, BlockMask) else BlockMask.from_dense(mask)
    b, h, queries, keys = (
        _chosen(batch, "batch", blocks.shape[0]),
        _chosen(head, "head", blocks.shape[1]),
        *blocks.shape[2:],
    )
    if not blocks.table.size:
        msg = f"mask has shape {blocks.shape}; expected at least one query and key"
        raise ValueError(msg)
    cells = np.choose(np.minimum(blocks.table[b, h], PARTIAL), (SKIPPED, WHOLE, SOME))
    step = 1 if max(queries, keys) <= MOST_ELEMENTS else BLOCK
    if step == 1:
        alone = BlockMask(blocks.table[b : b + 1, h : h + 1], blocks.words, queries, keys)
        elements = np.where(alone.to_dense()[0, 0], SEEN, HIDDEN)
        cells = cells.repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)[:queries, :keys]
        cells = np.where(cells == SOME, elements, cells) if blocks is mask else elements
    side = 5.0 / max(queries, keys)
    figure = _figure((max(keys * side, 1.5) + 0.8, max(queries * side, 1.5) + 1.2))
    axes = figure.add_subplot()
    edges = (-0.5, step * cells.shape[1] - 0.5, step * cells.shape[0] - 0.5, -0.5)
    axes.imshow(np.array(list(COLOURS.values()), np.uint8)[cells], extent=edges, aspect="auto")
    axes.set(xlim=(-0.5, keys - 0.5), ylim=(queries - 0.5, -0.5), xlabel="key", ylabel="query")
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    _entitle(axes, title)
    _explain(figure, [kind for i, kind in enumerate(COLOURS) if (cells == i).any()])
    return figure


def _chosen(index: int, name: str, count: int) -> int:
    """Where in a mask of so many of them it lies; one serves all."""
    n = check.check_int(index, name)
    if n < 0 or (n >= count and count != 1):
        msg = f"{name} is {n}; expected 0 to {count - 1}, as the mask has {count}"
        raise ValueError(msg)
    return 0 if count == 1 else n


def _explain(figure: Any, kinds: Sequence[str]) -> None:
    """A legend below."""
    from matplotlib.patches import Patch

    colours = {kind: "#{:02x}{:02x}{:02x}".format(*COLOURS[kind]) for kind in kinds}
    patches = [Patch(facecolor=colours[kind], edgecolor="grey", label=kind) for kind in kinds]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(kinds), frameon=False)


def _scale(figure: Any, image: Any, axes: Any, height: float) -> None:
    """The colours' meaning, a slim bar as high as some axes of so many inches, but no higher than four."""
    length = min(height, 4.0)
    bar = {"shrink": length / height, "aspect": length / 0.15, "anchor": (0.0, 1.0)}
    figure.colorbar(image, ax=axes, label="attention", **bar)


def _longest(labels: Sequence[str]) -> int:
    return max((len(_printable(label)) for label in labels), default=0)


def _above(columns: Sequence[str], title: str) -> float:
    """The inches that the columns' labels and the title take."""
    labels = LETTER * _longest(columns) if _upright(columns) else 0.2
    return (labels if columns else 0) + (0.3 if title else 0)


def _upright(columns: Sequence[str]) -> bool:
    """Whether the labels are too long to stand side by side, and are written from below to above."""
    return _longest(columns) > MOST_LETTERS


def _label(axes: Any, rows: Sequence[str], columns: Sequence[str]) -> None:
    """A label for each query at the left and for each key at the top."""
    for put, labels, angle in (
        (axes.set_yticks, rows, 0),
        (axes.set_xticks, columns, 90 if _upright(columns) else 0),
    ):
        put(range(len(labels)), [_printable(label) for label in labels], family=_families(), rotation=angle)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)


def _entitle(axes: Any, title: str) -> None:
    if title:
        axes.set_title(_printable(title), family=_families())


def _families() -> list[str]:
    return ["DejaVu Sans", *_installed()]


def _figure(size: tuple[float, float]) -> Any:
    _need()
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _need() -> None:
    """ModuleNotFoundError without matplotlib."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        msg = 'pictures need matplotlib, which is not installed; pip install "nbattn[plot]"'
        raise ModuleNotFoundError(msg, name="matplotlib") from error


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
