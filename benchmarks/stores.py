"""The cost of a store on a Redis server, and how evenly processes share one rate through it.

Run with `python -m benchmarks.stores`. It starts a `redis-server` of its own, and needs the package redis.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any

from benchmarks.measure import interleaved, left_out, table
from fluxibly import Pipeline, Request, Response
from fluxibly.middleware import RateLimit
from fluxibly.stores import Limit, RedisStore

TRIPS = 300
PROCESSES = 8
SECONDS = 5.0
RATE = 200
BURST = 20
ALLOWED = RATE * SECONDS + BURST
PEERS = ("pyrate_limiter", "limits", "throttled")

Acquire = Callable[[], bool]
"""Waits for its turn, and takes one of the rate. It returns whether it has got it."""


@contextmanager
def server() -> Iterator[str]:
    """Start a server on a free port, and yield its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = ["redis-server", "--port", f"{port}", "--bind", "127.0.0.1", "--save", "", "--dir", folder]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603  # the program of the name
        try:
            while socket.socket().connect_ex(("127.0.0.1", port)):
                time.sleep(0.02)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.kill()
            process.wait()


# The cost of a trip


def trips(url: str) -> None:
    """Time each method against a bare GET, all over the same connection."""
    store = RedisStore(url)
    numbers = count()
    requests = Limit("requests", 1e6, 1e6, 1.0)
    both = (requests, Limit("tokens", 1e9, 1e9, 500.0))
    ask = store._connections.ask
    ask(("SET", "plain", "x" * 200))

    def names(action: Callable[[str], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(TRIPS):
                action(f"{next(numbers)}")

        return run

    def lease(who: str) -> None:
        store.lease("places", who, 10, 0.0)
        store.release("places", who, 0.0)

    store.save("kept", b"x" * 200, 60.0, 0.0)
    contenders: dict[str, Callable[[str], object]] = {
        "GET": lambda _: ask(("GET", "plain")),
        "reserve, two limits": lambda who: store.reserve("limit", who, both, 0.0),
        "reserve, one limit": lambda who: store.reserve("requests", who, (requests,), 0.0),
        "correct": lambda _: store.correct("limit", both[1]._replace(cost=-100.0), 0.0),
        "lease and release (two trips)": lease,
        "add, for good": lambda _: store.add("sum", 1.0, None, 0.0),
        "add, over a time": lambda _: store.add("in time", 1.0, 60.0, 0.0),
        "load": lambda _: store.load("kept", 0.0),
        "save": lambda _: store.save("kept", b"x" * 200, 60.0, 0.0),
    }
    results = interleaved({name: names(action) for name, action in contenders.items()}, per_run=TRIPS)
    store.close()
    table("A trip to a Redis server", results, goal="reserve at most 2.2 × a GET")


# One rate for many processes


class _Fixed:
    def complete(self, request: Request) -> Response:
        return Response("fine")


def _ours(url: str, **settings: Any) -> Acquire:
    layer = RateLimit(requests=RATE, per=1.0, burst=BURST, store=url, on_store_error="raise", **settings)
    complete, request = Pipeline(_Fixed(), [layer]).complete, Request(model="m", messages="x")
    return lambda: bool(complete(request).text)


def _pyrate_limiter(url: str) -> Acquire:
    import pyrate_limiter as library
    import redis

    bucket = library.RedisBucket.init([library.Rate(RATE, 1000)], redis.Redis.from_url(url), "pyrate")
    limiter = library.Limiter(bucket)
    return lambda: bool(limiter.try_acquire("all"))


def _limits(url: str) -> Acquire:
    import limits as library

    window = library.strategies.MovingWindowRateLimiter(library.storage.storage_from_string(url))
    rate = library.RateLimitItemPerSecond(RATE)

    def acquire() -> bool:
        while not window.hit(rate, "all"):
            time.sleep(0.005)
        return True

    return acquire


def _throttled(url: str) -> Acquire:
    import throttled as library

    store = library.RedisStore(server=url)
    quota = library.rate_limiter.per_sec(RATE, burst=BURST)
    limiter = library.Throttled(key="all", using="gcra", quota=quota, store=store, timeout=5)
    return lambda: not limiter.limit().limited


MAKERS: dict[str, Callable[[str], Acquire]] = {
    "fluxibly": partial(_ours, block=0.0),
    "fluxibly, requests and tokens": partial(_ours, block=0.0, tokens=1e9),
    "fluxibly, in blocks": _ours,
    "pyrate-limiter": _pyrate_limiter,
    "limits": _limits,
    "throttled-py": _throttled,
}


def _work(name: str, url: str, ready: Any, begins: Any, answers: Any) -> None:
    """Acquire for some seconds as often as the rate allows, and report the times, and the seconds of CPU."""
    acquire = MAKERS[name](url)
    ready.wait()
    begin = begins.get()
    time.sleep(max(0.0, begin - time.monotonic()))
    cpu = time.process_time()
    times: list[float] = []
    while (now := time.monotonic()) < begin + SECONDS:
        if acquire():
            now = time.monotonic()
            if now < begin + SECONDS:
                times.append(now)
    answers.put((times, time.process_time() - cpu))


def share(name: str, url: str) -> None:
    """Let processes that always want more share one rate, and print what they have got."""
    spawn = multiprocessing.get_context("spawn")
    ready, begins, answers = spawn.Barrier(PROCESSES + 1), spawn.Queue(), spawn.Queue()
    processes = [spawn.Process(target=_work, args=(name, url, ready, begins, answers)) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    ready.wait()
    begin = time.monotonic() + 0.3
    for _ in processes:
        begins.put(begin)
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    counts = [len(times) for times, _ in found]
    every = sorted(time for times, _ in found for time in times)
    most = first = 0
    for last, at in enumerate(every):
        while every[first] <= at - 1.0:
            first += 1
        most = max(most, last - first + 1)
    spread = (max(counts) - min(counts)) / max(counts)
    print(
        f"  {name:30}  {len(every):5} ({len(every) / ALLOWED:6.1%})  {most:11}  {min(counts):4} to {max(counts):4} "
        f"({spread:5.1%})  {sum([cpu for _, cpu in found]):6.2f} s"
    )


def main() -> None:
    if shutil.which("redis-server") is None or importlib.util.find_spec("redis") is None:
        left_out(["redis-server and redis"])
        return
    missing = [peer for peer in PEERS if importlib.util.find_spec(peer) is None]
    with server() as url:
        trips(url)
    print(
        f"\n{PROCESSES} processes for {SECONDS:g} s at {RATE}/s with a burst of {BURST}   (goal: at least 98 % of "
        f"{ALLOWED:g} granted, a spread of at most 10 %)\n"
        f"  {'':30}  {'granted':14}  most in 1 s  of each process (spread)  CPU of all"
    )
    for name, maker in MAKERS.items():
        if maker.__name__.lstrip("_") not in missing if not isinstance(maker, partial) else True:
            with server() as url:
                share(name, url)
    left_out(missing)


if __name__ == "__main__":
    main()
