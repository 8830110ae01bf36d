"""The combinator `hold_back`: no chunk of a stream before the stream is known to be good."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs

from fluxibly.aggregate import Aggregator
from fluxibly.flow.combinators import (
    READ,
    Combinator,
    caught,
    effects_of,
    is_empty,
    resend_refused,
    result_of,
)
from fluxibly.flow.culprits import is_delivered, raise_not_delivered
from fluxibly.flow.effects import Effect, Flow, More, Send
from fluxibly.flow.relay import Seen, Turns, is_flow
from fluxibly.types import Chunk, Response, Restart


def hold_back(
    flow: Flow[Response],
    until: Callable[[str], bool | Flow[bool]] | None = None,
    check: Callable[[Response], Flow[None] | None] | None = None,
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

    `until` and `check` may be generator functions, which yield the effects of `sleep`, `perform` and `ask`, and return
    the same as a plain function.

    Until the release, a failure is raised as the provider's own error, which an outer `Retry` may retry, and a
    `Restart` from within only discards the held chunks. At a mark (`Chunk.added`) with messages, a message is complete:
    it is checked and released before the mark passes, and the next message is held. Once `until` has returned true, no
    later message is held either. In a whole call, only the last message is checked.
    """
    holder = _Holder(until, check)
    response, error = yield from caught(holder.over(flow))
    try:
        if error is not None:
            if not holder.done:
                error.partial = Response()  # nothing of the message under way has been released
                # Nothing at all has been released, so the cause itself is raised, which an outer `Retry` may retry. Without
                # a cause, a resend was refused.
                if not holder.released and error.__cause__ is not None:
                    raise error.__cause__
            raise error
    finally:
        del error  # it refers to this frame
    # After the release a check could no longer hold the answer back.
    if not holder.done:
        holder.check_held(response)
        yield from holder.checked(response)
    # The provider's stream is at its end, so each chunk goes out as a More, which reads nothing.
    for chunk in holder.held:
        yield More(chunk)
    return response


class _Holder(Combinator):
    """The state of a `hold_back`, which is `done` once `until` has released its chunks."""

    def __init__(
        self,
        until: Callable[[str], bool | Flow[bool]] | None,
        check: Callable[[Response], Flow[None] | None] | None,
    ) -> None:
        super().__init__()
        self.until = until
        self.check = check
        self.held: list[Chunk] = []
        self.restarted()

    def restarted(self) -> None:
        self.held.clear()
        self.released = False
        """Whether chunks have been let out."""
        self.turns = Turns()
        self.text = ""
        self.call.interruption = None  # what was interrupted is void

    def see_restart(self, effect: Restart) -> Seen:
        # While the consumer has received nothing, a Restart is accepted here and need not reach it. After a mark it is not
        # known how much of what is held is void, so the Restart is refused.
        if self.released:
            return effect
        return () if self.turns.answered else True

    def see_chunk(self, effect: Chunk | More, chunk: Chunk) -> Seen | Flow[Seen]:
        if chunk.added is not None and (chunk.added or self.turns.output):
            self.turns.mark()
        return self._pass_mark(chunk) if chunk.added else self._hold(chunk, reads=effect is chunk)

    def see_request(self, effect: Send) -> Seen:
        # The held output of the first answer would go out together with a second answer's output.
        return resend_refused(effect.request, self._answer()) if self.turns.refuse(effect.request) else effect

    def _hold(self, chunk: Chunk, *, reads: bool) -> Seen | Flow[Seen]:
        self.held.append(chunk)
        self.turns.output = self.turns.output or chunk.has_output
        if self.until is None:
            return READ if reads else ()
        self.text += chunk.text
        good = self.until(self.text)
        if is_flow(good):
            return self._seen(good, reads=reads)
        self.done = bool(result_of(good))
        return self._outgoing(reads=reads)

    def _seen(self, flow: Flow[bool], *, reads: bool) -> Flow[Seen]:
        """Run the flow of `until`."""
        self.done = bool((yield from effects_of(flow)))
        return self._outgoing(reads=reads)

    def _outgoing(self, *, reads: bool) -> Sequence[Effect]:
        released = map(More, self._release()) if self.done else ()
        return [*released, *(READ if reads else ())]

    def _pass_mark(self, chunk: Chunk) -> Flow[Seen]:
        """Check and release the message that a mark ends, then let the mark pass. Hold what its chunk says of the next."""
        if self.held:
            yield from self.checked(self._answer())
        for held in self._release():
            yield More(held)
        yield More(Chunk(added=chunk.added))
        self.text = ""
        rest = attrs.evolve(chunk, added=None)
        if is_empty(rest):
            return ()
        seen: Any = self._hold(rest, reads=False)
        outgoing: Seen = (yield from seen) if is_flow(seen) else seen
        return outgoing

    def _release(self) -> Sequence[Chunk]:
        self.released = True
        released = [*self.held]
        self.held.clear()
        return released

    def checked(self, response: Response) -> Flow[None]:
        """Run `check`."""
        if self.check is not None:
            found = self.check(response)
            if is_flow(found):
                yield from effects_of(found)
            else:
                result_of(found)

    def _answer(self) -> Response:
        answer = Aggregator()
        for chunk in self.held:
            answer.add(chunk)
        return answer.response()

    def check_held(self, response: Response) -> None:
        """Check that the held chunks are the answer, so that no half of an answer is released, unless it says that it is one.

        Raises:
            StreamInterrupted: the flow returned another text.
        """
        if response.text is self.call.said or not any(chunk.has_output for chunk in self.held):
            return
        if not is_delivered(self.call, response, "".join([chunk.text for chunk in self.held])):
            raise_not_delivered(self.call, response, Response())
