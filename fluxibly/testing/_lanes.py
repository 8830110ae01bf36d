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
    from fluxibly.flow.effects import Adopt, Effect, Lane, Source


class LaneTime:
    """The time in a lane.

    Contexts are copied, by a stream of a call within the call for example, and a copy is beyond the reach of a later
    `ContextVar.set`. So the copies share this object, and what changes is in here.
    """

    def __init__(self, outer: LaneTime | None) -> None:
        self.now: float | None = None
        """The time while the lane carries an effect out. At other times it is None, and the time of `outer` applies."""
        self.outer = outer
        """The lane around this lane; None if it is in none."""


class LaneClock(Protocol):
    """A `VirtualClock`."""

    lane: ContextVar[LaneTime | None]

    def now(self) -> float: ...
    def go_on_to(self, time: float) -> None: ...


class _Virtual(Lanes):
    def __init__(self, clock: LaneClock, stack: Any) -> None:
        super().__init__(stack)
        self._clock = clock
        self._times: dict[Lane, LaneTime] = {}
        self.now = clock.now

    def _begin(self, lane: Lane, context: Context) -> LaneTime:
        """Let the time of a lane begin now."""
        time = self._time_of(lane)
        time.now = self.now()
        context.run(self._clock.lane.set, time)
        return time

    def _ended(self, lane: Lane, time: LaneTime) -> None:
        """Note when a lane ended. What goes on in its contexts afterwards takes the time of the call."""
        lane.until, time.now = time.now, None

    def _adopted(self, effect: Adopt) -> None:
        """Let a stream that another lane takes over go on in the time of that lane."""
        if effect.into is not None:
            self._time_of(effect.lane).outer = self._time_of(effect.into)

    def _time_of(self, lane: Lane) -> LaneTime:
        if lane not in self._times:
            self._times[lane] = LaneTime(self._clock.lane.get())
        return self._times[lane]

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
        self._ended(lane, time)

    def wait(self, lanes: Sequence[Lane], seconds: float | None) -> Lane | None:
        """Let time pass until one of these lanes is done, and return it. Return None if the seconds pass first."""
        return self._waited(lanes, seconds)

    def adopt(self, effect: Adopt) -> tuple[Any, Source]:
        """Take over the stream of a lane. Return it with its source."""
        self._adopted(effect)
        return super().adopt(effect)


class AsyncVirtualLanes(_Virtual, AsyncLanes):
    """The lanes of an asynchronous call."""

    async def begin(self, lane: Lane, effect: Effect, context: Context) -> None:
        """Carry an effect out."""
        import anyio

        time = self._begin(lane, context)
        try:
            lane.outcome = await in_context(context, self.work(lane, effect, context))
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as error:  # noqa: BLE001  # it is raised where the lane is awaited
            lane.error = throwable(error)
        finally:
            self._ended(lane, time)

    async def wait(self, lanes: Sequence[Lane], seconds: float | None) -> Lane | None:
        """Let time pass until one of these lanes is done, and return it. Return None if the seconds pass first."""
        from anyio.lowlevel import checkpoint

        await checkpoint()
        return self._waited(lanes, seconds)

    async def adopt(self, effect: Adopt) -> tuple[Any, Source]:
        """Take over the stream of a lane. Return it with its source."""
        self._adopted(effect)
        return await super().adopt(effect)
