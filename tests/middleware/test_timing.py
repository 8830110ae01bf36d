"""`Timing` of calls, attempts and layers, with a clock that moves only when a test advances it."""

from __future__ import annotations

import pytest
from support.calling import call

from fluxibly._logs import forget_reports
from fluxibly.errors import ServerError, StreamInterrupted
from fluxibly.flow import map_chunks, sleep
from fluxibly.middleware import Retry, StreamMeter, Timing
from fluxibly.pipeline import Pipeline
from fluxibly.testing import Delay, ScriptedProvider, VirtualClock
from fluxibly.testing.modes import MODES
from fluxibly.types import Request


def retry():
    return Retry(base_delay=2, max_delay=2, uniform=lambda low, high: high)


def test_call_and_attempts(mode):
    """Each attempt has its own time. The call's time includes the waits."""
    made = call(mode, [Timing(), retry()], [Delay(0.5), ServerError("down")], [Delay(1), "a", Delay(0.25), "b"])
    assert made.record.timings == {"call": 3.75, "attempt.0": 0.5, "attempt.1": 1.25}


def test_a_failed_call(mode):
    """A failed call has its times too."""
    made = call(mode, [Timing(), Retry(max_retries=0)], [Delay(1), "a", Delay(2), ServerError("down")])
    assert isinstance(made.ran.error, StreamInterrupted if mode.streaming else ServerError)
    assert made.record.timings == {"call": 3, "attempt.0": 3}


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.streaming], ids=str)
def test_an_abandoned_stream(mode):
    """The times of an abandoned stream end when it is abandoned."""
    made = call(mode, Timing(), ["a", Delay(2), "b", Delay(4), "c"], stop_after=2)
    assert made.record.timings == {"call": 2, "attempt.0": 2}


def test_a_call_that_reaches_no_provider(mode):
    """Such a call has no attempts."""

    def cached(request, call_next):
        yield from sleep(1)
        return "no Response"

    made = call(mode, [Timing(), cached])
    assert made.record.timings == {"call": 1}


def test_record_gets_the_timings(mode):
    """`record` is called once per call, even if the call failed."""
    seen = []
    timing = Timing(record=lambda timings: seen.append(dict(timings)))
    call(mode, timing, [Delay(1), "a"])
    call(mode, timing, [Delay(2), ServerError("down")])
    assert seen == [{"call": 1, "attempt.0": 1}, {"call": 2, "attempt.0": 2}]


def test_a_record_that_raises_changes_nothing(mode, capsys):
    """Results and errors are unchanged, and the failure is reported once on standard error."""

    def record(timings):
        raise ValueError("no room")

    forget_reports()
    assert call(mode, Timing(record=record), "fine").response.text == "fine"
    failed = call(mode, Timing(record=record), [ServerError("down")])
    assert isinstance(failed.ran.error, ServerError)
    assert capsys.readouterr().err == "fluxibly: Timing(record=…) raised ValueError: no room\n"
    forget_reports()


class TestLayers:
    def test_each_layer_has_its_own_time(self, mode):
        """A layer's time excludes the layers below it, the provider and waits."""

        def outer(request, call_next):
            clock.advance(1)
            response = yield from call_next(request)
            clock.advance(2)
            return response

        def inner(request, call_next):
            clock.advance(10)
            yield from sleep(1000)
            try:
                return (yield from call_next(request))
            finally:
                clock.advance(20)

        clock = None

        def find_clock(request, call_next):
            nonlocal clock
            clock = request.call.clock.__self__
            return (yield from call_next(request))

        made = call(mode, [find_clock, Timing(layers=True), outer, inner], [Delay(5000), "a", Delay(1), "b"])
        name = "TestLayers.test_each_layer_has_its_own_time.<locals>."
        layers = {key: value for key, value in made.record.timings.items() if key.startswith("layer.")}
        assert layers == {f"layer.{name}outer": 3, f"layer.{name}inner": 30}
        assert made.record.timings["call"] == 3 + 30 + 1000 + 5001

    @pytest.mark.parametrize("mode", [mode for mode in MODES if mode.streaming], ids=str)
    def test_each_chunk_is_charged_to_the_layer_that_works_on_it(self, mode):
        """The consumer's own time is not charged to any layer."""
        clock = None

        def slow(request, call_next):
            nonlocal clock
            clock = request.call.clock.__self__

            def fn(chunk):
                clock.advance(3)
                return chunk

            return (yield from map_chunks(call_next(request), fn))

        made = call(mode, [Timing(layers=True), slow, StreamMeter()], ["a", "b"])
        layers = {key: value for key, value in made.record.timings.items() if key.startswith("layer.")}
        assert list(layers.values()) == [6, 0]
        assert list(layers)[1] == "layer.StreamMeter"

    def test_layers_of_one_name_are_added_up(self, mode):
        """Two layers of the same class share one time."""

        class Layer:
            def __call__(self, request, call_next):
                request.call.clock.__self__.advance(1)
                return (yield from call_next(request))

        made = call(mode, [Timing(layers=True), Layer(), Layer()], "a")
        (value,) = [value for key, value in made.record.timings.items() if key.startswith("layer.")]
        assert value == 2

    def test_it_changes_nothing(self, mode):
        """Errors, retries and closing work as they do without `Timing`."""
        made = call(mode, [Timing(layers=True), retry()], ["a", ServerError("down")], "b")
        plain = call(mode, [retry()], ["a", ServerError("down")], "b")
        assert made.ran.response == plain.ran.response
        assert type(made.ran.error) is type(plain.ran.error)
        assert made.record.attempts == plain.record.attempts


def test_one_instance_serves_many_calls():
    """Each call's record has its own times."""
    clock = VirtualClock()
    seen = []
    provider = ScriptedProvider([Delay(1), "a"], [Delay(2), "b"], clock=clock)
    pipeline = Pipeline(provider, [Timing(record=seen.append)], clock=clock)
    for _ in range(2):
        pipeline.complete(Request(model="m", messages="hi"))
    assert [timings["call"] for timings in seen] == [1, 2]
