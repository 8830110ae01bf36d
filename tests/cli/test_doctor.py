"""`doctor` and `frameworks`: what is installed, what is broken, and whether a chat with a configuration would begin."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from support.canned_server import canned_server
from support.packages import MIDDLEWARE, install

from fluxibly import LLMConfig

pytest.importorskip("typer")
START = "from fluxibly.cli import main; main()"
Run = Callable[..., subprocess.CompletedProcess[str]]
OTHERS = re.compile("API_KEY|_TOKEN|_BASE_URL|_ENDPOINT|FLUXIBLY|COLOR")


@pytest.fixture
def fluxibly(tmp_path: Path) -> Run:
    """A function that runs a command with the packages of `tmp_path` installed."""
    kept = {name: value for name, value in os.environ.items() if not OTHERS.search(name)}
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH", ""))))
    environment = {**kept, "PYTHONPATH": path, "PYTHONUTF8": "1"}

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", START, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            env={**environment, **variables},
            timeout=100,
            check=False,
        )

    return run


def rows(ran: subprocess.CompletedProcess[str], name: str) -> list[list[str]]:
    """Return the rows of a table that have a cell `name`, as their cells."""
    cells = [re.split("  +", line.strip()) for line in ran.stdout.splitlines()]
    return [row for row in cells if name in row]


def test_another_framework_gets_nothing_of_the_file_s_service(fluxibly: Run, tmp_path: Path) -> None:
    """`--framework` asks another service. The key, the headers and the address of the file are not for it."""
    path = tmp_path / "framework.yaml"
    with canned_server() as files, canned_server() as others:
        path.write_text(
            f"llm: {{framework: openai, model: m, api_key: sk-secret, api_base: '{files.url}', "
            "headers: {x-gateway: gateway-secret}}"
        )
        chat = ("chat", "--config", str(path), "--framework", "groq", "--model", "m", "--no-stream", "hi")
        ran = fluxibly(*chat, GROQ_API_KEY="sk-groq", GROQ_BASE_URL=others.url)
        assert ran.stdout == "You said: hi\n", ran.stderr
        assert files.seen == []
        assert others.last.headers["authorization"] == "Bearer sk-groq"
        assert "secret" not in str(others.last.headers)


def test_the_stack_shows_no_secret_of_a_middleware() -> None:
    """`explain` shows the settings of a middleware as its repr does."""
    from fluxibly.cli.inspect import explained

    @attrs.frozen(kw_only=True)
    class Gate:
        name: str = "harbour"
        key: str = attrs.field(default="sk-secret", repr=False)
        token: str = attrs.field(default="sk-secret", repr=lambda _: "***")

        def __call__(self, request: Any, call_next: Any) -> Any:
            return (yield from call_next(request))

    shown = explained(LLMConfig(framework="echo", model="m", api_key="sk-secret", middleware=[Gate()]))
    assert shown.layers[0].settings == "name='harbour', token=***"
    assert shown.chain.provider_shown == "framework=echo, model=m"
    assert "sk-secret" not in str(shown)


def test_plugins(fluxibly: Run, tmp_path: Path) -> None:
    """A broken plugin is shown with its package and the reason, and everything else works."""
    install(tmp_path, "acme_one", "acme = acme_one:Provider", code="import a_dependency_that_is_gone")
    install(tmp_path, "acme_two", "acme = acme_two:Provider")
    install(tmp_path, "acme_three", "echo = acme_three:Provider")
    install(tmp_path, "acme_four", "shout = acme_four:shout", group=MIDDLEWARE, code="def shout(): yield")
    ran = fluxibly("doctor")
    reason = (
        "framework 'acme': the entry point 'acme_one:Provider' of acme_one 1.0 cannot be imported: ModuleNotFoundError: "
        "No module named 'a_dependency_that_is_gone'; repair or uninstall that package"
    )
    assert ran.returncode == 1
    assert rows(ran, "acme") == [
        ["plugin", "acme", "broken", reason],
        ["plugin", "acme", "not used", "acme_two 1.0: acme_one 1.0 has this name too, and is used"],
    ]
    assert rows(ran, "echo") == [
        ["plugin", "echo", "not used", "acme_three 1.0: fluxibly's own framework has this name"],
        ["framework", "echo", "ready"],
    ]
    assert rows(ran, "shout") == [["plugin", "shout", "ready, from acme_four 1.0"]]
    assert rows(fluxibly("frameworks"), "acme") == [["acme", "broken", reason]]
    ran = fluxibly("chat", "--framework", "echo", "--model", "m", "hello")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "hello\n", "")
    ran = fluxibly("chat", "--framework", "acme", "--model", "m", "hello")
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", f"fluxibly: {reason}\n")


def test_a_plugin_that_works(fluxibly: Run, tmp_path: Path) -> None:
    """It is listed with the others, even if its provider is broken in a way that ends a process."""
    install(tmp_path, "acme", "acme = acme:Provider", code="import sys\nclass Provider:\n    __init__ = sys.exit")
    ran = fluxibly("doctor")
    assert ran.returncode == 0
    assert rows(ran, "acme")[0] == ["plugin", "acme", "ready, from acme 1.0"]
    assert rows(ran, "acme")[1][:3] == ["framework", "acme", "not set up"]
    assert rows(fluxibly("frameworks"), "acme") == [["acme", "ready"]]


@pytest.mark.parametrize(
    "text",
    [
        "llm: {framework: echo, model: m, middleware: [retry: {max_retry: 1, base_delay: -1}, loging]}",
        "llm: {framework: opnai, model: m, top_p: 3, middleware: [loging]}",
        "llm: {framework: echo, model: '${FLUXIBLY_NO_SUCH}', top_p: 3}",
        "llm: {framework: broken, model: m}",
        "llm: {framework: echo, model: m, quirks: {top_k: true}}",
        "llm: {framework: echo, model: m, middleware: [unfit]}",
    ],
)
def test_a_wrong_configuration_is_told_in_the_words_of_a_chat(fluxibly: Run, tmp_path: Path, text: str) -> None:
    """What a chat says in one line before it begins, with its status, `doctor` and `explain` say too."""
    install(tmp_path, "broken", "broken = broken:Provider")
    install(tmp_path, "unfit", "unfit = unfit:make", group=MIDDLEWARE, code="def make(): raise OSError('no')")
    file = tmp_path / "config.yaml"
    file.write_text(text)
    chat = fluxibly("chat", "--config", str(file), "x")
    assert (chat.returncode, chat.stdout) == (2, "")
    assert chat.stderr.startswith("fluxibly: llm.")
    assert chat.stderr.count("\n") == 1
    for command in ("doctor", "explain"):
        ran = fluxibly(command, "--config", str(file))
        assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", chat.stderr)


@pytest.mark.parametrize(
    "text",
    [
        "llm: {framework: openai, model: m}",
        "llm: {framework: azure, model: m, api_key: k}",
        "llm: {framework: local, model: no/such.gguf}",
        "llm: {framework: acme, model: m}",
        "llm: {framework: echo, model: m, middleware: [nothing]}",
    ],
)
def test_what_cannot_be_made_is_told_in_the_words_of_a_chat(fluxibly: Run, tmp_path: Path, text: str) -> None:
    """`doctor` makes the provider and the stack, and shows why a chat would not begin."""
    install(tmp_path, "acme", "acme = acme:make", code="def make(config): raise OSError('the license is gone')")
    install(tmp_path, "nothing", "nothing = nothing:make", group=MIDDLEWARE, code="def make(): return None")
    file = tmp_path / "config.yaml"
    file.write_text(text)
    chat = fluxibly("chat", "--config", str(file), "x")
    assert chat.returncode != 0
    said = re.sub(r"^fluxibly: (OSError|TypeError)?(: )?", "", chat.stderr.splitlines()[0])
    ran = fluxibly("doctor", "--config", str(file))
    assert ran.returncode == 1
    assert said in ran.stdout


def test_a_configuration_that_is_right(fluxibly: Run, tmp_path: Path) -> None:
    """Only what the configuration needs is checked: another framework's broken plugin is no failure."""
    install(tmp_path, "broken", "broken = broken:Provider")
    file = tmp_path / "config.yaml"
    file.write_text("llm: {framework: echo, model: '-', middleware: [logging, retry: {max_retries: 1}]}")
    ran = fluxibly("doctor", "--config", str(file))
    assert (ran.returncode, ran.stderr) == (0, "")
    assert rows(ran, "framework") == [["framework", "echo", "ready"]]
    assert not rows(ran, "plugin")
    assert "Retry" in fluxibly("explain", "--config", str(file)).stdout
    assert fluxibly("chat", "--config", str(file), "x").stdout == "x\n"


def test_another_framework_than_the_file_s(fluxibly: Run, tmp_path: Path) -> None:
    """The file's own framework is not looked at."""
    file = tmp_path / "config.yaml"
    file.write_text("llm: {framework: gone, model: m}")
    ran = fluxibly("chat", "--config", str(file), "--framework", "echo", "--model", "m", "x")
    assert (ran.returncode, ran.stdout) == (0, "x\n")
    ran = fluxibly("chat", "--config", str(file), "--framework", "opnai", "--model", "m", "x")
    assert ran.returncode == 2
    assert ran.stderr.startswith("fluxibly: did you mean 'openai'? LLM framework 'opnai' not registered.")


def test_an_address_in_the_environment(fluxibly: Run, tmp_path: Path) -> None:
    """Doctor asks the server that a call would ask, with the configuration's headers, and says where the address is from."""
    file = tmp_path / "gateway.yaml"
    file.write_text("llm: {framework: openai, model: m, headers: {x-gateway: harbour}}")
    with canned_server() as server:
        host = server.url.removeprefix("http://")
        ran = fluxibly("doctor", "--config", str(file), OPENAI_BASE_URL=f"{server.url}/v1")
        assert re.search(rf"openai +{host} \(from OPENAI_BASE_URL\) answers in", ran.stdout)
        assert ran.returncode == 0
        assert [(seen.path, seen.headers["x-gateway"]) for seen in server.got] == [("/v1/models", "harbour")]
    ran = fluxibly("doctor", "--config", str(file), OPENAI_BASE_URL="gateway/v1")
    assert "OPENAI_BASE_URL: expected an http:// or https:// URL" in ran.stdout
    assert ran.returncode == 1


def test_other_variables_are_as_good_as_a_key(fluxibly: Run) -> None:
    """A framework is ready if any of the variables is set with which its vendor's client works."""
    ran = fluxibly(
        "frameworks",
        ANTHROPIC_AUTH_TOKEN="t",  # noqa: S106
        GOOGLE_API_KEY="k",
        OPENAI_BASE_URL="http://127.0.0.1:9/v1",
    )
    assert [rows(ran, name)[0][1] for name in ("anthropic", "gemini", "vertex", "openai", "groq")] == [
        *["ready"] * 4,
        "not ready",
    ]


def test_the_credentials_of_a_cloud(fluxibly: Run, tmp_path: Path) -> None:
    """`doctor` looks for the credentials without which a chat would fail, and `frameworks` for their files."""
    file, home = tmp_path / "framework.yaml", {"HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}
    with canned_server() as server:
        file.write_text(f"llm: {{framework: bedrock, model: m, region: us-east-1, api_base: '{server.url}'}}")
        ran = fluxibly("doctor", "--config", str(file), **home)
        assert "bedrock found no AWS credentials" in ran.stdout
        assert ran.returncode == 1
        assert rows(fluxibly("frameworks", **home), "bedrock")[0][1:] == [
            "not ready",
            "set AWS_BEARER_TOKEN_BEDROCK, or AWS credentials",
        ]
        (tmp_path / ".aws").mkdir()
        (tmp_path / ".aws" / "credentials").write_text("[default]\naws_access_key_id = k\naws_secret_access_key = s\n")
        ran = fluxibly("doctor", "--config", str(file), **home)
        assert re.search(r"bedrock +127.0.0.1:\d+ answers in", ran.stdout), ran.stdout
        assert ran.returncode == 0
        assert rows(fluxibly("frameworks", **home), "bedrock")[0][1] == "ready"


def test_another_framework_is_not_in_the_file_s_region(fluxibly: Run, tmp_path: Path) -> None:
    """`--framework` leaves the region, the project and the quirks of the file's service out."""
    file = tmp_path / "framework.yaml"
    file.write_text("llm: {framework: vertex, model: m, region: us-east1, project: p, api_key: k}")
    ran = fluxibly("chat", "--config", str(file), "--framework", "echo", "--model", "m", "hello")
    assert (ran.stdout.splitlines()[0], ran.returncode) == ("hello", 0), ran
    file.write_text("llm: {framework: openai, model: m, api_key: k, quirks: {top_k: true}}")
    ran = fluxibly("chat", "--config", str(file), "--framework", "echo", "--model", "m", "hello")
    assert (ran.stdout.splitlines()[0], ran.returncode) == ("hello", 0), ran
