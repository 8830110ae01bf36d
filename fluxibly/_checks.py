"""Checks of what callers pass, whatever its annotation says, and words for what is wrong with it.

Type checkers are told what JSON and YAML give: values of any type.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterable, Mapping
from functools import wraps
from typing import Any, TypeGuard, TypeVar


def is_mapping(value: object) -> TypeGuard[Mapping[Any, Any]]:
    """Whether `value` is a mapping."""
    return isinstance(value, Mapping)


def is_list(value: object) -> TypeGuard[list[Any]]:
    """Whether `value` is a list."""
    return isinstance(value, list)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether `value` is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a finite number; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def short_repr(value: object) -> str:
    """A value for an error message, short whatever it is."""
    return reprlib.repr(value)


def kind_of(value: object) -> str:
    """A value's kind, for an error message."""
    return "None" if value is None else f"a {type(value).__name__}"


_SECRET = re.compile("key|token|secret|password|credential|auth|cookie|header", re.IGNORECASE)


def repr_without_secrets(settings: object) -> str:
    """`repr` of settings, without the texts in headers and under other names that secrets have."""
    return repr(_without_secrets(settings, secret=False))


def repr_of_headers(headers: object) -> str:
    """`repr` of headers, without what they say."""
    return repr(_without_secrets(headers, secret=True))


def _without_secrets(value: object, *, secret: bool) -> object:
    if is_mapping(value):
        return {
            name: _without_secrets(each, secret=secret or _SECRET.search(str(name)) is not None)
            for name, each in value.items()
        }
    if is_list(value):
        return [_without_secrets(each, secret=secret) for each in value]
    return "***" if secret and isinstance(value, (str, bytes)) else value


T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing if no known name is near."""
    import difflib  # late, for the sake of `import fluxibly`

    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def suggests_names(cls: type[T]) -> type[T]:
    """A class whose TypeError for an unknown keyword names the nearest that it knows (Python's own does from 3.13)."""
    init: Any = cls.__init__
    names = [name for name in init.__annotations__ if name != "return"]

    @wraps(init)
    def checked(self: object, *args: Any, **settings: Any) -> None:
        for name in settings:
            if name not in names:
                raise TypeError(f"{cls.__name__} has no {name!r}{did_you_mean(name, names)}")
        init(self, *args, **settings)

    type.__setattr__(cls, "__init__", checked)
    return cls
