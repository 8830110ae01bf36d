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

DATA = "data"
SIDE = "side"
ROOMS = {
    "types messages errors aggregate provider _checks": DATA,
    "_masking _logs _abandoned _schema _yaml": SIDE,
    "config": "config",
    "flow": "flow",
    "_drivers": "drivers",
    "telemetry": "telemetry",
    "middleware": "middleware",
    "stream": "stream",
    "pipeline": "pipeline",
    "registry": "registry",
    "llm": "llm",
    "testing": "testing",
    "cli": "cli",
    "providers.services": "services",
    "providers.dialects": "dialects",
    "providers.http": "http",
    "providers._libraries": "libraries",
    "providers.local": "local",
    "providers.langchain": "langchain",
    "providers.litellm": "litellm",
    "providers.echo providers.anthropic providers.gemini providers.ollama providers.openai": "frameworks",
}
"""The room of each module, or of all that is in a package."""
BESIDE = {"fluxibly", "fluxibly.providers"}
"""Packages that are no room: they only hold rooms."""
BASE = {DATA, SIDE}
ARROWS = {
    DATA: set[str](),
    SIDE: {DATA},
    "flow": {DATA},
    "config": BASE,
    "telemetry": {"flow", *BASE},
    "drivers": {"flow", *BASE},
    "middleware": {"flow", "telemetry", *BASE},
    "services": {DATA},
    "dialects": {DATA},
    "http": {"dialects", "config", *BASE},
    "libraries": {"dialects", "config", *BASE},
    "local": {"dialects", "config", *BASE},
    "langchain": {"libraries", "dialects", "http", "config", *BASE},
    "litellm": {"libraries", "dialects", "http", "config", *BASE},
    "frameworks": {"services", "dialects", "http", "config", DATA},
    "stream": {"drivers", "flow", *BASE},
    "pipeline": {"stream", "drivers", "flow", *BASE},
    "registry": {"flow", "services", "config", DATA},
    "llm": {"pipeline", "stream", "registry", "config", "flow", "middleware", DATA},
    "testing": {"pipeline", "stream", "flow", "drivers", "dialects", *BASE},
    "cli": set(ROOMS.values()),
}
"""The rooms that a room may import from, besides itself."""
WRONG_TODAY = "providers.openai_compatible"
PURE = {"dialects": {"anyio", "asyncio", "httpx", "socket", "ssl"}, "flow": {"anyio", "asyncio", "socket", "threading"}}
"""What a room without I/O must not import."""
TODAY = {
    "arrivals": "telemetry._arrivals",
    "async_driver": "_drivers.streams",
    "call_record": "types",
    "call_trace": "telemetry._spans",
    "capture": "telemetry._content",
    "cli_app": "cli.app",
    "cli_chat": "cli.chat",
    "cli_doctor": "cli.inspect",
    "cli_inspect": "cli.inspect",
    "cli_report": "cli.report",
    "cli_screen": "cli.screen",
    "cli_sdk": "cli.spans",
    "cli_spans": "cli.chat",
    "combinators": "flow.combinators",
    "drivers": "_drivers.streams",
    "driving": "_drivers.stepping",
    "dropped": "_abandoned",
    "effects": "flow.effects",
    "flow": "flow.compose",
    "guards": "_checks",
    "instruments": "telemetry._metrics",
    "logs": "_logs",
    "masking": "_masking",
    "message_json": "telemetry._content",
    "otlp_file": "telemetry._file_exporter",
    "outcome": "errors",
    "profile": "middleware.timing",
    "propagation": "telemetry._propagation",
    "providers.anthropic_codec": "providers.dialects.anthropic",
    "providers.anthropic_request": "providers.dialects.anthropic",
    "providers.blocking": "providers.http._sockets_threads",
    "providers.body": "providers.http._encodings",
    "providers.codec": "providers.dialects.codec",
    "providers.error_classes": "providers.dialects.errors",
    "providers.error_reports": "providers.dialects.errors",
    "providers.event_loops": "providers.http._sockets_loops",
    "providers.foreign": "providers._libraries.calls",
    "providers.foreign_calls": "providers._libraries.calls",
    "providers.foreign_errors": "providers._libraries.errors",
    "providers.foreign_loops": "providers._libraries.loops",
    "providers.foreign_services": "providers._libraries.services",
    "providers.framing": "providers.dialects.framing",
    "providers.framing_lines": "providers.dialects.framing",
    "providers.framing_sse": "providers.dialects.framing",
    "providers.gemini_codec": "providers.dialects.gemini",
    "providers.gemini_request": "providers.dialects.gemini",
    "providers.held": "providers.dialects._decoding",
    "providers.http": "providers.http._provider",
    "providers.http1": "providers.http._http1",
    "providers.http_common": "providers.http._endpoint",
    "providers.http_errors": "providers.http._failures",
    "providers.inline_thinking": "providers.dialects._decoding",
    "providers.intake": "providers.http._reader",
    "providers.json_reading": "providers.dialects._json",
    "providers.langchain": "providers.langchain._provider",
    "providers.langchain_call": "providers.langchain._parameters",
    "providers.langchain_from": "providers.langchain._chat_model",
    "providers.langchain_messages": "providers.langchain._messages",
    "providers.langchain_model": "providers.langchain._chat_model",
    "providers.langchain_source": "providers.langchain._models",
    "providers.limits": "providers.http._limits",
    "providers.lines": "providers.http._senders",
    "providers.litellm": "providers.litellm._provider",
    "providers.litellm_answer": "providers.litellm._answers",
    "providers.litellm_clients": "providers.litellm._clients",
    "providers.litellm_services": "providers.litellm._services",
    "providers.local": "providers.local._provider",
    "providers.local_engine": "providers.local._engine",
    "providers.local_model": "providers.local._model",
    "providers.ollama_codec": "providers.dialects.ollama",
    "providers.ollama_request": "providers.dialects.ollama",
    "providers.openai_choice": "providers.dialects.openai_chat",
    "providers.openai_codec": "providers.dialects.openai_chat",
    "providers.openai_compatible": "providers.services",
    "providers.openai_parts": "providers.dialects.openai_parts",
    "providers.openai_request": "providers.dialects.openai_request",
    "providers.openai_responses": "providers.dialects.openai_responses",
    "providers.openai_responses_request": "providers.dialects.openai_responses",
    "providers.openai_stream": "providers.dialects.openai_chat",
    "providers.pool": "providers.http._pool",
    "providers.retry_hints": "providers.dialects.errors",
    "providers.route": "providers.http._route",
    "providers.slots": "providers.http._pool",
    "providers.sockets": "providers.http._sockets",
    "providers.transports": "providers.http._httpx",
    "providers.wire": "providers.dialects._encoding",
    "relay": "flow.combinators",
    "report": "_logs",
    "sdk": "telemetry._sdk",
    "semconv": "telemetry.semconv",
    "span_attributes": "telemetry._attributes",
    "spans": "telemetry._spans",
    "suggest": "_checks",
    "sync_driver": "_drivers.streams",
    "telemetry": "telemetry._setup",
    "testing.clock": "testing.scripted",
    "testing.scenarios": "testing._trial",
    "testing.trial": "testing._trial",
    "threaded": "provider",
    "trace_file": "cli.trace.file",
    "trace_html": "cli.trace.html",
    "trace_messages": "cli.trace.html",
    "trace_plot": "cli.trace.plot",
    "trace_view": "cli.trace.terminal",
    "yaml_file": "_yaml",
}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports: in functions and for type checkers alone, too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else str(node.module)


def room(module: str) -> str | None:
    """The room that a module of ours is in; None for the packages that only hold rooms."""
    if module in BESIDE:
        return None
    name = module.removeprefix("fluxibly.")
    name = TODAY.get(name, name)
    for places, found in ROOMS.items():
        if any(name == place or name.startswith(f"{place}.") for place in places.split()):
            return found
    raise AssertionError(f"{module} is in no room: give it a row in ROOMS")


def ours(path: Path) -> Iterator[str]:
    return (name for name in imports(path) if name.partition(".")[0] == "fluxibly")


def test_the_walk_finds_imports():
    """The tests below look at something: imports at the top, in functions, and for type checkers alone."""
    assert "fluxibly.errors" in set(imports(ROOT / "llm.py"))
    assert "fluxibly.middleware" in set(imports(ROOT / "llm.py"))
    assert "pathlib" in set(imports(ROOT / "llm.py"))
    assert len(MODULES) > 30


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(name, marks=pytest.mark.xfail if name.removeprefix("fluxibly.") in WRONG_TODAY.split() else ())
        for name in sorted(set(MODULES) - BESIDE)
    ],
)
def test_arrows(module):
    """A module imports from its own room and from those that the table allows."""
    mine = room(module)
    others = {name: found for name in ours(MODULES[module]) if (found := room(name)) not in {None, mine}}
    wrong = {name for name, found in others.items() if found not in ARROWS[str(mine)]}
    assert not wrong, f"{module} (room {mine!r}) must not import {sorted(wrong)}"


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name not in BESIDE and room(name) in PURE))
def test_pure_rooms(module):
    """Rooms without I/O import nothing that does any."""
    found = {name.partition(".")[0] for name in imports(MODULES[module])}
    assert not found & PURE[str(room(module))]


@pytest.mark.xfail
def test_every_row_is_used():
    """The table has no row for what is not there."""
    used = {room(module) for module in MODULES} - {None}
    assert used == set(ROOMS.values()) == set(ARROWS)
    for place in " ".join(ROOMS).split():
        assert f"fluxibly.{place}" in MODULES


def test_no_circles():
    """Modules can be imported in an order, by every import that there is."""
    graph = {name: {to for to in ours(path) if to != name} - BESIDE for name, path in MODULES.items()}
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", sorted(MODULES))
def test_underscored_modules_are_private(module):
    """Within `providers`, only siblings import a module whose name begins with an underscore."""
    for name in ours(MODULES[module]):
        holder, _, leaf = name.rpartition(".")
        if leaf.startswith("_") and holder.startswith("fluxibly.providers."):
            assert module.startswith(holder), f"{module} must not import {name}"


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
