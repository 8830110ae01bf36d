"""The value of a JSON text, which may not have come whole."""

from __future__ import annotations

import json
import math
import re
from typing import Any, Final

NOTHING: Final[Any] = object()
"""Stands for a value of which nothing has come."""
_CLOSING: Final = {"{": "}", "[": "]"}
_CHARACTER: Final = r'(?:[^"\\]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))'
_TOKEN: Final = re.compile(r'\s*(?:([{}\[\],:])|"(?:[^"\\]|\\.)*+(")|(")|([^\s{}\[\],:"]++)(?=(.?)))', re.DOTALL)
"""A sign, a whole string, the beginning of a string, or a number or word with what follows it."""
_IN_STRING: Final = re.compile(_CHARACTER + "*+")
_HALF: Final = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}$|[\ud800-\udbff]$")
"""The first half of a character that is written as two (a surrogate pair)."""


def value_so_far(text: str) -> Any:
    """Return the value of the beginning of a JSON text, or `NOTHING`.

    Strings, arrays and objects that are open end here. A name without a value, a number that may go on and half a word are
    left out. The time that it takes grows with the text's length.
    """
    whole = _value(text)
    if whole is not NOTHING:
        return whole
    for end in _ends(text):
        found = _value(end)
        if found is not NOTHING:
            return found
    return NOTHING


def value_of(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is not JSON, or not within the limits of Python: nested too deeply, or with a number too large.
    """
    try:
        return json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:20]} is too large a number")
    return number


def _value(text: str) -> Any:
    try:
        return value_of(text)
    except ValueError:
        return NOTHING


def _ends(text: str) -> list[str]:
    """Return the texts that the beginning of a JSON text may be with an end, the best first."""
    opened: list[str] = []
    """The brackets that close the open arrays and objects."""
    is_name = False
    """Whether a string would be the name of a property."""
    whole = 0
    """The end of the last whole value."""
    string: int | None = None
    """The end of the last whole character of a value's string that is open."""
    at = 0
    while (token := _TOKEN.match(text, at)) is not None:
        sign, quote, begun, word, follows = token.groups()
        at = token.end()
        if sign is not None:
            if sign in _CLOSING:
                opened.append(_CLOSING[sign])
            elif sign in "]}" and (not opened or opened.pop() != sign):
                break
            if sign not in ",:":
                whole = at
            is_name = sign == "{" or (sign == "," and opened[-1:] == ["}"])
        elif begun is not None:
            if not is_name:
                string = _end_of_string(text, at)
            break
        elif not is_name and (quote is not None or (word is not None and follows)):
            whole = at
    closing = "".join(reversed(opened))
    ends = [] if string is None else [f'{text[:string]}"{closing}']
    return [*ends, *([text[:whole] + closing] if whole else [])]


def _end_of_string(text: str, begin: int) -> int:
    found = _IN_STRING.match(text, begin)
    end = begin if found is None else found.end()
    half = _HALF.search(text, max(begin, end - 6), end)
    return end if half is None else half.start()
