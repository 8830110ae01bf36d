"""Setup of an OpenTelemetry SDK in one line, for programs that have not set up an SDK.

It needs the SDK and its OTLP exporter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import attrs

from fluxibly._extras import pip_install

if TYPE_CHECKING:
    from pathlib import Path

    from opentelemetry.sdk.resources import Resource

Signal: TypeAlias = Literal["traces", "metrics", "events"]
_TRACES: tuple[Signal, ...] = ("traces",)


@attrs.frozen
class Telemetry:
    """The SDK that `setup` has set up. It shuts down when the process ends, or earlier by `shutdown`."""

    _shutdowns: list[Callable[[], Any]]

    def shutdown(self) -> None:
        """Export all waiting data and shut down. A second call does nothing."""
        while self._shutdowns:
            self._shutdowns.pop(0)()


def setup(
    *,
    otlp: str | None = None,
    headers: Mapping[str, str] | None = None,
    file: str | Path | None = None,
    console: bool = False,
    signals: Collection[Signal] = _TRACES,
    service_name: str = "fluxibly",
) -> Telemetry:
    """Set up the SDK's global providers, for `Tracing()` and `Metrics()` to use.

    Args:
        otlp: the address of a collector or backend that accepts OTLP over HTTP, without the path. Spans go to
            `{otlp}/v1/traces`.
        headers: headers to send with each export to `otlp`, e.g. `{"x-mlflow-experiment-id": "0"}`.
        file: a file to append spans to as OTLP JSON, one export per line, for `fluxibly trace FILE`.
        console: print spans to standard error.
        signals: the signals to send to `otlp`: "traces", "metrics" (every minute), "events" (for
            `Tracing(capture="event")`). Backends that accept only traces, such as Phoenix, reject the others.
        service_name: the resource's `service.name`, unless OTEL_SERVICE_NAME is set.

    Raises:
        ImportError: the SDK or its OTLP exporter is not installed.
        RuntimeError: a tracer provider is already set up. Add exporters to that provider instead.
        ValueError: there is no destination, `otlp` is not an http or https URL, or a signal is unknown.
        OSError: the file cannot be written.
    """
    unknown = set(signals) - {"traces", "metrics", "events"}
    if unknown:
        got = ", ".join(map(repr, sorted(unknown)))
        raise ValueError(f"setup(signals=…): expected 'traces', 'metrics' or 'events', got {got}")
    if otlp is None and file is None and not console:
        raise ValueError(
            "setup() needs a destination: otlp='http://127.0.0.1:4318', file='trace.jsonl' or console=True"
        )
    if otlp is not None and not otlp.startswith(("http://", "https://")):
        raise ValueError(f"setup(otlp=…): expected an http:// or https:// URL, got {otlp!r}")
    try:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
    except ImportError as error:
        raise _extra_missing() from error
    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):  # the API's placeholder without an SDK
        raise RuntimeError(  # noqa: TRY004  # the error is not about an argument's type
            "a tracer provider is already set up; setup() is only for programs without a tracer provider. Add the "
            "exporter to the existing provider: provider.add_span_processor(…)"
        )
    resource = Resource.create({"service.name": service_name}).merge(OTELResourceDetector().detect())
    tracers = TracerProvider(resource=resource)
    shutdowns: list[Callable[[], Any]] = [tracers.shutdown]
    for processor in _span_processors(otlp if "traces" in signals else None, headers, file, console=console):
        tracers.add_span_processor(processor)
    if otlp is not None and "metrics" in signals:
        shutdowns.append(_set_up_metrics(resource, otlp, headers))
    if otlp is not None and "events" in signals:
        shutdowns.append(_set_up_events(resource, otlp, headers))
    trace.set_tracer_provider(tracers)
    return Telemetry(shutdowns)


def _span_processors(
    otlp: str | None, headers: Mapping[str, str] | None, file: str | Path | None, *, console: bool
) -> list[Any]:
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SimpleSpanProcessor

    found: list[Any] = []
    if file is not None:
        from fluxibly.telemetry._file_exporter import OTLPFileSpanExporter

        found.append(SimpleSpanProcessor(OTLPFileSpanExporter(file)))
    if console:
        found.append(SimpleSpanProcessor(ConsoleSpanExporter(out=sys.stderr)))
    if otlp is not None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError as error:
            raise _extra_missing() from error
        found.append(BatchSpanProcessor(OTLPSpanExporter(_address(otlp, "traces"), headers=_plain(headers))))
    return found


def _set_up_metrics(resource: Resource, otlp: str, headers: Mapping[str, str] | None) -> Callable[[], Any]:
    from opentelemetry import metrics
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

    exporter = OTLPMetricExporter(_address(otlp, "metrics"), headers=_plain(headers))
    meters = MeterProvider([PeriodicExportingMetricReader(exporter)], resource=resource)
    metrics.set_meter_provider(meters)
    return meters.shutdown


def _set_up_events(resource: Resource, otlp: str, headers: Mapping[str, str] | None) -> Callable[[], Any]:
    from opentelemetry._logs import set_logger_provider
    from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
    from opentelemetry.sdk._logs import LoggerProvider
    from opentelemetry.sdk._logs.export import BatchLogRecordProcessor

    loggers = LoggerProvider(resource=resource)
    loggers.add_log_record_processor(
        BatchLogRecordProcessor(OTLPLogExporter(_address(otlp, "logs"), headers=_plain(headers)))
    )
    set_logger_provider(loggers)
    return loggers.shutdown


def _address(otlp: str, signal: str) -> str:
    return f"{otlp.rstrip('/')}/v1/{signal}"


def _plain(headers: Mapping[str, str] | None) -> dict[str, str] | None:
    return None if headers is None else dict(headers)


def _extra_missing() -> ImportError:
    return ImportError(f"setup() needs the OpenTelemetry SDK and its OTLP exporter: {pip_install('otel')}")
