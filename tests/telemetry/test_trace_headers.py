"""Trace headers: one `traceparent` for each attempt, with and without other instrumentations."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from opentelemetry import context as otel_context, propagate, trace
from opentelemetry.baggage import set_baggage
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased
from support.tracing_tools import ANSWER, REQUEST, Recorder, Remote, modes, remote

from fluxibly.errors import Overloaded
from fluxibly.middleware import Retry, Tracing
from fluxibly.pipeline import Pipeline
from fluxibly.testing.modes import run

pytestmark = pytest.mark.usefixtures("no_complaints")


# Trace headers


@modes
def test_every_attempt_carries_its_own_traceparent_once(mode, recorder):
    """The parent of the first is the call's span, that of each later one its own span. Other headers stay.

    An existing `traceparent` is replaced.
    """
    provider = remote(mode, Overloaded("full"), Overloaded("full"), ANSWER)
    request = REQUEST.evolve(headers={"X-Mine": "1", "TraceParent": "00-old"})
    run(mode, provider, [recorder.tracing(), Retry(max_retries=2, base_delay=0)], request)
    assert request.headers == {"X-Mine": "1", "TraceParent": "00-old"}
    assert len(recorder.attempts) == 3
    for sent, parent in zip(provider.requests, [recorder.call, *recorder.attempts[1:]], strict=True):
        (name,) = [name for name in sent.headers if name.lower() == "traceparent"]
        _, trace_id, parent_id, _ = sent.headers[name].split("-")
        assert int(trace_id, 16) == recorder.call.context.trace_id
        assert int(parent_id, 16) == parent.context.span_id
        assert sent.headers["X-Mine"] == "1"


def test_baggage_and_trace_state_go_along(recorder):
    """The request carries all W3C trace context headers."""
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


def carrying(request, call_next):
    """Add to the baggage, as a middleware does that names a tenant."""
    token = otel_context.attach(set_baggage("who", "me"))
    try:
        return (yield from call_next(request))
    finally:
        otel_context.detach(token)


@modes
@pytest.mark.parametrize("sampler", [ALWAYS_ON, ALWAYS_OFF, None], ids=["sampled", "unsampled", "no SDK"])
def test_baggage_of_a_middleware_goes_out_whether_sampled_or_not(mode, sampler):
    """It is sent with every attempt. The `traceparent` is the same as without it, and the caller's context stays."""
    recorder = Recorder() if sampler is None else Recorder(sampler=sampler)
    tracing = Tracing() if sampler is None else recorder.tracing()
    provider = remote(mode, Overloaded("full"), ANSWER, ANSWER)
    retry = Retry(max_retries=1, base_delay=0)
    ids = trace.SpanContext(0xABC, 0xDEF, is_remote=True, trace_flags=trace.TraceFlags(1))
    token = otel_context.attach(trace.set_span_in_context(trace.NonRecordingSpan(ids)))
    leaks = run(mode, provider, [tracing, carrying, retry], REQUEST).leaks
    leaks += run(mode, provider, [tracing, retry], REQUEST).leaks
    otel_context.detach(token)
    assert leaks == []
    first, second, plain = [request.headers for request in provider.requests]
    assert [headers.get("baggage") for headers in (first, second, plain)] == ["who=me", "who=me", None]
    parents = [headers["traceparent"].split("-")[1:3] for headers in (first, second)]
    assert {trace_id for trace_id, _ in parents} == {f"{0xABC:032x}"}
    if sampler is ALWAYS_ON:
        sent_from = [recorder.calls[0], recorder.attempts_of(recorder.calls[0])[1]]
        assert [span_id for _, span_id in parents] == [f"{span.context.span_id:016x}" for span in sent_from]
    else:
        assert parents[0] == parents[1]
        assert (parents[0][1] == f"{0xDEF:016x}") == (sampler is None)


def test_another_propagator_is_respected(recorder):
    """Tracing uses the propagator that the application has set up."""

    class Shouting(propagate.textmap.TextMapPropagator):
        fields = frozenset({"x-trace"})

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
    assert provider.requests[0].headers == {"x-trace": f"{recorder.call.context.span_id:X}"}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_over_http_there_is_one_traceparent_with_and_without_httpx_instrumentation(streaming, asynchronous):
    """The instrumentation's span is a child of the call's, and its header replaces that of the call's.

    This holds for a given transport and for the provider's own, because an instrumented httpx sends all requests.
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
    (call,) = without["spans"]
    assert without["sent"] == [[f"00-{call['trace']}-{call['id']}-{call['flags']}"]]
    assert len(instrumented) == 2
    for told in instrumented:
        post, call = told["spans"]
        assert (post["name"], call["name"]) == ("POST", "chat m")
        assert post["parent"] == call["id"]
        assert told["sent"] == [[f"00-{post['trace']}-{post['id']}-{post['flags']}"]]


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
def test_an_unsampled_call_sends_its_decision_and_records_nothing(mode):
    """The headers pass on that the span is not sampled. There are no attempt spans."""
    recorder = Recorder(sampler=ParentBased(ALWAYS_OFF))
    provider = remote(mode, ANSWER)
    ran = run(mode, provider, [recorder.tracing(capture="span")], REQUEST)
    assert recorder.spans == []
    flags = int(provider.requests[0].headers["traceparent"].rpartition("-")[2], 16)
    assert not flags & trace.TraceFlags.SAMPLED
    assert ran.leaks == []


@modes
def test_without_an_sdk_a_remote_parent_is_still_passed_on(mode):
    """An intermediate service without an SDK does not break a trace. Without a parent, no header is added."""
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
    """The same `Tracing` works from then on. This needs a new process, which can set the global provider only once."""
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
    assert (ran.stdout, ran.stderr) == ("1\n", "")


def test_without_an_sdk_opentelemetry_is_not_even_imported():
    """The import takes a tenth of a second, which a program without telemetry does not pay."""
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
