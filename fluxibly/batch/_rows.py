"""The rows of a batch, whatever they are read from."""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol


class Row(NamedTuple):
    """A row of the input: what to ask, or why it cannot be asked."""

    number: int
    """Its place in the input, from 0. Lines that are blank do not count."""
    custom_id: str | None
    prompt: Any
    """A prompt for `LLM.complete`: a text, or messages."""
    settings: Mapping[str, Any]
    """The settings of the call, such as `max_tokens`, by names that `LLM.complete` knows."""
    problem: str | None = None
    """Why the row cannot be asked, without any of its content. None: it can be."""
    line: int | None = None
    """The line of the input where the row begins, from 1; None where there are no lines."""

    @property
    def where(self) -> str:
        """Where the row stands in the input, such as "line 7"."""
        return f"row {self.number}" if self.line is None else f"line {self.line}"


def bad_row(number: int, line: int | None, problem: str, custom_id: str | None = None) -> Row:
    """Return a row that cannot be asked."""
    row = Row(number, custom_id, "", {}, "", line)
    return row._replace(problem=f"{row.where}: {problem}")


class Source(Protocol):
    """An input. Each pass over its rows begins anew, except over those of a stream."""

    @property
    def size(self) -> int | None:
        """The bytes of the input; None: not known."""
        ...

    @property
    def position(self) -> int:
        """The bytes that were read in the last pass."""
        ...

    @property
    def fingerprint(self) -> tuple[int, int] | None:
        """The size and the time of the last change, which differ once the input has changed; None for a stream."""
        ...

    @property
    def is_stream(self) -> bool:
        """Whether the input can be read only once, like standard input. A later run knows its rows by `custom_id` alone."""
        ...

    def rows(
        self, skip: Callable[[int], bool], known: Mapping[str, int] | None = None
    ) -> Iterable[Row] | AsyncIterable[Row]:
        """Return the rows in order, without those whose number `skip` is true for. Of a file, they are not even parsed.

        The rows of a stream come asynchronously, and nothing else waits for them.

        Args:
            skip: whether a row is left out.
            known: for a stream that is gone on with, the numbers of the rows that have a line, by `custom_id`. None: no row has.

        Raises:
            ConfigError: the input as a whole cannot be read, or a row of a stream that is gone on with has no `custom_id`.
            OSError: it cannot be read.
        """
        ...


class InFile:
    """A source that is a file: the part that does not depend on its format."""

    is_stream = False

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @property
    def fingerprint(self) -> tuple[int, int]:
        found = self.path.stat()
        return found.st_size, found.st_mtime_ns
