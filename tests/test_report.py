"""The page of what was measured: that it says the numbers of its files, and what it lacks."""

import html.parser
import json
import subprocess
import sys
import types

import numpy as np
import pytest

from benchmarks import cases, decode_cases, machine, measured, memory, parts, peers, report, rivals

MACHINE = {"CPU": "A <fast> one", "threads": "2", "Python": "3.12.1", "nbattn": "0.1.0", "PyTorch": "2.13"}
LENGTHS = (128, 1024)
COMMITS = ("a" * 40, "b" * 40)


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib", reason='needs matplotlib: pip install "nbattn[plot]"')


class Page(html.parser.HTMLParser):
    """Its tables by caption, its ids and pictures, and all that it says."""

    def __init__(self, text):
        super().__init__()
        self.text, self.words, self.cell = text, "", ""
        self.tables, self.ids, self.pictures = {}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        if tag == "svg" and "aria-hidden" not in attrs:
            self.pictures.append(attrs)
        if tag == "tr":
            self.line = []
        if tag in ("caption", "th", "td"):
            self.cell = ""

    def handle_endtag(self, tag):
        if tag == "caption":
            self.lines = self.tables[self.cell] = []
        elif tag in ("th", "td"):
            self.line.append(self.cell)
        elif tag == "tr":
            self.lines.append(self.line)

    def handle_data(self, data):
        self.words += data
        self.cell += data

    def value(self, caption, row, column):
        """What stands in a table."""
        header, *lines = self.tables[caption]
        (line,) = (line for line in lines if line[0] == row)
        return line[header.index(column)]


def measure(rng, *labels):
    """A row of each case, with five rounds of seconds for each of these and for nbattn and the limit."""
    chosen = [
        *(cases.Attention(8, n, 64, causal=causal) for n in LENGTHS for causal in (False, True)),
        cases.Attention(8, 1024, 64, "bfloat16"),
        decode_cases.Decode(32, 8, 32768),
        decode_cases.Decode(32, 8, 128, kept="cache"),
        cases.Softmax(64),
    ]
    labels = ("nbattn", "limit", *labels)
    return [
        peers.Row(
            case, [dict(zip(labels, seconds, strict=True)) for seconds in 0.1 + rng.random((5, len(labels)))]
        )
        for case in chosen
    ]


def write(folder, rows, name="quick.json", missing=None, **head):
    """A file as `peers.py` writes it, but for what is given for its head; what it holds."""
    text = peers.as_json(rows, missing or {}, MACHINE, 2, True)
    figures = json.loads(text, parse_constant=pytest.fail)
    figures |= {"date": "2026-01-31", "commit": "abc123"} | head
    (folder / "peers").mkdir(exist_ok=True)
    (folder / "peers" / name).write_text(json.dumps(figures))
    return figures


def write_memory(folder):
    taken = [
        {"library": label, "length": n, "bytes": [each * n * 1000, each * n * 3000, each * n * 1500]}
        for label, each in (("nbattn", 1), ("NumPy", 7))
        for n in LENGTHS
    ]
    head = {"date": "2026-02-01", "commit": None, "machine": MACHINE, "threads": 2, "missing": {}}
    (folder / "peers").mkdir(exist_ok=True)
    (folder / "peers" / "memory.json").write_text(json.dumps(head | {"memory": taken}))


def write_asv(folder):
    """Two commits, the later one with a row that failed."""
    (folder / "asv" / "box").mkdir(parents=True)
    (folder / "asv" / "benchmarks.json").write_text("{}")
    (folder / "asv" / "box" / "machine.json").write_text("{}")
    name = "attention.Limits.track_share_of_peak"
    for i, (commit, values) in enumerate(zip(COMMITS, ([0.5, 0.25], [0.625, None]), strict=True)):
        figures = {
            "commit_hash": commit, "date": 1000 - i, "env_vars": {"NUMBA_NUM_THREADS": "2"},
            "params": {"cpu": "A <fast> one", "os": "Linux", "machine": "box"},
            "result_columns": ["result", "params", "version"],
            "results": {name: [values, [["'float32'", "'float64'"]], "1"], "other.time_it": [None, [], "2"]},
        }  # fmt: skip
        (folder / "asv" / "box" / f"{commit[:8]}.json").write_text(json.dumps(figures))


@pytest.fixture
def page(tmp_path, capsys, matplotlib):
    """Run the command on the folder; the page."""

    def page():
        assert report.main(["--results", str(tmp_path)]) == 0
        assert "kB" in capsys.readouterr().out
        return Page((tmp_path / "report.html").read_text())

    return page


@pytest.fixture
def complaint(tmp_path, capsys):
    """Run the command; the one sentence in which it says why there is no page."""

    def complaint():
        assert report.main(["--results", str(tmp_path)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("report.py: error: ")
        assert err.count("\n") == 1
        assert not (tmp_path / "report.html").exists()
        return err

    return complaint


def spread(values):
    """As the page writes a median and half an interquartile range."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    return f"{middle:.2f} ±{(high - low) / 2:.2f}"


class TestNumbers:
    @pytest.fixture
    def rows(self, tmp_path, rng):
        return write(tmp_path, measure(rng, "PyTorch", "NumPy"))["rows"]

    @staticmethod
    def rounds(row, label):
        return np.array([seconds[label] for seconds in row["rounds"]])

    def test_ratios(self, rows, page):
        captions = ["Prefill, float32"] * 4 + [
            "Prefill, bfloat16, float16 and float64",
            "Decode",
            "Decode",
            "Softmax",
        ]
        found = page()
        for row, caption in zip(rows, captions, strict=True):
            for peer in ("PyTorch", "NumPy"):
                expected = spread(self.rounds(row, peer) / self.rounds(row, "nbattn"))
                assert found.value(f"{caption}: time over nbattn's", row["name"], peer) == expected

    def test_geometric_means(self, rows, page):
        found, caption = page(), "Geometric means of time over nbattn's"
        each = np.array(
            [
                [
                    np.median(self.rounds(row, peer) / self.rounds(row, "nbattn"))
                    for peer in ("PyTorch", "NumPy")
                ]
                for row in rows[:4]
            ]
        )
        for peer, mean in zip(("PyTorch", "NumPy"), np.exp(np.log(each).mean(axis=0)), strict=True):
            assert found.value(caption, peer, "Prefill, float32") == f"{mean:.1f}"
        best = each.min(axis=1)
        expected = f"{np.exp(np.log(best).mean()):.1f}"
        assert found.value(caption, "the fastest peer of each row", "Prefill, float32") == expected
        assert found.value(caption, "rows in which a peer is ahead", "Prefill, float32") == str(
            (best < 1).sum()
        )
        assert found.value(caption, "rows", "Prefill, float32") == "4"

    def test_shares(self, rows, page):
        found = page()
        for row in rows[:5]:
            for label in ("nbattn", "PyTorch"):
                expected = spread(self.rounds(row, "limit") / self.rounds(row, label))
                assert found.value("Share of the processor's peak", row["name"], label) == expected

    def test_decode(self, rows, page):
        found = page()
        for row in rows[5:7]:
            for label, column in (("nbattn", "nbattn"), ("NumPy", "NumPy"), ("limit", "read rate")):
                median = np.median(row["work"] / self.rounds(row, label) / 1e9)
                assert found.value("Decode, GB/s", row["name"], column).split()[0] == f"{median:.1f}"
            expected = spread(self.rounds(row, "limit") / self.rounds(row, "nbattn"))
            assert found.value("Decode, GB/s", row["name"], "nbattn's share") == expected

    def test_memory(self, tmp_path, page):
        write_memory(tmp_path)
        found = page()
        assert found.value("MB beyond inputs and result", "128", "nbattn").split()[0] == "0.2"
        assert found.value("MB beyond inputs and result", "1024", "NumPy") == "10.8 ±3.6"

    def test_what_is_drawn(self, tmp_path, rows, page):
        """The lines go through the numbers of the tables."""
        (found,) = measured.read_peers(tmp_path / "peers").values()
        (axes,) = parts.share_of_peak(found).panels[1].figure.axes
        lines = {line.get_color(): line.get_xydata() for line in axes.lines if len(line.get_xydata()) == 2}
        causal = [row for row in rows if row["name"].endswith("causal")]
        expected = [
            [row["case"]["length"], np.median(self.rounds(row, "limit") / self.rounds(row, "NumPy"))]
            for row in causal
        ]
        np.testing.assert_allclose(lines[parts.STYLES["NumPy"].colour], expected)
        (axes,) = parts.decode(found).panels[0].figure.axes
        (stroke,) = (line.get_xdata() for line in axes.lines if line.get_marker() == "|")
        np.testing.assert_allclose(stroke, np.median(rows[5]["work"] / self.rounds(rows[5], "limit")) / 1e9)

    def test_history(self, tmp_path, page):
        write_asv(tmp_path)
        found = page()
        caption = (
            "Prefill, 8 heads of 1024 x 64: share of the processor's peak; 2 threads, A <fast> one, Linux"
        )
        header, *lines = found.tables[caption]
        assert header == ["commit", "float32", "float64"]
        # By the date of the commit.
        assert lines == [["bbbbbbbb", "0.62", ""], ["aaaaaaaa", "0.50", "0.25"]]

    def test_wrong_and_failed_peers_are_named(self, tmp_path, page, rng):
        rows = measure(rng, "PyTorch")
        rows[0].troubles = {
            "JAX": "is wrong by 1.0e+00, so not timed",
            "OpenVINO": "failed: no such operator",
        }
        write(tmp_path, rows)
        found, caption = page(), "Prefill, float32: time over nbattn's"
        assert found.value(caption, rows[0].case.name, "JAX") == "wrong"
        assert found.value(caption, rows[0].case.name, "OpenVINO") == "failed"
        assert found.value(caption, rows[1].case.name, "OpenVINO") == ""

    def test_a_peer_of_one_round_has_no_spread(self, tmp_path, page, rng):
        rows = measure(rng, "PyTorch")
        for seconds in rows[0].rounds[1:]:
            del seconds["PyTorch"]
        write(tmp_path, rows)
        first = rows[0].rounds[0]
        value = page().value("Prefill, float32: time over nbattn's", rows[0].case.name, "PyTorch")
        assert value == f"{first['PyTorch'] / first['nbattn']:.2f}"


class TestPage:
    def test_says_where_when_and_of_what(self, tmp_path, page, rng):
        write(tmp_path, measure(rng, "PyTorch"), missing={"JAX": "jax is not installed"})
        write_memory(tmp_path)
        words = page().words
        assert "A <fast> one, 2 threads" in words
        assert (
            "Measured 2026-01-31 to 2026-02-01, the library as of commit abc123 (prefill, decode, softmax)"
            in words
        )
        assert ", unknown (memory), with Python" in words
        assert "Python 3.12.1, nbattn 0.1.0, PyTorch 2.13" in words
        assert "Not there: JAX (jax is not installed)" in words

    def test_same_bytes_and_no_id_twice(self, tmp_path, page, rng):
        write(tmp_path, measure(rng, "PyTorch", "NumPy"))
        write_memory(tmp_path)
        write_asv(tmp_path)
        first, second = page(), page()
        assert first.text == second.text
        assert len(set(first.ids)) == len(first.ids) > 0
        assert len(first.pictures) == 10
        assert all(picture["role"] == "img" and picture["aria-label"] for picture in first.pictures)
        assert "Left out" not in first.words

    def test_each_processor_for_itself(self, tmp_path, page, rng):
        for name, where in (("a", "One"), ("b", "Two")):
            write(tmp_path, measure(rng, "PyTorch"), f"{name}.json", machine=MACHINE | {"CPU": where})
        write(
            tmp_path, measure(rng, "PyTorch"), "c.json", machine=MACHINE | {"threads": "1"}, date="2026-03-01"
        )
        words = page().words
        places = [
            words.index(place) for place in ("A <fast> one, 1 threads", "One, 2 threads", "Two, 2 threads")
        ]
        assert places == sorted(places)

    @pytest.mark.parametrize(
        ("old", "new"),
        [({"date": "2026-01-30", "quick": False}, {}), ({}, {"quick": False})],
        ids=["the newest", "of one day the longer"],
    )
    def test_row_measured_twice(self, tmp_path, page, rng, old, new):
        for name, head in (("2.json", old), ("1.json", new)):
            rows = measure(rng, "PyTorch")
            write(tmp_path, rows[:1] if name == "1.json" else rows, name, **head)
        caption, name = "Prefill, float32: time over nbattn's", rows[0].case.name
        assert page().value(caption, name, "PyTorch") == parts.cell(rows[0].ratio("PyTorch"))

    def test_what_has_no_results_is_left_out_in_a_sentence(self, tmp_path, page, rng):
        write(tmp_path, measure(rng))
        words = page().words
        for how in (
            "peers.py --quick --json FILE",
            "peers.py --json FILE",
            "benchmarks.memory --json FILE",
            "asv run",
        ):
            assert words.count(f"{how} ") == 1, how
        assert words.count("Left out, as there are no results of it") == 4
        assert "Decode bandwidth" in words

    def test_memory_alone(self, tmp_path, page):
        write_memory(tmp_path)
        found = page()
        assert found.words.count("Left out, as there are no results of it") == 5
        assert list(found.tables) == ["MB beyond inputs and result"]

    def test_what_is_committed(self, page):
        """Made of the files beside it, and small enough to be looked at on a phone."""
        path = report.RESULTS / "report.html"
        if not path.exists():
            pytest.skip("a copy without benchmarks/results")
        assert path.stat().st_size < 500_000
        kept = Page(path.read_text(encoding="utf-8"))
        places = measured.read_peers(report.RESULTS / "peers")
        # The pictures depend on matplotlib's version too.
        now = Page(report.page(places.values(), measured.read_asv(report.RESULTS / "asv")))
        assert kept.tables == now.tables, "python -m benchmarks.report makes it anew"
        assert kept.words.split("In short")[0] == now.words.split("In short")[0]


def test_every_peer_has_a_style_and_every_suite_a_place():
    assert set(parts.STYLES) == {"nbattn", *rivals.COLUMNS}
    placed = [types.SimpleNamespace(suite=suite, group="") for suite in peers.SUITES]
    assert all(sum(of(row) for of in parts.GROUPS.values()) == 1 for row in placed)


def test_a_machine_of_which_asv_knows_the_name_alone(tmp_path):
    write_asv(tmp_path)
    for path in (tmp_path / "asv" / "box").glob("*.json"):
        if path.name != "machine.json":
            figures = json.loads(path.read_text()) | {"params": {"machine": "box", "python": "3.11"}}
            path.write_text(json.dumps(figures))
    assert {x.machine for x in measured.read_asv(tmp_path / "asv")} == {"box"}


class TestBadInput:
    def test_no_results(self, tmp_path, complaint):
        assert (
            f"{tmp_path} holds no results; python benchmarks/peers.py --json FILE makes some" in complaint()
        )

    def test_no_matplotlib(self, tmp_path, complaint, monkeypatch, rng):
        write(tmp_path, measure(rng, "PyTorch"))
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert 'pip install "nbattn[plot]"' in complaint()

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ('{"date": ', "cannot be read as JSON: Expecting value: line 1"),
            ("\xff", "cannot be read as JSON: "),
            ("[]", "is not what peers.py or memory.py writes"),
            ('{"date": "2026-01-31"}', "is not what peers.py or memory.py writes: KeyError at 'machine'"),
        ],
    )
    def test_broken_file(self, tmp_path, complaint, rng, text, words):
        write(tmp_path, measure(rng, "PyTorch"))
        (tmp_path / "peers" / "broken.json").write_text(text, encoding="latin1")
        assert f"{tmp_path / 'peers' / 'broken.json'} {words}" in complaint()

    @pytest.mark.parametrize("key", ["name", "rounds", "work", "case", "troubles"])
    def test_broken_row(self, tmp_path, complaint, rng, key):
        figures = write(tmp_path, measure(rng, "PyTorch"))
        figures["rows"][3][key] = None
        (tmp_path / "peers" / "quick.json").write_text(json.dumps(figures))
        assert f"{tmp_path / 'peers' / 'quick.json'} is not what peers.py or memory.py writes" in complaint()

    def test_broken_asv(self, tmp_path, complaint):
        write_asv(tmp_path)
        path = tmp_path / "asv" / "box" / "aaaaaaaa.json"
        path.write_text(path.read_text().replace('"result_columns"', '"columns"'))
        assert f"{path} is not what asv writes: KeyError at 'result_columns'" in complaint()

    def test_folder_that_cannot_be_written(self, tmp_path, capsys, matplotlib):
        write_memory(tmp_path)
        assert report.main(["--results", str(tmp_path), "--out", str(tmp_path / "no" / "x.html")]) == 2
        assert "x.html" in capsys.readouterr().err


class TestCommit:
    def test_of_the_library_and_what_is_changed_since(self, tmp_path, monkeypatch):
        def git(*command):
            who = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
            subprocess.run(["git", "-C", tmp_path, *who, *command], check=True, capture_output=True)

        monkeypatch.setattr(machine, "ROOT", tmp_path)
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        assert machine.commit() is None
        git("init")
        (tmp_path / "nbattn").mkdir()
        for folder in ("nbattn", "."):
            (tmp_path / folder / "file").write_text("1")
            git("add", "-A")
            git("commit", "-m", folder)
        of_library = subprocess.check_output(["git", "-C", tmp_path, "rev-parse", "HEAD~1"], text=True)
        assert machine.commit() == of_library[:10]
        (tmp_path / "nbattn" / "file").write_text("2")
        assert machine.commit() == f"{of_library[:10]}+"


class TestMemory:
    @pytest.mark.skipif(not memory.PEAK_IS_NOW.exists(), reason="needs Linux")
    def test_growth(self):
        """NumPy keeps scores and weights, nbattn neither."""
        n = 2048
        ours, theirs = (memory.apart(label, n, 1) for label in ("nbattn", "NumPy"))
        assert 0 <= ours["bytes"] < 4 * n**2 / 4
        assert 2 * 4 * n**2 < theirs["bytes"] < 5 * 4 * n**2

    def test_missing_library(self, monkeypatch):
        monkeypatch.setattr(memory, "apart", lambda *_: {"trouble": "torch is not installed"})
        monkeypatch.setattr(memory, "LIBRARIES", {"PyTorch": "PyTorch"})
        found = memory.measure(1, [128], 1)
        assert found["missing"] == {"PyTorch": "torch is not installed"}
        assert found["memory"] == []
        assert "- PyTorch is left out: torch is not installed." in memory.report(found)

    @pytest.mark.parametrize(
        "options", [["--json", "no/such/folder/x.json"], ["--json", "."], ["--threads", "0"]]
    )
    def test_bad_options(self, monkeypatch, capsys, options):
        """Told before anything is measured."""
        monkeypatch.setattr(memory, "measure", pytest.fail)
        with pytest.raises(SystemExit) as stop:
            memory.main(options)
        assert stop.value.code == 2
        assert f"memory.py: error: argument {options[0]}: " in capsys.readouterr().err

    def test_trouble_of_a_process(self):
        assert memory.apart("Nothing", 128, 1) == {"trouble": "'Nothing'"}
