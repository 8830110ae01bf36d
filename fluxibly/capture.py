"""Which content of calls goes into spans and events, and how it gets there. By default none does."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import attrs

from fluxibly import message_json, semconv
from fluxibly._checks import shown
from fluxibly._logs import report_once

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
    """The mode that was chosen, else what the environment says; for a bad value there, none, with a warning."""
    if chosen is not None:
        if chosen not in get_args(Capture):
            raise ValueError(f"Tracing(capture=…) is one of {', '.join(get_args(Capture))}, not {chosen!r}")
        return chosen
    value = os.environ.get(VARIABLE, "").strip()
    mode = _BY_VARIABLE.get(value.upper())
    if mode is None:
        valid = ", ".join(filter(None, _BY_VARIABLE))
        report_once(f"capture {value}", f"{VARIABLE}={value!r} is not one of {valid}; no content is captured")
        return "none"
    return mode


@attrs.frozen
class Captured:
    """What a call said: the request as it was sent, and the answer, `whole` or as far as it came."""

    request: Request
    answer: Response | None
    whole: bool = attrs.field(kw_only=True)

    def attributes(self, redact: message_json.Redact) -> dict[str, Any]:
        """The content, in the JSON schema of the semantic conventions."""
        messages = self.request.messages
        content: dict[str, Any] = {
            semconv.SYSTEM_INSTRUCTIONS: message_json.system_instructions(messages, redact),
            semconv.INPUT_MESSAGES: message_json.input_messages(messages, redact),
            semconv.TOOL_DEFINITIONS: message_json.tool_definitions(self.request.tools, redact),
        }
        if self.answer is not None and (self.whole or self.answer.has_output):
            content[semconv.OUTPUT_MESSAGES] = message_json.output_messages(
                self.answer, whole=self.whole, redact=redact
            )
        return {key: value for key, value in content.items() if value}


@attrs.frozen
class Capturing:
    """The user's choice: the mode, what to redact, and where events go."""

    mode: Capture
    redact: message_json.Redact | None
    logger_provider: LoggerProvider | None

    def record(self, captured: Captured, span: Span, context: Context, attributes: Mapping[str, Any]) -> None:
        """Put content onto the span (as JSON strings), and into an event with the span's `attributes`."""
        try:
            content = captured.attributes(message_json.unchanged if self.redact is None else self._redacted)
        except Exception as problem:  # noqa: BLE001  # `redact` is the user's, and without it nothing is shown
            _report(problem)
            return
        if self.mode in ("span", "both"):
            span.set_attributes({key: _encoded(value) for key, value in content.items()})
        if self.mode in ("event", "both"):
            self._emit({**attributes, **{key: _plain(value) for key, value in content.items()}}, context)

    def _emit(self, attributes: dict[str, Any], context: Context) -> None:
        from opentelemetry._logs import LogRecord, get_logger

        logger = get_logger("fluxibly", logger_provider=self.logger_provider)
        logger.emit(LogRecord(context=context, event_name=semconv.DETAILS_EVENT, attributes=attributes))

    def redacted(self, text: str) -> str:
        """An error's message, as far as the user lets it out."""
        if self.redact is None or not text:
            return text
        try:
            return self._redacted(text)
        except Exception as problem:  # noqa: BLE001  # as above
            _report(problem)
            return ""

    def _redacted(self, text: str) -> str:
        """What `redact` makes of a text, if that is one: whatever else it returns cannot be sent as such."""
        redacted: Any = None if self.redact is None else self.redact(text)
        if not isinstance(redacted, str):
            raise TypeError(f"redact returns a str, not {shown(redacted)}")
        return redacted


def _report(problem: Exception) -> None:
    report_once("redact", f"redact raised {type(problem).__name__}; such a call's content is not captured")


def _encoded(value: Any) -> str:
    import msgspec

    try:
        return msgspec.json.encode(value, enc_hook=str).decode()
    except (UnicodeEncodeError, ValueError):  # half of a surrogate pair, say, which a model may well produce
        plain = json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)  # NaN is no JSON
        return json.dumps(plain)


def _plain(value: Any) -> Any:
    """`value`, or what exporters can send of it, which refuse all of an attribute for one thing that is not JSON."""
    import msgspec

    try:
        msgspec.json.encode(value)
    except (TypeError, ValueError):  # an object among a tool's parameters, or half of a surrogate pair
        return json.loads(json.dumps(value, default=str, ensure_ascii=False).encode(errors="replace"))
    return value
