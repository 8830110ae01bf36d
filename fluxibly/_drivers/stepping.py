"""How an error goes into a flow, and how a flow is closed, whatever the middleware in it do."""

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
        BaseException: what came out of the flow. If `error` is not an Exception then it is what comes out, whatever
            the middleware did (law: KeyboardInterrupt, CancelledError and their kind pass).
    """
    try:
        if isinstance(error, StopIteration):
            error = _wrapped(error)
        if isinstance(error, Exception):
            return flow.throw(error)
        if isinstance(error, GeneratorExit):  # an async call was given up where it waited
            close(flow)
            raise error
        did = "yielded again"
        try:
            flow.throw(error)
        except StopIteration:
            did = "returned normally"
        except BaseException as raised:
            if raised is error:
                raise
            did = f"raised {type(raised).__name__}"
        _tell(error, _catcher(error), did)
        close(flow)
        raise error
    finally:
        del error  # it refers to this frame


def _wrapped(stop: StopIteration) -> RuntimeError:
    """What to throw for a StopIteration: it would itself end each generator on its way (PEP 479)."""
    error = RuntimeError("a provider, or what a middleware performs, raised StopIteration")
    error.__cause__ = stop
    return error


def close(flow: Flow[Response]) -> None:
    """Close a flow; a middleware that yields in its `finally` is logged and otherwise ignored."""
    layers = live_layers(flow)
    try:
        flow.close()
    except RuntimeError as error:
        alive = [layer for layer in layers if layer.gi_frame is not None and layer.gi_suspended]
        if "ignored GeneratorExit" not in str(error) or not alive:
            raise
        _tell(None, alive[-1].__qualname__, "yielded again")


def _tell(error: BaseException | None, layer: str, did: str) -> None:
    name = "GeneratorExit" if error is None else type(error).__name__
    text = f"the middleware {layer} {did} after {name}; it must let it pass"
    if error is not None:
        error.add_note(f"fluxibly: {text}")
    from fluxibly._logs import ERROR, log  # logging takes longer to import than all of this package's own code

    log(ERROR, "%s", problem=text)


def _catcher(error: BaseException) -> str:
    """The outermost frame of a user's that a thrown error went through inside the flow: the one that caught it."""
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
    """The generators that a suspended flow waits in, outermost first."""
    layers: list[GeneratorType[Any, Any, Any]] = []
    inner: Any = flow
    while _is_generator(inner):
        layers.append(inner)
        within = inner.gi_yieldfrom
        if within is None and inner.gi_frame is not None:
            within = inner.gi_frame.f_locals.get("flow")  # a combinator steps its inner flow by hand
        inner = within
    return layers
