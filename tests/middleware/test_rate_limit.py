"""`RateLimit`: no window has more than its rate and a burst, first come first served, and services are listened to."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from datetime import UTC, datetime
from email.utils import format_datetime

import anyio
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.calling import REQUEST, call
from support.simulation import Reply, Simulation

from fluxibly import LLM, race, register_function
from fluxibly._tokens import bytes_of, size_of
from fluxibly.errors import (
    ConfigError,
    Overloaded,
    RateLimitError,
    RateLimitWait,
    ServerError,
    StreamInterrupted,
    root_cause,
)
from fluxibly.middleware._rate_headers import told_limits
from fluxibly.middleware.rate_limit import RateLimit
from fluxibly.middleware.retry import Retry
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.testing import check_middleware
from fluxibly.testing.modes import BACKENDS, run_async
from fluxibly.types import Chunk, Message, Request, Response, Tool, Usage


class Bucket:
    """A limit in its plain form: a bucket that a call fills by its cost, and that drains at a rate."""

    def __init__(self, rate, burst):
        self.rate, self.burst = rate, burst
        self.level = self.at = 0.0
        self.ceiling, self.until = math.inf, -math.inf

    def drain(self, now):
        slow = max(0.0, min(now, self.until) - self.at)
        fast = now - self.at - slow
        self.level = max(0.0, self.level - slow * min(self.rate, self.ceiling) - fast * self.rate)
        self.at = now

    def add(self, cost, now):
        self.drain(now)
        self.level = max(0.0, self.level + cost)

    def slow_down(self, rate, until, now):
        self.drain(now)
        self.ceiling, self.until = rate, until

    def room(self, now):
        self.drain(now)
        return self.burst - self.level


def answer(used, **fields):
    return Response("fine", usage=Usage(input_tokens=used, output_tokens=0), **fields)


def openai_headers(limit, remaining, reset, name="requests"):
    return {
        f"x-ratelimit-limit-{name}": str(limit),
        f"x-ratelimit-remaining-{name}": str(remaining),
        f"x-ratelimit-reset-{name}": reset,
    }


def of_openai(left, seconds):
    return openai_headers(60, left, f"{seconds * 1000:.0f}ms")


def of_anthropic(left, seconds):
    # A moment in whole seconds.
    reset = datetime.fromtimestamp(1_800_000_000 + math.ceil(seconds), UTC)
    return {
        "anthropic-ratelimit-requests-limit": "60",
        "anthropic-ratelimit-requests-remaining": str(left),
        "anthropic-ratelimit-requests-reset": reset.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "date": format_datetime(datetime.fromtimestamp(1_800_000_000, UTC), usegmt=True),
    }


class TestInAllModes:
    def test_spreads_calls(self, mode):
        """After the burst, the calls of a mode follow one another at the rate."""
        layer = RateLimit(requests=2, per=10)
        assert call(mode, layer, "one").clock.sleeps == []
        assert call(mode, layer, "two").clock.sleeps == [5]

    def test_refuses_a_long_wait(self, mode):
        """Before anything is sent, at once, with the wait."""
        layer = RateLimit(requests=1, per=100)
        call(mode, layer, "one")
        made = call(mode, layer, "two")
        assert isinstance(made.ran.error, RateLimitWait)
        assert (made.provider.requests, made.clock.sleeps, made.ran.error.retryable) == ([], [], False)
        assert made.ran.error.retry_after == pytest.approx(100)
        assert str(made.ran.error) == (
            "RateLimit (requests=1, per=100) refuses a call of m-1 at scripted: it would wait 100 s (max_wait=60), "
            "with 0 calls ahead; send fewer calls, or ask another provider"
        )
        assert layer.store._rates["rate scripted/m-1"].waiting == {}

    @pytest.mark.parametrize("error", [ServerError("down"), KeyboardInterrupt(), ValueError("mine")])
    def test_a_failure_gives_its_tokens_back(self, mode, error):
        """But not its request. What was cut off before output counts its input."""
        layer = RateLimit(tokens=1000, estimate=lambda _: 800)
        call(mode, layer, error)
        rates = layer.store._rates["rate scripted/m-1"]
        taken = 0 if isinstance(error, Exception) else size_of(REQUEST) / 3.5 + 1
        assert rates.arrivals["tokens"] == pytest.approx(taken * 60 / 1000)

    def test_tokens_are_corrected(self, mode):
        layer = RateLimit(tokens=1000, estimate=lambda _: 800)
        call(mode, layer, answer(100))
        assert layer.store._rates["rate scripted/m-1"].arrivals["tokens"] == pytest.approx(100 * 60 / 1000)

    def test_a_stream_that_is_left(self, mode):
        """Its input and what had come count."""
        if not mode.streaming:
            return
        layer = RateLimit(tokens=60, burst=1000, estimate=lambda _: 900)
        call(mode, layer, ["x" * 35, "y" * 35, "z" * 70], stop_after=2)
        taken = layer.store._rates["rate scripted/m-1"].arrivals["tokens"]
        assert taken == pytest.approx(size_of(REQUEST) / 3.5 + 1 + 20)

    def test_retry_after_stops_all(self, mode):
        """Retry outside of it waits for the service, and so does every other call."""
        layer = RateLimit(requests=600)
        made = call(mode, layer, RateLimitError("slow down", retry_after=30))
        assert isinstance(made.ran.error, RateLimitError)
        made = call(mode, layer, "fine")
        assert made.clock.sleeps == [30]

    def test_with_retry_outside(self, mode):
        """Each attempt takes its place, and the wait that the service asked for is waited once."""
        layer = RateLimit(requests=600)
        made = call(mode, [Retry(), layer], RateLimitError("slow down", retry_after=30), "fine")
        assert made.response.text == "fine"
        assert sum(made.clock.sleeps) == pytest.approx(30)


class TestSettings:
    @pytest.mark.parametrize("name", ["requests", "tokens", "per"])
    @pytest.mark.parametrize(
        ("value", "got"), [(0, "0"), (-1, "-1"), (math.nan, "nan"), (math.inf, "inf"), (True, "True"), ("9", "'9'")]
    )
    def test_numbers(self, name, value, got):
        with pytest.raises(ValueError, match="RateLimit") as caught:
            RateLimit(**{"requests": 1, name: value})
        assert str(caught.value) == f"RateLimit: {name}: expected a number above 0, got {got}"

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ({"burst": 0}, "burst: expected a number from 1 up, got 0"),
            ({"burst": True}, "burst: expected a number from 1 up, got True"),
            ({"max_wait": -1}, "max_wait: expected a number from 0 up, got -1"),
            ({"block": -1}, "block: expected a number from 0 up, got -1"),
            ({"on_store_error": "no"}, "on_store_error: expected one of 'local', 'raise', 'open', got 'no'"),
            ({"by": "model"}, "function 'model' not registered"),
            ({"estimate": 5}, "estimate: expected a function, got an int"),
            ({"learn": "yes"}, "learn"),
            ({"give_back": 1}, "give_back"),
        ],
    )
    def test_others(self, setting, message):
        with pytest.raises((ValueError, TypeError, ConfigError)) as caught:
            RateLimit(requests=1, **setting)
        assert message in str(caught.value)

    def test_an_estimate_that_is_async(self):
        async def estimate(request):
            return 1

        with pytest.raises(ValueError, match="estimate: expected a plain function, got an async function; write def"):
            RateLimit(tokens=1, estimate=estimate)

    def test_rates_that_are_too_low(self):
        for numbers in ({"tokens": 1e-300, "per": 1e300}, {"requests": 1e-320}, {"requests": 1e300, "per": 1e-300}):
            with pytest.raises(ConfigError, match="expected at least 1e-09 a second, got"):
                RateLimit(**numbers)

    @pytest.mark.parametrize(
        ("yaml", "message"),
        [
            ("rate_limit: {burst: 5}", "expected requests=… or tokens=… beside burst, got neither"),
            (
                "rate_limit: {requests: '600'}",
                "llm.middleware[0].rate_limit.requests: expected a number above 0, got '600'",
            ),
            ("rate_limit: {requests: -1}", "llm.middleware[0].rate_limit.requests: expected a number above 0, got -1"),
            (
                "rate_limit: {requests: true}",
                "llm.middleware[0].rate_limit.requests: expected a number above 0, got True",
            ),
            ("rate_limit: {tokens: .nan}", "llm.middleware[0].rate_limit.tokens: expected a number above 0, got nan"),
            ("rate_limit: {tokens: 1, estimate: tokens_of_requst}", "did you mean 'tokens_of_request'?"),
            ("rate_limit: {tokens: 1, by: nobody}", "function 'nobody' not registered"),
            ("rate_limit: {request: 1}", "there is no such setting; did you mean 'requests'?"),
        ],
    )
    def test_in_yaml(self, yaml, message, tmp_path):
        register_function("tokens_of_request", len, replace=True)
        file = tmp_path / "f.yaml"
        file.write_text(f"llm: {{framework: echo, model: any, middleware: [{yaml}]}}")
        with pytest.raises(ConfigError) as caught:
            LLM.from_yaml(file)
        assert message in str(caught.value)

    def test_repr(self):
        """It shows every setting."""
        assert repr(RateLimit(requests=600, burst=5)) == (
            "RateLimit(requests=600, tokens=None, per=60.0, burst=5, max_wait=60.0, learn=True, estimate=None, "
            "give_back=True, by='provider and model', store=MemoryStore(), block=0.1, on_store_error='local')"
        )

    def test_keeps_the_laws(self):
        check_middleware(RateLimit(requests=1000))
        check_middleware(RateLimit(tokens=1_000_000))

    @pytest.mark.parametrize("value", [-1, math.nan, math.inf, 10**400, "9", None, True])
    def test_an_estimate_that_is_no_number(self, value):
        made = Simulation(RateLimit(tokens=1000, estimate=lambda _: value)).call()
        assert isinstance(made.error, TypeError)
        assert str(made.error).startswith("RateLimit: estimate(request): expected a number of tokens from 0 up, got ")

    def test_an_estimate_above_the_burst(self):
        """No wait would be long enough."""
        made = Simulation(RateLimit(tokens=1000, burst=100, estimate=lambda _: 101)).call()
        assert isinstance(made.error, RateLimitWait)
        assert made.error.retry_after is None
        assert "its 101 tokens are more than burst=100" in str(made.error)


COSTS = [1, 5, 20]


class Limited(RuleBasedStateMachine):
    """Calls of given costs that begin, end, fail, and are cancelled, against a plain bucket for each limit."""

    @initialize(
        requests=st.sampled_from([None, 1.0, 4.0]),
        give_back=st.booleans(),
        max_wait=st.sampled_from([0.0, 5.0, 1000.0]),
    )
    def begin(self, requests, give_back, max_wait):
        self.max_wait, self.give_back = max_wait, give_back
        self.layer = RateLimit(
            requests=requests,
            tokens=10.0,
            per=1,
            burst=None if requests else 40,
            max_wait=max_wait,
            give_back=give_back,
            estimate=lambda request: request.metadata["cost"],
        )
        # A burst of one second's requests; where they are limited, tokens have one second's, or one call's.
        self.requests = Bucket(requests, max(1.0, requests)) if requests else None
        self.tokens = Bucket(10.0, 10.0 if requests else 40.0)
        self.log = []
        self.counted = {}
        self.simulation = Simulation(self.layer)
        self.simulation.when_sent.append(self.sent)
        self.simulation.when_ended.append(self.ended)
        self.simulation.checks.append(self.holds)
        self.paused_until = -math.inf

    def cost(self, call):
        return call.request.metadata["cost"]

    def burst(self, cost):
        return max(self.tokens.burst, cost)

    def sent(self, call):
        now, cost = self.simulation.now, self.cost(call)
        assert now >= self.paused_until - 1e-6, "the service has asked for a pause"
        self.tokens.add(cost, now)
        assert self.tokens.level <= self.burst(cost) + 1e-5
        if self.requests:
            self.requests.add(1, now)
            assert self.requests.level <= self.requests.burst + 1e-5
        self.log.append((now, call, True))

    def ended(self, call):
        if not call.sent_at:
            return
        now, cost, used = self.simulation.now, self.cost(call), call.request.metadata["used"]
        self.log.append((now, call, False))
        kept = min(call.request.metadata["input"], cost)
        self.counted[call] = used if call.response else 0 if isinstance(call.error, Exception) else kept
        if isinstance(call.error, RateLimitError):
            self.paused_until = max(self.paused_until, now + call.error.retry_after)
        if not self.give_back:
            return
        self.tokens.add(self.counted[call] - cost, now)

    @rule(
        cost=st.sampled_from(COSTS),
        share=st.sampled_from([1.0, 0.2]),
        latency=st.sampled_from([0.0, 0.5, 3.0]),
        fails=st.sampled_from([None, None, ServerError("down"), RateLimitError("slow", retry_after=2.5)]),
    )
    def call(self, cost, share, latency, fails):
        self.simulation.run(self.simulation.now)
        now = self.simulation.now
        free = not self.simulation.waiting and self.has_room(cost, now)
        details = {"cost": cost, "used": cost * share}
        request = Request(model="m", messages="Hi", metadata=details)
        # What a call that is given up has taken is guessed when it begins. Later guesses have learned from others.
        details["input"] = self.layer._estimates.of(request, "unknown/m").input
        used = Response("fine", usage=Usage(input_tokens=0, output_tokens=cost * share))
        made = self.simulation.call(request, reply=Reply(latency=latency, outcome=fails or used))
        if free is True:
            assert made.sent_at == [now]
        elif free is False and self.max_wait == 0:
            assert isinstance(made.error, RateLimitWait)

    def has_room(self, cost, now):
        """Whether the limits allow a cost now; None where rounding decides."""
        rooms = [self.burst(cost) - self.tokens.burst + self.tokens.room(now) - cost, now - self.paused_until]
        if self.requests:
            rooms.append(self.requests.room(now) - 1)
        return None if abs(min(rooms)) < 1e-5 else min(rooms) > 0

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0, 7.0]))
    def pass_time(self, seconds):
        self.simulation.run(self.simulation.now + seconds)

    @precondition(lambda self: self.simulation.active)
    @rule(data=st.data(), closes=st.booleans())
    def end(self, data, closes):
        active = [*self.simulation.active]
        chosen = active[data.draw(st.integers(0, len(active) - 1))]
        (chosen.close if closes else chosen.cancel)()

    @invariant()
    def holds(self):
        waiting = self.simulation.waiting
        if self.simulation.is_quiet and waiting:
            assert not self.has_room(self.cost(waiting[0]), self.simulation.now), "the first could go"
        for each in waiting:
            assert self.simulation.now - each.began_at <= self.max_wait + 1e-6

    def teardown(self):
        if not hasattr(self, "simulation"):
            return
        self.simulation.run()
        assert not self.simulation.active, "somebody waits for ever"
        sent = [made.number for _, made in self.simulation.sent]
        assert sent == sorted(sent), "not first come, first served"
        for made in self.simulation.calls:
            if isinstance(made.error, RateLimitWait):
                assert not made.sent_at
            elif not (made.sent_at or made.error is not None or made.response is None):
                raise AssertionError(f"{made} got an answer and sent nothing")
        self.check_what_was_used()

    def check_what_was_used(self):
        """What was really used passes the limit by no more than what was unspent at a time, and given back."""
        used, unspent, most_unspent = Bucket(10.0, 0.0), 0.0, 0.0
        for now, made, begins in self.log:
            difference = self.cost(made) - self.counted[made] if self.give_back else 0.0
            unspent += difference if begins else -difference
            most_unspent = max(most_unspent, unspent)
            if begins:
                used.add(self.counted[made], now)
                assert used.level <= self.burst(20 if self.requests else 0) + most_unspent + 1e-5


TestLimited = Limited.TestCase
TestLimited.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("give_back", [True, False])
def test_a_thousand_calls(seed, give_back):
    """A busy hour: random calls with guesses, failures, cancellations and streams that are left; no call waits in vain."""
    chance = random.Random(seed)  # noqa: S311  # the same calls in each run
    layer = RateLimit(requests=300, tokens=60_000, max_wait=1e9, give_back=give_back)
    simulation = Simulation(layer)
    requests = Bucket(5.0, 5.0)

    def sent(call):
        requests.add(1, simulation.now)
        assert requests.level <= 5 + 1e-6

    simulation.when_sent.append(sent)

    def begin():
        used = chance.randrange(1, 400)
        whole = Response("x" * used, usage=Usage(input_tokens=used, output_tokens=used))
        reply = Reply(
            latency=chance.expovariate(1),
            outcome=chance.choice([whole, whole, whole, ServerError("down")]),
            items=chance.choice([("a" * used, Chunk(usage=whole.usage)), ("a" * used, ServerError("cut"))]),
        )
        request = Request(model=chance.choice(["m", "n"]), messages="x" * used * 4)
        made = simulation.call(request, reply=reply, streaming=chance.random() < 0.5)
        if chance.random() < 0.2:
            stop = chance.choice([made.close, made.cancel])
            simulation.at(simulation.now + chance.expovariate(0.1), lambda: made.is_over or stop())

    layer_by_all = RateLimit(
        requests=300, tokens=60_000, max_wait=1e9, give_back=give_back, by="provider", store=layer.store
    )
    simulation.layers = [layer_by_all]
    for _ in range(1500):
        simulation.at(chance.uniform(0, 240), begin)
    simulation.run()
    assert not simulation.active
    numbers = [made.number for _, made in simulation.sent]
    assert numbers == sorted(numbers)
    assert all(made.sent_at or made.error or made.response is None for made in simulation.calls)
    answered = sum(made.response is not None for made in simulation.calls)
    assert answered > 600


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.3, 2.0]), st.sampled_from([1, 4, 10])), min_size=1, max_size=40),
    st.sampled_from([0.05, 2.05, 20.05]),  # no wait is just as long, which rounding would decide
)
@settings(max_examples=80, deadline=None)
def test_who_is_refused(arrivals, max_wait):
    """With known costs, exactly those are refused who would have waited too long, and all others go at their time."""
    layer = RateLimit(tokens=2, per=1, burst=10, max_wait=max_wait, estimate=lambda r: r.metadata["cost"])
    simulation = Simulation(layer)
    bucket, last = Bucket(2.0, 10.0), 0.0
    expected = []
    for pause, cost in arrivals:
        simulation.run(simulation.now + pause)
        now = simulation.now
        reply = Reply(latency=1000, outcome=Response("fine", usage=Usage(input_tokens=0, output_tokens=cost)))
        simulation.call(Request(model="m", messages="Hi", metadata={"cost": cost}), reply=reply)
        ahead = max(now, last)
        planned = Bucket(2.0, 10.0)
        planned.level, planned.at = bucket.level, bucket.at
        planned.drain(ahead)
        go = ahead + max(0.0, planned.level + cost - 10) / 2
        if go - now > max_wait + 1e-9:
            expected.append(None)
            continue
        bucket, last = planned, go
        bucket.add(cost, go)
        expected.append(go)
    simulation.run()
    got = [made.sent_at[0] if made.sent_at else None for made in simulation.calls]
    assert [go is None for go in expected] == [go is None for go in got]
    for ours, theirs in zip(got, expected, strict=True):
        assert ours == pytest.approx(theirs)


class TestPauses:
    @pytest.mark.parametrize("error", [RateLimitError, Overloaded])
    def test_everybody_waits(self, error):
        """Those under way, those in the queue and those that come later."""
        simulation = Simulation(RateLimit(requests=60))
        first = simulation.call(reply=Reply(latency=0.5, outcome=error("slow", retry_after=10)))
        for _ in range(3):
            simulation.call()
        simulation.run(3)
        simulation.call()
        simulation.run()
        assert first.error is not None
        assert [made.sent_at[0] for made in simulation.calls[1:]] == pytest.approx([10.5, 11.5, 12.5, 13.5])

    def test_a_longer_pause_than_anybody_waits(self):
        """All who wait are refused at once, with the wait."""
        simulation = Simulation(RateLimit(requests=60, max_wait=5))
        simulation.call(reply=Reply(latency=0.5, outcome=RateLimitError("slow", retry_after=100)))
        waiting = [simulation.call() for _ in range(3)]
        simulation.run()
        assert [made.ended_at for made in waiting] == [0.5] * 3
        assert all(isinstance(made.error, RateLimitWait) for made in waiting)
        assert waiting[0].error.retry_after == pytest.approx(100)

    def test_of_a_stream(self):
        """The error that interrupts a stream pauses as well."""
        simulation = Simulation(RateLimit(requests=6000))
        cut = Reply(items=("a", RateLimitError("slow", retry_after=10)), gap=1)
        made = simulation.call(reply=cut, streaming=True)
        simulation.run()
        assert isinstance(made.error, StreamInterrupted)
        assert isinstance(root_cause(made.error), RateLimitError)
        later = simulation.call()
        simulation.run()
        assert later.sent_at == [12]

    def test_learn_false(self):
        simulation = Simulation(RateLimit(requests=6000, learn=False))
        simulation.call(reply=Reply(outcome=RateLimitError("slow", retry_after=10)))
        simulation.run()
        assert simulation.call().sent_at == [1]

    def test_refusals_of_layers_within_are_no_pause(self):
        """Only what a service says counts."""

        def refuse(request, call_next):
            raise RateLimitWait("later", retry_after=50)
            yield

        layer = RateLimit(requests=6000)
        simulation = Simulation([layer, refuse])
        simulation.call()
        simulation.layers = [layer]
        assert simulation.call().sent_at == [0]


class TestHeaders:
    @pytest.mark.parametrize("headers_of", [of_openai, of_anthropic])
    def test_a_smaller_limit_slows_down(self, headers_of):
        """A service with one request a second gets no more once its bucket is empty, and its numbers never raise ours."""
        simulation = Simulation(RateLimit(requests=600, max_wait=1e9))
        service = Bucket(1.0, 60.0)
        refused = 0

        def reply(call):
            nonlocal refused
            now = simulation.now
            if service.room(now) < 1:
                refused += 1
                headers = headers_of(0, service.level)
                return Reply(0.2, RateLimitError("slow", retry_after=1, rate_limits=headers))
            service.add(1, now)
            return Reply(0.2, answer(1, rate_limits=headers_of(int(service.room(now)), service.level)))

        simulation.reply = reply
        for _ in range(400):
            simulation.call()
        simulation.run()
        assert refused == 0
        times = [at for at, _ in simulation.sent]
        assert 320 <= times[-1] <= 400

    @given(st.floats(0.05, 20), st.integers(0, 3))
    @settings(max_examples=40, deadline=None)
    def test_only_lower_and_come_back(self, service_rate, quiet):
        """Whatever a service says, no window has more than the user's rate; and after a while that is reached again."""
        total = max(1, round(service_rate * 60))
        simulation = Simulation(RateLimit(requests=60, max_wait=1e9))
        bucket = Bucket(1.0, 1.0)

        def sent(call):
            bucket.add(1, simulation.now)
            assert bucket.level <= 1 + 1e-5

        simulation.when_sent.append(sent)
        headers = openai_headers(total, 0, "61s")
        for _ in range(20):
            simulation.call(reply=Reply(0.1, answer(1, rate_limits=headers)))
        simulation.run()
        simulation.run(simulation.now + 61 + quiet)
        began = simulation.now
        for _ in range(20):
            simulation.call()
        simulation.run()
        assert simulation.sent[-1][0] - began == pytest.approx(19)

    def test_rise_again_before_they_are_over(self):
        """A later answer with a higher rate lifts a lower one at once."""
        simulation = Simulation(RateLimit(requests=60, max_wait=1e9))
        simulation.call(reply=Reply(0, answer(1, rate_limits=openai_headers(6, 0, "61s"))))
        simulation.run(0)
        slow = simulation.call(reply=Reply(0, answer(1, rate_limits=openai_headers(600, 599, "0.1s"))))
        simulation.call()
        simulation.call()
        simulation.run()
        assert slow.sent_at == pytest.approx([10 / 0.95])
        assert [made.sent_at[0] for made in simulation.calls[2:]] == pytest.approx([10 / 0.95 + 1, 10 / 0.95 + 2])

    def test_a_limit_for_a_day_slows_nobody_down_at_half(self):
        """What is left of it may be used."""
        (told,) = told_limits(openai_headers(14_400, 7000, "12h20m1s"))
        assert told.rate > 100
        (told,) = told_limits(openai_headers(14_400, 0, "24h0m1s"))
        assert told.rate == pytest.approx(0.95 * 14_400 / 86_400)

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            openai_headers("many", 5, "1s"),
            openai_headers(10, "few", "1s"),
            openai_headers(10, 5, "soon"),
            openai_headers(10, 5, "0s"),
            openai_headers(0, 0, "1s"),
            openai_headers(-5, -5, "1s"),
            openai_headers("nan", "nan", "nan"),
            openai_headers("inf", "inf", "inf"),
            openai_headers(10, 0, "1e300s"),
            openai_headers(10, 0, "9" * 300),
            {"x-ratelimit-limit-requests": "10"},
            {
                "anthropic-ratelimit-tokens-limit": "10",
                "anthropic-ratelimit-tokens-remaining": "5",
                "anthropic-ratelimit-tokens-reset": "tomorrow",
            },
        ],
    )
    def test_that_say_nothing(self, headers):
        assert [*told_limits(headers)] == []

    def test_of_anthropic(self):
        """Moments are read by the service's own clock."""
        headers = {
            "anthropic-ratelimit-requests-limit": "4000",
            "anthropic-ratelimit-requests-remaining": "1000",
            "anthropic-ratelimit-requests-reset": "2026-04-05T14:28:43Z",
            "anthropic-ratelimit-tokens-limit": "4800000",
            "anthropic-ratelimit-tokens-remaining": "4800000",
            "anthropic-ratelimit-tokens-reset": "2026-04-05T14:27:58Z",
            "date": "Sun, 05 Apr 2026 14:27:58 GMT",
        }
        (told,) = told_limits(headers)
        assert (told.name, told.seconds) == ("requests", 44)
        assert told.rate == pytest.approx(1000 / 60 + 0.95 * 3000 / 44)

    def test_of_tokens(self):
        simulation = Simulation(RateLimit(tokens=6000, max_wait=1e9, estimate=lambda _: 100))
        headers = openai_headers(600, 0, "61s", name="tokens")
        simulation.call(reply=Reply(0, answer(100, rate_limits=headers)))
        simulation.run(0)
        simulation.call(reply=Reply(0, answer(100)))
        simulation.run()
        assert simulation.sent[1][0] == pytest.approx(10 / 0.95)


class TestEstimates:
    def test_are_learned(self):
        """After a few answers, an estimate is about what calls take, for each model apart."""
        layer = RateLimit(tokens=1e6)
        simulation = Simulation(layer)
        for _ in range(30):
            usage = Usage(input_tokens=500, output_tokens=40)
            simulation.call(Request(model="m", messages="x" * 1000), reply=Reply(0, Response("fine", usage=usage)))
            simulation.run()
        known = layer._estimates.of(Request(model="m", messages="x" * 2000), "unknown/m")
        assert known.total == pytest.approx(1040, abs=2)
        assert layer._estimates.of(Request(model="n", messages="x" * 35), "unknown/n").total == pytest.approx(267)

    def test_are_of_the_model_whatever_shares_the_limit(self):
        """Two customers of one model learn together."""
        layer = RateLimit(tokens=1e6, by=lambda request: request.metadata["who"])
        simulation = Simulation(layer)
        usage = Usage(input_tokens=1, output_tokens=40)
        for who in range(10):
            simulation.call(
                Request(model="m", messages="x", metadata={"who": who}), reply=Reply(0, Response("fine", usage=usage))
            )
        simulation.run()
        assert [*layer._estimates._models] == ["unknown/m"]

    def test_are_not_learned_from_a_part(self):
        """A stream that was cut off has told some of its output at most."""
        layer = RateLimit(tokens=1e6)
        simulation = Simulation(layer)
        part = Chunk("x", usage=Usage(input_tokens=9, output_tokens=1))
        simulation.call(reply=Reply(items=(part, ServerError("cut"))), streaming=True)
        simulation.run()
        assert layer._estimates._models["unknown/m"].calls == 0

    def test_of_a_part_count_its_text(self):
        """The service has counted the input, and one token of 100."""
        layer = RateLimit(tokens=60_000, estimate=lambda _: 900)
        simulation = Simulation(layer)
        part = Chunk("x" * 350, usage=Usage(input_tokens=9, output_tokens=1))
        simulation.call(reply=Reply(0, items=(part, ServerError("cut")), gap=0), streaming=True)
        simulation.run()
        assert layer.store._rates["rate unknown/m"].arrivals["tokens"] == pytest.approx(109 / 1000)

    def test_respect_max_tokens(self):
        layer = RateLimit(tokens=1e6)
        estimate = layer._estimates.of(Request(model="m", messages="x", max_tokens=10), "m")
        assert estimate.total - estimate.input == 10

    def test_size(self):
        """Texts count in bytes, and tools too; media do not."""
        messages = [Message.system("abc"), Message.user("é\ud800")]
        tool = Tool("look", "Look", {"type": "object"})
        assert size_of(Request(model="m", messages=messages)) == 3 + 5
        assert size_of(Request(model="m", messages="x", tools=[tool])) == 1 + 4 + len("{'type': 'object'}")
        assert bytes_of("日本") == 6

    def test_a_guess_above_the_burst_goes_all_the_same(self):
        """A guess may be wrong; what it lacks is taken afterwards."""
        simulation = Simulation(RateLimit(tokens=100, per=1, burst=50, max_wait=100))
        simulation.call(reply=Reply(0, answer(200)))
        simulation.run(0)
        later = simulation.call(reply=Reply(0, answer(1)))
        simulation.run()
        assert simulation.calls[0].sent_at == [0]
        assert later.sent_at == pytest.approx([2])

    def test_models_are_bounded(self):
        layer = RateLimit(tokens=1e6)
        for number in range(5000):
            layer._estimates.of(REQUEST, f"{number}")
        assert len(layer._estimates._models) <= 1000


def test_a_deadline_that_a_wait_would_pass():
    """The call is refused at once, so that another provider may take it, and leaves the queue."""
    simulation = Simulation(RateLimit(requests=6))
    simulation.call()
    late = simulation.call(deadline=5)
    after = simulation.call()
    simulation.run()
    assert isinstance(late.error, RateLimitWait)
    assert "it would wait 10 s (past the deadline of the call), with 0 calls ahead" in str(late.error)
    assert (late.ended_at, late.error.retry_after, after.sent_at) == (0, 10, [10])


@given(st.lists(st.sampled_from([0.0, 0.4, 2.0]), min_size=2, max_size=20), st.booleans())
@settings(max_examples=40, deadline=None)
def test_branches_of_a_race(latencies, streaming):
    """A loser that waits leaves the queue; its request, once sent, is never given back."""
    layer = RateLimit(requests=60, max_wait=1e6)

    def hedge(request, call_next):
        return (yield from race(call_next, [request, request], delay=0.5))

    simulation = Simulation([hedge, layer])
    bucket = Bucket(1.0, 1.0)

    def sent(call):
        bucket.add(1, simulation.now)
        assert bucket.level <= 1 + 1e-6

    simulation.when_sent.append(sent)
    left = iter(latencies * 2)
    for _ in latencies:
        simulation.call(reply=lambda call: Reply(latency=next(left)), streaming=streaming)
    simulation.run()
    assert all(made.response is not None for made in simulation.calls)
    assert layer.store._rates["rate unknown/m"].waiting == {}


class TestManyAtOnce:
    def test_threads(self):
        """100 threads: the rate holds in real time, and nobody is forgotten."""
        layer = RateLimit(requests=500, per=1, burst=20)
        times: list[float] = []

        class Provider:
            def complete(self, request):
                times.append(time.perf_counter())
                return "fine"

        pipeline = Pipeline(Provider(), [layer])
        began = time.perf_counter()
        threads = [
            threading.Thread(target=lambda: [pipeline.complete(REQUEST) for _ in range(3)], daemon=True)
            for _ in range(100)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(times) == 300
        assert max(times) - began >= (300 - 20) / 500 - 0.001
        assert layer.store._rates[next(iter(layer.store._rates))].waiting == {}

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_tasks(self, backend):
        """1,000 tasks, a tenth of which is cancelled while it waits."""
        layer = RateLimit(requests=2000, per=1, burst=100, tokens=1e9)
        times: list[float] = []

        class Provider:
            async def complete(self, request):
                times.append(time.perf_counter())
                return "fine"

        async def main():
            pipeline = AsyncPipeline(Provider(), [layer])

            async def work(number):
                with anyio.move_on_after(0.001 if number % 10 == 0 else 60):
                    await pipeline.complete(REQUEST)

            with anyio.fail_after(60):
                async with anyio.create_task_group() as tasks:
                    for number in range(1000):
                        tasks.start_soon(work, number)

        began = time.perf_counter()
        run_async(main, backend)
        assert 900 <= len(times) <= 1000
        assert max(times) - began >= (900 - 100) / 2000 - 0.001
        assert layer.store._rates[next(iter(layer.store._rates))].waiting == {}


def test_what_is_logged(caplog):
    caplog.set_level(logging.DEBUG, "fluxibly")
    simulation = Simulation(RateLimit(requests=60, tokens=1e6, max_wait=5))
    simulation.call(reply=Reply(0.5, RateLimitError("slow", retry_after=3)))
    simulation.call()
    simulation.run()
    simulation.call(reply=Reply(0, RateLimitError("slow", retry_after=30)))
    simulation.run()
    simulation.call()
    numbers = "(requests=60, tokens=1e+06, per=60)"
    line = 'LLM call decision | middleware=RateLimit, decision="{}"'
    assert caplog.messages == [
        line.format("stops all calls that share a limit with m at unknown for 3 s, as the service asked"),
        line.format(f"let the call wait 3.5 s {numbers}"),
        line.format("stops all calls that share a limit with m at unknown for 30 s, as the service asked"),
        line.format(f"refuses the call: it would wait 30 s (max_wait=5), with 0 calls ahead {numbers}"),
    ]


def test_memory_is_bounded():
    """5,000 users, each with a limit of its own."""
    layer = RateLimit(requests=60, tokens=1e6, by=lambda request: request.metadata["who"])
    simulation = Simulation(layer)
    for number in range(5_000):
        simulation.at(
            number * 2.0,
            lambda number=number: simulation.call(Request(model="m", messages="Hi", metadata={"who": number})),
        )
    simulation.run()
    assert len(layer.store._rates) <= 2048
    assert len(layer._lowered) == 0
