"""`MemoryStore`: what the calls of one process share. It is the reference of what a store does."""

from __future__ import annotations

import math
from collections import deque
from threading import RLock
from typing import Any, Generic, TypeVar

from fluxibly._threads import renew_lock_after_fork
from fluxibly.signals import Signal
from fluxibly.stores.protocol import PARTS, Entry, Limit, Turn

W = TypeVar("W")

_SWEEP = 1024
"""The number of keys from which on those that nothing depends on are forgotten."""
_ROUNDING = 1e-9
"""A wait below so many seconds is a rounding error, and would be asked for again and again."""


class _Queue(Generic[W]):
    """The callers that wait for one thing, first come, first served. Only the first has its signal set."""

    def __init__(self) -> None:
        self.waiting: dict[str, W] = {}
        self.signals: dict[str, Signal] = {}

    def turn(self, who: str, what: W, seconds: float, ahead: int) -> Turn:
        """Keep a caller's place, and return its turn. It gets a new signal each time that it asks."""
        self.waiting[who] = what
        signal = self.signals[who] = Signal()
        return Turn(seconds, ahead, signal)

    def leave(self, who: str, *, wake: bool = True) -> W | None:
        """Let a caller leave, and wake the next one if it was the first."""
        if who not in self.waiting:
            # It may have left already, and been interrupted before it could wake the next.
            self.wake()
            return None
        first = next(iter(self.waiting)) == who
        what = self.waiting.pop(who)
        del self.signals[who]
        if first and wake:
            self.wake()
        return what

    def wake(self) -> None:
        """Let the first ask again."""
        for who in self.waiting:
            self.signals[who].set()
            return

    def ahead(self, who: str) -> list[W]:
        """Return what those wait for who came before."""
        found: list[W] = []
        for other, what in self.waiting.items():
            if other == who:
                break
            found.append(what)
        return found


class _Rates(_Queue[tuple[Limit, ...]]):
    """The limits under one key."""

    def __init__(self) -> None:
        super().__init__()
        self.limits: tuple[Limit, ...] = ()
        """The limits of the last call that asked."""
        self.arrivals: dict[str, float] = {}
        """For each limit, when it would be unused if nothing more were taken: GCRA's theoretical arrival time."""
        self.ceilings: dict[str, tuple[float, float]] = {}
        """For each limit, the rate that a `throttle` allows, and until when."""
        self.closed_until = -math.inf
        """Nothing passes before this time."""
        self.queued: dict[str, float] = {}
        """For each limit, what all who wait need of it."""

    def gap(self, limit: Limit, now: float) -> float:
        """Return the seconds that one unit of a limit takes."""
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
        """Keep the units that are taken of a limit, from a time on at which each takes `factor` times as long."""
        arrival = self.arrivals.get(name, at)
        if arrival > at:
            self.arrivals[name] = at + (arrival - at) * factor

    def slow_down(self, name: str, rate: float, until: float, now: float) -> None:
        """Let a limit have at most a rate until some time."""
        limit = next((limit for limit in self.limits if limit.name == name), None)
        before = None if limit is None else self.gap(limit, now)
        self.ceilings[name] = (rate, until)
        if limit is not None and before is not None:
            self._rescale(name, now, self.gap(limit, now) / before)

    def reserve(self, who: str, limits: tuple[Limit, ...], now: float) -> Turn | None:
        self.limits = limits
        closed = self.closed_until
        if not self.waiting and not self.ceilings and closed <= now and self._take(limits, now):
            return None
        wait = closed - now
        ahead = 0
        before: list[tuple[Limit, ...]] | None = None
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
        if ahead or wait > _ROUNDING:
            is_new = who not in self.waiting
            turn = self.turn(who, limits, max(0.0, wait), ahead)
            if is_new:
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
        self.arrivals[name] = max(self.arrivals.get(name, now), now) + cost * gap
        if cost < 0 and self.waiting:
            self.wake()

    def _wait_after(self, units: float, limit: Limit, gap: float, now: float) -> float:
        """Return the seconds until a call may go after which so many units are taken, at a `gap` that a ceiling may set."""
        name, rate, burst, cost = limit
        ceiling = self.ceilings.get(name)
        if ceiling is None:
            return (units + cost - burst) * gap
        # A lower rate has a smaller burst: what the same time allows, and at least one call.
        wait = (units + cost - max(burst / rate / gap, min(cost, burst))) * gap
        left = ceiling[1] - now
        return wait if wait <= left else left + max(0.0, (units - left / gap + cost - burst) / rate)

    def _needed(self, before: list[tuple[Limit, ...]] | None, name: str) -> float:
        """Return what those who came before need of a limit. None: all who wait."""
        if before is None:
            return self.queued.get(name, 0.0)
        return sum([limit.cost for limits in before for limit in limits if limit.name == name])

    def leave(self, who: str, *, wake: bool = True) -> tuple[Limit, ...] | None:
        limits = super().leave(who, wake=wake)
        if limits is not None:
            self._count(limits, -1)
        return limits

    def _count(self, limits: tuple[Limit, ...], sign: int) -> None:
        for limit in limits:  # from 0 again once nobody waits, without the rounding errors
            self.queued[limit.name] = self.queued.get(limit.name, 0.0) + sign * limit.cost if self.waiting else 0.0

    def is_idle(self, now: float) -> bool:
        times = [self.closed_until, *self.arrivals.values(), *(until for _, until in self.ceilings.values())]
        return not self.waiting and now >= max(times)


class _Places(_Queue[None]):
    """The places under one key."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, None] = {}

    def lease(self, who: str, size: int, *, wait: bool) -> Turn | None:
        if who in self.held:
            return None
        ahead = 0
        if self.waiting:
            ahead = len(self.ahead(who)) if who in self.waiting else len(self.waiting)
        if ahead or len(self.held) >= size:
            return self.turn(who, None, math.inf, ahead) if wait else Turn(math.inf, ahead, None)
        self.held[who] = None
        if self.waiting:
            self.leave(who, wake=False)
            if len(self.held) < size:
                self.wake()
        return None

    def release(self, who: str) -> None:
        """Give a place back, or leave the queue."""
        if who not in self.held:
            self.leave(who)
            return
        del self.held[who]
        if self.waiting:
            self.wake()

    def is_idle(self, now: float) -> bool:
        return not self.held and not self.waiting


class _Sum:
    """A sum over a time that moves on."""

    def __init__(self) -> None:
        self.total = 0.0
        self.parts: deque[tuple[float, float]] = deque()
        """When each part was added, and how much."""
        self.per: float | None = None

    def add(self, amount: float, per: float | None, now: float, most: float | None) -> float | None:
        self.per = per
        self._forget(now)
        if amount < 0:
            return self._take_off(-amount)
        if most is not None and self.total + amount > most:
            return None
        self.total += amount
        if per is not None and amount:
            if self.parts and now - self.parts[-1][0] < per / PARTS:
                at, last = self.parts.pop()
                self.parts.append((at, last + amount))
            else:
                self.parts.append((now, amount))
        return self.total

    def _take_off(self, amount: float) -> float:
        """Take an amount off the oldest parts, which are forgotten first."""
        self.total = max(0.0, self.total - amount)
        while self.parts and amount > 0:
            at, first = self.parts.popleft()
            if first > amount:
                self.parts.appendleft((at, first - amount))
            amount -= first
        return self.total

    def _forget(self, now: float) -> None:
        while self.per is not None and self.parts and self.parts[0][0] <= now - self.per:
            self.total -= self.parts.popleft()[1]
            if not self.parts:
                self.total = 0.0  # without the rounding errors of what was added and taken away

    def is_idle(self, now: float) -> bool:
        self._forget(now)
        return self.per is not None and not self.parts


class _Value:
    """A value, and when it is forgotten."""

    def __init__(self, value: bytes, until: float) -> None:
        self.value = value
        self.until = until

    def is_idle(self, now: float) -> bool:
        return now >= self.until


class MemoryStore:
    """A `Store` in the memory of this process. Middleware with the same store share their state."""

    local = True

    def __init__(self) -> None:
        self.renew_lock()
        renew_lock_after_fork(self)
        self._rates: dict[str, _Rates] = {}
        self._places: dict[str, _Places] = {}
        self._sums: dict[str, _Sum] = {}
        self._values: dict[str, _Value] = {}
        self._sweep_at = _SWEEP

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def __reduce__(self) -> tuple[type[MemoryStore], tuple[()]]:
        return MemoryStore, ()  # in another process a store begins empty

    def renew_lock(self) -> None:
        """Make a new lock."""
        self._lock = RLock()  # reentrant, because a signal handler may close a stream

    def reserve(self, key: str, who: str, limits: tuple[Limit, ...], now: float) -> Turn | None:
        """Take what a call costs of several limits; see `Store.reserve`."""
        with self._lock:
            rates = self._rates.get(key)
            if rates is None:
                self._sweep(now)
                rates = self._rates[key] = _Rates()
            return rates.reserve(who, limits, now)

    def correct(self, key: str, limit: Limit, now: float) -> None:
        """Take more of a limit, or give it back; see `Store.correct`."""
        with self._lock:
            rates = self._rates.get(key)
            if rates is None:
                rates = self._rates[key] = _Rates()
            rates.correct(limit, now)

    def throttle(self, key: str, name: str, rate: float, seconds: float, now: float) -> None:
        """Slow a limit down for a while; see `Store.throttle`."""
        with self._lock:
            rates = self._rates.get(key)
            if rates is None:
                rates = self._rates[key] = _Rates()
            if rate <= 0:
                rates.closed_until = max(rates.closed_until, now + seconds)
            else:
                rates.slow_down(name, rate, now + seconds, now)
            rates.wake()

    def lease(self, key: str, who: str, size: int, now: float, *, wait: bool = True) -> Turn | None:
        """Take one of several places; see `Store.lease`."""
        with self._lock:
            places = self._places.get(key)
            if places is None:
                self._sweep(now)
                places = self._places[key] = _Places()
            return places.lease(who, size, wait=wait)

    def renew(self, key: str, who: str, now: float) -> bool:
        """Return whether a place is held. It is held until it is released."""
        with self._lock:
            places = self._places.get(key)
            return places is not None and who in places.held

    def release(self, key: str, who: str, now: float) -> None:
        """Give a place back, or leave a queue; see `Store.release`."""
        with self._lock:
            places = self._places.get(key)
            if places is not None:
                places.release(who)
                return
            rates = self._rates.get(key)
            if rates is not None:
                rates.leave(who)

    def add(self, key: str, amount: float, per: float | None, now: float, *, most: float | None = None) -> float | None:
        """Add to a sum; see `Store.add`."""
        with self._lock:
            total = self._sums.get(key)
            if total is None:
                self._sweep(now)
                total = self._sums[key] = _Sum()
            return total.add(amount, per, now, most)

    def load(self, key: str, now: float) -> Entry | None:
        """Return a value, or None."""
        kept = self._values.get(key)
        return None if kept is None or now >= kept.until else Entry(kept.value, kept.until - now)

    def save(self, key: str, value: bytes | None, seconds: float | None, now: float) -> None:
        """Keep a value; see `Store.save`."""
        with self._lock:
            if value is None:
                self._values.pop(key, None)
                self._sums.pop(key, None)
                return
            if key not in self._values:
                self._sweep(now)
            self._values[key] = _Value(value, math.inf if seconds is None else now + seconds)

    def _sweep(self, now: float) -> None:
        """Forget the keys that nothing depends on, before a new one is added, once there are many."""
        kinds: tuple[dict[str, Any], ...] = (self._rates, self._places, self._sums, self._values)
        if sum([len(kind) for kind in kinds]) < self._sweep_at:
            return
        for kind in kinds:
            for key in [key for key, state in kind.items() if state.is_idle(now)]:
                del kind[key]
        # Not again before there are twice as many as are in use, so that a sweep costs each call little.
        self._sweep_at = max(_SWEEP, 2 * sum([len(kind) for kind in kinds]))

    async def areserve(self, key: str, who: str, limits: tuple[Limit, ...], now: float) -> Turn | None:
        return self.reserve(key, who, limits, now)

    async def acorrect(self, key: str, limit: Limit, now: float) -> None:
        self.correct(key, limit, now)

    async def athrottle(self, key: str, name: str, rate: float, seconds: float, now: float) -> None:
        self.throttle(key, name, rate, seconds, now)

    async def alease(self, key: str, who: str, size: int, now: float, *, wait: bool = True) -> Turn | None:
        return self.lease(key, who, size, now, wait=wait)

    async def arenew(self, key: str, who: str, now: float) -> bool:
        return self.renew(key, who, now)

    async def arelease(self, key: str, who: str, now: float) -> None:
        self.release(key, who, now)

    async def aadd(
        self, key: str, amount: float, per: float | None, now: float, *, most: float | None = None
    ) -> float | None:
        return self.add(key, amount, per, now, most=most)

    async def aload(self, key: str, now: float) -> Entry | None:
        return self.load(key, now)

    async def asave(self, key: str, value: bytes | None, seconds: float | None, now: float) -> None:
        self.save(key, value, seconds, now)
