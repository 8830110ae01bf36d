"""`TurnStore`: the SQLite file of turns. Each operation opens the file and closes it again, because turns are seconds apart.

So the file may be moved or deleted at any time, and nothing of it is open when the process forks or is killed. Its journal is
SQLite's usual one, not a write-ahead log: home directories may lie on a network, where that cannot be used.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from fluxibly._extras import pip_install
from fluxibly.errors import ConfigError, root_cause
from fluxibly.messages import Message
from fluxibly.stores._sqlite_file import alone, identity, is_damage, transaction
from fluxibly.types import Response

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    from fluxibly.cli.turns.masking import Masking
    from fluxibly.config import LLMConfig

T = TypeVar("T")

BUSY = 3.0
"""The most seconds to wait for another process that writes."""
INDEXED = 100_000
"""The most characters of a question or an answer that are listed and searched."""
_AT_ONCE = 100
"""The number of whole turns to read at once."""
APPLICATION_ID = 0x666C7862
"""SQLite's `application_id` of this file: "flxb"."""

# A message refers to the one before it, so that each is kept once, however many turns send it again. `chain` is the hash of
# a message and all before it.
_MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE messages (
        id INTEGER PRIMARY KEY, parent INTEGER REFERENCES messages (id), chain BLOB NOT NULL UNIQUE, body TEXT NOT NULL
    );
    CREATE TABLE turns (
        id INTEGER PRIMARY KEY AUTOINCREMENT, conversation TEXT NOT NULL, time REAL NOT NULL, framework TEXT NOT NULL,
        model TEXT NOT NULL, config_file TEXT, message INTEGER NOT NULL REFERENCES messages (id), response TEXT,
        error_type TEXT, error TEXT, goes_on INTEGER NOT NULL, elapsed REAL, input_tokens INTEGER, output_tokens INTEGER,
        prompt TEXT NOT NULL, answer TEXT NOT NULL, spans TEXT
    );
    CREATE INDEX turns_conversation ON turns (conversation);
    """,
)
"""The statements that lead from each version of the schema to the next. Add to them; never change them."""
VERSION = len(_MIGRATIONS)
_INDEX = """
CREATE VIRTUAL TABLE IF NOT EXISTS turns_index USING fts5 (
    prompt, answer, content='turns', content_rowid='id', tokenize='unicode61 remove_diacritics 2'
)
"""
_IS_INDEXED = "SELECT (SELECT count(*) FROM turns) = (SELECT count(*) FROM turns_index_docsize)"
_MESSAGES = """
WITH RECURSIVE sent (id, parent, body, depth) AS (
    SELECT id, parent, body, 0 FROM messages WHERE id = ?
    UNION ALL SELECT messages.id, messages.parent, messages.body, depth + 1 FROM messages, sent WHERE messages.id = sent.parent
) SELECT body FROM sent ORDER BY depth DESC
"""
_HAS_LETTER = re.compile(r"[^\W_]")
_CONTAINS = r"prompt || char(10) || answer LIKE ? ESCAPE '\'"
_LIKE, _ESCAPED = re.compile(r"[%_\\]"), r"\\\g<0>"
_LISTED = (
    "id, conversation, time, framework, model, error_type, error, elapsed, input_tokens, output_tokens, prompt, answer"
)


def log_path() -> Path:
    """Return the path of the file of turns, where the platform keeps a user's data.

    Raises:
        ConfigError: platformdirs is not installed.
    """
    try:
        import platformdirs
    except ModuleNotFoundError:
        raise ConfigError(f"the log needs packages that are not installed: {pip_install('cli')}") from None

    return platformdirs.user_data_path("fluxibly", appauthor=False) / "logs.db"


def off_path() -> Path:
    """Return the path of the file whose presence means that no turns are kept."""
    return log_path().with_name("logs-off")


class LogError(Exception):
    """The file cannot be used."""


class NewerLog(LogError):
    """The file is that of a newer fluxibly."""

    def __str__(self) -> str:
        return f"a newer fluxibly has written {log_path()}"


class NotALog(LogError):
    """The file is a database of something else."""

    def __str__(self) -> str:
        return f"{log_path()} is no log of fluxibly"


@attrs.frozen(kw_only=True)
class Conversation:
    """A conversation that can go on."""

    id: str
    framework: str
    model: str
    config_file: Path | None
    """The configuration file of its last turn."""
    messages: tuple[Message, ...]
    """The messages that the next question is added to."""

    def settings(
        self, config_file: Path | None, framework: str | None, model: str | None
    ) -> tuple[Path | None, str | None, str | None]:
        """Return the configuration file, framework and model to go on with: those given, or else its own.

        Its own file comes first of all: without it, the messages could go to another service.

        Raises:
            ConfigError: its own file is needed, and does not exist any more.
        """
        if config_file is not None or framework not in (None, self.framework):
            return config_file, framework, model
        if self.config_file is not None and not self.config_file.exists():
            raise ConfigError(
                f"--continue: {self.config_file}, the configuration of the conversation, is gone; give --config"
            )
        return self.config_file, self.framework, self.model if model is None else model


@attrs.frozen(kw_only=True)
class Kept:
    """What is written of a turn: masked, and as JSON."""

    conversation: str
    time: float
    framework: str
    model: str
    config_file: str | None
    messages: tuple[str, ...]
    response: str | None
    error_type: str | None
    error: str | None
    goes_on: bool
    elapsed: float | None
    input_tokens: int | None
    output_tokens: int | None
    prompt: str
    answer: str
    spans: str | None

    @classmethod
    def of(
        cls,
        config: LLMConfig,
        messages: Sequence[Message],
        masking: Masking,
        *,
        conversation: str,
        config_file: Path | None,
        time: float,
        response: Response | None,
        error: BaseException | None,
        goes_on: bool | None,
        spans: Sequence[ReadableSpan],
        elapsed: float | None,
    ) -> Kept:
        """Return a turn as it is written. See `TurnLog.add` for the arguments."""
        cause = None if error is None else root_cause(error)
        usage = None if response is None else response.usage
        asked = [message.text for message in messages if message.role == "user"]
        return cls(
            conversation=conversation,
            time=time,
            framework=config.framework,
            model=masking.text(config.model),
            config_file=None if config_file is None else str(config_file.absolute()),
            messages=tuple([_json(masking.value(message.to_dict())) for message in messages]),
            # The service's own body has nothing that the rest has not, and would double the file.
            response=None if response is None else _json(masking.value(response.evolve(raw=None).to_dict())),
            error_type=None if cause is None else type(cause).__name__,
            error=None if cause is None else _searchable(masking.text(" ".join(str(cause).split()))),
            goes_on=response is not None and (error is None if goes_on is None else goes_on),
            elapsed=response.elapsed if elapsed is None and response is not None else elapsed,
            input_tokens=None if usage is None else usage.input_tokens,
            output_tokens=None if usage is None else usage.output_tokens,
            prompt=_searchable(masking.text(asked[-1] if asked else "")),
            answer=_searchable(masking.text("" if response is None else response.text)),
            spans=_json(masking.value(_otlp(spans))) if spans else None,
        )


def _otlp(spans: Sequence[ReadableSpan]) -> dict[str, Any]:
    from fluxibly.telemetry._file_exporter import as_otlp_json

    return as_otlp_json(spans)


def _json(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which SQLite cannot store
        return json.dumps(value, separators=(",", ":"))
    return text


def _searchable(text: str) -> str:
    return text[:INDEXED].encode(errors="replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


@attrs.frozen(kw_only=True)
class Listed:
    """A turn in a list. `time` is in seconds since 1970, `elapsed` in seconds."""

    id: int
    conversation: str
    time: float
    framework: str
    model: str
    error_type: str | None
    error: str | None
    elapsed: float | None
    input_tokens: int | None
    output_tokens: int | None
    prompt: str
    answer: str


@attrs.frozen(kw_only=True)
class Turn(Listed):
    """A whole turn, with its messages and its response as JSON values."""

    config_file: str | None
    messages: list[dict[str, Any]]
    response: dict[str, Any] | None
    spans: str | None


class TurnStore:
    """The file of turns. It is readable for its owner alone, and so is its folder.

    A file that is damaged, or that is no log, is set aside under another name (`logs.db.broken-…`).

    Args:
        warn: is told in a line that the file was set aside.
        path: the file; None is that of `log_path`.
    """

    def __init__(self, warn: Callable[[str], None], path: Path | None = None) -> None:
        self.path = log_path() if path is None else path
        self._warn = warn

    # Writing

    def create(self) -> bool:
        """Make the file, unless it exists. Return whether it is new.

        Raises:
            OSError: the folder or the file cannot be made or written.
            sqlite3.Error: the file cannot be written.
            NewerLog: a newer fluxibly has written it.
        """
        new = not self.path.exists()
        self._write(lambda db: None)
        return new

    def add(self, turn: Kept) -> int:
        """Write a turn, and return its id.

        Raises:
            OSError, sqlite3.Error, NewerLog: see `create`.
        """
        return self._write(partial(_add, turn))

    def purge(self) -> int:
        """Delete all turns, also those in files that were set aside. Return how many turns there were.

        Raises:
            OSError, sqlite3.Error, NewerLog: see `create`.
        """
        turns = self._write(_purge) if self.path.exists() else 0
        for file in self.broken():
            file.unlink(missing_ok=True)
        return turns

    def broken(self) -> list[Path]:
        """Return the files that were set aside."""
        return sorted(self.path.parent.glob(f"{self.path.name}.broken-[0-9]*"))

    # Reading

    def last_conversation(self) -> Conversation | None:
        """Return the conversation of the last turn; None if there is none."""
        return self._read(_last_conversation, None)

    def turns(self, count: int | None = None) -> list[Listed]:
        """Return the last turns, in the order in which they were written. None: all of them."""
        return self._read(partial(_listed, "", (), count), [])

    def search(self, words: Sequence[str], count: int | None = None) -> list[Listed]:
        """Return the last turns in whose question or answer all words are, or begin a word."""
        return self._read(partial(_search, words, count), [])

    def turn(self, number: int | None) -> Turn | None:
        """Return the turn with an id, or the last turn; None if there is none."""
        which = "ORDER BY id DESC LIMIT 1" if number is None else "WHERE id = ?"
        found = self._read(partial(_turns, which, () if number is None else (number,)), list[Turn]())
        return found[0] if found else None

    def whole_turns(self, count: int | None = None) -> Iterator[Turn]:
        """Yield the last turns whole, in the order in which they were written. None: all of them."""
        last = 0 if count is None else min([turn.id for turn in self.turns(count)], default=1) - 1
        while found := self._read(partial(_turns, f"WHERE id > ? ORDER BY id LIMIT {_AT_ONCE}", (last,)), list[Turn]()):
            yield from found
            last = found[-1].id

    def count(self) -> int:
        """Return the number of turns."""
        return self._read(lambda db: int(db.execute("SELECT count(*) FROM turns").fetchone()[0]), 0)

    # The file

    def _read(self, work: Callable[[sqlite3.Connection], T], nothing: T) -> T:
        """Return what some work returns that reads the file; `nothing` if there is no file, or it had to be set aside."""
        return self._do(work, nothing) if self.path.exists() else nothing

    def _write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        self._make()
        return self._do(work)

    def _do(self, work: Callable[[sqlite3.Connection], T], *nothing: T) -> T:
        """Return what some work with the file returns. A damaged file is set aside, and the work done with a new one.

        Args:
            nothing: what to return instead if the file had to be set aside.
        """
        for _ in range(2):
            file = identity(self.path)
            try:
                return self._with_file(work)
            except (sqlite3.Error, NotALog) as error:
                if file is None or not _is_broken(error):
                    raise
                self._set_aside(file, error)
            if nothing:
                return nothing[0]
            self._make()
        return self._with_file(work)

    def _with_file(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with closing(sqlite3.connect(self.path, timeout=BUSY, isolation_level=None)) as db:
            _prepare(db)
            return work(db)

    def make_folder(self) -> None:
        """Make the folder, if it does not exist, and let nobody else read it.

        Raises:
            OSError: it cannot be made.
        """
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _keep_private(self.path.parent)

    def _make(self) -> None:
        """Make the folder and the file, if they do not exist, and let nobody else read them."""
        self.make_folder()
        with suppress(FileExistsError):
            # The permissions, which SQLite gives to its journal too, are set before there is anything in the file.
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        _keep_private(self.path)

    def _set_aside(self, file: tuple[int, int], error: Exception) -> None:
        """Give the file another name, unless another process has done so."""
        with alone(self.path):
            if identity(self.path) != file:
                return
            name = time.strftime(f"{self.path.name}.broken-%Y%m%d-%H%M%S")
            aside, number = self.path.with_name(name), 1
            while aside.exists():
                number += 1
                aside = self.path.with_name(f"{name}-{number}")
            for suffix in ("-journal", "-wal", "-shm", ""):  # last the file, so that none of a new one is taken
                with suppress(FileNotFoundError):
                    Path(f"{self.path}{suffix}").rename(f"{aside}{suffix}")
        what = "is no log of fluxibly" if isinstance(error, NotALog) else "is damaged"
        self._warn(f"{self.path} {what}; it is now {aside.name}, and a new log begins")


def _keep_private(path: Path) -> None:
    """Take from others the permission to use a file or a folder."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if os.name == "posix" and mode & 0o077:
        with suppress(PermissionError):  # it is another user's
            path.chmod(mode & 0o700)


def _is_broken(error: Exception) -> bool:
    # SQLITE_ERROR: there is no such table or column, because the schema is not the one that the file says that it has.
    return isinstance(error, NotALog) or (
        isinstance(error, sqlite3.DatabaseError)
        and hasattr(error, "sqlite_errorcode")
        and (is_damage(error) or error.sqlite_errorcode == sqlite3.SQLITE_ERROR)
    )


def _prepare(db: sqlite3.Connection) -> None:
    """Check whose file it is, and bring its schema up to date."""
    db.execute("PRAGMA secure_delete = ON")
    if _version(db) < VERSION:
        with transaction(db):
            for version in range(_version(db), VERSION):  # another process may have been faster
                for statement in _MIGRATIONS[version].split(";\n"):
                    db.execute(statement)
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {VERSION}")


def _version(db: sqlite3.Connection) -> int:
    """Return the version of the schema; 0 for an empty file.

    Raises:
        NotALog, NewerLog: the file is not one that this module can use.
    """
    [(version, application, tables)] = db.execute(
        "SELECT user_version, application_id, (SELECT count(*) FROM sqlite_master)"
        " FROM pragma_user_version, pragma_application_id"
    ).fetchall()
    if application != APPLICATION_ID and (tables or version):
        raise NotALog
    if version > VERSION:
        raise NewerLog
    return int(version)


def has_full_text(db: sqlite3.Connection) -> bool:
    """Whether this SQLite has FTS5."""
    return bool(db.execute("SELECT sqlite_compileoption_used('ENABLE_FTS5')").fetchone()[0])


def _add(turn: Kept, db: sqlite3.Connection) -> int:
    full_text = has_full_text(db)
    with transaction(db):
        row = attrs.asdict(turn, recurse=False)
        row["message"] = _last_of(row.pop("messages"), db)
        names = ", ".join(row)
        [(number,)] = db.execute(
            f"INSERT INTO turns ({names}) VALUES ({', '.join('?' * len(row))}) RETURNING id",  # noqa: S608  # names of fields
            tuple(row.values()),
        ).fetchall()
        if full_text:
            db.execute(_INDEX)
            db.execute(
                "INSERT INTO turns_index (rowid, prompt, answer) VALUES (?, ?, ?)", (number, turn.prompt, turn.answer)
            )
    return int(number)


def _last_of(messages: Sequence[str], db: sqlite3.Connection) -> int | None:
    """Write the messages that are not in the file yet. Return the id of the last one."""
    parent, chain = None, b""
    for body in messages:
        chain = sha256(chain + body.encode()).digest()
        found = db.execute("SELECT id FROM messages WHERE chain = ?", (chain,)).fetchall()
        if not found:
            found = db.execute(
                "INSERT INTO messages (parent, chain, body) VALUES (?, ?, ?) RETURNING id", (parent, chain, body)
            ).fetchall()
        parent = int(found[0][0])
    return parent


def _purge(db: sqlite3.Connection) -> int:
    with transaction(db):
        turns = int(db.execute("SELECT count(*) FROM turns").fetchone()[0])
        db.execute("DROP TABLE IF EXISTS turns_index")
        db.execute("DELETE FROM turns")
        db.execute("DELETE FROM messages")
    db.execute("VACUUM")
    return turns


def _listed(which: str, values: Sequence[object], count: int | None, db: sqlite3.Connection) -> list[Listed]:
    """Return the last turns of those that a condition chooses."""
    rows = db.execute(
        f"SELECT {_LISTED} FROM turns {which} ORDER BY id DESC LIMIT ?",  # noqa: S608  # constants of this module
        (*values, -1 if count is None else count),
    ).fetchall()
    return [_row(Listed, row) for row in reversed(rows)]


def _row(kind: type[T], row: Sequence[Any], **more: Any) -> T:
    return kind(**dict(zip(_LISTED.split(", "), row, strict=True)), **more)


def _search(words: Sequence[str], count: int | None, db: sqlite3.Connection) -> list[Listed]:
    words = [_searchable(word) for word in words]
    found: list[Listed] = []
    if all(map(_HAS_LETTER.search, words)) and has_full_text(db) and _indexed(db):
        # In quotes, nothing in a word is an operator.
        query = " ".join(['"' + word.replace('"', '""') + '"*' for word in words])
        found = _listed("WHERE id IN (SELECT rowid FROM turns_index WHERE turns_index MATCH ?)", (query,), count, db)
    if found:
        return found
    # The index passes over signs, and does not know the words of languages that put no spaces between them.
    patterns = [f"%{_LIKE.sub(_ESCAPED, word)}%" for word in words]
    return _listed(f"WHERE {' AND '.join([_CONTAINS] * len(words))}", patterns, count, db)


def _indexed(db: sqlite3.Connection) -> bool:
    """Index the turns that are not indexed, because the SQLite that wrote them had no FTS5. Return whether all are now."""
    try:
        db.execute(_INDEX)
        if db.execute(_IS_INDEXED).fetchone() != (1,):
            db.execute("INSERT INTO turns_index (turns_index) VALUES ('rebuild')")
    except sqlite3.OperationalError:  # the file may be read, but not written
        return False
    return True


def _turns(which: str, values: Sequence[object], db: sqlite3.Connection) -> list[Turn]:
    rows = db.execute(
        f"SELECT {_LISTED}, config_file, message, response, spans FROM turns {which}",  # noqa: S608  # as above
        values,
    ).fetchall()
    return [
        _row(
            Turn,
            listed,
            config_file=config_file,
            messages=_messages(message, db),
            response=None if response is None else json.loads(response),
            spans=spans,
        )
        for *listed, config_file, message, response, spans in rows
    ]


def _messages(last: int, db: sqlite3.Connection) -> list[dict[str, Any]]:
    return [json.loads(body) for (body,) in db.execute(_MESSAGES, (last,))]


def _last_conversation(db: sqlite3.Connection) -> Conversation | None:
    rows = db.execute(
        "SELECT conversation, framework, model, config_file, message, response FROM turns"
        " WHERE goes_on ORDER BY id DESC LIMIT 1"
    ).fetchall()
    if not rows:
        return None
    [(conversation, framework, model, config_file, message, response)] = rows
    answer = Response.from_dict(json.loads(response))
    sent = [Message.from_dict(each) for each in _messages(message, db)]
    return Conversation(
        id=conversation,
        framework=framework,
        model=model,
        config_file=None if config_file is None else Path(config_file),
        messages=(*sent, *answer.added, answer.message),
    )
