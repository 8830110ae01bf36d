"""LangChain's chat models, made of a configuration: their names, keys, time limits and connections."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, cast

import attrs
import httpx
from langchain_core.language_models import BaseChatModel
from pydantic import SecretStr

from fluxibly._masking import mask_secrets
from fluxibly.config import LLMConfig
from fluxibly.errors import AuthenticationError, ConfigError
from fluxibly.providers._libraries.calls import LibraryLimits, checked_key, info_of, read_timeout
from fluxibly.providers._libraries.errors import ErrorTranslator
from fluxibly.providers._libraries.loops import PerLoop, on_asyncio
from fluxibly.providers._libraries.services import Services
from fluxibly.providers.http import end_connection
from fluxibly.providers.langchain._parameters import dialect_of
from fluxibly.types import CallRecord, ProviderInfo

_PREFIX = re.compile(r"(openai|anthropic)/(.+)", re.DOTALL)
_PROVIDER = re.compile(r"([A-Za-z][A-Za-z0-9_-]*):(.+)", re.DOTALL)
_O_SERIES = re.compile(r"o\d")
_TELEMETRY_NAMES = {
    "azure_openai": "azure.ai.openai",
    "bedrock": "aws.bedrock",
    "bedrock_converse": "aws.bedrock",
    "google_genai": "gcp.gemini",
    "google_vertexai": "gcp.vertex_ai",
    "ibm": "ibm.watsonx.ai",
    "mistralai": "mistral_ai",
    "xai": "x_ai",
}


def split_model(name: str) -> tuple[str | None, str]:
    """LangChain's provider, if the name tells it, and the model."""
    prefixed = _PREFIX.fullmatch(name)
    if prefixed:
        return prefixed[1], prefixed[2]
    named = _PROVIDER.fullmatch(name)
    if named:
        return named[1].replace("-", "_").lower(), named[2]
    if name.startswith("claude"):
        return "anthropic", name
    if name.startswith(("gpt-", "chatgpt")) or _O_SERIES.match(name):
        return "openai", name
    return None, name


_answers: ContextVar[list[httpx.Response] | None] = ContextVar("fluxibly_langchain_answers", default=None)
"""Where the answers of a synchronous stream are noted, from their heads on."""


@attrs.frozen
class _Made:
    """A chat model, with the HTTP client that was made for it, if it takes one."""

    model: BaseChatModel
    client: Any = None


class ChatModels:
    """Where chat models come from: made of a configuration, each once, or the one that was given."""

    def __init__(self, config: LLMConfig | None, given: BaseChatModel | None = None) -> None:
        self._config = config
        self._given = given
        self.limits = LibraryLimits() if config is None else LibraryLimits.of(config)
        self._made: dict[str, _Made] = {}
        # A pool of connections belongs to the event loop that it was first used in.
        self._made_by_loop: PerLoop[dict[str, _Made]] = PerLoop(dict, _aclose_clients)
        first = given or self.model(cast("LLMConfig", config).model)
        self.explain = ErrorTranslator(library="LangChain", framework="langchain", secrets=_secrets(first, config))
        self.info = _info(first, config)
        self._services = Services(self.info)

    def model(self, name: str) -> BaseChatModel:
        """The chat model for synchronous calls."""
        if self._given is not None:
            return self._given
        if name not in self._made:
            self._made[name] = self._make(name, asynchronous=False)
        return self._made[name].model

    def amodel(self, name: str) -> BaseChatModel:
        """The chat model for asynchronous calls in this event loop."""
        if self._given is not None:
            return self._given
        made = self._made_by_loop.get()
        if name not in made:
            made[name] = self._make(name, asynchronous=True)
        return made[name].model

    def asks(self, call: CallRecord, name: str) -> None:
        """Tell a call whose model it asks for."""
        provider = None if self._given is not None else split_model(name)[0]
        service = self.info if provider is None else self._services.named(_telemetry_name(provider))
        self._services.tell(call, service)

    def answers(self, call: CallRecord, provider: str) -> None:
        """Tell a call who answered, by LangChain's name of the service."""
        self._services.tell(call, self._services.named(_telemetry_name(provider)))

    def _make(self, name: str, *, asynchronous: bool) -> _Made:
        from langchain.chat_models import init_chat_model

        config = cast("LLMConfig", self._config)
        provider, model = split_model(name)
        settings: dict[str, Any] = {"max_retries": 0}
        if split_model(config.model)[0] == provider:  # a key must not travel to another service
            if key := checked_key(config):
                settings["api_key"] = key
            if config.api_base is not None:
                settings["base_url"] = config.api_base
        read = read_timeout(config.timeouts)
        if read is not None:
            settings["timeout"] = read
        client: Any = None
        if provider in ("openai", "anthropic"):
            client = _client(provider, config, asynchronous=asynchronous)
        if provider == "openai":
            settings |= {
                "timeout": client.timeout,
                "http_async_client" if asynchronous else "http_client": client,
                "stream_usage": True,
                "stream_chunk_timeout": None,
                "include_response_headers": True,
            }
        try:
            made = cast("BaseChatModel", init_chat_model(model, model_provider=provider, **settings))
        except ImportError as error:
            raise ConfigError(f"LangChain lacks the integration for the model {name!r}: {error}") from error
        except Exception as error:  # noqa: BLE001  # each integration raises what it likes
            raise _not_made(name, error, settings.get("api_key")) from None
        if provider == "anthropic":
            _give_client(made, client, asynchronous=asynchronous)
        return _Made(made, client)

    def close(self) -> None:
        for made in self._made.values():
            if made.client is not None:
                made.client.close()
        self._made.clear()

    async def aclose(self) -> None:
        """Close the connections of this event loop; those of others close with it."""
        self.close()
        if on_asyncio():  # on trio the synchronous models serve
            await self._made_by_loop.aclose()


async def _aclose_clients(models: dict[str, _Made]) -> None:
    for made in models.values():
        if made.client is not None:
            await made.client.aclose()


def _client(provider: str, config: LLMConfig, *, asynchronous: bool) -> Any:
    """A client of our own, of the SDK behind an integration (`openai` and `anthropic` are both packages' names).

    It follows no redirects, which would carry the key along, and its connections close with the provider.
    """
    sdk = importlib.import_module(provider)
    times = config.timeouts
    read = read_timeout(times)
    timeout = sdk.Timeout(connect=times.connect, read=read, write=read, pool=times.connect)
    make = sdk.DefaultAsyncHttpxClient if asynchronous else sdk.DefaultHttpxClient
    hooks = {} if asynchronous else {"response": [_note_answer]}
    return make(timeout=timeout, follow_redirects=False, event_hooks=hooks)


def answers_to_cut() -> Callable[[], None]:
    """What ends the connections of the answers that come in this context from now on, under a read of another thread."""
    answers: list[httpx.Response] = []
    _answers.set(answers)

    def cut() -> None:
        for answer in answers[-1:]:  # connections of earlier ones may be used by other calls already
            end_connection(answer)

    return cut


def _note_answer(answer: httpx.Response) -> None:
    answers = _answers.get()
    if answers is not None:
        answers.append(answer)


def _give_client(chat_model: BaseChatModel, client: Any, *, asynchronous: bool) -> None:
    """Have a ChatAnthropic use `client`.

    It has no setting for one: its own client is shared by all models of the process, whatever event loop they are
    used in, and fails in the second.
    """
    name = "_async_client" if asynchronous else "_client"
    sdk = getattr(chat_model, name)
    vars(chat_model)[name] = sdk.with_options(http_client=client, timeout=client.timeout)


def _not_made(name: str, error: Exception, key: str | None) -> Exception:
    message = mask_secrets(str(error), [key] if key else [])
    if "api_key" in message.lower() or "credentials" in message.lower():
        return AuthenticationError(
            f"LangChain needs an API key for the model {name!r}: set api_key in the config, or the provider's "
            "environment variable",
            provider="langchain",
        )
    return ConfigError(f"LangChain cannot make the model {name!r}: {message}")


def _secrets(chat_model: BaseChatModel, config: LLMConfig | None) -> tuple[str, ...]:
    """The keys that a chat model holds, whoever gave them."""
    held = [value.get_secret_value() for value in vars(chat_model).values() if isinstance(value, SecretStr)]
    if config is not None and config.api_key is not None:
        held.append(config.api_key.reveal())
    return tuple(secret for secret in held if secret)


def _info(chat_model: BaseChatModel, config: LLMConfig | None) -> ProviderInfo:
    provider = (split_model(config.model)[0] if config is not None else None) or dialect_of(chat_model)
    provider = "langchain" if provider == "other" else provider
    name = _telemetry_name(provider)
    return info_of(config, name="LangChainProvider", framework="langchain", telemetry_name=name)


def _telemetry_name(provider: str) -> str:
    """`gen_ai.provider.name` for LangChain's name of a service."""
    return _TELEMETRY_NAMES.get(provider, provider)
