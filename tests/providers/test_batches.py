"""The batch APIs over HTTP: the same answers and errors as of calls, files that are never whole in memory, and keys."""

from __future__ import annotations

import json
import threading
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from support.batch_services import anthropic_answer, batch_service, openai_answer
from support.canned_server import canned_server

from fluxibly import LLMConfig, Message, Request
from fluxibly.errors import (
    AuthenticationError,
    BadRequest,
    ConnectionFailed,
    ProviderError,
    RequestTimeout,
    StreamProtocolError,
)
from fluxibly.providers.anthropic import AsyncAnthropicProvider
from fluxibly.providers.dialects.batches import APICall, Result, Upload
from fluxibly.providers.http import AsyncHTTPProvider, batches
from fluxibly.providers.http.batches import BatchClient
from fluxibly.providers.openai import AsyncOpenAIProvider

pytestmark = pytest.mark.anyio
REQUEST = Request(model="m", messages=(Message.user("hello"),))
KINDS: dict[str, Callable[..., AsyncHTTPProvider]] = {
    "openai": AsyncOpenAIProvider,
    "anthropic": AsyncAnthropicProvider,
}


@pytest.fixture(params=["openai", "anthropic"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@asynccontextmanager
async def client_at(kind: str, url: str, *, key: Any = "sk-the-secret-key", **more: Any) -> AsyncIterator[BatchClient]:
    async with KINDS[kind](LLMConfig(framework=kind, model="m", api_key=key, api_base=f"{url}/v1"), **more) as provider:
        client = provider.batches
        assert client is not None
        yield client


def described(error: ProviderError) -> tuple[Any, ...]:
    return (type(error), str(error), error.retryable, error.status, error.code, error.provider, error.model, error.body)


# The same as of calls


ERRORS = [
    (400, "invalid_request_error", "no such parameter"),
    (400, "invalid_request_error", "prompt is too long: 250000 tokens > 200000 maximum"),
    (401, "authentication_error", "invalid x-api-key sk-the-secret-key"),
    (403, "permission_error", "not for you"),
    (404, "not_found_error", "model: m"),
    (413, "request_too_large", "too large"),
    (429, "rate_limit_error", "slow down"),
    (500, "api_error", "internal error"),
    (504, "timeout_error", "timed out"),
    (529, "overloaded_error", "overloaded"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{error[1]} {error[0]}")
async def test_errors_are_those_of_calls(kind, error):
    status, word, message = error
    inner = {"type": word, "message": message}
    body = json.dumps({"type": "error", "error": inner} if kind == "anthropic" else {"error": inner})
    with canned_server() as server:
        server.fail = (status, body, {})
        config = LLMConfig(framework=kind, model="m", api_key="sk-the-secret-key", api_base=f"{server.url}/v1")
        async with KINDS[kind](config) as provider:
            with pytest.raises(ProviderError) as online:
                await provider.complete(REQUEST)
            client = provider.batches
            assert client is not None
            if kind == "anthropic":
                line = json.dumps({"custom_id": "a", "result": {"type": "errored", "error": json.loads(body)}})
            else:
                line = json.dumps({"custom_id": "a", "response": {"status_code": status, "body": json.loads(body)}})
            result = client.api.result(line.encode())
            assert result is not None
            with pytest.raises(ProviderError) as batched:
                client.answer(result, REQUEST)
    assert json.loads(batched.value.body or "") == json.loads(online.value.body or "")
    online.value.body = batched.value.body
    assert described(batched.value) == described(online.value)
    assert "secret" not in str(batched.value)


async def test_answers_are_those_of_calls(kind):
    answer = anthropic_answer if kind == "anthropic" else openai_answer
    tool = {
        "anthropic": {"content": [{"type": "text", "text": "a"}, {"type": "tool_use", "id": "t", "name": "f", "input": {"x": 1}}], "stop_reason": "tool_use"},
        "openai": {"choices": [{"index": 0, "finish_reason": "tool_calls", "message": {"role": "assistant", "content": None, "tool_calls": [{"id": "t", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]}}]},
    }  # fmt: skip
    for body in (answer({"model": "m-1"}, "hi"), {**answer({"model": "m-1"}, "hi"), **tool[kind]}):
        data = json.dumps(body).encode()
        with canned_server() as server:
            server.body = data.decode()
            config = LLMConfig(framework=kind, model="m", api_key="k", api_base=f"{server.url}/v1")
            async with KINDS[kind](config) as provider:
                online = await provider.complete(REQUEST)
                client = provider.batches
                assert client is not None
                batched = client.answer(Result("a", "answered", 200, data, "req-1"), REQUEST)
        assert batched.request_id == "req-1"
        assert batched.evolve(request_id=None) == online.evolve(request_id=None, rate_limits={})
        assert batched.tool_calls == online.tool_calls


async def test_requests_that_were_never_come_to(kind):
    async with client_at(kind, "http://127.0.0.1:1") as client:
        with pytest.raises(RequestTimeout, match="expired before") as expired:
            client.answer(Result("a", "expired"), REQUEST)
        with pytest.raises(ProviderError, match="cancelled before") as cancelled:
            client.answer(Result("a", "cancelled"), REQUEST)
        with pytest.raises(StreamProtocolError):
            client.answer(Result("a", "failed", None, b"null"), REQUEST)
    assert expired.value.retryable
    assert cancelled.value.retryable


async def test_a_request_that_no_batch_can_have_is_refused(kind):
    async with client_at(kind, "http://127.0.0.1:1") as client:
        with pytest.raises(BadRequest, match="headers"):
            client.row("a", REQUEST.evolve(headers={"x": "y"}))
        with pytest.raises(BadRequest):
            client.row("a", REQUEST.evolve(seed=1, top_k=1))


async def test_other_services_have_none():
    config = LLMConfig(framework="deepseek", model="m", api_key="k")
    async with AsyncOpenAIProvider(config) as provider:
        assert provider.batches is None
    for framework in ("openai-responses", "groq", "together"):
        async with AsyncOpenAIProvider(LLMConfig(framework=framework, model="m", api_key="k")) as provider:
            assert provider.batches is not None


# Files


class _Raw(BaseHTTPRequestHandler):
    """Takes uploads without keeping them, and sends results of any size."""

    protocol_version = "HTTP/1.1"
    received: list[int]
    lines: Iterator[bytes]

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the name in the base class
        pass

    def do_POST(self) -> None:
        left = int(self.headers["content-length"])
        got = 0
        while got < left:
            got += len(self.rfile.read(min(1 << 16, left - got)))
        self.received.append(got)
        data = b'{"id": "x"}'
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        try:
            for line in self.lines:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(line), line))
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            pass


@contextmanager
def raw_server(lines: Iterator[bytes] | None = None) -> Iterator[tuple[str, list[int]]]:
    received: list[int] = []

    class Handler(_Raw):
        pass

    Handler.received, Handler.lines = received, lines or iter(())
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", received
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("over", ["own connections", "httpx"])
async def test_an_upload_is_never_whole_in_memory(tmp_path, over):
    size = 48 * 1024 * 1024
    path = tmp_path / "rows"
    with path.open("wb") as file:
        file.truncate(size)
    more = {"transport": httpx.AsyncHTTPTransport()} if over == "httpx" else {}
    upload = Upload(path="/files", head=b"<", tail=b">", content_type="text/plain")
    with raw_server() as (url, received), path.open("rb") as rows:
        async with client_at("openai", url, **more) as client:
            tracemalloc.start()
            try:
                assert await client.upload(upload, rows) == b'{"id": "x"}'
                _, most = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
    assert received == [size + 2]
    assert most < 12 * 1024 * 1024


async def test_results_are_never_whole_in_memory():
    line = json.dumps({"custom_id": "a", "response": {"status_code": 200, "body": "x" * 50_000}}).encode() + b"\n"
    with raw_server(line for _ in range(800)) as (url, _):
        async with client_at("openai", url) as client:
            tracemalloc.start()
            try:
                count = 0
                async for result in client.results("/files/x/content"):
                    count += len(result.body) > 50_000
                _, most = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
    assert count == 800
    assert most < 12 * 1024 * 1024


async def test_results_come_line_by_line_wherever_they_are_cut():
    data = b"".join(
        b'{"custom_id": "%d", "response": {"status_code": 200, "body": {}}}\r\n\n' % number for number in range(9)
    )
    pieces = iter([data[start : start + 7] for start in range(0, len(data.rstrip()), 7)])
    with raw_server(pieces) as (url, _):
        async with client_at("openai", url) as client:
            assert [result.custom_id async for result in client.results("/x")] == [str(number) for number in range(9)]


async def test_a_line_without_end_is_an_error(monkeypatch):
    monkeypatch.setattr(batches, "MAX_RESULT", 100_000)
    with raw_server(b"x" * 1000 for _ in range(1_000_000)) as (url, _):
        async with client_at("openai", url) as client:
            with pytest.raises(StreamProtocolError, match="at most 100,000 bytes a line") as raised:
                async for _ in client.results("/x"):
                    pass
    assert not raised.value.retryable


async def test_results_that_end_too_early_are_an_error(kind):
    with batch_service(kind) as service:
        async with client_at(kind, service.url, key="k") as client:
            names = {"anthropic": "results", "openai": "output"}
            batch = service.make([])
            batch.lines[names[kind]] = [
                b'{"custom_id": "a", "result": {"type": "expired"}, "response": {"status_code": 200}}'
            ] * 3
            path = (
                f"/messages/batches/{batch.id}/results" if kind == "anthropic" else f"/files/{batch.id}-output/content"
            )
            service.cut_results = 2
            got: list[str] = []

            async def read() -> None:
                async for result in client.results(path):
                    got.append(result.custom_id)  # noqa: PERF401  # what came before the end counts

            with pytest.raises(StreamProtocolError, match="in the middle of its response") as raised:
                await read()
            assert raised.value.retryable
            assert got == ["a", "a"]
            got.clear()
            await read()
            assert got == ["a", "a", "a"]


# Requests and keys


async def test_a_submission_is_never_sent_again_by_itself(kind, tmp_path):
    """A connection that is used again may end before or after the service has acted, so a submission takes a new one."""
    with batch_service(kind, cut=["after"]) as service:
        async with client_at(kind, service.url, key="k") as client:
            await client.ask(client.api.page(""))  # leaves a connection
            if kind == "openai":
                service.files["f"] = client.row("a", REQUEST)
                call: Awaitable[bytes] = client.ask(client.api.submit("abc", "f"))
            else:
                rows = (tmp_path / "rows").open("w+b")
                rows.write(client.row("a", REQUEST))
                call = client.upload(client.api.upload("abc"), rows)
            with pytest.raises(ConnectionFailed):
                await call
            if kind == "anthropic":
                rows.close()
            assert len(service.batches) == 1


async def test_a_refused_key_of_a_function_is_asked_for_anew(kind):
    keys = iter(["old", "new"])
    with batch_service(kind, key="new") as service:
        async with client_at(kind, service.url, key=lambda: next(keys)) as client:
            assert client.api.read_page(await client.ask(client.api.page(""))) == ((), "")
    assert len(service.paths) == 2


async def test_errors_name_no_key(kind):
    with batch_service(kind) as service:
        async with client_at(kind, service.url, key="sk-wrong-secret") as client:
            with pytest.raises(AuthenticationError) as raised:
                await client.ask(APICall(path="/x"))
    assert "sk-wrong-secret" not in f"{raised.value}{raised.value.body}"
    assert raised.value.provider == kind


async def test_a_server_that_is_not_there(kind):
    async with client_at(kind, "http://127.0.0.1:1") as client:
        with pytest.raises(ConnectionFailed):
            await client.ask(client.api.page(""))
        with pytest.raises(ConnectionFailed):
            async for _ in client.results("/x"):
                pass
