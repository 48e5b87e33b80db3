"""What every test shares: the backends, guarded memory, and how much hypothesis tries."""

import ctypes
import mmap
import os
import signal
import sys

import hypothesis
import numpy as np
import oracle
import pytest
import simulated_gpu

simulated_gpu.switch_on()
hypothesis.settings.register_profile(
    "nbattn",
    deadline=None,  # the first example may compile
    max_examples=150,
    derandomize="CI" in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
usual = hypothesis.settings.get_profile("nbattn")
hypothesis.settings.register_profile("deep", parent=usual, max_examples=5000)
hypothesis.settings.load_profile("nbattn")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the heavy cases too")


def pytest_configure(config):
    # A shell that runs in the background makes its children deaf to Ctrl-C, which some tests send to theirs.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="heavy; run with --slow"))


def pytest_generate_tests(metafunc):
    """Every backend that a test does not choose itself; the GPU's where it says so, as simulating is slow."""
    own = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "backend" in metafunc.fixturenames and "backend" not in own:
        backends = ["reference", "cpu"]
        gpu = metafunc.definition.get_closest_marker("gpu")
        if gpu and ("slow" not in gpu.args or metafunc.config.getoption("--slow")):
            simulated = pytest.param("cuda", marks=pytest.mark.cuda_sim)
            backends = [simulated] if "only" in gpu.args else [*backends, simulated]
        metafunc.parametrize("backend", backends, indirect=True, scope="session")


@pytest.fixture(scope="session")
def backend(request):
    """The backend of this name."""
    return request.param


@pytest.fixture(autouse=True)
def simulation(request):
    """For the backend "cuda" a simulated GPU; with NUMBA_ENABLE_CUDASIM=0 there is a real one."""
    simulated = os.environ.get("NUMBA_ENABLE_CUDASIM") != "0"
    if not simulated or "cuda_sim" not in request.keywords or "backend" not in request.fixturenames:
        yield
        return
    with simulated_gpu.installed(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "USUAL", oracle.SMALL)
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def guarded():
    """Copies of arrays between two pages that must not be touched: `guarded(array, side)`.

    With side "end" the array's last byte, with "start" its first, lies next to such a page, so that reading
    or writing beyond it ends the process.
    """
    if sys.platform != "linux":
        pytest.skip("needs mmap and mprotect as Linux has them")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    page = mmap.PAGESIZE
    regions = []

    def copy(array, side):
        inner = -(-max(array.nbytes, 1) // page) * page
        size = inner + 2 * page
        base = libc.mmap(None, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        assert base not in (None, ctypes.c_void_p(-1).value)
        regions.append((base, size))
        libc.mprotect(ctypes.c_void_p(base + page), ctypes.c_size_t(inner), mmap.PROT_READ | mmap.PROT_WRITE)
        start = base + page + (inner - array.nbytes if side == "end" else 0)
        memory = (ctypes.c_char * array.nbytes).from_address(start)
        result = np.frombuffer(memory, np.uint8).view(array.dtype).reshape(array.shape)
        result[...] = array
        return result

    yield copy
    for base, size in regions:
        libc.munmap(base, size)
