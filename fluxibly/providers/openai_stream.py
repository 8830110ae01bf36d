"""The state of a stream of chat completion chunks, whatever service sends them."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any, Final, NoReturn

import msgspec

from fluxibly.errors import StreamProtocolError
from fluxibly.providers import error_reports
from fluxibly.providers.codec import Event
from fluxibly.providers.json_reading import read_json, table
from fluxibly.providers.openai_choice import Choice, ChoiceState
from fluxibly.providers.openai_parts import usage_of
from fluxibly.providers.wire import cut_off
from fluxibly.types import Chunk


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
        reported = error_reports.error_of_payload(raw, body=data, service=service)
        if reported is not None:
            raise reported from None
        raise StreamProtocolError(
            f"{service} sent JSON that is no chat completion: {error}", body=error_reports.excerpt(data)
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
            raise error_reports.error_of_event(data, service=self._service)
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
            reported = error_reports.error_of_payload(read_json(data), body=data, service=self._service)
            if reported is not None:
                raise reported
        return _EMPTY

    def _fail_after(self, chunk: Chunk, payload: object, data: bytes) -> Generator[Chunk]:
        """What came in the same event as an error, then the error."""
        if chunk.has_output or chunk.alternatives:
            yield chunk
        self._raise(payload, data)

    def _raise(self, payload: object, data: bytes) -> NoReturn:
        error = error_reports.error_of_payload(payload, body=data, service=self._service)
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
            usage = table(body.x_groq).get("usage")
        if usage and (counted := usage_of(usage)) is not None:
            fields["usage"] = counted
