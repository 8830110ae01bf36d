"""aiohttp's client behind httpx's transport interface, for asyncio: `pip install 'fluxibly[aiohttp]'`, then
`AsyncOpenAIProvider(config, transport=AiohttpTransport())`. Its parser is written in C, which pays with many calls at
once; the provider's own connections need nothing installed, and run on trio too.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING

import aiohttp
import httpx
from multidict import CIMultiDict
from yarl import URL

from fluxibly.providers.limits import DRAIN_TIME, LimitPassed, Limits
from fluxibly.providers.route import proxy_for, tls_context
from fluxibly.providers.slots import KEEP_IDLE, MAX_CONNECTIONS
from fluxibly.providers.transports import begun, joined, keep

if TYPE_CHECKING:
    from types import TracebackType

    from fluxibly.providers.http_common import Outgoing

_ERRORS: tuple[tuple[type[Exception], type[httpx.TransportError]], ...] = (
    (aiohttp.ServerTimeoutError, httpx.ReadTimeout),
    (aiohttp.ClientProxyConnectionError, httpx.ProxyError),
    (aiohttp.ClientHttpProxyError, httpx.ProxyError),
    (aiohttp.ClientConnectorError, httpx.ConnectError),
    (aiohttp.ServerDisconnectedError, httpx.ReadError),
    (aiohttp.ClientOSError, httpx.ReadError),
    (aiohttp.ClientPayloadError, httpx.RemoteProtocolError),
    (aiohttp.ClientResponseError, httpx.RemoteProtocolError),
    (aiohttp.InvalidURL, httpx.UnsupportedProtocol),
    (aiohttp.ClientError, httpx.NetworkError),
    (TimeoutError, httpx.ReadTimeout),
)


def _translated(error: Exception) -> Exception:
    if isinstance(error, getattr(aiohttp, "ConnectionTimeoutError", ())):
        return httpx.ConnectTimeout("no connection in time")
    for kind, ours in _ERRORS:
        if isinstance(error, kind):
            return ours(str(error) or kind.__name__)
    return error


def _as_headers(headers: Iterable[tuple[bytes, bytes]]) -> CIMultiDict[str]:
    return CIMultiDict([(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers])


class _Body(httpx.AsyncByteStream):
    """The undecoded body of an answer, as it comes: several HTTP chunks that came together are one piece."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        content = self._answer.content
        try:
            while data := await content.readany():
                yield data
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _translated(error) from error

    async def aclose(self) -> None:
        """Give the connection back if the body was read to its end; else close it."""
        if self._answer.content.at_eof():
            self._answer.release()
        else:
            self._answer.close()


class _Exchange:
    """A request that aiohttp sent, and its answer, with the shell's own limits on each wait."""

    def __init__(self, answer: aiohttp.ClientResponse, limits: Limits) -> None:
        self._answer = answer
        self._limits = limits
        self.status = answer.status
        self.headers = joined(answer.raw_headers)
        self.cut = functools.partial(_soon, asyncio.get_running_loop(), answer.close)
        """Closes the connection, between reads."""

    async def read(self) -> bytes:
        """The next bytes of the body, at least one; b"" at its end."""
        content = self._answer.content
        self._limits.left()
        try:
            data = content.read_nowait()
            while not data and not content.at_eof():
                async with _Limited(self._limits):
                    data = await content.readany()
                self._limits.waits(self.cut)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _translated(error) from error
        return data

    async def release(self, *, ended: bool) -> None:
        """Give the connection back, for another call if it can carry one. Twice is fine."""
        content = self._answer.content
        if ended and not content.at_eof():
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with asyncio.timeout(DRAIN_TIME):
                    while await content.readany():
                        pass
        if content.at_eof():
            self._answer.release()
        else:
            self._answer.close()


def _soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    """Have the loop call this, from whatever thread, if it still runs."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(callback)


class _Limited:
    """Cuts a wait off when its limit passes, or when the stream is closed meanwhile."""

    __slots__ = ("_limits", "_timeout")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._timeout = asyncio.timeout(limits.left())

    async def __aenter__(self) -> None:
        self._limits.waits(None)
        await self._timeout.__aenter__()
        self._limits.waits(functools.partial(_soon, asyncio.get_running_loop(), self._end))

    def _end(self) -> None:
        with contextlib.suppress(RuntimeError):  # the wait is over
            self._timeout.reschedule(0)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._limits.waited()
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            raise LimitPassed from None


class _Line:
    """Sends a provider's requests with aiohttp, without httpx's objects in between."""

    def __init__(self, transport: AiohttpTransport) -> None:
        self._transport = transport
        self._urls: dict[bytes, URL] = {}
        self._timeout: aiohttp.ClientTimeout | None = None

    def _connect_limit(self, limits: Limits) -> aiohttp.ClientTimeout:
        if self._timeout is None:  # it is the same for all calls of a provider
            self._timeout = aiohttp.ClientTimeout(total=None, connect=limits.for_httpx()["connect"])
        return self._timeout

    async def send(self, outgoing: Outgoing, limits: Limits) -> _Exchange:
        """Send a request, and wait for the head of its answer."""
        url = self._urls.get(outgoing.target)
        if url is None:
            url = URL(str(outgoing.url.copy_with(raw_path=outgoing.target)), encoded=True)
            keep(self._urls, outgoing.target, url)
        headers = _as_headers(outgoing.headers)
        limits.handed_over()
        try:
            async with _Limited(limits):
                answer = await self._transport.request(
                    url, outgoing.url, headers=headers, body=outgoing.body, times=self._connect_limit(limits)
                )
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _translated(error) from error
        limits.answered()
        return await begun(_Exchange(answer, limits), limits)

    async def close(self) -> None:
        await self._transport.aclose()


class AiohttpTransport(httpx.AsyncBaseTransport):
    """Sends httpx requests with aiohttp. It keeps a session for each event loop that it is used from.

    Proxies come from the environment; redirects are not followed; nothing is decompressed.
    """

    def __init__(self) -> None:
        self._proxies: dict[tuple[str, bytes], str | None] = {}
        self._sessions: dict[asyncio.AbstractEventLoop, aiohttp.ClientSession] = {}

    def _session(self, *, secure: bool) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        session = self._sessions.get(loop)
        if session is None:
            for other in [other for other in self._sessions if other.is_closed()]:
                del self._sessions[other]
            connector = aiohttp.TCPConnector(
                limit=MAX_CONNECTIONS, keepalive_timeout=KEEP_IDLE, ssl=tls_context() if secure else True
            )
            session = self._sessions[loop] = aiohttp.ClientSession(
                connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
            )
        return session

    def _proxy(self, url: httpx.URL) -> str | None:
        # Not aiohttp's `trust_env`: it reads ~/.netrc in a thread at each request, and sends what it finds there.
        key = (url.scheme, url.netloc)
        if key not in self._proxies:
            proxy = proxy_for(url)
            self._proxies[key] = None if proxy is None else str(proxy)
        return self._proxies[key]

    async def request(
        self,
        url: URL,
        origin: httpx.URL,
        *,
        headers: CIMultiDict[str],
        body: bytes,
        times: aiohttp.ClientTimeout,
        method: str = "POST",
    ) -> aiohttp.ClientResponse:
        """Send a request with aiohttp, and wait for the head of its answer."""
        session = self._session(secure=origin.scheme == "https")
        return await session.request(
            method, url, headers=headers, data=body, allow_redirects=False, proxy=self._proxy(origin), timeout=times
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, and wait for the head of its answer."""
        limits = request.extensions.get("timeout", {})
        url = URL(str(request.url), encoded=True)
        body = await request.aread()
        times = aiohttp.ClientTimeout(total=None, connect=limits.get("connect"), sock_read=limits.get("read"))
        headers = _as_headers(request.headers.raw)
        try:
            answer = await self.request(
                url, request.url, headers=headers, body=body, times=times, method=request.method
            )
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _translated(error) from error
        return httpx.Response(answer.status, headers=answer.raw_headers, stream=_Body(answer), request=request)

    def as_line(self) -> _Line:
        """What an `AsyncHTTPProvider` sends through."""
        return _Line(self)

    async def aclose(self) -> None:
        """Close all connections."""
        sessions, self._sessions = self._sessions, {}
        for loop, session in sessions.items():
            if not loop.is_closed():
                await session.close()
