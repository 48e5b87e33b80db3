"""Trained models on this library's attention; weights are read where an installed package keeps them."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .glassllm import GlassLM, Tokenizer

LANGUAGES = {"glassllm": "en", "glassllm-en": "en", "glassllm-pt": "pt"}
"""The language of each model that `load` knows."""


def load(
    name: str,
    *,
    folder: str | PathLike[str] | None = None,
    backend: str | None = None,
    cache_dtype: str = "float32",
) -> tuple[GlassLM, Tokenizer]:
    """Load a model and its tokenizer by name.

    Parameters
    ----------
    name : {"glassllm", "glassllm-en", "glassllm-pt"}
        "glassllm" is the English one.
    folder : path, optional
        Where the weight files lie; the folder of the installed package unless given.
    backend : {None, "cpu", "reference", "cuda"}
        The attention backend.
    cache_dtype : {"float32", "int8", "int4"}
        What `GlassLM.new_cache` stores keys and values in.

    Returns
    -------
    model : GlassLM
    tokenizer : Tokenizer

    Raises
    ------
    ValueError
        For an unknown name, or a weight file that is damaged or does not fit; the message names the file.
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
    ValueError: model is 'gpt-17'; expected 'glassllm', 'glassllm-en' or 'glassllm-pt'
    """
    if name not in LANGUAGES:
        *most, last = map(repr, LANGUAGES)
        msg = f"model is {name!r}; expected {', '.join(most)} or {last}"
        raise ValueError(msg)
    from . import glassllm

    return glassllm.load(LANGUAGES[name], folder, backend, cache_dtype)
