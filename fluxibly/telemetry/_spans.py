"""The spans of calls: a source of spans, and the spans of one recorded call (its own, those of attempts and of `ask`s).

Every step that touches OpenTelemetry or a function of the user is guarded. An exception there is reported once on
standard error, and the call continues as if it were not traced.
"""

from __future__ import annotations

import sys
from functools import partial
from time import time_ns
from typing import TYPE_CHECKING, Any, Literal

import attrs
from opentelemetry.context import Context, get_current
from opentelemetry.trace import (
    INVALID_SPAN,
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
from fluxibly.errors import StreamInterrupted, error_type, outcome_of
from fluxibly.telemetry import semconv
from fluxibly.telemetry._arrivals import Arrivals
from fluxibly.telemetry._attempts import Attempt, Failure, failure_of, set_outcome
from fluxibly.telemetry._attributes import (
    add_response,
    add_unstreamed,
    asked_provider,
    error_name,
    named,
    provider_attributes,
    record_attributes,
    request_attributes,
    usage_attributes,
)
from fluxibly.telemetry._claim import claim
from fluxibly.telemetry._content import Captured, Capturing, tool_arguments, tool_result
from fluxibly.telemetry._propagation import (
    Attached,
    Entry,
    Unrecorded,
    current_span,
    links_in,
    trace_headers,
    with_span,
)
from fluxibly.telemetry._sdk import UTIL_GENAI
from fluxibly.types import Usage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from opentelemetry.trace import Link

    from fluxibly.types import Message, ProviderInfo, Request, Response, Tool, ToolCall


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

    def begin_span(self, request: Request, context: Context, links: Sequence[Link] | None = None) -> Span:
        """Begin the span of a call or of an `ask`."""
        return self.tracer.start_span(
            f"{semconv.CHAT} {request.model}",
            context,
            _INTERNAL if request.call.provider.in_process else _CLIENT,
            request_attributes(request),
            links,
        )

    def begin_tool(
        self, tool: Tool, call: ToolCall, context: Context, under_way: list[AskTrace | ToolTrace]
    ) -> ToolTrace | None:
        """Begin the span of a tool's function, whose parent is in `context`. It is in `under_way` until it ends."""
        try:
            return ToolTrace(self, tool, call, context, under_way)
        except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
            report(problem)
            return None


class CallTrace:
    """The span of a recorded call, or of an `ask` within it, and the spans of its attempts.

    It is the observer of the attempts. The span of a call is current until the call ends, that of an `ask` only during
    each of its attempts. An attempt has a span of its own if there are several, or if it is one of a race's. The first is
    live only if `Recording.always` says so or it is one of a race's, the others always.

    No method raises.
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
        self.attempts: list[Attempt] = []
        """The attempts that were sent or are under way, in the order in which they began."""
        self.within: list[AskTrace | ToolTrace] = []
        """The `ask`s and the tools under way, and those within them."""
        self.arrivals: Arrivals | None = None
        """The chunks of a stream, for `Tracing` to run."""
        if call.streaming:
            self.arrivals = Arrivals(call, Aggregator() if recording.capturing.mode != "none" else None)
            call.timed = True

    def enter(self, context: Context) -> None:
        """Make the span current in `context`, which is the current context."""
        self.current = Attached(self.context, context)

    def begin(self, request: Request) -> Attempt:
        """Begin an attempt, and its span if it is live."""
        context = get_current()
        if self.current is None:
            context = with_span(self.span, context)
        attempt = Attempt(request, context, self.end_attempt)
        number = len(self.attempts)
        self.attempts.append(attempt)
        self.sent = request
        try:
            span = self.span
            if number or self.recording.always or request.call.apart:
                span = attempt.live = attempt.begin_span(self.recording.tracer, number)
            if attempt.live is not None or self.current is None:
                attempt.entry = current_span(span)
            attempt.headers = trace_headers(span, context)
        except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
            report(problem)
        return attempt

    def end_attempt(self, attempt: Attempt, response: Response | None, error: BaseException | None, sent: bool) -> None:
        """End an attempt, unless it has ended with the call."""
        if attempt.ended_at is not None:
            return
        attempt.ended_at = time_ns()
        if not sent:  # it is recorded nowhere: a live span never ends, so it is never exported
            self.attempts.remove(attempt)
        elif response is not None:
            self.sent = attempt.request
        try:
            if attempt.entry is not None:
                attempt.entry.leave()
            if sent:
                failure = failure_of(error, (attempt.request,), self.recording.capturing)
                attempt.finish(response, error, failure)
        except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
            report(problem)

    def ask(self) -> AskTrace:
        """Return the observer of an `ask`."""
        return AskTrace(self.recording, self.within)

    def run_tool(self, tool: Tool, call: ToolCall) -> ToolTrace | None:
        """Begin the span of a tool's function."""
        return self.recording.begin_tool(tool, call, get_current(), self.within)

    def end(self, response: Response | None, error: BaseException | None) -> None:
        """End the span of a call that succeeded, failed, was cancelled or was abandoned, and all spans within it."""
        # A layer may have left a flow suspended, which an error's traceback then keeps alive.
        left = GeneratorExit() if error is None else error
        for inner in self.within[::-1]:
            inner.end(None, left)
        for attempt in self.attempts[::-1]:
            attempt.end(None, left, sent=True)
        if self.current is not None:
            self.current.leave()
        try:
            if self.arrivals is not None:
                self.arrivals.flush()
            try:
                if self.span.is_recording():
                    self._record(response, error)
            finally:
                self.span.end()
        except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
            report(problem)
        # The attempts and their requests refer to this trace.
        self.attempts.clear()
        self.sent = self.request

    def _record(self, response: Response | None, error: BaseException | None) -> None:
        outcome = outcome_of(error)
        provider, model, answered = named(self.request, outcome)
        own = self._own_attempts(provider, model)
        for number, attempt in enumerate(self.attempts):
            if attempt.live is not None or len(self.attempts) > 1:
                try:
                    attempt.record(self.recording.tracer, number, with_usage=attempt not in own)
                except Exception as problem:  # noqa: BLE001  # the other spans are recorded all the same
                    report(problem)
        answer = None if self.arrivals is None else self.arrivals.answer
        partial = response or _partial(error) or (None if answer is None else answer.response())
        attributes = record_attributes(self.call, len(self.attempts)) | self._usage(own)
        attributes |= self._answer(response, error, partial)
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
        if not self.call.nested:  # an `ask` shares those of its call
            for decision in self.call.decisions:
                said = {semconv.DECISION_BY: decision.middleware, semconv.DECISION: decision.what}
                self.span.add_event(semconv.DECISION_EVENT, said, decision.at)
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
        self, response: Response | None, error: BaseException | None, partial: Response | None
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


class AskTrace:
    """The observer of an `ask`, whose span begins with its first attempt. An `ask` that sends nothing has none.

    Args:
        under_way: the list that the `ask` is in until it ends.
    """

    def __init__(self, recording: Recording, under_way: list[AskTrace | ToolTrace]) -> None:
        self.recording = recording
        self.under_way = under_way
        self.trace: CallTrace | None = None
        under_way.append(self)

    def begin(self, request: Request) -> Attempt | Unrecorded:
        """Begin an attempt, and with the first the span."""
        try:
            if self.trace is None:
                context = get_current()
                span = self.recording.begin_span(request, context)
                self.trace = CallTrace(self.recording, span, request, context)
            return self.trace.begin(request)
        except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
            report(problem)
            return Unrecorded(INVALID_SPAN, get_current(), {})

    def ask(self) -> AskTrace:
        """Return the observer of an `ask` within this."""
        return AskTrace(self.recording, self.under_way)

    def run_tool(self, tool: Tool, call: ToolCall) -> ToolTrace | None:
        """Begin the span of a tool's function."""
        context = get_current()
        if self.trace is not None:
            context = with_span(self.trace.span, context)
        return self.recording.begin_tool(tool, call, context, self.under_way)

    def end(self, response: Response | None, error: BaseException | None) -> None:
        """End the span."""
        if self in self.under_way:
            self.under_way.remove(self)
            if self.trace is not None:
                self.trace.end(response, error)


class ToolTrace:
    """The span of a tool's function, which runs for a call of the model.

    The span has the error's class alone, because the message may quote arguments, or what the function works with.

    Args:
        under_way: the list that it is in until it ends.
    """

    def __init__(
        self, recording: Recording, tool: Tool, call: ToolCall, context: Context, under_way: list[AskTrace | ToolTrace]
    ) -> None:
        self.capturing = capturing = recording.capturing
        self.under_way = under_way
        attributes: dict[str, Any] = {
            semconv.OPERATION: semconv.EXECUTE_TOOL,
            semconv.TOOL_NAME: tool.name,
            semconv.TOOL_TYPE: "function",
        }
        if call.id:
            attributes[semconv.TOOL_CALL_ID] = call.id
        if description := capturing.redacted(tool.description):
            attributes[semconv.TOOL_DESCRIPTION] = description
        if (arguments := capturing.of_tool(partial(tool_arguments, call))) is not None:
            attributes[semconv.TOOL_CALL_ARGUMENTS] = arguments
        name = f"{semconv.EXECUTE_TOOL} {tool.name}"
        self.span = recording.tracer.start_span(name, context, _INTERNAL, attributes)
        under_way.append(self)

    def enter(self) -> Entry | None:
        """Make the span current, in this thread or task."""
        try:
            return current_span(self.span)
        except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
            report(problem)
            return None

    def leave(self, token: Entry | None) -> None:
        """Make the span current that was before."""
        try:
            if token is not None:
                token.leave()
        except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
            report(problem)

    def end(self, result: Message | None, error: BaseException | None) -> None:
        """End the span."""
        if self not in self.under_way:
            return
        self.under_way.remove(self)
        try:
            try:
                attributes: dict[str, Any] = {}
                captured = None if result is None else self.capturing.of_tool(partial(tool_result, result))
                if captured is not None:
                    attributes[semconv.TOOL_CALL_RESULT] = captured
                failure = None
                if error is not None and not isinstance(error, GeneratorExit):
                    failure = Failure(error_name(error), error_type(error), "")
                set_outcome(self.span, attributes, outcome_of(error), failure)
            finally:
                self.span.end()
        except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
            report(problem)


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
            if recording is None:
                if context and (caller := get_current_span(context)).get_span_context().is_valid:
                    return Unrecorded(caller, context, trace_headers(caller, context))
                return None
            span = recording.begin_span(request, context, links_in(context) if context else None)
            try:
                if UTIL_GENAI in sys.modules and request.call.claim is None:
                    claim(request.call)
                if span.is_recording():
                    trace = CallTrace(recording, span, request, context)
                    trace.enter(context)
                    return trace
                current = Attached(with_span(span, context), context)
            except BaseException:
                span.end()
                raise
            headers: Mapping[str, str] = {}
            try:
                headers = trace_headers(span, current.context)
            except Exception as problem:  # noqa: BLE001  # the span stays current, so inner calls are unsampled too
                report(problem)
            return Unrecorded(span, current.context, headers, current)
        except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
            report(problem)
            return None
