"""`Budget`: what calls spend stays within it, whatever becomes of them."""

from __future__ import annotations

import logging
import random
import re
import threading
import time
from functools import partial

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings, strategies as st
from support.calling import REQUEST, call, scripted
from support.simulation import Reply, Simulation
from support.stores import SlowStore

from fluxibly import Target, ask, register_function, sleep
from fluxibly._tokens import size_of
from fluxibly.errors import BudgetExceeded, ConfigError, RateLimitError, ServerError, StoreError, StreamInterrupted
from fluxibly.middleware import Budget, Fallback, Hedge, Retry
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.registry import make_middleware
from fluxibly.testing import Cut, ScriptedProvider, VirtualClock, check_middleware
from fluxibly.testing.modes import MODES
from fluxibly.types import Chunk, Response, Usage

PRICES = {"m-1": (1, 10), "judge": (5, 5)}
INPUT = round(size_of(REQUEST) / 3.5) + 1
"""The tokens that the request is taken for where no service counts them."""


def answer(taken=10, given=5, text="Paris."):
    return Response(text, usage=Usage(input_tokens=taken, output_tokens=given))


def spent(layer, key="budget instance tokens"):
    """Return what a budget has counted."""
    found = layer.store._sums.get(key)
    return 0 if found is None else found.total


class TestInAllModes:
    def test_counts_what_calls_spend(self, mode):
        layer = Budget(tokens=1000)
        call(mode, layer, answer())
        call(mode, layer, answer(20, 30))
        assert spent(layer) == 65

    @pytest.mark.parametrize("answered", [(10, 1200), (2**53, 2**53)], ids=str)
    def test_an_answer_beyond_the_whole_budget(self, mode, answered):
        """The calls after it are not refused for good, because what it took is no longer counted."""
        for options in ({"scope": "call"}, {"scope": lambda request: request.metadata["user"]}):
            layer = Budget(tokens=1000, **options)
            first, second = (REQUEST.evolve(metadata={"user": name}) for name in ("one", "two"))
            call(mode, layer, answer(*answered), request=first)
            for _ in range(2):
                assert call(mode, layer, answer(), request=second).response.text == "Paris."

    def test_a_provider_cannot_give_anything_back(self, mode):
        layer = Budget(tokens=1000)
        call(mode, layer, answer(100, 30))
        call(mode, layer, answer(-100, -30))
        assert spent(layer) == 130

    def test_names_that_a_store_cannot_write(self, mode, tmp_path, capsys):
        """The store does not fail at half a surrogate pair, for other users either."""
        layer = Budget(tokens=400, scope=lambda request: request.metadata["user"], store=f"sqlite:{tmp_path / 'b.db'}")
        users = [REQUEST.evolve(metadata={"user": name}) for name in ("ada", "\ud800", "ada")]
        errors = [type(call(mode, layer, answer(390), request=user).ran.error) for user in users]
        assert errors == [type(None), type(None), BudgetExceeded]
        assert capsys.readouterr().err == ""

    def test_refuses_a_call_before_anything_is_sent(self, mode):
        layer = Budget(tokens=1000)
        call(mode, layer, answer(900, 90))
        made = call(mode, layer, answer())
        assert isinstance(made.ran.error, BudgetExceeded)
        assert (made.provider.requests, spent(layer)) == ([], 990)
        assert str(made.ran.error).startswith("Budget (tokens=1000) refuses a call of m-1 at scripted: it needs about ")
        assert str(made.ran.error).endswith(
            " tokens, and 10 tokens are left; raise the budget, or ask for less with max_tokens"
        )

    def test_dollars(self, mode):
        layer = Budget(cost=0.01, prices=PRICES)
        call(mode, layer, answer(100, 985))
        assert spent(layer, "budget instance dollars") == 9_950_000
        made = call(mode, layer, answer())
        assert isinstance(made.ran.error, BudgetExceeded)
        assert "and $5e-05 are left" in str(made.ran.error)

    def test_both(self, mode):
        """What is too little of either refuses the call, and nothing stays reserved of the other."""
        layer = Budget(tokens=10_000, cost=0.0001, prices=PRICES)
        made = call(mode, layer, answer())
        assert isinstance(made.ran.error, BudgetExceeded)
        assert (spent(layer), spent(layer, "budget instance dollars")) == (0, 0)

    def test_the_past_is_forgotten(self, mode):
        layer = Budget(tokens=500, per=3600)

        def later(request, call_next):
            """Ask twice, with more than an hour in between."""
            with pytest.raises(BudgetExceeded):
                yield from call_next(request)
            yield from sleep(3601)
            return (yield from call_next(request))

        layer.store.add("budget instance per 3600 tokens", 490, 3600, 0.0)
        made = call(mode, [later, layer], answer())
        assert made.response.text == "Paris."
        assert spent(layer, "budget instance per 3600 tokens") == 15

    def test_each_user(self, mode):
        layer = Budget(tokens=600, scope=lambda request: request.metadata["user"])
        mine, yours = (REQUEST.evolve(metadata={"user": name}) for name in ("me", "you"))
        call(mode, layer, answer(500, 80), request=mine)
        assert isinstance(call(mode, layer, answer(), request=mine).ran.error, BudgetExceeded)
        assert call(mode, layer, answer(), request=yours).response.text == "Paris."

    def test_each_call(self, mode):
        """All its attempts together."""
        layer = Budget(tokens=400, scope="call")
        for _ in range(3):
            assert call(mode, layer, answer(300, 50)).response.text == "Paris."

        def twice(request, call_next):
            first = yield from ask(request, through=[layer])
            assert first.text == "Paris."
            return (yield from call_next(request))

        made = call(mode, [twice, layer], answer(300, 90), answer())
        assert isinstance(made.ran.error, BudgetExceeded)
        assert len(made.provider.requests) == 1
        assert layer.store._sums == {}

    def test_a_failure_before_output_counts_nothing(self, mode):
        layer = Budget(tokens=1000)
        call(mode, [Retry(base_delay=0), layer], ServerError("down"), RateLimitError("no", status=429), answer())
        assert spent(layer) == 15

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("mine")])
    def test_what_is_cut_off_counts_its_input(self, mode, error):
        """Where the service did not say. A program's own error is a failure."""
        layer = Budget(tokens=1000)
        call(mode, layer, error)
        assert spent(layer) == (0 if isinstance(error, Exception) else INPUT)

    def test_without_usage(self, mode):
        """The input is estimated, and so is what came."""
        layer = Budget(tokens=1000)
        call(mode, layer, Response("x" * 35))
        assert spent(layer) == INPUT + 10

    def test_a_fallback_counts(self, mode):
        layer = Budget(tokens=1000, cost=1, prices={"m-1": (1, 1), "m-2": (1000, 1000)})
        other = Target(scripted(mode, answer(10, 5)), model="m-2")
        call(mode, [Fallback(to=[other]), layer], ServerError("down"))
        assert (spent(layer), spent(layer, "budget instance dollars")) == (15, 15_000_000)

    def test_judges_count(self, mode):
        """Questions that other layers ask, before the layer, after it, and without an answer of the model."""
        layer = Budget(tokens=10_000, cost=1, prices=PRICES)

        def judged(request, call_next):
            yield from ask(request.evolve(messages="Fine?", model="judge"))
            response = yield from call_next(request)
            yield from ask(request.evolve(messages="Fine?", model="judge"))
            return response

        call(mode, [judged, layer], answer(100, 1), answer(200, 2), answer(400, 4))
        assert spent(layer) == 707
        assert spent(layer, "budget instance dollars") == 505_000 + 220_000 + 2_020_000

    def test_an_unknown_price(self, mode):
        made = call(mode, Budget(cost=1, prices=PRICES), answer(), request=REQUEST.evolve(model="m-9"))
        assert isinstance(made.ran.error, ConfigError)
        assert str(made.ran.error) == (
            "Budget: expected a known price of m-9 at scripted, found none; give it, in US dollars for a million tokens of "
            "input and output: prices={'m-9': (0.15, 0.60)}, or write unknown='free'"
        )
        layer = Budget(cost=1, prices=PRICES, unknown="free")
        assert call(mode, layer, answer(), request=REQUEST.evolve(model="m-9")).response.text == "Paris."
        assert spent(layer, "budget instance dollars") == 0

    def test_learns_from_answers(self, mode):
        """The next call reserves what answers have taken."""
        layer = Budget(tokens=100_000)
        for _ in range(20):
            call(mode, layer, answer(10, 3000))
        seen = []

        def look(request, call_next):
            seen.append(spent(layer))
            return (yield from call_next(request))

        call(mode, [layer, look], answer())
        assert seen[0] - 20 * 3010 > 2500

    def test_max_tokens_bounds_the_estimate(self, mode):
        layer = Budget(tokens=1000)
        call(mode, layer, answer(10, 960))
        assert isinstance(call(mode, layer, answer()).ran.error, BudgetExceeded)
        assert call(mode, layer, answer(), request=REQUEST.evolve(max_tokens=5)).response.text == "Paris."

    def test_a_store_that_fails(self, mode):
        forget = SlowStore()
        forget.fails = lambda _: OSError("gone")
        call_ = partial(call, mode)
        assert isinstance(
            call_(Budget(tokens=100, store=forget, on_store_error="raise"), answer()).ran.error, StoreError
        )
        assert call_(Budget(tokens=1, store=forget, on_store_error="open"), answer()).response.text == "Paris."
        local = Budget(tokens=500, store=forget)
        call_(local, answer(400, 50))
        assert isinstance(call_(local, answer()).ran.error, BudgetExceeded)

    def test_a_store_that_does_io(self, mode):
        store = SlowStore()
        layer = Budget(tokens=1000, cost=1, prices=PRICES, store=store)

        def judged(request, call_next):
            response = yield from call_next(request)
            yield from ask(request.evolve(messages="Fine?", model="judge"))
            return response

        call(mode, [judged, layer], answer(100, 1), answer(200, 2))
        assert store.inner._sums["budget instance tokens"].total == 303
        call(mode, [layer], KeyboardInterrupt())
        end = time.monotonic() + 10  # nobody waits for a cleanup after Ctrl-C
        while store.inner._sums["budget instance tokens"].total != 303 + INPUT:
            assert time.monotonic() < end
            time.sleep(0.001)
        assert isinstance(call(mode, Budget(tokens=310, store=store), answer()).ran.error, BudgetExceeded)

    def test_decisions_are_said(self, mode, caplog):
        caplog.set_level(logging.DEBUG, "fluxibly")
        made = call(mode, Budget(tokens=1, per=60), answer())
        (decision,) = made.record.decisions
        assert decision.middleware == "Budget"
        assert decision.what.startswith("refuses the call: it needs about ")
        assert decision.what.endswith("(tokens=1, per=60)")


class TestStreams:
    def test_one_that_runs_over_is_ended(self, stream_mode):
        layer = Budget(tokens=1000)
        call(stream_mode, layer, answer(200, 0))
        made = call(stream_mode, layer, ["x" * 35] * 200)
        error = made.ran.error
        assert isinstance(error, StreamInterrupted)
        assert isinstance(error.__cause__, BudgetExceeded)
        assert len(made.provider.requests) == 1
        assert len(error.partial.text) < 35 * 82
        assert spent(layer) <= 1000 + 10
        assert [decision.what for decision in made.record.decisions] == [
            "ends the stream: it ran over the budget (tokens=1000)"
        ]

    def test_one_that_reserves_more_as_it_goes(self, stream_mode):
        layer = Budget(tokens=5000)
        made = call(stream_mode, layer, [*["x" * 35] * 200, Chunk(usage=Usage(input_tokens=7, output_tokens=2000))])
        assert len(made.response.text) == 7000
        assert spent(layer) == 2007

    def test_reasoning_and_tool_calls_count(self, stream_mode):
        layer = Budget(tokens=1000)
        call(stream_mode, layer, answer(400, 0))
        made = call(stream_mode, layer, [Chunk(reasoning="x" * 350)] * 20)
        assert isinstance(made.ran.error.__cause__, BudgetExceeded)

    def test_one_that_is_left(self, stream_mode):
        """Its input and what had come count."""
        layer = Budget(tokens=1000)
        call(stream_mode, layer, ["x" * 35, "y" * 35, "z" * 70], stop_after=2)
        assert spent(layer) == INPUT + 20

    def test_one_that_breaks(self, stream_mode):
        """What the service has said is the least that counts."""
        layer = Budget(tokens=1000)
        start = Chunk(usage=Usage(input_tokens=40, output_tokens=1))
        call(stream_mode, layer, [start, "x" * 35, Cut()])
        assert spent(layer) == 50

    def test_the_connection_is_freed_at_once(self, stream_mode):
        """Before the error reaches the caller; `call` checks that nothing is open."""
        made = call(stream_mode, [Retry(), Budget(tokens=200)], ["x" * 350] * 20, ["never"])
        assert isinstance(made.ran.error.__cause__, BudgetExceeded)
        assert len(made.provider.requests) == 1


class TestLosers:
    def test_of_a_race_count(self):
        layer = Budget(tokens=10_000)
        hedge = Hedge(1.0, max_share=1.0)
        replies = iter([Reply(latency=5, outcome=answer(100, 1)), Reply(latency=1, outcome=answer(100, 2))])
        simulation = Simulation([hedge, layer], lambda _: next(replies))
        made = simulation.call(REQUEST)
        simulation.run()
        assert made.response.usage.output_tokens == 2
        assert len(simulation.sent) == 2
        assert spent(layer) == 102 + INPUT


class TestTogether:
    def test_100_threads(self):
        """No reservation is lost, and no more calls pass than there is a budget for."""
        layer = Budget(tokens=5000)
        pipeline = Pipeline(ThreadSafe(), [layer])
        outcomes = []

        def go():
            for _ in range(5):
                try:
                    outcomes.append(pipeline.complete(REQUEST.evolve(max_tokens=5)).text)
                except BudgetExceeded as error:
                    outcomes.append(type(error))

        threads = [threading.Thread(target=go) for _ in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        passed = outcomes.count("Paris.")
        assert len(outcomes) == 500
        assert spent(layer) == 15 * passed <= 5000
        assert passed > 200

    @pytest.mark.parametrize("backend", ["asyncio", "trio"])
    def test_1000_tasks(self, backend):
        layer = Budget(tokens=5000)

        class Slow:
            async def complete(self, request):
                await anyio.lowlevel.checkpoint()
                return answer()

        pipeline = AsyncPipeline(Slow(), [layer])
        outcomes = []

        async def go():
            try:
                outcomes.append((await pipeline.complete(REQUEST.evolve(max_tokens=5))).text)
            except BudgetExceeded as error:
                outcomes.append(type(error))

        async def main():
            async with anyio.create_task_group() as group:
                for _ in range(1000):
                    group.start_soon(go)

        anyio.run(main, backend=backend)
        passed = outcomes.count("Paris.")
        assert len(outcomes) == 1000
        assert spent(layer) == 15 * passed <= 5000


class ThreadSafe:
    def complete(self, request):
        return answer()


class TestInvariants:
    @given(st.randoms(use_true_random=False), st.sampled_from([None, 20.0]), st.booleans())
    @settings(max_examples=60, deadline=None)
    def test_never_over_by_more_than_the_errors_of_estimates(self, source: random.Random, per, slow):
        """Many calls at once, which fail, are cancelled or left: what was spent in any window stays within the budget.

        It is over at most by what the calls under way took beyond their estimates, and nothing stays reserved.
        """
        most = 600.0
        store = SlowStore() if slow else None
        layer = Budget(tokens=most, per=per, store=store)
        kept = layer.store.inner if slow else layer.store
        key = "budget instance tokens" if per is None else f"budget instance per {per:g} tokens"
        reserved: dict[int, float] = {}
        granted: list[tuple[float, list[int]]] = []
        before: list[float] = []
        over: list[bool] = []

        def total():
            return kept.add(key, 0.0, per, simulation.now)

        def outside(request, call_next):
            before.append(total())
            return (yield from call_next(request))

        def inside(request, call_next):
            over.append(total() > most)
            reserved[id(request.call)] = total() - before[-1]
            granted.append((simulation.now, [id(each.record) for each in simulation.active]))
            return (yield from call_next(request))

        def reply(_):
            latency = source.uniform(0.1, 3)
            if source.random() < 0.2:
                return Reply(latency, outcome=ServerError("down"), items=[ServerError("down")])
            usage = Usage(input_tokens=INPUT, output_tokens=source.randint(0, 40))
            return Reply(latency, outcome=Response("x", usage=usage), items=["x", Chunk(usage=usage)], gap=latency / 4)

        simulation = Simulation([outside, layer, inside], reply)
        request = REQUEST.evolve(max_tokens=40)
        for _ in range(60):
            simulation.at(
                source.uniform(0, 60), lambda: simulation.call(request.evolve(), streaming=source.random() < 0.5)
            )
        for _ in range(8):

            def end():
                if simulation.active:
                    active = source.choice([*simulation.active])
                    active.close() if active.streaming and source.random() < 0.5 else active.cancel()

            simulation.at(source.uniform(0, 60), end)
        simulation.run()
        spent_by = {
            id(each.record): sum((entry.guess or entry.usage).total_tokens for entry in each.record.spent)
            for each in simulation.calls
        }
        assert not any(over)
        if per is None:
            assert total() == sum(spent_by.values())
        for at, under_way in granted:
            window = [
                spent_by[id(each.record)]
                for each in simulation.calls
                if each.sent_at and (per is None or at - 0.99 * per < each.sent_at[0]) and each.sent_at[0] <= at
            ]
            errors = [max(0.0, spent_by[who] - reserved[who]) for who in under_way if who in reserved]
            assert sum(window) <= most + sum(errors) + 1e-6

    @given(st.lists(st.tuples(st.floats(0, 100), st.integers(-50, 50)), max_size=40))
    @settings(max_examples=100, deadline=None)
    def test_amounts_that_are_taken_back(self, steps):
        """A sum never falls below what was added within the time and not taken back, and ends at nothing."""
        from fluxibly.stores import MemoryStore

        store, now, per = MemoryStore(), 0.0, 50.0
        for wait, amount in steps:
            now += wait
            total = store.add("k", amount, per, now)
            assert total >= 0
            recent = sum(parts for at, parts in store._sums["k"].parts if at > now - per)
            assert total == pytest.approx(recent)
        assert store.add("k", 0, per, now + per * 1.01) == 0


class TestSettings:
    @pytest.mark.parametrize(
        ("given_settings", "problem"),
        [
            ({}, "expected tokens=… or cost=…, got neither"),
            ({"tokens": 0}, "tokens: expected a number above 0"),
            ({"cost": -1}, "cost: expected a number above 0"),
            ({"tokens": 1, "per": 0}, "per: expected a number above 0"),
            ({"tokens": 1, "scope": 3}, "scope: expected 'instance', 'call' or a function of the request, got 3"),
            ({"tokens": 1, "scope": "user"}, "function 'user' not registered"),
            ({"tokens": 1, "scope": "call", "per": 5}, "expected no per=… with scope='call'"),
            ({"cost": 1, "prices": {"m": 1}}, "expected two numbers"),
            ({"cost": 1, "unknown": "x"}, "unknown: expected one of 'raise', 'free', got 'x'"),
            ({"tokens": 1, "store": "mongo://x"}, "store: expected "),
            ({"tokens": 1, "store": object()}, "store: expected "),
            ({"tokens": 1, "on_store_error": "x"}, "on_store_error: expected"),
        ],
    )
    def test_mistakes(self, given_settings, problem):
        with pytest.raises(ValueError, match=re.escape(problem)):
            Budget(**given_settings)

    def test_an_async_scope(self):
        async def user(_):
            return "me"

        with pytest.raises(ValueError, match="expected a plain function, got an async function"):
            Budget(tokens=1, scope=user)

    def test_in_yaml(self):
        register_function("user", lambda request: request.metadata["user"])
        (layer,) = make_middleware([{"budget": {"cost": 20, "per": 86400, "scope": "user", "prices": {"m": [1, 2]}}}])
        assert (layer.cost, layer.per, layer.prices) == (20, 86400, {"m": [1, 2]})
        assert layer.scope(REQUEST.evolve(metadata={"user": "me"})) == "me"

    def test_show(self):
        assert repr(Budget(tokens=5)) == (
            "Budget(tokens=5, cost=None, per=None, scope='instance', prices=None, unknown='raise', store=MemoryStore(), "
            "on_store_error='local')"
        )

    def test_a_scope_without_a_text(self):
        made = call(MODES[0], Budget(tokens=1000, scope=lambda _: object()), answer())
        assert "scope: expected a key from its function" in str(made.ran.error)

    def test_keeps_the_laws(self):
        check_middleware(Budget(tokens=1e9))


def test_two_budgets_on_one_store():
    """Share what they allow, as two processes do."""
    store = SlowStore()
    one, two = Budget(tokens=600, store=store), Budget(tokens=600, store=store)
    clock = VirtualClock()
    Pipeline(ScriptedProvider(answer(10, 570)), [one], clock=clock).complete(REQUEST)
    with pytest.raises(BudgetExceeded):
        Pipeline(ScriptedProvider(answer()), [two], clock=clock).complete(REQUEST)


def test_a_name_that_reads_as_another_budget():
    """A user cannot take a name by which another's budget in the same store is used up."""
    store = SlowStore()
    for_good, hourly = (
        Budget(tokens=600, per=per, scope=lambda request: request.metadata["user"], store=store) for per in (None, 60)
    )
    clock = VirtualClock()
    for layer, user in ((for_good, "ada per 60"), (hourly, "ada")):
        request = REQUEST.evolve(metadata={"user": user})
        Pipeline(ScriptedProvider(answer(10, 570)), [layer], clock=clock).complete(request)
