"""The lanes of a synchronous call: a thread for each lane that has work."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextvars import Context
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeAlias

from fluxibly._drivers.endings import run_endings
from fluxibly._drivers.lanes import Lanes, report_given_up
from fluxibly._drivers.stepping import throwable
from fluxibly.flow.effects import END, PULL, Adopt, Drop, Effect, Lane, Release, Send, Source, Start, Wait

_Work: TypeAlias = SimpleQueue[tuple[Effect, Context] | None]


class SyncLanes(Lanes):
    """The lanes of one call. The flows are stepped in the thread that makes the call."""

    def __init__(self, stack: Any) -> None:
        super().__init__(stack)
        self._changed = threading.Condition()
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
        """Begin work in the thread of a lane."""
        if lane.work is None:
            work: _Work = SimpleQueue()
            threading.Thread(target=self._serve, args=(lane, work), name="fluxibly-lane", daemon=True).start()
            lane.work = work
        lane.busy = True
        lane.work.put((effect, context))

    def _serve(self, lane: Lane, work: _Work) -> None:
        while (item := work.get()) is not None:
            effect, context = item
            outcome, error = None, None
            try:
                outcome = context.run(self.work, lane, effect, context)
            except BaseException as raised:  # noqa: BLE001  # it is raised where the lane is awaited
                error = throwable(raised)
            with self._changed:
                lane.outcome, lane.error, lane.done, lane.busy = outcome, error, True, False
                dropped = lane.dropped
                self._changed.notify_all()
            del item, effect, context, outcome, error
            if dropped:
                lane.outcome = lane.error = None
                _release(lane)

    def work(self, lane: Lane, effect: Effect, context: Context) -> object:
        """Carry out an effect of a lane. Runs in `context`."""
        if isinstance(effect, Send):
            with self._changed:  # so that a request counts as sent exactly if it was not dropped before
                if lane.dropped:
                    raise InterruptedError("the branch was given up")
                effect.sent = True
            if not effect.request.call.streaming:
                return self.stack.whole(effect)
            _close(lane)
            iterator = iter(self.stack.open(effect))
            lane.iterator = InContext(iterator, context)
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
        with self._changed:
            end = self.now() + (threading.TIMEOUT_MAX if seconds is None else seconds)
            while not self._aborted:
                now = self.now()
                if (lane := self.find(lanes, now)) is not None or now >= end:
                    return lane
                self.await_change(min(end, self.end_of(lanes)) - now)
        raise ConnectionAbortedError("the stream was closed")

    def await_change(self, seconds: float) -> None:
        """Wait until something has changed, at most for a number of seconds."""
        self._changed.wait(seconds)

    def drop(self, lanes: Sequence[Lane]) -> None:
        """Give up lanes. What a lane is doing ends as soon as it can be ended; its thread then releases what it holds."""
        given_up: list[Lane] = []
        for lane in lanes:
            with self._changed:
                if lane.dropped:
                    continue
                lane.dropped = True
                busy = lane.busy
            given_up.append(lane)
            self.stop(lane)
            if not busy:
                _release(lane)
            elif (record := lane.performing) is not None:
                record.unfinished = [*(record.unfinished or ()), partial(self._await_end, lane)]
            self._leave(lane)
        for lane in given_up:
            self.close_flow(lane)
        for lane in given_up:
            if lane.owns and lane.call.endings:
                run_endings(lane.call)

    def _await_end(self, lane: Lane) -> None:
        """Wait until the work in a lane has returned."""
        with self._changed:
            self._changed.wait_for(lambda: not lane.busy)

    def adopt(self, effect: Adopt) -> tuple[Any, Source]:
        """Take over the stream of a lane, which its own thread reads no longer. Return it with its source."""
        lane, into = effect.lane, effect.into
        lane.dropped = True
        self._leave(lane)
        iterator, lane.iterator = lane.iterator, None
        if into is not None and lane.call.streaming:
            into.iterator, into.source = iterator, lane.source
        return iterator, lane.source

    def _leave(self, lane: Lane) -> None:
        if lane in self.open:
            self.open.remove(lane)
        if lane.work is not None:
            lane.work.put(None)

    def end(self) -> None:
        """Give up all lanes, because the call has ended."""
        self.drop([*self.open])

    def abort(self) -> None:
        """End a wait in another thread, and all later waits."""
        self._aborted = True
        with self._changed:
            self._changed.notify_all()


class InContext:
    """A stream of a provider, each step of which runs in the context in which the stream was opened."""

    def __init__(self, iterator: Any, context: Context) -> None:
        self._iterator = iterator
        self.context = context
        if hasattr(iterator, "abort"):
            self.abort = iterator.abort

    def __iter__(self) -> InContext:
        return self

    def __next__(self) -> Any:
        item = self.context.run(next, self._iterator, END)
        if item is END:
            raise StopIteration
        return item

    def close(self) -> None:
        self.context.run(getattr(self._iterator, "close", _nothing))


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
