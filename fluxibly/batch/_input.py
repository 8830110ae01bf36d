"""The rows of a batch, read from a file in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import msgspec

from fluxibly._checks import is_mapping, kind_of


class Row(NamedTuple):
    """A row of the input: what to ask, or why it cannot be asked."""

    number: int
    """Its place in the input, from 0. Lines that are blank do not count."""
    custom_id: str | None
    prompt: Any
    """What `LLM.complete` takes: a text, or messages."""
    settings: Mapping[str, Any]
    """The settings of the call, such as `max_tokens`."""
    problem: str | None = None
    """Why the row cannot be asked. None: it can be."""


class Source(Protocol):
    """An input. Each pass over its rows begins anew."""

    @property
    def size(self) -> int | None:
        """The bytes of the input; None if that is not known."""
        ...

    @property
    def position(self) -> int:
        """The bytes that were read in the last pass."""
        ...

    def rows(self, skip: Callable[[int], bool]) -> Iterator[Row]:
        """Yield the rows in order, without those whose number `skip` is true for. They are not even parsed."""
        ...


class Lines:
    """The rows of a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0

    @property
    def size(self) -> int | None:
        return self.path.stat().st_size

    def rows(self, skip: Callable[[int], bool]) -> Iterator[Row]:
        """Do as `Source.rows`."""
        self.position = 0
        number = 0
        with self.path.open("rb") as file:
            for line in file:
                self.position += len(line)
                if line.isspace():
                    continue
                if not skip(number):
                    yield read_line(number, line)
                number += 1


def read_line(number: int, line: bytes) -> Row:
    """Return the row of a JSON line."""
    try:
        fields: object = msgspec.json.decode(line)
    except msgspec.DecodeError as error:
        return Row(number, None, "", {}, f"expected a JSON object, got {error}")
    if not is_mapping(fields):
        return Row(number, None, "", {}, f"expected a JSON object, got {kind_of(fields)}")
    settings = dict(cast("Mapping[str, Any]", fields))
    custom_id = settings.pop("custom_id", None)
    prompt = settings.pop("prompt", None)
    if prompt is None:
        prompt = settings.pop("messages", None)
    if prompt is None:
        return Row(number, custom_id, "", {}, "expected a prompt or messages, got neither")
    return Row(number, custom_id, prompt, settings)


def open_input(path: Path) -> Source:
    """Return the rows of a file.

    Raises:
        OSError: it cannot be read.
    """
    path.open("rb").close()
    return Lines(path)
