"""Batches at a real terminal: the progress, Ctrl-C once and twice, the end that a supervisor asks for, a closed terminal."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest
from support.canned_server import Canned, Seen, canned_server

pytest.importorskip("typer")
pytest.importorskip("pty")
from support.terminals import Terminal

ROWS = 40
Start = Callable[..., Terminal]


@attrs.define
class Gate:
    """A server that answers the first rows, and holds the others until it is opened."""

    server: Canned
    free: int
    opened: threading.Event = attrs.Factory(threading.Event)

    def __attrs_post_init__(self) -> None:
        self.server.refuse = self._hold

    def _hold(self, _: Seen) -> None:
        if len(self.server.seen) > self.free:
            self.opened.wait(60)


@pytest.fixture
def gate() -> Iterator[Gate]:
    with canned_server() as server:
        found = Gate(server, free=10)
        yield found
        found.opened.set()


@pytest.fixture
def start(gate: Gate, terminal: Start, tmp_path: Path) -> Callable[[], Terminal]:
    """Return a function that starts the same batch: four at once of some rows."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"row {number:02}"}) + "\n" for number in range(ROWS)))
    variables = {"OPENAI_API_KEY": "sk-none", "OPENAI_BASE_URL": f"{gate.server.url}/v1"}

    def start() -> Terminal:
        out = str(tmp_path / "answers.jsonl")
        arguments = ("batch", str(prompts), "--out", out, "-m", "openai:gpt-4o-mini", "--concurrency", "4")
        return terminal(*arguments, columns=100, **variables)

    return start


def answers(folder: Path) -> list[int]:
    """Return the rows that have an answer, and check that every line is whole."""
    lines = (folder / "answers.jsonl").read_bytes().splitlines(keepends=True)
    assert all(line.endswith(b"\n") for line in lines)
    return sorted(json.loads(line)["row"] for line in lines)


def test_progress(start: Callable[[], Terminal], gate: Gate, tmp_path: Path) -> None:
    """A person sees a few lines that change, 80 columns wide at the most, of which the last line alone stays."""
    batch = start()
    batch.wait_for_line(r"^answers.jsonl .* 25 %")
    batch.wait_for_line(r"^10 of about 40 rows · 4 in flight · [\d.]+/s, [\d,]+ a minute$")
    batch.wait_for_line(r"^110 \+ 50 tokens")
    shown = batch.lines
    assert len(shown) == 3
    assert max(map(len, shown)) <= 80
    gate.opened.set()
    assert batch.end() == 0
    (line,) = batch.lines
    assert line.startswith("40 rows done · 440 + 200 tokens · ")
    assert answers(tmp_path) == [*range(ROWS)]


def test_a_dry_run(terminal: Start, tmp_path: Path) -> None:
    """A person sees how much is read; only the figures stay."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello"}\n' * 2000)
    batch = terminal("batch", str(prompts), "--out", str(tmp_path / "out.jsonl"), "-m", "echo", "--dry-run")
    assert batch.end() == 0
    assert "reading: " in batch.shown
    assert batch.lines[0] == "rows     2,000 to ask"
    assert not (tmp_path / "out.jsonl").exists()


def test_ctrl_c(start: Callable[[], Terminal], gate: Gate, tmp_path: Path) -> None:
    """Ctrl-C begins no more rows, and says what it waits for. What was in flight is there; the same command does the rest."""
    batch = start()
    batch.wait_for_line(r"10 of about 40 rows · 4 in flight")
    batch.type("\x03")
    batch.wait_for_line(r"^stopping: waiting for 4 in flight; Ctrl-C again ends now$")
    gate.opened.set()
    assert batch.end() == 130
    assert "14 of about 40 rows done" in "\n".join(batch.lines)
    assert len(answers(tmp_path)) == 14 == len(gate.server.seen)
    batch = start()
    assert batch.end() == 0
    assert batch.lines[0].startswith("40 rows done")
    assert answers(tmp_path) == [*range(ROWS)]
    assert len(gate.server.seen) == ROWS


def test_ctrl_c_twice(start: Callable[[], Terminal], gate: Gate, tmp_path: Path) -> None:
    """The second Ctrl-C cancels what is in flight, whose rows have no line. Nothing stands on the screen but the last lines."""
    batch = start()
    batch.wait_for_line(r"10 of about 40 rows · 4 in flight")
    batch.type("\x03")
    batch.wait_for_line(r"^stopping: ")
    batch.type("\x03")
    assert batch.end() == 130
    assert len(answers(tmp_path)) == 10
    shown = "\n".join(batch.lines)
    assert shown.startswith("10 of about 40 rows done · 110 + 50 tokens")
    assert "go on: fluxibly batch " in shown
    assert "Traceback" not in shown


def test_sigterm(start: Callable[[], Terminal], gate: Gate, tmp_path: Path) -> None:
    """SIGTERM, which supervisors send, does what Ctrl-C does."""
    batch = start()
    batch.wait_for_line(r"10 of about 40 rows · 4 in flight")
    os.kill(batch.pid, signal.SIGTERM)
    batch.wait_for_line(r"^stopping: waiting for 4 in flight")
    gate.opened.set()
    assert batch.end() == 130
    assert len(answers(tmp_path)) == 14


def test_a_closed_terminal(start: Callable[[], Terminal], gate: Gate, tmp_path: Path) -> None:
    """When the terminal is closed, what is in flight still gets its line."""
    batch = start()
    batch.wait_for_line(r"10 of about 40 rows · 4 in flight")
    os.close(batch.fd)
    batch.fd = os.open(os.devnull, os.O_RDONLY)  # the fixture closes it
    gate.opened.set()
    pid, batch.pid = batch.pid, 0
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert len(answers(tmp_path)) == len(gate.server.seen)
    assert len(gate.server.seen) < ROWS
    assert status == 130
