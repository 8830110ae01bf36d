"""Answers as they are shown while they come: as the text itself, or as Markdown at a terminal that can move its cursor."""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Protocol

from rich.cells import cell_len
from rich.text import Text

from fluxibly.cli.chat.markdown import CODES, MarkdownStream
from fluxibly.cli.screen import clean

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Self

    from rich.console import RenderableType

    from fluxibly.cli.screen import Screen
    from fluxibly.messages import Message
    from fluxibly.types import Chunk, ToolCall

LONGEST = 70
"""The most characters of a tool's arguments or result in the line that shows a call."""


class View(Protocol):
    """Shows an answer. It is a context manager: its end finishes what is shown, however the answer ends."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def chunk(self, chunk: Chunk) -> None:
        """Show a piece of the answer."""
        ...

    def restart(self) -> None:
        """Say that the answer begins again."""
        ...

    def added(self, messages: Sequence[Message]) -> None:
        """Show what a middleware has added: calls of tools and their results. A new message begins."""
        ...


def view_of(screen: Screen, *, markdown: bool = True, shown: bool = True) -> View:
    """Return the view of an answer.

    Args:
        markdown: whether the text is Markdown, and is rendered where the terminal can do that.
        shown: whether the text is shown at all; if not, somebody prints the whole answer in the end.
    """
    if screen.draws and (markdown or not shown) and (shown or not screen.quiet):
        return Rendered(screen, shown=shown)
    return Plain(screen, shown=shown)


def call_lines(messages: Sequence[Message]) -> Iterator[str]:
    """Yield a line for each call of a tool: its name, its arguments, and its result as far as it fits."""
    results = {message.tool_call_id: message for message in messages if message.role == "tool"}
    for message in messages:
        for call in message.tool_calls:
            result = results.get(call.id)
            said = "" if result is None else f" → {_short(result.text)}"
            yield f"{_called(call)}{said}"


def _called(call: ToolCall) -> str:
    arguments = ", ".join([f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call.arguments.items()])
    return f"{call.name}({_short(arguments or (call.raw_arguments if call.error else ''))})"


def _short(text: str) -> str:
    line = " ".join(clean(text).split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"


class Plain:
    """The text of an answer as it comes."""

    def __init__(self, screen: Screen, *, shown: bool = True) -> None:
        self._screen = screen
        self._shown = shown

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._screen.end_line()

    def chunk(self, chunk: Chunk) -> None:
        """Write the text of a chunk."""
        if self._shown:
            self._screen.write(chunk.text)

    def restart(self) -> None:
        """Say that the answer begins again."""
        self._screen.end_line()
        self._screen.note("(the answer begins again)")

    def added(self, messages: Sequence[Message]) -> None:
        """Show calls of tools, a dim line each; where nobody reads along, only if the user wants details."""
        self._screen.end_line()
        for line in call_lines(messages):
            if self._screen.live:
                self._screen.note(line)
            elif self._screen.verbose:
                self._screen.aside(line)


FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
PLAIN_FRAMES = "|/-\\"
INTERVAL = 0.08
"""Seconds between two pictures. A thread draws them, so that a slow terminal does not slow the answer down."""


class Rendered:
    """Markdown as it comes, with a spinner until the first chunk.

    What is finished is printed once. Below it a few lines are drawn again and again, never more than the terminal has.
    """

    def __init__(self, screen: Screen, *, shown: bool = True) -> None:
        self._screen = screen
        self._shown = shown
        self._stream = MarkdownStream()
        self._area = _Area(screen)
        self._lock = threading.RLock()
        """Protects all that follows, which both the reader of the answer and the thread that draws use."""
        self._waiting: str | None = ""
        """The word beside the spinner; None once there is an answer."""
        self._changed = False
        self._later: list[RenderableType] = []
        """What is printed after the answer."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fluxibly-screen", daemon=True)
        encoding = (sys.stdout.encoding or "").lower().replace("-", "")
        self._frames = itertools.cycle(FRAMES if encoding.startswith("utf") else PLAIN_FRAMES)

    def __enter__(self) -> Self:
        self._screen.end_line()
        self._screen.region = self
        self._area.hide_cursor()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        with self._lock:
            self._waiting = None
            self._finish()
            self._area.show_cursor()
            self._screen.region = None
            for what in self._later:
                self._screen.show(what)

    def chunk(self, chunk: Chunk) -> None:
        """Take a chunk; it is drawn within `INTERVAL`."""
        with self._lock:
            if chunk.text and self._shown:
                self._stream.feed(clean(chunk.text))
                self._changed, self._waiting = True, None
            elif chunk.reasoning and self._waiting is not None:
                self._waiting = "thinking"

    def restart(self) -> None:
        """Say that the answer begins again. What was printed of it stays above."""
        with self._lock:
            self._stream = MarkdownStream()
            self._area.draw([], [])
            self.print_above(Text("(the answer begins again)", "dim"))

    def added(self, messages: Sequence[Message]) -> None:
        """Show calls of tools, a dim line each, and begin a new message."""
        with self._lock:
            self._finish()
            self._waiting = ""
            if not self._screen.quiet:
                for line in call_lines(messages):
                    self.print_above(Text(line, "dim"))

    def print_later(self, what: RenderableType) -> None:
        """Print something that does not belong into the answer: now if it has not begun, or else after it."""
        with self._lock:
            if self._waiting is None:
                self._later.append(what)
            else:
                self.print_above(what)

    def print_above(self, what: RenderableType) -> None:
        """Print something that stays, above what is being drawn."""
        with self._lock, self._screen.out.capture() as captured:
            self._screen.out.print(what)
        with self._lock:
            self._area.draw(captured.get().rstrip("\n").split("\n"), self._rest())

    def _finish(self) -> None:
        self._area.draw(self._stream.take(self._screen.out, final=True), [])
        self._stream = MarkdownStream()

    def _run(self) -> None:
        pause = INTERVAL
        while not self._over.wait(pause):
            began = time.monotonic()
            with self._lock:
                if self._changed or self._waiting is not None:
                    self._changed = False
                    self._area.draw(self._stream.take(self._screen.out), self._rest())
            pause = max(INTERVAL, 4 * (time.monotonic() - began))  # the answer itself comes first

    def _rest(self) -> list[str]:
        if self._screen.quiet and self._waiting is not None:
            return []
        if self._waiting is not None:
            return [f"{next(self._frames)} {self._waiting}".rstrip()]
        return self._stream.rest(self._screen.out)


class _Area:
    """The last lines on the terminal, which the next picture replaces."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._widths: list[int] = []
        """The columns of each line that is shown now. The cursor is at the end of the last one."""
        self._wraps = "XTERM_VERSION" not in os.environ or bool(os.environ.get("TMUX"))

    def draw(self, above: Sequence[str], lines: Sequence[str]) -> None:
        """Replace the lines by others, and put some above that stay."""
        width, height = self._size()
        lines, widths = _last(lines, width, height - 1)
        if not above and not lines and not self._widths:
            return
        # A terminal that has become narrower has wrapped the lines. xterm has cut them off.
        rows = sum([_rows(columns, width) if self._wraps else 1 for columns in self._widths])
        # Row by row: when the rest of a whole screen is erased, tmux takes it for something to keep.
        text = "\r\x1b[2K" + "\x1b[1A\x1b[2K" * (rows - 1) + "".join([f"{line}\r\n" for line in above])
        self._widths, shown = widths, "\r\n".join(lines)
        self._write(f"\x1b[?2026h{text}{shown}\x1b[?2026l")  # in one picture, where the terminal knows how

    def _size(self) -> tuple[int, int]:
        """Return the columns and rows of the terminal. Rich would believe COLUMNS and LINES, which may be out of date."""
        try:
            return os.get_terminal_size(sys.stdout.fileno())
        except (OSError, ValueError):
            return self._screen.out.size

    def hide_cursor(self) -> None:
        """Hide the cursor, which would jump."""
        self._write("\x1b[?25l")

    def show_cursor(self) -> None:
        """Show the cursor again."""
        self._write("\x1b[?25h")

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def _rows(columns: int, width: int) -> int:
    """Return the rows that a line takes."""
    return max(1, -(-columns // max(1, width)))


def _last(lines: Sequence[str], width: int, height: int) -> tuple[list[str], list[int]]:
    """Return the last lines that a terminal has place for, at least one, and their columns."""
    found: list[str] = []
    widths: list[int] = []
    rows = 0
    for line in reversed(lines):
        columns = cell_len(CODES.sub("", line))
        rows += _rows(columns, width)
        if rows > height and found:
            break
        found.append(line)
        widths.append(columns)
    return found[::-1], widths[::-1]
