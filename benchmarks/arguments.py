"""What the commands of this folder take alike; what is wrong is told before anything runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from .machine import processors


def output_file(text: str) -> Path:
    """A file that can be written; it is made if it is not there."""
    path = Path(text)
    try:
        path.open("a").close()  # unlike touch it refuses folders
    except OSError as error:
        msg = f"{text} cannot be written: {error.strerror}"
        raise argparse.ArgumentTypeError(msg) from None
    return path


def threads(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= processors():
        msg = f"got {text!r}; expected 1 to {processors()}, the processors that this process may use"
        raise argparse.ArgumentTypeError(msg)
    return int(text)
