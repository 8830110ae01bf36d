"""`map_chunks` and `hold_back`, in all modes."""

from __future__ import annotations

import attrs
import pytest

from fluxibly.errors import ServerError, StreamInterrupted
from fluxibly.flow import emit, hold_back, map_chunks, perform, sleep
from fluxibly.middleware.retry import Retry
from fluxibly.testing import AsyncScriptedProvider, ScriptedProvider
from fluxibly.testing.modes import MODES, run
from fluxibly.types import Chunk, Reasoning, Request, Response, Restart, ToolCallDelta, Usage

REQUEST = Request(model="m", messages="hi")
STREAMS = [mode for mode in MODES if mode.streaming]


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
        """A change shows in the chunks and in the response; fields other than output stay the provider's."""
        script = ["ab", Chunk("c", usage=Usage(output_tokens=2), model="m-1", finish_reason="stop")]
        ran = run(mode, scripted(mode, script), [mapping(lambda c: attrs.evolve(c, text=c.text.upper()))], REQUEST)
        assert ran.response == Response("ABC", usage=Usage(output_tokens=2), model="m-1", finish_reason="stop")
        if mode.streaming:
            assert texts(ran) == ["AB", "C"]

    def test_no_change_keeps_the_response(self, mode):
        """A function that changes nothing leaves the very response of the inner flow."""
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
        """None and an empty sequence drop a chunk; a sequence makes several chunks."""
        made = {"a": None, "b": [], "c": [Chunk("1"), Chunk("2")], "d": (Chunk(x) for x in "345")}
        ran = run(
            streaming, scripted(streaming, ["a", "b", "c", "d", "e"]), [mapping(lambda c: made.get(c.text, c))], REQUEST
        )
        assert texts(ran) == ["1", "2", "3", "4", "5", "e"]
        assert ran.response.text == "12345e"

    def test_everything_dropped(self, mode):
        """If every chunk is dropped, the answer is empty in all modes."""
        ran = run(mode, scripted(mode, ["a", "b"]), [mapping(lambda c: None)], REQUEST)
        assert ran.response.text == ""
        assert ran.events == []

    def test_at_end_releases_kept_chunks(self, mode):
        """`at_end` adds chunks after the last chunk of a success, also for a whole response."""

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
        """`at_end` does not run after a failure."""
        called = []
        ran = run(
            mode, scripted(mode, ["a", ServerError("x")]), [mapping(lambda c: c, lambda: called.append(1))], REQUEST
        )
        assert ran.error is not None
        assert called == []

    def test_a_short_circuit_passes_through(self, mode):
        """An outer guard sees an inner cache hit as one chunk, and `at_end` runs."""

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
        """A change of the text leaves tool calls and reasoning as they are."""
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

    def test_what_a_middleware_emits_passes(self, mode):
        """Chunks of a middleware's own are changed like those of the provider, and its response like theirs."""

        def emitting(request, call_next):
            response = yield from call_next(request)
            yield from emit(Chunk(" (checked)"))
            return response.evolve(text=f"{response.text} (checked)")

        change = mapping(lambda chunk: attrs.evolve(chunk, text=chunk.text.upper()), lambda: Chunk("."))
        ran = run(mode, scripted(mode, ["a", "b"]), [change, emitting], REQUEST)
        assert ran.response.text == "AB (CHECKED)."
        if mode.streaming:
            assert texts(ran) == ["A", "B", " (CHECKED)", "."]

    def test_layers_compose(self, streaming):
        """An outer layer sees the chunks that an inner layer made."""
        double = mapping(lambda c: [c, c])
        mark = mapping(lambda c: attrs.evolve(c, text=f"<{c.text}>"), lambda: Chunk("."))
        ran = run(streaming, scripted(streaming, ["a"]), [mark, double], REQUEST)
        assert ran.response.text == "<a><a>."
        ran = run(streaming, scripted(streaming, ["a"]), [double, mark], REQUEST)
        assert ran.response.text == "<a><a>.."

    @pytest.mark.parametrize("where", ["fn", "at_end"])
    def test_an_error_of_the_function(self, mode, where):
        """The error reaches the caller, after the inner flow is closed."""
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
        """A StopIteration of the function becomes a RuntimeError, not the end of a flow."""

        def fn(chunk):
            raise StopIteration

        ran = run(mode, scripted(mode, "a"), [mapping(fn)], REQUEST)
        assert isinstance(ran.error, RuntimeError)

    @pytest.mark.parametrize("rubbish", ["text", 3, [None], {"a": 1}], ids=str)
    def test_a_function_that_returns_a_wrong_value(self, mode, rubbish):
        """A function that returns anything but chunks or None raises a TypeError."""
        ran = run(mode, scripted(mode, "a"), [mapping(lambda c: rubbish)], REQUEST)
        error = ran.error
        assert isinstance(error, TypeError)

    def test_the_partial_response_is_what_was_let_out(self, streaming):
        """The `partial` of an interrupted stream has the changed text, without chunks that were dropped."""
        kept = mapping(lambda c: attrs.evolve(c, text=c.text.upper()) if c.text != "b" else None)
        ran = run(streaming, scripted(streaming, ["a", "b", "c", ServerError("x")]), [kept], REQUEST)
        assert isinstance(ran.error, StreamInterrupted)
        assert ran.error.partial.text == "AC"
        assert isinstance(ran.error.__cause__, ServerError)

    def test_an_interruption_before_any_output_is_the_providers_error(self, streaming):
        """If no output went out, the provider's error is raised, so that an outer Retry tries again."""
        drop_first = mapping(lambda c: None if c.text == "a" else c)
        provider = scripted(streaming, ["a", ServerError("x")], ["b"])
        ran = run(streaming, provider, [Retry(), drop_first], REQUEST)
        assert ran.response.text == "b"

    def test_a_resend_within_is_refused_after_output(self, streaming):
        """An inner middleware that asks again after its output was let out gets an error, and nothing is sent."""

        def again(request, call_next):
            yield from call_next(request)
            return (yield from call_next(request))

        provider = scripted(streaming, "a", "b")
        ran = run(streaming, provider, [mapping(lambda c: c), again], REQUEST)
        assert isinstance(ran.error, StreamInterrupted)
        assert "asked ScriptedProvider again after output" in str(ran.error)
        assert ran.error.partial.text == "a"
        assert len(provider.requests) == 1

    def test_a_resend_within_is_refused_after_kept_output(self, streaming):
        """A resend is refused too if the function keeps all output for the end, which would join two answers."""

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
        """`at_restart` resets the function's state, and the response is the output since the restart."""

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
        """If the consumer does not accept restarts, the stream is interrupted with all its output."""
        resets = []
        mw = mapping(lambda c: attrs.evolve(c, text=c.text * 2), at_restart=lambda: resets.append(1))
        ran = run(streaming, scripted(streaming, ["a", ServerError("x")]), [mw, Retry(on_interrupt="restart")], REQUEST)
        assert ran.error.partial.text == "aa"
        assert resets == []


class TestHoldBack:
    def test_all_goes_out_at_the_end(self, mode):
        """The chunks go out at the end, each by itself and in order."""
        ran = run(mode, scripted(mode, ["a", "b", "c"]), [holding()], REQUEST)
        assert ran.response.text == "abc"
        if mode.streaming:
            assert texts(ran) == ["a", "b", "c"]

    def test_until_releases_the_chunks(self, streaming):
        """The held chunks go out, and then each chunk as it arrives."""
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

    def test_until_is_not_asked_again(self, streaming):
        """Once it has returned true, it decides nothing more, even if a chunk comes in several pieces."""
        asked = []

        def until(text):
            asked.append(text)
            return text.endswith("b")

        split = mapping(lambda chunk: [Chunk(letter) for letter in chunk.text])
        ran = run(streaming, scripted(streaming, ["a", "bc", "de"]), [holding(until), split], REQUEST)
        assert asked == ["a", "ab"]
        assert texts(ran) == ["a", "b", "c", "d", "e"]

    def test_a_check_that_raises_lets_nothing_out(self, mode):
        """The check's own error is raised, also in a stream, and no chunk goes out."""

        def check(response):
            raise LookupError(response.text)

        ran = run(mode, scripted(mode, "a b"), [holding(check=check)], REQUEST)
        assert isinstance(ran.error, LookupError)
        assert str(ran.error) == "a b"
        assert ran.events == []

    def test_a_failure_while_holding_can_be_retried(self, streaming):
        """The failure is the provider's own error, because nothing went out."""
        provider = scripted(streaming, ["a", ServerError("x")], ["b"])
        ran = run(streaming, provider, [Retry(), holding()], REQUEST)
        assert texts(ran) == ["b"]
        ran = run(streaming, scripted(streaming, ["a", ServerError("x")]), [holding()], REQUEST)
        assert isinstance(ran.error, ServerError)

    def test_a_failure_after_the_release_is_an_interruption(self, streaming):
        """A failure after the release is an interruption and is not retried."""
        provider = scripted(streaming, ["a", "b", ServerError("x")], ["c"])
        ran = run(streaming, provider, [Retry(), holding(lambda text: text == "a")], REQUEST)
        assert isinstance(ran.error, StreamInterrupted)
        assert ran.error.partial.text == "ab"
        assert len(provider.requests) == 1

    def test_a_restart_within_discards_held_chunks(self, streaming):
        """A restart discards the held chunks, even if the consumer does not accept restarts."""
        provider = scripted(streaming, ["a", ServerError("x")], ["b", "c"])
        ran = run(streaming, provider, [holding(), Retry(on_interrupt="restart")], REQUEST)
        assert texts(ran) == ["b", "c"]
        assert ran.response.text == "bc"

    def test_a_resend_within_is_refused_while_held(self, streaming):
        """A resend is refused while output is held, because both answers would go out together."""

        def again(request, call_next):
            yield from call_next(request)
            return (yield from call_next(request))

        provider = scripted(streaming, "a", "b")
        ran = run(streaming, provider, [holding(), again], REQUEST)
        assert isinstance(ran.error, StreamInterrupted)
        assert len(provider.requests) == 1
        assert ran.events == []

    def test_sleep_and_other_effects_pass(self, mode):
        """An inner wait passes outward at once."""

        def snooze(request, call_next):
            response = yield from call_next(request)
            yield from sleep(1)
            return response

        assert run(mode, scripted(mode, "a b"), [holding(), snooze], REQUEST).response.text == "a b"

    def test_what_a_middleware_emits_is_held(self, streaming):
        """Chunks of a middleware's own are held like those of the provider."""

        def emitting(request, call_next):
            yield from emit(Chunk("a"))
            yield from sleep(1)
            yield from emit(Chunk("b"))
            return Response("ab")

        log = []

        def check(response):
            log.append(f"check {response.text}")

        ran = run(
            streaming,
            scripted(streaming),
            [holding(check=check), emitting],
            REQUEST,
            watch=lambda event: log.append(event.text),
        )
        assert log == ["check ab", "a", "b"]
        assert ran.response.text == "ab"

    def test_a_short_circuit_is_checked(self, mode):
        """The check runs for an inner cache hit too."""

        def cached(request, call_next):
            yield from ()
            return Response("hit")

        seen = []
        ran = run(mode, scripted(mode), [holding(check=lambda r: seen.append(r.text)), cached], REQUEST)
        assert ran.response.text == "hit"
        assert seen == ["hit"]


class TestOutputWatch:
    def test_outcomes_reach_the_inner_flow_after_output(self, streaming):
        """An inner layer that catches an error after output gets the outcome of what it yields next."""
        outcomes = []

        def counting(request, call_next):
            try:
                return (yield from call_next(request))
            except StreamInterrupted as error:
                outcomes.append((yield from perform(lambda: "sync", aperformed)))
                return error.partial.evolve(finish_reason="length")

        async def aperformed():
            return "async"

        ran = run(streaming, scripted(streaming, ["a", ServerError("x")]), [Retry(), counting], REQUEST)
        assert ran.response.text == "a"
        assert outcomes == ["async" if streaming.backend else "sync"]

    def test_what_follows_output_changes_nothing(self, streaming):
        """After output that a layer lets out by itself, and a chunk without output, nothing is begun again."""
        begun = []

        def emitting(request, call_next):
            begun.append(request.model)
            yield from emit(Chunk("x"))
            yield from emit(Chunk(id="1"))
            raise ServerError("down")

        ran = run(streaming, scripted(streaming), [Retry(), emitting], REQUEST)
        assert isinstance(ran.error, StreamInterrupted)
        assert (ran.text, len(begun)) == ("x", 1)


class TestAttempts:
    """The chunks of one answer after those of another, which failed or was void."""

    def test_what_a_failed_attempt_said_beside_its_output_is_forgotten(self, mode):
        """Details of an attempt that failed before output do not get into the answer that takes its place."""

        def sorry(request, call_next):
            try:
                return (yield from call_next(request))
            except ServerError:
                return Response("sorry")

        failed = [Chunk(details={"logprobs": [1]}), ServerError("down")]
        louder = mapping(lambda chunk: attrs.evolve(chunk, text=chunk.text.upper()))
        ran = run(mode, scripted(mode, failed), [louder, sorry], REQUEST)
        assert (ran.response.text, ran.response.details) == ("SORRY", {})
        good = [Chunk("good", details={"logprobs": [2]})]
        ran = run(mode, scripted(mode, failed, good), [louder, Retry(base_delay=0)], REQUEST)
        assert (ran.response.text, ran.response.details) == ("GOOD", {"logprobs": [2]})

    @pytest.mark.parametrize(
        "first",
        [[Chunk(finish_reason="stop")], [Chunk(model="m-1"), ServerError("down")]],
        ids=["an empty answer", "a failure"],
    )
    def test_an_answer_after_what_the_function_has_added(self, mode, first):
        """If the function has put a text before a chunk without output, the answer that stands in comes after it."""

        def headed(request, call_next):
            begun = []

            def fn(chunk):
                text = chunk.text if begun else f"AI: {chunk.text}"
                begun.append(chunk)
                return attrs.evolve(chunk, text=text)

            return (yield from map_chunks(call_next(request), fn, lambda: Chunk("!")))

        def filled(request, call_next):
            try:
                response = yield from call_next(request)
            except ServerError:
                return Response("(none)")
            return response if response.has_output else response.evolve(text="(none)")

        ran = run(mode, scripted(mode, first), [headed, filled], REQUEST)
        assert ran.error is None
        assert ran.response.text == "AI: (none)!"
        if mode.streaming:
            assert ran.text == "AI: (none)!"

    def test_each_chunk_of_an_empty_answer_passes_once(self, mode):
        """A stream without output was a stream all the same: its last chunk is not made anew from the response."""
        seen = []
        ran = run(
            mode,
            scripted(mode, [Chunk(finish_reason="stop")]),
            [mapping(lambda chunk: seen.append(chunk) or chunk, lambda: Chunk("end"))],
            REQUEST,
        )
        assert len(seen) == 1
        assert ran.response == Response("end", finish_reason="stop")
        if mode.streaming:
            assert ran.events == [Chunk(finish_reason="stop"), Chunk("end")]

    def test_a_failure_after_a_restart_can_be_retried(self, streaming):
        """Output that a restart made void does not keep a later failure before output from being its own error."""

        def again(request, call_next):
            try:
                return (yield from call_next(request))
            except StreamInterrupted:
                assert (yield Restart("once more"))
            return (yield from call_next(request))

        def only_a(chunk):
            return chunk if chunk.text == "a" else None

        answers = ["a", ServerError("one")], ["b", ServerError("two")]
        ran = run(streaming, scripted(streaming, *answers), [mapping(only_a), again], REQUEST, restarts=True)
        assert [type(event) for event in ran.events] == [Chunk, Restart]
        assert isinstance(ran.error, ServerError)
        assert str(ran.error) == "two"

    def test_a_hold_back_counts_the_text_of_each_attempt_alone(self, streaming):
        """The text that a restart made void does not release the next answer."""
        seen = []

        def enough(text):
            seen.append(text)
            return len(text) >= 4

        answers = ["abc", ServerError("down")], ["d", "ef"]
        retry = Retry(on_interrupt="restart", base_delay=0)
        ran = run(streaming, scripted(streaming, *answers), [holding(enough), retry], REQUEST)
        assert seen == ["abc", "d", "def"]
        assert ran.text == "def"

    def test_alternatives_are_output(self, mode):
        """Nothing is sent again after a piece of another choice has gone out, and none is joined with a second one."""
        half = [Chunk(alternatives=((1, Chunk("uno")),)), ServerError("down")]
        ran = run(mode, scripted(mode, half, "one"), [Retry(base_delay=0)], REQUEST)
        if mode.streaming:
            assert isinstance(ran.error, StreamInterrupted)
            assert ran.error.partial.alternatives == (Response("uno"),)
        else:
            assert ran.response.text == "one"


def test_pieces_of_one_chunk_that_are_held(streaming):
    """Only the last of the pieces that an inner layer made of a chunk lets the driver read the next chunk."""
    split = mapping(lambda chunk: [Chunk(letter) for letter in chunk.text])
    ran = run(streaming, scripted(streaming, ["abc", "de", "f"]), [holding(), split], REQUEST)
    assert ran.error is None
    assert texts(ran) == ["a", "b", "c", "d", "e", "f"]


def test_a_check_after_the_release_would_be_too_late(streaming):
    """Once the chunks are released, the check no longer decides anything, and is not asked."""
    checked = []
    ran = run(
        streaming, scripted(streaming, ["a", "b", "c"]), [holding(lambda text: "b" in text, checked.append)], REQUEST
    )
    assert ran.text == "abc"
    assert checked == []
    run(streaming, scripted(streaming, ["a"]), [holding(lambda text: "b" in text, checked.append)], REQUEST)
    assert [response.text for response in checked] == ["a"]


def test_what_is_held_is_told_to_the_layer_that_asks_again(streaming):
    """The layer within a hold-back that is refused learns which answer it would have doubled."""
    partials = []

    def asking_again(request, call_next):
        yield from call_next(request)
        try:
            return (yield from call_next(request))
        except StreamInterrupted as error:
            partials.append(error.partial.text)
            raise

    ran = run(streaming, scripted(streaming, "a b", "c"), [holding(), asking_again], REQUEST)
    assert partials == ["a b"]
    assert ran.events == []
    assert ran.error.partial == Response()


@pytest.mark.parametrize("between", [[], [Chunk("a")]], ids=["at once", "with text between"])
def test_a_changed_block_of_reasoning_leaves_the_next_as_it_is(mode, between):
    """Whether a function changed the reasoning is decided for each complete block."""
    blocks = [
        Chunk(parts=(Reasoning(text="one", signature="s1"),)),
        *between,
        Chunk(parts=(Reasoning(text="two", signature="s2"),)),
        Chunk("b"),
    ]
    change = mapping(lambda chunk: attrs.evolve(chunk, reasoning=chunk.reasoning.replace("one", "uno")))
    ran = run(mode, scripted(mode, blocks), [change], REQUEST)
    assert [part.text for part in ran.response.reasoning_parts] == ["uno", "two"]
    assert [part.signature for part in ran.response.reasoning_parts] == ["s1", "s2"]
