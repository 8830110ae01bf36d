"""The effects that travel outward to a driver, and the types of a middleware."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from typing import Any, Final, Protocol, TypeAlias, TypeVar, runtime_checkable

from fluxibly.types import Chunk, Request, Response, Restart

T = TypeVar("T")


# Effects are plain classes: attrs would compile their methods at each import, which costs as much as the rest of `flow`.


class _Effect:
    """Effects are equal if their fields are."""

    __slots__: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    __hash__ = None  # type: ignore[assignment]  # an effect can change

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.__slots__)})"


class Send(_Effect):
    """Call the provider. Outcome: its `Response` (or str), or in a stream a `Source` with the first chunk.

    A layer that the effect passes may replace `request` to add headers, and nothing else.
    """

    __slots__ = ("request",)

    def __init__(self, request: Request) -> None:
        self.request = request


class Source(_Effect):
    """The place where the driver leaves a stream's next chunk (END after the last) before it resumes the flow."""

    __slots__ = ("chunk",)

    def __init__(self, chunk: object) -> None:
        self.chunk = chunk


class More(_Effect):
    """Deliver this chunk, and read none from the provider."""

    __slots__ = ("chunk",)

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk


class Pull(_Effect):
    """Read the next chunk from the provider, and deliver none."""

    __slots__ = ()


class AttemptEnd(_Effect):
    """Announce the end of an attempt, with its response or its error. Only calls that are `watched` have it.

    An attempt that a BaseException ends has no such effect.
    """

    __slots__ = ("error", "request", "response")

    def __init__(self, request: Request, response: Response | None = None, error: Exception | None = None) -> None:
        self.request = request
        self.response = response
        self.error = error


class Sleep(_Effect):
    """Wait."""

    __slots__ = ("seconds",)

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


class Perform(_Effect):
    """Do a middleware's own I/O. Outcome: the value that it returned."""

    __slots__ = ("acall", "call")

    def __init__(self, call: Callable[[], object] | None, acall: Callable[[], Awaitable[object]] | None) -> None:
        self.call = call
        self.acall = acall


END: Final = object()
PULL: Final = Pull()

Effect: TypeAlias = Send | Chunk | More | Pull | Restart | AttemptEnd | Sleep | Perform
Flow: TypeAlias = Generator[Effect, Any, T]
"""The result of calling a middleware: a generator that yields effects and, at its end, returns a T."""
CallNext: TypeAlias = Callable[[Request], Flow[Response]]
"""The rest of the stack: `response = yield from call_next(request)`."""


@runtime_checkable
class Middleware(Protocol):
    """A generator function, or an object whose `__call__` is one."""

    def __call__(self, request: Request, call_next: CallNext, /) -> Flow[Response]: ...
