"""The rate that a service allows, found by its answers. Pure state: every time is an argument.

`Pace` raises and cuts one number. It begins with a slow start, as TCP does: the rate is doubled every second until a call is
refused, or until latency doubles (HyStart, RFC 9406). A refusal cuts it, and it comes back along a cubic curve, slowly near
where it was cut (CUBIC, RFC 9438). Only time in which calls wait for the rate raises it (RFC 7661).

`AdaptiveRate` is what is known under one key: the rates in the service's headers, or else the one that was found.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from threading import RLock
from typing import Any, NamedTuple, cast

from fluxibly._checks import is_mapping, is_number, number
from fluxibly._threads import renew_lock_after_fork
from fluxibly.middleware._rate_headers import Told
from fluxibly.stores import Entry, Limit, Turn
from fluxibly.stores.protocol import make_limit

FIRST = 10.0
"""The requests a second before anything is known."""
LOWEST = 1 / 30
"""The fewest requests a second. With fewer, a call would wait too long to find out that it could be more."""
HIGHEST = 1e6
_MOST_TOLD = 1e12
_LOWEST_SHARE = 0.1
"""The least share of the rates in a service's headers. Others take the rest."""
_OF_GOOD = 1 / 100
"""The least share of the last good rate while a service refuses everything, which may soon be over."""
_CUT = 0.85
"""What a refusal leaves of the rate."""
_HALF = 0.5
"""What a refusal leaves of a rate that was being doubled: the limit lies between."""
_CURVE = (1 - _CUT) / 6**3
"""CUBIC's C: six ticks after a cut to 0.85, the rate is what it was before."""
_CALLS_A_TICK = 3.0
"""A tick is a second, or the time of so many calls if that is longer: else most calls of a slow service would be refused."""
_PRIOR = 3
"""The share that is refused begins as the usual one, with the weight of so many calls."""
_NEARLY_NONE = 0.3
"""A service that takes a smaller share of the calls may be refusing everything, whatever the rate."""
_DOUBT = 0.9
"""What each further refusal leaves of the rate that was good before."""
_EPOCH = 1.0
"""The seconds after a cut in which there is no other."""
_SHORTEST_EPOCH = 0.25
"""The same, once the outcomes of `_ENOUGH` calls are known."""
_ENOUGH = 50
_FEWEST, _MOST = 20, 1000
"""The numbers of latencies of which a median is taken."""
_FRESH = 60.0
"""The seconds for which rates from headers hold, unless newer ones come."""
FORGOTTEN = 600.0
"""A rate that was not used for so many seconds is found anew."""
READ_EVERY = 1.0
"""The seconds after which the store is asked again what others have found."""


class Sending(NamedTuple):
    """When and at which rate a call was sent, to judge its outcome by."""

    pace: Pace
    epoch: int
    number: int
    """Its number in the epoch, from 1 up."""
    rate: float
    at: float


_new: Any = cast("Any", tuple).__new__  # a third of the time that the class takes


class Pace:
    """A rate that rises while calls go well, and is cut when the service refuses one.

    Args:
        now: the time.
        rate: the rate to begin with.
        most, least: its bounds.
        goal: it is doubled until then, and follows the curve from there.
        unit: the calls a second at a rate of 1.
    """

    def __init__(
        self,
        now: float,
        rate: float = FIRST,
        *,
        most: float = HIGHEST,
        least: float = LOWEST,
        goal: float = math.inf,
        unit: float = 1.0,
    ) -> None:
        self.rate = rate
        self.most = most
        self.least = least
        self.goal = goal
        self.unit = unit
        self.top = self.low = rate
        """The rate before the last cut, and after it."""
        self.good = 0.0 if goal == math.inf else rate
        """The last rate of which a service refused only few calls."""
        self.age = 0.0
        """The ticks since the last cut in which calls waited for the rate."""
        self.epoch = 0
        """The number of cuts. A refusal causes another only if the call was sent since the last one."""
        self._begin(now)
        self._waited_at = -math.inf
        self._latencies: dict[bool, list[float]] = {}
        self._least_latency: dict[bool, float] = {}
        self._compared_at = now

    def _begin(self, now: float) -> None:
        """Begin an epoch."""
        self._began_at = self._stepped_at = now
        self._sent = self._known = self._refused = 0

    @property
    def is_doubling(self) -> bool:
        return self.rate < self.goal

    @property
    def tick(self) -> float:
        calls = 1.0 if self.is_doubling else _CALLS_A_TICK
        return max(1.0, calls / (self.rate * self.unit))

    def sending(self, now: float) -> Sending:
        """Note that a call is sent."""
        self._sent += 1
        sending: Sending = _new(Sending, (self, self.epoch, self._sent, self.rate, now))
        return sending

    def waits(self, now: float) -> None:
        """Note that a call waits for the rate."""
        self._waited_at = now

    @property
    def due_at(self) -> float:
        """The time of the next step."""
        return self._stepped_at + (self.tick if self.is_doubling else self.tick / 4)

    def step(self, now: float) -> None:
        """Raise the rate, if it is time and calls have waited for it."""
        if now < self.due_at:
            return
        passed, tick = now - self._stepped_at, self.tick
        is_used = self._waited_at >= self._stepped_at
        self._stepped_at = now
        if not is_used:
            return
        if self.is_doubling:
            self.rate = self.low = self.top = self._bounded(min(2 * self.rate, self.goal))
        else:
            self.age += min(passed / tick, 1.0)
            back = ((1 - self.low / self.top) / _CURVE) ** (1 / 3)
            self.rate = self._bounded(self.top * (1 + _CURVE * (self.age - back) ** 3))

    def _bounded(self, rate: float) -> float:
        return min(max(rate, self.least), self.most)

    def refused(self, sending: Sending, now: float) -> bool:
        """Note that a call was refused. Return whether that has cut the rate."""
        if sending.epoch != self.epoch:
            return False  # it was under way at the last cut, which was about the same
        self._refused += 1
        self._known = max(self._known, sending.number)
        if self.is_doubling:
            if self.goal < math.inf:
                self.good *= _DOUBT
                self.goal = self.good
            else:
                answered = self._sent - self._refused
                self.good = answered / max(1.0, now - self._began_at) if answered >= _ENOUGH else 0.0
                self.goal = 0.0
            self._cut(_HALF, now)
            return True
        passed = now - self._began_at
        if self.epoch and passed < _EPOCH and (passed < _SHORTEST_EPOCH or self._known < _ENOUGH):
            return False
        # Where more than a few are refused, the others show what the service takes.
        taken = (self._known - self._refused + _PRIOR * _CUT) / (self._known + _PRIOR) if self.epoch else _CUT
        if taken >= _CUT:
            self.good = self.rate
        if taken < _NEARLY_NONE and self.rate * taken < self.good / 4:
            self.goal = self.good  # perhaps it refuses everything for a while
        self._cut(min(_CUT, taken), now)
        return True

    def _cut(self, share: float, now: float) -> None:
        low = self.rate * share
        self.low = self._bounded(max(low, self.good * _OF_GOOD) if low < self.goal else low)
        self.top = self.rate if share >= _HALF else self.low / _CUT
        self.rate, self.age = self.low, 0.0
        self.epoch += 1
        self._begin(now)

    def answered(self, sending: Sending, seconds: float, now: float, *, streaming: bool) -> bool:
        """Note the latency of a call while the rate is doubled. Return whether that has ended it."""
        if not self.is_watching:
            return False
        latencies = self._latencies.setdefault(streaming, [])
        if len(latencies) < _MOST:
            latencies.append(seconds)
        if len(latencies) < _FEWEST or now < self._compared_at + 1.0:
            return False
        self._compared_at = now
        usual = sorted(latencies)[len(latencies) // 2]
        latencies.clear()
        known = self._least_latency.setdefault(streaming, usual)
        if usual < 2 * known:
            self._least_latency[streaming] = min(known, usual)
            return False
        self.rate, self.goal = min(self.rate, sending.rate), 0.0  # the rate has been doubled since it was sent
        self._cut(_HALF, now)
        return True

    @property
    def is_watching(self) -> bool:
        """Whether `answered` has a use for the latency of a call."""
        return self.goal == math.inf and self._waited_at > -math.inf

    def foresee(self, turn: Turn) -> Turn:
        """Return the turn of a call behind others, whose wait is shorter if the rate is doubled meanwhile."""
        if not self.is_doubling or not turn.ahead:
            return turn
        return turn._replace(seconds=math.log2(1 + turn.seconds * math.log(2)))

    def numbers(self) -> dict[str, float]:
        """Return what another process needs to go on from here."""
        return {**{name: getattr(self, name) for name in _NUMBERS}, "goal": min(self.goal, 2 * HIGHEST)}

    def take_over(self, numbers: Mapping[str, float], now: float) -> bool:
        """Go on from where another process is, if it knows more: of a later cut, or of a higher rate after the same one.

        Return whether it knows less.
        """
        if (numbers["epoch"], numbers["rate"]) <= (self.epoch, self.rate):
            return numbers["epoch"] < self.epoch
        if numbers["epoch"] > self.epoch:
            self._begin(now)
        self._stepped_at = now
        self.epoch, self.age = int(numbers["epoch"]), numbers["age"]
        self.rate, self.top, self.good = (self._bounded(numbers[name]) for name in ("rate", "top", "good"))
        self.low = min(self._bounded(numbers["low"]), self.top)
        self.goal = math.inf if numbers["goal"] > HIGHEST else numbers["goal"]
        return False


_NUMBERS = ("rate", "top", "low", "age", "good", "epoch")


class AdaptiveRate:
    """What is known of the limits under one key.

    Args:
        now: the time.
    """

    def __init__(self, now: float) -> None:
        self.renew_lock()
        renew_lock_after_fork(self)
        self.pace = Pace(now)
        self._told: dict[str, float] = {}
        """The rates from the service's headers, by the names of their limits; empty if it sends none."""
        self._told_at = -math.inf
        self._is_met = False
        """Whether a call was refused, here or elsewhere. Until then the rate is only how far it was tried."""
        self._limits: tuple[Limit, ...] = ()
        self._limits_until = -math.inf
        """When these limits are to be made anew."""
        self.read_at = now
        """When the store is to be asked what others have found."""
        self.is_new = False
        """Whether something was found since it was last saved in the store."""

    def renew_lock(self) -> None:
        """Make a new lock."""
        self._lock = RLock()  # reentrant, because a signal handler may close a stream

    def limits(self, now: float) -> tuple[Limit, ...]:
        """Return the limits that hold now, without what a call takes of the tokens.

        A burst is what a limit allows in the same time, whatever its rate: what was taken at another rate counts for as long as
        it did then, so that no change lets more through than the higher of two rates would.
        """
        if now < self._limits_until:
            return self._limits
        with self._lock:
            self.pace.step(now)
            if self._told and now > self._told_at + _FRESH:
                self._forget_told(now)
            rate = self.pace.rate
            rates = {name: told * rate for name, told in self._told.items()} or {"requests": rate}
            self._limits = limits = tuple([_limit(name, rate, rate) for name, rate in rates.items()])
            self._limits_until = self.pace.due_at
        return limits

    def hear(self, told: Iterable[Told], now: float) -> None:
        """Note the rates in the headers of an answer."""
        with self._lock:
            if self._hear({each.name: each.rate for each in told}, now):
                self.is_new = True

    def _hear(self, rates: Mapping[str, float], now: float) -> bool:
        if not rates or now < self._told_at:
            return False
        rates = {name: min(max(rate, LOWEST), _MOST_TOLD) for name, rate in rates.items()}
        if not self._told:
            self.pace = _share_of([_limit(name, rate, rate) for name, rate in rates.items()], now)
        self._told, self._told_at = rates, now
        self._limits_until = -math.inf
        return True

    def _forget_told(self, now: float) -> None:
        """Go on from the last rate of a service that no longer sends headers."""
        rate = self._told.get("requests")
        self._told = {}
        self.pace = Pace(now) if rate is None else Pace(now, min(rate * self.pace.rate, HIGHEST), goal=0.0)

    def refused(self, sending: Sending, now: float) -> bool:
        """Note that the service has refused a call. Return whether that has cut the rate."""
        with self._lock:
            is_cut = sending.pace is self.pace and self.pace.refused(sending, now)
            if is_cut:
                self.is_new = self._is_met = True
                self._limits_until = -math.inf
                self.read_at = min(self.read_at, now)  # the next call saves it, unless others know more
        return is_cut

    def answered(self, sending: Sending, seconds: float, now: float, *, streaming: bool) -> None:
        """Note the latency of a call."""
        with self._lock:
            if sending.pace is self.pace and self.pace.answered(sending, seconds, now, streaming=streaming):
                self.is_new, self._limits_until = True, -math.inf

    @property
    def requests(self) -> float | None:
        """The requests a second that hold now. None: the service limits something else, or no limit was met yet."""
        with self._lock:
            if not (self._told or self._is_met):
                return None
            told = self._told.get("requests") if self._told else 1.0
            return None if told is None else told * self.pace.rate

    def shown(self) -> str:
        """Return what holds now in words, for messages."""
        share = self.pace.rate
        if self._told:
            told = ", ".join([f"{name}={60 * rate * share:.4g}" for name, rate in self._told.items()])
            return f"{told} a minute, as the service's headers say"
        return f"requests={60 * share:.4g} a minute, as found"

    def to_bytes(self, now: float) -> bytes:
        """Return what another process needs to go on from here."""
        self.is_new = False
        told = {"told": self._told, "told_for": _FRESH - (now - self._told_at)} if self._told else {}
        return json.dumps({"pace": self.pace.numbers(), **told}).encode()

    def take_over(self, entry: Entry, now: float) -> None:
        """Go on from where another process is, if it knows more. What cannot be read is passed over."""
        numbers, told, told_for = _read(entry.value)
        with self._lock:
            self._limits_until = -math.inf
            if told:
                # There is no common clock, but the store knows how old its entry is.
                told_at = now - (_FRESH - told_for) - max(0.0, FORGOTTEN - entry.left)
                if now - told_at <= _FRESH:
                    self._hear(told, told_at)
            self._is_met = self._is_met or (numbers is not None and numbers["epoch"] > self.pace.epoch)
            if numbers is not None and bool(told) == bool(self._told) and self.pace.take_over(numbers, now):
                self.is_new = True


def _share_of(limits: Iterable[Limit], now: float) -> Pace:
    """Return the pace of the share of limits that is used. It is 1 until a call is refused."""
    unit = min([rate for name, rate, _, _ in limits if name == "requests"], default=HIGHEST)
    return Pace(now, 1.0, most=1.0, least=_LOWEST_SHARE, goal=0.0, unit=unit)


def _limit(name: str, rate: float, burst: float) -> Limit:
    return make_limit(name, rate, max(1.0, burst), 1.0) if name == "requests" else make_limit(name, rate, burst, 0.0)


def _read(value: bytes) -> tuple[Mapping[str, float] | None, Mapping[str, float], float]:
    """Return the numbers of a pace, the rates from headers, and the seconds for which these hold."""
    try:
        said: Any = json.loads(value)
    except (ValueError, RecursionError):
        said = None
    if not is_mapping(said):
        return None, {}, 0.0
    pace, told, told_for = said.get("pace"), said.get("told"), said.get("told_for")
    numbers = (
        pace if is_mapping(pace) and not any(number(name, pace.get(name), 0) for name in (*_NUMBERS, "goal")) else None
    )
    if is_mapping(told) and is_number(told_for) and number("told_for", told_for, 0) is None:
        rates = {name: told[name] for name in ("requests", "tokens") if number(name, told.get(name), above=0) is None}
        return numbers, rates, told_for
    return numbers, {}, 0.0
