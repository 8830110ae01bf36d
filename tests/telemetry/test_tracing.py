"""Spans of calls and of their attempts: their attributes, and when they end."""

from __future__ import annotations

import json
import time
from itertools import pairwise

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, Sampler
from opentelemetry.trace import SpanKind, StatusCode
from pytest_genai_semconv import assert_chat_span
from support.tracing_tools import (
    ANSWER,
    REQUEST,
    Recorder,
    Remote,
    cached,
    everything,
    failed,
    fall_back,
    modes,
    remote,
    streams,
)

from fluxibly.errors import Overloaded, ProviderError, RateLimitError, StreamInterrupted, StreamStalled
from fluxibly.middleware import Retry
from fluxibly.pipeline import Pipeline
from fluxibly.testing import Delay, ScriptedProvider, VirtualClock
from fluxibly.testing.modes import run
from fluxibly.types import Chunk, Request, Response, Restart, Usage

pytestmark = pytest.mark.usefixtures("no_complaints")


# Attributes


@modes
def test_a_call_is_one_client_span(mode, recorder):
    """A plain call has one span, with the right name, kind and attributes. Its status stays unset."""
    ran = run(mode, remote(mode, ANSWER), [recorder.tracing()], REQUEST)
    assert ran.text == "forty two" if mode.streaming else ran.response.text == "forty two"
    (span,) = recorder.spans
    assert (span.name, span.kind, span.status.status_code, span.parent) == (
        "chat m-1",
        SpanKind.CLIENT,
        StatusCode.UNSET,
        None,
    )
    given = dict(span.attributes)
    for name in ("chunks", "characters", "arrivals"):
        assert (given.pop(f"fluxibly.stream.{name}", None) is not None) == mode.streaming
    assert (given.pop("gen_ai.response.time_to_first_chunk", None) is not None) == mode.streaming
    assert given.pop("gen_ai.request.stream", False) == mode.streaming
    assert given == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "m-1",
        "server.address": "api.test",
        "server.port": 443,
        "gen_ai.response.id": "r-1",
        "gen_ai.response.model": "m-1-2026",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 2,
        "fluxibly.attempts": 1,
        "fluxibly.outcome": "completed",
    }
    assert not span.events
    assert_chat_span(span, request_model="m-1")
    assert ran.leaks == []


def test_a_model_in_process_has_an_internal_span(recorder):
    """The span of a provider in the same process has the kind INTERNAL."""
    Pipeline(ScriptedProvider(ANSWER), [recorder.tracing()]).complete(REQUEST)
    assert recorder.call.kind is SpanKind.INTERNAL
    assert "server.address" not in recorder.call.attributes


def test_parameters_are_there_when_they_are_given(recorder):
    """Each parameter and each kind of token has its attribute."""
    request = Request(
        model="m-1",
        messages="Hi",
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        max_tokens=100,
        frequency_penalty=0.1,
        presence_penalty=-0.1,
        stop=("END",),
        seed=3,
        n=2,
        reasoning_effort="low",
        response_format={"type": "object"},
        metadata={"conversation_id": "c-9"},
    )
    usage = Usage(input_tokens=9, output_tokens=8, cached_tokens=4, cache_write_tokens=2, reasoning_tokens=5)
    other = Response("b", finish_reason="length")
    answer = Response("a", finish_reason="stop", usage=usage, alternatives=(other,))
    Pipeline(Remote(answer), [recorder.tracing()]).complete(request)
    given = recorder.call.attributes
    assert {key: given[key] for key in given if key.startswith(("gen_ai.request.", "gen_ai.usage", "gen_ai.conv"))} == {
        "gen_ai.request.model": "m-1",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 40,
        "gen_ai.request.max_tokens": 100,
        "gen_ai.request.frequency_penalty": 0.1,
        "gen_ai.request.presence_penalty": -0.1,
        "gen_ai.request.stop_sequences": ("END",),
        "gen_ai.request.seed": 3,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.reasoning.level": "low",
        "gen_ai.usage.input_tokens": 9,
        "gen_ai.usage.output_tokens": 8,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.cache_write.input_tokens": 2,
        "gen_ai.usage.reasoning.output_tokens": 5,
        "gen_ai.conversation.id": "c-9",
    }
    assert given["gen_ai.output.type"] == "json"
    assert given["gen_ai.response.finish_reasons"] == ("stop", "length")
    assert_chat_span(recorder.call)


def test_samplers_see_what_is_known_at_the_start():
    """The span starts with the attributes that samplers need for their decision."""
    seen = []

    class Curious(Sampler):
        def should_sample(  # noqa: PLR0917  # the SDK's signature
            self, parent_context, trace_id, name, kind=None, attributes=None, links=None, **_
        ):
            seen.append((name, dict(attributes)))
            return ALWAYS_OFF.should_sample(parent_context, trace_id, name, kind, attributes, links)

        def get_description(self):
            return "curious"

    recorder = Recorder(sampler=Curious())
    Pipeline(Remote(ANSWER), [recorder.tracing()]).complete(REQUEST)
    ((name, attributes),) = seen
    assert name == "chat m-1"
    assert attributes.keys() >= {
        "gen_ai.operation.name",
        "gen_ai.provider.name",
        "gen_ai.request.model",
        "server.address",
        "server.port",
    }


# Attempts


@modes
def test_each_attempt_has_a_span_and_usage_is_recorded_once(mode, recorder):
    """Two retries make three attempts, of which two failed, under one completed span."""
    provider = remote(mode, RateLimitError("slow", code="rate_limit"), Overloaded("full"), ANSWER)
    run(mode, provider, [recorder.tracing(), Retry(max_retries=2)], REQUEST)
    span, attempts = recorder.call, recorder.attempts
    assert [attempt.attributes.get("error.type") for attempt in attempts] == ["rate_limit", "Overloaded", None]
    assert [attempt.attributes["fluxibly.attempt.index"] for attempt in attempts] == [0, 1, 2]
    assert [failed(attempt) for attempt in attempts] == [True, True, False]
    assert [len(attempt.events) for attempt in attempts] == [1, 1, 0]
    assert {attempt.parent.span_id for attempt in attempts} == {span.context.span_id}
    assert span.attributes["fluxibly.attempts"] == 3
    assert not failed(span)
    for attempt in attempts:
        assert not [key for key in attempt.attributes if key.startswith("gen_ai.")]
        assert span.start_time <= attempt.start_time <= attempt.end_time <= span.end_time
    assert everything(recorder.spans).count("gen_ai.usage.input_tokens") == 1


@modes
def test_after_a_fallback_the_span_names_the_model_that_answered(mode, recorder):
    """The span is renamed, and records the requested model."""
    run(mode, remote(mode, Overloaded("full"), "hello"), [recorder.tracing(), fall_back], REQUEST)
    span = recorder.call
    assert span.name == "chat m-2"
    assert span.attributes["gen_ai.request.model"] == "m-2"
    assert span.attributes["fluxibly.requested_model"] == "m-1"
    assert [attempt.attributes["fluxibly.attempt.model"] for attempt in recorder.attempts] == ["m-1", "m-2"]


def test_a_failed_fallback_keeps_the_requested_model(recorder):
    """If no model answered, the span keeps its name."""
    with pytest.raises(Overloaded):
        Pipeline(Remote(Overloaded("a"), Overloaded("b")), [recorder.tracing(), fall_back]).complete(REQUEST)
    assert recorder.call.name == "chat m-1"
    assert "fluxibly.requested_model" not in recorder.call.attributes


@modes
def test_a_cache_hit_has_neither_attempts_nor_usage(mode, recorder):
    """The span is marked as a cache hit, and counts no tokens."""
    run(mode, remote(mode), [recorder.tracing(), cached], REQUEST)
    assert recorder.attempts == []
    assert recorder.call.attributes["fluxibly.cache.hit"] is True
    assert not [key for key in recorder.call.attributes if "usage" in key]
    assert recorder.call.attributes["fluxibly.attempts"] == 0


def test_a_restarted_answer_is_recorded_from_its_restart(recorder):
    """After a Restart, the content, characters and arrivals are those of the second answer."""
    provider = Remote(["wrong ", Overloaded("full")], ["right"])
    stack = [recorder.tracing(capture="span"), Retry(max_retries=1, base_delay=0, on_interrupt="restart")]
    with Pipeline(provider, stack).stream(REQUEST, restarts=True) as stream:
        events = list(stream)
    assert any(isinstance(event, Restart) for event in events)
    given = recorder.call.attributes
    assert given["fluxibly.stream.characters"] == 5
    assert "wrong" not in given["gen_ai.output.messages"]
    assert len(json.loads(given["fluxibly.stream.arrivals"])) == 1


def test_a_refused_restart_voids_nothing(recorder):
    """The consumer keeps what it has received, so the span keeps it too."""
    provider = Remote(["kept ", Overloaded("full")], ["right"])
    stack = [recorder.tracing(capture="span"), Retry(max_retries=1, base_delay=0, on_interrupt="restart")]
    with pytest.raises(StreamInterrupted), Pipeline(provider, stack).stream(REQUEST) as stream:
        list(stream)
    given = recorder.call.attributes
    assert given["fluxibly.stream.characters"] == 5
    assert "kept " in given["gen_ai.output.messages"]
    assert len(json.loads(given["fluxibly.stream.arrivals"])) == 1


# Errors


@modes
def test_a_layer_that_makes_no_flow_ends_the_span_too(mode, recorder):
    """The error is raised when the flow is created, before there is a flow to run."""
    ran = run(mode, remote(mode, ANSWER), [recorder.tracing(), lambda request, call_next: None], REQUEST)
    assert isinstance(ran.error, TypeError)
    assert recorder.call.attributes["error.type"] == "TypeError"
    assert trace.get_current_span() is trace.INVALID_SPAN


@modes
def test_a_failed_call_says_why_without_quoting_the_prompt(mode, recorder):
    """The span has the error's type, a masked message and an event, but neither a stack trace nor the prompt."""
    error = ProviderError("refused: 'What is the meaning of life?'", code="policy")
    error.__cause__ = ValueError("What is the meaning of life?")
    ran = run(mode, remote(mode, error), [recorder.tracing()], REQUEST)
    assert ran.error is error
    for span in recorder.spans:
        assert failed(span)
        assert span.attributes["error.type"] == "policy"
        assert span.attributes["fluxibly.outcome"] == "failed"
        assert span.status.description == "refused: '[…]'"
        (event,) = span.events
        assert event.name == "exception"
        assert dict(event.attributes) == {
            "exception.type": "ProviderError",
            "exception.message": "refused: '[…]'",
        }
    assert "meaning" not in everything(recorder.spans)


def test_a_code_that_is_not_an_identifier_is_not_an_error_type(recorder):
    """Only a short identifier can be `error.type`, which must have a low cardinality."""
    error = ProviderError("no", code="Your request abc123 was refused")
    with pytest.raises(ProviderError):
        Pipeline(Remote(error), [recorder.tracing()]).complete(REQUEST)
    assert recorder.call.attributes["error.type"] == "ProviderError"


@pytest.mark.parametrize(("length", "kept"), [(64, True), (65, False)])
def test_a_code_may_have_64_characters(length, kept, recorder):
    """A longer code may be a part of a text, or a key."""
    with pytest.raises(ProviderError):
        Pipeline(Remote(ProviderError("no", code="x" * length)), [recorder.tracing()]).complete(REQUEST)
    assert recorder.call.attributes["error.type"] == ("x" * length if kept else "ProviderError")


@streams
def test_an_interrupted_stream_names_the_cause(mode, recorder):
    """`error.type` is that of the cause. The span has the partial answer and its usage."""
    script = [Chunk("forty ", usage=Usage(input_tokens=7)), "two", Overloaded("full")]
    ran = run(mode, remote(mode, script), [recorder.tracing(capture="span")], REQUEST)
    assert isinstance(ran.error, StreamInterrupted)
    given = recorder.call.attributes
    assert given["error.type"] == "Overloaded"
    assert given["gen_ai.usage.input_tokens"] == 7
    assert given["fluxibly.stream.characters"] == 9
    (message,) = json.loads(given["gen_ai.output.messages"])
    assert message == {
        "role": "assistant",
        "parts": [{"type": "text", "content": "forty two"}],
        "finish_reason": "error",
    }


@streams
def test_a_stall_is_an_outcome_of_its_own(mode, recorder):
    """An idle timeout has the outcome `stalled`, and is an error."""
    run(mode, remote(mode, ["a", StreamStalled("nothing came")]), [recorder.tracing()], REQUEST)
    assert recorder.call.attributes["fluxibly.outcome"] == "stalled"
    assert recorder.call.attributes["error.type"] == "StreamStalled"
    assert failed(recorder.call)


# Arrivals


def test_arrivals_are_kept_in_constant_memory(recorder):
    """The arrivals of a long stream are thinned evenly. The kept times, waits and characters are exact."""
    clock = VirtualClock()
    script = [step for _ in range(1000) for step in (Delay(0.5), "ab")]
    pipeline = Pipeline(Remote(script, clock=clock), [recorder.tracing()], clock=clock)
    with pipeline.stream(REQUEST) as stream:
        for _ in stream:
            clock.advance(0.25)
    points = json.loads(recorder.call.attributes["fluxibly.stream.arrivals"])
    assert 100 <= len(points) < 200
    assert points[0] == [500_000, 500_000, 2]
    gaps = {b[0] - a[0] for a, b in pairwise(points)}
    assert gaps == {8 * 750_000}
    assert {wait for _, wait, _ in points} == {500_000}
    assert all(at == 500_000 + 750_000 * (characters // 2 - 1) for at, _, characters in points)


def test_span_times_agree_with_the_call(recorder):
    """A span is as long as its call."""
    start = time.time_ns()
    response = Pipeline(Remote(ANSWER), [recorder.tracing()]).complete(REQUEST)
    end = time.time_ns()
    span = recorder.call
    assert start <= span.start_time <= span.end_time <= end
    assert (span.end_time - span.start_time) / 1e9 <= response.elapsed + 0.001
