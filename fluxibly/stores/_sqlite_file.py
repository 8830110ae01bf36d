"""A SQLite file that threads and processes share: opened lazily, set aside if it is damaged, and closed at a fork."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import RLock
from typing import TypeVar
from weakref import WeakSet

from fluxibly._logs import report_once
from fluxibly.errors import StoreError

T = TypeVar("T")

BUSY = 5.0
"""The most seconds to wait for another thread or process that writes."""
SWEEP = 256
"""The number of changes after which what is over is forgotten."""


class DiskFull(StoreError):
    """There is no room for more."""


class Busy(StoreError):
    """Another thread or process writes, and has not ended in time."""


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


class SQLiteFile:
    """A SQLite file. Its errors name the store that it belongs to.

    Args:
        path: the file, which is made if it does not exist, readable for its owner alone.
        schema: the statements that make what is not there yet.
        newest: the table that was added to the schema last. A file that has it has all.
        sweep: forgets what is over, in a transaction that writes.
    """

    def __init__(self, path: Path, schema: str, newest: str, sweep: Callable[[sqlite3.Connection], None]) -> None:
        self.path = path
        self._schema = schema
        self._newest = newest
        self._sweep = sweep
        self._changes = 0
        self.reader, self.writer = _Side(), _Side()
        """A connection of its own for reading, so that no read waits for a process that writes."""
        _files.add(self)

    def close(self) -> None:
        """Close the file. The next call opens it again."""
        for side in (self.reader, self.writer):
            with side.lock:
                side.close()

    def __del__(self) -> None:
        with suppress(Exception):  # `__init__` may have failed, and Python may be about to end
            self.close()

    def hold(self) -> None:
        """Close the file, and let no thread open it before `let_go`."""
        self.reader.lock.acquire()
        self.writer.lock.acquire()
        self.close()

    def let_go(self) -> None:
        """Undo `hold`."""
        self.writer.lock.release()
        self.reader.lock.release()

    def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do some work that reads, and return its result. No writer delays it."""
        return self._do(self.reader, BUSY, work)

    def write(self, work: Callable[[sqlite3.Connection], T], *, patience: float = BUSY) -> T:
        """Do some work in a transaction that writes, and return its result.

        Args:
            patience: the most seconds to wait for other threads, and then for other processes, that write.

        Raises:
            Busy: they have not ended in time.
            DiskFull: there is no room for more.
        """

        def whole_work(db: sqlite3.Connection) -> T:
            if patience != BUSY:
                db.execute(f"PRAGMA busy_timeout = {patience * 1000:.0f}")
            try:
                with transaction(db):
                    self._changes += 1
                    if self._changes % SWEEP == 0:
                        self._sweep(db)
                    return work(db)
            finally:
                if patience != BUSY:
                    db.execute(f"PRAGMA busy_timeout = {BUSY * 1000:.0f}")

        return self._do(self.writer, patience, whole_work)

    def _do(self, side: _Side, patience: float, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do some work with a connection. If the file is damaged, do it with a new one."""
        try:
            with self._turn_of(side, patience):
                return work(self._opened(side))
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise self._translated(error) from error
        self._set_aside(side)
        try:
            with self._turn_of(side, patience):
                return work(self._opened(side))
        except sqlite3.DatabaseError as error:
            raise self._translated(error) from error

    @contextmanager
    def _turn_of(self, side: _Side, patience: float) -> Generator[None]:
        """Keep other threads from a connection meanwhile. Waiters time out together, not one after the other."""
        if not side.lock.acquire(timeout=patience):
            raise self._busy()
        try:
            yield
        finally:
            side.lock.release()

    def _busy(self) -> Busy:
        return Busy(f"SQLiteStore: others write to {os.fspath(self.path)!r} for too long")

    def _translated(self, error: sqlite3.DatabaseError) -> Exception:
        code = error.sqlite_errorcode & 0xFF
        if code == sqlite3.SQLITE_FULL:
            return DiskFull(f"SQLiteStore: there is no room for more in {os.fspath(self.path)!r}")
        return self._busy() if code == sqlite3.SQLITE_BUSY else error

    def _opened(self, side: _Side) -> sqlite3.Connection:
        """Return the connection of a side, which is opened if it is not. The caller has its lock."""
        if side.connection is not None and identity(self.path) != side.file:
            side.close()  # somebody has removed the file, and other processes would not see what is written there
        if side.connection is None:
            with alone(self.path):
                # The permissions of the file, which those beside it get, too, are set before there is anything in it.
                with suppress(FileExistsError):
                    os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
                side.file = identity(self.path)
                db = sqlite3.connect(self.path, timeout=BUSY, isolation_level=None, check_same_thread=False)
                try:
                    self._prepare(db)
                except BaseException:
                    db.close()
                    raise
                side.connection = db
        return side.connection

    def _prepare(self, db: sqlite3.Connection) -> None:
        end = time.monotonic() + BUSY
        while True:
            try:
                db.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError as error:  # SQLite does not wait for another process that changes this mode
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                    raise
                time.sleep(0.01)
        db.execute("PRAGMA synchronous = NORMAL")
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (self._newest,)).fetchall():
            with transaction(db):
                for statement in self._schema.split(";\n"):
                    db.execute(statement)

    def _set_aside(self, side: _Side) -> None:
        """Give the damaged file of a side another name, unless another thread or process has done so."""
        with self.reader.lock, self.writer.lock:
            self.close()
            with alone(self.path):
                if side.file is None or identity(self.path) != side.file:
                    return
                number = 1
                while (aside := Path(f"{self.path}.broken-{number}")).exists():
                    number += 1
                for suffix in ("-wal", "-shm", ""):  # last the file, so that none of a new one is taken
                    with suppress(FileNotFoundError):
                        Path(f"{self.path}{suffix}").rename(f"{aside}{suffix}")
        report_once(
            f"sqlite {aside}",
            f"SQLiteStore: the file {os.fspath(self.path)!r} is damaged; it is now {aside.name!r}, beside a new one",
        )


@contextmanager
def transaction(db: sqlite3.Connection) -> Generator[None]:
    """Commit all that is written, or nothing."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):  # a full disk may have ended the transaction already
            db.execute("ROLLBACK")
        raise


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
    """Keep other threads and processes from opening or renaming a file meanwhile.

    SQLite opens a file by its name, and the log beside it later, also by its name. A thread that had opened a damaged file,
    and then found the log of the new one, would damage that, too. POSIX moreover takes all locks of a process on a file away
    when it closes the file once.

    Raises:
        Busy: others do so for too long.
    """
    with ExitStack() as locks:
        with suppress(
            ImportError, OSError
        ):  # on Windows, where a file that is open cannot be renamed; some network drives
            import fcntl

            # The folder is locked, since locking the file, or another beside it, would either break SQLite's locks or remain.
            folder = os.open(path.parent, os.O_RDONLY)
            locks.callback(os.close, folder)
            end = time.monotonic() + BUSY
            while not _locked(fcntl.flock, folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
                if time.monotonic() > end:
                    raise Busy(f"SQLiteStore: others open {os.fspath(path)!r} for too long")
                time.sleep(0.002)
        yield


def _locked(flock: Callable[[int, int], None], file: int, how: int) -> bool:
    try:
        flock(file, how)
    except BlockingIOError:
        return False
    return True


# SQLite forbids to use or even to close in a forked process what was opened before. So all files are closed at a fork, and
# no thread is at work with one meanwhile.

_files: WeakSet[SQLiteFile] = WeakSet()
_held: list[SQLiteFile] = []


def _before_fork() -> None:
    for file in [*_files]:
        file.hold()
        _held.append(file)


def _after_fork() -> None:
    while _held:
        _held.pop().let_go()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
