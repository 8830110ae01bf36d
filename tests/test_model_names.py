"""Names of models in one text, and models whose configuration is made of keywords."""

from __future__ import annotations

import inspect
from typing import Any

import attrs
import pytest
from support.typed_dicts import keys_of

from fluxibly import LLM, AsyncLLM, LLMConfig, Target, register_llm_framework
from fluxibly._model_names import read_model, split_model
from fluxibly.config import CONFIGURED
from fluxibly.errors import ConfigError, FrameworkNotRegistered
from fluxibly.middleware import Retry
from fluxibly.testing import ScriptedProvider


@pytest.fixture(autouse=True)
def _registries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxibly.registry._frameworks", {})


class TestNames:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("openai:gpt-4o-mini", ("openai", "gpt-4o-mini")),
            ("ollama:mistral:7b", ("ollama", "mistral:7b")),
            ("mistral:7b", ("mistral", "7b")),
            ("google:gemini-2.5-flash", ("gemini", "gemini-2.5-flash")),
            ("Azure OpenAI:gpt-4o", ("azure", "gpt-4o")),
            ("claude:claude-sonnet-4-5", ("anthropic", "claude-sonnet-4-5")),
            ("local:./models/tiny:q4.gguf", ("local", "./models/tiny:q4.gguf")),
            ("litellm:groq/llama-3", ("litellm", "groq/llama-3")),
            ("gpt-4o-mini", ("openai", "gpt-4o-mini")),
            ("o3-mini", ("openai", "o3-mini")),
            ("claude-sonnet-4-5", ("anthropic", "claude-sonnet-4-5")),
            ("gemini-2.5-pro", ("gemini", "gemini-2.5-pro")),
            ("mistral-large-latest", ("mistral", "mistral-large-latest")),
            ("deepseek-chat", ("deepseek", "deepseek-chat")),
            ("grok-4", ("xai", "grok-4")),
            (" openai: gpt-4o ", ("openai", "gpt-4o")),
            (" gpt-4o\n", ("openai", "gpt-4o")),
        ],
    )
    def test_a_text(self, text: str, expected: tuple[str, str]) -> None:
        """The text before the first colon is a framework, or a name that users have for it; a bare name is a vendor's."""
        assert read_model(text) == expected

    @pytest.mark.parametrize(
        ("text", "write"),
        [
            ("llama3.2", "write who serves it, like 'ollama:llama3.2' or 'openrouter:llama3.2'"),
            ("qwen:7b", "write who serves it, like 'ollama:qwen:7b'"),
            ("meta-llama/llama-3:free", "'openrouter:meta-llama/llama-3:free'"),
            ("echo", "'echo' is a framework: write 'echo:echo'"),
            ("anthropic:", "'anthropic' is a framework: write 'anthropic:MODEL'"),
            ("smollm2", "write 'local:smollm2'"),
            ("./tiny.gguf", "write 'local:./tiny.gguf' for a model of this file"),
            ("openai/gpt-4o", "write 'openai:gpt-4o', or who else serves it: 'openrouter:openai/gpt-4o'"),
            ("GPT-4o", "did you mean 'gpt-4o'?"),
            ("http://localhost:8000/v1", "got an address; write LLM('openai:MODEL', api_base='http…')"),
            ("", "got ''"),
            (":gpt", "got ':gpt'"),
        ],
    )
    def test_a_text_that_says_too_little(self, text: str, write: str) -> None:
        """There is no guess: the error says what to write."""
        with pytest.raises(ConfigError) as caught:
            LLM(text)
        assert write in str(caught.value)
        assert str(caught.value).startswith('expected "framework:model", like "openai:gpt-4o-mini", got ')

    def test_a_framework_that_is_misspelt(self) -> None:
        """A framework that is nearly right is suggested."""
        with pytest.raises(FrameworkNotRegistered, match="did you mean 'anthropic:claude-sonnet-4-5'"):
            LLM("antropic:claude-sonnet-4-5")

    def test_a_framework_of_the_users_own(self) -> None:
        """A registered name is a framework, too, and wins over another name for a service."""
        register_llm_framework("claude", lambda _: ScriptedProvider("mine"))
        assert read_model("claude:x") == ("claude", "x")
        assert LLM("claude:x").forward("hi") == "mine"

    def test_a_target(self) -> None:
        """In a target a bare name is a model of whoever is asked, even if a vendor is known by it."""
        assert split_model("claude-sonnet-4-5") == (None, "claude-sonnet-4-5")
        assert Target("claude-sonnet-4-5").config is None
        config = Target("google:gemini-2.5-pro").config
        assert config is not None
        assert (config.framework, config.model) == ("gemini", "gemini-2.5-pro")

    def test_a_model_is_never_split(self) -> None:
        """`model=` is the provider's own name for a model, whatever is in it."""
        llm = LLM(framework="echo", model="openai:gpt-4o")
        assert (llm.config.framework, llm.config.model) == ("echo", "openai:gpt-4o")
        assert llm.complete("hi", model="anthropic:x").model == "anthropic:x"


class TestSettings:
    @pytest.mark.parametrize("kind", [LLM, AsyncLLM])
    def test_the_three_ways(self, kind: Any) -> None:
        """A text and settings, settings alone, and a configuration make the same model."""
        made = [
            kind("echo:m", temperature=0.2, max_retries=1),
            kind(framework="echo", model="m", temperature=0.2, max_retries=1),
            kind(LLMConfig(framework="echo", model="m", temperature=0.2, max_retries=1)),
            kind(config=LLMConfig(framework="echo", model="m", temperature=0.2, max_retries=1)),
        ]
        assert len({repr(each) for each in made}) == 1
        assert all(each.config == made[0].config for each in made)
        assert kind("echo:m", [Retry()]).pipeline.middleware == (Retry(),)
        assert kind("echo:m", middleware=[Retry()], strict=True).pipeline.middleware == (Retry(),)

    @pytest.mark.parametrize(
        ("arguments", "settings", "message"),
        [
            ((), {}, 'LLM: expected a model; write LLM("openai:gpt-4o-mini"), '),
            ((), {"model": "m"}, "LLM: expected a framework for the model 'm'; write "),
            ((), {"framework": "echo"}, "LLM: expected a model for the framework 'echo'; write "),
            ((), {"temperature": 1}, "LLM: expected a model; write "),
            (("echo:m",), {"model": "n"}, "LLM: expected model in the text alone, got 'echo:m' and model='n'"),
            (("openai", "gpt-4o"), {}, "LLM: expected one text, like LLM('openai:gpt-4o'), got two"),
            (("echo:m", "logging"), {}, "middleware: expected a list, like [Logging(), Retry()], got a str"),
            (("echo:m",), {"stream": True}, "LLM has no setting 'stream'; call llm.stream(…)"),
            (
                (LLMConfig(framework="echo", model="m"),),
                {"system": "Be brief."},
                "LLM has no setting 'system'; write [Message.system(…), Message.user(…)] as the prompt, or llm.conversation(",
            ),
            ((), {"provider": "echo", "model": "m"}, "LLM has no setting 'provider'; write framework=\"…\""),
            (
                ("echo:m",),
                {"tools": []},
                "LLM has no setting 'tools'; a call takes it, like llm.complete(…, tools=[…]); or ",
            ),
            (("echo:m",), {"tool_choice": "auto"}, "LLM has no setting 'tool_choice'; a call takes it"),
            (("echo:m",), {"temprature": 1}, "LLMConfig has no 'temprature'; did you mean 'temperature'?"),
            (("echo:m",), {"base_url": "x"}, "LLMConfig has no 'base_url'; did you mean 'api_base'?"),
            (
                (LLMConfig(framework="echo", model="m"),),
                {"temperature": 1},
                "LLM: temperature belongs into the LLMConfig that is given: write LLMConfig(…, temperature=…), or ",
            ),
        ],
    )
    def test_what_is_no_model(self, arguments: Any, settings: Any, message: str) -> None:
        """Each TypeError says what to write."""
        with pytest.raises(TypeError) as caught:
            LLM(*arguments, **settings)
        assert str(caught.value).startswith(message)

    def test_an_address_is_in_no_message(self) -> None:
        """An address in place of a model may have a password in it."""
        with pytest.raises(ConfigError) as caught:
            LLM("https://me:s3cret@host/v1")
        assert "s3cret" not in str(caught.value)

    def test_a_function_is_no_tool_of_a_call(self) -> None:
        """The error says who takes functions."""
        with pytest.raises(
            TypeError, match=r"got a builtin_function_or_method; the middleware Tools\(\[…\]\) takes functions"
        ):
            LLM("echo:m").complete("hi", tools=[print])  # type: ignore[list-item]  # what is tested

    def test_a_key_is_in_no_message(self) -> None:
        """An error about settings never shows the key among them."""
        with pytest.raises(TypeError) as caught:
            LLM(api_key="sk-secret", temperature=0)
        assert "secret" not in str(caught.value)

    def test_all_settings_of_a_configuration(self) -> None:
        """Type checkers read `Settings`; `LLM` takes the fields of `LLMConfig`. Both have the same names."""
        assert keys_of("Settings") == {field.name for field in attrs.fields(LLMConfig)} - {"middleware"}


PARAMETERS: dict[str, Any] = {
    "temperature": 0.5,
    "max_tokens": 7,
    "top_p": 0.9,
    "top_k": 4,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.2,
    "stop": ["END", "."],
    "seed": 5,
    "n": 2,
    "response_format": {"type": "object"},
    "reasoning_effort": "low",
}


class TestParameters:
    def test_a_configuration_takes_what_calls_take(self) -> None:
        """A parameter of the configuration is part of each request; that of a call wins."""
        assert PARAMETERS.keys() == set(CONFIGURED)
        provider = ScriptedProvider(*["x"] * 3)
        register_llm_framework("scripted", lambda _: provider)
        llm = LLM("scripted:m", **PARAMETERS)
        llm.complete("hi")
        llm.complete("hi", stop=None, seed=6, response_format="json", top_k=None)
        sent, changed = provider.requests
        for name, value in PARAMETERS.items():
            assert getattr(sent, name) == (("END", ".") if name == "stop" else value)
        assert (changed.stop, changed.seed, changed.response_format, changed.top_k) == ((), 6, "json", None)
        assert Target(llm.config).adapt(sent).seed == 5

    def test_a_file(self) -> None:
        """The same in YAML and JSON; environment variables make texts of numbers."""
        config = LLMConfig.from_mapping(
            {"framework": "echo", "model": "m", "seed": "5", "n": "2", "top_k": "4", "stop": "END"}
        )
        assert (config.seed, config.n, config.top_k, config.stop) == (5, 2, 4, ("END",))

    def test_wrong_values(self) -> None:
        """One error lists them all."""
        with pytest.raises(ConfigError) as caught:
            LLM("echo:m", seed="x", n=0, top_k=1.5, stop=["a", 1], response_format="jsn", reasoning_effort=3)  # type: ignore[arg-type, list-item]  # what is tested
        assert [text.partition(":")[0] for text in caught.value.problems] == [
            "top_k", "seed", "n", "response_format", "reasoning_effort", "stop",
        ]  # fmt: skip

    def test_a_class_as_the_format(self) -> None:
        """A class is given as `into=`, and the error says so, for a call and for a configuration."""
        for call in (
            lambda: LLM("echo:m", response_format=dict),
            lambda: LLM("echo:m").complete("hi", response_format=dict),
        ):  # type: ignore[arg-type]  # what is tested
            with pytest.raises(ConfigError, match="got the class dict; a call takes it as into="):
                call()


def test_help_lists_the_keywords() -> None:
    """`help(LLM.complete)` has a line for each keyword of a call."""
    lines = str(inspect.getdoc(LLM.complete)).splitlines()
    listed = {
        name
        for line in lines
        if line.startswith("    ") and ": " in line
        for name in line.partition(":")[0].strip().split(", ")
    }
    assert {
        field for field in LLM("echo:m").request("hi", {}).__dict__ if field not in ("messages", "call", "target")
    } <= listed
    assert {"timeout", "into"} <= listed


@pytest.mark.parametrize(
    ("settings", "write"),
    [
        ({"max_completion_tokens": 5}, "write max_tokens=…"),
        ({"response_model": dict}, "write into=…, or llm.parse(prompt, Person)"),
        ({"api_key": "k"}, "set it in the configuration, like LLM(…, api_key=…)"),
        ({"quirks": {}}, "set it in the configuration, like LLM(…, quirks=…)"),
        ({"extra_body": {}}, "write extra={…}"),
        ({"messages": []}, "give the messages as the prompt, the first argument"),
        ({"temprature": 1}, "did you mean 'temperature'?; pass provider parameters in extra="),
    ],
    ids=str,
)
def test_keywords_of_other_clients(settings: Any, write: str) -> None:
    """A keyword that other clients have is refused with what to write instead."""
    with pytest.raises(TypeError) as caught:
        LLM("echo:m").complete("hi", **settings)
    assert write in str(caught.value)
