"""The time limits of one attempt, which the HTTP shells hold themselves.

A read timeout of a socket, or of httpx, starts anew with every byte, so a server that trickles outlasts it. Here each
wait asks `left()` first, which knows what remains of the phase and of the total.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fluxibly.config import Timeouts
    from fluxibly.errors import Phase

DRAIN_TIME = 0.01
"""Seconds to wait for the end of a body whose stream is over, so that its connection can be used again."""


class LimitPassed(Exception):  # it is no failure until the shell says which limit it was
    """A time limit passed; `Limits.passed` says which."""


class Aborted(Exception):  # it was asked for
    """The attempt was given up from elsewhere."""


class ConnectionLost(Exception):
    """The other side ended the connection; `silent` if it did so before the first byte of an answer."""

    def __init__(self, *, silent: bool) -> None:
        super().__init__("the connection ended")
        self.silent = silent


class NotHTTP(Exception):  # it says what came
    """What came is not HTTP/1.1."""


class Limits:
    """What remains of an attempt's time. It begins when it is made, connecting."""

    __slots__ = ("_aborted", "_end", "_phase", "_times", "_total", "_total_end", "_wait", "passed", "streaming")

    def __init__(self, times: Timeouts, *, total: float | None, streaming: bool = False) -> None:
        now = monotonic()
        self._times = times
        self.streaming = streaming
        self._total = total
        self._total_end = None if total is None else now + total
        self._phase: Phase = "connect"
        self._end = None if times.connect is None else now + times.connect
        self.passed: Phase = "connect"
        """The limit that the last wait ran under."""
        self._wait: Callable[[], None] | None = None
        self._aborted = False

    def connecting(self) -> None:
        """A connection begins to be made: its limit runs from now."""
        self._phase = "connect"
        self._end = None if self._times.connect is None else monotonic() + self._times.connect

    def sent(self) -> None:
        """The request is on its way: the limit on the answer's head runs from now, however many reads it takes."""
        self._phase = "first_byte"
        self._end = None if self._times.first_byte is None else monotonic() + self._times.first_byte

    def handed_over(self) -> None:
        """The request goes to a transport that connects, sends and waits in one: the limits on that run together."""
        connect, first_byte = self._times.connect, self._times.first_byte
        self._phase = "first_byte"
        self._end = None if connect is None or first_byte is None else monotonic() + connect + first_byte

    def answered(self) -> None:
        """The head is there: from now each read may take the idle limit."""
        self._phase = "idle"

    def refused(self) -> None:
        """The answer is an error: its body has to come within the idle limit, however it trickles."""
        if self._times.idle is not None:
            end = monotonic() + self._times.idle
            self._total_end = end if self._total_end is None else min(self._total_end, end)

    def left(self) -> float | None:
        """Seconds that the next wait may take; None for no limit.

        Raises:
            LimitPassed: nothing is left.
        """
        phase = self._phase
        self.passed = phase
        left = self._times.idle
        if phase != "idle":
            left = None if self._end is None else self._end - monotonic()
        if self._total_end is not None:
            of_total = self._total_end - monotonic()
            if left is None or of_total < left:
                self.passed = "total"
                left = of_total
        if left is not None and left <= 0:
            raise LimitPassed
        return left

    def value(self) -> float | None:
        """The limit that passed, in seconds."""
        if self.passed == "total":
            return self._total if self._total is not None else self._times.idle
        return getattr(self._times, self.passed)  # type: ignore[no-any-return]  # a float or None, by its name

    def waits(self, end_wait: Callable[[], None] | None) -> None:
        """Say how the waits from now on are ended from elsewhere; None if they cannot be.

        Raises:
            Aborted: they are to end at once.
        """
        self._wait = end_wait
        if self._aborted:
            raise Aborted

    def waited(self) -> None:
        """There is nothing to end from elsewhere any more: the connection may be another call's from now on."""
        self._wait = None

    def abort(self) -> None:
        """End the wait that is under way in another thread or task, and all later ones."""
        self._aborted = True
        end_wait = self._wait
        if end_wait is not None:
            end_wait()

    def for_httpx(self) -> dict[str, float | None]:
        """The `timeout` extension of an httpx request."""
        times, total = self._times, self._total
        first_byte = _least(times.first_byte, total)
        connect = _least(times.connect, total)
        return {"connect": connect, "read": first_byte, "write": first_byte, "pool": connect}


def _least(one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return one if other is None else other
    return min(one, other)
