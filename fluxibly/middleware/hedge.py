"""Middleware that sends a request again when its answer is late, and takes the first answer."""

from __future__ import annotations

import math
import re
import threading
from collections import deque
from typing import Any

import attrs

from fluxibly._checks import number, problem, validator, whole
from fluxibly._logs import log_decision
from fluxibly._threads import renew_lock_after_fork
from fluxibly.errors import FluxiblyError, error_type
from fluxibly.flow import CallNext, Flow, provider_of, race
from fluxibly.middleware._copies import Rebuilt
from fluxibly.middleware._keys import key_of, name_of, whom
from fluxibly.middleware._outputs import FirstOutput, asked_at
from fluxibly.target import Target, to_targets
from fluxibly.types import Request, Response

LEAST = 20
"""The number of samples below which there is no percentile."""
SAMPLES = 200
"""The number of samples that are kept for each provider and model."""
EACH = 20
"""The number of new samples after which a percentile is computed again."""
SOONEST = 0.001
"""The shortest time to wait, in seconds, whatever was learned."""
MODELS = 1000
"""The number of providers and models whose times are kept."""
RECENT = 100
"""The number of calls over which the share of further requests is counted."""


def _after_problem(name: str, value: object) -> str | None:
    if isinstance(value, str):
        return None if re.fullmatch("p[5-9][0-9]", value) else problem(name, 'seconds, or one of "p50" to "p99"', value)
    return number(name, value, above=0, unit="seconds")


def _to_targets(value: Any) -> Any:
    return None if value is None else to_targets(value)


@attrs.frozen(eq=False)
class Hedge(Rebuilt):
    """Middleware that sends a request again when its answer is late, and takes whichever comes first.

    The first whole answer wins; in a stream, the first output. The other requests are given up at once: their connections are
    released, and their attempts count as abandoned. A failed request is not sent again; `Retry` and `Fallback` do that. If all
    fail, the error of the first is raised.

    A percentile is taken over the last 200 calls to the same provider and model, whole and streamed apart: of the times to
    the end of a whole answer, or to the first output of a stream. Below 20 samples nothing is sent again. A request that was
    given up counts with the time that it had: the quick ones alone would make the percentile shrink. Waits in a `RateLimit`
    or `Concurrency` inside of it count, too.

    Each further request costs tokens, and adds to the load of a service that may be slow because of its load. All calls
    through one instance share the times and the limit `max_share`.

    Args:
        after: seconds, more than 0, or a percentile of the times so far, from "p50" to "p99", such as "p95".
        to: the targets of further requests, in turn; by default, that of the first request.
        at_most: the most further requests of a call, from 1 to 100. Each follows the one before after the same time.
        max_share: the most further requests in the last hundred calls, as a share of these calls, from 0 to 1. The first
            in a hundred calls is always allowed; 1 is no limit.

    Raises:
        ConfigError: a target is wrong, or `to` has none.
        ValueError: another setting is wrong.
    """

    after: float | str = attrs.field(validator=validator(_after_problem))
    to: tuple[Target, ...] | None = attrs.field(
        default=None,
        kw_only=True,
        converter=_to_targets,
        validator=attrs.validators.optional(attrs.validators.instance_of(tuple)),
    )
    at_most: int = attrs.field(default=1, kw_only=True, validator=validator(whole, 1, 100))
    max_share: float = attrs.field(default=0.1, kw_only=True, validator=validator(number, 0, 1))
    _times: _Times | None = attrs.field(init=False, repr=False)
    _shares: _Shares = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        times = _Times(int(self.after[1:])) if isinstance(self.after, str) else None
        object.__setattr__(self, "_times", times)
        object.__setattr__(self, "_shares", _Shares(self.max_share))

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets, which an `LLM` checks when it is made."""
        return self.to or ()

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        call, times = request.call, self._times
        self._shares.begin()
        if times is None:
            return (yield from _Attempts(self, request, call_next, None, float(self.after)).race())
        made = call.targets.is_made(request.target)  # nearly always, and saves two generators
        info = call.targets.info_of(request.target) if made else (yield from provider_of(request))
        key = name_of(info, request, "provider and model")
        after = times.percentile(key, streaming=call.streaming)
        if after is not None:
            return (yield from _Attempts(self, request, call_next, times, after).race())
        begun = call.clock()
        if call.streaming:
            watch = FirstOutput(lambda: times.add(key, call.clock() - asked_at(call, begun), streaming=True))
            response = yield from watch.over(call_next(request))
            if watch.done:
                return response
        else:
            response = yield from call_next(request)
        times.add(key, call.clock() - asked_at(call, begun), streaming=call.streaming)
        return response

    def allows(self) -> bool:
        """Count another request, if its share allows it."""
        return self._shares.take()


class _Refused(FluxiblyError):
    """A further request is not sent. No caller ever sees this error, because the first request is still under way."""


class _Attempts:
    """The requests of one call."""

    def __init__(self, hedge: Hedge, request: Request, call_next: CallNext, times: _Times | None, after: float) -> None:
        self.hedge = hedge
        self.request = request
        self.call_next = call_next
        self.times = times
        self.after = after
        self.sent = 0
        """How many of the requests have been sent."""
        self.begun = 0
        self.won = False
        """Whether one has answered, so that the others are given up."""

    def race(self) -> Flow[Response]:
        """Run the first request and, if it is late, the others."""
        request, to = self.request, self.hedge.to
        others = [request if to is None else request.evolve(target=to[n % len(to)]) for n in range(self.hedge.at_most)]
        return race(self.attempt, [request, *others], self.after, after_failure=False)

    def attempt(self, asked: Request) -> Flow[Response]:
        """Send one of the requests."""
        first = not self.begun
        self.begun += 1
        if not first:
            yield from self.admit(asked)
        self.sent += 1
        call = asked.call
        times, streaming, begun = self.times, call.streaming, call.clock()
        key = "" if times is None else (yield from key_of(asked, "provider and model"))

        def answered() -> None:
            self.won = True
            note()
            if self.sent > 1:
                log_decision(
                    self.request, "Hedge", f"takes the answer of {'the first request' if first else whom(asked)}"
                )

        def note() -> None:
            if times is not None:
                times.add(key, call.clock() - asked_at(call, begun), streaming=streaming)

        watch = FirstOutput(answered) if streaming else None
        try:
            flow = self.call_next(asked)
            response = yield from flow if watch is None else watch.over(flow)
        except GeneratorExit:
            if self.won and not (watch is not None and watch.done):  # given up, and not by the consumer
                note()
            raise
        if watch is None or not watch.done:
            answered()
        return response

    def admit(self, asked: Request) -> Flow[None]:
        """Decide whether a further request is sent."""
        try:
            yield from provider_of(asked)
        except FluxiblyError as error:
            log_decision(
                self.request, "Hedge", f"does not ask {whom(asked)}, which cannot be asked: {error_type(error)}", error
            )
            raise
        late = f"nothing has come in {self.after:.3g} s"
        if not self.hedge.allows():
            share = f"{self.hedge.max_share:.0%} of the last {RECENT} calls"
            log_decision(self.request, "Hedge", f"sends no other request, though {late}: {share} had one")
            raise _Refused("Hedge sends no other request")
        log_decision(self.request, "Hedge", f"asks {whom(asked)}, too, because {late}")


class _Sample:
    """The last times of one provider and model, whole or streamed."""

    __slots__ = ("left", "seconds", "value")

    def __init__(self) -> None:
        self.seconds: deque[float] = deque(maxlen=SAMPLES)
        self.left = LEAST
        """How many samples are to come before the percentile is computed again."""
        self.value: float | None = None


class _Times:
    """The times of each provider and model, whole and streamed apart, as the calls have learned them."""

    def __init__(self, percent: int) -> None:
        self._percent = percent
        self.renew_lock()
        renew_lock_after_fork(self)
        self._samples: tuple[dict[str, _Sample], dict[str, _Sample]] = ({}, {})

    def renew_lock(self) -> None:
        """Make a new lock."""
        self._lock = threading.Lock()

    def add(self, key: str, seconds: float, *, streaming: bool) -> None:
        """Learn a time."""
        with self._lock:
            samples = self._samples[streaming]
            sample = samples.get(key)
            if sample is None:
                if len(samples) == MODELS:
                    del samples[next(iter(samples))]
                sample = samples[key] = _Sample()
            sample.seconds.append(seconds)
            sample.left -= 1
            if not sample.left:
                sample.left = EACH
                ordered = sorted(sample.seconds)
                sample.value = ordered[math.ceil(self._percent / 100 * len(ordered)) - 1]

    def percentile(self, key: str, *, streaming: bool) -> float | None:
        """Return the percentile in seconds, or None if too little is known."""
        sample = self._samples[streaming].get(key)
        value = None if sample is None else sample.value
        return None if value is None else max(value, SOONEST)


class _Shares:
    """How many further requests the last hundred calls had."""

    def __init__(self, share: float) -> None:
        self._share = share
        self.renew_lock()
        renew_lock_after_fork(self)
        self._recent: deque[int] = deque()
        """The number of further requests that were sent while each call was the newest."""
        self._sum = 0

    def renew_lock(self) -> None:
        """Make a new lock."""
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Count a call."""
        if self._share == 1:
            return
        with self._lock:
            self._recent.append(0)
            if len(self._recent) > RECENT:
                self._sum -= self._recent.popleft()

    def take(self) -> bool:
        """Count a further request, and return True, if the share allows it."""
        if self._share == 1:
            return True
        with self._lock:
            if self._sum and self._sum + 1 > self._share * len(self._recent):
                return False
            self._sum += 1
            self._recent[-1] += 1
            return True
