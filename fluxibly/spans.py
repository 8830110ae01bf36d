"""Where the spans of calls come from: what `middleware/tracing.py` does once OpenTelemetry is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry.context import get_current
from opentelemetry.trace import (
    NoOpTracer,
    ProxyTracerProvider,
    Span,
    SpanKind,
    Tracer,
    TracerProvider,
    get_current_span,
    get_tracer_provider,
    set_span_in_context,
)

from fluxibly import semconv
from fluxibly.call_trace import CallTrace, report
from fluxibly.dropped import end_all_before
from fluxibly.propagation import Current, trace_headers
from fluxibly.span_attributes import request_attributes
from fluxibly.watch import Watch

if TYPE_CHECKING:
    from opentelemetry.context import Context

    from fluxibly.capture import Capturing
    from fluxibly.types import CallRecord, Request, Response


class Tracers:
    """Where the spans of one `Tracing` come from. Notices an SDK that is set up later."""

    def __init__(self, provider: TracerProvider | None, capturing: Capturing) -> None:
        self.given = provider
        self.capturing = capturing
        self._seen: TracerProvider | None = None
        self._tracer: Tracer | None = None

    def tracer(self) -> Tracer | None:
        """The tracer, or None while there is no SDK."""
        provider = self.given or get_tracer_provider()
        if provider is not self._seen:
            tracer = None if isinstance(provider, ProxyTracerProvider) else provider.get_tracer("fluxibly")
            self._tracer = None if isinstance(tracer, NoOpTracer) else tracer
            self._seen = provider
            if self._tracer is not None:
                end_all_before()
        return self._tracer

    def begin(self, request: Request) -> CallTrace | Passing | None:
        """Begin the span of a call and make it current; None if there is nothing to do for this call."""
        try:
            tracer = self.tracer()
            context = get_current()
            if tracer is None:
                if not context or not get_current_span(context).get_span_context().is_valid:
                    return None
                return Passing(request.call, None, context)
            span = tracer.start_span(
                f"{semconv.CHAT} {request.model}",
                context,
                SpanKind.INTERNAL if request.call.provider.in_process else SpanKind.CLIENT,
                request_attributes(request),
            )
            try:
                if span.is_recording():
                    return CallTrace(self.capturing, tracer, span, request, context)
                return Passing(request.call, span, context)
            except BaseException:
                span.end()
                raise
        except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
            report(problem)
            return None


class Passing(Watch):
    """A call that is not recorded: only its trace headers go on, from `span`, which becomes the current one, or else
    from the caller's own span.
    """

    looks_on = False

    def __init__(self, call: CallRecord, span: Span | None, context: Context) -> None:
        self.current: Current | None = None
        if span is None:
            span = get_current_span(context)
        else:
            self.current = Current(set_span_in_context(span, context), context)
            context = self.current.context
        try:
            call.trace_headers = trace_headers(span, context)
        except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
            report(problem)

    def completed(self, response: Response) -> None:
        if self.current is not None:
            self.current.leave()

    def failed(self, error: BaseException) -> None:
        if self.current is not None:
            self.current.leave()
