"""Spans of calls and of their attempts, for any OpenTelemetry SDK."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from fluxibly.effects import CallNext, Flow
from fluxibly.sdk import may_have_sdk
from fluxibly.types import Request, Response
from fluxibly.watch import watched

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry._logs import LoggerProvider
    from opentelemetry.trace import TracerProvider

    from fluxibly.capture import Capture
    from fluxibly.spans import Tracers


@attrs.frozen(kw_only=True)
class Tracing:
    """Gives each call a span, and each of its attempts one within, by the conventions for generative AI.

    It uses the SDK that the application has set up, also if that is done later; without one it costs nearly nothing.
    Every attempt's request carries `traceparent`. Put it outside of `Retry` and fallbacks, so that one span has them
    all.

    Args:
        capture: which of prompts, answers and tool definitions are recorded: "none", "span" (as attributes), "event"
            (as `gen_ai.client.inference.operation.details`) or "both". None leaves it to the environment variable
            OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT as it is when this object is made; without it, "none".
        redact: gets every text that would leave, error messages included, and returns what may. If it raises then
            nothing of that call's content is recorded.
        tracer_provider, logger_provider: by default the global ones.

    Raises:
        ValueError: `capture` is something else.
    """

    capture: Capture | None = None
    redact: Callable[[str], str] | None = None
    tracer_provider: TracerProvider | None = None
    logger_provider: LoggerProvider | None = None
    _mode: Capture = attrs.field(init=False, repr=False, eq=False)
    _tracers: list[Tracers] = attrs.field(init=False, repr=False, eq=False, factory=list["Tracers"])
    """One, from the first call on for which there may be an SDK."""

    def __attrs_post_init__(self) -> None:
        from fluxibly.capture import capture_mode

        object.__setattr__(self, "_mode", capture_mode(self.capture))

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        tracers = self._tracers[0] if self._tracers else self._first()
        return call_next(request) if tracers is None else watched(tracers.begin, request, call_next)

    def _first(self) -> Tracers | None:
        if self.tracer_provider is None and not may_have_sdk("opentelemetry.trace", "OTEL_PYTHON_TRACER_PROVIDER"):
            return None
        from fluxibly.capture import Capturing
        from fluxibly.spans import Tracers

        capturing = Capturing(self._mode, self.redact, self.logger_provider)
        self._tracers.append(Tracers(self.tracer_provider, capturing))
        return self._tracers[0]
