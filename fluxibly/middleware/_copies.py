"""Copies of a middleware that holds state: the same settings, and a state of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs


class Rebuilt:
    """A class of attrs whose copies, pickled ones too, are made anew from its settings.

    What calls share (a limiter's counts, a cache's answers in memory) has locks, and does not go with a copy. A store on
    disk or on a server is the same for all copies.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _rebuilt, (type(self), self._settings())

    def __deepcopy__(self, _: dict[int, Any]) -> Any:
        return _rebuilt(type(self), self._settings())  # the settings do not change, and functions and stores are shared

    def _settings(self) -> dict[str, Any]:
        kind: Any = type(self)
        return {field.alias: getattr(self, field.name) for field in attrs.fields(kind) if field.init}


def _rebuilt(kind: Callable[..., Any], settings: dict[str, Any]) -> Any:
    return kind(**settings)
