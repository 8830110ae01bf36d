"""HTTP/1.1 (RFC 9112) without sockets: a writer of requests and a parser of responses.

httpx's own stack spends two thirds of a local call outside of the socket, and h11 alone 7 to 9 µs for each chunk of a
stream. A client has to read little: a head, and a body that has a length, is chunked, or ends with the connection. The
parser raises `NotHTTP` for everything that is not plainly valid, and the connection is not used again.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from fluxibly.providers.http._limits import ConnectionLost, NotHTTP

if TYPE_CHECKING:
    from fluxibly.providers.http._exchange import Outgoing
    from fluxibly.providers.http._route import Route

# The limits keep a broken or hostile server from filling memory, or from sending a head without end.
MAX_HEAD = 128 * 1024
"""Maximum number of bytes of a head, and of the trailers."""
MAX_FIELDS = 1000
"""Maximum number of headers of a response."""
MAX_CHUNK_LINE = 16 * 1024
"""Maximum number of bytes of the line before a chunk, with its extensions."""
MAX_INTERIM = 16
"""Maximum number of interim responses (1xx) before the final response."""

# The grammar is strict, because a proxy that reads the same bytes differently could see two responses in one.
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [^\r\n]*)?\r?\n")
# White space before the colon (RFC 9112 §5.1), a bare CR (§2.2) and NUL are refused, because parsers differ about them.
_FIELD = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\r\n\0]*"
# Lines of the head may end with LF alone, as RFC 9112 §2.2 allows.
_FIELDS = re.compile(rb"(?:" + _FIELD + rb"\r?\n)*")
_TRAILER = re.compile(_FIELD)
_FOLD = re.compile(rb"\r?\n[ \t]+")
_BLANK = re.compile(rb"\n\r?\n")
# At most 15 digits, and digits only, because `int` would also accept signs, underscores and white space.
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?")


def request_bytes(outgoing: Outgoing, route: Route) -> bytes:
    """Return a request as it is sent, without its file. Target and headers were checked when they were made (`_endpoint.py`)."""
    extra = b"".join([b"%b: %b\r\n" % header for header in route.headers]) if route.headers else b""
    if outgoing.method == "GET":
        return b"GET %b%b HTTP/1.1\r\n%b%b\r\n" % (route.prefix, outgoing.target, outgoing.block, extra)
    return b"POST %b%b HTTP/1.1\r\n%b%bcontent-length: %d\r\n\r\n%b" % (
        route.prefix,
        outgoing.target,
        outgoing.block,
        extra,
        len(outgoing.body) if outgoing.file is None else outgoing.file.size,
        outgoing.body,
    )


class Answer:
    """A parser of one response. Feed it with `head` until `head` returns True, then with `body` until `ended`."""

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
        """Bytes left of a body with a length, or of the current chunk; None if the body ends with the connection."""
        self._owes_crlf = False
        self._trailer_size: int | None = None
        """Bytes of trailers so far; None before the last chunk."""
        self.status = 0
        self.headers: dict[str, str] = {}
        """The headers, with lower-case names. Repeated headers are joined by ", "."""
        self.ended = False
        self.reusable = False
        """Whether the connection may carry another request after this response."""

    @property
    def silent(self) -> bool:
        """Whether not a single byte has arrived."""
        return not self.status and not self._buffer and not self._interim

    # The head

    def head(self, data: bytes) -> bool:
        """Parse bytes. Return whether the final head is complete; `body(b"")` then returns the body bytes in `data`.

        Raises:
            NotHTTP: the bytes are not the head of an HTTP/1.x response.
        """
        # The blank line may be split between two reads.
        searched = max(0, len(self._buffer) - 3)
        self._buffer += data
        while True:
            buffer = self._buffer
            # Checked from the first byte, so that a server of another protocol fails at once, not at a time limit.
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
            # A server may send interim responses to any request (RFC 9110 §15.2), so they are skipped.
            self._interim += 1
            self.status = searched = 0
            if self._interim > MAX_INTERIM:
                raise NotHTTP(f"it has more than {MAX_INTERIM} interim responses")

    def _parse(self, head: bytes) -> None:
        status_line = _STATUS_LINE.match(head)
        if status_line is None:
            raise NotHTTP("its status line is malformed")
        fields = head[status_line.end() :]
        # A user agent must read a folded line as a space (RFC 9112 §5.2).
        if b"\n " in fields or b"\n\t" in fields:
            fields = _FOLD.sub(b" ", fields)
        if _FIELDS.fullmatch(fields) is None:
            raise NotHTTP("a header is malformed")
        self.status = int(status_line[2])
        if self.status == 101:
            raise NotHTTP("it switches to another protocol, which the request did not ask for")
        headers: dict[str, str] = {}
        lines = fields.decode("latin-1").split("\n")[:-1]
        if len(lines) > MAX_FIELDS:
            raise NotHTTP(f"expected at most {MAX_FIELDS:,} headers, got {len(lines):,}")
        for line in lines:
            name, _, value = line.partition(":")
            name = name.lower()
            value = value.strip(" \t\r")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        self.headers = headers
        # An interim response has no body (RFC 9110 §15.2): its headers say nothing about the final response.
        if self.status >= 200:
            self._measure(is_1_1=status_line[1] == b"1")

    def _measure(self, *, is_1_1: bool) -> None:
        """Determine how the body ends (RFC 9112 §6.3)."""
        # A connection is used again only if the end of the body is beyond doubt, because bytes of this body could
        # otherwise be read as the next response.
        headers = self.headers
        connection = headers.get("connection", "").lower()
        options = {option.strip() for option in connection.split(",")} if connection else ()
        self.reusable = "close" not in options and (is_1_1 or "keep-alive" in options)
        coding, length = headers.get("transfer-encoding"), headers.get("content-length")
        if self.status in (204, 304):
            self.ended = True
            # These have no body, whatever their headers say, but a server that announces a body may send it.
            self.reusable = self.reusable and coding is None and length in (None, "0")
        elif coding is not None:
            # Only "chunked" says where the body ends, and no other coding was asked for.
            if coding.lower() != "chunked":
                raise NotHTTP(f"expected the transfer-encoding chunked, got {coding!r}")
            # A length next to chunks may be response splitting (RFC 9112 §6.3); chunks in HTTP/1.0 are faulty (§6.1).
            self.reusable = self.reusable and is_1_1 and length is None
            self._chunked = True
            self._left = 0
        elif length is not None:
            # Equal lengths count as a single length; different lengths are an error (RFC 9112 §6.3).
            lengths = {part.strip() for part in length.split(",")}
            one = lengths.pop()
            if lengths or not (one.isascii() and one.isdigit() and len(one) < 16):
                raise NotHTTP(f"expected a valid content-length, got {length!r}")
            headers["content-length"] = one
            self._left = int(one)
            self.ended = self._left == 0
        else:
            # The end of the connection is the end of the body.
            self.reusable = False

    # The body

    def body(self, data: bytes) -> bytes:
        """Parse bytes. Return the part of the body in them, which may be empty.

        Raises:
            NotHTTP: the body is malformed.
        """
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        if self.ended:
            if data:
                self.reusable = False  # no request is waiting for these bytes
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
        """Return the data of all chunks in `data` as a single string (RFC 9112 §7.1)."""
        # A single string, so that the decoders run once per read instead of once per chunk.
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
            # The end of the line after a chunk may arrive in a later read than the chunk.
            if self._owes_crlf:
                if size - at < 2:
                    break
                if data[at : at + 2] != b"\r\n":
                    raise NotHTTP("a chunk is longer than its announced size")
                at += 2
                self._owes_crlf = False
            # Only CRLF ends this line, because RFC 9112 §2.2 allows LF alone for the start line and fields only.
            end = data.find(b"\r\n", at)
            if (size if end < 0 else end) - at > MAX_CHUNK_LINE:
                raise NotHTTP(f"the line before a chunk is longer than {MAX_CHUNK_LINE:,} bytes")
            if end < 0:
                break
            match = _SIZE.fullmatch(data, at, end)
            if match is None:
                raise NotHTTP("a chunk size is malformed")
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
        # Trailers are checked but not kept, because they may not simply be merged into the headers (RFC 9110 §6.5.1).
        while (end := data.find(b"\r\n", at)) >= 0:
            if end == at:
                self.ended = True
                if len(data) > end + 2:
                    self.reusable = False
                return end + 2
            if _TRAILER.fullmatch(data, at, end) is None:
                raise NotHTTP("a trailer is malformed")
            self._trailer_size = (self._trailer_size or 0) + end - at
            at = end + 2
        if (self._trailer_size or 0) + len(data) - at > MAX_HEAD:
            raise NotHTTP(f"its trailers are larger than {MAX_HEAD:,} bytes")
        return at

    def eof(self) -> None:
        """Handle the end of the connection.

        Raises:
            ConnectionLost: the response is incomplete.
        """
        self.reusable = False
        if self.ended:
            return
        # A body with a length or with chunks says where it ends, so an earlier end of the connection has cut it off.
        if not self.status or self._chunked or self._left is not None:
            raise ConnectionLost(silent=self.silent)
        self.ended = True
