"""Skeleton of `Cache`, to be replaced."""

from __future__ import annotations

import attrs

from fluxibly.flow import CallNext, Flow
from fluxibly.types import Request, Response


@attrs.frozen(kw_only=True, eq=False)
class Cache:
    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        return (yield from call_next(request))
