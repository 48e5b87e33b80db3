"""Trained models on this library's attention; weights are read where an installed package keeps them."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import glassllm, smollm2
    from .decoder import Decoder

LANGUAGES = {"glassllm": "en", "glassllm-en": "en", "glassllm-pt": "pt"}
"""The language of each glassllm."""
MODELS = (*LANGUAGES, "smollm2")
"""What `load` knows."""


def load(
    name: str,
    *,
    folder: str | PathLike[str] | None = None,
    backend: str | None = None,
    cache_dtype: str = "float32",
    weights_dtype: str = "float32",
) -> tuple[Decoder, glassllm.Tokenizer | smollm2.Tokenizer]:
    """Load a model that writes text, and its tokenizer, by name.

    Parameters
    ----------
    name : {"glassllm", "glassllm-en", "glassllm-pt", "smollm2"}
        "glassllm" is the English one.
    folder : path, optional
        Where the weight files lie; the folder of the installed package unless given.
    backend : {None, "cpu", "reference", "cuda"}
        The attention backend.
    cache_dtype : {"float32", "bfloat16", "int8", "int4"}
        What `Decoder.new_cache` stores keys and values in.
    weights_dtype : {"float32", "float16", "bfloat16", "int8"}
        What the weights of products, and the table of tokens, are kept as.

    Returns
    -------
    model : Decoder
    tokenizer : Tokenizer

    Raises
    ------
    ValueError
        For an unknown name or dtype, or a weight file that is damaged or does not fit; the message names the
        file.
    ModuleNotFoundError
        Where the package that ships the weights is not installed.
    OSError
        For a weight file that is missing or cannot be read.

    Examples
    --------
    >>> from nbattn.models import load
    >>> load("gpt-17")
    Traceback (most recent call last):
        ...
    ValueError: model is 'gpt-17'; expected 'glassllm', 'glassllm-en', 'glassllm-pt' or 'smollm2'
    """
    if name not in MODELS:
        *most, last = map(repr, MODELS)
        msg = f"model is {name!r}; expected {', '.join(most)} or {last}"
        raise ValueError(msg)
    if name == "smollm2":
        from . import smollm2

        return smollm2.load(folder, backend, cache_dtype, weights_dtype)
    from . import glassllm

    return glassllm.load(LANGUAGES[name], folder, backend, cache_dtype, weights_dtype)
