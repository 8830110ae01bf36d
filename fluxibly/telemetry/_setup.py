"""An OpenTelemetry SDK in one line, for programs that have none set up. Needs the SDK and its OTLP exporter."""

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
    """What `setup` has set up. It is shut down when the process ends; `shutdown` does it sooner."""

    _shutdowns: list[Callable[[], Any]]

    def shutdown(self) -> None:
        """Send what is still waiting, and end. Twice is fine."""
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
        otlp: the address of a collector or backend that takes OTLP over HTTP, without the path: spans go to
            `{otlp}/v1/traces`.
        headers: sent to it along with each export, e.g. `{"x-mlflow-experiment-id": "0"}`.
        file: where to append spans as OTLP JSON, one export a line, for `fluxibly trace FILE`.
        console: print spans to standard error.
        signals: what goes to `otlp`: "traces", "metrics" (each minute), "events" (for `Tracing(capture="event")`).
            Backends for traces alone, such as Phoenix, refuse the others.
        service_name: the resource's `service.name`, unless OTEL_SERVICE_NAME gives one.

    Raises:
        ImportError: the SDK or its OTLP exporter is not installed.
        RuntimeError: a tracer provider is set up already; add exporters to that one.
        ValueError: no destination is given, an address that is no http or https URL, or an unknown signal.
        OSError: the file cannot be written.
    """
    unknown = set(signals) - {"traces", "metrics", "events"}
    if unknown:
        raise ValueError(f"setup(signals=…) takes traces, metrics and events, not {', '.join(sorted(unknown))}")
    if otlp is None and file is None and not console:
        raise ValueError(
            "setup() needs a destination: otlp='http://127.0.0.1:4318', file='trace.jsonl' or console=True"
        )
    if otlp is not None and not otlp.startswith(("http://", "https://")):
        raise ValueError(f"setup(otlp=…) takes an http:// or https:// URL, not {otlp!r}")
    try:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
    except ImportError as error:
        raise _extra_missing() from error
    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):  # the API's, while there is no SDK
        raise RuntimeError(  # noqa: TRY004  # not an argument's type
            "a tracer provider is set up already; setup() is for programs without one. Add the exporter to yours: "
            "provider.add_span_processor(…)"
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
    return ImportError(f"this needs the OpenTelemetry SDK and its OTLP exporter: {pip_install('otel')}")
