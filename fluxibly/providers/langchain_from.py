"""Between LangChain's messages and ours, for calls that LangChain makes to us (see `langchain_model`)."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Any, cast

import attrs
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, ChatMessage, ToolMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import tool_call_chunk

from fluxibly.types import (
    Chunk,
    Image,
    Message,
    Part,
    Reasoning,
    Response,
    Role,
    Text,
    ToolCall,
    ToolCallDelta,
    Usage,
)

_KEPT = "fluxibly"
"""The key in `additional_kwargs` of what has to go back to the service with an answer; it is plain data."""

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
    """LangChain's messages as a prompt.

    Raises:
        ValueError: a message of a kind, or with content, that a prompt cannot hold.
    """
    return tuple(_message(message) for message in messages)


def _message(message: BaseMessage) -> Message:
    name = message.role if isinstance(message, ChatMessage) else message.type.removesuffix("MessageChunk").lower()
    role = _ROLES.get(name)
    if role is None:
        raise ValueError(f"a LangChain message of the type {name!r} has no counterpart; use one of {sorted(_ROLES)}")
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
    # `content_blocks` brings what each service calls an image into one shape.
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
    raise ValueError(f"a message's content can be text and images (by URL or base64), not a block of the type {kind!r}")


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


# Ours to LangChain's


def ai_message(response: Response) -> AIMessage:
    """A response as LangChain's message."""
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
    """A chunk as LangChain's: what adds up. What is known once, `end_of_stream` has."""
    return AIMessageChunk(
        content=chunk.text,
        tool_call_chunks=[
            tool_call_chunk(name=each.name, args=each.arguments, id=each.id, index=numbers.of(each))
            for each in chunk.tool_calls
        ],
        additional_kwargs=_readable(chunk.reasoning),
    )


def end_of_stream(response: Response) -> AIMessageChunk:
    """The chunk that ends a stream, with what is true of the whole answer."""
    return AIMessageChunk(
        content="",
        additional_kwargs=_kept(response),
        response_metadata=_metadata(response),
        usage_metadata=_usage(response.usage),
        chunk_position="last",
    )


class CallNumbers:
    """Numbers the tool calls of a stream from 0, for LangChain, which joins their fragments by number alone."""

    def __init__(self) -> None:
        self._calls: list[ToolCallDelta] = []

    def of(self, delta: ToolCallDelta) -> int:
        """The number of the call that a fragment goes on, or begins."""
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
