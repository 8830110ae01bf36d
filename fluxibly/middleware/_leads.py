"""Equal calls of several processes: one asks, and the others look for its answer in the store."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, TypeVar

from fluxibly.flow import Flow, sleep
from fluxibly.flow.compose import check_deadline
from fluxibly.limits import time_left
from fluxibly.middleware._shared import Later, Shared, new_name
from fluxibly.stores import Turn
from fluxibly.types import CallRecord

T = TypeVar("T")

_FIRST_LOOK = 0.05
_LONGEST_LOOK = 0.5
"""The seconds after which a call looks again for the answer of another: at first, and at most."""
_NOTE = "fluxibly.leads"


def can_lead(store: Any) -> bool:
    """Whether processes can agree on who asks, by leases in a store. A user's own may keep only values."""
    methods = ("lease", "alease", "release", "arelease")
    return getattr(store, "local", False) is not True and all(callable(getattr(store, name, None)) for name in methods)


class Lead:
    """A call that asks for others too, as long as it holds a lease in the store.

    Whole calls have one lease, and wait for each other as long as that takes. Where a stream may wait, it has another one,
    which a whole call takes too: nobody waits longer than `patience` for that.

    Args:
        reading: the store, to look for an answer.
        writing: the same store, to take leases.
        key: what is asked.
        patience: the most seconds to wait for a stream, or as a stream.
    """

    def __init__(self, call: CallRecord, reading: Shared, writing: Shared, key: str, patience: float) -> None:
        self._call = call
        self._reading, self._writing = reading, writing
        self._patience = patience
        self._whole, self._stream = f"asking {key}", f"streaming {key}"
        # One name for all that a call does: it must not wait for itself, where two layers have the same store.
        who: str | None = call.notes.get(_NOTE)
        if who is None:
            who = call.notes[_NOTE] = new_name()
        self._who = who
        self._held: list[str] = []
        """The leases that it holds, or may hold."""
        self._later: Later | None = None

    def begin(self, load: Callable[[], Flow[T | None]]) -> Flow[T | None]:
        """Become the call that asks. Return the answer, if another call has got it meanwhile."""
        call = self._call
        self._later = Later(call, self._writing, lambda: [("release", name, self._who) for name in self._held])
        answer: T | None = None
        if not call.streaming:
            answer = yield from self._take(self._whole, math.inf, load)
        if answer is None and self._patience:
            answer = yield from self._take(self._stream, self._patience, load)
        if answer is not None:
            yield from self.end()
        return answer

    def end(self) -> Flow[None]:
        """Let others ask."""
        if self._later is not None:
            yield from self._later.run()

    def _take(self, name: str, patience: float, load: Callable[[], Flow[T | None]]) -> Flow[T | None]:
        """Take a lease, or wait for the answer of the call that has it. Return that answer, if it has come."""
        call, pause = self._call, _FIRST_LOOK
        end = call.clock() + patience
        while True:
            self._held.append(name)
            turn: Turn | None = yield from self._writing.ask(call, "lease", name, self._who, 1, wait=False)
            if turn is None:
                # The call that had it may have got the answer since this one looked.
                return (yield from load())
            self._held.remove(name)
            check_deadline(call, call.sent_model)
            left = end - call.clock()
            if left <= 0:
                return None
            if call.leash is not None:
                left = min(left, time_left(call.leash, call.clock) or left)
            yield from sleep(min(left, pause * random.uniform(0.8, 1.2)))  # noqa: S311  # only so that not all look at once
            pause = min(2 * pause, _LONGEST_LOOK)
            answer = yield from load()
            if answer is not None or self._reading.is_down:
                return answer  # a store that cannot be read never has the answer of another
