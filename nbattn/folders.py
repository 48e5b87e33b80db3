"""The user's folder for what is expensive to make again, and files in it that are whole or not there."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path


def cache_home() -> Path:
    """The parent of all cache folders; `NBATTN_CACHE_DIR` moves it."""
    if own := os.environ.get("NBATTN_CACHE_DIR"):
        return Path(own)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", "~\\AppData\\Local")).expanduser() / "nbattn" / "Cache"
    if sys.platform == "darwin":
        return Path("~/Library/Caches/nbattn").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nbattn"


def user_cache(name: str) -> Path | None:
    """The cache folder of this name; None where nothing can be written."""
    try:
        folder = cache_home() / name
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        return None


def kept(folder: Path | None, name: str) -> bytes:
    """What was kept under this name; nothing where there is no whole file of it."""
    try:
        blob = (folder / name).read_bytes() if folder else b""
    except OSError:
        return b""
    return blob[32:] if hashlib.sha256(blob[32:]).digest() == blob[:32] else b""


def keep(folder: Path | None, name: str, data: bytes) -> None:
    """Write a file with a checksum and replace it at once: two processes may keep the same thing."""
    if folder is None:
        return
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(data).digest() + data)
        os.replace(temporary, folder / name)
    except OSError:  # a full disk costs the next process a compile, not this call
        if temporary:
            with suppress(OSError):
                os.unlink(temporary)
