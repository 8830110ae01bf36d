"""`SQLiteStore`: the laws of stores, its bounds, and what becomes of a file that is damaged, full or shared."""

from __future__ import annotations

import math
import os
import sqlite3
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from support.stores import StoreLaws

from fluxibly._logs import forget_reports
from fluxibly.errors import ConfigError
from fluxibly.middleware import Concurrency, RateLimit
from fluxibly.stores import MemoryStore, SQLiteStore, _sqlite_queues, sqlite, to_store
from fluxibly.stores._sqlite_file import SWEEP
from fluxibly.stores.sqlite import DiskFull

DAY = 86_400
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


@pytest.fixture(autouse=True)
def _afresh():
    forget_reports()


@pytest.fixture
def clock(monkeypatch):
    """The system's time, as a list of one number."""
    now = [1e9]
    monkeypatch.setattr(sqlite, "_now", lambda: now[0])
    return now


@pytest.fixture
def path(tmp_path):
    return tmp_path / "answers.db"


class TestLaws(StoreLaws):
    @pytest.fixture(autouse=True)
    def _in_its_time(self, monkeypatch):
        monkeypatch.setattr(sqlite, "_now", lambda: 1e9 + self.time)
        monkeypatch.setattr(_sqlite_queues, "_clock", lambda: self.time)
        yield
        del self.store  # and with it the leases that it would renew, by the real clock

    def make(self):
        return SQLiteStore(self.folder / "answers.db")

    def test_of_two_that_have_the_same_file(self):
        """They have the same values and sums."""
        other = SQLiteStore(self.store.path)
        self.do("save", "v", b"one", None)
        assert other.load("v", 0.0).value == b"one"
        assert other.add("s", 2, None, 0.0) == 2
        assert self.do("add", "s", 3, None) == 5
        other.save("v", None, None, 0.0)
        assert self.do("load", "v") is None


class TestValues:
    @given(
        st.lists(
            st.one_of(
                st.tuples(
                    st.just("save"), st.sampled_from("abcdef"), st.integers(0, 900), st.none() | st.integers(1, 9)
                ),
                st.tuples(st.just("load"), st.sampled_from("abcdef")),
                st.tuples(st.just("forget"), st.sampled_from("abcdef")),
                st.tuples(st.just("pass"), st.integers(1, 5)),
                st.tuples(st.just("note"), st.none()),
            ),
            max_size=40,
        )
    )
    @settings(max_examples=60, deadline=None)
    def test_that_were_used_last_stay(self, tmp_path_factory, steps):
        """What is over goes first, then what was not used for longest; a plain model agrees about each."""
        store = SQLiteStore(tmp_path_factory.mktemp("values") / "v.db", max_bytes=2000)
        model, now = OrderedDict(), 1e9
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(sqlite, "_now", lambda: now)
            for step, what, *more in steps:
                if step == "save":
                    length, seconds = more
                    store.save(what, bytes(length), seconds, 0.0)
                    model.pop(what, None)
                    model[what] = (length, math.inf if seconds is None else now + seconds)
                    taken = sum(size + 129 for size, _ in model.values())
                    if taken > 2000:
                        for key in [key for key, (_, until) in model.items() if until <= now]:
                            del model[key]
                    while sum(size + 129 for size, _ in model.values()) > 2000:
                        model.popitem(last=False)
                elif step == "load":
                    found, expected = store.load(what, 0.0), model.get(what)
                    if expected is None or expected[1] <= now:
                        assert found is None
                    else:
                        assert (len(found.value), found.left) == (expected[0], expected[1] - now)
                        model.move_to_end(what)
                elif step == "forget":
                    store.save(what, None, None, 0.0)
                    model.pop(what, None)
                elif step == "pass":
                    now += what
                else:
                    store._note_uses()
        store.close()

    def test_that_are_too_large(self, path):
        """They are not kept, and what they replace is no longer right."""
        store = SQLiteStore(path, max_bytes=1000)
        store.save("k", b"old", None, 0.0)
        store.save("k", bytes(2000), None, 0.0)
        assert store.load("k", 0.0) is None
        store.save("k", bytes(800), None, 0.0)
        assert store.load("k", 0.0) is not None

    def test_bound_the_file(self, path):
        """10 times as much as fits leaves the file not much larger than what may be kept."""
        store = SQLiteStore(path, max_bytes=1_000_000)
        for number in range(2000):
            store.save(f"{number}", os.urandom(5000), None, 0.0)
        store.close()
        assert path.stat().st_size < 1_500_000
        assert store.load("1999", 0.0) is not None
        assert store.load("0", 0.0) is None

    def test_that_are_over_are_forgotten(self, path, clock):
        """Values and sums whose time is over take no room, though nobody asks for them."""
        store = SQLiteStore(path)
        for number in range(SWEEP):
            store.save(f"{number}", b"x", 10, 0.0)
            store.add(f"sum {number}", 1, 10, 0.0)
        store.save("good", b"x", None, 0.0)
        store.add("good", 1, None, 0.0)
        clock[0] += 11
        for _ in range(SWEEP):
            store.save("good", b"x", None, 0.0)
        db = sqlite3.connect(path)
        counts = [
            db.execute(f"SELECT count(*) FROM fluxibly_{name}").fetchall()  # noqa: S608
            for name in ("values", "sums", "parts")
        ]
        db.close()
        assert counts == [[(1,)], [(1,)], [(0,)]]
        assert store.add("good", 1, None, 0.0) == 2

    def test_reads_write_nothing(self, path, monkeypatch):
        """Which values were used is written down together, once a second at most."""
        store = SQLiteStore(path)
        for key in "abc":
            store.save(key, bytes(10), None, 0.0)
        noted = []
        monkeypatch.setattr(store, "_note_uses", lambda: noted.append(1))
        for _ in range(100):
            store.load("a", 0.0)
        assert noted == []
        monkeypatch.setattr(sqlite, "_NOTE_USES_AFTER", 0.0)
        store.load("a", 0.0)
        assert noted == [1]

    def test_the_uses_that_were_noted_count_for_others(self, path):
        store, other = SQLiteStore(path, max_bytes=450), SQLiteStore(path, max_bytes=450)
        for key in "ab":
            store.save(key, bytes(10), None, 0.0)
        store.load("a", 0.0)
        store._note_uses()
        other.save("c", bytes(10), None, 0.0)
        other.save("d", bytes(10), None, 0.0)
        assert other.load("b", 0.0) is None
        assert other.load("a", 0.0) is not None

    def test_a_read_does_not_wait_for_one_who_writes(self, path):
        """Also where it would be time to note what was used."""
        store = SQLiteStore(path)
        store.save("a", b"x", None, 0.0)
        writer = sqlite3.connect(path, isolation_level=None)
        writer.execute("BEGIN IMMEDIATE")
        store._noted_at -= 10
        assert store.load("a", 0.0).value == b"x"
        writer.execute("ROLLBACK")
        writer.close()


class TestSums:
    @given(
        st.lists(
            st.tuples(
                st.integers(-5, 9),
                st.sampled_from([10.0, 10.0, None]),
                st.none() | st.integers(0, 20),
                st.integers(0, 6),
            ),
            max_size=30,
        )
    )
    @settings(max_examples=60, deadline=None)
    def test_are_those_of_the_memory_store(self, tmp_path_factory, steps):
        store, model = SQLiteStore(tmp_path_factory.mktemp("sums") / "s.db"), MemoryStore()
        now = 1e9
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(sqlite, "_now", lambda: now)
            for amount, per, most, wait in steps:
                now += wait
                got = store.add(f"{per}", amount, per, 0.0, most=most)
                assert got == model.add(f"{per}", amount, per, now, most=most)
        store.close()

    def test_have_few_parts(self, path, clock):
        store = SQLiteStore(path)
        for _ in range(3000):
            store.add("s", 1, 10, 0.0)
            clock[0] += 0.001
        db = sqlite3.connect(path)
        [(count,)] = db.execute("SELECT count(*) FROM fluxibly_parts").fetchall()
        db.close()
        assert count <= 301


class TestClocks:
    def test_that_are_put_back(self, path, clock):
        """A sum is over after its time all the same, and the value that was used last stays."""
        store = SQLiteStore(path, max_bytes=300)
        store.save("old", b"x", None, 0.0)
        store.add("s", 5, 60, 0.0)
        clock[0] -= 365 * DAY
        assert store.add("s", 1, 60, 0.0) == 6
        store.save("new", b"x", None, 0.0)
        store.save("newest", b"x", None, 0.0)
        assert store.load("old", 0.0) is None
        assert store.load("newest", 0.0) is not None
        clock[0] += 61
        assert store.add("s", 1, 60, 0.0) == 1

    def test_that_are_put_forward(self, path, clock):
        """Values are over sooner, and nothing else happens."""
        store = SQLiteStore(path)
        store.save("timed", b"x", 60, 0.0)
        store.save("good", b"x", None, 0.0)
        store.add("s", 5, 60, 0.0)
        clock[0] += 365 * DAY
        assert store.load("timed", 0.0) is None
        assert store.load("good", 0.0) is not None
        assert store.add("s", 1, 60, 0.0) == 1


class TestFiles:
    def test_are_for_their_owner_alone(self, path):
        """Nobody else reads what is in it, nor in the files beside it."""
        mask = os.umask(0)
        try:
            store = SQLiteStore(path)
            store.save("k", b"x", None, 0.0)
            modes = {each.name: each.stat().st_mode & 0o777 for each in path.parent.iterdir()}
        finally:
            os.umask(mask)
        assert modes == dict.fromkeys(["answers.db", "answers.db-wal", "answers.db-shm"], 0o600)

    def test_are_opened_late_and_again(self, path):
        store = SQLiteStore(path)
        assert not path.exists()
        store.save("k", b"x", None, 0.0)
        store.close()
        assert store.load("k", 0.0).value == b"x"
        assert repr(store) == f"SQLiteStore({str(path)!r})"
        assert repr(SQLiteStore(path, max_bytes=5)) == f"SQLiteStore({str(path)!r}, max_bytes=5)"

    @pytest.mark.parametrize("where", ["at once", "while it is open"])
    def test_that_are_damaged(self, path, capsys, where):
        """The file is set aside, which is said once, and a new one takes its place."""
        store = SQLiteStore(path)
        if where == "at once":
            path.write_bytes(b"This is no database. " * 500)
        else:
            for number in range(200):
                store.save(f"{number}", bytes(1000), None, 0.0)
            store.close()
            damaged = bytearray(path.read_bytes())
            damaged[4096:] = b"\x55" * (len(damaged) - 4096)
            path.write_bytes(damaged)
        assert store.load("1", 0.0) is None
        store.save("1", b"new", None, 0.0)
        assert store.load("1", 0.0).value == b"new"
        assert SQLiteStore(path).load("1", 0.0).value == b"new"
        assert (path.parent / "answers.db.broken-1").exists()
        said = capsys.readouterr().err
        assert said.count("is damaged; it is now 'answers.db.broken-1', beside a new one") == 1

    def test_that_are_damaged_again(self, path):
        """Each has a name of its own."""
        for _ in range(3):
            path.write_bytes(b"This is no database. " * 500)
            store = SQLiteStore(path)
            store.save("1", b"new", None, 0.0)
            store.close()
        assert sorted(each.name for each in path.parent.glob("*.broken-?")) == [
            f"answers.db.broken-{number}" for number in (1, 2, 3)
        ]

    def test_that_another_has_set_aside(self, path):
        """Only the damaged file is, and not the new one, however many find it damaged."""
        path.write_bytes(b"This is no database. " * 500)
        stores = [SQLiteStore(path) for _ in range(16)]
        ready = threading.Barrier(len(stores))

        def work(number):
            ready.wait()
            stores[number].save(f"{number}", b"new", None, 0.0)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(stores))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert [each.name for each in path.parent.glob("*.broken-?")] == ["answers.db.broken-1"]
        assert all(stores[0].load(f"{number}", 0.0) is not None for number in range(len(stores)))

    @pytest.mark.parametrize("how", ["removed", "renamed"])
    def test_that_are_gone(self, path, how):
        """Somebody has removed or renamed the file: this process goes on in the new one, as all others do."""
        one, other = SQLiteStore(path), SQLiteStore(path)
        one.add("k", 5, None, 0.0)
        assert other.add("k", 1, None, 0.0) == 6
        for name in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
            if how == "removed":
                name.unlink(missing_ok=True)
            elif name.exists():
                name.rename(name.with_name(f"old {name.name}"))
        assert one.add("k", 2, None, 0.0) == 2
        assert other.add("k", 3, None, 0.0) == 5
        assert other.load("x", 0.0) is None

    def test_that_are_full(self, path):
        """What is there can be read; more cannot be kept, and room can be made."""
        store = SQLiteStore(path)
        store.save("k", b"x", None, 0.0)
        db = store._file.writer.connection
        [(pages,)] = db.execute("PRAGMA page_count").fetchall()
        db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(DiskFull, match="no room for more in"):
            store.save("large", bytes(100_000), None, 0.0)
        assert store.load("k", 0.0).value == b"x"
        assert store.load("large", 0.0) is None
        db.execute("PRAGMA max_page_count = 100000")
        store.save("large", bytes(100_000), None, 0.0)
        assert store.load("large", 0.0) is not None

    @pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of the size of files")
    def test_on_a_disk_that_is_full(self, path):
        """The same, where the system refuses."""
        script = f"""
import resource, signal
from fluxibly.stores import SQLiteStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = SQLiteStore({str(path)!r})
store.save("k", b"x", None, 0.0)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
failed = None
for number in range(100):
    try:
        store.save(f"{{number}}", bytes(10_000), None, 0.0)
    except Exception as error:
        failed = type(error).__name__
        break
assert failed in ("DiskFull", "OperationalError"), failed
assert store.load("k", 0.0).value == b"x"
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.save("after", bytes(10_000), None, 0.0)
assert store.load("after", 0.0) is not None
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stderr


class TestProcesses:
    def test_several_at_once(self, path):
        """Four processes make the file together, add to one sum and keep values, and nothing is lost."""
        script = f"""
import sys
from fluxibly.stores import SQLiteStore
store = SQLiteStore({str(path)!r})
sys.stdin.readline()
for number in range(50):
    store.add("sum", 1, None, 0.0)
    store.save(f"{{sys.argv[1]}} {{number}}", b"x" * 500, None, 0.0)
    assert store.load(f"{{sys.argv[1]}} {{number}}", 0.0) is not None
"""
        processes = [
            subprocess.Popen([sys.executable, "-c", script, f"{number}"], stdin=subprocess.PIPE) for number in range(4)
        ]
        for process in processes:
            process.stdin.write(b"go\n")
            process.stdin.flush()
        for process in processes:
            process.stdin.close()
            assert process.wait(60) == 0
        store = SQLiteStore(path)
        assert store.add("sum", 0, None, 0.0) == 200
        assert all(store.load(f"{n} {number}", 0.0) is not None for n in range(4) for number in range(50))

    @forks
    def test_a_fork(self, path):
        """The new process opens the file anew, also while threads of the old one read and write all the time."""
        script = f"""
import os, sys, threading
from fluxibly.stores import SQLiteStore
store = SQLiteStore({str(path)!r})
store.save("k", b"x", None, 0.0)
over = threading.Event()
def work(number):
    while not over.is_set():
        store.add("sum", 1, None, 0.0)
        store.load("k", 0.0)
threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
for thread in threads: thread.start()
for _ in range(5):
    before = store._file.reader.connection
    child = os.fork()
    if not child:
        try:
            assert store.load("k", 0.0).value == b"x"
            store.add("of children", 1, None, 0.0)
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
over.set()
for thread in threads: thread.join()
assert store.add("of children", 0, None, 0.0) == 5
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr


class TestUrls:
    def test_of_a_file(self, path, monkeypatch):
        store = to_store(f"sqlite:{path}", ("load", "save"), max_bytes=5)
        assert (store.path, store.max_bytes, store.local) == (path, 5, False)
        assert to_store(f"sqlite:{path}", ("add",)).max_bytes == 4_000_000_000
        monkeypatch.chdir(path.parent)
        monkeypatch.setenv("HOME", str(path.parent))
        assert to_store("sqlite:here.db", ("load",)).path == path.parent / "here.db"
        assert to_store("sqlite:~/here.db", ("load",)).path == path.parent / "here.db"

    @pytest.mark.parametrize(
        ("url", "said"),
        [
            ("sqlite:", "got ''; write 'sqlite:answers.db', for example"),
            ("sqlite://answers.db", "got '//answers.db'; write 'sqlite:answers.db', for example"),
            ("sqlite::memory:", "got ':memory:'; for memory alone, write 'memory'"),
            ("sqlite:/no/such/folder/a.db", "the folder '/no/such/folder' does not exist; make it first"),
            ("sqlite:/", "expected the path of a file, got '/'"),
            ("sqlite:a\0b", r"expected the path of a file, got 'a\x00b'"),
            ("sqlite:\ud800", r"expected the path of a file, got '\ud800'"),
            ("mongo://u:password@host", "got 'mongo:…'"),
        ],
    )
    def test_that_are_none(self, url, said):
        with pytest.raises(ConfigError) as caught:
            to_store(url, ("load", "save"))
        assert said in str(caught.value)
        assert "password" not in str(caught.value)

    @pytest.mark.parametrize("max_bytes", [0, 1.5, True])
    def test_a_size_that_is_none(self, path, max_bytes):
        with pytest.raises(ConfigError, match="SQLiteStore: max_bytes: expected a whole number from 1 up"):
            SQLiteStore(path, max_bytes=max_bytes)

    def test_middleware_need_no_more_than_they_use(self):
        """A store of a user's may have only the methods that one of them needs."""

        class Places:
            local = True
            lease = release = alease = arelease = print

        Concurrency(1, store=Places())
        with pytest.raises(ConfigError, match="got a Places without reserve, correct, throttle"):
            RateLimit(requests=1, store=Places())

    def test_sqlite_is_loaded_late(self):
        """A program without such a store does not import the library."""
        script = "import sys, fluxibly.middleware.rate_limit; assert 'sqlite3' not in sys.modules"
        assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
