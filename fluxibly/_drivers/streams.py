"""The drivers of streams: they carry out what a flow asks for, up to the next event for the consumer.

The flow and the provider of a stream are stepped in a context of their own, so that what they set in context
variables (the current span, above all) never shows in the consumer's code between two chunks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, copy_context
from types import coroutine
from typing import Any, TypeVar

from fluxibly import _abandoned
from fluxibly._drivers import stepping
from fluxibly._drivers.diagnosis import explain
from fluxibly._drivers.stack import AsyncStack, SyncStack
from fluxibly.aggregate import as_chunk
from fluxibly.errors import StreamInterrupted, interrupted
from fluxibly.flow.combinators import resend_refused
from fluxibly.flow.effects import END, PULL, Effect, Flow, More, Send, Sleep, Source
from fluxibly.types import Chunk, Request, Response, Restart


class StreamDriver:
    """The state of a stream, and every decision about it that needs no I/O.

    Both drivers do the same in a loop: carry out the effect at hand, send the outcome into the flow, and look at the
    effect that comes back. An event for the consumer is delivered, and becomes the effect at hand when the consumer
    asks for more: there is nothing to carry out for it then, save that after a chunk of the provider's the next one
    has to be read (PULL).
    """

    def __init__(self, stack: SyncStack | AsyncStack, request: Request, flow: Flow[Response]) -> None:
        self.stack = stack
        self.request = request
        self.call = request.call
        self.flow = flow
        self.context: Context = copy_context()
        self.iterator: Any = None
        """The provider's stream; there may be none yet."""
        self.source = Source(END)
        self.delivered = self.call.delivered
        self.output = False
        self.response: Response | None = None
        self.closing = self.ended = False
        self.failed_early: Exception | None = None
        self.first: Effect = Sleep(0.0)
        try:
            # "started" is logged now, when the call is made; how it went is told at the first read.
            self.first = self.context.run(flow.send, None)
        except Exception as error:  # noqa: BLE001  # it is raised at the first read
            self.failed_early = error
        _abandoned.keep(self)

    def count(self, chunk: Chunk) -> bool:
        """Note a chunk that goes to the consumer; whether there has been output yet."""
        call = self.call
        self.delivered.append(chunk.text)
        if call.first_chunk_at is None:
            call.first_chunk_at = call.clock()
        self.output = self.output or chunk.has_output
        return self.output

    def admit(self, request: Request) -> None:
        """Let the provider be asked, unless output has gone out or the stream was closed meanwhile (see `aborted`)."""
        if self.closing:
            raise ConnectionAbortedError("the stream was closed")
        if self.output:
            raise resend_refused(request, Response("".join(self.delivered)))
        call = self.call
        call.requested_at = call.clock()
        if call.sent_at is None:
            call.sent_at = call.requested_at

    def restart(self) -> bool:
        """Take what was delivered for void, if the consumer knows of such things."""
        if not self.call.restarts:
            return False
        self.delivered.clear()
        self.output = False
        return True

    def finish(self, value: object) -> Chunk | None:
        """Take the flow's result; one that was not streamed is returned, as the chunk to deliver."""
        self.response = self.stack.finish(value, self.call)
        if self.call.chunks == 0 and (self.response.has_output or self.response.finish_reason):
            chunk = as_chunk(self.response)
            self.count(chunk)
            return chunk
        return None

    def raise_interrupted(self, error: BaseException) -> None:
        """Raise `StreamInterrupted` from an error, if the consumer gets that instead: once output has gone out."""
        if isinstance(error, Exception):
            explain(error, self.stack.middleware)
            if self.output:
                text = "".join(self.delivered)
                if not isinstance(error, StreamInterrupted):
                    raise interrupted(self.request, Response(text), error) from error
                if error.__cause__ is None and error.partial.text != text:
                    error.partial = Response(
                        text
                    )  # a combinator refused a resend: it does not keep what it let through

    def end(self) -> None:
        self.ended = True
        self.failed_early = None  # it refers to this driver
        _abandoned.forget(self)

    def abort(self) -> None:
        """End a read that is under way elsewhere, as far as the provider's stream can: one with an `abort()`."""
        abort = getattr(self.iterator, "abort", None)
        if abort is not None:
            abort()

    def aborted(self, error: BaseException) -> bool:
        """Whether an error is that of a read that `close` ended: the stream is abandoned then, and has not failed."""
        return self.closing and isinstance(error, Exception)

    def abandon(self) -> None:
        """Give the stream up from ordinary code that cannot wait."""
        raise NotImplementedError


class SyncStreamDriver(StreamDriver):
    stack: SyncStack

    def __init__(self, stack: SyncStack, request: Request, flow: Flow[Response]) -> None:
        super().__init__(stack, request, flow)
        self.events = self.drive()

    def drive(self) -> Generator[Chunk | Restart, None, None]:
        """Yield the events for the consumer. Runs in the stream's context."""
        flow, source, call = self.flow, self.source, self.call
        send, deliver = flow.send, self.delivered.append
        effect = self.first
        iterator: Any = iter(())
        clock: Callable[[], float] | None = None
        output = False
        try:
            if self.failed_early is not None:
                raise self.failed_early
            while True:
                if type(effect) is Chunk:
                    if output:
                        deliver(effect.text)
                    else:
                        output = self.count(effect)
                    yield effect
                    effect = PULL
                elif type(effect) is More:
                    output = self.count(effect.chunk)
                    yield effect.chunk
                elif type(effect) is Restart and self.restart():
                    output = False
                    yield effect
                try:
                    if effect is PULL:
                        if clock is not None:
                            call.requested_at = clock()
                        source.chunk = next(iterator, END)
                        outcome = None
                    else:
                        outcome = self.carry_out(effect)
                        iterator, clock = self.iterator, call.clock if call.timed else None
                except BaseException as raised:  # noqa: BLE001  # it goes into the flow
                    if self.aborted(raised):
                        self.close_all()
                        return
                    error: BaseException = raised
                else:
                    effect = send(outcome)
                    continue
                try:
                    effect = stepping.throw(flow, error)
                finally:
                    del error  # it refers to this frame
        except StopIteration as stop:
            self.close_all()
            chunk = self.finish(stop.value)
            if chunk is not None:
                yield chunk
        except BaseException as error:
            self.close_all()
            self.raise_interrupted(error)
            raise

    def carry_out(self, effect: Effect) -> object:
        if isinstance(effect, Send):
            self.admit(effect.request)
            self.release()
            self.iterator = iter(self.stack.open(effect.request))
            if self.closing:
                self.abort()
            self.source.chunk = next(self.iterator, END)
            return self.source
        if isinstance(effect, (More, Restart)):
            return self.call.restarts
        return self.stack.carry_out(effect, self.flow)

    def release(self) -> None:
        """Close the provider's stream."""
        iterator, self.iterator = self.iterator, None
        close = getattr(iterator, "close", None)
        if close is not None:
            close()

    def close_all(self) -> None:
        self.end()
        try:
            stepping.close(self.flow)
        finally:
            self.release()

    def close(self) -> None:
        if self.ended:
            return
        self.closing = True
        try:
            self.context.run(self.shut)
        except RuntimeError as error:
            if not is_entered(error):
                raise
            self.abort()  # a read is under way: the thread that is in it closes all when it is back

    def shut(self) -> None:
        self.events.close()
        if not self.ended:  # a generator that was never started runs nothing when it is closed
            self.close_all()

    abandon = close


def is_entered(error: RuntimeError) -> bool:
    return str(error).startswith("cannot enter context")


T = TypeVar("T")


class AsyncStreamDriver(StreamDriver):
    stack: AsyncStack
    reading = False
    waits_for: Any = None
    """What the read under way waits for: on asyncio, a future."""
    scope: Any = None
    """On trio: the cancel scope of the read under way, which is entered and left within it."""
    cut = False
    """Whether `abort` cancelled the read."""

    def __init__(self, stack: AsyncStack, request: Request, flow: Flow[Response]) -> None:
        super().__init__(stack, request, flow)
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
                            call.requested_at = call.clock()
                        source.chunk = END if self.iterator is None else await anext(self.iterator, END)
                    else:
                        outcome = await self.carry_out(effect)
                except BaseException as raised:  # noqa: BLE001  # it goes into the flow
                    if self.aborted(raised):
                        await self.close_all()
                        return None
                    error = raised
                try:
                    effect = flow.send(outcome) if error is None else stepping.throw(flow, error)
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
            self.iterator = aiter(self.stack.open(effect.request))
            self.source.chunk = await anext(self.iterator, END)
            return self.source
        if isinstance(effect, (More, Restart)):
            return self.call.restarts
        return await self.stack.carry_out(effect, self.flow)

    async def release(self) -> None:
        """Close the provider's stream."""
        iterator, self.iterator = self.iterator, None
        aclose = getattr(iterator, "aclose", None)
        if aclose is not None:
            await aclose()

    async def close_all(self) -> None:
        self.end()
        try:
            stepping.close(self.flow)
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

    def abandon(self) -> None:
        """Without an await: the flow ends now; dropping an async generator makes its event loop close it."""
        if self.ended or self.reading:
            return
        self.closing = True
        self.end()
        try:
            self.context.run(stepping.close, self.flow)
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
def in_context(context: Context, work: Coroutine[Any, Any, T], driver: AsyncStreamDriver) -> Generator[Any, Any, T]:
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
