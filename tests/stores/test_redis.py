"""`RedisStore`, against a real server: the laws of stores, and what only a server does."""

from __future__ import annotations

import copy
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from contextlib import suppress
from functools import partial, wraps
from hashlib import sha1

import anyio
import pytest
from anyio.from_thread import start_blocking_portal
from hypothesis import HealthCheck, given, settings, strategies as st
from support.calling import REQUEST
from support.leftovers import eventually
from support.redis_server import RedisServer
from support.stores import StoreLaws

from fluxibly import LLM, LLMConfig
from fluxibly._logs import forget_reports
from fluxibly.errors import CircuitOpen, ConfigError, ServerError, StoreError
from fluxibly.middleware import Budget, Cache, CircuitBreaker, Concurrency, RateLimit
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.stores import (
    Limit,
    MemoryStore,
    RedisStore,
    Store,
    _redis_scripts as scripts,
    redis as redis_store,
    to_store,
)
from fluxibly.stores.redis import masked_url
from fluxibly.testing import ScriptedProvider
from fluxibly.testing.modes import BACKENDS, run_async

ONE = Limit("requests", 1.0, 1.0, 1.0)
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module", autouse=True)
def server():
    server = TestLaws.server = RedisServer()
    yield server
    server.close()


class _Late:
    """A time in ticks that is `expected`, or somewhat shorter because of time that has passed."""

    def __init__(self, expected, slack):
        self.low, self.high = expected - slack, expected + 0.1

    def __eq__(self, other):
        return other is not None and self.low <= other <= self.high

    __hash__ = None

    def __repr__(self):
        return f"from {self.low:g} to {self.high:g}"


def _again(test):
    """Run a test once more at a slower pace, if it has failed while the machine was too slow for its ticks."""

    @wraps(test)
    def run(self):
        for tick in (0.02, 0.2):
            self.begin(tick)
            try:
                return test(self)
            except AssertionError:
                if self.late() < 0.3:
                    raise
        self.begin(1.0)
        return test(self)

    return run


class TestLaws(StoreLaws):
    @pytest.fixture(autouse=True)
    def _patient(self, monkeypatch):
        monkeypatch.setattr(redis_store, "GRACE", 30.0)
        monkeypatch.setattr(redis_store, "PLACE_GRACE", 30.0)
        if self.way == "sync":
            yield
        else:
            with start_blocking_portal(self.way) as self.portal:  # much faster than a loop for each question
                yield
        self.store.close()

    def do(self, method, *args, **options):
        if self.way == "sync":
            return super().do(method, *args, **options)
        return self.portal.call(partial(getattr(self.store, f"a{method}"), *args, self.time, **options))

    def make(self):
        return RedisStore(self.server.patient_url)

    def begin(self, tick):
        with self.server.client() as client:
            client.flushall()
        self.tick = tick
        self.passed = 0.0
        self.began = time.monotonic()

    def pass_time(self, ticks):
        ticks = min(ticks, 12)  # more makes no difference to any of the laws
        self.passed += ticks
        time.sleep(ticks * self.tick)

    def late(self):
        """Return the ticks that have passed beside those that a test has let pass."""
        return (time.monotonic() - self.began) / self.tick - self.passed

    def near(self, expected):
        return _Late(expected, 4 * self.late() + 0.1)  # a lower rate makes four of one


for _name in dir(TestLaws):
    if _name.startswith("test_"):
        setattr(TestLaws, _name, _again(getattr(TestLaws, _name)))


# Time that a test sets: the scripts read it from a key.


@pytest.fixture
def timed(server, monkeypatch):
    """A store whose clock stands still, and a function that lets time pass."""
    for name in ("RESERVE", "CORRECT", "CLOSE", "SLOW_DOWN", "LEASE", "RENEW", "RELEASE", "ADD"):
        script = copy.copy(getattr(scripts, name))
        script.text = script.text.replace("redis.call('TIME')", "redis.call('HMGET', 'clock', 's', 'us')")
        script.sha = sha1(script.text.encode(), usedforsecurity=False).hexdigest()
        monkeypatch.setattr(scripts, name, script)
    monkeypatch.setattr(redis_store, "GRACE", 1e6)
    monkeypatch.setattr(redis_store, "PLACE_GRACE", 1e6)
    timed = _Timed(server)
    yield timed
    timed.store.close()


class _Timed:
    def __init__(self, server):
        self.server = server
        self.store = RedisStore(server.patient_url, lease_seconds=86_400)

    def begin(self):
        self.store._connections.ask(("FLUSHALL",))
        self.now = 0.0
        self.let_pass(0.0)
        self.model = MemoryStore()

    def let_pass(self, seconds):
        self.now += seconds
        whole = math.floor(self.now)
        clock = ("HMSET", "clock", "s", 1_700_000_000 + whole, "us", round((self.now - whole) * 1e6))
        self.store._connections.ask(clock)

    def do(self, method, *args, **options):
        """Ask both stores, and return what they say."""
        answers = [getattr(each, method)(*args, self.now, **options) for each in (self.store, self.model)]
        return [each._replace(signal=None) if hasattr(each, "signal") else each for each in answers]


_costs = st.sampled_from([0.0, 1.0, 2.0, 5.0])
_rates = st.sampled_from([0.125, 0.25, 0.5, 2.0])  # whole microseconds, so that nothing is rounded
_seconds = st.integers(1, 64).map(lambda sixteenth: sixteenth / 16)


class TestLikeTheMemoryStore:
    """Each answer is that of the store in memory, in a time that stands still meanwhile."""

    @given(
        st.lists(
            st.one_of(
                st.tuples(st.just("ask"), _costs, _costs),
                st.tuples(st.just("again"), st.integers(0, 20)),
                st.tuples(st.just("leave"), st.integers(0, 20)),
                st.tuples(st.just("pass"), _seconds),
                st.tuples(st.just("correct"), st.integers(-6, 6)),
                st.tuples(st.just("slow"), st.sampled_from(["requests", "tokens"]), _rates, _seconds),
                st.tuples(st.just("close"), _seconds),
            ),
            max_size=40,
        )
    )
    @settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_limits(self, timed, steps):
        """The waits and the places in the queue, whatever is given back, slowed down, closed or left."""
        timed.begin()
        waiting = []
        # The store in memory learns of a limit when it is first asked for, and could not slow it down before.
        timed.do("reserve", "k", "first", (Limit("requests", 0.5, 5.0, 0.0), Limit("tokens", 2.0, 6.0, 0.0)))
        for number, (kind, *args) in enumerate(steps):
            if kind == "pass":
                timed.let_pass(*args)
            elif kind == "correct":
                timed.do("correct", "k", Limit("tokens", 2.0, 6.0, float(args[0])))
            elif kind == "slow":
                timed.do("throttle", "k", *args)
            elif kind == "close":
                timed.do("throttle", "k", "requests", 0.0, *args)
            elif kind == "ask" or waiting:
                if kind == "ask":
                    who, limits = (
                        f"{number}",
                        (Limit("requests", 0.5, 5.0, args[0]), Limit("tokens", 2.0, 6.0, args[1])),
                    )
                else:
                    who, limits = waiting.pop(args[0] % len(waiting))
                if kind == "leave":
                    timed.do("release", "k", who)
                    continue
                turn, expected = timed.do("reserve", "k", who, limits)
                if turn is None and expected is not None:
                    # There is enough for all before it, which the store in memory lets go first.
                    assert (expected.seconds, expected.ahead > 0) == (pytest.approx(0, abs=2e-6), True)
                    timed.model.release("k", who, timed.now)
                    for limit in limits:
                        timed.model.correct("k", limit, timed.now)
                    continue
                assert (turn is None) == (expected is None), (turn, expected)
                if turn is not None:
                    waiting.append((who, limits))
                    assert (turn.seconds, turn.ahead) == (pytest.approx(expected.seconds, abs=2e-5), expected.ahead)

    @given(
        st.lists(
            st.tuples(
                st.sampled_from(["lease", "lease", "try", "release", "renew"]), st.integers(0, 6), st.integers(1, 3)
            ),
            max_size=40,
        )
    )
    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_places(self, timed, steps):
        """The places of a plain list: each may have a place if there is one for all before it, too."""
        timed.begin()
        held, waiting = [], []
        for kind, who, size in steps:
            if kind == "release":
                timed.store.release("k", f"{who}", 0.0)
                held, waiting = ([each for each in some if each != who] for some in (held, waiting))
            elif kind == "renew":
                assert timed.store.renew("k", f"{who}", 0.0) == (who in held)
            else:
                turn = timed.store.lease("k", f"{who}", size, 0.0, wait=kind == "lease")
                ahead = waiting.index(who) if who in waiting else len(waiting)
                if who in held or ahead < size - len(held):
                    assert turn is None
                    held = [*dict.fromkeys([*held, who])]
                    waiting = [each for each in waiting if each != who]
                else:
                    assert (turn.ahead, turn.seconds) == (ahead, math.inf)
                    if kind == "lease" and who not in waiting:
                        waiting.append(who)

    @given(
        st.lists(
            st.tuples(
                st.integers(-5, 9) | st.sampled_from([10**15 + 1, -(10**15)]),
                st.sampled_from([16.0, 16.0, None]),
                st.none() | st.integers(0, 20),
                st.sampled_from([0.0, 1 / 64, 1.0, 4.0, 10.0]),  # whole microseconds
            ),
            max_size=40,
        )
    )
    @settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_sums(self, timed, steps):
        timed.begin()
        for amount, per, most, wait in steps:
            timed.let_pass(wait)
            found, expected = timed.do("add", f"{per}", amount, per, most=most)
            assert found == expected

    def test_sums_have_few_parts(self, timed):
        timed.begin()
        for _ in range(300):
            timed.do("add", "s", 1, 100.0)
            timed.let_pass(0.01)
        assert timed.store._connections.ask(("LLEN", "{fluxibly:s}:sum:parts")) == [30]

    def test_estimates_with_many_ahead(self, timed):
        """Past the first 50, those ahead count as these do on average."""
        timed.begin()
        for number in range(101):
            timed.do("reserve", "k", f"{number}", (ONE._replace(cost=1.0, burst=1.0),))
        turn, expected = timed.do("reserve", "k", "last", (ONE,))
        assert (turn.ahead, turn.seconds) == (100, pytest.approx(expected.seconds, abs=1e-3))

    def test_places_of_the_dead_are_free_again(self, timed):
        """When their lease is over. One that is over cannot be renewed."""
        timed.begin()
        timed.store.lease("k", "one", 1, 0.0)
        timed.let_pass(86_399)
        assert timed.store.lease("k", "two", 1, 0.0) is not None
        assert timed.store.renew("k", "one", 0.0)
        timed.let_pass(86_399)
        assert timed.store.lease("k", "two", 1, 0.0) is not None
        timed.let_pass(1)
        assert not timed.store.renew("k", "one", 0.0)
        assert timed.store.lease("k", "two", 1, 0.0) is None

    def test_waiters_who_do_not_ask_again_are_forgotten(self, timed, monkeypatch):
        """A call that waits for a limit, after what it was told and a grace; one that waits for a place, after a grace."""
        monkeypatch.setattr(redis_store, "GRACE", 0.5)
        monkeypatch.setattr(redis_store, "PLACE_GRACE", 1.0)
        timed.begin()
        store = timed.store
        store.reserve("k", "one", (ONE,), 0.0)
        assert store.reserve("k", "dead", (ONE,), 0.0).seconds == pytest.approx(1)
        timed.let_pass(1.4)
        assert store.reserve("k", "late", (ONE,), 0.0).ahead == 1
        timed.let_pass(0.2)
        assert store.reserve("k", "late", (ONE,), 0.0) is None
        store.lease("p", "one", 1, 0.0)
        store.lease("p", "dead", 1, 0.0)
        timed.let_pass(0.9)
        assert store.lease("p", "late", 1, 0.0).ahead == 1
        timed.let_pass(0.2)
        assert store.lease("p", "late", 1, 0.0).ahead == 0


class TestKeys:
    @pytest.mark.parametrize(
        "key", ["a b", "a\nb\r\n\0", "{a}b", "a}:limits", "}{", "", "\u2603 \U0001f600", "half \ud800", "x" * 10_000]
    )
    def test_of_any_text(self, store, key):
        """What a user's function returns names a key of its own."""
        for each in (key, "other"):
            assert store.reserve(each, "one", (ONE._replace(name=each),), 0.0) is None
            assert store.reserve(each, f"who {each}", (ONE._replace(name=each),), 0.0) is not None
            store.release(each, f"who {each}", 0.0)
            assert store.lease(f"place {each}", "one", 1, 0.0) is None
            assert store.add(each, 1.0, None, 0.0) == 1
            assert store.load(each, 0.0) is None
            store.save(each, each.encode(errors="surrogatepass"), None, 0.0)
        assert store.load(key, 0.0).value == key.encode(errors="surrogatepass")

    def test_expire_and_are_together_in_a_cluster(self, store, server):
        """Whatever is done. All that one script uses is in one slot."""
        from redis.crc import key_slot

        limits = (ONE, Limit("tokens", 10.0, 10.0, 3.0))
        for who in "abc":
            store.reserve("k", who, limits, 0.0)
            store.lease("k", who, 1, 0.0)
        store.correct("k", limits[1], 0.0)
        store.correct("new", limits[1]._replace(cost=-5.0), 0.0)
        store.correct("slow", ONE._replace(rate=1e-9), 0.0)
        store.throttle("k", "requests", 0.5, 5.0, 0.0)
        store.throttle("closed", "requests", 0.0, 1e300, 0.0)
        for per in (None, 0.5, 1e300):
            store.add(f"{per}", 1.0, per, 0.0)
            store.add(f"{per}", 9.0, per, 0.0, most=5.0)
            store.add(f"refused {per}", 9.0, per, 0.0, most=5.0)
            store.save(f"{per}", b"x", per, 0.0)
        with server.client() as client:
            keys = client.keys("*")
            lives = {key: client.pttl(key) for key in keys}
        assert len(keys) >= 14
        assert {key: left for key, left in lives.items() if not 0 < left < 4e14} == {}
        slots = defaultdict(set)
        for key in keys:
            slots[key.partition("}:")[0]].add(key_slot(key.encode()))
        assert all(len(each) == 1 for each in slots.values())

    def test_are_gone_once_nothing_depends_on_them(self, store, server):
        store.reserve("k", "one", (Limit("requests", 1000.0, 1.0, 1.0),), 0.0)
        store.lease("k", "one", 1, 0.0)
        store.lease("k", "two", 1, 0.0)
        for who in ("one", "two"):
            store.release("k", who, 0.0)
        store.add("s", 1.0, 0.01, 0.0)
        store.add("none", 0.0, None, 0.0)
        store.save("v", b"x", 0.01, 0.0)
        with server.client() as client:
            assert eventually(lambda: client.keys("*") == [])

    def test_that_the_server_has_evicted(self, store, server):
        """A server without memory may forget a part of a queue: nobody waits behind the dead for ever."""
        for kind, ask in (
            ("limits", lambda who: store.reserve("k", who, (ONE._replace(rate=1000.0),), 0.0)),
            ("places", lambda who: store.lease("k", who, 1, 0.0)),
        ):
            ask("one")
            store.throttle("k", "requests", 0.0, 0.02, 0.0)
            ask("dead")
            with server.client() as client:
                client.delete(f"{{fluxibly:k}}:{kind}:seen")
            time.sleep(0.03)
            store.release("k", "one", 0.0)
            assert eventually(lambda ask=ask: ask("next") is None)


class TestScripts:
    def test_are_sent_again_to_a_server_that_has_forgotten_them(self, store, server):
        with server.client() as client:
            for number in range(3):
                assert store.reserve(f"{number}", "one", (ONE,), 0.0) is None
                assert store.add("s", 1.0, 60.0, 0.0) == number + 1
                client.script_flush()

    def test_are_known_by_their_names_afterwards(self, store, server):
        """The text of a script is sent once."""
        with server.client() as client:
            client.script_flush()
            client.config_resetstat()
            for number in range(5):
                store.lease("k", f"{number}", 9, 0.0)
            calls = client.info("commandstats")
        assert (calls["cmdstat_eval"]["calls"], calls["cmdstat_evalsha"]["calls"]) == (1, 5)


class TestClients:
    def test_whose_clock_is_wrong(self, url):
        """The time is the server's."""
        one, other = RedisStore(url), RedisStore(url)
        assert one.reserve("k", "one", (ONE._replace(rate=0.01),), 0.0) is None
        assert other.reserve("k", "two", (ONE._replace(rate=0.01),), 3600.0).seconds > 50
        one.save("v", b"x", 60.0, 0.0)
        assert other.load("v", 3600.0).left > 50
        one.close()
        other.close()

    def test_of_many_threads_have_a_bounded_number_of_connections(self, store, monkeypatch):
        connections = store._connections
        made, make, go, done = [], connections._make, threading.Barrier(60), []
        monkeypatch.setattr(connections, "_make", lambda: made.append(make()) or made[-1])

        def work(number):
            go.wait()
            for turn in range(10):
                store.save(f"{number} {turn}", b"x" * 10_000, 60.0, 0.0)
                assert store.load(f"{number} {turn}", 0.0).value == b"x" * 10_000
            done.append(number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(60)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(done) == 60
        assert 1 <= len(made) <= 32
        assert len(connections._idle) == len(made)

    def test_have_a_bounded_number_of_threads(self, store, server, monkeypatch):
        """A server that hangs holds up at most 16 threads of an event loop, and none of other libraries."""
        threads = set()
        monkeypatch.setattr(store, "add", lambda *_, **__: (threads.add(threading.current_thread()), time.sleep(0.01)))

        async def main():
            async with anyio.create_task_group() as tasks:
                for _ in range(60):
                    tasks.start_soon(store.aadd, "s", 1.0, None, 0.0)
                assert anyio.to_thread.current_default_thread_limiter().borrowed_tokens == 0

        for backend in BACKENDS:
            threads.clear()
            run_async(main, backend)
            assert 1 < len(threads) <= 16

    def test_of_a_large_value(self, store):
        value = os.urandom(1 << 20) * 8
        store.save("large", value, None, 0.0)
        assert store.load("large", 0.0).value == value

    @forks
    def test_that_are_forked(self, url):
        """The new process has connections of its own, and neither renews nor releases what the old one holds."""
        script = f"""
import os, threading
from fluxibly.stores import RedisStore
store = RedisStore({url!r})
assert store.lease("k", "parent", 1, 0.0) is None
assert store.lease("k", "waits", 1, 0.0) is not None
over = threading.Event()
def work():
    while not over.is_set():
        store.add("sum", 1, None, 0.0)
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads: thread.start()
for number in range(5):
    child = os.fork()
    if not child:
        try:
            store.release("k", "parent", 0.0)
            store.release("k", "waits", 0.0)
            assert not store._leases._held
            assert store.add("of children", 1, None, 0.0) == number + 1
            assert store.lease("k", "child", 1, 0.0).ahead == 1
            store.release("k", "child", 0.0)
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
over.set()
for thread in threads: thread.join()
assert store.renew("k", "parent", 0.0)
store.release("k", "parent", 0.0)
assert store.lease("k", "waits", 1, 0.0) is None
"""
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr

    @pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers")
    def test_that_a_signal_interrupts(self, store):
        """A handler may ask the same store in the midst of a trip, whatever the trip holds."""
        seen = []
        before = signal.signal(signal.SIGPROF, lambda *_: seen.append(store.add("handled", 1.0, None, 0.0)))
        signal.setitimer(signal.ITIMER_PROF, 0.0005, 0.0005)
        try:
            added = 0
            while added < 400 or (not seen and added < 40_000):
                store.add("s", 1.0, None, 0.0)
                added += 1
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)
        assert store.add("s", 0.0, None, 0.0) == added
        assert sorted(seen) == [*range(1, len(seen) + 1)]  # a signal may interrupt a handler, too
        assert seen


class TestLeases:
    def test_are_renewed(self, url, monkeypatch):
        """By a thread of the process that holds them, until they are released."""
        # The key is this test's own: the thread of an earlier test may still renew the same caller of another key.
        monkeypatch.setattr(redis_store, "PLACE_GRACE", 30.0)
        one, other = RedisStore(url, lease_seconds=1), RedisStore(url, lease_seconds=1)
        assert one.lease("renewed", "one", 1, 0.0) is None
        end = time.monotonic() + 1.2
        while time.monotonic() < end:
            assert other.lease("renewed", "two", 1, 0.0) is not None
            time.sleep(0.05)
        one.release("renewed", "one", 0.0)
        assert other.lease("renewed", "two", 1, 0.0) is None
        other._leases.drop("renewed", "two")  # as if its process had died
        assert eventually(lambda: one.lease("renewed", "three", 1, 0.0) is None, 30)
        one.release("renewed", "three", 0.0)
        one.close()
        other.close()

    def test_that_the_server_has_lost_are_reported_once(self, url, server, capfd):
        forget_reports()
        store = RedisStore(url, lease_seconds=1)
        said = []
        for who in ("one", "two"):
            store.lease("k", who, 2, 0.0)
        with server.client() as client:
            client.flushall()
        assert eventually(lambda: said.append(capfd.readouterr().err) or "lease" in "".join(said), 30)
        assert "".join(said).count("a lease could not be renewed (the store has forgotten it); its call goes on") == 1
        store.close()


@pytest.fixture
def other():
    """A server of a test's own, which it stops or locks."""
    other = RedisServer(data=True)
    yield other
    other.close()


def _pipeline(store, answers=500, **settings):
    return Pipeline(
        ScriptedProvider(*["fine"] * answers), [RateLimit(requests=1e6, tokens=1e9, store=store, **settings)]
    )


def _works(pipeline):
    try:
        return pipeline.complete(REQUEST).text == "fine"
    except StoreError:
        return False


class TestTroubles:
    def test_a_server_that_is_killed(self, url, other, capfd):
        """Calls go on by themselves meanwhile, and share again afterwards what the server has kept."""
        forget_reports()
        store = RedisStore(other.patient_url)
        assert store.lease("k", "one", 1, 0.0) is None
        assert store.add("s", 5.0, None, 0.0) == 5
        pipeline = Pipeline(ScriptedProvider(*["fine"] * 9), [Concurrency(1, store=store)])
        pipeline.complete(REQUEST)
        other.kill()
        assert [pipeline.complete(REQUEST).text for _ in range(3)] == ["fine"] * 3
        said = capfd.readouterr().err
        assert said.count("its store RedisStore failed with ConnectionError; until it works again") == 1
        with pytest.raises(StoreError, match="its store RedisStore failed with ConnectionError"):
            _pipeline(store, on_store_error="raise").complete(REQUEST)
        other.start()
        assert store.add("s", 1.0, None, 0.0) == 6
        assert store.lease("k", "two", 1, 0.0, wait=False) is not None
        assert store.renew("k", "one", 0.0)
        store.release("k", "one", 0.0)
        assert store.lease("k", "two", 1, 0.0) is None
        store.close()

    def test_a_server_that_has_lost_its_memory(self, store, server):
        """A limit begins anew, with one more burst."""
        for _ in range(2):
            assert store.reserve("k", "one", (ONE._replace(rate=0.01),), 0.0) is None
            assert store.reserve("k", "two", (ONE._replace(rate=0.01),), 0.0) is not None
            with server.client() as client:
                client.flushall()

    def test_a_server_that_is_frozen(self, server, monkeypatch):
        """A call waits for it for a bounded time, and then goes on as `on_store_error` says; afterwards it works again."""
        monkeypatch.setattr(redis_store, "_ANSWER", 0.2)
        store = RedisStore(server.url)
        layers = {name: _pipeline(store, on_store_error=name) for name in ("local", "open", "raise")}
        server.freeze()
        try:
            assert [layers[name].complete(REQUEST).text for name in ("local", "open")] == ["fine"] * 2
            with pytest.raises(StoreError, match="failed with TimeoutError"):
                layers["raise"].complete(REQUEST)
        finally:
            server.thaw()
        assert eventually(lambda: _works(layers["raise"]), 30)
        store.close()

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_tasks_that_wait_for_a_frozen_server(self, server, monkeypatch, backend):
        """They all fail once the first have found out, and do not wait for one another."""
        monkeypatch.setattr(redis_store, "_ANSWER", 0.5)
        store, asked, failed = RedisStore(server.url), [], []
        opened = store._connections._opened

        def counted(idle):
            asked.append(idle)
            return opened(idle)

        monkeypatch.setattr(store._connections, "_opened", counted)

        async def ask(key):
            with pytest.raises(Exception, match=r"Timeout|did not answer"):
                await store.aload(key, 0.0)
            failed.append(key)

        async def main():
            async with anyio.create_task_group() as tasks:
                for number in range(100):
                    tasks.start_soon(ask, f"{number}")

        store.save("0", b"before", None, 0.0)
        server.freeze()
        try:
            run_async(main, backend)
        finally:
            server.thaw()
        assert len(failed) == 100
        assert len(asked) <= 2 * redis_store._THREADS
        monkeypatch.setattr(redis_store, "_SILENT", 0.0)
        assert store.load("0", 0.0).value == b"before"
        store.close()

    def test_a_server_that_is_paused(self, server, monkeypatch):
        monkeypatch.setattr(redis_store, "_ANSWER", 0.2)
        pipeline = _pipeline(server.url, on_store_error="raise")
        said = []
        while not said:  # a slow machine may ask when the pause is over
            with server.client() as client:
                client.client_pause(600)
            try:
                pipeline.complete(REQUEST)
            except StoreError as error:
                said.append(str(error))
        assert "failed with TimeoutError" in said[0]
        with server.client() as client:
            client.ping()  # after the pause
        assert eventually(lambda: _works(pipeline), 30)

    def test_a_password(self, other, capfd):
        """What is wrong is said, but not the password."""
        with other.client() as client:
            client.config_set("requirepass", "right-secret")
        right = other.url.replace("redis://", "redis://:right-secret@")
        assert RedisStore(right).add("s", 1.0, None, 0.0) == 1
        for url in (other.url, other.url.replace("redis://", "redis://:wrong-secret@")):
            forget_reports()
            layer = RateLimit(requests=10, store=url)
            assert Pipeline(ScriptedProvider("fine"), [layer]).complete(REQUEST).text == "fine"
            with pytest.raises(StoreError) as caught:
                _pipeline(url, on_store_error="raise").complete(REQUEST)
            said = f"{caught.value} {caught.value.__cause__!r} {layer!r} {capfd.readouterr().err}"
            assert "its store RedisStore failed with AuthenticationError; until it works again" in said
            assert "secret" not in said
            layer.store.close()

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_task_that_is_cancelled_while_it_waits(self, store, server, backend):
        """It leaves the queue, and so do those that are cancelled in the midst of a trip."""
        layer = Concurrency(1, store=store, max_wait=60)

        class Provider:
            async def complete(self, request):
                await anyio.sleep(60)

        async def main():
            pipeline = AsyncPipeline(Provider(), [layer])
            async with anyio.create_task_group() as tasks:
                for number in range(12):
                    scope = anyio.CancelScope()

                    async def work(scope=scope):
                        with scope:
                            await pipeline.complete(REQUEST)

                    tasks.start_soon(work)
                    if number % 3 == 0:
                        await anyio.sleep(0.02)
                    else:
                        await anyio.lowlevel.checkpoint()
                    if number:
                        scope.cancel()
                await anyio.sleep(0.05)
                tasks.cancel_scope.cancel()

        run_async(main, backend)
        with server.client() as client:
            assert client.keys("*concurrency*") == []

    def test_a_request_that_times_out_is_not_asked_again(self, store, server):
        """By the client itself, which would charge it twice; and its answer is not taken for that of the next."""
        hasty = RedisStore(f"{server.url}?socket_timeout=0.3")

        def is_connected():
            with suppress(Exception):
                return hasty.load("nothing", 0.0) is None

        assert eventually(is_connected, 30)
        store.add("s", 0.0, None, 0.0)  # so that the server knows the script
        server.freeze()
        try:
            with pytest.raises(Exception, match="Timeout reading"):
                hasty.add("s", 11.0, None, 0.0)
        finally:
            server.thaw()
        assert eventually(lambda: store.add("s", 0.0, None, 0.0) == 11, 30)
        assert eventually(is_connected, 30)
        hasty.close()


class TestSharing:
    """Two stores stand for two processes."""

    @pytest.fixture
    def two(self, url):
        stores = [RedisStore(url), RedisStore(url)]
        yield stores
        for each in stores:
            each.close()

    def test_a_circuit(self, two):
        one, other = (CircuitBreaker(failures=1, store=each) for each in two)
        with pytest.raises(ServerError):
            Pipeline(ScriptedProvider(ServerError("down")), [one]).complete(REQUEST)
        with pytest.raises(CircuitOpen):
            Pipeline(ScriptedProvider("fine"), [other]).complete(REQUEST)

    def test_answers(self, two):
        one, other = (Cache(each, namespace="shared") for each in two)
        Pipeline(ScriptedProvider("kept"), [one]).complete(REQUEST)
        found = Pipeline(ScriptedProvider(), [other]).complete(REQUEST)
        assert (found.text, found.cache_hit) == ("kept", True)

    def test_in_yaml(self, url, tmp_path, monkeypatch):
        """A URL stands for the store of every middleware, with the password from the environment."""
        monkeypatch.setenv("MY_REDIS", url)
        file = tmp_path / "stack.yaml"
        file.write_text(
            """
llm:
  framework: echo
  model: any
  middleware:
    - cache: {store: "${MY_REDIS}", namespace: shared}
    - budget: {tokens: 1000, store: "${MY_REDIS}", on_store_error: raise}
    - circuit_breaker: {store: "${MY_REDIS}", on_store_error: raise}
    - rate_limit: {requests: 1000, tokens: 100000, store: "${MY_REDIS}", on_store_error: raise}
    - concurrency: {limit: 3, store: "${MY_REDIS}", on_store_error: raise}
"""
        )
        for hit in (False, True):
            with LLM.from_yaml(file) as llm:
                assert llm.complete("hello").cache_hit is hit
                stores = [getattr(layer, "store", None) for layer in llm.pipeline.middleware]
            assert [type(each) for each in stores] == [str, *[RedisStore] * 4]

    @pytest.mark.parametrize(
        ("layer", "said"),
        [
            ("rate_limit: {requests: 1, store: 'redis://:secret@h/x'}", "with the number of a database at its end"),
            ("concurrency: {limit: 1, store: 'redis://:secret@h?no_such=1'}", "that redis-py understands"),
            (
                "cache: {namespace: n, max_bytes: 5, store: 'redis://:secret@h'}",
                "middleware[0].cache.max_bytes: expected none with a Redis server, got 5; set `maxmemory` in",
            ),
        ],
    )
    def test_mistakes_in_yaml(self, layer, said, tmp_path):
        file = tmp_path / "stack.yaml"
        file.write_text(f"llm: {{framework: echo, model: any, middleware: [{layer}]}}")
        with pytest.raises(ConfigError) as caught:
            LLM.from_yaml(file)
        assert "llm.middleware[0]." in str(caught.value)
        assert said in str(caught.value)
        assert "secret" not in str(caught.value)


class TestSettings:
    def test_nothing_is_connected_before_the_first_use(self):
        store = RedisStore("redis://no.such.host.invalid:1/0")
        assert isinstance(store, Store)
        assert store.local is False

    def test_copies(self, url):
        """They have the same server, and connections of their own."""
        store = RedisStore(url, lease_seconds=5)
        store.save("k", b"x", None, 0.0)
        for copied in (copy.copy(store), copy.deepcopy(store), pickle.loads(pickle.dumps(store))):  # noqa: S301  # made here
            assert copied._connections._idle == []
            assert copied.lease_seconds == 5
            assert copied.load("k", 0.0).value == b"x"
            copied.close()
        store.close()
        assert store.load("k", 0.0).value == b"x", "it is opened again"
        store.close()

    def test_of_urls(self):
        for url in ("redis://h", "rediss://u:p@h:6380/2", "unix:///run/redis.sock?db=1", "redis://h?socket_timeout=5"):
            assert isinstance(to_store(url), RedisStore)
            assert isinstance(to_store(url, ("add",)), RedisStore)

    def test_tls_is_verified(self):
        made = RedisStore("rediss://h")._connections._make()
        assert made.check_hostname
        assert made.cert_reqs.name == "CERT_REQUIRED"

    def test_a_trip_is_bounded_and_made_once(self):
        made = RedisStore("redis://h")._connections._make()
        assert (made.socket_connect_timeout, made.socket_timeout) == (0.5, 1.0)
        assert made.retry.get_retries() == 0

    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("redis://h:6379/0", "redis://h:6379/0"),
            ("redis://:secret@h:1/0?db=1&password=secret", "redis://***@h:1/0?db=1&password=***"),
            ("redis://secret@h", "redis://***@h"),
            ("redis://:sec/ret@h", "redis://***@h"),
            ("redis://:sec?ret@h", "redis:…"),
            ("redis://h?password=sec@ret", "redis:…"),
            ("redis://:sec#ret@h", "redis:…"),
            ("redis://:secret", "redis:…"),
            ("redis://[::1]:6379/0", "redis://[::1]:6379/0"),
            ("unix:///run/a.sock?password=secret", "unix:///run/a.sock?password=***"),
            ("redis:secret", "redis:…"),
            ("secret", "…"),
        ],
    )
    def test_a_password_is_never_shown(self, url, shown):
        assert masked_url(url) == shown

    def test_reprs(self):
        url = "redis://user:secret@h:1/0"
        assert repr(RedisStore(url)) == "RedisStore('redis://***@h:1/0')"
        assert repr(RedisStore(url, lease_seconds=5)) == "RedisStore('redis://***@h:1/0', lease_seconds=5)"
        layers = [RateLimit(requests=1, store=url), Cache(url, namespace="n"), Budget(tokens=1, store=url)]
        config = LLMConfig(framework="echo", model="m", middleware=[{"rate_limit": {"requests": 1, "store": url}}])
        assert "secret" not in repr([*layers, config])

    @pytest.mark.parametrize(
        ("url", "said"),
        [
            (3, "expected a URL such as 'redis://localhost:6379/0', got an int"),
            ("http://secret@h", "rediss://… or unix://…, got 'http://***@h'"),
            ("redis://:secret@h:port/0", "expected a URL that redis-py understands, got 'redis:…'"),
            ("redis://:secret@h/name", "with the number of a database at its end, got 'redis://***@h/name'"),
            ("redis://:secret@h?db=x", "got 'redis://***@h?db=x'"),
            ("redis://:se/secret@h:1/0", "got 'redis://***@h:1/0' with '/' or '#' in its password; percent-encode it"),
            ("redis://:se#secret@h:1/0", "with '/' or '#' in its password; percent-encode it"),
            ("redis://:secret@h?sockt_timeout=1", "got 'redis://***@h?sockt_timeout=1' (unknown option)"),
            ("redis://[::1", "got 'redis:…'"),
            ("unix://", "expected the path of a socket after 'unix://'; write 'unix:///run/redis.sock'"),
            ("rediss://h?ssl_cert_reqs=maybe", "got 'rediss://h?ssl_cert_reqs=maybe'"),
        ],
    )
    def test_urls_that_are_none(self, url, said):
        with pytest.raises(ConfigError) as caught:
            RedisStore(url)
        assert str(caught.value).startswith("RedisStore: expected ")
        assert said in str(caught.value)
        assert "secret" not in str(caught.value)
        assert caught.value.__cause__ is None

    @pytest.mark.parametrize("seconds", [0, 0.5, 1e9, math.nan, True, "3"])
    def test_leases_that_are_none(self, seconds):
        with pytest.raises(
            ConfigError, match="RedisStore: lease_seconds: expected a number of seconds from 1 to 86400"
        ):
            RedisStore("redis://h", lease_seconds=seconds)

    def test_without_the_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "redis", None)
        with pytest.raises(ConfigError, match="RedisStore needs redis, which is not installed: pip install redis"):
            RateLimit(requests=1, store="redis://h")

    def test_the_package_is_loaded_late(self):
        """A program without such a store does not import it."""
        script = "import sys, fluxibly.middleware.rate_limit; assert 'redis' not in sys.modules"
        assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
