"""Middleware that lets a provider without a stream answer streamed calls."""

from __future__ import annotations

import attrs

from fluxibly.flow import CallNext, Flow
from fluxibly.types import Request, Response


@attrs.frozen(kw_only=True)
class SimulateStream:
    """Middleware that lets a provider without a stream answer streamed calls."""

    by: str = "word"

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        return (yield from call_next(request))
