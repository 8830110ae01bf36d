"""Pure codec for OpenAI's chat completions, as sent by OpenAI and by services whose dialect is nearly the same."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from typing import Any, Final, NoReturn
from urllib.parse import quote

import attrs
import msgspec

from fluxibly.aggregate import Aggregator
from fluxibly.errors import ProviderError, StreamProtocolError
from fluxibly.providers.dialects.codec import Encoded, Event, Framing
from fluxibly.providers.dialects.decoding import InlineThinking, cut_off, not_an_answer
from fluxibly.providers.dialects.encoding import write_json
from fluxibly.providers.dialects.errors import error_of_event, error_of_payload, error_of_response, excerpt
from fluxibly.providers.dialects.json_values import as_object, read_json
from fluxibly.providers.dialects.openai_parts import (
    Details,
    content_of,
    finish_reason_of,
    tool_call_deltas,
    usage_of,
    word_of,
)
from fluxibly.providers.dialects.openai_request import Quirks, chat_body
from fluxibly.types import Chunk, Reasoning, Request, Response

# Choices


class Delta(msgspec.Struct):
    """The content of a choice. `Any` marks fields that services send in several types. Other fields are not decoded."""

    content: Any = None
    reasoning: Any = None
    reasoning_content: Any = None
    reasoning_details: Any = None
    refusal: Any = None
    tool_calls: Any = None


class Choice(msgspec.Struct):
    delta: Delta | None = None
    message: Delta | None = None
    text: Any = None
    """The text, if a server responds as the older completions API does."""
    index: Any = None
    finish_reason: Any = None
    usage: Any = None
    error: Any = None


_NOTHING: Final = Delta()


class ChoiceState:
    """The state of a choice in a stream."""

    __slots__ = ("begun", "details", "finished", "inline", "refused", "spoke", "thought", "tools")

    def __init__(self) -> None:
        self.begun = False
        self.spoke = False
        self.tools = False
        self.refused = False
        self.finished = False
        self.thought: list[str] = []
        self.details: Details | None = None
        self.inline = InlineThinking()

    def take(self, choice: Choice, fields: dict[str, Any]) -> str:
        """Return the text of an event's choice. Its other data goes into `fields`, which become fields of a chunk."""
        self.begun = True
        delta = choice.delta
        if delta is None:
            # Perplexity repeats the whole message with each delta; the message counts only if no delta had content.
            delta = choice.message if choice.message is not None and not self.spoke else _NOTHING
        text, reasoning = delta.content, delta.reasoning or delta.reasoning_content
        if type(text) is not str:
            text, thought = content_of(choice.text if text is None else text)
            reasoning = reasoning or thought
        if reasoning or delta.reasoning_details or delta.tool_calls or delta.refusal:
            text += self._take_more(delta, reasoning, fields)
        if text:
            self.spoke = True
            if not self.inline.over:
                text = _with_thought(self.inline.split(text), fields)
        if choice.finish_reason:
            self._finish(word_of(choice.finish_reason) or "unknown", fields)
        return text

    def _take_more(self, delta: Delta, reasoning: object, fields: dict[str, Any]) -> str:
        """Take the rest of a delta besides its content. Return the text of a refusal, which is an answer as well."""
        if delta.tool_calls:
            calls = tool_call_deltas(delta.tool_calls)
            if calls:
                self.tools = self.spoke = True
                fields["tool_calls"] = calls
        if delta.reasoning_details:
            if self.details is None:
                self.details = Details()
            said = self.details.add(delta.reasoning_details)
            reasoning = reasoning or said
        if reasoning and isinstance(reasoning, str):
            fields["reasoning"] = reasoning
            self.thought.append(reasoning)
        if delta.refusal and isinstance(delta.refusal, str):
            self.refused = True
            return delta.refusal
        return ""

    def rest(self, fields: dict[str, Any]) -> str:
        """Return the text that was held back until the end. Reasoning goes into `fields`."""
        parts = self.parts()
        if parts:
            fields["reasoning_parts"] = parts
        return _with_thought(self.inline.rest(), fields)

    def _finish(self, reason: str, fields: dict[str, Any]) -> None:
        self.finished = True
        finish = finish_reason_of(reason)
        if finish == "stop" and (self.refused or self.tools):
            finish = "content_filter" if self.refused else "tool_call"
        fields["finish_reason"] = finish
        fields["raw_finish_reason"] = reason

    def parts(self) -> tuple[Reasoning, ...]:
        """Return the reasoning that must be sent back to the service."""
        if self.details is not None:
            return self.details.parts()
        if self.thought and self.tools:
            text = "".join(self.thought)
            return (Reasoning(text=text, raw={"reasoning_content": text}),)
        return ()


def _with_thought(parted: tuple[str, str], fields: dict[str, Any]) -> str:
    """Return the text that `InlineThinking` separated. The reasoning goes into `fields`."""
    text, thought = parted
    if thought:
        fields["reasoning"] = fields.get("reasoning", "") + thought
    return text


# Streams


class Body(msgspec.Struct):
    """A whole response or an event of a stream."""

    choices: list[Choice | None] | None = None
    id: Any = None
    model: Any = None
    usage: Any = None
    error: Any = None
    x_groq: Any = None


_read_body: Final = msgspec.json.Decoder(Body).decode
_EMPTY: Final[tuple[Chunk, ...]] = ()


def to_body(raw: object, data: bytes, service: str) -> Body:
    """Return decoded JSON as a `Body`.

    Raises:
        ProviderError: the JSON is an error, or is not a chat completion.
    """
    try:
        return msgspec.convert(raw, Body)
    except msgspec.ValidationError as error:
        reported = error_of_payload(raw, body=data, service=service)
        if reported is not None:
            raise reported from None
        raise StreamProtocolError(
            f"expected a chat completion from {service}, got other JSON: {error}", body=excerpt(data)
        ) from None


class ChatDecoder:
    """State of a stream of chat completion chunks.

    Metadata (id, model, finish reason, usage) waits for the next chunk that has output, or for the last chunk. Each
    chunk is then a piece of the answer, which keeps chunk counts, gaps and the time to first chunk meaningful.
    """

    def __init__(self, service: str) -> None:
        self._service = service
        self._choices: dict[int, ChoiceState] = {}
        self._first = ChoiceState()
        self._held: dict[str, Any] = {}
        self._id: str | None = None
        self._model: str | None = None
        self.done = False

    def decode_event(self, event: Event, /) -> Iterable[Chunk]:
        """Return the chunks of an event.

        Raises:
            ProviderError: the event is an error.
            StreamProtocolError: the event is not JSON.
        """
        data = event.data
        if self.done or not data:
            return _EMPTY
        if event.name == "error":
            raise error_of_event(data, service=self._service)
        try:
            body = _read_body(data)
        except (ValueError, RecursionError):
            if data.strip() == b"[DONE]":
                self.done = True
                return self._last()
            body = to_body(read_json(data), data, self._service)
        return self.take(body, data)

    def end(self) -> Iterable[Chunk]:
        """Return the last chunks, at the end of the stream's bytes.

        Raises:
            StreamProtocolError: the stream was cut off.
        """
        if self.done:
            return _EMPTY
        if not self._choices or not all(choice.finished for choice in self._choices.values()):
            raise cut_off(self._service, "a finish reason or [DONE]")
        return self._last()

    def _last(self) -> Iterable[Chunk]:
        if not self._choices:
            raise cut_off(self._service, "an answer")
        fields, self._held = self._held, {}
        text = self._first.rest(fields)
        others: list[tuple[int, Chunk]] = []
        for index, choice in self._choices.items():
            if index:
                own: dict[str, Any] = {}
                said = choice.rest(own)
                if said or own:
                    others.append((index, Chunk(said, **own)))
        if others:
            fields["alternatives"] = tuple(others)
        return (Chunk(text, **fields),) if text or fields else _EMPTY

    def take_whole(self, body: Body, data: bytes) -> Iterable[Chunk]:
        """Return the chunks of a response that is not streamed."""
        return (*self.take(body, data), *self._last())

    def take(self, body: Body, data: bytes) -> Iterable[Chunk]:
        """Return the chunks of a decoded event."""
        choices = body.choices
        if body.error or not choices:
            return self._take_other(body, data)
        choice = choices[0]
        if len(choices) > 1 or choice is None or choice.index or choice.error:
            return self._take_several(body, choices, data)
        state = self._first
        if not state.begun:
            self._choices[0] = state
        fields = self._held
        text = state.take(choice, fields)
        self._note(body, choice, fields)
        if not fields:
            return (Chunk(text),) if text else _EMPTY
        if text or "reasoning" in fields or "tool_calls" in fields:
            self._held = {}
            return (Chunk(text, **fields),)
        return _EMPTY

    def _take_several(self, body: Body, choices: list[Choice | None], data: bytes) -> Iterable[Chunk]:
        fields, self._held = self._held, {}
        text = ""
        others: list[tuple[int, Chunk]] = []
        failure: object = None
        for place, choice in enumerate(choices):
            if choice is None:
                continue
            index = choice.index if type(choice.index) is int and choice.index >= 0 else place
            state = self._choices.setdefault(index, ChoiceState() if index else self._first)
            failure = failure or choice.error
            self._note(body, choice, fields)
            if index == 0:
                text += state.take(choice, fields)
            else:
                own: dict[str, Any] = {}
                others.append((index, Chunk(state.take(choice, own), **own)))
        if others:
            fields["alternatives"] = tuple(others)
        chunk = Chunk(text, **fields)
        return self._fail_after(chunk, {"error": failure}, data) if failure else (chunk,)

    def _take_other(self, body: Body, data: bytes) -> Iterable[Chunk]:
        """Take an event without choices, or with an error."""
        error = body.error
        if error and body.choices:
            body.error = None
            for choice in body.choices:
                if choice is not None:
                    choice.error = choice.finish_reason = None
            return self._fail_after(next(iter(self.take(body, data)), Chunk()), {"error": error}, data)
        if error:
            self._raise(read_json(data), data)
        before = len(self._held)
        self._note(body, Choice(), self._held)
        if len(self._held) == before and body.choices is None:
            reported = error_of_payload(read_json(data), body=data, service=self._service)
            if reported is not None:
                raise reported
        return _EMPTY

    def _fail_after(self, chunk: Chunk, payload: object, data: bytes) -> Generator[Chunk]:
        """Yield the output that came in the same event as an error, then raise the error."""
        if chunk.has_output or chunk.alternatives:
            yield chunk
        self._raise(payload, data)

    def _raise(self, payload: object, data: bytes) -> NoReturn:
        error = error_of_payload(payload, body=data, service=self._service)
        raise error or StreamProtocolError(f"{self._service} sent an error without a message")

    def _note(self, body: Body, choice: Choice, fields: dict[str, Any]) -> None:
        """Record the usage, if there is any, and the id and the model, if they are new."""
        found = body.id
        if found != self._id and isinstance(found, str) and found:
            fields["id"] = self._id = found
        found = body.model
        if found != self._model and isinstance(found, str) and found:
            fields["model"] = self._model = found
        usage = body.usage or choice.usage
        if usage is None and body.x_groq is not None:
            usage = as_object(body.x_groq).get("usage")
        if usage and (counted := usage_of(usage)) is not None:
            fields["usage"] = counted


# The codec


@attrs.frozen
class OpenAICodec:
    """Codec for the chat completions of a service. `service` is its name in error messages."""

    quirks: Quirks = attrs.field(factory=Quirks)
    service: str = "OpenAI"

    @property
    def framing(self) -> Framing:
        return "sse"

    def encode(self, request: Request, /, *, stream: bool) -> Encoded:
        """Encode a request.

        Raises:
            BadRequest: the service does not support a parameter, or a value cannot be written as JSON.
        """
        body = chat_body(request, self.quirks, stream=stream, service=self.service)
        path = self.quirks.path
        if "{model}" in path:
            path = path.replace("{model}", quote(request.model, safe=""))
        return Encoded(path, write_json(body, request))

    def decode(self, body: bytes, /) -> Response:
        """Decode a whole body.

        Raises:
            ProviderError: the body of a 200 is an error.
            StreamProtocolError: the body is not a chat completion.
        """
        raw = read_json(body)
        found = to_body(raw, body, self.service)
        if not found.error and not any(map(_says_something, found.choices or ())):
            raise not_an_answer(raw, body, self.service, "a message in 'choices'")
        joined = Aggregator()
        for chunk in ChatDecoder(self.service).take_whole(found, body):
            joined.add(chunk)
        return joined.response().evolve(raw=raw)

    def decoder(self) -> ChatDecoder:
        """Return a decoder for a stream."""
        return ChatDecoder(self.service)

    def decode_error(self, status: int, headers: Mapping[str, str], body: bytes, /) -> ProviderError:
        """Return the error of a non-2xx response."""
        return error_of_response(status, headers, body, service=self.service)


def _says_something(choice: Choice | None) -> bool:
    return choice is not None and (
        choice.message is not None or choice.delta is not None or choice.text is not None or bool(choice.error)
    )
