"""`CircuitBreaker`: what opens it, what closes it, and what changes nothing, against a plain model."""

from __future__ import annotations

import logging
import math
import random
import threading
import time

import anyio
import anyio.lowlevel
import pytest
import yaml
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from support.calling import REQUEST, call, scripted
from support.simulation import Reply, Simulation

from fluxibly import LLM, race
from fluxibly.errors import (
    AuthenticationError,
    BadRequest,
    CircuitOpen,
    ConfigError,
    ConnectionFailed,
    ContentFiltered,
    DeadlineExceeded,
    Overloaded,
    ProviderError,
    QueueFull,
    RateLimitError,
    RateLimitWait,
    RequestTimeout,
    ServerError,
    StreamInterrupted,
    StreamProtocolError,
    StreamStalled,
    root_cause,
)
from fluxibly.middleware.circuit_breaker import CircuitBreaker
from fluxibly.middleware.concurrency import Concurrency
from fluxibly.middleware.deadline import Deadline
from fluxibly.middleware.retry import Retry
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.testing import VirtualClock, check_middleware
from fluxibly.testing.modes import BACKENDS, MODES, run, run_async
from fluxibly.types import Request

FAILURES = [ServerError, Overloaded, ConnectionFailed, RequestTimeout, StreamStalled, StreamProtocolError]
ANSWERS = [AuthenticationError, BadRequest, ContentFiltered, RateLimitError, ProviderError]


@pytest.fixture(params=MODES, ids=str)
def mode(request):
    return request.param


def down():
    return ServerError("down")


class TestInAllModes:
    def test_opens_and_refuses(self, mode):
        """After its failures, nothing is sent."""
        layer = CircuitBreaker(failures=2)
        for _ in range(2):
            assert isinstance(call(mode, layer, down()).ran.error, ServerError)
        made = call(mode, layer, "fine")
        assert isinstance(made.ran.error, CircuitOpen)
        assert not made.provider.requests
        assert made.ran.error.retry_after == pytest.approx(30)
        assert not made.ran.error.retryable
        assert str(made.ran.error) == (
            "CircuitBreaker refuses a call of m-1 at scripted: the circuit is open for 30 s more; ask another "
            "provider, or later"
        )

    @pytest.mark.parametrize("kind", FAILURES, ids=lambda kind: kind.__name__)
    def test_failures(self, mode, kind):
        layer = CircuitBreaker(failures=1)
        call(mode, layer, kind("no"))
        assert isinstance(call(mode, layer, "fine").ran.error, CircuitOpen)

    @pytest.mark.parametrize("kind", ANSWERS, ids=lambda kind: kind.__name__)
    def test_answers(self, mode, kind):
        """The service is there, and says no."""
        layer = CircuitBreaker(failures=1)
        call(mode, layer, kind("no"))
        assert call(mode, layer, "fine").response.text == "fine"

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("mine")], ids=lambda error: type(error).__name__)
    def test_others(self, mode, error):
        layer = CircuitBreaker(failures=1)
        call(mode, layer, error)
        assert call(mode, layer, "fine").response.text == "fine"

    def test_an_interrupted_stream_counts_by_its_cause(self, mode):
        if not mode.streaming:
            return
        for error, opens in ((down(), True), (ContentFiltered("no"), False)):
            layer = CircuitBreaker(failures=1)
            made = call(mode, layer, ["a ", error])
            assert isinstance(made.ran.error, StreamInterrupted)
            assert isinstance(call(mode, layer, "fine").ran.error, CircuitOpen if opens else type(None))

    def test_a_stream_that_is_left_is_neither(self, mode):
        if mode.streaming:
            layer = CircuitBreaker(failures=1)
            call(mode, layer, "a b c", stop_after=1)
            assert call(mode, layer, "fine").response.text == "fine"

    def test_retry_outside_does_not_spin(self, mode):
        """A refusal is not retryable."""
        layer = CircuitBreaker(failures=2)
        made = call(mode, [Retry(max_retries=5), layer], down(), down(), "fine")
        assert isinstance(made.ran.error, CircuitOpen)
        assert len(made.provider.requests) == 2


def opened(**options):
    """Return a simulation whose circuit has opened at the time 0."""
    simulation = Simulation(CircuitBreaker(failures=1, **options))
    simulation.call(reply=Reply(0, down()))
    simulation.run(0)
    return simulation


class TestHalfOpen:
    @pytest.mark.parametrize("outcome", ["fine", *[kind("no") for kind in ANSWERS]], ids=str)
    def test_closes(self, outcome):
        """A probe that gets any answer closes it."""
        simulation = opened()
        simulation.run(30)
        simulation.call(reply=Reply(1, outcome))
        simulation.run(30.5)
        second = simulation.call()
        assert isinstance(second.error, CircuitOpen)
        assert second.error.retry_after is None
        assert "has 1 probes under way" in str(second.error)
        simulation.run(31)
        assert [bool(simulation.call().sent_at) for _ in range(3)] == [True] * 3

    def test_opens_again(self):
        """For the same time, from the failure on."""
        simulation = opened()
        simulation.run(30)
        simulation.call(reply=Reply(2, down()))
        simulation.run(61.9)
        assert isinstance(simulation.call().error, CircuitOpen)
        simulation.run(62)
        assert simulation.call().sent_at

    @pytest.mark.parametrize("how", ["cancel", "close"])
    def test_a_probe_that_is_given_up(self, how):
        """It gives its place back, and changes nothing."""
        simulation = opened()
        simulation.run(30)
        probe = simulation.call(streaming=True)
        simulation.run(31.2)
        getattr(probe, how)()
        assert simulation.call().sent_at
        assert isinstance(simulation.call().error, CircuitOpen)

    def test_a_probe_that_loses_a_race(self):
        simulation = opened()
        simulation.run(40)

        def hedge(request, call_next):
            return (yield from race(call_next, [request, request.evolve(model="other")], delay=0.5))

        simulation.layers = [hedge, *simulation.layers]
        latencies = iter([9, 1])
        made = simulation.call(reply=lambda _: Reply(next(latencies)))
        simulation.run()
        assert made.response is not None
        simulation.layers = simulation.layers[1:]
        assert simulation.call().sent_at, "the loser's place is free"
        assert isinstance(simulation.call().error, CircuitOpen), "and it has closed nothing"

    def test_a_mistake_of_the_program(self):
        """An error that says nothing of the provider gives the place back, too."""
        simulation = opened()
        simulation.run(30)
        simulation.call(reply=Reply(0, ValueError("mine")))
        simulation.run(30)
        assert simulation.call().sent_at
        assert isinstance(simulation.call().error, CircuitOpen)

    @pytest.mark.parametrize("error", [QueueFull, RateLimitWait, CircuitOpen])
    def test_a_refusal_within_is_no_answer(self, error):
        simulation = opened()
        simulation.run(30)

        def refuse(request, call_next):
            raise error("later")
            yield

        layers = simulation.layers
        simulation.layers = [*layers, refuse]
        simulation.call()
        simulation.layers = layers
        assert simulation.call().sent_at
        assert isinstance(simulation.call().error, CircuitOpen)

    def test_several_probes(self):
        """The first that succeeds closes it; one that fails later is an ordinary call of an earlier time."""
        simulation = opened(probes=2)
        simulation.run(30)
        simulation.call(reply=Reply(1))
        simulation.call(reply=Reply(2, down()))
        assert isinstance(simulation.call().error, CircuitOpen)
        simulation.run(32)
        assert simulation.call().sent_at

    def test_several_probes_of_which_one_fails_first(self):
        """It opens the circuit, and a probe that succeeds later does not close it before its time."""
        simulation = opened(probes=2)
        simulation.run(30)
        simulation.call(reply=Reply(1, down()))
        simulation.call(reply=Reply(2))
        simulation.run(32)
        assert isinstance(simulation.call().error, CircuitOpen)
        simulation.run(61)
        assert simulation.call().sent_at

    def test_a_circuit_that_nobody_asked_for(self):
        """After a day it is closed."""
        simulation = opened()
        simulation.run(30 + 86_400)
        assert [bool(simulation.call().sent_at) for _ in range(2)] == [True] * 2

    def test_what_changes_between_the_look_and_the_place(self):
        """Another call fails as a probe in between, so this one is refused."""
        layer = CircuitBreaker(failures=1)
        simulation = Simulation(layer)
        simulation.call(reply=Reply(0, down()))
        simulation.run(31)
        store, once = layer.store, []
        lease = store.lease

        def late(key, *args, **options):
            if not once:
                once.append(True)
                assert store.load("circuit unknown/m", simulation.now) is not None
                store.save("circuit unknown/m", b"open anew", 30 + 86_400.0, simulation.now)
            return lease(key, *args, **options)

        store.lease = late
        made = simulation.call()
        assert isinstance(made.error, CircuitOpen)
        assert made.error.retry_after == pytest.approx(30)
        store.save("circuit unknown/m", None, None, simulation.now)
        assert simulation.call().sent_at


class TestStragglers:
    def test_do_not_keep_it_open(self):
        """Calls of before the opening fail one after the other, while it is open and when it has closed."""
        simulation = Simulation(CircuitBreaker(failures=2, within=1000))
        for latency in (1, 2, 20, 40, 45, 50, 55):
            simulation.call(reply=Reply(latency, down()))
        simulation.run(31.9)
        assert isinstance(simulation.call().error, CircuitOpen)
        simulation.run(32)
        probe = simulation.call(reply=Reply(1))
        simulation.run(60)
        assert probe.response is not None
        assert simulation.call().sent_at

    def test_do_not_close_it(self):
        simulation = Simulation(CircuitBreaker(failures=1))
        simulation.call(reply=Reply(5))
        simulation.call(reply=Reply(1, down()))
        simulation.run(6)
        assert isinstance(simulation.call().error, CircuitOpen)

    def test_failures_of_before_are_forgotten(self):
        """A circuit that has closed counts anew."""
        simulation = Simulation(CircuitBreaker(failures=2, within=1000))
        for _ in range(2):
            simulation.call(reply=Reply(0, down()))
        simulation.run(30)
        simulation.call(reply=Reply(0))
        simulation.run(30)
        simulation.call(reply=Reply(0, down()))
        simulation.run(31)
        assert simulation.call().sent_at


class TestWindow:
    @pytest.mark.parametrize(("gap", "opens"), [(14.9, True), (15.1, False)])
    def test_failures_must_come_within_it(self, gap, opens):
        simulation = Simulation(CircuitBreaker(failures=3, within=30))
        for number in range(3):
            simulation.run(number * gap)
            simulation.call(reply=Reply(0, down()))
            simulation.run(number * gap)
        assert isinstance(simulation.call().error, CircuitOpen) is opens

    def test_successes_change_nothing(self):
        simulation = Simulation(CircuitBreaker(failures=2))
        for outcome in (down(), "fine", "fine", down()):
            simulation.call(reply=Reply(0, outcome))
            simulation.run(0)
        assert isinstance(simulation.call().error, CircuitOpen)


class TestDeadlines:
    @pytest.mark.parametrize(("before", "opens"), [(0, True), (4.9, True), (5.1, False)])
    def test_of_a_call(self, before, opens):
        """A deadline counts if the provider has had at least half of the call's time."""

        def late(request, call_next):
            from fluxibly.flow import sleep

            yield from sleep(before)
            return (yield from call_next(request))

        layer = CircuitBreaker(failures=1)
        simulation = Simulation([late, layer])
        made = simulation.call(reply=Reply(100), deadline=10)
        simulation.run(20)
        assert isinstance(made.error, DeadlineExceeded)
        simulation.layers = [layer]
        assert isinstance(simulation.call().error, CircuitOpen) is opens

    @pytest.mark.parametrize(
        ("layers", "outcome", "opens"),
        [
            ([Deadline(5)], "fine", True),
            ([Retry(), Deadline(5)], "fine", True),
            ([Retry()], ServerError("down", retry_after=50), True),
            ([Retry()], RateLimitError("slow", retry_after=50), False),
        ],
        ids=["further in", "twice", "wait after a failure", "wait after an answer"],
    )
    def test_further_in(self, layers, outcome, opens):
        """While the call has time, the provider has failed, unless its last error says that it is there."""
        layer = CircuitBreaker(failures=1)
        simulation = Simulation([layer, *layers])
        made = simulation.call(reply=Reply(9 if outcome == "fine" else 1, outcome), deadline=30)
        simulation.run(20)
        assert isinstance(made.error, DeadlineExceeded)
        simulation.layers = [layer]
        assert isinstance(simulation.call().error, CircuitOpen) is opens

    def test_in_a_queue_within(self):
        """What never went out says nothing of the provider."""
        simulation = Simulation([CircuitBreaker(failures=1), Concurrency(1)])
        first = simulation.call(reply=Reply(8))
        simulation.call(deadline=5)
        simulation.run()
        assert first.response is not None
        assert simulation.call().sent_at


class Model:
    """A circuit breaker in its plain form."""

    def __init__(self, failures, within, open_for, probes):
        self.failures, self.within, self.open_for, self.probes = failures, within, open_for, probes
        self.state, self.generation = "closed", 0
        self.failed: list[float] = []
        self.until = 0.0
        self.probing = 0

    def begin(self, now):
        """Return whether a call passes."""
        if self.state == "open" and now >= self.until:
            self.state = "half-open"
        if self.state == "half-open":
            if self.probing == self.probes:
                return False
            self.probing += 1
        return self.state != "open"

    def change(self, state, now):
        self.state, self.generation, self.failed = state, self.generation + 1, []
        self.until = now + self.open_for

    def end(self, generation, was_probe, outcome, now):
        if was_probe:
            self.probing -= 1
        if generation != self.generation:
            return
        if was_probe and outcome == "fails":
            self.change("open", now)
        elif was_probe and outcome == "answers":
            self.change("closed", now)
        elif outcome == "fails":
            self.failed = [at for at in self.failed if at > now - self.within] + [now]
            if len(self.failed) >= self.failures:
                self.change("open", now)


def kind_of_end(made):
    if made.error is None:
        return "answers" if made.response is not None else "neither"
    cause = root_cause(made.error)
    if isinstance(cause, tuple(FAILURES)):
        return "fails"
    return "answers" if isinstance(cause, ProviderError) else "neither"


class Broken(RuleBasedStateMachine):
    """Calls that begin and end at random, against the model."""

    @initialize(
        failures=st.integers(1, 3),
        within=st.sampled_from([2.03, 30.03]),  # no two moments fall together, which rounding would decide
        open_for=st.sampled_from([1.07, 10.07]),
        probes=st.integers(1, 3),
    )
    def begin(self, failures, within, open_for, probes):
        self.begin_with(failures, within, open_for, probes)

    def begin_with(self, *numbers):
        self.model = Model(*numbers)
        failures, within, open_for, probes = numbers
        self.layer = CircuitBreaker(failures=failures, within=within, open_for=open_for, probes=probes)
        self.simulation = Simulation(self.layer)
        self.simulation.when_ended.append(self.ended)
        self.passed: dict[int, tuple[int, bool]] = {}

    def ended(self, made):
        # What a call at the same time has changed counts: the simulation ends one after the other.
        if made.number in self.passed:
            generation, was_probe = self.passed.pop(made.number)
            self.model.end(generation, was_probe, kind_of_end(made), self.simulation.now)

    def new_call(self, reply, *, streaming):
        passes = self.model.begin(self.simulation.now)
        number = len(self.simulation.calls)
        if passes:
            self.passed[number] = (self.model.generation, self.model.state == "half-open")
        made = self.simulation.call(reply=reply, streaming=streaming)
        assert bool(made.sent_at) is passes
        assert isinstance(made.error, CircuitOpen) is not passes

    @rule(
        latency=st.sampled_from([0.0, 0.3, 3.0, 12.0]),
        outcome=st.sampled_from(
            ["fine", *[kind("no") for kind in (*FAILURES[:2], *FAILURES[:2], *ANSWERS[:1])], ValueError()]
        ),
        cut=st.booleans(),
        streaming=st.booleans(),
    )
    def call(self, latency, outcome, cut, streaming):
        self.simulation.run(self.simulation.now)
        items = (("a",) if cut else ()) + (outcome,)
        self.new_call(Reply(latency, outcome, items), streaming=streaming)

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.1, 5.0, 11.0]))
    def pass_time(self, seconds):
        self.simulation.run(self.simulation.now + seconds)

    @precondition(lambda self: self.simulation.active)
    @rule(data=st.data(), closes=st.booleans())
    def end(self, data, closes):
        active = [*self.simulation.active]
        chosen = active[data.draw(st.integers(0, len(active) - 1))]
        (chosen.close if closes else chosen.cancel)()

    def teardown(self):
        if hasattr(self, "simulation"):
            self.simulation.run()
            places = self.layer.store._places.get("circuit unknown/m probes")
            assert places is None or places.is_idle(0.0), "the place of a probe is lost"


TestBroken = Broken.TestCase
TestBroken.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize("seed", range(3))
def test_two_thousand_calls(seed):
    """A provider that is down now and then: the model agrees about every call."""
    chance = random.Random(seed)  # noqa: S311  # the same calls in each run
    machine = Broken()
    machine.begin_with(3, 5.0, 4.0, 2)
    simulation = machine.simulation

    def begin():
        is_down = int(simulation.now) // 40 % 2
        outcome = down() if chance.random() < (0.9 if is_down else 0.05) else "fine"
        machine.new_call(Reply(chance.expovariate(0.5), outcome, ("a", outcome)), streaming=chance.random() < 0.5)
        made = simulation.calls[-1]
        if chance.random() < 0.2:
            stop = chance.choice([made.close, made.cancel])
            simulation.at(simulation.now + chance.expovariate(1), lambda: made.is_over or stop())

    for _ in range(2000):
        simulation.at(chance.uniform(0, 400), begin)
    simulation.run()
    refused = sum(isinstance(made.error, CircuitOpen) for made in simulation.calls)
    assert 200 < refused < 1200
    machine.teardown()


@given(st.lists(st.sampled_from([0.0, 0.7, 3.0]), min_size=1, max_size=10), st.booleans())
@settings(max_examples=40, deadline=None)
def test_losers_are_neither(latencies, streaming):
    """Whatever happens to hedged calls, no probe's place is lost."""
    simulation = opened(open_for=1.0)
    layer = simulation.layers[0]

    def hedge(request, call_next):
        return (yield from race(call_next, [request, request], delay=0.5))

    simulation.layers = [hedge, layer]
    left = iter(latencies * 4)
    for pause in latencies:
        simulation.run(simulation.now + pause + 0.4)
        simulation.call(reply=lambda _: Reply(next(left)), streaming=streaming)
    simulation.run()
    places = layer.store._places.get("circuit unknown/m probes")
    assert places is None or places.is_idle(0.0)
    assert not simulation.active


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"failures": 0}, "failures: expected a whole number from 1 up, got 0"),
            ({"failures": True}, "failures: expected a whole number from 1 up, got True"),
            ({"failures": 2.5}, "failures: expected a whole number from 1 up, got 2.5"),
            ({"within": 0}, "within: expected a number above 0, got 0"),
            ({"within": math.nan}, "within: expected a number above 0, got nan"),
            ({"open_for": -3}, "open_for: expected a number above 0, got -3"),
            ({"open_for": "30"}, "open_for: expected a number above 0, got '30'"),
            ({"open_for": math.inf}, "open_for: expected a number above 0, got inf"),
            ({"probes": 0}, "probes: expected a whole number from 1 up, got 0"),
            ({"by": None}, "by: expected 'provider', 'provider and model' or a function of the request, got None"),
        ],
    )
    def test_that_are_wrong(self, settings, message, tmp_path):
        with pytest.raises(ValueError, match="CircuitBreaker") as caught:
            CircuitBreaker(**settings)
        assert str(caught.value) == f"CircuitBreaker: {message}"
        ((name, value),) = settings.items()
        file = tmp_path / "f.yaml"
        file.write_text(
            f"llm: {{framework: echo, model: any, middleware: [circuit_breaker: {{{name}: {yaml.safe_dump(value).splitlines()[0]}}}]}}"
        )
        with pytest.raises(ConfigError) as config:
            LLM.from_yaml(file)
        assert f"llm.middleware[0].circuit_breaker.{message}" in str(config.value)

    def test_repr(self):
        assert repr(CircuitBreaker()) == (
            "CircuitBreaker(failures=5, within=30.0, open_for=30.0, probes=1, by='provider and model', "
            "store=MemoryStore(), on_store_error='local')"
        )

    def test_keeps_the_laws(self):
        check_middleware(CircuitBreaker())
        check_middleware(CircuitBreaker(failures=1))

    @pytest.mark.parametrize(("by", "refused"), [("provider", True), ("provider and model", False)])
    def test_by(self, by, refused):
        simulation = Simulation(CircuitBreaker(failures=1, by=by))
        simulation.call(Request(model="one", messages="Hi"), reply=Reply(0, down()))
        simulation.run(0)
        made = simulation.call(Request(model="two", messages="Hi"))
        assert isinstance(made.error, CircuitOpen) is refused

    def test_a_shared_store(self):
        """Two instances with one store have one circuit."""
        first = CircuitBreaker(failures=1)
        simulation = Simulation(first)
        simulation.call(reply=Reply(0, down()))
        simulation.run(0)
        simulation.layers = [CircuitBreaker(failures=1, store=first.store)]
        assert isinstance(simulation.call().error, CircuitOpen)


class TestManyAtOnce:
    def test_threads(self):
        """100 threads: exactly one of them probes, and none is lost."""
        layer = CircuitBreaker(failures=1, open_for=0.05)
        probes, lock = [], threading.Lock()
        is_down = True

        class Provider:
            def complete(self, request):
                with lock:
                    probes.append(time.perf_counter())
                time.sleep(0.02)
                if is_down:
                    raise down()
                return "fine"

        pipeline = Pipeline(Provider(), [layer])
        with pytest.raises(ServerError):
            pipeline.complete(Request(model="m", messages="Hi"))
        time.sleep(0.06)
        probes.clear()
        outcomes = []
        gate = threading.Barrier(100)

        def work():
            gate.wait()
            try:
                outcomes.append(pipeline.complete(Request(model="m", messages="Hi")).text)
            except (CircuitOpen, ServerError) as error:
                outcomes.append(type(error).__name__)

        def all_at_once():
            outcomes.clear()
            threads = [threading.Thread(target=work, daemon=True) for _ in range(100)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)

        all_at_once()
        assert (len(probes), outcomes.count("ServerError"), outcomes.count("CircuitOpen")) == (1, 1, 99)
        is_down = False
        time.sleep(0.06)
        all_at_once()
        assert outcomes.count("fine") >= 1
        assert pipeline.complete(Request(model="m", messages="Hi")).text == "fine"
        assert layer.store._places["circuit Provider/m probes"].is_idle(0.0)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_tasks(self, backend):
        """1,000 tasks: those under way when it opens fail, all later are refused."""
        layer = CircuitBreaker(failures=3)
        outcomes = []

        class Provider:
            async def complete(self, request):
                await anyio.lowlevel.checkpoint()
                raise down()

        async def main():
            pipeline = AsyncPipeline(Provider(), [layer])

            async def work():
                try:
                    await pipeline.complete(Request(model="m", messages="Hi"))
                except ProviderError as error:
                    outcomes.append(type(error).__name__)

            for _ in range(10):
                async with anyio.create_task_group() as tasks:
                    for _ in range(100):
                        tasks.start_soon(work)

        run_async(main, backend)
        assert (outcomes.count("ServerError"), outcomes.count("CircuitOpen")) == (100, 900)


def test_what_is_logged(caplog):
    """What led to it is in the line of the opening, at WARNING; the rest is at DEBUG."""
    caplog.set_level(logging.DEBUG, "fluxibly")
    simulation = opened()
    simulation.call()
    simulation.run(30)
    simulation.call(reply=Reply(0, down()))
    simulation.run(60)
    simulation.call(reply=Reply(1))
    simulation.call()
    simulation.run()
    line = 'LLM call decision | middleware=CircuitBreaker, decision="{}"'
    why = ', error_type=ServerError, error_message="down"'
    assert caplog.messages == [
        line.format("opens the circuit of m at unknown for 30 s: 1 failures within 30 s") + why,
        line.format("refuses the call: the circuit of m at unknown is open for 30 s more"),
        line.format("tries m at unknown again, with this call"),
        line.format("opens the circuit of m at unknown for 30 s: a probe failed with ServerError") + why,
        line.format("tries m at unknown again, with this call"),
        line.format("refuses the call: the circuit of m at unknown has 1 probes under way"),
        line.format("closes the circuit of m at unknown"),
    ]
    levels = [record.levelname for record in caplog.records]
    assert levels == ["WARNING", "DEBUG", "DEBUG", "WARNING", "DEBUG", "DEBUG", "DEBUG"]


def test_memory_is_bounded():
    """5,000 services that fail once each."""
    layer = CircuitBreaker(by=lambda request: request.metadata["who"])
    simulation = Simulation(layer, Reply(0, down()))
    for number in range(5_000):
        simulation.run(number * 2.0)
        simulation.call(Request(model="m", messages="Hi", metadata={"who": number}))
    simulation.run()
    assert len(layer.store._sums) <= 1100


def test_with_a_provider_that_recovers(mode):
    """In each mode: down, refused, tried again, and closed."""
    clock = VirtualClock()
    layer = CircuitBreaker(failures=1, open_for=10)
    texts = []
    for answer, pause in ((down(), 5), ("unasked", 6), ("fine", 0), ("fine", 0)):
        ran = run(mode, scripted(mode, answer, clock=clock), [layer], REQUEST, clock=clock)
        texts.append(type(ran.error).__name__ if ran.error else ran.response.text)
        clock.advance(pause)
    assert texts == ["ServerError", "CircuitOpen", "fine", "fine"]
