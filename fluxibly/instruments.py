"""The histograms of calls: what `Metrics` does once OpenTelemetry is imported. See `middleware/metrics.py`.

To record one value costs the SDK's histograms as much as a whole stack of layers costs, and a call has three. So what
was measured waits in a queue, and is recorded when the SDK collects: by the callback of an instrument that has no
values of its own, which the SDK calls before it looks at its histograms, whatever its views are. A reader thus misses
nothing, and a call pays for its measurements only when nobody collects for so long that the queue is full. All that
differs is the time of exemplars: that of the collection.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Iterable
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import attrs
from opentelemetry.context import Context
from opentelemetry.metrics import (
    CallbackOptions,
    Histogram,
    Meter,
    MeterProvider,
    NoOpMeterProvider,
    Observation,
    get_meter_provider,
)
from opentelemetry.trace import NonRecordingSpan, SpanContext, get_current_span, set_span_in_context

from fluxibly import semconv
from fluxibly.dropped import end_all_before
from fluxibly.outcome import outcome_of
from fluxibly.report import report_once
from fluxibly.span_attributes import answered_model, error_name, provider_attributes, time_to_first_chunk
from fluxibly.types import ProviderInfo, Request

WAITING = 1_000
"""Calls whose measurements may wait. Those after them are recorded at once."""
KINDS = 1_000
"""Kinds of calls (models, outcomes, …) whose attributes are kept. Measurements of others are recorded at once."""


@attrs.frozen
class _Histograms:
    duration: Histogram
    tokens: Histogram
    first_chunk: Histogram
    per_chunk: Histogram

    @classmethod
    def of(cls, meter: Meter) -> _Histograms:
        seconds = list(semconv.DURATION_BOUNDARIES)
        return cls(
            meter.create_histogram(
                semconv.DURATION,
                unit="s",
                description="Duration of a call, its retries included",
                explicit_bucket_boundaries_advisory=seconds,
            ),
            meter.create_histogram(
                semconv.TOKEN_USAGE,
                unit="{token}",
                description="Tokens of a call, as the service counted them",
                explicit_bucket_boundaries_advisory=list(semconv.TOKEN_BOUNDARIES),
            ),
            meter.create_histogram(
                semconv.TIME_TO_FIRST_CHUNK,
                unit="s",
                description="Time from sending the request to the first chunk of a stream",
                explicit_bucket_boundaries_advisory=seconds,
            ),
            meter.create_histogram(
                semconv.TIME_PER_OUTPUT_CHUNK,
                unit="s",
                description="Mean wait for a chunk after the first, one value a stream",
                explicit_bucket_boundaries_advisory=seconds,
            ),
        )


@attrs.frozen
class _Attributes:
    """The attributes of a call's measurements; one object serves all calls of a kind."""

    provider: ProviderInfo
    """Kept, because calls are told apart by its address in memory: to hash it costs more than all the rest."""
    call: dict[str, Any]
    duration: dict[str, Any]
    input: dict[str, Any]
    output: dict[str, Any]


_Measured: TypeAlias = tuple[_Attributes, float, int | None, int | None, float | None, float | None, SpanContext]
"""Attributes, duration, input and output tokens, time to the first chunk, mean wait for the others, current span."""


class Recorder:
    """What records the calls of one meter provider."""

    def __init__(self, provider: MeterProvider, *, collects: bool) -> None:
        meter = provider.get_meter(semconv.METER)
        self.histograms = _Histograms.of(meter)
        self.kinds: dict[object, _Attributes] = {}
        self.waiting: deque[_Measured] = deque()
        self.collects = collects
        """Whether the provider calls `collect`. If that is not known then it gets everything at once."""
        if collects:
            meter.create_observable_counter(
                semconv.WAITING, callbacks=[self.collect], description="Never has a value: records what waits"
            )

    def record(self, request: Request, error: BaseException | None) -> None:
        call = request.call
        now = call.clock()
        outcome = outcome_of(error)
        name = None if error is None or outcome == "abandoned" else error_name(error)
        model = answered_model(request, outcome)
        kind = (id(call.provider), model, call.model, outcome, name)
        attributes = self.kinds.get(kind)
        known = attributes is not None
        if attributes is None:
            attributes = _attributes(call.provider, model, call.model, outcome, name)
            if len(self.kinds) < KINDS:
                self.kinds[kind] = attributes
        usage = None if call.cache_hit else call.usage
        first = mean = None
        if call.streaming:
            first = time_to_first_chunk(call)
            stats = call.stats
            if stats is not None and stats.chunks > 1:
                mean = stats.streaming_time / (stats.chunks - 1)
        measured = (
            attributes,
            now - call.started_at,
            None if usage is None else usage.input_tokens,
            None if usage is None else usage.output_tokens,
            first,
            mean,
            get_current_span().get_span_context(),
        )
        # The first of its kind is recorded at once, because a histogram begins with its first value.
        if known and self.collects and len(self.waiting) < WAITING:
            self.waiting.append(measured)
        else:
            self.write(measured)

    def collect(self, _: CallbackOptions) -> Iterable[Observation]:
        """Record what waits: the SDK is about to collect."""
        for _number in range(len(self.waiting)):
            try:
                self.write(self.waiting.popleft())
            except Exception as problem:  # noqa: BLE001  # telemetry never breaks anything, its own collection included
                report(problem)
        return ()

    def write(self, measured: _Measured) -> None:
        attributes, duration, given, made, first, mean, span = measured
        to = self.histograms
        context = set_span_in_context(NonRecordingSpan(span), Context())  # for exemplars; its span may be long gone
        to.duration.record(duration, attributes.duration, context)
        if given is not None:
            to.tokens.record(given, attributes.input, context)
        if made is not None:
            to.tokens.record(made, attributes.output, context)
        if first is not None:
            to.first_chunk.record(first, attributes.call, context)
        if mean is not None:
            to.per_chunk.record(mean, attributes.call, context)


def _attributes(
    provider: ProviderInfo, model: str, answered: str | None, outcome: str, error: str | None
) -> _Attributes:
    call: dict[str, Any] = provider_attributes(provider)
    call[semconv.OPERATION] = semconv.CHAT
    call[semconv.REQUEST_MODEL] = model
    if answered is not None:
        call[semconv.RESPONSE_MODEL] = answered
    duration = {**call, semconv.OUTCOME: outcome}
    if error is not None:
        duration[semconv.ERROR_TYPE] = error
    tokens = [{**call, semconv.TOKEN_TYPE: kind} for kind in ("input", "output")]
    return _Attributes(provider, call, duration, *tokens)


_recorders: WeakKeyDictionary[MeterProvider, Recorder] = WeakKeyDictionary()
_lock = threading.Lock()


def recorder_of(provider: MeterProvider) -> Recorder | None:
    """What records for a provider; None without an SDK."""
    # The API's own providers record nothing: its no-op one, and the private proxy that waits for an SDK.
    if isinstance(provider, NoOpMeterProvider) or type(provider).__module__.startswith(_API):
        return None
    end_all_before()
    sdk = sys.modules.get("opentelemetry.sdk.metrics")
    if sdk is None or not isinstance(provider, sdk.MeterProvider):
        return Recorder(provider, collects=False)
    with _lock:  # one for all, since an instrument of one name has one callback
        recorder = _recorders.get(provider)
        if recorder is None:
            recorder = _recorders[provider] = Recorder(provider, collects=True)
    return recorder


_API = MeterProvider.__module__


def report(problem: Exception) -> None:
    report_once("metrics", f"metrics failed with {type(problem).__name__}; calls go on without them")


class Instruments:
    """Where the measurements of one `Metrics` go. Notices an SDK that is set up later."""

    def __init__(self, provider: MeterProvider | None) -> None:
        self.given = provider
        self._seen: MeterProvider | None = None
        self._recorder: Recorder | None = None

    def record(self, request: Request, error: BaseException | None) -> None:
        """Record a call that has ended."""
        try:
            provider = self.given or get_meter_provider()
            if provider is not self._seen:
                self._recorder = recorder_of(provider)
                self._seen = provider
            if self._recorder is not None:
                self._recorder.record(request, error)
        except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
            report(problem)
