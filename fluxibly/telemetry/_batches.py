"""The span of a batch of calls."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fluxibly.telemetry._sdk import may_have_sdk

if TYPE_CHECKING:
    from opentelemetry.trace import Span, TracerProvider


@contextmanager
def batch_span(
    provider: TracerProvider | None, outcome: Callable[[], Mapping[str, int | str]], *, one_trace: bool
) -> Generator[None]:
    """Record a span for the calls that this context makes meanwhile. Without an SDK, do nothing.

    By default each call begins a trace of its own with a link to the span, because no backend shows a trace of a million spans.

    Args:
        provider: where the spans of the calls go; None: to the global provider.
        outcome: returns the attributes that are known at the end.
        one_trace: whether the calls belong to the trace of the span, as its children.
    """
    if provider is None and not may_have_sdk("opentelemetry.trace", "OTEL_PYTHON_TRACER_PROVIDER"):
        yield
        return
    from opentelemetry.context import get_current

    from fluxibly.telemetry._propagation import Attached, linked_to, with_span
    from fluxibly.telemetry._spans import report

    span = _begun(provider)
    if span is None:
        yield
        return
    context = get_current()
    current = Attached(with_span(span, context) if one_trace else linked_to(span, context), context)
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        current.leave()
        try:
            _end(span, outcome(), error)
        except Exception as problem:  # noqa: BLE001  # telemetry never breaks a batch
            report(problem)
        del error  # its frames refer to this one


def _begun(provider: TracerProvider | None) -> Span | None:
    """Begin the span. Return None if there is no SDK, or it is broken."""
    from opentelemetry.trace import ProxyTracerProvider, get_tracer_provider

    from fluxibly.telemetry import semconv
    from fluxibly.telemetry._spans import report

    try:
        provider = provider or get_tracer_provider()
        if isinstance(provider, ProxyTracerProvider):
            return None
        span = provider.get_tracer("fluxibly").start_span(semconv.BATCH_SPAN)
        return span if span.get_span_context().is_valid else None
    except Exception as problem:  # noqa: BLE001  # telemetry never breaks a batch
        report(problem)
        return None


def _end(span: Span, attributes: Mapping[str, int | str], error: BaseException | None) -> None:
    from fluxibly.errors import error_type, outcome_of
    from fluxibly.telemetry._attempts import Failure, set_outcome
    from fluxibly.telemetry._attributes import error_name

    try:
        failure = None
        if error is not None and not isinstance(error, GeneratorExit):
            failure = Failure(error_name(error), error_type(error), "")  # a message may quote a row
        set_outcome(span, dict(attributes), outcome_of(error), failure)
    finally:
        span.end()
