"""Spans of streams that end early, and the current span of consumers and providers."""

from __future__ import annotations

import gc
import json
import threading
from contextvars import copy_context

import anyio
import pytest
from opentelemetry import trace
from opentelemetry.trace import StatusCode
from support.tracing_tools import REQUEST, AsyncRemote, Remote, failed, modes, remote, streams

from fluxibly.errors import Overloaded
from fluxibly.middleware import Retry, StreamMeter
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.testing.modes import run
from fluxibly.types import Chunk, Usage

pytestmark = pytest.mark.usefixtures("no_complaints")


# Streams that end early


@streams
def test_a_closed_stream_is_abandoned_with_what_had_arrived(mode, recorder):
    """After a break and a close, the status is unset. The span has the outcome, the chunks and the usage so far."""
    script = [Chunk("forty ", usage=Usage(input_tokens=7)), "two", " and more"]
    ran = run(mode, remote(mode, script), [recorder.tracing(capture="span")], REQUEST, stop_after=2)
    assert ran.leaks == []
    for span in recorder.spans:
        assert span.status.status_code is StatusCode.UNSET
        assert span.attributes["fluxibly.outcome"] == "abandoned"
        assert not span.events
    given = recorder.call.attributes
    assert (given["fluxibly.stream.chunks"], given["fluxibly.stream.characters"]) == (2, 9)
    assert given["gen_ai.usage.input_tokens"] == 7
    assert json.loads(given["gen_ai.output.messages"])[0]["finish_reason"] == "error"
    assert recorder.counting.started == sorted(recorder.counting.ended, key=recorder.counting.started.index)


def test_a_stream_that_is_dropped_ends_its_spans(recorder):
    """A stream that only the garbage collector finds ends its spans at the next call."""
    pipeline = Pipeline(Remote(["a", "b"], ["a", "b"], "c"), [recorder.tracing()])
    stream = pipeline.stream(REQUEST)
    next(stream)
    del stream
    assert recorder.call.attributes["fluxibly.outcome"] == "abandoned"
    stream = pipeline.stream(REQUEST)
    next(stream)
    ring = [stream]
    ring.append(ring)
    del ring, stream
    gc.collect()
    pipeline.complete(REQUEST)
    outcomes = [span.attributes["fluxibly.outcome"] for span in recorder.spans if span.name == "chat m-1"]
    assert outcomes == ["abandoned", "abandoned", "completed"]
    assert len(recorder.counting.started) == len(recorder.counting.ended) == 3


def test_a_stream_closed_in_another_thread_ends_its_spans_once(recorder):
    """The consumer's context does not change."""
    stream = Pipeline(Remote(["a", "b"]), [recorder.tracing()]).stream(REQUEST)
    next(stream)
    thread = threading.Thread(target=stream.close)
    thread.start()
    thread.join()
    stream.close()
    assert len(recorder.counting.started) == len(recorder.counting.ended) == 1
    assert trace.get_current_span() is trace.INVALID_SPAN


def test_an_exception_of_the_consumer_abandons_the_stream(recorder):
    """The exception is not an error of the call."""

    def consume():
        with Pipeline(Remote(["a", "b"]), [recorder.tracing()]).stream(REQUEST) as stream:
            next(stream)
            raise KeyError("mine")

    with pytest.raises(KeyError):
        consume()
    assert recorder.call.attributes["fluxibly.outcome"] == "abandoned"
    assert not recorder.call.events


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_cancelled_call_is_the_same_error_on_asyncio_and_trio(backend, streaming, recorder):
    """`error.type` is CancelledError on trio too."""

    class Slow(AsyncRemote):
        async def complete(self, request):
            await anyio.sleep_forever()

        async def stream(self, request):
            yield "a"
            await anyio.sleep_forever()

    async def main():
        pipeline = AsyncPipeline(Slow(), [recorder.tracing()])

        async def call():
            if not streaming:
                await pipeline.complete(REQUEST)
            async for _ in pipeline.stream(REQUEST):
                scope.cancel()

        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(call)
                await anyio.lowlevel.checkpoint()
                await anyio.lowlevel.checkpoint()
                scope.cancel()

    anyio.run(main, backend=backend)
    for span in recorder.spans:
        assert failed(span)
        assert span.attributes["error.type"] == "CancelledError"
        assert span.attributes["fluxibly.outcome"] == "cancelled"
    assert len(recorder.spans) == len(recorder.counting.started) == 1


def test_an_unfinished_coroutine_does_not_change_the_context(recorder):
    """A coroutine that is closed in a different context still ends its spans, and logs nothing."""

    class Waiting:
        def __await__(self):
            yield

    class Slow(AsyncRemote):
        async def complete(self, request):
            await Waiting()

    call = AsyncPipeline(Slow(), [recorder.tracing()]).complete(REQUEST)
    copy_context().run(call.send, None)
    call.close()
    assert len(recorder.counting.started) == len(recorder.counting.ended) == 1
    assert trace.get_current_span() is trace.INVALID_SPAN


# Context


@modes
def test_the_consumers_span_stays_current(mode, recorder):
    """The caller's own span is current between chunks and after the call. The call's span is its child."""
    tracer = recorder.tracer_provider.get_tracer("user")
    seen = []
    with tracer.start_as_current_span("mine") as mine:
        run(
            mode,
            remote(mode, ["a", "b", "c"]),
            [recorder.tracing(), StreamMeter()],
            REQUEST,
            watch=lambda _: seen.append(trace.get_current_span()),
        )
        assert trace.get_current_span() is mine
    assert all(span is mine for span in seen)
    assert recorder.call.parent.span_id == mine.get_span_context().span_id


@modes
@pytest.mark.parametrize(("attempts", "first"), [("auto", "chat m-1"), ("always", "fluxibly.attempt")])
def test_the_provider_runs_within_the_attempts_span(mode, attempts, first, recorder):
    """The spans of a provider are children of the attempt, or of the call if the attempt has no span of its own.

    Inner layers run in the call's span, also between attempts.
    """
    inside = []

    def look(request, call_next):
        inside.append(trace.get_current_span().name)
        return (yield from call_next(request))

    class Spying:
        info = REQUEST.call.provider

        def complete(self, request):
            inside.append(trace.get_current_span().name)
            if len(inside) < 4:
                raise Overloaded("full")
            return "a"

        def stream(self, request):
            yield self.complete(request)

    stack = [recorder.tracing(attempts=attempts), Retry(max_retries=1, base_delay=0), look]
    run(mode, Spying(), stack, REQUEST)
    assert inside == ["chat m-1", first, "chat m-1", "fluxibly.attempt"]


def test_a_hundred_concurrent_calls_have_the_right_parents(recorder):
    """Every attempt is a child of its own call, and every call is a child of its own task's span."""
    tracer = recorder.tracer_provider.get_tracer("user")

    class Interleaving(AsyncRemote):
        async def complete(self, request):
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
            return request.model

        async def stream(self, request):
            for letter in "abc":
                await anyio.lowlevel.checkpoint()
                yield letter

    async def main():
        pipeline = AsyncPipeline(Interleaving(), [recorder.tracing(attempts="always")])

        async def call(n):
            with tracer.start_as_current_span(f"task {n}") as mine:
                if n % 2:
                    await pipeline.complete(REQUEST.evolve(model=f"m{n}"))
                else:
                    async for _ in pipeline.stream(REQUEST.evolve(model=f"m{n}")):
                        assert trace.get_current_span() is mine
                assert trace.get_current_span() is mine

        async with anyio.create_task_group() as group:
            for n in range(100):
                group.start_soon(call, n)

    anyio.run(main)
    spans = {span.context.span_id: span for span in recorder.spans}
    assert len(spans) == 300
    for span in spans.values():
        if span.name == "fluxibly.attempt":
            call = spans[span.parent.span_id]
            assert call.name == f"chat {span.attributes['fluxibly.attempt.model']}"
            assert spans[call.parent.span_id].name == f"task {call.name.removeprefix('chat m')}"
