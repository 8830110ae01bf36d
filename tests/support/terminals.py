"""The command line in a process of its own: behind pipes, or at a terminal."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from pathlib import Path

import attrs
import pyte

ROOT = Path(__file__).parents[2]
START = "from fluxibly.cli import main; main()"
KEYS = re.compile(r"(API_KEY|_TOKEN|FLUXIBLY|OTEL|COLOR|^COLUMNS$|^LINES$)")
ANSI = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|[=>])")


def environment(**changes: str) -> dict[str, str]:
    """Return this process's environment, without the variables that would change the results."""
    kept = {name: value for name, value in os.environ.items() if not KEYS.search(name)}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    return {**kept, "PYTHONPATH": path, "PYTHONUTF8": "1", **changes}


def fluxibly(
    *arguments: str, given: str = "", before: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command with its output in pipes. `before` is code that runs first; it may register a framework."""
    return subprocess.run(
        [sys.executable, "-c", f"{before}\n{START}", *arguments],
        input=given,
        capture_output=True,
        encoding="utf-8",
        env=environment(**(env or {})),
        timeout=100,
        check=False,
    )


def set_size(fd: int, columns: int, rows: int) -> None:
    """Set the size of a terminal, and tell the command in it."""
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


@attrs.define
class Terminal:
    """A command at a terminal of its own.

    `shown` is what the command has written. `lines` is what a person sees of it, as a terminal of `columns` and `rows` lays it out,
    with what has scrolled off the top.
    """

    pid: int
    fd: int
    columns: int = 120
    rows: int = 24
    shown: str = ""
    read: int = 0
    _screen: pyte.HistoryScreen = attrs.field(init=False)
    _emulator: pyte.Stream = attrs.field(init=False)
    _decoder: codecs.IncrementalDecoder = attrs.field(init=False, factory=codecs.getincrementaldecoder("utf-8"))

    def __attrs_post_init__(self) -> None:
        self._screen = pyte.HistoryScreen(self.columns, self.rows, history=100_000, ratio=0.5)
        self._screen.write_process_input = self._answer
        self._emulator = pyte.Stream(self._screen)

    def resize(self, columns: int, rows: int) -> None:
        """Change the size, and tell the command."""
        self.settle()
        self.columns, self.rows = columns, rows
        set_size(self.fd, columns, rows)
        self._screen.resize(rows, columns)

    @property
    def lines(self) -> list[str]:
        """The lines that a person sees, and those before them, without trailing empty ones."""
        above = [self._line(line) for line in self._screen.history.top]
        found = [*above, *[line.rstrip() for line in self._screen.display]]
        while found and not found[-1]:
            del found[-1]
        return found

    def _line(self, cells: Mapping[int, pyte.screens.Char]) -> str:
        return "".join([cells[column].data for column in range(self.columns)]).rstrip()

    def wait_for(self, text: str) -> str:
        """Return the output since the last call, up to and including `text`. Colours do not count."""
        deadline = time.monotonic() + 60
        while text not in ANSI.sub("", self.shown)[self.read :]:
            assert self.more(deadline), f"no {text!r} in {ANSI.sub('', self.shown)[self.read :]!r}"
        plain = ANSI.sub("", self.shown)
        start, self.read = self.read, plain.index(text, self.read) + len(text)
        return plain[start : self.read]

    def wait_for_line(self, pattern: str) -> None:
        """Wait until a line that a person sees has the pattern."""
        deadline = time.monotonic() + 60
        while not any(re.search(pattern, line) for line in self.lines):
            assert self.more(deadline), f"no {pattern!r} in {self.lines!r}"

    def settle(self) -> None:
        """Read until nothing comes for a moment."""
        while self.more(time.monotonic() + 0.3):
            pass

    def wait_for_prompt(self) -> None:
        """Wait until the last line that a person sees is an empty prompt."""
        deadline = time.monotonic() + 60
        while (self.lines or [""])[-1] != ">" or self._screen.cursor.x != 2:
            assert self.more(deadline), f"no prompt in {self.lines!r}"
        self.read = len(ANSI.sub("", self.shown))

    def more(self, deadline: float) -> bool:
        """Read more of the output. Return whether there was any."""
        ready, _, _ = select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))
        try:
            text = self._decoder.decode(os.read(self.fd, 65536)) if ready else ""
        except OSError:  # raised by Linux when the other side has closed
            return False
        self.shown += text
        self._emulator.feed(text)
        return bool(text)

    def type(self, keys: str) -> None:
        """Type keys."""
        self._answer(keys)

    def paste(self, text: str) -> None:
        """Paste a text, as terminals do for programs that ask for it."""
        self._answer(f"\x1b[200~{text}\x1b[201~")

    def _answer(self, data: str) -> None:
        os.write(self.fd, data.encode())

    def end(self) -> int:
        """Read to the end, and return the exit status."""
        deadline = time.monotonic() + 60
        while self.more(deadline):
            pass
        pid, self.pid = self.pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def start_at_terminal(
    *arguments: str, before: str = "", columns: int = 120, rows: int = 24, **variables: str
) -> Terminal:
    """Start a command at a terminal. `before` is code that runs first; `variables` are of its environment."""
    command = [sys.executable, "-c", f"{before}\n{START}", *arguments]
    parent, child = pty.openpty()
    set_size(parent, columns, rows)
    process = subprocess.Popen(
        [sys.executable, "-c", "import os, sys; os.login_tty(0); os.execv(sys.argv[1], sys.argv[1:])", *command],
        stdin=child,
        stdout=child,
        stderr=child,
        env=environment(**{"TERM": "xterm-256color", **variables}),
    )
    os.close(child)
    process.returncode = 0  # `Terminal` waits for the process
    return Terminal(process.pid, parent, columns, rows)
