"""The output of the command line: text on standard output, everything else only for a person at a terminal."""

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
    """Return an error's message on one line."""
    problems: Sequence[str] = getattr(error, "problems", ())
    text = "; ".join(problems) if len(problems) > 1 else str(error)
    return " ".join(text.split()) or type(error).__name__


class Screen:
    """Standard output and standard error. `live` says whether a person reads along at a terminal."""

    def __init__(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            reconfigure: Any = getattr(stream, "reconfigure", None)
            if reconfigure is not None:
                reconfigure(errors="replace")  # an answer may have characters that the terminal's encoding lacks
        self.live = sys.stdout.isatty()
        self._out = Console(file=sys.stdout, highlight=False)
        self._err = Console(file=sys.stderr, highlight=False, stderr=True)
        self._mid_line = False

    @property
    def width(self) -> int:
        """The columns of the terminal."""
        return self._out.width

    def write(self, text: str) -> None:
        """Write a piece of an answer, without buffering it."""
        if self.live:
            text = text.translate(_UNSAFE)
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
            self._mid_line = not text.endswith("\n")

    def end_line(self) -> None:
        """Go to the next line, unless the current line is empty."""
        if self._mid_line:
            self.write("\n")

    def show(self, what: RenderableType) -> None:
        """Print `what`, but only for a person."""
        if self.live:
            self.end_line()
            self._out.print(what)

    def note(self, text: str) -> None:
        """Print a dim line, but only for a person."""
        self.show(Text(text, "dim"))

    def rows(self, rows: Iterable[Sequence[str]], header: Sequence[str]) -> None:
        """Print a table of text; the header is only for a person."""
        lines = [header, *rows] if self.live else list(rows)
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))] if lines else []
        for number, line in enumerate(lines):
            padded = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            self._out.print(Text(padded, "bold" if self.live and number == 0 else ""), soft_wrap=True)

    def lines(self, text: str) -> None:
        """Print lines as they are."""
        for line in text.splitlines():
            self._out.print(Text(line), soft_wrap=True)

    def aside(self, text: str, style: str = "") -> None:
        """Print a line on standard error."""
        if self.live and sys.stderr.isatty():
            self.end_line()  # the terminal shows both streams
        self._err.print(Text(text, style), soft_wrap=True)


class ScreenHandler(logging.Handler):
    """A handler that logs to standard error. At a terminal, lines below WARNING are dim: they would drown the answer.

    Args:
        screen: the screen to write to.
        failures: whether to log failed calls, which the command line also reports itself.
    """

    def __init__(self, screen: Screen, *, failures: bool) -> None:
        super().__init__()
        self._screen = screen
        self._failures = failures

    def emit(self, record: logging.LogRecord) -> None:
        """Write a log record."""
        if not self._failures and record.levelno == logging.ERROR and hasattr(record, "error_type"):
            return
        try:
            style = "dim" if record.levelno < logging.WARNING else "yellow"
            self._screen.aside(f"{record.levelname:<7} {record.getMessage()}", style)
        except Exception:  # noqa: BLE001  # as logging's own handlers do
            self.handleError(record)
