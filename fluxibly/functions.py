"""Functions by name. YAML names a function, and never the path of any code."""

from __future__ import annotations

import threading
from collections.abc import Callable
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction
from typing import Any, TypeVar, cast

from fluxibly._checks import did_you_mean, kind_of
from fluxibly._plugins import check_registration, entry_points, is_redefinition, load
from fluxibly.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])

_functions: dict[str, Callable[..., Any]] = {}
_lock = threading.Lock()


def register_function(name: str, function: F, *, replace: bool = False) -> F:
    """Register a function, so that YAML can name it wherever a middleware takes a function.

    Another package registers its functions by the entry-point group `fluxibly.functions`.

    Args:
        name: the name for configurations.
        function: the function, or any callable.
        replace: take over a name that is in use. (A function may always replace an earlier definition of itself, as
            notebooks do.)

    Returns:
        The function.

    Raises:
        ValueError: the name is in use, or empty.
        TypeError: `function` cannot be called.
    """
    check_registration(name, function, "function")
    with _lock:
        old = _functions.get(name)
        taken = old is not None and not is_redefinition(old, function)
        if not replace and (taken or (old is None and name in entry_points("functions"))):
            raise ValueError(f"the function {name!r} is registered already; pass replace=True to take it over")
        _functions[name] = function
    return function


def find_function(name: str) -> Callable[..., Any]:
    """Return the function that is registered under a name, or that an installed package has under it.

    Raises:
        ConfigError: there is none, or the package's entry point is broken.
    """
    if name in _functions:
        return _functions[name]
    points = entry_points("functions")
    if name in points:
        return load(points[name])
    known = known_functions()
    near = did_you_mean(name, known)
    advice = near or f"; write register_function({name!r}, function) before the configuration is read."
    raise ConfigError(f"function {name!r} not registered{advice} Registered functions: {known}")


def known_functions() -> list[str]:
    """Return the names of all registered functions."""
    return sorted({*_functions, *entry_points("functions")})


def to_function(value: F | str | None) -> F | None:
    """Return the function that a registered name stands for, and everything else as it is.

    A converter of attrs calls it; with the type of its own parameter it tells type checkers what the field takes.
    """
    return cast("F", find_function(value)) if isinstance(value, str) else value


def check_function(name: str, value: object, *, flows: bool = False) -> str | None:
    """Check a function that a middleware calls by itself: one that returns its value at once, or a flow if it takes `flows`."""
    if not callable(value):
        return f"{name}: expected a function, got {kind_of(value)}"
    for call in (value, getattr(type(value), "__call__", None)):  # noqa: B004  # the method itself
        generates = isgeneratorfunction(call)
        if flows and (iscoroutinefunction(call) or isasyncgenfunction(call)):
            return (
                f"{name}: expected a plain function or a generator function, got an async function; write def, and wait by "
                "result = yield from perform(call, acall)"
            )
        if not flows and (iscoroutinefunction(call) or isasyncgenfunction(call) or generates):
            kind = "a generator function" if generates else "an async function"
            return f"{name}: expected a plain function, got {kind}; write def, and return the value"
    return None


def arity(name: str, function: Callable[..., Any], *, most: int, takes: str) -> int:
    """Return how many arguments a function takes: as many as it has positional parameters without a default, at least one.

    Args:
        takes: what it may take, for the message.

    Raises:
        ConfigError: it cannot take as few, or needs more than `most`.
    """
    from inspect import signature  # late, because it takes long to load

    try:
        parameters = signature(function).parameters.values()
    except (TypeError, ValueError):  # a function that is written in C need not have one
        return 1
    positional = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    several = any(each.kind is each.VAR_POSITIONAL for each in parameters)
    needed = sum([each.default is each.empty for each in positional])
    missing = [each for each in parameters if each.kind is each.KEYWORD_ONLY and each.default is each.empty]
    if needed > most or missing or not (positional or several):
        raise ConfigError(f"{name}: expected a function that takes {takes}, got one with {signature(function)}")
    return max(needed, 1)
