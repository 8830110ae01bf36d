"""A LangChain chat model that calls an `LLM` or a pipeline, and the conversion of its messages."""

from __future__ import annotations

import base64
import inspect
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal, cast

import attrs
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.base import LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, ChatMessage, ToolMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from pydantic import BaseModel

from fluxibly._checks import kind_of, problem
from fluxibly.providers.dialects.encoding import media_data
from fluxibly.providers.langchain._blocks import parts_of
from fluxibly.types import (
    Audio,
    Chunk,
    ContentPart,
    Document,
    Image,
    Media,
    Message,
    Part,
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
"""The key in `additional_kwargs` for the parts of an answer, as JSON values, if the message cannot hold them itself."""

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
        return attrs.evolve(_answer(message), name=message.name)
    if isinstance(message, ToolMessage):
        failed = message.status == "error"
        return Message(role, _parts(message), name=message.name, tool_call_id=message.tool_call_id, is_error=failed)
    return Message(role, _parts(message), name=message.name)


def _parts(message: BaseMessage) -> tuple[ContentPart, ...]:
    if isinstance(message.content, str):
        return (Text(message.content),) if message.content else ()
    # `content_blocks` has a single format for the media of all services.
    return tuple(_part(cast("Mapping[str, Any]", block)) for block in message.content_blocks)


def _part(block: Mapping[str, Any]) -> ContentPart:
    kind = block.get("type")
    if kind == "text":
        return Text(block["text"])
    if kind in _MEDIA and (block.get("url") or block.get("base64")):
        fields = _media_fields(block)
        if kind == "audio":
            return Audio(**fields)
        extras: Mapping[str, Any] = block.get("extras") or {}
        if kind == "file":
            return Document(**fields, name=block.get("filename") or extras.get("filename"))
        return Image(**fields, detail=block.get("detail") or extras.get("detail"))
    raise ValueError(
        f"a message's content: expected text, images, audio or files (by URL or base64), got a block of type {kind!r}"
    )


_MEDIA: Mapping[str, str] = {"image": "image/png", "audio": "audio/wav", "file": "application/pdf"}
"""LangChain's blocks for media, each with the media type that is meant if the block names none."""


def _media_fields(block: Mapping[str, Any]) -> dict[str, Any]:
    media_type = block.get("mime_type")
    if block.get("url"):
        return {"url": block["url"], "media_type": media_type}
    return {"data": base64.b64decode(block["base64"]), "media_type": media_type or _MEDIA[block["type"]]}


def _answer(message: AIMessage) -> Message:
    """Return a model's message. What it holds beside its parts as this module keeps them may have been changed."""
    kept: list[Mapping[str, Any]] | None = message.additional_kwargs.get(_KEPT)
    if type(kept) is not list:
        service = message.response_metadata.get("model_provider")
        dialect = f"langchain-{service}".replace("_", "-") if isinstance(service, str) else "langchain"
        return Message.assistant(parts_of(message, dialect))
    answer = Message.from_dict({"role": "assistant", "content": _filled(kept, message)})
    content = answer.content
    if answer.text != str(message.text):
        content = (Text(str(message.text)), *[part for part in content if isinstance(part, Media)])
    calls = {call.id: call for call in answer.tool_calls}
    return attrs.evolve(
        answer, content=content, tool_calls=[_unchanged(call, calls.get(call.id)) for call in _tool_calls(message)]
    )


def _filled(kept: Iterable[Mapping[str, Any]], message: AIMessage) -> list[Mapping[str, Any]]:
    """Return the kept parts with the bytes of their media, which are in the message's content."""
    content: Iterable[object] = [] if isinstance(message.content, str) else message.content
    held = [cast("dict[str, Any]", block) for block in content if isinstance(block, dict)]
    parts: list[Mapping[str, Any]] = []
    for part in kept:
        kind = {"document": "file"}.get(part["type"], part["type"])
        if kind not in _MEDIA or "url" in part:
            parts.append(part)
            continue
        block = next((block for block in held if block.get("type") == kind and block.get("base64")), None)
        if block is not None:
            held.remove(block)
            parts.append({**part, "data": block["base64"], "media_type": block.get("mime_type")})
    return parts


def _tool_calls(message: AIMessage) -> list[ToolCall]:
    calls = [ToolCall(call["id"] or "", call["name"], call["args"]) for call in message.tool_calls]
    broken = [
        ToolCall(call["id"] or "", call["name"] or "", raw_arguments=call["args"] or "")
        for call in message.invalid_tool_calls
    ]
    return calls + broken


def _unchanged(call: ToolCall, kept: ToolCall | None) -> ToolCall:
    """Return the kept call if the message still has the same call."""
    if kept is None:
        return call
    if (call.name, call.arguments, call.error) == (kept.name, kept.arguments, kept.error):
        return kept
    return attrs.evolve(call, signature=kept.signature, raw=kept.raw)


# From fluxibly to LangChain


def ai_message(response: Response) -> AIMessage:
    """Return a response as a LangChain message."""
    return AIMessage(
        _content(response.parts) if response.media else response.text,
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
    media = [_media_block(part) for part in chunk.parts if isinstance(part, Media)]
    content: Any = [*media, chunk.text] if media and chunk.text else media or chunk.text
    return AIMessageChunk(
        content=content,
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
    """Return the parts of an answer, unless the message itself has all of them."""
    message = response.message
    if message.order is None and not message.reasoning and all(map(_plain, message.parts)):
        return {}
    return {_KEPT: [_without_data(part) for part in message.to_dict()["content"]]}


def _without_data(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return a part without the bytes of its media, which are in the message's content."""
    inline = {name for name in ("data", "url") if name == "data" or str(part.get(name)).startswith("data:")}
    return {name: value for name, value in part.items() if name not in inline}


def _plain(part: Part) -> bool:
    """Whether LangChain's message has all of a part."""
    if isinstance(part, ToolCall):
        return part.signature is None and part.raw is None
    return isinstance(part, Text) and part.raw is None


def _content(parts: Iterable[Part]) -> Any:
    """Return texts and media as LangChain's content, as its merged chunks have it."""
    content: list[str | dict[str, Any]] = []
    for part in parts:
        if isinstance(part, Media):
            content.append(_media_block(part))
        elif isinstance(part, Text) and part.text:
            if content and isinstance(content[-1], str):
                content[-1] += part.text
            else:
                content.append(part.text)
    return content


def _media_block(media: Media) -> dict[str, Any]:
    """Return an image, audio or a file that a model made as LangChain's block."""
    found = media_data(media)
    kind = "image" if isinstance(media, Image) else "audio" if isinstance(media, Audio) else "file"
    if found is None:
        return {"type": kind, "url": media.url}
    return {"type": kind, "base64": found[1], "mime_type": found[0]}


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

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        method: Literal["function_calling", "json_mode", "json_schema"] = "function_calling",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        """Return a runnable whose answers have the form of a schema: a pydantic class, a TypedDict, or a JSON Schema.

        Args:
            method: "json_schema" sends the schema as the answer's `response_format`, in the form that each service takes;
                "json_mode" asks for some JSON; "function_calling" asks for a call of a tool that is named after the schema.
            include_raw: whether to return a dict with "raw", "parsed" and "parsing_error" instead.
            strict: whether the service has to hold to the schema; None leaves that to the dialect. Only for "json_schema".
            **kwargs: further keywords to bind.

        Raises:
            ValueError: there is no such method, or `strict` is given for another one.
        """
        if method not in ("function_calling", "json_mode", "json_schema"):
            raise ValueError(problem("method", "'json_schema', 'json_mode' or 'function_calling'", method))
        if strict is not None and method != "json_schema":
            raise ValueError(f"strict: expected it with method='json_schema', got method={method!r}")
        if method == "function_calling":
            return super().with_structured_output(schema, include_raw=include_raw, **kwargs)
        wanted: object = "json" if method == "json_mode" else _schema_format(schema, strict)
        said = {"kwargs": {"method": method}, "schema": schema}  # for the traces of LangChain's own tools
        model = self.bind(response_format=wanted, ls_structured_output_format=said, **kwargs)
        parser: Runnable[Any, Any] = JsonOutputParser()
        if isinstance(schema, type) and issubclass(schema, BaseModel):
            parser = PydanticOutputParser[BaseModel](pydantic_object=schema)
        if not include_raw:
            return model | parser
        parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
        nothing = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=model) | parsed.with_fallbacks([nothing], exception_key="parsing_error")


def _schema_format(schema: dict[str, Any] | type, strict: bool | None) -> Mapping[str, Any]:
    """Return a schema as a `response_format`."""
    found = convert_to_json_schema(schema)
    if strict is None:
        return found
    return {"type": "json_schema", "json_schema": {"name": found["title"], "schema": found, "strict": strict}}


class _Call:
    """The arguments of a call."""

    def __init__(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.arguments = arguments
        self.keywords = keywords


def _overrides(keywords: dict[str, Any]) -> dict[str, Any]:
    """Return LangChain's keywords as fluxibly's."""
    ours = {name: value for name, value in keywords.items() if name != "ls_structured_output_format"}
    choice = ours.get("tool_choice")
    if choice is True or choice == "any":
        ours["tool_choice"] = "required"
    elif isinstance(choice, Mapping):
        table = cast("Mapping[str, Any]", choice)
        ours["tool_choice"] = table.get("function", table)["name"]
    if "parallel_tool_calls" in ours:  # only OpenAI's dialect has this parameter
        ours["extra"] = {"parallel_tool_calls": ours.pop("parallel_tool_calls"), **(ours.get("extra") or {})}
    return ours


def _result(response: Response) -> ChatResult:
    return ChatResult(
        generations=[ChatGeneration(message=ai_message(each)) for each in (response, *response.alternatives)]
    )


def _piece(chunk: Chunk, numbers: CallNumbers) -> ChatGenerationChunk:
    message: AIMessageChunk = piece_of_stream(chunk, numbers)
    return ChatGenerationChunk(message=message)
