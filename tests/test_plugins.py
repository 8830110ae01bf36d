"""Frameworks and middleware of other packages: found by their entry points, and harmless if they are broken."""

from __future__ import annotations

import asyncio
import sys

import pytest
from support.packages import MIDDLEWARE, install

from fluxibly import LLM, AsyncLLM, LLMConfig, register_llm_framework
from fluxibly._plugins import entry_points
from fluxibly.errors import ConfigError, FrameworkNotRegistered
from fluxibly.registry import Plugin, find_framework, frameworks, make_middleware, plugins

WORKS = "class Provider:\n    def __init__(self, config): pass\n    def complete(self, request): return 'from acme'\n"
SHOUT = (
    "def shout(request, call_next):\n"
    "    response = yield from call_next(request)\n"
    "    return response.evolve(text=response.text.upper())\n"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of the path to install packages into."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("fluxibly.registry._frameworks", {})
    entry_points.cache_clear()
    yield tmp_path
    entry_points.cache_clear()
    for name in set(sys.modules) - before:
        if name.startswith("acme"):
            del sys.modules[name]


def config(framework="acme", **settings):
    return LLMConfig(framework=framework, model="m", **settings)


def state_of(name, kind="frameworks"):
    return [(each.state, each.note) for each in plugins(kind) if each.name == name]


def test_a_framework_of_another_package(folder):
    """It is found by its name, in both modes, and imported at its first use."""
    install(folder, "acme", "acme = acme:Provider", code=WORKS)
    assert frameworks()["acme"].installed
    assert "acme" not in sys.modules
    assert LLM(config()).forward("hi") == "from acme"
    assert asyncio.run(AsyncLLM(config()).forward("hi")) == "from acme"
    assert Plugin("acme", "ready", "acme 1.0") in plugins("frameworks")
    with pytest.raises(ValueError, match="'acme' is registered already"):
        register_llm_framework("acme", lambda config: None)


def test_a_middleware_of_another_package(folder):
    """A generator function is the middleware itself."""
    install(folder, "acme", "shout = acme:shout", group=MIDDLEWARE, code=SHOUT)
    assert LLM(config("echo", middleware=["shout"])).forward("hi") == "HI"
    assert Plugin("shout", "ready", "acme 1.0") in plugins("middleware")


BROKEN = [
    (
        "import a_dependency_that_is_gone",
        "cannot be imported: ModuleNotFoundError: No module named 'a_dependency_that_",
    ),
    ("", "cannot be imported: AttributeError: module 'acme' has no attribute 'it'"),
    ("1 +", "cannot be imported: SyntaxError: invalid syntax (acme.py, line 1)"),
    ("raise RuntimeError('two\\nlines')", "cannot be imported: RuntimeError: two lines"),
    ("import sys; sys.exit(3)", "cannot be imported: SystemExit: 3"),
    ("class Panic(BaseException): pass\nraise Panic", "cannot be imported: Panic"),
    ("it = 3", "expected a class or another callable, got an int"),
]


@pytest.mark.parametrize(("code", "says"), BROKEN, ids=lambda value: value[:20])
def test_a_broken_framework(folder, code, says):
    """Its use names the plugin, the entry point and the package; everything else works."""
    install(folder, "acme", "acme = acme:it", code=code)
    for make in (LLM, AsyncLLM):
        with pytest.raises(ConfigError) as caught:
            make(config())
        assert str(caught.value).startswith(
            f"framework 'acme': the entry point 'acme:it' of acme 1.0{says_after(says)}"
        )
        assert not isinstance(caught.value, FrameworkNotRegistered)
        assert "\n" not in str(caught.value)
        assert (caught.value.__cause__ is None) is (code == "it = 3")
    ((state, note),) = state_of("acme")
    assert state == "broken"
    assert note == str(caught.value)
    assert "acme" in frameworks()
    assert LLM(config("echo")).forward("hi") == "hi"
    with pytest.raises(FrameworkNotRegistered, match=r"Available frameworks: \['acme', "):
        find_framework("nowhere")


def says_after(says):
    return f": {says}" if says.startswith("expected") else f" {says}"


@pytest.mark.parametrize(("code", "says"), BROKEN, ids=lambda value: value[:20])
def test_a_broken_middleware(folder, code, says):
    """Its use names its place too, beside what else is wrong; without it, everything works."""
    install(folder, "acme", "shout = acme:it", group=MIDDLEWARE, code=code)
    with pytest.raises(ConfigError) as caught:
        make_middleware(["logging", "shout", "loging"])
    assert caught.value.problems[0].startswith(
        f"middleware[1]: middleware 'shout': the entry point 'acme:it' of acme 1.0{says_after(says)}"
    )
    assert caught.value.problems[1].startswith("middleware[2]: middleware 'loging' not registered")
    assert (caught.value.__cause__ is None) is (code == "it = 3")
    assert [state for state, _ in state_of("shout", "middleware")] == ["broken"]
    assert len(make_middleware(["logging", "retry"])) == 2


def test_ctrl_c_passes(folder):
    """A Ctrl-C while a plugin is imported is no fault of the plugin."""
    install(folder, "acme", "acme = acme:it", code="raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        LLM(config())


def test_a_broken_plugin_in_yaml(folder):
    """It is one problem among the others, with its path."""
    install(folder, "acme", "acme = acme:it")
    path = folder / "config.yaml"
    path.write_text("llm: {framework: acme, model: m, top_p: 3}")
    with pytest.raises(ConfigError) as caught:
        LLM.from_yaml(path)
    wrong, broken = caught.value.problems
    assert wrong == "llm.top_p: expected a number from 0 to 1, got 3"
    assert broken.startswith(
        "llm.framework: framework 'acme': the entry point 'acme:it' of acme 1.0 cannot be imported"
    )


def test_two_packages_with_one_name(folder):
    """The first by its package's name is used, wherever each stands on the path; the other is named."""
    install(folder, "acme_two", "acme = acme_two:Provider", code=WORKS.replace("from acme", "from two"))
    install(folder, "acme_one", "acme = acme_one:Provider", code=WORKS.replace("from acme", "from one"))
    assert LLM(config()).forward("hi") == "from one"
    assert state_of("acme") == [
        ("ready", "acme_one 1.0"),
        ("not used", "acme_two 1.0: acme_one 1.0 has this name too, and is used"),
    ]


def test_a_name_that_is_built_in(folder):
    """The library's own framework or middleware is used, and the plugin is not even imported."""
    install(folder, "acme", "echo = acme:Provider", code="raise RuntimeError")
    install(folder, "acme_more", "retry = acme_more:it", group=MIDDLEWARE, code="raise RuntimeError")
    assert LLM(config("echo", middleware=["retry"])).forward("hi") == "hi"
    assert state_of("echo") == [("not used", "acme 1.0: fluxibly's own framework has this name")]
    assert state_of("retry", "middleware") == [("not used", "acme_more 1.0: fluxibly's own middleware has this name")]


@pytest.mark.parametrize(
    ("points", "metadata"), [("no equals sign", None), ("acme = acme:it", ""), ("acme = acme:it", "Version: x")]
)
def test_a_package_whose_metadata_cannot_be_read(folder, points, metadata):
    """It hides no other package."""
    install(folder, "acme_broken", points, metadata=metadata)
    install(folder, "acme", "mine = acme:Provider", code=WORKS)
    assert LLM(config("mine")).forward("hi") == "from acme"
    assert ("ready", "acme 1.0") in state_of("mine")
