"""Pure codec for OpenAI's Responses API. https://platform.openai.com/docs/api-reference/responses

The service stores nothing (`store: false`): each request carries the whole conversation, including the model's
encrypted reasoning.

The dialect is one module, its responses first and its requests below, because both know the shape of each item.
"""

from __future__ import annotations

from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, Final, Literal

import attrs

from fluxibly._checks import is_mapping, kind_of
from fluxibly._formats import SchemaFormat
from fluxibly.aggregate import merged
from fluxibly.errors import ProviderError, StreamProtocolError
from fluxibly.providers.dialects.codec import Encoded, Event, Framing
from fluxibly.providers.dialects.decoding import PendingFields, base64_bytes, cut_off, not_an_answer
from fluxibly.providers.dialects.encoding import bad_request, format_of, media_data, reject_unsupported, write_json
from fluxibly.providers.dialects.errors import (
    Report,
    error_of,
    error_of_event,
    error_of_payload,
    error_of_response,
    excerpt,
)
from fluxibly.providers.dialects.json_values import as_array, as_object, as_text, read_json
from fluxibly.providers.dialects.openai_parts import finish_reason_of, usage_of
from fluxibly.providers.dialects.openai_request import MAX_LEARNED, Quirks, function_of, image_url, is_reasoning_model
from fluxibly.providers.dialects.openai_schema import named_schema
from fluxibly.providers.dialects.schemas import SchemaLearner
from fluxibly.types import (
    Chunk,
    ContentPart,
    Document,
    Image,
    Message,
    Opaque,
    Part,
    Reasoning,
    Request,
    Response,
    Text,
    ToolCall,
    ToolCallDelta,
)

# Responses

DIALECT: Final = "openai-responses"
"""The dialect of opaque parts that go back to this API."""

_FAILED: Final = frozenset({"failed", "cancelled"})
_CUSTOM: Final = "custom_tool_call"
_IMAGE: Final = "image_generation_call"
_RAN: Final = "x_search"
"""Our type for a search of X that xAI ran itself. It comes as the call of a custom tool, which xAI does not take back."""
_INPUTS: Final[Mapping[str, str]] = {"function_call": "arguments", _CUSTOM: "input"}
"""The types of tool calls, and the field that holds what the tool is called with."""
_REFUSAL: Final = "response.refusal.delta"
_FRAGMENTS: Final[Mapping[str, str]] = {
    "response.function_call_arguments.delta": "function_call",
    "response.custom_tool_call_input.delta": _CUSTOM,
}
"""The events with a piece of a tool call, and the call's type."""


@attrs.frozen
class ResponsesCodec(SchemaLearner):
    """Codec for the Responses API. `service` is the server's name in error messages."""

    quirks: Quirks = attrs.field(factory=lambda: Quirks(path="/responses"))
    service: str = "OpenAI"
    _not_reasoning: set[str] = attrs.field(factory=set[str], init=False, repr=False, eq=False)
    """The models that refused encrypted reasoning, although they have the name of a reasoning model."""

    @property
    def framing(self) -> Framing:
        return "sse"

    def encode(self, request: Request, /, *, stream: bool) -> Encoded:
        """Encode a request.

        Raises:
            BadRequest: the API does not support a parameter, or a value cannot be written as JSON.
        """
        body = responses_body(self.with_known_form(request), f"{self.service}'s Responses API")
        if request.model in self._not_reasoning:
            body.pop("include", None)
        if stream:
            body["stream"] = True
        return Encoded(self.quirks.path, write_json(body, request))

    def decode(self, body: bytes, /) -> Response:
        """Decode a whole body.

        Raises:
            ProviderError: the body of a 200 is an error, or the response failed.
            StreamProtocolError: the body is not a response.
        """
        raw = read_json(body)
        answer = as_object(raw)
        _raise_failure(answer, raw, body, self.service)
        if not isinstance(answer.get("output"), list):
            raise not_an_answer(raw, body, self.service, "'output'")
        return _response(answer, raw)

    def decoder(self) -> ResponsesDecoder:
        """Return a decoder for a stream."""
        return ResponsesDecoder(self.service)

    def decode_error(self, status: int, headers: Mapping[str, str], body: bytes, /) -> ProviderError:
        """Return the error of a non-2xx response."""
        return error_of_response(status, headers, body, service=self.service)

    def learn(self, request: Request, sent: bytes, error: ProviderError, /) -> str | None:
        """Remember that a model has no encrypted reasoning, or takes no schema, if `error` says so; see `Learner`."""
        refused = error.status == 400 and "encrypted content" in str(error).lower() and _ENCRYPTED.encode() in sent
        if not refused or "include" in request.extra or not is_reasoning_model(request.model):
            return SchemaLearner.learn(self, request, sent, error)
        if len(self._not_reasoning) >= MAX_LEARNED and request.model not in self._not_reasoning:
            return None
        self._not_reasoning.add(request.model)
        return f"leaves out {_ENCRYPTED}"


def _raise_failure(answer: dict[str, Any], raw: object, data: bytes, service: str, *, failed: bool = False) -> None:
    """Raise the error of a response that failed."""
    failed = failed or as_text(answer.get("status")) in _FAILED
    if not (failed or answer.get("error") or "output" not in answer):
        return
    error = error_of_payload(raw, body=data, service=service)
    if error is None and failed:
        report = Report(message="the response failed without a reason")
        error = error_of(report, payload=raw, excerpt=excerpt(data), service=service)
    if error is not None:
        raise error


def _response(answer: dict[str, Any], raw: object) -> Response:
    parts: list[Part] = []
    details: dict[str, Any] = {}
    refused = False
    calls = 0
    for item in map(as_object, as_array(answer.get("output"))):
        kind = _kind_of(item)
        if kind == "message":
            contents = _contents(item)
            parts += _texts(item, contents)
            beside = _beside_texts(contents, {})
            details = merged(details, beside) if beside else details
            refused = refused or _refuses(contents)
        else:
            parts += _parts_of(item, calls)
            calls += kind in _INPUTS
    finish, raw_finish = _finish(answer, called=calls > 0, refused=refused)
    return Response.from_parts(
        parts,
        finish_reason=finish,
        raw_finish_reason=raw_finish,
        usage=usage_of(answer.get("usage")),
        model=as_text(answer.get("model")) or None,
        id=as_text(answer.get("id")) or None,
        details=details,
        raw=raw,
    )


def _kind_of(item: Mapping[str, Any]) -> str:
    """Return the type of an item."""
    kind = as_text(item.get("type"))
    return _RAN if kind == _CUSTOM and as_text(item.get("call_id")).startswith("xs_") else kind


def _parts_of(item: dict[str, Any], number: int) -> list[Part]:
    """Return the parts of an item other than a message. A tool call without an id is named by its `number`."""
    kind = _kind_of(item)
    if kind == "reasoning":
        return [_reasoning(item)]
    if kind in _INPUTS:
        return [_call(item, number)]
    image = _image(item) if kind == _IMAGE else None
    if image is not None:
        return [image]
    return [Opaque(DIALECT, item)] if item else []


def _without(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


# The `raw` of a text has its content part as "part". The last text of a message has the message as "item", too. So it
# is known where a message ends. The `raw` of a tool call has its item as "item".


def _texts(item: dict[str, Any], contents: list[dict[str, Any]]) -> list[Text]:
    """Return the texts of a message and its contents, at least one."""
    texts = [as_text(content.get("text")) or as_text(content.get("refusal")) for content in contents]
    raws: list[dict[str, Any]] = [{"part": _without(content, "text", "refusal")} for content in contents]
    if not contents:
        texts.append("")
        raws.append({})
    raws[-1]["item"] = _without(item, "content")
    return [Text(text, raw=raw) for text, raw in zip(texts, raws, strict=True)]


def _contents(item: dict[str, Any]) -> list[dict[str, Any]]:
    return [content for content in map(as_object, as_array(item.get("content"))) if content]


def _refuses(contents: list[dict[str, Any]]) -> bool:
    return any(content.get("refusal") for content in contents)


def _beside_texts(contents: list[dict[str, Any]], seen: Mapping[int, Sequence[object]]) -> dict[str, Any]:
    """Return the annotations and the log probabilities of a message, but not the first annotations, which were seen."""
    annotations: list[Any] = []
    logprobs: list[Any] = []
    for number, content in enumerate(contents):
        annotations += as_array(content.get("annotations"))[len(seen.get(number, ())) :]
        logprobs += as_array(content.get("logprobs"))
    found = {"annotations": annotations, "logprobs": logprobs}
    return {name: values for name, values in found.items() if values}


def _call(item: dict[str, Any], number: int) -> ToolCall:
    call_id = as_text(item.get("call_id")) or as_text(item.get("id")) or f"call_{number}"
    kind = as_text(item.get("type"))
    given = _INPUTS[kind]
    raw: dict[str, Any] = {"type": "custom"} if kind == _CUSTOM else {}
    more = _without(item, "type", "call_id", "name", given)
    if more:
        raw["item"] = more
    return ToolCall(call_id, as_text(item.get("name")), raw_arguments=as_text(item.get(given)), raw=raw or None)


def _reasoning(item: dict[str, Any]) -> Reasoning:
    """Return a reasoning item. It is sent back unchanged except for its status, which the service does not accept."""
    said = [
        as_text(part.get("text")) for key in ("summary", "content") for part in map(as_object, as_array(item.get(key)))
    ]
    raw = {key: value for key, value in item.items() if key != "status" and value is not None}
    return Reasoning(text="".join(said), signature=as_text(item.get("encrypted_content")) or None, raw=raw)


def _image(item: dict[str, Any]) -> Image | None:
    """Return an image that the model made; None if it is not finished."""
    data = base64_bytes(as_text(item.get("result")))
    media_type = f"image/{as_text(item.get('output_format')) or 'png'}"
    return Image(data=data, media_type=media_type, raw=_without(item, "result")) if data else None


def _finish(answer: dict[str, Any], *, called: bool, refused: bool) -> tuple[str | None, str | None]:
    """Return the finish reason of a response, in fluxibly's terms and in the service's."""
    status = as_text(answer.get("status"))
    if status == "incomplete":
        reason = as_text(as_object(answer.get("incomplete_details")).get("reason")) or status
        return ("length" if reason == "max_output_tokens" else finish_reason_of(reason)), reason
    if status not in {"completed", ""}:
        return status, status
    return "content_filter" if refused else "tool_call" if called else "stop", status or None


class _Item:
    """An item of the output, as far as it has been streamed."""

    __slots__ = (
        "annotations",
        "begun",
        "closed",
        "contents",
        "done",
        "fields",
        "index",
        "logprobs",
        "number",
        "open",
        "raw",
        "spoke",
        "type",
    )

    def __init__(self, kind: str, index: int | None, number: int, fields: dict[str, Any]) -> None:
        self.type = kind
        self.index = index
        """The position in the output; None if the server does not say."""
        self.number = number
        """The position among the tool calls."""
        self.fields = fields
        """The item as it began; empty if it began without an event of its own."""
        self.done = False
        self.spoke = False
        """Whether a piece of its reasoning or of its arguments has arrived."""
        self.begun = False
        """For a tool call: whether its name and id have gone out."""
        self.raw: Mapping[str, Any] | None = None
        """For a tool call: its `raw`, as far as it has gone out."""
        # The rest is for messages; their contents are known by their numbers.
        self.open: int | None = None
        """The content whose text is under way."""
        self.closed: set[int] = set()
        """The contents whose texts are complete."""
        self.contents: dict[int, dict[str, Any]] = {}
        """The fields beside the text of each content that has its text under way."""
        self.annotations: dict[int, list[Any]] = {}
        self.logprobs: list[Any] = []


class ResponsesDecoder:
    """State of a stream of the Responses API, whose last event holds the whole response.

    Servers leave out events, or numbers, or the output of the last event. So an item is known by its type and position,
    and what no event brought is taken from the last one.
    """

    def __init__(self, service: str) -> None:
        self._service = service
        self._items: dict[str, list[_Item]] = {}
        """The items of each type, in the order in which they began."""
        self._calls = 0
        self._current: _Item | None = None
        """The item that the last output belongs to."""
        self._speaking: tuple[object, object, str] | None = None
        """The position and type of the last event, if it was a piece of text, and so nothing is pending."""
        self._pending = PendingFields()
        self._refused = False
        self.done = False

    def decode_event(self, event: Event, /) -> Iterable[Chunk]:
        """Return the chunks of an event.

        Raises:
            ProviderError: the event is an error, or the response failed.
            StreamProtocolError: the event is not JSON.
        """
        data = event.data
        if self.done:
            return ()
        if event.name == "error":
            raise error_of_event(data, service=self._service)
        if not data or data.strip() == b"[DONE]":
            return ()
        raw = read_json(data)
        body = as_object(raw)
        kind = as_text(body.get("type")) or event.name
        if kind in {"response.output_text.delta", _REFUSAL}:
            return self._text(body, kind)
        self._speaking = None
        if kind in {"response.reasoning_summary_text.delta", "response.reasoning_text.delta"}:
            return self._think(body)
        if kind in _FRAGMENTS:
            return self._arguments(_FRAGMENTS[kind], body)
        if kind == "response.output_item.added":
            return self._begin_item(body)
        if kind == "response.output_item.done":
            return self._finish_item(body)
        if kind == "response.content_part.done":
            self._note_content(body)
        elif kind == "response.output_text.annotation.added":
            self._annotate(body)
        elif kind in {"response.completed", "response.incomplete", "response.failed", "response.cancelled"}:
            return self._end_response(as_object(body.get("response")), data, failed=kind[9:] in _FAILED)
        elif kind == "error" or not kind:
            reported = error_of_payload(raw, body=data, service=self._service)
            raise reported or StreamProtocolError(
                f"{self._service} sent an event without a usable type or error message", body=excerpt(data)
            )
        return ()

    def end(self) -> Iterable[Chunk]:
        """Return no more chunks, because the last event completed the response.

        Raises:
            StreamProtocolError: the stream was cut off.
        """
        if not self.done:
            raise cut_off(self._service, "the event that completes the response")
        return ()

    # Pieces

    def _text(self, body: dict[str, Any], kind: str) -> Iterable[Chunk]:
        said = as_text(body.get("delta"))
        if not said:
            return ()
        place = (body.get("output_index"), body.get("content_index"), kind)
        if place == self._speaking and not body.get("logprobs"):
            return (Chunk(said),)
        item = self._under_way("message", body)
        self._enter(item)
        self._open(item, _number(body.get("content_index")), kind)
        item.logprobs += as_array(body.get("logprobs"))
        self._speaking = place
        return self._pending.emit(said)

    def _think(self, body: dict[str, Any]) -> Iterable[Chunk]:
        said = as_text(body.get("delta"))
        if not said:
            return ()
        item = self._under_way("reasoning", body)
        item.spoke = True
        self._enter(item)
        return self._pending.emit(reasoning=said)

    def _arguments(self, kind: str, body: dict[str, Any]) -> Iterable[Chunk]:
        fragment = as_text(body.get("delta"))
        if not fragment or (kind == _CUSTOM and self._find(_RAN, body) is not None):
            return ()
        item = self._under_way(kind, body)
        item.spoke = True
        self._enter(item)
        return self._pending.emit(tool_calls=(ToolCallDelta(index=item.number, arguments=fragment),))

    def _note_content(self, body: dict[str, Any]) -> None:
        item = self._find("message", body)
        number = _number(body.get("content_index"))
        part = as_object(body.get("part"))
        if item is not None and part and item.open is not None and number in (None, item.open):
            item.contents[item.open] = _without(part, "text", "refusal")

    def _annotate(self, body: dict[str, Any]) -> None:
        item = self._find("message", body)
        annotation: object = body.get("annotation")
        if item is not None and annotation is not None:
            number = _number(body.get("content_index"))
            item.annotations.setdefault(item.open or 0 if number is None else number, []).append(annotation)
            self._pending.add(details={"annotations": [annotation]})

    # Items

    def _find(self, kind: str, body: dict[str, Any], *, last: bool = True) -> _Item | None:
        """Return the item under way that an event is about: the one at its position, else the last or the first."""
        under_way = [item for item in self._items.get(kind, ()) if not item.done]
        index = _number(body.get("output_index"))
        found = [item for item in under_way if item.index == index] if index is not None else []
        # Only a server that announces its items may have wrong numbers: otherwise a new number is a new item.
        found = found or [item for item in under_way if item.fields or not last or index is None or item.index is None]
        return found[-1 if last else 0] if found else None

    def _under_way(self, kind: str, body: dict[str, Any]) -> _Item:
        return self._find(kind, body) or self._begin(kind, body, {})

    def _begin(self, kind: str, body: dict[str, Any], fields: dict[str, Any]) -> _Item:
        item = _Item(kind, _number(body.get("output_index")), self._calls, fields)
        self._items.setdefault(kind, []).append(item)
        self._calls += kind in _INPUTS
        return item

    def _begin_item(self, body: dict[str, Any]) -> Iterable[Chunk]:
        """Begin an item of the output. The event of a tool call has the call's name and id."""
        fields = as_object(body.get("item"))
        kind = _kind_of(fields)
        item = self._begin(kind, body, fields)
        if kind not in _INPUTS:
            return ()
        return self._emit_call(item, _completed(fields))

    def _finish_item(self, body: dict[str, Any]) -> Iterable[Chunk]:
        """Finish an item: keep what is sent back with it, and emit what no other event carried."""
        fields = as_object(body.get("item"))
        kind = _kind_of(fields)
        return self._complete(self._find(kind, body, last=False) or self._begin(kind, body, {}), fields)

    def _complete(self, item: _Item, fields: dict[str, Any]) -> Iterable[Chunk]:
        item.done = True
        if item.type == "message":
            return self._complete_message(item, fields)
        if item.type in _INPUTS:
            return self._emit_call(item, fields)
        parts = tuple(_parts_of(fields, 0))
        if item.type == "reasoning" and item.spoke:
            self._pending.add(parts=parts)  # even later, it takes the place of what was streamed
            return ()
        self._enter(item)
        said = "".join([part.text for part in parts if isinstance(part, Reasoning)])
        if item.type != "reasoning" or said:
            return self._pending.emit(reasoning=said, parts=parts) if parts else ()
        self._pending.add(parts=parts)
        return ()

    def _emit_call(self, item: _Item, fields: dict[str, Any]) -> Iterable[Chunk]:
        """Emit what is new of a tool call."""
        call = _call(fields, item.number)
        given = "" if item.spoke else as_text(fields.get(_INPUTS[item.type]))
        if item.begun and not given and call.raw == item.raw:
            return ()
        delta = ToolCallDelta(
            index=item.number,
            id=None if item.begun else call.id,
            name=None if item.begun else call.name,
            arguments=given,
            raw=call.raw,
        )
        item.begun, item.spoke, item.raw = True, item.spoke or bool(given), call.raw
        self._enter(item)
        return self._pending.emit(tool_calls=(delta,))

    def _complete_message(self, item: _Item, fields: dict[str, Any]) -> Iterable[Chunk]:
        contents = _contents(fields)
        self._refused = self._refused or _refuses(contents)
        beside = _beside_texts(contents, item.annotations)
        if item.logprobs:
            beside.setdefault("logprobs", item.logprobs)
        self._pending.add(details=beside or None)
        if not contents and (item.closed or item.open is not None):
            self._close(item, _without(fields, "content"))  # the server does not repeat what it streamed
            return ()
        texts = _texts(fields, contents)
        under_way = None if item.open is None else min(item.open, len(texts) - 1)
        chunks: list[Chunk] = []
        for number, text in enumerate(texts):
            if number != under_way:
                if number in item.closed:
                    continue
                self._enter(item)
                chunks += self._pending.emit(text.text) if text.text else ()
            self._pending.add(parts=(Text("", raw=text.raw),))
        item.open = None
        return chunks

    # Texts

    def _enter(self, item: _Item) -> None:
        """Let the next output belong to an item. If it follows the text of another item, that text is complete."""
        before, self._current = self._current, item
        if before is not None and before is not item:
            self._close(before, _completed(_without(before.fields, "content")))

    def _open(self, item: _Item, number: int | None, kind: str) -> None:
        """Let the next text belong to a content of a message."""
        if number is None:
            number = len(item.closed) if item.open is None else item.open
        if number == item.open:
            return
        self._close(item)
        item.open = number
        if kind == _REFUSAL:
            self._refused = True
            item.contents[number] = {"type": "refusal"}
        else:
            notes = item.annotations.setdefault(number, [])
            item.contents[number] = {"type": "output_text", "annotations": notes}

    def _close(self, item: _Item, fields: dict[str, Any] | None = None) -> None:
        """Complete the text under way of a message, if there is one. `fields` are those of a message that it ends."""
        if item.open is not None:
            raw = {"part": item.contents[item.open]} | ({} if fields is None else {"item": fields})
            self._pending.add(parts=(Text("", raw=raw),))
            item.closed.add(item.open)
            item.open = None

    def _end_response(self, answer: dict[str, Any], data: bytes, *, failed: bool) -> Iterable[Chunk]:
        _raise_failure(answer, answer, data, self._service, failed=failed)
        self.done = True
        chunks: list[Chunk] = []
        seen: Counter[str] = Counter()
        for fields in map(as_object, as_array(answer.get("output"))):
            kind = _kind_of(fields)
            streamed = self._items.get(kind, [])
            item = streamed[seen[kind]] if seen[kind] < len(streamed) else self._begin(kind, {}, {})
            seen[kind] += 1
            if not item.done:
                chunks += self._complete(item, fields)
        for item in self._items.get("message", ()):
            if not item.done:
                chunks += self._complete(item, _completed(item.fields))
        finish, raw_finish = _finish(answer, called=self._calls > 0, refused=self._refused)
        self._pending.add(
            finish_reason=finish,
            raw_finish_reason=raw_finish,
            usage=usage_of(answer.get("usage")),
            model=as_text(answer.get("model")) or None,
            id=as_text(answer.get("id")) or None,
        )
        return (*chunks, *self._pending.flush())


def _number(value: object) -> int | None:
    return value if type(value) is int else None


def _completed(fields: dict[str, Any]) -> dict[str, Any]:
    """Return an item that has begun as it will be when it is complete."""
    return {**fields, "status": "completed"} if fields.get("status") == "in_progress" else fields


# Requests


_NOT_TAKEN: Final = ("top_k", "frequency_penalty", "presence_penalty", "seed", "n")
_ENCRYPTED: Final = "reasoning.encrypted_content"


def responses_body(request: Request, service: str) -> dict[str, Any]:
    """Return the body of a request, without `extra`.

    Raises:
        BadRequest: the API does not support a parameter.
    """
    reject_unsupported(request, service, _NOT_TAKEN)
    if request.stop:
        reject_unsupported(request, service, ("stop",))
    body: dict[str, Any] = {
        "model": request.model,
        "input": _input(request, service),
        "store": False,
    }
    if is_reasoning_model(request.model):
        body["include"] = [_ENCRYPTED]  # other models reject it
    for name, ours in (("temperature", "temperature"), ("top_p", "top_p"), ("max_output_tokens", "max_tokens")):
        value = getattr(request, ours)
        if value is not None:
            body[name] = value
    if request.reasoning_effort is not None:
        body["reasoning"] = {"effort": request.reasoning_effort}
    if request.tools:
        body["tools"] = [{"type": "function", "strict": False, **function_of(tool)} for tool in request.tools]
    choice = request.tool_choice
    if choice is not None:
        named = {"type": "function", "name": choice}
        body["tool_choice"] = choice if choice in {"auto", "none", "required"} else named
    wanted = format_of(request)
    if wanted is not None:
        body["text"] = {"format": _text_format(wanted)}
    return body


def _text_format(wanted: Literal["text", "json"] | SchemaFormat) -> dict[str, Any]:
    if not isinstance(wanted, SchemaFormat):
        return {"type": "json_object" if wanted == "json" else "text"}
    return {"type": "json_schema", **named_schema(wanted)}


def _input(request: Request, service: str) -> list[dict[str, Any]]:
    """Return the items of a conversation."""
    items: list[dict[str, Any]] = []
    custom: dict[str, bool] = {}
    """Whether each call is one of a custom tool, by its id."""
    for message in request.messages:
        if message.role == "assistant":
            items += _assistant(message, request, service)
            custom.update({call.id: _is_custom(call) for call in message.tool_calls})
            continue
        content = _content(message, request, service)
        if message.role == "tool":
            call_id = message.tool_call_id or ""
            kind = _CUSTOM if custom.get(call_id) else "function_call"
            items.append({"type": f"{kind}_output", "call_id": call_id, "output": content})
        else:
            items.append({"role": message.role, "content": content})
    return items


def _content(message: Message, request: Request, service: str) -> str | list[dict[str, Any]]:
    """Return what a user or a tool says: a string, or content parts if there is media."""
    if all(isinstance(part, Text) for part in message.content):
        return message.text
    return [
        _input_part(part, request, service)
        for part in message.content
        if not isinstance(part, Text) or part.text.strip()
    ]


def _input_part(part: ContentPart, request: Request, service: str) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "input_text", "text": part.text}
    if isinstance(part, Image):
        return {"type": "input_image", "image_url": image_url(part), "detail": part.detail or "auto"}
    if not isinstance(part, Document):
        raise bad_request(request, f"expected text, images and documents for {service}, got {kind_of(part)}")
    found = media_data(part)
    if found is None:
        return {"type": "input_file", "file_url": part.url}
    kind, data = found
    name = part.name or f"document.{kind.rpartition('/')[2]}"
    return {"type": "input_file", "filename": name, "file_data": f"data:{kind};base64,{data}"}


def _assistant(message: Message, request: Request, service: str) -> Iterator[dict[str, Any]]:
    """Yield the items of an assistant's message in their order. What another dialect made is left out."""
    stored = bool(request.extra.get("store"))
    texts: list[Text] = []
    for part in message.parts:
        if isinstance(part, Text):
            texts.append(part)
            continue
        yield from _messages(texts)
        texts = []
        if isinstance(part, ToolCall):
            yield _call_item(part)
        elif isinstance(part, Reasoning):
            if part.raw and _goes_back(part.raw, stored=stored):
                yield dict(part.raw)
        elif isinstance(part, Opaque):
            if part.dialect == DIALECT and _kind_of(part.raw) != _RAN:
                yield dict(part.raw)
        else:
            yield _image_item(part, request, service)
    yield from _messages(texts)


def _messages(texts: list[Text]) -> Iterator[dict[str, Any]]:
    """Yield texts that follow one another as messages: those that came as a message as they came, others joined."""
    waiting: list[Text] = []
    for text in texts:
        waiting.append(text)
        item = _own(text, "item")
        if item is not None:
            before = [*takewhile(lambda each: _own(each, "part") is not None, reversed(waiting[:-1]))]
            yield from _plain_message(waiting[: -1 - len(before)])
            contents = [content for each in (*reversed(before), text) if (content := _content_of(each))]
            yield {"type": "message", "role": "assistant", **item, "content": contents}
            waiting = []
    yield from _plain_message(waiting)


def _plain_message(texts: list[Text]) -> Iterator[dict[str, Any]]:
    text = "".join([each.text for each in texts])
    if text.strip():  # llama.cpp accepts only this long form
        yield {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}


def _own(part: Text | ToolCall, name: str) -> Mapping[str, Any] | None:
    """Return what this dialect noted beside a part; None if it noted nothing."""
    noted: object = None if part.raw is None else part.raw.get(name)
    return noted if is_mapping(noted) else None


def _content_of(text: Text) -> dict[str, Any]:
    """Return a text as the content part that it came as."""
    part = dict(_own(text, "part") or {})
    if not text.text and part.get("type") not in ("output_text", "refusal"):
        return part
    part.setdefault("type", "output_text")
    part["refusal" if part["type"] == "refusal" else "text"] = text.text
    return part


def _is_custom(call: ToolCall) -> bool:
    return call.raw is not None and call.raw.get("type") == "custom"


def _call_item(call: ToolCall) -> dict[str, Any]:
    kind = _CUSTOM if _is_custom(call) else "function_call"
    return {
        "type": kind,
        **(_own(call, "item") or {}),
        "call_id": call.id,
        "name": call.name,
        _INPUTS[kind]: call.raw_arguments,
    }


def _goes_back(raw: Mapping[str, Any], *, stored: bool) -> bool:
    """Whether a block is reasoning of this dialect. A bare id is useless, unless the service stores the response."""
    return raw.get("type") == "reasoning" and bool(stored or raw.get("encrypted_content") or raw.get("content"))


def _image_item(part: Part, request: Request, service: str) -> dict[str, Any]:
    """Return the item of an image that the model made."""
    if isinstance(part, Image) and part.data is not None and part.raw is not None and part.raw.get("type") == _IMAGE:
        return {**part.raw, "result": b64encode(part.data).decode()}
    raise bad_request(
        request,
        f"an assistant's message: expected text, tool calls and images that {service} made, got {kind_of(part)}; "
        "leave it out, or describe it in text",
    )
