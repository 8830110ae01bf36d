"""Senders over httpx transports: the transports that users pass as `transport=`, and httpx's own."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import httpx

from fluxibly._loops import from_anywhere
from fluxibly.providers.http._exchange import FileBody, joined
from fluxibly.providers.http._limits import DRAIN_TIME, LimitPassed, Limits
from fluxibly.providers.http._network_errors import note_address
from fluxibly.providers.http._sockets import shut_down

if TYPE_CHECKING:
    from fluxibly.providers.http._exchange import Outgoing


class _Exchange(Protocol):
    async def release(self, *, ended: bool) -> None: ...
    def cut(self) -> None: ...


E = TypeVar("E", bound=_Exchange)
K = TypeVar("K")
V = TypeVar("V")
KEPT = 32
"""Maximum number of different paths, and of sets of headers, that are kept parsed."""


class _Requests:
    """A maker of httpx requests. It keeps parsed URLs and headers, because parsing them costs as much as a call."""

    def __init__(self) -> None:
        self._urls: dict[bytes, httpx.URL] = {}
        self._headers: dict[tuple[tuple[bytes, bytes], ...], httpx.Headers] = {}

    def make(
        self, outgoing: Outgoing, limits: Limits, *, content: Callable[[FileBody], Any] = FileBody.pieces
    ) -> httpx.Request:
        """Return a request. `content` makes of a file what the transport reads."""
        limits.left()
        url = self._urls.get(outgoing.target)
        if url is None:
            url = outgoing.url.copy_with(raw_path=outgoing.target)
            keep(self._urls, outgoing.target, url)
        headers = self._headers.get(outgoing.headers)
        if headers is None:
            headers = httpx.Headers(outgoing.headers)
            keep(self._headers, outgoing.headers, headers)
        extensions = {"timeout": limits.for_httpx()}
        body: Any = outgoing.body
        if outgoing.file is not None:
            headers = httpx.Headers([*outgoing.headers, (b"content-length", b"%d" % outgoing.file.size)])
            body = content(outgoing.file)
        return httpx.Request(outgoing.method, url, headers=headers, content=body, extensions=extensions)


async def _pieces(file: FileBody) -> AsyncIterator[bytes]:
    for piece in file.pieces():
        yield piece


def keep(kept: dict[K, V], key: K, value: V) -> None:
    """Keep a value, up to a limit: paths and headers are usually few, but may be different in each call."""
    if len(kept) < KEPT:
        kept[key] = value


def end_connection(response: httpx.Response) -> None:
    """End the connection of a response, and with it a read in any thread or task."""
    stream: Any = response.extensions.get("network_stream")
    connection = None if stream is None else stream.get_extra_info("socket")
    if isinstance(connection, socket.socket):
        shut_down(connection)
    elif connection is not None:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)  # the wrappers of asyncio and trio have this method too


class HTTPXExchange:
    """A request and its response over an `httpx.BaseTransport`, which blocks.

    httpx limits each read on its own. The total limit is checked between reads.
    """

    def __init__(self, response: httpx.Response, limits: Limits) -> None:
        self._limits = limits
        self._response = response
        self.status = response.status_code
        self.headers = joined(response.headers.raw)
        self._parts: Iterator[bytes] = iter(response.stream)  # type: ignore[arg-type]  # a sync transport's

    async def read(self) -> bytes:
        """Return the next bytes of the body, at least one byte; b"" at its end."""
        self._limits.left()
        for part in self._parts:
            if part:
                return part
            self._limits.left()
        return b""

    async def release(self, *, ended: bool) -> None:  # the transport handles an unread rest of the body
        """Give the connection back."""
        self._response.stream.close()  # type: ignore[union-attr]  # a sync transport's

    def cut(self) -> None:
        """End a read in another thread."""
        end_connection(self._response)


class HTTPXSender:
    """A sender over an `httpx.BaseTransport`, whose own limits restart with every byte."""

    obeys = False

    def __init__(self, transport: httpx.BaseTransport) -> None:
        self._transport = transport
        self._requests = _Requests()

    async def send(self, outgoing: Outgoing, limits: Limits) -> HTTPXExchange:
        """Send a request and wait for the head of its response. Only the transport's limits end that wait."""
        request = self._requests.make(outgoing, limits)
        limits.handed_over()
        try:
            response = self._transport.handle_request(request)
        except httpx.ConnectError as error:
            note_address(error, request.url.host)
            raise
        exchange = HTTPXExchange(response, limits)
        limits.answered()
        # httpx reads this when the first part of the body is asked for.
        request.extensions["timeout"]["read"] = limits.body_for_httpx()
        return await begun(exchange, limits)

    async def close(self) -> None:
        self._transport.close()


class AsyncHTTPXExchange:
    """An `HTTPXExchange` over an `httpx.AsyncBaseTransport`. Each wait is cancelled when its limit passes."""

    def __init__(self, response: httpx.Response, limits: Limits) -> None:
        self._response = response
        self._limits = limits
        self.status = response.status_code
        self.headers = joined(response.headers.raw)
        self._parts: AsyncIterator[bytes] = aiter(response.stream)  # type: ignore[arg-type]  # an async transport's

    async def read(self) -> bytes:
        """Return the next bytes of the body, at least one byte; b"" at its end."""
        import anyio

        limits = self._limits
        while True:
            with anyio.move_on_after(limits.left()) as scope:
                limits.waits(from_anywhere(scope.cancel))
                part = await anext(self._parts, None)
                limits.waits(self.cut)
                if part is None:
                    return b""
                if part:
                    return part
                continue
            raise LimitPassed

    async def release(self, *, ended: bool) -> None:
        """Give the connection back."""
        import anyio

        if ended:
            with anyio.move_on_after(DRAIN_TIME):
                while await anext(self._parts, None) is not None:
                    pass
        with anyio.CancelScope(shield=True):
            close = getattr(self._parts, "aclose", None)
            if close is not None:
                await close()
            await self._response.stream.aclose()  # type: ignore[union-attr]  # an async transport's

    def cut(self) -> None:
        """End the connection, between reads."""
        end_connection(self._response)


class AsyncHTTPXSender:
    """A sender over an `httpx.AsyncBaseTransport`."""

    obeys = True

    def __init__(self, transport: httpx.AsyncBaseTransport) -> None:
        self._transport = transport
        self._requests = _Requests()

    async def send(self, outgoing: Outgoing, limits: Limits) -> AsyncHTTPXExchange:
        """Send a request and wait for the head of its response."""
        import anyio

        request = self._requests.make(outgoing, limits, content=_pieces)
        limits.handed_over()
        with anyio.move_on_after(limits.left()) as scope:
            limits.waits(from_anywhere(scope.cancel))
            exchange = AsyncHTTPXExchange(await self._transport.handle_async_request(request), limits)
            limits.answered()
            return await begun(exchange, limits)
        raise LimitPassed

    async def close(self) -> None:
        await self._transport.aclose()


async def begun(exchange: E, limits: Limits) -> E:
    """Return an exchange whose head has arrived. Release it if the call was aborted meanwhile."""
    try:
        limits.waits(exchange.cut)
    except BaseException:
        await exchange.release(ended=False)
        raise
    return exchange
