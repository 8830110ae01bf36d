"""The imports between modules, the modules that `import fluxibly` loads, and the names that it exports."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fluxibly

ROOT = Path(fluxibly.__file__).parent
MODULES = {
    ".".join(("fluxibly", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}

DATA = "data"
SIDE = "side"
ROOMS = {
    "_tokens types calls limits messages parts errors aggregate provider _checks _dicts _durations _extras _formats _inline_thinking _merging _parameters _roots _values _states": DATA,
    "_masking _logs _abandoned _loops _plugins _schemas _threads _yaml functions signals tools": SIDE,
    "config": "config",
    "target": "target",
    "_targets": "targets",
    "flow": "flow",
    "_drivers": "drivers",
    "telemetry": "telemetry",
    "middleware": "middleware",
    "stream": "stream",
    "pipeline": "pipeline",
    "registry _model_names _settings": "registry",
    "stores": "stores",
    "prices": "prices",
    "conversation": "conversation",
    "_mapping": "mapping",
    "llm _keywords": "llm",
    "batch": "batch",
    "explain": "explain",
    "testing": "testing",
    "sse": "sse",
    "serve": "serve",
    "cli __main__": "cli",
    "providers.services": "services",
    "providers.dialects": "dialects",
    "providers.http": "http",
    "providers._libraries": "libraries",
    "providers.local": "local",
    "providers.langchain": "langchain",
    "providers.litellm": "litellm",
    "providers.echo providers.anthropic providers.bedrock providers.cohere providers.gemini providers.ollama": "frameworks",
    "providers.openai providers.vertex providers.addresses": "frameworks",
}
"""The room of each module, or of all modules in a package."""
BESIDE = {"fluxibly", "fluxibly.providers"}
"""Packages that are not rooms, but only hold rooms."""
BASE = {DATA, SIDE}
ARROWS = {
    DATA: set[str](),
    SIDE: {DATA},
    "flow": {DATA},
    "config": BASE,
    "telemetry": {"flow", *BASE},
    "drivers": {"flow", *BASE},
    "middleware": {"flow", "telemetry", "stores", "prices", "target", *BASE},
    "stores": BASE,
    "prices": BASE,
    "services": {DATA},
    "dialects": {DATA},
    "http": {"dialects", "config", *BASE},
    "libraries": {"dialects", "config", *BASE},
    "local": {"dialects", "config", *BASE},
    "langchain": {"libraries", "dialects", "http", "config", *BASE},
    "litellm": {"libraries", "dialects", "http", "config", *BASE},
    "frameworks": {"services", "dialects", "http", "config", DATA},
    "stream": {"drivers", "flow", *BASE},
    "target": {"config", "registry", *BASE},
    "targets": {"target", "registry", *BASE},
    "explain": {"target", "registry", "services", "flow", "config", *BASE},
    "pipeline": {"stream", "drivers", "targets", "explain", "flow", *BASE},
    "registry": {"flow", "services", "config", *BASE},
    "conversation": {"pipeline", "stream", "drivers", *BASE},
    "mapping": {"flow", *BASE},
    "llm": {"mapping", "conversation", "pipeline", "stream", "registry", "explain", "target", "config", "flow", *BASE},
    "testing": {"pipeline", "stream", "flow", "drivers", "dialects", "middleware", *BASE},
    "sse": {"stream", "dialects", *BASE},
    "batch": {
        "llm",
        "pipeline",
        "registry",
        "middleware",
        "telemetry",
        "dialects",
        "http",
        "prices",
        "config",
        "flow",
        *BASE,
    },
    "serve": {"llm", "pipeline", "sse", "dialects", "flow", *BASE},
    "cli": set(ROOMS.values()),
}
"""The rooms that a room may import from, besides itself."""
PURE = {"dialects": {"anyio", "asyncio", "httpx", "socket", "ssl"}, "flow": {"anyio", "asyncio", "socket", "threading"}}
"""The packages that a room without I/O must not import."""


def imports(path: Path) -> Iterator[str]:
    """Yield every module that a file imports, including imports in functions and for type checkers only."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else str(node.module)


def room(module: str) -> str | None:
    """Return the room of a module of fluxibly, or None for a package that only holds rooms."""
    if module in BESIDE:
        return None
    name = module.removeprefix("fluxibly.")
    for places, found in ROOMS.items():
        if any(name == place or name.startswith(f"{place}.") for place in places.split()):
            return found
    raise AssertionError(f"{module}: expected a row in ROOMS, got none; add the module to a room")


def ours(path: Path) -> Iterator[str]:
    return (name for name in imports(path) if name.partition(".")[0] == "fluxibly")


def test_the_walk_finds_imports():
    """The walk finds imports at the top, in functions, and for type checkers only, so the tests below are not empty."""
    assert "fluxibly.errors" in set(imports(ROOT / "llm.py"))
    assert "fluxibly._yaml" in set(imports(ROOT / "registry.py"))
    assert "pathlib" in set(imports(ROOT / "llm.py"))
    assert len(MODULES) > 30


@pytest.mark.parametrize("module", sorted(set(MODULES) - BESIDE))
def test_arrows(module):
    """A module imports only from its own room and from the rooms that the table allows."""
    mine = room(module)
    others = {name: found for name in ours(MODULES[module]) if (found := room(name)) not in {None, mine}}
    wrong = {name for name, found in others.items() if found not in ARROWS[str(mine)]}
    assert not wrong, f"{module} (room {mine!r}) must not import {sorted(wrong)}"


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name not in BESIDE and room(name) in PURE))
def test_pure_rooms(module):
    """Rooms without I/O do not import packages that do I/O."""
    found = {name.partition(".")[0] for name in imports(MODULES[module])}
    assert not found & PURE[str(room(module))]


def test_every_row_is_used():
    """Every row of the table is for a module that exists."""
    used = {room(module) for module in MODULES} - {None}
    assert used == set(ROOMS.values()) == set(ARROWS)
    for place in " ".join(ROOMS).split():
        assert f"fluxibly.{place}" in MODULES


def test_no_circles():
    """Modules can be put in an order in which each imports only earlier modules, whatever the kind of import."""
    graph = {name: {to for to in ours(path) if to != name} - BESIDE for name, path in MODULES.items()}
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", sorted(MODULES))
def test_underscored_modules_are_private(module):
    """Within `providers`, only siblings import a module whose name begins with an underscore."""
    for name in ours(MODULES[module]):
        holder, _, leaf = name.rpartition(".")
        if leaf.startswith("_") and holder.startswith("fluxibly.providers."):
            assert module.startswith(holder), f"{module} must not import {name}"


HEAVY = "anyio botocore cattrs google httpcore httpx langchain_core litellm msgspec openai opentelemetry rich trio typer xllamacpp yaml"


@pytest.mark.parametrize("module", ["fluxibly", "fluxibly.middleware", "fluxibly.testing"])
def test_imports_little(module):
    """Import time is a feature: the import loads no HTTP client, YAML, converter or SDK."""
    code = f"import sys, {module}; print(*sorted(set('{HEAVY}'.split()) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


PUBLIC = [
    "Answer",
    "Audio",
    "Document",
    "LLM",
    "AsyncLLM",
    "LLMConfig",
    "register_llm_framework",
    "register_middleware",
    "register_function",
    "Pipeline",
    "AsyncPipeline",
    "Provider",
    "AsyncProvider",
    "Middleware",
    "Flow",
    "CallNext",
    "Request",
    "Response",
    "Chunk",
    "Restart",
    "Message",
    "ToolCall",
    "Usage",
    "StreamStats",
    "sleep",
    "perform",
    "race",
    "gather",
    "map_chunks",
    "FluxiblyError",
    "ProviderError",
    "StreamInterrupted",
    "Image",
    "Tool",
    "default_stack",
    "Target",
    "ask",
    "emit",
    "stop_when",
    "Signal",
    "tool",
]


class TestExports:
    def test_public_names(self):
        """`fluxibly` exports the names that are promised, and no others."""
        assert sorted(fluxibly.__all__) == sorted(PUBLIC)
        assert all(callable(getattr(fluxibly, name)) or name in {"CallNext", "Flow"} for name in PUBLIC)

    def test_completion_shows_the_public_names(self):
        """`dir` lists the public names and the modules that users need, before and after any of them is loaded."""
        code = "import fluxibly; print(*dir(fluxibly)); fluxibly.LLM; fluxibly.testing.modes; print(*dir(fluxibly))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        before, after = map(set, map(str.split, done.stdout.splitlines()))
        shown = {name for name in before if not name.startswith("__")}
        assert shown == {
            *PUBLIC,
            "batch",
            "errors",
            "flow",
            "middleware",
            "providers",
            "sse",
            "stores",
            "telemetry",
            "testing",
        }
        assert after == before
        assert "__version__" in before

    def test_a_module_needs_no_import_of_its_own(self):
        """`import fluxibly` alone makes `fluxibly.errors.NotFound` available; an unknown name is an AttributeError."""
        code = (
            "import fluxibly; print(fluxibly.errors.NotFound, fluxibly.config.Timeouts, hasattr(fluxibly, 'nothing'))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.split()[-1] == "False"

    def test_type_checkers_see_the_same_names(self):
        """The names imported for type checkers only equal the names that are looked up late, in the same modules."""
        tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
        typed = {
            (alias.name, node.module)
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            if str(node.module).startswith("fluxibly.")
        }
        assert typed == {(name, f"fluxibly.{module}") for name, module in fluxibly._MODULE_OF.items()}
        assert set(fluxibly._MODULE_OF) == set(fluxibly.__all__)

    @pytest.mark.parametrize(
        ("module", "names"),
        [
            ("fluxibly.llm", "LLM LLMConfig"),
            (
                "fluxibly.middleware",
                "Deadline Logging Timing Tracing Metrics Retry RetryBudget StreamMeter StreamTimeout Validation",
            ),
            (
                "fluxibly.testing",
                "ScriptedProvider AsyncScriptedProvider VirtualClock ByHand check_middleware check_provider check_codec",
            ),
            ("fluxibly.flow", "sleep perform map_chunks hold_back compose Flow CallNext Middleware"),
        ],
    )
    def test_modules_have_their_names(self, module, names):
        """Each module has its names, and a name that the package also has is the same object."""
        loaded = importlib.import_module(module)
        for name in names.split():
            assert getattr(loaded, name) is getattr(fluxibly, name, getattr(loaded, name))

    @pytest.mark.parametrize("module", ["fluxibly", "fluxibly.middleware", "fluxibly.testing"])
    def test_all_is_sorted_and_complete(self, module):
        """`__all__` lists names that exist, in the linter's order: constants, classes, functions."""
        loaded = importlib.import_module(module)
        assert len(set(loaded.__all__)) == len(loaded.__all__)
        assert all(hasattr(loaded, name) for name in loaded.__all__)
        assert [name for name in loaded.__all__ if name.islower()] == sorted(n for n in loaded.__all__ if n.islower())

    def test_it_is_typed(self):
        """The package has the marker file for type checkers."""
        assert (ROOT / "py.typed").exists()

    def test_an_unknown_name_of_testing(self):
        """An unknown name of a module with late look-ups is an AttributeError."""
        import fluxibly.testing

        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            fluxibly.testing.nothing  # noqa: B018  # the look-up raises
