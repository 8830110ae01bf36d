"""The parts of middleware: effects, the flow of a call through its layers, and the combinators that wrap a stream.

Nothing here does I/O, waits or starts a thread. A middleware is one generator function, the same for sync and async, whole
responses and streams::

    def timing(request: Request, call_next: CallNext) -> Flow[Response]:
        start = perf_counter()
        try:
            return (yield from call_next(request))
        finally:
            durations.append(perf_counter() - start)

A middleware yields each thing that it wants done as an **effect**: plain data that travels outward through all the layers
to a driver (`fluxibly/_drivers`), which does it and sends the outcome back. The verbs `sleep` and `perform` and the
combinators `map_chunks` and `hold_back` yield effects for you; the effects themselves (`effects.py`) are internal.

The invariant of a stream: the driver has read one chunk ahead and put it into the `Source`. The innermost flow yields that
chunk outward as an effect. When the flow is resumed, the driver has delivered the chunk and read the next chunk. So a
layer that swallows a chunk yields `PULL` instead, and a layer that adds a chunk yields it wrapped in `More`.

`combinators.py` has what the combinators share; `mapping.py`, `holding.py` and `stopping.py` have one each. `lanes.py` has
`race` and `gather`, for several flows of one call.

Imports: data (`types`, `errors`, `aggregate`, `_checks`). Every room that composes or wraps flows imports from here.
"""

from typing import TYPE_CHECKING

from fluxibly.aggregate import Aggregator, as_chunk, as_chunks
from fluxibly.flow.compose import compose, provider_of
from fluxibly.flow.effects import CallNext, Flow, Middleware
from fluxibly.flow.holding import hold_back
from fluxibly.flow.mapping import map_chunks
from fluxibly.flow.stopping import stop_when
from fluxibly.flow.verbs import ask, emit, perform, sleep

__all__ = [
    "Aggregator",
    "CallNext",
    "Flow",
    "Middleware",
    "as_chunk",
    "as_chunks",
    "ask",
    "compose",
    "emit",
    "gather",
    "hold_back",
    "map_chunks",
    "perform",
    "provider_of",
    "race",
    "sleep",
    "stop_when",
]

if TYPE_CHECKING:
    from fluxibly.flow.lanes import gather, race
else:
    # `Target` reads configurations, so it stands further out, but a middleware author looks for it here as well. Few calls
    # need the others.
    _LATE = {"Target": "fluxibly.target", "gather": "fluxibly.flow.lanes", "race": "fluxibly.flow.lanes"}

    def __getattr__(name):
        if name not in _LATE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(_LATE[name]), name)
