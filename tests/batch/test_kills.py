"""Batches that are killed with -9 at random moments, and go on: nothing is lost, and only what was in flight is asked twice."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.batches import Files
from support.counting_server import CountingServer, Reply, counting_server
from support.forks import Forks, forks

AT_ONCE = 16
KILLS = 50


@pytest.fixture(scope="module")
def children() -> Iterator[Forks]:
    with forks() as found:
        yield found


def seeded(number: int) -> random.Random:
    """Return a generator whose numbers are the same in each run."""
    return random.Random(number)  # noqa: S311  # no secrets


def killed(
    children: Forks, server: CountingServer, files: Files, seconds: Callable[[], float], **settings: Any
) -> bool:
    """Run a batch, and kill it after some seconds from its first request. Return whether it was killed before it had ended."""
    before = server.requests
    child = children.begin(url=server.url, prompts=str(files.prompts), answers=str(files.answers), **settings)
    with suppress(ProcessLookupError):  # it has nothing left to do
        while server.requests == before:
            time.sleep(0.001)
            os.kill(child, 0)
        time.sleep(seconds())
        os.kill(child, signal.SIGKILL)
    return children.end() is None


def ended(children: Forks, server: CountingServer, files: Files, **settings: Any) -> dict[str, Any]:
    children.begin(url=server.url, prompts=str(files.prompts), answers=str(files.answers), **settings)
    report = children.end()
    assert report is not None
    assert report["stopped"] is None
    return report


def whole_lines(files: Files) -> list[dict[str, Any]]:
    """Return the lines, of which only the last may be torn."""
    lines = files.answers.read_bytes().split(b"\n")[:-1] if files.answers.exists() else []
    return [json.loads(line) for line in lines]


def test_killed_fifty_times_each_row_has_one_line_and_only_what_was_in_flight_is_asked_twice(
    children: Forks, tmp_path: Path
) -> None:
    rows = 6000
    files = Files(tmp_path)
    files.write(f"row {number}" for number in range(rows))
    random_ = seeded(7)
    settings = {"concurrency": AT_ONCE, "rpm": 1e9}
    with counting_server(lambda prompt: (200, {}, random_.uniform(0.0, 0.04))) as server:
        kills, done, extra = 0, 0, 0
        while kills < KILLS:
            if not killed(children, server, files, lambda: random_.uniform(0.0, 0.15), **settings):
                break
            kills += 1
            written = len(whole_lines(files))
            assert written >= done  # nothing that was there is lost
            assert server.requests - written - extra <= AT_ONCE
            done, extra = written, server.requests - written
        report = ended(children, server, files, **{**settings, "concurrency": 100})
        assert kills >= 20  # fewer only where a machine is so fast that all rows were done before
        assert (report["answered"], report["failed"]) == (rows, 0)
        assert files.rows() == [*range(rows)]
        assert all(line["text"] == f"re: row {line['row']}" for line in files.lines())
        assert rows <= server.requests <= rows + kills * AT_ONCE
        assert server.requests == rows + extra


def test_killed_while_errors_are_asked_again_each_row_has_one_line_at_the_end(children: Forks, tmp_path: Path) -> None:
    rows = 300
    files = Files(tmp_path)
    files.write(f"row {number}" for number in range(rows))
    random_ = seeded(8)
    is_better = False

    def reply(prompt: str) -> Reply:
        return (400 if int(prompt[4:]) % 2 and not is_better else 200), {}, random_.uniform(0.0, 0.02)

    settings = {"concurrency": AT_ONCE, "rpm": 1e9}
    with counting_server(reply) as server:
        report = ended(children, server, files, **settings)
        assert (report["answered"], report["failed"]) == (rows // 2, rows // 2)
        is_better = True
        kills = 0
        for _ in range(10):
            kills += killed(children, server, files, lambda: random_.uniform(0.0, 0.08), **settings, retry_errors=True)
        report = ended(children, server, files, **settings, retry_errors=True)
        assert (report["answered"], report["failed"]) == (rows, 0)
        assert files.rows() == [*range(rows)]
        assert server.requests <= rows + rows // 2 + kills * AT_ONCE
        assert all(server.asked[f"row {number}"] == 1 for number in range(0, rows, 2))


def test_killed_with_equal_rows_an_answer_that_is_there_is_not_asked_for_again(children: Forks, tmp_path: Path) -> None:
    rows, distinct = 600, 150
    files = Files(tmp_path)
    files.write(f"p {number * 7 % distinct}" for number in range(rows))
    random_ = seeded(9)
    settings = {"concurrency": AT_ONCE, "rpm": 1e9, "dedupe": True}
    with counting_server(lambda prompt: (200, {}, random_.uniform(0.0, 0.06))) as server:
        kills = 0
        for _ in range(8):
            kills += killed(children, server, files, lambda: random_.uniform(0.0, 0.08), **settings)
        ended(children, server, files, **settings)
        assert files.rows() == [*range(rows)]
        assert distinct <= server.requests <= distinct + kills * AT_ONCE


def test_killed_while_what_has_changed_is_asked_again(children: Forks, tmp_path: Path) -> None:
    rows = 300
    files = Files(tmp_path)
    files.write(f"old {number}" for number in range(rows))
    random_ = seeded(10)
    settings = {"concurrency": AT_ONCE, "rpm": 1e9}
    with counting_server(lambda prompt: (200, {}, random_.uniform(0.0, 0.02))) as server:
        ended(children, server, files, **settings)
        files.write(f"{'old' if number % 3 else 'new'} {number}" for number in range(rows))
        kills = 0
        for _ in range(6):
            kills += killed(children, server, files, lambda: random_.uniform(0.0, 0.05), **settings, changed="ask")
        ended(children, server, files, **settings, changed="ask")
        assert [line["text"] for line in files.lines()] == [
            f"re: {'old' if number % 3 else 'new'} {number}" for number in range(rows)
        ]
        assert server.requests <= rows + rows // 3 + kills * AT_ONCE
        assert ended(children, server, files, **settings)["asked"] == 0
