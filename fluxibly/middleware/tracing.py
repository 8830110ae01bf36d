"""Middleware that records spans of calls and of their attempts, for any OpenTelemetry SDK."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import attrs

from fluxibly._checks import one_of, validator
from fluxibly.errors import StreamInterrupted
from fluxibly.flow import CallNext, Flow
from fluxibly.flow.culprits import check_delivered
from fluxibly.flow.effects import More
from fluxibly.telemetry._arrivals import LIMIT
from fluxibly.telemetry._sdk import may_have_sdk
from fluxibly.types import Chunk, Request, Response, Restart

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry._logs import LoggerProvider
    from opentelemetry.trace import TracerProvider

    from fluxibly.telemetry._content import Capture
    from fluxibly.telemetry._spans import SpanSource


@attrs.frozen(kw_only=True)
class Tracing:
    """Middleware that records a span for each call, and child spans for its attempts if there are several.

    The spans follow the conventions for generative AI. `Tracing` uses the SDK that the application has set up, even if
    it is set up later. Without an SDK, it costs almost nothing. Put `Tracing` outside of `Retry` and fallbacks, so that
    one span covers all of them. Put only one `Tracing` into a stack, because each creates its own span for the call,
    with the tokens.

    Every request carries `traceparent`: that of the call's span for the first attempt, and of its own span for each
    later attempt, which is current during that attempt. If there were several attempts, the span of the first is
    recorded afterwards. The span of a call has the tokens of all attempts at the provider and the model that it names:
    those that answered. Attempts elsewhere have their tokens as `fluxibly.attempt.…`, and the call has the sum of all
    tokens as `fluxibly.usage.total_…`. An `ask` within the call has a span of its own, with its own tokens and attempts.

    SDKs behind a provider may be instrumented, too. Instrumentations that are built on opentelemetry-util-genai record
    nothing during an attempt, whether the call is sampled or not. They do record calls that a middleware makes itself, in
    `perform`.

    Args:
        attempts: "auto", or "always" for a span for every attempt from its beginning, even if there is no other.
        capture: where to record prompts, answers and tool definitions: "none", "span" (as attributes), "event" (as
            `gen_ai.client.inference.operation.details`) or "both". None uses what `telemetry.setup(capture=…)` says
            (unless there is a `tracer_provider`), else the environment variable
            OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT as it is when this object is created, else "none".
        redact: a function that receives every text that would be recorded, including error messages, and returns the
            text to record instead. If it raises, no content of that call is recorded.
        tracer_provider, logger_provider: by default the global providers.

    Raises:
        ValueError: `attempts` or `capture` is not one of these words.
    """

    attempts: Literal["auto", "always"] = attrs.field(default="auto", validator=validator(one_of, ("auto", "always")))
    capture: Capture | None = None
    redact: Callable[[str], str] | None = None
    tracer_provider: TracerProvider | None = None
    logger_provider: LoggerProvider | None = None
    _mode: Capture = attrs.field(init=False, repr=False, eq=False)
    _source: list[SpanSource] = attrs.field(init=False, repr=False, eq=False, factory=list["SpanSource"])
    """Empty until the first call for which an SDK may be set up, and then one element."""

    def __attrs_post_init__(self) -> None:
        from fluxibly.telemetry._content import capture_mode

        object.__setattr__(self, "_mode", capture_mode(self.capture))

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        # This does not use a `Relay`, because passing it each chunk costs three times as much as all the work here.
        source = self._source[0] if self._source else self._first()
        trace = None if source is None else source.begin(request)
        if trace is None:
            return (yield from call_next(request))
        if trace.recorded is False:
            try:
                return (yield from call_next(request))
            finally:
                trace.leave()
        call, arrivals, answer = request.call, trace.arrivals, trace.answer
        points = [] if arrivals is None else arrivals.points
        until_noted = 0 if arrivals is None else 1  # chunks until the next recorded arrival
        characters = before = 0  # of all messages, and of those before the message under way
        effect: Any
        outcome: Any = None
        error: BaseException | None = None
        try:
            flow = call_next(request)
            send = flow.send
            while True:
                try:
                    effect = send(outcome) if error is None else flow.throw(error)
                finally:
                    error = None  # breaks the cycle: the error refers to this frame
                try:
                    while True:
                        if type(effect) is Chunk:
                            chunk = effect
                        elif type(effect) is More:
                            chunk = effect.chunk
                            if chunk.added:
                                before = characters
                        else:
                            break
                        characters += len(chunk.text)
                        until_noted -= 1
                        if until_noted == 0 and arrivals is not None:
                            points.append((call.clock(), call.requested_at, characters))
                            until_noted = arrivals.stride if len(points) < LIMIT else arrivals.thin()
                        if answer is not None:
                            answer.add(chunk)
                        effect = send((yield effect))
                    trace.see(effect)
                    outcome = yield effect
                except StopIteration:
                    raise
                except GeneratorExit:
                    flow.close()
                    raise
                except BaseException as thrown:  # noqa: BLE001  # goes into the flow, which raises it again if its own
                    error = thrown
                else:
                    if type(effect) is Restart and outcome:
                        answer = trace.restarted()
                        characters = before = 0
                        until_noted = 0 if arrivals is None else 1
        except StopIteration as stop:
            response = cast("Response", stop.value)
        except BaseException as raised:
            trace.end(raised, None)
            raise
        if characters or call.interruption is not None:
            try:
                check_delivered(call, response, characters - before if call.streaming else None)
            except StreamInterrupted as raised:
                trace.end(raised, None)
                raise
        trace.end(None, response)
        return response

    def _first(self) -> SpanSource | None:
        if self.tracer_provider is None and not may_have_sdk("opentelemetry.trace", "OTEL_PYTHON_TRACER_PROVIDER"):
            return None
        from fluxibly.telemetry._content import Capturing
        from fluxibly.telemetry._spans import SpanSource

        capturing = Capturing(self._mode, self.redact, self.logger_provider)
        source = SpanSource(
            self.tracer_provider, capturing, chosen=self.capture is not None, always=self.attempts == "always"
        )
        self._source.append(source)
        return self._source[0]
