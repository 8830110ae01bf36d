"""Calls that are the same and run at once in several processes send one request, by a lease in their store.

A `Cache` of its own stands for a process: what two of them have in common is their store.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time

import anyio
import pytest
from support.calling import REQUEST, call
from support.simulation import Reply, Simulation
from support.stores import SlowStore

from fluxibly._logs import forget_reports
from fluxibly.errors import DeadlineExceeded, ServerError
from fluxibly.middleware import Cache
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.stores import MemoryStore, SQLiteStore
from fluxibly.testing.modes import BACKENDS, run_async
from fluxibly.types import Request

ENOUGH = 30


@pytest.fixture(autouse=True)
def _afresh():
    forget_reports()


class Processes(Simulation):
    """Calls of several processes with one store, in virtual time. `metadata["process"]` says of which a call is."""

    def __init__(self, store, number=3, reply=None, **settings):
        caches = [Cache(store, namespace="n", **settings) for _ in range(number)]

        def one_of(request, call_next):
            return (yield from caches[request.metadata["process"]](request, call_next))

        super().__init__(one_of, reply)
        self.store = store

    def ask(self, process, **options):
        metadata = {"process": process, **options.pop("metadata", {})}
        return self.call(Request(model="m", messages="Hi", metadata=metadata), **options)

    def holds_nothing(self):
        return (
            not self.active and not self.store.queued() and not any(p.held for p in self.store.inner._places.values())
        )


class TestWholeCalls:
    def test_send_one_request(self):
        """Those of other processes get its answer within half a second, as hits."""
        made = Processes(SlowStore(), 5, reply=Reply(10.0))
        calls = [made.ask(process) for process in range(5)]
        made.run()
        assert len(made.sent) == 1
        assert [each.response.text for each in calls] == ["fine"] * 5
        assert [each.record.cache_hit for each in calls] == [False, True, True, True, True]
        assert max(each.ended_at for each in calls) <= 10.6
        assert made.holds_nothing()

    def test_look_again_seldom(self):
        """After 50 ms at first, growing to half a second: 70 looks in half a minute, of two trips each."""
        made = Processes(SlowStore(), reply=Reply(30.0))
        made.ask(0)
        made.run(0)
        made.store.asked.clear()
        made.ask(1)
        made.run(29)
        assert 55 <= made.store.asked.count("load") <= 90
        assert set(made.store.asked) == {"load", "lease"}

    def test_trips(self):
        """A miss costs a lease, a look and a release more than without other processes; a hit costs nothing more."""
        made = Processes(SlowStore())
        made.ask(0)
        made.run()
        assert made.store.asked == ["load", "lease", "load", "save", "release"]
        made.store.asked.clear()
        made.ask(1)
        assert made.store.asked == ["load"]

    def test_an_answer_between_two_looks(self):
        """It comes after a call has looked for it, and before that call may lead: no second request."""
        store = SlowStore()
        made = Processes(store)
        other = []

        def fails(method):
            if method == "lease" and not other:
                other.append(made.ask(1))
                made.run(5)

        store.fails = fails
        call = made.ask(0)
        made.run()
        assert len(made.sent) == 1
        assert (call.record.cache_hit, other[0].record.cache_hit) == (True, False)
        assert made.holds_nothing()

    def test_take_over_from_one_that_fails(self):
        """An error is never shared: each asks in its turn."""
        made = Processes(SlowStore(), reply=Reply(1.0, ServerError("down")))
        calls = [made.ask(process) for process in range(3)]
        made.run()
        assert [type(each.error) for each in calls] == [ServerError] * 3
        assert [at for at, _ in made.sent] == [0, pytest.approx(1.2, abs=0.4), pytest.approx(2.5, abs=0.8)]
        assert made.holds_nothing()

    def test_take_over_from_one_that_dies(self):
        """Its lease ends, and nothing tells so."""
        store = SlowStore()
        made = Processes(store, reply=lambda made: Reply(1.0 if made.number else 1000.0))
        made.ask(0)
        second = made.ask(1)
        (key, places), *_ = store.inner._places.items()
        made.at(30, lambda: store.inner.release(key, next(iter(places.held)), 30.0))
        made.run(40)
        assert second.sent_at == [pytest.approx(30.3, abs=0.4)]
        assert second.response.text == "fine"

    @pytest.mark.parametrize("how", ["cancel", "close"])
    def test_take_over_from_one_that_is_given_up(self, how):
        made = Processes(SlowStore(), reply=Reply(10.0))
        first, second = made.ask(0), made.ask(1)
        made.at(2, getattr(first, how))
        made.run()
        assert second.sent_at == [pytest.approx(2.3, abs=0.4)]
        assert made.holds_nothing()

    def test_that_wait_are_given_up(self):
        made = Processes(SlowStore(), reply=Reply(10.0))
        made.ask(0)
        second = made.ask(1)
        made.at(2, second.cancel)
        made.run()
        assert len(made.sent) == 1
        assert made.holds_nothing()

    def test_keep_their_deadlines(self):
        made = Processes(SlowStore(), reply=Reply(10.0))
        first = made.ask(0)
        second = made.ask(1, deadline=3.0)
        made.run()
        assert isinstance(second.error, DeadlineExceeded)
        assert second.ended_at == pytest.approx(3.0)
        assert first.response.text == "fine"
        assert made.holds_nothing()

    def test_that_are_to_ask_anew_wait_for_nobody(self):
        made = Processes(SlowStore(), reply=Reply(10.0))
        made.ask(0)
        made.ask(1, metadata={"cache": "refresh"})
        made.ask(2, metadata={"cache": "skip"})
        made.run(0)
        assert len(made.sent) == 3

    def test_whose_answer_is_not_kept(self):
        """Each asks, in its turn: nobody waits for ever."""
        made = Processes(SlowStore(), reply=Reply(1.0, ""))
        calls = [made.ask(process) for process in range(3)]
        made.run()
        assert [each.response.text for each in calls] == [""] * 3
        assert made.holds_nothing()

    def test_of_two_layers_with_one_store(self):
        """A call does not wait for itself."""
        store = SlowStore()
        made = Simulation([Cache(store, namespace="n"), Cache(store, namespace="n")])
        one = made.call()
        made.run()
        assert one.response.text == "fine"
        assert not any(places.held for places in store.inner._places.values())


class TestStreams:
    def test_wait_for_nobody_unless_told(self):
        """Nor does anybody wait for them."""
        made = Processes(SlowStore(), reply=Reply(10.0))
        made.ask(0, streaming=True)
        made.ask(1, streaming=True)
        made.ask(2)
        made.ask(0, streaming=True)
        made.run(0)
        assert len(made.sent) == 4
        assert made.store.asked.count("lease") == 1

    @pytest.mark.parametrize("first", ["stream", "whole"])
    @pytest.mark.parametrize("second", ["stream", "whole"])
    def test_wait_so_long(self, first, second):
        """As within a process: streams for everybody, and everybody for streams."""
        made = Processes(SlowStore(), reply=Reply(2.0, gap=0.1), streams_wait=5.0)
        made.ask(0, streaming=first == "stream")
        later = made.ask(1, streaming=second == "stream")
        made.run()
        assert len(made.sent) == 1
        assert later.record.cache_hit
        assert made.holds_nothing()

    @pytest.mark.parametrize("second", ["stream", "whole"])
    def test_wait_no_longer(self, second):
        """For a consumer that has stopped reading."""
        made = Processes(SlowStore(), reply=Reply(100.0), streams_wait=5.0)
        first = made.ask(0, streaming=True)
        later = made.ask(1, streaming=second == "stream")
        made.run(20)
        assert later.sent_at == [pytest.approx(5.0, abs=0.1)]
        first.close()
        made.run()
        assert made.holds_nothing()

    def test_that_are_left_give_their_lease_back(self):
        made = Processes(SlowStore(), reply=Reply(2.0, gap=1.0), streams_wait=9.0)
        first = made.ask(0, streaming=True)
        later = made.ask(1, streaming=True)
        made.at(2.5, first.close)
        made.run()
        assert later.sent_at == [pytest.approx(2.8, abs=0.4)]
        assert made.holds_nothing()


class TestStores:
    @pytest.mark.parametrize("failing", [{"lease"}, {"load"}, {"release"}, {"save", "lease", "load", "release"}])
    def test_that_fail(self, mode, failing, capfd):
        """The call goes on without, which is said once."""
        store = SlowStore()
        store.fails = lambda method: ConnectionError() if method in failing else None
        made = call(mode, Cache(store, namespace="n", streams_wait=1), "fine")
        assert made.response.text == "fine"
        assert made.clock.sleeps == []
        assert "Cache" in capfd.readouterr().err

    @pytest.mark.parametrize("method", ["load", "lease"])
    def test_that_fail_while_a_call_waits(self, method):
        """It asks by itself then."""
        made = Processes(SlowStore(), reply=Reply(10.0))
        made.ask(0)
        second = made.ask(1)
        made.run(1)
        made.store.fails = lambda asked: ConnectionError() if asked == method else None
        made.run(2)
        assert len(second.sent_at) == 1
        made.store.fails = lambda _: None
        made.run()
        assert second.response.text == "fine"

    def test_without_leases(self, mode):
        """A user's own with values alone is used as before."""

        class Values:
            local = False

            def __init__(self):
                self.inner = MemoryStore()

            def load(self, key, now):
                return self.inner.load(key, now)

            def save(self, *args):
                self.inner.save(*args)

            async def aload(self, key, now):
                return self.load(key, now)

            async def asave(self, *args):
                self.save(*args)

        cache = Cache(Values(), namespace="n", streams_wait=1)
        assert call(mode, cache, "one").response.text == "one"
        assert call(mode, cache).response.text == "one"


class Service:
    """Answers after a while, and counts."""

    def __init__(self, seconds=0.3):
        self.seconds = seconds
        self.asked = 0

    def complete(self, request):
        self.asked += 1
        time.sleep(self.seconds)
        return "fine"


class AsyncService(Service):
    async def complete(self, request):
        self.asked += 1
        await anyio.sleep(self.seconds)
        return "fine"


class TestForReal:
    def test_threads_of_two_pipelines(self):
        store, service, got = SlowStore(0.001), Service(), []
        pipelines = [Pipeline(service, [Cache(store, namespace="n")], framework="same") for _ in range(2)]
        threads = [
            threading.Thread(target=lambda p=pipelines[n % 2]: got.append(p.complete(REQUEST).text), daemon=True)
            for n in range(20)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(ENOUGH)
        assert (got, service.asked) == (["fine"] * 20, 1)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_tasks_of_two_pipelines(self, backend):
        """A third of them cancelled at any time, those that lead too."""
        store, service, got = SlowStore(0.001), AsyncService(), []

        async def main():
            pipelines = [AsyncPipeline(service, [Cache(store, namespace="n")], framework="same") for _ in range(2)]

            async def one(number):
                with anyio.move_on_after(0.005 * number if number % 3 == 0 else ENOUGH):
                    got.append((await pipelines[number % 2].complete(REQUEST)).text)

            async with anyio.create_task_group() as tasks:
                for number in range(30):
                    tasks.start_soon(one, number)

        run_async(main, backend)
        assert set(got) == {"fine"}
        assert len(got) >= 20
        assert not any(places.held for places in store.inner._places.values())

    def test_a_lease_that_is_got_after_a_cancellation(self):
        """Asyncio cancels a call while its trip is under way, which goes on in a thread: nobody holds the lease for ever."""

        class Threaded(SlowStore):
            """Does its work in threads, as a client does."""

            def __getattr__(self, name):
                work = super().__getattr__(name)
                if not name.startswith("a"):
                    return work
                do = getattr(self, name[1:])

                async def ado(*args, **options):
                    return await anyio.to_thread.run_sync(lambda: do(*args, **options))

                return ado

        store = Threaded(0.05)

        async def main():
            pipeline = AsyncPipeline(AsyncService(), [Cache(store, namespace="n")])
            for wait in (0.11, 0.14, 0.17):
                task = asyncio.ensure_future(pipeline.complete(REQUEST))
                await asyncio.sleep(wait)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            await asyncio.sleep(0.3)

        asyncio.run(main())
        assert store.asked.count("lease") >= 1
        assert not any(places.held for places in store.inner._places.values())

    def test_processes(self, tmp_path):
        """Four processes with one file: each of three questions is asked once."""
        if not hasattr(SQLiteStore, "lease"):
            pytest.skip("needs a SQLiteStore with leases")
        script = """
import sys, time
from fluxibly import Pipeline, Request
from fluxibly.middleware import Cache
class Provider:
    def complete(self, request):
        with open(sys.argv[2], "a") as file:
            file.write(request.messages[0].text)
        time.sleep(0.3)
        return "fine"
pipeline = Pipeline(Provider(), [Cache(sys.argv[1], namespace="n")], framework="same")
pipeline.complete(Request(model="m", messages=f"warm {sys.argv[3]}"))
print(flush=True)
sys.stdin.readline()
for question in "abc":
    assert pipeline.complete(Request(model="m", messages=question)).text == "fine"
"""
        log = tmp_path / "asked"
        command = [sys.executable, "-c", script, f"sqlite:{tmp_path / 'answers.db'}", str(log)]
        made = [
            subprocess.Popen([*command, f"{number}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for number in range(4)
        ]
        for process in made:
            process.stdout.readline()
        log.write_text("")
        for process in made:
            process.stdin.write(b"\n")
            process.stdin.flush()
        for process in made:
            process.communicate(timeout=60)
        assert [process.returncode for process in made] == [0] * 4
        assert log.read_text() == "abc"
