"""Reserving ahead: a process that makes many calls takes a block of a limit in one trip to the store, and hands it out.

The store keeps one queue over all processes, in which a process has one place at a time for each key; the calls of the
process wait in a line of their own. The first of the line, its head, makes the trips, and asks for what it and those behind
it need. While no process is short, it also takes what the next moment is likely to need. A process that makes few calls, or
that has to wait, holds nothing that nobody wants.

**No window admits more than without blocks.** What is reserved ahead goes out within `hold` seconds of the trip, or never. So
the calls of any `w` seconds were reserved within `w + hold`; and as every reservation is made with a burst that is smaller
by what the limit allows in `hold` seconds, they are at most `rate * w + burst`. What was not handed out is not given back:
the store would let it go out a second time, next to what has become free meanwhile. It costs the others at most `hold` seconds
of the rate.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from functools import partial
from threading import RLock
from typing import Any, TypeAlias

from fluxibly._threads import renew_lock_after_fork
from fluxibly.flow import Flow, perform, sleep
from fluxibly.limits import time_left
from fluxibly.middleware._block_lines import Line, hold_of, is_large, is_too_much
from fluxibly.middleware._shared import OnStoreError, Shared, to_end
from fluxibly.stores.protocol import Turn
from fluxibly.types import CallRecord

_Call: TypeAlias = tuple[Any, ...]
"""A call of one of the store's methods: its name and its arguments."""
_Trip: TypeAlias = Generator[_Call, Any, Turn | None]
"""The calls of a trip. Each gets the result of the method."""

_LONG = 10
"""A wait of more than so many blocks shows that the rate is lower than was given, and a block would be too much at once."""
_SWEEP = 1024
"""Once there are so many keys, those without calls are forgotten."""


class Blocks(Shared):
    """The store of a middleware that keeps rates. It reserves ahead in a store that does I/O.

    Args:
        block: the seconds for which to reserve ahead; 0: each call makes trips of its own.
        max_wait: the most seconds that a call waits.
    """

    def __init__(self, store: Any, on_error: OnStoreError, middleware: str, block: float, max_wait: float) -> None:
        super().__init__(store, on_error, middleware)
        self._block = 0.0 if self.local else block
        self._max_wait = max_wait
        self._sweep_at = _SWEEP
        self.renew_lock()
        renew_lock_after_fork(self)

    def renew_lock(self) -> None:
        """Make a new lock, and forget what this process has: in a forked one, its parent goes on with that."""
        self._lock = RLock()  # reentrant, because a signal handler may close a stream
        self._lines: dict[str, Line] = {}
        self._out: dict[CallRecord, Line] = {}
        """The lines of the calls under way that have got what they need."""

    def ask(self, call: CallRecord, method: str, *args: Any, **options: Any) -> Flow[Any]:
        """Do as `Shared.ask`. A reservation is handed out from a block, if there is one."""
        if method != "reserve" or not self._block:
            return (yield from super().ask(call, method, *args, **options))
        key, who, limits = args
        while True:
            now = call.clock()
            with self._lock:
                line = self._lines.get(key) or self._new_line(key, now)
                found = line.ask(who, limits, now)
                if found is True and call not in self._out:
                    self._out[call] = line
                    line.go()
            if found is True:
                hold = hold_of(limits, self._block)
                if hold and is_large(limits, hold):
                    # The whole burst is its own, once what others held at its reservation has gone out.
                    yield from sleep(hold)
                return None
            if found is not False:
                return found
            turn = yield from perform(partial(self._go, call, line, key), partial(self._ago, call, line, key))
            if turn is not None:
                return turn

    def _new_line(self, key: str, now: float) -> Line:
        if len(self._lines) >= self._sweep_at:
            for name in [name for name, line in self._lines.items() if line.is_idle(now)]:
                del self._lines[name]
            self._sweep_at = max(_SWEEP, 2 * len(self._lines))
        line = self._lines[key] = Line(self._block)
        return line

    def settled(self, call: CallRecord, calls: list[_Call]) -> list[_Call]:
        """Return which of the calls of `give` are to be made. Corrections of several calls are sent together."""
        if not self._block:
            return calls
        now, left = call.clock(), list[_Call]()
        with self._lock:
            mine = self._out.pop(call, None)
            if mine is not None:
                mine.end()
            for method, key, *rest in calls:
                line = self._lines.get(key)
                if line is None:
                    left.append((method, key, *rest))
                elif method == "correct":
                    line.owe(*rest)
                    left += [("correct", key, limit) for limit in line.due(now)]
                elif method == "release":
                    if (name := line.leave(rest[0], now)) is not None:
                        left.append(("release", key, name))
                else:
                    line.slow_down(rest[0], rest[1], now + rest[2])
                    left.append((method, key, *rest))
        return left

    # Trips. A trip goes on although its caller may be gone, so that nothing is lost.

    def _trip(self, call: CallRecord, line: Line, key: str) -> _Trip:
        """Ask the store for what the head and others need. Return what it says, or None if the head may ask its line again."""
        began, is_over = call.clock(), False
        left = time_left(call.leash, call.clock)
        longest = min(_LONG * self._block, self._max_wait / 2, math.inf if left is None else left / 2)
        with self._lock:
            plan, is_new = line.begin(began)
            owed = line.owed(began)
        try:
            for limit in owed:
                yield "correct", key, limit
            turn: Turn | None = None
            if plan is not None:
                turn = yield "reserve", key, plan.name, plan.limits
                if turn is not None and is_too_much(plan, turn, longest):
                    yield "release", key, plan.name
                    with self._lock:
                        began = call.clock()
                        plan, is_new = line.begin(began, alone=True)
                    if plan is not None:
                        turn = yield "reserve", key, plan.name, plan.limits
            is_over = True
            with self._lock:
                name = line.land(plan, turn, began, call.clock(), longest, is_new=is_new)
            if name is not None:
                yield "release", key, name
            return turn
        finally:
            if not is_over:
                with self._lock:
                    line.give_up(call.clock())

    def _go(self, call: CallRecord, line: Line, key: str) -> Turn | None:
        trip = self._trip(call, line, key)
        try:
            step = next(trip)
            while True:
                step = trip.send(self._do(call, *step))
        except StopIteration as end:
            turn: Turn | None = end.value
            return turn
        finally:
            trip.close()

    async def _ago(self, call: CallRecord, line: Line, key: str) -> Turn | None:
        return await to_end(self._ago_to_end(call, line, key))

    async def _ago_to_end(self, call: CallRecord, line: Line, key: str) -> Turn | None:
        trip = self._trip(call, line, key)
        try:
            step = next(trip)
            while True:
                step = trip.send(await self._ado(call, *step))
        except StopIteration as end:
            turn: Turn | None = end.value
            return turn
        finally:
            trip.close()
