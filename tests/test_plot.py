"""Pictures, looked at pixel by pixel."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from nbattn import BlockMask, masks, plot

MATPLOTLIB = 'needs matplotlib: pip install "nbattn[plot]"'


@pytest.fixture
def attention_map():
    pytest.importorskip("matplotlib", reason=MATPLOTLIB)
    return plot.attention_map


def pixels(figure, panel=0):
    """The picture (rows, columns, 3), and the colour at a point of one of its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)

    def place(column, row):
        x, y = figure.axes[panel].transData.transform((column, row))
        return image[len(image) - 1 - int(y), int(x)]

    return image, place


class TestAttentionMap:
    WEIGHTS = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])

    def test_cells(self, attention_map):
        image, place = pixels(attention_map(self.WEIGHTS, ["a", "b"], ["x", "y", "z"]))
        dark = np.array([[place(c, r).sum() for c in range(3)] for r in range(2)])
        assert dark[0, 0] < dark[1, 0] < dark[0, 1]
        assert dark[1, 0] == dark[1, 1]
        assert dark[0, 1] == dark[0, 2] == dark[1, 2]
        # 0 is nearly white, 1 a dark blue.
        assert place(1, 0).min() > 240
        red, _, blue = place(0, 0)
        assert red < 60 < blue
        # A cell is of one colour, up to its border.
        np.testing.assert_array_equal(place(-0.4, -0.4), place(0.4, 0.4))
        assert image.min() < 50  # the labels

    def test_the_scale_is_fixed(self, attention_map):
        faint = pixels(attention_map(self.WEIGHTS / 10, ["a", "b"], ["x", "y", "z"]))[1]
        assert faint(0, 0).min() > 200

    def test_unless_it_is_given(self, attention_map):
        arguments = ["a", "b"], ["x", "y", "z"]
        whole = pixels(attention_map(self.WEIGHTS, *arguments))[1]
        tenth = pixels(attention_map(self.WEIGHTS / 10, *arguments, most=0.1))[1]
        for row, column in np.ndindex(2, 3):
            np.testing.assert_array_equal(tenth(column, row), whole(column, row))

    def test_long_labels_leave_room(self, attention_map):
        image, place = pixels(attention_map([[1.0]], [7 * "Star Wars "], ["x"]))
        red, _, blue = place(0, 0)
        assert red < 60 < blue
        assert (image[:, 0] == 255).all()

    @pytest.mark.parametrize(
        ("rows", "columns", "title"),
        [
            (["a"], ["Internationalisation"], ""),
            (
                ["Internationalisation"] * 3,
                ["x", "yyyyyyyyyyyyyyyyyyyy"],
                "a title that is longer than the map",
            ),
            (list("abcdefghijklmnopqrst"), ["WWWWWWWW"] * 2, "tall"),
            (["ab"], ["12345678"] * 40, "wide"),
        ],
    )
    def test_nothing_is_cut_off_or_overlaps(self, attention_map, rows, columns, title):
        figure = attention_map(np.full((len(rows), len(columns)), 0.5), rows, columns, title=title)
        image, _ = pixels(figure)
        for edge in (image[0], image[-1], image[:, 0], image[:, -1]):
            assert (edge == 255).all()
        axes = figure.axes[0]
        for labels in (axes.get_yticklabels(), axes.get_xticklabels()):
            boxes = [label.get_window_extent() for label in labels]
            assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))

    def test_short_labels_are_level(self, attention_map):
        for label, angle in (("abc", 0), ("abcd", 90)):
            figure = attention_map([[0.5, 0.5]], ["a long one"], ["x", label])
            assert [text.get_rotation() for text in figure.axes[0].get_xticklabels()] == [angle] * 2
            assert [text.get_rotation() for text in figure.axes[0].get_yticklabels()] == [0]

    @pytest.mark.parametrize("shape", [(104, 58), (3, 40), (1, 1), (12, 12)])
    def test_cells_are_about_square_and_the_scale_is_slim(self, attention_map, shape):
        figure = attention_map(np.zeros(shape), ["word"] * shape[0], ["x"] * shape[1], title="a")
        pixels(figure)
        plain, scale = (axes.get_window_extent() for axes in figure.axes)
        if min(shape) > 1:
            assert 0.7 < plain.width / shape[1] / (plain.height / shape[0]) < 1.4
        assert scale.width < 0.3 * figure.dpi
        assert scale.height <= min(plain.height, 4.5 * figure.dpi) + 1

    def test_labels_change_the_picture(self, attention_map):
        one, other = (pixels(attention_map([[0.0]], [label], ["x"]))[0] for label in ("i", "W"))
        assert one.shape == other.shape
        assert (one != other).any()

    def test_characters_without_a_font(self, attention_map, monkeypatch):
        monkeypatch.setattr(plot, "_has", lambda character: character.isascii())
        figure = attention_map([[0.5]], ["スィー"], ["a"], title="ア a")
        assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["SUi-"]
        assert figure.get_suptitle() == "A a"
        pixels(figure)

    def test_any_characters_are_drawn(self, attention_map):
        pixels(attention_map([[0.5, 0.5]], ["ッ"], ["☃", "\U0001f600"], title="フィ"))

    @pytest.mark.parametrize("shape", [(2, 2), (3, 2), (2, 3, 1)])
    def test_shapes(self, attention_map, shape):
        with pytest.raises(ValueError, match=r"weights has shape .* expected \(2, 3\)"):
            attention_map(np.zeros(shape), ["a", "b"], ["x", "y", "z"])

    def test_no_window_and_no_global_state(self, attention_map):
        code = (
            "import sys; from nbattn.plot import attention_map; attention_map([[1.0]], ['a'], ['b']);"
            "assert 'matplotlib.pyplot' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.usefixtures("attention_map")
class TestHeadGrid:
    WEIGHTS = np.array([[[0.0, 0.4], [0.2, 0.2]], [[0.4, 0.0], [0.1, 0.3]], [[0.0, 0.0], [0.0, 0.1]]])

    def test_cells(self):
        """Dark means much, on one scale, whose end is the largest of all."""
        figure = plot.head_grid(self.WEIGHTS)
        assert len(figure.axes) == 5  # 2 x 2, one of them empty, and the scale
        colours = np.array(
            [[[pixels(figure, head)[1](c, r) for c in range(2)] for r in range(2)] for head in range(3)]
        )
        order = np.argsort(self.WEIGHTS, axis=None, kind="stable")
        dark = colours.sum(axis=-1).ravel()[order]
        values = self.WEIGHTS.ravel()[order]
        assert ((np.diff(dark) < 0) == (np.diff(values) > 0)).all()
        assert ((np.diff(dark) == 0) == (np.diff(values) == 0)).all()
        red, _, blue = colours[0, 0, 1]
        assert red < 60 < blue
        image = pixels(figure)[0]
        assert (image[-60:-20, image.shape[1] // 2 : image.shape[1] // 2 + 60] == 255).all()  # no fourth

    def test_labels(self):
        figure = plot.head_grid(self.WEIGHTS, ["a", "b"], ["x", "y"], title="three")
        rows = [[text.get_text() for text in axes.get_yticklabels()] for axes in figure.axes[:3]]
        columns = [[text.get_text() for text in axes.get_xticklabels()] for axes in figure.axes[:3]]
        assert rows == [["a", "b"], [], ["a", "b"]]
        assert columns == [["x", "y"], ["x", "y"], []]
        assert [axes.get_xlabel() for axes in figure.axes[:3]] == ["head 0", "head 1", "head 2"]
        pixels(figure)

    def test_long_labels(self):
        weights = np.zeros((4, 5, 9))
        figure = plot.head_grid(weights, ["Internationalisation"] * 5, ["brown fox"] * 9, title="a")
        image = pixels(figure)[0]
        assert all((edge == 255).all() for edge in (image[0], image[-1], image[:, 0], image[:, -1]))
        for axes in figure.axes[:2]:
            boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
            assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))

    def test_nothing_but_zeros(self):
        assert pixels(plot.head_grid(np.zeros((1, 2, 2))))[1](0, 0).min() > 240

    def test_shapes(self):
        for weights in (np.zeros((2, 2)), np.zeros((0, 2, 2))):
            with pytest.raises(ValueError, match=r"weights has shape .* expected \(heads, queries, keys\)"):
                plot.head_grid(weights)
        with pytest.raises(ValueError, match="columns has 1 labels; expected 2"):
            plot.head_grid(self.WEIGHTS, columns=["a"])


@pytest.mark.usefixtures("attention_map")
class TestOverlay:
    PICTURE = np.full((20, 40, 3), [200, 50, 50], np.uint8)

    def test_panels(self):
        weights = np.array([[0.0, 0.0, 0.0, 5.0], [0.0, 2.0, 0.0, 0.0]])
        figure = plot.overlay(self.PICTURE, {"one": weights, "other": weights[::-1]})
        plain, one, other = (pixels(figure, panel)[1] for panel in range(3))
        grey = round(0.299 * 200 + 0.701 * 50)
        for column, row in ((2, 4), (38, 4), (15, 15)):
            np.testing.assert_array_equal(plain(column, row), (200, 50, 50))
        # The least leaves the picture as it is, in grey; the largest is yellow; what lies between is neither.
        np.testing.assert_allclose(one(5, 5), grey, atol=2)
        red, green, blue = one(35, 5)
        assert min(red, green) > 200 > blue
        assert len({tuple(one(*place)) for place in ((5, 5), (15, 15), (35, 5))}) == 3
        # Each quarter of the width, and half of the height, is one cell.
        np.testing.assert_array_equal(one(30.5, 0.5), one(38.5, 8.5))
        np.testing.assert_allclose(one(28.5, 5), grey, atol=2)
        np.testing.assert_array_equal(one(35, 5), other(35, 15))
        assert [axes.get_title() for axes in figure.axes[:3]] == ["", "one", "other"]

    def test_large_picture(self, monkeypatch):
        """Fewer pixels, at the places where they were."""
        monkeypatch.setattr(plot, "MOST_PIXELS", 300)
        picture = np.zeros((400, 1000, 3), np.uint8)
        picture[100:200, 500:] = 200
        figure = plot.overlay(picture, {"a": np.eye(2)})
        assert figure.axes[0].images[0].get_array().shape == (100, 250, 3)
        for panel in (0, 1):
            colour = pixels(figure, panel)[1]
            places = (250, 50), (750, 90), (750, 110), (510, 190)
            assert [int(colour(*place)[0] > 100) for place in places] == [panel, 0, 1, 1]
            assert figure.axes[panel].get_xlim() == (-0.5, 999.5)

    def test_grey_picture_and_flat_map(self):
        figure = plot.overlay(np.full((9, 5), 77, np.uint8), {"flat": np.ones((3, 3))})
        for panel in (0, 1):
            np.testing.assert_allclose(pixels(figure, panel)[1](2, 4), 77, atol=1)

    def test_arguments(self):
        with pytest.raises(TypeError, match="image has dtype float64; expected uint8"):
            plot.overlay(np.ones((2, 2)), {})
        with pytest.raises(ValueError, match=r"image has shape \(2, 2, 4\); expected"):
            plot.overlay(np.ones((2, 2, 4), np.uint8), {})
        for array in (np.ones(3), np.full((2, 2), np.nan), np.ones((0, 2))):
            with pytest.raises(ValueError, match=r"the map 'a' has shape .* finite numbers"):
                plot.overlay(self.PICTURE, {"a": array})


@pytest.mark.usefixtures("attention_map")
class TestMaskMap:
    COLOURS = {name: list(colour) for name, colour in plot.COLOURS.items()}  # noqa: RUF012

    def drawn(self, mask, places, **options):
        colour = pixels(plot.mask_map(mask, **options))[1]
        names = {tuple(value): name for name, value in self.COLOURS.items()}
        return [names.get(tuple(colour(*place))) for place in places]

    def test_dense(self):
        mask = np.tri(4, 7, 2, dtype=bool)
        places = [(k, q) for q in range(4) for k in range(7)]
        expected = ["seen" if seen else "hidden" for seen in mask.ravel()]
        assert self.drawn(mask, places) == expected
        assert self.drawn(mask.astype(int), places) == expected
        assert plot.mask_map(mask).axes[0].yaxis_inverted()  # query 0 is above

    def test_blocks(self):
        """What attention skips, what it takes as a whole, and the elements of the rest."""
        mask = masks.sliding_window(300, left=150, right=0)
        places = [(40, 10), (10, 40), (10, 80), (290, 10), (10, 290), (65, 130), (285, 290), (105, 250)]
        drawn = ["hidden", "seen", "whole block", *["skipped block"] * 2, "whole block", "seen", "seen"]
        assert self.drawn(mask, places) == drawn
        assert self.drawn(mask.to_dense(), places) == [
            ("hidden", "seen")[name in ("seen", "whole block")] for name in drawn
        ]

    def test_long(self):
        mask = masks.causal(64 * 40 + 5)
        drawn = ["partial block", "whole block", "skipped block", "partial block"]
        places = [(30, 30), (1000, 1500), (1500, 1000), (2520, 2520)]
        assert self.drawn(mask, places) == drawn

    def test_which(self):
        mask = np.zeros((2, 3, 4, 4), bool)
        mask[1, 2] = True
        assert self.drawn(mask, [(1, 1)], batch=1, head=2) == ["seen"]
        assert self.drawn(mask, [(1, 1)], head=2) == ["hidden"]
        # One for all.
        assert self.drawn(BlockMask.from_dense(mask[1:, 2:]), [(1, 1)], batch=7, head=5) == ["whole block"]

    def test_legend(self):
        figure = plot.mask_map(masks.causal(128), title="causal")
        names = [text.get_text() for text in figure.legends[0].get_texts()]
        assert names == ["skipped block", "hidden", "seen", "whole block"]
        assert figure.axes[0].get_title() == "causal"

    def test_arguments(self):
        with pytest.raises(TypeError, match="mask has dtype float64"):
            plot.mask_map(np.ones((2, 2)))
        with pytest.raises(ValueError, match=r"mask has shape \(2,\); expected \(queries, keys\)"):
            plot.mask_map(np.ones(2, bool))
        with pytest.raises(ValueError, match="expected at least one query and key"):
            plot.mask_map(np.ones((2, 0), bool))
        for options in ({"head": 3}, {"batch": -1}):
            with pytest.raises(ValueError, match=r"is -?[13]; expected 0 to 1, as the mask has 2"):
                plot.mask_map(np.ones((2, 2, 3, 3), bool), **options)
        with pytest.raises(TypeError, match="head"):
            plot.mask_map(np.ones((2, 2), bool), head=0.5)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plot.attention_map([[1.0]], ["a"], ["b"]),
        lambda: plot.head_grid([[[1.0]]], ["a"], ["b"]),
        lambda: plot.overlay(np.zeros((2, 2), np.uint8), {"a": [[1.0]]}),
        lambda: plot.mask_map(np.ones((2, 2), bool)),
    ],
)
def test_missing_package(monkeypatch, draw):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] or ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    for kept in (plot._has, plot._installed):
        kept.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r'need matplotlib, .*; pip install "nbattn\[plot\]"'):
        draw()
