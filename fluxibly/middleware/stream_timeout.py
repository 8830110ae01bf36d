"""Middleware that bounds the waits for the chunks of a stream."""

from __future__ import annotations

import attrs

from fluxibly._checks import validator
from fluxibly.flow import CallNext, Flow
from fluxibly.limits import Leash, seconds_problem
from fluxibly.types import Request, Response

_seconds = attrs.validators.optional(validator(seconds_problem))


@attrs.frozen(kw_only=True, repr=False)
class StreamTimeout:
    """Middleware that ends a stream whose provider lets the consumer wait. Whole answers are not bounded.

    No keep-alive and no chunk without output restarts a limit, unlike `Timeouts.idle`. The time of the consumer does not
    count. Each attempt begins anew. The errors are retryable before output; after output, they are the cause of
    `StreamInterrupted`. Of several limits of a kind, the shortest holds.

    Providers that do not keep such limits themselves are treated as by `Deadline`.

    Args:
        first_chunk: seconds from the sending of a request to its first chunk with output. The error is `RequestTimeout`,
            with the phase "first_chunk".
        idle: seconds of waiting for each later chunk. The error is `StreamStalled`.

    Raises:
        ValueError: a limit is not a number above 0, or there is no limit.
    """

    first_chunk: float | None = attrs.field(default=None, validator=_seconds)
    idle: float | None = attrs.field(default=None, validator=_seconds)

    def __attrs_post_init__(self) -> None:
        if self.first_chunk is None and self.idle is None:
            raise ValueError("StreamTimeout: expected first_chunk or idle, in seconds, got neither")

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        call = request.call
        outer = call.leash
        call.leash = Leash(outer, first_chunk=self.first_chunk, idle=self.idle, by=self)
        try:
            return (yield from call_next(request))
        finally:
            call.leash = outer

    def __repr__(self) -> str:
        limits = {"first_chunk": self.first_chunk, "idle": self.idle}
        shown = [f"{name}={limit!r}" for name, limit in limits.items() if limit is not None]
        return f"StreamTimeout({', '.join(shown)})"
