"""Edge cases of traces, metrics and logs: odd values, odd texts, and the arguments of `setup`."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys

import pytest
from opentelemetry.exporter.otlp.proto.common._log_encoder import encode_logs
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.propagate import get_global_textmap, set_global_textmap
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from rich.console import Console
from support.tracing_tools import ANSWER, REQUEST, Recorder, Remote, everything

from fluxibly import map_chunks, telemetry
from fluxibly._logs import forget_reports
from fluxibly.cli.trace import file as trace_file, html as trace_html, terminal as trace_view
from fluxibly.errors import BadRequest, Overloaded, StreamInterrupted
from fluxibly.middleware import Logging, Tracing
from fluxibly.pipeline import Pipeline
from fluxibly.types import Chunk, Image, Message, ProviderInfo, Request, Response, Tool, ToolCall


@pytest.fixture
def recorder():
    forget_reports()
    return Recorder()


def ask(recorder, answer, request=REQUEST, **options):
    """Make a call that is logged and traced."""
    return Pipeline(Remote(answer), [Logging(), recorder.tracing(**options)]).complete(request)


# Texts


@pytest.mark.parametrize("returned", [None, 5, b"bytes"])
def test_a_redact_that_does_not_return_a_text_hides_everything(returned, recorder, capsys):
    """Neither the content nor an error's message is recorded, as if `redact` had raised. This is reported once."""
    ask(recorder, ANSWER, capture="both", redact=lambda text: returned)
    assert "gen_ai.input.messages" not in recorder.call.attributes
    assert recorder.events == []
    with pytest.raises(Overloaded):
        ask(again := Recorder(), Overloaded("there is no room"), redact=lambda text: returned)
    assert again.call.status.description == "Overloaded"
    assert again.call.events[0].attributes["exception.message"] == ""
    assert capsys.readouterr().err.count("redact raised TypeError") == 1


def test_redact_sees_the_names_of_arguments(recorder):
    """`redact` gets the names of arguments, because a model writes them. A tool's schema stays a schema."""
    tool = Tool("look", parameters={"type": "object", "properties": {}})
    call = ToolCall("1", "look", {"people": {"Jo Doe": [{"Jo Doe": 1}]}})
    request = Request(model="m-1", messages="Hi", tools=[tool])
    ask(recorder, Response(tool_calls=[call]), request, capture="span", redact=lambda text: text.upper())
    (message,) = json.loads(recorder.call.attributes["gen_ai.output.messages"])
    assert message["parts"][0]["arguments"] == {"PEOPLE": {"JO DOE": [{"JO DOE": 1}]}}
    (definition,) = json.loads(recorder.call.attributes["gen_ai.tool.definitions"])
    assert definition["parameters"] == {"type": "OBJECT", "properties": {}}


def test_the_address_of_an_image_is_content(recorder, caplog):
    """If a service quotes the address in an error message, neither logs nor spans contain it."""
    url = "https://files.test/of-jo-doe/passport.png?signature=0123456789"
    request = Request(model="m-1", messages=[Message.user(["What is this?", Image(url=url)])])
    with caplog.at_level(logging.INFO, "fluxibly"), pytest.raises(BadRequest):
        ask(recorder, BadRequest(f"cannot fetch {url}!"), request)
    assert recorder.call.status.description == "cannot fetch […]!"
    assert "passport" not in everything(recorder.spans) + caplog.text


def test_half_a_character_in_an_error_is_exported_and_logged(recorder, tmp_path):
    """Half of a surrogate pair is escaped, or an exporter would reject its whole batch, and a log file the line."""
    handler = logging.FileHandler(path := tmp_path / "log", encoding="utf-8")
    logger = logging.getLogger("fluxibly")
    logger.addHandler(handler)
    try:
        with pytest.raises(BadRequest):
            ask(recorder, BadRequest("bad \ud83d thing"), REQUEST.evolve(model="m\ud83d"))
    finally:
        logger.removeHandler(handler)
        handler.close()
    span = recorder.call
    assert span.status.description == span.events[0].attributes["exception.message"] == "bad \\ud83d thing"
    assert 'error_message="bad \\ud83d thing"' in path.read_text()


def test_values_that_are_not_json_do_not_break_an_event(recorder, caplog):
    """An exporter would drop an attribute with an object or half of a character in it, and log an error."""
    tool = Tool("look", parameters={"type": "object", "default": object})
    request = Request(model="m-1", messages="Hi \ud800", tools=[tool])
    ask(recorder, Response("a\ud83d"), request, capture="event")
    assert {"gen_ai.input.messages", "gen_ai.output.messages", "gen_ai.tool.definitions"} <= {
        pair.key for pair in _record(recorder).attributes
    }
    assert recorder.events[0].attributes["gen_ai.output.messages"][0]["parts"][0]["content"] == "a?"
    assert [record for record in caplog.records if record.name.startswith("opentelemetry")] == []


def test_messages_with_half_a_character_or_nan_are_valid_json(recorder):
    """A model may write both into a tool's arguments."""
    call = ToolCall("1", "look", raw_arguments='{"word": "\\ud800", "weight": NaN, "width": 1e999}')
    ask(recorder, Response(tool_calls=[call]), capture="span")
    (message,) = json.loads(recorder.call.attributes["gen_ai.output.messages"], parse_constant=pytest.fail)
    assert message["parts"][0]["arguments"] == {"word": "\ud800", "weight": None, "width": None}


def _record(recorder):
    """Return the only event as OTLP encodes it."""
    encoded = encode_logs(recorder.log_exporter.get_finished_logs())
    return encoded.resource_logs[0].scope_logs[0].log_records[0]


# Values


def test_a_parameter_has_the_same_type_for_int_and_float(recorder):
    """Backends take an attribute's type from its first value and then reject other types, so 1 is sent as 1.0."""
    request = Request(
        model="m-1", messages="Hi", temperature=1, top_p=1, frequency_penalty=0, presence_penalty=2, top_k=5
    )
    ask(recorder, ANSWER, request)
    encoded = encode_spans(recorder.spans).resource_spans[0].scope_spans[0].spans[-1]
    kinds = {
        pair.key.rpartition(".")[2]: pair.value.WhichOneof("value")
        for pair in encoded.attributes
        if pair.key.startswith("gen_ai.request.")
    }
    doubles = dict.fromkeys(("temperature", "top_p", "frequency_penalty", "presence_penalty"), "double_value")
    assert kinds == {**doubles, "model": "string_value", "top_k": "int_value"}


# Setup


@pytest.mark.parametrize("address", ["", "127.0.0.1:4318", "grpc://127.0.0.1:4317"])
def test_an_invalid_address_is_refused(address):
    """`setup` checks the address before it sets up anything."""
    with pytest.raises(ValueError, match="http:// or https:// URL"):
        telemetry.setup(otlp=address)


def test_signals_are_for_the_backend_alone(tmp_path):
    """Spans go to the file regardless of `signals`. A second shutdown does not even warn."""
    path = tmp_path / "trace.jsonl"
    code = f"""
from fluxibly.telemetry import setup
from opentelemetry import trace
telemetry = setup(file={str(path)!r}, otlp="http://127.0.0.1:9", signals=["metrics", "events"])
trace.get_tracer("t").start_span("s").end()
telemetry.shutdown()
telemetry.shutdown()
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert json.loads(path.read_text())["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["name"] == "s"


# Files by other programs


def _span(*attributes, **fields):
    """Return a span as OTLP JSON."""
    span = {"traceId": "a" * 32, "spanId": "b" * 16, "name": "n", "startTimeUnixNano": "5", "endTimeUnixNano": "9"}
    pairs = [{"key": key, "value": value} for key, value in attributes]
    return {
        **span,
        "attributes": [*pairs, {"key": "gen_ai.operation.name", "value": {"stringValue": "chat"}}],
        **fields,
    }


ODD = {"stringValue": "odd"}
TEXTS = [("fluxibly.stream.arrivals", text) for text in ("5", "[[1]]", '[["a", "b", "c"]]', '{"a": 1}')]
TEXTS += [
    (key, text)
    for key in ("gen_ai.input.messages", "gen_ai.system_instructions", "gen_ai.tool.definitions")
    for text in ("5", '{"a": 1}', "[5]", "[" * 100_000)
]
TEXTS += [("gen_ai.input.messages", f'[{{"parts": {parts}}}]') for parts in ("5", "null", '["x"]')]
TEXTS += [("gen_ai.input.messages", '[{"parts": [{"type": "text", "content": "half \\ud800"}]}]')]
NUMBERS = [(key, ODD) for key in trace_file.NUMBERS]
SPANS = [
    *([_span((key, {"stringValue": text}))] for key, text in TEXTS),
    [_span(name=5)],
    [_span(name=None, status=None, parentSpanId=None)],
    [_span(traceId=5, spanId=6)],
    [_span(name="\ud800")],
    [_span(spanId="1", parentSpanId="2"), _span(spanId="2", parentSpanId="1"), _span(spanId="3", parentSpanId="3")],
    [_span(spanId=str(number + 1), parentSpanId=str(number)) for number in range(2_000)],
    [_span(*NUMBERS, ("fluxibly.stream.arrivals", {"stringValue": "[[1, 1, 1]]"}))],
]


@pytest.mark.parametrize("spans", SPANS, ids=range(len(SPANS)))
def test_spans_that_others_wrote_or_damaged_are_shown(spans, tmp_path):
    """The terminal view and the page show the spans, and leave out unreadable parts."""
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": spans}]}]}))
    assert sum(1 for root in trace_file.read(path).roots for _ in root.walk()) == len(spans)
    trace_html.render(path).encode()
    console = Console(file=io.StringIO())
    console.print(trace_view.render(path))
    assert console.file.getvalue()


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [_span(startTimeUnixNano=str(10**30))]}]}]}),
    ],
    ids=["nested", "late"],
)
def test_a_line_that_cannot_be_a_trace_is_refused_with_its_number(text, tmp_path):
    """The error is that of any other line that is not OTLP JSON."""
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"trace\.jsonl, line 1: this is not OTLP JSON"):
        trace_file.read(path)


def test_control_characters_in_a_trace_do_not_reach_the_terminal(tmp_path):
    """A model's name or a service's message may contain control characters."""
    path = tmp_path / "trace.jsonl"
    odd = "\x1b]0;title\x07\x9b2J"
    span = _span(("fluxibly.requested_model", {"stringValue": odd}), name=odd, status={"code": 2, "message": odd})
    path.write_text(json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}))
    console = Console(file=io.StringIO(), width=200)
    console.print(trace_view.render(path))
    shown = console.file.getvalue()
    assert "]0;title" in shown
    assert not {"\x1b", "\x07", "\x9b"} & set(shown)


# Propagators and reasons


@pytest.mark.parametrize("sdk", ["set up", "missing"])
def test_a_propagator_that_is_not_installed_fails_no_call(sdk):
    """If OTEL_PROPAGATORS names a missing propagator, OpenTelemetry's import raises. Spans are still recorded."""
    code = f"""
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from fluxibly.middleware import Tracing
from fluxibly.pipeline import Pipeline
from fluxibly.testing import ScriptedProvider
from fluxibly.types import Request
exporter = InMemorySpanExporter()
if {sdk == "set up"}:
    trace.set_tracer_provider(TracerProvider())
    trace.get_tracer_provider().add_span_processor(SimpleSpanProcessor(exporter))
pipeline = Pipeline(ScriptedProvider("a", "b"), [Tracing()])
print(pipeline.complete(Request(model="m", messages="Hi")).text, pipeline.complete(Request(model="m", messages="Hi")).text)
print(len(exporter.get_finished_spans()))
"""
    environment = {**os.environ, "OTEL_PROPAGATORS": "b3-not-installed"}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["a", "b", "2" if sdk == "set up" else "0"]
    assert ran.stderr.count("b3-not-installed") == 1


def test_a_propagator_of_the_users_own_is_used(recorder):
    """A subclass of the usual propagator may, for example, accept traces but send none."""

    class Inward(TraceContextTextMapPropagator):
        def inject(self, carrier, context=None, setter=None):
            pass

    usual = get_global_textmap()
    set_global_textmap(Inward())
    try:
        provider = Remote(ANSWER)
        Pipeline(provider, [recorder.tracing()]).complete(REQUEST)
    finally:
        set_global_textmap(usual)
    assert provider.requests[0].headers == {}


def test_a_reported_finish_reason_stays_when_a_layer_fails_after_it(recorder):
    """The service's answer was complete, even though the call failed."""

    def refuse(request, call_next):
        yield from call_next(request)
        raise ValueError("not this")

    stream = Pipeline(Remote(["a", Chunk("b", finish_reason="stop")]), [recorder.tracing(), refuse]).stream(REQUEST)
    with pytest.raises(StreamInterrupted):
        list(stream)
    assert recorder.call.attributes["gen_ai.response.finish_reasons"] == ("stop",)


def test_a_reported_finish_reason_stays_when_the_consumer_leaves_after_it(recorder):
    """The consumer leaves at a chunk that a layer added after the service's last chunk."""

    def sign(request, call_next):
        return (yield from map_chunks(call_next(request), lambda chunk: chunk, at_end=lambda: Chunk("signed")))

    with Pipeline(Remote(["a", Chunk("b", finish_reason="stop")]), [recorder.tracing(), sign]).stream(
        REQUEST
    ) as stream:
        for chunk in stream:
            if chunk.text == "signed":
                break
    assert recorder.call.attributes["gen_ai.response.finish_reasons"] == ("stop",)


def test_a_propagator_that_raises_leaves_the_span_current(capsys):
    """Inner calls stay unsampled like their parent. The propagator's failure is reported once."""
    forget_reports()

    class Broken(TraceContextTextMapPropagator):
        def inject(self, carrier, context=None, setter=None):
            raise RuntimeError("broken")

    seen = []

    class Provider:
        def complete(self, request):
            seen.append(get_current_span().get_span_context())
            return "fine"

    tracers = TracerProvider(ALWAYS_OFF, shutdown_on_exit=False)
    usual = get_global_textmap()
    set_global_textmap(Broken())
    try:
        pipeline = Pipeline(Provider(), [Tracing(tracer_provider=tracers)])
        assert [pipeline.complete(REQUEST).text for _ in range(2)] == ["fine", "fine"]
    finally:
        set_global_textmap(usual)
    assert all(ids.is_valid and not ids.trace_flags.sampled for ids in seen)
    assert seen[0].trace_id != seen[1].trace_id
    assert capsys.readouterr().err.count("tracing failed with RuntimeError") == 1


@pytest.mark.parametrize("address", [None, "other.test"])
def test_a_provider_that_turned_to_another_service(recorder, address):
    """The call and the attempts name the other service and model. If its address is unknown, the span has none."""
    other = ProviderInfo(telemetry_name="anthropic", server_address=address, server_port=address and 8443)

    class Turning(Remote):
        def complete(self, request):
            request.call.provider, request.call.sent_model = other, "m-2"
            return super().complete(request)

    Pipeline(Turning(ANSWER), [recorder.tracing(attempts="always")]).complete(REQUEST)
    span, (attempt,) = recorder.call, recorder.attempts
    assert span.name == "chat m-2"
    assert span.attributes["gen_ai.provider.name"] == attempt.attributes["fluxibly.attempt.provider"] == "anthropic"
    assert (span.attributes["server.address"], span.attributes["server.port"]) == (
        (address, 8443) if address else ("", 0)
    )
    assert span.attributes["gen_ai.request.model"] == attempt.attributes["fluxibly.attempt.model"] == "m-2"
    assert span.attributes["fluxibly.requested_model"] == "m-1"
