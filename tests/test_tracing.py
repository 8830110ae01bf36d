"""Tracing: what a span says, in all modes, whatever happens to the call."""

from __future__ import annotations

import gc
import json
import logging
import subprocess
import sys
import threading
import time
from contextvars import copy_context

import anyio
import pytest
from opentelemetry import context as otel_context, propagate, trace
from opentelemetry.baggage import set_baggage
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, Sampler, SamplingResult
from opentelemetry.trace import SpanKind, StatusCode
from pytest_genai_semconv import assert_chat_span
from tracing_tools import ANSWER, CHAT, REQUEST, TOOL, AsyncRemote, Recorder, Remote, everything, failed, remote

from fluxibly._logs import forget_reports
from fluxibly.errors import Overloaded, ProviderError, RateLimitError, StreamInterrupted, StreamStalled
from fluxibly.middleware import Retry, StreamMeter, Tracing
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.testing import Delay, ScriptedProvider, VirtualClock
from fluxibly.testing.modes import MODES, run
from fluxibly.types import Chunk, Image, Message, Request, Response, Restart, ToolCall, Usage

STREAMS = [mode for mode in MODES if mode.streaming]
modes = pytest.mark.parametrize("mode", MODES, ids=str)
streams = pytest.mark.parametrize("mode", STREAMS, ids=str)


@pytest.fixture
def recorder():
    forget_reports()
    return Recorder()


@pytest.fixture(autouse=True)
def no_complaints(caplog):
    """OpenTelemetry never logs that a context could not be detached."""
    yield
    assert not [record for record in caplog.records if "detach" in record.getMessage()]


def fall_back(request, call_next):
    """A fallback to another model."""
    try:
        return (yield from call_next(request))
    except Overloaded:
        return (yield from call_next(request.evolve(model="m-2")))


def cached(request, call_next):
    """A cache that always hits."""
    request.call.cache_hit = True
    yield from ()
    return ANSWER


# What a span says


@modes
def test_a_call_is_a_client_span_with_one_attempt(mode, recorder):
    """The name, the kind, the attributes and the tree of a plain call; its status stays unset."""
    ran = run(mode, remote(mode, ANSWER), [recorder.tracing()], REQUEST)
    assert ran.text == "forty two" if mode.streaming else ran.response.text == "forty two"
    span, (attempt,) = recorder.call, recorder.attempts
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
    assert (attempt.kind, attempt.parent.span_id) == (SpanKind.INTERNAL, span.context.span_id)
    assert dict(attempt.attributes) == {
        "fluxibly.attempt.index": 0,
        "fluxibly.attempt.provider": "openai",
        "fluxibly.attempt.model": "m-1",
        "fluxibly.attempt.response_model": "m-1-2026",
        "fluxibly.outcome": "completed",
    }
    assert_chat_span(span, request_model="m-1")
    assert ran.leaks == []


def test_a_model_in_process_has_an_internal_span(recorder):
    """In process, the span's kind is INTERNAL."""
    Pipeline(ScriptedProvider(ANSWER), [recorder.tracing()]).complete(REQUEST)
    assert recorder.call.kind is SpanKind.INTERNAL
    assert "server.address" not in recorder.call.attributes


def test_parameters_are_there_when_they_are_given(recorder):
    """Each parameter has its attribute, and each kind of token."""
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
    """The attributes that samplers decide by are there when the span starts."""
    seen = []

    class Curious(Sampler):
        def should_sample(self, parent_context, trace_id, name, kind=None, attributes=None, links=None, **_):
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
def test_each_attempt_has_a_span_and_usage_is_told_once(mode, recorder):
    """Two retries are three attempts, of which two failed, below one span that completed."""
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
    """The span is renamed, and says which model was asked for."""
    run(mode, remote(mode, Overloaded("full"), "hello"), [recorder.tracing(), fall_back], REQUEST)
    span = recorder.call
    assert span.name == "chat m-2"
    assert span.attributes["gen_ai.request.model"] == "m-2"
    assert span.attributes["fluxibly.requested_model"] == "m-1"
    assert [attempt.attributes["fluxibly.attempt.model"] for attempt in recorder.attempts] == ["m-1", "m-2"]


def test_a_fallback_that_fails_leaves_the_model_asked_for(recorder):
    """Where nobody answered, the span keeps its name."""
    with pytest.raises(Overloaded):
        Pipeline(Remote(Overloaded("a"), Overloaded("b")), [recorder.tracing(), fall_back]).complete(REQUEST)
    assert recorder.call.name == "chat m-1"
    assert "fluxibly.requested_model" not in recorder.call.attributes


@modes
def test_a_cache_hit_has_neither_attempts_nor_usage(mode, recorder):
    """A hit says so, and counts no tokens."""
    run(mode, remote(mode), [recorder.tracing(), cached], REQUEST)
    assert recorder.attempts == []
    assert recorder.call.attributes["fluxibly.cache.hit"] is True
    assert not [key for key in recorder.call.attributes if "usage" in key]
    assert recorder.call.attributes["fluxibly.attempts"] == 0


def test_an_answer_that_begins_anew_is_told_from_there(recorder):
    """After a Restart, content, characters and arrivals are those of the second answer."""
    provider = Remote(["wrong ", Overloaded("full")], ["right"])
    stack = [recorder.tracing(capture="span"), Retry(max_retries=1, base_delay=0, on_interrupt="restart")]
    with Pipeline(provider, stack).stream(REQUEST, restarts=True) as stream:
        events = list(stream)
    assert any(isinstance(event, Restart) for event in events)
    given = recorder.call.attributes
    assert given["fluxibly.stream.characters"] == 5
    assert "wrong" not in given["gen_ai.output.messages"]
    assert len(json.loads(given["fluxibly.stream.arrivals"])) == 1


# Errors


@modes
def test_a_layer_that_makes_no_flow_ends_the_span_too(mode, recorder):
    """Its error comes when the flow is made, before there is one to run."""
    ran = run(mode, remote(mode, ANSWER), [recorder.tracing(), lambda request, call_next: None], REQUEST)
    assert isinstance(ran.error, TypeError)
    assert recorder.call.attributes["error.type"] == "TypeError"
    assert trace.get_current_span() is trace.INVALID_SPAN


@modes
def test_a_failed_call_says_why_without_quoting_the_prompt(mode, recorder):
    """Type, masked message and exception event; no stack trace, and nothing of the prompt anywhere."""
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


def test_a_code_that_is_no_name_is_not_an_error_type(recorder):
    """Only a short identifier passes for `error.type`: it has to be of low cardinality."""
    error = ProviderError("no", code="Your request abc123 was refused")
    with pytest.raises(ProviderError):
        Pipeline(Remote(error), [recorder.tracing()]).complete(REQUEST)
    assert recorder.call.attributes["error.type"] == "ProviderError"


@streams
def test_an_interrupted_stream_names_the_cause(mode, recorder):
    """`error.type` is the cause's, and what had arrived is told, usage included."""
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
    """An idle timeout is `stalled`, and an error."""
    run(mode, remote(mode, ["a", StreamStalled("nothing came")]), [recorder.tracing()], REQUEST)
    assert recorder.call.attributes["fluxibly.outcome"] == "stalled"
    assert recorder.call.attributes["error.type"] == "StreamStalled"
    assert failed(recorder.call)


# Streams that end early


@streams
def test_a_stream_given_up_is_abandoned_with_what_had_come(mode, recorder):
    """Break and close leave the status unset, with the outcome, the chunks and the usage so far."""
    script = [Chunk("forty ", usage=Usage(input_tokens=7)), "two", " and more"]
    ran = run(mode, remote(mode, script), [recorder.tracing(capture="span")], REQUEST, stop_after=2)
    assert ran.leaks == []
    for span in recorder.spans:
        assert span.status.status_code is StatusCode.UNSET
        assert span.attributes["fluxibly.outcome"] == "abandoned"
        assert not span.events
    given = recorder.call.attributes
    assert (given["fluxibly.stream.chunks"], given["fluxibly.stream.characters"]) == (2, 9)
    assert given["gen_ai.usage.input_tokens"] == 7
    assert json.loads(given["gen_ai.output.messages"])[0]["finish_reason"] == "error"
    assert recorder.counting.started == sorted(recorder.counting.ended, key=recorder.counting.started.index)


def test_a_stream_that_is_dropped_ends_its_spans(recorder):
    """Also one that only the garbage collector finds: at the next call."""
    pipeline = Pipeline(Remote(["a", "b"], ["a", "b"], "c"), [recorder.tracing()])
    stream = pipeline.stream(REQUEST)
    next(stream)
    del stream
    assert recorder.call.attributes["fluxibly.outcome"] == "abandoned"
    stream = pipeline.stream(REQUEST)
    next(stream)
    ring = [stream]
    ring.append(ring)
    del ring, stream
    gc.collect()
    pipeline.complete(REQUEST)
    outcomes = [span.attributes["fluxibly.outcome"] for span in recorder.spans if span.name == "chat m-1"]
    assert outcomes == ["abandoned", "abandoned", "completed"]
    assert len(recorder.counting.started) == len(recorder.counting.ended) == 6


def test_a_stream_closed_in_another_thread_ends_its_spans_once(recorder):
    """No context is confused, and the consumer's stays."""
    stream = Pipeline(Remote(["a", "b"]), [recorder.tracing()]).stream(REQUEST)
    next(stream)
    thread = threading.Thread(target=stream.close)
    thread.start()
    thread.join()
    stream.close()
    assert len(recorder.counting.started) == len(recorder.counting.ended) == 2
    assert trace.get_current_span() is trace.INVALID_SPAN


def test_an_exception_of_the_consumer_abandons_the_stream(recorder):
    """It is the consumer's, not the call's."""
    with pytest.raises(KeyError), Pipeline(Remote(["a", "b"]), [recorder.tracing()]).stream(REQUEST) as stream:
        next(stream)
        raise KeyError("mine")
    assert recorder.call.attributes["fluxibly.outcome"] == "abandoned"
    assert not recorder.call.events


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_cancelled_call_is_an_error_named_alike_everywhere(backend, streaming, recorder):
    """`error.type` is CancelledError on trio too."""

    class Slow(AsyncRemote):
        async def complete(self, request):
            await anyio.sleep_forever()

        async def stream(self, request):
            yield "a"
            await anyio.sleep_forever()

    async def main():
        pipeline = AsyncPipeline(Slow(), [recorder.tracing()])

        async def call():
            if not streaming:
                await pipeline.complete(REQUEST)
            async for _ in pipeline.stream(REQUEST):
                scope.cancel()

        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(call)
                await anyio.lowlevel.checkpoint()
                await anyio.lowlevel.checkpoint()
                scope.cancel()

    anyio.run(main, backend=backend)
    for span in recorder.spans:
        assert failed(span)
        assert span.attributes["error.type"] == "CancelledError"
        assert span.attributes["fluxibly.outcome"] == "cancelled"
    assert len(recorder.spans) == len(recorder.counting.started) == 2


def test_a_coroutine_that_nobody_finished_confuses_no_context(recorder):
    """Closed in another context than it ran in, it still ends its spans, and logs nothing."""

    class Waiting:
        def __await__(self):
            yield

    class Slow(AsyncRemote):
        async def complete(self, request):
            await Waiting()

    call = AsyncPipeline(Slow(), [recorder.tracing()]).complete(REQUEST)
    copy_context().run(call.send, None)
    call.close()
    assert len(recorder.counting.started) == len(recorder.counting.ended) == 2
    assert trace.get_current_span() is trace.INVALID_SPAN


# Context


@modes
def test_the_consumers_span_stays_current(mode, recorder):
    """Between chunks, and after the call, the caller's own span is current, and the call is its child."""
    tracer = recorder.tracer_provider.get_tracer("user")
    seen = []
    with tracer.start_as_current_span("mine") as mine:
        run(
            mode,
            remote(mode, ["a", "b", "c"]),
            [recorder.tracing(), StreamMeter()],
            REQUEST,
            watch=lambda _: seen.append(trace.get_current_span()),
        )
        assert trace.get_current_span() is mine
    assert all(span is mine for span in seen)
    assert recorder.call.parent.span_id == mine.get_span_context().span_id


@modes
def test_the_provider_runs_within_the_attempts_span(mode, recorder):
    """What a provider traces is a child of the attempt, and sleeping between attempts happens in the call's span."""
    inside = []

    def look(request, call_next):
        inside.append(trace.get_current_span().name)
        return (yield from call_next(request))

    class Spying:
        info = REQUEST.call.provider

        def complete(self, request):
            inside.append(trace.get_current_span().name)
            return "a"

        def stream(self, request):
            inside.append(trace.get_current_span().name)
            yield "a"

    run(mode, Spying(), [recorder.tracing(), look], REQUEST)
    assert inside == ["chat m-1", "fluxibly.attempt"]


def test_a_hundred_calls_at_once_keep_their_families_apart(recorder):
    """Every attempt is the child of its own call, and each call that of its own task."""
    tracer = recorder.tracer_provider.get_tracer("user")

    class Interleaving(AsyncRemote):
        async def complete(self, request):
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
            return request.model

        async def stream(self, request):
            for letter in "abc":
                await anyio.lowlevel.checkpoint()
                yield letter

    async def main():
        pipeline = AsyncPipeline(Interleaving(), [recorder.tracing()])

        async def call(n):
            with tracer.start_as_current_span(f"task {n}") as mine:
                if n % 2:
                    await pipeline.complete(REQUEST.evolve(model=f"m{n}"))
                else:
                    async for _ in pipeline.stream(REQUEST.evolve(model=f"m{n}")):
                        assert trace.get_current_span() is mine
                assert trace.get_current_span() is mine

        async with anyio.create_task_group() as group:
            for n in range(100):
                group.start_soon(call, n)

    anyio.run(main)
    spans = {span.context.span_id: span for span in recorder.spans}
    assert len(spans) == 300
    for span in spans.values():
        if span.name == "fluxibly.attempt":
            call = spans[span.parent.span_id]
            assert call.name == f"chat {span.attributes['fluxibly.attempt.model']}"
            assert spans[call.parent.span_id].name == f"task {call.name.removeprefix('chat m')}"


# Trace headers


@modes
def test_every_attempt_carries_its_own_traceparent_once(mode, recorder):
    """Trace id and parent id are the attempt's; other headers stay, and one of the same name is replaced."""
    provider = remote(mode, Overloaded("full"), ANSWER)
    request = REQUEST.evolve(headers={"X-Mine": "1", "TraceParent": "00-old"})
    run(mode, provider, [recorder.tracing(), Retry(max_retries=1)], request)
    assert request.headers == {"X-Mine": "1", "TraceParent": "00-old"}
    for sent, attempt in zip(provider.requests, recorder.attempts, strict=True):
        (name,) = [name for name in sent.headers if name.lower() == "traceparent"]
        _, trace_id, parent_id, _ = sent.headers[name].split("-")
        assert int(trace_id, 16) == attempt.context.trace_id == recorder.call.context.trace_id
        assert int(parent_id, 16) == attempt.context.span_id
        assert sent.headers["X-Mine"] == "1"


def test_baggage_and_trace_state_go_along(recorder):
    """The whole of W3C trace context goes out."""
    state = trace.TraceState([("vendor", "x")])
    ids = trace.SpanContext(1, 2, is_remote=True, trace_flags=trace.TraceFlags(1), trace_state=state)
    provider = Remote(ANSWER, ANSWER)
    pipeline = Pipeline(provider, [recorder.tracing()])
    parent = trace.set_span_in_context(trace.NonRecordingSpan(ids))
    for context in (parent, set_baggage("who", "me", parent)):
        token = otel_context.attach(context)
        pipeline.complete(REQUEST)
        otel_context.detach(token)
    assert [request.headers["tracestate"] for request in provider.requests] == ["vendor=x"] * 2
    assert [request.headers.get("baggage") for request in provider.requests] == [None, "who=me"]


def test_another_propagator_is_respected(recorder):
    """What the application set up for its headers is used."""

    class Shouting(propagate.textmap.TextMapPropagator):
        fields = {"x-trace"}

        def inject(self, carrier, context=None, setter=propagate.textmap.default_setter):
            span = trace.get_current_span(context).get_span_context()
            setter.set(carrier, "x-trace", f"{span.span_id:X}")

        def extract(self, carrier, context=None, getter=propagate.textmap.default_getter):
            return context

    before = propagate.get_global_textmap()
    propagate.set_global_textmap(Shouting())
    try:
        provider = Remote(ANSWER)
        Pipeline(provider, [recorder.tracing()]).complete(REQUEST)
    finally:
        propagate.set_global_textmap(before)
    assert provider.requests[0].headers == {"x-trace": f"{recorder.attempts[0].context.span_id:X}"}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_over_http_there_is_one_traceparent_with_and_without_httpx_instrumentation(streaming, asynchronous):
    """The instrumentation's span is below the attempt's, and its header takes the place of ours.

    So it is whether the transport is given, or the provider's own: once httpx is instrumented, it is httpx that sends.
    """
    pytest.importorskip("opentelemetry.instrumentation.httpx")
    ran = subprocess.run(
        [sys.executable, "-c", OVER_HTTP, "stream" if streaming else "", "async" if asynchronous else ""],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    without, *instrumented = json.loads(ran.stdout)
    (attempt,) = [s for s in without["spans"] if s["name"] == "fluxibly.attempt"]
    assert without["sent"] == [[f"00-{attempt['trace']}-{attempt['id']}-{attempt['flags']}"]]
    assert len(without["spans"]) == 2
    assert len(instrumented) == 2
    for told in instrumented:
        (attempt,) = [s for s in told["spans"] if s["name"] == "fluxibly.attempt"]
        (post,) = [s for s in told["spans"] if s["name"] == "POST"]
        assert post["parent"] == attempt["id"]
        assert told["sent"] == [[f"00-{post['trace']}-{post['id']}-{post['flags']}"]]
        assert len(told["spans"]) == 3


OVER_HTTP = """
import http.server, json, sys, threading
import anyio, httpx
from opentelemetry import trace
from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from fluxibly.config import LLMConfig
from fluxibly.middleware import Tracing
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.providers.openai import AsyncOpenAIProvider, OpenAIProvider
from fluxibly.types import Request

exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
sent = []
streaming, asynchronous = map(bool, sys.argv[1:])
WHOLE = '{"choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}]}'
STREAM = 'data: {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop"}]}\\n\\ndata: [DONE]\\n\\n'

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        sent.append(self.headers.get_all("traceparent"))
        self.rfile.read(int(self.headers["content-length"]))
        body = (STREAM if streaming else WHOLE).encode()
        self.send_response(200)
        self.send_header("content-type", "text/event-stream" if streaming else "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
base = f"http://127.0.0.1:{server.server_port}/v1"
config = LLMConfig(framework="openai", model="m", api_key="sk-1234567890", api_base=base)
request = Request(model="m", messages="Hi")

def call(transport):
    with Pipeline(OpenAIProvider(config, transport=transport), [Tracing()]) as pipeline:
        list(pipeline.stream(request)) if streaming else pipeline.complete(request)

async def acall(transport):
    async with AsyncPipeline(AsyncOpenAIProvider(config, transport=transport), [Tracing()]) as pipeline:
        if streaming:
            async for _ in pipeline.stream(request):
                pass
        else:
            await pipeline.complete(request)

told = []
for instrument, over_httpx in ((False, False), (True, False), (True, True)):
    if instrument and not over_httpx:
        HTTPXClientInstrumentor().instrument()
    if asynchronous:
        anyio.run(acall, httpx.AsyncHTTPTransport() if over_httpx else None)
    else:
        call(httpx.HTTPTransport() if over_httpx else None)
    spans = [
        {
            "name": span.name,
            "trace": f"{span.context.trace_id:032x}",
            "id": f"{span.context.span_id:016x}",
            "flags": f"{span.context.trace_flags:02x}",
            "parent": span.parent and f"{span.parent.span_id:016x}",
        }
        for span in exporter.get_finished_spans()
    ]
    told.append({"sent": [*sent], "spans": spans})
    exporter.clear()
    sent.clear()
print(json.dumps(told))
"""


@modes
def test_sampled_off_sends_that_on_and_records_nothing(mode):
    """A span that is not sampled goes on as such in the headers; there are no attempts."""
    recorder = Recorder(sampler=ParentBased(ALWAYS_OFF))
    provider = remote(mode, ANSWER)
    ran = run(mode, provider, [recorder.tracing(capture="span")], REQUEST)
    assert recorder.spans == []
    flags = int(provider.requests[0].headers["traceparent"].rpartition("-")[2], 16)
    assert not flags & trace.TraceFlags.SAMPLED
    assert ran.leaks == []


@modes
def test_without_an_sdk_a_remote_parent_still_goes_on(mode):
    """A service in the middle, without an SDK, breaks no trace; without a parent nothing is added."""
    provider = remote(mode, ANSWER, ANSWER)
    run(mode, provider, [Tracing()], REQUEST)
    ids = trace.SpanContext(0xABC, 0xDEF, is_remote=True, trace_flags=trace.TraceFlags(1))
    token = otel_context.attach(trace.set_span_in_context(trace.NonRecordingSpan(ids)))
    run(mode, provider, [Tracing()], REQUEST)
    otel_context.detach(token)
    assert [dict(request.headers) for request in provider.requests] == [
        {},
        {"traceparent": f"00-{0xABC:032x}-{0xDEF:016x}-01"},
    ]


def test_an_sdk_that_is_set_up_later_is_noticed():
    """The same `Tracing` works from then on. In a process of its own, since the global provider is set but once."""
    script = """
import warnings; warnings.simplefilter("error")
from fluxibly.middleware import Tracing
from fluxibly.pipeline import Pipeline
from fluxibly.testing import ScriptedProvider
from fluxibly.types import Request
pipeline = Pipeline(ScriptedProvider("a", "b", "c"), [Tracing()])
request = Request(model="m", messages="Hi")
pipeline.complete(request)
from opentelemetry import trace
pipeline.complete(request)
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
pipeline.complete(request)
print(len(exporter.get_finished_spans()))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert (ran.stdout, ran.stderr) == ("2\n", "")


def test_without_an_sdk_opentelemetry_is_not_even_imported():
    """A program without telemetry is spared the tenth of a second that it takes."""
    script = """
import sys
from fluxibly.middleware import Metrics, Tracing
from fluxibly.pipeline import Pipeline
from fluxibly.testing import ScriptedProvider
from fluxibly.types import Request
Pipeline(ScriptedProvider("a"), [Tracing(), Metrics()]).complete(Request(model="m", messages="Hi"))
print([m for m in sys.modules if m.startswith("opentelemetry")])
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert ran.stdout == "[]\n"


def test_other_instrumentations_are_told_of_our_span(recorder):
    """One built on opentelemetry-util-genai makes no second span below ours."""
    handler = pytest.importorskip("opentelemetry.util.genai.handler")

    class Instrumented(Remote):
        def complete(self, request):
            theirs = handler.TelemetryHandler(tracer_provider=recorder.tracer_provider)
            with theirs.inference("openai", request_model="m-1"):
                return "a"

    Pipeline(Instrumented(), [recorder.tracing()]).complete(REQUEST)
    assert [span.name for span in recorder.spans] == ["fluxibly.attempt", "chat m-1"]


# Content


CONVERSATION = Request(
    model="m-1",
    messages=[
        *CHAT,
        Message.assistant("Let me look.", tool_calls=[ToolCall("c1", "look", {"word": "life"})]),
        Message.tool("42", "c1", name="look"),
        Message.user(["And this?", Image(url="https://x.test/a.png"), Image(data=b"ab", media_type="image/png")]),
    ],
    tools=[TOOL],
)
INPUT = [
    {"role": "user", "parts": [{"type": "text", "content": "What is the meaning of life?"}]},
    {
        "role": "assistant",
        "parts": [
            {"type": "text", "content": "Let me look."},
            {"type": "tool_call", "id": "c1", "name": "look", "arguments": {"word": "life"}},
        ],
    },
    {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c1", "response": "42"}], "name": "look"},
    {
        "role": "user",
        "parts": [
            {"type": "text", "content": "And this?"},
            {"type": "uri", "modality": "image", "mime_type": None, "uri": "https://x.test/a.png"},
            {"type": "blob", "modality": "image", "mime_type": "image/png", "content": "YWI="},
        ],
    },
]
OUTPUT = [{"role": "assistant", "parts": [{"type": "text", "content": "forty two"}], "finish_reason": "stop"}]
CONTENT = {
    "gen_ai.system_instructions": [{"type": "text", "content": "Be terse."}],
    "gen_ai.input.messages": INPUT,
    "gen_ai.output.messages": OUTPUT,
    "gen_ai.tool.definitions": [
        {"type": "function", "name": "look", "description": "Looks things up", "parameters": TOOL.parameters}
    ],
}


@modes
@pytest.mark.parametrize("capture", ["none", "span", "event", "both"])
def test_content_goes_where_the_user_wants_it(mode, capture, recorder):
    """JSON strings on spans, structured values in the event, and by default nothing anywhere."""
    run(mode, remote(mode, ANSWER), [recorder.tracing(capture=capture)], CONVERSATION)
    on_span = {key: json.loads(recorder.call.attributes[key]) for key in CONTENT if key in recorder.call.attributes}
    assert on_span == (CONTENT if capture in ("span", "both") else {})
    if capture in ("none", "span"):
        assert recorder.events == []
    else:
        (event,) = recorder.events
        assert event.event_name == "gen_ai.client.inference.operation.details"
        assert event.span_id == recorder.call.context.span_id
        for key, value in CONTENT.items():
            assert json.loads(json.dumps(event.attributes[key], default=dict)) == value
        assert event.attributes["gen_ai.request.model"] == "m-1"
        assert event.attributes["gen_ai.usage.output_tokens"] == 2
    if capture in ("none", "event"):
        assert "meaning" not in everything(recorder.spans)
        assert "forty" not in everything(recorder.spans)


@pytest.mark.parametrize(
    ("value", "mode"),
    [("NO_CONTENT", "none"), ("SPAN_ONLY", "span"), ("event_only", "event"), ("SPAN_AND_EVENT", "both"), ("", "none")],
)
def test_the_standard_variable_decides_too(value, mode, monkeypatch, recorder):
    """The variable is the default, and the parameter wins."""
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", value)
    Pipeline(Remote(ANSWER), [recorder.tracing()]).complete(REQUEST)
    assert ("gen_ai.input.messages" in recorder.call.attributes) == (mode in ("span", "both"))
    assert len(recorder.events) == (mode in ("event", "both"))
    recorder.exporter.clear()
    Pipeline(Remote(ANSWER), [recorder.tracing(capture="none")]).complete(REQUEST)
    assert "gen_ai.input.messages" not in recorder.call.attributes


def test_a_bad_value_of_the_variable_is_told_once_and_captures_nothing(monkeypatch, capsys, recorder):
    """It is not taken for consent."""
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "true")
    for _ in range(2):
        Pipeline(Remote(ANSWER), [recorder.tracing()]).complete(REQUEST)
    assert "meaning" not in everything(recorder.spans)
    assert capsys.readouterr().err.count("'true' is not one of NO_CONTENT, SPAN_ONLY") == 1


def test_a_bad_parameter_is_an_error():
    """It names what is valid."""
    with pytest.raises(ValueError, match="one of none, span, event, both, not 'all'"):
        Tracing(capture="all")


def test_redact_sees_every_text(recorder):
    """Messages, tool arguments, images and error messages; what it returns is what leaves."""
    seen = []

    def redact(text):
        seen.append(text)
        return "x"

    stack = [recorder.tracing(capture="both", redact=redact)]
    Pipeline(Remote(ANSWER), stack).complete(CONVERSATION)
    assert {"Be terse.", "Let me look.", "life", "42", "And this?", "YWI=", "forty two", "Looks things up"} <= {*seen}
    named = Request(model="m-1", messages=[Message("user", "Hi", name="Jo Bloggs")])
    Pipeline(Remote(ANSWER), stack).complete(named)
    told = everything(recorder.spans) + str([event.attributes for event in recorder.events])
    assert not [text for text in ("terse", "Let me", "YWI", "forty", "Bloggs") if text in told]
    with pytest.raises(ProviderError):
        Pipeline(Remote(ProviderError("secret words")), stack).complete(CONVERSATION)
    assert "secret words" not in everything(recorder.spans)


def test_content_is_what_was_sent(recorder):
    """A middleware that takes names out of the prompt takes them out of the trace as well."""

    def anonymise(request, call_next):
        return (yield from call_next(request.evolve(messages="I am ***")))

    Pipeline(Remote(ANSWER), [recorder.tracing(capture="span"), anonymise]).complete(
        Request(model="m-1", messages="I am Jo")
    )
    assert "Jo" not in everything(recorder.spans)


def test_half_a_character_harms_nothing(recorder):
    """A model may produce half of a surrogate pair."""
    Pipeline(Remote(Response("a\ud800")), [recorder.tracing(capture="span")]).complete(REQUEST)
    assert json.loads(recorder.call.attributes["gen_ai.output.messages"])[0]["parts"][0]["content"] == "a\ud800"


# Arrivals


def test_arrivals_are_kept_in_constant_memory(recorder):
    """A long stream is thinned evenly; times, waits and characters are exact for what is kept."""
    clock = VirtualClock()
    script = [step for _ in range(1000) for step in (Delay(0.5), "ab")]
    pipeline = Pipeline(Remote(script, clock=clock), [recorder.tracing()], clock=clock)
    with pipeline.stream(REQUEST) as stream:
        for _ in stream:
            clock.advance(0.25)
    points = json.loads(recorder.call.attributes["fluxibly.stream.arrivals"])
    assert 100 <= len(points) < 200
    assert points[0] == [500_000, 500_000, 2]
    gaps = {b[0] - a[0] for a, b in zip(points, points[1:], strict=False)}
    assert gaps == {8 * 750_000}
    assert {wait for _, wait, _ in points} == {500_000}
    assert all(at == 500_000 + 750_000 * (characters // 2 - 1) for at, _, characters in points)


# Telemetry that breaks


class Raising(SpanProcessor):
    """Breaks at a step."""

    def __init__(self, step):
        self.step = step

    def on_start(self, span, parent_context=None):
        if self.step == "start":
            raise RuntimeError("broken")

    def on_end(self, span):
        if self.step == "end":
            raise RuntimeError("broken")


@modes
@pytest.mark.parametrize("step", ["start", "end"])
def test_a_span_processor_that_raises_changes_no_result(mode, step, recorder, capsys):
    """It is reported once, and the context is clean."""
    recorder.tracer_provider.add_span_processor(Raising(step))
    for _ in range(2):
        ran = run(mode, remote(mode, Overloaded("full"), ANSWER), [recorder.tracing(), Retry(max_retries=1)], REQUEST)
        assert ran.error is None
        assert ran.response.text == "forty two"
        assert ran.leaks == []
    assert capsys.readouterr().err.count("tracing failed with RuntimeError") == 1


def test_an_exporter_that_raises_changes_no_result(recorder, caplog):
    """The SDK logs that itself."""

    class Broken(SpanExporter):
        def export(self, spans):
            raise OSError("no route")

    recorder.tracer_provider.add_span_processor(SimpleSpanProcessor(Broken()))
    with caplog.at_level(logging.CRITICAL):
        assert Pipeline(Remote(ANSWER), [recorder.tracing()]).complete(REQUEST).text == "forty two"


def test_a_redact_that_raises_shows_nothing(recorder, capsys):
    """Neither content nor the error's message; it is reported once."""

    def redact(text):
        raise RuntimeError("broken")

    stack = [recorder.tracing(capture="both", redact=redact)]
    assert Pipeline(Remote(ANSWER), stack).complete(REQUEST).text == "forty two"
    with pytest.raises(ProviderError, match="words"):
        Pipeline(Remote(ProviderError("secret words")), stack).complete(REQUEST)
    told = everything(recorder.spans) + str([event.attributes for event in recorder.events])
    assert "meaning" not in told
    assert "secret" not in told
    assert capsys.readouterr().err.count("redact raised RuntimeError") == 1


def test_a_sampler_that_raises_changes_no_result(capsys):
    """The call goes on without a span."""

    class Broken(Sampler):
        def should_sample(self, *args, **kwargs) -> SamplingResult:
            raise RuntimeError("broken")

        def get_description(self):
            return "broken"

    forget_reports()
    recorder = Recorder(sampler=Broken())
    assert Pipeline(Remote(ANSWER), [recorder.tracing()]).complete(REQUEST).text == "forty two"
    assert "tracing failed" in capsys.readouterr().err


def test_span_times_agree_with_the_call(recorder):
    """A span is as long as the call was."""
    start = time.time_ns()
    response = Pipeline(Remote(ANSWER), [recorder.tracing()]).complete(REQUEST)
    end = time.time_ns()
    span = recorder.call
    assert start <= span.start_time <= span.end_time <= end
    assert (span.end_time - span.start_time) / 1e9 <= response.elapsed + 0.001
