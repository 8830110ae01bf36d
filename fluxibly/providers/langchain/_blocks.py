"""The blocks of an answer's content in LangChain as fluxibly's parts, and back.

Each integration of LangChain keeps its service's own blocks, and takes them back in the same order. A block that has no
part of its own becomes an `Opaque`. The fields beside a text, a call or an image are in the part's `raw`, under the
name of the integration ("langchain-openai"), so that they go back to that integration only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, cast

import attrs
from langchain_core.messages import AIMessage

from fluxibly.providers.dialects.decoding import base64_bytes, to_json
from fluxibly.providers.dialects.encoding import media_data, sent_arguments
from fluxibly.providers.dialects.json_values import as_array, as_object, as_text
from fluxibly.providers.dialects.openai_parts import Speech
from fluxibly.types import Audio, Document, Image, Media, Opaque, Part, Reasoning, Text, ToolCall, ToolCallDelta

_ANTHROPIC: Final = "langchain-anthropic"
_CALLS: Final = frozenset(
    ("tool_use", "function_call", "custom_tool_call", "tool_call", "tool_call_chunk", "invalid_tool_call")
)
_THOUGHTS: Final = frozenset(("thinking", "redacted_thinking", "reasoning", "reasoning_content"))
_GROWING: Final = {
    "text": "text",
    "thinking": "thinking",
    "reasoning": "reasoning",
    "reasoning_content": "reasoning_content",
}
"""The field of a block that grows while the block is streamed, by the block's type."""
_SIGNATURES: Final = "__gemini_function_call_thought_signatures__"
"""The key in `additional_kwargs` under which langchain-google-genai keeps the signatures of tool calls, by id."""
_SPEECH: Final = "speech"
"""The type of a block that stands for the audio of OpenAI's chat, which langchain-openai keeps beside the content."""
_DETAILS: Final = ("citations", "annotations")


def is_call(block: Mapping[str, Any]) -> bool:
    """Whether a block is a tool call, which LangChain also keeps in the message's `tool_calls`."""
    return as_text(block.get("type")) in _CALLS


def is_thought(block: Mapping[str, Any]) -> bool:
    """Whether a block is reasoning."""
    return as_text(block.get("type")) in _THOUGHTS


def growing_field(block: Mapping[str, Any]) -> str | None:
    """Return the field of a streamed block whose pieces are added up, if the block has text in that field."""
    name = _GROWING.get(as_text(block.get("type")))
    return name if name is not None and isinstance(block.get(name), str) else None


def blocks_of(message: AIMessage) -> Iterator[dict[str, Any]]:
    """Yield the blocks of an answer in their order, with what older integrations keep in `additional_kwargs`."""
    kept = message.additional_kwargs
    if kept:
        thought = kept.get("reasoning_content")
        if isinstance(thought, str) and thought:
            yield {"type": "reasoning_content", "reasoning_content": thought}
    content = message.content
    if isinstance(content, str):
        if content:
            yield {"type": "text", "text": content}
    else:
        for block in content:
            yield {"type": "text", "text": block} if isinstance(block, str) else cast("dict[str, Any]", block)
    if kept:
        refusal = kept.get("refusal")
        if isinstance(refusal, str) and refusal and not message.content:
            yield {"type": "text", "text": refusal}
        if isinstance(kept.get("audio"), dict):
            yield {**kept["audio"], "type": _SPEECH}


# Whole answers


def parts_of(message: AIMessage, dialect: str) -> list[Part]:
    """Return the parts of a whole answer in their order. `dialect` is the integration that made the answer."""
    waiting = _tool_calls(message)
    parts: list[Part] = []
    for block in blocks_of(message):
        if is_call(block):
            call = _taken(waiting, block.get("call_id") or block.get("id"))
            parts.append(Opaque(dialect, block) if call is None else _with_fields(call, block, dialect))
        elif (part := part_of(block, dialect)) is not None:
            parts.append(part)
    return [*parts, *waiting]


def _tool_calls(message: AIMessage) -> list[ToolCall]:
    signatures = as_object(message.additional_kwargs.get(_SIGNATURES))
    calls = [
        ToolCall(call.get("id") or f"call_{number}", call["name"], call["args"], to_json(call["args"]))
        for number, call in enumerate(message.tool_calls)
    ]
    for number, broken in enumerate(message.invalid_tool_calls, len(calls)):
        arguments = broken.get("args") or ""
        calls.append(ToolCall(broken.get("id") or f"call_{number}", broken.get("name") or "", raw_arguments=arguments))
    return [
        ToolCall(call.id, call.name, raw_arguments=call.raw_arguments, signature=signatures[call.id])
        if isinstance(signatures.get(call.id), str)
        else call
        for call in calls
    ]


def _taken(calls: list[ToolCall], call_id: object) -> ToolCall | None:
    """Remove the call with an id from a list, and return it."""
    for number, call in enumerate(calls):
        if call.id == call_id:
            return calls.pop(number)
    return None


def _with_fields(call: ToolCall, block: Mapping[str, Any], dialect: str) -> ToolCall:
    """Return a call with the service's own text of its arguments, and the fields beside it."""
    own = _own_arguments(block)
    raw = call_fields(block, dialect)
    if own is None and raw is None:
        return call
    arguments = call.raw_arguments if own is None else own
    return ToolCall(call.id, call.name, raw_arguments=arguments, signature=call.signature, raw=raw)


def _own_arguments(block: Mapping[str, Any]) -> str | None:
    name = {"function_call": "arguments", "custom_tool_call": "input"}.get(as_text(block.get("type")))
    found = block.get(name) if name is not None else None
    return found if isinstance(found, str) else None


# Parts


def call_fields(block: Mapping[str, Any], dialect: str) -> dict[str, Any] | None:
    """Return the `raw` of a tool call: the fields of its block that a `ToolCall` has no place for."""
    kind = as_text(block.get("type"))
    known = _CALL_FIELDS if kind in ("function_call", "custom_tool_call") else {*_CALL_FIELDS, "id"}
    fields = {name: value for name, value in block.items() if name not in known and value is not None}
    if kind in ("tool_use", "invalid_tool_call") and set(fields) == {"type"}:
        return None
    if kind == "tool_call_chunk":
        fields["type"] = "tool_call"
    return {**({"type": "custom"} if kind == "custom_tool_call" else {}), dialect: fields}


_CALL_FIELDS: Final = frozenset(
    ("name", "arguments", "args", "input", "call_id", "status", "index", "partial_json", "error")
)


def part_of(block: Mapping[str, Any], dialect: str) -> Part | None:
    """Return a block that is not a tool call as a part; None if it is an empty text."""
    kind = as_text(block.get("type"))
    if kind == "text" and isinstance(block.get("text"), str):
        return _text(block["text"], {name: value for name, value in block.items() if name not in _TEXT_FIELDS}, dialect)
    if kind == "refusal":
        return _text(as_text(block.get("refusal")), {"type": "refusal"}, dialect)
    block = {name: value for name, value in block.items() if name != "index"}
    if kind in _THOUGHTS:
        return _reasoning(block, dialect)
    if kind == _SPEECH:
        return _speech(block, dialect)
    return _media(block, dialect) or Opaque(dialect, _with_input(block))


_TEXT_FIELDS: Final = frozenset(("type", "text", "index"))


def _text(text: str, fields: dict[str, Any], dialect: str) -> Text | None:
    if not text:
        return None
    fields = {name: value for name, value in fields.items() if value not in (None, [])}
    return Text(text, raw={dialect: fields} if fields else None)


def _reasoning(block: dict[str, Any], dialect: str) -> Reasoning:
    if isinstance(block.get("summary"), list):  # an item of OpenAI's Responses: a stream numbers its pieces
        block["summary"] = [
            {name: value for name, value in as_object(piece).items() if name != "index"} for piece in block["summary"]
        ]
        block.pop("status", None)
    raw = block if _is_services_own(block, dialect) else {dialect: block}
    return Reasoning(text=reasoning_text(block), signature=as_text(block.get("signature")) or None, raw=raw)


def _is_services_own(block: Mapping[str, Any], dialect: str) -> bool:
    """Whether a block of reasoning is in Anthropic's own shape, which fluxibly's own dialect and LiteLLM share."""
    return dialect == _ANTHROPIC and block.get("type") in ("thinking", "redacted_thinking")


def reasoning_text(block: Mapping[str, Any]) -> str:
    """Return the readable text of a block of reasoning."""
    for name in ("thinking", "reasoning", "reasoning_content"):
        said: object = block.get(name)
        if isinstance(said, str):
            return said
        if isinstance(said, dict):  # Amazon Bedrock
            return as_text(cast("dict[str, Any]", said).get("text"))
        if isinstance(said, list):  # Mistral
            return _joined(cast("list[object]", said))
    return _joined(as_array(block.get("summary")))


def _joined(pieces: Iterable[object]) -> str:
    return "".join(as_text(as_object(piece).get("text")) for piece in pieces)


def _with_input(block: dict[str, Any]) -> dict[str, Any]:
    """Return a block of a service's own tool with its input as an object. A stream sends it as pieces of JSON."""
    name, pieces = ("args", "args") if block.get("type") == "server_tool_call_chunk" else ("input", "partial_json")
    try:
        said = json.loads(block[pieces])
    except (KeyError, TypeError, ValueError):
        return block
    if name == "args":
        return {**block, "type": "server_tool_call", "args": said}
    return {**{key: value for key, value in block.items() if key != pieces}, name: said}


# Media


def _media(block: dict[str, Any], dialect: str) -> Media | None:
    """Return the image, audio or file of a block; None if it is none, or has neither bytes nor a URL."""
    name = _place(block)
    if name is None:
        return None
    given: object = as_object(block[name]).get("url") if name == "image_url" else block[name]
    kind, media_type = _kind(block)
    rest = {key: value for key, value in block.items() if key != name}
    found = _content(given, media_type)
    if found is None:
        return None
    raw = {dialect: rest}
    if kind is Audio:
        return Audio(**found, transcript=as_text(block.get("transcript")) or None, raw=raw)
    if kind is Document:
        return Document(**found, name=as_text(block.get("filename")) or None, raw=raw)
    return Image(**found, raw=raw)


def _speech(block: dict[str, Any], dialect: str) -> Audio:
    speech = Speech()
    speech.add(block)
    audio = speech.part()
    return attrs.evolve(audio, raw={dialect: {"type": _SPEECH, **(audio.raw or {})}})


def _place(block: Mapping[str, Any]) -> str | None:
    """Return the field that holds the bytes or the URL of an image, audio or a file."""
    kind = as_text(block.get("type"))
    fields = {
        "image_generation_call": ("result",),
        "image_url": ("image_url",),
        "media": ("data",),
        "image": ("base64", "data", "url"),
        "audio": ("base64", "data", "url"),
        "file": ("base64", "data", "url"),
    }.get(kind, ())
    return next((name for name in fields if block.get(name)), None)


def _kind(block: Mapping[str, Any]) -> tuple[type[Media], str]:
    kind, media_type = block["type"], as_text(block.get("mime_type"))
    if kind == "media":
        kind = media_type.partition("/")[0]
    if kind == "audio":
        return Audio, media_type or "audio/wav"
    if kind in ("image", "image_url", "image_generation_call"):
        return Image, media_type or f"image/{as_text(block.get('output_format')) or 'png'}"
    return Document, media_type or "application/octet-stream"


def _content(given: object, media_type: str) -> dict[str, Any] | None:
    """Return the fields of a `Media` for base64 data or a URL."""
    if not isinstance(given, str):
        return None
    if given.startswith(("http:", "https:", "gs:")):
        return {"url": given, "media_type": media_type}
    head, comma, data = given.partition(";base64,")
    if comma and head.startswith("data:"):
        media_type, given = head[5:].partition(";")[0] or media_type, data
    found = base64_bytes(given)
    return None if found is None else {"data": found, "media_type": media_type}


def media_block(part: Media) -> dict[str, Any]:
    """Return an image in OpenAI's format, and audio and files as LangChain's blocks: all integrations read these."""
    found = media_data(part)
    if isinstance(part, Image):
        url = part.url if found is None else f"data:{found[0]};base64,{found[1]}"
        detail = {"detail": part.detail} if part.detail else {}
        return {"type": "image_url", "image_url": {"url": url, **detail}}
    block: dict[str, Any] = {"type": "audio" if isinstance(part, Audio) else "file"}
    if found is None:
        block |= {"url": part.url} | ({"mime_type": part.media_type} if part.media_type else {})
    else:
        block |= {"base64": found[1], "mime_type": found[0]}
    if isinstance(part, Document) and part.name is not None:
        block["filename"] = part.name
    return block


def _own_media(media: Media, own: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the block of media in an assistant's message: as its integration sent it, else as a user's."""
    if own is not None:
        return _sent_media(media, own)
    if isinstance(media, Audio) and media.transcript:
        return {"type": "text", "text": media.transcript}
    return media_block(media)


def _sent_media(media: Media, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the block of an image, audio or a file that a model made, as the integration sent it."""
    kind = fields["type"]
    media_type, data = media_data(media) or (media.media_type, "")
    if kind == "image_url":
        url = media.url or f"data:{media_type};base64,{data}"
        return {**fields, "image_url": {"url": url}}
    if media.url is not None:
        return {**fields, "url": media.url}
    name = {"image_generation_call": "result", "media": "data"}.get(
        kind, "data" if "source_type" in fields else "base64"
    )
    return {**fields, name: data, "mime_type": media_type} if name == "base64" else {**fields, name: data}


# From parts to blocks


def answer_of(parts: Iterable[Part], dialect: str) -> tuple[str | list[dict[str, Any]], dict[str, Any]]:
    """Return the `content` and the `additional_kwargs` of an assistant's message for an integration."""
    blocks: list[dict[str, Any]] = []
    kept: dict[str, Any] = {}
    signatures: dict[str, str] = {}
    for part in parts:
        own = own_fields(part, dialect)
        if isinstance(part, Reasoning) and own is not None and isinstance(own.get("reasoning_content"), str):
            kept["reasoning_content"] = kept.get("reasoning_content", "") + part.text
        elif isinstance(part, Audio) and own is not None and own.get("type") == _SPEECH:
            kept["audio"] = {"id": own.get("id")}
        elif (block := _block(part, own, dialect)) is not None:
            blocks.append(block)
        if isinstance(part, ToolCall) and part.signature:
            signatures[part.id] = part.signature
    if signatures and dialect == "langchain-google-genai":
        kept[_SIGNATURES] = signatures
    return _content_of(blocks, dialect), kept


def own_fields(part: Part, dialect: str) -> Mapping[str, Any] | None:
    """Return what an integration sent beside a part; None if the part is from elsewhere."""
    if isinstance(part, Opaque):
        return part.raw if part.dialect == dialect else None
    raw = part.raw
    if raw is None:
        return None
    if isinstance(part, Reasoning) and _is_services_own(raw, dialect):
        return raw
    fields: object = raw.get(dialect)
    return cast("Mapping[str, Any]", fields) if isinstance(fields, Mapping) else None


def _block(part: Part, own: Mapping[str, Any] | None, dialect: str) -> dict[str, Any] | None:
    """Return a part as a block of content; None if it has no block, or only another service can read it."""
    if isinstance(part, Text):
        if not part.text.strip():
            return None
        if own is not None and own.get("type") == "refusal":
            return {"type": "refusal", "refusal": part.text}
        return {"type": "text", "text": part.text, **(own or {})}
    if isinstance(part, ToolCall):
        return _call_block(part, own, dialect)
    if isinstance(part, Media):
        return _own_media(part, own)
    return None if own is None else dict(own)


def _call_block(call: ToolCall, own: Mapping[str, Any] | None, dialect: str) -> dict[str, Any] | None:
    kind = as_text((own or {}).get("type"))
    if kind == "function_call":
        return {**(own or {}), "name": call.name, "arguments": call.raw_arguments, "call_id": call.id}
    if kind == "custom_tool_call":
        return {**(own or {}), "name": call.name, "input": call.raw_arguments, "call_id": call.id}
    if kind == "tool_call":
        return {**(own or {}), "id": call.id, "name": call.name, "args": sent_arguments(call)}
    if dialect == _ANTHROPIC or kind == "tool_use":
        fields = {name: value for name, value in (own or {}).items() if name != "type"}
        return {"type": "tool_use", "id": call.id, "name": call.name, "input": sent_arguments(call), **fields}
    return None


def _content_of(blocks: list[dict[str, Any]], dialect: str) -> str | list[dict[str, Any]]:
    """Return blocks as content: as a string if they are only text, which all integrations accept."""
    bare = [block["text"] for block in blocks if block.keys() == {"type", "text"}]
    if len(bare) < len(blocks) or (len(bare) > 1 and dialect == _ANTHROPIC):
        return blocks
    return "".join(bare)


def details_of(block: Mapping[str, Any]) -> dict[str, Any]:
    """Return the citations and annotations of a text block, for `Response.details`."""
    return {name: value for name in _DETAILS if isinstance(value := block.get(name), list) and value}


def call_delta(
    chunk: Mapping[str, Any], block: Mapping[str, Any] | None, message: AIMessage, dialect: str
) -> ToolCallDelta:
    """Return a fragment of a tool call, with the fields of the block that begins the call."""
    index: object = chunk.get("index")
    call_id: str | None = chunk.get("id")
    signatures = as_object(message.additional_kwargs.get(_SIGNATURES))
    raw = None if block is None else call_fields(block, dialect)
    own = None if block is None or block.get("type") != "custom_tool_call" else _own_arguments(block)
    return ToolCallDelta(
        index=index if isinstance(index, int) else None,
        id=call_id,
        name=chunk.get("name"),
        arguments=as_text(chunk.get("args")) if own is None else own,
        signature=as_text(signatures.get(call_id or "")) or None,
        raw=raw,
    )
