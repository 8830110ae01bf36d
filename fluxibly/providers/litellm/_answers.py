"""LiteLLM's requests and answers: OpenAI's chat completions, as Python objects."""

from __future__ import annotations

from inspect import isgenerator
from typing import Any, cast

import attrs
import httpx
import msgspec

from fluxibly.errors import StreamProtocolError
from fluxibly.providers.dialects.json_values import as_array, as_object
from fluxibly.providers.dialects.openai_chat import Body, ChatDecoder, OpenAICodec
from fluxibly.providers.dialects.openai_request import Quirks, chat_body
from fluxibly.providers.http import end_connection
from fluxibly.providers.litellm._services import Answerer
from fluxibly.types import Chunk, Reasoning, Request, Response

_SERVICE = "the service (through LiteLLM)"
_QUIRKS = Quirks(top_k=True)
_CODEC = OpenAICodec(_QUIRKS, _SERVICE)
_THOUGHTS = ("thinking", "redacted_thinking")


def body_of(request: Request, *, stream: bool) -> dict[str, Any]:
    """Return a request in OpenAI's format, with the signed reasoning of earlier turns where LiteLLM expects it."""
    body = chat_body(request, _QUIRKS, stream=stream, service="LiteLLM")
    for message, sent in zip(request.messages, body["messages"], strict=True):
        thoughts = [dict(part.raw) for part in message.reasoning if part.raw and part.raw.get("type") in _THOUGHTS]
        if thoughts:
            sent["thinking_blocks"] = thoughts
    return body


def response_of(answer: Any) -> Response:
    """Return a whole answer as a response.

    Raises:
        ProviderError: the answer reports an error, or is not a chat completion.
    """
    plain = _plain(answer)
    response = _CODEC.decode(msgspec.json.encode(plain))
    thoughts = _Thoughts()
    for choice in plain.get("choices") or ():
        thoughts.add(choice.get("message"))
    request_id, limits = _headers(answer)
    return response.evolve(
        reasoning_parts=thoughts.parts() or response.reasoning_parts, request_id=request_id, rate_limits=limits
    )


def _plain(answer: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", answer.model_dump(mode="json"))


class StreamReader:
    """A reader for a single stream of LiteLLM."""

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer
        self._decoder = ChatDecoder(_SERVICE)
        self._thoughts = _Thoughts()
        self._stream: Any = None
        self._model: str | None = None
        """The service's own name for the model, or else LiteLLM's name."""
        self._first: dict[str, Any] = {}

    def opened(self, stream: Any) -> Any:
        """Keep the stream, record which service sends it, and return it."""
        self._stream = stream
        self._answerer.read(stream)
        request_id, limits = _headers(stream)
        self._first = {"request_id": request_id, "rate_limits": limits or None}
        return stream

    def read(self, item: Any) -> Chunk | None:
        """Return the chunk of an item, or None if the item is empty.

        Raises:
            StreamProtocolError: the stream was cut off, and LiteLLM made up its end.
        """
        plain = _plain(item)
        hidden: Any = getattr(item, "_hidden_params", None) or {}
        self._model = hidden.get("provider_response_model") or self._model or plain.get("model")
        plain["model"] = self._model
        for choice in plain.get("choices") or ():
            self._thoughts.add(choice.get("delta"))
            if choice.get("finish_reason"):
                self._check_end()
        return self._joined(self._decoder.take(msgspec.convert(plain, Body), b""))

    def last(self) -> Chunk | None:
        """Return the final chunk after the end of the stream, if there is anything left to return.

        Raises:
            StreamProtocolError: the stream was cut off.
        """
        chunk = self._joined(self._decoder.end())
        parts = self._thoughts.parts()
        return attrs.evolve(chunk or Chunk(), reasoning_parts=parts) if parts else chunk

    def _joined(self, chunks: Any) -> Chunk | None:
        """Return the chunk of an event, or None. An event has a single choice, so it has at most a single chunk."""
        for chunk in chunks:
            first, self._first = self._first, {}
            return attrs.evolve(chunk, **first) if first else cast("Chunk", chunk)
        return None

    def _check_end(self) -> None:
        came = [
            getattr(self._stream, name, "unknown") for name in ("received_finish_reason", "intermittent_finish_reason")
        ]
        if came == [None, None]:
            raise StreamProtocolError(f"the stream of {_SERVICE} was cut off: it ended without a finish reason")


class _Thoughts:
    """Anthropic's reasoning blocks, which LiteLLM delivers separately. Streamed pieces end with a signature."""

    def __init__(self) -> None:
        self._blocks: list[dict[str, Any]] = []

    def add(self, message: Any) -> None:
        """Add the reasoning blocks of a message or a delta."""
        for block in as_array(as_object(message).get("thinking_blocks")):
            last = self._blocks[-1] if self._blocks else None
            if last is None or last.get("signature") or block["type"] != "thinking" or last["type"] != "thinking":
                self._blocks.append(dict(block))
                continue
            last["thinking"] = (last.get("thinking") or "") + (block.get("thinking") or "")
            last["signature"] = block.get("signature")

    def parts(self) -> tuple[Reasoning, ...]:
        """Return the blocks in the form in which they must go back to the service."""
        return tuple(
            Reasoning(text=block.get("thinking") or "", signature=block.get("signature"), raw=block)
            for block in self._blocks
        )


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
