"""The places in the text of an answer at which it is checked. They depend on the text alone, not on how it was cut."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

_ALONE = "\u3002\uff01\uff1f"
"""The stops of Chinese and Japanese, which need no white space behind them."""
_STOPS_ALONE = frozenset(_ALONE)
_STOPS = ".!?\u2026" + _ALONE
_CLOSING = "\"'\u201d\u2019\u00bb)\\]}*_\u300d\u300f\uff09\u3011\u300b"
"""Closing quotes and brackets, and what ends emphasis in Markdown."""
_END = re.compile(rf"([{_STOPS}][{_STOPS}{_CLOSING}]*+)|\S[^\S\n]*+\n")
"""A run of stops, with the quotes and brackets that they close, or the end of a line with something in it."""
_MAY_END = re.compile(rf"[{_STOPS}\n]")


class Borders(Protocol):
    """The search for borders in a text that comes in pieces. A border counts once a character follows it."""

    def skip(self, text: str) -> bool:
        """Take the next piece of the text, if it is easy to see that it makes no border known. If not, return False."""
        ...

    def find(self, text: str) -> Sequence[int]:
        """Take the next piece, and return the borders that the next piece of the text makes known, as offsets into it. 0 stands before it."""
        ...


class Lengths:
    """A border after every so many characters."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._left = length
        """The characters until the next border."""

    def skip(self, text: str) -> bool:
        left = self._left - len(text)
        if left < 0:
            return False
        self._left = left
        return True

    def find(self, text: str) -> Sequence[int]:
        if self.skip(text):
            return ()
        borders = range(self._left, len(text), self._length)
        self._left = borders[-1] + self._length - len(text)
        return borders


class Sentences:
    """A border after every sentence, and at the end of every line with something in it.

    A sentence ends at . ! ? or … before white space, and at the stops of Chinese and Japanese before anything. Closing
    quotes, brackets and marks of emphasis belong to it. So 3.14 and most addresses are not cut, and "e.g. this" is.
    """

    def __init__(self) -> None:
        self._tail = ""
        """A short text that decides as the text since the last border does: empty, a word, a stop, or a line's end."""

    def skip(self, text: str) -> bool:
        if self._tail == "x":
            return not _MAY_END.search(text)
        if self._tail or _MAY_END.search(text):
            return False
        if text.strip():
            self._tail = "x"
        return True

    def find(self, text: str) -> Sequence[int]:
        if self.skip(text):
            return ()
        tail = self._tail
        whole = tail + text
        borders: list[int] = []
        start, after = 0, ""
        for end in _END.finditer(whole):
            stop, at = end[1], end.end()
            alone = stop is not None and not _STOPS_ALONE.isdisjoint(stop)
            if at == len(whole):  # what follows is not known yet
                after = "x\n" if stop is None else _ALONE[0] if alone else "."
            elif stop is None or alone or whole[at].isspace():
                borders.append(at - len(tail))
                start = at
        self._tail = after or ("x" if whole[start:].strip() else "")
        return borders
