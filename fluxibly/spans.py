"""The spans of calls: what `Tracing` does once OpenTelemetry is imported. See `middleware/tracing.py`.

Every step that touches OpenTelemetry or a function of the user's is guarded: what raises there is reported once on
standard error, and the call goes on as if it had not been traced.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from opentelemetry.context import Context, attach, get_current, set_value
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
    set_span_in_context,
)

from fluxibly import semconv
from fluxibly.aggregate import Aggregator
from fluxibly.arrivals import Arrivals
from fluxibly.capture import Captured, Capturing
from fluxibly.combinators import Relay
from fluxibly.effects import AttemptEnd, Effect, More, Send
from fluxibly.errors import StreamInterrupted
from fluxibly.masking import error_message
from fluxibly.outcome import error_type, outcome_of
from fluxibly.propagation import with_trace_headers
from fluxibly.report import report_once
from fluxibly.span_attributes import (
    answered_model,
    error_name,
    provider_attributes,
    record_attributes,
    request_attributes,
    response_attributes,
)
from fluxibly.types import Chunk, Outcome, Request, Response

_UTIL_GENAI = "opentelemetry.util.genai.invocation"


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
        return self._tracer

    def begin(self, request: Request) -> CallTrace | Passing | None:
        """Begin the span of a call and make it current; None if there is nothing to do for this call."""
        try:
            tracer = self.tracer()
            if tracer is None:
                context = get_current()
                if not context or not get_current_span(context).get_span_context().is_valid:
                    return None
                return Passing(None)
            span = tracer.start_span(
                f"{semconv.CHAT} {request.model}",
                kind=SpanKind.INTERNAL if request.call.provider.in_process else SpanKind.CLIENT,
                attributes=request_attributes(request),
            )
            if span.is_recording():
                return CallTrace(self, tracer, span, request)
            return Passing(span)
        except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
            report(problem)
            return None


def report(problem: Exception) -> None:
    """Tell the operator that tracing is broken, without what the exception may quote of a call."""
    report_once("tracing", f"tracing failed with {type(problem).__name__}; calls go on without their spans")


class _Current:
    """A context made current, until `leave`."""

    __slots__ = ("context", "previous", "token")

    def __init__(self, context: Context) -> None:
        self.context = context
        self.previous = get_current()
        self.token: Any = attach(context)  # by default a contextvars.Token

    def leave(self) -> None:
        """Make current what was before.

        A coroutine that nobody finished may be closed in another context than it ran in. Then the token is of no use
        there, and `opentelemetry.context.detach` would log an error.
        """
        try:
            self.token.var.reset(self.token)
        except (AttributeError, ValueError):
            if get_current() is self.context:
                attach(self.previous)


class Passing(Relay):
    """A call that is not recorded: only its trace headers go on, from `span` or from the caller's own span."""

    def __init__(self, span: Span | None) -> None:
        self.current = None if span is None else _Current(set_span_in_context(span))

    def see(self, effect: Effect) -> Effect:
        if type(effect) is Send:
            try:
                context = get_current()
                effect.request = with_trace_headers(effect.request, get_current_span(context), context)
            except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
                report(problem)
        return effect

    def completed(self, _: Response) -> None:
        if self.current is not None:
            self.current.leave()

    def failed(self, _: BaseException) -> None:
        if self.current is not None:
            self.current.leave()


class CallTrace(Relay):
    """The spans of one call that is recorded: its own, and one at a time that of an attempt."""

    def __init__(self, tracers: Tracers, tracer: Tracer, span: Span, request: Request) -> None:
        self.capturing = tracers.capturing
        self.tracer = tracer
        self.span = span
        self.request = self.sent = request
        request.call.watched = True
        self.attempt: Span | None = None
        self.attempt_current: _Current | None = None
        self.index = 0
        self.arrivals = Arrivals(request.call)
        self.until_noted, self.characters = 1, 0
        self.answer: Aggregator | None = None
        if request.call.streaming:
            request.call.timed = True
            if self.capturing.mode != "none":
                self.answer = Aggregator()
        self.current = _Current(_claimed(set_span_in_context(span)))

    def see(self, effect: Effect) -> Effect:
        kind = type(effect)
        if kind is Chunk:  # the only step that is taken for each chunk
            self.characters += len(effect.text)  # type: ignore[union-attr]  # a Chunk, as just seen
            self.until_noted -= 1
            if not self.until_noted:
                self.until_noted = self.arrivals.add(self.characters)
            if self.answer is not None:
                self.answer.add(effect)  # type: ignore[arg-type]  # likewise
            return effect
        if kind is More:
            self.see(effect.chunk)  # type: ignore[union-attr]  # likewise
            return effect
        try:
            if kind is Send:
                self._begin_attempt(effect)  # type: ignore[arg-type]  # likewise
            elif kind is AttemptEnd:
                self._end_attempt(effect.error, effect.response)  # type: ignore[union-attr]  # likewise
        except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
            report(problem)
        return effect

    def restarted(self) -> None:
        self.arrivals.begin()
        self.until_noted, self.characters = 1, 0
        if self.answer is not None:
            self.answer = Aggregator()

    def _begin_attempt(self, send: Send) -> None:
        if self.attempt is not None:
            self._end_attempt(None, None)  # a BaseException ended it, which a layer within survived
        request = self.sent = send.request
        attributes: dict[str, Any] = {
            semconv.ATTEMPT_INDEX: self.index,
            semconv.ATTEMPT_PROVIDER: request.call.provider.telemetry_name,
            semconv.ATTEMPT_MODEL: request.model,
        }
        self.index += 1
        self.attempt = self.tracer.start_span(semconv.ATTEMPT_SPAN, attributes=attributes)
        self.attempt_current = _Current(set_span_in_context(self.attempt))
        send.request = with_trace_headers(request, self.attempt, self.attempt_current.context)

    def _end_attempt(self, error: BaseException | None, response: Response | None) -> None:
        span, self.attempt = self.attempt, None
        current, self.attempt_current = self.attempt_current, None
        if current is not None:
            current.leave()
        if span is None:
            return
        try:
            attributes: dict[str, Any] = {}
            if response is not None and response.model:
                attributes[semconv.ATTEMPT_RESPONSE_MODEL] = response.model
            self._tell(span, attributes, error, outcome_of(error), (self.sent,))
        finally:
            span.end()

    def completed(self, response: Response) -> None:
        """End the call's span: it succeeded."""
        self._end(None, response)

    def failed(self, error: BaseException) -> None:
        """End the call's span: it failed, was cancelled or given up."""
        self._end(error, None)

    def _end(self, error: BaseException | None, response: Response | None) -> None:
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
        except Exception as problem:  # noqa: BLE001  # as above
            report(problem)

    def _describe(self, error: BaseException | None, response: Response | None) -> None:
        span, request = self.span, self.request
        call = request.call
        outcome = outcome_of(error)
        partial = response or _partial(error) or (self.answer.response() if self.answer is not None else None)
        attributes = record_attributes(call)
        if self.arrivals.points:
            attributes[semconv.STREAM_ARRIVALS] = self.arrivals.encoded()
        if partial is not None:
            attributes |= response_attributes(partial)
        if call.model is not None:
            attributes.setdefault(semconv.RESPONSE_MODEL, call.model)
        model = answered_model(request, outcome)
        if model != request.model:
            attributes |= {semconv.REQUEST_MODEL: model, semconv.REQUESTED_MODEL: request.model}
            attributes |= provider_attributes(call.provider)
            span.update_name(f"{semconv.CHAT} {model}")
        requests = (request,) if self.sent.messages is request.messages else (request, self.sent)
        self._tell(span, attributes, error, outcome, requests)
        if self.capturing.mode != "none":
            self._capture(request_attributes(self.request) | attributes, partial, whole=error is None)

    def _capture(self, attributes: Mapping[str, Any], answer: Response | None, *, whole: bool) -> None:
        captured = Captured(self.sent, answer, whole=whole)
        self.capturing.record(captured, self.span, self.current.context, attributes)

    def _tell(
        self,
        span: Span,
        attributes: dict[str, Any],
        error: BaseException | None,
        outcome: Outcome,
        requests: tuple[Request, ...],
    ) -> None:
        """Set `attributes` and how it ended: the outcome, and for an error its type and its masked message."""
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
    """Tell instrumentations built on opentelemetry-util-genai, if one is loaded, that this call has its span.

    They look for their own `InferenceData` under this key, and then make no second span and no second metrics.
    """
    util = sys.modules.get(_UTIL_GENAI)
    data = getattr(util, "InferenceData", None)
    key = getattr(util, "CLIENT_INFERENCE_CONTEXT_KEY", None)
    return context if data is None or key is None else set_value(key, data(), context)
