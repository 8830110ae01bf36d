"""The cost that traces and metrics add to a call and to a streamed chunk, without a network.

Run with `python -m benchmarks.telemetry`. The SDKs are passed to `Tracing` and `Metrics` as parameters, so nothing
global is set up. The tables also show the cost of the SDK itself: for the same spans with the same attributes through
its batch processor, and for the same measurements in its histograms. This cost is measured between calls, where real
programs pay it. Alone in a loop, the SDK has the CPU's caches to itself, and is a quarter faster than in any program
that also does other work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import thread_time
from typing import Any

from benchmarks.measure import interleaved, left_out, table
from fluxibly import Chunk, LLMConfig, Middleware, Pipeline, Request, Response, Usage
from fluxibly.llm import default_stack
from fluxibly.middleware import Metrics, Tracing
from fluxibly.telemetry import semconv

REQUEST = Request(model="gpt-4o-mini", messages="What is the capital of France?", temperature=0.2, max_tokens=100)
CHUNK = Chunk("tok ")
CALLS = 500
CHUNKS = 5_000
WITHOUT = "the default stack without either"
BOUNDS = list(semconv.DURATION_BOUNDARIES)


class Fixed:
    """A provider that does nothing, and answers like a service: with its model, a finish reason and usage."""

    def complete(self, request: Request) -> Response:
        usage = Usage(input_tokens=14, output_tokens=3)
        return Response("Paris.", finish_reason="stop", usage=usage, model="gpt-4o-mini-2024-07-18", id="chatcmpl-1")

    def stream(self, request: Request) -> Iterator[Chunk]:
        for _ in range(CHUNKS):
            yield CHUNK


def pipeline(*telemetry: Middleware) -> Pipeline:
    """Return a pipeline with the default stack, in which `telemetry` replaces the default telemetry."""
    _, logger, _, *rest = default_stack(LLMConfig(framework="echo", model="m"))
    return Pipeline(Fixed(), [*telemetry, logger, *rest])


def calls_of(*telemetry: Middleware, then: Callable[[], object] | None = None) -> Callable[[], None]:
    """Return a function that makes `CALLS` calls with this telemetry, and runs `then` after each call."""
    complete = pipeline(*telemetry).complete

    def run() -> None:
        for _ in range(CALLS):
            complete(REQUEST)

    def run_both(then: Callable[[], object]) -> None:
        for _ in range(CALLS):
            complete(REQUEST)
            then()

    return run if then is None else lambda: run_both(then)


def stream_of(*telemetry: Middleware) -> Callable[[], None]:
    open_stream = pipeline(*telemetry).stream

    def run() -> None:
        for _ in open_stream(REQUEST):
            pass

    return run


def repeat(action: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS):
            action()

    return run


def has_sdk() -> bool:
    try:
        import opentelemetry.sdk.trace  # noqa: F401  # only checks that the SDK is installed
    except ImportError:
        return False
    return True


def sampling_off() -> Any:
    """Return a tracer provider that records nothing."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

    return TracerProvider(ALWAYS_OFF, shutdown_on_exit=False)


def batching() -> Any:
    """Return a tracer provider with the SDK's batch processor and an exporter that drops all spans."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    class Dropping(SpanExporter):
        def export(self, spans: Sequence[object]) -> SpanExportResult:
            return SpanExportResult.SUCCESS

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(Dropping()))
    return provider


def attributes_of_a_call() -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return the span of a call: the name, the initial attributes, and those added by the end."""
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

    class Watching(SpanProcessor):
        def on_start(self, span: Any, parent_context: object = None) -> None:
            spans.append((span, dict(span.attributes)))

    spans: list[tuple[Any, dict[str, Any]]] = []
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(Watching())
    pipeline(Tracing(tracer_provider=provider)).complete(REQUEST)
    ((span, start),) = spans
    return span.name, start, {key: value for key, value in span.attributes.items() if key not in start}


def bare_spans() -> Callable[[], object]:
    """Return the work of the SDK for the span of a call, with prepared attributes and without a current span."""
    from opentelemetry.trace import SpanKind

    tracer = batching().get_tracer("bare")
    name, at_start, at_end = attributes_of_a_call()

    def trace() -> None:
        span = tracer.start_span(name, kind=SpanKind.CLIENT, attributes=at_start)
        span.set_attributes(at_end)
        span.end()

    return trace


def bare_span_sampled_off() -> Callable[[], object]:
    from opentelemetry.trace import SpanKind

    tracer = sampling_off().get_tracer("bare")
    name, attributes, _ = attributes_of_a_call()
    return lambda: tracer.start_span(name, kind=SpanKind.CLIENT, attributes=attributes)


def metering() -> tuple[Any, Any]:
    """Return a meter provider and its reader."""
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    reader = InMemoryMetricReader()
    return MeterProvider([reader], shutdown_on_exit=False), reader


def bare_records() -> Callable[[], object]:
    """Return the work of the SDK for the measurements of a call."""
    provider, reader = metering()
    pipeline(Metrics(meter_provider=provider)).complete(REQUEST)
    found = reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics
    meter = provider.get_meter("bare")
    records = [
        (meter.create_histogram(metric.name, explicit_bucket_boundaries_advisory=BOUNDS), dict(point.attributes))
        for metric in found
        for point in metric.data.data_points
    ]

    def record() -> None:
        for histogram, attributes in records:
            histogram.record(1.5, attributes)

    return record


def measured(contenders: Mapping[str, Callable[[], object]], per_run: int) -> dict[str, float]:
    """Measure the time of the calling thread, because the work of the SDK's own threads is not part of a call."""
    return interleaved(contenders, per_run=per_run, rounds=25, clock=thread_time)


def without_sdk(title: str) -> None:
    contenders = {
        WITHOUT: calls_of(),
        "Tracing (goal: <= 3 µs more)": calls_of(Tracing()),
        "Metrics": calls_of(Metrics()),
    }
    table(title, measured(contenders, CALLS))


def sampled_off() -> None:
    # Separate from `traces`, because the batch processor's thread and its spans in memory would slow down these calls.
    contenders = {
        WITHOUT: calls_of(),
        "  and a bare span": calls_of(then=bare_span_sampled_off()),
        "Tracing (goal: <= 8 µs more)": calls_of(Tracing(tracer_provider=sampling_off())),
    }
    table("A call, sampled off", measured(contenders, CALLS))


def traces() -> None:
    bare = bare_spans()
    contenders = {
        WITHOUT: calls_of(),
        "  and bare spans": calls_of(then=bare),
        "Tracing": calls_of(Tracing(tracer_provider=batching())),
    }
    results = measured(contenders, CALLS)
    alone = measured({"": repeat(bare)}, CALLS)[""]
    table("A call, with the SDK's batch processor", results)
    without, bare_more, tracing_more = results.values()
    ratio = (tracing_more - without) / (bare_more - without)
    print(
        f"  Tracing adds {ratio:.2f} times what bare spans add (goal: <= 1.5); alone in a loop these take {alone:.1f} µs"
    )


def metrics() -> None:
    provider, reader = metering()
    contenders = {
        WITHOUT: calls_of(),
        "  and bare records": calls_of(then=bare_records()),
        "Metrics (goal: <= 15 µs more)": calls_of(Metrics(meter_provider=provider)),
        "the SDK collects what these calls left": reader.get_metrics_data,
    }
    table("A call, with the SDK's metrics", measured(contenders, CALLS))


def chunks() -> None:
    contenders = {WITHOUT: stream_of(), "Tracing, Metrics, no SDK set up": stream_of(Tracing(), Metrics())}
    if has_sdk():
        contenders |= {
            "Tracing, sampled off": stream_of(Tracing(tracer_provider=sampling_off())),
            "Tracing, batch processor": stream_of(Tracing(tracer_provider=batching())),
            "Metrics": stream_of(Metrics(meter_provider=metering()[0])),
        }
    table("A streamed chunk", measured(contenders, CHUNKS), goal="<= 0.3 µs more, each")


def main() -> None:
    """Run all benchmarks of telemetry, with logging off."""
    logging.getLogger("fluxibly").setLevel(logging.CRITICAL + 1)
    without_sdk("A call, OpenTelemetry not imported")
    import opentelemetry.metrics
    import opentelemetry.trace  # noqa: F401  # an SDK may be set up at any time from here on

    without_sdk("A call, OpenTelemetry imported, no SDK set up")
    if has_sdk():
        sampled_off()
        traces()
        metrics()
    chunks()
    if not has_sdk():
        left_out(["opentelemetry-sdk"])


if __name__ == "__main__":
    main()
