"""What happens to rows whose call failed though asking again may help: they wait, or fail, or the whole run stops."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Any

from fluxibly.errors import (
    CircuitOpen,
    DeadlineExceeded,
    ProviderError,
    QueueFull,
    RateLimitError,
    RateLimitWait,
    error_type,
)

AT_MOST, AT_FIRST = 300.0, 60.0
"""The seconds for which a service may answer nobody, and those before it has answered anybody, until the run stops."""
_SHORTEST, _LONGEST = 0.5, 30.0
"""The bounds of the seconds before a row is asked again."""
_MOST_REFUSALS = 20
"""The times that a row is refused for its rate, while others are answered, until it fails: it may be too large for any rate."""


def may_help(error: BaseException, attempts: int) -> bool:
    """Return whether asking again may help against the error of a call that made these attempts."""
    if isinstance(error, (RateLimitWait, QueueFull, CircuitOpen)):
        return True
    if isinstance(error, DeadlineExceeded):
        return not attempts  # its time went by in a queue of ours
    return isinstance(error, ProviderError) and error.retryable


class Patience:
    """Decides about the rows that failed though asking again may help, after all that the stack's own `Retry` did.

    - What was never sent has not failed. It waits, and is asked again.
    - If others were answered since the row was sent, the failure is the row's own. Only if it was refused for its rate, it waits.
    - If nobody was answered since, it is an outage: one row asks at growing intervals, all others wait. After `AT_MOST` seconds
      that row fails, and another is asked; if nobody answers that one either, the run stops.
    """

    def __init__(self) -> None:
        self.stopped: str | None = None
        """Why the run has to stop."""
        self.heard_at = -math.inf
        """When the service last answered."""
        self._asks: object | None = None
        """The row that asks during an outage."""
        self._began_at: float | None = None
        self._pauses = 0
        self._has_given_up = False
        self._waiting: deque[Any] = deque()

    @property
    def is_out(self) -> bool:
        """Whether there is an outage, so that nothing new is to be begun."""
        return self._asks is not None

    def heard(self) -> None:
        """Note that the service has answered, if only with an error that is about one row. An outage is over then."""
        self.heard_at = time.monotonic()
        if self._began_at is not None:
            self._asks = self._began_at = None
            self._pauses, self._has_given_up = 0, False
            while self._waiting:
                self._waiting.popleft().set()

    async def again(self, row: object, error: BaseException, sent_at: float, refusals: int) -> bool:
        """Wait until a row is to be asked again. Return whether it is; if not, it has failed, or the run has to stop.

        Args:
            error: see `may_help`.
            sent_at: when its last attempt began.
            refusals: how often this was asked of the row before.
        """
        if isinstance(error, (RateLimitWait, QueueFull, DeadlineExceeded)):
            await _sleep(min(_pause(error, refusals), _LONGEST))
            return True
        if self.heard_at > sent_at and not isinstance(error, CircuitOpen):
            if not isinstance(error, RateLimitError) or refusals >= _MOST_REFUSALS:
                return False
            await _sleep(_pause(error, refusals))
            return True
        if self._asks not in (None, row):
            await self.wait()
            return True
        return await self._ask_on(row, error)

    async def _ask_on(self, row: object, error: BaseException) -> bool:
        """Wait for the next time that the row which asks during an outage may do so. Return whether it may."""
        now = time.monotonic()
        self._asks = row
        if self._began_at is None:
            self._began_at = now
        pause = _pause(error, self._pauses)
        most = AT_FIRST if self.heard_at == -math.inf else AT_MOST
        if now + pause - self._began_at <= most:
            self._pauses += 1
            await _sleep(pause)
            return True
        if self._has_given_up or _wanted(error) > most:
            asked = f" (it asks to wait {_wanted(error):.0f} s)" if _wanted(error) else ""
            self.stopped = f"the service answers nobody: {named(error)}{asked}"
        self._has_given_up = True
        self._asks = None
        if self._waiting:
            self._waiting.popleft().set()
        return False

    async def wait(self) -> None:
        """Wait until an outage is over, or it is this row's turn to ask."""
        import anyio  # late, to keep `import fluxibly` fast

        event = anyio.Event()
        self._waiting.append(event)
        await event.wait()


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
