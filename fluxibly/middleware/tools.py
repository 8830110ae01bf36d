"""Middleware that runs the functions that a model calls, and asks again with their results."""

from __future__ import annotations

import attrs

from fluxibly.flow import CallNext, Flow
from fluxibly.types import Request, Response


@attrs.frozen(kw_only=True)
class Tools:
    """Middleware that runs the functions that a model calls, and asks again with their results."""

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        return (yield from call_next(request))
