"""The line of this process's calls that share a limit: who gets what of the blocks that were reserved, and what to ask for next.

It is a state machine without a lock, a store or a clock, which `_blocks.py` drives.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from typing import NamedTuple, TypeAlias

from fluxibly.middleware._shared import new_name
from fluxibly.signals import Signal
from fluxibly.stores.protocol import Limit, Turn, make_limit

Limits: TypeAlias = tuple[Limit, ...]

_LEAST = {"requests": 2.0, "tokens": 1000.0}
"""The units of a limit that have to come free while a block is held. With fewer, no call would be served ahead."""
_OF_BURST = 0.25
"""The largest part of a burst that is kept back for what is held."""
_SHORT = 1.0
"""The seconds after a wait in which nothing is taken ahead, because others need it."""
_STUCK = 5.0
"""A head that has not asked again for so many seconds is passed over: its event loop may have ended."""
_LONGEST_TRIP = 10.0
_MEMORY = 16
"""What a call takes is averaged over about so many calls."""
_ROUNDING = 1e-6
"""The units by which a sum of costs may be wrong."""


class Plan(NamedTuple):
    """What a trip asks for."""

    name: str
    """The name that it has in the store."""
    limits: Limits
    callers: tuple[str, ...]
    """The calls that it is for."""
    ahead: dict[str, float]
    """The units of each limit that are for later calls."""
    hold: float
    """The seconds within which these are to go out."""


class _Waiter:
    """A call that waits in its line."""

    __slots__ = ("limits", "signal")

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.signal = Signal()


class _Credit:
    """What is left of the blocks that were taken ahead."""

    def __init__(self) -> None:
        self._parts: deque[tuple[float, dict[str, float]]] = deque()
        """The units of each limit, and until when they may go out."""

    def add(self, units: dict[str, float], until: float) -> None:
        self._parts.append((until, units))

    def take(self, limits: Limits, now: float) -> bool:
        """Take what a call costs, all or nothing, of what has to go out first."""
        parts = self._parts
        while parts and parts[0][0] < now:
            parts.popleft()
        if not parts:
            return False
        for name, _, _, cost in limits:
            if sum([units.get(name, 0.0) for _, units in parts]) < cost - _ROUNDING:
                return False
        for name, _, _, cost in limits:
            left = cost
            for _, units in parts:
                taken = min(left, units.get(name, 0.0))
                if taken:
                    units[name] -= taken
                    left -= taken
        return True

    def clear(self) -> None:
        self._parts.clear()

    @property
    def until(self) -> float:
        """When the last of it lapses."""
        return max([until for until, _ in self._parts], default=-math.inf)


class Line:
    """The calls of this process that share a limit. None of its methods waits for anything."""

    def __init__(self, block: float) -> None:
        self._block = block
        self.waiting: dict[str, _Waiter] = {}
        """The calls that wait, first come, first served."""
        self._granted: dict[str, tuple[Limits, float]] = {}
        """The calls that have got what they need and do not know it yet, and until when others may have it instead."""
        self._needed: dict[str, float] = {}
        """The units of each limit that all who wait need."""
        self._credit = _Credit()
        self._plan: Plan | None = None
        """What the store has been asked for, and has not given yet."""
        self._away_until = -math.inf
        """The end of the trip under way, at the latest."""
        self._due = math.inf
        """When the head is passed over unless it has asked again."""
        self._turn_at = -math.inf
        """When the store is likely to give what it was asked for."""
        self._rivals = 0
        """The number of those who waited in the store when this process came last."""
        self._most = math.inf
        """The most calls of a block, while the rate seems to be lower than was given. It doubles with each block."""
        self._short_until = -math.inf
        """Nothing is taken ahead before this time."""
        self._slow: dict[str, tuple[float, float]] = {}
        """The rates to which a service has lowered limits, and until when."""
        self._counted_from = -math.inf
        self._count = self._count_before = 0
        """The calls that came since then, and in as much time before."""
        self._usual: dict[str, float] = {}
        """What the last calls took of each limit, on average."""
        self._out = 0
        """The calls under way that have got what they need."""
        self._owed: dict[str, Limit] = {}
        """The corrections that have not been sent to the store yet."""
        self._told_at = -math.inf

    def is_idle(self, now: float) -> bool:
        times = [self._away_until, self._credit.until, self._counted_from + 2 * self._block]
        times += [until for _, until in self._slow.values()]
        return not (self.waiting or self._granted or self._plan or self._out or self._owed) and now > max(times)

    # Calls that ask

    def ask(self, who: str, limits: Limits, now: float) -> Turn | bool:
        """Return True if a call has got what it needs, False if it is to make a trip, or its turn."""
        granted = self._granted.pop(who, None)
        if granted is not None:
            self._owe_what_is_new(limits, {limit.name for limit in granted[0]})
            return True
        waiter = self.waiting.get(who)
        if waiter is None:
            self._come(limits, now)
            if not self.waiting and self._credit.take(limits, now):
                return True
            if not self.waiting:
                self._due = now + _STUCK
            waiter = self.waiting[who] = _Waiter(limits)
            self._need(limits, 1)
        else:
            if waiter.signal.is_set:
                waiter.signal = Signal()
            if waiter.limits != limits:  # a rate that is found changes while calls wait for it
                self._need(waiter.limits, -1)
                waiter.limits = limits
                self._need(limits, 1)
        if now < self._away_until:
            return self._turn(who, waiter, now)
        head = next(iter(self.waiting))
        if head != who and now > self._due:
            self._remove(head, now)
            head = next(iter(self.waiting))
        return False if head == who else self._turn(who, waiter, now)

    def _come(self, limits: Limits, now: float) -> None:
        """Count a call that asks for the first time."""
        passed = now - self._counted_from
        if passed >= self._block:
            self._count_before = self._count if passed < 2 * self._block else 0
            self._count, self._counted_from = 0, now
        self._count += 1
        usual = self._usual
        for name, _, _, cost in limits:
            before = usual.get(name, cost)
            usual[name] = before + (cost - before) / _MEMORY

    def _expected(self, now: float) -> float:
        """Return how many calls to expect within a block, waiting ones included: few enough that little lapses."""
        mean = self._count + self._count_before * max(0.0, 1 - (now - self._counted_from) / self._block)
        return mean - math.sqrt(mean)  # minus the standard deviation of a Poisson process

    def _need(self, limits: Limits, sign: int) -> None:
        for name, _, _, cost in limits:  # from 0 again once nobody waits, without the rounding errors
            self._needed[name] = self._needed.get(name, 0.0) + sign * cost if self.waiting else 0.0

    def _turn(self, who: str, waiter: _Waiter, now: float) -> Turn:
        """Return the turn of a call that waits for others of this process."""
        ahead, needed = len(self.waiting) - 1, self._needed
        if who != next(reversed(self.waiting)):
            ahead, needed = 0, dict[str, float]()
            for other, before in self.waiting.items():
                for name, _, _, cost in before.limits:
                    needed[name] = needed.get(name, 0.0) + cost
                if other == who:
                    break
                ahead += 1
        # What the store was asked for comes in its time, and after that this process has its share of the rate.
        asked = {} if self._plan is None else {name: cost for name, _, _, cost in self._plan.limits}
        later = max([(needed[name] - asked.get(name, 0.0)) / rate for name, rate, _, _ in waiter.limits], default=0.0)
        wait = max(0.0, self._turn_at - now) + max(0.0, later) * (1 + self._rivals)
        return Turn(wait, ahead, waiter.signal)

    # Calls that end

    def leave(self, who: str, now: float) -> str | None:
        """Let a call leave. Return the name that the store has to forget, if there is one."""
        found = self._granted.pop(who, None)
        if found is not None:
            self._credit.add({limit.name: limit.cost for limit in found[0]}, found[1])
        if who in self.waiting:
            self._remove(who, now)
        return None if now < self._away_until else self.forgotten()

    def forgotten(self) -> str | None:
        """Return the name that the store has to forget, because nobody waits any more."""
        if self.waiting or self._plan is None:
            return None
        name, self._plan = self._plan.name, None
        return name

    def _remove(self, who: str, now: float) -> None:
        was_head = next(iter(self.waiting)) == who
        self._need(self.waiting.pop(who).limits, -1)
        if was_head:
            self._wake(now)

    def _wake(self, now: float) -> None:
        """Let the head ask again."""
        for waiter in self.waiting.values():
            self._due = now + _STUCK
            waiter.signal.set()
            return

    def go(self) -> None:
        """Note that a call goes on with what it has got."""
        self._out += 1

    def end(self) -> None:
        """Note that such a call has ended."""
        self._out -= 1

    def owe(self, limit: Limit) -> None:
        """Keep a correction."""
        owed = self._owed.get(limit.name)
        self._owed[limit.name] = limit if owed is None else limit._replace(cost=owed.cost + limit.cost)

    def _owe_what_is_new(self, limits: Limits, asked: Collection[str]) -> None:
        """Keep what a call takes of limits that were not known when the store was asked for it."""
        for limit in limits:
            if limit.name not in asked:
                self.owe(limit)

    def due(self, now: float) -> list[Limit]:
        """Return the corrections to send to the store now: a block after the last ones, or with the last call."""
        return self.owed(now) if self._out <= 0 or now - self._told_at >= self._block else []

    def owed(self, now: float) -> list[Limit]:
        """Return the corrections that have not been sent, and forget them."""
        if not self._owed:
            return []
        self._told_at = now
        owed, self._owed = self._owed, {}
        return [limit for limit in owed.values() if limit.cost]

    def slow_down(self, name: str, rate: float, until: float) -> None:
        """Note that a service has lowered a limit; 0: nothing passes."""
        self._slow[name] = (rate, until)
        if not rate:
            self._credit.clear()

    # Trips

    def begin(self, now: float, *, alone: bool = False) -> tuple[Plan | None, bool]:
        """Begin a trip. Return what to ask for, if anybody waits, and whether the store has not been asked for it before.

        Args:
            alone: whether to ask for the head alone, in place of what was asked for.
        """
        if alone:
            self._plan = None
        if not self.waiting:
            return None, False
        self._away_until = now + _LONGEST_TRIP
        if self._plan is not None:
            head = next(iter(self.waiting.values()))
            if _rates(head.limits) != _rates(self._plan.limits):
                self._plan = self._planned(now, self._plan.name, alone=len(self._plan.callers) == 1)
            return self._plan, False
        self._turn_at = now
        self._plan = self._planned(now, new_name(), alone=alone)
        return self._plan, True

    def _planned(self, now: float, name: str, *, alone: bool) -> Plan:
        waiters = iter(self.waiting.items())
        who, head = next(waiters)
        names = [limit.name for limit in head.limits]
        costs = [limit.cost for limit in head.limits]
        hold = hold_of(head.limits, self._block)
        bursts = [limit.burst - limit.rate * hold for limit in head.limits]
        share = self._block / (1 + self._rivals)
        rooms = [min(burst, self._rate(limit, now) * share) for burst, limit in zip(bursts, head.limits, strict=True)]
        callers = [who]
        ahead: dict[str, float] = {}
        if not alone and _fits(costs, rooms):
            for other, waiter in waiters:
                if len(callers) >= self._most or [limit.name for limit in waiter.limits] != names:
                    break
                more = [cost + limit.cost for cost, limit in zip(costs, waiter.limits, strict=True)]
                if not _fits(more, rooms):
                    break
                callers.append(other)
                costs = more
            if hold and len(callers) == len(self.waiting) and now >= self._short_until:
                ahead = self._ahead(names, costs, rooms, len(callers), now)
        limits: list[Limit] = []
        for limit, burst, cost in zip(head.limits, bursts, costs, strict=True):
            units = cost + ahead.get(limit.name, 0.0)
            limits.append(make_limit(limit.name, limit.rate, max(burst, units), units))
        return Plan(name, tuple(limits), tuple(callers), ahead, hold)

    def _rate(self, limit: Limit, now: float) -> float:
        rate, until = self._slow.get(limit.name, (math.inf, -math.inf))
        if now < until:
            return min(limit.rate, rate)
        self._slow.pop(limit.name, None)
        return limit.rate

    def _ahead(
        self, names: list[str], costs: list[float], rooms: list[float], calls: int, now: float
    ) -> dict[str, float]:
        """Return the units to take for the calls that are likely to come."""
        count = min(self._expected(now), self._most) - calls
        for name, cost, room in zip(names, costs, rooms, strict=True):
            if usual := self._usual.get(name, cost / calls):
                count = min(count, (room - cost) / usual)
        return {} if count < 1 else {name: int(count) * self._usual.get(name, 0.0) for name in names}

    def give_up(self, now: float) -> None:
        """Note that a trip has ended without an answer."""
        self._away_until = -math.inf
        self._wake(now)

    def land(
        self, plan: Plan | None, turn: Turn | None, began: float, now: float, longest: float, *, is_new: bool
    ) -> str | None:
        """Note what a trip has brought. Return the name that the store has to forget, if there is one."""
        self._away_until = -math.inf
        if plan is not None and turn is None:
            self._get(plan, began, now, at_once=is_new)
        self._wake(now)
        if turn is not None:
            self._short_until = now + _SHORT
            self._turn_at = now + turn.seconds
            if is_new:
                self._rivals = turn.ahead
            if turn.seconds > longest:
                self._most = 1
            if turn.signal is not None:
                self._due += turn.seconds
        return self.forgotten()

    def _get(self, plan: Plan, began: float, now: float, *, at_once: bool) -> None:
        """Hand out what the store has given."""
        if self._plan is plan:
            self._plan = None
        self._turn_at = now
        self._most *= 2
        if at_once:
            self._rivals = 0
        until = began + plan.hold
        free = {limit.name: limit.cost for limit in plan.limits}
        for who in plan.callers:
            if who in self.waiting:
                self._grant(who, free, until)
        # What was taken ahead, and what those had asked for who have left, is for those who have come meanwhile.
        while self.waiting:
            who, waiter = next(iter(self.waiting.items()))
            if any(free.get(limit.name, 0.0) < limit.cost - _ROUNDING for limit in waiter.limits):
                break
            self._grant(who, free, until)
        self._credit.add(free, until)

    def _grant(self, who: str, free: dict[str, float], until: float) -> None:
        waiter = self.waiting.pop(who)
        self._need(waiter.limits, -1)
        self._owe_what_is_new(waiter.limits, free)
        for name, _, _, cost in waiter.limits:
            if name in free:
                free[name] -= cost
        self._granted[who] = waiter.limits, until
        waiter.signal.set()


def hold_of(limits: Limits, block: float) -> float:
    """Return the seconds for which units may be held before they go out: the same in all processes with the same limits."""
    hold = block
    for name, rate, burst, _ in limits:
        hold = min(hold, _OF_BURST * burst / rate)
        if rate * hold < _LEAST.get(name, 1.0):
            return 0.0
    return hold


def is_large(limits: Limits, hold: float) -> bool:
    """Whether a call takes so much that its reservation needs the whole burst."""
    return any(cost > burst - rate * hold for _, rate, burst, cost in limits)


def is_too_much(plan: Plan, turn: Turn, longest: float) -> bool:
    """Whether the head of a line is better off if it asks for itself alone."""
    return bool(plan.ahead) or (len(plan.callers) > 1 and turn.seconds > longest)


def _rates(limits: Limits) -> list[tuple[str, float]]:
    return [(limit.name, limit.rate) for limit in limits]


def _fits(costs: list[float], rooms: list[float]) -> bool:
    return all(cost <= room for cost, room in zip(costs, rooms, strict=True))
