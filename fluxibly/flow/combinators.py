"""The combinators `map_chunks` and `hold_back`, and their loop, which steps an inner flow and sees its effects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias

import attrs

from fluxibly._checks import kind_of
from fluxibly.aggregate import Aggregator, as_chunks
from fluxibly.errors import StreamInterrupted
from fluxibly.flow.culprits import is_delivered, raise_not_delivered, swallowed
from fluxibly.flow.effects import PULL, Effect, Flow, More, Send, T
from fluxibly.types import CallRecord, Chunk, Reasoning, Request, Response, Restart

Seen: TypeAlias = Effect | Sequence[Effect] | StreamInterrupted | Literal[True]


class Relay:
    """A loop that steps an inner flow and sees each effect on its way outward. Subclasses decide what becomes of it."""

    done = False
    """Once true, the inner flow runs on without this loop, and further chunks cost nothing extra."""

    def see(self, effect: Effect) -> Seen:
        """Return what goes outward for `effect`: the effect itself, or a sequence of effects, which may be empty.

        True accepts a `Restart` without passing it on. A `StreamInterrupted` is raised in the inner flow, and nothing
        goes outward.
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
                    # Only a chunk is replaced by other effects, and no flow reads the outcome of a chunk.
                    for each in outgoing:  # type: ignore[union-attr]  # an Effect is always `effect` itself
                        outcome = yield each
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


class OutputWatch(Relay):
    """A relay that is `done` once output has passed a layer: `response = yield from watch.over(call_next(request))`."""

    def see(self, effect: Effect) -> Effect:
        if isinstance(effect, (Chunk, More)):
            chunk = effect if isinstance(effect, Chunk) else effect.chunk
            self.done = chunk.has_output
        return effect


Pieces: TypeAlias = Chunk | Iterable[Chunk] | None


def resend_refused(request: Request, partial: Response) -> StreamInterrupted:
    """Return the error for a middleware that sends another request after output of its first answer has gone out."""
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
    """Pass each chunk of a stream through `fn`, and return the response that the results add up to.

    For example, a middleware that turns text into upper case::

        def louder(chunk: Chunk) -> Chunk:
            return attrs.evolve(chunk, text=chunk.text.upper())

        def shout(request: Request, call_next: CallNext) -> Flow[Response]:
            return (yield from map_chunks(call_next(request), louder))

    Args:
        flow: the return value of `call_next(request)`.
        fn: takes each chunk, and returns a chunk, several chunks, or None to drop it. Return the chunk itself for no
            change.
        at_end: runs once after the last chunk of a success. It returns the chunks that `fn` still held back, in any
            form that `fn` may return.
        at_restart: runs when the stream begins again (`Restart`), to reset the state of `fn`.

    If a flow returns without having emitted chunks (a whole response, a cache hit), the response passes through `fn`
    as one chunk (as several, if texts and other parts alternate in it), so that a guard written with `map_chunks` sees
    every answer in every mode. If a stream is interrupted before it has emitted anything beyond this point, the error
    behind `StreamInterrupted` is raised instead, because the request can still be retried.
    """
    mapper = _Mapper(fn, at_restart)
    response, error = yield from _caught(mapper.over(flow))
    try:
        if error is not None:
            raise mapper.error(error)
    finally:
        del error  # it refers to this frame
    # A flow without output delivers its answer by its return value alone, so no piece of that answer is yielded.
    streamed = mapper.taken or (mapper.streamed and not response.has_output)
    if streamed:
        mapper.check(response)
    else:
        # `fn` may have added output to chunks without output, of an attempt that failed. Nothing else of them is kept.
        streamed = mapper.output
        if not streamed:
            mapper.answer = Aggregator()
        for chunk in as_chunks(response):
            made = mapper.pass_on(chunk)
            if streamed:
                for piece in (made,) if isinstance(made, Chunk) else made:
                    yield More(piece)
    if at_end is not None:
        for piece in mapper.note(at_end()):
            # The provider's stream is at its end, so each piece goes out as a More, which reads nothing.
            if streamed:
                yield More(piece)
    return mapper.returned(response)


class _Mapper(Relay):
    """The state of a `map_chunks`: the output that it has let out."""

    def __init__(self, fn: Callable[[Chunk], Pieces], at_restart: Callable[[], None] | None) -> None:
        self.fn = fn
        self.at_restart = at_restart
        self.call = CallRecord()
        self.begin()

    def begin(self) -> None:
        self.streamed = False
        self.taken = False
        """Whether output has come in. `output` says whether any has been let out."""
        self.output = False
        self.changed = False
        self.answer = Aggregator()
        self.grown = 0
        """The characters that `fn` and `at_end` have added to the text. (Unchanged chunks cost nothing.)"""
        self.heard: list[str] = []
        """The reasoning that came in since the last complete block."""
        self.told: list[str] = []
        """The reasoning that went out since then."""

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
            # A chunk makes the driver read the next, so exactly one effect that reads (a Chunk or PULL) replaces it.
            return [*map(More, made[:-1]), made[-1]] if made else (PULL,)
        # A More reads nothing, so nothing that replaces it may read.
        if isinstance(effect, More):
            self.streamed = True
            pieces = self.pass_on(effect.chunk)
            return effect if pieces is effect.chunk else list(map(More, pieces))  # type: ignore[arg-type]
        # Output that `fn` has received, even if it is kept for the end, would be mixed with a second answer's output.
        if isinstance(effect, Send):
            if self.taken:
                return resend_refused(effect.request, self.answer.response())
            if self.streamed and not self.output:
                self.begin()  # no part of an attempt that failed belongs to the answer of the next
            self.call = effect.request.call
        return effect

    def pass_on(self, chunk: Chunk) -> Chunk | Sequence[Chunk]:
        """Pass a chunk through `fn`. Return the chunk itself if `fn` leaves it unchanged, else the chunks from `fn`."""
        self.taken = self.taken or chunk.has_output
        if not chunk.text_only and any(isinstance(part, Reasoning) and part.text for part in chunk.parts):
            return self._pass_blocks(chunk)
        if chunk.reasoning:
            self.heard.append(chunk.reasoning)
        pieces = self.fn(chunk)
        if pieces is not chunk:
            self.changed = True
            self.grown -= len(chunk.text)
            return self.note(pieces)
        self.output = self.output or chunk.has_output
        if chunk.reasoning:
            self.told.append(chunk.reasoning)
        self.answer.add(chunk)
        return chunk

    def _pass_blocks(self, chunk: Chunk) -> Sequence[Chunk]:
        """Pass a chunk with complete blocks of reasoning through `fn`, which sees their texts in `reasoning`.

        If `fn` has changed the reasoning, the blocks no longer have their own texts.
        """
        if not chunk.reasoning and not self.heard:
            texts = [part.text for part in chunk.parts if isinstance(part, Reasoning)]
            chunk = attrs.evolve(chunk, reasoning="".join(texts))
        self.heard.append(chunk.reasoning)
        made = self._sequence(self.fn(chunk))
        told = "".join([*self.told, *[piece.reasoning for piece in made]])
        if told != "".join(self.heard):
            made = [_without_texts(piece) for piece in made]
        self.changed = True
        self.grown -= len(chunk.text)
        self._keep(made)
        self.heard.clear()
        self.told.clear()
        return made

    def note(self, pieces: Pieces) -> Sequence[Chunk]:
        """Add changed or new pieces to the answer, and return them as a sequence."""
        made = self._sequence(pieces)
        self.changed = self.changed or bool(made)
        self._keep(made)
        return made

    def _keep(self, made: Sequence[Chunk]) -> None:
        for piece in made:
            if piece.reasoning:
                self.told.append(piece.reasoning)
            self.answer.add(piece)
            self.grown += len(piece.text)
            self.output = self.output or piece.has_output

    def _sequence(self, pieces: Pieces) -> Sequence[Chunk]:
        """Return what `fn` returned as a sequence of chunks."""
        made: Sequence[Chunk] = (pieces,) if isinstance(pieces, Chunk) else () if pieces is None else tuple(pieces)
        for piece in made:
            if not isinstance(piece, Chunk):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(
                    f"map_chunks: expected the function to return a Chunk, several or None, got {kind_of(piece)}"
                )
        return made

    def response(self, inner: Response) -> Response:
        """Return the part of the `inner` response that was let out, with the changes of `fn`."""
        if not self.changed:
            return inner
        mine = self.answer.response()
        if all(getattr(mine, name) == getattr(inner, name) for name in (*_CONTENT, "opaque")):
            return inner  # `fn` has only cut the same answer in another way
        let_out = {name: getattr(mine, name) for name in _CONTENT}
        # `parsed` is made of the text, and `raw` of the whole answer.
        parsed = inner.parsed if mine.text == inner.text else None
        return inner.evolve(**let_out, order=mine.order, parsed=parsed, raw=None)

    def returned(self, inner: Response) -> Response:
        """Return the response of a flow that returned `inner`, for the layers further out to compare with."""
        response = self.response(inner)
        if self.changed:
            self.call.said = None
            if (stopped := swallowed(self.call)) is not None:
                stopped.partial = response
        return response

    def check(self, inner: Response) -> None:
        """Check that a flow returned what it has emitted. If `fn` changed nothing, the layers outside of it check that.

        Raises:
            StreamInterrupted: the flow returned another text.
        """
        if not self.changed:
            return
        stopped = swallowed(self.call)
        came = sum(map(len, self.answer.texts)) - self.grown
        if len(inner.text) != came or (stopped is not None and inner.text != stopped.partial.text):
            raise_not_delivered(self.call, inner, self.answer.response())

    def error(self, stopped: StreamInterrupted) -> BaseException:
        """Return the error to raise for an interrupted stream. Its `partial` is only what was let out."""
        stopped.partial = self.response(stopped.partial)
        # No output has been let out, so the cause itself is raised, which an outer `Retry` may retry.
        return stopped if self.output or stopped.__cause__ is None else stopped.__cause__


_CONTENT = ("text", "reasoning", "reasoning_parts", "media", "tool_calls", "alternatives", "details")
"""The fields of a response that say what the model answered."""


def _without_texts(chunk: Chunk) -> Chunk:
    """Return a chunk whose blocks of reasoning only complete what was streamed. Their `raw` goes back to the service."""
    if not any(isinstance(part, Reasoning) and part.text for part in chunk.parts):
        return chunk
    parts = [attrs.evolve(part, text="") if isinstance(part, Reasoning) else part for part in chunk.parts]
    return attrs.evolve(chunk, parts=tuple(parts))


def _caught(flow: Flow[Response]) -> Flow[tuple[Response, StreamInterrupted | None]]:
    """Run a flow and return its response, or its partial response and its interruption.

    The caller may raise the interruption's cause. Raised within this `except`, the cause would become its own context.
    """
    try:
        return (yield from flow), None
    except StreamInterrupted as error:
        return error.partial, error


def hold_back(
    flow: Flow[Response],
    until: Callable[[str], bool] | None = None,
    check: Callable[[Response], None] | None = None,
) -> Flow[Response]:
    """Hold back a stream's chunks until the stream is known to be good, then release them in the order they came.

    For example, a middleware that shows an answer only once it is complete::

        def complete_only(request: Request, call_next: CallNext) -> Flow[Response]:
            return (yield from hold_back(call_next(request)))

    Args:
        flow: the return value of `call_next(request)`.
        until: takes the text so far after each chunk. Once it returns true, the held chunks are released, and later
            chunks are passed straight on. Without it, every chunk is held until the end.
        check: takes the response of a success before any held chunk is released. If it raises, none is released.

    Until the release, a failure is raised as the provider's own error, which an outer `Retry` may retry, and a
    `Restart` from within only discards the held chunks.
    """
    holder = _Holder(until)
    response, error = yield from _caught(holder.over(flow))
    try:
        if error is not None:
            # Nothing has been released, so the cause itself is raised, which an outer `Retry` may retry. Without a cause, a
            # resend was refused.
            if not holder.done:
                error.partial = Response()
                if error.__cause__ is not None:
                    raise error.__cause__
            raise error
    finally:
        del error  # it refers to this frame
    # After the release a check could no longer hold the answer back.
    if not holder.done:
        holder.check(response)
        if check is not None:
            check(response)
    # The provider's stream is at its end, so each chunk goes out as a More, which reads nothing.
    for chunk in holder.held:
        yield More(chunk)
    return response


class _Holder(Relay):
    """The state of a `hold_back`, which is `done` once it has released its chunks."""

    def __init__(self, until: Callable[[str], bool] | None) -> None:
        self.until = until
        self.held: list[Chunk] = []
        self.text = ""
        self.call = CallRecord()

    def see(self, effect: Effect) -> Seen:
        if isinstance(effect, (Chunk, More)):
            self.held.append(effect if isinstance(effect, Chunk) else effect.chunk)
            if self.until is not None:
                self.text += self.held[-1].text
                self.done = self.until(self.text)
            released: list[Effect] = []
            if self.done:
                released.extend(map(More, self.held))
                self.held.clear()
            # A chunk makes the driver read the next, so PULL, which reads but delivers nothing, replaces a held chunk.
            if isinstance(effect, Chunk):
                released.append(PULL)
            return released
        if isinstance(effect, Send):
            # The held output of the first answer would go out together with a second answer's output.
            if self.holds_output():
                answer = Aggregator()
                for chunk in self.held:
                    answer.add(chunk)
                return resend_refused(effect.request, answer.response())
            self.call = effect.request.call
        # The consumer has received nothing, so a Restart is accepted here and need not reach it.
        return True if isinstance(effect, Restart) else effect

    def restarted(self) -> None:
        self.held.clear()
        self.text = ""
        self.call.interruption = None  # what was interrupted is void

    def holds_output(self) -> bool:
        return any(chunk.has_output for chunk in self.held)

    def check(self, response: Response) -> None:
        """Check that the held chunks are the answer, so that no half of an answer is released, unless it says that it is one.

        Raises:
            StreamInterrupted: the flow returned another text.
        """
        if response.text is self.call.said or not self.holds_output():
            return
        if not is_delivered(self.call, response, "".join([chunk.text for chunk in self.held])):
            raise_not_delivered(self.call, response, Response())
