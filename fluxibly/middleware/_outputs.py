"""When the first output of a stream arrives."""

from __future__ import annotations

from collections.abc import Callable

from fluxibly.calls import CallRecord
from fluxibly.flow.effects import Effect
from fluxibly.flow.relay import OutputWatch


class FirstOutput(OutputWatch):
    """An `OutputWatch` that calls a function when the first output passes."""

    def __init__(self, then: Callable[[], object]) -> None:
        self._then = then

    def see(self, effect: Effect) -> Effect:
        if not self.done:
            super().see(effect)
            if self.done:
                self._then()
        return effect


def asked_at(call: CallRecord, begun: float) -> float:
    """Return when a request was sent at the earliest that a layer has passed on at the time `begun`.

    A stream sends nothing before its consumer asks for the first chunk.
    """
    return begun if call.sent_at is None else max(begun, call.sent_at)
