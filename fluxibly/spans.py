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
from fluxibly.effects import Effect, Send
from fluxibly.propagation import Current, with_trace_headers
from fluxibly.span_attributes import request_attributes
from fluxibly.watch import Watch

if TYPE_CHECKING:
    from opentelemetry.context import Context

    from fluxibly.capture import Capturing
    from fluxibly.types import Request, Response


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
                return Passing(None, context)
            span = tracer.start_span(
                f"{semconv.CHAT} {request.model}",
                context,
                SpanKind.INTERNAL if request.call.provider.in_process else SpanKind.CLIENT,
                request_attributes(request),
            )
            try:
                if span.is_recording():
                    return CallTrace(self.capturing, tracer, span, request, context)
                return Passing(span, context)
            except BaseException:
                span.end()
                raise
        except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
            report(problem)
            return None


class Passing(Watch):
    """A call that is not recorded: only its trace headers go on, from `span` or from the caller's own span."""

    def __init__(self, span: Span | None, context: Context) -> None:
        self.current = None if span is None else Current(set_span_in_context(span, context), context)

    def see(self, effect: Effect) -> None:
        if type(effect) is Send:
            try:
                effect.request = with_trace_headers(effect.request, get_current())
            except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
                report(problem)

    def completed(self, response: Response) -> None:
        if self.current is not None:
            self.current.leave()

    def failed(self, error: BaseException) -> None:
        if self.current is not None:
            self.current.leave()
