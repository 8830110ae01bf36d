"""Propagation of spans: as the current span in this process, and as trace headers on outgoing requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from opentelemetry.baggage import get_all
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context, attach, create_key, get_current
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.trace import DEFAULT_TRACE_STATE, INVALID_SPAN, Link, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from fluxibly._logs import report_once

try:
    from opentelemetry.propagate import get_global_textmap
except ValueError as problem:  # the import raises if OTEL_PROPAGATORS names a propagator that is not installed
    report_once("propagation", f"no trace headers are sent: {problem}")
    _nothing = CompositePropagator(())

    def get_global_textmap() -> TextMapPropagator:
        return _nothing


if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from opentelemetry.propagators.textmap import TextMapPropagator
    from opentelemetry.trace import Span

    from fluxibly.types import Request, Response, Tool, ToolCall

_W3C = {TraceContextTextMapPropagator, W3CBaggagePropagator}
_HEX = [f"{byte:02x}" for byte in range(256)]
_usual: TextMapPropagator | None = None
"""The propagator that `_is_usual` accepted last."""


(_SPAN,) = set_span_in_context(INVALID_SPAN, Context())
"""The key under which a context holds its span."""


def with_span(span: Span, context: Context) -> Context:
    """Return `context` with `span`, as `set_span_in_context` does, which copies the context twice."""
    return Context({**context, _SPAN: span})


_LINKS = create_key("links")
"""The key under which a context holds the links of the traces that begin in it."""


def linked_to(span: Span, context: Context) -> Context:
    """Return `context` without its current span. Calls in it begin traces of their own, whose first span has a link to `span`."""
    rest = {key: value for key, value in context.items() if key != _SPAN}
    return Context({**rest, _LINKS: (Link(span.get_span_context()),)})


def links_in(context: Context) -> Sequence[Link] | None:
    """Return the links of a trace that begins in `context`; None if there are none, or a span is current."""
    if _LINKS not in context or _SPAN in context:
        return None
    links: Sequence[Link] = context[_LINKS]  # type: ignore[assignment]  # a context holds objects
    return links


class Attached:
    """A context that is current until `leave`."""

    __slots__ = ("context", "previous", "token")

    def __init__(self, context: Context, previous: Context) -> None:
        self.context = context
        self.previous = previous
        self.token: Any = attach(context)  # by default a contextvars.Token

    def leave(self) -> None:
        """Make the previous context current again.

        An unfinished coroutine may be closed in a different context from the one it ran in. The token is invalid there,
        and `opentelemetry.context.detach` would log an error.
        """
        try:
            self.token.var.reset(self.token)
        except (AttributeError, ValueError):
            if get_current() is self.context:
                attach(self.previous)


class Entry(Attached):
    """An entry of the current context until `leave`. Entries may be left in any order."""

    __slots__ = ("key", "value")

    def __init__(self, key: str, value: object) -> None:
        self.key = key
        self.value = value
        previous = get_current()
        super().__init__(Context({**previous, key: value}), previous)

    def leave(self) -> None:
        """Give the key the value that it had before. Entries that were made later stay."""
        current = get_current()
        if current is self.context:
            super().leave()
        elif current.get(self.key) is self.value:
            rest = {key: value for key, value in current.items() if key != self.key}
            if self.key in self.previous:
                rest[self.key] = self.previous[self.key]
            attach(Context(rest))


def current_span(span: Span) -> Entry:
    """Make `span` the current span until the entry is left."""
    return Entry(_SPAN, span)


def trace_headers(span: Span, context: Context) -> dict[str, str]:
    """Return the headers that pass `span` and the baggage of `context` on to a service."""
    propagator = get_global_textmap()
    # A context that holds only a span has no baggage.
    has_more = len(context) > 1 or _SPAN not in context
    if (propagator is not _usual and not _is_usual(propagator)) or (has_more and get_all(context)):
        headers: dict[str, str] = {}
        if context.get(_SPAN) is not span:
            context = with_span(span, context)
        propagator.inject(headers, context)  # pyright: ignore[reportArgumentType]  # the default setter takes a dict
        return headers
    # This does the work of the usual propagator at a tenth of its cost (W3C Trace Context, section 3.2). The span
    # context is unpacked as a tuple, because its properties would take half of the time. `bytes.hex` takes half the
    # time of a format.
    trace_id, span_id, _, flags, state, is_valid, *_ = span.get_span_context()
    if not is_valid:
        return {}
    parent = f"00-{trace_id.to_bytes(16).hex()}-{span_id.to_bytes(8).hex()}-{_HEX[flags]}"
    if state is DEFAULT_TRACE_STATE or not state:
        return {"traceparent": parent}
    return {"traceparent": parent, "tracestate": state.to_header()}


class Unrecorded:
    """The observer of a call whose span is not recorded: it passes the span on in the trace headers of the attempts.

    Args:
        context: the context that `headers` are for. In another, to which a middleware may have added baggage, an attempt
            has headers of its own.
        current: keeps the span current until `leave`, unless it is the caller's own.
    """

    __slots__ = ("context", "current", "headers", "span")
    recorded: Literal[False] = False

    def __init__(
        self, span: Span, context: Context, headers: Mapping[str, str], current: Attached | None = None
    ) -> None:
        self.span = span
        self.context = context
        self.headers = headers
        self.current = current

    def begin(self, request: Request) -> Unrecorded:
        current = get_current()
        if current is self.context:
            return self
        try:
            return Unrecorded(self.span, current, trace_headers(self.span, current))
        except Exception as problem:  # noqa: BLE001  # telemetry never breaks a call
            report_once("propagation", f"the trace headers of a call are incomplete: {type(problem).__name__}")
            return self

    def ask(self) -> Unrecorded:
        return self

    def run_tool(self, tool: Tool, call: ToolCall) -> None:
        """Return None, since nothing is recorded. The span of the call is current while the function runs."""

    def end(self, response: Response | None, error: BaseException | None, *, sent: bool = True) -> None:
        """Do nothing, since nothing is recorded."""

    def leave(self) -> None:
        if self.current is not None:
            self.current.leave()


def _is_usual(propagator: TextMapPropagator) -> bool:
    """Whether this propagator writes W3C trace context, alone or with baggage (the default)."""
    global _usual  # noqa: PLW0603  # cached, because every call checks it
    parts: Iterable[object] = (propagator,)
    if type(propagator) is CompositePropagator:
        parts = getattr(propagator, "_propagators", ())
    kinds = {type(part) for part in parts}  # exact types, because a subclass may behave differently
    if TraceContextTextMapPropagator not in kinds or not kinds <= _W3C:
        return False
    _usual = propagator
    return True
