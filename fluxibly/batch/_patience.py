"""The fate of rows whose call failed though asking again may help: they wait, or fail, or the whole run stops."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

from fluxibly.errors import (
    CircuitOpen,
    ConnectionFailed,
    DeadlineExceeded,
    ProviderError,
    QueueFull,
    RateLimitError,
    RateLimitWait,
    RequestTimeout,
    error_type,
)

AT_MOST, AT_FIRST = 300.0, 60.0
"""The seconds for which a service may answer nobody, and those before it has answered anybody, until the run stops."""
_SHORTEST, _LONGEST = 0.5, 30.0
"""The bounds of the seconds before a row is asked again."""
_MOST_REFUSALS = 20
"""The times that a row is refused for its rate, while others are answered, until it fails: it may be too large for any rate."""
_FAILURES, _FAILING_FOR = 10, 2.0
"""An outage begins with so many failed attempts in so many seconds, and none that was answered between them."""


def may_help(error: BaseException, attempts: int, *, was_answered: bool = False) -> bool:
    """Return whether asking again may help against the error of a call that made these attempts.

    Args:
        was_answered: whether the service has answered this batch. Then a refused connection means that it restarts.
    """
    if isinstance(error, (RateLimitWait, QueueFull, CircuitOpen)):
        return True
    if isinstance(error, DeadlineExceeded):
        return not attempts  # its time went by in a queue of ours
    if isinstance(error, ConnectionFailed) and was_answered:
        return True
    return isinstance(error, ProviderError) and error.retryable


class Patience:
    """Decides about the rows that failed though asking again may help, after all that the stack's own `Retry` did.

    - What was never sent has not failed. It waits, and is asked again.
    - If others were answered since the row was sent, the failure is the row's own. Only if it was refused for its rate, or no server
      listened just then, it waits.
    - If nobody was answered since, it is an outage: one row asks at growing intervals, all others wait. After `AT_MOST` seconds
      that row is put aside, and another is asked; if nobody answers that one either, the run stops.

    The attempts inside the stack count too. Else an outage would begin only once a row had used up its retries, each of which
    waits in the queues of the stack behind all other rows.

    Args:
        begins: is called when an outage begins, with the row that asks during it.
    """

    def __init__(self, begins: Callable[[Any], object]) -> None:
        self.stopped: str | None = None
        """Why the run has to stop."""
        self.heard_at = -math.inf
        """When the service last answered."""
        self._begins = begins
        self._asks: object | None = None
        """The row that asks during an outage. None: the first that comes."""
        self._began_at: float | None = None
        """When the outage began. None: there is none."""
        self._failures, self._failing_since = 0, 0.0
        """The failed attempts since the service last answered, and the time of the first."""
        self._pauses = 0
        self._has_put_aside = False
        self._waiting: deque[Any] = deque()

    @property
    def is_out(self) -> bool:
        """Whether there is an outage, so that nothing new is to be begun."""
        return self._began_at is not None

    def bars(self, row: object) -> bool:
        """Return whether a row has to wait, because another asks during an outage."""
        return self._began_at is not None and self._asks is not row

    def ended(self, row: object, error: BaseException | None) -> None:
        """Note how an attempt of a row has ended."""
        if error is None:
            self.heard()
        elif isinstance(error, ProviderError) and not isinstance(error, RateLimitError):
            if error.retryable or isinstance(error, (ConnectionFailed, RequestTimeout)):
                self._failed(row)
            else:
                self.heard()

    def _failed(self, row: object) -> None:
        now = time.monotonic()
        if not self._failures:
            self._failing_since = now
        self._failures += 1
        if not self.is_out and self._failures >= _FAILURES and now - self._failing_since >= _FAILING_FOR:
            self._begin(row)

    def _begin(self, row: object) -> None:
        """Begin an outage."""
        self._asks = row
        self._began_at = self._failing_since if self._failures else time.monotonic()
        self._begins(row)

    def heard(self) -> None:
        """Note that the service has answered, if only with an error that is about one row. An outage is over then."""
        self.heard_at = time.monotonic()
        self._failures = 0
        if self._began_at is not None:
            self._asks = self._began_at = None
            self._pauses, self._has_put_aside = 0, False
            while self._waiting:
                self._waiting.popleft().set()

    async def again(
        self, row: object, error: BaseException, sent_at: float, refusals: int
    ) -> Literal["again", "failed", "aside"]:
        """Wait until a row is to be asked again, and return "again".

        "failed": it is not, or the run has to stop. "aside": the same, but whether it has failed shows only when another is answered.

        Args:
            row: what asks the row.
            error: see `may_help`.
            sent_at: when its last attempt began.
            refusals: how often this was asked of the row before.
        """
        if isinstance(error, (RateLimitWait, QueueFull, DeadlineExceeded)):
            await _sleep(min(_pause(error, refusals), _LONGEST))
            return "again"
        if self.heard_at > sent_at and not isinstance(error, CircuitOpen):
            passes = isinstance(error, RateLimitError) or (isinstance(error, ConnectionFailed) and not error.retryable)
            if not passes or refusals >= _MOST_REFUSALS:
                return "failed"
            await _sleep(_pause(error, refusals))
            return "again"
        if self.bars(row):
            await self.turn(row)
            return "again"
        return await self._ask_on(row, error)

    async def _ask_on(self, row: object, error: BaseException) -> Literal["again", "failed", "aside"]:
        """Wait for the next time that the row which asks during an outage may do so."""
        if self._began_at is None:
            self._begin(row)
        now, began_at = time.monotonic(), self._began_at or 0.0
        pause = _pause(error, self._pauses)
        most = AT_FIRST if self.heard_at == -math.inf else AT_MOST
        if now + pause - began_at <= most:
            self._pauses += 1
            await _sleep(pause)
            return "again"
        if self._has_put_aside or _wanted(error) > most:
            self.stopped = answers_nobody(error)
            return "failed"
        self._has_put_aside = True
        return "aside"

    async def turn(self, row: object) -> None:
        """Wait until there is no outage, or it is the turn of this row to ask."""
        import anyio  # late, to keep `import fluxibly` fast

        while self.bars(row):
            if self._asks is None:
                self._asks = row
                return
            event = anyio.Event()
            self._waiting.append(event)
            await event.wait()

    def pass_on(self, row: object) -> None:
        """If it is the turn of this row to ask, let another do so."""
        if self._asks is row:
            self._asks = None
            if self._waiting:
                self._waiting.popleft().set()


def answers_nobody(error: BaseException) -> str:
    """Return why a run stops at an outage."""
    asked = f" (it asks to wait {_wanted(error):.0f} s)" if _wanted(error) else ""
    return f"the service answers nobody: {named(error)}{asked}"


def named(error: BaseException) -> str:
    """Return the class of an error, and the HTTP status if there is one."""
    status = error.status if isinstance(error, ProviderError) else None
    return error_type(error) + (f" ({status})" if status else "")


def _wanted(error: BaseException) -> float:
    """Return the seconds that a service asks to wait."""
    wanted = error.retry_after if isinstance(error, ProviderError) else None
    return 0.0 if wanted is None else max(wanted, 0.0)


def _pause(error: BaseException, times: int) -> float:
    return max(min(_SHORTEST * 2.0 ** min(times, 10), _LONGEST), _wanted(error))


async def _sleep(seconds: float) -> None:
    import anyio  # late, as above

    await anyio.sleep(seconds)
