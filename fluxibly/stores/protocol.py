"""`Store`: what a store does for the middleware that share something."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

from fluxibly.signals import Signal

PARTS = 1000
"""The most parts of a sum. Amounts that came within a thousandth of the time are added up, and forgotten together."""


class Limit(NamedTuple):
    """One of the limits that a call has to keep, and what the call takes of it."""

    name: str
    """The thing that is counted, such as "requests" or "tokens"."""
    rate: float
    """Units a second, above 0."""
    burst: float
    """The units that may be taken at once after a pause."""
    cost: float
    """The units that the call takes, from 0 up."""


def make_limit(name: str, rate: float, burst: float, cost: float) -> Limit:
    """Return a `Limit` in a third of the time that the class takes."""
    limit: Limit = _new(Limit, (name, rate, burst, cost))
    return limit


_new: Any = cast("Any", tuple).__new__


class Turn(NamedTuple):
    """The wait of a call that has not got what it asked for. It asks again after `seconds`, or when `signal` is set."""

    seconds: float
    """The estimated wait. It may be infinite, where only other calls can say when they end."""
    ahead: int
    """The number of calls that wait before this one."""
    signal: Signal | None
    """Set when asking again is worth it. None, where a store cannot say: ask again after half of `seconds` or so."""


class Entry(NamedTuple):
    """A value that a store keeps."""

    value: bytes
    left: float
    """The seconds until it is forgotten; infinite if it is kept for good."""


@runtime_checkable
class Store(Protocol):
    """The state that middleware share, under keys. Each method is atomic, and is called from any thread or event loop.

    Every method has a twin for async calls, whose name begins with "a". A store that does no I/O sets `local`: the methods
    are then called where the call is, and the twins are never used.

    `now` is the caller's time in seconds of a monotonic clock. A store with a clock of its own (a server) ignores it.
    `who` names one call, the same in all methods. What a store keeps for a key it may forget once nothing depends on it.

    Errors of a store are handled by the middleware, as its `on_store_error` says.
    """

    local: bool

    def reserve(self, key: str, who: str, limits: tuple[Limit, ...], now: float) -> Turn | None:
        """Take what a call costs of several limits, all or nothing: None if it may go, else its turn in the queue.

        First come, first served: a call goes only if there is enough for all before it, too. Each limit is a generic cell
        rate algorithm (GCRA, as in ITU-T I.371). A call keeps its place in the queue until it has got what it needs, or
        `release` ends its wait.
        """
        ...

    def correct(self, key: str, limit: Limit, now: float) -> None:
        """Take `limit.cost` more, or give it back if it is negative. It refuses nothing."""
        ...

    def throttle(self, key: str, name: str, rate: float, seconds: float, now: float) -> None:
        """Lower the limit of that name to at most `rate` units a second, for the next `seconds`. 0: let nothing pass."""
        ...

    def lease(self, key: str, who: str, size: int, now: float, *, wait: bool = True) -> Turn | None:
        """Take one of `size` places: None if the call has got it, else its turn in the queue. Without `wait`, it joins no queue."""
        ...

    def renew(self, key: str, who: str, now: float) -> bool:
        """Keep a place for longer. Return whether it was still held. A store whose leases expire renews them by itself."""
        ...

    def release(self, key: str, who: str, now: float) -> None:
        """Give a place back, or leave the queue of `reserve` or `lease`. Otherwise do nothing."""
        ...

    def add(self, key: str, amount: float, per: float | None, now: float, *, most: float | None = None) -> float | None:
        """Add to a sum over the last `per` seconds (None: for good), and return it. None: it would exceed `most`.

        A negative amount is taken off what was added first, so that the sum is never too low for the time that is left.
        `most` does not bound it, and the sum does not fall below 0.
        """
        ...

    def load(self, key: str, now: float) -> Entry | None:
        """Return the value under a key, or None."""
        ...

    def save(self, key: str, value: bytes | None, seconds: float | None, now: float) -> None:
        """Keep a value for `seconds` (None: for good). The value None forgets the key, and its sum."""
        ...

    async def areserve(self, key: str, who: str, limits: tuple[Limit, ...], now: float) -> Turn | None: ...
    async def acorrect(self, key: str, limit: Limit, now: float) -> None: ...
    async def athrottle(self, key: str, name: str, rate: float, seconds: float, now: float) -> None: ...
    async def alease(self, key: str, who: str, size: int, now: float, *, wait: bool = True) -> Turn | None: ...
    async def arenew(self, key: str, who: str, now: float) -> bool: ...
    async def arelease(self, key: str, who: str, now: float) -> None: ...
    async def aadd(
        self, key: str, amount: float, per: float | None, now: float, *, most: float | None = None
    ) -> float | None: ...
    async def aload(self, key: str, now: float) -> Entry | None: ...
    async def asave(self, key: str, value: bytes | None, seconds: float | None, now: float) -> None: ...
