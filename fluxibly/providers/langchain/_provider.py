"""The framework `langchain`: any chat model that LangChain knows, and fluxibly from inside of LangChain.

The model is named as LangChain does: `provider:model`, or a name whose provider it can tell (`gpt-…`, `o1…`,
`claude-…`); `openai/…` and `anthropic/…` do too. Parameters of a call reach the service, LangChain's own retries are
switched off, and its exceptions become ours. On trio the synchronous models are run in threads, since LangChain's
asynchronous ones know asyncio alone.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from typing import TYPE_CHECKING, Any, cast

import attrs

from fluxibly._extras import pip_install
from fluxibly.aggregate import as_chunk
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

    from fluxibly.providers.langchain._messages import MessageReader, response_of, to_langchain
    from fluxibly.providers.langchain._models import ChatModels, answers_to_cut
    from fluxibly.providers.langchain._parameters import dialect_of, prepare
except ImportError as missing:
    raise ConfigError(
        f"the framework 'langchain' needs packages that are not installed: {pip_install('langchain')} ({missing})"
    ) from missing

if TYPE_CHECKING:
    from typing import Self


_HELD = ("finish_reason", "raw_finish_reason", "usage", "model", "id", "request_id", "rate_limits")
"""What is no output waits for a chunk with some, or for the last: a chunk is a piece of the answer."""


class _Answer:
    """One call: what to invoke with what, and how its answer is read."""

    def __init__(self, source: ChatModels, chat_model: BaseChatModel, request: Request) -> None:
        self.dialect = dialect_of(chat_model)
        self.messages = to_langchain(request.messages, self.dialect)
        self.runnable: Runnable[Any, Any]
        self.runnable, self.keywords = prepare(chat_model, request, self.dialect)
        self.reader = MessageReader()
        self.whole = False
        self._held: dict[str, Any] = {}
        self._source = source
        self._request = request
        self._provider: object = self.dialect
        source.asks(request.call, request.model)

    def explain(self, error: Exception, streamed: bool = False) -> Exception:  # a callback's shape
        return self._source.explain(error, self._request.model, streamed=streamed)

    def response(self, message: object) -> Response:
        self._see(cast("BaseMessage", message))
        return response_of(cast("BaseMessage", message))

    def _see(self, message: BaseMessage) -> None:
        """Notice who answers, if a chat model asks others and their messages tell it.

        An integration that stands on another's may have its messages say the other's name, which is no news.
        """
        told = message.response_metadata.get("model_provider")
        if told != self._provider and isinstance(told, str) and told:
            self._provider = told
            self._source.answers(self._request.call, told)

    def chunk(self, message: object) -> Chunk | None:
        self._see(cast("BaseMessage", message))
        if not isinstance(message, AIMessageChunk):  # a model that cannot stream gives its whole answer at once
            self.whole = True
            return as_chunk(response_of(cast("BaseMessage", message)))
        chunk = self.reader.read(message)
        self._held |= {name: value for name in _HELD if (value := getattr(chunk, name))}
        if not chunk.has_output:
            return None
        held, self._held = self._held, {}
        return attrs.evolve(chunk, **held)

    def last(self) -> Chunk | None:
        if self.dialect != "other" and not self.whole and not self.reader.finished:
            raise StreamProtocolError("the stream (through LangChain) was cut off: it ended without a finish reason")
        parts = self.reader.reasoning_parts()
        return Chunk(reasoning_parts=parts, **self._held) if parts or self._held else None


class LangChainProvider:
    """A LangChain chat model as a provider.

    Args:
        config: `model` as LangChain names it; `api_key`, `api_base` and `timeout` are passed on.

    Raises:
        ConfigError: LangChain does not know the model, or lacks its integration.
        AuthenticationError: there is no API key.
    """

    def __init__(self, config: LLMConfig | ChatModels) -> None:
        self._source = config if isinstance(config, ChatModels) else ChatModels(config)
        self.info = self._source.info

    @classmethod
    def wrap(cls, chat_model: BaseChatModel) -> Self:
        """A provider made of a chat model that exists already, for a `Pipeline`.

        Its own settings hold, timeouts and retries among them, and its model answers whatever `Request.model` says;
        the other parameters of a request take effect.
        """
        return cls(_wrapped(chat_model))

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

    def stream(self, request: Request) -> LibraryStream[Chunk]:
        """The model's answer as it comes. Raises what `complete` raises."""
        answer = _Answer(self._source, self._source.model(request.model), request)

        def open_stream() -> OpenStream:
            cut = answers_to_cut()
            stream: Any = answer.runnable.stream(answer.messages, **answer.keywords)
            return OpenStream(stream, stream.close, cut)

        return LibraryStream(open_stream, self._source.limits, answer.chunk, answer.last, answer.explain)

    def close(self) -> None:
        """Close the connections that were made for this provider."""
        self._source.close()


class AsyncLangChainProvider:
    """`LangChainProvider` for async pipelines."""

    def __init__(self, config: LLMConfig | ChatModels) -> None:
        self._source = config if isinstance(config, ChatModels) else ChatModels(config)
        self.info = self._source.info
        self._threaded = Threaded(LangChainProvider(self._source))

    @classmethod
    def wrap(cls, chat_model: BaseChatModel) -> Self:
        """See `LangChainProvider.wrap`."""
        return cls(_wrapped(chat_model))

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

    def stream(self, request: Request) -> AsyncGenerator[Chunk]:
        """The model's answer as it comes; see `LangChainProvider.stream`."""
        return self._steps(request) if on_asyncio() else cast("AsyncGenerator[Chunk]", self._threaded.stream(request))

    def _steps(self, request: Request) -> AsyncGenerator[Chunk]:
        answer = _Answer(self._source, self._source.amodel(request.model), request)

        async def open_stream() -> AsyncIterator[Any]:
            return answer.runnable.astream(answer.messages, **answer.keywords)

        return library_stream(open_stream, self._source.limits, answer.chunk, answer.last, answer.explain)

    async def aclose(self) -> None:
        """Close the connections that were made for this provider."""
        await self._source.aclose()


def _wrapped(chat_model: object) -> ChatModels:
    if not isinstance(chat_model, BaseChatModel):
        raise TypeError(f"wrap() takes a LangChain chat model (a BaseChatModel), not a {type(chat_model).__name__}")
    return ChatModels(None, chat_model)


def as_chat_model(llm: object, *, model: str | None = None) -> BaseChatModel:
    """An `LLM`, `AsyncLLM`, `Pipeline` or `AsyncPipeline` as a LangChain chat model; see `FluxiblyChatModel`."""
    from fluxibly.providers.langchain._chat_model import FluxiblyChatModel

    return FluxiblyChatModel.of(llm, model=model)
