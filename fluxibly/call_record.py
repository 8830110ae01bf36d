"""The memory of one call, and who answers it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from fluxibly.messages import Message
    from fluxibly.types import StreamStats, Usage


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
    asked_at: float
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
    asked_model: str | None
    """The model that the last attempt asked for. A provider that turned to another by itself says so here."""
    asked_messages: tuple[Message, ...]
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
        self.started_at = self.asked_at = 0.0
        self.sent_at = self.first_chunk_at = None
        self.delivered = []
        self.attempts = 0
        self.trace_headers = None
        self.asked_messages = ()
        self.asked_model = self.model = None
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
