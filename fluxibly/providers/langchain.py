"""The framework `langchain`: any chat model that LangChain knows, and fluxibly from inside of LangChain.

The model is named as LangChain does: `provider:model`, or a name whose provider it can tell (`gpt-…`, `o1…`,
`claude-…`); `openai/…` and `anthropic/…` do too. Parameters of a call reach the service, LangChain's own retries are
switched off, and its exceptions become ours. On trio the synchronous models are run in threads, since LangChain's
asynchronous ones know asyncio alone.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import httpx

from fluxibly.aggregate import as_chunk
from fluxibly.config import LLMConfig
from fluxibly.errors import AuthenticationError, ConfigError, StreamProtocolError
from fluxibly.masking import mask_secrets
from fluxibly.providers.foreign import Limits, Steps, acall_within, asteps, call_within, on_asyncio, read_timeout
from fluxibly.providers.foreign_errors import Explainer
from fluxibly.threaded import Threaded
from fluxibly.types import Chunk, ProviderInfo, Request, Response

try:
    from langchain_core.language_models import BaseChatModel
    from langchain_core.messages import AIMessageChunk, BaseMessage
    from langchain_core.runnables import Runnable
    from pydantic import SecretStr
except ImportError as missing:
    raise ConfigError(
        f"the framework 'langchain' needs an extra: pip install 'fluxibly[langchain]' ({missing})"
    ) from missing

from fluxibly.providers.langchain_call import dialect_of, prepare
from fluxibly.providers.langchain_messages import MessageReader, response_of, to_langchain

if TYPE_CHECKING:
    import asyncio
    from typing import Self

_PREFIX = re.compile(r"(openai|anthropic)/(.+)", re.DOTALL)
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
    provider, colon, model = name.partition(":")
    if colon and provider.replace("_", "").replace("-", "").isalnum() and "/" not in provider:
        return provider.replace("-", "_").lower(), model
    if name.startswith("claude"):
        return "anthropic", name
    if name.startswith(("gpt-", "chatgpt")) or _O_SERIES.match(name):
        return "openai", name
    return None, name


class _Source:
    """Where chat models come from: made of a configuration, each model once, or the one that was given."""

    def __init__(self, config: LLMConfig | None, given: BaseChatModel | None = None) -> None:
        self.config = config
        self.given = given
        self.limits = Limits() if config is None else Limits.of(config)
        self.made: dict[str, BaseChatModel] = {}
        self.made_by_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, BaseChatModel]] = WeakKeyDictionary()
        first = given or self.model(cast("LLMConfig", config).model)
        self.explain = Explainer(library="LangChain", framework="langchain", secrets=_secrets(first, config))
        self.info = _info(first, config)

    def model(self, name: str) -> BaseChatModel:
        """The chat model for synchronous calls."""
        if self.given is not None:
            return self.given
        if name not in self.made:
            self.made[name] = self._make(name, asynchronous=False)
        return self.made[name]

    def amodel(self, name: str) -> BaseChatModel:
        """The chat model for asynchronous calls in this event loop: a pool of connections belongs to one."""
        if self.given is not None:
            return self.given
        import asyncio

        made = self.made_by_loop.setdefault(asyncio.get_running_loop(), {})
        if name not in made:
            made[name] = self._make(name, asynchronous=True)
        return made[name]

    def _make(self, name: str, *, asynchronous: bool) -> BaseChatModel:
        from langchain.chat_models import init_chat_model

        config = cast("LLMConfig", self.config)
        provider, model = split_model(name)
        settings: dict[str, Any] = {"max_retries": 0}
        if split_model(config.model)[0] == provider:  # a key must not travel to another service
            if config.api_key is not None:
                settings["api_key"] = _checked(config.api_key.reveal())
            if config.api_base is not None:
                settings["base_url"] = config.api_base
        settings |= _transport(provider, config, asynchronous=asynchronous)
        try:
            made: BaseChatModel = init_chat_model(model, model_provider=provider, **settings)
        except ImportError as error:
            raise ConfigError(f"LangChain lacks the integration for the model {name!r}: {error}") from error
        except Exception as error:  # noqa: BLE001  # each integration raises what it likes
            raise _not_made(name, error, settings.get("api_key")) from None
        return made

    def close(self) -> None:
        for model in self.made.values():
            client = getattr(model, "http_client", None)
            if client is not None:
                client.close()
        self.made.clear()

    async def aclose(self) -> None:
        import asyncio

        self.close()
        for model in self.made_by_loop.pop(asyncio.get_running_loop(), {}).values() if on_asyncio() else ():
            client = getattr(model, "http_async_client", None)
            if client is not None:
                await client.aclose()
        self.made_by_loop.clear()


def _transport(provider: str | None, config: LLMConfig, *, asynchronous: bool) -> dict[str, Any]:
    """The time limits, as the integration takes them; with a client of our own where it can be passed.

    That one follows no redirects, and its connections are closed with the provider.
    """
    times = config.timeouts
    read = read_timeout(times)
    if provider != "openai":
        return {} if read is None else {"timeout": read}
    timeout = httpx.Timeout(connect=times.connect, read=read, write=read, pool=times.connect)
    options: dict[str, Any] = {
        "timeout": timeout,
        "stream_usage": True,
        "stream_chunk_timeout": None,
        "include_response_headers": True,
    }
    if asynchronous:
        return options | {"http_async_client": httpx.AsyncClient(timeout=timeout)}
    return options | {"http_client": httpx.Client(timeout=timeout)}


def _not_made(name: str, error: Exception, key: str | None) -> Exception:
    message = mask_secrets(str(error), [key] if key else [])
    if "api_key" in message.lower() or "credentials" in message.lower():
        return AuthenticationError(
            f"LangChain needs an API key for the model {name!r}: set api_key in the config, or the provider's "
            "environment variable",
            provider="langchain",
        )
    return ConfigError(f"LangChain cannot make the model {name!r}: {message}")


def _checked(key: str) -> str:
    if not key.isascii() or not key.isprintable() or key != key.strip():
        raise AuthenticationError(
            "the API key in api_key has white space around it, control characters (a newline, perhaps) or characters "
            "outside of ASCII",
            provider="langchain",
        )
    return key


def _secrets(chat_model: BaseChatModel, config: LLMConfig | None) -> tuple[str, ...]:
    """The keys that a chat model holds, whoever gave them."""
    held = [value.get_secret_value() for value in vars(chat_model).values() if isinstance(value, SecretStr)]
    if config is not None and config.api_key is not None:
        held.append(config.api_key.reveal())
    return tuple(secret for secret in held if secret)


def _info(chat_model: BaseChatModel, config: LLMConfig | None) -> ProviderInfo:
    dialect = dialect_of(chat_model)
    provider = (split_model(config.model)[0] if config is not None else None) or dialect
    provider = "langchain" if provider == "other" else provider
    address = urlsplit(config.api_base if config is not None and config.api_base else "")
    return ProviderInfo(
        name="LangChainProvider",
        framework="langchain",
        telemetry_name=_TELEMETRY_NAMES.get(provider, provider),
        server_address=address.hostname,
        server_port=address.port or ({"https": 443, "http": 80}.get(address.scheme)),
    )


class _Answer:
    """One call: what to invoke with what, and how its answer is read."""

    def __init__(self, source: _Source, chat_model: BaseChatModel, request: Request) -> None:
        self.dialect = dialect_of(chat_model)
        self.messages = to_langchain(request.messages, self.dialect)
        self.runnable: Runnable[Any, Any]
        self.runnable, self.keywords = prepare(chat_model, request, self.dialect)
        self.reader = MessageReader()
        self.chunk_came = False
        self.whole = False
        self._explain = source.explain
        self._model = request.model

    def explain(self, error: Exception, streamed: bool = False) -> Exception:  # a callback's shape
        return self._explain(error, self._model, streamed=streamed)

    def response(self, message: object) -> Response:
        return response_of(cast("BaseMessage", message))

    def chunk(self, message: object) -> Chunk:
        if not isinstance(message, AIMessageChunk):  # a model that cannot stream gives its whole answer at once
            self.whole = True
            return as_chunk(response_of(cast("BaseMessage", message)))
        return self.reader.read(message)

    def last(self) -> Chunk:
        if self.dialect != "other" and not self.whole and not self.reader.finished:
            raise StreamProtocolError("the stream (through LangChain) was cut off: it ended without a finish reason")
        return self.reader.last()


class LangChainProvider:
    """A LangChain chat model as a provider.

    Args:
        config: `model` as LangChain names it; `api_key`, `api_base` and `timeout` are passed on.

    Raises:
        ConfigError: LangChain does not know the model, or lacks its integration.
        AuthenticationError: there is no API key.
    """

    def __init__(self, config: LLMConfig) -> None:
        self._source = _Source(config)
        self.info = self._source.info

    @classmethod
    def wrap(cls, chat_model: BaseChatModel) -> Self:
        """A provider made of a chat model that exists already, for a `Pipeline`.

        Its own settings hold, timeouts and retries among them, and its model answers whatever `Request.model` says;
        the other parameters of a request take effect.
        """
        provider = cls.__new__(cls)
        provider._adopt(_wrapped(chat_model))
        return provider

    def _adopt(self, source: _Source) -> None:
        self._source = source
        self.info = source.info

    def complete(self, request: Request) -> Response:
        """The model's whole answer; `raw` is LangChain's message.

        Raises:
            ProviderError: the service or the connection failed, or the request cannot be put to this model.
        """
        answer = _Answer(self._source, self._source.model(request.model), request)
        try:
            message = call_within(
                lambda: answer.runnable.invoke(answer.messages, **answer.keywords), self._source.limits.call
            )
            return answer.response(message)
        except Exception as error:  # noqa: BLE001  # raised below, without LangChain's own as its context
            failure = answer.explain(error)
        raise failure

    def stream(self, request: Request) -> Steps[Chunk]:
        """The model's answer as it comes. Raises what `complete` raises."""
        answer = _Answer(self._source, self._source.model(request.model), request)
        return Steps(
            lambda: answer.runnable.stream(answer.messages, **answer.keywords),
            self._source.limits,
            answer.chunk,
            answer.last,
            answer.explain,
        )

    def close(self) -> None:
        """Close the connections that were made for this provider."""
        self._source.close()


class AsyncLangChainProvider:
    """`LangChainProvider` for async pipelines."""

    def __init__(self, config: LLMConfig) -> None:
        self._adopt(_Source(config))

    @classmethod
    def wrap(cls, chat_model: BaseChatModel) -> Self:
        """See `LangChainProvider.wrap`."""
        provider = cls.__new__(cls)
        provider._adopt(_wrapped(chat_model))
        return provider

    def _adopt(self, source: _Source) -> None:
        self._source = source
        self.info = source.info
        sync = LangChainProvider.__new__(LangChainProvider)
        sync._adopt(source)
        self._threaded = Threaded(sync)

    async def complete(self, request: Request) -> Response:
        """The model's whole answer; see `LangChainProvider.complete`."""
        if not on_asyncio():
            return cast("Response", await self._threaded.complete(request))
        answer = _Answer(self._source, self._source.amodel(request.model), request)
        try:
            call: Awaitable[object] = answer.runnable.ainvoke(answer.messages, **answer.keywords)
            return answer.response(await acall_within(call, self._source.limits.call))
        except Exception as error:  # noqa: BLE001  # raised below, without LangChain's own as its context
            failure = answer.explain(error)
        raise failure

    async def stream(self, request: Request) -> AsyncGenerator[Chunk]:
        """The model's answer as it comes; see `LangChainProvider.stream`."""
        steps: AsyncGenerator[Any] = self._steps(request) if on_asyncio() else self._threaded._stream(request)
        try:
            async for chunk in steps:
                yield chunk
        finally:
            await steps.aclose()

    def _steps(self, request: Request) -> AsyncGenerator[Chunk]:
        answer = _Answer(self._source, self._source.amodel(request.model), request)

        async def open_stream() -> AsyncIterator[Any]:
            return answer.runnable.astream(answer.messages, **answer.keywords)

        return asteps(open_stream, self._source.limits, answer.chunk, answer.last, answer.explain)

    async def aclose(self) -> None:
        """Close the connections that were made for this provider."""
        await self._source.aclose()


def _wrapped(chat_model: object) -> _Source:
    if not isinstance(chat_model, BaseChatModel):
        raise TypeError(f"wrap() takes a LangChain chat model (a BaseChatModel), not a {type(chat_model).__name__}")
    return _Source(None, chat_model)


def as_chat_model(llm: object, *, model: str | None = None) -> BaseChatModel:
    """An `LLM`, `AsyncLLM`, `Pipeline` or `AsyncPipeline` as a LangChain chat model; see `langchain_model`."""
    from fluxibly.providers.langchain_model import FluxiblyChatModel

    return FluxiblyChatModel.of(llm, model=model)
