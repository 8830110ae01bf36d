"""What middleware are made of: effects, the flow of a call through its layers, and the combinators that wrap a stream.

Everything here is pure: no I/O, no clock, no thread. A middleware is one generator function, the same for sync and
async, whole responses and streams::

    def timing(request: Request, call_next: CallNext) -> Flow[Response]:
        start = perf_counter()
        try:
            return (yield from call_next(request))
        finally:
            print(perf_counter() - start)

It does no I/O of its own. Each thing that it wants done it yields as an **effect**, plain data, that travels outward
through all the layers to a driver (`fluxibly/_drivers`), which does it and sends the outcome back. The verbs `sleep`
and `perform` and the combinators `map_chunks` and `hold_back` yield effects for you; the effects themselves
(`effects.py`) are internal.

The invariant of a stream: the driver has read one chunk ahead and put it into the `Source`. The innermost flow yields
it outward as an effect. When that is resumed, the driver has delivered the chunk and read the next one. So a layer
that swallows a chunk yields `PULL` in its place, and one that adds a chunk yields it wrapped in `More`.

Imports: only data (`types`, `messages`, `errors`, `aggregate`). Middleware, telemetry and drivers import from here.
"""

from fluxibly.flow.combinators import hold_back, map_chunks
from fluxibly.flow.compose import compose, perform, sleep
from fluxibly.flow.effects import CallNext, Flow, Middleware

__all__ = ["CallNext", "Flow", "Middleware", "compose", "hold_back", "map_chunks", "perform", "sleep"]
