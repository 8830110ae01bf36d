"""The consumer's handles of a stream: `Stream` and `AsyncStream`, thin layers over the drivers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from fluxibly import _abandoned
from fluxibly._drivers.endings import Home
from fluxibly._drivers.stepping import in_context
from fluxibly._drivers.streams import (
    CLOSING,
    AsyncStreamDriver,
    StreamDriver,
    SyncStreamDriver,
    is_occupied,
)
from fluxibly._loops import trio_here
from fluxibly.types import Chunk, Request, Response, Restart

if TYPE_CHECKING:
    from typing import Self

Event = TypeVar("Event", bound="Chunk | Restart", covariant=True)


class Stream(Generic[Event]):
    """A streamed answer: iterate over its `Chunk`s (and `Restart`s, if asked for), then read `response`.

    Use it in a `with` block, so that leaving early releases the connection. Only one thread may read at a time, but
    any thread may call `close`.
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
            # A close that found the context occupied has set the stage before it returned, so this check sees it.
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

    @property
    def partial_parsed(self) -> Any:
        """The value of the JSON that has come so far, if `into=` or a `Validation` says what it has to be; None before that.

        What is open ends here. It is an instance of the type if it fits already, and plain JSON values else. Of a list, the
        items are instances, and the last is left out until it fits.
        """
        return _partial_parsed(self._driver)

    def close(self) -> None:
        """Abandon the stream, unless it has ended. A second close does nothing.

        The middleware see the stream end as abandoned. A read under way in another thread ends too: at once if the
        provider supports that (the HTTP providers and `local` do), else when the read returns.
        """
        self._driver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        _abandoned.abandon(self._driver)

    def texts(self) -> Generator[str, None, None]:
        """Return a generator of the chunks' non-empty texts. It owns the stream: closing it closes the stream."""
        texts = self._texts()
        next(texts)  # start the generator, so that closing it unread still ends the flow
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
    """A `Stream` for `async with` and `async for`. Only one task may read at a time, but any may call `aclose`."""

    __slots__ = ("__weakref__", "_driver")

    def __init__(self, driver: AsyncStreamDriver) -> None:
        self._driver = driver

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        driver = self._driver
        if driver.reading:
            raise RuntimeError("another task is reading this stream")
        if driver.home is None:
            driver.home = Home()
        stage = (
            driver.stage
        )  # a name of its own, because type checkers take an attribute for unchanged over the `await`
        if stage != "open":
            raise StopAsyncIteration
        driver.reading = True
        closing = False
        try:
            # The fork is here, and not in the driver, because one more coroutine would cost each chunk a fifth.
            if trio_here():
                event = await driver.read_on_trio()
            else:
                event = await in_context(driver.context, driver.advance(), driver)
        finally:
            driver.reading = False
            if driver.stage is CLOSING:
                closing = True
                await driver.finish_closing()
        if closing or event is None:
            raise StopAsyncIteration
        return cast("Event", event)

    @property
    def response(self) -> Response:
        """The whole response.

        Raises:
            RuntimeError: the stream has not been read to its end.
        """
        return _response(self._driver)

    @property
    def partial_parsed(self) -> Any:
        """The value of the JSON that has come so far; see `Stream.partial_parsed`."""
        return _partial_parsed(self._driver)

    async def aclose(self) -> None:
        """Abandon the stream, unless it has ended. A second close does nothing.

        The middleware see the stream end as abandoned. A read under way in another task ends too.
        """
        await self._driver.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        _abandoned.abandon(self._driver)

    async def texts(self) -> AsyncGenerator[str, None]:
        """Yield the non-empty texts of the chunks. The generator owns the stream: closing it closes the stream."""
        try:
            async for event in self:
                if isinstance(event, Chunk) and event.text:
                    yield event.text
        finally:
            await self.aclose()


def request_of(stream: Stream[Any] | AsyncStream[Any]) -> Request:
    """Return the request of a stream, as its outermost layer got it."""
    return stream._driver.request  # pyright: ignore[reportPrivateUsage]  # the handles of this module are thin


def _partial_parsed(driver: StreamDriver) -> Any:
    if driver.response is not None and driver.response.parsed is not None:
        return driver.response.parsed
    from fluxibly._schemas.shapes import Shape  # late, because it imports the JSON library

    shapes: list[Any] = [getattr(layer, "shape", None) for layer in driver.call.layers]
    shape = next((each for each in shapes if isinstance(each, Shape)), None)
    return None if shape is None else shape.partial(driver.text)


def _response(driver: StreamDriver) -> Response:
    if driver.response is None:
        raise RuntimeError("the stream has no response yet: iterate over it to its end first")
    return driver.response
