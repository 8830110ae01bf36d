"""The facts of a call while it goes on: its provider, its limits, its measurements, and the record that holds them.

`CallRecord` is mutable, the memory that all layers of a call share. The other classes are immutable.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from inspect import iscoroutinefunction
from time import perf_counter, time_ns
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import ref

import attrs

from fluxibly._checks import kind_of
from fluxibly._values import Slotted, Value

if TYPE_CHECKING:
    from decimal import Decimal

    from fluxibly.limits import Leash, Timeouts
    from fluxibly.messages import Message


class Prefill(NamedTuple):
    """How a service goes on with an assistant's message that ends a request, where others begin another message."""

    models: str = ""
    """The models that do so: a regular expression, which is searched for in their names."""
    body: Mapping[str, Any] | None = None
    """The fields with which the request has to ask for it (`Request.extra`)."""
    echoes: bool = False
    """Whether the answer repeats the message."""


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
    identity: str = attrs.field(default="", eq=False, repr=False)
    """Everything in the configuration that an answer may depend on, for the keys of caches; by default `key`. No secrets."""
    prefill: Prefill | None = attrs.field(default=None, eq=False, repr=False)
    """How the service goes on with an assistant's message that ends a request. None: it does not, or that is not known."""
    key: str = attrs.field(init=False, eq=False, repr=False)
    """The provider and its server, such as "openai@api.openai.com:443", for state that is kept for each provider."""

    def __attrs_post_init__(self) -> None:
        who = self.name if self.framework == "custom" else self.framework
        server = "" if self.server_address is None else f"@{self.server_address}:{self.server_port}"
        object.__setattr__(self, "key", who + server)
        if not self.identity:
            object.__setattr__(self, "identity", self.key)


UNKNOWN = ProviderInfo()


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

    @classmethod
    def sum(cls, usages: Iterable[Usage | None]) -> Usage | None:
        """Return the sum of the usages that are known, or None if none is. A count that no usage has is None."""
        known = [usage for usage in usages if usage is not None]
        if len(known) < 2:
            return known[0] if known else None
        sums: dict[str, int] = {}
        for usage in known:
            for field in attrs.fields(cls):
                count: int | None = getattr(usage, field.name)
                if count is not None:
                    sums[field.name] = sums.get(field.name, 0) + count
        return cls(**sums)


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


class Spent(NamedTuple):
    """The tokens of one attempt that was sent, whatever became of it. `usage` is None if the service did not say."""

    provider: ProviderInfo
    model: str
    """The model that was asked for."""
    usage: Usage | None
    answered: str | None = None
    """The model that answered, as its response names it."""
    refused: bool = False
    """Whether the service refused the request with an HTTP status, so that nothing was spent."""
    guess: Usage | None = None
    """The tokens that count for a budget where the service did not report all. Only calls with a budget have it."""


class Decision(NamedTuple):
    """Something that a middleware has decided about a call, for its trace."""

    middleware: str
    what: str
    """The decision and its reason, without any content of the call."""
    at: int
    """Nanoseconds since the epoch."""


class Targets(Protocol):
    """The providers of a pipeline: its own, for the target None, and those of the targets that requests name."""

    def is_made(self, target: object, /) -> bool:
        """Whether the provider of a target exists already."""
        ...

    def info_of(self, target: object, /) -> ProviderInfo:
        """Return the description of a target's provider, which is made if it does not exist."""
        ...


class _NoTargets:
    """The targets of a request that is not in a pipeline."""

    def is_made(self, _: object, /) -> bool:
        return True

    def info_of(self, _: object, /) -> ProviderInfo:
        return UNKNOWN


_NO_TARGETS = _NoTargets()


class Perform(Slotted):
    """The effect "do a middleware's own I/O". Outcome: the value that it returned.

    It stands here, and not with the other effects, because `Ending.run` yields it.
    """

    __slots__ = ("acall", "call", "within")

    def __init__(
        self,
        call: Callable[[], object] | None,
        acall: Callable[[], Awaitable[object]] | None,
        within: CallRecord | None = None,
    ) -> None:
        self.call = call
        self.acall = acall
        self.within = within
        """The record whose limits apply; None for the record of the whole call."""


class Cleanup(Perform):
    """The effect "do a cleanup". Neither a deadline nor a cancellation cuts it off."""

    __slots__ = ()


class Ending:
    """A cleanup that `CallRecord.on_end` registered. It runs once at most."""

    def __init__(self, record: CallRecord, call: Callable[[], object], acall: Callable[[], Awaitable[object]] | None):
        self.effect = Cleanup(call, acall)
        self.record = record

    def withdraw(self) -> None:
        """Forget the cleanup, so that it does not run."""
        self._take()

    def _take(self) -> bool:
        """Take the cleanup out of its record. Return False if it has run, or is running."""
        endings = self.record.endings
        if endings is None or self not in endings:
            return False
        endings.remove(self)
        return True

    def run(self) -> Generator[Perform, Any, None]:
        """Do the cleanup now, unless it has run: `yield from ending.run()`. Its error is raised here.

        In an async pipeline neither a deadline nor a cancellation cuts it off, but it too gets five seconds.
        """
        if self._take():
            yield self.effect


_DECISIONS = "fluxibly.decisions"


class CallRecord:
    """The memory of a call, shared by all its layers and attempts. It keeps the facts that must survive a failure.

    Times are readings of `clock`, in seconds.
    """

    provider: ProviderInfo
    """The provider that the last attempt asked, or that the next will ask."""
    target: object
    """The target that the last attempt asked; None is the pipeline's own provider."""
    targets: Targets
    layers: tuple[Any, ...]
    """The middleware of the pipeline, outermost first."""
    streaming: bool
    restarts: bool
    """Whether the consumer takes `Restart` events."""
    nested: bool
    """Whether this is the record of an `ask`: a call within a call, which is whole, and passes outer layers."""
    observed: bool
    """Whether a layer follows the attempts of this call (`Request.observers`)."""
    apart: bool
    """Whether this is the record of a branch of a race, which runs beside others."""
    aliases: tuple[ref[CallRecord], ...]
    """The records of branches that have won, which are the same as this one."""
    lanes: Any
    """The driver's lanes for the branches under way; None before the first."""
    leash: Leash | None
    """The limits that middleware have set; None nearly always."""
    timeouts: Timeouts | None
    """The time limits of this call, in place of those of the configuration. None: it has none of its own."""
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
    """The number of requests that were sent, without those of an `ask`."""
    sending: Any
    """The request of the attempt under way, or None."""
    spent: list[Spent]
    """The tokens of each attempt that was sent, in the order in which they ended, those of an `ask` included."""
    when_spent: list[Callable[[CallRecord], object]] | None
    """The functions to call after each addition to `spent`. None: the call has no budget."""
    claim: Claim | None
    """Keeps other instrumentations from measuring an attempt that is measured already."""
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
    last_error: Exception | None
    """The error of the last attempt of a call that has a leash, for the cause of `DeadlineExceeded`, until the call ends."""
    interruption: Exception | None
    """The `StreamInterrupted` that ended the last attempt, until the stream ends."""
    continued: bool
    """Whether an empty mark has continued an answer, of which each attempt knows only its part."""
    said: str | None
    """The text of the last attempt's answer, if it was streamed to its end."""
    stats: StreamStats | None
    cache_hit: bool
    """Whether the last answer came from a cache. Set by the middleware that has the cache."""
    cost: Decimal | None
    """The price of all attempts in US dollars, once `Cost` has found it. None: it is not known."""
    costs: Mapping[tuple[ProviderInfo, str], Decimal]
    """The parts of `cost`, by provider and model."""
    attempt_times: list[float] | None
    """The duration of each attempt in seconds, if `Timing` asked for it."""
    timings: dict[str, float]
    """Durations in seconds, by name (see `Timing`)."""
    notes: dict[str, Any]
    """The private data of middleware, each under its own key."""
    endings: list[Ending] | None
    """The cleanups that `on_end` registered, in the order of registration; None before the first."""
    unfinished: list[Callable[[], object]] | None
    """Functions that wait until what a given up `perform` does in another thread has returned."""

    def __init__(self) -> None:
        # A copied table takes a third of the time that setting each attribute would take.
        state = _BLANK.copy()
        state["delivered"] = []
        state["timings"] = {}
        state["notes"] = {}
        state["spent"] = []
        self.__dict__ = state

    @property
    def chunks(self) -> int:
        """The number of chunks that the consumer has received since the last `Restart`."""
        return len(self.delivered)

    @property
    def characters(self) -> int:
        """The number of characters of text that the consumer has received since the last `Restart`."""
        return sum(map(len, self.delivered))

    def info_of(self, target: object) -> ProviderInfo:
        """Return the description of the provider that a target stands for. None is the pipeline's own."""
        return self.targets.info_of(target)

    def decide(self, middleware: str, what: str) -> None:
        """Note what a middleware has decided about this call, and why. Its trace shows it.

        Args:
            middleware: the name of its class.
            what: the decision and its reason, such as "asks gpt-4o-mini after RateLimitError". It quotes no content.
        """
        self.notes.setdefault(_DECISIONS, []).append(Decision(middleware, what, time_ns()))

    @property
    def decisions(self) -> Sequence[Decision]:
        """The decisions of middleware about this call, in order. Branches and `ask`s have those of their call."""
        decisions: Sequence[Decision] = self.notes.get(_DECISIONS, ())
        return decisions

    def fork(self) -> CallRecord:
        """Return the record of a whole call within this call.

        It shares what is collected (`spent`, `notes`, `timings`), and has its own of what an attempt overwrites.
        """
        fork = self._copy()
        fork.nested = True
        fork.apart = fork.streaming = fork.restarts = fork.timed = fork.cache_hit = fork.continued = False
        fork.cost = None
        fork.started_at = fork.requested_at = self.clock()
        fork.sent_at = fork.first_chunk_at = fork.sending = None
        fork.delivered = []
        fork.attempts = 0
        fork.sent_messages = ()
        fork.sent_model = fork.model = None
        fork.usage = fork.finish_reason = fork.stats = fork.interruption = fork.said = None
        fork.attempt_times = fork.last_error = None
        fork.endings = fork.unfinished = None
        return fork

    def branch(self, leash: Leash) -> CallRecord:
        """Return the record of a branch of a race. `leash` has the limits of the call, and ends this branch alone."""
        branch = self._copy()
        branch.apart = True
        branch.leash = leash
        branch.attempts = 0
        branch.sent_at = branch.sending = branch.interruption = branch.said = None
        branch.endings = branch.unfinished = None
        return branch

    def join(self, branch: CallRecord) -> None:
        """Take over what has become of a branch. From now on, its record and this one are the same."""
        own = {name: self.__dict__[name] for name in _NOT_JOINED}
        # A branch that has won may itself have been the call of a race within, whose winner is the same record, too.
        same = [record for alias in branch.aliases if (record := alias()) is not None]
        self.__dict__.update(branch.__dict__)
        self.__dict__.update(own)
        self.take_endings(branch)
        self.aliases = (*self.aliases, ref(branch), *branch.aliases)
        for record in (branch, *same):
            record.__dict__ = self.__dict__

    def take_endings(self, other: CallRecord) -> None:
        """Take over the cleanups of another record, whose flow ends with this one's."""
        unfinished, other.unfinished = other.unfinished, None
        if unfinished:
            self.unfinished = [*(self.unfinished or ()), *unfinished]
        endings, other.endings = other.endings, None
        for ending in endings or ():
            ending.record = self
            self.endings = [*(self.endings or ()), ending]

    def _copy(self) -> CallRecord:
        copy = object.__new__(CallRecord)
        copy.__dict__.update(self.__dict__)
        copy.lanes, copy.aliases = None, ()
        return copy

    def on_end(self, call: Callable[[], object], acall: Callable[[], Awaitable[object]] | None = None) -> Ending:
        """Register a cleanup that may do I/O. It runs once this record's flow has ended, whatever the outcome.

        A middleware cannot yield after a cancellation, nor when its consumer has left; a cleanup runs all the same::

            slot = slots.slot()
            ending = request.call.on_end(slot.give, slot.agive)
            yield from perform(slot.take, slot.atake)
            response = yield from call_next(request)
            yield from ending.run()

        Register it before what it undoes, because a call can end while `perform` is at work. A cleanup has to know whether
        there is something to undo. It runs after what `perform` does in another thread has returned; if that takes time,
        the caller does not wait for it.

        The cleanup that was registered last runs first. A sync pipeline runs `call()` in a thread. An async pipeline awaits
        `acall()` in a task of its own, which no cancellation of the call reaches, or without `acall` runs `call()` in a
        worker thread. `call()` also stands in for `acall()` where the event loop has ended, and after a KeyboardInterrupt,
        when the caller does not wait. An error of a cleanup is reported on stderr, and changes nothing.

        All cleanups of a record get five seconds together. Then the caller goes on: a `call()` runs on unseen, an
        `acall()` is cancelled, and the cleanups that have not begun run by `call()`.

        Raises:
            TypeError: `call` is not a sync function, or `acall` is not a function.
        """
        if not callable(call) or iscoroutinefunction(call):
            got = "an async function" if iscoroutinefunction(call) else kind_of(call)
            raise TypeError(f"on_end: expected a sync function first, got {got}; write on_end(call, acall)")
        if acall is not None and not callable(acall):  # pyright: ignore[reportUnnecessaryComparison]  # callers may be untyped
            raise TypeError(
                f"on_end: expected an async function second, got {kind_of(acall)}; write on_end(call, acall)"
            )
        ending = Ending(self, call, acall)
        if self.endings is None:
            self.endings = []
        self.endings.append(ending)
        return ending


_BLANK: dict[str, Any] = {
    "provider": UNKNOWN,
    "target": None,
    "targets": _NO_TARGETS,
    "layers": (),
    "aliases": (),
    **dict.fromkeys(("streaming", "restarts", "nested", "observed", "apart", "timed", "cache_hit", "continued"), False),
    "clock": perf_counter,
    "started_at": 0.0,
    "requested_at": 0.0,
    "attempts": 0,
    "sent_messages": (),
    **dict.fromkeys(("leash", "lanes", "timeouts", "sent_at", "first_chunk_at", "sending", "claim", "sent_model")),
    "costs": {},
    **dict.fromkeys(("model", "usage", "finish_reason", "last_error", "interruption", "said", "stats", "cost")),
    "when_spent": None,
    **dict.fromkeys(("attempt_times", "endings", "unfinished", "delivered", "timings", "notes", "spent")),
}
"""The attributes of a new record. `CallRecord.__init__` makes the collections, which are each record's own."""
_NOT_JOINED = ("apart", "aliases", "attempts", "sent_at", "lanes", "endings", "unfinished")
"""The attributes that stay those of the call when a branch has won."""


class Claim(Protocol):
    """A mark in the context of an attempt, by which other instrumentations know that the attempt is measured."""

    def enter(self) -> object:
        """Set the mark. Return a token for `leave`."""
        ...

    def leave(self, token: object, /) -> None:
        """Remove the mark."""
        ...

    def suspend(self) -> object:
        """Remove the mark while a middleware does its own I/O. Return a token for `leave`."""
        ...
