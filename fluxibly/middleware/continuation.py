"""Middleware that goes on with an answer that was cut at the limit of tokens."""

from __future__ import annotations

import attrs

from fluxibly.flow import CallNext, Flow
from fluxibly.types import Request, Response


@attrs.frozen(kw_only=True)
class Continue:
    """Middleware that goes on with an answer that was cut at the limit of tokens."""

    max_turns: int = 3

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        return (yield from call_next(request))
