"""LiteLLM's requests and answers: OpenAI's chat completions, as Python objects."""

from __future__ import annotations

from inspect import isgenerator
from typing import Any, TypeVar, cast

import attrs
import httpx
import msgspec

from fluxibly.errors import StreamProtocolError
from fluxibly.providers.dialects.json_values import as_array, as_object, as_text
from fluxibly.providers.dialects.openai_chat import Body, ChatDecoder, OpenAICodec
from fluxibly.providers.dialects.openai_parts import items_of
from fluxibly.providers.dialects.openai_request import Quirks, chat_body
from fluxibly.providers.http import end_connection
from fluxibly.types import Chunk, Message, Opaque, Request, Response, ToolCall, ToolCallDelta

_SERVICE = "the service (through LiteLLM)"
_QUIRKS = Quirks(
    top_k=True,
    reasoning_fields=("reasoning_content",),
    message_fields=("audio", "extra_content", "images", "reasoning_details", "refusal", "thinking_blocks"),
)
_CODEC = OpenAICodec(_QUIRKS, _SERVICE)


def body_of(request: Request, service: str, *, stream: bool) -> dict[str, Any]:
    """Return a request in OpenAI's format, with what LiteLLM keeps beside it. `service` is asked, by LiteLLM's name."""
    body = chat_body(request, _QUIRKS, stream=stream, service="LiteLLM")
    for message, sent in zip(request.messages, body["messages"], strict=True):
        if message.role == "assistant":
            _add_own(message, sent, _dialect(service))
    return body


def _dialect(service: str) -> str:
    return f"litellm-{service}"


def _add_own(message: Message, sent: dict[str, Any], dialect: str) -> None:
    """Add signatures and the results of a service's own tools to a message, where LiteLLM has them."""
    calls = {call.get("id"): call for call in as_array(sent.get("tool_calls"))}
    for part in message.parts:
        raw = part.raw or {}
        if isinstance(part, ToolCall) and part.id in calls:
            calls[part.id].update(raw.get(dialect) or {})
        elif isinstance(part, Opaque) and part.dialect == dialect:
            sent.update(raw)


def response_of(answer: Any, service: str) -> Response:
    """Return a whole answer as a response. `service` answered, by LiteLLM's name.

    Raises:
        ProviderError: the answer reports an error, or is not a chat completion.
    """
    plain = _plain(answer)
    messages = [_Message(service) for _ in plain.get("choices") or ()]
    for message, choice in zip(messages, plain.get("choices") or (), strict=True):
        message.prepare(choice.get("message"))
    response = _CODEC.decode(msgspec.json.encode(plain))
    request_id, limits = _headers(answer)
    first, *others = [
        message.completed(found) for message, found in zip(messages, (response, *response.alternatives), strict=False)
    ] or [response]
    return first.evolve(alternatives=others, request_id=request_id, rate_limits=limits)


def _plain(answer: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", answer.model_dump(mode="json"))


class StreamReader:
    """A reader for a single stream of LiteLLM. `service` answers, by LiteLLM's name."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._decoder = ChatDecoder(_SERVICE)
        self._message: _Message | None = None
        self._stream: Any = None
        self._model: str | None = None
        """The service's own name for the model, or else LiteLLM's name."""
        self._first: dict[str, Any] = {}

    def opened(self, stream: Any) -> Any:
        """Keep the stream, and return it."""
        self._stream = stream
        request_id, limits = _headers(stream)
        self._first = {"request_id": request_id, "rate_limits": limits or None}
        return stream

    def read(self, item: Any) -> list[Chunk]:
        """Return the chunks of an item.

        Raises:
            StreamProtocolError: the stream was cut off, and LiteLLM made up its end.
        """
        plain = _plain(item)
        hidden: Any = getattr(item, "_hidden_params", None) or {}
        self._model = hidden.get("provider_response_model") or self._model or plain.get("model")
        plain["model"] = self._model
        message = self._message = self._message or _Message(self._service)
        for choice in plain.get("choices") or ():
            message.prepare(choice.get("delta"))
            if choice.get("finish_reason"):
                self._check_end()
        return self._with_headers([*map(message.taken, self._decoder.take(msgspec.convert(plain, Body), b""))])

    def last(self) -> list[Chunk]:
        """Return the chunks that are left after the end of the stream.

        Raises:
            StreamProtocolError: the stream was cut off.
        """
        message = self._message or _Message(self._service)
        chunks = [*map(message.taken, self._decoder.end())]
        if rest := message.rest():
            chunks.append(rest)
        return self._with_headers(chunks)

    def _with_headers(self, chunks: list[Chunk]) -> list[Chunk]:
        """Return chunks; the first of the stream has the fields from the headers."""
        if chunks and self._first:
            chunks[0] = attrs.evolve(chunks[0], **self._first)
            self._first = {}
        return chunks

    def _check_end(self) -> None:
        came = [
            getattr(self._stream, name, "unknown") for name in ("received_finish_reason", "intermittent_finish_reason")
        ]
        if came == [None, None]:
            raise StreamProtocolError(f"the stream of {_SERVICE} was cut off: it ended without a finish reason")


class _Message:
    """The fields that LiteLLM keeps beside OpenAI's, of an answer that is whole or in pieces.

    The fields of a service are under `provider_specific_fields`. Only Anthropic's reasoning is beside them, too, where
    the dialect's decoder reads it.
    """

    def __init__(self, service: str) -> None:
        self._dialect = _dialect(service)
        self._calls: list[dict[str, Any]] = []
        """The own fields of the tool calls in the last piece of the answer."""
        self._fields: dict[str, Any] = {}
        self._details: dict[str, Any] = {}

    def prepare(self, message: Any) -> None:
        """Take the fields that OpenAI's decoder does not read, or would keep for itself."""
        fields = as_object(message)
        self._calls = [_own_fields(as_object(call)) for call in as_array(fields.get("tool_calls"))]
        self._note(as_object(fields.pop("provider_specific_fields", None)))
        if fields.get("reasoning_items"):
            self._fields["reasoning_items"] = fields["reasoning_items"]

    def _note(self, fields: dict[str, Any]) -> None:
        kept = {name: fields[name] for name in _KEPT if fields.get(name)}
        if "server_tool_calls" in kept:
            kept["server_tool_calls"] = [
                _without_index(as_object(call)) for call in as_array(kept["server_tool_calls"])
            ]
        if kept:
            self._fields["provider_specific_fields"] = {**self._fields.get("provider_specific_fields", {}), **kept}
        for name, value in fields.items():
            if name == "citation":  # a piece of a stream has one of them; a whole answer has them for each text
                self._details.setdefault("citations", []).append(value)
            elif name == "citations":
                self._details["citations"] = [citation for each in as_array(value) for citation in items_of(each)]
            elif value is not None and name not in _NOT_DETAILS:
                self._details[name] = value

    def completed(self, response: Response) -> Response:
        """Return a whole answer with these fields."""
        calls = [
            _with_own(call, own, self._dialect) for call, own in zip(response.tool_calls, self._calls, strict=False)
        ]
        response = response.evolve(
            tool_calls=calls + list(response.tool_calls[len(calls) :]),
            details={**response.details, **self._details},
        )
        if not self._fields:
            return response
        own = Opaque(self._dialect, self._fields)
        others = {name: getattr(response, name) for name in _BESIDE}
        return Response.from_parts((*response.parts, own), **others)

    def taken(self, chunk: Chunk) -> Chunk:
        """Return a chunk of the last piece of the answer with these fields."""
        if chunk.tool_calls and any(self._calls):
            deltas = [
                _with_own(delta, own, self._dialect) for delta, own in zip(chunk.tool_calls, self._calls, strict=False)
            ]
            chunk = attrs.evolve(chunk, tool_calls=tuple(deltas))
        return chunk

    def rest(self) -> Chunk | None:
        """Return what is known only at the end of a stream."""
        parts = (Opaque(self._dialect, self._fields),) if self._fields else ()
        return Chunk(parts=parts, details=self._details or None) if parts or self._details else None


_KEPT = ("compaction_blocks", "server_tool_calls", "thought_signatures", "tool_results", "web_search_results")
"""The fields of `provider_specific_fields` from which LiteLLM makes the service's own blocks again."""
_NOT_DETAILS = (
    *_KEPT,
    "code_interpreter_results",
    "compaction_delta",
    "compaction_start",
    "thinking_blocks",
    "web_search_calls",
)
"""The fields that are parts of the answer, or repeat these in another form."""
_BESIDE = ("finish_reason", "raw_finish_reason", "usage", "model", "id", "alternatives", "details", "raw")
_Call = TypeVar("_Call", ToolCall, ToolCallDelta)


def _without_index(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name != "index"}


def _own_fields(call: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a tool call that a service has beside OpenAI's, such as Gemini's signature."""
    found = {name: call[name] for name in ("provider_specific_fields", "caller") if call.get(name)}
    inner = as_object(call.get("function")).get("provider_specific_fields")
    return {"provider_specific_fields": inner, **found} if inner else found


def _with_own(call: _Call, own: dict[str, Any], dialect: str) -> _Call:
    if not own:
        return call
    signature = as_object(own.get("provider_specific_fields")).get("thought_signature")
    return attrs.evolve(call, signature=as_text(signature) or None, raw={**(call.raw or {}), dialect: own})


def _headers(answer: Any) -> tuple[str | None, dict[str, str]]:
    """Return the request id and the rate limits from the headers that LiteLLM keeps with an answer."""
    hidden: Any = getattr(answer, "_hidden_params", None) or {}
    given: Any = hidden.get("additional_headers") or {}
    headers = {str(name).lower().removeprefix("llm_provider-"): str(value) for name, value in given.items()}
    limits = {name: value for name, value in headers.items() if "ratelimit" in name}
    return headers.get("x-request-id") or headers.get("request-id"), limits


def close_stream(stream: Any) -> None:
    """Release the source that a LiteLLM stream reads from, wherever the stream keeps it."""
    for source in _sources(stream):
        close = getattr(source, "close", None)
        if close is not None:
            close()
            return


async def aclose_stream(stream: Any) -> None:
    """Release the source of an asynchronous LiteLLM stream, like `close_stream`."""
    for source in _sources(stream):
        close = getattr(source, "aclose", None) or getattr(source, "close", None)
        if close is not None:
            await close()
            return


def cut_stream(stream: Any) -> None:
    """End the connection of a synchronous stream while another thread reads from it."""
    for source in _sources(stream):
        response = _response_under(source)
        if response is not None:
            end_connection(response)
            return


def _response_under(source: Any, depth: int = 3) -> httpx.Response | None:
    """Return the httpx response that a source reads from: its attribute, or a local variable of its generators."""
    if isgenerator(source):
        held = list(source.gi_frame.f_locals.values()) if source.gi_frame else []
    else:
        held = [getattr(source, "response", None)]
    for value in held:
        if isinstance(value, httpx.Response):
            return value
    found = (_response_under(value, depth - 1) for value in held if isgenerator(value) and depth)
    return next(filter(None, found), None)


def _sources(stream: Any) -> list[Any]:
    inner = getattr(stream, "completion_stream", None)
    return [inner, getattr(inner, "streaming_response", None), getattr(inner, "response_iterator", None)]
