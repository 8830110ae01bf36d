"""HTTP/1.1 (RFC 9112) without sockets: a request as bytes, and answers from bytes.

httpx's own stack spends two thirds of a local call outside of the socket, and h11 alone 7 to 9 µs for each chunk of a
stream. What a client needs to read is little: a head, and a body that is measured, chunked, or ends with the
connection. Whatever is not plainly right is `NotHTTP`, and its connection is not used again.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from fluxibly.providers.http._limits import ConnectionLost, NotHTTP

if TYPE_CHECKING:
    from fluxibly.providers.http._exchange import Outgoing
    from fluxibly.providers.http._route import Route

MAX_HEAD = 128 * 1024
"""The most bytes that a head, or the trailers, may have."""
MAX_FIELDS = 1000
"""The most headers that an answer may have."""
MAX_CHUNK_LINE = 16 * 1024
"""The most bytes that the line before a chunk may have, with its extensions."""
MAX_INTERIM = 16
"""How many interim answers (1xx) may come before the final one."""

_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [^\r\n]*)?\r?\n")
_FIELD = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\r\n\0]*"
_FIELDS = re.compile(rb"(?:" + _FIELD + rb"\r?\n)*")
_TRAILER = re.compile(_FIELD)
_FOLD = re.compile(rb"\r?\n[ \t]+")
_BLANK = re.compile(rb"\n\r?\n")
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?")


def request_bytes(outgoing: Outgoing, route: Route) -> bytes:
    """A request on the wire. Its parts were checked when they were made (`http_common`)."""
    extra = b"".join([b"%b: %b\r\n" % header for header in route.headers]) if route.headers else b""
    return b"POST %b%b HTTP/1.1\r\n%b%bcontent-length: %d\r\n\r\n%b" % (
        route.prefix,
        outgoing.target,
        outgoing.block,
        extra,
        len(outgoing.body),
        outgoing.body,
    )


class Answer:
    """One answer. Feed it with `head` until that returns True, then with `body` until `ended`."""

    __slots__ = (
        "_buffer",
        "_chunked",
        "_interim",
        "_left",
        "_owes_crlf",
        "_trailer_size",
        "ended",
        "headers",
        "reusable",
        "status",
    )

    def __init__(self) -> None:
        self._buffer = b""
        self._interim = 0
        self._chunked = False
        self._left: int | None = None
        """Bytes left of a measured body, or of the current chunk; None for a body that ends with the connection."""
        self._owes_crlf = False
        self._trailer_size: int | None = None
        """Bytes of trailers so far, once the last chunk has come."""
        self.status = 0
        self.headers: dict[str, str] = {}
        """By lower-case names; repeated ones joined by ", "."""
        self.ended = False
        self.reusable = False
        """Whether the connection may carry another request after this answer."""

    @property
    def silent(self) -> bool:
        """Whether nothing has come at all."""
        return not self.status and not self._buffer and not self._interim

    # The head

    def head(self, data: bytes) -> bool:
        """Take bytes in; True when the final head is there. What came of the body waits for `body(b"")`.

        Raises:
            NotHTTP: this is no head of an HTTP/1.x answer.
        """
        searched = max(0, len(self._buffer) - 3)
        self._buffer += data
        while True:
            buffer = self._buffer
            if not b"HTTP/1.".startswith(buffer[:7]):
                raise NotHTTP("it does not begin with HTTP/1.x")
            blank = _BLANK.search(buffer, searched)
            if blank is None:
                if len(buffer) > MAX_HEAD:
                    raise NotHTTP(f"its head is larger than {MAX_HEAD:,} bytes")
                return False
            self._buffer = buffer[blank.end() :]
            self._parse(buffer[: blank.start() + 1])
            if self.status >= 200:
                return True
            self._interim += 1
            self.status = searched = 0
            if self._interim > MAX_INTERIM:
                raise NotHTTP("it sends interim answers without end")

    def _parse(self, head: bytes) -> None:
        status_line = _STATUS_LINE.match(head)
        if status_line is None:
            raise NotHTTP("its status line is malformed")
        fields = head[status_line.end() :]
        if b"\n " in fields or b"\n\t" in fields:
            fields = _FOLD.sub(b" ", fields)
        if _FIELDS.fullmatch(fields) is None:
            raise NotHTTP("a header of it is malformed")
        self.status = int(status_line[2])
        if self.status == 101:
            raise NotHTTP("it switches to another protocol")
        headers: dict[str, str] = {}
        lines = fields.decode("latin-1").split("\n")[:-1]
        if len(lines) > MAX_FIELDS:
            raise NotHTTP(f"it has more than {MAX_FIELDS:,} headers")
        for line in lines:
            name, _, value = line.partition(":")
            name = name.lower()
            value = value.strip(" \t\r")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        self.headers = headers
        self._measure(is_1_1=status_line[1] == b"1")

    def _measure(self, *, is_1_1: bool) -> None:
        """Find out how the body ends (RFC 9112 §6.3)."""
        headers = self.headers
        connection = headers.get("connection", "").lower()
        options = {option.strip() for option in connection.split(",")} if connection else ()
        self.reusable = "close" not in options and (is_1_1 or "keep-alive" in options)
        coding, length = headers.get("transfer-encoding"), headers.get("content-length")
        if self.status in (204, 304):
            self.ended = True
            self.reusable = self.reusable and coding is None and length in (None, "0")
        elif coding is not None:
            if coding.lower() != "chunked":
                raise NotHTTP(f"its transfer-encoding is {coding!r}")
            self.reusable = self.reusable and is_1_1 and length is None
            self._chunked = True
            self._left = 0
        elif length is not None:
            lengths = {part.strip() for part in length.split(",")}
            one = lengths.pop()
            if lengths or not (one.isascii() and one.isdigit() and len(one) < 16):
                raise NotHTTP(f"its content-length is {length!r}")
            headers["content-length"] = one
            self._left = int(one)
            self.ended = self._left == 0
        else:
            self.reusable = False

    # The body

    def body(self, data: bytes) -> bytes:
        """Take bytes in; returns what they hold of the body, possibly nothing.

        Raises:
            NotHTTP: the body is malformed.
        """
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        if self.ended:
            if data:
                self.reusable = False  # it says more than it announced
            return b""
        if self._chunked:
            return self._unchunk(data)
        left = self._left
        if left is None:
            return data
        if len(data) >= left:
            self.ended = True
            if len(data) > left:
                self.reusable = False
                data = data[:left]
        self._left = left - len(data)
        return data

    def _unchunk(self, data: bytes) -> bytes:
        """All that is there of the chunks' data (RFC 9112 §7.1): one string, however many chunks it came in."""
        parts: list[bytes] = []
        at, size, left = 0, len(data), self._left or 0
        while self._trailer_size is None:
            if left:
                part = data[at : at + left]
                parts.append(part)
                at += len(part)
                left -= len(part)
                if left:
                    break
                self._owes_crlf = True
            if self._owes_crlf:
                if size - at < 2:
                    break
                if data[at : at + 2] != b"\r\n":
                    raise NotHTTP("a chunk of it is longer than announced")
                at += 2
                self._owes_crlf = False
            end = data.find(b"\r\n", at)
            if (size if end < 0 else end) - at > MAX_CHUNK_LINE:
                raise NotHTTP("the line before a chunk is too long")
            if end < 0:
                break
            match = _SIZE.fullmatch(data, at, end)
            if match is None:
                raise NotHTTP("the size of a chunk is malformed")
            at = end + 2
            left = int(match[1], 16)
            if not left:
                self._trailer_size = 0
        self._left = left
        if self._trailer_size is not None:
            at = self._skip_trailers(data, at)
        self._buffer = data[at:]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _skip_trailers(self, data: bytes, at: int) -> int:
        while (end := data.find(b"\r\n", at)) >= 0:
            if end == at:
                self.ended = True
                if len(data) > end + 2:
                    self.reusable = False
                return end + 2
            if _TRAILER.fullmatch(data, at, end) is None:
                raise NotHTTP("a trailer of it is malformed")
            self._trailer_size = (self._trailer_size or 0) + end - at
            at = end + 2
        if (self._trailer_size or 0) + len(data) - at > MAX_HEAD:
            raise NotHTTP("its trailers are too long")
        return at

    def eof(self) -> None:
        """The connection ended.

        Raises:
            ConnectionLost: before the answer did.
        """
        self.reusable = False
        if self.ended:
            return
        if not self.status or self._chunked or self._left is not None:
            raise ConnectionLost(silent=self.silent)
        self.ended = True
