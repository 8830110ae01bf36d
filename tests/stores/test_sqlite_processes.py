"""Real processes that share limits, places, a budget and a circuit through one SQLite file."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fluxibly.errors import BudgetExceeded, CircuitOpen, ServerError
from fluxibly.middleware.budget import Budget
from fluxibly.middleware.circuit_breaker import CircuitBreaker
from fluxibly.middleware.concurrency import Concurrency
from fluxibly.pipeline import Pipeline
from fluxibly.stores import SQLiteStore
from fluxibly.testing import ScriptedProvider
from fluxibly.types import Request, Response, Usage

MODEL, PROMPT = "m-1", "x" * 350
REQUEST = Request(model=MODEL, messages=PROMPT, max_tokens=20)
ANSWER = Response(text="fine", usage=Usage(input_tokens=60, output_tokens=10))
ENOUGH = 60.0
PER_SECOND, BURST = 300, 10
TOKENS = 3000
THREADS = 3

# Each process calls `work` in several threads at once, when all processes are ready.
BEGINNING = f"""
import os, sys, threading, time
from fluxibly.errors import BudgetExceeded, ServerError
from fluxibly.middleware.budget import Budget
from fluxibly.middleware.circuit_breaker import CircuitBreaker
from fluxibly.middleware.concurrency import Concurrency
from fluxibly.middleware.rate_limit import RateLimit
from fluxibly.pipeline import Pipeline
from fluxibly.stores import SQLiteStore, _sqlite_queues
from fluxibly.testing import ScriptedProvider
from fluxibly.types import Request, Response, Usage

REQUEST = Request(model="{MODEL}", messages="{PROMPT}", max_tokens=20)
ANSWER = Response(text="fine", usage=Usage(input_tokens=60, output_tokens=10))
folder = sys.argv[1]
store = f"sqlite:{{folder}}/a.db"
log = os.open(f"{{folder}}/log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)

def note(line):
    os.write(log, f"{{line}}\\n".encode())
"""
END = f"""
print("ready", flush=True)
sys.stdin.readline()
threads = [threading.Thread(target=work) for _ in range({THREADS})]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def start(script: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BEGINNING + script, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run(work: str, folder: Path, processes: int) -> list[list[str]]:
    """Let processes do some work at the same time, and return the lines that they have noted, in order."""
    running = [start(work + END, folder) for _ in range(processes)]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in running:
        process.stdin.close()
        assert process.wait(ENOUGH) == 0
        process.stdout.close()
    return [line.split() for line in (folder / "log").read_text().splitlines()]


@pytest.mark.parametrize("processes", [2, 4])
def test_a_rate(tmp_path: Path, processes: int) -> None:
    """No window over all processes has more than its rate and one burst, by the clock that all have in common."""
    each = 40 // processes
    lines = run(
        f"""
clock, now = _sqlite_queues._clock, threading.local()
def noted():
    now.value = clock()
    return now.value
_sqlite_queues._clock = noted  # the last time that a thread has read is that of its grant

class Provider(ScriptedProvider):
    def complete(self, request):
        note(now.value)
        return super().complete(request)

calls = {each}
provider = Provider(*["fine"] * calls * {THREADS})
limit = RateLimit(requests={PER_SECOND}, per=1, burst={BURST}, store=store, on_store_error="raise", block=0)
pipeline = Pipeline(provider, [limit])
def work():
    for _ in range(calls):
        pipeline.complete(REQUEST)
""",
        tmp_path,
        processes,
    )
    times = sorted([float(when) for (when,) in lines])
    assert len(times) == each * processes * THREADS
    for first, since in enumerate(times):
        for last in range(first, len(times)):
            assert last - first + 1 <= PER_SECOND * (times[last] - since) + BURST + 1e-6


@pytest.mark.parametrize("processes", [2, 4])
def test_places(tmp_path: Path, processes: int) -> None:
    """Never more calls are inside than allowed, by a log that each enters after it has its place, and leaves before it gives it back."""
    lines = run(
        """
class Provider(ScriptedProvider):
    def complete(self, request):
        note("enter")
        time.sleep(0.002)
        note("leave")
        return super().complete(request)

provider = Provider(*["fine"] * 5 * 3)
pipeline = Pipeline(provider, [Concurrency(3, store=store, on_store_error="raise")])
def work():
    for _ in range(5):
        pipeline.complete(REQUEST)
""",
        tmp_path,
        processes,
    )
    inside = most = 0
    for (what,) in lines:
        inside += 1 if what == "enter" else -1
        most = max(most, inside)
    assert len(lines) == 2 * 5 * processes * THREADS
    assert 0 < most <= 3


def test_a_budget(tmp_path: Path) -> None:
    """All processes spend until they are refused, and never more than it together."""
    lines = run(
        """
class Provider(ScriptedProvider):
    def complete(self, request):
        note(ANSWER.usage.total_tokens)
        return super().complete(request)

pipeline = Pipeline(Provider(*[ANSWER] * 100), [Budget(tokens=3000, store=store, on_store_error="raise")])
def work():
    try:
        while True:
            pipeline.complete(REQUEST)
    except BudgetExceeded:
        pass
""",
        tmp_path,
        2,
    )
    spent = sum(int(tokens) for (tokens,) in lines)
    assert TOKENS - 200 < spent <= TOKENS
    budget = Budget(tokens=TOKENS, store=f"sqlite:{tmp_path}/a.db", on_store_error="raise")
    with pytest.raises(BudgetExceeded, match=f"and {TOKENS - spent} tokens are left"):
        Pipeline(ScriptedProvider(), [budget]).complete(REQUEST)


def test_a_circuit(tmp_path: Path) -> None:
    """One process opens it, and another asks no longer."""
    script = """
circuit = CircuitBreaker(failures=2, store=store, on_store_error="raise")
pipeline = Pipeline(ScriptedProvider(*[ServerError("down")] * 2), [circuit])
for _ in range(2):
    try:
        pipeline.complete(REQUEST)
    except ServerError:
        pass
"""
    process = start(script, tmp_path)
    process.communicate()
    assert process.returncode == 0
    provider = ScriptedProvider(ServerError("not asked"))
    circuit = CircuitBreaker(failures=2, store=f"sqlite:{tmp_path}/a.db", on_store_error="raise")
    with pytest.raises(CircuitOpen):
        Pipeline(provider, [circuit]).complete(REQUEST)
    assert provider.requests == []


def held(path: Path) -> list[Any]:
    """Return who holds a place, by what stands in the file."""
    db = sqlite3.connect(path)
    rows = db.execute("SELECT state FROM fluxibly_queues WHERE kind = 'places'").fetchall()
    db.close()
    return [who for (state,) in rows for who in json.loads(state)[2]]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system kills in another way")
def test_a_process_that_is_killed(tmp_path: Path) -> None:
    """What it held and what it waited for is free after a while."""
    path = tmp_path / "a.db"
    script = """
class Provider(ScriptedProvider):
    def complete(self, request):
        print("inside", flush=True)
        time.sleep(60)
store = SQLiteStore(f"{folder}/a.db", lease_seconds=0.6)
pipeline = Pipeline(Provider(), [Concurrency(1, store=store)])
for _ in range(2):
    threading.Thread(target=pipeline.complete, args=[REQUEST]).start()
time.sleep(60)
"""
    process = start(script, tmp_path)
    assert process.stdout.readline() == "inside\n"
    [holder] = held(path)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert held(path) == [holder]
    layer = Concurrency(1, store=SQLiteStore(path), max_wait=ENOUGH, on_store_error="raise")
    assert Pipeline(ScriptedProvider("fine"), [layer]).complete(REQUEST).text == "fine"
    assert held(path) == []
