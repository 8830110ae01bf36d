"""What flows are made of: the effects that travel outward to a driver, and the types of a middleware."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from typing import Any, Final, Protocol, TypeAlias, TypeVar, runtime_checkable

import attrs

from fluxibly.types import Chunk, Request, Response, Restart

T = TypeVar("T")


@attrs.define
class Send:
    """Call the provider. Outcome: its `Response` (or str), or in a stream a `Source` with its first chunk.

    A layer that the effect passes may replace `request` to add headers, and nothing else.
    """

    request: Request


@attrs.define
class Source:
    """Where the driver leaves a stream's next chunk (END after the last) before it resumes the flow."""

    chunk: object


@attrs.define
class More:
    """Deliver this chunk, and read none from the provider."""

    chunk: Chunk


@attrs.frozen
class Pull:
    """Read the next chunk from the provider, and deliver none."""


@attrs.define
class AttemptEnd:
    """An attempt is over: with its response or its error. Only for calls that are `watched`.

    An attempt that a BaseException ends has no such effect.
    """

    request: Request
    response: Response | None = None
    error: Exception | None = None


@attrs.define
class Sleep:
    """Wait."""

    seconds: float


@attrs.define
class Perform:
    """Do a middleware's own I/O. Outcome: what it returned."""

    call: Callable[[], object]
    acall: Callable[[], Awaitable[object]] | None


END: Final = object()
PULL: Final = Pull()

Effect: TypeAlias = Send | Chunk | More | Pull | Restart | AttemptEnd | Sleep | Perform
Flow: TypeAlias = Generator[Effect, Any, T]
"""What a middleware returns: a generator that yields effects and returns, in the end, a T."""
CallNext: TypeAlias = Callable[[Request], Flow[Response]]
"""The rest of the stack: `response = yield from call_next(request)`."""


@runtime_checkable
class Middleware(Protocol):
    """A generator function, or an object whose `__call__` is one."""

    def __call__(self, request: Request, call_next: CallNext, /) -> Flow[Response]: ...
