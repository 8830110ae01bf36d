"""Rates and places in a SQLite file: old and damaged files, clocks, what waiters cost, async calls, and stacks in YAML."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from support.calling import REQUEST

from fluxibly import LLM
from fluxibly._logs import forget_reports
from fluxibly.middleware.concurrency import Concurrency
from fluxibly.pipeline import AsyncPipeline
from fluxibly.stores import Limit, SQLiteStore, Store, _sqlite_queues, sqlite
from fluxibly.stores._sqlite_file import SWEEP, Busy
from fluxibly.stores.sqlite import DiskFull
from fluxibly.testing.modes import BACKENDS, run_async

ONE = (Limit("requests", 1.0, 1.0, 1.0),)


@pytest.fixture(autouse=True)
def _afresh():
    forget_reports()


@pytest.fixture
def clock(monkeypatch):
    """The clock that the processes of a machine have in common, as a list of one number."""
    now = [1000.0]
    monkeypatch.setattr(_sqlite_queues, "_clock", lambda: now[0])
    return now


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.db"


def rows(path: Path) -> list[list[object]]:
    """Return the states of all queues."""
    db = sqlite3.connect(path)
    found = db.execute("SELECT state FROM fluxibly_queues").fetchall()
    db.close()
    return [json.loads(state) for (state,) in found]


class TestFiles:
    def test_of_an_earlier_version(self, path):
        """They have values and sums alone. These stay, and the rest is added, by two stores at the same time."""
        db = sqlite3.connect(path)
        db.executescript(sqlite._SCHEMA)
        db.execute("INSERT INTO fluxibly_values VALUES ('v', x'31', NULL, 1, 130)")
        db.execute("INSERT INTO fluxibly_sums VALUES ('s', 5, NULL)")
        db.commit()
        db.close()
        stores = [SQLiteStore(path) for _ in range(2)]
        ready, got = threading.Barrier(2), []

        def work(store):
            ready.wait()
            got.append(store.lease("k", f"{id(store)}", 1, 0.0) is None)

        threads = [threading.Thread(target=work, args=(store,)) for store in stores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(got) == [False, True]
        assert stores[0].load("v", 0.0).value == b"1"
        assert stores[1].add("s", 1, None, 0.0) == 6

    def test_that_are_damaged(self, path, capsys):
        """A limit goes on in a new file."""
        store = SQLiteStore(path)
        assert store.reserve("k", "one", ONE, 0.0) is None
        store.close()
        path.write_bytes(b"This is no database. " * 500)
        assert store.reserve("k", "two", ONE, 0.0) is None
        assert store.reserve("k", "three", ONE, 0.0) is not None
        assert store.lease("k", "three", 1, 0.0) is None
        assert "is damaged; it is now 'a.db.broken-1'" in capsys.readouterr().err

    @pytest.mark.parametrize("state", ["", "[1", "[]", "{}", "3", "[1, 2, 3]", "[[], {}, 5, {}, {}, 0, {}]"])
    def test_with_a_state_that_cannot_be_read(self, path, state):
        """It counts as none, and the next step replaces it."""
        store = SQLiteStore(path)
        store.reserve("k", "one", ONE, 0.0)
        store.lease("k", "one", 1, 0.0)
        db = sqlite3.connect(path)
        db.execute("UPDATE fluxibly_queues SET state = ?", (state,))
        db.commit()
        db.close()
        assert store.reserve("k", "two", ONE, 0.0) is None
        assert store.lease("k", "two", 1, 0.0) is None
        assert store.reserve("k", "three", ONE, 0.0) is not None
        assert store.lease("k", "three", 1, 0.0) is not None

    def test_that_are_full(self, path):
        """What does not fit changes nothing, and places are given back."""
        store = SQLiteStore(path)
        assert store.lease("k", "one", 1, 0.0) is None
        db = store._file.writer.connection
        [(pages,)] = db.execute("PRAGMA page_count").fetchall()
        db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(DiskFull, match="no room for more in"):
            store.reserve("long " * 10_000, "one", ONE, 0.0)
        store.release("k", "one", 0.0)
        assert store.lease("k", "two", 1, 0.0) is None

    def test_keep_no_idle_queues(self, path, clock):
        """A limit for each user takes no room for those who have not asked for a while."""
        store = SQLiteStore(path)
        for number in range(2 * SWEEP):
            clock[0] += 1
            store.reserve(f"user {number}", "one", ONE, 0.0)
            store.lease(f"user {number}", "one", 1, 0.0)
            store.release(f"user {number}", "one", 0.0)
        assert len(rows(path)) < SWEEP

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
    def test_after_a_fork(self, path):
        """The new process has places of its own, and the old one keeps its."""
        script = f"""
import os, sys
from fluxibly.stores import SQLiteStore
store = SQLiteStore({str(path)!r})
assert store.lease("k", "parent", 2, 0.0) is None
child = os.fork()
if not child:
    try:
        assert store.lease("k", "child", 2, 0.0) is None
        assert store.lease("k", "third", 2, 0.0) is not None
        store.release("k", "third", 0.0)
        store.release("k", "child", 0.0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert store.renew("k", "parent", 0.0)
assert store.lease("k", "last", 2, 0.0) is None
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr


class TestClocks:
    @pytest.mark.parametrize("jump", [-3600.0, 3600.0])
    def test_that_somebody_sets(self, path, clock, monkeypatch, jump):
        """The system's time is not the time of limits: nobody waits longer, no place is lost, and no burst is gained."""
        now = [1e9]
        monkeypatch.setattr(sqlite, "_now", lambda: now[0])
        monkeypatch.setattr(_sqlite_queues.time, "time", lambda: now[0])
        store = SQLiteStore(path)
        assert store.reserve("k", "one", ONE, 0.0) is None
        assert store.lease("k", "one", 1, 0.0) is None
        now[0] += jump
        assert store.reserve("k", "two", ONE, 0.0).seconds == pytest.approx(1)
        assert store.lease("k", "two", 1, 0.0) is not None
        clock[0] += 1
        assert store.reserve("k", "two", ONE, 0.0) is None

    def test_that_begin_anew(self, path, clock):
        """After a restart of the machine all goes on where it was: the same waits, and a lease of the dead ends in its time."""
        store = SQLiteStore(path)
        assert store.reserve("k", "one", ONE, 0.0) is None
        store.throttle("k", "requests", 0.5, 10.0, 0.0)
        store.throttle("closed", "requests", 0.0, 5.0, 0.0)
        assert store.lease("k", "one", 1, 0.0) is None
        assert store.lease("k", "waits", 1, 0.0) is not None
        clock[0] = 3.0
        assert store.reserve("k", "two", ONE, 0.0).seconds == pytest.approx(2)
        assert store.reserve("closed", "two", ONE, 0.0).seconds == pytest.approx(5)
        assert store.lease("k", "two", 1, 0.0).ahead == 1
        clock[0] += 2
        assert store.reserve("k", "two", ONE, 0.0) is None
        clock[0] += 29
        assert store.lease("k", "two", 1, 0.0) is None


class TestWaiters:
    def test_who_ask_in_vain_write_little(self, path, clock):
        """Asking again is a read, but for once in a while, so that the file knows that somebody is there."""
        store = SQLiteStore(path)
        store.lease("k", "one", 1, 0.0)
        store.reserve("k", "one", ONE, 0.0)
        for who in ("two", "three"):
            store.lease("k", who, 1, 0.0)
            store.reserve("k", who, ONE, 0.0)
        watcher = sqlite3.connect(path)
        changes = set()
        for _ in range(40):
            clock[0] += 0.02
            for who in ("two", "three"):
                assert store.lease("k", who, 1, 0.0).ahead == ("two", "three").index(who)
                assert store.reserve("k", who, ONE, 0.0) is not None
            changes |= set(watcher.execute("PRAGMA data_version").fetchall())
        assert 2 <= len(changes) <= 5
        watcher.close()

    def test_do_not_wait_for_those_who_write(self, path, clock):
        """Who asks again is told its turn all the same; who asks for the first time, or could go, waits, and all fail together."""
        store = SQLiteStore(path)
        store.lease("k", "one", 1, 0.0)
        store.lease("k", "two", 1, 0.0)
        store.reserve("k", "one", ONE, 0.0)
        store.reserve("k", "two", ONE, 0.0)
        writer = sqlite3.connect(path, isolation_level=None)
        writer.execute("BEGIN IMMEDIATE")
        for _ in range(3):
            clock[0] += 0.3
            assert store.lease("k", "two", 1, 0.0).ahead == 0
            assert store.reserve("k", "two", ONE, 0.0).ahead == 0
        failed = []

        def work(number):
            try:
                store.reserve("k", f"new {number}", ONE, 0.0)
            except Busy:
                failed.append(number)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(_sqlite_queues, "BUSY", 0.1)
            threads = [threading.Thread(target=work, args=(number,)) for number in range(10)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            clock[0] += 0.2
            with pytest.raises(Busy, match="others write to"):
                store.reserve("k", "two", ONE, 0.0)
        assert len(failed) == 10
        writer.execute("ROLLBACK")
        writer.close()
        assert store.reserve("k", "two", ONE, 0.0) is None

    def test_who_were_forgotten_begin_at_the_end(self, path, clock):
        store = SQLiteStore(path)
        store.lease("k", "one", 1, 0.0)
        store.lease("k", "two", 1, 0.0)
        clock[0] += 0.8
        store.lease("k", "three", 1, 0.0)
        clock[0] += 0.3
        assert store.lease("k", "three", 1, 0.0).ahead == 0
        assert store.lease("k", "two", 1, 0.0).ahead == 1
        store.release("k", "one", 0.0)
        assert store.lease("k", "two", 1, 0.0).ahead == 1
        assert store.lease("k", "three", 1, 0.0) is None

    def test_are_forgotten_by_the_wait_that_they_were_told_last(self, path, clock):
        """A wait that has become short leaves a dead caller no long time."""
        store = SQLiteStore(path)
        store.reserve("k", "one", (Limit("requests", 1.0, 60.0, 60.0),), 0.0)
        assert store.reserve("k", "two", (Limit("requests", 1.0, 60.0, 50.0),), 0.0).seconds == pytest.approx(50)
        store.correct("k", Limit("requests", 1.0, 60.0, -59.0), 0.0)
        store.correct("k", Limit("requests", 1.0, 60.0, 10.0), 0.0)
        assert store.reserve("k", "two", (Limit("requests", 1.0, 60.0, 50.0),), 0.0).seconds == pytest.approx(1)
        clock[0] += 2.1
        assert store.reserve("k", "four", (Limit("requests", 1.0, 60.0, 1.0),), 0.0) is None


class TestAsync:
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_store_that_hangs_leaves_others_their_threads(self, path, backend):
        """More calls wait for it than there are threads for all."""
        store = SQLiteStore(path)
        hanging, over = threading.Event(), threading.Event()

        def hang():
            with store._file.writer.lock:
                hanging.set()
                over.wait()

        async def main():
            thread = threading.Thread(target=hang)
            thread.start()
            hanging.wait()
            async with anyio.create_task_group() as tasks:
                for number in range(60):
                    tasks.start_soon(store.areserve, "k", f"{number}", ONE, 0.0)
                await anyio.wait_all_tasks_blocked()
                assert await anyio.to_thread.run_sync(lambda: "free") == "free"
                assert await store.aload("v", 0.0) is None
                over.set()
            thread.join()

        try:
            run_async(main, backend)
        finally:
            over.set()

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_tasks_that_are_cancelled(self, path, backend):
        """In the middle of whatever they do, they leave nothing behind."""
        store = SQLiteStore(path)
        layer = Concurrency(2, store=store, on_store_error="raise")
        chance = random.Random(7)  # noqa: S311  # the same calls in each run
        done = []

        class Provider:
            async def complete(self, request):
                await anyio.sleep(0.001)
                return "fine"

        async def main():
            pipeline = AsyncPipeline(Provider(), [layer])

            async def work(number):
                with anyio.move_on_after(chance.uniform(0, 0.05) if number % 2 else 60):
                    await pipeline.complete(REQUEST)
                    done.append(number)

            async with anyio.create_task_group() as tasks:
                for number in range(16):
                    tasks.start_soon(work, number)

        run_async(main, backend)
        assert len(done) >= 8
        assert rows(path) == []


STACK = """
llm:
  framework: echo
  model: m
  middleware:
    - cache: {{store: "{url}", namespace: tests}}
    - budget: {{tokens: 100000, store: "{url}"}}
    - rate_limit: {{requests: 1000, tokens: 1000000, store: "{url}"}}
    - concurrency: {{limit: 3, store: "{url}"}}
    - circuit_breaker: {{failures: 1, store: "{url}"}}
"""


class TestStacks:
    def test_of_yaml(self, path, tmp_path, capfd):
        """All that share something take the same URL, and share one file."""
        (tmp_path / "stack.yaml").write_text(STACK.format(url=f"sqlite:{path}"))
        with LLM.from_yaml(tmp_path / "stack.yaml") as llm:
            assert llm.complete("Hello") == llm.complete("Hello")
        states = rows(path)
        assert len(states) == 1, "the limits of the rate, and no place any more"
        assert set(states[0][3]) == {"requests", "tokens"}
        db = sqlite3.connect(path)
        assert db.execute("SELECT count(*) FROM fluxibly_values WHERE key NOT LIKE 'circuit%'").fetchall() == [(1,)]
        assert db.execute("SELECT count(*) FROM fluxibly_sums").fetchall() == [(1,)]
        db.close()
        assert "SQLiteStore" not in capfd.readouterr().err

    def test_it_is_a_whole_store(self, path):
        assert isinstance(SQLiteStore(path), Store)
