"""The spans of what goes on at once: each branch of a race, and each question, has its own."""

from __future__ import annotations

import pytest
from opentelemetry import trace
from opentelemetry.trace import StatusCode
from support.powers import hedge
from support.tracing_tools import ANSWER, REQUEST, AsyncRemote, Remote, modes

from fluxibly.errors import Overloaded
from fluxibly.flow import ask, gather, perform, race
from fluxibly.middleware import Logging, Metrics, Retry
from fluxibly.testing import Delay, VirtualClock
from fluxibly.testing.modes import run
from fluxibly.types import Chunk, Usage

pytestmark = pytest.mark.usefixtures("no_complaints")
SLOW = [Delay(9), Chunk("slow", usage=Usage(input_tokens=1, output_tokens=1))]
FAST = [Delay(1), Chunk("fast", usage=Usage(input_tokens=5, output_tokens=2), model="m-2-2026"), Delay(1), " one"]


class Instrumented:
    """A provider that makes a span of its own for each request, as an instrumented HTTP client does."""

    def _next_steps(self, request):
        with self.tracer.start_as_current_span(f"POST {request.model}"):
            return super()._next_steps(request)


class Sync(Instrumented, Remote):
    pass


class Async(Instrumented, AsyncRemote):
    pass


class Call:
    """A traced call in virtual time."""

    def __init__(self, mode, recorder, stack, *answers, **options):
        self.clock = VirtualClock()
        self.provider = (Async if mode.backend else Sync)(*answers, clock=self.clock)
        self.provider.tracer = recorder.tracer_provider.get_tracer("http")
        self.ran = run(mode, self.provider, [recorder.tracing(), *stack], REQUEST, clock=self.clock, **options)
        assert self.ran.leaks == []
        assert trace.get_current_span() is trace.INVALID_SPAN
        assert sorted(recorder.counting.started) == sorted(recorder.counting.ended)


def to_m2(request, call_next):
    return (yield from race(call_next, [request, request.evolve(model="m-2")], delay=2))


def parents(provider):
    """Return the span ids of the `traceparent`s that were sent, by model."""
    return {request.model: int(request.headers["traceparent"].split("-")[2], 16) for request in provider.requests}


@modes
def test_each_branch_has_its_span(mode, recorder):
    """The loser is abandoned, which is no error. Each request carries its own span, and the call names the winner."""
    call = Call(mode, recorder, [to_m2], SLOW, FAST)
    assert call.ran.response.text == "fast one"
    loser, winner = recorder.attempts
    assert [span.attributes["fluxibly.outcome"] for span in (loser, winner)] == ["abandoned", "completed"]
    assert loser.status.status_code is StatusCode.UNSET
    assert not loser.events
    assert [span.attributes["fluxibly.attempt.model"] for span in (loser, winner)] == ["m-1", "m-2"]
    assert parents(call.provider) == {"m-1": loser.context.span_id, "m-2": winner.context.span_id}
    span = recorder.call
    assert span.name == "chat m-2"
    assert span.attributes["fluxibly.attempts"] == 2
    assert span.attributes["fluxibly.requested_model"] == "m-1"
    assert span.attributes["gen_ai.usage.input_tokens"] == 5
    assert span.attributes["gen_ai.response.model"] == "m-2-2026"


@modes
def test_spans_of_the_provider_are_below_their_own_branch(mode, recorder):
    """What an instrumented client records during an attempt is a child of that attempt."""
    Call(mode, recorder, [to_m2], SLOW, FAST)
    loser, winner = recorder.attempts
    by_name = {span.name: span for span in recorder.spans}
    assert by_name["POST m-1"].parent.span_id == loser.context.span_id
    assert by_name["POST m-2"].parent.span_id == winner.context.span_id


@modes
def test_the_only_branch_that_was_sent(mode, recorder):
    """A branch has a span even if no other was sent: it had to be live, because another might have followed."""
    call = Call(mode, recorder, [to_m2], ANSWER)
    (span,) = recorder.attempts
    assert parents(call.provider) == {"m-1": span.context.span_id}
    assert recorder.call.attributes["fluxibly.attempts"] == 1
    assert "fluxibly.requested_model" not in recorder.call.attributes


@modes
def test_retries_within_branches(mode, recorder):
    """Each attempt of each branch has its span."""
    stack = [hedge(2), Retry(max_retries=1, base_delay=4, uniform=max)]
    Call(mode, recorder, stack, Overloaded("full"), [Delay(1), Overloaded("full")], ANSWER, ANSWER)
    outcomes = [span.attributes["fluxibly.outcome"] for span in recorder.attempts]
    assert outcomes[:2] == ["failed", "failed"]
    assert outcomes.count("completed") == 1
    assert recorder.call.attributes["fluxibly.attempts"] == len(outcomes)


@modes
def test_all_fail(mode, recorder):
    """The call has the error of the first branch."""
    first = Overloaded("first", code="one")
    call = Call(mode, recorder, [to_m2], [Delay(3), first], [Delay(3), Overloaded("second", code="two")])
    assert call.ran.error is first
    assert [span.attributes["error.type"] for span in recorder.attempts] == ["one", "two"]
    assert recorder.call.attributes["error.type"] == "one"
    assert recorder.call.name == "chat m-1"


@modes
def test_a_race_in_a_race(mode, recorder):
    """All attempts are children of the call."""
    Call(mode, recorder, [hedge(4), hedge(1)], SLOW, SLOW, SLOW, FAST)
    assert [span.attributes["fluxibly.outcome"] for span in recorder.attempts] == [*["abandoned"] * 3, "completed"]


@modes
def test_questions_at_once(mode, recorder):
    """Each question is a `chat` span of its own below the call, and only attempts of the call count there."""

    def informed(request, call_next):
        one, two, _ = yield from gather(
            request,
            ask(request.evolve(messages="one?", model="q-1")),
            ask(request.evolve(messages="two?", model="q-2")),
            perform(lambda: None),
        )
        assert {one.text, two.text} == {"fast one", "forty two"}
        return (yield from call_next(request))

    Call(mode, recorder, [informed], FAST, ANSWER, ANSWER)
    assert sorted(span.name for span in recorder.asks) == ["chat q-1", "chat q-2"]
    assert {span.parent.span_id for span in recorder.asks} == {recorder.call.context.span_id}
    assert recorder.call.attributes["fluxibly.attempts"] == 1


@modes
def test_a_question_that_is_given_up(mode, recorder):
    """A question that is dropped ends as abandoned when it is dropped, and not at the end of the call."""
    ended = []

    def fails():
        yield from perform(lambda: None)
        raise LookupError

    def informed(request, call_next):
        try:
            yield from gather(request, ask(request.evolve(messages="?", model="q-1")), fails())
        except LookupError:
            ended.extend(span.name for span in recorder.spans)
        return (yield from call_next(request))

    Call(mode, recorder, [informed], SLOW, ANSWER)
    assert "chat q-1" in ended
    assert recorder.asks[0].attributes["fluxibly.outcome"] == "abandoned"


@modes
def test_a_consumer_that_leaves(mode, recorder):
    """The winner's attempt is abandoned with the call."""
    if mode.streaming:
        Call(mode, recorder, [to_m2], SLOW, FAST, stop_after=1)
        assert [span.attributes["fluxibly.outcome"] for span in recorder.attempts] == ["abandoned", "abandoned"]
        assert recorder.call.attributes["fluxibly.outcome"] == "abandoned"


@modes
def test_two_tracings_log_lines_and_metrics(mode, recorder, caplog):
    """Layers around and within a race agree about what happened."""
    caplog.set_level("INFO", logger="fluxibly")
    call = Call(mode, recorder, [Logging(), Metrics(), hedge(2), recorder.tracing(), Logging()], SLOW, FAST)
    assert call.ran.response.text == "fast one"
    ended = [record.getMessage() for record in caplog.records if "completed" in record.getMessage()]
    assert ["4.00s" in line for line in ended] == [False, True]
    assert len([span for span in recorder.spans if span.name == "chat m-1"]) == 3
