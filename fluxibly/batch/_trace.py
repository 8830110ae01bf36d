"""The span of a batch, with the spans of its calls."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from fluxibly.batch._counting import Counted
from fluxibly.flow import Middleware
from fluxibly.telemetry import semconv


def traced(stack: Sequence[Middleware], report: Counted, *, one_trace: bool) -> AbstractContextManager[None]:
    """Record a span for the calls that this context makes meanwhile, where those of the calls go.

    Args:
        stack: the layers of the calls. Without a `Tracing`, nothing is recorded.
        report: its counts stand on the span when it ends.
        one_trace: whether the calls are in the trace of the span. By default each has its own, with a link to the span.
    """
    from fluxibly.middleware import Tracing
    from fluxibly.telemetry._batches import batch_span

    tracing = next((layer for layer in stack if isinstance(layer, Tracing)), None)
    if tracing is None:
        return nullcontext()

    def outcome() -> dict[str, int | str]:
        failed = sum(report.errors.values())
        attributes: dict[str, int | str] = {
            semconv.BATCH_ASKED: report.asked,
            semconv.BATCH_ANSWERED: report.asked - failed,
            semconv.BATCH_FAILED: failed,
        }
        return attributes if report.stopped is None else {**attributes, semconv.BATCH_STOPPED: report.stopped}

    return batch_span(tracing.tracer_provider, outcome, one_trace=one_trace)
