"""A stream's bytes into lines, and the framing that has an event on each: NDJSON."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

from fluxibly.errors import StreamProtocolError
from fluxibly.providers.codec import Event

BOM: Final = b"\xef\xbb\xbf"
"""A byte-order mark in UTF-8, which may begin a stream and is no part of it."""


def too_large(limit: int) -> StreamProtocolError:
    """The error for a line or an event over the limit, which another try would not make smaller."""
    return StreamProtocolError(
        f"the stream has a line or an event of more than {limit:,} bytes, which is more than is read of one",
        retryable=False,
    )


class Lines(ABC):
    """Splits a stream into lines, each ended by CR, LF or CRLF; the last may be unterminated."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._partial: list[bytes] = []
        self._partial_size = 0
        self._after_cr = False
        self._at_start = True
        self._failure: StreamProtocolError | None = None

    def feed(self, data: bytes, /) -> list[Event]:
        """The events that `data` completes."""
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
        """The events that were waiting for their end."""
        if self._failure is not None:
            raise self._failure
        last = b"".join(self._partial)
        self._partial.clear()
        events: list[Event] = []
        self._take_last(last, events)
        return events

    @abstractmethod
    def _take(self, whole: bytes, events: list[Event]) -> None:
        """Take whole lines, each ended by LF."""

    @abstractmethod
    def _take_last(self, last: bytes, events: list[Event]) -> None:
        """Take the last line, which has no end, or is empty."""

    def _hold(self, data: bytes, events: list[Event]) -> list[Event]:
        """Keep the beginning of a line."""
        if data:
            self._partial.append(data)
            self._partial_size += len(data)
            if self._partial_size > self._limit:
                return self._fail(too_large(self._limit), events)
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
        if len(data) < len(BOM) and BOM.startswith(data):
            self._hold(data, [])
            return b""
        self._at_start = False
        return data.removeprefix(BOM)

    def _with_lf_only(self, data: bytes) -> bytes:
        """`data` with each line end as LF. A CR ends its line at once; an LF that follows it is dropped."""
        if self._after_cr and data:
            self._after_cr = False
            data = data.removeprefix(b"\n")
        if data.endswith(b"\r"):
            self._after_cr = True
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


class NDJSON(Lines):
    """One event a line. Blank lines are skipped."""

    def _take(self, whole: bytes, events: list[Event]) -> None:
        for line in whole[:-1].split(b"\n"):
            self._take_last(line, events)

    def _take_last(self, last: bytes, events: list[Event]) -> None:
        if len(last) > self._limit:
            raise too_large(self._limit)
        if last and not last.isspace():
            events.append(Event(last))
