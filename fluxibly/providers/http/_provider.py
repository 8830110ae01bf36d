"""The two shells that run any codec over HTTP, for threads and for event loops.

What they do is written once, in `_Shell` and `_Stream`: the coroutines of a sync shell's sender block and never suspend.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, NoReturn, TypeVar
from weakref import WeakSet

from fluxibly.errors import ConnectionFailed
from fluxibly.providers.http._endpoint import Endpoint
from fluxibly.providers.http._httpx import AsyncHTTPXSender, HTTPXSender
from fluxibly.providers.http._limits import Aborted, Limits
from fluxibly.providers.http._reader import ReplyBody, ReplyReader, refusal
from fluxibly.providers.http._senders import default_async_sender, default_sender
from fluxibly.providers.http._sockets_threads import finished

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

    import httpx

    from fluxibly.config import LLMConfig
    from fluxibly.providers.dialects.codec import Codec, Service
    from fluxibly.providers.http._exchange import Exchange, Sender
    from fluxibly.types import Chunk, Request, Response


def fail(error: Exception, failure: Exception) -> NoReturn:
    """Raise `failure`, which `error` led to."""
    if failure is error:
        raise error
    raise failure from error


class _Stream:
    """The chunks of one answer. `_reader` is None until the answer's head has come."""

    def __init__(self, endpoint: Endpoint, sender: Sender, request: Request) -> None:
        self._endpoint = endpoint
        self._sender = sender
        self._request = request
        self._limits: Limits | None = None
        self._exchange: Exchange | None = None
        self._reader: ReplyReader | None = None
        self._headers: Mapping[str, str] | None = None
        self._chunks: deque[Chunk] = deque()
        self._over = False
        self._aborted = False
        self._reading = False

    async def _advance(self) -> bool:
        """Read once; False at the end."""
        reader, exchange = self._reader, self._exchange
        if reader is not None and reader.ended:
            await self._finish()
            if reader.failure is None:
                return False
            fail(reader.failure, self._failure(reader.failure))
        if self._over:
            return False
        self._reading = True
        try:
            if reader is None or exchange is None:
                await self._start()
                return True
            data = await exchange.read()
            self._check_wanted()
        except BaseException as error:
            await self._finish()
            if not isinstance(error, Exception):
                raise
            fail(error, self._failure(error))
        finally:
            self._reading = False
        reader.feed(data)
        return True

    async def _start(self) -> None:
        endpoint = self._endpoint
        outgoing = endpoint.outgoing(self._request, stream=True)
        limits = self._limits = endpoint.limits(stream=True)
        self._check_wanted()
        exchange = self._exchange = await self._sender.send(outgoing, limits)
        if not 200 <= exchange.status < 300:
            raise await refusal(endpoint, exchange, self._request, limits)
        self._headers = exchange.headers
        reader = self._reader = ReplyReader(endpoint, exchange.headers)
        self._chunks = reader.chunks
        self._check_wanted()

    def _check_wanted(self) -> None:
        if self._aborted:
            raise Aborted

    def _failure(self, error: Exception) -> Exception:
        if self._aborted:
            error = ConnectionFailed("the stream was closed while it was read", retryable=False)
            return self._endpoint.completed_with(error, self._request)
        if self._limits is None:
            return error
        return self._endpoint.failure(error, self._request, self._limits, self._headers)

    async def _finish(self) -> None:
        reader, self._reader, self._over = self._reader, None, True
        if self._limits is not None:
            self._limits.waited()
        if self._exchange is not None:
            await self._exchange.release(ended=reader is not None and reader.done)

    async def _close(self) -> None:
        if self._reading:
            self.abort()  # the read lets go of the connection, which nobody may close under it
            return
        await self._finish()
        self._chunks.clear()

    def abort(self) -> None:
        """End a read that is under way in another thread or task, and all later ones."""
        self._aborted = True
        if self._limits is not None and not self._over:
            self._limits.abort()


class HTTPStream(_Stream):
    """The chunks of one answer. `close` releases the connection, and ends a read in another thread, as `abort` does."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        chunks = self._chunks
        while not chunks:
            if not finished(self._advance()):
                raise StopIteration
            chunks = self._chunks
        return chunks.popleft()

    def close(self) -> None:
        """Give the stream up and release its connection. Twice is fine."""
        finished(self._close())


class AsyncHTTPStream(_Stream):
    """The chunks of one answer. `aclose` releases the connection, and ends a read in another task, as `abort` does."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        chunks = self._chunks
        while not chunks:
            if not await self._advance():
                raise StopAsyncIteration
            chunks = self._chunks
        return chunks.popleft()

    async def aclose(self) -> None:
        """Give the stream up and release its connection. Twice is fine."""
        await self._close()


S = TypeVar("S", bound=_Stream)


class _Shell:
    """A provider over a sender. `_streams` are those that may be open."""

    _sender: Sender

    def __init__(self, codec: Codec, service: Service, config: LLMConfig, name: str | None) -> None:
        name = name or type(self).__name__.removeprefix("Async")
        self._endpoint = Endpoint(codec, service, config, name=name)
        self.info = self._endpoint.info
        self._closed = False
        self._streams: WeakSet[_Stream] = WeakSet()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"{self.info.name}({self._endpoint.url})"

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"this {self.info.name} is closed; make a new one")

    async def _complete(self, request: Request) -> Response:
        self._check_open()
        endpoint = self._endpoint
        outgoing = endpoint.outgoing(request, stream=False)
        limits = endpoint.limits(stream=False)
        headers: Mapping[str, str] | None = None
        try:
            exchange = await self._sender.send(outgoing, limits)
            try:
                headers = exchange.headers
                if not 200 <= exchange.status < 300:
                    raise await refusal(endpoint, exchange, request, limits)
                body = ReplyBody(headers)
                while data := await exchange.read():
                    body.add(data)
            finally:
                await exchange.release(ended=False)
            return endpoint.response(headers, body.whole())
        except Exception as error:  # noqa: BLE001  # it is raised, translated
            fail(error, endpoint.failure(error, request, limits, headers))

    def _open(self, stream: S) -> S:
        with self._lock:
            self._check_open()
            self._streams.add(stream)
        return stream

    async def _close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            streams = list(self._streams)
        for stream in streams:
            stream.abort()
        await self._sender.close()


class HTTPProvider(_Shell):
    """A provider that speaks a codec's dialect over HTTP. Safe for use from many threads at once.

    Args:
        codec: the dialect.
        service: where it is spoken.
        config: whose `api_key`, `api_base` and `timeout` count here.
        transport: an httpx transport to send through, instead of the provider's own connections.
        name: what logs call the provider; by default its class's name.

    Raises:
        ConfigError: there is no base URL, or it is none.
        AuthenticationError: the API key is missing or malformed.
    """

    def __init__(
        self,
        codec: Codec,
        service: Service,
        config: LLMConfig,
        *,
        transport: httpx.BaseTransport | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(codec, service, config, name)
        self._sender = default_sender(self._endpoint) if transport is None else HTTPXSender(transport)

    def complete(self, request: Request) -> Response:
        """The whole answer."""
        return finished(self._complete(request))

    def stream(self, request: Request) -> HTTPStream:
        """The answer as it comes. Nothing is sent before the first read."""
        return self._open(HTTPStream(self._endpoint, self._sender, request))

    def close(self) -> None:
        """Close all connections; streams that are open end with an error. Twice is fine."""
        finished(self._close())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncHTTPProvider(_Shell):
    """An `HTTPProvider` whose methods are coroutines, on asyncio and trio. It may be used from several event loops.

    `transport` is an `httpx.AsyncBaseTransport`.
    """

    def __init__(
        self,
        codec: Codec,
        service: Service,
        config: LLMConfig,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(codec, service, config, name)
        self._sender = default_async_sender(self._endpoint) if transport is None else AsyncHTTPXSender(transport)

    async def complete(self, request: Request) -> Response:
        """The whole answer."""
        return await self._complete(request)

    def stream(self, request: Request) -> AsyncHTTPStream:
        """The answer as it comes. Nothing is sent before the first read."""
        return self._open(AsyncHTTPStream(self._endpoint, self._sender, request))

    async def aclose(self) -> None:
        """Close all connections; streams that are open end with an error. Twice is fine."""
        await self._close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
