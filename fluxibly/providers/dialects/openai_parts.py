"""Parts of OpenAI-like responses as fluxibly's types: tool calls, reasoning, media, usage, finish reasons."""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Mapping
from typing import Any, Final, Literal, cast

from fluxibly.providers.dialects.decoding import to_json
from fluxibly.providers.dialects.encoding import media_data
from fluxibly.providers.dialects.json_values import MOST, as_array, as_object, as_text
from fluxibly.types import Audio, Image, Opaque, Reasoning, ToolCallDelta, Usage

DIALECT: Final = "openai-chat"
"""The dialect of opaque parts."""

_FINISH_REASONS: Final[Mapping[str, str]] = {
    "stop": "stop",
    "eos": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "max_tokens": "length",
    "model_length": "length",
    "model_context_window_exceeded": "length",
    "content_filter": "content_filter",
    "refusal": "content_filter",
    "safety": "content_filter",
    "sensitive": "content_filter",
    "tool_calls": "tool_call",
    "tool_call": "tool_call",
    "tool_use": "tool_call",
    "function_call": "tool_call",
    "error": "error",
    "insufficient_system_resource": "error",
    "network_error": "error",
}


def finish_reason_of(raw: str) -> str:
    """Return a service's finish reason in the terms of `FINISH_REASONS`. Unknown reasons are passed on unchanged."""
    return _FINISH_REASONS.get(raw.lower(), raw)


def items_of(value: object) -> list[object]:
    """Return the items of a value that may be a list, a single item or None."""
    if value is None:
        return []
    return cast("list[object]", value) if isinstance(value, list) else [value]


def tool_call_deltas(calls: object) -> tuple[ToolCallDelta, ...]:
    """Return the fragments of tool calls in a delta, or the calls of a message.

    A negative `index` and an empty id or name count as missing. Arguments may be null, text or an object. A call of a
    custom tool has an input instead, which is text.
    """
    deltas: list[ToolCallDelta] = []
    for call in items_of(calls):
        fields = as_object(call)
        if not fields:
            continue
        custom = as_object(fields.get("custom"))
        function = custom or as_object(fields.get("function")) or fields
        index: object = fields.get("index")
        raw: dict[str, Any] = {"type": "custom"} if custom or fields.get("type") == "custom" else {}
        if fields.get("extra_content"):
            raw["extra_content"] = fields["extra_content"]
        deltas.append(
            ToolCallDelta(
                index=index if type(index) is int and index >= 0 else None,
                id=word_of(fields.get("id")),
                name=word_of(function.get("name")),
                arguments=_arguments(function.get("input" if custom else "arguments")),
                raw=raw or None,
            )
        )
    return tuple(deltas)


def function_call_delta(call: object) -> tuple[ToolCallDelta, ...]:
    """Return a `function_call`, or a fragment of it: the only call of an answer, in the form before `tool_calls`."""
    fields = as_object(call)
    if not fields:
        return ()
    name, arguments = word_of(fields.get("name")), _arguments(fields.get("arguments"))
    return (ToolCallDelta(name=name, arguments=arguments, raw={"type": "function_call"}),)


def word_of(value: object) -> str | None:
    """Return an id, a name or a reason as text, because some services send numbers. "" counts as missing."""
    return str(value) if isinstance(value, (str, int)) and value != "" else None


def _arguments(value: object) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else to_json(value)


class Thought:
    """Reasoning in progress: a block as the service sends it, whose fragments are joined.

    Its `kind` is "field" (`reasoning_content` or `reasoning`), "detail" (an item of `reasoning_details`), "thinking" (a
    part of the content), "block" (an item of LiteLLM's `thinking_blocks`) or "inline" (written into the text).
    """

    _JOINED: Final = ("text", "summary", "data", "reasoning_content", "reasoning")

    def __init__(self, kind: Literal["field", "detail", "thinking", "block", "inline"]) -> None:
        self.kind = kind
        self._joined = (*self._JOINED, "thinking") if kind == "block" else self._JOINED
        self._fields: dict[str, Any] = {}
        self._pieces: dict[str, list[str]] = {}
        """The pieces of the fields whose texts are joined."""
        self._said: list[str] = []

    @property
    def readable(self) -> bool:
        """Whether any text of the block was read."""
        return any(self._said)

    def add(self, fields: Mapping[str, Any], said: str) -> None:
        """Add a fragment, and what it says."""
        self._said.append(said)
        for key, value in fields.items():
            pieces = self._pieces.get(key)
            if pieces is not None and isinstance(value, str):
                pieces.append(value)
            elif key in self._joined and isinstance(value, str):
                self._fields.setdefault(key, value)
                self._pieces[key] = [value]
            elif key == "thinking" and key in self._fields:
                self._fields[key] = _joined_thinking(self._fields[key], value)
            elif value is not None or (key not in self._fields and self.kind != "block"):
                self._fields[key] = value

    def goes_on(self, kind: str, fragment: Mapping[str, Any]) -> bool:
        """Whether a fragment of a "detail" or a "block" continues this one.

        It does so with the same type, index and id, which may be missing. A block ends with its signature, or the data
        of a redacted block.
        """
        mine = self._fields
        if self.kind != kind or any(mine.get(key) != fragment.get(key) for key in ("type", "index")):
            return False
        known, found = mine.get("id"), fragment.get("id")
        if known is not None and found is not None and known != found:
            return False
        if kind == "block" and mine.get("data"):
            return False
        return not (mine.get("signature") and detail_text(fragment))

    def part(self, **fields: Any) -> Reasoning:
        """Return the block so far. `fields` are added to it."""
        raw = {**self._fields, **{key: "".join(pieces) for key, pieces in self._pieces.items()}, **fields}
        if self.kind == "block":
            raw.pop("index", None)  # the number of a piece in a stream
        return Reasoning(text="".join(self._said), signature=word_of(raw.get("signature")), raw=raw)


def detail_text(detail: Mapping[str, Any]) -> str:
    """Return the readable text of an item of `reasoning_details` or `thinking_blocks`."""
    return as_text(detail.get("text")) or as_text(detail.get("summary")) or as_text(detail.get("thinking"))


def thinking_text(thinking: object) -> str:
    """Return the text of a `thinking` part: a string, or a list of parts that may be of other kinds, too."""
    return "".join([as_text(part) or as_text(as_object(part).get("text")) for part in items_of(thinking)])


def _joined_thinking(old: object, new: object) -> object:
    if isinstance(old, str) and isinstance(new, str):
        return old + new
    joined = [_text_part(part) for part in items_of(old)]
    for part in map(_text_part, items_of(new)):
        last = as_object(joined[-1]) if joined else {}
        if set(last) == set(as_object(part)) == {"type", "text"} and last["type"] == as_object(part)["type"]:
            joined[-1] = {**last, "text": as_text(last["text"]) + as_text(as_object(part)["text"])}
        else:
            joined.append(part)
    return joined


def _text_part(part: object) -> object:
    return {"type": "text", "text": part} if isinstance(part, str) else part


def own_fields(fields: object) -> dict[str, Any]:
    """Return LiteLLM's `provider_specific_fields` of a message, without nulls and what stands in the message, too."""
    known = ("thinking_blocks", "reasoning_content", "refusal")
    return {name: value for name, value in as_object(fields).items() if value is not None and name not in known}


# Media


def image_of_url(image_url: object, raw: Mapping[str, Any] | None = None) -> Image | None:
    """Return the image of an `image_url`; its bytes if the URL holds them. None if there is no URL."""
    url = as_text(image_url) or as_text(as_object(image_url).get("url"))
    try:
        image = Image(url=url, raw=raw)
        found = media_data(image)
        return image if found is None else Image(data=b64decode(found[1]), media_type=found[0], raw=raw)
    except binascii.Error:
        return Image(url=url, raw=raw)
    except ValueError:
        return None


def generated_images(images: object) -> tuple[Image | Opaque, ...]:
    """Return the `images` of a message or a delta, as OpenRouter sends them."""
    found: list[Image | Opaque] = []
    for item in map(as_object, items_of(images)):
        others = {key: value for key, value in item.items() if key != "image_url"}
        image = image_of_url(item.get("image_url"), {"images": others})
        if image is not None:
            found.append(image)
        elif item:
            found.append(Opaque(DIALECT, item))
    return tuple(found)


class Speech:
    """The `audio` of an answer, joined from its pieces."""

    def __init__(self) -> None:
        self._fields: dict[str, Any] = {}
        self._data: list[str] = []
        self._transcript: list[str] = []

    def add(self, audio: Mapping[str, Any]) -> None:
        """Add a piece."""
        self._fields |= {key: audio[key] for key in ("id", "expires_at") if audio.get(key) is not None}
        self._data.append(as_text(audio.get("data")))
        self._transcript.append(as_text(audio.get("transcript")))

    def part(self) -> Audio:
        """Return the audio so far. Without data it has no bytes."""
        data = _bytes_of(self._data)
        transcript = "".join(self._transcript) or None
        return Audio(data=data, media_type=_sound_type(data), transcript=transcript, raw=self._fields or None)


def _bytes_of(pieces: list[str]) -> bytes:
    """Return the bytes of base64 that came in pieces: of base64 each, or of a longer base64 cut anywhere."""
    if any(len(piece) % 4 for piece in pieces):
        whole = "".join(pieces).rstrip("=")
        pieces = [whole + "=" * (-len(whole) % 4)]
    try:
        return b"".join([b64decode(piece) for piece in pieces])
    except ValueError:
        return b""


_LAYER_3: Final = [bytes([second]) for second in range(0xE0, 0x100) if second & 0x06 == 0x02]
"""The second bytes of a frame of MP3, after 0xFF. Samples often begin with 0xFF 0xFF."""


def _sound_type(data: bytes) -> str:
    """Return the media type of sound, by its first bytes. OpenAI's own format in streams is samples alone."""
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return "audio/wav"
    if data[:3] == b"ID3" or (data[:1] == b"\xff" and data[1:2] in _LAYER_3):
        return "audio/mpeg"
    return {b"OggS": "audio/ogg", b"fLaC": "audio/flac"}.get(data[:4], "audio/pcm")


# Beside the answer


def new_items(items: object, seen: list[Any]) -> list[Any]:
    """Return the items of a list that are not among those seen, and note them. Some services repeat their lists."""
    found: list[Any] = []
    for item in as_array(items):
        if item not in seen:
            seen.append(item)
            found.append(item)
    return found


def usage_of(usage: object) -> Usage | None:
    """Return the tokens of an OpenAI-like `usage`, of chat completions or of Responses; None without token counts."""
    if not isinstance(usage, dict):
        return None
    fields = cast("dict[str, Any]", usage)
    get = fields.get
    taken = get("prompt_tokens_details") or get("input_tokens_details")
    made = get("completion_tokens_details") or get("output_tokens_details")
    given = _count(get("prompt_tokens", get("input_tokens")))
    output = _count(get("completion_tokens", get("output_tokens")))
    cached = get("prompt_cache_hit_tokens", get("cached_tokens"))
    written: object = None
    reasoning: int | None = None
    if isinstance(taken, dict):
        details = cast("dict[str, Any]", taken)
        cached = details.get("cached_tokens", cached)
        written = details.get("cache_write_tokens", details.get("cache_creation_input_tokens"))  # DashScope's is last
    if isinstance(made, dict):
        reasoning = _count(cast("dict[str, Any]", made).get("reasoning_tokens"))
        if reasoning and output is not None and get("total_tokens") == (given or 0) + output + reasoning:
            output += reasoning  # xAI counts reasoning tokens separately
    if given is None and output is None:
        return None
    return Usage(
        input_tokens=given,
        output_tokens=output,
        cached_tokens=_count(cached),
        cache_write_tokens=_count(written),
        reasoning_tokens=reasoning,
    )


_BESIDE_TOKENS: Final = (
    "citation_tokens",
    "cost",
    "cost_details",
    "cost_in_usd_ticks",
    "num_search_queries",
    "num_server_side_tools_used",
    "num_sources_used",
    "search_context_size",
    "server_side_tool_usage_details",
)


def beside_tokens(usage: object) -> dict[str, Any]:
    """Return what services count beside tokens: searches, sources, money. Zeros are left out."""
    fields = as_object(usage)
    return {name: fields[name] for name in _BESIDE_TOKENS if fields.get(name)}


def _count(value: object) -> int | None:
    """Return `value` as a number of tokens, if it is a number. Some services send floats."""
    if type(value) is int:
        return value if 0 <= value <= MOST else None
    return int(value) if isinstance(value, float) and 0 <= value <= MOST else None
