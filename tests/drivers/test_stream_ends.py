"""What the end of a stream releases, in which order, and whatever raises on the way."""

from __future__ import annotations

import asyncio
import contextvars
import threading

import anyio
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from support.streams import REQUEST, Watch, texts

from fluxibly import _abandoned
from fluxibly.errors import ServerError, StreamInterrupted
from fluxibly.flow import hold_back, map_chunks
from fluxibly.middleware import Retry, StreamMeter, Timing, Tracing
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.testing import AsyncScriptedProvider, ScriptedProvider, VirtualClock
from fluxibly.testing.modes import MODES, run
from fluxibly.types import Chunk, Response


@pytest.fixture(params=[mode for mode in MODES if mode.streaming], ids=str)
def streaming(request):
    return request.param


def scripted(mode, *answers):
    return (AsyncScriptedProvider if mode.backend else ScriptedProvider)(*answers)


class Items:
    """An iterator of items that is no generator, so that only its `close` ends it."""

    def __init__(self, order, *items):
        self.order, self.items = order, list(items)

    def __iter__(self):
        return self

    def __aiter__(self):
        return self

    def __next__(self):
        if not self.items:
            raise StopIteration
        item = self.items.pop(0)
        if isinstance(item, BaseException):
            raise item
        return item() if callable(item) else item

    async def __anext__(self):
        try:
            return next(self)
        except StopIteration:
            raise StopAsyncIteration from None

    def abort(self):
        self.order.append("aborted")

    def close(self):
        self.order.append("closed")

    async def aclose(self):
        self.order.append("closed")


class Opens:
    """A provider whose streams are such iterators."""

    def __init__(self, *answers):
        self.order = []
        self.answers = [Items(self.order, *answer) for answer in answers]

    def complete(self, request):
        return ""

    def stream(self, request):
        self.order.append("opened")
        return self.answers.pop(0)


class AsyncOpens(Opens):
    async def complete(self, request):
        return ""


def opens(mode, *answers):
    return (AsyncOpens if mode.backend else Opens)(*answers)


def mapped(request, call_next):
    return (yield from map_chunks(call_next(request), lambda chunk: chunk))


def held(request, call_next):
    return (yield from hold_back(call_next(request), lambda text: text == "a"))


class Enough(Exception):
    pass


def ending_early(answer):
    """Return a middleware that stops after the first chunk, while the provider's stream is open, and returns `answer`."""

    def fn(chunk):
        if chunk.text == "b":
            raise Enough
        return chunk

    def end_early(request, call_next):
        try:
            return (yield from map_chunks(call_next(request), fn))
        except Enough:
            return answer

    return end_early


class TestReleasing:
    def test_a_failed_stream_is_closed_before_the_next_is_opened(self, streaming):
        """A retry does not leave the connection of the attempt that failed open beside its own."""
        provider = opens(streaming, [ServerError("down")], ["a"])
        ran = run(streaming, provider, [Retry()], REQUEST, clock=VirtualClock())
        assert ran.text == "a"
        assert provider.order == ["opened", "closed", "opened", "closed"]

    @pytest.mark.parametrize("answer", [Response("other"), "a"], ids=["another text", "not a Response"])
    def test_an_answer_that_is_refused(self, streaming, answer):
        """If what the flow returned is an error, the provider's stream is closed, even if nobody closes the handle."""
        before = len(_abandoned._open)
        provider, layers = opens(streaming, ["a", "b", "c"]), [ending_early(answer)]
        expected = TypeError if answer == "a" else StreamInterrupted

        async def read():
            stream = AsyncPipeline(provider, layers).stream(REQUEST)
            with pytest.raises(expected):
                [chunk async for chunk in stream]
            assert provider.order == ["opened", "closed"]

        if streaming.backend:
            anyio.run(read, backend=streaming.backend)
        else:
            stream = Pipeline(provider, layers).stream(REQUEST)
            with pytest.raises(expected):
                texts(stream)
            assert provider.order == ["opened", "closed"]
        assert len(_abandoned._open) == before

    def test_a_middleware_that_raises_when_it_is_closed(self, streaming):
        """The provider's stream is closed even if the flow cannot be."""

        def failing(request, call_next):
            try:
                return (yield from call_next(request))
            except GeneratorExit:
                raise LookupError("too late") from None

        provider = opens(streaming, ["a", "b"])
        ran = run(streaming, provider, [failing], REQUEST, stop_after=1)
        assert isinstance(ran.error, LookupError)
        assert provider.order == ["opened", "closed"]

    @pytest.mark.parametrize(
        "layer",
        [
            mapped,
            held,
            StreamMeter(),
            Retry(),
            Timing(layers=True),
            Tracing(tracer_provider=TracerProvider()),
            Tracing(tracer_provider=TracerProvider(sampler=ALWAYS_OFF)),
        ],
        ids=["map_chunks", "hold_back", "StreamMeter", "Retry", "Timing", "Tracing", "Tracing, not sampled"],
    )
    def test_inner_layers_end_first(self, streaming, layer):
        """A layer that steps its inner flow by hand closes it before the layers further out end."""
        order = []

        def noting(name):
            def note(request, call_next):
                try:
                    return (yield from call_next(request))
                finally:
                    order.append(name)

            return note

        layers = [noting("outer"), layer, noting("inner")]
        run(streaming, scripted(streaming, [Chunk(), "a", "b"]), layers, REQUEST, stop_after=1)
        assert order == ["inner", "outer"]

    def test_an_answer_of_nothing_but_its_end(self, streaming):
        """A whole answer without output reaches the consumer as one chunk, if it says why it ended."""

        def cached(request, call_next):
            yield from ()
            return Response(finish_reason="stop")

        ran = run(streaming, scripted(streaming), [cached], REQUEST)
        assert ran.events == [Chunk(finish_reason="stop")]

    @pytest.mark.parametrize("backend", ["asyncio", "trio"])
    def test_a_dropped_async_stream_aborts_the_provider_s(self, backend):
        """Nobody can await the close of a dropped stream, so its connection is cut, even if a middleware raises."""

        def failing(request, call_next):
            try:
                return (yield from call_next(request))
            except GeneratorExit:
                raise LookupError("too late") from None

        async def main(layers):
            provider = AsyncOpens(["a", "b"])
            stream = AsyncPipeline(provider, layers).stream(REQUEST)
            await anext(stream)
            driver = stream._driver
            if layers:
                with pytest.raises(LookupError):
                    driver.abandon()
            else:
                del stream
            assert provider.order == ["opened", "aborted"]

        anyio.run(main, [], backend=backend)
        anyio.run(main, [failing], backend=backend)

    @pytest.mark.parametrize("how", ["dropped", "closed"])
    def test_an_async_stream_ends_in_its_own_context(self, how):
        """A `finally` block finds the context variables as the middleware has set them."""
        seen = contextvars.ContextVar("seen", default="nothing")
        found = []

        def setting(request, call_next):
            token = seen.set("mine")
            try:
                return (yield from call_next(request))
            finally:
                found.append(seen.get())
                seen.reset(token)

        async def main():
            stream = AsyncPipeline(AsyncOpens(["a", "b"]), [setting]).stream(REQUEST)
            await anext(stream)
            if how == "closed":
                await stream.aclose()
            del stream
            assert found == ["mine"]

        asyncio.run(main())


class TestClosingMeanwhile:
    def test_a_close_while_the_provider_opens_its_stream(self):
        """The stream that the provider returns after the close is aborted before it is read."""

        class Slow(Opens):
            def stream(self, request):
                thread = threading.Thread(target=stream.close)
                thread.start()
                thread.join(10)
                return super().stream(request)

        provider, watch = Slow(["a"]), Watch()
        stream = Pipeline(provider, [watch]).stream(REQUEST)
        texts(stream)
        assert provider.order == ["opened", "aborted", "closed"]
        assert watch.ends == ["GeneratorExit"]

    def test_a_ctrl_c_meanwhile_is_not_lost(self):
        """A close takes the errors of the read that it ends for its own, but not a Ctrl-C."""

        def interrupt():
            thread = threading.Thread(target=stream.close)
            thread.start()
            thread.join(10)
            raise KeyboardInterrupt

        provider, watch = Opens(["a", interrupt]), Watch()
        stream = Pipeline(provider, [watch]).stream(REQUEST)
        assert next(stream).text == "a"
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        assert watch.ends == ["KeyboardInterrupt"]
        assert provider.order == ["opened", "aborted", "closed"]

    def test_a_cancellation_by_asyncio_meanwhile_is_not_lost(self):
        """A task that is cancelled while another closes its stream does not go on."""
        ends = []

        class Waiting(AsyncScriptedProvider):
            async def stream(self, request):
                reading[0].set()
                await asyncio.sleep(60)
                yield "a"

        async def main():
            reading.append(asyncio.Event())
            stream = AsyncPipeline(Waiting()).stream(REQUEST)

            async def read():
                async for _ in stream:
                    pass
                ends.append("went on")

            task = asyncio.create_task(read())
            await reading[0].wait()
            task.cancel()
            await stream.aclose()
            with pytest.raises(asyncio.CancelledError):
                await task

        reading = []
        asyncio.run(main())
        assert ends == []

    def test_a_read_that_waits_a_second_time(self):
        """A close ends whatever a read waits for, not only what it waited for first."""

        class Waiting(AsyncScriptedProvider):
            async def stream(self, request):
                await asyncio.sleep(0.001)
                reading[0].set()
                await asyncio.sleep(60)
                yield "a"

        async def main():
            reading.append(asyncio.Event())
            stream = AsyncPipeline(Waiting()).stream(REQUEST)

            async def read():
                return [chunk async for chunk in stream]

            task = asyncio.create_task(read())
            await reading[0].wait()
            await stream.aclose()
            assert await asyncio.wait_for(task, 10) == []

        reading = []
        asyncio.run(main())

    @pytest.mark.parametrize("backend", ["asyncio", "trio"])
    def test_a_chunk_that_comes_with_the_close(self, backend):
        """A read that returns a chunk after all delivers nothing, and then everything is closed."""
        watch = Watch()

        class Late(Items):
            async def __anext__(self):
                if self.items:
                    return self.items.pop()
                reading[0].set()
                await go_on[0].wait()
                return "late"

            def abort(self):
                super().abort()
                go_on[0].set()

        async def main():
            reading.append(anyio.Event())
            go_on.append(anyio.Event())
            provider = AsyncOpens([])
            provider.answers = [Late(provider.order, "a")]
            stream = AsyncPipeline(provider, [watch]).stream(REQUEST)
            got = []

            async def read():
                got.extend([chunk.text async for chunk in stream])

            with anyio.fail_after(10):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(read)
                    await reading[0].wait()
                    await stream.aclose()
            assert got == ["a"]
            assert provider.order == ["opened", "aborted", "closed"]

        reading, go_on = [], []
        anyio.run(main, backend=backend)
        assert watch.ends == ["GeneratorExit"]

    def test_a_runtime_error_of_the_provider_is_its_own(self, streaming):
        """It is not taken for the sign that another thread reads the stream."""
        ran = run(streaming, opens(streaming, [RuntimeError("mine")]), [], REQUEST)
        assert str(ran.error) == "mine"
