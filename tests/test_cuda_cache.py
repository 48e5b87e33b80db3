"""Decode on a GPU as the driver sees it: which kernel is asked for, and the memory its blocks share."""

import numpy as np
import pytest
import simulated_gpu
from ml_dtypes import bfloat16
from test_cuda_arrays import torch  # noqa: F401

import nbattn
from nbattn.cuda import decode, launch
from nbattn.cuda.workspace import workspace

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
        assert len(gpu.memory) == 6

    def test_grows(self, gpu):
        first = self.take(3, 100, 5)
        counters, sums = self.take(3, 101, 5)
        assert counters == first[0]
        gpu.bytes(sums, 101)
        counters, _ = self.take(4, 10, 5)
        assert not gpu.bytes(counters, 16).any()
        assert len(gpu.memory) == 2

    def test_out_of_memory(self, gpu):
        self.take(3, 100, 5)
        gpu.fail = {"cuMemAllocAsync": 2}
        with pytest.raises(RuntimeError, match="cuMemAllocAsync fails"):
            self.take(3, 200, 5)
        gpu.fail = {}
        counters, sums = self.take(3, 100, 5)
        gpu.bytes(sums, 100)
        assert not gpu.bytes(counters, 12).any()

    def test_a_graph_has_its_own(self, gpu):
        kept = self.take(3, 100, 5)
        gpu.captured = {5}
        with workspace(launch.device(0), 3, 100, 5) as own:
            assert not {*own} & {*kept}
            assert not gpu.bytes(own[0], 12).any()
        assert {*gpu.memory} == {*kept}


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
            (np.float16, {"sinks": np.zeros(4), "alibi_slopes": np.ones(4), "softcap": 3.0}),
        ):  # fmt: skip
            self.call(torch, dtype=dtype, **options)
        assert all(name.startswith("decode-mma-") for name, *_ in chosen)
        assert {stream for *_, stream in chosen} == {70}
        assert all(values["partials"] and values["counters"] for _, values, *_ in chosen)

    def test_others(self, torch, chosen):  # noqa: F811
        mask = torch.to(np.ones((1, 40), bool))
        for options in (
            {"queries": 17, "keys": 400}, {"queries": 3}, {"heads": 66, "queries": 2}, {"dtype": np.float32},
            {"mask": mask}, {"bias": torch.to(np.zeros((1, 40), np.float16))}, {"return_weights": True},
            {"dim": 264},
        ):  # fmt: skip
            self.call(torch, **options)
        assert len(chosen) == 8
        assert not any(name.startswith("decode") for name, *_ in chosen)

    def test_chunks_are_of_the_room_for_keys(self, torch, chosen):  # noqa: F811
        for keys, chunk, chunks in ((40, 128, 1), (4096, 128, 32), (4100, 256, 17), (32768, 1024, 32)):
            self.call(torch, keys=keys, key_lengths=[1, 7])
            _, values, blocks, _ = chosen[-1]
            assert (values["chunk"], values["chunks"], blocks) == (chunk, chunks, 4 * chunks)
            self.call(torch, keys=keys, window_size=(100, 0), query_offset="end")
            assert chosen[-1][1]["chunks"] == min(chunks, 2)


class TestLater:
    def test_workspace_is_the_stream_s(self, torch, gpu, monkeypatch):  # noqa: F811
        made = []
        monkeypatch.setattr(launch, "launch", lambda *x: made.append(decode.kernels()[0].layout.unpack(x[2])))
        at = [name for name, _ in decode.kernels()[0].parameters].index("counters")
        for stream in (5, 6, 5, 6, 5):
            torch.streams[0] = stream
            q, k = (torch.to(np.zeros((1, 1, n, 32), np.float16)) for n in (1, 40))
            nbattn.scaled_dot_product_attention(q, k, k)
        counters = [parameters[at] for parameters in made]
        assert counters[0] == counters[2] == counters[4] != counters[1] == counters[3]
