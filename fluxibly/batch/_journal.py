"""The journal of a batch: the output file itself, in which each line says that its row is done."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import msgspec

from fluxibly.errors import ConfigError

SYNC_EVERY = 1.0
"""The seconds after which what is written is also safe from a power cut. A process that is killed loses nothing."""


class Bitmap:
    """A set of row numbers: a bit for each row up to the highest, so 1.25 MB for ten million."""

    def __init__(self) -> None:
        self._bits = bytearray()

    def add(self, number: int) -> None:
        place = number >> 3
        if place >= len(self._bits):
            self._bits.extend(bytes(max(place + 1 - len(self._bits), len(self._bits), 1024)))
        self._bits[place] |= 1 << (number & 7)

    def __contains__(self, number: int) -> bool:
        place = number >> 3
        return place < len(self._bits) and bool(self._bits[place] >> (number & 7) & 1)


class _Written(msgspec.Struct):
    """What is read of a line that a batch before this one has written."""

    row: int
    key: str = ""
    error: msgspec.Raw | None = None


class Journal:
    """The output of a batch, open for more lines. No other process can open it meanwhile.

    Args:
        path: the file, which is made if it does not exist. A last line without an end, which a process was writing when it was
            killed, is cut off.

    Raises:
        ConfigError: another process is at work with it, or it is the output of something else.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done = Bitmap()
        self.answered = self.failed = 0
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._lock()
            self._read()
        except BaseException:
            os.close(self._file)
            raise
        self._synced_at = time.monotonic()

    def _lock(self) -> None:
        import fcntl

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{self.path}: another process is writing this batch") from None

    def _read(self) -> None:
        """Note the rows that have a line."""
        decode = msgspec.json.Decoder(_Written).decode
        end = 0
        with open(self._file, "rb", closefd=False) as file:  # a Path cannot open a descriptor
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    written = decode(line)
                except msgspec.DecodeError:
                    raise ConfigError(
                        f"{self.path}, line {number}: expected a line of a batch's output, got something else; "
                        "give another --out"
                    ) from None
                end += len(line)
                self.note(written.row, failed=written.error is not None)
        os.ftruncate(self._file, end)
        os.lseek(self._file, end, os.SEEK_SET)

    def note(self, row: int, *, failed: bool) -> None:
        """Note that a row has a line."""
        self.done.add(row)
        self.failed += failed
        self.answered += not failed

    def write(self, lines: Iterable[bytes]) -> None:
        """Write whole lines at once.

        Raises:
            OSError: there is no room for them; what was written of them is taken back.
        """
        data = b"".join(lines)
        start = os.lseek(self._file, 0, os.SEEK_CUR)
        written = 0
        try:
            while written < len(data):
                written += os.write(self._file, data[written:])
        except BaseException:
            os.ftruncate(self._file, start)
            os.lseek(self._file, start, os.SEEK_SET)
            raise
        if time.monotonic() - self._synced_at > SYNC_EVERY:
            self.sync()

    def sync(self) -> None:
        """Have the disk keep what is written."""
        os.fsync(self._file)
        self._synced_at = time.monotonic()

    def close(self) -> None:
        self.sync()
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
