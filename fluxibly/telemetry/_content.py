"""The content of calls in spans and events: how much is captured (by default none), and in which JSON format.

The JSON format is that of OpenTelemetry's `gen_ai.*.messages` attributes (semantic-conventions-genai,
gen-ai-input-messages.json and its siblings). Every text passes through `redact` first, including tool arguments and
their names, image data and the names of participants. The names of tools and roles do not, nor do the keys of the
tools' JSON Schemas.
"""

from __future__ import annotations

import json
import os
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import attrs

from fluxibly._checks import kind_of
from fluxibly._logs import report_once
from fluxibly.messages import Message, Tool
from fluxibly.parts import Media, Part, Reasoning, Text, ToolCall
from fluxibly.telemetry import semconv
from fluxibly.types import Response

if TYPE_CHECKING:
    from opentelemetry._logs import LoggerProvider
    from opentelemetry.context import Context
    from opentelemetry.trace import Span

    from fluxibly.types import Request, Response


Capture: TypeAlias = Literal["none", "span", "event", "both"]

VARIABLE = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
_BY_VARIABLE: dict[str, Capture] = {
    "": "none",
    "NO_CONTENT": "none",
    "SPAN_ONLY": "span",
    "EVENT_ONLY": "event",
    "SPAN_AND_EVENT": "both",
}


def capture_mode(chosen: Capture | None) -> Capture:
    """Return the chosen mode, or else the mode that the environment variable sets.

    An invalid value of the variable is reported, and means "none".
    """
    if chosen is not None:
        if chosen not in get_args(Capture):
            expected = ", ".join(map(repr, get_args(Capture)))
            raise ValueError(f"Tracing(capture=…): expected one of {expected}, got {chosen!r}")
        return chosen
    value = os.environ.get(VARIABLE, "").strip()
    mode = _BY_VARIABLE.get(value.upper())
    if mode is None:
        valid = ", ".join(filter(None, _BY_VARIABLE))
        report_once(f"capture {value}", f"{VARIABLE}: expected one of {valid}, got {value!r}; no content is captured")
        return "none"
    return mode


_by_default: list[Capture] = []


def capture_by_default(mode: Capture) -> None:
    """Set the mode of every `Tracing` that names none and uses the global SDK. It precedes the environment variable."""
    _by_default[:] = [mode]


@attrs.frozen
class Captured:
    """The content of a call: the request as it was sent, and the answer. `whole` is false if the answer is partial."""

    request: Request
    answer: Response | None
    whole: bool = attrs.field(kw_only=True)

    def attributes(self, redact: Redact) -> dict[str, Any]:
        """Return the content in the JSON format of the semantic conventions."""
        messages = self.request.messages
        content: dict[str, Any] = {
            semconv.SYSTEM_INSTRUCTIONS: system_instructions(messages, redact),
            semconv.INPUT_MESSAGES: input_messages(messages, redact),
            semconv.TOOL_DEFINITIONS: tool_definitions(self.request.tools, redact),
        }
        if self.answer is not None and (self.whole or self.answer.has_output):
            content[semconv.OUTPUT_MESSAGES] = output_messages(self.answer, whole=self.whole, redact=redact)
        return {key: value for key, value in content.items() if value}


@attrs.frozen
class Capturing:
    """The user's settings: the capture mode, the redact function, and the logger provider for events."""

    mode: Capture
    redact: Redact | None
    logger_provider: LoggerProvider | None

    def by_default(self) -> Capturing:
        """Return these settings with the mode that `setup(capture=…)` has set, if it has."""
        return attrs.evolve(self, mode=_by_default[0]) if _by_default else self

    def record(self, captured: Captured, span: Span, context: Context, attributes: Mapping[str, Any]) -> None:
        """Record the content on the span (as JSON strings), in an event with the span's `attributes`, or in both."""
        on_span: dict[str, Any] = {}
        in_event: dict[str, Any] = {}
        try:
            content = captured.attributes(unchanged if self.redact is None else self._redacted)
            if self.mode in ("span", "both"):
                on_span = {key: _encoded(value) for key, value in content.items()}
            if self.mode in ("event", "both"):
                in_event = {key: _plain(value) for key, value in content.items()}
        except RecursionError:
            _report_deep()
            return
        except Exception as problem:  # noqa: BLE001  # the user's `redact` failed, so no content may be recorded
            _report(problem)
            return
        if self.mode in ("span", "both"):
            span.set_attributes(on_span)
        if self.mode in ("event", "both"):
            self._emit({**attributes, **in_event}, context)

    def of_tool(self, make: Callable[[Redact], Any]) -> str | None:
        """Return the arguments or the result of a tool, which `make` makes, for its span; None if they are not captured."""
        if self.mode not in ("span", "both"):
            return None
        try:
            content = make(unchanged if self.redact is None else self._redacted)
            return content if isinstance(content, str) else _encoded(content)
        except RecursionError:
            _report_deep()
        except Exception as problem:  # noqa: BLE001  # the user's `redact` failed, so no content may be recorded
            _report(problem)
        return None

    def _emit(self, attributes: dict[str, Any], context: Context) -> None:
        from opentelemetry._logs import LogRecord, get_logger

        logger = get_logger("fluxibly", logger_provider=self.logger_provider)
        logger.emit(LogRecord(context=context, event_name=semconv.DETAILS_EVENT, attributes=attributes))

    def redacted(self, text: str) -> str:
        """Return an error's message after redaction, or an empty string if `redact` fails."""
        if self.redact is None or not text:
            return text
        try:
            return self._redacted(text)
        except Exception as problem:  # noqa: BLE001  # the user's `redact` failed, so no content may be recorded
            _report(problem)
            return ""

    def _redacted(self, text: str) -> str:
        """Return the result of `redact`, which must be a str, because an attribute's text cannot be anything else."""
        redacted: Any = None if self.redact is None else self.redact(text)
        if not isinstance(redacted, str):
            raise TypeError(f"redact: expected a str as its result, got {kind_of(redacted)}")
        return redacted


def _report(problem: Exception) -> None:
    report_once(
        "redact", f"redact raised {type(problem).__name__}; content is not captured for calls in which it raises"
    )


def _report_deep() -> None:
    report_once("deep content", "content is not captured for calls in which it is nested too deeply")


def _encoded(value: Any) -> str:
    import msgspec

    try:
        return msgspec.json.encode(value, enc_hook=str).decode()
    except (UnicodeEncodeError, ValueError):  # for example half of a surrogate pair, which a model may well produce
        plain = json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)  # NaN is not valid JSON
        return json.dumps(plain)


def _plain(value: Any) -> Any:
    """Return `value` in a form that exporters can send.

    An exporter rejects the whole attribute if any part of it is not JSON.
    """
    import msgspec

    try:
        msgspec.json.encode(value)
    except (TypeError, ValueError):  # a Python object among a tool's parameters, or half of a surrogate pair
        return json.loads(json.dumps(value, default=str, ensure_ascii=False).encode(errors="replace"))
    return value


Redact: TypeAlias = Callable[[str], str]
Json: TypeAlias = dict[str, Any]


def unchanged(text: str) -> str:
    """Return `text` as it is: the `redact` function that changes nothing."""
    return text


def system_instructions(messages: Iterable[Message], redact: Redact = unchanged) -> list[Json]:
    """Return the parts of the system messages that open a conversation."""
    parts: list[Json] = []
    for message in messages:
        if message.role != "system":
            break
        parts.extend(_parts(message.content, redact))
    return parts


def input_messages(messages: Iterable[Message], redact: Redact = unchanged) -> list[Json]:
    """Return the conversation without the system messages that open it."""
    opened = False
    found: list[Json] = []
    for message in messages:
        opened = opened or message.role != "system"
        if opened:
            found.append(_message(message, redact))
    return found


def output_messages(response: Response, *, whole: bool, redact: Redact = unchanged) -> list[Json]:
    """Return an answer and its alternatives.

    A finish reason is always present. Where the service reported none, it is `tool_call` or `stop` for a `whole`
    answer, and `error` for a partial answer.
    """
    found: list[Json] = []
    for choice in (response, *response.alternatives):
        parts = list(_parts(choice.parts, redact))
        usual = ("tool_call" if choice.tool_calls else "stop") if whole else "error"
        reason = choice.finish_reason or usual
        found.append({"role": "assistant", "parts": parts, "finish_reason": reason})
    return found


def tool_definitions(tools: Iterable[Tool], redact: Redact = unchanged) -> list[Json]:
    """Return the definitions of the tools that the model may call."""
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
        parts.extend(_media(part, redact) for part in message.content if isinstance(part, Media))
    else:
        parts = list(_parts(message.parts, redact))
    found: Json = {"role": message.role, "parts": parts}
    if message.name is not None:
        found["name"] = message.name if message.role == "tool" else redact(message.name)
    return found


def _parts(parts: Iterable[Part], redact: Redact) -> Iterable[Json]:
    """Yield the parts of a message. Reasoning that only the service can read, and empty text, are left out."""
    for part in parts:
        if isinstance(part, Text):
            if part.text:
                yield {"type": "text", "content": redact(part.text)}
        elif isinstance(part, Reasoning):
            if part.text:
                yield {"type": "reasoning", "content": redact(part.text)}
        elif isinstance(part, ToolCall):
            yield _tool_call(part, redact)
        elif isinstance(part, Media):
            yield _media(part, redact)
        else:
            yield {"type": part.type or "opaque", "content": _redacted(part.raw, redact, keys=True)}


def _media(media: Media, redact: Redact) -> Json:
    modality = type(media).__name__.lower()
    if media.url is None:
        data = b64encode(media.data or b"").decode()
        return {"type": "blob", "modality": modality, "mime_type": media.media_type, "content": redact(data)}
    header, comma, data = media.url.partition(";base64,")
    if comma and header.startswith("data:"):
        mime_type = header.removeprefix("data:").partition(";")[0] or None
        return {"type": "blob", "modality": modality, "mime_type": mime_type, "content": redact(data)}
    return {"type": "uri", "modality": modality, "mime_type": media.media_type, "uri": redact(media.url)}


def _tool_call(call: ToolCall, redact: Redact) -> Json:
    return {"type": "tool_call", "id": call.id, "name": call.name, "arguments": tool_arguments(call, redact)}


def tool_arguments(call: ToolCall, redact: Redact = unchanged) -> Any:
    """Return the arguments of a tool call as a JSON value; a str if they are not JSON."""
    return redact(call.raw_arguments) if call.error else _redacted(call.arguments, redact, keys=True)


def tool_result(message: Message, redact: Redact = unchanged) -> Any:
    """Return a tool's result: its text, or its parts if it has media."""
    if any(isinstance(part, Media) for part in message.content):
        return list(_parts(message.content, redact))
    return redact(message.text)


def _redacted(value: Any, redact: Redact, *, keys: bool = False) -> Any:
    """Return a JSON value with every text in it redacted, and with `keys` also the keys of its objects."""
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
