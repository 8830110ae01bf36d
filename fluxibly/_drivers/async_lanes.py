"""The lanes of an asynchronous call: a task for each effect that takes work.

The tasks are not in a task group of the call: a group would have to be left before each chunk is delivered, because the
consumer may not be inside of a scope that it did not enter. So on trio they are system tasks. The call ends none of them
without waiting until it is gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import Context
from typing import Any

from fluxibly._drivers.endings import arun_endings, is_raised
from fluxibly._drivers.lanes import Lanes, StreamOfLane, report_given_up
from fluxibly._drivers.stepping import in_context, throwable
from fluxibly._loops import from_anywhere, trio_here, wait_for
from fluxibly.flow.effects import END, PULL, Adopt, Drop, Effect, Lane, Release, Send, Source, Start, Wait


class AsyncLanes(Lanes):
    """The lanes of one call. The flows are stepped in the task that makes the call."""

    def __init__(self, stack: Any) -> None:
        super().__init__(stack)
        self._changed: Any = None
        """The event that the call waits for, while it waits."""

    async def carry_out(self, effect: Send | Start | Wait | Drop) -> Lane | None:
        """Carry an effect out and return its outcome."""
        if isinstance(effect, Wait):
            return await self.wait(effect.lanes, effect.seconds)
        if isinstance(effect, Drop):
            await self.drop(effect.lanes)
        else:
            lane, begun, context = self.prepare(effect)
            if context is not None:
                await self.begin(lane, begun, context)
        return None

    async def begin(self, lane: Lane, effect: Effect, context: Context) -> None:
        """Begin work in a task."""
        lane.busy = True
        trio = trio_here()
        if trio is None:
            import asyncio  # late: it takes as long to import as all of fluxibly

            task = asyncio.get_running_loop().create_task(self._serve(lane, effect, context), context=context)
            task.add_done_callback(lambda _: self._done(lane))  # a task cancelled before its first step runs no code
            lane.task = task
        else:
            lane.task = trio.CancelScope()
            trio.lowlevel.spawn_system_task(self._serve_on_trio, lane, effect, context, context=context)

    async def _serve(self, lane: Lane, effect: Effect, context: Context) -> None:
        try:
            lane.outcome = await self.work(lane, effect, context)
        except BaseException as error:  # noqa: BLE001  # it is raised where the lane is awaited
            lane.error = throwable(error)

    async def _serve_on_trio(self, lane: Lane, effect: Effect, context: Context) -> None:
        import trio

        try:
            with lane.task:
                try:
                    lane.outcome = await self.work(lane, effect, context)
                except trio.Cancelled:
                    raise
                except BaseException as error:  # noqa: BLE001  # as above
                    lane.error = throwable(error)
        finally:
            self._done(lane)

    def _done(self, lane: Lane) -> None:
        lane.busy, lane.done = False, True
        if lane.dropped:
            lane.outcome = lane.error = None  # the frames of the error refer to the lane
        self._wake()

    async def work(self, lane: Lane, effect: Effect, context: Context) -> object:
        """Carry out an effect of a lane. Runs in `context`."""
        if isinstance(effect, Send):
            if not effect.request.call.streaming:
                return await self.stack.whole(effect)
            await _close(lane)
            iterator = aiter(self.stack.open(effect))
            lane.iterator = AsyncStreamOfLane(iterator, context)
            lane.source.chunk = await anext(iterator, END)
            return lane.source
        if effect is PULL:
            lane.source.chunk = await anext(lane.iterator, END)
            return None
        if isinstance(effect, Release):
            await _close(lane)
            return None
        return await self.stack.carry_out(effect, lane.flow, lane.call)

    async def wait(self, lanes: Sequence[Lane], seconds: float | None) -> Lane | None:
        """Wait until one of these lanes is done, and return it. Return None if the seconds pass first."""
        end = math.inf if seconds is None else self.now() + seconds
        while True:
            now = self.now()
            if (lane := self.find(lanes, now)) is not None or now >= end:
                return lane
            until = min(end, self.end_of(lanes))
            await self.await_change(until - now)

    async def await_change(self, seconds: float) -> None:
        """Wait until something has changed, at most for a number of seconds."""
        import anyio  # late, to keep `import fluxibly` fast

        self._changed = anyio.Event()
        await wait_for(self._changed, seconds)

    def waker(self) -> Callable[[], object]:
        """Return a function that ends a wait of these lanes, for any thread to call."""
        return from_anywhere(self._wake)

    def _wake(self) -> None:
        if self._changed is not None:
            self._changed.set()

    async def drop(self, lanes: Sequence[Lane]) -> None:
        """Give up lanes, and return when their tasks have ended. A cancellation meanwhile is raised afterwards."""
        given_up = [lane for lane in lanes if not lane.dropped]
        self.cut(given_up)
        try:
            await self._gone(given_up)
        finally:
            for lane in given_up:
                self.close_flow(lane)
            for lane in given_up:
                if lane.owns and lane.call.endings:
                    await arun_endings(lane.call)

    def cut(self, lanes: Sequence[Lane]) -> None:
        """Cancel what is under way in lanes."""
        for lane in lanes:
            lane.dropped = True
            if lane in self.open:
                self.open.remove(lane)
            self.stop(lane)
            if lane.busy and not lane.cleaning:
                with suppress(RuntimeError):  # its event loop has ended
                    lane.task.cancel()

    async def _gone(self, lanes: Sequence[Lane]) -> None:
        """Wait until the tasks of lanes have ended, and close their streams."""
        import anyio  # late, as above

        cancelled = None
        with anyio.CancelScope(shield=True):
            for lane in lanes:
                while lane.busy or lane.iterator is not None:
                    try:
                        if lane.busy:
                            self._changed = anyio.Event()
                            await self._changed.wait()
                        else:
                            await _release(lane)
                    except anyio.get_cancelled_exc_class() as error:  # asyncio's own cancellation passes every shield
                        cancelled = error
        if cancelled is not None:
            try:
                raise cancelled
            finally:
                del cancelled  # it refers to this frame

    async def adopt(self, effect: Adopt) -> tuple[Any, Source]:
        """Take over the stream of a lane. Return it with its source."""
        lane, into = effect.lane, effect.into
        lane.dropped = True
        if lane in self.open:
            self.open.remove(lane)
        iterator, lane.iterator = lane.iterator, None
        if into is not None and lane.call.streaming:
            await _release(into)
            into.iterator, into.source = iterator, lane.source
        return iterator, lane.source

    async def end(self) -> None:
        """Give up all lanes, because the call has ended."""
        if is_raised(GeneratorExit):  # a coroutine that is being closed cannot wait
            lanes = [*self.open]
            self.cut(lanes)
            for lane in lanes:
                if lane.owns and lane.call.endings:
                    await arun_endings(lane.call)  # which does not wait then either
        else:
            await self.drop([*self.open])


class AsyncStreamOfLane(StreamOfLane):
    def __aiter__(self) -> AsyncStreamOfLane:
        return self

    async def __anext__(self) -> Any:
        item = await in_context(self.context, _next(self.iterator))
        if item is END:
            raise StopAsyncIteration
        return item

    async def aclose(self) -> None:
        await in_context(self.context, _aclose(self.iterator))


async def _next(iterator: Any) -> object:
    return await anext(iterator, END)


async def _aclose(iterator: Any) -> None:
    aclose = getattr(iterator, "aclose", None)
    if aclose is not None:
        await aclose()


async def _close(lane: Lane) -> None:
    """Close the stream of a lane, if there is one."""
    iterator, lane.iterator = lane.iterator, None
    if iterator is not None:
        await iterator.aclose()


async def _release(lane: Lane) -> None:
    """Close the stream of a lane that is given up."""
    try:
        await _close(lane)
    except Exception as error:  # noqa: BLE001  # it belongs to an attempt that is over
        report_given_up("provider", error)
