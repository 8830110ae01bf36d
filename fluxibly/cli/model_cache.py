"""The lists of models that services have sent, kept for an hour in the cache folder: a file for each address and account.

A file has the time and the names, and its name is a hash. No file has a key or an address.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path
from typing import Final

import msgspec

from fluxibly.providers.local import cache_folder

LIFETIME: Final = 3600.0
"""Seconds for which a list counts."""
LARGEST: Final = 32 * 1024 * 1024
"""Maximum size of a file, in bytes."""


class Entry(msgspec.Struct):
    at: float
    """Seconds since the epoch."""
    models: list[str]


def _folder() -> Path:
    return cache_folder() / "models"


def kept(account: str) -> list[str] | None:
    """Return the list of an account, or None if there is none that counts. A broken file is none."""
    try:
        with (_folder() / account).open("rb") as file:
            entry = msgspec.json.decode(file.read(LARGEST + 1), type=Entry)
    except (OSError, msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
    return entry.models if 0 <= time.time() - entry.at < LIFETIME else None


def keep(account: str, models: list[str]) -> None:
    """Keep the list of an account, readable for this user alone. Without a folder to write to, nothing is kept."""
    folder = _folder()
    data = msgspec.json.encode(Entry(time.time(), models))
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder)
        number, name = tempfile.mkstemp(dir=folder)  # mode 600
        with os.fdopen(number, "wb") as file:
            file.write(data)
        Path(name).replace(folder / account)


def _clear(folder: Path) -> None:
    """Remove the files that no longer count, those of programs that were killed included."""
    oldest = time.time() - LIFETIME
    for file in folder.iterdir():
        with contextlib.suppress(OSError):
            if file.stat().st_mtime < oldest:
                file.unlink()
