"""The worker threads in which a store that does I/O carries out its async methods."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from anyio import CapacityLimiter
    from anyio.lowlevel import RunVar

T = TypeVar("T")

_numbers = count()


class WorkerThreads:
    """A bounded number of worker threads for each event loop, so that a store that hangs does not use up those of others."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._name = f"fluxibly store {next(_numbers)}"
        self._limiter: RunVar[CapacityLimiter] | None = None

    async def run(self, work: Callable[[], T], *, abandon: bool = False) -> T:
        """Do some work in a thread, and return its result. A cancellation waits for it, unless it may be abandoned."""
        from anyio import CapacityLimiter, to_thread  # late, to keep the import of stores fast
        from anyio.lowlevel import RunVar

        if self._limiter is None:
            self._limiter = RunVar(self._name)
        limiter = self._limiter.get(None)
        if limiter is None:
            limiter = CapacityLimiter(self._most)
            self._limiter.set(limiter)
        return await to_thread.run_sync(work, abandon_on_cancel=abandon, limiter=limiter)
