"""The attempts of a call or of an `ask`, with the facts about each, until its span can be recorded.

The span of an attempt is recorded when the call ends, with the times of the attempt. Only then is it known whether there
were several attempts, and which of them asked the provider and the model that the call's span names. An attempt that is
live has a span from its beginning, for the requests that leave the process.
"""

from __future__ import annotations

from time import time_ns
from typing import TYPE_CHECKING, Any, NamedTuple

from opentelemetry.trace import Status, StatusCode

from fluxibly._masking import error_message
from fluxibly.errors import error_type, outcome_of
from fluxibly.telemetry import semconv
from fluxibly.telemetry._attributes import error_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

    from fluxibly.telemetry._content import Capturing
    from fluxibly.telemetry._propagation import Entry
    from fluxibly.types import Outcome, ProviderInfo, Request, Response, Usage


class Failure(NamedTuple):
    """An error as spans show it. The exception itself is not kept, because its frames refer to the call."""

    name: str
    """The value of `error.type`."""
    kind: str
    """The class of the exception."""
    message: str


def failure_of(error: BaseException | None, requests: Iterable[Request], capturing: Capturing) -> Failure | None:
    """Return an error as spans show it, with its message masked. A stream that was given up has not failed."""
    if error is None or isinstance(error, GeneratorExit):
        return None
    return Failure(error_name(error), error_type(error), capturing.redacted(error_message(error, requests)))


def set_outcome(
    span: Span, attributes: dict[str, Any], outcome: Outcome, failure: Failure | None, at: int | None = None
) -> None:
    """Set `attributes`, the outcome and the failure on the span. `at` is the time of the failure, by default now."""
    attributes[semconv.OUTCOME] = outcome
    if failure is None:
        span.set_attributes(attributes)
        return
    attributes[semconv.ERROR_TYPE] = failure.name
    span.set_attributes(attributes)
    span.set_status(Status(StatusCode.ERROR, failure.message or failure.name))
    event = {semconv.EXCEPTION_TYPE: failure.kind, semconv.EXCEPTION_MESSAGE: failure.message}
    span.add_event(semconv.EXCEPTION_EVENT, event, at)


class Attempt:
    """An attempt. `context` holds the span that is the parent of the attempt's.

    `send` calls `end`, which calls `when_ended` with the attempt and its own arguments.
    """

    __slots__ = (
        "context",
        "ended_at",
        "entry",
        "failure",
        "headers",
        "live",
        "model",
        "outcome",
        "provider",
        "request",
        "response_model",
        "started_at",
        "usage",
        "when_ended",
    )

    def __init__(
        self,
        request: Request,
        context: Context,
        when_ended: Callable[[Attempt, Response | None, BaseException | None, bool], None],
    ) -> None:
        self.request = request
        self.context = context
        self.when_ended = when_ended
        self.headers: Mapping[str, str] = {}
        self.started_at = time_ns()
        self.ended_at: int | None = None
        self.provider: ProviderInfo = request.call.provider
        self.model: str = request.model
        self.live: Span | None = None
        self.entry: Entry | None = None
        """Keeps a span current during the attempt, if it is not current already."""
        self.outcome: Outcome = "completed"
        self.failure: Failure | None = None
        self.response_model: str | None = None
        self.usage: Usage | None = None

    def begin_span(self, tracer: Tracer, number: int) -> Span:
        """Begin the span of the attempt with this number, from 0, as of the time when the attempt began."""
        attributes: dict[str, Any] = {
            semconv.ATTEMPT_INDEX: number,
            semconv.ATTEMPT_PROVIDER: self.provider.telemetry_name,
            semconv.ATTEMPT_MODEL: self.model,
        }
        return tracer.start_span(semconv.ATTEMPT_SPAN, self.context, attributes=attributes, start_time=self.started_at)

    def end(self, response: Response | None, error: BaseException | None, *, sent: bool) -> None:
        self.when_ended(self, response, error, sent)

    def finish(self, response: Response | None, error: BaseException | None, failure: Failure | None) -> None:
        """Note how the attempt has ended."""
        call = self.request.call
        # A provider that turned to another service by itself has named it.
        self.provider = call.provider
        self.model = call.sent_model or self.model
        self.response_model = None if response is None else response.model
        self.usage = call.usage
        self.outcome = outcome_of(error)
        self.failure = failure

    def asked(self, provider: ProviderInfo, model: str) -> bool:
        """Whether the attempt asked this model of this provider."""
        return self.model == model and self.provider.telemetry_name == provider.telemetry_name

    def record(self, tracer: Tracer, number: int, *, with_usage: bool) -> None:
        """Record the span of the attempt, which has ended."""
        span = self.begin_span(tracer, number) if self.live is None else self.live
        try:
            # A provider that turns to another service by itself names it only while the attempt is under way.
            attributes: dict[str, Any] = {
                semconv.ATTEMPT_PROVIDER: self.provider.telemetry_name,
                semconv.ATTEMPT_MODEL: self.model,
            }
            if self.response_model:
                attributes[semconv.ATTEMPT_RESPONSE_MODEL] = self.response_model
            if with_usage and self.usage is not None:
                if self.usage.input_tokens is not None:
                    attributes[semconv.ATTEMPT_INPUT] = self.usage.input_tokens
                if self.usage.output_tokens is not None:
                    attributes[semconv.ATTEMPT_OUTPUT] = self.usage.output_tokens
            set_outcome(span, attributes, self.outcome, self.failure, self.ended_at)
        finally:
            span.end(self.ended_at)
