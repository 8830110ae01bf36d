"""The names, units, boundaries and attributes of metrics, in all modes."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref

import anyio
import pytest
from opentelemetry import metrics as api
from opentelemetry.metrics import NoOpMeter
from opentelemetry.sdk.metrics import Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    ConsoleMetricExporter,
    InMemoryMetricReader,
    MetricExporter,
    MetricExportResult,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.metrics.view import DropAggregation, View
from support.meters import WHO, Meters
from support.tracing_tools import ANSWER, REQUEST, AsyncRemote, Recorder, Remote, remote

from fluxibly import Target
from fluxibly._logs import forget_reports
from fluxibly.errors import BadRequest, Overloaded, RateLimitError, ResponseInvalid, StreamStalled
from fluxibly.flow import ask
from fluxibly.middleware import Fallback, Metrics, Retry, StreamMeter, Validation
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.telemetry import _metrics as instruments, semconv
from fluxibly.testing import Delay, VirtualClock
from fluxibly.testing.modes import MODES, run
from fluxibly.types import Chunk, ProviderInfo, Response, Usage

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
DURATION, TOKENS, FIRST, PER_CHUNK = NAMES


@pytest.fixture
def meters():
    forget_reports()
    return Meters()


@modes
def test_names_units_boundaries_and_attributes(mode, meters):
    """A call has a duration and tokens. A stream also has a time to first chunk and a mean wait for the others."""
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
def test_the_consumers_own_time_is_not_the_streams(mode, meters):
    """The mean wait excludes the time that the consumer took."""
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
    """All attempts are one call. The duration has the error's type."""
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
    """The outcome is `abandoned` without an error, and the reported tokens are counted."""
    script = [Chunk("a", usage=Usage(input_tokens=7)), "b", "c"]
    run(mode, remote(mode, script), [meters.metrics(), StreamMeter()], REQUEST, stop_after=2)
    points = meters.points()
    attributes = points[DURATION][0].attributes
    assert attributes["fluxibly.outcome"] == "abandoned"
    assert "error.type" not in attributes
    assert [(point.attributes["gen_ai.token.type"], point.sum) for point in points[TOKENS]] == [("input", 7)]


@streams
def test_a_stall_is_measured_as_such(mode, meters):
    """A stall is an error with its own outcome."""
    run(mode, remote(mode, ["a", StreamStalled("nothing came")]), [meters.metrics()], REQUEST)
    attributes = meters.points()[DURATION][0].attributes
    assert (attributes["fluxibly.outcome"], attributes["error.type"]) == ("stalled", "StreamStalled")


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_cancelled_call_is_measured_too(backend, streaming, meters):
    """The metrics name the error as the span does, and count the usage so far. Only streams have stream metrics."""

    class Slow(AsyncRemote):
        async def complete(self, request):
            await anyio.sleep_forever()

        async def stream(self, request):
            yield Chunk("a", usage=Usage(input_tokens=7))
            await anyio.sleep_forever()

    async def main():
        async with anyio.create_task_group() as group:
            pipeline = AsyncPipeline(Slow(), [meters.metrics(), StreamMeter()])

            async def read():
                async for _ in pipeline.stream(REQUEST):
                    pass

            group.start_soon(read if streaming else lambda: pipeline.complete(REQUEST))
            await anyio.wait_all_tasks_blocked()
            group.cancel_scope.cancel()

    anyio.run(main, backend=backend)
    points = meters.points()
    assert points.keys() == ({DURATION, TOKENS, FIRST} if streaming else {DURATION})
    attributes = points[DURATION][0].attributes
    assert (attributes["fluxibly.outcome"], attributes["error.type"]) == ("cancelled", "CancelledError")


@modes
def test_a_cache_hit_counts_no_tokens(mode, meters):
    """The tokens of the cached answer were counted when the model generated it."""

    def cached(request, call_next):
        request.call.cache_hit = True
        yield from ()
        return ANSWER

    run(mode, remote(mode), [meters.metrics(), cached], REQUEST)
    assert TOKENS not in meters.points()


@modes
def test_without_counts_there_is_no_token_metric(mode, meters):
    """Unknown counts are not recorded as zero."""
    run(mode, remote(mode, Response("a"), Response("b", usage=Usage(output_tokens=0))), [meters.metrics()], REQUEST)
    assert TOKENS not in meters.points()


@modes
def test_after_a_fallback_the_model_that_answered_is_named(mode, meters):
    """The metrics name the same model as the span."""

    def fall_back(request, call_next):
        try:
            return (yield from call_next(request))
        except Overloaded:
            return (yield from call_next(request.evolve(model="m-2")))

    run(mode, remote(mode, Overloaded("full"), "hello"), [meters.metrics(), fall_back], REQUEST)
    assert meters.points()[DURATION][0].attributes["gen_ai.request.model"] == "m-2"


class TestTokensOfEveryAttempt:
    """Each provider and model has a value once a call, with the tokens of all attempts there."""

    LITTLE, MUCH = Usage(input_tokens=3, output_tokens=1), Usage(input_tokens=20, output_tokens=10)
    ELSEWHERE = ProviderInfo(telemetry_name="anthropic", server_address="other.test")

    def elsewhere(self, mode, *answers):
        provider = remote(mode, *answers)
        provider.info = self.ELSEWHERE
        return Target(provider, model="m-2")

    def inputs(self, meters):
        """Return provider, model and answering model of each value of input tokens, with its sum and count."""
        names = ("gen_ai.provider.name", "gen_ai.request.model", "gen_ai.response.model")
        points = [p for p in meters.points()[TOKENS] if p.attributes["gen_ai.token.type"] == "input"]
        return {tuple(p.attributes.get(name) for name in names): (p.sum, p.count) for p in points}

    @modes
    @pytest.mark.parametrize("last", ["good", "refused"])
    def test_rejected_answers(self, mode, last, meters):
        """Their tokens were billed, whatever came after them."""
        check = Validation(check=lambda response: None if response.text == "good" else "say good", hold=True)
        bad = Response("bad", usage=self.LITTLE)
        end = Response("good", usage=self.MUCH, model="m-1-2026") if last == "good" else BadRequest("too long")
        run(mode, remote(mode, bad, bad, end), [meters.metrics(), check], REQUEST)
        good = {("openai", "m-1", "m-1-2026"): (26, 1)}
        found = self.inputs(meters)
        if last == "good":
            assert found == good
        else:
            ((who, counted),) = found.items()
            assert (who[:2], counted) == (("openai", "m-1"), (6, 1))

    @modes
    def test_another_target_that_answers(self, mode, meters):
        """Only the provider and model that answered have the name of the model in the answer."""
        check = Validation(
            check=lambda response: None if response.text == "good" else "say good", max_retries=0, hold=True
        )

        def fall_back(request, call_next):
            try:
                return (yield from call_next(request))
            except ResponseInvalid:
                return (yield from call_next(request.evolve(target=target)))

        target = self.elsewhere(mode, Response("good", usage=self.MUCH, model="m-2-2026"))
        bad = Response("bad", usage=self.LITTLE, model="m-1-2026")
        run(mode, remote(mode, bad), [meters.metrics(), fall_back, check], REQUEST)
        assert self.inputs(meters) == {
            ("anthropic", "m-2", "m-2-2026"): (20, 1),
            ("openai", "m-1", None): (3, 1),
        }
        servers = {point.attributes["server.address"] for point in meters.points()[TOKENS]}
        assert servers == {"api.test", "other.test"}
        (duration,) = meters.points()[DURATION]
        assert (duration.count, duration.attributes["gen_ai.provider.name"]) == (1, "anthropic")

    @modes
    def test_targets_of_which_none_answers(self, mode, meters):
        """The duration has the names that were asked for, and no name of an answering model."""
        fails = [Chunk(model="m-2-2026"), Overloaded("full")] if mode.streaming else Overloaded("full")
        fallback = Fallback(to=[self.elsewhere(mode, fails)])
        stack = [meters.metrics(), Validation(hold=True), fallback]
        run(mode, remote(mode, Overloaded("full")), stack, REQUEST)
        (point,) = meters.points()[DURATION]
        given = point.attributes
        assert (given["gen_ai.provider.name"], given["gen_ai.request.model"]) == ("openai", "m-1")
        assert "gen_ai.response.model" not in given

    @modes
    def test_an_ask(self, mode, meters):
        """Its tokens are counted under its own model, or with the call's if that is the same."""
        target = self.elsewhere(mode, *[Response("fine", usage=self.LITTLE)] * 2)

        def guard(request, call_next):
            yield from ask(request, target=target)
            yield from ask(request, target=target)
            yield from ask(request)
            return (yield from call_next(request))

        for calls in (1, 2):  # the second call's values wait until the SDK collects
            provider = remote(mode, Response("fine", usage=self.LITTLE), ANSWER)
            run(mode, provider, [meters.metrics(), guard], REQUEST)
            assert self.inputs(meters) == {
                ("anthropic", "m-2", None): (6, 1),
                ("openai", "m-1", "m-1-2026"): (10 * calls, calls),
            }
            target = self.elsewhere(mode, *[Response("fine", usage=None)] * 2)

    @modes
    def test_a_layer_that_is_run_several_times(self, mode, meters):
        """Within a layer that asks again, each time counts by itself, and no token twice."""
        check = Validation(check=lambda response: None if response.text == "good" else "say good", hold=True)

        def ask_before(request, call_next):
            yield from ask(request)
            return (yield from call_next(request))

        answers = [Response(text, usage=self.LITTLE) for text in ("fine", "bad", "fine", "good")]
        run(mode, remote(mode, *answers), [check, meters.metrics(), ask_before], REQUEST)
        assert sum(total for total, _ in self.inputs(meters).values()) == 12
        assert meters.points()[DURATION][0].count == 2


@modes
def test_durations_agree_with_spans(mode, meters):
    """The histogram and the span measure the same call."""
    recorder = Recorder()
    stack = [recorder.tracing(), meters.metrics()]
    run(mode, remote(mode, ANSWER), stack, REQUEST, clock=RealClock())  # the first call imports its modules
    first = meters.points()[DURATION][0].sum
    recorder.exporter.clear()
    run(mode, remote(mode, ANSWER), stack, REQUEST, clock=RealClock())
    measured = meters.points()[DURATION][0].sum - first
    assert 0 < measured <= (recorder.call.end_time - recorder.call.start_time) / 1e9 + 0.05


class RealClock(VirtualClock):
    """A clock that shows the real time, and does not sleep."""

    def now(self) -> float:
        return time.perf_counter()


def test_a_meter_that_raises_changes_no_result(capsys, meters):
    """The failure is reported once."""

    class Broken:
        def get_meter(self, *args, **kwargs):
            raise RuntimeError("broken")

    for _ in range(2):
        mode = MODES[0]
        ran = run(mode, remote(mode, ANSWER), [Metrics(meter_provider=Broken())], REQUEST)
        assert ran.response.text == "forty two"
    assert capsys.readouterr().err.count("metrics failed with RuntimeError") == 1


def test_an_sdk_that_is_set_up_later_is_noticed():
    """The same `Metrics` works as soon as there is an SDK."""
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


class TestWaiting:
    """Measurements wait until the SDK collects, and a reader cannot see any difference."""

    @pytest.fixture
    def call(self, meters):
        """A function that makes a call with a new `Metrics` on the shared meter provider."""
        mode = MODES[0]
        return lambda *outer: run(mode, remote(mode, ANSWER), [*outer, meters.metrics()], REQUEST)

    def counts(self, reader):
        """Return how often each metric was recorded."""
        found: dict[str, int] = {}
        for resource in reader.get_metrics_data().resource_metrics:
            for metric in resource.scope_metrics[0].metrics:
                found[metric.name] = sum(point.count for point in metric.data.data_points)
        return found

    def test_a_reader_sees_every_call_that_has_ended(self, meters, call):
        """So it is with several `Metrics` on one provider. Only the histograms are exported."""
        for calls in (1, 2, 3):
            call()
            assert self.counts(meters.reader) == {DURATION: calls, TOKENS: 2 * calls}

    def test_measurements_are_recorded_at_once_when_the_queue_is_full(self, meters, call, monkeypatch):
        """Memory is bounded even if no reader collects."""
        monkeypatch.setattr(instruments, "WAITING", 3)
        for _ in range(8):
            call()
        assert len(instruments.recorder_of(meters.provider, semconv.RELEASED).waiting) == 3
        assert self.counts(meters.reader)[DURATION] == 8

    def test_more_kinds_of_calls_than_are_kept(self, meters, call, monkeypatch):
        """Calls of the other kinds are recorded at once."""
        monkeypatch.setattr(instruments, "KINDS", 2)

        def asks_for(model):
            return lambda request, call_next: (yield from call_next(request.evolve(model=model)))

        for _ in range(2):
            for model in ("a", "b", "c", "d"):
                call(asks_for(model))
        counts = {point.attributes["gen_ai.request.model"]: point.count for point in meters.points()[DURATION]}
        assert counts == {"a": 2, "b": 2, "c": 2, "d": 2}

    def test_each_reader_sees_all(self):
        """The order in which the readers collect does not matter."""
        readers = InMemoryMetricReader(), InMemoryMetricReader()
        metrics = Metrics(meter_provider=MeterProvider(readers, shutdown_on_exit=False))
        mode = MODES[0]
        for _ in range(3):
            run(mode, remote(mode, ANSWER), [metrics], REQUEST)
        assert [self.counts(reader)[DURATION] for reader in readers] == [3, 3]

    def test_readers_of_differences_see_each_call_once(self):
        """Readers collect independently, and a delta covers only the calls within its time span."""
        delta = {Histogram: AggregationTemporality.DELTA}
        readers = InMemoryMetricReader(delta), InMemoryMetricReader(delta)
        metrics = Metrics(meter_provider=MeterProvider(readers, shutdown_on_exit=False))
        mode = MODES[0]
        ends = [0]
        for calls in (1, 2, 3):
            for _ in range(calls):
                run(mode, remote(mode, ANSWER), [metrics], REQUEST)
            data = readers[0].get_metrics_data()
            (metric, *_) = data.resource_metrics[0].scope_metrics[0].metrics
            (point,) = metric.data.data_points
            assert (metric.name, point.count) == (DURATION, calls)
            assert point.start_time_unix_nano >= ends[-1]
            ends.append(point.time_unix_nano)
        assert self.counts(readers[1])[DURATION] == 6

    def test_views_may_drop_all_but_what_they_name(self):
        """The SDK runs the callback that records measurements even if a view drops its instrument."""
        reader = InMemoryMetricReader()
        views = [
            View(instrument_name=TOKENS, attribute_keys={"gen_ai.token.type"}),
            View(instrument_name="*", aggregation=DropAggregation()),
        ]
        provider = MeterProvider([reader], views=views, shutdown_on_exit=False)
        mode = MODES[0]
        for _ in range(3):
            run(mode, remote(mode, ANSWER), [Metrics(meter_provider=provider)], REQUEST)
        metrics = reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics
        counts = {
            m.name: {dict(p.attributes)["gen_ai.token.type"]: p.count for p in m.data.data_points} for m in metrics
        }
        assert counts == {TOKENS: {"input": 3, "output": 3}}

    def test_a_process_that_ends_without_a_shutdown_loses_nothing(self):
        """The SDK's own exit hook collects the waiting measurements."""
        script = """
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult, PeriodicExportingMetricReader
from fluxibly.middleware import Metrics
from fluxibly.pipeline import Pipeline
from fluxibly.testing import ScriptedProvider
from fluxibly.types import Request
class Exporter(MetricExporter):
    def export(self, data, timeout_millis=0, **kwargs):
        for metric in data.resource_metrics[0].scope_metrics[0].metrics:
            print(metric.name, metric.data.data_points[0].count, flush=True)
        return MetricExportResult.SUCCESS
    def force_flush(self, timeout_millis=0):
        return True
    def shutdown(self, timeout_millis=0, **kwargs):
        pass
metrics.set_meter_provider(MeterProvider([PeriodicExportingMetricReader(Exporter(), 3_600_000)]))
pipeline = Pipeline(ScriptedProvider(*"abc"), [Metrics()])
for _ in range(3):
    pipeline.complete(Request(model="m", messages="Hi"))
"""
        ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
        assert (ran.stdout, ran.stderr) == (f"{DURATION} 3\n", "")

    def test_a_flush_exports_waiting_measurements(self):
        """A cloud function flushes before it is frozen."""
        exported = []

        class Reader(PeriodicExportingMetricReader):
            def _receive_metrics(self, metrics_data, *args, **kwargs):
                metrics = metrics_data.resource_metrics[0].scope_metrics[0].metrics
                exported.extend(p.count for m in metrics if m.name == DURATION for p in m.data.data_points)

        provider = MeterProvider([Reader(ConsoleMetricExporter(), 3_600_000)], shutdown_on_exit=False)
        mode = MODES[0]
        for _ in range(3):
            run(mode, remote(mode, ANSWER), [Metrics(meter_provider=provider)], REQUEST)
        provider.force_flush()
        assert exported == [3]
        provider.shutdown()

    def test_a_provider_that_is_let_go_is_freed(self):
        """No recorder or cache keeps the provider alive."""
        provider = MeterProvider([InMemoryMetricReader()], shutdown_on_exit=False)
        mode = MODES[0]
        run(mode, remote(mode, ANSWER), [Metrics(meter_provider=provider)], REQUEST)
        gone = weakref.ref(provider)
        del provider
        gc.collect()
        assert gone() is None

    def test_a_histogram_begins_with_its_first_call(self, meters, call):
        """The histogram does not begin with the first collection."""
        call()
        after_first = time.time_ns()
        call()
        (point,) = meters.points()[DURATION]
        assert point.start_time_unix_nano <= after_first

    def test_shutting_down_exports_waiting_measurements(self):
        """A program shuts the provider down when it ends."""
        exported: list[int] = []

        class Keeping(MetricExporter):
            def export(self, metrics_data, timeout_millis=0, **kwargs):
                metrics = metrics_data.resource_metrics[0].scope_metrics[0].metrics
                exported.extend(m.data.data_points[0].count for m in metrics if m.name == DURATION)
                return MetricExportResult.SUCCESS

            def force_flush(self, timeout_millis=0):
                return True

            def shutdown(self, timeout_millis=0, **kwargs):
                pass

        reader = PeriodicExportingMetricReader(Keeping(), export_interval_millis=3_600_000)
        provider = MeterProvider([reader], shutdown_on_exit=False)
        mode = MODES[0]
        for _ in range(3):
            run(mode, remote(mode, ANSWER), [Metrics(meter_provider=provider)], REQUEST)
        provider.shutdown()
        assert exported == [3]

    def test_several_threads_call_while_another_collects(self, meters):
        """No measurement is lost or counted twice."""
        pipeline = Pipeline(Remote(*[ANSWER] * 400), [meters.metrics()])

        def work():
            for _ in range(100):
                pipeline.complete(REQUEST)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            meters.reader.get_metrics_data()
        for thread in threads:
            thread.join()
        assert self.counts(meters.reader) == {DURATION: 400, TOKENS: 800}

    def test_exemplars_name_the_span_of_their_call(self, meters):
        """The exemplars are right even though the span has ended long before the SDK collects."""
        recorder = Recorder()
        mode = MODES[0]
        for _ in range(2):
            run(mode, remote(mode, ANSWER), [recorder.tracing(), meters.metrics()], REQUEST)
        spans = {span.context.span_id for span in recorder.spans if span.name.startswith("chat")}
        exemplars = [exemplar for point in meters.points()[DURATION] for exemplar in point.exemplars]
        assert exemplars
        assert {exemplar.span_id for exemplar in exemplars} <= spans

    def test_a_histogram_that_raises_breaks_no_collection(self, meters, call, capsys, monkeypatch):
        """The failure is reported once, and the other waiting measurements are recorded."""
        call()
        recorder = instruments.recorder_of(meters.provider, semconv.RELEASED)

        def broken(*_):
            raise RuntimeError("broken")

        for _ in range(2):
            call()
        histogram = recorder.instruments.duration
        with monkeypatch.context() as patch:
            patch.setattr(histogram, "record", broken)
            meters.reader.get_metrics_data()
        call()
        assert self.counts(meters.reader)[DURATION] == 2
        assert capsys.readouterr().err.count("metrics failed with RuntimeError") == 1

    def test_a_provider_that_is_not_the_sdks_gets_measurements_at_once(self, meters):
        """It is unknown whether such a provider collects."""
        recorded: list[float] = []

        class Meter(NoOpMeter):
            def create_histogram(self, name, *args, **kwargs):
                histogram = super().create_histogram(name, *args, **kwargs)
                histogram.record = lambda amount, *_: recorded.append(amount)
                return histogram

        class Other(api.MeterProvider):
            def get_meter(self, name, *args, **kwargs):
                return Meter(name)

        mode = MODES[0]
        metrics = Metrics(meter_provider=Other())
        for calls in (1, 2):
            run(mode, remote(mode, ANSWER), [metrics], REQUEST)
            assert len(recorded) == 3 * calls

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_forked_process_goes_on_measuring(self):
        """The child keeps the measurements that waited at the fork, just as the SDK keeps its own."""
        script = """
import os
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from fluxibly.middleware import Metrics
from fluxibly.pipeline import Pipeline
from fluxibly.testing import ScriptedProvider
from fluxibly.types import Request
reader = InMemoryMetricReader()
pipeline = Pipeline(ScriptedProvider(*"abcd"), [Metrics(meter_provider=MeterProvider([reader], shutdown_on_exit=False))])
request = Request(model="m", messages="Hi")
pipeline.complete(request)
pipeline.complete(request)
child = os.fork()
if child:
    os.waitpid(child, 0)
else:
    pipeline.complete(request)
print(reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics[0].data.data_points[0].count, flush=True)
"""
        ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
        assert (ran.stdout, ran.stderr) == ("3\n2\n", "")
