"""The readers of responses: a whole body, checked and bounded, and the chunks of a stream."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from fluxibly.aggregate import as_chunks
from fluxibly.errors import ProviderError, StreamProtocolError
from fluxibly.providers.dialects.framing import make_framing
from fluxibly.providers.dialects.json_values import REPAIRS, is_utf8
from fluxibly.providers.http._encodings import MAX_BODY, MAX_ERROR_BODY, decoded, decoders_for
from fluxibly.providers.http._exchange import with_header_facts
from fluxibly.providers.http._limits import LeashedLimits
from fluxibly.types import Chunk

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from fluxibly.providers.dialects.codec import Event
    from fluxibly.providers.http._endpoint import Endpoint
    from fluxibly.providers.http._exchange import Exchange
    from fluxibly.providers.http._limits import Limits
    from fluxibly.types import Request


class ReplyBody:
    """The body of a response: checked against its content-length, decompressed, and bounded."""

    __slots__ = ("_decoders", "_due", "_size", "got", "limit", "packed", "pieces")

    def __init__(self, headers: Mapping[str, str], *, limit: int = MAX_BODY) -> None:
        encoding = headers.get("content-encoding")
        self._decoders = decoders_for(encoding) if encoding else []
        self.packed = bool(self._decoders)
        length = headers.get("content-length", "")
        self._due = int(length) if length.isascii() and length.isdigit() else None
        if "transfer-encoding" in headers:
            self._due = None
        self.got = self._size = 0
        self.limit = limit
        self.pieces: list[bytes] = []

    def decode(self, data: bytes) -> Iterable[bytes]:
        """Return the next bytes decompressed, in bounded pieces."""
        self.got += len(data)
        return decoded(self._decoders, data) if self._decoders else (data,)

    def end(self) -> None:
        """Check that the body is complete.

        Raises:
            StreamProtocolError: bytes are missing.
        """
        if self._due is not None and self.got < self._due:
            raise StreamProtocolError(f"expected a body of {self._due:,} bytes, got {self.got:,}: it was cut off")
        for decoder in self._decoders:
            decoder.end()

    def add(self, data: bytes) -> None:
        """Decompress the next bytes and keep them for `whole`."""
        for piece in self.decode(data):
            self.keep(piece)

    def keep(self, piece: bytes) -> None:
        """Keep a decompressed piece.

        Raises:
            StreamProtocolError: the body is over the limit.
        """
        self._size += len(piece)
        if self._size > self.limit:
            raise StreamProtocolError(f"expected a body of at most {self.limit:,} bytes, got more", retryable=False)
        self.pieces.append(piece)

    def whole(self) -> bytes:
        """Return the whole body.

        Raises:
            StreamProtocolError: the body was cut off.
        """
        self.end()
        return b"".join(self.pieces)


class ReplyReader:
    """A decoder of a stream's bytes into chunks. Chunks before an error are delivered before the error.

    `chunks` are ready for the consumer. `ended`: nothing more is to be read. `failure`: the error to raise after the
    chunks, if there is an error. `rest`: the part of compressed bytes that is not decompressed yet.
    """

    __slots__ = (
        "_body",
        "_decoder",
        "_endpoint",
        "_framing",
        "_headers",
        "_limits",
        "_noted",
        "_repairs",
        "_whole",
        "chunks",
        "ended",
        "failure",
        "rest",
    )

    def __init__(self, endpoint: Endpoint, headers: Mapping[str, str], limits: Limits) -> None:
        endpoint.check_page(headers)
        self._endpoint = endpoint
        codec = endpoint.codec
        self._headers = headers
        self._limits = limits
        self._body = ReplyBody(headers)
        self._framing = make_framing(codec.framing)
        self._decoder = codec.decoder()
        media_type = headers.get("content-type", "").lower().partition(";")[0].strip()
        # None: the content type is JSON although events were expected. The first character then decides.
        self._whole = None if media_type == "application/json" and codec.framing != "ndjson" else False
        self._noted = False
        self._repairs: int | None = REPAIRS.count
        """The number of repaired texts so far; None once this answer's are logged."""
        self.chunks: deque[Chunk] = deque()
        self.ended = False
        self.failure: Exception | None = None
        self.rest: Iterator[bytes] | None = None

    @property
    def done(self) -> bool:
        """Whether the stream is complete, so that at most the end of the HTTP body is unread."""
        return self.ended and self.failure is None

    def feed(self, data: bytes) -> None:
        """Decode the next bytes; b"" is their end."""
        try:
            if not data:
                self._end()
            elif self._body.packed:
                self.rest = iter(self._body.decode(data))
                self._unpack(self.rest)
            else:
                self._body.got += len(data)
                self._take(data)
        except Exception as error:  # noqa: BLE001  # raised after the chunks before it
            self._fail(error)

    def go_on(self) -> None:
        """Decode more of the `rest`."""
        try:
            if self.rest is not None:
                self._limits.left()
                self._unpack(self.rest)
        except Exception as error:  # noqa: BLE001  # raised after the chunks before it
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.failure = error
        self.ended = True

    def _unpack(self, rest: Iterator[bytes]) -> None:
        """Take one piece of the rest. A few bytes may expand to more chunks than fit in memory."""
        piece = next(rest, None)
        if piece is None:
            self.rest = None
        else:
            self._take(piece)

    def _take(self, piece: bytes) -> None:
        if self._whole is not False:
            self._put_by(piece)
            return
        decoder = self._decoder
        events = self._framing.feed(piece)
        for event in events:
            self._decode(event)
            if decoder.done:
                self.ended = True
                break
        if self.chunks:
            self._limits.end = None
        elif events or self._framing.kept_alive:
            self._limits.kept_alive()
        if REPAIRS.count != self._repairs:
            self._note_repairs(events)

    def _note_repairs(self, events: Iterable[Event]) -> None:
        """Log invalid UTF-8, if it was in these events, and not in those of another stream."""
        if self._repairs is None:
            return
        self._repairs = REPAIRS.count
        if not all(is_utf8(event.data) for event in events):
            self._repairs = None
            self._endpoint.log_repair()

    def _decode(self, event: Event) -> None:
        try:
            self._deliver(self._decoder.decode_event(event))
            return
        except ProviderError as error:
            failure = error
        raise self._endpoint.event_error(event, failure)

    def _deliver(self, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            if not self._noted:
                self._noted = True
                self.chunks.append(with_header_facts(chunk, self._headers))
            else:
                self.chunks.append(chunk)

    def _put_by(self, piece: bytes) -> None:
        """Keep a piece of a body that may be JSON, until its first character decides."""
        body = self._body
        body.keep(piece)
        if self._whole is None and (start := piece.lstrip()):
            self._whole = start[0] in b"{["
            if not self._whole:
                piece = b"".join(body.pieces)
                body.pieces.clear()
                self._take(piece)
        elif self._whole is None:
            self._limits.kept_alive()  # white space keeps the connection alive while the answer is being made

    def _end(self) -> None:
        if self._whole is False:
            self._body.end()
            events = self._framing.close()
            for event in events:
                self._decode(event)
            self._deliver(self._decoder.end())
            if REPAIRS.count != self._repairs:
                self._note_repairs(events)
        else:
            self._deliver(as_chunks(self._endpoint.decoded(self._body.whole())))
        self.ended = True


class LeashedReader(ReplyReader):
    """A reader of a stream whose limits depend on which of its chunks have output."""

    __slots__ = ("_leashed",)

    def __init__(self, endpoint: Endpoint, headers: Mapping[str, str], limits: LeashedLimits) -> None:
        super().__init__(endpoint, headers, limits)
        self._leashed = limits

    def _take(self, piece: bytes) -> None:
        super()._take(piece)
        if self.chunks:
            self._leashed.came(output=any(chunk.has_output for chunk in self.chunks))


def reader_of(endpoint: Endpoint, headers: Mapping[str, str], limits: Limits) -> ReplyReader:
    """Return the reader of a stream."""
    if isinstance(limits, LeashedLimits):
        return LeashedReader(endpoint, headers, limits)
    return ReplyReader(endpoint, headers, limits)


async def refusal(endpoint: Endpoint, exchange: Exchange, request: Request, limits: Limits) -> ProviderError:
    """Return the error of a non-2xx response, from the part of its body that arrives."""
    limits.refused()
    pieces: list[bytes] = []
    try:
        body = ReplyBody(exchange.headers, limit=MAX_ERROR_BODY)
        pieces = body.pieces
        while data := await exchange.read():
            body.add(data)
    except Exception:  # noqa: BLE001, S110  # the status alone is enough for an error
        pass
    return endpoint.refuse(exchange.status, exchange.headers, b"".join(pieces), request)
