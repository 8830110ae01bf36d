"""LangChain's chat models, created from a configuration: their names, keys, timeouts and connections."""

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
from fluxibly.providers.langchain._parameters import dialect_of, sdk_timeout
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
    """Return LangChain's provider, if the name states or implies it, and the model."""
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
"""The HTTP responses of a synchronous stream, recorded as soon as their headers have arrived."""


@attrs.frozen
class _Made:
    """A chat model and the HTTP client that was created for it, if the chat model accepts a client."""

    model: BaseChatModel
    client: Any = None


class ChatModels:
    """The chat models of a provider: each is created once from a configuration, unless a chat model was passed in."""

    def __init__(self, config: LLMConfig | None, given: BaseChatModel | None = None) -> None:
        self._config = config
        self._given = given
        self.limits = LibraryLimits() if config is None else LibraryLimits.of(config)
        self._made: dict[str, _Made] = {}
        # A connection pool belongs to the event loop in which it was first used.
        self._made_by_loop: PerLoop[dict[str, _Made]] = PerLoop(dict, _aclose_clients)
        first = given or self.model(cast("LLMConfig", config).model)
        self.explain = ErrorTranslator(library="LangChain", framework="langchain", secrets=_secrets(first, config))
        self.info = _info(first, config)
        self._services = Services(self.info)
        self.max_retries = None if given is None else _retries_of(given)
        """The retries of a chat model that was passed in, if it says how many it has."""

    def model(self, name: str) -> BaseChatModel:
        """Return the chat model for synchronous calls."""
        if self._given is not None:
            return self._given
        if name not in self._made:
            self._made[name] = self._make(name, asynchronous=False)
        return self._made[name].model

    def amodel(self, name: str) -> BaseChatModel:
        """Return the chat model for asynchronous calls in the running event loop."""
        if self._given is not None:
            return self._given
        made = self._made_by_loop.get()
        if name not in made:
            made[name] = self._make(name, asynchronous=True)
        return made[name].model

    def asks(self, call: CallRecord, name: str) -> None:
        """Record on the call which service is asked for the model `name`."""
        provider = None if self._given is not None else split_model(name)[0]
        service = self.info if provider is None else self._services.named(_telemetry_name(provider))
        self._services.note(call, service)

    def answers(self, call: CallRecord, provider: str) -> None:
        """Record on the call which service answered. `provider` is LangChain's name for the service."""
        self._services.note(call, self._services.named(_telemetry_name(provider)))

    def _make(self, name: str, *, asynchronous: bool) -> _Made:
        from langchain.chat_models import init_chat_model

        config = cast("LLMConfig", self._config)
        provider, model = split_model(name)
        settings: dict[str, Any] = {"max_retries": 0}
        if split_model(config.model)[0] == provider:  # the key must not be sent to another service
            if callable(config.api_key) and provider == "openai":
                settings["api_key"] = config.api_key
            elif key := checked_key(config):
                settings["api_key"] = key
            if config.headers:
                if provider not in ("openai", "anthropic"):
                    raise ConfigError(f"headers: LangChain's {provider} takes no headers; leave them out")
                settings["default_headers"] = dict(config.headers)
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
        except Exception as error:  # noqa: BLE001  # each integration raises its own exceptions
            raise _not_made(name, error, config.fixed_key) from None
        if provider == "anthropic":
            _give_client(made, client, asynchronous=asynchronous)
        return _Made(made, client)

    def close(self) -> None:
        for made in self._made.values():
            if made.client is not None:
                made.client.close()
        self._made.clear()

    async def aclose(self) -> None:
        """Close the connections of the running event loop. Connections of other loops close with their loop."""
        self.close()
        if on_asyncio():  # on trio the synchronous chat models make the calls
            await self._made_by_loop.aclose()


def _retries_of(chat_model: BaseChatModel) -> object:
    """Return the retries that a chat model's SDK makes by itself; None if it does not say."""
    client = getattr(chat_model, "root_client", None)  # ChatOpenAI leaves the number to its SDK
    return getattr(client, "max_retries", getattr(chat_model, "max_retries", None))


async def _aclose_clients(models: dict[str, _Made]) -> None:
    for made in models.values():
        if made.client is not None:
            await made.client.aclose()


def _client(provider: str, config: LLMConfig, *, asynchronous: bool) -> Any:
    """Create an HTTP client for the SDK behind an integration (`openai` and `anthropic` are also the packages' names).

    The client does not follow redirects, which would carry the key along. Its connections close with the provider.
    """
    sdk = importlib.import_module(provider)
    timeout = sdk_timeout(provider, config.timeouts)
    make = sdk.DefaultAsyncHttpxClient if asynchronous else sdk.DefaultHttpxClient
    hooks = {} if asynchronous else {"response": [_note_answer]}
    return make(timeout=timeout, follow_redirects=False, event_hooks=hooks)


def answers_to_cut() -> Callable[[], None]:
    """Return a function that ends the connection of the latest response received in this context from now on.

    The function works while another thread reads the response.
    """
    answers: list[httpx.Response] = []
    _answers.set(answers)

    def cut() -> None:
        for answer in answers[-1:]:  # other calls may already use the connections of earlier responses
            end_connection(answer)

    return cut


def _note_answer(answer: httpx.Response) -> None:
    answers = _answers.get()
    if answers is not None:
        answers.append(answer)


def _give_client(chat_model: BaseChatModel, client: Any, *, asynchronous: bool) -> None:
    """Make a ChatAnthropic use `client`.

    ChatAnthropic has no setting for a client. All models of the process share its own client, even across event loops,
    and that client fails in the second loop.
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
    return ConfigError(f"LangChain cannot create the model {name!r}: {message}")


def _secrets(chat_model: BaseChatModel, config: LLMConfig | None) -> tuple[str, ...]:
    """Return the keys that a chat model holds, from the configuration or any other source."""
    held = [value.get_secret_value() for value in vars(chat_model).values() if isinstance(value, SecretStr)]
    if config is not None:
        held += [config.fixed_key or "", *config.headers.values()]
    return tuple(secret for secret in held if secret)


def _info(chat_model: BaseChatModel, config: LLMConfig | None) -> ProviderInfo:
    provider = (split_model(config.model)[0] if config is not None else None) or dialect_of(chat_model)
    provider = "langchain" if provider == "other" else provider
    name = _telemetry_name(provider)
    return info_of(config, name="LangChainProvider", framework="langchain", telemetry_name=name)


def _telemetry_name(provider: str) -> str:
    """Return `gen_ai.provider.name` for LangChain's name of a service."""
    return _TELEMETRY_NAMES.get(provider, provider)
