"""The journal of a batch: a file with a line for each row that is done.

Lines are only ever added at its end, whole, so that a process which is killed leaves at most one torn line, the last. A row that is
asked again gets another line; the last one counts, and `compact` leaves only that.
"""

from __future__ import annotations

import contextlib
import os
import stat
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn, Self

import msgspec

from fluxibly.errors import ConfigError

_BLOCK = 1 << 18
"""The bytes that are read at once."""
_MOST_AT_ONCE = 1_000
"""The most lines that are written at once."""
_START = b'{"row":'
"""How every line begins."""
_HIGHEST = 10**10
"""The highest row. A higher number in a file is damage, and would take more than a gigabyte of memory."""


class Bitmap:
    """A set of row numbers: a bit for each row up to the highest, so 1.25 MB for ten million."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self._count = 0

    def add(self, number: int) -> None:
        place, bit = number >> 3, 1 << (number & 7)
        bits = self._bits
        if place >= len(bits):
            bits.extend(bytes(max(place + 1 - len(bits), len(bits), 1024)))
        if not bits[place] & bit:
            bits[place] |= bit
            self._count += 1

    def discard(self, number: int) -> None:
        if number in self:
            self._bits[number >> 3] ^= 1 << (number & 7)
            self._count -= 1

    def __contains__(self, number: int) -> bool:
        place = number >> 3
        return place < len(self._bits) and bool(self._bits[place] >> (number & 7) & 1)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        for place, byte in enumerate(self._bits):
            if byte:
                yield from (8 * place + bit for bit in range(8) if byte >> bit & 1)

    def copy(self) -> Bitmap:
        made = Bitmap()
        made._bits[:], made._count = self._bits, self._count
        return made


class Entry(NamedTuple):
    """The line of a row, to be written."""

    row: int
    failed: bool
    line: bytes
    key: str = ""


class Written(msgspec.Struct, gc=False):
    """The fields of a line that the journal reads."""

    row: Annotated[int, msgspec.Meta(ge=0, le=_HIGHEST)]
    custom_id: str | None = None
    key: str = ""
    error: dict[str, Any] | None = None


class _WrittenRow(msgspec.Struct, gc=False):
    row: int


class Journal:
    """A journal, open for more lines. No other process can open it meanwhile.

    Args:
        path: the file, which is made if it does not exist.

    Raises:
        ConfigError: another process has it open, it is no file, or the system has no file locks.
        OSError: it cannot be opened for writing.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(
            os.path.realpath(path)
        )  # `compact` puts another file in its place, not in that of a link to it
        self.done = Bitmap()
        """The rows that have a line."""
        self.failed = Bitmap()
        """The rows whose line has an error."""
        self.unaskable = Bitmap()
        """Those of them that could not be asked, such as rows that cannot be read."""
        self.replaced = 0
        """The lines of rows that have a later line."""
        self.end = 0
        """The bytes of all whole lines."""
        self.is_synced = True
        """Whether the disk has all that was written."""
        self._file = _open_locked(self.path)

    @property
    def answered(self) -> int:
        """The number of rows with an answer."""
        return len(self.done) - len(self.failed)

    def read(self, each: Callable[[Written, int], object] | None = None) -> None:
        """Note the rows that have a line. A last line without an end, which a killed process has left, is cut off.

        Args:
            each: gets what is read of each line, and the number of the byte at which the line begins.

        Raises:
            ConfigError: the file has something else than lines of a journal. It is left as it is.
        """
        done, add = self.done, self.done.add
        for lines, offset in self._blocks():
            decoded = self._decoded(lines, offset)
            for written in decoded:
                if written.error is None and written.row not in done:
                    add(written.row)
                else:
                    self._note(written.row, failed=written.error is not None, key=written.key)
            self.end = offset + len(lines)
            if each is not None:
                for line, written in zip(lines.splitlines(keepends=True), decoded, strict=True):
                    each(written, offset)
                    offset += len(line)  # noqa: PLW2901  # the place of the next line
        torn = os.pread(self._file, _BLOCK, self.end)
        # After a power cut, what was not written yet may be zeros.
        if torn.strip(b"\0") and not torn.startswith(_START[: len(torn)]):
            self._refuse(b"", self.end)
        os.ftruncate(self._file, self.end)

    def _blocks(self) -> Iterator[tuple[bytes, int]]:
        """Yield whole lines, many at a time, with the number of their first byte."""
        parts = list[bytes]()
        at = begin = 0
        while block := os.pread(self._file, _BLOCK, at):
            at += len(block)
            cut = block.rfind(b"\n") + 1
            if not cut:
                parts.append(block)
                continue
            lines = b"".join([*parts, block[:cut]])
            parts = [block[cut:]]
            yield lines, begin
            begin += len(lines)

    def _decoded(self, lines: bytes, offset: int) -> list[Written]:
        try:
            decoded = _decode_lines(lines)
        except msgspec.DecodeError:
            self._refuse(lines, offset)
        if len(decoded) != lines.count(b"\n"):
            self._refuse(lines, offset)
        return decoded

    def _refuse(self, lines: bytes, offset: int) -> NoReturn:
        """Say which line is none of a batch.

        Args:
            lines: those that have it among them; without any, it is the last, which has no end.
            offset: where they begin.
        """
        number = 1
        for place in range(0, offset, _BLOCK):
            number += os.pread(self._file, min(_BLOCK, offset - place), place).count(b"\n")
        for line in lines.splitlines(keepends=True):
            try:
                _decode(line)
            except msgspec.DecodeError:
                break
            number += 1
        raise ConfigError(
            f"{self.path}, line {number}: expected a line of a batch's output, got something else; nothing was written; "
            "give another output"
        )

    def _note(self, row: int, *, failed: bool, key: str) -> None:
        if row in self.done:
            self.replaced += 1
            self.failed.discard(row)
            self.unaskable.discard(row)
        else:
            self.done.add(row)
        if failed:
            self.failed.add(row)
            if not key:
                self.unaskable.add(row)

    def write(self, entries: deque[Entry], each: Callable[[Entry, int], object] | None = None) -> None:
        """Write whole lines, many at once, and take off `entries` what is written.

        Args:
            each: gets each entry that is written, and the number of the byte at which its line begins.

        Raises:
            OSError: there is no room for all. Those that are left are not in the file, also not in part.
        """
        while entries:
            several = len(entries) > 1
            data = b"".join([entry.line for entry in islice(entries, _MOST_AT_ONCE)]) if several else entries[0].line
            end = self.end + len(data)
            written = 0
            try:
                while written < len(data):
                    written += os.pwrite(self._file, data[written:] if written else data, self.end + written)
            finally:
                self.is_synced = False
                while entries and self.end < end and len(entries[0].line) <= written:
                    entry = entries.popleft()
                    self._note(entry.row, failed=entry.failed, key=entry.key)
                    if each is not None:
                        each(entry, self.end)
                    self.end += len(entry.line)
                    written -= len(entry.line)
                if self.end < end:
                    os.ftruncate(self._file, self.end)

    def line_at(self, offset: int) -> bytes:
        """Return the line that begins at a byte."""
        line = b""
        while not line.endswith(b"\n"):
            more = os.pread(self._file, 4096, offset + len(line))
            if not more:
                break
            line += more[: more.find(b"\n") + 1 or None]
        return line

    def sync(self) -> None:
        """Have the disk keep what is written. Until then a power cut may take it, but nothing else."""
        self.is_synced = True
        os.fsync(self._file)

    def compact(self, is_row: Callable[[int], bool] = lambda _: True) -> None:
        """Leave one line of each row: its last. Killed in the midst of it, the process leaves the file as it was.

        Memory: 4 bytes a row.

        Args:
            is_row: whether a row is to have a line at all.

        Raises:
            OSError: there is no room for another file of this size. The journal is as it was.
        """
        last = array("I")
        number = 0
        for lines, _ in self._blocks():
            for written in _decode_rows(lines):
                if written.row >= len(last):
                    last.extend([0] * max(written.row + 1 - len(last), len(last) // 8, 1024))
                number += 1
                last[written.row] = number
        aside = self.path.with_name(f".{self.path.name}.compact")
        new = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(new, stat.S_IMODE(os.fstat(self._file).st_mode))
            _lock(new, aside)  # before it has the name, so that no other process can open it
            number = end = 0
            for lines, _ in self._blocks():
                kept: list[bytes] = []
                for line, written in zip(lines.splitlines(keepends=True), _decode_rows(lines), strict=True):
                    number += 1
                    if last[written.row] == number and is_row(written.row):
                        kept.append(line)
                data = b"".join(kept)
                _write_all(new, data)
                end += len(data)
            os.fsync(new)
            aside.replace(self.path)
        except BaseException:
            os.close(new)
            with contextlib.suppress(OSError):
                aside.unlink()
            raise
        os.close(self._file)
        self._file, self.end, self.replaced = new, end, 0
        for row in [row for row in self.done if not is_row(row)]:
            self.done.discard(row)
            self.failed.discard(row)
            self.unaskable.discard(row)
        sync_folder(self.path)

    def close(self) -> None:
        """Have the disk keep what is written, and let other processes open the file."""
        try:
            if not self.is_synced:
                self.sync()
        finally:
            os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_decode = msgspec.json.Decoder(Written).decode
_decode_lines = msgspec.json.Decoder(Written).decode_lines
_decode_rows = msgspec.json.Decoder(_WrittenRow).decode_lines


def _open_locked(path: Path) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise ConfigError(
                    f"{path}: expected a file for the output, because it is read to go on; got something else"
                )
            _lock(file, path)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), path.stat()):
                    return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # another process has put a new file in its place just now


def _lock(file: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:
        raise ConfigError(
            "a batch needs the file locks of POSIX (Python's module fcntl), which this system has not; on Windows, run it in WSL"
        ) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"{path}: another process is at work on this batch; wait for it, or stop it") from None


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def sync_folder(path: Path) -> None:
    """Have the disk keep the name of a file."""
    with contextlib.suppress(OSError):  # some file systems cannot
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_whole(path: Path, data: bytes) -> None:
    """Put a file in the place of another, or make it, so that nobody ever sees a part of it.

    Raises:
        OSError: there is no room for it, or the folder cannot be written. The file is as it was.
    """
    aside = path.with_name(f".{path.name}.new")
    file = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        try:
            _write_all(file, data)
            os.fsync(file)
        finally:
            os.close(file)
        aside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    sync_folder(path)
