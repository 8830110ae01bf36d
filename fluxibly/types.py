"""The data that flows through a pipeline: requests, responses, chunks, what was measured, and the record of a call.

Everything here is immutable by contract. `Request`, `Response`, `Message` and their parts enforce it; `Chunk`, made
once for every few characters of a stream, is only declared so to type checkers, because enforcement doubles its cost.
`CallRecord` is the exception: it is the mutable memory of one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import attrs

from fluxibly._checks import repr_of_headers, repr_without_secrets
from fluxibly.messages import (
    ROLES as ROLES,
    Content as Content,
    Image as Image,
    Message as Message,
    Part as Part,
    Reasoning as Reasoning,
    Role as Role,
    Text as Text,
    Tool as Tool,
    ToolCall as ToolCall,
    parse_arguments as parse_arguments,
    to_messages,
    to_stop,
    to_tools,
)

if TYPE_CHECKING:
    from typing import Self

    from attrs import frozen as chunk_class

else:
    from attrs import define as chunk_class

_T = TypeVar("_T")

Outcome: TypeAlias = Literal["completed", "failed", "abandoned", "cancelled", "stalled"]
"""How a call ended; named alike in logs, metrics and spans."""

FINISH_REASONS = ("stop", "length", "content_filter", "tool_call", "error")
"""The vocabulary of `Response.finish_reason`; a provider's reason outside of it is passed on as it is."""


@attrs.frozen(kw_only=True)
class ProviderInfo:
    """Who answers: for logs (`name` is the provider's class), spans and error messages."""

    name: str = "unknown"
    framework: str = "custom"
    telemetry_name: str = "custom"
    """`gen_ai.provider.name` of the OpenTelemetry semantic conventions."""
    server_address: str | None = None
    server_port: int | None = None
    in_process: bool = False


_UNKNOWN = ProviderInfo()


class CallRecord:
    """The memory of one call, shared by all its layers and attempts: what must survive a failure is written here.

    Times are of `clock`, in seconds.
    """

    provider: ProviderInfo
    streaming: bool
    restarts: bool
    """Whether the consumer takes `Restart` events."""
    clock: Callable[[], float]
    started_at: float
    """When the call began."""
    sent_at: float | None
    """When the first attempt went out, of a stream."""
    requested_at: float
    """When the consumer asked for the chunk that is on its way; kept while `timed`."""
    timed: bool
    first_chunk_at: float | None
    """When the first chunk was delivered."""
    delivered: list[str]
    """The texts of the chunks that the consumer got, since the last `Restart`."""
    attempts: int
    watched: bool
    """Whether a layer wants the effect that ends each attempt; it costs a trip through all the layers."""
    trace_headers: Mapping[str, str] | None
    """What tells the trace to the service, where it is the same for all attempts: `send` adds it to their requests."""
    sent_model: str | None
    """The model that the last attempt asked for. A provider that turned to another by itself says so here."""
    sent_messages: tuple[Message, ...]
    """What the last attempt sent: middleware may have added to it. Error messages are masked with it."""
    model: str | None
    """The model that answered, as the last attempt's response named it."""
    usage: Usage | None
    """Of the last attempt; of one that was cut off or given up, as far as the service had told."""
    finish_reason: str | None
    """Why the last attempt ended, as far as the service had told."""
    stats: StreamStats | None
    cache_hit: bool
    """Set by a middleware that answers from a cache."""
    attempt_times: list[float] | None
    """Seconds of each attempt, where `Timing` asked for them."""
    timings: dict[str, float]
    """Seconds, by what was timed (see `Timing`)."""
    notes: dict[str, Any]
    """What middleware keep for themselves, each under a key of its own."""

    def __init__(self) -> None:
        # All of them are set here: an attribute that an instance has takes a quarter of the time of one on its class.
        self.provider = _UNKNOWN
        self.streaming = self.restarts = self.timed = self.watched = self.cache_hit = False
        self.clock = perf_counter
        self.started_at = self.requested_at = 0.0
        self.sent_at = self.first_chunk_at = None
        self.delivered = []
        self.attempts = 0
        self.trace_headers = None
        self.sent_messages = ()
        self.sent_model = self.model = None
        self.usage = self.finish_reason = self.stats = None
        self.attempt_times = None
        self.timings = {}
        self.notes = {}

    @property
    def chunks(self) -> int:
        """How many chunks the consumer got, since the last `Restart`."""
        return len(self.delivered)

    @property
    def characters(self) -> int:
        """How many characters of text the consumer got, since the last `Restart`."""
        return sum(map(len, self.delivered))


@attrs.frozen(kw_only=True, slots=False, eq=False)
class Request:
    """What a provider is asked. Parameters that are None are not sent.

    `messages` takes a string too. `stop` is up to a few strings that end the answer. `tool_choice` is "auto", "none",
    "required" or a tool's name. `response_format` is "text", "json" or a JSON Schema (a mapping) that the answer
    follows. `reasoning_effort` is the provider's word ("low", "high", …). `n` asks for several choices. `extra` goes
    into the request's body as it is and wins over everything. `headers` are sent along by HTTP providers. `metadata`
    is the caller's own, for middleware: it is never sent.
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
    extra: Mapping[str, Any] = attrs.field(factory=dict[str, Any], repr=repr_without_secrets)
    headers: Mapping[str, str] = attrs.field(factory=dict[str, str], repr=repr_of_headers)
    metadata: Mapping[str, Any] = attrs.field(factory=dict[str, Any])
    call: CallRecord = attrs.field(factory=CallRecord, repr=False)

    def evolve(self, **changes: Any) -> Self:
        """A copy with `changes`, which shares this request's `call` record.

        Raises:
            TypeError: a name is not one of a request.
        """
        return _evolve(self, changes)

    @property
    def prompt_length(self) -> int:
        """The characters of all the texts in its messages."""
        return sum([len(part.text) for message in self.messages for part in message.content if isinstance(part, Text)])


_CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "messages": to_messages,
    "tools": to_tools,
    "stop": to_stop,
    "tool_calls": tuple,
    "reasoning_parts": tuple,
    "alternatives": tuple,
}


def _evolve(self: _T, changes: dict[str, Any]) -> _T:
    """`attrs.evolve` for classes with a `__dict__`, a third of its cost."""
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
    """The request with these headers, each once, whatever it had under their names."""
    if not added:
        return request
    if request.headers:
        names = {name.lower() for name in added}
        added = {name: value for name, value in request.headers.items() if name.lower() not in names} | dict(added)
    state = request.__dict__.copy()
    state["headers"] = added
    return _of_state(request, state)


@attrs.frozen(kw_only=True)
class Usage:
    """Tokens as the service counted them; None where it did not say.

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
        """Input and output together, if either is known."""
        if self.input_tokens is None and self.output_tokens is None:
            return None
        return (self.input_tokens or 0) + (self.output_tokens or 0)


@attrs.frozen(kw_only=True)
class StreamStats:
    """What `StreamMeter` measured of a stream. Times are seconds and leave out what the consumer took.

    A gap is the wait for a chunk after the first; `longest_stall` is the longest of all waits, the first included,
    and that which ended in an error. The percentiles are estimates (see `StreamMeter`).
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
        """Characters a chunk."""
        return self.characters / self.chunks if self.chunks else 0.0

    @property
    def characters_per_second(self) -> float | None:
        """The rate after the first chunk came; None if no time passed."""
        return self.characters / self.streaming_time if self.streaming_time > 0 else None

    @property
    def tokens_per_second(self) -> float | None:
        """Output tokens a second after the first chunk came; None where the service did not count them."""
        if self.tokens is None or self.streaming_time <= 0:
            return None
        return self.tokens / self.streaming_time


# One for each type, because mypy takes no generic function for a converter.
def _to_tool_calls(calls: Iterable[ToolCall]) -> tuple[ToolCall, ...]:
    return tuple(calls)


def _to_reasoning(parts: Iterable[Reasoning]) -> tuple[Reasoning, ...]:
    return tuple(parts)


def _to_responses(responses: Iterable[Response]) -> tuple[Response, ...]:
    return tuple(responses)


@attrs.frozen(slots=False)
class Response:
    """A model's whole answer. `Response(text="hello")` is a complete one; `str(response)` is its text.

    `finish_reason` is one of `FINISH_REASONS` (or the service's own word, if it fits none), `raw_finish_reason` what
    the service said. `alternatives` are the choices after the first, where several were asked for. `parsed` is what
    `Validation` made of the text. `elapsed` is the call's wall time in seconds. `raw` is the service's body, decoded
    (None for streams).
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
    parsed: Any = attrs.field(default=None, kw_only=True)
    request_id: str | None = attrs.field(default=None, kw_only=True, eq=False)
    rate_limits: Mapping[str, str] = attrs.field(factory=dict[str, str], kw_only=True, eq=False)
    """The service's rate-limit headers, by their lower-case names."""
    elapsed: float | None = attrs.field(default=None, kw_only=True, eq=False)
    stats: StreamStats | None = attrs.field(default=None, kw_only=True, eq=False)
    raw: Any = attrs.field(default=None, kw_only=True, eq=False, repr=False)

    def __str__(self) -> str:
        return self.text

    def evolve(self, **changes: Any) -> Response:
        """A copy with `changes`.

        Raises:
            TypeError: a name is not one of a response.
        """
        return _evolve(self, changes)

    @property
    def has_output(self) -> bool:
        """Whether there is text, reasoning or a tool call in it."""
        return bool(self.text or self.tool_calls or self.reasoning)


@attrs.frozen(kw_only=True)
class ToolCallDelta:
    """A fragment of a tool call in a stream. Fragments are joined by `index`, else by `id`, else to the last one."""

    index: int | None = None
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    """A piece of the JSON text."""
    signature: str | None = None


def _is_text_only(chunk: Chunk) -> bool:
    return not (
        chunk.reasoning
        or chunk.tool_calls
        or chunk.finish_reason
        or chunk.raw_finish_reason
        or chunk.usage
        or chunk.id
        or chunk.model
        or chunk.reasoning_parts
        or chunk.alternatives
        or chunk.request_id
        or chunk.rate_limits
    )


@chunk_class
class Chunk:
    """A piece of a streamed answer. `Chunk(text="tok ")` is a complete one. Treat it as immutable.

    The last value of `finish_reason`, `usage`, `model` and `id` in a stream counts. `alternatives` has the pieces of
    choices after the first, as (index, chunk).
    """

    text: str = ""
    reasoning: str = attrs.field(default="", kw_only=True)
    tool_calls: tuple[ToolCallDelta, ...] = attrs.field(default=(), kw_only=True)
    finish_reason: str | None = attrs.field(default=None, kw_only=True)
    raw_finish_reason: str | None = attrs.field(default=None, kw_only=True)
    usage: Usage | None = attrs.field(default=None, kw_only=True)
    model: str | None = attrs.field(default=None, kw_only=True)
    id: str | None = attrs.field(default=None, kw_only=True)
    reasoning_parts: tuple[Reasoning, ...] = attrs.field(default=(), kw_only=True)
    alternatives: tuple[tuple[int, Chunk], ...] = attrs.field(default=(), kw_only=True)
    request_id: str | None = attrs.field(default=None, kw_only=True, eq=False)
    rate_limits: Mapping[str, str] | None = attrs.field(default=None, kw_only=True, eq=False)
    text_only: bool = attrs.field(
        init=False, eq=False, repr=False, default=attrs.Factory(_is_text_only, takes_self=True)
    )
    """Whether there is nothing in it besides text, as in most: worked out once, for all who read it."""

    def __str__(self) -> str:
        return self.text

    @property
    def has_output(self) -> bool:
        """Whether there is text, reasoning or a part of a tool call in it: what cannot be taken back."""
        return bool(self.text or self.reasoning or self.tool_calls)


@attrs.frozen
class Restart:
    """The answer begins anew: what came before it is void. Only for consumers that asked: `stream(…, restarts=True)`.

    `reason` says why, without content.
    """

    reason: str = ""
