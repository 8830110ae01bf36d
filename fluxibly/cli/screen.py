"""What the command line writes where: text on standard output, all else only for a person at a terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import RenderableType

_UNSAFE = {code: None for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\n\t"}
"""Control characters: a model's answer must not move the cursor or colour the terminal."""


def line_of(error: BaseException) -> str:
    """What an error says, in one line."""
    problems: Sequence[str] = getattr(error, "problems", ())
    text = "; ".join(problems) if len(problems) > 1 else str(error)
    return " ".join(text.split()) or type(error).__name__


class Screen:
    """Standard output and standard error. `live` says whether a person reads along on a terminal."""

    def __init__(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            reconfigure: Any = getattr(stream, "reconfigure", None)
            if reconfigure is not None:
                reconfigure(errors="replace")  # an answer may have what the terminal's encoding has not
        self.live = sys.stdout.isatty()
        self._out = Console(file=sys.stdout, highlight=False)
        self._err = Console(file=sys.stderr, highlight=False, stderr=True)
        self._mid_line = False

    def write(self, text: str) -> None:
        """A piece of an answer, at once."""
        if self.live:
            text = text.translate(_UNSAFE)
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
            self._mid_line = not text.endswith("\n")

    def end_line(self) -> None:
        """Go to the next line, unless at the beginning of one."""
        if self._mid_line:
            self.write("\n")

    def show(self, what: RenderableType) -> None:
        """Something for a person only."""
        if self.live:
            self.end_line()
            self._out.print(what)

    def note(self, text: str) -> None:
        """A dim line for a person only."""
        self.show(Text(text, "dim"))

    def rows(self, rows: Iterable[Sequence[str]], header: Sequence[str]) -> None:
        """A table: columns of text, with a header for a person."""
        lines = [header, *rows] if self.live else list(rows)
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))] if lines else []
        for number, line in enumerate(lines):
            padded = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            self._out.print(Text(padded, "bold" if self.live and number == 0 else ""), soft_wrap=True)

    def aside(self, text: str, style: str = "") -> None:
        """A line on standard error."""
        if self.live and sys.stderr.isatty():
            self.end_line()  # the same terminal shows both
        self._err.print(Text(text, style), soft_wrap=True)


class ScreenHandler(logging.Handler):
    """Logs to standard error: dim on a terminal, where lines below WARNING would else drown the answer.

    Args:
        screen: where to.
        failures: whether to log calls that failed; the command line tells of them itself.
    """

    def __init__(self, screen: Screen, *, failures: bool) -> None:
        super().__init__()
        self._screen = screen
        self._failures = failures

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        if not self._failures and record.levelno == logging.ERROR and hasattr(record, "error_type"):
            return
        try:
            style = "dim" if record.levelno < logging.WARNING else "yellow"
            self._screen.aside(f"{record.levelname:<7} {record.getMessage()}", style)
        except Exception:  # noqa: BLE001  # logging's own way to tell of it
            self.handleError(record)
