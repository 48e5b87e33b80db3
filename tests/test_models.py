"""The glassllm decoder against the package that trained it, and the readers against damaged files."""

import importlib.util
import io
import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbattn import KVCache
from nbattn.models import load
from nbattn.models.glassllm import Tokenizer, decoder
from nbattn.models.sampling import next_token, nucleus
from nbattn.models.weights import Weights, package_folder, read_json

INSTALL = 'needs glassllm: pip install "nbattn[models]"'
needs_glassllm = pytest.mark.skipif(importlib.util.find_spec("glassllm") is None, reason=INSTALL)

PROMPTS = {
    "en": [
        "Alice was beginning to",
        "“What a curious feeling!” said",
        "The White Rabbit\n\nput on his ☃ spectacles",
    ],
    "pt": ["Era uma vez", "Não consultes dicionários.", "A leitora, que é minha amiga e abriu este livro"],
}


@pytest.fixture(scope="module", params=["en", "pt"])
def language(request):
    return request.param


@pytest.fixture(scope="module")
def theirs(language):
    glassllm = pytest.importorskip("glassllm", reason=INSTALL)
    return glassllm.load_pretrained(language)


@pytest.fixture(scope="module")
def ours(language):
    pytest.importorskip("glassllm", reason=INSTALL)
    return load(f"glassllm-{language}", backend="reference")


def their_tokens(model, ids, count, **options):
    return [step.token for step in model.generate(ids, count, **options)]


class TestGlassLM:
    def test_logits(self, language, theirs, backend):
        model, tokenizer = load(f"glassllm-{language}", backend=backend)
        ids = tokenizer.encode(" ".join(PROMPTS[language] * 6))[: model.config.max_len]
        assert len(ids) == model.config.max_len
        expected = theirs[0].forward(ids).data
        np.testing.assert_allclose(model([ids]), expected, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("number", range(3))
    def test_greedy_is_token_for_token_past_the_context_limit(self, language, theirs, backend, number):
        model, tokenizer = load(f"glassllm-{language}", backend=backend)
        ids = tokenizer.encode(PROMPTS[language][number])
        count = model.config.max_len + 12
        assert list(model.generate(ids, count)) == their_tokens(theirs[0], ids, count, greedy=True)

    def test_prompt_longer_than_the_context(self, ours, theirs):
        rng = np.random.default_rng(5)
        ids = rng.integers(4, ours[0].config.vocab_size, 300).tolist()
        assert list(ours[0].generate(ids, 5)) == their_tokens(theirs[0], ids, 5, greedy=True)

    def test_sampling_with_a_seed_is_theirs(self, ours, theirs):
        ids = [40, 50, 60]
        tokens = list(ours[0].generate(ids, 40, temperature=0.8, seed=11))
        assert tokens == their_tokens(theirs[0], ids, 40, temperature=0.8, seed=11)

    def test_seed_and_top_p(self, ours):
        def draw(**options):
            return list(ours[0].generate([40, 50, 60], 30, temperature=1.0, **options))

        assert draw(seed=1, top_p=0.9) == draw(seed=1, top_p=0.9)
        assert draw(seed=1) != draw(seed=2)
        assert draw(seed=1, top_p=1e-9) == list(ours[0].generate([40, 50, 60], 30))

    @pytest.mark.parametrize("chunks", [[1] * 20, [7, 1, 5, 7], [20]])
    def test_cached_decoding_is_the_full_forward(self, ours, chunks):
        model, _ = ours
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 20))
        cache, parts, start = model.new_cache(batch=2), [], 0
        for chunk in chunks:
            parts.append(model(ids[:, start : start + chunk], cache))
            start += chunk
        np.testing.assert_allclose(np.concatenate(parts, axis=1), model(ids), rtol=0, atol=2e-5)

    def test_future_tokens_do_not_reach_back(self, ours):
        model, _ = ours
        first, second = model([[9, 8, 7, 6]]), model([[9, 8, 7, 500]])
        np.testing.assert_array_equal(first[:, :3], second[:, :3])
        assert not np.array_equal(first[:, 3], second[:, 3])

    @pytest.mark.parametrize("tokens", [[[-1]], [[1024]], [3, 4], [[1.5]]])
    def test_tokens_out_of_range(self, ours, tokens):
        with pytest.raises(ValueError, match="tokens"):
            ours[0](tokens)

    def test_too_many_tokens(self, ours):
        with pytest.raises(ValueError, match="holds 0 of 128 positions; 129 more do not fit"):
            ours[0](np.zeros((1, 129), int))

    def test_empty_prompt(self, ours):
        with pytest.raises(ValueError, match="prompt is empty"):
            next(ours[0].generate([], 1))

    def test_unknown_name(self):
        with pytest.raises(ValueError, match=r"expected 'glassllm', .*'glassllm-pt' or 'smollm2'"):
            load("glassllm-fr")


# Lewis Carroll, Alice's Adventures in Wonderland, 1865.
ALICE = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to "
    "do: once or twice she had peeped into the book her sister was reading, but it had no pictures or "
    "conversations in it, “and what is the use of a book,” thought Alice “without pictures or "
    "conversations?”\n\nSo she was considering in her own mind (as well as she could, for the hot day made "
    "her feel very sleepy and stupid), whether the pleasure of making a daisy-chain would be worth the "
    "trouble of getting up and picking the daisies, when suddenly a White Rabbit with pink eyes ran close by "
    "her.\n\nThere was nothing so very remarkable in that; nor did Alice think it so very much out of the "
    "way to hear the Rabbit say to itself, “Oh dear! Oh dear! I shall be late!” (when she thought it over "
    "afterwards, it occurred to her that she ought to have wondered at this, but at the time it all seemed "
    "quite natural)"
)


class Recorder:
    """A layer's cache that remembers what it was given."""

    def __init__(self, cache):
        self.cache, self.dtype = cache, cache.dtype

    def append(self, key, value):
        self.key, self.value = key.copy(), value.copy()
        self.cache.append(key, value)

    def attend(self, query, mask, **options):
        self.query = query.copy()
        return self.cache.attend(query, mask, **options)


@pytest.fixture(scope="module")
def layers():
    """Every layer's queries, keys and values on a real text."""
    model, tokenizer = load("glassllm-en", backend="reference")
    ids = np.array(tokenizer.encode(ALICE))
    length = model.config.max_len
    windows = ids[: len(ids) // length * length].reshape(-1, length)
    assert len(windows) >= 2
    layers = [Recorder(cache) for cache in model.new_cache(len(windows))]
    model(windows, layers)
    return model.config, layers


@needs_glassllm
class TestQuantisedCache:
    @pytest.mark.parametrize(("dtype", "least", "most"), [("int8", 0.004, 0.01), ("int4", 0.07, 0.16)])
    def test_error_on_real_keys(self, layers, backend, dtype, least, most):
        """Of each layer's output, in the Euclidean norm: what the documentation of the caches states."""
        config, recorded = layers
        rotary = {"rotary_base": config.rope_base, "rotary_interleaved": True}
        errors = []
        for layer in recorded:
            results = []
            for kind, where in (("float64", "reference"), (dtype, backend)):
                number = np.float64 if kind == "float64" else np.float32
                batch, heads, length, head_dim = layer.key.shape
                cache = KVCache(batch, heads, length, head_dim, kind, backend=where, **rotary)
                cache.append(layer.key.astype(number), layer.value.astype(number))
                results.append(cache.attend(layer.query.astype(number)))
            exact, got = results
            errors.append(np.linalg.norm(got - exact) / np.linalg.norm(exact))
        assert least < min(errors)
        assert max(errors) < most

    @pytest.mark.parametrize(("dtype", "least", "most"), [("int8", 0.004, 0.01), ("int4", 0.07, 0.16)])
    def test_error_token_by_token(self, layers, dtype, least, most):
        """Of few queries, which meet bytes as they lie where the processor multiplies them."""
        config, recorded = layers
        rotary = {"rotary_base": config.rope_base, "rotary_interleaved": True}
        for layer in recorded:
            batch, heads, length, head_dim = layer.key.shape
            exact = KVCache(batch, heads, length, head_dim, "float64", backend="reference", **rotary)
            exact.append(layer.key.astype(np.float64), layer.value.astype(np.float64))
            expected = exact.attend(layer.query.astype(np.float64))
            cache, got = KVCache(batch, heads, length, head_dim, dtype, **rotary), []
            for i in range(length):
                token = np.s_[:, :, i : i + 1]
                cache.append(layer.key[token], layer.value[token])
                got.append(cache.attend(layer.query[token]))
            error = np.linalg.norm(np.concatenate(got, axis=2) - expected) / np.linalg.norm(expected)
            assert least < error < most

    def test_logits(self, backend):
        plain, tokenizer = load("glassllm-en", backend=backend)
        ids = [tokenizer.encode(ALICE)[:100]]
        expected = plain(ids)
        for dtype, most in (("int8", 0.03), ("int4", 0.3)):
            model, _ = load("glassllm-en", backend=backend, cache_dtype=dtype)
            error = np.linalg.norm(model(ids) - expected) / np.linalg.norm(expected)
            assert 0 < error < most, dtype


class TestTokenizer:
    @given(text=st.one_of(st.text(max_size=60), st.text("the ▁qu\nãa\u0303", max_size=60)))
    def test_any_text_is_theirs(self, ours, theirs, text):
        ids = ours[1].encode(text)
        assert ids == theirs[1].encode(text)
        assert ours[1].decode(ids) == theirs[1].decode(ids)

    def test_vocabulary_is_theirs(self, ours, theirs):
        assert ours[1].vocab == theirs[1].vocab
        everything = range(len(ours[1].vocab))
        assert ours[1].decode(everything) == theirs[1].decode(everything)


class TestSampling:
    def test_nucleus_is_the_smallest(self):
        rng = np.random.default_rng(2)
        for top_p in (0.1, 0.5, 0.9, 0.999):
            p = rng.dirichlet(np.full(50, 0.3))
            kept = nucleus(p, top_p) > 0
            assert p[kept].sum() >= top_p
            assert p[kept].sum() - p[kept].min() < top_p
            assert p[kept].min() >= p[~kept].max()
            np.testing.assert_allclose(nucleus(p, top_p)[kept], p[kept] / p[kept].sum())

    def test_whole_nucleus(self):
        p = np.full(3, 1 / 3)
        np.testing.assert_array_equal(nucleus(p, 1.0), p)

    def test_draws_follow_the_probabilities(self):
        rng = np.random.default_rng(3)
        logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
        counts = np.bincount([next_token(logits, 1.0, 1.0, rng) for _ in range(4000)])
        np.testing.assert_allclose(counts / 4000, [0.5, 0.3, 0.2], atol=0.03)

    @pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-3])
    def test_cold_is_greedy(self, temperature):
        logits = np.array([-1e4, 2.0, 1e4, 0.0], np.float32)
        assert next_token(logits, temperature, 1.0, np.random.default_rng(0)) == 2


@pytest.fixture
def arrays():
    return {"gamma": np.ones((3, 2), np.float16), "config": np.array('{"n": 1}')}


@pytest.fixture
def npz(tmp_path, arrays):
    path = tmp_path / "some.npz"
    np.savez_compressed(path, **arrays)
    return path


class TestWeights:
    def test_whole(self, npz):
        weights = Weights(npz)
        gamma = weights.tensor("gamma", (3, 2))
        assert gamma.dtype == np.float32
        assert gamma.tolist() == [[1, 1]] * 3
        assert weights.json("config") == {"n": 1}

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
    def test_truncated(self, npz, share):
        content = npz.read_bytes()
        npz.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=r"some\.npz is not a whole npz file"):
            Weights(npz)

    def test_every_damaged_byte_is_noticed_or_harmless(self, npz):
        content = npz.read_bytes()
        for position in range(len(content)):
            damaged = bytearray(content)
            damaged[position] ^= 0x41
            npz.write_bytes(damaged)
            try:
                gamma = Weights(npz).tensor("gamma", (3, 2))
            except ValueError as error:
                assert "some.npz" in str(error)  # noqa: PT017
            else:
                assert gamma.tolist() == [[1, 1]] * 3

    def test_absurd_sizes(self, tmp_path):
        """Zeros that shrink to a thousandth, and an array of more numbers than there are."""
        path = tmp_path / "some.npz"
        np.savez_compressed(path, gamma=np.zeros(1_000_000))
        with pytest.raises(ValueError, match=r"some\.npz is .*its \d+ bytes would unpack to 8000\d+"):
            Weights(path)
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 50,)}
        )
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("gamma.npy", header.getvalue() + bytes(8))
        with pytest.raises(ValueError, match=r"some\.npz is not a whole npz file"):
            Weights(path)

    def test_object_array(self, tmp_path):
        path = tmp_path / "some.npz"
        np.savez(path, gamma=np.array([{}, None], object))
        with pytest.raises(
            ValueError, match=r"some\.npz is not a whole npz file of plain arrays \(Object arrays"
        ):
            Weights(path)

    def test_other_formats(self, tmp_path):
        path = tmp_path / "some.npz"
        with path.open("wb") as file:
            np.save(file, np.ones(3))
        with pytest.raises(ValueError, match=r"some\.npz is not a whole npz file"):
            Weights(path)

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"cannot read the weight file .*none\.npz: No such file"):
            Weights(tmp_path / "none.npz")

    def test_missing_tensor(self, npz):
        with pytest.raises(ValueError, match=r"some\.npz lacks beta"):
            Weights(npz).tensor("beta", (3,))

    def test_wrong_shape(self, npz):
        with pytest.raises(
            ValueError, match=r"some\.npz: gamma has shape \(3, 2\) .* expected floating \(2, 3\)"
        ):
            Weights(npz).tensor("gamma", (2, 3))

    @pytest.mark.parametrize("wrong", [np.ones(2, int), np.array(["a", "b"])])
    def test_wrong_dtype(self, tmp_path, wrong):
        np.savez(tmp_path / "some.npz", gamma=wrong)
        with pytest.raises(ValueError, match="expected floating"):
            Weights(tmp_path / "some.npz").tensor("gamma", (2,))

    def test_nan(self, tmp_path):
        np.savez(tmp_path / "some.npz", gamma=np.array([1.0, np.nan]))
        with pytest.raises(ValueError, match=r"some\.npz: gamma holds NaN or inf"):
            Weights(tmp_path / "some.npz").tensor("gamma", (2,))

    @pytest.mark.parametrize("text", ["{", "[1]", "null", "[" * 100_000])
    def test_wrong_json(self, tmp_path, text):
        path = tmp_path / "some.npz"
        np.savez(path, config=np.array(text), number=np.ones(()))
        with pytest.raises(ValueError, match=r"some\.npz: config .*JSON"):
            Weights(path).json("config")
        with pytest.raises(ValueError, match=r"some\.npz: number .*expected one string"):
            Weights(path).json("number")

    def test_json_that_is_not_text(self, tmp_path):
        path = tmp_path / "some.json"
        path.write_bytes(b"\xff\xfe\x00{")
        with pytest.raises(ValueError, match=r"some\.json is not JSON as expected"):
            read_json(path)


@needs_glassllm
class TestGlassFiles:
    @pytest.fixture
    def parts(self):
        with np.load(package_folder("glassllm") / "weights" / "en.npz") as archive:
            return dict(archive)

    def save(self, tmp_path, parts, **config):
        entries = json.loads(parts["__config__"].item()) | config
        path = tmp_path / "en.npz"
        np.savez(path, **(parts | {"__config__": np.array(json.dumps(entries))}))
        return Weights(path)

    def test_missing_tensor(self, tmp_path, parts):
        del parts["blocks.2.attn.W_K"]
        weights = self.save(tmp_path, parts)
        with pytest.raises(ValueError, match=r"en\.npz lacks blocks\.2\.attn\.W_K"):
            decoder(weights)

    @pytest.mark.parametrize(
        ("config", "complaint"),
        [
            ({"n_layers": 5}, r"lacks blocks\.4"),
            ({"n_layers": 0}, "n_layers is 0; expected a positive int"),
            ({"d_model": "128"}, "d_model is '128'"),
            ({"d_model": 256}, r"W_Q has shape|E has shape"),
            ({"n_heads": 3}, "do not fit"),
            ({"n_kv_heads": 3}, "do not fit"),
            ({"n_heads": 128}, "head_dim even"),
            ({"n_kv_heads": True}, "n_kv_heads is True"),
            ({"eps": float("nan")}, "eps is nan"),
            ({"rope_base": None}, "rope_base is None"),
        ],
    )
    def test_wrong_config(self, tmp_path, parts, config, complaint):
        weights = self.save(tmp_path, parts, **config)
        with pytest.raises(ValueError, match=rf"en\.npz.*({complaint})"):
            decoder(weights)

    @pytest.mark.parametrize(
        "data", [{}, {"alphabet": "abc", "merges": []}, {"alphabet": ["a"], "merges": [["a"]]}]
    )
    def test_wrong_tokenizer(self, tmp_path, data):
        path = tmp_path / "en.tokenizer.json"
        path.write_text(json.dumps(data), encoding="utf-8")
        with pytest.raises(ValueError, match=r"en\.tokenizer\.json is no glassllm tokenizer"):
            Tokenizer.read(path)

    def test_tokenizer_of_another_size(self, tmp_path, parts):
        self.save(tmp_path, parts)
        (tmp_path / "en.tokenizer.json").write_text('{"alphabet": ["a"], "merges": []}', encoding="utf-8")
        with pytest.raises(ValueError, match=r"en\.tokenizer\.json has 5 tokens but .*en\.npz has 1024"):
            load("glassllm-en", folder=tmp_path)

    def test_the_package_is_not_imported(self):
        code = "import sys, nbattn.models as m; m.load('glassllm-en'); assert 'glassllm' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "glassllm", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'glassllm, which is not installed; pip install "nbattn\[models\]"'
    ):
        load("glassllm-en")
