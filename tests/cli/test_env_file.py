"""`--env-file`: keys from a `.env` file, for each command that makes a provider."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("typer")

from support.canned_server import Canned
from support.command_line import CommandLine, command_line
from support.model_server import KEY, LISTED, Models, model_server


@pytest.fixture
def fluxibly(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[CommandLine]:
    with command_line(tmp_path, capfd, monkeypatch) as found:
        yield found


@pytest.fixture
def models() -> Iterator[Models]:
    with model_server() as server:
        yield server


def written(folder: Path, text: str | bytes) -> str:
    """Return the path of a file with a text."""
    file = folder / "keys.env"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(file)


@pytest.mark.parametrize(
    "line", ["export {}={}", "{}='{}'", '{} = "{}"  # mine', "\ufeff# a comment\r\n\r\n{}={}\r\n", "K=sk\n{}={}"]
)
def test_a_key(fluxibly: CommandLine, models: Models, tmp_path: Path, line: str) -> None:
    """The forms of lines are those of python-dotenv."""
    file = written(tmp_path, f"{line.format('OPENAI_API_KEY', KEY)}\nOPENAI_BASE_URL={models.url}/openai/v1")
    assert fluxibly("models", "openai", "--env-file", file).lines == [f"openai:{name}" for name in LISTED["openai"]]


def test_before_the_command(fluxibly: CommandLine, models: Models, tmp_path: Path) -> None:
    """The option may also stand before the command, and values may name other variables."""
    fluxibly.set(MODELS_AT=models.url)
    file = written(tmp_path, f"OPENAI_API_KEY={KEY}\nOPENAI_BASE_URL=${{MODELS_AT}}/openai/v1")
    assert fluxibly("--env-file", file, "models", "openai").status == 0


def test_a_variable_that_is_set_wins(fluxibly: CommandLine, models: Models, tmp_path: Path) -> None:
    fluxibly.set(OPENAI_API_KEY=KEY)
    file = written(tmp_path, f"OPENAI_API_KEY=sk-of-the-file\nOPENAI_BASE_URL={models.url}/openai/v1")
    assert fluxibly("models", "openai", "--env-file", file).status == 0
    assert os.environ["OPENAI_API_KEY"] == KEY


def test_a_chat(fluxibly: CommandLine, server: Canned, tmp_path: Path) -> None:
    """The key goes to the service."""
    file = written(tmp_path, f"GROQ_API_KEY={KEY}\nGROQ_BASE_URL={server.url}")
    ran = fluxibly("chat", "--framework", "groq", "--model", "m", "--no-stream", "--env-file", file, "hi")
    assert (ran.status, ran.out) == (0, "You said: hi\n")
    assert server.last.headers["authorization"] == f"Bearer {KEY}"


def test_a_configuration(fluxibly: CommandLine, tmp_path: Path) -> None:
    """A YAML file may name the variables of the `.env` file."""
    config = tmp_path / "framework.yaml"
    config.write_text("llm: {framework: echo, model: '${MY_MODEL}'}")
    ran = fluxibly("explain", "--config", str(config), "--env-file", written(tmp_path, "MY_MODEL=harbour"))
    assert ran.status == 0
    assert "model=harbour" in ran.out


def test_frameworks(fluxibly: CommandLine, tmp_path: Path) -> None:
    file = written(tmp_path, f"MISTRAL_API_KEY={KEY}")
    row = next(line for line in fluxibly("frameworks", "--env-file", file).lines if line.startswith("mistral"))
    assert row.split() == ["mistral", "ready"]
    shown = fluxibly.at_terminal("frameworks", columns=200)
    assert ["✓", "mistral", "MISTRAL_API_KEY", "from", file] in [line.split() for line in shown.lines]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"A=1\n\n\nthis is not a line {KEY}\n", "expected NAME=value in line 4, got something else"),
        (f'A="{KEY}\nB=2\n', "expected NAME=value in line 1, got something else"),
        (f"A=\xe9{KEY}".encode("latin-1"), "expected text in UTF-8, got other bytes"),
        (f"A=\0{KEY}", "expected text, got a NUL character in a value"),
        (f"A={KEY}" * 100_000, "expected at most 1,048,576 characters, got more"),
    ],
)
def test_a_broken_file(fluxibly: CommandLine, tmp_path: Path, text: str | bytes, says: str) -> None:
    """It is the user's mistake, and the message quotes nothing of the file."""
    file = written(tmp_path, text)
    for arguments in (["models", "--env-file", file], ["--env-file", file, "doctor"]):
        ran = fluxibly(*arguments)
        assert (ran.status, ran.out, ran.err) == (2, "", f"fluxibly: --env-file {file}: {says}\n")


def test_a_file_that_cannot_be_read(fluxibly: CommandLine, tmp_path: Path) -> None:
    for file, says in ((tmp_path / "nope", "No such file or directory"), (tmp_path, "Is a directory")):
        ran = fluxibly("doctor", "--env-file", str(file))
        assert (ran.status, ran.out, ran.err) == (2, "", f"fluxibly: --env-file {file}: {says}\n")
