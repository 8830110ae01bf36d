"""The combinator `map_chunks`: a function for each chunk of a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import attrs

from fluxibly._checks import kind_of
from fluxibly.aggregate import Aggregator, as_chunks
from fluxibly.errors import StreamInterrupted
from fluxibly.flow.combinators import (
    HOW_TO_WAIT,
    READ,
    ChunkFlow,
    Combinator,
    Pieces,
    caught,
    checked_effect,
    is_empty,
    resend_refused,
)
from fluxibly.flow.culprits import raise_not_delivered, raise_not_marked, swallowed
from fluxibly.flow.effects import PULL, Effect, Flow, More, Send
from fluxibly.flow.relay import Seen, Turns, is_flow
from fluxibly.flow.verbs import discard, with_messages
from fluxibly.types import Chunk, Message, Reasoning, Response


def map_chunks(
    flow: Flow[Response],
    fn: Callable[[Chunk], Pieces | ChunkFlow],
    at_end: Callable[[], Pieces | ChunkFlow] | None = None,
    *,
    at_restart: Callable[[], None] | None = None,
) -> Flow[Response]:
    """Pass each chunk of a stream through `fn`, and return the response that the results add up to.

    For example, a middleware that turns text into upper case::

        def louder(chunk: Chunk) -> Chunk:
            return attrs.evolve(chunk, text=chunk.text.upper())

        def shout(request: Request, call_next: CallNext) -> Flow[Response]:
            return (yield from map_chunks(call_next(request), louder))

    `fn` may be a generator function, which waits for I/O between two chunks::

        def judged(chunk: Chunk) -> Iterator[Any]:
            fine = yield from perform(partial(judge, chunk.text), partial(ajudge, chunk.text))
            yield chunk if fine else attrs.evolve(chunk, text="[removed]")

    Args:
        flow: the return value of `call_next(request)`.
        fn: takes each chunk, and returns a chunk, several chunks, or None to drop it. Return the chunk itself for no
            change. A generator function yields chunks, each of which is let out at once, and the effects of `sleep`,
            `perform` and `ask`. It may return further chunks.
        at_end: runs once after the last chunk of a success. It returns the chunks that `fn` still held back, in any
            form that `fn` may return.
        at_restart: runs when the stream begins again (`Restart`) and when a new message begins, to reset the state of
            `fn`. (In a whole call, also if a middleware has let out chunks before its first request.)

    If a flow returns without having emitted chunks (a whole response, a cache hit), the response passes through `fn`
    as one chunk (as several, if texts and other parts alternate in it), so that a guard written with `map_chunks` sees
    every answer in every mode. If a stream is interrupted before it has emitted anything beyond this point, the error
    behind `StreamInterrupted` is raised instead, because the request can still be retried.

    At a mark (`Chunk.added`) with messages, a message is complete: `at_end` runs, `at_restart` runs, and then `fn` gets
    the chunk with the mark, whose messages it may change. If `fn` drops that chunk, the mark passes all the same. After
    text that `fn` lets out behind the mark, it has to return an empty mark, so that the next request may be sent. In a
    whole call, `fn` gets all messages of `response.added` as one mark, and nothing of what a middleware lets out by
    `emit`, because the response has it.
    """
    mapper = _Mapper(fn, at_end, at_restart)
    response, error = yield from caught(mapper.over(flow))
    try:
        if error is not None:
            raise mapper.error(error)
    finally:
        del error  # it refers to this frame
    # A flow without output delivers its answer by its return value alone, so no piece of that answer is yielded.
    streamed = mapper.taken or (mapper.streamed and not response.has_output)
    mapper.check_marks(response, streamed=streamed)
    if streamed:
        mapper.check(response)
    else:
        # `fn` may have added output to chunks without output, of an attempt that failed. Nothing else of them is kept.
        streamed = mapper.output
        if not streamed:
            mapper.lets_out = False
            mapper.answer.begin_message()
        for chunk in as_chunks(response.evolve(added=()) if mapper.marked else response):
            yield from mapper.pass_whole(chunk)
    # The provider's stream is at its end, so each piece goes out as a More, which reads nothing.
    yield from mapper.finish_message()
    return mapper.returned(response)


class _Mapper(Combinator):
    """The state of a `map_chunks`: the output that it has let out."""

    def __init__(
        self,
        fn: Callable[[Chunk], Pieces | ChunkFlow],
        at_end: Callable[[], Pieces | ChunkFlow] | None,
        at_restart: Callable[[], None] | None,
    ) -> None:
        super().__init__()
        self.fn = fn
        self.at_end = at_end
        self.at_restart = at_restart
        self.lets_out = True
        """Whether the answer is streamed. Chunks of a whole answer are not let out: the response has them."""
        self.begin()

    def begin(self) -> None:
        self.answer = Aggregator()
        self.turns = Turns()
        self.marked: tuple[Message, ...] = ()
        """The messages of the marks that have come in. (`answer.added` has them as `fn` has changed them.)"""
        self.output = self.gone_out = False
        """Whether output of the message has been let out, and of an earlier message."""
        self.begin_message()

    def begin_message(self) -> None:
        self.gone_out = self.gone_out or self.output
        self.streamed = False
        """Whether the message has come in as chunks."""
        self.taken = False
        """Whether output of the message has come in."""
        self.output = False
        self.changed = False
        """Whether `fn` or `at_end` have changed the message."""
        self.answer.begin_message()
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

    def see(self, effect: Effect) -> Seen | Flow[Seen]:
        if type(effect) is not Chunk or not effect.text_only or not self.turns.output:
            return super().see(effect)
        # As below, because for a chunk that passes unchanged, further calls of functions would be most of its cost.
        pieces = self.fn(effect)
        if pieces is not effect:
            return self._outgoing(effect, effect, self._changed(effect, pieces))
        self.output = self.output or effect.text != ""
        self.answer.texts.append(effect.text)
        return effect

    def see_chunk(self, effect: Chunk | More, chunk: Chunk) -> Seen | Flow[Seen]:
        if effect is not chunk and chunk.added is not None:
            return self._pass_mark(chunk)
        self.streamed = True
        pieces = self.pass_on(chunk)
        return effect if pieces is chunk else self._outgoing(effect, chunk, pieces)

    def _outgoing(
        self, effect: Chunk | More, chunk: Chunk, pieces: Chunk | Sequence[Chunk] | Flow[Sequence[Chunk]]
    ) -> Seen | Flow[Seen]:
        """Return what goes outward for a chunk that `fn` has changed into `pieces`."""
        reads = effect is chunk
        if is_flow(pieces):
            return self._seen(pieces, reads=reads)
        made = cast("Sequence[Chunk]", pieces)
        if not reads:
            return list(map(More, made))
        # A chunk makes the driver read the next, so exactly one effect that reads (a Chunk or PULL) replaces it.
        return [*map(More, made[:-1]), made[-1]] if made else READ

    def see_request(self, effect: Send) -> Seen:
        # Output that `fn` has received, even if it is kept for the end, would be mixed with a second answer's output.
        refused = self.turns.refuse(effect.request)
        return resend_refused(effect.request, self.answer.response()) if refused else effect

    def failed(self) -> None:
        if not (self.taken or self.output):
            self.begin_message()

    def _seen(self, flow: Flow[Sequence[Chunk]], *, reads: bool) -> Flow[Seen]:
        """Run the flow of `fn` for a chunk."""
        made = yield from flow
        return [*map(More, made), PULL] if reads else list(map(More, made))

    def _pass_mark(self, chunk: Chunk) -> Flow[Seen]:
        """Let a mark pass, which ends a message if it has messages. (An empty mark only admits the next request.)"""
        if chunk.added or self.turns.output:
            self.turns.mark()
        if chunk.added:
            if self.streamed:
                yield from self.finish_message()
            self.begin_message()
            self.marked += chunk.added
            if self.at_restart is not None:
                self.at_restart()
        yield from self.pass_whole(chunk)
        return ()

    def pass_whole(self, chunk: Chunk) -> Flow[None]:
        """Pass a chunk of a whole answer, or a mark, through `fn`, and let out the results if the answer is streamed."""
        if chunk.added is not None:
            yield from self._let_out((yield from self._passed_mark(Chunk(added=chunk.added))))
            chunk = attrs.evolve(chunk, added=None)
            if is_empty(chunk):
                return
            self.streamed = True
        made: Any = self.pass_on(chunk)
        if is_flow(made):
            made = yield from made
        yield from self._let_out((made,) if isinstance(made, Chunk) else made)

    def _passed_mark(self, mark: Chunk) -> Flow[Sequence[Chunk]]:
        """Pass a mark through `fn`, which may change its messages. A mark that `fn` drops stays as it is."""
        pieces = self.fn(mark)
        made = (yield from self.stepped(pieces, noted=False)) if is_flow(pieces) else self._sequence(pieces)
        made = [with_messages(piece, "map_chunks") for piece in made]
        if not any(piece.added is not None for piece in made):
            made = [mark, *made]
        self.changed = self.changed or any(piece.added is None for piece in made)
        self._keep(made, marks=True)
        return made

    def finish_message(self) -> Flow[None]:
        """Let out the chunks that `fn` still held back of a message that is complete."""
        if self.at_end is not None:
            pieces = self.at_end()
            made = (yield from self.stepped(pieces)) if is_flow(pieces) else self.note(cast("Pieces", pieces))
            yield from self._let_out(made)

    def _let_out(self, made: Iterable[Chunk]) -> Flow[None]:
        if self.lets_out:
            for piece in made:
                yield More(piece)

    def stepped(self, flow: ChunkFlow, *, noted: bool = True) -> Flow[Sequence[Chunk]]:
        """Run a function that is a flow. Let out each chunk that it yields, and return the chunks that are left to let out.

        Args:
            noted: whether to let out chunks and add them to the answer. If not, all are returned, and belong to no answer.
        """
        left: list[Chunk] = []
        outcome: Any = None
        error: BaseException | None = None
        while True:
            try:
                item = flow.send(outcome) if error is None else flow.throw(error)
            except StopIteration as stop:
                return [*left, *(self.note(stop.value) if noted else self._sequence(stop.value))]
            finally:
                outcome = error = None  # the error refers to this frame
            try:
                if isinstance(item, (Chunk, More)):
                    chunk = item if isinstance(item, Chunk) else item.chunk
                    if noted:
                        self.note(chunk)
                    if noted and self.lets_out:
                        yield More(chunk)
                    else:
                        left.append(chunk)
                else:
                    outcome = yield checked_effect(item, "map_chunks: expected the function to yield chunks, or from")
            except GeneratorExit:
                flow.close()
                raise
            except BaseException as thrown:  # noqa: BLE001  # it goes into the function's flow
                error = thrown

    def pass_on(self, chunk: Chunk) -> Chunk | Sequence[Chunk] | Flow[Sequence[Chunk]]:
        """Pass a chunk through `fn`. Return the chunk itself if `fn` leaves it unchanged, else the chunks from `fn`.

        If `fn` is a generator function, return a flow that returns the chunks that are left to let out.
        """
        if not self.turns.output and chunk.has_output:
            self.taken = self.turns.output = True
        if not chunk.text_only and any(isinstance(part, Reasoning) and part.text for part in chunk.parts):
            return self._pass_blocks(chunk)
        if chunk.reasoning:
            self.heard.append(chunk.reasoning)
        pieces = self.fn(chunk)
        if pieces is not chunk:
            return self._changed(chunk, pieces)
        self.output = self.output or chunk.has_output
        if chunk.reasoning:
            self.told.append(chunk.reasoning)
        self.answer.add(chunk)
        return chunk

    def _changed(self, chunk: Chunk, pieces: Pieces | ChunkFlow) -> Sequence[Chunk] | Flow[Sequence[Chunk]]:
        """Note what `fn` returned in place of a chunk."""
        self.changed = True
        self.grown -= len(chunk.text)
        return self.stepped(pieces) if is_flow(pieces) else self.note(pieces)

    def _pass_blocks(self, chunk: Chunk) -> Sequence[Chunk] | Flow[Sequence[Chunk]]:
        """Pass a chunk with complete blocks of reasoning through `fn`, which sees their texts in `reasoning`.

        If `fn` has changed the reasoning, the blocks no longer have their own texts.
        """
        if not chunk.reasoning and not self.heard:
            texts = [part.text for part in chunk.parts if isinstance(part, Reasoning)]
            chunk = attrs.evolve(chunk, reasoning="".join(texts))
        self.heard.append(chunk.reasoning)
        pieces = self.fn(chunk)
        self.changed = True
        self.grown -= len(chunk.text)
        return self._collect_blocks(pieces) if is_flow(pieces) else self._keep_blocks(self._sequence(pieces))

    def _collect_blocks(self, flow: ChunkFlow) -> Flow[Sequence[Chunk]]:
        """Run the flow of `fn` for blocks of reasoning. Only at its end it is known whether the reasoning has changed."""
        return self._keep_blocks((yield from self.stepped(flow, noted=False)))

    def _keep_blocks(self, made: Sequence[Chunk]) -> Sequence[Chunk]:
        told = "".join([*self.told, *[piece.reasoning for piece in made]])
        if told != "".join(self.heard):
            made = [_without_texts(piece) for piece in made]
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

    def _keep(self, made: Sequence[Chunk], *, marks: bool = False) -> None:
        for piece in made:
            if piece.added is not None and not marks:
                raise TypeError(
                    "map_chunks: expected the function to return a mark (Chunk.added) only in place of a mark, got another "
                    "mark; emit(…) it from the middleware itself"
                )
            if piece.added:  # pieces before the mark belong to the message that it ends
                self.gone_out = self.gone_out or self.output
                self.output = False
                self.grown = 0
                self.told.clear()
            if piece.reasoning:
                self.told.append(piece.reasoning)
            self.answer.add(piece)
            self.grown += len(piece.text)
            self.output = self.output or piece.has_output

    def _sequence(self, pieces: Pieces) -> Sequence[Chunk]:
        """Return what `fn` returned as a sequence of chunks."""
        if isinstance(pieces, Chunk):
            return (pieces,)
        if pieces is None:
            return ()
        if not isinstance(pieces, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
            discard(pieces)
            raise TypeError(
                f"map_chunks: expected the function to return a Chunk, several or None, got {kind_of(pieces)}; "
                f"{HOW_TO_WAIT}"
            )
        made = tuple(pieces)
        for piece in made:
            if not isinstance(piece, Chunk):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(
                    f"map_chunks: expected the function to return a Chunk, several or None, got {kind_of(piece)}"
                )
        return made

    def response(self, inner: Response) -> Response:
        """Return the part of the `inner` response that was let out, with the changes of `fn`."""
        if not self.changed and self.answer.added == self.marked:
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

    def check_marks(self, inner: Response, *, streamed: bool) -> None:
        """Check that the messages of the response are those of the marks, because changed marks take their place.

        Raises:
            StreamInterrupted: they are not.
        """
        # Half an answer is made of `StreamInterrupted.partial`, which has no marks.
        if inner.added != self.marked and (streamed or self.marked) and self.call.interruption is None:
            raise_not_marked(self.call, inner, self.answer.response())

    def error(self, stopped: StreamInterrupted) -> BaseException:
        """Return the error to raise for an interrupted stream. Its `partial` is only what was let out."""
        stopped.partial = self.response(stopped.partial)
        # No output has been let out, so the cause itself is raised, which an outer `Retry` may retry.
        gone_out = self.output or self.gone_out
        return stopped if gone_out or stopped.__cause__ is None else stopped.__cause__


_CONTENT = ("text", "reasoning", "reasoning_parts", "media", "tool_calls", "alternatives", "details", "added")
"""The fields of a response that say what the model answered."""


def _without_texts(chunk: Chunk) -> Chunk:
    """Return a chunk whose blocks of reasoning only complete what was streamed. Their `raw` goes back to the service."""
    if not any(isinstance(part, Reasoning) and part.text for part in chunk.parts):
        return chunk
    parts = [attrs.evolve(part, text="") if isinstance(part, Reasoning) else part for part in chunk.parts]
    return attrs.evolve(chunk, parts=tuple(parts))
