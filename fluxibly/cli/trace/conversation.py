"""The captured messages of calls. What an earlier call has said already is told apart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, Literal, TypeAlias, cast

import attrs

from fluxibly.cli.trace.facts import cut, one_line, shortened
from fluxibly.cli.trace.file import CONTENT, TracedSpan
from fluxibly.telemetry import semconv

HOW_TO_CAPTURE = (
    ("on the command line", "fluxibly chat --trace FILE --capture"),
    ("in code", 'Tracing(capture="span")'),
    ("for a whole program", "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT=SPAN_ONLY"),
)
"""The ways to record the messages of calls. By default they are not recorded."""
SHOWN = (*CONTENT, semconv.TOOL_CALL_ARGUMENTS, semconv.TOOL_CALL_RESULT)
"""Attributes that are shown as messages."""
_SHORT = 72
"""The longest JSON that stays on one line, in characters."""

Json: TypeAlias = Mapping[str, Any]


@attrs.frozen
class Part:
    """A part of a message. `name` is that of the tool that is called; the text of an `image` is its data URL."""

    kind: Literal["text", "reasoning", "call", "result", "image", "other"]
    text: str
    name: str = ""


@attrs.frozen
class Said:
    """A message. Numbers count from 0, over all messages that are shown."""

    number: int
    role: str
    title: str
    parts: Sequence[Part]


@attrs.frozen
class Conversation:
    """The messages of a call: the numbers of those that earlier calls have said, then the others.

    `question` is the text of the last message of a user, on one line, also if an earlier call has said it.
    """

    question: str
    earlier: Sequence[int]
    asked: Sequence[Said]
    answers: Sequence[Said]

    @property
    def messages(self) -> list[Said]:
        return [*self.asked, *self.answers]


class History:
    """The messages of all calls so far, in the order in which they are shown."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        """The number of a conversation's last message, by the digest of the whole conversation."""
        self._next = 0
        self._tools: dict[str, str] = {}
        """The names of the tools that the messages at hand call, by the ids of these calls."""

    def of(self, span: TracedSpan) -> Conversation | None:
        """Return the messages of a span, or None if none were captured. Ask in the order in which they are shown.

        Messages with which an earlier conversation began, or which it ended with, are `earlier`. The last question never
        is, so that each call shows what was asked.
        """
        system, asked, answers = _captured(span)
        if not (system or asked or answers):
            return None
        self._tools = {
            str(part.get("id")): _text(part.get("name"))
            for message in asked
            for part in _parts(message)
            if part.get("type") == "tool_call"
        }
        # What was cut in another instrumentation's span must not stand for the whole of it.
        digest = start = b"foreign" if span.foreign else b""
        earlier: list[int] = []
        questions: list[Said] = []
        for message in system:
            self._ask(message, _digest(start + b"system", message), span, questions, earlier)
        for message in asked[:-1]:
            digest = _digest(digest, message)
            self._ask(message, digest, span, questions, earlier)
        for message in asked[-1:]:
            digest = _digest(digest, message)
            questions.append(self._say(message, digest, span))
        choices = [
            self._say(answer, _digest(digest, answer), span, number, len(answers))
            for number, answer in enumerate(answers, 1)
        ]
        return Conversation(_question(asked), earlier, questions, choices)

    def _ask(self, message: Json, digest: bytes, span: TracedSpan, asked: list[Said], earlier: list[int]) -> None:
        """Add a message to those that are shown, or its number to those that were shown `earlier`."""
        if digest in self._numbers:
            earlier.append(self._numbers[digest])
        else:
            asked.append(self._say(message, digest, span))

    def _say(self, message: Json, digest: bytes, span: TracedSpan, choice: int = 1, choices: int = 1) -> Said:
        number = self._next
        self._next += 1
        self._numbers.setdefault(digest, number)
        which = f"choice {choice} of {choices}" if choices > 1 else ""
        return _said(number, message, span, self._tools, which)


def _question(asked: Sequence[Json]) -> str:
    for message in reversed(asked):
        if message.get("role") == "user":
            return one_line(
                " ".join(_text(part.get("content")) for part in _parts(message) if part.get("type") == "text")
            )
    return ""


def _captured(span: TracedSpan) -> tuple[list[Json], list[Json], list[Json]]:
    """Return the instructions (as at most one message), the messages that were sent, and the answers."""
    if span.attributes.get(semconv.OPERATION) == semconv.EXECUTE_TOOL:
        return [], *_tool_run(span)
    instructions: list[Json] = span.value(semconv.SYSTEM_INSTRUCTIONS) or []
    asked: list[Json] = span.value(semconv.INPUT_MESSAGES) or []
    answers: list[Json] = span.value(semconv.OUTPUT_MESSAGES) or []
    return [{"role": "system", "parts": instructions}] if instructions else [], asked, answers


def _tool_run(span: TracedSpan) -> tuple[list[Json], list[Json]]:
    """Return the arguments and the result of a tool's function, as messages."""
    given = span.attributes
    name = given.get(semconv.TOOL_NAME, "")
    asked = [{"type": "tool_call", "name": name, "arguments": given.get(semconv.TOOL_CALL_ARGUMENTS)}]
    answer = [{"type": "tool_call_response", "response": given.get(semconv.TOOL_CALL_RESULT)}]
    return (
        [{"role": "assistant", "parts": asked}] if semconv.TOOL_CALL_ARGUMENTS in given else [],
        [{"role": "tool", "parts": answer}] if semconv.TOOL_CALL_RESULT in given else [],
    )


def _digest(before: bytes, message: Json) -> bytes:
    """Return a digest of a conversation: of its digest before the last message, and of that message's content."""
    content = as_text([message.get("role"), message.get("name"), _parts(message)])
    return blake2b(before + content.encode(), digest_size=16).digest()


def _parts(message: Json) -> Sequence[Json]:
    """Return the parts of a message; other instrumentations may write its text as `content`."""
    parts: Sequence[Json] | None = message.get("parts")
    if parts is None and message.get("content"):
        return [{"type": "text", "content": message["content"]}]
    return parts or []


def _said(number: int, message: Json, span: TracedSpan, tools: Mapping[str, str], choice: str) -> Said:
    role = one_line(_text(message.get("role")))
    parts = _parts(message)
    answered = [tools.get(str(part.get("id")), "") for part in parts if part.get("type") == "tool_call_response"]
    title = " · ".join(filter(None, (role, *answered, choice, _ending(message))))
    read = [_part(part) for part in parts]
    if span.foreign:
        role, title, read = shortened(role), shortened(title), [*map(_cut, read)]
    return Said(number, role, title, read)


def _ending(message: Json) -> str:
    """Return why the message ended, or "" for an ordinary end."""
    reason = _text(message.get("finish_reason") or "stop")
    return {"stop": "", "error": "cut off", "length": "cut at the length limit"}.get(reason, reason.replace("_", " "))


def _part(part: Json) -> Part:
    kind = part.get("type")
    if kind == "text":
        return Part("text", _text(part.get("content")))
    if kind == "reasoning":
        return Part("reasoning", _text(part.get("content")))
    if kind == "tool_call":
        return Part("call", readable(part.get("arguments")), _text(part.get("name")))
    if kind == "tool_call_response":
        return Part("result", readable(part.get("response")))
    if kind == "blob":
        mime_type, content = _text(part.get("mime_type")), _text(part.get("content"))
        if mime_type.startswith("image/"):
            return Part("image", f"data:{mime_type};base64,{content}")
        return Part("other", f"[{mime_type or _text(part.get('modality')) or 'data'}, {len(content) * 3 // 4:,} bytes]")
    return Part("other", readable(part))


def _cut(part: Part) -> Part:
    """Return a part of another instrumentation's message, which may hold whole documents."""
    if part.kind == "image":
        return Part("other", image_line(part))
    return attrs.evolve(part, text=cut(part.text), name=shortened(part.name))


def image_line(part: Part) -> str:
    """Return an image in words."""
    header, _, data = part.text.partition(";base64,")
    return f"[{header.removeprefix('data:')}, {len(data) * 3 // 4:,} bytes]"


def _text(value: object) -> str:
    return "" if value is None else as_text(value)


def as_text(value: Any) -> str:
    """Return a str as it is, and any other value as JSON on one line."""
    try:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "(nested too deeply to be shown)"


def readable(value: Any) -> str:
    """Return JSON, or a str that holds JSON, on one line if short and else indented. Return other text as it is."""
    text = as_text(value)
    if len(text) <= _SHORT:
        return text
    try:
        return _indented(json.loads(value) if isinstance(value, str) else value)
    except (ValueError, RecursionError):  # plain text, or JSON that is nested too deeply to indent
        return text


def _indented(value: Any, margin: str = "") -> str:
    """Return JSON with a line for each member; short values stay on one line.

    Raises:
        RecursionError: the value is nested too deeply.
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
