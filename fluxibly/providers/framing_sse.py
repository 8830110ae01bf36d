"""Server-sent events as model services send them."""

from __future__ import annotations

import re

from fluxibly.providers.codec import Event
from fluxibly.providers.framing_lines import Lines, too_large

_FIELD_LINE = re.compile(rb"(?:data|event|id|retry)(?::|$)|:")


class SSE(Lines):
    """Server-sent events by the WHATWG rules (HTML, "9.2.6 Interpreting an event stream"), with two liberties.

    An unterminated last event is delivered, because services leave out the last blank line. JSON that stands there
    without `data:` is delivered as an event too: services send errors so, in the middle of a stream or instead of it.
    """

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self._data: list[bytes] = []
        self._size = 0
        self._name = ""
        self._bare = False
        """Whether `_data` are lines of JSON without `data:`."""
        self._between = False
        """Whether the last read ended with an event, so that nothing is under way."""

    def feed(self, data: bytes, /) -> list[Event]:
        """The events that `data` completes. Whole events with nothing but data, which most are, take a short way."""
        if self._between and data[:6] == b"data: " and data[-2:] == b"\n\n" and len(data) <= self._limit:
            found = data[6:-2].split(b"\n\ndata: ")
            # each event ends in the two line ends that were counted here, so there is none inside of any
            if data.count(b"\n") == 2 * len(found) and b"\r" not in data:
                return [Event(each) for each in found]
        events = super().feed(data)
        self._between = not (
            self._data or self._name or self._partial or self._after_cr or self._at_start or self._failure
        )
        return events

    def _take(self, whole: bytes, events: list[Event]) -> None:
        if self._data or self._name or len(whole) > self._limit:
            for line in whole[:-1].split(b"\n"):
                self._take_line(line, events)
            return
        blocks = whole.split(b"\n\n")
        rest = blocks.pop()
        for block in blocks:
            if block[:6] == b"data: " and b"\n" not in block:
                events.append(Event(block[6:]))
            else:
                self._take_block(block, events)
        if rest:
            for line in rest[:-1].split(b"\n"):
                self._take_line(line, events)

    def _take_block(self, block: bytes, events: list[Event]) -> None:
        """Take an event's lines; often they are its name and its data."""
        if block[:7] == b"event: ":
            name, _, data = block.partition(b"\n")
            if data[:6] == b"data: " and b"\n" not in data:
                events.append(Event(data[6:], name[7:].decode(errors="replace")))
                return
        for line in block.split(b"\n"):
            self._take_line(line, events)
        self._dispatch(events)

    def _take_line(self, line: bytes, events: list[Event]) -> None:
        if not line:
            self._dispatch(events)
            return
        if len(line) > self._limit:
            raise too_large(self._limit)
        if self._bare:
            if _FIELD_LINE.match(line) is None:
                self._add(line)
                return
            self._dispatch(events)
        field, _, value = line.partition(b":")
        if field == b"data":
            self._add(value.removeprefix(b" "))
        elif field == b"event":
            self._name = value.removeprefix(b" ").decode(errors="replace")
        elif line.lstrip()[:1] in {b"{", b"["}:
            if self._data:
                self._dispatch(events)
            self._bare = True
            self._add(line)

    def _add(self, line: bytes) -> None:
        self._data.append(line)
        self._size += len(line)
        if self._size > self._limit:
            raise too_large(self._limit)

    def _dispatch(self, events: list[Event]) -> None:
        if self._data:
            events.append(Event(b"\n".join(self._data), self._name))
            self._data.clear()
            self._size = 0
        self._name = ""
        self._bare = False

    def _take_last(self, last: bytes, events: list[Event]) -> None:
        if last:
            self._take_line(last, events)
        self._dispatch(events)
