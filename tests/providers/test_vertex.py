"""The framework vertex: addresses, settings, keys and Google credentials, and both dialects over real connections."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import pytest
from support.anthropic import start, text_block
from support.clients import PLAIN
from support.dialects import PNG, WEATHER, ask, sse
from support.gemini import answer
from support.google import (
    ACCOUNT,
    CLIENT_SECRET,
    EVENTS,
    JSON,
    REFRESH_TOKEN,
    SCOPE,
    TOKEN,
    VARIABLES,
    Google,
    Reply,
    Seen,
    authorized_user,
    check_assertion,
    default_reply,
    failing,
    google,
    private_key,
    service_account,
)
from support.tracing_tools import Recorder, everything

from fluxibly import LLM, AsyncLLM, LLMConfig, StreamInterrupted
from fluxibly.errors import (
    AuthenticationError,
    BadRequest,
    ConfigError,
    ConnectionFailed,
    ProviderError,
    RateLimitError,
    RequestTimeout,
    StreamProtocolError,
)
from fluxibly.middleware import Retry
from fluxibly.providers import vertex
from fluxibly.providers.vertex import AsyncVertexProvider, GoogleCredentials, VertexProvider
from fluxibly.registry import make_provider
from fluxibly.testing.modes import MODES, Mode
from fluxibly.types import Message, Request, ToolCall

GEMINI, CLAUDE = "gemini-2.5-flash", "claude-sonnet-4-5@20250929"
API_KEY = "AIza-test-0123456789"
PLACE = "projects/p-1/locations/us-central1"

modes = pytest.mark.parametrize("mode", MODES, ids=str)
streams = pytest.mark.parametrize("mode", [mode for mode in MODES if mode.streaming], ids=str)


@pytest.fixture(autouse=True)
def _nothing_of_google(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide the variables and the credentials of this machine, which may be one of Google's."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "gcloud"))
    metadata = pytest.importorskip("google.auth.compute_engine._metadata")
    monkeypatch.setattr(metadata, "_NO_GCE_CHECK", True)


@pytest.fixture
def server() -> Iterator[Google]:
    with google() as found:
        yield found


@pytest.fixture
def account(server: Google, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Google:
    """Let google-auth find a service account whose tokens come from the server."""
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(service_account(tmp_path, server.url)))
    return server


@pytest.fixture
def user(server: Google, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Google:
    """Let google-auth find a user's login. It asks Google for the tokens of every login, and here the server."""
    from google.oauth2 import credentials

    monkeypatch.setattr(credentials, "_GOOGLE_OAUTH2_TOKEN_ENDPOINT", f"{server.url}/token")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(authorized_user(tmp_path, quota_project_id="q-1")))
    return server


def config(**settings: Any) -> LLMConfig:
    return LLMConfig(**{"framework": "vertex", "model": GEMINI, "max_retries": 0, **settings})


def reaching(server: Google, **settings: Any) -> LLMConfig:
    """Return a configuration that reaches the server, in a place of its own."""
    return config(**{"api_base": server.url, "project": "p-1", "region": "us-central1", **settings})


def texts_of(
    settings: LLMConfig, mode: Mode, calls: int = 1, *layers: Any, before: Callable[[int], object] = lambda _: None
) -> list[str]:
    """Return the texts of some calls of one LLM in a mode. `before` is called before each, with its number."""
    if mode.backend is None:
        with LLM(settings, middleware=layers) as llm:
            found = []
            for number in range(calls):
                before(number)
                found.append("".join(llm.forward_stream("Hi")) if mode.streaming else llm.forward("Hi"))
            return found

    async def main() -> list[str]:
        async with AsyncLLM(settings, middleware=layers) as llm:
            found = []
            for number in range(calls):
                before(number)
                if mode.streaming:
                    found.append("".join([text async for text in llm.forward_stream("Hi")]))
                else:
                    found.append(await llm.forward("Hi"))
            return found

    return anyio.run(main, backend=mode.backend)


class Sent:
    """A transport of httpx that keeps the requests, and answers as Vertex AI does."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.transport = httpx.MockTransport(self._reply)

    def _reply(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        status, content_type, body = default_reply(Seen("POST", str(request.url), {}, b""))
        return httpx.Response(status, headers={"content-type": content_type}, content=body)


def request_of(settings: LLMConfig, **fields: Any) -> httpx.Request:
    """Return the HTTP request that a call makes."""
    sent = Sent()
    with VertexProvider(settings, transport=sent.transport) as provider:
        provider.complete(Request(**{"model": settings.model, "messages": "Hi", **fields}))
    return sent.requests[0]


def request_of_genai(**settings: Any) -> httpx.Request:
    """Return the HTTP request that a call of google-genai makes."""
    genai = pytest.importorskip("google.genai")
    sent = Sent()
    with httpx.Client(transport=sent.transport) as http:
        options = {"httpx_client": http, "async_client_args": PLAIN}
        client = genai.Client(vertexai=True, http_options=options, **settings)
        client.models.generate_content(model=GEMINI, contents="Hi")
    return sent.requests[0]


# The official clients

GENAI: list[Any] = [
    {"role": "user", "parts": [{"text": "Look"}, {"inlineData": {"mimeType": "image/png", "data": "iVBORw=="}}]},
    {"role": "model", "parts": [{"functionCall": {"id": "c_1", "name": "weather", "args": {"city": "Ostend"}}}]},
    {"role": "user", "parts": [{"functionResponse": {"id": "c_1", "name": "weather", "response": {"output": "4"}}}]},
]
GENAI_CONFIG: dict[str, Any] = {
    "systemInstruction": {"parts": [{"text": "Be brief."}]},
    "temperature": 0.5,
    "topP": 0.9,
    "topK": 40,
    "maxOutputTokens": 4000,
    "stopSequences": ["E"],
    "frequencyPenalty": 0.1,
    "presencePenalty": 0.2,
    "seed": 3,
    "responseMimeType": "application/json",
    "responseJsonSchema": {"type": "object"},
    "thinkingConfig": {"thinkingBudget": 1024, "includeThoughts": True},
    "tools": [
        {
            "functionDeclarations": [
                {
                    "name": "weather",
                    "description": WEATHER.description,
                    "parametersJsonSchema": dict(WEATHER.parameters),
                }
            ]
        }
    ],
    "toolConfig": {"functionCallingConfig": {"mode": "ANY"}},
}
CONVERSATION = [
    Message.system("Be brief."),
    Message.user(["Look", PNG]),
    Message.assistant([ToolCall("c_1", "weather", {"city": "Ostend"})]),
    Message.tool("4", "c_1", name="weather"),
]
SAMPLING: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 40,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.2,
    "seed": 3,
    "response_format": {"type": "object"},
}
ASKED: dict[str, Any] = {
    "max_tokens": 4000,
    "stop": ["E"],
    "tools": [WEATHER],
    "tool_choice": "required",
    "reasoning_effort": "low",
}
SHARED = ("authorization", "content-type", "x-goog-api-key", "x-goog-user-project")
"""The headers that say who calls, and what is sent. The clients' other headers say who made them."""


def authority(seen: Seen) -> dict[str, str]:
    return {name: seen.headers[name] for name in SHARED if name in seen.headers}


def camel(value: Any) -> Any:
    """Return JSON with names as the services document them. The client leaves some in its own style, which is read too."""
    if isinstance(value, list):
        return [camel(each) for each in value]
    if isinstance(value, dict):
        return {re.sub("_(.)", lambda m: m[1].upper(), name): camel(each) for name, each in value.items()}
    return value


class TestOfficialClients:
    @pytest.mark.parametrize("stream", [False, True])
    def test_google_genai(self, account: Google, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """For the same conversation, google-genai sends the same request with the same authority."""
        genai = pytest.importorskip("google.genai")
        from google.oauth2.credentials import Credentials

        credentials = Credentials(f"{TOKEN}-1", quota_project_id="q-1")
        options = {"base_url": account.url, "client_args": PLAIN}
        client = genai.Client(
            vertexai=True, project="p-1", location="us-central1", credentials=credentials, http_options=options
        )
        call = client.models.generate_content_stream if stream else client.models.generate_content
        list(call(model=GEMINI, contents=GENAI, config=GENAI_CONFIG))
        client.close()
        monkeypatch.setenv("GOOGLE_CLOUD_QUOTA_PROJECT", "q-1")
        ask(reaching(account), Mode(stream), CONVERSATION, **ASKED, **SAMPLING)
        theirs, ours = account.seen
        assert (ours.method, ours.target) == (theirs.method, theirs.target)
        assert ours.body == camel(theirs.body)
        assert authority(ours) == authority(theirs)
        assert authority(ours)["x-goog-user-project"] == "q-1"

    @pytest.mark.parametrize("place", [{}, {"project": "p-1", "location": "us-central1"}])
    def test_google_genai_with_an_api_key(self, server: Google, place: dict[str, str]) -> None:
        """With an API key the path has a project only if the project is given beside the key."""
        genai = pytest.importorskip("google.genai")
        options = {"base_url": server.url, "client_args": PLAIN}
        client = genai.Client(vertexai=True, api_key=API_KEY, http_options=options, **place)
        client.models.generate_content(model=GEMINI, contents="Hi")
        client.close()
        settings = {"project": place.get("project"), "region": place.get("location")}
        ask(config(api_base=server.url, api_key=API_KEY, **settings), MODES[0], "Hi")
        theirs, ours = server.seen
        assert (ours.target, camel(theirs.body), authority(theirs)) == (theirs.target, ours.body, authority(ours))
        assert authority(ours) == {"content-type": "application/json", "x-goog-api-key": API_KEY}

    @pytest.mark.parametrize("project", [None, "p-1"])
    def test_google_genai_with_variables(
        self, account: Google, project: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A project in the environment counts more than an API key there, as for google-genai."""
        monkeypatch.setenv("GOOGLE_API_KEY", API_KEY)
        if project is not None:
            monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", project)
        theirs = request_of_genai()
        ours = request_of(config())
        assert ours.url == theirs.url
        assert ours.headers.get("x-goog-api-key") == theirs.headers.get("x-goog-api-key")
        assert ("x-goog-api-key" in ours.headers) == (project is None)
        assert ("authorization" in ours.headers) == ("authorization" in theirs.headers) == (project is not None)

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("model", [CLAUDE, "claude-opus-4-6"])
    def test_anthropic(self, account: Google, stream: bool, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """For the same conversation, AnthropicVertex sends the same request with the same authority.

        Its second major version names a newer version of the API, which the codec of Anthropic's dialect does not speak.
        It never sends the project whose quota is used.
        """
        anthropic = pytest.importorskip("anthropic")
        source = {"type": "base64", "media_type": "image/png", "data": "iVBORw=="}
        call = {"type": "tool_use", "id": "c_1", "name": "weather", "input": {"city": "Ostend"}}
        result = {"type": "tool_result", "tool_use_id": "c_1", "content": [{"type": "text", "text": "4"}]}
        thinking: Any = {"thinking": {"type": "enabled", "budget_tokens": 2048}}
        if model != CLAUDE:
            thinking = {"thinking": {"type": "adaptive", "display": "summarized"}, "output_config": {"effort": "low"}}
        tool = {"name": "weather", "description": WEATHER.description, "input_schema": dict(WEATHER.parameters)}
        with anthropic.AnthropicVertex(
            region="us-central1",
            project_id="p-1",
            access_token=f"{TOKEN}-1",
            base_url=f"{account.url}/v1",
            max_retries=0,
            http_client=anthropic.DefaultHttpxClient(**PLAIN),
        ) as client:
            made = client.messages.create(
                model=model,
                max_tokens=4000,
                system="Be brief.",
                stop_sequences=["E"],
                tools=[tool],
                tool_choice={"type": "any"},
                messages=[
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "Look"}, {"type": "image", "source": source}],
                    },
                    {"role": "assistant", "content": [call]},
                    {"role": "user", "content": [result]},
                ],
                **thinking,
                **({"stream": True} if stream else {}),
            )
            list(made)
        monkeypatch.setenv("GOOGLE_CLOUD_QUOTA_PROJECT", "q-1")
        ask(reaching(account, model=model), Mode(stream), CONVERSATION, **ASKED)
        theirs, ours = account.seen
        assert (ours.method, ours.target) == (theirs.method, theirs.target)
        assert (
            ours.target == f"/v1/{PLACE}/publishers/anthropic/models/{model}:{'streamRawP' if stream else 'rawP'}redict"
        )
        assert theirs.body["anthropic_version"] in {"vertex-2023-10-16", "2026-10-21"}
        assert ours.body == {**theirs.body, "anthropic_version": "vertex-2023-10-16"}
        assert authority(ours) == {**authority(theirs), "x-goog-user-project": "q-1"}


# Addresses


@pytest.mark.parametrize(
    ("region", "host"),
    [
        (None, "aiplatform.googleapis.com"),
        ("global", "aiplatform.googleapis.com"),
        ("us", "aiplatform.us.rep.googleapis.com"),
        ("eu", "aiplatform.eu.rep.googleapis.com"),
        ("us-central1", "us-central1-aiplatform.googleapis.com"),
        ("europe-west4", "europe-west4-aiplatform.googleapis.com"),
    ],
)
@pytest.mark.parametrize("model", [GEMINI, CLAUDE])
def test_the_host_of_a_region(region: str | None, host: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A region has a host of its own, as in the official clients; the path names the region too."""
    sent = request_of(config(model=model, project="p-1", region=region, api_key=TOKEN))
    assert (sent.url.scheme, sent.url.host) == ("https", host)
    assert f"/projects/p-1/locations/{region or 'global'}/" in sent.url.path
    monkeypatch.setenv("GOOGLE_CLOUD_LOCATION", region or "")
    assert request_of(config(model=model, project="p-1", api_key=TOKEN)).url == sent.url


@pytest.mark.parametrize("region", ["global", "us", "eu", "us-east5", "europe-west1"])
def test_hosts_of_the_official_clients(region: str) -> None:
    """The hosts are those of google-genai and AnthropicVertex."""
    anthropic = pytest.importorskip("anthropic")
    from google.oauth2.credentials import Credentials

    ours = request_of(config(project="p-1", region=region, api_key=TOKEN))
    assert request_of_genai(project="p-1", location=region, credentials=Credentials(TOKEN)).url == ours.url
    http = anthropic.DefaultHttpxClient(**PLAIN)
    with anthropic.AnthropicVertex(region=region, project_id="p-1", access_token=TOKEN, http_client=http) as client:
        assert client.base_url.host == ours.url.host


@pytest.mark.parametrize(
    ("api_base", "gemini", "claude"),
    [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080/v1beta1/", "http://127.0.0.1:8080/v1/"),
        ("http://127.0.0.1:8080/", "http://127.0.0.1:8080/v1beta1/", "http://127.0.0.1:8080/v1/"),
        ("https://gw.test/google", "https://gw.test/google/v1beta1/", "https://gw.test/google/v1/"),
        ("https://gw.test/google/v1", "https://gw.test/google/v1/", "https://gw.test/google/v1/"),
        ("https://gw.test/v1beta1/", "https://gw.test/v1beta1/", "https://gw.test/v1beta1/"),
        ("https://gw.test/v1/vertex", "https://gw.test/v1/vertex/v1beta1/", "https://gw.test/v1/vertex/v1/"),
    ],
)
def test_api_base(api_base: str, gemini: str, claude: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`api_base` works with a version and without, and with a path; so does the variable."""
    for model, publisher, base in ((GEMINI, "google", gemini), (CLAUDE, "anthropic", claude)):
        method = "generateContent" if publisher == "google" else "rawPredict"
        expected = f"{base}{PLACE}/publishers/{publisher}/models/{model}:{method}"
        settings = {"model": model, "project": "p-1", "region": "us-central1", "api_key": TOKEN}
        assert str(request_of(config(api_base=api_base, **settings)).url) == expected
        with monkeypatch.context() as context:
            context.setenv("GOOGLE_VERTEX_BASE_URL", api_base)
            assert str(request_of(config(**settings)).url) == expected
            assert str(request_of(config(api_base="https://own.test", **settings)).url).startswith(
                "https://own.test/v1"
            )


def test_api_base_with_a_query() -> None:
    """A version before a query counts as well."""
    sent = request_of(config(api_base="https://gw.test/v1?tenant=5", project="p-1", api_key=TOKEN))
    assert sent.url.path.startswith("/v1/projects/")
    assert sent.url.query == b"tenant=5"


def test_a_wrong_address_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that is no URL is an error that names the variable."""
    monkeypatch.setenv("GOOGLE_VERTEX_BASE_URL", "aiplatform.googleapis.com")
    with pytest.raises(ConfigError, match=r"^GOOGLE_VERTEX_BASE_URL: expected an http"):
        VertexProvider(config(project="p-1", api_key=TOKEN))


def test_names_of_models() -> None:
    """A name is a segment of the path, whatever is in it; one of another publisher says how to reach it."""
    settings = config(project="p-1", api_key=TOKEN)
    sent = request_of(settings, model="gemini 2?x=1#ü;:%2F")
    start = b"/v1beta1/projects/p-1/locations/global/publishers/google/models/"
    assert sent.url.raw_path == start + b"gemini%202%3Fx%3D1%23%C3%BC%3B%3A%252F:generateContent"
    for model in ("google/..", "a/../b/c", "meta/llama-4"):
        with pytest.raises(BadRequest):
            request_of(settings, model=model)


# Settings


class TestSettings:
    @pytest.mark.parametrize("name", ["GOOGLE_CLOUD_PROJECT", "ANTHROPIC_VERTEX_PROJECT_ID"])
    def test_variables(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The variables of both official clients name the project and the region; the settings come first."""
        monkeypatch.setenv(name, " p-env ")
        monkeypatch.setenv("CLOUD_ML_REGION", "us-east5")
        assert "/projects/p-env/locations/us-east5/" in str(request_of(config(api_key=TOKEN)).url)
        monkeypatch.setenv("GOOGLE_CLOUD_LOCATION", "us-west1")
        assert "/locations/us-west1/" in str(request_of(config(api_key=TOKEN)).url)
        sent = request_of(config(api_key=TOKEN, project="p-own", region="eu"))
        assert str(sent.url).startswith("https://aiplatform.eu.rep.googleapis.com/v1beta1/projects/p-own/locations/eu/")

    def test_the_google_variable_comes_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Google's own name of the project counts more than Anthropic's."""
        monkeypatch.setenv("ANTHROPIC_VERTEX_PROJECT_ID", "p-anthropic")
        monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "p-google")
        assert "/projects/p-google/" in str(request_of(config(api_key=TOKEN)).url)

    @pytest.mark.parametrize("project", ["123456789012", "example.com:harbour-7", "p-1"])
    def test_projects(self, project: str) -> None:
        """A project may be a number, and old ids begin with a domain."""
        path = request_of(config(api_key=TOKEN, project=project)).url.raw_path.decode()
        assert path.startswith(f"/v1beta1/projects/{project}/locations/global/")

    def test_the_place_of_the_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A model whose name has its place needs no other, and is called in its region."""
        monkeypatch.setenv("GOOGLE_CLOUD_LOCATION", "us-west1")
        settings = config(model="projects/p-2/locations/us-east5/endpoints/123", api_key=TOKEN)
        expected = "https://us-east5-aiplatform.googleapis.com/v1beta1/projects/p-2/locations/us-east5/endpoints/123"
        assert str(request_of(settings).url) == f"{expected}:generateContent"
        with_key = config(model="projects/p-2/locations/us-east5/endpoints/123", api_key=API_KEY)
        assert str(request_of(with_key).url) == f"{expected}:generateContent"

    @pytest.mark.parametrize(
        ("settings", "variables", "named"),
        [
            ({"project": "My Project"}, {}, "project"),
            ({"project": "p/../q"}, {}, "project"),
            ({"project": "-p"}, {}, "project"),
            ({"project": ".."}, {}, "project"),
            ({"project": "p?x"}, {}, "project"),
            ({"project": "prøject"}, {}, "project"),
            ({"project": "p\n"}, {}, "project"),
            ({"region": "US-Central1"}, {}, "region"),
            ({"region": "us-central1.evil.test/"}, {}, "region"),
            ({"region": "us:80"}, {}, "region"),
            ({"region": "@evil.test"}, {}, "region"),
            ({}, {"GOOGLE_CLOUD_PROJECT": "My Project"}, "GOOGLE_CLOUD_PROJECT"),
            ({}, {"ANTHROPIC_VERTEX_PROJECT_ID": "p/q"}, "ANTHROPIC_VERTEX_PROJECT_ID"),
            ({}, {"GOOGLE_CLOUD_LOCATION": "somewhere else"}, "GOOGLE_CLOUD_LOCATION"),
            ({}, {"CLOUD_ML_REGION": "a.b"}, "CLOUD_ML_REGION"),
            ({"model": "projects/../locations/x/endpoints/1"}, {}, "model"),
            ({"model": "projects/p/locations/a.b/endpoints/1"}, {}, "model"),
        ],
    )
    def test_malformed(
        self, settings: Any, variables: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A malformed project or region is an error that names what holds it, and says what is expected."""
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        for asynchronous in (False, True):
            with pytest.raises(ConfigError, match=f"^{named}: expected small letters, digits and hyphens, got '"):
                make_provider(config(api_key=TOKEN, **settings), asynchronous=asynchronous)

    @pytest.mark.parametrize(
        "settings", [{"api_key": TOKEN}, {"api_key": lambda: TOKEN}, {"headers": {"Authorization": "x"}}]
    )
    def test_no_project(self, settings: Any) -> None:
        """A token says nothing of a project; the error says how to set one."""
        for provider in (VertexProvider, AsyncVertexProvider):
            with pytest.raises(
                ConfigError, match=r"^vertex needs a project: set project in the config, or GOOGLE_CLOUD_PROJECT"
            ):
                provider(config(**settings))

    def test_yaml(self, server: Google, tmp_path: Path) -> None:
        """A YAML file may have both settings; other frameworks refuse them, each by its name."""
        file = tmp_path / "llm.yaml"
        settings = {
            "model": GEMINI,
            "project": "p-1",
            "region": "us-central1",
            "api_key": TOKEN,
            "api_base": server.url,
        }
        file.write_text(json.dumps({"llm": {"framework": "vertex", **settings}}))
        with LLM.from_yaml(file) as llm:
            assert llm.forward("Hi") == "Hello é"
        assert server.seen[0].target.startswith(f"/v1beta1/{PLACE}/")
        file.write_text(json.dumps({"llm": {"framework": "openai", **settings}}))
        with pytest.raises(ConfigError) as caught:
            LLM.from_yaml(file)
        assert [problem.partition(": ")[0] for problem in caught.value.problems] == ["llm.region", "llm.project"]
        for name, value in (("project", "p-1"), ("region", "eu")):
            with pytest.raises(ConfigError, match=f"^{name}: only .*'vertex'.*'openai' does not; leave it out"):
                LLM(config(framework="openai", api_key="k", **{name: value}))

    @pytest.mark.parametrize(("name", "value"), [("project", ""), ("project", 5), ("region", ["eu"]), ("region", "")])
    def test_types(self, name: str, value: Any) -> None:
        """A setting of another type is a problem of the configuration."""
        with pytest.raises(ConfigError, match=f"^{name}: expected "):
            config(**{name: value})


# Keys


class TestKeys:
    @modes
    @pytest.mark.parametrize("key", [API_KEY, "AQ.Ab8RN6-test-0123456789"])
    def test_an_api_key(self, server: Google, mode: Mode, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """An API key goes in its header, to a path without a project, whatever the variables say."""
        monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "p-env")
        monkeypatch.setenv("GOOGLE_CLOUD_LOCATION", "us-east5")
        assert texts_of(config(api_base=server.url, api_key=key), mode) == ["Hello é"]
        (seen,) = server.seen
        assert seen.target.startswith("/v1beta1/publishers/google/models/gemini-2.5-flash:")
        assert authority(seen) == {"content-type": "application/json", "x-goog-api-key": key}

    def test_the_host_of_an_api_key(self) -> None:
        """An API key alone is for the global address; a region needs a project, which may come with it."""
        assert request_of(config(api_key=API_KEY)).url.host == "aiplatform.googleapis.com"
        assert request_of(config(api_key=API_KEY, region="global")).url.host == "aiplatform.googleapis.com"
        with pytest.raises(
            ConfigError, match=r"^vertex needs a project besides the API key, for the region 'eu': set project"
        ):
            VertexProvider(config(api_key=API_KEY, region="eu"))
        sent = request_of(config(api_key=API_KEY, region="eu", project="p-1", model=CLAUDE))
        assert str(sent.url).startswith("https://aiplatform.eu.rep.googleapis.com/v1/projects/p-1/locations/eu/")
        assert sent.headers["x-goog-api-key"] == API_KEY

    def test_an_api_key_in_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """GOOGLE_API_KEY is used only if no project, key or authorization is set."""
        monkeypatch.setenv("GOOGLE_API_KEY", "g-env-0123456789")
        sent = request_of(config())
        assert (sent.headers["x-goog-api-key"], "authorization" in sent.headers) == ("g-env-0123456789", False)
        for key in (TOKEN, lambda: TOKEN):
            sent = request_of(config(api_key=key, project="p-1"))
            assert ("x-goog-api-key" in sent.headers, sent.headers["authorization"]) == (False, f"Bearer {TOKEN}")
        with pytest.raises(ConfigError, match="needs a project"):
            VertexProvider(config(headers={"Authorization": f"Bearer {TOKEN}"}))
        monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "p-env")
        with pytest.raises(AuthenticationError, match="found no Google credentials"):
            request_of(config())

    def test_a_malformed_key_in_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The error names the variable."""
        monkeypatch.setenv("GOOGLE_API_KEY", f"{API_KEY}\n")
        with pytest.raises(AuthenticationError, match="GOOGLE_API_KEY") as caught:
            VertexProvider(config())
        assert API_KEY not in str(caught.value)

    @modes
    def test_tokens(self, server: Google, mode: Mode) -> None:
        """A token is a bearer's, given as a str or by a function of either kind."""

        async def later() -> str:
            return TOKEN

        for key in (TOKEN, lambda: TOKEN, later):
            assert texts_of(reaching(server, api_key=key), mode) == ["Hello é"]
            assert authority(server.seen[-1]) == {
                "content-type": "application/json",
                "authorization": f"Bearer {TOKEN}",
            }
        assert not server.asked

    @modes
    def test_a_function_is_asked_again(self, server: Google, mode: Mode) -> None:
        """A token of a function that the service refuses is replaced, and the call sent again."""
        tokens = iter([f"{TOKEN}-1", f"{TOKEN}-2"])
        server.reply = refusing_first
        assert texts_of(reaching(server, api_key=lambda: next(tokens)), mode, 2) == ["Hello é"] * 2
        assert server.bearers == ["1", "2", "2"]

    @modes
    @pytest.mark.parametrize("name", ["Authorization", "X-Goog-Api-Key"])
    def test_an_authorization_of_the_configuration(self, account: Google, mode: Mode, name: str) -> None:
        """A header of one's own takes the place of the key and of the credentials, which are not looked for."""
        for settings in ({"api_key": TOKEN}, {"api_key": API_KEY}, {}):
            texts_of(reaching(account, headers={name: "own 0123456789"}, **settings), mode)
            seen = account.seen[-1]
            assert authority(seen) == {"content-type": "application/json", name.lower(): "own 0123456789"}
            assert seen.target.startswith(f"/v1beta1/{PLACE}/")
        assert not account.asked

    @pytest.mark.parametrize("key", [None, API_KEY])
    def test_the_path_follows_the_header(self, key: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
        """With a header in place of an API key, the project of the environment counts."""
        monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "p-env")
        monkeypatch.setenv("GOOGLE_API_KEY", API_KEY)
        sent = request_of(config(api_key=key, headers={"authorization": "Bearer mine"}))
        assert sent.url.path.startswith("/v1beta1/projects/p-env/locations/global/")
        assert "x-goog-api-key" not in sent.headers

    @modes
    def test_an_authorization_of_the_call(self, account: Google, mode: Mode) -> None:
        """A call with an authorization of its own needs no token."""
        ask(reaching(account), mode, "Hi", headers={"Authorization": "Bearer mine"})
        assert authority(account.seen[0]) == {"content-type": "application/json", "authorization": "Bearer mine"}
        assert not account.asked

    def test_an_empty_key_is_none(self, account: Google) -> None:
        """With an empty key, as an unset variable gives it, the credentials count."""
        assert texts_of(reaching(account, api_key=""), MODES[0]) == ["Hello é"]
        assert account.bearers == ["1"]


def refusing_first(seen: Seen) -> Reply:
    """Refuse the first token with a 401, as if it had been revoked."""
    if seen.headers["authorization"] == f"Bearer {TOKEN}-1":
        return failing(401, "Request had invalid authentication credentials.", "UNAUTHENTICATED")(seen)
    return default_reply(seen)


# Credentials


class Clock:
    """A clock of google-auth that can be put forward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from google.auth import _helpers

        now: Callable[[], datetime] = _helpers.utcnow
        self.passed = 0.0
        monkeypatch.setattr(_helpers, "utcnow", lambda: now() + timedelta(seconds=self.passed))


class TestCredentials:
    @modes
    @pytest.mark.parametrize("model", [GEMINI, CLAUDE])
    def test_a_service_account(self, account: Google, mode: Mode, model: str) -> None:
        """A service account signs a request for a token, which authorizes the calls; it names the project too."""
        settings = config(model=model, api_base=account.url)
        assert texts_of(settings, mode, 3) == ["Hello é"] * 3
        assert account.bearers == ["1", "1", "1"]
        assert all("/projects/harbour-account/locations/global/" in seen.target for seen in account.seen)
        (asked,) = account.asked
        assert asked.form["grant_type"] == "urn:ietf:params:oauth:grant-type:jwt-bearer"
        claims = check_assertion(asked.form["assertion"])
        assert (claims["iss"], claims["scope"]) == (ACCOUNT, SCOPE)
        assert "x-goog-user-project" not in account.seen[0].headers

    @modes
    def test_a_user(self, user: Google, mode: Mode) -> None:
        """A user's refresh token is exchanged for tokens, and the user's own project pays for the quota."""
        assert texts_of(reaching(user), mode, 2) == ["Hello é"] * 2
        (asked,) = user.asked
        assert asked.form == {
            "grant_type": "refresh_token",
            "client_id": "c1",
            "client_secret": CLIENT_SECRET,
            "refresh_token": REFRESH_TOKEN,
        }
        assert [seen.headers["x-goog-user-project"] for seen in user.seen] == ["q-1", "q-1"]

    @pytest.mark.usefixtures("user")
    def test_a_user_has_no_project(self) -> None:
        """A login names no project."""
        with pytest.raises(ConfigError, match="needs a project"):
            VertexProvider(config())

    def test_a_federated_identity(self, server: Google, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A token of another identity provider is exchanged for a token of Google's."""
        (tmp_path / "subject").write_text("subject-0123456789")
        file = tmp_path / "external.json"
        fields = {
            "type": "external_account",
            "audience": "//iam.googleapis.com/locations/global/workforcePools/p/providers/x",
            "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
            "token_url": f"{server.url}/token",
            "credential_source": {"file": str(tmp_path / "subject")},
        }
        file.write_text(json.dumps(fields))
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
        assert texts_of(reaching(server), MODES[0], 2) == ["Hello é"] * 2
        assert server.asked[0].form["subject_token"].startswith("subject-")
        assert server.bearers == ["1", "1"]

    def test_the_metadata_server(self, server: Google) -> None:
        """On a machine of Google's, the metadata server gives the project and the tokens."""
        script = f"""
import sys
from fluxibly import LLM, LLMConfig
config = LLMConfig(framework="vertex", model="{GEMINI}", api_base="{server.url}", max_retries=0)
with LLM(config) as llm:
    print(llm.forward("Hi"), llm.forward("Hi"))
"""
        host = server.url.removeprefix("http://")
        variables = {"GCE_METADATA_HOST": host, "GCE_METADATA_IP": host, "PYTHONIOENCODING": "utf-8"}
        done = subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, **variables}, capture_output=True, text=True, check=False
        )
        assert done.stdout == "Hello é Hello é\n", done.stderr
        assert server.bearers == ["1", "1"]
        assert "/projects/harbour-metadata/locations/global/" in server.seen[0].target
        (asked,) = server.asked
        assert asked.headers["metadata-flavor"] == "Google"

    @pytest.mark.parametrize("given", [{}, {"headers": {"X-Goog-User-Project": "own"}}])
    def test_the_project_whose_quota_is_used(
        self, account: Google, given: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The project of the quota comes from the credentials, unless the configuration has the header."""
        monkeypatch.setenv("GOOGLE_CLOUD_QUOTA_PROJECT", "q-env")
        texts_of(reaching(account, **given), MODES[0])
        assert account.seen[0].headers["x-goog-user-project"] == ("own" if given else "q-env")
        ask(reaching(account, **given), MODES[0], "Hi", headers={"x-goog-user-project": "call"})
        assert account.seen[1].headers["x-goog-user-project"] == "call"

    def test_settings_come_before_the_project_of_the_credentials(
        self, account: Google, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The project of the credentials is the last choice."""
        texts_of(config(api_base=account.url, project="p-own"), MODES[0])
        monkeypatch.setenv("ANTHROPIC_VERTEX_PROJECT_ID", "p-env")
        texts_of(config(api_base=account.url), MODES[0])
        assert [seen.target.split("/")[3] for seen in account.seen] == ["p-own", "p-env"]

    @pytest.mark.parametrize("project", ["My Project", "p/../q"])
    def test_a_malformed_project_of_the_credentials(
        self, server: Google, project: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """A project that the credentials name is checked too."""
        file = service_account(tmp_path, server.url, project_id=project)
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
        with pytest.raises(ConfigError, match=r"^the project of the Google credentials: expected small letters"):
            VertexProvider(config())

    @pytest.mark.parametrize("project", [None, 5, ["p"], {}])
    def test_no_project_in_the_credentials(
        self, server: Google, project: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """Credentials without a project leave it to the settings."""
        file = service_account(tmp_path, server.url, project_id=project)
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
        with pytest.raises(ConfigError, match="vertex needs a project: set project"):
            VertexProvider(config())
        assert texts_of(reaching(server), MODES[0]) == ["Hello é"]

    @pytest.mark.parametrize("project", [None, 5, [], ""])
    def test_no_project_whose_quota_is_used(self, user: Google, project: Any, tmp_path: Path) -> None:
        """A login whose project is none sends no header. (`user` has written a file, which this one replaces.)"""
        authorized_user(tmp_path, quota_project_id=project, client_id="not the client of gcloud")
        assert texts_of(reaching(user), MODES[0]) == ["Hello é"]
        assert "x-goog-user-project" not in user.seen[0].headers

    def test_none(self) -> None:
        """Without credentials, making the provider fails if it needs their project, and else the first call does."""
        said = "vertex found no Google credentials: Your default credentials were not found.*give an API key or a token"
        for provider in (VertexProvider, AsyncVertexProvider):
            with pytest.raises(AuthenticationError, match=said) as caught:
                provider(config())
            assert (caught.value.provider, caught.value.retryable) == ("vertex", False)
        for mode in MODES:
            with pytest.raises(AuthenticationError, match=said):
                texts_of(config(project="p-1"), mode)

    @pytest.mark.parametrize(
        "text",
        [
            *("", "[]", "5", "null", '"a"', "{}", "not JSON", '{"type": 5}', '{"type": "service_account"}', "\udcff"),
            '{"type": "service_account", "client_email": "a", "token_uri": "b", "private_key": "SECRET-0123456789"}',
            '{"type": "service_account", "client_email": "a", "token_uri": "b", "private_key": 5}',
            '{"type": "authorized_user", "client_id": "a"}',
            '{"type": "external_account", "audience": 5}',
        ],
    )
    def test_malformed_files(self, text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A file with anything else than credentials is an error that names no secret."""
        file = tmp_path / "credentials.json"
        file.write_bytes(text.encode(errors="surrogateescape"))
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
        with pytest.raises(AuthenticationError, match=r"vertex found no Google credentials: ") as caught:
            VertexProvider(config())
        assert "SECRET" not in f"{caught.value!r} {vars(caught.value)}"

    def test_files_that_cannot_be_read(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A file that is missing, or is a folder, is an error that names it."""
        for file in (tmp_path / "missing.json", tmp_path):
            monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
            with pytest.raises(AuthenticationError, match=f"found no Google credentials: .*{file}"):
                VertexProvider(config())


class TestRenewal:
    @modes
    def test_before_a_token_expires(self, account: Google, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
        """A token is used again until a few minutes before it expires, and then replaced."""
        clock = Clock(monkeypatch)
        times = [0, 3_000, 3_370, 3_380, 3_500, 8_000]

        def forward(number: int) -> None:
            clock.passed = times[number]

        assert texts_of(reaching(account), mode, len(times), before=forward) == ["Hello é"] * len(times)
        assert account.bearers == ["1", "1", "1", "2", "2", "3"]

    @modes
    @pytest.mark.parametrize("lifetime", [1, 200, "200"])
    def test_tokens_of_a_short_life(self, account: Google, mode: Mode, lifetime: Any) -> None:
        """Tokens that expire within minutes are each used once."""
        account.expires_in = lifetime
        assert texts_of(reaching(account), mode, 3) == ["Hello é"] * 3
        assert account.bearers == ["1", "2", "3"]

    @modes
    def test_tokens_without_an_end(self, account: Google, mode: Mode) -> None:
        """A token that does not say when it expires is used until it is refused."""
        account.token_reply = lambda _: (
            200,
            JSON,
            json.dumps({"access_token": f"{TOKEN}-{len(account.asked)}"}).encode(),
        )
        assert texts_of(reaching(account), mode, 2) == ["Hello é"] * 2
        assert account.bearers == ["1", "1"]

    @modes
    def test_after_a_401(self, account: Google, mode: Mode, caplog: pytest.LogCaptureFixture) -> None:
        """A refused token is replaced, the call sent again, and the new token kept. The warning says what changed."""
        caplog.set_level(logging.WARNING, "fluxibly")
        account.reply = refusing_first
        assert texts_of(reaching(account), mode, 2) == ["Hello é"] * 2
        assert account.bearers == ["1", "2", "2"]
        (record,) = [record for record in caplog.records if record.name.startswith("fluxibly")]
        assert 'change="sends new Google credentials"' in record.getMessage()

    @modes
    def test_once(self, account: Google, mode: Mode) -> None:
        """A service that refuses the new token too is not asked a third time."""
        account.reply = failing(401, "no", "UNAUTHENTICATED")
        with pytest.raises(AuthenticationError, match="Vertex AI answered 401 UNAUTHENTICATED") as caught:
            texts_of(reaching(account), mode)
        assert account.bearers == ["1", "2"]
        assert not caught.value.retryable

    @modes
    def test_the_same_token_is_not_sent_again(self, account: Google, mode: Mode) -> None:
        """If the service of tokens gives the refused token again, as the metadata server does, the call fails at once."""
        token = json.dumps({"access_token": f"{TOKEN}-1", "expires_in": 3600}).encode()
        account.token_reply = lambda _: (200, JSON, token)
        account.reply = failing(401, "no", "UNAUTHENTICATED")
        with pytest.raises(AuthenticationError):
            texts_of(reaching(account), mode)
        assert account.bearers == ["1"]

    @modes
    def test_other_refusals_keep_the_token(self, account: Google, mode: Mode) -> None:
        """Only a 401 asks for a new token."""
        account.reply = failing(403, "no", "PERMISSION_DENIED")
        with pytest.raises(ProviderError):
            texts_of(reaching(account), mode)
        assert account.bearers == ["1"]

    def test_many_threads_share_a_token(self, account: Google) -> None:
        """Calls in many threads ask for one token, and for one more when it is refused."""
        account.held = True
        account.reply = refusing_first
        with LLM(reaching(account), middleware=[]) as llm:
            threads = [threading.Thread(target=llm.forward, args=("Hi",)) for _ in range(10)]
            for thread in threads:
                thread.start()
            assert account.waiting.wait(10)
            account.released.set()
            for thread in threads:
                thread.join()
        assert len(account.asked) == 2
        assert account.bearers.count("2") == 10

    @pytest.mark.parametrize("backend", ["asyncio", "trio"])
    def test_many_tasks_share_a_token(self, account: Google, backend: str) -> None:
        """So do tasks. The event loop goes on while the token is fetched."""
        account.held = True
        account.reply = refusing_first

        async def main() -> None:
            async with AsyncLLM(reaching(account), middleware=[]) as llm, anyio.create_task_group() as group:
                for _ in range(20):
                    group.start_soon(llm.forward, "Hi")
                assert await anyio.to_thread.run_sync(account.waiting.wait, 10)
                account.released.set()

        anyio.run(main, backend=backend)
        assert len(account.asked) == 2
        assert account.bearers.count("2") == 20

    @pytest.mark.parametrize("backend", ["asyncio", "trio"])
    def test_a_call_that_is_cancelled_meanwhile(self, account: Google, backend: str) -> None:
        """A call that is cancelled while it waits for a token ends at once, and does not hold up the next."""
        account.held = True

        async def main() -> str:
            async with AsyncLLM(reaching(account), middleware=[]) as llm:
                for call in (llm.forward, llm.forward_stream):
                    account.waiting.clear()
                    with anyio.fail_after(5), anyio.CancelScope() as scope:
                        async with anyio.create_task_group() as group:
                            group.start_soon(consume, call)
                            await anyio.to_thread.run_sync(account.waiting.wait, 10)
                            scope.cancel()
                account.held = False
                return await llm.forward("Hi")

        async def consume(call: Any) -> None:
            found = call("Hi")
            if hasattr(found, "__aiter__"):
                async for _ in found:
                    pass
            else:
                await found

        assert anyio.run(main, backend=backend) == "Hello é"
        assert len(account.seen) == 1

    def test_after_a_fetch_that_was_cancelled(self, account: Google, monkeypatch: pytest.MonkeyPatch) -> None:
        """A token that arrived for a call that had been cancelled does not make the expired token before it fresh."""
        clock, fetched = Clock(monkeypatch), threading.Event()
        obtain = GoogleCredentials.obtain

        def watched(credentials: GoogleCredentials) -> Any:
            try:
                return obtain(credentials)
            finally:
                fetched.set()

        monkeypatch.setattr(GoogleCredentials, "obtain", watched)

        async def main() -> None:
            async with AsyncLLM(reaching(account), middleware=[]) as llm:
                await llm.forward("Hi")
                clock.passed = 7_200
                fetched.clear()
                account.held = True
                async with anyio.create_task_group() as group:
                    group.start_soon(llm.forward, "Hi")
                    assert await anyio.to_thread.run_sync(account.waiting.wait, 10)
                    group.cancel_scope.cancel()
                account.held = False
                account.released.set()
                assert await anyio.to_thread.run_sync(fetched.wait, 10)
                await llm.forward("Hi")

        anyio.run(main)
        assert account.bearers[0] == "1"
        assert account.bearers[1] in {"2", "3"}


FAILURES: dict[str, Callable[[Seen], Reply]] = {
    "text": lambda _: (200, JSON, b"ok"),
    "null": lambda _: (200, JSON, b"null"),
    "a list": lambda _: (200, JSON, b"[]"),
    "nothing": lambda _: (200, JSON, b""),
    "no token": lambda _: (200, JSON, b'{"id_token": "id-0123456789", "expires_in": 5}'),
    "a number": lambda _: (200, JSON, b'{"access_token": 5}'),
    "an empty token": lambda _: (200, JSON, b'{"access_token": ""}'),
    "a token with a newline": lambda _: (200, JSON, b'{"access_token": "ya29\\nx: y", "expires_in": 9999}'),
    "a token outside of ASCII": lambda _: (200, JSON, '{"access_token": "ya29é☃", "expires_in": 9999}'.encode()),
    "another time": lambda _: (200, JSON, b'{"access_token": "t", "expires_in": "soon"}'),
    "no time": lambda _: (200, JSON, b'{"access_token": "t", "expires_in": []}'),
    "a long time": lambda _: (200, JSON, b'{"access_token": "t", "expires_in": 1e300}'),
    "invalid UTF-8": lambda _: (200, JSON, b'"\xff"'),
    "a page": lambda _: (404, "text/html", b"<html>" + b"nothing here " * 5_000),
    "an odd error": lambda _: (400, JSON, b'{"error": {"message": 5}, "error_description": []}'),
    "a list of errors": lambda _: (400, JSON, b'[{"error": "invalid_grant"}]'),
}


@pytest.fixture
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let google-auth try again without a wait."""
    backoff = pytest.importorskip("google.auth._exponential_backoff")
    monkeypatch.setattr(backoff.ExponentialBackoff, "_calculate_jitter", lambda _: 0.0)


@pytest.mark.usefixtures("_no_waits")
class TestFailures:
    @modes
    def test_credentials_that_were_withdrawn(self, user: Google, mode: Mode) -> None:
        """A login that has ended is an authentication error with Google's reason, and is not tried again."""
        body = {"error": "invalid_grant", "error_description": f"Token {REFRESH_TOKEN} has been expired or revoked."}
        user.token_reply = lambda _: (400, JSON, json.dumps(body).encode())
        with pytest.raises(AuthenticationError) as caught:
            texts_of(reaching(user), mode, 1, Retry(max_retries=2, base_delay=0))
        message = "vertex (gemini-2.5-flash): the Google credentials give no token: invalid_grant: Token *** has been expired or revoked."
        assert str(caught.value) == message
        assert (caught.value.provider, caught.value.retryable) == ("vertex", False)
        assert (len(user.asked), len(user.seen)) == (1, 0)

    @modes
    def test_a_service_that_fails(self, account: Google, mode: Mode) -> None:
        """A 503 is tried again by google-auth, and by `Retry` after that."""
        account.token_reply = lambda _: (503, "text/plain", b"unavailable") if len(account.asked) < 5 else None
        with pytest.raises(AuthenticationError, match="give no token: unavailable") as caught:
            texts_of(reaching(account), mode)
        assert caught.value.retryable
        assert len(account.asked) == 3
        account.token_reply = lambda _: (503, JSON, b"{}") if len(account.asked) < 8 else token(account)
        assert texts_of(reaching(account), mode, 1, Retry(max_retries=2, base_delay=0)) == ["Hello é"]

    @modes
    def test_a_service_that_cuts_the_connection(self, account: Google, mode: Mode) -> None:
        """A connection that is cut is a failure of the network, which `Retry` tries again."""
        account.token_reply = lambda _: None
        with pytest.raises(
            ConnectionFailed, match=rf"the token of Google cannot be fetched: .*{account.url}/token"
        ) as caught:
            texts_of(reaching(account), mode)
        assert (caught.value.provider, caught.value.retryable) == ("vertex", True)
        account.token_reply = lambda _: None if len(account.asked) < 3 else token(account)
        assert texts_of(reaching(account), mode, 1, Retry(max_retries=2, base_delay=0)) == ["Hello é"]

    @modes
    def test_a_service_that_does_not_listen(
        self, server: Google, mode: Mode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """So is a service that cannot be reached."""
        file = service_account(tmp_path, "http://127.0.0.1:1")
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
        with pytest.raises(ConnectionFailed, match="ConnectError"):
            texts_of(reaching(server), mode)

    @modes
    def test_a_service_that_hangs(self, account: Google, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
        """A service that does not answer is given up."""
        monkeypatch.setattr(vertex, "FETCH_TIMEOUT", 0.05)
        account.held = True
        with pytest.raises(RequestTimeout, match="ReadTimeout"):
            texts_of(reaching(account), mode)
        assert not account.seen

    @pytest.mark.parametrize("mode", [MODES[0], MODES[-1]], ids=str)
    @pytest.mark.parametrize("name", FAILURES)
    def test_answers_without_a_token(self, account: Google, mode: Mode, name: str) -> None:
        """An answer of any other shape is an error of fluxibly that quotes little of it, and no call is made."""
        account.token_reply = FAILURES[name]
        with pytest.raises((AuthenticationError, BadRequest)) as caught:
            texts_of(reaching(account), mode)
        assert not account.seen
        assert not caught.value.retryable
        assert len(str(caught.value)) < 700
        assert "0123456789" not in f"{caught.value!r} {vars(caught.value)}"

    @pytest.mark.parametrize("uri", ["", "nonsense", "ftp://127.0.0.1/token", "http://[", "http://127.0.0.1:1 /", "\0"])
    def test_addresses_of_tokens(
        self, server: Google, uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """A file with a wrong address of tokens is an error of fluxibly too."""
        file = service_account(tmp_path, server.url, token_uri=uri)
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
        with pytest.raises((AuthenticationError, ConnectionFailed)):
            texts_of(reaching(server), MODES[0])

    @modes
    def test_the_metadata_server_has_gone(self, server: Google, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
        """A metadata server that cannot be reached is a failure of the network; one that refuses is not."""
        compute = pytest.importorskip("google.auth.compute_engine")
        monkeypatch.setattr(compute._metadata, "_GCE_METADATA_HOST", "127.0.0.1:1")
        monkeypatch.setattr(GoogleCredentials, "_find", lambda self: found)
        found = compute.Credentials()
        with pytest.raises(ConnectionFailed, match=r"computeMetadata/v1/instance/service-accounts/default/"):
            texts_of(reaching(server), mode)
        monkeypatch.setattr(compute._metadata, "_GCE_METADATA_HOST", server.url.removeprefix("http://"))
        server.token_reply = lambda _: (404, "text/plain", b"no service account")
        with pytest.raises(AuthenticationError, match="Status: 404") as caught:
            texts_of(reaching(server), mode)
        assert not caught.value.retryable


def token(server: Google) -> Reply:
    return 200, JSON, json.dumps({"access_token": f"{TOKEN}-{len(server.asked)}", "expires_in": 3600}).encode()


# Secrets


class TestSecrets:
    @modes
    @pytest.mark.parametrize("model", [GEMINI, CLAUDE])
    def test_a_service_that_quotes_the_token(
        self, user: Google, mode: Mode, model: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Errors, logs of every logger, spans and reprs show no token, whatever the service quotes."""
        for name in (None, "google", "google.auth", "httpx", "httpcore"):
            caplog.set_level(logging.DEBUG, name)
        settings = reaching(user, model=model)
        quoted = f"{TOKEN}-1 Bearer {TOKEN}-1"
        error = {"error": {"code": 503, "message": quoted, "status": quoted}}
        replies: list[Reply] = [
            (400, JSON, json.dumps([error]).encode()),
            (403, "text/plain", quoted.encode()),
            (400, EVENTS, json.dumps(error).encode()),
            (200, JSON, json.dumps(error).encode()),
            (200, JSON, quoted.encode()),
        ]
        if mode.streaming:
            replies += [
                (200, EVENTS, body)
                for body in (
                    sse(error),
                    sse(answer({"text": "Hel"}), error),
                    b"event: error\ndata: %b\n\n" % quoted.encode(),
                )
            ]
        recorder = Recorder()
        shown = [repr(settings)]
        for reply in replies:
            user.reply = lambda _, reply=reply: reply  # type: ignore[misc]
            user.asked.clear()
            with pytest.raises((ProviderError, StreamInterrupted)) as caught:
                texts_of(settings, mode, 1, recorder.tracing(capture="both"))
            shown += [repr(caught.value), repr(vars(caught.value)), repr(caught.value.__cause__)]
            assert user.bearers[-1] == "1"
        provider = make_provider(settings, asynchronous=mode.backend is not None)
        credentials = GoogleCredentials()
        shown += [repr(provider), repr(vars(provider)), repr(credentials), repr(credentials.obtain())]
        shown += [everything(recorder.spans)]
        shown += [f"{record.getMessage()} {vars(record)}" for record in caplog.records]
        for secret in (TOKEN, REFRESH_TOKEN, CLIENT_SECRET):
            assert not [text for text in shown if secret in text]
        assert len(recorder.spans) >= len(replies)

    def test_a_private_key(self, account: Google, caplog: pytest.LogCaptureFixture) -> None:
        """Neither the private key of a service account nor what it signs shows in logs."""
        caplog.set_level(logging.DEBUG)
        caplog.set_level(logging.DEBUG, "google")
        account.token_reply = lambda _: (400, JSON, b'{"error": "invalid_grant", "error_description": "Invalid JWT"}')
        with pytest.raises(AuthenticationError) as caught:
            texts_of(reaching(account), MODES[0])
        shown = [repr(caught.value), *(f"{record.getMessage()} {vars(record)}" for record in caplog.records)]
        assert caplog.records
        for secret in (*private_key()[0].splitlines()[1:3], account.asked[0].form["assertion"]):
            assert not [text for text in shown if secret in text]

    def test_keys_are_secret_as_ever(self, server: Google) -> None:
        """A key or a token of the configuration is masked too."""
        for key in (API_KEY, TOKEN, lambda: TOKEN):
            server.reply = failing(400, f"bad {API_KEY} {TOKEN}", "INVALID_ARGUMENT")
            settings = reaching(server, api_key=key)
            with pytest.raises(BadRequest, match=r"\*\*\*") as caught:
                texts_of(settings, MODES[0])
            secret = API_KEY if key == API_KEY else TOKEN
            assert secret not in f"{caught.value!r} {vars(caught.value)} {settings!r}"


# Imports


class Hidden:
    """A finder of modules that hides a package."""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        if name == self._package or name.startswith(f"{self._package}."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


@pytest.mark.parametrize("package", ["google", "google.auth"])
def test_without_google_auth(package: str, server: Google, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without google-auth the error says which package to install; keys and tokens work all the same."""
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Hidden(package), *sys.meta_path])
    said = r"^vertex needs Google credentials, and so google-auth: pip install 'google-auth\[requests\]' \(or give an API key"
    for settings in ({}, {"project": "p-1"}):
        for provider in (VertexProvider, AsyncVertexProvider):
            with pytest.raises(ConfigError, match=said):
                provider(config(**settings))
    for key in (API_KEY, TOKEN, lambda: TOKEN):
        assert texts_of(reaching(server, api_key=key), MODES[0]) == ["Hello é"]


def test_imports() -> None:
    """Nothing of Google's is imported by fluxibly, by other providers, or by calls with a key."""
    script = f"""
import sys, httpx
before = {{name for name in sys.modules if name.split(".")[0] == "google"}}
import fluxibly
from fluxibly import LLMConfig, Request
from fluxibly.registry import make_provider
for framework in ("anthropic", "bedrock", "cohere", "gemini", "groq", "ollama", "openai"):
    settings = {{"region": "us-east-1"}} if framework == "bedrock" else {{}}
    for asynchronous in (False, True):
        make_provider(LLMConfig(framework=framework, model="m", api_key="k", **settings), asynchronous=asynchronous)
from fluxibly.providers.vertex import AsyncVertexProvider, VertexProvider
reply = lambda request: httpx.Response(200, json={{"candidates": [{{"finishReason": "STOP"}}]}})
for settings in ({{"api_key": "{API_KEY}"}}, {{"api_key": "t", "project": "p"}}, {{"headers": {{"authorization": "x"}}, "project": "p"}}):
    config = LLMConfig(framework="vertex", model="{GEMINI}", **settings)
    AsyncVertexProvider(config)
    with VertexProvider(config, transport=httpx.MockTransport(reply)) as provider:
        provider.complete(Request(model=config.model, messages="Hi"))
print(sorted({{name for name in sys.modules if name.split(".")[0] == "google"}} - before))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr


# Over real connections


@modes
@pytest.mark.parametrize("model", [GEMINI, CLAUDE])
def test_an_answer_in_every_mode(account: Google, mode: Mode, model: str) -> None:
    """An answer of either dialect is the same in every mode."""
    response = ask(reaching(account, model=model), mode, "Hi")
    assert (response.text, response.finish_reason) == ("Hello é", "stop")
    assert response.model == ("gemini-x" if model == GEMINI else "claude-x")
    assert response.id == ("r1" if model == GEMINI else "msg_1")


@modes
def test_models_of_both_dialects_by_one_provider(server: Google, mode: Mode) -> None:
    """A call may name a model of the other dialect."""
    settings = reaching(server, api_key=TOKEN)
    for model in (CLAUDE, GEMINI, f"anthropic/{CLAUDE}"):
        assert ask(settings, mode, "Hi", model=model).text == "Hello é"
    assert [seen.target.split("/")[7] for seen in server.seen] == ["anthropic", "google", "anthropic"]


THOUGHT: dict[str, Any] = {
    GEMINI: (
        {"text": "Hm.", "thought": True},
        {"functionCall": {"name": "weather", "args": {"city": "Ostend"}}, "thoughtSignature": "c2lnMQ=="},
    ),
    CLAUDE: (
        {"type": "thinking", "thinking": "Hm.", "signature": "c2lnMQ=="},
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Ostend"}},
    ),
}


@modes
@pytest.mark.parametrize("model", [GEMINI, CLAUDE])
def test_a_conversation_with_signed_thoughts(server: Google, mode: Mode, model: str) -> None:
    """Thoughts go back with their signatures, and the tool's result with them, in every mode."""
    thought, call = THOUGHT[model]
    if model == GEMINI:
        whole, stream = answer(thought, call, reason="STOP"), sse(answer(thought), answer(call, reason="STOP"))
    else:
        whole = {"type": "message", "content": [thought, call], "stop_reason": "tool_use"}
        stream = sse(*claude_events(thought, call))
    reply: Reply = (200, EVENTS, stream) if mode.streaming else (200, JSON, json.dumps(whole).encode())
    server.reply = lambda seen: reply if len(server.seen) == 1 else default_reply(seen)
    settings = reaching(server, api_key=TOKEN, model=model)
    called = ask(settings, mode, "When?", tools=[WEATHER])
    assert (called.reasoning, called.tool_calls[0].arguments, called.finish_reason) == (
        "Hm.",
        {"city": "Ostend"},
        "tool_call",
    )
    turns = [Message.user("When?"), called.message, Message.tool("4", called.tool_calls[0])]
    assert ask(settings, mode, turns, tools=[WEATHER]).text == "Hello é"
    body = server.seen[1].body
    sent = body["contents"][1]["parts"] if model == GEMINI else body["messages"][1]["content"]
    assert sent == [thought, call]


def claude_events(thought: dict[str, Any], call: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the events of an answer of Claude's with a thought and a call."""
    yield {"type": "message_start", "message": {"id": "msg_1", "usage": {}}}
    deltas = [
        [
            {"type": "thinking_delta", "thinking": thought["thinking"]},
            {"type": "signature_delta", "signature": thought["signature"]},
        ],
        [{"type": "input_json_delta", "partial_json": json.dumps(call["input"])}],
    ]
    for index, begun in enumerate(({**thought, "thinking": "", "signature": ""}, {**call, "input": {}})):
        yield {"type": "content_block_start", "index": index, "content_block": begun}
        for delta in deltas[index]:
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    yield {"type": "message_delta", "delta": {"stop_reason": "tool_use"}}
    yield {"type": "message_stop"}


@modes
@pytest.mark.parametrize("content_type", [JSON, EVENTS])
@pytest.mark.parametrize("as_array", [False, True])
def test_errors_under_any_content_type(server: Google, mode: Mode, content_type: str, as_array: bool) -> None:
    """A refusal is plain JSON, an object or an array, whatever content type it has."""
    details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "7s"}]
    error = {
        "error": {"code": 429, "message": "Resource exhausted.", "status": "RESOURCE_EXHAUSTED", "details": details}
    }
    server.reply = lambda _: (429, content_type, json.dumps([error] if as_array else error, indent=2).encode())
    with pytest.raises(RateLimitError, match=r"vertex \(gemini-2.5-flash\)|Vertex AI") as caught:
        texts_of(reaching(server, api_key=TOKEN), mode)
    assert caught.value.retry_after == 7


@streams
def test_a_stream_that_comes_as_an_array(server: Google, mode: Mode) -> None:
    """A JSON array, from a proxy that drops `alt=sse`, is read as a stream; one with an error raises it."""
    pieces = [answer({"text": "Hel"}), answer({"text": "lo"}, reason="STOP")]
    server.reply = lambda _: (200, JSON, json.dumps(pieces, indent=2).encode())
    assert texts_of(reaching(server, api_key=TOKEN), mode) == ["Hello"]
    error = {"error": {"code": 429, "message": "no", "status": "RESOURCE_EXHAUSTED"}}
    server.reply = lambda _: (200, JSON, json.dumps([error]).encode())
    with pytest.raises(RateLimitError):
        texts_of(reaching(server, api_key=TOKEN), mode)


@streams
@pytest.mark.parametrize("model", [GEMINI, CLAUDE])
def test_streams_that_end_early(server: Google, mode: Mode, model: str) -> None:
    """A stream that is cut off, or has an error in its middle, is interrupted, with what came before it."""
    begun = sse(answer({"text": "Hel"})) if model == GEMINI else sse(start(), *text_block("Hel")[:-1])
    error = sse({"error": {"code": 503, "message": "overloaded", "status": "UNAVAILABLE"}})
    for end, kind in ((b"", StreamProtocolError), (error, ProviderError)):
        server.reply = lambda _, body=begun + end: (200, EVENTS, body)  # type: ignore[misc]
        with pytest.raises(StreamInterrupted) as caught:
            texts_of(reaching(server, api_key=TOKEN, model=model), mode)
        assert caught.value.partial.text == "Hel"
        assert isinstance(caught.value.__cause__, kind)


@modes
@pytest.mark.parametrize("model", [GEMINI, CLAUDE])
def test_spans(account: Google, mode: Mode, model: str) -> None:
    """Spans name the provider as OpenTelemetry does, and the host that is called."""
    recorder = Recorder()
    texts_of(reaching(account, model=model), mode, 1, recorder.tracing())
    attributes = dict(recorder.call.attributes or {})
    host = httpx.URL(account.url)
    assert attributes["gen_ai.provider.name"] == "gcp.vertex_ai"
    assert (attributes["server.address"], attributes["server.port"]) == (host.host, host.port)
    assert attributes["gen_ai.request.model"] == model
    for region, address in (("eu", "aiplatform.eu.rep.googleapis.com"), (None, "aiplatform.googleapis.com")):
        info = VertexProvider(config(project="p-1", region=region, api_key=TOKEN)).info
        assert (info.telemetry_name, info.server_address, info.server_port) == ("gcp.vertex_ai", address, 443)
