"""The registration of frameworks and middleware by name."""

from __future__ import annotations

import pytest

from fluxibly import LLM, LLMConfig, Response, register_llm_framework, register_middleware
from fluxibly.errors import AuthenticationError, ConfigError, FrameworkNotRegistered
from fluxibly.middleware import Logging, Retry
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
    assert str(caught.value).startswith("LLM framework 'opnai' not registered. Available frameworks: [")
    assert "did you mean 'openai'" in str(caught.value)
    assert isinstance(caught.value, ValueError)


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
        if framework.env_var is None or not framework.installed:
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


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("retri", "did you mean 'retry'"),
        ({"retry": {"max_retrys": 1}}, "max_retrys"),
        ({"retry": {"max_retries": -1}}, "whole number"),
        ({"retry": 3}, "table of settings"),
        ({"retry": {}, "logging": {}}, "table of one name"),
        (3, "expected the name of a middleware or a table"),
        ({"os.system": {}}, "not registered"),
    ],
)
def test_bad_middleware_in_a_configuration(item, message):
    """Each wrong item is a ConfigError that names the item's place."""
    with pytest.raises(ConfigError, match=message) as caught:
        make_middleware([item])
    assert str(caught.value).startswith("middleware[0]")


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
    monkeypatch.setattr("fluxibly.registry._entry_points", points.__getitem__)
    config = LLMConfig(framework="theirs", model="m", middleware=[{"their_retry": {"max_retries": 1}}])
    assert LLM(config).forward("hi there") == "hi there"
    assert "theirs" in frameworks()
