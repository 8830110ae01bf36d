"""The loop of a layer that looks on and changes nothing but a request's headers: that of `Tracing`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from fluxibly.aggregate import Aggregator
from fluxibly.arrivals import LIMIT, Arrivals
from fluxibly.effects import CallNext, Effect, Flow, More
from fluxibly.types import Chunk, Request, Response, Restart


class Watch:
    """What looks on at one call. None of its methods may raise.

    Chunks are not shown, since a call for each is half of what a `Relay` costs: `arrivals` keeps when they came, and
    `answer` joins them, where there are such.
    """

    looks_on = True
    """Whether it wants to see the effects; it is told of the end in any case."""
    arrivals: Arrivals | None = None
    answer: Aggregator | None = None
    finish_reason: str | None = None
    """Why the stream ends, once a chunk has told."""

    def see(self, effect: Effect) -> None:
        """An effect that is no chunk goes outward."""

    def completed(self, response: Response) -> None:
        """The call succeeded."""

    def failed(self, error: BaseException) -> None:
        """The call failed, was cancelled or given up."""


def watched(begin: Callable[[Request], Watch | None], request: Request, call_next: CallNext) -> Flow[Response]:
    """The layer: `begin` makes what looks on at this call, if anything does."""
    watch = begin(request)
    if watch is None:
        return (yield from call_next(request))
    if not watch.looks_on:
        try:
            response = yield from call_next(request)
        except BaseException as raised:
            watch.failed(raised)
            raise
        watch.completed(response)
        return response
    call, arrivals, answer = request.call, watch.arrivals, watch.answer
    points = [] if arrivals is None else arrivals.points
    until_noted = 0 if arrivals is None else 1  # how many chunks further on the next one to note is
    characters = 0
    effect: Any
    outcome: Any = None
    error: BaseException | None = None
    try:
        flow = call_next(request)
        send = flow.send
        while True:
            try:
                effect = send(outcome) if error is None else flow.throw(error)
            finally:
                error = None  # it refers to this frame
            try:
                while True:
                    if type(effect) is Chunk:
                        chunk = effect
                    elif type(effect) is More:
                        chunk = effect.chunk
                    else:
                        break
                    characters += len(chunk.text)
                    until_noted -= 1
                    if until_noted == 0 and arrivals is not None:
                        points.append((call.clock(), call.asked_at, characters))
                        until_noted = arrivals.stride if len(points) < LIMIT else arrivals.thin()
                    if answer is not None:
                        answer.add(chunk)
                    if not chunk.text_only and chunk.finish_reason:
                        watch.finish_reason = chunk.finish_reason
                    effect = send((yield effect))
                watch.see(effect)
                outcome = yield effect
            except StopIteration:
                raise
            except GeneratorExit:
                flow.close()
                raise
            except BaseException as thrown:  # noqa: BLE001  # it goes into the flow, which raises it anew if it is its own
                error = thrown
            else:
                if type(effect) is Restart and outcome:
                    characters = 0
                    if arrivals is not None:
                        arrivals.begin()
                        until_noted = 1
                    if answer is not None:
                        watch.answer = answer = Aggregator()
    except StopIteration as stop:
        response = cast("Response", stop.value)
    except BaseException as raised:
        watch.failed(raised)
        raise
    watch.completed(response)
    return response
