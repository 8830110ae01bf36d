"""The service that answered when LiteLLM itself falls back to another, with the real LiteLLM against local servers."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

if importlib.util.find_spec("litellm") is None:  # importing it here would fetch its price map from the network
    pytest.skip("needs LiteLLM", allow_module_level=True)

from support.answering import Observed, observe
from support.canned_server import Canned
from support.libraries import KEY, LITELLM, LITELLM_WARNS, MODES, sent_key

from fluxibly import LLMConfig, ProviderError, Request, errors

pytestmark = LITELLM_WARNS
BUSY = (503, '{"error": {"message": "busy"}}', {})
TOO_LONG = (400, '{"error": {"message": "This model\'s maximum context length is 8 tokens."}}', {})
CLAUDE = "anthropic/claude-sonnet-4-5"
FALLBACK_MODES = ("sync", "asyncio", "asyncio stream", "trio")
"""The modes that support LiteLLM's `fallbacks`, whose streams are always asynchronous."""


@pytest.fixture(autouse=True)
def no_leftovers() -> Iterator[None]:
    """Collect LiteLLM's left-over objects before the next test, which may not expect their warnings."""
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the keys of the services that are not configured."""
    for name in ("ANTHROPIC", "DEEPSEEK", "OPENAI"):
        monkeypatch.setenv(f"{name}_API_KEY", f"sk-{name.lower()}")


def ask(mode: str, settings: LLMConfig, *inner: Any, calls: int = 1, **request: Any) -> Observed:
    provider = LITELLM.providers[not mode.startswith("sync")](settings)
    asked = Request(**{"model": settings.model, "messages": "hello there", **request})
    return observe(mode, provider, asked, *inner, calls=calls)


def port(server: Canned) -> int:
    return int(server.url.rpartition(":")[2])


def claude_at(server: Canned) -> dict[str, Any]:
    return {"model": CLAUDE, "api_base": server.url, "api_key": "sk-theirs"}


@pytest.mark.parametrize("mode", FALLBACK_MODES)
def test_the_service_and_the_model_that_answered_are_named(server: Canned, other: Canned, mode: str) -> None:
    """After LiteLLM's second fallback, the spans of call and attempt and the metrics name its service and model."""
    server.fail = BUSY
    fallbacks = ["openai/gpt-4o-mini", claude_at(other)]
    observed = ask(mode, LITELLM.config(server, "openai/gpt-4o"), extra={"fallbacks": fallbacks})
    assert [seen.body["model"] for seen in server.seen] == ["gpt-4o", "gpt-4o-mini"]
    span = observed.span
    assert (span["gen_ai.provider.name"], span["server.address"]) == ("anthropic", "127.0.0.1")
    assert span["server.port"] == port(other) != port(server)
    assert observed.recorder.call.name == f"chat {CLAUDE}"
    assert (span["gen_ai.request.model"], span["fluxibly.requested_model"]) == (CLAUDE, "openai/gpt-4o")
    assert span["gen_ai.response.model"] == "claude-sonnet-4-5-0613"
    assert observed.attempts == [("anthropic", "claude-sonnet-4-5-0613")]
    measured = observed.measured
    assert (measured["gen_ai.provider.name"], measured["server.port"]) == ("anthropic", port(other))
    assert measured["gen_ai.request.model"] == CLAUDE
    assert measured["gen_ai.response.model"] == "claude-sonnet-4-5-0613"


@pytest.mark.parametrize("mode", FALLBACK_MODES)
def test_the_same_service_elsewhere_has_its_own_address(server: Canned, other: Canned, mode: str) -> None:
    """A second deployment of the same model has its own address."""
    server.fail = BUSY
    there = {"api_base": other.url + "/v1"}
    observed = ask(mode, LITELLM.config(server, "openai/gpt-4o"), extra={"fallbacks": [there]})
    assert (observed.span["gen_ai.provider.name"], observed.span["server.port"]) == ("openai", port(other))
    assert "fluxibly.requested_model" not in observed.span


@pytest.mark.parametrize("mode", FALLBACK_MODES)
def test_another_model_of_the_configured_service(server: Canned, mode: str) -> None:
    """A fallback to another model of the configured service keeps the provider and changes the model."""
    server.fail = BUSY
    server.fail_only = "gpt-4o"
    observed = ask(mode, LITELLM.config(server, "openai/gpt-4o"), extra={"fallbacks": ["openai/gpt-4o-mini"]})
    assert (observed.span["gen_ai.provider.name"], observed.span["server.port"]) == ("openai", port(server))
    assert observed.span["gen_ai.request.model"] == "openai/gpt-4o-mini"


@pytest.mark.parametrize("mode", FALLBACK_MODES)
def test_without_a_fallback_the_configured_service_is_named(server: Canned, other: Canned, mode: str) -> None:
    """If the first model answers, the configured service is named and the fallback is not asked."""
    observed = ask(mode, LITELLM.config(server, "openai/gpt-4o"), extra={"fallbacks": [claude_at(other)]})
    assert (observed.span["gen_ai.provider.name"], observed.span["server.port"]) == ("openai", port(server))
    assert other.seen == []


@pytest.mark.parametrize("mode", FALLBACK_MODES)
def test_a_service_is_described_once(server: Canned, other: Canned, mode: str) -> None:
    """All calls that a service answers share the same description."""
    server.fail = BUSY
    observed = ask(mode, LITELLM.config(server, "openai/gpt-4o"), extra={"fallbacks": [claude_at(other)]}, calls=2)
    first, second = observed.records
    assert first.provider is second.provider
    assert first.provider.telemetry_name == "anthropic"


@pytest.mark.parametrize("mode", MODES)
def test_a_fallback_for_prompts_that_are_too_long(
    server: Canned, other: Canned, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fallback for long prompts to another service is named as LiteLLM names it. Its address is not known."""
    monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/v1")
    monkeypatch.setenv("DEEPSEEK_API_BASE", other.url + "/v1")
    server.fail = TOO_LONG
    settings = LLMConfig(framework="litellm", model="openai/gpt-4o")
    fallbacks = {"context_window_fallback_dict": {"openai/gpt-4o": "deepseek/deepseek-chat"}}
    observed = ask(mode, settings, extra=fallbacks)
    assert len(other.seen) == len(server.seen) == 1
    span = observed.span
    assert (span["gen_ai.provider.name"], span["gen_ai.request.model"]) == ("deepseek", "deepseek/deepseek-chat")
    assert (span["gen_ai.response.model"], span["fluxibly.requested_model"]) == ("deepseek-chat-0613", "openai/gpt-4o")
    assert "server.address" not in span
    assert observed.attempts == [("deepseek", "deepseek-chat-0613")]
    assert observed.measured["gen_ai.provider.name"] == "deepseek"


@pytest.mark.parametrize("mode", MODES)
def test_a_fallback_for_long_prompts_that_was_not_needed(server: Canned, mode: str) -> None:
    """If the fallback was not needed, the configured service is named, with its address."""
    fallbacks = {"context_window_fallback_dict": {"openai/gpt-4o": "deepseek/deepseek-chat"}}
    observed = ask(mode, LITELLM.config(server, "openai/gpt-4o"), extra=fallbacks)
    assert (observed.span["gen_ai.provider.name"], observed.span["server.port"]) == ("openai", port(server))
    assert "fluxibly.requested_model" not in observed.span


@pytest.mark.parametrize("mode", MODES)
def test_a_fallback_for_long_prompts_that_would_get_the_key(mode: str) -> None:
    """A fallback for long prompts at another service is refused before anything is sent."""
    config = LLMConfig(framework="litellm", model="openai/gpt-4o", api_key="sk-configured")
    with pytest.raises(
        errors.BadRequest, match="'deepseek/deepseek-chat', which is at another service: use `fallbacks`"
    ):
        ask(mode, config, extra={"context_window_fallback_dict": {"openai/gpt-4o": "deepseek/deepseek-chat"}})


@pytest.mark.parametrize("mode", MODES)
def test_a_fallback_for_long_prompts_that_would_get_the_headers(mode: str) -> None:
    """The configuration's headers may have a token, so they are as good as a key."""
    config = LLMConfig(framework="litellm", model="openai/gpt-4o", headers={"x-gateway": "token-configured"})
    with pytest.raises(errors.BadRequest, match="which is at another service: use `fallbacks`"):
        ask(mode, config, extra={"context_window_fallback_dict": {"openai/gpt-4o": "deepseek/deepseek-chat"}})


@pytest.mark.parametrize("mode", MODES)
def test_a_middleware_that_asks_another_service_and_comes_back(
    server: Canned, other: Canned, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt names the service that it asked. The call names the service that answered."""
    monkeypatch.setenv("ANTHROPIC_BASE_URL", other.url)
    other.fail = BUSY

    def there_and_back(request: Request, call_next: Any) -> Any:
        try:
            return (yield from call_next(request.evolve(model=CLAUDE)))
        except errors.Overloaded:
            return (yield from call_next(request))

    observed = ask(mode, LITELLM.config(server, "openai/gpt-4o"), there_and_back)
    assert [provider for provider, _ in observed.attempts] == ["anthropic", "openai"]
    assert (observed.span["gen_ai.provider.name"], observed.span["server.port"]) == ("openai", port(server))
    assert observed.measured["gen_ai.provider.name"] == "openai"


@pytest.mark.parametrize("mode", FALLBACK_MODES)
@pytest.mark.parametrize("fallback", [CLAUDE, {"model": CLAUDE}])
def test_the_key_is_not_sent_to_another_service(
    server: Canned, other: Canned, mode: str, fallback: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fallback to another service gets neither key nor address. Another model of the same service gets both."""
    monkeypatch.setenv("ANTHROPIC_BASE_URL", other.url)
    server.fail = BUSY
    settings = LITELLM.config(server, "openai/gpt-4o")
    observed = ask(mode, settings, extra={"fallbacks": ["openai/gpt-4o-mini", fallback]})
    assert (sent_key(server), sent_key(other)) == (KEY, "sk-anthropic")
    assert (len(server.seen), len(other.seen)) == (2, 1)
    (record,) = observed.records
    assert (record.provider.telemetry_name, record.provider.server_address) == ("anthropic", None)
    assert "server.address" not in observed.measured


@pytest.mark.parametrize("mode", ["sync stream", "trio stream"])
def test_fallbacks_that_litellm_cannot_stream_are_refused(server: Canned, other: Canned, mode: str) -> None:
    """Fallbacks in a synchronous stream are refused before anything is sent. The error names the alternatives."""
    fallbacks = {"fallbacks": [claude_at(other)]}
    with pytest.raises(errors.BadRequest, match="asyncio"):
        ask(mode, LITELLM.config(server, "openai/gpt-4o"), extra=fallbacks)
    assert server.seen == []


@pytest.mark.parametrize("mode", FALLBACK_MODES)
@pytest.mark.parametrize(("status", "retryable"), [(400, False), (401, False), (429, True), (500, True), (503, True)])
def test_when_none_of_the_fallbacks_answers(
    server: Canned, other: Canned, mode: str, status: int, retryable: bool
) -> None:
    """The error is fluxibly's, with the last fallback's message, but without the key or LiteLLM's own advice."""
    server.fail = BUSY
    other.fail = (status, f'{{"error": {{"message": "no good: {KEY}"}}}}', {})
    settings = LITELLM.config(server, "openai/gpt-4o")
    error = LITELLM.failure(mode, settings, extra={"fallbacks": [claude_at(other)]})
    assert type(error) is ProviderError
    assert error.retryable is retryable
    assert "no good" in str(error)
    assert "set_verbose" not in str(error)
