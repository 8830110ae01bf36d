"""`Concurrency`: never more calls at once than its limit, first come first served, and no place is ever lost."""

from __future__ import annotations

import copy
import gc
import logging
import math
import random
import threading
import time
import uuid
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.calling import REQUEST, call
from support.simulation import Call, Reply, Simulation

from fluxibly import LLM, LLMConfig, Target, race, register_function
from fluxibly.errors import (
    ConfigError,
    DeadlineExceeded,
    QueueFull,
    ServerError,
    StreamInterrupted,
)
from fluxibly.middleware.concurrency import Concurrency
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.stores import MemoryStore
from fluxibly.testing import ScriptedProvider, check_middleware
from fluxibly.testing.modes import BACKENDS, run_async
from fluxibly.types import Request

LATENCIES = st.sampled_from([0.0, 0.5, 1.0, 3.0])
REPLIES = st.builds(
    Reply,
    latency=LATENCIES,
    outcome=st.sampled_from(["fine", ServerError("down")]),
    items=st.sampled_from([("a", "b"), ("a", ServerError("cut")), (ServerError("down"),), ()]),
    gap=LATENCIES,
)


class TestInAllModes:
    def test_passes_at_once(self, mode):
        """A call for which there is a place does not wait."""
        made = call(mode, Concurrency(1), "fine")
        assert (made.response.text, made.clock.sleeps) == ("fine", [])

    @pytest.mark.parametrize("answer", ["fine", ServerError("down"), ["a ", ServerError("cut")], KeyboardInterrupt()])
    def test_gives_its_place_back(self, mode, answer):
        """However a call ends, the next has its place."""
        layer = Concurrency(1, queue=0)
        for _ in range(3):
            call(mode, layer, answer)
        assert call(mode, layer, "fine").response.text == "fine"

    def test_a_stream_that_is_left(self, mode):
        """A consumer that stops reading gives the place back."""
        layer = Concurrency(1, queue=0)
        if mode.streaming:
            call(mode, layer, "a b c", stop_after=1)
            call(mode, layer, "a b c", stop_after=0)
        assert call(mode, layer, "fine").response.text == "fine"

    def test_refuses(self, mode):
        """A full queue refuses before anything is sent, with an error that says why."""
        layer = Concurrency(1, queue=0)
        layer.store.lease("concurrency scripted/m-1", "another", 1, 0.0)
        made = call(mode, layer, "fine")
        assert isinstance(made.ran.error, QueueFull)
        assert not made.provider.requests
        assert (made.ran.error.retryable, made.ran.error.provider, made.ran.error.model) == (False, "scripted", "m-1")
        assert str(made.ran.error) == (
            "Concurrency refuses a call of m-1 at scripted: 0 calls wait already (queue=0); raise limit=1, or send less"
        ).replace("ScriptedProvider", type(made.provider).info.name)

    @pytest.mark.parametrize("began", [0.1, 1e9 + 0.1])
    def test_the_end_of_a_wait(self, began):
        """What rounding leaves of a wait may be too little for the clock to move, and is no wait."""
        simulation = Simulation(Concurrency(1, max_wait=3.3))
        simulation.call(reply=Reply(1e12))
        simulation.run(began)
        late = simulation.call()
        simulation.run(began + 10, most=1000)
        assert isinstance(late.error, QueueFull)

    def test_waits_no_longer_than_max_wait(self, mode):
        """In virtual time nobody sets the signal, so all of the wait passes."""
        layer = Concurrency(1, max_wait=7)
        layer.store.lease("concurrency scripted/m-1", "another", 1, 0.0)
        made = call(mode, layer, "fine")
        assert isinstance(made.ran.error, QueueFull)
        assert "waited 7 s (max_wait=7), with 0 calls ahead" in str(made.ran.error)
        assert made.clock.now() == 7
        assert layer.store._places["concurrency scripted/m-1"].waiting == {}


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"limit": 0}, "Concurrency: limit: expected a whole number from 1 up, got 0"),
            ({"limit": -1}, "Concurrency: limit: expected a whole number from 1 up, got -1"),
            ({"limit": True}, "Concurrency: limit: expected a whole number from 1 up, got True"),
            ({"limit": 1.5}, "Concurrency: limit: expected a whole number from 1 up, got 1.5"),
            ({"limit": "3"}, "Concurrency: limit: expected a whole number from 1 up, or 'auto', got '3'"),
            ({"queue": -1}, "Concurrency: queue: expected a whole number from 0 up, got -1"),
            ({"max_wait": -1}, "Concurrency: max_wait: expected a number from 0 up, got -1"),
            ({"max_wait": math.nan}, "Concurrency: max_wait: expected a number from 0 up, got nan"),
            ({"max_wait": math.inf}, "Concurrency: max_wait: expected a number from 0 up, got inf"),
            ({"max_wait": True}, "Concurrency: max_wait: expected a number from 0 up, got True"),
            (
                {"by": 3},
                "Concurrency: by: expected 'provider', 'provider and model' or a function of the request, got 3",
            ),
            (
                {"on_store_error": "ignore"},
                "Concurrency: on_store_error: expected one of 'local', 'raise', 'open', got 'ignore'",
            ),
        ],
    )
    def test_that_are_wrong(self, settings, message):
        """The message names the setting, what it may be, and what it is."""
        with pytest.raises(ValueError, match=r"\AConcurrency: ") as caught:
            Concurrency(**{"limit": 1, **settings})
        assert str(caught.value) == message

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("{limit: 0}", "llm.middleware[0].concurrency.limit: expected a whole number from 1 up, got 0"),
            (
                "{limit: '3'}",
                "llm.middleware[0].concurrency.limit: expected a whole number from 1 up, or 'auto', got '3'",
            ),
            ("{limit: 1, by: user}", "function 'user' not registered"),
            ("{limit: 1, store: 'mongo://h'}", "got 'mongo:…'"),
        ],
    )
    def test_that_are_wrong_in_yaml(self, value, message, tmp_path):
        """They are a ConfigError with the path."""
        file = tmp_path / "f.yaml"
        file.write_text(f"llm: {{framework: echo, model: any, middleware: [concurrency: {value}]}}")
        with pytest.raises(ConfigError) as caught:
            LLM.from_yaml(file)
        assert message in str(caught.value)

    def test_in_yaml(self, tmp_path):
        """YAML names a function for `by`."""
        register_function("customer_of_request", lambda request: request.metadata.get("customer"), replace=True)
        file = tmp_path / "f.yaml"
        file.write_text(
            "llm: {framework: echo, model: any, middleware: [concurrency: {limit: 3, by: customer_of_request}]}"
        )
        with LLM.from_yaml(file) as llm:
            assert llm.complete("Hi", metadata={"customer": "a"}).text
            (layer,) = llm.pipeline.middleware
            assert [*layer.store._places] == ["concurrency a"]

    def test_repr(self):
        """It shows every setting."""
        assert repr(Concurrency(3, by="provider")) == (
            "Concurrency(limit=3, queue=1000, max_wait=60.0, by='provider', store=MemoryStore(), on_store_error='local')"
        )

    @pytest.mark.parametrize(
        ("store", "message"),
        [
            (MemoryStore, "got the class MemoryStore; write MemoryStore()"),
            (object(), "got an object without lease, release, alease, arelease"),
            ("memori", "got 'memori'"),
            ("mongo://secret@host", "got 'mongo:…'"),
        ],
    )
    def test_stores_that_are_none(self, store, message):
        with pytest.raises(ConfigError) as caught:
            Concurrency(1, store=store)
        assert message in str(caught.value)
        assert "secret" not in str(caught.value)

    def test_keeps_the_laws(self):
        """A user's check of middleware accepts what it shares."""
        check_middleware(Concurrency(5))

    def test_shared_stores_share_places(self):
        """Two middleware with one store have one limit."""
        store = MemoryStore()
        simulation = Simulation(Concurrency(1, store=store))
        first = simulation.call()
        simulation.layers = [Concurrency(1, store=store)]
        second = simulation.call()
        simulation.run()
        assert (first.sent_at, second.sent_at) == ([0], [1])


class TestBy:
    @pytest.mark.parametrize(
        ("by", "sent"),
        [
            ("provider", [0, 1, 2]),
            ("provider and model", [0, 0, 1]),
            (lambda request: request.metadata["who"], [0, 1, 0]),
        ],
    )
    def test_what_has_a_limit_of_its_own(self, by, sent):
        simulation = Simulation(Concurrency(1, by=by))
        for model, who in (("one", "a"), ("two", "a"), ("one", "b")):
            simulation.call(Request(model=model, messages="Hi", metadata={"who": who}))
        simulation.run()
        assert [each.sent_at[0] for each in simulation.calls] == sent

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("lazy", [True, False])
    def test_a_key_that_is_none(self, mode, lazy):
        """A limit for each call would be no limit."""

        async def look_up(request):
            return "a"

        made = call(mode, Concurrency(1, by=lambda request: look_up(request) if lazy else object()), "never")
        kind = "a coroutine" if lazy else "an object"
        assert str(made.ran.error) == f"by: expected a key from its function, such as a str or a number, got {kind}"
        gc.collect()  # Python warns of a coroutine that nobody awaited

    @pytest.mark.parametrize("key", [None, 3, 2.5, ("a", 1), b"a", uuid.UUID(int=1), Path("a")], ids=repr)
    def test_keys(self, key):
        """Equal keys share a limit."""
        layer = Concurrency(1, by=lambda _: copy.deepcopy(key))
        pipeline = Pipeline(ScriptedProvider("one", "two"), [layer])
        for _ in range(2):
            pipeline.complete(REQUEST)
        assert [*layer.store._places] == [f"concurrency {key}"]

    def test_a_target_counts_where_it_goes(self):
        """A call to another provider takes a place of that provider."""
        layer = Concurrency(5)
        target = Target(ScriptedProvider("there"), model="other")
        held = []

        def look(request, call_next):
            held.append([*layer.store._places])
            return (yield from call_next(request))

        Pipeline(ScriptedProvider(), [layer, look]).complete(REQUEST.evolve(target=target))
        assert held == [["concurrency scripted/other"]]


class Bounded(RuleBasedStateMachine):
    """Calls that begin, end, fail, are cancelled and are left, at random, against what a limit promises."""

    @initialize(limit=st.integers(1, 4), queue=st.integers(0, 8), max_wait=st.sampled_from([0.0, 2.0, 60.0]))
    def begin(self, limit, queue, max_wait):
        self.limit, self.queue, self.max_wait = limit, queue, max_wait
        self.layer = Concurrency(limit, queue=queue, max_wait=max_wait)
        self.simulation = Simulation(self.layer)
        self.simulation.checks.append(self.holds)

    @rule(reply=REPLIES, streaming=st.booleans(), deadline=st.sampled_from([None, None, 1.0, 4.0]))
    def call(self, reply, streaming, deadline):
        self.simulation.run(self.simulation.now)
        at_work, waiting = len(self.simulation.at_work), len(self.simulation.waiting)
        made = self.simulation.call(reply=reply, streaming=streaming, deadline=deadline)
        if at_work < self.limit:
            assert made.sent_at, "a place was free"
        elif waiting >= self.queue or self.max_wait == 0:
            assert isinstance(made.error, QueueFull)
        else:
            assert made.waits

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 5.0, 70.0]))
    def pass_time(self, seconds):
        self.simulation.run(self.simulation.now + seconds)

    @precondition(lambda self: self.simulation.active)
    @rule(data=st.data(), how=st.sampled_from(["cancel", "close", "interrupt"]))
    def end(self, data, how):
        active = [*self.simulation.active]
        chosen = active[data.draw(st.integers(0, len(active) - 1))]
        if how == "close":
            chosen.close()
        else:
            chosen.cancel(KeyboardInterrupt() if how == "interrupt" else None)
        assert chosen.is_over

    @invariant()
    def holds(self):
        simulation = self.simulation
        assert len(simulation.at_work) <= self.limit
        if simulation.is_quiet and simulation.waiting:
            assert len(simulation.at_work) == self.limit, "a place is free, and somebody waits"
        assert len(simulation.waiting) <= self.queue
        for each in simulation.active:
            if each.waits:
                assert simulation.now - each.began_at <= self.max_wait + 1e-6

    def teardown(self):
        if not hasattr(self, "simulation"):
            return
        simulation = self.simulation
        simulation.run()
        assert not simulation.active, "somebody waits for ever"
        sent = [made.number for _, made in simulation.sent]
        assert sent == sorted(sent), "not first come, first served"
        for made in simulation.calls:
            if isinstance(made.error, QueueFull):
                assert not made.sent_at
                assert made.ended_at - made.began_at in (0, pytest.approx(self.max_wait))
            assert isinstance(
                made.error, (type(None), ServerError, StreamInterrupted, QueueFull, DeadlineExceeded)
            ) or not isinstance(made.error, Exception)
        places = self.layer.store._places.get("concurrency unknown/m")
        assert places is None or places.is_idle(0.0)


TestBounded = Bounded.TestCase
TestBounded.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("seed", range(2))
def test_a_thousand_calls(seed):
    """A busy provider: calls come at random, some fail, some are cancelled or left half way."""
    chance = random.Random(seed)  # noqa: S311  # the same calls in each run
    layer = Concurrency(7, queue=10_000, max_wait=1e6)
    simulation = Simulation(layer)
    most = 0

    def check():
        nonlocal most
        most = max(most, len(simulation.at_work))
        assert len(simulation.at_work) == 7 or not simulation.waiting

    simulation.checks.append(check)
    cancelled: list[Call] = []

    def begin():
        reply = Reply(
            latency=chance.expovariate(1),
            outcome=chance.choice(["fine", ServerError("down")]),
            items=chance.choice([("a", "b", "c"), ("a", ServerError("cut"))]),
            gap=chance.random(),
        )
        made = simulation.call(reply=reply, streaming=chance.random() < 0.5)
        if chance.random() < 0.3:
            cancelled.append(made)
            stop = chance.choice([made.close, made.cancel])
            simulation.at(simulation.now + chance.expovariate(0.3), lambda: made.is_over or stop())

    for _ in range(1000):
        simulation.at(chance.uniform(0, 120), begin)
    simulation.run()
    assert most == 7
    assert not simulation.active
    assert all(made.sent_at for made in simulation.calls if made not in cancelled)
    sent = [made.number for _, made in simulation.sent]
    assert sent == sorted(sent)
    assert layer.store._places["concurrency unknown/m"].is_idle(0.0)


@given(st.integers(1, 3), st.lists(st.tuples(LATENCIES, LATENCIES), max_size=12), st.booleans())
@settings(max_examples=60, deadline=None)
def test_branches_of_a_race_give_their_places_back(limit, latencies, streaming):
    """Losers that wait leave the queue, and losers that were sent free their places."""
    layer = Concurrency(limit, max_wait=1e6)

    def hedge(request, call_next):
        return (yield from race(call_next, [request, request], delay=0.5))

    simulation = Simulation([hedge, layer])
    for first, second in latencies:
        left = iter([first, second])

        def reply(made, left=left):
            return Reply(latency=next(left))

        simulation.call(reply=reply, streaming=streaming)
        simulation.run(simulation.now + 0.25)
    simulation.run()
    assert all(made.error is None and made.response is not None for made in simulation.calls)
    assert not simulation.active
    places = layer.store._places.get("concurrency unknown/m")
    assert places is None or places.is_idle(0.0)


class TestManyAtOnce:
    def test_threads(self):
        """100 threads on one instance, with real waits: never more than 5 at once, and all get their turn."""
        layer = Concurrency(5)
        lock, at_once, most = threading.Lock(), 0, 0

        class Provider:
            def complete(self, request):
                nonlocal at_once, most
                with lock:
                    at_once += 1
                    most = max(most, at_once)
                time.sleep(0.001)
                with lock:
                    at_once -= 1
                if request.messages[0].text == "fail":
                    raise ServerError("down")
                return "fine"

        pipeline = Pipeline(Provider(), [layer])
        outcomes: list[str] = []

        def work(number):
            for turn in range(5):
                try:
                    outcomes.append(
                        pipeline.complete(Request(model="m", messages="fail" if turn == number % 5 else "go")).text
                    )
                except ServerError:
                    outcomes.append("down")

        threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert (outcomes.count("fine"), outcomes.count("down"), most) == (400, 100, 5)
        assert layer.store._places[next(iter(layer.store._places))].is_idle(0.0)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_tasks(self, backend):
        """1,000 tasks on one instance, a tenth of which is cancelled while it waits."""
        layer = Concurrency(10)
        at_once = most = 0
        outcomes: list[str] = []

        class Provider:
            async def complete(self, request):
                nonlocal at_once, most
                at_once += 1
                most = max(most, at_once)
                try:
                    await anyio.lowlevel.checkpoint()
                finally:
                    at_once -= 1
                return "fine"

        async def main():
            pipeline = AsyncPipeline(Provider(), [layer])

            async def work(number):
                with anyio.CancelScope() as scope:
                    if number % 10 == 0:
                        scope.deadline = anyio.current_time() + 0.001
                    await pipeline.complete(Request(model="m", messages="go"))
                    outcomes.append("fine")

            with anyio.fail_after(60):
                async with anyio.create_task_group() as tasks:
                    for number in range(1000):
                        tasks.start_soon(work, number)

        run_async(main, backend)
        assert 900 <= len(outcomes) <= 1000
        assert most == 10
        assert layer.store._places[next(iter(layer.store._places))].is_idle(0.0)

    def test_a_signal_handler_may_close_a_stream(self):
        """The lock of the store may be taken again in its own thread."""
        layer = Concurrency(1, queue=0)
        provider = ScriptedProvider("a b c", "fine")
        pipeline = Pipeline(provider, [layer])
        stream = pipeline.stream(REQUEST)
        next(stream)
        with layer.store._lock:
            stream.close()
        assert pipeline.complete(REQUEST).text == "fine"

    def test_an_interrupted_release_wakes_the_next(self):
        """Ctrl-C just before the next was woken does not let it wait: the release is done again, and wakes it."""
        store = MemoryStore()
        assert store.lease("k", "one", 1, 0.0) is None
        first, second = store.lease("k", "two", 1, 0.0), store.lease("k", "three", 1, 0.0)
        assert first is not None
        assert second is not None
        del store._places["k"].held["one"]
        store._places["k"].waiting.pop("two")  # the interrupted half of a `leave`
        store.release("k", "two", 0.0)
        assert second.signal.is_set


class TestWhatIsSaid:
    def test_a_wait_is_logged(self, caplog):
        """A line at DEBUG for each wait."""
        caplog.set_level(logging.DEBUG, "fluxibly")
        simulation = Simulation(Concurrency(1))
        simulation.call()
        made = simulation.call()
        simulation.run()
        assert made.record.decisions[0].what == "let the call wait 1 s for one of 1 places"
        assert caplog.messages == [
            'LLM call decision | middleware=Concurrency, decision="let the call wait 1 s for one of 1 places"'
        ]

    def test_a_refusal_is_logged(self, caplog):
        caplog.set_level(logging.DEBUG, "fluxibly")
        simulation = Simulation(Concurrency(1, queue=1))
        made = [simulation.call() for _ in range(3)][2]
        assert made.error is not None
        assert caplog.messages == [
            'LLM call decision | middleware=Concurrency, decision="refuses the call: 1 calls wait already (queue=1)"'
        ]

    def test_config_of_an_llm(self):
        """It runs in a stack by name."""
        config = LLMConfig(framework="echo", model="any", middleware=[{"concurrency": {"limit": 2}}])
        assert LLM(config).complete("Hi").text


def test_a_deadline_ends_the_wait():
    """The call leaves the queue when its time is up, and the next has its turn."""
    simulation = Simulation(Concurrency(1), Reply(latency=5))
    simulation.call()
    late = simulation.call(deadline=2)
    next_one = simulation.call()
    simulation.run()
    assert isinstance(late.error, DeadlineExceeded)
    assert (late.ended_at, next_one.sent_at) == (2, [5])


def test_memory_is_bounded():
    """20,000 keys that nobody uses any more are forgotten."""
    layer = Concurrency(1, by=lambda request: request.metadata["who"])
    pipeline = Pipeline(type("P", (), {"complete": lambda self, request: "fine"})(), [layer])
    for number in range(20_000):
        pipeline.complete(Request(model="m", messages="Hi", metadata={"who": number}))
    assert len(layer.store._places) <= 1024
