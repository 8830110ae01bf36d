"""The lanes of a `VirtualClock`: branches that run at the same time in its time, without threads or tasks.

What goes on in two lanes does not meet before it is done. So a lane carries its effect out at once, on a time of its own, and
keeps the time at which it ended. A wait lets the clock go on to the earliest of these times.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import Context, ContextVar
from typing import TYPE_CHECKING, Any, Protocol

from fluxibly._drivers.async_lanes import AsyncLanes
from fluxibly._drivers.lanes import Lanes
from fluxibly._drivers.stepping import in_context, throwable
from fluxibly._drivers.sync_lanes import SyncLanes

if TYPE_CHECKING:
    from fluxibly.flow.effects import Effect, Lane


class LaneTime:
    """The time in a lane while it carries an effect out."""

    waits_for: Any = None

    def __init__(self, now: float) -> None:
        self.now = now


class LaneClock(Protocol):
    """A `VirtualClock`."""

    lane: ContextVar[LaneTime | None]

    def now(self) -> float: ...
    def go_on_to(self, time: float) -> None: ...


class _Virtual(Lanes):
    def __init__(self, clock: LaneClock, stack: Any) -> None:
        super().__init__(stack)
        self._clock = clock
        self.now = clock.now

    def _begin(self, lane: Lane, context: Context) -> LaneTime:
        """Let the time of a lane begin now."""
        time = LaneTime(self.now())
        self._set(lane, context, time)
        return time

    def _ended(self, lane: Lane, context: Context, time: LaneTime) -> None:
        """Note when a lane ended. What goes on in its contexts afterwards takes the time of the call."""
        lane.until = time.now
        self._set(lane, context, None)

    def _set(self, lane: Lane, context: Context, time: LaneTime | None) -> None:
        context.run(self._clock.lane.set, time)
        if lane.iterator is not None:
            lane.iterator.context.run(self._clock.lane.set, time)

    def _waited(self, lanes: Sequence[Lane], seconds: float | None) -> Lane | None:
        now = self.now()
        if (lane := self.find(lanes, now)) is not None:
            return lane
        until = self.end_of(lanes) if seconds is None else min(self.end_of(lanes), now + seconds)
        self._clock.go_on_to(until)
        return self.find(lanes, until)


class VirtualLanes(_Virtual, SyncLanes):
    """The lanes of a synchronous call."""

    def begin(self, lane: Lane, effect: Effect, context: Context) -> None:
        """Carry an effect out."""
        time = self._begin(lane, context)
        try:
            lane.outcome = context.run(self.work, lane, effect, context)
        except BaseException as error:  # noqa: BLE001  # it is raised where the lane is awaited
            lane.error = throwable(error)
        self._ended(lane, context, time)

    def wait(self, lanes: Sequence[Lane], seconds: float | None) -> Lane | None:
        """Let time pass until one of these lanes is done, and return it. Return None if the seconds pass first."""
        return self._waited(lanes, seconds)


class AsyncVirtualLanes(_Virtual, AsyncLanes):
    """The lanes of an asynchronous call."""

    async def begin(self, lane: Lane, effect: Effect, context: Context) -> None:
        """Carry an effect out."""
        import anyio

        time = self._begin(lane, context)
        try:
            lane.outcome = await in_context(context, self.work(lane, effect, context), time)
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as error:  # noqa: BLE001  # it is raised where the lane is awaited
            lane.error = throwable(error)
        finally:
            self._ended(lane, context, time)

    async def wait(self, lanes: Sequence[Lane], seconds: float | None) -> Lane | None:
        """Let time pass until one of these lanes is done, and return it. Return None if the seconds pass first."""
        from anyio.lowlevel import checkpoint

        await checkpoint()
        return self._waited(lanes, seconds)
