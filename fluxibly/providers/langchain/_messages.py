"""Conversion between fluxibly's and LangChain's messages, responses and chunks, for calls to LangChain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, cast

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from fluxibly.aggregate import merged
from fluxibly.providers.dialects.encoding import sent_arguments
from fluxibly.providers.dialects.openai_parts import finish_reason_of
from fluxibly.providers.langchain._blocks import answer_of, blocks_of, details_of, media_block, parts_of
from fluxibly.types import (
    ContentPart,
    Message,
    Response,
    Text,
    ToolCall,
    Usage,
)

Dialect: TypeAlias = Literal["openai", "anthropic", "other"]
"""The family of a LangChain chat model. It decides how the parameters of a call are passed."""


# From fluxibly to LangChain


def to_langchain(
    messages: tuple[Message, ...], family: Dialect, dialect: str, metadata: Mapping[str, Any] | None = None
) -> list[BaseMessage]:
    """Return a prompt as LangChain's messages for a chat model.

    Args:
        messages: the prompt.
        family: the chat model's family.
        dialect: the name of its integration.
        metadata: what the model's messages say about the form of their content.
    """
    return [_to_langchain(message, family, dialect, metadata or {}) for message in messages]


def _to_langchain(message: Message, family: Dialect, dialect: str, metadata: Mapping[str, Any]) -> BaseMessage:
    if message.role == "assistant":
        return _assistant(message, family, dialect, metadata)
    content: Any = _content(message.content)
    if message.role == "system":
        return SystemMessage(content, name=message.name)
    if message.role == "user":
        return HumanMessage(content, name=message.name)
    status: Literal["error", "success"] = "error" if message.is_error else "success"
    return ToolMessage(content, tool_call_id=message.tool_call_id or "", name=message.name, status=status)


def _assistant(message: Message, family: Dialect, dialect: str, metadata: Mapping[str, Any]) -> AIMessage:
    content, kept = answer_of(message.parts, dialect)
    broken = [call for call in message.tool_calls if call.error and family == "openai"]
    return AIMessage(
        cast("Any", content),
        name=message.name,
        additional_kwargs=kept,
        response_metadata=dict(metadata),
        tool_calls=[
            {"type": "tool_call", "id": call.id, "name": call.name, "args": _arguments(call)}
            for call in message.tool_calls
            if call not in broken
        ],
        invalid_tool_calls=[
            {"type": "invalid_tool_call", "id": call.id, "name": call.name, "args": call.raw_arguments, "error": None}
            for call in broken
        ],
    )


def _arguments(call: ToolCall) -> dict[str, Any]:
    if call.raw is not None and call.raw.get("type") == "custom":
        return {"__arg1": call.raw_arguments}  # LangChain's own form of a custom tool's text
    return sent_arguments(call)


def _content(parts: tuple[ContentPart, ...]) -> str | list[dict[str, Any]]:
    if all(isinstance(part, Text) for part in parts):
        return "".join(part.text for part in parts if isinstance(part, Text))
    return [
        {"type": "text", "text": part.text} if isinstance(part, Text) else media_block(part)
        for part in parts
        if not isinstance(part, Text) or part.text.strip()  # services reject empty texts
    ]


# From LangChain to fluxibly


def response_of(message: BaseMessage, dialect: str) -> Response:
    """Return a chat model's whole answer as a response. `dialect` names the model's integration."""
    fields = fields_of(message)
    details = metadata_of(message)
    if not isinstance(message, AIMessage):
        return Response(str(message.text), details=details, raw=message, **fields)
    for block in blocks_of(message):
        details = merged(details, details_of(block))
    return Response.from_parts(parts_of(message, dialect), details=details, raw=message, **fields)


def fields_of(message: BaseMessage, *, called: bool = False) -> dict[str, Any]:
    """Return the fields of a response or a chunk that a message's metadata says.

    `called` says that the answer has called a tool, if the message does not say so itself.
    """
    metadata = message.response_metadata
    raw = _raw_finish(metadata)
    headers = metadata.get("headers")
    request_id, limits = _rate_limits(cast("dict[str, str]", headers)) if isinstance(headers, dict) else (None, {})
    return {
        "finish_reason": None if raw is None else _finish(raw, message, called=called),
        "raw_finish_reason": raw,
        "usage": _usage(message),
        "model": metadata.get("model_name") or metadata.get("model"),
        "id": _id(message),
        "request_id": request_id,
        "rate_limits": limits,
    }


_DETAILS = (
    "logprobs",
    "citation_metadata",
    "grounding_metadata",
    "safety_ratings",
    "url_context_metadata",
    "container",
    "context_management",
    "stop_details",
    "stop_sequence",
)


def metadata_of(message: BaseMessage) -> dict[str, Any]:
    """Return the details of an answer that stand in a message's metadata."""
    metadata = message.response_metadata
    return {name: value for name in _DETAILS if (value := metadata.get(name)) is not None}


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


def _finish(raw: str, message: BaseMessage, *, called: bool) -> str:
    if raw == "completed":  # OpenAI's Responses API does not distinguish tool calls
        return "tool_call" if called or (isinstance(message, AIMessage) and message.tool_calls) else "stop"
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


def _rate_limits(headers: dict[str, str]) -> tuple[str | None, dict[str, str]]:
    """Return the request id and the rate limits from the headers of an answer."""
    named = {name.lower(): value for name, value in headers.items()}
    limits = {name: value for name, value in named.items() if "ratelimit" in name}
    return named.get("x-request-id") or named.get("request-id"), limits
