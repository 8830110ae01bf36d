"""A clock that runs a thousand times as fast as the system's, with real waits, threads and tasks."""

from __future__ import annotations

import time
from typing import Any

import anyio

from fluxibly._drivers.async_lanes import AsyncLanes
from fluxibly._drivers.sync_lanes import SyncLanes
from fluxibly._threads import NotInTime, Worker

SPEED = 1000


def now() -> float:
    return time.monotonic() * SPEED


class FastWorker(Worker):
    """The thread of a limited call, to put in place of `fluxibly._drivers.limited.Worker`."""

    def run(self, call: Any, seconds: float | None) -> Any:
        return super().run(call, None if seconds is None else seconds / SPEED)


class FastLanes(SyncLanes):
    now = staticmethod(now)

    def await_change(self, seconds: float) -> None:
        super().await_change(seconds / SPEED)


class FastAsyncLanes(AsyncLanes):
    now = staticmethod(now)

    async def await_change(self, seconds: float) -> None:
        await super().await_change(seconds / SPEED)


class FastClock:
    """A clock of a pipeline. A second of it is a millisecond."""

    def __init__(self) -> None:
        self.now = now
        self.sleeps: list[float] = []

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds / SPEED)

    async def asleep(self, seconds: float) -> None:
        await anyio.sleep(seconds / SPEED)

    async def awithin(self, seconds: float, call: Any) -> Any:
        with anyio.move_on_after(max(0, seconds) / SPEED):
            return await call()
        raise NotInTime

    lanes = staticmethod(FastLanes)
    alanes = staticmethod(FastAsyncLanes)
