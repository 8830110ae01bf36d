"""`doctor` and `frameworks`: what is installed, what is broken, and whether a chat with a configuration would begin."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from support.canned_server import canned_server
from support.command_line import CommandLine, Ran, command_line
from support.model_server import KEY, model_server
from support.packages import MIDDLEWARE, install

from fluxibly import LLMConfig

pytest.importorskip("typer")


@pytest.fixture
def fluxibly(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[CommandLine]:
    """A command line that finds the packages of `tmp_path`, and no service that is set up."""
    with command_line(tmp_path, capfd, monkeypatch) as found:
        yield found


def rows(ran: Ran, name: str) -> list[list[str]]:
    """Return the rows of a table that have a cell `name`, as their cells."""
    cells = [re.split("  +", line.strip()) for line in ran.lines]
    return [row for row in cells if name in row]


def test_another_framework_gets_nothing_of_the_file_s_service(fluxibly: CommandLine, tmp_path: Path) -> None:
    """`--framework` asks another service. The key, the headers and the address of the file are not for it."""
    path = tmp_path / "framework.yaml"
    with canned_server() as files, canned_server() as others:
        path.write_text(
            f"llm: {{framework: openai, model: m, api_key: sk-secret, api_base: '{files.url}', "
            "headers: {x-gateway: gateway-secret}}"
        )
        chat = ("chat", "--config", str(path), "--framework", "groq", "--model", "m", "--no-stream", "hi")
        fluxibly.set(GROQ_API_KEY="sk-groq", GROQ_BASE_URL=others.url)
        ran = fluxibly(*chat)
        assert ran.out == "You said: hi\n", ran.err
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


def test_plugins(fluxibly: CommandLine, tmp_path: Path) -> None:
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
    assert ran.status == 1
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
    assert (ran.status, ran.out, ran.err) == (0, "hello\n", "")
    ran = fluxibly("chat", "--framework", "acme", "--model", "m", "hello")
    assert (ran.status, ran.out, ran.err) == (2, "", f"fluxibly: {reason}\n")


def test_a_plugin_that_works(fluxibly: CommandLine, tmp_path: Path) -> None:
    """It is listed with the others, even if its provider is broken in a way that ends a process."""
    install(tmp_path, "acme", "acme = acme:Provider", code="import sys\nclass Provider:\n    __init__ = sys.exit")
    ran = fluxibly("doctor")
    assert ran.status == 0
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
def test_a_wrong_configuration_is_told_in_the_words_of_a_chat(fluxibly: CommandLine, tmp_path: Path, text: str) -> None:
    """What a chat says in one line before it begins, with its status, `doctor` and `explain` say too."""
    install(tmp_path, "broken", "broken = broken:Provider")
    install(tmp_path, "unfit", "unfit = unfit:make", group=MIDDLEWARE, code="def make(): raise OSError('no')")
    file = tmp_path / "config.yaml"
    file.write_text(text)
    chat = fluxibly("chat", "--config", str(file), "x")
    assert (chat.status, chat.out) == (2, "")
    assert chat.err.startswith("fluxibly: llm.")
    assert chat.err.count("\n") == 1
    for command in ("doctor", "explain"):
        ran = fluxibly(command, "--config", str(file))
        assert (ran.status, ran.out, ran.err) == (2, "", chat.err)


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
def test_what_cannot_be_made_is_told_in_the_words_of_a_chat(fluxibly: CommandLine, tmp_path: Path, text: str) -> None:
    """`doctor` makes the provider and the stack, and shows why a chat would not begin."""
    install(tmp_path, "acme", "acme = acme:make", code="def make(config): raise OSError('the license is gone')")
    install(tmp_path, "nothing", "nothing = nothing:make", group=MIDDLEWARE, code="def make(): return None")
    file = tmp_path / "config.yaml"
    file.write_text(text)
    chat = fluxibly("chat", "--config", str(file), "x")
    assert chat.status != 0
    said = re.sub(r"^fluxibly: (OSError|TypeError)?(: )?", "", chat.err.splitlines()[0])
    ran = fluxibly("doctor", "--config", str(file))
    assert ran.status == 1
    assert said in ran.out


def test_the_stores_of_a_stack(fluxibly: CommandLine, tmp_path: Path) -> None:
    """Each is asked once; one that does not answer is a failure, and no password is shown."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"redis://:secret@127.0.0.1:{nobody.getsockname()[1]}/0"
        layers: list[Any] = [
            {"cache": {"store": url, "namespace": "tests"}},
            {"rate_limit": {"requests": 60, "store": url}},
            {"concurrency": {"limit": 3, "store": f"sqlite:{tmp_path / 'shared.db'}"}},
            "retry",
        ]
        file = tmp_path / "config.yaml"
        file.write_text(json.dumps({"llm": {"framework": "echo", "model": "m", "middleware": layers}}))
        ran = fluxibly("doctor", "--config", str(file))
        assert ran.status == 1
        stores = [line for line in ran.out.splitlines() if line.startswith("store")]
        assert len(stores) == 2
        assert "RedisStore('redis://***@127.0.0.1" in stores[0]
        assert "does not work" in stores[0]
        assert "answers in" in stores[1]
        assert "secret" not in ran.out + ran.err
        file.write_text(json.dumps({"llm": {"framework": "echo", "model": "m", "middleware": layers[2:]}}))
        assert fluxibly("doctor", "--config", str(file)).status == 0


def test_a_configuration_that_is_right(fluxibly: CommandLine, tmp_path: Path) -> None:
    """Only what the configuration needs is checked: another framework's broken plugin is no failure."""
    install(tmp_path, "broken", "broken = broken:Provider")
    file = tmp_path / "config.yaml"
    file.write_text("llm: {framework: echo, model: '-', middleware: [logging, retry: {max_retries: 1}]}")
    ran = fluxibly("doctor", "--config", str(file))
    assert (ran.status, ran.err) == (0, "")
    assert rows(ran, "framework") == [["framework", "echo", "ready"]]
    assert not rows(ran, "plugin")
    assert "Retry" in fluxibly("explain", "--config", str(file)).out
    assert fluxibly("chat", "--config", str(file), "x").out == "x\n"


def test_another_framework_than_the_file_s(fluxibly: CommandLine, tmp_path: Path) -> None:
    """The file's own framework is not looked at."""
    file = tmp_path / "config.yaml"
    file.write_text("llm: {framework: gone, model: m}")
    ran = fluxibly("chat", "--config", str(file), "--framework", "echo", "--model", "m", "x")
    assert (ran.status, ran.out) == (0, "x\n")
    ran = fluxibly("chat", "--config", str(file), "--framework", "opnai", "--model", "m", "x")
    assert ran.status == 2
    assert ran.err.startswith("fluxibly: did you mean 'openai'? LLM framework 'opnai' not registered.")


def test_an_address_in_the_environment(fluxibly: CommandLine, tmp_path: Path) -> None:
    """Doctor asks the server that a call would ask, with the configuration's headers, and says where the address is from."""
    file = tmp_path / "gateway.yaml"
    file.write_text("llm: {framework: openai, model: m, headers: {x-gateway: harbour}}")
    with canned_server() as server:
        host = server.url.removeprefix("http://")
        fluxibly.set(OPENAI_BASE_URL=f"{server.url}/v1")
        ran = fluxibly("doctor", "--config", str(file))
        assert re.search(rf"openai +{host} \(from OPENAI_BASE_URL\) answers in", ran.out)
        assert ran.status == 0
        assert [(seen.path, seen.headers["x-gateway"]) for seen in server.got] == [("/v1/models", "harbour")]
    fluxibly.set(OPENAI_BASE_URL="gateway/v1")
    ran = fluxibly("doctor", "--config", str(file))
    assert "OPENAI_BASE_URL: expected an http:// or https:// URL" in ran.out
    assert ran.status == 1


def test_other_variables_are_as_good_as_a_key(fluxibly: CommandLine) -> None:
    """A framework is ready if any of the variables is set with which its vendor's client works."""
    fluxibly.set(ANTHROPIC_AUTH_TOKEN="t", GOOGLE_API_KEY="k", OPENAI_BASE_URL="http://127.0.0.1:9/v1")  # noqa: S106
    ran = fluxibly("frameworks")
    assert [rows(ran, name)[0][1] for name in ("anthropic", "gemini", "vertex", "openai", "groq")] == [
        *["ready"] * 4,
        "not ready",
    ]


def test_the_credentials_of_a_cloud(fluxibly: CommandLine, tmp_path: Path) -> None:
    """`doctor` looks for the credentials without which a chat would fail, and `frameworks` for their files."""
    file = tmp_path / "framework.yaml"
    fluxibly.set(AWS_EC2_METADATA_DISABLED="true")
    with canned_server() as server:
        file.write_text(f"llm: {{framework: bedrock, model: m, region: us-east-1, api_base: '{server.url}'}}")
        ran = fluxibly("doctor", "--config", str(file))
        assert "bedrock found no AWS credentials" in ran.out
        assert ran.status == 1
        assert rows(fluxibly("frameworks"), "bedrock")[0][1:] == [
            "not ready",
            "set AWS_BEARER_TOKEN_BEDROCK, or AWS credentials",
        ]
        (tmp_path / ".aws").mkdir()
        (tmp_path / ".aws" / "credentials").write_text("[default]\naws_access_key_id = k\naws_secret_access_key = s\n")
        ran = fluxibly("doctor", "--config", str(file))
        assert re.search(r"bedrock +127.0.0.1:\d+ answers in", ran.out), ran.out
        assert ran.status == 0
        assert rows(fluxibly("frameworks"), "bedrock")[0][1] == "ready"


def test_another_framework_is_not_in_the_file_s_region(fluxibly: CommandLine, tmp_path: Path) -> None:
    """`--framework` leaves the region, the project and the quirks of the file's service out."""
    file = tmp_path / "framework.yaml"
    file.write_text("llm: {framework: vertex, model: m, region: us-east1, project: p, api_key: k}")
    ran = fluxibly("chat", "--config", str(file), "--framework", "echo", "--model", "m", "hello")
    assert (ran.out.splitlines()[0], ran.status) == ("hello", 0), ran
    file.write_text("llm: {framework: openai, model: m, api_key: k, quirks: {top_k: true}}")
    ran = fluxibly("chat", "--config", str(file), "--framework", "echo", "--model", "m", "hello")
    assert (ran.out.splitlines()[0], ran.status) == ("hello", 0), ran


def test_what_a_person_sees(fluxibly: CommandLine, tmp_path: Path) -> None:
    """The ready ones come first, those that nobody has begun share a line, and what is to do has numbers."""
    wrong = "sk-wrong-9876543210"
    file = tmp_path / "my.env"
    file.write_text(f"ANTHROPIC_API_KEY={KEY}")
    with model_server() as server:
        fluxibly.set(ANTHROPIC_BASE_URL=f"{server.url}/anthropic")
        fluxibly.set(OPENAI_API_KEY=wrong, OPENAI_BASE_URL=f"{server.url}/openai/v1")
        fluxibly.set(AZURE_OPENAI_API_KEY=KEY)
        ran = fluxibly.at_terminal("doctor", "--env-file", str(file))
    assert ran.status == 1
    assert max(map(len, ran.lines)) <= 80
    assert KEY not in ran.out
    assert wrong not in ran.out
    text = " ".join(ran.out.split())
    assert "from ANTHROPIC_BASE_URL" in text
    assert "ANTHROPIC_API_KEY from" in text
    marks = [line.split()[:2] for line in ran.lines if line[1:2] in {"✓", "✗"}]
    assert marks[0] == ["✓", "anthropic"]
    assert [name for mark, name in marks if mark == "✗"] == ["azure", "openai", "openai-responses"]
    assert [mark for mark, _ in marks] == sorted((mark for mark, _ in marks), key="✓✗".index)
    assert "not running llamacpp, lmstudio, ollama, ollama-generate, vllm not set up bedrock, cerebras, " in text
    assert text.count("cerebras") == 1
    to_do = ran.lines[ran.lines.index("3 things to do") + 1 :]
    numbered = [line for line in to_do if re.match(r" \d\. ", line)]
    assert numbered[0] == " 1. azure: set AZURE_OPENAI_ENDPOINT"
    assert numbered[1].startswith(" 2. openai: check OPENAI_API_KEY from the environment; ")
    assert numbered[2].startswith(" 3. openai-responses: check OPENAI_API_KEY from the environment; ")
    assert len(numbered) == 3


@pytest.mark.parametrize("columns", [40, 80, 120])
@pytest.mark.parametrize("command", ["doctor", "frameworks"])
def test_nothing_is_set_up(fluxibly: CommandLine, command: str, columns: int) -> None:
    """There is nothing to do, and no line is too long for the terminal."""
    ran = fluxibly.at_terminal(command, columns=columns)
    assert ran.status == 0
    assert max(map(len, ran.lines)) <= columns
    assert "Nothing to do" in ran.out
    assert "`fluxibly frameworks --all` says what each needs." in " ".join(ran.out.split())


def test_what_frameworks_shows_a_person(fluxibly: CommandLine) -> None:
    """Where each key is; what is half set up; all of them only if asked."""
    fluxibly.set(GROQ_API_KEY=KEY, AZURE_OPENAI_ENDPOINT="http://127.0.0.1:9")
    ran = fluxibly.at_terminal("frameworks")
    assert " ✓ groq            GROQ_API_KEY from the environment" in ran.lines
    assert ran.lines[-2:] == ["1 thing to do", " 1. azure: set AZURE_OPENAI_API_KEY"]
    everything = fluxibly.at_terminal("frameworks", "--all")
    assert any(line.split() == ["cerebras", "not", "ready", "set", "CEREBRAS_API_KEY"] for line in everything.lines)
    plain = fluxibly("frameworks")
    assert [line.split() for line in plain.lines] == [line.split() for line in everything.lines[1:]]


@pytest.mark.parametrize(
    ("settings", "variables", "says"),
    [
        ({}, {"OPENAI_API_KEY": KEY}, ", OPENAI_API_KEY from the environment"),
        ({"api_key": KEY}, {"OPENAI_API_KEY": "other"}, ", api_key from FILE"),
        ({"headers": {"authorization": f"Bearer {KEY}"}}, {}, ", headers from FILE"),
    ],
)
def test_where_a_key_was_found(
    fluxibly: CommandLine, tmp_path: Path, settings: dict[str, Any], variables: dict[str, str], says: str
) -> None:
    """It is the key that a call would send; and never the key itself."""
    file = tmp_path / "gateway.yaml"
    with model_server() as server:
        config = {"framework": "openai", "model": "gpt-5", "api_base": f"{server.url}/openai/v1", **settings}
        file.write_text(json.dumps({"llm": config}))
        fluxibly.set(**variables)
        ran = fluxibly("doctor", "--config", str(file))
    (line,) = (line for line in ran.lines if "openai" in line and line.startswith("framework"))
    assert ran.status == 0, ran.out
    assert line.endswith(says.replace("FILE", str(file)))
    assert KEY not in ran.out


def test_a_model_that_is_not_in_the_list(fluxibly: CommandLine, tmp_path: Path) -> None:
    """A name that is nearly one of the service's is to be looked at. Another may be an alias, which no list has."""
    with model_server() as server:
        fluxibly.set(OPENAI_API_KEY=KEY, OPENAI_BASE_URL=f"{server.url}/openai/v1")
        ran = fluxibly.at_terminal("doctor", "--framework", "openai", "--model", "gpt-5-mimi")
        assert ran.status == 0
        assert "1. openai: did you mean the model 'gpt-5-mini'? Its list has no 'gpt-5-mimi'" in ran.out
        for model in ("gpt-5-mini", "my-own"):
            assert "Nothing to do" in fluxibly.at_terminal("doctor", "--framework", "openai", "--model", model).out


def test_an_account_that_may_not_list(fluxibly: CommandLine) -> None:
    """A service that answers is ready, whether or not it lists its models; one that refuses the key is not."""
    with model_server() as server:
        for status, ready in {403: False, 401: False, 404: True, 500: True}.items():
            server.answers["/openai/v1/models"] = (status, {"error": {"message": "no list for you"}})
            fluxibly.set(GROQ_API_KEY=KEY, GROQ_BASE_URL=server.url)
            ran = fluxibly("doctor", "--framework", "groq", "--model", "m")
            assert ran.status == (0 if ready else 1)
            assert ("answers in" if ready else "refuses the key") in ran.out
            assert "no list for you" in ran.out
