"""Middleware that moves reasoning which a model writes into its text."""

from __future__ import annotations

import attrs

from fluxibly.flow import CallNext, Flow
from fluxibly.types import Request, Response


@attrs.frozen(kw_only=True)
class ExtractReasoning:
    """Middleware that moves reasoning which a model writes into its text."""

    tag: str = "think"

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        return (yield from call_next(request))
