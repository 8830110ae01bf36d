"""The instruments of calls: what `Metrics` does once OpenTelemetry is imported. See `middleware/metrics.py`.

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
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import attrs
from opentelemetry.context import Context
from opentelemetry.metrics import (
    CallbackOptions,
    Counter,
    Histogram,
    Meter,
    MeterProvider,
    NoOpMeterProvider,
    Observation,
    get_meter_provider,
)
from opentelemetry.trace import NonRecordingSpan, SpanContext, get_current_span, set_span_in_context

from fluxibly._abandoned import end_all_before
from fluxibly._logs import report_once
from fluxibly.errors import outcome_of
from fluxibly.telemetry import semconv
from fluxibly.telemetry._attributes import answered_model, error_name, provider_attributes, time_to_first_chunk
from fluxibly.types import ProviderInfo, Request, Usage

WAITING = 1_000
"""Calls whose measurements may wait. Those after them are recorded at once."""
KINDS = 1_000
"""Kinds of calls (models, outcomes, …) whose attributes are kept. Measurements of others are recorded at once."""


@attrs.frozen
class _Instruments:
    duration: Histogram
    input: Histogram
    output: Histogram
    """Of tokens, as `input`; with the released names these two are the same."""
    first_chunk: Histogram
    per_chunk: Histogram
    usage: Mapping[str, Counter]
    """By the field of `Usage` that they count."""

    @classmethod
    def of(cls, meter: Meter, names: semconv.MetricNames) -> _Instruments:
        def histogram(name: str, unit: str, boundaries: Sequence[float], description: str) -> Histogram:
            return meter.create_histogram(
                name, unit=unit, description=description, explicit_bucket_boundaries_advisory=list(boundaries)
            )

        seconds = partial(histogram, unit="s", boundaries=semconv.DURATION_BOUNDARIES)
        tokens = partial(histogram, unit="{token}", boundaries=semconv.TOKEN_BOUNDARIES)
        of_tokens = {
            name: tokens(name, description="Tokens of a call, as the service counted them")
            for name in (names.input_tokens, names.output_tokens)
        }
        return cls(
            duration=seconds(names.duration, description="Duration of a call, its retries included"),
            input=of_tokens[names.input_tokens],
            output=of_tokens[names.output_tokens],
            first_chunk=seconds(
                names.time_to_first_chunk,
                description="Time from sending the request to the first chunk of a stream",
            ),
            per_chunk=seconds(
                names.time_per_output_chunk,
                description="Mean wait for a chunk after the first, one value a stream",
            ),
            usage={
                field: meter.create_counter(name, unit="{token}", description="Tokens, as the service counted them")
                for field, name in names.usage.items()
            },
        )


@attrs.frozen
class _Attributes:
    """The attributes of a call's measurements; one object serves all calls of a kind."""

    provider: ProviderInfo
    """Kept, because calls are told apart by its address in memory: to hash it costs more than all the rest."""
    call: dict[str, Any]
    duration: dict[str, Any]
    input: dict[str, Any] | None
    """None if the tokens of such a call are no part of the histograms; `output` likewise."""
    output: dict[str, Any] | None
    usage: dict[str, Any]


_Measured: TypeAlias = tuple[_Attributes, float, Usage | None, float | None, float | None, SpanContext]
"""Attributes, duration, tokens, time to the first chunk, mean wait for the others, current span."""

_UNTOLD = Usage()
_NONE = Usage(input_tokens=0, output_tokens=0)
"""What the latest names are given for calls whose service told no tokens: `_NONE` for a completed one. By their
conventions the counters get a 0 from each, and the histograms from those that did not fail."""


class MetricRecorder:
    """What records the calls of one meter provider, under the names of one edition."""

    def __init__(self, provider: MeterProvider, names: semconv.MetricNames, *, collects: bool) -> None:
        meter = provider.get_meter(semconv.METER)
        self.names = names
        self.instruments = _Instruments.of(meter, names)
        self.kinds: dict[object, _Attributes] = {}
        self.waiting: deque[_Measured] = deque()
        self.collects = collects
        """Whether the provider calls `collect`. If that is not known then it gets everything at once."""
        if collects:
            meter.create_observable_counter(
                names.waiting, callbacks=[self.collect], description="Never has a value: records what waits"
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
            attributes = self.attributes(call.provider, model, call.model, outcome, name)
            if len(self.kinds) < KINDS:
                self.kinds[kind] = attributes
        usage = None if call.cache_hit else call.usage
        if usage is None and self.names is semconv.LATEST and call.attempts and not call.cache_hit:
            usage = _NONE if error is None else _UNTOLD
        first = mean = None
        if call.streaming:
            first = time_to_first_chunk(call)
            stats = call.stats
            if stats is not None and stats.chunks > 1:
                mean = stats.streaming_time / (stats.chunks - 1)
        measured = (
            attributes,
            now - call.started_at,
            usage,
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
        attributes, duration, usage, first, mean, span = measured
        to = self.instruments
        context = set_span_in_context(NonRecordingSpan(span), Context())  # for exemplars; its span may be long gone
        to.duration.record(duration, attributes.duration, context)
        if usage is not None:
            if usage.input_tokens is not None and attributes.input is not None:
                to.input.record(usage.input_tokens, attributes.input, context)
            if usage.output_tokens is not None and attributes.output is not None:
                to.output.record(usage.output_tokens, attributes.output, context)
            for field, counter in to.usage.items():
                counter.add(getattr(usage, field) or 0, attributes.usage, context)
        if first is not None:
            to.first_chunk.record(first, attributes.call, context)
        if mean is not None:
            to.per_chunk.record(mean, attributes.call, context)

    def attributes(
        self, provider: ProviderInfo, model: str, answered: str | None, outcome: str, error: str | None
    ) -> _Attributes:
        call: dict[str, Any] = provider_attributes(provider)
        call[semconv.OPERATION] = semconv.CHAT
        call[semconv.REQUEST_MODEL] = model
        if answered is not None:
            call[semconv.RESPONSE_MODEL] = answered
        duration = {**call, semconv.OUTCOME: outcome}
        if error is not None:
            duration[semconv.ERROR_TYPE] = error
        of_input = of_output = call if error is None else None
        if self.names is semconv.RELEASED:
            of_input, of_output = ({**call, semconv.TOKEN_TYPE: kind} for kind in ("input", "output"))
        return _Attributes(
            provider,
            call=call,
            duration=duration,
            input=of_input,
            output=of_output,
            usage={**call, semconv.TOKEN_MODALITY: "unknown"},
        )


_recorders: WeakKeyDictionary[MeterProvider, dict[str, MetricRecorder]] = WeakKeyDictionary()
"""Of each provider, by the name of its duration."""
_lock = threading.Lock()


def recorder_of(provider: MeterProvider, names: semconv.MetricNames) -> MetricRecorder | None:
    """What records for a provider; None without an SDK."""
    # The API's own providers record nothing: its no-op one, and the private proxy that waits for an SDK.
    if isinstance(provider, NoOpMeterProvider) or type(provider).__module__.startswith(_API):
        return None
    end_all_before()
    sdk = sys.modules.get("opentelemetry.sdk.metrics")
    if sdk is None or not isinstance(provider, sdk.MeterProvider):
        return MetricRecorder(provider, names, collects=False)
    with _lock:  # one for all, since an instrument of one name has one callback
        recorders = _recorders.setdefault(provider, {})
        if names.duration not in recorders:
            recorders[names.duration] = MetricRecorder(provider, names, collects=True)
        return recorders[names.duration]


_API = MeterProvider.__module__


def report(problem: Exception) -> None:
    report_once("metrics", f"metrics failed with {type(problem).__name__}; calls go on without them")


class CallMetrics:
    """Where the measurements of one `Metrics` go. Notices an SDK that is set up later."""

    def __init__(self, provider: MeterProvider | None, names: semconv.MetricNames) -> None:
        self.given = provider
        self.names = names
        self._seen: MeterProvider | None = None
        self._recorder: MetricRecorder | None = None

    def record(self, request: Request, error: BaseException | None) -> None:
        """Record a call that has ended."""
        try:
            provider = self.given or get_meter_provider()
            if provider is not self._seen:
                self._recorder = recorder_of(provider, self.names)
                self._seen = provider
            if self._recorder is not None:
                self._recorder.record(request, error)
        except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
            report(problem)
