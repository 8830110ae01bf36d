"""OpenAI's chat completions, as OpenAI and the services that nearly speak it send them. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from typing import Any, Final, NoReturn, cast
from urllib.parse import quote

import attrs
import msgspec

from fluxibly.aggregate import Aggregator
from fluxibly.errors import ProviderError, StreamProtocolError
from fluxibly.providers import error_reports
from fluxibly.providers.codec import Encoded, Event, Framing
from fluxibly.providers.json_reading import read_json
from fluxibly.providers.openai_parts import (
    Details,
    content_of,
    finish_reason_of,
    tool_call_deltas,
    usage_of,
)
from fluxibly.providers.openai_request import Quirks, chat_body
from fluxibly.providers.wire import write_json
from fluxibly.types import Chunk, Reasoning, Request, Response


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
_NOTHING: Final = Delta()


@attrs.frozen(kw_only=True)
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
        return Encoded(path, write_json(body, request, self.service))

    def decode(self, body: bytes, /) -> Response:
        """The response of a whole body.

        Raises:
            ProviderError: for an error in a 200.
            StreamProtocolError: for what is no answer.
        """
        raw = read_json(body)
        found = _convert(raw, body, self.service)
        if not found.choices:
            raise self._not_an_answer(raw, body)
        decoder = ChatDecoder(self.service)
        joined = Aggregator()
        for chunk in (*decoder.take(found, body), *decoder.end(whole=True)):
            joined.add(chunk)
        return joined.response().evolve(raw=raw)

    def decoder(self) -> ChatDecoder:
        """The state of a stream."""
        return ChatDecoder(self.service)

    def decode_error(self, status: int, headers: Mapping[str, str], body: bytes, /) -> ProviderError:
        """The error of an answer that is not a 2xx."""
        return error_reports.error_of_response(status, headers, body, service=self.service)

    def _not_an_answer(self, raw: object, body: bytes) -> ProviderError:
        error = error_reports.error_of_payload(raw, body=body, service=self.service)
        return error or StreamProtocolError(
            f"{self.service} sent JSON without an answer in it; check that api_base is that of a chat completions API",
            body=error_reports.excerpt(body),
        )


def _convert(raw: object, data: bytes, service: str) -> Body:
    try:
        return msgspec.convert(raw, Body)
    except msgspec.ValidationError as error:
        reported = error_reports.error_of_payload(raw, body=data, service=service)
        if reported is not None:
            raise reported from None
        raise StreamProtocolError(
            f"{service} sent JSON that is no chat completion: {error}", body=error_reports.excerpt(data)
        ) from None


class ChatDecoder:
    """The state of one stream of chat completion chunks."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._choices: dict[int, _ChoiceState] = {}
        self._first = _ChoiceState()
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
        try:
            body = _read_body(data)
        except (ValueError, RecursionError):
            if data.strip() == b"[DONE]":
                self.done = True
                return _EMPTY
            body = _convert(read_json(data), data, self._service)
        return self.take(body, data)

    def end(self, *, whole: bool = False) -> Iterable[Chunk]:
        """The last chunks, when the stream's bytes are over. `whole` says that it was no stream, so not cut off.

        Raises:
            StreamProtocolError: the stream was cut off.
        """
        choices = self._choices
        if not whole and not (choices if self.done else choices and all(one.finished for one in choices.values())):
            raise StreamProtocolError(
                f"the stream of {self._service} ended without "
                + ("an answer" if not choices else "a finish reason or [DONE]: the answer was cut off")
            )
        last = [(index, Chunk(reasoning_parts=parts)) for index, one in choices.items() if (parts := one.parts())]
        if not last:
            return _EMPTY
        others = tuple(pair for pair in last if pair[0])
        chunk = last[0][1] if not last[0][0] else Chunk()
        chunk.alternatives = others
        return (chunk,)

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
        chunk = state.take(choice)
        self._add_fields(body, choice, chunk)
        return (chunk,)

    def _take_several(self, body: Body, choices: list[Choice | None], data: bytes) -> Iterable[Chunk]:
        first: Chunk | None = None
        others: list[tuple[int, Chunk]] = []
        failure: object = None
        for place, choice in enumerate(choices):
            if choice is None:
                continue
            index = choice.index if type(choice.index) is int and choice.index >= 0 else place
            state = self._choices.setdefault(index, _ChoiceState() if index else self._first)
            chunk = state.take(choice)
            failure = failure or choice.error
            if index == 0 and first is None:
                first = chunk
            else:
                others.append((index, chunk))
        whole = first or Chunk()
        whole.alternatives = tuple(others)
        self._add_fields(body, choices[0] or Choice(), whole)
        return self._fail_after(whole, {"error": failure}, data) if failure else (whole,)

    def _take_other(self, body: Body, data: bytes) -> Iterable[Chunk]:
        """An event without choices, or with an error."""
        if body.error:
            if body.choices:
                body.error, error = None, body.error
                for choice in body.choices:
                    if choice is not None:
                        choice.error = choice.finish_reason = None
                return self._fail_after(next(iter(self.take(body, data)), Chunk()), {"error": error}, data)
            self._raise(read_json(data), data)
        chunk = Chunk()
        self._add_fields(body, Choice(), chunk)
        if chunk.usage is None and chunk.id is None and chunk.model is None:
            self._raise_if_error(data)
            return _EMPTY
        return (chunk,)

    def _fail_after(self, chunk: Chunk, payload: object, data: bytes) -> Generator[Chunk]:
        """What came in the same event as an error, then the error."""
        if chunk.has_output or chunk.alternatives:
            yield chunk
        self._raise(payload, data)

    def _raise(self, payload: object, data: bytes) -> NoReturn:
        error = error_reports.error_of_payload(payload, body=data, service=self._service)
        raise error or StreamProtocolError(f"{self._service} sent an error without a word on what it is")

    def _raise_if_error(self, data: bytes) -> None:
        """Raise the error of an event that has none of a completion's fields, if it is one ({"detail": …})."""
        error = error_reports.error_of_payload(read_json(data), body=data, service=self._service)
        if error is not None:
            raise error

    def _add_fields(self, body: Body, choice: Choice, chunk: Chunk) -> None:
        """Usage, where it is new, and the id and the model, where they are."""
        found = body.id
        if found != self._id and isinstance(found, str) and found:
            chunk.id = self._id = found
        found = body.model
        if found != self._model and isinstance(found, str) and found:
            chunk.model = self._model = found
        usage = body.usage or choice.usage
        if usage is None and body.x_groq is not None and isinstance(body.x_groq, dict):
            usage = cast("dict[str, Any]", body.x_groq).get("usage")
        if usage:
            chunk.usage = usage_of(usage)


class _ChoiceState:
    """What is remembered of one choice of a stream."""

    __slots__ = ("begun", "details", "finished", "refused", "spoke", "thought", "tools")

    def __init__(self) -> None:
        self.begun = False
        self.spoke = False
        self.tools = False
        self.refused = False
        self.finished = False
        self.thought: list[str] = []
        self.details: Details | None = None

    def take(self, choice: Choice) -> Chunk:
        """The chunk of an event's choice."""
        self.begun = True
        delta = choice.delta
        if delta is None:
            # Perplexity repeats the whole message beside each delta; it counts only where nothing else was said
            delta = choice.message if choice.message is not None and not self.spoke else _NOTHING
        text, reasoning = delta.content, delta.reasoning or delta.reasoning_content
        if type(text) is not str:
            text, thought = content_of(text if text is not None else choice.text)
            reasoning = reasoning or thought
        if reasoning is None and delta.reasoning_details is None and delta.tool_calls is None and not delta.refusal:
            chunk = Chunk(text)
        else:
            chunk = self._with_more(delta, text, reasoning)
        if chunk.text or chunk.tool_calls:
            self.spoke = True
        if choice.finish_reason:
            self._finish(choice.finish_reason, chunk)
        return chunk

    def _with_more(self, delta: Delta, text: str, reasoning: object) -> Chunk:
        chunk = Chunk(text)
        if delta.refusal and isinstance(delta.refusal, str):
            self.refused = True
            chunk.text += delta.refusal
        if delta.tool_calls:
            chunk.tool_calls = tool_call_deltas(delta.tool_calls)
            self.tools = self.tools or bool(chunk.tool_calls)
        if delta.reasoning_details:
            if self.details is None:
                self.details = Details()
            said = self.details.add(delta.reasoning_details)
            reasoning = reasoning or said
        if reasoning and isinstance(reasoning, str):
            chunk.reasoning = reasoning
            self.thought.append(reasoning)
        return chunk

    def _finish(self, reason: object, chunk: Chunk) -> None:
        self.finished = True
        chunk.raw_finish_reason = str(reason)
        chunk.finish_reason = finish_reason_of(str(reason))
        if chunk.finish_reason == "stop":
            if self.refused:
                chunk.finish_reason = "content_filter"
            elif self.tools:
                chunk.finish_reason = "tool_call"

    def parts(self) -> tuple[Reasoning, ...]:
        """The reasoning that has to go back to the service."""
        if self.details is not None:
            return self.details.parts()
        if self.thought and self.tools:
            text = "".join(self.thought)
            return (Reasoning(text=text, raw={"reasoning_content": text}),)
        return ()
