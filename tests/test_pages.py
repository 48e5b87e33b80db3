"""asv's pages in a real browser: the index lists every suite, and a graph has a line through two commits.

Needs Chromium (of the system's packages) and asv. Offline the libraries that the pages take from the network
are taken from npm's packages, which `NPM` puts into .asv.
"""

import collections
import functools
import html
import http.server
import importlib.util
import json
import math
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from benchmarks.measured import GAUGES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "asv"
GRAPH = "attention.Prefill.time_attention"
"""Which the oldest commits have too."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MODULES = ROOT / ".asv" / "node_modules"
NPM = (
    "npm install --prefix .asv jquery@3.3.1 flot@0.8.3 flot-orderbars@1.0.0 blueimp-md5@2.19.0 "
    "bootstrap@3.1.1 stupid-table-plugin@1.1.3"
)

# Walks through the pages in a frame and then says what it saw.
PROBE = """<!doctype html><body>
<iframe src="index.html" style="width: 1200px; height: 900px"></iframe>
<script>
const frame = document.querySelector("iframe"), seen = {}
const inner = () => frame.contentWindow
async function until(what) {
    for (let i = 0; i < 200; i++) {
        try { const found = what(); if (found) return found } catch (error) { seen.trouble = String(error) }
        await new Promise(done => setTimeout(done, 50))
    }
    throw Error("in vain: " + what + " at " + inner().location)
}
async function walk() {
    const all = query => [...inner().document.querySelectorAll(query)]
    await until(() => all(".benchmark-group h1").length)
    seen.groups = Object.fromEntries(all(".benchmark-group").map(group => [
        group.querySelector("h1").innerText, group.querySelectorAll(".benchmark-container").length]))
    inner().location.hash = "#GRAPH"
    const plot = await until(() => {
        const plot = inner().$("#main-graph").data("plot")
        return plot && plot.getData().length && plot
    })
    const canvas = plot.getCanvas(), context = canvas.getContext("2d")
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data
    const drawn = colour => {
        const wanted = colour.match(/[0-9]+/g).map(Number), columns = new Set()
        for (let i = 0; i < pixels.length; i += 4)  // the edge of a thin line is half transparent
            if (pixels[i + 3] > 60 && wanted.every((x, k) => Math.abs(pixels[i + k] - x) < 12))
                columns.add(i / 4 % canvas.width)
        return columns.size
    }
    seen.title = inner().document.querySelector("#title").innerText
    seen.width = canvas.width
    seen.lines = plot.getData().map(line => ({
        label: line.label, columns: drawn(line.color),
        points: line.data.filter(point => point && point[1] !== null).length}))
}
walk().then(() => delete seen.trouble, error => seen.trouble = String(error)).finally(() => {
    frame.remove()
    document.body.innerText = JSON.stringify(seen)
    document.title = "done"
})
</script></body>
"""


@pytest.fixture(scope="module")
def browser():
    """Shows a page of a folder and gives back what is then in it."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        pytest.skip(f"needs a browser: one of {', '.join(BROWSERS)}")

    def show(folder, page, profile):
        handler = functools.partial(Quiet, directory=folder)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            try:
                done = subprocess.run(
                    [
                        found, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
                        "--virtual-time-budget=60000", "--dump-dom",
                        f"http://127.0.0.1:{server.server_port}/{page}",
                    ],
                    capture_output=True, text=True, timeout=60, check=True,
                )  # fmt: skip
            finally:
                server.shutdown()
        return done.stdout

    return show


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def localise(folder):
    """Give the index the libraries that asv takes from elsewhere, from npm's packages.

    Their minified forms are not all in there, so the hashes, which are those of the minified, go.
    """
    index = folder / "index.html"
    text = index.read_text(encoding="utf-8")
    for url, rest in re.findall(r'"(https://[^"]+\.(?:js|css))"([^>]*)', text):
        name = re.sub(r"-\d[\d.]*\d", "", url.rsplit("/", 1)[1])
        files = [path for form in (name, name.replace(".min", "")) for path in sorted(MODULES.rglob(form))]
        assert files, f"{name} is not in {MODULES}; {NPM}"
        shutil.copy(files[0], folder / name)
        text = text.replace(f'"{url}"{rest}', f'"{name}"')
    index.write_text(text, encoding="utf-8")


def online():
    try:
        socket.create_connection(("cdn.jsdelivr.net", 443), timeout=3).close()
    except OSError:
        return False
    return True


@pytest.fixture
def walk(browser, tmp_path):
    """Publish what a configuration says, and walk through its pages; what was seen there."""
    if not importlib.util.find_spec("asv"):
        pytest.skip("needs asv: pip install asv")
    if not MODULES.is_dir() and not online():
        pytest.skip(f"the pages take libraries from the network, and there are no copies of them: {NPM}")

    def walk(conf):
        folder = tmp_path / "html"
        command = [sys.executable, "-m", "asv", "--config", str(conf), "publish", "--no-pull"]
        done = subprocess.run(
            [*command, "--html-dir", str(folder)],
            cwd=conf.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        if MODULES.is_dir():
            localise(folder)
        (folder / "probe.html").write_text(PROBE.replace("GRAPH", GRAPH), encoding="utf-8")
        shown = browser(folder, "probe.html", tmp_path / "profile")
        found = re.search(r"<body[^>]*>(\{.*\})", shown, re.DOTALL)
        assert found, f"the pages were not walked through to their end: {shown}"
        return json.loads(html.unescape(found[1]))

    return walk


def suites():
    """Every module of benchmarks/ that has rows, and how many."""
    code = "import sys; from asv_runner.discovery import _discover; _discover(['benchmarks', sys.argv[1]])"
    with tempfile.NamedTemporaryFile() as file:
        subprocess.run([sys.executable, "-c", code, file.name], cwd=ROOT, check=True)
        return {row["name"]: row for row in json.load(file)}


def made_up(folder, rows):
    """A repository of two commits, and results of both, in which the second's are larger by 1."""

    def git(*command):
        who = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *who, *command], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q", "-b", "main")
    machine = {"machine": "box", "arch": "x86_64", "cpu": "one", "num_cpu": "2", "os": "Linux", "ram": "1"}
    (folder / "results" / "box").mkdir(parents=True)
    (folder / "results" / "box" / "machine.json").write_text(json.dumps(machine | {"version": 1}))
    (folder / "results" / "benchmarks.json").write_text(json.dumps(rows | {"version": 2}))
    for factor in (1, 2):
        git("commit", "-q", "--allow-empty", "-m", str(factor))
        results = {
            name: [
                [factor + i for i in range(math.prod(map(len, row["params"])))],
                row["params"],
                row["version"],
            ]
            for name, row in rows.items()
        }
        figures = {
            "commit_hash": git("rev-parse", "HEAD"), "date": 1_700_000_000_000 + factor, "env_name": "x",
            "params": machine | {"python": "3"}, "python": "3", "requirements": {}, "env_vars": {},
            "result_columns": ["result", "params", "version"], "results": results, "durations": {},
            "version": 2,
        }  # fmt: skip
        (folder / "results" / "box" / f"{factor}.json").write_text(json.dumps(figures))
    conf = {
        "version": 1, "project": "nbattn", "repo": ".", "branches": ["main"], "results_dir": "results",
        "benchmark_dir": str(ROOT / "benchmarks"), "html_dir": "html", "env_dir": "env",
    }  # fmt: skip
    (folder / "asv.conf.json").write_text(json.dumps(conf))
    return folder / "asv.conf.json"


def counts(rows):
    found = collections.Counter(name.partition(".")[0] for name in rows)
    return dict(found)


def assert_a_line(seen, points):
    """One through that many commits, drawn over a good part of the picture."""
    assert "trouble" not in seen, seen
    assert seen["title"] == GRAPH
    assert any(line["points"] >= points and line["columns"] > seen["width"] / 2 for line in seen["lines"]), (
        seen
    )


def test_made_up_results_of_every_suite(walk, tmp_path):
    rows = suites()
    assert {"attention", "decode", "softmax", "variants", "startup"} <= counts(rows).keys()
    assert GAUGES.keys() <= rows.keys()  # which the report draws too
    (tmp_path / "made").mkdir()
    seen = walk(made_up(tmp_path / "made", rows))
    assert_a_line(seen, 2)
    assert seen["groups"] == counts(rows)


@pytest.mark.skipif(not RESULTS.is_dir(), reason="a copy without benchmarks/results/asv")
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the history, which a copy without .git lacks")
def test_committed_results(walk):
    seen = walk(ROOT / "asv.conf.json")
    assert_a_line(seen, 2)
    rows = json.loads((RESULTS / "benchmarks.json").read_text())
    del rows["version"]
    assert seen["groups"] == counts(rows)
