"""`Concurrency("auto")`: it finds how many calls at once a service answers without slowing down."""

from __future__ import annotations

import logging
import threading

import pytest
from hypothesis import given, settings, strategies as st
from support.calling import REQUEST, call
from support.simulation import Reply, Simulation
from support.stores import SlowStore

from benchmarks.simulation import Bucket, Client, Service, simulate
from fluxibly import Pipeline
from fluxibly.errors import (
    ConfigError,
    DeadlineExceeded,
    Overloaded,
    QueueFull,
    RateLimitError,
    RequestTimeout,
    ServerError,
    StoreError,
)
from fluxibly.middleware import Concurrency, RateLimit, Retry
from fluxibly.middleware._adaptive_limit import FIRST, HIGHEST, QUIET, REMEMBERED, AdaptiveLimit
from fluxibly.stores import Entry, MemoryStore
from fluxibly.testing import ScriptedProvider, check_middleware
from fluxibly.types import Response, Usage


@pytest.fixture(autouse=True)
def quiet():
    """Thousands of retries are not logged."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def service(**settings):
    return Service(Bucket(1e6, 1e6), **settings)


def auto(**settings):
    return Concurrency("auto", queue=10_000, **settings)


def limit_of(layer):
    [limit] = layer._limits.values()
    return limit


class TestAgainstAService:
    @pytest.mark.parametrize("knee", [8, 60])
    def test_finds_the_knee(self, knee):
        """Beyond it, answers come no faster: nearly all throughput, at about twice the best latency."""
        best = service(knee=knee)
        simulate(best, [Client([Concurrency(knee)], knee)], 60)
        made, layer = service(knee=knee), auto()
        begin, end = (50, 100) if knee > 10 else (400, 800)  # a round is of 20 calls at least
        simulate(made, [Client([layer], 4 * knee)], end)
        assert 0.8 * knee <= limit_of(layer).limit <= 2.5 * knee
        assert made.rate(begin, end) >= 0.95 * best.rate(10, 60)
        assert made.median_latency(begin, end) <= (2 if knee > 10 else 2.5) * best.median_latency(10, 60)

    def test_grows_only_when_used(self):
        made, layer = service(), auto()
        simulate(made, [Client([layer], 20)], 60)
        assert limit_of(layer).limit == FIRST

    def test_a_service_that_becomes_slower_for_all(self):
        """Fewer calls at once make nothing faster then, so the limit comes back."""
        made, layer = service(), auto()

        def slow_down():
            made.latency = 10.0

        simulate(made, [Client([layer], 60)], 400, {40: slow_down})
        assert limit_of(layer).limit >= 40
        assert made.most_at_work == 60

    def test_leaves_rates_to_the_rate(self):
        """A service with a rate, far below what it could do at once: the limit of calls is in nobody's way."""
        made = Service(Bucket(20, 200))
        layer = auto()
        simulate(made, [Client([Retry(max_retries=50), RateLimit(), layer], 200)], 70)
        assert made.rate(30, 70) >= 0.97 * 1200
        assert made.share_refused(0, 70) <= 0.1

    def test_two_that_share_a_store(self):
        """All places together are about as many as one alone would find."""
        made, store = service(knee=40), MemoryStore()
        layers = [auto(store=store) for _ in range(2)]
        simulate(made, [Client([layer], 100) for layer in layers], 80)
        assert 40 <= limit_of(layers[0]).limit <= 100
        assert made.most_at_work <= 160
        assert limit_of(layers[1]).limit == pytest.approx(limit_of(layers[0]).limit, rel=0.5)


class TestInAllModes:
    def test_passes_at_once(self, mode):
        layer = Concurrency("auto")
        made = call(mode, layer, "fine")
        assert (made.response.text, made.clock.sleeps) == ("fine", [])
        assert limit_of(layer)._ended == 1

    @pytest.mark.parametrize(
        ("answer", "limit"),
        [
            (Overloaded("full"), 0.85 * FIRST),
            (RequestTimeout("slow"), 0.85 * FIRST),
            (DeadlineExceeded("late"), FIRST),
            (ServerError("down"), FIRST),
            (RateLimitError("slow down"), FIRST),
            (KeyboardInterrupt(), FIRST),
        ],
    )
    def test_what_lowers_it(self, mode, answer, limit):
        """No call but one that was answered has a latency."""
        layer = Concurrency("auto", queue=0)
        call(mode, layer, answer)
        assert limit_of(layer).limit == limit
        assert not limit_of(layer)._latencies
        assert limit_of(layer)._at_once == 0
        assert call(mode, layer, "fine").response.text == "fine"

    def test_several_attempts_are_no_sample(self, mode):
        """A Retry inside of it waits, and no service is slow for that."""
        layer = Concurrency("auto")
        call(mode, [layer, Retry(base_delay=0)], ServerError("down"), "fine")
        assert not limit_of(layer)._latencies

    def test_a_stream_that_is_left_is_no_sample(self, mode):
        if mode.streaming:
            layer = Concurrency("auto")
            call(mode, layer, "a b c", stop_after=1)
            assert not limit_of(layer)._latencies
            assert limit_of(layer)._at_once == 0

    @pytest.mark.parametrize("on_error", ["local", "open", "raise"])
    def test_a_store_that_fails(self, mode, on_error, reports):
        store = SlowStore()
        store.fails = lambda _: OSError("down")
        made = call(mode, Concurrency("auto", store=store, on_store_error=on_error), "fine")
        if on_error == "raise":
            assert isinstance(made.ran.error, StoreError)
            assert made.provider.requests == []
        else:
            assert made.response.text == "fine"
        assert ("its store SlowStore failed" in reports()) == (on_error != "raise")


class TestSettings:
    def test_repr_and_explain(self):
        layer = Concurrency("auto")
        assert repr(layer).startswith("Concurrency(limit='auto', queue=1000, ")
        shown = str(Pipeline(ScriptedProvider(), [RateLimit(), layer]).explain())
        assert "limit='auto'" in shown

    def test_another_word(self):
        with pytest.raises(ValueError, match="limit: expected a whole number from 1 up, or 'auto', got 'many'"):
            Concurrency("many")

    def test_a_store_without_values(self):
        """It has nowhere to keep what was found."""

        class Places:
            def lease(self):
                return None

            release = alease = arelease = lease

        Concurrency(3, store=Places())
        with pytest.raises(ConfigError, match="got a Places without load, save, aload, asave"):
            Concurrency("auto", store=Places())

    def test_keeps_the_laws(self):
        check_middleware(Concurrency("auto"))

    def test_a_full_queue(self):
        layer = Concurrency("auto", queue=0)
        made = Simulation(layer)
        calls = [made.call() for _ in range(21)]
        made.run()
        assert isinstance(calls[-1].error, QueueFull)
        assert str(calls[-1].error).endswith("(queue=0); wait (limit='auto' is 20 now), or send less")
        assert sum(each.error is None for each in calls) == 20


class TestLatency:
    def test_of_a_whole_answer_is_for_each_token(self):
        """Answers of 10 tokens in 1 second are not slower than those of 100 tokens in 3."""
        made, layer = Simulation(Concurrency("auto")), None
        [layer] = made.layers
        for output, seconds in ((10, 42.0), (100, 132.0), (968, 1000.0)):
            usage = Usage(input_tokens=5, output_tokens=output)
            made.call(reply=Reply(seconds, Response("fine", usage=usage)))
            made.run()
        assert limit_of(layer)._latencies == {"whole": [1.0, 1.0, 1.0]}

    def test_of_a_stream_is_that_of_the_first_chunk(self):
        layer = Concurrency("auto")
        made = Simulation(layer, Reply(3.0, items=["a", "b", "c"], gap=10.0))
        made.call(streaming=True)
        made.run()
        limit = limit_of(layer)
        assert limit._latencies in ({"stream": [3.0]}, {"whole": [33.0 / (3 / 3.5 + 32)]})

    def test_threads(self):
        """None of many threads' calls is lost, and no place."""
        layer = Concurrency("auto")

        class Quick:
            def complete(self, request):
                return Response("fine")

        pipeline, texts = Pipeline(Quick(), [layer]), []

        def work():
            texts.extend(pipeline.complete(REQUEST).text for _ in range(50))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert texts == ["fine"] * 400
        assert limit_of(layer).limit >= 1
        [places] = layer.store._places.values()
        assert not places.held
        assert not places.waiting


class TestLimit:
    """The state by itself. Its rounds are of 20 calls at first."""

    def round(self, limit, latency, now=0.0, *, waits=True, at_once=1):
        if waits:
            limit.waits()
        while True:
            begun = [limit.begun(now) for _ in range(at_once)]
            for each in begun:
                limit.ended(each, "whole", latency, now)
            if limit._round > begun[0].round:
                return

    def test_doubles_until_latency_rises(self):
        limit = AdaptiveLimit(0.0)
        for expected in (40, 80, 160):
            self.round(limit, 1.0)
            assert limit.limit == expected
        self.round(limit, 1.3)
        assert limit.limit == 40, "it tries a quarter"
        self.round(limit, 1.0)
        assert limit.limit == 160
        self.round(limit, 1.3)
        assert limit.limit == 160 + 160**0.5
        self.round(limit, 3.0)
        assert limit.limit < 100

    def test_never_below_one(self):
        limit = AdaptiveLimit(0.0)
        self.round(limit, 1.0)
        for latency in range(2, 60):
            self.round(limit, float(3**latency))
            assert limit.limit >= 1
        for _ in range(60):
            limit.overloaded(limit.begun(0.0))
        assert limit.size == 1

    def test_a_429_keeps_it_as_it_is(self):
        limit = AdaptiveLimit(0.0)
        limit.refused(0.0)
        self.round(limit, 1.0, QUIET / 2)
        assert limit.limit == FIRST
        self.round(limit, 1.0, QUIET + 1)
        assert limit.limit == 2 * FIRST

    def test_one_change_for_an_overload(self):
        limit = AdaptiveLimit(0.0)
        begun = [limit.begun(0.0) for _ in range(20)]
        assert [limit.overloaded(each) for each in begun] == [True, *[False] * 19]

    def test_is_forgotten(self):
        layer = Concurrency("auto")
        made = Simulation(layer, Reply(0.0, Overloaded("full")))
        made.call()
        made.run(REMEMBERED)
        assert limit_of(layer).limit < FIRST
        made.run(3 * REMEMBERED)
        made.call(reply=Reply(0.0))
        assert limit_of(layer).limit == FIRST

    @pytest.mark.parametrize("make", [MemoryStore, SlowStore])
    def test_what_another_has_found(self, make):
        """It is known at the first call, and within a second later."""
        store = make()
        first, second = Concurrency("auto", store=store), Concurrency("auto", store=store)
        made = Simulation(first, Reply(0.0, Overloaded("full")))
        made.call()
        made.run(2.0)
        made.call(reply=Reply(0.0))
        made.run(3.0)
        made.layers = [second]
        made.call(reply=Reply(0.0))
        made.run()
        assert limit_of(second).limit == limit_of(first).limit == 0.85 * FIRST

    @pytest.mark.parametrize(
        "junk", [b"", b"\xff", b"[]", b"[" * 9999, b'{"limit": "x", "changes": 1}', b'{"limit": 5}']
    )
    def test_junk_in_the_store(self, junk):
        limit = AdaptiveLimit(0.0)
        limit.take_over(Entry(junk, 5.0))
        assert limit.limit == FIRST

    @settings(max_examples=80, deadline=None)
    @given(
        steps=st.lists(
            st.tuples(
                st.sampled_from(["round", "idle", "429", "overloaded", "other"]),
                st.sampled_from([0.0, 1e-9, 0.5, 1.0, 30.0, 1e9]),
            ),
            max_size=30,
        )
    )
    def test_any_history(self, steps):
        """It is within its bounds, and grows at most to twice what it ever was."""
        now, limit, most = 0.0, AdaptiveLimit(0.0), FIRST
        for kind, value in steps:
            before, now = limit.limit, now + min(value, 30.0)
            if kind in ("round", "idle"):
                self.round(limit, value, now, waits=kind == "round")
            elif kind == "429":
                limit.refused(now)
            elif kind == "overloaded":
                limit.overloaded(limit.begun(now))
            else:
                found, limit = limit, AdaptiveLimit(now)
                limit.take_over(Entry(found.to_bytes(), 5.0))
                assert limit.limit == (found.limit if found.changes else FIRST)
            assert 1 <= limit.limit <= min(HIGHEST, 2 * most)
            assert limit.size >= 1
            most = max(most, limit.limit)
            if kind in ("429", "overloaded"):
                assert limit.limit <= before
