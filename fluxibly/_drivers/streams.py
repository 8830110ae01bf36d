"""The drivers of streams: they carry out the effects of a flow, up to the next event for the consumer.

A driver steps the flow and the provider of its stream in a context of its own. So a context variable that they set (the
current span, above all) never shows in the consumer's code between two chunks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from contextvars import Context, copy_context
from typing import TYPE_CHECKING, Any, Final, Literal

from fluxibly import _abandoned
from fluxibly._drivers import stepping
from fluxibly._drivers.diagnosis import explain, report
from fluxibly._drivers.endings import Home
from fluxibly._drivers.stack import AsyncStack, SyncStack
from fluxibly._drivers.stepping import in_context
from fluxibly._loops import trio_here
from fluxibly._states import State
from fluxibly.aggregate import as_chunk
from fluxibly.errors import StreamInterrupted, interrupted
from fluxibly.flow.combinators import resend_refused
from fluxibly.flow.culprits import culprit, is_delivered, raise_not_delivered, raise_not_marked
from fluxibly.flow.effects import END, PULL, Adopt, Effect, Flow, More, Release, Send, Sleep, Source
from fluxibly.flow.relay import Turns
from fluxibly.types import Chunk, Message, Request, Response, Restart

if TYPE_CHECKING:
    from fluxibly.signals import Signal

CLOSING: Final = "closing"


class StreamDriver:
    """The state of a stream, and every decision about it that needs no I/O.

    Both drivers run the same loop: carry out the effect at hand, send the outcome into the flow, look at the effect that
    comes back. The driver delivers an event for the consumer, and keeps it as the effect at hand until the consumer asks
    for more. There is nothing to carry out for a delivered event, except that after a chunk of the provider's the next
    chunk has to be read (PULL).
    """

    def __init__(self, stack: SyncStack | AsyncStack, request: Request, flow: Flow[Response]) -> None:
        self.stack = stack
        self.request = request
        self.call = request.call
        self.flow = flow
        self.context: Context = copy_context()
        # A read never writes the stage: it could overwrite the `closing` of another thread, and the close would be lost.
        self.stage: Literal["open", "closing", "ended"] = "open"
        """The state as far as it is stored: `open` is `new`, `idle` or `reading`."""
        self.iterator: Any = None
        """The provider's stream; None before the first `Send` and after the release."""
        self.source = Source(END)
        self.delivered = self.call.delivered
        self.begin()
        self.response: Response | None = None
        self.start_error: Exception | None = None
        """The error of the flow's first step, which the first read raises."""
        self.effect: Effect = Sleep(0.0)
        """The effect at hand."""
        try:
            # The first step runs when the call is made, because "started" is logged then.
            self.effect = self.context.run(flow.send, None)
        except Exception as error:  # noqa: BLE001  # the first read raises it
            self.start_error = error
        _abandoned.keep(self)

    def begin(self) -> None:
        """Begin the answer: the consumer has received nothing that counts."""
        self.delivered.clear()
        self.message_start = 0
        """The number of delivered chunks before the message under way."""
        self.added: tuple[Message, ...] = ()
        """The messages of the marks that were delivered (`Chunk.added`)."""
        self.gone_out = False
        """Whether the consumer has received output, of whatever message."""
        self.output = False
        """Whether the consumer has received output of the message under way."""
        self.turns = Turns()
        self.emitted = False
        """Whether chunks went out that may not be those of the provider."""
        self.counted = False
        """Whether nothing about a further chunk of the provider's counts but its text."""

    @property
    def text(self) -> str:
        """The text of the message under way, as the consumer has received it."""
        return "".join(self.delivered[self.message_start :])

    @property
    def state(self) -> State:
        """Where the stream is in its life."""
        return self.open_state() if self.stage == "open" else self.stage

    def open_state(self) -> State:
        """Return the state of a stream that is neither closing nor ended."""
        raise NotImplementedError

    @property
    def ended(self) -> bool:
        """Whether flow and provider are closed."""
        return self.stage == "ended"

    def begin_closing(self) -> bool:
        """Note that the consumer gives the stream up. Return False if it is over, or if another close is under way."""
        # `TRANSITIONS` lets "closing" follow every state of an open stream, so which one it is need not be found out.
        # Two threads may both pass this check. The second close then finds everything closed, which is harmless.
        if self.stage != "open":
            return False
        self.stage = CLOSING
        return True

    def end(self) -> None:
        """Note that flow and provider are being closed: nothing is read any more."""
        self.stage = "ended"
        self.start_error = None  # it refers to this driver
        self.call.interruption = self.call.last_error = None  # their frames refer to the call
        _abandoned.forget(self)

    def count(self, chunk: Chunk) -> bool:
        """Count a chunk that goes to the consumer. Return `counted`."""
        call = self.call
        if chunk.added is not None:
            self.mark(chunk.added)
        self.delivered.append(chunk.text)
        if call.first_chunk_at is None:
            call.first_chunk_at = call.clock()
        if chunk.has_output:
            self.output = self.gone_out = self.turns.output = True
        self.counted = self.turns.output
        return self.counted

    def mark(self, added: tuple[Message, ...]) -> None:
        """Note a mark: another request may follow. With messages, a new message begins."""
        if added or self.turns.output:
            self.turns.mark()
        if added:
            self.message_start = len(self.delivered)
            self.added += added
            self.output = False
        self.call.continued = self.output

    def event_of(self, effect: Effect) -> Chunk | Restart | None:
        """Count an effect that is an event for the consumer, and return the event, or None for any other effect."""
        if isinstance(effect, (Chunk, More)):
            chunk = effect if isinstance(effect, Chunk) else effect.chunk
            self.count(chunk)
            self.emitted = self.emitted or isinstance(effect, More)
            return chunk
        return effect if isinstance(effect, Restart) and self.restart() else None

    def check_open(self) -> None:
        """Check that the stream is still wanted, before a provider is called.

        Raises:
            ConnectionAbortedError: the consumer has closed the stream meanwhile (see `aborted`).
        """
        if self.stage == "closing":
            raise ConnectionAbortedError("the stream was closed")

    def admit(self, request: Request) -> None:
        """Check that the provider may be asked.

        Raises:
            StreamInterrupted: the consumer has received output, so the request must not be sent again.
        """
        if self.turns.refuse(request):
            raise resend_refused(request, self.partial())
        self.counted = False  # from now on, output is that of the answer
        call = self.call
        call.requested_at = call.clock()
        if call.sent_at is None:
            call.sent_at = call.requested_at

    @property
    def restarts(self) -> bool:
        """Whether the answer may begin again.

        After a mark it may not, because it is not known how much would be void: the message under way, or all.
        """
        return self.call.restarts and not self.turns.answered

    def restart(self) -> bool:
        """Discard the chunks delivered so far, if the consumer takes `Restart` events."""
        if not self.restarts:
            return False
        self.begin()
        self.call.interruption = None  # what was interrupted is void
        return True

    def partial(self) -> Response:
        """Return the part of the answer that the consumer has received, as far as it is known here."""
        return Response(self.text, added=self.added)

    def finish(self, value: object) -> Chunk | None:
        """Take the flow's result. Return it as a chunk to deliver if it was not streamed."""
        response = self.stack.finish(value, self.call)
        if self.output or self.added:
            response = self.checked(response)
        self.response = response
        if not self.output and (response.has_output or (self.call.chunks == 0 and response.finish_reason)):
            chunk = as_chunk(response.evolve(added=()) if self.added else response)
            self.count(chunk)
            return chunk
        return None

    def checked(self, response: Response) -> Response:
        """Return the response, which has to be what the consumer has received.

        Raises:
            StreamInterrupted: it is not. The layers outside of the culprit took the call for a completed one.
        """
        call = self.call
        if response.added != self.added:
            if call.interruption is None:
                raise_not_marked(call, response, self.partial())
            response = response.evolve(added=self.added)  # half an answer, made of `partial`, which has no marks
        # Without output, the message comes whole, with the response. `call.said` is the text that the provider's chunks add
        # up to, unless a layer has changed chunks or the response.
        same = not self.output or (response.text is call.said and not self.emitted)
        if not same and not (response.has_output and is_delivered(call, response, self.text)):
            report(f"{culprit(call)} returned another answer than was delivered")
            raise_not_delivered(call, response, self.partial())
        return response

    def raise_interrupted(self, error: BaseException) -> None:
        """Raise `StreamInterrupted` from an error that came after output; otherwise return, and the error itself is raised."""
        if isinstance(error, Exception):
            explain(error, self.stack.middleware)
            if self.gone_out:
                partial = self.partial()
                if not isinstance(error, StreamInterrupted):
                    raise interrupted(self.request, partial, error) from error
                # A combinator that refused a resend does not keep its chunks, and an attempt knows only its own part.
                if error.__cause__ is None and error.partial.text != partial.text:
                    error.partial = partial
                elif self.turns.answered:
                    error.partial = error.partial.evolve(text=partial.text, order=None, added=partial.added)

    def abort(self) -> None:
        """End a read in another thread or task, if the provider's stream has an `abort()`."""
        abort = getattr(self.iterator, "abort", None)
        if abort is not None:
            abort()

    def aborted(self, error: BaseException) -> bool:
        """Whether `close` caused this error of a read: the stream was then abandoned, and did not fail."""
        return self.stage == "closing" and isinstance(error, Exception)

    def abandon(self) -> None:
        """Give the stream up from ordinary code that cannot wait."""
        raise NotImplementedError


_STATES: Final[dict[str, State]] = {
    inspect.GEN_CREATED: "new",
    inspect.GEN_RUNNING: "reading",
    inspect.GEN_SUSPENDED: "idle",
    inspect.GEN_CLOSED: "ended",
}
"""The state of a synchronous stream, by the state of the generator of its events."""


class SyncStreamDriver(StreamDriver):
    stack: SyncStack
    closing: Signal | None = None
    """The signal that a close sets while a layer sleeps."""

    def __init__(self, stack: SyncStack, request: Request, flow: Flow[Response]) -> None:
        super().__init__(stack, request, flow)
        self.events = self.drive()

    def open_state(self) -> State:
        return _STATES[inspect.getgeneratorstate(self.events)]

    def drive(self) -> Generator[Chunk | Restart, None, None]:
        """Yield the events for the consumer. Runs in the stream's context."""
        # A generator, because it keeps this state in local variables between two chunks.
        flow, source, call = self.flow, self.source, self.call
        send, deliver = flow.send, self.delivered.append
        effect = self.effect
        nothing: Any = iter(())
        iterator = nothing
        clock: Callable[[], float] | None = None
        output = False
        try:
            if self.start_error is not None:
                raise self.start_error
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
                    self.emitted = True
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
                        iterator, source = self.iterator or nothing, self.source
                        clock = call.clock if call.timed else None
                        output = self.counted
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
            try:
                chunk = self.finish(stop.value)
            finally:
                self.close_all()
            if chunk is not None:
                yield chunk
        except BaseException as error:
            self.close_all()
            self.raise_interrupted(error)
            raise

    def abort(self) -> None:
        """End a read in another thread, also one that waits for several branches, or sleeps."""
        super().abort()
        lanes = self.call.lanes
        if lanes is not None:
            lanes.abort()
        closing = self.closing
        if closing is not None:
            closing.set()

    def carry_out(self, effect: Effect) -> object:
        """Carry an effect out and return its outcome."""
        if isinstance(effect, Send):
            self.check_open()
            if effect.request.call.streaming:
                self.admit(effect.request)
            if effect.lane is not None:
                return self.stack.carry_out(effect, self.flow, self.call)
            if not effect.request.call.streaming:
                return self.stack.whole(effect)
            self.release()
            self.iterator = iter(self.stack.open(effect))
            # A close between `admit` and here found no provider's stream to abort.
            if self.stage == "closing":
                self.abort()
            self.source.chunk = next(self.iterator, END)
            return self.source
        if isinstance(effect, (More, Restart)):
            return self.restarts
        if isinstance(effect, Release):
            self.release()
            return None
        if isinstance(effect, Adopt):
            iterator, source = self.stack.lanes_of(self.call).adopt(effect)
            if effect.into is None and effect.lane.call.streaming:
                self.release()
                self.iterator, self.source = iterator, source
            return None
        if isinstance(effect, Sleep):
            return self.sleep(effect)
        self.check_open()  # a close may have found nothing to abort: no lanes were made yet, or a function was running
        return self.stack.carry_out(effect, self.flow, self.call)

    def sleep(self, effect: Sleep) -> bool:
        """Wait, at most until another thread closes the stream. Return whether the signal that the wait is for is set.

        Raises:
            ConnectionAbortedError: the stream was closed.
            DeadlineExceeded: the deadline of the call has passed.
        """
        from fluxibly.signals import Signal  # late, because few streams wait

        until = effect.until
        # It is set before the stage is read, and a close does the reverse, so at least one sees the other.
        closing = self.closing = Signal()
        wait = Sleep(effect.seconds, closing)
        if until is not None:
            until.attach(closing.set)
        try:
            self.check_open()
            self.stack.sleep(wait, effect.within or self.call)
            self.check_open()
        finally:
            self.closing = None
            if until is not None:
                until.detach(closing.set)
        return until is not None and until.is_set

    def release(self) -> None:
        """Close the provider's stream."""
        iterator, self.iterator = self.iterator, None
        close = getattr(iterator, "close", None)
        if close is not None:
            close()

    def close_all(self) -> None:
        """Close the flow, then the provider's stream."""
        self.end()
        try:
            stepping.close(self.flow)
        finally:
            try:
                self.release()
            finally:
                if self.call.endings or self.call.lanes is not None:
                    self.stack.clean_up(self.call)

    def close(self) -> None:
        """Give the stream up. A read in another thread ends as soon as the provider's stream can be aborted."""
        if self.begin_closing():
            self.finish_closing()

    def finish_closing(self) -> None:
        """Close everything, unless a read is under way: its thread then does so when the read has returned."""
        try:
            self.context.run(self.shut)
        except RuntimeError as error:
            if not is_occupied(error):
                raise
            self.abort()

    def shut(self) -> None:
        """Close the events, and with them everything. Runs in the stream's context."""
        self.events.close()
        if not self.ended:  # closing a generator that was never started runs none of its code
            self.close_all()

    abandon = close


def is_occupied(error: RuntimeError) -> bool:
    """Whether `Context.run` refused to enter a stream's context, because a read or a close is under way in it.

    The context is the owner of a synchronous stream: one thread at a time can be in it, and to enter it costs a chunk
    nothing more. `Context.run` raises in the caller's own frame; an error of the flow comes from frames below.
    """
    return error.__traceback__ is not None and error.__traceback__.tb_next is None


class AsyncStreamDriver(StreamDriver):
    stack: AsyncStack
    reading: bool | None = None
    """Whether a read is under way; None before the first read."""
    waits_for: Any = None
    """On asyncio, the future that the read under way waits for."""
    scope: Any = None
    """On trio, the cancel scope of the read under way, which is entered and left within that read."""
    elsewhere = False
    """Whether the read under way waits for something else than the provider's stream."""
    cut = False
    """Whether `abort` has cancelled the read under way."""
    home: Home | None = None
    """The event loop of the reads; None before the first read."""
    begun = False
    """Whether the effect of the flow's first step has been looked at."""

    def open_state(self) -> State:
        return "new" if self.reading is None else "reading" if self.reading else "idle"

    async def advance(self) -> Chunk | Restart | None:
        """Return the next event for the consumer, or None at the end. Runs in the stream's context."""
        flow, call = self.flow, self.call
        effect = self.effect
        error: BaseException | None = None
        try:
            if self.start_error is not None:
                raise self.start_error
            if not self.begun:
                self.begun = True
                if (event := self.event_of(effect)) is not None:
                    return event
            while True:
                outcome: object = None
                try:
                    if effect is PULL:
                        if call.timed:
                            call.requested_at = call.clock()
                        self.source.chunk = END if self.iterator is None else await anext(self.iterator, END)
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
                    self.effect = PULL
                    if self.counted:
                        self.delivered.append(effect.text)
                    else:
                        self.count(effect)
                    return effect
                if (event := self.event_of(effect)) is not None:
                    self.effect = effect
                    return event
        except StopIteration as stop:
            try:
                return self.finish(stop.value)
            finally:
                await self.close_all()
        except BaseException as error:
            await self.close_all()
            self.raise_interrupted(error)
            raise

    async def carry_out(self, effect: Effect) -> object:
        """Carry an effect out and return its outcome."""
        if isinstance(effect, Send):
            self.check_open()
            if effect.request.call.streaming:
                self.admit(effect.request)
            if effect.lane is not None:
                return await self.stack.carry_out(effect, self.flow, self.call)
            if not effect.request.call.streaming:
                return await self.stack.whole(effect)
            await self.release()
            self.iterator = aiter(self.stack.open(effect))
            self.source.chunk = await anext(self.iterator, END)
            return self.source
        if isinstance(effect, (More, Restart)):
            return self.restarts
        if isinstance(effect, Release):
            await self.release()
            return None
        if isinstance(effect, Adopt):
            iterator, source = await self.stack.lanes_of(self.call).adopt(effect)
            if effect.into is None and effect.lane.call.streaming:
                await self.release()
                self.iterator, self.source = iterator, source
            return None
        self.check_open()  # a close finds nothing to cancel while what the read has waited for is done already
        self.elsewhere = True
        try:
            return await self.stack.carry_out(effect, self.flow, self.call)
        finally:
            self.elsewhere = False

    async def release(self) -> None:
        """Close the provider's stream."""
        iterator, self.iterator = self.iterator, None
        aclose = getattr(iterator, "aclose", None)
        if aclose is not None:
            await aclose()

    async def close_all(self) -> None:
        """Close the flow, then the provider's stream."""
        self.end()
        try:
            stepping.close(self.flow)
        finally:
            try:
                await self.release()
            finally:
                if self.call.endings or self.call.lanes is not None:
                    await self.stack.clean_up(self.call)

    async def read_on_trio(self) -> Chunk | Restart | None:
        """Run `advance` in a scope, so that `abort` can cancel this read and nothing else."""
        import trio

        with trio.CancelScope() as self.scope:
            return await in_context(self.context, self.advance(), self)
        return None  # the read was cancelled while it released the provider's stream

    def abort(self) -> None:
        """End the read under way: by the provider's own `abort`, else by a cancellation that ends this read alone."""
        if not self.elsewhere and hasattr(self.iterator, "abort"):
            super().abort()
        elif self.reading:
            cancel = getattr(self.scope or self.waits_for, "cancel", None)
            if cancel is not None:
                self.cut = True
                cancel()

    def aborted(self, error: BaseException) -> bool:
        return super().aborted(error) or (self.cut and not _is_cancelled_by_others())

    async def aclose(self) -> None:
        """Give the stream up. A read in another task ends too."""
        if self.begin_closing():
            await self.finish_closing()

    async def finish_closing(self) -> None:
        """Close everything, unless a read is under way: its task then does so when the read has returned."""
        if self.reading:
            self.abort()
        elif not self.ended:
            await in_context(self.context, self.close_all(), self)

    def abandon(self) -> None:
        """Give the stream up without an await: the flow ends now, and the event loop closes a dropped async generator."""
        if self.reading or not self.begin_closing():
            return
        self.end()
        try:
            self.context.run(stepping.close, self.flow)
        finally:
            self.abort()
            self.iterator = self.call.lanes = None
            if self.call.endings:
                self.context.run((self.home or Home()).run_endings, self.call)


def _is_cancelled_by_others() -> bool:
    """Whether somebody else has cancelled the task. On trio the next await raises in that case."""
    if trio_here():
        return False
    import asyncio

    task = asyncio.current_task()
    return task is not None and bool(task.cancelling())
