"""What the consumer of a stream holds: `Stream` and `AsyncStream`, thin handles of the drivers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from fluxibly import _abandoned
from fluxibly._drivers.streams import CLOSING, AsyncStreamDriver, StreamDriver, SyncStreamDriver, is_occupied
from fluxibly.types import Chunk, Response, Restart

if TYPE_CHECKING:
    from typing import Self

Event = TypeVar("Event", bound="Chunk | Restart", covariant=True)


class Stream(Generic[Event]):
    """A streamed answer: iterate its `Chunk`s (and `Restart`s, if asked for), then read `response`.

    Use it in a `with` block, so that leaving early releases the connection. One thread reads at a time; `close` may be
    called from any.
    """

    __slots__ = ("__weakref__", "_driver")

    def __init__(self, driver: SyncStreamDriver) -> None:
        self._driver = driver

    def __iter__(self) -> Iterator[Event]:
        """Yield the remaining events."""
        # A generator, because resuming it is cheaper than a call of `__next__`.
        driver = self._driver
        run, events, closing = driver.context.run, driver.events, CLOSING
        while True:
            try:
                event: Any = run(next, events, None)
            except BaseException as error:
                if isinstance(error, RuntimeError) and is_occupied(error):
                    if driver.state in ("closing", "ended"):
                        return
                    raise RuntimeError("another thread is reading this stream") from None
                if driver.stage is closing:
                    driver.finish_closing()
                raise
            # A close that found the context occupied has set the stage before it gave up, so it is seen here.
            if driver.stage is closing:
                driver.finish_closing()
                return
            if event is None:
                return
            yield event

    def __next__(self) -> Event:
        for event in self:
            return event
        raise StopIteration

    @property
    def response(self) -> Response:
        """The whole response.

        Raises:
            RuntimeError: the stream has not been read to its end.
        """
        return _response(self._driver)

    def close(self) -> None:
        """Give the stream up, if it is not over: its middleware see it end as abandoned. Twice is fine.

        A read under way in another thread ends too: at once where the provider can (the HTTP ones and `local`), else
        when it returns.
        """
        self._driver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        _abandoned.abandon(self._driver)

    def texts(self) -> Generator[str, None, None]:
        """The non-empty texts of the chunks. The generator owns the stream: closing it closes the stream."""
        texts = self._texts()
        next(texts)  # so that closing it unread still ends the flow
        return texts

    def _texts(self) -> Generator[str, None, None]:
        try:
            yield ""
            for event in self:
                if isinstance(event, Chunk) and event.text:
                    yield event.text
        finally:
            _abandoned.abandon(self._driver)


class AsyncStream(Generic[Event]):
    """A `Stream` for `async with` and `async for`. One task reads at a time; `aclose` may be called from any."""

    __slots__ = ("__weakref__", "_driver")

    def __init__(self, driver: AsyncStreamDriver) -> None:
        self._driver = driver

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        driver = self._driver
        if driver.reading:
            raise RuntimeError("another task is reading this stream")
        if driver.state in ("closing", "ended"):
            raise StopAsyncIteration
        driver.reading = True
        closing = False
        try:
            event = await driver.read()
        finally:
            driver.reading = False
            if driver.stage == "closing":
                closing = True
                await driver.finish_closing()
        if event is None or closing:
            raise StopAsyncIteration
        return cast("Event", event)

    @property
    def response(self) -> Response:
        """The whole response.

        Raises:
            RuntimeError: the stream has not been read to its end.
        """
        return _response(self._driver)

    async def aclose(self) -> None:
        """Give the stream up, if it is not over: its middleware see it end as abandoned. Twice is fine.

        A read under way in another task ends too.
        """
        await self._driver.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        _abandoned.abandon(self._driver)

    async def texts(self) -> AsyncGenerator[str, None]:
        """The non-empty texts of the chunks. The generator owns the stream: closing it closes the stream."""
        try:
            async for event in self:
                if isinstance(event, Chunk) and event.text:
                    yield event.text
        finally:
            await self.aclose()


def _response(driver: StreamDriver) -> Response:
    if driver.response is None:
        raise RuntimeError("the stream has no response yet: iterate it to its end first")
    return driver.response
