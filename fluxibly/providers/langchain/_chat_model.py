"""A LangChain chat model that calls an `LLM` or a pipeline, and the conversion of its messages."""

from __future__ import annotations

import base64
import inspect
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import attrs
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.base import LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, ChatMessage, ToolMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from fluxibly._checks import kind_of
from fluxibly.types import (
    Chunk,
    Image,
    Message,
    Part,
    Reasoning,
    Request,
    Response,
    Role,
    Text,
    ToolCall,
    ToolCallDelta,
    Usage,
)

if TYPE_CHECKING:
    from typing import Self


_KEPT = "fluxibly"
"""The key in `additional_kwargs` for plain data that must go back to the service together with an answer."""

_ROLES: Mapping[str, Role] = {
    "ai": "assistant",
    "assistant": "assistant",
    "developer": "system",
    "human": "user",
    "system": "system",
    "tool": "tool",
    "user": "user",
}


def from_langchain(messages: Iterable[BaseMessage]) -> tuple[Message, ...]:
    """Return LangChain's messages as a prompt.

    Raises:
        ValueError: a prompt cannot hold a message of that type, or its content.
    """
    return tuple(_message(message) for message in messages)


def _message(message: BaseMessage) -> Message:
    name = message.role if isinstance(message, ChatMessage) else message.type.removesuffix("MessageChunk").lower()
    role = _ROLES.get(name)
    if role is None:
        raise ValueError(f"the type of a LangChain message: expected one of {sorted(_ROLES)}, got {name!r}")
    if isinstance(message, AIMessage):
        return Message(
            role,
            str(message.text),
            name=message.name,
            tool_calls=_tool_calls(message),
            reasoning=_kept_reasoning(message),
        )
    if isinstance(message, ToolMessage):
        return Message(role, _parts(message), name=message.name, tool_call_id=message.tool_call_id)
    return Message(role, _parts(message), name=message.name)


def _parts(message: BaseMessage) -> tuple[Part, ...]:
    if isinstance(message.content, str):
        return (Text(message.content),) if message.content else ()
    # `content_blocks` has a single format for the images of all services.
    return tuple(_part(cast("Mapping[str, Any]", block)) for block in message.content_blocks)


def _part(block: Mapping[str, Any]) -> Part:
    kind = block.get("type")
    if kind == "text":
        return Text(block["text"])
    if kind == "image" and block.get("url"):
        return Image(url=block["url"], detail=_detail(block))
    if kind == "image" and block.get("base64"):
        data = base64.b64decode(block["base64"])
        return Image(data=data, media_type=block.get("mime_type") or "image/png", detail=_detail(block))
    raise ValueError(f"a message's content: expected text or images (by URL or base64), got a block of type {kind!r}")


def _detail(block: Mapping[str, Any]) -> str | None:
    extras = block.get("extras")
    return cast("Mapping[str, Any]", extras).get("detail") if isinstance(extras, Mapping) else block.get("detail")


def _tool_calls(message: AIMessage) -> list[ToolCall]:
    signatures: Mapping[str, str] = message.additional_kwargs.get(_KEPT, {}).get("signatures", {})
    calls = [
        ToolCall(call["id"] or "", call["name"], call["args"], signature=signatures.get(call["id"] or ""))
        for call in message.tool_calls
    ]
    broken = [
        ToolCall(call["id"] or "", call["name"] or "", raw_arguments=call["args"] or "")
        for call in message.invalid_tool_calls
    ]
    return calls + broken


def _kept_reasoning(message: AIMessage) -> list[Reasoning]:
    parts: list[dict[str, Any]] = message.additional_kwargs.get(_KEPT, {}).get("reasoning", [])
    return [Reasoning(**part) for part in parts]


# From fluxibly to LangChain


def ai_message(response: Response) -> AIMessage:
    """Return a response as a LangChain message."""
    return AIMessage(
        response.text,
        tool_calls=[
            {"type": "tool_call", "id": call.id, "name": call.name, "args": dict(call.arguments)}
            for call in response.tool_calls
            if call.error is None
        ],
        invalid_tool_calls=[
            {
                "type": "invalid_tool_call",
                "id": call.id,
                "name": call.name,
                "args": call.raw_arguments,
                "error": call.error,
            }
            for call in response.tool_calls
            if call.error is not None
        ],
        additional_kwargs=_readable(response.reasoning) | _kept(response),
        response_metadata=_metadata(response),
        usage_metadata=_usage(response.usage),
    )


def piece_of_stream(chunk: Chunk, numbers: CallNumbers) -> AIMessageChunk:
    """Return the fields of a chunk that add up as a LangChain chunk. `end_of_stream` returns the other fields."""
    return AIMessageChunk(
        content=chunk.text,
        tool_call_chunks=[
            tool_call_chunk(name=each.name, args=each.arguments, id=each.id, index=numbers.of(each))
            for each in chunk.tool_calls
        ],
        additional_kwargs=_readable(chunk.reasoning),
    )


def end_of_stream(response: Response) -> AIMessageChunk:
    """Return the chunk that ends a stream, with the metadata of the whole answer."""
    return AIMessageChunk(
        content="",
        additional_kwargs=_kept(response),
        response_metadata=_metadata(response),
        usage_metadata=_usage(response.usage),
        chunk_position="last",
    )


class CallNumbers:
    """The numbers of a stream's tool calls, from 0. LangChain joins the fragments of a call by number alone."""

    def __init__(self) -> None:
        self._calls: list[ToolCallDelta] = []

    def of(self, delta: ToolCallDelta) -> int:
        """Return the number of the call that a fragment begins or continues."""
        begins = bool(delta.name and delta.id)
        for number in range(len(self._calls) - 1, -1, -1):
            call = self._calls[number]
            if delta.index is not None:
                if call.index == delta.index and not (begins and call.id and call.id != delta.id):
                    return number
            elif (delta.id and call.id == delta.id) or (not delta.id and not delta.name):
                return number
        self._calls.append(delta)
        return len(self._calls) - 1


def _readable(reasoning: str) -> dict[str, Any]:
    return {"reasoning_content": reasoning} if reasoning else {}


def _kept(response: Response) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    if response.reasoning_parts:
        kept["reasoning"] = [attrs.asdict(part) for part in response.reasoning_parts]
    signatures = {call.id: call.signature for call in response.tool_calls if call.signature}
    if signatures:
        kept["signatures"] = signatures
    return {_KEPT: kept} if kept else {}


def _metadata(response: Response) -> dict[str, Any]:
    said = {
        "finish_reason": response.finish_reason,
        "model_name": response.model,
        "id": response.id,
        "request_id": response.request_id,
    }
    return {name: value for name, value in said.items() if value is not None}


def _usage(usage: Usage | None) -> UsageMetadata | None:
    if usage is None or usage.total_tokens is None:
        return None
    read = {"cache_read": usage.cached_tokens, "cache_creation": usage.cache_write_tokens}
    return cast(
        "UsageMetadata",
        {
            "input_tokens": usage.input_tokens or 0,
            "output_tokens": usage.output_tokens or 0,
            "total_tokens": usage.total_tokens,
            "input_token_details": {name: count for name, count in read.items() if count is not None},
            "output_token_details": ({} if usage.reasoning_tokens is None else {"reasoning": usage.reasoning_tokens}),
        },
    )


class FluxiblyChatModel(BaseChatModel):
    """A LangChain chat model whose calls go through a stack of middleware. Create it with `as_chat_model`.

    `invoke` and `bind` accept the keywords of a call to an `LLM` (`temperature`, `max_tokens`, `extra`, …), and
    `bind_tools` accepts tools. fluxibly's errors reach LangChain unchanged.
    """

    llm: Any
    """The `LLM`, `AsyncLLM`, `Pipeline` or `AsyncPipeline`."""
    model: str | None = None
    """The model to request from a pipeline. An LLM has its own."""

    @classmethod
    def of(cls, llm: object, *, model: str | None) -> Self:
        """Wrap `llm` after checking its type.

        Raises:
            TypeError: `llm` is not an LLM, AsyncLLM, Pipeline or AsyncPipeline, or is a pipeline without `model`.
        """
        if not callable(getattr(llm, "complete", None)) or not callable(getattr(llm, "stream", None)):
            raise TypeError(
                f"as_chat_model(): expected an LLM, AsyncLLM, Pipeline or AsyncPipeline, got {kind_of(llm)}"
            )
        if not hasattr(llm, "forward") and model is None:
            raise TypeError(f"as_chat_model() needs model= for {kind_of(llm)}, because a Request must name a model")
        return cls(llm=llm, model=model or llm.config.model)  # type: ignore[attr-defined]  # an LLM has a config

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
                f"this chat model runs on {kind_of(self.llm)}, which is asynchronous: use ainvoke, astream and the "
                "other asynchronous methods, or create the chat model from an LLM"
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
        """Return the same model with tools: functions, pydantic models, LangChain tools or dicts.

        Args:
            tools: the tools that the model may call.
            tool_choice: "auto", "none", "any" (or "required", or True: the model must call a tool), a tool's name, or
                OpenAI's dict that names a tool.
            **kwargs: further keywords to bind.
        """
        described = [convert_to_openai_tool(tool) for tool in tools]
        choice = {} if tool_choice in (None, False, "") else {"tool_choice": tool_choice}
        return self.bind(tools=described, **choice, **kwargs)


class _Call:
    """The arguments of a call."""

    def __init__(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.arguments = arguments
        self.keywords = keywords


def _overrides(keywords: dict[str, Any]) -> dict[str, Any]:
    """Return LangChain's keywords as fluxibly's."""
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
    if "parallel_tool_calls" in ours:  # only OpenAI's dialect has this parameter
        ours["extra"] = {"parallel_tool_calls": ours.pop("parallel_tool_calls"), **(ours.get("extra") or {})}
    return ours


def _response_format(wanted: Mapping[str, Any]) -> str | Mapping[str, Any]:
    """Convert OpenAI's dict for a response format. Any other mapping is a JSON Schema."""
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
