"""What importing the package brings in, and what it exports."""

import importlib
import json
import pkgutil
import subprocess
import sys

import pytest

import nbattn

HEAVY = {
    "numba",
    "llvmlite",
    "scipy",
    "onnx",
    "torch",
    "dask",
    "matplotlib",
    "ml_dtypes",
    "safetensors",
    "tokenizers",
}
ATTEND = "import nbattn; nbattn.scaled_dot_product_attention([[1.0]], [[1.0]], [[1.0]]"


def loaded_by(code):
    """The top-level modules in a fresh process after running `code`."""
    code = f"{code}\nimport json, sys\nprint(json.dumps([name.partition('.')[0] for name in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout))


@pytest.mark.parametrize(
    "code",
    [
        "import nbattn",
        "from nbattn import *",
        f"{ATTEND}, backend='reference')",
        "import nbattn; nbattn.softmax([1.0], backend='reference')",
    ],
)
def test_nothing_heavy(code):
    assert not loaded_by(code) & HEAVY


def test_kernels_bring_numba_and_no_more():
    assert loaded_by(f"{ATTEND})") & HEAVY <= {"numba", "llvmlite", "scipy"}


def test_public_names():
    for name in nbattn.__all__:
        assert getattr(nbattn, name).__doc__, name
    assert sorted(nbattn.__all__) == nbattn.__all__


def test_guide_names_everything():
    """`help(nbattn)` says what each is for; results explain themselves."""
    for name in nbattn.__all__:
        assert f"`{name}`" in nbattn.__doc__ or name.endswith("Output"), name


@pytest.mark.parametrize("name", ["nbattn.cpu", "nbattn.cuda"])
def test_every_kernel_file_has_its_place(name):
    """Who opens a folder reads there what each of its files is for."""
    folder = importlib.import_module(name)
    names = [module.name for module in pkgutil.iter_modules(folder.__path__)]
    assert not [name for name in names if f"`{name}`" not in folder.__doc__]


def test_every_module_imports():
    for module in pkgutil.walk_packages(nbattn.__path__, "nbattn."):
        # These are for numba-cuda without its simulator, and imported where kernels are compiled.
        if not module.name.endswith("__main__") and ".cuda.ptx" not in module.name:
            assert importlib.import_module(module.name).__doc__, module.name
