"""The framework cohere: the address and the key of its requests, and answers over real connections."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from support.cohere import USAGE, block, call, end, plan, start
from support.dialects import answering, ask, serving, sse
from support.recordings import load

from fluxibly import LLMConfig, Message, Pipeline, Request
from fluxibly.errors import (
    AuthenticationError,
    ConfigError,
    ContextLengthExceeded,
    StreamInterrupted,
    StreamProtocolError,
)
from fluxibly.providers.cohere import AsyncCohereProvider, CohereProvider
from fluxibly.testing.modes import MODES, Mode

KEY = "co-test-0123456789"
WHOLE: dict[str, Any] = {
    "id": "id_1",
    "message": {
        "role": "assistant",
        "content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Hello é"}],
    },
    "finish_reason": "COMPLETE",
    "usage": USAGE,
}
STREAM = sse(start(), *block("thinking", "H", "m."), *block("text", "Hel", "lo é", index=1), end(), done=True)
VARIABLES = ("CO_API_KEY", "COHERE_API_KEY", "CO_API_URL")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def config(**fields: Any) -> LLMConfig:
    return LLMConfig(**{"framework": "cohere", "model": "command-r", "api_key": KEY, **fields})


def request_of(settings: LLMConfig) -> httpx.Request:
    """Return the HTTP request that a call makes."""
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        headers = {"content-type": "application/json", "x-debug-trace-id": "trace_1"}
        return httpx.Response(200, content=json.dumps(WHOLE), headers=headers)

    pipeline = Pipeline(CohereProvider(settings, transport=httpx.MockTransport(answer)), [])
    response = pipeline.complete(Request(model=settings.model, messages="Hi"))
    assert (response.text, response.request_id) == ("Hello é", "trace_1")
    return seen[0]


@pytest.mark.parametrize(
    ("api_base", "url"),
    [
        (None, "https://api.cohere.com/v2/chat"),
        ("https://api.cohere.com", "https://api.cohere.com/v2/chat"),
        ("https://api.cohere.ai/v1/", "https://api.cohere.ai/v2/chat"),
        ("http://127.0.0.1:8080/v2/", "http://127.0.0.1:8080/v2/chat"),
        ("http://127.0.0.1:8000/cohere", "http://127.0.0.1:8000/cohere/v2/chat"),
        ("https://proxy.test/v1", "https://proxy.test/v1/v2/chat"),
    ],
)
def test_where_requests_go(api_base: str | None, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address works with or without the version, in the configuration and in the environment."""
    request = request_of(config(api_base=api_base))
    assert str(request.url) == url
    assert request.headers["authorization"] == f"Bearer {KEY}"
    if api_base is not None:
        monkeypatch.setenv("CO_API_URL", api_base)
        assert str(request_of(config()).url) == url


@pytest.mark.parametrize("path", ["/v2/chat", "/v1/chat", "/chat/", "/cohere/v2/chat"])
def test_an_address_with_its_endpoint(path: str) -> None:
    """The endpoint is not part of the address, because it is appended to it."""
    with pytest.raises(ConfigError, match=r"api_base: expected the address without /chat/?, which is appended to it"):
        request_of(config(api_base=f"https://api.cohere.com{path}"))


def test_the_address_of_the_official_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable with the address means what it means to the `cohere` package."""
    cohere = pytest.importorskip("cohere")
    with answering("application/json", json.dumps(WHOLE).encode()) as (address, asked):
        http = httpx.Client(verify=False)  # noqa: S501  # no certificate here, and reading the authorities' takes a while
        with cohere.ClientV2(api_key="k", base_url=f"{address}/cohere", httpx_client=http) as theirs:
            theirs.chat(model="command-r", messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}])
        monkeypatch.setenv("CO_API_URL", f"{address}/cohere")
        with Pipeline(CohereProvider(config()), []) as pipeline:
            pipeline.complete(Request(model="command-r", messages="Hi"))
    assert asked[0] == asked[1]


def test_a_wrong_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that is no URL is an error that names the variable."""
    monkeypatch.setenv("CO_API_URL", "api.cohere.com")
    with pytest.raises(ConfigError, match="CO_API_URL"):
        CohereProvider(config())


@pytest.mark.parametrize(
    ("first", "second", "used"), [("c1", "c2", "c1"), (None, "c2", "c2"), ("", "c2", "c2"), ("c1", None, "c1")]
)
def test_keys_from_the_environment(
    first: str | None, second: str | None, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key comes from CO_API_KEY, or else from COHERE_API_KEY."""
    for name, value in (("CO_API_KEY", first), ("COHERE_API_KEY", second)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert request_of(config(api_key=None)).headers["authorization"] == f"Bearer {used}"


def test_missing_key() -> None:
    """The error for a missing key names the environment variable."""
    for provider in (CohereProvider, AsyncCohereProvider):
        with pytest.raises(AuthenticationError, match="CO_API_KEY"):
            provider(config(api_key=None))


# Over real connections


def served(mode: Mode, whole: bytes, stream: bytes) -> tuple[bytes, str]:
    return (stream, "text/event-stream") if mode.streaming else (whole, "application/json")


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_an_answer_in_every_mode(mode: Mode) -> None:
    """An answer over a real connection is the same in every mode."""
    with serving(*served(mode, json.dumps(WHOLE).encode(), STREAM)) as address:
        response = ask(config(api_base=address), mode, "Hi")
    assert (response.text, response.reasoning, response.finish_reason) == ("Hello é", "Hm.", "stop")
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (500, 9)
    assert (response.id, response.details) == ("id_1", {"billed_units": USAGE["billed_units"]})


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_conversation_with_a_tool_in_every_mode(mode: Mode) -> None:
    """The second turn of a conversation has the first answer as it came, and its tool's result."""
    message = {
        "role": "assistant",
        "tool_plan": "I look.",
        "tool_calls": [{"id": "t_1", "type": "function", "function": {"name": "tide", "arguments": '{"a": 1}'}}],
    }
    asking = json.dumps({**WHOLE, "message": message, "finish_reason": "TOOL_CALL"}).encode()
    streaming = sse(start(), *plan("I ", "look."), *call("t_1", "tide", '{"a"', ": 1}"), end("TOOL_CALL"))
    first, kind = served(mode, asking, streaming)
    second, _ = served(mode, json.dumps(WHOLE).encode(), STREAM)
    with answering(kind, first, second) as (address, asked):
        settings = config(api_base=address)
        called = ask(settings, mode, "When?")
        messages = [Message.user("When?"), called.message, Message.tool("four", called.tool_calls[0])]
        assert ask(settings, mode, messages).text == "Hello é"
    assert asked[1] == (
        "/v2/chat",
        {
            "model": "command-r",
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "When?"}]},
                message,
                {"role": "tool", "tool_call_id": "t_1", "content": "four"},
            ],
            "stream": mode.streaming,
        },
    )


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_an_error_in_a_200_in_every_mode(mode: Mode) -> None:
    """An error in a 200 is raised in every mode; in the middle of a stream, with what came before it."""
    error = {"message": "too many tokens", "error_type": "TOO_MANY_TOKENS", "id": "e"}
    stream = sse(start(), *block("text", "Hel"), error)
    with (
        serving(*served(mode, json.dumps(error).encode(), stream)) as address,
        pytest.raises((StreamInterrupted, ContextLengthExceeded)) as caught,
    ):
        ask(config(api_base=address), mode, "Hi")
    if mode.streaming:
        assert isinstance(caught.value, StreamInterrupted)
        assert caught.value.partial.text == "Hel"
        assert isinstance(caught.value.__cause__, ContextLengthExceeded)
    else:
        assert isinstance(caught.value, ContextLengthExceeded)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.streaming], ids=str)
def test_a_stream_that_was_cut_off(mode: Mode) -> None:
    """A stream without message-end is interrupted, in every mode."""
    with (
        serving(sse(start(), *block("text", "Hel")), "text/event-stream") as address,
        pytest.raises(StreamInterrupted) as caught,
    ):
        ask(config(api_base=address), mode, "Hi")
    assert isinstance(caught.value.__cause__, StreamProtocolError)
    assert caught.value.partial.text == "Hel"


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.streaming], ids=str)
def test_the_recorded_stream(mode: Mode) -> None:
    """The recorded stream is read over a real connection."""
    with serving(load("50-").body, "text/event-stream") as address:
        response = ask(config(api_base=address), mode, "Hi")
    (called,) = response.tool_calls
    assert (called.name, dict(called.arguments)) == ("weather", {"latitude": "52.5200", "longitude": "13.4050"})
    assert response.finish_reason == "tool_call"


def test_the_recorded_error() -> None:
    """The recorded 400 raises its error, with the id of the request."""
    recorded = load("52-")
    transport = httpx.MockTransport(
        lambda _: httpx.Response(recorded.status, content=recorded.body, headers=recorded.headers)
    )
    pipeline = Pipeline(CohereProvider(config(), transport=transport), [])
    with pytest.raises(ContextLengthExceeded) as caught:
        pipeline.complete(Request(model="command-a-03-2025", messages="Hi"))
    assert caught.value.request_id == "9f024ce5e99f5467ebce17e9762528f3"
