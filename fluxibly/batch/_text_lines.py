"""Lines of files and of streams, as bytes, however long they are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import BinaryIO, Final

from fluxibly.errors import ConfigError

LONGEST: Final = 64 * 1024 * 1024
"""The most bytes of a row. Of a longer line, the first `LONGEST + 1` bytes are kept."""
_BLOCK: Final = 1 << 16
_STARTS: Final = {
    b"\xff\xfe": "UTF-16; convert it, like `iconv -f utf-16 -t utf-8`",
    b"\xfe\xff": "UTF-16; convert it, like `iconv -f utf-16 -t utf-8`",
    b"\x1f\x8b": "a file that gzip has compressed; write `zcat FILE | fluxibly batch -`",
    b"PAR1": "a Parquet file; give it the suffix .parquet",
}
"""The first bytes of what is no UTF-8, and what it is."""
_BOM: Final = b"\xef\xbb\xbf"


class FileLines:
    """The lines of a file, with their ends. A byte-order mark is left out."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.position = 0
        """The bytes read so far."""
        self._file = file
        self._name = name

    def __iter__(self) -> Iterator[bytes]:
        read = partial(self._file.readline, LONGEST + 1)
        line = read()
        self.position += len(line)
        line = begun(line, self._name)
        while line:
            if len(line) > LONGEST:
                self._leave_rest()
            yield line
            line = read()
            self.position += len(line)

    def _leave_rest(self) -> None:
        while piece := self._file.readline(_BLOCK):
            self.position += len(piece)
            if piece.endswith(b"\n"):
                break


class StreamLines:
    """The lines of a descriptor such as that of standard input, as they come. The event loop is never blocked."""

    def __init__(self, descriptor: int, name: str) -> None:
        self.position = 0
        """The bytes read so far."""
        self._descriptor = descriptor
        self._name = name
        self._splitter = Splitter()
        self._has_begun = self._is_over = False

    async def read(self) -> list[bytes] | None:
        """Return the next lines, with their ends; none if only a part of a line has come. None: that was all."""
        data = await self._read()
        if not data and self._is_over:
            return None
        self._is_over = not data
        self.position += len(data)
        lines = list(self._splitter.feed(data) if data else self._splitter.end())
        if lines and not self._has_begun:
            self._has_begun = True
            lines[0] = begun(lines[0], self._name)
        return lines

    async def _read(self) -> bytes:
        import anyio  # late, to keep `import fluxibly` fast

        while True:
            try:
                await anyio.wait_readable(self._descriptor)
            except PermissionError:  # a file, which nobody has to wait for
                await anyio.lowlevel.checkpoint()
            try:
                return os.read(self._descriptor, _BLOCK)
            except BlockingIOError:
                continue


class Splitter:
    """Makes lines of blocks of bytes."""

    def __init__(self) -> None:
        self._held: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the lines that are complete."""
        *ends, rest = data.split(b"\n")
        for end in ends:
            self._hold(end + b"\n")
            yield from self.end()
        if rest:
            self._hold(rest)

    def _hold(self, piece: bytes) -> None:
        room = LONGEST + 1 - self._size
        if room > 0:
            self._held.append(piece[:room])
            self._size += min(len(piece), room)

    def end(self) -> Iterator[bytes]:
        """Yield what is left of a line, if anything is."""
        held, self._held, self._size = self._held, [], 0
        if held:
            yield held[0] if len(held) == 1 else b"".join(held)


def begun(line: bytes, name: str) -> bytes:
    """Return the first line of an input without a byte-order mark.

    Raises:
        ConfigError: the input is no UTF-8 at all.
    """
    for start, what in _STARTS.items():
        if line.startswith(start):
            raise ConfigError(f"{name}: expected UTF-8, got {what}")
    return line.removeprefix(_BOM)
