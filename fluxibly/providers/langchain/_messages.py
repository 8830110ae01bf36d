"""Conversion between fluxibly's and LangChain's messages, responses and chunks, for calls to LangChain."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias, cast

from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from fluxibly.providers.dialects.decoding import to_json
from fluxibly.providers.dialects.encoding import sent_arguments
from fluxibly.providers.dialects.json_values import as_array, as_object, as_text
from fluxibly.providers.dialects.openai_parts import finish_reason_of
from fluxibly.types import (
    Chunk,
    Image,
    Message,
    Part,
    Reasoning,
    Response,
    Text,
    ToolCall,
    ToolCallDelta,
    Usage,
)

Dialect: TypeAlias = Literal["openai", "anthropic", "other"]
"""The family of a LangChain chat model. It decides how the parameters of a call are passed."""


# From fluxibly to LangChain


def to_langchain(messages: tuple[Message, ...], dialect: Dialect) -> list[BaseMessage]:
    """Return a prompt as LangChain's messages for a chat model."""
    return [_to_langchain(message, dialect) for message in messages]


def _to_langchain(message: Message, dialect: Dialect) -> BaseMessage:
    content: Any = _content(message.content)
    if message.role == "system":
        return SystemMessage(content, name=message.name)
    if message.role == "user":
        return HumanMessage(content, name=message.name)
    if message.role == "tool":
        return ToolMessage(content, tool_call_id=message.tool_call_id or "", name=message.name)
    blocks = [dict(part.raw) for part in message.reasoning if part.raw]
    if blocks:
        blocks += [{"type": "text", "text": message.text}] if message.text else []
        blocks += [_tool_use(call) for call in message.tool_calls] if dialect == "anthropic" else []
    broken = [call for call in message.tool_calls if call.error and dialect == "openai"]
    return AIMessage(
        cast("Any", blocks) or content,
        name=message.name,
        tool_calls=[
            {"type": "tool_call", "id": call.id, "name": call.name, "args": sent_arguments(call)}
            for call in message.tool_calls
            if call not in broken
        ],
        invalid_tool_calls=[
            {"type": "invalid_tool_call", "id": call.id, "name": call.name, "args": call.raw_arguments, "error": None}
            for call in broken
        ],
    )


def _tool_use(call: ToolCall) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": sent_arguments(call)}


def _content(parts: tuple[Part, ...]) -> str | list[dict[str, Any]]:
    if all(isinstance(part, Text) for part in parts):
        return "".join(part.text for part in parts if isinstance(part, Text))
    return [{"type": "text", "text": part.text} if isinstance(part, Text) else _image(part) for part in parts]


def _image(image: Image) -> dict[str, Any]:
    """Return an image in OpenAI's format, which LangChain's other integrations read too."""
    url = image.url
    if image.data is not None:
        url = f"data:{image.media_type};base64,{base64.b64encode(image.data).decode('ascii')}"
    detail = {"detail": image.detail} if image.detail else {}
    return {"type": "image_url", "image_url": {"url": url, **detail}}


# From LangChain to fluxibly


def response_of(message: BaseMessage) -> Response:
    """Return a chat model's whole answer as a response."""
    reader = MessageReader()
    chunk = reader.read(message)
    return Response(
        chunk.text or _refusal(message),
        tool_calls=_tool_calls(message),
        reasoning=chunk.reasoning,
        reasoning_parts=reader.reasoning_parts(),
        finish_reason=chunk.finish_reason,
        raw_finish_reason=chunk.raw_finish_reason,
        usage=chunk.usage,
        model=chunk.model,
        id=chunk.id,
        request_id=chunk.request_id,
        rate_limits=chunk.rate_limits or {},
        raw=message,
    )


def _tool_calls(message: BaseMessage) -> list[ToolCall]:
    if not isinstance(message, AIMessage):
        return []
    calls = [
        ToolCall(call.get("id") or f"call_{number}", call["name"], call["args"], to_json(call["args"]))
        for number, call in enumerate(message.tool_calls)
    ]
    for number, broken in enumerate(message.invalid_tool_calls, len(calls)):
        arguments = broken.get("args") or ""
        calls.append(ToolCall(broken.get("id") or f"call_{number}", broken.get("name") or "", raw_arguments=arguments))
    return calls


def _refusal(message: BaseMessage) -> str:
    refusal = message.additional_kwargs.get("refusal")
    return refusal if isinstance(refusal, str) else ""


class MessageReader:
    """A reader for the messages of an answer: a single message for a whole answer, or the chunks of a stream."""

    def __init__(self) -> None:
        self._blocks: dict[object, dict[str, Any]] = {}
        self.finished = False
        """Whether a finish reason has arrived."""

    def read(self, message: BaseMessage) -> Chunk:
        """Return a message as a chunk. `reasoning_parts` returns the reasoning that must go back to the service."""
        metadata = message.response_metadata
        raw_finish = _raw_finish(metadata)
        self.finished = self.finished or raw_finish is not None
        headers = metadata.get("headers")
        limits = _rate_limits(cast("dict[str, str]", headers)) if isinstance(headers, dict) else (None, None)
        deltas = _deltas(message) if isinstance(message, AIMessageChunk) else ()
        return Chunk(
            str(message.text),
            reasoning="".join(self._reasoning(message)),
            tool_calls=deltas,
            finish_reason=None if raw_finish is None else _finish(raw_finish, message),
            raw_finish_reason=raw_finish,
            usage=_usage(message),
            model=metadata.get("model_name") or metadata.get("model"),
            id=_id(message),
            request_id=limits[0],
            rate_limits=limits[1],
        )

    def reasoning_parts(self) -> tuple[Reasoning, ...]:
        """Return the reasoning that must go back to the service. It is complete after the last message."""
        return tuple(_reasoning_part(block) for block in self._blocks.values())

    def _reasoning(self, message: BaseMessage) -> Iterator[str]:
        said = message.additional_kwargs.get("reasoning_content")
        if isinstance(said, str):
            yield said
        if isinstance(message.content, str):
            return
        for number, block in enumerate(message.content):
            if isinstance(block, dict) and block.get("type") in ("thinking", "redacted_thinking", "reasoning"):
                self._keep(block, number)
                yield _reasoning_text(block)

    def _keep(self, block: Mapping[str, Any], number: int) -> None:
        kept = self._blocks.setdefault(block.get("index", number), {})
        for name, value in block.items():
            if name == "index":
                continue
            if isinstance(value, str) and name in ("thinking", "reasoning", "signature"):
                kept[name] = kept.get(name, "") + value
            elif value is not None:
                kept[name] = value


def _reasoning_text(block: Mapping[str, Any]) -> str:
    text = block.get("thinking") or block.get("reasoning")
    if isinstance(text, str):
        return text
    summary = block.get("summary")
    return "".join(as_text(as_object(part).get("text")) for part in as_array(summary))


def _reasoning_part(block: dict[str, Any]) -> Reasoning:
    return Reasoning(text=_reasoning_text(block), signature=block.get("signature"), raw=block)


def _deltas(message: AIMessageChunk) -> tuple[ToolCallDelta, ...]:
    return tuple(
        ToolCallDelta(
            index=call["index"] if isinstance(call.get("index"), int) else None,
            id=call.get("id"),
            name=call.get("name"),
            arguments=call.get("args") or "",
        )
        for call in message.tool_call_chunks
    )


def _raw_finish(metadata: Mapping[str, Any]) -> str | None:
    """Return the service's own finish reason. Each of LangChain's integrations stores it under its own key."""
    details = metadata.get("incomplete_details")
    if isinstance(details, dict) and cast("dict[str, Any]", details).get("reason"):
        return str(cast("dict[str, Any]", details)["reason"])
    for name in ("finish_reason", "stop_reason", "done_reason", "status"):
        value = metadata.get(name)
        if isinstance(value, str) and value:
            return value
    return None


def _finish(raw: str, message: BaseMessage) -> str:
    if raw == "completed":  # OpenAI's Responses API does not distinguish tool calls
        return "tool_call" if isinstance(message, AIMessage) and message.tool_calls else "stop"
    return "length" if raw == "max_output_tokens" else finish_reason_of(raw)


def _usage(message: BaseMessage) -> Usage | None:
    usage = message.usage_metadata if isinstance(message, AIMessage) else None
    if not usage:
        return None
    read = cast("dict[str, int]", usage.get("input_token_details") or {})
    written = cast("dict[str, int]", usage.get("output_token_details") or {})
    to_cache = [read[name] for name in _CACHE_WRITES if read.get(name)]
    return Usage(
        input_tokens=usage["input_tokens"],
        output_tokens=usage["output_tokens"],
        cached_tokens=read.get("cache_read"),
        cache_write_tokens=sum(to_cache) if to_cache else read.get("cache_creation"),
        reasoning_tokens=written.get("reasoning"),
    )


_CACHE_WRITES = ("cache_creation", "ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens")


def _id(message: BaseMessage) -> str | None:
    """Return the service's id of an answer. Ids that LangChain makes up ("lc_run-…", "run-…") are ignored."""
    given = message.response_metadata.get("id") or message.id
    return given if isinstance(given, str) and not given.startswith(("lc_", "run-")) else None


def _rate_limits(headers: dict[str, str]) -> tuple[str | None, dict[str, str] | None]:
    """Return the request id and the rate limits from the headers of an answer."""
    named = {name.lower(): value for name, value in headers.items()}
    limits = {name: value for name, value in named.items() if "ratelimit" in name}
    return named.get("x-request-id") or named.get("request-id"), limits or None
