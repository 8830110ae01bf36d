"""fluxibly from inside of LangChain: an `LLM`, or a pipeline, as one of LangChain's chat models."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.base import LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from fluxibly.providers.langchain_from import CallNumbers, ai_message, end_of_stream, from_langchain, piece_of_stream
from fluxibly.types import Chunk, Request, Response

if TYPE_CHECKING:
    from typing import Self


class FluxiblyChatModel(BaseChatModel):
    """A LangChain chat model whose calls go through a stack of middleware. Make one with `as_chat_model`.

    It takes the keywords that a call of an `LLM` takes (`temperature`, `max_tokens`, `extra`, …), at `invoke` and
    with `bind`, and tools with `bind_tools`. fluxibly's errors reach LangChain as they are.
    """

    llm: Any
    """The `LLM`, `AsyncLLM`, `Pipeline` or `AsyncPipeline`."""
    model: str | None = None
    """What to ask a pipeline for; an LLM has its own."""

    @classmethod
    def of(cls, llm: object, *, model: str | None) -> Self:
        """Wrap `llm`, after looking whether it can be.

        Raises:
            TypeError: it is none of the four, or a pipeline without `model`.
        """
        if not callable(getattr(llm, "complete", None)) or not callable(getattr(llm, "stream", None)):
            raise TypeError(f"as_chat_model() takes an LLM, AsyncLLM, Pipeline or AsyncPipeline, not a {_kind(llm)}")
        if not hasattr(llm, "forward") and model is None:
            raise TypeError(f"as_chat_model() needs model= with a {_kind(llm)}, since a Request has to name one")
        return cls(llm=llm, model=model or llm.config.model)  # type: ignore[attr-defined]  # an LLM has it

    @property
    def _llm_type(self) -> str:
        return "fluxibly"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        return {"model": self.model}

    @property
    def _is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.llm.complete)

    def _call(self, messages: list[BaseMessage], stop: list[str] | None, keywords: dict[str, Any]) -> _Call:
        keywords = _overrides(keywords)
        if stop is not None:
            keywords["stop"] = stop
        prompt = from_langchain(messages)
        if hasattr(self.llm, "forward"):
            return _Call((prompt,), keywords)
        return _Call((Request(model=self.model or "", messages=prompt, **keywords),), {})

    def _needs_sync(self) -> None:
        if self._is_async:
            raise TypeError(
                f"this chat model runs on a {_kind(self.llm)}, which is asynchronous: use ainvoke, astream and their "
                "like, or make it of an LLM"
            )

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        self._needs_sync()
        call = self._call(messages, stop, kwargs)
        return _result(self.llm.complete(*call.arguments, **call.keywords))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        if not self._is_async:
            return await super()._agenerate(messages, stop, run_manager, **kwargs)  # in a thread
        call = self._call(messages, stop, kwargs)
        return _result(await self.llm.complete(*call.arguments, **call.keywords))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        self._needs_sync()
        call = self._call(messages, stop, kwargs)
        numbers = CallNumbers()
        with self.llm.stream(*call.arguments, **call.keywords) as stream:
            for chunk in stream:
                piece = _piece(chunk, numbers)
                if run_manager:
                    run_manager.on_llm_new_token(chunk.text, chunk=piece)
                yield piece
            yield ChatGenerationChunk(message=end_of_stream(stream.response))

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        if not self._is_async:
            async for each in super()._astream(messages, stop, run_manager, **kwargs):  # in a thread
                yield each
            return
        call = self._call(messages, stop, kwargs)
        numbers = CallNumbers()
        async with self.llm.stream(*call.arguments, **call.keywords) as stream:
            async for chunk in stream:
                piece = _piece(chunk, numbers)
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, chunk=piece)
                yield piece
            yield ChatGenerationChunk(message=end_of_stream(stream.response))

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: dict[str, Any] | str | bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """The same model with tools: functions, pydantic models, LangChain tools or tables.

        Args:
            tools: what the model may call.
            tool_choice: "auto", "none", "any" (or "required", or True: some tool has to be called), a tool's name, or
                OpenAI's table that names one.
            **kwargs: bound too.
        """
        described = [convert_to_openai_tool(tool) for tool in tools]
        choice = {} if tool_choice in (None, False, "") else {"tool_choice": tool_choice}
        return self.bind(tools=described, **choice, **kwargs)


class _Call:
    """The arguments of a call."""

    def __init__(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.arguments = arguments
        self.keywords = keywords


def _kind(value: object) -> str:
    return type(value).__name__


def _overrides(keywords: dict[str, Any]) -> dict[str, Any]:
    """LangChain's keywords as ours."""
    ours = dict(keywords)
    choice = ours.get("tool_choice")
    if choice is True or choice == "any":
        ours["tool_choice"] = "required"
    elif isinstance(choice, Mapping):
        table = cast("Mapping[str, Any]", choice)
        ours["tool_choice"] = table.get("function", table)["name"]
    wanted = ours.get("response_format")
    if isinstance(wanted, Mapping):
        ours["response_format"] = _response_format(cast("Mapping[str, Any]", wanted))
    if "parallel_tool_calls" in ours:  # a parameter of OpenAI's dialect
        ours["extra"] = {"parallel_tool_calls": ours.pop("parallel_tool_calls"), **(ours.get("extra") or {})}
    return ours


def _response_format(wanted: Mapping[str, Any]) -> str | Mapping[str, Any]:
    """OpenAI's table for a format as ours; any other mapping is a JSON Schema."""
    kind = wanted.get("type")
    if kind == "json_schema" and isinstance(wanted.get("json_schema"), Mapping):
        schema: Mapping[str, Any] = wanted["json_schema"].get("schema") or {}
        return schema
    return {"json_object": "json", "text": "text"}.get(str(kind), wanted)


def _result(response: Response) -> ChatResult:
    return ChatResult(
        generations=[ChatGeneration(message=ai_message(each)) for each in (response, *response.alternatives)]
    )


def _piece(chunk: Chunk, numbers: CallNumbers) -> ChatGenerationChunk:
    message: AIMessageChunk = piece_of_stream(chunk, numbers)
    return ChatGenerationChunk(message=message)
