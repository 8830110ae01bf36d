"""`SQLiteStore`: values and sums in a file, which the processes of one machine share."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import RLock
from typing import TypeVar
from weakref import WeakSet

from fluxibly._checks import is_path, whole
from fluxibly._logs import report_once
from fluxibly.errors import ConfigError, StoreError
from fluxibly.stores.protocol import PARTS, Entry

T = TypeVar("T")

_now = time.time
MAX_BYTES = 4_000_000_000
_BUSY = 5.0
"""The most seconds to wait for another process that writes."""
_ROW = 128
"""The bytes that a value takes beside its key and itself, about."""
_NOTE_USES_AFTER = 1.0
"""The seconds after which it is written down which values were read."""
_MOST_USES = 1000
"""The most values whose use is remembered until then."""
_SWEEP = 256
"""The number of changes after which what has expired is forgotten."""

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


class DiskFull(StoreError):
    """There is no room for more."""


class _Side:
    """A connection that one thread at a time uses, and its lock."""

    def __init__(self) -> None:
        self.lock = RLock()  # reentrant, because a signal handler may close a stream
        self.connection: sqlite3.Connection | None = None
        self.file: tuple[int, int] | None = None
        """What identifies the file that was opened last."""

    def close(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close()


class SQLiteStore:
    """A store in a SQLite file, for any number of threads and processes of one machine. The file must not lie on a network.

    It has values and sums (`load`, `save`, `add`), and not yet the methods for limits and queues. The file is made if it does
    not exist, readable for its owner alone; its folder has to exist. A file that is damaged is set aside under another name,
    beside a new one.

    Args:
        path: the file.
        max_bytes: the most bytes that values may take, from 1 up. Those that were not used for longest are forgotten first.
            The file may be somewhat larger. Sums do not count.

    Raises:
        ConfigError: the folder does not exist, or the path is that of a folder.
    """

    local = False

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> None:
        found = whole("max_bytes", max_bytes, 1)
        if found is not None:
            raise ConfigError(f"SQLiteStore: {found}")
        self.path = Path(path).expanduser().absolute()
        self.max_bytes = max_bytes
        if not os.fspath(path) or not is_path(os.fspath(path)) or self.path.is_dir():
            raise ConfigError(
                f"SQLiteStore: expected the path of a file, got {os.fspath(path)!r}; write sqlite:answers.db"
            )
        if not self.path.parent.is_dir():
            raise ConfigError(f"SQLiteStore: the folder {os.fspath(self.path.parent)!r} does not exist; make it first")
        self._reader, self._writer = _Side(), _Side()
        """A connection of its own for reading, so that no read waits for a process that writes."""
        self._uses: dict[str, None] = {}
        """The values that were read since that was last written down, in order."""
        self._noted_at = time.monotonic()
        self._changes = 0
        _stores.add(self)

    def __reduce__(self) -> tuple[Callable[..., SQLiteStore], tuple[Path]]:
        return partial(SQLiteStore, max_bytes=self.max_bytes), (self.path,)

    def __repr__(self) -> str:
        limit = "" if self.max_bytes == MAX_BYTES else f", max_bytes={self.max_bytes}"
        return f"{type(self).__name__}({os.fspath(self.path)!r}{limit})"

    def close(self) -> None:
        """Close the file. The next call opens it again."""
        for side in (self._reader, self._writer):
            with side.lock:
                side.close()

    def __del__(self) -> None:
        with suppress(Exception):  # `__init__` may have failed, and Python may be about to end
            self.close()

    def hold(self) -> None:
        """Close the file, and let no thread open it before `let_go`."""
        self._reader.lock.acquire()
        self._writer.lock.acquire()
        self.close()

    def let_go(self) -> None:
        """Undo `hold`."""
        self._writer.lock.release()
        self._reader.lock.release()

    # Values

    def load(self, key: str, now: float) -> Entry | None:
        """Return the value under a key, or None; see `Store.load`."""
        found: list[tuple[bytes, float | None]] = self._do(
            self._reader, lambda db: db.execute(_LOAD, (key,)).fetchall()
        )
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
            self._write(partial(_forget, key, sums=value is None))
        else:
            until = None if seconds is None else _now() + seconds
            self._write(partial(self._save, (key, value, until, size)))

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
        if not self._writer.lock.acquire(blocking=False):
            return
        try:
            uses, self._uses = self._uses, {}
            db = self._opened(self._writer)
            db.execute("PRAGMA busy_timeout = 0")
            try:
                with transaction(db):
                    db.executemany(_USE, [(key,) for key in uses])
            finally:
                db.execute(f"PRAGMA busy_timeout = {_BUSY * 1000:.0f}")
        except sqlite3.Error:
            pass  # the value was read, and which is forgotten first matters little
        finally:
            self._writer.lock.release()

    # Sums

    def add(self, key: str, amount: float, per: float | None, now: float, *, most: float | None = None) -> float | None:
        """Add to a sum; see `Store.add`. Whole amounts are kept exactly."""
        return self._write(partial(_add, key, _exact(amount), per, most))

    # The file

    def _write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do some work in a transaction that writes, and return its result."""

        def whole_work(db: sqlite3.Connection) -> T:
            with transaction(db):
                self._changes += 1
                if self._changes % _SWEEP == 0:
                    _forget_expired(db)
                return work(db)

        return self._do(self._writer, whole_work)

    def _do(self, side: _Side, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do some work with a connection. If the file is damaged, do it with a new one."""
        try:
            with side.lock:
                return work(self._opened(side))
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise self._translated(error) from error
        self._set_aside(side)
        try:
            with side.lock:
                return work(self._opened(side))
        except sqlite3.DatabaseError as error:
            raise self._translated(error) from error

    def _translated(self, error: sqlite3.DatabaseError) -> Exception:
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_FULL:
            return DiskFull(f"SQLiteStore: there is no room for more in {os.fspath(self.path)!r}")
        return error

    def _opened(self, side: _Side) -> sqlite3.Connection:
        """Return the connection of a side, which is opened if it is not. The caller has its lock."""
        if side.connection is not None and identity(self.path) != side.file:
            side.close()  # somebody has removed the file, and other processes would not see what is written there
        while side.connection is None:
            # The permissions of the file, which those beside it get, too, are set before there is anything in it.
            with suppress(FileExistsError):
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            side.file = identity(self.path)
            db = sqlite3.connect(self.path, timeout=_BUSY, isolation_level=None, check_same_thread=False)
            try:
                if identity(self.path) == side.file:  # else somebody has just set it aside
                    _prepare(db)
                    side.connection = db
            finally:
                if side.connection is None:
                    db.close()
        return side.connection

    def _set_aside(self, side: _Side) -> None:
        """Give the damaged file of a side another name, unless another thread or process has done so."""
        with self._reader.lock, self._writer.lock:
            self.close()
            with alone(self.path):
                if side.file is None or identity(self.path) != side.file:
                    return
                number = 1
                while (aside := Path(f"{self.path}.broken-{number}")).exists():
                    number += 1
                for suffix in ("", "-wal", "-shm"):
                    with suppress(FileNotFoundError):
                        Path(f"{self.path}{suffix}").rename(f"{aside}{suffix}")
        report_once(
            f"sqlite {aside}",
            f"SQLiteStore: the file {os.fspath(self.path)!r} is damaged; it is now {aside.name!r}, beside a new one",
        )

    async def aload(self, key: str, now: float) -> Entry | None:
        return await _in_thread(partial(self.load, key, now), abandon=True)

    async def asave(self, key: str, value: bytes | None, seconds: float | None, now: float) -> None:
        await _in_thread(partial(self.save, key, value, seconds, now))

    async def aadd(
        self, key: str, amount: float, per: float | None, now: float, *, most: float | None = None
    ) -> float | None:
        return await _in_thread(partial(self.add, key, amount, per, now, most=most))


async def _in_thread(work: Callable[[], T], *, abandon: bool = False) -> T:
    """Do some work in a worker thread. A cancellation waits for it, unless it may be abandoned."""
    import anyio.to_thread  # late, to keep the import of stores fast

    return await anyio.to_thread.run_sync(work, abandon_on_cancel=abandon)


def _prepare(db: sqlite3.Connection) -> None:
    end = time.monotonic() + _BUSY
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError as error:  # SQLite does not wait for another process that changes this mode
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(0.01)
    db.execute("PRAGMA synchronous = NORMAL")
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'fluxibly_parts'").fetchall():
        with transaction(db):
            for statement in _SCHEMA.split(";\n"):
                db.execute(statement)


@contextmanager
def transaction(db: sqlite3.Connection) -> Generator[None]:
    """Let all that is written come to pass, or nothing of it."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):  # a full disk may have ended the transaction already
            db.execute("ROLLBACK")
        raise


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
    if late:  # the clock was put back, so these would stay for too long
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


def is_damage(error: sqlite3.DatabaseError) -> bool:
    return error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def identity(path: Path) -> tuple[int, int] | None:
    """Return what identifies a file, or None if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


@contextmanager
def alone(path: Path) -> Generator[None]:
    """Keep other threads and processes from renaming a file meanwhile."""
    with _renaming, ExitStack() as locks:
        with suppress(ImportError):  # on Windows, where a file that is open cannot be renamed anyway
            import fcntl

            # A file of its own: to close the database, opened once more, would take the locks of SQLite away.
            file = os.open(f"{path}.broken-lock", os.O_CREAT | os.O_RDWR, 0o600)
            locks.callback(os.close, file)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


_renaming = RLock()


# SQLite forbids to use or even to close in a forked process what was opened before. So all files are closed at a fork, and
# no thread is at work with one meanwhile.

_stores: WeakSet[SQLiteStore] = WeakSet()
_held: list[SQLiteStore] = []


def _before_fork() -> None:
    for store in [*_stores]:
        store.hold()
        _held.append(store)


def _after_fork() -> None:
    while _held:
        _held.pop().let_go()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
