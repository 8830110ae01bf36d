"""The loop that the combinators are made with: it steps an inner flow, and sees what goes outward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from fluxibly.effects import Effect, Flow, More, T
from fluxibly.errors import StreamInterrupted
from fluxibly.types import Chunk, Restart

Seen: TypeAlias = Effect | Sequence[Effect] | StreamInterrupted | Literal[True]


class Relay:
    """Steps an inner flow and sees each of its effects on their way outward. Subclasses say what to do with them."""

    done = False
    """Once true, the inner flow runs on by itself, and a chunk costs nothing more."""

    def see(self, effect: Effect) -> Seen:
        """What goes outward for `effect`: itself, or others (perhaps none).

        True answers a `Restart` without passing it on; an error is raised within, in place of the effect.
        """
        return effect

    def restarted(self) -> None:
        """A `Restart` was accepted: what came before it is void."""

    def over(self, flow: Flow[T]) -> Flow[T]:
        """Run `flow` and return what it does."""
        outcome: Any = None
        error: BaseException | None = None
        while error is not None or not self.done:
            try:
                effect = flow.send(outcome) if error is None else flow.throw(error)
            except StopIteration as stop:
                result: T = stop.value
                return result
            finally:
                outcome = error = None  # the error refers to this frame
            try:
                outgoing = self.see(effect)
            except BaseException:
                flow.close()
                raise
            try:
                if outgoing is effect:
                    outcome = yield effect
                elif isinstance(outgoing, StreamInterrupted):
                    error = outgoing
                elif outgoing is True:
                    outcome = True
                else:
                    for each in outgoing:  # type: ignore[union-attr]  # an Effect is always `effect` itself
                        outcome = yield each
            except GeneratorExit:
                flow.close()
                raise
            except BaseException as thrown:  # noqa: BLE001  # it goes into the inner flow
                error = thrown
            if type(effect) is Restart and outcome:
                self.restarted()
        return (yield from flow)


class OutputWatch(Relay):
    """Whether output has gone past a layer (`done`): `response = yield from watch.over(call_next(request))`."""

    def see(self, effect: Effect) -> Effect:
        if isinstance(effect, (Chunk, More)):
            chunk = effect if isinstance(effect, Chunk) else effect.chunk
            self.done = chunk.has_output
        return effect
