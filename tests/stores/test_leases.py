"""The leases that a process renews: as long as a call runs, and no longer; told once where that fails; not after a fork."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from fluxibly._logs import forget_reports
from fluxibly.errors import ConfigError
from fluxibly.stores import SQLiteStore, _sqlite_queues
from fluxibly.stores._leases import Leases
from fluxibly.stores._sqlite_queues import PLACES

SHORT = 0.06
ENOUGH = 30.0


@pytest.fixture(autouse=True)
def _afresh():
    forget_reports()


def wait_until(what: Callable[[], Any]) -> None:
    end = time.monotonic() + ENOUGH
    while not what():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


def threads(name: str) -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == f"fluxibly leases {name}"]


class Renewals:
    """Renews, and counts how often each lease was renewed."""

    def __init__(self, answer: Callable[[str], bool] = lambda who: True) -> None:
        self.answer = answer
        self.counts: dict[str, int] = {}

    def __call__(self, key: str, who: str) -> bool:
        self.counts[who] = self.counts.get(who, 0) + 1
        return self.answer(who)

    def more(self, who: str, number: int = 3) -> None:
        """Wait until a lease was renewed so many times more."""
        before = self.counts.get(who, 0)
        wait_until(lambda: self.counts.get(who, 0) >= before + number)


class TestRenewals:
    def test_last_as_long_as_the_call(self, tmp_path, monkeypatch):
        """Time goes on by half a lease after each renewal, so the place is held for five times its lease, and then free."""
        now = [1000.0]
        monkeypatch.setattr(_sqlite_queues, "_clock", lambda: now[0])
        store, other = (SQLiteStore(tmp_path / "a.db", lease_seconds=SHORT) for _ in range(2))
        assert store.lease("k", "one", 1, 0.0) is None

        def is_renewed() -> bool:
            places, _, _ = store._file.read(lambda db: PLACES.read("k", db))
            return places.held["one"] >= now[0] + SHORT * 0.99

        for _ in range(10):
            now[0] += SHORT / 2
            wait_until(is_renewed)
        assert other.lease("k", "two", 1, 0.0, wait=False) is not None
        store.release("k", "one", 0.0)
        assert other.lease("k", "two", 1, 0.0, wait=False) is None
        other.release("k", "two", 0.0)

    def test_end_with_the_lease(self):
        """The thread renews no more, and ends once nothing is held. The next lease has one again."""
        renewals = Renewals()
        leases = Leases(renewals, SHORT, "Ending")
        for _ in range(2):
            leases.hold("k", "one")
            leases.hold("k", "two")
            assert len(threads("Ending")) == 1
            renewals.more("one")
            leases.drop("k", "one")
            renewals.more("two")
            before = renewals.counts["one"]
            renewals.more("two")
            assert renewals.counts["one"] == before
            leases.drop("k", "two")
            leases.drop("k", "two")
            wait_until(lambda: not threads("Ending"))

    def test_that_the_store_has_forgotten(self, capsys):
        """That is told once, and the others are renewed all the same."""
        renewals = Renewals(lambda who: who != "lost")
        leases = Leases(renewals, SHORT, "Forgetful")
        leases.hold("k", "lost")
        leases.hold("k", "kept")
        renewals.more("lost")
        renewals.more("kept")
        said = capsys.readouterr().err
        assert said == (
            "fluxibly: Forgetful: a lease could not be renewed (the store has forgotten it); its call goes on, and another may "
            "take its place\n"
        )

    def test_that_fail(self, capsys):
        """That is told once, without the text of the error, which may have a password; and it is tried again."""

        def fail(who: str) -> bool:
            if who == "one":
                raise ConnectionError("redis://user:password@host")
            return True

        renewals = Renewals(fail)
        leases = Leases(renewals, SHORT, "Failing")
        leases.hold("k", "one")
        leases.hold("k", "two")
        renewals.more("one")
        renewals.more("two")
        said = capsys.readouterr().err
        assert said.count("a lease could not be renewed (the store failed with ConnectionError)") == 1
        assert "password" not in said

    def test_of_a_call_that_ends_meanwhile(self, capsys):
        """Its lease is gone, as it should be, and nothing is told."""
        leases: list[Leases] = []

        def end(who: str) -> bool:
            leases[0].drop("k", who)
            return False

        renewals = Renewals(end)
        leases.append(Leases(renewals, SHORT, "Ended"))
        leases[0].hold("k", "one")
        renewals.more("one", 1)
        wait_until(lambda: not threads("Ended"))
        assert capsys.readouterr().err == ""

    def test_keep_no_store_alive(self, tmp_path):
        """A store that nobody has any more is collected, while its thread sleeps, and while it has a lease."""
        for release in (True, False):
            store = SQLiteStore(tmp_path / "a.db", lease_seconds=SHORT)
            assert store.lease("k", f"{release}", 2, 0.0) is None
            if release:
                store.release("k", f"{release}", 0.0)
            gone = weakref.ref(store)
            del store
            gc.collect()
            assert gone() is None
        wait_until(lambda: not threads("SQLiteStore"))

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
    def test_after_a_fork(self):
        """The new process renews nothing of the old one, and can hold a lease of its own; the old one goes on."""
        script = f"""
import os, sys, threading, time
from fluxibly.stores._leases import Leases
renewed = []
leases = Leases(lambda key, who: renewed.append(who) is None, {SHORT}, "Forked")
def more():
    before = len(renewed)
    end = time.monotonic() + {ENOUGH}
    while len(renewed) < before + 3:
        assert time.monotonic() < end
        time.sleep(0.005)
leases.hold("k", "parent")
more()
child = os.fork()
if not child:
    try:
        renewed.clear()
        assert threading.active_count() == 1
        leases.hold("k", "child")
        more()
        assert set(renewed) == {{"child"}}, renewed
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
more()
assert set(renewed) == {{"parent"}}
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=90, check=False)
        assert done.returncode == 0, done.stderr


class TestSettings:
    def test_are_kept_in_copies(self, tmp_path):
        store = SQLiteStore(tmp_path / "a.db", lease_seconds=2.5)
        pickled = pickle.loads(pickle.dumps(store))  # noqa: S301  # our own
        for again in (copy.copy(store), copy.deepcopy(store), pickled):
            assert (again.path, again.lease_seconds) == (store.path, 2.5)
            assert repr(again) == f"SQLiteStore({str(store.path)!r}, lease_seconds=2.5)"
        assert SQLiteStore(tmp_path / "a.db").lease_seconds == 30

    @pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "3", True])
    def test_that_are_wrong(self, tmp_path, seconds):
        with pytest.raises(ConfigError, match="SQLiteStore: lease_seconds: expected a number"):
            SQLiteStore(tmp_path / "a.db", lease_seconds=seconds)


def test_a_thread_that_goes_on_after_the_main_thread(tmp_path):
    """Its calls hold places as before, although no other thread may start any more (from Python 3.12 on)."""
    script = f"""
import threading
from fluxibly.stores import SQLiteStore

def work():
    threading.main_thread().join()
    store = SQLiteStore({str(tmp_path / "a.db")!r})
    print(store.lease("k", "one", 1, 0.0), store.lease("k", "two", 1, 0.0).ahead)
    store.release("k", "one", 0.0)

threading.Thread(target=work).start()
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (ran.stdout, ran.stderr) == ("None 0\n", "")
