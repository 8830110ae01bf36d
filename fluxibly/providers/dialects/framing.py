"""Framing of streams: bytes to server-sent events, lines of JSON, or AWS events. Pure; reads may be cut anywhere.

Each framing has `feed(data)`, which returns the events that `data` completes, and `close()`, which returns the events
that the end of the stream completes. Events before an error are returned first; the next call raises the error.
"""

from __future__ import annotations

import re
import struct
from abc import ABC, abstractmethod
from binascii import crc32
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from fluxibly.errors import StreamProtocolError
from fluxibly.providers.dialects.codec import Event, Framing

DEFAULT_LIMIT: Final = 16 * 1024 * 1024
"""Maximum number of bytes in a line or an event."""


class StreamFraming(Protocol):
    """The framing of a stream, with its state.

    `kept_alive`: the last `feed` that returned no events completed something without data: a comment, or a blank line.
    """

    kept_alive: bool

    def feed(self, data: bytes, /) -> list[Event]:
        """Return the events that `data` completes.

        Raises:
            StreamProtocolError: a line or an event is over the limit, or the bytes do not fit this framing.
        """
        ...

    def close(self) -> list[Event]:
        """End the stream, and return the events that were only waiting for their end."""
        ...


# Lines


BOM: Final = b"\xef\xbb\xbf"
"""A byte-order mark in UTF-8, which may precede a stream and is not part of its content."""


def too_large(limit: int) -> StreamProtocolError:
    """Return the error for a line or an event over the limit. It is not retryable: a retry would hit the limit too."""
    return StreamProtocolError(
        f"expected lines and events of at most {limit:,} bytes in the stream, got more than {limit:,} bytes",
        retryable=False,
    )


class Lines(ABC):
    """A splitter of a stream into lines that end with CR, LF or CRLF. The last line may be unterminated."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._partial: list[bytes] = []
        self._partial_size = 0
        self._after_cr = False
        self._at_start = True
        self._failure: StreamProtocolError | None = None
        self.kept_alive = False

    def feed(self, data: bytes, /) -> list[Event]:
        """Return the events that `data` completes."""
        self.kept_alive = False
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
        """Return the events that were waiting for their end."""
        if self._failure is not None:
            raise self._failure
        last = b"".join(self._partial)
        self._partial.clear()
        events: list[Event] = []
        self._take_last(last, events)
        return events

    @abstractmethod
    def _take(self, whole: bytes, events: list[Event]) -> None:
        """Take whole lines, each with LF at its end."""

    @abstractmethod
    def _take_last(self, last: bytes, events: list[Event]) -> None:
        """Take the last line, which is unterminated or empty."""

    def _hold(self, data: bytes, events: list[Event]) -> list[Event]:
        """Keep the beginning of a line."""
        if data:
            self._partial.append(data)
            self._partial_size += len(data)
            if self._partial_size > self._limit:
                return self._fail(too_large(self._limit), events)
        return events

    def _fail(self, error: StreamProtocolError, events: list[Event]) -> list[Event]:
        """Raise an error, or keep it for the next call if there are events to deliver first."""
        self._failure = error
        self._partial.clear()
        if not events:
            raise error
        return events

    def _without_bom(self, data: bytes) -> bytes:
        data = b"".join([*self._partial, data])
        self._partial.clear()
        self._partial_size = 0
        if len(data) < len(BOM) and BOM.startswith(data):
            self._hold(data, [])
            return b""
        self._at_start = False
        return data.removeprefix(BOM)

    def _with_lf_only(self, data: bytes) -> bytes:
        """Return `data` with every line end as LF. A CR ends its line at once; an LF right after it is dropped."""
        if self._after_cr and data:
            self._after_cr = False
            data = data.removeprefix(b"\n")
        if data.endswith(b"\r"):
            self._after_cr = True
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


class NDJSON(Lines):
    """Newline-delimited JSON: each line is an event. Blank lines are skipped."""

    def _take(self, whole: bytes, events: list[Event]) -> None:
        for line in whole[:-1].split(b"\n"):
            self._take_last(line, events)

    def _take_last(self, last: bytes, events: list[Event]) -> None:
        if len(last) > self._limit:
            raise too_large(self._limit)
        if last and not last.isspace():
            events.append(Event(last))
        else:
            self.kept_alive = True


# Server-sent events


_FIELD_LINE = re.compile(rb"(?:data|event|id|retry|error)(?::|$)|:")


class SSE(Lines):
    """Server-sent events by the WHATWG rules (HTML, "9.2.6 Interpreting an event stream"), with three exceptions.

    An unterminated last event is delivered, because services omit the last blank line. JSON without `data:` is also
    delivered as an event, because services send errors this way, in the middle of a stream or instead of a stream. And
    an error is never dropped: a field `error`, as older llama.cpp sends it, is an event of that name, and so is an
    event of that name without data.
    """

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self._data: list[bytes] = []
        self._size = 0
        self._name = ""
        self._bare = False
        """Whether `_data` holds lines of JSON without `data:`."""
        self._between = False
        """Whether the last read ended with an event, so that no event is in progress."""

    def feed(self, data: bytes, /) -> list[Event]:
        """Return the events that `data` completes. Whole events with only data, the usual kind, take a fast path."""
        if self._between and data[:6] == b"data: " and data[-2:] == b"\n\n" and len(data) <= self._limit:
            found = data[6:-2].split(b"\n\ndata: ")
            # Each event ends with two of the line ends counted here, so no event has a line end inside.
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
        """Take the lines of an event, usually its name and its data."""
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
        if not field:
            self.kept_alive = True
        elif field == b"data":
            self._add(value.removeprefix(b" "))
        elif field == b"event":
            self._name = value.removeprefix(b" ").decode(errors="replace")
        elif field == b"error":
            if self._data:
                self._dispatch(events)
            events.append(Event(value.removeprefix(b" "), "error"))
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
        self.kept_alive = True
        if self._data or self._name == "error":
            events.append(Event(b"\n".join(self._data), self._name))
            self._data.clear()
            self._size = 0
        self._name = ""
        self._bare = False

    def _take_last(self, last: bytes, events: list[Event]) -> None:
        if last:
            self._take_line(last, events)
        self._dispatch(events)


# AWS event streams


_PRELUDE: Final = struct.Struct(">III")
"""The start of a message: its length, the length of its headers, and the checksum of these two."""
_CHECKSUM: Final = struct.Struct(">I")
_SHORT: Final = struct.Struct(">H")
_MAX_HEADERS: Final = 128 * 1024
_HEADER_SIZES: Final[Mapping[int, int]] = {0: 0, 1: 0, 2: 1, 3: 2, 4: 4, 5: 8, 8: 8, 9: 16}
"""The sizes of the header values that have no length of their own, by type: booleans, integers, a time, a UUID."""
_KNOWN: Final = 32
"""Maximum number of different headers that are kept."""
_MAX_KNOWN: Final = 512
"""Maximum number of bytes of headers that are kept."""
_BYTES: Final = 6
_STRING: Final = 7


class AWSEventStream:
    """Messages of AWS's event streams (`application/vnd.amazon.eventstream`), each with two CRC-32 checksums.

    An event is named after its `:event-type`. A message that reports an error is an event whose name begins with
    "exception:" (with its JSON as data) or with "error:" (with its text as data).
    https://smithy.io/2.0/aws/amazon-eventstream.html
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._length = 0
        """The length of the message in progress; 0 until its prelude is complete."""
        self._known: dict[bytes, dict[str, str]] = {}
        """Headers that were read before: all messages of an event have the same, byte for byte."""
        self._failure: StreamProtocolError | None = None
        self.kept_alive = False

    def feed(self, data: bytes, /) -> list[Event]:
        """Return the events that `data` completes."""
        if self._failure is not None:
            raise self._failure
        buffer = self._buffer
        buffer += data
        events: list[Event] = []
        try:
            while len(buffer) >= (self._length or _PRELUDE.size):
                if self._length:
                    message = bytes(buffer[: self._length])
                    del buffer[: self._length]
                    self._length = 0
                    events.append(self._event(message))
                else:
                    self._length = self._length_of(buffer)
        except StreamProtocolError as error:
            self._failure = error
            buffer.clear()
            if not events:
                raise
        return events

    def close(self) -> list[Event]:
        """Raise StreamProtocolError if the stream ended within a message."""
        if self._failure is not None:
            raise self._failure
        if self._buffer:
            raise StreamProtocolError(
                f"the event stream was cut off: it ended {len(self._buffer):,} bytes into a message"
            )
        return []

    def _length_of(self, buffer: bytearray) -> int:
        """Return the length of a message from its prelude, which is checked before its length is trusted."""
        length: int
        length, headers, checksum = _PRELUDE.unpack_from(buffer)
        if crc32(buffer[:8]) != checksum:
            raise StreamProtocolError("the event stream is damaged: the checksum of a message's prelude does not fit")
        if length > self._limit:
            raise too_large(self._limit)
        if headers > min(length - _PRELUDE.size - _CHECKSUM.size, _MAX_HEADERS):
            raise StreamProtocolError(
                f"expected a message of the event stream to have room for its headers, and at most {_MAX_HEADERS:,} "
                f"bytes of them, got {headers:,} in {length:,} bytes"
            )
        return length

    def _event(self, message: bytes) -> Event:
        """Return the event in a whole message."""
        (checksum,) = _CHECKSUM.unpack_from(message, len(message) - _CHECKSUM.size)
        if crc32(message[: -_CHECKSUM.size]) != checksum:
            raise StreamProtocolError("the event stream is damaged: the checksum of a message does not fit")
        _, size, _ = _PRELUDE.unpack_from(message)
        end = _PRELUDE.size + size
        block = message[_PRELUDE.size : end]
        headers = self._known.get(block)
        if headers is None:
            headers = _aws_headers(block)
            if len(self._known) < _KNOWN and size <= _MAX_KNOWN:
                self._known[block] = headers
        data = message[end : -_CHECKSUM.size]
        kind = headers.get(":message-type", "event")
        if kind == "exception":
            return Event(data, f"exception:{headers.get(':exception-type', '')}")
        if kind == "error":
            return Event(headers.get(":error-message", "").encode(), f"error:{headers.get(':error-code', '')}")
        return Event(data, headers.get(":event-type", ""))


def _aws_headers(block: bytes) -> dict[str, str]:
    """Return the headers of a message whose values are strings."""
    headers: dict[str, str] = {}
    at = 0
    try:
        while at < len(block):
            name_end = at + 1 + block[at]
            name, kind = block[at + 1 : name_end], block[name_end]
            start, size = name_end + 1, _HEADER_SIZES.get(kind)
            if size is None:
                if kind not in (_BYTES, _STRING):
                    raise StreamProtocolError(f"expected a header type from 0 to 9 in the event stream, got {kind}")
                (size,) = _SHORT.unpack_from(block, start)
                start += _SHORT.size
            at = start + size
            if kind == _STRING:
                headers[name.decode(errors="replace")] = block[start:at].decode(errors="replace")
    except (IndexError, struct.error):
        at = len(block) + 1
    if at > len(block):
        raise StreamProtocolError(
            "expected whole headers in a message of the event stream, got a header that is cut off"
        )
    return headers


# Framings by name


def make_framing(framing: Framing, *, limit: int = DEFAULT_LIMIT) -> StreamFraming:
    """Return a framing for a stream. `limit` is the maximum size of a line or an event, in bytes."""
    return _FRAMINGS[framing](limit)


_FRAMINGS: Final[dict[Framing, Callable[[int], StreamFraming]]] = {
    "sse": SSE,
    "ndjson": NDJSON,
    "aws": AWSEventStream,
}
