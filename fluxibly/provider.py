"""The interface of a provider, and the adapter that runs a synchronous provider in threads for async pipelines."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Callable, Iterator
from contextvars import Context, copy_context
from typing import Any, Final, Protocol, TypeVar, runtime_checkable

from fluxibly._checks import kind_of
from fluxibly.types import Chunk, ProviderInfo, Request, Response


@runtime_checkable
class Provider(Protocol):
    """An object that answers requests. Only `complete` is required::

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
    """

    def complete(self, request: Request, /) -> Response | str: ...


@runtime_checkable
class AsyncProvider(Protocol):
    """A `Provider` with coroutine functions `complete` and `aclose`, and an async generator function `stream`."""

    async def complete(self, request: Request, /) -> Response | str: ...


def is_async(provider: object) -> bool:
    """Whether a provider is an `AsyncProvider`."""
    complete = getattr(provider, "complete", None)
    stream = getattr(provider, "stream", None)
    return inspect.iscoroutinefunction(complete) or inspect.isasyncgenfunction(stream)


def check(provider: object) -> None:
    """Raise a TypeError if `provider` cannot be a provider."""
    if isinstance(provider, type):
        raise TypeError(f"a provider is an object; {provider.__name__} is a class: write {provider.__name__}()")
    if not callable(getattr(provider, "complete", None)):
        raise TypeError(f"expected a provider with a method complete(request), got {kind_of(provider)}")


def info_of(provider: object, framework: str | None) -> ProviderInfo:
    """Return a provider's own `info`, or else an info named after its class and framework."""
    info = getattr(provider, "info", None)
    if isinstance(info, ProviderInfo):
        return info
    name = type(provider).__name__
    return ProviderInfo(name=name, framework=framework or "custom", telemetry_name=framework or name)


def no_stream(provider: object) -> NotImplementedError:
    """Return the error for a provider without `stream`."""
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
            self.iterator = iter(self.provider.stream(self.request))
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
