"""The two shells that run any codec over HTTP. All they add to the shared parts is I/O."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NoReturn
from weakref import WeakSet

from fluxibly.errors import ConnectionFailed, ProviderError
from fluxibly.providers.body import MAX_ERROR_BODY
from fluxibly.providers.http_common import Endpoint
from fluxibly.providers.intake import Body, Intake
from fluxibly.providers.limits import Aborted, Limits
from fluxibly.providers.lines import async_line_over, default_async_line, default_line
from fluxibly.providers.transports import TransportLine

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

    import httpx

    from fluxibly.config import LLMConfig
    from fluxibly.providers.codec import Codec, Service
    from fluxibly.providers.lines import AsyncExchange, AsyncLine, Exchange, Line
    from fluxibly.types import Chunk, Request, Response


class _Shell:
    def __init__(self, codec: Codec, service: Service, config: LLMConfig) -> None:
        self._endpoint = Endpoint(codec, service, config, name=type(self).__name__.removeprefix("Async"))
        self.info = self._endpoint.info
        self._closed = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._endpoint.url})"

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"this {type(self).__name__} is closed; make a new one")


class HTTPProvider(_Shell):
    """A provider that speaks a codec's dialect over HTTP. Safe for use from many threads at once.

    Args:
        codec: the dialect.
        service: where it is spoken.
        config: whose `api_key`, `api_base` and `timeout` count here.
        transport: an httpx transport to send through, instead of the provider's own connections.

    Raises:
        ConfigError: there is no base URL, or it is none.
        AuthenticationError: the API key is missing or malformed.
    """

    def __init__(
        self, codec: Codec, service: Service, config: LLMConfig, *, transport: httpx.BaseTransport | None = None
    ) -> None:
        super().__init__(codec, service, config)
        self._line: Line = default_line(self._endpoint) if transport is None else TransportLine(transport)
        self._streams: WeakSet[HTTPStream] = WeakSet()

    def complete(self, request: Request) -> Response:
        """The whole answer."""
        self._check_open()
        endpoint = self._endpoint
        outgoing = endpoint.outgoing(request, stream=False)
        limits = endpoint.limits(stream=False)
        headers: Mapping[str, str] | None = None
        try:
            exchange = self._line.send(outgoing, limits)
            try:
                headers = exchange.headers
                if not 200 <= exchange.status < 300:
                    raise refusal(endpoint, exchange, request, limits)
                body = Body(headers)
                while data := exchange.read():
                    body.add(data)
            finally:
                exchange.release(ended=False)
            return endpoint.response(headers, body.whole())
        except Exception as error:  # noqa: BLE001  # it is raised, translated
            fail(error, endpoint.failure(error, request, limits, headers))

    def stream(self, request: Request) -> HTTPStream:
        """The answer as it comes. Nothing is sent before the first read."""
        self._check_open()
        stream = HTTPStream(self._endpoint, self._line, request)
        self._streams.add(stream)
        return stream

    def close(self) -> None:
        """Close all connections; streams that are open end with an error. Twice is fine."""
        if not self._closed:
            self._closed = True
            for stream in list(self._streams):
                stream.abort()
            self._line.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def fail(error: Exception, failure: Exception) -> NoReturn:
    """Raise `failure`, which `error` led to."""
    if failure is error:
        raise error
    raise failure from error


def refusal(endpoint: Endpoint, exchange: Exchange, request: Request, limits: Limits) -> ProviderError:
    """The error of an answer that is none of 2xx, from as much of its body as comes."""
    limits.refused()
    pieces: list[bytes] = []
    try:
        body = Body(exchange.headers, limit=MAX_ERROR_BODY)
        pieces = body.pieces
        while data := exchange.read():
            body.add(data)
    except Exception:  # noqa: BLE001, S110  # the status is what counts
        pass
    return endpoint.refuse(exchange.status, exchange.headers, b"".join(pieces), request)


async def async_refusal(endpoint: Endpoint, exchange: AsyncExchange, request: Request, limits: Limits) -> ProviderError:
    """`refusal`, awaited."""
    limits.refused()
    pieces: list[bytes] = []
    try:
        body = Body(exchange.headers, limit=MAX_ERROR_BODY)
        pieces = body.pieces
        while data := await exchange.read():
            body.add(data)
    except Exception:  # noqa: BLE001, S110  # the status is what counts
        pass
    return endpoint.refuse(exchange.status, exchange.headers, b"".join(pieces), request)


class _StreamState:
    """What both streams share. `_intake` is None until the answer's head has come."""

    def __init__(self, endpoint: Endpoint, request: Request) -> None:
        self._endpoint = endpoint
        self._request = request
        self._limits: Limits | None = None
        self._intake: Intake | None = None
        self._chunks: deque[Chunk] = deque()
        self._over = False
        self._aborted = False

        self._headers: Mapping[str, str] | None = None

    def _begin(self) -> Limits:
        limits = self._limits = self._endpoint.limits(stream=True)
        self._check_wanted()
        return limits

    def _take(self, headers: Mapping[str, str]) -> None:
        self._headers = headers
        intake = self._intake = Intake(self._endpoint, headers)
        self._chunks = intake.chunks
        self._check_wanted()

    def _check_wanted(self) -> None:
        if self._aborted:
            raise Aborted

    def _failure(self, error: Exception) -> Exception:
        if self._aborted:
            error = ConnectionFailed("the stream was closed while it was read", retryable=False)
            return self._endpoint.adopted(error, self._request)
        if self._limits is None:
            return error
        return self._endpoint.failure(error, self._request, self._limits, self._headers)


class HTTPStream(_StreamState):
    """The chunks of one answer. `close` releases the connection; `abort` ends a read in another thread."""

    def __init__(self, endpoint: Endpoint, line: Line, request: Request) -> None:
        super().__init__(endpoint, request)
        self._line = line
        self._exchange: Exchange | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        chunks = self._chunks
        while not chunks:
            self._advance()
            chunks = self._chunks
        return chunks.popleft()

    def _advance(self) -> None:
        """Read once. Raises StopIteration at the end."""
        intake, exchange = self._intake, self._exchange
        if intake is not None and intake.ended:
            self._finish()
            if intake.failure is None:
                raise StopIteration
            fail(intake.failure, self._failure(intake.failure))
        if self._over:
            raise StopIteration
        try:
            if intake is None or exchange is None:
                self._start()
                return
            data = exchange.read()
            self._check_wanted()
        except BaseException as error:
            self._finish()
            if not isinstance(error, Exception):
                raise
            fail(error, self._failure(error))
        intake.feed(data)

    def _start(self) -> None:
        outgoing = self._endpoint.outgoing(self._request, stream=True)
        limits = self._begin()
        exchange = self._exchange = self._line.send(outgoing, limits)
        if not 200 <= exchange.status < 300:
            raise refusal(self._endpoint, exchange, self._request, limits)
        self._take(exchange.headers)

    def _finish(self) -> None:
        intake, self._intake, self._over = self._intake, None, True
        if self._limits is not None:
            self._limits.waited()
        if self._exchange is not None:
            self._exchange.release(ended=intake is not None and intake.done)

    def close(self) -> None:
        """Give the stream up and release its connection. Twice is fine."""
        self._finish()
        self._chunks.clear()

    def abort(self) -> None:
        """End a read that is under way in another thread, and all later ones."""
        self._aborted = True
        if self._limits is not None and not self._over:
            self._limits.abort()


class AsyncHTTPProvider(_Shell):
    """An `HTTPProvider` whose methods are coroutines, on asyncio and trio. It may be used from several event loops.

    `transport` is an `httpx.AsyncBaseTransport`.
    """

    def __init__(
        self, codec: Codec, service: Service, config: LLMConfig, *, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        super().__init__(codec, service, config)
        self._line: AsyncLine = default_async_line(self._endpoint) if transport is None else async_line_over(transport)
        self._streams: WeakSet[AsyncHTTPStream] = WeakSet()

    async def complete(self, request: Request) -> Response:
        """The whole answer."""
        self._check_open()
        endpoint = self._endpoint
        outgoing = endpoint.outgoing(request, stream=False)
        limits = endpoint.limits(stream=False)
        headers: Mapping[str, str] | None = None
        try:
            exchange = await self._line.send(outgoing, limits)
            try:
                headers = exchange.headers
                if not 200 <= exchange.status < 300:
                    raise await async_refusal(endpoint, exchange, request, limits)
                body = Body(headers)
                while data := await exchange.read():
                    body.add(data)
            finally:
                await exchange.release(ended=False)
            return endpoint.response(headers, body.whole())
        except Exception as error:  # noqa: BLE001  # it is raised, translated
            fail(error, endpoint.failure(error, request, limits, headers))

    def stream(self, request: Request) -> AsyncHTTPStream:
        """The answer as it comes. Nothing is sent before the first read."""
        self._check_open()
        stream = AsyncHTTPStream(self._endpoint, self._line, request)
        self._streams.add(stream)
        return stream

    async def aclose(self) -> None:
        """Close all connections; streams that are open end with an error. Twice is fine."""
        if not self._closed:
            self._closed = True
            for stream in list(self._streams):
                stream.abort()
            await self._line.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class AsyncHTTPStream(_StreamState):
    """The chunks of one answer. `aclose` releases the connection; `abort` ends a read in another task or thread."""

    def __init__(self, endpoint: Endpoint, line: AsyncLine, request: Request) -> None:
        super().__init__(endpoint, request)
        self._line = line
        self._exchange: AsyncExchange | None = None
        self._reading = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        chunks = self._chunks
        while not chunks:
            await self._advance()
            chunks = self._chunks
        return chunks.popleft()

    async def _advance(self) -> None:
        """Read once. Raises StopAsyncIteration at the end."""
        intake, exchange = self._intake, self._exchange
        if intake is not None and intake.ended:
            await self._finish()
            if intake.failure is None:
                raise StopAsyncIteration
            fail(intake.failure, self._failure(intake.failure))
        if self._over:
            raise StopAsyncIteration
        self._reading = True
        try:
            if intake is None or exchange is None:
                await self._start()
                return
            data = await exchange.read()
            self._check_wanted()
        except BaseException as error:
            await self._finish()
            if not isinstance(error, Exception):
                raise
            fail(error, self._failure(error))
        finally:
            self._reading = False
        intake.feed(data)

    async def _start(self) -> None:
        outgoing = self._endpoint.outgoing(self._request, stream=True)
        limits = self._begin()
        exchange = self._exchange = await self._line.send(outgoing, limits)
        if not 200 <= exchange.status < 300:
            raise await async_refusal(self._endpoint, exchange, self._request, limits)
        self._take(exchange.headers)

    async def _finish(self) -> None:
        intake, self._intake, self._over = self._intake, None, True
        if self._limits is not None:
            self._limits.waited()
        if self._exchange is not None:
            await self._exchange.release(ended=intake is not None and intake.done)

    async def aclose(self) -> None:
        """Give the stream up and release its connection. Twice is fine."""
        await self._finish()
        self._chunks.clear()

    def abort(self) -> None:
        """End a read that is under way in another task, and all later ones."""
        self._aborted = True
        if self._over:
            return
        if self._limits is not None:
            self._limits.abort()
        if not self._reading and self._exchange is not None:
            self._over = True
            self._exchange.drop()
