"""The service that LiteLLM asks, and its own fallbacks, which are refused, with the real LiteLLM against local servers."""

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

from fluxibly import LLMConfig, Request, errors

pytestmark = LITELLM_WARNS
BUSY = (503, '{"error": {"message": "busy"}}', {})
CLAUDE = "anthropic/claude-sonnet-4-5"


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


FALLBACKS: list[dict[str, Any]] = [
    {"fallbacks": [CLAUDE]},
    {"fallbacks": []},
    {"context_window_fallback_dict": {"openai/gpt-4o": CLAUDE}},
    {"model_list": [{"model_name": "openai/gpt-4o", "litellm_params": {"model": CLAUDE}}]},
]
ADVICE = r'expected none of LiteLLM\'s own fallbacks; use the middleware Fallback\(to=\["provider:model", …\]\)'


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fallbacks", FALLBACKS, ids=str)
def test_its_own_fallbacks_are_refused(server: Canned, mode: str, fallbacks: dict[str, Any]) -> None:
    """A call with LiteLLM's own fallbacks is refused before anything is sent, and the error names the middleware."""
    (name,) = fallbacks
    with pytest.raises(errors.BadRequest, match=rf"^extra\.{name}: {ADVICE}"):
        ask(mode, LITELLM.config(server, "openai/gpt-4o"), extra=fallbacks)
    assert server.seen == []


@pytest.mark.parametrize("fallbacks", FALLBACKS, ids=str)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_its_own_fallbacks_in_a_configuration(server: Canned, fallbacks: dict[str, Any], asynchronous: bool) -> None:
    """A configuration with LiteLLM's own fallbacks is refused when the provider is made."""
    (name,) = fallbacks
    settings = LITELLM.config(server, "openai/gpt-4o", additional_params=fallbacks)
    with pytest.raises(errors.ConfigError, match=rf"^additional_params\.{name}: {ADVICE}"):
        LITELLM.providers[asynchronous](settings)


@pytest.mark.parametrize("mode", MODES)
def test_its_own_global_fallbacks(server: Canned, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fallbacks that a program set for all of LiteLLM's calls would get the key too, so they are refused as well."""
    import litellm

    monkeypatch.setattr(litellm, "model_fallbacks", [CLAUDE])
    with pytest.raises(errors.BadRequest, match=rf"^litellm\.model_fallbacks: {ADVICE}"):
        ask(mode, LITELLM.config(server, "openai/gpt-4o"))
    assert server.seen == []


@pytest.mark.parametrize("mode", MODES)
def test_a_fallback_that_is_none(server: Canned, mode: str) -> None:
    """None is LiteLLM's own default, so it is no fallback."""
    observed = ask(mode, LITELLM.config(server, "openai/gpt-4o"), extra={"fallbacks": None, "model_list": None})
    assert (observed.span["gen_ai.provider.name"], observed.span["server.port"]) == ("openai", port(server))


@pytest.mark.parametrize("mode", MODES)
def test_a_middleware_that_asks_another_service_and_comes_back(
    server: Canned, other: Canned, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt names the service that it asked, the call the one that answered; each gets only its own key and headers."""
    monkeypatch.setenv("ANTHROPIC_BASE_URL", other.url)
    other.fail = BUSY

    def there_and_back(request: Request, call_next: Any) -> Any:
        try:
            return (yield from call_next(request.evolve(model=CLAUDE)))
        except errors.Overloaded:
            return (yield from call_next(request))

    settings = LITELLM.config(server, "openai/gpt-4o", headers={"x-gateway": "token-configured"})
    observed = ask(mode, settings, there_and_back)
    assert [provider for provider, _ in observed.attempts] == ["anthropic", "openai"]
    assert (observed.span["gen_ai.provider.name"], observed.span["server.port"]) == ("openai", port(server))
    assert observed.measured["gen_ai.provider.name"] == "openai"
    assert (sent_key(server), sent_key(other)) == (KEY, "sk-anthropic")
    assert ("x-gateway" in server.last.headers, "x-gateway" in other.last.headers) == (True, False)


@pytest.mark.parametrize("mode", MODES)
def test_a_middleware_that_ends_at_another_service(
    server: Canned, other: Canned, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The spans of call and attempt and the metrics name the service and the model that answered, once for all calls."""
    monkeypatch.setenv("ANTHROPIC_BASE_URL", other.url)
    server.fail = BUSY

    def fall_back(request: Request, call_next: Any) -> Any:
        try:
            return (yield from call_next(request))
        except errors.Overloaded:
            return (yield from call_next(request.evolve(model=CLAUDE)))

    observed = ask(mode, LITELLM.config(server, "openai/gpt-4o"), fall_back)
    span = observed.span
    assert span["gen_ai.provider.name"] == "anthropic"
    assert (span["gen_ai.request.model"], span["fluxibly.requested_model"]) == (CLAUDE, "openai/gpt-4o")
    assert span["gen_ai.response.model"] == "claude-sonnet-4-5-0613"
    assert observed.attempts[-1] == ("anthropic", "claude-sonnet-4-5-0613")
    measured = observed.measured
    assert (measured["gen_ai.provider.name"], measured["gen_ai.request.model"]) == ("anthropic", CLAUDE)
    assert (measured["gen_ai.response.model"], "server.address" in measured) == ("claude-sonnet-4-5-0613", False)
    again = ask(mode, LITELLM.config(server, "openai/gpt-4o"), fall_back, calls=2)
    first, second = again.records
    assert first.provider is second.provider
    assert first.provider.telemetry_name == "anthropic"
