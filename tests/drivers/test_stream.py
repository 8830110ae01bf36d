"""Reading streams, and the context that they run in."""

from __future__ import annotations

import contextvars

import anyio
import pytest
from support.streams import REQUEST, Watch, texts

from fluxibly.errors import ServerError, StreamInterrupted
from fluxibly.flow import map_chunks
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.testing import AsyncScriptedProvider, ScriptedProvider
from fluxibly.types import Chunk, Response, Restart


class TestReading:
    def test_response_comes_at_the_end(self):
        """The response is available once the stream has been read to its end, and not before."""
        stream = Pipeline(ScriptedProvider("a b")).stream(REQUEST)
        with pytest.raises(RuntimeError, match="iterate over it to its end"):
            stream.response  # noqa: B018  # the look-up raises
        assert texts(stream) == ["a", " b"]
        assert stream.response.text == "a b"
        assert stream.response.elapsed is not None
        assert texts(stream) == []

    def test_nothing_is_sent_before_the_first_read(self):
        """Making a stream starts the flow, but sends no request."""
        provider, watch = ScriptedProvider("a"), Watch()
        stream = Pipeline(provider, [watch]).stream(REQUEST)
        assert provider.requests == []
        stream.close()
        assert provider.requests == []
        assert watch.ends == ["GeneratorExit"]

    def test_an_error_of_the_start_comes_at_the_first_read(self):
        """The first read raises the error of a middleware that fails before its call, and the stream has ended."""

        def refuse(request, call_next):
            raise PermissionError("no")
            yield

        stream = Pipeline(ScriptedProvider(), [refuse]).stream(REQUEST)
        with pytest.raises(PermissionError, match="no"):
            next(stream)
        assert texts(stream) == []

    def test_a_keyboard_interrupt_at_the_start_comes_at_once(self):
        """A BaseException that is not an Exception does not wait for the first read."""

        def interrupt(request, call_next):
            raise KeyboardInterrupt
            yield

        with pytest.raises(KeyboardInterrupt):
            Pipeline(ScriptedProvider(), [interrupt]).stream(REQUEST)

    def test_interleaved_streams_do_not_mix(self):
        """Two streams of one pipeline that are read in turns have separate texts."""
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

    def test_texts_leaves_out_empty_texts(self):
        """`texts` yields the texts of the chunks without the empty texts."""
        stream = Pipeline(ScriptedProvider([Chunk("a"), Chunk(), Chunk(finish_reason="stop")])).stream(REQUEST)
        assert list(stream.texts()) == ["a"]

    def test_texts_closed_unread_ends_the_flow(self):
        """Closing the generator unread ends the flow, because the generator was started."""
        watch = Watch()
        generator = Pipeline(ScriptedProvider("a"), [watch]).stream(REQUEST).texts()
        generator.close()
        assert watch.ends == ["GeneratorExit"]

    def test_async_texts(self, backend):
        """`texts` works with `async for`; closing the generator, read or unread, ends the flow."""

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

    def test_a_failure_after_output_is_an_interruption(self):
        """After output the error is a StreamInterrupted with the partial response and the cause."""
        cause = ServerError("down")
        stream = Pipeline(ScriptedProvider(["a ", "b", cause])).stream(REQUEST)
        with pytest.raises(StreamInterrupted, match="after 3 characters by ServerError: down") as caught:
            texts(stream)
        assert caught.value.partial == Response("a b")
        assert caught.value.__cause__ is cause

    def test_an_error_of_the_consumer_is_an_abandonment(self):
        """An exception in the loop's body ends the flow and is not changed."""
        watch, provider = Watch(), ScriptedProvider("a b")

        def consume():
            with Pipeline(provider, [watch]).stream(REQUEST) as stream:
                for _ in stream:
                    raise LookupError

        with pytest.raises(LookupError):
            consume()
        assert watch.ends == ["GeneratorExit"]
        assert (provider.opened, provider.closed) == (1, 1)

    def test_asking_again_after_output_is_refused(self):
        """No second request is sent, and `partial` is the output that went out."""

        def again(request, call_next):
            yield from call_next(request)
            return (yield from call_next(request))

        provider = ScriptedProvider("a b", "c")
        with pytest.raises(StreamInterrupted, match="asked ScriptedProvider again after output") as caught:
            texts(Pipeline(provider, [again]).stream(REQUEST))
        assert caught.value.partial.text == "a b"
        assert len(provider.requests) == 1

    def test_restarts_are_only_for_consumers_that_ask(self):
        """A Restart is an event for a consumer that asks for restarts, and is refused otherwise."""

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

        with pytest.raises((TypeError, StreamInterrupted), match="forgetful returned None, expected a Response"):
            texts(Pipeline(ScriptedProvider("a"), [forgetful]).stream(REQUEST))

    def test_an_async_stream_has_one_reader(self, backend):
        """A second task that reads the same stream gets an error."""

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
        """A stream runs in a copy of the context in which it was made."""
        var = contextvars.ContextVar("var", default="outside")
        seen = []

        def looking(request, call_next):
            seen.append(var.get())
            return (yield from call_next(request))

        var.set("caller")
        texts(Pipeline(ScriptedProvider("a"), [looking]).stream(REQUEST))
        assert seen == ["caller"]
