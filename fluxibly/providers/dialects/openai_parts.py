"""Parts of OpenAI-like responses as fluxibly's types: content, tool calls, reasoning, usage, finish reasons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, cast

from fluxibly.providers.dialects.decoding import to_json
from fluxibly.providers.dialects.json_values import as_object, as_text
from fluxibly.types import Reasoning, ToolCallDelta, Usage

_FINISH_REASONS: Final[Mapping[str, str]] = {
    "stop": "stop",
    "eos": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "max_tokens": "length",
    "model_length": "length",
    "content_filter": "content_filter",
    "refusal": "content_filter",
    "safety": "content_filter",
    "tool_calls": "tool_call",
    "tool_call": "tool_call",
    "tool_use": "tool_call",
    "function_call": "tool_call",
    "error": "error",
    "insufficient_system_resource": "error",
}


def finish_reason_of(raw: str) -> str:
    """Return a service's finish reason in the terms of `FINISH_REASONS`. Unknown reasons are passed on unchanged."""
    return _FINISH_REASONS.get(raw.lower(), raw)


def content_of(content: object) -> tuple[str, str]:
    """Return the text and the reasoning of a `content`, which is a string, null, or a list of parts."""
    if isinstance(content, str):
        return content, ""
    texts: list[str] = []
    thoughts: list[str] = []
    for part in _parts(content):
        if isinstance(part, str):
            texts.append(part)
        else:
            fields = as_object(part)
            thoughts += [
                thought if isinstance(thought, str) else as_text(as_object(thought).get("text"))
                for thought in _parts(fields.get("thinking"))
            ]
            texts.append(as_text(fields.get("text")) or as_text(fields.get("refusal")))
    return "".join(texts), "".join(thoughts)


def _parts(value: object) -> list[object]:
    """Return a list of parts from a value that may be a list, a single part or None."""
    if value is None:
        return []
    return cast("list[object]", value) if isinstance(value, list) else [value]


def tool_call_deltas(calls: object) -> tuple[ToolCallDelta, ...]:
    """Return the fragments of tool calls in a delta, or the calls of a message.

    A negative `index` and an empty id or name count as missing. Arguments may be null, text or an object.
    """
    deltas: list[ToolCallDelta] = []
    for call in _parts(calls):
        fields = as_object(call)
        if not fields:
            continue
        function = as_object(fields.get("function")) or fields
        index: object = fields.get("index")
        deltas.append(
            ToolCallDelta(
                index=index if type(index) is int and index >= 0 else None,
                id=word_of(fields.get("id")),
                name=word_of(function.get("name")),
                arguments=_arguments(function.get("arguments")),
            )
        )
    return tuple(deltas)


def word_of(value: object) -> str | None:
    """Return an id, a name or a reason as text, because some services send numbers. "" counts as missing."""
    return str(value) if isinstance(value, (str, int)) and value != "" else None


def _arguments(value: object) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else to_json(value)


class Details:
    """OpenRouter's `reasoning_details` of a choice: fragments joined into blocks, which are sent back unchanged.

    A fragment continues the previous block if they share type and index. Each block may have text, a summary or data,
    and a signature, which comes last.
    """

    _JOINED: Final = ("text", "summary", "data")

    def __init__(self) -> None:
        self._blocks: list[dict[str, Any]] = []

    def add(self, details: object) -> str:
        """Add fragments, and return their readable text."""
        said: list[str] = []
        for detail in cast("list[object]", details) if isinstance(details, list) else []:
            if isinstance(detail, dict):
                fields = cast("dict[str, Any]", detail)
                said.extend(fields[key] for key in ("text", "summary") if isinstance(fields.get(key), str))
                self._join(fields)
        return "".join(said)

    def _join(self, fields: dict[str, Any]) -> None:
        last = self._blocks[-1] if self._blocks else None
        if last is None or (last.get("type"), last.get("index")) != (fields.get("type"), fields.get("index")):
            self._blocks.append(dict(fields))
            return
        for key, value in fields.items():
            if key in self._JOINED and isinstance(last.get(key), str) and isinstance(value, str):
                last[key] += value
            elif value is not None:
                last[key] = value

    def parts(self) -> tuple[Reasoning, ...]:
        """Return the blocks so far."""
        return tuple(
            Reasoning(
                text=next((block[key] for key in ("text", "summary") if isinstance(block.get(key), str)), ""),
                signature=word_of(block.get("signature")),
                raw=block,
            )
            for block in self._blocks
        )


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
        cached, written = details.get("cached_tokens", cached), details.get("cache_write_tokens")
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


def _count(value: object) -> int | None:
    """Return `value` as a number of tokens, if it is a number. Some services send floats."""
    if type(value) is int:
        return value if value >= 0 else None
    return int(value) if isinstance(value, float) and 0 <= value < 1e15 else None
