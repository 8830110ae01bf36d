"""Prices: those that the user gives, those of genai-prices, and what is not known."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from genai_prices import Usage as PricedUsage, calc_price
from hypothesis import given, settings, strategies as st

from fluxibly._logs import forget_reports
from fluxibly.calls import ProviderInfo, Spent, Usage
from fluxibly.prices import FlatPrice, Prices, check_prices


def info(framework, service=None, address="api.example.com", **fields):
    return ProviderInfo(
        name="X",
        framework=framework,
        telemetry_name=service or framework,
        server_address=address,
        server_port=443,
        **fields,
    )


OPENAI = info("openai", address="api.openai.com")
KNOWN = [
    (OPENAI, "gpt-4o-mini", "openai"),
    (OPENAI, "gpt-5", "openai"),
    (info("azure", "azure.ai.openai"), "gpt-4o", "azure"),
    (info("anthropic"), "claude-sonnet-4-5", "anthropic"),
    (info("gemini", "gcp.gemini"), "gemini-2.5-pro", "google"),
    (info("vertex", "gcp.vertex_ai"), "gemini-2.5-flash", "google"),
    (info("bedrock", "aws.bedrock"), "anthropic.claude-3-5-sonnet-20241022-v2:0", "aws"),
    (info("mistral", "mistral_ai"), "mistral-small-latest", "mistral"),
    (info("deepseek"), "deepseek-chat", "deepseek"),
    (info("xai", "x_ai"), "grok-4", "x-ai"),
    (info("groq"), "llama-3.3-70b-versatile", "groq"),
    (info("openrouter"), "openai/gpt-4o-mini", "openrouter"),
    (info("perplexity"), "sonar", "perplexity"),
    (info("moonshot", "moonshot_ai"), "kimi-k2-0905-preview", "moonshotai"),
]


@pytest.mark.parametrize(
    ("provider", "model", "service"), KNOWN, ids=lambda value: value if isinstance(value, str) else ""
)
@given(st.tuples(st.integers(0, 2_000_000), st.integers(0, 200_000)), st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)))
@settings(max_examples=12, deadline=None)
def test_are_those_of_the_package(provider, model, service, tokens, shares):
    """For any usage: cached tokens, prompts beyond a tier, and prices by the time of day."""
    (taken, given_out), (cached, written) = tokens, shares
    usage = Usage(
        input_tokens=taken,
        output_tokens=given_out,
        cached_tokens=int(taken * cached),
        cache_write_tokens=int(taken * written) if service in ("anthropic", "aws") else 0,
    )
    counts = {"cache_read_tokens": usage.cached_tokens or None, "cache_write_tokens": usage.cache_write_tokens or None}
    theirs = PricedUsage(input_tokens=taken, output_tokens=given_out, **{k: v for k, v in counts.items() if v})
    expected = calc_price(theirs, model, provider_id=service).total_price
    price = Prices(None, "Cost").of(provider, model)
    assert price is not None
    assert price.cost(usage) == expected


def test_most_are_plain_numbers():
    """So that a call does not wait for the package."""
    prices = Prices(None, "Cost")
    flat = [model for provider, model, _ in KNOWN if isinstance(prices.of(provider, model), FlatPrice)]
    assert {"gpt-4o-mini", "gpt-5", "grok-4", "gemini-2.5-flash"} <= {*flat}
    assert not {"gemini-2.5-pro", "claude-sonnet-4-5"} & {*flat}  # they have tiers


@pytest.mark.parametrize(
    ("provider", "model"),
    [
        (OPENAI, "no-such-model"),
        (info("no-such-service"), "gpt-4o"),
        (info("vllm"), "gpt-4o"),
        (info("ollama"), "gpt-4o"),
        (info("openai", address="127.0.0.1"), "gpt-4o"),
        (info("openai", address="localhost"), "gpt-4o"),
        (info("local", address=None, in_process=True), "gpt-4o"),
    ],
)
def test_a_model_without_a_list_price(provider, model):
    """It is unknown, and never free: a machine of the user's own costs what only the user knows."""
    assert Prices(None, "Cost").of(provider, model) is None


class TestGiven:
    def test_go_first(self):
        price = Prices({"gpt-4o-mini": (1, 2)}, "Cost").of(OPENAI, "gpt-4o-mini")
        assert price.cost(Usage(input_tokens=1_000_000, output_tokens=500_000)) == 2

    def test_cached_tokens_cost_what_others_do(self):
        price = Prices({"m": (1, 2)}, "Cost").of(OPENAI, "m")
        usage = Usage(input_tokens=1_000_000, output_tokens=0, cached_tokens=900_000, cache_write_tokens=50)
        assert price.cost(usage) == 1

    @pytest.mark.parametrize("counts", [{"cached_tokens": 10**9}, {"cached_tokens": 60, "cache_write_tokens": 10**9}])
    @pytest.mark.parametrize(("provider", "model", "service"), KNOWN)
    def test_more_cached_tokens_than_input(self, provider, model, service, counts):
        """Some services count them beside the input. They cost something then, as the input does."""
        price = Prices(None, "Cost").of(provider, model)
        usage = Usage(input_tokens=100, output_tokens=0, **counts)
        assert price.cost(usage) > 0
        assert price.nano(100, 0, usage) == math.ceil(price.cost(usage) * 1_000_000_000)

    def test_for_one_provider(self):
        prices = Prices({"m": (1, 1), "groq:m": (2, 2)}, "Cost")
        one = Usage(input_tokens=1_000_000, output_tokens=0)
        assert [prices.of(each, "m").cost(one) for each in (OPENAI, info("groq"))] == [1, 2]

    def test_by_the_name_of_the_answer(self):
        """A deployment has a name of its own, and the answer says which model it is."""
        prices = Prices({"gpt-4o-2024-08-06": (1, 1)}, "Cost")
        assert prices.of(info("azure"), "my-deployment") is None
        assert prices.of(info("azure"), "my-deployment", "gpt-4o-2024-08-06") is not None

    def test_names_with_a_service(self):
        prices = Prices({"gpt-x": (1, 1)}, "Cost")
        assert prices.of(info("litellm", "openai"), "openai/gpt-x") is not None
        assert prices.of(info("langchain", "openai"), "openai:gpt-x") is not None
        assert prices.of(OPENAI, "openai/gpt-x") is None

    @pytest.mark.parametrize(
        ("value", "problem"),
        [
            ("gpt", "got a str"),
            ({1: (1, 1)}, "got an int as a model"),
            ({"m": 1}, "prices['m']: expected two numbers from 0 up"),
            ({"m": (1,)}, "expected two numbers"),
            ({"m": (1, -1)}, "expected two numbers from 0 up"),
            ({"m": ("1", "2")}, "expected two numbers"),
            ({"m": (1, float("nan"))}, "expected two numbers"),
            ({"m": (True, 1)}, "expected two numbers"),
        ],
    )
    def test_mistakes(self, value, problem):
        assert problem in check_prices("prices", value)

    def test_a_list_as_in_yaml(self):
        assert check_prices("prices", {"m": [0.15, 0.6]}) is None


class TestAttempts:
    def test_without_usage(self):
        """Nobody knows what it cost, unless the service refused it."""
        prices = Prices({"m": (1, 1)}, "Cost")
        assert prices.cost_of(Spent(OPENAI, "m", None)) is None
        assert prices.cost_of(Spent(OPENAI, "m", None, None, refused=True)) == 0

    def test_with_half_a_usage(self):
        assert Prices({"m": (1, 1)}, "Cost").cost_of(Spent(OPENAI, "m", Usage(input_tokens=5))) is None

    def test_an_unknown_price_is_reported_once(self, capsys):
        forget_reports()
        prices = Prices({"m": (1, 1)}, "Cost")
        for _ in range(3):
            assert prices.cost_of(Spent(OPENAI, "nobody-knows", Usage(input_tokens=5, output_tokens=5))) is None
        (line,) = capsys.readouterr().err.splitlines()
        assert line == (
            "fluxibly: Cost: the price of nobody-knows at openai@api.openai.com:443 is not known; give it: "
            "prices={'nobody-knows': (input, output)}, in US dollars for a million tokens"
        )


def test_nano_dollars_are_whole_and_rounded_up():
    """So they add up without errors, and never to too little."""
    prices = Prices({"m": (0.15, 0.6), "free": (0, 0)}, "Cost")
    price = prices.of(OPENAI, "m")
    assert [price.nano(*tokens) for tokens in ((0, 0), (1, 0), (2, 0), (1, 1), (1000, 100))] == [
        0,
        150,
        300,
        750,
        210_000,
    ]
    assert Prices({"m": (0.0001, 0)}, "Cost").of(OPENAI, "m").nano(1, 0) == 1
    for provider, model, _ in KNOWN:
        price, usage = prices.of(provider, model), Usage(input_tokens=1000, output_tokens=100, cached_tokens=10)
        assert price.nano(1000, 100, usage) == math.ceil(price.cost(usage) * 1_000_000_000)


def test_many_models_do_not_pile_up():
    prices = Prices({"m": (1, 1)}, "Cost")
    for number in range(1500):
        prices.of(info("vllm"), f"m-{number}")
    assert len(prices._found) <= 1000


def test_without_the_package(tmp_path):
    """Given prices work, and without any it is an error that says what to install."""
    (tmp_path / "genai_prices.py").write_text("raise ImportError", encoding="utf-8")
    code = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "genai_prices" else find(name, *rest)
from fluxibly import Pipeline, Request, Response, Usage
from fluxibly.errors import ConfigError
from fluxibly.middleware import Budget, Cost
from fluxibly.testing import ScriptedProvider
for make in (Cost, lambda: Budget(cost=1)):
    try:
        make()
    except ConfigError as error:
        print(error)
Budget(tokens=1), Budget(cost=1, unknown="free")
answer = Response("Paris", usage=Usage(input_tokens=1_000_000, output_tokens=0))
stack = [Cost(prices={"m": (2, 1)}), Budget(cost=3, prices={"m": (2, 1)})]
print(Pipeline(ScriptedProvider(answer), stack).complete(Request(model="m", messages="Hi")).cost)
print("genai_prices" in sys.modules)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False
    )
    first, second, cost, loaded = ran.stdout.splitlines()
    assert first.startswith("Cost: expected prices={…}, or the package that knows them: pip install")
    assert second.startswith("Budget: expected prices={…}, or the package that knows them: pip install")
    assert (cost, loaded, ran.stderr) == ("2.000000", "False", "")
