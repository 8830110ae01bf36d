"""HTTP providers for threads and for event loops, which run any codec.

`_Shell` and `_Stream` implement both kinds once, as coroutines. The coroutines of a sync provider's sender block the
thread and never suspend.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, NoReturn, TypeVar
from weakref import WeakSet

from fluxibly._checks import shown_url
from fluxibly._logs import log_retry
from fluxibly._states import TRANSITIONS, State
from fluxibly.errors import AuthenticationError, ConnectionFailed, DeadlineExceeded, ProviderError
from fluxibly.limits import Leash
from fluxibly.messages import Message
from fluxibly.providers.http._endpoint import Endpoint
from fluxibly.providers.http._exchange import Authorizer
from fluxibly.providers.http._httpx import AsyncHTTPXSender, HTTPXSender
from fluxibly.providers.http._keys import Keys, LoopKeys, ThreadKeys
from fluxibly.providers.http._limits import Aborted
from fluxibly.providers.http._listing import listed
from fluxibly.providers.http._reader import ReplyBody, reader_of, refusal
from fluxibly.providers.http._senders import default_async_sender, default_sender
from fluxibly.providers.http._sockets_threads import finished
from fluxibly.types import Request

if TYPE_CHECKING:
    from typing import Self

    import httpx

    from fluxibly.config import LLMConfig
    from fluxibly.providers.dialects.codec import Codec, Service
    from fluxibly.providers.http._exchange import Exchange, Outgoing, Sender
    from fluxibly.providers.http._keys import Credentials
    from fluxibly.providers.http._limits import Limits
    from fluxibly.providers.http._reader import ReplyReader
    from fluxibly.providers.http.batches import BatchClient
    from fluxibly.types import Chunk, Response


async def find_key(endpoint: Endpoint, keys: Keys, request: Request) -> None:
    """Find the key of a request, unless the request has an authorization of its own."""
    if not endpoint.authorized_by(request):
        with _completed(endpoint, request):
            await keys.find(request.call)


@contextmanager
def _completed(endpoint: Endpoint, request: Request) -> Generator[None]:
    """Complete an error of the credentials for the call."""
    try:
        yield
    except Aborted:
        raise endpoint.stopped(request) from None
    except ProviderError as error:
        raise endpoint.completed_with(error, request) from error.__cause__


async def worth_resending(
    endpoint: Endpoint, keys: Keys | None, outgoing: Outgoing, request: Request, error: Exception
) -> bool:
    """Whether to send a request again, once, because `error` made something of it change. Log what changes."""
    if not isinstance(error, ProviderError):
        return False
    change = endpoint.learn(request, outgoing.body, error)
    if change is None and isinstance(error, AuthenticationError) and keys is not None and outgoing.key is not None:
        with _completed(endpoint, request):
            what = f"new {outgoing.key.name}" if isinstance(outgoing.key, Authorizer) else "a new api_key"
            change = f"sends {what}" if await keys.renew(outgoing.key, request.call) else None
    if change is None:
        return False
    log_retry(request, error, max(request.call.attempts - 1, 0), 0.0, change=change)
    return True


def fail(error: Exception, failure: Exception) -> NoReturn:
    """Raise `failure` with `error` as its cause, or `error` itself if they are the same."""
    if failure is error:
        raise error
    # The cause of a passed deadline is the error of an attempt before, which only the layers around know.
    raise failure from None if isinstance(failure, DeadlineExceeded) else error


class _Stream:
    """The chunks of a response. The stream holds a connection while it is idle; a read takes the connection out.

    `_reader` is None until the head of the response has arrived. `_exchange` is None while a read holds it.
    """

    def __init__(self, endpoint: Endpoint, sender: Sender, request: Request, keys: Keys | None = None) -> None:
        self._endpoint = endpoint
        self._keys = keys
        self._sender = sender
        self._request = request
        self._state: State = "new"
        # The lock is reentrant, because a signal handler may close a stream whose state its thread is changing.
        self._lock = threading.RLock()
        self._limits: Limits | None = None
        self._exchange: Exchange | None = None
        self._reader: ReplyReader | None = None
        self._headers: Mapping[str, str] | None = None
        self._chunks: deque[Chunk] = deque()

    def _become(self, state: State) -> None:
        """Change the state; the caller holds the lock. Raise RuntimeError for a transition that the table does not have."""
        if state not in TRANSITIONS[self._state]:
            raise RuntimeError(
                f"a stream that is {self._state!r} cannot become {state!r}; does another thread or task read it?"
            )
        self._state = state

    async def _advance(self) -> bool:
        """Read once. Return False at the end."""
        with self._lock:
            if self._state == "ended":
                return False
            if self._state != "closing":
                self._become("reading")
            # A read takes the exchange out, so that a close in another thread finds no connection to release.
            exchange, self._exchange = self._exchange, None
            reader = self._reader
        if reader is not None and reader.ended and reader.failure is None:
            await self._finish(exchange)
            return False
        try:
            if reader is not None and reader.failure is not None:
                raise reader.failure
            self._check_wanted()
            if reader is None or exchange is None:
                exchange = await self._open()
            elif reader.rest is not None:
                reader.go_on()
            else:
                reader.feed(await exchange.read())
            with self._lock:
                self._check_wanted()
                self._become("idle")
                self._exchange = exchange
        except BaseException as error:
            wanted = self._state == "reading"
            await self._finish(exchange)
            if not isinstance(error, Exception):
                raise
            fail(error, self._failure(error, wanted=wanted))
        return True

    def _prepare(self) -> tuple[Outgoing, Limits]:
        """Return the request to send and its limits, which begin now."""
        outgoing = self._endpoint.outgoing(self._request, stream=True)
        limits = self._limits = self._endpoint.limits(self._request, stream=True)
        leash = self._request.call.leash
        if leash is not None and leash.stopped:
            raise self._endpoint.stopped(self._request)
        # An `abort` that came too early to find the limits has changed the state by now.
        self._check_wanted()
        return outgoing, limits

    async def _open(self, *, again: bool = False) -> Exchange:
        """Send the request, and take the head of the response."""
        endpoint = self._endpoint
        if self._keys is not None:
            await find_key(endpoint, self._keys, self._request)
        outgoing, limits = self._prepare()
        exchange = await self._sender.send(outgoing, limits)
        try:
            if 200 <= exchange.status < 300:
                self._headers = exchange.headers
                reader = self._reader = reader_of(endpoint, exchange.headers, limits)
                self._chunks = reader.chunks
                return exchange
            error = await refusal(endpoint, exchange, self._request, limits)
        except BaseException:
            await exchange.release(ended=False)
            raise
        await exchange.release(ended=False)
        with self._lock:
            self._limits = None  # the answer is there, and what a function of the user raises is not of the network
        if again or not await worth_resending(endpoint, self._keys, outgoing, self._request, error):
            raise error
        return await self._open(again=True)

    def _check_wanted(self) -> None:
        """Raise Aborted if the stream was aborted or closed during the read."""
        if self._state != "reading":
            raise Aborted

    def _failure(self, error: Exception, *, wanted: bool) -> Exception:
        """Return the error that the consumer gets for an error of a read."""
        if not wanted:
            error = ConnectionFailed("the stream was closed while it was being read", retryable=False)
            return self._endpoint.completed_with(error, self._request)
        if self._limits is None:
            return error
        return self._endpoint.failure(error, self._request, self._limits, self._headers)

    def _end(self) -> None:
        """End the stream, if it has not ended yet. The caller releases the connection."""
        with self._lock:
            if self._state != "ended":
                self._become("ended")
            if self._limits is not None:
                self._limits.waited()

    async def _finish(self, exchange: Exchange | None) -> None:
        """End the stream and release the connection that the caller has taken out."""
        self._end()
        reader, self._reader = self._reader, None
        # A read that was aborted may have received chunks, which no later read may deliver.
        self._chunks.clear()
        if exchange is not None:
            await exchange.release(ended=reader is not None and reader.done)

    async def _close(self) -> None:
        with self._lock:
            if self._state == "reading":
                # The read releases its connection itself: closing a connection under a read is not safe.
                self.abort()
                return
            exchange, self._exchange = self._exchange, None
            self._end()
        await self._finish(exchange)

    def abort(self) -> None:
        """End a read under way in another thread or task, and all later reads."""
        # Any thread may call this, but only the thread or event loop that reads may release the connection. So the
        # stream is "closing" until the read under way, or else the next read or close, has ended it.
        with self._lock:
            if "closing" not in TRANSITIONS[self._state]:
                return
            self._become("closing")
            # This needs the lock: once the stream has ended, its connection may serve another call.
            if self._limits is not None:
                self._limits.abort()


class HTTPStream(_Stream):
    """The chunks of a response. `close` releases the connection; `close` and `abort` end a read in another thread."""

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
        """End the stream and release its connection. A second call has no effect."""
        finished(self._close())


class AsyncHTTPStream(_Stream):
    """The chunks of a response. `aclose` releases the connection; `aclose` and `abort` end a read in another task."""

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
        """End the stream and release its connection. A second call has no effect."""
        await self._close()


S = TypeVar("S", bound=_Stream)


class _Shell:
    """A provider over a sender. `credentials` authorize its calls, if no key does; `_streams` may be open."""

    obeys = True
    _sender: Sender
    _keys_kind: type[Keys]

    def __init__(
        self, codec: Codec, service: Service, config: LLMConfig, name: str | None, credentials: Credentials | None
    ) -> None:
        kind = type(self).__name__
        if name is not None:
            kind = f"Async{name}" if kind.startswith("Async") else name
        self._kind = kind
        self._endpoint = Endpoint(codec, service, config, name=kind.removeprefix("Async"))
        self.credentials = None if self._endpoint.has_auth else credentials
        self._keys: Keys | None = None
        if callable(config.api_key) and not self._endpoint.has_auth:
            self._keys = self._keys_kind(config.api_key, self._endpoint.use_key, lambda _: True)
        elif self.credentials is not None:
            self._keys = self._keys_kind(self.credentials.obtain, self._endpoint.use_key, self.credentials.is_fresh)
        self.info = self._endpoint.info
        self._closed = False
        self._streams: WeakSet[_Stream] = WeakSet()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"{self._kind}({shown_url(str(self._endpoint.url))})"

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"this {self._kind} is closed; make a new one")

    async def _complete(self, request: Request, *, again: bool = False) -> Response:
        endpoint = self._endpoint
        if self._keys is not None:
            await find_key(endpoint, self._keys, request)
        self._check_open()
        outgoing = endpoint.outgoing(request, stream=False)
        limits = endpoint.limits(request, stream=False)
        headers: Mapping[str, str] | None = None
        try:
            limits.hold()
            exchange = await self._sender.send(outgoing, limits)
            try:
                headers = exchange.headers
                if not 200 <= exchange.status < 300:
                    raise await refusal(endpoint, exchange, request, limits)
                body = ReplyBody(headers)
                while data := await exchange.read():
                    body.add(data)
            finally:
                limits.over()  # before another call can take the connection
                await exchange.release(ended=False)
            if not limits.aborted:  # else the body may have been cut
                return endpoint.response(headers, body.whole())
            raise Aborted
        except Exception as error:  # noqa: BLE001  # `fail` raises it, translated
            if limits.aborted:
                fail(error, endpoint.stopped(request))
            if again or not await worth_resending(endpoint, self._keys, outgoing, request, error):
                fail(error, endpoint.failure(error, request, limits, headers))
        finally:
            limits.over()
        return await self._complete(request, again=True)

    @property
    def key_source(self) -> str | None:
        """Where the key is from: "api_key" or "headers" of the configuration, or the name of an environment variable."""
        return self._endpoint.key_source

    @property
    def account(self) -> str | None:
        """A hash of the address and of what authorizes the calls; None if that changes, as a token does."""
        return self._endpoint.account if self._keys is None else None

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
    """A provider that speaks a codec's dialect over HTTP. Many threads may use it at once.

    Args:
        codec: the dialect.
        service: the endpoint that speaks the dialect.
        config: the configuration; only `api_key`, `api_base`, `headers` and `timeout` apply here.
        transport: an httpx transport to send through, instead of the provider's own connections.
        name: the provider's name in logs; its class's name by default.
        credentials: authorize the calls in place of an API key.

    Raises:
        ConfigError: the base URL is missing or invalid.
        AuthenticationError: the API key is missing or malformed.
    """

    _keys_kind = ThreadKeys

    def __init__(
        self,
        codec: Codec,
        service: Service,
        config: LLMConfig,
        *,
        transport: httpx.BaseTransport | None = None,
        name: str | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        super().__init__(codec, service, config, name, credentials)
        self._given_sender = None if transport is None else HTTPXSender(transport)
        self._sender = self._given_sender or default_sender(self._endpoint.url)
        self.obeys = self._sender.obeys

    def complete(self, request: Request) -> Response:
        """Return the whole response."""
        return finished(self._complete(request))

    def stream(self, request: Request) -> HTTPStream:
        """Return the response as a stream of chunks. The first read sends the request."""
        return self._open(HTTPStream(self._endpoint, self._sender, request, self._keys))

    @property
    def has_list(self) -> bool:
        """Whether the service lists its models."""
        return bool(self._endpoint.service.lists)

    def list_models(self, *, timeout: float = 10.0) -> list[str]:
        """Return the names of the models that the service lists, sorted.

        Args:
            timeout: the seconds that it may take.

        Raises:
            ProviderError: the service is not reached, refuses, takes too long, or sends no list.
            NotImplementedError: the service has no list.
        """
        if not self.has_list:
            raise NotImplementedError(f"{self._endpoint.service.framework} has no list of its models")
        return finished(self._listed(timeout))

    async def _listed(self, seconds: float) -> list[str]:
        request = Request(model="", messages=(Message.user("-"),))  # never sent: errors are completed for a request
        call = request.call
        call.leash = Leash(deadline=call.clock() + seconds)
        end = monotonic() + seconds
        if self._keys is not None:
            await find_key(self._endpoint, self._keys, request)
        return await listed(self._endpoint, self._given_sender, request, end=end, seconds=seconds)

    def close(self) -> None:
        """Close all connections. Open streams end with an error. A second call has no effect."""
        finished(self._close())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncHTTPProvider(_Shell):
    """An `HTTPProvider` with coroutines as methods, on asyncio and trio. Several event loops may use it.

    `transport` is an `httpx.AsyncBaseTransport`.
    """

    _keys_kind = LoopKeys

    def __init__(
        self,
        codec: Codec,
        service: Service,
        config: LLMConfig,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        name: str | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        super().__init__(codec, service, config, name, credentials)
        self._sender = default_async_sender(self._endpoint.url) if transport is None else AsyncHTTPXSender(transport)

    async def complete(self, request: Request) -> Response:
        """Return the whole response."""
        return await self._complete(request)

    def stream(self, request: Request) -> AsyncHTTPStream:
        """Return the response as a stream of chunks. The first read sends the request."""
        return self._open(AsyncHTTPStream(self._endpoint, self._sender, request, self._keys))

    @property
    def batches(self) -> BatchClient | None:
        """The batch API of the service; None if it has none, or none for such a key."""
        endpoint, keys = self._endpoint, self._keys
        if endpoint.service.batches is None or isinstance(endpoint.key, Authorizer):
            return None
        from fluxibly.providers.http.batches import BatchClient

        async def find(request: Request) -> None:
            if keys is not None:
                await find_key(endpoint, keys, request)

        async def renew(outgoing: Outgoing, request: Request, error: Exception) -> bool:
            return await worth_resending(endpoint, keys, outgoing, request, error)

        return BatchClient(endpoint, self._sender, endpoint.service.batches(), find_key=find, renew=renew)

    async def aclose(self) -> None:
        """Close all connections. Open streams end with an error. A second call has no effect."""
        await self._close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
