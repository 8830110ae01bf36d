"""Calls that are the same and run at once: one asks, and the others wait for its answer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import get_ident
from typing import Generic, TypeVar

from fluxibly._threads import renew_lock_after_fork
from fluxibly.flow import Flow, perform, sleep
from fluxibly.flow.compose import check_deadline
from fluxibly.limits import time_left
from fluxibly.signals import Signal
from fluxibly.types import CallRecord

T = TypeVar("T")


class Flight(Generic[T]):
    """A call under way whose answer others wait for."""

    __slots__ = ("_call", "_thread", "answer", "landed")

    def __init__(self, call: CallRecord) -> None:
        self.answer: T | None = None
        self.landed = Signal()
        """Set when the call has an answer, or has failed."""
        self._call = call.notes
        """The notes that the branches and the `ask`s of a call have in common."""
        self._thread = get_ident()

    def land(self, answer: T | None) -> None:
        """Give the answer to those who wait; None: the call has failed."""
        self.answer = answer
        self.landed.set()

    def is_of(self, call: CallRecord) -> bool:
        """Whether a record is of the same call, so that this flight may wait for it."""
        return self._call is call.notes

    def wait(self, seconds: float | None) -> bool:
        """Wait in a thread for the landing. Return whether it has happened.

        Nobody waits in the thread of the flight, which could not go on: a stream that is open there, or a task.
        """
        if self._thread == get_ident():
            return self.landed.is_set
        return self.landed.wait(seconds)


class Flights(Generic[T]):
    """The calls under way, by their keys. Whole calls and streams have flights of their own.

    A whole call waits for a whole call until it has landed. Nobody waits for a stream for longer than `patience` seconds,
    because its consumer may have stopped reading; and no stream waits for anybody for longer, because the same thread may
    have to read another stream meanwhile.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self.renew_lock()
        renew_lock_after_fork(self)

    def renew_lock(self) -> None:
        """Forget the flights, because nobody leads them in a process that was forked. (There is no lock.)"""
        self._whole: dict[str, Flight[T]] = {}
        self._streams: dict[str, Flight[T]] = {}

    def join(self, call: CallRecord, key: str, *, waits: bool) -> Flow[Flight[T] | None]:
        """Return the flight that a call leads, or one that has landed with an answer. None: the call goes alone.

        A call that leads has to `leave` the flight, however it ends.

        Args:
            waits: whether to wait for another call.
        """
        if call.streaming:
            return (yield from self._join_as_stream(call, key, waits=waits))
        mine: Flight[T] = Flight(call)
        # Every access of a dictionary is atomic. A flight that has failed has left before it landed, so this ends.
        while (other := self._whole.setdefault(key, mine)) is not mine:
            if not (waits and (yield from self._landed(call, other))):
                return None
            if other.answer is not None:
                return other
        stream = self._streams.get(key)
        if stream is not None and waits:
            try:
                landed = yield from self._landed_soon(call, stream, self._patience)
                if landed and stream.answer is not None:  # else this call asks
                    mine.land(stream.answer)
            except BaseException:
                self.leave(call, key, mine)
                raise
            if mine.answer is not None:
                self.leave(call, key, mine)
        return mine

    def _join_as_stream(self, call: CallRecord, key: str, *, waits: bool) -> Flow[Flight[T] | None]:
        mine: Flight[T] = Flight(call)
        end = call.clock() + self._patience
        while True:
            other = self._whole.get(key) or self._streams.setdefault(key, mine)
            if other is mine:
                return mine
            if not (waits and (yield from self._landed_soon(call, other, end - call.clock()))):
                return None
            if other.answer is not None:
                return other

    def leave(self, call: CallRecord, key: str, flight: Flight[T]) -> None:
        """End a flight. If it has no answer, one of those who wait leads the next."""
        flights = self._streams if call.streaming else self._whole
        if flights.get(key) is flight:  # else the process was forked
            del flights[key]
        if not flight.landed.is_set:
            flight.land(None)

    def _landed(self, call: CallRecord, flight: Flight[T]) -> Flow[bool]:
        """Wait for a flight, at most until the deadline of the call. Return whether it has landed."""
        if flight.landed.is_set:
            return True
        if flight.is_of(call):
            return False
        check_deadline(call, call.sent_model)
        left = time_left(call.leash, call.clock)
        left = None if left is None else max(left, 0.0)
        wait: Callable[[], bool] = partial(flight.wait, left)
        landed = yield from perform(wait, partial(flight.landed.await_, left))
        if not landed:
            check_deadline(call, call.sent_model)
        return landed

    def _landed_soon(self, call: CallRecord, flight: Flight[T], seconds: float) -> Flow[bool]:
        """Wait for a flight, at most for a number of seconds. Return whether it has landed."""
        if flight.landed.is_set:
            return True
        if flight.is_of(call) or seconds <= 0:
            return False
        return (yield from sleep(seconds, until=flight.landed))
