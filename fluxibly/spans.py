"""Where the spans of calls come from: what `middleware/tracing.py` does once OpenTelemetry is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry.context import get_current
from opentelemetry.trace import (
    NoOpTracer,
    ProxyTracerProvider,
    SpanKind,
    Tracer,
    TracerProvider,
    get_current_span,
    get_tracer_provider,
)

from fluxibly import semconv
from fluxibly._abandoned import end_all_before
from fluxibly.call_trace import CallTrace, report
from fluxibly.propagation import Current, trace_headers, with_span
from fluxibly.span_attributes import request_attributes

if TYPE_CHECKING:
    from fluxibly.capture import Capturing
    from fluxibly.types import Request

_INTERNAL, _CLIENT = SpanKind.INTERNAL, SpanKind.CLIENT  # to look up a member of an enumeration takes its time


class Tracers:
    """Where the spans of one `Tracing` come from. Notices an SDK that is set up later."""

    def __init__(self, provider: TracerProvider | None, capturing: Capturing) -> None:
        self.given = provider
        self.capturing = capturing
        self._seen: TracerProvider | None = None
        self._tracer: Tracer | None = None

    def _tracer_of(self, provider: TracerProvider) -> Tracer | None:
        """The tracer, or None while there is no SDK."""
        tracer = None if isinstance(provider, ProxyTracerProvider) else provider.get_tracer("fluxibly")
        self._tracer = None if isinstance(tracer, NoOpTracer) else tracer
        self._seen = provider
        if self._tracer is not None:
            end_all_before()
        return self._tracer

    def begin(self, request: Request) -> CallTrace | Current | None:
        """Begin the span of a call and make it current; None if there is nothing to do for this call.

        Of a call that is not recorded, only the trace headers go on: from its span, or else from the caller's.
        """
        try:
            provider = self.given or get_tracer_provider()
            tracer = self._tracer if provider is self._seen else self._tracer_of(provider)
            context = get_current()
            call = request.call
            if tracer is None:
                if context and (caller := get_current_span(context)).get_span_context().is_valid:
                    call.trace_headers = trace_headers(caller, context)
                return None
            span = tracer.start_span(
                f"{semconv.CHAT} {request.model}",
                context,
                _INTERNAL if call.provider.in_process else _CLIENT,
                request_attributes(request),
            )
            try:
                if span.is_recording():
                    return CallTrace(self.capturing, tracer, span, request, context)
                current = Current(with_span(span, context), context)
            except BaseException:
                span.end()
                raise
            try:
                call.trace_headers = trace_headers(span, current.context)
            except Exception as problem:  # noqa: BLE001  # as below; the calls below this one are not sampled either
                report(problem)
            return current
        except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
            report(problem)
            return None
