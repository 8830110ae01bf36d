"""Middleware that spreads calls over several models or providers."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Container, Sequence
from functools import partial
from hashlib import blake2b
from typing import Any, Literal, TypeAlias

import attrs

from fluxibly import provider as providers
from fluxibly._checks import number, one_of, problem, validator
from fluxibly._threads import renew_lock_after_fork
from fluxibly.errors import (
    ContextLengthExceeded,
    FluxiblyError,
    StreamInterrupted,
    error_type,
    root_cause,
)
from fluxibly.flow import CallNext, Flow, provider_of
from fluxibly.functions import check_function, to_function
from fluxibly.middleware._copies import Rebuilt
from fluxibly.middleware._going_on import LISTED, Trail, goes_on_after
from fluxibly.middleware._keys import text_of, whom
from fluxibly.middleware._outputs import FirstOutput, asked_at
from fluxibly.target import Target, to_targets
from fluxibly.types import CallRecord, Request, Response

Policy: TypeAlias = Literal["round_robin", "random", "least_busy", "fastest"]
POLICIES = ("round_robin", "random", "least_busy", "fastest")
EXPLORE = 20
"""Of so many calls, "fastest" sends one to the target that was asked the longest time ago."""
LONGEST = 86_400.0
"""The most seconds for which a target rests because its service asks for it. More is a mistake of the service."""
NEWEST = 0.3
"""The share of the newest time in a learned time."""


def _to_weights(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def _weights_problem(name: str, weights: Any) -> str | None:
    if not isinstance(weights, tuple):
        return problem(name, "a list of numbers, one for each target", weights)
    found = [number(f"{name}[{n}]", weight, above=0) for n, weight in enumerate(weights)]  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    return next((each for each in found if each is not None), None)


Key: TypeAlias = Callable[[Request], object]


def _to_key(value: Key | str | None) -> Key | None:
    return to_function(value)


@attrs.frozen(eq=False)
class Balance(Rebuilt):
    """Middleware that spreads calls over several models or providers.

    The pipeline's own provider is not among them unless it is listed (the name of a model is that model of the pipeline's
    provider). A request that has a target already, from a `Fallback` outside for example, goes to that target.

    A target that fails rests: calls ask the others for `cool_down` seconds, or as long as the service said (`Retry-After`),
    if that is a day at most. If all rest, calls ask the target whose rest ends first. A target rests after the errors after
    which `Fallback` goes on, except `ContextLengthExceeded`, which says nothing about the target.

    A call that has failed like this before output goes on with the next best target, and asks each at most once. If all fail,
    the last error is raised, and its notes (`__notes__`) list every failure. A target whose provider cannot be made,
    because a key is missing for example, is skipped, and rests.

    All calls through one instance share what is known of the targets, in whatever threads, tasks and pipelines.

    Args:
        to: the targets: `Target`s, and everything that `Target(to=…)` takes.
        policy: which target is asked. "round_robin": one after the other, those of higher weight more often. "random":
            at random, by weight. "least_busy": the target with the fewest calls under way for its weight, in turn among
            equals; a stream counts until it has ended. "fastest": the target with the shortest time for its weight, to
            the first output of a stream or the end of a whole answer, as learned from the calls so far and those under
            way. One call in 20 asks the target that was not asked for the longest time, which may have become faster.
        weights: a positive number for each target, in the order of `to`; by default all are equal.
        cool_down: in seconds; 0 or more.
        by: a function of the request that returns a key, such as the user or the conversation. Calls with the same key
            ask the same target while it does not rest, in every process, so that its prompt cache stays warm; `policy`
            applies where it returns None. If you add or remove a target, only the keys move that it gets or had. In
            YAML, its registered name.

    Raises:
        ConfigError: a target is wrong, or there is none.
        ValueError: another setting is wrong.
    """

    to: tuple[Target, ...] = attrs.field(converter=to_targets, validator=LISTED)
    policy: Policy = attrs.field(default="least_busy", kw_only=True, validator=validator(one_of, POLICIES))
    weights: Sequence[float] | None = attrs.field(
        default=None,
        kw_only=True,
        converter=_to_weights,
        validator=attrs.validators.optional(validator(_weights_problem)),
    )
    cool_down: float = attrs.field(default=30.0, kw_only=True, validator=validator(number, 0, unit="seconds"))
    by: Key | None = attrs.field(
        default=None,
        kw_only=True,
        converter=_to_key,
        validator=attrs.validators.optional(validator(check_function)),
    )
    _load: _Load = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.weights is not None and len(self.weights) != len(self.to):
            raise ValueError(
                f"Balance: weights: expected as many numbers as targets ({len(self.to)}), got {len(self.weights)}"
            )
        object.__setattr__(self, "_load", _Load(self.to, self.weights, self.policy))

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets, which an `LLM` checks when it is made."""
        return self.to

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        if request.target is not None:
            return (yield from call_next(request))
        call, clock, load = request.call, request.call.clock, self._load
        found = None if self.by is None else self.by(request)
        key = None if found is None else text_of(found)
        trail: Trail | None = None
        tried: set[int] = set()
        while True:
            asked = request
            turn = load.begin(clock(), tried, streaming=call.streaming, key=key)
            made = False
            watch: FirstOutput | None = None
            try:
                tried.add(turn.place)
                asked = request.evolve(target=self.to[turn.place])
                if turn.rests or trail is not None:
                    (trail or Trail("Balance", request)).decided(
                        f"asks {whom(asked)}" + (", though it rests, because all do" if turn.rests else "")
                    )
                if not call.targets.is_made(asked.target):
                    yield from provider_of(asked)
                made = True
                if call.streaming:
                    watch = FirstOutput(partial(self._answered, turn, call))
                    response = yield from watch.over(call_next(asked))
                else:
                    response = yield from call_next(asked)
                load.succeeded(turn, clock())
                return response
            except Exception as error:
                trail = trail or Trail("Balance", request)
                interrupted = isinstance(error, StreamInterrupted)
                if watch is not None and watch.done and not interrupted:  # an inner layer has failed, after output
                    trail.tell(error)
                    raise
                failed = self._note(error, turn, asked, trail, made=made)
                if not failed or interrupted or len(tried) == len(self.to):
                    trail.tell(error)
                    raise
                trail.check_deadline(asked)
            finally:
                load.end(turn)

    def _answered(self, turn: _Turn, call: CallRecord) -> None:
        """Learn from the first output of a stream."""
        self._load.answered(turn, call.clock(), asked_at(call, turn.begun))

    def _note(self, error: Exception, turn: _Turn, asked: Request, trail: Trail, *, made: bool) -> bool:
        """Note an error, and let the target rest if it is at fault. Return whether another target may answer.

        Args:
            made: whether the target's provider exists.
        """
        cause = root_cause(error)
        failed = goes_on_after(cause) if made else isinstance(error, FluxiblyError)
        if failed and not isinstance(cause, ContextLengthExceeded):
            rest = self._rest_after(cause)
            self._load.rest(turn, asked.call.clock(), rest)
            trail.decided(f"lets {whom(asked)} rest for {rest:.3g} s after {error_type(error)}", error)
        trail.failed(asked, error) if made else trail.skipped(asked, error)
        return failed

    def _rest_after(self, cause: BaseException) -> float:
        """Return for how many seconds a target rests after an error: what the service has asked for, or `cool_down`."""
        wait: object = getattr(cause, "retry_after", None)
        return wait if isinstance(wait, (int, float)) and 0 <= wait <= LONGEST else self.cool_down


class _Place:
    """The facts that are known of one target."""

    __slots__ = ("busy", "credit", "index", "last", "learned", "name", "rested_at", "rests_until", "waiting", "weight")

    def __init__(self, index: int, name: str, weight: float) -> None:
        self.index = index
        self.name = name
        self.weight = weight
        self.busy = 0
        """The calls under way."""
        self.credit = 0.0
        """By how much it is behind its share of the turns."""
        self.rested_at = self.rests_until = -math.inf
        self.last = 0
        """The number of the call that asked it last."""
        self.learned: list[float | None] = [None, None]
        """The time that an answer takes: whole, and to the first output of a stream."""
        self.waiting: tuple[dict[_Turn, float], dict[_Turn, float]] = ({}, {})
        """The calls that wait for it, and when they began, for both kinds of calls. The oldest is first."""

    def seconds(self, now: float, *, streaming: bool) -> float:
        """Return how long an answer takes, for its weight; 0 if nothing is known."""
        waiting = self.waiting[streaming]
        oldest = now - next(iter(waiting.values())) if waiting else 0.0
        return max(self.learned[streaming] or 0.0, oldest) / self.weight

    def score(self, key: str) -> float:
        """Return how well a key suits it. Of all targets with equal weights, each has the highest score equally often."""
        digest = blake2b(f"{self.name}\0{key}".encode(errors="surrogatepass"), digest_size=8).digest()
        share = ((int.from_bytes(digest) >> 12) + 0.5) / 2.0**52  # exact, and never 0 or 1
        return -self.weight / math.log(share)


class _Turn:
    """One attempt at a target."""

    __slots__ = ("begun", "place", "rests", "streaming")

    def __init__(self, place: int, begun: float, *, streaming: bool, rests: bool) -> None:
        self.place = place
        self.begun = begun
        self.streaming = streaming
        self.rests = rests
        """Whether the target is asked although it rests."""


class _Load:
    """The facts that all calls share: which targets are busy, rest, or are fast."""

    def __init__(self, targets: Sequence[Target], weights: Sequence[float] | None, policy: Policy) -> None:
        self.renew_lock()
        renew_lock_after_fork(self)
        self._policy = policy
        self._calls = 0
        self._rests_until = -math.inf
        """The end of the longest rest."""
        given = weights or [1.0] * len(targets)
        # As shares of the largest, so that neither sums nor quotients overflow.
        shares = [max(weight / max(given), 1e-9) for weight in given]
        names = _names(targets)
        self.places = [_Place(n, name, share) for n, (name, share) in enumerate(zip(names, shares, strict=True))]

    def renew_lock(self) -> None:
        """Make a new lock."""
        self._lock = threading.Lock()

    def begin(self, now: float, tried: Container[int], *, streaming: bool, key: str | None = None) -> _Turn:
        """Choose a target that was not tried, and count a call that asks it."""
        with self._lock:
            self._calls += 1
            awake: Sequence[_Place] = self.places
            if tried or now < self._rests_until:
                left = [place for place in self.places if place.index not in tried]
                awake = [place for place in left if place.rests_until <= now]
                if not awake:
                    return self._begun(min(left, key=lambda place: place.rests_until), now, streaming, rests=True)
            if key is not None:
                place = max(awake, key=lambda place: place.score(key))
            else:
                place = self._best(awake, now, streaming=streaming)
            return self._begun(place, now, streaming)

    def _begun(self, place: _Place, now: float, streaming: bool, *, rests: bool = False) -> _Turn:
        turn = _Turn(place.index, now, streaming=streaming, rests=rests)
        place.last = self._calls
        place.busy += 1
        if self._policy == "fastest":
            place.waiting[streaming][turn] = now
        return turn

    def _best(self, places: Sequence[_Place], now: float, *, streaming: bool) -> _Place:
        if self._policy == "random":
            return random.choices(places, [place.weight for place in places])[0]  # noqa: S311  # no secret
        if self._policy == "round_robin":
            return _in_turn(places)
        if self._policy == "least_busy":
            return _in_turn(_least(places, [place.busy / place.weight for place in places]))
        if self._calls % EXPLORE == 0:
            return min(places, key=lambda place: place.last)
        return _in_turn(_least(places, [place.seconds(now, streaming=streaming) for place in places]))

    def answered(self, turn: _Turn, now: float, asked: float) -> None:
        """Learn from the first output of a stream, or the end of a whole answer, to a request that was sent at `asked`."""
        if self._policy != "fastest":
            return
        with self._lock:
            place = self.places[turn.place]
            if place.waiting[turn.streaming].pop(turn, None) is not None:
                seconds, before = now - asked, place.learned[turn.streaming]
                learned = seconds if before is None else before + NEWEST * (seconds - before)
                place.learned[turn.streaming] = learned

    def succeeded(self, turn: _Turn, now: float) -> None:
        """Note an answer, after which a target that was asked while it rested rests no longer."""
        self.answered(turn, now, turn.begun)
        if turn.rests:
            with self._lock:
                place = self.places[turn.place]
                if place.rested_at <= turn.begun:
                    place.rests_until = -math.inf

    def rest(self, turn: _Turn, now: float, seconds: float) -> None:
        """Let a target rest."""
        with self._lock:
            place = self.places[turn.place]
            place.rested_at = now
            place.rests_until = max(place.rests_until, now + seconds)
            self._rests_until = max(self._rests_until, place.rests_until)

    def end(self, turn: _Turn) -> None:
        """Count a call that asks a target no longer, however it has ended."""
        with self._lock:
            place = self.places[turn.place]
            place.busy -= 1
            place.waiting[turn.streaming].pop(turn, None)


def _least(places: Sequence[_Place], values: Sequence[float]) -> list[_Place]:
    """Return the places with the least of the values."""
    least = min(values)
    return [place for place, value in zip(places, values, strict=True) if value == least]


def _in_turn(places: Sequence[_Place]) -> _Place:
    """Return the place whose turn it is, so that at any time each has had its share of the turns, by less than one turn.

    This is Tijdeman's algorithm for "the chairman assignment problem": of those that are behind by enough, the one whose
    next turn is due first.
    """
    if len(places) == 1:
        return places[0]
    total = 0.0
    for place in places:
        place.credit += place.weight
        total += place.weight
    enough = total / (2 * len(places) - 2)
    least = enough * (1 - 1e-9)  # because sums of floats are not exact
    chosen, soonest = places[0], math.inf
    for place in places:
        if place.credit >= least and (due := (total - enough - place.credit) / place.weight) < soonest:
            chosen, soonest = place, due
    chosen.credit -= total
    return chosen


def _names(targets: Sequence[Target]) -> list[str]:
    """Return a name for each target that is the same in each process, whatever other targets there are.

    Targets that are alike are numbered.
    """
    seen: dict[str, int] = {}
    names: list[str] = []
    for target in targets:
        name = _name(target)
        seen[name] = count = seen.get(name, 0) + 1
        names.append(name if count == 1 else f"{name}#{count}")
    return names


def _name(target: Target) -> str:
    if isinstance(target.to, str):
        return target.to
    config = target.config
    if config is not None:
        return f"{config.framework}:{config.model}@{config.api_base or ''}"
    info = providers.info_of(target.provider, None)
    return f"{info.framework}:{info.name}:{target.parameters.get('model', '')}@{info.server_address}:{info.server_port}"
