"""Arrays on a GPU: taken where they lie, on the caller's stream, and given back by the caller's library.

The libraries are stand-ins with their protocols, and their memory is the simulated GPU's.
"""

import ctypes
import gc
import itertools
import math
import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar, NamedTuple

import numpy as np
import pytest
import simulated_gpu
from ml_dtypes import bfloat16
from oracle import DTYPES, inputs, normal

import benchmarks.cuda
import nbattn
from nbattn import device
from nbattn.cuda import exchange, launch
from nbattn.device import DeviceArray

pytestmark = pytest.mark.cuda_sim
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)


@pytest.fixture
def gpu():
    with simulated_gpu.installed(capabilities=((7, 5), (7, 5))) as library:
        yield library


class Stored:
    """An array in a simulated GPU's memory."""

    def __init__(self, gpu, array, ordinal=0):
        self.memory = np.array(array, order="C")
        self.gpu, self.ordinal = gpu, ordinal
        self.address = gpu.allocate(max(self.memory.nbytes, 16), ordinal)
        ctypes.memmove(self.address, self.memory.ctypes.data, self.memory.nbytes)
        self.shape, self.strides, self.dtype = array.shape, self.memory.strides, self.memory.dtype

    def view(self, shape, strides, offset=0):
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.shape, other.strides, other.address = shape, strides, self.address + offset
        return other

    def transpose(self, *axes):
        return self.view(*(tuple(x[i] for i in axes) for x in (self.shape, self.strides)))

    def __getitem__(self, index):
        """Leading zeros alone, which is what doors take off their results."""
        assert all(i == 0 for i in index)
        return self.view(self.shape[len(index) :], self.strides[len(index) :])

    def numpy(self):
        start, offset = self.gpu.place(self.address)
        memory = self.gpu.memory[start][offset:]
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        flat = memory[: len(memory) // self.dtype.itemsize * self.dtype.itemsize].view(self.dtype)
        return np.lib.stride_tricks.as_strided(flat, self.shape, self.strides).copy()


class Tensor(Stored):
    """A torch.Tensor."""

    is_cuda, requires_grad, layout = True, False, "strided"

    @property
    def device(self):
        return TorchDevice(self.ordinal)

    @property
    def dtype(self):
        return self.torch_dtype

    @dtype.setter
    def dtype(self, dtype):
        self.numpy_dtype, self.torch_dtype = dtype, TorchDtype(dtype)

    def data_ptr(self):
        return self.address

    def stride(self):
        return tuple(stride // self.numpy_dtype.itemsize for stride in self.strides)

    def element_size(self):
        return self.numpy_dtype.itemsize

    def numpy(self):
        other = Stored.__new__(Stored)
        other.__dict__.update(
            {k: v for k, v in self.__dict__.items() if k not in ("torch_dtype", "numpy_dtype")}
        )
        other.dtype = self.numpy_dtype
        return other.numpy()


class TorchDevice(NamedTuple):
    index: int


class TorchDtype:
    def __init__(self, dtype):
        self.dtype = np.dtype(dtype)

    def __repr__(self):
        return f"torch.{self.dtype.name}"

    def __eq__(self, other):
        return self.dtype == other.dtype

    def __hash__(self):
        return hash(self.dtype)


@pytest.fixture
def torch(gpu, monkeypatch):
    """A module that looks like PyTorch; `torch.to(array)` puts an array on a GPU."""
    module = ModuleType("torch")
    module.streams = {0: 70, 1: 71}

    def empty(shape, dtype, device):
        return to(np.full(shape, 255 if dtype.dtype == np.uint8 else np.nan, dtype.dtype), device.index)

    def to(array, ordinal=0):
        return Tensor(gpu, array, ordinal)

    module.Tensor, module.empty, module.to, module.strided = Tensor, empty, to, "strided"
    module.is_grad_enabled = lambda: True
    module._C = SimpleNamespace(_cuda_getCurrentRawStream=lambda ordinal: module.streams[ordinal])
    for dtype in (*DTYPES, np.int64, np.uint8):
        setattr(module, np.dtype(dtype).name, TorchDtype(dtype))
    monkeypatch.setattr(Tensor, "__module__", "torch")
    monkeypatch.setitem(sys.modules, "torch", module)
    return module


class Chosen:
    """A GPU that CuPy or Numba is told, by ``with``, to make arrays on."""

    ordinals: ClassVar = []

    def __init__(self, ordinal):
        self.ordinal = ordinal

    def __enter__(self):
        self.ordinals.append(self.ordinal)

    def __exit__(self, *error):
        self.ordinals.pop()


class CupyArray(Stored):
    """A cupy.ndarray."""

    @property
    def data(self):
        return SimpleNamespace(ptr=self.address)

    @property
    def device(self):
        return SimpleNamespace(id=self.ordinal)

    @property
    def __cuda_array_interface__(self):
        raise AssertionError


@pytest.fixture
def cupy(gpu, monkeypatch):
    module = ModuleType("cupy")
    module.to = lambda array, ordinal=0: CupyArray(gpu, array, ordinal)
    module.empty = lambda shape, dtype: module.to(np.full(shape, np.nan).astype(dtype), Chosen.ordinals[-1])
    module.ndarray = CupyArray
    module.cuda = SimpleNamespace(Device=Chosen, get_current_stream=lambda: SimpleNamespace(ptr=80))
    monkeypatch.setattr(CupyArray, "__module__", "cupy")
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


class InterfaceArray(Stored):
    """An array of Numba's: the interface alone, with a stream of its own."""

    stream = 90
    read_only = False

    @property
    def __cuda_array_interface__(self):
        return {
            "data": (self.address, self.read_only), "shape": self.shape, "strides": self.strides,
            "typestr": self.dtype.str, "stream": self.stream, "version": 3,
        }  # fmt: skip


@pytest.fixture
def numba(gpu, monkeypatch):
    module = SimpleNamespace(
        gpus=[Chosen(0), Chosen(1)], to=lambda array, ordinal=0: InterfaceArray(gpu, array, ordinal),
        device_array=lambda shape, dtype: module.to(
            np.full(shape, np.nan).astype(dtype), Chosen.ordinals[-1]
        ),
        jit=sys.modules["numba.cuda"].jit, simulator=sys.modules["numba.cuda"].simulator,
    )  # fmt: skip
    monkeypatch.setattr(InterfaceArray, "__module__", "numba.cuda.cudadrv.devicearray")
    monkeypatch.setattr(exchange.sys, "modules", {**sys.modules, "numba.cuda": module})
    return module


class PackedArray(Stored):
    """An array of JAX's: DLPack, and results by DLPack too."""

    def __dlpack_device__(self):
        return 2, self.ordinal

    def __dlpack__(self, *, stream):
        assert stream == 1
        described = DeviceArray(self.address, self.shape, self.strides, self.dtype, self.ordinal)
        return exchange.capsule_of(described, 2, self)

    def __array_namespace__(self):
        return SimpleNamespace(from_dlpack=self.taken_over)

    def taken_over(self, other):
        """As a library does it: the capsule is used up, and its tensor's deleter called at the end."""
        assert other.__dlpack_device__() == (2, self.ordinal)
        capsule = other.__dlpack__(stream=7)
        managed = exchange.Managed.from_address(exchange._pointer_of(capsule, b"dltensor"))
        rename = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
            ("PyCapsule_SetName", ctypes.pythonapi)
        )
        self.used = ctypes.create_string_buffer(b"used_dltensor")
        rename(capsule, ctypes.addressof(self.used) and self.used.value)
        tensor = managed.tensor
        array = object.__new__(PackedArray)
        array.__dict__.update(self.__dict__)
        array.address, array.shape = tensor.data, tuple(tensor.shape[: tensor.ndim])
        array.dtype = np.dtype(f"{exchange.KINDS[tensor.code]}{tensor.bits}")
        array.strides = tuple(s * array.dtype.itemsize for s in tensor.strides[: tensor.ndim])
        array.managed = managed
        return array

    def drop(self):
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.managed.deleter)(ctypes.addressof(self.managed))


@pytest.fixture
def packed(gpu, monkeypatch):
    monkeypatch.setattr(PackedArray, "__module__", "jaxlib.xla_extension")
    return SimpleNamespace(to=lambda array, ordinal=0: PackedArray(gpu, array, ordinal))


LIBRARIES = {"torch": 70, "cupy": 80, "numba": 90, "packed": 0}
"""Stand-ins and the streams that work should join."""


@pytest.fixture(params=LIBRARIES)
def library(request):
    request.getfixturevalue(request.param).stream = LIBRARIES[request.param]
    return request.getfixturevalue(request.param)


class TestEveryLibrary:
    def test_attention(self, library, gpu, rng):
        q, k, v = inputs(rng, 1, 2, 1, 5, 9, 3)
        expected = nbattn.scaled_dot_product_attention(
            q, k, v, is_causal=True, return_lse=True, return_weights=True
        )
        there = [library.to(x) for x in (q, k, v)]
        got = nbattn.scaled_dot_product_attention(
            *there, is_causal=True, return_lse=True, return_weights=True
        )
        for result, wanted in zip(got, expected, strict=True):
            assert type(result) is type(there[0])
            assert result.numpy().dtype == np.float32
            np.testing.assert_allclose(result.numpy(), wanted, rtol=1e-5, atol=1e-6)
        assert {launched.stream for launched in gpu.launches} == {library.stream}
        assert not {"cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2"} & set(gpu.calls)

    def test_softmax(self, library, gpu, rng):
        x, where = normal(rng, (4, 5, 6)), rng.random((5, 1)) < 0.7
        for name, axis in itertools.product(("softmax", "log_softmax", "logsumexp"), (-1, 0, (0, 2), None)):
            got = getattr(nbattn, name)(library.to(x), axis, where=library.to(where), scale=2)
            expected = getattr(nbattn, name)(x, axis, where=where, scale=2)
            assert type(got) is type(library.to(x))
            assert got.shape == np.shape(expected)
            np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-6)
        assert {launched.stream for launched in gpu.launches} == {library.stream}

    def test_views_are_read_where_they_lie(self, library, gpu, rng):
        x = normal(rng, (2, 5, 3, 8))  # batch, positions, heads, numbers and numbers of the value
        there = library.to(x).transpose(0, 2, 1, 3)
        strides = there.strides
        q, v = there.view((2, 3, 5, 4), strides), there.view((2, 3, 5, 4), strides, offset=16)
        before = len(gpu.memory)
        got = nbattn.scaled_dot_product_attention(q, q, v)
        assert len(gpu.memory) == before + 1
        expected = nbattn.scaled_dot_product_attention(
            *(x[..., part].transpose(0, 2, 1, 3) for part in (slice(4), slice(4), slice(4, 8)))
        )
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-6)
        turned = library.to(x).transpose(3, 0, 2, 1)
        np.testing.assert_allclose(
            nbattn.softmax(turned, 1).numpy(), nbattn.softmax(x.transpose(3, 0, 2, 1), 1), rtol=1e-5
        )

    def test_fewer_dimensions(self, library, rng):
        q, k, v = (x[0] for x in inputs(rng, 1, 2, 1, 5, 9, 3))
        got = nbattn.scaled_dot_product_attention(*map(library.to, (q, k, v)), return_lse=True)
        expected = nbattn.scaled_dot_product_attention(q, k, v, return_lse=True)
        assert (got.output.shape, got.lse.shape) == (expected.output.shape, expected.lse.shape)
        np.testing.assert_allclose(got.output.numpy(), expected.output, rtol=1e-5, atol=1e-6)

    def test_packed_sequences(self, library, rng):
        x = normal(rng, (12, 2, 4))
        options = {"is_causal": True, "return_lse": True, "key_lengths": [5, 0, 3]}
        starts = [0, 7, 7, 12]
        got = nbattn.varlen_attention(*[library.to(x)] * 3, starts, starts, **options)
        expected = nbattn.varlen_attention(x, x, x, starts, starts, **options)
        for name in ("output", "lse"):
            wanted = getattr(expected, name)
            np.testing.assert_allclose(getattr(got, name).numpy(), wanted, rtol=1e-5, atol=1e-6)

    def test_out(self, library, rng):
        q, k, v = inputs(rng, 1, 2, 1, 5, 9, 3)
        out = library.to(np.full((1, 2, 5, 3), np.nan, np.float32))
        there = [library.to(x) for x in (q, k, v)]
        assert nbattn.scaled_dot_product_attention(*there, out=out) is out or library.stream == 0
        np.testing.assert_allclose(
            out.numpy(), nbattn.scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=1e-6
        )
        x, out = normal(rng, (3, 8)), library.to(np.zeros(3, np.float32))
        nbattn.logsumexp(library.to(x), out=out)
        np.testing.assert_allclose(out.numpy(), nbattn.logsumexp(x), rtol=1e-5)

    def test_second_gpu(self, library, gpu, rng):
        if library.stream == 80:
            pytest.skip("the stand-in has one stream")
        x = normal(rng, (1, 1, 4, 4))
        there = library.to(x, 1)
        got = nbattn.scaled_dot_product_attention(there, there, there)
        assert got.ordinal == 1
        assert [(launched.device, launched.stream) for launched in gpu.launches] == [
            (1, library.stream + (library.stream == 70))
        ]
        assert gpu.contexts == []

    @dtypes
    def test_dtypes(self, library, dtype, rng):
        if library.stream in (90, 0) and dtype == bfloat16:
            pytest.skip("the interface has no name for it")
        x = normal(rng, (1, 1, 4, 4), dtype)
        got = nbattn.scaled_dot_product_attention(*[library.to(x)] * 3)
        assert got.numpy().dtype == dtype
        np.testing.assert_array_equal(
            got.numpy(), nbattn.scaled_dot_product_attention(x, x, x, backend="cuda")
        )


class TestOptions:
    def test_masks_of_every_dtype(self, torch, rng):
        q, k, v = inputs(rng, 1, 2, 1, 5, 9, 3)
        for dtype in (np.bool_, np.int8, np.uint8, np.int16, np.int32, np.int64):
            mask = rng.integers(0, 2, (5, 9)).astype(dtype)
            if dtype != np.bool_:
                mask *= np.iinfo(dtype).min or np.iinfo(dtype).max  # the highest bits alone
            got = nbattn.scaled_dot_product_attention(*map(torch.to, (q, k, v)), torch.to(mask))
            expected = nbattn.scaled_dot_product_attention(q, k, v, mask)
            np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-6)
            x = normal(rng, (5, 9))
            got = nbattn.softmax(torch.to(x), where=torch.to(mask))
            np.testing.assert_allclose(got.numpy(), nbattn.softmax(x, where=mask), rtol=1e-5)

    @pytest.mark.parametrize("placed", [False, True])
    def test_small_arrays_may_lie_here_or_there(self, torch, placed, rng):
        q, k, v = inputs(rng, 2, 2, 1, 5, 9, 3)
        bias = normal(rng, (2, 1, 9), bfloat16)
        slopes, sinks = rng.random((2, 2), np.float32)
        options = {"key_lengths": [9, 4], "query_offset": [4, -1], "is_causal": True}
        put = torch.to if placed else (lambda x: x)
        got = nbattn.scaled_dot_product_attention(
            *map(torch.to, (q, k, v)),
            bias=torch.to(bias),
            alibi_slopes=put(slopes),
            sinks=put(sinks),
            **options,
        )
        expected = nbattn.scaled_dot_product_attention(
            q, k, v, bias=bias, alibi_slopes=slopes, sinks=sinks, **options
        )
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-6)

    def test_functions_of_scores(self, torch, gpu, rng):
        q, k, v = inputs(rng, 2, 2, 1, 5, 9, 3)
        slopes, ids, shift = np.array([1.0, -0.5]), rng.integers(0, 2, (2, 9)), 0.25

        def bent(score, batch, head, q_index, kv_index, slopes, ids):
            return math.tanh(score + shift) + slopes[head] * (kv_index - q_index)

        def alike(batch, head, q_index, kv_index, slopes, ids):
            return ids[batch, q_index] == ids[batch, kv_index]

        options = {"score_mod": bent, "mask_mod": alike, "mod_args": (slopes, ids), "return_weights": True}
        for _ in range(2):
            slopes += 0.5  # arguments are read with each call
            got = nbattn.scaled_dot_product_attention(*map(torch.to, (q, k, v)), **options)
            expected = nbattn.scaled_dot_product_attention(q, k, v, **options)
            np.testing.assert_allclose(got.output.numpy(), expected.output, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(got.weights.numpy(), expected.weights, rtol=1e-5, atol=1e-6)
        assert gpu.calls.count("cuModuleLoadData") == 1
        shift = 1.0  # another function, as what it knows has changed
        got = nbattn.scaled_dot_product_attention(*map(torch.to, (q, k, v)), **options)
        assert gpu.calls.count("cuModuleLoadData") == 2

    def test_functions_of_packed_sequences(self, torch, rng):
        x = normal(rng, (12, 2, 4))
        starts = [0, 7, 7, 12]
        options = {
            "score_mod": lambda s, b, h, i, j: s - 0.5 * b + i * j,
            "mask_mod": lambda b, h, i, j: i >= j,
        }
        got = nbattn.varlen_attention(*[torch.to(x)] * 3, starts, starts, **options)
        expected = nbattn.varlen_attention(x, x, x, starts, starts, **options)
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-6)

    def test_block_mask(self, torch, rng):
        mask = nbattn.masks.sliding_window(70, left=5, right=3) | nbattn.BlockMask.from_dense(
            rng.random((70, 70)) < 0.02
        )
        x = normal(rng, (1, 1, 70, 2))
        got = nbattn.scaled_dot_product_attention(*[torch.to(x)] * 3, mask, return_weights=True)
        expected = nbattn.scaled_dot_product_attention(x, x, x, mask, return_weights=True)
        np.testing.assert_allclose(got.output.numpy(), expected.output, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(got.weights.numpy(), expected.weights, rtol=1e-4, atol=1e-6)


class TestTensorCores:
    """Who is sent to them, on a GPU that has them; what they compute is tried in an emulator."""

    @pytest.fixture
    def gpu(self):
        with simulated_gpu.installed(capabilities=((8, 0),)) as library:
            yield library

    @pytest.fixture
    def chosen(self, monkeypatch):
        """The kernels' names, which do not run."""
        names = []
        monkeypatch.setattr(launch, "run", lambda kernel, *rest: names.append(kernel.name))
        return names

    @pytest.mark.parametrize("dtype", [np.float16, bfloat16])
    def test_out_may_lie_anywhere(self, torch, chosen, dtype):
        x, wide = torch.to(np.zeros((1, 2, 4, 32), dtype)), torch.to(np.zeros((1, 2, 4, 40), dtype))
        for offset, step in ((0, 80), (2, 80), (0, 66)):
            out = wide.view((1, 2, 4, 32), (320, 320, step, 2), offset=offset)
            nbattn.scaled_dot_product_attention(x, x, x, out=out)
        nbattn.scaled_dot_product_attention(x, x, x.view((1, 2, 4, 27), x.strides))
        assert len(chosen) == 4
        assert all("-mma-" in name for name in chosen)

    def test_others(self, torch, chosen):
        x, wide = torch.to(np.zeros((1, 2, 4, 32), np.float16)), torch.to(np.zeros((1, 2, 4, 64), np.float16))
        nbattn.scaled_dot_product_attention(x, x, x, return_weights=True)
        apart = wide.view((1, 2, 4, 32), (512, 512, 128, 4))
        nbattn.scaled_dot_product_attention(x, x, x, out=apart)
        for strange in (apart, wide.view((1, 2, 4, 32), wide.strides, offset=2)):
            nbattn.scaled_dot_product_attention(strange, x, x)
            nbattn.scaled_dot_product_attention(x, strange, x)
            nbattn.scaled_dot_product_attention(x, x, strange)
        assert len(chosen) == 8
        assert not any("-mma-" in name for name in chosen)


class TestLater:
    """Calls of a layout that was met before are a launch and little else."""

    @pytest.mark.parametrize("name", ["torch", "cupy"])
    def test_same_results(self, name, gpu, request, rng):
        library = request.getfixturevalue(name)
        for _ in range(4):
            q, k, v = inputs(rng, 1, 2, 1, 5, 9, 3)
            got = nbattn.scaled_dot_product_attention(*map(library.to, (q, k, v)), is_causal=True)
            expected = nbattn.scaled_dot_product_attention(q, k, v, is_causal=True)
            np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-6)
            for function in (nbattn.softmax, nbattn.logsumexp):
                np.testing.assert_allclose(function(library.to(v), 1).numpy(), function(v, 1), rtol=1e-5)
        # The last call of attention asked the driver for nothing but a context and a launch.
        gpu.calls.clear()
        gpu.contexts.append(1000)
        nbattn.scaled_dot_product_attention(*map(library.to, (q, k, v)), is_causal=True)
        assert gpu.calls == ["cuCtxGetCurrent", "cuLaunchKernel"]

    def test_stream_and_gpu_of_the_moment(self, torch, gpu, rng):
        x = normal(rng, (1, 1, 4, 4))
        for ordinal, stream in ((0, 5), (0, 6), (1, 7), (0, 8), (1, 9), (1, 10), (1, 11)):
            torch.streams[ordinal] = stream
            nbattn.scaled_dot_product_attention(*[torch.to(x, ordinal)] * 3)
            assert (gpu.launches[-1].device, gpu.launches[-1].stream) == (ordinal, stream)

    def test_gradients_are_refused_then_too(self, torch, rng):
        x = torch.to(normal(rng, (1, 1, 4, 4)))
        for _ in range(4):
            nbattn.scaled_dot_product_attention(x, x, x)
        x.requires_grad = True
        with pytest.raises(ValueError, match=r"query requires grad.*query\.detach\(\)"):
            nbattn.scaled_dot_product_attention(x, x, x)
        torch.is_grad_enabled = lambda: False
        nbattn.scaled_dot_product_attention(x, x, x)


class TestBadInput:
    def test_functions_of_scores(self, torch, gpu, rng):
        """As on the CPU, and before anything is launched."""
        x = torch.to(normal(rng, (1, 1, 4, 4)))
        for function, kind, message in (
            (lambda s, b, h, i, j: [s, s][i], ValueError, "score_mod '<lambda>' .* cannot be compiled"),
            (lambda s, b, h, i, j: (s, s), TypeError, "returns a tuple; expected a number"),
            (lambda s, b, h: s, TypeError, "takes 3 arguments; expected 5"),
        ):
            with pytest.raises(kind, match=message):
                nbattn.scaled_dot_product_attention(x, x, x, score_mod=function)
        with pytest.raises(ValueError, match=r"mod_args\[0\] lives on a GPU; pass a copy of it on the host"):
            nbattn.scaled_dot_product_attention(x, x, x, mod_args=(x,), score_mod=lambda s, b, h, i, j, x: s)
        assert not gpu.launches

    def test_two_gpus(self, torch, rng):
        x = normal(rng, (1, 1, 4, 4))
        with pytest.raises(ValueError, match="query lives on GPU 0 and value on GPU 1; all must be on one"):
            nbattn.scaled_dot_product_attention(torch.to(x), torch.to(x), torch.to(x, 1))
        with pytest.raises(ValueError, match="x lives on GPU 1 and where on GPU 0"):
            nbattn.softmax(torch.to(x, 1), where=torch.to(x > 0))

    def test_host_and_gpu(self, torch, rng):
        x = normal(rng, (1, 1, 4, 4))
        there = torch.to(x)
        for arguments, name in (((there, x, there), "key"), ((there, there, there, x > 0), "mask")):
            with pytest.raises(ValueError, match=f"query lives on GPU 0 and {name} on the host; copy one"):
                nbattn.scaled_dot_product_attention(*arguments)
        with pytest.raises(ValueError, match="key lives on GPU 0 and query on the host"):
            nbattn.scaled_dot_product_attention(x, there, there)
        with pytest.raises(ValueError, match="query lives on GPU 0 and out on the host"):
            nbattn.scaled_dot_product_attention(there, there, there, out=x.copy())

    @pytest.mark.parametrize("host", ["cpu", "reference"])
    def test_backends_of_the_host(self, torch, host, rng):
        x = torch.to(normal(rng, (1, 1, 4, 4)))
        with pytest.raises(ValueError, match=f"on GPU 0, where backend='{host}' cannot read them"):
            nbattn.scaled_dot_product_attention(x, x, x, backend=host)
        with pytest.raises(ValueError, match="cannot read them"):
            nbattn.softmax(x, backend=host)

    def test_doors_without_a_gpu(self, torch, rng):
        x = torch.to(normal(rng, (1, 1, 4, 4)))
        for call in (
            lambda: nbattn.hard_attention(x, x, x),
            lambda: nbattn.merge_states(x, x),
            lambda: nbattn.linear_attention(x, x, x),
            lambda: nbattn.KVCache(1, 1, 8, 4).append(x, x),
        ):
            with pytest.raises(ValueError, match=r"lives on a GPU; pass a copy of it on the host \(on a GPU"):
                call()

    def test_vectors_that_are_checked(self, torch, rng):
        x = torch.to(normal(rng, (1, 1, 4, 4)))
        for name, number in (("key_lengths", [3]), ("query_offset", [3]), ("query_offset", 3)):
            with pytest.raises(ValueError, match=f"{name} lives on a GPU; pass a NumPy array or a list"):
                nbattn.scaled_dot_product_attention(x, x, x, **{name: torch.to(np.array(number))})

    @pytest.mark.parametrize(
        ("change", "kind", "message"),
        [
            ({"layout": "sparse"}, TypeError, r"query is a tensor of layout sparse; .*query\.to_dense"),
            ({"address": 2}, ValueError, "is not aligned; pass a contiguous copy"),
            ({"dtype": np.dtype(np.int32)}, TypeError, "query has dtype int32"),
        ],
    )
    def test_tensors(self, torch, change, kind, message, rng):
        x = torch.to(normal(rng, (1, 1, 4, 4)))
        bad = x.view(x.shape, x.strides)
        for name, value in change.items():
            setattr(bad, name, x.address + value if name == "address" else value)
        with pytest.raises(kind, match=message):
            nbattn.scaled_dot_product_attention(bad, x, x)

    def test_eight_bits(self, torch, rng):
        x = torch.to(normal(rng, (1, 1, 4, 4)))
        x.torch_dtype = type("Float8", (), {"__repr__": lambda self: "torch.float8_e4m3fn"})()
        with pytest.raises(TypeError, match="query has dtype float8_e4m3fn; expected float32"):
            nbattn.scaled_dot_product_attention(x, x, x)

    def test_out(self, torch, numba, rng):
        x = normal(rng, (1, 1, 4, 4))
        there = torch.to(x)
        for out, message in (
            (there, "out shares memory with an input"),
            (there.view((1, 1, 4, 4), (64, 64, 16, 4), offset=8), "out shares memory with an input"),
            (torch.to(x[..., :3]), r"out has shape \(1, 1, 4, 3\)"),
            (torch.to(x.astype(np.float64)), "out has dtype float64; expected float32"),
            (torch.to(x).view((1, 1, 4, 4), (64, 64, 0, 4)), "broadcast axis"),
        ):
            with pytest.raises(ValueError, match=message):
                nbattn.scaled_dot_product_attention(there, there, there, out=out)
        out = numba.to(x)
        out.read_only = True
        with pytest.raises(ValueError, match="out is read-only"):
            nbattn.scaled_dot_product_attention(there, there, there, out=out)

    def test_sinks_of_another_dtype(self, torch, rng):
        x = torch.to(normal(rng, (1, 1, 4, 4)))
        with pytest.raises(
            TypeError, match=r"sinks on a GPU has dtype bfloat16.*expected a contiguous array of float32"
        ):
            nbattn.scaled_dot_product_attention(x, x, x, sinks=torch.to(np.zeros(1, bfloat16)))


class TestDlpack:
    def test_taken_over_and_freed(self, packed, gpu, rng):
        x = packed.to(normal(rng, (1, 1, 4, 4)))
        before, lent = set(gpu.memory), set(exchange._lent)
        got = nbattn.scaled_dot_product_attention(x, x, x)
        (made,) = set(gpu.memory) - before
        assert got.address == made
        gc.collect()
        assert made in gpu.memory
        got.drop()
        gc.collect()
        assert made not in gpu.memory
        assert set(exchange._lent) == lent

    def test_what_nobody_takes_over_is_freed(self, gpu):
        address = launch.allocate(launch.device(0), 64)
        memory = exchange.Memory(DeviceArray(address, (4,), (4,), np.dtype(np.float32), 0), None)
        capsule = memory.__dlpack__()
        del memory
        gc.collect()
        assert address in gpu.memory
        del capsule
        gc.collect()
        assert address not in gpu.memory

    def test_numpy_reads_what_is_written(self):
        """The capsule itself, held against NumPy's reader, for memory of the host."""
        x = np.arange(24, dtype=np.float64).reshape(2, 3, 4).transpose(2, 0, 1)
        lent = set(exchange._lent)

        class Exported:
            def __dlpack_device__(self):
                return 1, 0

            def __dlpack__(self, **options):
                described = DeviceArray(x.ctypes.data, x.shape, x.strides, x.dtype, 0)
                return exchange.capsule_of(described, 1, x)

        got = np.from_dlpack(Exported())
        np.testing.assert_array_equal(got, x)
        assert np.shares_memory(got, x)
        del got
        gc.collect()
        assert set(exchange._lent) == lent

    def test_numpy_writes_what_is_read(self):
        """NumPy's own capsules, read by ours."""
        x = np.arange(24, dtype=np.int16).reshape(2, 3, 4)[:, ::2]

        class Imported:
            def __dlpack__(self, stream):
                return x.__dlpack__()

        described = exchange._from_dlpack(Imported(), "x")
        assert (described.address, described.shape, described.strides) == (x.ctypes.data, x.shape, x.strides)
        assert described.dtype == np.int16


class TestDescriptions:
    def test_extent(self):
        x = np.zeros((4, 5, 6), np.float32)[::-1, ::2, 1:4]
        described = DeviceArray(x.ctypes.data, x.shape, x.strides, x.dtype, 0)
        assert described.extent == np.lib.array_utils.byte_bounds(x)
        assert DeviceArray(7, (0, 3), (12, 4), x.dtype, 0).extent == (7, 7)

    @pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (2, 0, 4), (1, 1)])
    def test_contiguous(self, shape):
        x = np.empty(shape, np.float32)
        if x.size:
            assert device._contiguous(shape, 4) == x.strides

    def test_who_is_not_on_a_gpu(self):
        class Strange:
            def __dlpack_device__(self):
                raise RuntimeError

        assert not any(map(device.on_gpu, (np.ones(2), [1.0], 3, None, "x", np.float32(1), Strange())))

    def test_bfloat16_is_itself(self):
        assert device.Bfloat16() == device.Bfloat16() == np.dtype(bfloat16)
        assert device.Bfloat16() != np.dtype(np.float32)
        assert np.dtype(np.float32) != device.Bfloat16()


@pytest.mark.parametrize(
    ("suite", "row", "params", "kernel"),
    [
        (benchmarks.cuda.Prefill, "time_attention", ("float16", "2x5x4 causal"), "attention"),
        (benchmarks.cuda.Decode, "time_attend", ("float32", 0, 1), "attention"),
        (benchmarks.cuda.Decode, "time_attend", ("float32", 16, 4), "attention"),
        (benchmarks.cuda.Softmax, "time_softmax", ("float32", -1), "softmax"),
        (benchmarks.cuda.SmallCall, "time_call", ("attention",), "attention"),
        (benchmarks.cuda.SmallCall, "time_call", ("softmax",), "softmax"),
    ],
)
def test_benchmarks_wait_for_the_gpu(gpu, torch, monkeypatch, suite, row, params, kernel):
    """A row is one launch, and then a wait for it."""

    def normal_in_little(dtype, *shape):
        shape = tuple(min(n, 5) for n in shape)
        array = np.random.default_rng(0).standard_normal(shape).astype(dtype)
        return [torch.to(x) for x in array] if shape[0] == 3 else torch.to(array)

    monkeypatch.setattr(benchmarks.cuda, "normal", normal_in_little)
    monkeypatch.setattr(benchmarks.cuda, "SIZES", (4, 5, 4))
    monkeypatch.setattr(launch, "require", lambda: None)
    waits = []
    torch.cuda = SimpleNamespace(
        is_available=lambda: True, synchronize=lambda: waits.append(len(gpu.launches))
    )
    instance = suite()
    instance.setup(*params)
    getattr(instance, row)(*params)
    timed = [done for done in gpu.launches if not done.name.startswith("append")]  # which fill a cache before
    filled = len(gpu.launches) - len(timed)
    assert waits == [filled + 1, filled + 2]
    assert all(kernel in done.name for done in timed)


def test_benchmarks_without_a_gpu_are_left_out(torch, monkeypatch):
    torch.cuda = SimpleNamespace(is_available=lambda: False)
    monkeypatch.setattr(launch, "require", lambda: None)
    with pytest.raises(NotImplementedError, match="PyTorch finds no GPU"):
        benchmarks.cuda.Softmax().setup("float32", -1)

    def missing():
        message = "needs an NVIDIA GPU"
        raise OSError(message)

    monkeypatch.setattr(launch, "require", missing)
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        benchmarks.cuda.Softmax().setup("float32", -1)
