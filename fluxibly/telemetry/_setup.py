"""Setup of an OpenTelemetry SDK in one line, for programs that have not set up an SDK.

It needs the SDK and its OTLP exporter.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import attrs

from fluxibly._checks import one_of
from fluxibly._extras import pip_install

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.sdk.trace.export import SpanExporter

    from fluxibly.telemetry._content import Capture

Signal: TypeAlias = Literal["traces", "metrics", "events"]
_DELAY = "OTEL_BSP_SCHEDULE_DELAY"
_TRACES: tuple[Signal, ...] = ("traces",)


@attrs.frozen(eq=False)
class Telemetry:
    """The SDK that `setup` has set up. It shuts down when the process ends, or earlier by `shutdown`."""

    _shutdowns: list[Callable[[], Any]] = attrs.field(repr=False)

    def shutdown(self) -> None:
        """Export all waiting data and shut down. A second call does nothing."""
        while self._shutdowns:
            self._shutdowns.pop(0)()

    @property
    def running(self) -> bool:
        """Whether it still exports: `shutdown` was not called."""
        return bool(self._shutdowns)


_lock = threading.Lock()
_done: list[tuple[Mapping[str, Any], Telemetry]] = []
"""The arguments of the first `setup`, and what it returned."""


def setup(
    *,
    otlp: str | None = None,
    headers: Mapping[str, str] | None = None,
    file: str | Path | None = None,
    console: bool = False,
    signals: Collection[Signal] = _TRACES,
    service_name: str = "fluxibly",
    capture: Capture | None = None,
) -> Telemetry:
    """Set up the SDK's global providers, for `Tracing()` and `Metrics()` to use.

    A second call with the same arguments returns the same object. Threads of the SDK do the exports, so no call waits for
    a file, a terminal or a network. What waits is exported when the process ends, also by Ctrl-C. A process that is
    killed, or a forked one that ends by `os._exit` without `shutdown()` (those of multiprocessing do), loses the spans
    of its last second, or of its last five if they go to `otlp`.

    Args:
        otlp: the address of a collector or backend that accepts OTLP over HTTP, without the path. Spans go to
            `{otlp}/v1/traces`.
        headers: headers to send with each export to `otlp`, e.g. `{"x-mlflow-experiment-id": "0"}`.
        file: a file to append spans to as OTLP JSON, one export per line, for `fluxibly trace FILE`.
        console: print spans to standard error.
        signals: the signals to send to `otlp`: "traces", "metrics" (every minute), "events" (for
            `Tracing(capture="event")`). Backends that accept only traces, such as Phoenix, reject the others.
        service_name: the resource's `service.name`, unless OTEL_SERVICE_NAME is set.
        capture: where every `Tracing()` that does not say it itself records prompts and answers; see `Tracing`.

    Raises:
        ImportError: the SDK or its OTLP exporter is not installed.
        RuntimeError: a tracer provider is already set up. Add exporters to that provider instead. Or `setup` was called
            before with other arguments, or its SDK has been shut down.
        ValueError: there is no destination, `otlp` is not an http or https URL, or a signal or `capture` is unknown.
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
    wrong = None if capture is None else one_of("setup(capture=…)", capture, ("none", "span", "event", "both"))
    if wrong is not None:
        raise ValueError(wrong)
    if capture in ("event", "both") and (otlp is None or "events" not in signals):
        raise ValueError(f"setup(capture={capture!r}) needs otlp=… and 'events' among the signals")
    settings: dict[str, Any] = {
        "otlp": None if otlp is None else otlp.rstrip("/"),
        "headers": _plain(headers),
        "file": None if file is None else Path(file).absolute(),
        "console": console,
        "signals": frozenset(signals),
        "service_name": service_name,
        "capture": capture,
    }
    with _lock:
        if not _done:
            _done.append((settings, Telemetry(_set_up(**settings))))
        before, telemetry = _done[0]
    other = [name for name, value in settings.items() if value != before[name]]
    if other:
        raise RuntimeError(
            f"setup() was called before, with another {', another '.join(other)}; a process has one SDK: say all in one "
            "call"
        )
    if not telemetry.running:
        raise RuntimeError("the SDK of setup() has been shut down; a process can set up an SDK only once")
    return telemetry


def _set_up(
    *,
    otlp: str | None,
    headers: dict[str, str] | None,
    file: Path | None,
    console: bool,
    signals: frozenset[Signal],
    service_name: str,
    capture: Capture | None,
) -> list[Callable[[], Any]]:
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
    if capture is not None:
        from fluxibly.telemetry._content import capture_by_default

        capture_by_default(capture)
    trace.set_tracer_provider(tracers)
    return shutdowns


def _span_processors(
    otlp: str | None, headers: dict[str, str] | None, file: Path | None, *, console: bool
) -> list[SpanProcessor]:
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

    found: list[SpanProcessor] = []
    if file is not None:
        try:
            from fluxibly.telemetry._file_exporter import OTLPFileSpanExporter
        except ImportError as error:
            raise _extra_missing() from error
        found.append(_soon(OTLPFileSpanExporter(file)))
    if console:
        found.append(_soon(ConsoleSpanExporter(out=sys.stderr)))
    if otlp is not None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError as error:
            raise _extra_missing() from error
        found.append(BatchSpanProcessor(OTLPSpanExporter(_address(otlp, "traces"), headers=headers)))
    return found


def _soon(exporter: SpanExporter) -> SpanProcessor:
    """Return a processor that exports within a second, in a thread of its own: an event loop must not wait for a disk."""
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return BatchSpanProcessor(exporter, schedule_delay_millis=None if _DELAY in os.environ else 1000)


def _set_up_metrics(resource: Resource, otlp: str, headers: dict[str, str] | None) -> Callable[[], Any]:
    from opentelemetry import metrics
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

    exporter = OTLPMetricExporter(_address(otlp, "metrics"), headers=headers)
    meters = MeterProvider([PeriodicExportingMetricReader(exporter)], resource=resource)
    metrics.set_meter_provider(meters)
    return meters.shutdown


def _set_up_events(resource: Resource, otlp: str, headers: dict[str, str] | None) -> Callable[[], Any]:
    from opentelemetry._logs import set_logger_provider
    from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
    from opentelemetry.sdk._logs import LoggerProvider
    from opentelemetry.sdk._logs.export import BatchLogRecordProcessor

    loggers = LoggerProvider(resource=resource)
    loggers.add_log_record_processor(BatchLogRecordProcessor(OTLPLogExporter(_address(otlp, "logs"), headers=headers)))
    set_logger_provider(loggers)
    return loggers.shutdown


def _address(otlp: str, signal: str) -> str:
    return f"{otlp.rstrip('/')}/v1/{signal}"


def _plain(headers: Mapping[str, str] | None) -> dict[str, str] | None:
    return None if headers is None else dict(headers)


def _extra_missing() -> ImportError:
    return ImportError(f"setup() needs the OpenTelemetry SDK and its OTLP exporter: {pip_install('otel')}")
