"""The end of spans: exactly once, regardless of who ends the call and where, with the data that had arrived by then."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import anyio
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from support.tracing_tools import ANSWER, INFO, REQUEST, AsyncRemote, Recorder, Remote, remote

from fluxibly._logs import forget_reports
from fluxibly.errors import ConnectionFailed, Overloaded
from fluxibly.middleware import Logging, Retry
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.telemetry import _spans as call_trace
from fluxibly.testing import Delay
from fluxibly.testing.modes import MODES, run
from fluxibly.types import Chunk, ProviderInfo, Request, Response, Usage

modes = pytest.mark.parametrize("mode", MODES, ids=str)
streams = pytest.mark.parametrize("mode", [mode for mode in MODES if mode.streaming], ids=str)
backends = pytest.mark.parametrize("backend", ["asyncio", "trio"])
FINISH_REASONS = "gen_ai.response.finish_reasons"


@pytest.fixture
def recorder(caplog):
    """A recorder. At the end, OpenTelemetry has logged nothing, and no span is current."""
    forget_reports()
    yield Recorder()
    assert not [record for record in caplog.records if record.name.startswith("opentelemetry")]
    assert trace.get_current_span() is trace.INVALID_SPAN


def check_ended(recorder, outcome):
    """Check that the only span has ended exactly once, with the outcome."""
    assert recorder.counting.started == recorder.counting.ended
    assert recorder.call.attributes["fluxibly.outcome"] == outcome


# Finish reasons


@streams
@pytest.mark.parametrize("end", [None, Overloaded("full")], ids=["given up", "cut"])
def test_an_answer_that_has_begun_has_a_finish_reason(mode, end, recorder):
    """The finish reason is `error` if the service reported none."""
    script = ["a", "b", "c"] if end is None else ["a", end]
    run(mode, remote(mode, script), [recorder.tracing()], REQUEST, stop_after=2)
    assert recorder.call.attributes[FINISH_REASONS] == ("error",)


@streams
@pytest.mark.parametrize("capture", ["none", "span"])
def test_a_reported_finish_reason_stays(mode, capture, recorder):
    """The reason stays even if the stream is abandoned right after it, whether or not content is captured."""
    script = ["a", Chunk(finish_reason="length"), Chunk(usage=Usage(output_tokens=1)), "z"]
    run(mode, remote(mode, script), [recorder.tracing(capture=capture)], REQUEST, stop_after=3)
    check_ended(recorder, "abandoned")
    assert recorder.call.attributes[FINISH_REASONS] == ("length",)


@streams
def test_the_finish_reason_of_an_earlier_attempt_is_not_that_of_the_last(mode, recorder):
    """Each attempt has its own finish reason."""
    first, second = [Chunk(finish_reason="length"), Overloaded("full")], ["a", "b"]
    stack = [recorder.tracing(), Retry(max_retries=1, base_delay=0)]
    run(mode, remote(mode, first, second), stack, REQUEST, stop_after=2)
    assert recorder.call.attributes["fluxibly.attempts"] == 2
    assert recorder.call.attributes[FINISH_REASONS] == ("error",)


@modes
def test_a_call_without_output_has_no_finish_reason(mode, recorder):
    """The service generated nothing."""
    run(mode, remote(mode, ConnectionFailed("refused")), [recorder.tracing()], REQUEST)
    check_ended(recorder, "failed")
    assert FINISH_REASONS not in recorder.call.attributes


# Who ends the call


@backends
@pytest.mark.parametrize("reading", [False, True], ids=["idle", "during a read"])
def test_a_stream_closed_by_another_task(backend, reading, recorder):
    """The stream is abandoned, and no task's context changes."""

    class Slow(AsyncRemote):
        async def stream(self, request):
            yield "a"
            await anyio.sleep_forever()

    async def main():
        stream = AsyncPipeline(Slow(), [recorder.tracing()]).stream(REQUEST)
        tracer = recorder.tracer_provider.get_tracer("user")

        async def read():
            assert (await anext(stream)).text == "a"
            if reading:
                assert [event async for event in stream] == []

        async def close():
            with tracer.start_as_current_span("theirs") as theirs:
                await stream.aclose()
                assert trace.get_current_span() is theirs

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            group.start_soon(close)
        await stream.aclose()

    anyio.run(main, backend=backend)
    assert sorted(recorder.counting.started) == sorted(recorder.counting.ended)
    outcomes = {span.name: span.attributes.get("fluxibly.outcome") for span in recorder.spans}
    assert outcomes == {"theirs": None, "chat m-1": "abandoned"}
    assert recorder.call.attributes["fluxibly.stream.chunks"] == 1


@backends
def test_a_cancelled_stream_records_what_had_arrived(backend, recorder):
    """The span has the chunks, characters and usage so far."""

    class Slow(AsyncRemote):
        async def stream(self, request):
            yield Chunk("forty ", usage=Usage(input_tokens=7))
            yield "two"
            await anyio.sleep_forever()

    async def main():
        async with anyio.create_task_group() as group:

            async def read():
                async for _ in AsyncPipeline(Slow(), [recorder.tracing()]).stream(REQUEST):
                    pass

            group.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            group.cancel_scope.cancel()

    anyio.run(main, backend=backend)
    check_ended(recorder, "cancelled")
    given = recorder.call.attributes
    assert given["error.type"] == "CancelledError"
    assert (given["fluxibly.stream.chunks"], given["fluxibly.stream.characters"]) == (2, 9)
    assert given["gen_ai.usage.input_tokens"] == 7
    assert given[FINISH_REASONS] == ("error",)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("held", ["as it is", "in a ring"])
def test_a_stream_that_is_open_when_the_process_ends(held):
    """The stream ends before the SDK shuts down, with spans and duration. The exit of a forked process ends nothing."""
    quiet = [
        "-W",
        "ignore:This process:DeprecationWarning",
    ]  # Python 3.12 warns of a fork beside threads, as the SDK has
    ran = subprocess.run(
        [sys.executable, *quiet, "-c", AT_EXIT, held], capture_output=True, text=True, check=False, timeout=60
    )
    assert ran.stderr == ""
    assert ran.stdout.splitlines() == ["forked", "chat m abandoned", "measured 1"]


AT_EXIT = """
import gc, os, sys
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from fluxibly.middleware import Metrics, Tracing
from fluxibly.pipeline import Pipeline
from fluxibly.testing import ScriptedProvider
from fluxibly.types import Request

class Exporter(SpanExporter):
    def export(self, spans):
        for span in spans:
            print(span.name, span.attributes["fluxibly.outcome"], flush=True)

class Reader(InMemoryMetricReader):
    def shutdown(self, *args, **kwargs):
        data = self.get_metrics_data()
        if data is not None:
            points = data.resource_metrics[0].scope_metrics[0].metrics[0].data.data_points
            print("measured", points[0].count, flush=True)

metrics.set_meter_provider(MeterProvider([Reader()]))
provider = TracerProvider()
provider.add_span_processor(BatchSpanProcessor(Exporter()))
trace.set_tracer_provider(provider)
pipeline = Pipeline(ScriptedProvider(["a", "b"]), [Tracing(), Metrics()])
stream = pipeline.stream(Request(model="m", messages="Hi"))
next(stream)
child = os.fork()
if not child:
    print("forked", flush=True)
    sys.exit()
os.waitpid(child, 0)
if sys.argv[1] == "in a ring":
    ring = [stream]
    ring.append(ring)
    del ring, stream
    gc.collect()
"""


# Who answered


class Router(Remote):
    """A provider that passes requests on to another provider, and records which."""

    def complete(self, request: Request) -> Response:
        request.call.provider = OTHER
        return super().complete(request)


OTHER = ProviderInfo(telemetry_name="anthropic", server_address="other.test", server_port=8443)


def test_the_provider_that_answered_is_named(recorder):
    """The spans of the call and of the attempt name the provider that answered, even with the requested model."""
    Pipeline(Router(ANSWER), [recorder.tracing(attempts="always")]).complete(REQUEST)
    given = recorder.call.attributes
    assert (given["gen_ai.provider.name"], given["server.address"], given["server.port"]) == (
        "anthropic",
        "other.test",
        8443,
    )
    assert recorder.attempts[0].attributes["fluxibly.attempt.provider"] == "anthropic"


def test_a_fallback_to_another_provider_names_it_and_its_model(recorder):
    """Each attempt names its own provider."""

    class Either(Remote):
        def complete(self, request):
            request.call.provider = OTHER if request.model == "m-2" else INFO
            return super().complete(request)

    def fall_back(request, call_next):
        try:
            return (yield from call_next(request))
        except Overloaded:
            return (yield from call_next(request.evolve(model="m-2")))

    Pipeline(Either(Overloaded("full"), "hello"), [recorder.tracing(), fall_back]).complete(REQUEST)
    given = recorder.call.attributes
    assert (recorder.call.name, given["gen_ai.request.model"], given["gen_ai.provider.name"]) == (
        "chat m-2",
        "m-2",
        "anthropic",
    )
    assert [span.attributes["fluxibly.attempt.provider"] for span in recorder.attempts] == ["openai", "anthropic"]


@streams
def test_an_answer_that_was_not_streamed_is_one_chunk(mode, recorder, caplog):
    """The span counts one chunk, as the log does and as the consumer receives it."""

    def cached(request, call_next):
        request.call.cache_hit = True
        yield from ()
        return ANSWER

    with caplog.at_level("INFO", "fluxibly"):
        ran = run(mode, remote(mode), [Logging(), recorder.tracing(), cached], REQUEST)
    assert [event.text for event in ran.events] == ["forty two"]
    given = recorder.call.attributes
    assert (given["fluxibly.stream.chunks"], given["fluxibly.stream.characters"]) == (1, 9)
    assert (caplog.records[-1].total_chunks, caplog.records[-1].total_length) == (1, 9)


# Failures, and calls that are not recorded


def test_a_span_that_began_ends_even_if_the_rest_fails(recorder, capsys, monkeypatch):
    """The failure is reported, and the call continues."""
    monkeypatch.setattr(call_trace, "Arrivals", lambda *_: 1 / 0)
    with Pipeline(Remote(["a", "b"]), [recorder.tracing()]).stream(REQUEST) as stream:
        assert "".join(stream.texts()) == "ab"
    assert recorder.counting.started == recorder.counting.ended
    assert len(recorder.counting.ended) == 1
    assert capsys.readouterr().err.count("tracing failed with ZeroDivisionError") == 1


def test_other_instrumentations_that_changed_do_no_harm(recorder, capsys, monkeypatch):
    """A new release of theirs may require unknown arguments. The call's spans are still recorded."""
    theirs = types.SimpleNamespace(InferenceData=lambda needed: needed, CLIENT_INFERENCE_CONTEXT_KEY="theirs")
    monkeypatch.setitem(sys.modules, "opentelemetry.util.genai.invocation", theirs)
    Pipeline(Remote(ANSWER), [recorder.tracing()]).complete(REQUEST)
    check_ended(recorder, "completed")
    assert "opentelemetry-util-genai raised TypeError; instrumentations that use it may" in capsys.readouterr().err


@modes
def test_an_unsampled_call_is_not_serialised(mode):
    """Tracing does not look at any text of an unsampled call."""
    seen = []
    recorder = Recorder(sampler=ALWAYS_OFF)
    script = ["a", Delay(1), "b"] if mode.streaming else ANSWER
    stack = [recorder.tracing(capture="both", redact=lambda text: seen.append(text) or text)]
    assert run(mode, remote(mode, script), stack, REQUEST).error is None
    assert seen == []
    assert recorder.events == []
