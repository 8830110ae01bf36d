"""The lanes of a synchronous call: a thread for each lane that has work."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import Context
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias

from fluxibly._drivers.endings import run_endings
from fluxibly._drivers.lanes import Lanes, StreamOfLane, report_given_up
from fluxibly._drivers.stepping import throwable
from fluxibly.flow.effects import END, PULL, Adopt, Drop, Effect, Lane, Release, Send, Source, Start, Wait

_Work: TypeAlias = tuple[Lane, Effect, Context]


class SyncLanes(Lanes):
    """The lanes of one call. The flows are stepped in the thread that makes the call.

    There are as many threads as lanes that are at work at once: a thread that is free takes the next work of any lane. They
    end when no lane is open.
    """

    def __init__(self, stack: Any) -> None:
        super().__init__(stack)
        self._lock = threading.RLock()  # reentrant, because a signal handler may close the stream
        self._idle = 0
        """The number of threads that wait for work."""
        self._work: SimpleQueue[_Work | None] = SimpleQueue()
        self._changes: SimpleQueue[None] = SimpleQueue()
        """An entry for each change that may end a wait."""
        self._aborted = False

    def carry_out(self, effect: Send | Start | Wait | Drop) -> Lane | None:
        """Carry an effect out and return its outcome."""
        if isinstance(effect, Wait):
            return self.wait(effect.lanes, effect.seconds)
        if isinstance(effect, Drop):
            self.drop(effect.lanes)
        else:
            lane, begun, context = self.prepare(effect)
            if context is not None:
                self.begin(lane, begun, context)
        return None

    def begin(self, lane: Lane, effect: Effect, context: Context) -> None:
        """Begin work in a thread."""
        with self._lock:
            lane.busy = True
            has_thread = self._idle > 0
            self._idle -= has_thread
        if has_thread:
            self._work.put((lane, effect, context))
            return
        try:
            work = (lane, effect, context)
            threading.Thread(target=self._serve, args=(work,), name="fluxibly-lane", daemon=True).start()
        except BaseException:
            lane.busy = False
            raise

    def _serve(self, work: _Work | None) -> None:
        while work is not None:
            lane, effect, context = work
            outcome, error = None, None
            try:
                outcome = context.run(self.work, lane, effect, context)
            except BaseException as raised:  # noqa: BLE001  # it is raised where the lane is awaited
                error = throwable(raised)
            with self._lock:
                dropped = lane.dropped
                lane.busy, lane.done = False, True
                if not dropped:
                    lane.outcome, lane.error = outcome, error
            self._changes.put(None)
            if dropped:
                _release(lane)
            if lane.returned is not None:
                lane.returned.set()
            del work, lane, effect, context, outcome, error  # they refer to the call
            with self._lock:
                stays = bool(self.open)
                self._idle += stays
            work = self._work.get() if stays else None

    def work(self, lane: Lane, effect: Effect, context: Context) -> object:
        """Carry out an effect of a lane. Runs in `context`."""
        if isinstance(effect, Send):
            with self._lock:  # so that a request counts as sent exactly if it was not dropped before
                if lane.dropped:
                    raise InterruptedError("the branch was given up")
                effect.sent = True
            if not effect.request.call.streaming:
                return self.stack.whole(effect)
            _close(lane)
            iterator = iter(self.stack.open(effect))
            lane.iterator = SyncStreamOfLane(iterator, context)
            if lane.dropped:
                getattr(iterator, "abort", _nothing)()
            lane.source.chunk = next(iterator, END)
            return lane.source
        if effect is PULL:
            lane.source.chunk = next(lane.iterator, END)
            return None
        if isinstance(effect, Release):
            _close(lane)
            return None
        return self.stack.carry_out(effect, lane.flow, lane.call)

    def wait(self, lanes: Sequence[Lane], seconds: float | None) -> Lane | None:
        """Wait until one of these lanes is done, and return it. Return None if the seconds pass first.

        Raises:
            ConnectionAbortedError: `abort` was called.
        """
        end = math.inf if seconds is None else self.now() + seconds
        while not self._aborted:
            now = self.now()
            if (lane := self.find(lanes, now)) is not None or now >= end:
                return lane
            self.await_change(min(end, self.end_of(lanes)) - now)
        raise ConnectionAbortedError("the stream was closed")

    def await_change(self, seconds: float) -> None:
        """Wait until something has changed, at most for a number of seconds."""
        with suppress(Empty):
            self._changes.get(timeout=None if seconds > threading.TIMEOUT_MAX else seconds)

    def waker(self) -> Callable[[], object]:
        """Return a function that ends a wait of these lanes, for any thread to call."""
        return partial(self._changes.put, None)

    def drop(self, lanes: Sequence[Lane]) -> None:
        """Give up lanes. What a lane is doing ends as soon as it can be ended; its thread then releases what it holds."""
        given_up: list[Lane] = []
        for lane in lanes:
            with self._lock:
                if lane.dropped:
                    continue
                lane.dropped = True
                busy = lane.busy
                if busy and lane.performing is not None:
                    lane.returned = threading.Event()
            given_up.append(lane)
            self.stop(lane)
            if not busy:
                _release(lane)
            elif (record := lane.performing) is not None:
                record.unfinished = [*(record.unfinished or ()), lane.returned.wait]
            self._leave(lane)
        for lane in given_up:
            self.close_flow(lane)
        for lane in given_up:
            if lane.owns and lane.call.endings:
                run_endings(lane.call)

    def adopt(self, effect: Adopt) -> tuple[Any, Source]:
        """Take over the stream of a lane, which its own thread reads no longer. Return it with its source."""
        lane, into = effect.lane, effect.into
        lane.dropped = True
        self._leave(lane)
        iterator, lane.iterator = lane.iterator, None
        if into is not None and lane.call.streaming:
            _release(into)
            into.iterator, into.source = iterator, lane.source
        return iterator, lane.source

    def _leave(self, lane: Lane) -> None:
        """Note that a lane is not open any more. End the threads if none is."""
        with self._lock:
            if lane in self.open:
                self.open.remove(lane)
            idle = 0 if self.open else self._idle
            self._idle -= idle
        for _ in range(idle):
            self._work.put(None)

    def end(self) -> None:
        """Give up all lanes, because the call has ended."""
        self.drop([*self.open])

    def abort(self) -> None:
        """End a wait in another thread, and all later waits."""
        self._aborted = True
        self._changes.put(None)


class SyncStreamOfLane(StreamOfLane):
    def __iter__(self) -> SyncStreamOfLane:
        return self

    def __next__(self) -> Any:
        item = self.context.run(next, self.iterator, END)
        if item is END:
            raise StopIteration
        return item

    def close(self) -> None:
        self.context.run(getattr(self.iterator, "close", _nothing))


def _close(lane: Lane) -> None:
    """Close the stream of a lane, if there is one."""
    iterator, lane.iterator = lane.iterator, None
    if iterator is not None:
        iterator.close()


def _release(lane: Lane) -> None:
    """Close the stream of a lane that is given up, if there is one."""
    try:
        _close(lane)
    except Exception as error:  # noqa: BLE001  # it belongs to an attempt that is over
        report_given_up("provider", error)


def _nothing() -> None:
    """Do nothing, where there is nothing to end."""
