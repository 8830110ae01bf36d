"""The driver of asynchronous streams, on asyncio and trio."""

from __future__ import annotations

import sys
from collections.abc import Coroutine, Generator
from contextvars import Context
from types import coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from fluxibly import driving
from fluxibly.drivers import Driver
from fluxibly.effects import END, PULL, Effect, Flow, More, Send
from fluxibly.types import Chunk, Request, Response, Restart

if TYPE_CHECKING:
    from fluxibly.pipeline import AsyncPipeline

T = TypeVar("T")


class AsyncDriver(Driver):
    pipeline: AsyncPipeline
    reading = False
    waits_for: Any = None
    """What the read under way waits for: on asyncio, a future."""
    scope: Any = None
    """On trio: the cancel scope of the read under way, which is entered and left within it."""
    cut = False
    """Whether `abort` cancelled the read."""

    def __init__(self, pipeline: AsyncPipeline, request: Request, flow: Flow[Response]) -> None:
        super().__init__(pipeline, request, flow)
        self.pending = self.first

    async def advance(self) -> Chunk | Restart | None:
        """The next event for the consumer; None at the end. Runs in the stream's context."""
        flow, source, call = self.flow, self.source, self.call
        effect = self.pending
        error: BaseException | None = None
        try:
            if self.failed_early is not None:
                raise self.failed_early
            while True:
                outcome: object = None
                try:
                    if effect is PULL:
                        if call.timed:
                            call.asked_at = call.clock()
                        source.chunk = END if self.iterator is None else await anext(self.iterator, END)
                    else:
                        outcome = await self.carry_out(effect)
                except BaseException as raised:  # noqa: BLE001  # it goes into the flow
                    if self.aborted(raised):
                        await self.close_all()
                        return None
                    error = raised
                try:
                    effect = flow.send(outcome) if error is None else driving.throw(flow, error)
                finally:
                    error = None  # it refers to this frame
                if type(effect) is Chunk:
                    self.pending = PULL
                    if self.output:
                        self.delivered.append(effect.text)
                    else:
                        self.count(effect)
                    return effect
                if type(effect) is More:
                    self.pending = effect
                    self.count(effect.chunk)
                    return effect.chunk
                if type(effect) is Restart and self.restart():
                    self.pending = effect
                    return effect
        except StopIteration as stop:
            await self.close_all()
            return self.finish(stop.value)
        except BaseException as error:
            await self.close_all()
            self.raise_interrupted(error)
            raise

    async def carry_out(self, effect: Effect) -> object:
        if isinstance(effect, Send):
            self.admit(effect.request)
            await self.release()
            self.iterator = aiter(self.pipeline.open(effect.request))
            self.source.chunk = await anext(self.iterator, END)
            return self.source
        if isinstance(effect, (More, Restart)):
            return self.call.restarts
        return await self.pipeline.carry_out(effect, self.flow)

    async def release(self) -> None:
        """Close the provider's stream."""
        iterator, self.iterator = self.iterator, None
        aclose = getattr(iterator, "aclose", None)
        if aclose is not None:
            await aclose()

    async def close_all(self) -> None:
        self.end()
        try:
            driving.close(self.flow)
        finally:
            await self.release()

    async def read_on_trio(self) -> Chunk | Restart | None:
        """`advance`, in a scope that `abort` can cancel."""
        import trio

        with trio.CancelScope() as self.scope:
            return await in_context(self.context, self.advance(), self)
        return None  # it was cancelled while it released the provider's stream

    def abort(self) -> None:
        """End the read under way: by the provider's own `abort`, or else by a cancellation that goes no further."""
        if hasattr(self.iterator, "abort"):
            super().abort()
        elif self.reading:
            cancel = getattr(self.scope or self.waits_for, "cancel", None)
            if cancel is not None:
                self.cut = True
                cancel()

    def aborted(self, error: BaseException) -> bool:
        return super().aborted(error) or (self.cut and not _is_cancelled_by_others())

    async def aclose(self) -> None:
        if self.ended:
            return
        self.closing = True
        if self.reading:
            self.abort()  # the task that is in the read closes all when it is back
        else:
            await in_context(self.context, self.close_all(), self)

    def let_go(self) -> None:
        """Without an await: the flow ends now; dropping an async generator makes its event loop close it."""
        if self.ended or self.reading:
            return
        self.closing = True
        self.end()
        try:
            self.context.run(driving.close, self.flow)
        finally:
            self.abort()
            self.iterator = None


def on_trio() -> bool:
    trio = sys.modules.get("trio")
    return trio is not None and bool(trio.lowlevel.in_trio_run())


def _is_cancelled_by_others() -> bool:
    """Whether the task is to end. On trio the next await tells."""
    if on_trio():
        return False
    import asyncio

    task = asyncio.current_task()
    return task is not None and bool(task.cancelling())


@coroutine
def in_context(context: Context, work: Coroutine[Any, Any, T], driver: AsyncDriver) -> Generator[Any, Any, T]:
    """Await `work` with each of its steps run in `context`."""
    run = context.run
    try:
        waits_for = run(work.send, None)
        while True:
            driver.waits_for = waits_for
            try:
                value = yield waits_for
            except BaseException as error:  # noqa: BLE001  # it goes into the work
                waits_for = run(work.throw, error)
            else:
                waits_for = run(work.send, value)
    except StopIteration as stop:
        result: T = stop.value
        return result
