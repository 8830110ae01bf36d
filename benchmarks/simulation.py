"""A discrete-event simulation of clients of a language model: the real pipeline and middleware, on an event loop in virtual time.

`VirtualLoop` is asyncio's own loop with a selector that never waits: when nothing is ready, its time jumps to the next timer.
`Service` is a service with limits of requests and tokens, which may send them as headers, and may slow down under load.
"""

from __future__ import annotations

import asyncio
import math
import random
import selectors
import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any, Literal, TypeVar

import attrs

from fluxibly import AsyncPipeline, Middleware, Request, Response, Usage
from fluxibly._drivers.stack import SystemClock
from fluxibly.errors import FluxiblyError, RateLimitError
from fluxibly.types import ProviderInfo

T = TypeVar("T")
Headers = Literal["openai", "anthropic"] | None
_EPOCH = 1_800_000_000.0
"""The time on the services' clocks at the beginning, in seconds since 1970."""


class _Selector(selectors.DefaultSelector):
    """A selector that lets virtual time pass in place of waiting."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise RuntimeError("nothing will ever happen again: all tasks wait for something that nobody does")
            self.now += max(0.0, timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only while all of its tasks wait, and then at once."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


class LoopClock(SystemClock):
    """The clock of pipelines that run in a `VirtualLoop`."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.now = loop.time


def run(main: Callable[[LoopClock], Awaitable[T]]) -> T:
    """Run an async function in virtual time."""
    loop = VirtualLoop()

    async def wait() -> T:
        return await main(LoopClock(loop))

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(wait())


class Bucket:
    """A token bucket: it fills with `rate` units a second, up to `size`."""

    def __init__(self, rate: float, size: float) -> None:
        self.rate, self.size = rate, size
        self.left = size
        self.at = 0.0

    def refill(self, now: float) -> None:
        self.left = min(self.size, self.left + (now - self.at) * self.rate)
        self.at = now

    def wait(self, cost: float) -> float:
        return max(0.0, (cost - self.left) / self.rate)

    def reset(self) -> float:
        """Return the seconds until all of it is there again."""
        return (self.size - self.left) / self.rate

    def set_rate(self, rate: float) -> None:
        self.size *= rate / self.rate
        self.left = min(self.left, self.size)
        self.rate = rate


class Window(Bucket):
    """A fixed window: all of the limit is there again when the next one begins. Each allows `rate * seconds`."""

    def __init__(self, rate: float, seconds: float = 60.0) -> None:
        super().__init__(rate, rate * seconds)
        self.seconds = seconds
        self.ends_at = seconds

    def refill(self, now: float) -> None:
        self.at = now
        while now >= self.ends_at:
            self.left = self.size
            self.ends_at += self.seconds

    def wait(self, cost: float) -> float:
        return 0.0 if cost <= self.left else self.ends_at - self.at

    def reset(self) -> float:
        return self.ends_at - self.at


@attrs.define(slots=False, eq=False)
class Service:
    """A provider of one service, for any number of clients.

    Args:
        requests, tokens: its limits.
        headers: the family whose rate-limit headers it sends.
        retry_after: whether a refusal says when to try again, in whole seconds.
        latency: the seconds of an answer, half of them longer.
        spread: the standard deviation of the logarithm of the length of answers, on which most of latency depends; 0: all are alike.
        knee: the requests at once from which on it slows down in proportion; infinite: never.
        used: the tokens of an answer, input and output together, half of them more.
    """

    requests: Bucket
    tokens: Bucket | None = None
    headers: Headers = None
    retry_after: bool = False
    latency: float = 2.0
    spread: float = 0.4
    knee: float = math.inf
    used: float = 300.0
    seed: int = 1
    clock: Callable[[], float] = lambda: 0.0
    at_work: int = 0
    most_at_work: int = 0
    sent: list[float] = attrs.field(factory=list[float])
    """When each request came."""
    refused: list[float] = attrs.field(factory=list[float])
    """When each that was refused came."""
    answered: list[tuple[float, float]] = attrs.field(factory=list[tuple[float, float]])
    """When each answer was whole, and after how many seconds."""

    info = ProviderInfo(name="Service", framework="simulated", telemetry_name="simulated", in_process=True)

    def __attrs_post_init__(self) -> None:
        self.random = random.Random(self.seed)  # noqa: S311  # a simulation

    async def complete(self, request: Request) -> Response:
        now = self.clock()
        self.sent.append(now)
        length = self.random.lognormvariate(0.0, self.spread)
        used = self.used * length
        limits = [(self.requests, 1.0), *([] if self.tokens is None else [(self.tokens, used)])]
        for limit, _ in limits:
            limit.refill(now)
        wait = max(limit.wait(cost) for limit, cost in limits)
        if wait > 0:
            self.refused.append(now)
            headers = self._told()
            await asyncio.sleep(0.05)
            raise RateLimitError(
                "too many requests", retry_after=math.ceil(wait) if self.retry_after else None, rate_limits=headers
            )
        for limit, cost in limits:
            limit.left -= cost
        headers = self._told()
        self.at_work += 1
        self.most_at_work = max(self.most_at_work, self.at_work)
        try:
            seconds = self.latency * (0.2 + 0.8 * length) * self.random.lognormvariate(0.0, self.spread / 2)
            await asyncio.sleep(seconds * max(1.0, self.at_work / self.knee))
        finally:
            self.at_work -= 1
        self.answered.append((self.clock(), self.clock() - now))
        output = max(1, int(used * 0.5))
        usage = Usage(input_tokens=max(1, int(used) - output), output_tokens=output)
        return Response("fine", usage=usage, finish_reason="stop", rate_limits=headers)

    def _told(self) -> dict[str, str]:
        told: dict[str, str] = {}
        if self.headers is None:
            return told
        limits: Mapping[str, Bucket | None] = {"requests": self.requests, "tokens": self.tokens}
        for name, limit in limits.items():
            if limit is None:
                continue
            total, left, reset = f"{limit.size:.0f}", f"{max(0.0, math.floor(limit.left)):.0f}", limit.reset()
            if self.headers == "openai":
                told |= {
                    f"x-ratelimit-limit-{name}": total,
                    f"x-ratelimit-remaining-{name}": left,
                    f"x-ratelimit-reset-{name}": f"{max(1, round(reset * 1000))}ms",
                }
            else:
                now = _EPOCH + self.clock()
                moment = datetime.fromtimestamp(math.ceil(now + reset), UTC)
                told |= {
                    f"anthropic-ratelimit-{name}-limit": total,
                    f"anthropic-ratelimit-{name}-remaining": left,
                    f"anthropic-ratelimit-{name}-reset": moment.strftime("%Y-%m-%dT%H:%M:%SZ"),
                    "date": format_datetime(datetime.fromtimestamp(math.floor(now), UTC), usegmt=True),
                }
        return told

    def rate(self, begin: float, end: float) -> float:
        """Return the answers a minute between two times."""
        return 60 * sum(begin <= at < end for at, _ in self.answered) / (end - begin)

    def share_refused(self, begin: float, end: float) -> float:
        sent = sum(begin <= at < end for at in self.sent)
        return sum(begin <= at < end for at in self.refused) / max(1, sent)

    def median_latency(self, begin: float, end: float) -> float:
        return statistics.median([took for at, took in self.answered if begin <= at < end] or [math.nan])


@attrs.frozen
class Client:
    """A client that always has `at_once` calls under way, through a stack of its own."""

    stack: Sequence[Middleware]
    at_once: int = 200


def simulate(
    service: Service,
    clients: Sequence[Client],
    seconds: float,
    events: Mapping[float, Callable[[], object]] | None = None,
) -> list[list[str]]:
    """Let clients ask a service for some virtual seconds. Return the errors of each client's calls.

    Args:
        events: what happens at some times.
    """
    errors: list[list[str]] = [[] for _ in clients]

    async def main(clock: LoopClock) -> None:
        service.clock = clock.now

        async def work(pipeline: AsyncPipeline, errors: list[str]) -> None:
            request = Request(model="m", messages="How many inhabitants does the capital of France have?" * 10)
            while True:
                try:
                    await pipeline.complete(request)
                except FluxiblyError as error:
                    errors.append(type(error).__name__)
                    await asyncio.sleep(0.5)

        tasks: list[asyncio.Future[None]] = []
        for client, own in zip(clients, errors, strict=True):
            pipeline = AsyncPipeline(service, client.stack, clock=clock)
            tasks += [asyncio.ensure_future(work(pipeline, own)) for _ in range(client.at_once)]
        for at, happen in (events or {}).items():
            asyncio.get_running_loop().call_at(at, happen)
        await asyncio.sleep(seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    state = random.getstate()
    random.seed(service.seed)  # for the jitter of Retry
    try:
        run(main)
    finally:
        random.setstate(state)
    return errors
