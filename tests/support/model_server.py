"""A server that lists models as each service does, in the shapes and by the pages of the services' documentation."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import attrs

KEY = "sk-a-secret-0123456789"
"""The key that each service takes."""


@attrs.frozen
class Got:
    """A request that arrived."""

    path: str
    query: dict[str, str]
    headers: Mapping[str, str]


@attrs.define
class Models:
    """The server's address, what it got, and what it sends in place of the services' lists.

    `answers` has a status and a body (or what sends one) for each path that is not a service's. `hold` keeps an answer back
    until the server closes.
    """

    url: str = ""
    got: list[Got] = attrs.Factory(list)
    answers: dict[str, tuple[int, Any]] = attrs.Factory(dict)
    closing: threading.Event = attrs.Factory(threading.Event)

    def paths(self) -> list[str]:
        return [each.path for each in self.got]


@contextmanager
def model_server() -> Iterator[Models]:
    """Run a server on a free port of the loopback interface."""
    models = Models()

    class Handler(_Handler):
        orders = models

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    models.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield models
    finally:
        models.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    orders: Models
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet for head and body: two would wait for each other's acknowledgement

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the name in the base class
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        got = Got(url.path, query, {name.lower(): value for name, value in self.headers.items()})
        self.orders.got.append(got)
        if url.path in self.orders.answers:
            status, body = self.orders.answers[url.path]
            if callable(body):
                body(self)
                return
        elif url.path in SERVICES:
            header, value, answer = SERVICES[url.path]
            given = got.headers.get(header, "")
            right = not header or given == value or given.startswith("AWS4-HMAC-SHA256 ")
            status, body = (200, answer(query)) if right else (401, {"error": {"message": "Incorrect API key"}})
        else:
            status, body = 404, {"error": {"message": f"no such path: {url.path}"}}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


Answer = Callable[[Mapping[str, str]], Any]


def _openai(_: Mapping[str, str]) -> Any:
    names = ("gpt-5", "gpt-5-mini", "text-embedding-3-small")
    return {
        "object": "list",
        "data": [{"id": name, "object": "model", "created": 1686935002, "owned_by": "openai"} for name in names],
    }


def _anthropic(query: Mapping[str, str]) -> Any:
    names = ["claude-opus-4-6", "claude-sonnet-4-6", "claude-haiku-4-5-20251001"]
    start = names.index(query["after_id"]) + 1 if "after_id" in query else 0
    page = names[start : start + 2]
    data = [
        {"type": "model", "id": name, "display_name": name.title(), "created_at": "2026-02-04T00:00:00Z"}
        for name in page
    ]
    return {"data": data, "has_more": start + 2 < len(names), "first_id": page[0], "last_id": page[-1]}


def _gemini(query: Mapping[str, str]) -> Any:
    def model(name: str, *methods: str) -> Any:
        return {
            "name": f"models/{name}",
            "version": "001",
            "displayName": name.title(),
            "inputTokenLimit": 1048576,
            "outputTokenLimit": 65536,
            "supportedGenerationMethods": methods,
            "temperature": 1,
        }

    if query.get("pageToken") == "a/token=":
        return {"models": [model("gemini-2.5-pro", "generateContent", "countTokens")]}
    first = [model("gemini-2.5-flash", "generateContent", "countTokens"), model("gemini-embedding-001", "embedContent")]
    return {"models": first, "nextPageToken": "a/token="}


def _vertex(*names: str) -> Answer:
    def answer(_: Mapping[str, str]) -> Any:
        if not names:
            return {}
        models = [{"name": name, "versionId": "default", "launchStage": "GA"} for name in names]
        return {"publisherModels": models}

    return answer


def _ollama(_: Mapping[str, str]) -> Any:
    details = {"format": "gguf", "family": "llama", "parameter_size": "3.2B", "quantization_level": "Q4_K_M"}
    return {
        "models": [
            {
                "name": name,
                "model": name,
                "modified_at": "2026-05-04T17:37:44.706015396-07:00",
                "size": 3826793677,
                "digest": "a80c4f17acd5",
                "details": details,
            }
            for name in ("llama3.2:latest", "qwen3:8b")
        ]
    }


def _cohere(query: Mapping[str, str]) -> Any:
    def model(name: str, *endpoints: str) -> Any:
        return {"name": name, "endpoints": endpoints, "finetuned": False, "context_length": 256000, "features": None}

    models = [model("command-a-03-2025", "chat"), model("embed-v4.0", "embed"), model("command-r7b-12-2024", "chat")]
    models = [each for each in models if query.get("endpoint") in (None, *each["endpoints"])]
    if query.get("page_token") == "next":
        return {"models": models[1:]}
    return {"models": models[:1], "next_page_token": "next"}


def _bedrock_models(query: Mapping[str, str]) -> Any:
    def model(name: str, output: str, *types: str) -> Any:
        return {
            "modelArn": f"arn:aws:bedrock:us-east-1::foundation-model/{name}",
            "modelId": name,
            "modelName": name,
            "providerName": "Amazon",
            "inputModalities": ["TEXT"],
            "outputModalities": [output],
            "responseStreamingSupported": True,
            "inferenceTypesSupported": types,
            "modelLifecycle": {"status": "ACTIVE"},
        }

    models = [
        model("amazon.nova-lite-v1:0", "TEXT", "ON_DEMAND"),
        model("amazon.titan-image-v1", "IMAGE", "ON_DEMAND"),
        model("anthropic.claude-sonnet-4-6", "TEXT", "INFERENCE_PROFILE"),
    ]
    return {
        "modelSummaries": [
            each
            for each in models
            if query.get("byInferenceType") in (None, *each["inferenceTypesSupported"])
            and query.get("byOutputModality") in (None, *each["outputModalities"])
        ]
    }


def _bedrock_profiles(query: Mapping[str, str]) -> Any:
    name = "eu.anthropic.claude-sonnet-4-6" if query.get("nextToken") else "us.anthropic.claude-sonnet-4-6"
    profile = {
        "inferenceProfileName": name,
        "inferenceProfileArn": f"arn:aws:bedrock:us-east-1:1:inference-profile/{name}",
        "inferenceProfileId": name,
        "models": [],
        "status": "ACTIVE",
        "type": "SYSTEM_DEFINED",
    }
    return {"inferenceProfileSummaries": [profile], **({} if query.get("nextToken") else {"nextToken": "a+b/c="})}


def _azure(query: Mapping[str, str]) -> Any:
    if query.get("api-version") != "2023-03-15-preview":
        return {"error": {"code": "404", "message": "Resource not found"}}
    deployment = {"id": "my-deployment", "model": "gpt-5", "object": "deployment", "status": "succeeded"}
    return {"data": [deployment], "object": "list"}


def _together(_: Mapping[str, str]) -> Any:
    return [{"id": "moonshotai/Kimi-K2", "object": "model", "type": "chat", "organization": "Moonshot"}]


BEARER = ("authorization", f"Bearer {KEY}")
SERVICES: dict[str, tuple[str, str, Answer]] = {
    "/openai/v1/models": (*BEARER, _openai),
    "/together/v1/models": (*BEARER, _together),
    "/anthropic/v1/models": ("x-api-key", KEY, _anthropic),
    "/gemini/v1beta/models": ("x-goog-api-key", KEY, _gemini),
    "/vertex/v1beta1/publishers/google/models": (
        *BEARER,
        _vertex("publishers/google/models/gemini-2.5-pro", "publishers/google/models/gemini-2.5-flash"),
    ),
    "/vertex/v1beta1/publishers/anthropic/models": (*BEARER, _vertex()),
    "/ollama/api/tags": ("", "", _ollama),
    "/cohere/v1/models": (*BEARER, _cohere),
    "/foundation-models": (*BEARER, _bedrock_models),
    "/inference-profiles": (*BEARER, _bedrock_profiles),
    "/azure/openai/deployments": ("api-key", KEY, _azure),
}
"""The header that a service wants, its value, and its list, by its path."""

BASES: dict[str, str] = {
    "openai": "/openai/v1",
    "openai-responses": "/openai/v1",
    "together": "/together/v1",
    "anthropic": "/anthropic",
    "gemini": "/gemini",
    "vertex": "/vertex",
    "ollama": "/ollama",
    "cohere": "/cohere",
    "bedrock": "",
    "azure": "/azure",
}
"""The paths below which the services are, by framework."""

LISTED: dict[str, list[str]] = {
    "openai": ["gpt-5", "gpt-5-mini", "text-embedding-3-small"],
    "openai-responses": ["gpt-5", "gpt-5-mini", "text-embedding-3-small"],
    "together": ["moonshotai/Kimi-K2"],
    "anthropic": ["claude-haiku-4-5-20251001", "claude-opus-4-6", "claude-sonnet-4-6"],
    "gemini": ["gemini-2.5-flash", "gemini-2.5-pro"],
    "vertex": ["gemini-2.5-flash", "gemini-2.5-pro"],
    "ollama": ["llama3.2:latest", "qwen3:8b"],
    "cohere": ["command-a-03-2025", "command-r7b-12-2024"],
    "bedrock": ["amazon.nova-lite-v1:0", "eu.anthropic.claude-sonnet-4-6", "us.anthropic.claude-sonnet-4-6"],
    "azure": ["my-deployment"],
}
"""The models that can be called, by framework."""
