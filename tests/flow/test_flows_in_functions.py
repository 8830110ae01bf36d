"""Generator functions given to the combinators: they wait for I/O between two chunks, in all modes."""

from __future__ import annotations

import asyncio
from functools import partial
from threading import Thread

import anyio
import attrs
import pytest
from support.calling import call, scripted
from support.observing import Observing
from support.powers import smooth, tools

from fluxibly.errors import ServerError, StreamInterrupted
from fluxibly.flow import ask, emit, hold_back, map_chunks, perform, sleep, stop_when
from fluxibly.middleware import Retry
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.testing import ScriptedProvider
from fluxibly.testing.modes import MODES, run_async
from fluxibly.types import Chunk, Reasoning, Request, Response, Restart, ToolCallDelta, Usage

REQUEST = Request(model="m", messages="hi")


@pytest.fixture(params=[mode for mode in MODES if mode.streaming], ids=str)
def streaming(request):
    return request.param


def mapping(fn, at_end=None, at_restart=None):
    def mapped(request, call_next):
        return (yield from map_chunks(call_next(request), fn, at_end, at_restart=at_restart))

    return mapped


def holding(until=None, check=None):
    def held(request, call_next):
        return (yield from hold_back(call_next(request), until, check))

    return held


def doing(log, what, result=None):
    """Perform I/O that leaves a line in the log."""

    def do():
        log.append(what)
        return result

    async def ado():
        await anyio.lowlevel.checkpoint()
        return do()

    return perform(do, ado)


def failing(error):
    """Perform I/O that fails."""

    def fail():
        raise error

    async def afail():
        await anyio.lowlevel.checkpoint()
        raise error

    return perform(fail, afail)


def texts(ran):
    return [event.text for event in ran.events]


class TestMapChunks:
    def test_the_order_of_events(self, streaming):
        """A chunk goes out when it is yielded, before what comes after it, and a returned chunk goes out last."""
        log = []

        def fn(chunk):
            yield from doing(log, "before")
            yield Chunk("1")
            yield from doing(log, "between")
            yield Chunk("2")
            yield from doing(log, "after")
            return Chunk("3")

        made = call(streaming, mapping(fn), ["a", "b"], watch=lambda event: log.append(event.text))
        assert log == ["before", "1", "between", "2", "after", "3"] * 2
        assert made.response.text == "123123"

    def test_whole(self, mode):
        """In every mode the response has what the function has made of the answer."""

        def fn(chunk):
            yield from sleep(1)
            good = yield from perform(lambda: "bad" not in chunk.text, alambda("bad" not in chunk.text))
            yield chunk if good else attrs.evolve(chunk, text="[removed]")

        made = call(mode, mapping(fn), ["so ", "bad", Chunk(finish_reason="stop", usage=Usage(output_tokens=2))])
        assert made.response.finish_reason == "stop"
        assert made.response.usage == Usage(output_tokens=2)
        if mode.streaming:
            assert texts(made.ran) == ["so ", "[removed]", ""]
            assert made.clock.sleeps == [1, 1, 1]
        else:
            assert made.response.text == "[removed]"
            assert made.clock.sleeps == [1]

    def test_unchanged_chunks(self, mode):
        """A function that yields the chunk itself changes nothing; the response stays the very same."""
        made = call(mode, smooth(0.5), ["a ", "b", Chunk(finish_reason="stop")])
        assert made.response == Response("a b", finish_reason="stop")
        if mode.streaming:
            assert texts(made.ran) == ["a ", "b", ""]

    @pytest.mark.parametrize(
        "last",
        [None, Chunk("z"), [Chunk("y"), Chunk("z")], (Chunk(letter) for letter in "z")],
        ids=["nothing", "a chunk", "a list", "a generator"],
    )
    def test_what_is_returned(self, streaming, last):
        """The returned pieces may have any form that a plain function may return."""
        end = [*last] if not isinstance(last, (Chunk, type(None))) else last
        expected = "" if last is None else "z" if isinstance(last, Chunk) else "".join(chunk.text for chunk in end)

        def fn(chunk):
            yield Chunk("x")
            return end

        made = call(streaming, mapping(fn), ["a"])
        assert "".join(texts(made.ran)) == made.response.text == f"x{expected}"

    def test_dropping(self, mode):
        """A function that yields no chunk drops the chunk, and the next is read."""

        def fn(chunk):
            yield from sleep(0)

        made = call(mode, mapping(fn), ["a", "b"])
        assert (made.response.text, made.ran.events) == ("", [])

    def test_lists_and_generator_expressions(self, streaming):
        """A generator expression, which waits for nothing, makes chunks as a list does."""
        for several in (
            lambda chunk: (Chunk(letter) for letter in chunk.text),
            lambda chunk: [*map(Chunk, chunk.text)],
        ):
            made = call(streaming, mapping(several, lambda: (Chunk(letter) for letter in "de")), ["ab", "c"])
            assert texts(made.ran) == ["a", "b", "c", "d", "e"]

    def test_emit_within(self, streaming):
        """`emit` does what a yield does."""

        def fn(chunk):
            yield from emit(Chunk("<"))
            yield chunk

        made = call(streaming, mapping(fn), ["a"])
        assert texts(made.ran) == ["<", "a"]
        assert made.response.text == "<a"

    def test_at_end(self, mode):
        """`at_end` may wait too."""
        kept = []

        def keep(chunk):
            kept.append(chunk.text)

        def at_end():
            text = "".join(kept)
            good = yield from perform(lambda: len(text) > 1, alambda(len(text) > 1))
            yield from sleep(2)
            yield Chunk(text if good else "?")

        made = call(mode, mapping(keep, at_end), ["a", "b"])
        assert made.response.text == "ab"
        assert made.clock.sleeps == [2]
        if mode.streaming:
            assert texts(made.ran) == ["ab"]

    def test_an_error_that_the_function_catches(self, mode):
        """An error of I/O is raised in the function, which may go on without the result."""

        def fn(chunk):
            try:
                yield from failing(LookupError("no judge"))
            except LookupError:
                yield attrs.evolve(chunk, text=f"({chunk.text})")

        made = call(mode, mapping(fn), ["a"])
        assert made.response.text == "(a)"

    def test_an_error_that_the_function_does_not_catch(self, streaming):
        """It ends the attempt there and then: the stream is closed before the error goes outward."""
        ends, closed = Observing(), []
        provider = scripted(streaming, ["a", "b", "c"])

        def fn(chunk):
            if chunk.text == "b":
                yield from failing(LookupError("no judge"))
            yield chunk

        def outer(request, call_next):
            try:
                return (yield from call_next(request))
            except LookupError:
                closed.append((provider.opened, provider.closed))
                raise

        error = run_through(streaming, provider, [outer, ends, mapping(fn)])
        assert isinstance(error, StreamInterrupted)
        assert isinstance(error.__cause__, LookupError)
        assert error.partial.text == "a"
        assert closed == [(1, 1)]
        assert ends.ends == [(GeneratorExit, True)]
        assert ends.record.sending is None

    def test_an_error_before_output_can_be_retried(self, streaming):
        """Nothing has gone out, and the attempt is over, so the request may be sent again."""
        failed = []

        def fn(chunk):
            if not failed:
                failed.append(chunk.text)
                yield from failing(ServerError("the judge is down"))
            yield chunk

        made = call(streaming, [Retry(base_delay=0), mapping(fn)], ["a", "b"], ["c"])
        assert made.response.text == "c"
        assert made.provider.opened == 2

    def test_an_error_of_a_whole_answers_function(self, mode):
        """The error reaches the caller in every mode."""

        def at_end():
            yield from failing(LookupError("no judge"))

        error = call(mode, mapping(lambda chunk: None, at_end), ["a"]).ran.error
        assert isinstance(error, LookupError)

    def test_a_tool_call_beside_text(self, mode):
        """Other fields of a chunk pass as they are yielded."""
        delta = ToolCallDelta(index=0, id="1", name="f", arguments="{}")
        made = call(mode, smooth(0), ["a", Chunk(tool_calls=(delta,))])
        assert [each.name for each in made.response.tool_calls] == ["f"]

    def test_blocks_of_reasoning(self, mode):
        """Whether the reasoning has changed is known at the end of the function, so the block goes out then."""
        block = Chunk(parts=(Reasoning(text="hm", signature="s"),))

        def same(chunk):
            yield from sleep(0)
            yield chunk

        def censored(chunk):
            yield from sleep(0)
            yield attrs.evolve(chunk, reasoning=chunk.reasoning.replace("hm", "**"))

        kept = call(mode, mapping(same), [block, "a"])
        assert kept.response.reasoning_parts == (Reasoning(text="hm", signature="s"),)
        changed = call(mode, mapping(censored), [block, "a"])
        assert changed.response.reasoning == "**"
        assert changed.response.text == "a"

    def test_a_restart(self, streaming):
        """The state of a function that waits begins anew too."""
        seen = []

        def fn(chunk):
            yield from sleep(0)
            seen.append(chunk.text)
            yield attrs.evolve(chunk, text=f"{len(seen)}{chunk.text}")

        layers = [mapping(fn, None, seen.clear), Retry(on_interrupt="restart", base_delay=0)]
        made = call(streaming, layers, ["a", ServerError("x")], ["b", "c"], restarts=True)
        assert [event if isinstance(event, Restart) else event.text for event in made.ran.events] == [
            *("1a", Restart("ServerError")),
            *("1b", "2c"),
        ]
        assert made.response.text == "1b2c"

    def test_a_mark(self, streaming):
        """A function that waits gets the marks as well, and `at_end` may wait before one."""
        log = []

        def fn(chunk):
            yield from doing(log, f"mark {len(chunk.added)}" if chunk.added else chunk.text)
            if not chunk.added:
                yield chunk

        def at_end():
            yield from doing(log, "end")
            yield Chunk(".")

        asks = Chunk(tool_calls=(ToolCallDelta(index=0, id="c", name="clock", arguments="{}"),))
        made = call(streaming, [mapping(fn, at_end), tools({"clock": lambda: "noon"})], ["one", asks], ["two"])
        assert log == ["one", "", "end", "mark 2", "two", "end"]
        assert made.response.text == "two."
        assert [message.text for message in made.response.added] == ["one", "noon"]
        assert texts(made.ran) == ["one", "", ".", "", "two", "."]


def alambda(value):
    async def answer():
        await anyio.lowlevel.checkpoint()
        return value

    return answer


def run_through(mode, provider, layers):
    """Make a call, and return its error."""
    if mode.backend is None:
        with pytest.raises(BaseException) as raised, Pipeline(provider, layers).stream(REQUEST) as stream:  # noqa: PT011  # any
            for _ in stream:
                pass
        return raised.value

    async def main():
        async with AsyncPipeline(provider, layers).stream(REQUEST) as stream:
            async for _ in stream:
                pass

    with pytest.raises(BaseException) as raised:  # noqa: PT011  # whatever it is
        run_async(main, mode.backend)
    return raised.value


class TestWhatIsRefused:
    def test_a_request(self, mode):
        """A request belongs to the middleware; a function asks."""

        def mw(request, call_next):
            def fn(chunk):
                response = yield from call_next(request)
                yield Chunk(response.text)

            return (yield from map_chunks(call_next(request), fn))

        made = call(mode, mw, ["a"], ["b"])
        assert isinstance(made.ran.error, TypeError)
        assert str(made.ran.error) == (
            "map_chunks: expected no request of the call itself; write yield from ask(request)"
        )
        assert len(made.provider.requests) == 1

    @pytest.mark.parametrize("value", ["text", 3, None, Restart("x")], ids=repr)
    def test_other_values(self, mode, value):
        """The error says what a function may yield, and is raised where it yields."""
        caught = []

        def fn(chunk):
            try:
                yield value
            except TypeError as error:
                caught.append(str(error))
                raise

        made = call(mode, mapping(fn), ["a"])
        assert isinstance(made.ran.error, TypeError)
        assert caught == [str(made.ran.error)]
        assert caught[0].startswith(
            "map_chunks: expected the function to yield chunks, or from sleep(…), perform(…), ask(…) and gather(…), got "
        )

    @pytest.mark.parametrize("where", ["until", "check"])
    def test_chunks_of_a_hold_back(self, streaming, where):
        """`until` and `check` decide; they let nothing out."""

        def wrong(_):
            yield Chunk("x")
            return True

        made = call(streaming, holding(**{where: wrong}), ["a"])
        assert isinstance(made.ran.error, TypeError)
        assert str(made.ran.error) == (
            "hold_back: expected the function to yield only from sleep(…), perform(…), ask(…) and gather(…), got a Chunk"
        )
        assert made.ran.events == []

    def test_async_functions(self, mode):
        """A coroutine is true, and a guard would fail open, so an async function is refused, and its coroutine closed."""

        async def fine(_):
            return True

        async def several(chunk):
            yield chunk

        for layer in (
            mapping(fine),
            mapping(several),
            mapping(lambda chunk: chunk, partial(fine, None)),
            stopping(fine),
        ):
            error = call(mode, layer, ["a"]).ran.error
            error = error.__cause__ if isinstance(error, StreamInterrupted) else error
            assert isinstance(error, TypeError)
            assert str(error).partition(", got a")[0] in (
                "map_chunks: expected the function to return a Chunk, several or None",
                "stop_when: expected the function to return a bool or a Chunk",
            )
        error = call(mode, holding(check=fine), ["a"]).ran.error
        assert str(error).startswith(
            "hold_back: expected a plain function or a generator function, got an async function"
        )
        if mode.streaming:
            error = call(mode, holding(until=fine), ["a"]).ran.error
            assert str(error).startswith("hold_back: expected a plain function or a generator function, got an async")


def stopping(fn):
    def stopped(request, call_next):
        return (yield from stop_when(call_next(request), fn))

    return stopped


class TestInterruptions:
    @pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
    def test_a_base_exception_of_io(self, streaming, kind):
        """It passes the function and the flow inside of the combinator, and reaches the caller unchanged."""
        log, interrupt = [], kind()
        provider = scripted(streaming, ["a", "b"])

        def inner(request, call_next):
            try:
                return (yield from call_next(request))
            finally:
                log.append("inner")

        def fn(chunk):
            try:
                yield from failing(interrupt)
            finally:
                log.append("function")
            yield chunk

        assert run_through(streaming, provider, [mapping(fn), inner]) is interrupt
        assert log == ["function", "inner"]
        assert (provider.opened, provider.closed) == (1, 1)

    def test_a_function_that_swallows_one(self, streaming):
        """The caller gets the original all the same."""
        interrupt = KeyboardInterrupt()

        def fn(chunk):
            try:
                yield from failing(interrupt)
            except BaseException:  # noqa: BLE001  # the mistake under test
                yield chunk

        assert run_through(streaming, scripted(streaming, ["a", "b"]), [mapping(fn)]) is interrupt
        assert "yielded again after KeyboardInterrupt" in interrupt.__notes__[0]

    @pytest.mark.parametrize("backend", ["asyncio", "trio"])
    def test_a_cancellation(self, backend):
        """A cancelled call ends the function where it waits, and the flow inside."""
        log = []
        provider = scripted(next(mode for mode in MODES if mode.backend == backend), ["a", "b"])

        def inner(request, call_next):
            try:
                return (yield from call_next(request))
            finally:
                log.append("inner")

        def fn(chunk):
            yield chunk
            try:
                yield from perform(None, anyio.sleep_forever)
            finally:
                log.append("function")

        async def main():
            with anyio.move_on_after(0.05) as scope:
                async with AsyncPipeline(provider, [mapping(fn), inner]).stream(REQUEST) as stream:
                    log.append((await anext(stream)).text)
                    await anext(stream)
            assert scope.cancelled_caught

        run_async(main, backend)
        assert log == ["a", "function", "inner"]
        assert (provider.opened, provider.closed) == (1, 1)

    def test_asyncios_timeout(self):
        """`asyncio.timeout` gets its own cancellation back."""

        def fn(chunk):
            yield from perform(None, anyio.sleep_forever)

        async def main():
            async with asyncio.timeout(0.05):
                await AsyncPipeline(scripted(MODES[1], "a"), [mapping(fn)]).complete(REQUEST)

        with pytest.raises(TimeoutError):
            asyncio.run(main())

    def test_a_consumer_that_leaves(self, streaming):
        """Closed after a chunk that a function has yielded, the function ends before the flow inside."""
        log = []

        def inner(request, call_next):
            try:
                return (yield from call_next(request))
            finally:
                log.append("inner")

        def fn(chunk):
            try:
                yield chunk
                yield Chunk("never")
            finally:
                log.append("function")

        made = call(streaming, [mapping(fn), inner], ["a", "b"], stop_after=1)
        assert log == ["function", "inner"]
        assert made.ran.error is None


class TestClosingFromElsewhere:
    def test_no_further_question(self):
        """A close in another thread, while a function waits for a question, is noticed before the next is sent."""
        asked = []

        class Judge(ScriptedProvider):
            def complete(self, request):
                asked.append(request)
                thread = Thread(target=stream.close)
                thread.start()
                thread.join()
                return "yes"

        def guard(request, call_next):
            def fn(chunk):
                yield from ask(request)
                yield from ask(request)
                yield chunk

            return (yield from map_chunks(call_next(request), fn))

        provider = Judge(["a", "b"])
        stream = Pipeline(provider, [guard]).stream(REQUEST)
        assert [*stream] == []
        assert len(asked) == 1
        assert (provider.opened, provider.closed) == (1, 1)

    @pytest.mark.parametrize("backend", ["asyncio", "trio"])
    def test_a_wait_in_another_task(self, backend):
        """`aclose` in another task ends the wait of a function, and with it the function and the flow inside."""
        log = []
        provider = scripted(next(mode for mode in MODES if mode.backend == backend), ["a", "b"])

        def fn(chunk):
            try:
                yield from perform(None, waiting)
            finally:
                log.append("function")

        async def main():
            stream = AsyncPipeline(provider, [mapping(fn)]).stream(REQUEST)

            async def read():
                log.extend([chunk.text async for chunk in stream])

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read)
                await started.wait()
                await stream.aclose()

        async def waiting():
            started.set()
            await anyio.sleep_forever()

        started = anyio.Event()
        run_async(main, backend)
        assert log == ["function"]
        assert (provider.opened, provider.closed) == (1, 1)


class TestHoldBack:
    def test_until(self, streaming):
        """`until` may ask somebody; the chunks are released once the answer is true."""
        log = []

        def until(text):
            good = yield from doing(log, f"until {text}", len(text) > 1)
            return good

        made = call(streaming, holding(until), ["a", "b", "c"], watch=lambda event: log.append(event.text))
        assert log == ["until a", "until ab", "a", "b", "c"]
        assert made.response.text == "abc"

    def test_until_sees_the_chunks_of_an_inner_layer(self, streaming):
        """Chunks that an inner layer has added are held and judged like those of the provider."""
        double = mapping(lambda chunk: [chunk, chunk])

        def until(text):
            yield from sleep(1)
            return len(text) > 2

        made = call(streaming, [holding(until), double], ["a", "b"])
        assert made.clock.sleeps == [1, 1, 1]
        assert made.response.text == "aabb"

    def test_check(self, mode):
        """`check` may wait, before anything goes out."""
        log = []

        def check(response):
            yield from doing(log, f"check {response.text}")

        made = call(mode, holding(check=check), ["a", "b"], watch=lambda event: log.append(event.text))
        assert log[0] == "check ab"
        assert made.response.text == "ab"

    @pytest.mark.parametrize("where", ["until", "check"])
    def test_an_error(self, streaming, where):
        """It ends the attempt; nothing goes out, so an outer layer may ask again."""
        ends, failed = Observing(), []

        def refuse(_):
            if not failed:
                failed.append(True)
                yield from failing(ServerError("the judge is down"))
            return True

        made = call(streaming, [Retry(base_delay=0), ends, holding(**{where: refuse})], ["a", "b"], ["c"])
        assert made.response.text == "c"
        assert ends.ends == [(GeneratorExit if where == "until" else "ab", True), ("c", True)]


class TestAsk:
    def test_a_question_for_each_chunk(self, mode):
        """A function may ask a model; the stream goes on where it was."""

        def guard(request, call_next):
            def fn(chunk):
                if not chunk.text:
                    return chunk
                answer = yield from ask(request.evolve(messages=f"fine? {chunk.text}"), through=[Retry(base_delay=0)])
                return chunk if answer.text == "yes" else attrs.evolve(chunk, text="-")

            return (yield from map_chunks(call_next(request), fn))

        answers = [["a", "b"], "yes", ServerError("down"), "no"]
        made = call(mode, guard, *answers)
        assert made.response.text == ("a-" if mode.streaming else "ab")
        assert made.record.attempts == 1
        asked = [request.messages[0].text for request in made.provider.requests[1:]]
        assert asked == (["fine? a", "fine? b", "fine? b"] if mode.streaming else ["fine? ab"])

    def test_within_until_and_check(self, streaming):
        """So may the functions of a hold-back."""

        def guard(request, call_next):
            def until(text):
                answer = yield from ask(request.evolve(messages=f"enough? {text}"))
                return answer.text == "yes"

            return (yield from hold_back(call_next(request), until))

        made = call(streaming, guard, ["a", "b", "c"], "no", "yes")
        assert made.response.text == "abc"
        assert [request.messages[0].text for request in made.provider.requests[1:]] == ["enough? a", "enough? ab"]

    def test_an_error_of_a_question(self, streaming):
        """An error that the function does not catch ends the attempt, as any error does."""
        ends = Observing()

        def guard(request, call_next):
            def fn(chunk):
                yield from ask(request.evolve(messages="fine?"))

            return (yield from map_chunks(call_next(request), fn))

        made = call(streaming, [ends, guard], ["a", "b"], ServerError("the judge is down"))
        assert isinstance(made.ran.error, ServerError)
        assert ends.ends[-1] == (GeneratorExit, True)
        assert ends.record.sending is None


class TestPlainFunctions:
    @pytest.mark.parametrize("layer", ["map_chunks", "until", "stop_when"])
    def test_an_error_releases_the_stream_at_once(self, streaming, layer):
        """A plain function that raises ends the attempt there and then, and not at the end of the call."""
        ends, closed = Observing(), []
        provider = scripted(streaming, ["a", "b"], "c")

        def boom(_):
            raise LookupError("boom")

        layers = {"map_chunks": mapping(boom), "until": holding(boom), "stop_when": stopping(boom)}

        def outer(request, call_next):
            try:
                return (yield from call_next(request))
            except LookupError:
                closed.append((provider.opened, provider.closed))
                yield from sleep(0)
                return Response("sorry")

        if streaming.backend is None:
            with Pipeline(provider, [outer, ends, layers[layer]]).stream(REQUEST) as stream:
                assert [chunk.text for chunk in stream] == ["sorry"]
        else:

            async def main():
                async with AsyncPipeline(provider, [outer, ends, layers[layer]]).stream(REQUEST) as stream:
                    return [chunk.text async for chunk in stream]

            assert run_async(main, streaming.backend) == ["sorry"]
        assert closed == [(1, 1)]
        assert ends.ends == [(GeneratorExit, True)]
        assert ends.record.sending is None
