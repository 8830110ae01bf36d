"""What middleware do with a store that does I/O, and that fails: nothing is lost, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import random
import threading
import time

import anyio
import pytest
from hypothesis import given, settings, strategies as st
from support.calling import REQUEST, call
from support.simulation import Reply, Simulation
from support.stores import METHODS, SlowStore

from fluxibly import race
from fluxibly._logs import forget_reports
from fluxibly.errors import CircuitOpen, QueueFull, RateLimitWait, ServerError, StoreError, StreamInterrupted
from fluxibly.middleware.budget import Budget
from fluxibly.middleware.cache import Cache
from fluxibly.middleware.circuit_breaker import CircuitBreaker
from fluxibly.middleware.concurrency import Concurrency
from fluxibly.middleware.rate_limit import RateLimit
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.stores import Turn
from fluxibly.testing import ScriptedProvider, VirtualClock
from fluxibly.testing.modes import BACKENDS, run_async
from fluxibly.types import Request

KEY = "concurrency scripted/m-1"
DOWN = ConnectionError("no store")


@pytest.fixture(autouse=True)
def _afresh():
    forget_reports()


def failing(*methods):
    return lambda method: DOWN if not methods or method in methods else None


def layers(store, on_store_error="local"):
    return [
        Concurrency(1, store=store, on_store_error=on_store_error),
        RateLimit(requests=1e6, tokens=1e9, store=store, on_store_error=on_store_error),
        CircuitBreaker(failures=1, store=store, on_store_error=on_store_error),
    ]


class TestEnds:
    @pytest.mark.parametrize(
        "answer",
        ["fine", ServerError("down"), ["a ", ServerError("cut")], KeyboardInterrupt(), asyncio.CancelledError()],
        ids=["answer", "error", "cut", "interrupt", "cancellation"],
    )
    def test_give_the_place_back(self, mode, answer):
        """However a call ends, its cleanup has told the store."""
        store = SlowStore()
        call(mode, layers(store), answer)
        for _ in range(400):  # after Ctrl-C nobody waits for the cleanup
            if "release" in store.asked:
                break
            time.sleep(0.005)
        assert (store.held(KEY), store.queued()) == ([], [])
        assert store.asked.count("lease") == 1

    def test_of_a_stream_that_is_left(self, mode):
        if mode.streaming:
            store = SlowStore()
            call(mode, layers(store), "a b c", stop_after=1)
            call(mode, layers(store), "a b c", stop_after=0)
            assert (store.held(KEY), store.queued()) == ([], [])

    def test_of_a_refusal(self, mode):
        store = SlowStore()
        store.inner.lease(KEY, "another", 1, 0.0)
        made = call(mode, Concurrency(1, max_wait=3, store=store), "fine")
        assert isinstance(made.ran.error, QueueFull)
        assert (store.held(KEY), store.queued()) == (["another"], [])
        store.inner.reserve("rate scripted/m-1", "another", (), 0.0)
        layer = RateLimit(requests=1, per=10, max_wait=3, store=store)
        call(mode, layer, "one")
        assert isinstance(call(mode, layer, "two").ran.error, RateLimitWait)
        assert store.queued() == []

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_of_tasks_that_are_cancelled(self, backend):
        """In the middle of whatever they do: 60 tasks, a third of which is cancelled, in real time."""
        store = SlowStore(0.0005)
        layer = Concurrency(3, store=store, max_wait=30)
        chance = random.Random(7)  # noqa: S311  # the same calls in each run
        done = []

        class Provider:
            async def complete(self, request):
                await anyio.sleep(0.001)
                assert len(store.inner._places["concurrency Provider/m-1"].held) <= 3
                return "fine"

        async def main():
            pipeline = AsyncPipeline(Provider(), [layer])

            async def work(number):
                with anyio.move_on_after(chance.uniform(0, 0.08) if number % 3 == 0 else 60):
                    await pipeline.complete(REQUEST)
                    done.append(number)

            with anyio.fail_after(60):
                async with anyio.create_task_group() as tasks:
                    for number in range(60):
                        tasks.start_soon(work, number)

        run_async(main, backend)
        assert len(done) >= 40
        assert (store.held("concurrency Provider/m-1"), store.queued()) == ([], [])

    def test_of_threads(self):
        """100 threads over a store that takes its time."""
        store = SlowStore(0.0001)
        layer = Concurrency(10, store=store)
        done = []

        class Provider:
            def complete(self, request):
                assert len(store.inner._places["concurrency Provider/m-1"].held) <= 10
                return "fine"

        pipeline = Pipeline(Provider(), [layer])

        def work():
            done.append(pipeline.complete(REQUEST).text)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert done == ["fine"] * 100
        assert (store.held("concurrency Provider/m-1"), store.queued()) == ([], [])

    def test_of_losers(self):
        """A branch that is given up has cleanups of its own."""
        store = SlowStore()
        layer = Concurrency(2, store=store)

        def hedge(request, call_next):
            return (yield from race(call_next, [request, request], delay=0.01))

        answers = iter([0.3, 0.0])

        class Provider:
            def complete(self, request):
                time.sleep(next(answers))
                return "fine"

        assert Pipeline(Provider(), [hedge, layer]).complete(REQUEST).text == "fine"
        assert (store.held("concurrency Provider/m-1"), store.queued()) == ([], [])


class TestFailures:
    def test_local(self, mode, capfd):
        """The limit goes on in this process, which is said once."""
        store = SlowStore()
        store.fails = failing()
        for _ in range(3):
            assert call(mode, layers(store), "fine").response.text == "fine"
        # The leases that another test has left behind may be reported meanwhile.
        said = [line for line in capfd.readouterr().err.splitlines() if "could not be renewed" not in line]
        assert said == [
            f"fluxibly: {name}: its store SlowStore failed with ConnectionError; until it works again, {name} keeps its "
            "state in this process"
            for name in ("Concurrency", "RateLimit", "CircuitBreaker")
        ]

    def test_a_store_that_fails_late(self):
        """The pause begins when it has failed, not when it was asked."""
        clock = VirtualClock()
        store = SlowStore()

        def fails(_):
            clock.advance(5)  # as a file that another process has locked
            return DOWN

        store.fails = fails
        pipeline = Pipeline(ScriptedProvider("one", "two"), [RateLimit(requests=100, store=store)], clock=clock)
        assert [pipeline.complete(REQUEST).text for _ in range(2)] == ["one", "two"]
        assert store.asked == ["reserve"]

    def test_local_limits(self):
        """Also while the store is down there is never more than the limit."""
        store = SlowStore()
        store.fails = failing()
        simulation = Simulation(Concurrency(2, store=store))
        at_work = []
        simulation.checks.append(lambda: at_work.append(len(simulation.at_work)))
        for _ in range(6):
            simulation.call()
        simulation.run()
        assert [made.sent_at[0] for made in simulation.calls] == [0, 0, 1, 1, 2, 2]
        assert max(at_work) == 2

    def test_open(self, mode, capfd):
        """Calls pass as if there were no limit."""
        store = SlowStore()
        store.inner.lease(KEY, "another", 1, 0.0)
        store.fails = failing()
        for _ in range(2):
            assert call(mode, layers(store, "open"), "fine").response.text == "fine"
        assert "until it works again, Concurrency lets calls pass" in capfd.readouterr().err

    @pytest.mark.parametrize(
        ("method", "name"), [("lease", "Concurrency"), ("reserve", "RateLimit"), ("load", "CircuitBreaker")]
    )
    def test_raise(self, mode, method, name):
        """Before anything is sent."""
        store = SlowStore()
        store.fails = failing(method)
        made = call(mode, layers(store, "raise"), "fine")
        assert isinstance(made.ran.error, StoreError)
        assert str(made.ran.error) == f"{name}: its store SlowStore failed with ConnectionError; see __cause__"
        assert made.ran.error.__cause__ is DOWN
        assert not made.provider.requests
        assert (store.held(KEY), store.queued()) == ([], [])

    @pytest.mark.parametrize("answer", ["fine", ServerError("down"), ["a ", ServerError("cut")]], ids=str)
    def test_raise_after_the_answer(self, mode, answer, capfd):
        """What a call gives back does not change what it has got; it is told when the store works again."""
        store = SlowStore()
        store.fails = failing("release", "correct", "add", "save", "throttle")
        stack = layers(store, "raise")
        made = call(mode, stack, answer)
        if answer == "fine":
            assert made.response.text == "fine"
        else:
            cut = mode.streaming and isinstance(answer, list)
            assert isinstance(made.ran.error, StreamInterrupted if cut else ServerError)
        assert "what the call returns does not change" in capfd.readouterr().err
        store.fails = failing("nothing")
        call(mode, stack, "fine")
        assert store.held(KEY) == []

    def test_when_it_is_tried_again(self):
        """After 1, 2, 4, … 30 seconds, by one call; the others do not wait for it."""
        store = SlowStore()
        store.fails = failing()
        simulation = Simulation(Concurrency(100, store=store), Reply(0))
        tried = []
        for tick in range(800):
            simulation.run(tick / 4)
            for _ in range(3):
                before = len(store.asked)
                simulation.call()
                tried += [tick / 4] * (len(store.asked) > before)
        simulation.run()
        # A call asks for its place, and tells its end, at the same time.
        assert tried == [0, 1, 3, 7, 15, 31, 61, 91, 121, 151, 181]
        store.fails = failing("nothing")
        simulation.run(215)
        store.asked.clear()
        for _ in range(3):
            simulation.call()
        simulation.run()
        assert store.asked.count("lease") == 3

    def test_a_blip_with_many_calls(self):
        """That 50 calls fail at once makes the pause no longer than if one did."""
        store = SlowStore()
        layer = RateLimit(requests=1e6, store=store, block=0)
        pipeline = Pipeline(type("P", (), {"complete": lambda self, request: "fine"})(), [layer])
        gate = threading.Barrier(50)

        def fails(method):
            if method == "reserve":
                gate.wait(10)
            return DOWN

        store.fails = fails
        threads = [threading.Thread(target=pipeline.complete, args=(REQUEST,), daemon=True) for _ in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert layer._shared._pause == 1

    @given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.3, 1.0, 5.0, 40.0])), max_size=8), st.integers(0, 99))
    @settings(max_examples=10, deadline=None)
    def test_no_place_is_lost(self, phases, seed):
        """A store that comes and goes while calls run, fail, are cancelled and left: at the end, nobody holds a place."""
        chance = random.Random(seed)  # noqa: S311  # the same calls in each run
        store = SlowStore()
        layer = Concurrency(2, store=store, max_wait=100)
        simulation = Simulation(layer)
        for works, seconds in phases:
            store.fails = failing("nothing") if works else failing()
            for _ in range(4):
                reply = Reply(
                    chance.choice([0.1, 2.0, 20.0]), chance.choice(["fine", ServerError("down")]), gap=chance.random()
                )
                made = simulation.call(reply=reply, streaming=chance.random() < 0.5)
                if chance.random() < 0.3:
                    stop = chance.choice([made.close, made.cancel])
                    simulation.at(simulation.now + chance.expovariate(0.3), lambda m=made, s=stop: m.is_over or s())
            simulation.run(simulation.now + seconds)
        simulation.run()
        store.fails = failing("nothing")
        simulation.run(simulation.now + 31)
        last = simulation.call()
        simulation.run()
        assert last.response is not None
        assert not simulation.active
        assert (store.held("concurrency unknown/m"), store.queued()) == ([], [])
        spare = layer._shared._spare._places.get("concurrency unknown/m")
        assert spare is None or spare.is_idle(0.0)
        assert not layer._shared._owed

    @given(seed=st.integers(0, 10**6), on_store_error=st.sampled_from(["local", "raise", "open"]))
    @settings(max_examples=6, deadline=None)
    def test_a_store_that_fails_before_or_after_its_work(self, seed, on_store_error):
        """All middleware at once, in all ways, with calls that end in any way: at the end the store is as it was."""
        chance = random.Random(seed)  # noqa: S311  # the same calls in each run
        store = SlowStore()
        share = [0.0]

        def flaky(work):
            def do(*args, **options):
                fails = chance.random() < share[0]
                if fails and chance.random() < 0.5:
                    raise DOWN
                result = work(*args, **options)
                if fails:
                    raise DOWN
                return result

            return do

        for method in METHODS:
            setattr(store.inner, method, flaky(getattr(store.inner, method)))
        stack = [
            Budget(tokens=1e9, store=store, on_store_error=on_store_error),
            CircuitBreaker(failures=2, open_for=1, store=store, on_store_error=on_store_error),
            Concurrency(3, max_wait=50, store=store, on_store_error=on_store_error),
            RateLimit(requests=40, per=1, burst=20, store=store, on_store_error=on_store_error),
            Cache(store, namespace="n", streams_wait=1.0),
        ]
        simulation = Simulation(stack)
        at_work = [0]
        simulation.checks.append(lambda: at_work.append(len(simulation.at_work)))
        for phase in (0.0, 0.3, 1.0, 0.1, 0.6):
            share[0] = phase
            for _ in range(12):
                reply = Reply(chance.choice([0.1, 1.0]), chance.choice(["fine", "fine", ServerError("down")]))
                request = Request(model="m", messages=chance.choice("abc") * 2)
                made = simulation.call(request, reply=reply, streaming=chance.random() < 0.4)
                if chance.random() < 0.3:
                    stop = chance.choice([made.close, made.cancel])
                    simulation.at(simulation.now + chance.random(), lambda m=made, s=stop: m.is_over or s())
            simulation.run(simulation.now + chance.choice([0.5, 3.0]))
        simulation.run()
        assert not simulation.active
        if on_store_error == "raise":
            assert max(at_work) <= 3
        share[0] = 0.0
        for _ in range(2):  # the second, because a circuit may be open for the first
            simulation.run(simulation.now + 31)
            last = simulation.call(Request(model="m", messages="last"))
            simulation.run()
        assert last.response is not None
        assert store.queued() == []
        assert not any(places.held for places in store.inner._places.values())
        for layer in stack[:4]:
            assert not layer._shared._owed
            assert not layer._shared._queued
            spare = layer._shared._spare
            assert not any(places.held or places.waiting for places in spare._places.values())
            assert not any(rates.waiting for rates in spare._rates.values())

    @pytest.mark.parametrize("on_store_error", ["local", "open"])
    @pytest.mark.parametrize("is_done", [True, False])
    def test_a_place_in_the_queue_of_a_store_that_fails(self, on_store_error, is_done):
        """A call that goes on without the store leaves the store's queue, and nobody waits behind it."""
        store = SlowStore()
        ways = store.inner.reserve

        def reserve(*args):
            turn = ways(*args)
            if is_done and down:
                raise DOWN
            return turn

        down: list[bool] = []
        store.inner.reserve = reserve
        store.fails = lambda _: DOWN if down and not is_done else None
        simulation = Simulation(
            RateLimit(requests=10, per=10, store=store, on_store_error=on_store_error), Reply(100.0)
        )
        first, second = simulation.call(), simulation.call()
        assert second.waits
        down.append(True)
        simulation.run(0.6)
        assert (len(first.sent_at), len(second.sent_at)) == (1, 1), "it went on without the store"
        down.clear()
        simulation.run(10)
        third, fourth = simulation.call(), simulation.call()
        simulation.run(12)
        # The third call finds out that the store works, which is told then of what has ended, and asks again.
        assert [made.sent_at for made in (third, fourth)] == [
            [pytest.approx(10, abs=0.3)],
            [pytest.approx(11, abs=0.3)],
        ]
        assert store.queued() == []

    def test_a_breaker_without_its_store(self):
        """It goes on in this process."""
        store = SlowStore()
        store.fails = failing()
        simulation = Simulation(CircuitBreaker(failures=1, store=store), Reply(0, ServerError("down")))
        simulation.call()
        simulation.run(0)
        assert isinstance(simulation.call().error, CircuitOpen)

    def test_a_store_that_says_no_time(self):
        """A turn of no seconds does not make a busy loop."""
        store = SlowStore()
        answers = iter([*[0.0] * 20, None])
        reserve = store.inner.reserve

        def soon(key, who, limits, now):
            turn = reserve(key, who, limits, now)
            return turn if next(answers, None) is None else Turn(0.0, 0, None)

        store.inner.reserve = soon
        simulation = Simulation(RateLimit(requests=1e6, store=store))
        made = simulation.call()
        simulation.run()
        assert made.sent_at == [pytest.approx(0.02)]

    def test_of_an_interrupted_thread(self):
        """Ctrl-C within the store's own method: the cleanup runs, and the place is free."""
        store = SlowStore()
        layer = Concurrency(1, store=store)
        interrupted = [KeyboardInterrupt()]
        lease = store.inner.lease

        def cut(*args, **options):
            lease(*args, **options)
            if interrupted:
                raise interrupted.pop()

        store.inner.lease = cut
        pipeline = Pipeline(ScriptedProvider("fine"), [layer])
        with pytest.raises(KeyboardInterrupt):
            pipeline.complete(REQUEST)
        for _ in range(400):
            if not store.held(KEY):
                break
            time.sleep(0.005)
        assert pipeline.complete(REQUEST).text == "fine"
