"""The command line: what it prints, where, and with which exit code."""

import importlib.metadata
import importlib.util
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simulated_gpu

import nbattn
from nbattn.__main__ import main
from nbattn.models.weights import package_folder

needs_glassllm = pytest.mark.skipif(
    importlib.util.find_spec("glassllm") is None, reason='needs glassllm: pip install "nbattn[models]"'
)
COMMAND = [sys.executable, "-m", "nbattn"]


def complaint(capsys, *argv):
    """What `main` says on stderr when it fails; nothing goes to stdout, and it is one line."""
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("nbattn: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@needs_glassllm
class TestGenerate:
    @pytest.mark.parametrize("model", ["glassllm", "glassllm-en", "glassllm-pt"])
    def test_text_is_theirs(self, capsys, model):
        import glassllm

        theirs, tokenizer = glassllm.load_pretrained(model[9:] or "en")
        prompt = "A vida é" if model.endswith("pt") else "Alice was"
        ids = [step.token for step in theirs.generate(tokenizer.encode(prompt), 30, greedy=True)]
        assert (
            main(["generate", prompt, "--model", model, "--max-tokens", "30", "--backend", "reference"]) == 0
        )
        captured = capsys.readouterr()
        assert captured.out == prompt + tokenizer.decode(ids) + "\n"
        speed = r"\d+ tokens in [\d.]+ s \(\d+ tokens/s\)"
        assert re.fullmatch(rf"loaded in [\d.]+ s; prompt: {speed}; generation: {speed}\n", captured.err)

    def test_seed(self, capsys):
        def text(seed):
            options = ["--temperature", "1", "--top-p", "0.9", "--seed", seed, "--backend", "reference"]
            assert main(["generate", "Alice", "--max-tokens", "20", *options]) == 0
            return capsys.readouterr().out

        assert text("4") == text("4")
        assert text("4") != text("5")

    @pytest.mark.parametrize(("count", "parts"), [("0", 1), ("1", 2)])
    def test_few_tokens(self, capsys, count, parts):
        assert main(["generate", "Alice", "--max-tokens", count, "--backend", "reference"]) == 0
        captured = capsys.readouterr()
        assert captured.out.startswith("Alice")
        assert captured.err.count(";") == parts - 1

    def test_default_backend(self, capsys):
        assert main(["generate", "Alice", "--max-tokens", "5"]) == 0
        assert main(["generate", "Alice", "--max-tokens", "5", "--backend", "cpu"]) == 0
        text = capsys.readouterr().out
        assert text[: len(text) // 2] * 2 == text

    @pytest.mark.parametrize("dtype", ["int8", "int4"])
    def test_quantised_cache(self, capsys, dtype):
        assert main(["generate", "Alice", "--max-tokens", "5", "--cache-dtype", dtype]) == 0
        assert len(capsys.readouterr().out) > len("Alice\n")

    def test_text_comes_token_by_token(self, monkeypatch):
        class Recorder(io.StringIO):
            encoding = "utf-8"
            lengths: list[int] = []  # noqa: RUF012

            def flush(self):
                self.lengths.append(len(self.getvalue()))

        monkeypatch.setattr(sys, "stdout", Recorder())
        assert main(["generate", "Alice", "--max-tokens", "12", "--backend", "reference"]) == 0
        assert len(set(Recorder.lengths)) >= 12

    def test_terminal_that_lacks_a_character(self, tmp_path):
        result = subprocess.run(
            [*COMMAND, "generate", "“☃”", "--max-tokens", "3", "--backend", "reference"],
            capture_output=True,
            env=os.environ | {"PYTHONIOENCODING": "ascii"},
            check=True,
        )
        assert result.stdout.startswith(b"???")


class TestBadInput:
    @pytest.mark.parametrize(
        ("argv", "expected"),
        [
            ([], "the following arguments are required: command"),
            (["train"], "invalid choice: 'train'"),
            (["generate"], "the following arguments are required: prompt"),
            (["generate", ""], "argument prompt: it is empty"),
            (
                ["generate", "x", "--max-tokens", "-1"],
                "--max-tokens: got '-1'; expected a whole number of at least 0",
            ),
            (["generate", "x", "--max-tokens", "1.5"], "--max-tokens: got '1.5'"),
            (["generate", "x", "--max-tokens"], "--max-tokens: expected one argument"),
            (
                ["generate", "x", "--temperature", "-0.1"],
                "--temperature: got '-0.1'; expected a number of at least 0",
            ),
            (["generate", "x", "--temperature", "inf"], "--temperature: got 'inf'"),
            (["generate", "x", "--temperature", "nan"], "--temperature: got 'nan'"),
            (["generate", "x", "--temperature", "warm"], "--temperature: got 'warm'"),
            (["generate", "x", "--top-p", "0"], "--top-p: got '0'; expected a number above 0 and at most 1"),
            (["generate", "x", "--top-p", "1.01"], "--top-p: got '1.01'"),
            (["generate", "x", "--seed", "-1"], "--seed: got '-1'"),
            (["generate", "x", "--model", "gpt"], "--model: invalid choice: 'gpt'"),
            (["generate", "x", "--cache-dtype", "int2"], "--cache-dtype: invalid choice: 'int2'"),
            (["generate", "x", "--backend", "tpu"], "--backend: invalid choice: 'tpu'"),
            (["generate", "x", "y"], "unrecognized arguments: y"),
            (["warmup", "--dtype", "int2"], "--dtype: invalid choice: 'int2'"),
            (["info", "--fast"], "unrecognized arguments: --fast"),
        ],
    )
    def test_arguments(self, capsys, argv, expected):
        assert expected in complaint(capsys, *argv)

    @needs_glassllm
    def test_cuda_without_a_gpu(self, capsys):
        assert "runs on the CPU alone" in complaint(capsys, "generate", "x", "--backend", "cuda")

    def test_missing_package(self, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "glassllm", None)
        assert 'pip install "nbattn[models]"' in complaint(capsys, "generate", "x")

    def test_missing_files(self, capsys, tmp_path):
        error = complaint(capsys, "generate", "x", "--weights", str(tmp_path))
        assert f"cannot read the weight file {tmp_path / 'en.npz'}" in error

    @needs_glassllm
    def test_truncated_weights(self, capsys, tmp_path):
        content = (package_folder("glassllm") / "weights" / "en.npz").read_bytes()
        (tmp_path / "en.npz").write_bytes(content[: len(content) // 2])
        assert "en.npz is not a whole npz file" in complaint(
            capsys, "generate", "x", "--weights", str(tmp_path)
        )

    @needs_glassllm
    def test_missing_tokenizer(self, capsys, tmp_path):
        content = (package_folder("glassllm") / "weights" / "pt.npz").read_bytes()
        (tmp_path / "pt.npz").write_bytes(content)
        error = complaint(capsys, "generate", "x", "--model", "glassllm-pt", "--weights", str(tmp_path))
        assert "pt.tokenizer.json: No such file" in error

    def test_pickled_weights(self, capsys, tmp_path):
        np.savez(tmp_path / "en.npz", E=np.array([{}], object))
        assert "Object arrays" in complaint(capsys, "generate", "x", "--weights", str(tmp_path))

    @pytest.mark.parametrize("text", ["a\nb", "\r\x1b[31mred", "\u2028"])
    @pytest.mark.parametrize("command", ["transcribe", "look", "recommend"])
    def test_control_characters(self, capsys, command, text):
        assert complaint(capsys, command, text).strip().isprintable()

    def test_endless_argument(self, capsys):
        assert len(complaint(capsys, "generate", "x", "y" * 1_000_000)) < 2000

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("", "--plot: got ''; expected a name that ends in .png, .jpg"),
            ("picture", "--plot: got 'picture'"),
            (".", "--plot: got '.'"),
            ("a.nothing", "--plot: got 'a.nothing'"),
            ("no/such/a.png", "--plot: there is no folder 'no/such'"),
        ],
    )
    @pytest.mark.parametrize("command", ["align", "transcribe", "look", "recommend"])
    def test_pictures_are_refused_at_once(self, capsys, command, name, expected):
        assert expected in complaint(capsys, command, "x", "--plot", name)

    def test_picture_that_is_a_folder(self, capsys, tmp_path):
        (tmp_path / "a.png").mkdir()
        assert "--plot: got" in complaint(capsys, "align", "x", "--plot", str(tmp_path / "a.png"))

    @pytest.mark.parametrize("argv", [["generate", ""], ["generate", "x", "--weights", "no/such/folder"], []])
    def test_process(self, argv):
        result = subprocess.run([*COMMAND, *argv], capture_output=True, text=True)
        assert result.returncode == 2
        assert re.fullmatch("nbattn: error: [^\n]*\n", result.stderr)
        assert result.stdout == ""


@needs_glassllm
@pytest.mark.skipif(os.name != "posix", reason="signals and pipes of POSIX")
class TestInterrupted:
    ENDLESS = ("generate", "Alice", "--max-tokens", "1000000", "--backend", "reference")

    def start(self):
        return subprocess.Popen([*COMMAND, *self.ENDLESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def test_ctrl_c(self):
        with self.start() as process:
            process.stdout.read(20)
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=60)
        assert process.returncode == 130
        assert error.strip() == b""

    def test_reader_that_leaves(self):
        with self.start() as process:
            process.stdout.read(20)
            process.stdout.close()
            error = process.stderr.read()
        assert process.returncode == 141
        assert error == b""

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_full_disk(self):
        with open("/dev/full", "w") as full:
            result = subprocess.run([*COMMAND, *self.ENDLESS], stdout=full, stderr=subprocess.PIPE, text=True)
        assert result.returncode == 2
        assert re.fullmatch("nbattn: error: [^\n]*No space left[^\n]*\n", result.stderr)


class TestInfo:
    def test_lines(self, capsys):
        assert main(["info"]) == 0
        lines = dict(re.split(" {2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert lines["nbattn"] == nbattn.__version__
        assert lines["numba"] == importlib.metadata.version("numba")
        assert {"python", "numpy", "scipy", "llvmlite", "GPU"} <= lines.keys()

    def test_gpu(self, capsys, monkeypatch):
        with simulated_gpu.installed(capabilities=((8, 0),)):
            assert main(["info"]) == 0
        assert "SIMULATOR, compute capability 8.0" in capsys.readouterr().out

    def test_version(self, capsys):
        with pytest.raises(SystemExit, match="0"):
            main(["--version"])
        assert capsys.readouterr().out == f"nbattn {nbattn.__version__}\n"

    def test_import_leaves_numba_alone(self):
        code = "import sys, nbattn.__main__ as m; assert not {'numba', 'scipy'} & sys.modules.keys()"
        subprocess.run([sys.executable, "-c", code], check=True)


class TestWarmup:
    @pytest.fixture
    def runtime(self, monkeypatch, tmp_path):
        from nbattn.cpu import runtime

        monkeypatch.setattr(
            runtime, "kernel_names", lambda dtypes: [f"attention {dtype}" for dtype in dtypes]
        )
        monkeypatch.setattr(runtime, "compile_kernel", lambda name: "cached" if "64" in name else "compiled")
        monkeypatch.setattr(runtime, "cache_folder", lambda: tmp_path)
        return runtime

    def test_every_dtype(self, capsys, runtime, tmp_path):
        assert main(["warmup"]) == 0
        captured = capsys.readouterr()
        assert re.fullmatch(
            rf"5 kernels compiled, 1 already cached, in [\d.]+ s; cache: {re.escape(str(tmp_path))}\n",
            captured.out,
        )
        assert captured.err.splitlines() == [
            "1/6 attention float32",
            "2/6 attention float64",
            "3/6 attention float16",
            "4/6 attention bfloat16",
            "5/6 attention int8",
            "6/6 attention int4",
        ]

    def test_bar_on_a_terminal(self, capsys, runtime, monkeypatch):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        assert main(["warmup", "--dtype", "float32", "--dtype", "float64"]) == 0
        drawn = capsys.readouterr().err.split("\r\x1b[K")
        assert drawn == [
            "",
            f"[{'-' * 24}] 0/2 attention float32",
            f"[{'#' * 12}{'-' * 12}] 1/2 attention float64",
            f"[{'#' * 24}] 2/2 done\n",
        ]

    def test_no_cache_folder(self, capsys, runtime, monkeypatch):
        monkeypatch.setattr(runtime, "cache_folder", lambda: None)
        assert main(["warmup", "--dtype", "float32"]) == 0
        assert "no cache folder is writable" in capsys.readouterr().out

    def test_second_process_finds_everything(self, tmp_path):
        def warmup():
            environment = os.environ | {"NBATTN_CACHE_DIR": str(tmp_path)}
            command = [*COMMAND, "warmup", "--dtype", "int4"]  # the fewest kernels
            return subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, text=True, check=True
            ).stdout

        first, second = warmup(), warmup()
        found = re.match(r"([1-9]\d*) kernels compiled, 0 already cached, in ", first)
        assert found
        assert second.startswith(f"0 kernels compiled, {found[1]} already cached, in ")
        assert str(tmp_path) in second
