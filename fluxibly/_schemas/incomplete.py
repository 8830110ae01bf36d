"""The value of JSON that has not come whole."""

from __future__ import annotations

from typing import Any, Final

import msgspec

NOTHING: Final = msgspec.UNSET
"""Stands for a value of which nothing has come."""
_CLOSING = {"{": "}", "[": "]"}


def value_so_far(text: str) -> Any:
    """Return the value of the beginning of a JSON text, or `NOTHING`.

    Strings, arrays and objects that are open end here. A name without a value, a number that may go on and half a word are
    left out.
    """
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        pass
    scan = _Scan(text)
    for end, closing in scan.ends():
        try:
            return msgspec.json.decode(text[:end] + closing)
        except (msgspec.DecodeError, RecursionError):
            continue
    return NOTHING


class _Scan:
    """One pass over the beginning of a JSON text, which notes where it may end."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._open: list[str] = []
        """What closes the arrays and objects that are open."""
        self._is_key = False
        """Whether a string would be the name of a property."""
        self._end: tuple[int, str] | None = None
        """The end of the last whole value, and what closes the text there."""
        self._in_string: int | None = None
        """The end of the last whole character of a value's string that is open."""
        at = 0
        while at < len(text):
            at = self._step(at)

    def ends(self) -> list[tuple[int, str]]:
        """Return the places where the text may end, with what closes it, the best first."""
        closing = "".join(reversed(self._open))
        string = [] if self._in_string is None else [(self._in_string, f'"{closing}')]
        return string + ([] if self._end is None else [self._end])

    def _step(self, at: int) -> int:
        """Read a token, and return the place of the next."""
        sign = self._text[at]
        if sign in _CLOSING:
            self._open.append(_CLOSING[sign])
            self._is_key = sign == "{"
            self._whole(at + 1)
        elif sign in "}]":
            if self._open:
                self._open.pop()
            self._whole(at + 1)
        elif sign == ",":
            self._is_key = self._open[-1:] == ["}"]
        elif sign == ":":
            self._is_key = False
        elif sign == '"':
            return self._string(at + 1)
        elif not sign.isspace():
            return self._word(at)
        return at + 1

    def _whole(self, end: int) -> None:
        self._end = end, "".join(reversed(self._open))

    def _string(self, at: int) -> int:
        text, size = self._text, len(self._text)
        while at < size and text[at] != '"':
            length = _length(text, at)
            if at + length > size:
                break
            at += length
        else:
            if at < size:
                if not self._is_key:
                    self._whole(at + 1)
                return at + 1
        if not self._is_key:
            self._in_string = at
        return size

    def _word(self, at: int) -> int:
        """Read a number or a word, which is whole only if something follows."""
        while at < len(self._text) and self._text[at] not in ',:]}"' and not self._text[at].isspace():
            at += 1
        if at < len(self._text):
            self._whole(at)
        return at


def _length(text: str, at: int) -> int:
    """Return the length of the character at a place of a string in JSON, as it is written."""
    if text[at] != "\\":
        return 1
    if text[at + 1 : at + 2] != "u":
        return 2
    high = text[at + 2 : at + 4].lower() in ("d8", "d9", "da", "db")
    return 12 if high else 6
