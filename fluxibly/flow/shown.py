"""The `repr` of a middleware that has none of its own: of a function, a `partial`, or an object of a plain class.

Its settings are what a closure, a partial or the object's attributes hold, as far as they are plain values. Texts that may be
secret are masked, and what can change (a list, a table) is not shown, because it may hold what a call has said.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator
from enum import Enum
from functools import partial
from itertools import islice
from types import FunctionType, MethodType
from typing import Any, TypeGuard, cast

from fluxibly._checks import is_secret, shown_url

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_MOST_ITEMS, _MOST_LEVELS, _MOST_BITS = 6, 3, 200
_KEY = re.compile(
    r"\b(?:bearer|basic)\s+[\w.+/=-]{8}|\b(?:sk|pk|rk|gsk|xai|hf|nvapi|pplx|ghp|github_pat)[-_][\w-]{12}|\bAIza[\w-]{20}"
    r"|\bAKIA[A-Z0-9]{16}|\beyJ[\w-]{10,}\.|(?:password|passwd|pwd|secret|api_?key|accountkey)\s*=\s*\S",
    re.IGNORECASE,
)
"""A text that is a key, or has one in it, whatever it is called: `Bearer …`, the prefixes of well-known services, a JWT, and the
password of a connection string."""


def repr_of_layer(layer: object) -> str:
    """Return the `repr` of a middleware, with its settings: `polite(tone='warm')`. It never raises."""
    name = name_of_layer(layer)
    try:
        settings = settings_of_layer(layer)
        if settings is None:
            return repr(layer)
    except Exception as error:  # noqa: BLE001  # a `repr` or an attribute of the user's own may raise anything
        return f"<{name}: its repr raises {type(error).__name__}>"
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


def _value(value: object, *, secret: bool, level: int = 0) -> str | None:
    """Return the `repr` of a value that is a setting, or None for any other value."""
    if isinstance(value, Enum):  # its value may be a secret
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:  # Python refuses to write a huge one
        return "…"
    if value is None or isinstance(value, (bool, int, float, complex)):
        return _SHORT.repr(value)
    if isinstance(value, str):
        return "'***'" if secret or _KEY.search(value) else _SHORT.repr(shown_url(value) if "://" in value else value)
    if type(value) in (tuple, frozenset):  # a named tuple is a record, and a field may be secret
        return _items(cast("tuple[object, ...] | frozenset[object]", value), secret=secret, level=level + 1)
    if isinstance(value, (FunctionType, type)):
        return value.__qualname__.rpartition("<locals>.")[2]
    return None


def _items(values: tuple[object, ...] | frozenset[object], *, secret: bool, level: int) -> str | None:
    """Return the `repr` of the first values of a tuple or a set, or None if one is no setting."""
    if level > _MOST_LEVELS:
        return "…"
    items = [_value(each, secret=secret, level=level) for each in islice(values, _MOST_ITEMS)]
    if None in items:
        return None
    inside = ", ".join(map(str, items)) + (", …" if len(values) > _MOST_ITEMS else "")
    return f"({inside}{',' if len(values) == 1 else ''})" if isinstance(values, tuple) else f"frozenset({{{inside}}})"
