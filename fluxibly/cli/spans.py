"""The recorder of spans that uses the OpenTelemetry SDK."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fluxibly._checks import shown_url
from fluxibly._logs import one_line
from fluxibly.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from opentelemetry.sdk.trace import ReadableSpan

REASON = 200
"""The maximum length, in characters, of a backend's reason for not accepting spans."""


class SDKRecorder:
    """A recorder of the spans of this process. See `recorder` for the arguments."""

    def __init__(self, file: Path | None, otlp: str | None, *, keep: bool = True) -> None:
        self._memory = InMemorySpanExporter()
        self._provider = TracerProvider(resource=Resource.create({"service.name": "fluxibly"}))
        if keep:
            self._provider.add_span_processor(SimpleSpanProcessor(self._memory))
        if file is not None:
            self._provider.add_span_processor(SimpleSpanProcessor(_to_file(file)))
        self._otlp = _Watched(_endpoint(otlp)) if otlp is not None else None
        if self._otlp is not None:
            self._provider.add_span_processor(BatchSpanProcessor(self._otlp))
        trace.set_tracer_provider(self._provider)

    def take(self) -> Sequence[ReadableSpan]:
        """Return the spans that ended since the last call."""
        spans = self._memory.get_finished_spans()
        self._memory.clear()
        return spans

    def close(self) -> str | None:
        """Export the remaining spans. Return a description of the failure, or None."""
        self._provider.shutdown()
        if self._otlp is not None and self._otlp.failed:
            reason = f" ({self._otlp.reason})" if self._otlp.reason else ""
            return f"the spans did not reach {shown_url(self._otlp.endpoint)}: does a backend take OTLP over HTTP there?{reason}"
        return None


class _Watched(SpanExporter):
    """An exporter that sends spans to a backend, and remembers whether and why that failed.

    The standard variables apply: `OTEL_EXPORTER_OTLP_HEADERS`, and `OTEL_EXPORTER_OTLP_TIMEOUT` (by default 10 seconds).
    """

    def __init__(self, endpoint: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        self.endpoint = endpoint
        self.failed = False
        self.reason = ""
        self._exporter = OTLPSpanExporter(endpoint=endpoint)
        logging.getLogger(OTLPSpanExporter.__module__).addFilter(self._hear)  # only the log has the reason

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            self.failed = self.failed or result is not SpanExportResult.SUCCESS
        return result

    def _hear(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            self.reason = one_line(record.getMessage())[:REASON]
        return True

    def shutdown(self) -> None:
        self._exporter.shutdown()  # type: ignore[no-untyped-call]  # the exporter is untyped


def _endpoint(otlp: str) -> str:
    """Return the URL for traces; the default path is that of OTLP's specification ("OTLP/HTTP")."""
    parts = urlsplit(otlp)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"--otlp: {otlp!r} is not an http:// or https:// URL")
    return otlp if parts.path not in ("", "/") else f"{otlp.rstrip('/')}/v1/traces"


def _to_file(file: Path) -> SpanExporter:
    from fluxibly.telemetry._file_exporter import OTLPFileSpanExporter

    try:
        return OTLPFileSpanExporter(file)
    except OSError as error:
        raise ConfigError(f"--trace: cannot write {file}: {error.strerror or error}") from error
