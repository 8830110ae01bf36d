"""What wraps a stream: the loop that steps an inner flow and sees what goes outward, and `map_chunks` and `hold_back`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias

import attrs

from fluxibly._checks import kind_of
from fluxibly.aggregate import Aggregator, as_chunk
from fluxibly.errors import StreamInterrupted
from fluxibly.flow.effects import PULL, Effect, Flow, More, Send, T
from fluxibly.types import Chunk, Request, Response, Restart

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


Pieces: TypeAlias = Chunk | Iterable[Chunk] | None


def resend_refused(request: Request, partial: Response) -> StreamInterrupted:
    """The error for a middleware that sends again after its output has gone out."""
    return StreamInterrupted(
        f"a middleware asked {request.call.provider.name} again after output of the first answer had gone out; retry "
        "only before output, hold the stream back, or emit a Restart",
        partial=partial,
    )


def map_chunks(
    flow: Flow[Response],
    fn: Callable[[Chunk], Pieces],
    at_end: Callable[[], Pieces] | None = None,
    *,
    at_restart: Callable[[], None] | None = None,
) -> Flow[Response]:
    """Wrap a stream: pass each of its chunks through `fn`, and return the response that its results come to.

    For example, a middleware that shouts::

        def louder(chunk: Chunk) -> Chunk:
            return attrs.evolve(chunk, text=chunk.text.upper())

        def shout(request: Request, call_next: CallNext) -> Flow[Response]:
            return (yield from map_chunks(call_next(request), louder))

    Args:
        flow: what `call_next(request)` returned.
        fn: gets each chunk, and returns a chunk, several, or None to drop it. Return the chunk itself for no change.
        at_end: runs once after the last chunk of a success and returns what `fn` may: what it still held back.
        at_restart: runs when the stream begins anew (`Restart`), to reset what `fn` remembers.

    A flow that returns having emitted nothing (a whole response, a cache hit) passes through `fn` as one chunk, so
    that a guard written with this sees every answer in every mode. If an interrupted stream emitted nothing beyond
    this point then the error behind `StreamInterrupted` is raised in its place, because it can still be retried.
    """
    mapper = _Mapper(fn, at_restart)
    response, error = yield from _caught(mapper.over(flow))
    try:
        if error is not None:
            raise mapper.error(error)
    finally:
        del error  # it refers to this frame
    streamed = mapper.streamed
    if not streamed:
        mapper.pass_on(as_chunk(response))
    if at_end is not None:
        for piece in mapper.note(at_end()):
            if streamed:
                yield More(piece)
    return mapper.response(response)


class _Mapper(Relay):
    """The state of one `map_chunks`: what it has let out.

    Until the first change it keeps lengths only, so that memory stays constant for a function that just looks on.
    """

    def __init__(self, fn: Callable[[Chunk], Pieces], at_restart: Callable[[], None] | None) -> None:
        self.fn = fn
        self.at_restart = at_restart
        self.begin()

    def begin(self) -> None:
        self.streamed = False
        self.taken = False
        """Whether output has come in; `output`, whether it has been let out."""
        self.output = False
        self.changed = False
        self.text = self.reasoning = 0
        self.answer = Aggregator()

    def restarted(self) -> None:
        self.begin()
        if self.at_restart is not None:
            self.at_restart()

    def see(self, effect: Effect) -> Seen:
        kind = type(effect)
        if kind is Chunk:
            self.streamed = True
            pieces = self.pass_on(effect)  # type: ignore[arg-type]
            if pieces is effect:
                return effect
            made: Sequence[Chunk] = pieces  # type: ignore[assignment]
            return [*map(More, made[:-1]), made[-1]] if made else (PULL,)
        if isinstance(effect, More):
            self.streamed = True
            pieces = self.pass_on(effect.chunk)
            return effect if pieces is effect.chunk else list(map(More, pieces))  # type: ignore[arg-type]
        if isinstance(effect, Send) and self.taken:
            return resend_refused(effect.request, self.answer.response())
        return effect

    def pass_on(self, chunk: Chunk) -> Chunk | Sequence[Chunk]:
        """The chunk itself, if `fn` leaves it as it is, or what `fn` makes of it."""
        self.taken = self.taken or chunk.has_output
        pieces = self.fn(chunk)
        if pieces is not chunk:
            self.changed = True
            return self.note(pieces)
        self.output = self.output or chunk.has_output
        if self.changed:
            self.answer.add(chunk)
        else:
            self.text += len(chunk.text)
            self.reasoning += len(chunk.reasoning)
            if chunk.tool_calls or chunk.reasoning_parts or chunk.alternatives:
                self.answer.add(attrs.evolve(chunk, text="", reasoning=""))
        return chunk

    def note(self, pieces: Pieces) -> Sequence[Chunk]:
        made: Sequence[Chunk] = (pieces,) if isinstance(pieces, Chunk) else () if pieces is None else tuple(pieces)
        for piece in made:
            if not isinstance(piece, Chunk):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"map_chunks: the function returned {kind_of(piece)}; return a Chunk, several, or None")
            self.changed = True
            self.answer.add(piece)
            self.output = self.output or piece.has_output
        return made

    def response(self, inner: Response) -> Response:
        """What was let out of the `inner` response."""
        if not self.changed:
            return inner
        mine = self.answer.response()
        return inner.evolve(
            text=inner.text[: self.text] + mine.text,
            reasoning=inner.reasoning[: self.reasoning] + mine.reasoning,
            reasoning_parts=mine.reasoning_parts,
            tool_calls=mine.tool_calls,
            alternatives=mine.alternatives,
            parsed=None,
            raw=None,
        )

    def error(self, stopped: StreamInterrupted) -> BaseException:
        """What to raise for an interrupted stream: no more of it is told than was let out."""
        if not self.output and stopped.__cause__ is not None:
            return stopped.__cause__
        if not self.changed:
            return stopped
        mine = StreamInterrupted(str(stopped), partial=self.response(stopped.partial))
        mine.__cause__ = stopped.__cause__
        return mine


def _caught(flow: Flow[Response]) -> Flow[tuple[Response, StreamInterrupted | None]]:
    """The flow's response, or its interruption: raised within `except`, the cause would become its own context."""
    try:
        return (yield from flow), None
    except StreamInterrupted as error:
        return error.partial, error


def hold_back(
    flow: Flow[Response],
    until: Callable[[str], bool] | None = None,
    check: Callable[[Response], None] | None = None,
) -> Flow[Response]:
    """Hold a stream's chunks back until it is known to be good, and then let them go in the order they came.

    For example, a middleware that shows an answer only once it is complete::

        def complete_only(request: Request, call_next: CallNext) -> Flow[Response]:
            return (yield from hold_back(call_next(request)))

    Args:
        flow: what `call_next(request)` returned.
        until: gets the text so far after each chunk; once it is true, all goes out, and what follows is passed
            straight on. Without it, everything is held until the end.
        check: gets the response of a success before anything held goes out (it may raise: then nothing does).

    While nothing has gone out, a failure is the provider's own error, which an outer `Retry` may try again, and a
    `Restart` from within only empties what is held.
    """
    holder = _Holder(until)
    response, error = yield from _caught(holder.over(flow))
    try:
        if error is not None:
            if not holder.done:
                if error.__cause__ is not None:
                    raise error.__cause__
                error.partial = Response()  # a resend was refused: what is held has not gone out
            raise error
    finally:
        del error  # it refers to this frame
    if check is not None and not holder.done:
        check(response)
    for chunk in holder.held:
        yield More(chunk)
    return response


class _Holder(Relay):
    """The state of one `hold_back`; `done` when it has let go."""

    def __init__(self, until: Callable[[str], bool] | None) -> None:
        self.until = until
        self.held: list[Chunk] = []
        self.text = ""

    def see(self, effect: Effect) -> Seen:
        if isinstance(effect, (Chunk, More)):
            self.held.append(effect if isinstance(effect, Chunk) else effect.chunk)
            if self.until is not None:
                self.text += self.held[-1].text
                self.done = self.until(self.text)
            abandon: list[Effect] = []
            if self.done:
                abandon.extend(map(More, self.held))
                self.held.clear()
            if isinstance(effect, Chunk):
                abandon.append(PULL)
            return abandon
        if isinstance(effect, Send) and any(chunk.has_output for chunk in self.held):
            answer = Aggregator()
            for chunk in self.held:
                answer.add(chunk)
            return resend_refused(effect.request, answer.response())
        return True if isinstance(effect, Restart) else effect

    def restarted(self) -> None:
        self.held.clear()
        self.text = ""
