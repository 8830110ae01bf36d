"""OpenAI's chat completions, as OpenAI and the services that nearly speak it send them, as a pure codec."""

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

# One choice


class Delta(msgspec.Struct):
    """What a choice says. `Any` stands where services send more than one type; other fields are not even read."""

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
    """Where a server answers as the older completions API does."""
    index: Any = None
    finish_reason: Any = None
    usage: Any = None
    error: Any = None


_NOTHING: Final = Delta()


class ChoiceState:
    """What is remembered of one choice of a stream."""

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
        """The text of an event's choice; what else it has goes into `fields`, which become a chunk's."""
        self.begun = True
        delta = choice.delta
        if delta is None:
            # Perplexity repeats the whole message beside each delta; it counts only where nothing else was said
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
        """Take what a delta has beside its content; the text of a refusal, which is an answer as well."""
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
        """What is left to say at the end."""
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
        """The reasoning that has to go back to the service."""
        if self.details is not None:
            return self.details.parts()
        if self.thought and self.tools:
            text = "".join(self.thought)
            return (Reasoning(text=text, raw={"reasoning_content": text}),)
        return ()


def _with_thought(parted: tuple[str, str], fields: dict[str, Any]) -> str:
    """The text of what `InlineThinking` parted; the reasoning goes into `fields`."""
    text, thought = parted
    if thought:
        fields["reasoning"] = fields.get("reasoning", "") + thought
    return text


# Streams


class Body(msgspec.Struct):
    """A whole answer or one event of a stream."""

    choices: list[Choice | None] | None = None
    id: Any = None
    model: Any = None
    usage: Any = None
    error: Any = None
    x_groq: Any = None


_read_body: Final = msgspec.json.Decoder(Body).decode
_EMPTY: Final[tuple[Chunk, ...]] = ()


def to_body(raw: object, data: bytes, service: str) -> Body:
    """Decoded JSON as a `Body`.

    Raises:
        ProviderError: it is an error, or no chat completion.
    """
    try:
        return msgspec.convert(raw, Body)
    except msgspec.ValidationError as error:
        reported = error_of_payload(raw, body=data, service=service)
        if reported is not None:
            raise reported from None
        raise StreamProtocolError(
            f"{service} sent JSON that is no chat completion: {error}", body=excerpt(data)
        ) from None


class ChatDecoder:
    """The state of one stream of chat completion chunks.

    What is no output (id, model, finish reason, usage) is held for the next chunk that has some, or for the last one:
    a chunk is a piece of the answer, so that counts, gaps and the time to the first one mean what they say.
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
        """The chunks of an event.

        Raises:
            ProviderError: for an event that is an error.
            StreamProtocolError: for one that is not JSON.
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
        """The last chunks, when the stream's bytes are over.

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
            raise cut_off(self._service, "an answer in it")
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
        """The chunks of an answer that is no stream."""
        return (*self.take(body, data), *self._last())

    def take(self, body: Body, data: bytes) -> Iterable[Chunk]:
        """The chunks of a decoded event."""
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
        """An event without choices, or with an error."""
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
        """What came in the same event as an error, then the error."""
        if chunk.has_output or chunk.alternatives:
            yield chunk
        self._raise(payload, data)

    def _raise(self, payload: object, data: bytes) -> NoReturn:
        error = error_of_payload(payload, body=data, service=self._service)
        raise error or StreamProtocolError(f"{self._service} sent an error without a word on what it is")

    def _note(self, body: Body, choice: Choice, fields: dict[str, Any]) -> None:
        """Note the usage, where there is one, and the id and the model, where they are new."""
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
    """The codec of one service's chat completions. `service` is its name for error messages."""

    quirks: Quirks = attrs.field(factory=Quirks)
    service: str = "OpenAI"

    @property
    def framing(self) -> Framing:
        return "sse"

    def encode(self, request: Request, /, *, stream: bool) -> Encoded:
        """The request on the wire.

        Raises:
            BadRequest: for a parameter that the service does not have, or that cannot be written as JSON.
        """
        body = chat_body(request, self.quirks, stream=stream, service=self.service)
        path = self.quirks.path
        if "{model}" in path:
            path = path.replace("{model}", quote(request.model, safe=""))
        return Encoded(path, write_json(body, request))

    def decode(self, body: bytes, /) -> Response:
        """The response of a whole body.

        Raises:
            ProviderError: for an error in a 200.
            StreamProtocolError: for what is no answer.
        """
        raw = read_json(body)
        found = to_body(raw, body, self.service)
        if not found.error and not any(map(_says_something, found.choices or ())):
            raise not_an_answer(raw, body, self.service, "message in its choices")
        joined = Aggregator()
        for chunk in ChatDecoder(self.service).take_whole(found, body):
            joined.add(chunk)
        return joined.response().evolve(raw=raw)

    def decoder(self) -> ChatDecoder:
        """The state of a stream."""
        return ChatDecoder(self.service)

    def decode_error(self, status: int, headers: Mapping[str, str], body: bytes, /) -> ProviderError:
        """The error of an answer that is not a 2xx."""
        return error_of_response(status, headers, body, service=self.service)


def _says_something(choice: Choice | None) -> bool:
    return choice is not None and (
        choice.message is not None or choice.delta is not None or choice.text is not None or bool(choice.error)
    )
