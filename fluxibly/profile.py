"""How much time each layer of a stack takes itself; `Timing(layers=True)` asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fluxibly.effects import CallNext, Flow, Middleware
from fluxibly.flow import bind, layer_name
from fluxibly.types import Request, Response


class Profile:
    """The seconds that each layer of one call spent in its own code, by the layer's name."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = {}
        self.below = 0.0
        """What the layers within the one that is running have taken since it was resumed."""

    def within(self, call_next: CallNext) -> CallNext:
        """The layers of `call_next`, each timed."""
        parts: tuple[Middleware, CallNext] | None = getattr(call_next, "parts", None)
        if parts is None:
            return call_next
        layer, inner = parts
        run, name = bind(layer, self.within(inner)), layer_name(layer)

        def timed(request: Request) -> Flow[Response]:
            return self.over(name, run(request))

        return timed

    def over(self, name: str, flow: Flow[Response]) -> Flow[Response]:
        """Run a layer's flow, and charge its steps to it less what the layers within it took."""
        outcome: Any = None
        error: BaseException | None = None
        self.seconds.setdefault(name, 0.0)  # outermost first
        while True:
            above, self.below = self.below, 0.0
            start = self.clock()
            try:
                effect = flow.send(outcome) if error is None else flow.throw(error)
            except StopIteration as stop:
                response: Response = stop.value
                return response
            finally:
                outcome = error = None  # the error refers to this frame
                spent = self.clock() - start
                self.seconds[name] += spent - self.below
                self.below = above + spent
            try:
                outcome = yield effect
            except GeneratorExit:
                flow.close()
                raise
            except BaseException as thrown:  # noqa: BLE001  # it goes into the flow
                error = thrown
