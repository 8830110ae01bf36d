"""The verbs of middleware: `sleep`, `perform`, `emit` and `ask`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE, CO_GENERATOR, isawaitable
from types import AsyncGeneratorType, CodeType, CoroutineType, GeneratorType, MethodType
from typing import Any

import attrs

from fluxibly._checks import is_number, kind_of, number
from fluxibly.calls import CallRecord, Usage
from fluxibly.flow.compose import code_of, compose, to_response
from fluxibly.flow.effects import AskEnd, Awaited, Effect, Flow, Middleware, More, Perform, Sleep, T
from fluxibly.flow.relay import Relay, Seen
from fluxibly.types import Adapts, AskObserver, Chunk, Message, Request, Response, observed_by, observers_of, replaced

HOW_TO_PERFORM = (
    "write perform(call, acall): the sync function first, the async one second; in a program without sync calls, "
    "perform(None, acall)"
)
_LAZY = CO_COROUTINE | CO_GENERATOR | CO_ASYNC_GENERATOR
_UNFINISHED = (CoroutineType, GeneratorType, AsyncGeneratorType)


def sleep(seconds: float, *, until: Awaited | None = None) -> Flow[bool]:
    """Wait for a number of seconds: `yield from sleep(0.5)`. An async pipeline lets other tasks run meanwhile.

    Args:
        seconds: the length of the wait.
        until: a `Signal` that ends the wait when it is set.

    Returns:
        Whether that signal is set.
    """
    check_seconds(seconds)
    woken: bool | None = yield Sleep(seconds, until)
    return bool(woken)


def check_seconds(seconds: object, name: str = "sleep") -> None:
    """Check a length of time, because the clocks of the modes would each treat a wrong length differently.

    Raises:
        TypeError: `seconds` is not a number.
        ValueError: `seconds` is negative, infinite or NaN.
    """
    found = number(name, seconds, 0, unit="seconds")
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
        if is_unfinished(function) or call is acall is None:
            discard(function)
            raise TypeError(f"perform: expected a function, got {kind_of(function)}; {HOW_TO_PERFORM}")
    # A driver sees only the function that it runs, and a mistake has to show in every mode.
    if (kind := _lazy_kind(call)) is not None:
        raise TypeError(
            f"perform: expected a sync function first, got the {kind} function {_name(call)}; {HOW_TO_PERFORM}"
        )
    result: T = yield Perform(call, acall)
    return result


def emit(chunk: Chunk) -> Flow[None]:
    """Let out a chunk of your own: `yield from emit(Chunk("…"))`. In a call that is not streamed it goes nowhere.

    Its text belongs to the answer, so the response that the middleware returns has to have it too.

    A chunk with `added` is a mark, after which a middleware may ask again although output has gone out. With messages:
    what went out so far is a whole message, and `added` is that message and those that follow it, as in the messages of
    the next request. The response has the messages of all marks in `added`. With `added=()`, the same message goes on.

    Raises:
        TypeError: it is not a Chunk, or `added` has something else than messages.
    """
    if not isinstance(chunk, Chunk):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
        raise TypeError(f"emit: expected a Chunk, got {kind_of(chunk)}; write emit(Chunk(text))")
    yield More(with_messages(chunk, "emit"))


def with_messages(chunk: Chunk, who: str) -> Chunk:
    """Return a chunk whose mark, if it has one, is a tuple of messages.

    Raises:
        TypeError: the mark has something else than messages.
    """
    if chunk.added is None:
        return chunk
    if isinstance(chunk.added, Message) or not isinstance(chunk.added, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
        raise TypeError(
            f"{who}: expected several messages in Chunk.added, got {kind_of(chunk.added)}; write added=(message,)"
        )
    added = tuple(chunk.added)
    for message in added:
        if not isinstance(message, Message):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
            raise TypeError(
                f"{who}: expected messages in Chunk.added, got {kind_of(message)}; write Message.user(…), …"
            )
    return chunk if added is chunk.added else attrs.evolve(chunk, added=added)


def ask(request: Request, *, target: Adapts | None = None, through: Sequence[Middleware] = ()) -> Flow[Response]:
    """Ask a model from within a middleware, whole, whatever the mode of the call, and return its answer::

        answer = yield from ask(request.evolve(messages=f"Is this harmless? {text}"), target=judge, through=[Retry()])

    It is a call within the call: it has a record of its own, `through` is its own stack, outermost first, and it passes
    the layers further out as an attempt does. Each `Tracing` further out gives it a span. Its tokens are in `request.call.spent` and
    `response.total_usage`; the call's own usage and attempts do not change. The limits of the call apply.

    Args:
        request: the request, made by `request.evolve(…)` of the request of the call.
        target: the `Target` that answers; by default that of the request.
        through: middleware for this question alone.

    Raises:
        TypeError: `request` is not a Request, or `through` is not a sequence of middleware.
    """
    if not isinstance(request, Request):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
        raise TypeError(f"ask: expected a Request, got {kind_of(request)}; write ask(request.evolve(messages=…))")
    if not isinstance(through, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
        raise TypeError(f"ask: expected a list of middleware in through, got {kind_of(through)}; write through=[…]")
    if target is not None:
        request = request.evolve(target=target)
    call = request.call
    observers = tuple([observer.ask() for observer in observers_of(request)])
    inner = observed_by(replaced(request, {"call": call.fork()}), observers)
    return (yield from _asked(inner, compose(through)(inner), observers, call))


def _asked(
    request: Request, flow: Flow[Response], observers: Sequence[AskObserver], outer: CallRecord
) -> Flow[Response]:
    """Run the flow of a question, which belongs to the call of the record `outer`."""
    call = request.call
    before = len(call.spent)
    try:
        answered: object = yield from _Nested(call).over(flow)
        response = to_response(answered, "an ask's stack")
    except BaseException as error:
        call.last_error = None  # its frames refer to the call
        for observer in reversed(observers):
            observer.end(None, error)
        if not isinstance(error, Exception):
            outer.take_endings(call)  # a flow that is given up cannot yield, so the outer call cleans up
            raise
        # The error may quote the question, and what is logged of an error is masked against these messages.
        outer.sent_messages = (*outer.sent_messages, *request.messages, *call.sent_messages)
        if call.endings:
            yield AskEnd(request)
        raise
    for observer in reversed(observers):
        observer.end(response, None)
    if call.endings:
        yield AskEnd(request)
    if response.provider is None:
        response = response.evolve(provider=call.provider.telemetry_name)
    return response.evolve(total_usage=Usage.sum([spent.usage for spent in call.spent[before:]]), cost=call.cost)


class _Nested(Relay):
    """The relay of a question: its chunks stay inside, and its record's limits bound what it waits for."""

    def __init__(self, call: CallRecord) -> None:
        self.call = call

    def see(self, effect: Effect) -> Seen:
        if isinstance(effect, (Chunk, More)):
            return ()
        if isinstance(effect, (Sleep, Perform)) and effect.within is None:
            effect.within = self.call
        return effect


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
    if not is_unfinished(result):
        return result
    discard(result)
    raise TypeError(
        f"perform: expected a function that returns a value, got {_name(function)}, which returned "
        f"{kind_of(result)}; {HOW_TO_PERFORM}"
    )


def is_unfinished(value: object) -> bool:
    """Whether a value is a coroutine, a generator or anything else that has to be awaited or run first."""
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
