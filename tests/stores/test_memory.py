"""`MemoryStore`: the laws of stores, its signals, and its bounds."""

from __future__ import annotations

import math
import threading

import pytest
from hypothesis import example, given, settings, strategies as st
from support.stores import StoreLaws

from fluxibly.errors import ConfigError
from fluxibly.stores import Limit, MemoryStore, to_store


class TestLaws(StoreLaws):
    def make(self):
        return MemoryStore()


def limit(cost=1.0, rate=1.0, burst=1.0, name="requests"):
    return Limit(name, rate, burst, cost)


class TestSignals:
    def test_of_a_place(self):
        """A release wakes the first, and nobody else."""
        store = MemoryStore()
        store.lease("k", "one", 1, 0.0)
        turns = [store.lease("k", who, 1, 0.0) for who in ("two", "three")]
        store.release("k", "one", 0.0)
        assert [turn.signal.is_set for turn in turns] == [True, False]

    def test_of_several_places(self):
        """Two that are free are both taken: who takes the first wakes the next."""
        store = MemoryStore()
        for who in ("one", "two"):
            store.lease("k", who, 2, 0.0)
        turns = [store.lease("k", who, 2, 0.0) for who in ("three", "four")]
        store.release("k", "one", 0.0)
        store.release("k", "two", 0.0)
        assert [turn.signal.is_set for turn in turns] == [True, False]
        assert store.lease("k", "three", 2, 0.0) is None
        assert turns[1].signal.is_set

    def test_of_a_rate(self):
        """Who goes or leaves wakes the next, and so do a correction and a pause."""
        store = MemoryStore()
        store.reserve("k", "one", (limit(),), 0.0)
        turns = {who: store.reserve("k", who, (limit(),), 0.0) for who in ("two", "three", "four")}
        store.release("k", "two", 0.0)
        assert [turn.signal.is_set for turn in turns.values()] == [False, True, False]
        store.reserve("k", "three", (limit(),), 1.0)
        assert turns["four"].signal.is_set
        again = store.reserve("k", "four", (limit(),), 1.0)
        store.correct("k", limit(cost=-0.5), 1.0)
        assert again.signal.is_set
        again = store.reserve("k", "four", (limit(),), 1.0)
        store.throttle("k", "requests", 0.0, 5.0, 1.0)
        assert again.signal.is_set
        assert store.reserve("k", "four", (limit(),), 1.0).seconds == 5

    def test_a_later_question_has_a_signal_of_its_own(self):
        store = MemoryStore()
        store.lease("k", "one", 1, 0.0)
        first = store.lease("k", "two", 1, 0.0)
        second = store.lease("k", "two", 1, 0.0)
        store.release("k", "one", 0.0)
        assert (first.signal.is_set, second.signal.is_set) == (False, True)


class TestEstimates:
    @given(st.lists(st.sampled_from([1.0, 2.0, 5.0]), min_size=1, max_size=8), st.sampled_from([0.0, 3.0]))
    @settings(max_examples=60, deadline=None)
    def test_are_what_comes_true(self, costs, pause):
        """Without corrections, each call goes exactly when it was told at first."""
        store = MemoryStore()
        if pause:
            store.throttle("k", "requests", 0.0, pause, 0.0)
        told = {}
        for number, cost in enumerate(costs):
            turn = store.reserve("k", f"{number}", (limit(cost, burst=5.0),), 0.0)
            told[f"{number}"] = 0.0 if turn is None else turn.seconds
        assert [*told.values()] == sorted(told.values())
        for who, seconds in told.items():
            if not seconds:
                continue
            if seconds > 1e-6:
                assert store.reserve("k", who, (limit(costs[int(who)], burst=5.0),), seconds - 1e-6) is not None
            assert store.reserve("k", who, (limit(costs[int(who)], burst=5.0),), seconds) is None

    def test_count_the_end_of_a_lower_rate(self):
        """A rate that is lowered for a second does not let a call wait for a minute."""
        store = MemoryStore()
        store.reserve("k", "one", (limit(),), 0.0)
        store.throttle("k", "requests", 0.01, 1.0, 0.0)
        assert store.reserve("k", "two", (limit(),), 0.0).seconds == pytest.approx(1.99)
        assert store.reserve("k", "two", (limit(),), 1.98) is not None
        assert store.reserve("k", "two", (limit(),), 1.99) is None


class TestChangesOfARate:
    @given(
        st.lists(
            st.one_of(
                st.tuples(st.just("ask"), st.floats(0.1, 5)),
                st.tuples(st.just("pass"), st.floats(0.01, 20)),
                st.tuples(st.just("slow"), st.floats(0.01, 3), st.floats(0.1, 30)),
                st.tuples(st.just("give"), st.floats(0.0, 5)),
            ),
            max_size=60,
        )
    )
    @example([*[("ask", 1.0)] * 3, ("slow", 0.5, 1.0), ("pass", 1.0), ("give", 0.0), ("ask", 1.0)])
    @settings(max_examples=200, deadline=None)
    def test_never_free_what_was_taken(self, steps):
        """However a rate changes, no window has more than its rate and one burst; a plain bucket agrees about each."""
        store, now, burst = MemoryStore(), 0.0, 5.0
        level, ceiling, until = 0.0, math.inf, 0.0  # the plain bucket
        count = 0

        def drained(seconds):
            slow = max(0.0, min(seconds, until - now))
            return slow * min(1.0, ceiling) + (seconds - slow)

        for step in steps:
            if step[0] == "ask":
                count += 1
                turn = store.reserve("k", f"{count}", (limit(step[1], burst=burst),), now)
                share = min(1.0, ceiling) if now < until else 1.0
                room = max(burst * share, min(step[1], burst)) - level - step[1]
                if abs(room) > 1e-6:
                    assert (turn is None) == (room > 0)
                if turn is None:
                    level += step[1]
                else:
                    store.release("k", f"{count}", now)
            elif step[0] == "pass":
                level = max(0.0, level - drained(step[1]))
                now += step[1]
            elif step[0] == "slow":
                store.throttle("k", "requests", step[1], step[2], now)
                ceiling, until = step[1], now + step[2]
            else:
                store.correct("k", limit(-step[1]), now)
                level = max(0.0, level - step[1])


class TestBounds:
    def test_of_memory(self):
        """100,000 keys of each kind that nothing depends on any more are forgotten; those in use are kept."""
        store = MemoryStore()
        store.lease("held", "one", 1, 0.0)
        store.add("good", 1.0, None, 0.0)
        store.save("good", b"value", None, 0.0)
        for number in range(100_000):
            now, key = float(number), f"{number}"
            store.reserve(key, "one", (limit(),), now)
            store.lease(key, "one", 1, now)
            store.release(key, "one", now)
            store.add(key, 1.0, 10.0, now)
            store.save(key, b"x", 10.0, now)
        kept = [len(kind) for kind in (store._rates, store._places, store._sums, store._values)]
        assert sum(kept) < 5000
        assert store.renew("held", "one", 1e9)
        assert store.add("good", 0.0, None, 1e9) == 1
        assert store.load("good", 1e9).value == b"value"

    def test_of_a_sum(self):
        """A sum over a time has at most a thousand parts, or so, and stays right."""
        store = MemoryStore()
        for number in range(50_000):
            total = store.add("s", 1.0, 10.0, number / 1000)
        assert total == pytest.approx(10_000, rel=0.002)
        assert len(store._sums["s"].parts) <= 1001

    def test_a_sum_that_is_over_is_exactly_nothing(self):
        """Rounding errors do not add up."""
        store = MemoryStore()
        for number in range(1000):
            store.add("s", 0.1, 1.0, number * 0.01)
        assert store.add("s", 0.0, 1.0, 100.0) == 0


class TestThreads:
    def test_a_queue_of_threads(self):
        """50 threads wait for a rate, by their signals alone, and none is forgotten."""
        store, done = MemoryStore(), []
        store.throttle("k", "requests", 0.0, 1000.0, 0.0)

        def work(number):
            turn = store.reserve("k", f"{number}", (limit(burst=1000.0),), 0.0)
            while turn is not None:
                assert turn.signal.wait(30)
                turn = store.reserve("k", f"{number}", (limit(burst=1000.0),), 2000.0)
            done.append(number)

        threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(50)]
        for thread in threads:
            thread.start()
        while len(store._rates["k"].waiting) < 50:
            pass
        store.correct("k", limit(cost=-1.0), 2000.0)
        for thread in threads:
            thread.join(30)
        assert sorted(done) == [*range(50)]


class TestUrls:
    def test_of_memory(self):
        """Each is a store of its own."""
        assert isinstance(to_store("memory"), MemoryStore)
        assert to_store(None) is not to_store(None)
        store = MemoryStore()
        assert to_store(store) is store
        assert repr(store) == "MemoryStore()"

    @pytest.mark.parametrize(
        ("value", "got"),
        [
            ("memori", "'memori'"),
            ("mongo://:password@host", "'mongo:…'"),
            (MemoryStore, "the class MemoryStore; write MemoryStore()"),
            (3, "an int without reserve, correct, throttle, lease"),
        ],
    )
    def test_that_are_none(self, value, got):
        """The error says what it takes, without a password."""
        kinds = "'memory', 'sqlite:PATH', 'redis://HOST' or an object with the methods of fluxibly.stores.Store"
        with pytest.raises(ConfigError) as caught:
            to_store(value)
        assert str(caught.value).startswith(f"store: expected {kinds}, got {got}")
        assert "password" not in str(caught.value)
