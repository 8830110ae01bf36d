"""The effects that travel outward to a driver, and the types of a middleware."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextvars import Context
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, TypeVar, runtime_checkable

from fluxibly._values import Slotted
from fluxibly.calls import CallRecord, Perform as Perform
from fluxibly.types import Chunk, Request, Response, Restart

if TYPE_CHECKING:
    from fluxibly.limits import Leash  # late at run time, because few calls have limits

T = TypeVar("T")


class Send(Slotted):
    """Call the provider. Outcome: its `Response` (or str), or in a stream a `Source` with the first chunk."""

    __slots__ = ("lane", "request", "sent")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.lane: Lane | None = None
        """The lane in which the provider is called. The outcome then is None, at once."""
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


class Awaited(Protocol):
    """A signal that a `Sleep` may wait for: a `fluxibly.Signal`."""

    @property
    def is_set(self) -> bool: ...
    def wait(self, seconds: float | None = None, /) -> bool: ...
    async def await_(self, seconds: float | None = None, /) -> bool: ...
    def attach(self, wake: Callable[[], object], /) -> None: ...
    def detach(self, wake: Callable[[], object], /) -> None: ...


class Sleep(Slotted):
    """Wait, at most until a signal is set. Outcome: whether it is."""

    __slots__ = ("seconds", "until", "within")

    def __init__(self, seconds: float, until: Awaited | None = None) -> None:
        self.seconds = seconds
        self.until = until
        self.within: CallRecord | None = None
        """The record whose limits apply; None for the record of the whole call."""


END: Final = object()
PULL: Final = Pull()


class Lane:
    """The place where the effects of one branch are carried out, one at a time, while other branches go on.

    It is plain state. A driver carries out the effects in a thread or a task, and leaves here what became of them.
    """

    __slots__ = (
        "busy",
        "call",
        "cleaning",
        "context",
        "done",
        "dropped",
        "error",
        "flow",
        "iterator",
        "leash",
        "outcome",
        "owns",
        "performing",
        "returned",
        "signal",
        "source",
        "task",
        "until",
        "waits",
        "wake",
    )

    def __init__(self, flow: Flow[Any], context: Context, call: CallRecord, *, owns: bool) -> None:
        self.flow = flow
        """The flow of the branch."""
        self.call = call
        """The record of the branch."""
        self.owns = owns
        """Whether that record is the branch's own, so that its cleanups run when the branch ends."""
        self.context = context
        """The context in which that flow runs. Each effect is carried out in a copy of it."""
        self.leash: Leash | None = None
        """The leash of the last request, whose `stop` ends the call of the provider."""
        self.done = False
        """Whether there is an outcome or an error."""
        self.outcome: object = None
        self.error: BaseException | None = None
        self.source = Source(END)
        self.iterator: Any = None
        """The stream of the provider, if one is open. It is read and closed in a context of its own."""
        self.busy = False
        """Whether a thread or a task is at work."""
        self.performing: CallRecord | None = None
        """If that work is a middleware's own I/O, the record that it belongs to."""
        self.cleaning = False
        """Whether that I/O is a cleanup, which nothing cuts off."""
        self.waits: Wait | None = None
        """The wait for other lanes under way, if there is one."""
        self.until: float | None = None
        """When the wait or sleep under way ends at the latest, in seconds of the driver's time."""
        self.signal: Awaited | None = None
        """The signal that ends the sleep under way, and the function that it calls then."""
        self.wake: Callable[[], object] | None = None
        self.dropped = False
        """Whether the lane has been given up, or its stream taken over."""
        self.task: Any = None
        """The task at work, or its cancel scope."""
        self.returned: Any = None
        """An event for the end of such I/O in a thread, if the lane was dropped meanwhile."""


class Start(Slotted):
    """Begin an effect in a lane. Outcome: None, at once."""

    __slots__ = ("effect", "lane")

    def __init__(self, lane: Lane, effect: Pull | Sleep | Perform | Wait | Release) -> None:
        self.lane = lane
        self.effect = effect


class Wait(Slotted):
    """Wait until one of the lanes is done. Outcome: that lane, or None if the seconds pass first."""

    __slots__ = ("lanes", "seconds")

    def __init__(self, lanes: Sequence[Lane], seconds: float | None = None) -> None:
        self.lanes = lanes
        self.seconds = seconds


class Drop(Slotted):
    """Give up what is under way in these lanes, release what they hold, close their flows, and run their cleanups."""

    __slots__ = ("lanes",)

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self.lanes = lanes


class Adopt(Slotted):
    """Make the stream of a lane that of the call, or that of another lane."""

    __slots__ = ("into", "lane")

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.into: Lane | None = None


LaneEffect: TypeAlias = Start | Wait | Drop | Adopt
Effect: TypeAlias = Send | Chunk | More | Pull | Restart | Release | AskEnd | Sleep | Perform | LaneEffect
Flow: TypeAlias = Generator[Effect, Any, T]
"""The result of calling a middleware: a generator that yields effects and, at its end, returns a T."""
CallNext: TypeAlias = Callable[[Request], Flow[Response]]
"""The rest of the stack: `response = yield from call_next(request)`."""


@runtime_checkable
class Middleware(Protocol):
    """A generator function, or an object whose `__call__` is one."""

    def __call__(self, request: Request, call_next: CallNext, /) -> Flow[Response]: ...
