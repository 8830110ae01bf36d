"""What an explanation says of a stack: the tree, the worst case, and that it says no secret, whatever the stack."""

from __future__ import annotations

import logging
import math
import re
from functools import partial
from typing import Any

import attrs
import pytest
from hypothesis import given, settings, strategies as st
from support.calling import REQUEST, call

from fluxibly import LLM, AsyncLLM, AsyncPipeline, LLMConfig, Pipeline, Target, default_stack, middleware as built_in
from fluxibly.config import Timeouts
from fluxibly.errors import ConfigError, ServerError
from fluxibly.explain import Explanation, Match, Rule, WorstCase, all_rules, explain, outside, register_rule
from fluxibly.explain.layers import LAYERS
from fluxibly.middleware import (
    Balance,
    Budget,
    Cache,
    CircuitBreaker,
    Concurrency,
    Continue,
    Cost,
    Deadline,
    Defaults,
    ExtractReasoning,
    Fallback,
    Guard,
    Hedge,
    Logging,
    Metrics,
    RateLimit,
    Record,
    Redact,
    Replay,
    Retry,
    SimulateStream,
    StreamMeter,
    StreamTimeout,
    Timing,
    Tools,
    Tracing,
    Validation,
)
from fluxibly.registry import _BUILT_IN_MIDDLEWARE
from fluxibly.testing import Delay, ScriptedProvider
from fluxibly.testing.modes import MODES

CONFIG = LLMConfig(framework="openai", model="gpt-4o", api_key="sk-secret-0123456789", max_tokens=100, timeout=10)
SECRET = "sk-secret-0123456789"  # noqa: S105  # of the tests


def of(*layers: Any, config: LLMConfig = CONFIG, **options: Any) -> Explanation:
    return explain(layers, config=config, **options)


def worst(*layers: Any, config: LLMConfig = CONFIG, streaming: bool = False) -> WorstCase:
    cases = of(*layers, config=config).worst_case
    return cases.stream if streaming else cases.whole


def look_up(word: str) -> str:
    """Look a word up."""
    return word


@pytest.fixture
def own_rules(monkeypatch):
    """Forget afterwards which rules a test has registered."""
    monkeypatch.setattr("fluxibly.explain.rules._rules", dict(all_rules()))


@pytest.fixture(autouse=True)
def _from_info_up():
    """The rules look at the level of the logger."""
    logger = logging.getLogger("fluxibly")
    before = logger.level
    logger.setLevel(logging.INFO)
    yield
    logger.setLevel(before)


class TestTheText:
    def test_names_the_layers_outermost_first(self):
        """Each layer has its place, its settings and what it does; the provider is at the end."""
        text = str(of(Timing(), polite, Fallback(to=["gpt-4o-mini"]), Retry(max_retries=1)))
        places = re.findall(r"^ {2}(\d)  (\S+)", text, re.MULTILINE)
        assert places == [("1", "Timing"), ("2", "polite"), ("3", "Fallback"), ("4", "Retry"), ("5", "(provider)")]
        assert "max_retries=1" in text
        assert "Be polite." in text
        assert "└─ target 1: gpt-4o-mini of the same provider" in text
        assert "framework=openai, model=gpt-4o, max_tokens=100" in text
        assert "No warnings." in text

    def test_shows_both_modes_where_they_differ(self):
        text = str(of(Guard(output=look_up), Timing()))
        assert re.search(r"whole: +checks", text)
        assert re.search(r"stream: holds", text)
        assert text.count("stream:") == 2, "the guard's, and the longest wait of a stream"

    @pytest.mark.parametrize("name", ["m", "m" * 300, "модель " * 40])
    def test_is_80_columns_wide(self, name):
        config = LLMConfig(framework="openai", model=name, api_base="https://gateway.example/" + "path/" * 40)
        layers = [Fallback(to=[Target(config, model=name)]), Redact(patterns={"x" * 70: "a" * 200}), Retry(), Retry()]
        text = str(explain(layers, config=config))
        assert max(map(len, text.splitlines())) <= 80
        assert all(line == line.rstrip() for line in text.splitlines())

    @pytest.mark.parametrize("name", _BUILT_IN_MIDDLEWARE.values())
    def test_each_built_in_layer_is_described(self, name):
        """The table has a row for each class that configurations can name, and no others."""
        assert LAYERS[name].whole
        assert hasattr(built_in, name)
        assert set(LAYERS) == set(_BUILT_IN_MIDDLEWARE.values())

    def test_targets(self):
        """Each is shown with its provider and its model, and none is made."""
        targets = [
            "anthropic:claude-sonnet-4-5",
            "gpt-4o-mini",
            Target(ScriptedProvider(), model="m-2"),
            LLMConfig(framework="gone", model="m"),
            LLMConfig(
                framework="openai", model="m", api_base="https://me:secret-word@host.example/v1?api_key=secret-2"
            ),
        ]
        shown = [branch.what for branch in of(Fallback(to=targets)).layers[0].branches]
        assert shown == [
            "whoever is asked: openai, gpt-4o",
            "anthropic, claude-sonnet-4-5",
            "gpt-4o-mini of the same provider",
            "scripted, m-2",
            "gone, m",
            "openai, m at https://***@host.example/v1?api_key=***",
        ]
        assert [branch.name for branch in of(Balance(to=["a"])).layers[0].branches] == ["target 1"]

    def test_a_layer_describes_itself(self):
        @attrs.frozen
        class Twice:
            """The docstring."""

            says: Any = ("does this", "does that")

            def describe(self) -> Any:
                return self.says() if callable(self.says) else self.says

            def __call__(self, request: Any, call_next: Any) -> Any:
                return (yield from call_next(request))

        def broken() -> None:
            raise OSError("no")

        assert "stream: does that" in str(of(Twice()))
        assert "does one thing" in str(of(Twice("does one thing")))
        assert "The docstring." in str(of(Twice(None)))
        assert "(its description raises OSError)" in str(of(Twice(broken)))


def polite(request: Any, call_next: Any) -> Any:
    """Be polite.

    Always.
    """
    return (yield from call_next(request))


class TestTheWorstCase:
    def test_one_request(self):
        found = worst(Timing())
        assert (found.requests, found.formula, found.tokens, found.seconds) == (1, "", 100, 10)

    def test_multiplies(self):
        """Turns × answers × targets × attempts, each with its layer."""
        stack = [Tools([look_up], max_turns=5), Validation(empty="retry"), Fallback(to=["a", "b"]), Retry()]
        found = worst(*stack)
        assert found.requests == 5 * 3 * 3 * 4
        assert (
            found.formula
            == "5 turns (Tools (1)) × 3 answers (Validation (2)) × 3 targets (Fallback (3)) × 4 attempts (Retry (4))"
        )
        assert found.tokens == 180 * 100
        assert str(of(*stack)).count("180 requests × 100") == 1

    @pytest.mark.parametrize(
        ("layer", "requests"),
        [
            (Retry(max_retries=2), 3),
            (Retry(max_retries=2, limits={ServerError: 5}), 6),
            (Retry(max_retries=2, limits={ServerError: 1}), 3),
            (Fallback(to=["a", "b"]), 3),
            (Balance(to=["a", "b"]), 2),
            (Hedge(1.0, at_most=3, max_share=1), 4),
            (Hedge("p95", at_most=3, max_share=0.02), 3),
            (Hedge(1.0, at_most=3, max_share=0), 2),
            (Validation(), 1),
            (Validation(empty="retry"), 3),
            (Validation(check=look_up, max_retries=4), 5),
            (Tools([look_up]), 10),
            (Replay("none.jsonl"), 0),
            (Replay("none.jsonl", missing="ask"), 1),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_requests(self, layer, requests):
        assert worst(layer).requests == requests

    def test_a_stream_is_asked_for_again_only_if_it_is_held_back(self):
        assert worst(Validation(check=look_up), streaming=True).requests == 1
        assert worst(Validation(check=look_up, hold=True), streaming=True).requests == 3
        assert worst(Validation(empty="retry"), streaming=True).requests == 3

    def test_a_request_with_a_target_passes_a_balancer(self):
        """Three balanced targets and one of the fallback are four, and not six."""
        balance = Balance(to=[f"vllm:{name}" for name in "abc"])
        found = worst(Fallback(to=["vllm:d"]), balance, Retry(max_retries=1))
        assert found.requests == (3 + 1) * 2
        assert worst(balance, balance).requests == 3

    @pytest.mark.parametrize(
        ("layers", "seconds"),
        [
            ([Retry(max_retries=2, max_retry_after=0, base_delay=1, max_delay=1.5)], 3 * 10 + 1 + 1.5),
            ([Retry(max_retries=2)], 3 * 10 + 2 * 60),
            ([Retry(max_retries=2, total_time=15)], 15 + 10),
            ([RateLimit(requests=1, max_wait=7)], 17),
            ([Concurrency(1, max_wait=7)], 17),
            ([Retry(max_retries=1, max_retry_after=0, base_delay=0), RateLimit(requests=1, max_wait=7)], 34),
            ([Hedge(2.0, at_most=2, max_share=1)], 14),
            ([Hedge(30.0, at_most=2, max_share=1)], 30),
            ([Hedge("p95")], 20),
            ([Fallback(to=["a"])], 20),
            ([Deadline(5), Retry()], 5),
            ([Retry(max_retries=1, max_retry_after=0, base_delay=0), Deadline(5)], 10),
            ([Deadline(50)], 10),
            ([Tools([look_up])], math.inf),
            ([Deadline(5), Tools([look_up])], 5),
            ([Cache(streams_wait=3)], 13),
            ([Replay("none.jsonl")], 0),
        ],
        ids=repr,
    )
    def test_longest_wait(self, layers, seconds):
        assert worst(*layers).seconds == pytest.approx(seconds)

    def test_a_stream_has_no_limit_unless_one_is_set(self):
        """It says so, and why."""
        assert worst(streaming=True).seconds == math.inf
        assert "no limit: a stream as a whole has no limit: set" in str(of())
        limited = LLMConfig(framework="openai", model="m", timeout=Timeouts(total=9))
        assert worst(config=limited, streaming=True).seconds == 9
        assert worst(Deadline(5), streaming=True).seconds == 5
        assert worst(StreamTimeout(idle=1), streaming=True).seconds == math.inf
        unlimited = LLMConfig(framework="openai", model="m", timeout=Timeouts(total=None))
        assert "the configuration has no limit" in str(of(config=unlimited))

    def test_limits_that_are_not_known(self):
        """A pipeline does not know the limits of its provider, and a provider of your own keeps its own."""
        assert "which LLM.explain() knows" in " ".join(str(Pipeline(ScriptedProvider(), []).explain()).split())
        assert "a provider of your own" in str(of(config=LLMConfig(framework="my-own", model="m")))

    @pytest.mark.parametrize(
        ("layers", "settings", "tokens"),
        [
            ([], {}, None),
            ([], {"max_tokens": 50}, 50),
            ([], {"max_tokens": 50, "additional_params": {"max_completion_tokens": 70}}, 70),
            ([], {"additional_params": {"generationConfig": {"maxOutputTokens": 70}}}, 70),
            ([Defaults(max_tokens=20, n=3)], {}, 60),
            ([Defaults(max_tokens=20)], {"max_tokens": 50}, 50),
            ([Fallback(to=[Target("b", max_tokens=5)])], {"max_tokens": 50}, 55),
            ([Fallback(to=[Target("b", drop=["max_tokens"])])], {"max_tokens": 50}, None),
            ([Fallback(to=[LLMConfig(framework="vllm", model="b", max_tokens=7)])], {"max_tokens": 50}, 57),
            ([Retry()], {"max_tokens": 50}, 200),
        ],
        ids=repr,
    )
    def test_most_tokens(self, layers, settings, tokens):
        config = LLMConfig(framework="openai", model="m", **settings)
        assert worst(*layers, config=config).tokens == tokens
        assert ("no limit: set max_tokens" in str(of(*layers, config=config))) is (tokens is None)

    def test_a_budget_of_each_call(self):
        text = str(of(Retry(), Budget(tokens=300, cost=0.5, scope="call")))
        assert "about 300 with the input, by Budget (2)" in text
        assert re.search(r"cost +\$0.5 by Budget \(2\)", text)
        assert "by Budget" not in str(of(Retry(), Budget(tokens=300)))
        assert "400 = 4 requests × 100" in str(of(Retry(), Budget(tokens=3000, scope="call")))

    def test_what_is_not_counted(self):
        def judge(response: Any) -> Any:
            yield

        text = str(of(polite, Guard(output=judge), Cache()))
        for what in ("what polite (1) sends", "what the functions of Guard (2) ask", "the wait of Cache (3)"):
            assert what in " ".join(text.split())

    def test_a_layer_of_ones_own_says_what_it_adds(self):
        class Vote:
            def __call__(self, request: Any, call_next: Any) -> Any:
                return (yield from call_next(request))

            def worst_case(self, inner: WorstCase) -> WorstCase:
                return inner.repeated(3, "votes").waiting(5)

        class Broken(Vote):
            def worst_case(self, inner: WorstCase) -> WorstCase:
                raise OSError

        class Wrong(Vote):
            def worst_case(self, inner: WorstCase) -> Any:
                return 3

        found = worst(Vote(), Retry(max_retries=1, max_retry_after=0, base_delay=0))
        assert found.formula.startswith("3 votes (")
        assert (found.requests, found.seconds, found.not_counted) == (6, 65, ())
        assert "raises OSError" in str(worst(Broken()).not_counted)
        assert worst(Wrong()).requests == 1

    def test_a_subclass_says_what_it_adds(self):
        """What it says counts in place of what its class adds and does."""

        class Twice(Retry):
            def worst_case(self, inner: WorstCase) -> WorstCase:
                return inner.repeated(2, "times")

            def describe(self) -> str:
                return "tries twice"

        assert worst(Twice(max_retries=5)).formula == "2 times (Twice (1))"
        assert "tries twice" in str(of(Twice()))
        assert [each.rule.name for each in of(Twice(), Fallback(to=["a"])).warnings] == ["fallback-inside-of-retry"]

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda inner: inner.waiting(-5),
            lambda inner: inner.waiting(math.nan),
            lambda inner: inner.repeated(-1, "votes"),
            lambda inner: WorstCase(requests="3"),
            lambda inner: WorstCase(tokens=-1),
            lambda inner: WorstCase(waits={"me": "long"}),
            lambda inner: WorstCase(waits=None),
            lambda inner: WorstCase(formula=None),
            lambda inner: WorstCase(unlimited="why"),
            lambda inner: WorstCase(not_counted=(3,)),
        ],
    )
    def test_a_wrong_case(self, wrong):
        """It is told, and the case is that of one request."""

        class Wrong:
            def __call__(self, request: Any, call_next: Any) -> Any:
                return (yield from call_next(request))

            def worst_case(self, inner: WorstCase) -> WorstCase:
                return wrong(inner)

        text = " ".join(str(of(Wrong())).split())
        assert "its worst_case raises ValueError" in text
        assert worst(Wrong()).requests == 1

    @pytest.mark.parametrize("mode", [MODES[0], MODES[-1]], ids=str)
    @given(data=st.data())
    @settings(max_examples=40)
    def test_a_provider_that_is_down_is_the_worst_case(self, mode, data):
        """Each request fails at its limit, and each wait is as long as it may be: as often and as long as explained."""
        layers = data.draw(st.lists(LAYERS_THAT_SEND, min_size=1, max_size=3))
        case = worst(*layers, config=LLMConfig(framework="openai", model="m", timeout=Timeouts(total=10)))
        answers = [[Delay(10), ServerError("down")] for _ in range(case.requests)]
        made = call(mode, layers, *answers)
        assert len(made.provider.requests) == case.requests
        assert made.clock.now() <= case.seconds
        if not any(isinstance(layer, Hedge) for layer in layers):
            assert made.clock.now() == pytest.approx(case.seconds)

    def test_an_answer_that_never_passes_is_the_worst_case(self, mode):
        """The model is asked as often as explained, in whole and in stream mode."""
        for layer in (Validation(check=lambda response: "again"), Validation(empty="retry")):
            answer = "bad" if layer.check else ""
            made = call(mode, layer, *[answer] * 3)
            assert len(made.provider.requests) == worst(layer, streaming=mode.streaming).requests


RETRIES = st.builds(
    lambda most, delay: Retry(max_retries=most, base_delay=delay, max_delay=delay, max_retry_after=0, uniform=max),
    st.integers(0, 2),
    st.sampled_from([0.0, 3.0]),
)
LAYERS_THAT_SEND = st.one_of(
    RETRIES,
    st.builds(lambda count: Fallback(to=[f"f{n}" for n in range(count)]), st.integers(1, 2)),
    st.builds(lambda count: Balance(to=[f"b{n}" for n in range(count)]), st.integers(1, 3)),
    st.builds(lambda after: Hedge(after, at_most=2, max_share=1), st.sampled_from([1.0, 4.0])),
    st.just(Validation()),
    st.just(Timing()),
)


class TestTheRecommendedOrder:
    """No rule warns of the order that `default_stack` gives."""

    @pytest.mark.parametrize("retries", [0, 3])
    def test_default_stack(self, retries):
        config = LLMConfig(framework="echo", model="m", max_retries=retries)
        with LLM(config, strict=True) as llm:
            explanation = llm.explain()
        assert explanation.warnings == explanation.notes == []

    @given(data=st.data())
    @settings(max_examples=60)
    def test_of_all_layers_in_it(self, tmp_path_factory, data):
        """Whatever built-in layers are given, in whatever order."""
        file = tmp_path_factory.mktemp("explain") / "calls.jsonl"
        every = [
            Balance(to=["a", "b"]),
            Budget(tokens=1000),
            Budget(tokens=100, scope="call"),
            Cache(),
            CircuitBreaker(),
            Concurrency(5),
            Continue(),
            Cost(),
            Deadline(5),
            Defaults(top_p=1.0),
            ExtractReasoning(),
            Fallback(to=["c", "anthropic:claude-sonnet-4-5"]),
            Guard(input=look_up, output=look_up),
            Hedge("p95"),
            Logging(),
            Metrics(),
            RateLimit(requests=5),
            Record(file),
            Redact(restore=True, replace="[{name} {number}]"),
            Replay(file, missing="ask"),
            Retry(max_retries=5),
            SimulateStream(),
            StreamMeter(),
            StreamTimeout(idle=5),
            Timing(),
            Tools([look_up]),
            Tracing(),
            Validation(check=look_up, hold=True),
            polite,
        ]
        assert {type(layer).__name__ for layer in every} >= set(_BUILT_IN_MIDDLEWARE.values())
        layers = data.draw(st.permutations(every))
        kept = layers[: data.draw(st.sampled_from([len(layers), 5]))]
        config = LLMConfig(framework="openai", model="m")
        explanation = explain(default_stack(config, *kept), config=config)
        assert [str(warning) for warning in explanation.warnings] == []
        assert {note.rule.name for note in explanation.notes} <= {"meter-outside-of-hold-back"}


class TestStrict:
    STACK = (Cache(), Redact(), Logging(), Tracing())

    @pytest.mark.parametrize("kind", [LLM, AsyncLLM])
    def test_lists_all_warnings(self, kind):
        """Each with its reason and its cure; a note is no error."""
        config = LLMConfig(framework="echo", model="m")
        with pytest.raises(ConfigError) as caught:
            kind(config, [StreamMeter(), Guard(output=look_up), *self.STACK], strict=True)
        first, second = caught.value.problems
        assert first.startswith("cache-outside-of-redact: Cache (3) stands outside of Redact (4): what Redact restores")
        assert first.endswith("instead: put Cache inside of Redact")
        assert second.startswith("logging-outside-of-tracing: Logging (5)")
        kind(config, [StreamMeter(), Guard(output=look_up)], strict=True)
        kind(config, self.STACK)

    def test_from_yaml(self, tmp_path):
        file = tmp_path / "f.yaml"
        file.write_text("llm: {framework: echo, model: m, middleware: [cache, redact]}")
        LLM.from_yaml(file).close()
        with pytest.raises(ConfigError, match="cache-outside-of-redact"):
            LLM.from_yaml(file, strict=True)

    def test_pipelines_explain_themselves(self):
        for kind in (Pipeline, AsyncPipeline):
            explanation = kind(ScriptedProvider(), self.STACK).explain()
            assert len(explanation.warnings) == 2
            assert explanation.chain.provider_shown == "name=ScriptedProvider, framework=scripted"


class TestRules:
    @pytest.mark.usefixtures("own_rules")
    def test_one_of_ones_own(self):
        """It applies to every explanation from then on; a name can be taken once."""

        def without_timing(chain: Any) -> Any:
            if not [*chain.of("Timing")]:
                yield Match(chain.layers[:1], "no Timing in the stack")

        rule = Rule("no-timing", without_timing, reason="nobody knows why", cure="add Timing")
        register_rule(rule)
        (warning,) = of(Logging()).warnings
        assert str(warning) == "no-timing: no Timing in the stack: nobody knows why; instead: add Timing"
        assert (warning.rule, warning.layers[0].layer) == (rule, Logging())
        assert not of(Timing()).warnings
        with pytest.raises(ValueError, match="the rule 'no-timing' exists already"):
            register_rule(rule)
        register_rule(attrs.evolve(rule, level="note"), replace=True)
        assert not of(Logging()).warnings
        assert len(of(Logging()).notes) == 1

    @pytest.mark.usefixtures("own_rules")
    def test_one_that_raises_is_a_note(self):
        def broken(chain: Any) -> Any:
            raise OSError(SECRET)

        register_rule(Rule("broken", broken, reason="why", cure="that"))
        (note,) = of(Logging()).notes
        assert "broken: the rule raises OSError" in str(note)
        assert SECRET not in str(note)

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            ({"name": ""}, ValueError),
            ({"reason": ""}, ValueError),
            ({"level": "error"}, ValueError),
            ({"find": "outside"}, TypeError),
        ],
        ids=str,
    )
    def test_wrong_rules(self, arguments, error):
        right = {"name": "n", "find": outside("Cache", "Redact"), "reason": "r", "cure": "c"}
        with pytest.raises(error):
            Rule(**{**right, **arguments})

    def test_what_is_no_rule(self):
        with pytest.raises(TypeError, match="expected a Rule"):
            register_rule("no-timing")  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("framework", "to", "warns"),
        [
            ("openai", "claude-x", True),
            ("openai-responses", "gemini-2.5-pro", True),
            ("anthropic", "gpt-4o", True),
            ("echo", "gpt-4o", True),
            ("openai", "gpt-4o-mini", False),
            ("openai-responses", "o3", False),
            ("openai", "anthropic:claude-x", False),
            ("openai", "some-model", False),
            ("openrouter", "claude-x", False),
            ("litellm", "claude-x", False),
            ("vertex", "claude-x", False),
        ],
    )
    def test_models_of_another_vendor(self, framework, to, warns, monkeypatch):
        """Services and gateways that have the models of many vendors are left in peace."""
        monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
        config = LLMConfig(framework=framework, model="m")
        assert bool(of(Fallback(to=[to]), config=config).warnings) is warns
        gateway = attrs.evolve(config, api_base="https://gateway.example/v1")
        assert not of(Fallback(to=[to]), config=gateway).warnings
        if framework == "openai":
            monkeypatch.setenv("OPENAI_BASE_URL", "https://gateway.example/v1")
            assert not of(Fallback(to=[to]), config=config).warnings

    def test_many_layers_are_not_many_warnings(self):
        """One for each layer that stands wrong, which names a few of the others."""
        warnings = of(*[RateLimit(requests=1)] * 10, *[Retry()] * 50).warnings
        assert len(warnings) == 11
        assert "and 46 more" in str(warnings[0])


class TestHostile:
    def test_no_layers(self):
        explanation = explain([])
        assert "0 layers" in str(explanation)
        assert explanation.worst_case.whole.requests == 1
        assert not explanation.warnings
        assert "provider" in explanation.mermaid()

    def test_a_repr_that_raises(self):
        class Bad:
            def __repr__(self) -> str:
                raise OSError(SECRET)

            @property
            def targets(self) -> Any:
                raise OSError

            def __call__(self, request: Any, call_next: Any) -> Any:
                return (yield from call_next(request))

        assert "(its repr raises OSError)" in str(of(Bad()))

    def test_attributes_that_raise(self):
        class Bad:
            def __getattr__(self, name: str) -> Any:
                raise OSError(name)

            def __call__(self, request: Any, call_next: Any) -> Any:
                return (yield from call_next(request))

        explanation = of(Bad())
        assert "Bad" in str(explanation)
        assert "Bad" in explanation.mermaid()
        assert worst(Bad()).requests == 1

    def test_a_class_with_the_name_of_ours(self):
        """It is a layer of one's own; a subclass of ours is ours."""
        ours = Retry

        class Mine(ours):
            pass

        def retry(self: Any, request: Any, call_next: Any) -> Any:
            return (yield from call_next(request))

        other = type("Retry", (), {"__call__": retry, "__module__": "mine"})()
        assert not of(other, Fallback(to=["a"])).warnings
        assert worst(other).requests == 1
        assert worst(Mine()).requests == 4
        assert [each.rule.name for each in of(Mine(), Fallback(to=["a"])).warnings] == ["fallback-inside-of-retry"]

    def test_functions_and_partials(self):
        """They are shown by their names, without the arguments of a partial."""

        def keyed(request: Any, call_next: Any, key: str) -> Any:
            """Send a key."""
            return (yield from call_next(request))

        text = str(of(partial(keyed, key=SECRET), lambda request, call_next: call_next(request), polite))
        assert "keyed (partial)" in text
        assert "Send a key." in text
        assert "<lambda>" in text
        assert SECRET not in text
        assert "0x" not in text

    @pytest.mark.parametrize(
        "layer",
        [Retry(max_retries=3), Fallback(to=["a", "openai:b"]), Tools([look_up]), Hedge("p95"), polite],
        ids=lambda layer: type(layer).__name__,
    )
    def test_two_hundred_layers(self, layer):
        explanation = of(*[layer] * 200)
        text = str(explanation)
        assert "200 layers" in text
        assert max(map(len, text.splitlines())) <= 80
        assert explanation.mermaid().count("layer200") >= 2

    def test_nested_default_stacks(self):
        config = LLMConfig(framework="echo", model="m", middleware=["default", {"default_stack": {"cache": {}}}])
        with LLM(config) as llm:
            names = {each.rule.name for each in llm.explain().warnings}
        assert names == {"several-retries", "several-tracings", "logging-outside-of-tracing"}

    def test_a_stack_as_a_provider(self):
        """Its layers are explained too, and one that contains itself ends."""
        inner = Pipeline(ScriptedProvider(), [Retry()])
        explanation = Pipeline(inner, [Fallback(to=["a"]), Logging()]).explain()
        assert [layer.name for layer in explanation.layers] == ["Fallback", "Logging", "Retry"]
        assert explanation.worst_case.whole.requests == 8
        inner.provider = inner
        assert "Retry" in str(inner.explain())

    def test_targets_that_cannot_be_resolved(self, monkeypatch):
        target = Target("a")

        def broken(name: str) -> Any:
            raise OSError("the disk is gone")

        monkeypatch.setattr("fluxibly._model_names.split_model", broken)
        assert "of the same provider" in str(of(Fallback(to=[target])))

    def test_no_provider_is_made(self, monkeypatch):
        def made(*_: Any, **__: Any) -> Any:
            raise AssertionError("a provider was made")

        monkeypatch.setattr("fluxibly.registry.make_provider", made)
        text = str(of(Fallback(to=["anthropic:claude-x", LLMConfig(framework="local", model="no/such.gguf")])))
        assert "local, no/such.gguf" in text


@attrs.frozen
class Leaky:
    """A layer whose repr shows what it should not."""

    api_key: str = SECRET
    url: str = f"https://me:{SECRET}@host.example/path?token={SECRET}"
    bare: str = SECRET
    headers: Any = attrs.field(factory=lambda: {"authorization": f"Bearer {SECRET}"})

    def __call__(self, request: Any, call_next: Any) -> Any:
        return (yield from call_next(request))


def test_no_secret_is_shown():
    """Neither of the configuration, nor of a target, nor of a layer, wherever it stands."""
    headers = {"x-api-key": SECRET}
    target = Target(LLMConfig(framework="vllm", model="m", api_key=SECRET, headers=headers), extra={"token": SECRET})
    config = attrs.evolve(CONFIG, headers=headers, additional_params={"password": SECRET})
    other = LLMConfig(framework="vllm", model="m", api_base=f"https://u:{SECRET}@host.example/v1?key={SECRET}")
    stack = [Leaky(), Fallback(to=[target, Target("m", headers=headers), other]), Retry(), Retry(), Tracing()]
    with LLM(config, stack) as llm:
        explanation = llm.explain()
    for text in (str(explanation), explanation.mermaid(), repr(explanation), *map(str, explanation.warnings)):
        assert SECRET not in text
    unknown = str(explain([Leaky(bare="")]))
    assert SECRET not in unknown
    assert "host.example" in unknown


NODE = re.compile(r'    \w+(\["[^"]*"\]|\(\["[^"]*"\]\)|\[\("[^"]*"\)\])')
EDGE = re.compile(r'    \w+ (-->|-\. "[^"]*" \.->) \w+')


@pytest.mark.parametrize("name", ['quo"te', "brack]et", "a\nb", "`<b>&;#", "x" * 100])
def test_mermaid(name):
    """Each line is a node or an edge of Mermaid's flowcharts, with its label in quotes."""
    config = LLMConfig(framework="openai", model=name)
    chart = explain([Cache(), Redact(), Fallback(to=[Target(ScriptedProvider(), model=name)]), Retry()], config=config)
    first, *lines = chart.mermaid().splitlines()
    assert first == "flowchart TD"
    nodes = [line for line in lines if NODE.fullmatch(line)]
    edges = [line for line in lines if EDGE.fullmatch(line)]
    assert len(nodes) == 1 + 4 + 1 + 1
    assert len(edges) == 5 + 1
    rest = [line for line in lines if line not in nodes and line not in edges]
    assert rest == ["    classDef hurts stroke:#c00,stroke-width:2px", "    class layer1,layer2 hurts"]
    known = {line.split("[")[0].split("(")[0].strip() for line in nodes}
    assert {end for edge in edges for end in (edge.split()[0], edge.split()[-1])} <= known


def test_an_explanation_has_no_effect():
    """Calls after it are as before."""
    stack = [Cache(), Retry(), RateLimit(requests=1)]
    pipeline = Pipeline(ScriptedProvider("Hello"), stack)
    assert str(pipeline.explain()) == str(pipeline.explain())
    assert pipeline.complete(REQUEST).text == "Hello"
