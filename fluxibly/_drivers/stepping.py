"""Raising an error in a flow, and closing a flow, whatever the middleware in it do."""

from __future__ import annotations

from collections.abc import Sequence
from types import GeneratorType
from typing import Any, TypeGuard

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
        _report(error, _catcher(error), did)
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
        _report(None, alive[-1].__qualname__, "yielded again")


def _report(error: BaseException | None, layer: str, did: str) -> None:
    name = "GeneratorExit" if error is None else type(error).__name__
    text = f"the middleware {layer} {did} after {name}; it must let it pass"
    if error is not None:
        error.add_note(f"fluxibly: {text}")
    from fluxibly._logs import ERROR, log  # importing logging takes longer than all of fluxibly's own code

    log(ERROR, "%s", problem=text)


def _catcher(error: BaseException) -> str:
    """Return the function that caught a thrown error: the outermost frame in its traceback that is not fluxibly's."""
    trace = error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        if not module.startswith("fluxibly."):
            return trace.tb_frame.f_code.co_qualname
        trace = trace.tb_next
    return "(unknown)"


def _is_generator(value: object) -> TypeGuard[GeneratorType[Any, Any, Any]]:
    return isinstance(value, GeneratorType)


def live_layers(flow: Flow[Any]) -> Sequence[GeneratorType[Any, Any, Any]]:
    """Return the generators that a suspended flow waits in, outermost first."""
    layers: list[GeneratorType[Any, Any, Any]] = []
    inner: Any = flow
    while _is_generator(inner):
        layers.append(inner)
        within = inner.gi_yieldfrom
        if within is None and inner.gi_frame is not None:
            # A combinator steps its inner flow by hand, so `gi_yieldfrom` does not show it.
            within = inner.gi_frame.f_locals.get("flow")
        inner = within
    return layers
