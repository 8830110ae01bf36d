"""Raising an error in a flow and closing a flow, whatever the middleware in it do, and steps in a context."""

from __future__ import annotations

from collections.abc import Coroutine, Generator
from contextvars import Context
from types import coroutine
from typing import Any, Protocol, TypeVar

from fluxibly._drivers.diagnosis import live_layers, report_swallowed
from fluxibly.flow.culprits import catcher
from fluxibly.flow.effects import Effect, Flow
from fluxibly.types import Response

T = TypeVar("T")


def throw(flow: Flow[Response], error: BaseException) -> Effect:
    """Raise `error` in the flow, and return the effect that it yields next.

    Raises:
        StopIteration: the flow handled the error and returned.
        BaseException: the error that came out of the flow. If `error` is not an Exception, `error` itself comes out,
            whatever the middleware did (law: KeyboardInterrupt, CancelledError and their kind pass).
    """
    try:
        error = throwable(error)
        # An Exception belongs to the middleware, which may handle it, replace it or ask again.
        if isinstance(error, Exception):
            return flow.throw(error)
        # An async call was abandoned where it waited, and a flow that is closed must not yield again.
        if isinstance(error, GeneratorExit):
            close(flow)
            raise error
        did = "yielded again"
        # A cancellation or a Ctrl-C belongs to the caller, so a flow that does anything but let it pass is at fault.
        try:
            flow.throw(error)
        except StopIteration:
            did = "returned normally"
        except BaseException as raised:
            if raised is error:
                raise
            did = f"raised {type(raised).__name__}"
        report_swallowed(error, catcher(error) or "the middleware (unknown)", did)
        # A flow that yielded again is still suspended, and its `finally` blocks have to run before the error goes on.
        close(flow)
        raise error
    finally:
        del error  # it refers to this frame


def throwable(error: BaseException) -> BaseException:
    """Return an error as it is thrown into a flow. A StopIteration would end each generator on its way (PEP 479)."""
    if not isinstance(error, StopIteration):
        return error
    wrapped = RuntimeError("a provider, or a function that a middleware performs, raised StopIteration")
    wrapped.__cause__ = error
    return wrapped


def close(flow: Flow[Response]) -> None:
    """Close a flow. A middleware that yields in its `finally` is logged and otherwise ignored."""
    # The layers are listed before the close, because a generator that has ended no longer refers to its inner flow.
    layers = live_layers(flow)
    try:
        flow.close()
    except RuntimeError as error:
        # A layer that yielded is still suspended; if no layer is, the RuntimeError is an error of the middleware's own.
        alive = [layer for layer in layers if layer.gi_frame is not None and layer.gi_suspended]
        if "ignored GeneratorExit" not in str(error) or not alive:
            raise
        report_swallowed(None, f"the middleware {alive[-1].__qualname__}", "yielded again")


class Waiter(Protocol):
    waits_for: Any
    """On asyncio, the future that is waited for."""


@coroutine
def in_context(context: Context, work: Coroutine[Any, Any, T], waiter: Waiter | None = None) -> Generator[Any, Any, T]:
    """Await `work`, and run each of its steps in `context`. A `waiter` is told what the work waits for."""
    run = context.run
    try:
        waits_for = run(work.send, None)
        while True:
            if waiter is not None:
                waiter.waits_for = waits_for
            try:
                value = yield waits_for
            except BaseException as error:  # noqa: BLE001  # it goes into the work
                waits_for = run(work.throw, error)
            else:
                waits_for = run(work.send, value)
    except StopIteration as stop:
        result: T = stop.value
        return result
