"""Calls that are the same and run at once share one request: in threads, tasks, and over both."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from contextlib import closing

import anyio
import pytest
from support.calling import REQUEST
from support.stores import SlowStore

from fluxibly import Signal
from fluxibly.errors import DeadlineExceeded, ServerError
from fluxibly.flow import ask
from fluxibly.middleware import Cache
from fluxibly.middleware._flights import Flight, Flights
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.stores import MemoryStore
from fluxibly.testing.modes import BACKENDS, run_async

ENOUGH = 30
"""Seconds that no test lasts."""


class Service:
    """A provider for threads and tasks. It answers "one two", the first `failures` times with an error, once `open` is set."""

    def __init__(self, failures=0):
        self.open = Signal()
        self.begun = Signal()
        self.failures = failures
        self.asked = 0

    def begin(self):
        self.asked += 1
        self.begun.set()
        return self.asked

    def pieces(self, number):
        if number <= self.failures:
            raise ServerError(f"failure {number}")
        return ["one ", "two"]


class Blocking(Service):
    def complete(self, request):
        number = self.begin()
        assert self.open.wait(ENOUGH)
        return "".join(self.pieces(number))

    def stream(self, request):
        number = self.begin()
        yield "one "
        assert self.open.wait(ENOUGH)
        yield from self.pieces(number)[1:]


class Awaiting(Service):
    async def complete(self, request):
        number = self.begin()
        assert await self.open.await_(ENOUGH)
        return "".join(self.pieces(number))

    async def stream(self, request):
        number = self.begin()
        yield "one "
        assert await self.open.await_(ENOUGH)
        for piece in self.pieces(number)[1:]:
            yield piece


class Calls:
    """Whole calls at once through one cache, and what each of them got: a text, or an error."""

    def __init__(self, cache, services=None):
        self.cache = cache
        self.blocking, self.awaiting = services or (Blocking(), Awaiting())
        self.got = []
        self.hits = []

    def one(self):
        try:
            response = Pipeline(self.blocking, [self.cache], framework="same").complete(REQUEST)
        except ServerError as error:
            self.got.append(error)
        else:
            self.got.append(response.text)
            self.hits.append(response.cache_hit)

    def threads(self, number):
        threads = [threading.Thread(target=self.one, daemon=True) for _ in range(number)]
        for thread in threads:
            thread.start()
        return threads

    async def tasks(self, number):
        pipeline = AsyncPipeline(self.awaiting, [self.cache], framework="same")

        async def one():
            try:
                response = await pipeline.complete(REQUEST)
            except ServerError as error:
                self.got.append(error)
            else:
                self.got.append(response.text)
                self.hits.append(response.cache_hit)

        before = threading.active_count()
        with anyio.fail_after(ENOUGH):
            async with anyio.create_task_group() as group:
                for _ in range(number):
                    group.start_soon(one)
                await anyio.sleep(0.01)
                self.used = threading.active_count() - before


@pytest.fixture
def everyone(monkeypatch):
    """Return a function: once so many calls wait for a flight or lead it, the service answers."""

    def make(number, *services):
        join, joined = Flights.join, itertools.count(1)

        def counted(flights, call, key, *, waits):
            if next(joined) == number:
                for service in services:
                    service.open.set()
            return join(flights, call, key, waits=waits)

        monkeypatch.setattr(Flights, "join", counted)

    return make


@pytest.fixture(params=["memory", "store", "far store"])
def cache(request):
    if request.param == "memory":
        return Cache()
    return Cache(MemoryStore() if request.param == "store" else SlowStore(), namespace="n")


class TestSharing:
    def test_of_threads(self, everyone, cache):
        """100 threads send one request."""
        calls = Calls(cache)
        everyone(100, calls.blocking)
        for thread in calls.threads(100):
            thread.join(ENOUGH)
        assert calls.got == ["one two"] * 100
        assert (calls.blocking.asked, calls.hits.count(True)) == (1, 99)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_of_tasks(self, everyone, backend):
        """1,000 tasks send one request, and none waits in a worker thread."""
        calls = Calls(Cache())
        everyone(1000, calls.awaiting)
        run_async(lambda: calls.tasks(1000), backend)
        assert calls.got == ["one two"] * 1000
        assert (calls.awaiting.asked, calls.hits.count(True)) == (1, 999)
        assert calls.used <= 0  # a thread of an earlier test may have ended

    def test_of_threads_and_loops(self, everyone, monkeypatch):
        """Threads, tasks of asyncio and tasks of trio share one request."""
        calls = Calls(Cache(key=lambda _: "same"))
        everyone(220, calls.blocking, calls.awaiting)
        loops = [
            threading.Thread(target=run_async, args=(lambda: calls.tasks(100), backend), daemon=True)
            for backend in BACKENDS
        ]
        for thread in loops:
            thread.start()
        for thread in [*loops, *calls.threads(20)]:
            thread.join(ENOUGH)
        assert calls.got == ["one two"] * 220
        assert calls.blocking.asked + calls.awaiting.asked == 1

    def test_of_calls_that_refresh(self):
        """Each asks by itself."""
        calls = Calls(Cache())
        calls.blocking.open.set()
        pipeline = Pipeline(calls.blocking, [calls.cache])
        refresh = REQUEST.evolve(metadata={"cache": "refresh"})
        threads = [threading.Thread(target=pipeline.complete, args=(refresh,)) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(ENOUGH)
        assert calls.blocking.asked == 5

    def test_nothing_is_left(self, everyone, cache):
        """Flights are forgotten when they have landed."""
        calls = Calls(cache)
        everyone(10, calls.blocking)
        for thread in calls.threads(10):
            thread.join(ENOUGH)
        assert (cache._flights._whole, cache._flights._streams) == ({}, {})


class TestFailures:
    def test_an_error_is_not_shared(self, everyone, cache):
        """Who leads gets the error, and another leads for those who wait."""
        services = Blocking(failures=2), Awaiting()
        calls = Calls(cache, services)
        everyone(10, calls.blocking)
        for thread in calls.threads(10):
            thread.join(ENOUGH)
        errors = [str(each) for each in calls.got if isinstance(each, ServerError)]
        assert sorted(errors) == ["failure 1", "failure 2"]
        assert [each for each in calls.got if isinstance(each, str)] == ["one two"] * 8
        assert calls.blocking.asked == 3

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_leader_that_is_cancelled(self, backend, cache):
        """One of those who wait leads."""
        calls = Calls(cache)

        async def main():
            with anyio.fail_after(ENOUGH):
                async with anyio.create_task_group() as group:
                    leader = anyio.CancelScope()

                    async def lead():
                        with leader:
                            await calls.tasks(1)

                    group.start_soon(lead)
                    await calls.awaiting.begun.await_()
                    group.start_soon(calls.tasks, 3)
                    await anyio.sleep(0.05)
                    leader.cancel()
                    await anyio.sleep(0.05)
                    calls.awaiting.open.set()

        run_async(main, backend)
        assert calls.got == ["one two"] * 3
        assert calls.awaiting.asked == 2

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_one_who_waits_and_is_cancelled(self, backend):
        """The others are not disturbed."""
        calls = Calls(Cache())

        async def main():
            with anyio.fail_after(ENOUGH):
                async with anyio.create_task_group() as group:
                    group.start_soon(calls.tasks, 1)
                    await calls.awaiting.begun.await_()
                    with anyio.move_on_after(0.05):
                        await calls.tasks(1)
                    calls.awaiting.open.set()

        run_async(main, backend)
        assert calls.got == ["one two"]
        assert calls.awaiting.asked == 1

    def test_a_deadline_of_one_who_waits(self):
        """It ends the wait, in a thread too."""
        calls = Calls(Cache())
        [leader] = calls.threads(1)
        calls.blocking.begun.wait(ENOUGH)
        pipeline = Pipeline(calls.blocking, [calls.cache], framework="same")
        for timeout in (0.05, 1e-9):
            with pytest.raises(DeadlineExceeded):
                pipeline.complete(REQUEST, timeout=timeout)
        calls.blocking.open.set()
        leader.join(ENOUGH)
        assert calls.blocking.asked == 1

    def test_an_answer_that_is_not_kept(self, everyone):
        """Who waits gets it all the same: it is the answer to the same request at the same time."""
        calls = Calls(Cache(max_bytes=1))
        everyone(20, calls.blocking)
        for thread in calls.threads(20):
            thread.join(ENOUGH)
        assert calls.got == ["one two"] * 20
        assert calls.blocking.asked == 1


class TestStreams:
    def test_go_alone(self):
        """No stream waits for another, and no whole call for a stream, unless `streams_wait` says so."""
        service = Blocking()
        service.open.set()
        pipeline = Pipeline(service, [Cache()])
        with closing(pipeline.stream(REQUEST)) as stream:
            assert next(iter(stream)).text == "one "
            assert "".join([chunk.text for chunk in pipeline.stream(REQUEST)]) == "one two"
            assert service.asked == 2
        pipeline = Pipeline(service, [Cache()])
        with closing(pipeline.stream(REQUEST)) as stream:
            assert next(iter(stream)).text == "one "
            assert pipeline.complete(REQUEST).text == "one two"
            assert service.asked == 4

    def test_wait_for_others_for_a_while(self):
        """With patience they share the answer of a whole call, or of a stream that is read to its end."""
        for lead in ("complete", "stream"):
            service = Blocking()
            pipeline = Pipeline(service, [Cache(streams_wait=ENOUGH)])
            got = []

            def read(how, pipeline=pipeline, got=got):
                answer = getattr(pipeline, how)(REQUEST)
                got.append("".join([chunk.text for chunk in answer]) if how == "stream" else answer.text)

            threads = [threading.Thread(target=read, args=(lead,), daemon=True)]
            threads[0].start()
            service.begun.wait(ENOUGH)
            threads += [threading.Thread(target=read, args=(how,), daemon=True) for how in ("stream", "complete") * 5]
            for thread in threads[1:]:
                thread.start()
            service.open.set()
            for thread in threads:
                thread.join(ENOUGH)
            assert got == ["one two"] * 11
            assert service.asked == 1

    def test_in_the_same_thread(self):
        """A call in the middle of its own stream goes alone when its patience is over, a whole one too."""
        service = Blocking()
        service.open.set()
        pipeline = Pipeline(service, [Cache(streams_wait=0.05)])
        for _ in range(2):
            with closing(pipeline.stream(REQUEST.evolve(metadata={"cache": "refresh"}))) as stream:
                next(iter(stream))
                fresh = REQUEST.evolve(messages=f"{_}")
                with closing(pipeline.stream(fresh)) as other:
                    next(iter(other))
                    assert pipeline.complete(fresh).text == "one two"

    def test_a_leader_that_leaves(self):
        """If the consumer of the stream gives it up, one of those who wait leads, with what is left of its patience."""
        service = Blocking()
        pipeline = Pipeline(service, [Cache(streams_wait=ENOUGH)])
        stream = pipeline.stream(REQUEST)
        assert next(iter(stream)).text == "one "
        got = []

        def read():
            got.append("".join([chunk.text for chunk in pipeline.stream(REQUEST)]))

        threads = [threading.Thread(target=read, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        service.open.set()
        threads[0].join(0.05)
        assert got == []
        stream.close()
        for thread in threads:
            thread.join(ENOUGH)
        assert got == ["one two"] * 3
        assert service.asked == 2

    def test_a_leader_that_fails_before_whole_calls(self):
        """Of the whole calls that wait for a stream, one asks when the stream fails, and the others wait for that one."""
        service = Blocking(failures=1)
        pipeline = Pipeline(service, [Cache(streams_wait=ENOUGH)])
        got, waiting, rounds = [], [], []

        def counted(flights, call, flight, wait=Flights._landed):
            rounds.append(flight)
            return wait(flights, call, flight)

        def watched(flights, call, flight, seconds, wait=Flights._landed_soon):
            waiting.append(flight)
            return wait(flights, call, flight, seconds)

        with pytest.MonkeyPatch.context() as patched, closing(pipeline.stream(REQUEST)) as stream:
            patched.setattr(Flights, "_landed_soon", watched)
            patched.setattr(Flights, "_landed", counted)
            assert next(iter(stream)).text == "one "
            threads = [
                threading.Thread(target=lambda: got.append(pipeline.complete(REQUEST).text), daemon=True)
                for _ in range(5)
            ]
            for thread in threads:
                thread.start()
            while not waiting:
                threads[0].join(0.001)
            service.begun, service.open = Signal(), Signal()
            stream.close()
            assert service.begun.wait(ENOUGH)
            threads[0].join(0.05)
            assert got == []
            service.failures = 0
            service.open.set()
            for thread in threads:
                thread.join(ENOUGH)
        assert got == ["one two"] * 5
        assert service.asked == 2
        assert len(rounds) <= 4, "each waits once"

    def test_many_whole_calls_behind_a_stream(self, everyone):
        """They share a request of their own."""
        calls = Calls(Cache())
        pipeline = Pipeline(calls.blocking, [calls.cache], framework="same")
        with closing(pipeline.stream(REQUEST)) as stream:
            next(iter(stream))
            everyone(20, calls.blocking)
            for thread in calls.threads(20):
                thread.join(ENOUGH)
        assert calls.got == ["one two"] * 20
        assert calls.blocking.asked == 2


class TestDeadlocks:
    def test_an_ask_within(self):
        """A question of a layer within, through the same cache, does not wait for its own call."""
        cache, service = Cache(), Blocking()
        service.open.set()

        def judging(request, call_next):
            answer = yield from ask(request, through=[cache])
            assert answer.text == "one two"
            return (yield from call_next(request))

        assert Pipeline(service, [cache, judging]).complete(REQUEST).text == "one two"

    def test_a_call_within_a_call(self):
        """A provider that asks the same of the same cache, in its thread, goes alone."""
        cache = Cache(key=lambda _: "same")

        class Inner:
            def complete(self, request):
                return "fine"

        class Outer:
            def complete(self, request):
                return Pipeline(Inner(), [cache]).complete(REQUEST)

        assert Pipeline(Outer(), [cache]).complete(REQUEST).text == "fine"

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_sync_call_in_an_event_loop(self, backend):
        """It would hold up the task that it waits for."""
        calls = Calls(Cache(key=lambda _: "same"))
        calls.blocking.open.set()

        async def main():
            with anyio.fail_after(ENOUGH):
                async with anyio.create_task_group() as group:
                    group.start_soon(calls.tasks, 1)
                    await calls.awaiting.begun.await_()
                    calls.one()
                    calls.awaiting.open.set()

        run_async(main, backend)
        assert calls.got == ["one two"] * 2

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
    def test_a_fork(self):
        """In the new process nobody leads what was led in another thread of the old one."""
        script = """
import os, sys, threading
from fluxibly import Pipeline, Request
from fluxibly.middleware import Cache
begun, go = threading.Event(), threading.Event()
parent = os.getpid()
class Provider:
    def complete(self, request):
        if os.getpid() == parent:
            begun.set()
            go.wait(20)
        return "fine"
pipeline = Pipeline(Provider(), [Cache()])
request = Request(model="m", messages="Hi")
thread = threading.Thread(target=pipeline.complete, args=(request,))
thread.start()
begun.wait(20)
child = os.fork()
if not child:
    os._exit(pipeline.complete(request).text != "fine")
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
go.set()
thread.join()
sys.exit(code)
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == 0, done.stderr


def test_a_flight_has_landed_once_its_leader_has_left():
    """Also in a process that has forgotten it."""
    from fluxibly.types import CallRecord

    flights, call = Flights(0.0), CallRecord()
    flight = Flight(call)
    flights.leave(call, "k", flight)
    assert (flight.landed.is_set, flight.answer) == (True, None)
