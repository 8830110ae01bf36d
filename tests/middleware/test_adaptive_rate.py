"""`RateLimit()` without numbers: it finds the limit of a service, and keeps to it."""

from __future__ import annotations

import logging
import math
import threading
from itertools import pairwise

import pytest
from hypothesis import given, settings, strategies as st
from support.calling import REQUEST, call
from support.simulation import Reply, Simulation
from support.stores import SlowStore

from benchmarks.simulation import Bucket, Client, Service, Window, simulate
from fluxibly import LLM, Pipeline
from fluxibly.errors import (
    ConfigError,
    QuotaExceeded,
    RateLimitError,
    RateLimitWait,
    ServerError,
    StoreError,
)
from fluxibly.middleware import Concurrency, RateLimit, Retry
from fluxibly.middleware._adaptive_rate import FIRST, FORGOTTEN, HIGHEST, LOWEST, AdaptiveRate, Pace
from fluxibly.middleware._rate_headers import Told
from fluxibly.stores import Entry, Limit, MemoryStore, Turn
from fluxibly.testing import check_middleware
from fluxibly.types import Response, Usage

KEY = "rate scripted/m-1"


@pytest.fixture(autouse=True)
def quiet():
    """Thousands of retries are not logged."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def service(rpm=3000.0, *, bucket=10.0, tokens=None, **settings):
    """Return a service with a limit a minute, of which it allows as much as `bucket` seconds bring at once."""
    of_tokens = None if tokens is None else Bucket(tokens / 60, tokens / 60 * bucket)
    return Service(Bucket(rpm / 60, rpm / 60 * bucket), of_tokens, **settings)


def client(*layers, at_once=200):
    return Client([Retry(max_retries=50), *(layers or [RateLimit()])], at_once)


def headers(limit, remaining, reset, name="requests"):
    return {
        f"x-ratelimit-limit-{name}": str(limit),
        f"x-ratelimit-remaining-{name}": str(remaining),
        f"x-ratelimit-reset-{name}": reset,
    }


def rate_of(layer):
    [rate] = layer._rates.values()
    return rate


class TestGoals:
    """The real pipeline and middleware, against a simulated service, in virtual time."""

    def test_with_headers(self):
        """It gets all of the limit, and hardly a 429."""
        made = service(headers="openai")
        [errors] = simulate(made, [client()], 50)
        assert made.rate(20, 50) >= 0.98 * 3000
        assert made.share_refused(0, 50) <= 0.01
        assert not errors

    def test_without_headers(self):
        made = service()
        [errors] = simulate(made, [client()], 70)
        assert made.rate(20, 70) >= 0.97 * 3000
        assert made.share_refused(0, 70) <= 0.1
        assert not errors

    def test_in_blocks(self):
        """Over a store that does I/O, two processes that reserve ahead follow the rate while their calls wait for it."""
        made, store = service(), SlowStore()
        simulate(made, [client(RateLimit(store=store), at_once=100) for _ in range(2)], 40)
        assert made.rate(5, 40) >= 0.95 * 3000
        assert made.share_refused(0, 40) <= 0.15

    @pytest.mark.parametrize("told", ["openai", None])
    def test_the_limit_is_halved(self, told):
        """Ten seconds later it has found the new one."""
        made = service(1500, headers=told)
        simulate(made, [client()], 90, {50: lambda: made.requests.set_rate(12.5)})
        assert made.rate(60, 90) >= 0.97 * 750
        assert made.share_refused(60, 90) <= 0.1
        assert made.share_refused(0, 90) <= (0.01 if told else 0.1)

    def test_the_limit_is_tripled(self):
        made = service(300)
        simulate(made, [client()], 90, {40: lambda: made.requests.set_rate(15)})
        assert made.rate(70, 90) >= 0.9 * 900

    @pytest.mark.parametrize("told", ["openai", "anthropic", None])
    def test_few_requests_a_minute(self, told):
        made = service(60, headers=told)
        simulate(made, [client(at_once=8)], 400)
        assert made.rate(60, 400) >= 0.97 * 60
        assert made.share_refused(60, 400) <= 0.1

    def test_three_requests_a_minute(self):
        made = service(3, bucket=60)
        simulate(made, [client(RateLimit(max_wait=900), at_once=4)], 900)
        assert made.rate(60, 900) >= 0.9 * 3
        assert made.share_refused(120, 900) <= 0.15

    def test_many_requests_a_minute(self):
        """Seconds after the start."""
        made = service(30_000, bucket=1, latency=0.2)
        simulate(made, [client(at_once=300)], 12)
        assert made.rate(10, 12) >= 0.8 * 30_000

    @pytest.mark.parametrize("told", ["openai", None])
    def test_tokens_are_the_limit(self, told):
        """300,000 a minute, of which an answer takes 325 on average."""
        made = service(30_000, tokens=300_000, headers=told)
        simulate(made, [client()], 70)
        assert made.rate(20, 70) >= 0.95 * 300_000 / 325
        assert made.share_refused(0, 70) <= (0.01 if told else 0.1)

    @pytest.mark.parametrize("told", ["openai", None])
    def test_windows(self, told):
        """A limit that is there again as a whole each minute, of a service that says when."""
        made = Service(Window(10), headers=told, retry_after=True)
        simulate(made, [client(at_once=60)], 180)
        assert made.rate(60, 180) >= 0.97 * 600
        assert made.share_refused(0, 180) <= 0.02

    def test_a_service_that_refuses_everything(self):
        """Half a minute after it is over, the rate is what it was."""
        made = service(1200)
        was = made.requests.rate
        simulate(
            made, [client()], 150, {40: lambda: made.requests.set_rate(1e-6), 70: lambda: made.requests.set_rate(was)}
        )
        assert made.rate(120, 150) >= 0.8 * 1200
        assert sum(45 <= at < 70 for at in made.sent) <= 60, "it asks now and then, and no more"

    @pytest.mark.parametrize("told", ["openai", None])
    @pytest.mark.parametrize("shared", [True, False])
    def test_two_clients(self, told, shared):
        """They share the limit, through a store or without."""
        made, store = service(1200, headers=told), MemoryStore()
        layers = [RateLimit(store=store) if shared else RateLimit() for _ in range(2)]
        simulate(made, [client(layer, at_once=60) for layer in layers], 80)
        assert made.rate(30, 80) >= 0.95 * 1200
        assert made.share_refused(0, 80) <= (0.01 if told and shared else 0.1)

    def test_latency_ends_the_slow_start(self):
        """A service that slows down, and refuses nothing, is not asked for twice as much every second."""
        made, layer = service(1e9, knee=20, latency=0.5), RateLimit()
        simulate(made, [client(layer, at_once=400)], 12)
        assert not rate_of(layer).pace.is_doubling
        assert rate_of(layer).pace.rate <= 80, "about 40 a second are what it answers"

    def test_behind_a_slow_server(self):
        """With a bound on concurrency, the median latency is at most twice the best, and no throughput is lost."""
        best = service(60_000, knee=40)
        simulate(best, [client(Concurrency(40), at_once=40)], 40)
        made = service(60_000, knee=40)
        simulate(made, [client(RateLimit(), Concurrency("auto", queue=10_000), at_once=400)], 80)
        assert made.median_latency(30, 80) <= 2 * best.median_latency(10, 40)
        assert made.rate(30, 80) >= 0.95 * best.rate(10, 35)

    def test_calls_at_once_at_the_start(self):
        """Their estimated waits count on a rate that is being doubled, so they are not refused."""
        made = service(30_000)
        [errors] = simulate(made, [client(RateLimit(max_wait=10), at_once=1000)], 8)
        assert not errors
        assert len(made.sent) >= 1000


class TestInAllModes:
    def test_an_idle_user_is_never_slowed(self, mode):
        layer = RateLimit()
        for _ in range(5):
            assert call(mode, layer, "fine").clock.sleeps == []

    def test_a_refusal_cuts_the_rate(self, mode):
        layer = RateLimit()
        made = call(mode, layer, RateLimitError("slow down"))
        assert isinstance(made.ran.error, RateLimitError)
        assert rate_of(layer).limits(0.0) == (Limit("requests", FIRST / 2, FIRST / 2, 1.0),)

    @pytest.mark.parametrize("error", [ServerError("down"), QuotaExceeded("empty"), ValueError("mine")])
    def test_other_errors_do_not(self, mode, error):
        layer = RateLimit()
        call(mode, layer, error)
        assert rate_of(layer).limits(0.0) == (Limit("requests", FIRST, FIRST, 1.0),)

    def test_retry_after_stops_all(self, mode):
        layer = RateLimit()
        call(mode, layer, RateLimitError("slow down", retry_after=30))
        assert call(mode, layer, "fine").clock.sleeps == [30]

    def test_headers_are_followed(self, mode):
        """The limits of requests and of tokens, with the tokens that calls are expected to take."""
        layer = RateLimit(estimate=lambda _: 300)
        told = {**headers(60, 0, "60s"), **headers(6000, 0, "60s", "tokens")}
        call(mode, layer, Response("fine", rate_limits=told))
        [requests, tokens] = rate_of(layer).limits(0.0)
        assert (requests.name, tokens.name) == ("requests", "tokens")
        assert requests.rate == pytest.approx(0.95 * 60 / 59)
        assert tokens.rate == pytest.approx(0.95 * 6000 / 59)
        call(mode, layer, Response("fine", usage=Usage(input_tokens=100, output_tokens=100)))
        arrivals = layer.store._rates[KEY].arrivals
        assert arrivals["tokens"] == pytest.approx(200 / tokens.rate, abs=0.2), "corrected"

    def test_headers_of_a_refusal(self, mode):
        layer = RateLimit()
        call(mode, layer, RateLimitError("slow down", rate_limits=headers(60, 0, "60s")))
        assert rate_of(layer).limits(0.0)[0].rate == pytest.approx(0.95 * 60 / 59)

    def test_refuses_a_long_wait(self, mode):
        """With what was found in the message."""
        layer = RateLimit(max_wait=5)
        call(mode, layer, Response("fine", rate_limits=headers(60, 0, "3001s")))
        assert call(mode, layer, "fine").response.text == "fine"
        made = call(mode, layer, "fine")
        assert isinstance(made.ran.error, RateLimitWait)
        assert str(made.ran.error).startswith(
            "RateLimit (requests=2 a minute, as the service's headers say) refuses a call of m-1 at scripted: it would wait "
        )
        assert made.provider.requests == []


class TestSettings:
    @pytest.mark.parametrize(
        ("setting", "why"),
        [
            ({"burst": 5}, "beside burst, got neither; leave burst out (what may go at once follows from"),
            ({"per": 1}, "beside per, got neither; leave per out (it is the time that the numbers are for)"),
            (
                {"learn": False},
                "beside learn=False, got neither; leave learn=False out (a rate without numbers can only",
            ),
        ],
    )
    def test_that_need_numbers(self, setting, why):
        with pytest.raises(ConfigError) as caught:
            RateLimit(**setting)
        assert str(caught.value).startswith(f"RateLimit: expected requests=… or tokens=… {why}")
        assert str(caught.value).endswith("write RateLimit(requests=600)")

    def test_in_yaml(self, tmp_path):
        file = tmp_path / "f.yaml"
        file.write_text(
            "llm: {framework: echo, model: any, middleware: [retry, rate_limit, {concurrency: {limit: auto}}]}"
        )
        with LLM.from_yaml(file) as llm:
            assert llm.complete("Hello").text == "Hello"
            assert "RateLimit" in str(llm.explain())

    def test_keeps_the_laws(self):
        check_middleware(RateLimit())

    def test_numbers_stay_the_ceiling(self):
        """A service that would allow more, and one that refuses, change nothing above or below the numbers."""
        layer = RateLimit(requests=60)
        made = Simulation(layer, Reply(0.0, Response("fine", rate_limits=headers(6000, 6000, "60s"))))
        calls = [made.call() for _ in range(5)]
        made.run()
        assert [each.sent_at for each in calls] == [[pytest.approx(float(place))] for place in range(5)]
        assert not layer._rates


class TestPace:
    def test_doubles_only_while_calls_wait(self):
        pace = Pace(0.0)
        for second in range(1, 10):
            pace.step(float(second))
        assert pace.rate == FIRST
        for second in range(10, 13):
            pace.waits(second - 0.5)
            pace.step(float(second))
        assert pace.rate == 8 * FIRST

    def test_is_known_once_a_limit_was_met(self):
        rate = AdaptiveRate(0.0)
        for second in range(30):
            rate.pace.waits(second)
            rate.limits(second + 1.0)
        assert rate.pace.rate == HIGHEST
        assert rate.requests is None
        other = AdaptiveRate(30.0)
        assert rate.refused(rate.pace.sending(30.0), 30.0)
        assert rate.requests == rate.pace.rate < HIGHEST
        assert other.requests is None
        other.take_over(Entry(rate.to_bytes(30.0), FORGOTTEN), 30.0)
        assert other.requests == rate.requests
        told = AdaptiveRate(0.0)
        told.hear([Told("requests", 5.0, 60.0)], 0.0)
        assert told.requests == 5.0

    def test_one_cut_for_an_event(self):
        """Refusals of calls that were under way at the cut change nothing."""
        pace = Pace(0.0)
        sent = [pace.sending(0.0) for _ in range(100)]
        assert [pace.refused(each, 0.1) for each in sent] == [True, *[False] * 99]
        assert pace.rate == FIRST / 2

    def test_a_few_refusals_cut_it_to_85_percent(self):
        pace = _found(100.0)
        sent = [pace.sending(0.0) for _ in range(100)]
        assert pace.refused(sent[99], 2.0)
        assert pace.rate == pytest.approx(85)

    def test_many_refusals_tell_what_the_service_takes(self):
        """Of 100 calls it has refused 80, so it takes about a fifth."""
        pace = _found(100.0)
        sent = [pace.sending(0.0) for _ in range(100)]
        assert not any(pace.refused(each, 0.1) for each in sent[:49])
        pace = _found(100.0)
        for number in range(49, 99):
            sending = pace.sending(0.0)
            while sending.number <= number:
                sending = pace.sending(0.0)
            if number % 5 and pace.refused(sending, 0.1):
                break
        assert 10 <= pace.rate <= 100

    def test_comes_back_along_a_curve(self):
        """Fast at first, slowly near where it was cut, and then beyond."""
        pace = _found(100.0)
        sent = [pace.sending(0.0) for _ in range(100)]
        pace.refused(sent[-1], 2.0)
        rates = []
        for step in range(1, 61):
            now = 2.0 + step / 4
            pace.waits(now - 0.1)
            pace.step(now)
            rates.append(pace.rate)
        assert rates == sorted(rates)
        assert rates[7] > 95
        assert rates[23] == pytest.approx(100, rel=0.01)
        assert rates[39] > 103
        gains = [later - earlier for earlier, later in pairwise(rates)]
        assert min(gains) == min(gains[20:28])

    def test_foresees_the_doubling(self):
        turn = Turn(100.0, 1000, None)
        assert Pace(0.0).foresee(turn).seconds == pytest.approx(math.log2(1 + 100 * math.log(2)))
        assert Pace(0.0).foresee(Turn(100.0, 0, None)).seconds == 100
        assert _found(10.0).foresee(turn) == turn


def _found(rate):
    """Return a pace that has been cut before."""
    pace = Pace(-10.0, 2 * rate, goal=0.0)
    pace.refused(pace.sending(-10.0), -5.0)
    pace.rate = pace.low = pace.top = rate
    pace._began_at = pace._stepped_at = 0.0
    return pace


class TestState:
    def test_is_forgotten(self):
        """After ten minutes without a call."""
        layer = RateLimit()
        made = Simulation(layer, Reply(0.0, RateLimitError("slow down")))
        made.call()
        made.run(FORGOTTEN)
        assert rate_of(layer).pace.rate == FIRST / 2
        made.run(2 * FORGOTTEN)
        made.call(reply=Reply(0.0))
        assert rate_of(layer).pace.rate == FIRST

    def test_words_of_the_service_become_stale(self):
        """It goes on from the last rate that was told."""
        rate = AdaptiveRate(0.0)
        rate.hear([Told("requests", 7.0, 60.0), Told("tokens", 900.0, 60.0)], 0.0)
        assert rate.limits(60.0) == (Limit("requests", 7.0, 7.0, 1.0), Limit("tokens", 900.0, 900.0, 0.0))
        assert rate.limits(61.0) == (Limit("requests", 7.0, 7.0, 1.0),)
        assert not rate.pace.is_doubling

    def test_a_told_rate_may_be_too_high(self):
        """Others use the same account: a refusal takes a share off, which comes back."""
        rate = AdaptiveRate(0.0)
        rate.hear([Told("requests", 50.0, 60.0)], 0.0)
        assert rate.refused(rate.pace.sending(0.0), 1.0)
        assert rate.limits(1.0)[0].rate == pytest.approx(0.85 * 50)
        for step in range(1, 80):
            rate.pace.waits(step / 4 + 0.9)
            rate.hear([Told("requests", 50.0, 60.0)], step / 4 + 1)
            rate.limits(step / 4 + 1)
        assert rate.limits(30.0)[0].rate == 50

    @pytest.mark.parametrize(
        "junk",
        [
            b"",
            b"junk",
            b"[1]",
            b"{}",
            b'{"pace": 1}',
            b'{"pace": {"rate": "x"}}',
            b'{"pace": {}, "told": []}',
            b"[" * 9999,
            b'{"told": {"requests": -1}, "told_for": 50}',
            b'{"told": {"requests": NaN}, "told_for": NaN}',
            b"\xff",
        ],
    )
    def test_junk_in_the_store(self, junk):
        rate = AdaptiveRate(0.0)
        rate.take_over(Entry(junk, 5.0), 1.0)
        assert rate.limits(1.0) == (Limit("requests", FIRST, FIRST, 1.0),)

    def test_many_keys(self, monkeypatch):
        """A user's `by` may return any number of them."""
        monkeypatch.setattr("fluxibly.middleware.rate_limit._MOST_RATES", 3)
        layer = RateLimit(by=lambda request: request.metadata["user"])
        made = Simulation(layer, Reply(0.0))
        for user in range(9):
            made.call(REQUEST.evolve(metadata={"user": user}))
        assert len(layer._rates) == 3

    def test_threads(self):
        """Many threads find what one would, and none of their calls is lost."""
        layer, limit = RateLimit(), 5

        class Refusing:
            def __init__(self):
                self.asked = 0

            def complete(self, request):
                self.asked += 1
                if self.asked % limit == 0:
                    raise RateLimitError("slow down")
                return Response("fine")

        provider = Refusing()
        pipeline = Pipeline(provider, [layer])
        outcomes = []

        def work():
            for _ in range(3):
                try:
                    outcomes.append(pipeline.complete(REQUEST).text)
                except RateLimitError:
                    outcomes.append("refused")

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(outcomes) == 12
        assert 0 < rate_of(layer).pace.rate < FIRST
        assert 1 <= rate_of(layer).pace.epoch <= outcomes.count("refused")


class TestSharing:
    @pytest.mark.parametrize("make", [MemoryStore, SlowStore])
    def test_what_one_has_found(self, make):
        """Another with the same store knows it at its first call, and one that runs within a second."""
        store = make()
        first, second, third = (RateLimit(store=store) for _ in range(3))
        simulation = Simulation(third, Reply(0.0))
        simulation.call()
        simulation.layers = [first]
        simulation.call(reply=Reply(0.0, RateLimitError("slow down")))
        simulation.run()
        simulation.call()  # its next call tells the others
        simulation.run()
        simulation.layers = [second]
        simulation.call()
        simulation.run()
        assert rate_of(second).pace.rate == FIRST / 2
        assert rate_of(third).pace.rate == FIRST
        simulation.layers = [third]
        simulation.run(2.0)
        simulation.call()
        simulation.run()
        assert rate_of(third).pace.rate == FIRST / 2

    def test_what_a_service_has_told(self):
        store = MemoryStore()
        first, second = RateLimit(store=store), RateLimit(store=store)
        simulation = Simulation(first, Reply(0.0, Response("fine", rate_limits=headers(60, 0, "60s"))))
        for _ in range(2):  # the second call writes down what the first has heard
            simulation.call()
            simulation.run(simulation.now + 5)
        simulation.layers = [second]
        simulation.run(20.0)
        simulation.call(reply=Reply(0.0))
        assert rate_of(second).limits(20.0)[0].rate == pytest.approx(0.95 * 60 / 59)
        assert rate_of(second).limits(66.0)[0].name == "requests"
        assert rate_of(second)._told == {}, "it is as old as it is"

    def test_asks_the_store_about_once_a_second(self):
        store = SlowStore()
        simulation = Simulation(RateLimit(store=store), Reply(0.0))
        for number in range(100):
            simulation.run(number / 10)
            simulation.call()
        simulation.run()
        assert store.asked.count("load") <= 11
        assert store.asked.count("save") == 0, "nothing was found"

    @pytest.mark.parametrize("on_error", ["local", "open", "raise"])
    def test_a_store_that_fails(self, mode, on_error, reports):
        store = SlowStore()
        store.fails = lambda _: OSError("down")
        layer = RateLimit(store=store, on_store_error=on_error)
        made = call(mode, layer, "fine")
        if on_error == "raise":
            assert isinstance(made.ran.error, StoreError)
            assert made.provider.requests == []
        else:
            assert made.response.text == "fine"
        assert ("its store SlowStore failed" in reports()) == (on_error != "raise")

    @pytest.mark.parametrize("on_error", ["local", "open"])
    def test_still_finds_the_rate_without_a_store(self, mode, on_error, reports):
        store = SlowStore()
        store.fails = lambda _: OSError("down")
        layer = RateLimit(store=store, on_store_error=on_error)
        call(mode, layer, RateLimitError("slow down"))
        assert rate_of(layer).pace.rate == FIRST / 2


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("pass"), st.sampled_from([0.0, 0.01, 0.3, 1.0, 5.0, 70.0, 1e4])),
        st.tuples(st.just("send"), st.booleans()),
        st.tuples(st.just("refused"), st.integers(0, 50)),
        st.tuples(st.just("answered"), st.sampled_from([0.0, 0.5, 9.0])),
        st.tuples(st.just("told"), st.sampled_from([1e-9, 0.05, 3.0, 1e5, 1e18])),
        st.tuples(st.just("other"), st.integers(0, 1)),
    ),
    max_size=60,
)


@settings(max_examples=80, deadline=None)
@given(steps=STEPS)
def test_any_history(steps):
    """The rate is positive, finite and within its bounds, and never above what the service tells."""
    now, rates, told = 0.0, [AdaptiveRate(0.0), AdaptiveRate(0.0)], None
    rate, sent = rates[0], []
    for kind, value in steps:
        if kind == "pass":
            now += value
        elif kind == "send":
            if value:
                rate.pace.waits(now)
            sent.append(rate.pace.sending(now))
        elif kind == "refused" and sent:
            rate.refused(sent[value % len(sent)], now)
        elif kind == "answered" and sent:
            rate.answered(sent[-1], value, now, streaming=False)
        elif kind == "told":
            rate.hear([Told("requests", value, 60.0)], now)
            told = (value, now)
        elif kind == "other":  # as another process with the same store
            entry = Entry(rate.to_bytes(now), FORGOTTEN)
            rates.reverse()
            rate, sent, told = rates[0], [], None
            rate.take_over(entry, now)
        [limit] = rate.limits(now)
        assert LOWEST / 2 <= limit.rate <= 1e12
        assert limit.burst == max(1.0, limit.rate)
        if told is None:
            assert rate._told or limit.rate <= HIGHEST
        elif now - told[1] <= 60:
            assert limit.rate <= max(told[0], LOWEST)


@settings(max_examples=60, deadline=None)
@given(
    rates=st.lists(st.sampled_from([0.05, 0.5, 2.0, 10.0, 80.0]), min_size=2, max_size=12),
    pauses=st.lists(st.sampled_from([0.0, 0.1, 1.0, 7.0]), min_size=12, max_size=12),
)
def test_a_rate_that_changes_lets_no_more_through(rates, pauses):
    """In every window at most what its highest rate allows, and the burst of that."""
    store, now, granted, held = MemoryStore(), 0.0, [], []
    for rate, pause in zip(rates, pauses, strict=False):
        for step in range(20):
            for number in range(100):
                who = f"{now} {step} {number}"
                if store.reserve("k", who, (Limit("requests", rate, max(1.0, rate), 1.0),), now) is not None:
                    store.release("k", who, now)
                    break
                granted.append(now)
                held.append(rate)
            now += pause / 20
    for first in range(len(granted)):
        for last in range(first, len(granted), 7):
            most = max(rates)
            window = granted[last] - granted[first]
            assert last - first + 1 <= most * window + max(1.0, most) + 1e-6
        highest = max(held[first:])
        assert len(granted) - first <= highest * (granted[-1] - granted[first]) + max(1.0, highest) + 1 + 1e-6
