"""Any httpx transport as a sender: those that users give as `transport=`, and those for proxies."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import httpx

from fluxibly.providers.http._exchange import joined
from fluxibly.providers.http._limits import DRAIN_TIME, LimitPassed, Limits
from fluxibly.providers.http._sockets import shut_down
from fluxibly.providers.http._sockets_loops import from_anywhere

if TYPE_CHECKING:
    from fluxibly.providers.http._exchange import Outgoing


class _Exchange(Protocol):
    async def release(self, *, ended: bool) -> None: ...
    def cut(self) -> None: ...


E = TypeVar("E", bound=_Exchange)
K = TypeVar("K")
V = TypeVar("V")
KEPT = 32
"""How many different paths and sets of headers are kept parsed."""


class _Requests:
    """Makes httpx requests, and keeps of them what is the same for each call: parsing it anew costs a call's worth."""

    def __init__(self) -> None:
        self._urls: dict[bytes, httpx.URL] = {}
        self._headers: dict[tuple[tuple[bytes, bytes], ...], httpx.Headers] = {}

    def make(self, outgoing: Outgoing, limits: Limits) -> httpx.Request:
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
        return httpx.Request("POST", url, headers=headers, content=outgoing.body, extensions=extensions)


def keep(kept: dict[K, V], key: K, value: V) -> None:
    """Put a value by, unless there are many: paths and headers are few, but some may change with each call."""
    if len(kept) < KEPT:
        kept[key] = value


def end_connection(response: httpx.Response) -> None:
    """End the connection under a read, whoever is in it."""
    stream: Any = response.extensions.get("network_stream")
    connection = None if stream is None else stream.get_extra_info("socket")
    if isinstance(connection, socket.socket):
        shut_down(connection)
    elif connection is not None:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)  # asyncio's and trio's wrappers have this too


class HTTPXExchange:
    """One request and its answer over an `httpx.BaseTransport`, which blocks.

    Each read may take what the limits leave; the total is looked at between reads.
    """

    def __init__(self, response: httpx.Response, limits: Limits) -> None:
        self._limits = limits
        self._response = response
        self.status = response.status_code
        self.headers = joined(response.headers.raw)
        self._parts: Iterator[bytes] = iter(response.stream)  # type: ignore[arg-type]  # a sync transport's

    async def read(self) -> bytes:
        """The next bytes of the body, at least one; b"" at its end."""
        self._limits.left()
        for part in self._parts:
            if part:
                return part
            self._limits.left()
        return b""

    async def release(self, *, ended: bool) -> None:  # what is unread is the transport's matter
        """Give the connection back."""
        self._response.stream.close()  # type: ignore[union-attr]  # a sync transport's

    def cut(self) -> None:
        """End a read in another thread."""
        end_connection(self._response)


class HTTPXSender:
    """Sends requests over an `httpx.BaseTransport`."""

    def __init__(self, transport: httpx.BaseTransport) -> None:
        self._transport = transport
        self._requests = _Requests()

    async def send(self, outgoing: Outgoing, limits: Limits) -> HTTPXExchange:
        """Send a request and wait for the head of its answer, which nothing but the transport's limits ends."""
        request = self._requests.make(outgoing, limits)
        limits.handed_over()
        exchange = HTTPXExchange(self._transport.handle_request(request), limits)
        limits.answered()
        return await begun(exchange, limits)

    async def close(self) -> None:
        self._transport.close()


class AsyncHTTPXExchange:
    """A `HTTPXExchange` over an `httpx.AsyncBaseTransport`. Every wait is cut off when its limit passes."""

    def __init__(self, response: httpx.Response, limits: Limits) -> None:
        self._response = response
        self._limits = limits
        self.status = response.status_code
        self.headers = joined(response.headers.raw)
        self._parts: AsyncIterator[bytes] = aiter(response.stream)  # type: ignore[arg-type]  # an async transport's

    async def read(self) -> bytes:
        """The next bytes of the body, at least one; b"" at its end."""
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
        """Close the connection, between reads."""
        end_connection(self._response)


class AsyncHTTPXSender:
    """Sends requests over an `httpx.AsyncBaseTransport`."""

    def __init__(self, transport: httpx.AsyncBaseTransport) -> None:
        self._transport = transport
        self._requests = _Requests()

    async def send(self, outgoing: Outgoing, limits: Limits) -> AsyncHTTPXExchange:
        """Send a request and wait for the head of its answer."""
        import anyio

        request = self._requests.make(outgoing, limits)
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
    """An exchange whose head has come, unless the call was given up meanwhile."""
    try:
        limits.waits(exchange.cut)
    except BaseException:
        await exchange.release(ended=False)
        raise
    return exchange
