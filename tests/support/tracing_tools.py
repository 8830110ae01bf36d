"""An SDK that keeps its spans and events in memory, for the tests of traces and metrics."""

from __future__ import annotations

import json
from typing import Any

import pytest
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from fluxibly.errors import Overloaded
from fluxibly.middleware import Tracing
from fluxibly.testing import AsyncScriptedProvider, ScriptedProvider
from fluxibly.testing.modes import MODES, Mode
from fluxibly.types import Message, ProviderInfo, Request, Response, Tool, Usage

INFO = ProviderInfo(
    name="OpenAIProvider", framework="openai", telemetry_name="openai", server_address="api.test", server_port=443
)
REQUEST = Request(model="m-1", messages="What is the meaning of life?")
ANSWER = Response(
    "forty two", finish_reason="stop", usage=Usage(input_tokens=7, output_tokens=2), model="m-1-2026", id="r-1"
)
TOOL = Tool("look", "Looks things up", {"type": "object", "properties": {"word": {"type": "string"}}})
CHAT = (Message.system("Be terse."), Message.user("What is the meaning of life?"))


class Remote(ScriptedProvider):
    """A scripted provider that looks like a provider over HTTP."""

    info = INFO


class AsyncRemote(AsyncScriptedProvider):
    info = INFO


def remote(mode: Mode, *answers: Any, **options: Any) -> Any:
    """Return a scripted provider for the mode."""
    return (Remote if mode.backend is None else AsyncRemote)(*answers, **options)


class Counting(SpanProcessor):
    """A span processor that records which spans were started and ended."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self.started: list[int] = []
        self.ended: list[int] = []

    @property
    def open(self) -> list[str]:
        """The names of the spans that have not ended."""
        return [self.names[started] for started in self.started if started not in self.ended]

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        self.started.append(span.context.span_id)
        self.names[span.context.span_id] = span.name

    def on_end(self, span: ReadableSpan) -> None:
        self.ended.append(span.context.span_id)


class Recorder:
    """A tracer provider and a logger provider, with the spans and events that they exported."""

    def __init__(self, **options: Any) -> None:
        self.exporter = InMemorySpanExporter()
        self.counting = Counting()
        self.tracer_provider = TracerProvider(shutdown_on_exit=False, **options)
        self.tracer_provider.add_span_processor(self.counting)
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.log_exporter = InMemoryLogRecordExporter()
        self.logger_provider = LoggerProvider(shutdown_on_exit=False)
        self.logger_provider.add_log_record_processor(SimpleLogRecordProcessor(self.log_exporter))

    def tracing(self, **options: Any) -> Tracing:
        return Tracing(tracer_provider=self.tracer_provider, logger_provider=self.logger_provider, **options)

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    @property
    def calls(self) -> list[ReadableSpan]:
        """The spans of calls, in the order in which they ended."""
        return [span for span in self.spans if span.name.startswith("chat ") and not self._is_within(span)]

    @property
    def asks(self) -> list[ReadableSpan]:
        """The spans of asks, in the order in which they ended."""
        return [span for span in self.spans if span.name.startswith("chat ") and self._is_within(span)]

    def _is_within(self, span: ReadableSpan) -> bool:
        """Whether a span is a child of a call or of an attempt."""
        ours = {other.context.span_id for other in self.spans if other.name.startswith(("chat ", "fluxibly."))}
        return span.parent is not None and span.parent.span_id in ours

    @property
    def call(self) -> ReadableSpan:
        """The only span of a call."""
        (found,) = self.calls
        return found

    @property
    def attempts(self) -> list[ReadableSpan]:
        """The spans of the call's attempts, in order of their index."""
        return self.attempts_of(self.call)

    def attempts_of(self, call: ReadableSpan) -> list[ReadableSpan]:
        """Return the spans of the attempts of a call or an ask, in order of their index."""
        found = [span for span in self.spans if span.name == "fluxibly.attempt"]
        found = [span for span in found if span.parent.span_id == call.context.span_id]
        return sorted(found, key=lambda span: span.attributes["fluxibly.attempt.index"])

    @property
    def events(self) -> list[Any]:
        return [data.log_record for data in self.log_exporter.get_finished_logs()]


def everything(spans: list[ReadableSpan]) -> str:
    """Return the whole content of the spans as a text to search in."""
    return " ".join(
        json.dumps([span.name, dict(span.attributes or {}), span.status.description, [*map(_event, span.events)]])
        for span in spans
    )


def _event(event: Any) -> Any:
    return [event.name, dict(event.attributes or {})]


def failed(span: ReadableSpan) -> bool:
    return span.status.status_code is StatusCode.ERROR


def fall_back(request, call_next):
    """Fall back to another model."""
    try:
        return (yield from call_next(request))
    except Overloaded:
        return (yield from call_next(request.evolve(model="m-2")))


def cached(request, call_next):
    """Answer from a cache that always hits."""
    request.call.cache_hit = True
    yield from ()
    return ANSWER


STREAMS = [mode for mode in MODES if mode.streaming]
modes = pytest.mark.parametrize("mode", MODES, ids=str)
streams = pytest.mark.parametrize("mode", STREAMS, ids=str)
