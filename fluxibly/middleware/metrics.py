"""Middleware that measures the durations and tokens of calls, for any OpenTelemetry SDK."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal

import attrs

from fluxibly._checks import one_of, validator
from fluxibly.flow import CallNext, Flow
from fluxibly.flow.culprits import check_delivered
from fluxibly.middleware._copies import Rebuilt
from fluxibly.telemetry import semconv
from fluxibly.telemetry._sdk import UTIL_GENAI, may_have_sdk
from fluxibly.types import Request, Response

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider

    from fluxibly.telemetry._metrics import CallMetrics


@attrs.frozen(kw_only=True)
class Metrics(Rebuilt):
    """Middleware that records the histograms of the conventions for generative AI once per call, however it ends.

    The histograms are `gen_ai.client.operation.duration` (seconds, with `fluxibly.outcome` and `error.type`),
    `gen_ai.client.token.usage`, and for streams `…time_to_first_chunk` and `…time_per_output_chunk`. The last is recorded
    once per stream, as the mean wait for a chunk after the first, because recording each chunk costs more than receiving
    it. It excludes the consumer's own time, and needs a `StreamMeter` further in, as in the default stack.

    Tokens are recorded for each provider and model that the call has asked, as far as the services counted them: those
    of retries, of answers that `Validation` rejected and of every `ask`, too. Instrumentations of SDKs that are built on
    opentelemetry-util-genai do not count the tokens of an attempt again.

    With the SDK's own meter provider, measurements are recorded when the SDK next collects. The SDK misses none of
    them, and the call does not wait. If the process forks, both processes have the measurements that were not collected
    before, as with the SDK itself.

    Args:
        conventions: the edition of the conventions that sets the names. "latest" is the unreleased edition: durations
            are `gen_ai.client.inference.…`. Tokens are counted by kind as `gen_ai.client.inference.usage.…` (0 if the
            service reported no usage). The histograms `….operation.input_tokens` and `….output_tokens` record the
            tokens of calls that did not fail. To record both editions, use two `Metrics`.
        meter_provider: by default the global meter provider, even if it is set later.

    Raises:
        ValueError: `conventions` is neither "released" nor "latest".
    """

    conventions: Literal["released", "latest"] = attrs.field(
        default="released", validator=validator(one_of, ("released", "latest"))
    )
    meter_provider: MeterProvider | None = None
    _metrics: list[CallMetrics] = attrs.field(init=False, repr=False, eq=False, factory=list["CallMetrics"])
    """Empty until an SDK may be set up while a call begins or ends, and then one element."""

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        call = request.call
        before = len(call.spent)
        if UTIL_GENAI in sys.modules and call.claim is None and self._is_ready():
            self._metrics[0].claim(call)
        try:
            response = yield from call_next(request)
            if call.interruption is not None:
                check_delivered(call, response)
        except BaseException as error:
            if self._metrics or self._is_ready():
                self._metrics[0].record(request, error, before)
            raise
        if self._metrics or self._is_ready():
            self._metrics[0].record(request, None, before)
        return response

    def _is_ready(self) -> bool:
        """Whether an SDK may be set up. If so, there is a destination for measurements from now on."""
        if not self._metrics:
            if self.meter_provider is None and not may_have_sdk("opentelemetry.metrics", "OTEL_PYTHON_METER_PROVIDER"):
                return False
            from fluxibly.telemetry._metrics import CallMetrics

            names = semconv.LATEST if self.conventions == "latest" else semconv.RELEASED
            self._metrics.append(CallMetrics(self.meter_provider, names))
        return True
