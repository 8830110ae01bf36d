"""The queues of rates and places in a SQLite file: each is JSON in a row of its own, which every step reads and writes."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Generic, TypeVar

from fluxibly.stores._queues import GRACE, Places, Queue, Rates
from fluxibly.stores._sqlite_file import BUSY, Busy, SQLiteFile
from fluxibly.stores.protocol import Limit, Turn

Q = TypeVar("Q", bound=Queue[Any])
T = TypeVar("T")

# The processes of one machine have this clock in common, and nobody can set it. It restarts with the machine.
_clock = time.monotonic

_MOST_WAITING = 100_000
"""The most waiting callers that a process remembers."""
_SHORT = 0.05
"""The most seconds to wait for other writers, where it is enough to write later."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS fluxibly_queues (
    kind TEXT NOT NULL, key TEXT NOT NULL, state TEXT NOT NULL, at REAL NOT NULL, idle_at REAL NOT NULL,
    PRIMARY KEY (kind, key)
);
CREATE INDEX IF NOT EXISTS fluxibly_queues_idle_at ON fluxibly_queues (idle_at);
"""
NEWEST = "fluxibly_queues"
_LOAD = "SELECT state, at FROM fluxibly_queues WHERE kind = ? AND key = ?"
_SAVE = """
INSERT INTO fluxibly_queues VALUES (?, ?, ?, ?, ?) ON CONFLICT (kind, key) DO UPDATE
SET state = excluded.state, at = excluded.at, idle_at = excluded.idle_at
"""
_DELETE = "DELETE FROM fluxibly_queues WHERE kind = ? AND key = ?"
_FORGET_IDLE = "DELETE FROM fluxibly_queues WHERE idle_at <= ?"


_encode = json.JSONEncoder(separators=(",", ":")).encode


@lru_cache(maxsize=16)
def _decoded(state: str) -> list[Any]:
    """Decode a text of JSON. Waiters read the same text again and again, and nobody changes the result."""
    decoded: list[Any] = json.loads(state)
    return decoded


class Kind(Generic[Q]):
    """A kind of queues, and how the file keeps them.

    Args:
        name: the name of the kind.
        make: makes an empty queue.
        dump: returns what JSON can say of a queue.
        fill: sets what `dump` has returned, in dictionaries of the queue's own.
    """

    def __init__(
        self, name: str, make: Callable[[], Q], dump: Callable[[Q], list[Any]], fill: Callable[[Q, list[Any]], None]
    ) -> None:
        self._name = name
        self._make = make
        self._dump = dump
        self._fill = fill

    def read(self, key: str, db: sqlite3.Connection) -> tuple[Q, str, float]:
        """Return a queue as it is now, what the file says of it ("" if nothing), and the time."""
        found: list[tuple[str, float]] = db.execute(_LOAD, (self._name, key)).fetchall()
        now = _clock()
        queue, state = self._make(), ""
        if found:
            state, at = found[0]
            try:
                self._fill(queue, _decoded(state))
            except (TypeError, ValueError):  # written by a version with another format, or damaged
                return self._make(), state, now
            if now < at:  # the machine has been restarted since
                queue.shift(now - at)
            queue.forget_dead(now)
        return queue, state, now

    def change(self, key: str, step: Callable[[Q, float], T], db: sqlite3.Connection) -> T:
        """Do a step of a queue in a transaction that writes, and return its result."""
        queue, before, now = self.read(key, db)
        result = step(queue, now)
        idle_at = queue.idle_at()
        if idle_at <= now:
            if before:
                db.execute(_DELETE, (self._name, key))
            return result
        state = _encode(self._dump(queue))
        if state != before:
            db.execute(_SAVE, (self._name, key, state, now, idle_at))
        return result


def forget_idle(db: sqlite3.Connection) -> None:
    """Forget the queues that no longer matter."""
    db.execute(_FORGET_IDLE, (_clock(),))


def _dump_rates(rates: Rates) -> list[Any]:
    return [
        *(rates.waiting, rates.until, rates.limits),
        *(rates.arrivals, rates.ceilings, rates.closed_until, rates.queued),
    ]


def _fill_rates(rates: Rates, state: list[Any]) -> None:
    waiting, until, limits, arrivals, ceilings, rates.closed_until, queued = state
    rates.waiting, rates.until = dict(waiting), dict(until)
    rates.limits = tuple([Limit(*limit) for limit in limits])
    rates.arrivals, rates.queued = dict(arrivals), dict(queued)
    rates.ceilings = {name: (rate, until) for name, (rate, until) in ceilings.items()}


def _dump_places(places: Places) -> list[Any]:
    return [places.waiting, places.until, places.held]


def _fill_places(places: Places, state: list[Any]) -> None:
    places.waiting, places.until, places.held = [dict(each) for each in state]


RATES = Kind("rates", Rates, _dump_rates, _fill_rates)
PLACES = Kind("places", Places, _dump_places, _fill_places)


class Asking:
    """How the callers of one process ask for a turn, and ask again.

    A waiter polls, mostly in vain. A poll is a read, which no writer delays, as long as the file will remember the caller for
    long enough.
    """

    def __init__(self, file: SQLiteFile) -> None:
        self._file = file
        self._waiting: dict[tuple[str, str], None] = {}
        """The keys and names of the waiters, as far as this process knows. The file has the last word."""

    def ask(self, kind: Kind[Q], key: str, who: str, step: Callable[[Q, float], Turn | None]) -> Turn | None:
        """Take a step that may give a caller what it asks for, or a turn in the queue."""
        turn: Turn | None = None
        if (key, who) in self._waiting:
            turn, is_known = self._file.read(lambda db: _look(kind, key, who, step, db))
            if turn is not None and is_known:
                return turn
        patience = BUSY if turn is None else _SHORT
        try:
            turn = self._file.write(lambda db: kind.change(key, step, db), patience=patience)
        except Busy:
            if turn is None:
                raise
        if turn is None:
            self.forget(key, who)
        elif len(self._waiting) < _MOST_WAITING:
            self._waiting[key, who] = None
        return turn

    def forget(self, key: str, who: str) -> None:
        """Note that a caller no longer waits."""
        self._waiting.pop((key, who), None)


def _look(
    kind: Kind[Q], key: str, who: str, step: Callable[[Q, float], Turn | None], db: sqlite3.Connection
) -> tuple[Turn | None, bool]:
    """Return the turn that a step would give now, and whether the file will remember the caller, and its wish, for long enough."""
    queue, _, now = kind.read(key, db)
    known_until, known = queue.until.get(who, now), queue.waiting.get(who)
    turn = step(queue, now)
    if turn is None:
        return None, False
    until = queue.until.get(who, now)
    is_same = _encode(queue.waiting.get(who)) == _encode(known)
    return turn, is_same and until - GRACE / 2 <= known_until <= until + GRACE
