"""`models`: what the services that are set up offer, from their lists and from the cache."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")

from support.command_line import CommandLine, command_line
from support.model_server import KEY, LISTED, Models, model_server

from fluxibly import Target, registry
from fluxibly.cli import models as command
from fluxibly.config import LLMConfig
from fluxibly.providers.local import cached_path
from fluxibly.providers.local._model import MODELS

OPENAI = [f"openai:{model}" for model in LISTED["openai"]]
LOCAL = ["local:smollm2", "local:qwen2.5-coder-0.5b"]
ANTHROPIC = [f"anthropic:{model}" for model in LISTED["anthropic"]]


@pytest.fixture
def server() -> Iterator[Models]:
    with model_server() as models:
        yield models


@pytest.fixture
def fluxibly(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, server: Models
) -> Iterator[CommandLine]:
    """A command line to which OpenAI's and Anthropic's services are set up, at the server."""
    with command_line(tmp_path, capfd, monkeypatch) as found:
        found.set(
            OPENAI_API_KEY=KEY,
            OPENAI_BASE_URL=f"{server.url}/openai/v1",
            ANTHROPIC_API_KEY=KEY,
            ANTHROPIC_BASE_URL=f"{server.url}/anthropic",
            OLLAMA_HOST=f"{server.url}/ollama",
        )
        yield found


def test_one_service(fluxibly: CommandLine) -> None:
    """Each line is what `--model` takes."""
    ran = fluxibly("models", "openai")
    assert (ran.status, ran.lines, ran.err) == (0, OPENAI, "")
    assert fluxibly("models", "openai-responses").lines == [f"openai-responses:{model}" for model in LISTED["openai"]]
    named = Target(ANTHROPIC[0]).config
    assert named is not None
    assert (named.framework, named.model) == ("anthropic", LISTED["anthropic"][0])


def test_all_services(fluxibly: CommandLine, server: Models) -> None:
    """Those that are set up, each account once. Servers that do not run here, and frameworks without a list, are left out."""
    ran = fluxibly("models")
    ollama = [f"ollama:{model}" for model in LISTED["ollama"]]
    assert (ran.status, ran.lines, ran.err) == (0, [*ANTHROPIC, *LOCAL, *ollama, *OPENAI], "")


def test_a_service_that_fails(fluxibly: CommandLine, server: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has one line that says why, without the key. The others are shown, and nobody waits longer than the limit."""
    monkeypatch.setattr(command, "TIMEOUT", 0.5)
    wrong = "sk-wrong-9876543210"
    server.answers["/groq/models"] = (401, {"error": {"message": f"no such key: {wrong}\n\x1b[31m"}})
    server.answers["/slow/models"] = (200, lambda _: server.closing.wait(10))
    fluxibly.set(GROQ_API_KEY=wrong, GROQ_BASE_URL=f"{server.url}/groq?a=b")
    fluxibly.set(TOGETHER_API_KEY=KEY, TOGETHER_BASE_URL=f"{server.url}/slow")
    fluxibly.set(NVIDIA_API_KEY=KEY, NVIDIA_BASE_URL=f"{server.url}/slow")
    began = time.monotonic()
    ran = fluxibly("models")
    assert time.monotonic() - began < 5
    assert ran.status == 0
    assert {*ANTHROPIC, *OPENAI} < set(ran.lines)
    groq, nvidia, together = ran.err.splitlines()
    assert groq.startswith("fluxibly: Groq answered 401: no such key: *** [31m.")
    assert nvidia == "fluxibly: nvidia: 127.0.0.1 sent no whole list within 0.5 s"
    assert together == "fluxibly: together: 127.0.0.1 sent no whole list within 0.5 s"
    ran = fluxibly("models", "groq")
    assert (ran.status, ran.out, ran.err) == (1, "", f"{groq}\n")


def test_mistakes(fluxibly: CommandLine) -> None:
    """A name that is unknown and a key that is missing are the user's; that there is no list is not."""
    ran = fluxibly("models", "claude")
    assert ran.status == 2
    assert ran.err.startswith("fluxibly: did you mean 'anthropic'?")
    ran = fluxibly("models", "mistral")
    assert ran.status == 2
    assert ran.err.startswith("fluxibly: mistral needs an API key: set the environment variable MISTRAL_API_KEY")
    for name in ("echo", "litellm", "langchain"):
        ran = fluxibly("models", name)
        assert (ran.status, ran.out, ran.err) == (1, "", f"fluxibly: {name} has no list of its models\n")


def test_json(fluxibly: CommandLine, server: Models) -> None:
    """It has every service, also one that failed or has no list."""
    server.answers["/anthropic/v1/models"] = (500, {"error": {"message": "broken"}})
    found = {each["provider"]: each for each in json.loads(fluxibly("models", "--json").out)}
    assert found["openai"] == {"provider": "openai", "state": "listed", "models": LISTED["openai"]}
    assert found["anthropic"]["state"] == "failed"
    assert found["anthropic"]["problem"].startswith("Anthropic answered 500: broken.")
    assert found["echo"] == {"provider": "echo", "state": "no list", "models": []}
    assert found["vllm"]["state"] == "not running"
    assert found["local"]["notes"][0] == "SmolLM2-135M-Instruct, Apache-2.0; the first call fetches 93 MB"
    (one,) = json.loads(fluxibly("models", "openai", "-q", "mini", "--json").out)
    assert one["models"] == ["gpt-5-mini"]


def test_a_text_to_look_for(fluxibly: CommandLine) -> None:
    """It is looked for in the service and the model, whatever its case."""
    assert fluxibly("models", "-q", "GPT").lines == OPENAI[:2]
    assert fluxibly("models", "-q", "openai:gpt-5-").lines == ["openai:gpt-5-mini"]
    assert "No model's name has 'zzz' in it." in fluxibly.at_terminal("models", "-q", "zzz").out


def test_names_of_a_hostile_server(fluxibly: CommandLine, server: Models) -> None:
    """No name moves the cursor, forges a line or runs a command where it is pasted."""
    names = ["a\x1b[31m\x9b2Jb\r\ngroq:forged", "m\u202etxt.exe", "$(reboot)", "it's", "\ud800half", "plain/model:free"]
    server.answers["/openai/v1/models"] = (200, json.dumps({"data": [{"id": name} for name in names]}).encode())
    ran = fluxibly("models", "openai")
    assert len(ran.lines) == len(names)
    assert all(line.isprintable() and line.startswith("openai:") for line in ran.lines)
    shown = fluxibly.at_terminal("models", "openai").out
    assert "'openai:$(reboot)'" in shown
    assert "openai:plain/model:free\n" in shown
    assert "\x9b" not in shown


def test_the_local_models(fluxibly: CommandLine) -> None:
    """A person is told whether the first call has to fetch a model."""
    assert fluxibly("models", "local").lines == LOCAL
    assert fluxibly.at_terminal("models", "local").lines == [
        "local:smollm2  SmolLM2-135M-Instruct, Apache-2.0; the first call fetches 93 MB",
        "local:qwen2.5-coder-0.5b  Qwen2.5-Coder-0.5B-Instruct, Apache-2.0; the first call fetches 478 MB",
    ]
    path = cached_path(MODELS["smollm2"])
    path.parent.mkdir(parents=True)
    path.touch()
    assert fluxibly.at_terminal("models", "local").lines[0].endswith("Apache-2.0; fetched")


def test_a_configuration(fluxibly: CommandLine, server: Models, tmp_path: Path) -> None:
    """The list is that of the file's service, with its key and its address."""
    file = tmp_path / "gateway.yaml"
    file.write_text(f"llm: {{framework: openai, model: m, api_key: {KEY}, api_base: '{server.url}/together/v1'}}")
    ran = fluxibly("models", "--config", str(file))
    assert (ran.status, ran.lines) == (0, ["openai:moonshotai/Kimi-K2"])
    assert fluxibly("models", "openai", "--config", str(file)).lines == ran.lines
    ran = fluxibly("models", "groq", "--config", str(file))
    assert (ran.status, ran.err) == (
        2,
        "fluxibly: expected 'openai', whose configuration is in the file, got 'groq'\n",
    )


def test_frameworks_of_others(fluxibly: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A framework of another package has a list if its provider has one; one that breaks does not hide the others."""

    class Plain:
        def __init__(self, config: LLMConfig) -> None:
            pass

    class Listing(Plain):
        has_list = True
        account = None

        def list_models(self, *, timeout: float) -> list[str]:
            return ["one", "two"]

    def broken(config: LLMConfig) -> Any:
        raise SystemExit("the license is gone")

    for name, factory in {"plain": Plain, "listing": Listing, "broken": broken}.items():
        monkeypatch.setitem(registry._frameworks, name, registry.Framework(name=name, sync=factory))
    ran = fluxibly("models")
    assert {"listing:one", "listing:two", *OPENAI} < set(ran.lines)
    assert ran.err == "fluxibly: broken: the license is gone\n"
    assert "Without a list: echo, langchain, litellm, plain" in fluxibly.at_terminal("models").out


class TestCache:
    def test_a_list_is_asked_for_once_an_hour(self, fluxibly: CommandLine, server: Models) -> None:
        assert fluxibly("models", "openai").lines == OPENAI
        assert fluxibly("models", "openai").lines == OPENAI
        assert len(server.got) == 1
        assert fluxibly("models", "openai", "--refresh").lines == OPENAI
        assert len(server.got) == 2
        (entry,) = fluxibly.cache.iterdir()
        for age in (3601, -60):  # an hour has gone, and the clock was set back
            entry.write_text(json.dumps({"at": time.time() - age, "models": ["old"]}))
            assert fluxibly("models", "openai").lines == OPENAI
        assert len(server.got) == 4

    def test_accounts_do_not_share(self, fluxibly: CommandLine, server: Models) -> None:
        assert fluxibly("models", "openai").status == 0
        fluxibly.set(OPENAI_API_KEY="sk-another-0123456789")
        assert fluxibly("models", "openai").status == 1
        fluxibly.set(OPENAI_API_KEY=KEY, OPENAI_BASE_URL=f"{server.url}/together/v1")
        assert fluxibly("models", "openai").lines == ["openai:moonshotai/Kimi-K2"]
        assert len(list(fluxibly.cache.iterdir())) == 2, "a refusal is not kept"

    def test_a_server_of_ones_own_is_asked_each_time(self, fluxibly: CommandLine, server: Models) -> None:
        for _ in range(2):
            assert fluxibly("models", "ollama").status == 0
        assert len(server.got) == 2
        assert not fluxibly.cache.exists()

    def test_the_files_have_no_keys(self, fluxibly: CommandLine) -> None:
        assert fluxibly("models").status == 0
        entries = list(fluxibly.cache.iterdir())
        assert len(entries) == 2
        for entry in entries:
            assert entry.stat().st_mode & 0o777 == 0o600
            assert KEY not in entry.name + entry.read_text()
            assert "127.0.0.1" not in entry.read_text()

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{",
            b"\xff\xfe",
            b"[" * 100_000,
            b'{"at": NOW}',
            b'{"at": NOW, "models": "m"}',
            b'{"at": NOW, "models": [7]}',
            b'{"at": "now", "models": []}',
        ],
    )
    def test_a_broken_file_is_ignored(self, fluxibly: CommandLine, content: bytes) -> None:
        fluxibly("models", "openai")
        (entry,) = fluxibly.cache.iterdir()
        entry.write_bytes(content.replace(b"NOW", str(time.time()).encode()))
        assert fluxibly("models", "openai").lines == OPENAI

    def test_old_files_are_removed(self, fluxibly: CommandLine) -> None:
        fluxibly.cache.mkdir(parents=True)
        for name, age in {"old": 3700, "new": 60}.items():
            file = fluxibly.cache / name
            file.touch()
            os.utime(file, (time.time() - age,) * 2)
        fluxibly("models", "openai")
        names = {file.name for file in fluxibly.cache.iterdir()}
        assert "new" in names
        assert "old" not in names

    def test_without_a_folder_nothing_is_kept(self, fluxibly: CommandLine) -> None:
        (fluxibly.home / "cache").write_text("a file, where the folder would be")
        assert fluxibly("models", "openai").lines == OPENAI


PAGE = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^fluxibly ((?:--env-file \S+ )?(?:models|doctor|frameworks).*?)(?:   .*)?$", PAGE, re.MULTILINE)


def test_the_page_has_commands() -> None:
    """The test below is not empty."""
    assert len(COMMANDS) > 8


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_the_commands_of_the_page(
    fluxibly: CommandLine, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each succeeds as it stands there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("MISTRAL_API_KEY=\n")
    (tmp_path / "framework.yaml").write_text("llm: {framework: openai, model: gpt-5}")
    ran = fluxibly(*command.split())
    assert (ran.status, ran.err) == (0, "")
    assert ran.out
