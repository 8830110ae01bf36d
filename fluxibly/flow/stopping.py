"""The combinator `stop_when`: an early end of a stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs

from fluxibly._checks import kind_of
from fluxibly.aggregate import Aggregator, around_text, as_chunks
from fluxibly.flow.combinators import (
    Combinator,
    is_empty,
)
from fluxibly.flow.effects import Flow, More
from fluxibly.flow.relay import Seen
from fluxibly.flow.verbs import discard
from fluxibly.types import Chunk, Response


def stop_when(flow: Flow[Response], fn: Callable[[Chunk], bool | Chunk]) -> Flow[Response]:
    r"""End a stream early, where `fn` says so, and return the response of the part that came.

    For example, a middleware that keeps the first line::

        def first_line(request: Request, call_next: CallNext) -> Flow[Response]:
            def ends(chunk: Chunk) -> bool | Chunk:
                line, end, _ = chunk.text.partition("\n")
                return Chunk(line) if end else False

            return (yield from stop_when(call_next(request), ends))

    The connection is released at once, and the attempt counts as abandoned. The response has what the chunks up to there
    said; its finish reason is "stop", unless they had another.

    A whole answer is cut by the same rule: `fn` gets it as few chunks. A chunk, of a stream too, is cut in the order of
    what it has: first model, reasoning and parts, then the text, then tool calls, usage and finish reason; `fn` gets each
    of the three by itself. So a response that was cut has the provider's usage only if that came before.

    Args:
        flow: the return value of `call_next(request)`.
        fn: takes each chunk. False goes on; True makes this chunk the last; a `Chunk` is the last in place of this
            chunk. A mark (`Chunk.added`) in place of which it returns another chunk passes all the same.
    """
    stopper = _Stopper(fn)
    try:
        response = yield from stopper.over(flow)
    except _Stopped:
        for chunk in stopper.last:
            yield More(chunk)
        return stopper.response()
    # An answer that came as chunks has passed `fn` already.
    if stopper.output or (stopper.streamed and not response.has_output):
        return response
    stopper.answer.begin_message()
    try:
        for chunk in as_chunks(response.evolve(added=()) if stopper.answer.added else response):
            stopper.take(chunk)
    except _Stopped:
        # A stream says these at its beginning.
        names = ("model", "id", "request_id", "rate_limits", "provider")
        return stopper.response().evolve(**{name: getattr(response, name) for name in names})
    return response


def _in_order(chunk: Chunk) -> Sequence[Chunk]:
    """Return a chunk as several in the order of what it has: what comes before the text, the text, and what comes after."""
    if chunk.text_only:
        return (chunk,)
    before, after = around_text(chunk)
    pieces = (Chunk(**before), Chunk(chunk.text), Chunk(**after))
    return [piece for piece in pieces if not is_empty(piece)]


class _Stopped(Exception):
    """`fn` has ended the stream."""


class _Stopper(Combinator):
    def __init__(self, fn: Callable[[Chunk], bool | Chunk]) -> None:
        super().__init__()
        self.fn = fn
        self.last: list[Chunk] = []
        """The pieces of the last chunk that go out."""
        self.restarted()

    def restarted(self) -> None:
        self.answer = Aggregator()
        self.streamed = self.output = False
        """Whether chunks of the message under way have come in, and whether they had output."""

    def see_chunk(self, effect: Chunk | More, chunk: Chunk) -> Seen:
        self.streamed = True
        self.take(chunk)
        return effect

    def failed(self) -> None:
        if not self.output:
            self.answer.begin_message()

    def take(self, chunk: Chunk) -> None:
        """Add a chunk to the answer. Raise `_Stopped` if it is the last."""
        if chunk.added:
            self.streamed = self.output = False
        self.last.clear()
        for piece in _in_order(chunk):
            end = self.ends(piece)
            self.last.append(piece if end is None else end)
            self.answer.add(self.last[-1])
            if end is not None:
                raise _Stopped
        self.output = self.output or chunk.has_output

    def ends(self, chunk: Chunk) -> Chunk | None:
        """Return the last chunk, if the stream ends at this one."""
        verdict = self.fn(chunk)
        if verdict is False or verdict is None:  # pyright: ignore[reportUnnecessaryComparison]  # a function may end without a return
            return None
        if not isinstance(verdict, (bool, Chunk)):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
            discard(verdict)
            raise TypeError(f"stop_when: expected the function to return a bool or a Chunk, got {kind_of(verdict)}")
        last = chunk if verdict is True else verdict
        return attrs.evolve(last, added=chunk.added) if chunk.added is not None and last.added is None else last

    def response(self) -> Response:
        """Return the part that came."""
        response = self.answer.response()
        return response if response.finish_reason else response.evolve(finish_reason="stop")
