"""Metrics under the names of the unreleased edition of the conventions."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.metrics.export import HistogramDataPoint
from support.meters import WHO, Meters
from support.tracing_tools import REQUEST, remote

from fluxibly import LLM, Request, Response
from fluxibly.errors import BadRequest, ConfigError, Overloaded, RateLimitError, StreamInterrupted
from fluxibly.flow import ask
from fluxibly.middleware import Retry, StreamMeter, Validation
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
    """Return the sums of the counters by the kind of token."""
    points = meters.points()
    return {kind: sum(point.value for point in points[f"{INFERENCE}usage.{kind}"]) for kind in KINDS}


@modes
def test_names_units_kinds_and_attributes(mode, meters):
    """Durations have new names. Tokens have a counter for each kind, and two histograms."""
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
    """The counters get a 0, the histograms get nothing, and the duration has the error's type."""
    run(mode, remote(mode, Overloaded("busy", status=529)), [meters.metrics(conventions="latest")], REQUEST)
    assert set(counted(meters).values()) == {0}
    points = meters.points()
    assert not PER_CALL & points.keys()
    assert points[INFERENCE + "duration"][0].attributes["error.type"] == "Overloaded"


def test_tokens_of_a_call_that_failed_after_they_were_reported(meters):
    """The counters have these tokens, because they were spent."""
    script = ["a", Chunk("b", usage=USAGE), Overloaded("busy", status=529)]
    with pytest.raises(StreamInterrupted):
        list(Pipeline(ScriptedProvider(script), [meters.metrics(conventions="latest")]).stream(REQUEST))
    assert list(counted(meters).values()) == [17, 5, 3, 4, 2]
    assert not PER_CALL & meters.points().keys()


@modes
def test_a_completed_call_without_reported_tokens(mode, meters):
    """The call counts as 0, in the histograms too."""
    run(mode, remote(mode, ["a", "b"]), [meters.metrics(conventions="latest")], REQUEST)
    assert set(counted(meters).values()) == {0}
    points = meters.points()
    assert [(points[name][0].count, points[name][0].sum) for name in PER_CALL] == [(1, 0)] * 2


def test_an_abandoned_stream_without_reported_tokens(meters):
    """The histograms leave the stream out, because its total is unknown."""
    with Pipeline(ScriptedProvider(["a", "b"]), [meters.metrics(conventions="latest")]).stream(REQUEST) as stream:
        next(stream)
    assert set(counted(meters).values()) == {0}
    assert not PER_CALL & meters.points().keys()


def test_a_request_that_was_never_sent_counts_no_tokens(meters):
    """Neither a cache hit nor a call that a layer refused counts tokens."""

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


def test_tokens_are_counted_once_regardless_of_retries(meters):
    """An attempt that failed before the service reported tokens adds none."""
    answer = Response("a", usage=USAGE, finish_reason="stop")
    provider = ScriptedProvider(RateLimitError("slow"), answer, clock=VirtualClock())
    stack = [meters.metrics(conventions="latest"), Retry(max_retries=1)]
    Pipeline(provider, stack, clock=VirtualClock()).complete(REQUEST)
    assert counted(meters)["input_tokens"] == 17


@modes
@pytest.mark.parametrize("last", ["good", "refused"])
def test_tokens_of_rejected_answers(mode, last, meters):
    """The counters have them. The histograms have one value for each model of a call that did not fail."""
    check = Validation(check=lambda response: None if response.text == "good" else "say good", hold=True)
    end = Response("good", usage=USAGE) if last == "good" else BadRequest("too long")
    provider = remote(mode, Response("bad", usage=USAGE), end)
    run(mode, provider, [meters.metrics(conventions="latest"), check], REQUEST)
    if last == "good":
        assert list(counted(meters).values()) == [34, 10, 6, 8, 4]
        assert [(meters.points()[name][0].count, meters.points()[name][0].sum) for name in sorted(PER_CALL)] == [
            (1, 34),
            (1, 10),
        ]
    else:
        assert list(counted(meters).values()) == [17, 5, 3, 4, 2]
        assert not PER_CALL & meters.points().keys()


@modes
def test_a_call_with_reported_tokens_of_an_ask_alone(mode, meters):
    """The call's own tokens are unknown, and are not counted as 0."""

    def guard(request, call_next):
        yield from ask(request.evolve(model="judge"))
        return (yield from call_next(request))

    provider = remote(mode, Response("fine", usage=USAGE), Response("a"))
    run(mode, provider, [meters.metrics(conventions="latest"), guard], REQUEST)
    points = meters.points()
    for name in (*PER_CALL, *COUNTERS):
        assert [point.attributes["gen_ai.request.model"] for point in points[name]] == ["judge"]


def test_both_editions_at_once(meters):
    """With one layer for each edition, neither loses measurements when the other is collected."""
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


def test_the_edition_can_be_set_in_yaml(tmp_path):
    """It is a setting of the middleware. The error for an invalid value names the valid values."""
    path = tmp_path / "llm.yaml"
    text = "llm:\n  framework: echo\n  model: m\n  middleware:\n    - metrics: {conventions: %s}\n"
    path.write_text(text % "latest")
    with LLM.from_yaml(str(path)) as llm:
        assert llm.pipeline.middleware[0].conventions == "latest"
    path.write_text(text % "newest")
    with pytest.raises(ConfigError, match=r"released.*latest"):
        LLM.from_yaml(str(path))


def test_an_invalid_edition_is_refused(meters):
    """The error names the two valid values."""
    with pytest.raises(ValueError, match=r"released.*latest"):
        meters.metrics(conventions="unreleased")
