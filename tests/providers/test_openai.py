"""The providers of OpenAI's dialects: the address, the key and the name of each."""

from __future__ import annotations

import json
from typing import Any

import anyio
import httpx
import pytest

from fluxibly.config import LLMConfig
from fluxibly.errors import (
    AuthenticationError,
    ConfigError,
    NotFound,
    RateLimitError,
    ServerError,
    StreamInterrupted,
)
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.providers.openai import AsyncOpenAIProvider, OpenAIProvider
from fluxibly.providers.services import SERVICES
from fluxibly.types import Message, Reasoning, Request, Response, Text, Tool

BASE = "https://example.test/base"


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the keys of the user who runs the tests from the environment."""
    for row in SERVICES.values():
        monkeypatch.delenv(row.env_var, raising=False)
    monkeypatch.delenv("OPENAI_API_VERSION", raising=False)


class Server:
    """A mock server that answers every request alike, and keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if request.url.path.endswith("/responses"):
            return httpx.Response(200, json={"output": [{"type": "message", "content": [{"text": "Hi"}]}]})
        return httpx.Response(200, json={"choices": [{"message": {"content": "Hi"}, "finish_reason": "stop"}]})


def config(framework: str, **fields: Any) -> LLMConfig:
    return LLMConfig(framework=framework, model="some/model", **fields)


def ask(framework: str, *, max_tokens: int | None = None, model: str = "some/model", **fields: Any) -> httpx.Request:
    """Return the request that a framework's provider sends."""
    server = Server()
    provider = OpenAIProvider(config(framework, **fields), transport=httpx.MockTransport(server))
    with Pipeline(provider) as pipeline:
        assert pipeline.complete(Request(model=model, messages="Hello", max_tokens=max_tokens)).text == "Hi"
    return server.requests[0]


@pytest.mark.parametrize("framework", SERVICES)
def test_a_provider_is_named_after_its_service(framework: str) -> None:
    """The sync and async providers of a service have the same info, named after the service."""
    settings = config(framework, api_key="k", api_base=BASE)
    info = OpenAIProvider(settings).info
    assert info == AsyncOpenAIProvider(settings).info
    assert info.name == f"{SERVICES[framework].name}Provider"
    assert repr(OpenAIProvider(settings)) == f"{info.name}({BASE})"
    assert repr(AsyncOpenAIProvider(settings)) == f"Async{info.name}({BASE})"
    assert (info.framework, info.server_address) == (framework, "example.test")
    assert info.telemetry_name == (SERVICES[framework].telemetry_name or framework)


def test_a_class_of_the_users_own_keeps_its_name() -> None:
    """A user's own class speaks OpenAI's dialect under its own framework; logs name the class."""

    class MineProvider(OpenAIProvider):
        pass

    info = MineProvider(config("mine", api_base=BASE)).info
    assert (info.name, info.framework) == ("MineProvider", "openai")


@pytest.mark.parametrize("framework", sorted(set(SERVICES) - {"azure"}))
def test_where_each_preset_sends(framework: str) -> None:
    """Each preset sends below its service's base URL, with the key as a bearer token."""
    row = SERVICES[framework]
    request = ask(framework, api_key="k-1")
    assert str(request.url) == f"{row.base_url}{row.quirks.get('path', '/chat/completions')}"
    assert request.headers["authorization"] == "Bearer k-1"
    assert json.loads(request.content)["model"] == "some/model"


@pytest.mark.parametrize(
    ("api_base", "url"),
    [
        ("https://me.openai.azure.com", "/openai/deployments/some%2Fmodel/chat/completions?api-version=2024-10-21"),
        (
            "https://me.openai.azure.com/openai/",
            "/openai/deployments/some%2Fmodel/chat/completions?api-version=2024-10-21",
        ),
        ("https://me.openai.azure.com/openai/v1", "/openai/v1/chat/completions"),
        (
            "https://me.openai.azure.com/openai/deployments/mine",
            "/openai/deployments/mine/chat/completions?api-version=2024-10-21",
        ),
        (
            "https://me.openai.azure.com?api-version=2030-01-01",
            "/openai/deployments/some%2Fmodel/chat/completions?api-version=2030-01-01",
        ),
    ],
)
def test_azure(api_base: str, url: str) -> None:
    """The deployment is in the path, the version in the query, and the key in Azure's own header."""
    request = ask("azure", api_base=api_base, api_key="k-1")
    assert str(request.url) == f"https://me.openai.azure.com{url}"
    assert request.headers["api-key"] == "k-1"
    assert "authorization" not in request.headers


def test_azure_takes_the_version_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """OPENAI_API_VERSION sets the version, as for OpenAI's own client; Azure requires `api_base`."""
    monkeypatch.setenv("OPENAI_API_VERSION", "2031-01-01")
    assert ask("azure", api_base="https://me.openai.azure.com", api_key="k").url.params["api-version"] == "2031-01-01"
    with pytest.raises(ConfigError, match="api_base"):
        OpenAIProvider(config("azure", api_key="k"))


def test_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys come from the environment. A missing key is an error, except for local servers and a user's own server."""
    with pytest.raises(AuthenticationError, match="GROQ_API_KEY"):
        OpenAIProvider(config("groq"))
    with pytest.raises(AuthenticationError, match="OPENAI_API_KEY"):
        OpenAIProvider(config("openai"))
    for framework, base in (("vllm", None), ("lmstudio", None), ("llamacpp", None), ("openai", BASE)):
        assert "authorization" not in ask(framework, api_base=base).headers
    monkeypatch.setenv("GROQ_API_KEY", "k-2")
    assert ask("groq").headers["authorization"] == "Bearer k-2"


@pytest.mark.parametrize(
    ("api_base", "model", "name"),
    [
        (None, "gpt-4o", "max_completion_tokens"),
        ("https://api.openai.com/v1", "gpt-3.5-turbo", "max_completion_tokens"),
        (BASE, "llama", "max_tokens"),
        (BASE, "gpt-5", "max_completion_tokens"),
    ],
)
def test_max_tokens_at_openai_and_elsewhere(api_base: str | None, model: str, name: str) -> None:
    """OpenAI has renamed `max_tokens`; compatible servers have not."""
    body = json.loads(ask("openai", api_base=api_base, api_key="k", model=model, max_tokens=5).content)
    assert body[name] == 5


@pytest.mark.parametrize(
    ("fields", "returned"),
    [
        ({}, {}),
        ({"api_base": "https://api.openai.com/v1"}, {}),
        (
            {"api_base": BASE},
            {"reasoning_content": "Hm.", "extra_content": {"google": {"thought_signature": "s"}}},
        ),
        ({"api_base": "http://localhost:11434/v1"}, {"reasoning_content": "Hm."}),
        ({"api_base": "https://api.groq.com/openai/v1"}, {}),
        ({"api_base": "https://api.deepseek.com/beta"}, {"reasoning_content": "Hm."}),
        ({"api_base": BASE, "quirks": {"reasoning_fields": [], "message_fields": []}}, {}),
        ({"quirks": {"reasoning_fields": ["reasoning_content"]}}, {"reasoning_content": "Hm."}),
    ],
)
def test_what_goes_back_to_a_server(fields: dict[str, Any], returned: dict[str, Any]) -> None:
    """A user's own server gets back all that it sent; a known host gets what its service takes; quirks decide."""
    answer = Message.assistant(
        [
            Reasoning(text="Hm.", raw={"reasoning_content": "Hm."}),
            Text("Ten.", raw={"extra_content": {"google": {"thought_signature": "s"}}}),
        ]
    )
    server = Server()
    provider = OpenAIProvider(config("openai", api_key="k", **fields), transport=httpx.MockTransport(server))
    with Pipeline(provider) as pipeline:
        pipeline.complete(
            Request(model="m", messages=[Message.user("Hi"), answer, Message.user("And?")], tools=[Tool("clock")])
        )
    message = json.loads(server.requests[0].content)["messages"][1]
    assert {name: message[name] for name in returned} == returned
    assert ("reasoning_content" in message) == ("reasoning_content" in returned)
    assert "extra_content" not in message or "api_base" in fields


def test_quirks_of_a_configuration_replace_those_of_the_service() -> None:
    """A setting decides about a service that is known, and about a user's own class."""
    body = json.loads(
        ask("groq", api_key="k", max_tokens=5, quirks={"max_tokens": "max_completion_tokens", "lacks": []}).content
    )
    assert body["max_completion_tokens"] == 5


def test_the_asynchronous_twin_asks_alike() -> None:
    """The async provider sends the same request and returns the same response."""
    server = Server()

    async def main() -> Response:
        provider = AsyncOpenAIProvider(config("openrouter", api_key="k"), transport=httpx.MockTransport(server))
        async with AsyncPipeline(provider) as pipeline:
            return await pipeline.complete(Request(model="some/model", messages="Hello"))

    assert anyio.run(main).text == "Hi"
    expected = ask("openrouter", api_key="k")
    assert (str(server.requests[0].url), server.requests[0].content) == (str(expected.url), expected.content)


def test_an_error_says_who_and_what() -> None:
    """An error has its class, the service, the model, the request's id and advice."""

    def refuse(request: httpx.Request) -> httpx.Response:
        error = {"error": {"message": "The model `x` does not exist", "code": "model_not_found"}}
        return httpx.Response(404, headers={"x-request-id": "req_1"}, json=error)

    provider = OpenAIProvider(config("together", api_key="k"), transport=httpx.MockTransport(refuse))
    with (
        pytest.raises(NotFound, match="Together answered 404 model_not_found") as caught,
        Pipeline(provider) as pipeline,
    ):
        pipeline.complete(Request(model="some/model", messages="Hello"))
    error = caught.value
    assert (error.provider, error.model, error.request_id) == ("together", "some/model", "req_1")


@pytest.mark.parametrize("stream", [False, True])
def test_the_headers_of_a_200_are_hints_for_its_error(stream: bool) -> None:
    """The retry delay and the request's id come from the headers; the error is in the body, or in the stream."""

    def answer(request: httpx.Request) -> httpx.Response:
        error = json.dumps({"error": {"code": 429, "message": "slow down"}})
        words = json.dumps({"choices": [{"delta": {"content": "Hi"}}]})
        body, kind = (f"data: {words}\n\ndata: {error}\n\n", "event-stream") if stream else (error, "json")
        headers = {"retry-after": "7", "x-request-id": "req_1", "content-type": f"text/{kind}"}
        return httpx.Response(200, headers=headers, content=body)

    provider = OpenAIProvider(config("together", api_key="k"), transport=httpx.MockTransport(answer))
    request = Request(model="some/model", messages="Hello")
    with Pipeline(provider) as pipeline:
        if stream:
            with pytest.raises(StreamInterrupted) as interrupted:
                list(pipeline.stream(request))
            assert interrupted.value.partial.text == "Hi"
            error = interrupted.value.__cause__
        else:
            with pytest.raises(RateLimitError) as refused:
                pipeline.complete(request)
            error = refused.value
    assert isinstance(error, RateLimitError)
    assert (error.retry_after, error.request_id, error.status) == (7, "req_1", 429)


def test_an_error_of_a_server_of_ones_own_does_not_blame_openai() -> None:
    """An error of a user's own server names its host rather than OpenAI."""
    transport = httpx.MockTransport(lambda _: httpx.Response(500))
    provider = OpenAIProvider(config("openai", api_base=BASE), transport=transport)
    with pytest.raises(ServerError, match=r"example\.test answered 500: an empty body"), Pipeline(provider) as pipeline:
        pipeline.complete(Request(model="some/model", messages="Hello"))
