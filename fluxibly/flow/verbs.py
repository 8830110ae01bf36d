"""The verbs of middleware that ask for a wait or for I/O: `sleep` and `perform`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE, CO_GENERATOR, isawaitable
from types import AsyncGeneratorType, CodeType, CoroutineType, GeneratorType, MethodType
from typing import Any

from fluxibly._checks import is_number, kind_of, number
from fluxibly.flow.compose import code_of
from fluxibly.flow.effects import Flow, Perform, Sleep, T

HOW_TO_PERFORM = (
    "write perform(call, acall): the sync function first, the async one second; in a program without sync calls, "
    "perform(None, acall)"
)
_LAZY = CO_COROUTINE | CO_GENERATOR | CO_ASYNC_GENERATOR
_UNFINISHED = (CoroutineType, GeneratorType, AsyncGeneratorType)


def sleep(seconds: float) -> Flow[None]:
    """Wait for a number of seconds: `yield from sleep(0.5)`. An async pipeline lets other tasks run meanwhile."""
    check_seconds(seconds)
    yield Sleep(seconds)


def check_seconds(seconds: object) -> None:
    """Check the length of a sleep, because the clocks of the modes would each treat a wrong length differently.

    Raises:
        TypeError: `seconds` is not a number.
        ValueError: `seconds` is negative, infinite or NaN.
    """
    found = number("sleep", seconds, 0, unit="seconds")
    if found is not None:
        discard(seconds)
        raise (ValueError if is_number(seconds) else TypeError)(found)


def perform(call: Callable[[], T] | None, acall: Callable[[], Awaitable[T]] | None = None) -> Flow[T]:
    """Do your own I/O: `value = yield from perform(read, aread)`.

    A sync pipeline runs `call()`. An async pipeline awaits `acall()`, or without `acall` runs `call()` in a worker
    thread. Errors are raised here. A middleware for async pipelines alone may pass None as `call`.

    Raises:
        TypeError: `call` returns a coroutine, or `acall` does not; or `call` is None in a sync pipeline.
    """
    for function in (call, acall):
        if _is_unfinished(function) or call is acall is None:
            discard(function)
            raise TypeError(f"perform: expected a function, got {kind_of(function)}; {HOW_TO_PERFORM}")
    # A driver sees only the function that it runs, and a mistake has to show in every mode.
    if (kind := _lazy_kind(call)) is not None:
        raise TypeError(
            f"perform: expected a sync function first, got the {kind} function {_name(call)}; {HOW_TO_PERFORM}"
        )
    result: T = yield Perform(call, acall)
    return result


def run(effect: Perform) -> object:
    """Run the sync function of a `perform`, and return its value."""
    if effect.call is None:
        raise TypeError(
            f"perform: expected a sync function for a sync pipeline, got only the async {_name(effect.acall)}; "
            "write perform(call, acall), or use an async pipeline"
        )
    return _value(effect.call(), effect.call)


async def await_(acall: Callable[[], Awaitable[object]]) -> object:
    """Await the async function of a `perform`, and return its value."""
    waited = acall()
    if not isawaitable(waited):
        discard(waited)
        raise TypeError(
            f"perform: expected an async function second, got {_name(acall)}, which returned {kind_of(waited)}; "
            f"{HOW_TO_PERFORM}"
        )
    return _value(await waited, acall)


def _value(result: object, function: object) -> object:
    """Return the result of a function. A coroutine is none, and a guard would take it for true."""
    if not _is_unfinished(result):
        return result
    discard(result)
    raise TypeError(
        f"perform: expected a function that returns a value, got {_name(function)}, which returned "
        f"{kind_of(result)}; {HOW_TO_PERFORM}"
    )


def _is_unfinished(value: object) -> bool:
    return isinstance(value, _UNFINISHED) or hasattr(type(value), "__await__")


def _lazy_kind(function: Any) -> str | None:
    """Return the kind of a function whose call only makes a coroutine or a generator, or None for other functions."""
    while isinstance(function, (partial, MethodType)):
        function = function.func if isinstance(function, partial) else function.__func__
    code = getattr(function, "__code__", None) or code_of(function)
    flags = code.co_flags if isinstance(code, CodeType) else 0
    if not flags & _LAZY:
        return None
    return "async" if flags & CO_COROUTINE else "generator" if flags & CO_GENERATOR else "async generator"


def _name(function: Any) -> str:
    while isinstance(function, partial):
        function = function.func
    name = getattr(function, "__qualname__", None)
    return name if isinstance(name, str) else type(function).__qualname__


def discard(value: object) -> None:
    """Close a coroutine that nobody will await, because Python would warn of it."""
    if isinstance(value, (CoroutineType, GeneratorType)):
        value.close()
