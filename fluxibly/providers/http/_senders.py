"""The choice of a provider's sender: a pool of the library's own connections, or httpx's."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import httpx

from fluxibly.providers.http._httpx import AsyncHTTPXSender, HTTPXSender
from fluxibly.providers.http._pool import KEEP_IDLE, MAX_CONNECTIONS, Pool
from fluxibly.providers.http._route import proxy_for, route_to, tls_context
from fluxibly.providers.http._sockets_loops import Loops
from fluxibly.providers.http._sockets_threads import Threads

if TYPE_CHECKING:
    from collections.abc import Callable

    from fluxibly.providers.http._exchange import Exchange, Outgoing, Sender
    from fluxibly.providers.http._limits import Limits
    from fluxibly.providers.http._sockets import Network

_LIMITS = httpx.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=None, keepalive_expiry=KEEP_IDLE)


def default_sender(url: httpx.URL) -> Sender:
    """Return the library's own connections to a server, through the proxy that the environment sets.

    If a program has wrapped httpx's transport, return httpx's connections, because the wrapper (for example
    opentelemetry-instrumentation-httpx) has to see each request.
    """

    def over_httpx(proxy: httpx.Proxy | None) -> Sender:
        return HTTPXSender(httpx.HTTPTransport(proxy=proxy, verify=tls_context(), limits=_LIMITS))

    return _default(url, Threads(), over_httpx, instead=wrapped(httpx.HTTPTransport.handle_request))


def default_async_sender(url: httpx.URL) -> Sender:
    """Return the `default_sender` for event loops."""

    def over_httpx(proxy: httpx.Proxy | None) -> Sender:
        return AsyncHTTPXSender(httpx.AsyncHTTPTransport(proxy=proxy, verify=tls_context(), limits=_LIMITS))

    return _default(url, Loops(), over_httpx, instead=wrapped(httpx.AsyncHTTPTransport.handle_async_request))


def _default(
    url: httpx.URL, network: Network, over_httpx: Callable[[httpx.Proxy | None], Sender], *, instead: bool
) -> Sender:
    """Return a pool on `network`, or httpx's connections if `instead`, or if the proxy needs more than plain HTTP."""
    proxy = proxy_for(url)
    if is_plain(proxy) and not instead:
        return Pool(route_to(url, proxy), network)
    via = None if proxy is None else httpx.Proxy(proxy)
    return _OfThisProcess(lambda: over_httpx(via))


class _OfThisProcess:
    """A sender that a forked process makes again, because httpx's transports would share the parent's sockets."""

    def __init__(self, make: Callable[[], Sender]) -> None:
        self._make = make
        self._sender = make()
        self._process: int = os.getpid()
        self.obeys = self._sender.obeys

    async def send(self, outgoing: Outgoing, limits: Limits) -> Exchange:
        return await self._own().send(outgoing, limits)

    async def close(self) -> None:
        await self._own().close()

    def _own(self) -> Sender:
        process = os.getpid()
        if process != self._process:
            self._sender, self._process = self._make(), process
        return self._sender


def is_plain(proxy: httpx.URL | None) -> bool:
    """Whether the library's own connections suffice: without a proxy, or with a proxy that speaks plain HTTP."""
    return proxy is None or proxy.scheme == "http"


def wrapped(method: object) -> bool:
    """Whether a program has wrapped a method. Wrappers leave `__wrapped__` on it."""
    return hasattr(method, "__wrapped__")
