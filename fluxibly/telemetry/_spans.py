"""The spans of calls: a source of spans, and the spans of one recorded call (its own, those of attempts and of `ask`s).

Every step that touches OpenTelemetry or a function of the user is guarded. An exception there is reported once on
standard error, and the call continues as if it were not traced.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal

import attrs
from opentelemetry.context import Context, get_current
from opentelemetry.trace import (
    NoOpTracer,
    ProxyTracerProvider,
    Span,
    SpanKind,
    Tracer,
    TracerProvider,
    get_current_span,
    get_tracer_provider,
)

from fluxibly._abandoned import end_all_before
from fluxibly._logs import report_once
from fluxibly.aggregate import Aggregator
from fluxibly.errors import StreamInterrupted, outcome_of
from fluxibly.flow.effects import AskEnd, AttemptEnd, Effect, Send
from fluxibly.telemetry import semconv
from fluxibly.telemetry._arrivals import Arrivals
from fluxibly.telemetry._attempts import Attempt, failure_of, set_outcome
from fluxibly.telemetry._attributes import (
    add_response,
    add_unstreamed,
    asked_provider,
    named,
    provider_attributes,
    record_attributes,
    request_attributes,
    usage_attributes,
)
from fluxibly.telemetry._claim import claim
from fluxibly.telemetry._content import Captured, Capturing
from fluxibly.telemetry._propagation import (
    Attached,
    Unrecorded,
    current_span,
    headers_of_attempts,
    trace_headers,
    with_span,
)
from fluxibly.telemetry._sdk import UTIL_GENAI
from fluxibly.types import Usage, with_headers

if TYPE_CHECKING:
    from fluxibly.types import CallRecord, ProviderInfo, Request, Response


_INTERNAL, _CLIENT = SpanKind.INTERNAL, SpanKind.CLIENT  # cached, because looking up an enum member is slow


def report(problem: Exception) -> None:
    """Report that tracing is broken, without the exception's message, because it may quote a call's content."""
    report_once("tracing", f"tracing failed with {type(problem).__name__}; calls continue without spans")


@attrs.frozen
class Recording:
    """How the spans of calls are recorded. `always` says that every attempt is live, and has a span of its own."""

    tracer: Tracer
    capturing: Capturing
    always: bool

    def begin_span(self, request: Request, context: Context) -> Span:
        """Begin the span of a call or of an `ask`."""
        return self.tracer.start_span(
            f"{semconv.CHAT} {request.model}",
            context,
            _INTERNAL if request.call.provider.in_process else _CLIENT,
            request_attributes(request),
        )


class CallTrace:
    """The span of a recorded call, or of an `ask` within it, and the spans of its attempts.

    The span of a call is current until the call ends, that of an `ask` only during each of its attempts. An attempt has
    a span of its own if there are several: the first is live only if `Recording.always` says so, the others always.

    `see`, `restarted` and `end` never raise. `Tracing` does not pass chunks to `see`. For a stream, it adds them to
    `arrivals` and, if content is captured, to `answer`.
    """

    recorded: Literal[True] = True

    def __init__(self, recording: Recording, span: Span, request: Request, context: Context) -> None:
        call = request.call
        self.recording = recording
        self.span = span
        self.request = self.sent = request
        self.call = call
        self.context = with_span(span, context)
        self.current: Attached | None = None
        """Keeps the span of a call current. None for an `ask`."""
        self.provider = asked_provider(request)
        """The provider that the span named at its beginning."""
        self.spent_before = len(call.spent)
        self.attempt: Attempt | None = None
        """The attempt under way."""
        self.attempts: list[Attempt] = []
        """The attempts that were sent and have ended."""
        self.asks: dict[CallRecord, CallTrace] = {}
        """The traces of the `ask`s under way."""
        self.arrivals = Arrivals(call) if call.streaming else None
        self.answer = Aggregator() if call.streaming and recording.capturing.mode != "none" else None
        call.watched = True
        call.timed = call.timed or call.streaming

    def enter(self, context: Context) -> None:
        """Make the span current in `context`, which is the current context."""
        self.current = Attached(self.context, context)

    def see(self, effect: Effect) -> None:
        """Handle an effect that goes outward and is not a chunk."""
        try:
            if type(effect) is Send:
                trace = self._trace_of(effect.request) or self._begin_ask(effect.request)
                trace.begin_attempt(effect)
            elif type(effect) is AttemptEnd:
                if ended := self._trace_of(effect.request):
                    ended.end_attempt(effect.error, effect.response)
            elif type(effect) is AskEnd and (ask := self.asks.pop(effect.request.call, None)):
                ask.end(effect.error, effect.response)
        except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
            report(problem)

    def _trace_of(self, request: Request) -> CallTrace | None:
        """Return the trace that an attempt belongs to, or None for an `ask` that has no span yet."""
        call = request.call
        return self if call is self.call or not call.nested else self.asks.get(call)

    def _begin_ask(self, request: Request) -> CallTrace:
        context = get_current()
        ask = CallTrace(self.recording, self.recording.begin_span(request, context), request, context)
        self.asks[request.call] = ask
        return ask

    def begin_attempt(self, send: Send) -> None:
        """Begin the span of an attempt if it is live, and add trace headers to the request."""
        if self.attempt is not None:  # a BaseException ended it, or it was refused, and an inner layer sends again
            self.end_attempt(GeneratorExit(), None, is_latest=False)
        context = get_current()
        span = self.span
        if self.current is None:
            context = with_span(span, context)
        self.sent = send.request
        attempt = self.attempt = Attempt(send, context)
        if self.attempts or self.recording.always:
            span = attempt.live = attempt.begin_span(self.recording.tracer, len(self.attempts))
        if attempt.live is not None or self.current is None:
            attempt.entry = current_span(span)
        send.request = with_headers(send.request, trace_headers(span, context))

    def end_attempt(self, error: BaseException | None, response: Response | None, *, is_latest: bool = True) -> None:
        """End the attempt under way, if there is one. It is `is_latest` if the record does not know of a later one."""
        attempt, self.attempt = self.attempt, None
        if attempt is None:
            return
        if attempt.entry is not None:
            attempt.entry.leave()
        if not attempt.send.sent:
            return  # it is recorded nowhere: a live span never ends, so it is never exported
        self.attempts.append(attempt)
        call = attempt.send.request.call
        if is_latest:  # a provider that turned to another service by itself has named it
            attempt.provider = call.provider
            attempt.model = call.sent_model or attempt.model
        if response is not None:
            attempt.response_model = response.model
        attempt.finish(error, failure_of(error, (self.sent,), self.recording.capturing), call.usage)

    def restarted(self) -> Aggregator | None:
        """Discard all chunks so far, because the stream starts over. Return the new `answer`."""
        if self.arrivals is not None:
            self.arrivals.begin()
        if self.answer is not None:
            self.answer = Aggregator()
        return self.answer

    def end(self, error: BaseException | None, response: Response | None) -> None:
        """End the span of a call that succeeded, failed, was cancelled or was abandoned, and all spans within it."""
        left = GeneratorExit() if error is None else error
        try:
            for ask in reversed(self.asks.values()):
                ask.end(left, None)
            self.end_attempt(left, None)
        except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
            report(problem)
        if self.current is not None:
            self.current.leave()
        try:
            try:
                if self.span.is_recording():
                    self._record(error, response)
            finally:
                self.span.end()
        except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
            report(problem)

    def _record(self, error: BaseException | None, response: Response | None) -> None:
        outcome = outcome_of(error)
        provider, model, answered = named(self.request, outcome)
        own = self._own_attempts(provider, model)
        if len(self.attempts) > 1 or self.recording.always:
            for number, attempt in enumerate(self.attempts):
                try:
                    attempt.record(self.recording.tracer, number, with_usage=attempt not in own)
                except Exception as problem:  # noqa: BLE001  # the other spans are recorded all the same
                    report(problem)
        partial = response or _partial(error) or (self.answer.response() if self.answer is not None else None)
        attributes = record_attributes(self.call, len(self.attempts)) | self._usage(own)
        attributes |= self._answer(error, response, partial)
        if answered is not None:
            attributes.setdefault(semconv.RESPONSE_MODEL, answered)
        if provider is not self.provider:
            if self.provider.server_address is not None:  # an attribute cannot be removed, so its value is emptied
                attributes |= {semconv.SERVER_ADDRESS: "", semconv.SERVER_PORT: 0}
            attributes |= provider_attributes(provider)
        if model != self.request.model:
            attributes |= {semconv.REQUEST_MODEL: model, semconv.REQUESTED_MODEL: self.request.model}
            self.span.update_name(f"{semconv.CHAT} {model}")
        requests = (self.request,) if self.sent.messages is self.request.messages else (self.request, self.sent)
        set_outcome(self.span, attributes, outcome, failure_of(error, requests, self.recording.capturing))
        if self.recording.capturing.mode != "none":
            captured = Captured(self.sent, partial, whole=error is None)
            everything = request_attributes(self.request) | attributes
            self.recording.capturing.record(captured, self.span, self.context, everything)

    def _own_attempts(self, provider: ProviderInfo, model: str) -> list[Attempt]:
        """Return the attempts whose tokens the span has itself: those at the provider and the model that it names."""
        if len(self.attempts) < 2:
            return self.attempts
        return [attempt for attempt in self.attempts if attempt.asked(provider, model)]

    def _usage(self, own: list[Attempt]) -> dict[str, Any]:
        """Return the tokens of the span's own attempts, and the sum of all tokens if that is more."""
        usage = Usage.sum([attempt.usage for attempt in own])
        everything = self.attempts if self.call.nested else self.call.spent[self.spent_before :]
        total = None if len(everything) == len(own) else Usage.sum([each.usage for each in everything])
        return usage_attributes(usage, total)

    def _answer(
        self, error: BaseException | None, response: Response | None, partial: Response | None
    ) -> dict[str, Any]:
        """Return the attributes of the answer, or of the part of it that came."""
        call = self.call
        attributes: dict[str, Any] = {}
        if self.arrivals is not None and self.arrivals.points:
            attributes[semconv.STREAM_ARRIVALS] = self.arrivals.encoded()
        if partial is not None:
            add_response(attributes, partial)
        if call.streaming:
            if call.chunks == 0 and response is not None:
                add_unstreamed(attributes, response)
            elif call.chunks > 0 and error is not None:
                attributes.setdefault(semconv.RESPONSE_FINISH_REASONS, [call.finish_reason or "error"])
        return attributes


def _partial(error: BaseException | None) -> Response | None:
    return error.partial if isinstance(error, StreamInterrupted) else None


class SpanSource:
    """The source of the spans of one `Tracing`. It notices an SDK that is set up later.

    `chosen` says whether the user has chosen what to capture for this `Tracing`, `always` whether every attempt has a
    span.
    """

    def __init__(self, provider: TracerProvider | None, capturing: Capturing, *, chosen: bool, always: bool) -> None:
        self.given = provider
        self.capturing = capturing
        self.chosen = chosen
        self.always = always
        self._seen: TracerProvider | None = None
        self._recording: Recording | None = None

    def _recording_of(self, provider: TracerProvider) -> Recording | None:
        """Return how spans go to this provider, or None while there is no SDK."""
        tracer = None if isinstance(provider, ProxyTracerProvider) else provider.get_tracer("fluxibly")
        capturing = self.capturing if self.given is not None or self.chosen else self.capturing.by_default()
        recording = None
        if tracer is not None and not isinstance(tracer, NoOpTracer):
            recording = Recording(tracer, capturing, self.always)
            end_all_before()
        self._recording = recording
        self._seen = provider
        return recording

    def begin(self, request: Request) -> CallTrace | Unrecorded | None:
        """Begin the span of a call and make it current. Return None if there is nothing to do for this call.

        A call that is not recorded only sends trace headers: those of its own span, or else of the caller's span.
        """
        try:
            provider = self.given or get_tracer_provider()
            recording = self._recording if provider is self._seen else self._recording_of(provider)
            context = get_current()
            call = request.call
            if recording is None:
                if context and (caller := get_current_span(context)).get_span_context().is_valid:
                    call.trace_headers = headers_of_attempts(caller, context)
                return None
            span = recording.begin_span(request, context)
            try:
                if UTIL_GENAI in sys.modules and call.claim is None:
                    claim(call)
                if span.is_recording():
                    trace = CallTrace(recording, span, request, context)
                    trace.enter(context)
                    return trace
                current = Unrecorded(with_span(span, context), context)
            except BaseException:
                span.end()
                raise
            try:
                call.trace_headers = headers_of_attempts(span, current.context)
            except Exception as problem:  # noqa: BLE001  # the span stays current, so inner calls are unsampled too
                report(problem)
            return current
        except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
            report(problem)
            return None
