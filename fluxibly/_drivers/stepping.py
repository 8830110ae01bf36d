"""Raising an error in a flow, and closing a flow, whatever the middleware in it do."""

from __future__ import annotations

from fluxibly._drivers.diagnosis import live_layers, report_swallowed
from fluxibly.flow.culprits import catcher
from fluxibly.flow.effects import Effect, Flow
from fluxibly.types import Response


def throw(flow: Flow[Response], error: BaseException) -> Effect:
    """Raise `error` in the flow, and return the effect that it yields next.

    Raises:
        StopIteration: the flow handled the error and returned.
        BaseException: the error that came out of the flow. If `error` is not an Exception, `error` itself comes out,
            whatever the middleware did (law: KeyboardInterrupt, CancelledError and their kind pass).
    """
    try:
        # A StopIteration would itself end each generator on its way (PEP 479).
        if isinstance(error, StopIteration):
            error = _wrapped(error)
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


def _wrapped(stop: StopIteration) -> RuntimeError:
    """Return the error to throw instead of a StopIteration."""
    error = RuntimeError("a provider, or a function that a middleware performs, raised StopIteration")
    error.__cause__ = stop
    return error


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
