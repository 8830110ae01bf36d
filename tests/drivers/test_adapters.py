"""Providers that only stream, or only answer whole, and streams that yield whole responses."""

from __future__ import annotations

import threading

import anyio
import pytest

from fluxibly import LLM, LLMConfig, register_llm_framework
from fluxibly.errors import DeadlineExceeded, ServerError, StreamInterrupted
from fluxibly.flow import map_chunks
from fluxibly.middleware import Deadline, Retry
from fluxibly.parts import Reasoning, ToolCall
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.testing import VirtualClock
from fluxibly.testing.modes import MODES, Mode, run, run_async
from fluxibly.types import Chunk, Message, ProviderInfo, Request, Response, ToolCallDelta, Usage

REQUEST = Request(model="m", messages="hi")
WHOLE = [mode for mode in MODES if not mode.streaming]
THOUGHTS = (Reasoning(text="first", raw={"signature": "a"}), Reasoning(text="second", raw={"signature": "b"}))
ANSWERS = {
    "texts": (["one ", "two"], Response("one two")),
    "nothing": ([], Response()),
    "chunks": (
        [Chunk("one ", reasoning="hm"), Chunk("two", finish_reason="stop", usage=Usage(output_tokens=2))],
        Response("one two", reasoning="hm", finish_reason="stop", usage=Usage(output_tokens=2)),
    ),
    "a response": (
        [Response("whole", finish_reason="stop", model="m-1", usage=Usage(output_tokens=1))],
        Response("whole", finish_reason="stop", model="m-1", usage=Usage(output_tokens=1)),
    ),
    "a response with several thoughts": (
        [Response("so", reasoning="firstsecond", reasoning_parts=THOUGHTS, finish_reason="stop")],
        Response("so", reasoning="firstsecond", reasoning_parts=THOUGHTS, finish_reason="stop"),
    ),
    "a response, then chunks": (
        [Response("one ", reasoning="firstsecond", reasoning_parts=THOUGHTS), "two", Chunk(finish_reason="stop")],
        Response("one two", reasoning="firstsecond", reasoning_parts=THOUGHTS, finish_reason="stop"),
    ),
    "texts, then a response": (
        ["one ", Response("two", finish_reason="length")],
        Response("one two", finish_reason="length"),
    ),
    "a response with a tool call": (
        [Response(tool_calls=[ToolCall(id="a", name="look", arguments={"at": "it"})])],
        Response(tool_calls=[ToolCall(id="a", name="look", arguments={"at": "it"})]),
    ),
}


class Singer:
    """A provider that only streams. An exception among its items is raised."""

    def __init__(self, *items):
        self.items = items
        self.opened = self.closed = 0

    def stream(self, request):
        self.opened += 1
        try:
            for item in self.items:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.closed += 1


class AsyncSinger(Singer):
    """The same, asynchronous."""

    async def stream(self, request):
        for item in super().stream(request):
            await anyio.lowlevel.checkpoint()
            yield item


def singers(mode, *items):
    """Return the kinds of provider that a mode takes."""
    return [Singer(*items), *([AsyncSinger(*items)] if mode.backend else [])]


class TestStreamOnly:
    @pytest.mark.parametrize("name", ANSWERS)
    def test_whole_answers_are_made_of_the_stream(self, mode, name):
        """A call gets the same response in every mode, and each stream is closed."""
        items, expected = ANSWERS[name]
        for provider in singers(mode, *items):
            ran = run(mode, provider, [], REQUEST)
            assert ran.response == expected
            assert ran.text == (expected.text if mode.streaming else "")
            assert (provider.opened, provider.closed) == (1, 1)

    def test_an_error_closes_the_stream(self, mode):
        """It reaches the caller, and a retry opens another stream."""
        for provider in singers(mode, ServerError("down")):
            ran = run(mode, provider, [Retry(max_retries=2)], REQUEST)
            assert isinstance(ran.error, ServerError)
            assert (provider.opened, provider.closed) == (3, 3)

    def test_an_error_after_output(self, mode):
        """A whole call may try again, because nothing has gone out."""
        for provider in singers(mode, "one ", ServerError("down")):
            ran = run(mode, provider, [Retry(max_retries=1)], REQUEST)
            assert isinstance(ran.error, StreamInterrupted if mode.streaming else ServerError)
            attempts = 1 if mode.streaming else 2
            assert (provider.opened, provider.closed) == (attempts, attempts)

    @pytest.mark.parametrize("wrong", [5, None, b"text", ["one"], {"text": "one"}], ids=str)
    def test_a_wrong_item_names_the_provider(self, mode, wrong):
        """By the name that logs have; the stream is closed by the time that the layers see the error."""

        class Named:
            info = ProviderInfo(name="Tenor")

        for provider in singers(mode, wrong):
            named = type("Named", (type(provider), Named), {})(wrong)
            for each, name in ((provider, type(provider).__name__), (named, "Tenor")):
                closed = []

                def look(request, call_next, each=each, closed=closed):
                    try:
                        return (yield from call_next(request))
                    finally:
                        closed.append((each.opened, each.closed))

                ran = run(mode, each, [look], REQUEST)
                assert isinstance(ran.error, TypeError)
                assert f"the provider {name} yielded" in str(ran.error)
                assert closed == [(1, 1)]

    def test_a_mark_of_a_middleware(self, mode):
        """A provider's answer is a single message."""
        for provider in singers(mode, Chunk("one", added=())):
            ran = run(mode, provider, [], REQUEST)
            error = ran.error.__cause__ if isinstance(ran.error, StreamInterrupted) else ran.error
            assert isinstance(error, TypeError)
            assert "yielded a Chunk with added=…, which only a middleware may emit" in str(error)

    def test_a_stream_that_cannot_be_read(self, mode):
        """The error says how to write it."""

        class Odd:
            def __init__(self, stream):
                self.stream = stream

        async def later(request):
            return iter(["one"])

        async def generated():
            yield "one"

        for stream, kind, advice in (
            (lambda _: "one", "a str", "a generator"),
            (lambda _: None, "None", "a generator"),
            (later, "a coroutine", "an async generator function"),
            (lambda _: generated(), "an async_generator", "an async generator function"),
        ):
            ran = run(mode, Odd(stream), [], REQUEST)
            assert isinstance(ran.error, TypeError)
            assert f"the stream() of Odd returned {kind}; make it {advice}" in str(ran.error)

    def test_any_iterable_will_do(self, mode):
        """A list has nothing to close."""

        class Listed:
            def stream(self, request):
                return ["one ", "two"]

        assert run(mode, Listed(), [], REQUEST).response.text == "one two"

    @pytest.mark.parametrize("backend", ["asyncio", "trio"])
    def test_a_cancelled_call_closes_the_stream(self, backend):
        """At once if it is asynchronous, else after the read that is under way."""
        go, done = threading.Event(), threading.Event()

        class Waiting(AsyncSinger):
            async def stream(self, request):
                try:
                    yield "one"
                    await anyio.sleep_forever()
                finally:
                    self.closed += 1

        class Blocking(Singer):
            def stream(self, request):
                try:
                    yield "one"
                    assert go.wait(10)
                    yield "two"
                    self.opened += 1
                finally:
                    self.closed += 1
                    done.set()

        async def main(provider):
            with anyio.move_on_after(0.05) as scope:
                await AsyncPipeline(provider).complete(REQUEST)
            assert scope.cancelled_caught

        waiting, blocking = Waiting(), Blocking()
        run_async(lambda: main(waiting), backend)
        assert waiting.closed == 1
        run_async(lambda: main(blocking), backend)
        go.set()
        assert done.wait(10)
        assert (blocking.opened, blocking.closed) == (0, 1)

    def test_limits_apply(self, mode):
        """A provider that only streams keeps no limit by itself."""
        clock = VirtualClock()

        class Slow(Singer):
            def stream(self, request):
                yield "one"
                clock.sleep(10)
                yield "two"

        ran = run(Mode(False, mode.backend), Slow(), [Deadline(5)], REQUEST, clock=clock)
        assert isinstance(ran.error, DeadlineExceeded)

    def test_it_is_closed_with_its_pipeline(self, mode):
        """By its own `close`, or `aclose`."""
        closed = []

        class Closing(Singer):
            def close(self):
                closed.append("sync")

        class AsyncClosing(AsyncSinger):
            async def aclose(self):
                closed.append("async")

        async def main():
            for provider in (Closing(), AsyncClosing(), AsyncSinger()):
                await AsyncPipeline(provider).aclose()

        if mode.backend:
            run_async(main, mode.backend)
        else:
            Pipeline(Closing()).close()
            Pipeline(Singer()).close()
        assert closed == (["sync", "async"] if mode.backend else ["sync"])

    def test_a_registered_class(self, monkeypatch):
        """An LLM takes it as any other."""
        monkeypatch.setattr("fluxibly.registry._frameworks", {})
        register_llm_framework("singer", lambda config: Singer("la ", config.model))
        with LLM(LLMConfig(framework="singer", model="m")) as llm:
            assert (llm.forward("hi"), list(llm.forward_stream("hi"))) == ("la m", ["la ", "m"])


class WholeOnly:
    """A provider without `stream`."""

    def __init__(self, answer):
        self.answer = answer

    def complete(self, request):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class AsyncWholeOnly(WholeOnly):
    async def complete(self, request):
        return super().complete(request)


def whole_only(mode, answer):
    """Return the kinds of provider that a mode takes."""
    return [WholeOnly(answer), *([AsyncWholeOnly(answer)] if mode.backend else [])]


class Simulated:
    """A layer that asks for whole answers as streams."""

    simulates_stream = True

    def __call__(self, request, call_next):
        return (yield from call_next(request))


class TestWholeOnly:
    def test_a_stream_is_an_error_that_says_what_to_do(self, stream_mode):
        """It is raised when the call is made, and names the class."""
        for provider in whole_only(stream_mode, "fine"):
            ran = run(stream_mode, provider, [], REQUEST)
            assert isinstance(ran.error, NotImplementedError)
            message = f"the provider {type(provider).__name__} has no stream(); use forward() or complete()"
            assert str(ran.error).startswith(message)

    @pytest.mark.parametrize("name", ["str", *[name for name, (items, _) in ANSWERS.items() if len(items) == 1]])
    def test_a_layer_may_ask_for_a_simulated_stream(self, mode, name):
        """The layers see the answer as chunks, and the response is that of a whole call."""
        items, expected = ANSWERS.get(name, (["one two"], Response("one two")))

        def shout(request, call_next):
            return (yield from map_chunks(call_next(request), lambda chunk: chunk))

        for provider in whole_only(mode, items[0]):
            ran = run(mode, provider, [Simulated(), shout], REQUEST)
            assert ran.response == expected
            assert ran.text == (expected.text if mode.streaming else "")

    def test_a_wrong_answer(self, mode):
        """It is an answer of `complete`, also if it is streamed."""
        for provider in whole_only(mode, 5):
            ran = run(mode, provider, [Simulated()], REQUEST)
            assert isinstance(ran.error, TypeError)
            expected = f"the provider {type(provider).__name__} returned an int, expected a Response or a str"
            assert expected in str(ran.error)

    def test_an_error_is_retried(self, mode):
        """A simulated stream that fails has put out nothing."""
        for provider in whole_only(mode, ServerError("down")):
            ran = run(mode, provider, [Simulated(), Retry(max_retries=2)], REQUEST)
            assert isinstance(ran.error, ServerError)

    @pytest.mark.parametrize("value", [False, 1, "yes", None])
    def test_only_true_asks_for_it(self, stream_mode, value):
        """A layer's attribute of another meaning does not count."""
        layer = Simulated()
        layer.simulates_stream = value
        ran = run(stream_mode, WholeOnly("fine"), [layer], REQUEST)
        assert isinstance(ran.error, NotImplementedError)

    def test_a_provider_that_streams_is_streamed(self, stream_mode):
        """The layer changes nothing for it."""
        for provider in singers(stream_mode, "one ", "two"):
            ran = run(stream_mode, provider, [Simulated()], REQUEST)
            assert [event.text for event in ran.events] == ["one ", "two"]


class TestResponsesInStreams:
    @pytest.mark.parametrize("name", [name for name in ANSWERS if "response" in name])
    def test_a_stream_may_yield_a_response(self, stream_mode, name):
        """As several chunks if one cannot say it, each of which passes the layers."""
        items, expected = ANSWERS[name]
        for provider in singers(stream_mode, *items):
            texts = []

            def watch(request, call_next, texts=texts):
                return (yield from map_chunks(call_next(request), lambda chunk: texts.append(chunk.text) or chunk))

            ran = run(stream_mode, provider, [watch], REQUEST)
            assert ran.response == expected
            assert "".join(texts) == ran.text == expected.text

    @pytest.mark.parametrize("parts", [(), THOUGHTS], ids=["one chunk", "several chunks"])
    def test_a_response_with_added_messages(self, stream_mode, parts):
        """A provider's answer is a single message."""
        response = Response("so", reasoning_parts=parts, added=[Message.user("hm")])
        for provider in singers(stream_mode, response):
            ran = run(stream_mode, provider, [], REQUEST)
            assert isinstance(ran.error, TypeError)
            assert "which only a middleware may emit" in str(ran.error)
            assert ran.events == []

    def test_tool_calls_of_a_response_and_of_chunks(self, stream_mode):
        """The fragments of a call may follow a response with other calls."""
        call = ToolCall(id="a", name="look", arguments={})
        for provider in singers(
            stream_mode, Response(tool_calls=[call]), Chunk(tool_calls=(ToolCallDelta(index=1, id="b", name="go"),))
        ):
            ran = run(stream_mode, provider, [], REQUEST)
            assert [each.name for each in ran.response.tool_calls] == ["look", "go"]
