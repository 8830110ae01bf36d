"""The command `serve`: its line, its end by signals, and the mistakes that it refuses to start with."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from fluxibly import _extras
from fluxibly.cli.commands import serve as serve_command

pytest.importorskip("typer")
pytest.importorskip("uvicorn")
ROOT = Path(__file__).parents[2]
START = "from fluxibly.cli import main; main()"
KEYS = re.compile(r"(API_KEY|_TOKEN|FLUXIBLY|OTEL|COLOR)")
TOKEN = "a-token-of-the-test"  # noqa: S105  # for a server of the test
ENDLESS = """
import anyio, sys
from fluxibly import Chunk, register_llm_framework

class Endless:
    def __init__(self, config): pass
    async def complete(self, request): return "whole"
    async def stream(self, request):
        yield Chunk("one ")
        try:
            await anyio.sleep_forever()
        finally:
            print("the stream was closed", file=sys.stderr, flush=True)

register_llm_framework("endless", Endless)
"""


def environment(**changes: str) -> dict[str, str]:
    """Return this process's environment, without the variables that would change the results."""
    kept = {name: value for name, value in os.environ.items() if not KEYS.search(name)}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    return {**kept, "PYTHONPATH": path, "PYTHONUTF8": "1", **changes}


@contextmanager
def server(*arguments: str, before: str = "", **variables: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the command with a free port. The values are its process, and the base address that its line names."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"{before}\n{START}", "serve", "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=environment(**variables),
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"base_url=(\S+)/v1", line)
        assert found is not None, (line, process.stderr.read() if process.stderr else "")
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def mistake(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., None]]:
    """Return a function that checks a mistake, in this process: one line on standard error, and nothing else."""
    from fluxibly.cli.commands import run

    loggers = [logging.getLogger(name) for name in ("fluxibly", "opentelemetry", "uvicorn", "uvicorn.error", "asyncio")]
    before = [(each.level, each.propagate, list(each.handlers)) for each in loggers]
    for name in set(os.environ) - set(environment()):
        monkeypatch.delenv(name)

    def check(*arguments: str, says: str) -> None:
        status = run(["serve", *arguments])
        out, err = capfd.readouterr()
        assert (status, out) == (2, ""), err
        assert err.startswith("fluxibly: ")
        assert err.count("\n") == 1
        assert says in err

    yield check
    for each, (level, propagate, handlers) in zip(loggers, before, strict=True):
        each.setLevel(level)
        each.propagate = propagate
        each.handlers[:] = handlers


def test_it_answers_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    """It prints where it listens, answers, tells open streams of its end, writes the spans, and exits with 130."""
    trace = tmp_path / "trace.jsonl"
    with server("--framework", "endless", "--model", "m", "--trace", str(trace), before=ENDLESS) as (process, url):
        assert url.startswith("http://127.0.0.1:")
        body = {"messages": [{"role": "user", "content": "hi"}]}
        whole = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert whole.json()["choices"][0]["message"]["content"] == "whole"
        with httpx.stream("POST", f"{url}/v1/chat/completions", json={**body, "stream": True}, timeout=20) as response:
            pieces = response.iter_text()
            assert "one " in next(pieces)
            process.send_signal(signal.SIGINT)
            began = time.monotonic()
            assert "the server is ending" in "".join(pieces)
        out, err = process.communicate(timeout=20)
        assert time.monotonic() - began < 10
    assert (process.returncode, out) == (130, "")
    assert "the stream was closed" in err
    assert "Traceback" not in err
    spans = [json.loads(line) for line in trace.read_text(encoding="utf-8").splitlines()]
    assert len(spans) == 2


def test_it_ends_with_sigterm() -> None:
    """SIGTERM, which containers are stopped by, is a clean end."""
    with server("--framework", "echo") as (process, _):
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "", "")


def test_a_public_address_with_a_token() -> None:
    """With a token in the environment it listens at any address, whatever name clients have for it."""
    with server("--framework", "echo", "--host", "0.0.0.0", FLUXIBLY_SERVE_TOKEN=TOKEN) as (_, url):  # noqa: S104
        headers = {"host": "gateway.example"}
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 401
        headers["authorization"] = f"Bearer {TOKEN}"
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200


def test_the_token_is_in_no_output() -> None:
    """Neither the line nor the log of each request has the token or a query. A foreign Host gets nothing."""
    with server("--framework", "echo", "--token", TOKEN, "--log-level", "info") as (process, url):
        headers = {"authorization": f"Bearer {TOKEN}"}
        body = {"messages": [{"role": "user", "content": "a secret question"}]}
        httpx.post(f"{url}/v1/chat/completions?key=sk-secret", json=body, headers=headers).raise_for_status()
        assert httpx.get(f"{url}/v1/models", headers={**headers, "host": "evil.example"}).status_code == 403
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert "path=/v1/chat/completions, status=200" in err
    for secret in (TOKEN, "sk-secret", "a secret question"):
        assert secret not in out + err


def test_a_port_in_use(mistake: Callable[..., None]) -> None:
    """A port in use is one line, and no traceback."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        says = f"cannot listen at 127.0.0.1, port {port}: Address already"
        mistake("--framework", "echo", "--port", str(port), says=says)


@pytest.mark.parametrize(
    ("arguments", "variables", "says"),
    [
        (["--host", "0.0.0.0"], {}, "a token is needed"),  # noqa: S104
        (["--host", "::"], {}, "a token is needed"),
        (["--host", "0.0.0.0", "--token", ""], {}, "--token: expected a token, got an empty str"),  # noqa: S104
        (["--token", ""], {}, "--token: expected a token, got an empty str"),
        (["--token", "two words"], {}, "without spaces"),
        ([], {"FLUXIBLY_SERVE_TOKEN": " "}, "FLUXIBLY_SERVE_TOKEN: expected a token"),
        (["--host", "no.such.host.invalid"], {}, "--host: expected a name or an address of this machine"),
        (["--host", ""], {}, "got an empty str"),
        (["--port", "70000"], {}, "--port"),
        (["--models", "a,,b"], {}, "--models: expected names"),
        (["--config", "missing.yaml"], {}, "missing.yaml"),
        (["--framework", "openai", "--model", "gpt-4o"], {}, "OPENAI_API_KEY"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes(
    arguments: list[str],
    variables: dict[str, str],
    says: str,
    mistake: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A mistake is told in one line before anything listens."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    chosen = [] if {"--framework", "--config"} & set(arguments) else ["--framework", "echo"]
    mistake(*chosen, "--port", "0", *arguments, says=says)


def test_ipv6() -> None:
    """The address of an IPv6 host is in brackets."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with server("--framework", "echo", "--host", "::1") as (_, url):
        assert url.startswith("http://[::1]:")
        assert httpx.get(f"{url}/v1/models").status_code == 200


def test_missing_packages(mistake: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the packages of the extra, one line says how to install them."""
    hide = {"starlette", "uvicorn"}
    found = _extras.version_of
    for module in (_extras, serve_command):
        monkeypatch.setattr(module, "version_of", lambda package: None if package in hide else found(package))
    mistake("--framework", "echo", says="pip install starlette uvicorn")
