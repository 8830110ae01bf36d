"""Middleware that sets parameters which a request leaves open."""

from __future__ import annotations

import attrs

from fluxibly.flow import CallNext, Flow
from fluxibly.types import Request, Response


@attrs.frozen(kw_only=True)
class Defaults:
    """Middleware that sets parameters which a request leaves open."""

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        return (yield from call_next(request))
