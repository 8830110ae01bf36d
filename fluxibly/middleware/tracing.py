"""Middleware that records spans of calls and of their attempts, for any OpenTelemetry SDK."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import attrs

from fluxibly._checks import one_of, validator
from fluxibly.flow import CallNext, Flow
from fluxibly.flow.culprits import check_delivered
from fluxibly.middleware._copies import Rebuilt
from fluxibly.middleware._redact_setting import RedactText, check_redact, redact_text, to_redact
from fluxibly.telemetry._sdk import may_have_sdk
from fluxibly.types import Request, Response, observed

if TYPE_CHECKING:
    from opentelemetry._logs import LoggerProvider
    from opentelemetry.trace import TracerProvider

    from fluxibly.middleware.redact import Redact
    from fluxibly.telemetry._content import Capture
    from fluxibly.telemetry._spans import SpanSource


@attrs.frozen(kw_only=True)
class Tracing(Rebuilt):
    """Middleware that records a span for each call, and child spans for its attempts if there are several.

    The spans follow the conventions for generative AI. `Tracing` uses the SDK that the application has set up, even if
    it is set up later. Without an SDK, it costs almost nothing. Put `Tracing` outside of `Retry` and fallbacks, so that
    one span covers all of them. Put only one `Tracing` into a stack, because each creates its own span for the call,
    with the tokens.

    Every request carries `traceparent`: that of the call's span for the first attempt, and of its own span for each
    later attempt, which is current during that attempt. If there were several attempts, the span of the first is
    recorded afterwards. The span of a call has the tokens of all attempts at the provider and the model that it names:
    those that answered. Attempts elsewhere have their tokens as `fluxibly.attempt.…`, and the call has the sum of all
    tokens as `fluxibly.usage.total_…`. An `ask` within the call has a span of its own, with its own tokens and attempts. So
    has each run of a tool's function (`Tools`), which is current in the function: `execute_tool NAME`.

    SDKs behind a provider may be instrumented, too. Instrumentations that are built on opentelemetry-util-genai record
    nothing during an attempt, whether the call is sampled or not. They do record calls that a middleware makes itself, in
    `perform`.

    Args:
        attempts: "auto", or "always" for a span for every attempt from its beginning, even if there is no other.
        capture: where to record prompts, answers and tool definitions: "none", "span" (as attributes), "event" (as
            `gen_ai.client.inference.operation.details`) or "both". None uses what `telemetry.setup(capture=…)` says
            (unless there is a `tracer_provider`), else the environment variable
            OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT as it is when this object is created, else "none".
        redact: a `Redact`, or a function that receives a text and returns the text to record instead. Every text that would be
            recorded passes it, including error messages. If it raises, no content of that call is recorded.
        tracer_provider, logger_provider: by default the global providers.

    Raises:
        ValueError: `attempts` or `capture` is not one of these words.
        ConfigError: `redact` is none of these.
    """

    attempts: Literal["auto", "always"] = attrs.field(default="auto", validator=validator(one_of, ("auto", "always")))
    capture: Capture | None = None
    redact: Redact | RedactText | None = attrs.field(
        default=None, converter=to_redact, validator=attrs.validators.optional(validator(check_redact))
    )
    tracer_provider: TracerProvider | None = None
    logger_provider: LoggerProvider | None = None
    _mode: Capture = attrs.field(init=False, repr=False, eq=False)
    _source: list[SpanSource] = attrs.field(init=False, repr=False, eq=False, factory=list["SpanSource"])
    """Empty until the first call for which an SDK may be set up, and then one element."""

    def __attrs_post_init__(self) -> None:
        from fluxibly.telemetry._content import capture_mode

        object.__setattr__(self, "_mode", capture_mode(self.capture))

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        source = self._source[0] if self._source else self._first()
        trace = None if source is None else source.begin(request)
        if trace is None:
            return (yield from call_next(request))
        # The outermost layer has a request that was made for this call, and that nobody else holds.
        inner = observed(request, trace, in_place=request.call.layers[:1] == (self,))
        if trace.recorded is False:
            try:
                return (yield from call_next(inner))
            finally:
                trace.leave()
        arrivals = trace.arrivals
        try:
            if arrivals is None:
                response = yield from call_next(inner)
            else:
                response = yield from arrivals.over(call_next(inner))
                arrivals.flush()
                if arrivals.characters or request.call.interruption is not None:
                    check_delivered(request.call, response, arrivals.message_length)
        except BaseException as raised:
            trace.end(None, raised)
            raise
        trace.end(response, None)
        return response

    @property
    def captures(self) -> bool:
        """Whether prompts and answers are recorded: by `capture`, by what `telemetry.setup` says, or by the environment."""
        from fluxibly.telemetry._content import Capturing

        mode = Capturing(self._mode, None, None)
        by_default = self.capture is None and self.tracer_provider is None
        return (mode.by_default() if by_default else mode).mode != "none"

    def _first(self) -> SpanSource | None:
        if self.tracer_provider is None and not may_have_sdk("opentelemetry.trace", "OTEL_PYTHON_TRACER_PROVIDER"):
            return None
        from fluxibly.telemetry._content import Capturing
        from fluxibly.telemetry._spans import SpanSource

        capturing = Capturing(self._mode, redact_text(self.redact), self.logger_provider)
        source = SpanSource(
            self.tracer_provider, capturing, chosen=self.capture is not None, always=self.attempts == "always"
        )
        self._source.append(source)
        return self._source[0]
