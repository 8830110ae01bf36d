"""The base of the combinators: the effects that they see, and the functions that they run between two chunks."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from types import AsyncGeneratorType, CoroutineType
from typing import Any, TypeAlias, TypeVar

from fluxibly._checks import kind_of
from fluxibly.calls import CallRecord, Perform
from fluxibly.errors import StreamInterrupted
from fluxibly.flow.effects import (
    PULL,
    Adopt,
    AskEnd,
    Drop,
    Effect,
    Flow,
    More,
    Release,
    Send,
    Sleep,
    Start,
    Wait,
)
from fluxibly.flow.relay import Relay, Seen
from fluxibly.flow.verbs import discard
from fluxibly.types import Chunk, Request, Response, Restart

T = TypeVar("T")
Pieces: TypeAlias = Chunk | Iterable[Chunk] | None
ChunkFlow: TypeAlias = Generator[Any, Any, Pieces]
"""A function's flow: it yields chunks and effects (`yield from perform(…)`), and may return further pieces."""
READ = (PULL,)
"""In place of a chunk that is not let out: the driver reads the next all the same."""
HOW_TO_WAIT = "to wait for something in it, write a generator function: result = yield from perform(call, acall)"


def resend_refused(request: Request, partial: Response) -> StreamInterrupted:
    """Return the error for a middleware that sends another request after output of its first answer has gone out."""
    return StreamInterrupted(
        f"a middleware asked {request.call.provider.name} again after output of the first answer had gone out; retry "
        "only before output, hold the stream back, emit a Restart, or to go on after the answer so far, "
        "emit(Chunk(added=…)) first and send other messages",
        partial=partial,
    )


def caught(flow: Flow[Response]) -> Flow[tuple[Response, StreamInterrupted | None]]:
    """Run a flow and return its response, or its partial response and its interruption.

    The caller may raise the interruption's cause. Raised within this `except`, the cause would become its own context.
    """
    try:
        return (yield from flow), None
    except StreamInterrupted as error:
        return error.partial, error


class Combinator(Relay):
    """The base of the combinators, which tells apart the effects that pass.

    In a whole call, chunks that a middleware emits go nowhere, since its response has them. So they pass unseen, and the
    response passes through the combinator at the end.
    """

    def __init__(self) -> None:
        self.call = CallRecord()
        """The record of the last request that has passed."""
        self._asked = False
        """Whether a request has passed."""
        self._emitted = False
        """Whether a chunk of a middleware's own has passed."""

    @property
    def whole(self) -> bool:
        """Whether the call is known to be whole."""
        return self._asked and not self.call.streaming

    def see(self, effect: Effect) -> Seen | Flow[Seen]:
        if isinstance(effect, Chunk):
            return self.see_chunk(effect, effect)
        if isinstance(effect, More):
            self._emitted = True
            return effect if self.whole else self.see_chunk(effect, effect.chunk)
        # The request of an `ask` is no request of this flow.
        if isinstance(effect, Send) and not effect.request.call.nested:
            first, self._asked = not self._asked, True
            self.call = effect.request.call
            if self.call.streaming:
                return self.see_request(effect)
            if first and self._emitted:
                self.restarted()
        elif isinstance(effect, Restart):
            return self.see_restart(effect)
        elif isinstance(effect, Adopt) and not effect.lane.call.nested:
            self.call = effect.lane.call
        elif isinstance(effect, Release):
            self.failed()
        return effect

    def failed(self) -> None:
        """Forget what an attempt that has failed said, unless it had output: it does not belong to the next answer."""

    def see_chunk(self, effect: Chunk | More, chunk: Chunk) -> Seen | Flow[Seen]:
        """Return what goes outward for a chunk. Only if `effect` is the chunk itself, the driver reads the next."""
        raise NotImplementedError

    def see_request(self, effect: Send) -> Seen:
        """Return what goes outward for the request of an attempt."""
        return effect

    def see_restart(self, effect: Restart) -> Seen:
        """Return what goes outward for a `Restart`."""
        return effect

    def broken_off(self) -> Flow[None]:
        """Release the provider's stream of the attempt that closing the inner flow has broken off, if there is one."""
        request, self.call.sending = self.call.sending, None
        if request is not None and self.call.streaming:
            yield Release(request, broken_off=True)


_OF_VERBS = (Send, Sleep, Perform, AskEnd, Start, Wait, Drop, Adopt)
"""The effects of `sleep`, `perform`, `ask` and `gather`."""


def checked_effect(effect: object, expected: str) -> Effect:
    """Return an effect that is yielded where nothing may be streamed and the model of the call may not be asked.

    Args:
        expected: what is expected there, for the message.
    """
    if isinstance(effect, Send) and not effect.request.call.nested:
        who = expected.partition(":")[0]
        raise TypeError(f"{who}: expected no request of the call itself; write yield from ask(request)")
    if not isinstance(effect, _OF_VERBS):
        raise TypeError(f"{expected} sleep(…), perform(…), ask(…) and gather(…), got {kind_of(effect)}")
    return effect


def effects_of(flow: Flow[T], expected: str = "hold_back: expected the function to yield only from") -> Flow[T]:
    """Run a flow that yields the effects of verbs alone, and return its result. `expected` begins the message."""
    return (yield from _Effects(expected).over(flow))


class _Effects(Relay):
    def __init__(self, expected: str) -> None:
        self.expected = expected

    def see(self, effect: Effect) -> Effect:
        return checked_effect(effect, self.expected)


def result_of(value: Any) -> object:
    """Return the result of a plain function. A coroutine is none, and would be taken for true."""
    if type(value) in (CoroutineType, AsyncGeneratorType):
        discard(value)
        raise TypeError(
            f"hold_back: expected a plain function or a generator function, got an async function, which returned "
            f"{kind_of(value)}; {HOW_TO_WAIT}"
        )
    return value


def is_empty(chunk: Chunk) -> bool:
    """Whether a chunk says nothing."""
    return chunk.text_only and not chunk.text
