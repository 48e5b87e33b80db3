"""CUDA kernels' way to the GPU: parameters, contexts, the cache on disk, and what fails. No GPU is needed."""

import ctypes
import importlib
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import simulated_gpu
from oracle import inputs

import nbattn
from nbattn.cuda import arrays, attention, compiler, launch, softmax

pytestmark = pytest.mark.cuda_sim


@pytest.fixture
def gpu():
    with simulated_gpu.installed(capabilities=((9, 0), (8, 0))) as library:
        yield library


def double(p):
    for i in range(p.n[0]):
        p.out[i] = p.x[i] * p.times + p.n[1]


DOUBLE = compiler.Kernel(
    "double-1",
    lambda: double,
    (("x", "*float32"), ("times", "float32"), ("n", "int32x2"), ("out", "*float32"), ("rest", "float64")),
    threads=1,
)


class TestParameters:
    def test_bytes_are_cs(self):
        class C(ctypes.Structure):
            _fields_ = (
                ("x", ctypes.c_void_p), ("times", ctypes.c_float), ("n", ctypes.c_int32 * 2),
                ("out", ctypes.c_void_p), ("rest", ctypes.c_double),
            )  # fmt: skip

        values = {"x": 1 << 40, "times": 0.5, "n": (3, -4), "out": 7, "rest": 1e300}
        expected = C(*(tuple(v) if isinstance(v, tuple) else v for v in values.values()))
        assert bytes(DOUBLE.packed(values)) == bytes(expected)
        assert DOUBLE.offsets == {name: getattr(C, name).offset for name in values}

    def test_what_is_not_named_is_zero(self):
        assert DOUBLE.packed({"n": (0, 1)}) == DOUBLE.packed({"n": (0, 1), "x": 0, "times": 0.0, "rest": 0})
        with pytest.raises(KeyError, match="y"):
            DOUBLE.packed({"y": 1})

    @pytest.mark.parametrize("storage", compiler.WORDS)
    def test_words_only(self, storage):
        """All parameters of the kernels are 8 bytes, so that no compiler can pad them in another way."""
        tile = attention.TILE64 if storage == "float64" else attention.TILE
        for kernel in (softmax.kernel(storage, 256), attention.kernel(storage, storage, tile)):
            assert all(struct.calcsize(compiler.FORMATS.get(kind.partition("x")[0], "P")) == 8
                       for _, kind in kernel.parameters)  # fmt: skip
            assert kernel.layout.size < 4096


class TestLaunch:
    def test_runs_on_the_stream_of_the_device(self, gpu):
        place = launch.device(1)
        with launch.room(place, 12, 5) as x, launch.room(place, 12, 5) as out:
            here = np.array([1, 2, 3], np.float32)
            launch.ask("cuMemcpyHtoDAsync_v2", x, here.ctypes.data, 12, 5)
            values = {"x": x, "out": out, "times": 2, "n": (3, 1)}
            for _ in range(2):
                launch.run(DOUBLE, values, 1, place, stream=5)
            launch.ask("cuMemcpyDtoHAsync_v2", here.ctypes.data, out, 12, 5)
        np.testing.assert_array_equal(here, [3, 5, 7])
        assert gpu.launches == [simulated_gpu.Launch("double-1", 1, 5, 1)] * 2
        assert gpu.calls.count("cuModuleLoadData") == 1
        assert not gpu.memory
        assert not gpu.contexts

    def test_a_context_that_is_there_is_kept(self, gpu):
        place = launch.device(0)
        with place.current(), place.current():
            assert gpu.contexts == [1000]
        with launch.device(1).current(), place.current():
            assert gpu.contexts == [1001, 1000]
        assert gpu.contexts == []

    def test_each_gpu_has_its_own_code(self, gpu):
        for ordinal in (0, 1, 0):
            launch.device(ordinal).function(DOUBLE)
        assert gpu.calls.count("cuModuleLoadData") == 2

    def test_no_block_is_no_launch(self, gpu):
        launch.run(DOUBLE, {}, 0, launch.device(0), 0)
        assert not gpu.launches

    def test_registers_that_warps_pass_on(self, gpu, monkeypatch):
        """A kernel that waits for more than there are would never end, so it is not started."""
        passing = replace(DOUBLE, name="double-passing", registers=128)
        ask, given = launch._number, [120]
        monkeypatch.setattr(
            launch,
            "_number",
            lambda name, *x: given[0] if name == "cuFuncGetAttribute" else ask(name, *x),
        )
        with pytest.raises(RuntimeError, match=r"double-passing is made for 128 registers .* gives 120"):
            launch.device(0).function(passing)
        given[0] = 128
        assert launch.device(0).function(passing) == launch.device(0).function(passing)

    def test_again_from_many_threads(self, gpu):
        """Each launch has its own parameters: what another thread is about to ask for does not reach it."""
        call = launch.Call(DOUBLE, {"n": (1, 0), "times": 1}, 1, launch.device(0), ("x", "out"))
        asked = []
        go = threading.Barrier(4)

        def launched(*arguments):
            time.sleep(1e-4)  # others come in between
            asked.append(DOUBLE.layout.unpack(ctypes.string_at(arguments[-1][1], DOUBLE.layout.size)))
            return 0

        gpu.cuLaunchKernel = launched

        def many(first):
            go.wait()
            for i in range(20):
                call(0, first + i, -first - i & 0xFFFF)

        threads = [threading.Thread(target=many, args=(1000 * n,)) for n in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {(x, out) for x, *_, out, _ in asked} == {
            (1000 * n + i, -1000 * n - i & 0xFFFF) for n in range(1, 5) for i in range(20)
        }

    def test_too_many_blocks(self, gpu):
        with pytest.raises(ValueError, match=r"fewer than 2\*\*31: split the batch"):
            launch.run(DOUBLE, {}, 1 << 31, launch.device(0), 0)

    def test_memory_is_given_back_when_a_kernel_fails(self, gpu):
        x = np.zeros((1, 1, 4, 8), np.float32)
        gpu.fail = {"cuLaunchKernel": 700}
        with pytest.raises(RuntimeError, match="cuLaunchKernel fails with CUDA_ERROR_700"):
            nbattn.scaled_dot_product_attention(x, x, x, key_lengths=[3], backend="cuda")
        assert not gpu.memory

    def test_writing_beside_an_array_is_noticed(self, gpu):
        with arrays.Copies() as copies:
            x = copies.send(np.zeros(3, np.float32)).address
            with pytest.raises(simulated_gpu.OutsideError):
                launch.run(DOUBLE, {"x": x, "out": x, "n": (4, 0)}, 1, copies.device, 0)


class TestDisk:
    @pytest.fixture
    def folder(self, gpu, monkeypatch, tmp_path):
        monkeypatch.setattr(compiler, "cache_folder", lambda: tmp_path)
        return tmp_path

    def test_compiled_once_for_all_processes(self, gpu, folder, monkeypatch):
        launch.device(0).function(DOUBLE)
        assert [file.name for file in folder.iterdir()] == ["double-1-sm_90a"]
        monkeypatch.setattr(launch, "_devices", {})
        monkeypatch.setattr(compiler, "binary", None)
        launch.device(0).function(DOUBLE)

    def test_a_damaged_file_is_compiled_again(self, gpu, folder, monkeypatch):
        launch.device(0).function(DOUBLE)
        (file,) = folder.iterdir()
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        monkeypatch.setattr(launch, "_devices", {})
        launch.device(0).function(DOUBLE)
        assert file.read_bytes() == whole

    def test_folder_depends_on_sources_and_compilers(self, monkeypatch, tmp_path):
        monkeypatch.setenv("NBATTN_CACHE_DIR", str(tmp_path))
        folder = compiler.cache_folder.__wrapped__
        first = folder()
        assert first.parent == tmp_path
        assert folder() == first
        monkeypatch.setattr(compiler, "version_of", lambda package: "1.2.3")
        assert folder() != first


def test_importing_needs_no_numba():
    code = "import nbattn.cuda.attention, nbattn.cuda.softmax, sys; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


class TestWhatIsMissing:
    """Every door says it in one sentence, with what to do, and computes nothing on the CPU instead."""

    X = np.zeros((2, 2, 3, 4), np.float32)
    DOORS = (
        lambda x: nbattn.scaled_dot_product_attention(x, x, x, backend="cuda"),
        lambda x: nbattn.varlen_attention(x[0], x[0], x[0], [0, 2], [0, 2], backend="cuda"),
        lambda x: nbattn.softmax(x, backend="cuda"),
        lambda x: nbattn.log_softmax(x, backend="cuda"),
        lambda x: nbattn.logsumexp(x, backend="cuda"),
    )

    @pytest.fixture(params=range(len(DOORS)))
    def call(self, request):
        return lambda: self.DOORS[request.param](self.X)

    @pytest.fixture
    def installed(self, monkeypatch):
        monkeypatch.setattr(compiler, "version_of", lambda package: "0.30.4")
        monkeypatch.setattr(launch, "library", launch.library.__wrapped__)

    def test_numba_cuda(self, call, monkeypatch):
        monkeypatch.setattr(compiler, "version_of", lambda package: "")
        with pytest.raises(ImportError, match=r'needs numba-cuda.*pip install "nbattn\[cuda\]"'):
            call()

    def test_driver(self, call, installed, monkeypatch):
        def missing(name):
            message = f"{name}: cannot open shared object file"
            raise OSError(message)

        monkeypatch.setattr(ctypes, "CDLL", missing)
        with pytest.raises(
            OSError, match=r'needs an NVIDIA GPU and its driver \(.*\); else pass backend="cpu"'
        ):
            call()

    @pytest.mark.parametrize(("status", "reason"), [(100, "finds none"), (999, "fails with CUDA_ERROR_999")])
    def test_gpu(self, call, installed, monkeypatch, status, reason):
        class Broken(simulated_gpu.Library):
            def __getattribute__(self, name):
                if name.startswith("cu") and name != "cuGetErrorName":
                    function = lambda *arguments: status  # noqa: E731
                    function.argtypes = None
                    return function
                if name == "cuGetErrorName":
                    return Named()
                return super().__getattribute__(name)

        class Named:
            argtypes = None

            def __call__(self, status, name):
                name._obj.value = b"CUDA_ERROR_%d" % status
                return 0

        monkeypatch.setattr(ctypes, "CDLL", lambda name: Broken())
        with pytest.raises(OSError, match=f"{reason}.*nvidia-smi"):
            call()


@pytest.mark.parametrize(
    "call",
    [
        lambda x: nbattn.hard_attention(x, x, x, backend="cuda"),
        lambda x: nbattn.linear_attention(x, x, x, backend="cuda"),
        lambda x: nbattn.luong_attention(x, x, x, backend="cuda"),
        lambda x: nbattn.additive_attention(x, x, x, w_query=x, w_key=x, v=x, backend="cuda"),
    ],
)
def test_doors_without_a_gpu_say_which_have_one(call):
    with pytest.raises(
        ValueError, match="has scaled_dot_product_attention, varlen_attention, paged_attention, softmax"
    ):
        call(np.zeros((1, 1, 3, 4), np.float32))


class TestToolchain:
    """The compiler's packages, as far as their absence can be told without them."""

    @pytest.fixture
    def modules(self, monkeypatch):
        """What `importlib` finds, or raises, by name."""
        found = {}
        original = importlib.import_module

        def import_module(name, package=None):
            if name not in found:
                return original(name, package)
            if isinstance(found[name], Exception):
                raise found[name]
            return found[name]

        monkeypatch.setattr(importlib, "import_module", import_module)
        monkeypatch.setattr(compiler, "version_of", lambda package: "0.30.4")
        return found

    def test_numpy_that_does_not_fit(self, modules):
        modules["numba.cuda"] = AttributeError("module 'numpy' has no attribute 'in1d'")
        with pytest.raises(ImportError, match=rf"0\.30\.4 .* NumPy {np.__version__}.*in1d.*nbattn\[cuda\]"):
            compiler._toolchain()

    def test_row_stack_is_lent(self, monkeypatch):
        monkeypatch.delattr(np, "row_stack", raising=False)
        with compiler._row_stack():
            assert np.row_stack is np.vstack  # noqa: NPY201
        assert not hasattr(np, "row_stack")

    def test_nvjitlink(self, modules):
        modules |= {"numba.cuda": object(), "numba.cuda.types": object()}
        for error in (ImportError("No module named 'cuda'"), RuntimeError("libnvJitLink.so.13 not found")):
            modules["cuda.bindings.nvjitlink"] = error
            with pytest.raises(ImportError, match=rf"nvJitLink cannot be loaded \({error}\).*nbattn\[cuda\]"):
                compiler._toolchain()

    def test_gpu_that_the_compiler_lacks(self, modules):
        class NvJitLinkError(Exception):
            pass

        def create(count, options):
            raise NvJitLinkError(options[0])

        linker = SimpleNamespace(create=create, version=lambda: (13, 5), nvJitLinkError=NvJitLinkError)
        with pytest.raises(RuntimeError, match=r"nvJitLink 13\.5 knows no sm_129 .*--upgrade"):
            compiler._linked(linker, b"", "sm_129", "double")

        class CCSupportError(Exception):
            pass

        def compile_(*arguments, **options):
            message = "GPU compute capability 6.1 is not supported(requires >=7.5)"
            raise CCSupportError(message)

        types = SimpleNamespace(
            void=tuple, float32=0, float64=0, int32=0, CPointer=lambda x: x, UniTuple=lambda x, n: x,
            NamedTuple=lambda x, n: x,
        )  # fmt: skip
        modules |= {
            "numba.cuda": SimpleNamespace(compile=compile_), "numba.cuda.types": types,
            "cuda.bindings.nvjitlink": linker,
            "numba.cuda.dispatcher": SimpleNamespace(get_current_device=None),
            "numba.cuda.cudadrv.error": SimpleNamespace(CCSupportError=CCSupportError),
        }  # fmt: skip
        with pytest.raises(RuntimeError, match=r"capability 6\.1 is not supported.*numba-cuda\[cu12\]"):
            compiler.binary(DOUBLE, (6, 1))

    @pytest.mark.parametrize("missing", ["NvvmSupportError", "NvrtcSupportError", "OSError"])
    def test_nvvm_or_nvrtc(self, modules, missing):
        error = OSError if missing == "OSError" else type(missing, (Exception,), {})

        def compile_(*arguments, **options):
            message = "libnvrtc.so.13: cannot open shared object file"
            raise error(message)

        types = SimpleNamespace(
            void=tuple, float32=0, float64=0, int32=0, CPointer=lambda x: x, UniTuple=lambda x, n: x,
            NamedTuple=lambda x, n: x,
        )  # fmt: skip
        modules |= {
            "numba.cuda": SimpleNamespace(compile=compile_), "numba.cuda.types": types,
            "cuda.bindings.nvjitlink": SimpleNamespace(version=lambda: (13, 5)),
            "numba.cuda.dispatcher": SimpleNamespace(get_current_device=None),
            "numba.cuda.cudadrv.error": SimpleNamespace(**{missing: error}),
        }  # fmt: skip
        with pytest.raises(
            ImportError, match=r"cannot compile for sm_80: libnvrtc.*reinstall.*nbattn\[cuda\]"
        ):
            compiler.binary(DOUBLE, (8, 0))

    def test_old_driver(self, gpu):
        gpu.fail = {"cuModuleLoadData": 222}
        with pytest.raises(RuntimeError, match=r"CUDA 13\.0.*GPU 0 \(SIMULATOR, compute capability 9\.0\)"):
            launch.device(0).function(DOUBLE)

    def test_no_such_gpu(self, gpu):
        with pytest.raises(ValueError, match="there is no GPU 2; the driver finds 2"):
            launch.device(2)


def test_numpy_arrays_go_to_the_current_gpu(gpu, rng):
    q, k, v = inputs(rng, 1, 2, 1, 5, 9, 3)
    expected = nbattn.scaled_dot_product_attention(q, k, v, is_causal=True)
    with launch.device(1).current():
        got = nbattn.scaled_dot_product_attention(q, k, v, is_causal=True, backend="cuda")
    assert [launched.device for launched in gpu.launches] == [1]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
