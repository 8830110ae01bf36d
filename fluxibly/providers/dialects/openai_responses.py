"""Pure codec for OpenAI's Responses API. https://platform.openai.com/docs/api-reference/responses

The service stores nothing (`store: false`): each request carries the whole conversation, including the model's
encrypted reasoning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import attrs

from fluxibly.errors import ProviderError, StreamProtocolError
from fluxibly.providers.dialects.codec import Encoded, Event, Framing
from fluxibly.providers.dialects.decoding import cut_off, not_an_answer
from fluxibly.providers.dialects.encoding import reject_unsupported, write_json
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
from fluxibly.providers.dialects.openai_request import Quirks, function_of, image_url, is_reasoning_model, named_schema
from fluxibly.types import Chunk, Image, Message, Reasoning, Request, Response, ToolCall, ToolCallDelta

# Responses


_FAILED: Final = frozenset({"failed", "cancelled"})


@attrs.frozen
class ResponsesCodec:
    """Codec for the Responses API. `service` is the server's name in error messages."""

    quirks: Quirks = attrs.field(factory=lambda: Quirks(path="/responses"))
    service: str = "OpenAI"

    @property
    def framing(self) -> Framing:
        return "sse"

    def encode(self, request: Request, /, *, stream: bool) -> Encoded:
        """Encode a request.

        Raises:
            BadRequest: the API does not support a parameter, or a value cannot be written as JSON.
        """
        body = responses_body(request, f"{self.service}'s Responses API")
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
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    parts: list[Reasoning] = []
    refused = False
    for item in map(as_object, as_array(answer.get("output"))):
        if item.get("type") == "message":
            for part in map(as_object, as_array(item.get("content"))):
                texts.append(as_text(part.get("text")) or as_text(part.get("refusal")))
                refused = refused or bool(part.get("refusal"))
        elif item.get("type") == "function_call":
            calls.append(_call(item, len(calls)))
        elif item.get("type") == "reasoning":
            parts.append(_reasoning(item))
            thoughts.append(parts[-1].text)
    finish, raw_finish = _finish(answer, called=bool(calls), refused=refused)
    return Response(
        "".join(texts),
        tool_calls=calls,
        reasoning="".join(thoughts),
        reasoning_parts=parts,
        finish_reason=finish,
        raw_finish_reason=raw_finish,
        usage=usage_of(answer.get("usage")),
        model=as_text(answer.get("model")) or None,
        id=as_text(answer.get("id")) or None,
        raw=raw,
    )


def _call(item: dict[str, Any], number: int) -> ToolCall:
    call_id = as_text(item.get("call_id")) or as_text(item.get("id")) or f"call_{number}"
    return ToolCall(call_id, as_text(item.get("name")), raw_arguments=as_text(item.get("arguments")))


def _reasoning(item: dict[str, Any]) -> Reasoning:
    """Return a reasoning item. It is sent back unchanged except for its status, which the service does not accept."""
    said = [
        as_text(part.get("text")) for key in ("summary", "content") for part in map(as_object, as_array(item.get(key)))
    ]
    raw = {key: value for key, value in item.items() if key != "status" and value is not None}
    return Reasoning(text="".join(said), signature=as_text(item.get("encrypted_content")) or None, raw=raw)


def _finish(answer: dict[str, Any], *, called: bool, refused: bool) -> tuple[str | None, str | None]:
    """Return the finish reason of a response, in fluxibly's terms and in the service's."""
    status = as_text(answer.get("status"))
    if status == "incomplete":
        reason = as_text(as_object(answer.get("incomplete_details")).get("reason")) or status
        return ("length" if reason == "max_output_tokens" else finish_reason_of(reason)), reason
    if status not in {"completed", ""}:
        return status, status
    return "content_filter" if refused else "tool_call" if called else "stop", status or None


class ResponsesDecoder:
    """State of a stream of the Responses API, whose last event holds the whole response."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._calls: dict[int, list[str]] = {}
        """The fragments of each tool call's arguments, by the call's position in the output."""
        self._spoke = False
        self._thought = False
        """Whether the reasoning of the current item has arrived."""
        self._refused = False
        self.done = False

    def decode_event(self, event: Event, /) -> Iterable[Chunk]:
        """Return the chunks of an event.

        Raises:
            ProviderError: the event is an error, or the response failed.
            StreamProtocolError: the event is not JSON.
        """
        data = event.data
        if self.done or not data or data.strip() == b"[DONE]":
            return ()
        if event.name == "error":
            raise error_of_event(data, service=self._service)
        raw = read_json(data)
        body = as_object(raw)
        kind = as_text(body.get("type")) or event.name
        if kind in {"response.output_text.delta", "response.refusal.delta"}:
            return self._text(body, kind)
        if kind in {"response.reasoning_summary_text.delta", "response.reasoning_text.delta"}:
            said = as_text(body.get("delta"))
            self._thought = self._thought or bool(said)
            return (Chunk(reasoning=said),) if said else ()
        if kind == "response.function_call_arguments.delta":
            return self._arguments(body, as_text(body.get("delta")))
        if kind == "response.output_item.added":
            return self._begin(body)
        if kind == "response.output_item.done":
            return self._finish_item(body)
        if kind in {"response.completed", "response.incomplete", "response.failed", "response.cancelled"}:
            return self._end_response(as_object(body.get("response")), data, failed=kind[9:] in _FAILED)
        if kind == "error" or not kind:
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

    def _text(self, body: dict[str, Any], kind: str) -> Iterable[Chunk]:
        said = as_text(body.get("delta"))
        if not said:
            return ()
        self._spoke = True
        self._refused = self._refused or kind == "response.refusal.delta"
        return (Chunk(said),)

    def _arguments(self, body: dict[str, Any], fragment: str) -> Iterable[Chunk]:
        place = _place(body)
        if not fragment:
            return ()
        self._calls.setdefault(place, []).append(fragment)
        return (Chunk(tool_calls=(ToolCallDelta(index=place, arguments=fragment),)),)

    def _begin(self, body: dict[str, Any]) -> Iterable[Chunk]:
        """Begin an item of the output. The event of a tool call has the call's name and id."""
        item = as_object(body.get("item"))
        if item.get("type") != "function_call":
            return ()
        place = _place(body)
        call = _call(item, place)
        fragments = self._calls.setdefault(place, [])
        given = as_text(item.get("arguments"))
        if given:
            fragments.append(given)
        return (Chunk(tool_calls=(ToolCallDelta(index=place, id=call.id, name=call.name, arguments=given),)),)

    def _finish_item(self, body: dict[str, Any]) -> Iterable[Chunk]:
        """Finish an item: keep reasoning so that it can be sent back, and emit content that no delta carried."""
        item = as_object(body.get("item"))
        if item.get("type") == "reasoning":
            part = _reasoning(item)
            said, self._thought = "" if self._thought else part.text, False
            return (Chunk(reasoning=said, reasoning_parts=(part,)),)
        if item.get("type") != "function_call":
            return ()
        place = _place(body)
        if place not in self._calls:
            return self._begin(body)
        if not self._calls[place]:
            return self._arguments(body, as_text(item.get("arguments")))
        return ()

    def _end_response(self, answer: dict[str, Any], data: bytes, *, failed: bool) -> Iterable[Chunk]:
        _raise_failure(answer, answer, data, self._service, failed=failed)
        self.done = True
        finish, raw_finish = _finish(answer, called=bool(self._calls), refused=self._refused)
        return (
            Chunk(
                "" if self._spoke else _response(answer, None).text,  # some servers send the text without deltas
                finish_reason=finish,
                raw_finish_reason=raw_finish,
                usage=usage_of(answer.get("usage")),
                model=as_text(answer.get("model")) or None,
                id=as_text(answer.get("id")) or None,
            ),
        )


def _place(body: dict[str, Any]) -> int:
    place: object = body.get("output_index")
    return place if type(place) is int else 0


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
        "input": [item for message in request.messages for item in _items(message)],
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
    if request.response_format is not None:
        body["text"] = {"format": _text_format(request.response_format)}
    return body


def _text_format(wanted: str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(wanted, str):
        return {"type": "json_object" if wanted == "json" else "text"}
    return {"type": "json_schema", **named_schema(wanted)}


def _items(message: Message) -> list[dict[str, Any]]:
    """Return the items of a message. Reasoning, content and tool calls are separate items."""
    if message.role == "tool":
        return [
            {
                "type": "function_call_output",
                "call_id": message.tool_call_id or "",
                "output": _contents(message) if _has_image(message) else message.text,
            }
        ]
    items = [dict(part.raw) for part in message.reasoning if part.raw and _goes_back(part.raw)]
    if message.content:
        items.append(_said(message))
    items.extend(
        {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": call.raw_arguments}
        for call in message.tool_calls
    )
    return items


def _said(message: Message) -> dict[str, Any]:
    if message.role == "assistant":  # llama.cpp accepts only this long form
        return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": message.text}]}
    return {"role": message.role, "content": _contents(message) if _has_image(message) else message.text}


def _goes_back(raw: Mapping[str, Any]) -> bool:
    """Whether a block is complete reasoning of this dialect. A bare id is useless, because nothing is stored."""
    return raw.get("type") == "reasoning" and bool(raw.get("encrypted_content") or raw.get("content"))


def _has_image(message: Message) -> bool:
    return any(isinstance(part, Image) for part in message.content)


def _contents(message: Message) -> list[dict[str, Any]]:
    return [
        {"type": "input_image", "image_url": image_url(part), "detail": part.detail or "auto"}
        if isinstance(part, Image)
        else {"type": "input_text", "text": part.text}
        for part in message.content
    ]
