"""Bytes of a stream into events: server-sent events, lines of JSON, a JSON array. Pure, and blind to where reads cut.

Each framing has `feed(data)`, which returns the events that `data` completes, and `close()`, which returns what the
end of the stream completes. What arrives before an error is returned first; the error is raised by the next call.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, Protocol

from fluxibly.errors import StreamProtocolError
from fluxibly.providers.codec import Event, Framing

DEFAULT_LIMIT: Final = 16 * 1024 * 1024
"""Bytes that one line or event may have."""

_BOM = b"\xef\xbb\xbf"


class StreamFraming(Protocol):
    """The state of one stream's framing."""

    def feed(self, data: bytes, /) -> list[Event]:
        """The events that `data` completes.

        Raises:
            StreamProtocolError: a line or an event is over the limit, or the bytes are not of this framing.
        """
        ...

    def close(self) -> list[Event]:
        """The stream's bytes are over: the events that were only waiting for their end."""
        ...


def make_framing(framing: Framing, *, limit: int = DEFAULT_LIMIT) -> StreamFraming:
    """A framing for one stream. `limit` bounds a line and an event, in bytes."""
    return _FRAMINGS[framing](limit)


def _too_large(limit: int) -> StreamProtocolError:
    return StreamProtocolError(
        f"the stream has a line or an event of more than {limit:,} bytes, which is more than is read of one",
        retryable=False,
    )


class _Lines:
    """Splits a stream into lines, each ended by CR, LF or CRLF; the last may be unterminated."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._partial: list[bytes] = []
        self._partial_size = 0
        self._after_cr = False
        self._at_start = True
        self._failure: StreamProtocolError | None = None

    def feed(self, data: bytes, /) -> list[Event]:
        if self._failure is not None:
            raise self._failure
        if self._at_start:
            data = self._without_bom(data)
        if b"\r" in data or self._after_cr:
            data = self._with_lf_only(data)
        end = data.rfind(b"\n") + 1
        if not end:
            return self._hold(data, [])
        whole = data if end == len(data) else data[:end]
        if self._partial:
            whole = b"".join([*self._partial, whole])
            self._partial.clear()
            self._partial_size = 0
        events: list[Event] = []
        try:
            self._take(whole, events)
        except StreamProtocolError as error:
            return self._fail(error, events)
        return events if end == len(data) else self._hold(data[end:], events)

    def close(self) -> list[Event]:
        if self._failure is not None:
            raise self._failure
        last = b"".join(self._partial)
        self._partial.clear()
        events: list[Event] = []
        try:
            self._take_last(last, events)
        except StreamProtocolError as error:
            return self._fail(error, events)
        return events

    def _take(self, whole: bytes, events: list[Event]) -> None:
        """Take whole lines, each ended by LF."""
        raise NotImplementedError

    def _take_last(self, last: bytes, events: list[Event]) -> None:
        raise NotImplementedError

    def _hold(self, data: bytes, events: list[Event]) -> list[Event]:
        """Keep the beginning of a line."""
        if data:
            self._partial.append(data)
            self._partial_size += len(data)
            if self._partial_size > self._limit:
                return self._fail(_too_large(self._limit), events)
        return events

    def _fail(self, error: StreamProtocolError, events: list[Event]) -> list[Event]:
        """Raise an error, or put it by for the next call if there are events to be delivered first."""
        self._failure = error
        self._partial.clear()
        if not events:
            raise error
        return events

    def _without_bom(self, data: bytes) -> bytes:
        data = b"".join([*self._partial, data])
        self._partial.clear()
        self._partial_size = 0
        if len(data) < len(_BOM) and _BOM.startswith(data):
            self._hold(data, [])
            return b""
        self._at_start = False
        return data.removeprefix(_BOM)

    def _with_lf_only(self, data: bytes) -> bytes:
        """`data` with each line end as LF. A CR ends its line at once; an LF that follows it is dropped."""
        if self._after_cr and data:
            self._after_cr = False
            data = data.removeprefix(b"\n")
        if data.endswith(b"\r"):
            self._after_cr = True
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


_FIELD_LINE = re.compile(rb"(?:data|event|id|retry)(?::|$)|:")


class SSE(_Lines):
    """Server-sent events by the WHATWG rules (HTML, "9.2.6 Interpreting an event stream"), with two liberties.

    An unterminated last event is delivered, because services leave out the last blank line. JSON that stands there
    without `data:` is delivered as an event too: services send errors so, in the middle of a stream or instead of it.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        super().__init__(limit)
        self._data: list[bytes] = []
        self._size = 0
        self._name = ""
        self._bare = False
        """Whether `_data` are lines of JSON without `data:`."""
        self._between = False
        """Whether the last read ended with an event, so that nothing is under way."""

    def feed(self, data: bytes, /) -> list[Event]:
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
            raise _too_large(self._limit)
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
            raise _too_large(self._limit)

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


class NDJSON(_Lines):
    """One event a line. Blank lines are skipped."""

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        super().__init__(limit)

    def _take(self, whole: bytes, events: list[Event]) -> None:
        for line in whole[:-1].split(b"\n"):
            self._take_last(line, events)

    def _take_last(self, last: bytes, events: list[Event]) -> None:
        if len(last) > self._limit:
            raise _too_large(self._limit)
        if last and not last.isspace():
            events.append(Event(last))


_OUTSIDE_STRING = re.compile(rb'["{}\[\]]')
_INSIDE_STRING = re.compile(rb'["\\]')
_BETWEEN = re.compile(rb"[ \t\r\n,]*")


class JSONArray:
    """The elements of one JSON array, which are objects or arrays, each as soon as it is whole.

    A single object, without an array around it, is one event: services send errors so.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self._limit = limit
        self._element: list[bytes] = []
        self._size = 0
        self._depth = 0
        """Of the element under way; 0 is between elements."""
        self._in_array = self._in_string = self._escaped = False
        self._at_start = True
        self._failure: StreamProtocolError | None = None

    def feed(self, data: bytes, /) -> list[Event]:
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
        if self._failure is None and (self._depth or (self._at_start and self._element)):
            self._failure = StreamProtocolError("the stream was cut off inside an element of its JSON array")
        if self._failure is not None:
            raise self._failure
        return []

    def _take(self, data: bytes, events: list[Event]) -> None:
        if self._at_start:
            data = b"".join([*self._element, data])
            self._element.clear()
            if len(data) < len(_BOM) and _BOM.startswith(data):
                self._element = [data] if data else []
                return
            self._at_start = False
            data = data.removeprefix(_BOM)
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
            raise _too_large(self._limit)
        if not self._depth:
            events.append(Event(b"".join(self._element)))
            self._element.clear()
        return position


_FRAMINGS: Final[dict[Framing, Callable[[int], StreamFraming]]] = {
    "sse": SSE,
    "ndjson": NDJSON,
    "json-array": JSONArray,
}
