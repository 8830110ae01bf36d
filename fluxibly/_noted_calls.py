"""The record of a call, for the code that makes the call: also after it has failed.

Imports: data, flow. Imported by: `serve`, `batch`.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

from fluxibly.flow import CallNext, Flow
from fluxibly.types import CallRecord, Request, Response

_calls: ContextVar[list[CallRecord] | None] = ContextVar("calls", default=None)
"""The records of the calls that this context makes, once they have begun."""


def note_call(request: Request, call_next: CallNext) -> Flow[Response]:
    """Note the record of a call. A middleware, outside of all others."""
    calls = _calls.get()
    if calls is not None:
        calls.append(request.call)
    return (yield from call_next(request))


@contextmanager
def noted_calls() -> Generator[list[CallRecord]]:
    """Return the list to which the records of the calls are added that this context makes meanwhile."""
    calls: list[CallRecord] = []
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)
