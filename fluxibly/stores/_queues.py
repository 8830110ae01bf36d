"""The queues of rates and places as pure state: no lock, no clock, no I/O.

`MemoryStore` wakes its waiters by signals. A store outside of the process cannot: its waiters poll, and one that stops polling
is forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Generic, TypeAlias, TypeVar

from fluxibly.stores.protocol import Limit, Turn

W = TypeVar("W")
Wanted: TypeAlias = Sequence[Limit]
"""What a call wants of each limit. Where it waits, a plain sequence of the same values takes the place of each `Limit`."""

GRACE = 0.5
"""A caller that has not asked again so many seconds after its estimated wait is forgotten."""
PLACE_GRACE = 1.0
"""The same, where there is no estimate."""
_ROUNDING = 1e-9
"""A wait below so many seconds is a rounding error, and would be asked for again and again."""


class Queue(Generic[W]):
    """The callers that wait for one thing, first come, first served."""

    is_woken = False
    """Whether the first is told when it may go, so that all go one after the other. Otherwise, a caller for whom there is enough
    beside what those before it need does not wait for them to ask."""

    def __init__(self) -> None:
        self.waiting: dict[str, W] = {}
        self.until: dict[str, float] = {}
        """When each is forgotten unless it asks again. A caller without such a time is never forgotten."""

    def turn(self, who: str, what: W, seconds: float, ahead: int, now: float) -> Turn:
        """Keep a caller's place, and return its turn."""
        self.waiting[who] = what
        self.until[who] = now + (PLACE_GRACE if seconds == math.inf else seconds + GRACE)
        return Turn(seconds, ahead, None)

    def leave(self, who: str, *, wake: bool = True) -> W | None:
        """Remove a caller, and wake the next one if it was the first."""
        if who not in self.waiting:
            # It may have left already, and been interrupted before it could wake the next.
            self.wake()
            return None
        first = next(iter(self.waiting)) == who
        what = self.waiting.pop(who)
        self.until.pop(who, None)
        if first and wake:
            self.wake()
        return what

    def wake(self) -> None:
        """Wake the first caller, where the store can."""

    def ahead(self, who: str) -> list[W]:
        """Return what the callers ahead wait for."""
        found: list[W] = []
        for other, what in self.waiting.items():
            if other == who:
                break
            found.append(what)
        return found

    def forget_dead(self, now: float) -> None:
        """Remove the callers that have not asked again in time."""
        for who in [who for who, until in self.until.items() if until <= now]:
            self.leave(who)

    def shift(self, seconds: float) -> None:
        """Shift all times, because the clock has restarted."""
        self.until = {who: until + seconds for who, until in self.until.items()}

    def idle_at(self, times: Iterable[float] = ()) -> float:
        """Return when this state no longer matters, if nobody asks again."""
        return max([*times, *[self.until.get(who, math.inf) for who in self.waiting]], default=-math.inf)

    def is_idle(self, now: float) -> bool:
        return now >= self.idle_at()


class Rates(Queue[Wanted]):
    """The limits under one key."""

    def __init__(self) -> None:
        super().__init__()
        self.limits: tuple[Limit, ...] = ()
        """The limits of the last call that asked, or that corrected what it took."""
        self.arrivals: dict[str, float] = {}
        """For each limit, when it would be unused if nothing more were taken: GCRA's theoretical arrival time."""
        self.ceilings: dict[str, tuple[float, float]] = {}
        """For each limit, the rate that a `throttle` allows, and until when."""
        self.closed_until = -math.inf
        """Nothing passes before this time."""
        self.queued: dict[str, float] = {}
        """For each limit, what all waiters together need of it."""

    def gap(self, limit: Limit, now: float) -> float:
        """Return the seconds that one unit of a limit takes: GCRA's emission interval."""
        usual = 1.0 / limit.rate
        ceiling = self.ceilings.get(limit.name)
        if ceiling is None:
            return usual
        rate, until = ceiling
        slow = max(usual, 1.0 / rate)
        if now < until:
            return slow
        del self.ceilings[limit.name]
        self._rescale(limit.name, until, usual / slow)
        return usual

    def _rescale(self, name: str, at: float, factor: float) -> None:
        """Keep as many units of a limit taken, where from `at` on each takes `factor` times as long."""
        arrival = self.arrivals.get(name, at)
        if arrival > at:
            self.arrivals[name] = at + (arrival - at) * factor

    def throttle(self, name: str, rate: float, seconds: float, now: float) -> None:
        """Lower a limit to a rate for a while; 0: let nothing pass."""
        if rate <= 0:
            self.closed_until = max(self.closed_until, now + seconds)
        else:
            limit = next((limit for limit in self.limits if limit.name == name), None)
            before = None if limit is None else self.gap(limit, now)
            self.ceilings[name] = (rate, now + seconds)
            if limit is not None and before is not None:
                self._rescale(name, now, self.gap(limit, now) / before)
        self.wake()

    def reserve(self, who: str, limits: tuple[Limit, ...], now: float) -> Turn | None:
        self.limits = limits
        closed = self.closed_until
        if not self.waiting and not self.ceilings and closed <= now and self._take(limits, now):
            return None
        wait = closed - now
        ahead = 0
        before: list[Wanted] | None = None
        if self.waiting:
            before = self.ahead(who) if who in self.waiting else None
            ahead = len(self.waiting) if before is None else len(before)
        taken: list[tuple[str, float]] = []
        for limit in limits:
            name, rate, burst, cost = limit
            gap = self.gap(limit, now) if self.ceilings else 1.0 / rate
            arrival = self.arrivals.get(name, now)
            arrival = max(now, arrival)
            taken.append((name, arrival + cost * gap))
            if ahead or self.ceilings:
                units = (arrival - now) / gap + (self._needed(before, name) if ahead else 0.0)
                needed = self._wait_after(units, limit, gap, now) + (max(0.0, closed - arrival) if ahead else 0.0)
            else:
                needed = arrival + (cost - burst) * gap - now
            wait = max(wait, needed)
        if wait > _ROUNDING or (ahead and self.is_woken):
            known = self.waiting.get(who)
            turn = self.turn(who, limits, max(0.0, wait), ahead, now)
            if known is not None:
                self._count(known, -1)  # what a call wants may change while it waits
            self._count(limits, 1)
            return turn
        self.arrivals.update(taken)
        if who in self.waiting:
            self.leave(who)
        return None

    def _take(self, limits: tuple[Limit, ...], now: float) -> bool:
        """Take what a call costs at the usual rates. Return False, and take nothing, if it has to wait."""
        taken: dict[str, float] = {}
        for name, rate, burst, cost in limits:
            arrival = max(self.arrivals.get(name, now), now)
            if arrival + (cost - burst) / rate - now > _ROUNDING:
                return False
            taken[name] = arrival + cost / rate
        self.arrivals.update(taken)
        return True

    def correct(self, limit: Limit, now: float) -> None:
        """Take more of a limit, or give it back."""
        name, rate, _, cost = limit
        gap = self.gap(limit, now) if self.ceilings else 1.0 / rate
        arrival = self.arrivals.get(name)
        if arrival is None:  # nobody has asked for it since it was idle, and a throttle has to know its rate
            arrival = now
            self.limits = (*self.limits, limit)
        self.arrivals[name] = max(arrival, now) + cost * gap
        if cost < 0 and self.waiting:
            self.wake()

    def _wait_after(self, units: float, limit: Limit, gap: float, now: float) -> float:
        """Return the seconds until a call may go, with so many units taken before it, at a `gap` that a ceiling may set."""
        name, rate, burst, cost = limit
        ceiling = self.ceilings.get(name)
        if ceiling is None:
            return (units + cost - burst) * gap
        # A lower rate has a smaller burst: what the same time allows, and at least one call.
        wait = (units + cost - max(burst / rate / gap, min(cost, burst))) * gap
        left = ceiling[1] - now
        return wait if wait <= left else left + max(0.0, (units - left / gap + cost - burst) / rate)

    def _needed(self, before: list[Wanted] | None, name: str) -> float:
        """Return what the callers ahead need of a limit. None: all waiters are ahead."""
        if before is None:
            return self.queued.get(name, 0.0)
        return sum([cost for limits in before for other, _, _, cost in limits if other == name])

    def leave(self, who: str, *, wake: bool = True) -> Wanted | None:
        limits = super().leave(who, wake=wake)
        if limits is not None:
            self._count(limits, -1)
        return limits

    def _count(self, limits: Wanted, sign: int) -> None:
        for name, _, _, cost in limits:  # from 0 again once nobody waits, without the rounding errors
            self.queued[name] = self.queued.get(name, 0.0) + sign * cost if self.waiting else 0.0

    def shift(self, seconds: float) -> None:
        super().shift(seconds)
        self.closed_until += seconds
        self.arrivals = {name: at + seconds for name, at in self.arrivals.items()}
        self.ceilings = {name: (rate, until + seconds) for name, (rate, until) in self.ceilings.items()}

    def idle_at(self, times: Iterable[float] = ()) -> float:
        ends = [until for _, until in self.ceilings.values()]
        return super().idle_at([*times, self.closed_until, *self.arrivals.values(), *ends])


class Places(Queue[None]):
    """The places under one key."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, float] = {}
        """Until when each caller that has a place holds it."""

    def lease(self, who: str, size: int, *, wait: bool, now: float = 0.0, until: float = math.inf) -> Turn | None:
        held = self.held
        if who in held:
            return None
        ahead = 0
        if self.waiting:
            ahead = len(self.ahead(who)) if who in self.waiting else len(self.waiting)
        # Each caller ahead has one of the free places. If there are more, this one need not wait until they ask.
        if ahead >= size - len(held) or (ahead and self.is_woken):
            return self.turn(who, None, math.inf, ahead, now) if wait else Turn(math.inf, ahead, None)
        held[who] = until
        if self.waiting:
            self.leave(who, wake=False)
            if len(held) < size:
                self.wake()
        return None

    def renew(self, who: str, until: float) -> bool:
        """Extend a caller's lease. Return whether it was still held."""
        if who not in self.held:
            return False
        self.held[who] = until
        return True

    def release(self, who: str) -> None:
        """Give a place back, or leave the queue."""
        if who not in self.held:
            self.leave(who)
            return
        del self.held[who]
        if self.waiting:
            self.wake()

    def forget_dead(self, now: float) -> None:
        """Also free the places whose leases have expired."""
        for who in [who for who, until in self.held.items() if until <= now]:
            self.release(who)
        super().forget_dead(now)

    def shift(self, seconds: float) -> None:
        super().shift(seconds)
        self.held = {who: until + seconds for who, until in self.held.items()}

    def idle_at(self, times: Iterable[float] = ()) -> float:
        return super().idle_at([*times, *self.held.values()])
