"""The release of an answer as far as it has passed a check, and the same checks of whole answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Protocol, TypeAlias

import attrs

from fluxibly.aggregate import Aggregator, as_chunks
from fluxibly.errors import StreamInterrupted
from fluxibly.flow import Flow
from fluxibly.flow.combinators import READ, Combinator, caught, is_empty, resend_refused
from fluxibly.flow.culprits import is_delivered, raise_not_delivered
from fluxibly.flow.effects import Effect, More, Send
from fluxibly.flow.relay import Seen, Turns
from fluxibly.middleware._borders import Borders
from fluxibly.types import Chunk, Message, Response, Restart

MakeBorders: TypeAlias = Callable[[], Borders] | None
"""Makes the search for the borders of a message. None: a message is checked at its end alone."""


class Checker(Protocol):
    """What checks the messages of a call."""

    added: tuple[Message, ...]
    """The messages before the one that is being checked. They have passed."""

    def check(self, response: Response) -> Flow[None]:
        """Raise an error if the response so far does not pass."""
        ...


def release_checked(flow: Flow[Response], checker: Checker, borders: MakeBorders) -> Flow[Response]:
    """Hold a stream back, and let out what `checker` has passed.

    At a border, the text up to it is checked and let out, with the reasoning and the parts before it. The rest of a message
    is checked and let out at its end, or before the mark that ends it (`Chunk.added`): tool calls and what follows them,
    other choices, and what the service says beside the answer. So is the whole answer of a flow that has streamed nothing.

    While nothing has been let out, a failure is raised as the provider's own error, and a `Restart` from within only
    discards what is held.
    """
    releaser = _Releaser(checker, borders)
    response, error = yield from caught(releaser.over(flow, releaser.hold))
    try:
        if error is not None:
            raise releaser.error(error)
    finally:
        del error  # it refers to this frame
    yield from releaser.finish(response)
    return response


def check_whole(response: Response, checker: Checker, borders: MakeBorders) -> Flow[None]:
    """Check a whole answer, and those of earlier turns before it, as `release_checked` checks a stream of it."""
    yield from _check_added(response.added, checker, borders)
    yield from _check_message(response, checker, borders)


def _check_added(added: Sequence[Message], checker: Checker, borders: MakeBorders) -> Flow[None]:
    """Check the model's messages among those that a middleware has added."""
    for message in added:
        if message.role == "assistant":
            yield from _check_message(Response.from_parts(message.parts), checker, borders)
        checker.added += (message,)


def _check_message(response: Response, checker: Checker, borders: MakeBorders) -> Flow[None]:
    if borders is not None and borders().find(response.text):
        message = _Message(borders)
        for chunk in as_chunks(response.evolve(added=())):
            for so_far in message.take(chunk):
                yield from checker.check(so_far)
                message.release()
    yield from checker.check(response)


class _Message:
    """A message as it comes: what is held of it, and how much of it has been checked."""

    def __init__(self, borders: MakeBorders) -> None:
        self.borders = None if borders is None else borders()
        self.held: list[Chunk] = []
        """What has not gone out: without borders as it came, else in pieces that follow one another in the answer."""
        self.late: list[Chunk] = []
        """What goes out at the end wherever it came: other choices, usage, details and so on."""
        self._gone: list[Chunk] = []
        """What has gone out."""
        self._content = Aggregator()
        """What has been checked, without tool calls."""
        self._checked = self._due = 0
        """The number of held pieces that have been checked, and that will have been after the check that is due."""
        self._calls = False
        """Whether a part of a tool call is held. Nothing goes out then until the end, so that everything stays in order."""

    def take(self, chunk: Chunk) -> Iterator[Response]:
        """Take the next chunk. Yield the response so far at each border, and go on when it has passed (`release`)."""
        if self.borders is None:
            self.held.append(chunk)
            return
        if chunk.reasoning or chunk.parts:
            self.held.append(Chunk(reasoning=chunk.reasoning, parts=chunk.parts))
        if chunk.text:
            yield from self._take_text(chunk.text, self.borders.find(chunk.text))
        if chunk.tool_calls:
            self._calls = True
            self.held.append(Chunk(tool_calls=chunk.tool_calls))
        if not chunk.text_only:
            rest = attrs.evolve(chunk, text="", reasoning="", parts=(), tool_calls=())
            if not is_empty(rest):
                self.late.append(rest)

    def _take_text(self, text: str, borders: Sequence[int]) -> Iterator[Response]:
        start = 0
        for border in borders:
            if border > start:
                self.held.append(Chunk(text[start:border]))
                start = border
            end = len(self.held)
            while end > self._checked and not self.held[end - 1].text:  # it stands after the border
                end -= 1
            if end > self._checked:  # not if the check at an empty mark was here, too
                yield self._so_far(end)
        self.held.append(Chunk(text[start:]))

    def _so_far(self, end: int) -> Response:
        """Return the response up to the held piece number `end`."""
        pieces = [*_joined(self.held[self._checked : end])]
        self.held[self._checked : end] = pieces
        self._due = self._checked + len(pieces)
        self._keep(pieces)
        self._content.join_texts()
        return self._content.response()

    def _keep(self, pieces: Sequence[Chunk]) -> None:
        for piece in pieces:
            if not piece.tool_calls:
                self._content.add(piece)

    def release(self) -> Sequence[Chunk]:
        """Note that the check that was due has passed. Return what goes out."""
        self._checked = self._due
        if self._calls:
            return ()
        pieces = self.held[: self._due]
        del self.held[: self._due]
        self._checked = self._due = 0
        self._gone += pieces
        return pieces

    def release_all(self) -> Sequence[Chunk]:
        """Note that everything has passed a check. Return what goes out."""
        pieces = self.held
        if self.borders is not None:
            self._keep(pieces[self._checked :])
            pieces = [*_joined(pieces), *self.late]
        self.held, self.late = [], []
        self._checked = self._due = 0
        self._calls = False
        self._gone += pieces
        return pieces

    @property
    def has_output(self) -> bool:
        """Whether output has come."""
        return any(piece.has_output for piece in self._all())

    @property
    def text(self) -> str:
        """The text that has come."""
        return "".join([piece.text for piece in self._all()])

    @property
    def let_out(self) -> Response:
        """What has gone out."""
        return _response_of(self._gone)

    @property
    def answer(self) -> Response:
        """All that has come."""
        return _response_of(self._all())

    def says_more(self, response: Response) -> bool:
        """Whether something besides text has come that a response of the same text does not have."""
        if all(piece.text_only for piece in self._all()):
            return False
        answer = self.answer
        return any(getattr(answer, name) != getattr(response, name) for name in _BESIDE_TEXT)

    def _all(self) -> Sequence[Chunk]:
        return (*self._gone, *self.held, *self.late)


_BESIDE_TEXT = ("reasoning", "tool_calls", "media", "opaque", "alternatives", "details")


def _response_of(pieces: Sequence[Chunk]) -> Response:
    answer = Aggregator()
    for piece in pieces:
        answer.add(piece)
    return answer.response()


def _joined(pieces: Sequence[Chunk]) -> Iterator[Chunk]:
    """Join texts that follow one another, and reasoning, because each chunk that goes out costs as much as a long one."""
    for kind, run in groupby(pieces, _kind):
        if kind == "text":
            yield Chunk("".join([piece.text for piece in run]))
        elif kind == "reasoning":
            yield Chunk(reasoning="".join([piece.reasoning for piece in run]))
        else:
            yield from run


def _kind(piece: Chunk) -> str:
    return "text" if piece.text else "reasoning" if piece.reasoning and not piece.parts else "other"


class _Releaser(Combinator):
    """The state of a `release_checked`."""

    def __init__(self, checker: Checker, borders: MakeBorders) -> None:
        super().__init__()
        self.checker = checker
        self.borders = borders
        self.restarted()

    def restarted(self) -> None:
        self.released = False
        """Whether anything has been let out."""
        self.turns = Turns()
        self.message = _Message(self.borders)
        self.checker.added = ()
        self.call.interruption = None  # what was interrupted is void

    def failed(self) -> None:
        if not self.message.has_output:
            self.message = _Message(self.borders)

    def hold(self, chunk: Chunk) -> bool:
        """Keep a chunk of text with no border in it, as most are. Return False for any other."""
        if not chunk.text_only:
            return False
        text = chunk.text
        if text:
            message = self.message
            if message.borders is not None and not message.borders.skip(text):
                return False
            self.turns.output = True
            message.held.append(chunk)
        return True

    def see(self, effect: Effect) -> Seen | Flow[Seen]:
        if isinstance(effect, More):  # also in a call that a layer has made a whole one
            return self.see_chunk(effect, effect.chunk)
        return super().see(effect)

    def see_chunk(self, effect: Chunk | More, chunk: Chunk) -> Seen | Flow[Seen]:
        reads = effect is chunk
        if chunk.added is None:
            return self._take(chunk, reads=reads)
        if chunk.added or self.turns.output:
            self.turns.mark()
        # Without borders nothing of a message has gone out, so a mark within it may wait.
        if not chunk.added and self.borders is None:
            return self._take(chunk, reads=reads)
        return self._pass_mark(chunk)

    def see_request(self, effect: Send) -> Seen:
        # The held output of the first answer would go out together with a second answer's output.
        refused = self.turns.refuse(effect.request)
        return resend_refused(effect.request, self.message.answer) if refused else effect

    def see_restart(self, effect: Restart) -> Seen:
        # While the consumer has received nothing, a Restart is accepted here and need not reach it. After a mark it is not
        # known how much of what is held is void, so the Restart is refused.
        if self.released:
            return effect
        return () if self.turns.answered else True

    def _take(self, chunk: Chunk, *, reads: bool) -> Flow[Seen]:
        self.turns.output = self.turns.output or chunk.has_output
        return self._checked(self.message.take(chunk), reads=reads)

    def _checked(self, so_far: Iterator[Response], *, reads: bool) -> Flow[Seen]:
        """Check a message at its borders, and let out what has passed."""
        for response in so_far:
            yield from self.checker.check(response)
            yield from self._let_out(self.message.release())
        return READ if reads else ()

    def _let_out(self, pieces: Sequence[Chunk]) -> Flow[None]:
        for piece in pieces:
            self.released = True
            yield More(piece)

    def _pass_mark(self, chunk: Chunk) -> Flow[Seen]:
        """Check and let out what stands before a mark, then let the mark pass."""
        message = self.message
        if chunk.added:
            yield from self._check_turn(chunk.added)
        elif any(piece.has_output for piece in (*message.held, *message.late)):
            yield from self.checker.check(_said(message.answer))
        yield from self._let_out(message.release_all())
        self.released = True
        yield More(Chunk(added=chunk.added))
        if chunk.added:
            self.checker.added += chunk.added
            self.message = _Message(self.borders)
        rest = attrs.evolve(chunk, added=None)
        return () if is_empty(rest) else (yield from self._take(rest, reads=False))

    def _check_turn(self, added: Sequence[Message]) -> Flow[None]:
        """Check the message that a mark ends, and the messages that the mark adds besides."""
        said: Message | None = None
        if self.message.has_output:
            response = _said(self.message.answer)
            yield from self.checker.check(response)
            said = response.message
        before = self.checker.added
        try:
            yield from _check_added([message for message in added if message != said], self.checker, self.borders)
        finally:
            self.checker.added = before  # the mark has not passed yet

    def finish(self, response: Response) -> Flow[None]:
        """Check the last message, and let out what is held of it.

        Raises:
            StreamInterrupted: the flow has returned another text than it has streamed.
        """
        message = self.message
        if not self.checker.added:  # no mark has passed, so those before it came with the response
            yield from _check_added(response.added, self.checker, self.borders)
        streamed = message.has_output
        if response.has_output and not streamed:
            yield from _check_message(response, self.checker, self.borders)
            return
        # What was streamed goes out, and the response is checked.
        same = response.text is self.call.said or not streamed
        if not same and not is_delivered(self.call, response, message.text):
            raise_not_delivered(self.call, response, message.let_out)
        yield from self.checker.check(response)
        if message.says_more(response):  # a layer has taken it out of the response alone
            yield from self.checker.check(message.answer)
        # The provider's stream is at its end, so each chunk goes out as a More, which reads nothing.
        yield from self._let_out(message.release_all())

    def error(self, stopped: StreamInterrupted) -> BaseException:
        """Return the error to raise for an interrupted stream. Its `partial` is what has gone out of the message."""
        stopped.partial = self.message.let_out
        # If nothing has gone out, an outer `Retry` may retry. Without a cause, a resend was refused.
        return stopped if self.released or stopped.__cause__ is None else stopped.__cause__


def _said(response: Response) -> Response:
    """Return what an answer says, without what only the service's whole answer has, such as usage."""
    return Response.from_parts(response.parts, alternatives=response.alternatives, details=response.details)
