"""The lanes of a call: where the effects of several branches are carried out at the same time.

A lane that only waits, for time or for other lanes, needs no thread and no task: the wait of the call itself looks after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextvars import Context
from time import monotonic
from typing import Any, cast

from fluxibly._drivers import stepping
from fluxibly._drivers.diagnosis import report
from fluxibly.calls import CallRecord, Cleanup, Perform
from fluxibly.flow.compose import deadline_exceeded
from fluxibly.flow.effects import PULL, Effect, Lane, Release, Send, Sleep, Start, Wait
from fluxibly.limits import time_left


class Lanes:
    """The state of all lanes of one call, and every decision about them that needs no I/O. `stack` makes the call."""

    now: Callable[[], float] = staticmethod(monotonic)
    """The time by which waits end, in seconds."""

    def __init__(self, stack: Any) -> None:
        self.stack = stack
        self.open: list[Lane] = []
        """The lanes that have begun, and are neither dropped nor adopted."""

    def prepare(self, effect: Send | Start) -> tuple[Lane, Effect, Context | None]:
        """Begin an effect in its lane. Return both, and a context to work in if it takes work, and not only time."""
        lane = cast("Lane", effect.lane)
        begun: Effect = effect.effect if isinstance(effect, Start) else effect
        lane.done = lane.cleaning = False
        lane.outcome = lane.error = lane.waits = lane.until = lane.performing = lane.signal = None
        if lane not in self.open:
            self.open.append(lane)
        context: Context | None = None
        if isinstance(begun, Wait):
            lane.waits = begun
            lane.until = None if begun.seconds is None else self.now() + begun.seconds
        elif isinstance(begun, Sleep):
            self._sleep(lane, begun)
        elif isinstance(begun, Release) and lane.iterator is None:
            lane.done = True
        else:
            context = lane.context.copy()
            if isinstance(begun, Perform):
                lane.performing = begun.within or lane.call
                lane.cleaning = isinstance(begun, Cleanup)
            elif begun is PULL or (isinstance(begun, Send) and begun.request.call.streaming):
                self._note_times(lane.call)
        return lane, begun, context

    def _note_times(self, call: CallRecord) -> None:
        call.requested_at = call.clock()
        if call.sent_at is None:
            call.sent_at = call.requested_at

    def _sleep(self, lane: Lane, effect: Sleep) -> None:
        call = effect.within or lane.call
        seconds, left = effect.seconds, time_left(call.leash, call.clock)
        if left is not None and left <= seconds:
            seconds = max(left, 0.0)
            lane.error = deadline_exceeded(call, call.sent_model)
        lane.until = self.now() + seconds
        if effect.until is not None:
            lane.signal, lane.wake = effect.until, self.waker()
            lane.signal.attach(lane.wake)

    def waker(self) -> Callable[[], object]:
        """Return a function that ends a wait of these lanes, for any thread to call."""
        return lambda: None

    def settle(self, lane: Lane, *, woken: bool) -> None:
        """End the sleep of a lane, if it was one for a signal too."""
        signal, lane.signal = lane.signal, None
        if signal is not None and lane.wake is not None:
            signal.detach(lane.wake)
            lane.wake = None
            lane.outcome = woken
            if woken:
                lane.error = None

    def find(self, lanes: Sequence[Lane], now: float) -> Lane | None:
        """Return the first of these lanes that is done.

        Raises:
            BaseException: a lane has ended with it, and it is not an Exception, which a flow might handle.
        """
        for lane in lanes:
            if not lane.done:
                found = None if lane.waits is None else self.find(lane.waits.lanes, now)
                woken = lane.signal is not None and lane.signal.is_set
                lane.done = woken or found is not None or (lane.until is not None and now >= lane.until)
                lane.outcome = found or lane.outcome
                if lane.done:
                    self.settle(lane, woken=woken)
            if lane.done:
                if lane.error is not None and not isinstance(lane.error, Exception):
                    raise lane.error
                return lane
        return None

    def end_of(self, lanes: Sequence[Lane]) -> float:
        """Return the time at which one of these lanes ends by itself, or infinity."""
        end = math.inf
        for lane in lanes:
            if lane.until is not None:
                end = min(end, lane.until)
            if lane.waits is not None:
                end = min(end, self.end_of(lane.waits.lanes))
        return end

    def stop(self, lane: Lane) -> None:
        """End the call of a provider that goes on in a lane, if the provider can be ended from elsewhere."""
        self.settle(lane, woken=False)
        try:
            if lane.leash is not None:
                lane.leash.stop()
            abort = getattr(lane.iterator, "abort", None)
            if lane.busy and abort is not None:
                abort()
        except Exception as error:  # noqa: BLE001  # it belongs to an attempt that is over
            report_given_up("provider", error)

    def close_flow(self, lane: Lane) -> None:
        """Close the flow of a lane that is given up. An error of its layers changes nothing of the other branches."""
        try:
            lane.context.run(stepping.close, lane.flow)
        except Exception as error:  # noqa: BLE001  # as above
            report_given_up("middleware", error)


class StreamOfLane:
    """A stream of a provider, each step of which runs in the context in which the stream was opened."""

    def __init__(self, iterator: Any, context: Context) -> None:
        self.iterator = iterator
        self.context = context
        if hasattr(iterator, "abort"):
            self.abort = iterator.abort


def report_given_up(who: str, error: BaseException) -> None:
    """Log an error that came after a branch was given up, and that nobody else gets."""
    report(f"a {who} raised {type(error).__name__} while a branch of a race was given up; the call goes on")
