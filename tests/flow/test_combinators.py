"""`map_chunks` and `hold_back`, in all modes."""

from __future__ import annotations

import attrs
import pytest

from fluxibly.errors import ServerError, StreamInterrupted
from fluxibly.flow import hold_back, map_chunks, sleep
from fluxibly.middleware.retry import Retry
from fluxibly.testing import AsyncScriptedProvider, ScriptedProvider
from fluxibly.testing.modes import MODES, run
from fluxibly.types import Chunk, Request, Response, Restart, ToolCallDelta, Usage

REQUEST = Request(model="m", messages="hi")
STREAMS = [mode for mode in MODES if mode.streaming]


@pytest.fixture(params=MODES, ids=str)
def mode(request):
    return request.param


@pytest.fixture(params=STREAMS, ids=str)
def streaming(request):
    return request.param


def scripted(mode, *answers):
    return (AsyncScriptedProvider if mode.backend else ScriptedProvider)(*answers)


def mapping(fn, at_end=None, **options):
    def mapped(request, call_next):
        return (yield from map_chunks(call_next(request), fn, at_end, **options))

    return mapped


def holding(until=None, check=None):
    def held(request, call_next):
        return (yield from hold_back(call_next(request), until, check))

    return held


def texts(ran):
    return [event.text if isinstance(event, Chunk) else event for event in ran.events]


class TestMapChunks:
    def test_a_change(self, mode):
        """Chunks and response both have it; what is not output is the provider's."""
        script = ["ab", Chunk("c", usage=Usage(output_tokens=2), model="m-1", finish_reason="stop")]
        ran = run(mode, scripted(mode, script), [mapping(lambda c: attrs.evolve(c, text=c.text.upper()))], REQUEST)
        assert ran.response == Response("ABC", usage=Usage(output_tokens=2), model="m-1", finish_reason="stop")
        if mode.streaming:
            assert texts(ran) == ["AB", "C"]

    def test_no_change_keeps_the_response(self, mode):
        """A function that looks on leaves the very response that came from within."""
        kept = []

        def inner(request, call_next):
            response = yield from call_next(request)
            kept.append(response)
            return response

        def outer(request, call_next):
            response = yield from map_chunks(call_next(request), lambda c: c)
            assert response is kept[0]
            return response

        assert run(mode, scripted(mode, "a b"), [outer, inner], REQUEST).error is None

    def test_dropping_and_multiplying(self, streaming):
        """None and an empty sequence drop a chunk; a sequence gives several."""
        made = {"a": None, "b": [], "c": [Chunk("1"), Chunk("2")], "d": (Chunk(x) for x in "345")}
        ran = run(
            streaming, scripted(streaming, ["a", "b", "c", "d", "e"]), [mapping(lambda c: made.get(c.text, c))], REQUEST
        )
        assert texts(ran) == ["1", "2", "3", "4", "5", "e"]
        assert ran.response.text == "12345e"

    def test_everything_dropped(self, mode):
        """Then the answer is empty, in all modes."""
        ran = run(mode, scripted(mode, ["a", "b"]), [mapping(lambda c: None)], REQUEST)
        assert ran.response.text == ""
        assert ran.events == []

    def test_at_end_gives_what_was_kept(self, mode):
        """After the last chunk of a success, in whole responses too."""

        def mw(request, call_next):
            kept = []

            def keep(chunk):
                kept.append(chunk.text)

            return (yield from map_chunks(call_next(request), keep, lambda: [Chunk("".join(kept)), Chunk("!")]))

        ran = run(mode, scripted(mode, ["a", "b"]), [mw], REQUEST)
        assert ran.response.text == "ab!"
        if mode.streaming:
            assert texts(ran) == ["ab", "!"]

    def test_at_end_is_for_successes(self, mode):
        """After a failure nothing more goes out."""
        called = []
        ran = run(
            mode, scripted(mode, ["a", ServerError("x")]), [mapping(lambda c: c, lambda: called.append(1))], REQUEST
        )
        assert ran.error is not None
        assert called == []

    def test_a_short_circuit_passes_through(self, mode):
        """A cache hit within is seen by an outer guard, as one chunk, and `at_end` runs."""

        def cached(request, call_next):
            yield from ()
            return Response("secret", finish_reason="stop")

        seen = []

        def redact(chunk):
            seen.append(chunk.text)
            return attrs.evolve(chunk, text="*")

        ran = run(mode, scripted(mode), [mapping(redact, lambda: Chunk("end")), cached], REQUEST)
        assert seen == ["secret"]
        assert ran.response == Response("*end", finish_reason="stop")

    def test_tool_calls_and_reasoning_pass(self, mode):
        """What a function leaves alone comes through a change of the text."""
        script = [
            Chunk("a", reasoning="why"),
            Chunk(tool_calls=(ToolCallDelta(index=0, id="1", name="f", arguments="{"),)),
            Chunk("b", tool_calls=(ToolCallDelta(index=0, arguments="}"),)),
        ]
        change = mapping(lambda c: attrs.evolve(c, text=c.text.upper()) if c.text == "b" else c)
        ran = run(mode, scripted(mode, script), [change], REQUEST)
        assert ran.response.reasoning == "why"
        assert [(c.id, c.name, c.raw_arguments) for c in ran.response.tool_calls] == [("1", "f", "{}")]
        if mode.streaming:
            assert ran.response.text == "aB"

    def test_layers_compose(self, streaming):
        """An outer one sees what an inner one made."""
        double = mapping(lambda c: [c, c])
        mark = mapping(lambda c: attrs.evolve(c, text=f"<{c.text}>"), lambda: Chunk("."))
        ran = run(streaming, scripted(streaming, ["a"]), [mark, double], REQUEST)
        assert ran.response.text == "<a><a>."
        ran = run(streaming, scripted(streaming, ["a"]), [double, mark], REQUEST)
        assert ran.response.text == "<a><a>.."

    @pytest.mark.parametrize("where", ["fn", "at_end"])
    def test_an_error_of_the_function(self, mode, where):
        """It reaches the caller, and the flow within is closed first."""
        ends = []

        def watch(request, call_next):
            try:
                return (yield from call_next(request))
            finally:
                ends.append(True)

        def boom(*_):
            assert where == "fn" or ends
            raise LookupError("boom")

        mw = mapping(boom) if where == "fn" else mapping(lambda c: c, boom)
        provider = scripted(mode, "a b")
        ran = run(mode, provider, [mw, watch], REQUEST)
        error = ran.error.__cause__ if isinstance(ran.error, StreamInterrupted) else ran.error
        assert isinstance(error, LookupError)
        assert isinstance(ran.error, StreamInterrupted) == (mode.streaming and where == "at_end")
        assert ends == [True]
        assert provider.opened == provider.closed

    def test_a_stop_iteration_of_the_function(self, mode):
        """It cannot be taken for the end of a flow."""

        def fn(chunk):
            raise StopIteration

        ran = run(mode, scripted(mode, "a"), [mapping(fn)], REQUEST)
        assert isinstance(ran.error, RuntimeError)

    @pytest.mark.parametrize("rubbish", ["text", 3, [None], {"a": 1}], ids=str)
    def test_a_function_that_returns_rubbish(self, mode, rubbish):
        """It is told what to return."""
        ran = run(mode, scripted(mode, "a"), [mapping(lambda c: rubbish)], REQUEST)
        error = ran.error
        assert isinstance(error, TypeError)

    def test_memory_stays_constant_for_onlookers(self):
        """Without a change no text is kept."""
        from fluxibly.flow.combinators import _Mapper

        mapper = _Mapper(lambda c: c, None)
        for _ in range(1000):
            mapper.see(Chunk("some text"))
        assert mapper.text == 9000
        assert mapper.answer.response() == Response()

    def test_an_interrupted_stream_tells_what_was_let_out(self, streaming):
        """`partial` has the changed text, and nothing that was held back."""
        kept = mapping(lambda c: attrs.evolve(c, text=c.text.upper()) if c.text != "b" else None)
        ran = run(streaming, scripted(streaming, ["a", "b", "c", ServerError("x")]), [kept], REQUEST)
        assert isinstance(ran.error, StreamInterrupted)
        assert ran.error.partial.text == "AC"
        assert isinstance(ran.error.__cause__, ServerError)

    def test_an_interruption_of_which_nothing_went_out_is_the_providers_error(self, streaming):
        """So that an outer Retry tries again."""
        drop_first = mapping(lambda c: None if c.text == "a" else c)
        provider = scripted(streaming, ["a", ServerError("x")], ["b"])
        ran = run(streaming, provider, [Retry(), drop_first], REQUEST)
        assert ran.response.text == "b"

    def test_a_resend_within_is_refused_after_output(self, streaming):
        """A middleware inside that asks again after its output was let out is told so; nothing is sent."""

        def again(request, call_next):
            yield from call_next(request)
            return (yield from call_next(request))

        provider = scripted(streaming, "a", "b")
        ran = run(streaming, provider, [mapping(lambda c: c), again], REQUEST)
        assert isinstance(ran.error, StreamInterrupted)
        assert "asked ScriptedProvider again after output" in str(ran.error)
        assert ran.error.partial.text == "a"
        assert len(provider.requests) == 1

    def test_a_resend_within_is_refused_after_what_it_swallowed(self, streaming):
        """A function that keeps everything for the end would otherwise give two answers as one."""

        def again(request, call_next):
            yield from call_next(request)
            return (yield from call_next(request))

        def gathering(request, call_next):
            texts = []
            return (
                yield from map_chunks(call_next(request), lambda c: texts.append(c.text), lambda: Chunk("".join(texts)))
            )

        provider = scripted(streaming, "a", "b")
        ran = run(streaming, provider, [gathering, again], REQUEST)
        assert isinstance(ran.error, StreamInterrupted)
        assert len(provider.requests) == 1

    def test_a_restart_within_begins_anew(self, streaming):
        """`at_restart` resets what the function remembers, and the response is that since."""

        def mw(request, call_next):
            seen = []

            def fn(chunk):
                seen.append(chunk.text)
                return attrs.evolve(chunk, text=f"{len(seen)}{chunk.text}")

            return (yield from map_chunks(call_next(request), fn, at_restart=seen.clear))

        retry = Retry(on_interrupt="restart")
        ran = run(
            streaming, scripted(streaming, ["a", ServerError("x")], ["b", "c"]), [mw, retry], REQUEST, restarts=True
        )
        assert texts(ran) == ["1a", Restart("ServerError"), "1b", "2c"]
        assert ran.response.text == "1b2c"

    def test_a_refused_restart_resets_nothing(self, streaming):
        """Without a consumer that takes it, the stream is interrupted with all that went out."""
        resets = []
        mw = mapping(lambda c: attrs.evolve(c, text=c.text * 2), at_restart=lambda: resets.append(1))
        ran = run(streaming, scripted(streaming, ["a", ServerError("x")]), [mw, Retry(on_interrupt="restart")], REQUEST)
        assert ran.error.partial.text == "aa"
        assert resets == []


class TestHoldBack:
    def test_all_goes_out_at_the_end(self, mode):
        """In the order it came, each chunk by itself."""
        ran = run(mode, scripted(mode, ["a", "b", "c"]), [holding()], REQUEST)
        assert ran.response.text == "abc"
        if mode.streaming:
            assert texts(ran) == ["a", "b", "c"]

    def test_until_lets_go(self, streaming):
        """What was held goes out, and then each chunk as it comes."""
        log = []

        def watch(request, call_next):
            return (yield from map_chunks(call_next(request), lambda c: log.append(f"in {c.text}") or c))

        def out(request, call_next):
            return (yield from map_chunks(call_next(request), lambda c: log.append(f"out {c.text}") or c))

        ran = run(
            streaming, scripted(streaming, ["a", "b", "c"]), [out, holding(lambda text: "b" in text), watch], REQUEST
        )
        assert log == ["in a", "in b", "out a", "out b", "in c", "out c"]
        assert texts(ran) == ["a", "b", "c"]

    def test_a_check_that_raises_lets_nothing_out(self, mode):
        """In a stream the error is its own, not an interruption."""

        def check(response):
            raise LookupError(response.text)

        ran = run(mode, scripted(mode, "a b"), [holding(check=check)], REQUEST)
        assert isinstance(ran.error, LookupError)
        assert str(ran.error) == "a b"
        assert ran.events == []

    def test_a_failure_of_what_is_held_can_be_retried(self, streaming):
        """It is the provider's own error, since nothing went out."""
        provider = scripted(streaming, ["a", ServerError("x")], ["b"])
        ran = run(streaming, provider, [Retry(), holding()], REQUEST)
        assert texts(ran) == ["b"]
        ran = run(streaming, scripted(streaming, ["a", ServerError("x")]), [holding()], REQUEST)
        assert isinstance(ran.error, ServerError)

    def test_a_failure_after_it_let_go_is_an_interruption(self, streaming):
        """And is not retried."""
        provider = scripted(streaming, ["a", "b", ServerError("x")], ["c"])
        ran = run(streaming, provider, [Retry(), holding(lambda text: text == "a")], REQUEST)
        assert isinstance(ran.error, StreamInterrupted)
        assert ran.error.partial.text == "ab"
        assert len(provider.requests) == 1

    def test_a_restart_within_empties_what_is_held(self, streaming):
        """The consumer need not know of restarts."""
        provider = scripted(streaming, ["a", ServerError("x")], ["b", "c"])
        ran = run(streaming, provider, [holding(), Retry(on_interrupt="restart")], REQUEST)
        assert texts(ran) == ["b", "c"]
        assert ran.response.text == "bc"

    def test_a_resend_within_is_refused_while_held(self, streaming):
        """What is held of the first answer would go out with the second."""

        def again(request, call_next):
            yield from call_next(request)
            return (yield from call_next(request))

        provider = scripted(streaming, "a", "b")
        ran = run(streaming, provider, [holding(), again], REQUEST)
        assert isinstance(ran.error, StreamInterrupted)
        assert len(provider.requests) == 1
        assert ran.events == []

    def test_sleep_and_other_effects_pass(self, mode):
        """A wait within is not held."""

        def snooze(request, call_next):
            response = yield from call_next(request)
            yield from sleep(1)
            return response

        assert run(mode, scripted(mode, "a b"), [holding(), snooze], REQUEST).response.text == "a b"

    def test_a_short_circuit_is_checked(self, mode):
        """A whole response from within passes the check too."""

        def cached(request, call_next):
            yield from ()
            return Response("hit")

        seen = []
        ran = run(mode, scripted(mode), [holding(check=lambda r: seen.append(r.text)), cached], REQUEST)
        assert ran.response.text == "hit"
        assert seen == ["hit"]
