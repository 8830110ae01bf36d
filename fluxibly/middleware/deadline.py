"""Middleware that bounds how long a call takes."""

from __future__ import annotations

import attrs

from fluxibly._checks import validator
from fluxibly.flow import CallNext, Flow
from fluxibly.limits import Leash, seconds_problem
from fluxibly.types import Request, Response


@attrs.frozen(repr=False)
class Deadline:
    """Middleware that ends everything inside of it after some seconds: attempts, waits, questions and the consumer's time.

    The error is `DeadlineExceeded`, which is not retried; its cause is the error of the last attempt, if one has failed. In
    a stream after output, it is the cause of `StreamInterrupted`. Of several deadlines, the earliest holds.

    Nothing is sent, and no wait (`sleep`) goes on, after the deadline. A provider that does not keep the limits of calls
    itself is cancelled if it is asynchronous. If it is synchronous, its caller stops waiting, and the provider runs on in
    its thread until it returns. What a middleware does by `perform` is cut short in async programs only.

    Args:
        seconds: how long what is inside may take, from the moment at which the call reaches this middleware.

    Raises:
        ValueError: `seconds` is not a number above 0.
    """

    seconds: float = attrs.field(validator=validator(seconds_problem))

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        call = request.call
        outer = call.leash
        call.leash = Leash(outer, deadline=call.clock() + self.seconds, by=self)
        try:
            return (yield from call_next(request))
        finally:
            call.leash = outer

    def __repr__(self) -> str:
        return f"Deadline({self.seconds!r})"
