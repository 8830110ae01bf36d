"""The instruments of calls, used by `Metrics` once OpenTelemetry is imported. See `middleware/metrics.py`.

Recording one value in an SDK histogram costs as much as a whole stack of layers, and a call has three values. So
measurements wait in a queue and are recorded when the SDK collects. An observable instrument without values of its own
has a callback for this. The SDK runs the callback before it reads its histograms, regardless of its views. So a reader
misses nothing, and a call pays for its measurements only if the queue is full because the SDK has not collected for a
long time. The only difference is the time of exemplars, which is the time of the collection.
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
from fluxibly.calls import Spent
from fluxibly.errors import outcome_of
from fluxibly.telemetry import semconv
from fluxibly.telemetry._attributes import error_name, named, provider_attributes, time_to_first_chunk
from fluxibly.telemetry._claim import claim
from fluxibly.types import CallRecord, Outcome, ProviderInfo, Request, Usage

WAITING = 1_000
"""The most calls whose measurements may wait. When the queue is full, measurements are recorded at once."""
KINDS = 1_000
"""The most kinds of calls (models, outcomes, …) whose attributes are kept. Other kinds are recorded at once."""


@attrs.frozen
class _Instruments:
    duration: Histogram
    input: Histogram
    output: Histogram
    """Counts tokens, as `input` does. With the released names, both are the same histogram."""
    first_chunk: Histogram
    per_chunk: Histogram
    cost: Histogram
    usage: Mapping[str, Counter]
    """The token counters, by the field of `Usage` that they count."""

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
            cost=histogram(
                semconv.COST, "{USD}", semconv.COST_BOUNDARIES, "Price of a call's attempts at one provider and model"
            ),
            usage={
                field: meter.create_counter(name, unit="{token}", description="Tokens, as the service counted them")
                for field, name in names.usage.items()
            },
        )


@attrs.frozen
class _Attributes:
    """The attributes of a call's measurements. All calls of a kind share one object."""

    provider: ProviderInfo
    """Kept alive, because its `id()` is part of the key of a kind. Hashing it would cost more than all the rest."""
    call: dict[str, Any]
    duration: dict[str, Any]
    input: dict[str, Any] | None
    """None if the histograms do not count the tokens of calls of this kind. The same goes for `output`."""
    output: dict[str, Any] | None
    usage: dict[str, Any]


_Kind: TypeAlias = tuple[int, str, str | None, Outcome, str | None]
"""The `id()` of the provider, the requested model, the model that answered, the outcome, the error."""
_Measured: TypeAlias = tuple[
    _Attributes, float | None, Usage | None, float | None, float | None, float | None, SpanContext
]
"""Attributes, duration, usage, time to the first chunk, mean wait for the later chunks, cost, current span.

There is no duration with the tokens of attempts at other providers and models than the call is named after."""


_UNKNOWN_USAGE = Usage()
_NO_USAGE = Usage(input_tokens=0, output_tokens=0)
"""The usage that is recorded under the latest names if the service reported none: `_NO_USAGE` for a completed call,
`_UNKNOWN_USAGE` for any other. By the latest conventions, the counters get a 0 from every such call, and the histograms only
from calls that did not fail."""


_COST_RECORDED = "fluxibly.cost_recorded"
_NO_COSTS: dict[tuple[ProviderInfo, str], float] = {}
_Tokens: TypeAlias = dict[tuple[ProviderInfo, str], Usage | None]
"""The tokens of a call by the provider and the model that were asked."""


def _tokens(spent: Iterable[Spent]) -> _Tokens:
    """Return the tokens of each provider and model of which a service reported any."""
    reported: dict[tuple[ProviderInfo, str], list[Usage]] = {}
    for each in spent:
        if each.usage is not None:
            reported.setdefault((each.provider, each.model), []).append(each.usage)
    return {where: Usage.sum(usages) for where, usages in reported.items()}


class MetricRecorder:
    """The recorder of calls for one meter provider, under the names of one edition of the conventions."""

    def __init__(self, provider: MeterProvider, names: semconv.MetricNames, *, collects: bool) -> None:
        meter = provider.get_meter(semconv.METER)
        self.names = names
        self.meters = id(provider)
        self.instruments = _Instruments.of(meter, names)
        self.kinds: dict[_Kind, _Attributes] = {}
        self.waiting: deque[_Measured] = deque()
        self.collects = collects
        """Whether the provider is known to call `collect`. If not, every measurement is recorded at once."""
        if collects:
            meter.create_observable_counter(
                names.waiting, callbacks=[self.collect], description="Never has a value: records what waits"
            )

    def record(self, request: Request, error: BaseException | None, spent_before: int) -> None:
        call = request.call
        now = call.clock()
        outcome = outcome_of(error)
        name = None if error is None or outcome == "abandoned" else error_name(error)
        provider, model, answered = named(request, outcome)
        kind = (id(provider), model, answered, outcome, name)
        attributes = self.kinds.get(kind)
        known = attributes is not None
        if attributes is None:
            attributes = self.new_kind(kind, provider)
        elsewhere: _Tokens | None = None
        spent = call.spent
        if len(spent) == spent_before + 1 and (only := spent[-1]).provider is provider and only.model == model:
            usage = only.usage
        else:
            elsewhere = _tokens(spent[spent_before:])
            usage = elsewhere.pop((provider, model), None)
        if usage is None and not elsewhere and self.names is semconv.LATEST and call.attempts and not call.cache_hit:
            usage = _NO_USAGE if error is None else _UNKNOWN_USAGE
        first = mean = None
        if call.streaming:
            first = time_to_first_chunk(call)
            stats = call.stats
            if stats is not None and stats.chunks > 1:
                mean = stats.streaming_time / (stats.chunks - 1)
        span = get_current_span().get_span_context()
        costs = dict(self.costs_of(call)) if call.costs else _NO_COSTS
        cost = costs.pop((provider, model), None) if costs else None
        measured = (attributes, now - call.started_at, usage, first, mean, cost, span)
        # The first call of a kind is recorded at once, because a histogram begins with its first value.
        if known and self.collects and len(self.waiting) < WAITING:
            self.waiting.append(measured)
        else:
            self.write(measured)
        if elsewhere or costs:
            for who, asked in {**(elsewhere or {}), **costs}:
                attributes = self.new_kind((id(who), asked, None, outcome, name), who)
                used = None if elsewhere is None else elsewhere.get((who, asked))
                self.write((attributes, None, used, None, None, costs.get((who, asked)), span))

    def costs_of(self, call: CallRecord) -> Iterable[tuple[tuple[ProviderInfo, str], float]]:
        """Yield the costs of a call by provider and model, once for each meter provider.

        Two `Metrics`, one for each edition of the conventions, would record the same histogram twice.
        """
        recorded: list[int] = call.notes.setdefault(_COST_RECORDED, [])
        if self.meters not in recorded:
            recorded.append(self.meters)
            for key, cost in call.costs.items():
                yield key, float(cost)

    def new_kind(self, kind: _Kind, provider: ProviderInfo) -> _Attributes:
        """Return the attributes of a kind of call, and keep them."""
        attributes = self.attributes(provider, *kind[1:])
        if len(self.kinds) < KINDS:
            self.kinds[kind] = attributes
        return attributes

    def collect(self, _: CallbackOptions) -> Iterable[Observation]:
        """Record the waiting measurements, because the SDK is about to collect."""
        for _number in range(len(self.waiting)):
            try:
                self.write(self.waiting.popleft())
            except Exception as problem:  # noqa: BLE001  # telemetry never breaks anything, not even its own collection
                report(problem)
        return ()

    def write(self, measured: _Measured) -> None:
        attributes, duration, usage, first, mean, cost, span = measured
        to = self.instruments
        context = set_span_in_context(NonRecordingSpan(span), Context())  # for exemplars: the span itself may be gone
        if duration is not None:
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
        if cost is not None:
            to.cost.record(cost, attributes.call, context)

    def attributes(
        self, provider: ProviderInfo, model: str, answered: str | None, outcome: Outcome, error: str | None
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
"""The recorders of each provider, by the name of their duration metric."""
_lock = threading.Lock()


def recorder_of(provider: MeterProvider, names: semconv.MetricNames) -> MetricRecorder | None:
    """Return the recorder for a provider, or None without an SDK."""
    # The API's own providers record nothing: the no-op provider, and the private proxy that waits for an SDK.
    if isinstance(provider, NoOpMeterProvider) or type(provider).__module__.startswith(_API):
        return None
    end_all_before()
    sdk = sys.modules.get("opentelemetry.sdk.metrics")
    if sdk is None or not isinstance(provider, sdk.MeterProvider):
        return MetricRecorder(provider, names, collects=False)
    with _lock:  # one recorder serves all `Metrics`, because an instrument has only one callback
        recorders = _recorders.setdefault(provider, {})
        if names.duration not in recorders:
            recorders[names.duration] = MetricRecorder(provider, names, collects=True)
        return recorders[names.duration]


_API = MeterProvider.__module__


def report(problem: Exception) -> None:
    report_once("metrics", f"metrics failed with {type(problem).__name__}; calls continue without metrics")


class CallMetrics:
    """The destination of the measurements of one `Metrics`. It notices an SDK that is set up later."""

    def __init__(self, provider: MeterProvider | None, names: semconv.MetricNames) -> None:
        self.given = provider
        self.names = names
        self._seen: MeterProvider | None = None
        self._recorder: MetricRecorder | None = None

    def claim(self, call: CallRecord) -> None:
        """Keep other instrumentations from counting the tokens of a call that begins."""
        try:
            provider = self.given or get_meter_provider()
            if provider is not self._seen:
                self._notice(provider)
            if self._recorder is not None:
                claim(call)
        except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
            report(problem)

    def record(self, request: Request, error: BaseException | None, spent_before: int) -> None:
        """Record a call that has ended. `spent_before` entries of `CallRecord.spent` are older than the call."""
        try:
            provider = self.given or get_meter_provider()
            if provider is not self._seen:
                self._notice(provider)
            if self._recorder is not None:
                self._recorder.record(request, error, spent_before)
        except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
            report(problem)

    def _notice(self, provider: MeterProvider) -> None:
        """Use the recorder for a provider that was not in use before."""
        self._recorder = recorder_of(provider, self.names)
        self._seen = provider
