"""The framework gemini: where its requests go, and with which key."""

from __future__ import annotations

import json

import httpx
import pytest
from test_gemini_codec import WHOLE

from fluxibly import LLMConfig, Pipeline, Request
from fluxibly.errors import AuthenticationError
from fluxibly.providers.gemini import GeminiProvider

KEY = "AIza-test-0123456789"


def request_of(config: LLMConfig) -> httpx.Request:
    """The HTTP request that a call makes."""
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, content=json.dumps(WHOLE), headers={"content-type": "application/json"})

    pipeline = Pipeline(GeminiProvider(config, transport=httpx.MockTransport(answer)), [])
    assert pipeline.complete(Request(model=config.model, messages="Hi")).text == "Let me look."
    return seen[0]


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
    """The address, with a version or without; the key is in a header and not in the URL."""
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
    """GEMINI_API_KEY, or else GOOGLE_API_KEY."""
    for name, value in (("GEMINI_API_KEY", gemini), ("GOOGLE_API_KEY", google)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert request_of(LLMConfig(framework="gemini", model="gemini-2.5-flash")).headers["x-goog-api-key"] == used


def test_missing_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the environment variable."""
    monkeypatch.delenv("GEMINI_API_KEY", raising=False)
    monkeypatch.delenv("GOOGLE_API_KEY", raising=False)
    with pytest.raises(AuthenticationError, match="GEMINI_API_KEY"):
        GeminiProvider(LLMConfig(framework="gemini", model="gemini-2.5-flash"))
