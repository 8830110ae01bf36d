"""Errors and notes that name the middleware that broke a rule, and the code to write instead."""

from __future__ import annotations

import dis
from collections.abc import Sequence
from types import CodeType, GeneratorType
from typing import Any, NoReturn, TypeGuard

import attrs

from fluxibly._checks import kind_of
from fluxibly.flow.compose import code_of, layer_name
from fluxibly.flow.culprits import is_users, suspects
from fluxibly.flow.effects import Flow, Middleware
from fluxibly.types import Request, Response

HOW_TO_RETURN = "end it with: return (yield from call_next(request))"


def report_swallowed(error: BaseException | None, layer: str, did: str) -> None:
    """Log that a layer did not let a BaseException pass, and note it on that exception. None stands for GeneratorExit."""
    name = "GeneratorExit" if error is None else type(error).__name__
    text = f"{layer} {did} after {name}; it must let it pass"
    if error is not None:
        error.add_note(f"fluxibly: {text}")
    report(text)


def report(problem: str) -> None:
    """Log what a middleware did wrong."""
    from fluxibly._logs import ERROR, log  # importing logging takes longer than all of fluxibly's own code

    log(ERROR, "%s", problem=problem)


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
        inner = within if _is_generator(within) else getattr(within, "flow", None)  # the rest of a branch's flow
    return layers


def unknown_effect(flow: Flow[Response], effect: object) -> TypeError:
    """Return the error for a middleware that yields a value that is not an effect."""
    return TypeError(
        f"the middleware {live_layers(flow)[-1].__qualname__} yielded {kind_of(effect)}; it may yield only from "
        "call_next(request), sleep(...), perform(...) and the combinators"
    )


def raise_not_a_response(value: object, middleware: Sequence[Middleware]) -> NoReturn:
    """Raise the error for a stack that returned a value other than a `Response`."""
    culprit = first_without_return(middleware) if value is None else None
    who = suspects(middleware) if culprit is None else f"the middleware {culprit}"
    raise TypeError(f"{who} returned {kind_of(value)}, expected a Response; {HOW_TO_RETURN}")


def explain(error: Exception, middleware: Sequence[Middleware]) -> None:
    """Add a note to an error that arose because a layer passed on a value that is not a request or a response."""
    if not isinstance(error, AttributeError):
        return
    if error.name == "call" and not isinstance(error.obj, Request):
        error.add_note(
            f"fluxibly: call_next: expected a Request, got {kind_of(error.obj)}; write call_next(request.evolve(…))"
        )
    if isinstance(error.obj, Response) or error.name not in _RESPONSE:
        return
    culprit = first_without_return(middleware) if error.obj is None else None
    if culprit is not None:
        error.add_note(f"fluxibly: the middleware {culprit} returns None; {HOW_TO_RETURN}")
    elif any(map(is_users, middleware)):
        error.add_note(
            f"fluxibly: it seems that {suspects(middleware)} returned {kind_of(error.obj)}, expected a Response; "
            f"{HOW_TO_RETURN}"
        )


_RESPONSE = frozenset(field.name for field in attrs.fields(Response)) | {"has_output", "evolve"}


def first_without_return(middleware: Sequence[Middleware]) -> str | None:
    """Return the name of the innermost middleware whose code has no `return` with a value."""
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
