"""Files of answers in each format, which take the lines of a journal one by one and appear whole."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Literal, TypeAlias

import msgspec

from fluxibly._extras import pip_install
from fluxibly.batch._lines import Line, encoded
from fluxibly.errors import ConfigError
from fluxibly.providers.dialects.openai_answers import completion, error_body
from fluxibly.types import Response, ToolCall, Usage

if TYPE_CHECKING:
    from typing import Self

Format: TypeAlias = Literal["lines", "openai", "csv", "tsv", "parquet"]
"""The formats of outputs. "lines" is fluxibly's own, as JSON lines."""


class Sink:
    """A file that takes lines, and appears under its name when it is whole. It is a context, at whose end it is closed.

    Args:
        path: the name. If it is a link, the file that it leads to is replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Self:
        self._target = Path(os.path.realpath(self.path))
        # Its name is always the same, so what a killed process has left is written over. The journal's lock keeps others out.
        self._temporary = self._target.with_name(f".{self._target.name}.partial")
        self._file: IO[bytes] = self._temporary.open("wb", buffering=1 << 20)
        try:
            self._begin(self._file)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()
        finally:
            self._temporary.unlink(missing_ok=True)

    def write(self, line: bytes) -> None:
        """Take a line of the journal."""
        raise NotImplementedError

    def commit(self) -> None:
        """Put the file in its place.

        Raises:
            OSError: the disk does not keep it.
        """
        self._end()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._temporary.replace(self._target)
        folder = os.open(self._target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _begin(self, file: IO[bytes]) -> None:
        """Write what stands before all lines."""

    def _end(self) -> None:
        """Write what is left."""


class _Lines(Sink):
    """fluxibly's own lines."""

    def __enter__(self) -> Self:
        self._read = msgspec.json.Decoder(Line).decode
        return super().__enter__()

    def write(self, line: bytes) -> None:
        """Do as `Sink.write`."""
        # A journal that was begun for another format has more than a line shows.
        self._file.write(encoded(self._read(line)) if b'"body":' in line else line)


# OpenAI's format


class _Answered(msgspec.Struct):
    """A line as the journal has it. The body is not looked into."""

    row: int
    custom_id: str | None = None
    text: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    finish_reason: str | None = None
    usage: dict[str, int] | None = None
    model: str | None = None
    error: dict[str, Any] | None = None
    body: msgspec.Raw = msgspec.Raw(b"null")
    request_id: str | None = None


class _Result(msgspec.Struct):
    """A line of the output of OpenAI's batch API."""

    id: str
    custom_id: str
    response: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


class _OpenAI(Sink):
    """The lines that a batch of OpenAI's returns."""

    def __enter__(self) -> Self:
        self._read = msgspec.json.Decoder(_Answered).decode
        return super().__enter__()

    def write(self, line: bytes) -> None:
        """Do as `Sink.write`."""
        self._file.write(encoded(_result(self._read(line))))


def _result(line: _Answered) -> _Result:
    # Programs look rows up by `custom_id`, which OpenAI's API demands; a row without one is known by its number.
    result = _Result(f"batch_req_{line.row}", f"row-{line.row}" if line.custom_id is None else line.custom_id)
    failure = line.error
    if failure is None:
        body = _body(line) if bytes(line.body) == b"null" else line.body
        result.response = {"status_code": 200, "request_id": line.request_id, "body": body}
    elif failure.get("status") is None:  # there was no response
        result.error = {"code": failure.get("code") or failure["type"], "message": failure["message"]}
    else:
        status = failure["status"]
        body = error_body(failure["message"], _kind(status), failure.get("code"))
        result.response = {"status_code": status, "request_id": failure.get("request_id"), "body": body}
    return result


def _body(line: _Answered) -> dict[str, Any]:
    """Return the answer of a line that has only the fields of `Line`."""
    calls = [
        ToolCall(call["id"], call["name"], raw_arguments=call.get("arguments", ""), raw=call.get("raw"))
        for call in line.tool_calls or ()
    ]
    usage = None if line.usage is None else Usage(**line.usage)
    response = Response(
        line.text or "", tool_calls=calls, finish_reason=line.finish_reason, usage=usage, model=line.model
    )
    return completion(response, "")


def _kind(status: int) -> str:
    """Return the type that OpenAI's API gives to errors with a status."""
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


# Tables

_COLUMNS: Final[dict[str, Callable[[Line], object]]] = {
    "row": lambda line: line.row,
    "custom_id": lambda line: line.custom_id,
    "key": lambda line: line.key,
    "text": lambda line: line.text,
    "tool_calls": lambda line: None if line.tool_calls is None else msgspec.json.encode(line.tool_calls).decode(),
    "finish_reason": lambda line: line.finish_reason,
    "input_tokens": lambda line: _count(line, "input_tokens"),
    "output_tokens": lambda line: _count(line, "output_tokens"),
    "cached_tokens": lambda line: _count(line, "cached_tokens"),
    "cache_write_tokens": lambda line: _count(line, "cache_write_tokens"),
    "reasoning_tokens": lambda line: _count(line, "reasoning_tokens"),
    "cost": lambda line: line.cost,
    "model": lambda line: line.model,
    "attempts": lambda line: line.attempts,
    "elapsed": lambda line: line.elapsed,
    "error": lambda line: _of_error(line, "type"),
    "error_message": lambda line: _of_error(line, "message"),
    "error_status": lambda line: _of_error(line, "status"),
}
"""The columns of a table of answers: those of `Line`, with `usage` and `error` in columns of their own."""
_WHOLE: Final = frozenset({"row", "attempts", "error_status", *(name for name in _COLUMNS if name.endswith("_tokens"))})
_FRACTIONS: Final = frozenset({"cost", "elapsed"})


def _count(line: Line, name: str) -> int | None:
    return None if line.usage is None else line.usage.get(name)


def _of_error(line: Line, name: str) -> Any:
    return None if line.error is None else line.error.get(name)


class _Delimited(Sink):
    """CSV as in RFC 4180, in UTF-8, with a header."""

    delimiter = ","

    def _begin(self, file: IO[bytes]) -> None:
        self._read = msgspec.json.Decoder(Line).decode
        self._text = io.TextIOWrapper(file, "utf-8", newline="", write_through=True)
        self._cells = tuple(_COLUMNS.values())
        self._writer = csv.writer(self._text, delimiter=self.delimiter)
        self._writer.writerow(_COLUMNS)

    def write(self, line: bytes) -> None:
        """Do as `Sink.write`."""
        read = self._read(line)
        self._writer.writerow([cell(read) for cell in self._cells])

    def _end(self) -> None:
        self._text.flush()


class _Tabbed(_Delimited):
    """The same with tabs."""

    delimiter = "\t"


class _Parquet(Sink):
    """Parquet, of which a group of rows is in memory at once."""

    MOST_ROWS = 10_000
    MOST_BYTES = 16 * 1024 * 1024

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._arrow, self._parquet = pyarrow_for(path)
        self._schema = self._arrow.schema([(name, self._type_of(name)) for name in _COLUMNS])

    def _type_of(self, name: str) -> Any:
        if name in _WHOLE:
            return self._arrow.int64()
        return self._arrow.float64() if name in _FRACTIONS else self._arrow.string()

    def _begin(self, file: IO[bytes]) -> None:
        self._read = msgspec.json.Decoder(Line).decode
        self._rows: list[Line] = []
        self._bytes = 0
        self._writer = self._parquet.ParquetWriter(file, self._schema, compression="zstd")

    def write(self, line: bytes) -> None:
        """Do as `Sink.write`."""
        self._rows.append(self._read(line))
        self._bytes += len(line)
        if len(self._rows) >= self.MOST_ROWS or self._bytes >= self.MOST_BYTES:
            self._write_group()

    def _write_group(self) -> None:
        rows, self._rows, self._bytes = self._rows, [], 0
        columns = {name: [cell(row) for row in rows] for name, cell in _COLUMNS.items()}
        self._writer.write_table(self._arrow.table(columns, schema=self._schema))

    def _end(self) -> None:
        if self._rows:
            self._write_group()
        self._writer.close()


def pyarrow_for(path: Path) -> tuple[Any, Any]:
    """Return the modules `pyarrow` and `pyarrow.parquet`.

    Raises:
        ConfigError: they are not installed.
    """
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")  # they have no types
    except ImportError:
        raise ConfigError(f"{path}: Parquet needs pyarrow, which is not installed: {pip_install('tables')}") from None


_SINKS: Final[dict[Format, type[Sink]]] = {
    "lines": _Lines,
    "openai": _OpenAI,
    "csv": _Delimited,
    "tsv": _Tabbed,
    "parquet": _Parquet,
}


def sink_of(path: Path, format: Format) -> Sink:  # noqa: A002  # as in `Output`
    """Return a file of a format, which is not opened yet.

    Raises:
        ConfigError: pyarrow is missing.
    """
    return _SINKS[format](path)
