"""The e2k encoder-decoder against the package that trained it, and `nbattn align`."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nbattn.__main__ import main
from nbattn.models import e2k
from nbattn.models.weights import Weights, package_folder

needs_e2k = pytest.mark.skipif(
    importlib.util.find_spec("e2k") is None, reason='needs e2k: pip install "nbattn[models]"'
)
COMMAND = [sys.executable, "-m", "nbattn", "align"]
WORDS = """
a about above account across action active address after again age air alphabet always animal answer apple
april area arm art attention august autumn baby back bag ball bank base basket bath beach bear beauty bed
before begin bell best bicycle big bird birthday black blood blue board boat body book bottle box bread
bridge brother brown building business butter camera candle captain car castle cat chair chance cheese
chicken child chocolate church circle city class clock cloud coat coffee cold color comb company computer
condition cook cotton country cousin cow cry cup dance danger dark daughter day december decoder dentist
desert desk dinner doctor dog dollar door dragon dream drink dust ear earth east easy education egg eight
elephant encoder energy engine english enough error evening example eye face family farm father february
fiction field fire fish flower foot forest fork friday friend fruit garden gate ghost girl glass gold
grandmother grass green guitar hair hammer hand happy harbor heart history holiday horse hospital house
hundred ice idea image insect island january jewel journey july jump june kettle key king kitchen knee
knife knight lady lake language laugh leather lesson letter library light lion liquid machine market
matrix memory metal milk monday money month moon morning mother mountain music national needle neural
network night november o'clock october office orange orchestra ox paper parallel peach pencil people
phoenix piano picture plane plant pocket poetry potato pyramid quarter queen question quick rabbit railway
rain rhythm river robot room school science seven sphinx spring station stone strength summer sunday table
teacher thumb thursday tiger tomorrow tongue translation tree tuesday umbrella university vector vegetable
violin voice water weather wednesday whale window winter world xylophone yacht yellow yesterday young
zebra zero
""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("e2k", reason='needs e2k: pip install "nbattn[models]"')
    return e2k.load(backend="reference")


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("e2k").C2K()


class TestModel:
    def test_text_is_theirs(self, model, theirs):
        assert len(set(WORDS)) >= 287
        assert {word: model(word).katakana for word in WORDS} == {word: theirs(word) for word in WORDS}

    def test_kernels(self, model):
        kernels = e2k.load()
        for word in ("sphinx", "Ice cream", "o'clock", "internationalization", "x"):
            exact, got = model(word), kernels(word)
            assert got.kana == exact.kana
            np.testing.assert_allclose(got.weights, exact.weights, atol=2e-5)

    def test_weights_are_theirs(self, model, theirs, monkeypatch):
        seen = []

        def record(self, q, memory):
            scores = self.split_heads(self.q_proj.forward(q)) @ memory[0] / self.scale
            e = np.exp(scores - scores.max(-1, keepdims=True))
            seen.append(e / e.sum(-1, keepdims=True))
            return forward(self, q, memory)

        attention = type(theirs.s2s.attn)
        forward = attention.forward
        monkeypatch.setattr(attention, "forward", record)
        theirs("alphabet")
        alignment = model("Alphabet")
        np.testing.assert_allclose(alignment.weights, np.concatenate(seen, axis=1), atol=1e-5)
        assert alignment.letters == ["^", *"alphabet", "$"]
        assert alignment.kana == [*"アルファベット", "$"]
        assert alignment.weights.shape == (4, 8, 10)
        np.testing.assert_allclose(alignment.weights.sum(-1), 1, atol=1e-6)
        # The consonants are looked at where they are written: f for "ph", b.
        mean = alignment.weights.mean(axis=0)
        assert alignment.letters[mean[2].argmax()] in "ph"
        assert alignment.letters[mean[4].argmax()] == "b"

    def test_long_output_is_cut_off_as_theirs(self, model, theirs):
        word = "la" * 32
        alignment = model(word)
        assert alignment.katakana == theirs(word)
        assert len(alignment.kana) <= e2k.MOST_KANA

    @pytest.mark.parametrize(
        ("word", "complaint"),
        [
            ("", "the word is empty"),
            (" ", "the word is empty"),
            ("naïve", r"the word has 'ï'; expected English letters"),
            ("a1", "the word has '1'"),
            ("\udcff", r"the word has '\\udcff'"),
            ("<eos>", "the word has '<'"),
            ("a" * 65, "the word has 65 letters; expected at most 64"),
        ],
    )
    def test_words_that_are_none(self, model, word, complaint):
        with pytest.raises(ValueError, match=complaint):
            model(word)


@needs_e2k
class TestFile:
    @pytest.fixture
    def content(self):
        return (package_folder("e2k") / "models" / "model-c2k.safetensors").read_bytes()

    def save(self, tmp_path, content):
        (tmp_path / "model-c2k.safetensors").write_bytes(content)
        return e2k.load(tmp_path)

    @pytest.mark.parametrize(
        ("old", "new", "complaint"),
        [
            (b'"eos_idx":"2"', b'"eos_idx":"x"', "is no e2k model: its eos_idx is 'x'"),
            (b'"eos_idx":"2"', b'"eos_xxx":"2"', "is no e2k model: its eos_idx is ''"),
            (b'"in_table":', b'"xx_table":', "is no e2k model: its in_table is"),
            (b'"fc.bias"', b'"fc.bios"', "lacks fc.bias"),
            (
                b'"fc.weight":{"dtype":"F16"',
                b'"fc.weight":{"dtype":"I16"',
                "fc.weight has shape .* dtype int16",
            ),
        ],
    )
    def test_damaged(self, tmp_path, content, old, new, complaint):
        assert content.count(old) == 1
        with pytest.raises(ValueError, match=rf"model-c2k\.safetensors.*{complaint}"):
            self.save(tmp_path, content.replace(old, new))

    def test_cut_off(self, tmp_path, content):
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            self.save(tmp_path, content[:-1])

    def test_other_model(self):
        weights = Weights(package_folder("e2k") / "models" / "accent.safetensors")
        with pytest.raises(ValueError, match=r"accent\.safetensors"):
            e2k.E2K(weights)

    def test_the_package_is_not_imported(self):
        code = "import sys; from nbattn.models import e2k; e2k.load(); assert 'e2k' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True)


@needs_e2k
class TestCommand:
    def test_table(self, capsys):
        assert main(["align", "Sphinx", "--backend", "reference"]) == 0
        title, empty, letters, *rows = capsys.readouterr().out.splitlines()
        assert (title, empty) == ("スフィンクス", "")
        assert letters.split() == ["^", *"sphinx", "$"]
        assert [row[0] for row in rows] == [*"スフィンクス", "$"]
        for row in rows:
            shares = [int(n) for n in row[1:].replace("·", "0").split()]
            assert len(shares) == 8
            assert 97 <= sum(shares) <= 103
        # Characters are one or two columns wide: the numbers end in the same ones.
        assert {len(row) + (row[0] != "$") for row in rows} == {len(letters)}

    def test_the_readme_tells_the_truth(self, capsys):
        readme = Path(__file__).resolve().parents[1].joinpath("README.md").read_text(encoding="utf-8")
        word, shown = re.search(r"```console\n\$ nbattn align (\w+)\n(.*?)```", readme, re.DOTALL).groups()
        assert main(["align", word, "--backend", "reference"]) == 0
        assert capsys.readouterr().out == shown

    def test_json(self, capsys, model):
        assert main(["align", "hello", "--json", "--backend", "reference"]) == 0
        data = json.loads(capsys.readouterr().out)
        expected = model("hello")
        assert data["katakana"] == expected.katakana
        assert data["letters"] == expected.letters
        assert data["kana"] == expected.kana
        np.testing.assert_allclose(data["weights"], expected.weights, atol=1e-6)

    def test_picture(self, capsys, tmp_path):
        pytest.importorskip("matplotlib", reason='needs matplotlib: pip install "nbattn[plot]"')
        path = tmp_path / "align.png"
        assert main(["align", "hello", "--plot", str(path), "--backend", "reference"]) == 0
        assert path.read_bytes().startswith(b"\x89PNG")
        assert capsys.readouterr().out.startswith("ヘロ\n")

    @pytest.mark.parametrize(
        ("argv", "complaint"),
        [
            ([], "the following arguments are required: word"),
            ([""], "the word is empty"),
            (["日本"], r"the word has '日'"),
            (["x", "y"], "unrecognized arguments: y"),
            (["x" * 1000], "the word has 1000 letters"),
            (["x", "--weights", "no/such"], "cannot read the weight file no.such.model-c2k.safetensors"),
        ],
    )
    def test_complaints(self, capsys, argv, complaint):
        assert main(["align", *argv]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert re.fullmatch(rf"nbattn: error: [^\n]*{complaint}[^\n]*\n", captured.err)

    def test_picture_that_cannot_be_written(self, capsys, tmp_path):
        pytest.importorskip("matplotlib")
        for name in ("align.nothing", "none/align.png"):
            argv = ["align", "x", "--plot", str(tmp_path / name), "--backend", "reference"]
            assert main(argv) == 2
            captured = capsys.readouterr()
            assert captured.out == ""
            assert re.fullmatch("nbattn: error: [^\n]*\n", captured.err)

    @pytest.mark.skipif(os.name != "posix", reason="bytes of POSIX")
    def test_invalid_utf8(self):
        result = subprocess.run([*map(os.fsencode, COMMAND), b"\xff\xfe"], capture_output=True, text=True)
        assert result.returncode == 2
        assert re.fullmatch(r"nbattn: error: the word has '\\udcff'[^\n]*\n", result.stderr)
        assert result.stdout == ""


def test_missing_package(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "e2k", None)
    assert main(["align", "x"]) == 2
    assert 'e2k, which is not installed; pip install "nbattn[models]"' in capsys.readouterr().err
