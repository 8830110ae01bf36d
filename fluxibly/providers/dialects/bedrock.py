"""Pure codec for Amazon Bedrock's dialect, Converse and ConverseStream.

https://docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_Converse.html. The dialect is one module, its
responses first and its requests below, because both know the shape of each block.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any, Final
from urllib.parse import quote

import attrs

from fluxibly import errors
from fluxibly._formats import SchemaFormat
from fluxibly.errors import ProviderError
from fluxibly.providers.dialects.anthropic import thinking_of
from fluxibly.providers.dialects.bedrock_media import KINDS, NAME, MediaBlocks
from fluxibly.providers.dialects.codec import Encoded, Event, Framing
from fluxibly.providers.dialects.decoding import (
    PendingFields,
    arguments_text,
    base64_bytes,
    cut_off,
    join_fields,
    not_an_answer,
)
from fluxibly.providers.dialects.encoding import (
    CallIds,
    bad_request,
    format_of,
    is_thinking_block,
    joined_turns,
    json_of,
    misplaced_media,
    reject_unsupported,
    sent_arguments,
    system_texts,
    write_json,
)
from fluxibly.providers.dialects.errors import Report, class_of, error_of, error_of_response, excerpt
from fluxibly.providers.dialects.json_values import as_array, as_count, as_object, as_text, read_json, sum_known
from fluxibly.providers.dialects.schemas import SchemaLearner, for_claude, with_schema_in_words
from fluxibly.types import (
    Chunk,
    ContentPart,
    Image,
    Media,
    Message,
    Opaque,
    Part,
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

DIALECT = "bedrock"
"""The dialect of opaque parts that go back to this service."""
ARN: Final = re.compile(r"arn:aws[^:]*:[^:]+:([^:]+):")
"""The beginning of the ARN of a model, with the region in which the model is."""
DETAILS = ("additionalModelResponseFields", "metrics", "performanceConfig", "serviceTier", "trace")
"""Fields of an answer that say more about it."""


# Responses


FINISH_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_call",
    "guardrail_intervened": "content_filter",
    "content_filtered": "content_filter",
    "malformed_model_output": "error",
    "malformed_tool_use": "error",
}


@attrs.frozen
class BedrockCodec(SchemaLearner):
    """Codec for `POST /model/{model}/converse`, and for `/converse-stream` with its AWS event stream.

    `region` is that of the address; None if the address may lead anywhere.
    """

    region: str | None = None

    @property
    def framing(self) -> Framing:
        return "aws"

    def encode(self, request: Request, /, *, stream: bool) -> Encoded:
        found = ARN.match(request.model)
        if self.region is not None and found is not None and found[1] != self.region:
            raise bad_request(
                request,
                f"expected a model in {self.region!r}, where the calls go, got an ARN in {found[1]!r}: set region",
            )
        path = f"/model/{quote(request.model, safe='', errors='replace')}/{'converse-stream' if stream else 'converse'}"
        return Encoded(path, write_json(encode_body(self.with_known_form(request)), request))

    def decode(self, body: bytes, /) -> Response:
        raw = read_json(body)
        answer = as_object(raw)
        message = as_object(answer.get("output")).get("message")
        if not isinstance(message, dict):
            raise _error_in(answer, body) or not_an_answer(raw, body, NAME, "'output.message'")
        parts = _parts([as_object(block) for block in as_array(as_object(message).get("content"))])
        reason = as_text(answer.get("stopReason")) or None
        return Response.from_parts(
            parts,
            finish_reason=FINISH_REASONS.get(reason or "", reason),
            raw_finish_reason=reason,
            usage=_usage(as_object(answer.get("usage"))),
            model=_invoked_model(answer),
            details=_details(answer) | _citations(parts),
            raw=answer,
        )

    def decoder(self) -> BedrockDecoder:
        return BedrockDecoder()

    def decode_error(self, status: int, headers: Mapping[str, str], body: bytes, /) -> ProviderError:
        payload = _object_in(body)
        named = headers.get("x-amzn-errortype") or as_text(payload.get("__type")) or as_text(payload.get("code"))
        said = _message_in(payload)
        if not named and not said:  # not the service's own, but a proxy's
            return error_of_response(status, headers, body, service=NAME)
        return _error(named, said, body, status=status, headers=headers)


def _parts(blocks: Iterable[dict[str, Any]]) -> list[Part]:
    """Return the parts of an answer's content blocks. Blocks of unknown kinds stay opaque; empty blocks are left out."""
    parts: list[Part] = []
    calls = 0
    for block in blocks:
        if block and block.get("text") != "":
            parts.append(_part(block, calls))
            calls += isinstance(parts[-1], ToolCall)
    return parts


def _part(block: dict[str, Any], calls: int) -> Part:
    """Return the part of a content block. `calls` is the number of tool calls before it."""
    text = block.get("text")
    if isinstance(text, str):
        return Text(text)
    if "citationsContent" in block:
        return Text(_cited_text(block), raw=block)
    call = as_object(block.get("toolUse"))
    if "toolUse" in block and _is_for_caller(call):
        arguments = arguments_text(call.get("input"))
        return ToolCall(
            _call_id(call, calls), as_text(call.get("name")), raw_arguments=arguments, raw=_beside_call(call)
        )
    return _other_part(block)


def _other_part(block: dict[str, Any]) -> Reasoning | Image | Opaque:
    """Return the part of a block that is neither a text nor a tool call."""
    if "reasoningContent" in block:
        return _reasoning(block)
    return _image(block) or Opaque(DIALECT, block)


def _is_for_caller(call: dict[str, Any]) -> bool:
    """Whether the caller carries out a tool call, and not the service. Some models name the type of all calls."""
    return as_text(call.get("type")) in ("", "tool_use")


def _reasoning(block: dict[str, Any]) -> Reasoning:
    thought = as_object(as_object(block["reasoningContent"]).get("reasoningText"))
    return Reasoning(text=as_text(thought.get("text")), signature=as_text(thought.get("signature")) or None, raw=block)


def _cited_text(block: Mapping[str, Any]) -> str:
    content = as_array(as_object(block["citationsContent"]).get("content"))
    return "".join([as_text(as_object(item).get("text")) for item in content])


def _call_id(call: dict[str, Any], number: int) -> str:
    return as_text(call.get("toolUseId")) or f"call_{number}"


def _beside_call(call: dict[str, Any]) -> dict[str, Any] | None:
    """Return the fields of a tool call that a `ToolCall` does not have, to send them back with the call."""
    more = {name: value for name, value in call.items() if name not in ("toolUseId", "name", "input")}
    return {"toolUse": more} if more else None


def _image(block: dict[str, Any]) -> Image | None:
    """Return the image that a block holds; None if it holds none."""
    fields = as_object(block.get("image"))
    source, form = as_object(fields.get("source")), as_text(fields.get("format"))
    data = base64_bytes(as_text(source.get("bytes")))
    raw = {"image": {name: value for name, value in fields.items() if name != "source"}}
    if data and form:
        return Image(data=data, media_type=f"image/{form}", raw=raw)
    return None


def _details(holder: dict[str, Any]) -> dict[str, Any]:
    return {name: holder[name] for name in DETAILS if holder.get(name) is not None}


def _citations(parts: Iterable[Part]) -> dict[str, Any]:
    found = [
        each
        for part in parts
        if isinstance(part, Text) and part.raw is not None
        for each in as_array(as_object(part.raw.get("citationsContent")).get("citations"))
    ]
    return {"citations": found} if found else {}


def _invoked_model(holder: dict[str, Any]) -> str | None:
    """Return the model that a prompt router chose. Other answers do not name their model."""
    router = as_object(as_object(holder.get("trace")).get("promptRouter"))
    return as_text(router.get("invokedModelId")) or None


def _usage(counts: dict[str, Any]) -> Usage | None:
    """Return usage in OpenTelemetry's sense: the service's `inputTokens` exclude cache reads and writes."""
    if not counts:
        return None
    read, written = as_count(counts.get("cacheReadInputTokens")), as_count(counts.get("cacheWriteInputTokens"))
    return Usage(
        input_tokens=sum_known(as_count(counts.get("inputTokens")), read, written),
        output_tokens=as_count(counts.get("outputTokens")),
        cached_tokens=read,
        cache_write_tokens=written,
    )


# Streams


@attrs.define
class _Block:
    """A content block in progress."""

    kind: str
    """The name of its only field, such as "toolUse"; "text" also with citations, "redactedContent" for such reasoning."""
    fields: dict[str, Any]
    call: int | None = None
    """The index of the tool call, if the block is a call for the caller."""
    pieces: list[str] = attrs.Factory(list[str])
    """The pieces of its text, of its input as JSON text, or of its data in base64."""

    def whole(self) -> dict[str, Any]:
        """Return the block as a whole answer has it; a text with its citations."""
        fields, given = self.fields, "".join(self.pieces)
        match self.kind:
            case "text":
                return {"citationsContent": {"content": [{"text": given}], **fields}}
            case "reasoningContent":
                return {"reasoningContent": {"reasoningText": {"text": given, **fields}}}
            case "redactedContent":
                return {"reasoningContent": {"redactedContent": _joined_base64(self.pieces)}}
            case "toolUse":
                entered, problem = parse_arguments(given)
                fields = {**fields, "input": {"INVALID_JSON": given} if problem else entered}
            case "toolResult":
                fields = {**fields, "content": _joined_texts(as_array(fields.get("content")))}
            case "image" if given:
                fields = {**fields, "source": {"bytes": _joined_base64(self.pieces)}}
            case _:
                pass
        return {self.kind: fields}


def _joined_base64(pieces: list[str]) -> str:
    """Return data in base64 that came in pieces, each of which is encoded on its own."""
    found = [data for piece in pieces if (data := base64_bytes(piece)) is not None]
    if len(pieces) == 1 or len(found) < len(pieces):
        return "".join(pieces)
    return b64encode(b"".join(found)).decode()


def _joined_texts(content: list[Any]) -> list[Any]:
    """Return the content of a tool's result, with a text that came in pieces as one."""
    whole: list[Any] = []
    for is_text, items in groupby(content, lambda item: isinstance(as_object(item).get("text"), str)):
        run = list(items)
        whole += [{"text": "".join([item["text"] for item in run])}] if is_text else run
    return whole


class BedrockDecoder:
    """State of a stream: the content blocks in progress. `messageStop` ends an answer, and `metadata` follows it."""

    __slots__ = ("_after_text", "_blocks", "_calls", "_done", "_held", "_stopped")

    def __init__(self) -> None:
        self._blocks: dict[int, _Block] = {}
        self._after_text = False
        """Whether the last block was a text, so that another text is a block of its own."""
        self._calls = 0
        self._held = PendingFields()
        self._stopped = False
        self._done = False

    @property
    def done(self) -> bool:
        return self._done

    def decode_event(self, event: Event, /) -> Iterable[Chunk]:
        name = event.name
        if name == "contentBlockDelta":
            return self._delta(as_object(read_json(event.data)))
        kind, _, code = name.partition(":")
        if kind == "exception":
            raise _exception(code, event.data)
        if kind == "error":
            raise _error(code, event.data.decode(errors="replace"), event.data)
        data = as_object(read_json(event.data)) if name in _EVENTS else {}
        match name:
            case "contentBlockStart":
                return self._start(data)
            case "contentBlockStop":
                return self._held.flush() if self._finish(_index(data)) else ()
            case "messageStop":
                self._stop_message(data)
            case "metadata":
                self._done = self._stopped
                self._held.add(
                    usage=_usage(as_object(data.get("usage"))),
                    model=_invoked_model(data),
                    details=_details(data) or None,
                )
                return self._held.flush() if self._done else ()
            case _:
                pass  # `messageStart` has only the role; unknown events are ignored
        return ()

    def end(self) -> Iterable[Chunk]:
        yield from self._held.flush()
        if not self._stopped:
            raise cut_off(NAME, "messageStop")

    def _start(self, data: dict[str, Any]) -> Iterable[Chunk]:
        kind, value = _only_field(data.get("start"))
        if not kind:
            return ()
        fields = dict(as_object(value))
        if kind != "toolUse" or not _is_for_caller(fields):
            self._open(_index(data), _Block(kind, fields))
            return ()
        self._open(_index(data), _Block(kind, fields, self._calls))
        call = ToolCallDelta(
            index=self._calls,
            id=_call_id(fields, self._calls),
            name=as_text(fields.get("name")),
            raw=_beside_call(fields),
        )
        self._calls += 1
        return self._held.emit(tool_calls=(call,))

    def _open(self, index: int, block: _Block) -> _Block:
        """Begin a block. It ends the block before it, if no event did. Only calls go on beside other blocks."""
        for number, before in list(self._blocks.items()):
            if before.call is None:
                self._finish(number)
        if self._after_text and block.kind == "text":
            self._held.add(parts=(Text(""),))
        self._after_text = False
        self._blocks[index] = block
        return block

    def _delta(self, data: dict[str, Any]) -> Iterable[Chunk]:
        index = _index(data)
        name, value = _only_field(data.get("delta"))
        if not value:
            return ()
        fields = as_object(value)
        sealed = as_text(fields.get("redactedContent")) if name == "reasoningContent" else ""
        kind = "redactedContent" if sealed else "text" if name == "citation" else name
        block = self._blocks.get(index)
        if block is None or block.kind != kind:
            if name == "toolUse":  # a tool call begins with its name
                return ()
            block = self._open(index, _Block(kind, {}))
        match name:
            case "text":
                text = as_text(value)
                block.pieces.append(text)
                return self._held.emit(text) if text else ()
            case "citation":
                join_fields(block.fields, {"citations": [fields]})
                self._held.add(details={"citations": [fields]})
            case "toolUse":
                text = as_text(fields.get("input"))
                block.pieces.append(text)
                if text and block.call is not None:
                    return self._held.emit(tool_calls=(ToolCallDelta(index=block.call, arguments=text),))
            case "reasoningContent":
                text = as_text(fields.get("text"))
                block.pieces.append(sealed or text)
                join_fields(block.fields, {key: field for key, field in fields.items() if key != "text"})
                return self._held.emit(reasoning=text) if text else ()
            case "image":
                piece = as_text(as_object(fields.get("source")).get("bytes"))
                block.pieces.append(piece)
                join_fields(block.fields, {key: field for key, field in fields.items() if key != "source" or not piece})
            case _:
                join_fields(block.fields, {"content": value} if isinstance(value, list) else fields)
        return ()

    def _finish(self, index: int) -> bool:
        """Complete a block. Return whether it is output that has not been in a chunk."""
        block = self._blocks.pop(index, None)
        if block is None or block.call is not None:
            return False
        if block.kind == "text":
            self._after_text = True
            if "citations" in block.fields:
                self._held.add(parts=(Text("", raw=block.whole()),))
            return False
        part = _other_part(block.whole())
        self._held.add(parts=(part,))
        return not isinstance(part, Reasoning)

    def _stop_message(self, data: dict[str, Any]) -> None:
        for number in list(self._blocks):
            self._finish(number)
        self._stopped = True
        reason = as_text(data.get("stopReason")) or None
        self._held.add(
            finish_reason=FINISH_REASONS.get(reason or "", reason),
            raw_finish_reason=reason,
            details=_details(data) or None,
        )


_EVENTS: Final = ("contentBlockStart", "contentBlockStop", "messageStop", "metadata")


def _index(data: dict[str, Any]) -> int:
    return as_count(data.get("contentBlockIndex")) or 0


def _only_field(union: Any) -> tuple[str, Any]:
    """Return the name and the value of the only field that an object has."""
    return next(iter(as_object(union).items()), ("", None))


# Errors


_KINDS: Final[Mapping[str, type[ProviderError]]] = {
    "accessdenied": errors.PermissionDenied,
    "expiredtoken": errors.AuthenticationError,
    "incompletesignature": errors.AuthenticationError,
    "internalfailure": errors.ServerError,
    "internalserver": errors.ServerError,
    "invalidclienttokenid": errors.AuthenticationError,
    "invalidsignature": errors.AuthenticationError,
    "missingauthenticationtoken": errors.AuthenticationError,
    "modelerror": errors.ServerError,
    "modelnotready": errors.Overloaded,
    "modelstreamerror": errors.ServerError,
    "modeltimeout": errors.RequestTimeout,
    "requestexpired": errors.AuthenticationError,
    "resourcenotfound": errors.NotFound,
    "servicequotaexceeded": errors.QuotaExceeded,
    "serviceunavailable": errors.Overloaded,
    "signaturedoesnotmatch": errors.AuthenticationError,
    "throttling": errors.RateLimitError,
    "toomanyrequests": errors.RateLimitError,
    "unrecognizedclient": errors.AuthenticationError,
}
"""The class of each exception, by its name in lower case without "exception" at the end.

The message of a `validationException` decides what it is about.
"""
_BAD_KEY: Final = re.compile(r"\b(api key|bearer token|security token|authentication token)\b", re.IGNORECASE)
"""The words of a 403 about the key itself, and not about what its owner may do."""
_NO_MODEL: Final = "model identifier is invalid"
"""The words of a `validationException` about a model that does not exist."""


def _error(
    named: str, said: str, body: bytes, *, status: int | None = None, headers: Mapping[str, str] | None = None
) -> ProviderError:
    """Return the error that the service calls `named`, such as "ValidationException:http://…", with its message."""
    code = named.partition(":")[0].rpartition("#")[2]
    code = code[:1].upper() + code[1:]  # in streams, names begin with a small letter
    plain = code.lower().removesuffix("exception")
    kind = _KINDS.get(plain)
    if plain == "validation":
        kind = errors.NotFound if _NO_MODEL in said else class_of(400, (), said)
    elif (kind is errors.PermissionDenied or status == 403) and _BAD_KEY.search(said):
        kind = errors.AuthenticationError
    elif kind is errors.RateLimitError and "per day" in said.lower():
        kind = errors.QuotaExceeded
    report = Report(message=said, code=code or None, status=status, words=(code.lower(),))
    return error_of(report, status=status, headers=headers, excerpt=excerpt(body), service=NAME, kind=kind)


def _exception(code: str, data: bytes) -> ProviderError:
    """Return the error that an exception in a stream reports."""
    payload = _object_in(data)
    said = _message_in(payload) or as_text(payload.get("originalMessage"))
    return _error(code, said, data, status=as_count(payload.get("originalStatusCode")))


def _error_in(answer: dict[str, Any], body: bytes) -> ProviderError | None:
    """Return the error that the body of a 200 reports; None if it reports none."""
    named = as_text(answer.get("__type"))
    return _error(named, _message_in(answer), body) if named else None


def _object_in(body: bytes) -> dict[str, Any]:
    try:
        return as_object(read_json(body))
    except ProviderError:
        return {}


def _message_in(payload: dict[str, Any]) -> str:
    return as_text(payload.get("message")) or as_text(payload.get("Message"))


# Requests


_FOREIGN_IN_ID: Final = re.compile(r"[^a-zA-Z0-9_.:-]")
_LONGEST_ID: Final = 64
_CACHE_POINT: Final[Mapping[str, Any]] = {"type": "default"}


def encode_body(request: Request) -> dict[str, Any]:
    """Return the request body, without `extra`.

    Raises:
        BadRequest: the dialect does not support a parameter or its value.
    """
    reject_unsupported(request, NAME, ("seed", "frequency_penalty", "presence_penalty", "n"))
    request, output = _format(request)
    encoder = _Encoder(request)
    body: dict[str, Any] = {"messages": joined_turns(request, NAME, encoder.blocks)}
    system = [block for texts in system_texts(request, NAME) for text in texts for block in _text_blocks(text)]
    if system:
        body["system"] = system
    names = {"max_tokens": "maxTokens", "temperature": "temperature", "top_p": "topP"}
    config = {name: getattr(request, ours) for ours, name in names.items() if getattr(request, ours) is not None}
    if request.stop:
        config["stopSequences"] = list(request.stop)
    if config:
        body["inferenceConfig"] = config
    tools = _tool_config(request)
    if tools:
        body["toolConfig"] = tools
    more = _top_k(request)
    _reason(request, more, output)
    if more:
        body["additionalModelRequestFields"] = more
    if output:
        body["outputConfig"] = output
    return body


class _Encoder:
    """The messages of a request in the making."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._ids = CallIds(_FOREIGN_IN_ID, _LONGEST_ID)
        self._media = MediaBlocks(request)

    def blocks(self, message: Message) -> list[dict[str, Any]]:
        if message.role == "tool":
            return self._result(message)
        blocks = [block for part in message.parts for block in self._blocks(part, message)]
        # The service takes a turn of nothing but reasoning for the beginning of the next answer, and refuses it.
        return blocks if any("reasoningContent" not in block for block in blocks) else []

    def _blocks(self, part: Part, message: Message) -> list[dict[str, Any]]:
        if isinstance(part, Text):
            return _text_blocks(part)
        if isinstance(part, Media):
            if message.role == "assistant" and KINDS.isdisjoint(part.raw or {}):
                raise misplaced_media(self._request, part, f"a user's message or a tool's result for {NAME}")
            return [self._media.block(part), *_cache_point(part)]
        if isinstance(part, ToolCall):
            call = {"toolUseId": self._ids.new(part.id), "name": part.name, "input": sent_arguments(part)}
            return [{"toolUse": {**as_object((part.raw or {}).get("toolUse")), **call}}]
        if isinstance(part, Reasoning):
            return _reasoning_blocks(part, self._request)
        return [dict(part.raw)] if part.dialect == DIALECT else []

    def _result(self, message: Message) -> list[dict[str, Any]]:
        content = [block for part in message.content for block in self._result_blocks(part)]
        result: dict[str, Any] = {"toolUseId": self._ids.of(message.tool_call_id or ""), "content": content}
        if not content:  # some models refuse a result without content, others an empty text in it
            result["content"] = [{"text": "error" if message.is_error else "(empty)"}]
        if message.is_error:
            result["status"] = "error"
        return [{"toolResult": result}, *[block for part in message.content for block in _cache_point(part)]]

    def _result_blocks(self, part: ContentPart) -> list[dict[str, Any]]:
        if isinstance(part, Text):
            return [{"text": part.text}] if part.text.strip() else []
        block = self._media.block(part)
        if "audio" in block:
            raise bad_request(
                self._request, f"expected text, images, documents and video in a tool's result for {NAME}, got Audio"
            )
        return [block]


def _text_blocks(text: Text) -> list[dict[str, Any]]:
    """Return the block of a text, and its cache point. The service refuses texts of only white space."""
    raw = text.raw or {}
    block: dict[str, Any] = {"text": text.text}
    if "citationsContent" in raw:
        block = _cited(text, raw)
    elif "guardContent" in raw:
        guarded = as_object(as_object(raw["guardContent"]).get("text"))
        block = {"guardContent": {"text": {**guarded, "text": text.text}}}
    return [*([block] if text.text.strip() else []), *_cache_point(text)]


def _cited(text: Text, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a text with its citations as it came. A text that was changed since stands in it as one piece."""
    if _cited_text(raw) == text.text:
        return {"citationsContent": raw["citationsContent"]}
    return {"citationsContent": {**as_object(raw["citationsContent"]), "content": [{"text": text.text}]}}


def _cache_point(part: ContentPart) -> list[dict[str, Any]]:
    """Return the cache point after a part that asks for it, in this dialect's words or in Anthropic's."""
    raw = part.raw or {}
    if raw.get("cachePoint") is not None:
        return [{"cachePoint": {**_CACHE_POINT, **as_object(raw["cachePoint"])}}]
    if raw.get("cache_control") is not None:
        ttl = as_text(as_object(raw["cache_control"]).get("ttl"))
        return [{"cachePoint": {**_CACHE_POINT, **({"ttl": ttl} if ttl else {})}}]
    return []


def _reasoning_blocks(part: Reasoning, request: Request) -> list[dict[str, Any]]:
    """Return signed reasoning as it came. The service refuses reasoning without a signature.

    Claude's signatures are valid at every service that serves Claude, so Claude also gets its reasoning from elsewhere.
    """
    raw = part.raw
    if raw is not None and "reasoningContent" in raw:
        sealed = "redactedContent" in as_object(raw["reasoningContent"])
        return [{"reasoningContent": raw["reasoningContent"]}] if sealed or part.signature else []
    if part.signature is None or "claude" not in request.model or (raw is not None and not is_thinking_block(raw)):
        return []
    return [{"reasoningContent": {"reasoningText": {"text": part.text, "signature": part.signature}}}]


def _tool_config(request: Request) -> dict[str, Any]:
    """Return the tools and the choice among them. The service has no choice "none", and wants the tools of earlier calls."""
    choice = request.tool_choice
    if choice == "none" and any(message.tool_calls for message in request.messages):
        raise bad_request(
            request,
            f"tool_choice: expected 'auto', 'required' or a tool's name for {NAME} in a conversation with tool calls, "
            "got 'none'",
        )
    if choice == "none":
        return {}
    config: dict[str, Any] = {}
    if request.tools:
        config["tools"] = [{"toolSpec": _tool(tool)} for tool in request.tools]
    if choice is not None:
        names = {"auto": "auto", "required": "any"}
        config["toolChoice"] = {names[choice]: {}} if choice in names else {"tool": {"name": choice}}
    return config


def _tool(tool: Tool) -> dict[str, Any]:
    encoded: dict[str, Any] = {"name": tool.name, "inputSchema": {"json": tool.parameters}}
    if tool.description:
        encoded["description"] = tool.description
    if tool.strict is not None:
        encoded["strict"] = tool.strict
    return encoded


def _top_k(request: Request) -> dict[str, Any]:
    """Return the field for `top_k`, which is each model's own."""
    if request.top_k is None:
        return {}
    if "claude" in request.model:
        return {"top_k": request.top_k}
    if "nova" in request.model:
        return {"inferenceConfig": {"topK": request.top_k}}
    raise bad_request(
        request,
        f"{NAME} takes top_k only for Claude and Nova; for others use extra={{'additionalModelRequestFields': …}}",
    )


def _reason(request: Request, more: dict[str, Any], output: dict[str, Any]) -> None:
    """Add the reasoning effort to the model's own fields, or to the `outputConfig`."""
    effort, model = request.reasoning_effort, request.model
    if effort is None:
        return
    if "claude" in model:
        thinking, adaptive = thinking_of(request, NAME)
        more["thinking"] = thinking
        if adaptive is not None:
            output["effort"] = adaptive
    elif "nova" in model:
        off = effort == "none"
        more["reasoningConfig"] = {"type": "disabled"} if off else {"type": "enabled", "maxReasoningEffort": effort}
    elif "openai." in model:
        more["reasoning_effort"] = effort
    elif effort == "none":
        raise bad_request(request, f"reasoning_effort: expected an effort for {model} on {NAME}, got 'none'")
    else:
        output["effort"] = effort


def _format(request: Request) -> tuple[Request, dict[str, Any]]:
    """Return the part of `outputConfig` that comes from `response_format`, and the request to encode.

    The service takes the schema as JSON text. Claude is told a schema in words if it has no form for it.
    """
    wanted = format_of(request)
    if wanted == "json":
        raise bad_request(request, f"response_format: expected a JSON Schema or 'text' for {NAME}, got 'json'")
    if not isinstance(wanted, SchemaFormat):
        return request, {}
    taken: Mapping[str, Any] | None = for_claude(wanted.schema) if "claude" in request.model else wanted.schema
    if taken is None:
        return with_schema_in_words(request, wanted.schema), {}
    schema: dict[str, Any] = {"schema": json_of(taken, request).decode()}
    schema |= {name: value for name in ("name", "description") if (value := getattr(wanted, name)) is not None}
    return request, {"textFormat": {"type": "json_schema", "structure": {"jsonSchema": schema}}}
