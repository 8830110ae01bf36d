"""Many calls at once through random stacks of a production's middleware, in virtual time.

Each layer is watched from both sides: what reaches it, and what passes it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from support.leftovers import left_in
from support.simulation import Call, Reply, Simulation
from support.stores import METHODS, SlowStore
from support.strategies import check_rate

from fluxibly._logs import logger
from fluxibly.calls import Spent
from fluxibly.errors import (
    BadRequest,
    ConnectionFailed,
    FluxiblyError,
    Overloaded,
    RateLimitError,
    ServerError,
    StreamInterrupted,
)
from fluxibly.middleware import (
    Balance,
    Budget,
    CircuitBreaker,
    Concurrency,
    Cost,
    Deadline,
    Fallback,
    Guard,
    Hedge,
    RateLimit,
    Redact,
    Retry,
    RetryBudget,
    StreamTimeout,
)
from fluxibly.middleware._keys import name_of
from fluxibly.middleware._shared import ON_STORE_ERROR
from fluxibly.stores import MemoryStore
from fluxibly.types import Chunk, Request, Response, Restart, Usage

WINDOW = 10.0
"""The seconds that a budget of retries counts."""
PRECISION = 0.01
"""The seconds by which it may forget too early."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Let nobody read the warnings of thousands of calls."""
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


class Reached:
    """One request at one layer."""

    def __init__(self, request: Request, now: float, number: int) -> None:
        self.request, self.at, self.number = request, now, number
        self.passed: list[Request] = []
        """What the layer has let pass."""
        self.failed_at: float | None = None
        """When the last of these failed."""


class Watched:
    """A layer that is watched."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.under_way = 0
        self.reached = 0
        self.problems: list[AssertionError] = []
        """What was found while calls ran. The layers further out might handle an error that is raised there."""

    def look(self, what: Callable[..., None], *args: Any) -> None:
        try:
            what(*args)
        except AssertionError as problem:
            self.problems.append(problem)

    def __call__(self, request, call_next):
        clock = request.call.clock
        reached = Reached(request, clock(), self.reached)
        self.reached += 1

        def passing(asked):
            self.look(self.passes, reached, asked, clock())
            reached.passed.append(asked)
            try:
                return (yield from call_next(asked))
            except Exception:
                reached.failed_at = clock()
                raise
            finally:
                self.ends(asked)

        self.under_way += 1
        leash = request.call.leash
        try:
            self.arrives(reached)
            return (yield from self.layer(request, passing))
        finally:
            self.under_way -= 1
            self.look(self.leaves, reached, clock(), request.call.leash is leash)

    def arrives(self, reached: Reached) -> None:
        """Look at a request that comes to the layer."""

    def passes(self, reached: Reached, asked: Request, now: float) -> None:
        """Look at a request that the layer lets pass."""

    def ends(self, asked: Request) -> None:
        """Note that a request that had passed has ended."""

    def leaves(self, reached: Reached, now: float, leash_is_back: bool) -> None:
        """Note that the layer is done with a request."""
        assert leash_is_back

    def check(self) -> None:
        """Check what is left when all calls are over."""
        if self.problems:
            raise self.problems[0]
        assert self.under_way == 0
        if self.has_store:
            assert left_in(self.layer.store) == {}
            assert not self.layer._shared._owed

    def key(self, asked: Request) -> str:
        return name_of(asked.call.info_of(asked.target), asked, self.layer.by)

    def forget(self) -> None:
        """Forget how limits were kept, because they hold in the store and in what takes its place, and not in both together."""
        self.problems.clear()

    @property
    def has_store(self) -> bool:
        return hasattr(self.layer, "store")

    @property
    def is_near(self) -> bool:
        """Whether nothing can come between what a layer learns from its store and what it does."""
        return self.layer.store.local


class Bounding(Watched):
    """`Deadline`: a call ends in time."""

    def leaves(self, reached, now, leash_is_back):
        super().leaves(reached, now, leash_is_back)
        assert now <= reached.at + self.layer.seconds + 1e-9


class GoingOn(Watched):
    """`Fallback` and `Balance`: each target is asked once at most."""

    def passes(self, reached, asked, now):
        models = [request.model for request in (*reached.passed, asked)]
        assert len(models) == len({*models})

    def check(self):
        super().check()
        if isinstance(self.layer, Balance):
            for place in self.layer._load.places:
                assert (place.busy, place.waiting) == (0, ({}, {}))


class Hedging(Watched):
    """`Hedge`: its share of the last hundred calls, and of each call."""

    def __init__(self, layer):
        super().__init__(layer)
        self.recent: deque[int] = deque(maxlen=100)

    def arrives(self, reached):
        self.recent.append(0)

    def passes(self, reached, asked, now):
        if reached.passed:
            self.recent[-1] += 1
            assert sum(self.recent) <= max(1, self.layer.max_share * len(self.recent)) or self.layer.max_share == 1
            assert len(reached.passed) <= self.layer.at_most


class Retrying(Watched):
    """`Retry`: the retries of each call, and the budget of all."""

    def __init__(self, layer):
        super().__init__(layer)
        self.calls: list[float] = []
        self.retries: list[float] = []

    def arrives(self, reached):
        self.calls.append(reached.at)

    def passes(self, reached, asked, now):
        assert len(reached.passed) <= max([self.layer.max_retries, *self.layer.limits.values()])
        if not reached.passed:
            return
        taken = reached.failed_at
        self.retries.append(taken)
        budget = self.layer.budget
        if budget is not None:
            calls = sum(taken - WINDOW - PRECISION <= time <= taken for time in self.calls)
            retries = sum(taken - WINDOW + PRECISION < time <= taken for time in self.retries)
            assert retries <= max(budget.floor, budget.ratio * calls)


class Breaking(Watched):
    """`CircuitBreaker`: nothing passes while it is open, and no more than its probes while it is half-open."""

    def __init__(self, layer):
        super().__init__(layer)
        self.probes: Counter[str] = Counter()
        self.probing: dict[int, str] = {}

    def passes(self, reached, asked, now):
        key = self.key(asked)
        entry = getattr(self.layer.store, "inner", self.layer.store).load(f"circuit {key}", now)
        if self.is_near and entry is not None and entry.value.startswith(b"open "):
            assert entry.left <= 86_400 + 1e-6
            self.probes[key] += 1
            self.probing[id(asked)] = key
            assert self.probes[key] <= self.layer.probes

    def ends(self, asked):
        if (key := self.probing.pop(id(asked), None)) is not None:
            self.probes[key] -= 1


class Queueing(Watched):
    """Layers that let calls wait: in turn, and not too long."""

    def __init__(self, layer):
        super().__init__(layer)
        self.last: dict[str, int] = {}

    def passes(self, reached, asked, now):
        key = self.key(asked)
        assert now - reached.at <= self.layer.max_wait + 1e-6
        if self.is_near:
            assert reached.number >= self.last.get(key, -1), "not first come, first served"
        self.last[key] = reached.number

    def leaves(self, reached, now, leash_is_back):
        super().leaves(reached, now, leash_is_back)
        if not reached.passed:
            assert now - reached.at <= self.layer.max_wait + 1e-6


class Rating(Queueing):
    """`RateLimit`: no window of time has more than its rate and burst."""

    def __init__(self, layer):
        super().__init__(layer)
        self.times: dict[str, list[float]] = {}

    def passes(self, reached, asked, now):
        super().passes(reached, asked, now)
        self.times.setdefault(self.key(asked), []).append(now)

    def forget(self):
        super().forget()
        self.times.clear()

    def check(self):
        super().check()
        for times in self.times.values():
            check_rate(times, self.layer, TOKENS if self.layer.estimate and not self.layer.give_back else 0)


class Placing(Queueing):
    """`Concurrency`: no more at once than its limit."""

    def __init__(self, layer):
        super().__init__(layer)
        self.at_once: Counter[str] = Counter()

    def passes(self, reached, asked, now):
        super().passes(reached, asked, now)
        self.at_once[self.key(asked)] += 1
        assert self.at_once[self.key(asked)] <= self.layer.limit

    def ends(self, asked):
        self.at_once[self.key(asked)] -= 1

    def is_fair(self):
        """Check that nobody waits while a place is free."""
        if self.is_near:
            for places in self.layer.store._places.values():
                assert not places.waiting or len(places.held) == self.layer.limit

    def check(self):
        super().check()
        assert not any(self.at_once.values())


class Spending(Watched):
    """`Budget`: what is reserved never exceeds it, and what is counted in the end is what was spent."""

    def __init__(self, layer):
        super().__init__(layer)
        self.spent: dict[int, list[Spent]] = {}
        """The list of each call, which its branches share."""

    def arrives(self, reached):
        self.spent[id(reached.request.call.spent)] = reached.request.call.spent

    def passes(self, reached, asked, now):
        if self.is_near:
            assert self.total(now) <= self.layer.tokens

    def total(self, now):
        per = self.layer.per
        key = f"budget instance{'' if per is None else f' per {per:g}'} tokens"
        return getattr(self.layer.store, "inner", self.layer.store).add(key, 0.0, per, now)

    def forget(self):
        super().forget()
        self.spent.clear()

    def check(self):
        super().check()
        if self.layer.per is None and self.spent:
            entries = [each for spent in self.spent.values() for each in spent]
            assert self.total(0.0) == sum((each.guess or each.usage).total_tokens for each in entries)


TOKENS = 30
"""What each request is estimated at where no token is given back, which is more than it uses."""
DOWN = (ServerError, Overloaded, ConnectionFailed)


def maybe(kind: type[Watched], make: Any, **settings: Any) -> st.SearchStrategy[Any]:
    """Draw a function of a store that makes a watched layer, or None."""
    drawn = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in settings.items()})
    return st.none() | drawn.map(lambda chosen: lambda store: kind(make(store, **chosen)))


def rate_limit(store, *, tokens, estimate, **settings):
    if settings["requests"] is None and tokens is None:
        tokens = 600
    if estimate:
        settings["give_back"] = False
    return RateLimit(store=store, tokens=tokens, estimate=(lambda _: TOKENS) if estimate else None, **settings)


def retry(_, *, budget, **settings):
    made = None if budget is None else RetryBudget(ratio=budget[0], floor=budget[1])
    return Retry(budget=made, uniform=max, **settings)


def _of_no_store(kind: Any) -> Any:
    return lambda _, **settings: kind(**settings)


BYS = ("provider", "provider and model", "provider and model")
STACKS = st.tuples(
    maybe(Watched, _of_no_store(Cost), prices=[{"m": (1, 1)}]),
    maybe(Bounding, _of_no_store(Deadline), seconds=[0.5, 3.0, 20.0]),
    maybe(Watched, _of_no_store(Redact), patterns=[("email", "card")], restore=[False, True]),
    maybe(Watched, _of_no_store(Guard), output=[lambda _: None], release=["all", "sentence", 3]),
    st.one_of(
        maybe(GoingOn, _of_no_store(Fallback), to=[["m-2"], ["m-2", "m-3"]], on_interrupt=["raise", "restart"]),
        maybe(
            GoingOn,
            _of_no_store(Balance),
            to=[["m", "m-2"], ["m", "m-2", "m-3"]],
            policy=["round_robin", "random", "least_busy", "fastest"],
            cool_down=[0.0, 1.0, 30.0],
        ),
    ),
    maybe(
        Hedging,
        _of_no_store(Hedge),
        after=[0.5, 2.0, "p50", "p90"],
        to=[None, None, ["m-4"]],
        at_most=[1, 2],
        max_share=[0.0, 0.1, 0.5, 1.0],
    ),
    maybe(
        Retrying,
        retry,
        max_retries=[0, 1, 3],
        max_retry_after=[2.0, 60.0],
        on_interrupt=["raise", "restart"],
        limits=[{}, {}, {RateLimitError: 5, ServerError: 1}],
        decide=[None, None, lambda error, n: True if isinstance(error, BadRequest) else None],
        budget=[None, (0.2, 2), (0.0, 1), (1.0, 0)],
    ),
    maybe(
        Breaking,
        lambda store, **chosen: CircuitBreaker(store=store, **chosen),
        failures=[1, 2, 5],
        within=[2.0, 30.0],
        open_for=[0.5, 10.0],
        probes=[1, 3],
        by=BYS,
        on_store_error=ON_STORE_ERROR,
    ),
    maybe(
        Spending,
        lambda store, **chosen: Budget(store=store, **chosen),
        tokens=[100.0, 1000.0, 1e6],
        per=[None, 5.0, 60.0],
        on_store_error=ON_STORE_ERROR,
    ),
    maybe(
        Rating,
        rate_limit,
        requests=[None, 5.0, 50.0],
        tokens=[None, None, 300.0, 3000.0],
        per=[1.0, 10.0],
        burst=[None, 30.0, 100.0],
        max_wait=[0.0, 3.0, 60.0],
        estimate=[False, True],
        give_back=[True, False],
        by=BYS,
        on_store_error=ON_STORE_ERROR,
    ),
    maybe(
        Placing,
        lambda store, **chosen: Concurrency(store=store, **chosen),
        limit=[1, 2, 8],
        queue=[0, 3, 1000],
        max_wait=[0.0, 3.0, 60.0],
        by=BYS,
        on_store_error=ON_STORE_ERROR,
    ),
    maybe(Watched, _of_no_store(StreamTimeout), first_chunk=[None, 1.0, 4.0], idle=[0.3, 1.0]),
)
ORDERS = st.none() | st.permutations(range(12))
"""None is the documented order."""
STORES = st.sampled_from([MemoryStore, MemoryStore, MemoryStore, SlowStore])


class Provider:
    """Answers at random: late, with failures of all kinds, and down for a while. No text is given twice."""

    def __init__(self, chance: random.Random, failing: float) -> None:
        self.chance, self.failing = chance, failing
        self.numbers = count()
        self.whole: set[str] = set()
        """The texts of whole answers."""

    def __call__(self, made: Call) -> Reply:
        chance, name = self.chance, f"<{next(self.numbers)}>"
        pieces = [name, *[f"{name}{n}" for n in range(chance.randrange(4))]]
        usage = Usage(input_tokens=chance.randrange(10), output_tokens=chance.randrange(20))
        told = {} if chance.random() < 0.9 else self.headers()
        items: list[Any] = [*map(Chunk, pieces), Chunk(usage=usage, rate_limits=told or None)]
        outcome: Any = Response("".join(pieces), usage=usage, rate_limits=told)
        is_down = int(made.simulation.now) // 10 % 3 == 1
        if chance.random() < (max(0.9, self.failing) if is_down and self.failing else self.failing):
            outcome = self.error()
            items = [*items[: chance.choice([0, 0, 1, 2])], self.error()]
        else:
            self.whole.add(outcome.text)
        if chance.random() < 0.2:
            items.insert(0, Chunk())
        return Reply(chance.expovariate(chance.choice([1, 10])), outcome, items, chance.choice([0.0, 0.1, 0.5]))

    def headers(self) -> dict[str, str]:
        left, reset = self.chance.randrange(60), self.chance.choice([1, 20])
        return {
            "x-ratelimit-limit-requests": "60",
            "x-ratelimit-remaining-requests": str(left),
            "x-ratelimit-reset-requests": f"{reset}s",
        }

    def error(self) -> Exception:
        chance = self.chance
        kind = chance.choice([*DOWN, RateLimitError, RateLimitError, BadRequest])
        after = chance.choice([None, 0.5, 5.0]) if kind in (RateLimitError, Overloaded) else None
        return kind("scripted", retry_after=after)


LOADS = st.fixed_dictionaries(
    {
        "number": st.sampled_from([1, 3, 30, 100, 200]),
        "a_second": st.sampled_from([0.5, 5, 50]),
        "failing": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
        "leaving": st.sampled_from([0.0, 0.0, 0.3]),
        "seed": st.integers(0, 999),
    }
)


class Run:
    """Calls that come at random, of which some are left by their consumers."""

    def __init__(self, layers, order, store, *, number, a_second, failing, leaving, seed):
        makes = layers if order is None else [layers[n] for n in order]
        self.stack: list[Watched] = [make(store) for make in makes if make is not None]
        self.outermost = Watched(lambda request, call_next: call_next(request))
        self.chance = random.Random(seed)  # noqa: S311  # the same calls in each run
        self.provider = Provider(self.chance, failing)
        self.simulation = Simulation([self.outermost, *self.stack], self.provider)
        self.over: Counter[int] = Counter()
        self.simulation.when_ended.append(lambda made: self.over.update([made.number]))
        self.leaving = leaving
        self.left: set[int] = set()
        if not store.local:  # without signals, those who wait ask again and again
            number = min(number, 30)
        for _ in range(number):
            self.simulation.at(self.chance.uniform(0, number / a_second), self.begin)

    def begin(self) -> None:
        chance, simulation = self.chance, self.simulation
        streaming = chance.random() < 0.6
        made = simulation.call(streaming=streaming, restarts=streaming and chance.random() < 0.5)
        if chance.random() < self.leaving:
            simulation.at(simulation.now + chance.expovariate(1), partial(self.leave, made))

    def leave(self, made: Call) -> None:
        if not made.is_over:
            self.left.add(made.number)
            self.chance.choice([made.close, made.cancel])()

    def check(self) -> None:
        """Check what has become of the calls, and what is left of them."""
        calls = self.simulation.calls
        assert not self.simulation.active
        assert self.over == Counter(range(len(calls))), "each call ends once"
        for made in calls:
            check_end(made, self.provider.whole, was_left=made.number in self.left)
        for layer in (self.outermost, *self.stack):
            layer.check()


many = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@settings(many, max_examples=80)
@given(STACKS, ORDERS, STORES, LOADS)
def test_many_calls_keep_the_limits(layers, order, store, load):
    """Whatever the stack, the calls, the failures and the consumers: see the classes above, and `check_end`."""
    run = Run(layers, order, store(), **load)
    run.simulation.checks += [layer.is_fair for layer in run.stack if isinstance(layer, Placing)]
    run.simulation.run()
    run.check()


@settings(many, max_examples=30)
@given(STACKS, ORDERS, LOADS, st.sampled_from([0.1, 0.5, 1.0]), st.sampled_from([*METHODS, None, None, None]))
def test_a_store_that_fails(layers, order, load, share, method):
    """Every call ends as it should, and nobody is left in the store nor in what takes its place."""
    store = SlowStore()
    run = Run(layers, order, store, **load)
    simulation, chance = run.simulation, run.chance

    def fails(asked: str) -> BaseException | None:
        is_down = int(simulation.now) // 5 % 2 == 0 and method in (None, asked) and chance.random() < share
        return ConnectionError("no store") if is_down else None

    store.fails = fails
    simulation.run()
    store.fails = lambda _: None
    run.leaving = run.provider.failing = 0.0
    for _ in range(4):  # the store is told of what has ended meanwhile by the next call through each layer
        simulation.run(simulation.now + 200)
        run.begin()
    simulation.run()
    for layer in run.stack:
        if layer.has_store:
            layer.forget()
            assert left_in(layer.layer._shared._spare) == {}
    run.check()


def check_end(made: Call, whole: set[str], *, was_left: bool) -> None:
    """Check how a call has ended: with a whole answer, of which no text is lost or doubled, or with one of our errors."""
    restarted = [n for n, event in enumerate(made.events) if isinstance(event, Restart)]
    text = "".join(event.text for event in made.events[max(restarted, default=-1) + 1 :])
    if was_left:
        assert made.response is None
        assert made.error is None or isinstance(made.error, asyncio.CancelledError)
    elif made.error is None:
        assert made.response.text in whole
        assert not made.streaming or text == made.response.text
    else:
        if not isinstance(made.error, FluxiblyError):
            raise made.error
        if isinstance(made.error, StreamInterrupted):  # a driver makes one of any other error after output
            assert made.error.partial.text == text
