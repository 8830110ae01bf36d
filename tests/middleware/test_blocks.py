"""Blocks of `RateLimit`: a process with many calls reserves ahead, and no law is broken by that.

A `RateLimit` of its own stands for a process: what several have in common is their store.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections import Counter
from functools import partial
from itertools import pairwise

import anyio
import pytest
from hypothesis import given, settings, strategies as st
from support.calling import REQUEST
from support.simulation import Reply, Simulation
from support.stores import SlowStore

from fluxibly._logs import forget_reports
from fluxibly.errors import DeadlineExceeded, RateLimitError, RateLimitWait, StoreError
from fluxibly.middleware._block_lines import Line
from fluxibly.middleware.rate_limit import RateLimit
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.stores import Limit, Turn
from fluxibly.testing import VirtualClock
from fluxibly.types import Request, Response, Usage

ENOUGH = 30


@pytest.fixture(autouse=True)
def _afresh():
    forget_reports()


class Bucket:
    """What the calls of any window took, against `rate * w + burst`."""

    def __init__(self, rate):
        self.rate, self.level, self.at, self.most = rate, 0.0, 0.0, 0.0

    def add(self, units, now):
        self.level = max(0.0, self.level - (now - self.at) * self.rate) + units
        self.at, self.most = now, max(self.most, self.level)


class Processes(Simulation):
    """Calls of several processes in virtual time."""

    def __init__(self, number, *, store=None, reply=None, **limits):
        self.store = store or SlowStore()
        limits = {"per": 1, "max_wait": 1000, "estimate": lambda request: request.metadata["cost"], **limits}
        self.processes = [RateLimit(store=self.store, **limits) for _ in range(number)]

        def one_of(request, call_next):
            return (yield from self.processes[request.metadata["process"]](request, call_next))

        super().__init__(one_of, reply)
        self.requests = Bucket(limits.get("requests") or 1)
        self.tokens = Bucket(limits.get("tokens") or 1)
        self.when_sent.append(self._count)

    def _count(self, call):
        self.requests.add(1, self.now)
        self.tokens.add(call.request.metadata["cost"], self.now)

    def ask(self, process=0, cost=0, **options):
        request = Request(model="m", messages="Hi", metadata={"process": process, "cost": cost})
        return self.call(request, **options)

    def arrive(self, process, rate, seconds, chance, costs=(0,)):
        """Let calls arrive at random times."""
        at = self.now
        while (at := at + chance.expovariate(rate)) < self.now + seconds:
            self.at(at, partial(self.ask, process, chance.choice(costs)))

    def keep_busy(self, process, tasks, until, chance):
        """Let tasks make one call after another."""

        def again(made):
            if made in mine and self.now < until:
                mine[self.ask(process)] = None

        mine = {}
        self.when_ended.append(again)
        for _ in range(tasks):
            self.at(chance.uniform(0, 0.3), lambda: mine.setdefault(self.ask(process)))

    @property
    def reserved(self):
        """How long the requests that were taken fill the limit, in seconds from now."""
        rates = self.store.inner._rates["rate unknown/m"]
        return max(0.0, rates.arrivals.get("requests", 0.0) - self.now)


class TestTrips:
    def test_are_few(self):
        """A process with many calls makes a trip for many of them, and none of them waits."""
        made = Processes(1, requests=10_000)
        made.arrive(0, 1000, 2.0, random.Random(1))  # noqa: S311  # the same calls in each run
        made.run()
        assert len(made.sent) > 1500
        assert len(made.store.asked) < len(made.sent) / 20
        assert all(call.sent_at == [call.began_at] for call in made.calls)

    def test_of_few_calls(self):
        """Each has its own, and nothing is taken that nobody wants."""
        made = Processes(1, requests=1000)
        for number in range(20):
            made.at(number * 0.2, made.ask)
        made.run()
        assert made.store.asked == ["reserve"] * 20
        made.ask()
        assert made.reserved == pytest.approx(0.001)

    def test_without_blocks(self):
        made = Processes(1, requests=10_000, block=0)
        made.arrive(0, 1000, 0.2, random.Random(1))  # noqa: S311  # as above
        made.run()
        assert made.store.asked == ["reserve"] * len(made.sent)

    def test_of_calls_that_wait(self):
        """They wait in their process, which has one place in the queue of the store, and takes what they need at once."""
        made = Processes(2, requests=1000, burst=10)
        for _ in range(300):
            made.ask(0)
        made.run(0)
        assert len(made.store.queued()) == 1
        made.run()
        assert len(made.store.asked) < 250
        assert [call.number for _, call in made.sent] == [*range(300)], "first come, first served"

    def test_tell_corrections_together(self):
        """At the latest with the last call of a process."""
        usage = Usage(input_tokens=10, output_tokens=0)
        made = Processes(1, tokens=1e6, reply=lambda made: Reply(0.5 + made.number / 1000, Response("x", usage=usage)))
        for _ in range(400):
            made.ask(cost=100)
        made.run()
        assert made.store.asked.count("correct") <= 6
        taken = made.store.inner._rates["rate unknown/m"].arrivals["tokens"]
        without = Processes(1, tokens=1e6, block=0, reply=made.reply)
        for _ in range(400):
            without.ask(cost=100)
        without.run()
        assert without.store.asked.count("correct") == 400
        assert taken == pytest.approx(without.store.inner._rates["rate unknown/m"].arrivals["tokens"], abs=0.01)


class TestLimits:
    @given(
        limit=st.tuples(st.sampled_from([15.0, 40.0, 200.0]), st.sampled_from([0.05, 0.3, 1.0])),
        block=st.sampled_from([0.1, 0.5]),
        loads=st.lists(st.sampled_from([0.05, 0.3, 1.2]), min_size=1, max_size=3),
        seed=st.integers(0, 10**6),
    )
    @settings(max_examples=12, deadline=None)
    def test_are_kept(self, limit, block, loads, seed):
        """In every window, over all processes, for requests and for tokens that are reserved."""
        chance = random.Random(seed)  # noqa: S311  # the same calls in each run
        rate, burst, tokens = limit[0], max(1.0, limit[0] * limit[1]), limit[0] * 1000
        number = len(loads)
        made = Processes(number, requests=rate, burst=burst, tokens=tokens, block=block, give_back=False)
        for process in range(number):
            made.arrive(process, rate * loads[process], min(2.0, 60 / rate), chance, costs=(100, 900, 2500))
        for _ in range(3):  # one that takes whatever there is, at any time
            at = chance.uniform(0, 2)
            made.at(at, lambda: [made.ask(chance.randrange(number), 500) for _ in range(round(min(burst, 30)))])
        made.run()
        assert len(made.sent) == len(made.calls)
        assert made.requests.most <= burst + 1e-3
        assert made.tokens.most <= tokens + 1

    @pytest.mark.parametrize("cost", [500, 999_000])
    def test_are_kept_by_a_process_that_holds_much(self, cost):
        """It hands its block out at the last moment, when another has just taken the whole burst."""
        made = Processes(2, tokens=1e6, give_back=False)
        for number in range(100):
            made.at(number / 1000, lambda: made.ask(0, 500))
        made.run(0.1)
        made.store.asked.clear()
        made.ask(0, 500)
        assert made.store.asked == [], "it has a block"
        made.run(0.12)
        while made.store.asked == []:
            calls = [made.ask(1, cost) for _ in range(1_000_000 // cost)]
            made.store.asked.clear()
            while made.store.asked == []:
                made.ask(0, 500)
        made.run()
        assert calls[0].sent_at
        assert made.tokens.most <= 1e6 + 1

    def test_what_was_not_handed_out_is_worth_nothing_later(self):
        made = Processes(1, requests=1000)
        for number in range(100):
            made.at(number / 1000, made.ask)
        made.run(0.1)
        made.store.asked.clear()
        made.run(0.35)
        made.ask()
        assert made.store.asked == ["reserve"]

    def test_harm_nobody_for_longer_than_a_block(self):
        """A process that dies, or that has no more calls, takes a tenth of a second of the limit with it."""
        made = Processes(2, requests=1000, burst=400)
        for number in range(200):
            made.at(number / 2000, made.ask)
        made.run(0.1)
        assert made.reserved <= 0.2
        made.run(0.4)
        calls = [made.ask(1) for _ in range(300)]
        assert sum(len(call.sent_at) for call in calls) == 300

    def test_fair(self):
        """Processes that always want get as much as each other, whatever the number of their calls."""
        chance = random.Random(3)  # noqa: S311  # as above
        made = Processes(8, requests=200, burst=20, reply=lambda _: Reply(chance.uniform(0.05, 0.2)))
        for process in range(8):
            made.keep_busy(process, 10 + 5 * process, 4.0, chance)
        made.run(4.0)
        sent = Counter(call.request.metadata["process"] for _, call in made.sent)
        assert max(sent.values()) <= 1.1 * min(sent.values())
        assert len(made.sent) >= 0.98 * (4.0 * 200)

    def test_a_pause_of_the_service(self):
        """Nothing that was taken ahead goes out in it."""
        made = Processes(1, requests=1000)
        for number in range(200):
            made.at(number / 1000, made.ask)
        refused = RateLimitError("slow down", retry_after=5.0)
        made.at(0.2, lambda: made.ask(reply=Reply(0.001, refused)))
        made.run(0.202)
        late = [made.ask() for _ in range(20)]
        made.run()
        assert min(call.sent_at[0] for call in late) >= 5.2

    def test_a_lower_rate(self):
        """As its headers say, one by one."""
        told = {"limit": "360", "remaining": "6", "reset": "59s"}
        slow = Response("x", rate_limits={f"x-ratelimit-{name}-requests": value for name, value in told.items()})
        made = Processes(1, requests=1000, reply=Reply(0.1, slow))
        for number in range(100):
            made.at(number / 1000, made.ask)
        made.run(0.3)
        made.store.inner._rates.clear()
        made.store.inner.throttle("rate unknown/m", "requests", 6.0, 100.0, 0.3)  # as if all had drained since
        for _ in range(50):
            made.ask()
        made.run(3.0)
        late = [at for at, _ in made.sent if at > 0.31]
        assert len(late) >= 10
        assert min(after - before for before, after in pairwise(late)) >= 0.16

    def test_a_rate_that_changes_while_calls_wait(self):
        """All who wait follow it, at once, and so does what was asked for."""
        line, slow, fast = Line(0.1), (Limit("requests", 10.0, 10.0, 1.0),), (Limit("requests", 1000.0, 1000.0, 1.0),)
        for number in range(50):
            line.ask(f"{number}", slow, 0.0)
        plan, _ = line.begin(0.0)
        assert plan.limits == (Limit("requests", 10.0, 10.0, 1.0),)
        line.land(plan, Turn(1.0, 0, None), 0.0, 0.0, 5.0, is_new=True)
        assert line.ask("0", fast, 0.1) is False
        again, is_new = line.begin(0.1)
        assert not is_new
        assert again.name == plan.name, "its place in the store is kept"
        assert again.limits == (Limit("requests", 1000.0, 900.0, 1.0),)
        line.land(again, None, 0.1, 0.1, 5.0, is_new=False)
        assert line.ask("1", fast, 0.1) is False
        plan, _ = line.begin(0.1)
        assert plan.limits == (Limit("requests", 1000.0, 900.0, 49.0),)
        line.land(plan, Turn(1.0, 0, None), 0.1, 0.1, 5.0, is_new=True)
        assert line.ask("1", slow, 0.2) is False
        plan, _ = line.begin(0.2)
        assert plan.limits == (Limit("requests", 10.0, 10.0, 1.0),), "no more than a block at the new rate"

    @pytest.mark.parametrize("when", ["before the trip", "during the trip", "after it"])
    def test_a_limit_that_comes_while_calls_wait(self, when):
        """What calls take of it is told to the store, in the reservation or as a correction."""
        limit, tokens = Limit("requests", 1000.0, 1000.0, 1.0), Limit("tokens", 1e5, 1e5, 100.0)
        line, told = Line(0.1), Counter()
        names = ("one", "two", "three")

        def ask(limits):
            return [line.ask(name, limits, 0.0) for name in names]

        ask((limit,))
        plan, is_new = line.begin(0.0)
        line.land(plan, Turn(1.0, 0, None), 0.0, 0.0, 5.0, is_new=is_new)
        if when == "before the trip":
            ask((limit, tokens))
        plan, is_new = line.begin(0.0)
        if when == "during the trip":
            ask((limit, tokens))
        line.land(plan, None, 0.0, 0.0, 5.0, is_new=is_new)
        assert ask((limit, tokens)) == [True, True, True]
        told.update({each.name: each.cost for each in (*plan.limits, *line.owed(0.0))})
        assert told == {"requests": 3.0, "tokens": 300.0}


class TestWaits:
    def test_that_are_too_long(self):
        """They are told at once, with those ahead of them in their process."""
        made = Processes(1, requests=10, max_wait=2.0)
        calls = [made.ask() for _ in range(60)]
        made.run(0)
        assert sum(len(call.sent_at) for call in calls) == 10
        assert sum(isinstance(call.error, RateLimitWait) for call in calls) == pytest.approx(30, abs=2)
        made.run()
        assert max(call.sent_at[0] for call in calls if call.sent_at) <= 2.2

    def test_of_none(self):
        """A block makes nobody wait who could go alone."""
        made = Processes(2, requests=1000, burst=100, max_wait=0.0)
        for number in range(100):
            made.at(number / 1000, made.ask)
        made.run(0.1)
        for _ in range(200):
            made.ask(1)
        made.run(0.2)
        free = [made.ask(0), made.ask(1)]
        assert [call.sent_at for call in free] == [[0.2], [0.2]]

    def test_deadlines(self):
        made = Processes(1, requests=10)
        calls = [made.ask(deadline=1.0) for _ in range(40)]
        made.run()
        assert all(call.ended_at <= 2.0 + 1e-6 for call in calls if call.sent_at)
        assert {type(call.error) for call in calls} <= {type(None), RateLimitWait, DeadlineExceeded}
        assert made.store.queued() == []

    def test_that_are_cancelled(self):
        """Any of them, the head too: the others go on in their order, and nobody stays in the queue of the store."""
        made = Processes(1, requests=10, burst=1)
        calls = [made.ask() for _ in range(12)]
        for number in (1, 2, 5, 11):
            made.at(0.01 + number / 100, calls[number].cancel)
        made.run()
        assert [call.number for _, call in made.sent] == [0, 3, 4, 6, 7, 8, 9, 10]
        assert made.store.queued() == []
        calls = [made.ask() for _ in range(4)]
        made.run(made.now + 0.01)
        for call in calls[1:]:
            call.cancel()
        assert made.store.queued() == []

    @given(seed=st.integers(0, 10**6))
    @settings(max_examples=5, deadline=None)
    def test_end(self, seed):
        """Calls come, go, fail, and are cancelled and left at random, while the store fails now and then."""
        chance = random.Random(seed)  # noqa: S311  # as above
        made = Processes(
            3, requests=100, burst=20, tokens=1e6, on_store_error=chance.choice(["local", "open", "raise"])
        )
        inner = made.store.inner
        flaky = [0.0]

        def often(method, work):
            def do(*args, **options):
                before = chance.random() < flaky[0]
                if before and chance.random() < 0.5:
                    raise ConnectionError
                result = work(*args, **options)
                if before:
                    raise ConnectionError
                return result

            return do

        for method in ("reserve", "release", "correct"):
            setattr(inner, method, often(method, getattr(inner, method)))
        for process in range(3):
            made.arrive(process, 50, 3.0, chance, costs=(10, 2000))
        for at, share in ((0.5, 0.2), (1.0, 1.0), (1.5, 0.0), (2.0, 0.5), (2.5, 0.0)):
            made.at(at, lambda share=share: flaky.__setitem__(0, share))

        def stop():
            if made.active:
                call = chance.choice([*made.active])
                chance.choice([call.cancel, call.close])()

        for _ in range(60):
            made.at(chance.uniform(0, 4), stop)
        made.run()
        assert not made.active
        errors = {type(call.error) for call in made.calls if call.error} - {asyncio.CancelledError, RateLimitWait}
        assert errors <= {StoreError}
        made.run(made.now + 31)
        last = [made.ask(process, 10) for process in range(3)]
        made.run()
        assert all(call.response for call in last)
        assert made.store.queued() == []
        for layer in made.processes:
            line = layer._shared._lines["rate unknown/m"]
            assert (line.waiting, line._granted, line._plan, line._out, line._owed) == ({}, {}, None, 0, {})
            assert not layer._shared._out
            assert not layer._shared._owed


class Service:
    def __init__(self, bucket=None):
        self.lock, self.count = threading.Lock(), 0

    def complete(self, request):
        with self.lock:
            self.count += 1
        return "fine"


class AsyncService(Service):
    async def complete(self, request):
        self.count += 1
        await anyio.sleep(0.005)
        return "fine"


class Threaded(SlowStore):
    """A store whose work for async calls goes on in a thread, whatever becomes of them."""

    def __getattr__(self, name):
        work = super().__getattr__(name)
        if not name.startswith("a"):
            return work
        do = getattr(self, name[1:])

        async def ado(*args, **options):
            return await anyio.to_thread.run_sync(lambda: do(*args, **options))

        return ado


class TestForReal:
    def test_threads_and_tasks_of_several_loops(self):
        """All through one line, and all get their turn."""
        store = Threaded(0.001)
        layer = RateLimit(requests=2000, per=1, burst=100, store=store)
        service, aservice, done = Service(), AsyncService(), []

        def work():
            pipeline = Pipeline(service, [layer], framework="same")
            done.extend(pipeline.complete(REQUEST).text for _ in range(20))

        def loop(backend):
            async def one(pipeline):
                done.extend([(await pipeline.complete(REQUEST)).text for _ in range(10)])

            async def main():
                pipeline = AsyncPipeline(aservice, [layer], framework="same")
                async with anyio.create_task_group() as tasks:
                    for _ in range(20):
                        tasks.start_soon(one, pipeline)

            anyio.run(main, backend=backend)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(20)]
        threads += [threading.Thread(target=loop, args=(each,), daemon=True) for each in ("asyncio", "trio")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(ENOUGH)
        assert done == ["fine"] * 800
        assert store.asked.count("reserve") < 600
        assert store.queued() == []

    def test_a_trip_whose_call_is_cancelled(self):
        """Asyncio ends the call while its trip is under way: what it brings serves the others, and is not lost."""
        store = Threaded(0.03)
        layer = RateLimit(requests=20, per=100, store=store, burst=20)
        reserve = store.inner.reserve
        granted = []

        def counted(key, who, limits, now):
            turn = reserve(key, who, limits, now)
            if turn is None:
                granted.append(limits[0].cost)
            return turn

        store.inner.reserve = counted

        async def main():
            pipeline = AsyncPipeline(AsyncService(), [layer])
            calls = [asyncio.ensure_future(pipeline.complete(REQUEST)) for _ in range(1)]
            await asyncio.sleep(0.01)
            calls += [asyncio.ensure_future(pipeline.complete(REQUEST)) for _ in range(3)]
            await asyncio.sleep(0.01)
            calls[0].cancel()
            return await asyncio.gather(*calls, return_exceptions=True)

        got = asyncio.run(main())
        assert isinstance(got[0], asyncio.CancelledError)
        assert [each.text for each in got[1:]] == ["fine"] * 3
        assert sum(granted) == 3, "what the cancelled call had asked for is another's"
        assert store.queued() == []

    def test_an_interrupted_trip(self):
        """Ctrl-C within it: the next call makes another."""
        store = SlowStore()
        layer = RateLimit(requests=1000, per=1, store=store)
        interrupted = [KeyboardInterrupt()]
        store.fails = lambda _: interrupted.pop() if interrupted else None
        pipeline = Pipeline(Service(), [layer])
        with pytest.raises(KeyboardInterrupt):
            pipeline.complete(REQUEST)
        assert pipeline.complete(REQUEST).text == "fine"

    def test_a_head_that_is_stuck(self):
        """Another call goes past one whose event loop has ended with no word."""
        clock = VirtualClock()
        store = SlowStore()
        layer = RateLimit(requests=1, per=1, store=store)
        pipeline = Pipeline(Service(), [layer], clock=clock)
        pipeline.complete(REQUEST)
        layer._shared._lines["rate Service/m-1"].ask("stuck", layer._limits, clock.now())
        assert pipeline.complete(REQUEST).text == "fine"
        assert clock.now() >= 5

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
    def test_a_fork(self):
        """The new process has no block, and does not wait behind calls of the old one."""
        store = SlowStore()
        layer = RateLimit(requests=1000, per=1, store=store)
        pipeline = Pipeline(Service(), [layer])
        for _ in range(300):
            pipeline.complete(REQUEST)
            time.sleep(0.0002)
        layer._shared._lines["rate Service/m-1"].ask("parent", (), time.perf_counter())
        child = os.fork()
        if not child:
            store.asked.clear()
            fine = pipeline.complete(REQUEST).text == "fine" and store.asked == ["reserve"]
            os._exit(0 if fine else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
