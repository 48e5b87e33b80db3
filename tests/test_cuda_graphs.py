"""Caches in CUDA graphs: what captured calls would record, what launches find, and what is refused."""

import gc
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import simulated_gpu
from cached import input_dtype
from ml_dtypes import bfloat16
from oracle import normal
from test_cuda_arrays import cupy, torch  # noqa: F401

import benchmarks.cuda
from nbattn import KVCache, PagedKVCache
from nbattn.cache import GRAPH_REACH
from nbattn.cuda import launch
from nbattn.cuda.decode_tiles import REACH

pytestmark = pytest.mark.cuda_sim


@pytest.fixture
def gpu():
    with simulated_gpu.installed(capabilities=((8, 0), (8, 0))) as library:
        yield library


class TestAppend:
    """The simulated GPU makes captured launches at once, on GPUs without tensor cores too."""

    @pytest.fixture
    def gpu(self):
        with simulated_gpu.installed(capabilities=((7, 5), (7, 5))) as library:
            yield library

    @pytest.mark.parametrize("window", [None, 5])
    def test_contiguous(self, torch, gpu, window, rng):  # noqa: F811
        kinds = {"window": window, "rotary_base": 100.0}
        here, there = (KVCache(2, 1, 8, 8, backend=b, **kinds) for b in ("reference", "cuda"))
        x = normal(rng, (2, 1, 4, 8))
        here.append(x, x, [4, 2]), there.append(x, x, [4, 2])
        for _ in range(3):
            x = normal(rng, (2, 1, 1, 8))
            here.append(x, x)
            there.advance()
            np.testing.assert_array_equal(here.lengths, there.lengths)
            gpu.captured = {70}
            sent = gpu.calls.count("cuMemcpyHtoDAsync_v2")
            there.append(torch.to(x), torch.to(x))
            assert gpu.calls.count("cuMemcpyHtoDAsync_v2") == sent
            gpu.captured = set()
            np.testing.assert_array_equal(here.lengths, there.lengths)
            got = there.attend(torch.to(x)).numpy()
            np.testing.assert_allclose(got, here.attend(x), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("storage", ["float32", "int4"])
    def test_pages(self, torch, gpu, storage, rng):  # noqa: F811
        """Launches for any two of three sequences, which take pages, part from forks and end."""
        kinds = {"rotary_base": 100.0}
        here, there = (PagedKVCache(20, 4, 1, 32, storage, backend=b, **kinds) for b in ("reference", "cuda"))
        handles = [(here.add(), there.add())[0] for _ in range(3)]
        x = normal(rng, (3, 1, 6, 32))
        here.append(handles, x, x, [6, 2, 4]), there.append(handles, x, x, [6, 2, 4])
        there.reserve(handles[:2], 9)
        there.reserve(handles[1:], 13)
        assert there.free_pages == 20 - 4 - 4 - 5
        for pair in ([0, 1], [0, 1], [2, 0], [1, 2], [1, 2], [1, 2], [2, 1]):
            x = normal(rng, (2, 1, 2, 32))
            here.append(pair, x, x)
            there.advance(pair, 2)
            gpu.captured = {70}
            sent = gpu.calls.count("cuMemcpyHtoDAsync_v2")
            there.append([0, 1], torch.to(x), torch.to(x))  # whichever were named when it was recorded
            assert gpu.calls.count("cuMemcpyHtoDAsync_v2") == sent
            gpu.captured = set()
            assert here.lengths == there.lengths
            got = there.attend(handles, torch.to(x[[0, 1, 0]])).numpy()
            np.testing.assert_allclose(got, here.attend(handles, x[[0, 1, 0]]), rtol=1e-5, atol=1e-6)
        assert there.free_pages == 20 - 4 - 4 - 5
        for handle in handles:
            there.free(handle)
        assert there.free_pages == 20


class TestPages:
    """What launches find on the GPU, and when they find nothing."""

    @pytest.fixture
    def cache(self, gpu, torch):  # noqa: F811
        torch.cuda = None  # has one, so that streams are asked for
        cache = PagedKVCache(12, 4, 2, 32, "float16", backend="cuda")
        self.x = torch.to(np.zeros((2, 2, 5, 32), np.float16))
        cache.append([cache.add(), cache.add()], self.x, self.x, [5, 3])
        cache.reserve([0, 1], 4)
        return cache

    @staticmethod
    def found(recorded):
        return simulated_gpu.view(recorded.there).tolist()

    def test_found(self, cache, gpu):
        recorded = cache._recorded[2]
        assert self.found(recorded) == [-1, -1]
        cache.advance([0, 1], 3)
        assert self.found(recorded) == [8, 6]
        np.testing.assert_array_equal(simulated_gpu.view(recorded.table)[:, :2], cache._table[:2, :2])
        sent = []
        copy = gpu.cuMemcpyHtoDAsync_v2
        gpu.cuMemcpyHtoDAsync_v2 = lambda *a: sent.append((a[2], a[3])) or copy(*a)
        cache.advance([0, 1])
        cache.advance([1, 0], 0)
        assert sent == [(16, 70), (16 + 2 * 4 * recorded.width, 70)]
        assert self.found(recorded) == [7, 9]
        np.testing.assert_array_equal(simulated_gpu.view(recorded.table)[::-1], cache._table[:2, :3])

    @pytest.mark.parametrize(
        "change",
        [
            lambda c, x: c.append([1], x, x), lambda c, x: c.fork(1), lambda c, x: c.free(0),
            lambda c, x: c.truncate(0, 5), lambda c, x: c.reset(), lambda c, x: c.reserve([1], 1),
            lambda c, x: (c.reserve([0], 1), c.advance([0])),
        ],
    )  # fmt: skip
    def test_nobody_s_once_a_sequence_has_changed(self, cache, torch, change):  # noqa: F811
        cache.advance([0, 1])
        third = cache.add()
        cache.append(third, *[torch.to(np.zeros((1, 2, 1, 32), np.float16))] * 2)  # is nobody's either
        assert self.found(cache._recorded[2]) == [6, 4]
        change(cache, torch.to(np.zeros((1, 2, 1, 32), np.float16)))
        assert self.found(cache._recorded[2]) == [-1, -1]
        if {0, 1} <= {*cache.lengths}:
            cache.reserve([0, 1], 1)
            cache.advance([0, 1])
            assert min(self.found(cache._recorded[2])) > 0

    def test_a_reserve_that_reaches_further(self, cache):
        old = cache._recorded[2]
        cache.advance([0, 1])
        cache.reserve([0, 1], 2)
        assert cache._recorded[2] is old
        cache.reserve([0, 1], 8)
        cache.advance([0, 1])
        assert (self.found(old), self.found(cache._recorded[2])) == ([-1, -1], [7, 5])
        simulated_gpu.view(old.table)  # is there for as long as the cache

    def test_another_stream_is_waited_for(self, cache, gpu, torch):  # noqa: F811
        torch.streams[0] = 71
        before = gpu.calls.count("cuCtxSynchronize")
        cache.advance([0, 1]), cache.advance([0, 1])
        assert gpu.calls.count("cuCtxSynchronize") == before + 1
        torch.streams[0] = 72  # launches on 71 may still read what is taken back
        cache.truncate(0, 1)
        assert gpu.calls.count("cuCtxSynchronize") == before + 2

    def test_what_is_refused_takes_nothing_back(self, cache, torch):  # noqa: F811
        cache.advance([0, 1])
        x = torch.to(np.zeros((1, 2, 50, 32), np.float16))
        for call in (lambda: cache.reserve([0, 1], 40), lambda: cache.append(0, x, x)):
            with pytest.raises(ValueError, match=r"pages and \d+ are free"):
                call()
            assert self.found(cache._recorded[2]) == [6, 4]

    def test_an_append_captured_after_its_advance(self, cache, gpu):
        """What the next launch would write is checked at once."""
        cache.fork(0)
        cache.reserve([0, 1], 4)
        cache.advance([0, 1])
        gpu.captured = {70}
        with pytest.raises(ValueError, match="a fork shares a page that the launch would write"):
            cache.append([0, 1], self.x, self.x)

    def test_refused(self, cache, gpu, torch):  # noqa: F811
        cache.advance([0, 1])
        cache.append(third := cache.add(), *[torch.to(np.zeros((1, 2, 20, 32), np.float16))] * 2)
        free, lengths = cache.free_pages, cache.lengths
        for call, message in (
            (lambda: cache.advance([0, 1], 7), r"lengths\[0\] is 13; but there is room for 12; reserve more"),
            (lambda: cache.advance([0, third], 0), r"\[1\] is 20; but graphs reach 12; reserve, and capture"),
            (lambda: cache.advance([0, 0]), r"are \[0, 0\]; an advance can name each one only"),
            (lambda: cache.advance([0]), "call reserve for 1 sequences before"),
            (lambda: cache.advance([0, 9]), "sequence 9 is not in the cache"),
            (lambda: cache.advance([0, 1], -1), "count is -1"),
            (lambda: cache.advance([0, 1], 2**63 - 1), "all pages together hold 48 positions"),
            (lambda: cache.reserve([0, 1], 40), "positions need 18 pages and 2 are free"),
            (lambda: PagedKVCache(1, 1, 1, 8).advance([]), "is for graphs of a cache with backend"),
        ):
            with pytest.raises(ValueError, match=message):
                call()
            assert (cache.free_pages, cache.lengths) == (free, lengths)

    def test_nothing_changes_while_a_graph_is_captured(self, cache, gpu):
        """Else it would be part of the graph, and done with every launch."""
        cache.advance([0, 1])
        before = cache.lengths, cache.free_pages
        gpu.captured = {70}
        for call in (
            lambda: cache.advance([0, 1]), lambda: cache.reserve([0, 1], 1), lambda: cache.fork(0),
            lambda: cache.truncate(0, 1), lambda: cache.free(1), cache.reset,
            KVCache(1, 1, 4, 8, backend="cuda").advance,
        ):  # fmt: skip
            with pytest.raises(ValueError, match="a graph is captured on the current stream"):
                call()
        assert (cache.lengths, cache.free_pages) == before

    def test_a_fork_s_pages_are_not_written(self, cache):
        cache.fork(0)
        with pytest.raises(ValueError, match="a fork shares a page that the launch would write"):
            cache.advance([0, 1])
        assert cache.lengths == {0: 5, 1: 3, 2: 5}
        before = cache.free_pages
        cache.reserve([0, 1], 4)
        assert cache.free_pages == before - 1
        cache.advance([0, 1])

    @pytest.mark.parametrize("fails", ["cuMemAlloc_v2", "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoDAsync_v2"])
    def test_calls_that_fail(self, cache, gpu, fails):
        cache.fork(0)
        before = cache.free_pages, cache.lengths, cache._uses.copy(), cache._table.copy()
        gpu.fail = {fails: 1}
        for call in (lambda: cache.reserve([0, 1], 9), lambda: cache.advance([1, 0], 0)):
            if fails == "cuMemcpyHtoDAsync_v2" or "reserve" in call.__code__.co_names:
                with pytest.raises(RuntimeError, match=f"{fails} fails"):
                    call()
        gpu.fail = {}
        assert (cache.free_pages, cache.lengths) == before[:2]
        np.testing.assert_array_equal(cache._uses, before[2])
        np.testing.assert_array_equal(cache._table[:2, :3], before[3][:2, :3])
        cache.reserve([0, 1], 4)
        cache.advance([0, 1])
        assert self.found(cache._recorded[2]) == [6, 4]


class TestGraphs:
    """Calls while a graph is captured: what they would record, and what they refuse."""

    @pytest.mark.parametrize("storage", ["bfloat16", "int8"])
    @pytest.mark.parametrize("window", [None, 65])
    def test_attend(self, gpu, torch, storage, window, monkeypatch):  # noqa: F811
        """Nothing comes from the host, and the kernel reads lengths where `advance` leaves them."""
        made = []
        monkeypatch.setattr(launch, "run", lambda *x: made.append((x[0].name, x[1], x[2])))
        cache = KVCache(2, 2, 70, 32, storage, window=window, rotary_base=10.0, backend="cuda")
        q = torch.to(np.zeros((2, 4, 2, 32), input_dtype(storage)))
        sinks = torch.to(np.zeros(4, np.float32))
        cache.advance(30)
        gpu.captured, gpu.fail = {70}, {"cuMemcpyHtoDAsync_v2": 1}
        cache.attend(q, sinks=sinks)
        (_, turned, _), (name, values, blocks) = made
        lengths = cache._places.there.address
        assert (turned["starts"], turned["start"]) == (lengths, -2)
        assert name.startswith(f"decode-mma-{storage}")
        assert (values["key_lengths"], values["from_end"]) == (lengths, 1)
        assert blocks == 4 * (1 if window is None else 2)
        np.testing.assert_array_equal(simulated_gpu.view(cache._places.there), [30, 30])

    @pytest.mark.parametrize("storage", ["bfloat16", "int8"])
    def test_attend_pages(self, gpu, torch, storage, monkeypatch):  # noqa: F811
        made = []
        monkeypatch.setattr(launch, "run", lambda *x: made.append((x[0].name, x[1], x[2])))
        cache = PagedKVCache(80, 16, 2, 32, storage, rotary_base=10.0, backend="cuda")
        q = torch.to(np.zeros((2, 4, 2, 32), input_dtype(storage)))
        cache.reserve([cache.add(), cache.add()], 600)
        gpu.captured, gpu.fail = {70}, {"cuMemcpyHtoDAsync_v2": 1}
        cache.attend([1, 0], q)
        (_, turned, _), (name, values, blocks) = made
        recorded = cache._recorded[2]
        assert (turned["starts"], turned["start"]) == (recorded.there.address, -2)
        assert name.startswith(f"decode-mma-{storage}")
        assert (values["key_lengths"], values["from_end"]) == (recorded.there.address, 1)
        assert (values["page_table"], values["table_width"]) == (recorded.table.address, 38)
        assert blocks == 4 * 2  # chunks of 512

    @pytest.mark.parametrize("page_size", benchmarks.cuda.Graph.params[1])
    @pytest.mark.parametrize("storage", benchmarks.cuda.Graph.params[0])
    def test_benchmark(self, gpu, torch, storage, page_size, monkeypatch):  # noqa: F811
        """A row is a step that `advance` and a replay make, and a wait for it."""
        made, done = [], []
        monkeypatch.setattr(launch, "run", lambda kernel, *_: made.append(kernel.name))
        monkeypatch.setattr(launch.Call, "__call__", lambda *_: None)  # the prompt's append
        monkeypatch.setattr(launch, "require", lambda: None)
        monkeypatch.setattr(benchmarks.cuda, "SIZES", (8, 40, 32))
        monkeypatch.setattr(benchmarks.cuda, "normal", lambda _, *shape: torch.to(np.zeros(shape, bfloat16)))

        @contextmanager
        def graph(graph):
            gpu.captured = {70}
            yield
            gpu.captured = set()

        torch.cuda = SimpleNamespace(
            is_available=lambda: True, synchronize=lambda: done.append("wait"), graph=graph,
            CUDAGraph=lambda: SimpleNamespace(replay=lambda: done.append("replay")),
        )  # fmt: skip
        row = benchmarks.cuda.Graph()
        row.setup(storage, page_size)
        assert [name.partition("-")[0] for name in made[-2:]] == ["append", "decode"]
        made.clear()
        done.clear()
        row.time_step(storage, page_size)
        assert (done, made, row.cache.lengths[0]) == (["replay", "wait"], [], 40)

    @pytest.mark.parametrize(
        "change",
        [lambda c, x: c.append(x, x), lambda c, x: c.append(x, x, [0, 1]), lambda c, x: c.truncate(3),
         lambda c, x: c.reset(1)],
    )  # fmt: skip
    def test_nobody_s_once_the_cache_has_changed(self, gpu, torch, change):  # noqa: F811
        """Nor before the first `advance`, when launches would read what memory happens to hold."""
        torch.cuda = None
        allocate = gpu.allocate
        gpu.allocate = lambda *x: [address := allocate(*x), gpu.bytes(address, 1).fill(7)][0]
        cache = KVCache(2, 2, 9, 32, "float16", window=8, backend="cuda")
        found = simulated_gpu.view(cache._places.there)
        assert found.tolist() == [-1, -1]
        cache.advance(4)
        with pytest.raises(ValueError, match="lengths"):
            cache.truncate(5)
        assert found.tolist() == [4, 4]
        torch.streams[0] = 71  # launches on 70 may still read it
        before = gpu.calls.count("cuCtxSynchronize")
        change(cache, torch.to(np.zeros((2, 2, 1, 32), np.float16)))
        assert found.tolist() == [-1, -1]
        assert gpu.calls.count("cuCtxSynchronize") == before + 1
        cache.advance()
        np.testing.assert_array_equal(found, cache.lengths)

    def test_a_ring_that_went_back(self, gpu, torch, monkeypatch):  # noqa: F811
        """No launch sees positions that later ones have taken the place of."""
        monkeypatch.setattr(launch, "run", lambda *_: None)
        torch.cuda = None
        x = torch.to(np.zeros((2, 2, 2, 32), np.float16))
        ring = KVCache(2, 2, 9, 32, "float16", window=8, backend="cuda")
        ring.advance(20)
        ring.truncate(18)  # holds 11 to 17
        message = "sees from position 10 on, but the ring holds them from 11 on"
        ring.advance()
        gpu.captured = {70}
        with pytest.raises(ValueError, match=message):
            ring.attend(x)  # from 10 on
        gpu.captured = set()
        ring.truncate(18)
        gpu.captured = {70}
        ring.attend(x)
        gpu.captured = set()
        with pytest.raises(ValueError, match=message):
            ring.advance()
        assert (ring.lengths == 18).all()
        ring.advance(2)
        with pytest.raises(ValueError, match=f"would have {2**30} positions; graphs reach {2**30 - 1}"):
            ring.advance(2**30 - 20)
        assert GRAPH_REACH == REACH
        ring.advance(2**30 - 21)

    def test_turned_queries_are_kept(self, gpu, cupy, monkeypatch):  # noqa: F811
        """PyTorch has memory for graphs; another library would soon give it to somebody else."""
        monkeypatch.setattr(launch, "run", lambda *_: None)
        made, empty = [], cupy.empty
        monkeypatch.setattr(cupy, "empty", lambda *x: [y := empty(*x), made.append(weakref.ref(y))][0])
        cache = KVCache(2, 2, 9, 32, "float16", rotary_base=10.0, backend="cuda")
        gpu.captured = {80}
        output = cache.attend(cupy.to(np.zeros((2, 2, 1, 32), np.float16)))
        gc.collect()
        assert [ref() is None for ref in made] == [False, False]
        assert made[1]() is output

    def test_graphs_of_cupy_beside_pytorch(self, gpu, torch, cupy, monkeypatch):  # noqa: F811
        """Lengths are told on the stream of the library that the graph is of."""
        monkeypatch.setattr(launch, "run", lambda *_: None)
        torch.cuda = None
        sent, copy = [], gpu.cuMemcpyHtoDAsync_v2
        gpu.cuMemcpyHtoDAsync_v2 = lambda *x: sent.append(x[3]) or copy(*x)
        for library, stream in ((cupy, 80), (torch, 70)):
            cache = KVCache(2, 2, 9, 32, "float16", backend="cuda")
            gpu.captured = {stream}
            cache.attend(library.to(np.zeros((2, 2, 1, 32), np.float16)))
            gpu.captured = set()
            cache.advance()
            assert sent.pop() == stream

    def test_streams_beside_pytorch_for_the_cpu(self, gpu, torch):  # noqa: F811
        """It has `torch.cuda`, but no streams."""
        torch.cuda, torch._C = SimpleNamespace(), SimpleNamespace()
        cache = KVCache(2, 2, 9, 32, "float16", backend="cuda")
        cache.advance()
        assert simulated_gpu.view(cache._places.there).tolist() == [1, 1]

    def test_refused(self, gpu, torch):  # noqa: F811
        torch.cuda = None  # has one, so that streams are asked for
        x = torch.to(np.zeros((2, 2, 1, 32), np.float16))
        cache, ring = (KVCache(2, 2, 9, 32, "float16", window=w, backend="cuda") for w in (None, 8))
        paged = PagedKVCache(9, 4, 2, 32, "float16", backend="cuda")
        handles = [paged.add(), paged.add()]
        cache.advance(8)
        for count, kind, message in (
            (2, ValueError, "sequence 0 holds 8 of 9"), (2**63 - 1, ValueError, "do not fit"),
            (-1, ValueError, "count is -1"), (1.0, TypeError, "count must be an integer"),
        ):  # fmt: skip
            with pytest.raises(kind, match=message):
                cache.advance(count)
        gpu.fail = {"cuMemcpyHtoDAsync_v2": 1}
        with pytest.raises(RuntimeError, match="fails"):
            cache.advance()
        gpu.fail, gpu.captured = {}, {70}
        three = torch.to(np.zeros((2, 2, 3, 32), np.float16))
        for call, message in (
            (lambda: cache.append(x, x, [1, 1]), "cannot hold lengths"),
            (lambda: cache.attend(x, lengths=[1, 1]), "cannot hold lengths"),
            (lambda: cache.attend(x, sinks=np.ones(2)), "cannot hold what lies on the host"),
            (
                lambda: cache.attend(x, bias=torch.to(np.ones(1, np.float16))),
                "cannot hold attention with a mask",
            ),
            (lambda: cache.attend(torch.to(np.zeros((2, 2, 17, 32), np.float16))), "this is another call"),
            (
                lambda: cache.append(*[np.zeros((2, 2, 1, 32), np.float16)] * 2),
                "cannot hold arrays on the host",
            ),
            (lambda: cache.attend(np.zeros((2, 2, 1, 32), np.float16)), "cannot hold arrays on the host"),
            (lambda: ring.attend(three), "3 queries see 10 positions, and the ring holds 9"),
            (lambda: paged.append(handles, x, x), "call the cache's reserve for as many sequences, 2"),
            (lambda: paged.attend(handles, x), "call the cache's reserve for as many sequences, 2"),
            (lambda: KVCache(1, 1, 4, 8, backend="cpu").advance(), "is for graphs of a cache with backend"),
        ):
            with pytest.raises(ValueError, match=message):
                call()
        assert (cache.lengths == 8).all()
        assert paged.free_pages == 9
