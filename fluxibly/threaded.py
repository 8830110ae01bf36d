"""A synchronous provider, run in worker threads, for async pipelines on asyncio and trio."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from contextvars import Context, copy_context
from typing import Any, TypeVar

import anyio.to_thread

from fluxibly.effects import END
from fluxibly.provider import Provider
from fluxibly.types import Chunk, Request, Response

T = TypeVar("T")


async def in_thread(call: Callable[[], T]) -> T:
    """Run `call` in a worker thread, with a copy of the context; a cancellation lets go of it where it is."""
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
            while (item := await in_thread(reader.read)) is not END:
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
        return next(self.iterator, END)

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
