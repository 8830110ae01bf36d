"""Middleware that retries calls after transient errors."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, cast

import attrs

from fluxibly import errors
from fluxibly._checks import did_you_mean, is_mapping, number, one_of, problem, unknown_settings, validator, whole
from fluxibly._logs import log_decision, log_retry
from fluxibly.errors import FluxiblyError, ProviderError, StreamInterrupted, error_type, root_cause
from fluxibly.flow import CallNext, Flow, sleep
from fluxibly.flow.compose import check_deadline
from fluxibly.flow.relay import OutputWatch
from fluxibly.flow.verbs import discard
from fluxibly.functions import check_function, to_function
from fluxibly.middleware._copies import Rebuilt
from fluxibly.stores import MemoryStore
from fluxibly.types import Request, Response, Restart

Decide: TypeAlias = Callable[[Exception, int], bool | float | None]
_WINDOW = 10.0
"""The seconds of calls and retries that a budget counts."""
_NONE: Mapping[type[Exception], int] = MappingProxyType({})


def _budget_problems(settings: Mapping[str, Any], path: str = "") -> list[str]:
    found = [
        number(f"{path}ratio", settings.get("ratio", 0.0), 0),
        whole(f"{path}floor", settings.get("floor", 0), 0),
    ]
    return [*unknown_settings(settings, ("ratio", "floor"), path), *filter(None, found)]


@attrs.define(kw_only=True, eq=False)
class RetryBudget(Rebuilt):
    """A budget of retries that many calls share, so that an outage is not multiplied by retries.

    Over the last ten seconds there are no more retries than `ratio` times the calls, but `floor` are always allowed. Give
    the same budget to several `Retry` to let them share it. It may be used from any number of threads and tasks.

    Args:
        ratio: retries for each call, such as 0.2 for one retry for five calls.
        floor: the number of retries in ten seconds that are allowed with however few calls.

    Raises:
        ValueError: `ratio` is not a number from 0 up, or `floor` not a whole number from 0 up.
    """

    ratio: float = attrs.field(default=0.2, validator=validator(number, 0))
    floor: int = attrs.field(default=10, validator=validator(whole, 0))
    _sums: MemoryStore = attrs.field(factory=MemoryStore, init=False, repr=False)
    """The calls and the retries of the last seconds."""

    def count(self, now: float) -> None:
        """Count a call that begins at `now`, a time of its `call.clock`."""
        self._sums.add("calls", 1.0, _WINDOW, now)

    def take(self, now: float) -> bool:
        """Take a retry out of the budget, and return True; or return False if it is used up."""
        calls = self._sums.add("calls", 0.0, _WINDOW, now) or 0.0
        most = max(self.floor, self.ratio * calls)
        return self._sums.add("retries", 1.0, _WINDOW, now, most=most) is not None

    def give_back(self, now: float) -> None:
        """Give back a retry that was taken, but not made."""
        self._sums.add("retries", -1.0, _WINDOW, now)


def _to_budget(value: RetryBudget | Mapping[str, Any] | None) -> RetryBudget | None:
    """Return a budget as code or YAML gives it."""
    if not isinstance(value, Mapping):
        return value  # if it is something else, the validator says so
    if found := _budget_problems(value, "budget."):
        raise ValueError(f"Retry: {'; '.join(found)}")
    return RetryBudget(**value)


def _budget_problem(name: str, value: object) -> str | None:
    expected = "a RetryBudget(ratio=…, floor=…) or None (in YAML, a table)"
    return None if value is None or isinstance(value, RetryBudget) else problem(name, expected, value)


def _to_limits(value: Mapping[Any, int]) -> Mapping[type[Exception], int]:
    """Return limits with classes for keys, where YAML gives their names."""
    if not is_mapping(value):
        return value  # the validator says what is wrong
    return {_class_named(key) if isinstance(key, str) else key: limit for key, limit in value.items()}


def _class_named(name: str) -> type[Exception]:
    found: dict[str, type[Exception]] = {
        each: kind for each, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, FluxiblyError)
    }
    if name not in found:
        raise ValueError(f"Retry: limits: there is no error {name!r} in fluxibly.errors{did_you_mean(name, found)}")
    return found[name]


def _limits_problem(name: str, value: object) -> str | None:
    if not is_mapping(value):
        return problem(name, "a table of classes of errors and numbers of retries, such as {RateLimitError: 5}", value)
    for key, limit in value.items():
        kind: Any = key
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            return problem(name, "classes of errors, or their names, as keys", key)
        if found := whole(f"{name}.{kind.__name__}", limit, 0):
            return found
    return None


def _to_decide(value: Decide | str | None) -> Decide | None:
    return to_function(value)


def _show_limits(limits: Mapping[type[Exception], int]) -> str:
    return f"{{{', '.join(f'{kind.__name__}: {limit}' for kind, limit in limits.items())}}}"


@attrs.frozen(kw_only=True)
class Retry:
    """Middleware that retries after errors marked retryable (`ProviderError.retryable`), and only before output.

    The wait before retry n (from 0) is random between 0 and min(`max_delay`, `base_delay` * 2**n) seconds: exponential
    backoff with full jitter (the AWS Architecture Blog's "Exponential Backoff And Jitter"). If the service asked for a
    wait (`Retry-After`), that wait is used instead, or the error is raised at once if it exceeds `max_retry_after`. If the
    wait would end after the deadline of the call, `DeadlineExceeded` is raised at once.

    Args:
        max_retries: the number of retries after the first attempt, whatever the errors; 0 disables retries.
        base_delay, max_delay: bounds of the backoff in seconds, see above.
        max_retry_after: the longest `Retry-After` to wait for, in seconds.
        total_time: seconds since the start of the first attempt after which no attempt begins; None means no limit.
        on_interrupt: how to handle a stream that fails after output. "raise" raises `StreamInterrupted`. "restart"
            emits a `Restart` and starts over, if the consumer (`stream(…, restarts=True)`) or an outer hold-back
            accepts restarts.
        limits: the number of retries of a call for each class of errors, such as `{RateLimitError: 5, ServerError: 2}`;
            in YAML by the names of the classes in `fluxibly.errors`. An error counts towards the nearest of its classes
            that is listed. A number above `max_retries` takes the place of `max_retries` for its class.
        decide: a function of the error and the number of the failed attempt (from 0). It returns None for the usual rule,
            True to retry with the usual wait whether the error is marked retryable or not, False to raise the error, or
            the seconds to wait before a retry. The error is the cause where a stream was interrupted. It is asked only
            where a retry is possible at all: all other settings still apply, and nothing is sent again after output. In
            YAML, its registered name.
        budget: a `RetryBudget` that many calls share; in YAML a table, as `{ratio: 0.2, floor: 10}`. If it is used up,
            the error is raised with a note that says so.
        uniform: the source of jitter, for tests.

    Raises:
        ValueError: a setting is wrong; the message names it.
        TypeError: from a call, if `decide` returned something else.
    """

    max_retries: int = attrs.field(default=3, validator=validator(whole, 0))
    base_delay: float = attrs.field(default=0.5, validator=validator(number, 0))
    max_delay: float = attrs.field(default=8.0, validator=validator(number, 0, finite=False))
    max_retry_after: float = attrs.field(default=60.0, validator=validator(number, 0, finite=False))
    total_time: float | None = attrs.field(
        default=None, validator=attrs.validators.optional(validator(number, 0, finite=False))
    )
    on_interrupt: Literal["raise", "restart"] = attrs.field(
        default="raise", validator=validator(one_of, ("raise", "restart"))
    )
    limits: Mapping[type[Exception], int] = attrs.field(
        default=_NONE, converter=_to_limits, validator=validator(_limits_problem), repr=_show_limits, hash=False
    )
    decide: Decide | None = attrs.field(
        default=None, converter=_to_decide, validator=attrs.validators.optional(validator(check_function))
    )
    budget: RetryBudget | None = attrs.field(
        default=cast("RetryBudget | None", None), converter=_to_budget, validator=validator(_budget_problem)
    )
    uniform: Callable[[float, float], float] = attrs.field(default=random.uniform, repr=False)

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        call = request.call
        start = 0.0 if self.total_time is None else call.clock()
        if self.budget is not None:
            self.budget.count(call.clock())
        attempt = 0
        retried = _NONE
        while True:
            watch = OutputWatch() if call.streaming else None
            try:
                flow = call_next(request)
                return (yield from flow if watch is None else watch.over(flow))
            except Exception as error:
                if watch is not None and watch.done and not isinstance(error, StreamInterrupted):
                    raise  # not the provider's error: an inner layer failed after output had gone past here
                wait = self.wait(attempt, error, call.clock() - start, retried)
                if wait is None:
                    raise
                if call.leash is not None:
                    check_deadline(call, request.model, wait)
                if self.budget is not None and not self.budget.take(call.clock()):
                    _say_used_up(self.budget, request, error, attempt)
                    raise
                if isinstance(error, StreamInterrupted) and not (yield Restart(error_type(error))):
                    if self.budget is not None:
                        self.budget.give_back(call.clock())
                    raise
                change = "starts the stream over" if isinstance(error, StreamInterrupted) else ""
                log_retry(request, error, attempt, wait, change=change)
                kind = self._listed(root_cause(error))
                if kind is not None:
                    retried = {**retried, kind: retried.get(kind, 0) + 1}
            yield from sleep(wait)
            attempt += 1

    def wait(
        self, attempt: int, error: Exception, elapsed: float, retried: Mapping[type[Exception], int] = _NONE
    ) -> float | None:
        """Return the seconds to wait after attempt number `attempt` (from 0) failed, or None to raise the error.

        Args:
            attempt: the number of retries so far.
            error: what the attempt raised.
            elapsed: seconds since the start of the first attempt; needed only with `total_time`.
            retried: the number of retries so far after errors of each class in `limits`.
        """
        if isinstance(error, StreamInterrupted) and self.on_interrupt != "restart":
            return None
        cause = root_cause(error)
        most, kind = self.max_retries, self._listed(cause)
        if kind is not None:
            if retried.get(kind, 0) >= self.limits[kind]:
                return None
            most = max(most, self.limits[kind])
        if attempt >= most or not isinstance(cause, Exception):
            return None
        wait = self._decided(cause, attempt)
        if wait is None or (self.total_time is not None and elapsed + wait >= self.total_time):
            return None
        return wait

    def _listed(self, cause: BaseException) -> type[Exception] | None:
        """Return the nearest class of an error that `limits` lists."""
        return next((kind for kind in type(cause).__mro__ if kind in self.limits), None) if self.limits else None

    def _decided(self, cause: Exception, attempt: int) -> float | None:
        """Return the seconds to wait by the say of `decide`, or else by the usual rule; None to raise the error."""
        decided = None if self.decide is None else self.decide(cause, attempt)
        if decided is None:
            decided = isinstance(cause, ProviderError) and cause.retryable
        if isinstance(decided, bool):
            return self._usual_wait(cause, attempt) if decided else None
        expected = "True, False, None or a number of seconds from 0 up from its function"
        if number("decide", decided, 0) is not None:
            discard(decided)
            raise TypeError(f"Retry: {problem('decide', expected, decided)}")
        return decided

    def _usual_wait(self, cause: Exception, attempt: int) -> float | None:
        after = cause.retry_after if isinstance(cause, ProviderError) else None
        if after is not None and after >= 0:  # neither a negative number nor NaN is a time
            return None if after > self.max_retry_after else after
        return self.uniform(0.0, min(self.max_delay, self.base_delay * 2.0 ** min(attempt, 60)))


def _say_used_up(budget: RetryBudget, request: Request, error: Exception, attempt: int) -> None:
    reason = f"the budget of Retry is used up: {budget}"
    log_decision(request, "Retry", f"does not retry after attempt {attempt + 1}: {reason}", error)
    note = f"not retried, because {reason}"
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)
