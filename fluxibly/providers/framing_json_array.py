"""A JSON array that arrives piece by piece."""

from __future__ import annotations

import re

from fluxibly.errors import StreamProtocolError
from fluxibly.providers.codec import Event
from fluxibly.providers.framing_lines import BOM, too_large

_OUTSIDE_STRING = re.compile(rb'["{}\[\]]')
_INSIDE_STRING = re.compile(rb'["\\]')
_BETWEEN = re.compile(rb"[ \t\r\n,]*")


class JSONArray:
    """The elements of one JSON array, which are objects or arrays, each as soon as it is whole.

    A single object, without an array around it, is one event: services send errors so.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._element: list[bytes] = []
        self._size = 0
        self._depth = 0
        """Of the element under way; 0 is between elements."""
        self._in_array = self._in_string = self._escaped = False
        self._at_start = True
        self._failure: StreamProtocolError | None = None

    def feed(self, data: bytes, /) -> list[Event]:
        """The events that `data` completes."""
        if self._failure is not None:
            raise self._failure
        events: list[Event] = []
        try:
            self._take(data, events)
        except StreamProtocolError as error:
            self._failure = error
            if not events:
                raise
        return events

    def close(self) -> list[Event]:
        """Nothing, or the error for an element that was cut off."""
        if self._failure is None and (self._depth or (self._at_start and self._element)):
            self._failure = StreamProtocolError("the stream was cut off inside an element of its JSON array")
        if self._failure is not None:
            raise self._failure
        return []

    def _take(self, data: bytes, events: list[Event]) -> None:
        if self._at_start:
            data = b"".join([*self._element, data])
            self._element.clear()
            if len(data) < len(BOM) and BOM.startswith(data):
                self._element = [data] if data else []
                return
            self._at_start = False
            data = data.removeprefix(BOM)
        position = 0
        while position < len(data):
            position = self._inside(data, position, events) if self._depth else self._between(data, position)

    def _between(self, data: bytes, position: int) -> int:
        """Skip to the next element; the position of its first byte."""
        blank = _BETWEEN.match(data, position)
        position = blank.end() if blank is not None else position
        mark = data[position : position + 1]
        if not mark:
            return position
        if mark == b"{" or (mark == b"[" and self._in_array):
            self._depth = 1
            self._element.append(mark)
            self._size = 1
            return position + 1
        if mark == b"[" or (mark == b"]" and self._in_array):
            self._in_array = mark == b"["
            return position + 1
        raise StreamProtocolError("the stream is not a JSON array of objects")

    def _inside(self, data: bytes, start: int, events: list[Event]) -> int:
        """Read on in an element; the position after it, or the end of `data`."""
        position = start
        while self._depth:
            if self._escaped:
                self._escaped = False
                position += 1
            found = (_INSIDE_STRING if self._in_string else _OUTSIDE_STRING).search(data, position)
            if found is None:
                position = len(data)
                break
            position = found.end()
            mark = found.group()
            if mark == b"\\":
                self._escaped = True
                if position == len(data):
                    break
            elif mark == b'"':
                self._in_string = not self._in_string
            else:
                self._depth += 1 if mark in b"{[" else -1
        self._element.append(data[start:position])
        self._size += position - start
        if self._size > self._limit:
            raise too_large(self._limit)
        if not self._depth:
            events.append(Event(b"".join(self._element)))
            self._element.clear()
        return position
