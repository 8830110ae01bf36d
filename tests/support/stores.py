"""The laws of every store, as a class of tests; and stores that do I/O, to try middleware with."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from fluxibly.stores import Limit, MemoryStore, Store
from fluxibly.testing.modes import run_async

METHODS = ("reserve", "correct", "throttle", "lease", "renew", "release", "add", "load", "save")


class SlowStore:
    """A store that does I/O, which awaits or sleeps before and after it is done, and fails when it is told to."""

    local = False

    def __init__(self, seconds: float = 0.0) -> None:
        self.inner = MemoryStore()
        self.seconds = seconds
        self.fails: Callable[[str], BaseException | None] = lambda _: None
        """Returns the error for a method, or None."""
        self.asked: list[str] = []

    def _ask(self, method: str, *args: Any, **options: Any) -> Any:
        self.asked.append(method)
        if (error := self.fails(method)) is not None:
            raise error
        result = getattr(self.inner, method)(*args, **options)
        # As a server's, which cannot set a signal.
        return result._replace(signal=None) if hasattr(result, "signal") else result

    def __getattr__(self, name: str) -> Any:
        method = name[1:] if name[1:] in METHODS else name
        if method not in METHODS:
            raise AttributeError(name)

        def do(*args: Any, **options: Any) -> Any:
            time.sleep(self.seconds)
            result = self._ask(method, *args, **options)
            time.sleep(self.seconds)
            return result

        async def ado(*args: Any, **options: Any) -> Any:
            await anyio.sleep(self.seconds)
            result = self._ask(method, *args, **options)
            await anyio.sleep(self.seconds)
            return result

        return do if method == name else ado

    def held(self, key: str) -> list[str]:
        """Return who holds a place under a key."""
        places = self.inner._places.get(key)
        return [] if places is None else [*places.held]

    def queued(self) -> list[str]:
        """Return who waits for anything."""
        kinds = (self.inner._places, self.inner._rates)
        return [who for kind in kinds for state in kind.values() for who in state.waiting]


class Laws:
    """Inherit these tests in a class that has `make`, and `pass_time` where its time is not a variable.

    `tick` is the unit of time in seconds: a store with a clock of its own takes one that its precision allows.
    """

    tick = 1.0
    slack = 1e-6
    """How imprecise its times may be, in ticks."""

    def make(self) -> Store:
        raise NotImplementedError

    def pass_time(self, ticks: float) -> None:
        self.time += ticks * self.tick

    @pytest.fixture(params=["sync", "asyncio", "trio"], autouse=True)
    def _begin(self, request: pytest.FixtureRequest) -> None:
        self.way = request.param
        self.folder = request.getfixturevalue("tmp_path")
        self.time = 100.0
        self.store = self.make()

    def do(self, method: str, *args: Any, **options: Any) -> Any:
        if self.way == "sync":
            return getattr(self.store, method)(*args, self.time, **options)

        async def ado() -> Any:
            return await getattr(self.store, f"a{method}")(*args, self.time, **options)

        return run_async(ado, self.way)

    def near(self, expected: float) -> Any:
        return pytest.approx(expected, abs=max(self.slack, 1e-6))


class ValueLaws(Laws):
    """The laws of `load` and `save`."""

    def test_values(self):
        """A value is kept for its time, and replaced as a whole."""
        assert self.do("load", "v") is None
        self.do("save", "v", b"\x00one", 10 * self.tick)
        entry = self.do("load", "v")
        assert (entry.value, entry.left / self.tick) == (b"\x00one", self.near(10))
        self.do("save", "v", b"two", None)
        assert (self.do("load", "v").value, self.do("load", "v").left) == (b"two", math.inf)
        self.do("save", "v", b"three", 2 * self.tick)
        self.pass_time(2.5)
        assert self.do("load", "v") is None
        self.do("save", "v", b"four", None)
        self.do("save", "v", None, None)
        assert self.do("load", "v") is None

    def test_values_of_any_bytes(self):
        """They come back as they were, the empty one too, under any key."""
        for number, value in enumerate((b"", b"\x00\xff\n", bytes(range(256)) * 1000)):
            key = f"{number} \u2603 'x'; --"
            self.do("save", key, value, None)
            assert self.do("load", key).value == value

    def test_values_of_many_threads(self):
        """Each reads whole values, and the last one saved stays."""
        wrong: list[bytes] = []

        def work(number: int) -> None:
            for turn in range(20):
                self.store.save("t", bytes([number]) * 3000, None, self.time)
                found = self.store.load("t", self.time)
                if found is None or len(found.value) != 3000 or len(set(found.value)) != 1:
                    wrong.append(b"" if found is None else found.value)
                self.store.save(f"{number} {turn}", b"own", None, self.time)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not wrong
        assert all(self.do("load", f"{n} {turn}").value == b"own" for n in range(8) for turn in range(20))


class SumLaws(Laws):
    """The laws of `add`."""

    def test_sums(self):
        """A sum forgets what is old, and refuses what would be too much."""
        assert self.do("add", "s", 2.0, 10 * self.tick) == 2
        self.pass_time(6)
        assert self.do("add", "s", 3.0, 10 * self.tick) == 5
        assert self.do("add", "s", 3.0, 10 * self.tick, most=7.0) is None
        assert self.do("add", "s", 2.0, 10 * self.tick, most=7.0) == 7
        self.pass_time(5)
        assert self.do("add", "s", 0.0, 10 * self.tick) == 5
        self.pass_time(20)
        assert self.do("add", "s", 0.0, 10 * self.tick) == 0

    def test_sums_for_good(self):
        for total in (1, 2, 3):
            assert self.do("add", "g", 1.0, None) == total
            self.pass_time(5)
        self.do("save", "g", None, None)
        assert self.do("add", "g", 1.0, None) == 1

    def test_sums_are_taken_back(self):
        """What is taken off comes from what was added first, and the sum does not fall below 0."""
        self.do("add", "b", 5.0, 10 * self.tick)
        self.pass_time(6)
        self.do("add", "b", 3.0, 10 * self.tick)
        assert self.do("add", "b", -2.0, 10 * self.tick, most=0.0) == 6
        self.pass_time(5)
        assert self.do("add", "b", 0.0, 10 * self.tick) == 3, "what was left of the first is over"
        assert self.do("add", "b", -4.0, 10 * self.tick) == 0
        assert self.do("add", "b", -4.0, None) == 0

    def test_whole_amounts_are_kept_exactly(self):
        """Nano-dollars of a large budget add up to the last one."""
        for per in (None, 1000 * self.tick):
            for number in range(5):
                total = self.do("add", f"whole {per}", 10**12 + 1, per)
                assert total == (number + 1) * (10**12 + 1)
            assert self.do("add", f"whole {per}", -(10**12 + 1), per) == 4 * (10**12 + 1)

    def test_sums_are_apart(self):
        for key in ("one", "two"):
            assert self.do("add", key, 1.0, None) == 1
            assert self.do("add", f"{key} in time", 1.0, 5 * self.tick) == 1

    def test_sums_of_many_threads(self):
        """No addition is lost, and no thread gets past `most`."""
        sums: list[float | None] = []

        def work() -> None:
            sums.extend(self.store.add("m", 1.0, 1000 * self.tick, self.time, most=50.0) for _ in range(10))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted([each for each in sums if each is not None]) == [*range(1, 51)]
        assert sums.count(None) == 30


class StoreLaws(ValueLaws, SumLaws):
    """The laws of a store that has all methods.

    Inherit these tests in a class that has `make`, and `pass_time` where its time is not a variable.
    """

    def reserve(self, who: str, *limits: Limit, key: str = "k") -> float | None:
        """Return the wait in ticks, or None."""
        turn = self.do("reserve", key, who, limits)
        return None if turn is None else turn.seconds / self.tick

    def limit(self, cost: float = 1, burst: float = 1, name: str = "requests", rate: float = 1) -> Limit:
        return Limit(name, rate / self.tick, burst, cost)

    def test_it_is_a_store(self):
        assert isinstance(self.store, Store)
        assert isinstance(self.store.local, bool)

    def test_a_rate(self):
        """A burst at once, then one after the other, and never more after a long pause."""
        for pause in (0, 100):
            self.pass_time(pause)
            for number in range(3):
                assert self.reserve(f"{pause} {number}", self.limit(burst=3)) is None
            assert self.reserve(f"{pause} late", self.limit(burst=3)) == self.near(1)
            self.pass_time(0.5)
            assert self.reserve(f"{pause} late", self.limit(burst=3)) == self.near(0.5)
            self.pass_time(0.6)
            assert self.reserve(f"{pause} late", self.limit(burst=3)) is None

    def test_all_limits_or_nothing(self):
        """What one limit refuses takes nothing of another."""
        tokens = self.limit(cost=10, burst=10, name="tokens")
        assert self.reserve("one", self.limit(burst=5), tokens) is None
        assert self.reserve("two", self.limit(burst=5), tokens) == self.near(10)
        self.do("release", "k", "two")
        for number in range(4):
            assert self.reserve(f"{number}", self.limit(burst=5)) is None
        assert self.reserve("six", self.limit(burst=5)) is not None

    def test_first_come_first_served(self):
        """A small call does not overtake a large one, and the estimate counts those ahead."""
        assert self.reserve("one", self.limit(burst=5, cost=5)) is None
        assert self.reserve("large", self.limit(burst=5, cost=5)) == self.near(5)
        assert self.reserve("small", self.limit(burst=5)) == self.near(6)
        self.pass_time(1.5)
        assert self.reserve("small", self.limit(burst=5)) == self.near(4.5)
        assert self.do("reserve", "k", "small", (self.limit(burst=5),)).ahead == 1
        self.do("release", "k", "large")
        assert self.reserve("small", self.limit(burst=5)) is None

    def test_a_call_that_waits_for_something_else(self):
        """What it wants when it asks again counts, for those behind it and when it has left."""
        tokens = self.limit(cost=10, burst=10, name="tokens")
        assert self.reserve("one", self.limit()) is None
        assert self.reserve("two", self.limit()) == self.near(1)
        assert self.reserve("two", self.limit(), tokens) == self.near(1)
        assert self.reserve("three", tokens) == self.near(10)
        self.do("release", "k", "two")
        assert self.reserve("three", tokens) is None
        assert self.reserve("four", tokens) == self.near(10)

    def test_keys_are_apart(self):
        assert self.reserve("one", self.limit()) is None
        assert self.reserve("two", self.limit()) is not None
        assert self.reserve("two", self.limit(), key="other") is None

    def test_corrections(self):
        """What was not used is there again at once, but never more than the burst; what was used on top is missing."""
        tokens = self.limit(cost=10, burst=10, name="tokens")
        assert self.reserve("one", tokens) is None
        self.do("correct", "k", tokens._replace(cost=-7))
        assert self.reserve("two", tokens) == self.near(3)
        self.do("correct", "k", tokens._replace(cost=-100))
        assert self.reserve("two", tokens) is None
        self.do("correct", "k", tokens._replace(cost=5))
        assert self.reserve("three", tokens) == self.near(15)

    def test_a_pause(self):
        """Nothing passes for a while, whatever the limit allows."""
        self.do("throttle", "k", "requests", 0.0, 5 * self.tick)
        assert self.reserve("one", self.limit(burst=9)) == self.near(5)
        self.do("throttle", "k", "requests", 0.0, 2 * self.tick)  # a shorter one changes nothing
        assert self.reserve("one", self.limit(burst=9)) == self.near(5)
        self.pass_time(5.5)
        assert self.reserve("one", self.limit(burst=9)) is None

    def test_a_lower_rate(self):
        """It holds for its time, and frees nothing that was taken before."""
        for number in range(3):
            assert self.reserve(f"{number}", self.limit(burst=3)) is None
        self.do("throttle", "k", "requests", 0.25 / self.tick, 100 * self.tick)
        assert self.reserve("late", self.limit(burst=3)) == self.near(12), "the burst is smaller, too"
        self.do("throttle", "k", "requests", 0.25 / self.tick, 4 * self.tick)
        assert self.reserve("late", self.limit(burst=3)) == self.near(4)
        self.do("release", "k", "late")
        self.do("throttle", "k", "requests", 99 / self.tick, 10 * self.tick)  # a higher one is none
        assert self.reserve("late", self.limit(burst=3)) == self.near(1)

    def test_places(self):
        """They are given in turn, and given back once."""
        assert self.do("lease", "k", "one", 2) is None
        assert self.do("lease", "k", "one", 2) is None, "it has its place already"
        assert self.do("lease", "k", "two", 2) is None
        assert [self.do("lease", "k", who, 2).ahead for who in ("three", "four", "five")] == [0, 1, 2]
        self.do("release", "k", "four")
        assert self.do("lease", "k", "five", 2).ahead == 1
        self.do("release", "k", "one")
        self.do("release", "k", "one")
        assert self.do("lease", "k", "five", 2) is not None, "three is first"
        assert self.do("lease", "k", "three", 2) is None
        assert self.do("lease", "k", "five", 2).ahead == 0
        assert self.do("renew", "k", "three")
        assert not self.do("renew", "k", "one")
        assert not self.do("renew", "other", "one")

    def test_places_without_a_queue(self):
        """Who does not wait is in nobody's way."""
        assert self.do("lease", "k", "one", 1) is None
        assert self.do("lease", "k", "two", 1, wait=False) is not None
        self.do("release", "k", "one")
        assert self.do("lease", "k", "three", 1) is None

    def test_a_release_of_nothing(self):
        self.do("release", "nowhere", "nobody")

    def test_many_threads(self):
        """No place is given twice, nor lost; no addition is lost."""
        held, most, sums = [0], [0], []
        lock = threading.Lock()

        def work(number: int) -> None:
            for turn in range(10):
                who = f"{number}-{turn}"
                while self.store.lease("t", who, 3, self.time) is not None:
                    time.sleep(0.0005)
                with lock:
                    held[0] += 1
                    most[0] = max(most[0], held[0])
                sums.append(self.store.add("n", 1.0, None, self.time))
                with lock:
                    held[0] -= 1
                self.store.release("t", who, self.time)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert most[0] <= 3
        assert sorted(sums) == [*range(1, 161)]
        assert self.store.lease("t", "last", 1, self.time) is None
