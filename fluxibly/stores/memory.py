"""`MemoryStore`: what the calls of one process share. It is the reference of what a store does."""

from __future__ import annotations

import math
from collections import deque
from threading import RLock
from typing import Any, TypeVar

from fluxibly._threads import renew_lock_after_fork
from fluxibly.signals import Signal
from fluxibly.stores._queues import Places, Queue, Rates, Wanted
from fluxibly.stores.protocol import PARTS, Entry, Limit, Turn

W = TypeVar("W")

_SWEEP = 1024
"""Once there are so many keys, those that no longer matter are forgotten."""


class _Woken(Queue[W]):
    """A queue whose callers are woken by signals, so they need not poll. Only the first one's signal is set."""

    is_woken = True

    def __init__(self) -> None:
        super().__init__()
        self.signals: dict[str, Signal] = {}

    def turn(self, who: str, what: W, seconds: float, ahead: int, now: float) -> Turn:
        """Keep a caller's place, and return its turn. It gets a new signal each time that it asks."""
        self.waiting[who] = what
        signal = self.signals[who] = Signal()
        return Turn(seconds, ahead, signal)

    def leave(self, who: str, *, wake: bool = True) -> W | None:
        what = super().leave(who, wake=wake)
        self.signals.pop(who, None)
        return what

    def wake(self) -> None:
        for who in self.waiting:
            self.signals[who].set()
            return


class _Rates(_Woken[Wanted], Rates):
    """The limits under one key."""


class _Places(_Woken[None], Places):
    """The places under one key."""


class _Sum:
    """A sum over a sliding window."""

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
            rates.throttle(name, rate, seconds, now)

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
            if self._rates and (rates := self._rates.get(key)) is not None:
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
        """Forget the keys that no longer matter, once there are many."""
        kinds: tuple[dict[str, Any], ...] = (self._rates, self._places, self._sums, self._values)
        if sum([len(kind) for kind in kinds]) < self._sweep_at:
            return
        for kind in kinds:
            for key in [key for key, state in kind.items() if state.is_idle(now)]:
                del kind[key]
        # The next sweep is due at twice the keys in use, so that sweeping costs each call little.
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
