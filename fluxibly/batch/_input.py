"""Inputs of batches: files and streams of rows, read in one pass."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, Literal, Protocol, TypeAlias, get_args

from fluxibly._checks import did_you_mean
from fluxibly.batch._csv import Delimited
from fluxibly.batch._jsonl import JSONLines
from fluxibly.batch._rows import InFile, Row as Row, Source as Source
from fluxibly.batch._template import Prompts, prompts_of
from fluxibly.batch._text_lines import FileLines, StreamLines
from fluxibly.errors import ConfigError

InputFormat: TypeAlias = Literal["jsonl", "csv", "tsv", "parquet"]
_SUFFIXES: Final[Mapping[str, InputFormat]] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
STANDARD_INPUT: Final = "-"


class RowReader(Protocol):
    """Makes rows of lines, which it is given one by one."""

    def add(self, line: bytes, /) -> bool: ...
    def end(self) -> bool: ...
    def row(self, number: int, /) -> Row: ...


class LinesFile(InFile):
    """The rows of a file of lines."""

    def __init__(self, path: Path, reader: Callable[[], RowReader]) -> None:
        super().__init__(path)
        self._reader = reader
        self._lines: FileLines | None = None

    @property
    def position(self) -> int:
        return 0 if self._lines is None else self._lines.position

    def rows(self, skip: Callable[[int], bool], known: Mapping[str, int] | None = None) -> Iterator[Row]:
        """Do as `Source.rows`."""
        reader = self._reader()
        number = 0
        with self.path.open("rb", buffering=1 << 18) as file:
            self._lines = FileLines(file, str(self.path))
            add = reader.add
            for line in self._lines:
                if add(line):
                    if not skip(number):
                        yield reader.row(number)
                    number += 1
            if reader.end() and not skip(number):
                yield reader.row(number)

    def check(self) -> None:
        """Read the first row, so that what is wrong with all rows is known before anything is sent.

        Raises:
            ConfigError: the file as a whole cannot be read.
            OSError: it cannot be read.
        """
        reader = self._reader()
        with self.path.open("rb") as file:
            has_row = any(map(reader.add, FileLines(file, str(self.path)))) or reader.end()
        if has_row and isinstance(reader, JSONLines):
            reader.check(str(self.path))


class Stream:
    """The rows of something that can be read only once, such as standard input."""

    is_stream = True
    size = None
    fingerprint = None

    def __init__(self, path: Path | None, reader: Callable[[], RowReader]) -> None:
        self.path = path
        self._name = "standard input" if path is None else str(path)
        self._reader = reader
        self._lines: StreamLines | None = None

    @property
    def position(self) -> int:
        return 0 if self._lines is None else self._lines.position

    async def rows(self, skip: Callable[[int], bool], known: Mapping[str, int] | None = None) -> AsyncIterator[Row]:
        """Do as `Source.rows`."""
        reader = self._reader()
        numbers = None if known is None else _Numbers(known, self._name)
        place = 0
        descriptor = 0 if self.path is None else await _opened(self.path)
        try:
            self._lines = StreamLines(descriptor, self._name)
            is_over = False
            while not is_over:
                lines = await self._lines.read()
                is_over = lines is None
                for ends in map(reader.add, lines) if lines is not None else (reader.end(),):
                    if ends:
                        row = reader.row(place)
                        place += 1
                        if numbers is not None:
                            row = numbers.numbered(row)
                        if not skip(row.number):
                            yield row
        finally:
            if self.path is not None:
                os.close(descriptor)


async def _opened(path: Path) -> int:
    """Open a file to read it. A named pipe is opened only when something writes into it, so a thread waits for that."""
    from anyio import to_thread  # late, to keep `import fluxibly` fast

    return await to_thread.run_sync(os.open, path, os.O_RDONLY | os.O_CLOEXEC, abandon_on_cancel=True)


class _Numbers:
    """Gives the rows of a stream that is gone on with their numbers of earlier runs.

    The number of a row that has none is its place, unless another row has this number.
    """

    def __init__(self, known: Mapping[str, int], name: str) -> None:
        self._known = known
        self._name = name
        self._taken = {*known.values()}
        self._next = max(self._taken, default=-1) + 1
        self._seen: set[str] = set()

    def numbered(self, row: Row) -> Row:
        """Return a row with its number.

        Raises:
            ConfigError: it has no name, or that of an earlier row, so that nobody knows which of them is done.
        """
        if row.custom_id is None:
            raise ConfigError(
                f"{self._name}, {row.where}: expected a custom_id, since the output has lines already, and in a stream rows are "
                "found by it alone; got none"
            )
        if row.custom_id in self._seen:
            raise ConfigError(
                f"{self._name}, {row.where}: expected a custom_id that no earlier row has, since the output has lines already, and in a "
                "stream rows are found by it alone; write the stream to a file, and give that"
            )
        self._seen.add(row.custom_id)
        number = self._known.get(row.custom_id)
        return row._replace(number=self._free(row.number) if number is None else number)

    def _free(self, place: int) -> int:
        if place not in self._taken:
            return place
        number, self._next = self._next, self._next + 1
        self._taken.add(number)
        return number


def open_input(
    path: str | os.PathLike[str],
    *,
    column: str | None = None,
    template: str | None = None,
    format: InputFormat | None = None,  # noqa: A002  # the name of the option
) -> Source:
    """Return the rows of an input.

    JSON lines are those of OpenAI's batch API (`custom_id`, `body`), or have a `prompt` or `messages` and beside it what
    `LLM.complete` takes (except `headers`). CSV needs a header. `custom_id`, or else `id`, names a row if it is there.

    Args:
        path: a file, or "-" for standard input.
        column: the column (in JSON lines, the field) with the prompts. By default `prompt`, or the only column beside the names.
        template: a text that makes prompts of columns, such as "Summarise: {title}".
        format: "jsonl", "csv", "tsv" or "parquet". None: what the suffix says; JSON lines if it says nothing.

    Raises:
        ConfigError: the input as a whole cannot be read: a column is missing, there is no header, it is no UTF-8, or pyarrow is
            missing. Of a stream, this may be found only once its rows are read.
        OSError: it cannot be read.
    """
    if format is not None and format not in get_args(InputFormat):
        raise ConfigError(
            f"format: expected one of {', '.join(get_args(InputFormat))}, got {format!r}"
            f"{did_you_mean(format, get_args(InputFormat))}"
        )
    prompts = prompts_of(column, template)
    place = None if os.fspath(path) == STANDARD_INPUT else Path(path)
    kind = format or (None if place is None else _SUFFIXES.get(place.suffix.lower())) or "jsonl"
    is_stream = place is None or not stat.S_ISREG(place.stat().st_mode)
    if place is not None and place.is_dir():
        raise ConfigError(f"{place}: expected a file, got a folder")
    if kind == "parquet":
        if place is None or is_stream:
            raise ConfigError("Parquet: expected a file, got a stream, in which nothing can be found again")
        from fluxibly.batch._parquet import ParquetFile  # late: pyarrow

        return ParquetFile(place, prompts)
    name = "standard input" if place is None else str(place)

    def reader() -> RowReader:
        return _reader_of(kind, prompts, name)

    if place is None or is_stream:
        return Stream(place, reader)
    file = LinesFile(place, reader)
    file.check()
    return file


def _reader_of(kind: InputFormat, prompts: Prompts | None, name: str) -> RowReader:
    if kind == "jsonl":
        return JSONLines(prompts)
    return Delimited(prompts, "\t" if kind == "tsv" else ",", name)
