"""Properties of spans, checked with random stacks, scripts, faults and consumers, in all modes."""

from __future__ import annotations

import gc
import logging
import threading
from collections import Counter
from contextlib import ExitStack, aclosing, suppress
from typing import Any, Self

import anyio
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from support import strategies as s
from support.tracing_tools import Recorder, failed

from fluxibly.middleware import Metrics
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.testing import AsyncScriptedProvider, ScriptedProvider, VirtualClock
from fluxibly.testing.modes import MODES, run
from fluxibly.types import Request

many = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
pytestmark = pytest.mark.usefixtures("quick_collector")
REQUEST = Request(model="m", messages="hi")
OUTCOMES = {"completed", "failed", "abandoned", "cancelled", "stalled"}


class Watching(logging.Handler):
    """A handler that fails the test if OpenTelemetry logs anything."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record.getMessage())

    def __enter__(self) -> Self:
        logging.getLogger("opentelemetry").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("opentelemetry").removeHandler(self)
        assert self.records == []


class Meters:
    """A meter provider whose metrics are compared with spans."""

    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.metrics = Metrics(meter_provider=MeterProvider([self.reader], shutdown_on_exit=False))

    def points(self) -> list[tuple[str, Any]]:
        data = self.reader.get_metrics_data()
        found = [] if data is None else [m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics]
        return [(metric.name, point) for metric in found for point in metric.data.data_points]

    def check(self, recorder: Recorder) -> None:
        """Check that the metrics have the outcomes of the calls' spans, and the tokens of all spans."""
        outcomes, tokens = Counter(), Counter()
        for name, point in self.points():
            if name == "gen_ai.client.operation.duration":
                outcomes[point.attributes["fluxibly.outcome"], point.attributes.get("error.type")] += point.count
            if name == "gen_ai.client.token.usage":
                tokens[point.attributes["gen_ai.token.type"]] += point.sum
        attributes = [span.attributes for span in recorder.calls]
        assert outcomes == Counter((given["fluxibly.outcome"], given.get("error.type")) for given in attributes)
        for kind in ("input", "output"):
            assert tokens[kind] == sum(tokens_of(span, kind) for span in recorder.spans)


def tokens_of(span, kind: str) -> int:
    """Return the tokens of one kind that are on a span of a call, an ask or an attempt."""
    return span.attributes.get(f"gen_ai.usage.{kind}_tokens", 0) + span.attributes.get(
        f"fluxibly.attempt.{kind}_tokens", 0
    )


def check_spans(recorder, *, always=False, raced=False):
    """Check that every span has ended exactly once, and that attempts are children of their calls. Return the calls.

    A single attempt has a span of its own only if all have (`always`), or if it was the branch of a race (`raced`).
    The live span of an attempt that never reached the provider never ends: it was refused, or its stream left unread.
    """
    started, ended = recorder.counting.started, recorder.counting.ended
    assert len(ended) == len({*ended})
    assert {*ended} <= {*started}
    assert {*recorder.counting.open} <= {"fluxibly.attempt"}
    chats = [span for span in recorder.spans if span.name.startswith("chat ")]
    attempts = [span for span in recorder.spans if span.name == "fluxibly.attempt"]
    spans = {span.context.span_id: span for span in (*chats, *attempts)}
    for chat in chats:
        sent = chat.attributes["fluxibly.attempts"]
        mine = recorder.attempts_of(chat)
        if not (raced and sent == len(mine) == 1):
            assert len(mine) == (sent if always or sent > 1 else 0)
        assert [attempt.attributes["fluxibly.attempt.index"] for attempt in mine] == [*range(len(mine))]
        assert not [key for attempt in mine for key in attempt.attributes if key.startswith("gen_ai.")]
    for span in spans.values():
        outcome = span.attributes["fluxibly.outcome"]
        assert outcome in OUTCOMES
        assert failed(span) == (outcome in ("failed", "cancelled", "stalled")) == ("error.type" in span.attributes)
        assert sum(event.name != "fluxibly.decision" for event in span.events) == failed(span)
        parent = spans.get(span.parent.span_id) if span.parent else None
        assert parent is not None or span.name != "fluxibly.attempt"
        assert span.start_time <= span.end_time
        assert parent is None or parent.start_time <= span.start_time
        if parent in chats:
            assert span.end_time <= parent.end_time
    for call in recorder.calls:
        below = [span for span in spans.values() if belongs_to(span, call, spans)]
        for kind in ("input", "output"):
            total = sum(tokens_of(span, kind) for span in below)
            assert call.attributes.get(f"fluxibly.usage.total_{kind}", tokens_of(call, kind)) == total
    return recorder.calls


def belongs_to(span, call, spans) -> bool:
    """Whether a span is a call's own or is below it."""
    while span is not None and span is not call:
        span = spans.get(span.parent.span_id) if span.parent else None
    return span is call


@pytest.mark.parametrize("mode", MODES, ids=str)
@many
@given(
    outer=s.stacks,
    inner=st.one_of(s.stacks, s.power_stacks),
    answers=st.one_of(s.any_answers, s.clean_answers, s.interrupted_answers, s.power_answers),
    stop_after=st.none() | st.integers(0, 4),
    restarts=st.booleans(),
    capture=st.sampled_from(["none", "both"]),
    attempts=st.sampled_from(["auto", "auto", "always"]),
)
def test_spans_always_end_exactly_once(mode, *, outer, inner, answers, stop_after, restarts, capture, attempts):
    """Spans end exactly once, have the right parents, and leave the consumer's context unchanged."""
    recorder, meters = Recorder(), Meters()
    clock = VirtualClock()
    kind = ScriptedProvider if mode.backend is None else AsyncScriptedProvider
    provider = kind(*[answer.make() for answer in answers], clock=clock)
    passed = []

    def count(request, call_next):
        passed.append(request)
        return (yield from call_next(request))

    tracing = recorder.tracing(capture=capture, attempts=attempts)
    stack = [*s.build(outer[:2], []), count, tracing, meters.metrics, *s.build(inner, [])]
    with Watching():
        ran = run(mode, provider, stack, REQUEST, clock=clock, stop_after=stop_after, restarts=restarts)
    assert ran.leaks == []
    s.check_limits(stack)
    assert trace.get_current_span() is trace.INVALID_SPAN
    calls = check_spans(recorder, always=attempts == "always", raced=bool({*s.RACES} & {*outer, *inner}))
    meters.check(recorder)
    assert len(calls) == len(passed)
    spent = passed[0].call.spent if passed else []
    elsewhere = sum(each.provider.name == "Other" for each in spent)
    sent = sum(span.attributes["fluxibly.attempts"] for span in (*calls, *recorder.asks))
    assert sent == len(spent) == len(provider.requests) + elsewhere


class Interleaved(RuleBasedStateMachine):
    """Interleaved streams and calls within spans of the user, which end in every possible way."""

    def __init__(self) -> None:
        super().__init__()
        self.recorder, self.meters, self.clock = Recorder(), Meters(), VirtualClock()
        self.tracer = self.recorder.tracer_provider.get_tracer("user")
        self.watching = Watching().__enter__()
        self.streams: dict[int, Any] = {}
        self.within = ExitStack()
        self.users = [trace.INVALID_SPAN]
        self.parents: list[Any] = []

    def pipeline(self, kinds, answers, capture="none"):
        """Return a pipeline, and a request whose conversation id identifies its span."""
        provider = ScriptedProvider(*[answer.make() for answer in answers])
        stack = [self.recorder.tracing(capture=capture), self.meters.metrics, *s.build(kinds, [])]
        request = REQUEST.evolve(metadata={"conversation_id": str(len(self.parents))})
        self.parents.append(self.users[-1])
        return Pipeline(provider, stack, clock=self.clock), request

    def some(self, data):
        return data.draw(st.sampled_from(sorted(self.streams)))

    @rule()
    @precondition(lambda self: len(self.users) < 4)
    def enter(self):
        """Begin a span of the user."""
        self.users.append(self.within.enter_context(self.tracer.start_as_current_span("mine")))

    @rule(kinds=s.stacks, answers=s.any_answers)
    def call(self, kinds, answers):
        """Make a call that is not streamed."""
        pipeline, request = self.pipeline(kinds, answers)
        with suppress(Exception):
            pipeline.complete(request)

    @rule(kinds=s.stacks, answers=s.any_answers, capture=st.sampled_from(["none", "both"]), restarts=st.booleans())
    def begin(self, kinds, answers, capture, restarts):
        """Open a stream."""
        pipeline, request = self.pipeline(kinds, answers, capture)
        self.streams[len(self.parents)] = pipeline.stream(request, restarts=restarts)

    @rule(data=st.data(), times=st.integers(1, 6))
    @precondition(lambda self: self.streams)
    def read(self, data, times):
        """Read part of a stream, perhaps to its end."""
        stream = self.streams[self.some(data)]
        with suppress(Exception):
            for _ in range(times):
                next(stream)

    @rule(data=st.data(), how=st.sampled_from(["close", "thread", "drop", "ring", "error", "texts"]))
    @precondition(lambda self: self.streams)
    def end(self, data, how):
        """End the consumption of a stream in any state."""
        stream = self.streams.pop(self.some(data))
        if how == "close":
            stream.close()
            stream.close()
        elif how == "thread":
            thread = threading.Thread(target=stream.close)
            thread.start()
            thread.join()
        elif how == "ring":
            ring = [stream]
            ring.append(ring)
            del ring
        elif how == "error":
            with suppress(LookupError), stream:
                raise LookupError("the consumer's own")
        elif how == "texts":
            with suppress(Exception):
                for _ in stream.texts():
                    break

    @invariant()
    def the_context_is_the_users(self):
        """The current span is always the user's."""
        assert trace.get_current_span() is self.users[-1]

    def teardown(self):
        """End the remaining streams, and check all spans and metrics."""
        self.streams.clear()
        gc.collect()
        Pipeline(ScriptedProvider("b"), [], clock=self.clock).complete(REQUEST)
        self.within.close()
        self.watching.__exit__()
        calls = check_spans(self.recorder)
        self.meters.check(self.recorder)
        found = {int(call.attributes["gen_ai.conversation.id"]): call.parent for call in calls}
        assert len(found) == len(calls) == len(self.parents)
        for n, parent in enumerate(self.parents):
            expected = parent.get_span_context()
            assert found[n] == (expected if expected.is_valid else None)


TestInterleaved = Interleaved.TestCase
TestInterleaved.settings = settings(many, max_examples=30, stateful_step_count=25)


@pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")  # trio warns about dropped generators
@many
@given(
    s.stacks,
    s.any_answers,
    st.integers(0, 4),
    st.sampled_from(["task", "cancel", "drop"]),
    st.sampled_from([mode for mode in MODES if mode.streaming and mode.backend]),
)
def test_async_streams_end_however_they_are_left(kinds, answers, reads, how, mode):
    """A stream may be closed by another task, cancelled during a read, or dropped without being closed."""
    recorder, meters = Recorder(), Meters()

    class Hanging(AsyncScriptedProvider):
        async def stream(self, request):
            async with aclosing(super().stream(request)) as stream:
                async for item in stream:
                    yield item
            await anyio.sleep_forever()

    provider = Hanging(*[answer.make() for answer in answers])
    pipeline = AsyncPipeline(provider, [recorder.tracing(), meters.metrics, *s.build(kinds, [])], clock=VirtualClock())

    async def read(stream, times):
        with suppress(Exception):
            for _ in range(times):
                await anext(stream)

    async def main():
        stream = pipeline.stream(REQUEST)
        async with anyio.create_task_group() as group:
            group.start_soon(read, stream, reads if how == "drop" else 50)
            await anyio.wait_all_tasks_blocked()
            if how == "task":
                group.start_soon(stream.aclose)
            else:
                group.cancel_scope.cancel()
        if how == "drop":
            del stream
            gc.collect()
        else:
            await stream.aclose()
        assert trace.get_current_span() is trace.INVALID_SPAN

    with Watching():
        anyio.run(main, backend=mode.backend)
        gc.collect()
        Pipeline(ScriptedProvider("b"), [], clock=VirtualClock()).complete(REQUEST)
    calls = check_spans(recorder)
    assert len(calls) == 1
    meters.check(recorder)
