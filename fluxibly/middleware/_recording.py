"""Recordings: files of exchanges with a model, a line each, which `Record` writes and `Replay` reads.

A line is a JSON object: `version`, `key`, `request`, and what came: `chunks` with their times, or the whole `answer`, or an
`error`, which may follow chunks. `answer` stands beside `chunks` if a middleware has changed it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from threading import RLock
from typing import Any

from fluxibly._checks import is_list, is_mapping, is_number, is_path, is_whole, kind_of, problem
from fluxibly._logs import report_once
from fluxibly._threads import renew_lock_after_fork
from fluxibly.aggregate import Aggregator
from fluxibly.errors import ConfigError, NotRecorded
from fluxibly.middleware._exchange_fields import error_of
from fluxibly.types import Chunk, Response

VERSION = 1
"""The version of the format. Lines of a later version are refused."""
_TORN = 6
"""The characters at the end of a line that a cut within a word or an escape makes unreadable."""


# Files


def to_file(value: str | os.PathLike[str]) -> str:
    """Return a path as a str. It is a converter of attrs."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def check_file(name: str, value: object) -> str | None:
    """Check a path."""
    if isinstance(value, str) and value.strip() and is_path(value):
        return None
    return problem(name, "the path of a file (a str or a pathlib.Path)", value)


class RecordingFile:
    """A file to which exchanges are appended, by any number of threads and processes.

    Args:
        name: the path as the user gave it.
        middleware: the name of the class that writes, for messages.
    """

    def __init__(self, name: str, middleware: str) -> None:
        self.name = name
        self.path = os.path.abspath(os.path.expanduser(name))  # noqa: PTH100, PTH111  # a path of Path.resolve would not be the user's, who may use links
        self._middleware = middleware
        self._writing = False
        self.renew_lock()
        renew_lock_after_fork(self)

    def renew_lock(self) -> None:
        """Make a new lock."""
        self._lock = RLock()  # a signal handler may make a call within `append`
        self._writing = False

    def check_folder(self) -> None:
        """Check that the file's folder exists, and that the file is not itself a folder.

        Raises:
            ConfigError: it does not, or is.
        """
        if os.path.isdir(self.path):  # noqa: PTH112  # as above
            raise ConfigError(f"{self._middleware}: file: expected the path of a file, got the folder {self.name!r}")
        folder = os.path.dirname(self.path)  # noqa: PTH120  # as above
        if not os.path.isdir(folder):  # noqa: PTH112  # as above
            shown = os.path.dirname(self.name)  # noqa: PTH120  # as above
            raise ConfigError(
                f"{self._middleware}: file: expected a file in a folder that exists, got {self.name!r}; make the folder "
                f"{shown!r} first"
            )

    def append(self, line: bytes) -> None:
        """Append a line. A failure is reported once, and leaves no part of the line behind."""
        try:
            self._append(line)
        except OSError as error:
            report_once(
                f"recording {self.path}",
                f"{self._middleware} cannot write {self.name!r} ({error.strerror or type(error).__name__}); the calls go on, "
                "and are not recorded",
            )

    def _append(self, line: bytes) -> None:
        with self._lock:
            # Only the owner may read the file, because it has the prompts.
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
            descriptor = os.open(self.path, flags, 0o600)
            try:
                with self._locked(descriptor):
                    end = os.lseek(descriptor, 0, os.SEEK_END)
                    if end and not _ends_a_line(descriptor, end):
                        line = b"\n" + line
                    try:
                        _write(descriptor, line)
                    except OSError:
                        os.ftruncate(descriptor, end)
                        raise
            finally:
                os.close(descriptor)

    @contextmanager
    def _locked(self, descriptor: int) -> Generator[None]:
        """Keep other processes out, where the system can. Within itself, it would wait for ever."""
        fcntl: Any = None
        with suppress(ImportError):  # as on Windows
            fcntl = import_module("fcntl")
        if fcntl is None or self._writing:
            yield
            return
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        self._writing = True
        try:
            yield
        finally:
            self._writing = False
            with suppress(OSError):
                # By itself, because a process that was forked meanwhile keeps the descriptor open.
                fcntl.flock(descriptor, fcntl.LOCK_UN)


def _ends_a_line(descriptor: int, end: int) -> bool:
    """Whether a file ends with a line. A program that was killed may have left a part of one."""
    os.lseek(descriptor, end - 1, os.SEEK_SET)
    return os.read(descriptor, 1) == b"\n"


def _write(descriptor: int, line: bytes) -> None:
    while line:  # once, unless the disk is nearly full
        line = line[os.write(descriptor, line) :]


def encoded(exchange: Mapping[str, Any]) -> bytes:
    """Return an exchange as a line, in which other letters than ASCII's can be read."""
    try:
        return json.dumps(exchange, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(exchange).encode() + b"\n"


def read_lines(name: str, path: str) -> list[Exchange]:
    """Return the exchanges of a file. Lines that are cut off are left out, which is reported once.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
        ConfigError: a line is no exchange, or is written in a later version of the format. The error has its number.
    """
    found: list[Exchange] = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"line {number} of {name!r}"
        try:
            text = line.decode("utf-8-sig")
            value = json.loads(text)
        except UnicodeDecodeError as error:
            if error.end < len(line):
                raise ConfigError(f"{where}: expected UTF-8, got other bytes at {error.start}") from None
        except json.JSONDecodeError as error:
            if not error.msg.startswith("Unterminated string") and error.pos < len(error.doc.rstrip()) - _TORN:
                raise ConfigError(f"{where}: expected JSON: {error.msg} at character {error.pos + 1}") from None
        except ValueError:
            raise ConfigError(f"{where}: expected JSON, got a number with too many digits") from None
        except RecursionError:
            raise ConfigError(f"{where}: expected an exchange, got tables that are nested too deeply") from None
        else:
            found.append(Exchange(f"line {number}", name, value))
            continue
        report_once(
            f"cut recording {path}",
            f"{where} is cut off, as if a program had been killed while it wrote the line; Replay leaves such lines out",
        )
    return found


# Exchanges


class Exchange:
    """An exchange that was recorded.

    Args:
        place: where it stands in its file, such as "line 3".
        name: the file, as the user gave it.
        fields: what stands there.

    Raises:
        ConfigError: that is no exchange.
    """

    def __init__(self, place: str, name: str, fields: object) -> None:
        self.place = place
        self.where = f"{place} of {name!r}"
        if not is_mapping(fields):
            raise self._wrong(f"expected a table, got {kind_of(fields)}")
        version = fields.get("version")
        if not is_whole(version) or version < 1:
            raise self._wrong("version: expected a whole number from 1 up")
        if version > VERSION:
            raise self._wrong(
                f"version: expected at most {VERSION}, got {version}, which a newer fluxibly writes; update fluxibly, or "
                "record again"
            )
        key, request = fields.get("key"), fields.get("request")
        if not isinstance(key, str) or not is_mapping(request):
            raise self._wrong("expected a str as key, and a table as request")
        self.key = key
        self.request: Mapping[str, Any] = request
        chunks, self._answer, self._error, self.ended = (
            fields.get(name) for name in ("chunks", "answer", "error", "ended")
        )
        if chunks is None and self._answer is None and self._error is None:
            raise self._wrong("expected chunks, an answer or an error, got none of them")
        if not (chunks is None or is_list(chunks)) or not all(
            found is None or is_mapping(found) for found in (self._answer, self._error)
        ):
            raise self._wrong("expected a list as chunks, and tables as answer and error")
        self._items: list[Any] | None = chunks
        self._made: tuple[Sequence[Chunk] | None, Response] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the answer is whole, or has failed: nobody has stopped it."""
        return self.ended is None

    @property
    def failed(self) -> bool:
        """Whether the exchange ended with an error."""
        return self._error is not None

    @property
    def chunks(self) -> Sequence[Chunk] | None:
        """The chunks that came, for one caller; None if the answer came whole, or nothing before an error."""
        chunks = self._parts()[0]
        return None if chunks is None else [chunk if chunk.text_only else deepcopy(chunk) for chunk in chunks]

    def response(self) -> Response:
        """Return the answer, or what had come of it, as a response that nobody else has."""
        return deepcopy(self._parts()[1])

    def _parts(self) -> tuple[Sequence[Chunk] | None, Response]:
        if self._made is None:  # two threads may both make them, to the same effect
            try:
                chunks = [_chunk(item, number) for number, item in enumerate(self._items or ())]
                response = joined(chunks) if self._answer is None else Response.from_dict(self._answer)
            except (TypeError, ValueError) as error:
                raise self._wrong(str(error)) from None
            self._made = None if self._items is None else chunks, response
        return self._made

    def error(self) -> tuple[Exception, bool]:
        """Return the error, made anew, and whether it interrupted a stream."""
        try:
            return error_of(self._error or {}, self.response())
        except (TypeError, ValueError) as error:
            raise self._wrong(str(error)) from None

    def _wrong(self, problem: str) -> ConfigError:
        return ConfigError(f"{self.where}: {problem}")


def _chunk(item: Any, number: int) -> Chunk:
    """Return the chunk of a pair of a time and a text, or a table."""
    if not is_list(item) or len(item) != 2 or not is_number(item[0]):
        raise ValueError(f"chunks[{number}]: expected a list of a time and a chunk, got {kind_of(item)}")
    return Chunk(item[1]) if isinstance(item[1], str) else Chunk.from_dict(item[1])


def joined(chunks: Iterable[Chunk]) -> Response:
    """Return the response that chunks add up to."""
    answer = Aggregator()
    for chunk in chunks:
        if chunk.text_only:
            answer.texts.append(chunk.text)
        else:
            answer.add(chunk)
    return answer.response()


class Exchanges:
    """The exchanges that `Replay` has, and which of them is next for each key."""

    def __init__(self) -> None:
        self.loaded = False
        self._of: dict[str, list[Exchange]] = {}
        self._next: dict[str, int] = {}
        self._begun: set[str] = set()
        """The keys of what was left out, because nobody has read it to its end."""
        self.renew_lock()
        renew_lock_after_fork(self)

    def renew_lock(self) -> None:
        """Make a new lock."""
        self._lock = RLock()

    def load(self, file: RecordingFile, *, advice: str, whole: bool) -> None:
        """Read a file, unless that is done.

        Args:
            advice: how to make the file, for messages.
            whole: whether to leave out what nobody has read to its end, and to do without a file.

        Raises:
            NotRecorded: the file does not exist, or cannot be read.
            ConfigError: a line of it is no exchange.
        """
        with self._lock:
            if self.loaded:
                return
            try:
                found = read_lines(file.name, file.path)
            except OSError as error:
                if not isinstance(error, FileNotFoundError):
                    raise NotRecorded(f"Replay: cannot read {file.name!r}: {error.strerror}") from error
                if not whole:
                    raise NotRecorded(f"Replay: there is no file {file.name!r}; {advice}") from None
                found = []
            for exchange in found:
                if exchange.is_whole or not whole:
                    self._of.setdefault(exchange.key, []).append(exchange)
                else:
                    self._begun.add(exchange.key)
            self.loaded = True

    def begin(self, key: str) -> bool:
        """Return whether a recording that is not whole is the first of its key that is left out."""
        with self._lock:
            is_first = key not in self._begun
            self._begun.add(key)
            return is_first

    def add(self, exchange: Exchange) -> None:
        """Add an exchange, which is the last of its key."""
        with self._lock:
            self._of.setdefault(exchange.key, []).append(exchange)

    def take(self, key: str) -> Exchange | None:
        """Return the next exchange of a key: in recorded order, and the last again and again. None: there is none."""
        with self._lock:
            found = self._of.get(key)
            if found is None:
                return None
            number = self._next.get(key, 0)
            self._next[key] = min(number + 1, len(found) - 1)
            return found[number]

    def nearest(self, request: Mapping[str, Any]) -> tuple[Exchange, list[str]] | None:
        """Return the exchange whose request is most like one, with the names of what differs. None: there is none."""
        with self._lock:
            found = [exchange for of_key in self._of.values() for exchange in of_key]
        compared = [(exchange, differences(request, exchange.request)) for exchange in found]
        # Requests to another model are likely to be meant for something else.
        return min(compared, key=lambda pair: ("model" in pair[1], "provider" in pair[1], len(pair[1])), default=None)


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Name the fields in which two requests differ, such as "messages[1]". Nothing of their contents is quoted."""
    found: list[str] = []
    for name in {**one, **other}:
        mine, others = one.get(name), other.get(name)
        if mine == others:
            continue
        if is_list(mine) and is_list(others) and name == "messages":
            pairs = zip(mine, others, strict=False)
            found += [f"messages[{number}]" for number, (each, its) in enumerate(pairs) if each != its]
            if len(mine) != len(others):
                found.append(f"the number of messages ({len(mine)}, recorded {len(others)})")
        elif is_mapping(mine) and is_mapping(others) and name in ("extra", "headers"):
            found += [f"{name}.{key}" for key in {**mine, **others} if mine.get(key) != others.get(key)]
        else:
            found.append(name)
    return found
