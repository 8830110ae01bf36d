"""The frameworks ollama and ollama-generate: the address of their requests, and the real server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.dialects import ask
from support.ollama import last, ndjson

from fluxibly import LLMConfig, Message, Pipeline, Request
from fluxibly.errors import ConfigError, NotFound
from fluxibly.providers.ollama import OllamaGenerateProvider, OllamaProvider, host_url
from fluxibly.testing.modes import MODES, Mode

RUN = Path(os.environ.get("FLUXIBLY_OLLAMA_RUN") or Path(__file__).parents[3] / "shared" / "ollama" / "run.sh")


def request_of(provider: type[OllamaProvider | OllamaGenerateProvider], **settings: str) -> httpx.Request:
    """Return the HTTP request that a call makes."""
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, content=ndjson(last(content="Hi")), headers={"content-type": "application/json"})

    config = LLMConfig(framework="ollama", model="qwen3", **settings)
    pipeline = Pipeline(provider(config, transport=httpx.MockTransport(answer)), [])
    assert pipeline.complete(Request(model="qwen3", messages="Hi")).text == "Hi"
    return seen[0]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OLLAMA_HOST", "OLLAMA_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def test_where_requests_go() -> None:
    """Requests go to the local server by default, without a key."""
    request = request_of(OllamaProvider)
    assert str(request.url) == "http://127.0.0.1:11434/api/chat"
    assert "authorization" not in request.headers
    assert str(request_of(OllamaGenerateProvider).url) == "http://127.0.0.1:11434/api/generate"


@pytest.mark.parametrize("path", ["", "/", "/api", "/v1/"])
def test_api_base(path: str) -> None:
    """`api_base` may be the server's root, or the base path of any of its APIs."""
    request = request_of(OllamaProvider, api_base=f"http://gpu.test:9000{path}", api_key="k")
    assert str(request.url) == "http://gpu.test:9000/api/chat"
    assert request.headers["authorization"] == "Bearer k"


def test_host_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """OLLAMA_HOST applies unless `api_base` is set."""
    monkeypatch.setenv("OLLAMA_HOST", "gpu.test:9000")
    assert str(request_of(OllamaProvider).url) == "http://gpu.test:9000/api/chat"
    assert request_of(OllamaProvider, api_base="http://other.test").url.host == "other.test"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("example.test", "http://example.test:11434"),
        ("example.test:56789/", "http://example.test:56789"),
        (":56789", "http://127.0.0.1:56789"),
        ("http://example.test", "http://example.test"),
        ("https://example.test/path/", "https://example.test/path"),
        ("0.0.0.0", "http://127.0.0.1:11434"),  # noqa: S104  # nothing listens there
        ("[::]:8080", "http://[::1]:8080"),
        ("[0001:002:003:0004::1]", "http://[0001:002:003:0004::1]:11434"),
        ('"127.0.0.1:1"', "http://127.0.0.1:1"),
    ],
)
def test_host_urls(host: str, url: str) -> None:
    """Values of OLLAMA_HOST are read as Ollama's own programs read them."""
    assert host_url(host) == url


@pytest.mark.parametrize("host", ["ftp://example.test", "example.test:port", "http://[::1"])
def test_invalid_hosts(host: str) -> None:
    """The error for an invalid host names the variable."""
    with pytest.raises(ConfigError, match="OLLAMA_HOST"):
        host_url(host)


def test_hosts_as_the_official_client_reads_them() -> None:
    """The `ollama` package reads the same server from the variable."""
    ollama_client = pytest.importorskip("ollama._client")
    for host in (
        "example.test",
        "example.test:56789",
        "http://example.test",
        "https://example.test:1/path",
        ":80",
        "[::1]",
    ):
        assert httpx.URL(host_url(host)) == httpx.URL(ollama_client._parse_host(host))


# The real server


@pytest.fixture(scope="module")
def server(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run a real Ollama server with the model `smollm2`, and yield its address."""
    if not RUN.exists():
        pytest.skip(f"the script {RUN}, which runs Ollama, does not exist; set FLUXIBLY_OLLAMA_RUN to another script")
    folder = tmp_path_factory.mktemp("ollama")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (folder / "run.log").open("w") as log:
        started = subprocess.run(
            ["bash", RUN, folder, gguf, str(port)],  # noqa: S607  # the tester's own bash
            stdout=log,
            stderr=log,
            timeout=300,
            check=False,
        )
    try:
        if started.returncode:
            pytest.skip(f"Ollama cannot be run here: {(folder / 'run.log').read_text()[-300:]}")
        yield f"http://127.0.0.1:{port}"
    finally:
        if (folder / "pid").exists():
            os.kill(int((folder / "pid").read_text()), signal.SIGTERM)


@pytest.mark.ollama
@pytest.mark.timeout(600)
@pytest.mark.parametrize("framework", ["ollama", "ollama-generate"])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_the_real_server(server: str, framework: str, mode: Mode) -> None:
    """Both endpoints of the real server answer in every mode."""
    config = LLMConfig(framework=framework, model="smollm2", api_base=server, max_tokens=12, temperature=0)
    response = ask(config, mode, [Message.system("Be brief."), Message.user("Count to fifty.")], seed=1)
    assert response.text
    assert response.finish_reason in ("stop", "length")
    assert response.model == "smollm2"
    assert response.usage is not None
    assert 0 < (response.usage.output_tokens or 0) <= 12


@pytest.mark.ollama
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", [MODES[0], MODES[-1]], ids=str)
def test_a_missing_model(server: str, mode: Mode) -> None:
    """The error for a missing model says how to get it."""
    with pytest.raises(NotFound, match="ollama pull nothing"):
        ask(LLMConfig(framework="ollama", model="nothing", api_base=server), mode, "Hi")


@pytest.mark.ollama
@pytest.mark.timeout(600)
def test_json_from_the_real_server(server: str) -> None:
    """The real server's answer follows a JSON Schema."""
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    config = LLMConfig(framework="ollama", model="smollm2", api_base=server, max_tokens=40, temperature=0)
    response = ask(config, MODES[0], "Say a number as JSON.", response_format=schema)
    assert isinstance(json.loads(response.text)["n"], int)
