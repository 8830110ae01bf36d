"""The histograms of calls: what `Metrics` does once OpenTelemetry is imported. See `middleware/metrics.py`."""

from __future__ import annotations

from typing import Any

import attrs
from opentelemetry.metrics import Histogram, Meter, MeterProvider, NoOpMeterProvider, get_meter_provider

from fluxibly import semconv
from fluxibly.outcome import outcome_of
from fluxibly.report import report_once
from fluxibly.span_attributes import answered_model, error_name, provider_attributes, time_to_first_chunk
from fluxibly.types import CallRecord, Request


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


class Instruments:
    """Where the measurements of one `Metrics` go. Notices an SDK that is set up later."""

    def __init__(self, provider: MeterProvider | None) -> None:
        self.given = provider
        self._seen: MeterProvider | None = None
        self._histograms: _Histograms | None = None

    def histograms(self) -> _Histograms | None:
        """The histograms, or None while there is no SDK."""
        provider = self.given or get_meter_provider()
        if provider is not self._seen:
            # The API's own providers record nothing: its no-op one, and the private proxy that waits for an SDK.
            idle = isinstance(provider, NoOpMeterProvider) or type(provider).__module__.startswith(_API)
            self._histograms = None if idle else _Histograms.of(provider.get_meter(semconv.METER))
            self._seen = provider
        return self._histograms

    def record(self, request: Request, error: BaseException | None) -> None:
        """Record a call that has ended."""
        try:
            histograms = self.histograms()
            if histograms is not None:
                _record(histograms, request, error)
        except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
            report_once("metrics", f"metrics failed with {type(problem).__name__}; calls go on without them")


_API = MeterProvider.__module__


def _record(histograms: _Histograms, request: Request, error: BaseException | None) -> None:
    call = request.call
    outcome = outcome_of(error)
    attributes: dict[str, Any] = provider_attributes(call.provider)
    attributes[semconv.OPERATION] = semconv.CHAT
    attributes[semconv.REQUEST_MODEL] = answered_model(request, outcome)
    if call.model is not None:
        attributes[semconv.RESPONSE_MODEL] = call.model
    ended = {**attributes, semconv.OUTCOME: outcome}
    if error is not None and outcome != "abandoned":
        ended[semconv.ERROR_TYPE] = error_name(error)
    histograms.duration.record(call.clock() - call.started_at, ended)
    usage = call.usage
    if usage is not None and not call.cache_hit:
        if usage.input_tokens is not None:
            histograms.tokens.record(usage.input_tokens, {**attributes, semconv.TOKEN_TYPE: "input"})
        if usage.output_tokens is not None:
            histograms.tokens.record(usage.output_tokens, {**attributes, semconv.TOKEN_TYPE: "output"})
    if call.streaming:
        _record_stream(histograms, call, attributes)


def _record_stream(histograms: _Histograms, call: CallRecord, attributes: dict[str, Any]) -> None:
    first = time_to_first_chunk(call)
    if first is not None:
        histograms.first_chunk.record(first, attributes)
    stats = call.stats
    if stats is not None and stats.chunks > 1:
        histograms.per_chunk.record(stats.streaming_time / (stats.chunks - 1), attributes)
