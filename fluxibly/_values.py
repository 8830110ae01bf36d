"""`repr`, equality and hash by a class's fields, written once for all data classes.

attrs would compile them anew for each class at every import: a seventh of the time that `from fluxibly import LLM` takes.
So the classes of `types`, `messages` and `config` say `repr=False, eq=False` to attrs, and take them from here.
"""

from __future__ import annotations

from typing import Any

import attrs


class Shown:
    """A class of attrs whose `repr` lists its fields. A field's own `repr=` setting is followed."""

    __slots__ = ()

    def __repr__(self) -> str:
        kind: Any = type(self)
        shown = [
            f"{field.name}={(field.repr if callable(field.repr) else repr)(getattr(self, field.name))}"
            for field in attrs.fields(kind)
            if field.repr
        ]
        return f"{kind.__qualname__}({', '.join(shown)})"


class Slotted:
    """A class with `__slots__`, whose instances are equal if their slots are. attrs would cost more at import."""

    __slots__: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    __hash__ = None  # type: ignore[assignment]  # an effect can change

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.__slots__)})"


class Value(Shown):
    """A class of attrs whose instances are equal if their fields are. A field's own `eq=False` or key is followed."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        if other.__class__ is not self.__class__:
            return NotImplemented
        return _compared(self) == _compared(other)

    def __hash__(self) -> int:
        return hash(_compared(self))


def _compared(value: object) -> tuple[Any, ...]:
    kind: Any = type(value)
    return tuple(
        [
            getattr(value, field.name) if field.eq_key is None else field.eq_key(getattr(value, field.name))
            for field in attrs.fields(kind)
            if field.eq
        ]
    )
