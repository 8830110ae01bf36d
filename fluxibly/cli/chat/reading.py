"""Questions as they are typed: by prompt_toolkit, or line by line at a terminal that cannot move its cursor."""

from __future__ import annotations

import importlib.util
import os
import select
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    from fluxibly.cli.screen import Screen

PROMPT, MORE = "> ", "  "
QUOTES = '"""'
HOW = (
    'Alt-Enter begins a new line, and so does a \\ at the end of one; """ begins a text that ends at the next """. '
    "What you paste is one question."
)


class Reader(Protocol):
    """Reads questions."""

    def read(self) -> str:
        """Return the next question.

        Raises:
            EOFError: there is none (Ctrl-D).
            KeyboardInterrupt: the user has given up what was typed.
        """
        ...


def reader_of(screen: Screen, commands: Iterable[str], *, keep: bool) -> Reader:
    """Return the reader for this terminal. `keep`: whether questions are kept for the next session."""
    if not screen.draws or importlib.util.find_spec("prompt_toolkit") is None:
        return LineReader()
    return EditingReader(commands, history_path() if keep else None)


def history_path() -> Path | None:
    """Return the file of the questions of earlier sessions, which is readable for its owner alone; None: there can be none."""
    try:
        import platformdirs

        file = platformdirs.user_state_path("fluxibly", appauthor=False) / "chat-history"
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o600))
    except (ImportError, OSError):
        return None
    with suppress(OSError):
        file.chmod(0o600)
    return file


def is_complete(text: str) -> bool:
    """Whether Enter ends a question: not within quotes, and not after a backslash."""
    stripped = text.lstrip()
    if stripped.startswith(QUOTES):
        return stripped.rstrip().endswith(QUOTES) and len(stripped.rstrip()) >= 2 * len(QUOTES)
    return not text.endswith("\\")


def unquoted(text: str) -> str:
    """Return a question without the quotes around it."""
    stripped = text.strip()
    if stripped.startswith(QUOTES) and stripped.endswith(QUOTES) and len(stripped) >= 2 * len(QUOTES):
        return stripped[len(QUOTES) : -len(QUOTES)].strip("\n")
    return text


class LineReader:
    """Reads line by line. Lines that come at once are a paste, and one question."""

    def read(self) -> str:
        """Return the next question; see `Reader`."""
        try:
            return self._read()
        except (KeyboardInterrupt, EOFError):
            sys.stdout.write("\n")
            raise

    def _read(self) -> str:
        lines = [input(PROMPT)]
        while not is_complete("\n".join(lines)) or _is_waiting():
            if lines[-1].endswith("\\") and not lines[0].lstrip().startswith(QUOTES):
                lines[-1] = lines[-1][:-1]
                lines.append(input(MORE))
            else:
                lines.append(input())
        return unquoted("\n".join(lines))


def _is_waiting() -> bool:
    """Whether another line has been typed already."""
    try:
        ready, _, _ = select.select([sys.stdin], [], [], 0.02)
    except (OSError, ValueError):  # Windows, where only sockets can be asked
        return False
    return bool(ready)


class EditingReader:
    """Reads with editing, several lines, and the questions of earlier sessions."""

    def __init__(self, commands: Iterable[str], history: Path | None) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import InMemoryHistory
        from prompt_toolkit.shortcuts import CompleteStyle

        self._session: PromptSession[str] = PromptSession(
            history=InMemoryHistory() if history is None else _history(history),
            multiline=True,
            key_bindings=_keys(),
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,  # a menu would need lines below the prompt
            prompt_continuation=MORE,
            enable_suspend=True,
        )

    def read(self) -> str:
        """Return the next question; see `Reader`."""
        return unquoted(self._session.prompt(PROMPT))


def _history(file: Path) -> History:
    """Return the history in a file. Without the file, the session goes on."""
    from prompt_toolkit.history import FileHistory

    class KeptHistory(FileHistory):
        def load_history_strings(self) -> Iterable[str]:
            with suppress(OSError):
                yield from super().load_history_strings()

        def store_string(self, string: str) -> None:
            with suppress(OSError):
                super().store_string(string)

    return KeptHistory(str(file))


def _keys() -> KeyBindings:
    """Return the bindings of Enter and Alt-Enter."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    def enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_complete(buffer.text):
            buffer.validate_and_handle()
        elif buffer.text.endswith("\\") and not buffer.text.lstrip().startswith(QUOTES):
            buffer.cursor_position = len(buffer.text)
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.insert_text("\n")

    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    keys.add("enter")(enter)
    keys.add("escape", "enter")(new_line)
    return keys
