"""`Cost`: the price of all attempts of a call, in the answer, the log, the span and the metrics."""

from __future__ import annotations

import subprocess
import sys
from decimal import Decimal

import pytest
from support.calling import REQUEST, call, scripted
from support.meters import Meters
from support.tracing_tools import Recorder

from fluxibly import Target, ask
from fluxibly.errors import ConnectionFailed, RateLimitError, ServerError, StreamInterrupted
from fluxibly.middleware import Cost, Fallback, Logging, Retry, Validation
from fluxibly.registry import make_middleware
from fluxibly.testing import Cut, check_middleware
from fluxibly.types import Chunk, Response, Usage

PRICES = {"m-1": (1, 10), "m-2": (100, 1000), "judge": (5, 5)}


def cost(**settings):
    return Cost(prices=PRICES, **settings)


def answer(taken=1000, given=100, text="Paris.", **fields):
    return Response(text, usage=Usage(input_tokens=taken, output_tokens=given), **fields)


def in_words(amount):
    return Decimal(amount)


class TestInAllModes:
    def test_an_answer_has_its_cost(self, mode):
        made = call(mode, cost(), answer())
        assert made.response.cost == made.record.cost == in_words("0.002")
        assert made.record.costs == {(made.record.provider, "m-1"): in_words("0.002")}

    def test_all_attempts_count(self, mode):
        """A rejected answer was paid for, too."""
        stack = [cost(), Validation(check=lambda response: "Wrong." if response.text == "London." else None, hold=True)]
        made = call(mode, stack, answer(text="London."), answer())
        assert made.response.cost == in_words("0.004")

    def test_a_refused_attempt_costs_nothing(self, mode):
        made = call(mode, [cost(), Retry(base_delay=0)], RateLimitError("later", status=429), answer())
        assert made.response.cost == in_words("0.002")

    def test_a_failed_attempt_whose_tokens_are_unknown(self, mode):
        """The service may have worked for it, so nobody knows what the call has cost."""
        made = call(mode, [cost(), Retry(base_delay=0)], ConnectionFailed("lost"), answer())
        assert made.response.cost is None

    def test_each_model_has_its_price(self, mode):
        other = Target(scripted(mode, answer()), model="m-2")
        made = call(
            mode, [cost(), Fallback(to=[other])], answer(text="?").evolve(), request=REQUEST.evolve(model="m-2")
        )
        assert made.response.cost == in_words("0.2")
        made = call(mode, [cost(), Fallback(to=[other])], ServerError("down", status=500))
        assert made.response.cost == in_words("0.2")

    def test_a_judge_counts(self, mode):
        """A question within the call, before the answer and after it."""

        def judged(request, call_next):
            yield from ask(request.evolve(messages="Fine?", model="judge"))
            response = yield from call_next(request)
            yield from ask(request.evolve(messages="Fine?", model="judge"))
            return response

        made = call(mode, [cost(), judged], *[answer()] * 3)
        assert made.response.cost == in_words("0.002") + 2 * in_words("0.0055")

    def test_a_cache_hit_costs_nothing(self, mode):
        def cached(request, call_next):
            request.call.cache_hit = True
            yield from ()
            return answer(cost=in_words(7))

        made = call(mode, [cost(), cached], answer())
        assert made.response.cost == 0

    def test_no_usage(self, mode):
        assert call(mode, cost(), Response("Paris.")).response.cost is None

    def test_a_call_that_fails_has_its_cost_in_the_record(self, mode):
        """For the span and the metrics; there is no answer that could have it."""
        if mode.streaming:
            made = call(mode, cost(), [Chunk("Pa", usage=Usage(input_tokens=1000, output_tokens=1)), Cut()])
            assert isinstance(made.ran.error, StreamInterrupted)
            assert made.record.cost == in_words("0.00101")
        else:
            made = call(mode, cost(), ServerError("down", status=500))
            assert made.record.cost == 0

    def test_a_stream_that_is_left(self, mode):
        if mode.streaming:
            items = [Chunk("Pa", usage=Usage(input_tokens=1000, output_tokens=1)), "ris"]
            made = call(mode, cost(), items, stop_after=1)
            assert made.record.cost == in_words("0.00101")

    def test_the_log_has_it(self, mode, caplog):
        caplog.set_level("INFO", "fluxibly")
        call(mode, [Logging(), cost()], answer())
        line = caplog.records[-1]
        assert line.getMessage().endswith(", cost=0.002000")
        assert line.cost == in_words("0.002")
        caplog.clear()
        call(mode, [Logging(), cost()], Response("Paris."))
        assert "cost" not in caplog.records[-1].getMessage()

    def test_the_span_has_it(self, mode):
        recorder = Recorder()
        call(mode, [recorder.tracing(), cost()], answer())
        assert recorder.call.attributes["fluxibly.cost"] == 0.002

    def test_a_metric_has_it(self, mode):
        """By the provider and model that it was paid for, once, also if both editions of the conventions are recorded."""
        meters = Meters()
        layers = [meters.metrics(conventions="latest"), meters.metrics(), cost()]

        def judged(request, call_next):
            yield from ask(request.evolve(messages="Fine?", model="judge"))
            return (yield from call_next(request))

        call(mode, [*layers, judged], answer(), answer())
        points = {point.attributes["gen_ai.request.model"]: point for point in meters.points().get("fluxibly.cost", [])}
        assert {model: point.sum for model, point in points.items()} == {"m-1": 0.002, "judge": 0.0055}
        assert {point.count for point in points.values()} == {1}

    def test_without_the_layer_there_is_no_metric(self, mode):
        meters = Meters()
        call(mode, [meters.metrics()], answer())
        assert meters.points().get("fluxibly.cost", []) == []


def test_an_ask_has_a_cost_of_its_own():
    """A `Cost` in its stack counts the question alone."""
    found = []

    def judged(request, call_next):
        response = yield from call_next(request)
        found.append((yield from ask(request.evolve(messages="Fine?", model="judge"), through=[cost()])))
        return response

    from fluxibly.testing.modes import MODES

    made = call(MODES[0], [cost(), judged], answer(), answer())
    assert (found[0].cost, made.response.cost) == (in_words("0.0055"), in_words("0.0075"))


def test_the_package_is_imported_at_the_first_price():
    """And an async call does not hold up its event loop for it."""
    code = """
import anyio, sys, threading
from fluxibly import AsyncPipeline, ProviderInfo, Request, Response, Usage
from fluxibly.middleware import Cost
class Provider:
    info = ProviderInfo(framework="openai", telemetry_name="openai", server_address="api.openai.com", server_port=443)
    async def complete(self, request):
        return Response("Paris", usage=Usage(input_tokens=1000, output_tokens=100))
where = []
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "genai_prices":
            where.append(threading.current_thread() is threading.main_thread())
sys.meta_path.insert(0, Finder())
async def main():
    pipeline = AsyncPipeline(Provider(), [Cost(prices={"mine": (1, 1)})])
    await pipeline.complete(Request(model="mine", messages="Hi"))
    print("genai_prices" in sys.modules)
    where.clear()
    print((await pipeline.complete(Request(model="gpt-4o-mini", messages="Hi"))).cost)
    print("genai_prices" in sys.modules, where[0])
anyio.run(main)
"""
    code = code.replace(
        "from fluxibly import AsyncPipeline, ProviderInfo,",
        "from fluxibly.types import ProviderInfo\nfrom fluxibly import AsyncPipeline,",
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ran.stdout.splitlines() == ["False", "0.00021000", "True False"], ran.stderr


def test_keeps_the_laws():
    check_middleware(cost())


def test_in_yaml():
    (layer,) = make_middleware([{"cost": {"prices": {"my-model": [0.15, 0.6]}}}])
    assert layer.prices == {"my-model": [0.15, 0.6]}


@pytest.mark.parametrize("prices", [{}, {"m": (0, 0)}])
def test_settings_show(prices):
    assert repr(Cost(prices=prices)) == f"Cost(prices={prices})"


def test_a_response_keeps_its_cost_as_json():
    response = Response("Paris.", cost=in_words("0.0021"), cache_hit=True)
    again = Response.from_dict(response.to_dict())
    assert (again.cost, again.cache_hit) == (in_words("0.0021"), True)
    with pytest.raises(ValueError, match="cost: expected a number in a string, got 'dear'"):
        Response.from_dict({"text": "x", "cost": "dear"})
