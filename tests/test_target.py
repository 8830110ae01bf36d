"""`Target`: how a request is adapted, how targets are read from code and YAML, and the checks of an `LLM`."""

from __future__ import annotations

import enum
import traceback

import attrs
import pytest

from fluxibly import LLM, AsyncLLM, LLMConfig, Message, Request, Target, register_llm_framework
from fluxibly.errors import AuthenticationError, ConfigError, FrameworkNotRegistered
from fluxibly.middleware import Fallback, Retry
from fluxibly.registry import frameworks, make_provider
from fluxibly.target import to_targets

REQUEST = Request(
    model="gpt",
    messages="hi",
    temperature=0.9,
    top_p=0.5,
    seed=7,
    stop=["\n"],
    extra={"of": "openai"},
    headers={"x-gateway": "secret-1"},
    metadata={"user": 1},
)
ECHO = LLMConfig(framework="echo", model="m")


@pytest.fixture(autouse=True)
def _registries(monkeypatch):
    monkeypatch.setattr("fluxibly.registry._frameworks", {})
    monkeypatch.setattr("fluxibly.registry._middleware", {})
    for framework in frameworks().values():
        for name in (framework.env_var, *framework.instead, framework.url_var):
            if name:
                monkeypatch.delenv(name, raising=False)


class Parrot:
    def __init__(self, config=None):
        self.config = config

    def complete(self, request):
        return request.messages[-1].text


class Singer:
    def stream(self, request):
        yield "la"


class TestEvolve:
    def test_model_parameters_and_drop_are_set_at_once(self):
        """The target's model and parameters replace the request's, and dropped parameters are not sent."""
        target = Target("anthropic:claude-x", drop=["seed", "stop"], temperature=0.1)
        adapted = REQUEST.evolve(target=target)
        assert adapted.target is target
        assert (adapted.model, adapted.temperature, adapted.seed, adapted.stop) == ("claude-x", 0.1, None, ())
        assert (adapted.top_p, adapted.metadata, adapted.messages) == (0.5, {"user": 1}, REQUEST.messages)
        assert adapted.call is REQUEST.call
        assert (REQUEST.target, REQUEST.model, REQUEST.seed) == (None, "gpt", 7)

    def test_other_changes_win(self):
        """Changes beside `target` in the same call are made last."""
        target = Target("anthropic:claude-x", drop=["seed"], temperature=0.1)
        changes = {"model": "claude-y", "seed": 3, "temperature": 0.4, "extra": {"a": 1}, "headers": {"h": "1"}}
        adapted = REQUEST.evolve(target=target, messages="other", **changes)
        assert {name: getattr(adapted, name) for name in changes} == changes
        assert adapted.messages == (Message.user("other"),)

    def test_extra_and_headers_stay_behind_when_the_provider_changes(self):
        """They are in the words of one service, and may hold its secrets."""
        for target in (Target("anthropic:claude-x"), Target(Parrot()), Target(ECHO)):
            adapted = REQUEST.evolve(target=target)
            assert (adapted.extra, adapted.headers) == ({}, {})

    def test_another_model_keeps_extra_and_headers(self):
        """The provider that is asked is the same, and so is the target."""
        adapted = REQUEST.evolve(target=Target("gpt-mini", seed=8))
        assert (adapted.model, adapted.seed, adapted.target) == ("gpt-mini", 8, None)
        assert (adapted.extra, adapted.headers) == (REQUEST.extra, REQUEST.headers)

    def test_another_model_of_the_target_that_is_asked(self):
        """Within a router, the name of a model means a model of the router's choice."""
        chosen = Target("anthropic:claude-x", extra={"of": "anthropic"})
        adapted = REQUEST.evolve(target=chosen).evolve(target=Target("claude-y"))
        assert (adapted.target, adapted.model, adapted.extra) == (chosen, "claude-y", {"of": "anthropic"})

    def test_a_configuration_sets_its_parameters(self):
        """Parameters that the configuration leaves open stay as the request has them. `extra` is its `additional_params`."""
        config = LLMConfig(
            framework="anthropic", model="claude-x", temperature=0.3, max_tokens=9, additional_params={"top_k": 4}
        )
        adapted = REQUEST.evolve(target=Target(config))
        assert (adapted.model, adapted.temperature, adapted.max_tokens) == ("claude-x", 0.3, 9)
        assert (adapted.top_p, adapted.seed, adapted.extra) == (0.5, 7, {"top_k": 4})

    def test_keywords_and_drop_win_over_the_configuration(self):
        """So one configuration serves several targets."""
        config = LLMConfig(framework="echo", model="m", temperature=0.3, top_p=0.2, additional_params={"a": 1})
        target = Target(config, model="other", drop=["temperature"], top_p=0.7, extra={"b": 2})
        adapted = REQUEST.evolve(target=target)
        assert (adapted.model, adapted.temperature, adapted.top_p) == ("other", None, 0.7)
        assert adapted.extra == {"b": 2}

    def test_a_provider_is_asked_for_the_requests_model(self):
        """Unless the target names another."""
        provider = Parrot()
        assert REQUEST.evolve(target=Target(provider)).model == "gpt"
        assert REQUEST.evolve(target=Target(provider, model="m")).model == "m"

    def test_none_goes_back(self):
        """The pipeline's own provider is asked again."""
        adapted = REQUEST.evolve(target=Target("anthropic:claude-x"))
        back = adapted.evolve(target=None, model="gpt")
        assert (back.target, back.model) == (None, "gpt")

    def test_the_target_stays_with_other_changes(self):
        """A middleware further in changes an adapted request as any other."""
        adapted = REQUEST.evolve(target=Target("anthropic:claude-x", temperature=0.1))
        again = adapted.evolve(temperature=0.8, extra={"a": 1})
        assert (again.target, again.temperature, again.extra) == (adapted.target, 0.8, {"a": 1})
        assert again.evolve(target=adapted.target).temperature == 0.8

    @pytest.mark.parametrize(
        "wrong", ["anthropic:claude-x", 5, Target, ECHO, Parrot()], ids=["str", "int", "class", "config", "provider"]
    )
    def test_a_wrong_type_says_what_to_write(self, wrong):
        """Only a Target is one; the error shows how to make it."""
        for make in (REQUEST.evolve, lambda **new: Request(model="m", messages="hi", **new)):
            with pytest.raises(TypeError, match=r"target: expected a Target, got .*; write target=Target\(…\)"):
                make(target=wrong)


class TestNewRequest:
    def test_a_request_may_have_a_target_from_the_beginning(self):
        """Its model, parameters and drop are set as `evolve` sets them."""
        target = Target("anthropic:claude-x", drop=["seed"], temperature=0.1)
        request = Request(model="gpt", messages="hi", seed=7, target=target)
        assert (request.target, request.model, request.seed, request.temperature) == (target, "claude-x", None, 0.1)

    def test_the_name_of_a_model_is_no_other_provider(self):
        """A request for another model of the pipeline's own provider has no target."""
        request = Request(model="gpt", messages="hi", target=Target("gpt-mini", temperature=0.1))
        assert (request.target, request.model, request.temperature) == (None, "gpt-mini", 0.1)


class TestReading:
    @pytest.mark.parametrize(
        ("text", "framework", "model"),
        [
            ("anthropic:claude-x", "anthropic", "claude-x"),
            ("ollama:mistral:7b", "ollama", "mistral:7b"),
            ("bedrock:arn:aws:bedrock:us-east-1::foundation-model/x", "bedrock", "arn:aws:bedrock:us-east-1::foundation-model/x"),
            ("gpt-4o-mini", None, "gpt-4o-mini"),
            ("mistral-small:7b", None, "mistral-small:7b"),
            ("hf.co/x:Q4", None, "hf.co/x:Q4"),
            ("arn:aws:bedrock:us-east-1::foundation-model/x", None, "arn:aws:bedrock:us-east-1::foundation-model/x"),
        ],
    )  # fmt: skip
    def test_a_framework_stands_before_the_first_colon(self, text, framework, model):
        """Any other text is another model of the provider that is asked."""
        target = Target(text)
        assert (target.config and target.config.framework) == framework
        adapted = REQUEST.evolve(target=target)
        assert (adapted.model, adapted.target) == (model, target if framework else None)

    def test_a_name_of_an_enumeration_is_a_str(self):
        """Its value counts."""
        model = enum.Enum("Model", {"CLAUDE": "anthropic:claude-x"}, type=str)
        assert REQUEST.evolve(target=Target(model.CLAUDE)).model == "claude-x"

    def test_a_framework_may_be_registered_later(self):
        """A target made at import finds the framework, also if it was asked before."""
        target = Target("mine:m:1")
        assert REQUEST.evolve(target=target).model == "mine:m:1"
        register_llm_framework("mine", Parrot)
        adapted = REQUEST.evolve(target=target)
        assert (adapted.model, adapted.target) == ("m:1", target)

    def test_a_framework_of_another_package(self, monkeypatch):
        """It is known by its name, without being imported."""
        monkeypatch.setattr("fluxibly.registry.entry_points", lambda kind: {"theirs": kind})
        assert REQUEST.evolve(target=Target("theirs:m")).model == "m"

    @pytest.mark.parametrize("text", ["", "  ", ":", "openai:", "openai: ", ":gpt", "unknown:"])
    def test_an_incomplete_text(self, text):
        """A name is missing."""
        with pytest.raises(ConfigError, match='Target: expected "framework:model" or the name of a model, got'):
            Target(text)

    @pytest.mark.parametrize("wrong", [None, 5, b"gpt", {"framework": "echo"}, Target("m"), Target])
    def test_a_wrong_type(self, wrong):
        """The error lists what a target can be made from."""
        expected = 'Target: expected "framework:model", the name of a model, an LLMConfig or a provider, got'
        with pytest.raises(TypeError, match=expected):
            Target(wrong)

    def test_a_class_of_a_provider(self):
        """The error says how to make the provider."""
        for kind in (Parrot, Singer):
            with pytest.raises(TypeError, match=rf"write {kind.__name__}\(\)"):
                Target(kind)

    def test_an_llm_is_no_provider(self):
        """The error says to give its configuration."""
        with pytest.raises(TypeError, match=r"got an? LLM; write Target\(llm\.config\)"):
            Target(LLM(ECHO))
        assert Target(LLM(ECHO).config).config == ECHO

    def test_a_model_beside_a_text(self):
        """The text has the model already."""
        with pytest.raises(TypeError, match="got 'openai:gpt' and model='x'"):
            Target("openai:gpt", model="x")

    def test_a_configuration_with_middleware(self):
        """The stack of the call applies, so a second stack is a mistake."""
        with pytest.raises(ConfigError, match="Target: expected a configuration without middleware"):
            Target(LLMConfig(framework="echo", model="m", middleware=["retry"]))

    def test_targets_are_equal_only_to_themselves(self):
        """Two targets of one text are two."""
        first, second = Target("anthropic:claude-x"), Target("anthropic:claude-x")
        assert first != second
        assert len({first, second}) == 2


class TestParameters:
    @pytest.mark.parametrize(
        ("name", "advice"),
        [
            ("temprature", "; did you mean 'temperature'?"),
            ("api_key", "; it belongs into an LLMConfig"),
            ("timeout", "; it belongs into an LLMConfig"),
            ("max_retries", "; it belongs into an LLMConfig"),
            ("messages", ""),
            ("call", ""),
            ("target", ""),
        ],
    )
    def test_an_unknown_parameter(self, name, advice):
        """The error names the nearest parameter, or the place of the setting."""
        with pytest.raises(
            TypeError, match=rf"Target: a target sets no parameter '{name}'{advice.replace('?', '[?]')}"
        ):
            Target("gpt", **{name: 1})

    def test_all_problems_of_values_are_listed(self):
        """One error has them all, with their ranges."""
        with pytest.raises(ConfigError) as caught:
            Target("gpt", temperature=3, top_p="high", n=0, drop=["sed", "model", 5])
        assert caught.value.problems == (
            "Target: drop: expected the names of parameters that are sent, got 'sed'; did you mean 'seed'?",
            "Target: drop: expected the names of parameters that are sent, got 'model'",
            "Target: drop: expected the names of parameters that are sent, got 5",
            "Target: temperature: expected a number from 0 to 2, got 3",
            "Target: top_p: expected a number from 0 to 1, got 'high'",
            "Target: n: expected a whole number from 1 up, got 0",
        )

    def test_the_model_of_a_provider_is_a_text(self):
        """An empty name asks for nothing."""
        with pytest.raises(ConfigError, match="Target: model: expected a non-empty str"):
            Target(Parrot(), model=" ")

    def test_a_value_and_drop_for_one_parameter(self):
        """One of the two is a mistake."""
        with pytest.raises(ConfigError, match="Target: seed: expected a value, or the name in drop, got both"):
            Target("gpt", seed=1, drop=["top_p", "seed"])

    @pytest.mark.parametrize("drop", [None, 5, {"seed": 1}])
    def test_drop_is_a_list(self, drop):
        """Nothing else has names."""
        with pytest.raises(ConfigError, match=r'Target: drop: expected a list of parameters, like \["seed"\], got'):
            Target("gpt", drop=drop)

    def test_one_name_to_drop(self):
        """A str stands for a list of one."""
        assert REQUEST.evolve(target=Target("gpt-mini", drop="seed")).seed is None

    def test_values_are_read_once(self):
        """The values of a generator serve every call, and a wrong value is found when the target is made."""
        target = Target("gpt-mini", stop=(word for word in ("a", "b")))
        assert [REQUEST.evolve(target=target).stop for _ in range(2)] == [("a", "b")] * 2
        with pytest.raises(TypeError, match="stop: expected a str or a sequence of str"):
            Target("gpt-mini", stop=5)

    def test_none_is_a_value(self):
        """It means that the parameter is not sent."""
        assert REQUEST.evolve(target=Target("gpt-mini", temperature=None)).temperature is None


class TestRepr:
    def test_it_reads_as_its_construction(self):
        """Parameters and drop are shown."""
        assert repr(Target("anthropic:claude-x")) == "Target('anthropic:claude-x')"
        assert repr(Target("gpt", temperature=0.1, drop=["seed"])) == "Target('gpt', temperature=0.1, drop=['seed'])"
        assert repr(Target(ECHO, model="other")) == "Target('echo:m', model='other')"
        assert repr(Target(Parrot(), model="m")) == "Target(Parrot, model='m')"

    def test_secrets_are_masked(self):
        """Neither keys nor headers are shown, by the target, its request or its stack."""
        config = LLMConfig(framework="echo", model="m", api_key="sk-1", headers={"x-one": "sk-2"})
        target = Target(config, extra={"api_key": "sk-3"}, headers={"x-two": "sk-4"})
        llm = LLM(ECHO, [Fallback(to=[target])])
        assert "sk-" not in repr((target, REQUEST.evolve(target=target), llm, llm.pipeline))


class TestToTargets:
    @pytest.mark.parametrize(
        "alone",
        ["gpt", ECHO, Target("gpt"), {"framework": "echo", "model": "m"}, Parrot(), Singer()],
        ids=["str", "config", "target", "table", "provider", "only streams"],
    )
    def test_one_stands_for_a_list_of_one(self, alone):
        """A str above all, whose characters are no targets."""
        (target,) = to_targets(alone)
        (same,) = to_targets([alone])
        assert repr(target) == repr(same)

    def test_all_forms_in_one_list(self):
        """Any iterable will do."""
        given = Target("gpt")
        found = to_targets(
            iter(["anthropic:claude-x", ECHO, given, {"framework": "echo", "model": "m", "top_p": "0.5"}])
        )
        assert found[2] is given
        assert [repr(each) for each in found] == [
            "Target('anthropic:claude-x')",
            "Target('echo:m')",
            "Target('gpt')",
            "Target('echo:m')",
        ]
        assert REQUEST.evolve(target=found[3]).top_p == 0.5

    @pytest.mark.parametrize("drop", ["seed", ["seed"], ("seed",)])
    def test_a_table_may_drop_parameters(self, drop):
        """`drop` is beside the settings of an LLMConfig."""
        (target,) = to_targets({"framework": "echo", "model": "m", "drop": drop})
        assert REQUEST.evolve(target=target).seed is None

    def test_all_problems_of_all_targets_are_in_one_error(self):
        """Each has its path, and keys are not shown."""
        with pytest.raises(ConfigError) as caught:
            to_targets(
                [
                    "openai:",
                    {"framework": "echo", "model": "m", "temperature": 3, "api_key": "sk-1", "drop": ["sed"]},
                    {"model": "m", "max_retries": 3, "middleware": ["retry"], "top_q": 1},
                    {"framework": "echo", "model": "m", "top_p": 1, "drop": "top_p"},
                    {"framework": "echo", "model": "m", "drop": {"seed": True}},
                    5,
                    Parrot,
                ]
            )
        none = "a target has none, because the stack of the call applies; leave it out"
        assert caught.value.problems == (
            "to[0]: expected \"framework:model\" or the name of a model, got 'openai:'",
            "to[1].drop: expected the names of parameters that are sent, got 'sed'; did you mean 'seed'?",
            "to[1].temperature: expected a number from 0 to 2, got 3",
            f"to[2].middleware: {none}",
            f"to[2].max_retries: {none}",
            "to[2].top_q: there is no such setting; did you mean 'top_p'?",
            "to[2].framework: is required",
            "to[3].top_p: expected a value, or the name in drop, got both",
            'to[4].drop: expected a list of parameters, like ["seed"], got a dict',
            'to[5]: expected "framework:model", the name of a model, an LLMConfig or a provider, got an int',
            "to[6]: a provider is an object; Parrot is a class: write Parrot()",
        )
        assert "sk-1" not in str(caught.value)

    def test_nothing(self):
        """A middleware without targets is a mistake."""
        with pytest.raises(ConfigError, match=r"^to: expected at least one target, got none"):
            to_targets([])

    @pytest.mark.parametrize("wrong", [None, 5, True])
    def test_no_list(self, wrong):
        """The error says what to give."""
        with pytest.raises(ConfigError, match=r"^others: expected a list of models, tables or Targets, got"):
            to_targets(wrong, "others")


class TestYAML:
    @pytest.fixture
    def write(self, tmp_path):
        def write(targets):
            file = tmp_path / "framework.yaml"
            file.write_text(f"llm:\n  framework: echo\n  model: m\n  middleware:\n    - fallback: {{to: {targets}}}\n")
            return file

        return write

    def test_targets_in_a_file(self, write, monkeypatch):
        """Names of models, and tables with settings, drop and a key from the environment."""
        monkeypatch.setenv("KEY", "sk-1")
        key = '"${KEY}"'
        llm = LLM.from_yaml(
            write(f"[gpt-4o-mini, {{framework: anthropic, model: x, api_key: {key}, top_p: 1, drop: [seed]}}]")
        )
        (fallback,) = llm.pipeline.middleware
        assert repr(fallback) == (
            "Fallback(to=(Target('gpt-4o-mini'), Target('anthropic:x', drop=['seed'])), when=None, on_interrupt='raise')"
        )
        assert fallback.to[1].config.fixed_key == "sk-1"
        assert "sk-1" not in repr((llm, llm.pipeline, fallback))

    def test_mistakes_in_a_file(self, write):
        """The path leads to the setting in the file."""
        with pytest.raises(ConfigError) as caught:
            LLM.from_yaml(write("[gpt, {framework: echo, model: m, temperature: 3, drop: [sed]}, {model: m}]"))
        path = "llm.middleware[0].fallback.to"
        assert caught.value.problems == (
            f"{path}[1].drop: expected the names of parameters that are sent, got 'sed'; did you mean 'seed'?",
            f"{path}[1].temperature: expected a number from 0 to 2, got 3",
            f"{path}[2].framework: is required",
        )

    def test_a_key_is_not_shown_with_a_mistake(self, write, monkeypatch):
        """Neither in the message nor in its causes."""
        monkeypatch.setenv("KEY", "sk-1")
        with pytest.raises(ConfigError) as caught:
            LLM.from_yaml(write('{framework: anthropic, model: x, api_key: "${KEY}", top_p: 3, headers: "${KEY}"}'))
        shown = "".join(traceback.format_exception(caught.value))
        assert "to[0].headers: expected a mapping" in shown
        assert "sk-1" not in shown


class TestToldEarly:
    """An `LLM` checks the targets of its middleware, so that an outage finds no mistake."""

    @pytest.mark.parametrize("kind", [LLM, AsyncLLM])
    def test_a_missing_key(self, kind):
        """The error names the layer, the target and the variable."""
        with pytest.raises(ConfigError) as caught:
            kind(ECHO, [Retry(), Fallback(to=["gpt", "anthropic:claude-x"])])
        assert str(caught.value) == (
            "Fallback.targets[1]: anthropic needs an API key: set ANTHROPIC_API_KEY, or set api_key in an LLMConfig"
        )

    def test_several_mistakes(self, monkeypatch):
        """One error lists those of all targets and of all layers, together with the configuration's own."""
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        unknown = LLMConfig(framework="antropic", model="m")
        quirk = LLMConfig(framework="anthropic", model="m", api_key="sk-1", quirks={"seed": "s"})
        with pytest.raises(FrameworkNotRegistered) as caught:
            LLM(
                LLMConfig(framework="opnai", model="m"),
                [Fallback(to=[unknown, "langchain:openai:gpt"]), Fallback(to=[quirk])],
            )
        starts = (
            "did you mean 'openai'?",
            "Fallback.targets[0]: did you mean 'anthropic'? LLM framework 'antropic' not registered.",
            "Fallback.targets[1]: the framework 'langchain' needs packages that are not installed: pip install",
            "Fallback.targets[0]: quirks: only OpenAI-compatible services take this setting",
        )
        assert len(caught.value.problems) == len(starts)
        for problem, start in zip(caught.value.problems, starts, strict=True):
            assert problem.startswith(start)

    def test_a_layer_that_is_a_function(self):
        """Its name is the function's."""

        def route(request, call_next):
            return (yield from call_next(request))

        route.targets = [Target("anthropic:claude-x")]
        with pytest.raises(ConfigError, match=r"^route\.targets\[0\]: anthropic needs an API key"):
            LLM(ECHO, [route])

    def test_with_a_key_nothing_is_made(self, monkeypatch):
        """The provider is made when it is first asked."""
        made = []

        class Model(Parrot):
            def __init__(self, config):
                made.append(config.model)
                super().__init__(config)

        register_llm_framework("mine", Model)
        monkeypatch.setattr("fluxibly.providers.anthropic.AnthropicProvider.__init__", lambda *_: made.append("claude"))
        monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-1")
        with LLM(ECHO, [Fallback(to=["anthropic:claude-x", "mine:m"])]):
            assert made == []

    @pytest.mark.parametrize(
        "config",
        [
            LLMConfig(framework="openai", model="m", api_base="http://127.0.0.1:8000/v1"),
            LLMConfig(framework="openai", model="m", headers={"Authorization": "Bearer t"}),
            LLMConfig(framework="anthropic", model="m", headers={"X-API-Key": "k"}),
            LLMConfig(framework="anthropic", model="m", api_key=lambda: "token"),
            LLMConfig(framework="bedrock", model="m", region="us-east-1"),
            LLMConfig(framework="ollama", model="m"),
        ],
        ids=lambda config: config.framework,
    )
    def test_a_configuration_that_needs_no_key(self, config):
        """A server of one's own, a header, a function, or credentials that a library finds are as good."""
        LLM(ECHO, [Fallback(to=[config])]).close()
        LLM(ECHO, [Fallback(to=[Target(LLMConfig(framework="azure", model="m"), headers={"api-key": "k"})])]).close()

    @pytest.mark.parametrize("config", [{}, {"headers": {"x-gateway": "k"}}, {"api_key": ""}], ids=str)
    def test_a_missing_key_is_told_if_the_provider_would_miss_it(self, config, monkeypatch, tmp_path):
        """For every framework, the check agrees with the provider itself."""
        monkeypatch.setenv("HOME", str(tmp_path))
        names = [each.name for each in frameworks().values() if each.env_var and not each.credentials]
        assert "anthropic" in names
        for name in names:
            given = LLMConfig(framework=name, model="m", **config)
            with pytest.raises((AuthenticationError, ConfigError)):  # Azure misses its address first
                make_provider(given, asynchronous=False)
            with pytest.raises(ConfigError, match=rf"^Fallback\.targets\[0\]: {name} needs an API key: set \w+, or"):
                LLM(ECHO, [Fallback(to=[given])])
            monkeypatch.setenv(frameworks()[name].env_var, "sk-1")
            LLM(ECHO, [Fallback(to=[given])]).close()
            monkeypatch.delenv(frameworks()[name].env_var)

    @pytest.mark.parametrize(
        "targets", [None, 5, "anthropic:claude-x", [5, None], iter([Target("anthropic:claude-x")])]
    )
    def test_an_attribute_of_another_meaning(self, targets):
        """A middleware of somebody else may have `targets` that are no Targets."""

        @attrs.frozen
        class Other:
            targets: object

            def __call__(self, request, call_next):
                return (yield from call_next(request))

        LLM(ECHO, [Other(targets)]).close()
