"""Pictures from files, by Pillow, and into the square that a vision transformer reads, by NumPy."""

from __future__ import annotations

import warnings
from itertools import pairwise
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Frame(NamedTuple):
    """Where in a square a picture lies, in pixels of the square."""

    top: int
    left: int
    height: int
    width: int


def read(path: str | PathLike[str]) -> NDArray[np.uint8]:
    """The picture in a file, in any format that Pillow knows, upright, as ``(height, width, 3)`` of uint8.

    Grey, palette, CMYK and 16-bit pictures are converted; what is transparent becomes white. Of several
    pictures in a file it is the first.

    Raises
    ------
    ModuleNotFoundError
        Without Pillow; the message holds the command that installs it.
    OSError, ValueError
        For a file that is missing or cannot be read as a picture; the message names it.

    Examples
    --------
    >>> from nbattn.models import pictures
    >>> pictures.read("no/such.png")  # doctest: +SKIP
    Traceback (most recent call last):
        ...
    FileNotFoundError: cannot read the picture no/such.png: No such file or directory
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        msg = "pictures are read by Pillow, which is not installed; pip install pillow"
        raise ModuleNotFoundError(msg, name="PIL") from error
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of sizes that are still read
            image = Image.open(file)
            ImageOps.exif_transpose(image, in_place=True)
            mode, array = image.mode, _rgb(image)
    except MemoryError:
        raise
    # A damaged picture fails in Pillow's decoders in a dozen ways.
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            msg = f"cannot read the picture {path}: {error.strerror}"
            raise type(error)(msg) from error
        large = isinstance(error, Image.DecompressionBombError)
        msg = f"{path} is no whole picture of a known format{f' ({error})' if large else ''}"
        raise ValueError(msg) from error
    if mode == "F":
        msg = f"the picture {path} is of floating-point numbers; expected whole ones of 8 or 16 bits"
        raise ValueError(msg)
    return array


def _rgb(image: Any) -> NDArray[np.uint8]:
    from PIL import Image

    if image.mode.startswith("I"):  # Pillow would cut off what is beyond 8 bits
        wide = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.rint(np.clip(wide, 0, 65535) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def framed(picture: NDArray[np.uint8], side: int) -> tuple[NDArray[np.uint8], Frame]:
    """The picture in the middle of a black square, as large as fits, and where it lies.

    Each new pixel is the mean of the area that it covers, as OpenCV's ``INTER_AREA`` has it.

    Parameters
    ----------
    picture : ndarray of uint8, shape (height, width, 3)
    side : int
        Of the square. Where the longer side is so long, the other must not be less than a pixel.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.models.pictures import framed
    >>> square, frame = framed(np.full((20, 40, 3), 9, np.uint8), 8)
    >>> square[:, 0, 0], frame
    (array([0, 0, 9, 9, 9, 9, 0, 0], dtype=uint8), Frame(top=2, left=0, height=4, width=8))
    """
    rows, columns = picture.shape[:2]
    height, width = (round(n * side / max(rows, columns)) for n in (rows, columns))
    down = _areas(rows, height)
    # Row by row, so that a large picture is never there in float32 as a whole.
    lines = np.stack(
        [np.tensordot(part, picture[begin : begin + len(part)].astype(np.float32), 1) for begin, part in down]
    )
    across = [np.tensordot(part, lines[:, b : b + len(part)], (0, 1)) for b, part in _areas(columns, width)]
    frame = Frame((side - height) // 2, (side - width) // 2, height, width)
    square = np.zeros((side, side, 3), np.uint8)
    inside = np.rint(np.stack(across, axis=1))
    square[frame.top : frame.top + height, frame.left : frame.left + width] = inside
    return square, frame


def _areas(before: int, after: int) -> list[tuple[int, NDArray[np.float32]]]:
    """For each of so many new pixels the first old one that it covers, and their shares of it."""
    edges = np.arange(after + 1) * before / after
    areas = []
    for low, high in pairwise(edges):
        begin, end = int(low), max(int(np.ceil(high - 1e-9)), int(low) + 1)
        pixels = np.arange(begin, min(end, before))
        shares = np.minimum(pixels + 1, high) - np.maximum(pixels, low)
        areas.append((begin, (shares / shares.sum()).astype(np.float32)))
    return areas
