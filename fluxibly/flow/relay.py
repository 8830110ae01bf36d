"""The loop of combinators: it steps an inner flow and sees each effect on its way outward."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from types import GeneratorType
from typing import Any, Literal, TypeAlias, TypeGuard

from fluxibly.errors import StreamInterrupted
from fluxibly.flow.effects import PULL, Effect, Flow, More, T
from fluxibly.types import CallRecord, Chunk, Message, Request, Restart

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

    def over(self, flow: Flow[T], hold: Callable[[Chunk], bool] | None = None) -> Flow[T]:
        """Run `flow` and return its result.

        Args:
            hold: takes each chunk of the provider's that comes, and says whether it has kept it. The driver then reads the
                next, and `see` does not get it.
        """
        send = flow.send
        watch = self if isinstance(self, Watch) else None  # the chunks of a watch take a shorter path
        outcome: Any = None
        error: BaseException | None = None
        # A pending outcome or error goes into the flow first, because `yield from` would resume the flow without it.
        while error is not None or outcome is not None or not self.done:
            try:
                effect = send(outcome) if error is None else flow.throw(error)
            except StopIteration as stop:
                result: T = stop.value
                return result
            finally:
                outcome = error = None  # the error refers to this frame
            if watch is not None and type(effect) is Chunk:
                # As `watch.note` does, because a call for each chunk would be most of its cost.
                call, clock = watch.call, watch.call.clock
                chunks, arrived, asked = watch.chunks, watch.arrived, watch.asked
                left, stride, room = watch.left, watch.stride, watch.room
                try:
                    while type(effect) is Chunk:
                        chunks.append(effect)
                        left -= 1
                        if not left:
                            asked.append(call.requested_at)
                            arrived.append(clock())
                            left = watch.left = stride
                            if len(arrived) == room or len(chunks) > MANY:
                                watch.flush()
                                left, stride, room = watch.left, watch.stride, watch.room
                        effect = send((yield effect))
                except StopIteration as stop:
                    result = stop.value
                    return result
                except GeneratorExit:
                    flow.close()
                    raise
                except BaseException as thrown:  # noqa: BLE001  # it goes into the inner flow, which raises its own again
                    error = thrown
                    continue
                finally:
                    watch.left = left
            if hold is not None and type(effect) is Chunk:
                try:
                    while type(effect) is Chunk and hold(effect):
                        yield PULL
                        effect = send(None)
                except StopIteration as stop:
                    result = stop.value
                    return result
                except GeneratorExit:
                    flow.close()
                    raise
                except BaseException as thrown:  # noqa: BLE001  # as above
                    error = thrown
                    continue
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


MANY = 1000
"""The number of chunks after which a watch takes what it has at the next time that it notes."""


class Watch(Relay):
    """A relay that only watches the chunks of a stream. Everything passes unchanged, and `take` gets many chunks at a time.

    It notes the times of every chunk, or only of every second, fourth, … (`stride`).
    """

    stride = 1
    left = 1
    """The chunks until the next whose times are noted, that one included."""
    room = 256
    """The most times to collect before `take` takes them."""
    characters = before_message = 0
    """The characters of all messages, and of those before the message under way (`Chunk.added`)."""

    def __init__(self, call: CallRecord) -> None:
        self.call = call
        self.chunks: list[Chunk] = []
        """The chunks that `take` has not taken yet."""
        self.arrived: list[float] = []
        """When those arrived whose times are noted."""
        self.asked: list[float] = []
        """When the consumer had asked for them (`CallRecord.requested_at`)."""

    @property
    def message_length(self) -> int:
        """The characters of the message under way."""
        return self.characters - self.before_message

    def take(self, lengths: Sequence[int]) -> None:
        """Take what has arrived: at least one chunk, and the lengths of the texts. `characters` does not count them yet."""

    def flush(self) -> None:
        """Take what has arrived, so that everything is up to date."""
        if self.chunks:
            lengths = [len(chunk.text) for chunk in self.chunks]
            self.take(lengths)
            self.characters += sum(lengths)
            self._clear()

    def _clear(self) -> None:
        self.chunks.clear()
        self.arrived.clear()
        self.asked.clear()

    def note(self, chunk: Chunk) -> None:
        """Note a chunk, as `over` does inline."""
        self.chunks.append(chunk)
        self.left -= 1
        if not self.left:
            self.asked.append(self.call.requested_at)
            self.arrived.append(self.call.clock())
            self.left = self.stride
            if len(self.arrived) == self.room or len(self.chunks) > MANY:
                self.flush()

    def restarted(self) -> None:
        self._clear()
        self.characters = self.before_message = 0

    def see(self, effect: Effect) -> Effect:
        if type(effect) is More:
            if effect.chunk.added:
                self.flush()
                self.before_message = self.characters
            self.note(effect.chunk)
        return effect


class OutputWatch(Relay):
    """A relay that is `done` once output has passed a layer: `response = yield from watch.over(call_next(request))`."""

    def see(self, effect: Effect) -> Effect:
        if isinstance(effect, (Chunk, More)):
            chunk = effect if isinstance(effect, Chunk) else effect.chunk
            # It may be done already: the outcome of a More goes into the flow first, so the loop runs once more.
            self.done = self.done or chunk.has_output
        return effect
