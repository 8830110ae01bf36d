"""Calls that share one flight (`single_flight`, over `Signal`), in all modes and over all of them at once."""

from __future__ import annotations

import itertools
import threading
import time
from contextlib import closing

import anyio
import anyio.to_thread
import pytest
from support.powers import Flight, single_flight

from fluxibly import Signal
from fluxibly.errors import ServerError
from fluxibly.middleware import Retry
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.testing import AsyncScriptedProvider, ScriptedProvider, check_middleware
from fluxibly.testing.modes import MODES, run, run_async
from fluxibly.types import Request

ASYNC = [mode for mode in MODES if mode.backend]
ENOUGH = 20
"""Seconds that no test lasts."""


def prompt_of(request):
    return request.model, request.messages[-1].text


def ask(prompt="Hi"):
    return Request(model="m", messages=prompt)


class Service:
    """The script of both providers. It answers "one two", or an error the first `failures` times, once `everyone` is there."""

    def __init__(self, failures=0):
        self.everyone = Signal()
        self.failures = failures
        self.asked = []
        self.begun = Signal()

    def begin(self, request):
        self.asked.append(request.messages[-1].text)
        self.begun.set()
        return len(self.asked)

    def answer(self, number):
        if number <= self.failures:
            raise ServerError(f"failure {number}")
        return ["one ", "two"]


class Blocking:
    def __init__(self, service):
        self.service = service

    def pieces(self, request):
        number = self.service.begin(request)
        self.service.everyone.wait()
        return self.service.answer(number)

    def complete(self, request):
        return "".join(self.pieces(request))

    def stream(self, request):
        yield from self.pieces(request)


class Awaiting:
    def __init__(self, service):
        self.service = service

    async def pieces(self, request):
        number = self.service.begin(request)
        await self.service.everyone.await_()
        return self.service.answer(number)

    async def complete(self, request):
        return "".join(await self.pieces(request))

    async def stream(self, request):
        for piece in await self.pieces(request):
            yield piece


class Calls:
    """Calls that are made at once, and what each of them got: a text, or an error."""

    def __init__(self, service):
        self.layer = single_flight(prompt_of)
        self.service = service
        self.got = []

    def threads(self, streaming, number):
        pipeline = Pipeline(Blocking(self.service), [self.layer])

        def one():
            try:
                if streaming:
                    with pipeline.stream(ask()) as stream:
                        text = "".join([chunk.text for chunk in stream])
                        assert text == stream.response.text
                else:
                    text = pipeline.complete(ask()).text
                self.got.append(text)
            except ServerError as error:
                self.got.append(error)

        threads = [threading.Thread(target=one, daemon=True) for _ in range(number)]
        for thread in threads:
            thread.start()
        return threads

    async def tasks(self, streaming, number):
        pipeline = AsyncPipeline(Awaiting(self.service), [self.layer])

        async def one():
            try:
                if streaming:
                    async with pipeline.stream(ask()) as stream:
                        text = "".join([chunk.text async for chunk in stream])
                        assert text == stream.response.text
                else:
                    text = (await pipeline.complete(ask())).text
                self.got.append(text)
            except ServerError as error:
                self.got.append(error)

        before = threading.active_count()
        with anyio.fail_after(ENOUGH):
            async with anyio.create_task_group() as group:
                for _ in range(number):
                    group.start_soon(one)
                await anyio.sleep(0.01)
                self.used = threading.active_count() - before

    def run(self, mode, number):
        if mode.backend is None:
            for thread in self.threads(mode.streaming, number):
                thread.join(ENOUGH)
        else:
            run_async(lambda: self.tasks(mode.streaming, number), mode.backend)
            assert self.used <= 0  # nobody waits in a worker thread; one of an earlier test may have ended
        return self.got


@pytest.fixture
def calls_to(monkeypatch):
    """Return calls to a service that answers once `number` of them share its first flight."""

    def make(number, failures=0):
        calls, leads, joined = Calls(Service(failures)), Flight.leads, itertools.count(1)

        def counted(flight):
            if next(joined) == number:
                calls.service.everyone.set()
            return leads(flight)

        monkeypatch.setattr(Flight, "leads", counted)
        return calls

    return make


class TestSharing:
    def test_a_single_call(self, mode, calls_to):
        """A call alone is made, and so is the next."""
        calls = calls_to(1)
        assert calls.run(mode, 1) == ["one two"]
        assert calls.run(mode, 1) == ["one two"] * 2
        assert len(calls.service.asked) == 2

    def test_at_once(self, mode, calls_to):
        """20 threads, or 200 tasks, share one call, whole and streamed."""
        number = 200 if mode.backend else 20
        calls = calls_to(number)
        assert calls.run(mode, number) == ["one two"] * number
        assert calls.service.asked == ["Hi"]

    @pytest.mark.parametrize("streaming", [False, True])
    def test_threads_and_loops_at_once(self, streaming, calls_to):
        """Threads, tasks of asyncio and tasks of trio share one call."""
        calls = calls_to(220)
        loops = [
            threading.Thread(target=run_async, args=(lambda: calls.tasks(not streaming, 100), backend), daemon=True)
            for backend in ("asyncio", "trio")
        ]
        for loop in loops:
            loop.start()
        for thread in [*calls.threads(streaming, 20), *loops]:
            thread.join(ENOUGH)
        assert calls.got == ["one two"] * 220
        assert calls.service.asked == ["Hi"]

    def test_other_calls(self, mode):
        """Calls that are not the same are all made."""
        layer = single_flight(prompt_of)
        for prompt in ("one", "two"):
            provider = provider_for(mode, prompt)
            assert run(mode, provider, [layer], ask(prompt)).response.text == prompt


def provider_for(mode, *answers):
    return (AsyncScriptedProvider if mode.backend else ScriptedProvider)(*answers)


class TestFailures:
    def test_an_error_is_not_shared(self, mode, calls_to):
        """If the call fails, its caller gets the error, and another call is made for those who wait."""
        calls = calls_to(10, failures=2)
        got = sorted(calls.run(mode, 10), key=str)
        assert [str(each) for each in got if isinstance(each, ServerError)] == ["failure 1", "failure 2"]
        assert [each for each in got if isinstance(each, str)] == ["one two"] * 8
        assert len(calls.service.asked) == 3

    def test_a_retry_within(self, mode):
        """Retries inside belong to the same flight."""
        layers = [single_flight(prompt_of), Retry(max_retries=1)]
        ran = run(mode, provider_for(mode, ServerError("no"), "yes"), layers, ask())
        assert ran.response.text == "yes"

    @pytest.mark.parametrize("mode", ASYNC, ids=str)
    def test_a_cancelled_leader(self, mode, calls_to):
        """If the task that makes the call is cancelled, one of those who wait makes it."""
        calls = calls_to(None)

        async def main():
            with anyio.fail_after(ENOUGH):
                async with anyio.create_task_group() as group:
                    leader = anyio.CancelScope()

                    async def lead():
                        with leader:
                            await calls.tasks(mode.streaming, 1)

                    group.start_soon(lead)
                    await calls.service.begun.await_()
                    group.start_soon(calls.tasks, mode.streaming, 2)
                    await anyio.wait_all_tasks_blocked()
                    leader.cancel()
                    await anyio.wait_all_tasks_blocked()
                    calls.service.everyone.set()

        run_async(main, mode.backend)
        assert calls.got == ["one two"] * 2
        assert len(calls.service.asked) == 2

    def test_a_leader_that_leaves_its_stream(self, calls_to):
        """If the consumer of the stream leaves early, one of those who wait makes the call."""
        calls = calls_to(1)
        pipeline = Pipeline(Blocking(calls.service), [calls.layer])
        with closing(pipeline.stream(ask())) as stream:
            assert next(iter(stream)).text == "one "
            threads = calls.threads(True, 3)
            time.sleep(0.05)
            assert calls.got == []
        for thread in threads:
            thread.join(ENOUGH)
        assert calls.got == ["one two"] * 3
        assert len(calls.service.asked) == 2


def test_it_keeps_the_laws():
    """The laws of middleware hold for it."""
    check_middleware(single_flight(prompt_of))
