"""Pipelines: whole calls, mistakes of middleware and providers, sync providers in async pipelines, and threads."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import coroutine
from typing import ClassVar

import anyio
import pytest
from opentelemetry.sdk.trace import TracerProvider

from fluxibly.errors import ServerError, StreamInterrupted
from fluxibly.flow import hold_back, map_chunks, perform, sleep
from fluxibly.flow.compose import layer_name
from fluxibly.middleware import Logging, Metrics, Retry, StreamMeter, Timing, Tracing, Validation
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.provider import AsyncProvider, Provider
from fluxibly.testing import AsyncScriptedProvider, ScriptedProvider, VirtualClock
from fluxibly.testing.modes import BACKENDS, Mode, run, run_async
from fluxibly.types import CallRecord, Chunk, ProviderInfo, Request, Response

REQUEST = Request(model="m", messages="hi")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def scripted(mode, *answers):
    return (AsyncScriptedProvider if mode.backend else ScriptedProvider)(*answers)


def raised(ran):
    """Return the error of a call, or the cause of an interrupted stream."""
    return ran.error.__cause__ if isinstance(ran.error, StreamInterrupted) else ran.error


class TestCalls:
    def test_the_first_middleware_is_outermost(self, mode):
        """Layers are entered in the given order and left in reverse order."""
        log = []

        def layer(name):
            def mw(request, call_next):
                log.append(f"+{name}")
                response = yield from call_next(request)
                log.append(f"-{name}")
                return response

            return mw

        assert run(mode, scripted(mode, "ok"), [layer("a"), layer("b")], REQUEST).response.text == "ok"
        assert log == ["+a", "+b", "-b", "-a"]

    def test_a_str_is_a_response(self):
        """A str that a provider returns is the text of the response."""

        class Parrot:
            def complete(self, request):
                return request.messages[-1].text

        response = Pipeline(Parrot()).complete(REQUEST)
        assert response.text == "hi"
        assert response.elapsed is not None

    def test_each_call_has_its_own_record(self, mode):
        """A request can be used many times, and its own record stays unchanged."""
        records = []

        def keep(request, call_next):
            records.append(request.call)
            return (yield from call_next(request.evolve(temperature=1.0)))

        provider = scripted(mode, "a", "b")
        for _ in range(2):
            run(mode, provider, [keep], REQUEST)
        assert records[0] is not records[1]
        assert REQUEST.call not in records
        assert REQUEST.call.attempts == 0
        assert [record.attempts for record in records] == [1, 1]
        assert all(sent.call is record for sent, record in zip(provider.requests, records, strict=True))
        assert [sent.temperature for sent in provider.requests] == [1.0, 1.0]

    def test_the_record_says_who_answers(self, mode):
        """The provider, whether it streams, and the model that answered are on the record."""
        records: list[CallRecord] = []

        def keep(request, call_next):
            records.append(request.call)
            return (yield from call_next(request))

        run(mode, scripted(mode, [Chunk("a", model="m-2024")]), [keep], REQUEST)
        (record,) = records
        assert record.provider.name == "ScriptedProvider"
        assert record.streaming == mode.streaming
        assert record.model == "m-2024"

    def test_a_cached_response_is_not_changed_by_a_later_call(self, mode):
        """Each call has its own elapsed time, even if a middleware returns one object to both."""
        clock, answer = VirtualClock(), Response("cached")

        def cached(request, call_next):
            yield from sleep(1.0 if request.model == "m" else 5.0)
            return answer

        first = run(mode, scripted(mode), [cached], REQUEST, clock=clock).response
        second = run(mode, scripted(mode), [cached], REQUEST.evolve(model="slow"), clock=clock).response
        assert (first.elapsed, second.elapsed) == (1.0, 5.0)

    def test_sleep_takes_the_pipelines_clock(self, mode):
        """`sleep` waits on the clock that the pipeline was given."""

        def snooze(request, call_next):
            yield from sleep(7)
            return (yield from call_next(request))

        clock = VirtualClock()
        ran = run(mode, scripted(mode, "ok"), [snooze], REQUEST, clock=clock)
        assert clock.sleeps == [7]
        assert ran.response.elapsed == 7

    def test_perform_runs_the_half_of_its_mode(self, mode):
        """A sync pipeline calls the function, an async pipeline awaits the coroutine function; errors are raised."""

        async def aread():
            raise LookupError("async")

        def read():
            raise LookupError("sync")

        def cache(request, call_next):
            try:
                yield from perform(read, aread)
            except LookupError as error:
                return Response(str(error))
            return (yield from call_next(request))

        assert run(mode, scripted(mode), [cache], REQUEST).response.text == ("async" if mode.backend else "sync")

    def test_perform_without_a_coroutine_function_runs_in_a_thread(self, backend):
        """A function without an async half runs in a worker thread, so that it cannot block the event loop."""
        threads = []

        def note(request, call_next):
            yield from perform(lambda: threads.append(threading.get_ident()))
            return (yield from call_next(request))

        async def main():
            await AsyncPipeline(AsyncScriptedProvider("ok"), [note]).complete(REQUEST)
            return threading.get_ident()

        assert anyio.run(main, backend=backend) not in threads

    def test_a_whole_call_runs_in_the_callers_context(self):
        """The caller of a whole call sees a context variable that the provider set."""
        var = contextvars.ContextVar("var", default=0)

        class Sets:
            def complete(self, request):
                var.set(1)
                return "ok"

        Pipeline(Sets()).complete(REQUEST)
        assert var.get() == 1
        var.set(0)

    def test_an_error_of_a_provider_reaches_the_caller_unchanged(self, mode):
        """The caller gets the same exception object, whatever its class."""
        error = LookupError("mine")
        assert run(mode, scripted(mode, error), [], REQUEST).error is error

    def test_repr_shows_the_stack(self):
        """The representation reads as its configuration."""
        assert repr(Pipeline(ScriptedProvider())) == "Pipeline(ScriptedProvider, [])"


class TestMistakes:
    def test_a_middleware_that_is_not_a_generator_function(self, mode):
        """The error names the middleware and the code to write."""

        def plain(request, call_next):
            return Response("x")

        ran = run(mode, scripted(mode, "ok"), [plain], REQUEST)
        assert isinstance(ran.error, TypeError)
        assert "plain returned a Response, expected a generator" in str(ran.error)
        assert "return (yield from call_next(request))" in str(ran.error)

    def test_an_async_middleware(self, mode):
        """A coroutine function is refused too, without a warning about a coroutine that was never awaited."""

        async def wrong(request, call_next):
            return Response("x")

        ran = run(mode, scripted(mode, "ok"), [wrong], REQUEST)
        assert "wrong returned a coroutine, expected a generator" in str(ran.error)

    def test_a_middleware_that_returns_none(self, mode):
        """The middleware is named, even if an outer middleware fails on its None."""

        def forgetful(request, call_next):
            yield from call_next(request)

        def reading(request, call_next):
            response = yield from call_next(request)
            return Response(response.text)

        ran = run(mode, scripted(mode, "ok"), [forgetful], REQUEST)
        assert "forgetful returned None, expected a Response" in str(raised(ran))
        ran = run(mode, scripted(mode, "ok"), [reading, forgetful], REQUEST)
        assert isinstance(raised(ran), AttributeError)
        assert "forgetful returns None; end it with" in raised(ran).__notes__[0]

    def test_a_middleware_that_returns_a_wrong_value(self, mode):
        """A middleware without `return` is not blamed for the value that another one returned."""

        def forgetful(request, call_next):
            yield from call_next(request)

        def textual(request, call_next):
            yield from call_next(request)
            return "text"

        ran = run(mode, scripted(mode, "ok"), [textual, forgetful], REQUEST)
        assert isinstance(raised(ran), TypeError)
        assert "textual, " in str(raised(ran))
        assert "returned a str, expected a Response" in str(raised(ran))

        def reading(request, call_next):
            response = yield from call_next(request)
            return Response(response.text)

        ran = run(mode, scripted(mode, "ok"), [reading, textual, forgetful], REQUEST)
        assert isinstance(raised(ran), AttributeError)
        assert "returned a str, expected a Response" in raised(ran).__notes__[0]

    def test_the_innermost_mistake_is_named(self, mode):
        """Of several middleware that return None, the error names the one whose None came first."""

        def outer(request, call_next):
            yield from call_next(request)

        def inner(request, call_next):
            yield from call_next(request)

        ran = run(mode, scripted(mode, "ok"), [outer, inner], REQUEST)
        assert "inner returned None" in str(raised(ran))

    def test_an_attribute_error_of_the_provider(self, mode):
        """Where no middleware is the user's own, none is blamed."""

        class Broken(ScriptedProvider):
            def complete(self, request):
                return [].text

            def stream(self, request):
                yield [].text

        class AsyncBroken(AsyncScriptedProvider):
            async def complete(self, request):
                return [].text

            async def stream(self, request):
                yield [].text

        ran = run(mode, AsyncBroken() if mode.backend else Broken(), [Logging()], REQUEST)
        assert isinstance(ran.error, AttributeError)
        assert not hasattr(ran.error, "__notes__")

    def test_an_attribute_error_of_another_kind(self, mode):
        """An error about other objects has no note about what middleware return."""

        def mistaken(request, call_next):
            response = yield from call_next(request)
            return response.evolve(text=[].first)

        def forgetful(request, call_next):
            response = yield from call_next(request)
            if response is None:
                return None
            return response

        ran = run(mode, scripted(mode, "ok"), [mistaken, forgetful], REQUEST)
        assert isinstance(raised(ran), AttributeError)
        assert not hasattr(raised(ran), "__notes__")

    @pytest.mark.parametrize("rubbish", [None, 3, "text", object()], ids=["None", "3", "text", "object"])
    @pytest.mark.parametrize("when", ["before", "after"])
    def test_a_middleware_that_yields_a_wrong_value(self, mode, rubbish, when):
        """The error names the middleware and the values that it may yield."""

        def wild(request, call_next):
            if when == "before":
                yield rubbish
            response = yield from call_next(request)
            yield rubbish
            return response

        def tame(request, call_next):
            return (yield from call_next(request))

        ran = run(mode, scripted(mode, "ok"), [tame, wild], REQUEST)
        assert isinstance(raised(ran), TypeError)
        assert "wild yielded" in str(raised(ran))
        assert "yield only from call_next(request)" in str(raised(ran))

    def test_a_middleware_that_calls_without_yield_from(self, mode):
        """The error names a generator that ends with `return call_next(request)`."""

        def lazy(request, call_next):
            yield from ()
            return call_next(request)

        ran = run(mode, scripted(mode, "ok"), [lazy], REQUEST)
        assert "lazy returned a generator, expected a Response" in str(raised(ran))

    def test_values_that_are_not_a_middleware(self):
        """A value that is not a middleware is refused when the pipeline is made."""
        with pytest.raises(TypeError, match="expected a generator function or an object with __call__, got 3"):
            Pipeline(ScriptedProvider(), [3])

        class Layer:
            def __call__(self, request, call_next):
                return (yield from call_next(request))

        with pytest.raises(TypeError, match=r"Layer is a class: write Layer\(\)"):
            Pipeline(ScriptedProvider(), [Layer])

    def test_values_that_are_not_a_provider(self):
        """A value that is not a provider is refused when the pipeline is made."""
        with pytest.raises(TypeError, match=r"complete\(request\) or stream\(request\), got an object"):
            Pipeline(object())
        with pytest.raises(TypeError, match=r"write ScriptedProvider\(\)"):
            Pipeline(ScriptedProvider)
        with pytest.raises(TypeError, match="is asynchronous; use AsyncPipeline"):
            Pipeline(AsyncScriptedProvider())

    def test_a_prompt_is_not_a_request(self):
        """A Pipeline takes a Request, and refuses a prompt."""
        with pytest.raises(TypeError, match="expected a Request, got a str; LLM takes prompts"):
            Pipeline(ScriptedProvider()).complete("hi")

    def test_a_provider_that_returns_or_yields_a_wrong_value(self, mode):
        """The error names the provider and the wrong value's type."""

        class Wild:
            def complete(self, request):
                return 3

            def stream(self, request):
                yield 3

        class AsyncWild:
            async def complete(self, request):
                return 3

            async def stream(self, request):
                yield 3

        ran = run(mode, AsyncWild() if mode.backend else Wild(), [], REQUEST)
        assert isinstance(ran.error, TypeError)
        assert "Wild" in str(ran.error)
        assert ("yielded an int" if mode.streaming else "returned an int") in str(ran.error).replace("a int", "an int")

    def test_a_provider_without_stream(self, backend):
        """Asking for a stream is an error at once, which names the alternatives."""

        class Whole:
            def complete(self, request):
                return "x"

        with pytest.raises(NotImplementedError, match=r"Whole has no stream\(\); use forward\(\) or complete\(\)"):
            Pipeline(Whole()).stream(REQUEST)
        with pytest.raises(NotImplementedError, match=r"Whole has no stream\(\)"):
            AsyncPipeline(Whole()).stream(REQUEST)

    def test_a_stream_method_that_returns_a_wrong_value(self, mode):
        """The error says that the method must be a generator."""

        class Odd:
            def complete(self, request):
                return "x"

            def stream(self, request):
                return "text" if mode.backend is None else ["text"]

        class AsyncOdd(Odd):
            async def complete(self, request):
                return "x"

        if mode.streaming:
            ran = run(mode, AsyncOdd() if mode.backend else Odd(), [], REQUEST)
            assert "make it a" in str(ran.error)
            assert "generator" in str(ran.error)


class TestStopIteration:
    def test_of_a_provider(self):
        """A StopIteration that is no end of an iterator says where it comes from, and keeps its cause."""

        class Exhausted:
            def complete(self, request):
                return next(iter(()))

        with pytest.raises(
            RuntimeError, match=r"a provider, or a function that .* performs, raised StopIteration"
        ) as found:
            Pipeline(Exhausted()).complete(REQUEST)
        assert isinstance(found.value.__cause__, StopIteration)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_of_a_performed_function(self, streaming):
        """A middleware can handle it as any other exception."""
        caught = []

        def performing(request, call_next):
            try:
                yield from perform(lambda: next(iter(())))
            except Exception as error:  # noqa: BLE001  # the test looks at whatever is raised
                caught.append(type(error))
            return (yield from call_next(request))

        ran = run(Mode(streaming), ScriptedProvider("ok"), [performing], REQUEST)
        assert ran.response.text == "ok"
        assert caught == [RuntimeError]


class TestBaseExceptions:
    @pytest.mark.parametrize("kind", [KeyboardInterrupt, asyncio.CancelledError, SystemExit])
    def test_they_pass(self, mode, kind):
        """The caller gets the same exception object, after each `finally`."""
        ends = []

        def watch(request, call_next):
            try:
                return (yield from call_next(request))
            finally:
                ends.append(True)

        error = kind()
        ran = run(mode, scripted(mode, ["a", error]), [watch, watch], REQUEST)
        assert ran.error is error
        assert ends == [True, True]
        assert not hasattr(error, "__notes__")

    def test_a_base_exception_of_a_middleware_passes(self, mode):
        """A BaseException that a middleware raises after the call reaches the caller."""
        error = KeyboardInterrupt()

        def interrupt(request, call_next):
            yield from call_next(request)
            raise error

        assert run(mode, scripted(mode, "ok"), [interrupt], REQUEST).error is error

    def test_a_base_exception_of_a_function_of_map_chunks_passes(self, mode):
        """The combinator closes the inner flow, and lets the exception pass."""
        error, ends = KeyboardInterrupt(), []

        def inner(request, call_next):
            try:
                return (yield from call_next(request))
            finally:
                ends.append(True)

        def fn(chunk):
            raise error

        def mapped(request, call_next):
            return (yield from map_chunks(call_next(request), fn))

        provider = scripted(mode, "ok")
        assert run(mode, provider, [mapped, inner], REQUEST).error is error
        assert ends == [True]
        assert provider.opened == provider.closed

    @pytest.mark.parametrize("did", ["returned normally", "yielded again", "raised ValueError"])
    def test_a_middleware_that_swallows_a_base_exception_is_named(self, mode, did, caplog):
        """A note on the exception, which reaches the caller once all has ended, and a logged error name the middleware."""
        ends = []

        def greedy(request, call_next):
            try:
                return (yield from call_next(request))
            except BaseException:  # noqa: BLE001  # the mistake under test
                if did == "returned normally":
                    return Response("never mind")
                if did == "yielded again":
                    return (yield from call_next(request))
                raise ValueError("replaced") from None

        def innocent(request, call_next):
            try:
                return (yield from call_next(request))
            finally:
                ends.append(True)

        error = KeyboardInterrupt()
        ran = run(mode, scripted(mode, error, "again"), [innocent, greedy, innocent], REQUEST)
        assert ran.error is error
        assert f"greedy {did} after KeyboardInterrupt" in error.__notes__[0]
        assert f"greedy {did} after KeyboardInterrupt" in caplog.text
        assert len(ends) == (3 if did == "yielded again" else 2)

    @pytest.mark.parametrize("outside", [[], [Timing(layers=True)]], ids=["alone", "within a loop by hand"])
    def test_a_middleware_that_yields_when_an_async_call_is_abandoned_is_named(self, outside, caplog):
        """Closing the coroutine of a whole call closes its flow, and a middleware that then yields is named."""

        class Waiting:
            async def complete(self, request):
                await suspended()
                return "never"

        @coroutine
        def suspended():
            yield

        def greedy(request, call_next):
            try:
                return (yield from call_next(request))
            finally:
                yield from sleep(0)

        call = AsyncPipeline(Waiting(), [*outside, greedy]).complete(REQUEST)
        call.send(None)
        call.close()
        assert "greedy yielded again after GeneratorExit" in caplog.text


def empty(request, call_next):
    return (yield from call_next(request))


def mapped(request, call_next):
    return (yield from map_chunks(call_next(request), lambda chunk: chunk))


def held(request, call_next):
    return (yield from hold_back(call_next(request)))


def instead(request, call_next):
    try:
        return (yield from call_next(request))
    except (ServerError, StreamInterrupted):
        return Response("instead")


class Lost(ServerError):
    """An error that knows all its instances that are still alive."""

    made: ClassVar[list[weakref.ref[BaseException]]] = []

    def __init__(self):
        super().__init__("lost")
        self.made.append(weakref.ref(self))


def refused(request, call_next):
    raise Lost
    yield


def spoilt(request, call_next):
    try:
        return (yield from call_next(request))
    except (ServerError, StreamInterrupted) as error:
        raise Lost from error


LAYERS = [
    empty,
    mapped,
    held,
    instead,
    refused,
    spoilt,
    Logging(),
    Tracing(tracer_provider=TracerProvider(shutdown_on_exit=False)),
    Metrics(),
    Timing(layers=True),
    StreamMeter(),
    Validation(),
    Validation(hold=True),
    Retry(max_retries=1, base_delay=0),
]


class NoWaiting(VirtualClock):
    """A clock that sleeps without an event loop."""

    async def asleep(self, seconds, /):
        self.sleep(seconds)


class Down:
    """A provider that always fails, in a stream after its texts."""

    def __init__(self, *texts):
        self.texts = texts

    def complete(self, request):
        raise Lost

    def stream(self, request):
        yield from self.texts
        raise Lost


class AsyncDown(Down):
    async def complete(self, request):
        raise Lost

    async def stream(self, request):
        for text in self.texts:
            yield text
        raise Lost


class TestMemory:
    @pytest.mark.parametrize("texts", [[], ["some"]], ids=["before output", "after output"])
    @pytest.mark.parametrize("layer", LAYERS, ids=layer_name)
    @pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
    @pytest.mark.parametrize("sync", [True, False], ids=["sync", "async"])
    def test_a_failed_call_leaves_no_cycle(self, sync, streaming, layer, texts):
        """The errors of a failed call, whose frames hold the request, are freed without the garbage collector."""
        clock = NoWaiting()
        pipeline = Pipeline(Down(*texts), [layer], clock=clock)
        apipeline = AsyncPipeline(AsyncDown(*texts), [layer], clock=clock)

        def call():
            if not streaming:
                return pipeline.complete(REQUEST)
            with pipeline.stream(REQUEST) as stream:
                return [*stream]

        async def acall():
            if not streaming:
                return await apipeline.complete(REQUEST)
            async with apipeline.stream(REQUEST) as stream:
                return [event async for event in stream]

        Lost.made.clear()
        gc.disable()
        try:
            with contextlib.suppress(StopIteration):  # a coroutine's end; an event loop makes cycles of its own
                call() if sync else acall().send(None)
        except (Lost, StreamInterrupted) as error:
            Lost.made.append(weakref.ref(error))
        finally:
            left = [made() for made in Lost.made]
            gc.enable()
        assert left.count(None) == len(left) >= 1


class TestClosing:
    def test_closing_closes_the_provider_once(self):
        """Closing closes the provider, a second close does nothing, and a later call is refused."""
        provider = ScriptedProvider("a")
        with Pipeline(provider) as pipeline:
            pipeline.complete(REQUEST)
        pipeline.close()
        assert provider.shut
        with pytest.raises(RuntimeError, match="this Pipeline is closed; make a new one"):
            pipeline.complete(REQUEST)
        with pytest.raises(RuntimeError, match="closed"):
            pipeline.stream(REQUEST)

    def test_a_second_close_does_nothing(self, backend):
        """The provider is closed once, even if that raises, and answers no call afterwards."""
        closes = []

        class Clumsy(ScriptedProvider):
            def close(self):
                closes.append("sync")
                raise OSError("cannot close")

        class AsyncClumsy(AsyncScriptedProvider):
            async def aclose(self):
                closes.append("async")
                raise OSError("cannot close")

        async def main():
            pipeline = AsyncPipeline(AsyncClumsy("a"))
            with pytest.raises(OSError, match="cannot close"):
                await pipeline.aclose()
            await pipeline.aclose()
            with pytest.raises(RuntimeError, match="closed"):
                await pipeline.complete(REQUEST)

        pipeline = Pipeline(Clumsy("a"))
        with pytest.raises(OSError, match="cannot close"):
            pipeline.close()
        pipeline.close()
        with pytest.raises(RuntimeError, match="closed"):
            pipeline.complete(REQUEST)
        anyio.run(main, backend=backend)
        assert closes == ["sync", "async"]

    def test_closing_an_async_pipeline(self, backend):
        """`aclose` closes an async provider, and a sync provider by its `close`."""

        async def main():
            for provider in AsyncScriptedProvider("a"), ScriptedProvider("a"):
                async with AsyncPipeline(provider) as pipeline:
                    await pipeline.complete(REQUEST)
                await pipeline.aclose()
                assert provider.shut
                with pytest.raises(RuntimeError, match="this AsyncPipeline is closed"):
                    await pipeline.complete(REQUEST)

        anyio.run(main, backend=backend)


class TestSyncProviderInAsyncPipeline:
    def test_both_ways(self, backend):
        """A sync provider answers async calls from worker threads, with a copy of the context."""
        var = contextvars.ContextVar("var", default="unset")
        threads, seen = set(), []

        class Blocking(ScriptedProvider):
            def complete(self, request):
                threads.add(threading.get_ident())
                seen.append(var.get())
                var.set("provider's")
                return super().complete(request)

        async def main():
            var.set("caller's")
            provider = Blocking("a b", "c d", ["e", ServerError("x")])
            pipeline = AsyncPipeline(provider)
            assert (await pipeline.complete(REQUEST)).text == "a b"
            async with pipeline.stream(REQUEST) as stream:
                assert [chunk.text async for chunk in stream] == ["c", " d"]
            with pytest.raises(StreamInterrupted):
                async with pipeline.stream(REQUEST) as stream:
                    [chunk async for chunk in stream]
            assert provider.opened == provider.closed == 2
            assert var.get() == "caller's"
            return threading.get_ident()

        assert anyio.run(main, backend=backend) not in threads
        assert seen == ["caller's"]

    def test_a_cancelled_call_does_not_wait_for_its_thread(self, backend):
        """The caller of a cancelled call goes on at once, and the thread ends when its own call returns."""
        entered, release, left = threading.Event(), threading.Event(), threading.Event()

        class Blocking:
            def complete(self, request):
                entered.set()
                release.wait(10)
                left.set()
                return "late"

        async def main():
            with anyio.move_on_after(3600) as scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(AsyncPipeline(Blocking()).complete, REQUEST)
                    await anyio.to_thread.run_sync(entered.wait, 10)
                    scope.cancel()
            assert scope.cancelled_caught
            assert not left.is_set()
            release.set()

        anyio.run(main, backend=backend)
        assert left.wait(10)

    def test_a_cancelled_read_is_closed_when_it_returns(self, backend):
        """The thread of a cancelled read closes the provider's stream when the read returns."""
        entered, release, closed = threading.Event(), threading.Event(), threading.Event()

        class Blocking(ScriptedProvider):
            def stream(self, request):
                try:
                    yield "a"
                    entered.set()
                    release.wait(10)
                    yield "b"
                finally:
                    closed.set()

        async def main():
            async def read():
                async with AsyncPipeline(Blocking()).stream(REQUEST) as stream:
                    [chunk async for chunk in stream]

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read)
                await anyio.to_thread.run_sync(entered.wait, 10)
                tasks.cancel_scope.cancel()
            assert not closed.is_set()
            release.set()

        anyio.run(main, backend=backend)
        assert closed.wait(10)

    def test_closing_does_not_block_the_event_loop(self, backend):
        """The provider is closed in a worker thread too, because a close may wait for connections."""
        threads = []

        class Slow(ScriptedProvider):
            def close(self):
                threads.append(threading.get_ident())

        async def main():
            await AsyncPipeline(Slow()).aclose()
            return threading.get_ident()

        assert anyio.run(main, backend=backend) not in threads
        assert len(threads) == 1

    def test_all_steps_of_a_stream_share_a_context(self, backend):
        """A provider finds its context variables between chunks, and can reset them, whichever threads it runs in."""
        var, found = contextvars.ContextVar("var", default="unset"), []

        class Setting(ScriptedProvider):
            def stream(self, request):
                token = var.set("provider's")
                try:
                    yield "a"
                    found.append(var.get())
                    yield "b"
                finally:
                    var.reset(token)
                    found.append(var.get())

        async def main(stop):
            async with AsyncPipeline(Setting()).stream(REQUEST) as stream:
                async for chunk in stream:
                    if chunk.text == stop:
                        break

        anyio.run(main, None, backend=backend)
        anyio.run(main, "b", backend=backend)
        assert found == ["provider's", "unset"] * 2

    def test_closing_meanwhile_aborts_the_read(self, backend):
        """A thread that reads is not left to wait for a chunk that nobody wants."""
        reading, aborted, closed = threading.Event(), threading.Event(), threading.Event()

        class Waiting:
            def __iter__(self):
                return self

            def __next__(self):
                reading.set()
                assert aborted.wait(10)
                raise ConnectionError("aborted")

            def abort(self):
                aborted.set()

            def close(self):
                closed.set()

        class Blocking(ScriptedProvider):
            def stream(self, request):
                return Waiting()

        async def main():
            stream = AsyncPipeline(Blocking()).stream(REQUEST)

            async def read():
                assert [chunk async for chunk in stream] == []

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read)
                await anyio.to_thread.run_sync(reading.wait, 10)
                await stream.aclose()
            assert aborted.is_set()

        anyio.run(main, backend=backend)
        assert closed.wait(10)

    def test_leaving_early_releases(self, backend):
        """A `break` closes the provider's stream."""
        provider = ScriptedProvider("a b c")

        async def main():
            async with AsyncPipeline(provider).stream(REQUEST) as stream:
                async for _ in stream:
                    break

        anyio.run(main, backend=backend)
        assert provider.opened == provider.closed == 1


class TestSharing:
    def test_threads_share_a_pipeline(self):
        """Each call from many threads, whole or streamed, gets its own answer."""

        class Echo:
            def complete(self, request):
                return request.messages[0].text

            def stream(self, request):
                yield from request.messages[0].text

        def observe(request, call_next):
            response = yield from map_chunks(call_next(request), lambda c: Chunk(c.text.upper()))
            assert request.call.attempts == 1
            return response

        pipeline = Pipeline(Echo(), [observe])

        def one(n):
            request = Request(model="m", messages=f"call {n}")
            with pipeline.stream(request) as stream:
                streamed = "".join(chunk.text for chunk in stream)
            return streamed, pipeline.complete(request).text

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(one, range(200)))
        assert answers == [(f"CALL {n}",) * 2 for n in range(200)]

    def test_tasks_share_a_pipeline(self, backend):
        """Each call from many tasks gets its own answer."""

        class Echo:
            async def complete(self, request):
                await anyio.lowlevel.checkpoint()
                return request.messages[0].text

        pipeline = AsyncPipeline(Echo())
        answers = {}

        async def one(n):
            answers[n] = (await pipeline.complete(Request(model="m", messages=f"{n}"))).text

        async def main():
            async with anyio.create_task_group() as tasks:
                for n in range(50):
                    tasks.start_soon(one, n)

        anyio.run(main, backend=backend)
        assert answers == {n: str(n) for n in range(50)}


class TestProviders:
    def test_protocols(self):
        """The scripted providers satisfy the protocols."""
        assert isinstance(ScriptedProvider(), Provider)
        assert isinstance(AsyncScriptedProvider(), AsyncProvider)

    def test_info(self):
        """A provider without `info` is named after its class and the given framework."""

        class Parrot:
            def complete(self, request):
                return "x"

        assert Pipeline(Parrot()).info == ProviderInfo(name="Parrot", framework="custom", telemetry_name="Parrot")
        assert Pipeline(Parrot(), framework="birds").info.framework == "birds"
        assert Pipeline(ScriptedProvider()).info.framework == "scripted"

    def test_real_time(self, backend):
        """A pipeline without a clock argument sleeps in real time."""

        def snooze(request, call_next):
            yield from sleep(0)
            return (yield from call_next(request))

        assert Pipeline(ScriptedProvider("ok"), [snooze]).complete(REQUEST).text == "ok"

        async def main():
            return await AsyncPipeline(AsyncScriptedProvider("ok"), [snooze]).complete(REQUEST)

        assert run_async(main, backend).text == "ok"
