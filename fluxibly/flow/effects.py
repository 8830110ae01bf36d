"""The effects that travel outward to a driver, and the types of a middleware."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Final, Protocol, TypeAlias, TypeVar, runtime_checkable

from fluxibly._values import Slotted
from fluxibly.calls import CallRecord, Perform as Perform
from fluxibly.types import Chunk, Request, Response, Restart

T = TypeVar("T")


class Send(Slotted):
    """Call the provider. Outcome: its `Response` (or str), or in a stream a `Source` with the first chunk."""

    __slots__ = ("request", "sent")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.sent = False
        """Whether the driver has called the provider. A stream that is closed unread, for example, sends nothing."""


class Source(Slotted):
    """The place where the driver leaves a stream's next chunk (END after the last) before it resumes the flow."""

    __slots__ = ("chunk",)

    def __init__(self, chunk: object) -> None:
        self.chunk = chunk


class More(Slotted):
    """Deliver this chunk, and read none from the provider."""

    __slots__ = ("chunk",)

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk


class Pull(Slotted):
    """Read the next chunk from the provider, and deliver none."""

    __slots__ = ()


class Release(Slotted):
    """Release the provider's stream of an attempt that has failed, or that a layer has broken off."""

    __slots__ = ("broken_off", "request")

    def __init__(self, request: Request, *, broken_off: bool = False) -> None:
        self.request = request
        self.broken_off = broken_off


class AskEnd(Slotted):
    """Run the cleanups of the record of an `ask` that has ended. An `ask` without cleanups has no such effect."""

    __slots__ = ("request",)

    def __init__(self, request: Request) -> None:
        self.request = request


class Sleep(Slotted):
    """Wait."""

    __slots__ = ("seconds", "within")

    def __init__(self, seconds: float, within: CallRecord | None = None) -> None:
        self.seconds = seconds
        self.within = within
        """The record whose limits apply; None for the record of the whole call."""


END: Final = object()
PULL: Final = Pull()

Effect: TypeAlias = Send | Chunk | More | Pull | Restart | Release | AskEnd | Sleep | Perform
Flow: TypeAlias = Generator[Effect, Any, T]
"""The result of calling a middleware: a generator that yields effects and, at its end, returns a T."""
CallNext: TypeAlias = Callable[[Request], Flow[Response]]
"""The rest of the stack: `response = yield from call_next(request)`."""


@runtime_checkable
class Middleware(Protocol):
    """A generator function, or an object whose `__call__` is one."""

    def __call__(self, request: Request, call_next: CallNext, /) -> Flow[Response]: ...
