"""The data that flows through a pipeline: requests, responses, chunks, measurements, and the record of a call.

Everything here is immutable by contract, except `CallRecord`, which is the mutable memory of a call. `Request`,
`Response`, `Message` and their parts enforce the contract. `Chunk` is immutable only for type checkers: a stream makes
a chunk for every few characters, and enforcement would double the cost of a chunk.

The classes refer to each other (a response makes a message, a request has the record of its call), so they share a
module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import attrs

from fluxibly._checks import repr_of_headers, repr_without_secrets
from fluxibly._values import Shown, Value
from fluxibly.messages import (
    ROLES as ROLES,
    Content as Content,
    Message as Message,
    Role as Role,
    Tool as Tool,
    to_messages,
    to_stop,
    to_tools,
)
from fluxibly.parts import (
    Audio as Audio,
    ContentPart as ContentPart,
    Document as Document,
    Image as Image,
    Kind,
    Media as Media,
    Opaque as Opaque,
    Order,
    Part as Part,
    Place,
    Reasoning as Reasoning,
    Span,
    Text as Text,
    ToolCall as ToolCall,
    in_order,
    opaque_parts,
    order_unless_usual,
    parse_arguments as parse_arguments,
    place_of,
    split_text,
    table,
)

if TYPE_CHECKING:
    from typing import Self

    from attrs import frozen as chunk_class

else:
    from attrs import define as chunk_class

_T = TypeVar("_T")

Outcome: TypeAlias = Literal["completed", "failed", "abandoned", "cancelled", "stalled"]
"""How a call ended. Logs, metrics and spans use the same words."""

FINISH_REASONS = ("stop", "length", "content_filter", "tool_call", "error")
"""The vocabulary of `Response.finish_reason`. A provider's reason outside this vocabulary is passed on unchanged."""


@attrs.frozen(kw_only=True, repr=False, eq=False)
class ProviderInfo(Value):
    """The identity of a provider, for logs (`name` is the provider's class), spans and error messages."""

    name: str = "unknown"
    framework: str = "custom"
    telemetry_name: str = "custom"
    """`gen_ai.provider.name` of the OpenTelemetry semantic conventions."""
    server_address: str | None = None
    server_port: int | None = None
    in_process: bool = False


_UNKNOWN = ProviderInfo()


class CallRecord:
    """The memory of a call, shared by all its layers and attempts. It keeps the facts that must survive a failure.

    Times are readings of `clock`, in seconds.
    """

    provider: ProviderInfo
    layers: tuple[Any, ...]
    """The middleware of the pipeline, outermost first."""
    streaming: bool
    restarts: bool
    """Whether the consumer takes `Restart` events."""
    clock: Callable[[], float]
    started_at: float
    """When the call began."""
    sent_at: float | None
    """When the first attempt of a stream was sent; None for other calls."""
    requested_at: float
    """When the consumer asked for the chunk that is being read. Later chunks update it only while `timed` is set."""
    timed: bool
    first_chunk_at: float | None
    """When the first chunk was delivered."""
    delivered: list[str]
    """The texts of the chunks that the consumer has received since the last `Restart`."""
    attempts: int
    watched: bool
    """Whether a layer needs the effect that ends each attempt. The effect costs a pass through all the layers."""
    trace_headers: Mapping[str, str] | None
    """Trace headers that are the same for every attempt. `send` adds them to the request of each attempt."""
    sent_model: str | None
    """The model that the last attempt asked for. A provider that falls back to another model by itself updates it."""
    sent_messages: tuple[Message, ...]
    """The messages of the last attempt, with any that middleware added. Error messages are masked against them."""
    model: str | None
    """The model that answered, as named by the last attempt's response."""
    usage: Usage | None
    """The usage of the last attempt. If the attempt was cut off or abandoned: as far as the service had reported it."""
    finish_reason: str | None
    """Why the last attempt ended, as far as the service had reported it."""
    interruption: Exception | None
    """The `StreamInterrupted` that ended the last attempt, until the stream ends."""
    said: str | None
    """The text of the last attempt's answer, if it was streamed to its end."""
    stats: StreamStats | None
    cache_hit: bool
    """Set by a middleware that answers from a cache."""
    attempt_times: list[float] | None
    """The duration of each attempt in seconds, if `Timing` asked for it."""
    timings: dict[str, float]
    """Durations in seconds, by name (see `Timing`)."""
    notes: dict[str, Any]
    """The private data of middleware, each under its own key."""

    def __init__(self) -> None:
        # Every attribute is set here, because reading it from the instance takes a quarter of the time of a class
        # attribute.
        self.provider = _UNKNOWN
        self.layers = ()
        self.streaming = self.restarts = self.timed = self.watched = self.cache_hit = False
        self.clock = perf_counter
        self.started_at = self.requested_at = 0.0
        self.sent_at = self.first_chunk_at = None
        self.delivered = []
        self.attempts = 0
        self.trace_headers = None
        self.sent_messages = ()
        self.sent_model = self.model = None
        self.usage = self.finish_reason = self.stats = self.interruption = self.said = None
        self.attempt_times = None
        self.timings = {}
        self.notes = {}

    @property
    def chunks(self) -> int:
        """The number of chunks that the consumer has received since the last `Restart`."""
        return len(self.delivered)

    @property
    def characters(self) -> int:
        """The number of characters of text that the consumer has received since the last `Restart`."""
        return sum(map(len, self.delivered))


@attrs.frozen(kw_only=True, slots=False, repr=False, eq=False)
class Request(Shown):
    """A request to a provider. Parameters that are None are not sent.

    `messages` also accepts a str. `stop` holds a few strings, each of which ends the answer. `tool_choice` is "auto",
    "none", "required" or a tool's name. `response_format` is "text", "json" or a JSON Schema (a mapping) that the
    answer must follow; or a table as OpenAI's client takes it, in which `strict` and a name can be given.
    `reasoning_effort` is the provider's own word ("low", "high", …). `n` asks for several choices. `extra` is merged into
    the request body and takes precedence over every other parameter. HTTP providers send `headers` with the request. `metadata` carries the caller's own data for middleware and is never sent.
    """

    model: str
    messages: tuple[Message, ...] = attrs.field(converter=to_messages)
    temperature: float | None = None
    max_tokens: int | None = None
    top_p: float | None = None
    top_k: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    stop: tuple[str, ...] = attrs.field(default=(), converter=to_stop)
    seed: int | None = None
    n: int | None = None
    tools: tuple[Tool, ...] = attrs.field(default=(), converter=to_tools)
    tool_choice: str | None = None
    response_format: Literal["text", "json"] | Mapping[str, Any] | None = None
    reasoning_effort: str | None = None
    extra: Mapping[str, Any] = attrs.field(factory=table, repr=repr_without_secrets)
    headers: Mapping[str, str] = attrs.field(factory=table, repr=repr_of_headers)
    metadata: Mapping[str, Any] = attrs.field(factory=table)
    call: CallRecord = attrs.field(factory=CallRecord, repr=False)

    def evolve(self, **changes: Any) -> Self:
        """Return a copy with `changes` that shares this request's `call` record.

        Raises:
            TypeError: a request has no field of that name.
        """
        return _evolve(self, changes)

    @property
    def prompt_length(self) -> int:
        """The number of characters in all the texts of the messages."""
        return sum([len(part.text) for message in self.messages for part in message.content if isinstance(part, Text)])


_CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "messages": to_messages,
    "tools": to_tools,
    "stop": to_stop,
    "tool_calls": tuple,
    "reasoning_parts": tuple,
    "media": tuple,
    "alternatives": tuple,
}


def _evolve(self: _T, changes: dict[str, Any]) -> _T:
    """Do the work of `attrs.evolve` for classes with a `__dict__`, at a third of its cost."""
    state = self.__dict__.copy()
    for name, value in changes.items():
        if name not in state:
            raise TypeError(f"a {type(self).__name__} has no {name!r}; it has {', '.join(state)}")
        convert = _CONVERTERS.get(name)
        state[name] = value if convert is None else convert(value)
    return _of_state(self, state)


_new = object.__new__
_set_state = object.__setattr__


def _of_state(self: _T, state: dict[str, Any]) -> _T:
    copy = _new(self.__class__)
    _set_state(copy, "__dict__", state)
    return copy


def with_headers(request: Request, added: Mapping[str, str]) -> Request:
    """Return the request with the `added` headers, which replace its own headers of the same names (in any case)."""
    if not added:
        return request
    if request.headers:
        names = {name.lower() for name in added}
        added = {name: value for name, value in request.headers.items() if name.lower() not in names} | dict(added)
    state = request.__dict__.copy()
    state["headers"] = added
    return _of_state(request, state)


@attrs.frozen(kw_only=True, repr=False, eq=False)
class Usage(Value):
    """Token counts as the service reported them. A count that it did not report is None.

    `input_tokens` includes `cached_tokens` (read from a prompt cache) and `cache_write_tokens`; `output_tokens`
    includes `reasoning_tokens` (OpenTelemetry's convention, `gen_ai.usage.*`).
    """

    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    cache_write_tokens: int | None = None
    reasoning_tokens: int | None = None

    @property
    def total_tokens(self) -> int | None:
        """The sum of input and output tokens, or None if neither count is known."""
        if self.input_tokens is None and self.output_tokens is None:
            return None
        return (self.input_tokens or 0) + (self.output_tokens or 0)


@attrs.frozen(kw_only=True, repr=False, eq=False)
class StreamStats(Value):
    """The measurements of a stream by `StreamMeter`. Times are in seconds and exclude the time of the consumer.

    A gap is the wait for a chunk after the first. `longest_stall` is the longest of all waits, including the wait for
    the first chunk and a wait that ended in an error. The percentiles are estimates (see `StreamMeter`).
    """

    chunks: int = 0
    characters: int = 0
    time_to_first_chunk: float | None = None
    gap_p50: float | None = None
    gap_p95: float | None = None
    gap_p99: float | None = None
    gap_max: float | None = None
    longest_stall: float | None = None
    streaming_time: float = 0.0
    """Seconds spent waiting for chunks after the first."""
    tokens: int | None = None

    @property
    def average_chunk_size(self) -> float:
        """The mean number of characters per chunk."""
        return self.characters / self.chunks if self.chunks else 0.0

    @property
    def characters_per_second(self) -> float | None:
        """Characters per second after the first chunk arrived; None if no time passed."""
        return self.characters / self.streaming_time if self.streaming_time > 0 else None

    @property
    def tokens_per_second(self) -> float | None:
        """Output tokens per second after the first chunk arrived; None if the service did not count the tokens."""
        if self.tokens is None or self.streaming_time <= 0:
            return None
        return self.tokens / self.streaming_time


# mypy does not accept a generic function as a converter. attrs reads the signature of a converter when a class is made,
# and that of `tuple` takes longer than the rest of this module.
if TYPE_CHECKING:

    def _to_tool_calls(calls: Iterable[ToolCall]) -> tuple[ToolCall, ...]: ...
    def _to_reasoning(parts: Iterable[Reasoning]) -> tuple[Reasoning, ...]: ...
    def _to_media(media: Iterable[Media]) -> tuple[Media, ...]: ...
    def _to_responses(responses: Iterable[Response]) -> tuple[Response, ...]: ...

else:

    def _to_tuple(values):
        return tuple(values)

    _to_tool_calls = _to_reasoning = _to_media = _to_responses = _to_tuple


USUAL: tuple[Kind, ...] = ("reasoning", "media", "text", "tool_call")
"""The order of an answer's parts, unless `Response.order` says otherwise."""


@attrs.frozen(slots=False, repr=False, eq=False)
class Response(Value):
    """A model's whole answer. `Response(text="hello")` is a valid response, and `str(response)` is its text.

    `parts` has everything that the model sent, in the order in which it came: texts, reasoning, media, tool calls, and
    opaque parts that only the service's own dialect reads. `text`, `reasoning`, `reasoning_parts`, `media`, `tool_calls`
    and `opaque` show it by kind. `Message.assistant(response)`, or `message`, sends the parts back as they came.

    `media` holds the images, audio and files that the model made. `details` holds what the service sent beside the
    answer, under the service's own names: log probabilities, citations, annotations, safety ratings.

    `finish_reason` is a word of `FINISH_REASONS`, or the service's own word if that fits no word of the vocabulary.
    `raw_finish_reason` is always the service's own word. `alternatives` holds the choices after the first, if the
    request asked for several. `parsed` is the value that `Validation` parsed from the text. `elapsed` is the call's
    wall time in seconds. `raw` is the decoded body of the service's response (None for streams).
    """

    text: str = ""
    tool_calls: tuple[ToolCall, ...] = attrs.field(default=(), converter=_to_tool_calls, kw_only=True)
    reasoning: str = attrs.field(default="", kw_only=True)
    reasoning_parts: tuple[Reasoning, ...] = attrs.field(default=(), converter=_to_reasoning, kw_only=True)
    finish_reason: str | None = attrs.field(default=None, kw_only=True)
    raw_finish_reason: str | None = attrs.field(default=None, kw_only=True)
    usage: Usage | None = attrs.field(default=None, kw_only=True)
    model: str | None = attrs.field(default=None, kw_only=True)
    id: str | None = attrs.field(default=None, kw_only=True)
    alternatives: tuple[Response, ...] = attrs.field(default=(), converter=_to_responses, kw_only=True)
    media: tuple[Media, ...] = attrs.field(default=(), converter=_to_media, kw_only=True)
    # Of the order only the opaque parts are compared: a middleware that makes several chunks of one may order them
    # differently in a stream.
    order: Order | None = attrs.field(default=None, kw_only=True, eq=opaque_parts)
    """Where each part stands; None for reasoning, media, text, tool calls. See `parts` and `from_parts`."""
    parsed: Any = attrs.field(default=None, kw_only=True)
    request_id: str | None = attrs.field(default=None, kw_only=True, eq=False)
    rate_limits: Mapping[str, str] = attrs.field(factory=table, kw_only=True, eq=False)
    """The service's rate-limit headers, by lower-case name."""
    details: Mapping[str, Any] = attrs.field(factory=table, kw_only=True, eq=False)
    elapsed: float | None = attrs.field(default=None, kw_only=True, eq=False)
    stats: StreamStats | None = attrs.field(default=None, kw_only=True, eq=False)
    raw: Any = attrs.field(default=None, kw_only=True, eq=False, repr=False)

    def __str__(self) -> str:
        return self.text

    def evolve(self, **changes: Any) -> Response:
        """Return a copy with `changes`.

        Raises:
            TypeError: a response has no field of that name.
        """
        return _evolve(self, changes)

    @classmethod
    def from_parts(cls, parts: Iterable[Part], **fields: Any) -> Response:
        """Return a response of parts in their order. `fields` are other fields, such as `finish_reason`."""
        given = list(parts)
        if len(given) == 1 and isinstance(text := given[0], Text):  # as nearly always
            return cls(text.text, order=None if text.raw is None else (Span(len(text.text), text.raw),), **fields)
        order: list[Place] = [place_of(part, "a Response's parts") for part in given]
        thoughts = [part for part in given if isinstance(part, Reasoning)]
        reasoning = "".join([thought.text for thought in thoughts])
        return cls(
            "".join([part.text for part in given if isinstance(part, Text)]),
            reasoning=reasoning,
            reasoning_parts=() if thoughts == [Reasoning(text=reasoning)] else thoughts,
            media=[part for part in given if isinstance(part, Media)],
            tool_calls=[part for part in given if isinstance(part, ToolCall)],
            order=order_unless_usual(order, USUAL),
            **fields,
        )

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts of the answer, in the order in which they came."""
        thoughts = self.reasoning_parts or ((Reasoning(text=self.reasoning),) if self.reasoning else ())
        texts = split_text(self.text, self.order)
        return in_order(
            self.order,
            {"reasoning": thoughts, "media": self.media, "text": texts, "tool_call": self.tool_calls},
        )

    @property
    def message(self) -> Message:
        """The answer as the assistant's message of a conversation."""
        return Message.assistant(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the response as JSON values: `from_dict` makes the same response of them.

        `parts` is there if the answer is more than a text. `parsed` and `raw` are left out if they are not JSON.
        """
        from fluxibly._dicts import is_plain, part_to_dict, plain

        parts = self.parts
        found: dict[str, Any] = {"text": self.text}
        if not is_plain(parts):
            found["parts"] = [part_to_dict(part) for part in parts]
        if self.reasoning and self.reasoning != "".join([p.text for p in parts if isinstance(p, Reasoning)]):
            found["reasoning"] = self.reasoning
        for name in (*_WORDS, "elapsed", "details", "rate_limits"):
            value: Any = getattr(self, name)
            if value not in (None, {}):
                found[name] = plain(value, self)
        for name in ("usage", "stats"):
            counts: Any = getattr(self, name)
            if counts is not None:
                found[name] = {key: value for key, value in attrs.asdict(counts).items() if value is not None}
        if self.alternatives:
            found["alternatives"] = [other.to_dict() for other in self.alternatives]
        for name in ("parsed", "raw"):
            with suppress(TypeError):
                if getattr(self, name) is not None:
                    found[name] = plain(getattr(self, name), self)
        return found

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Response:
        """Return the response of a mapping that `to_dict` made.

        Raises:
            ValueError: a field is missing, unknown or of the wrong type. The error names its path.
        """
        return _response(fields, "a response")

    @property
    def has_output(self) -> bool:
        """Whether the response or an alternative contains text, reasoning, a tool call, media or an opaque part."""
        if self.text or self.tool_calls or self.reasoning or self.media or self.opaque:
            return True
        return any(other.has_output for other in self.alternatives)

    @property
    def opaque(self) -> tuple[Opaque, ...]:
        """The parts that only the service's own dialect reads."""
        return opaque_parts(self.order)


_WORDS = ("finish_reason", "raw_finish_reason", "model", "id", "request_id")


def _response(given: object, path: str) -> Response:
    from fluxibly._dicts import Reader, numbers, part_from_dict

    fields = Reader(given, path)
    text = fields.text("text", "")
    found: dict[str, Any] = {name: value for name in _WORDS if (value := fields.text(name)) is not None}
    for name in ("details", "rate_limits"):
        found[name] = fields.table(name) or {}
    for name, kind in (("usage", Usage), ("stats", StreamStats)):
        counts = fields.table(name)
        found[name] = None if counts is None else numbers(counts, kind, fields.at(name))
    found["elapsed"] = fields.take("elapsed", (int, float), "a number")
    found["alternatives"] = [
        _response(other, f"{fields.at('alternatives')}[{number}]")
        for number, other in enumerate(fields.items("alternatives"))
    ]
    found["parsed"], found["raw"] = fields.value("parsed"), fields.value("raw")
    parts = [part_from_dict(part, f"{fields.at('parts')}[{n}]") for n, part in enumerate(fields.items("parts"))]
    response = Response.from_parts(parts, **found) if parts else Response(text, **found)
    reasoning = fields.text("reasoning")
    fields.done([field.name for field in attrs.fields(Response)])
    return response if reasoning is None else response.evolve(reasoning=reasoning)


@attrs.frozen(kw_only=True, repr=False, eq=False)
class ToolCallDelta(Value):
    """A fragment of a tool call in a stream. Fragments are joined by `index`, else by `id`, else to the last call."""

    index: int | None = None
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    """A piece of the JSON text."""
    signature: str | None = None
    raw: Mapping[str, Any] | None = None
    """Other fields of the call that the service wants back (`ToolCall.raw`)."""


def _is_text_only(chunk: Chunk) -> bool:
    return not (
        chunk.reasoning
        or chunk.tool_calls
        or chunk.finish_reason
        or chunk.raw_finish_reason
        or chunk.usage
        or chunk.id
        or chunk.model
        or chunk.parts
        or chunk.details
        or chunk.alternatives
        or chunk.request_id
        or chunk.rate_limits
    )


@chunk_class(repr=False, eq=False)
class Chunk(Value):
    """A piece of a streamed answer. `Chunk(text="tok ")` is a valid chunk. Treat chunks as immutable.

    Within a chunk, `reasoning` comes first, then `parts`, `text` and `tool_calls`. `parts` holds what arrives whole:
    media, opaque parts, and blocks that are complete. A `Reasoning` completes the reasoning that was streamed before it,
    whose place it takes, with its signature; its text is not repeated. A `Text` is empty: it completes the text that was
    streamed before it, and `raw` holds the fields beside that text. `details` are added to those before: tables by key,
    lists by appending.

    Of `finish_reason`, `usage`, `model` and `id`, the last value in a stream counts. `alternatives` holds the pieces of
    the choices after the first, as pairs (index, chunk).
    """

    text: str = ""
    reasoning: str = attrs.field(default="", kw_only=True)
    tool_calls: tuple[ToolCallDelta, ...] = attrs.field(default=(), kw_only=True)
    finish_reason: str | None = attrs.field(default=None, kw_only=True)
    raw_finish_reason: str | None = attrs.field(default=None, kw_only=True)
    usage: Usage | None = attrs.field(default=None, kw_only=True)
    model: str | None = attrs.field(default=None, kw_only=True)
    id: str | None = attrs.field(default=None, kw_only=True)
    parts: tuple[Part, ...] = attrs.field(default=(), kw_only=True)
    alternatives: tuple[tuple[int, Chunk], ...] = attrs.field(default=(), kw_only=True)
    request_id: str | None = attrs.field(default=None, kw_only=True, eq=False)
    rate_limits: Mapping[str, str] | None = attrs.field(default=None, kw_only=True, eq=False)
    details: Mapping[str, Any] | None = attrs.field(default=None, kw_only=True, eq=False)
    text_only: bool = attrs.field(
        init=False, eq=False, repr=False, default=attrs.Factory(_is_text_only, takes_self=True)
    )
    """Whether the chunk contains only text, as most chunks do. Computed once, because several layers read it."""

    def __str__(self) -> str:
        return self.text

    @property
    def has_output(self) -> bool:
        """Whether the chunk, of whatever choice, contains text, reasoning, part of a tool call, media or an opaque part.

        Such output cannot be taken back, so nothing is sent again after it.
        """
        return bool(
            self.text
            or self.reasoning
            or self.tool_calls
            or (self.parts and any(not isinstance(part, (Reasoning, Text)) or part.text for part in self.parts))
            or (self.alternatives and any(chunk.has_output for _, chunk in self.alternatives))
        )


@attrs.frozen(repr=False, eq=False)
class Restart(Value):
    """An event: the answer begins again, and all chunks before it are void. Only `stream(…, restarts=True)` yields it.

    `reason` says why, without quoting content.
    """

    reason: str = ""
