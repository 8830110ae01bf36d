"""The ways to a server: what the shells ask of one, and which one a provider takes by default."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

import httpx

from fluxibly.providers.blocking import Threads
from fluxibly.providers.event_loops import Loops
from fluxibly.providers.pool import Pool
from fluxibly.providers.route import proxy_for, route_to, tls_context
from fluxibly.providers.slots import KEEP_IDLE, MAX_CONNECTIONS
from fluxibly.providers.transports import AsyncTransportLine, TransportLine

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fluxibly.providers.http_common import Endpoint, Outgoing
    from fluxibly.providers.limits import Limits
    from fluxibly.providers.sockets import Network

_LIMITS = httpx.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=None, keepalive_expiry=KEEP_IDLE)


class Exchange(Protocol):
    """A request that was sent, and its answer, whose head has come."""

    @property
    def status(self) -> int: ...
    @property
    def headers(self) -> Mapping[str, str]:
        """By their lower-case names."""
        ...

    async def read(self) -> bytes:
        """The next bytes of the body, at least one; b"" at its end."""
        ...

    async def release(self, *, ended: bool) -> None:
        """Let the connection go. `ended`: what is unread is no more than the end of the body."""
        ...


class Line(Protocol):
    """The way to a server: on an event loop, or one whose coroutines never suspend, for threads."""

    async def send(self, outgoing: Outgoing, limits: Limits, /) -> Exchange: ...
    async def close(self) -> None: ...


def default_line(endpoint: Endpoint) -> Line:
    """The provider's own connections, through the proxy that the environment names.

    Through httpx's, if somebody has wrapped them: opentelemetry-instrumentation-httpx, say, wants to see each request.
    """

    def over_httpx(proxy: httpx.Proxy | None) -> Line:
        return TransportLine(httpx.HTTPTransport(proxy=proxy, verify=tls_context(), limits=_LIMITS))

    return _default(endpoint, Threads(), over_httpx, instead=wrapped(httpx.HTTPTransport.handle_request))


def default_async_line(endpoint: Endpoint) -> Line:
    """`default_line` for event loops."""

    def over_httpx(proxy: httpx.Proxy | None) -> Line:
        return AsyncTransportLine(httpx.AsyncHTTPTransport(proxy=proxy, verify=tls_context(), limits=_LIMITS))

    return _default(endpoint, Loops(), over_httpx, instead=wrapped(httpx.AsyncHTTPTransport.handle_async_request))


def _default(
    endpoint: Endpoint, network: Network, over_httpx: Callable[[httpx.Proxy | None], Line], *, instead: bool
) -> Line:
    """A pool of our own on `network`, or httpx's: `instead`, and for proxies that want more than plain HTTP."""
    proxy = proxy_for(endpoint.url)
    if is_plain(proxy) and not instead:
        return Pool(route_to(endpoint.url, proxy), network)
    via = None if proxy is None else httpx.Proxy(proxy)
    return _OfThisProcess(lambda: over_httpx(via))


class _OfThisProcess:
    """A line that a forked process makes anew, since httpx's transports would share their sockets with it."""

    def __init__(self, make: Callable[[], Line]) -> None:
        self._make = make
        self._line = make()
        self._process = os.getpid()

    async def send(self, outgoing: Outgoing, limits: Limits) -> Exchange:
        return await self._own().send(outgoing, limits)

    async def close(self) -> None:
        await self._own().close()

    def _own(self) -> Line:
        process = os.getpid()
        if process != self._process:
            self._line, self._process = self._make(), process
        return self._line


def is_plain(proxy: httpx.URL | None) -> bool:
    """Whether our own connections know the way: there is no proxy, or one that is spoken to in plain HTTP."""
    return proxy is None or proxy.scheme == "http"


def wrapped(method: object) -> bool:
    """Whether a method is another than the class was written with (what wraps one leaves `__wrapped__` on it)."""
    return hasattr(method, "__wrapped__")


def async_line_over(transport: httpx.AsyncBaseTransport) -> Line:
    """A transport as a line: it may know a shorter way than through httpx's requests and responses (`as_line`)."""
    as_line: Callable[[], Line] | None = getattr(transport, "as_line", None)
    return AsyncTransportLine(transport) if as_line is None else as_line()
