"""Requests of OpenAI's chat completions API, and of services whose dialect is nearly the same."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Final, Literal, cast

import attrs

from fluxibly.providers.dialects.encoding import bad_request, reject_unsupported
from fluxibly.types import Image, Message, Request, Tool

_REASONING_MODEL: Final = re.compile(r"(?:.*/)?(?:o\d|gpt-5)")
"""OpenAI's reasoning models. They reject `max_tokens`."""

_SHORT_CALL_ID: Final = re.compile(r"[a-zA-Z0-9]{9}")


@attrs.frozen(kw_only=True)
class Quirks:
    """Differences of a service's chat dialect from OpenAI's."""

    path: str = "/chat/completions"
    """The path of requests. `{model}` in the path stands for the model's name."""
    max_tokens: Literal["max_tokens", "max_completion_tokens", "by model"] = "max_tokens"
    """The name of the parameter. "by model" uses the newer name only for OpenAI's reasoning models."""
    seed: str = "seed"
    """The name of the parameter."""
    stream_usage: bool = True
    """Whether the service accepts `stream_options.include_usage`."""
    top_k: bool = False
    """Whether the service accepts `top_k`."""
    lacks: tuple[str, ...] = ()
    """Other unsupported parameters, which the service would silently ignore or reject."""
    formats: tuple[str, ...] = ("text", "json", "schema")
    """The supported kinds of `response_format`."""
    short_call_ids: bool = False
    """Whether the id of a tool call must be nine letters and digits, as the service's own ids are."""
    returns_reasoning: bool = False
    """Whether the `reasoning_content` of a turn with tool calls must be sent back with the turn."""


def chat_body(request: Request, quirks: Quirks, *, stream: bool, service: str) -> dict[str, Any]:
    """Return the body of a chat completions request, without `extra`.

    Raises:
        BadRequest: the service does not support a parameter or its value.
    """
    reject_unsupported(request, service, quirks.lacks if quirks.top_k else ("top_k", *quirks.lacks))
    body: dict[str, Any] = {"model": request.model, "messages": [message_of(m, quirks) for m in request.messages]}
    for name in ("temperature", "top_p", "frequency_penalty", "presence_penalty", "n", "reasoning_effort"):
        value = getattr(request, name)
        if value is not None:
            body[name] = value
    if request.max_tokens is not None:
        body[_max_tokens_name(request.model, quirks)] = request.max_tokens
    if request.seed is not None:
        body[quirks.seed] = request.seed
    if request.top_k is not None:
        body["top_k"] = request.top_k
    if request.stop:
        body["stop"] = list(request.stop)
    if request.tools:
        body["tools"] = [{"type": "function", "function": function_of(tool)} for tool in request.tools]
    if request.tool_choice is not None:
        body["tool_choice"] = _tool_choice(request.tool_choice)
    if request.response_format is not None:
        body["response_format"] = _response_format(request, quirks, service)
    if stream:
        body["stream"] = True
        if quirks.stream_usage:
            body["stream_options"] = {"include_usage": True}
    return body


def is_reasoning_model(model: str) -> bool:
    """Whether a model's name is that of an OpenAI reasoning model, which takes different parameters."""
    return _REASONING_MODEL.match(model) is not None


def _max_tokens_name(model: str, quirks: Quirks) -> str:
    if quirks.max_tokens == "by model":
        return "max_completion_tokens" if is_reasoning_model(model) else "max_tokens"
    return quirks.max_tokens


def message_of(message: Message, quirks: Quirks) -> dict[str, Any]:
    """Return a message in the dialect. Text alone is a string, which all services accept; with images it is a list."""
    body: dict[str, Any] = {"role": message.role}
    content = message.content
    if len(content) == 1 and not isinstance(content[0], Image):
        body["content"] = content[0].text
    elif any(isinstance(part, Image) for part in content):
        body["content"] = [
            {"type": "image_url", "image_url": image_of(part)}
            if isinstance(part, Image)
            else {"type": "text", "text": part.text}
            for part in content
        ]
    else:
        body["content"] = message.text
    if message.name is not None and message.role != "tool":
        body["name"] = message.name
    if message.role == "tool":
        body["tool_call_id"] = _call_id(message.tool_call_id or "", quirks)
    if message.tool_calls:
        body["content"] = body["content"] or None
        body["tool_calls"] = [
            {
                "id": _call_id(call.id, quirks),
                "type": "function",
                "function": {"name": call.name, "arguments": call.raw_arguments},
            }
            for call in message.tool_calls
        ]
    if message.reasoning:
        _add_reasoning(message, body, quirks)
    return body


def _call_id(call_id: str, quirks: Quirks) -> str:
    """Return a tool call's id as the service accepts it. Another service's id becomes nine hex digits of its hash."""
    if not quirks.short_call_ids or _SHORT_CALL_ID.fullmatch(call_id):
        return call_id
    return sha256(call_id.encode(errors="replace")).hexdigest()[:9]


def _add_reasoning(message: Message, body: dict[str, Any], quirks: Quirks) -> None:
    raws = [part.raw for part in message.reasoning if part.raw]
    details = [raw for raw in raws if str(raw.get("type", "")).startswith("reasoning.")]
    if details:
        body["reasoning_details"] = details
    text = "".join([raw["reasoning_content"] for raw in raws if isinstance(raw.get("reasoning_content"), str)])
    if text and quirks.returns_reasoning:
        body["reasoning_content"] = text


def image_of(image: Image) -> dict[str, Any]:
    """Return an image as the dialect's `image_url`."""
    body: dict[str, Any] = {"url": image_url(image)}
    if image.detail is not None:
        body["detail"] = image.detail
    return body


def image_url(image: Image) -> str:
    """Return the URL of an image; a data URL (RFC 2397) if the image is given as bytes."""
    if image.url is not None:
        return image.url
    return f"data:{image.media_type};base64,{b64encode(image.data or b'').decode()}"


def function_of(tool: Tool) -> dict[str, Any]:
    """Return a tool as the dialect's `function`."""
    body: dict[str, Any] = {"name": tool.name, "parameters": tool.parameters}
    if tool.description:
        body["description"] = tool.description
    if tool.strict is not None:
        body["strict"] = tool.strict
    return body


def _tool_choice(choice: str) -> object:
    if choice in {"auto", "none", "required"}:
        return choice
    return {"type": "function", "function": {"name": choice}}


def _response_format(request: Request, quirks: Quirks, service: str) -> Mapping[str, Any]:
    wanted = request.response_format
    if wanted not in quirks.formats and not (isinstance(wanted, Mapping) and "schema" in quirks.formats):
        known = " or ".join("a JSON Schema" if each == "schema" else repr(each) for each in quirks.formats)
        found = "a JSON Schema" if isinstance(wanted, Mapping) else repr(wanted)
        raise bad_request(request, f"response_format: expected {known} for {service}, got {found}")
    if wanted == "text":
        return {"type": "text"}
    if wanted == "json":
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": named_schema(wanted)}


def named_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON Schema with the name that OpenAI requires, and `strict` if the schema fits strict mode."""
    title = re.sub(r"[^a-zA-Z0-9_-]+", "_", str(schema.get("title") or "response"))[:64]
    return {"name": title, "schema": schema, "strict": _is_strict(schema)}


def _is_strict(schema: object) -> bool:
    """Whether each object in the schema is closed and requires all its properties, as OpenAI's strict mode demands."""
    if isinstance(schema, Mapping):
        fields = cast("Mapping[str, Any]", schema)
        if fields.get("type") == "object" or "properties" in fields:
            required: object = fields.get("required") or []
            properties: object = fields.get("properties") or {}
            if fields.get("additionalProperties") is not False or not isinstance(required, (list, tuple)):
                return False
            if not isinstance(properties, Mapping) or set(cast("list[object]", required)) != set(
                cast("Mapping[str, object]", properties)
            ):
                return False
        return all(_is_strict(value) for value in fields.values())
    return all(map(_is_strict, cast("list[object]", schema))) if isinstance(schema, (list, tuple)) else True
