"""The registration of frameworks and middleware by name."""

from __future__ import annotations

import attrs
import pytest

from fluxibly import LLM, AsyncLLM, LLMConfig, Response, register_llm_framework, register_middleware
from fluxibly.errors import AuthenticationError, ConfigError, FrameworkNotRegistered
from fluxibly.middleware import Logging, Retry
from fluxibly.providers.services import ALIASES, SERVICES
from fluxibly.registry import find_framework, frameworks, make_middleware


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    monkeypatch.setattr("fluxibly.registry._frameworks", {})
    monkeypatch.setattr("fluxibly.registry._middleware", {})


class Parrot:
    def __init__(self, config):
        self.config = config

    def complete(self, request):
        return request.messages[-1].text


def test_a_registered_class_is_made_with_the_configuration():
    """A registered class is called with the LLMConfig."""
    register_llm_framework("parrot", Parrot)
    with LLM(LLMConfig(framework="parrot", model="m")) as llm:
        assert llm.forward("Hello") == "Hello"
        assert llm.pipeline.provider.config is llm.config


def test_any_callable_can_be_registered():
    """A function that returns a provider may be registered instead of a class."""
    register_llm_framework("made", lambda config: Parrot(config))  # noqa: PLW0108  # a function, not a class
    assert LLM(LLMConfig(framework="made", model="m")).forward("x") == "x"


def test_an_unknown_framework_names_the_known_and_the_nearest():
    """The error has the wording of the contract, with a suggestion."""
    with pytest.raises(FrameworkNotRegistered) as caught:
        LLM(LLMConfig(framework="opnai", model="m"))
    assert str(caught.value).startswith(
        "did you mean 'openai'? LLM framework 'opnai' not registered. Available frameworks: ['anthropic', "
    )
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *dict.fromkeys(("google", "googleai", "Google-GenAI", "gogle"), "gemini").items(),
        *dict.fromkeys(("claude", "antropic", "cluade"), "anthropic").items(),
        *dict.fromkeys(("gpt", "chatgpt", "chatgtp", "OpenAI", "open-ai"), "openai").items(),
        *dict.fromkeys(("azure-openai", "azure_openai", "azur"), "azure").items(),
        *dict.fromkeys(("llama.cpp", "llama-cpp"), "llamacpp").items(),
        *dict.fromkeys(("z.ai", "glm"), "zai").items(),
        *dict.fromkeys(("grok", "x.ai"), "xai").items(),
        ("hf", "huggingface"),
        ("hugging-face", "huggingface"),
        ("togetherai", "together"),
        ("mistralai", "mistral"),
        ("kimi", "moonshot"),
        ("lm-studio", "lmstudio"),
        ("open-router", "openrouter"),
        ("ollama_generate", "ollama-generate"),
        ("groc", "groq"),
        *dict.fromkeys(("aws", "amazon-bedrock"), "bedrock").items(),
        *dict.fromkeys(("vertexai", "vertex_ai"), "vertex").items(),
        ("qwen", "dashscope"),
    ],
)
def test_another_name_of_a_service_finds_it(name, meant):
    """Users call a service by its company, its models or its package; the spelling alone would mislead."""
    with pytest.raises(FrameworkNotRegistered) as caught:
        find_framework(name)
    assert str(caught.value).startswith(f"did you mean '{meant}'? LLM framework '{name}' not registered. ")


@pytest.mark.parametrize("name", ["replicate", "watsonx", "databricks", "tgi", "xinference", ""])
def test_another_service_is_not_suggested(name):
    """A name that is near by its letters only would send the key to another service."""
    with pytest.raises(FrameworkNotRegistered) as caught:
        find_framework(name)
    assert str(caught.value).startswith(f"LLM framework '{name}' not registered.")


def test_each_alias_leads_somewhere():
    """An alias points to a framework, and is none itself."""
    for alias, name in ALIASES.items():
        assert name in frameworks(), alias
        assert alias not in frameworks()


def test_a_name_in_use_is_refused_unless_replaced():
    """A name in use is refused, even if it is built in; `replace=True` replaces it."""
    register_llm_framework("mine", Parrot)

    class Other(Parrot):
        pass

    with pytest.raises(ValueError, match="registered already"):
        register_llm_framework("mine", Other)
    with pytest.raises(ValueError, match="registered already"):
        register_llm_framework("openai", Parrot)
    register_llm_framework("mine", Other, replace=True)
    assert find_framework("mine").sync is Other


def test_the_same_class_defined_again_may_register_again():
    """A class that is defined again may be registered again, as when a notebook cell runs twice."""

    def define():
        class Cell:
            def complete(self, request):
                return Response("x")

        return Cell

    register_llm_framework("cell", define())
    again = define()
    register_llm_framework("cell", again)
    assert find_framework("cell").sync is again


@pytest.mark.parametrize("name", ["", "  ", None])
def test_an_empty_name_is_refused(name):
    """An empty name is refused for frameworks and for middleware."""
    with pytest.raises(ValueError, match="name: expected a non-empty str"):
        register_llm_framework(name, Parrot)
    with pytest.raises(ValueError, match="name: expected a non-empty str"):
        register_middleware(name, Logging)


def test_what_cannot_be_called_is_refused():
    """An object that cannot be called is refused instead of a class."""
    with pytest.raises(TypeError, match="expected a class or another callable"):
        register_llm_framework("x", 3)


def test_a_missing_extra_names_the_install_command(monkeypatch):
    """The error for a missing extra names the install command, before anything is imported."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'litellm\[mcp\]'"):
        LLM(LLMConfig(framework="litellm", model="m"))


def test_the_listed_keys_are_those_of_the_providers(monkeypatch):
    """The environment variable that a framework is listed with is the variable that its provider reads."""
    for framework in frameworks().values():
        row = SERVICES.get(framework.name)
        if framework.env_var is None or not framework.installed or (row is not None and row.key_by_call):
            continue
        if framework.files:  # a cloud, whose credentials may come from elsewhere
            continue
        monkeypatch.delenv(framework.env_var, raising=False)
        with pytest.raises(AuthenticationError, match=framework.env_var):
            framework.factory(asynchronous=False)(
                LLMConfig(framework=framework.name, model="m", api_base="https://api.openai.com/v1")
            )


def test_every_built_in_framework_has_its_classes():
    """Every installed framework has the sync and async classes that the table names."""
    for framework in frameworks().values():
        if framework.installed:
            assert callable(framework.factory(asynchronous=False))
            assert callable(framework.factory(asynchronous=True))


def test_middleware_by_name_with_settings():
    """A stack may hold names, tables with a single name, and objects."""
    layer = Retry(max_retries=1)
    stack = make_middleware(["logging", {"retry": {"max_retries": 5}}, {"timing": None}, layer])
    assert isinstance(stack[0], Logging)
    assert stack[1] == Retry(max_retries=5)
    assert stack[3] is layer


@attrs.frozen(kw_only=True)
class Picky:
    """A middleware with validators of attrs, a setting without a default, and one that depends on another."""

    limit: int = attrs.field(validator=[attrs.validators.instance_of(int), attrs.validators.ge(0)])
    most: int = attrs.field(default=9, converter=int, validator=attrs.validators.le(10))
    least: int = attrs.field(default=0)

    @least.validator
    def _below_most(self, attribute, value):
        if value > self.most:
            raise ValueError("least: expected at most `most`")

    def __call__(self, request, call_next):
        return (yield from call_next(request))


def opens_a_file(path):
    raise FileNotFoundError(2, "No such file or directory", path)


def with_targets(*, to):
    raise ConfigError.of(["to[0].model: is required", "to[1].framework: is required"])


@pytest.mark.parametrize(
    ("item", "problems"),
    [
        (
            "retri",
            [
                "0]: middleware 'retri' not registered; did you mean 'retry'? Available middleware: ['balance', 'budget', 'cache', "
            ],
        ),
        ({"os.system": {}}, ["0]: middleware 'os.system' not registered. Available middleware: "]),
        ({"retry": {"max_retrys": 1}}, ["0].retry.max_retrys: there is no such setting; did you mean 'max_retries'?"]),
        ({"retry": {"max_retries": -1}}, ["0].retry.max_retries: expected a whole number from 0 up, got -1"]),
        ({"retry": 3}, ["0].retry: expected a table of settings, e.g. - retry: {max_retries: 3}"]),
        ({"deadline": 30}, ["0].deadline: expected a table of settings, e.g. - deadline: {seconds: 30}"]),
        ({"fallback": ["m-2"]}, ["0].fallback: expected a table of settings, e.g. - fallback: {to: …}"]),
        ({"stream_meter": True}, ["0].stream_meter: expected a table of settings, e.g. - stream_meter: {}"]),
        ({"retry": {}, "logging": {}}, ["0]: expected a table of one name"]),
        (3, ["0]: expected the name of a middleware or a table of one name, got an int"]),
        (
            {"retry": {"max_retry": 1, "max_delay": "x", "base_delay": -1, True: 1}},
            [
                "0].retry.max_retry: there is no such setting; did you mean 'max_retries'?",
                "0].retry.True: expected the name of a setting, got a bool",
                "0].retry.base_delay: expected a number from 0 up, got -1",
                "0].retry.max_delay: expected a number from 0 up, got 'x'",
            ],
        ),
        (
            {"picky": {"limt": 3, "most": 11}},
            [
                "0].picky.limt: there is no such setting; did you mean 'limit'?",
                "0].picky.limit: is required",
                "0].picky.most: 'most' must be <= 10: 11",
            ],
        ),
        (
            {"picky": {"limit": "3", "most": "many"}},
            [
                "0].picky.limit: 'limit' must be <class 'int'> (got '3' that is a <class 'str'>).",
                "0].picky.most: invalid literal for int() with base 10: 'many'",
            ],
        ),
        ({"picky": {"limit": 1, "least": 10}}, ["0].picky.least: expected at most `most`"]),
        ({"file": {"path": "x"}}, ["0].file: FileNotFoundError: [Errno 2] No such file or directory: 'x'"]),
        (
            {"targets": {"to": []}},
            ["0].targets.to[0].model: is required", "0].targets.to[1].framework: is required"],
        ),
        ("targets", ["0].targets.to: is required"]),
    ],
)
def test_bad_middleware_in_a_configuration(item, problems):
    """Each wrong item is a ConfigError that lists all that is wrong with it, each with its path."""
    for name, factory in (("picky", Picky), ("file", opens_a_file), ("targets", with_targets)):
        register_middleware(name, factory)
    with pytest.raises(ConfigError) as caught:
        make_middleware([item])
    assert len(caught.value.problems) == len(problems)
    for found, problem in zip(caught.value.problems, problems, strict=True):
        assert found.startswith(f"middleware[{problem}")


def test_all_that_is_wrong_with_a_stack_is_told_at_once():
    """One error lists the framework and every middleware. It is a FrameworkNotRegistered, and a ConfigError."""
    config = LLMConfig(framework="opnai", model="m", middleware=["loging", "retry", {"retry": {"max_retry": 1}}, 3])
    for make in (LLM, AsyncLLM):
        with pytest.raises(ConfigError) as caught:
            make(config)
        assert isinstance(caught.value, FrameworkNotRegistered)
        framework, *others = caught.value.problems
        assert framework.startswith("did you mean 'openai'? LLM framework 'opnai' not registered.")
        assert others[0].startswith(
            "middleware[0]: middleware 'loging' not registered; did you mean 'logging'? Available"
        )
        assert others[1:] == [
            "middleware[2].retry.max_retry: there is no such setting; did you mean 'max_retries'?",
            "middleware[3]: expected the name of a middleware or a table of one name, got an int",
        ]


def test_the_cause_is_chained():
    """A factory's own error says where it was raised."""
    register_middleware("file", opens_a_file)
    with pytest.raises(ConfigError) as caught:
        LLM(LLMConfig(framework="echo", model="m", middleware=["logging", {"file": {"path": "x"}}]))
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_registered_middleware_function_is_used_as_it_is():
    """A generator function is the middleware itself, not a factory."""

    def shout(request, call_next):
        response = yield from call_next(request)
        return response.evolve(text=response.text.upper())

    register_middleware("shout", shout)
    register_llm_framework("parrot", Parrot)
    config = LLMConfig(framework="parrot", model="m", middleware=["shout"])
    assert LLM(config).forward("hi") == "HI"


def test_entry_points_are_found(monkeypatch):
    """The frameworks and middleware of other packages are found without importing the packages first."""
    from importlib.metadata import EntryPoint

    points = {
        "frameworks": {"theirs": EntryPoint("theirs", "fluxibly.providers.echo:EchoProvider", "fluxibly.frameworks")},
        "middleware": {"their_retry": EntryPoint("their_retry", "fluxibly.middleware:Retry", "fluxibly.middleware")},
    }
    monkeypatch.setattr("fluxibly.registry.entry_points", points.__getitem__)
    config = LLMConfig(framework="theirs", model="m", middleware=[{"their_retry": {"max_retries": 1}}])
    assert LLM(config).forward("hi there") == "hi there"
    assert "theirs" in frameworks()
