"""Middleware of a few lines that use what middleware can do besides retrying and changing chunks.

Each is the short form of a middleware that users write: without options, and without good messages.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any

from fluxibly.errors import StreamInterrupted
from fluxibly.flow import (
    CallNext,
    Flow,
    Middleware,
    as_chunks,
    ask,
    emit,
    gather,
    map_chunks,
    perform,
    race,
    sleep,
    stop_when,
)
from fluxibly.signals import Signal
from fluxibly.target import Target
from fluxibly.types import Chunk, Message, Request, Response


def tools(functions: dict[str, Callable[..., str]], max_turns: int = 10) -> Middleware:
    """Run the tools that the model calls, and ask again with their results."""

    def loop(request: Request, call_next: CallNext) -> Flow[Response]:
        asked, added = request, ()
        for _ in range(max_turns):
            response = yield from call_next(asked)
            if not response.tool_calls:
                return response.evolve(added=added)
            turn = [response.message]
            for call in response.tool_calls:
                result = yield from perform(partial(functions[call.name], **call.arguments))
                turn.append(Message.tool(result, call))
            yield from emit(Chunk(added=tuple(turn)))
            added += tuple(turn)
            asked = asked.evolve(messages=(*asked.messages, *turn))
        raise RuntimeError(f"expected an answer after {max_turns} turns, got another tool call")

    return loop


def going_on(max_turns: int = 3) -> Middleware:
    """Go on after an answer that was cut at the limit of tokens, or interrupted, by prefilling the answer so far."""

    def go_on(request: Request, call_next: CallNext) -> Flow[Response]:
        text, added, asked = "", (), request
        for turn in range(max_turns):
            last = turn + 1 == max_turns
            try:
                response = yield from call_next(asked)
                cut = response.finish_reason == "length"
            except StreamInterrupted as error:
                if last:
                    raise
                response, cut = error.partial, True
            text = response.text if response.added else text + response.text
            added = (*added, *response.added)
            if last or not cut:
                break
            yield from emit(Chunk(added=()))
            asked = request.evolve(messages=(*request.messages, *added, Message.assistant(text)))
        return response.evolve(text=text, added=added, order=None)

    return go_on


def judged(judge: Target | None = None, through: Sequence[Middleware] = ()) -> Middleware:
    """Ask a model whether an answer is fine, and replace it if not."""

    def guard(request: Request, call_next: CallNext) -> Flow[Response]:
        held: list[Chunk] = []

        def keep(chunk: Chunk) -> None:
            held.append(chunk)

        def verdict() -> Iterator[Any]:
            text = "".join([chunk.text for chunk in held])
            question = request.evolve(messages=f"Is this fine? {text}", metadata={"of": "judge"})
            answer = yield from ask(question, target=judge, through=through)
            if answer.text.startswith("no"):
                yield Chunk("[refused]")
            else:
                yield from held

        return (yield from map_chunks(call_next(request), keep, verdict, at_restart=held.clear))

    return guard


def replayed(response: Response, pace: float = 0.0) -> Middleware:
    """Answer with a stored response, chunk by chunk."""

    def replay(request: Request, call_next: CallNext) -> Flow[Response]:
        request.call.cache_hit = True
        for chunk in as_chunks(response):
            for word in chunk.text.split(" "):
                yield from sleep(pace)
                yield from emit(Chunk(word))
        return response.evolve(text=response.text.replace(" ", ""))

    return replay


def smooth(pace: float) -> Middleware:
    """Wait before each chunk."""

    def smoothed(request: Request, call_next: CallNext) -> Flow[Response]:
        def each(chunk: Chunk) -> Iterator[Any]:
            yield from sleep(pace)
            yield chunk

        return (yield from map_chunks(call_next(request), each))

    return smoothed


def limited(take: Callable[[], object], give: Callable[[], object], agive: Any = None) -> Middleware:
    """Take a slot before the call, and give it back however the call ends, if it was taken."""

    def limit(request: Request, call_next: CallNext) -> Flow[Response]:
        slot = request.call.on_end(give, agive)
        yield from perform(take)
        response = yield from call_next(request)
        yield from slot.run()
        return response

    return limit


def stopping_at(mark: str) -> Middleware:
    """End an answer at a mark, without the mark."""

    def stop(request: Request, call_next: CallNext) -> Flow[Response]:
        def ends(chunk: Chunk) -> bool | Chunk:
            text, found, _ = chunk.text.partition(mark)
            return Chunk(text) if found else False

        return (yield from stop_when(call_next(request), ends))

    return stop


def hedge(delay: float, *, to: Sequence[Target] = (), copies: int = 1) -> Middleware:
    """Send the request again, or to other targets, when nothing has come in time. The first that answers wins."""

    def hedged(request: Request, call_next: CallNext) -> Flow[Response]:
        others = [request.evolve(target=target) for target in to] or [request] * copies
        return (yield from race(call_next, [request, *others], delay))

    return hedged


def informed(look_up: Callable[[], str], alook_up: Any, judge: Target | None = None) -> Middleware:
    """Look a fact up and ask a model at the same time, and add both to the request."""

    def inform(request: Request, call_next: CallNext) -> Flow[Response]:
        fact, answer = yield from gather(
            request, perform(look_up, alook_up), ask(request.evolve(messages="what else?"), target=judge)
        )
        told = Message.user(f"{fact} {answer.text}")
        return (yield from call_next(request.evolve(messages=(*request.messages, told))))

    return inform


class Flight:
    """A call whose answer others wait for."""

    def __init__(self) -> None:
        self.landed = Signal()
        self.response: Response | None = None
        """The answer; None if the call failed."""
        self._seats = [None]

    def leads(self) -> bool:
        """Whether the caller makes the call. Only the first who asks does."""
        try:
            self._seats.pop()  # atomic
        except IndexError:
            return False
        return True

    def land(self) -> None:
        """Wake those who wait. If the call failed, they share the `next`, which one of them makes."""
        self.next = Flight()
        self.landed.set()


def single_flight(key: Callable[[Request], Hashable]) -> Middleware:
    """Make one of several calls with the same key that run at once, and give its answer to the others.

    If it fails, one of the others is made: each caller gets an answer, or the error of a call of its own.
    """
    flights: dict[Hashable, Flight] = {}

    def shared(request: Request, call_next: CallNext) -> Flow[Response]:
        of = key(request)
        flight = flights.setdefault(of, Flight())
        while not flight.leads():
            yield from perform(flight.landed.wait, flight.landed.await_)
            if flight.response is not None:
                request.call.cache_hit = True
                for chunk in as_chunks(flight.response):
                    yield from emit(chunk)
                return flight.response
            flight = flight.next
        flights.setdefault(of, flight)  # so that later calls join the next, too
        try:
            flight.response = yield from call_next(request)
            return flight.response
        finally:
            if flights.get(of) is flight:
                del flights[of]
            flight.land()

    return shared
