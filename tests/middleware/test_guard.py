"""`Guard`: nothing unchecked goes out, in any mode, whatever becomes of the stream, the check or the model that judges."""

from __future__ import annotations

import logging
import pickle
import threading
from contextlib import suppress
from functools import partial

import anyio
import pytest
from support.calling import REQUEST, call, scripted
from support.misbehaving import serve
from support.powers import going_on, tools
from support.tiny import over_http
from support.tracing_tools import Recorder

from fluxibly import LLM, LLMConfig, Target, register_function
from fluxibly.errors import ConfigError, GuardRefused, ServerError, StreamInterrupted, root_cause
from fluxibly.flow import ask, emit, gather, map_chunks, perform, sleep
from fluxibly.middleware import Fallback, Guard, Hedge, Logging, Retry, StreamMeter, Validation
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.registry import make_middleware
from fluxibly.testing import AsyncScriptedProvider, ByHand, Cut, Delay, ScriptedProvider, VirtualClock, check_middleware
from fluxibly.testing.modes import BACKENDS, MODES, run_async
from fluxibly.types import (
    Chunk,
    Image,
    Message,
    Reasoning,
    Request,
    Response,
    Restart,
    Text,
    ToolCall,
    ToolCallDelta,
    Usage,
)

QUOTED = "the secret is 4711, keep it well"
CALL = Chunk(tool_calls=(ToolCallDelta(index=0, id="c1", name="clock", arguments="{}"),), finish_reason="tool_call")
CLOCK = {"clock": lambda: "noon"}


def passes(_):
    return None


def no_secrets(response):
    return "it has a secret" if "secret" in response.text else None


class Seen:
    """An `output` that notes the text of each response so far, and refuses those in which a word stands."""

    def __init__(self, word="secret"):
        self.texts = []
        self.word = word

    def __call__(self, response):
        self.texts.append(response.text)
        return f"it says {self.word}" if self.word in response.text else None


def refused(made):
    """Return the `GuardRefused` that a call ended with."""
    error = root_cause(made.ran.error)
    assert isinstance(error, GuardRefused)
    return error


def texts(made):
    return [event.text for event in made.ran.events]


class TestInput:
    def test_it_passes(self, mode):
        """The function gets the request; a stream is not held."""
        seen = []
        made = call(mode, Guard(input=seen.append), ["a", "b"])
        assert (made.response.text, [request.messages for request in seen]) == ("ab", [REQUEST.messages])
        assert not mode.streaming or texts(made) == ["a", "b"]

    def test_it_refuses(self, mode):
        """Nothing is sent."""
        made = call(mode, Guard(input=lambda _: "not about France"))
        assert type(made.ran.error) is GuardRefused
        assert made.ran.error.reason == "not about France"
        assert str(made.ran.error) == "Guard refused the request to m-1 at scripted: not about France"
        assert (made.provider.requests, made.record.attempts, made.record.spent) == ([], 0, [])
        assert [(d.middleware, d.what) for d in made.record.decisions] == [("Guard", "refuses the request")]

    def test_a_flow(self, mode):
        """It may wait and do I/O first."""

        def check(request):
            yield from sleep(2)
            return (yield from perform(lambda: "not today"))

        made = call(mode, Guard(input=check))
        assert (refused(made).reason, made.clock.sleeps) == ("not today", [2])

    def test_an_error(self, mode):
        made = call(mode, Guard(input=lambda _: 1 / 0))
        assert (type(made.ran.error), made.provider.requests) == (ZeroDivisionError, [])

    def test_the_refusal(self, mode):
        """It answers in place of the model."""
        made = call(mode, Guard(input=lambda _: "no", refusal="I cannot help."))
        response = made.response
        assert (response.text, response.finish_reason, made.record.attempts) == ("I cannot help.", "content_filter", 0)
        assert not mode.streaming or made.ran.text == "I cannot help."


class TestAll:
    def test_it_passes(self, mode):
        """The whole response is checked once; a stream then goes out as it came."""
        seen = []
        made = call(mode, Guard(output=seen.append), [Chunk("a", reasoning="hm"), "b", Chunk(finish_reason="stop")])
        (response,) = seen
        assert (response.text, response.reasoning, response.finish_reason) == ("ab", "hm", "stop")
        assert response == made.response
        assert not mode.streaming or texts(made) == ["a", "b", ""]

    @pytest.mark.parametrize(
        "answer",
        [
            [QUOTED],
            [Chunk(reasoning=QUOTED), "fine"],
            ["fine", Chunk(tool_calls=(ToolCallDelta(index=0, id="c", name="f", arguments=f'"{QUOTED}"'),))],
            ["fine", Chunk(alternatives=((1, Chunk(QUOTED)),))],
            ["fine", Chunk(details={"cited": QUOTED})],
            [Chunk(parts=(Reasoning(text=QUOTED, signature="s"),)), "fine"],
        ],
        ids=["text", "reasoning", "tool call", "other choice", "details", "block of reasoning"],
    )
    @pytest.mark.parametrize("release", ["all", "sentence", 2])
    def test_it_refuses_any_part(self, mode, answer, release):
        """Nothing that is in the answer goes out unchecked."""
        made = call(mode, Guard(output=lambda r: "no" if QUOTED in repr(r) else None, release=release), answer)
        assert refused(made).reason == "no"
        assert QUOTED not in repr(made.ran.events)

    def test_the_error(self, mode):
        """It names the model, and quotes the reason alone. It goes through pickle."""
        made = call(mode, Guard(output=no_secrets), QUOTED)
        error = made.ran.error
        assert str(error) == "Guard refused the answer of m-1 at scripted: it has a secret"
        assert made.ran.events == []
        copy = pickle.loads(pickle.dumps(error))  # noqa: S301  # its own
        assert (type(copy), str(copy), copy.reason) == (GuardRefused, str(error), "it has a secret")
        assert [(d.middleware, d.what) for d in made.record.decisions] == [("Guard", "refuses the answer")]

    @pytest.mark.parametrize("answer", [[], [""], [Chunk(finish_reason="stop")]], ids=str)
    @pytest.mark.parametrize("release", ["all", "sentence", 1])
    def test_an_empty_answer(self, mode, answer, release):
        """It is checked once, too, and may be refused."""
        seen = Seen(word="nothing")
        call(mode, Guard(output=seen, release=release), answer)
        assert seen.texts == [""]
        made = call(mode, Guard(output=lambda r: None if r.text else "it is empty", release=release), answer)
        assert refused(made).reason == "it is empty"

    @pytest.mark.parametrize("where", [no_secrets, None], ids=["in the text", "anywhere"])
    def test_the_refusal(self, mode, where):
        """The usage of the refused answer stays, because it was paid. Nothing else of it does."""
        usage = Usage(input_tokens=3, output_tokens=9)
        answer = [
            Chunk("a secret", reasoning="hm", usage=usage, id="r1", model="m-2"),
            Chunk(alternatives=((1, Chunk("b")),), details={"cited": "c"}),
            CALL,
        ]
        made = call(mode, Guard(output=where or (lambda _: "no"), refusal="I cannot help."), answer)
        assert made.response == Response(
            "I cannot help.", finish_reason="content_filter", usage=usage, id="r1", model="m-2"
        )
        assert (made.response.total_usage, made.response.details) == (usage, {})
        if mode.streaming:
            assert made.ran.text == "I cannot help."
            assert not any(event.tool_calls or event.reasoning for event in made.ran.events)

    def test_only_its_own_refusal(self, mode):
        """What another guard further in has refused is raised."""
        stack = [Guard(output=passes, refusal="sorry"), Guard(output=lambda _: "no")]
        assert refused(call(mode, stack, "fine")).reason == "no"

    def test_a_failure(self, mode):
        """It is raised as the provider's own error, and nothing goes out."""
        seen = Seen()
        made = call(mode, Guard(output=seen), ["a", ServerError("down")])
        assert (type(made.ran.error), seen.texts, made.ran.events) == (ServerError, [], [])


class TestBorders:
    def test_sentences(self, stream_mode):
        """Each goes out once it has passed."""
        seen = Seen()
        made = call(stream_mode, Guard(output=seen, release="sentence"), ["One. T", "wo", "!", " Thr", "ee"])
        assert seen.texts == ["One.", "One. Two!", "One. Two! Three"]
        assert texts(made) == ["One.", " Two!", " Three"]

    def test_lengths(self, mode):
        seen = Seen()
        made = call(mode, Guard(output=seen, release=4), ["ab", "cdefgh", "i", "jkl"])
        assert seen.texts == ["abcd", "abcdefgh", "abcdefghijkl"]
        assert not mode.streaming or texts(made) == ["abcd", "efgh", "ijkl"]

    def test_it_refuses_after_output(self, stream_mode):
        """The error is the cause of the interruption, whose partial response is what has gone out."""
        made = call(stream_mode, Guard(output=no_secrets, release="sentence"), "Well. The secret is out. Sorry.")
        error = made.ran.error
        assert type(error) is StreamInterrupted
        assert (error.partial.text, made.ran.text, refused(made).reason) == ("Well.", "Well.", "it has a secret")

    def test_it_refuses_before_output(self, stream_mode):
        made = call(stream_mode, Guard(output=no_secrets, release="sentence"), "The secret is out. Sorry.")
        assert (type(made.ran.error), made.ran.events) == (GuardRefused, [])

    def test_the_stream_is_broken_off(self, stream_mode):
        """What comes after a refusal is not read."""
        clock = VirtualClock()
        provider = scripted(stream_mode, ["A secret. ", "So", Delay(9), " it is. ", Delay(9), "x"], clock=clock)
        pipeline = (AsyncPipeline if stream_mode.backend else Pipeline)(
            provider, [Guard(output=no_secrets, release="sentence")], clock=clock
        )
        with pytest.raises(GuardRefused):
            read(pipeline, stream_mode)
        assert (clock.now(), provider.opened, provider.closed) == (0, 1, 1)

    def test_a_failure_after_output(self, stream_mode):
        """The partial response is what has gone out, not what is held."""
        made = call(stream_mode, Guard(output=passes, release=4), ["abcdef", ServerError("down")])
        assert isinstance(made.ran.error, StreamInterrupted)
        assert isinstance(made.ran.error.__cause__, ServerError)
        assert (made.ran.error.partial.text, made.ran.text) == ("abcd", "abcd")

    def test_tool_calls_wait_for_the_end(self, mode):
        """The arguments come in pieces, and text may follow them. It is checked at its borders all the same."""
        asks = [
            Chunk(tool_calls=(ToolCallDelta(index=0, id="c1", name="f", arguments="{"),)),
            " Two. Three",
            Chunk(tool_calls=(ToolCallDelta(index=0, arguments="}"),)),
        ]
        seen = []
        made = call(mode, Guard(output=seen.append, release="sentence"), ["One. And", *asks])
        assert [(r.text, len(r.tool_calls)) for r in seen] == [
            ("One.", 0),
            ("One. And Two.", 0),
            ("One. And Two. Three", 1),
        ]
        assert made.response.tool_calls == (ToolCall("c1", "f", raw_arguments="{}"),)
        if mode.streaming:
            assert [event.text or len(event.tool_calls) for event in made.ran.events] == [
                "One.",
                " And",
                1,
                " Two. Three",
                1,
            ]

    def test_what_stands_behind_a_border(self, mode):
        """Media between two sentences belong to the second."""
        picture = Image(data=b"png", media_type="image/png")
        seen = []
        call(mode, Guard(output=seen.append, release="sentence"), ["One.", Chunk(parts=(picture,)), " Two. ", "x"])
        assert [(r.text, r.media) for r in seen] == [
            ("One.", ()),
            ("One. Two.", (picture,)),
            ("One. Two. x", (picture,)),
        ]

    def test_citations_of_a_text(self, mode):
        """What completes a text stays with it."""
        cited = Chunk(parts=(Text("", raw={"cited": 1}),))
        made = call(mode, Guard(output=passes, release=2), ["abc", cited, "de", cited])
        assert [part.raw for part in made.response.parts] == [{"cited": 1}, {"cited": 1}]


def read(pipeline, mode):
    """Read a stream of a mode to its end, and return the events."""
    if mode.backend is None:
        return [*pipeline.stream(REQUEST)]

    async def main():
        return [event async for event in pipeline.stream(REQUEST)]

    return run_async(main, mode.backend)


class TestFunctions:
    @pytest.mark.parametrize("name", ["input", "output"])
    @pytest.mark.parametrize("flow", [False, True])
    def test_wrong_results(self, mode, name, flow):
        """They are neither a pass nor a refusal, so nothing goes out."""
        for found in (True, False, 0, "", "  ", b"no", object(), [], Response("no")):

            def returns(_, found=found):
                return found

            def flows(_, found=found):
                yield from sleep(0)
                return found

            made = call(mode, Guard(**{name: flows if flow else returns}), ["a"])
            assert type(made.ran.error) is TypeError
            assert str(made.ran.error).startswith(
                f"Guard({name}=…): expected None to pass, or the reason to refuse (a str that is not empty), got "
            )
            assert made.ran.events == []

    @pytest.mark.parametrize("name", ["input", "output"])
    def test_a_coroutine(self, mode, name):
        """It would be true; it is closed, so that Python does not warn."""

        async def check():
            return None

        made = call(mode, Guard(**{name: lambda _: check()}), ["a"])
        assert "got a coroutine" in str(made.ran.error)

    def test_a_flow_may_not_stream(self, mode):
        def output(response):
            yield from emit(Chunk("mine"))

        made = call(mode, Guard(output=output), ["a"])
        assert isinstance(made.ran.error, TypeError)
        assert str(made.ran.error).startswith("Guard(output=…): expected the function to yield only from sleep(…)")
        assert made.ran.events == []

    def test_with_the_request(self, mode):
        """A second parameter without a default takes the request."""
        seen = []

        def with_model(model, response, request):
            seen.append((model, request.messages))

        class Method:
            def __call__(self, response, request):
                seen.append(("method", request.messages))

        for output in (partial(with_model, "j"), Method(), Method().__call__):
            call(mode, Guard(output=output), ["a"])
        assert seen == [("j", REQUEST.messages), ("method", REQUEST.messages), ("method", REQUEST.messages)]

    def test_without_the_request(self, mode):
        seen = []
        for output in (
            lambda r, *rest, note="": seen.append((r.text, rest, note)),
            seen.append,
            str.isspace and passes,
        ):
            call(mode, Guard(output=output), ["a"])
        assert seen[0] == ("a", (), "")

    @pytest.mark.parametrize("error", [ValueError("mine"), ServerError("the judge is down"), KeyboardInterrupt()])
    @pytest.mark.parametrize("release", ["all", 1])
    @pytest.mark.parametrize("flow", [False, True])
    def test_what_they_raise(self, mode, error, release, flow):
        """It goes to the caller, and nothing goes out."""

        def raises(_):
            raise error

        def flows(_):
            yield from perform(partial(raises, None))

        made = call(mode, Guard(output=flows if flow else raises, release=release), ["abc"])
        assert (made.ran.error, made.ran.events) == (error, [])

    def test_what_they_raise_after_output(self, stream_mode):
        def output(response):
            if len(response.text) > 2:
                raise ValueError("mine")

        made = call(stream_mode, Guard(output=output, release=2), ["abc", "de"])
        assert isinstance(made.ran.error, StreamInterrupted)
        assert (made.ran.text, str(made.ran.error.__cause__)) == ("ab", "mine")


class TestJudges:
    def judged(self, mode, *verdicts, release="all"):
        provider = scripted(mode, *[Response(v, usage=Usage(input_tokens=5, output_tokens=1)) for v in verdicts])
        judge = Target(provider, model="judge")

        def output(response, request):
            answer = yield from ask(request.evolve(messages=f"Is this harmless? {response.text}"), target=judge)
            return None if answer.text == "yes" else answer.text

        return Guard(output=output, release=release), provider

    @pytest.mark.parametrize(("release", "asked"), [("all", 1), ("sentence", 2)])
    def test_a_model(self, mode, release, asked):
        """Its tokens are those of the call. What it is asked are the responses so far."""
        guard, judge = self.judged(mode, *["yes"] * asked, release=release)
        made = call(mode, guard, [Chunk("One. Two.", usage=Usage(input_tokens=3, output_tokens=2))])
        assert [request.messages[0].text for request in judge.requests] == [
            *(["Is this harmless? One."] if asked == 2 else []),
            "Is this harmless? One. Two.",
        ]
        spent = [(each.model, each.usage.total_tokens) for each in made.record.spent]
        assert sorted(spent) == [*[("judge", 6)] * asked, ("m-1", 5)]
        assert made.response.usage.total_tokens == 5
        assert made.response.total_usage.total_tokens == 5 + 6 * asked

    def test_it_refuses_between_two_chunks(self, mode):
        guard, _ = self.judged(mode, "yes", "it is rude", release="sentence")
        made = call(mode, guard, ["One. ", "Two. ", "Three."])
        assert (refused(made).reason, made.ran.text) == ("it is rude", "One." if mode.streaming else "")

    def test_its_span(self, mode):
        """It is a child of the call's, and the decision is an event of the call's span."""
        recorder = Recorder()
        guard, _ = self.judged(mode, "yes", "no", release="sentence")
        call(mode, [recorder.tracing(), guard], ["One. ", "Two."])
        assert [span.name for span in recorder.asks] == ["chat judge", "chat judge"]
        assert {span.parent.span_id for span in recorder.asks} == {recorder.call.context.span_id}
        (decision,) = [event for event in recorder.call.events if event.name == "fluxibly.decision"]
        assert "refuses the answer" in str(dict(decision.attributes))
        assert recorder.call.attributes["error.type"] == "GuardRefused"

    def test_slow_judges_at_once(self, mode):
        """Checks may do several things at once, and take their time."""

        def output(response, request):
            found = yield from gather(request, sleep(2), perform(lambda: "rude"))
            return found[1] if len(response.text) > 4 else None

        made = call(mode, Guard(output=output, release=4), ["abcd", "e", Delay(1), "f"])
        assert refused(made).reason == "rude"
        assert made.clock.now() == 5

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("streaming", [False, True])
    def test_it_is_cancelled(self, backend, streaming):
        """While the judge thinks, the call is cancelled: nothing goes out, and nothing stays open."""
        provider = AsyncScriptedProvider("One. Two.")
        out = []

        def output(_):
            yield from perform(None, anyio.sleep_forever)

        async def main():
            pipeline = AsyncPipeline(provider, [Guard(output=output, release="sentence")])
            with anyio.move_on_after(0.02) as scope:
                if streaming:
                    async with pipeline.stream(REQUEST) as stream:
                        out.extend([event async for event in stream])
                else:
                    await pipeline.complete(REQUEST)
            assert scope.cancelled_caught

        run_async(main, backend)
        assert (out, provider.opened) == ([], provider.closed)

    def test_by_hand(self):
        """The stream stands still while the judge is asked."""

        def output(response):
            verdict = yield from perform(lambda: None)
            return verdict

        made = ByHand(Guard(output=output, release="sentence"), REQUEST, streaming=True)
        made.stream("One.", " Two.", " Three.")
        assert made.performs is not None
        assert made.events == []
        made.go_on(None)
        assert [event.text for event in made.events] == ["One."]
        with pytest.raises(GuardRefused):
            made.go_on("that is enough")


class TestStreamsThatEnd:
    @pytest.mark.parametrize("how", ["close", "drop"])
    def test_while_held(self, how):
        """A stream that is given up leaves nothing open, with a sentence held."""
        seen = Seen()
        provider = ScriptedProvider(["One. ", "Two", "."])
        stream = Pipeline(provider, [Guard(output=seen, release="sentence")]).stream(REQUEST)
        assert next(stream).text == "One."
        if how == "close":
            stream.close()
        del stream
        assert (provider.opened, provider.closed, seen.texts) == (1, 1, ["One."])

    def test_cut_off(self, stream_mode):
        """An answer that is cut off passes no further check."""
        seen = Seen()
        made = call(stream_mode, Guard(output=seen, release="sentence"), ["One. Two", Cut()])
        assert (made.ran.error.partial.text, seen.texts) == ("One.", ["One."])

    def test_retry_inside(self, stream_mode):
        """What is held of an answer that begins again is discarded, and the next is checked from its beginning."""
        seen = Seen()
        stack = [Guard(output=seen, release=100), Retry(base_delay=0, on_interrupt="restart")]
        made = call(stream_mode, stack, ["One ", Cut()], ["Two"])
        assert (made.response.text, made.ran.text, seen.texts) == ("Two", "Two", ["Two"])
        assert not any(isinstance(event, Restart) for event in made.ran.events)

    def test_retry_inside_after_output(self, stream_mode):
        """The restart reaches a consumer that takes it; for any other the stream is interrupted."""
        stack = [Guard(output=(seen := Seen()), release=2), Retry(base_delay=0, on_interrupt="restart")]
        made = call(stream_mode, stack, ["One ", Cut()], ["Two"], restarts=True)
        assert (made.response.text, made.ran.text) == ("Two", "Two")
        assert [getattr(event, "text", "again") for event in made.ran.events] == ["On", "again", "Tw", "o"]
        assert seen.texts == ["On", "Tw", "Two"]
        made = call(stream_mode, stack, ["One ", Cut()], ["Two"])
        assert (type(made.ran.error), made.ran.error.partial.text) == (StreamInterrupted, "On")

    def test_retry_and_fallback_outside(self, mode):
        """They ask again after a failure, and not after a refusal."""
        other = scripted(mode, "fine")
        stack = [Fallback([Target(other)]), Retry(base_delay=0), Guard(output=no_secrets)]
        made = call(mode, stack, ["a", ServerError("down")], "fine")
        assert (made.response.text, len(made.provider.requests)) == ("fine", 2)
        made = call(mode, stack, "a secret")
        assert (type(made.ran.error), len(made.provider.requests), other.requests) == (GuardRefused, 1, [])

    def test_fallback_inside(self, mode):
        """The error names who has answered."""
        stack = [Guard(output=no_secrets), Fallback([Target(scripted(mode, "a secret"), model="m-9")])]
        made = call(mode, stack, ServerError("down"))
        assert str(made.ran.error).startswith("Guard refused the answer of m-9 at scripted: ")

    def test_failed_attempts_leave_nothing(self, mode):
        """What an attempt has said before it failed without output is not part of the answer."""
        stack = [Guard(output=passes, release=2), Retry(base_delay=0)]
        made = call(mode, stack, [Chunk(details={"a": 1}, model="m-2"), ServerError("down")], ["abc"])
        assert not mode.streaming or [*texts(made)] == ["ab", "c"]
        assert not any(event.details for event in made.ran.events)

    def test_hedge_inside(self, mode):
        """The winner's stream is checked, whoever has begun."""
        seen = Seen()
        made = call(mode, [Guard(output=seen, release=2), Hedge(1.0)], [Delay(5), "late"], ["abc"])
        assert (made.response.text, seen.texts) == ("abc", ["ab", "abc"])

    def test_an_answer_that_is_not_streamed(self, mode):
        """A layer inside that answers whole, as from a cache, passes the same checks before anything goes out."""

        def cached(request, call_next):
            return Response("One. Two.")
            yield

        seen = Seen()
        made = call(mode, [Guard(output=seen, release="sentence"), cached])
        assert (made.response.text, seen.texts) == ("One. Two.", ["One.", "One. Two."])
        made = call(mode, [Guard(output=Seen("Two"), release="sentence"), cached])
        assert (type(made.ran.error), made.ran.events) == (GuardRefused, [])

    def test_a_layer_that_returns_another_text(self, stream_mode):
        """What goes out is what was checked, so the stream is refused. Nothing but what has passed goes out."""

        def other(request, call_next):
            response = yield from call_next(request)
            return response.evolve(text="harmless")

        for release, out in (("all", ""), (3, "a secr")):
            made = call(stream_mode, [Guard(output=passes, release=release), other], ["a secret"])
            assert "returned another text" in str(made.ran.error)
            assert made.ran.text == out

    def test_a_layer_that_hides_something(self, stream_mode):
        """Tool calls that a layer takes out of the response alone have gone past in chunks; they are checked, too."""

        def hiding(request, call_next):
            response = yield from call_next(request)
            return response.evolve(tool_calls=(), order=None)

        made = call(stream_mode, [Guard(output=lambda r: "tools" if r.tool_calls else None), hiding], ["a", CALL])
        assert (refused(made).reason, made.ran.events) == ("tools", [])

    def test_a_layer_that_apologises(self, stream_mode):
        """Half an answer, returned on purpose, is checked and goes out."""

        def halves(request, call_next):
            try:
                return (yield from call_next(request))
            except StreamInterrupted as error:
                return error.partial.evolve(finish_reason="length")

        seen = Seen()
        made = call(stream_mode, [Guard(output=seen, release=2), halves], ["abc", Cut()])
        assert (made.response.text, made.ran.text, seen.texts) == ("abc", "abc", ["ab", "abc"])


TURNS = (["Let me ", "look. Now. ", CALL], ["It is ", "noon. Yes."])


class TestTurns:
    @pytest.mark.parametrize("release", ["all", "sentence", 3])
    def test_inside_of_tools(self, mode, release):
        """Each turn is an answer of its own, and a tool runs only after its call has passed."""
        ran = []

        def output(response):
            ran.append(response.text)
            return "no tools" if response.tool_calls else None

        stack = [tools({"clock": lambda: ran.append("tool") or "noon"}), Guard(output=output, release=release)]
        made = call(mode, stack, *TURNS)
        assert refused(made).reason == "no tools"
        assert "tool" not in ran
        assert len(made.provider.requests) == 1

    @pytest.mark.parametrize("release", ["all", "sentence", 3])
    def test_outside_of_tools(self, mode, release):
        """A turn passes before its mark does, and both modes check the same messages, though the tools have run."""
        results = []
        for each in MODES:
            if each.backend == mode.backend:
                seen = []
                made = call(each, [Guard(output=seen.append, release=release), tools(CLOCK)], *TURNS)
                results.append([(r.text, r.tool_calls) for r in seen])
                if each.streaming:
                    marks = [event for event in made.ran.events if event.added]
                    assert [message.role for message in marks[0].added] == ["assistant", "tool"]
        assert results[0] == results[1]
        assert results[0][-1] == ("It is noon. Yes.", ())
        assert ("Let me look. Now. ", (ToolCall("c1", "clock", raw_arguments="{}"),)) in results[0]

    def test_a_turn_that_is_refused(self, mode):
        """Neither it nor its mark goes out."""
        made = call(mode, [Guard(output=lambda r: "no" if r.tool_calls else None), tools(CLOCK)], *TURNS)
        assert (refused(made).reason, made.ran.events) == ("no", [])

    def test_a_later_turn_that_is_refused(self, mode):
        """The refusal takes the place of the last message; the messages before stay."""
        stack = [Guard(output=lambda r: "no" if "noon" in r.text else None, refusal="Sorry."), tools(CLOCK)]
        made = call(mode, stack, *TURNS)
        response = made.response
        assert (response.text, response.finish_reason) == ("Sorry.", "content_filter")
        assert [message.role for message in response.added] == ["assistant", "tool"]
        assert not mode.streaming or made.ran.text == "Sorry."

    def test_messages_that_were_not_streamed(self, mode):
        """What a mark adds of the model's is checked, also if it never came as chunks."""

        def adds(request, call_next):
            added = (Message.assistant("One. Two."), Message.user("go on"), Message.assistant("Three."))
            yield from emit(Chunk(added=added))
            response = yield from call_next(request.evolve(messages=(*request.messages, *added)))
            return response.evolve(added=added)

        seen = Seen()
        made = call(mode, [Guard(output=seen, release="sentence"), adds], ["Four."])
        assert (made.response.text, seen.texts) == ("Four.", ["One.", "One. Two.", "Three.", "Four."])
        made = call(mode, [Guard(output=Seen("Three")), adds], ["Four."])
        assert (refused(made).reason, made.ran.events) == ("it says Three", [])

    def test_a_replay_of_turns(self, mode):
        """A response with earlier turns, as a cache returns it, is checked message by message."""
        stored = Response("Three.", added=(Message.assistant("One. Two."), Message.user("go on")))

        def cached(request, call_next):
            return stored
            yield

        seen = Seen()
        made = call(mode, [Guard(output=seen, release="sentence"), cached])
        assert (made.response.text, made.response.added) == ("Three.", stored.added)
        assert seen.texts == ["One.", "One. Two.", "Three."]

    def test_an_answer_that_goes_on(self, mode):
        """An empty mark within a message passes once everything before it has been checked, or waits with the rest."""
        halves = ([Chunk("One. Tw"), Chunk(finish_reason="length")], ["o. Three."])
        seen = Seen()
        made = call(mode, [Guard(output=seen), going_on()], *halves)
        assert (made.response.text, seen.texts) == ("One. Two. Three.", ["One. Two. Three."])
        seen = Seen()
        made = call(mode, [Guard(output=seen, release="sentence"), going_on()], *halves)
        assert made.response.text == "One. Two. Three."
        at_mark = ["One. Tw"] if mode.streaming else []
        assert seen.texts == ["One.", *at_mark, "One. Two.", "One. Two. Three."]
        if mode.streaming:
            assert made.ran.text == "One. Two. Three."
            assert [event.text for event in made.ran.events if event.added is None and event.text] == [
                "One.",
                " Tw",
                "o.",
                " Three.",
            ]
        made = call(mode, [Guard(output=Seen("Tw"), release="sentence"), going_on()], *halves)
        assert (refused(made).reason, made.ran.text) == ("it says Tw", "One." if mode.streaming else "")

    def test_the_order_of_the_docs(self, mode):
        """Validation inside asks again before the guard sees the answer."""
        stack = [
            Guard(output=(seen := Seen())),
            Validation(check=lambda r: "shorter" if len(r.text) > 5 else None, hold=True),
        ]
        made = call(mode, [*stack, Retry(base_delay=0)], "much too long", "short")
        assert (made.response.text, seen.texts) == ("short", ["short"])

    def test_a_layer_outside_sees_what_passes(self, stream_mode):
        """Layers outside get the same stream as the consumer."""
        got = []

        def watching(request, call_next):
            return (yield from map_chunks(call_next(request), lambda c: got.append(c.text) or c))

        call(stream_mode, [StreamMeter(), watching, Guard(output=passes, release=2)], ["abc", "de"])
        assert got == ["ab", "cd", "e"]


class TestSettings:
    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            ({}, "expected input=… or output=…, got neither"),
            ({"output": 1}, "output: expected a function, got an int"),
            ({"output": passes, "release": "word"}, "release: expected 'all', 'sentence' or a number"),
            ({"output": passes, "release": 0}, "release: expected"),
            ({"output": passes, "release": None}, "release: expected 'all', 'sentence' or a number"),
            ({"output": passes, "release": True}, "release: expected"),
            ({"output": passes, "release": 1.5}, "release: expected"),
            ({"output": passes, "refusal": ""}, "refusal: expected a non-empty str"),
            ({"output": passes, "release": 5, "refusal": "no"}, "refusal: expected release='all'"),
            ({"output": passes, "release": "sentence", "refusal": "no"}, "refusal: expected release='all'"),
            ({"output": lambda a, b, c: None}, "output: expected a function that takes the response, or"),
            ({"output": lambda: None}, "output: expected a function that takes the response, or"),
            ({"output": lambda a, *, b: None}, "output: expected a function that takes the response, or"),
            ({"input": lambda a, b: None}, "input: expected a function that takes the request, got one with (a, b)"),
            ({"output": "nowhere"}, "function 'nowhere' not registered"),
        ],
    )
    def test_wrong_settings(self, options, problem):
        with pytest.raises(ConfigError) as raised:
            Guard(**options)
        assert problem in str(raised.value)

    @pytest.mark.parametrize("name", ["input", "output"])
    def test_async_functions(self, name):
        """They are refused when the guard is made, however they are wrapped."""

        async def check(_):
            return None

        async def generates(_):
            yield

        class Checks:
            async def __call__(self, _):
                return None

        for function in (check, generates, partial(check), Checks(), Checks().__call__):
            with pytest.raises(
                ConfigError, match=r"generator function, got an async function; .* perform\(call, acall\)"
            ):
                Guard(**{name: function})

    def test_in_a_file(self, tmp_path):
        """YAML names registered functions, which may be flows."""

        def polite(response):
            yield from sleep(0)
            return "rude" if "damn" in response.text else None

        register_function("polite", polite)
        register_function("short", lambda request: "long" if request.prompt_length > 10 else None)
        file = tmp_path / "framework.yaml"
        file.write_text(
            "llm:\n  framework: echo\n  model: echo\n  middleware:\n"
            "    - guard: {input: short, output: polite, release: sentence}\n"
        )
        with LLM.from_yaml(file) as llm:
            assert llm.complete("hello").text == "hello"
            with pytest.raises(GuardRefused, match="long"):
                llm.complete("hello, hello, hello")
            with pytest.raises(StreamInterrupted, match="rude"):
                [*llm.stream("Oh. damn.")]

    def test_its_repr(self):
        """It shows the settings; equal settings are equal."""
        one, other = make_middleware([Guard(output=passes, release=200), Guard(output=passes, release=200)])
        assert one == other
        assert repr(one) == f"Guard(input=None, output={passes!r}, release=200, refusal=None)"

    @pytest.mark.parametrize(
        "guard",
        [
            Guard(input=passes),
            Guard(output=passes),
            Guard(output=passes, release="sentence"),
            Guard(output=passes, release=3),
            Guard(output=lambda r: "no" if "world" in r.text else None),
            Guard(output=lambda r: "no" if "world" in r.text else None, release=4),
            Guard(output=lambda r: "no" if "world" in r.text else None, refusal="No."),
            Guard(input=lambda _: "no", refusal="No."),
        ],
        ids=lambda guard: f"{guard.release} {guard.refusal}",
    )
    def test_the_laws(self, guard):
        check_middleware(guard)


class TestLogs:
    @pytest.mark.parametrize("release", ["all", "sentence"])
    def test_no_content(self, mode, caplog, release):
        """A reason may quote the answer: what is logged of it is masked, and so it is in spans."""
        caplog.set_level(logging.DEBUG)
        recorder = Recorder()
        quoting = Guard(output=lambda r: f"do not say {QUOTED!r}" if QUOTED in r.text else None, release=release)
        made = call(mode, [recorder.tracing(), Logging(), quoting], f"Well, {QUOTED}. So.")
        assert QUOTED in str(root_cause(made.ran.error))
        logged = [r.getMessage() for r in caplog.records if r.levelno > logging.DEBUG]
        assert any("GuardRefused" in line and "do not say" in line for line in logged)
        assert QUOTED not in "".join(logged)
        span = recorder.call
        assert QUOTED not in str([span.status.description, [dict(event.attributes) for event in span.events]])

    def test_what_a_check_raises(self, mode, caplog):
        """The same goes for its own errors, and for other choices."""

        def output(response):
            raise ValueError(f"cannot read {response.alternatives[0].text}")

        call(mode, [Logging(), Guard(output=output)], ["fine", Chunk(alternatives=((1, Chunk(QUOTED)),))])
        assert "cannot read" in caplog.text
        assert QUOTED not in caplog.text

    def test_the_decision(self, mode, caplog):
        """It says who refused what, without the reason, which may quote content."""
        caplog.set_level(logging.DEBUG)
        call(mode, Guard(output=lambda r: f"it says {r.text}", refusal="Sorry."), QUOTED)
        (line,) = [r.getMessage() for r in caplog.records if "decision" in r.getMessage()]
        assert line == 'LLM call decision | middleware=Guard, decision="refuses the answer"'


class TestShared:
    def test_threads(self):
        """100 threads share one instance, and no check sees another call's text."""
        wrong, refusals = [], []

        def output(response, request):
            mine = request.messages[0].text
            if response.text.replace(mine, "").strip(". "):
                wrong.append(response.text)
            return "odd" if len(response.text) > 30 and int(mine) % 2 else None

        class Echo:
            def complete(self, request):
                return "".join(self.stream(request))

            def stream(self, request):
                for _ in range(20):
                    yield request.messages[0].text
                    yield ". "

        pipeline = Pipeline(Echo(), [Guard(output=output, release="sentence")])

        def work(number):
            request = Request(model="m", messages=f"{number:03}")
            for streaming in (True, False):
                text = ""
                try:
                    if streaming:
                        for chunk in pipeline.stream(request):
                            text += chunk.text
                    else:
                        text = pipeline.complete(request).text
                except (StreamInterrupted, GuardRefused):
                    refusals.append((number, streaming))
                    text += f"{number:03}. " * 20
                if text.replace(f"{number:03}", "").strip(". "):
                    wrong.append(text)

        threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert wrong == []
        assert sorted(refusals) == sorted((n, s) for n in range(1, 100, 2) for s in (True, False))

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_tasks(self, backend):
        """1,000 tasks share one instance whose check waits, some of them cancelled."""
        out = {}

        def output(response, request):
            yield from sleep(0)
            return None if request.messages[0].text in response.text else "not mine"

        class Echo:
            async def complete(self, request):
                await anyio.lowlevel.checkpoint()
                return f"{request.messages[0].text}. " * 2

            async def stream(self, request):
                for _ in range(2):
                    await anyio.lowlevel.checkpoint()
                    yield request.messages[0].text
                    yield ". "

        async def main():
            pipeline = AsyncPipeline(Echo(), [Guard(output=output, release="sentence")])

            async def work(number):
                name = f"{number:04}"
                with anyio.CancelScope() as scope:
                    if number % 10 == 0:
                        scope.deadline = anyio.current_time() + 0.01
                    request = Request(model="m", messages=name)
                    if number % 3:
                        out[name] = (await pipeline.complete(request)).text
                        return
                    async with pipeline.stream(request) as stream:
                        out[name] = "".join([chunk.text async for chunk in stream])

            async with anyio.create_task_group() as tasks:
                for number in range(1000):
                    tasks.start_soon(work, number)

        run_async(main, backend)
        assert 900 <= len(out) <= 1000
        assert all(text == f"{name}. " * 2 for name, text in out.items())


def sse(text):
    return f'data: {{"text": "{text}"}}\n\n'


class TestOverHTTP:
    def test_the_connection_is_closed(self, stream_mode):
        """After a refusal, while the service still streams."""
        ended = threading.Event()

        def script(peer, request):
            peer.begin_stream()
            peer.chunk(sse("Well. "))
            peer.chunk(sse("The secret is "))
            peer.chunk(sse("out. Now"))
            peer.wait_for_end()
            if not peer.server.over.is_set():
                ended.set()

        with serve(script) as server:
            ran, _ = over_http(stream_mode, server.url, [Guard(output=no_secrets, release="sentence")])
            assert ended.wait(5)
        assert isinstance(root_cause(ran.error), GuardRefused)
        assert ran.text == "Well."
        assert len(server.requests) == 1


def test_a_default_config_may_have_one():
    """A guard passes through `LLM` as any layer."""
    with LLM(LLMConfig(framework="echo", model="echo"), [Guard(output=no_secrets)]) as llm:
        assert llm.complete("hi").text == "hi"
        with suppress(GuardRefused):
            llm.complete("a secret")
            raise AssertionError("expected GuardRefused")
