"""The framework gemini: the address and the key of its requests."""

from __future__ import annotations

import json

import httpx
import pytest
from support.dialects import sse
from support.gemini import WHOLE, answer
from support.recordings import load

from fluxibly import LLMConfig, Pipeline, Request
from fluxibly.errors import AuthenticationError, Overloaded, StreamInterrupted
from fluxibly.providers.gemini import GeminiProvider

KEY = "AIza-test-0123456789"


def request_of(config: LLMConfig) -> httpx.Request:
    """Return the HTTP request that a call makes."""
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, content=json.dumps(WHOLE), headers={"content-type": "application/json"})

    pipeline = Pipeline(GeminiProvider(config, transport=httpx.MockTransport(answer)), [])
    assert pipeline.complete(Request(model=config.model, messages="Hi")).text == "Let me look."
    return seen[0]


def streaming(status: int, content_type: str, body: bytes) -> str:
    """Return the text of a stream that gets this HTTP response."""
    transport = httpx.MockTransport(
        lambda _: httpx.Response(status, content=body, headers={"content-type": content_type})
    )
    provider = GeminiProvider(LLMConfig(framework="gemini", model="gemini-2.5-flash", api_key=KEY), transport=transport)
    with Pipeline(provider, []).stream(Request(model="gemini-2.5-flash", messages="Hi")) as stream:
        return "".join(chunk.text for chunk in stream)


def test_error_under_the_content_type_of_a_stream() -> None:
    """The recorded 400 is plain JSON with the content type of a stream, and raises its error."""
    recorded = load("36-")
    with pytest.raises(AuthenticationError, match="API key not valid"):
        streaming(recorded.status, recorded.headers["content-type"], recorded.body)


def test_stream_that_comes_as_an_array() -> None:
    """A JSON array, from a server that does not support `alt=sse`, is read as a stream."""
    body = json.dumps([answer({"text": "Hel"}), answer({"text": "lo"}, reason="STOP")], indent=2).encode()
    assert streaming(200, "application/json; charset=UTF-8", body) == "Hello"


def test_stream_with_an_error_at_its_end() -> None:
    """A bare JSON error after the events, with status 200, interrupts the stream; earlier output is kept."""
    error = {"error": {"code": 503, "message": "overloaded", "status": "UNAVAILABLE"}}
    with pytest.raises(StreamInterrupted) as caught:
        streaming(200, "text/event-stream", sse(answer({"text": "Hel"})) + json.dumps(error, indent=1).encode())
    assert caught.value.partial.text == "Hel"
    assert isinstance(caught.value.__cause__, Overloaded)


@pytest.mark.parametrize(
    ("api_base", "base"),
    [
        (None, "https://generativelanguage.googleapis.com/v1beta"),
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080/v1beta"),
        ("http://127.0.0.1:8080/", "http://127.0.0.1:8080/v1beta"),
        ("https://proxy.test/google/v1alpha", "https://proxy.test/google/v1alpha"),
    ],
)
def test_where_requests_go(api_base: str | None, base: str) -> None:
    """`api_base` works with or without a version; the key is in a header rather than in the URL."""
    config = LLMConfig(framework="gemini", model="gemini-2.5-flash", api_base=api_base, api_key=KEY)
    request = request_of(config)
    assert str(request.url) == f"{base}/models/gemini-2.5-flash:generateContent"
    assert request.headers["x-goog-api-key"] == KEY
    assert "authorization" not in request.headers


@pytest.mark.parametrize(
    ("gemini", "google", "used"), [("g1", "g2", "g1"), (None, "g2", "g2"), ("", "g2", "g2"), ("g1", None, "g1")]
)
def test_keys_from_the_environment(
    gemini: str | None, google: str | None, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key comes from GEMINI_API_KEY, or else from GOOGLE_API_KEY."""
    for name, value in (("GEMINI_API_KEY", gemini), ("GOOGLE_API_KEY", google)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert request_of(LLMConfig(framework="gemini", model="gemini-2.5-flash")).headers["x-goog-api-key"] == used


def test_missing_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error for a missing key names the environment variable."""
    monkeypatch.delenv("GEMINI_API_KEY", raising=False)
    monkeypatch.delenv("GOOGLE_API_KEY", raising=False)
    with pytest.raises(AuthenticationError, match="GEMINI_API_KEY"):
        GeminiProvider(LLMConfig(framework="gemini", model="gemini-2.5-flash"))
