"""Every store against a plain list of what it has granted: never over a limit, in order, and nothing for the dead."""

from __future__ import annotations

import importlib.util
import math
import time
from collections import defaultdict
from itertools import count
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from support.redis_server import RedisServer, need_redis

from fluxibly.stores import Limit, MemoryStore, SQLiteStore, _sqlite_queues
from fluxibly.stores._leases import Leases

BURST = {"requests": 3.0, "tokens": 10.0}
RATE = {"requests": 1.0, "tokens": 4.0}
"""Units a tick."""
SIZE = 2
MOST = 8
names = st.sampled_from(sorted(BURST))
keys = st.sampled_from("aaab")
any_of_them = st.integers(0, 1000)
"""The number of a caller, modulo how many there are."""
LONGEST_PAUSE = 0.25
"""The most seconds after which a caller that waits asks again, as middleware do."""
_numbers = count()


class Waiter:
    """A caller that waits, as the model knows it."""

    def __init__(self, kind: str, key: str, who: str, store: Any, limits: tuple[Limit, ...]) -> None:
        self.kind, self.key, self.who, self.store, self.limits = kind, key, who, store, limits
        self.dead = False
        self.in_doubt = False
        """Whether it may have lost its place, because the machine was too slow for it to ask again, or to renew, in time."""
        self.told_at = 0.0
        self.told = 0.0


class Grants:
    """What a store has granted of one limit: a list of when and how much, and of the rates that held."""

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst = rate, burst
        self.taken: list[tuple[float, float, float]] = []
        """When the store was asked, when it had answered, and the units."""
        self.lower: list[tuple[float, float, float]] = []
        """From when to when a lower rate held."""

    def allowed(self, since: float, now: float) -> float:
        """Return the units that a window may have."""
        missing = sum(
            (self.rate - rate) * max(0.0, min(end, now) - max(begin, since)) for begin, end, rate in self.lower
        )
        return self.rate * (now - since) + self.burst - missing

    def room(self, now: float, doubt: float) -> float:
        """Return the units that there surely are. A store is not stricter than it has to be, either."""
        if any(end > now or doubt > 0.001 for _, end, _ in self.lower):
            return -math.inf
        level, before = 0.0, 0.0
        for _, at, units in [*self.taken, (now, now, 0.0)]:
            level, before = max(0.0, level - self.allowed(before, at) + self.burst), at
            level = max(0.0, level + units)
        return self.burst - level

    def check(self, now: float, slack: float) -> None:
        """Law 3: every window that ends with this grant has no more than is allowed."""
        total = 0.0
        for since, _, units in reversed(self.taken):
            total += units
            assert total <= self.allowed(since, now) + slack, f"{total} units in {now - since} s"


class Machine(RuleBasedStateMachine):
    """One or two stores that share their state, and the callers that use them."""

    tick = 1.0
    """The seconds that a unit of "requests" takes."""
    slack = 1e-6
    """By how many units a window may be over."""
    doubt = 1e-6
    """The seconds by which a time may be wrong."""
    lease = 30.0
    """The seconds for which a place is held. Infinite: who holds it never dies."""
    stores: tuple[Any, ...]
    now = 1000.0

    def __init__(self) -> None:
        super().__init__()
        self.prefix = f"{next(_numbers)} "
        self.chance = Random(0)  # noqa: S311  # the same order in each run
        self.order: dict[tuple[str, str], list[Waiter]] = defaultdict(list)
        """Who waits, by order of asking. The dead stay until they have to be forgotten."""
        self.held: dict[str, dict[str, Waiter]] = defaultdict(dict)
        self.grants: dict[tuple[str, str], Grants] = {}
        self.closed_until: dict[str, float] = defaultdict(lambda: -math.inf)
        self.renewed_at = self.time()

    # The store

    def time(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def do(self, store: Any, method: str, *args: Any, **options: Any) -> Any:
        return getattr(store, method)(self.prefix + args[0], *args[1:], self.time(), **options)

    # The model

    def waiting(self) -> list[Waiter]:
        return [each for queue in self.order.values() for each in queue if not each.dead]

    def holding(self) -> list[Waiter]:
        return [each for held in self.held.values() for each in held.values() if not each.dead]

    def of(self, key: str, name: str) -> Grants:
        if (key, name) not in self.grants:
            self.grants[key, name] = Grants(RATE[name] / self.tick, BURST[name])
        return self.grants[key, name]

    def grace(self, waiter: Waiter) -> float:
        """Return the most seconds after its last question for which a dead caller may keep its place."""
        return 1.5 if waiter.told == math.inf else waiter.told + 1.0

    def forget_dead(self) -> None:
        now = self.time()
        for place, queue in self.order.items():
            self.order[place] = [each for each in queue if not each.dead or now < each.told_at + self.grace(each)]
        for key, held in self.held.items():
            self.held[key] = {who: each for who, each in held.items() if not each.dead or now < each.told_at}

    def note_doubts(self) -> None:
        now = self.time()
        for each in self.waiting():
            each.in_doubt |= now > each.told_at + min(each.told, LONGEST_PAUSE) + 0.24
        if now > self.renewed_at + 0.6 * self.lease:
            for each in self.holding():
                each.in_doubt = True

    def ask(self, waiter: Waiter, *, wait: bool = True) -> bool:
        """Let a caller ask, for the first time or again, and check what it gets. Return whether it got it."""
        queue, key = self.order[waiter.kind, waiter.key], waiter.key
        began = self.time()
        self.note_doubts()
        if waiter.kind == "rates":
            turn = self.do(waiter.store, "reserve", key, waiter.who, waiter.limits)
        else:
            options = {} if wait else {"wait": False}
            turn = self.do(waiter.store, "lease", key, waiter.who, SIZE, **options)
        ended = self.time()
        self.forget_dead()
        queue = self.order[waiter.kind, key]
        before = queue[: queue.index(waiter)] if waiter in queue else queue
        sure = [each for each in before if not each.dead and not each.in_doubt]
        if turn is None:
            if waiter in queue:
                queue.remove(waiter)
            if not waiter.in_doubt:
                self.check_order(waiter, len(sure))
            self.granted(waiter, began, ended)
            return True
        assert turn.seconds >= 0
        if waiter.kind == "rates" and not before and began > self.closed_until[key] + self.doubt:
            assert any(
                each.cost > self.of(key, each.name).room(began, self.doubt) - self.slack for each in waiter.limits
            )
        if not waiter.in_doubt:
            unsure = [each for each in queue if each not in before and each is not waiter and each.in_doubt]
            assert len(sure) <= turn.ahead <= len(before) + len(unsure)
        if wait:
            if waiter not in queue:
                queue.append(waiter)
            waiter.told, waiter.told_at = turn.seconds, ended
        return False

    def check_order(self, waiter: Waiter, before: int) -> None:
        """Law 4: nobody gets what somebody needs who has asked before."""
        if waiter.kind == "rates":
            assert before == 0
        else:
            assert before <= SIZE - len(self.inside(waiter.key)) - 1

    def inside(self, key: str) -> list[Waiter]:
        return [each for each in self.held[key].values() if not each.dead and not each.in_doubt]

    def granted(self, waiter: Waiter, began: float, ended: float) -> None:
        key = waiter.key
        if waiter.kind == "places":
            self.note_doubts()
            self.held[key][waiter.who] = waiter
            waiter.in_doubt = False
            assert len(self.inside(key)) <= SIZE
            return
        assert ended >= self.closed_until[key] - self.slack
        for limit in waiter.limits:
            grants = self.of(key, limit.name)
            grants.taken.append((began, ended, limit.cost))
            grants.check(ended, self.slack)

    def pass_for(self, seconds: float) -> None:
        """Let time pass, while those who wait ask again and those who hold renew."""
        end = self.time() + seconds
        while True:
            left = end - self.time()
            if left > 1e-9:
                self.wait(min(left, 0.2, self.tick / 2))
            asking = self.waiting()
            self.chance.shuffle(asking)
            for waiter in asking:
                self.ask(waiter)
            if self.time() - self.renewed_at >= self.lease / 4:
                self.renew_all()
            if left <= 1e-9:
                return

    def renew_all(self) -> None:
        began = self.time()
        for each in self.holding():
            is_held = self.do(each.store, "renew", each.key, each.who)
            self.note_doubts()
            assert is_held or each.in_doubt
        self.renewed_at = began

    # What happens

    @rule(key=keys, tokens=st.sampled_from([0.0, 1.0, 4.0, 10.0]), where=any_of_them, callers=st.integers(1, 4))
    def reserve(self, key: str, tokens: float, where: int, callers: int) -> None:
        if len(self.waiting()) >= MOST:  # no precondition: on a real clock, who waits depends on the machine
            return
        costs = {"requests": 1.0, "tokens": tokens}
        limits = tuple([Limit(name, RATE[name] / self.tick, BURST[name], cost) for name, cost in costs.items()])
        for number in range(where, where + callers):
            self.ask(Waiter("rates", key, f"{next(_numbers)}", self.stores[number % len(self.stores)], limits))

    @rule(key=keys, where=any_of_them, wait=st.sampled_from([True, True, True, False]), callers=st.integers(1, 4))
    def lease_a_place(self, key: str, where: int, wait: bool, callers: int) -> None:
        for number in range(where, where + callers if len(self.waiting()) < MOST else where):
            waiter = Waiter("places", key, f"{next(_numbers)}", self.stores[number % len(self.stores)], ())
            self.ask(waiter, wait=wait)

    @rule(which=any_of_them)
    def ask_again(self, which: int) -> None:
        if waiting := self.waiting():
            self.ask(waiting[which % len(waiting)])

    @rule(which=any_of_them)
    def cancel(self, which: int) -> None:
        if waiting := self.waiting():
            waiter = waiting[which % len(waiting)]
            self.do(waiter.store, "release", waiter.key, waiter.who)
            self.order[waiter.kind, waiter.key].remove(waiter)

    @rule(which=any_of_them, times=st.sampled_from([1, 1, 2]))
    def release(self, which: int, times: int) -> None:
        holding = self.holding()
        if not holding:
            return
        holder = holding[which % len(holding)]
        for _ in range(times):
            self.do(holder.store, "release", holder.key, holder.who)
        del self.held[holder.key][holder.who]
        assert not self.do(holder.store, "renew", holder.key, holder.who)

    @rule(key=keys, name=names, units=st.sampled_from([-20.0, -3.0, -1.0, 1.0, 5.0]), where=any_of_them)
    def correct(self, key: str, name: str, units: float, where: int) -> None:
        limit = Limit(name, RATE[name] / self.tick, BURST[name], units)
        began = self.time()
        self.do(self.stores[where % len(self.stores)], "correct", key, limit)
        self.of(key, name).taken.append((began, self.time(), units))

    @rule(key=keys, ticks=st.sampled_from([1.0, 3.0]))
    def close(self, key: str, ticks: float) -> None:
        began = self.time()
        self.do(self.stores[0], "throttle", key, "requests", 0.0, ticks * self.tick)
        self.closed_until[key] = max(self.closed_until[key], began + ticks * self.tick)

    @rule(key=keys, name=names, share=st.sampled_from([0.25, 0.5, 2.0]), ticks=st.sampled_from([1.0, 3.0]))
    def throttle(self, key: str, name: str, share: float, ticks: float) -> None:
        began, rate = self.time(), RATE[name] / self.tick
        self.do(self.stores[-1], "throttle", key, name, share * rate, ticks * self.tick)
        grants = self.of(key, name)
        grants.lower = [(begin, min(end, began), lower) for begin, end, lower in grants.lower]
        grants.lower.append((self.time(), began + ticks * self.tick, min(rate, share * rate)))

    @rule(ticks=st.sampled_from([0.1, 0.5, 1.0, 3.0]))
    def let_time_pass(self, ticks: float) -> None:
        self.pass_for(ticks * self.tick)

    @precondition(lambda self: self.lease < math.inf)
    @rule(which=any_of_them)
    def die_waiting(self, which: int) -> None:
        if waiting := self.waiting():
            waiting[which % len(waiting)].dead = True

    @precondition(lambda self: self.lease < math.inf)
    @rule(which=any_of_them)
    def die_holding(self, which: int) -> None:
        """From now on nobody renews its lease, so it ends after its time."""
        holding = self.holding()
        if not holding:
            return
        holder = holding[which % len(holding)]
        self.renew_all()
        holder.store._leases.drop(self.prefix + holder.key, holder.who)
        holder.dead, holder.told_at = True, self.time() + self.lease

    def teardown(self) -> None:
        """Law 5: with time, all who live get what they wait for, and nothing is left of the dead."""
        forgotten_at = max(
            [self.time()]
            + [each.told_at for held in self.held.values() for each in held.values() if each.dead]
            + [each.told_at + self.grace(each) for queue in self.order.values() for each in queue if each.dead]
        )
        ends = forgotten_at + self.patience()
        self.release_all()
        while self.waiting() and self.time() < ends:
            self.pass_for(self.tick)
            self.release_all()
        assert not self.waiting()
        self.pass_for(forgotten_at - self.time() + 0.01)
        for key in "ab":
            assert all(self.do(self.stores[-1], "lease", key, f"last {number}", SIZE) is None for number in range(SIZE))
            turn = self.do(self.stores[-1], "reserve", key, "last", (Limit("requests", 1.0, 1.0, 1.0),))
            assert turn is None or turn.ahead == 0
            for who in ("last", *[f"last {number}" for number in range(SIZE)]):
                self.do(self.stores[-1], "release", key, who)

    def release_all(self) -> None:
        for each in self.holding():
            self.do(each.store, "release", each.key, each.who)
            del self.held[each.key][each.who]

    def patience(self) -> float:
        """Return the seconds after which all who wait have got what they need, or are forgotten."""
        closed = max([0.0, *[until - self.time() for until in self.closed_until.values()]])
        lower = max([0.0, *[end - self.time() for grants in self.grants.values() for _, end, _ in grants.lower]])
        units = sum(
            max(0.0, cost) / grants.rate for grants in self.grants.values() for _, _, cost in grants.taken
        ) + sum(limit.cost / limit.rate for queue in self.order.values() for each in queue for limit in each.limits)
        return closed + lower + units + (3 + len(self.waiting())) * self.tick


def run(machine: type[Machine], examples: int, steps: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_of_the_memory_store() -> None:
    class Memory(Machine):
        lease = math.inf

        def __init__(self) -> None:
            self.stores = (MemoryStore(),)
            super().__init__()

    run(Memory, 60, 40)


def test_of_the_sqlite_store(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stores have the same file, as two processes have."""

    class SQLite(Machine):
        lease = 4.0
        stores = tuple([SQLiteStore(tmp_path / "a.db", lease_seconds=4.0) for _ in range(2)])

        def wait(self, seconds: float) -> None:
            SQLite.now += seconds

    monkeypatch.setattr(_sqlite_queues, "_clock", lambda: SQLite.now)
    monkeypatch.setattr(Leases, "hold", lambda leases, key, who: None)  # the machine renews, in its own time
    run(SQLite, 35, 40)


def test_of_the_redis_store() -> None:
    """In real time: a window is as long as it may have been, and who asked too late for its grace may have lost its place."""
    need_redis()
    if importlib.util.find_spec("fluxibly.stores.redis") is None:
        pytest.skip("needs fluxibly.stores.redis")
    pytest.importorskip("redis")
    from fluxibly.stores.redis import RedisStore

    server = RedisServer()

    class Redis(Machine):
        tick = 0.03
        slack, doubt = 0.1, 0.05
        lease = 1.0
        stores = tuple([RedisStore(server.url, lease_seconds=1.0) for _ in range(2)])

        def time(self) -> float:
            return time.monotonic()

        def wait(self, seconds: float) -> None:
            time.sleep(seconds)

    try:
        run(Redis, 6, 20)
    finally:
        server.close()
