"""The driver of synchronous streams."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from fluxibly import driving
from fluxibly.drivers import Driver
from fluxibly.effects import END, PULL, Effect, Flow, More, Send
from fluxibly.types import Chunk, Request, Response, Restart

if TYPE_CHECKING:
    from fluxibly.pipeline import Pipeline


class SyncDriver(Driver):
    pipeline: Pipeline

    def __init__(self, pipeline: Pipeline, request: Request, flow: Flow[Response]) -> None:
        super().__init__(pipeline, request, flow)
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
                            call.asked_at = clock()
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
                    effect = driving.throw(flow, error)
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
            self.iterator = iter(self.pipeline.open(effect.request))
            if self.closing:
                self.abort()
            self.source.chunk = next(self.iterator, END)
            return self.source
        if isinstance(effect, (More, Restart)):
            return self.call.restarts
        return self.pipeline.carry_out(effect, self.flow)

    def release(self) -> None:
        """Close the provider's stream."""
        iterator, self.iterator = self.iterator, None
        close = getattr(iterator, "close", None)
        if close is not None:
            close()

    def close_all(self) -> None:
        self.end()
        try:
            driving.close(self.flow)
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

    let_go = close


def is_entered(error: RuntimeError) -> bool:
    return str(error).startswith("cannot enter context")
