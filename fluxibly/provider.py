"""The interface of a provider, and the adapter that runs a synchronous provider in threads for async pipelines."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine, Iterable, Iterator, Sequence
from contextvars import Context, copy_context
from typing import Any, Final, Protocol, TypeVar, runtime_checkable

from fluxibly._checks import kind_of
from fluxibly.aggregate import Aggregator, pieces_of
from fluxibly.types import Chunk, ProviderInfo, Request, Response


@runtime_checkable
class Provider(Protocol):
    """An object that answers requests. Only `complete` is required, or only `stream` if it has no `complete`::

        class Parrot:
            def complete(self, request: Request) -> str:
                return request.messages[-1].text

            def stream(self, request: Request) -> Iterator[str]:
                yield from request.messages[-1].text

    `complete` returns a `Response`, or a str for the response's text. The optional `stream(request)` returns an
    iterator of `Chunk` or str. A generator releases its resources in `finally`, any other iterator in its `close()`.
    The optional `close()` of the provider releases the provider's own resources. Raise
    `ProviderError("…", retryable=True)` for a failure that may not recur in the next attempt. Any other exception
    reaches the caller unchanged.

    The optional attribute `info` (`ProviderInfo`) identifies the provider in logs and traces.

    A call may have time limits: those of `request.call.leash` (see `fluxibly.limits.Leash`), and of `timeout=` in
    `request.call.timeouts`. A provider that keeps them by itself has the attribute `obeys = True`. Any other provider is
    called and read in another thread while a limit applies, in a copy of the context. When the time is up, the caller
    stops waiting, and the provider runs on until it returns; then its stream is closed.

    A stream may be opened in one thread, and read on and closed in another: where several requests of a call race, each is
    sent in a thread of its own, and the winner's stream is read in the consumer's. All of it runs in one context.

    A call may also be given up in another thread, for example because another branch of it has answered. A provider whose
    wait can be ended from there calls `request.call.leash.hold(end)` before it waits, if there is a leash, and
    `release(end)` afterwards. The iterator of a stream may have a method `abort()` for the same: it ends a read in another
    thread, and all later reads. Any other provider runs on until it returns, and nobody waits for its answer.
    """

    def complete(self, request: Request, /) -> Response | str: ...


@runtime_checkable
class AsyncProvider(Protocol):
    """A `Provider` with coroutine functions `complete` and `aclose`, and an async generator function `stream`.

    Without `obeys = True`, a call with time limits is cancelled when its time is up. A stream may be opened in one task, and
    read on and closed in another. So no cancel scope, task group or `asyncio.timeout` may be open across a `yield`.
    """

    async def complete(self, request: Request, /) -> Response | str: ...


class StreamingProvider(Protocol):
    """A provider, sync or async, that only streams. Whole answers are made of its chunks."""

    def stream(
        self, request: Request, /
    ) -> Iterable[Chunk | str | Response] | AsyncIterable[Chunk | str | Response]: ...


def for_pipeline(provider: Any, *, asynchronous: bool) -> Any:
    """Return a provider as a sync or async pipeline calls it: adapted if it only streams, or is sync for an async pipeline.

    Raises:
        TypeError: the provider is asynchronous, and the pipeline is not.
    """
    only_streams = not hasattr(provider, "complete")
    if not asynchronous:
        if is_async(provider):
            raise TypeError(f"the provider {type(provider).__name__} is asynchronous; use AsyncPipeline or AsyncLLM")
        return StreamOnly(provider) if only_streams else provider
    adapted = provider if is_async(provider) else Threaded(provider)
    # Outside of the threads, so that a cancelled call closes the stream after the read that is under way.
    return AsyncStreamOnly(adapted, info_of(provider, None).name) if only_streams else adapted


def is_async(provider: object) -> bool:
    """Whether a provider is an `AsyncProvider`."""
    complete = getattr(provider, "complete", None)
    stream = getattr(provider, "stream", None)
    return inspect.iscoroutinefunction(complete) or inspect.isasyncgenfunction(stream)


def answers(value: object) -> bool:
    """Whether an object has a method of a provider."""
    return callable(getattr(value, "complete", None)) or callable(getattr(value, "stream", None))


def check(provider: object) -> None:
    """Raise a TypeError if `provider` cannot be a provider."""
    if isinstance(provider, type):
        raise TypeError(f"a provider is an object; {provider.__name__} is a class: write {provider.__name__}()")
    if not answers(provider):
        raise TypeError(
            f"expected a provider with a method complete(request) or stream(request), got {kind_of(provider)}"
        )


def info_of(provider: object, framework: str | None) -> ProviderInfo:
    """Return a provider's own `info`, or else an info named after its class and framework."""
    info = getattr(provider, "info", None)
    if isinstance(info, ProviderInfo):
        return info
    name = type(provider).__name__
    return ProviderInfo(name=name, framework=framework or "custom", telemetry_name=framework or name)


def pieces_of_stream(item: object, provider: str) -> Sequence[Chunk]:
    """Return the chunks that an item of a provider's stream stands for.

    Raises:
        TypeError: it is no part of an answer.
    """
    pieces = pieces_of(item)
    if pieces is None:
        raise TypeError(
            f"the provider {provider} yielded {kind_of(item)}, expected a Chunk, a str or a Response from its stream()"
        )
    return [unmarked(piece, provider) for piece in pieces]


def unmarked(chunk: Chunk, provider: str) -> Chunk:
    """Return a chunk of a provider, which must not be a mark: an answer of a provider is a single message."""
    if chunk.added is not None:
        raise TypeError(f"the provider {provider} yielded a Chunk with added=…, which only a middleware may emit")
    return chunk


def items_of(stream: object, provider: str) -> Iterable[Any]:
    """Return what a sync `stream` returned, if it can be read.

    Raises:
        TypeError: it cannot.
    """
    if isinstance(stream, Iterable) and not isinstance(stream, str):
        return stream  # pyright: ignore[reportUnknownVariableType]
    kind = kind_of(stream)
    if isinstance(stream, Coroutine):
        stream.close()  # otherwise Python warns that the coroutine was never awaited
    generator = "an async generator function" if isinstance(stream, (Coroutine, AsyncIterable)) else "a generator"
    raise TypeError(f"the stream() of {provider} returned {kind}; make it {generator}")


def obeys(provider: object) -> bool:
    """Whether a provider keeps the limits of a call by itself; see `Provider`."""
    return getattr(provider, "obeys", False) is True


def no_stream(provider: object) -> NotImplementedError:
    """Return the error for a provider without `stream`."""
    provider = provider.wrapped if isinstance(provider, Threaded) else provider
    return NotImplementedError(
        f"the provider {type(provider).__name__} has no stream(); use forward() or complete(), or add a method "
        "stream(request) that yields Chunk or str"
    )


T = TypeVar("T")
_END: Final = object()
"""The value that a stream's reader returns after the last item."""


async def in_thread(call: Callable[[], T]) -> T:
    """Run `call` in a worker thread with a copy of the context. A cancellation does not wait for the thread."""
    import anyio.to_thread  # late, to keep `import fluxibly` fast

    return await anyio.to_thread.run_sync(call, abandon_on_cancel=True)


class Threaded:
    """An `AsyncProvider` that runs a `Provider` in worker threads."""

    def __init__(self, wrapped: Provider) -> None:
        self.wrapped: Any = wrapped
        self.obeys = obeys(wrapped)
        if hasattr(wrapped, "stream"):
            self.stream = self._stream

    async def complete(self, request: Request) -> Response | str:
        result: Response | str = await in_thread(lambda: self.wrapped.complete(request))
        return result

    async def _stream(self, request: Request) -> AsyncGenerator[Chunk | str, None]:
        reader = _Reader(self.wrapped, request, copy_context())
        try:
            while (item := await in_thread(reader.read)) is not _END:
                yield item  # type: ignore[misc]  # a Chunk or str; the flow raises an error for anything else
        finally:
            # Closing may block on a connection. A read that a cancellation left running closes when it returns.
            reader.close_soon()

    async def aclose(self) -> None:
        close = getattr(self.wrapped, "close", None)
        if close is not None:
            await in_thread(close)


class StreamOnly:
    """A `Provider` that only streams, with whole answers made of its chunks."""

    def __init__(self, wrapped: Any) -> None:
        self.name = info_of(wrapped, None).name
        self.stream = wrapped.stream
        self.obeys = obeys(wrapped)
        self.close = getattr(wrapped, "close", _nothing)

    def complete(self, request: Request) -> Response:
        answer = Aggregator()
        stream = iter(items_of(self.stream(request), self.name))
        try:
            for item in stream:
                for piece in pieces_of_stream(item, self.name):
                    answer.add(piece)
        finally:
            getattr(stream, "close", _nothing)()
        return answer.response()


class AsyncStreamOnly:
    """An `AsyncProvider` that only streams, with whole answers made of its chunks. `name` is the provider's in messages."""

    def __init__(self, wrapped: Any, name: str) -> None:
        self.name = name
        self.stream = wrapped.stream
        self.obeys = obeys(wrapped)
        if hasattr(wrapped, "aclose"):
            self.aclose = wrapped.aclose

    async def complete(self, request: Request) -> Response:
        answer = Aggregator()
        stream = aiter(self.stream(request))
        try:
            async for item in stream:
                for piece in pieces_of_stream(item, self.name):
                    answer.add(piece)
        finally:
            if hasattr(stream, "aclose"):
                await stream.aclose()
        return answer.response()


def _nothing() -> None:
    """Do nothing, where there is nothing to close."""


class _Reader:
    """A reader of a provider's stream. Each step runs in the same context, and the last thread in it closes it."""

    def __init__(self, provider: Any, request: Request, context: Context) -> None:
        self.provider = provider
        self.request = request
        self.context = context
        self.iterator: Iterator[Chunk | str] | None = None
        self.reading = False
        self.closing = False

    def read(self) -> object:
        self.reading = True
        try:
            return self.context.run(self._next)
        finally:
            self.reading = False
            if self.closing:
                self._close()

    def _next(self) -> object:
        if self.iterator is None:
            self.iterator = iter(items_of(self.provider.stream(self.request), self.request.call.provider.name))
        return next(self.iterator, _END)

    def close_soon(self) -> None:
        self.closing = True
        if self.reading:
            abort = getattr(self.iterator, "abort", None)
            if abort is not None:
                abort()
        else:
            self._close()

    def _close(self) -> None:
        iterator, self.iterator = self.iterator, None
        close = getattr(iterator, "close", None)
        if close is not None:
            self.context.run(close)
