"""Pure codec for OpenAI's chat completions, as sent by OpenAI and by services whose dialect is nearly the same.

The module is long because a choice takes its pieces in one class: each kind of piece ends the kinds before it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from typing import Any, Final, Literal, NoReturn
from urllib.parse import quote

import attrs
import msgspec

from fluxibly._inline_thinking import TAG, InlineThinking
from fluxibly.aggregate import Aggregator, merged
from fluxibly.errors import ProviderError, StreamProtocolError
from fluxibly.providers.dialects.codec import Encoded, Event, Framing
from fluxibly.providers.dialects.decoding import CallIndexes, Pieces, cut_off, not_an_answer
from fluxibly.providers.dialects.encoding import write_json
from fluxibly.providers.dialects.errors import (
    error_of_event,
    error_of_payload,
    error_of_response,
    excerpt,
    read_report,
)
from fluxibly.providers.dialects.json_values import as_object, read_json
from fluxibly.providers.dialects.openai_parts import (
    DIALECT,
    Speech,
    Thought,
    beside_tokens,
    detail_text,
    finish_reason_of,
    function_call_delta,
    generated_images,
    image_of_url,
    items_of,
    new_items,
    own_fields,
    thinking_text,
    tool_call_deltas,
    usage_of,
    word_of,
)
from fluxibly.providers.dialects.openai_request import (
    MAX_LEARNED,
    MaxTokensName,
    Quirks,
    chat_body,
    max_tokens_name,
    refused_max_tokens_name,
)
from fluxibly.providers.dialects.schemas import SchemaLearner
from fluxibly.types import Chunk, Opaque, Part, Request, Response, Text, ToolCallDelta

# Choices


class Delta(msgspec.Struct, gc=False):
    """The content of a choice. `Any` marks fields that services send in several types. Other fields are not decoded."""

    content: Any = None
    reasoning: Any = None
    reasoning_content: Any = None
    reasoning_details: Any = None
    refusal: Any = None
    tool_calls: Any = None
    function_call: Any = None
    images: Any = None
    audio: Any = None
    annotations: Any = None
    extra_content: Any = None
    thinking_blocks: Any = None
    provider_specific_fields: Any = None


class Choice(msgspec.Struct, gc=False):
    """A choice. The fields of most events are first, and in the order of events, because they are then found sooner."""

    index: Any = None
    delta: Delta | None = None
    logprobs: Any = None
    finish_reason: Any = None
    message: Delta | None = None
    text: Any = None
    """The text, if a server responds as the older completions API does."""
    usage: Any = None
    error: Any = None
    content_filter_results: Any = None


_NOTHING: Final = Delta()


class ChoiceState:
    """The state of a choice in a stream."""

    __slots__ = (
        "_annotations",
        "_began",
        "_beside",
        "_calls",
        "_filtered",
        "_inline",
        "_own",
        "_plain",
        "_refused",
        "_said",
        "_speech",
        "_spoke",
        "_thinks_first",
        "_thought",
        "begun",
        "finished",
    )

    def __init__(self, *, thinks_first: bool = False) -> None:
        self.begun = False
        self.finished = False
        self._plain = False
        """Whether a text is only text: no reasoning is written into it, and nothing waits for its beginning."""
        self._began = False
        """Whether there was any text."""
        self._said = False
        """Whether there was text, media or a tool call after the last reasoning."""
        self._spoke = False
        """Whether there was any before it."""
        self._calls: CallIndexes | None = None
        self._refused = False
        self._thinks_first = thinks_first
        self._inline = InlineThinking(opened=thinks_first)
        self._thought: Thought | None = None
        """The last reasoning, while more of it may come."""
        self._beside: dict[str, Any] = {}
        """The fields beside the text since the last other part."""
        self._speech: Speech | None = None
        self._own: dict[str, Any] = {}
        """The `provider_specific_fields`."""
        self._annotations: list[Any] = []
        self._filtered: object = None

    def take(self, choice: Choice, fields: dict[str, Any]) -> str:
        """Return the text of an event's choice. Its other data goes into `fields`, which become fields of a chunk."""
        delta = choice.delta
        if delta is None:
            # Perplexity repeats the whole message with each delta, and MiniMax at the end; it counts only if no delta
            # had content.
            delta = choice.message
            if delta is None or self._said or self._spoke or self._began or self._thought is not None:
                delta = _NOTHING
        text = delta.content
        if (
            type(text) is not str
            or delta.reasoning_content
            or delta.reasoning
            or delta.tool_calls
            or delta.refusal is not None  # a test for None costs less, and the rest is seldom empty
            or delta.reasoning_details is not None
            or delta.extra_content is not None
            or delta.images is not None
            or delta.audio is not None
            or delta.annotations is not None
            or delta.function_call is not None
            or delta.thinking_blocks is not None
            or delta.provider_specific_fields is not None
            or not (self._plain or self._begins_plainly(text))
        ):
            self._take_all(delta, choice.text if text is None else text, fields, whole=delta is choice.message)
            text = ""
        if choice.finish_reason:
            self._finish(word_of(choice.finish_reason) or "unknown", fields)
        if choice.logprobs is not None or choice.content_filter_results is not None:
            self._take_results(choice, fields)
        return text

    def _begins_plainly(self, text: str) -> bool:
        """Whether the answer begins with this text, which is only text. Most answers begin so."""
        if not text or self._began or self._thought is not None or text[0] == "<" or text[0].isspace():
            return False
        if self._thinks_first:
            return False
        self._inline.over = True
        self._began = self._said = self._plain = True
        return True

    def _take_all(self, delta: Delta, content: object, fields: dict[str, Any], *, whole: bool) -> None:
        """Take a delta, or a `whole` message, with all that it has, in the order in which an answer usually has it."""
        out = fields.get("pieces") or Pieces()
        if delta.reasoning_details:
            self._take_blocks("detail", delta.reasoning_details, delta, out, whole=whole)
        elif delta.thinking_blocks:
            self._take_blocks("block", delta.thinking_blocks, delta, out, whole=whole)
        elif (reasoning := delta.reasoning_content or delta.reasoning) and not self._is_in_text(reasoning, content):
            self._take_reasoning("reasoning_content" if delta.reasoning_content else "reasoning", reasoning, out)
            if whole:
                self._end_thought(out)
        if content:
            self._take_content(content, out, whole=whole)
        if delta.images:
            self._put(generated_images(delta.images), out)
        if delta.refusal and isinstance(delta.refusal, str):
            self._refuse(delta.refusal, out)
        if delta.extra_content:
            before = self._beside.get("extra_content", {})
            self._beside["extra_content"] = merged(before, as_object(delta.extra_content))
        if audio := as_object(delta.audio):
            self._speech = self._speech or Speech()
            self._speech.add(audio)
        if delta.tool_calls or delta.function_call:
            self._take_calls((*tool_call_deltas(delta.tool_calls), *function_call_delta(delta.function_call)), out)
        if delta.provider_specific_fields:
            self._own = merged(self._own, own_fields(delta.provider_specific_fields))
        if out.chunks:
            fields["pieces"] = out
        if delta.annotations and (notes := new_items(delta.annotations, self._annotations)):
            add_details(fields, {"annotations": notes})

    def _is_in_text(self, reasoning: object, content: object) -> bool:
        """Whether reasoning also stands in the text, up to this content. MiniMax may send it twice."""
        text = content if isinstance(content, str) else ""
        inline = self._inline.markup
        if not (inline or (not self._began and text.lstrip().startswith(f"<{TAG}>"))):
            return False
        return isinstance(reasoning, str) and reasoning.strip() in inline + text

    def _take_reasoning(self, name: str, text: object, out: Pieces) -> None:
        if not isinstance(text, str):
            return
        self._think(self._thought_of("field", out), {name: text}, text, out)

    def _take_blocks(
        self, kind: Literal["detail", "block"], given: object, delta: Delta, out: Pieces, *, whole: bool
    ) -> None:
        """Take blocks of reasoning, or pieces of them. The text beside them is the same, unless they have none."""
        blocks = [as_object(item) for item in items_of(given)]
        if not any(map(detail_text, blocks)):
            name = "reasoning_content" if delta.reasoning_content else "reasoning"
            if text := delta.reasoning_content or delta.reasoning:
                self._take_reasoning(name, text, out)
        for block in filter(None, blocks):
            thought = self._thought
            said = detail_text(block)
            if thought is None or not thought.goes_on(kind, block) or (said and self._said):
                thought = self._begin(Thought(kind), out)
            self._think(thought, block, said, out)
            if whole:
                self._end_thought(out)

    def _take_calls(self, calls: tuple[ToolCallDelta, ...], out: Pieces) -> None:
        if calls:
            self._end_speech(out)
            self._interrupt(out)
            self._said = True
            indexes = self._calls = self._calls or CallIndexes()
            out.add("tool_calls", tuple([indexes.mended(call) for call in calls]))

    def _take_content(self, content: object, out: Pieces, *, whole: bool) -> None:
        """Take a content, which is a string, null, or a list of parts."""
        for item in items_of(content):
            part = as_object(item)
            if isinstance(item, str):
                self._say(item, out)
            elif part.get("thinking") is not None:
                self._think(self._thought_of("thinking", out), part, thinking_text(part["thinking"]), out)
                if whole:
                    self._end_thought(out)
            elif isinstance(part.get("text"), str):
                self._say(part["text"], out)
            elif isinstance(part.get("refusal"), str):
                self._refuse(part["refusal"], out)
            elif part.get("type") == "image_url" and (image := image_of_url(part.get("image_url"))) is not None:
                self._put((image,), out)
            elif part.get("type") not in (None, "text", "refusal"):
                self._put((Opaque(DIALECT, part),), out)

    def _say(self, text: str, out: Pieces) -> None:
        thought = ""
        self._began = self._began or bool(text)
        if text and not self._inline.over:
            text, thought = self._inline.split(text)
            if thought:
                self._think_inline(thought, out)
            if self._inline.over and self._inline.markup:
                self._end_inline(out)
        if not text:
            return
        self._end_unreadable(out)
        self._said = self._plain = True
        out.add("text", text)

    def _refuse(self, text: str, out: Pieces) -> None:
        """Take a refusal, or a piece of one. It is text as well."""
        if text and "type" not in self._beside:
            if self._said:
                out.complete(Text(""))
            self._beside["type"] = "refusal"
            self._refused = True
        self._say(text, out)

    def _put(self, parts: tuple[Part, ...], out: Pieces) -> None:
        if parts:
            self._interrupt(out)
            self._said = True
            out.add("parts", parts)

    # Blocks that complete what came before

    def _begin(self, thought: Thought, out: Pieces) -> Thought:
        self._end_thought(out)
        self._end_text(out)
        self._thought, self._plain = thought, False
        self._spoke, self._said = self._spoke or self._said, False
        return thought

    def _thought_of(self, kind: Literal["field", "thinking", "inline"], out: Pieces) -> Thought:
        """Return the reasoning under way if it is of a kind and nothing came since; else begin it."""
        thought = self._thought
        return self._begin(Thought(kind), out) if thought is None or thought.kind != kind or self._said else thought

    def _think(self, thought: Thought, fields: Mapping[str, Any], said: str, out: Pieces) -> None:
        thought.add(fields, said)
        if said:
            out.add("reasoning", said)

    def _think_inline(self, said: str, out: Pieces) -> None:
        self._think(self._thought_of("inline", out), {}, said, out)

    def _end_inline(self, out: Pieces) -> None:
        self._think_inline("", out)
        self._end_thought(out, content=self._inline.markup)

    def _interrupt(self, out: Pieces) -> None:
        """End what came before media or a tool call. Only reasoning with text may still get a signature."""
        if not self._inline.over:
            text = self._inline.interrupt()
            if self._inline.over and self._inline.markup:
                self._end_inline(out)
            if text:
                out.add("text", text)
        self._end_unreadable(out)
        self._end_text(out)

    def _end_thought(self, out: Pieces, **fields: Any) -> None:
        if self._thought is not None:
            out.complete(self._thought.part(**fields))
            self._thought = None

    def _end_unreadable(self, out: Pieces) -> None:
        if self._thought is not None and not self._thought.readable:
            self._end_thought(out)

    def _end_text(self, out: Pieces) -> None:
        if self._beside:
            out.complete(Text("", raw=self._beside))
            self._beside = {}

    def _end_speech(self, out: Pieces) -> None:
        if self._speech is not None:
            speech, self._speech = self._speech.part(), None
            self._put((speech,), out)

    def rest(self, fields: dict[str, Any]) -> None:
        """Put what was held back until the end into `fields`."""
        if self._plain and self._thought is None and not self._beside and self._speech is None and not self._own:
            return  # as most answers end
        out = fields.get("pieces") or Pieces()
        text, thought = self._inline.rest()
        if thought:
            self._think_inline(thought, out)
        if self._inline.markup and not self._inline.over:
            self._end_inline(out)
        self._end_thought(out)
        if text:
            out.add("text", text)
        self._end_text(out)
        self._end_speech(out)
        if self._own:
            out.add("parts", (Opaque(DIALECT, {"provider_specific_fields": self._own}),))
        if out.chunks:
            fields["pieces"] = out

    # Beside the output

    def _finish(self, reason: str, fields: dict[str, Any]) -> None:
        self.finished = True
        finish = finish_reason_of(reason)
        if finish == "stop" and (self._refused or self._calls is not None):
            finish = "content_filter" if self._refused else "tool_call"
        fields["finish_reason"] = finish
        fields["raw_finish_reason"] = reason

    def _take_results(self, choice: Choice, fields: dict[str, Any]) -> None:
        """Take what a service says about the tokens or the content of a choice."""
        probabilities = {name: items for name, items in as_object(choice.logprobs).items() if items is not None}
        if probabilities:
            add_details(fields, {"logprobs": probabilities})
        results = choice.content_filter_results
        if results and results != self._filtered:
            self._filtered = results
            add_details(fields, {"content_filter_results": results})


def add_details(fields: dict[str, Any], details: Mapping[str, Any]) -> None:
    """Add details to the fields of a chunk."""
    fields["details"] = merged(fields.get("details", {}), details)


# Streams


class Body(msgspec.Struct, gc=False):
    """A whole response or an event of a stream."""

    id: Any = None
    model: Any = None
    choices: list[Choice | None] | None = None
    usage: Any = None
    error: Any = None
    x_groq: Any = None
    base_resp: Any = None
    citations: Any = None
    search_results: Any = None
    prompt_filter_results: Any = None
    images: Any = None
    related_questions: Any = None
    videos: Any = None
    web_search: Any = None


_LISTS: Final = (
    "citations",
    "search_results",
    "prompt_filter_results",
    "images",
    "related_questions",
    "videos",
    "web_search",
)
"""The lists of a body that become details. Perplexity repeats them in each event."""
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


def heed_base_resp(body: Body) -> None:
    """Make a failure an `error` that MiniMax reports in `base_resp`, which each of its answers has."""
    if read_report({"base_resp": body.base_resp}) is not None:
        body.error = body.error or body.base_resp
    body.base_resp = None


class ChatDecoder:
    """State of a stream of chat completion chunks.

    Metadata (id, model, finish reason, usage) waits for the next chunk that has output, or for the last chunk. Each
    chunk is then a piece of the answer, which keeps chunk counts, gaps and the time to first chunk meaningful.
    """

    def __init__(self, service: str, *, thinks_first: bool = False) -> None:
        self._service = service
        self._thinks_first = thinks_first
        self._choices: dict[int, ChoiceState] = {}
        self._first = ChoiceState(thinks_first=thinks_first)
        self._held: dict[str, Any] = {}
        self._id: str | None = None
        self._model: str | None = None
        self._seen: dict[str, list[Any]] = {}
        """The items of `_LISTS` so far."""
        self._usage: object = None
        """The last usage."""
        self.done = False

    def decode_event(self, event: Event, /) -> Iterable[Chunk]:
        """Return the chunks of an event.

        Raises:
            ProviderError: the event is an error.
            StreamProtocolError: the event is not JSON.
        """
        data = event.data
        if self.done:
            return _EMPTY
        if event.name == "error":
            raise error_of_event(data, service=self._service)
        if not data:
            return _EMPTY
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
        self._first.rest(fields)
        self._note_costs(fields)
        others: list[tuple[int, Chunk]] = []
        for index, choice in self._choices.items():
            if index:
                own: dict[str, Any] = {}
                choice.rest(own)
                if own:
                    others += [(index, chunk) for chunk in chunks_of("", own)]
        if others:
            fields["alternatives"] = tuple(others)
        return chunks_of("", fields) if fields else _EMPTY

    def take_plain(self, body: Body) -> dict[str, Any] | None:
        """Return the fields of a whole answer that is one text and nothing else, as most are; None for another."""
        choices = body.choices
        if body.error or self._thinks_first or not choices or len(choices) > 1 or (choice := choices[0]) is None:
            return None
        message = choice.message
        if message is None or type(text := message.content) is not str:
            return None
        message.annotations = message.annotations or None  # OpenAI sends an empty list
        message.tool_calls = message.tool_calls or None
        if message != Delta(text):
            return None
        reason = choice.finish_reason
        # White space and a tag may be the beginning of reasoning.
        if text[:1] in ("", "<") or text[0].isspace() or type(reason) is not str or not reason:
            return None
        if (
            choice != Choice(message=message, index=choice.index, finish_reason=reason, usage=choice.usage)
            or choice.index
        ):
            return None
        fields: dict[str, Any] = {"text": text, "finish_reason": finish_reason_of(reason), "raw_finish_reason": reason}
        self._note(body, choice, fields)
        self._note_costs(fields)
        return fields

    def take_whole(self, body: Body, data: bytes) -> Iterable[Chunk]:
        """Return the chunks of a response that is not streamed."""
        for choice in body.choices or ():
            if choice is not None and choice.message is not None:
                choice.delta = None  # Perplexity sends an empty one
        return (*self.take(body, data), *self._last())

    def take(self, body: Body, data: bytes) -> Iterable[Chunk]:
        """Return the chunks of a decoded event."""
        choices = body.choices
        if body.base_resp is not None:
            heed_base_resp(body)
        if body.error or not choices:
            return self._take_other(body, data)
        choice = choices[0]
        if len(choices) > 1 or choice is None or choice.index or choice.error:
            return self._take_several(body, choices, data)
        state = self._first
        if not state.begun:
            state.begun = True
            self._choices[0] = state
        fields = self._held
        text = state.take(choice, fields)
        self._note(body, choice, fields)
        if not fields:
            return (Chunk(text),) if text else _EMPTY
        pieces: Pieces | None = fields.get("pieces")
        if text or (pieces is not None and pieces.has_output):
            self._held = {}
            return chunks_of(text, fields)
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
            new = ChoiceState(thinks_first=self._thinks_first) if index else self._first
            state = self._choices.setdefault(index, new)
            failure = failure or choice.error
            self._note(body, choice, fields)
            if index == 0:
                text += state.take(choice, fields)
            else:
                own: dict[str, Any] = {}
                said = state.take(choice, own)
                others += [(index, chunk) for chunk in chunks_of(said, own)]
        if others:
            fields["alternatives"] = tuple(others)
        chunks = chunks_of(text, fields)
        return self._fail_after(chunks, {"error": failure}, data) if failure else chunks

    def _take_other(self, body: Body, data: bytes) -> Iterable[Chunk]:
        """Take an event without choices, or with an error."""
        if body.error and body.choices:
            body.error = None
            for choice in body.choices:
                if choice is not None:
                    choice.error = choice.finish_reason = None
            return self._fail_after(self.take(body, data), read_json(data), data)
        if body.error:
            self._raise(read_json(data), data)
        before = len(self._held)
        self._note(body, Choice(), self._held)
        if len(self._held) == before and body.choices is None:
            reported = error_of_payload(read_json(data), body=data, service=self._service)
            if reported is not None:
                raise reported
        return _EMPTY

    def _fail_after(self, chunks: Iterable[Chunk], payload: object, data: bytes) -> Generator[Chunk]:
        """Yield the output that came in the same event as an error, then raise the error."""
        for chunk in chunks:
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
            self._usage = usage
        if (
            body.citations is not None
            or body.search_results is not None
            or body.prompt_filter_results is not None
            or body.images is not None
            or body.related_questions is not None
            or body.videos is not None
            or body.web_search is not None
        ):
            for name in _LISTS:
                if found := new_items(getattr(body, name), self._seen.setdefault(name, [])):
                    add_details(fields, {name: found})

    def _note_costs(self, fields: dict[str, Any]) -> None:
        """Record what the last usage counts beside tokens: the usages of a stream add up from event to event."""
        if costs := beside_tokens(self._usage):
            add_details(fields, {"usage": costs})


def chunks_of(text: str, fields: dict[str, Any]) -> tuple[Chunk, ...]:
    """Return chunks of a choice's fields and the text that follows them. The last has the metadata."""
    pieces = fields.pop("pieces", None)
    if pieces is None:
        return (Chunk(text, **fields),)
    if text:
        pieces.add("text", text)
    if len(pieces.chunks) == 1:  # nearly always
        return (Chunk(**pieces.chunks[0], **fields),)
    *before, last = pieces.chunks
    return (*[Chunk(**each) for each in before], Chunk(**last, **fields))


# The codec


@attrs.frozen
class OpenAICodec(SchemaLearner):
    """Codec for the chat completions of a service. `service` is its name in error messages."""

    quirks: Quirks = attrs.field(factory=Quirks)
    service: str = "OpenAI"
    _learned: dict[str, Quirks] = attrs.field(factory=dict[str, Quirks], init=False, repr=False, eq=False)
    """The quirks of models that refused a request as `quirks` would have it."""

    @property
    def framing(self) -> Framing:
        return "sse"

    def encode(self, request: Request, /, *, stream: bool) -> Encoded:
        """Encode a request.

        Raises:
            BadRequest: the service does not support a parameter, or a value cannot be written as JSON.
        """
        quirks = self._learned.get(request.model, self.quirks)
        body = chat_body(self.with_known_form(request), quirks, stream=stream, service=self.service)
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
        heed_base_resp(found)
        if not found.error and not any(map(_says_something, found.choices or ())):
            raise not_an_answer(raw, body, self.service, "a message in 'choices'")
        decoder = self.decoder()
        plain = decoder.take_plain(found)
        if plain is not None:
            return Response(raw=raw, **plain)
        joined = Aggregator()
        for chunk in decoder.take_whole(found, body):
            joined.add(chunk)
        return joined.response().evolve(raw=raw)

    def decoder(self) -> ChatDecoder:
        """Return a decoder for a stream."""
        return ChatDecoder(self.service, thinks_first=self.quirks.thinks_first)

    def decode_error(self, status: int, headers: Mapping[str, str], body: bytes, /) -> ProviderError:
        """Return the error of a non-2xx response."""
        return error_of_response(status, headers, body, service=self.service)

    def learn(self, request: Request, sent: bytes, error: ProviderError, /) -> str | None:
        """Remember the name under which a model takes `max_tokens`, or that it takes no schema; see `Learner`."""
        refused = refused_max_tokens_name(sent, error)
        if refused is None or request.max_tokens is None:  # `extra` has it, and would have it again
            return SchemaLearner.learn(self, request, sent, error)
        quirks = self._learned.get(request.model, self.quirks)
        other: MaxTokensName = "max_tokens" if refused == "max_completion_tokens" else "max_completion_tokens"
        # Another call may have learned it since this one was sent.
        if max_tokens_name(request.model, quirks) == refused:
            if len(self._learned) >= MAX_LEARNED and request.model not in self._learned:
                return None
            self._learned[request.model] = attrs.evolve(quirks, max_tokens=other)
        return f"sends {other} instead of {refused}"


def _says_something(choice: Choice | None) -> bool:
    return choice is not None and (
        choice.message is not None
        or choice.delta is not None
        or choice.text is not None
        or bool(choice.error)
        # Azure leaves the message out of an answer that its filter has stopped.
        or finish_reason_of(word_of(choice.finish_reason) or "") == "content_filter"
    )
