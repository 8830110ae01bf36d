"""What processes do that share a store: they are forked from a server of `multiprocessing`, which has loaded the library."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.forkserver import ensure_running
from typing import Any

import anyio
import pytest

from fluxibly.errors import BudgetExceeded, CircuitOpen, ServerError
from fluxibly.middleware import Budget, Cache, CircuitBreaker, Concurrency, RateLimit
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.stores import RedisStore
from fluxibly.testing import ScriptedProvider
from fluxibly.testing.modes import run_async
from fluxibly.types import Request, Response, Usage

REQUEST = Request(model="m-1", messages="What is the capital of France?", max_tokens=10)
RATE = 100
BURST = 10
PLACES = 4
TOKENS = 10
ENOUGH = 60.0


class NotingStore(RedisStore):
    """A store that notes between which times a call of a limit was let pass."""

    granted: list[tuple[float, float]]

    def reserve(self, *args: Any) -> Any:
        asked = time.monotonic()
        turn = super().reserve(*args)
        if turn is None:
            self.granted.append((asked, time.monotonic()))
        return turn


class WrongClock:
    """The clock of the system, an hour ahead."""

    sleep = staticmethod(time.sleep)

    def now(self) -> float:
        return time.perf_counter() + 3600

    async def asleep(self, seconds: float, /) -> None:
        await anyio.sleep(seconds)


def share_a_rate(url: str, number: int, ready: Any, seconds: float) -> tuple[list[Any], list[Any]]:
    """Make calls for some seconds, and return when they were let pass and when they were inside.

    The even processes are sync, the odd ones async, each on its own kind of loop; one has a wrong clock.
    """
    store = NotingStore(url)
    store.granted = []
    inside: list[tuple[float, float]] = []
    layers = [
        RateLimit(
            requests=RATE,
            tokens=RATE * TOKENS,
            per=1,
            burst=BURST,
            estimate=_tokens,
            by=_all,
            store=store,
            on_store_error="raise",
            max_wait=ENOUGH,
        ),
        Concurrency(PLACES, by=_all, store=store, on_store_error="raise", max_wait=ENOUGH),
    ]
    ready.wait(ENOUGH)
    end = time.monotonic() + seconds
    clock: Any = {"clock": WrongClock()} if number == 0 else {}
    if number % 2 == 0:

        class Provider:
            def complete(self, request: Request) -> Response:
                entered = time.monotonic()
                time.sleep(0.005)
                inside.append((entered, time.monotonic()))
                return _response()

        pipeline = Pipeline(Provider(), layers, **clock)
        while time.monotonic() < end:
            pipeline.complete(REQUEST)
    else:

        class AsyncProvider:
            async def complete(self, request: Request) -> Response:
                entered = time.monotonic()
                await anyio.sleep(0.005)
                inside.append((entered, time.monotonic()))
                return _response()

        async def work() -> None:
            while time.monotonic() < end:
                await apipeline.complete(REQUEST)

        async def main() -> None:
            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(work)

        apipeline = AsyncPipeline(AsyncProvider(), layers)
        run_async(main, "asyncio" if number % 4 == 1 else "trio")
    return store.granted, inside


def _all(_: Request) -> str:
    return "all"


def _tokens(_: Request) -> float:
    return float(TOKENS)


def _response() -> Response:
    return Response("fine", usage=Usage(input_tokens=TOKENS - 1, output_tokens=1))


def hold_a_place(url: str, told: Any) -> None:
    """Take a place, say so, and keep it."""
    store = RedisStore(url, lease_seconds=1)
    assert store.lease("k", "holder", 1, 0.0) is None
    told.put("held")
    time.sleep(ENOUGH)


def wait_in_queues(url: str, told: Any) -> None:
    """Wait for a place and for a limit that others have, and ask for them again and again."""
    from fluxibly.stores import Limit

    store = RedisStore(url)
    limit = (Limit("requests", 0.1, 1.0, 1.0),)
    store.lease("k", "first", 1, 0.0)
    store.reserve("r", "first", limit, 0.0)
    told.put("waits")
    while True:
        store.lease("k", "first", 1, 0.0)
        store.reserve("r", "first", limit, 0.0)
        time.sleep(0.05)


def spend(url: str, tokens: int) -> int:
    """Make calls until a budget is used up, and return the tokens that they have taken."""
    layer = Budget(tokens=tokens, store=url, on_store_error="raise")
    spent = 0

    class Provider:
        def complete(self, request: Request) -> Response:
            return Response("fine", usage=Usage(input_tokens=12, output_tokens=8))

    pipeline = Pipeline(Provider(), [layer])
    while True:
        try:
            used = pipeline.complete(REQUEST).usage
        except BudgetExceeded:
            return spent
        spent += used.input_tokens + used.output_tokens


def open_a_circuit_and_answer(url: str) -> None:
    """Let a circuit open, and keep an answer."""
    with suppress(ServerError):
        Pipeline(ScriptedProvider(ServerError("down")), [CircuitBreaker(failures=1, store=url)]).complete(REQUEST)
    Pipeline(ScriptedProvider("kept"), [Cache(url, namespace="shared")]).complete(REQUEST)


def find_a_circuit_and_answer(url: str) -> tuple[bool, str, bool | None]:
    """Return whether a circuit is open, the answer, and whether it came from the cache."""
    try:
        Pipeline(ScriptedProvider("fine"), [CircuitBreaker(failures=1, store=url)]).complete(REQUEST)
        is_open = False
    except CircuitOpen:
        is_open = True
    found = Pipeline(ScriptedProvider("new"), [Cache(url, namespace="shared")]).complete(REQUEST)
    return is_open, found.text, found.cache_hit


# Processes


def forkserver() -> Any:
    """Return the context of processes that start fast, because the server that forks them has loaded the library."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "redis", "trio", "anyio._backends._asyncio", "anyio._backends._trio"])
    with pytest.MonkeyPatch.context() as patched:  # older versions of Python do not tell the server where modules are
        patched.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        ensure_running()
    return context


def _answer(answers: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    answers.put(work(*args))


@contextmanager
def process(work: Callable[..., Any], *args: Any) -> Iterator[Any]:
    """Run a function in another process, and kill that at the end. `pid` is its number."""
    started = forkserver().Process(target=work, args=args, daemon=True)
    started.start()
    try:
        yield started
    finally:
        started.kill()
        started.join(ENOUGH)


def in_processes(work: Callable[..., Any], *args: tuple[Any, ...]) -> list[Any]:
    """Run a function once for each tuple of arguments, in processes of their own, and return what they return."""
    context = forkserver()
    answers = context.Queue()
    started = [context.Process(target=_answer, args=(answers, work, each), daemon=True) for each in args]
    for each in started:
        each.start()
    found = [answers.get(timeout=ENOUGH) for _ in started]
    for each in started:
        each.join(ENOUGH)
    answers.close()
    answers.join_thread()
    return found
