"""Metrics: names, units, boundaries and attributes, in all modes."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from tracing_tools import ANSWER, REQUEST, Recorder, remote

from fluxibly.errors import Overloaded, RateLimitError
from fluxibly.middleware import Metrics, Retry, StreamMeter
from fluxibly.report import forget_reports
from fluxibly.testing import Delay, VirtualClock
from fluxibly.testing.modes import MODES, run
from fluxibly.types import Chunk, Response, Usage

modes = pytest.mark.parametrize("mode", MODES, ids=str)
streams = pytest.mark.parametrize("mode", [mode for mode in MODES if mode.streaming], ids=str)

D = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
T = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864)
NAMES = {
    "gen_ai.client.operation.duration": ("s", D),
    "gen_ai.client.token.usage": ("{token}", T),
    "gen_ai.client.operation.time_to_first_chunk": ("s", D),
    "gen_ai.client.operation.time_per_output_chunk": ("s", D),
}
WHO = {
    "gen_ai.operation.name": "chat",
    "gen_ai.provider.name": "openai",
    "gen_ai.request.model": "m-1",
    "gen_ai.response.model": "m-1-2026",
    "server.address": "api.test",
    "server.port": 443,
}
DURATION, TOKENS, FIRST, PER_CHUNK = NAMES


class Meters:
    """A meter provider, and what it was given."""

    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.provider = MeterProvider([self.reader], shutdown_on_exit=False)

    def metrics(self) -> Metrics:
        return Metrics(meter_provider=self.provider)

    def read(self):
        """The metrics by name."""
        data = self.reader.get_metrics_data()
        if data is None:
            return {}
        return {m.name: m for r in data.resource_metrics for scope in r.scope_metrics for m in scope.metrics}

    def points(self):
        """The data points by the metric's name."""
        return {name: list(metric.data.data_points) for name, metric in self.read().items()}


@pytest.fixture
def meters():
    forget_reports()
    return Meters()


@modes
def test_names_units_boundaries_and_attributes(mode, meters):
    """A call's duration and tokens, and for a stream its first chunk and the mean wait for the others."""
    clock = VirtualClock()
    usage = Usage(input_tokens=7, output_tokens=2)
    last = Chunk("c", finish_reason="stop", usage=usage, model="m-1-2026")
    script = [Delay(2), "a", Delay(1), "b", Delay(3), last]
    run(mode, remote(mode, script, clock=clock), [meters.metrics(), StreamMeter()], REQUEST, clock=clock)
    found = meters.read()
    assert found.keys() == (NAMES.keys() if mode.streaming else {DURATION, TOKENS})
    points = meters.points()
    for name, metric in found.items():
        unit, boundaries = NAMES[name]
        assert metric.unit == unit
        assert all(point.explicit_bounds == boundaries for point in points[name])
    (duration,) = points[DURATION]
    assert (duration.sum, duration.count) == (6, 1)
    assert dict(duration.attributes) == {**WHO, "fluxibly.outcome": "completed"}
    tokens = {point.attributes["gen_ai.token.type"]: point.sum for point in points[TOKENS]}
    assert tokens == {"input": 7, "output": 2}
    assert all(WHO.items() <= dict(point.attributes).items() for point in points[TOKENS])
    if mode.streaming:
        assert [(point.sum, point.count) for point in points[FIRST]] == [(2, 1)]
        assert [(point.sum, point.count) for point in points[PER_CHUNK]] == [(2, 1)]
        assert dict(points[FIRST][0].attributes) == WHO


@streams
def test_what_the_consumer_took_is_not_the_streams(mode, meters):
    """The mean wait leaves it out."""
    clock = VirtualClock()
    script = [Delay(2), "a", Delay(1), "b", Delay(1), "c"]
    run(
        mode,
        remote(mode, script, clock=clock),
        [meters.metrics(), StreamMeter()],
        REQUEST,
        clock=clock,
        watch=lambda _: clock.advance(50),
    )
    assert meters.points()[PER_CHUNK][0].sum == 1


@modes
def test_failures_have_a_type_and_count_once(mode, meters):
    """Retries are one call; its error's type is on the duration."""
    provider = remote(mode, RateLimitError("slow", code="rate_limit"), RateLimitError("slow", code="rate_limit"))
    run(mode, provider, [meters.metrics(), Retry(max_retries=1)], REQUEST)
    points = meters.points()
    assert points.keys() == {DURATION}
    (point,) = points[DURATION]
    assert (point.count, point.attributes["error.type"], point.attributes["fluxibly.outcome"]) == (
        1,
        "rate_limit",
        "failed",
    )


@streams
def test_a_stream_given_up_is_measured_too(mode, meters):
    """Its outcome is `abandoned`, it is no error, and the tokens that were told are counted."""
    script = [Chunk("a", usage=Usage(input_tokens=7)), "b", "c"]
    run(mode, remote(mode, script), [meters.metrics(), StreamMeter()], REQUEST, stop_after=2)
    points = meters.points()
    attributes = points[DURATION][0].attributes
    assert attributes["fluxibly.outcome"] == "abandoned"
    assert "error.type" not in attributes
    assert [(point.attributes["gen_ai.token.type"], point.sum) for point in points[TOKENS]] == [("input", 7)]


@modes
def test_a_cache_hit_counts_no_tokens(mode, meters):
    """The tokens of the first answer were counted when it was made."""

    def cached(request, call_next):
        request.call.cache_hit = True
        yield from ()
        return ANSWER

    run(mode, remote(mode), [meters.metrics(), cached], REQUEST)
    assert TOKENS not in meters.points()


@modes
def test_without_counts_there_is_no_token_metric(mode, meters):
    """What is not known is not recorded as zero."""
    run(mode, remote(mode, Response("a"), Response("b", usage=Usage(output_tokens=0))), [meters.metrics()], REQUEST)
    assert TOKENS not in meters.points()


@modes
def test_after_a_fallback_the_model_that_answered_is_named(mode, meters):
    """Like the span."""

    def fall_back(request, call_next):
        try:
            return (yield from call_next(request))
        except Overloaded:
            return (yield from call_next(request.evolve(model="m-2")))

    run(mode, remote(mode, Overloaded("full"), "hello"), [meters.metrics(), fall_back], REQUEST)
    assert meters.points()[DURATION][0].attributes["gen_ai.request.model"] == "m-2"


@modes
def test_durations_agree_with_spans(mode, meters):
    """The histogram and the span measure the same call."""
    recorder = Recorder()
    stack = [recorder.tracing(), meters.metrics()]
    run(mode, remote(mode, ANSWER), stack, REQUEST, clock=RealClock())  # the first imports what it needs
    first = meters.points()[DURATION][0].sum
    recorder.exporter.clear()
    run(mode, remote(mode, ANSWER), stack, REQUEST, clock=RealClock())
    measured = meters.points()[DURATION][0].sum - first
    assert 0 < measured <= (recorder.call.end_time - recorder.call.start_time) / 1e9 + 0.05


class RealClock(VirtualClock):
    """Time as it is; nothing sleeps."""

    def now(self) -> float:
        return time.perf_counter()


def test_a_meter_that_raises_changes_no_result(capsys, meters):
    """It is reported once."""

    class Broken:
        def get_meter(self, *args, **kwargs):
            raise RuntimeError("broken")

    for _ in range(2):
        mode = MODES[0]
        ran = run(mode, remote(mode, ANSWER), [Metrics(meter_provider=Broken())], REQUEST)
        assert ran.response.text == "forty two"
    assert capsys.readouterr().err.count("metrics failed with RuntimeError") == 1


def test_an_sdk_that_is_set_up_later_is_noticed():
    """The same `Metrics` works from then on."""
    script = """
from opentelemetry import metrics
from fluxibly.middleware import Metrics
from fluxibly.pipeline import Pipeline
from fluxibly.testing import ScriptedProvider
from fluxibly.types import Request
pipeline = Pipeline(ScriptedProvider("a", "b"), [Metrics()])
request = Request(model="m", messages="Hi")
pipeline.complete(request)
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
reader = InMemoryMetricReader()
metrics.set_meter_provider(MeterProvider([reader]))
pipeline.complete(request)
print(reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics[0].data.data_points[0].count)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert (ran.stdout, ran.stderr) == ("1\n", "")
