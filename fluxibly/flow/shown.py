"""The `repr` of a middleware that has none of its own: of a function, a `partial`, or an object of a plain class.

Its settings are what a closure, a partial or the object's attributes hold, as far as they are plain values. Texts that may be
secret are masked, and what can change (a list, a table) is not shown, because it may hold what a call has said.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from enum import Enum
from functools import partial
from types import FunctionType, MethodType
from typing import Any, TypeGuard, cast

from fluxibly._checks import is_secret, shown_url

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def repr_of_layer(layer: object) -> str:
    """Return the `repr` of a middleware, with its settings: `polite(tone='warm')`."""
    settings = settings_of_layer(layer)
    if settings is None:
        return repr(layer)
    name = name_of_layer(layer)
    return f"{name}({settings})" if settings or not isinstance(layer, FunctionType) else name


def name_of_layer(layer: object) -> str:
    """Return the name of a function, or of the class of an object, without the function that it was written in."""
    if _is_partial(layer):
        return name_of_layer(layer.func)
    name = getattr(layer, "__qualname__", None)
    return (name if isinstance(name, str) else type(layer).__qualname__).rpartition("<locals>.")[2]


def settings_of_layer(layer: object) -> str | None:
    """Return the settings of a middleware without a `repr` of its own, like "tone='warm'"; None if it has one."""
    if _is_partial(layer):
        inner = settings_of_layer(layer.func) if isinstance(layer.func, (FunctionType, MethodType)) else None
        given = [*["…" for _ in layer.args], *_shown(layer.keywords)]  # there is no name to judge a positional value by
        return ", ".join([*given, *([inner] if inner else [])])
    if isinstance(layer, MethodType):
        return settings_of_layer(layer.__self__)
    if isinstance(layer, FunctionType):
        names, cells = layer.__code__.co_freevars, layer.__closure__ or ()
        return ", ".join(_shown({name: _content(cell) for name, cell in zip(names, cells, strict=True)}))
    if type(layer).__repr__ is not object.__repr__:
        return None
    slots = [name for kind in type(layer).__mro__ for name in _slots(kind)]
    attributes = {name: getattr(layer, name, _NOTHING) for name in slots} | getattr(layer, "__dict__", {})
    return ", ".join(_shown(attributes))


def _is_partial(layer: object) -> TypeGuard[partial[Any]]:
    return isinstance(layer, partial)


_NOTHING = object()


def _slots(kind: type) -> tuple[str, ...]:
    slots: Any = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _content(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # the variable has no value yet
        return _NOTHING


def _shown(settings: dict[str, Any]) -> Iterator[str]:
    for name, value in settings.items():
        if not name.startswith("_") and (text := _value(value, secret=is_secret(name))) is not None:
            yield f"{name}={text}"


def _value(value: object, *, secret: bool) -> str | None:
    """Return the `repr` of a value that is a setting, or None for any other value."""
    if isinstance(value, Enum):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, complex)):
        return _SHORT.repr(value)
    if isinstance(value, str):
        return "'***'" if secret else _SHORT.repr(shown_url(value) if "://" in value else value)
    if isinstance(value, (tuple, frozenset)):
        items = [_value(each, secret=secret) for each in cast("tuple[object, ...]", value)]
        if None in items:
            return None
        inside = ", ".join(map(str, items[:6])) + (", …" if len(items) > 6 else "")
        return f"({inside}{',' if len(items) == 1 else ''})" if isinstance(value, tuple) else f"frozenset({{{inside}}})"
    if isinstance(value, (FunctionType, type)):
        return value.__qualname__.rpartition("<locals>.")[2]
    return None
