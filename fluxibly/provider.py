"""What a provider is, an object with one or two methods; and a synchronous one run in threads, for async pipelines."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Callable, Iterator
from contextvars import Context, copy_context
from typing import Any, Final, Protocol, TypeVar, runtime_checkable

from fluxibly.types import Chunk, ProviderInfo, Request, Response


@runtime_checkable
class Provider(Protocol):
    """Answers requests. Only `complete` is needed::

        class Parrot:
            def complete(self, request: Request) -> str:
                return request.messages[-1].text

            def stream(self, request: Request) -> Iterator[str]:
                yield from request.messages[-1].text

    `complete` returns a `Response`, or a str for its text. `stream(request)`, if there is one, returns an iterator of
    `Chunk` or str; a generator's `finally`, or an iterator's own `close()`, releases what it holds. `close()`, if
    there is one, ends the provider. Raise `ProviderError("…", retryable=True)` for what may succeed if tried again;
    any other exception reaches the caller as it is.

    An attribute `info` (`ProviderInfo`), if there is one, says who this is in logs and traces.
    """

    def complete(self, request: Request, /) -> Response | str: ...


@runtime_checkable
class AsyncProvider(Protocol):
    """A `Provider` whose `complete` is a coroutine function, `stream` an async generator and `aclose` a coroutine."""

    async def complete(self, request: Request, /) -> Response | str: ...


def is_async(provider: object) -> bool:
    """Whether a provider is an `AsyncProvider`."""
    complete = getattr(provider, "complete", None)
    stream = getattr(provider, "stream", None)
    return inspect.iscoroutinefunction(complete) or inspect.isasyncgenfunction(stream)


def check(provider: object) -> None:
    """Raise a TypeError unless `provider` can be one."""
    if isinstance(provider, type):
        raise TypeError(f"a provider is an object; {provider.__name__} is a class: write {provider.__name__}()")
    if not callable(getattr(provider, "complete", None)):
        raise TypeError(f"a provider has a method complete(request), which {type(provider).__name__} lacks")


def info_of(provider: object, framework: str | None) -> ProviderInfo:
    """Who a provider is: its own `info` if it has one, named after its class and framework."""
    info = getattr(provider, "info", None)
    if isinstance(info, ProviderInfo):
        return info
    name = type(provider).__name__
    return ProviderInfo(name=name, framework=framework or "custom", telemetry_name=framework or name)


def no_stream(provider: object) -> NotImplementedError:
    """The error for a provider without `stream`."""
    return NotImplementedError(
        f"the provider {type(provider).__name__} has no stream(); use forward() or complete(), or give it a method "
        "stream(request) that yields Chunk or str"
    )


T = TypeVar("T")
_END: Final = object()
"""What a stream's reader gives after the last item."""


async def in_thread(call: Callable[[], T]) -> T:
    """Run `call` in a worker thread, with a copy of the context; a cancellation lets go of it where it is."""
    import anyio.to_thread  # late, for the sake of `import fluxibly`

    return await anyio.to_thread.run_sync(call, abandon_on_cancel=True)


class Threaded:
    """An `AsyncProvider` made of a `Provider`."""

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
                yield item  # type: ignore[misc]  # a Chunk or str, or an error for the flow to tell of
        finally:
            # Closing may block (a connection); a read that was let go of by a cancellation closes when it returns.
            reader.close_soon()

    async def aclose(self) -> None:
        close = getattr(self.wrapped, "close", None)
        if close is not None:
            await in_thread(close)


class _Reader:
    """Steps a provider's stream, always in one context, and closes it in whichever thread has it last."""

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
