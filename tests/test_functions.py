"""Functions by name: registered, of other packages, and in configurations."""

from __future__ import annotations

import sys
from functools import partial

import pytest
from support.packages import install

from fluxibly import LLM, LLMConfig, register_function
from fluxibly._plugins import entry_points
from fluxibly.errors import ConfigError
from fluxibly.functions import find_function
from fluxibly.registry import Plugin, make_middleware, plugins

FUNCTIONS = "fluxibly.functions"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder of the path to install packages into, and no functions."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("fluxibly.functions._functions", {})
    entry_points.cache_clear()
    yield tmp_path
    entry_points.cache_clear()
    sys.modules.pop("acme", None)


def words(request):
    return 2 * len(request.messages[0].text.split())


def limit_of(settings):
    ((limit,),) = [make_middleware([{"rate_limit": settings}])]
    return limit


class TestRegister:
    def test_a_name_stands_for_the_function(self):
        """`register_function` returns the function, so that it can be used as an expression."""
        assert register_function("words", words) is words
        assert find_function("words") is words

    @pytest.mark.parametrize("name", ["", "  ", 3, None])
    def test_a_bad_name(self, name):
        """A name is a non-empty str."""
        with pytest.raises(ValueError, match="function name: expected a non-empty str, got"):
            register_function(name, words)

    def test_no_function(self):
        """What is registered can be called."""
        with pytest.raises(TypeError, match="the function 'words': expected a class or another callable, got an int"):
            register_function("words", 3)

    def test_a_name_that_is_in_use(self):
        """Another function takes a name over only with `replace`; a new definition of the same function always does."""
        register_function("words", words)
        with pytest.raises(ValueError, match="the function 'words' is registered already; pass replace=True"):
            register_function("words", len)
        assert find_function("words") is words
        register_function("words", len, replace=True)
        assert find_function("words") is len

        def make():
            def again(request):
                return 1

            return again

        register_function("again", make())
        second = register_function("again", make())
        assert find_function("again") is second

    def test_the_name_of_a_package(self, folder):
        """A package's name is in use, too."""
        install(folder, "acme", "words = acme:words", group=FUNCTIONS, code="def words(request): return 7")
        with pytest.raises(ValueError, match="the function 'words' is registered already"):
            register_function("words", words)
        register_function("words", words, replace=True)
        assert find_function("words") is words


class TestInConfigurations:
    def test_a_registered_function(self):
        """A setting that takes a function takes the name of one."""
        register_function("words", words)
        limit = limit_of({"tokens": 100, "estimate": "words", "by": "words"})
        assert limit.estimate is limit.by is words

    def test_words_that_are_no_names(self):
        """`by` has words of its own, which no function is looked up for."""
        assert limit_of({"requests": 1, "by": "provider"}).by == "provider"

    def test_a_function_of_a_package(self, folder):
        """It is imported when a configuration names it."""
        install(folder, "acme", "words = acme:words", group=FUNCTIONS, code="def words(request): return 7")
        assert Plugin("words", "ready", "acme 1.0") in plugins("functions")
        sys.modules.pop("acme", None)
        config = LLMConfig(
            framework="echo", model="m", middleware=[{"rate_limit": {"tokens": 100, "estimate": "words"}}]
        )
        with LLM(config) as llm:
            assert llm.pipeline.middleware[0].estimate("hi") == 7
            assert llm.forward("hi") == "hi"

    def test_a_broken_package(self, folder):
        """The error names the setting, the entry point and the package."""
        install(folder, "acme", "words = acme:words", group=FUNCTIONS, code="import a_module_that_is_gone")
        with pytest.raises(ConfigError) as caught:
            limit_of({"tokens": 100, "estimate": "words"})
        assert str(caught.value).startswith(
            "middleware[0].rate_limit.estimate: function 'words': the entry point 'acme:words' of acme 1.0 cannot be imported"
        )

    def test_an_unknown_name(self):
        """The error names the nearest function that is registered."""
        register_function("words", words)
        with pytest.raises(ConfigError) as caught:
            limit_of({"tokens": 100, "estimate": "word", "by": "elsewhere"})
        path, known = "middleware[0].rate_limit", "Registered functions: ['words']"
        advice = "write register_function('elsewhere', function) before the configuration is read."
        assert [*caught.value.problems] == [
            f"{path}.estimate: function 'word' not registered; did you mean 'words'? {known}",
            f"{path}.by: function 'elsewhere' not registered; {advice} {known}",
        ]

    @pytest.mark.parametrize("path", ["os.system", "os:system", "builtins.eval", "acme:words"])
    def test_a_path_is_no_name(self, path):
        """A configuration never imports code by its path."""
        with pytest.raises(ConfigError, match="not registered"):
            limit_of({"tokens": 100, "estimate": path})

    def test_an_async_function(self):
        """A function that returns its value later would be taken for true."""

        async def later(request):
            return 1

        register_function("later", later)
        register_function("part", partial(later))
        register_function("words", lambda request: (yield 1))
        for name, kind in (("later", "an async"), ("part", "an async"), ("words", "a generator")):
            with pytest.raises(
                ConfigError, match=f"estimate: expected a plain function, got {kind} function; write def"
            ):
                limit_of({"tokens": 100, "estimate": name})
