"""Middleware that bounds the calls at once."""

from __future__ import annotations

from typing import Any, Literal

import attrs

from fluxibly._checks import number, one_of, problem, validator, whole
from fluxibly._logs import log_decision
from fluxibly._tokens import BYTES_A_TOKEN, bytes_of
from fluxibly.errors import (
    DeadlineExceeded,
    Overloaded,
    QueueFull,
    QuotaExceeded,
    RateLimitError,
    RequestTimeout,
    root_cause,
)
from fluxibly.flow import CallNext, Flow, provider_of
from fluxibly.middleware._adaptive_limit import READ_EVERY, REMEMBERED, TOKENS_OF_START, AdaptiveLimit, Begun
from fluxibly.middleware._copies import Rebuilt
from fluxibly.middleware._keys import By, check_by, name_of, to_by, whom
from fluxibly.middleware._shared import (
    ON_STORE_ERROR,
    Later,
    OnStoreError,
    Shared,
    new_name,
    wait_for_turn,
)
from fluxibly.stores import Entry, Store, Turn, to_store
from fluxibly.types import CallRecord, ProviderInfo, Request, Response

_MOST_LIMITS = 10_000
"""The most keys of which the limit that was found is remembered."""


def _to_store(value: Any) -> Any:
    return to_store(value, ("lease", "release"))


def _limit(name: str, value: object) -> str | None:
    """Check a limit."""
    if isinstance(value, str):
        return None if value == "auto" else problem(name, "a whole number from 1 up, or 'auto'", value)
    return whole(name, value, 1)


class _Place:
    """The place of one call, and what is needed to judge the limit at its end."""

    limit: AdaptiveLimit | None = None
    begun: Begun | None = None

    def __init__(self, request: Request, info: ProviderInfo, name: str) -> None:
        self.request = request
        self.info = info
        self.key = f"concurrency {name}"
        self.who = new_name()
        self.attempts = request.call.attempts
        """The attempts of the call before this one."""


@attrs.frozen(eq=False)
class Concurrency(Rebuilt):
    """Middleware that lets at most `limit` calls run at once. The others wait, first come, first served.

    A call has its place until its answer is whole, or until its stream has ended, however it ends. A call that is cancelled
    or given up while it waits leaves the queue.

    With "auto" it finds the limit by latency, as far as calls wait for places: it is doubled from 20 until calls take 1.25 times what
    they take on a service at rest, and then kept where they take about 1.5 times that; never below 1. Latency is the time to the first
    chunk, or of a whole answer for each output token. A call counts if it was answered by one attempt. A 429 is about a rate, so the
    limit then stays as it is for 10 seconds; put a `RateLimit` outside. `Overloaded` and `RequestTimeout` lower it. The algorithm is
    Gradient2 of Netflix's concurrency-limits. What was found is in the store, so those who share places share their number.

    Args:
        limit: the most calls at once, from 1 up, or "auto".
        queue: the most calls that wait; one more is refused. 0 refuses whatever cannot run at once.
        max_wait: the most seconds to wait.
        by: what has a limit of its own: "provider", "provider and model" (the default), or what a function of the request
            returns.
        store: where the places are: "memory" (the default: each instance has its own), "sqlite:PATH" (a file that the
            processes of a machine share), "redis://HOST" (a server that processes and machines share), or a
            `fluxibly.stores.Store`.
        on_store_error: what happens when the store fails: "local" keeps the limit in this process until it works again,
            "raise" raises `StoreError`, "open" lets calls pass.

    Raises:
        QueueFull: too many calls wait, or this one has waited for `max_wait` seconds.
    """

    limit: int | Literal["auto"] = attrs.field(validator=validator(_limit))
    queue: int = attrs.field(default=1000, validator=validator(whole, 0), kw_only=True)
    max_wait: float = attrs.field(default=60.0, validator=validator(number, 0), kw_only=True)
    by: By = attrs.field(default="provider and model", converter=to_by, validator=validator(check_by), kw_only=True)
    store: Store = attrs.field(default=None, converter=_to_store, kw_only=True)
    on_store_error: OnStoreError = attrs.field(
        default="local", validator=validator(one_of, ON_STORE_ERROR), kw_only=True
    )
    _shared: Shared = attrs.field(init=False, repr=False)
    _limits: dict[str, AdaptiveLimit] = attrs.field(init=False, repr=False, factory=dict[str, AdaptiveLimit])
    """What was found, by key."""

    def __attrs_post_init__(self) -> None:
        if self.limit == "auto":
            to_store(self.store, ("load", "save"))
        object.__setattr__(self, "_shared", Shared(self.store, self.on_store_error, "Concurrency"))

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        call, shared = request.call, self._shared
        info = call.info_of(None) if request.target is None else (yield from provider_of(request))
        place = _Place(request, info, name_of(info, request, self.by))
        if self.limit == "auto":
            place.limit = yield from self._find_limit(call, place.key)
        if shared.local:
            try:
                turn = shared.store.lease(place.key, place.who, self._size(place), call.clock())
                if turn is not None:
                    yield from self._wait(place, turn)
                if place.limit is None:
                    return (yield from call_next(request))
                return (yield from self._measured(place, place.limit, call_next))
            finally:
                shared.store.release(place.key, place.who, call.clock())
        ending = Later(call, shared, lambda: [("release", place.key, place.who)])
        try:
            turn = yield from shared.ask(call, "lease", place.key, place.who, self._size(place))
            if turn is not None:
                yield from self._wait(place, turn)
            if place.limit is None:
                response = yield from call_next(request)
            else:
                response = yield from self._measured(place, place.limit, call_next)
        except Exception:
            yield from ending.run()
            raise
        yield from ending.run()
        return response

    def places_now(self) -> int | None:
        """Return the number of calls at once that is allowed now: the lowest, if several have limits of their own.

        None: it is not found yet.
        """
        if self.limit != "auto":
            return self.limit
        return min([limit.size for limit in self._limits.copy().values() if limit.is_found], default=None)

    def _find_limit(self, call: CallRecord, key: str) -> Flow[AdaptiveLimit]:
        """Return what was found under a key, here or, asked at most once a second, by others with the same store."""
        now, limit = call.clock(), self._limits.get(key)
        if limit is None or now - limit.used_at > REMEMBERED:
            if len(self._limits) >= _MOST_LIMITS:
                self._limits.pop(next(iter(self._limits), key), None)
            limit = self._limits[key] = AdaptiveLimit(now)
        if now >= limit.read_at:
            limit.read_at = now + READ_EVERY
            found: Entry | None = yield from self._shared.ask(call, "load", f"{key} found")
            if found is not None:
                limit.take_over(found)
            if limit.is_new:
                yield from self._shared.ask(call, "save", f"{key} found", limit.to_bytes(), REMEMBERED)
        return limit

    def _size(self, place: _Place) -> int:
        """Return the number of places that there are now."""
        if place.limit is not None:
            return place.limit.size
        return 1 if self.limit == "auto" else self.limit

    def _measured(self, place: _Place, limit: AdaptiveLimit, call_next: CallNext) -> Flow[Response]:
        """Send a request, and adapt the limit to its outcome."""
        call = place.request.call
        begun = limit.begun(call.clock())
        is_changed, latency, kind = False, None, ""
        try:
            response = yield from call_next(place.request)
            if call.attempts == place.attempts + 1:
                kind, latency = _latency_of(call, response, begun.at)
            return response
        except Exception as error:
            cause = root_cause(error)
            if isinstance(cause, RateLimitError) and not isinstance(cause, QuotaExceeded):
                limit.refused(call.clock())
            elif isinstance(cause, (Overloaded, RequestTimeout)) and not isinstance(cause, DeadlineExceeded):
                is_changed = limit.overloaded(begun)
            raise
        finally:
            if limit.ended(begun, kind, latency, call.clock()) or is_changed:
                log_decision(place.request, "Concurrency", f"allows {limit.size} calls at once from now on")

    def _wait(self, place: _Place, turn: Turn) -> Flow[None]:
        request = place.request
        if place.limit is not None:
            place.limit.waits()
        if turn.ahead >= self.queue:
            raise self._full(place, f"{turn.ahead} calls wait already (queue={self.queue})")

        def ask() -> Flow[Turn | None]:
            if place.limit is not None:
                place.limit.waits()
            turn: Turn | None = yield from self._shared.ask(
                request.call, "lease", place.key, place.who, self._size(place)
            )
            return turn

        waited = yield from wait_for_turn(
            request,
            ask,
            turn,
            self.max_wait,
            lambda turn, waited: self._full(
                place, f"waited {waited:.3g} s (max_wait={self.max_wait:g}), with {turn.ahead} calls ahead"
            ),
        )
        log_decision(request, "Concurrency", f"let the call wait {waited:.3g} s for one of {self._size(place)} places")

    def _full(self, place: _Place, why: str) -> QueueFull:
        request = place.request
        advice = (
            f"raise limit={self.limit}" if place.limit is None else f"wait (limit='auto' is {place.limit.size} now)"
        )
        what = f"Concurrency refuses a call of {whom(request)}: {why}; {advice}, or send less"
        log_decision(request, "Concurrency", f"refuses the call: {why}")
        return QueueFull(what, provider=place.info.framework, model=request.model)


def _latency_of(call: CallRecord, response: Response, began: float) -> tuple[str, float]:
    """Return a word for what was measured, and the latency: to the first chunk, or of a whole answer for each token."""
    if call.streaming and call.first_chunk_at is not None and call.first_chunk_at >= began:
        return "stream", call.first_chunk_at - began
    tokens: float | None = None if response.usage is None else response.usage.output_tokens
    if tokens is None:
        tokens = bytes_of(response.text) / BYTES_A_TOKEN
    return "whole", (call.clock() - began) / (tokens + TOKENS_OF_START)
