"""The attempts of a call: which of them have a span, when, and where their tokens are."""

from __future__ import annotations

import json
from contextvars import copy_context

import pytest
from opentelemetry import trace
from opentelemetry.trace import SpanKind, StatusCode
from support.powers import stopping_at, tools
from support.tracing_tools import ANSWER, REQUEST, TOOL, Remote, failed, modes, remote, streams

from fluxibly import LLM, Pipeline, Target, sleep
from fluxibly.errors import BadRequest, ConfigError, Overloaded, ResponseInvalid, StreamInterrupted
from fluxibly.flow import ask, emit
from fluxibly.middleware import Fallback, Retry, Tracing, Validation
from fluxibly.testing import Delay, VirtualClock
from fluxibly.testing.modes import run
from fluxibly.types import Chunk, ProviderInfo, Response, ToolCallDelta, Usage, replaced

pytestmark = pytest.mark.usefixtures("no_complaints")

ELSEWHERE = ProviderInfo(telemetry_name="anthropic", server_address="other.test", server_port=8443)
LITTLE, MUCH = Usage(input_tokens=3, output_tokens=1), Usage(input_tokens=20, output_tokens=10)


def elsewhere(mode, *answers):
    """Return a target at another provider, whose model is `m-2`."""
    provider = remote(mode, *answers)
    provider.info = ELSEWHERE
    return Target(provider, model="m-2")


def usage_of(span):
    """Return the tokens on a span, by the last part of their names."""
    return {
        key.removeprefix("gen_ai.").removeprefix("fluxibly."): value
        for key, value in span.attributes.items()
        if "token" in key or "total" in key
    }


def outcomes(spans):
    return [span.attributes["fluxibly.outcome"] for span in spans]


# Which attempts have a span


@modes
def test_the_only_attempt_has_no_span(mode, recorder):
    """Its error is on the span of the call alone."""
    ran = run(mode, remote(mode, BadRequest("no", code="bad")), [recorder.tracing(), Retry()], REQUEST)
    assert isinstance(ran.error, BadRequest)
    (span,) = recorder.spans
    assert (span.name, span.attributes["fluxibly.attempts"], span.attributes["error.type"]) == ("chat m-1", 1, "bad")
    assert len(span.events) == 1
    assert ran.leaks == []


class Working(Remote):
    """A provider that makes a span of its own, as an instrumented HTTP client does, and takes a moment."""

    def complete(self, request):
        with self.tracer.start_as_current_span("POST"):
            return super().complete(request)

    def stream(self, request):
        with self.tracer.start_as_current_span("POST"):
            pass
        yield from super().stream(request)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_the_first_attempt_gets_its_span_afterwards(streaming, recorder):
    """The span has the times of the attempt. Spans of the provider stay below the span of the call."""
    provider = Working(Overloaded("full"), ANSWER)
    provider.tracer = recorder.tracer_provider.get_tracer("http")
    pipeline = Pipeline(provider, [recorder.tracing(), Retry(max_retries=1, base_delay=0)])
    if streaming:
        list(pipeline.stream(REQUEST))
    else:
        pipeline.complete(REQUEST)
    first, second = recorder.attempts
    posts = [span for span in recorder.spans if span.name == "POST"]
    assert [post.parent.span_id for post in posts] == [recorder.call.context.span_id, second.context.span_id]
    assert recorder.call.start_time <= first.start_time <= posts[0].start_time
    assert first.end_time <= second.start_time <= second.end_time <= recorder.call.end_time
    (event,) = first.events
    assert event.timestamp == first.end_time
    assert (first.status.status_code, first.status.description) == (StatusCode.ERROR, "full")
    assert first.kind is second.kind is SpanKind.INTERNAL


@modes
def test_every_attempt_has_a_span_if_the_user_wants_it(mode, recorder):
    """The only attempt is live then: its request carries the `traceparent` of its own span."""
    provider = remote(mode, ANSWER)
    ran = run(mode, provider, [recorder.tracing(attempts="always")], REQUEST)
    (attempt,) = recorder.attempts
    assert dict(attempt.attributes) == {
        "fluxibly.attempt.index": 0,
        "fluxibly.attempt.provider": "openai",
        "fluxibly.attempt.model": "m-1",
        "fluxibly.attempt.response_model": "m-1-2026",
        "fluxibly.outcome": "completed",
    }
    assert f"{attempt.context.span_id:016x}" in provider.requests[0].headers["traceparent"]
    assert ran.leaks == []


def test_other_words_for_the_attempts_are_refused(tmp_path):
    """The parameter can be set in YAML, and the error names the valid words."""
    with pytest.raises(ValueError, match=r"auto.*always"):
        Tracing(attempts="never")
    path = tmp_path / "llm.yaml"
    text = "llm:\n  framework: echo\n  model: m\n  middleware:\n    - tracing: {attempts: %s}\n"
    path.write_text(text % "always")
    with LLM.from_yaml(str(path)) as llm:
        assert llm.pipeline.middleware[0].attempts == "always"
    path.write_text(text % "never")
    with pytest.raises(ConfigError, match=r"auto.*always"):
        LLM.from_yaml(str(path))


@streams
@pytest.mark.parametrize("attempts", ["auto", "always"])
def test_a_stream_that_was_left_unread_has_no_attempt(mode, attempts, recorder):
    """Nothing was sent. A span that was live for it is never exported."""
    provider = remote(mode, ["a"])
    run(mode, provider, [recorder.tracing(attempts=attempts)], REQUEST, stop_after=0)
    assert provider.requests == []
    (span,) = recorder.spans
    assert (span.attributes["fluxibly.attempts"], span.attributes["fluxibly.outcome"]) == (0, "abandoned")
    assert recorder.counting.open == (["fluxibly.attempt"] if attempts == "always" else [])


@streams
def test_an_attempt_that_was_refused_is_not_recorded(mode, recorder):
    """A middleware asks again after output, which is refused, so there was one attempt."""

    def again(request, call_next):
        yield from call_next(request)
        return (yield from call_next(request))

    ran = run(mode, remote(mode, ["a"], ["b"]), [recorder.tracing(), again], REQUEST)
    assert isinstance(ran.error, StreamInterrupted)
    (span,) = recorder.spans
    assert (span.attributes["fluxibly.attempts"], span.attributes["fluxibly.outcome"]) == (1, "failed")
    assert recorder.counting.open == ["fluxibly.attempt"]
    assert ran.leaks == []


# How attempts end


@streams
def test_a_stream_that_is_given_up_during_a_later_attempt(mode, recorder):
    """The later attempt is abandoned, which is no error."""
    provider = remote(mode, Overloaded("full"), ["a", "b"])
    ran = run(mode, provider, [recorder.tracing(), Retry(max_retries=1, base_delay=0)], REQUEST, stop_after=1)
    assert outcomes([*recorder.attempts, recorder.call]) == ["failed", "abandoned", "abandoned"]
    assert [failed(attempt) for attempt in recorder.attempts] == [True, False]
    assert recorder.attempts[1].events == ()
    assert ran.leaks == []


@modes
def test_an_attempt_that_a_middleware_stops_is_abandoned(mode, recorder):
    """The call is completed, with the part that the middleware took. A whole answer came whole."""
    ran = run(mode, remote(mode, ["a", "b", "c"]), [recorder.tracing(attempts="always"), stopping_at("b")], REQUEST)
    assert ran.response.text == "a"
    assert outcomes([*recorder.attempts, recorder.call]) == [
        "abandoned" if mode.streaming else "completed",
        "completed",
    ]
    assert ran.leaks == []


@modes
def test_an_attempt_that_a_layer_breaks_off_without_a_word(mode, recorder):
    """A layer that closes the inner flow and asks again has abandoned the first attempt."""

    def impatient(request, call_next):
        flow = call_next(request)
        yield next(flow)
        flow.close()
        return (yield from call_next(request.evolve(model="m-2")))

    ran = run(mode, remote(mode, ["a"], ["b"]), [recorder.tracing(), impatient], REQUEST)
    assert ran.response.text == "b"
    assert [attempt.attributes["fluxibly.attempt.model"] for attempt in recorder.attempts] == ["m-1", "m-2"]
    assert outcomes([*recorder.attempts, recorder.call]) == ["abandoned", "completed", "completed"]
    assert ran.leaks == []


# Who was asked, and the tokens


@modes
def test_two_attempts_at_two_targets(mode, recorder):
    """The call is named after the target that answered, and has its tokens. The other tokens are on the attempt."""
    interrupted = [Chunk(usage=LITTLE), Overloaded("full")] if mode.streaming else Overloaded("full")
    target = elsewhere(mode, Response("hello", usage=MUCH, model="m-2-2026"))
    run(mode, remote(mode, interrupted), [recorder.tracing(), Fallback(to=[target])], REQUEST)
    span, (first, second) = recorder.call, recorder.attempts
    assert span.name == "chat m-2"
    given = span.attributes
    assert (given["gen_ai.provider.name"], given["server.address"]) == ("anthropic", "other.test")
    assert (given["gen_ai.request.model"], given["gen_ai.response.model"]) == ("m-2", "m-2-2026")
    assert given["fluxibly.requested_model"] == "m-1"
    who = [
        (each.attributes["fluxibly.attempt.provider"], each.attributes["fluxibly.attempt.model"])
        for each in (first, second)
    ]
    assert who == [("openai", "m-1"), ("anthropic", "m-2")]
    assert outcomes([first, second, span]) == ["failed", "completed", "completed"]
    own = {"usage.input_tokens": 20, "usage.output_tokens": 10}
    if mode.streaming:
        assert usage_of(first) == {"attempt.input_tokens": 3, "attempt.output_tokens": 1}
        assert usage_of(span) == {**own, "usage.total_input": 23, "usage.total_output": 11}
    else:
        assert usage_of(first) == {}
        assert usage_of(span) == own
    assert usage_of(second) == {}


@modes
def test_if_no_target_answers_the_call_keeps_the_names_that_were_asked_for(mode, recorder):
    """Each attempt names the provider that it asked."""
    target = elsewhere(mode, Overloaded("also full"))
    run(mode, remote(mode, Overloaded("full")), [recorder.tracing(), Fallback(to=[target])], REQUEST)
    span = recorder.call
    assert (span.name, span.attributes["gen_ai.provider.name"], span.attributes["server.address"]) == (
        "chat m-1",
        "openai",
        "api.test",
    )
    assert "fluxibly.requested_model" not in span.attributes
    assert span.status.description == "also full"
    assert [each.attributes["fluxibly.attempt.provider"] for each in recorder.attempts] == ["openai", "anthropic"]


@modes
def test_a_request_for_a_target_from_the_start(mode, recorder):
    """The only attempt asks the target, whose names the call has."""
    target = elsewhere(mode, ANSWER, ANSWER)

    def turn(request, call_next):
        return (yield from call_next(request.evolve(target=target)))

    run(mode, remote(mode), [turn, recorder.tracing()], REQUEST)
    (span,) = recorder.spans
    assert (span.name, span.attributes["gen_ai.provider.name"], span.attributes["server.port"]) == (
        "chat m-2",
        "anthropic",
        8443,
    )
    assert usage_of(span) == {"usage.input_tokens": 7, "usage.output_tokens": 2}


@modes
def test_the_tokens_of_rejected_answers_are_on_the_calls_span(mode, recorder):
    """They were billed under the model that the span names, whether a good answer follows or an error."""
    check = Validation(check=lambda response: None if response.text == "good" else "say good", hold=True)
    for last, expected in (
        (Response("good", usage=MUCH), {"usage.input_tokens": 26, "usage.output_tokens": 12}),
        (BadRequest("too long"), {"usage.input_tokens": 6, "usage.output_tokens": 2}),
    ):
        recorder.exporter.clear()
        bad = Response("bad", usage=LITTLE)
        run(mode, remote(mode, bad, bad, last), [recorder.tracing(), check], REQUEST)
        assert usage_of(recorder.call) == expected
        assert [usage_of(attempt) for attempt in recorder.attempts] == [{}, {}, {}]


@modes
def test_the_sum_of_all_tokens_is_that_of_one_span(mode, recorder):
    """A layer further out that asks again begins another span, which does not count the tokens of the first again."""
    check = Validation(check=lambda response: None if response.text == "good" else "say good", hold=True)

    def ask_before(request, call_next):
        yield from ask(request)
        return (yield from call_next(request))

    answers = [Response(text, usage=LITTLE) for text in ("fine", "bad", "fine", "good")]
    run(mode, remote(mode, *answers), [check, recorder.tracing(), ask_before], REQUEST)
    own = {"usage.input_tokens": 3, "usage.output_tokens": 1}
    total = {"usage.total_input": 6, "usage.total_output": 2}
    assert [usage_of(span) for span in recorder.calls] == [{**own, **total}] * 2
    assert [span.attributes["fluxibly.attempts"] for span in recorder.calls] == [1, 1]


@modes
def test_a_rejected_answer_of_a_model_that_another_replaces(mode, recorder):
    """The tokens of each model are apart, and the call says their sum."""
    weak = Validation(check=lambda response: "better" if response.text == "weak" else None, max_retries=0, hold=True)

    def fall_back(request, call_next):
        try:
            return (yield from call_next(request))
        except ResponseInvalid:
            return (yield from call_next(request.evolve(model="m-2")))

    answers = [Response("weak", usage=LITTLE), Response("strong", usage=MUCH)]
    run(mode, remote(mode, *answers), [recorder.tracing(), fall_back, weak], REQUEST)
    assert recorder.call.name == "chat m-2"
    assert usage_of(recorder.call) == {
        "usage.input_tokens": 20,
        "usage.output_tokens": 10,
        "usage.total_input": 23,
        "usage.total_output": 11,
    }
    assert [usage_of(attempt) for attempt in recorder.attempts] == [
        {"attempt.input_tokens": 3, "attempt.output_tokens": 1},
        {},
    ]


@pytest.mark.parametrize("attempts", ["auto", "always"])
def test_a_provider_that_turns_to_others_by_itself(attempts, recorder):
    """Each attempt names the service that it ended at, and the call the service that answered."""

    class Turning(Remote):
        def complete(self, request):
            if len(self.requests) == 0:
                request.call.provider, request.call.sent_model = ELSEWHERE, "m-2"
            else:
                request.call.provider, request.call.sent_model = self.info, "m-1"
            return super().complete(request)

    check = Validation(check=lambda response: None if response.text == "good" else "say good")
    provider = Turning(Response("bad", usage=LITTLE), Response("good", usage=MUCH))
    Pipeline(provider, [recorder.tracing(attempts=attempts), check]).complete(REQUEST)
    assert [each.attributes["fluxibly.attempt.provider"] for each in recorder.attempts] == ["anthropic", "openai"]
    assert [each.attributes["fluxibly.attempt.model"] for each in recorder.attempts] == ["m-2", "m-1"]
    assert (recorder.call.name, recorder.call.attributes["gen_ai.provider.name"]) == ("chat m-1", "openai")
    assert usage_of(recorder.attempts[0]) == {"attempt.input_tokens": 3, "attempt.output_tokens": 1}
    assert usage_of(recorder.call)["usage.input_tokens"] == 20


@modes
def test_turns_are_attempts(mode, recorder):
    """A call with a tool's turn has two attempts and the tokens of both. Its content is that of the last turn."""
    clock = VirtualClock()
    delta = ToolCallDelta(index=0, id="c1", name="look", arguments='{"word": "life"}')
    first = [Delay(1), "let me ", Chunk("look", tool_calls=(delta,), usage=LITTLE, finish_reason="tool_call")]
    second = [Delay(1), "forty ", Chunk("two", usage=MUCH, finish_reason="stop")]
    stack = [recorder.tracing(capture="span"), tools({"look": lambda word: f"{word}!"})]
    request = REQUEST.evolve(tools=[TOOL])
    ran = run(mode, remote(mode, first, second, clock=clock), stack, request, clock=clock)
    assert ran.response.text == "forty two"
    given = recorder.call.attributes
    assert outcomes([*recorder.attempts, recorder.call]) == ["completed"] * 3
    assert usage_of(recorder.call) == {"usage.input_tokens": 23, "usage.output_tokens": 11}
    roles = [message["role"] for message in json.loads(given["gen_ai.input.messages"])]
    assert roles == ["user", "assistant", "tool"]
    (answer,) = json.loads(given["gen_ai.output.messages"])
    assert [part["content"] for part in answer["parts"]] == ["forty two"]
    if mode.streaming:
        assert given["fluxibly.stream.characters"] == 20
        arrivals = json.loads(given["fluxibly.stream.arrivals"])
        assert [characters for _, _, characters in arrivals] == [7, 11, 11, 17, 20]


@modes
def test_a_layer_that_changes_the_answer_after_a_turn_is_noticed(mode, recorder):
    """The text is compared with that of the last message. In a whole call nothing was delivered that it contradicts."""
    delta = ToolCallDelta(index=0, id="c1", name="look", arguments="{}")
    first = [Chunk("let me", tool_calls=(delta,), finish_reason="tool_call")]

    def lie(request, call_next):
        response = yield from call_next(request)
        return response.evolve(text="let metwo")

    stack = [recorder.tracing(), lie, tools({"look": lambda: "!"})]
    run(mode, remote(mode, first, ["two"]), stack, REQUEST)
    assert recorder.call.attributes["fluxibly.outcome"] == ("failed" if mode.streaming else "completed")


@streams
def test_a_chunk_that_a_middleware_lets_out_before_anything_was_sent(mode, recorder):
    """The time until the first chunk is that of the service's, so it is unknown."""
    clock = VirtualClock()

    def preface(request, call_next):
        yield from emit(Chunk(id="early"))
        yield from sleep(1)
        return (yield from call_next(request))

    run(mode, remote(mode, ["a"], clock=clock), [recorder.tracing(), preface], REQUEST, clock=clock)
    assert recorder.call.attributes["fluxibly.outcome"] == "completed"
    assert "gen_ai.response.time_to_first_chunk" not in recorder.call.attributes


# Branches of a race


def branch_of(request):
    """Return the request of a branch, with a record of its own."""
    call = request.call.fork()
    call.nested, call.apart = False, True
    return replaced(request, {"call": call})


@pytest.mark.parametrize("branches", [1, 2])
def test_each_branch_of_a_race_has_a_span_of_its_own(branches, recorder):
    """It is live, also if it is the only one. It is current in the context of its branch alone."""
    current = []

    def racing(request, call_next):
        contexts = [copy_context() for _ in range(branches)]
        flows = [call_next(branch_of(request)) for _ in range(branches)]
        sends = [context.run(next, flow) for context, flow in zip(contexts, flows, strict=True)]
        current.extend(context.run(trace.get_current_span) for context in contexts)
        assert trace.get_current_span().name == "chat m-1"
        answers = []
        for send in sends:
            answers.append((yield send))  # noqa: PERF401  # a comprehension cannot yield
        with pytest.raises(StopIteration) as stopped:
            contexts[-1].run(flows[-1].send, answers[-1])
        for context, flow in zip(contexts[:-1], flows, strict=False):
            context.run(flow.close)
        return stopped.value.value

    provider = Remote(*[Response("a", usage=LITTLE)] * branches)
    ran = Pipeline(provider, [recorder.tracing(), racing]).complete(REQUEST)
    assert ran.text == "a"
    assert outcomes(recorder.attempts) == [*["abandoned"] * (branches - 1), "completed"]
    numbers = [span.attributes["fluxibly.attempt.index"] for span in recorder.attempts]
    assert numbers == list(range(branches))
    sent = [request.headers["traceparent"].split("-")[2] for request in provider.requests]
    expected = [f"{span.context.span_id:016x}" for span in recorder.attempts]
    assert sent == expected
    assert [f"{span.get_span_context().span_id:016x}" for span in current] == expected
    assert {span.parent.span_id for span in recorder.attempts} == {recorder.call.context.span_id}
    assert trace.get_current_span() is trace.INVALID_SPAN
