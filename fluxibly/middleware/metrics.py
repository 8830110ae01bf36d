"""Durations and tokens of calls, for any OpenTelemetry SDK."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import attrs

from fluxibly._checks import one_of, validator
from fluxibly.flow import CallNext, Flow
from fluxibly.telemetry import semconv
from fluxibly.telemetry._sdk import may_have_sdk
from fluxibly.types import Request, Response

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider

    from fluxibly.telemetry._metrics import CallMetrics


@attrs.frozen(kw_only=True)
class Metrics:
    """Records the histograms of the conventions for generative AI, once a call, however it ended.

    `gen_ai.client.operation.duration` (seconds, with `fluxibly.outcome` and `error.type`), `gen_ai.client.token.usage`
    (where the service counted; none for cache hits), and for streams `…time_to_first_chunk` and
    `…time_per_output_chunk`. The last is recorded once a stream, as the mean of its waits after the first chunk: to
    record each chunk costs more than to receive it. It leaves out what the consumer took, and needs `StreamMeter`
    further in, as the default stack has it.

    With the SDK's own meter provider, what was measured is recorded when the SDK next collects, which sees all of it; a
    call does not wait for that. What was not collected yet when a process is forked is in both, as with the SDK itself.

    Args:
        conventions: whose names. "latest" is the edition of the conventions that is not released yet: the durations are
            `gen_ai.client.inference.…`; tokens are counted by kind, `gen_ai.client.inference.usage.…` (0 where the
            service told none), with histograms `….operation.input_tokens` and `….output_tokens` of the calls that did
            not fail. For both editions, use two.
        meter_provider: by default the global one, also if it is set later.

    Raises:
        ValueError: `conventions` is something else.
    """

    conventions: Literal["released", "latest"] = attrs.field(
        default="released", validator=validator(one_of, ("released", "latest"))
    )
    meter_provider: MeterProvider | None = None
    _metrics: list[CallMetrics] = attrs.field(init=False, repr=False, eq=False, factory=list["CallMetrics"])
    """One, from the end of the first call on for which there may be an SDK."""

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        try:
            response = yield from call_next(request)
        except BaseException as error:
            self._record(request, error)
            raise
        self._record(request, None)
        return response

    def _record(self, request: Request, error: BaseException | None) -> None:
        if not self._metrics:
            if self.meter_provider is None and not may_have_sdk("opentelemetry.metrics", "OTEL_PYTHON_METER_PROVIDER"):
                return
            from fluxibly.telemetry._metrics import CallMetrics

            names = semconv.LATEST if self.conventions == "latest" else semconv.RELEASED
            self._metrics.append(CallMetrics(self.meter_provider, names))
        self._metrics[0].record(request, error)
