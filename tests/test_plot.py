"""Pictures, looked at pixel by pixel."""

import subprocess
import sys

import numpy as np
import pytest

from nbattn import plot

MATPLOTLIB = 'needs matplotlib: pip install "nbattn[plot]"'


@pytest.fixture
def attention_map():
    pytest.importorskip("matplotlib", reason=MATPLOTLIB)
    return plot.attention_map


def pixels(figure):
    """The picture (rows, columns, 3) and where a point of the axes lies in it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)

    def place(column, row):
        x, y = figure.axes[0].transData.transform((column, row))
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

    def test_labels_change_the_picture(self, attention_map):
        one, other = (pixels(attention_map([[0.0]], [label], ["x"]))[0] for label in ("i", "W"))
        assert one.shape == other.shape
        assert (one != other).any()

    def test_characters_without_a_font(self, attention_map, monkeypatch):
        monkeypatch.setattr(plot, "_has", lambda character: character.isascii())
        figure = attention_map([[0.5]], ["スィー"], ["a"], title="ア a")
        assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["SUi-"]
        assert figure.axes[0].get_title() == "A a"
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


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r'need matplotlib, .*; pip install "nbattn\[plot\]"'):
        plot.attention_map([[1.0]], ["a"], ["b"])
