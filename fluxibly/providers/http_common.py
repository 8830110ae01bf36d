"""What the two HTTP shells share: all that needs no I/O.

An `Endpoint` is one service as one configuration reaches it. It makes the bytes of a request, turns the bytes of an
answer into a response (`Body`) or chunks (`Intake`), and every error into one that users catch.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

import attrs
import httpx

from fluxibly.aggregate import as_chunk
from fluxibly.config import LLMConfig, Timeouts
from fluxibly.errors import AuthenticationError, BadRequest, ConfigError, ProviderError, StreamProtocolError
from fluxibly.masking import mask_secrets
from fluxibly.providers import http_errors
from fluxibly.providers.body import MAX_BODY, accept_encoding, decoded, decoders_for
from fluxibly.providers.codec import Codec, Encoded, Service
from fluxibly.providers.framing import make_framing
from fluxibly.providers.limits import Limits
from fluxibly.types import Chunk, ProviderInfo, Request, Response

T = TypeVar("T", Response, Chunk)
REQUEST_IDS = ("x-request-id", "request-id", "apim-request-id")
_RATE_LIMIT = re.compile(r"(x-|anthropic-)?ratelimit-|retry-after")
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_KEPT_HEADERS = 32


class Outgoing(NamedTuple):
    """A request as bytes. `block` is `headers` as they stand on the wire, save for content-length."""

    url: httpx.URL
    target: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    block: bytes
    body: bytes


class _Headers(NamedTuple):
    pairs: tuple[tuple[bytes, bytes], ...]
    block: bytes
    names: frozenset[bytes]


def _as_headers(pairs: Iterable[tuple[bytes, bytes]]) -> _Headers:
    pairs = tuple(pairs)
    block = b"".join([b"%b: %b\r\n" % pair for pair in pairs])
    return _Headers(pairs, block, frozenset(name for name, _ in pairs))


def _header(name: str, value: str) -> tuple[bytes, bytes]:
    """One header of a request, checked so that it cannot begin another."""
    try:
        raw = value.encode("ascii")
    except UnicodeEncodeError:
        raw = value.encode("utf-8")
    if not _TOKEN.fullmatch(name) or any(byte < 32 and byte != 9 for byte in raw):
        raise BadRequest(f"the header {name!r} cannot be sent: its name or value has characters that HTTP forbids")
    return name.lower().encode("ascii"), raw.strip()


class Endpoint:
    """A service as one `LLMConfig` reaches it. Immutable, and shared by all calls."""

    def __init__(self, codec: Codec, service: Service, config: LLMConfig, *, name: str) -> None:
        self.codec = codec
        self.service = service
        self.url = _base_url(service, config)
        self.base_path = self.url.raw_path.partition(b"?")[0].rstrip(b"/")
        self.base_query = self.url.query
        self._key = _api_key(service, config)
        self.secrets = (self._key,) if self._key else ()
        self.times: Timeouts = config.timeouts
        self.stream_total = config.timeout.total if isinstance(config.timeout, Timeouts) else None
        self.host = self.url.host
        self.port = self.url.port or (443 if self.url.scheme == "https" else 80)
        self.info = ProviderInfo(
            name=name,
            framework=service.framework,
            telemetry_name=service.telemetry_name,
            server_address=self.host,
            server_port=self.port,
        )
        self._prepared: dict[tuple[tuple[str, str], ...], _Headers] = {}

    def limits(self, *, stream: bool) -> Limits:
        return Limits(self.times, total=self.stream_total if stream else self.times.total, streaming=stream)

    # Requests

    def outgoing(self, request: Request, *, stream: bool) -> Outgoing:
        """The bytes to send.

        Raises:
            BadRequest: the codec cannot say this, or a header is none.
        """
        try:
            encoded = self.codec.encode(request, stream=stream)
            headers = self._headers(encoded)
            if request.headers:
                headers = _with(headers, [_header(*pair) for pair in request.headers.items()])
            target = self._target(encoded.path)
        except ProviderError as error:
            raise self.adopted(error, request) from error.__cause__
        return Outgoing(self.url, target, headers.pairs, headers.block, encoded.body)

    def _target(self, path: str) -> bytes:
        path, _, query = path.partition("?")
        try:
            target = self.base_path + b"/" + path.lstrip("/").encode("ascii")
            queries = [part for part in (self.base_query, query.encode("ascii")) if part]
        except UnicodeEncodeError:
            raise BadRequest(f"the path {path!r} is not ASCII") from None
        if queries:
            target += b"?" + b"&".join(queries)
        if any(byte <= 32 or byte == 127 for byte in target):
            raise BadRequest(f"the path {path!r} has characters that a URL cannot have")
        return target

    def _headers(self, encoded: Encoded) -> _Headers:
        headers = self._prepared.get(encoded.headers)
        if headers is None:
            authority = self.url.netloc
            own = [
                (b"host", authority),
                (b"accept", b"*/*"),
                (b"accept-encoding", accept_encoding().encode("ascii")),
                (b"user-agent", b"fluxibly"),
                (b"content-type", b"application/json"),
            ]
            service = [_header(*pair) for pair in self.service.headers]
            if self._key:
                value = self.service.auth_prefix + self._key
                service.append((self.service.auth_header.lower().encode("ascii"), value.encode("ascii")))
            headers = _with(_with(_as_headers(own), service), [_header(*pair) for pair in encoded.headers])
            if len(self._prepared) < _KEPT_HEADERS:
                self._prepared[encoded.headers] = headers
        return headers

    # Answers

    def refuse(self, status: int, headers: Mapping[str, str], body: bytes, request: Request) -> ProviderError:
        """The error of an answer that is none of 2xx."""
        if status < 400:
            return self.adopted(http_errors.redirected(status, headers), request, headers)
        error = self.codec.decode_error(status, headers, body)
        if error.status is None:
            error.status = status
        return self.adopted(error, request, headers)

    def check_page(self, headers: Mapping[str, str]) -> None:
        """Raise StreamProtocolError for a web page: the sign of a wrong address, or of a proxy in between."""
        if headers.get("content-type", "").lower().startswith("text/html"):
            raise StreamProtocolError(
                "the server answered with a web page (text/html): check api_base, and what stands in between",
                retryable=False,
            )

    def response(self, headers: Mapping[str, str], body: bytes) -> Response:
        """The response of a whole 2xx answer."""
        self.check_page(headers)
        return _noted(self.codec.decode(body), headers)

    def adopted(
        self, error: ProviderError, request: Request, headers: Mapping[str, str] | None = None
    ) -> ProviderError:
        """`error` with who was asked for what filled in, and the API key masked."""
        error.provider = error.provider or self.service.framework
        error.model = error.model or request.model
        if headers is not None and error.request_id is None:
            error.request_id = _request_id(headers)
        if self.secrets:
            error.args = tuple(mask_secrets(a, self.secrets) if isinstance(a, str) else a for a in error.args)
            if error.body:
                error.body = mask_secrets(error.body, self.secrets)
        return error

    def failure(
        self, error: Exception, request: Request, limits: Limits, headers: Mapping[str, str] | None
    ) -> Exception:
        """What the caller gets for an exception of ours, of a socket's or of httpx's; others are passed on as they are."""
        translated = http_errors.translated(error, self, limits)
        if translated is None:
            return error
        return self.adopted(translated, request, headers)


def _with(headers: _Headers, more: list[tuple[bytes, bytes]]) -> _Headers:
    """`headers` with `more`, which win over those of their names."""
    names = {name for name, _ in more}
    if names.isdisjoint(headers.names):
        block = b"".join([headers.block, *[b"%b: %b\r\n" % pair for pair in more]])
        return _Headers((*headers.pairs, *more), block, headers.names | names)
    return _as_headers([pair for pair in headers.pairs if pair[0] not in names] + more)


def _base_url(service: Service, config: LLMConfig) -> httpx.URL:
    base = config.api_base or service.base_url
    if not base:
        raise ConfigError(f"{service.framework} has no address of its own: set api_base to the server's base URL")
    try:
        url = httpx.URL(base)
    except (httpx.InvalidURL, TypeError) as error:
        raise ConfigError(f"api_base is not a URL: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError("api_base has to begin with http:// or https:// and name a host")
    if url.userinfo:
        raise ConfigError("api_base must not hold a user name or password; a key goes into api_key")
    return url


def _api_key(service: Service, config: LLMConfig) -> str | None:
    """The API key, fit for a header.

    Raises:
        AuthenticationError: it is missing or malformed. The message never shows it.
    """
    source = "api_key"
    key = config.api_key.reveal() if config.api_key is not None else None
    if not key and service.env_var:
        source = f"the environment variable {service.env_var}"
        key = os.environ.get(service.env_var)
    if not key:
        if not service.key_required:
            return None
        how = f"set {source}, or api_key in the config" if service.env_var else "set api_key in the config"
        raise AuthenticationError(f"{service.framework} needs an API key: {how}", provider=service.framework)
    if key != key.strip():
        problem = "begins or ends with white space (a newline from a file, perhaps)"
    elif not key.isascii():
        problem = "has characters outside of ASCII"
    elif not key.isprintable():
        problem = "has control characters (a newline, perhaps)"
    else:
        return key
    raise AuthenticationError(f"the API key in {source} {problem}", provider=service.framework)


# Answers


def _request_id(headers: Mapping[str, str]) -> str | None:
    for name in REQUEST_IDS:
        if name in headers:
            return headers[name]
    return None


def _noted(item: T, headers: Mapping[str, str]) -> T:
    """A response, or a stream's first chunk, with what the headers say."""
    request_id = _request_id(headers)
    limits = {name: value for name, value in headers.items() if _RATE_LIMIT.match(name)}
    if isinstance(item, Response):
        if request_id or limits:
            return item.evolve(request_id=item.request_id or request_id, rate_limits={**limits, **item.rate_limits})
        return item
    if request_id or limits:
        return attrs.evolve(
            item, request_id=item.request_id or request_id, rate_limits=item.rate_limits or limits or None
        )
    return item


class Body:
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


class Intake:
    """A stream's bytes into chunks. What came before an error is delivered before it.

    `chunks` are those ready for the consumer. `ended` says that nothing more is to be read; then `failure`, if there
    is one, is due after them.
    """

    __slots__ = (
        "_body",
        "_codec",
        "_decoder",
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
        codec = self._codec = endpoint.codec
        self._headers = headers
        self._body = Body(headers)
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
            self._deliver(decoder.decode_event(event))
            if decoder.done:
                self.ended = True
                return

    def _deliver(self, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            if not self._noted:
                self._noted = True
                self.chunks.append(_noted(chunk, self._headers))
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
                self._deliver(self._decoder.decode_event(event))
            self._deliver(self._decoder.end())
        else:
            self._deliver([as_chunk(self._codec.decode(self._body.whole()))])
        self.ended = True
