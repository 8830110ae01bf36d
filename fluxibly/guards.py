"""What callers may hand over, whatever its annotation says: `isinstance` for plain data, and how to show it.

Type checkers are told what JSON and YAML give: values of any type.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeGuard


def is_mapping(value: object) -> TypeGuard[Mapping[Any, Any]]:
    """Whether `value` is a mapping."""
    return isinstance(value, Mapping)


def is_list(value: object) -> TypeGuard[list[Any]]:
    """Whether `value` is a list."""
    return isinstance(value, list)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether `value` is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def shown(value: object) -> str:
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
