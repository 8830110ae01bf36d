"""The memory of one call, and who answers it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import attrs

if TYPE_CHECKING:
    from fluxibly.messages import Message
    from fluxibly.types import StreamStats, Usage

_T = TypeVar("_T")


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


class _Made(Generic[_T]):
    """An attribute that is made when it is first asked for. (`functools.cached_property` takes a lock for that.)"""

    def __init__(self, make: Callable[[], _T]) -> None:
        self.make = make

    def __set_name__(self, _: type, name: str) -> None:
        self.name = name

    def __get__(self, record: object, _: type | None = None) -> _T:
        value = self.make()
        setattr(record, self.name, value)
        return value


class CallRecord:
    """The memory of one call, shared by all its layers and attempts: what must survive a failure is written here.

    Times are of `clock`, in seconds. It is a plain class with its defaults on the class, because one is made a call.
    """

    provider: ProviderInfo = ProviderInfo()
    streaming: bool = False
    restarts: bool = False
    """Whether the consumer takes `Restart` events."""
    clock: Callable[[], float] = staticmethod(perf_counter)
    started_at: float = 0.0
    """When the call began."""
    sent_at: float | None = None
    """When the first attempt went out, of a stream."""
    asked_at: float = 0.0
    """When the consumer asked for the chunk that is on its way; kept while `timed`."""
    timed: bool = False
    first_chunk_at: float | None = None
    """When the first chunk was delivered."""
    attempts: int = 0
    watched: bool = False
    """Whether a layer wants the effect that ends each attempt; it costs a trip through all the layers."""
    trace_headers: Mapping[str, str] | None = None
    """What tells the trace to the service, where it is the same for all attempts: `send` adds it to their requests."""
    asked_model: str | None = None
    """The model that the last attempt asked for."""
    asked_messages: tuple[Message, ...] = ()
    """What the last attempt sent: middleware may have added to it. Error messages are masked with it."""
    model: str | None = None
    """The model that answered, as the last attempt's response named it."""
    usage: Usage | None = None
    """Of the last attempt; of one that was cut off or given up, as far as the service had told."""
    stats: StreamStats | None = None
    cache_hit: bool = False
    """Set by a middleware that answers from a cache."""
    attempt_times: list[float] | None = None
    """Seconds of each attempt, where `Timing` asked for them."""

    delivered = _Made(list[str])
    """The texts of the chunks that the consumer got, since the last `Restart`."""
    timings = _Made(dict[str, float])
    """Seconds, by what was timed (see `Timing`)."""
    notes = _Made(dict[str, Any])
    """What middleware keep for themselves, each under a key of its own."""

    @property
    def chunks(self) -> int:
        """How many chunks the consumer got, since the last `Restart`."""
        return len(self.delivered)

    @property
    def characters(self) -> int:
        """How many characters of text the consumer got, since the last `Restart`."""
        return sum(map(len, self.delivered))
