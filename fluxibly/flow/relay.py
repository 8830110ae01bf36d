"""The loop of combinators: it steps an inner flow and sees each effect on its way outward."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from types import GeneratorType
from typing import Any, Literal, TypeAlias, TypeGuard

from fluxibly.errors import StreamInterrupted
from fluxibly.flow.effects import Effect, Flow, More, T
from fluxibly.types import Chunk, Message, Request, Restart

Seen: TypeAlias = Effect | Sequence[Effect] | StreamInterrupted | Literal[True]


def is_flow(value: object) -> TypeGuard[Generator[Any, Any, Any]]:
    """Whether a value is a generator, and so may be run as a flow."""
    return type(value) is GeneratorType


class Relay:
    """A loop that steps an inner flow and sees each effect on its way outward. Subclasses decide what becomes of it."""

    done = False
    """Once true, the inner flow runs on without this loop, and further chunks cost nothing extra."""

    def see(self, effect: Effect) -> Seen | Flow[Seen]:
        """Return what goes outward for `effect`: the effect itself, or a sequence of effects, which may be empty.

        True accepts a `Restart` without passing it on. A `StreamInterrupted` is raised in the inner flow, and nothing
        goes outward. A flow is run first, and returns one of these.

        An error breaks the inner flow off, and goes outward.
        """
        return effect

    def restarted(self) -> None:
        """Reset the state after an accepted `Restart`: all chunks before it are void."""

    def over(self, flow: Flow[T]) -> Flow[T]:
        """Run `flow` and return its result."""
        outcome: Any = None
        error: BaseException | None = None
        # A pending outcome or error goes into the flow first, because `yield from` would resume the flow without it.
        while error is not None or outcome is not None or not self.done:
            try:
                effect = flow.send(outcome) if error is None else flow.throw(error)
            except StopIteration as stop:
                result: T = stop.value
                return result
            finally:
                outcome = error = None  # the error refers to this frame
            # `see` runs a user's function, and the inner layers have to end before the function's error goes outward.
            try:
                outgoing: Any = self.see(effect)
                if outgoing is not effect and is_flow(outgoing):
                    outgoing = yield from outgoing
            except Exception:
                flow.close()
                yield from self.broken_off()
                raise
            except GeneratorExit:
                flow.close()
                raise
            except BaseException as thrown:  # noqa: BLE001  # it goes into the inner flow
                error = thrown
                continue
            try:
                if outgoing is effect:
                    outcome = yield effect
                elif isinstance(outgoing, StreamInterrupted):
                    error = outgoing
                elif outgoing is True:
                    outcome = True
                else:
                    for each in outgoing:
                        outcome = yield each
                    # Only a chunk is replaced by other effects, and no flow reads the outcome of a chunk. Pending, it would
                    # keep a relay that is done in the loop.
                    outcome = None
            # A flow that is being closed must not yield again, which `close` enforces and `throw` would not.
            except GeneratorExit:
                flow.close()
                raise
            except BaseException as thrown:  # noqa: BLE001  # it goes into the inner flow
                error = thrown
            # After a refused Restart the earlier chunks still count.
            if type(effect) is Restart and outcome:
                self.restarted()
        return (yield from flow)

    def broken_off(self) -> Flow[None]:
        """Run after an error of `see` has closed the inner flow."""
        yield from ()


class Turns:
    """The rule that nothing is sent again after output, for what passes one place: its requests, output and marks.

    After a mark (`Chunk.added`), the layer that has let it out sends the next request, and layers further in may send that
    again. If a layer further out asked anew, the answers before the mark would be delivered a second time.
    """

    __slots__ = ("_asked", "_begun", "_fresh", "answered", "output")

    def __init__(self) -> None:
        self.output = False
        """Whether output has passed since the last request or mark."""
        self.answered: list[tuple[Message, ...]] = []
        """The messages of each request whose answer a mark has ended."""
        self._begun = False
        """Whether a request has passed. Output before the first is no answer, which another request would repeat."""
        self._asked: tuple[Message, ...] = ()
        self._fresh = False
        """Whether no request has passed since the last mark."""

    def mark(self) -> None:
        """Note a mark, which ends the answer of the last request."""
        self.answered.append(self._asked)
        self.output = False
        self._fresh = True

    def refuse(self, request: Request) -> bool:
        """Note a request. Return whether it must not pass."""
        if (self.output and self._begun) or (not self._fresh and request.messages in self.answered):
            return True
        self._begun = True
        self._asked = request.messages
        self.output = self._fresh = False
        return False


class OutputWatch(Relay):
    """A relay that is `done` once output has passed a layer: `response = yield from watch.over(call_next(request))`."""

    def see(self, effect: Effect) -> Effect:
        if isinstance(effect, (Chunk, More)):
            chunk = effect if isinstance(effect, Chunk) else effect.chunk
            self.done = chunk.has_output
        return effect
