"""How near to the limits of a service its clients come: fixed numbers of calls at once, and what fluxibly finds by itself.

Run with `python -m benchmarks.adaptive`. The clients are the real pipelines and middleware, in virtual time (`simulation.py`). A run
is of 120 virtual seconds; that of 60,000 requests a minute of 40, because it takes as long as all others together.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from benchmarks.simulation import Bucket, Client, Headers, Service, Window, simulate
from fluxibly import Middleware
from fluxibly.middleware import Concurrency, RateLimit, Retry
from fluxibly.stores import MemoryStore

SECONDS = 120.0
MIDWAY = 60.0
BUCKET = 10.0
"""The burst of a service, in seconds of its rate."""
QUEUE = 100_000
Stack = list[Middleware]


class Case(NamedTuple):
    """A scenario: a service, and what happens to it midway."""

    make: Callable[[Headers], Service]
    at_once: int = 200
    """The calls that all clients together have under way."""
    seconds: float = SECONDS
    midway: Callable[[Service], object] | None = None
    headers: Sequence[Headers] = ("openai", None)


def of(
    rpm: float,
    *,
    tpm: float | None = None,
    latency: float = 2.0,
    knee: float = math.inf,
    retry_after: bool = False,
    windows: bool = False,
) -> Callable[[Headers], Service]:
    """Return a function that makes a service with limits a minute, which sends some headers."""

    def limit(rate: float) -> Bucket:
        return Window(rate / 60) if windows else Bucket(rate / 60, rate / 60 * BUCKET)

    def make(headers: Headers) -> Service:
        tokens = None if tpm is None else limit(tpm)
        return Service(
            limit(rpm), tokens, headers=headers, latency=latency, knee=knee, retry_after=retry_after, used=250.0
        )

    return make


def to_a_third(service: Service) -> None:
    service.requests.set_rate(service.requests.rate / 3)


CASES: Mapping[str, Case] = {
    "3,000 rpm and 1.2 M tpm": Case(of(3000, tpm=1_200_000)),
    "it falls to 1,000 rpm midway": Case(of(3000, tpm=1_200_000), midway=to_a_third),
    "60,000 rpm, slower past 400 at once": Case(of(60_000, latency=1.3, knee=400), at_once=1000, seconds=40),
    "60 rpm": Case(of(60), at_once=8, seconds=600, headers=("openai", "anthropic", None)),
    "3,000 rpm in windows, Retry-After": Case(of(3000, windows=True, retry_after=True), seconds=180),
    "400,000 tpm": Case(of(30_000, tpm=400_000)),
}


def alone(stack: Callable[[], Stack]) -> Callable[[int], list[Client]]:
    return lambda at_once: [Client([Retry(max_retries=100), *stack()], at_once)]


def two(store: MemoryStore | None) -> Callable[[int], list[Client]]:
    """Return a function that makes two clients, which share a store, or nothing."""

    def make(at_once: int) -> list[Client]:
        layers = [RateLimit() if store is None else RateLimit(store=store) for _ in range(2)]
        return [Client([Retry(max_retries=100), layer], at_once // 2) for layer in layers]

    return make


FIXED = {
    "fixed 50": alone(lambda: [Concurrency(50, queue=QUEUE)]),
    "fixed 100": alone(lambda: [Concurrency(100, queue=QUEUE)]),
}


def ours() -> dict[str, Callable[[int], list[Client]]]:
    return {
        "RateLimit()": alone(lambda: [RateLimit()]),
        "RateLimit(), Concurrency('auto')": alone(lambda: [RateLimit(), Concurrency("auto", queue=QUEUE)]),
        "two RateLimit(), one store": two(MemoryStore()),
        "two RateLimit(), no store": two(None),
    }


def seconds_to_recover(service: Service, since: float, until: float) -> float:
    """Return the seconds after a change until calls are sent at the rate, within a tenth, and hardly one is refused."""
    for second in range(int(until - since) - 5):
        begin, end = since + second, since + second + 5
        sent = 12 * sum(begin <= at < end for at in service.sent)
        if abs(sent / (60 * service.requests.rate) - 1) <= 0.1 and service.share_refused(begin, end) <= 0.1:
            return float(second)
    return math.nan


def row(name: str, case: Case, headers: Headers, clients: list[Client]) -> None:
    """Run a scenario, and print its line of the table."""
    service = case.make(headers)
    events: dict[float, Callable[[], object]] = {}
    if case.midway is not None:
        events[MIDWAY] = partial(case.midway, service)
    errors = simulate(service, clients, case.seconds, events)
    answers, refused = service.rate(0, case.seconds), service.share_refused(0, case.seconds)
    later, latency = service.rate(20, case.seconds), service.median_latency(20, case.seconds)
    line = f"  {name:34} {headers or '-':>9} {answers:9,.0f} {later:9,.0f} {refused:7.1%} {latency:7.2f}"
    if case.midway is not None:
        line += f" {seconds_to_recover(service, MIDWAY, case.seconds):9.0f}"
    failed = sum(map(len, errors))
    print(line + (f"   {failed:,} calls failed" if failed else ""), flush=True)


def main() -> None:
    logging.getLogger("fluxibly").setLevel(logging.ERROR)  # thousands of retries
    for title, case in CASES.items():
        print(f"\n{title}   ({case.seconds:.0f} s, {case.at_once} calls under way)")
        columns = f"{'answers/min':>9} {'after 20s':>8} {'429s':>6} {'p50, s':>7}"
        print(f"  {'':34} {'headers':>9} {columns}" + ("   recovers, s" if case.midway else ""))
        for name, make in FIXED.items():
            row(name, case, None, make(case.at_once))
        for headers in case.headers:
            for name, make in ours().items():
                row(name, case, headers, make(case.at_once))


if __name__ == "__main__":
    main()
