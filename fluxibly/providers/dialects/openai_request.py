"""Requests of OpenAI's chat completions API, and of services whose dialect is nearly the same."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Final, Literal, TypeAlias

import attrs
import msgspec

from fluxibly._checks import is_mapping
from fluxibly._formats import SchemaFormat
from fluxibly.aggregate import merged
from fluxibly.errors import ProviderError
from fluxibly.providers.dialects.encoding import (
    bad_request,
    format_of,
    is_thinking_block,
    media_data,
    misplaced_media,
    reject_unsupported,
)
from fluxibly.providers.dialects.openai_parts import DIALECT
from fluxibly.providers.dialects.openai_schema import named_schema
from fluxibly.providers.dialects.schemas import with_schema_in_words
from fluxibly.types import Audio, Document, Image, Media, Message, Opaque, Reasoning, Request, Text, Tool, ToolCall

_REASONING_MODEL: Final = re.compile(
    r"(?<![a-z0-9])(?<!marco.)(?<!skywork.)(?<!open.)(?<!llama.)o[1-9](?![a-z0-9])|gpt[-_.]?(?:[5-9]|1\d)(?!\d)",
    re.IGNORECASE,
)
"""OpenAI's reasoning models, anywhere in a name ("ft:o4-mini:org", "prod-gpt-5"), but not open models called o1. They
reject `max_tokens`."""
_UNKNOWN: Final = re.compile(
    "unsupported|not supported|unrecognized|unknown|unexpected|not permitted|forbidden", re.IGNORECASE
)
"""The words with which a service rejects a parameter that it does not know."""

MAX_LEARNED: Final = 1_000
"""The maximum number of models about which a codec learns something."""
_SHORT_CALL_ID: Final = re.compile(r"[a-zA-Z0-9]{9}")


@attrs.frozen(kw_only=True)
class Quirks:
    """Differences of a service's chat dialect from OpenAI's."""

    path: str = "/chat/completions"
    """The path of requests. `{model}` in the path stands for the model's name."""
    max_tokens: Literal["max_tokens", "max_completion_tokens", "by model"] = "max_tokens"
    """The name of the parameter. "by model" uses the newer name only for OpenAI's reasoning models. A model that
    refuses one name gets the other from then on."""
    seed: str = "seed"
    """The name of the parameter."""
    stream_usage: bool = True
    """Whether the service accepts `stream_options.include_usage`."""
    top_k: bool = False
    """Whether the service accepts `top_k`."""
    lacks: tuple[str, ...] = ()
    """Other unsupported parameters, which the service would silently ignore or reject."""
    formats: tuple[str, ...] = ("text", "json", "schema")
    """The supported kinds of `response_format`. Without "schema", the model is told a JSON Schema in words."""
    short_call_ids: bool = False
    """Whether the id of a tool call must be nine letters and digits, as the service's own ids are."""
    reasoning_fields: tuple[str, ...] = ()
    """The fields in which the service takes its reasoning back, in a conversation with tools: "reasoning_content",
    "reasoning"."""
    message_fields: tuple[str, ...] = ()
    """The other fields of an assistant's message that the service takes back."""
    thinks_first: bool = False
    """Whether an answer begins with reasoning that only `</think>` ends, because the model's template opens it."""
    thinking_parts: bool = False
    """Whether a content may have parts of kinds that OpenAI does not have, such as "thinking"."""
    prefill: Literal["", "message", "prefix", "continue_final_message"] = ""
    """How the service goes on with an assistant's message that ends a request: with any such message ("message"); with one
    that has `prefix`, and others it refuses; or if the body has `continue_final_message`. "": not known, or not at all."""


def chat_body(request: Request, quirks: Quirks, *, stream: bool, service: str) -> dict[str, Any]:
    """Return the body of a chat completions request, without `extra`.

    Raises:
        BadRequest: the service does not support a parameter or its value.
    """
    reject_unsupported(request, service, quirks.lacks if quirks.top_k else ("top_k", *quirks.lacks))
    response_format = _response_format(request, quirks, service)
    wanted = format_of(request)
    if isinstance(wanted, SchemaFormat) and "schema" not in quirks.formats:
        request = with_schema_in_words(request, wanted.schema)
    body: dict[str, Any] = {"model": request.model, "messages": _messages(request, quirks)}
    for name in ("temperature", "top_p", "frequency_penalty", "presence_penalty", "n", "reasoning_effort"):
        value = getattr(request, name)
        if value is not None:
            body[name] = value
    if request.max_tokens is not None:
        body[max_tokens_name(request.model, quirks)] = request.max_tokens
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
    if response_format is not None:
        body["response_format"] = response_format
    if stream:
        body["stream"] = True
        if quirks.stream_usage:
            body["stream_options"] = {"include_usage": True}
    return body


def is_reasoning_model(model: str) -> bool:
    """Whether a model's name is that of an OpenAI reasoning model, which takes different parameters."""
    return _REASONING_MODEL.search(model) is not None


MaxTokensName: TypeAlias = Literal["max_tokens", "max_completion_tokens"]


def max_tokens_name(model: str, quirks: Quirks) -> MaxTokensName:
    """Return the name under which a model takes `max_tokens`, as far as is known."""
    if quirks.max_tokens == "by model":
        return "max_completion_tokens" if is_reasoning_model(model) else "max_tokens"
    return quirks.max_tokens


def refused_max_tokens_name(sent: bytes, error: ProviderError) -> MaxTokensName | None:
    """Return the name of `max_tokens` in a body that was `sent`, if `error` says that the model does not know that name."""
    # Only the service's own words count: the body may quote the prompt.
    message = str(error)
    unknown = "max_completion_tokens" in message and _UNKNOWN.search(message) is not None
    forbidden = _FORBIDDEN.search(error.body or "") is not None
    if error.status not in (400, 422) or not (unknown or forbidden):
        return None
    fields: object = msgspec.json.decode(sent)
    if not is_mapping(fields):
        return None
    if "max_tokens" in fields:
        return "max_tokens" if unknown and re.search(r"\bmax_tokens\b", message) else None
    return "max_completion_tokens" if "max_completion_tokens" in fields else None


_FORBIDDEN: Final = re.compile(r'"loc" ?: ?\[[^\]]*"max_completion_tokens"\]')
"""Where a server that checks requests by pydantic (Mistral, vLLM) names a field that it does not know."""


# Messages


def _messages(request: Request, quirks: Quirks) -> list[dict[str, Any]]:
    with_tools: bool | None = None
    functions: dict[str, str] = {}
    """The names of the calls so far that came as a `function_call`, by the id that they have here."""
    bodies: list[dict[str, Any]] = []
    for message in request.messages:
        text = _plain_text(message)
        if text is not None:
            bodies.append({"role": message.role, "content": text})
        elif message.role == "assistant":
            with_tools = _has_tools(request) if with_tools is None else with_tools
            bodies.append(_AssistantMessage(quirks, with_tools=with_tools).body(message, request))
            for call in message.tool_calls:
                functions.pop(call.id, None)
                if _type_of(call) == "function_call":
                    functions[call.id] = call.name
        elif message.role == "tool" and message.tool_call_id in functions:
            name = message.name or functions[message.tool_call_id]
            bodies.append({"role": "function", "name": name, "content": _content(message, request)})
        elif message.role == "tool":
            call_id = _call_id(message.tool_call_id or "", quirks)
            bodies.append({"role": "tool", "content": _content(message, request), "tool_call_id": call_id})
        else:
            speaker = {} if message.name is None else {"name": message.name}
            bodies.append({"role": message.role, "content": _content(message, request), **speaker})
    if quirks.prefill == "prefix" and request.messages[-1].role == "assistant":
        bodies[-1]["prefix"] = True
    return bodies


def _plain_text(message: Message) -> str | None:
    """Return the text of a message that has nothing else, as most have; None for other messages."""
    if len(message.content) != 1 or message.order is not None or message.tool_calls or message.reasoning:
        return None
    part = message.content[0]
    if not isinstance(part, Text) or part.raw is not None or message.name is not None or message.role == "tool":
        return None
    return part.text


def _has_tools(request: Request) -> bool:
    """Whether the conversation is one with tools: only there do services want their reasoning back."""
    return (
        bool(request.tools)
        or not request.extra.keys().isdisjoint(("tools", "functions"))
        or any(message.tool_calls for message in request.messages)
    )


def _content(message: Message, request: Request) -> str | list[dict[str, Any]]:
    """Return a content. Text alone is a string, which all services accept; with media it is a list."""
    return _joined([part.text if isinstance(part, Text) else _media(part, request) for part in message.content])


def _joined(content: list[str | dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Return texts and other parts as a content. A list has no empty texts, which services reject."""
    texts = [part for part in content if isinstance(part, str)]
    if len(texts) == len(content):
        return "".join(texts)
    return [
        {"type": "text", "text": part} if isinstance(part, str) else part
        for part in content
        if not isinstance(part, str) or part.strip()
    ]


class _AssistantMessage:
    """A message of the assistant in the making. What a service sent goes back to it as it came."""

    def __init__(self, quirks: Quirks, *, with_tools: bool) -> None:
        self._quirks = quirks
        self._with_tools = with_tools
        self._fields: dict[str, Any] = {}
        self._content: list[str | dict[str, Any]] = []

    def body(self, message: Message, request: Request) -> dict[str, Any]:
        """Return the message, with its parts in their order."""
        for part in message.parts:
            if isinstance(part, Text):
                self._add_text(part)
            elif isinstance(part, ToolCall):
                self._add_call(part)
            elif isinstance(part, Reasoning):
                self._add_reasoning(part)
            elif isinstance(part, Opaque):
                self._add_opaque(part)
            else:
                self._add_media(part, request)
        name = {} if message.name is None else {"name": message.name}
        content = _joined(self._content)
        if not content and not self._fields.keys().isdisjoint(("audio", "function_call", "refusal", "tool_calls")):
            return {"role": "assistant", "content": None, **name, **self._fields}
        return {"role": "assistant", "content": content, **name, **self._fields}

    def _takes(self, field: str, raw: Mapping[str, Any] | None) -> bool:
        return raw is not None and field in raw and field in self._quirks.message_fields

    def _add_text(self, part: Text) -> None:
        raw = part.raw or {}
        if raw.get("type") == "refusal" and "refusal" in self._quirks.message_fields:
            self._fields["refusal"] = self._fields.get("refusal", "") + part.text
        else:
            self._content.append(part.text)
        if self._takes("extra_content", raw):
            self._fields["extra_content"] = merged(self._fields.get("extra_content", {}), raw["extra_content"])

    def _add_call(self, call: ToolCall) -> None:
        kind, raw = _type_of(call), call.raw
        if kind == "function_call":
            self._fields["function_call"] = {"name": call.name, "arguments": call.raw_arguments}
            return
        body: dict[str, Any] = {"id": _call_id(call.id, self._quirks), "type": kind}
        if kind == "custom":
            body["custom"] = {"name": call.name, "input": call.raw_arguments}
        else:
            body["function"] = {"name": call.name, "arguments": call.raw_arguments}
        if raw is not None and self._takes("extra_content", raw):
            body["extra_content"] = raw["extra_content"]
        self._fields.setdefault("tool_calls", []).append(body)

    def _add_reasoning(self, part: Reasoning) -> None:
        raw, quirks = part.raw or {}, self._quirks
        kind = raw.get("type")
        if isinstance(kind, str) and kind.startswith("reasoning."):
            if "reasoning_details" in quirks.message_fields:
                self._fields.setdefault("reasoning_details", []).append(raw)
        elif is_thinking_block(raw):
            if "thinking_blocks" in quirks.message_fields:
                self._fields.setdefault("thinking_blocks", []).append(dict(raw))
        elif kind == "thinking":
            if quirks.thinking_parts:
                self._content.append(dict(raw))
        elif kind is None and self._with_tools:
            for name in quirks.reasoning_fields:
                if isinstance(raw.get(name), str):
                    self._fields[name] = self._fields.get(name, "") + raw[name]
            if isinstance(raw.get("content"), str):
                self._content.append(raw["content"])

    def _add_opaque(self, part: Opaque) -> None:
        if part.dialect != DIALECT:
            return
        if "provider_specific_fields" in part.raw:
            if self._takes("provider_specific_fields", part.raw):
                self._fields.update(part.raw)
        elif self._quirks.thinking_parts:
            self._content.append(dict(part.raw))

    def _add_media(self, part: Media, request: Request) -> None:
        """Add media that a model made. It goes back only in the form in which this dialect sends it."""
        raw = part.raw or {}
        if isinstance(part, Audio) and isinstance(raw.get("id"), str) and "audio" in self._quirks.message_fields:
            self._fields["audio"] = {"id": raw["id"]}
        elif isinstance(part, Audio) and part.transcript:
            self._content.append(part.transcript)
        elif isinstance(part, Image) and self._takes("images", raw):
            entry = {"image_url": {"url": image_url(part)}}
            self._fields.setdefault("images", []).append({**raw["images"], **entry})
        else:
            raise misplaced_media(request, part, "a user's message")


def _type_of(call: ToolCall) -> str:
    """Return the type of a call: "function", "custom" for a tool that takes text, or "function_call" for the old form."""
    found = (call.raw or {}).get("type")
    return found if found in ("custom", "function_call") else "function"


def _call_id(call_id: str, quirks: Quirks) -> str:
    """Return a tool call's id as the service accepts it. Another service's id becomes nine hex digits of its hash."""
    if not quirks.short_call_ids or _SHORT_CALL_ID.fullmatch(call_id):
        return call_id
    return sha256(call_id.encode(errors="replace")).hexdigest()[:9]


def _media(part: Media, request: Request) -> dict[str, Any]:
    """Return media as a part of a content."""
    if isinstance(part, Image):
        return {"type": "image_url", "image_url": image_of(part)}
    found = media_data(part)
    if isinstance(part, Audio):
        sound = None if found is None else _SOUNDS.get(found[0].partition(";")[0].lower())
        if found is None or sound is None:
            got = "a URL" if found is None else repr(found[0])
            raise bad_request(request, f"audio: expected the bytes of a WAV or an MP3 file, got {got}")
        return {"type": "input_audio", "input_audio": {"data": found[1], "format": sound}}
    if found is None:
        raise bad_request(request, "a document: expected its bytes or a data URL, got another URL")
    kind, data = found
    name = (part.name if isinstance(part, Document) else None) or f"document.{kind.rpartition('/')[2]}"
    return {"type": "file", "file": {"filename": name, "file_data": f"data:{kind};base64,{data}"}}


_SOUNDS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("audio/wav", "audio/x-wav", "audio/wave", "audio/vnd.wave"), "wav"),
    **dict.fromkeys(("audio/mpeg", "audio/mp3"), "mp3"),
}
"""OpenAI's names of the formats that it takes, by media type."""


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


def _response_format(request: Request, quirks: Quirks, service: str) -> Mapping[str, Any] | None:
    wanted = format_of(request)
    if wanted is None:
        return None
    if isinstance(wanted, SchemaFormat):
        if "schema" in quirks.formats:
            return {"type": "json_schema", "json_schema": named_schema(wanted)}
        return {"type": "json_object"} if "json" in quirks.formats else None  # the model is told the schema in words
    if wanted not in quirks.formats:
        known = " or ".join("a JSON Schema" if each == "schema" else repr(each) for each in quirks.formats)
        raise bad_request(request, f"response_format: expected {known} for {service}, got {wanted!r}")
    return {"type": "json_object" if wanted == "json" else "text"}
