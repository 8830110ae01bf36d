"""The loop of a layer that looks on and changes nothing but a request's headers: that of `Tracing`."""

from __future__ import annotations

from typing import Any, cast

from fluxibly.aggregate import Aggregator
from fluxibly.arrivals import LIMIT, Arrivals
from fluxibly.effects import Effect, Flow, More
from fluxibly.types import CallRecord, Chunk, Response, Restart


class Watch:
    """Steps an inner flow and sees its effects. Without a call for each chunk, which is half of what a `Relay` costs.

    Chunks are not shown: `arrivals` keeps when they came, and `answer` joins them, where there are such.
    """

    call: CallRecord
    arrivals: Arrivals | None = None
    answer: Aggregator | None = None

    def see(self, effect: Effect) -> None:
        """An effect that is no chunk goes outward. Must not raise."""

    def over(self, flow: Flow[Response]) -> Flow[Response]:
        """Run `flow` and return what it does."""
        send, call, arrivals, answer = flow.send, self.call, self.arrivals, self.answer
        clock = call.clock
        points = [] if arrivals is None else arrivals.points
        until_noted = 0 if arrivals is None else 1  # how many chunks further on the next one to note is
        characters = 0
        effect: Any
        outcome: Any = None
        error: BaseException | None = None
        while True:
            try:
                effect = send(outcome) if error is None else flow.throw(error)
            except StopIteration as stop:
                return cast("Response", stop.value)
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
                        points.append((clock(), call.asked_at, characters))
                        until_noted = arrivals.stride if len(points) < LIMIT else arrivals.thin()
                    if answer is not None:
                        answer.add(chunk)
                    effect = send((yield effect))
                self.see(effect)
                outcome = yield effect
            except StopIteration as stop:
                return cast("Response", stop.value)
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
                        self.answer = answer = Aggregator()
