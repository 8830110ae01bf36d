"""`parse` and `into=` against a real local server, in five dialects: what is sent, and what comes of the answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypedDict

import anyio
import attrs
import msgspec
import pydantic
import pytest
from support import aws

from fluxibly import LLM, AsyncLLM, LLMConfig, Target
from fluxibly.errors import BadRequest
from fluxibly.middleware import Fallback


@attrs.frozen
class Person:
    name: str
    age: int | None


@dataclass
class Data:
    name: str
    age: int | None


class Table(TypedDict):
    name: str
    age: int | None


class Struct(msgspec.Struct):
    name: str
    age: int | None


class Model(pydantic.BaseModel):
    name: str
    age: int | None


FIELDS: dict[str, Any] = {"name": "Zoë", "age": 3}
TYPES: list[tuple[Any, Any]] = [
    (Person, Person(**FIELDS)),
    (Data, Data(**FIELDS)),
    (Table, FIELDS),
    (Struct, Struct(**FIELDS)),
    (Model, Model(**FIELDS)),
    (list[Person], [Person(**FIELDS)]),
]
SERVICES = {
    "openai": ("gpt-5", "/v1"),
    "openai-responses": ("gpt-5", "/v1"),
    "anthropic": ("claude-sonnet-4-5", "/v1"),
    "gemini": ("gemini-2.5-flash", "/v1beta"),
    "bedrock": ("us.anthropic.claude-haiku-4-5-20251001-v1:0", ""),
    "ollama": ("llama3.2", ""),
}


def halves(text: str) -> tuple[str, str]:
    return text[: len(text) // 2], text[len(text) // 2 :]


def sse(*events: dict[str, Any]) -> bytes:
    return b"".join(
        [
            (f"event: {e['type']}\n" if "type" in e else "").encode() + b"data: " + json.dumps(e).encode() + b"\n\n"
            for e in events
        ]
    )


def answered(path: str, body: dict[str, Any], text: str) -> tuple[str, bytes]:
    """Return the content type and the body of a service's answer that has a text, streamed if the request says so."""
    first, second = halves(text)
    if path.endswith("/chat/completions"):
        head = {"id": "c1", "object": "chat.completion", "created": 1, "model": body["model"]}
        if not body.get("stream"):
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "finish_reason": "stop",
            }
            return "application/json", json.dumps({**head, "choices": [choice]}).encode()
        deltas: list[tuple[dict[str, Any], str | None]] = [({"role": "assistant", "content": first}, None)]
        deltas += [({"content": second}, None), ({}, "stop")]
        events = [{**head, "choices": [{"index": 0, "delta": d, "finish_reason": reason}]} for d, reason in deltas]
        return "text/event-stream", sse(*events) + b"data: [DONE]\n\n"
    if path.endswith("/responses"):
        content = [{"type": "output_text", "text": text, "annotations": []}]
        item = {"id": "i1", "type": "message", "role": "assistant", "status": "completed", "content": content}
        done = {"id": "r1", "object": "response", "status": "completed", "model": body["model"], "output": [item]}
        if not body.get("stream"):
            return "application/json", json.dumps(done).encode()
        where = {"item_id": "i1", "output_index": 0, "content_index": 0}
        return "text/event-stream", sse(
            {"type": "response.output_item.added", "output_index": 0, "item": {**item, "content": []}},
            *({"type": "response.output_text.delta", "delta": half, **where} for half in (first, second)),
            {"type": "response.output_item.done", "output_index": 0, "item": item},
            {"type": "response.completed", "response": done},
        )
    if path.endswith("/messages"):
        message = {
            "id": "m1",
            "type": "message",
            "role": "assistant",
            "model": body["model"],
            "stop_reason": "end_turn",
        }
        if not body.get("stream"):
            return "application/json", json.dumps(
                {**message, "content": [{"type": "text", "text": text}], "usage": {}}
            ).encode()
        return "text/event-stream", sse(
            {"type": "message_start", "message": {**message, "content": [], "usage": {}}},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            *(
                {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": half}}
                for half in (first, second)
            ),
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 5}},
            {"type": "message_stop"},
        )
    if "enerateContent" in path:
        pieces = (first, second) if "stream" in path else (text,)
        answers: list[dict[str, Any]] = [
            {"candidates": [{"content": {"parts": [{"text": each}], "role": "model"}, "index": 0}]} for each in pieces
        ]
        answers[-1]["candidates"][0]["finishReason"] = "STOP"
        if len(pieces) == 1:
            return "application/json", json.dumps(answers[0]).encode()
        return "text/event-stream", sse(*answers)
    if path.endswith("/converse"):
        return "application/json", json.dumps(aws.whole([{"text": text}])).encode()
    if path.endswith("/converse-stream"):
        return "application/vnd.amazon.eventstream", aws.stream(*aws.events_of([{"text": text}]))
    lines = [
        {"model": "m", "message": {"role": "assistant", "content": each}, "done": False} for each in (first, second)
    ]
    end = {"model": "m", "message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "stop"}
    if body.get("stream"):
        return "application/x-ndjson", b"".join([json.dumps(each).encode() + b"\n" for each in (*lines, end)])
    whole = {**end, "message": {"role": "assistant", "content": text}}
    return "application/json", json.dumps(whole).encode()


class Service:
    """A service that answers with a text, and refuses schemas if it is told to."""

    def __init__(self, refuse: str = "") -> None:
        outer, self.seen, self.text = self, list[dict[str, Any]](), ""
        self.refuse = refuse

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.seen.append(body)
                status = 200
                if outer.refuse and "words" not in kinds_of(body):
                    status, kind = 400, "application/json"
                    data = json.dumps({"error": {"message": outer.refuse, "type": "invalid_request_error"}}).encode()
                else:
                    kind, data = answered(self.path.partition("?")[0], body, outer.text)
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    yield made
    made.close()


def kinds_of(body: dict[str, Any]) -> set[str]:
    """Return the forms in which a body has the schema."""
    config = body.get("generationConfig", {})
    forms = {
        "response_format": body.get("response_format", {}).get("json_schema"),
        "text": body.get("text", {}).get("format", {}).get("schema"),
        "output_config": body.get("output_config", {}).get("format"),
        "responseJsonSchema": config.get("responseJsonSchema"),
        "textFormat": body.get("outputConfig", {}).get("textFormat"),
        "format": body.get("format"),
        "words": "It has to match this JSON Schema" in json.dumps(body) or None,
    }
    return {name for name, value in forms.items() if value is not None}


FORMS = {
    "openai": "response_format",
    "openai-responses": "text",
    "anthropic": "output_config",
    "gemini": "responseJsonSchema",
    "bedrock": "textFormat",
    "ollama": "format",
}


def config_of(framework: str, service: Service) -> LLMConfig:
    model, path = SERVICES[framework]
    more = {"region": "us-east-1"} if framework == "bedrock" else {}
    return LLMConfig(framework=framework, model=model, api_base=service.url + path, api_key="k", max_retries=0, **more)


@pytest.mark.parametrize("framework", SERVICES)
@pytest.mark.parametrize(("into", "made"), TYPES, ids=lambda each: getattr(each, "__name__", ""))
def test_parse(framework: str, into: Any, made: Any, service: Service) -> None:
    """Each service gets the schema in its own form, and its answers make the instance: whole, streamed, sync and async."""
    service.text = json.dumps({"value": [FIELDS]} if into == list[Person] else FIELDS, ensure_ascii=False)
    config = config_of(framework, service)
    with LLM(config) as llm:
        assert llm.parse("Who?", into) == made
        with llm.stream("Who?", into=into) as stream:
            grown = [stream.partial_parsed for _ in stream]
        assert stream.response.parsed == made
        assert grown[-1] == made

    async def main() -> None:
        async with AsyncLLM(config) as asked:
            assert await asked.parse("Who?", into) == made
            async with asked.stream("Who?", into=into) as stream:
                async for _ in stream:
                    pass
                assert stream.response.parsed == stream.partial_parsed == made

    anyio.run(main)
    assert len(service.seen) == 4
    for body in service.seen:
        assert kinds_of(body) == {FORMS[framework]}


@pytest.mark.parametrize("framework", SERVICES)
def test_a_service_that_refuses_schemas(framework: str) -> None:
    """The refused request is sent again, once, with the schema in words; later calls begin so."""
    service = Service(refuse="response_format: json_schema is not supported by this model")
    service.text = json.dumps(FIELDS)
    try:
        with LLM(config_of(framework, service)) as llm:
            assert llm.parse("Who?", Person) == Person(**FIELDS)
            assert [kinds_of(body) for body in service.seen] == [{FORMS[framework]}, {"words"}]
            with llm.stream("Who?", into=Person) as stream:
                list(stream)
            assert stream.response.parsed == Person(**FIELDS)
            assert kinds_of(service.seen[2]) == {"words"}
            assert len(service.seen) == 3
    finally:
        service.close()


def test_a_strict_schema_is_never_told_in_words() -> None:
    """A caller who wants a schema strictly gets the refusal."""
    service = Service(refuse="response_format: json_schema is not supported by this model")
    strict = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True}}
    try:
        with LLM(config_of("openai", service)) as llm, pytest.raises(BadRequest, match="is not supported"):
            llm.parse("Who?", strict)
        assert len(service.seen) == 1
    finally:
        service.close()


def test_a_fallback_in_another_dialect(service: Service) -> None:
    """One schema, given once: each service of a fallback gets it in its own form."""
    broken = Service(refuse="the model is overloaded")
    service.text = json.dumps(FIELDS)
    try:
        targets = [Target(config_of(name, service)) for name in ("anthropic", "gemini")]
        fallback = Fallback(targets, when=lambda error: True)
        with LLM(config_of("openai", broken), [fallback]) as llm:
            assert llm.parse("Who?", Person) == Person(**FIELDS)
        assert kinds_of(broken.seen[0]) == {"response_format"}
        assert kinds_of(service.seen[0]) == {"output_config"}
    finally:
        broken.close()
