"""A request and its response: the bytes to send, the received head, and the headers of both."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import BinaryIO, ClassVar, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

import attrs
import httpx

from fluxibly.errors import BadRequest
from fluxibly.providers.dialects.errors import request_id_of
from fluxibly.providers.http._limits import Limits
from fluxibly.types import Chunk, Response

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
"""The characters that a header's value may have (RFC 9110 §5.5)."""
_FRAMING = frozenset({"content-length", "transfer-encoding"})


class Authorizer(ABC):
    """Credentials that authorize each request by headers of its own, in place of a key. An authorizer does not change."""

    name: ClassVar[str] = "credentials"
    """The name of the credentials in errors."""

    @property
    @abstractmethod
    def secrets(self) -> tuple[str, ...]:
        """The values that no error may show."""

    @abstractmethod
    def authorize(
        self, url: str, headers: Mapping[str, str], body: bytes, *, method: str = "POST"
    ) -> Mapping[str, str]:
        """Return the headers that authorize a request. `headers` have lower-case names."""


Key: TypeAlias = str | Authorizer


PIECE = 256 * 1024
"""Bytes of a file that are sent at a time."""


class FileBody:
    """A body that is too large for memory: a file, with some bytes before and after it. It can be sent again."""

    def __init__(self, head: bytes, file: BinaryIO, tail: bytes) -> None:
        self._head, self._file, self._tail = head, file, tail
        self.size = len(head) + file.seek(0, 2) + len(tail)

    def pieces(self) -> Iterator[bytes]:
        """Yield the body from its beginning."""
        yield self._head
        self._file.seek(0)
        while piece := self._file.read(PIECE):
            yield piece
        yield self._tail


class Outgoing(NamedTuple):
    """A request as bytes. `block` is `headers` as they are sent; the content-length of a POST is added later.

    `key` authorizes the request; None if the call has an authorization of its own. A GET has no body. A `file` is sent in
    place of `body`. `once`: whether the request must not be sent again by itself, and takes a new connection for that.
    """

    url: httpx.URL
    target: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    block: bytes
    body: bytes
    key: Key | None = None
    method: Literal["POST", "GET"] = "POST"
    file: FileBody | None = None
    once: bool = False


class Headers(NamedTuple):
    pairs: tuple[tuple[bytes, bytes], ...]
    block: bytes
    names: frozenset[bytes]


def as_headers(pairs: Iterable[tuple[bytes, bytes]]) -> Headers:
    pairs = tuple(pairs)
    block = b"".join([b"%b: %b\r\n" % pair for pair in pairs])
    return Headers(pairs, block, frozenset(name for name, _ in pairs))


def header(name: str, value: str) -> tuple[bytes, bytes]:
    """Return a header of a request, checked: it cannot start a second header, and cannot set where the body ends.

    Raises:
        BadRequest: HTTP forbids the header's characters, or the header depends on the body.
    """
    if _TOKEN.fullmatch(name) is None or _VALUE.fullmatch(value) is None:
        raise BadRequest(f"the header {name!r} cannot be sent: its name or value has characters that HTTP forbids")
    name = name.lower()
    if name in _FRAMING:
        raise BadRequest(f"the header {name!r} cannot be set: its value depends on the body")
    return name.encode("ascii"), value.strip(" \t").encode("latin-1")


def with_more(headers: Headers, more: list[tuple[bytes, bytes]]) -> Headers:
    """Return `headers` with `more`, which replace headers of the same name."""
    names = {name for name, _ in more}
    if names.isdisjoint(headers.names):
        block = b"".join([headers.block, *[b"%b: %b\r\n" % pair for pair in more]])
        return Headers((*headers.pairs, *more), block, headers.names | names)
    return as_headers([pair for pair in headers.pairs if pair[0] not in names] + more)


class Exchange(Protocol):
    """A request that was sent, and its response, whose head has arrived."""

    @property
    def status(self) -> int: ...
    @property
    def headers(self) -> Mapping[str, str]:
        """The headers, with lower-case names."""
        ...

    async def read(self) -> bytes:
        """Return the next bytes of the body, at least one byte; b"" at its end."""
        ...

    async def release(self, *, ended: bool) -> None:
        """Release the connection. `ended`: at most the end of the body is unread."""
        ...


class Sender(Protocol):
    """The connections to a server. For threads, the coroutines of a sender never suspend.

    `obeys`: whether each wait ends when its limit passes.
    """

    @property
    def obeys(self) -> bool: ...

    async def send(self, outgoing: Outgoing, limits: Limits, /) -> Exchange: ...
    async def close(self) -> None: ...


# Headers of a response


def joined(headers: Iterable[tuple[bytes, bytes]]) -> Mapping[str, str]:
    """Return headers with lower-case names. Repeated headers are joined by ", "."""
    lower: dict[str, str] = {}
    for raw_name, raw_value in headers:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        lower[name] = f"{lower[name]}, {value}" if name in lower else value
    return lower


T = TypeVar("T", Response, Chunk)
_RATE_LIMIT = re.compile(r"(x-|anthropic-)?ratelimit-|retry-after|x-(trial-)?endpoint-(monthly-)?call-")


def rate_limits_of(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the rate-limit headers. Moments come with the server's own `date`, because the clocks may differ."""
    limits = {name: value for name, value in headers.items() if _RATE_LIMIT.match(name)}
    if "date" in headers and any(name.startswith("anthropic-") for name in limits):
        limits["date"] = headers["date"]
    return limits


def with_header_facts(item: T, headers: Mapping[str, str]) -> T:
    """Return a response, or a stream's first chunk, with the request id and the rate limits of the headers."""
    request_id = request_id_of(headers)
    limits = rate_limits_of(headers)
    if isinstance(item, Response):
        if request_id or limits:
            return item.evolve(request_id=item.request_id or request_id, rate_limits={**limits, **item.rate_limits})
        return item
    if request_id or limits:
        return attrs.evolve(
            item, request_id=item.request_id or request_id, rate_limits=item.rate_limits or limits or None
        )
    return item
