"""The output of the command line: text on standard output, everything else only for a person at a terminal."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import RenderableType

_UNSAFE = {
    code: None
    for code in (*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C)
    if chr(code) not in "\n\t"
}
"""What moves the cursor, colours the terminal, or changes the direction in which it writes."""


def clean(text: str) -> str:
    """Return a text without characters that control the terminal."""
    return text.translate(_UNSAFE)


def printable(text: str) -> str:
    """Return a line without the characters that would move the cursor, begin another line or hide something."""
    return "".join(filter(str.isprintable, text))


def line_of(error: BaseException) -> str:
    """Return an error's message, which may quote a server, on one line."""
    problems: Sequence[str] = getattr(error, "problems", ())
    text = "; ".join(problems) if len(problems) > 1 else str(error)
    return printable(" ".join(text.split())) or type(error).__name__


class Region(Protocol):
    """The lines at the bottom of a terminal that are drawn again and again while an answer comes."""

    def print_above(self, what: RenderableType) -> None:
        """Print something that stays, above the lines of the region."""
        ...

    def print_later(self, what: RenderableType) -> None:
        """Print something that stays, and does not stand between the lines of an answer."""
        ...


class Screen:
    """Standard output and standard error.

    `live` says whether a person reads along at a terminal. `quiet` leaves out all that is not the answer; `verbose` adds
    the figures, the spans and the log lines of each answer.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        for stream in (sys.stdout, sys.stderr):
            reconfigure: Any = getattr(stream, "reconfigure", None)
            if reconfigure is not None:
                reconfigure(errors="replace")  # an answer may have characters that the terminal's encoding lacks
        self.live: bool = sys.stdout.isatty()
        self.quiet = quiet
        self.verbose = verbose
        self.out = Console(file=sys.stdout, highlight=False)
        self.err = Console(file=sys.stderr, highlight=False, stderr=True)
        self._mid_line = False
        self.region: Region | None = None
        """The region that is being drawn, if an answer is coming."""

    @property
    def draws(self) -> bool:
        """Whether the terminal can move its cursor, so that what is shown can change."""
        return self.live and os.environ.get("TERM") not in ("dumb", "unknown") and not self.out.legacy_windows

    @property
    def draws_aside(self) -> bool:
        """Whether standard error is a terminal that can move its cursor."""
        return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown") and not self.err.legacy_windows

    @property
    def width(self) -> int:
        """The columns of the terminal."""
        return self.out.width

    def write(self, text: str) -> None:
        """Write a piece of an answer, without buffering it."""
        if self.live:
            text = clean(text)
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
        if not self.live:
            return
        if self.region is not None:
            self.region.print_above(what)
            return
        self.end_line()
        self.out.print(what)

    def note(self, text: str) -> None:
        """Print a dim line, but only for a person who wants more than the answer."""
        if not self.quiet:
            self.show(Text(clean(text), "dim"))

    def rows(self, rows: Iterable[Sequence[str]], header: Sequence[str]) -> None:
        """Print a table of text; the header is only for a person."""
        lines = [header, *rows] if self.live else list(rows)
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))] if lines else []
        for number, line in enumerate(lines):
            padded = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            self.out.print(Text(padded, "bold" if self.live and number == 0 else ""), soft_wrap=True)

    def line(self, text: str, note: str = "") -> None:
        """Print a line as it is; the note after it is only for a person."""
        shown = Text(text)
        if note and self.live:
            shown.append(f"  {note}", "dim")
        self.out.print(shown, soft_wrap=True)

    def lines(self, text: str) -> None:
        """Print lines as they are."""
        for line in text.splitlines():
            self.out.print(Text(line), soft_wrap=True)

    def aside(self, text: str, style: str = "") -> None:
        """Print a line on standard error."""
        line = Text(clean(text) if sys.stderr.isatty() else text, style)
        if self.live and sys.stderr.isatty():  # the terminal shows both streams
            if self.region is not None:
                # News of the call, such as that it has ended, comes while the end of the answer is still being drawn.
                (self.region.print_later if style == "dim" else self.region.print_above)(line)
                return
            self.end_line()
        self.err.print(line, soft_wrap=not sys.stderr.isatty())


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
