"""Pure codec for Ollama's own dialects, `/api/chat` and `/api/generate`.

https://github.com/ollama/ollama/blob/main/docs/api.md
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import attrs

from fluxibly._checks import kind_of
from fluxibly._inline_thinking import InlineThinking
from fluxibly.aggregate import Aggregator
from fluxibly.errors import NotFound, ProviderError, ServerError, StreamProtocolError
from fluxibly.providers.dialects.codec import Encoded, Event, Framing
from fluxibly.providers.dialects.decoding import (
    PendingFields,
    arguments_text,
    base64_bytes,
    cut_off,
    not_an_answer,
)
from fluxibly.providers.dialects.encoding import (
    bad_request,
    format_of,
    media_data,
    reject_unsupported,
    sent_arguments,
    system_text,
    tool_name,
    write_json,
)
from fluxibly.providers.dialects.errors import Report, error_of, excerpt, read_report
from fluxibly.providers.dialects.json_values import as_array, as_count, as_object, as_text, read_json
from fluxibly.providers.dialects.schemas import SchemaLearner
from fluxibly.types import Chunk, Image, Message, Part, Reasoning, Request, Response, Text, Tool, ToolCallDelta, Usage

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


NAME = "Ollama"
EFFORTS = ("low", "medium", "high")
"""Effort levels of the models that support levels (gpt-oss). For other models, any level turns thinking on."""


# Responses


FINISH_REASONS = {"stop": "stop", "length": "length"}
"""Other reasons are passed on unchanged, such as load (the request only loaded the model)."""

_PLAIN = frozenset({"model", "created_at", "message", "role", "content", "response", "done"})
"""The fields of most lines, and of their messages."""
_KINDS = ((b"\xff\xd8", "image/jpeg"), (b"GIF8", "image/gif"), (b"RIFF", "image/webp"), (b"", "image/png"))
"""How images begin, and their media types."""
_MISSING = re.compile(r"model ['\"]?([^'\"\s]+)['\"]? (?:not found|does not exist)|pull model manifest")


@attrs.frozen(kw_only=True)
class OllamaCodec(SchemaLearner):
    """Codec for `POST /api/chat`, or for `POST /api/generate`, which takes a single message and no tools."""

    endpoint: Literal["chat", "generate"] = attrs.field(
        default="chat", validator=attrs.validators.in_(("chat", "generate"))
    )

    @property
    def framing(self) -> Framing:
        return "ndjson"

    def encode(self, request: Request, /, *, stream: bool) -> Encoded:
        body = encode_body(self.with_known_form(request), stream=stream, chat=self.endpoint == "chat")
        return Encoded(f"/api/{self.endpoint}", write_json(body, request))

    def decode(self, body: bytes, /) -> Response:
        raw = read_json(body)
        joined = Aggregator()
        decoder = OllamaDecoder()
        for chunk in decoder.take(raw, body):
            joined.add(chunk)
        answer = as_object(raw)
        if not isinstance(answer.get("message"), dict) and not isinstance(answer.get("response"), str):
            raise not_an_answer(raw, body, NAME, "'message' or 'response'")
        if answer.get("done") is False:
            raise cut_off(NAME, "'done': true")
        return joined.response().evolve(raw=raw)

    def decoder(self) -> OllamaDecoder:
        return OllamaDecoder()

    def decode_error(self, status: int, headers: Mapping[str, str], body: bytes, /) -> ProviderError:
        try:
            payload: object = read_json(body)
        except StreamProtocolError:
            payload = None
        report = read_report(payload) or Report(message=excerpt(body) or "")
        return _error(report, payload, body, status, headers)


class OllamaDecoder:
    """State of a stream. Each line is a response with only new content; the last line has `done` and the durations."""

    __slots__ = ("_calls", "_held", "_inline", "_markup", "_named", "_plain", "_thinking", "_thoughts", "done")

    def __init__(self) -> None:
        self._held = PendingFields()
        self._named = False
        self._calls = 0
        self._thinking: list[str] = []
        """The thinking since other output."""
        self._inline = InlineThinking()
        self._thoughts: list[str] = []
        """The reasoning that was separated from the text, since it was last completed."""
        self._markup = 0
        """The number of characters of the inline reasoning that are complete."""
        self._plain = False
        """Whether all further text is the answer's."""
        self.done = False

    def decode_event(self, event: Event, /) -> Iterable[Chunk]:
        return self.take(read_json(event.data), event.data)

    def end(self) -> Iterable[Chunk]:
        if not self.done:
            yield from self._held.flush()
            raise cut_off(NAME, "'done': true")

    def take(self, payload: object, body: bytes) -> Iterable[Chunk]:
        """Return the chunks of a line, or of a whole response."""
        answer = as_object(payload)
        if answer.get("error") or not (isinstance(answer.get("message"), dict) or "response" in answer):
            report = read_report(payload)
            if report is not None:
                raise _error(report, payload, body, report.status, {})
        if not self._named:
            self._named = True
            self._held.add(model=as_text(answer.get("model")) or None)
        message = as_object(answer.get("message"))
        text = as_text(message.get("content")) or as_text(answer.get("response"))
        self.done = answer.get("done") is True
        plain = text and self._plain and not self._thinking and not self.done
        if plain and answer.keys() <= _PLAIN and message.keys() <= _PLAIN:  # as nearly always
            return self._held.emit(text)
        if answer.get("logprobs"):
            self._held.add(details={"logprobs": as_array(answer["logprobs"])})
        return self._take(answer, message, text)

    def _take(self, answer: dict[str, Any], message: dict[str, Any], text: str) -> Iterable[Chunk]:
        thinking = as_text(message.get("thinking")) or as_text(answer.get("thinking"))
        calls = [as_object(call) for call in as_array(message.get("tool_calls"))]
        images = as_array(message.get("images")) or ([answer["image"]] if answer.get("image") else [])
        output: dict[str, Any] = {}
        parts: list[Part] = []
        if thinking:
            self._thinking.append(thinking)
            output["reasoning"] = thinking
        if not self._plain:
            text, thought, inline = self._separate(text, interrupted=bool(calls or images))
            if thought:
                output["reasoning"] = thinking + thought
            parts += inline
        if self._thinking and (text or calls or images or parts or self.done):
            whole = "".join(self._thinking)
            self._thinking.clear()
            parts.insert(0, Reasoning(text=whole, raw={"thinking": whole}))
        found = [image for data in images if (image := _image(data)) is not None]
        parts += found
        if calls:
            output["tool_calls"] = tuple([_call(call, index) for index, call in enumerate(calls, self._calls)])
            self._calls += len(calls)
        if self.done:
            self._finish(answer)
        if text or output or found:
            return self._held.emit(text, parts=tuple(parts), **output)
        self._held.add(parts=parts or None)
        return self._held.flush() if self.done else ()

    def _separate(self, text: str, *, interrupted: bool) -> tuple[str, str, list[Part]]:
        """Return the text, the reasoning that the model wrote into it, and that reasoning if it is complete."""
        text, thought = self._inline.split(text) if text else ("", "")
        if interrupted:
            text += self._inline.interrupt()
        if self.done:
            text, thought = (before + last for before, last in zip((text, thought), self._inline.rest(), strict=True))
        if thought:
            self._thoughts.append(thought)
        self._plain = self._inline.over or self.done
        markup = self._inline.markup[self._markup :] if self._plain or interrupted else ""
        if not markup:
            return text, thought, []
        self._markup += len(markup)
        reasoning = Reasoning(text="".join(self._thoughts), raw={"content": markup})
        self._thoughts.clear()
        return text, thought, [reasoning]

    def _finish(self, answer: dict[str, Any]) -> None:
        reason = as_text(answer.get("done_reason")) or None  # versions before 0.1.40 omit it
        finish = FINISH_REASONS.get(reason or "stop", reason)
        if finish == "stop" and self._calls:
            finish = "tool_call"  # the service reports "stop" for tool calls too
        self._held.add(finish_reason=finish, raw_finish_reason=reason, usage=_usage(answer))


def _image(data: object) -> Image | None:
    """Return an image that a model made. The service does not say its media type."""
    found = base64_bytes(as_text(data))
    if found is None:
        return None
    return Image(data=found, media_type=next(kind for start, kind in _KINDS if found.startswith(start)))


def _call(call: dict[str, Any], index: int) -> ToolCallDelta:
    """Return a tool call, which arrives whole with an object as arguments. Only newer versions send an id."""
    function = as_object(call.get("function"))
    return ToolCallDelta(
        index=index,
        id=as_text(call.get("id")) or f"call_{index}",
        name=as_text(function.get("name")),
        arguments=arguments_text(function.get("arguments")),
    )


def _usage(answer: dict[str, Any]) -> Usage | None:
    read, written = as_count(answer.get("prompt_eval_count")), as_count(answer.get("eval_count"))
    return None if read is None and written is None else Usage(input_tokens=read, output_tokens=written)


def _error(
    report: Report, payload: object, body: bytes, status: int | None, headers: Mapping[str, str]
) -> ProviderError:
    """Return the error of a report. Only the message distinguishes errors, because the service sends no codes."""
    missing = _MISSING.search(report.message) if status in (None, 404) else None
    if missing:
        pull = f"get it with: ollama pull {missing[1]}" if missing[1] else "check its name at ollama.com/library"
        return NotFound(
            f"{NAME} does not have the model ({report.message}); {pull}",
            status=status,
            code=report.code,
            body=excerpt(body),
        )
    error = error_of(report, status=status, headers=headers, payload=payload, excerpt=excerpt(body), service=NAME)
    if isinstance(error, ServerError) and "more system memory" in report.message:
        error.retryable = False
    return error


# Requests


_OPTIONS = {
    "temperature": "temperature",
    "max_tokens": "num_predict",
    "top_p": "top_p",
    "top_k": "top_k",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "seed": "seed",
}


def encode_body(request: Request, *, stream: bool, chat: bool) -> dict[str, Any]:
    """Return the request body, without `extra`.

    Raises:
        BadRequest: the dialect does not support a parameter or its value.
    """
    reject_unsupported(request, NAME, ("n",))
    body: dict[str, Any] = {"model": request.model, "stream": stream}  # the service streams by default
    if chat:
        with_tools = bool(request.tools) or any(message.tool_calls for message in request.messages)
        body["messages"] = [_message(message, request, with_tools=with_tools) for message in request.messages]
        body |= _tools(request)
    else:
        body |= _prompt(request)
    options = {name: getattr(request, ours) for ours, name in _OPTIONS.items() if getattr(request, ours) is not None}
    if request.stop:
        options["stop"] = list(request.stop)
    if options:
        body["options"] = options
    wanted = format_of(request)
    if wanted is not None and wanted != "text":
        body["format"] = wanted if wanted == "json" else wanted.schema
    effort = request.reasoning_effort
    if effort is not None:
        if effort not in ("none", *EFFORTS):
            known = ", ".join(["none", *EFFORTS])
            raise bad_request(request, f"reasoning_effort: expected one of {known} for {NAME}, got {effort!r}")
        body["think"] = False if effort == "none" else effort
    return body


def _message(message: Message, request: Request, *, with_tools: bool) -> dict[str, Any]:
    """Return a message. In a conversation with tools, reasoning that a model wrote into its text goes back there."""
    raws = [part.raw for part in message.reasoning if part.raw is not None]
    inline = "".join([raw["content"] for raw in raws if {*raw} == {"content"}]) if with_tools else ""
    encoded: dict[str, Any] = {"role": message.role, "content": inline + message.text}
    images = _images(message, request)
    if images:
        encoded["images"] = images
    if message.role == "tool":
        encoded["tool_name"] = tool_name(message, request, NAME)
        encoded["tool_call_id"] = message.tool_call_id or ""
    ours = [part.text for part in message.reasoning if part.raw == {"thinking": part.text}]
    if ours:
        encoded["thinking"] = "".join(ours)
    if message.tool_calls:
        encoded["tool_calls"] = [
            {"id": call.id, "function": {"index": index, "name": call.name, "arguments": sent_arguments(call)}}
            for index, call in enumerate(message.tool_calls)
        ]
    return encoded


def _images(message: Message, request: Request) -> list[str]:
    encoded: list[str] = []
    for part in message.content:
        if isinstance(part, Text):
            continue
        if not isinstance(part, Image):
            raise bad_request(request, f"expected only text and images for {NAME}, got {kind_of(part)}")
        data = media_data(part)
        if data is None:
            raise bad_request(
                request, f"expected an Image with data= and media_type= for {NAME}, got a url=, which it does not fetch"
            )
        encoded.append(data[1])
    return encoded


def _tools(request: Request) -> dict[str, Any]:
    if request.tool_choice not in (None, "auto", "none"):
        raise bad_request(request, f"tool_choice: expected 'auto' or 'none' for {NAME}, got {request.tool_choice!r}")
    if not request.tools or request.tool_choice == "none":
        return {}  # without tools, the model cannot call any
    return {"tools": [_tool(tool, request) for tool in request.tools]}


def _tool(tool: Tool, request: Request) -> dict[str, Any]:
    if tool.strict:
        raise bad_request(
            request, f"{NAME} does not support strict tools, got strict=True for {tool.name}; leave strict out"
        )
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def _prompt(request: Request) -> dict[str, Any]:
    """Return the prompt of `/api/generate`, which supports neither conversations nor tools."""
    where = "/api/generate (framework ollama-generate)"
    if request.tools or request.tool_choice is not None:
        raise bad_request(request, f"{NAME}'s {where} does not support tools; use the framework ollama")
    turns = [message for message in request.messages if message.role != "system"]
    if len(turns) != 1 or turns[0].role != "user":
        raise bad_request(request, f"{NAME}'s {where} supports only a single user message; use the framework ollama")
    body: dict[str, Any] = {"prompt": turns[0].text}
    system = system_text(request, NAME)
    if system:
        body["system"] = system
    images = _images(turns[0], request)
    if images:
        body["images"] = images
    return body
