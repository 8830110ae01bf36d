"""The service that answered when a LangChain chat model falls back to another, with the real integrations."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

pytest.importorskip("langchain")
pytest.importorskip("langchain_openai")
pytest.importorskip("langchain_anthropic")

from langchain_anthropic import ChatAnthropic
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_openai import ChatOpenAI
from pydantic import Field
from support.answering import Observed, observe
from support.canned_server import Canned
from support.libraries import KEY, LANGCHAIN, MODES

from fluxibly import Request, errors

SYNC_MODELS = tuple(mode for mode in MODES if not mode.startswith("asyncio"))
"""The modes without LangChain's own asynchronous clients, which LangChain cannot close."""
BUSY = (503, '{"error": {"message": "busy"}}', {})


class Delegating(BaseChatModel):
    """A user's own chat model that delegates to others."""

    asked: Any

    @property
    def _llm_type(self) -> str:
        return "delegating"

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=self.asked.invoke(messages, **kwargs))])

    def _stream(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> Iterator[Any]:
        for message in self.asked.stream(messages, **kwargs):
            yield ChatGenerationChunk(message=message)


class Anyone(BaseChatModel):
    """A chat model whose messages may name the service that they came from."""

    metadata_of_answers: dict[str, Any] = Field(default_factory=dict)

    @property
    def _llm_type(self) -> str:
        return "anyone"

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        message = AIMessage("hi", response_metadata=self.metadata_of_answers)
        return ChatResult(generations=[ChatGeneration(message=message)])

    async def _astream(
        self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> AsyncIterator[Any]:
        for text in ("h", "i"):
            message = AIMessageChunk(text, response_metadata=self.metadata_of_answers)
            yield ChatGenerationChunk(message=message)


def wrapped(mode: str, chat_model: BaseChatModel, calls: int = 1) -> Observed:
    provider = LANGCHAIN.providers[not mode.startswith("sync")].wrap(chat_model)
    return observe(mode, provider, Request(model="any", messages="hello there"), calls=calls)


def fallback(server: Canned, other: Canned) -> Delegating:
    """Return an OpenAI model with an Anthropic model as its fallback."""
    first = ChatOpenAI(model="gpt-4o", api_key=KEY, base_url=server.url + "/v1", max_retries=0)
    second = ChatAnthropic(model="claude-test", api_key=KEY, base_url=other.url, max_retries=0)
    return Delegating(asked=first.with_fallbacks([second]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fails", [False, True])
def test_the_service_that_answered_is_named(server: Canned, other: Canned, mode: str, fails: bool) -> None:
    """The spans of call and attempt and the metrics have the service and its name for the model, but no address."""
    server.fail = BUSY if fails else None
    observed = wrapped(mode, fallback(server, other))
    service, model = ("anthropic", "claude-test-0613") if fails else ("openai", "gpt-4o-0613")
    assert len(other.seen) == fails
    span, measured = observed.span, observed.measured
    assert (span["gen_ai.provider.name"], span["gen_ai.response.model"]) == (service, model)
    assert (measured["gen_ai.provider.name"], measured["gen_ai.response.model"]) == (service, model)
    assert observed.attempts == [(service, model)]
    assert "server.address" not in span
    # LangChain does not report the requested model, so the caller's value stays
    assert span["gen_ai.request.model"] == measured["gen_ai.request.model"] == "any"
    assert "fluxibly.requested_model" not in span


@pytest.mark.parametrize("mode", MODES)
def test_a_service_is_described_once(server: Canned, other: Canned, mode: str) -> None:
    """All calls that a service answers share the same description."""
    server.fail = BUSY
    first, second = wrapped(mode, fallback(server, other), calls=2).records
    assert first.provider is second.provider
    assert first.provider.telemetry_name == "anthropic"


NAMES = [
    ({"model_provider": "google_genai"}, "gcp.gemini"),
    ({"model_provider": "bedrock_converse"}, "aws.bedrock"),
    ({"model_provider": "groq"}, "groq"),
    ({"model_provider": ""}, "langchain"),
    ({"model_provider": None}, "langchain"),
    ({"model_provider": ["openai"]}, "langchain"),
    ({}, "langchain"),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("metadata", "name"), NAMES)
def test_names_follow_the_conventions_and_are_never_made_up(mode: str, metadata: dict[str, Any], name: str) -> None:
    """A service is named as in the conventions. If a model does not name its service, the provider stays the same."""
    observed = wrapped(mode, Anyone(metadata_of_answers=metadata))
    assert observed.span["gen_ai.provider.name"] == observed.measured["gen_ai.provider.name"] == name
    assert observed.attempts[0][0] == name


@pytest.mark.parametrize("mode", SYNC_MODELS)
def test_an_integration_that_stands_on_anothers_keeps_its_name(
    server: Canned, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Azure keeps its name, although its messages say "openai" because they have OpenAI's format."""
    monkeypatch.setenv("OPENAI_API_VERSION", "2024-10-21")
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", KEY)
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", server.url)
    settings = LANGCHAIN.config(server, "azure_openai:gpt-4o", api_base=None, api_key=None)
    provider = LANGCHAIN.providers[not mode.startswith("sync")](settings)
    observed = observe(mode, provider, Request(model=settings.model, messages="hello there"))
    assert observed.span["gen_ai.provider.name"] == "azure.ai.openai"
    assert observed.records[0].provider is provider.info


@pytest.mark.parametrize("mode", MODES)
def test_the_configured_service_is_the_very_same_object(server: Canned, mode: str) -> None:
    """Calls that the configured service answers keep the provider's own description, with its address."""
    settings = LANGCHAIN.config(server, "anthropic:claude-test")
    provider = LANGCHAIN.providers[not mode.startswith("sync")](settings)
    observed = observe(mode, provider, Request(model=settings.model, messages="hello there"), calls=2)
    assert all(record.provider is provider.info for record in observed.records)


@pytest.mark.parametrize("mode", MODES)
def test_a_middleware_that_asks_another_service_and_comes_back(
    server: Canned, other: Canned, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt names the service that it asked. The call names the service that answered, with its own address."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-other")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", other.url)
    other.fail = BUSY
    failed_at: list[Any] = []

    def there_and_back(request: Request, call_next: Any) -> Any:
        try:
            return (yield from call_next(request.evolve(model="anthropic:claude-test")))
        except errors.ProviderError:
            failed_at.append(request.call.provider)
            return (yield from call_next(request))

    settings = LANGCHAIN.config(server, "openai:gpt-4o")
    provider = LANGCHAIN.providers[not mode.startswith("sync")](settings)
    observed = observe(mode, provider, Request(model=settings.model, messages="hello there"), there_and_back)
    assert [name for name, _ in observed.attempts] == ["anthropic", "openai"]
    assert (failed_at[0].telemetry_name, failed_at[0].server_address) == ("anthropic", None)
    assert observed.records[0].provider is provider.info
    assert (observed.span["gen_ai.provider.name"], observed.measured["gen_ai.provider.name"]) == ("openai", "openai")
