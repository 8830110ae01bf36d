"""Messages, answers and tools in the JSON schema of OpenTelemetry's `gen_ai.*.messages` attributes.

(semantic-conventions-genai, gen-ai-input-messages.json and its siblings.) Every text passes through `redact` on its
way, tool arguments (their names too), image data and the names of participants included; the names of tools and roles,
and the keys of the tools' JSON Schemas, do not.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from fluxibly.messages import Image, Message, Part, Text, Tool, ToolCall
from fluxibly.types import Response

Redact: TypeAlias = Callable[[str], str]
Json: TypeAlias = dict[str, Any]


def unchanged(text: str) -> str:
    """The `redact` that leaves all as it is."""
    return text


def system_instructions(messages: Iterable[Message], redact: Redact = unchanged) -> list[Json]:
    """The parts of the system messages that open a conversation."""
    parts: list[Json] = []
    for message in messages:
        if message.role != "system":
            break
        parts.extend(_content(message.content, redact))
    return parts


def input_messages(messages: Iterable[Message], redact: Redact = unchanged) -> list[Json]:
    """The conversation, without the system messages that open it."""
    opened = False
    found: list[Json] = []
    for message in messages:
        opened = opened or message.role != "system"
        if opened:
            found.append(_message(message, redact))
    return found


def output_messages(response: Response, *, whole: bool, redact: Redact = unchanged) -> list[Json]:
    """An answer, and its alternatives. A finish reason that nobody told is `error` unless it is `whole`: never absent."""
    found: list[Json] = []
    for choice in (response, *response.alternatives):
        parts: list[Json] = []
        if choice.reasoning:
            parts.append({"type": "reasoning", "content": redact(choice.reasoning)})
        if choice.text:
            parts.append({"type": "text", "content": redact(choice.text)})
        parts.extend(_tool_call(call, redact) for call in choice.tool_calls)
        usual = ("tool_call" if choice.tool_calls else "stop") if whole else "error"
        reason = choice.finish_reason or usual
        found.append({"role": "assistant", "parts": parts, "finish_reason": reason})
    return found


def tool_definitions(tools: Iterable[Tool], redact: Redact = unchanged) -> list[Json]:
    """The functions that the model may ask for."""
    return [
        {
            "type": "function",
            "name": tool.name,
            "description": redact(tool.description),
            "parameters": _redacted(tool.parameters, redact),
        }
        for tool in tools
    ]


def _message(message: Message, redact: Redact) -> Json:
    if message.role == "tool":
        texts = [redact(part.text) for part in message.content if isinstance(part, Text)]
        parts: list[Json] = [{"type": "tool_call_response", "id": message.tool_call_id, "response": "".join(texts)}]
        parts.extend(_image(part, redact) for part in message.content if isinstance(part, Image))
    else:
        parts = [
            {"type": "reasoning", "content": redact(reasoning.text)}
            for reasoning in message.reasoning
            if reasoning.text
        ]
        parts.extend(_content(message.content, redact))
        parts.extend(_tool_call(call, redact) for call in message.tool_calls)
    found: Json = {"role": message.role, "parts": parts}
    if message.name is not None:
        found["name"] = message.name if message.role == "tool" else redact(message.name)
    return found


def _content(content: Iterable[Part], redact: Redact) -> Iterable[Json]:
    for part in content:
        if isinstance(part, Text):
            yield {"type": "text", "content": redact(part.text)}
        else:
            yield _image(part, redact)


def _image(image: Image, redact: Redact) -> Json:
    if image.url is None:
        data = b64encode(image.data or b"").decode()
        return {"type": "blob", "modality": "image", "mime_type": image.media_type, "content": redact(data)}
    header, comma, data = image.url.partition(";base64,")
    if comma and header.startswith("data:"):
        mime_type = header.removeprefix("data:").partition(";")[0] or None
        return {"type": "blob", "modality": "image", "mime_type": mime_type, "content": redact(data)}
    return {"type": "uri", "modality": "image", "mime_type": image.media_type, "uri": redact(image.url)}


def _tool_call(call: ToolCall, redact: Redact) -> Json:
    arguments = redact(call.raw_arguments) if call.error else _redacted(call.arguments, redact, keys=True)
    return {"type": "tool_call", "id": call.id, "name": call.name, "arguments": arguments}


def _redacted(value: Any, redact: Redact, *, keys: bool = False) -> Any:
    """A JSON value with every text in it redacted, and with `keys`, those of its objects."""
    if redact is unchanged:
        return value
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {
            redact(key) if keys and isinstance(key, str) else key: _redacted(item, redact, keys=keys)
            for key, item in value.items()  # pyright: ignore[reportUnknownVariableType]
        }
    if isinstance(value, (list, tuple)):
        return [_redacted(item, redact, keys=keys) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return value
