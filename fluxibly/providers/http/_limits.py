"""The time limits of an attempt.

A read timeout of a socket, or of httpx, restarts with every byte, so a server that sends a byte now and then outlasts
it. Here each read calls `left()` first, which returns the time that remains of the phase and of the total.

The phase "idle" differs. In a whole answer it is the time of one read. In a stream it is the time of one wait for a
chunk, however many reads that takes: the first read of a wait starts it, a keep-alive (`kept_alive`) starts it again,
and a chunk ends the wait (`end`), so that the time of the consumer does not count.

A call's deadline takes the place of the total, if it comes first. `LeashedLimits` has the other limits of middleware, and
`HeldLimits` can be ended by a leash, so that calls without a leash do not pay for them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

from fluxibly.limits import KEEP_ALIVES, ChunkWaits, least

if TYPE_CHECKING:
    from fluxibly.errors import Phase
    from fluxibly.limits import Leash, Timeouts

DRAIN_TIME = 0.01
"""Seconds to wait for the rest of a body whose stream has ended, so that its connection can be used again."""


class LimitPassed(Exception):  # users get the error that `translated` makes of it
    """A time limit passed. `Limits.passed` names it."""


class Aborted(Exception):
    """Another thread or task has given the attempt up."""


class ConnectionLost(Exception):
    """The server ended the connection. `silent`: before the first byte of a response."""

    def __init__(self, *, silent: bool) -> None:
        super().__init__("the connection ended")
        self.silent = silent


class NotHTTP(Exception):
    """The received bytes are not valid HTTP/1.1. The message says why."""


class Limits:
    """The remaining time of an attempt. The time runs from the construction, and the first phase is connecting.

    Args:
        times: the limits of the phases.
        total: seconds for the whole attempt.
        deadline: seconds until the call's deadline.
        streaming: whether the answer is a stream.
    """

    __slots__ = (
        "_aborted",
        "_times",
        "_total",
        "_total_end",
        "_total_phase",
        "_wait",
        "_wait_end",
        "end",
        "passed",
        "phase",
        "streaming",
        "strict",
    )

    def __init__(
        self, times: Timeouts, *, total: float | None, deadline: float | None = None, streaming: bool = False
    ) -> None:
        # Monotonic, because the wall clock can be set forwards or back during a call.
        now = monotonic()
        self._times = times
        self.streaming = streaming
        self._total_phase: Phase = "total"
        if deadline is not None and (total is None or deadline <= total):
            self._total_phase = "deadline"
            total = deadline
        self._total = total
        self._total_end = None if total is None else now + total
        self.phase: Phase = "connect"
        """The phase of the attempt."""
        self.end = None if times.connect is None else now + times.connect
        """The end of the phase; None: no limit. Of an idle stream, the end of the wait under way; None between waits.

        The reader of a stream sets it to None when there is a chunk. It is no method, because there are many chunks."""
        self._wait_end = 0.0
        """The end of the wait under way, whatever keeps it alive."""
        self.passed: Phase = "connect"
        """The limit that applied to the last wait."""
        self.strict = False
        """Whether middleware have set that limit, and no keep-alive restarts it."""
        self._wait: Callable[[], None] | None = None
        self._aborted = False

    def connecting(self) -> None:
        """Start the limit on connecting."""
        # It starts again here, so that a wait for a turn, or a stale connection, does not shorten the time to connect.
        self.phase = "connect"
        self.end = None if self._times.connect is None else monotonic() + self._times.connect

    def sent(self) -> None:
        """Start the limit on the head of the response, however many reads the head takes."""
        self.phase = "first_byte"
        self.end = None if self._times.first_byte is None else monotonic() + self._times.first_byte

    def handed_over(self) -> None:
        """Start the limits on connecting and on the head of the response together."""
        # An httpx transport connects, sends and waits in one call, so its phases cannot be timed apart.
        connect, first_byte = self._times.connect, self._times.first_byte
        self.phase = "first_byte"
        self.end = None if connect is None or first_byte is None else monotonic() + connect + first_byte

    def answered(self) -> None:
        """Start the idle limit."""
        self.phase = "idle"
        self.end = None

    def kept_alive(self) -> None:
        """Start the idle limit of the wait again, because the server has sent a whole event without output."""
        if self.end is not None and self._times.idle is not None:
            self.end = min(monotonic() + self._times.idle, self._wait_end)

    @property
    def only_kept_alive(self) -> bool:
        """Whether keep-alives have made the wait as long as it may be."""
        return self.end is not None and self.end == self._wait_end

    def refused(self) -> None:
        """Apply the idle limit to the whole body, because the response is an error."""
        # The caller waits for the error, which a body that arrives byte by byte must not hold back.
        if self._times.idle is not None:
            end = monotonic() + self._times.idle
            self._total_end = end if self._total_end is None else min(self._total_end, end)

    def left(self) -> float | None:
        """Return the seconds that the next wait may take; None means no limit.

        Raises:
            LimitPassed: no time is left.
        """
        phase = self.phase
        self.passed = phase
        now = monotonic()
        if phase != "idle" or self.end is not None:
            left = None if self.end is None else self.end - now
        else:
            left = self._times.idle
            if left is not None and self.streaming:
                self.end = now + left
                self._wait_end = now + KEEP_ALIVES * left
        if self._total_end is not None:
            of_total = self._total_end - now
            if left is None or of_total < left:
                self.passed = self._total_phase
                left = of_total
        if left is not None and left <= 0:
            raise LimitPassed
        return left

    def passed_in_httpx(self, *, connecting: bool) -> None:
        """Note which limit a timeout of httpx means. Its own clock ends a wait, and does not say for which limit."""
        self.strict = False
        if self._total_end is not None and monotonic() >= self._total_end:
            self.passed = self._total_phase
        else:
            self.passed = "connect" if connecting else self.phase

    def value(self) -> float | None:
        """Return the limit that passed, in seconds. A deadline is no such limit."""
        if self.passed == "total":
            return self._total
        return getattr(self._times, self.passed)  # type: ignore[no-any-return]  # a float or None, by its name

    def waits(self, end_wait: Callable[[], None] | None) -> None:
        """Set the function with which `abort` ends the waits from now on; None if they cannot be ended.

        Raises:
            Aborted: `abort` was called.
        """
        # The function is set before the flag is read, and `abort` does the reverse, so at least one of the two sees the
        # other.
        self._wait = end_wait
        if self._aborted:
            raise Aborted

    def waited(self) -> None:
        """Forget the function of `waits`."""
        # The attempt's connection may serve another call from now on, which an abort must not end.
        self._wait = None

    def abort(self) -> None:
        """End the wait under way in another thread or task, and all later waits."""
        self._aborted = True
        end_wait = self._wait
        if end_wait is not None:
            end_wait()

    @property
    def aborted(self) -> bool:
        """Whether `abort` was called."""
        return self._aborted

    def hold(self) -> None:
        """Let the leash of the call, if it has one, end the waits from now on.

        Raises:
            Aborted: the leash has been stopped.
        """

    def over(self) -> None:
        """Let nothing end the waits any more. The connection may be given to another call."""
        self._wait = None

    def for_httpx(self) -> dict[str, float | None]:
        """Return the `timeout` extension of an httpx request, for the time until the head of the response."""
        times, total = self._times, self._total
        first_byte = least(times.first_byte, total)
        connect = least(times.connect, total)
        return {"connect": connect, "read": first_byte, "write": first_byte, "pool": connect}

    def body_for_httpx(self) -> float | None:
        """Return the limit on each read of the body, for httpx."""
        left = None if self._total_end is None else max(0.001, self._total_end - monotonic())
        return least(self._times.idle, left)


class LeashedLimits(Limits):
    """The remaining time of a streamed attempt, with limits of middleware on the waits for its chunks."""

    __slots__ = ("_waits",)

    def __init__(self, times: Timeouts, leash: Leash, *, total: float | None, deadline: float | None) -> None:
        super().__init__(times, total=total, deadline=deadline, streaming=True)
        self._waits = ChunkWaits(leash)
        self._waits.end(monotonic())

    def left(self) -> float | None:
        """Return the seconds that the next wait may take; None means no limit.

        Raises:
            LimitPassed: no time is left.
        """
        self.strict = False
        left = super().left()
        now = monotonic()
        end = self._waits.end(now)
        if end is None or (left is not None and left <= end - now):
            return left
        self.strict = True
        self.passed = self._waits.phase
        if end <= now:
            raise LimitPassed
        return end - now

    def came(self, *, output: bool) -> None:
        """Note that a read brought chunks, so that the time of the consumer does not count."""
        self._waits.came(monotonic(), output=output)

    def value(self) -> float | None:
        """Return the limit that passed, in seconds."""
        return self._waits.limit if self.strict else super().value()


class HeldLimits(Limits):
    """The remaining time of a whole attempt under a leash. Stopping the leash ends the attempt, until it is `over`."""

    __slots__ = ("_leash", "_lock")

    def __init__(self, times: Timeouts, leash: Leash, *, total: float | None, deadline: float | None) -> None:
        super().__init__(times, total=total, deadline=deadline)
        self._leash = leash
        # Reentrant, because a signal handler may stop the leash while its own thread ends the attempt.
        self._lock = threading.RLock()

    def hold(self) -> None:
        """Let the leash end the waits from now on.

        Raises:
            Aborted: the leash has been stopped.
        """
        self._leash.hold(self.abort)
        self.waits(None)

    def over(self) -> None:
        """Let nothing end the waits any more. The connection may be given to another call."""
        # An abort under way in another thread comes to its end first: it would cut the connection under the next call.
        with self._lock:
            self.waited()
        self._leash.release(self.abort)

    def abort(self) -> None:
        """End the wait under way in another thread or task, and all later waits."""
        with self._lock:
            super().abort()
