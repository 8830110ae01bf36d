"""Metrics under the names of the conventions' edition that is not released yet."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.metrics.export import HistogramDataPoint
from support.meters import WHO, Meters
from support.tracing_tools import REQUEST, remote

from fluxibly import LLM, Request, Response
from fluxibly.errors import ConfigError, Overloaded, RateLimitError, StreamInterrupted
from fluxibly.middleware import Retry, StreamMeter
from fluxibly.pipeline import Pipeline
from fluxibly.testing import Delay, ScriptedProvider, VirtualClock
from fluxibly.testing.modes import MODES, run
from fluxibly.types import Chunk, Usage

modes = pytest.mark.parametrize("mode", MODES, ids=str)

INFERENCE = "gen_ai.client.inference."
DURATIONS = {INFERENCE + "duration", INFERENCE + "time_to_first_chunk", INFERENCE + "time_per_output_chunk"}
PER_CALL = {INFERENCE + "operation.input_tokens", INFERENCE + "operation.output_tokens"}
KINDS = (
    "input_tokens",
    "output_tokens",
    "cache_read.input_tokens",
    "cache_write.input_tokens",
    "reasoning.output_tokens",
)
COUNTERS = {f"{INFERENCE}usage.{kind}" for kind in KINDS}
USAGE = Usage(input_tokens=17, output_tokens=5, cached_tokens=3, cache_write_tokens=4, reasoning_tokens=2)


@pytest.fixture
def meters():
    return Meters()


def counted(meters):
    """The sums of the counters, by the kind of token."""
    points = meters.points()
    return {kind: sum(point.value for point in points[f"{INFERENCE}usage.{kind}"]) for kind in KINDS}


@modes
def test_names_units_kinds_and_attributes(mode, meters):
    """Durations are renamed; tokens are counters by kind and two histograms."""
    clock = VirtualClock()
    script = [Delay(2), "a", Delay(1), Chunk("c", finish_reason="stop", usage=USAGE, model="m-1-2026")]
    stack = [meters.metrics(conventions="latest"), StreamMeter()]
    run(mode, remote(mode, script, clock=clock), stack, REQUEST, clock=clock)
    found = meters.read()
    durations = DURATIONS if mode.streaming else {INFERENCE + "duration"}
    assert found.keys() == durations | PER_CALL | COUNTERS
    points = meters.points()
    for name, metric in found.items():
        assert metric.unit == ("s" if name in DURATIONS else "{token}"), name
        (point,) = points[name]
        if name in COUNTERS:
            assert metric.data.is_monotonic
            assert dict(point.attributes) == {**WHO, "gen_ai.token.modality": "unknown"}
        else:
            assert isinstance(point, HistogramDataPoint)
            assert point.explicit_bounds[:2] == ((0.01, 0.02) if name in DURATIONS else (1, 4))
            outcome = {"fluxibly.outcome": "completed"} if name == INFERENCE + "duration" else {}
            assert dict(point.attributes) == {**WHO, **outcome}
    assert points[INFERENCE + "duration"][0].sum == 3
    assert list(counted(meters).values()) == [17, 5, 3, 4, 2]
    assert [points[name][0].sum for name in sorted(PER_CALL)] == [17, 5]


@modes
def test_a_failed_call_counts_no_tokens(mode, meters):
    """The counters get a 0, the histograms nothing, and the duration its error's type."""
    run(mode, remote(mode, Overloaded("busy", status=529)), [meters.metrics(conventions="latest")], REQUEST)
    assert set(counted(meters).values()) == {0}
    points = meters.points()
    assert not PER_CALL & points.keys()
    assert points[INFERENCE + "duration"][0].attributes["error.type"] == "Overloaded"


def test_tokens_of_a_call_that_failed_after_they_were_told(meters):
    """They were spent, so the counters have them."""
    script = ["a", Chunk("b", usage=USAGE), Overloaded("busy", status=529)]
    with pytest.raises(StreamInterrupted):
        list(Pipeline(ScriptedProvider(script), [meters.metrics(conventions="latest")]).stream(REQUEST))
    assert list(counted(meters).values()) == [17, 5, 3, 4, 2]
    assert not PER_CALL & meters.points().keys()


@modes
def test_a_completed_call_whose_tokens_nobody_told(mode, meters):
    """It counts as 0, in the histograms too."""
    run(mode, remote(mode, ["a", "b"]), [meters.metrics(conventions="latest")], REQUEST)
    assert set(counted(meters).values()) == {0}
    points = meters.points()
    assert [(points[name][0].count, points[name][0].sum) for name in PER_CALL] == [(1, 0)] * 2


def test_an_abandoned_stream_whose_tokens_nobody_told(meters):
    """Nobody knows what it would have come to: no histogram has it."""
    with Pipeline(ScriptedProvider(["a", "b"]), [meters.metrics(conventions="latest")]).stream(REQUEST) as stream:
        next(stream)
    assert set(counted(meters).values()) == {0}
    assert not PER_CALL & meters.points().keys()


def test_what_was_never_sent_counts_no_tokens(meters):
    """A cache hit, and a call that a layer refused."""

    def cache(request, call_next):
        request.call.cache_hit = True
        return Response("old", usage=USAGE)
        yield

    def refuse(request, call_next):
        raise ValueError("no")
        yield

    for layer in (cache, refuse):
        pipeline = Pipeline(ScriptedProvider("x"), [meters.metrics(conventions="latest"), layer])
        try:
            pipeline.complete(Request(model="m", messages="hi"))
        except ValueError:
            continue
    assert meters.points().keys() == {INFERENCE + "duration"}


def test_tokens_are_counted_once_however_often_it_was_tried(meters):
    """Those of the attempt that answered."""
    answer = Response("a", usage=USAGE, finish_reason="stop")
    provider = ScriptedProvider(RateLimitError("slow"), answer, clock=VirtualClock())
    stack = [meters.metrics(conventions="latest"), Retry(max_retries=1)]
    Pipeline(provider, stack, clock=VirtualClock()).complete(REQUEST)
    assert counted(meters)["input_tokens"] == 17


def test_both_editions_at_once(meters):
    """Two layers, one for each: neither loses what waits for the other's collection."""
    stack = [meters.metrics(), meters.metrics(conventions="latest")]
    pipeline = Pipeline(ScriptedProvider(*[Response("a", usage=USAGE, finish_reason="stop")] * 5), stack)
    for _ in range(5):
        pipeline.complete(REQUEST)
    points = meters.points()
    assert counted(meters)["output_tokens"] == 25
    assert points["gen_ai.client.operation.duration"][0].count == points[INFERENCE + "duration"][0].count == 5
    assert {point.attributes["gen_ai.token.type"] for point in points["gen_ai.client.token.usage"]} == {
        "input",
        "output",
    }
    assert not any(name.startswith("fluxibly.") for name in points)


def test_chosen_in_yaml(tmp_path):
    """As a setting of the middleware; another value is refused with what is due."""
    path = tmp_path / "llm.yaml"
    text = "llm:\n  framework: echo\n  model: m\n  middleware:\n    - metrics: {conventions: %s}\n"
    path.write_text(text % "latest")
    with LLM.from_yaml(str(path)) as llm:
        assert llm.pipeline.middleware[0].conventions == "latest"
    path.write_text(text % "newest")
    with pytest.raises(ConfigError, match="released.*latest"):
        LLM.from_yaml(str(path))


def test_a_value_that_is_neither(meters):
    """It names the two."""
    with pytest.raises(ValueError, match="released.*latest"):
        meters.metrics(conventions="unreleased")
