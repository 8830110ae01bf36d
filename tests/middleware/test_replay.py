"""`Replay`: recorded answers and errors come back as they were, in order, and what is not recorded is said."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import pytest
from hypothesis import given, settings, strategies as st
from support import strategies
from support.calling import REQUEST, call, scripted

from fluxibly import LLM, LLMConfig, Target, emit, errors, map_chunks
from fluxibly.errors import (
    AuthenticationError,
    BadRequest,
    ConfigError,
    FluxiblyError,
    GuardRefused,
    NotRecorded,
    ProviderError,
    RateLimitError,
    RequestTimeout,
    ResponseInvalid,
    ServerError,
    StreamInterrupted,
    root_cause,
)
from fluxibly.middleware import Fallback, Metrics, Record, Replay, Retry, StreamMeter, Tracing, Validation
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.testing import AsyncScriptedProvider, ScriptedProvider, check_middleware
from fluxibly.testing.modes import BACKENDS, MODES, run, run_async
from fluxibly.types import Chunk, Image, Message, Opaque, Reasoning, Request, Response, Restart, ToolCall, Usage

SYNC = [mode for mode in MODES if mode.backend is None]


def record(file, *answers, request=REQUEST, mode=SYNC[0]):
    """Record answers to equal requests, whole or streamed."""
    for answer in answers:
        call(mode, Record(file), answer, request=request)


def replaying(file, **options):
    return Pipeline(ScriptedProvider(), [Replay(file, **options)])


def texts(pipeline, count, request=REQUEST):
    return [pipeline.complete(request).text for _ in range(count)]


RICH = Response.from_parts(
    [
        Reasoning(text="hm", signature="S"),
        Reasoning(text="so", signature="T"),
        Opaque("anthropic", {"type": "server_tool_use", "id": "s1"}),
        Image(data=b"\x89PNG", media_type="image/png"),
        ToolCall("c1", "tide", {"port": "Ostend"}, signature="U"),
    ],
    usage=Usage(input_tokens=3, output_tokens=2, cached_tokens=1),
    finish_reason="tool_call",
    raw_finish_reason="tool_use",
    model="m-2",
    id="r-1",
    request_id="req-1",
    rate_limits={"x-ratelimit-limit": "3"},
    details={"cites": [{"at": None}]},
    alternatives=[Response("other", finish_reason="length")],
)


class TestAnswers:
    def test_in_all_modes(self, mode, file):
        """Nothing is sent."""
        call(mode, Record(file), "Hello there")
        made = call(mode, Replay(file))
        assert (made.response.text, made.provider.requests, made.clock.sleeps) == ("Hello there", [], [])
        assert [event.text for event in made.ran.events] == (["Hello", " there"] if mode.streaming else [])

    @pytest.mark.parametrize("recorded", SYNC, ids=str)
    def test_what_a_caller_changes_is_its_own(self, mode, recorded, file):
        answer = Response("Hi", details={"cites": [1]})
        call(recorded, Record(file), answer)
        layer = Replay(file)
        for _ in range(2):
            made = call(mode, layer)
            assert made.response.details == {"cites": [1]}
            for event in (made.response, *made.ran.events):
                if event.details:
                    event.details["cites"].append(2)

    @pytest.mark.parametrize("recorded", SYNC, ids=str)
    def test_everything_comes_back(self, mode, recorded, file):
        """Whole and streamed serve each other."""
        original = call(recorded, Record(file), RICH).response
        again = call(mode, Replay(file)).response
        assert again == original == RICH
        assert again.parts == RICH.parts
        for name in ("request_id", "rate_limits", "details", "provider"):
            assert getattr(again, name) == getattr(original, name)

    def test_the_chunks_come_back(self, stream_mode, file):
        """With their borders, also those of an answer with several parts."""
        chunks = [
            Chunk(model="m"),
            Chunk(reasoning="a"),
            Chunk(reasoning="b"),
            "x",
            Chunk(),
            "y",
            Chunk(finish_reason="stop"),
        ]
        original = call(stream_mode, Record(file), chunks)
        assert call(stream_mode, Replay(file)).ran.events == original.ran.events

    def test_a_replay_is_no_attempt(self, mode, file):
        """The usage is as recorded; nothing was spent, and no cache was asked."""
        call(mode, Record(file), Response("hi", usage=Usage(input_tokens=5, output_tokens=1)))
        made = call(mode, Replay(file))
        assert made.response.usage == Usage(input_tokens=5, output_tokens=1)
        assert made.response.total_usage == Usage(input_tokens=0, output_tokens=0)
        assert (made.record.attempts, made.record.spent, made.response.cache_hit) == (0, [], False)
        (decision,) = made.record.decisions
        assert decision[:2] == ("Replay", f"answers from line 1 of {str(file)!r}")

    def test_layers_outside(self, mode, file):
        """They measure a replay as any answer."""
        call(mode, Record(file), ["a", "b"])
        made = call(mode, [Tracing(), Metrics(), StreamMeter(), Validation(hold=True), Retry(), Replay(file)])
        assert made.response.text == "ab"
        assert (made.response.stats is not None) == mode.streaming

    @pytest.mark.parametrize("recorded", SYNC, ids=str)
    def test_marks(self, mode, recorded, file):
        """The messages of a turn come back where they stood."""
        turn = (Message.assistant("one"), Message.user("more"))

        def turns(request, call_next):
            yield from call_next(request)
            yield from emit(Chunk(added=turn))
            second = yield from call_next(request.evolve(messages=(*request.messages, *turn)))
            return second.evolve(added=turn)

        original = call(recorded, [Record(file), turns], "one", "two").response
        made = call(mode, Replay(file))
        assert made.response == original
        assert [event.added for event in made.ran.events if event.added] == ([turn] if mode.streaming else [])

    def test_an_answer_that_a_layer_continued(self, mode, file):
        """An empty mark comes back too."""

        def twice(request, call_next):
            first = yield from call_next(request)
            yield from emit(Chunk(added=()))
            second = yield from call_next(request)
            return second.evolve(text=first.text + second.text)

        original = call(mode, [Record(file), twice], "one", "two")
        made = call(mode, Replay(file))
        assert (made.response, made.ran.events) == (original.response, original.ran.events)
        assert made.response.text == "onetwo"

    def test_an_answer_of_another_provider_says_so(self, mode, file):
        class Other:
            def complete(self, request):
                return "other"

            def stream(self, request):
                yield "other"

        call(mode, [Record(file), Fallback(Target(Other()))], ServerError("down"))
        assert call(mode, Replay(file)).response.provider == "Other"

    def test_what_a_layer_parsed(self, mode, file):
        """If it is JSON. Otherwise `Replay` belongs inside of `Validation`."""
        schema = {"type": "object"}
        call(mode, [Record(file), Validation(schema=schema)], '{"a": 1}')
        assert call(mode, Replay(file)).response.parsed == {"a": 1}

    def test_two_calls_do_not_share_a_response(self, file):
        """The driver writes what belongs to a call onto it."""
        record(file, "hi")
        replay = replaying(file)
        one, two = replay.complete(REQUEST), replay.complete(REQUEST)
        assert one is not two


class TestOrder:
    def test_equal_requests(self, mode, file):
        """In recorded order, and the last again and again; a new instance begins at the first."""
        record(file, "one", "two")
        record(file, "other", request=REQUEST.evolve(seed=1))
        record(file, "three")
        for _ in range(2):
            layer = Replay(file)
            assert [call(mode, layer).response.text for _ in range(5)] == ["one", "two", "three", "three", "three"]
            assert call(mode, layer, request=REQUEST.evolve(seed=1)).response.text == "other"

    def test_what_makes_requests_equal(self, file):
        """What a service sees: not metadata, nor secret headers."""
        record(file, "hi", request=REQUEST.evolve(headers={"authorization": "a"}, metadata={"a": 1}))
        assert texts(replaying(file), 1, REQUEST.evolve(headers={"Authorization": "b"})) == ["hi"]
        with pytest.raises(NotRecorded):
            replaying(file).complete(REQUEST.evolve(temperature=1))

    def test_threads(self, file):
        """100 threads take each recorded answer once."""
        record(file, *[str(number) for number in range(300)])
        replay = replaying(file)
        with ThreadPoolExecutor(100) as pool:
            found = [text for part in pool.map(lambda _: texts(replay, 3), range(100)) for text in part]
        assert sorted(found, key=int) == [str(number) for number in range(300)]
        assert texts(replay, 2) == ["299", "299"]

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_tasks(self, backend, file):
        """1,000 tasks do, and wait for the file together."""
        record(file, "x")
        line = json.loads(file.read_text())
        file.write_text("".join([json.dumps({**line, "answer": {"text": str(n)}}) + "\n" for n in range(1000)]))
        pipeline = AsyncPipeline(AsyncScriptedProvider(), [Replay(file)])
        found = []

        async def one():
            found.append((await pipeline.complete(REQUEST)).text)

        async def main():
            async with anyio.create_task_group() as group:
                for _ in range(1000):
                    group.start_soon(one)

        run_async(main, backend)
        assert sorted(found, key=int) == [str(number) for number in range(1000)]

    def test_the_file_is_read_once(self, mode, file, monkeypatch):
        """At first use, and in an async call in a thread."""
        record(file, "hi")
        threads = []
        read = Path.read_bytes

        def noted(path):
            threads.append(threading.current_thread())
            return read(path)

        monkeypatch.setattr(Path, "read_bytes", noted)
        layer = Replay(file)
        assert threads == []
        for _ in range(3):
            call(mode, layer)
        assert [thread is threading.main_thread() for thread in threads] == [mode.backend is None]


PROVIDER_ERRORS = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, ProviderError)]


class Busy(RateLimitError):
    """A user's own error."""


class Strange(Exception):
    """A user's own error, which is nothing else."""


class TestErrors:
    @pytest.mark.parametrize("kind", PROVIDER_ERRORS, ids=lambda kind: kind.__name__)
    def test_each_class(self, kind, file):
        """It comes back with its fields, whole and in the middle of a stream."""
        retryable = not kind.default_retryable
        error = kind("it failed", retryable=retryable, status=503, code="c", retry_after=1.5, request_id="r", model="m")
        call(MODES[0], Record(file), error)
        again = call(MODES[0], Replay(file)).ran.error
        assert type(again) is kind
        assert str(again) == "it failed"
        assert {**vars(again)} == {**vars(error)}

    def test_a_code_that_is_a_number(self, file):
        """As a user's provider may give it."""
        record(file, ServerError("down", code=7))
        assert call(MODES[0], Replay(file)).ran.error.code == 7

    def test_in_all_modes(self, mode, file):
        """After output it is the cause of StreamInterrupted, which has what came."""
        call(mode, Record(file), ["a", Chunk(usage=Usage(output_tokens=1)), "b", ServerError("down")])
        made = call(mode, Replay(file))
        error = made.ran.error
        assert made.provider.requests == []
        if not mode.streaming:
            assert isinstance(error, ServerError)
            return
        assert isinstance(error, StreamInterrupted)
        assert isinstance(error.__cause__, ServerError)
        assert (error.partial.text, error.partial.usage) == ("ab", Usage(output_tokens=1))
        assert [event.text for event in made.ran.events] == ["a", "", "b"]

    def test_before_output(self, mode, file):
        """It is itself, also after chunks that say something else."""
        call(mode, Record(file), [Chunk(model="m"), ServerError("down")])
        assert type(call(mode, Replay(file)).ran.error) is ServerError

    @pytest.mark.parametrize("recorded", SYNC, ids=str)
    def test_whole_and_streamed(self, mode, recorded, file):
        """A whole call gets the error itself; so does a stream, of what was recorded whole."""
        call(recorded, Record(file), ["a", ServerError("down")])
        error = call(mode, Replay(file)).ran.error
        assert type(error) is (StreamInterrupted if mode.streaming and recorded.streaming else ServerError)
        assert type(root_cause(error)) is ServerError

    @pytest.mark.parametrize(
        ("error", "kind", "message"),
        [
            (ValueError("bad"), ValueError, "bad"),
            (TimeoutError("late"), TimeoutError, "late"),
            (Busy("busy", retry_after=3), RateLimitError, "Busy: busy"),
            (Strange("odd"), FluxiblyError, "Strange: odd"),
            (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "why"), UnicodeError, "UnicodeDecodeError: "),
            (json.JSONDecodeError("why", "{", 0), ValueError, "JSONDecodeError: why"),
            (errors.BudgetExceeded("over"), errors.BudgetExceeded, "over"),
            (GuardRefused("no", reason="rude"), GuardRefused, "no"),
            (ResponseInvalid("no", response=RICH, problem="short"), ResponseInvalid, "no"),
            (errors.StoreError("gone"), errors.StoreError, "gone"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
    )
    def test_other_classes(self, error, kind, message, mode, file):
        """Python's own and fluxibly's come back. Of another, the nearest such base does, and names it."""
        call(mode, Record(file), error)
        again = call(mode, Replay(file)).ran.error
        assert type(again) is kind
        assert str(again).startswith(message)
        for name in () if kind is UnicodeError else ("reason", "problem", "response", "retry_after"):
            assert getattr(again, name, None) == getattr(error, name, None)

    def test_a_class_that_is_not_known(self, file):
        """As a newer fluxibly may have recorded it."""
        record(file, "hi")
        line = json.loads(file.read_text())
        del line["answer"]
        found = []
        for fields in (
            {"class": "New", "message": "x", "retryable": True},
            {"class": "print"},
            {"class": "KeyboardInterrupt"},
        ):
            file.write_text(json.dumps({**line, "error": fields}))
            found.append(call(MODES[0], Replay(file)).ran.error)
        assert [(type(error).__name__, str(error)) for error in found] == [
            ("ProviderError", "New: x"),
            ("FluxiblyError", "print: "),
            ("FluxiblyError", "KeyboardInterrupt: "),
        ]

    def test_the_phase_of_a_limit(self, file):
        error = RequestTimeout("late")
        error.phase = "connect"
        record(file, error)
        again = call(MODES[0], Replay(file)).ran.error
        assert (type(again), again.phase) == (RequestTimeout, "connect")

    def test_an_error_of_a_layer_after_output(self, stream_mode, file):
        """It is raised as it is, and the driver makes an interruption of it, as it did."""

        def reject(request, call_next):
            yield from call_next(request)
            raise ServerError("a layer's own")

        stack = [Retry(on_interrupt="restart"), Record(file), reject]
        one = call(stream_mode, stack, "hi", restarts=True)
        two = call(stream_mode, [Retry(on_interrupt="restart"), Replay(file)], restarts=True)
        for made in (one, two):
            assert isinstance(made.ran.error, StreamInterrupted)
            assert str(made.ran.error.__cause__) == "a layer's own"
            assert [event for event in made.ran.events if isinstance(event, Restart)] == []


any_answers = strategies.any_answers | strategies.power_answers
any_stacks = st.one_of(
    strategies.around(strategies.HANDLING),
    st.lists(
        st.sampled_from(
            (
                *strategies.WRAPPING,
                *strategies.HANDLING,
                *strategies.some_watching,
                strategies.limiting,
                strategies.diverting,
                strategies.prefacing,
                strategies.turning,
                strategies.continuing,
                strategies.stopping,
                strategies.falling_back_anew,
            )
        ),
        max_size=5,
    ),
)
"""Stacks that do the same whenever they run, and ask nothing by themselves: a question passes no layers further in."""


class TestInAStack:
    def test_inside_of_retry(self, mode, file):
        """It replays attempts: the retry waits as it did."""
        one = call(
            mode, [Retry(uniform=max), Record(file)], RateLimitError("429", retry_after=3), ServerError("5"), "up"
        )
        two = call(mode, [Retry(uniform=max), Replay(file)])
        assert two.response == one.response
        assert two.clock.sleeps == one.clock.sleeps == [3, 1]

    def test_outside_of_retry(self, mode, file):
        """It replays calls."""
        call(mode, [Record(file), Retry(uniform=max)], ServerError("5"), "up")
        two = call(mode, [Replay(file), Retry(uniform=max)])
        assert (two.response.text, two.clock.sleeps) == ("up", [])

    def test_a_restart(self, stream_mode, file):
        """An interrupted stream begins again if the consumer takes that, and otherwise fails."""
        retry = Retry(on_interrupt="restart", uniform=max)
        for restarts in (True, False):
            file.unlink(missing_ok=True)
            one = call(stream_mode, [retry, Record(file)], ["Par", ServerError("5")], "Lyon", restarts=restarts)
            two = call(stream_mode, [retry, Replay(file)], restarts=restarts)
            assert two.ran.events == one.ran.events
            assert type(two.ran.error) is type(one.ran.error)
            assert two.ran.response == one.ran.response

    @pytest.mark.parametrize("error", [ServerError("5"), BadRequest("no"), Busy("busy"), ValueError("x")], ids=repr)
    def test_fallback(self, error, mode, file):
        """It goes on after the same errors, and asks the same model."""
        one = call(mode, [Fallback("m-2"), Record(file)], error, "from another")
        two = call(mode, [Fallback("m-2"), Replay(file)])
        assert two.ran.response == one.ran.response
        assert type(root_cause(two.ran.error or error)) in (type(error), RateLimitError)
        assert (two.ran.error is None) == (one.ran.error is None)

    def test_what_a_failed_attempt_said_before_output(self, stream_mode, file):
        """It is no part of the next attempt's answer, as layers between see it."""

        def mapped(request, call_next):
            return (yield from map_chunks(call_next(request), lambda chunk: [chunk]))

        stack = [mapped, Retry()]
        thought = Chunk(parts=(Reasoning(signature="S"),))
        one = call(stream_mode, [*stack, Record(file)], [thought, ServerError("down")], "up")
        two = call(stream_mode, [*stack, Replay(file)])
        assert two.response == one.response == Response("up")

    def test_a_layer_that_goes_on_after_an_interruption(self, stream_mode, file):
        """What has interrupted an attempt is forgotten when the next one begins."""

        def go_on(request, call_next):
            try:
                return (yield from call_next(request))
            except StreamInterrupted as error:
                turn = (error.partial.message, Message.user("Go on."))
            yield from emit(Chunk(added=turn))
            response = yield from call_next(request.evolve(messages=(*request.messages, *turn)))
            return response.evolve(added=turn)

        one = call(stream_mode, [go_on, Record(file)], ["Par", ServerError("down")], "is")
        two = call(stream_mode, [StreamMeter(), go_on, Replay(file)])
        assert two.response == one.response
        assert two.response.text == "is"

    def test_a_layer_that_swallows_an_interruption(self, stream_mode, file):
        """It is found, as it is with the provider itself."""

        def swallow(request, call_next):
            try:
                return (yield from call_next(request))
            except Exception:  # noqa: BLE001  # the mistake that is tested
                return Response("Par")

        call(stream_mode, Record(file), ["Par", ServerError("down")])
        error = call(stream_mode, [StreamMeter(), swallow, Replay(file)]).ran.error
        assert isinstance(error, StreamInterrupted)
        assert "swallow returned an answer after" in str(error)

    @settings(max_examples=40)
    @given(any_answers, any_stacks, st.sampled_from(MODES), st.booleans(), st.booleans())
    def test_a_stack_does_as_it_did(self, answers, kinds, mode, outermost, restarts):
        """Whatever the stack and the answers: a replay of its attempts, or of the whole call, is as it was recorded."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "answers.jsonl"

            def made(layer, *scripts):
                stack = strategies.build(kinds, [])
                stack = [layer, *stack] if outermost else [*stack, layer]
                return run(mode, scripted(mode, *scripts), stack, REQUEST, restarts=restarts and mode.streaming)

            one = made(Record(file), *[answer.make() for answer in answers])
            two = made(Replay(file) if file.exists() else Record(file))
        assert two.response == one.response
        assert two.text == one.text
        assert _kinds(two.error) == _kinds(one.error)
        if isinstance(one.error, StreamInterrupted):
            assert two.error.partial.text == one.error.partial.text
        if not outermost:
            assert getattr(two.error, "partial", None) == getattr(one.error, "partial", None)
            assert two.events == one.events
        elif not any(isinstance(event, Restart) for event in one.events):
            # What an attempt said that has failed before output is not recorded.
            assert _with_output(two.events) == _with_output(one.events)


def _with_output(events):
    return [event for event in events if event.has_output]


def _kinds(error):
    return None if error is None else (type(error), type(root_cause(error)))


answered = st.lists(
    st.one_of(strategies.chunks, st.builds(Chunk, details=st.just({"a": [None]}), id=st.just("1"))), max_size=6
)


@settings(max_examples=100)
@given(answered, st.sampled_from(SYNC), st.sampled_from(SYNC))
def test_any_answer_survives(chunks, recorded, replayed):
    """Recorded whole or streamed, and replayed whole or streamed: the response is equal."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "answers.jsonl"
        original = call(recorded, Record(file), chunks)
        again = call(replayed, Replay(file))
    assert again.response == original.response
    assert again.response.details == original.response.details
    if recorded.streaming and replayed.streaming:
        assert again.ran.events == original.ran.events


class TestNotToTheEnd:
    def test_a_stream_that_was_left(self, stream_mode, file):
        """Who stops there as well sees no difference. Who reads on is told why there is no more."""
        call(stream_mode, Record(file), ["a", "b", "c"], stop_after=2)
        same = call(stream_mode, Replay(file), stop_after=2)
        assert ([event.text for event in same.ran.events], same.ran.error) == (["a", "b"], None)
        error = call(stream_mode, Replay(file)).ran.error
        assert isinstance(error, StreamInterrupted)
        assert error.partial.text == "ab"
        assert str(error.__cause__) == (
            f"Replay: line 1 of {str(file)!r} ends here, because the call was abandoned when it was recorded; put "
            f'Record({str(file)!r}) in the place of Replay to record it, or write Replay(…, missing="ask")'
        )

    def test_a_whole_call(self, file):
        """It is no answer."""
        call(SYNC[1], Record(file), ["a", asyncio.CancelledError()])
        with pytest.raises(NotRecorded, match=r"line 1 of .* ends here, because the call was cancelled"):
            replaying(file).complete(REQUEST)

    def test_in_order(self, file):
        """It has its place in the order."""
        call(SYNC[1], Record(file), ["a", "b"], stop_after=1)
        record(file, "whole")
        layer = Replay(file)
        assert call(SYNC[1], layer, stop_after=1).ran.text == "a"
        assert call(SYNC[0], layer).response.text == "whole"

    def test_ask_asks_again(self, mode, file):
        """With "ask", such a recording does not count."""
        call(SYNC[1], Record(file), ["a", "b", "c"], stop_after=2)
        assert call(mode, Replay(file, missing="ask"), "whole").response.text == "whole"
        assert call(mode, Replay(file, missing="ask")).response.text == "whole"


class TestAsk:
    def test_in_all_modes(self, mode, file):
        """What is missing is sent and recorded; what is there is replayed, also in the same instance."""
        record(file, "one")
        layer = Replay(file, missing="ask")
        other = REQUEST.evolve(seed=1)
        assert call(mode, layer).response.text == "one"
        made = call(mode, layer, "two", request=other)
        assert (made.response.text, made.record.attempts) == ("two", 1)
        assert made.record.decisions[0].what == f"asks, because {str(file)!r} has no recording of the request"
        again = call(mode, layer, request=other)
        assert (again.response.text, again.record.attempts) == ("two", 0)
        assert again.record.decisions[0].what == f"answers from a new line of {str(file)!r}"
        assert texts(replaying(file), 1, other) == ["two"]

    def test_without_a_file(self, mode, file):
        """It is made."""
        assert call(mode, Replay(file, missing="ask"), "hi").response.text == "hi"
        assert texts(replaying(file), 1) == ["hi"]

    def test_a_failure_is_not_recorded(self, mode, file):
        """The next call asks again: so a Retry outside goes on, and a network that was down is not remembered."""
        layer = Replay(file, missing="ask")
        made = call(mode, [Retry(), layer], ServerError("down"), "up")
        assert (made.response.text, made.record.attempts) == ("up", 2)
        assert len(file.read_text().splitlines()) == 1
        assert call(mode, layer).response.text == "up"

    def test_a_failure_that_was_recorded_counts(self, file):
        record(file, AuthenticationError("wrong key"))
        with pytest.raises(AuthenticationError):
            replaying(file, missing="ask").complete(REQUEST)

    def test_a_stream_that_is_left(self, stream_mode, file):
        """It is recorded once, and asked again by each instance."""
        for _ in range(2):
            layer = Replay(file, missing="ask")
            for _ in range(2):
                call(stream_mode, layer, ["a", "b"], stop_after=1)
        (line,) = file.read_text().splitlines()
        assert json.loads(line)["ended"] == "abandoned"
        assert call(stream_mode, Replay(file), stop_after=1).ran.text == "a"

    def test_a_disk_that_is_full(self, file, reports, monkeypatch):
        """The instance has the answer all the same."""

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        pipeline = Pipeline(ScriptedProvider("hi"), [Replay(file, missing="ask")])
        assert texts(pipeline, 2) == ["hi", "hi"]
        assert "Replay cannot write" in reports()
        assert file.read_bytes() == b""

    def test_a_request_that_is_not_json(self, mode, file, reports):
        """It is sent, and not recorded, which is reported once."""
        layer = Replay(file, missing="ask")
        for value in (object(), {1}):
            made = call(mode, layer, "hi", request=REQUEST.evolve(extra={"a": value}))
            assert made.response.text == "hi"
        assert reports().count("is not recorded in") == 2
        assert not file.exists()

    def test_tasks(self, file):
        """Equal calls at once may all ask; each later one is answered from what they recorded."""
        layer = Replay(file, missing="ask")
        pipeline = AsyncPipeline(AsyncScriptedProvider(*["x"] * 50), [layer])

        async def main():
            async with anyio.create_task_group() as group:
                for _ in range(50):
                    group.start_soon(pipeline.complete, REQUEST)
            return (await pipeline.complete(REQUEST)).text

        assert run_async(main) == "x"


class TestWhatIsMissing:
    def failure(self, file, request, **options):
        with pytest.raises(NotRecorded) as caught:
            Pipeline(ScriptedProvider(), [Replay(file, **options)]).complete(request)
        return str(caught.value)

    def test_the_nearest_request(self, file):
        """It is named with what differs, and nothing is quoted."""
        messages = [Message.system("You are terse."), Message.user("My PIN is 1234. Remember it.")]
        asked = Request(model="m", messages=messages, temperature=0.5, extra={"user": "u", "other": 1})
        record(file, "hi", request=Request(model="m-0", messages=messages, temperature=0.5))
        record(file, "hi", request=asked)
        record(file, "hi", request=Request(model="m", messages="Something else", seed=1))
        changed = [messages[0], Message.user("My PIN is 9999.")]
        text = self.failure(file, asked.evolve(messages=changed, temperature=0.7))
        assert text == (
            f"Replay: {str(file)!r} has no recording of this request to m at scripted; the nearest (line 2) differs in "
            f"messages[1] and temperature; put Record({str(file)!r}) in the place of Replay to record it, or write "
            'Replay(…, missing="ask")'
        )
        assert "PIN" not in text
        text = self.failure(file, asked.evolve(messages=[*messages, Message.user("more")]))
        assert "(line 2) differs in the number of messages (3, recorded 2); put" in text
        text = self.failure(file, asked.evolve(extra={"user": "v", "other": 1}))
        assert "(line 2) differs in extra.user; put" in text
        text = self.failure(file, Request(model="m-9", messages="x", seed=2, top_k=1, n=2, max_tokens=3, stop="x"))
        assert "differs in " in text
        assert " and 2 more; put" in text

    def test_another_provider(self, file):
        """A request that is the same for a person may go to another provider."""
        record(file, "hi")

        class Mine:
            def complete(self, request):
                return "mine"

        with pytest.raises(NotRecorded, match=r"at Mine; the nearest \(line 1\) differs in provider; put"):
            Pipeline(Mine(), [Replay(file)]).complete(REQUEST)

    def test_a_difference_that_is_not_shown(self, file):
        request = REQUEST.evolve(extra={"api_key": "sk-one"})
        record(file, "hi", request=request)
        text = self.failure(file, request.evolve(extra={"api_key": "sk-two"}))
        assert "differs only in what is not shown there: the provider's configuration, or a secret; put" in text
        assert "sk-" not in text

    def test_an_empty_file(self, file):
        file.write_bytes(b"\n")
        assert "has no recording of this request to m-1 at scripted, nor of any other; put" in self.failure(
            file, REQUEST
        )

    def test_in_all_modes(self, mode, file):
        """Before anything is let out. Neither Retry nor Fallback goes on."""
        record(file, "hi")
        made = call(mode, [Fallback("m-2"), Retry(), Replay(file)], request=REQUEST.evolve(seed=1))
        assert type(made.ran.error) is NotRecorded
        assert made.provider.requests == []

    @pytest.mark.parametrize("value", [object(), {1}], ids=["an object", "a set"])
    def test_a_request_that_is_not_json(self, value, file):
        record(file, "hi")
        text = self.failure(file, REQUEST.evolve(extra={"a": value}))
        assert text.startswith(
            "Replay: a call of m-1 cannot have been recorded: the request: expected JSON values: got a"
        )

    def test_no_file(self, mode, file):
        made = call(mode, Replay(file))
        assert isinstance(made.ran.error, NotRecorded)
        assert str(made.ran.error) == (
            f"Replay: there is no file {str(file)!r}; put Record({str(file)!r}) in the place of Replay to record it, or "
            'write Replay(…, missing="ask")'
        )

    def test_a_file_that_cannot_be_read(self, file):
        pipelines = [replaying(file, missing=missing) for missing in ("error", "ask")]
        file.mkdir()
        for pipeline in pipelines:
            with pytest.raises(NotRecorded) as caught:
                pipeline.complete(REQUEST)
            assert str(caught.value) == f"Replay: cannot read {str(file)!r}: Is a directory"

    def test_a_file_that_comes_later(self, file):
        """The next call looks again."""
        replay = replaying(file)
        with pytest.raises(NotRecorded):
            replay.complete(REQUEST)
        record(file, "hi")
        assert texts(replay, 1) == ["hi"]


class TestBrokenFiles:
    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b"hello, this is no JSON at all", "expected JSON: Expecting value at character 1"),
            (
                b'{"version": 1, "key" "France", "request": {}}',
                "expected JSON: Expecting ':' delimiter at character 22",
            ),
            (b"[1]", "expected a table, got a list"),
            (b'\xff\xff{"version": 1}', "expected UTF-8, got other bytes at 0"),
            (b"[" + b"1" * 5000 + b"]", "expected JSON, got a number with too many digits"),
            (b"[" * 100_000 + b"]" * 100_000, "expected an exchange, got tables that are nested too deeply"),
        ],
        ids=lambda value: str(value)[:20],
    )
    def test_a_line_that_is_not_a_table(self, line, message, file):
        """The error has its number and says what is wrong, without a word of any content."""
        record(file, "hi")
        self.check(file, b"\n" + line + b"\n" + file.read_bytes(), message)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"version": 2}, "version: expected at most 1, got 2, which a newer fluxibly writes; update fluxibly, or"),
            ({"version": "1"}, "version: expected a whole number from 1 up"),
            ({"key": 7}, "expected a str as key, and a table as request"),
            ({"request": "France"}, "expected a str as key, and a table as request"),
            ({"answer": None}, "expected chunks, an answer or an error, got none of them"),
            ({"chunks": {}}, "expected a list as chunks, and tables as answer and error"),
            ({"error": "France"}, "expected a list as chunks, and tables as answer and error"),
            ({"answer": {"txt": "France"}}, "a response.txt: unknown field; did you mean 'text'?"),
            ({"chunks": ["France"]}, "chunks[0]: expected a list of a time and a chunk, got a str"),
            ({"chunks": [[0, "x"], [1, {"text": 3}]]}, "a chunk.text: expected a str, got 3"),
            ({"chunks": [[0, {"tool_calls": [{"at": 1}]}]]}, "a chunk.tool_calls[0].at: unknown field"),
            (
                {"chunks": [[0, {"alternatives": [1]}]]},
                "a chunk.alternatives[0]: expected a pair of a number and a chunk",
            ),
            (
                {"answer": None, "chunks": [[0, {"parts": [{"type": "text", "text": "France"}]}]]},
                "a Chunk's parts: expected an empty Text",
            ),
            ({"error": {"class": "ResponseInvalid", "response": {"x": 1}}}, "a response.x: unknown field"),
            (
                {"error": {"class": "ServerError", "retry_after": "France"}},
                "error.retry_after: expected a number, got a str",
            ),
        ],
        ids=str,
    )
    def test_a_line_that_is_no_exchange(self, changes, message, file):
        record(file, "hi")
        line = {**json.loads(file.read_bytes()), **changes}
        self.check(file, b"\n" + json.dumps(line).encode(), message)

    def check(self, file, data, message):
        file.write_bytes(data)
        for _ in range(2):
            with pytest.raises(ConfigError) as caught:
                replaying(file).complete(REQUEST)
            assert str(caught.value).startswith(f"line 2 of {str(file)!r}: {message}")
            assert "France" not in str(caught.value)

    def test_other_line_ends(self, file):
        """As version control may make them; also with a byte order mark."""
        record(file, "one", "two")
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
        assert texts(replaying(file), 2) == ["one", "two"]

    def test_a_line_that_was_edited(self, file):
        """A person may write one: times and a version, and the rest as it is meant."""
        record(file, "hi")
        line = json.loads(file.read_text())
        del line["answer"]
        file.write_text(json.dumps({**line, "chunks": [[0, "by "], [1, {"text": "hand", "finish_reason": "stop"}]]}))
        with replaying(file).stream(REQUEST) as stream:
            assert [*map(str, stream)] == ["by ", "hand"]


class TestSettings:
    def test_repr(self, file):
        assert repr(Replay(file)) == f"Replay(file={str(file)!r}, missing='error')"
        assert repr(Replay(file, missing="ask")) == f"Replay(file={str(file)!r}, missing='ask')"

    def test_missing(self, file):
        with pytest.raises(ValueError, match=r"Replay: missing: expected one of 'error', 'ask', got 'no'"):
            Replay(file, missing="no")

    def test_the_laws(self, file):
        check_middleware(Replay(file, missing="ask"))
        check_middleware(Replay(file))

    def test_in_yaml(self, tmp_path):
        """The example of the specification."""
        file, config = tmp_path / "answers.jsonl", tmp_path / "llm.yaml"
        config.write_text(f"llm: {{framework: echo, model: e, middleware: [replay: {{file: {file}, missing: ask}}]}}")
        with LLM.from_yaml(config) as llm:
            assert llm.complete("hi").text == llm.complete("hi").text
        assert len(file.read_text().splitlines()) == 1
        config.write_text(f"llm: {{framework: echo, model: e, middleware: [replay: {{file: {file}}}]}}")
        with LLM.from_yaml(config) as llm, pytest.raises(NotRecorded):
            llm.complete("other")

    def test_a_demo_without_a_network(self, tmp_path):
        """`fluxibly chat --config` answers from a recording of a service that nobody can reach."""
        pytest.importorskip("typer")
        config = LLMConfig(framework="openai", model="gpt-4o", api_base="http://127.0.0.1:9/v1", api_key="any")
        file = tmp_path / "demo.jsonl"

        def answers(request, call_next):
            return Response("Tides come twice a day.", usage=Usage(input_tokens=4, output_tokens=6))
            yield

        with LLM(config, [Record(file), answers]) as llm:
            llm.complete("When is the tide?")
        settings_file = tmp_path / "demo.yaml"
        settings_file.write_text(
            "llm: {framework: openai, model: gpt-4o, api_base: 'http://127.0.0.1:9/v1', api_key: any, "
            "middleware: [replay: {file: demo.jsonl}]}"
        )
        for prompt, status, says in (
            ("When is the tide?", 0, "Tides come twice a day."),
            ("And now?", 1, "messages[0]"),
        ):
            done = subprocess.run(
                [
                    sys.executable,
                    "-c",
                    "from fluxibly.cli import main; main()",
                    "chat",
                    "--config",
                    str(settings_file),
                    prompt,
                ],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == status, done.stderr
            assert says in done.stdout + done.stderr
