"""The messages of a call in a trace, as HTML."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, cast

from fluxibly import semconv
from fluxibly.trace_file import TracedSpan

_SHORT = 72
"""The longest JSON that stays on one line, in characters."""


def conversation(span: TracedSpan) -> str:
    """What was said in a call, where it was captured; else an empty text."""
    return "".join(_messages(span))


def as_text(value: Any) -> str:
    """A text as it is, and anything else as JSON in one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _messages(span: TracedSpan) -> Iterator[str]:
    instructions: list[Any] = span.value(semconv.SYSTEM_INSTRUCTIONS) or []
    if instructions:
        yield _message({"role": "system", "parts": instructions}, {}, "")
    asked: list[dict[str, Any]] = span.value(semconv.INPUT_MESSAGES) or []
    answers: list[dict[str, Any]] = span.value(semconv.OUTPUT_MESSAGES) or []
    tools = {
        str(part.get("id")): str(part.get("name"))
        for message in asked
        for part in message.get("parts", ())
        if part.get("type") == "tool_call"
    }
    for message in asked:
        yield _message(message, tools, "")
    for number, message in enumerate(answers, 1):
        yield _message(message, tools, f"choice {number} of {len(answers)}" if len(answers) > 1 else "")


def _message(message: Mapping[str, Any], tools: Mapping[str, str], choice: str) -> str:
    role = str(message.get("role", ""))
    parts: list[dict[str, Any]] = message.get("parts") or []
    answered = [tools.get(str(part.get("id")), "") for part in parts if part.get("type") == "tool_call_response"]
    title = escape(" · ".join(filter(None, (role, *answered, choice, _ending(message)))))
    shown = "".join(map(_part, parts)) or '<p class="none">no text</p>'
    return f'<div class="message {escape(role)}"><div class="role">{title}</div>{shown}</div>'


def _ending(message: Mapping[str, Any]) -> str:
    """How the message ended, if that is worth telling."""
    reason = str(message.get("finish_reason") or "stop")
    return {"stop": "", "error": "cut off", "length": "cut at the length limit"}.get(reason, reason.replace("_", " "))


def _part(part: Mapping[str, Any]) -> str:
    kind = part.get("type")
    if kind in ("text", "reasoning"):
        return f'<p class="{kind}" dir="auto">{escape(str(part.get("content", "")))}</p>'
    if kind == "tool_call":
        name = escape(str(part.get("name")))
        return f"<pre><b>{name}</b>({escape(readable(part.get('arguments')))})</pre>"
    if kind == "tool_call_response":
        return f'<pre dir="auto">{escape(readable(part.get("response")))}</pre>'
    if kind == "blob" and str(part.get("mime_type", "")).startswith("image/"):
        source = f"data:{part['mime_type']};base64,{part.get('content', '')}"
        return f'<img alt="image" src="{escape(source)}">'
    return f"<pre>{escape(readable(part))}</pre>"


def readable(value: Any) -> str:
    """JSON on one line if it is short, else indented; also JSON that is given as a text. Other texts as they are."""
    text = as_text(value)
    if len(text) <= _SHORT:
        return text
    try:
        return _indented(json.loads(value) if isinstance(value, str) else value)
    except (ValueError, RecursionError):  # a text, or JSON that is nested too deeply to lay out
        return text


def _indented(value: Any, margin: str = "") -> str:
    """JSON with a line for each member; what is short stays on its line.

    Raises:
        RecursionError: it is nested too deeply.
    """
    text = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or len(margin) + len(text) <= _SHORT:
        return text
    inner = margin + "  "
    if isinstance(value, dict):
        named = cast("Mapping[str, Any]", value)
        members = [f"{json.dumps(key, ensure_ascii=False)}: {_indented(item, inner)}" for key, item in named.items()]
        opening, closing = "{}"
    else:
        members = [_indented(item, inner) for item in cast("Sequence[Any]", value)]
        opening, closing = "[]"
    return f"{opening}\n{inner}" + f",\n{inner}".join(members) + f"\n{margin}{closing}"
