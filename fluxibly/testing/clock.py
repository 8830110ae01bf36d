"""A clock that moves only when someone sleeps."""

from __future__ import annotations

import threading


class VirtualClock:
    """A `fluxibly.pipeline.Clock` for tests: `Pipeline(provider, middleware, clock=VirtualClock())`.

    Its time starts at 0 and moves on at once by each sleep, so that nothing waits. `sleeps` has each one's seconds.
    """

    def __init__(self) -> None:
        self.sleeps: list[float] = []
        self._time = 0.0
        self._lock = threading.Lock()

    def now(self) -> float:
        """The time, in seconds."""
        return self._time

    def advance(self, seconds: float) -> None:
        """Let time pass without noting a sleep."""
        with self._lock:
            self._time += seconds

    def sleep(self, seconds: float, /) -> None:
        """Note a sleep and let its time pass."""
        with self._lock:
            self.sleeps.append(seconds)
            self._time += seconds

    async def asleep(self, seconds: float, /) -> None:
        """`sleep`, for async pipelines. Other tasks get a turn, and a cancellation is noticed."""
        from anyio.lowlevel import checkpoint

        await checkpoint()
        self.sleep(seconds)
