"""Pure codec for Anthropic's dialect, the Messages API. https://docs.claude.com/en/api/messages

The dialect is one module, its responses first and its requests below, because both know the shape of each block.
"""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs

from fluxibly._checks import kind_of
from fluxibly._formats import SchemaFormat
from fluxibly.errors import StreamProtocolError
from fluxibly.providers.dialects.codec import Encoded, Event, Framing
from fluxibly.providers.dialects.decoding import PendingFields, arguments_text, cut_off, join_fields, not_an_answer
from fluxibly.providers.dialects.encoding import (
    CallIds,
    bad_request,
    format_of,
    is_thinking_block,
    joined_turns,
    media_data,
    misplaced_media,
    reject_unsupported,
    sent_arguments,
    system_text,
    system_texts,
    write_json,
)
from fluxibly.providers.dialects.errors import error_of_event, error_of_payload, error_of_response
from fluxibly.providers.dialects.json_values import as_array, as_count, as_object, as_text, read_json, sum_known
from fluxibly.providers.dialects.schemas import SchemaLearner, for_claude, with_schema_in_words
from fluxibly.types import (
    Chunk,
    ContentPart,
    Document,
    Image,
    Media,
    Message,
    Opaque,
    Part,
    Prefill,
    Reasoning,
    Request,
    Response,
    Text,
    Tool,
    ToolCall,
    ToolCallDelta,
    Usage,
    parse_arguments,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fluxibly.errors import ProviderError


NAME = "Anthropic"
DIALECT = "anthropic"
"""The dialect of opaque parts that go back to this service."""
TEXT_TYPES = ("application/json", "application/xml", "application/yaml", "application/x-yaml")
"""Media types of text besides `text/…`."""
THINKING = ("thinking", "redacted_thinking")
DETAILS = ("container", "context_management", "stop_sequence", "stop_details")
"""Fields of a message that tell more about the answer."""
PREFILL = Prefill(
    models=r"claude-(?:instant|v?[1-3](?!\d)|(?:opus|sonnet|haiku)-4(?![-.]?(?:[2-46-9](?!\d)|\d\d(?!\d))))"
)
"""The models up to Claude 4.5, wherever they run. Later ones refuse a request that ends with an assistant's message."""
DEFAULT_MAX_TOKENS = 4096
"""Sent when the request has no `max_tokens`, which this dialect requires. Every Claude model accepts this value."""
DEFAULT_MAX_TOKENS_THINKING = 16_384
"""Sent instead when the model decides how much to think, because thinking tokens count toward the limit."""
BUDGETS = {"minimal": 1024, "low": 2048, "medium": 8192, "high": 16_384, "xhigh": 24_576, "max": 32_768}
"""Thinking budgets in tokens, for models that take a budget rather than an effort. The minimum is 1,024."""
ADAPTIVE_SINCE = (4, 6)
STRUCTURED_SINCE = (4, 5)
"""The first version of Claude that takes a JSON Schema for its answer."""
"""The first Claude version whose models take an effort and decide themselves how much to think."""


# Responses


FINISH_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_call",
    "refusal": "content_filter",
}
"""Other reasons are passed on unchanged, such as pause_turn (the client should ask the service to continue)."""


@attrs.frozen
class AnthropicCodec(SchemaLearner):
    """Codec for `POST /v1/messages`, which llama.cpp, vLLM and others serve too."""

    @property
    def framing(self) -> Framing:
        return "sse"

    def encode(self, request: Request, /, *, stream: bool) -> Encoded:
        body = encode_body(self.with_known_form(request), stream=stream)
        return Encoded("/messages", write_json(body, request))

    def decode(self, body: bytes, /) -> Response:
        raw = read_json(body)
        message = as_object(raw)
        if message.get("type") == "error":
            raise error_of_event(body, service=NAME)
        if message.get("error") or not isinstance(message.get("content"), list):
            raise not_an_answer(raw, body, NAME, "'content'")
        parts = _parts([as_object(block) for block in as_array(message["content"])])
        reason = as_text(message.get("stop_reason")) or None
        return Response.from_parts(
            parts,
            finish_reason=FINISH_REASONS.get(reason or "", reason),
            raw_finish_reason=reason,
            usage=_usage(as_object(message.get("usage"))),
            model=as_text(message.get("model")) or None,
            id=as_text(message.get("id")) or None,
            details=_details(message) | _citations(parts),
            raw=message,
        )

    def decoder(self) -> AnthropicDecoder:
        return AnthropicDecoder()

    def decode_error(self, status: int, headers: Mapping[str, str], body: bytes, /) -> ProviderError:
        return error_of_response(status, headers, body, service=NAME)


def _parts(blocks: Iterable[dict[str, Any]]) -> list[Part]:
    """Return the parts of an answer's content blocks. Blocks of unknown types stay opaque."""
    parts: list[Part] = []
    calls = 0
    for block in blocks:
        kind = block.get("type")
        if kind == "text":
            text, raw = as_text(block.get("text")), _beside_text(block)
            parts += [Text(text, raw=raw)] if text or raw else []
        elif kind in THINKING:
            parts.append(_reasoning(block))
        elif kind == "tool_use":
            arguments = arguments_text(block.get("input"))
            parts.append(
                ToolCall(
                    _call_id(block, calls), as_text(block.get("name")), raw_arguments=arguments, raw=_beside_call(block)
                )
            )
            calls += 1
        elif block:
            parts.append(Opaque(DIALECT, block))
    return parts


def _call_id(block: dict[str, Any], number: int) -> str:
    return as_text(block.get("id")) or f"call_{number}"


def _beside_text(block: dict[str, Any]) -> dict[str, Any] | None:
    """Return a text block without its text, if it has more (citations), to send back with the text."""
    more = {name: value for name, value in block.items() if name != "text" and value not in (None, [])}
    return more if len(more) > 1 else None


def _beside_call(block: dict[str, Any]) -> dict[str, Any] | None:
    """Return a `tool_use` block without what a `ToolCall` has, if it has more (`caller`), to send back with the call."""
    more = {name: value for name, value in block.items() if name not in ("id", "name", "input") and value is not None}
    return more if len(more) > 1 else None


def _details(holder: dict[str, Any]) -> dict[str, Any]:
    return {name: holder[name] for name in DETAILS if holder.get(name) is not None}


def _citations(parts: Iterable[Part]) -> dict[str, Any]:
    found = [
        each for part in parts if isinstance(part, Text) and part.raw for each in as_array(part.raw.get("citations"))
    ]
    return {"citations": found} if found else {}


@attrs.define
class _Block:
    """A content block in progress: its initial fields, and the data of the deltas since."""

    fields: dict[str, Any]
    call: int
    """The index of the tool call, if the block is a tool call."""
    texts: list[str] = attrs.Factory(list[str])
    """The pieces of its thinking, or of its input as JSON text."""

    @property
    def type(self) -> str:
        return as_text(self.fields.get("type"))


class AnthropicDecoder:
    """State of a stream: the content blocks in progress, and the usage so far."""

    __slots__ = ("_after_text", "_begun", "_blocks", "_calls", "_done", "_held", "_id", "_reason", "_usage")

    def __init__(self) -> None:
        self._id = ""
        self._begun = False
        """Whether a content block has begun."""
        self._blocks: dict[int, _Block] = {}
        self._after_text = False
        """Whether the last block is a text, so that another text is a block of its own."""
        self._calls = 0
        self._held = PendingFields()
        self._usage: dict[str, Any] = {}
        self._reason: str | None = None
        self._done = False

    @property
    def done(self) -> bool:
        return self._done

    def decode_event(self, event: Event, /) -> Iterable[Chunk]:
        if (
            event.data[:1] == b"[" and event.data.strip() == b"[DONE]"
        ):  # not part of this dialect, but servers that speak several dialects send it
            self._done = self._reason is not None
            return self._held.flush() if self._done else ()
        if event.name == "error":
            raise error_of_event(event.data, service=NAME)
        raw = read_json(event.data)
        data = as_object(raw)
        match data.get("type"):
            case "content_block_delta":
                return self._delta(data)
            case "content_block_start":
                return self._start(data)
            case "content_block_stop":
                return self._stop(data)
            case "message_start":
                self._begin(as_object(data.get("message")))
            case "message_delta":
                self._message_delta(data)
            case "message_stop":
                self._done = True
                return self._held.flush()
            case "error":
                raise error_of_event(event.data, service=NAME)
            case kind:
                # Unknown events are ignored unless they carry an error, as proxies send them.
                reported = error_of_payload(raw, body=event.data, service=NAME)
                if reported is not None and (kind is None or data.get("error")):
                    raise reported
        return ()

    def end(self) -> Iterable[Chunk]:
        if not self._done:
            yield from self._held.flush()
            raise cut_off(NAME, "message_stop")

    def _begin(self, message: dict[str, Any]) -> None:
        """Take the beginning of the message.

        A gateway that turns to another service in the middle of an answer begins another message. It replaces the first
        only if that one has no content yet.
        """
        found = as_text(message.get("id"))
        if self._begun and (not found or found != self._id):
            raise StreamProtocolError(
                f"expected one message in the stream of {NAME}, got another one after the first had begun"
            )
        self._id = found
        self._usage = {}
        self._count(message)
        self._held.add(model=as_text(message.get("model")) or None, id=found or None, details=_details(message) or None)

    def _start(self, data: dict[str, Any]) -> Iterable[Chunk]:
        self._begun = True
        fields = as_object(data.get("content_block"))
        block = self._blocks[_index(data)] = _Block(dict(fields), self._calls)
        after_text, self._after_text = self._after_text, block.type == "text"
        if block.type == "text":
            if after_text:
                self._held.add(parts=(Text(""),))
            text = as_text(fields.get("text"))
            return self._held.emit(text) if text else ()
        if block.type == "tool_use":
            self._calls += 1
            call = ToolCallDelta(
                index=block.call,
                id=_call_id(fields, block.call),
                name=as_text(fields.get("name")),
                raw=_beside_call(fields),
            )
            return self._held.emit(tool_calls=(call,))
        thinking = as_text(fields.get("thinking")) if block.type == "thinking" else ""
        return self._held.emit(reasoning=thinking) if thinking else ()

    def _delta(self, data: dict[str, Any]) -> Iterable[Chunk]:
        delta = as_object(data.get("delta"))
        kind = delta.get("type")
        if kind == "text_delta":
            text = as_text(delta.get("text"))
            return self._held.emit(text) if text else ()
        block = self._blocks.get(_index(data))
        if block is None and kind == "input_json_delta":  # a gateway that numbers them wrongly
            block = next(reversed(self._blocks.values()), None)
        if block is None:
            return ()
        if kind == "input_json_delta":
            text = as_text(delta.get("partial_json"))
            block.texts.append(text)
            if text and block.type == "tool_use":
                return self._held.emit(tool_calls=(ToolCallDelta(index=block.call, arguments=text),))
        elif kind == "citations_delta":
            citations = [delta["citation"]] if delta.get("citation") is not None else []
            join_fields(block.fields, {"citations": citations})
            self._held.add(details={"citations": citations})
        elif kind == "thinking_delta":
            text = as_text(delta.get("thinking"))
            block.texts.append(text)
            return self._held.emit(reasoning=text) if text else ()
        else:
            join_fields(block.fields, {name: value for name, value in delta.items() if name != "type"})
        return ()

    def _stop(self, data: dict[str, Any]) -> Iterable[Chunk]:
        block = self._blocks.pop(_index(data), None)
        if block is None:
            return ()
        fields, given = block.fields, "".join(block.texts)
        if block.type == "text":
            if (raw := _beside_text(fields)) is not None:
                self._held.add(parts=(Text("", raw=raw),))
                self._after_text = False
        elif block.type in THINKING:
            if given:
                fields["thinking"] = as_text(fields.get("thinking")) + given
            self._held.add(parts=(_reasoning(fields),))
        elif block.type == "tool_use":
            if not given and fields.get("input"):
                # The start event carried the whole input. If deltas came too, sending both would duplicate it.
                arguments = arguments_text(fields["input"])
                return self._held.emit(tool_calls=(ToolCallDelta(index=block.call, arguments=arguments),))
        elif fields:
            if given:
                entered, problem = parse_arguments(given)
                fields["input"] = {"INVALID_JSON": given} if problem else entered
            return self._held.emit(parts=(Opaque(DIALECT, fields),))
        return ()

    def _message_delta(self, data: dict[str, Any]) -> None:
        delta = as_object(data.get("delta"))
        reason = as_text(delta.get("stop_reason")) or None
        self._reason = reason or self._reason
        self._held.add(
            finish_reason=FINISH_REASONS.get(reason or "", reason),
            raw_finish_reason=reason,
            details=(_details(delta) | _details(data)) or None,
        )
        self._count(data)

    def _count(self, holder: dict[str, Any]) -> None:
        """Update the usage from an event. Usage is cumulative, but later events may omit counts of earlier events."""
        news = {name: value for name, value in as_object(holder.get("usage")).items() if value is not None}
        if news:
            self._usage.update(news)
            self._held.add(usage=_usage(self._usage))


def _index(data: dict[str, Any]) -> int:
    return as_count(data.get("index")) or 0


def _reasoning(block: dict[str, Any]) -> Reasoning:
    text = as_text(block.get("thinking")) if block.get("type") == "thinking" else ""
    return Reasoning(text=text, signature=as_text(block.get("signature")) or None, raw=block)


def _usage(counts: dict[str, Any]) -> Usage | None:
    """Return usage in OpenTelemetry's sense: the service's `input_tokens` exclude prompt cache reads and writes."""
    if not counts:
        return None
    read, written = as_count(counts.get("cache_read_input_tokens")), as_count(counts.get("cache_creation_input_tokens"))
    return Usage(
        input_tokens=sum_known(as_count(counts.get("input_tokens")), read, written),
        output_tokens=as_count(counts.get("output_tokens")),
        cached_tokens=read,
        cache_write_tokens=written,
        reasoning_tokens=as_count(as_object(counts.get("output_tokens_details")).get("thinking_tokens")),
    )


# Requests


_FOREIGN_IN_ID = re.compile(r"[^a-zA-Z0-9_-]")
_LONGEST_ID = 256
_VERSION = re.compile(r"claude-(?:[a-z]+-)?(\d{1,2})(?:[-.](\d{1,2}))?(?!\d)")


def encode_body(request: Request, *, stream: bool) -> dict[str, Any]:
    """Return the request body, without `extra`.

    Raises:
        BadRequest: the dialect does not support a parameter or its value.

    """
    reject_unsupported(request, NAME, ("seed", "frequency_penalty", "presence_penalty", "n"))
    request, output = formatted(request)
    ids = CallIds(_FOREIGN_IN_ID, _LONGEST_ID)
    turns = joined_turns(request, NAME, lambda message: _blocks(message, ids, request))
    body: dict[str, Any] = {"model": request.model, "messages": turns}
    system = _system(request)
    if system:
        body["system"] = system
    for name in ("temperature", "top_p", "top_k"):
        value = getattr(request, name)
        if value is not None:
            body[name] = value
    if request.stop:
        body["stop_sequences"] = list(request.stop)
    if request.tools:
        body["tools"] = [_tool(tool) for tool in request.tools]
    if request.tool_choice is not None:
        body["tool_choice"] = _tool_choice(request.tool_choice)
    output = _reason(request, body) | output
    if output:
        body["output_config"] = output
    if stream:
        body["stream"] = True
    return body


def _blocks(message: Message, ids: CallIds, request: Request) -> list[dict[str, Any]]:
    if message.role == "tool":
        return [_tool_result(message, ids, request)]
    blocks: list[dict[str, Any]] = []
    for part in message.parts:
        if isinstance(part, ToolCall):
            block = {"type": "tool_use", "id": ids.new(part.id), "name": part.name, "input": sent_arguments(part)}
            blocks.append(_with_more(part, block))
        elif isinstance(part, Reasoning):
            thinking = _thinking_block(part)
            blocks += [thinking] if thinking else []
        elif isinstance(part, Opaque):
            blocks += [dict(part.raw)] if part.dialect == DIALECT else []
        elif isinstance(part, Media) and message.role == "assistant":
            raise misplaced_media(request, part, f"a user's message or a tool's result for {NAME}")
        else:
            blocks += _content([part], request)
    return blocks


def _with_more(part: Text | ToolCall | Media, block: dict[str, Any]) -> dict[str, Any]:
    """Return a block with the fields that the service sent beside the part, or with the caller's `cache_control`."""
    raw = part.raw or {}
    if raw.get("type") == block["type"]:
        return {**raw, **block}
    return {**block, "cache_control": raw["cache_control"]} if "cache_control" in raw else block


def _system(request: Request) -> str | list[dict[str, Any]]:
    """Return the system messages: a str, or blocks if one of them is to be cached."""
    texts = [text for texts in system_texts(request, NAME) for text in texts if text.text.strip()]
    if all("cache_control" not in (text.raw or {}) for text in texts):
        return system_text(request, NAME)
    return [_with_more(text, {"type": "text", "text": text.text}) for text in texts]


def _content(content: Iterable[ContentPart], request: Request) -> list[dict[str, Any]]:
    """Return the blocks of text and media. The service refuses texts of only white space."""
    return [_block(part, request) for part in content if not isinstance(part, Text) or part.text.strip()]


def _block(part: ContentPart, request: Request) -> dict[str, Any]:
    if isinstance(part, Text):
        return _with_more(part, {"type": "text", "text": part.text})
    if isinstance(part, Image):
        return _with_more(part, {"type": "image", "source": _source(part)})
    if isinstance(part, Document):
        title = {"title": part.name} if part.name else {}
        return _with_more(part, {"type": "document", "source": _document(part, request), **title})
    raise bad_request(request, f"expected text, images and documents for {NAME}, got {kind_of(part)}")


def _document(document: Document, request: Request) -> dict[str, Any]:
    source = _source(document)
    kind = as_text(source.get("media_type")).partition(";")[0].lower()
    if source["type"] == "url" or kind == "application/pdf":
        return source
    if kind.startswith("text/") or kind in TEXT_TYPES:
        return {"type": "text", "media_type": "text/plain", "data": b64decode(source["data"]).decode(errors="replace")}
    raise bad_request(request, f"a document: expected a PDF or text for {NAME}, got {kind!r}; convert it first")


def _tool_result(message: Message, ids: CallIds, request: Request) -> dict[str, Any]:
    content = _content(message.content, request)
    block: dict[str, Any] = {
        "type": "tool_result",
        "tool_use_id": ids.of(message.tool_call_id or ""),
        "content": content,
    }
    if message.is_error:
        block["is_error"] = True
        block["content"] = content or [{"type": "text", "text": "error"}]  # the service requires content here
    return block


def _thinking_block(reasoning: Reasoning) -> dict[str, Any] | None:
    """Return a block as the service sent it; None for reasoning of another dialect, or without proof of origin."""
    if reasoning.raw is not None:
        return dict(reasoning.raw) if is_thinking_block(reasoning.raw) else None
    if reasoning.signature is None:
        return None
    return {"type": "thinking", "thinking": reasoning.text, "signature": reasoning.signature}


def _source(media: Media) -> dict[str, Any]:
    data = media_data(media)
    if data is None:
        return {"type": "url", "url": media.url}
    return {"type": "base64", "media_type": data[0], "data": data[1]}


def _tool(tool: Tool) -> dict[str, Any]:
    encoded: dict[str, Any] = {"name": tool.name, "input_schema": tool.parameters}
    if tool.description:
        encoded["description"] = tool.description
    if tool.strict is not None:
        encoded["strict"] = tool.strict
    return encoded


def _tool_choice(choice: str) -> dict[str, Any]:
    if choice in ("auto", "none"):
        return {"type": choice}
    return {"type": "any"} if choice == "required" else {"type": "tool", "name": choice}


def formatted(request: Request) -> tuple[Request, dict[str, Any]]:
    """Return the part of `output_config` that comes from `response_format`, and the request to encode.

    Claude is told a schema in words if it has no form for it. Models of other makers that speak this dialect get both, because
    some servers ignore what they do not know.

    Raises:
        BadRequest: JSON without a schema is wanted.
    """
    wanted = format_of(request)
    if wanted == "json":
        raise bad_request(request, f"response_format: expected a JSON Schema or 'text' for {NAME}, got 'json'")
    if not isinstance(wanted, SchemaFormat):
        return request, {}
    schema: Mapping[str, Any] | None = wanted.schema
    is_claude = "claude" in request.model
    if is_claude:
        version = version_of(request.model)  # a name without a version is that of a new model
        schema = for_claude(wanted.schema) if version is None or version >= STRUCTURED_SINCE else None
    if not is_claude or schema is None:
        request = with_schema_in_words(request, wanted.schema)
    return request, {} if schema is None else {"format": {"type": "json_schema", "schema": schema}}


def _reason(request: Request, body: dict[str, Any]) -> dict[str, Any]:
    """Set `thinking` and `max_tokens`, and return the part of `output_config` for the reasoning effort."""
    thinking, effort = thinking_of(request, NAME)
    body["max_tokens"] = DEFAULT_MAX_TOKENS
    if thinking:
        body["thinking"] = thinking
        if thinking["type"] == "adaptive":
            body["max_tokens"] = DEFAULT_MAX_TOKENS_THINKING
        body["max_tokens"] += thinking.get("budget_tokens", 0)
    if request.max_tokens is not None:
        body["max_tokens"] = request.max_tokens
    return {} if effort is None else {"effort": effort}


def thinking_of(request: Request, service: str) -> tuple[dict[str, Any], str | None]:
    """Return the `thinking` of a Claude model, and its effort if it decides itself how much to think.

    Raises:
        BadRequest: the reasoning effort is unknown, or `max_tokens` leaves no room for an answer after its budget.
    """
    effort = request.reasoning_effort
    if effort is None:
        return {}, None
    if effort == "none":
        return {"type": "disabled"}, None
    if _is_adaptive(request.model):
        return {"type": "adaptive", "display": "summarized"}, effort
    budget = BUDGETS.get(effort)
    if budget is None:
        known = ", ".join(["none", *BUDGETS])
        raise bad_request(request, f"reasoning_effort: expected one of {known} for {service}, got {effort!r}")
    if request.max_tokens is not None and request.max_tokens <= budget:
        raise bad_request(
            request,
            f"expected max_tokens above {budget} (it includes the thinking budget of reasoning_effort={effort!r}), "
            f"got {request.max_tokens}: raise max_tokens or lower the effort",
        )
    return {"type": "enabled", "budget_tokens": budget}, None


def _is_adaptive(model: str) -> bool:
    """Whether a model takes an effort. Models of other makers that speak this dialect take a budget."""
    version = version_of(model)
    return version is not None and version >= ADAPTIVE_SINCE


def version_of(model: str) -> tuple[int, int] | None:
    """Return the version in the name of a Claude model; None for other models."""
    found = _VERSION.search(model)
    return None if found is None else (int(found[1]), int(found[2] or 0))
