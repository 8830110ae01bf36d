"""Middleware that keeps calls under a rate of requests and tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias

import attrs

from fluxibly._checks import number, one_of, truth, validator
from fluxibly._logs import log_decision
from fluxibly.errors import (
    REFUSALS,
    ConfigError,
    ProviderError,
    QuotaExceeded,
    RateLimitError,
    RateLimitWait,
    StreamInterrupted,
    root_cause,
)
from fluxibly.flow import CallNext, Flow, provider_of
from fluxibly.functions import check_function, to_function
from fluxibly.middleware._adaptive_rate import FORGOTTEN, READ_EVERY, AdaptiveRate, Sending
from fluxibly.middleware._blocks import Blocks
from fluxibly.middleware._copies import Rebuilt
from fluxibly.middleware._estimates import FIRST_OUTPUT, Estimate, Estimates
from fluxibly.middleware._keys import By, check_by, name_of, to_by, whom
from fluxibly.middleware._rate_headers import told_limits
from fluxibly.middleware._shared import (
    ON_STORE_ERROR,
    WAITED,
    Later,
    OnStoreError,
    new_name,
    wait_for_turn,
)
from fluxibly.stores import Entry, Limit, Store, Turn, to_store
from fluxibly.stores.protocol import make_limit
from fluxibly.types import ProviderInfo, Request, Response

_optional = attrs.validators.optional
_MOST_LOWERED = 10_000
_MOST_RATES = 10_000
"""The most keys of which the rate that was found is remembered."""
_SLOWEST = 1e-9
"""The lowest rate. Below it, times overflow."""
_LONGEST_STOP = 86_400.0
"""The most seconds for which a service's `Retry-After` stops calls. More is a mistake of the service."""


def _found_key(use: _Use) -> str:
    """Return the key of what was found, in the store."""
    return f"{use.key} found"


class _Use:
    """The share of the limits that one call takes, and how the call ended."""

    estimate: Estimate | None = None
    tokens: Limit | None = None
    """The limit of tokens, with those that were reserved."""
    rate: AdaptiveRate | None = None
    """What was found; None: there are numbers."""
    sending: Sending | None = None
    waited = 0.0
    """The seconds that the call had waited for turns when it was sent."""
    reserved = False
    response: Response | None = None
    error: BaseException | None = None

    def __init__(self, request: Request, info: ProviderInfo, name: str) -> None:
        self.request = request
        self.info = info
        self.name = name
        """The provider and the model, or whatever else has limits of its own."""
        self.key = f"rate {name}"
        self.who = new_name()
        self.attempts = request.call.attempts
        """The attempts of the call before this one."""
        self.delivered = len(request.call.delivered)
        """The number of texts that the call had delivered before this attempt."""

    @property
    def model(self) -> str:
        """The model of which the estimates are, with its provider."""
        return f"{self.info.key}/{self.request.model}"

    def output(self) -> str:
        """Return the text of an attempt that has ended with an error."""
        if isinstance(self.error, StreamInterrupted):
            return self.error.partial.text
        return "".join(self.request.call.delivered[self.delivered :])


Tokens: TypeAlias = Callable[[Request], float]


def _to_estimate(value: Tokens | str | None) -> Tokens | None:
    return to_function(value)


def _to_store(value: Any) -> Any:
    return to_store(value, ("reserve", "correct", "throttle", "release"))


@attrs.frozen(kw_only=True, eq=False)
class RateLimit(Rebuilt):
    """Middleware that keeps calls under a rate. Calls that are too early wait, first come, first served.

    Without `requests` and `tokens` it finds the rate: the service's rate-limit headers give it, or else it is doubled every second
    in which calls wait for it, until the service refuses a call (429) or latency doubles. From then on each refusal cuts it to
    0.85 or less, and it comes back along a cubic curve. What was found is forgotten when it was not used for ten minutes.

    Both limits are kept at once, by the generic cell rate algorithm (GCRA, ITU-T I.371): calls are spread evenly, after a
    `burst` that a pause allows. The tokens of a call are estimated before it is sent, learned from the usage of earlier
    calls, and corrected when its usage is known. What failed before any output gives its tokens back; the request is never
    given back.

    Args:
        requests: the most requests in `per` seconds; None: no limit, or one that is found.
        tokens: the most tokens in `per` seconds, input and output together; None: no limit, or one that is found.
        per: the seconds that they are for.
        burst: the requests that may go at once after a pause; tokens, where only `tokens` is given. By default what one
            second allows, and at least one call. `per` and `burst` need numbers that they are for.
        max_wait: the most seconds to wait. A call that would wait longer is refused at once.
        learn: whether the rate-limit headers of answers (`x-ratelimit-*`, `anthropic-ratelimit-*`) lower the rate, never
            above the numbers given here, and `Retry-After` stops all calls that share the limit.
        estimate: a function that returns the tokens of a request, in place of the learned estimate.
        give_back: whether a call that took fewer tokens than estimated gives the rest back. Without it the limit holds
            strictly, and less of it is used.
        by: what has limits of its own: "provider", "provider and model" (the default), or what a function of the request
            returns.
        store: where the state is: "memory" (the default: each instance has its own), "sqlite:PATH" (a file that the
            processes of a machine share), "redis://HOST" (a server that processes and machines share), or a
            `fluxibly.stores.Store`.
            Calls that wait poll it. Corrections reach it at most `block` seconds late.
        block: the seconds for which a process reserves ahead in a store that does I/O, where it makes many calls: one trip to
            the store then serves many of them, first come, first served, and processes take turns. Over all processes the
            limit holds as without it. What is reserved ahead lapses after `block` seconds, so a process that has no more
            calls, or that dies, costs the others at most as much of the rate; and after a pause, `block` seconds' worth of
            the burst is kept back, at most a quarter of it. 0: each call makes its own trips, and has all of the burst, but
            only if all processes say so. A memory store needs no blocks.
        on_store_error: what happens when the store fails: "local" keeps the limit in this process until it works again,
            "raise" raises `StoreError`, "open" lets calls pass.

    Raises:
        RateLimitWait: the wait would be longer than `max_wait`, or end after the deadline of the call. `retry_after` is that
            wait.
        ConfigError: `burst`, `per` or `learn=False` is given without `requests` or `tokens`.
    """

    requests: float | None = attrs.field(default=None, validator=_optional(validator(number, above=0)))
    tokens: float | None = attrs.field(default=None, validator=_optional(validator(number, above=0)))
    per: float = attrs.field(default=60.0, validator=validator(number, above=0))
    burst: float | None = attrs.field(default=None, validator=_optional(validator(number, 1)))
    max_wait: float = attrs.field(default=60.0, validator=validator(number, 0))
    learn: bool = attrs.field(default=True, validator=validator(truth))
    estimate: Tokens | None = attrs.field(
        default=None, converter=_to_estimate, validator=_optional(validator(check_function))
    )
    give_back: bool = attrs.field(default=True, validator=validator(truth))
    by: By = attrs.field(default="provider and model", converter=to_by, validator=validator(check_by))
    store: Store = attrs.field(default=None, converter=_to_store)
    block: float = attrs.field(default=0.1, validator=validator(number, 0))
    on_store_error: OnStoreError = attrs.field(default="local", validator=validator(one_of, ON_STORE_ERROR))
    _shared: Blocks = attrs.field(init=False, repr=False)
    _estimates: Estimates = attrs.field(init=False, repr=False)
    _limits: tuple[Limit, ...] = attrs.field(init=False, repr=False)
    """The limits, with what a call takes of them, if it takes no tokens."""
    _own_burst: bool = attrs.field(init=False, repr=False)
    """Whether the user gave a burst of tokens."""
    _lowered: dict[tuple[str, str], None] = attrs.field(init=False, repr=False, factory=dict[tuple[str, str], None])
    """The limits, by key and name, that the headers of an answer have lowered."""
    _rates: dict[str, AdaptiveRate] = attrs.field(init=False, repr=False, factory=dict[str, AdaptiveRate])
    """What was found, by key; nothing, if there are numbers."""

    def __attrs_post_init__(self) -> None:
        if self.requests is None and self.tokens is None:
            self._check_without_numbers()
        for name in ("requests", "tokens"):
            count: float | None = getattr(self, name)
            if count is not None and not _SLOWEST <= count / self.per < math.inf:
                raise ConfigError(
                    f"RateLimit: {name}: expected at least {_SLOWEST:g} a second, got {count:g} in {self.per:g} s"
                )
        limits: list[Limit] = []
        first_output = FIRST_OUTPUT
        if self.requests is not None:
            rate = self.requests / self.per
            limits.append(Limit("requests", rate, max(1.0, rate) if self.burst is None else self.burst, 1.0))
        if self.tokens is not None:
            rate = self.tokens / self.per
            own_burst = None if self.requests is not None else self.burst
            limits.append(Limit("tokens", rate, rate if own_burst is None else own_burst, 0.0))
            first_output = min(first_output, self.tokens / 10)
        made = {
            "_shared": Blocks(self.store, self.on_store_error, "RateLimit", self.block, self.max_wait),
            "_estimates": Estimates(self.estimate, "RateLimit", first_output),
            "_limits": tuple(limits),
            "_own_burst": self.burst is not None and self.requests is None,
        }
        for name, value in made.items():
            object.__setattr__(self, name, value)

    def _check_without_numbers(self) -> None:
        needless = {
            "burst": (self.burst is not None, "what may go at once follows from the rate that is found"),
            "per": (self.per != 60.0, "it is the time that the numbers are for"),
            "learn=False": (not self.learn, "a rate without numbers can only be learned"),
        }
        for name, (is_given, why) in needless.items():
            if is_given:
                raise ConfigError(
                    f"RateLimit: expected requests=… or tokens=… beside {name}, got neither; leave {name} out ({why}), or write "
                    "RateLimit(requests=600)"
                )
        to_store(self.store, ("load", "save"))  # for what is found

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        call, shared = request.call, self._shared
        info = call.info_of(None) if request.target is None else (yield from provider_of(request))
        use = _Use(request, info, name_of(info, request, self.by))
        if self._limits:
            limits = self._limits
        else:
            now = call.clock()
            use.rate = self._rates.get(use.key)
            if use.rate is None or now >= use.rate.read_at:
                use.rate = yield from self._find_rate(use, now)
            limits = use.rate.limits(now)
        if limits[-1][0] == "tokens":
            limits = self._with_tokens(use, limits)
        ending = None if shared.local else Later(call, shared, partial(self._settle, use))
        try:
            if ending is None:
                turn = shared.store.reserve(use.key, use.who, limits, call.clock())
            else:
                turn = yield from shared.ask(call, "reserve", use.key, use.who, limits)
            if turn is not None:
                yield from self._wait(use, turn)
            use.reserved = True
            if use.rate is not None:
                use.sending = use.rate.pace.sending(call.clock())
                if call.notes:
                    use.waited = call.notes.get(WAITED, 0.0)
            use.response = response = yield from call_next(request)
        except BaseException as error:
            use.error = error
            if ending is None:
                self._settle_now(use)
            elif isinstance(error, Exception):
                yield from ending.run()
            raise
        if ending is not None:
            yield from ending.run()
        elif use.estimate is not None or response.rate_limits or (use.rate is not None and use.rate.pace.is_watching):
            self._settle_now(use)
        return response

    def rate_now(self) -> float | None:
        """Return the requests a second that are allowed now: the lowest, if several providers or models have rates of their own.

        None: there is no limit of requests, or none was met yet: no call was refused, and no headers told one.
        """
        if self._limits:
            return None if self.requests is None else self.requests / self.per
        rates = [rate.requests for rate in self._rates.copy().values()]
        return min([rate for rate in rates if rate is not None], default=None)

    def _find_rate(self, use: _Use, now: float) -> Flow[AdaptiveRate]:
        """Return what was found under the key of a call, here or, asked at most once a second, by others with the same store."""
        call, rate = use.request.call, self._rates.get(use.key)
        if rate is None or now - rate.read_at > FORGOTTEN:
            if len(self._rates) >= _MOST_RATES:
                self._rates.pop(next(iter(self._rates), use.key), None)
            rate = self._rates[use.key] = AdaptiveRate(now)
        if now >= rate.read_at:
            rate.read_at = now + READ_EVERY
            key = _found_key(use)
            found: Entry | None = yield from self._shared.ask(call, "load", key)
            if found is not None:
                rate.take_over(found, now)
            if rate.is_new:
                yield from self._shared.ask(call, "save", key, rate.to_bytes(now), FORGOTTEN)
        return rate

    def _limits_of(self, use: _Use) -> tuple[Limit, ...]:
        """Return the limits that hold now, with what a call takes of them."""
        limits = self._limits if use.rate is None else use.rate.limits(use.request.call.clock())
        return self._with_tokens(use, limits) if limits[-1][0] == "tokens" else limits

    def _settle_now(self, use: _Use) -> None:
        """Settle a call with a store that does no I/O."""
        store, now = self._shared.store, use.request.call.clock()
        for method, *args in self._settle(use):
            getattr(store, method)(*args, now)

    def _with_tokens(self, use: _Use, limits: tuple[Limit, ...]) -> tuple[Limit, ...]:
        """Estimate the tokens of a call, and return the limits with what it takes of them.

        Raises:
            RateLimitWait: the user's estimate is above the user's `burst`, so that no wait would be long enough.
        """
        if use.estimate is None:
            use.estimate = self._estimates.of(use.request, use.name if self.by == "provider and model" else use.model)
        name, rate, burst, _ = limits[-1]
        cost = use.estimate.total
        if cost > burst:
            if self.burst is None or not self._own_burst or cost <= self.burst:
                burst = cost
            elif self.estimate is not None:
                raise self._refusal(use, f"its {cost:.0f} tokens are more than burst={self.burst:g}", None)
            else:
                burst = cost = self.burst  # a guess may be wrong, and is corrected afterwards
        use.tokens = make_limit(name, rate, burst, cost)
        return (*limits[:-1], use.tokens)

    def _wait(self, use: _Use, turn: Turn) -> Flow[None]:
        def refuse(turn: Turn, waited: float) -> RateLimitWait:
            wait = waited + turn.seconds
            bound = f"max_wait={self.max_wait:g}" if wait > self.max_wait else "past the deadline of the call"
            why = f"it would wait {wait:.3g} s ({bound}), with {turn.ahead} calls ahead"
            return self._refusal(use, why, turn.seconds)

        def ask() -> Flow[Turn | None]:
            turn = yield from self._shared.ask(use.request.call, "reserve", use.key, use.who, self._limits_of(use))
            return self._foreseen(use, turn)

        first = self._foreseen(use, turn) or turn
        waited = yield from wait_for_turn(use.request, ask, first, self.max_wait, refuse)
        log_decision(use.request, "RateLimit", f"let the call wait {waited:.3g} s ({self._numbers(use)})")

    def _foreseen(self, use: _Use, turn: Turn | None) -> Turn | None:
        """Return the turn of a call that waits, whose wait is shorter where the rate is rising."""
        if use.rate is None or turn is None:
            return turn
        use.rate.pace.waits(use.request.call.clock())
        return use.rate.pace.foresee(turn)

    def _refusal(self, use: _Use, why: str, wait: float | None) -> RateLimitWait:
        request, info = use.request, use.info
        log_decision(request, "RateLimit", f"refuses the call: {why} ({self._numbers(use)})")
        return RateLimitWait(
            f"RateLimit ({self._numbers(use)}) refuses a call of {whom(request)}: {why}; send fewer calls, or "
            "ask another provider",
            retry_after=wait,
            provider=info.framework,
            model=request.model,
        )

    def _numbers(self, use: _Use) -> str:
        if use.rate is not None:
            return use.rate.shown()
        given = {"requests": self.requests, "tokens": self.tokens, "per": self.per}
        return ", ".join([f"{name}={value:g}" for name, value in given.items() if value is not None])

    def _settle(self, use: _Use) -> list[tuple[Any, ...]]:
        """Return what the store has to do when a call ends, as calls of its methods."""
        if not use.reserved:
            return [("release", use.key, use.who)]
        calls: list[tuple[Any, ...]] = []
        call, estimate, error = use.request.call, use.estimate, use.error
        sent = call.attempts > use.attempts
        if estimate is not None and use.tokens is not None:
            taken = 0.0
            if sent:
                taken = estimate.taken(call.usage, error, "" if error is None else use.output())
                if error is None and call.usage is not None:
                    estimate.learn(call.usage)
            name, rate, burst, cost = use.tokens
            more = taken - cost
            if more > 0 or (more < 0 and self.give_back):
                calls.append(("correct", use.key, make_limit(name, rate, burst, more)))
        if sent and self.learn:
            cause = None if error is None else root_cause(error)
            refusal = cause if isinstance(cause, ProviderError) and not isinstance(cause, REFUSALS) else None
            answer = use.response or refusal
            if answer is not None and answer.rate_limits:
                calls += self._learned(use, answer.rate_limits)
            if refusal is not None:
                self._note_refusal(use, refusal)
                calls += self._stopped(use, refusal.retry_after)
            elif error is None and use.rate is not None and use.sending is not None and use.rate.pace.is_watching:
                self._note_latency(use, use.rate, use.sending)
        use.error = None  # its frames refer to the call
        return calls

    def _note_latency(self, use: _Use, rate: AdaptiveRate, sending: Sending) -> None:
        call, now = use.request.call, use.request.call.clock()
        if call.attempts == use.attempts + 1:
            first = call.first_chunk_at if call.streaming else None
            is_stream = first is not None and first >= sending.at
            end = first if is_stream and first is not None else now
            # The wait in a Concurrency further in is no latency of the service.
            waited = call.notes.get(WAITED, 0.0) - use.waited
            rate.answered(sending, max(0.0, end - sending.at - waited), now, streaming=is_stream)

    def _note_refusal(self, use: _Use, refusal: ProviderError) -> None:
        """Cut the rate at a refusal that waiting helps against."""
        rate, sending = use.rate, use.sending
        if (
            rate is None
            or sending is None
            or not isinstance(refusal, RateLimitError)
            or isinstance(refusal, QuotaExceeded)
        ):
            return
        if rate.refused(sending, use.request.call.clock()):
            log_decision(use.request, "RateLimit", f"slows down after a refusal ({rate.shown()})")

    def _learned(self, use: _Use, headers: Mapping[str, str]) -> Iterator[tuple[Any, ...]]:
        """Note the headers of an answer, and yield what the store has to do because of them."""
        if use.rate is not None:
            use.rate.hear(told_limits(headers), use.request.call.clock())
            return
        key, told = use.key, {each.name: each for each in told_limits(headers)}
        for limit in self._limits:
            now, place = told.get(limit.name), (key, limit.name)
            # A lowered rate rises again, but never above the numbers that the user gave.
            if now is not None and (now.rate < limit.rate or place in self._lowered):
                yield ("throttle", key, limit.name, now.rate, now.seconds)
                if now.rate >= limit.rate:
                    self._lowered.pop(place, None)
                elif len(self._lowered) < _MOST_LOWERED:
                    self._lowered[place] = None

    def _stopped(self, use: _Use, wait: float | None) -> Iterator[tuple[Any, ...]]:
        """Yield what the store has to do because a service has refused a call, and asks for a wait."""
        if wait is not None and 0 < wait <= _LONGEST_STOP:
            yield ("throttle", use.key, "requests", 0.0, wait)
            what = f"stops all calls that share a limit with {whom(use.request)} for {wait:.3g} s, as the service asked"
            log_decision(use.request, "RateLimit", what)
