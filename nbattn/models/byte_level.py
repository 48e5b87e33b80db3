"""GPT-2's alphabet, in which byte-level vocabularies write any bytes as characters that print."""

from __future__ import annotations


def _symbols() -> dict[str, int]:
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printed]
    return {chr(b): b for b in printed} | {chr(256 + i): b for i, b in enumerate(rest)}


BYTES = _symbols()
"""The byte behind each character: those that print are themselves, the rest stand from 256 on."""


def unwritten(token: str) -> bytes:
    """The bytes that a token of the vocabulary is written for.

    Examples
    --------
    >>> from nbattn.models.byte_level import unwritten
    >>> unwritten("ĠParis").decode()
    ' Paris'
    """
    return bytes(BYTES[symbol] for symbol in token)
