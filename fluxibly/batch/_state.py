"""The input and the configuration that the answers of a batch belong to, kept beside the output to notice changes."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import cast

import msgspec

from fluxibly.batch._input import Row, Source
from fluxibly.batch._journal import Bitmap, Journal, Written, write_whole


class State(msgspec.Struct, omit_defaults=False):
    """The input and the configuration that the rows which are done belong to."""

    input: tuple[int, int] | None = None
    """The size of the input in bytes, and when it was last changed, in nanoseconds. None: it is no file."""
    settings: str = ""
    """The hash of what is sent beside the rows. Empty: not all rows belong to one."""

    def __str__(self) -> str:
        return f"{self.input}{self.settings}"

    @classmethod
    def of_text(cls, text: str) -> State:
        """Return the state of a file that was written as a text; one without an input if it is no such text."""
        found = _TEXT.fullmatch(text)
        return cls(None, text) if found is None else cls((int(found[1]), int(found[2])), found[3])


_TEXT = re.compile(r"\((\d+), (-?\d+)\)(\w*)")
WHAT_TO_DO = (
    "write changed='keep' (--changed keep) to keep their answers, or changed='ask' (--changed ask) to ask them again"
)


def what_changed(then: State | None, now: State) -> str:
    """Return what has changed between two states that differ, as the reason in a message."""
    if then is None or then == State():
        return "the input or the configuration has changed (the file that would say which is missing)"
    # Where not all rows belong to one configuration, an earlier change was not finished.
    found = [
        "the input" if then.input != now.input else "",
        "the configuration (the model, its parameters or the system prompt)" if then.settings != now.settings else "",
    ]
    changed = [*filter(None, found)]
    return f"{' and '.join(changed)} {'have' if len(changed) > 1 else 'has'} changed"


def path_of(journal: Path) -> Path:
    """Return the file that has the state of a journal."""
    return journal.with_name(f"{journal.name}.batch")


def read_state(journal: Path) -> State | None:
    """Return what was kept beside a journal; None if there is nothing that can be read."""
    try:
        return msgspec.json.decode(path_of(journal).read_bytes(), type=State)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


def write_state(journal: Path, state: State) -> None:
    """Keep the state beside a journal."""
    write_whole(path_of(journal), msgspec.json.encode(state) + b"\n")


class Keys:
    """The first 4 bytes of the key of each row."""

    def __init__(self) -> None:
        self._found = array("I")

    def read(self, written: Written, _: int) -> None:
        """Note what stands in the journal. Of several lines of a row, the last counts."""
        found = self._found
        if written.row >= len(found):
            found.extend([0] * max(written.row + 1 - len(found), len(found) // 8, 1024))
        found[written.row] = _short(written.key)

    def __getitem__(self, row: int) -> int:
        return self._found[row]


def _short(key: str) -> int:
    try:
        return int(key[:8] or "0", 16)
    except ValueError:
        return 1  # a key that we do not make


class Names:
    """The numbers of the rows by `custom_id`, for a stream, whose rows are known by nothing else."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def read(self, written: Written, _: int) -> None:
        """Note what stands in the journal."""
        if written.custom_id is not None:
            self.numbers[written.custom_id] = written.row


class Changes:
    """The rows that are done, and would be asked otherwise now.

    Args:
        keys: those in the journal.
        skip: the rows not to look at, because they are asked again anyway.
    """

    def __init__(self, journal: Journal, keys: Keys, skip: Bitmap) -> None:
        self._journal = journal
        self._keys = keys
        self._skip = skip
        self.changed = Bitmap()
        self.rows = 0
        """The rows of the input. It is known when all are checked."""

    def is_skipped(self, number: int) -> bool:
        """Return whether a row of the input need not be read."""
        self.rows = number + 1
        return number not in self._journal.done or number in self._skip

    def check(self, source: Source, key_of: Callable[[Row], str]) -> Generator[None]:
        """Look at all rows that are done. Yield from time to time, so that the caller can do something else, or leave it."""
        rows = cast("Iterable[Row]", source.rows(self.is_skipped))
        try:
            for number, row in enumerate(rows, 1):
                if self._keys[row.number] != _short(key_of(row)):
                    self.changed.add(row.number)
                if number % 100 == 0:
                    yield
        finally:
            if isinstance(rows, Generator):
                rows.close()
        for row_number in self._journal.done:
            if row_number >= self.rows:
                self.changed.add(row_number)  # the input has become shorter
