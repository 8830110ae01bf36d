"""Lenient JSON, as services really send it: byte-order marks, padding, `NaN`, lone surrogates, and any shape."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final, cast

import msgspec

from fluxibly.errors import StreamProtocolError

_decode = msgspec.json.Decoder().decode


class Repairs:
    """The number of texts in this process whose invalid UTF-8 was replaced.

    Readers of answers see by it that a text needs a closer look, which would be too costly for each text.
    """

    def __init__(self) -> None:
        self.count = 0


REPAIRS = Repairs()


def read_json(data: bytes) -> Any:
    """Return the value of a JSON text.

    Accepts values that the specification forbids but Python and JavaScript servers send: `NaN` and `Infinity`, and
    lone surrogates, which become U+FFFD. So does invalid UTF-8, since a whole answer lost is worse; `REPAIRS` counts it.

    Raises:
        StreamProtocolError: the text is not JSON.
    """
    try:
        return _decode(data)
    except (ValueError, RecursionError):
        return _read_leniently(data)


def _read_leniently(data: bytes) -> Any:
    if not is_utf8(data):
        REPAIRS.count += 1
    try:
        return without_lone_surrogates(json.loads(data.decode("utf-8-sig", errors="replace")))
    except (ValueError, RecursionError):
        raise StreamProtocolError(f"expected JSON from the service, got {describe(data)}") from None


def is_utf8(data: bytes) -> bool:
    """Whether bytes are valid UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def without_lone_surrogates(value: object) -> object:
    """Return a JSON value with U+FFFD in place of each half of a surrogate pair."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, (list, tuple)):
        return [without_lone_surrogates(item) for item in cast("Sequence[object]", value)]
    if isinstance(value, dict):
        return {
            cast("str", without_lone_surrogates(key)): without_lone_surrogates(item)
            for key, item in cast("dict[str, object]", value).items()
        }
    return value


def describe(data: bytes) -> str:
    """Describe a text that is not JSON, without quoting it."""
    start = data[:256].lstrip().lower()
    if not start:
        return "an empty body" if not data else "white space"
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<")):
        return "an HTML page"
    return "text"


# JSON values may be of any type: these functions return the expected type, or an empty value.


def as_object(value: Any) -> dict[str, Any]:
    """Return `value` if it is a JSON object, else an empty object."""
    return value if type(value) is dict else {}  # pyright: ignore[reportUnknownVariableType]  # JSON's keys are str


def as_array(value: Any) -> list[Any]:
    """Return `value` if it is a JSON array, else an empty array."""
    return value if type(value) is list else []  # pyright: ignore[reportUnknownVariableType]  # of any type


def as_text(value: object) -> str:
    """Return `value` if it is a string, else an empty string."""
    return value if isinstance(value, str) else ""


MOST: Final = 2**53
"""The largest count. A larger one is nonsense, and what is reckoned with floats would fail on it."""


def as_count(value: object) -> int | None:
    """Return `value` if it is a count (an integer from 0 that a float can hold exactly), else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST else None


def sum_known(*counts: int | None) -> int | None:
    """Return the sum of the known counts; None if no count is known."""
    known = [number for number in counts if number is not None]
    return sum(known) if known else None
