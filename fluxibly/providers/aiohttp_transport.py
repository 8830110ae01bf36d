"""aiohttp's client behind httpx's transport interface, for asyncio: `pip install 'fluxibly[aiohttp]'`, then
`AsyncOpenAIProvider(config, transport=AiohttpTransport())`. Its parser is written in C, which pays with many calls at
once; the provider's own connections need nothing installed, and run on trio too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import httpx
from yarl import URL

from fluxibly.providers.pool import KEEP_IDLE, MAX_CONNECTIONS
from fluxibly.providers.route import proxy_for, tls_context

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


class _Body(httpx.AsyncByteStream):
    """The undecoded body of an answer, as it comes: several HTTP chunks that came together are one piece."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        content = self._answer.content
        try:
            while data := await content.readany():
                yield data
        except Exception as error:
            raise _translated(error) from error

    async def aclose(self) -> None:
        """Give the connection back if the body was read to its end; else close it."""
        if self._answer.content.at_eof():
            self._answer.release()
        else:
            self._answer.close()


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

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, and wait for the head of its answer."""
        times = request.extensions.get("timeout", {})
        session = self._session(secure=request.url.scheme == "https")
        try:
            answer = await session.request(
                request.method,
                URL(str(request.url), encoded=True),
                headers=[(name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers.raw],
                data=await request.aread(),
                allow_redirects=False,
                proxy=self._proxy(request.url),
                timeout=aiohttp.ClientTimeout(total=None, connect=times.get("connect"), sock_read=times.get("read")),
            )
        except Exception as error:
            raise _translated(error) from error
        return httpx.Response(answer.status, headers=answer.raw_headers, stream=_Body(answer), request=request)

    async def aclose(self) -> None:
        """Close all connections."""
        sessions, self._sessions = self._sessions, {}
        for loop, session in sessions.items():
            if not loop.is_closed():
                await session.close()
