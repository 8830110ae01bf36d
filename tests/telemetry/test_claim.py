"""SDKs behind a provider that are instrumented too: their instrumentation keeps still during an attempt, and only then."""

from __future__ import annotations

import sys

import pytest
from opentelemetry import trace
from opentelemetry.baggage import set_baggage
from opentelemetry.context import attach, detach, get_current, get_value
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON
from support.meters import Meters
from support.tracing_tools import REQUEST, Recorder, modes

from fluxibly import map_chunks, perform
from fluxibly.errors import Overloaded
from fluxibly.flow import ask
from fluxibly.middleware import Metrics, Retry, Tracing
from fluxibly.testing.modes import run
from fluxibly.types import Chunk, Response, Usage

handler = pytest.importorskip("opentelemetry.util.genai.handler")
KEY = pytest.importorskip("opentelemetry.util.genai.invocation").CLIENT_INFERENCE_CONTEXT_KEY

pytestmark = pytest.mark.usefixtures("no_complaints")


class World:
    """Traces and metrics, and an SDK that is instrumented with opentelemetry-util-genai."""

    def __init__(self, sampler=ALWAYS_ON):
        self.recorder, self.meters = Recorder(sampler=sampler), Meters()
        self.theirs = handler.TelemetryHandler(
            tracer_provider=self.recorder.tracer_provider, meter_provider=self.meters.provider
        )

    def ask(self, model):
        """Call the SDK."""
        with self.theirs.inference("openai", request_model=model) as call:
            call.input_tokens, call.output_tokens = 10, 5

    def provider(self, failures=0):
        """Return a provider that calls the SDK, and fails at first."""
        world, left = self, [failures]

        class OfAnSDK:
            def complete(self, request):
                world.ask(request.model)
                if left[0]:
                    left[0] -= 1
                    raise Overloaded("full")
                return Response("x", usage=Usage(input_tokens=10, output_tokens=5))

            def stream(self, request):
                response = self.complete(request)
                yield Chunk("x", usage=response.usage)
                assert get_value(KEY) is not None

        return OfAnSDK()

    @property
    def tokens(self):
        """The sum of the tokens that both instrumentations have counted."""
        scopes = [scope for r in self.meters.reader.get_metrics_data().resource_metrics for scope in r.scope_metrics]
        metrics = [metric for scope in scopes for metric in scope.metrics if metric.name == "gen_ai.client.token.usage"]
        return sum(point.sum for metric in metrics for point in metric.data.data_points)


def looking(seen):
    """Note whether the key is set before and after the rest of the stack."""

    def look(request, call_next):
        seen.append(get_value(KEY))
        response = yield from call_next(request)
        seen.append(get_value(KEY))
        return response

    return look


@modes
@pytest.mark.parametrize("sampler", [ALWAYS_ON, ALWAYS_OFF, None], ids=["sampled", "unsampled", "metrics alone"])
def test_tokens_are_counted_once_whether_sampled_or_not(mode, sampler):
    """Nor does the other instrumentation make a second span. The layers around an attempt do not see the mark."""
    world = World() if sampler is None else World(sampler)
    tracing = Tracing() if sampler is None else world.recorder.tracing()
    seen = []
    stack = [tracing, world.meters.metrics(), looking(seen)]
    ran = run(mode, world.provider(), stack, REQUEST)
    assert ran.error is None
    assert world.tokens == 15
    assert [span.name for span in world.recorder.spans] == (["chat m-1"] if sampler is ALWAYS_ON else [])
    assert seen == [None, None]
    assert ran.leaks == []


@modes
@pytest.mark.parametrize("attempts", ["auto", "always"])
def test_what_a_middleware_performs_is_measured(mode, attempts):
    """A guard that asks a second model through its own SDK has its span and its tokens, also during an attempt."""
    world = World()

    def judge():
        return perform(lambda: world.ask("judge"))

    def judged(chunk):
        yield from judge()
        yield chunk

    def guard(request, call_next):
        yield from judge()
        response = yield from map_chunks(call_next(request), judged)
        yield from judge()
        return response

    tracing = world.recorder.tracing(attempts=attempts)
    stack = [tracing, world.meters.metrics(), Retry(max_retries=1, base_delay=0), guard]
    ran = run(mode, world.provider(failures=1), stack, REQUEST)
    assert ran.error is None
    assert len([span for span in world.recorder.spans if span.name == "chat judge"]) == 4
    assert world.tokens == 5 * 15
    assert ran.leaks == []


@modes
@pytest.mark.parametrize("attempts", ["auto", "always"])
def test_the_mark_goes_with_its_attempt_whatever_else_is_current(mode, attempts):
    """A layer between sets baggage, and attempts have spans of their own: nothing of an attempt stays behind it."""
    world, contexts = World(), []

    def carry(request, call_next):
        token = attach(set_baggage("who", "me"))
        contexts.append(dict(get_current()))
        try:
            return (yield from call_next(request))
        finally:
            contexts.append(dict(get_current()))
            detach(token)

    tracing = world.recorder.tracing(attempts=attempts)
    ran = run(mode, world.provider(failures=1), [tracing, Retry(max_retries=1, base_delay=0), carry], REQUEST)
    assert ran.error is None
    before, after_failure, again, after_success = contexts
    assert before == after_failure == again == after_success
    assert ran.leaks == []
    assert trace.get_current_span() is trace.INVALID_SPAN


@modes
@pytest.mark.parametrize("inner", ["tracing", "metrics"])
def test_a_question_with_telemetry_of_its_own_during_an_attempt(mode, inner):
    """The I/O of its stack is measured: the mark of the attempt around it is not taken for a caller's own."""
    world = World()

    def guard(request, call_next):
        yield from perform(lambda: world.ask("judge"))
        return (yield from call_next(request))

    def judged(request, call_next):
        def fn(chunk):
            layer = world.recorder.tracing() if inner == "tracing" else world.meters.metrics()
            yield from ask(request, through=[layer, guard])
            yield chunk

        return (yield from map_chunks(call_next(request), fn))

    run(mode, world.provider(), [world.recorder.tracing(), judged], REQUEST)
    assert [span.name for span in world.recorder.spans].count("chat judge") == 1


@modes
def test_within_a_call_that_another_instrumentation_measures(mode):
    """The I/O of a middleware sees that call, as code does that runs without fluxibly."""
    world, seen = World(), []

    def look(request, call_next):
        yield from perform(lambda: seen.append(get_value(KEY)))
        return (yield from call_next(request))

    with world.theirs.inference("openai", request_model="outer"):
        outer = get_value(KEY)
        run(mode, world.provider(), [world.recorder.tracing(), look], REQUEST)
        assert get_value(KEY) is outer
    assert seen == [outer]
    assert [span.name for span in world.recorder.spans] == ["chat m-1", "chat outer"]


@modes
def test_without_an_sdk_nothing_is_claimed(mode):
    """Nobody else measures the call, so the other instrumentation does."""
    world = World()
    run(mode, world.provider(), [Tracing(), Metrics()], REQUEST)
    assert world.tokens == 15
    assert [span.name for span in world.recorder.spans] == ["chat m-1"]


@modes
def test_without_the_other_instrumentation_nothing_is_marked(mode, monkeypatch):
    """The context of the only attempt is that of its call."""
    monkeypatch.delitem(sys.modules, "opentelemetry.util.genai.invocation")
    contexts = []

    class Looking:
        def complete(self, request):
            contexts.append(get_current())
            return "x"

        def stream(self, request):
            yield self.complete(request)

    def look(request, call_next):
        contexts.append(get_current())
        return (yield from call_next(request))

    run(mode, Looking(), [Recorder().tracing(), Meters().metrics(), look], REQUEST)
    assert contexts[0] is contexts[1]
