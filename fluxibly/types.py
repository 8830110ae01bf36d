"""The data that flows through a pipeline: requests, responses and chunks.

Everything here is immutable by contract. `Request`, `Response`, `Message` and their parts enforce the contract. `Chunk`
is immutable only for type checkers: a stream makes a chunk for every few characters, and enforcement would double the
cost of a chunk. Requests, responses and chunks stand together, with their forms as JSON values, because each refers to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias, TypeVar

import attrs

from fluxibly._checks import is_list, is_whole, kind_of, repr_of_headers, repr_without_secrets
from fluxibly._values import Shown, Value
from fluxibly.calls import (
    CallRecord as CallRecord,
    Prefill as Prefill,
    ProviderInfo as ProviderInfo,
    StreamStats as StreamStats,
    Usage as Usage,
)
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
    from decimal import Decimal
    from typing import Self

    from attrs import frozen as chunk_class

else:
    from attrs import define

    def chunk_class(**options):
        return define(init=False, **options)


_T = TypeVar("_T")
_R = TypeVar("_R", bound="Request")

Outcome: TypeAlias = Literal["completed", "failed", "abandoned", "cancelled", "stalled"]
"""How a call ended. Logs, metrics and spans use the same words."""

FINISH_REASONS = ("stop", "length", "content_filter", "tool_call", "error")
"""The vocabulary of `Response.finish_reason`. A provider's reason outside this vocabulary is passed on unchanged."""


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
    target: Adapts | None = attrs.field(default=None, repr=False)
    """The `Target` that answers, in place of the pipeline's own provider."""
    call: CallRecord = attrs.field(factory=CallRecord, repr=False)
    observers: ClassVar[tuple[Observer, ...]] = ()
    """The observers of the layers that the request has passed, outermost first. `Tracing` adds its own (`observed`).

    Only the requests of observed calls have an attribute of their own, so that other calls cost nothing more.
    """

    def __attrs_post_init__(self) -> None:
        if self.target is not None:
            _set_state(self, "__dict__", _adapted(self, self.target).__dict__)

    def evolve(self, **changes: Any) -> Self:
        """Return a copy with `changes` that shares this request's `call` record.

        `target=` also sets and drops the parameters that the target names; other changes win over those.

        Raises:
            TypeError: a request has no field of that name, or `target` is not a `Target`.
        """
        target = changes.pop("target", None) if "target" in changes else self.target
        if target is None or target is self.target:
            return replaced(self, changes if target is self.target else {**changes, "target": None})
        return replaced(_adapted(self, target), changes)

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
    "added": tuple,
}


class Adapts(Protocol):
    """A `Target`. Its own module stands further out, because it reads configurations."""

    def adapt(self, request: Request, /) -> Request: ...


class Attempt(Protocol):
    """An attempt under way, as an observer follows it."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The trace headers to send with the request."""
        ...

    def end(self, response: Response | None, error: BaseException | None, *, sent: bool) -> None:
        """Note the end of the attempt. A GeneratorExit means that it was broken off.

        Args:
            sent: whether the provider was called. If not, there was no attempt, and nothing of it is recorded.
        """
        ...


class Observer(Protocol):
    """Follows the attempts that are made with a request, several at a time if branches of a race run side by side.

    The methods of an observer and of what they return never raise.
    """

    def begin(self, request: Request, /) -> Attempt:
        """Begin an attempt. The span that this makes current is that of the provider until the attempt ends."""
        ...

    def ask(self) -> AskObserver:
        """Return the observer of an `ask` that was made with the request."""
        ...

    def run_tool(self, tool: Tool, call: ToolCall, /) -> ToolRun | None:
        """Begin to follow the run of a tool's function for a call of the model. None: it need not be followed."""
        ...


class ToolRun(Protocol):
    """The run of a tool's function, as an observer follows it."""

    def enter(self) -> object:
        """Make its span current, in the thread or task that calls the function. Return a token for `leave`."""
        ...

    def leave(self, token: Any, /) -> None:
        """Make the span current that was before."""
        ...

    def end(self, result: Message | None, error: BaseException | None, /) -> None:
        """Note the end. If there are both, the result tells the model of the error."""
        ...


class AskObserver(Observer, Protocol):
    """Follows the attempts of an `ask`."""

    def end(self, response: Response | None, error: BaseException | None, /) -> None:
        """Note the end of the `ask`."""
        ...


def observers_of(request: Request) -> tuple[Observer, ...]:
    """Return the observers of the request's own call, not those of a call that this one is made within."""
    return request.observers if request.call.observed else ()


def observed(request: Request, observer: Observer, *, in_place: bool = False) -> Request:
    """Return the request with one more observer.

    Args:
        in_place: whether to change the request itself, because nobody else has it.
    """
    observers = (*observers_of(request), observer)
    request.call.observed = True
    if in_place:
        request.__dict__["observers"] = observers
        return request
    return observed_by(request, observers)


def observed_by(request: Request, observers: tuple[Observer, ...]) -> Request:
    """Return the request with these observers, in place of its own."""
    state = request.__dict__.copy()
    state["observers"] = observers
    return _of_state(request, state)


def _adapted(request: _R, target: object) -> _R:
    adapt = getattr(target, "adapt", None)
    if adapt is None or isinstance(target, type):
        raise TypeError(f"target: expected a Target, got {kind_of(target)}; write target=Target(…)")
    adapted: _R = adapt(request)
    return adapted


def replaced(self: _T, changes: Mapping[str, Any]) -> _T:
    """Return a copy with `changes`: the work of `attrs.evolve` for classes with a `__dict__`, at a third of its cost."""
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


def unobserved(request: Request, attempts: Iterable[Attempt]) -> Request:
    """Return the request of these attempts, as it is sent: with their headers, and without observers.

    A header replaces the request's own of the same name (in any case), and those of the attempts before.
    """
    headers = request.headers
    for attempt in attempts:
        headers = with_headers(headers, attempt.headers)
    state = request.__dict__.copy()
    state["headers"] = headers
    del state["observers"]
    return _of_state(request, state)


def with_headers(headers: Mapping[str, str], added: Mapping[str, str]) -> Mapping[str, str]:
    """Return `headers` with the `added` headers, which replace those of the same names (in any case)."""
    if not headers or not added:
        return headers or added
    names = {name.lower() for name in added}
    return {name: value for name, value in headers.items() if name.lower() not in names} | dict(added)


# mypy does not accept a generic function as a converter. attrs reads the signature of a converter when a class is made,
# and that of `tuple` takes longer than the rest of this module.
if TYPE_CHECKING:

    def _to_tool_calls(calls: Iterable[ToolCall]) -> tuple[ToolCall, ...]: ...
    def _to_reasoning(parts: Iterable[Reasoning]) -> tuple[Reasoning, ...]: ...
    def _to_media(media: Iterable[Media]) -> tuple[Media, ...]: ...
    def _to_responses(responses: Iterable[Response]) -> tuple[Response, ...]: ...
    def _to_added(messages: Iterable[Message]) -> tuple[Message, ...]: ...

else:

    def _to_tuple(values):
        return tuple(values)

    _to_tool_calls = _to_reasoning = _to_media = _to_responses = _to_added = _to_tuple


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
    added: tuple[Message, ...] = attrs.field(default=(), converter=_to_added, kw_only=True)
    """The messages between the request's and this answer, if a middleware went on by itself: tool calls and results."""
    parsed: Any = attrs.field(default=None, kw_only=True)
    provider: str | None = attrs.field(default=None, kw_only=True, eq=False)
    """The provider that answered, by its name in telemetry, such as "anthropic"."""
    total_usage: Usage | None = attrs.field(default=None, kw_only=True, eq=False)
    """The tokens of all attempts of the call, as far as the services reported them: retries, rejected answers, `ask`s."""
    cost: Decimal | None = attrs.field(default=None, kw_only=True, eq=False)
    """The price of all attempts of the call in US dollars, if the stack has `Cost`. None: it is not known."""
    cache_hit: bool = attrs.field(default=False, kw_only=True, eq=False)
    """Whether the answer came from a cache."""
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
        return replaced(self, changes)

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
        for name in _COUNTS:
            counts: Any = getattr(self, name)
            if counts is not None:
                found[name] = {key: value for key, value in attrs.asdict(counts).items() if value is not None}
        if self.cost is not None:
            found["cost"] = str(self.cost)
        if self.cache_hit:
            found["cache_hit"] = True
        if self.alternatives:
            found["alternatives"] = [other.to_dict() for other in self.alternatives]
        if self.added:
            found["added"] = [message.to_dict() for message in self.added]
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


_BLANK = dict(vars(Response()))


@wraps(Response.__init__)
def _init_response(self: Response, text: str = "", **fields: Any) -> None:
    """Do as the method that attrs makes: a copied table and a few changes take a fifth of its time."""
    state = _BLANK.copy()
    state["text"] = text
    state["details"], state["rate_limits"] = {}, {}
    for name, value in fields.items():
        if name not in state:
            raise TypeError(f"a Response has no {name!r}; it has {', '.join(state)}")
        convert = _CONVERTERS.get(name)
        state[name] = value if convert is None else convert(value)
    _set_state(self, "__dict__", state)


Response.__init__ = _init_response  # type: ignore[method-assign]  # pyright: ignore[reportAttributeAccessIssue]
_WORDS = ("finish_reason", "raw_finish_reason", "model", "provider", "id", "request_id")
_COUNTS = {"usage": Usage, "total_usage": Usage, "stats": StreamStats}


def _dollars(amount: str | None, path: str) -> Decimal | None:
    from decimal import Decimal, InvalidOperation

    if amount is None:
        return None
    try:
        return Decimal(amount)
    except InvalidOperation:
        raise ValueError(f"{path}: expected a number in a string, got {amount!r}") from None


def _response(given: object, path: str) -> Response:
    from fluxibly._dicts import Reader, numbers, part_from_dict

    fields = Reader(given, path)
    text = fields.text("text", "")
    found: dict[str, Any] = {name: value for name in _WORDS if (value := fields.text(name)) is not None}
    for name in ("details", "rate_limits"):
        found[name] = fields.table(name) or {}
    for name, kind in _COUNTS.items():
        counts = fields.table(name)
        found[name] = None if counts is None else numbers(counts, kind, fields.at(name))
    found["elapsed"] = fields.take("elapsed", (int, float), "a number")
    found["cost"] = _dollars(fields.text("cost"), fields.at("cost"))
    found["cache_hit"] = fields.take("cache_hit", bool, "true or false") is True
    found["alternatives"] = [
        _response(other, f"{fields.at('alternatives')}[{number}]")
        for number, other in enumerate(fields.items("alternatives"))
    ]
    found["added"] = [Message.from_dict(message) for message in fields.items("added")]
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
    added: tuple[Message, ...] | None = attrs.field(default=None, kw_only=True)
    """A mark, after which a middleware may send again. With messages: what went out so far is a whole message, these
    were added after the request's (that message first), and a new message begins. Empty: the same message goes on."""
    request_id: str | None = attrs.field(default=None, kw_only=True, eq=False)
    rate_limits: Mapping[str, str] | None = attrs.field(default=None, kw_only=True, eq=False)
    details: Mapping[str, Any] | None = attrs.field(default=None, kw_only=True, eq=False)
    text_only: bool = attrs.field(init=False, eq=False, repr=False, default=True)
    """Whether the chunk contains only text, as most chunks do. Computed once, because several layers read it."""

    if not TYPE_CHECKING:
        # By hand, because a stream makes a chunk for every few characters: here `text_only` needs no call of a function.
        def __init__(
            self,
            text="",
            *,
            reasoning="",
            tool_calls=(),
            finish_reason=None,
            raw_finish_reason=None,
            usage=None,
            model=None,
            id=None,  # noqa: A002  # the field's name
            parts=(),
            alternatives=(),
            added=None,
            request_id=None,
            rate_limits=None,
            details=None,
        ):
            self.text = text
            self.reasoning = reasoning
            self.tool_calls = tool_calls
            self.finish_reason = finish_reason
            self.raw_finish_reason = raw_finish_reason
            self.usage = usage
            self.model = model
            self.id = id
            self.parts = parts
            self.alternatives = alternatives
            self.added = added
            self.request_id = request_id
            self.rate_limits = rate_limits
            self.details = details
            self.text_only = not (
                reasoning
                or tool_calls
                or finish_reason
                or raw_finish_reason
                or usage
                or id
                or model
                or parts
                or details
                or alternatives
                or request_id
                or rate_limits
                or added is not None
            )

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """Return the chunk as JSON values, without the fields that it does not set: `from_dict` makes the same chunk of them."""
        from fluxibly._dicts import part_to_dict, plain

        found: dict[str, Any] = {name: text for name in ("text", "reasoning") if (text := getattr(self, name))}
        if self.parts:
            found["parts"] = [part_to_dict(part) for part in self.parts]
        if self.tool_calls:
            found["tool_calls"] = [plain(_set_fields(delta), self) for delta in self.tool_calls]
        for name in (*_WORDS_OF_CHUNK, "rate_limits", "details"):
            value: Any = getattr(self, name)
            if value is not None:
                found[name] = plain(value, self)
        if self.usage is not None:
            found["usage"] = _set_fields(self.usage)
        if self.alternatives:
            found["alternatives"] = [[index, chunk.to_dict()] for index, chunk in self.alternatives]
        if self.added is not None:
            found["added"] = [message.to_dict() for message in self.added]
        return found

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Chunk:
        """Return the chunk of a mapping that `to_dict` made.

        Raises:
            ValueError: a field is unknown or of the wrong type. The error names its path.
        """
        return _chunk(fields, "a chunk")

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


_WORDS_OF_CHUNK = ("finish_reason", "raw_finish_reason", "model", "id", "request_id")


def _set_fields(value: object) -> dict[str, Any]:
    """Return the fields of an object of attrs that differ from their defaults."""
    kind: Any = type(value)
    fields = [(field.name, field.default) for field in attrs.fields(kind)]
    return {name: found for name, default in fields if (found := getattr(value, name)) != default}


def _chunk(given: object, path: str) -> Chunk:
    from fluxibly._dicts import Reader, numbers, part_from_dict

    fields = Reader(given, path)
    found: dict[str, Any] = {name: fields.text(name) for name in _WORDS_OF_CHUNK}
    found["rate_limits"], found["details"] = fields.table("rate_limits"), fields.table("details")
    usage = fields.table("usage")
    found["usage"] = None if usage is None else numbers(usage, Usage, fields.at("usage"))
    found["parts"] = tuple(
        [part_from_dict(part, f"{fields.at('parts')}[{n}]") for n, part in enumerate(fields.items("parts"))]
    )
    found["tool_calls"] = tuple(
        [_delta(delta, f"{fields.at('tool_calls')}[{n}]") for n, delta in enumerate(fields.items("tool_calls"))]
    )
    found["alternatives"] = tuple(
        [_alternative(pair, f"{fields.at('alternatives')}[{n}]") for n, pair in enumerate(fields.items("alternatives"))]
    )
    added = fields.take("added", list, "a list")
    found["added"] = None if added is None else tuple([Message.from_dict(message) for message in added])
    chunk = Chunk(fields.text("text", ""), reasoning=fields.text("reasoning", ""), **found)
    fields.done([field.name for field in attrs.fields(Chunk) if field.init])
    return chunk


def _delta(given: object, path: str) -> ToolCallDelta:
    from fluxibly._dicts import Reader

    fields = Reader(given, path)
    delta = ToolCallDelta(
        index=fields.take("index", int, "a whole number"),
        id=fields.text("id"),
        name=fields.text("name"),
        arguments=fields.text("arguments", ""),
        signature=fields.text("signature"),
        raw=fields.table("raw"),
    )
    fields.done([field.name for field in attrs.fields(ToolCallDelta)])
    return delta


def _alternative(pair: Any, path: str) -> tuple[int, Chunk]:
    if not is_list(pair) or len(pair) != 2 or not is_whole(pair[0]):
        raise ValueError(f"{path}: expected a pair of a number and a chunk, got {kind_of(pair)}")
    return pair[0], _chunk(pair[1], f"{path}[1]")


@attrs.frozen(repr=False, eq=False)
class Restart(Value):
    """An event: the answer begins again, and all chunks before it are void. Only `stream(…, restarts=True)` yields it.

    `reason` says why, without quoting content.
    """

    reason: str = ""
