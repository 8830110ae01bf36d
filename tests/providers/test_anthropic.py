"""The framework anthropic: the address of its requests, and real servers that speak its dialect."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.anthropic import finish, start, text_block
from support.dialects import ask, sse

from fluxibly import LLMConfig, Message, Pipeline, Request
from fluxibly.errors import AuthenticationError, BadRequest, ContextLengthExceeded, RateLimitError
from fluxibly.providers.anthropic import AnthropicProvider
from fluxibly.testing.modes import MODES, Mode
from fluxibly.types import Image

KEY = "sk-ant-test-0123456789"


@pytest.mark.parametrize(
    ("api_base", "url"),
    [
        (None, "https://api.anthropic.com/v1/messages"),
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080/v1/messages"),
        ("http://127.0.0.1:8080/v1/", "http://127.0.0.1:8080/v1/messages"),
        ("https://proxy.test/anthropic", "https://proxy.test/anthropic/v1/messages"),
    ],
)
def test_where_requests_go(api_base: str | None, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`api_base` works with or without the version, and requests have the service's headers."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        body = sse(start(input_tokens=1), *text_block("Hi"), *finish("end_turn"))
        return httpx.Response(200, content=body, headers={"content-type": "text/event-stream", "request-id": "req_1"})

    config = LLMConfig(framework="anthropic", model="claude-haiku-4-5", api_base=api_base)
    provider = AnthropicProvider(config, transport=httpx.MockTransport(answer))
    with Pipeline(provider, []).stream(Request(model="claude-haiku-4-5", messages="Hi")) as stream:
        assert "".join(chunk.text for chunk in stream) == "Hi"
    (request,) = seen
    assert str(request.url) == url
    assert (request.headers["x-api-key"], request.headers["anthropic-version"]) == (KEY, "2023-06-01")
    assert "authorization" not in request.headers
    assert stream.response.request_id == "req_1"


def test_missing_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error for a missing key names the environment variable."""
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    with pytest.raises(AuthenticationError, match="ANTHROPIC_API_KEY"):
        AnthropicProvider(LLMConfig(framework="anthropic", model="claude-haiku-4-5"))


# llama.cpp, with a real model


@pytest.fixture
def llama(local_server: str) -> LLMConfig:
    return LLMConfig(
        framework="anthropic", model="smollm2", api_key=KEY, api_base=local_server, max_tokens=12, temperature=0
    )


@pytest.mark.model
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_real_model(llama: LLMConfig, mode: Mode) -> None:
    """A real model answers a conversation with a system message, in every mode."""
    messages = [
        Message.system("Answer in one word."),
        Message.user("Say hello."),
        Message.assistant("Hello."),
        Message.user("Count to fifty."),
    ]
    response = ask(llama, mode, messages)
    assert response.text
    assert response.finish_reason in ("stop", "length")
    assert response.usage is not None
    assert (response.usage.input_tokens or 0) > 10
    assert 0 < (response.usage.output_tokens or 0) <= 12
    assert response.id


@pytest.mark.model
def test_modes_agree_on_a_real_model(llama: LLMConfig) -> None:
    """At temperature 0 the answer is the same in every mode."""
    texts = {ask(llama, mode, "Name a colour.", max_tokens=6).text for mode in MODES}
    assert len(texts) == 1


@pytest.mark.model
@pytest.mark.parametrize("mode", [MODES[0], MODES[-1]], ids=str)
def test_errors_of_a_real_server(llama: LLMConfig, mode: Mode) -> None:
    """Overlong prompts, wrong parameters and llama.cpp's 500 for unsupported requests raise non-retryable errors."""
    with pytest.raises(ContextLengthExceeded):
        ask(llama, mode, "word " * 4000)
    with pytest.raises(BadRequest):
        ask(llama, mode, "Hi", extra={"temperature": "hot"})
    with pytest.raises(BadRequest, match="image input is not supported") as caught:
        ask(llama, mode, [Message.user(Image(data=b"\x89PNG", media_type="image/png"))])
    assert not caught.value.retryable


# llm-katan, which imitates Anthropic's errors


@pytest.fixture(scope="module")
def katan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run a mock of Anthropic's service, which rejects all requests after the third, and yield its address."""
    program = shutil.which("llm-katan", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        pytest.skip("llm-katan is not installed; it is in the extra dev")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {
        "--model": "m",
        "--backend": "echo",
        "--providers": "openai,anthropic",
        "--host": "127.0.0.1",
        "--port": str(port),
        "--rate-limit-after": "3",
        "--api-keys": f"anthropic={KEY}",
        "--stats-file": str(tmp_path_factory.mktemp("katan") / "stats.json"),
    }
    command = [program, "--validate-keys", *(word for option in options.items() for word in option)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=20)


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until a server listens."""
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None, "the server ended before it listened"
        time.sleep(0.1)
    raise AssertionError("the server did not listen within a minute")


def test_a_mock_of_the_service(katan: str) -> None:
    """The mock rejects a wrong key, answers three requests (whole and streamed), and then limits the rate."""
    wrong = "sk-ant-wrong-9876543210"
    config = LLMConfig(framework="anthropic", model="m", api_base=katan, api_key=KEY)
    refused = LLMConfig(framework="anthropic", model="m", api_base=katan, api_key=wrong)
    with pytest.raises(AuthenticationError) as caught:
        ask(refused, MODES[0], "Hi")
    assert (caught.value.status, caught.value.code) == (401, "authentication_error")
    assert wrong not in f"{caught.value} {caught.value.body} {caught.value!r}"  # this server echoes it
    for mode in (MODES[0], MODES[-1], Mode(streaming=True)):
        response = ask(config, mode, "Hello there")
        assert "Hello there" in response.text
        assert (response.finish_reason, response.model) == ("stop", "m")
    for mode in MODES:
        with pytest.raises(RateLimitError) as limited:
            ask(config, mode, "Hi")
        assert (limited.value.status, limited.value.code, limited.value.retryable) == (429, "rate_limit_error", True)
