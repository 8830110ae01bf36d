"""Calls to another library: its streams are released, its threads end, and what it holds for a loop ends with the loop."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import anyio
import pytest

from fluxibly.providers._libraries.calls import (
    LibraryLimits,
    LibraryStream,
    LibraryTimeout,
    OpenStream,
    acall_within,
    call_within,
    library_stream,
)
from fluxibly.providers._libraries.loops import PerLoop
from fluxibly.types import Chunk


def explain(error: Exception, begun: bool) -> Exception:
    """Return the error with a note of whether an item had arrived."""
    error.add_note("begun" if begun else "not begun")
    return error


def words(item: str) -> list[Chunk]:
    return [Chunk(word) for word in item.split()]


def last() -> list[Chunk]:
    return [Chunk("end")]


def texts(stream: Iterable[Chunk]) -> list[str]:
    return [chunk.text for chunk in stream]


class Library:
    """A library's stream. It waits for `go_on` before "stuck", raises an item that is an exception, and notes its end."""

    def __init__(self, *items: str | BaseException) -> None:
        self.items = items
        self.reading = threading.Event()
        self.go_on = threading.Event()
        self.released = threading.Semaphore(0)
        self.releases = 0
        self.cuts = 0

    def _read(self) -> Iterator[str]:
        for item in self.items:
            if isinstance(item, BaseException):
                raise item
            if item == "stuck":
                self.reading.set()
                self.go_on.wait(10)
            yield item

    def close(self) -> None:
        self.releases += 1
        self.released.release()

    def cut(self) -> None:
        """End the read under way, as the end of its connection would."""
        self.cuts += 1
        self.go_on.set()

    def stream(self, **limits: Any) -> LibraryStream:
        def opened() -> OpenStream:
            return OpenStream(self._read(), self.close, self.cut)

        return LibraryStream(opened, LibraryLimits(**limits), words, last, explain)


@pytest.fixture(autouse=True)
def threads_end() -> Iterator[None]:
    """Check that no thread of a call stays behind."""
    before = threading.enumerate()
    yield
    for thread in threading.enumerate():
        if thread not in before:
            thread.join(5)
            assert not thread.is_alive()


class TestThreads:
    def test_a_result(self) -> None:
        """A call in time returns its result, or raises its error, also one that is no Exception."""
        assert call_within(lambda: 3, LibraryLimits(call=5)) == 3

        def fail(error: BaseException) -> None:
            raise error

        for error in (ValueError("no"), SystemExit(3)):
            with pytest.raises(type(error)):
                call_within(lambda error=error: fail(error), LibraryLimits(call=5))  # type: ignore[misc]  # bound at once

    def test_a_late_result(self) -> None:
        """The caller stops waiting, and the thread ends when the library returns."""
        go_on = threading.Event()
        with pytest.raises(LibraryTimeout) as caught:
            call_within(lambda: go_on.wait(10), LibraryLimits(call=0.05))
        assert (caught.value.phase, caught.value.seconds) == ("total", 0.05)
        go_on.set()

    def test_context_variables(self) -> None:
        """The library runs in the caller's context, so that tracing within it finds the current span."""
        current: ContextVar[str] = ContextVar("current", default="none")
        token = current.set("span")
        assert call_within(current.get, LibraryLimits(call=5)) == "span"
        current.reset(token)


class TestStreams:
    def test_to_the_end(self) -> None:
        """The stream is released when it has ended, without a close."""
        library = Library("one two", "three")
        assert texts(library.stream()) == ["one", "two", "three", "end"]
        assert (library.releases, library.cuts) == (1, 0)

    def test_a_failure(self) -> None:
        """A failure releases the stream. The error knows whether anything had come."""
        for items, note in ((("one", ValueError("no")), "begun"), ((ValueError("no"),), "not begun")):
            library = Library(*items)
            stream = library.stream()
            with pytest.raises(ValueError, match="no") as caught:
                list(stream)
            assert caught.value.__notes__ == [note]
            assert library.releases == 1
            assert list(stream) == []

    def test_a_close_between_reads(self) -> None:
        """What has come and was not delivered is dropped. A second close has no effect."""
        library = Library("one two", "three")
        stream = library.stream()
        assert next(stream).text == "one"
        stream.close()
        stream.close()
        assert list(stream) == []
        assert (library.releases, library.cuts) == (1, 0)

    def test_a_close_before_the_first_read(self) -> None:
        """Nothing is opened."""
        library = Library("one")
        stream = library.stream()
        stream.close()
        assert list(stream) == []
        assert library.releases == 0

    def test_a_stalled_read(self) -> None:
        """The read is cut, and the stream is released when the read has returned."""
        library = Library("one", "stuck")
        stream = library.stream(idle=0.05)
        assert next(stream).text == "one"
        with pytest.raises(LibraryTimeout) as caught:
            next(stream)
        assert (caught.value.phase, library.cuts) == ("idle", 1)
        assert library.released.acquire(timeout=5)
        assert (list(stream), library.releases) == ([], 1)

    def test_only_a_total(self) -> None:
        """A limit on the whole stream ends a read, although no other limit is set."""
        library = Library("one", "stuck")
        with pytest.raises(LibraryTimeout) as caught:
            list(library.stream(stream=0.1))
        assert (caught.value.phase, caught.value.seconds) == ("total", 0.1)
        assert library.released.acquire(timeout=5)

    def test_a_total_that_passes_between_reads(self) -> None:
        """The next read fails at once, and for that reason."""
        library = Library("one", "two")
        stream = library.stream(stream=0.05)
        assert next(stream).text == "one"
        time.sleep(0.1)
        with pytest.raises(LibraryTimeout) as caught:
            next(stream)
        assert (caught.value.phase, caught.value.seconds) == ("total", 0.05)

    def test_an_abort_in_another_thread(self) -> None:
        """It ends the read."""
        library = Library("one", "stuck", "two")
        stream = library.stream()
        ended: list[BaseException] = []

        def read() -> None:
            try:
                list(stream)
            except InterruptedError as error:
                ended.append(error)

        stream.abort()  # before the first read, there is nothing to end
        thread = threading.Thread(target=read)
        thread.start()
        assert library.reading.wait(5)
        stream.abort()
        thread.join(5)
        assert "was closed while it was being read" in str(ended[0])
        assert library.released.acquire(timeout=5)


class AsyncLibrary:
    """An asynchronous stream of a library, whose release takes a moment."""

    def __init__(self, *items: str | BaseException, release: float = 0.02) -> None:
        self.items = iter(items)
        self.releases = 0
        self._release = release

    def __aiter__(self) -> AsyncLibrary:
        return self

    async def __anext__(self) -> str:
        item = next(self.items, None)
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, BaseException):
            raise item
        if item == "stuck":
            await asyncio.sleep(30)
        return item

    async def aclose(self) -> None:
        await asyncio.sleep(self._release)
        self.releases += 1

    def stream(self, **limits: Any) -> AsyncIterator[Chunk]:
        async def opened() -> AsyncIterator[Any]:
            return self

        return library_stream(opened, LibraryLimits(**limits), words, last, explain)


async def read_all(stream: AsyncIterator[Chunk]) -> list[str]:
    return [chunk.text async for chunk in stream]


class TestAsyncStreams:
    def test_to_the_end(self) -> None:
        """The stream is released when it has ended."""
        library = AsyncLibrary("one two", "three")
        assert asyncio.run(read_all(library.stream())) == ["one", "two", "three", "end"]
        assert library.releases == 1

    @pytest.mark.parametrize("error", [ValueError("no"), TimeoutError("the library's own")])
    def test_a_failure(self, error: Exception) -> None:
        """A failure releases the stream. A timeout of the library's own is not one of ours."""
        library = AsyncLibrary("one", error)
        with pytest.raises(type(error)) as caught:
            asyncio.run(read_all(library.stream(idle=5)))
        assert (caught.value, library.releases) == (error, 1)

    def test_a_stalled_read(self) -> None:
        """It is cancelled, and the stream released."""
        library = AsyncLibrary("one", "stuck")
        with pytest.raises(LibraryTimeout):
            asyncio.run(read_all(library.stream(idle=0.05)))
        assert library.releases == 1

    @pytest.mark.parametrize(("release", "releases"), [(0.02, 1), (30, 0)])
    def test_a_cancelled_task(self, release: float, releases: int) -> None:
        """It releases the stream too, but does not wait for long."""
        library = AsyncLibrary("one", "stuck", release=release)

        async def main() -> None:
            with anyio.fail_after(10):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(read_all, library.stream())
                    await anyio.sleep(0.05)
                    tasks.cancel_scope.cancel()

        anyio.run(main)
        assert library.releases == releases

    def test_a_call(self) -> None:
        """A call in time returns its result. A timeout of the library's own is not one of ours."""

        async def value() -> int:
            return 3

        async def own_timeout() -> None:
            raise TimeoutError("the library's own")

        async def main() -> None:
            assert await acall_within(value, LibraryLimits(call=5)) == 3
            with pytest.raises(TimeoutError, match="the library's own"):
                await acall_within(own_timeout, LibraryLimits(call=5))
            with pytest.raises(LibraryTimeout) as caught:
                await acall_within(lambda: asyncio.sleep(30), LibraryLimits(call=0.05))
            assert (caught.value.phase, caught.value.seconds) == ("total", 0.05)

        asyncio.run(main())


class Client:
    """What a library holds for an event loop."""


class TestLoops:
    def held(self, closed: list[Client]) -> PerLoop[Client]:
        async def close(client: Client) -> None:
            await asyncio.sleep(0)
            closed.append(client)

        return PerLoop(Client, close)

    def test_a_loop_that_ends(self) -> None:
        """Its value is closed, within the loop, and another loop has another value."""
        closed: list[Client] = []
        per_loop = self.held(closed)

        async def main() -> Client:
            first = per_loop.get()
            assert per_loop.get() is first
            assert closed == closed_before
            return first

        closed_before: list[Client] = []
        one = asyncio.run(main())
        assert closed == [one]
        closed_before = [one]
        two = asyncio.run(main())
        assert closed == [one, two]

    def test_a_close(self) -> None:
        """A value that was closed is not used again, and is closed once."""
        closed: list[Client] = []
        per_loop = self.held(closed)

        async def main() -> list[Client]:
            await per_loop.aclose()  # there is nothing to close
            first = per_loop.get()
            await per_loop.aclose()
            assert closed == [first]
            await per_loop.aclose()
            second = per_loop.get()
            assert second is not first
            return [first, second]

        assert asyncio.run(main()) == closed

    def test_a_loop_that_is_closed_without_its_shutdown(self) -> None:
        """Its value is forgotten when the next loop asks for one, so that a program may make any number of loops."""
        per_loop = self.held([])

        async def main() -> weakref.ref[Client]:
            return weakref.ref(per_loop.get())

        loop = asyncio.new_event_loop()
        first = loop.run_until_complete(main())
        loop.close()
        asyncio.run(main())
        gc.collect()
        assert first() is None
