"""Middleware that times each call, each of its attempts, and optionally each layer."""

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
    """Middleware that writes seconds to `request.call.timings`: "call", and for attempts "attempt.0", "attempt.1", ….

    Times are wall times from this layer inward. In a stream, they include the time that the consumer took.

    Args:
        layers: also write "layer.NAME", the time that each inner middleware spent in its own code, without the layers
            below it and without waits. Layers of the same name are added up. This makes every chunk more expensive, so
            use it to analyse a stack rather than in production.
        record: a function that is called with the timings when the call has ended, whatever its outcome. An exception
            in it is reported once on standard error, and changes nothing.
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
            except Exception as error:  # noqa: BLE001  # reporting a call's timings never changes the call
                report_once("timing", f"Timing(record=…) raised {type(error).__name__}: {as_text(error)}")


class Profile:
    """The seconds that each layer of one call spent in its own code, by the layer's name."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = {}
        self.below = 0.0
        """The seconds that the layers inside of the running layer have taken since it was resumed."""

    def within(self, call_next: CallNext) -> CallNext:
        """Return `call_next` with each of its layers timed."""
        parts: tuple[Middleware, CallNext] | None = getattr(call_next, "parts", None)
        if parts is None:
            return call_next
        layer, inner = parts
        run, name = bind(layer, self.within(inner)), layer_name(layer)

        def timed(request: Request) -> Flow[Response]:
            return self.over(name, run(request))

        return timed

    def over(self, name: str, flow: Flow[Response]) -> Flow[Response]:
        """Run a layer's flow, and charge the layer for the time of its steps, minus the time of the layers below it."""
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
            except BaseException as thrown:  # noqa: BLE001  # the exception goes into the flow
                error = thrown
