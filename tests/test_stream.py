"""Streams: who may close one, when, and what happens to one that nobody holds any more."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import tracemalloc

import anyio
import pytest

from fluxibly import _abandoned
from fluxibly.errors import ServerError, StreamInterrupted
from fluxibly.flow import map_chunks
from fluxibly.middleware import Retry
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.testing import AsyncScriptedProvider, ScriptedProvider, VirtualClock
from fluxibly.types import Chunk, Request, Response, Restart

REQUEST = Request(model="m", messages="hi")
BACKENDS = ("asyncio", "trio")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


class Watch:
    """A middleware that notes how each call ends."""

    def __init__(self) -> None:
        self.ends: list[str] = []

    def __call__(self, request, call_next):
        how = "returned"
        try:
            return (yield from call_next(request))
        except BaseException as error:
            how = type(error).__name__
            raise
        finally:
            self.ends.append(how)


def texts(stream):
    return [chunk.text for chunk in stream]


class TestReading:
    def test_response_comes_at_the_end(self):
        """The response is there once the stream was read, and not before."""
        stream = Pipeline(ScriptedProvider("a b")).stream(REQUEST)
        with pytest.raises(RuntimeError, match="iterate it to its end"):
            stream.response
        assert texts(stream) == ["a", " b"]
        assert stream.response.text == "a b"
        assert stream.response.elapsed is not None
        assert texts(stream) == []

    def test_nothing_is_sent_before_the_first_read(self):
        """Making a stream starts the flow but asks nobody."""
        provider, watch = ScriptedProvider("a"), Watch()
        stream = Pipeline(provider, [watch]).stream(REQUEST)
        assert provider.requests == []
        stream.close()
        assert provider.requests == []
        assert watch.ends == ["GeneratorExit"]

    def test_an_error_of_the_start_comes_at_the_first_read(self):
        """A middleware that raises before it asks is heard of at the first read, after which the stream is over."""

        def refuse(request, call_next):
            raise PermissionError("no")
            yield

        stream = Pipeline(ScriptedProvider(), [refuse]).stream(REQUEST)
        with pytest.raises(PermissionError, match="no"):
            next(stream)
        assert texts(stream) == []

    def test_a_keyboard_interrupt_at_the_start_comes_at_once(self):
        """What is no Exception does not wait for the first read."""

        def interrupt(request, call_next):
            raise KeyboardInterrupt
            yield

        with pytest.raises(KeyboardInterrupt):
            Pipeline(ScriptedProvider(), [interrupt]).stream(REQUEST)

    def test_interleaved_streams_do_not_mix(self):
        """Two streams of one pipeline, read in turns, keep apart."""
        pipeline = Pipeline(ScriptedProvider("a b c", "x y z"), [Watch()])
        one, two = pipeline.stream(REQUEST), pipeline.stream(REQUEST)
        pairs = list(zip(one, two, strict=True))
        assert "".join(a.text for a, _ in pairs) == "a b c"
        assert "".join(b.text for _, b in pairs) == "x y z"
        assert (one.response.text, two.response.text) == ("a b c", "x y z")

    def test_a_whole_response_comes_as_one_chunk(self):
        """A short-circuit reaches the consumer of a stream as a chunk."""

        def cached(request, call_next):
            yield from ()
            return Response("from the cache", finish_reason="stop")

        stream = Pipeline(ScriptedProvider(), [cached]).stream(REQUEST)
        assert texts(stream) == ["from the cache"]
        assert stream.response.finish_reason == "stop"

    def test_texts_leaves_out_what_has_none(self):
        """`texts` gives the strings, without the empty ones."""
        stream = Pipeline(ScriptedProvider([Chunk("a"), Chunk(), Chunk(finish_reason="stop")])).stream(REQUEST)
        assert list(stream.texts()) == ["a"]

    def test_texts_closed_unread_ends_the_flow(self):
        """The generator is primed, so that closing it at once is an end."""
        watch = Watch()
        generator = Pipeline(ScriptedProvider("a"), [watch]).stream(REQUEST).texts()
        generator.close()
        assert watch.ends == ["GeneratorExit"]

    def test_async_texts(self, backend):
        """The same for `async for`; closing the generator, read or unread, ends the flow."""

        async def main():
            watch = Watch()
            provider = AsyncScriptedProvider(["a", Chunk(), "b"], "a b", "c")
            pipeline = AsyncPipeline(provider, [watch])
            assert [text async for text in pipeline.stream(REQUEST).texts()] == ["a", "b"]
            begun = pipeline.stream(REQUEST).texts()
            assert await anext(begun) == "a"
            await begun.aclose()
            unread = pipeline.stream(REQUEST).texts()
            await unread.aclose()
            del unread
            assert watch.ends == ["returned", "GeneratorExit", "GeneratorExit"]
            assert provider.opened == provider.closed == 2

        anyio.run(main, backend=backend)

    def test_a_failing_provider_is_told_after_output(self):
        """After output the error is a StreamInterrupted with what there was, and the cause."""
        cause = ServerError("down")
        stream = Pipeline(ScriptedProvider(["a ", "b", cause])).stream(REQUEST)
        with pytest.raises(StreamInterrupted, match="after 3 characters by ServerError: down") as caught:
            texts(stream)
        assert caught.value.partial == Response("a b")
        assert caught.value.__cause__ is cause

    def test_an_error_of_the_consumer_is_an_abandonment(self):
        """An exception in the loop's body ends the flow, and is not changed."""
        watch, provider = Watch(), ScriptedProvider("a b")
        with pytest.raises(LookupError), Pipeline(provider, [watch]).stream(REQUEST) as stream:
            for _ in stream:
                raise LookupError
        assert watch.ends == ["GeneratorExit"]
        assert (provider.opened, provider.closed) == (1, 1)

    def test_asking_again_after_output_is_refused(self):
        """Nothing is sent twice; what went out is `partial`."""

        def again(request, call_next):
            yield from call_next(request)
            return (yield from call_next(request))

        provider = ScriptedProvider("a b", "c")
        with pytest.raises(StreamInterrupted, match="asked ScriptedProvider again after output") as caught:
            texts(Pipeline(provider, [again]).stream(REQUEST))
        assert caught.value.partial.text == "a b"
        assert len(provider.requests) == 1

    def test_restarts_are_only_for_those_who_ask(self):
        """A Restart comes out as an event if it was asked for, and is refused otherwise."""

        def again(request, call_next):
            try:
                return (yield from call_next(request))
            except StreamInterrupted:
                if not (yield Restart("down")):
                    raise
            return (yield from call_next(request))

        def pipeline():
            return Pipeline(ScriptedProvider(["a", ServerError("down")], "b c"), [again])

        stream = pipeline().stream(REQUEST, restarts=True)
        assert list(stream) == [Chunk("a"), Restart("down"), Chunk("b"), Chunk(" c")]
        assert stream.response.text == "b c"
        with pytest.raises(StreamInterrupted):
            texts(pipeline().stream(REQUEST))

    def test_a_stream_that_returns_none_names_the_middleware(self):
        """The error for a forgotten `return` is the same after output as before."""

        def forgetful(request, call_next):
            yield from call_next(request)

        with pytest.raises((TypeError, StreamInterrupted), match="forgetful returned None where a Response was due"):
            texts(Pipeline(ScriptedProvider("a"), [forgetful]).stream(REQUEST))

    def test_an_async_stream_has_one_reader(self, backend):
        """A second task that reads the same stream is told so."""

        async def main():
            class Slow(AsyncScriptedProvider):
                async def stream(self, request):
                    yield "a"
                    reading.set()
                    await go_on.wait()
                    yield "b"

            reading, go_on = anyio.Event(), anyio.Event()
            async with AsyncPipeline(Slow()).stream(REQUEST) as stream:
                await anext(stream)
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(anext, stream)
                    await reading.wait()
                    with pytest.raises(RuntimeError, match="another task is reading"):
                        await anext(stream)
                    go_on.set()

        anyio.run(main, backend=backend)


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
        """Middleware then end in the stream's own context, wherever that is."""
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
        """And the provider's stream is closed before `aclose` returns."""
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
        """A provider's iterator with an `abort` gives up at once; the reader's loop ends, and all is closed."""

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
            except Exception as error:
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
        """A provider's iterator with an `abort` is told by an `aclose` in another task."""

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
        """One that only waits is cancelled; the reader's task goes on after its loop."""
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

    def test_a_cancellation_meanwhile_is_not_lost(self, backend):
        """A reader that is cancelled and closed at once is cancelled."""
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
        """A retry's wait in another thread ends in the stream's end, not in another attempt."""
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

    def test_an_async_close_during_a_wait_sends_nothing_more(self, backend):
        """The same, in another task."""

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
        """Is the end of the stream, even while the provider takes its time to close."""
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

    def test_a_failure_to_release_is_heard_of(self):
        """An error of the provider's own clean-up reaches the one who closes, after the flow has ended."""

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
        """Closing goes through all the same."""

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


class TestDropping:
    def test_a_dropped_stream_ends(self):
        """The last reference gone, the flow is closed and the provider released."""
        provider, watch = ScriptedProvider("a b"), Watch()
        stream = Pipeline(provider, [watch]).stream(REQUEST)
        next(stream)
        del stream
        assert watch.ends == ["GeneratorExit"]
        assert (provider.opened, provider.closed) == (1, 1)

    def test_breaking_out_of_texts_ends(self):
        """Leaving a loop over the generator and dropping it is an end."""
        provider, watch = ScriptedProvider("a b"), Watch()
        for _ in Pipeline(provider, [watch]).stream(REQUEST).texts():
            break
        assert watch.ends == ["GeneratorExit"]
        assert provider.closed == 1

    @pytest.mark.parametrize("kind", ["stream", "texts"])
    def test_the_collector_only_queues(self, kind):
        """Found in a cycle while a lock is held that a middleware's `finally` wants, the stream ends at the next call."""
        lock = threading.Lock()
        ends = []

        def locking(request, call_next):
            try:
                return (yield from call_next(request))
            finally:
                assert lock.acquire(timeout=5), "a deadlock"
                lock.release()
                ends.append(True)

        provider = ScriptedProvider("a b", "c")
        pipeline = Pipeline(provider, [locking])
        stream = pipeline.stream(REQUEST)
        held = stream if kind == "stream" else stream.texts()
        next(held)
        cycle = [held]
        cycle.append(cycle)
        del stream, held, cycle
        with lock:
            gc.collect()
        assert ends == []
        pipeline.complete(REQUEST)
        assert ends == [True, True]
        assert provider.opened == provider.closed == 1

    def test_another_thread_may_drop_one_meanwhile(self):
        """While the collector is at work in one thread, a stream dropped in another ends at once."""
        watch = Watch()
        collecting = []

        class Found:
            def __del__(self):
                collecting.append(_abandoned.collecting())
                thread = threading.Thread(target=drop)
                thread.start()
                thread.join()

        def drop():
            stream = Pipeline(ScriptedProvider("a b"), [watch]).stream(REQUEST)
            next(stream)
            del stream
            collecting.extend([_abandoned.collecting(), watch.ends == ["GeneratorExit"]])

        cycle = [Found()]
        cycle.append(cycle)
        del cycle
        gc.collect()
        assert collecting == [True, False, True]
        assert not _abandoned.collecting()

    def test_no_signal_handler_runs_in_what_the_collector_calls(self):
        """Else a Ctrl-C that comes there is lost: what the collector calls is no Python function."""
        ours = [each for each in gc.callbacks if _abandoned._here in getattr(each, "args", ())]
        assert [each.func for each in ours] == [setattr]
        functions = [each for each in gc.callbacks if hasattr(each, "__code__")]
        assert not [each for each in functions if each.__module__.startswith("fluxibly")]

    def test_a_failure_of_what_was_queued_is_logged(self, caplog):
        """It must not hit the call that happens to come next."""

        def failing(request, call_next):
            try:
                return (yield from call_next(request))
            except GeneratorExit:
                raise LookupError("too late") from None

        pipeline = Pipeline(ScriptedProvider("a b", "c"), [failing])
        stream = pipeline.stream(REQUEST)
        next(stream)
        cycle = [stream]
        cycle.append(cycle)
        del stream, cycle
        gc.collect()
        assert pipeline.complete(REQUEST).text == "c"
        assert "a middleware raised LookupError while a dropped stream was ended" in caplog.text

    @pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")  # trio tells of what was dropped
    def test_an_async_stream_in_a_cycle_is_queued(self, backend):
        """The same, on an event loop: the flow ends at the next call, and the provider's stream with it."""
        watch, provider = Watch(), AsyncScriptedProvider("a b", "c")

        async def main():
            pipeline = AsyncPipeline(provider, [watch])
            stream = pipeline.stream(REQUEST)
            await anext(stream)
            cycle = [stream]
            cycle.append(cycle)
            del stream, cycle
            gc.collect()
            assert watch.ends == []
            await pipeline.complete(REQUEST)
            assert watch.ends == ["GeneratorExit", "returned"]
            for _ in range(5):
                await anyio.lowlevel.checkpoint()

        anyio.run(main, backend=backend)
        assert provider.closed == 1

    @pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")  # trio tells of what was dropped
    def test_a_dropped_async_stream_ends(self, backend):
        """Its flow at once, and the provider's stream by the event loop."""
        watch, provider = Watch(), AsyncScriptedProvider("a b")

        async def main():
            stream = AsyncPipeline(provider, [watch]).stream(REQUEST)
            await anext(stream)
            del stream
            assert watch.ends == ["GeneratorExit"]
            for _ in range(5):
                await anyio.lowlevel.checkpoint()

        anyio.run(main, backend=backend)
        assert provider.closed == 1

    def test_nothing_is_left_behind(self):
        """Streams that have ended, in whatever way, are forgotten."""
        before = len(_abandoned._open)
        pipeline = Pipeline(ScriptedProvider("a b", ServerError("x"), "a b"))
        texts(pipeline.stream(REQUEST))
        pipeline.stream(REQUEST).close()
        with pytest.raises(ServerError):
            texts(pipeline.stream(REQUEST))
        next(pipeline.stream(REQUEST))
        pipeline.stream(REQUEST)
        assert len(_abandoned._open) == before

    def test_an_open_stream_is_small(self):
        """Each takes at most 10 KB beside what the provider's own iterator takes."""
        pipeline = Pipeline(ScriptedProvider(*["a b c"] * 201), [Watch(), Watch(), Watch()])
        keep = [pipeline.stream(REQUEST)]
        next(keep[0])
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(200):
                stream = pipeline.stream(REQUEST)
                next(stream)
                keep.append(stream)
            taken = (tracemalloc.get_traced_memory()[0] - before) / 200
        finally:
            tracemalloc.stop()
        assert taken < 10_000
        for stream in keep:
            stream.close()


class TestCancellation:
    def test_a_cancelled_read_passes_through_the_flow(self, backend):
        """The flow sees the cancellation, the provider is released, and the scope gets its exception."""
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
        """`asyncio.timeout` around a read ends in its own TimeoutError."""

        class Waiting(AsyncScriptedProvider):
            async def stream(self, request):
                yield "a"
                await asyncio.Event().wait()

        async def main():
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01), AsyncPipeline(Waiting(), [Watch()]).stream(REQUEST) as stream:
                    async for _ in stream:
                        pass

        asyncio.run(main())

    def test_a_middleware_that_swallows_it_is_named(self, caplog):
        """The caller's timeout works all the same, and the exception has a note."""

        def greedy(request, call_next):
            try:
                return (yield from call_next(request))
            except BaseException:
                return Response("nothing happened")

        class Waiting(AsyncScriptedProvider):
            async def stream(self, request):
                yield "a"
                await asyncio.Event().wait()

        async def main():
            with pytest.raises(TimeoutError) as caught:
                async with asyncio.timeout(0.01), AsyncPipeline(Waiting(), [greedy]).stream(REQUEST) as stream:
                    async for _ in stream:
                        pass
            return caught.value.__cause__

        cause = asyncio.run(main())
        assert isinstance(cause, asyncio.CancelledError)
        assert "greedy returned normally after CancelledError" in cause.__notes__[0]
        assert "greedy returned normally after CancelledError" in caplog.text


class TestContext:
    def test_a_consumer_never_sees_what_a_stream_sets(self, backend):
        """Context variables set by a middleware or a provider stay within the stream."""
        var = contextvars.ContextVar("var", default="outside")
        within = []

        def setting(request, call_next):
            token = var.set("middleware")
            try:
                return (yield from map_chunks(call_next(request), lambda c: within.append(var.get()) or c))
            finally:
                var.reset(token)

        class Sets(AsyncScriptedProvider):
            async def stream(self, request):
                var.set("provider")
                yield "a"
                yield "b"

        async def main():
            async with AsyncPipeline(Sets(), [setting]).stream(REQUEST) as stream:
                assert var.get() == "outside"
                async for _ in stream:
                    assert var.get() == "outside"
            assert var.get() == "outside"

        anyio.run(main, backend=backend)
        assert within == ["provider", "provider"]

    def test_a_stream_sees_what_its_caller_had_set(self):
        """The context is that of where the stream was made."""
        var = contextvars.ContextVar("var", default="outside")
        seen = []

        def looking(request, call_next):
            seen.append(var.get())
            return (yield from call_next(request))

        var.set("caller")
        texts(Pipeline(ScriptedProvider("a"), [looking]).stream(REQUEST))
        assert seen == ["caller"]
