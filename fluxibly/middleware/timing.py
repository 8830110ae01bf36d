"""Times each call, each of its attempts, and on request each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from fluxibly._logs import report_once
from fluxibly._masking import as_text
from fluxibly.flow import CallNext, Flow, Middleware
from fluxibly.flow.compose import bind, layer_name
from fluxibly.types import CallRecord, Request, Response


@attrs.frozen(kw_only=True)
class Timing:
    """Writes to `request.call.timings`, in seconds: "call" and, for the attempts, "attempt.0", "attempt.1", ….

    Times are wall times from here inward: in a stream they include what the consumer took.

    Args:
        layers: also "layer.NAME", the time that each middleware within this one spent itself (not in the layers
            below it, nor waiting; those of the same name together). It makes every chunk dearer; for looking into a
            stack, not for production.
        record: called with the timings when the call has ended, however it did. An exception in it is reported once
            on standard error, and changes nothing.
    """

    layers: bool = False
    record: Callable[[Mapping[str, float]], None] | None = None

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        call = request.call
        call.attempt_times = []
        profile = Profile(call.clock) if self.layers else None
        if profile is not None:
            call_next = profile.within(call_next)
        start = call.clock()
        try:
            return (yield from call_next(request))
        finally:
            self._record(call, call.clock() - start, profile)

    def _record(self, call: CallRecord, elapsed: float, profile: Profile | None) -> None:
        timings = call.timings
        timings["call"] = elapsed
        attempts = call.attempt_times or ()
        if len(attempts) == 1:  # nearly always
            timings["attempt.0"] = attempts[0]
        else:
            timings.update((f"attempt.{index}", seconds) for index, seconds in enumerate(attempts))
        if profile is not None:
            for name, seconds in profile.seconds.items():
                timings[f"layer.{name}"] = seconds
        if self.record is not None:
            try:
                self.record(timings)
            except Exception as error:  # noqa: BLE001  # what is told about a call never changes it
                report_once("timing", f"Timing(record=…) raised {type(error).__name__}: {as_text(error)}")


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
