"""The batches that were submitted to a provider: a file beside the output, with a line before and after each step.

Whatever stops the program, the lines say what may exist at the service. A batch that may exist is looked for, and not submitted
again; only one that surely does not exist gives its rows back.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from time import time
from typing import Any, Literal, Self, TypeAlias

import attrs
import msgspec

from fluxibly.batch._journal import Bitmap, sync_folder
from fluxibly.errors import ConfigError
from fluxibly.providers.dialects.batches import Lost

Step: TypeAlias = Literal["packed", "uploaded", "submitting", "submitted", "ended", "dropped"]
"""A step of a batch that was done, or is about to be: only "submitting" leaves open whether it exists at the service."""


class _Line(msgspec.Struct, omit_defaults=True):
    batch: str
    step: Step
    time: float
    service: str = ""
    rows: list[tuple[int, int]] = []
    model: str = ""
    named: bool = False
    tokens: float = 0.0
    state: str = ""
    digest: str = ""
    file: str | None = None
    since: float | None = None
    newest: str | None = None
    id: str | None = None
    tried: bool = False
    why: str | None = None


@attrs.define(eq=False)
class Submission:
    """A batch of rows, as far as it is known."""

    label: str
    """Our own name for it, with which all of its `custom_id`s begin."""
    rows: list[tuple[int, int]]
    """Its rows in their order: the first and the last of each run of neighbours."""
    model: str
    """The model that all of its rows ask for."""
    named: bool = False
    """Whether rows of it have a `custom_id` of their own in the input."""
    tokens: float = 0.0
    """Its tokens of input, estimated."""
    service: str = ""
    """The provider and its server."""
    state: str = ""
    """The state of the input and the configuration when it was packed."""
    digest: str = ""
    """A hash of its rows and their keys, in their order."""
    step: Step = "packed"
    file: str | None = None
    since: float | None = None
    newest: str | None = None
    id: str | None = None
    """The service's id."""
    at: float = 0.0
    """When it was submitted, in seconds since the epoch."""
    tried: bool = False
    """Whether those of its rows that have no answer count as asked."""
    is_outdated: bool = False
    """Whether rows of it would be asked otherwise now, and are to be. The file does not have this."""
    processed: int = 0
    """The rows that the service says it has done."""
    status: str = ""
    """The state in the service's words."""

    @property
    def count(self) -> int:
        """The number of its rows."""
        return sum(last - first + 1 for first, last in self.rows)

    @property
    def lost(self) -> Lost:
        """The facts by which it is found if its submission was not answered."""
        return Lost(self.label, self.count, self.file, self.since, self.newest)

    def numbers(self) -> Iterator[int]:
        """Yield its rows in their order."""
        for first, last in self.rows:
            yield from range(first, last + 1)

    def members(self) -> Bitmap:
        """Return the set of its rows."""
        found = Bitmap()
        for number in self.numbers():
            found.add(number)
        return found

    def row_at(self, place: int) -> int | None:
        """Return the row at a place in the upload, from 0; None if there are not so many."""
        for first, last in self.rows:
            if place <= last - first:
                return first + place
            place -= last - first + 1
        return None


def add_row(rows: list[tuple[int, int]], row: int) -> None:
    """Add a row to runs of neighbours."""
    if rows and rows[-1][1] == row - 1:
        rows[-1] = (rows[-1][0], row)
    else:
        rows.append((row, row))


class Submissions:
    """The file of submissions. Each line is on the disk before what it announces is done.

    Args:
        path: the file, which is made with the first line. A last line without an end is cut off.

    Raises:
        ConfigError: it is the file of something else.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None
        self._all: dict[str, Submission] = {}
        if path.exists():
            self._all, end = _read(path)
            os.ftruncate(self._open(), end)

    @property
    def open(self) -> list[Submission]:
        """The batches that may exist at the service, and whose results are not all written."""
        return _open_of(self._all)

    @property
    def all(self) -> Iterable[Submission]:
        """All batches, the first first."""
        return list(self._all.values())

    def begin(self, submission: Submission) -> None:
        """Note a batch that was packed, before anything of it is sent."""
        self._all[submission.label] = submission
        self._write(
            submission,
            service=submission.service,
            rows=submission.rows,
            model=submission.model,
            named=submission.named,
            tokens=round(submission.tokens),
            state=submission.state,
            digest=submission.digest,
        )

    def note(self, submission: Submission, step: Step, **facts: Any) -> None:
        """Note a step of a batch, with what is new about it: attributes of `Submission`, and `why`.

        Raises:
            OSError: it cannot be written. Nothing may be done then that it announces.
        """
        submission.step = step
        for name, value in facts.items():
            if name != "why":
                setattr(submission, name, value)
        if step == "submitting":
            submission.at = time()
        self._write(submission, **facts)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> int:
        if self._file is None:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            sync_folder(self.path)
        return self._file

    def _write(self, submission: Submission, **facts: Any) -> None:
        line = _encode(_Line(submission.label, submission.step, round(time(), 3), **facts)) + b"\n"
        file = self._open()
        end = os.lseek(file, 0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):
                written += os.write(file, line[written:])
            os.fsync(file)
        except BaseException:
            os.ftruncate(file, end)
            raise


def read_open(path: Path) -> list[Submission]:
    """Return the batches that may exist at the service, and whose results are not all written. The file stays as it is.

    Raises:
        ConfigError: it is the file of something else.
        OSError: it cannot be read.
    """
    return _open_of(_read(path)[0]) if path.exists() else []


def _open_of(submissions: dict[str, Submission]) -> list[Submission]:
    return [each for each in submissions.values() if each.step in ("submitting", "submitted")]


def _read(path: Path) -> tuple[dict[str, Submission], int]:
    """Return the batches in a file, and where its last whole line ends."""
    found = dict[str, Submission]()
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                _take(_decode(line), found)
            except (msgspec.DecodeError, KeyError):
                raise ConfigError(
                    f"{path}, line {number}: expected a line about a provider's batch, got something else"
                ) from None
            end += len(line)
    return found, end


def _take(line: _Line, found: dict[str, Submission]) -> None:
    """Add what a line says."""
    if line.step == "packed":
        found[line.batch] = Submission(
            line.batch, line.rows, line.model, line.named, line.tokens, line.service, line.state, line.digest
        )
        return
    submission = found[line.batch]
    submission.step = line.step
    submission.tried = line.tried
    submission.file = line.file or submission.file
    submission.since = submission.since if line.since is None else line.since
    submission.newest = line.newest or submission.newest
    submission.id = line.id or submission.id
    if line.step == "submitting":
        submission.at = line.time


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_Line).decode
