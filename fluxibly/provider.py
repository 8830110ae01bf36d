"""What a provider is: an object with one or two methods."""

from __future__ import annotations

import inspect
from typing import Protocol, runtime_checkable

from fluxibly.types import ProviderInfo, Request, Response


@runtime_checkable
class Provider(Protocol):
    """Answers requests. Only `complete` is needed::

        class Parrot:
            def complete(self, request: Request) -> str:
                return request.messages[-1].text

            def stream(self, request: Request) -> Iterator[str]:
                yield from request.messages[-1].text

    `complete` returns a `Response`, or a str for its text. `stream(request)`, if there is one, returns an iterator of
    `Chunk` or str; a generator's `finally`, or an iterator's own `close()`, releases what it holds. `close()`, if
    there is one, ends the provider. Raise `ProviderError("…", retryable=True)` for what may succeed if tried again;
    any other exception reaches the caller as it is.

    An attribute `info` (`ProviderInfo`), if there is one, says who this is in logs and traces.
    """

    def complete(self, request: Request, /) -> Response | str: ...


@runtime_checkable
class AsyncProvider(Protocol):
    """A `Provider` whose `complete` is a coroutine function, `stream` an async generator and `aclose` a coroutine."""

    async def complete(self, request: Request, /) -> Response | str: ...


def is_async(provider: object) -> bool:
    """Whether a provider is an `AsyncProvider`."""
    complete = getattr(provider, "complete", None)
    stream = getattr(provider, "stream", None)
    return inspect.iscoroutinefunction(complete) or inspect.isasyncgenfunction(stream)


def check(provider: object) -> None:
    """Raise a TypeError unless `provider` can be one."""
    if isinstance(provider, type):
        raise TypeError(f"a provider is an object; {provider.__name__} is a class: write {provider.__name__}()")
    if not callable(getattr(provider, "complete", None)):
        raise TypeError(f"a provider has a method complete(request), which {type(provider).__name__} lacks")


def info_of(provider: object, framework: str | None) -> ProviderInfo:
    """Who a provider is: its own `info` if it has one, named after its class and framework."""
    info = getattr(provider, "info", None)
    if isinstance(info, ProviderInfo):
        return info
    name = type(provider).__name__
    return ProviderInfo(name=name, framework=framework or "custom", telemetry_name=framework or name)


def no_stream(provider: object) -> NotImplementedError:
    """The error for a provider without `stream`."""
    return NotImplementedError(
        f"the provider {type(provider).__name__} has no stream(); use forward() or complete(), or give it a method "
        "stream(request) that yields Chunk or str"
    )
