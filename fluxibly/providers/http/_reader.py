"""The bytes of an answer: a body, checked and bounded, and a stream's chunks."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from fluxibly.aggregate import as_chunk
from fluxibly.errors import ProviderError, StreamProtocolError
from fluxibly.providers.dialects.framing import make_framing
from fluxibly.providers.http._encodings import MAX_BODY, MAX_ERROR_BODY, decoded, decoders_for
from fluxibly.providers.http._exchange import with_header_facts
from fluxibly.types import Chunk

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fluxibly.providers.dialects.codec import Event
    from fluxibly.providers.http._endpoint import Endpoint
    from fluxibly.providers.http._exchange import Exchange
    from fluxibly.providers.http._limits import Limits
    from fluxibly.types import Request


class ReplyBody:
    """The bytes of an answer: checked against its length, decompressed, bounded."""

    __slots__ = ("_decoders", "_due", "_got", "_size", "limit", "pieces")

    def __init__(self, headers: Mapping[str, str], *, limit: int = MAX_BODY) -> None:
        encoding = headers.get("content-encoding")
        self._decoders = decoders_for(encoding) if encoding else []
        length = headers.get("content-length", "")
        self._due = int(length) if length.isascii() and length.isdigit() else None
        if "transfer-encoding" in headers:
            self._due = None
        self._got = self._size = 0
        self.limit = limit
        self.pieces: list[bytes] = []

    def decode(self, data: bytes) -> Iterable[bytes]:
        """What the next bytes stand for, in pieces that are bounded."""
        self._got += len(data)
        return decoded(self._decoders, data) if self._decoders else (data,)

    def end(self) -> None:
        """The bytes are over.

        Raises:
            StreamProtocolError: some are missing.
        """
        if self._due is not None and self._got < self._due:
            raise StreamProtocolError(f"the answer was cut off: {self._got} of {self._due} bytes came")
        if self._got:
            for decoder in self._decoders:
                decoder.end()

    def add(self, data: bytes) -> None:
        """Keep the next bytes, for `whole`."""
        for piece in self.decode(data):
            self.keep(piece)

    def keep(self, piece: bytes) -> None:
        """Keep a decoded piece.

        Raises:
            StreamProtocolError: they are too many.
        """
        self._size += len(piece)
        if self._size > self.limit:
            raise StreamProtocolError(f"the answer is larger than {self.limit:,} bytes", retryable=False)
        self.pieces.append(piece)

    def whole(self) -> bytes:
        """All of it.

        Raises:
            StreamProtocolError: it was cut off.
        """
        self.end()
        return b"".join(self.pieces)


class ReplyReader:
    """A stream's bytes into chunks. What came before an error is delivered before it.

    `chunks` are those ready for the consumer. `ended` says that nothing more is to be read; then `failure`, if there
    is one, is due after them.
    """

    __slots__ = (
        "_body",
        "_decoder",
        "_endpoint",
        "_framing",
        "_headers",
        "_noted",
        "_whole",
        "chunks",
        "ended",
        "failure",
    )

    def __init__(self, endpoint: Endpoint, headers: Mapping[str, str]) -> None:
        endpoint.check_page(headers)
        self._endpoint = endpoint
        codec = endpoint.codec
        self._headers = headers
        self._body = ReplyBody(headers)
        self._framing = make_framing(codec.framing)
        self._decoder = codec.decoder()
        media_type = headers.get("content-type", "").lower().partition(";")[0].strip()
        # None: it says that it is JSON where events are due; its first character tells.
        self._whole = None if media_type == "application/json" and codec.framing == "sse" else False
        self._noted = False
        self.chunks: deque[Chunk] = deque()
        self.ended = False
        self.failure: Exception | None = None

    @property
    def done(self) -> bool:
        """Whether the stream is over and whole: what is unread is no more than the end of the HTTP body."""
        return self.ended and self.failure is None

    def feed(self, data: bytes) -> None:
        """Take the next bytes in; b"" is their end."""
        try:
            if not data:
                self._end()
                return
            for piece in self._body.decode(data):
                if self._whole is False:
                    self._take(piece)
                else:
                    self._put_by(piece)
                if self.ended:
                    return
        except Exception as error:  # noqa: BLE001  # it is raised when the chunks before it are delivered
            self.failure = error
            self.ended = True

    def _take(self, piece: bytes) -> None:
        decoder = self._decoder
        for event in self._framing.feed(piece):
            self._decode(event)
            if decoder.done:
                self.ended = True
                return

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
        """Keep a piece of what may be one JSON body, until that is known."""
        body = self._body
        body.keep(piece)
        if self._whole is None and (start := piece.lstrip()):
            self._whole = start[0] in b"{["
            if not self._whole:
                piece = b"".join(body.pieces)
                body.pieces.clear()
                self._take(piece)

    def _end(self) -> None:
        if self._whole is False:
            self._body.end()
            for event in self._framing.close():
                self._decode(event)
            self._deliver(self._decoder.end())
        else:
            self._deliver([as_chunk(self._endpoint.decoded(self._body.whole()))])
        self.ended = True


async def refusal(endpoint: Endpoint, exchange: Exchange, request: Request, limits: Limits) -> ProviderError:
    """The error of an answer that is none of 2xx, from as much of its body as comes."""
    limits.refused()
    pieces: list[bytes] = []
    try:
        body = ReplyBody(exchange.headers, limit=MAX_ERROR_BODY)
        pieces = body.pieces
        while data := await exchange.read():
            body.add(data)
    except Exception:  # noqa: BLE001, S110  # the status is what counts
        pass
    return endpoint.refuse(exchange.status, exchange.headers, b"".join(pieces), request)
