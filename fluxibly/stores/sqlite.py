"""`SQLiteStore`: what the processes of one machine share, in a file."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from fluxibly._checks import is_path, number, whole
from fluxibly.errors import ConfigError, StoreError
from fluxibly.stores import _sqlite_queues
from fluxibly.stores._leases import LEASE, Leases
from fluxibly.stores._queues import Places
from fluxibly.stores._sqlite_file import Busy, DiskFull, SQLiteFile
from fluxibly.stores._sqlite_queues import PLACES, RATES, Asking, forget_idle
from fluxibly.stores._worker_threads import WorkerThreads
from fluxibly.stores.protocol import PARTS, Entry, Limit, Turn

__all__ = ["MAX_BYTES", "Busy", "DiskFull", "SQLiteStore"]

_now = time.time
MAX_BYTES = 4_000_000_000
_ROW = 128
"""The bytes that a value takes beside its key and itself, about."""
_NOTE_USES_AFTER = 1.0
"""The seconds after which it is written down which values were read."""
_MOST_USES = 1000
"""The most values whose use is remembered until then."""
_THREADS = 8
"""The most worker threads for the async methods that write, and for those that read. One at a time is at the file."""

# Times are those of the system's clock, because other processes read them. Which value was used last is counted, so that a
# clock that jumps puts nothing out of order.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS fluxibly_values (
    key TEXT PRIMARY KEY NOT NULL, value BLOB NOT NULL, until REAL, used INTEGER NOT NULL, size INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS fluxibly_values_used ON fluxibly_values (used);
CREATE INDEX IF NOT EXISTS fluxibly_values_until ON fluxibly_values (until) WHERE until IS NOT NULL;
CREATE TABLE IF NOT EXISTS fluxibly_size (bytes INTEGER NOT NULL);
INSERT INTO fluxibly_size SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM fluxibly_size);
CREATE TRIGGER IF NOT EXISTS fluxibly_added AFTER INSERT ON fluxibly_values
    BEGIN UPDATE fluxibly_size SET bytes = bytes + new.size; END;
CREATE TRIGGER IF NOT EXISTS fluxibly_removed AFTER DELETE ON fluxibly_values
    BEGIN UPDATE fluxibly_size SET bytes = bytes - old.size; END;
CREATE TRIGGER IF NOT EXISTS fluxibly_changed AFTER UPDATE OF size ON fluxibly_values
    BEGIN UPDATE fluxibly_size SET bytes = bytes + new.size - old.size; END;
CREATE TABLE IF NOT EXISTS fluxibly_sums (key TEXT PRIMARY KEY NOT NULL, total NOT NULL, until REAL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS fluxibly_parts (
    key TEXT NOT NULL, at REAL NOT NULL, amount NOT NULL, PRIMARY KEY (key, at)
) WITHOUT ROWID;
"""
_LOAD = "SELECT value, until FROM fluxibly_values WHERE key = ?"
_SAVE = """
INSERT INTO fluxibly_values VALUES (?, ?, ?, (SELECT coalesce(max(used), 0) + 1 FROM fluxibly_values), ?)
ON CONFLICT (key) DO UPDATE
SET value = excluded.value, until = excluded.until, used = excluded.used, size = excluded.size
"""
_USE = """
UPDATE fluxibly_values SET used = (SELECT max(used) + 1 FROM fluxibly_values) WHERE key = ?
"""
_FORGET_VALUES = "DELETE FROM fluxibly_values WHERE until <= ? RETURNING size"
_FORGET_PARTS = "DELETE FROM fluxibly_parts WHERE key IN (SELECT key FROM fluxibly_sums WHERE until <= ?)"
_FORGET_SUMS = "DELETE FROM fluxibly_sums WHERE until <= ?"
_SUM = """
INSERT INTO fluxibly_sums VALUES (?, ?, ?)
ON CONFLICT (key) DO UPDATE SET total = excluded.total, until = excluded.until
"""
_PART = """
INSERT INTO fluxibly_parts VALUES (?, ?, ?) ON CONFLICT (key, at) DO UPDATE SET amount = excluded.amount
"""


class SQLiteStore:
    """A store in a SQLite file, for any number of threads and processes of one machine. The file must not lie on a network.

    The file is made if it does not exist, readable for its owner alone; its folder has to exist. A file that is damaged is set
    aside under another name, beside a new one.

    A call that waits for a rate or a place polls. It is forgotten if it has not polled half a second after its estimated wait,
    or for a second where there is no estimate. A place is held for `lease_seconds`, and a thread of this process
    renews it meanwhile, so that the places of a killed process are free again after that.

    Args:
        path: the file.
        max_bytes: the most bytes that values may take, from 1 up. Those that were not used for longest are forgotten first.
            The file may be somewhat larger. Sums, rates and places do not count.
        lease_seconds: the seconds for which a place is held without being renewed, above 0. It is renewed at a third of that.

    Raises:
        ConfigError: the folder does not exist, or the path is that of a folder.
    """

    local = False

    def __init__(
        self, path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES, lease_seconds: float = LEASE
    ) -> None:
        found = whole("max_bytes", max_bytes, 1) or number("lease_seconds", lease_seconds, above=0)
        if found is not None:
            raise ConfigError(f"SQLiteStore: {found}")
        self.path = Path(path).expanduser().absolute()
        self.max_bytes = max_bytes
        self.lease_seconds = lease_seconds
        if not os.fspath(path) or not is_path(os.fspath(path)) or self.path.is_dir():
            raise ConfigError(
                f"SQLiteStore: expected the path of a file, got {os.fspath(path)!r}; write sqlite:answers.db"
            )
        if not self.path.parent.is_dir():
            raise ConfigError(f"SQLiteStore: the folder {os.fspath(self.path.parent)!r} does not exist; make it first")
        self._file = SQLiteFile(self.path, _SCHEMA + _sqlite_queues.SCHEMA, _sqlite_queues.NEWEST, _forget_over)
        self._asking = Asking(self._file)
        # Not a method of this store, which would never be collected.
        self._leases = Leases(partial(_renew, self._file, lease_seconds), lease_seconds, type(self).__name__)
        self._reads, self._writes = WorkerThreads(_THREADS), WorkerThreads(_THREADS)
        self._uses: dict[str, None] = {}
        """The values that were read since that was last written down, in order."""
        self._noted_at = time.monotonic()

    def __reduce__(self) -> tuple[Callable[..., SQLiteStore], tuple[Path]]:
        return partial(SQLiteStore, max_bytes=self.max_bytes, lease_seconds=self.lease_seconds), (self.path,)

    def __repr__(self) -> str:
        limit = "" if self.max_bytes == MAX_BYTES else f", max_bytes={self.max_bytes}"
        lease = "" if self.lease_seconds == LEASE else f", lease_seconds={self.lease_seconds:g}"
        return f"{type(self).__name__}({os.fspath(self.path)!r}{limit}{lease})"

    def close(self) -> None:
        """Close the file. The next call opens it again."""
        self._file.close()

    # Rates and places

    def reserve(self, key: str, who: str, limits: tuple[Limit, ...], now: float) -> Turn | None:
        """Take what a call costs of several limits; see `Store.reserve`."""
        return self._asking.ask(RATES, key, who, lambda rates, now: rates.reserve(who, limits, now))

    def correct(self, key: str, limit: Limit, now: float) -> None:
        """Take more of a limit, or give it back; see `Store.correct`."""
        self._file.write(partial(RATES.change, key, lambda rates, now: rates.correct(limit, now)))

    def throttle(self, key: str, name: str, rate: float, seconds: float, now: float) -> None:
        """Slow a limit down for a while; see `Store.throttle`."""
        self._file.write(partial(RATES.change, key, lambda rates, now: rates.throttle(name, rate, seconds, now)))

    def lease(self, key: str, who: str, size: int, now: float, *, wait: bool = True) -> Turn | None:
        """Take one of several places; see `Store.lease`."""

        def step(places: Places, now: float) -> Turn | None:
            return places.lease(who, size, wait=wait, now=now, until=now + self.lease_seconds)

        turn = self._asking.ask(PLACES, key, who, step) if wait else self._file.write(partial(PLACES.change, key, step))
        if turn is None:
            self._leases.hold(key, who)
        return turn

    def renew(self, key: str, who: str, now: float) -> bool:
        """Keep a place for longer; see `Store.renew`. This store does so by itself."""
        return _renew(self._file, self.lease_seconds, key, who)

    def release(self, key: str, who: str, now: float) -> None:
        """Give a place back, or leave a queue; see `Store.release`."""
        self._leases.drop(key, who)
        self._asking.forget(key, who)

        def leave(db: sqlite3.Connection) -> None:
            PLACES.change(key, lambda places, now: places.release(who), db)
            RATES.change(key, lambda rates, now: rates.leave(who), db)

        self._file.write(leave)

    # Values

    def load(self, key: str, now: float) -> Entry | None:
        """Return the value under a key, or None; see `Store.load`."""
        found: list[tuple[bytes, float | None]] = self._file.read(lambda db: db.execute(_LOAD, (key,)).fetchall())
        if not found:
            return None
        value, until = found[0]
        left = float("inf") if until is None else until - _now()
        if left <= 0:
            return None
        uses = self._uses
        uses.pop(key, None)
        if len(uses) < _MOST_USES:
            uses[key] = None
        if time.monotonic() - self._noted_at > _NOTE_USES_AFTER:
            self._note_uses()
        return Entry(value, left)

    def save(self, key: str, value: bytes | None, seconds: float | None, now: float) -> None:
        """Keep a value; see `Store.save`. A value of more than `max_bytes` is not kept.

        Raises:
            DiskFull: there is no room for it.
        """
        size = 0 if value is None else len(key) + len(value) + _ROW
        if value is None or size > self.max_bytes:
            self._file.write(partial(_forget, key, sums=value is None))
        else:
            until = None if seconds is None else _now() + seconds
            self._file.write(partial(self._save, (key, value, until, size)))

    def _save(self, row: tuple[object, ...], db: sqlite3.Connection) -> None:
        db.execute(_SAVE, row)
        [(taken,)] = db.execute("SELECT bytes FROM fluxibly_size").fetchall()
        if taken > self.max_bytes:
            self._make_room(taken, db)

    def _make_room(self, taken: int, db: sqlite3.Connection) -> None:
        """Forget the values that were not used for longest, but not the last one."""
        uses, self._uses = self._uses, {}
        db.executemany(_USE, [(key,) for key in uses])
        taken -= _forget_expired(db)
        while taken > self.max_bytes:
            rows = db.execute("SELECT rowid, size FROM fluxibly_values ORDER BY used LIMIT 100").fetchall()
            for row, size in rows:
                if taken <= self.max_bytes:
                    return
                db.execute("DELETE FROM fluxibly_values WHERE rowid = ?", (row,))
                taken -= size

    def _note_uses(self) -> None:
        """Write down which values were used, unless another thread or process writes."""
        self._noted_at = time.monotonic()

        def note(db: sqlite3.Connection) -> None:
            uses, self._uses = self._uses, {}
            db.executemany(_USE, [(key,) for key in uses])

        with suppress(StoreError, sqlite3.Error):  # the value was read, and which is forgotten first matters little
            self._file.write(note, patience=0)

    # Sums

    def add(self, key: str, amount: float, per: float | None, now: float, *, most: float | None = None) -> float | None:
        """Add to a sum; see `Store.add`. Whole amounts are kept exactly."""
        return self._file.write(partial(_add, key, _exact(amount), per, most))

    async def areserve(self, key: str, who: str, limits: tuple[Limit, ...], now: float) -> Turn | None:
        return await self._writes.run(partial(self.reserve, key, who, limits, now))

    async def acorrect(self, key: str, limit: Limit, now: float) -> None:
        await self._writes.run(partial(self.correct, key, limit, now))

    async def athrottle(self, key: str, name: str, rate: float, seconds: float, now: float) -> None:
        await self._writes.run(partial(self.throttle, key, name, rate, seconds, now))

    async def alease(self, key: str, who: str, size: int, now: float, *, wait: bool = True) -> Turn | None:
        return await self._writes.run(partial(self.lease, key, who, size, now, wait=wait))

    async def arenew(self, key: str, who: str, now: float) -> bool:
        return await self._writes.run(partial(self.renew, key, who, now))

    async def arelease(self, key: str, who: str, now: float) -> None:
        await self._writes.run(partial(self.release, key, who, now))

    async def aload(self, key: str, now: float) -> Entry | None:
        return await self._reads.run(partial(self.load, key, now), abandon=True)

    async def asave(self, key: str, value: bytes | None, seconds: float | None, now: float) -> None:
        await self._writes.run(partial(self.save, key, value, seconds, now))

    async def aadd(
        self, key: str, amount: float, per: float | None, now: float, *, most: float | None = None
    ) -> float | None:
        return await self._writes.run(partial(self.add, key, amount, per, now, most=most))


def _renew(file: SQLiteFile, seconds: float, key: str, who: str) -> bool:
    """Extend a caller's lease to some seconds from now on. Return whether it was still held."""
    return file.write(partial(PLACES.change, key, lambda places, now: places.renew(who, now + seconds)))


def _forget_over(db: sqlite3.Connection) -> None:
    """Forget all that no longer matters."""
    _forget_expired(db)
    forget_idle(db)


def _forget_expired(db: sqlite3.Connection) -> int:
    """Forget the values and sums that are over. Return the bytes that the values took."""
    now = (_now(),)
    sizes: list[tuple[int]] = db.execute(_FORGET_VALUES, now).fetchall()
    db.execute(_FORGET_PARTS, now)
    db.execute(_FORGET_SUMS, now)
    return sum([size for (size,) in sizes])


def _forget(key: str, db: sqlite3.Connection, *, sums: bool) -> None:
    db.execute("DELETE FROM fluxibly_values WHERE key = ?", (key,))
    if sums:
        db.execute("DELETE FROM fluxibly_sums WHERE key = ?", (key,))
        db.execute("DELETE FROM fluxibly_parts WHERE key = ?", (key,))


def _exact(amount: float) -> float:
    """Return a whole amount as an int, which SQLite keeps exactly up to 64 bits."""
    if isinstance(amount, float):
        return int(amount) if amount.is_integer() and abs(amount) < 2**53 else amount
    return amount if abs(amount) < 2**63 else float(amount)


def _add(key: str, amount: float, per: float | None, most: float | None, db: sqlite3.Connection) -> float | None:
    """Add to a sum, in a transaction."""
    now = _now()
    found: list[tuple[float]] = db.execute("SELECT total FROM fluxibly_sums WHERE key = ?", (key,)).fetchall()
    total = found[0][0] if found else 0
    if per is not None and found:
        total = _moved_on(key, total, now, per, db)
    refused = amount >= 0 and most is not None and total + amount > most
    if amount < 0:
        total = max(0, _exact(total + amount))
        _take_off(key, -amount, db)
    elif not refused:
        total = _exact(total + amount)
        if per is not None and amount:
            _add_part(key, amount, now, per, db)
    db.execute(_SUM, (key, total, None if per is None else now + per))
    return None if refused else total


def _moved_on(key: str, total: float, now: float, per: float, db: sqlite3.Connection) -> float:
    """Forget the parts of a sum that are too old, and return what is left of it."""
    late: list[tuple[float]] = db.execute(
        "DELETE FROM fluxibly_parts WHERE key = ? AND at > ? RETURNING amount", (key, now)
    ).fetchall()
    if late:  # the clock was set back, so these would stay for too long
        _add_part(key, sum([amount for (amount,) in late]), now, per, db)
    old: list[tuple[float]] = db.execute(
        "DELETE FROM fluxibly_parts WHERE key = ? AND at <= ? RETURNING amount", (key, now - per)
    ).fetchall()
    if not old:
        return total
    if not db.execute("SELECT 1 FROM fluxibly_parts WHERE key = ? LIMIT 1", (key,)).fetchall():
        return 0  # without the rounding errors of what was added and taken away
    return max(0, _exact(total - sum([amount for (amount,) in old])))


def _add_part(key: str, amount: float, now: float, per: float, db: sqlite3.Connection) -> None:
    last: list[tuple[float, float]] = db.execute(
        "SELECT at, amount FROM fluxibly_parts WHERE key = ? ORDER BY at DESC LIMIT 1", (key,)
    ).fetchall()
    at, before = last[0] if last and now - last[0][0] < per / PARTS else (now, 0)
    db.execute(_PART, (key, at, _exact(before + amount)))


def _take_off(key: str, amount: float, db: sqlite3.Connection) -> None:
    """Take an amount off the oldest parts, which are forgotten first."""
    parts: list[tuple[float, float]] = db.execute(
        "SELECT at, amount FROM fluxibly_parts WHERE key = ? ORDER BY at", (key,)
    ).fetchall()
    for at, part in parts:
        if amount <= 0:
            return
        if part > amount:
            db.execute(_PART, (key, at, _exact(part - amount)))
        else:
            db.execute("DELETE FROM fluxibly_parts WHERE key = ? AND at = ?", (key, at))
        amount -= part
