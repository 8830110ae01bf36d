"""The commands `logs`: what is kept of the turns of `chat`."""

from __future__ import annotations

import os
import sqlite3
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fluxibly.cli.commands.app import app, examples
from fluxibly.cli.screen import Screen
from fluxibly.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from fluxibly.cli.turns.store import Listed, TurnStore

logs = typer.Typer(
    help="Show, search, export and delete the turns of chats.",
    rich_markup_mode=None,
    epilog=examples("fluxibly logs", "fluxibly logs search tide", "fluxibly logs show", "fluxibly logs off"),
)
app.add_typer(logs, name="logs")

Count = Annotated[int, typer.Option("--count", "-n", min=1, help="How many turns, counted from the last one.")]
STDOUT = "-"


@logs.callback(invoke_without_command=True)
def _last(context: typer.Context, count: Count = 10) -> None:
    """Show, search, export and delete the turns of chats. Without a command, list the last turns."""
    if context.invoked_subcommand is None:
        with _log() as (screen, store):
            turns = store.turns(count)
            _list(screen, turns, "No turns are logged yet.")


@logs.command(
    context_settings={"ignore_unknown_options": True},  # -x may be a word
    epilog=examples("fluxibly logs search high tide"),
)
def search(
    words: Annotated[list[str], typer.Argument(help="Words of a question or its answer, or how words begin.")],
    count: Count = 10,
) -> None:
    """List the last turns in which all of the words are."""
    with _log() as (screen, store):
        _list(screen, store.search(words, count), "No turn has all of these words.")


@logs.command(epilog=examples("fluxibly logs show", "fluxibly logs show 12"))
def show(number: Annotated[int | None, typer.Argument(metavar="ID", help="By default the last turn.")] = None) -> None:
    """Show a whole turn: its messages, its answer, and its figures."""
    from rich.console import Console

    from fluxibly.cli.turns.report import whole

    with _log() as (_, store):
        turn = store.turn(number)
        if turn is None:
            raise ConfigError("no turns are logged yet" if number is None else f"there is no turn {number}; {_LISTS}")
        console = Console(highlight=False)
        for place, paragraph in enumerate(whole(turn)):
            if place:
                console.print()
            console.print(paragraph, soft_wrap=not console.is_terminal)


_LISTS = "`fluxibly logs` lists them"


@logs.command(epilog=examples("fluxibly logs export --jsonl turns.jsonl"))
def export(
    jsonl: Annotated[
        Path | None, typer.Option("--jsonl", metavar="FILE", help="Write the turns to this file, a line of JSON each.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="Write their spans to this file, for fluxibly trace.")
    ] = None,
    count: Annotated[
        int | None, typer.Option("--count", "-n", min=1, help="How many turns, counted from the last one; else all.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that exists.")] = False,
) -> None:
    """Write turns to files; - is standard output."""
    from fluxibly.cli.turns.report import as_jsonl

    if jsonl is None and trace is None:
        raise ConfigError("export: expected --jsonl FILE or --trace FILE, got neither; - is standard output")
    if jsonl == trace:
        raise ConfigError("export: expected two files, got one for both --jsonl and --trace")
    at_terminal = str(jsonl) == STDOUT and sys.stdout.isatty()
    with _log() as (screen, store):
        if jsonl is not None:
            _write(jsonl, (as_jsonl(turn, ascii_only=at_terminal) for turn in store.whole_turns(count)), force=force)
        if trace is not None:
            spans = (turn.spans for turn in store.whole_turns(count) if turn.spans is not None)
            if not _write(trace, spans, force=force):
                screen.aside("fluxibly: none of the turns has spans", "yellow")


@logs.command(epilog=examples("fluxibly logs status"))
def status() -> None:
    """Say whether chats are logged, where, and how much there is."""
    from fluxibly.cli.turns.log import is_off, shown_path

    with _log() as (screen, store):
        turns = store.count()
        size = store.path.stat().st_size if store.path.exists() else 0
        screen.lines("off: fluxibly logs on turns it on" if is_off() else "on: fluxibly logs off turns it off")
        screen.lines(f"{_number_of(turns)}, {size / 1e6:.2f} MB in {shown_path(store.path)}")
        for file in store.broken():
            screen.lines(f"set aside: {shown_path(file)}")


@logs.command(epilog=examples("fluxibly logs path"))
def path() -> None:
    """Print the path of the log."""
    with _log() as (screen, store):
        screen.lines(str(store.path))


@logs.command(epilog=examples("fluxibly logs off"))
def off() -> None:
    """Do not log chats any more, except with --log. What is there stays; see purge."""
    from fluxibly.cli.turns.store import off_path

    with _log() as (screen, store):
        store.make_folder()
        off_path().touch(mode=0o600)
        screen.note("Chats are not logged any more. fluxibly logs purge deletes what is there.")


@logs.command(epilog=examples("fluxibly logs on"))
def on() -> None:
    """Log chats at a terminal again."""
    from fluxibly.cli.turns.store import off_path

    with _log() as (screen, _):
        off_path().unlink(missing_ok=True)
        screen.note("Chats are logged.")


@logs.command(epilog=examples("fluxibly logs purge"))
def purge(yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False) -> int:
    """Delete all turns."""
    with _log() as (screen, store):
        if not yes:
            if not (sys.stdin.isatty() and screen.live):
                raise ConfigError("purge: there is no terminal to ask at; --yes deletes all turns without asking")
            if not _confirmed(f"Delete {_number_of(store.count())} in {store.path}?"):
                screen.note("Nothing was deleted.")
                return 1
        screen.note(f"Deleted {_number_of(store.purge())}.")
    return 0


def _number_of(turns: int) -> str:
    return f"{turns} turn{'' if turns == 1 else 's'}"


def _confirmed(question: str) -> bool:
    try:
        return typer.confirm(question)
    except typer.Abort:
        raise KeyboardInterrupt from None


@contextmanager
def _log() -> Generator[tuple[Screen, TurnStore]]:
    """Yield the terminal and the log.

    Raises:
        StoreError: the log cannot be read or written.
    """
    from fluxibly.cli.turns.log import reason
    from fluxibly.cli.turns.store import LogError, TurnStore

    screen = Screen()
    try:
        yield screen, TurnStore(lambda text: screen.aside(f"fluxibly: {text}", "yellow"))
    except BrokenPipeError:
        raise
    except (OSError, sqlite3.Error, LogError) as error:
        raise StoreError(reason(error)) from error


def _list(screen: Screen, turns: list[Listed], nothing: str) -> None:
    from fluxibly.cli.turns.report import blocks, rows

    if not turns:
        screen.note(nothing)
    elif screen.live:
        for line in blocks(turns, screen.width):
            screen.show(line)
    else:
        for row in rows(turns):
            screen.write(f"{row}\n")


def _write(file: Path, lines: Iterable[str], *, force: bool) -> int:
    """Write lines to a file or to standard output, and return their number. The file is there when it is whole.

    Raises:
        ConfigError: the file exists, or cannot be written.
    """
    if str(file) == STDOUT:
        return _write_all(lines, sys.stdout.write)
    if file.exists() and not file.is_file():  # such as a pipe
        with file.open("w", encoding="utf-8", errors="replace") as out:
            return _write_all(lines, out.write)
    if file.exists() and not force:
        raise ConfigError(f"{file} exists; --force overwrites it")
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        # Only the owner may read it: it has all that was said.
        descriptor = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        try:
            with open(descriptor, "w", encoding="utf-8", errors="replace") as out:  # noqa: PTH123  # of a descriptor
                count = _write_all(lines, out.write)
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror or error}") from error
    return count


def _write_all(lines: Iterable[str], write: Callable[[str], object]) -> int:
    count = 0
    for line in lines:
        write(f"{line}\n")
        count += 1
    return count
