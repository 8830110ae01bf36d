"""Streams that are closed or cancelled, by any thread or task and at any time."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from contextlib import suppress

import anyio
import pytest
from support.streams import REQUEST, Watch, texts

from fluxibly import Signal
from fluxibly.errors import ServerError
from fluxibly.flow import emit, gather, perform, sleep
from fluxibly.middleware import Retry
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.testing import AsyncScriptedProvider, ScriptedProvider, VirtualClock
from fluxibly.types import Chunk, Response


class TestClosing:
    def test_closing_twice_is_fine(self):
        """The second close does nothing."""
        watch = Watch()
        stream = Pipeline(ScriptedProvider("a b"), [watch]).stream(REQUEST)
        next(stream)
        stream.close()
        stream.close()
        assert watch.ends == ["GeneratorExit"]
        assert texts(stream) == []

    def test_another_thread_may_close_an_idle_stream(self):
        """If another thread closes the stream, its middleware still end in the stream's own context."""
        var = contextvars.ContextVar("var", default="outside")
        ends = []

        def with_var(request, call_next):
            token = var.set("inside")
            try:
                return (yield from call_next(request))
            finally:
                ends.append(var.get())
                var.reset(token)

        provider = ScriptedProvider("a b")
        stream = Pipeline(provider, [with_var]).stream(REQUEST)
        next(stream)
        assert var.get() == "outside"
        thread = threading.Thread(target=stream.close)
        thread.start()
        thread.join()
        assert ends == ["inside"]
        assert provider.closed == 1

    def test_another_task_may_close_an_idle_stream(self, backend):
        """If another task closes the stream, the provider's stream is closed before `aclose` returns."""
        provider, watch = AsyncScriptedProvider("a b"), Watch()

        async def main():
            stream = AsyncPipeline(provider, [watch]).stream(REQUEST)
            await anext(stream)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(stream.aclose)
            assert provider.closed == 1
            assert [chunk async for chunk in stream] == []

        anyio.run(main, backend=backend)
        assert watch.ends == ["GeneratorExit"]

    def test_closing_during_a_read_ends_the_read(self):
        """A provider's iterator with an `abort` ends its read at once; the reader's loop ends, and all is closed."""

        class Abortable:
            def __init__(self):
                self.aborted = threading.Event()
                self.closed = False
                self.reads = 0

            def __iter__(self):
                return self

            def __next__(self):
                self.reads += 1
                if self.reads == 1:
                    return "a"
                reading.set()
                assert self.aborted.wait(10)
                raise ConnectionError("aborted")

            def abort(self):
                self.aborted.set()

            def close(self):
                self.closed = True

        class Provider:
            def complete(self, request):
                return ""

            def stream(self, request):
                return iterator

        reading, iterator, watch = threading.Event(), Abortable(), Watch()
        stream = Pipeline(Provider(), [watch]).stream(REQUEST)
        got = []

        def read():
            try:
                got.extend(texts(stream))
            except Exception as error:  # noqa: BLE001  # the test compares whatever is raised
                got.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        assert reading.wait(10)
        stream.close()
        thread.join(10)
        assert not thread.is_alive()
        assert iterator.closed
        assert got == ["a"]
        assert watch.ends == ["GeneratorExit"]

    def test_closing_during_an_async_read_ends_the_read(self, backend):
        """An `aclose` in another task calls the `abort` of the provider's iterator."""

        class Abortable:
            def __init__(self):
                self.aborted = anyio.Event()
                self.reading = anyio.Event()
                self.closed = False

            def __aiter__(self):
                return self

            async def __anext__(self):
                if not self.reading.is_set():
                    self.reading.set()
                    return "a"
                await self.aborted.wait()
                raise ConnectionError("aborted")

            def abort(self):
                self.aborted.set()

            async def aclose(self):
                self.closed = True

        class Provider:
            async def complete(self, request):
                return ""

            def stream(self, request):
                return iterators[0]

        async def main():
            iterators.append(Abortable())
            stream = AsyncPipeline(Provider(), [watch]).stream(REQUEST)

            async def read():
                got.extend([chunk.text async for chunk in stream])

            with anyio.fail_after(10):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(read)
                    await iterators[0].reading.wait()
                    await anyio.lowlevel.checkpoint()
                    await stream.aclose()

        iterators, got, watch = [], [], Watch()
        anyio.run(main, backend=backend)
        assert got == ["a"]
        assert iterators[0].closed
        assert watch.ends == ["GeneratorExit"]

    def test_closing_ends_a_read_of_an_async_generator(self, backend):
        """An async generator that waits is cancelled, and the reader's task goes on after its loop."""
        watch, ends = Watch(), []

        class Waiting(AsyncScriptedProvider):
            async def stream(self, request):
                try:
                    yield "a"
                    reading[0].set()
                    await anyio.sleep_forever()
                finally:
                    ends.append("released")

        async def main():
            reading.append(anyio.Event())
            stream = AsyncPipeline(Waiting(), [watch]).stream(REQUEST)

            async def read():
                assert [chunk.text async for chunk in stream] == ["a"]
                await anyio.lowlevel.checkpoint()
                ends.append("reader went on")

            with anyio.fail_after(10):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(read)
                    await reading[0].wait()
                    await stream.aclose()

        reading = []
        anyio.run(main, backend=backend)
        assert ends == ["released", "reader went on"]
        assert watch.ends == ["GeneratorExit"]

    @pytest.mark.parametrize("waits", ["sleep", "perform", "gather"])
    def test_closing_ends_a_wait_between_two_turns(self, backend, waits):
        """A close ends what the read waits for, although the stream of the turn before could be aborted."""

        class Abortable:
            def __init__(self):
                self.left = ["one"]

            def __aiter__(self):
                return self

            async def __anext__(self):
                if not self.left:
                    raise StopAsyncIteration
                return self.left.pop()

            def abort(self):
                pass

        class Provider:
            def stream(self, request):
                return Abortable()

            async def complete(self, request):
                raise AssertionError

        async def wait():
            await anyio.sleep(30)

        def two_turns(request, call_next):
            response = yield from call_next(request)
            yield from emit(Chunk(added=(response.message,)))
            if waits == "sleep":
                yield from sleep(30)
            elif waits == "perform":
                yield from perform(None, wait)
            else:
                yield from gather(request, perform(None, wait), sleep(30))
            return (yield from call_next(request))

        async def main():
            stream = AsyncPipeline(Provider(), [two_turns]).stream(REQUEST)
            with anyio.fail_after(5):
                async with anyio.create_task_group() as group:
                    group.start_soon(read, stream)
                    await anyio.sleep(0.1)
                    await stream.aclose()

        async def read(stream):
            async for _ in stream:
                pass

        anyio.run(main, backend=backend)

    def test_a_close_just_before_branches_begin_is_not_lost(self):
        """A close in another thread ends the wait for branches, also if there were none when it came."""
        streams = []

        def closes():
            closing = threading.Thread(target=streams[0].close)
            closing.start()
            closing.join()
            yield from sleep(30)

        def gathers(request, call_next):
            yield from call_next(request)
            yield from gather(request, closes(), sleep(30))

        streams.append(Pipeline(ScriptedProvider("a"), [gathers]).stream(REQUEST))
        begun = time.monotonic()
        assert texts(streams[0]) == ["a"]
        assert time.monotonic() - begun < 5

    def test_a_cancellation_meanwhile_is_not_lost(self, backend):
        """A reader that is cancelled and closed at the same time ends as cancelled."""
        ends = []

        class Waiting(AsyncScriptedProvider):
            async def stream(self, request):
                reading[0].set()
                await anyio.sleep_forever()
                yield "a"

        async def main():
            reading.append(anyio.Event())
            stream = AsyncPipeline(Waiting()).stream(REQUEST)

            async def read():
                with anyio.CancelScope() as scope:
                    scopes.append(scope)
                    async for _ in stream:
                        pass
                    await anyio.lowlevel.checkpoint()
                    ends.append("not cancelled")
                ends.append(scope.cancelled_caught)

            with anyio.fail_after(10):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(read)
                    await reading[0].wait()
                    scopes[0].cancel()
                    await stream.aclose()

        reading, scopes = [], []
        anyio.run(main, backend=backend)
        assert ends == [True]

    def test_closing_during_a_wait_sends_nothing_more(self):
        """The wait of a retry in another thread ends with the stream, not with another attempt."""
        waiting, go_on = threading.Event(), threading.Event()

        class Clock(VirtualClock):
            def sleep(self, seconds, /):
                waiting.set()
                assert go_on.wait(10)

        provider, watch = ScriptedProvider(ServerError("down"), "a"), Watch()
        stream = Pipeline(provider, [watch, Retry()], clock=Clock()).stream(REQUEST)
        got = []
        thread = threading.Thread(target=lambda: got.append(texts(stream)))
        thread.start()
        assert waiting.wait(10)
        stream.close()
        go_on.set()
        thread.join(10)
        assert got == [[]]
        assert len(provider.requests) == 1
        assert watch.ends == ["GeneratorExit"]

    @pytest.mark.parametrize("until", [None, Signal()], ids=["for a time", "for a signal"])
    def test_closing_ends_a_wait(self, until):
        """A wait in another thread ends at once, whatever it waits for."""
        waiting = threading.Event()

        def wait(request, call_next):
            waiting.set()
            yield from sleep(20, until=until)
            return (yield from call_next(request))

        provider, watch = ScriptedProvider("a"), Watch()
        stream = Pipeline(provider, [watch, wait]).stream(REQUEST)
        got = []
        thread = threading.Thread(target=lambda: got.append(texts(stream)))
        thread.start()
        assert waiting.wait(10)
        stream.close()
        thread.join(10)
        assert got == [[]]
        assert not provider.requests
        assert watch.ends == ["GeneratorExit"]

    @pytest.mark.parametrize("seconds", [0, 20])
    def test_a_signal_ends_a_wait(self, seconds):
        """Set before the wait, by another thread during it, or not in time."""
        ends = []

        def wait(request, call_next):
            for signal in (Signal(), Signal()):
                timer = threading.Timer(0.05, signal.set)
                timer.start()
                ends.append((yield from sleep(seconds, until=signal)))
                timer.join()
                ends.append((yield from sleep(20, until=signal)))
                assert not signal._waiters
            return (yield from call_next(request))

        assert texts(Pipeline(ScriptedProvider("a"), [wait]).stream(REQUEST)) == ["a"]
        assert ends == [seconds > 0, True] * 2

    def test_an_async_close_at_the_end_of_a_wait(self, backend):
        """It finds nothing to cancel, because the wait is over, but the next wait does not begin."""
        provider, watch = AsyncScriptedProvider("a"), Watch()

        async def main():
            waiting, over = anyio.Event(), anyio.Event()

            async def step():
                waiting.set()
                await over.wait()

            def wait(request, call_next):
                yield from perform(None, step)
                yield from sleep(20)
                return (yield from call_next(request))

            stream = AsyncPipeline(provider, [watch, wait]).stream(REQUEST)

            async def read():
                assert [chunk async for chunk in stream] == []

            with anyio.fail_after(10):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(read)
                    await waiting.wait()
                    over.set()
                    await stream.aclose()

        anyio.run(main, backend=backend)
        assert not provider.requests
        assert watch.ends == ["GeneratorExit"]

    def test_an_async_close_during_a_wait_sends_nothing_more(self, backend):
        """The wait of a retry in another task ends with the stream, not with another attempt."""

        class Clock(VirtualClock):
            async def asleep(self, seconds, /):
                events[0].set()
                await events[1].wait()

        events = []
        provider, watch = AsyncScriptedProvider(ServerError("down"), "a"), Watch()

        async def main():
            events.extend([anyio.Event(), anyio.Event()])
            stream = AsyncPipeline(provider, [watch, Retry()], clock=Clock()).stream(REQUEST)

            async def read():
                assert [chunk async for chunk in stream] == []

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read)
                await events[0].wait()
                await stream.aclose()
                events[1].set()

        anyio.run(main, backend=backend)
        assert len(provider.requests) == 1
        assert watch.ends == ["GeneratorExit"]

    def test_reading_while_another_thread_closes(self):
        """A read while another thread closes finds the end of the stream, even if the provider closes slowly."""
        closing, go_on = threading.Event(), threading.Event()

        class Slow(ScriptedProvider):
            def stream(self, request):
                try:
                    yield "a"
                    yield "b"
                finally:
                    closing.set()
                    assert go_on.wait(10)

        stream = Pipeline(Slow()).stream(REQUEST)
        next(stream)
        thread = threading.Thread(target=stream.close)
        thread.start()
        assert closing.wait(10)
        assert texts(stream) == []
        stream.close()
        go_on.set()
        thread.join(10)

    def test_a_second_reader_is_refused(self):
        """Two threads cannot read one stream at once."""
        reading, go_on = threading.Event(), threading.Event()

        class Slow(ScriptedProvider):
            def stream(self, request):
                reading.set()
                assert go_on.wait(10)
                yield "a"

        stream = Pipeline(Slow()).stream(REQUEST)
        got = []
        thread = threading.Thread(target=lambda: got.extend(texts(stream)))
        thread.start()
        assert reading.wait(10)
        with pytest.raises(RuntimeError, match="another thread is reading this stream"):
            next(stream)
        go_on.set()
        thread.join(10)
        assert got == ["a"]

    def test_a_failure_to_release_is_raised(self):
        """An error of the provider's own clean-up reaches the caller of `close`, after the flow has ended."""

        class Clumsy:
            def complete(self, request):
                return ""

            def stream(self, request):
                try:
                    yield "a"
                    yield "b"
                finally:
                    raise OSError("cannot close")

        watch = Watch()
        stream = Pipeline(Clumsy(), [watch]).stream(REQUEST)
        next(stream)
        with pytest.raises(OSError, match="cannot close"):
            stream.close()
        assert watch.ends == ["GeneratorExit"]

    def test_a_middleware_that_yields_in_its_finally_is_named(self, caplog):
        """A middleware that yields in its `finally` is logged, and the close completes."""

        def stubborn(request, call_next):
            try:
                return (yield from call_next(request))
            finally:
                yield from call_next(request)

        provider = ScriptedProvider("a b", "c")
        stream = Pipeline(provider, [stubborn]).stream(REQUEST)
        next(stream)
        stream.close()
        assert provider.opened == provider.closed == 1
        assert "stubborn yielded again after GeneratorExit" in caplog.text

    def test_of_several_such_middleware_the_innermost_is_named(self, caplog):
        """The innermost yielded first; the layers outside of it may only have reacted."""

        def outer(request, call_next):
            try:
                return (yield from call_next(request))
            finally:
                yield from sleep(0)

        def inner(request, call_next):
            try:
                return (yield from call_next(request))
            finally:
                yield from sleep(0)

        stream = Pipeline(ScriptedProvider("a b"), [outer, inner]).stream(REQUEST)
        next(stream)
        stream.close()
        assert "inner yielded again after GeneratorExit" in caplog.text

    @pytest.mark.parametrize("inside", [False, True])
    def test_a_runtime_error_of_a_middleware_is_its_own(self, inside):
        """An error that a middleware raises when it is closed reaches the caller, whatever it says or hides."""

        def ignoring():
            with suppress(GeneratorExit):
                yield
            yield

        def stubborn(request, call_next):
            try:
                return (yield from call_next(request))
            finally:
                yield from call_next(request)

        def failing(request, call_next):
            try:
                return (yield from call_next(request))
            finally:
                if inside:
                    raise RuntimeError("mine")
                own = ignoring()
                next(own)
                own.close()

        stream = Pipeline(ScriptedProvider("a b"), [failing, *([stubborn] if inside else [])]).stream(REQUEST)
        next(stream)
        with pytest.raises(RuntimeError, match="mine" if inside else "generator ignored GeneratorExit"):
            stream.close()


class TestCancellation:
    def test_a_cancelled_read_passes_through_the_flow(self, backend):
        """The flow sees the cancellation, the provider is released, and the cancel scope gets its exception."""
        watch = Watch()
        released = []

        class Waiting(AsyncScriptedProvider):
            async def stream(self, request):
                try:
                    yield "a"
                    await anyio.sleep_forever()
                finally:
                    released.append(True)

        async def main():
            with anyio.move_on_after(3600) as scope:
                async with AsyncPipeline(Waiting(), [watch]).stream(REQUEST) as stream:
                    async for _ in stream:
                        scope.cancel()
            assert scope.cancelled_caught

        anyio.run(main, backend=backend)
        assert released == [True]
        assert watch.ends in (["CancelledError"], ["Cancelled"])

    def test_asyncio_timeout_works(self):
        """`asyncio.timeout` around a read raises its own TimeoutError."""

        class Waiting(AsyncScriptedProvider):
            async def stream(self, request):
                yield "a"
                await asyncio.Event().wait()

        async def main():
            async with asyncio.timeout(0.01), AsyncPipeline(Waiting(), [Watch()]).stream(REQUEST) as stream:
                async for _ in stream:
                    pass

        with pytest.raises(TimeoutError):
            asyncio.run(main())

    def test_a_middleware_that_swallows_a_cancellation_is_named(self, caplog):
        """The caller's timeout still works, and a note on the exception names the middleware."""

        def greedy(request, call_next):
            try:
                return (yield from call_next(request))
            except BaseException:  # noqa: BLE001  # the mistake under test
                return Response("nothing happened")

        class Waiting(AsyncScriptedProvider):
            async def stream(self, request):
                yield "a"
                await asyncio.Event().wait()

        async def main():
            async with asyncio.timeout(0.01), AsyncPipeline(Waiting(), [greedy]).stream(REQUEST) as stream:
                async for _ in stream:
                    pass

        with pytest.raises(TimeoutError) as caught:
            asyncio.run(main())
        cause = caught.value.__cause__
        assert isinstance(cause, asyncio.CancelledError)
        assert "greedy returned normally after CancelledError" in cause.__notes__[0]
        assert "greedy returned normally after CancelledError" in caplog.text
