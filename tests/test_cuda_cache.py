"""Decode and caches on a GPU: who gets which kernel, the caches of the CPU's tests, what fails."""

import copy
import ctypes
import gc
import sys
import weakref
from functools import partial

import numpy as np
import pytest
import simulated_gpu
import test_cache
import test_cuda_arrays
import test_decode
import test_paged
from cached import input_dtype, snapshot
from ml_dtypes import bfloat16
from oracle import assert_same_bits, normal
from test_cuda_arrays import cupy, numba, packed, torch  # noqa: F401

import nbattn
from nbattn import KVCache, PagedKVCache, device, store
from nbattn.cuda import append, decode, launch, sending
from nbattn.cuda.workspace import workspace
from nbattn.reference import append as reference

pytestmark = pytest.mark.cuda_sim


@pytest.fixture
def gpu():
    with simulated_gpu.installed(capabilities=((8, 0), (8, 0))) as library:
        yield library


class TestWorkspace:
    def take(self, counters, size, stream, ordinal=0):
        with workspace(launch.device(ordinal), counters, size, stream) as found:
            return found

    def test_kept_for_the_stream(self, gpu):
        first = self.take(3, 100, 5)
        assert not gpu.bytes(first[0], 12).any()
        gpu.bytes(first[1], 100)
        calls = len(gpu.calls)
        assert self.take(2, 100, 5) == self.take(3, 50, 5) == first
        assert {"cuMemAllocAsync", "cuMemsetD8Async"}.isdisjoint(gpu.calls[calls:])
        assert not {*first} & {*self.take(3, 100, 6), *self.take(3, 100, 5, 1)}
        assert len(gpu.memory) == 6 + 2  # and what graphs take

    def test_grows(self, gpu):
        first = self.take(3, 100, 5)
        counters, sums = self.take(3, 101, 5)
        assert counters == first[0]
        gpu.bytes(sums, 101)
        counters, _ = self.take(4, 10, 5)
        assert not gpu.bytes(counters, 16).any()
        assert len(gpu.memory) == 2 + 1

    def test_out_of_memory(self, gpu):
        self.take(3, 100, 5)
        gpu.fail = {"cuMemAllocAsync": 2}
        with pytest.raises(RuntimeError, match="cuMemAllocAsync fails"):
            self.take(3, 200, 5)
        gpu.fail = {}
        counters, sums = self.take(3, 100, 5)
        gpu.bytes(sums, 100)
        assert not gpu.bytes(counters, 12).any()

    def test_of_many_streams_none_is_kept(self, gpu, monkeypatch):
        """Some may be no more, and nobody says so."""
        monkeypatch.setattr("nbattn.cuda.workspace.STREAMS", 3)
        self.take(1, 10, 1, ordinal=1)
        for stream in range(10):
            counters, sums = self.take(3, 100, stream)
            assert not gpu.bytes(counters, 12).any()
            gpu.bytes(sums, 100)
            assert len(gpu.memory) <= 3 + 1 + 2 * 3
            assert gpu.calls.count("cuCtxSynchronize") == stream // 3

    def test_a_graph_has_its_own(self, gpu, monkeypatch):
        monkeypatch.setattr("nbattn.cuda.workspace.GRAPH_COUNTERS", 8)
        kept = self.take(3, 100, 5)
        memory, gpu.captured = {*gpu.memory}, {5}
        seen = {kept[0]}
        for _ in range(3):  # the last one finds too few counters left
            with workspace(launch.device(0), 3, 100, 5) as own:
                assert own[0] not in seen
                assert own[1] != kept[1]
                assert not gpu.bytes(own[0], 12).any()
                seen.add(own[0])
        assert gpu.calls.count("cuMemsetD8Async") == 3
        assert {*gpu.memory} == memory

    def test_a_graph_s_sums_are_the_library_s(self, gpu, torch):  # noqa: F811
        self.take(3, 100, 5)
        like, gpu.captured = device.describe(torch.to(np.zeros(1)), "x"), {5}
        calls = len(gpu.calls)
        made = []
        torch.empty = lambda shape, dtype, device: made.append(torch.to(np.zeros(shape, np.uint8))) or made[0]
        with workspace(launch.device(0), 3, 100, 5, like) as (_, sums):
            assert sums == made[0].address
        assert "cuMemsetD8Async" not in gpu.calls[calls:]


class TestWho:
    """Which calls of the plain door go to the decode kernel, on a GPU that has tensor cores."""

    @pytest.fixture
    def chosen(self, monkeypatch):
        """The launches, which are not made: kernel's name, parameters, blocks, stream."""
        made = []
        monkeypatch.setattr(
            launch,
            "run",
            lambda kernel, values, blocks, _, stream: made.append((kernel.name, values, blocks, stream)),
        )
        return made

    def call(self, torch, queries=1, keys=40, heads=4, dtype=np.float16, dim=32, **options):  # noqa: F811
        q, k = (torch.to(np.zeros((2, h, n, dim), dtype)) for h, n in ((heads, queries), (2, keys)))
        return nbattn.scaled_dot_product_attention(q, k, k, **options)

    def test_few_queries(self, torch, chosen):  # noqa: F811
        for dtype, options in (
            (np.float16, {}), (bfloat16, {"is_causal": True}), (np.float16, {"key_lengths": [3, 40]}),
            (np.float16, {"queries": 2, "query_offset": "end", "return_lse": True}),
            (bfloat16, {"heads": 64}),
            (np.float32, {"queries": 2, "dim": 128}),
            (np.float16, {"sinks": np.zeros(4), "alibi_slopes": np.ones(4), "softcap": 3.0}),
        ):  # fmt: skip
            self.call(torch, dtype=dtype, **options)
        assert all(name.startswith("decode-mma-") for name, *_ in chosen)
        assert {stream for *_, stream in chosen} == {70}
        assert all(values["partials"] and values["counters"] for _, values, *_ in chosen)

    def test_others(self, torch, chosen):  # noqa: F811
        mask = torch.to(np.ones((1, 40), bool))
        for options in (
            {"queries": 17, "keys": 400}, {"queries": 3}, {"heads": 66, "queries": 2},
            {"dtype": np.float32, "dim": 132},
            {"mask": mask}, {"bias": torch.to(np.zeros((1, 40), np.float16))}, {"return_weights": True},
            {"dim": 264},
        ):  # fmt: skip
            self.call(torch, **options)
        assert len(chosen) == 8
        assert not [name for name, *_ in chosen if name.startswith("decode")]

    @pytest.mark.parametrize("storage", ["float16", "float32", "int8", "int4"])
    def test_caches(self, torch, chosen, storage):  # noqa: F811
        """A token's attention is the decode kernel's; what it lacks, and prompts, are others'."""
        dtype = input_dtype(storage)
        for cache, more in (
            (KVCache(2, 2, 70, 32, storage, backend="cuda"), ()),
            (KVCache(2, 2, 70, 32, storage, window=9, backend="cuda"), ()),
            (PagedKVCache(9, 16, 2, 32, storage, backend="cuda"), ([0, 1],)),
        ):
            if more:
                cache.add(), cache.add()
            x = torch.to(np.zeros((2, 2, 20, 32), dtype))
            cache.append(*more, x, x)
            for queries, options, decodes in ((1, {}, True), (2, {"sinks": np.ones(4)}, True),
                                              (1, {"bias": torch.to(np.zeros((20,), dtype))}, False),
                                              (17, {}, False)):  # fmt: skip
                if cache.__class__ is KVCache and cache.window and queries == 17:
                    continue
                chosen.clear()
                cache.attend(*more, torch.to(np.zeros((2, 4, queries, 32), dtype)), **options)
                assert any(name.startswith(f"decode-mma-{storage}-") for name, *_ in chosen) == decodes
                assert len(chosen) == 1 or not decodes
            halves = torch.to(np.zeros((2, 4, 1, 32), np.float16))
            if storage in ("int8", "int4"):
                cache.attend(*more, halves)
                assert chosen[-1][0].startswith(f"decode-mma-{storage}-")
                assert chosen[-1][1]["query_kind"] == 1

    def test_functions_of_scores(self, torch, chosen):  # noqa: F811
        for mod in ({"score_mod": lambda s, b, h, i, j: s}, {"mask_mod": lambda b, h, i, j: j > 0}):
            self.call(torch, **mod)
            assert not chosen[-1][0].startswith("decode")

    def test_uneven_sequences(self, torch, chosen, monkeypatch):  # noqa: F811
        """Where one is long, most of what a launch would have is for nobody: it is cut where that pays."""
        lengths = np.full(12, 9)
        lengths[4] = 9000
        cache = PagedKVCache(700, 16, 2, 32, "float16", backend="cuda")
        handles = [cache.add() for _ in lengths]
        new, query = (torch.to(np.zeros((12, h, n, 32), np.float16)) for h, n in ((2, 9000), (4, 2)))
        cache.append(handles, new, new, lengths)
        for spare, batches in ((1 << 20, [12]), (1 << 10, [4, 4, 4])):
            monkeypatch.setattr(decode, "SPARE", spare)
            chosen.clear()
            result = cache.attend(handles, query, return_lse=True)
            assert [blocks // values["chunks"] // 2 for _, values, blocks, _ in chosen] == batches
        assert [values["chunks"] for _, values, *_ in chosen] == [1, 18, 1]
        for x, name in ((result.output, "out"), (result.lse, "lse")):
            assert chosen[2][1][name] - chosen[0][1][name] == 8 * x.memory[0].nbytes
        assert sum(values["table_width"] for _, values, *_ in chosen) == 3 * cache._table.shape[1]

    def test_chunks_are_of_the_room_for_keys(self, torch, chosen):  # noqa: F811
        for keys, chunk, chunks in ((40, 128, 1), (4096, 128, 32), (4100, 256, 17), (32768, 1024, 32)):
            self.call(torch, keys=keys, key_lengths=[1, 7])
            _, values, blocks, _ = chosen[-1]
            assert (values["chunk"], values["chunks"], blocks) == (chunk, chunks, 4 * chunks)
            self.call(torch, keys=keys, window_size=(100, 0), query_offset="end")
            assert chosen[-1][1]["chunks"] == min(chunks, 2)


ROTARY = {"rotary_base": 10.0}
STEPS = {
    "rotary": ROTARY, "ring": {"window": 70}, "rotary ring": {"window": 70, **ROTARY}, "pages": {"pages": 90},
    "rotary pages": {"pages": 90, **ROTARY}, "heads": {},
}  # fmt: skip


class TestLater:
    def test_workspace_is_the_stream_s(self, torch, gpu):  # noqa: F811
        made, layout = [], decode.kernels()[0].layout

        def launched(*arguments):
            made.append(layout.unpack(ctypes.string_at(arguments[-1][1], layout.size)))
            return 0

        gpu.cuLaunchKernel = launched
        at = [name for name, _ in decode.kernels()[0].parameters].index("counters")
        for stream in (5, 6, 5, 6, 5):
            torch.streams[0] = stream
            q, k = (torch.to(np.zeros((1, 1, n, 32), np.float16)) for n in (1, 40))
            nbattn.scaled_dot_product_attention(q, k, k)
        counters = [parameters[at] for parameters in made]
        assert counters[0] == counters[2] == counters[4] != counters[1] == counters[3]

    @pytest.fixture
    def told(self, gpu):
        """What each launch of the decode kernel is told: parameters by name, and its blocks."""
        made, kernels = [], {k.name: k for k in decode.kernels()}

        def cu_launch_kernel(function, blocks, *arguments):
            kernel = kernels.get(gpu.functions[function].name)
            if kernel is not None:
                numbers = kernel.layout.unpack(ctypes.string_at(arguments[-1][1], kernel.layout.size))
                names = (name for name, _ in kernel.parameters)
                made.append(dict(zip(names, numbers, strict=True)) | {"blocks": blocks})
            return 0

        gpu.cuLaunchKernel = cu_launch_kernel
        return made

    @pytest.mark.parametrize("storage", ["bfloat16", "int8"])
    def test_steps_are_short(self, torch, gpu, told, monkeypatch, storage):  # noqa: F811
        """A later step tells the kernel what the first ones do, and checks nothing again."""
        checked = []
        check_query = store.check_query
        monkeypatch.setattr(store, "check_query", lambda *a: checked.append(1) or check_query(*a))
        cache = KVCache(2, 2, 300, 32, storage, backend="cuda")

        def step(query, short, **options):
            checked.clear(), told.clear()
            result = cache.attend(query, **options)
            assert (type(result), result.shape) == (type(query), query.shape)
            assert bool(checked) != short
            before = dict(cache._places.readers)
            cache._places.readers.clear()
            cache.attend(query, **options)
            cache._places.readers.update(before)
            first, second = told
            apart = {name for name in first if first[name] != second[name]}
            assert apart <= {"out"} | (
                {"key_lengths", "from_end", "offsets"} if first["key_lengths"] else set()
            )
            return first

        def tensor(heads, tokens):
            return torch.to(np.zeros((2, heads, tokens, 32), input_dtype(storage)))

        cache.append(tensor(2, 126), tensor(2, 126))
        one, two = tensor(4, 1), tensor(4, 2)
        for query, options in ((one, {}), (two, {}), (one, {"window_size": (9, 0), "softcap": 3.0})):
            for _ in range(2):
                step(query, False, **options)
        chunks = []
        for _ in range(4):
            cache.append(tensor(2, 1), tensor(2, 1))
            chunks.append(step(one, True)["chunks"])
            step(two, True)
            step(one, True, window_size=(9, 0), softcap=3.0)
        assert chunks == [1, 1, 2, 2]
        out = tensor(4, 1)
        assert cache.attend(one, out=out) is out
        torch.streams[0] = 71  # waits for the writer, then knows the stream
        assert step(one, False)["key_length"] == 130
        torch.streams[0] = 70
        cache.append(tensor(2, 1), tensor(2, 1))
        step(one, True)
        cache.truncate([131, 130])
        for _ in range(2):
            at = step(one, True)["key_lengths"]
            np.testing.assert_array_equal(gpu.bytes(at, 16).view(np.int64), cache.lengths)
            cache.append(tensor(2, 1), tensor(2, 1))
        cache.truncate([1, 1])
        step(one, True)
        assert step(two, False)["offset"] == -1

    @pytest.mark.parametrize("differ", [False, True])
    @pytest.mark.parametrize("kind", STEPS)
    def test_steps_of_every_kind(self, torch, gpu, kind, differ, monkeypatch):  # noqa: F811
        """All that short steps' launches are told is what the long way tells, or lies there on the GPU."""
        made, checked = [], []
        check_query = store.check_query
        monkeypatch.setattr(store, "check_query", lambda *a: checked.append(1) or check_query(*a))

        def cu_launch_kernel(function, blocks, *arguments):
            kernel = gpu.functions[function]
            numbers = kernel.layout.unpack(ctypes.string_at(arguments[-1][1], kernel.layout.size))
            at, record = 0, {"kernel": kernel.name, "blocks": blocks}
            for name, form in kernel.parameters:
                count = int(form.partition("x")[2]) if "x" in form and form[0] != "*" else 1
                record[name], at = numbers[at : at + count], at + count
            entries = 2 * record.get("table_width", [0])[0]
            for name, dtype, count in (
                ("key_lengths", np.int64, 2), ("starts", np.int64, 2), ("page_table", np.int32, entries),
                ("alibi_slopes", np.float32, 4), ("sinks", np.float32, 4),
            ):  # fmt: skip
                if record.get(name, [0])[0]:
                    size = count * np.dtype(dtype).itemsize
                    record[name] = gpu.bytes(record[name][0], size).view(dtype).tolist()
            made.append(record)
            return 0

        gpu.cuLaunchKernel = cu_launch_kernel
        options = dict(STEPS[kind])
        if pages := options.pop("pages", 0):
            cache, more = PagedKVCache(pages, 16, 2, 32, "bfloat16", backend="cuda", **options), ((0, 1),)
            cache.add(), cache.add()
        else:
            cache, more = KVCache(2, 2, 300, 32, "bfloat16", backend="cuda", **options), ()
        given = {"sinks": np.arange(4.0), "alibi_slopes": np.ones(4)} if kind == "heads" else {}
        token, query = (torch.to(np.zeros((2, n, 1, 32), bfloat16)) for n in (2, 4))
        x = torch.to(np.zeros((2, 2, 20, 32), bfloat16))
        cache.reset() if kind == "ring" else None  # which may then hold less than its size
        for lengths in (None, [20, 20 - differ]):
            cache.append(*more, x, x, lengths)
        for step in range(111):
            cache.append(*more, token, token)
            for _ in range(1 if step % 10 else 3):
                made.clear(), checked.clear()
                cache.attend(*more, query, **given)
            if step % 10:
                continue
            assert not checked
            places = cache._places(*more) if pages else cache._places
            short, before = [*made], dict(places.readers)
            made.clear(), places.readers.clear()
            cache.attend(*more, query, **given)
            places.readers.update(before)
            assert [x["kernel"] for x in short] == [x["kernel"] for x in made]
            for first, second in zip(short, made, strict=True):
                apart = {name for name in first if first[name] != second[name]}
                allowed = {"out", "counters", "partials", "states", "query", "x"}
                if differ:  # queries stand at the ends of lengths on the GPU
                    allowed |= {"key_lengths", "offsets", "from_end", "start", "starts", "has_starts"}
                    ends = first.get("key_lengths") or first["starts"]
                    assert ends == places.lengths.tolist()
                    assert first.get("from_end", [1])[0] == 1
                    assert first.get("start", [-1])[0] == -1
                if "ring" in kind:  # whose first positions no query sees
                    allowed |= {"key_starts"}
                    assert first.get("key_starts", [0])[0] == 0
                assert apart <= allowed
            if "rotary" in kind:
                assert short[1]["query"] == short[0]["out"]

    def test_graphs_have_their_own_steps(self, torch, gpu, told):  # noqa: F811
        cache, x = (
            KVCache(1, 2, 300, 32, "bfloat16", backend="cuda"),
            torch.to(np.zeros((1, 2, 1, 32), bfloat16)),
        )
        cache.append(x, x)
        for _ in range(3):
            cache.attend(x)
        cache.advance()
        gpu.captured = {70}
        cache.attend(x)
        assert [bool(parameters["from_end"]) for parameters in told] == [False] * 3 + [True]


STORAGES = ("float32", "bfloat16", "int8", "int4")
WALKS = (
    {"storage": "float64"}, {"storage": "bfloat16"}, {"storage": "int8"}, {"storage": "int4", "window": 12},
    {"storage": "float32", "window": 12, "rotary": test_cache.GPTJ},
)  # fmt: skip


@pytest.fixture
def old_gpu():
    """A simulated GPU without tensor cores, whose kernels run."""
    with simulated_gpu.installed() as library:
        yield library


@pytest.mark.usefixtures("old_gpu")
class TestCaches:
    """The walks of the CPU's caches, and their pages."""

    @pytest.mark.parametrize("options", WALKS, ids=repr)
    def test_contiguous(self, options):
        test_cache.Walk(1, backend="cuda", **options).go(10)

    @pytest.mark.parametrize("storage", ["float32", "int8"])
    def test_paged(self, storage):
        walk = test_paged.Walk(3, backend="cuda", storage=storage)
        for _ in range(3):
            walk.add(), walk.append()
        walk.go(20)

    @pytest.mark.parametrize("storage", test_decode.STORAGES)
    def test_paged_attention(self, storage, rng):
        paged = test_decode.Paged(rng, storage, (20, 1, 0, 9), page_size=4)
        query = test_decode.query_for(rng, storage, queries=2)
        paged.check("cuda", query, window_size=(9, None))
        paged.check("cuda", query[:, :2], rng.random((2, 20)) < 0.5, sinks=[0.0, 1.0])

    def test_half_queries_of_quantised_pages(self, rng):
        paged = test_decode.Paged(rng, "int8", (9, 4), page_size=4)
        query = test_decode.query_for(rng, "float16", 2)
        result = paged.attend(query, return_lse=True, backend="cuda")
        exact = paged.attend(query.astype(np.float32), backend="cuda")
        assert_same_bits(result.output, exact.astype(np.float16))
        assert result.lse.dtype == np.float32


class TestArrays:
    """Caches and pages that are given arrays of a GPU's library."""

    @pytest.fixture
    def gpu(self):
        with simulated_gpu.installed(capabilities=((7, 5), (7, 5))) as library:
            yield library

    @pytest.mark.parametrize("storage", STORAGES)
    def test_tensors_in_and_out(self, torch, gpu, storage, rng):  # noqa: F811
        dtype, dim = input_dtype(storage), 32
        kinds = {"value_dim": 64, "rotary_base": 100.0}
        here, there = (KVCache(2, 1, 12, dim, storage, backend=b, **kinds) for b in ("reference", "cuda"))
        for tokens, counts in ((5, [5, 2]), (1, None)):
            k, v = (normal(rng, (2, 1, tokens, n), dtype) for n in (dim, 64))
            here.append(k, v, counts)
            there.append(torch.to(k), torch.to(v), counts)
            q = normal(rng, (2, 2, tokens, dim), dtype)
            sinks = normal(rng, 2)
            expected = here.attend(q, lengths=counts, sinks=sinks, return_lse=True)
            got = there.attend(torch.to(q), lengths=counts, sinks=sinks, return_lse=True)
            assert type(got.output) is type(got.lse) is type(torch.to(q))
            assert got.output.numpy().dtype == dtype
            tolerance = 1e-5 if dtype == np.float32 else 2e-2
            for x, y in ((got.output, expected.output), (got.lse, expected.lse)):
                np.testing.assert_allclose(
                    x.numpy().astype(float), y.astype(float), rtol=tolerance, atol=tolerance
                )
            out = torch.to(np.full((2, 2, tokens, 64), np.nan, dtype))
            assert there.attend(torch.to(q), lengths=counts, sinks=torch.to(sinks), out=out) is out
            assert_same_bits(out.numpy(), got.output.numpy())
        np.testing.assert_array_equal(here.lengths, there.lengths)
        assert {launched.stream for launched in gpu.launches} == {70}

    def test_steps(self, torch, gpu, rng):  # noqa: F811
        """Appends of one layout are packed once; other strides, dtypes, lengths and streams are told."""
        here, there = (
            KVCache(2, 2, 40, 32, "int8", rotary_base=100.0, backend=b) for b in ("reference", "cuda")
        )
        x = normal(rng, (2, 2, 9, 32))
        here.append(x, x, [9, 9]), there.append(x, x, [9, 9])
        for n in range(8):
            k, v = (normal(rng, (2, 1 + n % 2, 2, 32), np.float16 if n > 5 else np.float32) for _ in "kv")
            k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
            torch.streams[0] = 70 + (n == 3)
            lengths = [0, 1] if n == 4 else None
            here.append(k, v, lengths), there.append(torch.to(k), torch.to(v), lengths)
            q = normal(rng, (2, 2, 1, 32))
            np.testing.assert_allclose(
                there.attend(torch.to(q)).numpy(), here.attend(q), rtol=1e-5, atol=1e-5
            )
        assert gpu.launches[-1].stream == 70
        assert 71 in {launched.stream for launched in gpu.launches}
        with pytest.raises(ValueError, match="capacity"):
            there.append(
                torch.to(np.zeros((2, 2, 30, 32), np.float32)), torch.to(np.zeros((2, 2, 30, 32), np.float32))
            )

    def test_pages(self, torch, gpu, rng):  # noqa: F811
        paged = test_decode.Paged(rng, "int8", (20, 1, 0, 9), page_size=4)
        query = test_decode.query_for(rng, "int8")
        expected = paged.attend(query, return_lse=True, backend="reference")
        (key, key_scales), (value, value_scales) = (
            tuple(torch.to(np.ascontiguousarray(x)) for x in pair) for pair in paged.arrays
        )
        got = nbattn.paged_attention(
            torch.to(query), key, value, paged.table, paged.lengths, key_scales=key_scales,
            value_scales=value_scales, return_lse=True,
        )  # fmt: skip
        np.testing.assert_allclose(got.output.numpy(), expected.output, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got.lse.numpy(), expected.lse, rtol=1e-5)
        scales = {"key_scales": key_scales, "value_scales": value_scales}
        with pytest.raises(ValueError, match="page_table lives on a GPU"):
            nbattn.paged_attention(
                torch.to(query), key, value, torch.to(paged.table), paged.lengths, **scales
            )
        paged.table[0, 1] = 10**6
        launches = len(gpu.launches)
        with pytest.raises(ValueError, match=r"page_table\[0, 1\] is 1000000"):
            nbattn.paged_attention(torch.to(query), key, value, paged.table, paged.lengths, **scales)
        assert len(gpu.launches) == launches

    def test_tables_are_sent_when_they_change(self, torch, gpu, rng):  # noqa: F811
        here, there = (PagedKVCache(9, 4, 1, 8, backend=b) for b in ("reference", "cuda"))
        handles = [(here.add(), there.add())[0] for _ in range(2)]
        q = normal(rng, (2, 1, 1, 8))
        sent = []
        for _ in range(9):  # of which some take pages
            x = normal(rng, (2, 1, 1, 8))
            here.append(handles, x, x), there.append(handles, torch.to(x), torch.to(x))
            before = gpu.calls.count("cuMemcpyHtoDAsync_v2")
            for _ in range(2):
                got = there.attend(handles, torch.to(q)).numpy()
                np.testing.assert_allclose(got, here.attend(handles, q), rtol=1e-5, atol=1e-6)
            sent.append(gpu.calls.count("cuMemcpyHtoDAsync_v2") - before)
        assert {*sent} == {0, 8}  # bounds of keys and values alone: appends have sent the table
        assert len(sending._tables) >= 1
        tables = {*sending._tables}
        del there
        gc.collect()
        assert len(tables - {*sending._tables}) == 1

    def test_copies_of_streams(self, gpu, monkeypatch):
        """One for each, of threads' default streams too, and of many none."""
        monkeypatch.setattr(sending, "STREAMS", 3)
        kept, x, place = sending.Kept(), np.arange(3), launch.device(0)
        first = kept(x, place, 5)
        assert kept(x, place, 5) == first != kept(x, place, 6)
        assert gpu.calls.count("cuMemcpyHtoDAsync_v2") == 2
        x[0] = 9
        assert kept(x, place, 5) == first
        np.testing.assert_array_equal(gpu.bytes(first, 24).view(np.int64), x)
        kept(x, place, 2)
        sent = gpu.calls.count("cuMemcpyHtoDAsync_v2")
        monkeypatch.setattr(sending.threading, "get_ident", lambda: 7)
        kept(x, place, 2)
        assert gpu.calls.count("cuMemcpyHtoDAsync_v2") == sent + 1
        assert len(kept.copies) == len(gpu.memory) == 1

    def test_forks_copy_on_the_caller_s_stream(self, torch, gpu, monkeypatch, rng):  # noqa: F811
        cache = PagedKVCache(6, 4, 1, 8, backend="cuda")
        x = torch.to(normal(rng, (1, 1, 3, 8)))
        cache.append(first := cache.add(), x, x)
        second = cache.fork(first)
        streams = []
        copy = gpu.cuMemcpyDtoDAsync_v2
        monkeypatch.setattr(gpu, "cuMemcpyDtoDAsync_v2", lambda *a: streams.append(a[3]) or copy(*a))
        cache.append(second, x, x)
        assert streams == [70, 70]
        outputs = [
            cache.attend(s, torch.to(np.zeros((1, 1, 1, 8), np.float32))).numpy() for s in (first, second)
        ]
        np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-5)
        assert cache.lengths == {first: 3, second: 6}


class TestLifetime:
    """What a cache holds, and what it waits for."""

    @pytest.fixture
    def gpu(self):
        with simulated_gpu.installed() as library:
            yield library

    def test_tensors_are_not_kept(self, torch, gpu):  # noqa: F811
        cache, paged = KVCache(1, 1, 9, 8, backend="cuda"), PagedKVCache(9, 4, 1, 8, backend="cuda")
        kept = []
        for take in (cache.append, *(partial(paged.append, paged.add()) for _ in range(3))):
            x = torch.to(np.zeros((1, 1, 2, 8), np.float32))
            take(x, x)
            kept.append(weakref.ref(x))
            del x
        gc.collect()
        assert not any(ref() for ref in kept)

    def test_other_streams_are_waited_for(self, torch, gpu):  # noqa: F811
        """Readers wait for the writer once, a writer for all; on one stream nobody waits."""
        x = torch.to(np.zeros((1, 1, 1, 8), np.float32))
        paged = PagedKVCache(9, 4, 1, 8, backend="cuda")
        for cache, more in ((KVCache(1, 1, 9, 8, backend="cuda"), ()), (paged, (paged.add(),))):
            waits = []
            for call, stream in ((cache.append, 5), (cache.attend, 5), (cache.append, 5), (cache.attend, 6),
                                 (cache.attend, 6), (cache.attend, 5), (cache.append, 5)):  # fmt: skip
                torch.streams[0] = stream
                before = gpu.calls.count("cuCtxSynchronize")
                call(*more, *([x, x] if call == cache.append else [x]))
                waits.append(gpu.calls.count("cuCtxSynchronize") - before)
            assert waits == [0, 0, 0, 1, 0, 0, 1]

    def test_numpy_after_tensors(self, torch, gpu):  # noqa: F811
        cache, x = KVCache(1, 1, 9, 8, backend="cuda"), np.zeros((1, 1, 1, 8), np.float32)
        cache.append(torch.to(x), torch.to(x))
        assert "cuCtxSynchronize" not in gpu.calls
        cache.attend(x)
        assert gpu.calls.count("cuCtxSynchronize") == 1

    def test_dtypes(self, torch, monkeypatch):  # noqa: F811
        """PyTorch's, and bfloat16 where nothing on the host has it."""
        x = torch.to(np.zeros((1, 1, 1, 8), bfloat16))
        assert KVCache(1, 1, 9, 8, torch.float16, backend="cuda").dtype == "float16"
        monkeypatch.setitem(sys.modules, "ml_dtypes", None)
        for dtype in (torch.bfloat16, "bfloat16"):
            cache = KVCache(1, 1, 9, 8, dtype, backend="cuda")
            cache.append(x, x)
            assert cache.attend(x).torch_dtype == torch.bfloat16
        with pytest.raises(ValueError, match="needs the package ml_dtypes"):
            KVCache(1, 1, 9, 8, "bfloat16")

    def test_graphs_of_the_plain_door(self, torch, gpu):  # noqa: F811
        x = torch.to(np.zeros((2, 1, 1, 8), np.float32))
        gpu.captured = {70}
        nbattn.scaled_dot_product_attention(x, x, x)
        for options in ({"key_lengths": [1, 0]}, {"sinks": np.ones(1)}):
            with pytest.raises(ValueError, match="a graph cannot hold what lies on the host"):
                nbattn.scaled_dot_product_attention(x, x, x, **options)


@pytest.mark.parametrize("name", test_cuda_arrays.LIBRARIES)
def test_every_library(name, gpu, request, rng):
    """Turned queries too are theirs, and results."""
    library = request.getfixturevalue(name)
    gpu.capabilities = ((7, 5), (7, 5))
    here, there = (KVCache(1, 1, 9, 8, rotary_base=10.0, backend=b) for b in ("reference", "cuda"))
    x = normal(rng, (1, 1, 3, 8))
    here.append(x, x)
    before = gpu.calls.count("cuStreamSynchronize")
    there.append(library.to(x), library.to(x))
    assert gpu.calls.count("cuStreamSynchronize") - before == (name == "packed")
    got = there.attend(library.to(x))
    assert type(got) is type(library.to(x))
    np.testing.assert_allclose(got.numpy(), here.attend(x), rtol=1e-5, atol=1e-6)


class TestFailures:
    """What is refused before any launch, and launches that fail: the cache is as it was."""

    @pytest.fixture
    def gpu(self):
        with simulated_gpu.installed(capabilities=((7, 5), (7, 5))) as library:
            yield library

    def test_refused(self, torch, gpu, rng):  # noqa: F811
        cache = KVCache(1, 1, 4, 8, backend="cuda")
        x = normal(rng, (1, 1, 3, 8))
        there = torch.to(x)
        cache.append(there, there)
        launches, before = len(gpu.launches), snapshot(cache._store.pages)
        for call, message in (
            (lambda: cache.append(there, there), "sequence 0 holds 3 of 4 positions; 3 more do not fit"),
            (lambda: cache.append(there, x), "key lives on GPU 0 and value on the host"),
            (lambda: cache.append(*[torch.to(x, 1)] * 2), "key lives on GPU 1 and the cache on GPU 0"),
            (lambda: cache.append(there, torch.to(x[..., :7])), "value has shape"),
            (lambda: cache.append(there, there, torch.to(np.array([1]))), "lengths lives on a GPU"),
            (lambda: cache.attend(torch.to(x, 1)), "query lives on GPU 1 and the cache on GPU 0"),
            (lambda: cache.attend(there, backend="cpu"), "the cache lives on a GPU, where backend='cpu'"),
            (lambda: cache.attend(there, np.ones((3, 3), bool)), "mask on the host"),
            (lambda: cache.attend(torch.to(x[..., :4])), "query has head_dim 4"),
            (lambda: cache.truncate(5), "expected 0 to 3"),
        ):
            with pytest.raises(ValueError, match=message):
                call()
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            copy.deepcopy(cache)
        with pytest.raises(ValueError, match="key lives on a GPU; pass a copy of it on the host"):
            KVCache(1, 1, 4, 8).append(there, there)
        assert len(gpu.launches) == launches
        assert snapshot(cache._store.pages) == before
        assert cache.lengths == [3]

    @pytest.mark.parametrize("window", [None, 3])
    def test_launch_of_an_append(self, gpu, window, rng):
        cache = KVCache(1, 1, 8, 8, window=window, backend="cuda")
        x = normal(rng, (1, 1, 7, 8))
        cache.append(x, x)
        before = snapshot(cache._store.pages), cache._places.starts.copy()
        gpu.fail = {"cuLaunchKernel": 1}
        with pytest.raises(RuntimeError, match="cuLaunchKernel fails"):
            cache.append(x[:, :, :1], x[:, :, :1])
        gpu.fail = {}
        assert snapshot(cache._store.pages) == before[0]
        np.testing.assert_array_equal(cache._places.starts, before[1])
        assert cache.lengths == [7]
        cache.append(x[:, :, :1], x[:, :, :1])

    def test_launch_of_an_append_to_pages(self, gpu, rng):
        cache = PagedKVCache(6, 2, 1, 8, backend="cuda")
        first = cache.add()
        x = normal(rng, (1, 1, 3, 8))
        cache.append(first, x, x)
        second = cache.fork(first)
        q = normal(rng, (2, 1, 1, 8))
        before = cache.attend([first, second], q), cache.free_pages, cache._uses.copy(), cache._holds
        for fails in ("cuLaunchKernel", "cuMemcpyDtoDAsync_v2"):
            gpu.fail = {fails: 1}
            with pytest.raises(RuntimeError, match=f"{fails} fails"):
                cache.append([first, second], *[np.repeat(x, 2, axis=0)[:, :, :2]] * 2)
            gpu.fail = {}
            assert cache.lengths == {first: 3, second: 3}
            assert (cache.free_pages, cache._holds) == (before[1], before[3])
            np.testing.assert_array_equal(cache._uses, before[2])
            assert_same_bits(cache.attend([first, second], q), before[0])
        cache.append(second, x[:, :, :2], x[:, :, :2])
        assert_same_bits(cache.attend(first, q[:1]), before[0][:1])

    def test_no_memory(self, gpu):
        gpu.fail = {"cuMemAlloc_v2": 2}
        with pytest.raises(RuntimeError, match="cuMemAlloc_v2 fails"):
            KVCache(1, 1, 8, 8, backend="cuda")

    def test_memory_is_given_back(self, gpu):
        cache = KVCache(1, 1, 8, 32, "int8", backend="cuda")
        assert cache.nbytes == 2 * 8 * (32 + 4)
        assert sum(map(len, gpu.memory.values())) == cache.nbytes + 8  # and the length
        del cache
        gc.collect()
        assert not gpu.memory


@pytest.mark.usefixtures("old_gpu")
@pytest.mark.parametrize("interleaved", [False, True])
def test_turns(interleaved, rng):
    """By angles of every quadrant, negative and far, to the last bits."""
    query, frequencies = normal(rng, (2, 1, 9, 8), np.float64), np.array([1.0, 0.37, -1e-3])
    for offset in ([0, -5], [10**7, 1 << 24]):
        expected, got = np.empty_like(query), np.empty_like(query)
        reference.rotate(query, expected, np.array(offset), frequencies, interleaved)
        append.rotate(query, got, np.array(offset), frequencies, interleaved)
        np.testing.assert_allclose(got, expected, rtol=0, atol=2.0**-49)
