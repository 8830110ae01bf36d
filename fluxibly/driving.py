"""What the four drivers share: how an error goes into a flow, and what to say of a middleware that breaks the rules."""

from __future__ import annotations

import dis
from collections.abc import Sequence
from types import CodeType, GeneratorType
from typing import Any, NoReturn, TypeGuard

import attrs

from fluxibly._checks import shown
from fluxibly.effects import Effect, Flow, Middleware
from fluxibly.errors import StreamInterrupted, interrupted
from fluxibly.flow import code_of, layer_name
from fluxibly.types import Request, Response

HOW_TO_RETURN = "end it with: return (yield from call_next(request))"


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


def unknown_effect(flow: Flow[Response], effect: object) -> TypeError:
    """The error for a middleware that yields what is no effect."""
    return TypeError(
        f"the middleware {live_layers(flow)[-1].__qualname__} yielded {shown(effect)}; it may yield only from "
        "call_next(request), sleep(...), perform(...) and the combinators"
    )


def raise_not_a_response(value: object, middleware: Sequence[Middleware]) -> NoReturn:
    """Raise the error for a stack that returned something else than a `Response`."""
    culprit = first_without_return(middleware) if value is None else None
    who = suspects(middleware) if culprit is None else f"the middleware {culprit}"
    raise TypeError(f"{who} returned {shown(value)} where a Response was due; {HOW_TO_RETURN}")


def explain(error: Exception, middleware: Sequence[Middleware]) -> None:
    """Say so if an error came of a layer that hands on what is no request or response, which another then read."""
    if not isinstance(error, AttributeError):
        return
    if error.name == "call" and not isinstance(error.obj, Request):
        error.add_note(f"fluxibly: call_next takes a Request, not {shown(error.obj)}: call_next(request.evolve(…))")
    if isinstance(error.obj, Response) or error.name not in _RESPONSE:
        return
    culprit = first_without_return(middleware) if error.obj is None else None
    if culprit is not None:
        error.add_note(f"fluxibly: the middleware {culprit} returns None; {HOW_TO_RETURN}")
    elif any(map(_is_users, middleware)):
        error.add_note(
            f"fluxibly: it seems that {suspects(middleware)} returned {shown(error.obj)} where a Response was due; "
            f"{HOW_TO_RETURN}"
        )


_RESPONSE = frozenset(field.name for field in attrs.fields(Response)) | {"has_output", "evolve"}


def suspects(middleware: Sequence[Middleware]) -> str:
    """The layers that may have returned what is no response: those that are not ours."""
    names = [layer_name(layer) for layer in middleware if _is_users(layer)] or ["(none)"]
    return f"the middleware {names[0]}" if len(names) == 1 else f"one of the middleware {', '.join(names)}"


def _is_users(layer: object) -> bool:
    return not layer.__module__.startswith("fluxibly.")


def first_without_return(middleware: Sequence[Middleware]) -> str | None:
    """The innermost middleware whose code has no `return` with a value."""
    for layer in reversed(middleware):
        code = code_of(layer)
        if code is not None and not _returns_value(code):
            return layer_name(layer)
    return None


def _returns_value(code: CodeType) -> bool:
    before = None
    for step in dis.get_instructions(code):
        if step.opname == "RETURN_CONST" and step.argval is not None:
            return True
        if step.opname == "RETURN_VALUE" and not (
            before is not None and before.opname == "LOAD_CONST" and before.argval is None
        ):
            return True
        before = step
    return False


def raise_interrupted(error: Exception, request: Request, delivered: Sequence[str]) -> None:
    """Raise `StreamInterrupted` from an error that is none yet, once chunks with these texts have gone out."""
    text = "".join(delivered)
    if not isinstance(error, StreamInterrupted):
        raise interrupted(request, Response(text), error) from error
    if error.__cause__ is None and error.partial.text != text:
        error.partial = Response(text)  # a combinator refused a resend: it does not keep what it let through
