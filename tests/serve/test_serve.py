"""The server: what clients of OpenAI's API get from a stack, and what no client may do."""

from __future__ import annotations

import concurrent.futures
import json
import logging
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
from support.canned_server import canned_server
from support.leftovers import eventually
from support.serving import Endless, Outcomes, served, sharing

from fluxibly import AsyncLLM, AsyncPipeline, LLMConfig, ProviderError, Request, Usage, errors, tool
from fluxibly.errors import RateLimitError
from fluxibly.middleware import Budget, Cost, Fallback, Guard, Tools, Tracing
from fluxibly.parts import Audio, Image, Reasoning
from fluxibly.serve import _requests, application
from fluxibly.serve._gate import LOOPBACK_HOSTS
from fluxibly.testing import AsyncScriptedProvider
from fluxibly.types import Chunk, Response, ToolCall

HELLO = {"messages": [{"role": "user", "content": "hello"}]}
TOKEN = "a-token-of-the-test"  # noqa: S105  # for a server in this process

PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""No test needs certificates, and to read the system's takes longer than a test."""


@pytest.fixture(scope="module", autouse=True)
def one_server() -> Iterator[None]:
    """All tests share a server, but not the application behind it."""
    with sharing():
        yield


def model_of(provider: Any, middleware: Any = ()) -> AsyncLLM:
    """Return a model that a provider answers for."""
    llm = AsyncLLM(LLMConfig(framework="echo", model="m"), list(middleware))
    llm.pipeline = AsyncPipeline(provider, list(middleware))
    return llm


@contextmanager
def serving(provider: Any, middleware: Any = (), **settings: Any) -> Iterator[httpx.Client]:
    """Serve a provider. The value is a client whose base address is that of the API."""
    with (
        served(application(model_of(provider, middleware), **settings)) as url,
        httpx.Client(base_url=f"{url}/v1", timeout=10, verify=PLAIN) as client,
    ):
        yield client


@contextmanager
def asking(provider: Any, middleware: Any = (), **settings: Any) -> Iterator[openai.OpenAI]:
    """Serve a provider. The value is OpenAI's own client."""
    with (
        served(application(model_of(provider, middleware), **settings)) as url,
        openai.OpenAI(
            api_key=settings.get("token") or "x",
            base_url=f"{url}/v1",
            max_retries=0,
            http_client=httpx.Client(verify=PLAIN),
        ) as client,
    ):
        yield client


def ask(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/chat/completions", json={**HELLO, **body})


def error_of(response: httpx.Response) -> dict[str, Any]:
    """Return the error of a response, which has to have OpenAI's shape."""
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    return error


WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


class TestAnswers:
    def test_a_whole_answer(self) -> None:
        """OpenAI's client reads the text, the reasoning, the usage, the choices and the model that answered."""
        answer = Response(
            "Yes",
            reasoning="Hm",
            usage=Usage(input_tokens=3, output_tokens=2, cached_tokens=1, reasoning_tokens=1),
            finish_reason="length",
            model="m-2",
            alternatives=[Response("No", finish_reason="stop")],
        )
        with asking(AsyncScriptedProvider(answer)) as client:
            got = client.chat.completions.create(model="whatever", messages=[{"role": "user", "content": "?"}], n=2)
        assert [(each.index, each.message.content, each.finish_reason) for each in got.choices] == [
            (0, "Yes", "length"),
            (1, "No", "stop"),
        ]
        assert (got.model, got.object) == ("m-2", "chat.completion")
        assert got.choices[0].message.reasoning_content == "Hm"  # type: ignore[attr-defined]  # no field of OpenAI's own
        assert got.usage is not None
        assert got.usage.total_tokens == 5
        assert got.usage.prompt_tokens_details is not None
        assert got.usage.prompt_tokens_details.cached_tokens == 1

    @pytest.mark.parametrize("wanted", [True, False])
    def test_a_stream(self, wanted: bool) -> None:
        """The usage comes if the client asks for it, as from OpenAI."""
        answer = Response("Hello there", usage=Usage(input_tokens=3, output_tokens=2), finish_reason="stop")
        with asking(AsyncScriptedProvider(answer)) as client:
            chunks = list(
                client.chat.completions.create(
                    model="m",
                    messages=[{"role": "user", "content": "?"}],
                    stream=True,
                    stream_options={"include_usage": wanted},
                )
            )
        texts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
        assert "".join(texts) == "Hello there"
        assert [chunk.usage.total_tokens for chunk in chunks if chunk.usage] == ([5] if wanted else [])

    def test_a_conversation_with_tools(self) -> None:
        """A call goes out, its result comes back, and both reach the provider as they are."""
        call = ToolCall("c1", "weather", {"city": "Rome"})
        provider = AsyncScriptedProvider(Response("", tool_calls=[call], finish_reason="tool_call"), "20 degrees")
        with asking(provider) as client:
            messages: list[Any] = [{"role": "user", "content": "How warm is it?"}]
            choice: Any = {"type": "function", "function": {"name": "weather"}}
            first = client.chat.completions.create(model="m", messages=messages, tools=[WEATHER], tool_choice=choice)
            assert first.choices[0].finish_reason == "tool_calls"
            assert first.choices[0].message.content is None
            found = first.choices[0].message.tool_calls
            assert found is not None
            result = {"role": "tool", "tool_call_id": found[0].id, "content": "20"}
            messages += [first.choices[0].message.model_dump(), result]
            second = client.chat.completions.create(model="m", messages=messages, tools=[WEATHER])
        assert second.choices[0].message.content == "20 degrees"
        asked = provider.requests
        assert (asked[0].tool_choice, asked[0].tools[0].name) == ("weather", "weather")
        assert asked[1].messages[1].tool_calls == (call,)
        assert (asked[1].messages[2].tool_call_id, asked[1].messages[2].text) == ("c1", "20")

    def test_tools_of_the_stack(self) -> None:
        """The client sees one message, whole and streamed, and nothing of the tools that ran."""
        call = ToolCall("c1", "clock", {})
        answers = [Response("Let me see.", tool_calls=[call], finish_reason="tool_call"), "It is noon."]
        clock = Tools([tool(lambda: "noon", name="clock", description="Tell the time.")])
        with asking(AsyncScriptedProvider(*answers, *answers), [clock]) as client:
            create: Any = client.chat.completions.create
            whole = create(model="m", messages=[{"role": "user", "content": "?"}])
            chunks = list(create(model="m", messages=[{"role": "user", "content": "?"}], stream=True))
        assert whole.choices[0].message.content == "It is noon."
        assert whole.choices[0].message.tool_calls is None
        assert "".join([each.choices[0].delta.content or "" for each in chunks]) == "Let me see.\n\nIt is noon."
        assert not any(each.choices[0].delta.tool_calls for each in chunks)

    def test_parts(self) -> None:
        """Images and sound go in and out, and reasoning comes back with its signature."""
        answer = Response.from_parts([Reasoning(text="Hm", signature="sig"), Image(url="https://x.example/y.png")])
        provider = AsyncScriptedProvider(answer, "ok")
        with serving(provider) as client:
            content: list[Any] = [
                {"type": "text", "text": "Look"},
                {"type": "image_url", "image_url": {"url": "https://x.example/a.png", "detail": "low"}},
                {"type": "input_audio", "input_audio": {"data": "d2F2", "format": "wav"}},
            ]
            message = ask(client, messages=[{"role": "user", "content": content}]).json()["choices"][0]["message"]
            assert message["images"][0]["image_url"]["url"] == "https://x.example/y.png"
            back = {name: value for name, value in message.items() if value is not None}
            assert ask(client, messages=[back, {"role": "user", "content": "go on"}]).status_code == 200
        first, second = provider.requests
        assert [type(part) for part in first.messages[0].content[1:]] == [Image, Audio]
        assert "sig" in [part.signature for part in second.messages[0].reasoning]

    def test_the_parameters_of_a_call(self) -> None:
        """Every parameter that fluxibly knows reaches the provider."""
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
        provider = AsyncScriptedProvider("a", "b")
        with serving(provider) as client:
            given = {
                "temperature": 0.5,
                "top_p": 0.9,
                "frequency_penalty": 0.1,
                "presence_penalty": 0.2,
                "seed": 7,
                "n": 1,
                "reasoning_effort": "low",
            }
            others = {"stop": "END", "max_completion_tokens": 9, "response_format": wanted, "user": "ann"}
            ignored = {"store": True, "service_tier": "auto", "logprobs": None, "logit_bias": {}, "made_up": 1}
            assert ask(client, **given, **others, **ignored, metadata={"team": "x"}).status_code == 200
            assert ask(client, max_tokens=8, stop=["A", "B"], response_format={"type": "text"}).status_code == 200
        first, second = provider.requests
        assert {name: getattr(first, name) for name in given} == given
        assert (first.max_tokens, first.stop, first.response_format) == (9, ("END",), wanted)
        assert first.metadata == {"team": "x", "user": "ann"}
        assert dict(first.extra) == {}
        assert (second.max_tokens, second.stop) == (8, ("A", "B"))

    def test_extra_parameters(self) -> None:
        """With `pass_extra`, what fluxibly does not know goes to the service."""
        provider = AsyncScriptedProvider("a")
        with serving(provider, pass_extra=True) as client:
            assert ask(client, logprobs=True, service_tier="flex", store=None).status_code == 200
        assert dict(provider.requests[0].extra) == {"logprobs": True, "service_tier": "flex"}

    def test_models(self) -> None:
        """The model of a body counts only if it is on the list; the list is what `/v1/models` has."""
        provider = AsyncScriptedProvider("a", "b")
        with asking(provider, models=["a", "org/b"]) as client:
            assert [each.id for each in client.models.list()] == ["a", "org/b"]
            assert client.models.retrieve("org/b").id == "org/b"
            with pytest.raises(openai.NotFoundError):
                client.models.retrieve("m")
            client.chat.completions.create(model="org/b", messages=[{"role": "user", "content": "?"}])
            with pytest.raises(openai.NotFoundError) as caught:
                client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "?"}])
        assert caught.value.code == "model_not_found"
        assert [request.model for request in provider.requests] == ["org/b"]

    def test_the_model_is_ignored_by_default(self) -> None:
        """Programs that insist on a model's name get the answer of the configured one."""
        provider = AsyncScriptedProvider("a")
        with asking(provider) as client:
            assert [each.id for each in client.models.list()] == ["m"]
            client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "?"}])
        assert provider.requests[0].model == "m"

    def test_litellm_s_client(self) -> None:
        """LiteLLM's client reads whole answers and streams, calls included, and its messages come back."""
        pytest.importorskip("litellm")
        call = ToolCall("c1", "weather", {"city": "Rome"})
        asks = Response("Let me see.", tool_calls=[call], finish_reason="tool_call")
        provider = AsyncScriptedProvider(asks, "Warm", asks, "Warm")
        with served(application(model_of(provider))) as url:
            done = subprocess.run(
                [sys.executable, "-c", LITELLM, f"{url}/v1", json.dumps([WEATHER])],
                capture_output=True,
                encoding="utf-8",
                timeout=60,
                check=False,
            )
        assert done.returncode == 0, done.stderr
        assert [request.messages[1].tool_calls for request in provider.requests[1::2]] == [(call,), (call,)]


LITELLM = """
import json, sys
import litellm

url, tools = sys.argv[1], json.loads(sys.argv[2])
options = {"model": "openai/m", "api_base": url, "api_key": "x", "tools": tools}
for stream in (False, True):
    messages = [{"role": "user", "content": "How warm is it?"}]
    got = litellm.completion(messages=messages, stream=stream, **options)
    message = (litellm.stream_chunk_builder(list(got)) if stream else got).choices[0].message
    assert (message.content, message.tool_calls[0].function.name) == ("Let me see.", "weather"), message
    messages += [message.model_dump(), {"role": "tool", "tool_call_id": "c1", "content": "20"}]
    again = litellm.completion(messages=messages, **options)
    assert again.choices[0].message.content == "Warm", again
"""
"""A program in a process of its own, because LiteLLM leaves clients and an event loop behind."""


class TestErrors:
    @pytest.mark.parametrize("stream", [True, False])
    @pytest.mark.parametrize(
        ("error", "status", "code", "headers"),
        [
            (errors.GuardRefused("no insults"), 400, "content_filter", {}),
            (errors.ContentFiltered("no", status=400), 400, "content_filter", {}),
            (errors.ContextLengthExceeded("too long"), 400, "context_length_exceeded", {}),
            (errors.BadRequest("no"), 400, None, {}),
            (errors.ConfigError("no"), 400, None, {}),
            (errors.RateLimitError("slow", retry_after=1.2), 429, "rate_limit_exceeded", {"retry-after": "2"}),
            (errors.RateLimitError("slow"), 429, "rate_limit_exceeded", {"retry-after": "1"}),
            (errors.RateLimitWait("slow", retry_after=30.0), 429, "rate_limit_exceeded", {"retry-after": "30"}),
            (errors.QueueFull("full", retry_after=2.0), 429, "queue_full", {"retry-after": "2"}),
            (errors.QuotaExceeded("empty"), 429, "insufficient_quota", {"x-should-retry": "false"}),
            (errors.BudgetExceeded("spent"), 429, "insufficient_quota", {"x-should-retry": "false"}),
            (errors.CircuitOpen("open", retry_after=9.0), 503, "circuit_open", {"retry-after": "9"}),
            (errors.Overloaded("busy"), 503, "overloaded", {"retry-after": "1"}),
            (errors.DeadlineExceeded("late"), 504, "deadline_exceeded", {"x-should-retry": "false"}),
            (errors.RequestTimeout("late"), 504, "timeout", {}),
            (errors.ServerError("broken", status=500), 502, "upstream_error", {}),
            (errors.AuthenticationError("sk-1234 is wrong", status=401), 502, "upstream_authentication", {}),
            (errors.PermissionDenied("no", status=403), 502, "upstream_permission", {}),
            (errors.NotFound("no such model", status=404), 502, "upstream_error", {"x-should-retry": "false"}),
            (errors.MaxTurnsExceeded("turns"), 500, None, {"x-should-retry": "false"}),
            (KeyError("/secret/path"), 500, "internal_error", {}),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
    )
    def test_an_error_before_output(
        self, error: Exception, status: int, code: str | None, headers: dict[str, str], stream: bool
    ) -> None:
        """Each error has its status, its code and its advice to ask again or not, whole and streamed alike."""
        with serving(AsyncScriptedProvider(error)) as client:
            response = ask(client, stream=stream)
        found = error_of(response)
        assert (response.status_code, found["code"]) == (status, code)
        assert {name: response.headers.get(name) for name in headers} == headers
        assert "sk-1234" not in response.text
        assert "/secret" not in response.text

    def test_an_error_in_the_middle(self) -> None:
        """OpenAI's client raises it, after the texts that came before it."""
        with asking(AsyncScriptedProvider(["Hello", RateLimitError("slow down")])) as client:
            got: list[Any] = []
            stream = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "?"}], stream=True)
            with pytest.raises(openai.APIError, match="slow down") as caught:
                got.extend(stream)
        assert caught.value.code == "rate_limit_exceeded"

    def test_no_done_after_an_error(self) -> None:
        """An answer that has failed does not end as a complete one does."""
        with serving(AsyncScriptedProvider(["Hello", ProviderError("broken")])) as client:
            text = ask(client, stream=True).text
        assert "event: error" in text
        assert "[DONE]" not in text

    @pytest.mark.parametrize("stream", [True, False])
    def test_errors_quote_no_texts(self, stream: bool) -> None:
        """A service's error may quote the prompt, also what a middleware added, which is not the client's."""

        def instructed(request: Request, call_next: Any) -> Any:
            from fluxibly import Message

            messages = (Message.system("the secret instructions of the stack"), *request.messages)
            return (yield from call_next(request.evolve(messages=messages)))

        broken = errors.BadRequest("cannot read: the secret instructions of the stack; hello world, how are you")
        with serving(AsyncScriptedProvider(broken), [instructed]) as client:
            messages = [{"role": "user", "content": "hello world, how are you"}]
            message = error_of(ask(client, messages=messages, stream=stream))["message"]
        assert message == "cannot read: […]; […]"

    def test_a_guard(self) -> None:
        """A refusal is OpenAI's content filter for the client."""
        guard = Guard(input=lambda request: "no hellos" if "hello" in request.messages[-1].text else None)
        with asking(AsyncScriptedProvider(), [guard]) as client, pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hello"}])
        assert caught.value.code == "content_filter"

    def test_a_provider_without_streams(self) -> None:
        """The client learns that it has to ask for a whole answer."""

        class Whole:
            async def complete(self, request: Request) -> str:
                return "whole"

        with serving(Whole()) as client:
            assert ask(client, stream=True).status_code >= 400
            assert ask(client).json()["choices"][0]["message"]["content"] == "whole"


class TestBadBodies:
    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"hello",
            b"[]",
            b"null",
            b'"text"',
            b"{",
            b'{"messages": [}',
            b"[" * 100_000,
            b'{"messages":' + b"[" * 100_000,
            b'{"messages":' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
            b"\xff\xfe",
            b"\x00",
        ],
        ids=range(12),
    )
    def test_what_is_no_request(self, body: bytes) -> None:
        """Whatever a body is, the answer is a 400 in OpenAI's shape that does not quote it."""
        with serving(AsyncScriptedProvider()) as client:
            response = client.post("/chat/completions", content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400
        assert len(error_of(response)["message"]) < 300

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"messages": None}, "messages"),
            ({"messages": []}, "messages"),
            ({"messages": "hello"}, "messages"),
            ({"messages": [7]}, "messages[0]"),
            ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
            ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
                "messages[0].content[0].image_url.url",
            ),
            ({"messages": [{"role": "user", "content": [{"type": "x"}]}]}, "messages[0].content[0].type"),
            ({"messages": [{"role": "user", "content": ""}]}, None),
            ({"temperature": "hot"}, "temperature"),
            ({"temperature": 9}, "temperature"),
            ({"max_tokens": -1}, "max_tokens"),
            ({"max_completion_tokens": "many"}, "max_tokens"),
            ({"n": 0}, "n"),
            ({"stop": 5}, "stop"),
            ({"stop": [5]}, "stop"),
            ({"stream": "yes"}, "stream"),
            ({"stream": 1}, "stream"),
            ({"stream_options": []}, "stream_options"),
            ({"stream_options": {"include_usage": "x"}}, "stream_options.include_usage"),
            ({"tools": {}}, "tools"),
            ({"tools": [5]}, "tools[0]"),
            ({"tools": [{"type": "function"}]}, None),
            ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
            ({"tool_choice": 5}, "tool_choice"),
            ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
            ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
            ({"response_format": "yaml"}, "response_format"),
            ({"response_format": {"type": "json_schema"}}, "response_format"),
            ({"metadata": "x"}, "metadata"),
            ({"user": 5}, "user"),
            ({"functions": [{}]}, "functions"),
            ({"logprobs": True}, "logprobs"),
            ({"logit_bias": {"1": 5}}, "logit_bias"),
            ({"modalities": ["text", "audio"]}, "modalities"),
            ({"reasoning_effort": 5}, "reasoning_effort"),
        ],
        ids=str,
    )
    def test_wrong_values(self, fields: dict[str, Any], param: str | None) -> None:
        """The error names the place of what is wrong, and nothing is sent."""
        provider = AsyncScriptedProvider()
        with serving(provider) as client:
            response = ask(client, **fields)
        assert response.status_code == 400, response.text
        assert error_of(response)["param"] == param
        assert provider.requests == []

    @pytest.mark.parametrize("depth", [50, 300, 480, 900])
    def test_deep_values(self, depth: int) -> None:
        """A schema of any depth is either sent or refused."""
        deep: Any = {}
        for _ in range(depth):
            deep = {"a": deep}
        tools = [{"type": "function", "function": {"name": "x", "parameters": deep}}]
        with serving(AsyncScriptedProvider("ok"), [Tracing()]) as client:
            assert ask(client, tools=tools, metadata={"deep": deep}).status_code in (200, 400)

    def test_half_a_character(self) -> None:
        """Half a surrogate pair, which programs cut out of emoji, does not fail the call."""
        body = b'{"messages":[{"role":"user","content":"cut \\ud83d"}]}'
        with serving(AsyncScriptedProvider("ok \ud83d")) as client:
            response = client.post("/chat/completions", content=body, headers={"content-type": "application/json"})
        assert response.json()["choices"][0]["message"]["content"] == "ok ?"

    @pytest.mark.parametrize("chunked", [True, False])
    def test_a_huge_body(self, chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """A body above the limit is refused: by its length if it has one, else as soon as it is too long."""
        monkeypatch.setattr(_requests, "LARGEST", 100_000)

        def pieces() -> Iterator[bytes]:
            for _ in range(50):
                yield b" " * 10_000

        content: Any = pieces() if chunked else b" " * 500_000
        provider = AsyncScriptedProvider()
        with serving(provider) as client:
            try:
                response = client.post(
                    "/chat/completions", content=content, headers={"content-type": "application/json"}
                )
            except httpx.WriteError:
                return  # the server has closed the connection while the body was being sent
        assert response.status_code == 413
        assert error_of(response)["code"] == "body_too_large"

    def test_a_body_of_megabytes(self) -> None:
        """A body within the limit is taken: images are megabytes."""
        with serving(AsyncScriptedProvider("ok")) as client:
            image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 8_000_000}}
            assert ask(client, messages=[{"role": "user", "content": [image]}]).status_code == 200

    def test_a_slow_body(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A body that does not come to its end is given up."""
        monkeypatch.setattr(_requests, "BODY_TIME", 0.2)
        with serving(AsyncScriptedProvider()) as client, _connected(client) as connection:
            connection.sendall(_head("content-length: 100") + b"{")
            assert b"408" in connection.recv(4096)

    def test_a_body_that_is_cut_off(self, caplog: pytest.LogCaptureFixture) -> None:
        """A client that leaves before its body is there is no error."""
        caplog.set_level(logging.INFO)
        with serving(AsyncScriptedProvider()) as client:
            with _connected(client) as connection:
                connection.sendall(_head("content-length: 100") + b"{")
            assert eventually(lambda: "status=left" in caplog.text)
        assert "ERROR" not in [record.levelname for record in caplog.records]

    @pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
    def test_other_types(self, kind: str) -> None:
        """A page of another site can have a browser send these types here; such a request makes no call."""
        provider = AsyncScriptedProvider()
        with serving(provider) as client:
            response = client.post("/chat/completions", content=json.dumps(HELLO), headers={"content-type": kind})
        assert response.status_code == 415
        assert provider.requests == []


def _connected(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=5)


def _head(*fields: str, path: str = "/v1/chat/completions", method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", "content-type: application/json", *fields]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class TestGate:
    @pytest.mark.parametrize(
        ("header", "status"),
        [
            (f"Bearer {TOKEN}", 200),
            (f"bearer {TOKEN}", 200),
            (None, 401),
            ("", 401),
            ("Bearer", 401),
            (f"Bearer {TOKEN}x", 401),
            (f"Basic {TOKEN}", 401),
            (TOKEN, 401),
        ],
    )
    def test_a_token(self, header: str | None, status: int) -> None:
        """Without the token there is nothing, not even the list of models or a word on which paths there are."""
        headers = {} if header is None else {"authorization": header}
        with serving(AsyncScriptedProvider(), token=TOKEN) as client:
            assert client.get("/models", headers=headers).status_code == status
            assert client.get("/other", headers=headers).status_code == (404 if status == 200 else 401)

    def test_openai_s_client_and_a_wrong_token(self) -> None:
        """The official client raises its error for a wrong key."""
        with asking(AsyncScriptedProvider(), token=TOKEN) as client:
            client.models.list()
            with pytest.raises(openai.AuthenticationError):
                client.with_options(api_key="wrong").models.list()

    @pytest.mark.parametrize(
        ("host", "status"),
        [
            ("localhost", 200),
            ("LOCALHOST:8080", 200),
            ("127.0.0.1:1234", 200),
            ("[::1]:8080", 200),
            ("[::1]", 200),
            ("evil.example", 403),
            ("evil.example:8080", 403),
            ("127.0.0.1.evil.example", 403),
            ("localhost.evil.example", 403),
            ("evil@localhost", 403),
            ("localhost@evil.example", 403),
            ("[::1", 403),
            ("", 403),
            ("[::ffff:1.2.3.4]", 403),
        ],
    )
    def test_a_host(self, host: str, status: int) -> None:
        """A page whose name was made to resolve to this machine gets nothing (DNS rebinding)."""
        if host == "[::1":
            status = 200  # it has no other name than ours
        with serving(AsyncScriptedProvider(), hosts=LOOPBACK_HOSTS) as client:
            assert client.get("/models", headers={"host": host}).status_code == status

    def test_two_hosts(self) -> None:
        """A request with two Host headers is refused, whichever of them is ours."""
        with serving(AsyncScriptedProvider(), hosts=LOOPBACK_HOSTS) as client, _connected(client) as connection:
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\n\r\n")
            assert connection.recv(4096).split()[1] in (b"400", b"403")

    def test_no_cors(self) -> None:
        """No page of another site may read an answer, nor is it told that it may ask."""
        headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
        with serving(AsyncScriptedProvider("ok")) as client:
            for response in (
                client.options("/chat/completions", headers=headers),
                client.post("/chat/completions", json=HELLO, headers=headers),
            ):
                assert not any(name.startswith("access-control") for name in response.headers)
            assert client.options("/chat/completions", headers=headers).status_code == 405

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [
            ("GET", "/chat/completions", 405),
            ("DELETE", "/chat/completions", 405),
            ("POST", "/models", 405),
            ("POST", "/responses", 404),
            ("POST", "/chat/completions/", 404),
            ("GET", "/../etc/passwd", 404),
            ("GET", "/%2e%2e/%00", 404),
            ("BREW", "/coffee", 404),
        ],
    )
    def test_unknown_routes(self, method: str, path: str, status: int) -> None:
        """What there is not has an error in OpenAI's shape."""
        with serving(AsyncScriptedProvider()) as client:
            response = client.request(method, path)
        assert response.status_code == status
        error_of(response)

    def test_the_log(self, caplog: pytest.LogCaptureFixture) -> None:
        """A line for each request, without the query, the headers and the body, and without line ends from outside."""
        caplog.set_level(logging.INFO)
        with serving(AsyncScriptedProvider("the answer"), token=TOKEN) as client:
            headers = {"authorization": f"Bearer {TOKEN}"}
            client.post("/chat/completions?key=sk-secret", json=HELLO, headers=headers)
            client.get("/a%0d%0aINFO forged%1b[31m?key=sk-secret", headers=headers)
        lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("request |")]
        assert "path=/v1/chat/completions, status=200" in lines[0]
        assert "status=404" in lines[1]
        ours = [record for record in caplog.records if record.name == "fluxibly"]  # the client logs its own
        everything = "".join([repr(vars(record)) for record in ours])
        for secret in (TOKEN, "sk-secret", "hello", "the answer"):
            assert secret not in everything
        assert not any("\n" in line or "\x1b" in line for line in lines)

    def test_the_client_s_trace(self) -> None:
        """The span of a call is a child of the client's. No other header has an effect."""
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        exporter = InMemorySpanExporter()
        spans = TracerProvider()
        spans.add_span_processor(SimpleSpanProcessor(exporter))
        provider = AsyncScriptedProvider("a", "b", "c", "d")
        parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        with serving(provider, [Tracing(tracer_provider=spans)]) as client:
            for stream in (False, True):
                headers = {"traceparent": parent, "x-other": "1", "openai-organization": "x"}
                client.post("/chat/completions", json={**HELLO, "stream": stream}, headers=headers)
            client.post("/chat/completions", json=HELLO, headers={"traceparent": "junk"})
            client.post("/chat/completions", json=HELLO)
        found = exporter.get_finished_spans()
        parents = [each.parent.span_id if each.parent else None for each in found]
        assert parents == [0xB7AD6B7169203331, 0xB7AD6B7169203331, None, None]
        for request in provider.requests:
            assert set(request.headers) <= {"traceparent", "tracestate"}


class TestClientsThatLeave:
    @pytest.mark.parametrize("stream", [True, False])
    def test_a_call_is_abandoned(self, stream: bool) -> None:
        """A client that leaves ends the call, and the provider's connection, within a second."""
        provider, outcomes = Endless(), Outcomes()
        with serving(provider, [outcomes]) as client:
            body = json.dumps({**HELLO, "stream": stream}).encode()
            with _connected(client) as connection:
                connection.sendall(_head(f"content-length: {len(body)}") + body)
                assert provider.opened.wait(5)
            assert provider.closed.wait(1)
            assert set(outcomes.within(1)) <= {"cancelled", "abandoned"}
            assert outcomes.seen

    def test_in_the_middle_of_a_stream(self) -> None:
        """The same holds once there is output."""
        provider, outcomes = Endless("one "), Outcomes()
        with serving(provider, [outcomes]) as client:
            with client.stream("POST", "/chat/completions", json={**HELLO, "stream": True}) as response:
                assert "one " in next(response.iter_text())
            assert provider.closed.wait(1)
            assert set(outcomes.within(1)) <= {"cancelled", "abandoned"}

    def test_a_client_that_does_not_read(self) -> None:
        """A client that does not read is not sent more and more, and ends the call when it leaves."""

        class Torrent(Endless):
            sent = 0

            async def stream(self, request: Request) -> Any:
                self.opened.set()
                try:
                    while True:
                        self.sent += 1
                        yield Chunk("x" * 100_000)
                finally:
                    self.closed.set()

        provider, outcomes = Torrent(), Outcomes()
        with serving(provider, [outcomes]) as client:
            body = json.dumps({**HELLO, "stream": True}).encode()
            with _connected(client) as connection:
                connection.sendall(_head(f"content-length: {len(body)}") + body)
                assert provider.opened.wait(5)
                assert not provider.closed.wait(0.2)
                before = provider.sent
                time.sleep(0.1)
                assert provider.sent == before
            assert provider.closed.wait(1)
            assert set(outcomes.within(1)) <= {"cancelled", "abandoned"}

    def test_the_connection_to_the_service(self) -> None:
        """The connection to the service is closed at once, and not at the end of the answer."""
        with canned_server() as service:
            service.stall_after = True
            config = LLMConfig(framework="openai", model="m", api_key="sk-test", api_base=f"{service.url}/v1")
            with (
                served(application(AsyncLLM(config))) as url,
                httpx.Client(base_url=f"{url}/v1", verify=PLAIN) as client,
                client.stream("POST", "/chat/completions", json={**HELLO, "stream": True}) as response,
            ):
                next(response.iter_text())
                assert not service.none_open(0)
            assert service.none_open(1)
            assert service.gone.wait(1)

    def test_keep_alives(self) -> None:
        """A stream that says nothing sends comments, before its first text too, and clients do not see them."""
        provider = Endless()
        with serving(provider, keep_alive=0.05) as client:
            with client.stream("POST", "/chat/completions", json={**HELLO, "stream": True}) as response:
                assert response.status_code == 200
                assert next(response.iter_text()).startswith(": keep-alive\n\n")
            assert provider.closed.wait(1)

    def test_an_error_after_a_keep_alive(self) -> None:
        """Once the head has gone out, an error is an event."""

        class Late:
            async def complete(self, request: Request) -> str:
                raise AssertionError

            async def stream(self, request: Request) -> Any:
                import anyio

                await anyio.sleep(0.15)
                raise RateLimitError("slow down")
                yield

        with asking(Late(), keep_alive=0.05) as client:
            stream = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "?"}], stream=True)
            with pytest.raises(openai.APIError, match="slow down"):
                list(stream)

    def test_fifty_clients_at_once(self) -> None:
        """Fifty clients get fifty answers, at the same time."""

        class Meeting:
            """Answers when all clients have come."""

            def __init__(self) -> None:
                self.here = 0
                self.all_here: Any = None

            async def complete(self, request: Request) -> str:
                raise AssertionError

            async def stream(self, request: Request) -> Any:
                import anyio

                self.here += 1
                self.all_here = self.all_here or anyio.Event()
                if self.here == 50:
                    self.all_here.set()
                with anyio.fail_after(8):
                    await self.all_here.wait()
                yield request.messages[0].text

        with serving(Meeting()) as client, concurrent.futures.ThreadPoolExecutor(50) as threads:

            def one(number: int) -> bool:
                message = {"role": "user", "content": f"number {number}"}
                response = ask(client, messages=[message], stream=True)
                return f'"number {number}"' in response.text and "[DONE]" in response.text

            assert all(threads.map(one, range(50)))


def test_in_an_application_of_another() -> None:
    """The application can be mounted under a path."""
    from starlette.applications import Starlette
    from starlette.routing import Mount

    app = Starlette(routes=[Mount("/llm", application(model_of(AsyncScriptedProvider("yes")), token=TOKEN))])
    with served(app) as url, httpx.Client(base_url=f"{url}/llm/v1", verify=PLAIN) as client:
        assert ask(client).status_code == 401
        client.headers["authorization"] = f"Bearer {TOKEN}"
        assert ask(client).json()["choices"][0]["message"]["content"] == "yes"
        assert client.get("/other").status_code == 404


def test_the_end_of_the_server_closes_the_model() -> None:
    """The provider's connections are closed when the server ends."""
    provider = AsyncScriptedProvider("yes")
    with served(application(model_of(provider)), alone=True) as url:
        assert httpx.get(f"{url}/v1/models").status_code == 200
        assert not provider.shut
    assert provider.shut


def test_the_stack_works_behind_it() -> None:
    """A fallback answers for a provider that fails, and a budget ends what costs too much."""
    down = AsyncScriptedProvider(ProviderError("down", status=500))
    with asking(down, [Cost(), Fallback(["echo:backup"])]) as client:
        got = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hello"}])
    assert (got.choices[0].message.content, got.model) == ("hello", "backup")
    with (
        asking(AsyncScriptedProvider("x"), [Budget(tokens=1, scope="call")]) as client,
        pytest.raises(openai.RateLimitError) as caught,
    ):
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hello " * 50}])
    assert caught.value.code == "insufficient_quota"
