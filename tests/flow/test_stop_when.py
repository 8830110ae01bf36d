"""`stop_when`, in all modes: where it cuts, what the response keeps, and what it releases."""

from __future__ import annotations

import attrs
import pytest
from support.calling import call, scripted
from support.observing import Observing
from support.powers import going_on, replayed, stopping_at, tools

from fluxibly.errors import ServerError, StreamInterrupted
from fluxibly.flow import emit, hold_back, map_chunks, stop_when
from fluxibly.middleware import Logging, Retry, StreamMeter, Tracing, Validation
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.testing.modes import MODES, run_async
from fluxibly.types import Chunk, Message, Opaque, Request, Response, Restart, ToolCallDelta, Usage

REQUEST = Request(model="m", messages="hi")
END = Chunk(finish_reason="length", usage=Usage(output_tokens=9))


@pytest.fixture(params=[mode for mode in MODES if mode.streaming], ids=str)
def streaming(request):
    return request.param


def stopping(fn):
    def stopped(request, call_next):
        return (yield from stop_when(call_next(request), fn))

    return stopped


def texts(ran):
    return [event.text for event in ran.events]


class TestWhere:
    def test_a_chunk_in_place_of_the_last(self, mode):
        """A returned chunk is the last, and the response has the text up to it, in every mode."""
        made = call(mode, stopping_at(","), ["Hel", "lo, ", "world", END])
        assert made.response == Response("Hello", finish_reason="stop")
        if mode.streaming:
            assert texts(made.ran) == ["Hel", "lo"]

    def test_true(self, mode):
        """True makes the chunk itself the last."""
        made = call(mode, stopping(lambda chunk: "," in chunk.text), ["Hel", "lo, ", "world", END])
        assert made.response == Response("Hello, " if mode.streaming else "Hello, world", finish_reason="stop")
        if mode.streaming:
            assert texts(made.ran) == ["Hel", "lo, "]

    def test_false(self, mode):
        """False goes on to the end, and leaves the response as it is."""
        made = call(mode, stopping(lambda chunk: False), ["a", "b", END])
        assert made.response == Response("ab", finish_reason="length", usage=Usage(output_tokens=9))

    def test_a_function_without_a_return(self, mode):
        """None goes on too."""
        assert call(mode, stopping(lambda chunk: None), ["a", "b"]).response.text == "ab"

    def test_the_first_chunk(self, mode):
        """Nothing need have gone out before."""
        made = call(mode, stopping_at("x"), ["xyz", "more"])
        assert made.response == Response("", finish_reason="stop")
        made = call(mode, stopping(lambda chunk: Chunk("instead")), ["xyz", "more"])
        assert made.response == Response("instead", finish_reason="stop")

    def test_a_chunk_with_everything(self, mode):
        """It is cut in the order of what it has, so that a stop at its text leaves out its tool call."""
        delta = ToolCallDelta(index=0, id="c", name="f", arguments="{}")
        full = Chunk("a|b", reasoning="hm", tool_calls=(delta,), model="m-9", usage=Usage(output_tokens=3))
        seen = []

        def ends(chunk):
            seen.append((chunk.reasoning, chunk.text, len(chunk.tool_calls)))
            return Chunk("a") if chunk.text else False

        made = call(mode, stopping(ends), [full])
        assert made.response == Response("a", reasoning="hm", model="m-9", finish_reason="stop")
        assert seen == [("hm", "", 0), ("", "a|b", 0)]
        if mode.streaming:
            assert made.ran.events == [Chunk(reasoning="hm", model="m-9"), Chunk("a")]

    def test_a_chunk_without_output(self, mode):
        """The function sees chunks without text as well."""
        made = call(mode, stopping(lambda chunk: chunk.finish_reason == "length"), ["a", "b", END, "never"])
        assert made.response.finish_reason == "length"
        assert made.response.usage == Usage(output_tokens=9)

    def test_an_empty_answer_passes_once(self, mode):
        """A stream without output was a stream all the same: its chunks are not made anew from the response."""
        seen = []
        call(mode, stopping(seen.append), [END])
        assert len(seen) == 1

    def test_a_whole_answer_with_other_parts_between_its_texts(self, mode):
        """The function gets the parts in their order, and nothing after the stop is kept."""
        parts = [Chunk(parts=(Opaque("search", {"id": 1}),)), Chunk(parts=(Opaque("search", {"id": 2}),))]
        made = call(mode, stopping_at("|"), ["one ", parts[0], "two|", parts[1], "three"])
        assert made.response.text == "one two"
        assert made.response.opaque == (Opaque("search", {"id": 1}),)

    @pytest.mark.parametrize("value", ["text", 3, [Chunk("a")]], ids=repr)
    def test_a_wrong_value(self, mode, value):
        """The error says what a function may return."""
        made = call(mode, stopping(lambda chunk: value), ["a", "b"])
        assert isinstance(made.ran.error, TypeError)
        assert str(made.ran.error).startswith("stop_when: expected the function to return a bool or a Chunk, got a")
        assert made.ran.events == []

    def test_a_generator_function(self, mode):
        """Whether to stop cannot wait for I/O."""

        def waiting(chunk):
            yield chunk

        made = call(mode, stopping(waiting), ["a"])
        assert "stop_when: expected the function to return a bool or a Chunk, got a generator" in str(made.ran.error)


class TestFacts:
    def test_what_was_said_before_the_stop(self, mode):
        """Model and id stay, as far as they were said; what comes at the end of a stream does not."""
        first = Chunk("Hel", model="m-9", id="r-1")
        made = call(mode, stopping_at(","), [first, "lo, world", END])
        assert made.response == Response("Hello", model="m-9", id="r-1", finish_reason="stop")

    def test_the_tokens(self, mode):
        """A whole answer's tokens were spent; those of a stream that was cut are not known."""
        made = call(mode, stopping_at(","), ["Hello, world", END])
        assert made.response.usage is None
        assert made.response.total_usage == (None if mode.streaming else Usage(output_tokens=9))
        assert len(made.record.spent) == 1

    def test_usage_that_came_first(self, streaming):
        """Some services count the input at the beginning."""
        made = call(
            streaming, stopping(lambda chunk: "," in chunk.text), [Chunk("a", usage=Usage(input_tokens=3)), ", b"]
        )
        assert made.response.usage == Usage(input_tokens=3)

    def test_tool_calls_and_reasoning(self, mode):
        """They are kept as far as they came before the stop."""
        deltas = [Chunk(tool_calls=(ToolCallDelta(index=n, id=f"{n}", name="f", arguments="{}"),)) for n in range(2)]
        made = call(mode, stopping_at("|"), [Chunk(reasoning="hm"), deltas[0], "a|b", deltas[1], END])
        assert (made.response.text, made.response.reasoning) == ("a", "hm")
        assert [each.id for each in made.response.tool_calls] == ["0"]


class TestRelease:
    def test_the_stream_is_closed_before_the_last_chunk(self, streaming):
        """The connection is free when the consumer gets the last piece, and nothing more is read."""
        read, states = [], []
        provider = scripted(streaming, ["Hello, ", "world", "never"])
        take = provider._take
        provider._take = lambda step: read.append(step) or take(step)
        layers = [stopping(lambda chunk: "world" in chunk.text)]
        if streaming.backend is None:
            stream = Pipeline(provider, layers).stream(REQUEST)
            states.extend((chunk.text, provider.opened - provider.closed) for chunk in stream)
        else:

            async def main():
                async with AsyncPipeline(provider, layers).stream(REQUEST) as stream:
                    states.extend([(chunk.text, provider.opened - provider.closed) async for chunk in stream])

            run_async(main, streaming.backend)
        assert states == [("Hello, ", 1), ("world", 0)]
        assert read == ["Hello, ", "world"]

    def test_the_attempt_was_abandoned(self, streaming):
        """The layers outside see the attempt end so, and the record has none under way."""
        ends = Observing()
        made = call(streaming, [ends, stopping_at(",")], ["Hello, ", "world"])
        assert ends.ends == [(GeneratorExit, True)]
        assert made.record.sending is None
        assert made.record.attempts == 1

    def test_the_layers_inside_end(self, streaming):
        """Their `finally` blocks run before the last chunk goes out."""
        log = []

        def inner(request, call_next):
            try:
                return (yield from call_next(request))
            except GeneratorExit:
                log.append("closed")
                raise

        call(streaming, [stopping_at(","), inner], ["a,b"], watch=lambda event: log.append(event.text))
        assert log == ["closed", "a"]

    def test_an_error_of_the_function(self, streaming):
        """The stream is closed at once, and the error reaches the caller."""
        ends = Observing()

        def boom(chunk):
            if chunk.text == "b":
                raise LookupError("boom")
            return False

        made = call(streaming, [ends, stopping(boom)], ["a", "b", "c"])
        assert isinstance(made.ran.error, StreamInterrupted)
        assert isinstance(made.ran.error.__cause__, LookupError)
        assert ends.ends == [(GeneratorExit, True)]

    def test_a_consumer_that_leaves_at_the_last_chunk(self, streaming):
        """All that is left to close is closed."""
        made = call(streaming, stopping_at(","), ["a", "b,", "c"], stop_after=2)
        assert texts(made.ran) == ["a", "b"]


class TestOtherLayers:
    @pytest.mark.parametrize(
        "outer",
        [Retry(), Validation(), Validation(hold=True), StreamMeter(), Logging(), Tracing()],
        ids=lambda layer: repr(layer)[:20],
    )
    def test_within(self, mode, outer):
        """A layer further out gets the part as a whole answer."""
        made = call(mode, [outer, stopping_at(",")], ["Hel", "lo, world", END])
        assert (made.response.text, made.response.finish_reason) == ("Hello", "stop")
        assert len(made.provider.requests) == 1

    def test_within_a_function_that_changes_the_text(self, mode):
        """The part is changed like any answer."""

        def shout(request, call_next):
            louder = map_chunks(call_next(request), lambda c: attrs.evolve(c, text=c.text.upper()), lambda: Chunk("!"))
            return (yield from louder)

        made = call(mode, [shout, stopping_at(",")], ["Hel", "lo, world"])
        assert made.response.text == "HELLO!"

    def test_within_a_hold_back(self, mode):
        """The held chunks are the part."""

        def held(request, call_next):
            return (yield from hold_back(call_next(request), check=lambda response: checked.append(response.text)))

        checked = []
        made = call(mode, [held, stopping_at(",")], ["Hel", "lo, world"])
        assert made.response.text == "Hello"
        assert checked == ["Hello"]

    def test_outside_of_a_retry(self, mode):
        """An attempt that failed before output leaves nothing in the part."""
        failed = [Chunk(model="m-0", details={"logprobs": [1]}), ServerError("down")]
        made = call(mode, [stopping_at(","), Retry(base_delay=0)], failed, ["Hel", "lo, world"])
        assert made.response == Response("Hello", finish_reason="stop")
        assert made.response.details == {}

    def test_over_a_restart(self, streaming):
        """The part is of the answer that began again."""
        layers = [stopping_at(","), Retry(on_interrupt="restart", base_delay=0)]
        made = call(streaming, layers, ["Hi ", ServerError("x")], ["Hel", "lo, world"], restarts=True)
        assert [event if isinstance(event, Restart) else event.text for event in made.ran.events] == [
            *("Hi ", Restart("ServerError")),
            *("Hel", "lo"),
        ]
        assert made.response.text == "Hello"

    def test_a_retry_asks_again_after_a_check_of_the_part(self, mode):
        """After a stop, nothing of the first attempt is left to be mixed with the next."""
        layers = [
            Validation(check=lambda response: "longer" if len(response.text) < 4 else None, hold=True),
            stopping_at("|"),
        ]
        made = call(mode, layers, ["one|two"], ["three|four"])
        assert made.response.text == "three"

    def test_a_failure_before_the_stop(self, streaming):
        """An interruption passes with what has gone out."""
        made = call(streaming, stopping_at(","), ["a", ServerError("down")])
        assert isinstance(made.ran.error, StreamInterrupted)
        assert made.ran.error.partial.text == "a"


def asks(index=0):
    return Chunk(tool_calls=(ToolCallDelta(index=index, id=f"c{index}", name="clock", arguments="{}"),))


CLOCK = tools({"clock": lambda: "noon"})


class TestTurns:
    def test_inside_of_turns(self, mode):
        """Each message is cut by itself."""
        made = call(mode, [CLOCK, stopping_at("|")], ["look", asks()], ["noon|never"])
        assert (made.response.text, made.response.finish_reason) == ("noon", "stop")
        assert [message.text for message in made.response.added] == ["look", "noon"]

    def test_outside_in_the_last_turn(self, mode):
        """The response has the messages before the one that was cut."""
        made = call(mode, [stopping_at("|"), CLOCK], ["look", asks()], ["no", "on|never"])
        assert (made.response.text, made.response.finish_reason) == ("noon", "stop")
        assert [message.text for message in made.response.added] == ["look", "noon"]
        assert len(made.provider.requests) == 2

    def test_outside_in_the_first_turn(self, streaming):
        """The tools do not run. (A whole call has only the last message to cut.)"""
        made = call(streaming, [stopping_at("k"), CLOCK], ["look", asks()], ["noon"])
        assert made.response == Response("loo", finish_reason="stop")
        assert len(made.provider.requests) == 1

    def test_at_a_mark(self, streaming):
        """Stopped at a mark, the response is an empty message after the messages of the mark."""
        made = call(streaming, [stopping(lambda chunk: chunk.added is not None), CLOCK], ["look", asks()], ["noon"])
        assert (made.response.text, made.response.finish_reason) == ("", "stop")
        assert [message.text for message in made.response.added] == ["look", "noon"]
        assert len(made.provider.requests) == 1

    def test_a_chunk_in_place_of_a_mark(self, streaming):
        """The mark passes all the same, and the chunk is of the message after it."""
        made = call(
            streaming, [stopping(lambda chunk: Chunk("(cut)") if chunk.added else False), CLOCK], ["look", asks()]
        )
        assert (made.response.text, made.response.finish_reason) == ("(cut)", "stop")
        assert [message.text for message in made.response.added] == ["look", "noon"]

    def test_a_last_turn_without_the_provider(self, mode):
        """A message that comes whole is cut too, also in a stream."""

        def cached(request, call_next):
            if len(request.messages) > 1:
                return Response("noon|never")
            return (yield from call_next(request))

        made = call(mode, [stopping_at("|"), CLOCK, cached], ["look", asks()])
        assert (made.response.text, made.response.finish_reason) == ("noon", "stop")
        assert [message.text for message in made.response.added] == ["look", "noon"]
        if mode.streaming:
            assert texts(made.ran) == ["look", "", "", "noon"]

    def test_a_mark_with_text(self, mode):
        """A stored answer may begin with its mark and its text in one chunk, of which the mark stays."""
        stored = (Message.assistant("hm"), Message.user("and?"))

        def replay(request, call_next):
            yield from emit(Chunk("noon|never", added=stored))
            return Response("noon|never", added=stored)

        made = call(mode, [stopping_at("|"), replay])
        assert made.response == Response("noon", added=stored, finish_reason="stop")
        if mode.streaming:
            assert made.ran.events == [Chunk(added=stored), Chunk("noon")]

    def test_a_message_that_goes_on(self, mode):
        """An answer that was continued is one text to the function."""
        script = ["one ", Chunk(finish_reason="length")], ["two|three", Chunk(finish_reason="stop")]
        made = call(mode, [stopping_at("|"), going_on()], *script)
        assert (made.response.text, made.response.finish_reason) == ("one two", "stop")


class TestWithoutTheProvider:
    def test_a_cache_hit(self, mode):
        """A whole answer is cut in a stream too."""

        def cached(request, call_next):
            yield from ()
            return Response("a|b", usage=Usage(output_tokens=3), model="m-9")

        made = call(mode, [stopping_at("|"), cached])
        assert made.response == Response("a", model="m-9", finish_reason="stop")
        if mode.streaming:
            assert texts(made.ran) == ["a"]

    def test_a_replay(self, mode):
        """Chunks that a middleware lets out are cut where they stand, and the rest is not let out."""
        made = call(mode, [stopping_at("t"), replayed(Response("one two three"), pace=1)])
        assert made.response.text == "one"
        assert made.clock.sleeps == [1, 1]
