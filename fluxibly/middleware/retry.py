"""Middleware that retries calls after transient errors."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal

import attrs

from fluxibly._checks import number, one_of, validator, whole
from fluxibly._logs import log_retry
from fluxibly.errors import ProviderError, StreamInterrupted, error_type, root_cause
from fluxibly.flow import CallNext, Flow, sleep
from fluxibly.flow.compose import check_deadline
from fluxibly.flow.relay import OutputWatch
from fluxibly.types import Request, Response, Restart


@attrs.frozen(kw_only=True)
class Retry:
    """Middleware that retries after errors marked retryable (`ProviderError.retryable`), and only before output.

    The wait before retry n (from 0) is random between 0 and min(`max_delay`, `base_delay` * 2**n) seconds: exponential
    backoff with full jitter (the AWS Architecture Blog's "Exponential Backoff And Jitter"). If the service asked for a
    wait (`Retry-After`), that wait is used instead, or the error is raised at once if it exceeds `max_retry_after`. If the
    wait would end after the deadline of the call, `DeadlineExceeded` is raised at once.

    Args:
        max_retries: the number of retries after the first attempt; 0 disables retries.
        base_delay, max_delay: bounds of the backoff in seconds, see above.
        max_retry_after: the longest `Retry-After` to wait for, in seconds.
        total_time: seconds since the start of the first attempt after which no attempt begins; None means no limit.
        on_interrupt: how to handle a stream that fails after output. "raise" raises `StreamInterrupted`. "restart"
            emits a `Restart` and starts over, if the consumer (`stream(…, restarts=True)`) or an outer hold-back
            accepts restarts.
        uniform: the source of jitter, for tests.
    """

    max_retries: int = attrs.field(default=3, validator=validator(whole, 0))
    base_delay: float = attrs.field(default=0.5, validator=validator(number, 0, finite=False))
    max_delay: float = attrs.field(default=8.0, validator=validator(number, 0, finite=False))
    max_retry_after: float = attrs.field(default=60.0, validator=validator(number, 0, finite=False))
    total_time: float | None = attrs.field(
        default=None, validator=attrs.validators.optional(validator(number, 0, finite=False))
    )
    on_interrupt: Literal["raise", "restart"] = attrs.field(
        default="raise", validator=validator(one_of, ("raise", "restart"))
    )
    uniform: Callable[[float, float], float] = attrs.field(default=random.uniform, repr=False)

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        call = request.call
        start = call.clock()
        attempt = 0
        while True:
            watch = OutputWatch() if call.streaming else None
            try:
                flow = call_next(request)
                return (yield from flow if watch is None else watch.over(flow))
            except Exception as error:
                if watch is not None and watch.done and not isinstance(error, StreamInterrupted):
                    raise  # not the provider's error: an inner layer failed after output had gone past here
                wait = self.wait(attempt, error, call.clock() - start)
                if wait is None:
                    raise
                if call.leash is not None:
                    check_deadline(call, request.model, wait)
                if isinstance(error, StreamInterrupted) and not (yield Restart(error_type(error))):
                    raise
                change = "starts the stream over" if isinstance(error, StreamInterrupted) else ""
                log_retry(request, error, attempt, wait, change=change)
            yield from sleep(wait)
            attempt += 1

    def wait(self, attempt: int, error: Exception, elapsed: float) -> float | None:
        """Return the seconds to wait after attempt number `attempt` (from 0) failed, or None to raise the error."""
        cause = root_cause(error)
        if attempt >= self.max_retries or not isinstance(cause, ProviderError) or not cause.retryable:
            return None
        if isinstance(error, StreamInterrupted) and self.on_interrupt != "restart":
            return None
        wait = self.uniform(0.0, min(self.max_delay, self.base_delay * 2.0 ** min(attempt, 60)))
        if cause.retry_after is not None and cause.retry_after >= 0:  # neither a negative number nor NaN is a time
            if cause.retry_after > self.max_retry_after:
                return None
            wait = cause.retry_after
        if self.total_time is not None and elapsed + wait >= self.total_time:
            return None
        return wait
