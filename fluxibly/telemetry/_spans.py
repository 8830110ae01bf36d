"""The spans of calls: a source of spans, and the spans of one recorded call (its own, and one for each attempt).

Every step that touches OpenTelemetry or a function of the user is guarded. An exception there is reported once on
standard error, and the call continues as if it were not traced.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal

from opentelemetry.context import Context, get_current, set_value
from opentelemetry.trace import (
    NoOpTracer,
    ProxyTracerProvider,
    Span,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    TracerProvider,
    get_current_span,
    get_tracer_provider,
)

from fluxibly._abandoned import end_all_before
from fluxibly._logs import report_once
from fluxibly._masking import error_message
from fluxibly.aggregate import Aggregator
from fluxibly.errors import StreamInterrupted, error_type, outcome_of
from fluxibly.flow.effects import AttemptEnd, Effect, Send
from fluxibly.telemetry import semconv
from fluxibly.telemetry._arrivals import Arrivals
from fluxibly.telemetry._attributes import (
    add_response,
    add_unstreamed,
    answered_model,
    error_name,
    provider_attributes,
    record_attributes,
    request_attributes,
)
from fluxibly.telemetry._content import Captured, Capturing
from fluxibly.telemetry._propagation import Current, trace_headers, with_span
from fluxibly.types import with_headers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fluxibly.telemetry._content import Capturing
    from fluxibly.types import Outcome, Request, Response


_INTERNAL, _CLIENT = SpanKind.INTERNAL, SpanKind.CLIENT  # cached, because looking up an enum member is slow


_UTIL_GENAI = "opentelemetry.util.genai.invocation"


def report(problem: Exception) -> None:
    """Report that tracing is broken, without the exception's message, because it may quote a call's content."""
    report_once("tracing", f"tracing failed with {type(problem).__name__}; calls continue without spans")


class CallTrace:
    """The spans of one recorded call: its own, and that of the current attempt. No method raises.

    `Tracing` does not pass chunks to `see`. For a stream, it adds them to `arrivals` and, if content is captured, to
    `answer`.
    """

    recorded: Literal[True] = True

    def __init__(self, capturing: Capturing, tracer: Tracer, span: Span, request: Request, context: Context) -> None:
        call = request.call
        self.capturing = capturing
        self.tracer = tracer
        self.span = span
        self.request = self.sent = request
        self.attempt: Span | None = None
        self.attempt_current: Current | None = None
        self.index = 0
        self.provider = self.asked = call.provider
        call.watched = True
        self.arrivals = Arrivals(call) if call.streaming else None
        self.answer = Aggregator() if call.streaming and capturing.mode != "none" else None
        call.timed = call.timed or call.streaming
        self.current = Current(_claimed(with_span(span, context)), context)

    def see(self, effect: Effect) -> None:
        """Handle an effect that goes outward and is not a chunk."""
        try:
            if type(effect) is Send:
                self._begin_attempt(effect)
            elif type(effect) is AttemptEnd:
                self._end_attempt(effect.error, effect.response)
        except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
            report(problem)

    def _begin_attempt(self, send: Send) -> None:
        if self.attempt is not None:
            self._end_attempt(None, None)  # a BaseException ended the attempt, and an inner layer caught it
        request = self.sent = send.request
        self.asked = request.call.provider
        attributes: dict[str, Any] = {
            semconv.ATTEMPT_INDEX: self.index,
            semconv.ATTEMPT_PROVIDER: self.asked.telemetry_name,
            semconv.ATTEMPT_MODEL: request.model,
        }
        self.index += 1
        self.attempt = self.tracer.start_span(semconv.ATTEMPT_SPAN, attributes=attributes)
        context = get_current()
        self.attempt_current = Current(with_span(self.attempt, context), context)
        send.request = with_headers(request, trace_headers(self.attempt, self.attempt_current.context))

    def _end_attempt(self, error: BaseException | None, response: Response | None) -> None:
        span, self.attempt = self.attempt, None
        current, self.attempt_current = self.attempt_current, None
        if current is not None:
            current.leave()
        if span is None:
            return
        try:
            attributes: dict[str, Any] = {}
            provider = self.request.call.provider
            if provider is not self.asked:  # a routing provider has replaced `call.provider` with its choice
                attributes[semconv.ATTEMPT_PROVIDER] = provider.telemetry_name
            if response is not None and response.model:
                attributes[semconv.ATTEMPT_RESPONSE_MODEL] = response.model
            if error is None and self.request.call.sent_model != self.sent.model:  # a router may replace the model too
                attributes[semconv.ATTEMPT_MODEL] = self.request.call.sent_model
            self._set_outcome(span, attributes, error, outcome_of(error), (self.sent,))
        finally:
            span.end()

    def restarted(self) -> Aggregator | None:
        """Discard all chunks so far, because the stream starts over. Return the new `answer`."""
        if self.arrivals is not None:
            self.arrivals.begin()
        if self.answer is not None:
            self.answer = Aggregator()
        return self.answer

    def completed(self, response: Response) -> None:
        """End the span of a call that succeeded."""
        self._end(None, response)

    def failed(self, error: BaseException) -> None:
        """End the span of a call that failed, was cancelled or was abandoned."""
        self._end(error, None)

    def _end(self, error: BaseException | None, response: Response | None) -> None:
        if self.attempt is not None:
            try:
                self._end_attempt(error, None)
            except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
                report(problem)
        self.current.leave()
        try:
            try:
                self._describe(error, response)
            finally:
                self.span.end()
        except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
            report(problem)

    def _describe(self, error: BaseException | None, response: Response | None) -> None:
        span, request = self.span, self.request
        call = request.call
        outcome = outcome_of(error)
        partial = response or _partial(error) or (self.answer.response() if self.answer is not None else None)
        attributes = record_attributes(call, self.index)
        if self.arrivals is not None and self.arrivals.points:
            attributes[semconv.STREAM_ARRIVALS] = self.arrivals.encoded()
        if partial is not None:
            add_response(attributes, partial)
        if call.streaming:
            if call.chunks == 0 and response is not None:
                add_unstreamed(attributes, response)
            elif call.chunks > 0 and error is not None:
                attributes.setdefault(semconv.RESPONSE_FINISH_REASONS, [call.finish_reason or "error"])
        if call.model is not None:
            attributes.setdefault(semconv.RESPONSE_MODEL, call.model)
        model = answered_model(request, outcome)
        if call.provider is not self.provider:
            if self.provider.server_address is not None:  # an attribute cannot be removed, so its value is emptied
                attributes |= {semconv.SERVER_ADDRESS: "", semconv.SERVER_PORT: 0}
            attributes |= provider_attributes(call.provider)
        if model != request.model:
            attributes |= {semconv.REQUEST_MODEL: model, semconv.REQUESTED_MODEL: request.model}
            span.update_name(f"{semconv.CHAT} {model}")
        requests = (request,) if self.sent.messages is request.messages else (request, self.sent)
        self._set_outcome(span, attributes, error, outcome, requests)
        if self.capturing.mode != "none":
            self._capture(request_attributes(self.request) | attributes, partial, whole=error is None)

    def _capture(self, attributes: Mapping[str, Any], answer: Response | None, *, whole: bool) -> None:
        captured = Captured(self.sent, answer, whole=whole)
        self.capturing.record(captured, self.span, self.current.context, attributes)

    def _set_outcome(
        self,
        span: Span,
        attributes: dict[str, Any],
        error: BaseException | None,
        outcome: Outcome,
        requests: tuple[Request, ...],
    ) -> None:
        """Set `attributes` and the outcome on the span, and for an error its type and masked message."""
        attributes[semconv.OUTCOME] = outcome
        if error is None or outcome == "abandoned":
            span.set_attributes(attributes)
            return
        attributes[semconv.ERROR_TYPE] = name = error_name(error)
        span.set_attributes(attributes)
        message = self.capturing.redacted(error_message(error, requests))
        span.set_status(Status(StatusCode.ERROR, message or name))
        span.add_event(
            semconv.EXCEPTION_EVENT,
            {semconv.EXCEPTION_TYPE: error_type(error), semconv.EXCEPTION_MESSAGE: message},
        )


def _partial(error: BaseException | None) -> Response | None:
    return error.partial if isinstance(error, StreamInterrupted) else None


def _claimed(context: Context) -> Context:
    """Mark the call as traced for instrumentations that are built on opentelemetry-util-genai, if any is loaded.

    If they find their own `InferenceData` under this key, they do not create a second span or second metrics.
    """
    util = sys.modules.get(_UTIL_GENAI)
    data = getattr(util, "InferenceData", None)
    key = getattr(util, "CLIENT_INFERENCE_CONTEXT_KEY", None)
    if data is None or key is None:
        return context
    try:
        return set_value(key, data(), context)
    except Exception as problem:  # noqa: BLE001  # perhaps another release of that package; the call is traced anyway
        report(problem)
        return context


class SpanSource:
    """The source of the spans of one `Tracing`. It notices an SDK that is set up later.

    `chosen` says whether the user has chosen what to capture for this `Tracing`.
    """

    def __init__(self, provider: TracerProvider | None, capturing: Capturing, *, chosen: bool) -> None:
        self.given = provider
        self.capturing = capturing
        self.chosen = chosen
        self._seen: TracerProvider | None = None
        self._tracer: Tracer | None = None

    def _tracer_of(self, provider: TracerProvider) -> Tracer | None:
        """Return the provider's tracer, or None while there is no SDK."""
        tracer = None if isinstance(provider, ProxyTracerProvider) else provider.get_tracer("fluxibly")
        self._tracer = None if isinstance(tracer, NoOpTracer) else tracer
        self._seen = provider
        if self._tracer is not None:
            end_all_before()
        if self.given is None and not self.chosen:
            self.capturing = self.capturing.by_default()
        return self._tracer

    def begin(self, request: Request) -> CallTrace | Current | None:
        """Begin the span of a call and make it current. Return None if there is nothing to do for this call.

        A call that is not recorded only sends trace headers: those of its own span, or else of the caller's span.
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
            except Exception as problem:  # noqa: BLE001  # the span stays current, so inner calls are unsampled too
                report(problem)
            return current
        except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
            report(problem)
            return None
