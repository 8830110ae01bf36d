"""The framework `langchain`: any chat model of LangChain as a provider, and fluxibly as a LangChain chat model.

Models have LangChain's names: `provider:model`, or a name that implies the provider (`gpt-…`, `o1…`, `claude-…`).
`openai/…` and `anthropic/…` work too. The parameters of a call reach the service, LangChain's own retries are switched
off, and its exceptions become fluxibly's. On trio the synchronous models run in threads, because LangChain's
asynchronous models support only asyncio.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from typing import TYPE_CHECKING, Any, cast

from fluxibly._checks import kind_of, secrets_in
from fluxibly._extras import pip_install
from fluxibly.aggregate import as_chunks
from fluxibly.config import LLMConfig
from fluxibly.errors import ConfigError, StreamProtocolError
from fluxibly.provider import Threaded
from fluxibly.providers._libraries.calls import LibraryStream, OpenStream, acall_within, call_within, library_stream
from fluxibly.providers._libraries.loops import on_asyncio
from fluxibly.types import Chunk, Request, Response

try:
    from langchain_core.language_models import BaseChatModel
    from langchain_core.messages import AIMessageChunk, BaseMessage
    from langchain_core.runnables import Runnable

    from fluxibly.providers.langchain._messages import response_of, to_langchain
    from fluxibly.providers.langchain._models import ChatModels, answers_to_cut
    from fluxibly.providers.langchain._parameters import dialect_of, form_of, integration_of, prepare, spoken
    from fluxibly.providers.langchain._stream import MessageReader
except ImportError as missing:
    raise ConfigError(
        f"the framework 'langchain' needs packages that are not installed: {pip_install('langchain')} ({missing})"
    ) from missing

if TYPE_CHECKING:
    from typing import Self


class _Answer:
    """A call: the runnable to invoke, its messages and keywords, and the state of reading the answer."""

    def __init__(self, source: ChatModels, chat_model: BaseChatModel, request: Request) -> None:
        self.dialect = dialect_of(chat_model)
        self.integration = integration_of(chat_model)
        form = form_of(chat_model, self.integration)
        self.messages = to_langchain(spoken(request, self.dialect), self.dialect, self.integration, form)
        self.runnable: Runnable[Any, Any]
        self.runnable, self.keywords = prepare(chat_model, request, self.dialect)
        self.reader = MessageReader(self.integration)
        self.whole = False
        self._source = source
        self._request = request
        self._provider: object = self.dialect
        source.asks(request.call, request.model)

    def explain(self, error: Exception, streamed: bool = False) -> Exception:  # a callback's shape
        asked = self._request
        secrets = (*asked.headers.values(), *secrets_in(asked.extra))
        return self._source.explain(error, asked.model, streamed=streamed, more_secrets=secrets)

    def response(self, message: object) -> Response:
        self._see(cast("BaseMessage", message))
        return response_of(cast("BaseMessage", message), self.integration)

    def _see(self, message: BaseMessage) -> None:
        """Record which service answers, if a chat model delegates to others and their messages name the service.

        An integration that builds on another may put the other's name into its messages. That name is ignored.
        """
        reported = message.response_metadata.get("model_provider")
        if reported != self._provider and isinstance(reported, str) and reported:
            self._provider = reported
            self._source.answers(self._request.call, reported)

    def chunks(self, message: object) -> Iterable[Chunk]:
        if not isinstance(message, AIMessageChunk):  # a model that cannot stream returns its whole answer at once
            self.whole = True
            return as_chunks(self.response(message))
        self._see(message)
        return self.reader.read(message)

    def last(self) -> Iterable[Chunk]:
        if self.dialect != "other" and not self.whole and not self.reader.finished:
            raise StreamProtocolError("the stream (through LangChain) was cut off: it ended without a finish reason")
        return self.reader.end()


class LangChainProvider:
    """A LangChain chat model as a provider.

    Args:
        config: `model` as LangChain names it; `api_key`, `api_base`, `headers` and `timeout` are passed on.

    Raises:
        ConfigError: LangChain does not know the model, or lacks its integration.
        AuthenticationError: there is no API key.
    """

    obeys = True

    def __init__(self, config: LLMConfig | ChatModels) -> None:
        self._source = config if isinstance(config, ChatModels) else ChatModels(config)
        self.info = self._source.info

    @classmethod
    def wrap(cls, chat_model: BaseChatModel) -> Self:
        """Return a provider for an existing chat model, to use in a `Pipeline`.

        The chat model keeps its own settings, including retries and timeouts, and answers whatever model
        `Request.model` names. The other parameters of a request take effect, and so do the time limits of a call.
        """
        return cls(_wrapped(chat_model))

    def complete(self, request: Request) -> Response:
        """Return the model's whole answer; `raw` is LangChain's message.

        Raises:
            ProviderError: the service or the connection failed, or the model does not support the request.
        """
        answer = _Answer(self._source, self._source.model(request.model), request)
        try:
            limits = self._source.limits.of_call(request.call)
            message = call_within(lambda: answer.runnable.invoke(answer.messages, **answer.keywords), limits)
            return answer.response(message)
        except Exception as error:  # noqa: BLE001  # raised below, without LangChain's exception as its context
            failure = answer.explain(error)
        raise failure

    def stream(self, request: Request) -> LibraryStream:
        """Return the model's answer as a stream; errors as for `complete`."""
        answer = _Answer(self._source, self._source.model(request.model), request)

        def open_stream() -> OpenStream:
            cut = answers_to_cut()
            stream: Any = answer.runnable.stream(answer.messages, **answer.keywords)
            return OpenStream(stream, stream.close, cut)

        limits = self._source.limits.of_call(request.call)
        return LibraryStream(open_stream, limits, answer.chunks, answer.last, answer.explain)

    def close(self) -> None:
        """Close the connections that were opened for this provider."""
        self._source.close()


class AsyncLangChainProvider:
    """`LangChainProvider` for async pipelines."""

    obeys = True

    def __init__(self, config: LLMConfig | ChatModels) -> None:
        self._source = config if isinstance(config, ChatModels) else ChatModels(config)
        self.info = self._source.info
        self._threaded = Threaded(LangChainProvider(self._source))

    @classmethod
    def wrap(cls, chat_model: BaseChatModel) -> Self:
        """See `LangChainProvider.wrap`."""
        return cls(_wrapped(chat_model))

    async def complete(self, request: Request) -> Response:
        """Return the model's whole answer; see `LangChainProvider.complete`."""
        if not on_asyncio():
            return cast("Response", await self._threaded.complete(request))
        answer = _Answer(self._source, self._source.amodel(request.model), request)
        try:
            limits = self._source.limits.of_call(request.call)
            return answer.response(
                await acall_within(lambda: answer.runnable.ainvoke(answer.messages, **answer.keywords), limits)
            )
        except Exception as error:  # noqa: BLE001  # raised below, without LangChain's exception as its context
            failure = answer.explain(error)
        raise failure

    def stream(self, request: Request) -> AsyncGenerator[Chunk]:
        """Return the model's answer as a stream; see `LangChainProvider.stream`."""
        return self._steps(request) if on_asyncio() else cast("AsyncGenerator[Chunk]", self._threaded.stream(request))

    def _steps(self, request: Request) -> AsyncGenerator[Chunk]:
        answer = _Answer(self._source, self._source.amodel(request.model), request)

        async def open_stream() -> AsyncIterator[Any]:
            return answer.runnable.astream(answer.messages, **answer.keywords)

        limits = self._source.limits.of_call(request.call)
        return library_stream(open_stream, limits, answer.chunks, answer.last, answer.explain)

    async def aclose(self) -> None:
        """Close the connections that were opened for this provider."""
        await self._source.aclose()


def _wrapped(chat_model: object) -> ChatModels:
    if not isinstance(chat_model, BaseChatModel):
        raise TypeError(f"wrap(): expected a LangChain chat model (a BaseChatModel), got {kind_of(chat_model)}")
    return ChatModels(None, chat_model)


def as_chat_model(llm: object, *, model: str | None = None) -> BaseChatModel:
    """Return an `LLM`, `AsyncLLM`, `Pipeline` or `AsyncPipeline` as a LangChain chat model: a `FluxiblyChatModel`."""
    from fluxibly.providers.langchain._chat_model import FluxiblyChatModel

    return FluxiblyChatModel.of(llm, model=model)
