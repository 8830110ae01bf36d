"""The lists of models: every service's shape and pages, as its own client reads them, and servers that misbehave."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.model_server import BASES, KEY, LISTED, Models, model_server

from fluxibly import LLMConfig
from fluxibly.errors import AuthenticationError, NotFound, ProviderError, RequestTimeout, StreamProtocolError
from fluxibly.providers.dialects import model_lists
from fluxibly.providers.dialects.model_lists import MAX_NAME, ModelList
from fluxibly.providers.http import HTTPProvider
from fluxibly.registry import make_provider


@pytest.fixture
def server() -> Iterator[Models]:
    with model_server() as models:
        yield models


def provider(
    framework: str, server: Models, *, base: str | None = None, key: str = KEY, **settings: Any
) -> HTTPProvider:
    """Return the provider of a framework at its place on the server."""
    address = server.url + (BASES[framework] if base is None else base)
    places = {"bedrock": {"region": "us-east-1"}, "vertex": {"region": "global", "project": "p"}}
    settings = {"api_base": address, "api_key": key, **places.get(framework, {}), **settings}
    made: HTTPProvider = make_provider(LLMConfig(framework=framework, model="-", **settings), asynchronous=False)
    return made


@pytest.mark.parametrize("framework", sorted(LISTED))
def test_the_list_of_each_service(framework: str, server: Models) -> None:
    """All pages, with the service's own authorization; only models that a call can name."""
    with provider(framework, server) as llm:
        assert llm.list_models() == LISTED[framework]
    assert all("content-type" not in got.headers and "content-length" not in got.headers for got in server.got)


@pytest.mark.parametrize("framework", ["openai", "anthropic", "gemini", "cohere", "bedrock"])
def test_a_wrong_key(framework: str, server: Models) -> None:
    """The error is that of a call, and does not show the key."""
    with provider(framework, server, key="sk-wrong-0123456789") as llm, pytest.raises(AuthenticationError) as caught:
        llm.list_models()
    assert caught.value.status == 401
    assert caught.value.provider == framework
    assert "sk-wrong" not in repr(caught.value)


def plain() -> httpx.Client:
    """Return a client that does not read the authorities' certificates, which takes a while."""
    return httpx.Client(verify=False)  # noqa: S501  # the server has no certificate


class TestTheServicesOwnClients:
    """The vendors' clients read the same lists from the same server, so its shapes are those of the services."""

    def test_openai(self, server: Models) -> None:
        openai = pytest.importorskip("openai")
        with openai.OpenAI(api_key=KEY, base_url=f"{server.url}/openai/v1", http_client=plain()) as client:
            assert sorted(model.id for model in client.models.list()) == LISTED["openai"]

    def test_anthropic(self, server: Models) -> None:
        anthropic = pytest.importorskip("anthropic")
        # The newest clients send a key as a bearer token, which the service takes too.
        with anthropic.Anthropic(
            api_key=KEY, base_url=f"{server.url}/anthropic", default_headers={"x-api-key": KEY}
        ) as client:
            assert sorted(model.id for model in client.models.list()) == LISTED["anthropic"]

    def test_gemini(self, server: Models) -> None:
        genai = pytest.importorskip("google.genai")
        options = {"base_url": f"{server.url}/gemini", "api_version": "v1beta", "client_args": {"verify": False}}
        with genai.Client(api_key=KEY, http_options=options) as client:
            found = [model for model in client.models.list() if "generateContent" in model.supported_actions]
        assert sorted(model.name.removeprefix("models/") for model in found) == LISTED["gemini"]

    def test_cohere(self, server: Models) -> None:
        cohere = pytest.importorskip("cohere")
        with plain() as connections:
            client = cohere.ClientV2(api_key=KEY, base_url=f"{server.url}/cohere", httpx_client=connections)
            first = client.models.list(endpoint="chat")
            rest = client.models.list(endpoint="chat", page_token=first.next_page_token)
        assert sorted(model.name for model in (*first.models, *rest.models)) == LISTED["cohere"]

    def test_ollama(self, server: Models) -> None:
        ollama = pytest.importorskip("ollama")
        with ollama.Client(host=f"{server.url}/ollama") as client:
            found = client.list().models
        assert [model.model for model in found] == LISTED["ollama"]

    def test_bedrock(self, server: Models, monkeypatch: pytest.MonkeyPatch) -> None:
        boto3 = pytest.importorskip("boto3")
        monkeypatch.delenv("AWS_BEARER_TOKEN_BEDROCK", raising=False)  # boto3 sends it over TLS only
        keys = {"aws_access_key_id": "AKIDEXAMPLE", "aws_secret_access_key": "secret"}
        client = boto3.client("bedrock", region_name="us-east-1", endpoint_url=server.url, verify=False, **keys)
        models = client.list_foundation_models(byInferenceType="ON_DEMAND", byOutputModality="TEXT")["modelSummaries"]
        names = [model["modelId"] for model in models]
        for page in client.get_paginator("list_inference_profiles").paginate():
            names += [profile["inferenceProfileId"] for profile in page["inferenceProfileSummaries"]]
        assert sorted(names) == LISTED["bedrock"]
        client.close()


def test_the_signature_of_a_list(server: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of Bedrock is signed as botocore signs it: a GET, with its query."""
    auth = pytest.importorskip("botocore.auth")
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    server.answers["/foundation-models"] = server.answers["/inference-profiles"] = (200, {"modelSummaries": []})
    server.answers["/inference-profiles"] = (200, {"inferenceProfileSummaries": []})
    for name, value in {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "secret"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_BEARER_TOKEN_BEDROCK", raising=False)
    with provider("bedrock", server, api_key=None) as llm:
        assert llm.list_models() == []
        assert llm.account is None, "credentials that change have no account to keep a list for"
        assert llm.credentials is not None
        assert getattr(llm.credentials, "origin", None) == "AWS_ACCESS_KEY_ID"
    assert len(server.got) == 2
    for got in server.got:
        url = f"{server.url}{got.path}?{'&'.join(f'{name}={value}' for name, value in got.query.items())}"
        signed = AWSRequest("GET", url, headers={"host": got.headers["host"], "x-amz-date": got.headers["x-amz-date"]})
        signed.context["timestamp"] = got.headers["x-amz-date"]
        signer = auth.SigV4Auth(Credentials("AKIDEXAMPLE", "secret"), "bedrock", "us-east-1")
        signature = signer.signature(signer.string_to_sign(signed, signer.canonical_request(signed)), signed)
        assert got.headers["authorization"].endswith(f"Signature={signature}")


@pytest.mark.model
@pytest.mark.parametrize(("framework", "path"), [("llamacpp", "/v1"), ("openai", "/v1"), ("anthropic", "")])
def test_llama_cpp(framework: str, path: str, local_server: str) -> None:
    """A real server lists its model, to each framework that reaches it."""
    config = LLMConfig(framework=framework, model="-", api_base=local_server + path, api_key=KEY)
    with make_provider(config, asynchronous=False) as llm:
        assert llm.list_models() == ["smollm2"]


@pytest.mark.parametrize(
    ("models", "address", "url"),
    [
        (model_lists.OPENAI, "https://api.openai.com/v1/", "https://api.openai.com/v1/models"),
        (model_lists.OPENAI, "https://gw/v1?team=a", "https://gw/v1/models?team=a"),
        (
            model_lists.BEDROCK,
            "https://bedrock-runtime.us-east-1.amazonaws.com",
            "https://bedrock.us-east-1.amazonaws.com/foundation-models?byInferenceType=ON_DEMAND&byOutputModality=TEXT",
        ),
        (
            model_lists.BEDROCK,
            "https://bedrock-runtime-fips.us-east-1.amazonaws.com",
            "https://bedrock-fips.us-east-1.amazonaws.com/foundation-models?byInferenceType=ON_DEMAND&byOutputModality=TEXT",
        ),
        *(
            (
                model_lists.AZURE,
                f"https://openai.example.openai.azure.com{path}",
                "https://openai.example.openai.azure.com/openai/deployments?api-version=2023-03-15-preview",
            )
            for path in ("", "/", "/openai", "/openai/v1", "/openai/deployments/mine")
        ),
        (
            model_lists.VERTEX,
            "https://us-east1-aiplatform.googleapis.com/v1",
            "https://us-east1-aiplatform.googleapis.com/v1beta1/publishers/google/models?pageSize=100",
        ),
        (
            model_lists.COHERE,
            "https://api.cohere.com/v2",
            "https://api.cohere.com/v1/models?endpoint=chat&page_size=1000",
        ),
    ],
)
def test_the_address_of_a_list(models: tuple[ModelList, ...], address: str, url: str) -> None:
    """It is found from the address of the calls, which may be on another host or of another version."""
    assert models[0].url(address) == url


def test_a_service_without_a_list(server: Models) -> None:
    """It says so, and sends nothing."""
    with provider("perplexity", server, base="") as llm:
        assert not llm.has_list
        with pytest.raises(NotImplementedError, match="perplexity has no list of its models"):
            llm.list_models()
    assert not server.got


# Servers that misbehave


def test_a_list_that_does_not_come(server: Models) -> None:
    """The time limit is for the whole list, however it is sent."""

    def trickle(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("content-length", "100000")
        handler.end_headers()
        while not server.closing.wait(0.02):
            handler.wfile.write(b" ")
            handler.wfile.flush()

    server.answers["/openai/v1/models"] = (200, trickle)
    began = time.monotonic()
    with provider("openai", server) as llm, pytest.raises(RequestTimeout, match=r"sent no whole list within 0\.3 s"):
        llm.list_models(timeout=0.3)
    assert 0.25 < time.monotonic() - began < 2


def test_pages_without_end(server: Models) -> None:
    """A list that goes on and on is given up."""
    page = {"data": [{"id": "m"}], "has_more": True, "last_id": "m"}
    server.answers["/anthropic/v1/models"] = (200, page)
    with provider("anthropic", server) as llm, pytest.raises(StreamProtocolError, match="at most 50 pages"):
        llm.list_models()
    assert len(server.got) == 50


def test_sizes(server: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages, lists and marks have limits; a name that is too long is left out."""
    server.answers["/openai/v1/models"] = (200, {"data": [{"id": "x" * (MAX_NAME + 1)}, {"id": "y" * MAX_NAME}]})
    with provider("openai", server) as llm:
        assert llm.list_models() == ["y" * MAX_NAME]
        server.answers["/openai/v1/models"] = (200, {"data": [{"id": str(number)} for number in range(20_001)]})
        with pytest.raises(StreamProtocolError, match="at most 20,000 models"):
            llm.list_models()
        server.answers["/openai/v1/models"] = (200, b" " * (8 * 1024 * 1024 + 1))
        with pytest.raises(StreamProtocolError, match="a body of at most 8,388,608 bytes"):
            llm.list_models()
    server.answers["/anthropic/v1/models"] = (200, {"data": [], "has_more": True, "last_id": "x" * 4001})
    with provider("anthropic", server) as llm, pytest.raises(StreamProtocolError, match="at most 4,000 characters"):
        llm.list_models()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not JSON",
        b"<html>a proxy</html>",
        b"[" * 100_000,
        b'"data"',
        b"null",
        b"7",
        {"models": []},
        {"data": {"id": "m"}},
        {"data": "m"},
        {"error": {"message": f"no models for {KEY}"}},
    ],
)
def test_what_is_no_list(body: Any, server: Models) -> None:
    """It is one of our errors, which does not show the key."""
    server.answers["/openai/v1/models"] = (200, body)
    with provider("openai", server) as llm, pytest.raises(ProviderError) as caught:
        llm.list_models()
    assert KEY not in repr(caught.value)


@pytest.mark.parametrize("body", [{}, {"data": None}, {"data": []}, {"data": [None, 7, {}, {"id": 7}, {"id": ""}]}])
def test_lists_without_models(body: Any, server: Models) -> None:
    """What is no model is left out."""
    server.answers["/openai/v1/models"] = (200, body)
    with provider("openai", server) as llm:
        assert llm.list_models() == []


def test_a_page_that_is_not_there(server: Models) -> None:
    """A 404 is an error of the service."""
    with provider("openai", server, base="/elsewhere") as llm, pytest.raises(NotFound):
        llm.list_models()


def test_accounts(server: Models) -> None:
    """An account is told apart by its address, its key and its headers, and shows none of them."""
    found = [
        provider("openai", server).account,
        provider("openai", server, key="sk-another-0123456789").account,
        provider("openai", server, base="/other").account,
        provider("openai", server, headers={"openai-organization": "other"}).account,
    ]
    assert len(set(found)) == 4
    assert provider("openai-responses", server).account == found[0]
    assert not any(account is None or KEY in account for account in found)


def test_where_a_key_is_from(server: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting comes before the variable, and a header before both."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert provider("openai", server, api_key=None).key_source == "OPENAI_API_KEY"
    assert provider("openai", server).key_source == "api_key"
    assert provider("openai", server, headers={"authorization": "Bearer x"}).key_source == "headers"
    monkeypatch.delenv("OPENAI_API_KEY")
    assert provider("openai", server, api_key=None).key_source is None
