"""Which way data flows: who imports whom, what `import fluxibly` brings, and what is exported."""

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
DATA = {"types", "errors", "messages", "call_record", "guards"}
OUTSIDE = {"cli", "llm", "registry", "testing", "middleware", "providers"}
DRIVERS = {"pipeline", "stream", "drivers", "sync_driver", "async_driver", "driving", "provider", "threaded"}


def imports(path: Path, *, late: bool = True) -> Iterator[str]:
    """The modules of ours that a file imports, for type checkers alone left out; `late`: in functions too."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                yield from walk(ast.Module(child.orelse, []))
            elif late or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield child
                yield from walk(child)

    for node in walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("fluxibly"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fluxibly"):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else str(node.module)


def part(module: str) -> str:
    """The part of the package that a module belongs to: its first name, `cli` for all of the command line's."""
    name = module.removeprefix("fluxibly").removeprefix(".").partition(".")[0]
    return "cli" if name.startswith("cli") else name


def test_the_walk_finds_imports():
    """The tests below look at something."""
    assert "fluxibly.errors" in set(imports(ROOT / "pipeline.py")) | set(imports(ROOT / "driving.py"))
    assert "fluxibly.threaded" in set(imports(ROOT / "pipeline.py"))
    assert "fluxibly.threaded" not in set(imports(ROOT / "pipeline.py", late=False))
    assert len(MODULES) > 30


@pytest.mark.parametrize("module", sorted(MODULES))
def test_arrows(module):
    """Data knows nobody; middleware know flows and data; providers know no middleware; nobody knows who is outside."""
    found = {part(name) for name in imports(MODULES[module])} - {""}
    mine = part(module)
    if mine in DATA:
        assert found <= DATA
    elif mine == "middleware":
        assert not found & ((OUTSIDE | DRIVERS) - {"middleware"})
    elif mine == "providers":
        assert not found & (
            (OUTSIDE | DRIVERS | {"flow", "combinators", "relay"}) - {"providers", "threaded", "provider"}
        )
    elif mine not in OUTSIDE | {""}:
        assert not found & OUTSIDE - ({"registry"} if mine == "registry" else set())


def test_no_circles():
    """Modules can be imported in an order, by what each imports at its top."""
    graph = {name: {to for to in imports(path, late=False) if to != name} for name, path in MODULES.items()}
    graph["fluxibly"] = set()  # every module imports its package first, which is not what is looked at
    for wanted in graph.values():
        wanted.discard("fluxibly")
    assert list(TopologicalSorter(graph).static_order())


HEAVY = "aiohttp anyio cattrs httpcore httpx langchain_core litellm msgspec openai opentelemetry rich trio typer xllamacpp yaml"


@pytest.mark.parametrize("module", ["fluxibly", "fluxibly.middleware", "fluxibly.testing"])
def test_imports_little(module):
    """Import time is a feature: no HTTP client, YAML, converter or SDK comes with it."""
    code = f"import sys, {module}; print(*sorted(set('{HEAVY}'.split()) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


PUBLIC = [
    "LLM",
    "AsyncLLM",
    "LLMConfig",
    "register_llm_framework",
    "register_middleware",
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
    "map_chunks",
    "FluxiblyError",
    "ProviderError",
    "StreamInterrupted",
]


class TestExports:
    def test_public_names(self):
        """`from fluxibly import …` gives what is promised, and nothing else."""
        assert sorted(fluxibly.__all__) == sorted(PUBLIC)

    @pytest.mark.parametrize(
        ("module", "names"),
        [
            ("fluxibly.llm", "LLM LLMConfig"),
            ("fluxibly.middleware", "Logging Timing Tracing Metrics Retry Validation StreamMeter"),
            (
                "fluxibly.testing",
                "ScriptedProvider AsyncScriptedProvider VirtualClock ByHand check_middleware check_provider check_codec",
            ),
            ("fluxibly.flow", "sleep perform map_chunks hold_back compose Flow CallNext Middleware"),
        ],
    )
    def test_modules_have_their_names(self, module, names):
        """Each is there, and is the same object as the package's, where that has it."""
        loaded = importlib.import_module(module)
        for name in names.split():
            assert getattr(loaded, name) is getattr(fluxibly, name, getattr(loaded, name))

    @pytest.mark.parametrize("module", ["fluxibly", "fluxibly.middleware", "fluxibly.testing"])
    def test_all_is_sorted_and_true(self, module):
        """`__all__` lists what is there, in the linter's order: constants, classes, functions."""
        loaded = importlib.import_module(module)
        assert len(set(loaded.__all__)) == len(loaded.__all__)
        assert all(hasattr(loaded, name) for name in loaded.__all__)
        assert [name for name in loaded.__all__ if name.islower()] == sorted(n for n in loaded.__all__ if n.islower())

    def test_it_is_typed(self):
        """Type checkers are told so."""
        assert (ROOT / "py.typed").exists()

    def test_an_unknown_name_of_testing(self):
        """Names that are looked up late fail as others do."""
        import fluxibly.testing

        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            fluxibly.testing.nothing
