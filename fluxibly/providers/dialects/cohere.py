"""Pure codec for Cohere's dialect, version 2 of its Chat API. https://docs.cohere.com/reference/chat

The dialect is one module, its responses first and its requests below, because both know the shape of each part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

import attrs

from fluxibly._checks import is_mapping, kind_of
from fluxibly._formats import SchemaFormat
from fluxibly.errors import (
    BadRequest,
    ContentFiltered,
    ContextLengthExceeded,
    ProviderError,
    QuotaExceeded,
    RequestTimeout,
    ServerError,
)
from fluxibly.providers.dialects.anthropic import TEXT_TYPES
from fluxibly.providers.dialects.codec import Encoded, Event, Framing
from fluxibly.providers.dialects.decoding import (
    CallIndexes,
    PendingFields,
    base64_bytes,
    cut_off,
    join_fields,
    not_an_answer,
    to_json,
)
from fluxibly.providers.dialects.encoding import (
    CallIds,
    bad_request,
    format_of,
    media_data,
    misplaced_media,
    reject_unsupported,
    write_json,
)
from fluxibly.providers.dialects.errors import (
    Report,
    error_of,
    error_of_event,
    error_of_response,
    excerpt,
    read_report,
)
from fluxibly.providers.dialects.json_values import as_array, as_count, as_object, as_text, read_json
from fluxibly.providers.dialects.openai_parts import usage_of
from fluxibly.providers.dialects.openai_request import function_of, image_of
from fluxibly.providers.dialects.schemas import SchemaLearner
from fluxibly.types import (
    Audio,
    Chunk,
    Document,
    Image,
    Media,
    Message,
    Opaque,
    Part,
    Reasoning,
    Request,
    Response,
    Text,
    ToolCall,
    ToolCallDelta,
    Usage,
)

NAME: Final = "Cohere"
DIALECT: Final = "cohere"
"""The dialect of opaque parts that go back to this service."""
BUDGETS: Final[Mapping[str, int | None]] = {"minimal": 1024, "low": 2048, "medium": 8192, "high": None}
"""Thinking budgets in tokens. The service takes no effort, and recommends to think without a budget."""


# Responses


FINISH_REASONS: Final = {
    "COMPLETE": "stop",
    "STOP_SEQUENCE": "stop",
    "MAX_TOKENS": "length",
    "TOOL_CALL": "tool_call",
    "ERROR_TOXIC": "content_filter",
}
"""Other reasons are passed on unchanged."""
FAILURES: Final[Mapping[str, type[ProviderError]]] = {"ERROR": ServerError, "TIMEOUT": RequestTimeout}
"""The finish reasons of answers that the service gave up, so that they are not whole."""


@attrs.frozen
class CohereCodec(SchemaLearner):
    """Codec for `POST /v2/chat`."""

    @property
    def framing(self) -> Framing:
        return "sse"

    def encode(self, request: Request, /, *, stream: bool) -> Encoded:
        return Encoded("/chat", write_json(encode_body(self.with_known_form(request), stream=stream), request))

    def decode(self, body: bytes, /) -> Response:
        raw = read_json(body)
        answer = as_object(raw)
        message = answer.get("message")  # the text of an error, or the message of an answer
        if type(message) is not dict or answer.get("error"):
            raise _error_in(raw, body) or not_an_answer(None, body, NAME, "a 'message'")
        reason = as_text(answer.get("finish_reason"))
        if not reason:
            raise not_an_answer(None, body, NAME, "a 'finish_reason'")
        if reason in FAILURES:
            raise _given_up(reason, body)
        fields, usage = as_object(message), as_object(answer.get("usage"))
        citations = _listed(fields.get("citations"))
        return Response.from_parts(
            _parts(fields, citations),
            finish_reason=FINISH_REASONS.get(reason, reason),
            raw_finish_reason=reason,
            usage=_usage(usage),
            id=as_text(answer.get("id")) or None,
            details=_details(usage, citations=citations, logprobs=_listed(answer.get("logprobs"))),
            raw=answer,
        )

    def decoder(self) -> CohereDecoder:
        return CohereDecoder()

    def decode_error(self, status: int, headers: Mapping[str, str], body: bytes, /) -> ProviderError:
        return error_of_response(status, headers, body, service=NAME, kind=_kind(status, body))


_MONTHLY: Final = re.compile(rb"calls ?/ ?month")
"""The limit of a trial key, which does not recover soon. Its limit per minute does."""


def _kind(status: int | None, body: bytes) -> type[ProviderError] | None:
    """Return the class of an error in this service's own words; None if the rules for all services find it."""
    if status == 498:  # the prompt or the answer has a token of the service's deny list
        return ContentFiltered
    if _MONTHLY.search(body):
        return QuotaExceeded
    if b"max tokens must be less than" in body:  # it has the same code as a prompt that is too long
        return BadRequest
    return ContextLengthExceeded if b"TOO_MANY_TOKENS" in body else None


def _parts(message: dict[str, Any], citations: list[Any]) -> list[Part]:
    """Return the parts of an answer's message, in the order of a stream: content, plan, tool calls, citations."""
    content = message.get("content")
    given = [{"type": "text", "text": content}] if isinstance(content, str) else as_array(content)
    parts = [part for block in given if (part := _part(as_object(block))) is not None]
    plan = as_text(message.get("tool_plan"))
    if plan:
        parts.append(_plan(plan))
    for number, item in enumerate(as_array(message.get("tool_calls"))):
        call = as_object(item)
        function = as_object(call.get("function"))
        call_id = as_text(call.get("id")) or f"call_{number}"
        parts.append(ToolCall(call_id, as_text(function.get("name")), raw_arguments=_arguments(function)))
    return [*parts, *_cited(citations)]


def _part(block: dict[str, Any]) -> Part | None:
    """Return a part of an answer's content; None if it is empty. Parts of unknown types stay opaque."""
    kind = block.get("type")
    if kind == "text":
        text = as_text(block.get("text"))
        return Text(text) if text else None
    if kind == "thinking":
        text = as_text(block.get("thinking"))
        return Reasoning(text=text, raw={DIALECT: block}) if text else None
    return Opaque(DIALECT, block) if block else None


def _plan(text: str) -> Reasoning:
    return Reasoning(text=text, raw={"tool_plan": text})


def _cited(citations: list[Any]) -> tuple[Opaque, ...]:
    """Return the citations of an answer as a part, so that they go back: they cite texts, thoughts and the plan."""
    return (Opaque(DIALECT, {"citations": citations}),) if citations else ()


def _listed(value: Any) -> list[Any]:
    """Return the items of an array. In a stream, an object comes in place of an array of one."""
    return [value] if type(value) is dict and value else as_array(value)


def _arguments(function: dict[str, Any]) -> str:
    arguments = function.get("arguments")
    return to_json(as_object(arguments)) if type(arguments) is dict else as_text(arguments)


def _usage(usage: dict[str, Any]) -> Usage | None:
    """Return the tokens that the model read and wrote. The `billed_units` leave out the service's own prompt."""
    return usage_of({**as_object(usage.get("tokens")), "cached_tokens": usage.get("cached_tokens")})


def _details(usage: dict[str, Any], **more: list[Any]) -> dict[str, Any]:
    found = {"billed_units": as_object(usage.get("billed_units")), **more}
    return {name: value for name, value in found.items() if value}


@attrs.define
class _Open:
    """The part of a stream that is in progress: a block of content, or the plan."""

    kind: str
    """text, thinking or tool_plan; "" for a block of an unknown type."""
    fields: dict[str, Any]
    """The block so far, without its text."""
    texts: list[str] = attrs.Factory(list[str])


class CohereDecoder:
    """State of a stream: the part in progress, and the citations so far."""

    __slots__ = ("_citations", "_done", "_held", "_indexes", "_open", "_said")

    def __init__(self) -> None:
        self._open: _Open | None = None
        self._said = False
        """Whether a text has begun, so that another text is a part of its own."""
        self._citations: list[Any] = []
        self._indexes = CallIndexes()
        self._held = PendingFields()
        self._done = False

    @property
    def done(self) -> bool:
        return self._done

    def decode_event(self, event: Event, /) -> Iterable[Chunk]:
        if event.data[:1] == b"[" and event.data.strip() == b"[DONE]":
            return ()  # message-end is the end
        if event.name == "error":  # a gateway's
            raise error_of_event(event.data, service=NAME)
        raw = read_json(event.data)
        data = as_object(raw)
        kind = data.get("type")
        delta = as_object(data.get("delta"))
        message = as_object(delta.get("message"))
        match kind:
            case "content-delta":
                if data.get("logprobs"):
                    self._held.add(details={"logprobs": _listed(data["logprobs"])})
                return self._content(as_object(message.get("content")))
            case "content-start":
                return self._start(as_object(message.get("content")))
            case "tool-plan-delta":
                return self._think("tool_plan", as_text(message.get("tool_plan")))
            case "tool-call-start" | "tool-call-delta":
                return self._call(as_count(data.get("index")), _listed(message.get("tool_calls")))
            case "content-end":
                return self._close()
            case "citation-start":
                citations = _listed(message.get("citations"))
                if citations:
                    self._citations += citations
                    self._held.add(details={"citations": citations})
            case "message-start":
                self._held.add(id=as_text(data.get("id")) or None)
            case "message-end":
                return self._end(delta, event.data)
            case _:
                reported = _error_in(raw, event.data)
                if reported is not None:
                    raise reported
        return ()

    def end(self) -> Iterable[Chunk]:
        if not self._done:
            yield from self._held.flush()
            raise cut_off(NAME, "message-end")

    def _start(self, content: dict[str, Any]) -> list[Chunk]:
        """Begin a block of content. It may begin with a text."""
        kind = as_text(content.get("type"))
        if kind in ("text", "thinking"):
            chunks = self._begin(_Open(kind, {name: value for name, value in content.items() if name != kind}))
            return [*chunks, *self._content({kind: content.get(kind)})]
        return self._begin(_Open("", dict(content))) if kind else [*self._close(), *self._content(content)]

    def _content(self, content: dict[str, Any]) -> Iterable[Chunk]:
        if self._open is not None and not self._open.kind:
            join_fields(self._open.fields, {name: value for name, value in content.items() if name != "type"})
            return ()
        text = as_text(content.get("text"))
        if not text:
            return self._think("thinking", as_text(content.get("thinking")))
        if self._open is not None and self._open.kind == "text":  # as nearly always
            return self._held.emit(text)
        return [*self._begin(_Open("text", {"type": "text"})), *self._held.emit(text)]

    def _think(self, kind: str, text: str) -> Iterable[Chunk]:
        """Take a piece of a thought or of the plan."""
        if not text:
            return ()
        chunks: list[Chunk] = []
        part = self._open
        if part is None or part.kind != kind:
            part = _Open(kind, {"type": kind})
            chunks = self._begin(part)
        part.texts.append(text)
        return [*chunks, *self._held.emit(reasoning=text)]

    def _call(self, index: int | None, calls: list[Any]) -> list[Chunk]:
        """Take a tool call that begins, or a piece of one."""
        chunks = self._close()
        for call in map(as_object, calls):
            function = as_object(call.get("function"))
            call_id, name = as_text(call.get("id")) or None, as_text(function.get("name")) or None
            arguments = _arguments(function)
            if call_id or name or arguments:
                piece = ToolCallDelta(index=index, id=call_id, name=name, arguments=arguments)
                chunks += self._held.emit(tool_calls=(self._indexes.mended(piece),))
        return chunks

    def _begin(self, part: _Open) -> list[Chunk]:
        chunks = self._close()
        if part.kind == "text":
            if self._said:
                self._held.add(parts=(Text(""),))
            self._said = True
        self._open = part
        return chunks

    def _close(self) -> list[Chunk]:
        """Complete the part in progress. The rest of a thought waits for the next chunk with output."""
        part, self._open = self._open, None
        if part is None or part.kind == "text":
            return []
        if not part.kind:
            return [*self._held.emit(parts=(Opaque(DIALECT, part.fields),))]
        text = "".join(part.texts)
        if text:
            thought = _plan(text) if part.kind == "tool_plan" else _part({**part.fields, part.kind: text})
            self._held.add(parts=(thought,))
        return []

    def _end(self, delta: dict[str, Any], data: bytes) -> list[Chunk]:
        reported = _error_in({"error": delta.get("error")}, data)
        if reported is not None:
            raise reported
        reason, usage = as_text(delta.get("finish_reason")), as_object(delta.get("usage"))
        if reason in FAILURES:
            raise _given_up(reason, data)
        self._done = True
        chunks = self._close()
        self._held.add(
            finish_reason=FINISH_REASONS.get(reason, reason) or None,
            raw_finish_reason=reason or None,
            usage=_usage(usage),
            details=_details(usage) or None,
            parts=_cited(self._citations) or None,
        )
        return [*chunks, *self._held.flush()]


def _given_up(reason: str, data: bytes) -> ProviderError:
    report = Report(message="it gave the answer up before its end", code=reason)
    return error_of(report, excerpt=excerpt(data), service=NAME, kind=FAILURES[reason])


def _error_in(payload: object, data: bytes) -> ProviderError | None:
    """Return the error that a body or an event reports. An event of an unknown type reports one only in its `error`."""
    fields = as_object(payload)
    report = read_report(payload)
    if report is None or (fields.get("type") not in (None, "error") and not fields.get("error")):
        return None
    kind = _kind(report.status, data)
    return error_of(report, status=report.status, payload=payload, excerpt=excerpt(data), service=NAME, kind=kind)


# Requests


_PARAMETERS: Final = {
    "temperature": "temperature",
    "max_tokens": "max_tokens",
    "top_p": "p",
    "top_k": "k",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "seed": "seed",
}
# The service refuses an id that repeats. It is not known to refuse any characters, or long ids.
_FOREIGN_IN_ID: Final = re.compile(r"(?!)")
_LONGEST_ID: Final = 1_000


def encode_body(request: Request, *, stream: bool) -> dict[str, Any]:
    """Return the request body, without `extra`.

    Raises:
        BadRequest: the dialect does not support a parameter or its value.
    """
    reject_unsupported(request, NAME, ("n",))
    body: dict[str, Any] = {"model": request.model, "messages": _messages(request), "stream": stream}
    for ours, name in _PARAMETERS.items():
        value = getattr(request, ours)
        if value is not None:
            body[name] = value
    if request.stop:
        body["stop_sequences"] = list(request.stop)
    return body | _tools(request) | _format(request) | _thinking(request)


def _messages(request: Request) -> list[dict[str, Any]]:
    """Return the conversation. Messages without content, which the service rejects, are left out."""
    ids = CallIds(_FOREIGN_IN_ID, _LONGEST_ID)
    encoded: list[dict[str, Any]] = []
    for message in request.messages:
        body = _message(message, ids, request)
        if body is not None:
            encoded.append(body)
        elif message is request.messages[-1] and message.role == "user":
            raise bad_request(request, f"expected the last message to say something for {NAME}, got only white space")
    if all(body["role"] == "system" for body in encoded):
        raise bad_request(request, f"expected a non-empty message besides the system messages for {NAME}, got none")
    return encoded


def _message(message: Message, ids: CallIds, request: Request) -> dict[str, Any] | None:
    """Return a message; None if there is nothing in it."""
    if message.role == "assistant":
        return _assistant(message, ids, request)
    content = [block for part in message.content if (block := _block(part, message, request)) is not None]
    if message.role == "tool":
        plain = all(isinstance(part, Text) for part in message.content)
        call_id = ids.of(message.tool_call_id or "")
        return {"role": "tool", "tool_call_id": call_id, "content": message.text if plain else content}
    return {"role": message.role, "content": content} if content else None


def _block(part: Text | Media, message: Message, request: Request) -> dict[str, Any] | None:
    """Return a part of a message that is not the assistant's; None for white space."""
    if isinstance(part, Text):
        return {"type": "text", "text": part.text} if part.text.strip() else None
    if message.role == "user" and isinstance(part, Image):
        return {"type": "image_url", "image_url": image_of(part)}
    if message.role == "tool" and isinstance(part, Document):
        return {"type": "document", "document": {"data": _document(part, request)}}
    raise bad_request(request, f"{_expected(message, part)} for {NAME}, got {kind_of(part)}{_advice(message, part)}")


def _expected(message: Message, part: Media) -> str:
    if message.role == "system":
        return "expected only text in a system message"
    if message.role == "tool":
        return "expected text and documents of text in a tool's result"
    return "expected text and images in a user's message"


def _advice(message: Message, part: Media) -> str:
    if isinstance(part, Audio):
        return "; transcribe it first"
    if isinstance(part, Document) and message.role == "user":
        return "; pass its text, or extra={'documents': [{'data': {'text': …}}]} if the answer is to cite it"
    return "; describe it in text"


def _document(document: Document, request: Request) -> dict[str, Any]:
    found = media_data(document)
    if found is None:
        raise bad_request(request, f"a document: expected its bytes or a data URL for {NAME}, got another URL")
    kind = found[0].partition(";")[0].lower()
    if not kind.startswith("text/") and kind not in TEXT_TYPES:
        raise bad_request(request, f"a document: expected text for {NAME}, got {kind!r}; convert it first")
    data = base64_bytes(found[1])
    if data is None:
        raise bad_request(request, "a document: expected base64 in its data URL, got other text")
    return {"text": data.decode(errors="replace")} | ({"title": document.name} if document.name else {})


def _assistant(message: Message, ids: CallIds, request: Request) -> dict[str, Any] | None:
    """Return a message of the assistant, with what this service sent as it came.

    The service refuses text beside tool calls: there, the text that another service's model wrote becomes the plan.
    """
    content: list[dict[str, Any]] = []
    plan: list[str] = []
    calls: list[dict[str, Any]] = []
    citations: list[Any] = []
    for part in message.parts:
        if isinstance(part, Text):
            if part.text.strip() and message.tool_calls:
                plan.append(part.text)
            elif part.text.strip():
                content.append({"type": "text", "text": part.text})
        elif isinstance(part, ToolCall):
            function = {"name": part.name, "arguments": _sent_arguments(part)}
            calls.append({"id": ids.new(part.id), "type": "function", "function": function})
        elif isinstance(part, Reasoning):
            raw = part.raw or {}
            plan += [raw["tool_plan"]] if isinstance(raw.get("tool_plan"), str) else []
            content += [dict(raw[DIALECT])] if is_mapping(raw.get(DIALECT)) else []
        elif isinstance(part, Opaque):
            if part.dialect == DIALECT and "type" in part.raw:
                content.append(dict(part.raw))
            elif part.dialect == DIALECT:
                citations += as_array(part.raw.get("citations"))
        else:
            raise misplaced_media(request, part, f"a user's message for {NAME}")
    said = {"content": content, "tool_plan": "".join(plan), "tool_calls": calls}
    if not any(said.values()):
        return None
    fields = {**said, "citations": citations}
    return {"role": "assistant", **{name: value for name, value in fields.items() if value}}


def _sent_arguments(call: ToolCall) -> str:
    """Return a tool call's arguments as they came. Text that is not a JSON object goes under `INVALID_JSON`."""
    broken = call.error is not None or (call.raw is not None and call.raw.get("type") == "custom")
    return to_json({"INVALID_JSON": call.raw_arguments}) if broken else call.raw_arguments


def _tools(request: Request) -> dict[str, Any]:
    """Return the tools and the choice among them. The service can require a call, but not of which tool."""
    tools, choice = request.tools, request.tool_choice
    if choice not in (None, "auto", "none", "required"):
        tools = tuple(tool for tool in tools if tool.name == choice)
        if not tools:
            known = ", ".join(["auto", "none", "required", *[tool.name for tool in request.tools]])
            raise bad_request(request, f"tool_choice: expected one of {known} for {NAME}, got {choice!r}")
        choice = "required"
    strict = {tool.strict for tool in tools if tool.strict is not None}
    if len(strict) > 1:
        raise bad_request(request, f"expected the same strict= in all tools for {NAME}, got True and False")
    found: dict[str, Any] = {}
    if tools:
        found["tools"] = [
            {"type": "function", "function": function_of(attrs.evolve(tool, strict=None))} for tool in tools
        ]
    if strict:
        found["strict_tools"] = strict.pop()
    if choice in ("none", "required"):
        found["tool_choice"] = choice.upper()
    return found


def _format(request: Request) -> dict[str, Any]:
    wanted = format_of(request)
    if wanted is None:
        return {}
    if isinstance(wanted, SchemaFormat):
        return {"response_format": {"type": "json_object", "json_schema": wanted.schema}}
    return {"response_format": {"type": "json_object" if wanted == "json" else "text"}}


def _thinking(request: Request) -> dict[str, Any]:
    effort = request.reasoning_effort
    if effort is None:
        return {}
    if effort == "none":
        return {"thinking": {"type": "disabled"}}
    if effort not in BUDGETS:
        known = ", ".join(["none", *BUDGETS])
        raise bad_request(request, f"reasoning_effort: expected one of {known} for {NAME}, got {effort!r}")
    budget = BUDGETS[effort]
    return {"thinking": {"type": "enabled"} | ({} if budget is None else {"token_budget": budget})}
